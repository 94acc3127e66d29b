/**
 * ADD over all attachments of a container. It writes the plan down under the container's lock,
 * attaches one network after the other, and commits the results. Whatever goes wrong in between is
 * undone in reverse, the failed delegate included; what cannot be undone stays in the record for DEL
 * and `genie gc`. A process killed at any instant leaves rows from which the next DEL or ADD of the
 * container can undo everything.
 * Source: CNI SPEC 1.1 §2-§4; design D4, D6, D7, D8.
 */
import { existsSync } from "node:fs";
import type { Choice } from "./choose.ts";
import { CniError, code, type Host, log, type Request, toCniError } from "./cni.ts";
import type { Config } from "./config.ts";
import { closeState, openState, type State, write } from "./database.ts";
import { type ChainOptions, delChain, undoOptions } from "./delegate.ts";
import { type Journal, openJournal, writeJournal } from "./ledger.ts";
import { newOperation, type Operation, release, takeLock } from "./lock.ts";
import { mayAddDefaultRoute } from "./netconf.ts";
import { interfacesIn, netnsId } from "./netns.ts";
import { attachOne, type Done, refreshHostInterfaces } from "./owner.ts";
import { makePlan, type Plan, podLabel } from "./plan.ts";
import { mergeResults, type Result, toVersion, withoutDefaultRoutes } from "./result.ts";
import { loadConfig } from "./settings.ts";
import {
  type Attachment,
  attachments,
  type CallId,
  endOf,
  forget,
  insertPlanned,
  putStatus,
  recorded,
  type StoredAttachment,
  setAttached,
  setEnded,
  setFailing,
} from "./state.ts";
import { makeStatus, type PodStatus, publishStatus } from "./status.ts";
import { oneLine } from "./text.ts";
import { mark } from "./trace.ts";
import { sampleTraffic, type TrafficSource } from "./traffic.ts";
import { undo, undoAll } from "./undo.ts";

/**
 * ADD: attaches the pod to every network it asked for, or to none.
 *
 * @returns the merged result in the version of the request
 * @throws CniError: what {@link makePlan} throws; the failed delegate's own; 105 when this
 *   container has the interface already; 106 when the plan cannot be written down; 11 when another
 *   operation of this container does not end in time
 */
export async function add(host: Host, request: Request): Promise<object> {
  mark("load");
  const startedMs = host.now();
  const journal = openJournal(host, request);
  const config = await loadConfig(request.config);
  host.log = { level: config.logLevel, file: config.logFile };
  checkNetns(request.netns);
  mark("config");
  const state = openState(host, config.stateDir);
  mark("open");
  const failed = new Map<string, string>();
  try {
    await waitUntilReady(host, config, startedMs + config.timeoutMs);
    for (;;) {
      const call = { host, request, config, state, journal, startedMs };
      const outcome = await attempt(call, failed);
      if (outcome.kind === "attached") return toVersion(outcome.result, request.cniVersion);
      // The next best, where the choice was ours and there is one.
      failed.set(outcome.network, outcome.error.message);
      if (failed.size >= config.select.attempts || host.signal.aborted) throw outcome.error;
    }
  } catch (error) {
    noteFailure(host, state, journal, error);
    throw error;
  } finally {
    closeState(state);
  }
}

/** One call of ADD, as its parts need it. */
interface Call {
  host: Host;
  request: Request;
  config: Config;
  state: State;
  journal: Journal;
  startedMs: number;
}

/**
 * Plans and attaches once.
 * @returns `failed` when a network of our own choice did not attach: another one may
 * @throws CniError for every other failure
 */
async function attempt(
  { host, request, config, state, journal, startedMs }: Call,
  failed: ReadonlyMap<string, string>,
): Promise<
  { kind: "attached"; result: Result } | { kind: "failed"; network: string; error: CniError }
> {
  const plan = await makePlan(host, config, request, { state, reserves: true, failed });
  mark("plan");
  const { attachments: planned, pod, choice } = plan;
  journal.base = { ...journal.base, podUid: pod.uid, decidedBy: plan.decision };
  const operation = newOperation(host, request.containerId, "ADD");
  const chain: ChainOptions = {
    netns: request.netns,
    token: operation.token,
    deadlineMs: startedMs + config.timeoutMs,
    signal: host.signal,
    journal,
  };
  await intend(host, state, operation, planned, chain, startedMs).catch((error: unknown) => {
    rememberRefusal(host, state, planned);
    throw error;
  });
  mark("intend");
  try {
    const result = await attachAll(host, state, operation, plan, config, chain);
    log(host, "debug", "attached", { pod: podLabel(pod), container: request.containerId });
    return { kind: "attached", result };
  } catch (error) {
    if (!choice) throw error;
    const own = toCniError(error);
    journal.rows.push({
      ...journal.base,
      kind: "call",
      outcome: "failed",
      code: own.code,
      error: own.message,
      choice: await numbersOf(choice),
    });
    return { kind: "failed", network: choice.network, error: own };
  }
}

/** The numbers of a choice, for the ledger. */
async function numbersOf(choice: Choice): Promise<string> {
  return (await import("./choose.ts")).formatChoice(choice);
}

/** A failed ADD is told in the ledger too, by a transaction of its own. */
function noteFailure(host: Host, state: State, journal: Journal, error: unknown): void {
  try {
    write(state, () => writeJournal(host, state, journal, { error }));
  } catch (failure) {
    log(host, "warn", toCniError(failure).message);
  }
}

/** How long an ADD waits for Multus' readiness file, in ms, and between two looks. */
const readyWaitMs = 45_000;
const readyPollMs = 100;

/** A Multus config may name a file that says when the default network is ready. @throws CniError 11 */
async function waitUntilReady(host: Host, config: Config, deadlineMs: number): Promise<void> {
  const { readinessFile } = config;
  if (readinessFile === undefined) return;
  const untilMs = Math.min(deadlineMs, host.now() + readyWaitMs);
  while (!existsSync(readinessFile)) {
    if (host.now() >= untilMs || host.signal.aborted) {
      throw new CniError(
        code.tryAgainLater,
        `Cannot attach yet: the default network is not ready, ${readinessFile} does not exist`,
      );
    }
    await Bun.sleep(readyPollMs);
  }
}

/**
 * Refuses a network namespace that is absent or our own: delegates check it after they acted.
 * @throws CniError 4
 */
function checkNetns(netns: string): void {
  const found = netnsId(netns);
  const isOwn = found === netnsId("/proc/self/ns/net");
  if (found !== "" && !isOwn) return;
  const issue = isOwn ? "it is the network namespace of genie itself" : "it does not exist";
  const msg = `Invalid CNI_NETNS "${oneLine(netns, 200)}": ${issue}`;
  throw new CniError(code.invalidEnvironment, msg);
}

/**
 * Takes the lock and writes the plan down, after undoing what an earlier attempt left (a killed
 * ADD, a failed DEL, a container started again after a reboot).
 */
async function intend(
  host: Host,
  state: State,
  operation: Operation,
  planned: Attachment[],
  chain: ChainOptions,
  startedMs: number,
): Promise<void> {
  const stale = await takeLock(host, state, operation, chain, () => {
    checkNotDeleted(state, planned, startedMs);
    const left = leftovers(host, state, planned);
    if (left.length === 0) insertUntaken(state, planned, host.now());
    return left;
  });
  if (stale.length === 0) return;
  try {
    const path = planned[0]?.cniPath.split(":") ?? [];
    await undoStored(host, state, stale.reverse(), path, undoOptions(host, chain));
    write(state, () => insertUntaken(state, planned, host.now()));
  } catch (error) {
    release(state, operation, () => undefined);
    throw error;
  }
}

/** The DEL that follows a refused ADD has nothing to undo: guessing would delete what is not ours. */
function rememberRefusal(host: Host, state: State, planned: Attachment[]): void {
  const [first] = planned;
  if (!first) return;
  try {
    write(state, () => {
      const { readable, damaged } = recorded(host, state, first.containerId);
      const rows: CallId[] = [...readable, ...damaged];
      const isKnown = rows.some((row) => row.requestIfName === first.requestIfName);
      // An end by DEL must stay one: other ADDs may have been overtaken by it as well.
      if (!isKnown && !endOf(state, first)) setEnded(state, first, "ADD", host.now());
    });
  } catch (error) {
    log(host, "warn", toCniError(error).message, { container: first.containerId });
  }
}

/**
 * Writes the plan down, unless the pod has an interface of a planned name that we did not make: a
 * delegate would refuse it (SPEC §2 "ADD"), and its DEL would then remove what is not ours.
 * @throws CniError 105
 */
function insertUntaken(state: State, planned: Attachment[], nowMs: number): void {
  const present = new Set(interfacesIn(planned[0]?.netns ?? ""));
  const taken = planned.find(({ ifName }) => present.has(ifName));
  if (taken) {
    throw new CniError(
      code.interfaceConflict,
      `Cannot attach network "${taken.network}": the pod has an interface "${taken.ifName}" ` +
        "already, and genie did not make it",
    );
  }
  insertPlanned(state, planned, nowMs);
}

/**
 * Refuses an ADD that was overtaken by a DEL of the same call, before it had the lock: its runtime
 * was killed or gave up, so nobody would ever delete what it attaches.
 * @throws CniError 11
 */
function checkNotDeleted(state: State, planned: Attachment[], startedMs: number): void {
  const [first] = planned;
  const end = first && endOf(state, first);
  if (end?.command !== "DEL" || end.atMs <= startedMs) return;
  throw new CniError(
    code.tryAgainLater,
    `Cannot ADD container ${first?.containerId}: it was deleted while this ADD was being prepared`,
  );
}

/** Attachments of an earlier attempt that are in the way; a live one in the way is an error. */
function leftovers(host: Host, state: State, planned: Attachment[]): StoredAttachment[] {
  const [first] = planned;
  if (!first) return [];
  const names = new Set(planned.map(({ ifName }) => ifName));
  const found = attachments(host, state, first.containerId).filter(
    (one) => one.requestIfName === first.requestIfName || names.has(one.ifName),
  );
  const here = netnsId(first.netns);
  const live = found.find(
    (one) => one.state === "attached" && [here, netnsId(one.netns)].includes(one.netnsId),
  );
  if (!live) return found;
  throw new CniError(
    code.interfaceConflict,
    `Container ${first.containerId} has interface "${live.ifName}" on network "${live.network}" ` +
      "already: DEL it before another ADD",
  );
}

/** Undoes stored attachments, or keeps them and says why the new ADD cannot go on. */
async function undoStored(
  host: Host,
  state: State,
  stale: StoredAttachment[],
  path: string[],
  chain: ChainOptions,
): Promise<void> {
  for (const attachment of stale) {
    const errors = await undo(host, attachment, path, { ...chain, netns: attachment.netns });
    if (errors.length > 0) {
      throw new CniError(
        code.tryAgainLater,
        `Cannot undo an earlier attempt on interface "${attachment.ifName}": ${errors[0]?.message}`,
        { cause: errors[0] },
      );
    }
    write(state, () => forget(state, attachment));
  }
}

/**
 * Attaches everything and commits, or undoes everything and throws.
 * @returns the result for the runtime, made before the commit: what fails is undone
 */
async function attachAll(
  host: Host,
  state: State,
  operation: Operation,
  plan: Plan,
  config: Config,
  chain: ChainOptions,
): Promise<Result> {
  const { attachments: planned } = plan;
  const done: Done[] = [];
  const undoErrors = new Map<Attachment, CniError[]>();
  try {
    for (const group of attachGroups(planned, config.parallel)) {
      const results = await Promise.all(
        group.map((attachment) => attachOne(host, attachment, chain, done)),
      );
      results.forEach((added, i) => {
        const attachment = group[i];
        if (!attachment) return;
        if (added.kind === "failed") undoErrors.set(attachment, added.undo);
        else {
          // It took the default route over: from here on the others have none.
          for (const other of done) other.result = withoutDefaultRoutes(other.result, added.took);
          done.push({ attachment, result: added.result });
        }
      });
      for (const added of results) if (added.kind === "failed") throw added.error;
    }
    if (host.signal.aborted) throw new CniError(code.tryAgainLater, "Asked to end during ADD");
    mark("attach");
    refreshHostInterfaces(done);
    done.sort((a, b) => planned.indexOf(a.attachment) - planned.indexOf(b.attachment));
    const result = mergeDone(done, config);
    const status = await makeStatus(host, config, plan, done);
    const choice = plan.choice ? await numbersOf(plan.choice) : "";
    release(state, operation, () => {
      for (const { attachment, result } of done) {
        setAttached(state, attachment, toVersion(result, attachment.list.cniVersion));
      }
      if (status && !status.isInline) putStatus(state, status, host.now());
      sampleTraffic(state, trafficOf(done), host.now());
      if (chain.journal) writeJournal(host, state, chain.journal, { choice });
    });
    mark("commit");
    if (status?.isInline) await publishOrPut(host, state, plan, status, chain.deadlineMs);
    return result;
  } catch (error) {
    await rollBack(host, state, operation, planned, done, undoErrors, undoOptions(host, chain));
    throw error;
  }
}

/** The host-side interface of each attachment, where its plugin tells of one: the last it names. */
function trafficOf(done: Done[]): TrafficSource[] {
  return done.flatMap(({ attachment: { containerId, ifName, network }, result }) => {
    const outside = result.interfaces.filter(({ sandbox }) => !sandbox).at(-1);
    return outside ? [{ containerId, ifName, network, hostIfName: outside.name }] : [];
  });
}

/** Publishes the status at once; what cannot be published waits for the agent. */
async function publishOrPut(
  host: Host,
  state: State,
  plan: Plan,
  status: PodStatus,
  deadlineMs: number,
): Promise<void> {
  const isPublished = await publishStatus(host, plan.objects.kube, status, deadlineMs);
  if (isPublished) return;
  try {
    write(state, () => putStatus(state, status, host.now()));
  } catch (error) {
    log(host, "warn", toCniError(error).message, { pod: podLabel(plan.pod) });
  }
}

/** The result for the runtime, from the attachments in the order of the plan. */
function mergeDone(done: Done[], config: Config): Result {
  const parts = done.map(({ attachment: { netns, ifName }, result }) => ({
    ifName,
    netns,
    result,
  }));
  return mergeResults(config.result === "primary" ? parts.slice(0, 1) : parts);
}

/**
 * Which attachments run side by side: none (CNI SPEC §3, NPWG §7.3), unless the table says so.
 * The first always runs alone, and one that may bring a default route too.
 */
function attachGroups(planned: Attachment[], parallel: boolean): Attachment[][] {
  if (!parallel) return planned.map((attachment) => [attachment]);
  const alone = planned.filter(
    ({ list, defaultRoute }, i) => i === 0 || defaultRoute || mayAddDefaultRoute(list),
  );
  const free = planned.filter((attachment) => !alone.includes(attachment));
  return [...alone.map((one) => [one]), ...(free.length > 0 ? [free] : [])];
}

/** Undoes in reverse what was attached; forgets what is gone, keeps what could not be undone. */
async function rollBack(
  host: Host,
  state: State,
  operation: Operation,
  planned: Attachment[],
  done: Done[],
  undoErrors: Map<Attachment, CniError[]>,
  chain: ChainOptions,
): Promise<void> {
  const results = new Map(done.map(({ attachment, result }) => [attachment, result]));
  await undoAll(
    done.toReversed().map(({ attachment }) => attachment),
    (attachment) => delChain(host, attachment, results.get(attachment), chain),
    undoErrors,
  );
  const nowMs = host.now();
  const kept = planned.filter((attachment) => (undoErrors.get(attachment) ?? []).length > 0);
  for (const attachment of kept) {
    log(host, "error", "Cannot undo a failed ADD: kept for DEL and genie gc", {
      container: attachment.containerId,
      network: attachment.network,
      interface: attachment.ifName,
      error: undoErrors.get(attachment)?.[0]?.message,
    });
  }
  try {
    release(state, operation, () => {
      for (const attachment of planned) {
        const error = undoErrors.get(attachment)?.[0]?.message;
        if (error === undefined) forget(state, attachment);
        else setFailing(state, attachment, { state: "failing", error, nowMs });
      }
      const [first] = planned;
      if (first && kept.length === 0) setEnded(state, first, "ADD", nowMs);
    });
  } catch (error) {
    // The rows stay as planned, and the lock names a process that is about to end: DEL undoes them
    // again, which costs a call and harms nothing.
    log(host, "error", toCniError(error).message, { container: operation.containerId });
  }
}
