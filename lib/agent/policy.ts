/**
 * The agent's part of network policy: keeps the inputs in the record fresh, and the ruleset of each
 * network namespace of this node as they ask. A namespace is written only when its text changes.
 *
 * It never knows better than the record: what is attached is read there, again under the lock of a
 * namespace before its rules change. An ADD that read older inputs than ours is seen by its commit
 * (`PRAGMA data_version`) and looked at anew. Until every collection was listed nothing changes.
 */

import { type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { closeState, openState, type State, write } from "../database.ts";
import { connect } from "../kubernetes/client.ts";
import { pause } from "../kubernetes/watch.ts";
import { netnsId } from "../netns.ts";
import { type PolicyWorld, policyProblems, policyWorld } from "../policy/compile.ts";
import type { Policy, PolicyPod, PolicyProblem } from "../policy/objects.ts";
import {
  type Attached,
  compileRules,
  differenceOf,
  findHostEnds,
  guardedOf,
  installRuleset,
  isEnforced,
  lockNetns,
  policyAttachments,
  type Rules,
  sameRules,
} from "../policy/rulesets.ts";
import { putProblems, storedRuleset } from "../policy/store.ts";
import { openPolicyWatch, type PolicyWatch } from "../policy/watch.ts";
import { attachmentsIn } from "../state.ts";
import type { Health } from "./health.ts";
import { forgetLeft, hasRules, isSameMade, isThere, type Local, readLocal } from "./local.ts";
import type { Agent } from "./part.ts";
import { postProblems } from "./problems.ts";
import { inodeOf, shorten } from "./record.ts";

/** Longest pause between two decisions while changes keep coming, in ms. */
const restMsMax = 400;
/** How often the record is looked at for attachments that came or went, in ms. */
const pollMs = 250;
/** Changes of the inputs are taken together for this long, in ms. */
const gatherMs = 30;
/** Namespaces whose rules are written at once: a run of nft is one process. */
const writersMax = 4;
/** How long another genie at the same namespace is waited for, in ms. */
const lockWaitMs = 5_000;
/** Freshness is written this often where nothing else is, at most, in ms. */
const aliveWriteMs = 10_000;
/** One namespace after the other is compared with the kernel, this far apart, in ms. */
const auditMs = 2_000;
/** Problems are gathered this long after a change, in ms: they hurry nobody. */
const problemsMs = 2_000;
/** A change that waits for longer is told as lag before it is in force, in ms. */
const lagToldMs = 1_000;
/** Pause after a failure of the record, in ms. */
const troubleMs = 1_000;

/** The part at work. */
interface Work {
  host: Host;
  config: Config;
  state: State;
  watch: PolicyWatch;
  /** By network namespace. */
  local: Map<string, Local>;
  /** `PRAGMA data_version` at which `local` was read; -1 not yet. */
  version: number;
  /** Inode of the record that is open: another process may set it aside. */
  inode: number;
  /** What policies say, and of which pods; undefined before the first whole list. */
  known?: { world: PolicyWorld; pods: Map<string, PolicyPod>; enforcesPlain: boolean };
  /** When the oldest change that is not in `known` came, on the monotonic clock; 0 for none. */
  changedMs: number;
  /** How long the newest decision took: a storm of changes must not take all of a core. */
  decidedMs: number;
  problemsDueMs: number;
  auditDueMs: number;
  audited: Set<string>;
  /** Namespaces whose rules could not be written: the record has them, the kernel may not. */
  failed: Set<string>;
  retryDueMs: number;
  /** Has each namespace been compared with the kernel since we began? */
  isVerified: boolean;
  posting: boolean;
  health: Health;
  /** What of the watches' counts is counted there already. */
  told: { failures: number; garbage: number };
}

/** Runs the part until the host's signal aborts. @throws CniError 7, 106 */
export async function runPolicy({ host, config, health }: Agent): Promise<void> {
  const kube = await connect(host, config.kubernetes);
  const state = openState(host, config.stateDir);
  shorten(state);
  let ring: () => void = () => undefined;
  const rest = (ms: number) =>
    new Promise<void>((done) => {
      const timer = setTimeout(done, ms);
      ring = () => {
        clearTimeout(timer);
        done();
      };
    });
  const { enforce, maxAgeMs } = config.policy;
  const onChange = () => {
    if (work.changedMs === 0) work.changedMs = performance.now();
    ring();
  };
  const watch = openPolicyWatch(host, state, { enforce, maxAgeMs, onChange });
  const work: Work = {
    ...{ host, config, state, watch, local: new Map(), version: -1, inode: inodeOf(state.file) },
    ...{ changedMs: 0, decidedMs: 0, problemsDueMs: 0, auditDueMs: 0, audited: new Set() },
    ...{ isVerified: false, posting: false, health, told: { failures: 0, garbage: 0 } },
    ...{ failed: new Set(), retryDueMs: 0 },
  };
  const watching = watch.run(kube, host.signal);
  host.signal.addEventListener("abort", () => ring(), { once: true });
  try {
    while (!host.signal.aborted) {
      if (work.changedMs === 0) await rest(pollMs);
      if (work.changedMs > 0) await pause(gatherMs + restOf(work), host.signal);
      tellHealth(work);
      await round(work).catch(async (error: unknown) => {
        health.count("database");
        log(host, "error", `Network policy waits for the record: ${toCniError(error).message}`);
        work.version = -1;
        await pause(troubleMs, host.signal);
      });
    }
    await watching;
  } finally {
    closeState(work.state);
  }
}

/** Goes round often: what it tells now is never old. */
function tellHealth({ health, watch, told, changedMs }: Work): void {
  health.beat("policy");
  // What is not in force yet lags, too: while the record cannot be written it may be long.
  const waitedMs = changedMs > 0 && watch.isComplete() ? performance.now() - changedMs : 0;
  if (waitedMs > lagToldMs) health.figures.set("policyLagMs", waitedMs);
  const all = [...watch.counts.values()];
  const failures = all.reduce((sum, one) => sum + one.failures, 0);
  const garbage = all.reduce((sum, one) => sum + one.garbage, 0);
  health.count("api", failures - told.failures);
  health.count("garbage", garbage - told.garbage);
  Object.assign(told, { failures, garbage });
}

/** A share of the time is for others, yet an edit is in force within a second. */
function restOf({ decidedMs }: Work): number {
  return Math.min(restMsMax, decidedMs * 5);
}

/** One look at everything. @throws CniError of the record */
async function round(work: Work): Promise<void> {
  const { host, watch } = work;
  if (inodeOf(work.state.file) !== work.inode) reopen(work);
  if (watch.isDirty() || watch.isStale(aliveWriteMs)) {
    write(work.state, () => watch.write(work.state));
    watch.written();
  }
  const isReread = await readAttached(work);
  if (!watch.isComplete()) return;
  const sinceMs = work.changedMs;
  const startedMs = performance.now();
  const isNews = sinceMs > 0 || work.known?.enforcesPlain !== isPlainOurs(work);
  if (isNews) learn(work);
  if (work.known && (sinceMs > 0 || isReread)) {
    const due = [...work.local.values()].filter((one) => isDue(work, one));
    if (isNews) work.decidedMs = performance.now() - startedMs;
    const written = await each(due, (one) => reconcile(work, one.netnsId));
    const lagMs = sinceMs === 0 ? undefined : Math.round(performance.now() - sinceMs);
    if (lagMs !== undefined) work.health.figures.set("policyLagMs", lagMs);
    if (written > 0) {
      log(host, "info", "Network policy rewritten", { namespaces: written, lagMs });
    }
    work.problemsDueMs ||= performance.now() + problemsMs;
  }
  if (!work.isVerified) await verifyAll(work);
  if (work.failed.size > 0 && performance.now() >= work.retryDueMs) await retry(work);
  if (work.problemsDueMs > 0 && performance.now() >= work.problemsDueMs) noteProblems(work);
  if (performance.now() >= work.auditDueMs) await audit(work);
}

/** The record was set aside, or made anew: everything of ours goes into the new one. */
function reopen(work: Work): void {
  closeState(work.state);
  work.state = openState(work.host, work.config.stateDir);
  shorten(work.state);
  work.inode = inodeOf(work.state.file);
  work.version = -1;
  work.watch.rewrite();
}

/** Reads what is attached, where the record has changed. @returns true when it was read */
async function readAttached(work: Work): Promise<boolean> {
  const { host, config, state } = work;
  const row = state.database.query("PRAGMA data_version").get() as { data_version: number };
  if (row.data_version === work.version) return false;
  if (work.version === -1) await forgetLeft(host, state);
  work.local = await readLocal(host, config, state, work.local);
  work.version = row.data_version;
  return true;
}

/** Takes the inputs as they are now. */
function learn(work: Work): void {
  const { policy } = work.config;
  const enforcesPlain = isPlainOurs(work);
  const isOurs = (one: Policy) =>
    isEnforced(one, policy.enforce) && (enforcesPlain || !isEnforced(one, false));
  const inputs = work.watch.inputs();
  const world = policyWorld({ ...inputs, policies: inputs.policies.filter(isOurs) });
  const pods = new Map(inputs.pods.map((pod) => [`${pod.namespace}/${pod.name}`, pod]));
  work.known = { world, pods, enforcesPlain };
  work.changedMs = 0;
}

/** What is attached may be under a table that is newer than ours. */
function isPlainOurs({ config: { plugins }, local }: Work): boolean {
  return (
    [...plugins.values()].some((plugin) => plugin.enforcePolicy) ||
    [...local.values()].some(({ made }) => made.some((one) => one.attachment.enforcesPlain))
  );
}

/**
 * Compiles for one namespace; undefined while its pod is not known: its rules stay. One that was
 * made anew under the same name is another pod, with labels of its own.
 */
function compile(
  { known, config }: Work,
  { pod, containerId, ends }: Local,
  made: readonly Attached[],
): (Rules & { problems: PolicyProblem[] }) | undefined {
  const target = known?.pods.get(`${pod.namespace}/${pod.name}`);
  if (!known || !target) return undefined;
  if (pod.uid !== "" && target.uid !== pod.uid) return undefined;
  const { where } = config.policy;
  const attachments = policyAttachments(made, target.hostIps);
  return compileRules(known.world, target, attachments, { where, containerId, ends });
}

function isDue(work: Work, one: Local): boolean {
  const compiled = compile(work, one, one.made);
  if (!compiled) return false;
  one.problems = compiled.problems;
  return !sameRules(compiled, one.rules);
}

/** Does something for all, some at a time. @returns how often it was done */
async function each(all: readonly Local[], act: (one: Local) => Promise<boolean>): Promise<number> {
  const left = [...all];
  let count = 0;
  const worker = async () => {
    for (let one = left.shift(); one; one = left.shift()) if (await act(one)) count++;
  };
  await Promise.all(Array.from({ length: writersMax }, worker));
  return count;
}

/**
 * Makes the rules of a namespace what they should be, by the record as it is under its lock.
 *
 * @param isForced also where the record says that they are so already
 * @returns true when they were written
 */
async function reconcile(work: Work, id: string, isForced = false): Promise<boolean> {
  const { host, state, local } = work;
  const one = local.get(id);
  if (!one || netnsId(one.netns) !== id) return false;
  try {
    const lock = await lockNetns(host, state, id, host.now() + lockWaitMs);
    try {
      const made = guardedOf(attachmentsIn(host, state, id));
      // Attached anew meanwhile, it has other ends.
      if (!isSameMade(made, one.made)) {
        one.ends = await findHostEnds(host, work.config.policy.where, made);
        one.made = made;
      }
      const compiled = made.length > 0 ? compile(work, one, made) : undefined;
      if (!compiled) return false;
      const { ruleset, hostRuleset } = compiled;
      one.rules = { ruleset, hostRuleset };
      if (sameRules(storedRuleset(state, id), one.rules) && !isForced) return false;
      const { containerId, pod } = one;
      const row = { containerId, podNamespace: pod.namespace, podName: pod.name };
      await installRuleset(host, state, one.netns, { netnsId: id, ...row, ...one.rules });
      work.failed.delete(id);
      return true;
    } finally {
      lock.release();
    }
  } catch (error) {
    // Read again in the next round; and written again, since the record is ahead of the kernel.
    work.version = -1;
    if (host.signal.aborted || netnsId(one.netns) !== id) return false;
    const level = work.failed.has(id) ? "debug" : "error";
    work.failed.add(id);
    work.retryDueMs = performance.now() + troubleMs;
    log(host, level, `Cannot keep the network policy: ${toCniError(error).message}`, {
      pod: `${one.pod.namespace}/${one.pod.name}`,
    });
    return false;
  }
}

/** Writes what could not be written before. */
async function retry(work: Work): Promise<void> {
  const failed = new Set(work.failed);
  for (const id of failed) if (!work.local.has(id)) work.failed.delete(id);
  const due = [...work.local.values()].filter((one) => failed.has(one.netnsId));
  await each(due, (one) => reconcile(work, one.netnsId, true));
}

/** After a start: what is in force may not be what the record says. */
async function verifyAll(work: Work): Promise<void> {
  work.isVerified = true;
  const all = [...work.local.values()].filter(hasRules);
  const put = await each(all, async (one) => {
    const { host } = work;
    const difference = await differenceOf(host, one.netns, one.rules).catch(toCniError);
    if (difference === undefined || netnsId(one.netns) !== one.netnsId) return false;
    return reconcile(work, one.netnsId, true);
  });
  if (put > 0) log(work.host, "warn", "Network policy was not in force and is again", { put });
}

/** Looks at one namespace after the other: is a ruleset of ours there, and the right one? */
async function audit(work: Work): Promise<void> {
  const { host, local, audited } = work;
  work.auditDueMs = performance.now() + auditMs;
  const next = [...local.values()].find((one) => hasRules(one) && !audited.has(one.netnsId));
  if (!next) return audited.clear();
  audited.add(next.netnsId);
  if (netnsId(next.netns) !== next.netnsId) return;
  if ((await isThere(host, next).catch(toCniError)) === true) return;
  const isPut = await reconcile(work, next.netnsId, true);
  if (!isPut) return;
  log(host, "warn", "Network policy was taken away from outside and is in force again", {
    pod: `${next.pod.namespace}/${next.pod.name}`,
  });
}

/** Puts what is wrong with policies on record, and what is new as Events on them. */
function noteProblems(work: Work): void {
  const { host, state, known, local } = work;
  work.problemsDueMs = 0;
  if (!known) return;
  if (work.posting) {
    // What is put on record now would never be told.
    work.problemsDueMs = performance.now() + problemsMs;
    return;
  }
  const all = [
    ...policyProblems(known.world),
    ...[...local.values()].flatMap((one) => one.problems),
  ];
  const fresh = write(state, () => putProblems(state, all, host.now()));
  if (fresh.length === 0) return;
  work.posting = true;
  const uidOf = ({ kind, namespace, name }: PolicyProblem) =>
    known.world.policies.get(namespace)?.find((one) => one.kind === kind && one.name === name)?.uid;
  void postProblems(host, work.config, fresh, uidOf).finally(() => {
    work.posting = false;
  });
}
