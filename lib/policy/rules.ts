/**
 * The rules of a network policy as plain data, from what the API server hands out. Pure. Everything
 * is hostile until it is parsed. What cannot be read is left out and reported, and what it would
 * have allowed stays forbidden, so that a typo never opens a door. That is why an object with an
 * unknown key counts as unreadable: a peer with `podSelectr` would otherwise mean every pod.
 * Sources: Kubernetes networking.k8s.io/v1 NetworkPolicy (MultiNetworkPolicy has the same rules);
 * CNI-Genie docs/network-policy for the annotation `genieNetworkpolicy`.
 */
import { oneLine } from "../cni.ts";
import { contains, formatSubnet, parseSubnet, type Subnet, toNumber, unmapped } from "../ip.ts";
import { isObject } from "../json.ts";

type Operator = "In" | "NotIn" | "Exists" | "DoesNotExist";
/** A label selector: all of these hold; an empty one selects everything. Sorted. */
export type Selector = [key: string, operator: Operator, values: string[]][];

/** Peers given by labels; without `namespaces` in the namespace of the policy. */
export type PodPeer = { pods?: Selector; namespaces?: Selector };
/** Peers given by addresses, as CIDRs. */
export type BlockPeer = { block: string; except?: string[] };
/** Whom a rule is about. */
export type PolicyPeer = PodPeer | BlockPeer;

/** The protocols Kubernetes knows. */
export type Protocol = "tcp" | "udp" | "sctp";

/** Ports of a rule: neither number nor name means every port of the protocol. */
export interface RulePort {
  protocol: Protocol;
  port?: number;
  endPort?: number;
  name?: string;
}

/** One rule: traffic with one of the peers on one of the ports. Absent: with all of them. */
export interface PolicyRule {
  peers?: PolicyPeer[];
  ports?: RulePort[];
}

/** Where a value stands in its object, and what takes the reason when it cannot be read. */
export interface Place {
  /** `spec.ingress[0].ports[1]` */
  path: string;
  report: (path: string, reason: string) => void;
}

/** The place of a member: `.ports`, `[1]`. */
function within({ path, report }: Place, member: string): Place {
  return { path: `${path}${member}`, report };
}

function refuse({ path, report }: Place, reason: string): undefined {
  report(path, `${reason}: left out, it allows nothing until it is corrected`);
  return undefined;
}

/** The text of a value in a sentence. */
export function shown(value: unknown): string {
  return `"${oneLine(typeof value === "string" ? value : (JSON.stringify(value) ?? ""), 80)}"`;
}

/** The first key that is not one of these; values that are null or undefined do not count. */
export function unknownKey(value: Fields, keys: string[]): string | undefined {
  return Object.keys(value).find((key) => !keys.includes(key) && value[key] != null);
}

type Fields = Record<string, unknown>;
type Parser<T, Value = unknown> = (value: Value, at: Place) => T | undefined;

/** Parses an object that has no other keys than these; everything else is refused. */
function parseFields<T>(what: string, keys: string[], parse: Parser<T, Fields>): Parser<T> {
  return (value, at) => {
    if (!isObject(value)) return refuse(at, `it is no ${what}`);
    const unknown = unknownKey(value, keys);
    return unknown === undefined ? parse(value, at) : refuse(at, `unknown key ${shown(unknown)}`);
  };
}

/** @returns the readable members; undefined when there were some and none is readable */
function readList<T>(value: unknown, at: Place, parse: Parser<T>): T[] | undefined {
  if (value == null) return [];
  if (!Array.isArray(value)) return refuse(at, "it is no list");
  const all = value.map((one, index) => parse(one, within(at, `[${index}]`)));
  const readable = all.filter((one) => one !== undefined);
  return readable.length === 0 && value.length > 0 ? undefined : readable;
}

/** A label selector; undefined where it cannot be read. Absent (null) selects everything. */
export function parseSelector(value: unknown, at: Place): Selector | undefined {
  return value == null ? [] : parseGivenSelector(value, at);
}

const selectorKeys = ["matchLabels", "matchExpressions"];
const parseGivenSelector = parseFields("label selector", selectorKeys, (fields, at) => {
  const labels = fields["matchLabels"] ?? {};
  const labelsAt = within(at, ".matchLabels");
  if (!isObject(labels)) return refuse(labelsAt, "it is no object");
  const expressions = fields["matchExpressions"] ?? [];
  const expressionsAt = within(at, ".matchExpressions");
  if (!Array.isArray(expressions)) return refuse(expressionsAt, "it is no list");
  const selector: Selector = [];
  for (const [key, one] of Object.entries(labels)) {
    if (typeof one !== "string") return refuse(labelsAt, `the value of ${shown(key)} is no string`);
    selector.push([key, "In", [one]]);
  }
  for (const [index, one] of expressions.entries()) {
    const parsed = parseExpression(one, within(expressionsAt, `[${index}]`));
    if (parsed === undefined) return undefined;
    selector.push(parsed);
  }
  return selector.sort((a, b) => compareText(JSON.stringify(a), JSON.stringify(b)));
});

const expressionKeys = ["key", "operator", "values"];
const parseExpression = parseFields<Selector[number]>("object", expressionKeys, (fields, at) => {
  const { key, operator } = fields;
  const values = fields["values"] ?? [];
  if (typeof key !== "string" || key === "") return refuse(at, "it has no key");
  if (!Array.isArray(values) || !values.every((one) => typeof one === "string")) {
    return refuse(at, "its values are no list of strings");
  }
  if (operator === "In" || operator === "NotIn") {
    if (values.length === 0) return refuse(at, `${operator} needs values`);
    return [key, operator, [...new Set(values)].sort()];
  }
  if (operator !== "Exists" && operator !== "DoesNotExist") {
    const advice = "use In, NotIn, Exists or DoesNotExist";
    return refuse(at, `unknown operator ${shown(operator)}, ${advice}`);
  }
  return values.length > 0 ? refuse(at, `${operator} takes no values`) : [key, operator, []];
});

/** True when these labels are selected. */
export function selects(selector: Selector, labels: Record<string, string>): boolean {
  return selector.every(([key, operator, values]) => {
    const value = Object.hasOwn(labels, key) ? labels[key] : undefined;
    if (operator === "Exists") return value !== undefined;
    if (operator === "DoesNotExist") return value === undefined;
    const isListed = value !== undefined && values.includes(value);
    return operator === "In" ? isListed : !isListed;
  });
}

/**
 * The rules of one direction. A rule of which no peer, or no port, is left allows nothing and goes.
 * @param side `from` for ingress, `to` for egress
 */
export function parseRules(value: unknown, side: "from" | "to", at: Place): PolicyRule[] {
  const parseRule = parseFields<PolicyRule>("rule", [side, "ports"], (rule, place) => {
    const peers = readList(rule[side], within(place, `.${side}`), parsePeer);
    const ports = readList(rule["ports"], within(place, ".ports"), parsePort);
    if (peers === undefined || ports === undefined) return undefined;
    return { ...(peers.length > 0 && { peers }), ...(ports.length > 0 && { ports }) };
  });
  return readList(value, at, (one, place) => parseRule(one === null ? {} : one, place)) ?? [];
}

const peerKeys = ["podSelector", "namespaceSelector", "ipBlock"];
const parsePeer = parseFields<PolicyPeer>("peer", peerKeys, (fields, at) => {
  const { podSelector, namespaceSelector, ipBlock } = fields;
  const hasSelector = podSelector != null || namespaceSelector != null;
  if (ipBlock != null) {
    if (hasSelector) return refuse(at, "an ipBlock stands alone, without selectors");
    return parseBlock(ipBlock, within(at, ".ipBlock"));
  }
  if (!hasSelector) {
    return refuse(at, "it names nobody: give podSelector, namespaceSelector or ipBlock");
  }
  const pods = parseSelector(podSelector, within(at, ".podSelector"));
  const namespaces = parseSelector(namespaceSelector, within(at, ".namespaceSelector"));
  if (pods === undefined || namespaces === undefined) return undefined;
  return { ...(podSelector != null && { pods }), ...(namespaceSelector != null && { namespaces }) };
});

/** An exception that cannot be read, or lies outside, makes the whole block unreadable. */
const parseBlock = parseFields<BlockPeer>("object", ["cidr", "except"], (fields, at) => {
  const subnet = parseCidr(fields["cidr"], within(at, ".cidr"));
  const listed = fields["except"] ?? [];
  if (!Array.isArray(listed)) return refuse(within(at, ".except"), "it is no list");
  const exceptAt = (index: number) => within(at, `.except[${index}]`);
  const holes = listed.flatMap((one, index) => parseCidr(one, exceptAt(index)) ?? []);
  if (subnet === undefined || holes.length < listed.length) return undefined;
  const block = formatSubnet(subnet);
  const except = holes.map(formatSubnet);
  const outside = except.findIndex((one) => !contains(block, one));
  if (outside >= 0) {
    return refuse(exceptAt(outside), `${shown(listed[outside])} is not inside ${block}`);
  }
  return { block, ...(except.length > 0 && { except: [...new Set(except)].sort() }) };
});

function parseCidr(value: unknown, at: Place): Subnet | undefined {
  const given = typeof value === "string" ? parseSubnet(value) : undefined;
  if (typeof value !== "string" || given === undefined) {
    return refuse(at, `${shown(value)} is no CIDR such as 10.1.0.0/16 or fd00::/64`);
  }
  const subnet = unmapped(given);
  if (subnet === undefined) {
    return refuse(at, `${shown(value)} mixes IPv4 and IPv6: write the IPv4 CIDR`);
  }
  const address = toNumber(value.slice(0, value.indexOf("/")));
  const what = subnet !== given ? "is IPv4 in IPv6 form" : "has bits behind its prefix";
  if (subnet !== given || address !== subnet.base) {
    at.report(at.path, `${shown(value)} ${what} and counts as ${formatSubnet(subnet)}`);
  }
  return subnet;
}

const portKeys = ["protocol", "port", "endPort"];
const parsePort = parseFields<RulePort>("port", portKeys, ({ port, endPort, ...given }, at) => {
  const protocol = protocolOf(given["protocol"]);
  if (protocol === undefined) {
    return refuse(at, `unknown protocol ${shown(given["protocol"])}, use TCP, UDP or SCTP`);
  }
  if (port == null) return endPort != null ? refuse(at, "endPort needs port") : { protocol };
  if (typeof port === "string" && !/^\d+$/.test(port)) {
    if (!isPortName(port)) return refuse(at, `${shown(port)} is no port and no name`);
    if (endPort != null) return refuse(at, "a named port takes no endPort");
    return { protocol, name: port };
  }
  if (!isPortNumber(port)) return refuse(at, `${shown(port)} is no port`);
  if (endPort == null) return { protocol, port };
  if (!isPortNumber(endPort) || endPort < port) {
    return refuse(at, `endPort ${shown(endPort)} is no port from ${port} up`);
  }
  return { protocol, port, ...(endPort > port && { endPort }) };
});

/** True for the number of a port. */
export function isPortNumber(value: unknown): value is number {
  return Number.isInteger(value) && Number(value) >= 1 && Number(value) <= 65535;
}

/** True for the name of a container's port (IANA_SVC_NAME). */
export function isPortName(value: unknown): value is string {
  return typeof value === "string" && /^(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*$/.test(value);
}

const protocols = { TCP: "tcp", UDP: "udp", SCTP: "sctp" } as const;

/** The protocol of a port, TCP where none is given; undefined for an unknown one. */
export function protocolOf(value: unknown): Protocol | undefined {
  const text = String(value ?? "TCP");
  return Object.hasOwn(protocols, text) ? protocols[text as keyof typeof protocols] : undefined;
}

/** Order of plain text, the same everywhere. */
export function compareText(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** Names of objects as the API server allows them (RFC 1123 subdomain). */
export function isObjectName(value: unknown): value is string {
  return typeof value === "string" && /^(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/.test(value);
}

/** The JSON of an annotation; undefined for a text that is none. */
export function parseAnnotation(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** One entry of CNI-Genie's policy between logical networks. */
export interface NetworkRule {
  /** Name of the selected network; "*" when it cannot be read: every one of the namespace. */
  network: string;
  peers: string[];
}

/** Spellings of its annotation's key: the manual's, the controller's. */
export const genieKeys = ["genieNetworkpolicy", "genieNetworkPolicy"];

/**
 * Reads the annotation. A network that is selected talks within itself and with its peer networks,
 * both ways, and with nobody else; a network that no policy selects is open. A peer that cannot be
 * read is not admitted; when it is not even known which network was meant, every logical network of
 * the namespace is closed to the others.
 */
export function parseNetworkRules(text: string, at: Place): NetworkRule[] {
  const entries = parseEntries(text);
  if (entries !== undefined) {
    return entries.map((entry, index) => parseEntry(entry, within(at, `[${index}]`)));
  }
  at.report(at.path, "it is no list of networkSelector and peerNetworks, all networks are closed");
  return [{ network: "*", peers: [] }];
}

function parseEntry(entry: unknown, { path, report }: Place): NetworkRule {
  const { networkSelector, peerNetworks } = isObject(entry) ? entry : {};
  const network = typeof networkSelector === "string" ? networkSelector.trim() : "";
  if (!isObject(entry) || !isObjectName(network)) {
    const what = `networkSelector ${shown(networkSelector)} is no network`;
    report(path, `${what}, all networks are closed`);
    return { network: "*", peers: [] };
  }
  const unknown = unknownKey(entry, ["networkSelector", "peerNetworks"]);
  if (unknown !== undefined) report(path, `unknown key ${shown(unknown)}`);
  const listed = peerNetworks ?? "";
  if (typeof listed !== "string") {
    report(path, "peerNetworks is no text of names with commas between");
    return { network, peers: [] };
  }
  const peers = new Set<string>();
  for (const peer of listed.split(",").map((one) => one.trim())) {
    if (isObjectName(peer)) peers.add(peer);
    else if (peer !== "") report(path, `peer ${shown(peer)} is no name of a network`);
  }
  return { network, peers: [...peers].sort() };
}

/**
 * The entries: JSON, as CNI-Genie's controller reads it, or the form of its manual, which has
 * neither quotes nor commas; undefined where it is neither.
 */
function parseEntries(text: string): unknown[] | undefined {
  const value = parseAnnotation(text);
  if (value !== undefined) return Array.isArray(value) ? value : undefined;
  const bare = text.replaceAll(/\s+#[^\n]*/g, "").trim();
  if (!/^\[.*\]$/s.test(bare)) return undefined;
  if (!/^[\s,]*$/.test(bare.slice(1, -1).replaceAll(/\{[^{}]*\}/g, ""))) return undefined;
  return [...bare.matchAll(/\{([^{}]*)\}/g)].map(([, body = ""]) => parseLines(body));
}

/** `networkSelector: net1` and `peerNetworks: net2,net3`, on lines of their own. */
function parseLines(body: string): Record<string, string> | undefined {
  const lines = body.split("\n").map((line) => line.trim().replace(/,$/, ""));
  const pairs = lines.filter((line) => line !== "").map((line) => /^(\w+)\s*:\s*(.*)$/.exec(line));
  if (pairs.includes(null)) return undefined;
  return Object.fromEntries(pairs.map((pair) => [pair?.[1] ?? "", pair?.[2] ?? ""]));
}
