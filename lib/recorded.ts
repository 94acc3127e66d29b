/**
 * Attachments on record: reading them, undoing them, and what becomes of their rows. What writes is
 * called inside a transaction of `database.ts`. Rows are hostile until parsed.
 * Source: design D4, D5; facts 9-11; CNI SPEC 1.1 §3 (DEL of a chain).
 */
import { existsSync } from "node:fs";
import { basename, isAbsolute } from "node:path";
import { findPlugin } from "./binaries.ts";
import type { Chain, Host } from "./call.ts";
import { CniError, code, isSupported, log, toCniError } from "./cni.ts";
import { read, type State } from "./database.ts";
import { callPlugin, noter } from "./delegate.ts";
import { isObject, parseJson } from "./json.ts";
import { interfacesIn, netnsId } from "./kernel.ts";
import { noteNetwork } from "./ledger.ts";
import type {
  Attachment,
  CallId,
  DamagedAttachment,
  Journal,
  Recorded,
  Result,
  StoredAttachment,
} from "./record.ts";
import { parseResult } from "./result.ts";

type Row = Omit<StoredAttachment, Exclude<keyof Attachment, keyof DamagedAttachment> | "result"> & {
  plan: string;
  result: string | null;
};

/**
 * Reads the attachments of one container, or all. A row that cannot be read is reported, and the
 * others stay usable.
 * @param column what `value` is compared with
 * @throws CniError 106 when the file cannot be read
 */
export function recorded(
  host: Host,
  state: State,
  value?: string,
  column: "container_id" | "netns_id" = "container_id",
): Recorded {
  const sql = `SELECT container_id AS containerId, request_ifname AS requestIfName,
      ifname AS ifName, state, plan, result, netns_id AS netnsId, created_at_ms AS createdAtMs,
      failed_at_ms AS failedAtMs, error
    FROM attachments ${value === undefined ? "" : `WHERE ${column} = ?`}
    ORDER BY created_at_ms, container_id, position`;
  const values = value === undefined ? [] : [value];
  const rows = read(state, () => state.database.query(sql).all(...values)) as Row[];
  const found: Recorded = { readable: [], damaged: [] };
  for (const row of rows) {
    try {
      found.readable.push(fromRow(row));
    } catch (error) {
      const { containerId, requestIfName, ifName } = row;
      log(host, "error", "Cannot read a stored attachment", {
        container: containerId,
        interface: ifName,
        error: toCniError(error).message,
      });
      found.damaged.push({ containerId, requestIfName, ifName });
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
  return recorded(host, state, id, "netns_id").readable;
}

/** Checks a stored plan. By hand: a schema would cost every DEL 1 ms to load. */
function isStoredPlan(plan: unknown): plan is Attachment {
  if (!isObject(plan)) return false;
  const { list, plugins, pod } = plan;
  if (!isObject(list) || !isObject(pod) || !Array.isArray(list["plugins"])) return false;
  const hasTexts = (value: Record<string, unknown>, keys: string[]) =>
    keys.every((key) => typeof value[key] === "string");
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

function fromRow({ plan: text, result, ...columns }: Row): StoredAttachment {
  const plan = parseJson(text, "stored plan");
  if (!isStoredPlan(plan)) {
    throw new CniError(code.stateUnavailable, "Cannot read stored plan: it is incomplete");
  }
  // The columns are the key, whatever the plan says.
  const [ifName = "", parked] = columns.ifName.split("/");
  return {
    ...plan,
    ...columns,
    ifName,
    ...(parked !== undefined && { parkedAs: columns.ifName }),
    result: result === null ? undefined : unlessDamaged(() => parseJson(result, "stored result")),
  };
}

/** A damaged result counts as none: DEL then runs without prevResult, as with libcni. */
function unlessDamaged<T>(parse: () => T): T | undefined {
  try {
    return parse();
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/** Limit for one delegate call of DEL, in ms: runtimes give a whole DEL a minute. */
export const delegateTimeoutMs = 25_000;

/**
 * Runs DEL on all plugins of a recorded attachment.
 * @param chain its `netns` is where the caller believes the attachment to be
 * @param path further folders to look for its binaries in
 * @param others what stays of its container: a DEL that would take from those is not sent
 * @returns the errors; empty when everything is undone
 */
export async function undo(
  chain: Chain,
  attachment: StoredAttachment,
  path: string[],
  others: readonly StoredAttachment[] = [],
): Promise<CniError[]> {
  if (others.length > 0) {
    const { sharedError } = await import("./recovery/plugin_keys.ts");
    const error = sharedError(attachment, others);
    if (error) return [error];
  }
  // A path may lead to another namespace by now (a reused `/proc/<pid>/ns/net`), or to the node's
  // own. Plugins would delete what is there. Of one that is parked, another has the interface.
  const found = netnsId(chain.netns);
  const isHere = (found === "" || found === attachment.netnsId) && !attachment.parkedAs;
  const netns = isHere ? chain.netns : "";
  const present = withPresentPlugins(attachment, path);
  return delChain({ ...chain, netns }, present, { result: storedResult(attachment) });
}

/**
 * Undoes attachments in the order given, then those that failed once more: two attachments to one
 * network may share what the first cannot remove (bridge keeps one chain of rules for both).
 * @param errors filled on the way, so that what was undone is known whatever happens
 */
export async function undoAll<T>(
  attachments: readonly T[],
  undoOne: (attachment: T) => Promise<CniError[]>,
  errors: Map<T, CniError[]>,
): Promise<void> {
  for (const attachment of attachments) errors.set(attachment, await undoOne(attachment));
  if (errors.size < 2) return;
  for (const [attachment, failures] of [...errors]) {
    const isWorthIt = failures.some(
      ({ code: number }) => number !== code.delegateTimeout && number !== code.delegateNotFound,
    );
    if (isWorthIt) errors.set(attachment, await undoOne(attachment));
  }
}

/** Finds the binaries that have moved since ADD, by their names. */
export function withPresentPlugins<T extends Attachment>(attachment: T, path: string[]): T {
  const dirs = [...attachment.cniPath.split(":"), ...path];
  const plugins = attachment.plugins.map((file) =>
    existsSync(file) ? file : (findPlugin(basename(file), dirs) ?? file),
  );
  return { ...attachment, plugins, timeoutMs: Math.min(attachment.timeoutMs, delegateTimeoutMs) };
}

/** The final result of a stored attachment; undefined where it is missing or damaged. */
export function storedResult({ result, list, network }: StoredAttachment): Result | undefined {
  if (result === undefined) return undefined;
  const what = `stored result of network "${network}"`;
  return unlessDamaged(() => parseResult(result, list.cniVersion, what));
}

/** What becomes of the record of an attachment after a DEL. */
export type DelOutcome = "gone" | "failing" | "leaked";

/**
 * A DEL that fails is tried again until the window since its first failure is over. It is given up
 * at once where no retry of the runtime helps: without the binary, where another attachment would
 * lose what it has, and where it was given up before. A plugin that refuses the call itself did
 * nothing in an ADD that has no result either.
 */
export function outcomeOf(
  attachment: StoredAttachment,
  errors: CniError[],
  windowMs: number,
  nowMs: number,
): DelOutcome {
  const isMade = attachment.state === "attached" || attachment.result !== undefined;
  if (errors.length === 0 || (!isMade && errors.every(isCallRefused))) return "gone";
  if (attachment.state === "leaked" || errors.every(isHopeless)) return "leaked";
  const sinceMs = attachment.failedAtMs === 0 ? nowMs : attachment.failedAtMs;
  return nowMs - sinceMs >= windowMs ? "leaked" : "failing";
}

/** Nothing ran: no usable binary (a code 102 of the plugin's own has no cause), or it must wait. */
export function isHopeless({ cause }: CniError): boolean {
  return isObject(cause) && (cause["kind"] === "spawn" || cause["kind"] === "shared");
}

/** Did a plugin refuse the call before it did anything? By its CNI version, or its CNI_ARGS. */
export function isCallRefused({ code: number, message }: CniError): boolean {
  return number === code.incompatibleVersion || message.includes(" failed: ARGS: ");
}

const undoTimeoutMs = 30_000;

/** The chain for undoing: a deadline of its own, and not ended by the signal that caused it. */
export function undoChain(chain: Chain): Chain {
  return { ...chain, signal: undefined, deadlineMs: chain.host.now() + undoTimeoutMs };
}

/**
 * Runs DEL through the whole chain in reverse, each plugin with the final result (SPEC §3).
 * Goes on after a failure.
 * @param made the result of the ADD if known; `last` is the index of the plugin to begin with: the
 *   one that failed in ADD, else the last. By a guess, no interface is known to be ours
 * @returns the errors, in the order they happened; empty when everything is undone
 */
export async function delChain(
  chain: Chain,
  attachment: Attachment,
  made: { result: Result | undefined; last?: number; isGuess?: boolean },
): Promise<CniError[]> {
  const { list, deviceInfoFile, isCached } = attachment;
  const note = noter(chain, attachment, "DEL");
  const isGone = netnsId(chain.netns) === "";
  const errors: CniError[] = [];
  for (let index = made.last ?? list.plugins.length - 1; index >= 0; index--) {
    const isUndone = isGone && insideOnly.has(list.plugins[index]?.type ?? "");
    // sbr would make a file at a path that leads to nothing, and the next plugins fail on it.
    const given = isUndone ? { ...chain, netns: "" } : chain;
    try {
      await callPlugin(given, attachment, { command: "DEL", index, result: made.result });
    } catch (error) {
      if (!isUndone) errors.push(toCniError(error));
    }
  }
  note(errors[0]);
  // A DEL that said yes is not believed where it can be checked.
  const isLeft = errors.length === 0 && interfacesIn(chain.netns)?.includes(attachment.ifName);
  if (isLeft && !made.isGuess) {
    await (await import("./recovery/plugin_keys.ts")).removeLeft(chain, attachment);
  }
  if (errors.length > 0) return errors;
  if (deviceInfoFile !== undefined) {
    (await import("./kubernetes/devices.ts")).removeDeviceInfo(chain.host, deviceInfoFile);
  }
  if (isCached) (await import("./recovery/cni_cache.ts")).removeCached(attachment);
  return errors;
}

/** Plugins that change nothing outside the pod's namespace: with it, all they did is gone. */
const insideOnly = new Set(["sbr", "tuning", "loopback"]);

/**
 * Keeps an attachment whose DEL failed, with the reason and the time of the first failure. One in
 * the future was noted before the clock was set back: it counts from now.
 */
export function setFailing(
  state: State,
  attachment: RowKey,
  failure: { state: "failing" | "leaked"; error: string; nowMs: number },
): void {
  state.database
    .query(
      `UPDATE attachments SET state = ?1, error = ?2,
         failed_at_ms = CASE failed_at_ms WHEN 0 THEN ?3 ELSE min(failed_at_ms, ?3) END
       WHERE container_id = ?4 AND ifname = ?5`,
    )
    .run(failure.state, failure.error, failure.nowMs, attachment.containerId, keyOf(attachment));
}

/** What tells a row of the record. */
type RowKey = Pick<StoredAttachment, "containerId" | "ifName" | "parkedAs">;

const keyOf = ({ ifName, parkedAs }: RowKey): string => parkedAs ?? ifName;

/** Forgets an attachment whose delegates have all succeeded in DEL. */
export function forget(state: State, attachment: RowKey): void {
  state.database
    .query("DELETE FROM attachments WHERE container_id = ? AND ifname = ?")
    .run(attachment.containerId, keyOf(attachment));
}

/** How long an ended call is remembered, in ms: runtimes repeat DEL for minutes. */
const endedKeepMs = 24 * 3_600_000;

/**
 * Remembers that a call has ended, by a DEL or by an ADD that undid itself, so that a repeated DEL
 * need not guess. Forgets its status, published or not.
 */
export function setEnded(
  { database }: State,
  { containerId, requestIfName }: CallId,
  command: "ADD" | "DEL",
  nowMs: number,
): void {
  database
    .query("DELETE FROM statuses WHERE container_id = ? AND request_ifname = ?")
    .run(containerId, requestIfName);
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

/** Is a ruleset on record for a network namespace? */
export function hasRuleset({ database }: State, id: string): boolean {
  return database.query("SELECT 1 FROM rulesets WHERE netns_id = ?").get(id) !== null;
}

/** Forgets the counts of a container's attachments that are not on record any more. */
export function forgetTraffic({ database }: State, containerId: string): void {
  database
    .query(
      `DELETE FROM traffic WHERE container_id = ?1 AND ifname NOT IN
         (SELECT ifname FROM attachments WHERE container_id = ?1)`,
    )
    .run(containerId);
}

/** Rows the ledger holds at most; the oldest are removed, whatever their age. */
export const rowsMax = 2_000_000;
/** Rows removed in one step: more than any ADD and DEL add, so that the bounds always hold. */
const pruneStep = 512;

/**
 * Removes the oldest rows that are past their time or their number, one step of them. Call inside a
 * transaction, never on an ADD.
 * @param max rows kept at most
 * @returns how many were removed
 */
export function pruneLedger(
  { database }: State,
  nowMs: number,
  keepMs: number,
  max = rowsMax,
): number {
  // By time, not by id: a clock that was wrong for a while must not hide what is older.
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

/** Notes an ADD whose genie was killed, and could not note it itself. */
export function noteInterrupted(journal: Journal | undefined, attachment: StoredAttachment): void {
  // With an error it was attached once, and ended by itself.
  if (!journal || attachment.state !== "planned" || attachment.error !== "") return;
  const error = new CniError(code.tryAgainLater, "genie was ended in the middle of this ADD");
  noteNetwork(journal, { ...attachment, command: "ADD", durationUs: 0, error });
  const row = journal.rows.at(-1);
  if (row) row.atMs = attachment.createdAtMs;
}
