/**
 * The audit ledger: one row per call of genie, per network of it, and per request to a plugin. Rows
 * are written in the transaction of the result they belong to; a ledger that cannot be written never
 * fails an operation. Pruned in small steps, bounded by age and by count.
 */
import type { State } from "./database.ts";

/**
 * What a row tells of:
 * - `call`: one call of genie by the runtime;
 * - `network`: one network of it, through its whole chain;
 * - `plugin`: one request to one plugin.
 */
export type LedgerKind = "call" | "network" | "plugin";

/** How it ended. `denied` is a failure by a rule. */
export type LedgerOutcome = "ok" | "failed" | "denied";

/** One row of the ledger. Texts are "" and numbers 0 where there is nothing to say. */
export interface LedgerRow {
  /** When it began, ms since the epoch. */
  atMs: number;
  kind: LedgerKind;
  /** ADD, DEL, CHECK, GC or STATUS. */
  command: string;
  containerId: string;
  podNamespace: string;
  podName: string;
  podUid: string;
  network: string;
  /** Plugin type; of a network all of its chain, separated by commas. */
  plugin: string;
  ifName: string;
  durationUs: number;
  outcome: LedgerOutcome;
  /** CNI error code, 0 for a success. */
  code: number;
  error: string;
  /** Addresses of the result, separated by commas. */
  addresses: string;
  /** First 16 hex digits of the SHA-256 of the config list. */
  configHash: string;
  /** Why: annotation, default, choice, definition ... */
  decidedBy: string;
  /** The rule that denied, with file and line. */
  rule: string;
  /** The numbers of an automatic choice, JSON. */
  choice: string;
}

export { ledgerSchema } from "./schema.ts";

const columns = [
  "at_ms",
  "kind",
  "command",
  "container_id",
  "pod_namespace",
  "pod_name",
  "pod_uid",
  "network",
  "plugin",
  "ifname",
  "duration_us",
  "outcome",
  "code",
  "error",
  "addresses",
  "config_hash",
  "decided_by",
  "rule",
  "choice",
] as const;

/** Longest error kept, in characters. */
const errorLengthMax = 1024;

/** Appends rows. Call inside a transaction. */
export function insertLedger({ database }: State, rows: readonly LedgerRow[]): void {
  const insert = database.query(
    `INSERT INTO ledger (${columns.join(", ")}) VALUES (${columns.map(() => "?").join(", ")})`,
  );
  for (const row of rows) {
    insert.run(
      row.atMs,
      row.kind,
      row.command,
      row.containerId,
      row.podNamespace,
      row.podName,
      row.podUid,
      row.network,
      row.plugin,
      row.ifName,
      row.durationUs,
      row.outcome,
      row.code,
      row.error.slice(0, errorLengthMax),
      row.addresses,
      row.configHash,
      row.decidedBy,
      row.rule,
      row.choice,
    );
  }
}

/** Rows the ledger holds at most; what is older goes, whatever its age. */
const rowsMax = 2_000_000;
/** Rows removed in one step: a step takes well under a millisecond. */
const pruneStep = 64;

/**
 * Removes the oldest rows that are past their time or their number, at most 64 in one step: more
 * than an operation adds, so that the ledger shrinks without anybody waiting for it.
 *
 * @returns how many were removed
 */
export function pruneLedger({ database }: State, nowMs: number, keepMs: number): number {
  const bounds = database.query("SELECT min(id) AS low, max(id) AS high FROM ledger").get() as {
    low: number | null;
    high: number | null;
  };
  if (bounds.low === null || bounds.high === null) return 0;
  return database
    .query(
      `DELETE FROM ledger WHERE id >= ?1 AND id < ?1 + ${pruneStep} AND (at_ms < ?2 OR id <= ?3)`,
    )
    .run(bounds.low, nowMs - keepMs, bounds.high - rowsMax).changes;
}
