/**
 * The file of the record, `<state_dir>/genie.db`, where it exists and has this layout; making,
 * migrating and replacing it is for `recovery/database.ts`. The only writer of SQLite: WAL,
 * `busy_timeout` set before anything else, every read-then-write `IMMEDIATE` (design D12).
 */
import { Database } from "bun:sqlite";
import { rmSync, statSync } from "node:fs";
import { join } from "node:path";
import type { Host } from "./call.ts";
import { CniError, code, toCniError } from "./cni.ts";

/** An open record. Close it. */
export interface State {
  database: Database;
  file: string;
  /** Folder of the copy that is open in place of the file; else "". */
  copyDir: string;
  /** The end of the process closes the file; a later call checkpoints its log. */
  staysOpen: boolean;
}

/** The layout that this genie writes, `PRAGMA user_version`: the number of migrations. */
export const schemaVersion = 5;
/** Marks the file as genie's, `PRAGMA application_id`. */
export const applicationId = 0x67656e69;
/**
 * How long a writer waits for another one, in ms. SQLite asks again every 100 ms and keeps no
 * queue: when a hundred calls begin at once on two cores, one may miss its turn for many seconds.
 */
export const busyTimeoutMs = 30_000;

/**
 * Opens `<dir>/genie.db`. One that is absent is made, an older one migrated, an unusable one
 * replaced and kept under another name (design D4).
 * @throws CniError 106 when it cannot be opened, or was written by a newer genie
 */
export async function openState(host: Host, dir: string): Promise<State> {
  const file = join(dir, "genie.db");
  const database = openExisting(file);
  if (database) return { database, file, copyDir: "", staysOpen: host.endsAtOnce === true };
  return (await import("./recovery/database.ts")).openState(host, dir);
}

/** The file where it exists and is as it should be; undefined for anything else. */
function openExisting(file: string): Database | undefined {
  let database: Database | undefined;
  try {
    // A file that others can read is put right first.
    if ((statSync(file).mode & 0o077) !== 0) return undefined;
    database = openFile(file);
    const [row] = database
      .query("SELECT user_version, application_id FROM pragma_user_version, pragma_application_id")
      .values();
    if (row?.[0] === schemaVersion && row[1] === applicationId) return database;
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    if (sqliteCode(error).startsWith("SQLITE_BUSY")) {
      database?.close();
      throw unavailable(file, error);
    }
  }
  database?.close();
  return undefined;
}

/** Opens an existing file, whatever is in it. */
export function openFile(file: string): Database {
  const database = new Database(file, { readwrite: true, create: false, strict: true });
  try {
    // The log stays small, because the next call reads all of it when it opens.
    database.run(
      `PRAGMA busy_timeout = ${busyTimeoutMs}; PRAGMA synchronous = NORMAL;
       PRAGMA wal_autocheckpoint = 100`,
    );
    return database;
  } catch (error) {
    database.close();
    throw error;
  }
}

/** Closes the file, unless the process is about to end anyway. */
export function closeState({ database, copyDir, staysOpen }: State): void {
  if (staysOpen) return;
  database.close();
  if (copyDir !== "") rmSync(copyDir, { recursive: true, force: true });
}

/** `code` of an SQLite error, "" for any other value. */
export function sqliteCode(error: unknown): string {
  return error instanceof Error ? String((error as { code?: unknown }).code ?? "") : "";
}

/** The error for a file that cannot be used; a CniError stays as it is. */
export function unavailable(file: string, error: unknown): CniError {
  if (error instanceof CniError) return error;
  const isBusy = sqliteCode(error).startsWith("SQLITE_BUSY");
  const number = isBusy ? code.tryAgainLater : code.stateUnavailable;
  const reason = toCniError(error).message.replace(/^Internal error: /, "");
  return new CniError(number, `Cannot use ${file}: ${reason}`, { cause: error });
}

/** One IMMEDIATE transaction. Bun's own prepares ten statements for what takes two. */
export function transact<T>(database: Database, inside: () => T): T {
  database.run("BEGIN IMMEDIATE");
  try {
    const value = inside();
    database.run("COMMIT");
    return value;
  } catch (error) {
    // SQLite itself has rolled back after some errors (disk full).
    if (database.inTransaction) database.run("ROLLBACK");
    throw error;
  }
}

/**
 * Runs `inside` in one IMMEDIATE transaction.
 * @throws CniError 106 when the file cannot be written, 11 when it stays locked; a CniError of
 *   `inside` as it is
 */
export function write<T>(state: State, inside: () => T): T {
  try {
    return transact(state.database, inside);
  } catch (error) {
    throw unavailable(state.file, error);
  }
}

/** Runs `inside` so that a failure takes back its writes alone, within a transaction too. */
export function savepoint({ database }: State, inside: () => void): void {
  database.run("SAVEPOINT aside");
  try {
    inside();
  } catch (error) {
    if (database.inTransaction) database.run("ROLLBACK TO aside; RELEASE aside");
    throw error;
  }
  database.run("RELEASE aside");
}

/** Runs a query. @throws CniError 106 when the file cannot be read */
export function read<T>(state: State, inside: () => T): T {
  try {
    return inside();
  } catch (error) {
    throw unavailable(state.file, error);
  }
}
