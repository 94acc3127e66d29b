/**
 * One operation per container at a time (CNI SPEC 1.1 §3; Mesos and nerdctl break it, design D6),
 * and GC alone. A lock is a row that names its process; that of a dead process is taken over once
 * the delegates it left running have ended, which carry its token in their environment.
 */
import { readFileSync, readlinkSync } from "node:fs";
import type { Host } from "./call.ts";
import { CniError, code } from "./cni.ts";
import { read, type State, write } from "./database.ts";
import { bootId } from "./kernel.ts";
import type { CallId, Operation } from "./record.ts";

/** Lock name under which GC excludes ADD and DEL of every container (SPEC 1.1 §3). */
export const everyContainer = "*";
/** Environment variable that carries an operation's token to its delegates and their children. */
export const tokenVariable = "GENIE_OPERATION";

/** This process, as the holder of a lock. */
export function newOperation(host: Host, containerId: string, command: string): Operation {
  return {
    containerId,
    command,
    pid: process.pid,
    started: processStarted(process.pid),
    bootId: bootId(),
    pidNamespace: ownPidNamespace(),
    token: crypto.randomUUID(),
    atMs: host.now(),
  };
}

/** Start time of a process from `/proc/<pid>/stat`; "" when there is none, or only a zombie. */
export function processStarted(pid: number): string {
  let stat: string;
  try {
    stat = readFileSync(`/proc/${pid}/stat`, "utf8");
  } catch (error) {
    if (["ENOENT", "ESRCH"].includes(String((error as NodeJS.ErrnoException).code))) return "";
    throw error;
  }
  // The second field holds the program's name, which may contain anything.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return fields[0] === "Z" ? "" : (fields[19] ?? "");
}

/** Identity of our pid namespace. */
export function ownPidNamespace(): string {
  return readlinkSync("/proc/self/ns/pid");
}

/** Gives the lock back, together with `inside`, in one transaction. */
export function release(state: State, operation: Operation, inside: () => void): void {
  write(state, () => {
    inside();
    state.database
      .query("DELETE FROM operations WHERE container_id = ? AND token = ?")
      .run(operation.containerId, operation.token);
  });
}

/** What waiting for a lock needs. */
export interface LockWait {
  host: Host;
  state: State;
  operation: Operation;
  deadlineMs: number;
  signal?: AbortSignal | undefined;
}

const insertSql = `INSERT INTO operations VALUES ($containerId, $command, $pid, $started, $bootId,
  $pidNamespace, $token, $atMs)`;

/** Writes the row of a lock. Call inside a transaction. */
export function insertOperation({ database }: State, operation: Operation): void {
  database.query(insertSql).run({ ...operation });
}

const endSql = "SELECT command, at_ms FROM ended WHERE container_id = ? AND request_ifname = ?";

/** How a call ended, and when, ms since the epoch; undefined if it did not, or was made again. */
export function endOf({ database }: State, call: CallId) {
  const [row] = database.query(endSql).values(call.containerId, call.requestIfName);
  return row && { command: String(row[0]), atMs: Number(row[1]) };
}

const heldSql = "SELECT 1 FROM operations WHERE ?1 = ?2 OR container_id IN (?1, ?2) LIMIT 1";

/**
 * Takes the container's lock and runs `inside`, in one transaction. Waits for another holder until
 * the deadline. First ends the delegates that a dead holder left running: they would undo what
 * comes next.
 *
 * @param onBusy called with the holder each time the lock is tried, e.g. to ask it to end
 * @throws what `inside` throws, after rolling back; CniError 11 when the lock stays taken or we are
 *   asked to end, 106 when the file cannot be written
 */
export async function takeLock<T>(
  wait: LockWait,
  inside: () => T,
  onBusy: (holder: Operation) => void | Promise<void> = () => undefined,
): Promise<T> {
  const { host, state, operation } = wait;
  try {
    // Prepared before the database is locked, because every other call of the node waits for that.
    read(state, () => {
      for (const sql of [heldSql, insertSql, endSql]) state.database.query(sql);
    });
    const free = write(state, () => {
      const { containerId } = operation;
      if (state.database.query(heldSql).get(containerId, everyContainer)) return undefined;
      insertOperation(state, { ...operation, atMs: host.now() });
      return { value: inside() };
    });
    if (free) return free.value;
  } catch (error) {
    if (!(error instanceof CniError) || error.code !== code.stateUnavailable) throw error;
  }
  return (await import("./recovery/held_lock.ts")).waitForLock(wait, inside, onBusy);
}
