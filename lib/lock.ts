/**
 * One operation per container at a time (CNI SPEC 1.1 §3; Mesos and nerdctl break it, design D6),
 * and GC alone. A lock is a row that names its process; the row of a dead process is taken over
 * after the delegates it left running have ended, found by the token in their environment.
 */
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { CniError, code, type Host } from "./cni.ts";
import { type State, write, writeFirst } from "./database.ts";
import { bootId } from "./netns.ts";

/** Pause between two looks at a lock that another process holds, in ms. */
const lockPollMs = 10;

/** Who holds the lock of a container. */
export interface Operation {
  containerId: string;
  command: string;
  pid: number;
  /** Start time of the process in clock ticks after boot: a reused pid differs. */
  started: string;
  /** Boot of the machine in which `pid` and `started` mean anything. */
  bootId: string;
  /** Identity of the pid namespace in which `pid` means anything. */
  pidNamespace: string;
  /** Marks the delegates of this operation, see {@link tokenVariable}. Never used twice. */
  token: string;
  atMs: number;
}

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

/** Start time of a process from `/proc/<pid>/stat`, "" when there is none. */
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
  // A zombie holds its number but does nothing any more.
  return fields[0] === "Z" ? "" : (fields[19] ?? "");
}

function ownPidNamespace(): string {
  return readlinkSync("/proc/self/ns/pid");
}

/** How long a holder that cannot be seen from here is believed to run, in ms. */
const unseenMs = 15 * 60_000;

/** Is the holder of a lock still running? One in another pid namespace is believed for a while. */
export function isRunning(operation: Operation, nowMs: number): boolean {
  if (operation.bootId !== bootId()) return false;
  const ageMs = Math.abs(nowMs - operation.atMs);
  if (operation.pidNamespace !== ownPidNamespace()) return ageMs < unseenMs;
  return processStarted(operation.pid) === operation.started && operation.started !== "";
}

/**
 * What {@link acquire} found: the lock is ours and `value` was computed under it; or someone holds
 * it; or dead holders do, whose delegates may still run.
 */
export type Acquired<T> =
  | { kind: "acquired"; value: T }
  | { kind: "busy"; holder: Operation }
  | { kind: "abandoned"; holders: Operation[] };

/** Lock name under which GC excludes ADD and DEL of every container (SPEC 1.1 §3). */
export const everyContainer = "*";

/**
 * Takes the lock of a container and runs `inside`, in one transaction: either both happened or
 * neither. Does not wait for another holder. A dead one is taken over only when its token is among
 * `finished`: were its row gone before its delegates are, a second death would lose them.
 *
 * @throws what `inside` throws, after rolling back; CniError 106 when the file cannot be written
 */
export function acquire<T>(
  host: Host,
  state: State,
  operation: Operation,
  finished: ReadonlySet<string>,
  inside: () => T,
): Acquired<T> {
  return writeFirst(host, state, () => {
    const { database } = state;
    const rows = (
      operation.containerId === everyContainer
        ? database.query("SELECT * FROM operations").all()
        : database
            .query("SELECT * FROM operations WHERE container_id IN (?, ?)")
            .all(operation.containerId, everyContainer)
    ) as OperationRow[];
    const held = rows.map(fromOperationRow);
    const holder = held.find((other) => isRunning(other, operation.atMs));
    if (holder) return { kind: "busy", holder } as const;
    const holders = held.filter(({ token }) => !finished.has(token));
    if (holders.length > 0) return { kind: "abandoned", holders } as const;
    const remove = database.query("DELETE FROM operations WHERE container_id = ?");
    for (const { containerId } of held) remove.run(containerId);
    database
      .query("INSERT INTO operations VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
      .run(
        operation.containerId,
        operation.command,
        operation.pid,
        operation.started,
        operation.bootId,
        operation.pidNamespace,
        operation.token,
        operation.atMs,
      );
    return { kind: "acquired", value: inside() } as const;
  });
}

interface OperationRow {
  container_id: string;
  command: string;
  pid: number;
  started: string;
  boot_id: string;
  pid_namespace: string;
  token: string;
  at_ms: number;
}

function fromOperationRow(row: OperationRow): Operation {
  return {
    containerId: row.container_id,
    command: row.command,
    pid: row.pid,
    started: row.started,
    bootId: row.boot_id,
    pidNamespace: row.pid_namespace,
    token: row.token,
    atMs: row.at_ms,
  };
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

/**
 * Takes the container's lock, waiting for its holder until the deadline. Delegates that a dead
 * holder left running are ended before this returns: they would undo what comes next.
 *
 * @param onBusy told of the holder at each look, e.g. to ask it to end
 * @throws CniError 11 when the lock stays taken or we are asked to end
 */
export async function takeLock<T>(
  host: Host,
  state: State,
  operation: Operation,
  { deadlineMs, signal }: { deadlineMs: number; signal?: AbortSignal },
  inside: () => T,
  onBusy: (holder: Operation) => void = () => undefined,
): Promise<T> {
  const finished = new Set<string>();
  for (;;) {
    const now = { ...operation, atMs: host.now() };
    const taken: Acquired<T> = acquire(host, state, now, finished, inside);
    if (taken.kind === "acquired") return taken.value;
    if (taken.kind === "abandoned") {
      for (const { token } of taken.holders) {
        await endOrphans(token);
        finished.add(token);
      }
      continue;
    }
    const { holder } = taken;
    onBusy(holder);
    if (signal?.aborted || host.now() >= deadlineMs) {
      throw new CniError(
        code.tryAgainLater,
        `Cannot ${operation.command} container ${operation.containerId}: ${holder.command} of ` +
          `process ${holder.pid} is still running`,
      );
    }
    await Bun.sleep(lockPollMs);
  }
}

/** Operations whose process is dead, and whose lock nobody has taken over yet. */
export function abandonedOperations({ database }: State, nowMs: number): Operation[] {
  const rows = database.query("SELECT * FROM operations").all() as OperationRow[];
  return rows.map(fromOperationRow).filter((operation) => !isRunning(operation, nowMs));
}

/** Ends what a dead operation left running, then gives its lock back. */
export async function endAbandoned(state: State, { token }: Operation): Promise<void> {
  await endOrphans(token);
  write(state, () => state.database.query("DELETE FROM operations WHERE token = ?").run(token));
}

/** Environment variable that carries an operation's token to its delegates and their children. */
export const tokenVariable = "GENIE_OPERATION";
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
      await Bun.sleep(lockPollMs);
      waitedMs += lockPollMs;
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
  return environmentOf(pid).includes(variable);
}

function environmentOf(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return []; // It ended meanwhile, or is not ours to read.
  }
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
