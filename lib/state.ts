/**
 * What is on record: attachments from their plan to their end, the calls that ended, annotations
 * that wait to be published. What writes is called inside a transaction of `database.ts`. Rows are
 * hostile until parsed: one that cannot be read must not cost the others (design D4).
 */
import { isAbsolute } from "node:path";
import { CniError, code, type Host, isSupported, log, toCniError } from "./cni.ts";
import { read, type State } from "./database.ts";
import { isObject, parseJson } from "./json.ts";
import type { NetworkConfigList } from "./netconf.ts";
import { netnsId } from "./netns.ts";

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
  /**
   * Gateways that become the pod's default route; empty: this attachment's own
   * (NPWG v1.3 §4.1.2.1.9).
   */
  defaultRoute?: string[];
  /** The device of a device plugin that it was given. */
  device?: { resourceName: string; deviceId: string };
  /** Plain NetworkPolicy is ours to enforce on it, as the table says. */
  enforcesPlain?: true;
  /** Where its device information is for others to read (NPWG Device Information Specification). */
  deviceInfoFile?: string;
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

/** How long the id of an ended container is remembered, in ms: runtimes repeat DEL for minutes. */
const endedKeepMs = 24 * 3_600_000;

/**
 * Inserts the plan, one row per attachment, as `planned`. A row in the way that cannot be read is
 * replaced; all others the caller has undone. Call under the container's lock.
 */
export function insertPlanned(state: State, attachments: Attachment[], nowMs: number): void {
  const insert = state.database.query(
    `INSERT OR REPLACE INTO attachments (container_id, request_ifname, ifname, position, network,
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

const attachedSql =
  "UPDATE attachments SET state = 'attached', result = ? WHERE container_id = ? AND ifname = ?";

/** Prepares what {@link setAttached} runs. */
export function prepareAttached({ database }: State): void {
  database.query(attachedSql);
}

/**
 * Marks one attachment as attached, with the wire form of its final result.
 * @throws CniError 11 when its row is gone: nobody could ever delete it
 */
export function setAttached(state: State, attachment: Attachment, result: object): void {
  const { changes } = state.database
    .query(attachedSql)
    .run(JSON.stringify(result), attachment.containerId, attachment.ifName);
  if (changes === 1) return;
  throw new CniError(
    code.tryAgainLater,
    `Cannot record interface "${attachment.ifName}" of container ${attachment.containerId}: its ` +
      "plan has vanished from the record",
  );
}

/**
 * Keeps an attachment whose DEL failed, since the first failure, with the reason. A first failure
 * that is still to come was before the clock was set back: it counts from now.
 */
export function setFailing(
  state: State,
  attachment: Pick<Attachment, "containerId" | "ifName">,
  failure: { state: "failing" | "leaked"; error: string; nowMs: number },
): void {
  state.database
    .query(
      `UPDATE attachments SET state = ?1, error = ?2,
         failed_at_ms = CASE failed_at_ms WHEN 0 THEN ?3 ELSE min(failed_at_ms, ?3) END
       WHERE container_id = ?4 AND ifname = ?5`,
    )
    .run(failure.state, failure.error, failure.nowMs, attachment.containerId, attachment.ifName);
}

/** Forgets an attachment whose delegates have all succeeded in DEL. */
export function forget(state: State, attachment: Attachment): void {
  state.database
    .query("DELETE FROM attachments WHERE container_id = ? AND ifname = ?")
    .run(attachment.containerId, attachment.ifName);
}

/** One call of the runtime by what identifies it. */
export interface CallId {
  containerId: string;
  requestIfName: string;
}

/**
 * Remembers that a call came to its end: by a DEL, or by an ADD that undid itself. When no row is
 * left of it either, its repeated DEL need not guess.
 */
export function setEnded(
  state: State,
  { containerId, requestIfName }: CallId,
  command: "ADD" | "DEL",
  nowMs: number,
): void {
  const { database } = state;
  forgetStatus(state, { containerId, requestIfName });
  database
    .query("INSERT OR REPLACE INTO ended VALUES (?, ?, ?, ?)")
    .run(containerId, requestIfName, command, nowMs);
  // A few at a time keeps the table bounded and every DEL short.
  database
    .query(
      `DELETE FROM ended WHERE (container_id, request_ifname) IN
         (SELECT container_id, request_ifname FROM ended WHERE at_ms < ? ORDER BY at_ms LIMIT 16)`,
    )
    .run(nowMs - endedKeepMs);
}

/** How and when a call ended; undefined when it did not, or was made again since. */
export function endOf(
  state: State,
  { containerId, requestIfName }: CallId,
): { command: string; atMs: number } | undefined {
  const row = state.database
    .query("SELECT command, at_ms FROM ended WHERE container_id = ? AND request_ifname = ?")
    .get(containerId, requestIfName) as { command: string; at_ms: number } | null;
  return row ? { command: row.command, atMs: row.at_ms } : undefined;
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

/** A row whose plan cannot be read any more: its interface is known, its plugins are not. */
export interface DamagedAttachment extends CallId {
  ifName: string;
}

/** What is on record; each list in the order it was made. */
export interface Recorded {
  readable: StoredAttachment[];
  damaged: DamagedAttachment[];
}

/**
 * Reads attachments: of one container, or all. A row that cannot be read is reported: the others
 * must still be usable.
 * @throws CniError 106 when the file cannot be read
 */
export function recorded(host: Host, state: State, containerId?: string): Recorded {
  return readRows(host, state, "container_id", containerId);
}

function readRows(
  host: Host,
  state: State,
  column: "container_id" | "netns_id",
  value: string | undefined,
): Recorded {
  const where = value === undefined ? "" : `WHERE ${column} = ?1`;
  const rows = read(state, () =>
    state.database
      .query(`SELECT * FROM attachments ${where} ORDER BY created_at_ms, container_id, position`)
      .all(...(value === undefined ? [] : [value])),
  ) as AttachmentRow[];
  const found: Recorded = { readable: [], damaged: [] };
  for (const row of rows) {
    try {
      found.readable.push(fromAttachmentRow(row));
    } catch (error) {
      log(host, "error", "Cannot read a stored attachment", {
        container: row.container_id,
        interface: row.ifname,
        error: toCniError(error).message,
      });
      found.damaged.push({
        containerId: row.container_id,
        requestIfName: row.request_ifname,
        ifName: row.ifname,
      });
    }
  }
  return found;
}

/** The attachments that can be read, see {@link recorded}. */
export function attachments(host: Host, state: State, containerId?: string): StoredAttachment[] {
  return recorded(host, state, containerId).readable;
}

/** The attachments made in one network namespace, see {@link recorded}. */
export function attachmentsIn(host: Host, state: State, id: string): StoredAttachment[] {
  return readRows(host, state, "netns_id", id).readable;
}

/** Is a ruleset on record for a network namespace? */
export function hasRuleset({ database }: State, id: string): boolean {
  return database.query("SELECT 1 FROM rulesets WHERE netns_id = ?").get(id) !== null;
}

/**
 * A stored plan, hostile until parsed: half of it would fail DEL somewhere in the middle. By hand:
 * every DEL would pay 1 ms for loading a schema.
 */
function isStoredPlan(plan: unknown): plan is Attachment {
  if (!isObject(plan)) return false;
  const { list, plugins, pod } = plan;
  if (!isObject(list) || !isObject(pod) || !Array.isArray(list["plugins"])) return false;
  return (
    hasTexts(plan, ["requestNetwork", "network", "cniArgs", "cniPath", "netns"]) &&
    hasTexts(pod, ["namespace", "name", "uid"]) &&
    hasTexts(list, ["name"]) &&
    isSupported(list["cniVersion"]) &&
    typeof list["disableCheck"] === "boolean" &&
    typeof list["disableGC"] === "boolean" &&
    typeof plan["primary"] === "boolean" &&
    typeof plan["timeoutMs"] === "number" &&
    isObject(plan["capabilityArgs"]) &&
    isObject(plan["args"]) &&
    list["plugins"].length > 0 &&
    list["plugins"].every((plugin) => isObject(plugin) && typeof plugin["type"] === "string") &&
    Array.isArray(plugins) &&
    plugins.length === list["plugins"].length &&
    plugins.every((path) => typeof path === "string" && isAbsolute(path))
  );
}

function hasTexts(value: Record<string, unknown>, keys: string[]): boolean {
  return keys.every((key) => typeof value[key] === "string");
}

function fromAttachmentRow(row: AttachmentRow): StoredAttachment {
  const plan = parseJson(row.plan, "stored plan");
  if (!isStoredPlan(plan)) {
    throw new CniError(code.stateUnavailable, "Cannot read stored plan: it is incomplete");
  }
  return {
    ...plan,
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

/** Annotations of a pod that wait to be published. */
export interface WaitingStatus extends CallId {
  pod: PodIdentity;
  annotations: Record<string, string>;
}

/** Leaves a status for the agent, unless its call was deleted meanwhile. Call in a transaction. */
export function putStatus({ database }: State, status: WaitingStatus, nowMs: number): void {
  const { containerId, requestIfName, pod, annotations } = status;
  database
    .query(
      `INSERT OR REPLACE INTO statuses SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE EXISTS
         (SELECT 1 FROM attachments WHERE container_id = ?1 AND request_ifname = ?2)`,
    )
    .run(
      containerId,
      requestIfName,
      pod.namespace,
      pod.name,
      pod.uid,
      JSON.stringify(annotations),
      nowMs,
    );
}

/** Forgets the status of a call, published or not. Call inside a transaction. */
export function forgetStatus({ database }: State, { containerId, requestIfName }: CallId): void {
  database
    .query("DELETE FROM statuses WHERE container_id = ? AND request_ifname = ?")
    .run(containerId, requestIfName);
}

/** Forgets a status that was published, unless a newer one waits. Call inside a transaction. */
export function forgetPublished({ database }: State, status: WaitingStatus): void {
  database
    .query("DELETE FROM statuses WHERE container_id = ? AND request_ifname = ? AND annotations = ?")
    .run(status.containerId, status.requestIfName, JSON.stringify(status.annotations));
}
