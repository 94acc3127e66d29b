/**
 * The file of the record, `<state_dir>/genie.db`: opening, migrating, setting aside (design D4,
 * D12). The only owner of `bun:sqlite`; what is in the tables is `state.ts`'s business.
 *
 * WAL, `busy_timeout` set before anything else, every read-then-write `IMMEDIATE`. The file holds
 * delegates' configs, so it is 0600 in a folder of 0700.
 */
import { Database } from "bun:sqlite";
import {
  chmodSync,
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  renameSync,
  rmSync,
  statSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { CniError, code, type Host, log, toCniError } from "./cni.ts";
import { migrations } from "./migrations.ts";

/** An open record. Close it. */
export interface State {
  database: Database;
  /** Path of `genie.db`. */
  file: string;
  /** Folder of the copy that is open in place of the file, see {@link openCopy}; else "". */
  copyDir: string;
  /** Left to the end of the process, see {@link Host}: its log is checkpointed by a later call. */
  staysOpen: boolean;
}

/** The current layout of the file, `PRAGMA user_version`. */
const schemaVersion = migrations.length;
/** Marks the file as genie's, `PRAGMA application_id`. */
const applicationId = 0x67656e69;
/** How long a writer waits for another one, in ms. */
const busyTimeoutMs = 10_000;

/**
 * Opens `<dir>/genie.db`, making folder and file when absent. A file that is no database any more,
 * or not ours, is set aside under another name and reported, and a new one begun (D4).
 *
 * @throws CniError 106 when it cannot be opened, or was written by a newer genie
 */
export function openState(host: Host, dir: string): State {
  const file = join(dir, "genie.db");
  try {
    return { database: openFile(file), file, copyDir: "", staysOpen: host.endsAtOnce === true };
  } catch (error) {
    if (!isUnusable(error)) throw unavailable(file, error);
    return renewState(host, file);
  }
}

/** Sets an unusable file aside and begins a new one. */
function renewState(host: Host, file: string): State {
  try {
    setAside(host, file);
    return { database: openFile(file), file, copyDir: "", staysOpen: host.endsAtOnce === true };
  } catch (error) {
    throw unavailable(file, error);
  }
}

/**
 * Opens a copy of the record, in memory where there is such a folder: SQLite cannot even read its
 * file on a disk that is full or read-only, and DEL must work there. Nothing written to it lasts.
 *
 * @throws CniError 106 when there is no record, or it cannot be read
 */
export function openCopy(dir: string): State {
  const file = join(dir, "genie.db");
  const parent = ["/dev/shm", "/run"].find((path) => existsSync(path)) ?? "/tmp";
  let copyDir = "";
  try {
    copyDir = mkdtempSync(join(parent, "genie-"));
    const copy = join(copyDir, "genie.db");
    copyFileSync(file, copy);
    if (existsSync(`${file}-wal`)) copyFileSync(`${file}-wal`, `${copy}-wal`);
    return { database: openFile(copy), file, copyDir, staysOpen: false };
  } catch (error) {
    if (copyDir !== "") rmSync(copyDir, { recursive: true, force: true });
    throw unavailable(file, error);
  }
}

/** Closes the file, unless the process is about to end anyway. */
export function closeState({ database, copyDir, staysOpen }: State): void {
  if (staysOpen) return;
  database.close();
  if (copyDir !== "") rmSync(copyDir, { recursive: true, force: true });
}

/** Opens the file, which another process may be setting aside at this moment. */
function openFile(file: string): Database {
  for (let tries = 1; ; tries++) {
    try {
      return openOnce(file);
    } catch (error) {
      if (!isMoving(error) || tries === openTriesMax) throw error;
      Bun.sleepSync(openPollMs);
    }
  }
}

/** What a file gives that is renamed while it is used; others say so for good. */
function isMoving(error: unknown): boolean {
  return /^SQLITE_(CANTOPEN|IOERR)/.test(sqliteCode(error));
}

const openPollMs = 10;
const openTriesMax = 5;

function openOnce(file: string): Database {
  makeFile(file);
  const database = new Database(file, { readwrite: true, create: false, strict: true });
  try {
    database.run(`PRAGMA busy_timeout = ${busyTimeoutMs}`);
    const found = readVersion(database);
    if (found > schemaVersion) {
      throw new CniError(
        code.stateUnavailable,
        `Cannot use ${file}: its schema version ${found} is newer than ${schemaVersion}, install ` +
          "the genie that wrote it or a later one",
      );
    }
    // A small log: most calls leave it as it is, and the next one reads all of it when it opens.
    database.run("PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 100");
    if (found < schemaVersion) {
      useWal(database);
      migrate(database);
    }
    return database;
  } catch (error) {
    database.close();
    throw error;
  }
}

/**
 * Turns on the write-ahead log, which stays on for the life of the file. Of several processes that
 * find a new file SQLite sends all but one away at once, `busy_timeout` or not.
 */
function useWal(database: Database): void {
  for (let waitedMs = 0; ; waitedMs += walPollMs) {
    try {
      database.run("PRAGMA journal_mode = WAL");
      return;
    } catch (error) {
      if (!/^SQLITE_BUSY/.test(sqliteCode(error)) || waitedMs >= busyTimeoutMs) throw error;
      Bun.sleepSync(walPollMs);
    }
  }
}

const walPollMs = 5;

/** SQLite would make the file with the umask's mode; it must never be readable by others. */
function makeFile(file: string): void {
  const found = statSync(file, { throwIfNoEntry: false });
  if (!found) {
    mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
    closeSync(openSync(file, "a", 0o600));
  } else if ((found.mode & 0o077) !== 0) chmodSync(file, 0o600);
}

/** Thrown for a database that someone else made. */
class ForeignFile extends Error {}

/** The schema version; 0 for a file that is still empty. One read: another process may migrate. */
function readVersion(database: Database): number {
  const { isEmpty, found, id } = database
    .query(
      `SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema) AS isEmpty, user_version AS found,
         application_id AS id FROM pragma_user_version, pragma_application_id`,
    )
    .get() as { isEmpty: number; found: number; id: number };
  if (id === applicationId || (isEmpty === 1 && id === 0 && found === 0)) return found;
  throw new ForeignFile("it is another program's database");
}

function migrate(database: Database): void {
  transact(database, () => {
    // Another process may have done it while we waited for the lock.
    const found = readVersion(database);
    if (found >= schemaVersion) return;
    for (const migration of migrations.slice(found)) database.run(migration);
    database.run(`PRAGMA application_id = ${applicationId}`);
    database.run(`PRAGMA user_version = ${schemaVersion}`);
  });
}

/** `code` of an SQLite error, "" for any other value. */
function sqliteCode(error: unknown): string {
  return error instanceof Error ? String((error as { code?: unknown }).code ?? "") : "";
}

function isUnusable(error: unknown): boolean {
  return error instanceof ForeignFile || /^SQLITE_(CORRUPT|NOTADB)/.test(sqliteCode(error));
}

/** Renames a file; another process that closes the database may just have removed its log. */
function moveIfThere(from: string, to: string): void {
  try {
    renameSync(from, to);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
}

/**
 * Renames the unusable file and its log. Two processes may find it unusable at once: the one that
 * gets the marker looks again, because the other may have begun a new file meanwhile.
 */
function setAside(host: Host, file: string): void {
  const marker = `${file}.setting-aside`;
  const age = host.now() - (statSync(marker, { throwIfNoEntry: false })?.mtimeMs ?? host.now());
  if (Math.abs(age) > 10_000) rmSync(marker, { force: true });
  for (let tries = 0; !takeMarker(marker); tries++) {
    if (tries === markerTriesMax) throw new Error(`${marker} stays taken`);
    Bun.sleepSync(markerPollMs);
  }
  try {
    if (isSound(file)) return;
    const aside = `${file}.unusable-${host.now()}`;
    for (const suffix of ["-wal", "-shm", ""]) {
      moveIfThere(file + suffix, aside + suffix);
    }
    log(host, "error", `Set aside unusable database ${file}: DEL falls back to best effort`, {
      kept: aside,
    });
  } finally {
    rmSync(marker, { force: true });
  }
}

const markerPollMs = 10;
const markerTriesMax = 200;

function takeMarker(marker: string): boolean {
  try {
    closeSync(openSync(marker, "wx", 0o600));
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    return false;
  }
}

/** Is every page of the file as it should be? Reads it whole. */
function isSound(file: string): boolean {
  let database: Database | undefined;
  try {
    database = openFile(file);
    const [first] = database.query("PRAGMA quick_check(1)").values();
    return first?.[0] === "ok";
  } catch (error) {
    if (!isUnusable(error)) throw error;
    return false;
  } finally {
    database?.close();
  }
}

function unavailable(file: string, error: unknown): CniError {
  if (error instanceof CniError) return error;
  const number = /^SQLITE_BUSY/.test(sqliteCode(error))
    ? code.tryAgainLater
    : code.stateUnavailable;
  const reason = toCniError(error).message.replace(/^Internal error: /, "");
  return new CniError(number, `Cannot use ${file}: ${reason}`, { cause: error });
}

/** One IMMEDIATE transaction. Bun's own prepares ten statements for what takes two. */
function transact<T>(database: Database, inside: () => T): T {
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

/** Runs `inside` so that a failure takes back its writes alone, also within a transaction. */
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

/**
 * The first {@link write} of an operation: damage that shows only now sets the file aside as well,
 * by us or by another process, and `inside` runs on the new one. Later writes must not do that:
 * they go on from earlier ones.
 */
export function writeFirst<T>(host: Host, state: State, inside: () => T): T {
  try {
    return write(state, inside);
  } catch (error) {
    const cause = error instanceof CniError ? error.cause : undefined;
    if (!isUnusable(cause) && !isMoving(cause)) throw error;
    state.database.close();
    const dir = dirname(state.file);
    state.database = (
      isUnusable(cause) ? renewState(host, state.file) : openState(host, dir)
    ).database;
    return write(state, inside);
  }
}

/** Runs a query. @throws CniError 106 when the file cannot be read */
export function read<T>(state: State, inside: () => T): T {
  try {
    return inside();
  } catch (error) {
    throw unavailable(state.file, error);
  }
}
