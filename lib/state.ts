/**
 * The record: what ADD did, written down before it is done, in one SQLite file (design D4, D12).
 * The only owner of `bun:sqlite`. Holds the attachments, the per-container locks, and the ids of
 * containers that ended, so that a repeated DEL costs nothing.
 *
 * WAL, `busy_timeout` set before anything else, every read-then-write `IMMEDIATE`. The file holds
 * delegates' configs, so it is 0600 in a folder of 0700.
 */
import { Database } from "bun:sqlite";
import {
  chmodSync,
  closeSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  statSync,
  unlinkSync,
} from "node:fs";
import { join } from "node:path";
import { CniError, code, type Host, isObject, log, parseJson, toCniError } from "./cni.ts";
import type { NetworkConfigList } from "./netconf.ts";

/** Who the pod is, as far as the caller said. */
export interface PodIdentity {
  namespace: string;
  name: string;
  uid: string;
}

/** One network of one container on one interface: what is needed to add, check and delete it. */
export interface Attachment {
  containerId: string;
  /** CNI_IFNAME of the call it belongs to; a DEL names it by this. */
  requestIfName: string;
  /** Name of the genie config it came through; GC of another config leaves it alone. */
  requestNetwork: string;
  /** Interface name in the pod, fixed before the first delegate runs. */
  ifName: string;
  /** The one that carries CNI_IFNAME: first in the result, receives the runtime's capabilities. */
  primary: boolean;
  /** Name by which it was selected. */
  network: string;
  /** Why it is attached, for people. */
  reason: string;
  list: NetworkConfigList;
  /** Absolute path of the binary of each plugin of the list. */
  plugins: string[];
  /** CNI_ARGS for the delegates: the runtime's without our own keys. */
  cniArgs: string;
  /** CNI_PATH for the delegates. */
  cniPath: string;
  capabilityArgs: Record<string, unknown>;
  /** Keys for `args` of the request config. */
  args: Record<string, unknown>;
  /** Limit for each delegate call. */
  timeoutMs: number;
  netns: string;
  pod: PodIdentity;
}

/**
 * - `planned`: written down, delegates may be running or may have died;
 * - `attached`: ADD succeeded;
 * - `failing`: a DEL failed, the runtime will retry;
 * - `leaked`: given up after the retry window; `genie gc` retries.
 */
export type AttachmentState = "planned" | "attached" | "failing" | "leaked";

/** An attachment as it stands in the record. */
export interface StoredAttachment extends Attachment {
  state: AttachmentState;
  /** Wire form of its final result at the list's version, as stored: hostile until parsed. */
  result: unknown;
  /** When its first DEL failed, ms since the epoch; 0 when none did. */
  failedAtMs: number;
  error: string;
  createdAtMs: number;
  /** Identity of the network namespace it was made in, "" when unknown. */
  netnsId: string;
}

/** An open record. Close it. */
export interface State {
  database: Database;
  /** False when the file could only be read. */
  writable: boolean;
}

/** The current layout of the file, `PRAGMA user_version`. */
const schemaVersion = 1;
const schema = `
  CREATE TABLE attachments (
    container_id TEXT NOT NULL,
    request_ifname TEXT NOT NULL,
    ifname TEXT NOT NULL,
    position INTEGER NOT NULL,
    network TEXT NOT NULL,
    request_network TEXT NOT NULL,
    state TEXT NOT NULL,
    plan TEXT NOT NULL,
    result TEXT,
    netns_id TEXT NOT NULL,
    created_at_ms INTEGER NOT NULL,
    failed_at_ms INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (container_id, ifname)
  ) STRICT;
  CREATE TABLE operations (
    container_id TEXT PRIMARY KEY,
    command TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started TEXT NOT NULL,
    pid_namespace TEXT NOT NULL,
    token TEXT NOT NULL,
    at_ms INTEGER NOT NULL
  ) STRICT;
  CREATE TABLE ended (
    container_id TEXT NOT NULL,
    request_ifname TEXT NOT NULL,
    at_ms INTEGER NOT NULL,
    PRIMARY KEY (container_id, request_ifname)
  ) STRICT, WITHOUT ROWID;
  CREATE INDEX ended_at ON ended (at_ms);
`;

/** How long a writer waits for another one, in ms. */
const busyTimeoutMs = 10_000;
/** How long the id of an ended container is remembered, in ms: runtimes repeat DEL for minutes. */
const endedKeepMs = 24 * 3_600_000;

/**
 * Opens `<dir>/genie.db`, making folder and file when absent. A file that is no database any more
 * is set aside under another name and reported, and a new one begun (D4).
 *
 * @throws CniError 106 when it cannot be opened, or was written by a newer genie
 */
export function openState(host: Host, dir: string): State {
  const file = join(dir, "genie.db");
  try {
    return openOnce(dir, file);
  } catch (error) {
    if (!isUnusable(error)) throw unavailable(file, error);
    setAside(host, file);
    try {
      return openOnce(dir, file);
    } catch (again) {
      throw unavailable(file, again);
    }
  }
}

function openOnce(dir: string, file: string): State {
  makeFolder(dir);
  makeFile(file);
  const database = new Database(file, { readwrite: true, create: false, strict: true });
  try {
    database.run(`PRAGMA busy_timeout = ${busyTimeoutMs}`);
    const found = database.query("PRAGMA user_version").get() as { user_version: number };
    if (found.user_version > schemaVersion) {
      throw new CniError(
        code.stateUnavailable,
        `Cannot use ${file}: its schema version ${found.user_version} is newer than ` +
          `${schemaVersion}, install the genie that wrote it or a later one`,
      );
    }
    database.run("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL");
    if (found.user_version < schemaVersion) migrate(database);
    return { database, writable: true };
  } catch (error) {
    database.close();
    throw error;
  }
}

function makeFolder(dir: string): void {
  if (statSync(dir, { throwIfNoEntry: false })) return;
  mkdirSync(dir, { recursive: true, mode: 0o700 });
}

/** SQLite would make the file with the umask's mode; it must never be readable by others. */
function makeFile(file: string): void {
  const found = statSync(file, { throwIfNoEntry: false });
  if (found) {
    if ((found.mode & 0o077) !== 0) chmodSync(file, 0o600);
    return;
  }
  closeSync(openSync(file, "a", 0o600));
}

function migrate(database: Database): void {
  database
    .transaction(() => {
      // Another process may have done it while we waited for the lock.
      const now = database.query("PRAGMA user_version").get() as { user_version: number };
      if (now.user_version >= schemaVersion) return;
      database.run(schema);
      database.run(`PRAGMA user_version = ${schemaVersion}`);
    })
    .immediate();
}

function isUnusable(error: unknown): boolean {
  if (!(error instanceof Error)) return false;
  const reason = String((error as { code?: unknown }).code ?? "");
  return (
    /^SQLITE_(CORRUPT|NOTADB)/.test(reason) || /no such table|no such column/.test(error.message)
  );
}

/**
 * Renames the unusable file and its log. Two processes may find it unusable at once: the one that
 * gets the marker renames, the other finds the new file when it opens again.
 */
function setAside(host: Host, file: string): void {
  const marker = `${file}.setting-aside`;
  const age = host.now() - (statSync(marker, { throwIfNoEntry: false })?.mtimeMs ?? host.now());
  if (age > 10_000) unlinkSync(marker);
  try {
    closeSync(openSync(marker, "wx", 0o600));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
    Bun.sleepSync(50);
    return;
  }
  try {
    const aside = `${file}.unusable-${host.now()}`;
    for (const suffix of ["-wal", "-shm", ""]) {
      if (statSync(file + suffix, { throwIfNoEntry: false })) {
        renameSync(file + suffix, aside + suffix);
      }
    }
    log(host, "error", `Set aside unusable database ${file}: DEL falls back to best effort`, {
      kept: aside,
    });
  } finally {
    unlinkSync(marker);
  }
}

function unavailable(file: string, error: unknown): CniError {
  if (error instanceof CniError) return error;
  return new CniError(code.stateUnavailable, `Cannot open ${file}: ${toCniError(error).message}`, {
    cause: error,
  });
}

/** Closes the file. */
export function closeState(state: State): void {
  state.database.close();
}

/**
 * Runs `inside` in one IMMEDIATE transaction.
 * @throws CniError 106 when the file cannot be written; a CniError of `inside` as it is
 */
export function write<T>(state: State, inside: () => T): T {
  try {
    return state.database.transaction(inside).immediate();
  } catch (error) {
    if (error instanceof CniError) throw error;
    throw new CniError(
      code.stateUnavailable,
      `Cannot write ${state.database.filename}: ${toCniError(error).message}`,
      { cause: error },
    );
  }
}

/** Inserts the plan, one row per attachment, as `planned`. Call inside {@link acquire}. */
export function insertPlanned(state: State, attachments: Attachment[], nowMs: number): void {
  const insert = state.database.query(
    `INSERT INTO attachments (container_id, request_ifname, ifname, position, network,
       request_network, state, plan, netns_id, created_at_ms)
     VALUES (?, ?, ?, ?, ?, ?, 'planned', ?, ?, ?)`,
  );
  attachments.forEach((attachment, position) => {
    insert.run(
      attachment.containerId,
      attachment.requestIfName,
      attachment.ifName,
      position,
      attachment.network,
      attachment.requestNetwork,
      JSON.stringify(attachment),
      netnsId(attachment.netns),
      nowMs,
    );
  });
  const first = attachments[0];
  if (!first) return;
  state.database
    .query("DELETE FROM ended WHERE container_id = ? AND request_ifname = ?")
    .run(first.containerId, first.requestIfName);
}

/** Marks one attachment as attached, with the wire form of its final result. */
export function setAttached(state: State, attachment: Attachment, result: object): void {
  state.database
    .query(
      "UPDATE attachments SET state = 'attached', result = ? WHERE container_id = ? AND ifname = ?",
    )
    .run(JSON.stringify(result), attachment.containerId, attachment.ifName);
}

/** Keeps an attachment whose DEL failed, since the first failure, with the reason. */
export function setFailing(
  state: State,
  attachment: Attachment,
  failure: { state: "failing" | "leaked"; error: string; nowMs: number },
): void {
  state.database
    .query(
      `UPDATE attachments SET state = ?, error = ?,
         failed_at_ms = CASE failed_at_ms WHEN 0 THEN ? ELSE failed_at_ms END
       WHERE container_id = ? AND ifname = ?`,
    )
    .run(failure.state, failure.error, failure.nowMs, attachment.containerId, attachment.ifName);
}

/** Forgets an attachment whose delegates have all succeeded in DEL. */
export function forget(state: State, attachment: Attachment): void {
  state.database
    .query("DELETE FROM attachments WHERE container_id = ? AND ifname = ?")
    .run(attachment.containerId, attachment.ifName);
}

/** Remembers that nothing is left of a call, so that its repeated DEL need not guess. */
export function setEnded(
  state: State,
  call: { containerId: string; requestIfName: string },
  nowMs: number,
): void {
  const { database } = state;
  database
    .query("INSERT OR REPLACE INTO ended VALUES (?, ?, ?)")
    .run(call.containerId, call.requestIfName, nowMs);
  // A few at a time keeps the table bounded and every DEL short.
  database
    .query(
      `DELETE FROM ended WHERE (container_id, request_ifname) IN
         (SELECT container_id, request_ifname FROM ended WHERE at_ms < ? ORDER BY at_ms LIMIT 16)`,
    )
    .run(nowMs - endedKeepMs);
}

/** Did this call end with nothing left? */
export function hasEnded(
  state: State,
  call: { containerId: string; requestIfName: string },
): boolean {
  return (
    state.database
      .query("SELECT 1 FROM ended WHERE container_id = ? AND request_ifname = ?")
      .get(call.containerId, call.requestIfName) !== null
  );
}

interface AttachmentRow {
  container_id: string;
  request_ifname: string;
  ifname: string;
  state: string;
  plan: string;
  result: string | null;
  netns_id: string;
  created_at_ms: number;
  failed_at_ms: number;
  error: string;
}

/**
 * Reads attachments in the order they were made: of one container, or all.
 * A row that cannot be read is reported and left out: the others must still be usable.
 */
export function attachments(host: Host, state: State, containerId?: string): StoredAttachment[] {
  const { database } = state;
  const rows = (
    containerId === undefined
      ? database.query("SELECT * FROM attachments ORDER BY created_at_ms, container_id, position")
      : database.query(
          "SELECT * FROM attachments WHERE container_id = ?1 ORDER BY created_at_ms, position",
        )
  ).all(...(containerId === undefined ? [] : [containerId])) as AttachmentRow[];
  return rows.flatMap((row) => {
    try {
      return [fromAttachmentRow(row)];
    } catch (error) {
      log(host, "error", "Cannot read a stored attachment", {
        container: row.container_id,
        interface: row.ifname,
        error: toCniError(error).message,
      });
      return [];
    }
  });
}

function fromAttachmentRow(row: AttachmentRow): StoredAttachment {
  const plan = parseJson(row.plan, "stored plan");
  if (!isObject(plan) || !isObject(plan["list"]) || !Array.isArray(plan["plugins"])) {
    throw new CniError(code.stateUnavailable, "Cannot read stored plan: it lacks its list");
  }
  return {
    ...(plan as unknown as Attachment),
    // The columns are the key; the text must not contradict them.
    containerId: row.container_id,
    requestIfName: row.request_ifname,
    ifName: row.ifname,
    state: row.state as AttachmentState,
    result: readStoredResult(row.result),
    failedAtMs: row.failed_at_ms,
    error: row.error,
    createdAtMs: row.created_at_ms,
    netnsId: row.netns_id,
  };
}

/** A damaged result is no result: DEL then runs without prevResult (libcni does so too). */
function readStoredResult(text: string | null): unknown {
  if (text === null) return undefined;
  try {
    return parseJson(text, "stored result");
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/**
 * Identity of a network namespace: boot, device and inode of its file. A path that was made anew
 * after a reboot or a restart differs.
 */
export function netnsId(netns: string): string {
  const found = netns === "" ? undefined : statSync(netns, { throwIfNoEntry: false });
  if (!found) return "";
  const boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
  return `${boot}:${found.dev}:${found.ino}`;
}
