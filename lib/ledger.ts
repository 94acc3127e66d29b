/**
 * The audit ledger: one row per call of genie, per network of it, and per request to a plugin. Rows
 * are written in the transaction of the result they belong to; a ledger that cannot be written
 * never fails an operation. Pruned in small steps, bounded by age and by count.
 */
import { CniError, code, type Host, log, type Request, toCniError } from "./cni.ts";
import type { State } from "./database.ts";
import type { NetworkConfigList } from "./netconf.ts";
import { podIdentity } from "./pod.ts";

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

/** Tells configs apart without showing them: first 16 hex digits of the SHA-256 of the list. */
export function configHash(list: object): string {
  return new Bun.CryptoHasher("sha256").update(JSON.stringify(list)).digest("hex").slice(0, 16);
}

/** The rows of one call of genie, collected while it runs. */
export interface Journal {
  /** What every row of the call has in common. */
  base: LedgerRow;
  rows: LedgerRow[];
  /** On the monotonic clock, in ns. */
  startedNs: number;
}

/** Begins the journal of a call. */
export function openJournal(host: Host, request: Request): Journal {
  const pod = podIdentity(request.args);
  return {
    base: {
      atMs: host.now(),
      kind: "call",
      command: request.command,
      containerId: request.containerId,
      podNamespace: pod.namespace,
      podName: pod.name,
      podUid: pod.uid,
      network: request.config.name,
      plugin: "",
      ifName: request.ifName,
      durationUs: 0,
      outcome: "ok",
      code: 0,
      error: "",
      addresses: "",
      configHash: "",
      decidedBy: "",
      rule: "",
      choice: "",
    },
    rows: [],
    startedNs: Bun.nanoseconds(),
  };
}

/** What a failure says in a row; nothing for a success. */
function failureOf(error: unknown): Pick<LedgerRow, "outcome" | "code" | "error" | "rule"> {
  if (error === undefined) return { outcome: "ok", code: 0, error: "", rule: "" };
  const { code: number, message, details } = toCniError(error);
  const isDenied = number === code.accessDenied;
  return {
    outcome: isDenied ? "denied" : "failed",
    code: number,
    error: message,
    rule: isDenied ? details : "",
  };
}

/** What a row tells of one attachment. */
export interface Noted {
  command: string;
  containerId: string;
  network: string;
  ifName: string;
  reason: string;
  pod: { namespace: string; name: string; uid: string };
  list: NetworkConfigList;
  durationUs: number;
  error?: unknown;
}

function rowOf(journal: Journal, kind: LedgerKind, plugin: string, noted: Noted): LedgerRow {
  const { pod } = noted;
  return {
    ...journal.base,
    atMs: journal.base.atMs,
    kind,
    plugin,
    command: noted.command,
    containerId: noted.containerId || journal.base.containerId,
    podNamespace: pod.namespace || journal.base.podNamespace,
    podName: pod.name || journal.base.podName,
    podUid: pod.uid || journal.base.podUid,
    network: noted.network,
    ifName: noted.ifName,
    durationUs: Math.round(noted.durationUs),
    configHash: configHash(noted.list),
    decidedBy: noted.reason,
    ...failureOf(noted.error),
  };
}

/** Notes one request to one plugin. */
export function notePlugin(journal: Journal | undefined, plugin: string, noted: Noted): void {
  journal?.rows.push(rowOf(journal, "plugin", plugin, noted));
}

/** Notes one network of the call, through its whole chain. */
export function noteNetwork(
  journal: Journal | undefined,
  noted: Noted,
  addresses: readonly string[] = [],
): void {
  if (!journal) return;
  const plugins = noted.list.plugins.map(({ type }) => type).join(",");
  const row = rowOf(journal, "network", plugins, noted);
  journal.rows.push({ ...row, addresses: addresses.join(",") });
}

/**
 * Writes the journal, with the row of the call itself last. Call inside the transaction of the
 * result; a ledger that cannot be written is reported and fails nothing.
 *
 * @param error why the call failed
 * @param choice numbers of an automatic choice, JSON
 */
export function writeJournal(
  host: Host,
  state: State,
  journal: Journal,
  { error, choice = "" }: { error?: unknown; choice?: string } = {},
): void {
  const durationUs = Math.round((Bun.nanoseconds() - journal.startedNs) / 1000);
  const call = { ...journal.base, durationUs, choice, ...failureOf(error) };
  try {
    // Inside a transaction this is a savepoint: a failure takes back these rows alone.
    state.database.transaction(() => insertLedger(state, [...journal.rows, call]))();
  } catch (failure) {
    if (failure instanceof CniError) throw failure;
    log(host, "warn", `Cannot write the ledger: ${toCniError(failure).message}`);
  }
}
