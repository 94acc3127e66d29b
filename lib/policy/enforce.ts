/**
 * Network policy as a part of ADD and CHECK: in force in the pod's network namespace before ADD
 * returns (design D10), from what the node agent keeps in the record. Loaded only where the table
 * asks for policy. What is not known is closed: an ADD fails rather than open a door.
 */

import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import { isoTime } from "../config/quantity.ts";
import type { Config } from "../config/schema.ts";
import type { State } from "../database.ts";
import type { ChainOptions } from "../delegate.ts";
import { isConfigured } from "../kubernetes/credentials.ts";
import type { Objects } from "../kubernetes/objects_of_call.ts";
import { type Journal, notePlugin } from "../ledger.ts";
import { netnsId } from "../netns.ts";
import { fetchPodObject } from "../pod.ts";
import type { PodIdentity } from "../state.ts";
import { compilePolicies, policyWorld, reachesOut } from "./compile.ts";
import { type PolicyPod, parsePolicyPod } from "./objects.ts";
import {
  type Attached,
  attachedIn,
  compileRules,
  differenceOf,
  findHostEnds,
  installRuleset,
  isConcerned,
  isEnforced,
  lockNetns,
  policyAttachments,
  policyNamespaces,
  type Rules,
  sameRules,
} from "./rulesets.ts";
import {
  aliveSince,
  neededResources,
  readInputs,
  readPod,
  type StoredRuleset,
  storedRuleset,
} from "./store.ts";

/** What an ADD is, for its policy. */
export interface EnforcedCall {
  host: Host;
  config: Config;
  state: State;
  journal: Journal;
}

/** Of a plan, what its policy needs. */
export interface PolicyPlan {
  pod: PodIdentity;
  objects: Objects;
}

/** Policy in force; the namespace stays locked until `release`, so that the commit is in it. */
export interface Enforced {
  /** Puts back what was in force before. Never throws. */
  undo: () => Promise<void>;
  release: () => void;
}

/**
 * Puts the policies of a pod in force on what was attached.
 *
 * @returns undefined where no policy can be about these networks
 * @throws CniError 11 when what is known of policies is too old, or the pod's labels are not known;
 *   of nft. Then what was in force before is so again
 */
export async function enforceAdd(
  call: EnforcedCall,
  plan: PolicyPlan,
  done: readonly Attached[],
  chain: ChainOptions,
): Promise<Enforced | undefined> {
  const { host, state } = call;
  const id = netnsId(chain.netns);
  const [first] = done;
  if (!first || id === "") return undefined;
  if (!concernsAny(call, plan, done) && !storedRuleset(state, id)) return undefined;
  const lock = await lockNetns(host, state, id, chain.deadlineMs);
  const before = storedRuleset(state, id);
  const undo = () => restore(call, { netnsId: id, netns: chain.netns }, before);
  try {
    const all = [...attachedIn(host, state, id, first.attachment), ...done];
    const startedNs = Bun.nanoseconds();
    // One table has the rules of all: what an earlier call attached keeps its own.
    const concerned = concernsAny(call, plan, all);
    const known = concerned ? checkFresh(call, plan) : "nothing";
    // Of several containers in one namespace the first names the tables on the node.
    const containerId = before?.containerId ?? first.attachment.containerId;
    // What a DEL could not take away was of another pod, in a namespace of the same number.
    const unknown = concerned && before && all.length > done.length ? before : noRules;
    const place = { containerId, ...(known === "stale" && { ifUnknown: unknown }) };
    const rules = known === "nothing" ? unknown : await compileFor(call, plan, all, place);
    if (!sameRules(rules, noRules) || before) {
      const { namespace: podNamespace, name: podName } = plan.pod;
      const row = { netnsId: id, containerId, podNamespace, podName, ...rules };
      await installRuleset(host, state, chain.netns, row);
      note(call, first, startedNs, known);
    }
    return { undo, release: lock.release };
  } catch (error) {
    await undo();
    lock.release();
    throw error;
  }
}

/**
 * May a policy be about one of these networks? Of a default network only one that names it: else
 * no pod could start on a node without an agent.
 */
function concernsAny(
  { config: { policy }, state }: EnforcedCall,
  { pod }: PolicyPlan,
  made: readonly Attached[],
): boolean {
  if (made.some(({ attachment }) => isConcerned(attachment, policy.enforce))) return true;
  if (!policy.enforce) return false;
  try {
    const policies = readInputs(state, "multi-networkpolicies", [pod.namespace]);
    const named = new Set(policies.flatMap(({ networks }) => networks ?? []));
    return made.some(({ attachment }) => named.has(attachment.network));
  } catch (error) {
    // A damaged row: whoever compiles it says so.
    if (error instanceof SyntaxError) return true;
    throw error;
  }
}

const noRules: Rules = { ruleset: "", hostRuleset: "" };

/** A row of the ledger: nft is one more program that was run for this pod. */
function note(
  { journal }: EnforcedCall,
  { attachment }: Attached,
  startedNs: number,
  known: Known,
): void {
  const durationUs = (Bun.nanoseconds() - startedNs) / 1000;
  const reason = known === "stale" ? "network policy, stale inputs" : "network policy";
  notePlugin(journal, "nft", { ...attachment, command: "ADD", durationUs, reason });
}

async function restore(
  { host, state }: EnforcedCall,
  { netnsId: id, netns }: { netnsId: string; netns: string },
  before: StoredRuleset | undefined,
): Promise<void> {
  try {
    const now = storedRuleset(state, id);
    if (sameRules(now, before) || netnsId(netns) !== id) return;
    const row = before ?? now;
    if (row) {
      const calm = { ...host, signal: new AbortController().signal };
      await installRuleset(calm, state, netns, { ...row, ...(before ?? noRules) });
    }
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    log(host, "error", `Cannot put the earlier network policy back: ${error.message}`);
  }
}

type Known = "fresh" | "stale" | "nothing";

/** What is known of policies, and is it fresh enough? @throws CniError 11 when it is not */
function checkFresh({ host, config, state }: EnforcedCall, plan: PolicyPlan): Known {
  const { enforce, maxAgeMs, whenStale } = config.policy;
  // Without a pod of Kubernetes there is nothing that a policy could select.
  if (plan.pod.namespace === "" || plan.pod.name === "") return "nothing";
  const aliveMs = aliveSince(state, neededResources(enforce));
  const ageMs = host.now() - aliveMs;
  // A time to come is of a clock that was set back since.
  if (aliveMs > 0 && Math.abs(ageMs) <= maxAgeMs) return "fresh";
  const since =
    aliveMs === 0
      ? "nothing is known of network policies on this node"
      : `network policies were last known ${Math.round(ageMs / 1000)} s ago, at ` +
        `${isoTime(aliveMs) ?? "no date"}, and policy.max_age allows ${maxAgeMs / 1000} s`;
  const advice = "check that genie agent runs on this node and reaches the API server";
  if (whenStale === "closed") {
    throw new CniError(
      code.tryAgainLater,
      `Cannot attach pod ${plan.pod.namespace}/${plan.pod.name}: ${since}; ${advice}`,
    );
  }
  log(host, "warn", `Attached by policy.when_stale = "open" though ${since}; ${advice}`);
  return aliveMs === 0 ? "nothing" : "stale";
}

interface Place {
  /** Whose tables on the node they are. */
  containerId: string;
  /** Instead of a failure where nobody knows the pod. */
  ifUnknown?: Rules;
}

/** The ruleset of a pod; what it does not need of the inputs is not read. */
async function compileFor(
  call: EnforcedCall,
  { pod, objects }: PolicyPlan,
  all: readonly Attached[],
  place: Place,
): Promise<Rules> {
  try {
    return await compileFrom(call, { pod, objects }, all, place);
  } catch (error) {
    if (error instanceof CniError) throw error;
    throw new CniError(
      code.stateUnavailable,
      `Cannot attach pod ${pod.namespace}/${pod.name}: what is on record of network policies is ` +
        `damaged (${toCniError(error).message}); restart genie agent, which writes it anew`,
      { cause: error },
    );
  }
}

async function compileFrom(
  call: EnforcedCall,
  { pod, objects }: PolicyPlan,
  all: readonly Attached[],
  { containerId, ifUnknown }: Place,
): Promise<Rules> {
  const { host, config, state } = call;
  const { enforce, where } = config.policy;
  const namespaces = policyNamespaces(pod.namespace, all);
  const policies = [
    ...readInputs(state, "networkpolicies", namespaces),
    ...(enforce ? readInputs(state, "multi-networkpolicies", namespaces) : []),
  ].filter((one) => isEnforced(one, enforce));
  if (policies.length === 0) return noRules;
  const target = await findPod(host, config, state, pod, objects).catch((error: unknown) => {
    if (!ifUnknown || !(error instanceof CniError)) throw error;
    log(host, "warn", `Attached by policy.when_stale = "open" without rules: ${error.message}`);
  });
  if (!target) return ifUnknown ?? noRules;
  const attachments = policyAttachments(all, target.hostIps);
  const networks = policies.some(({ between }) => between)
    ? [
        ...readInputs(state, "logicalnetworks"),
        ...readInputs(state, "network-attachment-definitions"),
      ]
    : [];
  const empty = { policies, pods: [], namespaces: [], networks };
  // Most pods are selected by none of their namespace's policies: then no peer needs to be read.
  if (compilePolicies(policyWorld(empty), target, attachments).ruleset === "") {
    return noRules;
  }
  const needsAll = policies.some(reachesOut);
  const inputs = {
    ...empty,
    pods: readInputs(state, "pods", needsAll ? undefined : [pod.namespace]),
    namespaces: needsAll ? readInputs(state, "namespaces") : [],
  };
  const outside = { where, containerId, ends: await findHostEnds(host, where, all) };
  const { ruleset, hostRuleset } = compileRules(policyWorld(inputs), target, attachments, outside);
  return { ruleset, hostRuleset };
}

/**
 * The pod with its labels: as the agent saw it, else as the API says now.
 * @throws CniError 11 when neither knows it
 */
async function findPod(
  host: Host,
  config: Config,
  state: State,
  pod: PodIdentity,
  objects: Objects,
): Promise<PolicyPod> {
  const stored = readPod(state, pod);
  if (stored && pod.uid !== "" && stored.uid === pod.uid) return stored;
  const label = `${pod.namespace}/${pod.name}`;
  const unknown = (why: string, cause?: unknown) =>
    new CniError(
      code.tryAgainLater,
      `Cannot attach pod ${label}: policies of its namespace are enforced, and its labels are ` +
        `not known: ${why}`,
      { cause },
    );
  if (!isConfigured(host, config.kubernetes)) {
    throw unknown("genie agent has not seen it, and no Kubernetes credentials are configured");
  }
  const object = await fetchPodObject(objects, pod).catch((error: unknown) => {
    throw error instanceof CniError ? unknown(error.message, error) : error;
  });
  const found = parsePolicyPod(object);
  if (!found) throw unknown("the API server's answer is no pod");
  return found;
}

/**
 * Is the ruleset of a namespace as it should be? Nothing where no policy is in force.
 * @throws CniError 11 with what differs
 */
export async function checkRuleset(
  host: Host,
  state: State,
  place: { netnsId: string; netns: string },
  deadlineMs: number,
): Promise<void> {
  const lock = await lockNetns(host, state, place.netnsId, deadlineMs);
  try {
    const stored = storedRuleset(state, place.netnsId);
    if (!stored) return;
    const difference = await differenceOf(host, place.netns, stored);
    if (difference === undefined) return;
    throw new CniError(
      code.tryAgainLater,
      `Network policy of pod ${stored.podNamespace}/${stored.podName} is not in force as written ` +
        `at ${isoTime(stored.atMs) ?? "no date"}: ${difference}; genie agent puts it back when ` +
        "it starts",
    );
  } finally {
    lock.release();
  }
}
