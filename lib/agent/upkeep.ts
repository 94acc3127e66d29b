/**
 * The agent's task that keeps the node in order: a table of jobs that are done one after the other,
 * each in its own time. A job that fails is logged once, and tried again when it is due.
 *
 * Two of them collect what was left behind: attachments that DEL gave up or whose container is gone
 * without a DEL, as after a reboot; addresses and locks that nobody holds. An attachment that lives
 * must never be collected: its network namespace must be gone for certain, twice in a row, and the
 * container runtime must not know the container, since it asks for the DEL of those it knows.
 */
import { log, toCniError } from "../cni.ts";
import { write } from "../database.ts";
import { detach } from "../detach.ts";
import { listsOf } from "../gc.ts";
import { criSocket, listSandboxes } from "../kubernetes/grpc.ts";
import { pause } from "../kubernetes/watch.ts";
import { beginJournal } from "../ledger.ts";
import { adoptRunning } from "../node/adopt.ts";
import { collectOne, findGarbage, netnsState, whyStale } from "../node/garbage.ts";
import { noted, openSite } from "../node/installation.ts";
import { findLiveContainers } from "../node/live_containers.ts";
import { askRuntimes, cniFolders } from "../node/runtimes.ts";
import type { StoredAttachment } from "../record.ts";
import { attachments, pruneLedger } from "../recorded.ts";
import { oldestSources, sampleTraffic } from "../recovery/traffic_rate.ts";
import { podLabel } from "../request.ts";
import { type Agent, pauseAfter } from "./task.ts";

/** The jobs, and how long after the end of one time the next one begins, in ms. */
const makeJobs = () => [
  { name: "adoption", everyMs: 60_000, run: adoptOthers },
  { name: "traffic", everyMs: 15_000, run: sampleAll },
  { name: "ledger", everyMs: 30_000, run: pruneAll },
  { name: "leftovers", everyMs: 20_000, run: attachmentCollector() },
  { name: "reservations", everyMs: 10 * 60_000, run: collectReservations },
];

const tickMs = 1_000;
/** The whole of a job may take so long, in ms: plugins may hang. */
const silenceMs = 10 * 60_000;

/** Runs the task until the host's signal aborts. */
export async function runUpkeep(agent: Agent): Promise<void> {
  const { host, health } = agent;
  const dueMs = new Map<string, number>();
  const failing = new Set<string>();
  const jobs = makeJobs();
  for (; !host.signal.aborted; await pause(tickMs, host.signal)) {
    health.beat("upkeep", silenceMs);
    for (const { name, everyMs, run } of jobs) {
      if (host.signal.aborted) return;
      if (performance.now() < (dueMs.get(name) ?? 0)) continue;
      try {
        await run(agent);
        if (failing.delete(name)) log(host, "info", `Upkeep works again: ${name}`);
      } catch (error) {
        const level = failing.has(name) ? "debug" : "warn";
        failing.add(name);
        log(host, level, `Upkeep failed: ${name}: ${toCniError(error).message}`);
      }
      dueMs.set(name, performance.now() + everyMs);
    }
  }
}

/**
 * What the runtime attached before it called genie: `genie install` in a container does not see the
 * network namespaces of the node, and an ADD of the runtime may end after it.
 */
async function adoptOthers({ host }: Agent): Promise<void> {
  const site = openSite("/");
  if (!noted(site, "conflist")) return;
  const folders = cniFolders(site, await askRuntimes(host, site.root));
  for (const { did, detail } of await adoptRunning(host, site, folders)) {
    log(host, did === "adopted" ? "info" : "debug", detail);
  }
}

/** Interfaces counted in one transaction, which others wait for, and how old a count may get. */
const turn = { max: 32, minAgeMs: 60_000 };

/** Counts what was not counted for a while, so that a choice between networks has fresh rates. */
async function sampleAll({ host, record }: Agent): Promise<void> {
  const sample = () =>
    record.change((state) => {
      const due = () => oldestSources(state, host.now(), turn);
      // Mostly there is none: no need to lock the others out.
      if (due().length === 0) return 0;
      return write(state, () => {
        const sources = due();
        sampleTraffic(state, sources, host.now());
        return sources.length;
      });
    });
  while ((await sample()) === turn.max && !host.signal.aborted) await pause(1, host.signal);
}

/** Steps of one time: more than a busy node writes meanwhile. */
const pruneStepsMax = 40;

/** Takes what is too old or too much off the ledger; DEL does too, but a node may be quiet. */
async function pruneAll({ host, config, record }: Agent): Promise<void> {
  const prune = () =>
    record.change((state) =>
      write(state, () => pruneLedger(state, host.now(), config.audit.keepMs)),
    );
  for (let step = 0; step < pruneStepsMax && !host.signal.aborted; step++) {
    if ((await prune()) === 0) return;
    await pause(1, host.signal);
  }
}

/** How long an attachment must seem left before it is collected, in ms. */
const confirmMs = 15_000;
/** Pause after a DEL of ours that did not succeed, and the longest one, in ms. */
const pauseMs = 60_000;
const pauseMsMax = 3_600_000;
/** DELs of one time at most, and the time after which no further one is begun, in ms. */
const batchMax = 32;
const batchMs = 120_000;

/**
 * Makes the job that collects attachments. It remembers from time to time what seemed left.
 * @param nowMs the monotonic clock
 */
export function attachmentCollector(nowMs = () => performance.now()) {
  const seen = new Map<string, { sinceMs: number; failures: number; dueMs: number }>();
  return async (agent: Agent): Promise<void> => {
    const { host, config, record } = agent;
    const all = record.use((state) => attachments(host, state));
    const rows = all.filter(({ parkedAs }) => !parkedAs);
    const startedMs = nowMs();
    const calls = Map.groupBy(rows, (row) => JSON.stringify([row.containerId, row.requestIfName]));
    for (const key of seen.keys()) if (!calls.has(key)) seen.delete(key);
    const due = [...calls].flatMap(([key, call]) => {
      const why = whyLeft(call);
      const entry = seen.get(key) ?? { sinceMs: startedMs, failures: 0, dueMs: 0 };
      if (why) seen.set(key, entry);
      else seen.delete(key);
      const isCertain = why !== "gone" || startedMs - entry.sinceMs >= confirmMs;
      return why && isCertain && startedMs >= entry.dueMs ? [{ why, call, entry }] : [];
    });
    if (due.length === 0) return;
    const known = await knownSandboxes(agent);
    if (!known) return;
    // A container whose namespace was moved elsewhere is alive all the same; where processes
    // cannot be seen all containers are.
    const alive = due.some(({ why }) => why === "gone") ? findLiveContainers() : undefined;
    const situation = { alive, windowMs: config.delRetryWindowMs, nowMs: host.now() };
    for (const { why, call, entry } of due.slice(0, batchMax)) {
      if (host.signal.aborted || nowMs() - startedMs > batchMs) return;
      const [{ containerId = "" } = {}] = call;
      if (why !== "leaked" && known.has(containerId)) continue;
      if (why === "gone" && call.some((row) => whyStale(row, situation) === undefined)) continue;
      if (await collectCall(agent, call, why)) continue;
      entry.dueMs = nowMs() + pauseAfter(entry.failures++, pauseMs, pauseMsMax);
    }
  };
}

type WhyLeft = "leaked" | "rebooted" | "gone";

/** Why nobody will ask for the DEL of a call; undefined: someone may. */
function whyLeft(rows: readonly StoredAttachment[]): WhyLeft | undefined {
  if (rows.length === 0) return undefined;
  if (rows.every(({ state }) => state === "leaked")) return "leaked";
  const states = new Set(rows.map(netnsState));
  if (states.has("unknown")) return undefined;
  return states.has("gone") ? "gone" : "rebooted";
}

/** Containers that the runtime knows: none without a runtime, undefined where it does not say. */
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

/** DEL of all attachments of a call, by DEL itself. @returns true when nothing is left of it */
async function collectCall(agent: Agent, rows: readonly StoredAttachment[], why: WhyLeft) {
  const { host, config, own, record } = agent;
  const [first] = rows;
  if (!first) return true;
  const { containerId, requestIfName, pod, cniPath } = first;
  const fields = {
    container: containerId,
    pod: podLabel(pod),
    networks: rows.map(({ network }) => network).join(","),
  };
  // Waits for the record as long as it is locked: where DEL does, everybody waits for DEL.
  await record.change((state) => write(state, () => undefined));
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
    await detach({ ...host }, request, (found) => whyLeft(found) !== undefined);
  } catch (error) {
    log(host, "debug", `Cannot collect: ${toCniError(error).message}`, fields);
  }
  const left = record.use((state) => attachments(host, state, containerId));
  if (left.some((row) => row.requestIfName === requestIfName && !row.parkedAs)) return false;
  const reason = why === "leaked" ? "DEL had given it up" : "its container is gone without a DEL";
  log(host, "info", `Collected an attachment: ${reason}`, fields);
  return true;
}

/**
 * Releases addresses that host-local keeps for nobody, and locks of dead processes, as `genie gc`
 * does. Reading all processes of the node is dear: not to be done often.
 * @throws CniError of the record
 */
async function collectReservations(agent: Agent): Promise<void> {
  const { host, config, record } = agent;
  const alive = findLiveContainers();
  if (!alive) return;
  const situation = { lists: [], alive, windowMs: config.delRetryWindowMs, nowMs: host.now() };
  const garbage = record.use((state) => {
    const lists = listsOf(attachments(host, state), config);
    return findGarbage(host, state, { ...situation, lists });
  });
  // Attachments have a job of their own, with more patience.
  const others = garbage.filter((one) => one.kind !== "attachment" || one.row.parkedAs);
  const known = others.length > 0 ? await knownSandboxes(agent) : undefined;
  if (!known) return;
  const nothing = { containerId: "", network: "", ifName: "" };
  const pod = { namespace: "", name: "", uid: "" };
  const journal = beginJournal(host, { command: "GC", ...nothing, pod, decidedBy: "agent" });
  const work = { host, state: record.state(), situation, journal, path: config.binDirs };
  for (const one of others) {
    if (host.signal.aborted) return;
    const reservation = one.kind === "reservation" ? one.reservation : undefined;
    if (reservation && known.has(reservation.containerId)) continue;
    const error = await collectOne(work, one);
    const { network, address, containerId: container } = reservation ?? {};
    const fields = { network, address, container, error: error?.message };
    const what = { lock: "A lock of a dead process", reservation: "An address of nobody" };
    const it = one.kind === "attachment" ? "A network that failed to attach" : what[one.kind];
    log(host, error ? "debug" : "info", `${it} ${error ? "stays" : "is released"}`, fields);
  }
}
