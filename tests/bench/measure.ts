/**
 * Measures scenarios: every contender once per round, in an order that rotates and turns round each
 * time, each with a fresh container, so that whatever disturbs the machine disturbs all alike.
 *
 * Time and CPU come from the wait of the process, its reaped descendants included. Peak memory
 * does not: Linux hands the peak of the process that spawns on to the one that is spawned, so the
 * bench's own would be reported. It is read from /proc while the process runs, in further rounds,
 * and page faults from what is left of the process before it is reaped.
 */
import { readFileSync } from "node:fs";
import { addPod, type BenchNode, type Pod, removePods } from "./node.ts";
import { baselineOf, type Call, type Scenario, type Verb } from "./scenarios.ts";

/** All that was measured of one operation of one scenario. */
export interface Series {
  scenario: string;
  verb: Verb;
  /** Scenario it is compared with. */
  baseline?: string;
  /** From before the spawn until the process is reaped; the sum where several run in sequence. */
  wallMs: number[];
  /** User and system time. */
  cpuMs: number[];
  /** Peak resident memory of the called process itself; the largest where several run. */
  peakBytes: number[];
  /** Its part that no other process shares: not the program's text, which all copies share. */
  privateBytes: number[];
  /** Page faults of the called processes themselves. */
  ownFaults: number[];
  /** Page faults of all that they called. */
  childFaults: number[];
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
  for (const scenario of scenarios) {
    for (const verb of scenario.verbs) {
      const baseline = baselineOf(scenario, verb);
      const name = scenario.name;
      series.set(`${name} ${verb}`, {
        ...{ scenario: name, verb, ...(baseline !== undefined && { baseline }) },
        ...{ wallMs: [], cpuMs: [], peakBytes: [], privateBytes: [] },
        ...{ ownFaults: [], childFaults: [] },
      });
    }
  }
  const total = 1 + rounds + memoryRounds;
  for (let round = 0; round < total; round++) {
    const kind = round === 0 ? "warm-up" : round <= rounds ? "time" : "memory";
    const pods = scenarios.map(() => addPod(node));
    for (let i = 0; i < scenarios.length; i++) {
      const place = round % 2 === 0 ? i : scenarios.length - 1 - i;
      const turn = (place + round) % scenarios.length;
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
  const sum = { ...nothing };
  for (const { file, env, stdin } of calls) {
    const child = Bun.spawn([file], { env, cwd: "/", stdin: Buffer.from(stdin), stderr: "ignore" });
    const found = watchMemory(child.pid);
    sum.peakBytes = Math.max(sum.peakBytes, found.peakBytes);
    sum.privateBytes = Math.max(sum.privateBytes, found.privateBytes);
    sum.ownFaults += found.ownFaults;
    sum.childFaults += found.childFaults;
    const stdout = await child.stdout.text();
    accept(file, verb, pod, { status: await child.exited, stdout });
  }
  into?.ownFaults.push(sum.ownFaults);
  into?.childFaults.push(sum.childFaults);
  // It may have ended before the first look.
  if (sum.peakBytes === 0) return;
  into?.peakBytes.push(sum.peakBytes);
  into?.privateBytes.push(sum.privateBytes);
}

const nothing = { peakBytes: 0, privateBytes: 0, ownFaults: 0, childFaults: 0 };

/** Reads the memory of a process again and again until it has ended, then its page faults. */
function watchMemory(pid: number): typeof nothing {
  for (const found = { ...nothing }; ; ) {
    const { peakBytes, privateBytes } = readStatus(pid);
    // A zombie has none; it is not reaped before this function returns.
    if (peakBytes === 0) return { ...found, ...readFaults(pid) };
    // The last peak counts: the first ones are those of the bench, before the exec.
    found.peakBytes = peakBytes;
    found.privateBytes = Math.max(found.privateBytes, privateBytes);
  }
}

/** Memory of a process in bytes: its peak until now, and what it shares with nobody. */
export function readStatus(pid: number): { peakBytes: number; privateBytes: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const bytes = (key: string) =>
    Number(new RegExp(`^${key}:\\s+(\\d+) kB$`, "m").exec(status)?.[1] ?? 0) * 1024;
  return { peakBytes: bytes("VmHWM"), privateBytes: bytes("RssAnon") };
}

/** Minor and major page faults, from proc_pid_stat(5). */
function readFaults(pid: number): { ownFaults: number; childFaults: number } {
  const text = readFileSync(`/proc/${pid}/stat`, "utf8");
  // The second field is a name in brackets that may hold anything; the third follows.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  const [minor = 0, childMinor = 0, major = 0, childMajor = 0] = fields.slice(7, 11).map(Number);
  return { ownFaults: minor + major, childFaults: childMinor + childMajor };
}
