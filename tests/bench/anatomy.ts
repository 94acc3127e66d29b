/**
 * What one call is made of: its stages as `GENIE_TRACE=1` tells them, its system calls, the
 * instructions it runs; and the least that could be there: a spawn, an fsync, the floor.
 * What a tool cannot tell here is undefined.
 */
import {
  closeSync,
  existsSync,
  fsyncSync,
  openSync,
  readFileSync,
  rmSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { addPod, type BenchNode, removePods } from "./node.ts";
import { baselineOf, type Call, type Scenario, type Verb } from "./scenarios.ts";

/** Stage → µs of one call, in order; the first and last are around genie's own code. */
export type Stages = Record<string, number>;

/** One operation in its parts, once per round. */
export interface Anatomy {
  scenario: string;
  verb: Verb;
  /** Scenario it is compared with. */
  baseline?: string;
  stages: Stages[];
  /** System calls of the called processes and all that they call. */
  systemCalls: number[];
  /** Instructions in user mode, of the same processes. */
  instructions: number[];
}

type Tool = "trace" | "strace" | "perf";
const tools: Tool[] = ["trace", "strace", "perf"];

/**
 * Takes scenarios apart: in each round a pod per tool and scenario.
 * @throws Error when a call fails; the reason of `signal` when it aborts
 */
export async function dissect(
  node: BenchNode,
  scenarios: Scenario[],
  { rounds, signal }: { rounds: number; signal: AbortSignal },
): Promise<Anatomy[]> {
  const found = new Map<string, Anatomy>();
  const usable = tools.filter((tool) => tool === "trace" || Bun.which(tool) !== null);
  for (let round = 0; round < rounds; round++) {
    for (const scenario of scenarios) {
      for (const tool of usable) {
        signal.throwIfAborted();
        const pod = addPod(node);
        for (const verb of scenario.verbs) {
          if (verb !== "ADD" && verb !== "DEL") continue;
          const key = `${scenario.name} ${verb}`;
          const baseline = baselineOf(scenario, verb);
          const one = found.get(key) ?? {
            ...{ scenario: scenario.name, verb, ...(baseline !== undefined && { baseline }) },
            ...{ stages: [], systemCalls: [], instructions: [] },
          };
          found.set(key, one);
          const stdout = takeApart(node, scenario.calls(node, verb, pod), tool, one);
          if (verb === "ADD") pod.results.push(...stdout.map((text) => JSON.parse(text)));
          await Bun.sleep(0);
        }
        await removePods([pod]);
      }
    }
  }
  return [...found.values()];
}

/** Runs the calls of one operation under one tool. @returns what each printed */
function takeApart(node: BenchNode, calls: Call[], tool: Tool, into: Anatomy): string[] {
  const file = join(node.dir, "tool-output");
  const stages: Stages = {};
  let [count, isCounted] = [0, true];
  const printed = calls.map((call) => {
    const prefix = {
      trace: [],
      strace: ["strace", "-f", "-c", "-o", file],
      perf: ["perf", "stat", "-x", ",", "-e", "instructions:u", "-o", file],
    }[tool];
    const env = tool === "trace" ? { ...call.env, GENIE_TRACE: "1" } : call.env;
    rmSync(file, { force: true });
    const startNs = Bun.nanoseconds();
    const child = Bun.spawnSync([...prefix, call.file], {
      env,
      cwd: "/",
      stdin: Buffer.from(call.stdin),
    });
    const wallUs = (Bun.nanoseconds() - startNs) / 1e3;
    const stdout = child.stdout.toString();
    if (child.exitCode !== 0) throw new Error(`${call.file} under ${tool} failed: ${stdout}`);
    if (tool === "trace") Object.assign(stages, readStages(child.stderr.toString(), wallUs));
    else {
      const counted = readCount(tool, existsSync(file) ? readFileSync(file, "utf8") : "");
      isCounted &&= counted !== undefined;
      count += counted ?? 0;
    }
    return stdout;
  });
  if (tool === "trace" && Object.keys(stages).length > 0) into.stages.push(stages);
  if (tool === "strace" && isCounted) into.systemCalls.push(count);
  if (tool === "perf" && isCounted) into.instructions.push(count);
  return printed;
}

/**
 * The stages a call printed, and as "start and end" what is left of the time of the whole: the
 * spawn, the loading of the program, and its end. Empty where none were printed.
 */
export function readStages(stderr: string, wallUs: number): Stages {
  const line = stderr.split("\n").find((text) => text.startsWith('{"genieTraceUs"'));
  if (line === undefined) return {};
  const { genieTraceUs: stages } = JSON.parse(line) as { genieTraceUs: Stages };
  const known = Object.values(stages).reduce((sum, one) => sum + one, 0);
  return { "start and end": Math.max(0, Math.round(wallUs - known)), ...stages };
}

/** What `strace -c` or `perf stat -x,` counted; undefined where it could not. */
export function readCount(tool: "strace" | "perf", text: string): number | undefined {
  const patterns = {
    strace: /^100\.00\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?total$/m,
    perf: /^(\d+),[^,]*,instructions/m,
  };
  const [, count] = patterns[tool].exec(text) ?? [];
  return count === undefined ? undefined : Number(count);
}

/** The least that things cost on this machine, in ms, once per round. */
export interface Floors {
  /** Spawn and wait of the smallest program there is. */
  spawnMs: number[];
  /** The same of the floor, see floor.ts. */
  floorMs: number[];
  /** 4 KiB written and synced on the file system of the record. */
  fsyncMs: number[];
}

/** Measures the floors that are no scenarios. */
export function measureFloors(node: BenchNode, rounds: number): Floors {
  const floors: Floors = { spawnMs: [], floorMs: [], fsyncMs: [] };
  const path = join(node.dir, "synced");
  const fd = openSync(path, "w", 0o600);
  const page = Buffer.alloc(4096, 1);
  const time = (work: () => void): number => {
    const startNs = Bun.nanoseconds();
    work();
    return (Bun.nanoseconds() - startNs) / 1e6;
  };
  for (let round = 0; round < rounds; round++) {
    const run = (file: string) => time(() => Bun.spawnSync([file], { env: {}, cwd: "/" }));
    floors.spawnMs.push(run("/bin/true"));
    floors.floorMs.push(run(node.floor));
    floors.fsyncMs.push(
      time(() => {
        writeSync(fd, page);
        fsyncSync(fd);
      }),
    );
  }
  closeSync(fd);
  rmSync(path);
  return floors;
}
