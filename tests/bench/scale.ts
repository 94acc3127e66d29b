/**
 * `bun tests/bench/scale.ts`: what a large record costs. ADD and DEL with one, a hundred and
 * thousands of live attachments, then with a million ledger rows besides, in turns; and what an
 * automatic choice over eight candidates adds. The plugin is a shell script of two lines, so that
 * nearly all that is measured is genie. Exit status: 0 done, whether or not the targets hold; 1 a
 * call failed; 2 used wrongly.
 */
import { existsSync, mkdirSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { closeState, type State, write } from "../../lib/database.ts";
import { insertLedger } from "../../lib/ledger.ts";
import { openState } from "../../lib/recovery/database.ts";
import { insertPlanned, setAttached } from "../../lib/write_ahead.ts";
import { fakePlugin, makeHost, tempDir } from "../fakes.ts";
import { ledgerRow } from "../record.ts";
import { copyAtOnce } from "./node.ts";
import { median } from "./summary.ts";

const root = join(import.meta.dir, "..", "..");
const usage = `Usage: bun tests/bench/scale.ts [options]

  --rounds N      rounds of every contender (default 101)
  --rows N        ledger rows of the largest record (default 1000000)
  --live N        live attachments of the large ones (default 5000)
  --binary PATH   genie to measure (default: dist/genie)
  --json FILE     write every figure to FILE
  --quick         few rounds and a small record: shows that it runs, measures nothing
  --help          this text

Files go to TMPDIR.
`;

/** How much to measure. */
export interface ScaleOptions {
  rounds: number;
  rows: number;
  live: number;
  binary: string;
  /** The floor, where it is to be measured too. */
  floor?: string;
  signal?: AbortSignal;
}

/** What one call took in every round, in ms. */
export interface ScaleSeries {
  /** Live attachments and ledger rows of the record. */
  live: number;
  rows: number;
  /** Was the network named, or chosen by genie? */
  isChoice: boolean;
  addMs: number[];
  delMs: number[];
}

/** All that was measured, and what follows from it. */
export interface ScaleFigures {
  rows: number;
  live: number;
  rounds: number;
  /** Size of the largest record in bytes, and how long all took to fill, in s. */
  fileBytes: number;
  fillSeconds: number;
  series: ScaleSeries[];
  /** What the floor took in every round; empty where there is none. */
  floorMs: number[];
  /** What the largest record adds to an ADD, in percent; at most 10. */
  addPercent: number;
  /** What a choice over eight candidates adds to an ADD with that record, in ms; at most 3. */
  choiceMs: number;
}

const networkCount = 8;
const networks = Array.from({ length: networkCount }, (_, i) => `net${i}`);

/** One record. */
interface Size {
  live: number;
  rows: number;
}

/** Growing records; the last is the largest in both. */
function sizesOf({ live, rows }: ScaleOptions): Size[] {
  const lives = [...new Set([1, Math.min(100, live), live])];
  return [...lives.map((one) => ({ live: one, rows: 0 })), { live, rows }];
}

/** A folder per size: nodes that differ in their record, and in the store of host-local. */
interface Node {
  dir: string;
  genie: string;
  netns: string;
}

const folderOf = (node: Node, { live, rows }: Size): string => join(node.dir, `${live}-${rows}`);

function makeNode(dir: string, binary: string): Node {
  const node = { dir, genie: join(dir, "genie"), netns: join(dir, "netns") };
  copyAtOnce(binary, node.genie);
  writeFileSync(node.netns, "");
  return node;
}

/** Makes the folder of one size and fills its record. */
function makeSize(node: Node, size: Size): void {
  const dir = folderOf(node, size);
  for (const name of ["bin", "net.d", "ipam"]) mkdirSync(join(dir, name), { recursive: true });
  const result = '{"cniVersion":"1.0.0","ips":[{"address":"198.18.0.2/20"}]}';
  // Like host-local, an ADD changes the store of a network.
  const touch = `[ $CNI_COMMAND = DEL ] || : > ${join(dir, "ipam", "net0")}/$CNI_CONTAINERID`;
  fakePlugin(join(dir, "bin"), "stub", `#!/bin/sh\nread -r _\n${touch}\necho '${result}'\n`);
  networks.forEach((name, i) => {
    mkdirSync(join(dir, "ipam", name));
    const subnet = `198.18.${16 * i}.0/20`;
    const ipam = { type: "host-local", dataDir: join(dir, "ipam"), subnet };
    const list = { cniVersion: "1.0.0", name, plugins: [{ type: "stub", ipam }] };
    writeFileSync(join(dir, "net.d", `${name}.conflist`), JSON.stringify(list));
  });
  const folders = `conf_dir = "${join(dir, "net.d")}"\nstate_dir = "${join(dir, "state")}"\n`;
  const entries = networks.map((name) => `[plugins.${name}]\nconf = "${name}.conflist"\n`);
  writeFileSync(join(dir, "plugins.toml"), `${folders}bin_dirs = []\n${entries.join("")}`);
  fill(node, size);
}

/** Fills a record, and the store of host-local with as many addresses. */
function fill(node: Node, size: Size): void {
  const { live, rows } = size;
  const dir = folderOf(node, size);
  const state = openState(makeHost(), join(dir, "state"));
  try {
    for (let i = 0; i < live; i += 1000) {
      write(state, () => {
        for (let k = i; k < Math.min(live, i + 1000); k++) addLive(state, dir, node.netns, k);
      });
    }
    const startMs = Date.now() - 20 * 86_400_000;
    for (let i = 0; i < rows; i += 10_000) {
      const count = Math.min(10_000, rows - i);
      const batch = Array.from({ length: count }, (_, k) => rowOf(i + k, startMs, rows));
      write(state, () => insertLedger(state, batch));
    }
    state.database.run("PRAGMA wal_checkpoint(TRUNCATE)");
  } finally {
    closeState(state);
  }
}

/** Three rows for each operation, as a chain of one plugin leaves them. */
function rowOf(i: number, startMs: number, rows: number): ReturnType<typeof ledgerRow> {
  const kind = (["plugin", "network", "call"] as const)[i % 3] ?? "call";
  const operation = Math.floor(i / 3);
  const pod = Math.floor(operation / 2);
  return ledgerRow({
    atMs: Math.round(startMs + (i / rows) * 19.99 * 86_400_000),
    kind,
    command: operation % 2 === 0 ? "ADD" : "DEL",
    containerId: crypto.randomUUID().replaceAll("-", "").repeat(2),
    podNamespace: `team-${pod % 40}`,
    podName: `web-${pod.toString(36)}-x7k2p`,
    podUid: crypto.randomUUID(),
    network: networks[pod % networkCount] ?? "",
    durationUs: 10_000 + ((i * 7919) % 9000),
  });
}

function addLive(state: State, dir: string, netns: string, i: number): void {
  const network = networks[i % networkCount] ?? "";
  const n = Math.floor(i / networkCount) + 2;
  const address = `198.18.${16 * (i % networkCount) + (n >> 8)}.${n & 255}`;
  const containerId = `live-${i}`;
  const attachment = {
    containerId,
    requestIfName: "eth0",
    requestNetwork: "genie",
    ifName: "eth0",
    primary: true,
    network,
    reason: "asked for by cni",
    list: {
      cniVersion: "1.0.0" as const,
      name: network,
      disableCheck: false,
      disableGC: false,
      plugins: [{ type: "stub", ipam: { type: "host-local", dataDir: join(dir, "ipam") } }],
    },
    plugins: [join(dir, "bin", "stub")],
    cniArgs: "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web",
    cniPath: join(dir, "bin"),
    capabilityArgs: {},
    args: {},
    timeoutMs: 90_000,
    netns,
    pod: { namespace: "team", name: `web-${i}`, uid: crypto.randomUUID() },
  };
  insertPlanned(state, [attachment], Date.now());
  setAttached(state, attachment, { cniVersion: "1.0.0", ips: [{ address: `${address}/20` }] });
  state.database
    .query("INSERT INTO traffic VALUES (?, 'eth0', ?, 'lo', ?, 0, ?)")
    .run(containerId, network, Date.now() - (i % 600) * 1000, i * 100);
  writeFileSync(join(dir, "ipam", network, address), `${containerId}\r\neth0`);
}

/** One ADD and its DEL. @returns what each took in ms */
function call(node: Node, size: Size, isChoice: boolean, containerId: string): [number, number] {
  const dir = folderOf(node, size);
  const stdin = Buffer.from(
    JSON.stringify({
      cniVersion: "1.0.0",
      name: "genie",
      type: "genie",
      plugins_file: join(dir, "plugins.toml"),
      runtimeConfig: { "io.kubernetes.cri.pod-annotations": isChoice ? {} : { cni: "net0" } },
    }),
  );
  const run = (command: string): number => {
    const startNs = Bun.nanoseconds();
    const { exitCode, stdout, stderr } = Bun.spawnSync([node.genie], {
      stdin,
      cwd: "/",
      env: {
        CNI_COMMAND: command,
        CNI_CONTAINERID: containerId,
        CNI_IFNAME: "eth0",
        CNI_NETNS: node.netns,
        CNI_PATH: join(dir, "bin"),
        CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web",
      },
    });
    const tookMs = (Bun.nanoseconds() - startNs) / 1e6;
    if (exitCode === 0) return tookMs;
    throw new Error(`${command} with ${dir} failed: ${stdout}${stderr}`);
  };
  return [run("ADD"), run("DEL")];
}

/** @returns what one run of the floor took, in ms */
function runFloor(path: string): number {
  const startNs = Bun.nanoseconds();
  Bun.spawnSync([path], { env: {}, cwd: "/" });
  return (Bun.nanoseconds() - startNs) / 1e6;
}

/** Rounds that do not count. */
const warmUps = 3;

/**
 * Measures everything.
 * @throws Error when a call fails, with what it printed; the reason of `signal` when it aborts
 */
export async function measureScale(options: ScaleOptions): Promise<ScaleFigures> {
  using dir = tempDir();
  const node = makeNode(dir.path, options.binary);
  const startNs = Bun.nanoseconds();
  const sizes = sizesOf(options);
  for (const size of sizes) makeSize(node, size);
  const fillSeconds = (Bun.nanoseconds() - startNs) / 1e9;
  const largest = sizes.at(-1) ?? { live: 0, rows: 0 };
  const series = [...sizes, largest].map(
    (size, i): ScaleSeries => ({ ...size, isChoice: i === sizes.length, addMs: [], delMs: [] }),
  );
  const floorMs: number[] = [];
  for (let round = 0; round < warmUps + options.rounds; round++) {
    const floor = options.floor && runFloor(options.floor);
    if (floor && round >= warmUps) floorMs.push(floor);
    for (let i = 0; i < series.length; i++) {
      // In turns, so that whatever disturbs the machine disturbs all alike.
      const one = series[(i + round) % series.length];
      if (!one) continue;
      // Gives a signal its turn.
      await Bun.sleep(0);
      options.signal?.throwIfAborted();
      const [addMs, delMs] = call(node, one, one.isChoice, `pod-${round}-${i}`);
      if (round < warmUps) continue;
      one.addMs.push(addMs);
      one.delMs.push(delMs);
    }
  }
  const adds = series.map(({ addMs }) => median(addMs));
  const [smallest = 0, large = 0, choice = 0] = [...adds.slice(0, 1), ...adds.slice(-2)];
  return {
    ...{ rows: options.rows, live: options.live, rounds: options.rounds },
    fileBytes: statSync(join(folderOf(node, largest), "state", "genie.db")).size,
    ...{ fillSeconds, series, floorMs },
    addPercent: (large / smallest - 1) * 100,
    choiceMs: choice - large,
  };
}

/** Figures for people, and whether the targets hold. */
export function formatScale(figures: ScaleFigures): string {
  const { rows, live, rounds, fileBytes, fillSeconds, series, addPercent, choiceMs } = figures;
  const mib = (fileBytes / 2 ** 20).toFixed(0);
  const lines = series.map(({ live, rows, isChoice, addMs, delMs }) =>
    [
      `  ${live} live, ${rows} rows${isChoice ? ", choice" : ""}`.padEnd(34),
      `ADD ${median(addMs).toFixed(2).padStart(7)} ms`,
      `DEL ${median(delMs).toFixed(2).padStart(7)} ms`,
    ].join("  "),
  );
  const judge = (value: number, limit: number, unit: string) =>
    `${value.toFixed(1)} ${unit}, at most ${limit}: ${value <= limit ? "holds" : "MISSED"}`;
  const filled = `filled in ${fillSeconds.toFixed(0)} s`;
  return `${rows} ledger rows and ${live} live attachments: ${mib} MiB, ${filled}
${rounds} rounds, medians:
${lines.join("\n")}
A large record adds to an ADD: ${judge(addPercent, 10, "%")}
A choice over ${networkCount} candidates adds: ${judge(choiceMs, 3, "ms")}
`;
}

function readCount(option: string, text: string): number {
  if (/^\d{1,8}$/.test(text) && Number(text) > 0) return Number(text);
  throw new Error(`${option} needs a whole number, 1 or more`);
}

async function main(): Promise<number> {
  let json = "";
  let options: ScaleOptions;
  try {
    const { values } = parseArgs({
      args: process.argv.slice(2),
      options: {
        rounds: { type: "string" },
        rows: { type: "string" },
        live: { type: "string" },
        binary: { type: "string", default: join(root, "dist", "genie") },
        json: { type: "string", default: "" },
        quick: { type: "boolean", default: false },
        help: { type: "boolean", default: false },
      },
    });
    if (values.help) {
      process.stdout.write(usage);
      return 0;
    }
    const { quick, binary } = values;
    json = values.json;
    options = {
      rounds: readCount("--rounds", values.rounds ?? (quick ? "3" : "101")),
      rows: readCount("--rows", values.rows ?? (quick ? "20000" : "1000000")),
      live: readCount("--live", values.live ?? (quick ? "200" : "5000")),
      binary,
    };
    if (!existsSync(binary)) throw new Error(`${binary} is not there: bun run build`);
  } catch (error) {
    process.stderr.write(`scale: ${error instanceof Error ? error.message : error}\n\n${usage}`);
    return 2;
  }
  try {
    const figures = await measureScale(options);
    process.stdout.write(formatScale(figures));
    if (json !== "") writeFileSync(json, `${JSON.stringify(figures, null, 2)}\n`);
    return 0;
  } catch (error) {
    process.stderr.write(`scale: ${error instanceof Error ? error.message : error}\n`);
    return 1;
  }
}

if (import.meta.main) process.exit(await main());
