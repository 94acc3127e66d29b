/**
 * `bun run test`: installs what the tests need where it may (root on Debian), builds the binary,
 * runs every test file, and says how long that took, what was skipped and why, and what was left
 * behind. Words after it go to `bun test` (file names, `-t pattern`).
 *
 * `bun run test:fast` runs what needs neither root nor packages nor the binary.
 *
 * The last line is `N passed, N failed, N skipped`. Exit status: 0 when nothing failed. What
 * cannot be had of Debian's next release is in the table of what was skipped, and in no number.
 */
import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { beginRun, endRun, environment, type Run } from "./leftovers.ts";
import { fetchNext, install, missingPackages } from "./needs.ts";
import {
  type FileOutcome,
  formatSeconds,
  formatSkipped,
  formatSlowest,
  readReport,
  sumOfExcused,
} from "./outcome.ts";

const root = join(import.meta.dir, "..");
const args = process.argv.slice(2);
const isFast = args[0] === "--fast";
const words = isFast ? args.slice(1) : args;

/** They are about the node itself, its links and namespaces: only one runs at a time. */
const ofTheNode = ["bench", "demo", "enforce", "nft", "readme", "run"];
/** They are about the binary, or about what becomes of its process. */
const ofTheBinary = [
  ...[
    "agent_life",
    "bad_state",
    "bench",
    "binary",
    "bugs",
    "clock",
    "demo",
    "faults",
    "install",
    "races",
    "readme",
  ],
  ...[
    "counts",
    "report_page",
    "runtimes",
    "runtimes_next",
    "samples",
    "torture",
    "trace",
    "webhook",
  ],
];

/** Test files that run at the same time as others, with the flags of their `bun test`. */
interface Lane {
  flags: string[];
  /** Printed as it comes, or as a whole in the end. */
  isLive: boolean;
}

/** What became of a lane. */
interface Ended {
  isOk: boolean;
  passed: number;
  failed: number;
  skipped: number;
  files: FileOutcome[];
}

function say(text: string): void {
  process.stderr.write(text);
}

/** Tests wait more than they compute, so one more runs at once than there are cores. */
const workers = availableParallelism() + 1;

function planLanes(): Lane[] {
  if (words.length > 0 && words[0] !== "--update-timings") {
    return [{ flags: ["--isolate", ...words], isLive: true }];
  }
  const side = [`--parallel=${workers}`, "--timings=tests/timings.json", ...words];
  const names = readdirSync(import.meta.dir).filter((name) => name.endsWith(".test.ts"));
  const pathsOf = (isWanted: (stem: string) => boolean) =>
    names
      .filter((name) => isWanted(name.slice(0, -".test.ts".length)))
      .map((name) => `./tests/${name}`);
  if (isFast) {
    return [{ flags: [...side, ...pathsOf((stem) => !ofTheBinary.includes(stem))], isLive: true }];
  }
  return [
    { flags: [...side, ...pathsOf((stem) => !ofTheNode.includes(stem))], isLive: true },
    { flags: ["--isolate", ...pathsOf((stem) => ofTheNode.includes(stem))], isLive: false },
  ];
}

async function runLane({ flags, isLive }: Lane, number: number, run: Run): Promise<Ended> {
  const report = join(run.dir, `report-${number}.xml`);
  const reporter = ["--reporter=junit", `--reporter-outfile=${report}`];
  const child = Bun.spawn([process.execPath, "test", "--timeout=120000", ...reporter, ...flags], {
    cwd: root,
    env: { ...process.env, ...environment(run), ...(isFast && { GENIE_TESTS: "fast" }) },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const stop = () => child.kill("SIGINT");
  process.on("SIGINT", stop).on("SIGTERM", stop);
  let output = "";
  const read = async (stream: ReadableStream<Uint8Array>) => {
    const decoder = new TextDecoder();
    for await (const chunk of stream) {
      const text = decoder.decode(chunk, { stream: true });
      output += text;
      if (isLive) say(text);
    }
  };
  await Promise.all([read(child.stdout), read(child.stderr), child.exited]);
  if (!isLive) say(output);
  // Bun ends with ` 12 pass`, ` 1 skip`, ` 0 fail`; an error between tests counts as `1 error`.
  const count = (word: string) =>
    Number([...output.matchAll(new RegExp(`^ *(\\d+) ${word}s?$`, "gm"))].at(-1)?.[1] ?? 0);
  const files = existsSync(report) ? readReport(readFileSync(report, "utf8")) : [];
  rmSync(report, { force: true });
  return {
    isOk: child.exitCode === 0,
    passed: count("pass"),
    failed: count("fail") + count("error"),
    skipped: count("skip") + count("todo") - sumOfExcused(files),
    files,
  };
}

/** Installs what is missing; where that fails, tests are skipped. */
function installPackages(): void {
  if (process.getuid?.() !== 0) return;
  const failure = install(missingPackages(), say);
  if (failure !== undefined) say(`Tests will be skipped, ${failure}\n`);
  fetchNext(say, { again: false });
}

function build(): boolean {
  const { exitCode, stderr } = Bun.spawnSync([process.execPath, "tests/build.ts"], { cwd: root });
  say(stderr.toString());
  return exitCode === 0;
}

/** Runs everything, prints the tables, and returns what the last line says. */
async function main(): Promise<{ passed: number; failed: number; skipped: number }> {
  const startedMs = Date.now();
  const lanes = planLanes();
  if (!isFast && lanes.length > 1) installPackages();
  if (!isFast && !build()) return { passed: 0, failed: 1, skipped: 0 };
  const builtMs = Date.now();
  const run = beginRun();
  const ended = await Promise.all(lanes.map((lane, i) => runLane(lane, i, run)));
  const testedMs = Date.now();
  const { left, cameBack } = await endRun(run);
  const files = ended.flatMap((one) => one.files);
  const sum = (key: "passed" | "failed" | "skipped") =>
    ended.reduce((all, one) => all + one[key], 0);
  const isOk = ended.every((one) => one.isOk) && sum("passed") > 0;
  // With a pattern for names most are skipped because they do not match it.
  if (!words.some((word) => /^(-t|--test-name-pattern)/.test(word))) {
    say(`\n${formatSkipped(files)}`);
  }
  if (isFast) say(`Not in the fast run: ${ofTheBinary.join(", ")}\n`);
  if (files.length > 1) say(formatSlowest(files, 8));
  const took = (fromMs: number, toMs: number) => formatSeconds((toMs - fromMs) / 1000);
  const parts = isFast ? "" : `, the binary ${took(startedMs, builtMs)}`;
  say(`The tests took ${took(builtMs, testedMs)} on ${availableParallelism()} cores${parts}\n`);
  for (const line of left) say(`LEFT BEHIND (and removed now): ${line}\n`);
  for (const line of cameBack) say(`Came back after its test, and removed now: ${line}\n`);
  const failed = sum("failed") + (left.length > 0 ? 1 : 0);
  return {
    passed: sum("passed"),
    failed: isOk ? failed : Math.max(1, failed),
    skipped: sum("skipped"),
  };
}

const { passed, failed, skipped } = await main();
process.stdout.write(`${passed} passed, ${failed} failed, ${skipped} skipped\n`);
process.exit(failed === 0 ? 0 : 1);
