/**
 * What a plain call runs, counted: functions of the bundle, its modules, functions that are
 * compiled from source, system calls, processes, SQL statements. None of it depends on the machine
 * or on how busy that is, so a limit can hold here where one on time could not. Each limit is what
 * a call takes and a little more, less than a new layer would add; lower it when a call takes less.
 * Prints what was counted.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { writeIdlePlugin } from "./bench/idle.ts";
import { compileFloor } from "./bench/node.ts";
import { buildIfStale } from "./build.ts";
import { tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { root } from "./sources.ts";

/**
 * What is counted, and the most of it in each operation, in the order a container sees them. The
 * system calls are those beyond an empty compiled Bun program; `parsed` is of the engine mostly.
 */
const columns = ["functions", "modules", "parsed", "system calls", "processes", "statements"];
const operations: [verb: string, ...limits: number[]][] = [
  ["VERSION", 20, 10, 5, 2, 0, 0],
  ["STATUS", 82, 18, 12, 37, 0, 0],
  ["ADD", 264, 26, 11, 261, 1, 23],
  ["CHECK", 165, 24, 10, 230, 1, 13],
  ["GC", 163, 26, 10, 258, 0, 20],
  ["DEL", 209, 23, 12, 269, 1, 30],
];

const lacksBinary = lacks("the binary");
const lacksStrace = lacks("the binary", "strace");
const dir = tempDir();
afterAll(() => dir[Symbol.dispose]());
const at = (name: string) => join(dir.path, name);
/** `ADD functions` → how many. */
const counted = new Map<string, number>();

/** How a call is watched, and what is read from it when it has ended. */
interface Watch {
  /** The program and its words; of undefined it is the binary alone. */
  command?: (binary: string) => string[];
  env?: Record<string, string>;
  read: (notes: string, stderr: string) => Record<string, number>;
  /** In how many lives of a container. */
  lives: number;
}

/** File that a watch writes to. */
const notesFile = at("notes");

const lines = (text: string, pattern: RegExp): number =>
  text.split("\n").filter((line) => pattern.test(line)).length;

const unwatched: Watch = { read: () => ({}), lives: 1 };

const tracing: Watch = {
  command: (binary) => ["strace", "-f", "-o", notesFile, binary],
  read: (notes) => ({
    "system calls": mainCalls(notes),
    processes: lines(notes, /^\d+ +(?:vfork|fork|clone3?)\((?!.*CLONE_THREAD)/),
  }),
  // It may also work for another thread, so the least of several counts.
  lives: 3,
};

/**
 * The system calls of the main thread. How many other threads there are is up to the machine, and
 * how often one waits for another is a matter of luck.
 */
function mainCalls(notes: string): number {
  const [main = ""] = notes.split(" ", 1);
  const waits = "<\\.\\.\\.|futex|sched_yield|restart_syscall|\\+\\+\\+|---";
  return lines(notes, new RegExp(`^${main} +(?=\\S)(?!${waits})`));
}

const watches: Watch[] = [
  {
    // Of the bundle: F for each function that ran, M for each module that was loaded.
    env: { BUN_BYTECODE_ORDER_OUT: notesFile },
    read: (notes) => ({ functions: lines(notes, /^F /), modules: lines(notes, /^M /) }),
    lives: 1,
  },
  {
    env: { BUN_JSC_reportParseTimes: "1" },
    read: (_, stderr) => ({ parsed: lines(stderr, /^Parsed /) }),
    lives: 1,
  },
  {
    // From source: within the binary nobody can count them.
    command: () => [
      ...[process.execPath, "--preload", join(import.meta.dir, "bench", "statements.ts")],
      join(root, "genie.ts"),
    ],
    env: { GENIE_STATEMENTS: notesFile },
    read: (notes) => ({ statements: lines(notes, /./) }),
    lives: 1,
  },
  ...(lacksStrace ? [] : [tracing]),
];

/** Runs one operation under a watch. @throws Error when it fails */
function call(binary: string, watch: Watch, verb: string, containerId: string): void {
  rmSync(notesFile, { force: true });
  const prevResult = existsSync(at("result")) && JSON.parse(readFileSync(at("result"), "utf8"));
  const stdin = {
    ...{ cniVersion: "1.1.0", name: "genie", type: "genie", plugins_file: at("plugins.toml") },
    runtimeConfig: { "io.kubernetes.cri.pod-annotations": { cni: "a" } },
    "cni.dev/valid-attachments": [{ containerID: containerId, ifname: "eth0" }],
    ...(["CHECK", "DEL"].includes(verb) && { prevResult }),
  };
  const child = Bun.spawnSync(watch.command?.(binary) ?? [binary], {
    cwd: "/",
    env: {
      ...{ CNI_COMMAND: verb, CNI_CONTAINERID: containerId, CNI_NETNS: at("netns") },
      ...{ CNI_IFNAME: "eth0", CNI_PATH: dir.path, ...watch.env },
      CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b",
    },
    stdin: Buffer.from(JSON.stringify(stdin)),
  });
  const [stdout, stderr] = [child.stdout.toString(), child.stderr.toString()];
  if (child.exitCode !== 0) throw new Error(`${verb} failed: ${stdout}${stderr}`);
  if (verb === "ADD") writeFileSync(at("result"), stdout);
  const notes = existsSync(notesFile) ? readFileSync(notesFile, "utf8") : "";
  for (const [column, value] of Object.entries(watch.read(notes, stderr))) {
    const key = `${verb} ${column}`;
    counted.set(key, Math.min(value, counted.get(key) ?? value));
  }
}

/** Lives of containers under a watch, each on a node that has had one before. */
function live(binary: string, watch: Watch): void {
  for (let i = 0; i < watch.lives; i++) {
    // The log of a record that is in use grows, and with it what the next call reads.
    rmSync(at("state"), { recursive: true, force: true });
    for (const [verb] of operations) call(binary, unwatched, verb, "first");
    for (const [verb] of operations) call(binary, watch, verb, "second");
  }
}

/** The part of the system calls that is Bun's own, and differs with the machine. */
function traceFloor(): number {
  compileFloor(at("floor"));
  const least = Array.from({ length: tracing.lives }, () => {
    Bun.spawnSync(tracing.command?.(at("floor")) ?? [], { cwd: "/", env: {} });
    return mainCalls(readFileSync(notesFile, "utf8"));
  });
  return Math.min(...least);
}

describe.skipIf(lacksBinary)("a plain call", () => {
  beforeAll(() => {
    const binary = buildIfStale();
    writeIdlePlugin(at("idle"), '{"cniVersion":"1.0.0","ips":[{"address":"192.0.2.2/24"}]}');
    writeFileSync(at("netns"), "");
    writeFileSync(
      at("plugins.toml"),
      `conf_dir = "${dir.path}"\nbin_dirs = ["${dir.path}"]\nstate_dir = "${at("state")}"\n` +
        `[plugins.a.config]\ncniVersion = "1.0.0"\nplugins = [{ type = "idle" }]\n`,
    );
    for (const watch of watches) live(binary, watch);
    const floor = lacksStrace ? 0 : traceFloor();
    for (const [verb] of operations) {
      const key = `${verb} system calls`;
      if (!lacksStrace) counted.set(key, (counted.get(key) ?? Number.NaN) - floor);
    }
  }, 120_000);

  /** What is counted with strace is left out where there is none. */
  const shown = columns.filter(
    (column) => !(lacksStrace && tracing.read("", "")[column] !== undefined),
  );

  test.each(operations)("%s runs no more than it needs", (verb, ...limits) => {
    const found = shown.map((column) => [column, counted.get(`${verb} ${column}`) ?? Number.NaN]);
    process.stderr.write(`${verb.padEnd(8)} ${found.map((pair) => pair.join(" ")).join(", ")}\n`);
    const most = shown.map((column) => [column, limits[columns.indexOf(column)] ?? 0]);
    const tooMany = most.flatMap(([column, max], i) =>
      Number(found[i]?.[1]) <= Number(max) ? [] : [`${column} ${found[i]?.[1]}, at most ${max}`],
    );
    expect(tooMany).toEqual([]);
  });

  test("is watched: each watch sees what an ADD cannot do without", () => {
    expect(shown.filter((column) => !((counted.get(`ADD ${column}`) ?? 0) > 0))).toEqual([]);
  });
});
