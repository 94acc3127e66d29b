/**
 * The agent's search for what was left behind: attachments that DEL gave up, and attachments whose
 * container is gone without a DEL, as after a reboot. Each gets the DEL that it lacks, by the code
 * of DEL itself.
 *
 * An attachment that lives must never be taken for one that is left. So its network namespace must
 * be gone for certain, at two looks; and where there is a container runtime, that must not know the
 * container any more: of those it knows it will ask the DEL itself.
 */

import { type Host, log, type StdinConfig, toCniError } from "../cni.ts";
import { collectOne, findGarbage, listsOf, netnsFate, whyStale } from "../collect.ts";
import { write } from "../database.ts";
import { del } from "../detach.ts";
import { criSocket, listSandboxes } from "../kubernetes/cri.ts";
import { beginJournal } from "../ledger.ts";
import { lookAround } from "../live_containers.ts";
import { attachments, type StoredAttachment } from "../state.ts";
import type { Agent } from "./part.ts";

/** How long an attachment must seem left before it is, in ms. */
const confirmMs = 15_000;
/** Pause after a DEL of ours that did not succeed, and the longest one, in ms. */
const pauseMs = 60_000;
const pauseMsMax = 3_600_000;
/** DELs of one look at most, and the time after which no further one is begun, in ms. */
const batchMax = 32;
const batchMs = 120_000;

/** All attachments of one call of the runtime. */
type Call = readonly StoredAttachment[];

/** Looks once, and collects. Remembers from look to look. @throws CniError of the record */
export type Collector = (agent: Agent) => Promise<void>;

/** @param own the CNI config by which the runtime calls genie */
export function newCollector(own: StdinConfig, nowMs = () => performance.now()): Collector {
  const seen = new Map<string, { sinceMs: number; failures: number; dueMs: number }>();
  return async (agent) => {
    const { host, record } = agent;
    const calls = byCall(record.use((state) => attachments(host, state)));
    const left = [...calls].filter(([, rows]) => whyLeft(rows) !== undefined);
    const keys = new Set(left.map(([key]) => key));
    for (const key of seen.keys()) if (!keys.has(key)) seen.delete(key);
    const startedMs = nowMs();
    for (const key of keys) {
      if (!seen.has(key)) seen.set(key, { sinceMs: startedMs, failures: 0, dueMs: 0 });
    }
    const due = left.filter(([key, rows]) => {
      const { sinceMs = startedMs, dueMs = 0 } = seen.get(key) ?? {};
      const isCertain = whyLeft(rows) !== "gone" || startedMs - sinceMs >= confirmMs;
      return isCertain && startedMs >= dueMs;
    });
    if (due.length === 0) return;
    const known = await knownSandboxes(agent);
    if (!known) return;
    // Whoever has moved its namespace elsewhere is alive all the same; where nobody can be seen
    // everybody is.
    const alive = due.some(([, rows]) => whyLeft(rows) === "gone") ? lookAround() : undefined;
    for (const [key, rows] of due.slice(0, batchMax)) {
      if (host.signal.aborted || nowMs() - startedMs > batchMs) return;
      const [{ containerId = "" } = {}] = rows;
      const why = whyLeft(rows);
      if (why !== "leaked" && known.has(containerId)) continue;
      const { delRetryWindowMs: windowMs } = agent.config;
      const situation = { alive, windowMs, nowMs: host.now() };
      const isSeen = rows.some((row) => whyStale(row, situation) === undefined);
      if (why === "gone" && isSeen) continue;
      const isDone = await collect(agent, own, rows);
      const entry = seen.get(key);
      if (isDone || !entry) continue;
      entry.dueMs = nowMs() + Math.min(pauseMsMax, pauseMs * 2 ** Math.min(entry.failures++, 10));
    }
  };
}

function byCall(rows: readonly StoredAttachment[]): Map<string, Call> {
  return Map.groupBy(rows, (row) => JSON.stringify([row.containerId, row.requestIfName]));
}

/** Why nobody will ask for the DEL of a call; undefined: someone may. */
function whyLeft(rows: Call): "leaked" | "rebooted" | "gone" | undefined {
  if (rows.length === 0) return undefined;
  if (rows.every(({ state }) => state === "leaked")) return "leaked";
  const fates = new Set(rows.map(netnsFate));
  if (fates.has("unknown")) return undefined;
  return fates.has("gone") ? "gone" : "rebooted";
}

/** What the runtime knows; undefined where it does not say. */
async function knownSandboxes({ host, config }: Agent): Promise<Set<string> | undefined> {
  const socket = criSocket(config.agent.criSocket);
  if (socket === undefined) return new Set();
  try {
    return await listSandboxes(host, socket);
  } catch (error) {
    log(host, "warn", `${toCniError(error).message}: nothing is collected`);
    return undefined;
  }
}

/**
 * Releases addresses that host-local keeps for nobody, and locks of dead processes, as `genie gc`
 * does. A look at all processes of the node is dear: not to be done often.
 * @throws CniError of the record
 */
export async function collectStray(agent: Agent): Promise<void> {
  const { host, config, record } = agent;
  const alive = lookAround();
  if (!alive) return;
  const { delRetryWindowMs: windowMs } = config;
  const garbage = record.use((state) => {
    const lists = listsOf(attachments(host, state), config);
    return findGarbage(host, state, { lists, alive, windowMs, nowMs: host.now() });
  });
  // Attachments have their own way, with more patience.
  const stray = garbage.filter(({ kind }) => kind !== "attachment");
  const known = stray.length > 0 ? await knownSandboxes(agent) : undefined;
  if (!known) return;
  const state = record.state();
  const situation = { lists: [], alive, windowMs, nowMs: host.now() };
  const nobody = { namespace: "", name: "", uid: "" };
  const call = { command: "GC", containerId: "", network: "", ifName: "", pod: nobody };
  const journal = beginJournal(host, { ...call, decidedBy: "agent" });
  const work = { host, state, situation, journal, path: config.binDirs };
  for (const one of stray) {
    if (host.signal.aborted) return;
    const reservation = one.kind === "reservation" ? one.reservation : undefined;
    if (reservation && known.has(reservation.containerId)) continue;
    const error = await collectOne(work, one);
    const { network, address, containerId: container } = reservation ?? {};
    const fields = { network, address, container, error: error?.message };
    const what = one.kind === "lock" ? "A lock of a dead process" : "An address of nobody";
    log(host, error ? "debug" : "info", `${what} ${error ? "stays" : "is released"}`, fields);
  }
}

/** @returns true when nothing is left of the call */
async function collect(agent: Agent, own: StdinConfig, rows: Call): Promise<boolean> {
  const { host, config, record } = agent;
  const [first] = rows;
  if (!first) return true;
  const { containerId, requestIfName, pod, cniPath } = first;
  const why = whyLeft(rows);
  const fields = {
    container: containerId,
    pod: `${pod.namespace}/${pod.name}`,
    networks: rows.map(({ network }) => network).join(","),
  };
  // Gives up at once where DEL would wait for the record, and everybody for DEL.
  record.use((state) => write(state, () => undefined));
  const request = {
    command: "DEL" as const,
    containerId,
    netns: why === "leaked" ? first.netns : "",
    ifName: requestIfName,
    args: "",
    path: [...cniPath.split(":"), ...config.binDirs].filter((dir) => dir !== ""),
    cniVersion: "1.0.0" as const,
    config: { ...own, delOnly: true },
  };
  try {
    // A copy: it puts its own settings of the log there.
    const quiet: Host = { ...host };
    await del(quiet, request, (found) => whyLeft(found) !== undefined);
  } catch (error) {
    log(host, "debug", `Cannot collect: ${toCniError(error).message}`, fields);
  }
  const left = record.use((state) => attachments(host, state, containerId));
  const isDone = !left.some((row) => row.requestIfName === requestIfName);
  const reason = why === "leaked" ? "DEL had given it up" : "its container is gone without a DEL";
  if (isDone) log(host, "info", `Collected an attachment: ${reason}`, fields);
  return isDone;
}
