/**
 * The record, opened for reading only: nothing in it is made, migrated, repaired or set aside.
 *
 * SQLite reads a file in WAL mode through `genie.db-shm`, which it makes beside it when absent; the
 * next ADD or DEL removes that again. Where it cannot be made (read-only or full disk) nobody can
 * write either, so the file is read as it is, or from a copy when its log is not empty.
 */
import { constants, Database } from "bun:sqlite";
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { CniError, code, toCniError } from "../cni.ts";
import { closeState, openCopy } from "../database.ts";
import { migrations } from "../migrations.ts";

/** Newest layout of the file that is understood, `PRAGMA user_version`. */
const readableVersion = migrations.length;
/** Marks the file as genie's, as in `database.ts`. */
const applicationId = 0x67656e69;

/** How long a reader waits for a writer that recovers the log, in ms. */
const busyTimeoutMs = 5000;

/** The open record. Which tables it has depends on the genie that wrote it last. */
export interface RecordReader {
  database: Database;
  tables: ReadonlySet<string>;
}

/** An unusable record that was set aside, see design D4. */
export interface SetAside {
  file: string;
  /** When, ms since the epoch; 0 when its name does not say. */
  atMs: number;
}

/** Path of the record in a state folder. */
export function recordFile(dir: string): string {
  return join(dir, "genie.db");
}

/**
 * Reads the record in one transaction: all of it is of one moment.
 *
 * @returns what `inside` returns, or undefined when there is no record, or an empty one
 * @throws CniError 106 when it is damaged, foreign or newer; 11 when it stays locked; 5 when it may
 *   not be read
 */
export function readRecord<T>(dir: string, inside: (record: RecordReader) => T): T | undefined {
  const file = recordFile(dir);
  try {
    if (!statSync(file, { throwIfNoEntry: false })?.size) return undefined;
    return readOpened(dir, file, inside);
  } catch (error) {
    throw explain(file, error);
  }
}

function readOpened<T>(
  dir: string,
  file: string,
  inside: (record: RecordReader) => T,
): T | undefined {
  let database: Database | undefined;
  try {
    database = new Database(file, { readonly: true, strict: true });
    return readAll(database, inside);
  } catch (error) {
    if (!lacksSharedMemory(error)) throw error;
  } finally {
    database?.close();
  }
  return readUnshared(dir, file, inside);
}

/** Reads a file beside which nothing can be made. */
function readUnshared<T>(
  dir: string,
  file: string,
  inside: (record: RecordReader) => T,
): T | undefined {
  if (statSync(`${file}-wal`, { throwIfNoEntry: false })?.size) {
    const copy = openCopy(dir);
    try {
      return readAll(copy.database, inside);
    } finally {
      closeState(copy);
    }
  }
  const path = file.split("/").map(encodeURIComponent).join("/");
  const database = new Database(
    `file:${path}?immutable=1`,
    constants.SQLITE_OPEN_READONLY | constants.SQLITE_OPEN_URI,
  );
  try {
    return readAll(database, inside);
  } finally {
    database.close();
  }
}

function readAll<T>(database: Database, inside: (record: RecordReader) => T): T | undefined {
  database.run(`PRAGMA busy_timeout = ${busyTimeoutMs}`);
  return database.transaction(() => {
    const names = database.query("SELECT name FROM sqlite_schema WHERE type = 'table'").values();
    if (names.length === 0) return undefined;
    if (pragma(database, "application_id") !== applicationId) {
      throw new CniError(code.stateUnavailable, "it is another program's database");
    }
    const version = pragma(database, "user_version");
    if (version > readableVersion) {
      throw new CniError(
        code.stateUnavailable,
        `its schema version ${version} is newer than ${readableVersion}, use the genie that ` +
          "wrote it or a later one",
      );
    }
    return inside({ database, tables: new Set(names.map(([name]) => String(name))) });
  })();
}

function pragma(database: Database, name: string): number {
  return Number(database.query(`PRAGMA ${name}`).values()[0]?.[0]);
}

/** `code` of an SQLite or system error, "" for any other value. */
function codeOf(error: unknown): string {
  return error instanceof Error ? String((error as { code?: unknown }).code ?? "") : "";
}

function lacksSharedMemory(error: unknown): boolean {
  return /^SQLITE_(CANTOPEN|READONLY|FULL|IOERR_SHM)/.test(codeOf(error));
}

function explain(file: string, error: unknown): CniError {
  const reason = toCniError(error).message.replace(/^Internal error: /, "");
  const found = codeOf(error);
  const damaged = /^SQLITE_(CORRUPT|NOTADB)/.test(found);
  let number: number = code.stateUnavailable;
  if (/^SQLITE_BUSY/.test(found)) number = code.tryAgainLater;
  else if (/^E[A-Z]+$/.test(found)) number = code.ioFailure;
  const hint = damaged
    ? ": it is damaged and left as it is, the next ADD sets it aside and begins a new one"
    : "";
  const prefix = `Cannot read ${file}: `;
  // openCopy() names the file itself.
  const text = reason.replace(`Cannot use ${file}: `, "");
  return new CniError(number, `${prefix}${text}${hint}`, { cause: error });
}

/** The records of a state folder that were set aside, newest first. */
export function setAsideRecords(dir: string): SetAside[] {
  let names: string[];
  try {
    names = readdirSync(dir);
  } catch (error) {
    if (codeOf(error) === "ENOENT" || codeOf(error) === "ENOTDIR") return [];
    throw explain(dir, error);
  }
  return names
    .filter((name) => name.startsWith("genie.db.unusable-") && !/-(wal|shm)$/.test(name))
    .map((name) => ({
      file: join(dir, name),
      atMs: Number(/-(\d{1,15})$/.exec(name)?.[1] ?? 0),
    }))
    .sort((a, b) => b.atMs - a.atMs);
}
