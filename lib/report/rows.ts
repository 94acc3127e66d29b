/**
 * What reports read of the ledger, in SQL.
 *
 * A *request* is a row of kind `network`, or the row of a call that failed without any network of
 * it failing: denied, unknown, malformed. Such a call counts for no network: what its row names is
 * genie's own config. The numbers of a choice stand in a row of either kind.
 */
import type { LedgerRow } from "../ledger.ts";
import type { RecordReader } from "./file.ts";
import type { TallyRow } from "./tally.ts";

/** Which rows are meant; what is absent does not limit. */
export interface LedgerFilter {
  /** Earliest, ms since the epoch. */
  sinceMs?: number;
  network?: string;
  namespace?: string;
  pod?: string;
  command?: string;
  /** Failures of every kind, or those by a rule. */
  only?: "failed" | "denied";
}

/** A row with its number: a higher one was written later. */
export interface NumberedRow extends LedgerRow {
  id: number;
}

type Bindings = (string | number)[];

/** A call is written behind its networks, in one transaction: at most so far behind. */
const callSpan = 512;

function conditions(filter: LedgerFilter): { where: string; parameters: Bindings } {
  const parts: [string, string | number | undefined][] = [
    ["at_ms >= ?", filter.sinceMs],
    ["network = ?", filter.network],
    ["pod_namespace = ?", filter.namespace],
    ["pod_name = ?", filter.pod],
    ["command = ?", filter.command],
    ["outcome = ?", filter.only === "denied" ? "denied" : undefined],
    ["outcome <> ?", filter.only === "failed" ? "ok" : undefined],
  ];
  const given = parts.filter(([, value]) => value !== undefined);
  return {
    where: ["TRUE", ...given.map(([part]) => part)].join(" AND "),
    parameters: given.map(([, value]) => value ?? ""),
  };
}

/** Times of the first and the last row, ms since the epoch; undefined for an empty ledger. */
export function ledgerSpan({
  database,
  tables,
}: RecordReader): { firstMs: number; lastMs: number } | undefined {
  if (!tables.has("ledger")) return undefined;
  // One query each: only then does SQLite take the ends of the index.
  const end = (which: "min" | "max") =>
    database.query(`SELECT ${which}(at_ms) FROM ledger`).values()[0]?.[0];
  const [first, last] = [end("min"), end("max")];
  return typeof first === "number" && typeof last === "number"
    ? { firstMs: first, lastMs: last }
    : undefined;
}

/** A row as counting wants it, of either kind. */
interface Candidate extends TallyRow {
  /** The call it belongs to; null of a success. */
  call: string | null;
}

/**
 * Every request that is meant, one after the other, there may be a million; and with `isRequest` 0
 * the calls that are none but carry the numbers of a choice.
 */
export function* requests(
  { database, tables }: RecordReader,
  filter: LedgerFilter,
): Generator<TallyRow, void> {
  if (!tables.has("ledger")) return;
  const { where, parameters } = conditions(filter);
  const rows = database
    .query(
      `SELECT id, at_ms AS atMs, CASE kind WHEN 'call' THEN '' ELSE network END AS network,
         command = 'ADD' AS isAdd, duration_us AS durationUs, outcome, code,
         decided_by AS decidedBy, choice <> '' AS isChoice, kind = 'network' AS isRequest,
         CASE outcome WHEN 'ok' THEN NULL ELSE container_id || ' ' || command END AS call
       FROM ledger
       WHERE (kind = 'network' OR (kind = 'call' AND (outcome <> 'ok' OR choice <> '')))
         AND ${where} ORDER BY id`,
    )
    .iterate(...parameters) as IterableIterator<Candidate>;
  /** The calls of which a network failed, with its row: the one that failed last stands last. */
  const failed = new Map<string, number>();
  for (const row of rows) {
    const { id, call } = row;
    if (call === null) yield row;
    else if (row.isRequest === 1) {
      failed.delete(call);
      failed.set(call, id);
      forgetBefore(failed, id - callSpan);
      yield row;
    } else {
      const networkId = failed.get(call);
      const isTold = networkId !== undefined && networkId >= id - callSpan;
      // The next failure of this container is another one.
      if (isTold) failed.delete(call);
      row.isRequest = isTold ? 0 : 1;
      yield row;
    }
  }
}

function forgetBefore(failed: Map<string, number>, id: number): void {
  for (const [call, found] of failed) {
    if (found >= id) return;
    failed.delete(call);
  }
}

const allColumns = `id, at_ms AS atMs, kind, command, container_id AS containerId,
  pod_namespace AS podNamespace, pod_name AS podName, pod_uid AS podUid, network, plugin,
  ifname AS ifName, duration_us AS durationUs, outcome, code, error, addresses,
  config_hash AS configHash, decided_by AS decidedBy, rule, choice`;

/** The rows with these numbers, newest first. */
export function rowsById({ database }: RecordReader, ids: readonly number[]): NumberedRow[] {
  if (ids.length === 0) return [];
  return database
    .query(
      `SELECT ${allColumns} FROM ledger WHERE id IN (SELECT value FROM json_each(?))
       ORDER BY id DESC`,
    )
    .all(JSON.stringify(ids)) as NumberedRow[];
}

/** Every row of every kind that is meant, newest first. */
export function* ledgerRows(
  { database, tables }: RecordReader,
  filter: LedgerFilter,
  limit: number,
): Generator<NumberedRow, void> {
  if (!tables.has("ledger")) return;
  const { where, parameters } = conditions(filter);
  yield* database
    .query(`SELECT ${allColumns} FROM ledger WHERE ${where} ORDER BY id DESC LIMIT ?`)
    .iterate(...parameters, limit) as IterableIterator<NumberedRow>;
}
