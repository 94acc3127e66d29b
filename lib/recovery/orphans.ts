/**
 * What a killed genie left behind: the lock that names its process, and the delegates it left
 * running, found by the token in their environment. They are ended before anyone takes the lock.
 */
import { readdirSync, readFileSync } from "node:fs";
import { type State, write } from "../database.ts";
import { ownPidNamespace, tokenVariable } from "../lock.ts";
import type { Operation } from "../record.ts";
import { isRunning, selectOperations } from "./held_lock.ts";
import { orElse } from "./tried.ts";

/** Pause between two looks at a process that is to end, in ms. */
const pollMs = 10;

/** Operations whose process is dead, and whose lock nobody has taken over yet. */
export function abandonedOperations({ database }: State, nowMs: number): Operation[] {
  const held = database.query(selectOperations).all() as Operation[];
  return held.filter((operation) => !isRunning(operation, nowMs));
}

/** Ends what a dead operation left running, then gives its lock back. */
export async function endAbandoned(state: State, { token }: Operation): Promise<void> {
  await endOrphans(token);
  write(state, () => state.database.query("DELETE FROM operations WHERE token = ?").run(token));
}

/**
 * How long orphans may go on by themselves, in ms. A plugin that is ended in the middle may leave
 * what no DEL undoes: host-local an address of nobody, bridge a bridge that refuses every further
 * pod. A healthy one is done in a fraction of this.
 */
const orphanGraceMs = 1000;
/** How long killed orphans may take to be gone, in ms. */
const orphanEndMs = 2000;

/**
 * Waits for every process that a dead operation left running, ends those that do not come to their
 * end soon, and waits until they are gone.
 */
export async function endOrphans(token: string): Promise<void> {
  const variable = `${tokenVariable}=${token}`;
  let waitedMs = 0;
  // A look at all processes is dear: it is repeated only when those it found are gone.
  for (let all = processesWith(variable); all.length > 0; all = processesWith(variable)) {
    for (let found = all; found.length > 0; found = found.filter((pid) => carries(pid, variable))) {
      if (waitedMs > orphanGraceMs + orphanEndMs) return;
      if (waitedMs >= orphanGraceMs) for (const pid of found) endProcess(pid, "SIGKILL");
      await Bun.sleep(pollMs);
      waitedMs += pollMs;
    }
  }
}

function processesWith(variable: string): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => pid !== process.pid && carries(pid, variable));
}

function carries(pid: number, variable: string): boolean {
  // It may end meanwhile, or not be ours to read.
  const environment = orElse("", () => readFileSync(`/proc/${pid}/environ`, "utf8"));
  return environment.split("\0").includes(variable);
}

/**
 * Sends a signal to the holder of a lock. One that is gone already is no error, and one in another
 * pid namespace is left alone: its number belongs to somebody else here.
 */
export function endHolder(holder: Operation, signal: "SIGTERM" | "SIGKILL"): void {
  if (holder.pidNamespace === ownPidNamespace()) endProcess(holder.pid, signal);
}

function endProcess(pid: number, signal: "SIGTERM" | "SIGKILL"): void {
  try {
    process.kill(pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}
