/**
 * The audit ledger: one row per call of genie, per network of it, and per request to a plugin. Rows
 * are written in the transaction of the result they belong to; a ledger that cannot be written
 * never fails an operation. Pruned in small steps, bounded by age and by count. It holds no config,
 * and of texts from others only so much.
 */
import { CniError, code, type Host, log, type Request, toCniError } from "./cni.ts";
import { type State, savepoint, write } from "./database.ts";
import type { NetworkConfigList } from "./netconf.ts";
import { podIdentity } from "./pod.ts";
import type { PodIdentity } from "./state.ts";

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
  /** When the call of genie began, ms since the epoch. */
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

/** Longest text kept of a column, in characters; the numbers of a choice are made to fit. */
const textLengthMax = 1024;
const choiceLengthMax = 8192;

const cut = (text: string): string => text.slice(0, textLengthMax);

const insertSql = `INSERT INTO ledger (${columns.join(", ")})
  VALUES (?${", ?".repeat(columns.length - 1)})`;

/** Prepares what {@link insertLedger} runs. */
export function prepareLedger({ database }: State): void {
  database.query(insertSql);
}

/** Appends rows. Call inside a transaction. */
export function insertLedger({ database }: State, rows: readonly LedgerRow[]): void {
  const insert = database.query(insertSql);
  for (const row of rows) {
    insert.run(
      row.atMs,
      row.kind,
      row.command,
      cut(row.containerId),
      cut(row.podNamespace),
      cut(row.podName),
      cut(row.podUid),
      cut(row.network),
      cut(row.plugin),
      cut(row.ifName),
      row.durationUs,
      row.outcome,
      row.code,
      cut(row.error),
      cut(row.addresses),
      row.configHash,
      cut(row.decidedBy),
      cut(row.rule),
      row.choice.length > choiceLengthMax ? "" : row.choice,
    );
  }
}

/** Rows the ledger holds at most; what is older goes, whatever its age. */
export const rowsMax = 2_000_000;
/**
 * Rows removed in one step, some milliseconds of work: more than an ADD and a DEL of a pod with as
 * many networks as it may have add, so that the ledger never grows past its bounds.
 */
const pruneStep = 512;

/**
 * Removes the oldest rows that are past their time or their number, one step of them. Call inside a
 * transaction, never on an ADD.
 *
 * @param max rows kept at most
 * @returns how many were removed
 */
export function pruneLedger(
  { database }: State,
  nowMs: number,
  keepMs: number,
  max = rowsMax,
): number {
  // By time through its index: a clock that was wrong for a while must not hide what is older.
  const { changes } = database
    .query(
      `DELETE FROM ledger WHERE id IN
         (SELECT id FROM ledger WHERE at_ms < ? ORDER BY at_ms LIMIT ${pruneStep})`,
    )
    .run(nowMs - keepMs);
  if (changes > 0) return changes;
  // One query for each end: min and max in one would read the whole table.
  const { surplus } = database
    .query("SELECT (SELECT max(id) FROM ledger) - (SELECT min(id) FROM ledger) + 1 - ? AS surplus")
    .get(max) as { surplus: number | null };
  if (surplus === null || surplus <= 0) return 0;
  return database
    .query("DELETE FROM ledger WHERE id IN (SELECT id FROM ledger ORDER BY id LIMIT ?)")
    .run(Math.min(surplus, pruneStep)).changes;
}

/** Tells configs apart without showing them: 16 hex digits, a hash of the list. */
export function configHash(list: object): string {
  // It tells configs of one operator apart, nothing more: the cheapest hash will do.
  return Bun.hash(JSON.stringify(list)).toString(16).padStart(16, "0");
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
  const { command, containerId, config, ifName } = request;
  const pod = podIdentity(request.args);
  return beginJournal(host, { command, containerId, pod, network: config.name, ifName });
}

/** Begins the journal of what an operator, or the node agent, asked for. */
export function beginJournal(
  host: Host,
  call: Pick<LedgerRow, "command" | "containerId" | "network" | "ifName"> & {
    pod: PodIdentity;
    decidedBy?: string;
  },
): Journal {
  const { command, containerId, network, ifName, pod, decidedBy = "" } = call;
  return {
    base: {
      atMs: host.now(),
      kind: "call",
      command,
      containerId,
      podNamespace: pod.namespace,
      podName: pod.name,
      podUid: pod.uid,
      network,
      plugin: "",
      ifName,
      durationUs: 0,
      outcome: "ok",
      code: 0,
      error: "",
      addresses: "",
      configHash: "",
      decidedBy,
      rule: "",
      choice: "",
    },
    rows: [],
    startedNs: Bun.nanoseconds(),
  };
}

/** Notes whose call it is: the API may know more of the pod than the call says. */
export function notePod(journal: Journal, pod: PodIdentity): void {
  const { namespace: podNamespace, name: podName, uid: podUid } = pod;
  journal.base = { ...journal.base, podNamespace, podName, podUid };
}

/** What a failure says in a row; nothing for a success. */
function failureOf(error: unknown): Pick<LedgerRow, "outcome" | "code" | "error" | "rule"> {
  if (error === undefined) return { outcome: "ok", code: 0, error: "", rule: "" };
  const { code: number, message, rule } = toCniError(error);
  return { outcome: rule === "" ? "failed" : "denied", code: number, error: message, rule };
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

/** Gives the newest ADD of a network in the journal the numbers of the choice that led to it. */
export function noteChoice(journal: Journal, network: string, choice: string): void {
  const row = journal.rows.findLast(
    (one) => one.kind === "network" && one.command === "ADD" && one.network === network,
  );
  if (row) row.choice = choice;
}

/** Notes an ADD whose genie was killed: nobody else can tell of it any more. */
export function noteInterrupted(
  journal: Journal | undefined,
  {
    error: why,
    ...attachment
  }: Omit<Noted, "command" | "durationUs" | "error"> & {
    state: string;
    createdAtMs: number;
    error: string;
  },
): void {
  // One that says why it is not there was attached once, and ended by itself.
  if (!journal || attachment.state !== "planned" || why !== "") return;
  const error = new CniError(code.tryAgainLater, "genie was ended in the middle of this ADD");
  noteNetwork(journal, { ...attachment, command: "ADD", durationUs: 0, error });
  const row = journal.rows.at(-1);
  if (row) row.atMs = attachment.createdAtMs;
}

/**
 * Writes the journal, with the row of the call itself last. Call inside the transaction of the
 * result; a ledger that cannot be written is reported and fails nothing.
 *
 * @param error why the call failed
 */
export function writeJournal(host: Host, state: State, journal: Journal, error?: unknown): void {
  const durationUs = Math.round((Bun.nanoseconds() - journal.startedNs) / 1000);
  const call = { ...journal.base, durationUs, ...failureOf(error) };
  if (call.podName === "") {
    const { podNamespace, podName, podUid } = journal.rows[0] ?? call;
    Object.assign(call, { podNamespace, podName, podUid });
  }
  writeAside(host, state, "the ledger", () => insertLedger(state, [...journal.rows, call]));
}

/**
 * Writes what no operation may fail for. Inside a transaction it is a savepoint: a failure takes
 * back these writes alone, and is reported.
 */
export function writeAside(host: Host, state: State, what: string, inside: () => void): void {
  try {
    savepoint(state, inside);
  } catch (error) {
    const reason = toCniError(error).message.replace(/^Internal error: /, "");
    log(host, "warn", `Cannot write ${what}: ${reason}`);
  }
}

/**
 * Runs a transaction with what no operation may fail for in it; where the file does not take that,
 * once more without: what must be written may still find room.
 */
export function withAudit(host: Host, commit: (isAudited: boolean) => void): void {
  try {
    commit(true);
  } catch (error) {
    if (!(error instanceof CniError) || error.code !== code.stateUnavailable) throw error;
    log(host, "warn", `Cannot write the ledger: ${error.message}`);
    commit(false);
  }
}

/** Writes a journal with nothing else, in a transaction of its own. */
export function writeAlone(host: Host, state: State, journal: Journal, error?: unknown): void {
  // What was opened is a copy: the file cannot be written.
  if (state.copyDir !== "") return;
  try {
    write(state, () => writeJournal(host, state, journal, error));
  } catch (failure) {
    log(host, "warn", `Cannot write the ledger: ${toCniError(failure).message}`);
  }
}
