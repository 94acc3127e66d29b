/**
 * One table of nftables being written: chains, rules, sets. Pure. What a table looks like depends
 * on where it stands, and that is a {@link Dialect}.
 */
import type { PodAttachment, Policy, PolicyPod, PolicyProblem } from "./objects.ts";
import {
  type AddressSet,
  namedPeers,
  networkAddresses,
  type PolicyWorld,
  peerAddresses,
  type Scope,
  type SetKind,
} from "./peers.ts";
import { compareText, type Protocol, type Rule, type RulePort } from "./rules.ts";

/** What is asked about the pod a ruleset is for. */
export type PolicyTarget = Pick<PolicyPod, "namespace" | "name" | "labels" | "ports">;

/** One interface of the pod a ruleset is for. */
export interface PolicyAttachment extends PodAttachment {
  /** Set where plain NetworkPolicy is ours to enforce: the network's own plugin does not. */
  enforcesPlain?: boolean;
  /** Addresses the node itself calls from: gateways and the node's own. Default network only. */
  nodeIps?: string[];
}

/** From the pod's side. */
export type Direction = "ingress" | "egress";
/** Both, in the order they are written. */
export const directions: readonly Direction[] = ["ingress", "egress"];

/** What may pass by one policy, or by one pair of networks. */
export interface Grant {
  policy: Policy;
  rules: Rule[];
  scope: Scope;
  /** Instead of rules: the addresses of peer networks. */
  networks?: string[];
}
/** The policies that isolate one interface in one direction; undefined: none does. */
export type Grants = Record<Direction, Grant[] | undefined>;

/** Where a table stands, and how rules are written there. */
export interface Dialect {
  /** Family and name. */
  table: string;
  hook: Record<Direction, string>;
  /** What an interface is matched as. */
  side: Record<Direction, "iifname" | "oifname">;
  /** Passes first, whatever policies say. */
  first: string[];
  /** Matches every packet of a family. */
  every: { ip: string; ip6: string };
  /** What is let out gets {@link seal}, and an interface lets nothing else out. */
  sealed?: true;
}

/**
 * The mark of packets that rules let out; nft.ts puts a secret in its place. A packet socket sends
 * past all rules of IP, and what it sends has no such mark: {@link sealTable} drops it. What is
 * sent to many comes back to the pod's own sockets, and they can read its mark: it has another one,
 * with which nothing is sent to a single host.
 */
export const seal = "$seal";
const sealOfMany = "$seal_of_many";
const sealOfAll = "$seal_of_all";

const looped = [
  "type filter hook postrouting priority 151; policy accept;",
  `meta mark ${seal} fib daddr type multicast meta mark set ${sealOfMany}`,
  `meta mark ${seal} fib daddr type broadcast meta mark set ${sealOfAll}`,
];

/** An interface, the name it has where the table stands, and what isolates it. */
export interface Guarded {
  attachment: PolicyAttachment;
  name: string;
  grants: Grants;
}

/** The lines of a ruleset, and what of the policies means nothing here. */
export interface TableText {
  /** "" where nothing is isolated. */
  text: string;
  problems: PolicyProblem[];
}

/** Writes a table. Replacing it, or taking it away, is what stands before it. */
export function writeTable(
  world: PolicyWorld,
  pod: PolicyTarget,
  guarded: Guarded[],
  dialect: Dialect,
): TableText {
  const table: Table = { world, pod, dialect, sets: new Map(), names: new Map(), problems: [] };
  const hooks: Record<Direction, string[]> = { ingress: [], egress: [] };
  const chains: string[] = [];
  for (const [index, { attachment, name, grants }] of guarded.entries()) {
    for (const direction of directions) {
      const list = grants[direction];
      if (list === undefined) continue;
      const chain = `${direction}_${index}`;
      hooks[direction].push(`${dialect.side[direction]} ${matchName(name)} goto ${chain}`);
      chains.push(...block(`chain ${chain}`, chainLines(table, direction, attachment, list)));
    }
  }
  if (chains.length === 0) return { text: "", problems: table.problems };
  const base = directions.flatMap((direction) => {
    if (hooks[direction].length === 0) return [];
    const hook = `type filter hook ${dialect.hook[direction]}; policy accept;`;
    return block(`chain ${direction}`, [hook, ...hooks[direction]]);
  });
  if (dialect.sealed && hooks.egress.length > 0) base.push(...block("chain looped", looped));
  const sets = [...table.sets.values()].flatMap((set, index) => block(`set peers_${index}`, set));
  const body = [...sets, ...base, ...chains].map((line) => `\t${line}\n`).join("");
  return { text: `table ${dialect.table} {\n${body}}\n`, problems: table.problems };
}

/**
 * Writes the table that lets out of isolated interfaces only what has the {@link seal}. What is no
 * IP is not for policies to judge, nor are the renewals of an address by DHCP, which a client sends
 * through a packet socket itself.
 */
export function sealTable(table: string, guarded: Guarded[]): string {
  // A star at the end is a pattern here, and no way is known to write it otherwise.
  const canName = (name: string) => isMatchable(name) && !name.endsWith("*");
  const sealed = guarded.filter(({ name, grants }) => grants.egress && canName(name));
  if (sealed.length === 0) return "";
  const chains = sealed.flatMap(({ name }, index) =>
    block(`chain egress_${index}`, [
      `type filter hook egress device "${name}" priority 0; policy accept;`,
      `meta mark ${seal} meta mark set 0 accept`,
      // By the bytes on the wire, an address of many: 224.0.0.0/4, ff00::/8.
      `meta mark ${sealOfMany} ether type ip @ll,240,8 & 0xf0 == 0xe0 meta mark set 0 accept`,
      `meta mark ${sealOfMany} ether type ip6 @ll,304,8 == 0xff meta mark set 0 accept`,
      `meta mark ${sealOfAll} ether daddr ff:ff:ff:ff:ff:ff meta mark set 0 accept`,
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
  return `table ${table} {\n${chains.map((line) => `\t${line}\n`).join("")}}\n`;
}

/**
 * The name of an interface as nft reads it: a star at the end would be a pattern. What cannot be
 * written at all (a quote) becomes every interface but `lo`: rather too much than a way around.
 */
function matchName(name: string): string {
  if (!/^[\x21-\x7e]{1,15}$/.test(name) || /"|\\\*?$/.test(name)) return '!= "lo"';
  return `"${name.replace(/\*$/, "\\*")}"`;
}

/** True for a name that {@link writeTable} can match alone. */
export function isMatchable(name: string): boolean {
  return matchName(name).startsWith('"');
}

function block(head: string, lines: string[]): string[] {
  return [`${head} {`, ...lines.map((line) => `\t${line}`), "}"];
}

/** A table being written. The lines of its sets by their id: several rules may share one. */
interface Table {
  world: PolicyWorld;
  pod: PolicyTarget;
  dialect: Dialect;
  sets: Map<number, string[]>;
  names: Map<number, string>;
  problems: PolicyProblem[];
}

function chainLines(
  table: Table,
  direction: Direction,
  attachment: PolicyAttachment,
  grants: Grant[],
): string[] {
  const lines = grants.flatMap((grant) => grantLines(table, direction, grant));
  const node = direction === "ingress" && attachment.isDefault ? (attachment.nodeIps ?? []) : [];
  const fromNode = nodeLines(node);
  const all = [...table.dialect.first, ...fromNode, ...new Set(lines), "drop"];
  if (direction === "ingress" || !table.dialect.sealed) return all;
  return all.map((line) => line.replace(/\baccept\b/, `meta mark set ${seal} accept`));
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

const setKinds: Record<
  SetKind,
  { family: "ip" | "ip6"; type: string; flags: string[]; all: string }
> = {
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
    if (elements === all) return [table.dialect.every[family]];
    const name = table.names.get(id) ?? `peers_${table.sets.size}`;
    table.names.set(id, name);
    table.sets.set(id, [`type ${type}`, ...flags, `elements = { ${elements} }`]);
    return [`${family} ${side} @${name}`];
  });
}
