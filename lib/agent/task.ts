/**
 * What every task of the node agent gets: the configuration, the health that it reports to, and the
 * record; and the loops that several tasks run.
 */
import { statSync } from "node:fs";
import type { Host, StdinConfig } from "../call.ts";
import { CniError, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import {
  closeState,
  busyTimeoutMs as patienceMs,
  read,
  type State,
  sqliteCode,
} from "../database.ts";
import { pause } from "../kubernetes/watch.ts";
import { openState } from "../recovery/database.ts";

/** What every task gets. */
export interface Agent {
  host: Host;
  config: Config;
  /** Our own CNI config, by which the runtime calls genie. */
  own: StdinConfig;
  /** File of our own CNI config, where one was named. */
  cniConfig?: string | undefined;
  health: Health;
  /** Shared by all tasks that do not need a connection of their own. */
  record: AgentRecord;
}

/** One job of the agent. */
export interface Task {
  name: string;
  /** Does the configuration, or where we run, ask for it? Absent: always. */
  isWanted?: (config: Config, host: Host) => boolean;
  /**
   * Runs until `host.signal` aborts, and says so to `health` each time round. When it throws, that
   * is logged and it is run again.
   */
  run: (agent: Agent) => Promise<void>;
}

/** What is counted, from the start of the agent on. */
export type Trouble = "api" | "database" | "garbage" | "task";

/** A task counts as hung after this long without a beat, in ms; `beat` may allow more. */
const silenceMsDefault = 60_000;

/** See {@link openHealth}. */
export type Health = ReturnType<typeof openHealth>;

/**
 * Which tasks make progress, and what went wrong so far, for probes and metrics. Trouble of others
 * (an API server that is away, a record that is locked) is counted and is no lack of health: a
 * restart of the agent would not end it.
 * @param nowMs the monotonic clock
 */
export function openHealth(nowMs: () => number = () => performance.now()) {
  const tasks = new Map<string, { beatMs: number; withinMs: number; reason: string }>();
  const counts = new Map<Trouble, number>();
  const set = (task: string, reason: string, withinMs = silenceMsDefault) =>
    void tasks.set(task, { beatMs: nowMs(), withinMs, reason });
  return {
    /** A task begins: until its first `beat` the agent is not ready. */
    begin: (task: string) => {
      if (!tasks.has(task)) set(task, "it has not gone round yet");
    },
    /** A task has gone round once, and will again within this time. */
    beat: (task: string, withinMs?: number) => set(task, "", withinMs),
    /** A task ended with an error and is started again, after a pause. */
    failed: (task: string, reason: string) => set(task, reason),
    /** Counts something that went wrong, so often. */
    count: (what: Trouble, times = 1) => void counts.set(what, (counts.get(what) ?? 0) + times),
    counted: (what: Trouble) => counts.get(what) ?? 0,
    /** From the newest change of what policies depend on until its rules were in force, in ms. */
    policyLagMs: undefined as number | undefined,
    /** Why the agent is not healthy, a line for each task; none when it is. */
    reasons: () =>
      [...tasks].flatMap(([task, { beatMs, withinMs, reason }]) => {
        if (reason !== "") return [`${task}: ${reason}`];
        const silentMs = nowMs() - beatMs;
        return silentMs > withinMs ? [`${task}: silent for ${Math.round(silentMs / 1000)} s`] : [];
      }),
  };
}

/** How long a lock of the record is waited for at once, in ms: the whole agent waits meanwhile. */
const busyTimeoutMs = 250;
/** Pause until a record that is locked is tried again, at most, in ms. */
export const lockedPauseMs = 50;

/** Does another process write to the record, so that it is to be tried again? */
export function isLocked(error: unknown): boolean {
  return error instanceof CniError && sqliteCode(error.cause).startsWith("SQLITE_BUSY");
}

/**
 * Follows how long the record has been locked: in a storm of calls that is a matter of course, and
 * no trouble until it lasts as long as a call waits for it.
 */
export function openPatience() {
  let sinceMs = 0;
  return {
    /** It could be used. */
    renew: () => {
      sinceMs = 0;
    },
    /** Is this failure one that passes? */
    has: (error: unknown): boolean => {
      if (!isLocked(error)) return false;
      sinceMs ||= performance.now();
      return performance.now() - sinceMs < patienceMs;
    },
  };
}

/** See {@link openRecord}. */
export type AgentRecord = ReturnType<typeof openRecord>;

/**
 * The record, kept open, and opened again where another process set the file aside. Opens nothing
 * yet. What uses it throws CniError 106 when it cannot be opened, read or written, 11 when it stays
 * locked.
 * @param onError called for each use that fails
 */
export function openRecord(host: Host, stateDir: string, onError: () => void) {
  let open: AgentState | undefined;
  const close = () => {
    if (open) closeState(open);
    open = undefined;
  };
  const state = (): State => {
    if (open && isReplaced(open)) close();
    open ??= openAgentState(host, stateDir);
    return open;
  };
  const use = <T>(inside: (state: State) => T, isPassing = (_: unknown) => false): T => {
    try {
      const found = state();
      return read(found, () => inside(found));
    } catch (error) {
      if (!isPassing(error)) onError();
      throw error;
    }
  };
  return {
    use: <T>(inside: (state: State) => T): T => use(inside),
    /**
     * For what writes, whole or not at all: as `use`, and again while the record is locked, for as
     * long as a call would wait. The agent does other things meanwhile.
     */
    change: async <T>(inside: (state: State) => T): Promise<T> => {
      const patience = openPatience();
      const isPassing = (error: unknown) => !host.signal.aborted && patience.has(error);
      for (;;) {
        try {
          return use(inside, isPassing);
        } catch (error) {
          if (!isPassing(error)) throw error;
        }
        await pause(lockedPauseMs * Math.random(), host.signal);
      }
    },
    /** For what takes a state and reports its failures itself. */
    state,
    /** Differs after each change of the record, by whomever. */
    version: () => {
      // The first counts the changes of this connection alone, the second those of all others.
      const sql = "SELECT total_changes() AS own, data_version AS others FROM pragma_data_version";
      const row = use(({ database }) => database.query(sql).get());
      return `${open?.inode} ${JSON.stringify(row)}`;
    },
    close,
  };
}

/** A connection of the agent, with the inode of its file, which another process may set aside. */
export type AgentState = State & { inode: number };

/** Opens the record so that it gives up early where it is locked, and keeps few pages in memory. */
export function openAgentState(host: Host, stateDir: string): AgentState {
  const state = openState(host, stateDir);
  state.database.run(`PRAGMA busy_timeout = ${busyTimeoutMs}; PRAGMA cache_size = -256`);
  return { ...state, inode: inodeOf(state.file) };
}

/** True when the file is not the one that was opened any more. */
export function isReplaced({ file, inode }: AgentState): boolean {
  return inodeOf(file) !== inode;
}

/** Tells one file from the one that takes its place; 0 where there is none. */
export function inodeOf(file: string): number {
  return statSync(file, { throwIfNoEntry: false })?.ino ?? 0;
}

/**
 * Runs `act` each time the record has changed, or something else is due, until the agent ends. A
 * failure of the record is logged with `what` then waits, and `act` is run again in the next round.
 */
export async function watchRecord(
  { host, record, health }: Agent,
  task: { name: string; what: string; pollMs: number },
  act: () => void | Promise<void>,
  isDue: () => boolean = () => false,
): Promise<void> {
  let version = "";
  for (; !host.signal.aborted; await pause(task.pollMs, host.signal)) {
    health.beat(task.name);
    try {
      const found = record.version();
      if (found === version && !isDue()) continue;
      await act();
      version = found;
    } catch (error) {
      if (host.signal.aborted) return;
      version = "";
      log(host, "debug", `${task.what} for the record: ${toCniError(error).message}`);
    }
  }
}

/** Does something for all, so many at a time. @throws what `act` throws */
export async function forAll<T>(
  all: readonly T[],
  workers: number,
  act: (one: T) => Promise<void>,
): Promise<void> {
  const left = [...all];
  const work = async () => {
    for (let one = left.shift(); one !== undefined; one = left.shift()) await act(one);
  };
  await Promise.all(Array.from({ length: workers }, work));
}

/** The pause after so many failures in a row: it doubles, from `firstMs` up to `maxMs`. */
export function pauseAfter(failures: number, firstMs: number, maxMs: number): number {
  return Math.min(maxMs, firstMs * 2 ** Math.min(failures, 20));
}
