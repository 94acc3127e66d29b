/**
 * The agent's part that publishes what waits in the record: annotations of pods that an ADD could
 * not publish itself. Each is tried until it is published or its pod is gone, after a pause that
 * grows; one that fails keeps no other waiting, and a server that is away is asked once in a while.
 *
 * What runs against it: an ADD of a new sandbox of the same pod, which knows better (of several of
 * a pod the newest counts), and a DEL, which takes the row away.
 */

import { type Host, type LogFields, log, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import { isObject } from "../json.ts";
import { connect, isNotFound, type Kube, statusOf } from "../kubernetes/client.ts";
import { patchStatus } from "../kubernetes/network_status.ts";
import { pause } from "../kubernetes/watch.ts";
import type { WaitingStatus } from "../state.ts";
import type { Agent } from "./part.ts";

/** How often the record is looked at, in ms. */
const pollMs = 500;
/** Rows read at once, published in one round, and published side by side. */
const rowsMax = 1000;
const batchMax = 64;
const workersMax = 4;
/** Pause after the first failure of a row, and the longest one, in ms. */
const pauseMs = 500;
const pauseMsMax = 5 * 60_000;
/** The same for a server that is away: the first one that is tried says whether it is back. */
const awayMsMax = 30_000;
/** A static pod runs before the API knows of it; so long it is waited for, in ms. */
const staticPodMs = 3_600_000;

/** A row that waits. */
interface Waiting extends WaitingStatus {
  key: string;
  atMs: number;
  /** As stored: tells whether it was replaced meanwhile. */
  text: string;
}

/** What became of a row. */
type Fate = "published" | "gone";

interface Pauses {
  failures: number;
  dueMs: number;
}

/** Runs the part until the host's signal aborts. */
export async function runStatus(agent: Agent): Promise<void> {
  const { host, record, health } = agent;
  const round: Round = { agent, pauses: new Map(), away: { failures: 0, dueMs: 0 } };
  let version = "";
  for (; !host.signal.aborted; await pause(pollMs, host.signal)) {
    health.beat("status");
    try {
      const found = record.version();
      if (found === version && performance.now() < nextDueMs(round)) continue;
      await publishDue(round);
      version = found;
    } catch (error) {
      if (host.signal.aborted) return;
      // Of the record: counted there. The next round tries again.
      version = "";
      log(host, "debug", `Network statuses wait: ${toCniError(error).message}`);
    }
  }
}

/** The part at work. */
interface Round {
  agent: Agent;
  /** Of each row that waits, and was seen. */
  pauses: Map<string, Pauses>;
  away: Pauses;
}

/** When something is to be tried again; Infinity where nothing waits. */
function nextDueMs({ pauses, away }: Round): number {
  const first = Math.min(...[...pauses.values()].map(({ dueMs }) => dueMs));
  return Math.max(first, away.dueMs);
}

/** One look at all that waits. @throws CniError of the record */
async function publishDue({ agent, pauses, away }: Round): Promise<void> {
  const { host, config, record, health } = agent;
  const waiting = record.use((state) => waitingRows(host, state));
  health.figures.set("statuses", waiting.length);
  const keys = new Set(waiting.map(({ key }) => key));
  for (const key of pauses.keys()) if (!keys.has(key)) pauses.delete(key);
  for (const key of keys) if (!pauses.has(key)) pauses.set(key, { failures: 0, dueMs: 0 });
  const nowMs = performance.now();
  if (nowMs < away.dueMs) return;
  const due = waiting.filter(({ key }) => nowMs >= (pauses.get(key)?.dueMs ?? 0));
  if (due.length === 0) return;
  let kube: Kube;
  try {
    // Anew each time: credentials may have been put there meanwhile.
    kube = await connect(host, config.kubernetes);
  } catch (error) {
    report(host, away, `Network statuses wait: ${toCniError(error).message}`);
    return later(away, awayMsMax);
  }
  await publishAll({ agent, pauses, away }, kube, due.slice(0, batchMax));
}

/** Some at a time; once the server seems to be away the rest stays for another round. */
async function publishAll(
  { agent, pauses, away }: Round,
  kube: Kube,
  rows: readonly Waiting[],
): Promise<void> {
  const { host, record, health } = agent;
  const left = [...rows];
  let isAway = false;
  const worker = async () => {
    for (let row = left.shift(); row && !isAway && !host.signal.aborted; row = left.shift()) {
      const one = row;
      const paused = pauses.get(row.key) ?? { failures: 0, dueMs: 0 };
      const isOld = record.use((state) => isSuperseded(state, one));
      try {
        const fate = isOld ? "superseded" : await publish(kube, row);
        if (fate === "gone") log(host, "info", "Its pod is gone: status dropped", podOf(row));
      } catch (error) {
        if (host.signal.aborted) return;
        health.count("api");
        const message = `Cannot publish network status: ${toCniError(error).message}`;
        const wasAway = isAway;
        isAway ||= isUnreachable(error);
        if (!wasAway) report(host, isAway ? away : paused, message, podOf(row));
        if (!isAway) later(paused, pauseMsMax);
        continue;
      }
      record.use((state) => forgetRow(state, one));
      pauses.delete(row.key);
    }
  };
  await Promise.all(Array.from({ length: workersMax }, worker));
  if (isAway) return later(away, awayMsMax);
  if (away.failures > 0) log(host, "info", "Network statuses are published again");
  Object.assign(away, { failures: 0, dueMs: 0 });
}

/** Says a failure once, then only at debug. */
function report(host: Host, { failures }: Pauses, message: string, fields: LogFields = {}): void {
  log(host, failures === 0 ? "warn" : "debug", message, fields);
}

const podOf = ({ pod }: Waiting) => ({ pod: `${pod.namespace}/${pod.name}` });

/** Half of the pause is chance: a thousand nodes must not come back in one moment. */
function later(paused: Pauses, max: number): void {
  const ms = Math.min(max, pauseMs * 2 ** Math.min(paused.failures, 20));
  paused.failures++;
  paused.dueMs = performance.now() + ms * (0.5 + Math.random() / 2);
}

/** No answer at all, or none that has to do with this pod. */
function isUnreachable(error: unknown): boolean {
  const status = statusOf(error);
  return status === undefined || status === 401 || status === 429 || status >= 500;
}

/** Publishes one row. @throws CniError 11 of a server that does not take it, or not yet */
async function publish(kube: Kube, row: Waiting): Promise<Fate> {
  try {
    await patchStatus(kube, row);
    return "published";
  } catch (error) {
    // The server's rights hide whether there is such a pod: it is read.
    if (![403, 404, 405, 409].includes(statusOf(error) ?? 0)) throw error;
    const { uid, namespace, name } = row.pod;
    const found = await kube.getPod(namespace, name).catch((reason: unknown) => {
      if (isNotFound(reason)) return undefined;
      throw reason;
    });
    if (!found) {
      const mayCome = isStaticUid(uid) && Date.now() - row.atMs < staticPodMs;
      if (mayCome) throw error;
      return "gone";
    }
    const { metadata } = found;
    if (uid === "" || metadata.uid === uid) throw error;
    // The API knows a static pod by its mirror, which has a uid of its own.
    if (metadata.annotations?.["kubernetes.io/config.mirror"] !== uid) return "gone";
    await patchStatus(kube, { ...row, pod: { ...row.pod, uid: metadata.uid } });
    return "published";
  }
}

/** The kubelet makes it of the pod's manifest: an MD5 in place of a UUID. */
function isStaticUid(uid: string): boolean {
  return /^[0-9a-f]{32}$/.test(uid);
}

/** Has the same pod got a newer sandbox, whose ADD publishes itself? */
function isSuperseded({ database }: State, { containerId, pod }: Waiting): boolean {
  if (pod.uid === "") return false;
  return (
    database
      .query(
        `SELECT 1 FROM attachments WHERE container_id <> ?1 AND state = 'attached'
           AND created_at_ms > (SELECT max(created_at_ms) FROM attachments WHERE container_id = ?1)
           AND json_valid(plan) AND json_extract(plan, '$.pod.uid') = ?2`,
      )
      .get(containerId, pod.uid) !== null
  );
}

interface StatusRow {
  container_id: string;
  request_ifname: string;
  pod_namespace: string;
  pod_name: string;
  pod_uid: string;
  annotations: string;
  at_ms: number;
}

/** What waits, oldest first; of a pod the newest alone. The others are forgotten. */
function waitingRows(host: Host, state: State): Waiting[] {
  const rows = state.database
    .query(`SELECT * FROM statuses ORDER BY at_ms LIMIT ${rowsMax}`)
    .all() as StatusRow[];
  const newest = new Map<string, Waiting>();
  for (const row of rows) {
    const waiting = readRow(row);
    if (!waiting) log(host, "warn", "Dropped a damaged status", { container: row.container_id });
    const { namespace, name, uid } = waiting?.pod ?? {};
    const older = waiting ? newest.get(`${namespace}/${name}/${uid}`) : undefined;
    if (waiting) newest.set(`${namespace}/${name}/${uid}`, waiting);
    if (!waiting) forgetRow(state, { ...idOf(row), text: row.annotations });
    else if (older) forgetRow(state, older);
  }
  return [...newest.values()];
}

const idOf = (row: StatusRow) => ({
  containerId: row.container_id,
  requestIfName: row.request_ifname,
});

function readRow(row: StatusRow): Waiting | undefined {
  const { pod_namespace: namespace, pod_name: name, pod_uid: uid, annotations: text } = row;
  const annotations = parseTexts(text);
  if (!annotations || namespace === "" || name === "") return undefined;
  const id = idOf(row);
  const key = JSON.stringify([id.containerId, id.requestIfName, row.at_ms]);
  return { ...id, key, atMs: row.at_ms, text, pod: { namespace, name, uid }, annotations };
}

function parseTexts(text: string): Record<string, string> | undefined {
  try {
    const value: unknown = JSON.parse(text);
    const isTexts = isObject(value) && Object.values(value).every((one) => typeof one === "string");
    return isTexts ? (value as Record<string, string>) : undefined;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Forgets a row, unless an ADD has put another one in its place. */
function forgetRow(state: State, row: Pick<Waiting, "containerId" | "requestIfName" | "text">) {
  write(state, () =>
    state.database
      .query(
        "DELETE FROM statuses WHERE container_id = ? AND request_ifname = ? AND annotations = ?",
      )
      .run(row.containerId, row.requestIfName, row.text),
  );
}
