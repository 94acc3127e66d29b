/**
 * ADD over all attachments of a container. It writes the plan down under the container's lock,
 * attaches one network after the other, and commits the results. Whatever goes wrong in between is
 * undone in reverse, the failed delegate included; what cannot be undone stays in the record for
 * DEL and `genie gc`. A process killed at any instant leaves rows from which the next DEL or ADD of
 * the container can undo everything. Source: CNI SPEC 1.1 §2-§4; design D4, D6, D7, D8.
 */
import { existsSync } from "node:fs";
import { isAbsolute } from "node:path";
import type { Choice } from "./choice/choose.ts";
import { CniError, code, type Host, log, type Request, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { closeState, openState, type State, write } from "./database.ts";
import { attachGroups, attachOne, type Done, refreshHostInterfaces } from "./default_route.ts";
import { type ChainOptions, delChain, undoOptions } from "./delegate.ts";
import { isObject } from "./json.ts";
import {
  makeStatus,
  type PodStatus,
  prepareStatus,
  publishStatus,
  wantsStatus,
} from "./kubernetes/network_status.ts";
import {
  type Journal,
  noteChoice,
  openJournal,
  withAudit,
  writeAlone,
  writeAside,
  writeJournal,
} from "./ledger.ts";
import { newOperation, type Operation, release } from "./lock.ts";
import { netnsId } from "./netns.ts";
import { makePlan, type Plan, podLabel } from "./plan.ts";
import { type AskedPod, askForPod } from "./pod.ts";
import type { Enforced } from "./policy/enforce.ts";
import { mergeResults, type Result, toVersion, withoutDefaultRoutes } from "./result.ts";
import { enforcesPolicy, loadConfig, loadNodeSettings } from "./settings.ts";
import { type Attachment, forget, putStatus, setAttached, setEnded, setFailing } from "./state.ts";
import { oneLine } from "./text.ts";
import { mark } from "./trace.ts";
import { sampleTraffic, trafficSources } from "./traffic.ts";
import { undoAll } from "./undo.ts";
import { warmUp } from "./warm.ts";
import { intend, rememberRefusal } from "./write_ahead.ts";

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
  if (request.config["delOnly"] === true) return passOn(request);
  const startedMs = host.now();
  const journal = openJournal(host, request);
  const loaded = await loadConfig(request.config).catch(async (error: unknown) => {
    await noteUnconfigured(host, request, journal, error);
    throw error;
  });
  const untilMs = startedMs + loaded.timeoutMs;
  const config = { ...loaded, kubernetes: { ...loaded.kubernetes, untilMs } };
  host.log = { level: config.logLevel, file: config.logFile };
  mark("config");
  // The answer of an API server is on its way while the record is opened.
  const asked = config.readinessFile === undefined ? askForPod(host, config, request) : undefined;
  const state = openState(host, config.stateDir);
  mark("open");
  try {
    checkNetns(request.netns);
    await waitUntilReady(host, config, untilMs);
    const pod = asked ?? askForPod(host, config, request);
    const result = await attachBest({ host, request, config, state, journal, startedMs, pod });
    return toVersion(result, request.cniVersion);
  } catch (error) {
    writeAlone(host, state, journal, error);
    // Whoever looks at the pod finds an Event; the runtime is told in any case.
    const told = toCniError(error);
    if (told.rule)
      await (await import("./kubernetes/event.ts")).postDenial(host, config, journal.base, told);
    throw error;
  } finally {
    closeState(state);
  }
}

/**
 * With `delOnly` in its config, genie stands last in the list of the network that follows it, so
 * that the DEL of pods from before still reaches it: `genie uninstall --force` wrote that.
 * @throws CniError 50 where no network stands before it
 */
function passOn({ config: { prevResult } }: Request): object {
  if (isObject(prevResult)) return prevResult;
  throw new CniError(
    code.unavailable,
    "Cannot attach: genie is being uninstalled, and the node has no other network",
  );
}

/** An ADD without a valid configuration is told of where the record is said to be. */
async function noteUnconfigured(
  host: Host,
  request: Request,
  journal: Journal,
  cause: unknown,
): Promise<void> {
  try {
    const state = openState(host, (await loadNodeSettings(host, request.config)).stateDir);
    writeAlone(host, state, journal, cause);
    closeState(state);
  } catch (error) {
    log(host, "debug", `Cannot write the ledger: ${toCniError(error).message}`);
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
  pod: AskedPod;
}

/** Attaches; when a network of our own choice fails, the next best, where there is one. */
async function attachBest(call: Call): Promise<Result> {
  const { host, config, startedMs } = call;
  const failed = new Map<string, CniError>();
  for (;;) {
    const outcome = await attempt(call, failed).catch((error: unknown) => {
      const [first] = failed.values();
      // There is no other one to try: why the best one failed says more.
      throw first ? withOthers(first, [toCniError(error)]) : error;
    });
    if (outcome.kind === "attached") return outcome.result;
    const { network, error } = outcome;
    const before = [...failed.values()];
    failed.set(network, error);
    const isOver = host.signal.aborted || host.now() >= startedMs + config.timeoutMs;
    if (isOver || failed.size >= config.select.attempts) throw withOthers(error, before);
    log(host, "warn", "Chosen network failed, trying the next best", {
      container: call.request.containerId,
      network,
      error: error.message,
    });
  }
}

function withOthers(error: CniError, others: CniError[]): CniError {
  if (others.length === 0) return error;
  const details = [error.details, ...others.map((one) => `Another try: ${one.message}`)];
  return new CniError(error.code, error.message, {
    details: details.join("\n").trim(),
    cause: error,
  });
}

/**
 * Plans and attaches once.
 * @returns `failed` when a network of our own choice did not attach: another one may
 * @throws CniError for every other failure
 */
async function attempt(
  call: Call,
  errors: ReadonlyMap<string, CniError>,
): Promise<
  { kind: "attached"; result: Result } | { kind: "failed"; network: string; error: CniError }
> {
  const { host, request, config, state, journal, startedMs } = call;
  const failed = new Map([...errors].map(([network, { message }]) => [network, message]));
  const plan = await makePlan(host, config, request, { state, failed, journal }, call.pod);
  mark("plan");
  const { attachments: planned, pod, choice } = plan;
  journal.base = { ...journal.base, decidedBy: plan.decision };
  const operation = newOperation(host, request.containerId, "ADD");
  const chain: ChainOptions = {
    netns: request.netns,
    token: operation.token,
    deadlineMs: startedMs + config.timeoutMs,
    signal: host.signal,
    journal,
  };
  await intend(host, state, config, operation, planned, chain, startedMs).catch(
    (error: unknown) => {
      rememberRefusal(host, state, planned);
      throw error;
    },
  );
  mark("intend");
  const failures = new Set<Attachment>();
  try {
    const { result, status } = await attachAll(call, operation, plan, chain, failures);
    // Committed: whatever happens to the status, the pod has its networks.
    if (status?.isInline) {
      const deadlineMs = Math.min(chain.deadlineMs, host.now() + config.kubernetes.timeoutMs);
      await publishOrPut(host, state, plan, status, deadlineMs);
    }
    log(host, "debug", "attached", { pod: podLabel(pod), container: request.containerId });
    return { kind: "attached", result };
  } catch (error) {
    const chosen = planned.find(
      ({ network, ifName }) => network === choice?.network && plan.primarySet.has(ifName),
    );
    if (!choice || !chosen || !failures.has(chosen)) throw error;
    await noteNumbers(journal, choice);
    return { kind: "failed", network: choice.network, error: toCniError(error) };
  }
}

/** Leaves the numbers of a choice in the ledger, with the network it fell on. */
async function noteNumbers(journal: Journal, choice: Choice): Promise<void> {
  noteChoice(journal, choice.network, (await import("./choice/choose.ts")).formatChoice(choice));
}

/** How long an ADD waits for Multus' readiness file, in ms, and between two looks. */
const readyWaitMs = 45_000;
const readyPollMs = 100;

/**
 * A Multus config may name a file that says when the default network is ready. @throws CniError 11
 */
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
 * Refuses a network namespace that is absent, relative or our own: delegates check it after they
 * acted.
 * @throws CniError 4
 */
function checkNetns(netns: string): void {
  const found = netnsId(netns);
  const isOwn = found === netnsId("/proc/self/ns/net");
  // Delegates run in another folder: a relative path would lead them elsewhere.
  if (found !== "" && !isOwn && isAbsolute(netns)) return;
  const place = found === "" ? "it does not exist" : "it is not an absolute path";
  const issue = isOwn ? "it is the network namespace of genie itself" : place;
  const msg = `Invalid CNI_NETNS "${oneLine(netns, 200)}": ${issue}`;
  throw new CniError(code.invalidEnvironment, msg);
}

/**
 * Attaches everything and commits, or undoes everything and throws.
 *
 * @param failures filled with the attachments that failed by themselves
 * @returns the result for the runtime, made before the commit: what fails is undone
 */
async function attachAll(
  { host, config, state, journal }: Call,
  operation: Operation,
  plan: Plan,
  chain: ChainOptions,
  failures: Set<Attachment>,
): Promise<{ result: Result; status: PodStatus | undefined }> {
  const { attachments: planned } = plan;
  const done: Done[] = [];
  const undoErrors = new Map<Attachment, CniError[]>();
  let enforced: Enforced | undefined;
  try {
    for (const group of attachGroups(planned, config.parallel)) {
      const attaching = group.map((attachment) => attachOne(host, attachment, chain, done));
      // By now the first delegate runs.
      if (done.length === 0) {
        warmUp(host, state);
        if (wantsStatus(host, config, plan)) prepareStatus();
      }
      const results = await Promise.all(attaching);
      results.forEach((added, i) => {
        const attachment = group[i];
        if (!attachment) return;
        if (added.kind === "failed") {
          failures.add(attachment);
          undoErrors.set(attachment, added.undo);
        } else {
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
    if (enforcesPolicy(config)) {
      const { enforceAdd } = await import("./policy/enforce.ts");
      enforced = await enforceAdd({ host, config, state, journal }, plan, done, chain);
      mark("policy");
    }
    const status = await makeStatus(host, config, plan, done);
    if (plan.choice) await noteNumbers(journal, plan.choice);
    withAudit(host, (isAudited) =>
      release(state, operation, () => {
        for (const { attachment, result } of done) {
          setAttached(state, attachment, toVersion(result, attachment.list.cniVersion));
        }
        if (status && !status.isInline) putStatus(state, status, host.now());
        if (!isAudited) return;
        const sample = () => sampleTraffic(state, trafficSources(done), host.now());
        writeAside(host, state, "traffic", sample);
        writeJournal(host, state, journal);
      }),
    );
    mark("commit");
    return { result, status };
  } catch (error) {
    await rollBack(host, state, operation, planned, done, undoErrors, undoOptions(host, chain));
    await enforced?.undo();
    throw error;
  } finally {
    enforced?.release();
  }
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
