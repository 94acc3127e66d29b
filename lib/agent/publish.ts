/**
 * The agent's task that publishes what waits in the record: annotations of pods that an ADD could
 * not publish itself. Each is tried until it is published or its pod is gone, after a pause that
 * grows; one that fails keeps no other waiting, and a server that is away is asked once in a while.
 *
 * Two may be faster: an ADD of a new sandbox of the same pod (of several of a pod the newest
 * counts), and a DEL, which takes the row away.
 */
import type { Host } from "../call.ts";
import { type LogFields, log, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import { isObject, parseJson } from "../json.ts";
import { connect, isNotFound, type Kube, statusOf } from "../kubernetes/client.ts";
import { forgetStatus, patchStatus } from "../kubernetes/network_status.ts";
import type { CallId, PodIdentity, WaitingStatus } from "../record.ts";
import { orUndefined } from "../recovery/tried.ts";
import { sql } from "../report/record_reader.ts";
import { podLabel } from "../request.ts";
import { type Agent, forAll, pauseAfter, watchRecord } from "./task.ts";

/** How often the record is checked, in ms. */
const pollMs = 500;
/** Rows read at once, published in one round, and published side by side. */
const rowsMax = 1000;
const batchMax = 64;
const workersMax = 4;
/** Pause after the first failure of a row, and the longest one, in ms. */
const pauseMs = 500;
const pauseMsMax = 5 * 60_000;
/** The longest one for a server that is away: the first row that is tried tells of its return. */
const awayMsMax = 30_000;
/** A static pod runs before the API knows of it; so long it is waited for, in ms. */
const staticPodMs = 3_600_000;

/** A row that waits to be published, and its annotations as they are stored, in JSON. */
type WaitingRow = WaitingStatus & { key: string; atMs: number; stored: string; retry: Retry };

/** Failures in a row of one thing, and when it is tried again, on the monotonic clock. */
type Retry = { failures: number; dueMs: number };
const newRetry = (): Retry => ({ failures: 0, dueMs: 0 });

/** What is remembered from round to round, `away` of the server, `retries` by key of a row. */
type Round = { agent: Agent; retries: Map<string, Retry>; away: Retry };

/** Runs the task until the host's signal aborts. */
export async function runPublish(agent: Agent): Promise<void> {
  const round: Round = { agent, retries: new Map(), away: newRetry() };
  const task = { name: "status", what: "Network statuses wait", pollMs };
  const isDue = () => {
    const first = Math.min(...round.retries.values().map(({ dueMs }) => dueMs));
    return performance.now() >= Math.max(first, round.away.dueMs);
  };
  await watchRecord(agent, task, () => publishDue(round), isDue);
}

/** Publishes all that is due. @throws CniError of the record */
async function publishDue(round: Round): Promise<void> {
  const { host, config, record } = round.agent;
  const { away } = round;
  const waiting = await record.change((state) => waitingRows(round, state));
  const nowMs = performance.now();
  const due = waiting.filter(({ retry }) => nowMs >= Math.max(retry.dueMs, away.dueMs));
  if (due.length === 0) return;
  let kube: Kube;
  try {
    // Anew each time: credentials may have been put there meanwhile.
    kube = await connect(host, config.kubernetes);
  } catch (error) {
    logOnce(host, away, `Network statuses wait: ${toCniError(error).message}`);
    return tryLater(away, awayMsMax);
  }
  await publishAll(round, kube, due.slice(0, batchMax));
}

/** Some at a time; once the server seems to be away the rest stays for another round. */
async function publishAll(round: Round, kube: Kube, rows: readonly WaitingRow[]): Promise<void> {
  const { away } = round;
  const { host, record, health } = round.agent;
  let isAway = false;
  await forAll(rows, workersMax, async (row) => {
    if (isAway || host.signal.aborted) return;
    const { retry } = row;
    const pod = { pod: podLabel(row.pod) };
    const isOld = record.use((state) => isSuperseded(state, row));
    try {
      const isGone = !isOld && !(await publish(kube, row));
      if (isGone) log(host, "info", "Its pod is gone: status dropped", pod);
    } catch (error) {
      if (host.signal.aborted) return;
      health.count("api");
      const message = `Cannot publish network status: ${toCniError(error).message}`;
      const wasAway = isAway;
      isAway ||= isUnreachable(error);
      if (!wasAway) logOnce(host, isAway ? away : retry, message, pod);
      if (!isAway) tryLater(retry, pauseMsMax);
      return;
    }
    await record.change((state) => write(state, () => forgetStatus(state, row, row.stored)));
    round.retries.delete(row.key);
  });
  if (isAway) return tryLater(away, awayMsMax);
  if (away.failures > 0) log(host, "info", "Network statuses are published again");
  Object.assign(away, newRetry());
}

/** Logs a failure as a warning the first time, then only at debug. */
function logOnce(host: Host, { failures }: Retry, message: string, fields: LogFields = {}): void {
  log(host, failures === 0 ? "warn" : "debug", message, fields);
}

/** Half of the pause is chance: rows and nodes must not come back in one moment. */
function tryLater(retry: Retry, maxMs: number): void {
  const ms = pauseAfter(retry.failures, pauseMs, maxMs);
  retry.failures++;
  retry.dueMs = performance.now() + ms * (0.5 + Math.random() / 2);
}

/** No answer at all, or none that has to do with this pod. */
function isUnreachable(error: unknown): boolean {
  const status = statusOf(error);
  return status === undefined || status === 401 || status === 429 || status >= 500;
}

/**
 * Publishes one row.
 * @returns false when its pod is gone
 * @throws CniError 11 of a server that does not take it, or not yet
 */
async function publish(kube: Kube, row: WaitingRow): Promise<boolean> {
  try {
    await patchStatus(kube, row);
    return true;
  } catch (error) {
    // The server's rights hide whether there is such a pod: it is read.
    if (![403, 404, 405, 409].includes(statusOf(error) ?? 0)) throw error;
    const { uid, namespace, name } = row.pod;
    const found = await kube.getPod(namespace, name).catch((reason: unknown) => {
      if (isNotFound(reason)) return undefined;
      throw reason;
    });
    if (!found) {
      // The kubelet makes the uid of a static pod of its manifest: an MD5 in place of a UUID.
      const isStatic = /^[0-9a-f]{32}$/.test(uid);
      if (isStatic && Date.now() - row.atMs < staticPodMs) throw error;
      return false;
    }
    const { metadata } = found;
    if (uid === "" || metadata.uid === uid) throw error;
    // The API knows a static pod by its mirror, which has a uid of its own.
    if (metadata.annotations?.["kubernetes.io/config.mirror"] !== uid) return false;
    await patchStatus(kube, { ...row, pod: { ...row.pod, uid: metadata.uid } });
    return true;
  }
}

/** Has the same pod got a newer sandbox, whose ADD publishes itself? */
function isSuperseded({ database }: State, { containerId, pod }: WaitingRow): boolean {
  return pod.uid !== "" && database.query(sql("newer sandbox")).get(containerId, pod.uid) !== null;
}

/** What waits, oldest first; of a pod the newest alone. The others are forgotten. */
function waitingRows(round: Round, state: State): WaitingRow[] {
  const rows = state.database.query(sql("statuses")).all(rowsMax) as (CallId &
    PodIdentity & { stored: string; atMs: number })[];
  const newest = new Map<string, WaitingRow>();
  for (const { containerId, requestIfName, namespace, name, uid, atMs, stored } of rows) {
    const call = { containerId, requestIfName };
    const annotations = parseTexts(stored);
    if (!annotations || namespace === "" || name === "") {
      log(round.agent.host, "warn", "Dropped a damaged status", { container: containerId });
      write(state, () => forgetStatus(state, call, stored));
      continue;
    }
    const pod = { namespace, name, uid };
    const podKey = `${namespace}/${name}/${uid}`;
    const older = newest.get(podKey);
    if (older) write(state, () => forgetStatus(state, older, older.stored));
    const key = JSON.stringify([containerId, requestIfName, atMs]);
    const retry = round.retries.get(key) ?? newRetry();
    newest.set(podKey, { ...call, pod, annotations, key, atMs, stored, retry });
  }
  const waiting = [...newest.values()];
  round.retries = new Map(waiting.map(({ key, retry }) => [key, retry]));
  return waiting;
}

function parseTexts(text: string): Record<string, string> | undefined {
  const value = orUndefined(() => parseJson(text, "stored annotations"));
  const isTexts = isObject(value) && Object.values(value).every((one) => typeof one === "string");
  return isTexts ? (value as Record<string, string>) : undefined;
}
