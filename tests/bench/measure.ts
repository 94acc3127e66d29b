/**
 * Measures scenarios: every contender once per round, in an order that rotates, each with a fresh
 * container, so that whatever disturbs the machine disturbs all alike.
 *
 * Time and CPU come from the wait of the process, its reaped descendants included. Peak memory
 * does not: Linux hands the peak of the process that spawns on to the one that is spawned, so the
 * bench's own would be reported. It is read from /proc while the process runs, in further rounds.
 */
import { readFileSync } from "node:fs";
import { addPod, type BenchNode, type Pod, removePods } from "./node.ts";
import type { Call, Scenario, Verb } from "./scenarios.ts";

/** All that was measured of one operation of one scenario. */
export interface Series {
  scenario: string;
  verb: Verb;
  /** From before the spawn until the process is reaped; the sum where several run in sequence. */
  wallMs: number[];
  /** User and system time. */
  cpuMs: number[];
  /** Peak resident memory of the called process itself; the largest where several run. */
  peakBytes: number[];
  /** Its part that no other process shares: not the program's text, which all copies share. */
  privateBytes: number[];
}

/** How much to measure, and when to stop early. */
export interface MeasureOptions {
  rounds: number;
  memoryRounds: number;
  signal: AbortSignal;
  onRound: (done: number, total: number) => void;
}

/**
 * Runs all rounds, after one that does not count.
 * @throws Error when a call fails, with what it printed; the reason of `signal` when it aborts
 */
export async function measure(
  node: BenchNode,
  scenarios: Scenario[],
  { rounds, memoryRounds, signal, onRound }: MeasureOptions,
): Promise<Series[]> {
  const series = new Map<string, Series>();
  for (const { name: scenario, verbs } of scenarios) {
    for (const verb of verbs) {
      const lists = { wallMs: [], cpuMs: [], peakBytes: [], privateBytes: [] };
      series.set(`${scenario} ${verb}`, { scenario, verb, ...lists });
    }
  }
  const total = 1 + rounds + memoryRounds;
  for (let round = 0; round < total; round++) {
    const kind = round === 0 ? "warm-up" : round <= rounds ? "time" : "memory";
    const pods = scenarios.map(() => addPod(node));
    for (let i = 0; i < scenarios.length; i++) {
      const turn = (i + round) % scenarios.length;
      const [scenario, pod] = [scenarios[turn], pods[turn]];
      if (!scenario || !pod) continue;
      for (const verb of scenario.verbs) {
        // Also gives a signal its turn.
        await Bun.sleep(verb === "DEL" ? beforeDelMs : 0);
        signal.throwIfAborted();
        const into = kind === "warm-up" ? undefined : series.get(`${scenario.name} ${verb}`);
        const calls = scenario.calls(node, verb, pod);
        if (kind === "memory") await readMemory(calls, verb, pod, into);
        else time(calls, verb, pod, into);
      }
    }
    await removePods(pods);
    onRound(round + 1, total);
  }
  return [...series.values()];
}

/**
 * Between ADD and DEL, in ms. Just after an ADD the kernel deletes a link 4-6 ms sooner than later,
 * by the phase of its RCU grace periods. Pods live longer; without the pause the fastest ADD would
 * also get the faster DEL.
 */
const beforeDelMs = 60;

function time(calls: Call[], verb: Verb, pod: Pod, into: Series | undefined): void {
  let wallNs = 0;
  let cpuUs = 0;
  for (const { file, env, stdin } of calls) {
    const bytes = Buffer.from(stdin);
    const startNs = Bun.nanoseconds();
    const child = Bun.spawnSync([file], { env, cwd: "/", stdin: bytes });
    wallNs += Bun.nanoseconds() - startNs;
    cpuUs += Number(child.resourceUsage.cpuTime.total);
    accept(file, verb, pod, { status: child.exitCode, stdout: child.stdout.toString() });
  }
  into?.wallMs.push(wallNs / 1e6);
  into?.cpuMs.push(cpuUs / 1e3);
}

/** Keeps what ADD printed for the operations that follow. @throws Error for a failure */
function accept(
  file: string,
  verb: Verb,
  pod: Pod,
  { status, stdout }: { status: number | null; stdout: string },
): void {
  if (status !== 0) throw new Error(`${verb} by ${file} failed (status ${status}): ${stdout}`);
  if (verb === "ADD") pod.results.push(JSON.parse(stdout));
}

async function readMemory(
  calls: Call[],
  verb: Verb,
  pod: Pod,
  into: Series | undefined,
): Promise<void> {
  let [peakBytes, privateBytes] = [0, 0];
  for (const { file, env, stdin } of calls) {
    const child = Bun.spawn([file], { env, cwd: "/", stdin: Buffer.from(stdin), stderr: "ignore" });
    const found = watchMemory(child.pid);
    peakBytes = Math.max(peakBytes, found.peakBytes);
    privateBytes = Math.max(privateBytes, found.privateBytes);
    const stdout = await child.stdout.text();
    accept(file, verb, pod, { status: await child.exited, stdout });
  }
  // It may have ended before the first look.
  if (peakBytes === 0) return;
  into?.peakBytes.push(peakBytes);
  into?.privateBytes.push(privateBytes);
}

/** Reads the memory of a process again and again until it has ended. */
function watchMemory(pid: number): { peakBytes: number; privateBytes: number } {
  for (let [peakBytes, privateBytes] = [0, 0]; ; ) {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    const bytes = (key: string) =>
      Number(new RegExp(`^${key}:\\s+(\\d+) kB$`, "m").exec(status)?.[1] ?? 0) * 1024;
    // A zombie has none; it is not reaped before this function returns.
    if (bytes("VmHWM") === 0) return { peakBytes, privateBytes };
    // The last peak counts: the first ones are those of the bench, before the exec.
    peakBytes = bytes("VmHWM");
    privateBytes = Math.max(privateBytes, bytes("RssAnon"));
  }
}

/** One storm: all pods of a node started, then ended, at the same time. */
export interface Storm {
  scenario: string;
  verb: Verb;
  count: number;
  /** From the first spawn until the last process is reaped. */
  wallMs: number;
  cpuMs: number;
  /** How much less memory the machine had available at the worst moment. */
  memoryBytes: number;
  /** What failed calls printed; empty when all succeeded. */
  failures: string[];
}

/**
 * `count` ADDs at once, then `count` DELs at once.
 * @throws Error the reason of `signal` when it aborts, once every process has ended
 */
export async function storm(
  node: BenchNode,
  scenario: Scenario,
  count: number,
  signal: AbortSignal,
): Promise<Storm[]> {
  const pods = Array.from({ length: count }, () => addPod(node));
  const storms: Storm[] = [];
  for (const verb of ["ADD", "DEL"] as const) {
    signal.throwIfAborted();
    storms.push(await stormOnce(node, scenario, verb, pods));
    signal.throwIfAborted();
    await Bun.sleep(stormPauseMs);
  }
  await removePods(pods);
  return storms;
}

/** Between storms, for the kernel's deferred work. */
const stormPauseMs = 300;
const memoryTickMs = 10;

async function stormOnce(
  node: BenchNode,
  scenario: Scenario,
  verb: Verb,
  pods: Pod[],
): Promise<Storm> {
  const calls = pods.map((pod) => ({ pod, calls: scenario.calls(node, verb, pod) }));
  const before = availableBytes();
  let least = before;
  const ticker = setInterval(() => {
    least = Math.min(least, availableBytes());
  }, memoryTickMs);
  let cpuUs = 0;
  const failures: string[] = [];
  const startNs = Bun.nanoseconds();
  await Promise.all(
    calls.map(async ({ pod, calls: sequence }) => {
      for (const { file, env, stdin } of sequence) {
        const child = Bun.spawn([file], { env, cwd: "/", stdin: Buffer.from(stdin) });
        const stdout = await child.stdout.text();
        const status = await child.exited;
        cpuUs += Number(child.resourceUsage()?.cpuTime.total ?? 0);
        if (status !== 0) failures.push(stdout.trim() || `status ${status}`);
        else if (verb === "ADD") pod.results.push(JSON.parse(stdout));
      }
    }),
  );
  const wallMs = (Bun.nanoseconds() - startNs) / 1e6;
  clearInterval(ticker);
  const memoryBytes = Math.max(0, before - least);
  const { name } = scenario;
  const count = pods.length;
  return { scenario: name, verb, count, wallMs, cpuMs: cpuUs / 1e3, memoryBytes, failures };
}

/** Memory that new processes could have. */
function availableBytes(): number {
  const found = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"));
  return Number(found?.[1] ?? 0) * 1024;
}
