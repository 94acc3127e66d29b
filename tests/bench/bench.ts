/**
 * `bun run bench`: what genie costs above the delegates it calls, measured with real plugins in
 * real network namespaces, every contender once per round; storms of pods; large records; the parts
 * of a call. Every figure that the README states comes from here, by way of tests/bench/results.md.
 * See `bun run bench --help`.
 *
 * Exit status: 0 done, whether or not the targets hold; 1 a call failed; 2 used wrongly or
 * something is missing; 130 interrupted, after cleaning up.
 */
import { existsSync, statfsSync, writeFileSync } from "node:fs";
import { cpus, loadavg, release, totalmem } from "node:os";
import { resolve } from "node:path";
import { buildIfStale } from "../build.ts";
import { realPluginDir } from "../fakes.ts";
import { missing } from "../needs.ts";
import { dissect, measureFloors } from "./anatomy.ts";
import { measure, type Series } from "./measure.ts";
import { type BenchNode, closeNode, openNode } from "./node.ts";
import { benchNeeds, type Options, readOptions } from "./options.ts";
import {
  enterMounts,
  mountFolders,
  needFolders,
  type Peer,
  peerScenarios,
  peerStorm,
  probe,
  readPeer,
} from "./peers.ts";
import { type Findings, formatMarkdown, formatSections, sections } from "./report.ts";
import { measureScale } from "./scale.ts";
import {
  oldName,
  type Scenario,
  scenarios,
  selectScenarios,
  stormScenarios,
  withOld,
} from "./scenarios.ts";
import { type Storm, storm } from "./storm.ts";
import { summarize } from "./summary.ts";
import { targets } from "./targets.ts";

/** Set in the environment of a bench that has a mount namespace of its own. */
const mountsMarker = "GENIE_BENCH_MOUNTS";

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
    /** Of other work, when the bench begins: at 0 the figures are good. */
    load: (loadavg()[0] ?? 0).toFixed(1),
    bun: Bun.version,
    plugins: Bun.which("dpkg-query")
      ? Bun.spawnSync(dpkg).stdout.toString().trim().split("\t")[1]
      : pluginDir,
    files: fileSystems[type] ?? `file system 0x${type.toString(16)}`,
    date: new Date().toISOString(),
  };
}

/** Storms of genie, its baselines and its peers in turns, so that all meet the same machine. */
async function runStorms(
  node: BenchNode,
  all: Scenario[],
  { options, peers, signal }: Run,
): Promise<Storm[]> {
  const first = all.find(({ name }) => name === stormScenarios[0]);
  const names = [
    ...["floor", first?.baseline, ...stormScenarios, ...stormScenarios.map(oldName)],
    ...peers.map(peerStorm),
  ];
  const contenders = all.filter(({ name }) => names.includes(name));
  for (const scenario of contenders) await scenario.prepare?.(node);
  const storms: Storm[] = [];
  for (const count of options.stormCounts) {
    // A larger one has more to take the middle of in itself.
    const repetitions = Math.max(1, Math.round((options.storms * 100) / Math.max(100, count)));
    for (let i = 0; i <= repetitions; i++) {
      const withMemory = i === repetitions;
      for (const scenario of i % 2 === 0 ? contenders : contenders.toReversed()) {
        progress(`storm ${i + 1} of ${repetitions + 1} by ${count}, ${scenario.name}`);
        storms.push(...(await storm(node, scenario, { count, withMemory, signal })));
      }
    }
  }
  return storms;
}

/** One line on a terminal that is overwritten by the next; nothing elsewhere. */
function progress(text: string): void {
  if (process.stderr.isTTY) process.stderr.write(`\r\u001b[K${text}`);
}

/** What a run works with, besides the node. */
interface Run {
  options: Options;
  peers: Peer[];
  signal: AbortSignal;
}

/** Which operations of a call are taken apart. */
const dissected = [
  "floor",
  "bare idle plugin",
  "genie idle plugin",
  "bare 1 network",
  "bare 2 networks",
  "genie 1 network",
  "genie API 1 network",
  "genie API 1 object",
];

/** Measures all that was asked for. */
async function find(node: BenchNode, run: Run): Promise<{ findings: Findings; series: Series[] }> {
  const { options, peers, signal } = run;
  const { only, parts, rounds, memoryRounds } = options;
  const probed = await probe(node, peers.flatMap(peerScenarios));
  const ours = (some: readonly Scenario[]) => (options.compare === "" ? [...some] : withOld(some));
  const all = [...ours(scenarios), ...probed.able];
  const chosen = parts.includes("rounds")
    ? ours(selectScenarios([...scenarios, ...probed.able], only))
    : [];
  for (const scenario of chosen) await scenario.prepare?.(node);
  const onRound = (done: number, total: number) => progress(`round ${done} of ${total}`);
  const series =
    chosen.length === 0
      ? []
      : await measure(node, chosen, { rounds, memoryRounds, signal, onRound });
  const summaries = summarize(series);
  progress("a call in its parts");
  const apart = parts.includes("parts")
    ? ours(scenarios.filter(({ name }) => dissected.includes(name)))
    : [];
  for (const scenario of apart) await scenario.prepare?.(node);
  const anatomies = await dissect(node, apart, { rounds: options.dissections, signal });
  const floors = parts.includes("parts") ? measureFloors(node, rounds) : undefined;
  const storms = parts.includes("storms") ? await runStorms(node, all, run) : [];
  progress("large records");
  const scale = parts.includes("scale")
    ? await measureScale({
        ...options.scale,
        ...{ binary: node.genie, floor: node.floor, signal },
      })
    : undefined;
  progress("");
  const findings: Findings = {
    ...{ summaries, storms, anatomies, ...(scale && { scale }), ...(floors && { floors }) },
    ...{ targets: targets(summaries, storms, scale) },
    ...{ peers: peers.map(({ name }) => name), peerNotes: probed.notes },
  };
  return { findings, series };
}

/** Measures, prints, and writes what was asked for. @returns the exit status */
async function bench(node: BenchNode, run: Run): Promise<number> {
  const { options } = run;
  const host = machine(node.pluginDir);
  const { findings, series } = await find(node, run);
  const all = sections(findings);
  const where =
    `${host.cpus} CPUs (${host.cpu}), ${host.memoryMiB} MiB, Linux ${host.kernel}, ` +
    `Bun ${host.bun}, plugins ${host.plugins}, files on ${host.files}, load ${host.load}`;
  const width = process.stdout.isTTY ? process.stdout.columns : Number.POSITIVE_INFINITY;
  const how = `${options.rounds} rounds, memory in ${options.memoryRounds} further ones`;
  process.stdout.write(`${where}\n${how}\n\n${formatSections(all, width)}`);
  if (options.results !== "") {
    const head = `By \`bun run bench\` on ${host.date.slice(0, 10)}: ${where}; ${how}.`;
    writeFileSync(options.results, formatMarkdown(all, head));
  }
  if (options.json !== "") {
    const figures = { machine: host, options, ...findings, series };
    writeFileSync(options.json, `${JSON.stringify(figures, null, 2)}\n`);
  }
  const failures = findings.storms.flatMap((one) => one.failures);
  for (const failure of new Set(failures))
    process.stderr.write(`bench: a call failed: ${failure}\n`);
  return failures.length === 0 ? 0 : 1;
}

async function main(): Promise<number> {
  const args = process.argv.slice(2);
  const options = readOptions(args);
  if ("status" in options) {
    (options.status === 0 ? process.stdout : process.stderr).write(options.text);
    return options.status;
  }
  const lack = missing(...benchNeeds);
  if (lack !== undefined || realPluginDir === undefined) {
    process.stderr.write(`bench: cannot measure here, ${lack}\n`);
    return 2;
  }
  const interrupted = new AbortController();
  for (const name of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    process.on(name, () => interrupted.abort(new Error(`interrupted by ${name}`)));
  }
  let node: BenchNode | undefined;
  try {
    const peers = options.peers.map(readPeer);
    const isMounted = process.env[mountsMarker] !== undefined;
    if (needFolders(peers) && !isMounted) {
      return await enterMounts([import.meta.path, ...args], mountsMarker, interrupted.signal);
    }
    const binary = resolve(options.binary || buildIfStale());
    const old = options.compare === "" ? "" : resolve(options.compare);
    for (const path of [binary, old]) {
      if (path !== "" && !existsSync(path)) throw new Error(`there is no ${path}`);
    }
    node = openNode(binary, realPluginDir, old);
    if (needFolders(peers)) mountFolders(node, peers);
    return await bench(node, { options, peers, signal: interrupted.signal });
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
