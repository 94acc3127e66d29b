/**
 * The record, for reading only: opens it, and reads from it what reports show. Nothing in it is
 * made, migrated, repaired or set aside.
 *
 * SQLite reads a file in WAL mode through `genie.db-shm`, which it makes beside it when absent; the
 * next ADD or DEL removes that again. Where it cannot be made (read-only or full disk) nobody can
 * write either, so the file is read as it is, or from a copy when its log is not empty.
 */
import { constants, Database } from "bun:sqlite";
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { rangesOf } from "../choice/ipam.ts";
import { networkKpis } from "../choice/kpi.ts";
import { CniError, code, toCniError } from "../cni.ts";
import { closeState, sqliteCode } from "../database.ts";
import { isObject, parseJson } from "../json.ts";
import type { Network, NetworkConfigList } from "../networks.ts";
import type { LedgerRow, Result } from "../record.ts";
import { openCopy, readVersion } from "../recovery/database.ts";
import { orUndefined } from "../recovery/tried.ts";
import { parseResult } from "../result.ts";
import type { AttachmentReport, PolicyReport, RulesetReport } from "./document.ts";
import { isoTime } from "./quantity.ts";
import recordSql from "./record.sql" with { type: "text" };
import type { TallyRow } from "./tally.ts";

/** The queries of record.sql, by their names. */
const queries = new Map(
  recordSql.split("\n\n").map((part): [string, string] => {
    const [name = "", ...query] = part.split("\n");
    return [name.replace("-- ", ""), query.join("\n")];
  }),
);

/** A query of record.sql by its name, with the part that depends on what is asked in its place. */
export function sql(name: string, part = ""): string {
  return queries.get(name)?.replace("{{part}}", () => part) ?? "";
}

/** How long a reader waits for a writer that recovers the log, in ms. */
const busyTimeoutMs = 5000;

/** The open record. Which tables it has depends on the genie that wrote it last. */
export interface RecordReader {
  database: Database;
  tables: ReadonlySet<string>;
}

/** Path of the record in a state folder. */
export function recordFile(dir: string): string {
  return join(dir, "genie.db");
}

/**
 * Reads the record in one transaction, so that everything read is of the same moment.
 * @returns what `inside` returns, or undefined when there is no record, or an empty one
 * @throws CniError 106 when it is damaged, foreign or newer; 11 when it stays locked; 5 when it may
 *   not be read
 */
export function readRecord<T>(dir: string, inside: (record: RecordReader) => T): T | undefined {
  const file = recordFile(dir);
  try {
    if (!statSync(file, { throwIfNoEntry: false })?.size) return undefined;
    try {
      return readAndClose(new Database(file, { readonly: true, strict: true }), inside);
    } catch (error) {
      if (!/^SQLITE_(CANTOPEN|READONLY|FULL|IOERR_SHM)/.test(sqliteCode(error))) throw error;
    }
    // SQLite cannot make its `-shm` file beside this one.
    if (statSync(`${file}-wal`, { throwIfNoEntry: false })?.size) {
      const copy = openCopy(dir);
      return readAndClose(copy.database, inside, () => closeState(copy));
    }
    const path = file.split("/").map(encodeURIComponent).join("/");
    const flags = constants.SQLITE_OPEN_READONLY | constants.SQLITE_OPEN_URI;
    return readAndClose(new Database(`file:${path}?immutable=1`, flags), inside);
  } catch (error) {
    throw cannotRead(file, error);
  }
}

/** As {@link readRecord}; where there is no record, `inside` gets one without any table. */
export function readOrEmpty<T>(dir: string, inside: (record: RecordReader) => T): T {
  const found = readRecord(dir, (record) => ({ value: inside(record) }));
  if (found) return found.value;
  return inside({ database: new Database(":memory:"), tables: new Set() });
}

function readAndClose<T>(
  database: Database,
  inside: (record: RecordReader) => T,
  close = () => database.close(),
): T | undefined {
  try {
    database.run(`PRAGMA busy_timeout = ${busyTimeoutMs}`);
    return database.transaction(() => {
      const names = database.query("SELECT name FROM sqlite_schema WHERE type = 'table'").values();
      if (names.length === 0) return undefined;
      readVersion(database);
      return inside({ database, tables: new Set(names.map(([name]) => String(name))) });
    })();
  } finally {
    close();
  }
}

function cannotRead(file: string, error: unknown): CniError {
  const found = sqliteCode(error);
  const reason = toCniError(error)
    .message.replace(/^Internal error: /, "")
    // openCopy() names the file itself.
    .replace(`Cannot use ${file}: `, "");
  const hint = /^SQLITE_(CORRUPT|NOTADB)/.test(found)
    ? ": it is damaged and left as it is, the next ADD sets it aside and begins a new one"
    : "";
  let number: number = code.stateUnavailable;
  if (/^SQLITE_BUSY/.test(found)) number = code.tryAgainLater;
  else if (/^E[A-Z]+$/.test(found)) number = code.ioFailure;
  return new CniError(number, `Cannot read ${file}: ${reason}${hint}`, { cause: error });
}

/** An unusable record that was set aside, see design D4. */
export interface SetAside {
  file: string;
  /** When, ms since the epoch; 0 when its name does not say. */
  atMs: number;
}

/** The records of a state folder that were set aside, newest first. */
export function setAsideRecords(dir: string): SetAside[] {
  let names: string[];
  try {
    names = readdirSync(dir);
  } catch (error) {
    if (["ENOENT", "ENOTDIR"].includes(sqliteCode(error))) return [];
    throw cannotRead(dir, error);
  }
  return names
    .filter((name) => name.startsWith("genie.db.unusable-") && !/-(wal|shm)$/.test(name))
    .map((name) => ({ file: join(dir, name), atMs: Number(/-(\d{1,15})$/.exec(name)?.[1] ?? 0) }))
    .sort((a, b) => b.atMs - a.atMs);
}

/** Limits the rows of the ledger; what is absent does not limit. */
export interface LedgerFilter {
  /** The earliest time, ms since the epoch. */
  sinceMs?: number | undefined;
  network?: string | undefined;
  namespace?: string | undefined;
  pod?: string | undefined;
  command?: string | undefined;
  /** Failures of every kind, or only those by a rule. */
  only?: "failed" | "denied" | undefined;
}

/** A row of the ledger with its number: a higher one was written later. */
export interface NumberedRow extends LedgerRow {
  id: number;
}

function conditions(filter: LedgerFilter): { where: string; parameters: (string | number)[] } {
  const all: [condition: string, value: string | number | undefined][] = [
    ["at_ms >= ?", filter.sinceMs],
    ["network = ?", filter.network],
    ["pod_namespace = ?", filter.namespace],
    ["pod_name = ?", filter.pod],
    ["command = ?", filter.command],
    ["outcome = ?", filter.only === "denied" ? "denied" : undefined],
    ["outcome <> ?", filter.only === "failed" ? "ok" : undefined],
  ];
  const given = all.filter(([, value]) => value !== undefined);
  return {
    where: ["TRUE", ...given.map(([condition]) => condition)].join(" AND "),
    parameters: given.map(([, value]) => value ?? ""),
  };
}

/** Times of the first and the last row, ms since the epoch; undefined for an empty ledger. */
export function ledgerSpan({ database, tables }: RecordReader) {
  if (!tables.has("ledger")) return undefined;
  const span = database.query(sql("span")).get() as { firstMs: number | null; lastMs: number };
  return span.firstMs === null ? undefined : { ...span, firstMs: span.firstMs };
}

/** A call is written after its networks, in the same transaction: at most so many rows later. */
const callSpan = 512;

/**
 * Iterates over the requests that a filter selects, as there may be a million. A request is a row
 * of kind `network`, or the row of a call that failed without any of its networks failing: it was
 * denied, unknown or malformed. Such a call counts for no network, as its row names genie's own
 * config. Calls that are no request but carry the numbers of a choice come with `isRequest` 0.
 */
export function* requests({ database, tables }: RecordReader, filter: LedgerFilter) {
  if (!tables.has("ledger")) return;
  const { where, parameters } = conditions(filter);
  const rows = database.query(sql("requests", where)).iterate(...parameters) as IterableIterator<
    TallyRow & { call: string | null }
  >;
  /** The last failed network row of each call, in the order of these rows. */
  const failed = new Map<string, number>();
  for (const row of rows) {
    const { id, call } = row;
    if (call !== null && row.isRequest === 1) {
      failed.delete(call);
      failed.set(call, id);
      for (const [older, found] of failed) {
        if (found >= id - callSpan) break;
        failed.delete(older);
      }
    } else if (call !== null) {
      const alreadyCounted = (failed.get(call) ?? Number.NEGATIVE_INFINITY) >= id - callSpan;
      // The next failure of this container is a new one.
      if (alreadyCounted) failed.delete(call);
      row.isRequest = alreadyCounted ? 0 : 1;
    }
    yield row;
  }
}

/** The pods with such requests, and those of which one failed, whatever number of tries it had. */
export function countPods({ database, tables }: RecordReader, filter: LedgerFilter) {
  if (!tables.has("ledger")) return { pods: 0, failedPods: 0 };
  const { where, parameters } = conditions(filter);
  const row = database.query(sql("pods", where)).get(...parameters);
  return row as { pods: number; failedPods: number };
}

/**
 * The failures that a filter selects, those that are the same but for their time as one, by the
 * number of the newest row of each; the newest first.
 */
export function failureGroups(
  { database, tables }: RecordReader,
  filter: LedgerFilter,
  max: number,
): Map<number, { requests: number; firstMs: number }> {
  if (!tables.has("ledger")) return new Map();
  const { where, parameters } = conditions(filter);
  const rows = database.query(`${sql("failures", where)} LIMIT ?`).all(...parameters, max);
  const groups = rows as { id: number; requests: number; firstMs: number }[];
  return new Map(groups.map(({ id, ...group }) => [id, group]));
}

/** The rows with these numbers, newest first. */
export function rowsById({ database }: RecordReader, ids: readonly number[]): NumberedRow[] {
  if (ids.length === 0) return [];
  const query = sql("rows", "id IN (SELECT value FROM json_each(?))");
  return database.query(query).all(JSON.stringify(ids)) as NumberedRow[];
}

/** Iterates over the rows of every kind that a filter selects, newest first. */
export function* ledgerRows(
  { database, tables }: RecordReader,
  filter: LedgerFilter,
  limit: number,
): Generator<NumberedRow, void> {
  if (!tables.has("ledger")) return;
  const { where, parameters } = conditions(filter);
  yield* database
    .query(`${sql("rows", where)} LIMIT ?`)
    .iterate(...parameters, limit) as IterableIterator<NumberedRow>;
}

interface AttachmentRow
  extends Pick<AttachmentReport, "containerId" | "network" | "interface" | "state" | "error"> {
  plan: string;
  result: string | null;
  createdAtMs: number;
  failedAtMs: number;
  policyAtMs: number | null;
}

/** When the rules of its network namespace were written. */
const policyAt = "(SELECT at_ms FROM rulesets r WHERE r.netns_id = attachments.netns_id)";

/** Iterates over attachments in the order they were made. Hostile texts become "". */
export function* liveAttachments(
  { database, tables }: RecordReader,
  { network, namespace, pod }: Pick<LedgerFilter, "network" | "namespace" | "pod">,
): Generator<AttachmentReport, void> {
  if (!tables.has("attachments")) return;
  const rows = database
    .query(sql("attachments", tables.has("rulesets") ? policyAt : "NULL"))
    .iterate(network ?? null) as IterableIterator<AttachmentRow>;
  for (const row of rows) {
    const one = attachmentOf(row);
    if (namespace !== undefined && one.namespace !== namespace) continue;
    if (pod !== undefined && one.pod !== pod) continue;
    yield one;
  }
}

function attachmentOf(row: AttachmentRow): AttachmentReport {
  const plan = objectOf(orUndefined(() => parseJson(row.plan, "stored plan")));
  const pod = objectOf(plan["pod"]);
  const { plugins } = objectOf(plan["list"]);
  const result = resultOf(row.result);
  const isOwn = (one: Result["interfaces"][number]) =>
    one.name === row.interface && one.sandbox !== undefined;
  return {
    containerId: row.containerId,
    namespace: textOf(pod["namespace"]),
    pod: textOf(pod["name"]),
    podUid: textOf(pod["uid"]),
    network: row.network,
    plugins: (Array.isArray(plugins) ? plugins : []).map((one) => textOf(objectOf(one)["type"])),
    addresses: (result?.ips ?? []).map(({ address }) => address),
    mac: result?.interfaces.find(isOwn)?.mac ?? "",
    state: row.state,
    reason: textOf(plan["reason"]),
    error: row.error,
    interface: row.interface,
    createdAt: isoTime(row.createdAtMs),
    failingSince: isoTime(row.failedAtMs),
    policySince: isoTime(row.policyAtMs ?? 0),
  };
}

function resultOf(stored: string | null): Result | undefined {
  if (stored === null) return undefined;
  return orUndefined(() => parseResult(parseJson(stored, "stored result"), "1.0.0"));
}

const textOf = (value: unknown): string => (typeof value === "string" ? value : "");
const objectOf = (value: unknown): Record<string, unknown> => (isObject(value) ? value : {});

/** Bytes per second of each network's attachments, both directions; only where it was measured. */
export function traffic({ database, tables }: RecordReader): Map<string, number> {
  if (!tables.has("traffic")) return new Map();
  const sums = database.query(sql("traffic")).values();
  return new Map(sums.map(([network, sum]) => [String(network), Number(sum)]));
}

/** Most problems and rulesets listed; all rulesets are counted. */
const listedMax = 1000;

/** Reads what is on record of policy; undefined where nothing is. */
export function readPolicy(record: RecordReader): PolicyReport | undefined {
  const { database, tables } = record;
  if (!tables.has("policy_watches") || !tables.has("rulesets")) return undefined;
  type Row = { knownMs: number | null; enforced: number };
  const { knownMs, enforced } = database.query(sql("policy")).get() as Row;
  if (knownMs === null && enforced === 0) return undefined;
  type Problem = Omit<PolicyReport["problems"][number], "at"> & { atMs: number };
  const problems = database.query(sql("problems")).all(listedMax) as Problem[];
  return {
    knownAt: isoTime(knownMs ?? 0),
    enforced,
    rulesets: readRulesets(record).map(({ at, namespace, pod }) => ({ at, namespace, pod })),
    problems: problems.map(({ atMs, ...rest }) => ({ at: isoTime(atMs), ...rest })),
  };
}

/** The rulesets with their text, the newest first: all, or those of the pods of one name. */
export function readRulesets(
  { database, tables }: RecordReader,
  pod?: { namespace: string; name: string },
): RulesetReport[] {
  if (!tables.has("rulesets")) return [];
  const rows = database
    .query(sql("rulesets"))
    .all(pod?.namespace ?? null, pod?.name ?? null, listedMax) as Record<string, unknown>[];
  return rows.map((row) => ({
    at: isoTime(Number(row["at_ms"])),
    namespace: textOf(row["pod_namespace"]),
    pod: textOf(row["pod_name"]),
    ruleset: textOf(row["ruleset"]),
    hostRuleset: textOf(row["host_ruleset"]),
  }));
}

/** As {@link countWith}; without the record where that cannot be read. */
export function countAddresses(stateDir: string, networks: readonly Network[], nowMs: number) {
  try {
    const counts = readRecord(stateDir, (record) => countWith(record, networks, nowMs));
    if (counts) return counts;
  } catch (error) {
    if (!(error instanceof Error)) throw error;
  }
  return countWith(undefined, networks, nowMs);
}

/**
 * Counts the addresses of networks, each family whose size and use are known.
 * @param record undefined where there is none
 */
export function countWith(
  record: Parameters<typeof networkKpis>[0],
  networks: readonly Network[],
  nowMs: number,
) {
  return networks.flatMap((network) => {
    const { ipv4, ipv6 } = networkKpis(record, network, nowMs);
    const families = [
      { family: "IPv4" as const, ...ipv4 },
      { family: "IPv6" as const, ...ipv6 },
    ];
    return families.flatMap(({ family, used: { value: used }, total: { value: total } }) => {
      if (used === undefined || total === undefined) return [];
      return [{ network: network.name, family, used, total, left: Math.max(0, total - used) }];
    });
  });
}

/** The subnets that the IPAM of a network gives addresses from, each once. */
export function subnetsOf(list: NetworkConfigList): string[] {
  return [...new Set(rangesOf(list).map(({ subnet }) => subnet))];
}
