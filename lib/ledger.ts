/**
 * The audit ledger: one row per call of genie, per network of it, and per request to a plugin. Rows
 * are written in the transaction of the result they belong to; a ledger that cannot be written
 * never fails an operation. It stores no configs.
 */
import type { Host, Request } from "./call.ts";
import { CniError, code, log, toCniError } from "./cni.ts";
import { type State, savepoint, write } from "./database.ts";
import type { Journal, LedgerKind, LedgerRow, Noted, PodIdentity } from "./record.ts";
import { podIdentity } from "./request.ts";

/** Longest text kept of a column, in characters; the numbers of a choice are kept whole or not. */
const textLengthMax = 1024;
const choiceLengthMax = 8192;

/** Writes one row. */
export const insertLedgerSql = `INSERT INTO ledger (at_ms, kind, command, container_id,
    pod_namespace, pod_name, pod_uid, network, plugin, ifname, duration_us, outcome, code, error,
    addresses, config_hash, decided_by, rule, choice)
  VALUES ($atMs, $kind, $command, $containerId, $podNamespace, $podName, $podUid, $network, $plugin,
    $ifName, $durationUs, $outcome, $code, $error, $addresses, $configHash, $decidedBy, $rule,
    $choice)`;

/** Appends rows. Call inside a transaction. */
export function insertLedger({ database }: State, rows: readonly LedgerRow[]): void {
  const insert = database.query(insertLedgerSql);
  for (const row of rows) {
    const kept: Record<string, string | number> = { ...row };
    for (const [key, value] of Object.entries(kept)) {
      if (typeof value === "string") kept[key] = value.slice(0, textLengthMax);
    }
    kept["choice"] = row.choice.length > choiceLengthMax ? "" : row.choice;
    insert.run(kept);
  }
}

/** 16 hex digits that tell the configs of one operator apart: the cheapest hash will do. */
export function configHash(list: object): string {
  return Bun.hash(JSON.stringify(list)).toString(16).padStart(16, "0");
}

/** Begins the journal of a call. */
export function openJournal(host: Host, request: Request): Journal {
  const { command, containerId, config, ifName } = request;
  const pod = podIdentity(request.args);
  return beginJournal(host, { command, containerId, pod, network: config.name, ifName });
}

/** Begins the journal of what an operator or the node agent asked for. */
export function beginJournal(
  host: Host,
  call: Pick<LedgerRow, "command" | "containerId" | "network" | "ifName"> & {
    pod: PodIdentity;
    decidedBy?: string;
  },
): Journal {
  const { pod, decidedBy = "", ...others } = call;
  return {
    base: {
      atMs: host.now(),
      kind: "call",
      ...others,
      podNamespace: pod.namespace,
      podName: pod.name,
      podUid: pod.uid,
      plugin: "",
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

/** Notes whose call it is, where the API knows more of the pod than the call says. */
export function notePod(journal: Journal, pod: PodIdentity): void {
  const { namespace: podNamespace, name: podName, uid: podUid } = pod;
  journal.base = { ...journal.base, podNamespace, podName, podUid };
}

function failureOf(error: unknown): Pick<LedgerRow, "outcome" | "code" | "error" | "rule"> {
  if (error === undefined) return { outcome: "ok", code: 0, error: "", rule: "" };
  const { code: number, message, rule } = toCniError(error);
  return { outcome: rule === "" ? "failed" : "denied", code: number, error: message, rule };
}

function rowOf(journal: Journal, kind: LedgerKind, plugin: string, noted: Noted): LedgerRow {
  const { base } = journal;
  const { pod, command, network, ifName } = noted;
  return {
    ...base,
    kind,
    plugin,
    command,
    network,
    ifName,
    containerId: noted.containerId || base.containerId,
    podNamespace: pod.namespace || base.podNamespace,
    podName: pod.name || base.podName,
    podUid: pod.uid || base.podUid,
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
 * result; a failure is reported and fails nothing.
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

/** Writes what no operation may fail for, in a savepoint: a failure is taken back and reported. */
export function writeAside(host: Host, state: State, what: string, inside: () => void): void {
  try {
    savepoint(state, inside);
  } catch (error) {
    const reason = toCniError(error).message.replace(/^Internal error: /, "");
    log(host, "warn", `Cannot write ${what}: ${reason}`);
  }
}

/** Runs a transaction with its audit; where the disk has no room for both, once more without. */
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
  // A copy is open because the file cannot be written.
  if (state.copyDir !== "") return;
  try {
    write(state, () => writeJournal(host, state, journal, error));
  } catch (failure) {
    log(host, "warn", `Cannot write the ledger: ${toCniError(failure).message}`);
  }
}
