/**
 * Network policies to one nftables ruleset for one pod. Pure: the same inputs give the same text.
 *
 * The ruleset is one table in the pod's netns, with two chains for each interface that a policy
 * isolates. It hooks in where packets look as they do on the wire: on the way in before, on the way
 * out after whatever the pod itself rewrites. What an interface is not isolated for passes; `lo`
 * and neighbour discovery always do.
 *
 * Only replies pass because of a known connection: packets of its first direction are judged by the
 * rules of the day, so that an edited policy also ends what runs already.
 *
 * Kubernetes lets a node reach its own pods whatever policies say (kubelet's probes). That holds
 * for the default network alone: nothing of the node calls on a pod over another one.
 */
import type { PodAttachment, Policy, PolicyPod, PolicyProblem } from "./policy_objects.ts";
import {
  type AddressSet,
  namedPeers,
  networkAddresses,
  type PolicyWorld,
  peerAddresses,
  peerPods,
  type Scope,
} from "./policy_peers.ts";
import { compareText, type Protocol, type Rule, type RulePort, selects } from "./policy_rules.ts";

export { type PolicyInputs, type PolicyWorld, policyWorld } from "./policy_peers.ts";

/** What is asked about the pod a ruleset is for. */
export type PolicyTarget = Pick<PolicyPod, "namespace" | "name" | "labels" | "ports">;

/** One interface of the pod a ruleset is for. */
export interface PolicyAttachment extends PodAttachment {
  /** Set where plain NetworkPolicy is ours to enforce: the network's own plugin does not. */
  enforcesPlain?: boolean;
  /** Addresses the node itself calls from: gateways and the node's own. Default network only. */
  nodeIps?: string[];
}

/** One nftables ruleset; "" where no policy applies to any interface. */
export interface Compiled {
  ruleset: string;
  problems: PolicyProblem[];
}

type Direction = "ingress" | "egress";
const directions: Direction[] = ["ingress", "egress"];

/** What may pass by one policy, or by one pair of networks. */
interface Grant {
  policy: Policy;
  rules: Rule[];
  scope: Scope;
  /** Instead of rules: the addresses of peer networks. */
  networks?: string[];
}
/** The policies that isolate one interface in one direction; undefined: none does. */
type Grants = Record<Direction, Grant[] | undefined>;

/**
 * Compiles the ruleset of one pod: text for one `nft -f`, which replaces the table as a whole.
 */
export function compilePolicies(
  world: PolicyWorld,
  pod: PolicyTarget,
  attachments: PolicyAttachment[],
): Compiled {
  const table: Table = { world, pod, sets: new Map(), names: new Map(), problems: [] };
  const sorted = [...attachments].sort((a, b) => compareText(a.ifName, b.ifName));
  const hooks: Record<Direction, string[]> = { ingress: [], egress: [] };
  const chains: string[] = [];
  for (const [index, attachment] of sorted.entries()) {
    const grants = grantsFor(world, pod, attachment);
    for (const direction of directions) {
      const list = grants[direction];
      if (list === undefined) continue;
      const name = `${direction}_${index}`;
      const side = direction === "ingress" ? "iifname" : "oifname";
      hooks[direction].push(`${side} ${matchName(attachment.ifName)} goto ${name}`);
      chains.push(...block(`chain ${name}`, chainLines(table, direction, attachment, list)));
    }
  }
  if (chains.length === 0) return { ruleset: "", problems: table.problems };
  const base = directions.flatMap((direction) => {
    if (hooks[direction].length === 0) return [];
    return block(`chain ${direction}`, [hookOf[direction], ...hooks[direction]]);
  });
  const sets = [...table.sets.values()].flatMap((set, index) => block(`set peers_${index}`, set));
  const body = [...sets, ...base, ...chains].map((line) => `\t${line}\n`).join("");
  const head = `add table ${tableName}\ndelete table ${tableName}\ntable ${tableName} {\n`;
  return { ruleset: `${head}${body}}\n`, problems: table.problems };
}

/** Family and name of our table. */
export const tableName = "inet genie";

const hookOf: Record<Direction, string> = {
  ingress: "type filter hook prerouting priority -160; policy accept;",
  egress: "type filter hook postrouting priority 150; policy accept;",
};

/**
 * The name of an interface as nft reads it: a star at the end would be a pattern. What cannot be
 * written at all (a quote) becomes every interface but `lo`: rather too much than a way around.
 */
function matchName(name: string): string {
  if (!/^[\x21-\x7e]{1,15}$/.test(name) || /"|\\\*?$/.test(name)) return '!= "lo"';
  return `"${name.replace(/\*$/, "\\*")}"`;
}

function block(head: string, lines: string[]): string[] {
  return [`${head} {`, ...lines.map((line) => `\t${line}`), "}"];
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
  if (attachment.isDefault) return undefined;
  if (policy.networks === null) return { networks: [], podIps: false };
  if (!policy.networks?.includes(attachment.network)) return undefined;
  return { networks: policy.networks, podIps: false };
}

/** CNI-Genie's policies that select this network; a network always talks within itself. */
function betweenNetworks(world: PolicyWorld, network: string): Grant[] {
  const [namespace = "", name = ""] = network.split("/");
  const isLogical = world.networks.get(network)?.kind === "Logicalnetwork";
  if (!isLogical) return [];
  return (world.policies.get(namespace) ?? []).flatMap((policy): Grant[] => {
    const rules = policy.between?.filter((one) => one.network === name || one.network === "*");
    if (rules === undefined || rules.length === 0) return [];
    const peers = rules.flatMap((one) => one.peers.map((peer) => `${namespace}/${peer}`));
    const networks = [...new Set([network, ...peers])].sort();
    return [{ policy, rules: [], scope: { networks: [], podIps: false }, networks }];
  });
}

/** A table being written. The lines of its sets by their id: several rules may share one. */
interface Table {
  world: PolicyWorld;
  pod: PolicyTarget;
  sets: Map<number, string[]>;
  names: Map<number, string>;
  problems: PolicyProblem[];
}

/**
 * Passes first, whatever policies say: without neighbour discovery there is no IPv6, without group
 * membership no multicast. Only as it is sent on the link itself, so that it carries nothing out.
 */
const always = [
  "ct state related accept",
  "ct state established ct direction reply accept",
  "meta nfproto ipv6 icmpv6 type { 133, 134, 135, 136 } ip6 hoplimit 255 accept",
  "meta nfproto ipv6 icmpv6 type { 130, 131, 132, 143 } ip6 hoplimit 1 accept",
  "ip daddr 224.0.0.0/4 ip ttl 1 meta l4proto igmp accept",
];

function chainLines(
  table: Table,
  direction: Direction,
  attachment: PolicyAttachment,
  grants: Grant[],
): string[] {
  const lines = grants.flatMap((grant) => grantLines(table, direction, grant));
  const node = direction === "ingress" && attachment.isDefault ? (attachment.nodeIps ?? []) : [];
  const fromNode = nodeLines(node);
  return [...always, ...fromNode, ...new Set(lines), "drop"];
}

function nodeLines(ips: string[]): string[] {
  return ["ip", "ip6"].flatMap((family) => {
    const own = ips.filter((ip) => ip.includes(":") === (family === "ip6"));
    const listed = [...new Set(own)].sort().join(", ");
    return listed === "" ? [] : [`${family} saddr { ${listed} } accept comment "node"`];
  });
}

function grantLines(table: Table, direction: Direction, grant: Grant): string[] {
  const { policy, networks, rules } = grant;
  const label = `${policy.namespace}/${policy.name}`.slice(0, 120);
  const lines =
    networks === undefined
      ? rules.flatMap((rule, index) =>
          ruleMatches(table, direction, grant, rule, `spec.${direction}[${index}]`),
        )
      : peerMatches(table, direction, networkAddresses(table.world, networks));
  return lines.map((match) => [...match, `accept comment "${label}"`].join(" "));
}

/** What a rule lets through: one line for each family, kind of address, and protocol. */
function ruleMatches(
  table: Table,
  direction: Direction,
  { policy, scope }: Grant,
  { peers, ports }: Rule,
  path: string,
): string[][] {
  const { world } = table;
  const from = () =>
    peers === undefined
      ? [[]]
      : peerMatches(table, direction, peerAddresses(world, policy.namespace, peers, scope));
  if (ports === undefined) return from();
  const { numbers, named } = sortPorts(table, direction, ports, (name) =>
    report(table, policy, `${path}.ports`, unresolved(table, direction, name)),
  );
  const plain = portMatches(numbers).flatMap((port) => from().map((peer) => [...peer, port]));
  const resolved = named.flatMap((port) => {
    const found = namedPeers(world, policy.namespace, peers, port, scope);
    if (found.size === 0) {
      report(table, policy, `${path}.ports`, unresolved(table, direction, port.name));
    }
    return [...found].flatMap(([number, addresses]) =>
      peerMatches(table, direction, addresses).map((peer) => [
        ...peer,
        `${port.protocol} dport ${number}`,
      ]),
    );
  });
  return [...plain, ...resolved];
}

function unresolved({ pod }: Table, direction: Direction, name: string): string {
  const who = direction === "ingress" ? `pod ${pod.namespace}/${pod.name} has` : "no peer pod has";
  const not = direction === "ingress" ? "no" : "a";
  return (
    `${who} ${not} container port named "${name}" of this protocol, so it allows nothing there: ` +
    "name the port in the pod, or give its number"
  );
}

function report({ problems }: Table, policy: Policy, path: string, text: string): void {
  const { kind, namespace, name } = policy;
  if (problems.some((one) => one.text === text && one.name === name && one.path === path)) return;
  problems.push({ kind, namespace, name, path, text });
}

type PortRange = [first: number, last: number];
type Numbers = Map<Protocol, PortRange[]>;

/** Names on the way in are this pod's; on the way out each peer has its own. */
function sortPorts(
  { pod }: Table,
  direction: Direction,
  ports: RulePort[],
  missing: (name: string) => void,
): { numbers: Numbers; named: { name: string; protocol: Protocol }[] } {
  const numbers: Numbers = new Map();
  const named: { name: string; protocol: Protocol }[] = [];
  const add = (protocol: Protocol, range: PortRange) =>
    numbers.set(protocol, [...(numbers.get(protocol) ?? []), range]);
  for (const { protocol, port, endPort, name } of ports) {
    if (name === undefined)
      add(protocol, port === undefined ? [0, 65535] : [port, endPort ?? port]);
    else if (direction === "egress") named.push({ name, protocol });
    else {
      const own = pod.ports.filter((one) => one.name === name && one.protocol === protocol);
      if (own.length === 0) missing(name);
      for (const one of own) add(protocol, [one.port, one.port]);
    }
  }
  return { numbers, named };
}

function portMatches(numbers: Numbers): string[] {
  const sorted = [...numbers].sort(([a], [b]) => compareText(a, b));
  return sorted.map(([protocol, ranges]) => {
    const merged: PortRange[] = [];
    for (const [first, last] of ranges.sort(([a], [b]) => a - b)) {
      const before = merged.at(-1);
      if (before === undefined || first > before[1] + 1) merged.push([first, last]);
      else before[1] = Math.max(before[1], last);
    }
    if (merged[0]?.[0] === 0) return `meta l4proto ${protocol}`;
    const texts = merged.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`));
    return `${protocol} dport ${texts.length === 1 ? texts[0] : `{ ${texts.join(", ")} }`}`;
  });
}

const setKinds = {
  hosts4: { family: "ip", type: "ipv4_addr", flags: [], all: "" },
  blocks4: { family: "ip", type: "ipv4_addr", flags: ["flags interval"], all: "0.0.0.0/0" },
  hosts6: { family: "ip6", type: "ipv6_addr", flags: [], all: "" },
  blocks6: { family: "ip6", type: "ipv6_addr", flags: ["flags interval"], all: "::/0" },
};

/** One match for each set. */
function peerMatches(table: Table, direction: Direction, sets: AddressSet[]): string[][] {
  const side = direction === "ingress" ? "saddr" : "daddr";
  return sets.map(({ id, kind, elements }) => {
    const { family, type, flags, all } = setKinds[kind];
    if (elements === all) return [`meta nfproto ${family === "ip" ? "ipv4" : "ipv6"}`];
    const name = table.names.get(id) ?? `peers_${table.sets.size}`;
    table.names.set(id, name);
    table.sets.set(id, [`type ${type}`, ...flags, `elements = { ${elements} }`]);
    return [`${family} ${side} @${name}`];
  });
}

/** More peers than this in one policy are worth a word: every change of it costs every node. */
const peersMax = 1000;

/** What is wrong with each policy: unreadable parts, nothing selected, unknown networks. */
export function policyProblems(world: PolicyWorld): PolicyProblem[] {
  return [...world.policies.values()].flat().flatMap((policy) => {
    const { kind, namespace, name, networks, between } = policy;
    const found = [...policy.problems];
    const add = (path: string, text: string) => found.push({ kind, namespace, name, path, text });
    if (policy.pods !== null && between === undefined) {
      if (peerPods(world, namespace, { pods: policy.pods }).length === 0) {
        add("spec.podSelector", `it selects no pod of namespace ${namespace}: correct its labels`);
      }
    }
    for (const one of unknownNetworks(world, namespace, networks ?? [])) {
      add("metadata.annotations", `unknown network "${one}": no object and no pod has it`);
    }
    for (const one of unknownLogical(world, policy)) {
      add("metadata.annotations", `unknown network "${one}": create it, or correct the name`);
    }
    const rules = [...(policy.ingress ?? []), ...(policy.egress ?? [])];
    const count = rules.reduce((sum, { peers = [] }) => sum + peers.length, 0);
    if (count > peersMax) {
      add(
        "spec",
        `it lists ${count} peers: use namespaceSelector or wider CIDRs; all are in force`,
      );
    }
    return found;
  });
}

function unknownNetworks(world: PolicyWorld, namespace: string, networks: string[]): string[] {
  const isKnown = (name: string) => world.networks.has(name) || world.members.has(name);
  const plain = new Set(networks.filter((name) => !name.includes("/")));
  return networks.filter((name) => {
    if (isKnown(name)) return false;
    if (plain.has(name)) return false;
    const short = name.startsWith(`${namespace}/`) ? name.slice(namespace.length + 1) : name;
    return !(plain.has(short) && isKnown(short));
  });
}

function unknownLogical(world: PolicyWorld, { namespace, between = [] }: Policy): string[] {
  const names = between.flatMap(({ network, peers }) => [network, ...peers]);
  const asked = [...new Set(names)].filter((name) => name !== "*");
  return asked.filter((name) => !world.networks.has(`${namespace}/${name}`));
}
