/**
 * Storms: so many pods started, then ended, at once, as after the reboot of a node. Nothing holds
 * them back: a kubelet starts fewer at a time, which is kinder to all. Time is measured in some
 * storms and memory in others, because looking at hundreds of processes takes time from them.
 */
import { readFileSync } from "node:fs";
import { readStatus } from "./measure.ts";
import { addPod, type BenchNode, type Pod, removePods } from "./node.ts";
import type { Scenario, Verb } from "./scenarios.ts";

/** One storm of one operation. */
export interface Storm {
  scenario: string;
  verb: Verb;
  count: number;
  /** From the first spawn until the last process is reaped. */
  wallMs: number;
  cpuMs: number;
  /** What failed calls printed; empty when all succeeded. */
  failures: string[];
  memory?: StormMemory;
}

/** Memory of the called processes, without what they call; absent where only time was measured. */
export interface StormMemory {
  /** The largest peak of any one of them. */
  peakBytes: number;
  /** Of all that lived at the worst moment, shared pages counted once (Pss). */
  sumBytes: number;
  /** How much less memory the machine had available at the worst moment, delegates included. */
  machineBytes: number;
}

/**
 * `count` ADDs at once, then `count` DELs at once.
 * @throws Error the reason of `signal` when it aborts, once every process has ended
 */
export async function storm(
  node: BenchNode,
  scenario: Scenario,
  { count, withMemory, signal }: { count: number; withMemory: boolean; signal: AbortSignal },
): Promise<Storm[]> {
  const pods = Array.from({ length: count }, () => addPod(node));
  const storms: Storm[] = [];
  for (const verb of ["ADD", "DEL"] as const) {
    signal.throwIfAborted();
    storms.push(await stormOnce(node, scenario, verb, { pods, withMemory }));
    signal.throwIfAborted();
    await Bun.sleep(stormPauseMs);
  }
  await removePods(pods);
  return storms;
}

/** Between storms, for the kernel's deferred work. */
const stormPauseMs = 300;
const memoryTickMs = 20;

async function stormOnce(
  node: BenchNode,
  scenario: Scenario,
  verb: Verb,
  { pods, withMemory }: { pods: Pod[]; withMemory: boolean },
): Promise<Storm> {
  const calls = pods.map((pod) => ({ pod, calls: scenario.calls(node, verb, pod) }));
  const running = new Set<number>();
  const memory = { peakBytes: 0, sumBytes: 0, machineBytes: 0 };
  const before = availableBytes();
  const look = () => {
    memory.machineBytes = Math.max(memory.machineBytes, before - availableBytes());
    lookAt(running, memory);
  };
  const ticker = withMemory ? setInterval(look, memoryTickMs) : undefined;
  let cpuUs = 0;
  const failures: string[] = [];
  const startNs = Bun.nanoseconds();
  await Promise.all(
    calls.map(async ({ pod, calls: sequence }) => {
      for (const { file, env, stdin } of sequence) {
        const child = Bun.spawn([file], {
          env,
          cwd: "/",
          stdin: Buffer.from(stdin),
          stderr: "ignore",
        });
        running.add(child.pid);
        const stdout = await child.stdout.text();
        const status = await child.exited;
        running.delete(child.pid);
        cpuUs += Number(child.resourceUsage()?.cpuTime.total ?? 0);
        if (status !== 0) failures.push(stdout.trim() || `status ${status}`);
        else if (verb === "ADD") pod.results.push(JSON.parse(stdout));
      }
    }),
  );
  const wallMs = (Bun.nanoseconds() - startNs) / 1e6;
  clearInterval(ticker);
  return {
    ...{ scenario: scenario.name, verb, count: pods.length },
    ...{ wallMs, cpuMs: cpuUs / 1e3, failures, ...(withMemory && { memory }) },
  };
}

/** Adds one look at every process that runs to what was seen before. */
function lookAt(pids: Iterable<number>, memory: StormMemory): void {
  let sumBytes = 0;
  for (const pid of pids) {
    try {
      const text = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
      sumBytes += Number(/^Pss:\s+(\d+) kB$/m.exec(text)?.[1] ?? 0) * 1024;
      memory.peakBytes = Math.max(memory.peakBytes, readStatus(pid).peakBytes);
    } catch (error) {
      // It has ended, and may be reaped: its memory is given back.
      const { code = "" } = error as NodeJS.ErrnoException;
      if (code !== "ENOENT" && code !== "ESRCH") throw error;
    }
  }
  memory.sumBytes = Math.max(memory.sumBytes, sumBytes);
}

/** Memory that new processes could have. */
function availableBytes(): number {
  const found = /^MemAvailable:\s+(\d+) kB$/m.exec(readFileSync("/proc/meminfo", "utf8"));
  return Number(found?.[1] ?? 0) * 1024;
}
