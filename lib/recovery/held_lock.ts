/**
 * A lock that is held: by another process, which is waited for; or by a dead one, whose row is
 * taken over once the delegates it left running have ended.
 */
import { CniError, code } from "../cni.ts";
import { type State, write } from "../database.ts";
import { bootId } from "../kernel.ts";
import * as lock from "../lock.ts";
import type { Operation } from "../record.ts";
import { reopen } from "./database.ts";
import { endOrphans } from "./orphans.ts";

const lockPollMs = 10;
/** How long a holder that cannot be seen from here is taken to run, in ms. */
const unseenMs = 15 * 60_000;

/** Is the holder of a lock still running? In another pid namespace its age decides. */
export function isRunning(operation: Operation, nowMs: number): boolean {
  if (operation.bootId !== bootId()) return false;
  const ageMs = Math.abs(nowMs - operation.atMs);
  if (operation.pidNamespace !== lock.ownPidNamespace()) return ageMs < unseenMs;
  return lock.processStarted(operation.pid) === operation.started && operation.started !== "";
}

/** The lock is ours; or another holds it; or dead holders do, whose delegates may still run. */
export type Acquired<T> =
  | { kind: "acquired"; value: T }
  | { kind: "busy"; holder: Operation }
  | { kind: "abandoned"; holders: Operation[] };

/** What reads the locks, as {@link Operation}s. */
export const selectOperations = `SELECT container_id AS containerId, command, pid, started,
  boot_id AS bootId, pid_namespace AS pidNamespace, token, at_ms AS atMs FROM operations`;

/**
 * Takes the lock of a container and runs `inside`, in one transaction. Does not wait for another
 * holder. A dead one is replaced only when its token is among `finished`: were its row gone before
 * its delegates are, a second death would lose them.
 * @throws what `inside` throws, after rolling back; CniError 106 when the file cannot be written
 */
export function acquire<T>(
  state: State,
  operation: Operation,
  finished: ReadonlySet<string>,
  inside: () => T,
): Acquired<T> {
  return write(state, () => {
    const { database } = state;
    const { containerId } = operation;
    const held = database
      .query(`${selectOperations} WHERE ?1 = ?2 OR container_id IN (?1, ?2)`)
      .all(containerId, lock.everyContainer) as Operation[];
    const holder = held.find((other) => isRunning(other, operation.atMs));
    if (holder) return { kind: "busy", holder } as const;
    const holders = held.filter(({ token }) => !finished.has(token));
    if (holders.length > 0) return { kind: "abandoned", holders } as const;
    const remove = database.query("DELETE FROM operations WHERE container_id = ?");
    for (const other of held) remove.run(other.containerId);
    lock.insertOperation(state, operation);
    return { kind: "acquired", value: inside() } as const;
  });
}

/**
 * Takes a lock that is held, or that could not be written, see {@link takeLock}.
 * @throws CniError 11 when the lock stays taken or we are asked to end
 */
export async function waitForLock<T>(
  { host, state, operation, deadlineMs, signal }: lock.LockWait,
  inside: () => T,
  onBusy: (holder: Operation) => void | Promise<void>,
): Promise<T> {
  const finished = new Set<string>();
  for (;;) {
    const now = { ...operation, atMs: host.now() };
    let taken: Acquired<T>;
    try {
      taken = acquire(state, now, finished, inside);
    } catch (error) {
      reopen(host, state, error);
      taken = acquire(state, now, finished, inside);
    }
    if (taken.kind === "acquired") return taken.value;
    if (taken.kind === "abandoned") {
      for (const { token } of taken.holders) {
        await endOrphans(token);
        finished.add(token);
      }
      continue;
    }
    const { holder } = taken;
    await onBusy(holder);
    if (signal?.aborted || host.now() >= deadlineMs) {
      const what = `Cannot ${operation.command} container ${operation.containerId}`;
      const why = `${holder.command} of process ${holder.pid} is still running`;
      throw new CniError(code.tryAgainLater, `${what}: ${why}`);
    }
    await Bun.sleep(lockPollMs);
  }
}
