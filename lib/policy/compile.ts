/**
 * Network policies to one nftables ruleset for one pod. Pure: the same inputs give the same text.
 *
 * The ruleset is one table in the pod's netns, with two chains for each interface that a policy
 * isolates. It hooks in where packets look as they do on the wire: on the way in before, on the way
 * out after whatever the pod itself rewrites. What an interface is not isolated for passes; `lo`
 * and neighbour discovery always do.
 *
 * A packet socket (CAP_NET_RAW) would send past all of these rules. So what they let out is marked,
 * and a second table, behind the stack, lets nothing else out. AF_XDP sockets still can, and who
 * has CAP_NET_ADMIN takes the tables away; against those there are rules at the host ends.
 *
 * Only replies pass because of a known connection. Packets of its first direction are judged by the
 * rules of the day, so that an edited policy also ends connections that are open already.
 *
 * Kubernetes lets a node reach its own pods whatever policies say (kubelet's probes). That holds
 * for the default network alone: nothing of the node calls on a pod over another one.
 */
import type { PodAttachment, Policy, PolicyPod, PolicyProblem } from "./objects.ts";
import {
  type AddressSet,
  hostSets,
  mergeRanges,
  type NumberRange,
  namedPeers,
  networkAddresses,
  type PolicyWorld,
  peerAddresses,
  peerPods,
  type Scope,
} from "./peers.ts";
import { compareText, type PolicyRule, type Protocol, type RulePort, selects } from "./rules.ts";

export { type PolicyInputs, type PolicyWorld, policyWorld } from "./peers.ts";

/** The pod a ruleset is for. */
export type PolicyTarget = Pick<PolicyPod, "namespace" | "name" | "labels" | "ports">;

/** One of its interfaces. */
export interface PolicyAttachment extends PodAttachment {
  /** Set where plain NetworkPolicy is ours to enforce: the network's own plugin does not. */
  enforcesPlain?: boolean;
  /** Addresses the node itself calls from: gateways and the node's own. Default network only. */
  nodeIps?: string[];
  /** Where its rules belong, set for `policy.where = "host"`; null: it has none, and is closed. */
  hostEnd?: HostEnd | null;
}

/** A veth on the node; `bridged`: it is a port of a bridge. */
export interface HostEnd {
  ifName: string;
  bridged: boolean;
}

/** The rules of a pod. */
export interface Rules {
  /** For its own network namespace; "" for none. */
  ruleset: string;
  /** For the node's, about the ends of its interfaces there; "" for none. */
  hostRuleset: string;
}

/** Family and name of the table in a pod's netns. */
export const podTable: string = "inet genie";
/** The table behind it, which stops what packet sockets send. */
export const sealTable = "netdev genie";
/** What a ruleset of a pod's own netns consists of. */
export const podTables = [podTable, sealTable];

/** The tables of one container in the node's netns. */
export function hostTables(containerId: string): [onBridge: string, onRoute: string] {
  // An identifier of nftables has no dash; a container id has no slash.
  const name = `genie_${containerId.replaceAll("-", "/")}`;
  return [`bridge ${name}`, `inet ${name}`];
}

/** Takes tables away, whether they are there or not: to add one that is there is no error. */
export function deleteTables(tables: string[]): string {
  return tables.map((table) => `add table ${table}\ndelete table ${table}\n`).join("");
}

const directions = ["ingress", "egress"] as const;
/** As the pod sees it. */
type Direction = (typeof directions)[number];

/** Where a table stands, and how rules are written there. */
interface Dialect {
  /** The name of an interface there; undefined for one that the table is not about. */
  nameOf: (attachment: PolicyAttachment) => string | undefined;
  hook: Record<Direction, string>;
  /** What an interface is matched as. */
  side: Record<Direction, "iifname" | "oifname">;
  /** Matches every packet of a family. */
  every: { ip: string; ip6: string };
  /** Passes first, beside what passes everywhere. */
  first?: string[];
}

const inPod: Dialect = {
  nameOf: ({ ifName }) => ifName,
  hook: { ingress: "prerouting priority -160", egress: "postrouting priority 150" },
  side: { ingress: "iifname", egress: "oifname" },
  every: { ip: "meta nfproto ipv4", ip6: "meta nfproto ipv6" },
};
const onRoute: Dialect = {
  nameOf: ({ hostEnd }) => (hostEnd?.bridged === false ? matchable(hostEnd.ifName) : undefined),
  hook: { ingress: "postrouting priority 50", egress: "prerouting priority -50" },
  side: { ingress: "oifname", egress: "iifname" },
  every: inPod.every,
};
/** Behind the bridge's connection tracking, before br_netfilter takes the packet away. */
const onBridge: Dialect = {
  nameOf: ({ hostEnd }) => (hostEnd?.bridged === true ? matchable(hostEnd.ifName) : undefined),
  hook: { ingress: "postrouting priority 0", egress: "prerouting priority -100" },
  side: onRoute.side,
  every: { ip: "ether type ip", ip6: "ether type ip6" },
  first: ["ether type arp accept"],
};

/**
 * Passes first, whatever policies say: without neighbour discovery there is no IPv6, without group
 * membership no multicast. Only as it is sent on the link itself, so that it carries nothing out.
 */
const always = ({ first = [], every: { ip6 } }: Dialect): string[] => [
  ...first,
  "ct state related accept",
  "ct state established ct direction reply accept",
  `${ip6} icmpv6 type { 133, 134, 135, 136 } ip6 hoplimit 255 accept`,
  `${ip6} icmpv6 type { 130, 131, 132, 143 } ip6 hoplimit 1 accept`,
  "ip daddr 224.0.0.0/4 ip ttl 1 meta l4proto igmp accept",
];

/** Compiles the ruleset of one pod: text for one `nft -f`, which replaces our tables as a whole. */
export function compilePolicies(
  world: PolicyWorld,
  pod: PolicyTarget,
  attachments: PolicyAttachment[],
): { ruleset: string; problems: PolicyProblem[] } {
  const { text, problems } = writeTable({ world, pod, attachments }, podTable, inPod);
  return { ruleset: text && `${deleteTables(podTables)}${text}`, problems };
}

/**
 * Compiles the rulesets of one pod for the host ends of its interfaces, where the pod cannot take
 * them away, nor send past them. Routed ones are judged behind the node's own rewriting of
 * destinations on the way out and before that of sources on the way in, so that services mean pods.
 * An interface that has no end there (macvlan, ipvlan, a device moved in), or one that nft cannot
 * name, is closed in the pod as soon as a policy is about it.
 */
export function compileHostPolicies(
  world: PolicyWorld,
  pod: PolicyTarget,
  attachments: PolicyAttachment[],
  containerId: string,
): Rules & { problems: PolicyProblem[] } {
  const tables = hostTables(containerId);
  const given = { world, pod, attachments };
  const bridge = writeTable(given, tables[0], onBridge);
  const route = writeTable(given, tables[1], onRoute);
  const others = attachments.filter((one) => !onBridge.nameOf(one) && !onRoute.nameOf(one));
  const { ruleset, problems } = compilePolicies(world, pod, others);
  const text = `${bridge.text}${route.text}`;
  return {
    ruleset,
    hostRuleset: text && `${deleteTables(tables)}${text}`,
    problems: [...bridge.problems, ...route.problems, ...problems],
  };
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

/** What may pass by one policy. */
interface Grant {
  policy: Policy;
  scope: Scope;
  /** Absent: everything may that is of the networks of the scope. */
  rules?: PolicyRule[];
}

/** In which directions an interface is isolated, and what may pass all the same. */
function isolations(table: Table, attachment: PolicyAttachment): [Direction, Grant[]][] {
  const { pod, dialect, problems } = table;
  const isolated = directions.flatMap((one): [Direction, Grant[]][] => {
    const grants = grantsFor(table, attachment, one);
    return grants.length > 0 ? [[one, grants]] : [];
  });
  const { hostEnd, ifName: closes, network } = attachment;
  const [policy] = isolated.flatMap(([, grants]) => grants.map((grant) => grant.policy));
  if (!policy || dialect !== inPod || hostEnd === undefined) return isolated;
  const { kind, namespace, name } = policy;
  const text =
    `interface ${closes} of pod ${pod.namespace}/${pod.name}, on network ${network}, has no end ` +
    'on the node, where policy.where = "host" puts its rules, so it is closed: set ' +
    'policy.where = "pod", or use a network that makes veths (bridge, ptp)';
  problems.push({ kind, namespace, name, path: "spec", text, closes });
  return directions.map((one) => [one, []]);
}

/** What isolates an interface in one direction; nothing does where the list is empty. */
function grantsFor({ world, pod }: Table, attachment: PolicyAttachment, direction: Direction) {
  const policies = world.policies.get(pod.namespace) ?? [];
  const own = policies.flatMap((policy): Grant[] => {
    const { between, pods, [direction]: rules } = policy;
    if (rules === undefined || between !== undefined) return [];
    if (pods !== null && !selects(pods, pod.labels)) return [];
    const scope = scopeOf(policy, attachment);
    return scope === undefined ? [] : [{ policy, rules, scope }];
  });
  return [...own, ...betweenNetworks(world, attachment.network)];
}

/** Where this policy meets this interface's peers; undefined when it is not about the interface. */
function scopeOf(policy: Policy, attachment: PolicyAttachment): Scope | undefined {
  const { kind, namespace, networks } = policy;
  const { enforcesPlain, isDefault, network } = attachment;
  if (kind === "NetworkPolicy") {
    // On a default network too: to a peer it may be a further one, with another address there.
    return enforcesPlain ? { namespace, networks: [network], podIps: true } : undefined;
  }
  // Networks that cannot be read are all but the default one.
  if (networks === null) return isDefault ? undefined : { namespace, networks: [], podIps: false };
  // Also where a pod asked to have it as its first: that is no way around.
  return networks?.includes(network) ? { namespace, networks, podIps: false } : undefined;
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
    return [{ policy, scope: { namespace, networks, podIps: false } }];
  });
}

/**
 * Packets that rules let out get the mark `$seal`, for which nft.ts puts a secret. What is sent to
 * many comes back to the pod's own sockets, which can read its mark: it has another one, with which
 * nothing is sent to a single host.
 */
const looped = [
  "type filter hook postrouting priority 151; policy accept;",
  "meta mark $seal fib daddr type multicast meta mark set $seal_of_many",
  "meta mark $seal fib daddr type broadcast meta mark set $seal_of_all",
];

/** A table being written. */
interface Table {
  world: PolicyWorld;
  pod: PolicyTarget;
  dialect: Dialect;
  /** By their names; several rules may share a set. */
  sets: Map<AddressSet, string>;
  /** What of the policies means nothing here. */
  problems: PolicyProblem[];
}

/** The rules of one interface in one direction. */
type Chain = Table & { direction: Direction };

type Given = Pick<Table, "world" | "pod"> & { attachments: PolicyAttachment[] };

/** Writes a table, in the pod with the {@link sealTable}; "" where nothing is isolated. */
function writeTable({ attachments, ...given }: Given, tableName: string, dialect: Dialect) {
  const problems: PolicyProblem[] = [];
  const table: Table = { ...given, dialect, sets: new Map(), problems };
  const hooks: Record<Direction, string[]> = { ingress: [], egress: [] };
  const chains: string[] = [];
  const sealed: string[] = [];
  const there = attachments.filter((one) => dialect.nameOf(one) !== undefined);
  there.sort((a, b) => compareText(a.ifName, b.ifName));
  for (const [index, attachment] of there.entries()) {
    const name = dialect.nameOf(attachment) ?? "";
    for (const [direction, grants] of isolations(table, attachment)) {
      const chain = `${direction}_${index}`;
      hooks[direction].push(`${dialect.side[direction]} ${matchName(name)} goto ${chain}`);
      const lines = chainLines({ ...table, direction }, attachment, grants);
      chains.push(...block(`chain ${chain}`, lines));
      if (dialect === inPod && direction === "egress") sealed.push(name);
    }
  }
  if (chains.length === 0) return { text: "", problems };
  const base = directions.flatMap((direction) => {
    if (hooks[direction].length === 0) return [];
    const hook = `type filter hook ${dialect.hook[direction]}; policy accept;`;
    return block(`chain ${direction}`, [hook, ...hooks[direction]]);
  });
  if (sealed.length > 0) base.push(...block("chain looped", looped));
  const sets = [...table.sets].flatMap(([{ family, isInterval, elements }, name]) => {
    const flags = isInterval ? ["flags interval"] : [];
    const type = family === "ip" ? "type ipv4_addr" : "type ipv6_addr";
    return block(`set ${name}`, [type, ...flags, `elements = { ${elements} }`]);
  });
  const rules = tableText(tableName, [...sets, ...base, ...chains]);
  return { text: `${rules}${writeSeal(sealed)}`, problems };
}

function tableText(table: string, lines: string[]): string {
  return `table ${table} {\n${lines.map((line) => `\t${line}\n`).join("")}}\n`;
}

function block(head: string, lines: string[]): string[] {
  return [`${head} {`, ...lines.map((line) => `\t${line}`), "}"];
}

/**
 * Writes the table that lets out of isolated interfaces only what has a mark. Policies do not judge
 * what is not IP, nor renewals by DHCP, which a client sends through a packet socket itself.
 */
function writeSeal(interfaces: string[]): string {
  // A star at the end is a pattern here, and no way is known to write it otherwise.
  const sealed = interfaces.filter((name) => matchable(name) && !name.endsWith("*"));
  if (sealed.length === 0) return "";
  const chains = sealed.flatMap((name, index) =>
    block(`chain egress_${index}`, [
      `type filter hook egress device "${name}" priority 0; policy accept;`,
      "meta mark $seal meta mark set 0 accept",
      // By the bytes on the wire, an address of many: 224.0.0.0/4, ff00::/8.
      "meta mark $seal_of_many ether type ip @ll,240,8 & 0xf0 == 0xe0 meta mark set 0 accept",
      "meta mark $seal_of_many ether type ip6 @ll,304,8 == 0xff meta mark set 0 accept",
      "meta mark $seal_of_all ether daddr ff:ff:ff:ff:ff:ff meta mark set 0 accept",
      "ether type ip udp sport 68 udp dport 67 accept",
      "ether type ip6 udp sport 546 udp dport 547 accept",
      // By the bytes on the wire: of a frame whose header cannot be found none of these is true.
      "ether type != { 0x0800, 0x86dd, 0x8100, 0x88a8, 0x8847, 0x8864 } accept",
      // Beyond here the kernel believes what a socket says its frame is.
      "meta skuid 0-4294967295 drop",
      "meta protocol != { 0x0800, 0x86dd, 0x8100, 0x88a8, 0x8847, 0x8864 } accept",
      "drop",
    ]),
  );
  return tableText(sealTable, chains);
}

/**
 * The name of an interface as nft reads it: a star at the end would be a pattern. What cannot be
 * written at all (a quote) becomes every interface but `lo`: rather too much than a way around.
 */
function matchName(name: string): string {
  if (!/^[\x21-\x7e]{1,15}$/.test(name) || /"|\\\*?$/.test(name)) return '!= "lo"';
  return `"${name.replace(/\*$/, "\\*")}"`;
}

/** A name that can be matched alone; undefined for another. */
function matchable(name: string): string | undefined {
  return matchName(name).startsWith('"') ? name : undefined;
}

function chainLines(chain: Chain, attachment: PolicyAttachment, grants: Grant[]): string[] {
  const { world, dialect, direction } = chain;
  const { isDefault, nodeIps = [] } = attachment;
  const ips = direction === "ingress" && isDefault ? new Set(nodeIps.toSorted()) : [];
  const lines = new Set(grants.flatMap((grant) => grantLines(chain, grant)));
  const nodes = hostSets(world, ips).map(
    ({ family, elements }) => `${family} saddr { ${elements} } accept comment "node"`,
  );
  const all = [...always(dialect), ...nodes, ...lines, "drop"];
  if (direction === "ingress" || dialect !== inPod) return all;
  return all.map((line) => line.replace(/\baccept\b/, "meta mark set $seal accept"));
}

function grantLines(chain: Chain, grant: Grant): string[] {
  const { policy, scope, rules } = grant;
  const label = `${policy.namespace}/${policy.name}`.slice(0, 120);
  const matches = rules
    ? rules.flatMap((rule, index) => ruleMatches(chain, grant, rule, index))
    : peerMatches(chain, networkAddresses(chain.world, scope));
  return matches.map((match) => [...match, `accept comment "${label}"`].join(" "));
}

/** What a rule lets through: one line for each family, kind of address, and protocol. */
function ruleMatches(chain: Chain, grant: Grant, rule: PolicyRule, index: number): string[][] {
  const { world, direction } = chain;
  const { policy, scope } = grant;
  const { peers, ports } = rule;
  const all = () => (peers ? peerMatches(chain, peerAddresses(world, peers, scope)) : [[]]);
  if (ports === undefined) return all();
  const missing = (port: RulePort) => reportPort(chain, policy, index, port);
  const ranges = ports.flatMap((port) => {
    const own = portRanges(chain, port);
    if (own.length === 0 && direction === "ingress") missing(port);
    return own;
  });
  const numbered = portMatches(ranges).flatMap((port) => all().map((peer) => [...peer, port]));
  const named = ports.filter(({ name }) => name !== undefined && direction === "egress");
  const resolved = named.flatMap((port) => {
    const found = namedPeers(world, port, scope, peers);
    if (found.length === 0) missing(port);
    return found.flatMap(([number, addresses]) => {
      const match = `${port.protocol} dport ${number}`;
      return peerMatches(chain, addresses).map((peer) => [...peer, match]);
    });
  });
  return [...numbered, ...resolved];
}

/** Reports a name of a port that nobody has, once. */
function reportPort(chain: Chain, policy: Policy, index: number, port: RulePort): void {
  const { pod, direction, problems } = chain;
  const { kind, namespace, name } = policy;
  const nobody =
    direction === "ingress" ? `pod ${pod.namespace}/${pod.name} has no` : "no peer pod has a";
  const text =
    `${nobody} container port named "${port.name}" of this protocol, so it allows nothing there: ` +
    "name the port in the pod, or give its number";
  const path = `spec.${direction}[${index}].ports`;
  if (problems.some((one) => one.text === text && one.name === name && one.path === path)) return;
  problems.push({ kind, namespace, name, path, text });
}

type PortRange = NumberRange & { protocol: Protocol };

/** The numbers of a port. A name on the way in is this pod's; on the way out each peer has one. */
function portRanges({ pod, direction }: Chain, wanted: RulePort): PortRange[] {
  const { protocol, port, endPort, name } = wanted;
  const range = (first: number, last: number) => {
    return { protocol, first: BigInt(first), last: BigInt(last) };
  };
  if (name === undefined) return [range(port ?? 0, endPort ?? port ?? 65535)];
  if (direction === "egress") return [];
  const own = pod.ports.filter((one) => one.name === name && one.protocol === protocol);
  return own.map((one) => range(one.port, one.port));
}

function portMatches(ranges: PortRange[]): string[] {
  const byProtocol = [...Map.groupBy(ranges, ({ protocol }) => protocol)];
  byProtocol.sort(([a], [b]) => compareText(a, b));
  return byProtocol.map(([protocol, own]) => {
    const merged = mergeRanges(own);
    if (merged[0]?.first === 0n) return `meta l4proto ${protocol}`;
    const texts = merged.map(({ first, last }) => (first === last ? first : `${first}-${last}`));
    return `${protocol} dport ${texts.length === 1 ? texts[0] : `{ ${texts.join(", ")} }`}`;
  });
}

/** One match for each set. */
function peerMatches({ direction, dialect, sets }: Chain, addresses: AddressSet[]): string[][] {
  const side = direction === "ingress" ? "saddr" : "daddr";
  return addresses.map((set) => {
    const { family, elements } = set;
    if (elements === (family === "ip" ? "0.0.0.0/0" : "::/0")) return [dialect.every[family]];
    const name = sets.getOrInsert(set, `peers_${sets.size}`);
    return [`${family} ${side} @${name}`];
  });
}

/** More peers than this in one policy are reported: every change of it costs every node. */
const peersMax = 1000;

/** What is wrong with each policy, beside what concerns one pod alone. */
export function policyProblems(world: PolicyWorld): PolicyProblem[] {
  return [...world.policies.values()].flat().flatMap((policy) => {
    const { kind, namespace, name, between, pods, ingress = [], egress = [] } = policy;
    const found = [...policy.problems];
    const add = (path: string, text: string) => found.push({ kind, namespace, name, path, text });
    if (pods !== null && !between && peerPods(world, namespace, { pods }).length === 0) {
      add("spec.podSelector", `it selects no pod of namespace ${namespace}: correct its labels`);
    }
    for (const one of unknownNetworks(world, policy)) {
      add("metadata.annotations", `unknown network "${one}": no object and no pod has it`);
    }
    const logical = new Set(between?.flatMap(({ network, peers }) => [network, ...peers]));
    for (const one of logical) {
      if (one === "*" || world.networks.has(`${namespace}/${one}`)) continue;
      add("metadata.annotations", `unknown network "${one}": create it, or correct the name`);
    }
    const count = [...ingress, ...egress].flatMap(({ peers = [] }) => peers).length;
    const advice = "use namespaceSelector or wider CIDRs; all are in force";
    if (count > peersMax) add("spec", `it lists ${count} peers: ${advice}`);
    return found;
  });
}

/** A plain name may be one of a node's plugin table, which is known nowhere else. */
function unknownNetworks(world: PolicyWorld, { namespace, networks }: Policy): string[] {
  const all = networks ?? [];
  const isKnown = (name: string) => world.networks.has(name) || world.members.has(name);
  return all.filter((name) => {
    if (isKnown(name) || !name.includes("/")) return false;
    const short = name.startsWith(`${namespace}/`) ? name.slice(namespace.length + 1) : name;
    return !(all.includes(short) && isKnown(short));
  });
}
