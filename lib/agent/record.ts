/**
 * The record as the agent's parts share it: one connection for all that do not need their own,
 * opened anew where another process set the file aside. A transaction does not wait long: whoever
 * waits here keeps the whole agent waiting, and everything is tried again anyway.
 */
import { statSync } from "node:fs";
import type { Host } from "../cni.ts";
import { closeState, openState, read, type State } from "../database.ts";

/** How long a lock of the record is waited for, in ms. */
const busyTimeoutMs = 250;

/** The record, kept open. */
export interface AgentRecord {
  /** @throws CniError 106 when it cannot be opened, read or written, 11 when it stays locked */
  use<T>(inside: (state: State) => T): T;
  /** For what takes a state and tells of its failures itself. @throws CniError as `use` */
  state(): State;
  /** Differs after each change of the record, by whomever. @throws CniError as `use` */
  version(): string;
  close(): void;
}

/**
 * Opens nothing yet.
 * @param onError called for each use that fails
 */
export function openRecord(host: Host, stateDir: string, onError: () => void): AgentRecord {
  let open: { state: State; inode: number } | undefined;
  const close = () => {
    if (open) closeState(open.state);
    open = undefined;
  };
  const state = () => {
    if (open && inodeOf(open.state.file) !== open.inode) close();
    if (!open) {
      const fresh = openState(host, stateDir);
      shorten(fresh);
      open = { state: fresh, inode: inodeOf(fresh.file) };
    }
    return open.state;
  };
  const use = <T>(inside: (state: State) => T): T => {
    try {
      const found = state();
      return read(found, () => inside(found));
    } catch (error) {
      onError();
      throw error;
    }
  };
  return {
    use,
    state,
    version: () => {
      // Neither says anything of the other's: of this connection, and of all others.
      const sql = "SELECT total_changes() AS own, data_version AS others FROM pragma_data_version";
      const { own, others } = use(({ database }) => database.query(sql).get()) as {
        own: number;
        others: number;
      };
      return `${open?.inode} ${others} ${own}`;
    },
    close,
  };
}

/** Lets a connection of the agent give up early where the record is locked, and keep few pages. */
export function shorten({ database }: State): void {
  database.run(`PRAGMA busy_timeout = ${busyTimeoutMs}; PRAGMA cache_size = -256`);
}

/** Tells whether the file is still the one that was opened; 0 where there is none. */
export function inodeOf(file: string): number {
  return statSync(file, { throwIfNoEntry: false })?.ino ?? 0;
}
