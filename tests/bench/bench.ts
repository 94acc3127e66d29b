/**
 * `bun run bench`: what genie costs above the delegates it calls, measured with real plugins in
 * real network namespaces, every contender once per round. See `bun run bench --help`.
 *
 * Exit status: 0 done, whether or not the targets hold; 1 a call failed; 2 used wrongly or
 * something is missing; 130 interrupted, after cleaning up.
 */
import { existsSync, statfsSync, writeFileSync } from "node:fs";
import { cpus, release, totalmem } from "node:os";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { canNetns, realPluginDir } from "../fakes.ts";
import { measure, type Storm, storm } from "./measure.ts";
import { type BenchNode, closeNode, command, openNode } from "./node.ts";
import {
  formatComparisons,
  formatStorms,
  formatSummaries,
  formatTargets,
  summarize,
  targets,
} from "./report.ts";
import { type Scenario, scenarios, selectScenarios, stormScenario } from "./scenarios.ts";

const root = join(import.meta.dir, "..", "..");
const usage = `Usage: bun run bench [options]

Measures genie against the delegates it calls: time, CPU, memory, and a storm of calls at once.
Needs root, and the packages containernetworking-plugins, iproute2 and openssl.

  --rounds N        rounds, one of every contender each (default 31)
  --only TEXT       only contenders whose name holds TEXT, and what they are compared with;
                    "storm" for the storm alone
  --storm N         calls started at once (default 100; 0 for no storm)
  --binary PATH     genie to measure, as it is (default: dist/genie, built first)
  --json FILE       write every figure to FILE
  --quick           3 rounds and one storm of 10: shows that it runs, measures little
  --help            this text

Contenders: ${scenarios.map(({ name }) => name).join(", ")}.
Files go to TMPDIR: its file system holds genie's record, whose writes are part of the time.
`;

interface Options {
  rounds: number;
  memoryRounds: number;
  only: string;
  stormCount: number;
  /** Storms per contender. */
  storms: number;
  binary: string;
  json: string;
}

/** The options, or what to say and with which exit status. */
function readOptions(args: string[]): Options | { status: number; text: string } {
  const options = {
    rounds: { type: "string" },
    only: { type: "string", default: "" },
    storm: { type: "string" },
    binary: { type: "string", default: "" },
    json: { type: "string", default: "" },
    quick: { type: "boolean", default: false },
    help: { type: "boolean", default: false },
  } as const;
  try {
    const { values } = parseArgs({ args, options });
    if (values.help) return { status: 0, text: usage };
    const { only, binary, json, quick } = values;
    if (only !== "storm" && selectScenarios(only).length === 0) {
      throw new Error(`no contender is named like "${only}"`);
    }
    return {
      rounds: readCount("--rounds", values.rounds ?? (quick ? "3" : "31"), 1),
      memoryRounds: quick ? 1 : 5,
      only,
      stormCount: readCount("--storm", values.storm ?? (quick ? "10" : "100"), 0),
      storms: quick ? 1 : 5,
      binary,
      json,
    };
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    return { status: 2, text: `bench: ${said}\n\n${usage}` };
  }
}

function readCount(option: string, text: string, min: number): number {
  const count = /^\d{1,5}$/.test(text) ? Number(text) : -1;
  if (count >= min) return count;
  throw new Error(`${option} needs a whole number, ${min} or more`);
}

/** What this machine lacks; "" when nothing. */
function missing(): string {
  if (process.platform !== "linux" || process.getuid?.() !== 0)
    return "it must run as root on Linux";
  const packages = [
    canNetns ? "" : "iproute2",
    realPluginDir === undefined ? "containernetworking-plugins" : "",
    Bun.which("openssl") === null ? "openssl" : "",
  ].filter((name) => name !== "");
  return packages.length === 0 ? "" : `missing: apt install ${packages.join(" ")}`;
}

/** Where it was measured. */
function machine(pluginDir: string) {
  const dpkg = ["dpkg-query", "--show", "containernetworking-plugins"];
  const fileSystems: Record<number, string> = {
    61267: "ext4",
    16914836: "tmpfs",
    1481003842: "xfs",
    2435016766: "btrfs",
    2035054128: "overlay",
  };
  const dir = process.env["TMPDIR"] ?? "/tmp";
  const type = Number(statfsSync(dir).type);
  return {
    cpus: cpus().length,
    cpu: cpus()[0]?.model ?? "",
    memoryMiB: Math.round(totalmem() / 1024 / 1024),
    kernel: release(),
    bun: Bun.version,
    plugins: Bun.which("dpkg-query")
      ? Bun.spawnSync(dpkg).stdout.toString().trim().split("\t")[1]
      : pluginDir,
    files: `${dir} (${fileSystems[type] ?? `file system 0x${type.toString(16)}`})`,
    date: new Date().toISOString(),
  };
}

/** Storms of genie and of its baseline in turns, so that both meet the same machine. */
async function runStorms(
  node: BenchNode,
  { stormCount, storms: repetitions }: Options,
  signal: AbortSignal,
): Promise<Storm[]> {
  const genie = scenarios.find(({ name }) => name === stormScenario);
  const bare = scenarios.find(({ name }) => name === genie?.baseline);
  if (!genie || !bare) throw new Error(`there is no scenario "${stormScenario}" with a baseline`);
  await genie.prepare?.(node);
  const storms: Storm[] = [];
  for (let i = 0; i < repetitions; i++) {
    for (const scenario of i % 2 === 0 ? [bare, genie] : [genie, bare]) {
      progress(`storm ${i + 1} of ${repetitions}, ${scenario.name}`);
      storms.push(...(await storm(node, scenario, stormCount, signal)));
    }
  }
  progress("");
  return storms;
}

/** One line on a terminal that is overwritten by the next; nothing elsewhere. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\u001b[K${text}`);
}

/** Measures all that was asked for and prints it. @returns the exit status */
async function bench(options: Options, node: BenchNode, signal: AbortSignal): Promise<number> {
  const host = machine(node.pluginDir);
  const print = (text: string) => void process.stdout.write(text);
  print(
    `${host.cpus} CPUs (${host.cpu}), ${host.memoryMiB} MiB, Linux ${host.kernel}, ` +
      `Bun ${host.bun}, plugins ${host.plugins}, files in ${host.files}\n`,
  );
  const chosen: Scenario[] = options.only === "storm" ? [] : selectScenarios(options.only);
  for (const scenario of chosen) await scenario.prepare?.(node);
  const series =
    chosen.length === 0
      ? []
      : await measure(node, chosen, {
          rounds: options.rounds,
          memoryRounds: options.memoryRounds,
          signal,
          onRound: (done, total) => progress(done === total ? "" : `round ${done} of ${total}`),
        });
  const summaries = summarize(series);
  const width = process.stdout.isTTY ? process.stdout.columns : Number.POSITIVE_INFINITY;
  if (chosen.length > 0) {
    print(
      `${options.rounds} rounds, medians; memory in ${options.memoryRounds} further rounds\n\n`,
    );
    print(`${formatSummaries(summaries, width)}\n${formatComparisons(summaries)}\n`);
  }
  const withStorm = options.stormCount > 0 && "storm".includes(options.only);
  const storms = withStorm ? await runStorms(node, options, signal) : [];
  if (withStorm) print(`${formatStorms(storms, width)}\n`);
  const judged = targets(summaries, storms);
  print(formatTargets(judged));
  if (options.json !== "") {
    const figures = { machine: host, options, summaries, series, storms, targets: judged };
    writeFileSync(options.json, `${JSON.stringify(figures, null, 2)}\n`);
  }
  const failures = storms.flatMap((one) => one.failures);
  for (const failure of new Set(failures))
    process.stderr.write(`bench: a call failed: ${failure}\n`);
  return failures.length === 0 ? 0 : 1;
}

async function main(): Promise<number> {
  const options = readOptions(process.argv.slice(2));
  if ("status" in options) {
    (options.status === 0 ? process.stdout : process.stderr).write(options.text);
    return options.status;
  }
  const lack = missing();
  if (lack !== "" || realPluginDir === undefined) {
    process.stderr.write(`bench: cannot measure here, ${lack}\n`);
    return 2;
  }
  const interrupted = new AbortController();
  for (const name of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(name, () => interrupted.abort(new Error(`interrupted by ${name}`)));
  }
  let node: BenchNode | undefined;
  try {
    if (options.binary === "") command(process.execPath, "tests/build.ts");
    const binary = resolve(options.binary || join(root, "dist", "genie"));
    if (!existsSync(binary)) throw new Error(`there is no ${binary}`);
    node = openNode(binary, realPluginDir);
    return await bench(options, node, interrupted.signal);
  } catch (error) {
    progress("");
    process.stderr.write(`bench: ${error instanceof Error ? error.message : String(error)}\n`);
    return interrupted.signal.aborted ? 130 : 1;
  } finally {
    for (const left of node ? closeNode(node) : []) {
      process.stderr.write(`bench: cannot clean up: ${left}\n`);
    }
  }
}

process.exit(await main());
