/**
 * Network policies to one nftables ruleset for one pod. Pure: the same inputs give the same text.
 *
 * The ruleset is one table in the pod's netns, with two chains for each interface that a policy
 * isolates. It hooks in where packets look as they do on the wire: on the way in before, on the way
 * out after whatever the pod itself rewrites. What an interface is not isolated for passes; `lo`
 * and neighbour discovery always do.
 *
 * What is let out is marked, and behind the stack a second table lets nothing else out: a packet
 * socket (CAP_NET_RAW) would send past all rules otherwise. AF_XDP sockets still can, and whoever
 * has CAP_NET_ADMIN takes the tables away; for those there are rules at the host ends.
 *
 * Only replies pass because of a known connection: packets of its first direction are judged by the
 * rules of the day, so that an edited policy also ends what runs already.
 *
 * Kubernetes lets a node reach its own pods whatever policies say (kubelet's probes). That holds
 * for the default network alone: nothing of the node calls on a pod over another one.
 */
import type { Policy, PolicyProblem } from "./objects.ts";
import type { PolicyWorld, Scope } from "./peers.ts";
import { compareText, selects } from "./rules.ts";
import {
  type Dialect,
  directions,
  type Grant,
  type Grants,
  type Guarded,
  isMatchable,
  type PolicyAttachment,
  type PolicyTarget,
  sealTable,
  writeTable,
} from "./table.ts";

export { type PolicyInputs, type PolicyWorld, policyWorld } from "./peers.ts";
export { policyProblems } from "./problems.ts";
export type { PolicyAttachment, PolicyTarget } from "./table.ts";

/** One nftables ruleset; "" where no policy applies to any interface. */
export interface Compiled {
  ruleset: string;
  problems: PolicyProblem[];
}

/** Family and name of the table in a pod's netns, and of the one behind it. */
export const tableName = "inet genie";
const sealName = "netdev genie";

/**
 * Passes first, whatever policies say: without neighbour discovery there is no IPv6, without group
 * membership no multicast. Only as it is sent on the link itself, so that it carries nothing out.
 */
const always = (v6: string): string[] => [
  "ct state related accept",
  "ct state established ct direction reply accept",
  `${v6} icmpv6 type { 133, 134, 135, 136 } ip6 hoplimit 255 accept`,
  `${v6} icmpv6 type { 130, 131, 132, 143 } ip6 hoplimit 1 accept`,
  "ip daddr 224.0.0.0/4 ip ttl 1 meta l4proto igmp accept",
];

const inetFamilies = { ip: "meta nfproto ipv4", ip6: "meta nfproto ipv6" };
const inPod: Dialect = {
  table: tableName,
  hook: { ingress: "prerouting priority -160", egress: "postrouting priority 150" },
  side: { ingress: "iifname", egress: "oifname" },
  first: always(inetFamilies.ip6),
  every: inetFamilies,
  sealed: true,
};

/**
 * Compiles the ruleset of one pod: text for one `nft -f`, which replaces our tables as a whole.
 */
export function compilePolicies(
  world: PolicyWorld,
  pod: PolicyTarget,
  attachments: PolicyAttachment[],
): Compiled {
  const guarded = guard(world, pod, attachments, ({ ifName }) => ifName);
  const { text, problems } = writeTable(world, pod, guarded, inPod);
  if (text === "") return { ruleset: "", problems };
  const head = without([tableName, sealName]);
  return { ruleset: `${head}${text}${sealTable(sealName, guarded)}`, problems };
}

/**
 * Does what a policy allows depend on more than pods of its own namespace? A port by its name does
 * on the way out, where everybody is a peer: each of them has a number of its own for it.
 */
export function reachesOut({ between, ingress = [], egress = [] }: Policy): boolean {
  const peers = [...ingress, ...egress].flatMap((rule) => rule.peers ?? []);
  const namesPorts = egress.some(
    (rule) => rule.peers === undefined && rule.ports?.some(({ name }) => name !== undefined),
  );
  return between !== undefined || namesPorts || peers.some((peer) => "namespaces" in peer);
}

/** Takes tables away, whether they are there or not. */
function without(tables: string[]): string {
  return tables.map((table) => `add table ${table}\ndelete table ${table}\n`).join("");
}

/** An interface, and its other end on the node where it has one. */
export interface HostAttachment extends PolicyAttachment {
  /** `bridged`: it is a port of a bridge. */
  hostEnd?: { ifName: string; bridged: boolean };
}

/** The rulesets of a pod whose rules stand outside of it where they can. */
export interface HostCompiled {
  /** For the node's own netns; "" where nothing is isolated there. */
  host: string;
  /** For the pod's netns: the interfaces that have no end on the node. */
  pod: string;
  problems: PolicyProblem[];
}

/** The tables of one container in the node's netns. */
export function hostTables(containerId: string): string[] {
  // An identifier of nftables has no dash; a container id has no slash.
  const name = `genie_${containerId.replaceAll("-", "/")}`;
  return [`bridge ${name}`, `inet ${name}`];
}

/**
 * Compiles the rulesets of one pod for the host ends of its interfaces, where the pod cannot take
 * them away, nor send past them. Routed ones are judged behind the node's own rewriting of
 * destinations on the way out and before that of sources on the way in, so that services mean pods.
 * An interface without a host end (macvlan, ipvlan, a device moved in) gets its rules in the pod.
 */
export function compileHostPolicies(
  world: PolicyWorld,
  pod: PolicyTarget,
  attachments: HostAttachment[],
  containerId: string,
): HostCompiled {
  const has = ({ hostEnd }: HostAttachment) => hostEnd !== undefined && isMatchable(hostEnd.ifName);
  const hostName = ({ hostEnd }: HostAttachment) => hostEnd?.ifName ?? "";
  const outside = attachments.filter(has);
  const tables = hostTables(containerId);
  const texts = tables.map((table) => {
    const bridged = table.startsWith("bridge ");
    const ends = outside.filter(({ hostEnd }) => hostEnd?.bridged === bridged);
    const dialect = { table, ...(bridged ? onBridge : onRoute) };
    return writeTable(world, pod, guard(world, pod, ends, hostName), dialect);
  });
  const inside = compilePolicies(
    world,
    pod,
    attachments.filter((one) => !has(one)),
  );
  const host = texts.map(({ text }) => text).join("");
  return {
    host: host === "" ? "" : `${without(tables)}${host}`,
    pod: inside.ruleset,
    problems: [...texts.flatMap(({ problems }) => problems), ...inside.problems],
  };
}

const outsideOf = { ingress: "oifname", egress: "iifname" } as const;
const onRoute: Omit<Dialect, "table"> = {
  hook: { ingress: "postrouting priority 50", egress: "prerouting priority -50" },
  side: outsideOf,
  first: always(inetFamilies.ip6),
  every: inetFamilies,
};
/** Behind the bridge's connection tracking, before br_netfilter takes the packet away. */
const onBridge: Omit<Dialect, "table"> = {
  hook: { ingress: "postrouting priority 0", egress: "prerouting priority -100" },
  side: outsideOf,
  first: ["ether type arp accept", ...always("ether type ip6")],
  every: { ip: "ether type ip", ip6: "ether type ip6" },
};

/** The interfaces with what isolates each, in the order of their names. */
function guard<T extends PolicyAttachment>(
  world: PolicyWorld,
  pod: PolicyTarget,
  attachments: T[],
  nameOf: (attachment: T) => string,
): Guarded[] {
  const sorted = [...attachments].sort((a, b) => compareText(a.ifName, b.ifName));
  return sorted.map((attachment) => ({
    attachment,
    name: nameOf(attachment),
    grants: grantsFor(world, pod, attachment),
  }));
}

/** The policies that isolate an interface. */
function grantsFor(world: PolicyWorld, pod: PolicyTarget, attachment: PolicyAttachment): Grants {
  const grants: Grants = { ingress: undefined, egress: undefined };
  for (const policy of world.policies.get(pod.namespace) ?? []) {
    if (policy.between !== undefined) continue;
    if (policy.pods !== null && !selects(policy.pods, pod.labels)) continue;
    const scope = scopeOf(policy, attachment);
    if (scope === undefined) continue;
    for (const direction of directions) {
      const rules = policy[direction];
      if (rules === undefined) continue;
      grants[direction] ??= [];
      grants[direction].push({ policy, rules, scope });
    }
  }
  for (const grant of betweenNetworks(world, attachment.network)) {
    for (const direction of directions) {
      grants[direction] ??= [];
      grants[direction].push(grant);
    }
  }
  return grants;
}

/** Where this policy meets this interface's peers; undefined when it is not about the interface. */
function scopeOf(policy: Policy, attachment: PolicyAttachment): Scope | undefined {
  if (policy.kind === "NetworkPolicy") {
    if (!attachment.enforcesPlain) return undefined;
    return { networks: attachment.isDefault ? [] : [attachment.network], podIps: true };
  }
  if (policy.networks === null) {
    return attachment.isDefault ? undefined : { networks: [], podIps: false };
  }
  // Also where a pod asked to have it as its first: that is no way around.
  if (!policy.networks?.includes(attachment.network)) return undefined;
  return { networks: policy.networks, podIps: false };
}

/**
 * CNI-Genie's policies that select this network; a network always talks within itself. One whose
 * object is gone, or not known yet, may be a logical network: it does not open.
 */
function betweenNetworks(world: PolicyWorld, network: string): Grant[] {
  const [namespace = "", name = ""] = network.split("/");
  const kind = world.networks.get(network)?.kind ?? "Logicalnetwork";
  if (name === "" || kind !== "Logicalnetwork") return [];
  return (world.policies.get(namespace) ?? []).flatMap((policy): Grant[] => {
    const rules = policy.between?.filter((one) => one.network === name || one.network === "*");
    if (rules === undefined || rules.length === 0) return [];
    const peers = rules.flatMap((one) => one.peers.map((peer) => `${namespace}/${peer}`));
    const networks = [...new Set([network, ...peers])].sort();
    return [{ policy, rules: [], scope: { networks: [], podIps: false }, networks }];
  });
}
