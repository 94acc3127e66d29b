/**
 * ADD over all attachments of a container: the plan on record, one network after the other, the
 * results on record. What goes wrong in between is undone in reverse, the failed delegate included;
 * what cannot be undone stays on record for DEL and `genie gc`. Killed at any instant, it leaves
 * rows from which the next DEL or ADD undoes everything. Source: CNI SPEC 1.1 §2-§4; design D4-D8.
 */
import { isAbsolute } from "node:path";
import type { Added, Call, Chain, Host, Plan, Request } from "./call.ts";
import { CniError, code, log, oneLine, toCniError } from "./cni.ts";
import { closeState, openState, type State } from "./database.ts";
import type { Attached } from "./default_route.ts";
import { callPlugin, noter } from "./delegate.ts";
import { isObject, parseJson } from "./json.ts";
import { netnsId } from "./kernel.ts";
import { insertLedgerSql, openJournal, withAudit, writeAside, writeJournal } from "./ledger.ts";
import { newOperation, release } from "./lock.ts";
import { mergeResults, normalizeResult } from "./merge.ts";
import { findPod, makePlan, objectsOf } from "./plan.ts";
import type { Attachment, Result } from "./record.ts";
import { podLabel } from "./request.ts";
import { parseResult, toVersion } from "./result.ts";
import { enforcesPolicy, isConfigured, loadConfig } from "./settings.ts";
import { mark } from "./streams.ts";
import {
  attachedSql,
  putTrafficSql,
  setAttached,
  startTraffic,
  trafficSources,
  writeAhead,
} from "./write_ahead.ts";

/**
 * ADD: attaches the pod to every network it asked for, or to none.
 *
 * @returns the merged result in the version of the request
 * @throws CniError: what {@link makePlan} throws; the failed delegate's own; 105 when this
 *   container has the interface already; 106 when the plan cannot be written down; 11 when another
 *   operation of this container does not end in time
 */
export async function attach(host: Host, request: Request): Promise<object> {
  mark("load");
  if (request.config["delOnly"] === true) return passOn(request);
  const call = await beginCall(host, request);
  try {
    checkNetns(request.netns);
    const pod = await call.pod;
    for (;;) {
      try {
        const plan = await makePlan(call, pod);
        mark("plan");
        await writeAhead(beginAttempt(call, plan), plan.attachments);
        call.plan = plan;
        mark("intend");
        await runDelegates(call, plan);
        mark("attach");
        return toVersion(await commit(call, plan), request.cniVersion);
      } catch (error) {
        await (await import("./recovery/failed_add.ts")).rollBackOrThrow(call, error);
      } finally {
        call.enforced?.release();
      }
    }
  } catch (error) {
    await (await import("./recovery/failed_add.ts")).reportFailure(call, error);
    throw error;
  } finally {
    closeState(call.state);
  }
}

/**
 * With `delOnly` in its config, genie stands last in the list of the network that follows it, so
 * that the DEL of pods from before still reaches it: `genie uninstall --force` wrote that.
 * @throws CniError 50 where no network stands before it
 */
function passOn({ config: { prevResult } }: Request): object {
  if (isObject(prevResult)) return prevResult;
  const msg = "Cannot attach: genie is being uninstalled, and the node has no other network";
  throw new CniError(code.unavailable, msg);
}

/** Loads the plugin table, begins to look the pod up, and opens the record meanwhile. */
async function beginCall(host: Host, request: Request): Promise<Call> {
  const startedMs = host.now();
  const journal = openJournal(host, request);
  const loaded = await loadConfig(request.config).catch(async (error: unknown) => {
    const { noteUnconfigured } = await import("./recovery/failed_add.ts");
    await noteUnconfigured(host, request, journal, error);
    throw error;
  });
  const deadlineMs = startedMs + loaded.timeoutMs;
  const config = { ...loaded, kubernetes: { ...loaded.kubernetes, untilMs: deadlineMs } };
  host.log = { level: config.logLevel, file: config.logFile };
  mark("config");
  const known = { host, request, config, journal, startedMs };
  const operation = newOperation(host, request.containerId, "ADD");
  const { token } = operation;
  const chain = { host, netns: request.netns, token, deadlineMs, signal: host.signal, journal };
  const asking: Pick<Call, "host" | "request" | "config" | "objects"> = { host, request, config };
  const { readinessFile } = config;
  const pod =
    readinessFile === undefined
      ? findPod(asking)
      : import("./kubernetes/networks.ts")
          .then(({ waitUntilReady }) => waitUntilReady(host, readinessFile, deadlineMs))
          .then(() => findPod(asking));
  // Whoever waits for it is told; a call that fails before that has its own reason.
  pod.catch(() => undefined);
  const state = await openState(host, config.stateDir);
  mark("open");
  const progress = { made: [], undoErrors: new Map(), failed: new Map() };
  return Object.assign(asking, { ...known, state, operation, chain, pod, ...progress });
}

/** A further attempt, with another network of our choice, begins with nothing made. */
function beginAttempt(call: Call, plan: Plan): Call {
  call.journal.base = { ...call.journal.base, decidedBy: plan.decision };
  return Object.assign(call, { made: [], undoErrors: new Map(), enforced: undefined });
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
 * Runs the delegates of every attachment, in order, into `call.made`.
 * @throws CniError of the first that fails; `call.undoErrors` then has an entry for it
 */
async function runDelegates(call: Call, plan: Plan): Promise<void> {
  const { chain, made, config } = call;
  const { attachments } = plan;
  const [first] = attachments;
  const isAlone = attachments.length === 1 && !first?.defaultRoute && !first?.device;
  const order = isAlone ? undefined : await import("./default_route.ts");
  for (const group of order ? order.attachGroups(attachments, config.parallel) : [attachments]) {
    const adding = group.map((one): Promise<Attached> => {
      return order ? order.attachOne(chain, one, made) : addChain(chain, one);
    });
    if (made.length === 0) prepareCommit(call, plan);
    const ended = await Promise.all(adding);
    for (const [i, added] of ended.entries()) {
      const attachment = group[i];
      if (!attachment) continue;
      if (added.kind === "failed") call.undoErrors.set(attachment, added.undo);
      else {
        order?.giveUpDefaultRoutes(made, added.took);
        made.push({ attachment, result: added.result });
      }
    }
    for (const added of ended) if (added.kind === "failed") throw added.error;
  }
  if (call.host.signal.aborted) throw new CniError(code.tryAgainLater, "Asked to end during ADD");
  order?.refreshHostInterfaces(made);
  made.sort((a, b) => attachments.indexOf(a.attachment) - attachments.indexOf(b.attachment));
}

/**
 * Runs ADD through the chain. When plugin k fails, DEL runs on k, k-1 ... 0 before this returns
 * (CNI SPEC 1.1 §4), in its own time: an ADD whose time is over must still be undone.
 *
 * @returns the result with the pod's interface always in it, or the original error, with the
 *   delegate's own code, or 102-104, or 11 when it was ended from outside, or 7 when the result has
 *   not the address that the pod asks for
 */
export async function addChain(chain: Chain, attachment: Attachment): Promise<Added> {
  const { list, ifName, capabilityArgs } = attachment;
  const note = noter(chain, attachment, "ADD");
  let result: Result | undefined;
  for (const index of list.plugins.keys()) {
    try {
      const stdout = await callPlugin(chain, attachment, { command: "ADD", index, result });
      result = await readAnswer(stdout, attachment, index);
      if ("ips" in capabilityArgs || "mac" in capabilityArgs) {
        const { checkWishes } = await import("./kubernetes/networks.ts");
        if (list.plugins[index + 1] === undefined) await checkWishes(attachment, result);
      }
    } catch (error) {
      note(error);
      const { undoFailed } = await import("./recovery/failed_add.ts");
      return undoFailed(chain, attachment, { result, index, error: toCniError(error) });
    }
  }
  if (!result) throw new Error(`network ${attachment.network} has no plugins`);
  note(undefined, result);
  return { kind: "attached", result: normalizeResult(result, { ifName, netns: chain.netns }) };
}

/**
 * The result that a plugin printed.
 * @throws CniError 104 when it is none, or not that of the interface it was asked for
 */
async function readAnswer(stdout: string, attachment: Attachment, index: number): Promise<Result> {
  const { list, network, ifName } = attachment;
  const plugin = list.plugins[index] ?? { type: "" };
  const broken = async (issue: string, shown = stdout): Promise<CniError> => {
    const { protocolError } = await import("./recovery/delegate_error.ts");
    return protocolError(attachment, plugin, issue, shown);
  };
  if (stdout.trim() === "") throw await broken("it printed no result", "");
  let value: unknown;
  try {
    value = parseJson(stdout, "its output");
  } catch (error) {
    throw await broken(toCniError(error).message);
  }
  if (isObject(value) && typeof value["code"] === "number" && "msg" in value) {
    throw await broken("it printed an error but exited with status 0");
  }
  const what = `result of plugin "${plugin.type}" of network "${network}"`;
  const result = parseResult(value, list.cniVersion, what);
  // A delegate that reports only other pod interfaces did not do what it was asked.
  const inPod = result.interfaces.filter(({ sandbox = "" }) => sandbox !== "");
  if (inPod.length > 0 && !inPod.some(({ name }) => name === ifName)) {
    const found = oneLine(inPod[0]?.name ?? "", 40);
    throw await broken(`it reports interface "${found}" instead of "${ifName}"`, "");
  }
  return result;
}

/** True where the pod has a name and an API server to publish its networks to. */
export function wantsStatus(
  { host, config, objects }: Pick<Call, "host" | "config" | "objects">,
  { pod }: Plan,
): boolean {
  if (config.kubernetes.status === "off" || pod.name === "" || pod.namespace === "") return false;
  return objects?.used() === true || isConfigured(host, config.kubernetes);
}

/**
 * Puts the results on record, and policy in force before that.
 * @returns the result for the runtime, made before the commit: what fails is undone
 */
async function commit(call: Call, plan: Plan): Promise<Result> {
  const { host, config, state, made, journal } = call;
  const { pod, choice } = plan;
  const parts = made.map(({ attachment, result }) => {
    return { ifName: attachment.ifName, netns: attachment.netns, result };
  });
  const result = mergeResults(config.result === "primary" ? parts.slice(0, 1) : parts);
  if (enforcesPolicy(config)) {
    const { enforceAdd } = await import("./policy/enforce.ts");
    const objects = await objectsOf(call);
    call.enforced = await enforceAdd(call, { pod, objects }, made, call.chain);
    mark("policy");
  }
  const publisher = wantsStatus(call, plan)
    ? await import("./kubernetes/network_status.ts")
    : undefined;
  const status = await publisher?.makeStatus(call, plan, made);
  if (choice) (await import("./choice/choose.ts")).noteNumbers(journal, choice);
  withAudit(host, (isAudited) =>
    release(state, call.operation, () => {
      for (const { attachment, result: own } of made) {
        setAttached(state, attachment, toVersion(own, attachment.list.cniVersion));
      }
      if (status && !status.isInline) publisher?.putStatus(state, status, host.now());
      if (!isAudited) return;
      const sample = () => startTraffic(state, trafficSources(made), host.now());
      writeAside(host, state, "traffic", sample);
      writeJournal(host, state, journal);
    }),
  );
  mark("commit");
  // Committed: whatever happens to the status, the pod has its networks.
  call.enforced?.release();
  Object.assign(call, { enforced: undefined, plan: undefined });
  if (status?.isInline) await publisher?.publishOrKeep(call, status);
  log(host, "debug", "attached", { pod: podLabel(pod), container: call.request.containerId });
  return result;
}

/** Makes ready what follows the delegates: the first of them runs by now. */
function prepareCommit(call: Call, plan: Plan): void {
  if (wantsStatus(call, plan)) import("./kubernetes/network_status.ts").catch(() => undefined);
  warmUp(call.host, call.state);
}

/** A result with all that most results have. */
const example = `{"cniVersion": "1.0.0",
  "interfaces": [{"name": "veth0", "mac": "00"}, {"name": "eth0", "mac": "00", "sandbox": "/"}],
  "ips": [{"interface": 1, "address": "192.0.2.2/24", "gateway": "192.0.2.1"}],
  "routes": [{"dst": "0.0.0.0/0"}]}`;

/**
 * Runs what follows the delegates once, while this process would only wait: the first time costs
 * ten times what the next one does. Changes nothing, and fails nothing: the commit will say it.
 */
export function warmUp(host: Host, state: State): void {
  try {
    const result = parseResult(parseJson(example, "an example"), "1.0.0");
    JSON.stringify(toVersion(mergeResults([{ ifName: "eth0", netns: "/", result }]), "1.0.0"));
    for (const sql of [attachedSql, insertLedgerSql, putTrafficSql]) state.database.query(sql);
  } catch (error) {
    log(host, "debug", toCniError(error).message);
  }
}
