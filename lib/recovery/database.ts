/**
 * The file of the record where a call does not find it as it should be: absent, older, damaged, not
 * ours, or on a disk that takes no writes (design D4, D12). The file holds delegates' configs, so
 * it is 0600 in a folder of 0700.
 */
import type { Database } from "bun:sqlite";
import * as fs from "node:fs";
import { dirname, join } from "node:path";
import type { Host } from "../call.ts";
import { CniError, log } from "../cni.ts";
import * as record from "../database.ts";
import steps from "./migrations.sql" with { type: "text" };

/** The steps of migrations.sql: each brings a database from one version to the next. */
export const migrations: readonly string[] = (steps as string).split(/^-- STEP \d+$/m).slice(1);

/**
 * Opens `<dir>/genie.db`, making folder and file when absent. A file that is no database any more,
 * or not ours, is set aside under another name and reported, and a new one begun (D4).
 * @throws CniError 106 when it cannot be opened, or was written by a newer genie
 */
export function openState(host: Host, dir: string): record.State {
  const file = join(dir, "genie.db");
  try {
    return { database: openFile(file), file, copyDir: "", staysOpen: host.endsAtOnce === true };
  } catch (error) {
    if (!isUnusable(error)) throw record.unavailable(file, error);
    return renewState(host, file);
  }
}

/** Sets an unusable file aside and begins a new one. */
function renewState(host: Host, file: string): record.State {
  try {
    setAside(host, file);
    return { database: openFile(file), file, copyDir: "", staysOpen: host.endsAtOnce === true };
  } catch (error) {
    throw record.unavailable(file, error);
  }
}

/**
 * Opens a copy of the record, in memory where there is such a folder: SQLite cannot even read its
 * file on a disk that is full or read-only, and DEL must work there. Nothing written to it lasts.
 * @throws CniError 106 when there is no record, or it cannot be read
 */
export function openCopy(dir: string): record.State {
  const file = join(dir, "genie.db");
  const parent = ["/dev/shm", "/run"].find((path) => fs.existsSync(path)) ?? "/tmp";
  let copyDir = "";
  try {
    copyDir = fs.mkdtempSync(join(parent, "genie-"));
    const copy = join(copyDir, "genie.db");
    fs.copyFileSync(file, copy);
    if (fs.existsSync(`${file}-wal`)) fs.copyFileSync(`${file}-wal`, `${copy}-wal`);
    return { database: openFile(copy), file, copyDir, staysOpen: false };
  } catch (error) {
    if (copyDir !== "") fs.rmSync(copyDir, { recursive: true, force: true });
    throw record.unavailable(file, error);
  }
}

/** Opens the file, which another process may be setting aside at this moment. */
function openFile(file: string): Database {
  return persist(isMoving, { pollMs: 10, triesMax: 5 }, () => openOnce(file));
}

/** What `action` returns; again after a pause while it throws what may pass, so many times. */
function persist<T>(
  mayPass: (error: unknown) => boolean,
  { pollMs, triesMax }: { pollMs: number; triesMax: number },
  action: () => T,
): T {
  for (let tries = 1; ; tries++) {
    try {
      return action();
    } catch (error) {
      if (!mayPass(error) || tries >= triesMax) throw error;
      Bun.sleepSync(pollMs);
    }
  }
}

/** What a file gives that is renamed while it is used; others say so for good. */
function isMoving(error: unknown): boolean {
  return /^SQLITE_(CANTOPEN|IOERR)/.test(record.sqliteCode(error));
}

function openOnce(file: string): Database {
  makeFile(file);
  const database = record.openFile(file);
  try {
    const found = readVersion(database);
    if (found < record.schemaVersion) {
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
  const isBusy = (error: unknown) => /^SQLITE_BUSY/.test(record.sqliteCode(error));
  const times = { pollMs: walPollMs, triesMax: record.busyTimeoutMs / walPollMs };
  persist(isBusy, times, () => database.run("PRAGMA journal_mode = WAL"));
}

const walPollMs = 5;

/** SQLite would make the file with the umask's mode; it must never be readable by others. */
function makeFile(file: string): void {
  const found = fs.statSync(file, { throwIfNoEntry: false });
  if (!found) {
    fs.mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
    fs.closeSync(fs.openSync(file, "a", 0o600));
  } else if ((found.mode & 0o077) !== 0) fs.chmodSync(file, 0o600);
}

/** Thrown for a database that someone else made. */
class ForeignFile extends Error {}

/**
 * The schema version; 0 for a file that is still empty. One read: another process may migrate.
 * @throws Error for a database that is another program's, or of a newer genie
 */
export function readVersion(database: Database): number {
  const { isEmpty, found, id } = database
    .query(
      `SELECT NOT EXISTS (SELECT 1 FROM sqlite_schema) AS isEmpty, user_version AS found,
         application_id AS id FROM pragma_user_version, pragma_application_id`,
    )
    .get() as { isEmpty: number; found: number; id: number };
  const isOurs = id === record.applicationId || (isEmpty === 1 && id === 0 && found === 0);
  if (!isOurs) throw new ForeignFile("it is another program's database");
  if (found <= record.schemaVersion) return found;
  const remedy = "install the genie that wrote it or a later one";
  throw new Error(`its schema version ${found} is newer than ${record.schemaVersion}, ${remedy}`);
}

function migrate(database: Database): void {
  record.transact(database, () => {
    // Another process may have done it while we waited for the lock.
    const found = readVersion(database);
    if (found >= record.schemaVersion) return;
    for (const migration of migrations.slice(found)) database.run(migration);
    database.run(`PRAGMA application_id = ${record.applicationId}`);
    database.run(`PRAGMA user_version = ${record.schemaVersion}`);
  });
}

function isUnusable(error: unknown): boolean {
  return error instanceof ForeignFile || /^SQLITE_(CORRUPT|NOTADB)/.test(record.sqliteCode(error));
}

const reasonOf = (error: unknown) => (error as NodeJS.ErrnoException).code;

/** Renames a file; another process that closes the database may just have removed its log. */
function moveIfThere(from: string, to: string): void {
  try {
    fs.renameSync(from, to);
  } catch (error) {
    if (reasonOf(error) !== "ENOENT") throw error;
  }
}

/**
 * Renames the unusable file and its log. Two processes may find it unusable at once: the one that
 * gets the marker looks again, because the other may have begun a new file meanwhile.
 */
function setAside(host: Host, file: string): void {
  const marker = `${file}.setting-aside`;
  const age = host.now() - (fs.statSync(marker, { throwIfNoEntry: false })?.mtimeMs ?? host.now());
  if (Math.abs(age) > 10_000) fs.rmSync(marker, { force: true });
  const isTaken = (error: unknown) => reasonOf(error) === "EEXIST";
  const take = () => fs.closeSync(fs.openSync(marker, "wx", 0o600));
  persist(isTaken, { pollMs: 10, triesMax: 200 }, take);
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
    fs.rmSync(marker, { force: true });
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

/**
 * Goes on from a file that shows its damage only at the first write of an operation, or that
 * another process set aside meanwhile: `state` then has a new one. Later writes must not do that,
 * since they go on from earlier ones.
 * @throws `error` itself, where it means something else
 */
export function reopen(host: Host, state: record.State, error: unknown): void {
  const cause = error instanceof CniError ? error.cause : undefined;
  if (!isUnusable(cause) && !isMoving(cause)) throw error;
  state.database.close();
  const renewed = isUnusable(cause)
    ? renewState(host, state.file)
    : openState(host, dirname(state.file));
  state.database = renewed.database;
}
