/**
 * The agent's task of network policy: keeps the inputs in the record fresh, and the ruleset of each
 * network namespace of this node as they ask. A namespace is written only when its text changes.
 * The record decides: what is attached is read there, again under the lock of a namespace before
 * its rules change. An ADD that read older inputs than ours is seen by its commit (`PRAGMA
 * data_version`) and compiled again. Nothing changes until every collection was listed.
 */
import type { Host } from "../call.ts";
import { log, toCniError } from "../cni.ts";
import { closeState, write } from "../database.ts";
import { netnsId } from "../kernel.ts";
import { connect } from "../kubernetes/client.ts";
import { postEvent } from "../kubernetes/event.ts";
import { pause } from "../kubernetes/watch.ts";
import {
  compileHostPolicies,
  hostTables,
  type PolicyWorld,
  policyProblems,
  policyWorld,
  type Rules,
} from "../policy/compile.ts";
import { type HostEnds, hostEndsOf } from "../policy/host_ends.ts";
import { readRuleset, rulesetHash } from "../policy/nft.ts";
import { heldBy, readNodeIps } from "../policy/node_addresses.ts";
import type { Policy, PolicyPod, PolicyProblem } from "../policy/objects.ts";
import {
  type Attached,
  differenceOf,
  guardedOf,
  installRuleset,
  isEnforced,
  lockNetns,
  policyAttachments,
  removeFromHost,
  sameRules,
} from "../policy/rulesets.ts";
import {
  forgetRuleset,
  leftoverRulesets,
  putInputs,
  putProblems,
  storedRuleset,
  storedRulesets,
} from "../policy/store.ts";
import { apiVersionOf, openPolicyWatch } from "../policy/watch.ts";
import type { PodIdentity } from "../record.ts";
import { attachments, attachmentsIn } from "../recorded.ts";
import { podLabel } from "../request.ts";
import {
  type Agent,
  forAll,
  isLocked,
  isReplaced,
  lockedPauseMs,
  openAgentState,
  openPatience,
} from "./task.ts";

/** Longest pause between two decisions while changes keep coming, in ms. */
const restMsMax = 400;
/** How often the record is read for attachments that came or went, in ms. */
const pollMs = 250;
/** Changes of the inputs are taken together for this long, in ms. */
const gatherMs = 30;
/** Namespaces whose rules are written at once: a run of nft is one process. */
const writersMax = 4;
/** How long another genie at the same namespace is waited for, in ms. */
const lockWaitMs = 5_000;
/** Freshness is written this often where nothing else is, at most, in ms. */
const aliveWriteMs = 10_000;
/** One namespace after the other, and the node's addresses, are looked at this far apart, in ms. */
const auditMs = 2_000;
/** Problems are gathered this long after a change, in ms: nobody waits for them. */
const problemsMs = 2_000;
/** Events about problems posted at once at most: `genie report` has them all. */
const eventsMax = 20;
/** A change that waits for longer counts as lag before it is in force, in ms. */
const lagMs = 1_000;
/** Pause after a failure of the record, in ms. */
const troubleMs = 1_000;

/** One network namespace of this node with attachments. */
interface PodNetns {
  netnsId: string;
  netns: string;
  containerId: string;
  pod: PodIdentity;
  made: Attached[];
  /** On record. */
  rules: Rules;
  ends: HostEnds;
  problems: PolicyProblem[];
}

/** What policies say, and of which pods. */
type Known = { world: PolicyWorld; pods: Map<string, PolicyPod>; enforcesPlain: boolean };

/** The task at work. Times are on the monotonic clock, in ms; 0: none. */
type PolicyWork = ReturnType<typeof beginWork>;

function beginWork(agent: Agent, onChange: () => void) {
  const { host, config } = agent;
  // A connection of its own: its transactions are many.
  const state = openAgentState(host, config.stateDir);
  const { enforce, maxAgeMs } = config.policy;
  return {
    ...agent,
    state,
    watch: openPolicyWatch(host, state, { enforce, maxAgeMs, onChange }),
    /** By network namespace. */
    local: new Map<string, PodNetns>(),
    /** The node's own addresses as they are on record. */
    node: { ips: [] as string[], held: new Set<string>() },
    /** `PRAGMA data_version` at which `local` was read; -1 not yet. */
    version: -1,
    /** Undefined before the first whole list. */
    known: undefined as Known | undefined,
    /** When the oldest change that is not in `known` came. */
    changedMs: 0,
    /** How long the newest decision took: a storm of changes must not take all of a core. */
    decidedMs: 0,
    problemsDueMs: 0,
    auditDueMs: 0,
    audited: new Set<string>(),
    /** Namespaces whose rules could not be written: the record has them, the kernel may not. */
    failed: new Set<string>(),
    retryDueMs: 0,
    /** Has each namespace been compared with the kernel since we began? */
    isVerified: false,
    isPosting: false,
    /** Of the watches, as far as `health` has counted it. */
    counted: { failures: 0, garbage: 0 },
  };
}

/** Runs the task until the host's signal aborts. @throws CniError 7, 106 */
export async function runPolicy(agent: Agent): Promise<void> {
  const { host, config, health } = agent;
  const kube = await connect(host, config.kubernetes);
  let change = Promise.withResolvers<void>();
  const work = beginWork(agent, () => {
    work.changedMs ||= performance.now();
    change.resolve();
  });
  const watching = work.watch.run(kube, host.signal);
  const patience = openPatience();
  try {
    while (!host.signal.aborted) {
      if (work.changedMs === 0) {
        change = Promise.withResolvers();
        await Promise.race([change.promise, pause(pollMs, host.signal)]);
      }
      // A share of the time is for others, yet an edit is in force within a second.
      const restMs = Math.min(restMsMax, work.decidedMs * 5);
      if (work.changedMs > 0) await pause(gatherMs + restMs, host.signal);
      reportHealth(work);
      const { changedMs } = work;
      await round(work).then(patience.renew, async (error: unknown) => {
        work.version = -1;
        work.changedMs ||= changedMs;
        if (patience.has(error)) return pause(lockedPauseMs, host.signal);
        health.count("database");
        log(host, "error", `Network policy waits for the record: ${toCniError(error).message}`);
        await pause(troubleMs, host.signal);
      });
    }
    await watching;
  } finally {
    closeState(work.state);
  }
}

/** Called often: the figures are never old. */
function reportHealth({ health, watch, counted, changedMs }: PolicyWork): void {
  health.beat("policy");
  // What is not in force yet lags, too: while the record cannot be written it may be long.
  const waitedMs = changedMs > 0 && watch.isComplete() ? performance.now() - changedMs : 0;
  if (waitedMs > lagMs) health.policyLagMs = waitedMs;
  const all = [...watch.counts.values()];
  const failures = all.reduce((sum, one) => sum + one.failures, 0);
  const garbage = all.reduce((sum, one) => sum + one.garbage, 0);
  health.count("api", failures - counted.failures);
  health.count("garbage", garbage - counted.garbage);
  Object.assign(counted, { failures, garbage });
}

/** Compares everything once, and does what is due. @throws CniError of the record */
async function round(work: PolicyWork): Promise<void> {
  const { host, watch, health } = work;
  if (isReplaced(work.state)) {
    // It was set aside, or made anew: everything of ours goes into the new one.
    closeState(work.state);
    work.state = openAgentState(host, work.config.stateDir);
    work.version = -1;
    work.node.ips = [];
    watch.rewrite();
  }
  watch.flush(work.state, aliveWriteMs);
  const isReread = await readAttached(work);
  if (isReread || performance.now() >= work.auditDueMs) readNode(work);
  if (!watch.isComplete()) return;
  const sinceMs = work.changedMs;
  const startedMs = performance.now();
  const isNews = sinceMs > 0 || work.known?.enforcesPlain !== enforcesPlain(work);
  if (isNews) learn(work);
  if (work.known && (sinceMs > 0 || isReread)) {
    const due = work.local.values().filter((one) => isDue(work, one));
    const ids = [...due.map((one) => one.netnsId)];
    if (isNews) work.decidedMs = performance.now() - startedMs;
    const written = await reconcileAll(work, ids);
    const tookMs = sinceMs === 0 ? undefined : Math.round(performance.now() - sinceMs);
    if (tookMs !== undefined) health.policyLagMs = tookMs;
    if (written > 0) {
      log(host, "info", "Network policy rewritten", { namespaces: written, lagMs: tookMs });
    }
    work.problemsDueMs ||= performance.now() + problemsMs;
  }
  if (!work.isVerified) await verifyAll(work);
  // What could not be written before.
  if (work.failed.size > 0 && performance.now() >= work.retryDueMs) {
    await reconcileAll(work, [...work.failed], true);
  }
  if (work.problemsDueMs > 0 && performance.now() >= work.problemsDueMs) noteProblems(work);
  if (performance.now() >= work.auditDueMs) await audit(work);
}

/** Reads what is attached, where the record has changed. @returns true when it was read */
async function readAttached(work: PolicyWork): Promise<boolean> {
  const { host, state } = work;
  const row = state.database.query("PRAGMA data_version").get() as { data_version: number };
  if (row.data_version === work.version) return false;
  // Rules of namespaces that are gone, after a DEL that was not heard of or a reboot.
  for (const one of work.version === -1 ? leftoverRulesets(state) : []) {
    await removeFromHost(host, one);
    write(state, () => forgetRuleset(state, one.netnsId));
  }
  work.local = readLocal(work);
  work.version = row.data_version;
  return true;
}

/** Puts the addresses of the node on record where they changed: its pods' rules name them. */
function readNode(work: PolicyWork): void {
  const { state, node } = work;
  const ips = readNodeIps()?.filter((ip) => !node.held.has(ip));
  if (!ips || ips.join() === node.ips.join()) return;
  const row = { resource: "node-addresses", namespace: "", name: "" } as const;
  write(state, () => putInputs(state, [{ ...row, object: JSON.stringify(ips) }]));
  node.ips = ips;
  work.changedMs ||= performance.now();
}

/** Reads the namespaces with attachments; the ends of those that did not change are kept. */
function readLocal({ host, config, state, local, node }: PolicyWork): PolicyWork["local"] {
  const rulesets = new Map(storedRulesets(state).map((one) => [one.netnsId, one]));
  const all = new Map<string, PodNetns>();
  const everything: Attached[] = [];
  for (const [id, rows] of Map.groupBy(attachments(host, state), (one) => one.netnsId)) {
    const made = guardedOf(rows);
    everything.push(...made);
    const first = made.find(({ attachment }) => attachment.pod.namespace !== "");
    if (!first || id === "") continue;
    const { netns, pod } = first.attachment;
    const stored = rulesets.get(id);
    const { containerId } = stored ?? first.attachment;
    const rules: Rules = stored ?? { ruleset: "", hostRuleset: "" };
    const known = local.get(id);
    const { problems = [] } = known ?? {};
    const isSame = known !== undefined && isSameMade(known.made, made);
    const place = { netnsId: id, netns };
    const ends = isSame ? known.ends : hostEndsOf(state, config.policy.where, place, made);
    all.set(id, { ...place, containerId, pod, made, rules, ends, problems });
  }
  node.held = heldBy(everything);
  return all;
}

/** True for the same interfaces, with the same ends on the node. */
export function isSameMade(a: readonly Attached[], b: readonly Attached[]): boolean {
  const keyOf = (made: readonly Attached[]) =>
    JSON.stringify(
      made.map(({ attachment: { ifName, state }, result }) => [ifName, state, result.interfaces]),
    );
  return keyOf(a) === keyOf(b);
}

/** Takes the inputs as they are now. */
function learn(work: PolicyWork): void {
  const { enforce } = work.config.policy;
  const plain = enforcesPlain(work);
  const isOurs = (one: Policy) => isEnforced(one, enforce) && (plain || !isEnforced(one, false));
  const inputs = work.watch.inputs();
  const world = policyWorld({ ...inputs, policies: inputs.policies.filter(isOurs) });
  const pods = new Map(inputs.pods.map((pod) => [podLabel(pod), pod]));
  work.known = { world, pods, enforcesPlain: plain };
  work.changedMs = 0;
}

/** Is plain NetworkPolicy ours anywhere? An ADD may have read a table that is newer than ours. */
function enforcesPlain({ config: { plugins }, local }: PolicyWork): boolean {
  const isOnRecord = ({ made }: PodNetns) => made.some((one) => one.attachment.enforcesPlain);
  return plugins.values().some((one) => one.enforcePolicy) || local.values().some(isOnRecord);
}

/**
 * Compiles for one namespace; undefined while its pod is not known: its rules stay. One that was
 * made anew under the same name is another pod, with labels of its own.
 */
function compile({ known, node }: PolicyWork, { pod, containerId, ends, made }: PodNetns) {
  const target = known?.pods.get(podLabel(pod));
  if (!known || !target || (pod.uid !== "" && target.uid !== pod.uid)) return undefined;
  const ips = [...target.hostIps, ...node.ips];
  const policed = policyAttachments(made, { ips, held: node.held }, ends);
  return compileHostPolicies(known.world, target, policed, containerId);
}

function isDue(work: PolicyWork, one: PodNetns): boolean {
  const compiled = compile(work, one);
  if (!compiled) return false;
  one.problems = compiled.problems;
  return !sameRules(compiled, one.rules);
}

/** Reconciles some at a time. @returns how many were written */
async function reconcileAll(work: PolicyWork, ids: readonly string[], isForced = false) {
  let written = 0;
  await forAll(ids, writersMax, async (id) => {
    if (await reconcile(work, id, isForced)) written++;
  });
  return written;
}

/**
 * Makes the rules of a namespace what they should be, by the record as it is under its lock.
 *
 * @param isForced also where the record says that they are so already
 * @returns true when they were written
 * @throws CniError 11 where the record is locked: the round begins anew
 */
async function reconcile(work: PolicyWork, id: string, isForced: boolean): Promise<boolean> {
  const { host, state, local, failed } = work;
  const one = local.get(id);
  if (!one || netnsId(one.netns) !== id) {
    failed.delete(id);
    return false;
  }
  try {
    const lock = await lockNetns(host, state, id, host.now() + lockWaitMs);
    try {
      const made = guardedOf(attachmentsIn(host, state, id));
      // Attached anew meanwhile, it has other ends.
      if (!isSameMade(made, one.made)) {
        one.ends = hostEndsOf(state, work.config.policy.where, one, made);
      }
      one.made = made;
      const compiled = made.length > 0 ? compile(work, one) : undefined;
      if (!compiled) return false;
      one.rules = compiled;
      if (sameRules(storedRuleset(state, id), one.rules) && !isForced) return false;
      const { containerId, pod } = one;
      const row = { containerId, podNamespace: pod.namespace, podName: pod.name };
      await installRuleset(host, state, one.netns, { netnsId: id, ...row, ...one.rules });
      failed.delete(id);
      return true;
    } finally {
      lock.release();
    }
  } catch (error) {
    // Read again in the next round; and written again, since the record is ahead of the kernel.
    work.version = -1;
    if (host.signal.aborted || netnsId(one.netns) !== id) return false;
    if (isLocked(error)) throw error;
    const level = failed.has(id) ? "debug" : "error";
    failed.add(id);
    work.retryDueMs = performance.now() + troubleMs;
    log(host, level, `Cannot keep the network policy: ${toCniError(error).message}`, {
      pod: podLabel(one.pod),
    });
    return false;
  }
}

/** After a start: what is in force may not be what the record says. */
async function verifyAll(work: PolicyWork): Promise<void> {
  const { host } = work;
  let put = 0;
  const ruled = work.local.values().filter(({ rules }) => !sameRules(rules, undefined));
  await forAll([...ruled], writersMax, async (one) => {
    const difference = await differenceOf(host, one.netns, one.rules).catch(toCniError);
    if (difference === undefined || netnsId(one.netns) !== one.netnsId) return;
    if (await reconcile(work, one.netnsId, true)) put++;
  });
  work.isVerified = true;
  if (put > 0) log(host, "warn", "Network policy was not in force and is again", { put });
}

/** Checks one namespace after the other: is a ruleset of ours there, and the right one? */
async function audit(work: PolicyWork): Promise<void> {
  const { host, local, audited, failed } = work;
  work.auditDueMs = performance.now() + auditMs;
  const isNext = ({ netnsId: id, rules }: PodNetns) =>
    !sameRules(rules, undefined) && !audited.has(id);
  const next = local.values().find(isNext);
  if (!next) return audited.clear();
  audited.add(next.netnsId);
  if (netnsId(next.netns) !== next.netnsId) return;
  // What cannot be read, or could not be written yet, was not taken away by somebody.
  if ((await isInForce(host, next).catch(toCniError)) !== false) return;
  if (failed.has(next.netnsId)) return;
  if (!(await reconcile(work, next.netnsId, true))) return;
  log(host, "warn", "Network policy was taken away from outside and is in force again", {
    pod: podLabel(next.pod),
  });
}

/** Are the tables of a pod there, by their comment? Cheap: their rules are not compared. */
async function isInForce(host: Host, { netns, rules, containerId }: PodNetns): Promise<boolean> {
  const hashOf = (text: string) => (text === "" ? undefined : rulesetHash(text));
  if ((await readRuleset(host, netns)) !== hashOf(rules.ruleset)) return false;
  for (const table of hostTables(containerId)) {
    if (!rules.hostRuleset.includes(`\ntable ${table} {`)) continue;
    if ((await readRuleset(host, undefined, table)) !== hashOf(rules.hostRuleset)) return false;
  }
  return true;
}

/** Puts what is wrong with policies on record, and what is new as Events on them. */
function noteProblems(work: PolicyWork): void {
  const { host, state, known, local, isPosting } = work;
  work.problemsDueMs = 0;
  if (!known) return;
  // While others are posted, what is put on record would never be; nor while it is locked.
  work.problemsDueMs = performance.now() + problemsMs;
  if (isPosting) return;
  const all = [...policyProblems(known.world), ...local.values().flatMap((one) => one.problems)];
  const fresh = write(state, () => putProblems(state, all, host.now()));
  work.problemsDueMs = 0;
  if (fresh.length === 0) return;
  work.isPosting = true;
  void postProblems(work, known.world, fresh).finally(() => {
    work.isPosting = false;
  });
}

/** Posts Events on the policies, one after the other. */
async function postProblems(work: PolicyWork, world: PolicyWorld, problems: PolicyProblem[]) {
  const { host, config } = work;
  for (const problem of problems.slice(0, eventsMax)) {
    const { kind, namespace, name, path, text } = problem;
    log(host, "warn", `Problem in a network policy: ${text}`, { kind, namespace, name, path });
    const policy = world.policies
      .get(namespace)
      ?.find((one) => one.kind === kind && one.name === name);
    const uid = policy?.uid ?? "";
    const about = { kind, apiVersion: apiVersionOf(kind), namespace, name, uid };
    const note = `${path}: ${text}`;
    await postEvent(host, config, { about, type: "Warning", reason: "PolicyProblem", note });
  }
}
