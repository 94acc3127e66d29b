/**
 * Network policy at ADD and CHECK: in force in the pod's network namespace before ADD returns
 * (design D10), from what the node agent keeps in the record. Loaded only where the table asks for
 * policy. What is not known is closed: an ADD fails rather than open a door.
 */
import type { Call, Chain, Host } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import type { State } from "../database.ts";
import { netnsId } from "../kernel.ts";
import { fetchPodObject, type Objects } from "../kubernetes/objects_of_call.ts";
import { notePlugin } from "../ledger.ts";
import type { PodIdentity } from "../record.ts";
import { attachments } from "../recorded.ts";
import { isConfigured } from "../settings.ts";
import { compileHostPolicies, compilePolicies, type Rules, reachesOut } from "./compile.ts";
import { hostEndsOf, keepHostEnds } from "./host_ends.ts";
import { heldBy } from "./node_addresses.ts";
import { type PolicyPod, type PolicyProblem, parsePolicyPod } from "./objects.ts";
import { policyWorld } from "./peers.ts";
import {
  type Attached,
  attachedIn,
  differenceOf,
  guardedOf,
  installRuleset,
  isEnforced,
  lockNetns,
  type NetnsPlace,
  policyAttachments,
  sameRules,
} from "./rulesets.ts";
import {
  aliveSince,
  neededResources,
  readInputs,
  type StoredRuleset,
  storedRuleset,
  timeText,
  whyStale,
} from "./store.ts";

/** The ADD that policy is enforced for. */
export type EnforcedCall = Pick<Call, "host" | "config" | "state" | "journal">;

/** What policy needs of the plan of an ADD. */
export interface PolicyPlan {
  pod: PodIdentity;
  objects: Objects;
}

type Work = EnforcedCall & PolicyPlan & { place: NetnsPlace };

/** Policy in force; the namespace stays locked until `release`, so that the commit is in it. */
export interface Enforced {
  /** Puts back what was in force before. Never throws. */
  undo: () => Promise<void>;
  release: () => void;
}

/** With what is wrong with them where they were compiled. */
type CompiledRules = Rules & { problems?: PolicyProblem[] };

const noRules: Rules = { ruleset: "", hostRuleset: "" };

/**
 * Puts the policies of a pod in force on what was attached.
 * @returns undefined where no policy can be about these networks
 * @throws CniError 11 when what is known of policies is too old, or the pod's labels are not known;
 *   of nft. Then what was in force before is so again
 */
export async function enforceAdd(
  call: EnforcedCall,
  { pod, objects }: PolicyPlan,
  done: readonly Attached[],
  { netns, deadlineMs }: Chain,
): Promise<Enforced | undefined> {
  const { host, state, journal } = call;
  const id = netnsId(netns);
  const place = { netnsId: id, netns };
  const work: Work = { ...call, pod, objects, place };
  const [first] = done;
  if (!first || id === "") return undefined;
  if (call.config.policy.where === "host") keepHostEnds(state, place, done);
  if (!concernsAny(work, done) && !storedRuleset(state, id)) return undefined;
  const lock = await lockNetns(host, state, id, deadlineMs);
  const before = storedRuleset(state, id);
  const undo = () => restore(call, place, before);
  try {
    const all = [...attachedIn(host, state, id, first.attachment), ...done];
    const startedNs = Bun.nanoseconds();
    // One table has the rules of all: what an earlier call attached keeps its own.
    const concerned = concernsAny(work, all);
    const known = concerned ? checkFresh(work) : "nothing";
    // Of several containers in one namespace the first names the tables on the node.
    const containerId = before?.containerId ?? first.attachment.containerId;
    // What a DEL could not take away was of another pod, in a namespace of the same number.
    const unknown = concerned && before && all.length > done.length ? before : noRules;
    const ifUnknown = known === "stale" ? unknown : undefined;
    const compiling = () => compileFor(work, all, containerId, ifUnknown).catch(throwDamage(pod));
    const rules: CompiledRules = known === "nothing" ? unknown : await compiling();
    const names: unknown[] = done.map(({ attachment }) => attachment.ifName);
    const closed = rules.problems?.find(({ closes }) => names.includes(closes));
    if (closed) throw cannotAttach(pod, closed.text, code.invalidConfig);
    if (!sameRules(rules, noRules) || before) {
      const { namespace: podNamespace, name: podName } = pod;
      const row = { ...rules, netnsId: id, containerId, podNamespace, podName };
      await installRuleset(host, state, netns, row);
      // nft is one more program that was run for this pod.
      const durationUs = (Bun.nanoseconds() - startedNs) / 1000;
      const reason = known === "stale" ? "network policy, stale inputs" : "network policy";
      notePlugin(journal, "nft", { ...first.attachment, command: "ADD", durationUs, reason });
    }
    return { undo, release: lock.release };
  } catch (error) {
    await undo();
    lock.release();
    throw error;
  }
}

/** May a policy be about one of these networks? Of plain NetworkPolicy the table says so. */
function concernsAny({ config, state, pod }: Work, made: readonly Attached[]): boolean {
  const { enforce } = config.policy;
  // Of a default network only a policy that names it: else no pod could start on a node without an
  // agent. CNI-Genie's policies are about logical networks, which have a namespace.
  const isConcerned = ({ attachment: { primary, network, enforcesPlain } }: Attached) =>
    enforcesPlain === true || (enforce && (!primary || network.includes("/")));
  if (made.some(isConcerned)) return true;
  if (!enforce) return false;
  try {
    const policies = readInputs(state, "multi-networkpolicies", [pod.namespace]);
    const networks = new Set(policies.flatMap((policy) => policy.networks ?? []));
    return made.some(({ attachment }) => networks.has(attachment.network));
  } catch (error) {
    // A damaged row: whoever compiles it says so.
    if (error instanceof SyntaxError) return true;
    throw error;
  }
}

async function restore({ host, state }: EnforcedCall, place: NetnsPlace, before?: StoredRuleset) {
  const { netnsId: id, netns } = place;
  try {
    const now = storedRuleset(state, id);
    if (sameRules(now, before) || netnsId(netns) !== id) return;
    const row = before ?? (now && { ...now, ...noRules });
    // An ADD that was asked to end puts it back all the same.
    const calm = { ...host, signal: new AbortController().signal };
    if (row) await installRuleset(calm, state, netns, row);
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    log(host, "error", `Cannot put the earlier network policy back: ${error.message}`);
  }
}

/** What is known of policies, and is it fresh enough? @throws CniError 11 when it is not */
function checkFresh({ host, config, state, pod }: Work): "fresh" | "stale" | "nothing" {
  const { enforce, maxAgeMs, whenStale } = config.policy;
  // Without a pod of Kubernetes there is nothing that a policy could select.
  if (pod.namespace === "" || pod.name === "") return "nothing";
  const aliveMs = aliveSince(state, neededResources(enforce));
  const why = whyStale(maxAgeMs, aliveMs, host.now());
  if (why === undefined) return "fresh";
  if (whenStale === "closed") throw cannotAttach(pod, why, code.tryAgainLater);
  log(host, "warn", `Attached by policy.when_stale = "open" though ${why}`);
  return aliveMs === 0 ? "nothing" : "stale";
}

function cannotAttach(pod: PodIdentity, reason: string, of: number, cause?: unknown) {
  return new CniError(of, `Cannot attach pod ${pod.namespace}/${pod.name}: ${reason}`, { cause });
}

/** What cannot be used of the record is its damage, not a mistake of ours. */
function throwDamage(pod: PodIdentity): (error: unknown) => never {
  return (error) => {
    if (error instanceof CniError) throw error;
    const what = `what is on record of network policies is damaged (${toCniError(error).message})`;
    const remedy = "restart genie agent, which writes it anew";
    throw cannotAttach(pod, `${what}; ${remedy}`, code.stateUnavailable, error);
  };
}

/**
 * The rules of a pod; what they do not need of the inputs is not read.
 * @param containerId whose tables on the node they are
 * @param ifUnknown instead of a failure where nobody knows the pod
 */
async function compileFor(
  work: Work,
  all: readonly Attached[],
  containerId: string,
  ifUnknown?: Rules,
): Promise<CompiledRules> {
  const { host, config, state, pod, place } = work;
  const { enforce, where } = config.policy;
  // Its own, and those of its logical networks.
  const others = all.flatMap(({ attachment }) => attachment.network.split("/").slice(0, -1));
  const namespaces = [...new Set([pod.namespace, ...others])];
  const policies = [
    ...readInputs(state, "networkpolicies", namespaces),
    ...(enforce ? readInputs(state, "multi-networkpolicies", namespaces) : []),
  ].filter((one) => isEnforced(one, enforce));
  if (policies.length === 0) return noRules;
  const target = await findPod(work).catch((error: unknown) => {
    if (!ifUnknown || !(error instanceof CniError)) throw error;
    log(host, "warn", `Attached by policy.when_stale = "open" without rules: ${error.message}`);
  });
  if (!target) return ifUnknown ?? noRules;
  const networkKinds = ["logicalnetworks", "network-attachment-definitions"] as const;
  const networks = policies.some(({ between }) => between)
    ? networkKinds.flatMap((kind) => readInputs(state, kind))
    : [];
  // Most pods are selected by none of their namespace's policies: then no peer needs to be read.
  const few = policyWorld({ policies, networks, pods: [], namespaces: [] });
  if (compilePolicies(few, target, policyAttachments(all)).ruleset === "") return noRules;
  const needsAll = policies.some(reachesOut);
  const world = policyWorld({
    policies,
    networks,
    pods: readInputs(state, "pods", needsAll ? undefined : [pod.namespace]),
    namespaces: needsAll ? readInputs(state, "namespaces") : [],
  });
  const ends = hostEndsOf(state, where, place, all);
  const ips = [...target.hostIps, ...readInputs(state, "node-addresses").flat()];
  const held = heldBy([...guardedOf(attachments(host, state)), ...all]);
  const policed = policyAttachments(all, { ips, held }, ends);
  return compileHostPolicies(world, target, policed, containerId);
}

/**
 * The pod with its labels: as the agent saw it, else as the API says now.
 * @throws CniError 11 when neither knows it
 */
async function findPod({ host, config, state, pod, objects }: Work): Promise<PolicyPod> {
  const [stored] = readInputs(state, "pods", [pod.namespace], pod.name);
  if (stored && pod.uid !== "" && stored.uid === pod.uid) return stored;
  const unknown = (reason: string, cause?: unknown) => {
    const what = "policies of its namespace are enforced, and its labels are not known";
    return cannotAttach(pod, `${what}: ${reason}`, code.tryAgainLater, cause);
  };
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
 * Checks that the rules of a namespace are as they should be; there need not be any.
 * @throws CniError 11 with what differs
 */
export async function checkRuleset(
  host: Host,
  state: State,
  place: NetnsPlace,
  deadlineMs: number,
): Promise<void> {
  const lock = await lockNetns(host, state, place.netnsId, deadlineMs);
  try {
    const stored = storedRuleset(state, place.netnsId);
    if (!stored) return;
    const difference = await differenceOf(host, place.netns, stored);
    if (difference === undefined) return;
    const { podNamespace, podName, atMs } = stored;
    throw new CniError(
      code.tryAgainLater,
      `Network policy of pod ${podNamespace}/${podName} is not in force as written at ` +
        `${timeText(atMs)}: ${difference}; genie agent puts it back when it starts`,
    );
  } finally {
    lock.release();
  }
}
