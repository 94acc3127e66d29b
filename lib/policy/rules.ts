/**
 * The rules of a network policy as plain data, from what the API server hands out: hostile until
 * parsed. Pure. A part that cannot be read is left out and named, and what it would have allowed
 * stays forbidden: a typo never opens a door. That is why an unknown key counts as unreadable:
 * `podSelectr` in a peer would otherwise leave a peer that is every pod.
 *
 * Source: Kubernetes networking.k8s.io/v1 NetworkPolicy; MultiNetworkPolicy has the same rules.
 */
import { formatSubnet, isIP, parseSubnet, type Subnet, unmapped } from "../ip.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";

/** What `operator` of a selector may be. */
export type Operator = "In" | "NotIn" | "Exists" | "DoesNotExist";
/** A label selector: all of these hold; an empty one selects everything. Sorted. */
export type Selector = [key: string, operator: Operator, values: string[]][];

/** Whom a rule is about: pods, by selectors, or addresses. */
export type Peer =
  | { pods?: Selector; namespaces?: Selector }
  | { block: string; except?: string[] };

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
export interface Rule {
  peers?: Peer[];
  ports?: RulePort[];
}

/** Takes a sentence: what cannot be read, where, and what happens to it. */
export type Report = (path: string, reason: string) => void;

const protocols: Record<string, Protocol> = { TCP: "tcp", UDP: "udp", SCTP: "sctp" };

/** The text of a value in a sentence. */
export function shown(value: unknown): string {
  return `"${oneLine(typeof value === "string" ? value : (JSON.stringify(value) ?? ""), 80)}"`;
}

/** The first key that is not one of these; values that are null or undefined do not count. */
export function unknownKey(value: Record<string, unknown>, keys: string[]): string | undefined {
  return Object.keys(value).find((key) => !keys.includes(key) && value[key] != null);
}

/** A label selector; undefined where it cannot be read. Absent (null) selects everything. */
export function parseSelector(value: unknown, path: string, report: Report): Selector | undefined {
  if (value == null) return [];
  if (!isObject(value)) return refuse(report, path, "it is no label selector");
  const odd = unknownKey(value, ["matchLabels", "matchExpressions"]);
  if (odd !== undefined) return refuse(report, path, `unknown key ${shown(odd)}`);
  const labels = value["matchLabels"] ?? {};
  const expressions = value["matchExpressions"] ?? [];
  if (!isObject(labels)) return refuse(report, `${path}.matchLabels`, "it is no object");
  if (!Array.isArray(expressions)) {
    return refuse(report, `${path}.matchExpressions`, "it is no list");
  }
  const selector: Selector = [];
  for (const [key, one] of Object.entries(labels)) {
    if (typeof one !== "string") {
      return refuse(report, `${path}.matchLabels`, `the value of ${shown(key)} is no string`);
    }
    selector.push([key, "In", [one]]);
  }
  for (const [index, one] of expressions.entries()) {
    const parsed = parseExpression(one);
    if (typeof parsed === "string") {
      return refuse(report, `${path}.matchExpressions[${index}]`, parsed);
    }
    selector.push(parsed);
  }
  return selector.sort((a, b) => compareText(JSON.stringify(a), JSON.stringify(b)));
}

/** @returns the expression, or why it is none */
function parseExpression(value: unknown): Selector[number] | string {
  if (!isObject(value)) return "it is no object";
  const odd = unknownKey(value, ["key", "operator", "values"]);
  if (odd !== undefined) return `unknown key ${shown(odd)}`;
  const { key, operator } = value;
  const values = value["values"] ?? [];
  if (typeof key !== "string" || key === "") return "it has no key";
  if (!Array.isArray(values) || !values.every((one) => typeof one === "string")) {
    return "its values are no list of strings";
  }
  if (operator === "In" || operator === "NotIn") {
    if (values.length === 0) return `${operator} needs values`;
    return [key, operator, [...new Set(values)].sort()];
  }
  if (operator !== "Exists" && operator !== "DoesNotExist") {
    return `unknown operator ${shown(operator)}, use In, NotIn, Exists or DoesNotExist`;
  }
  if (values.length > 0) return `${operator} takes no values`;
  return [key, operator, []];
}

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
export function parseRules(
  value: unknown,
  side: "from" | "to",
  path: string,
  report: Report,
): Rule[] {
  if (value == null) return [];
  if (!Array.isArray(value)) {
    report(path, "it is no list");
    return [];
  }
  return value.flatMap((one, index) => {
    const rule = parseRule(one, side, `${path}[${index}]`, report);
    return rule === undefined ? [] : [rule];
  });
}

function parseRule(
  value: unknown,
  side: "from" | "to",
  path: string,
  report: Report,
): Rule | undefined {
  if (value !== null && !isObject(value)) return refuse(report, path, "it is no rule");
  const rule = value ?? {};
  const odd = unknownKey(rule, [side, "ports"]);
  if (odd !== undefined) return refuse(report, path, `unknown key ${shown(odd)}`);
  const peers = parseList(rule[side], `${path}.${side}`, report, parsePeer);
  const ports = parseList(rule["ports"], `${path}.ports`, report, parsePort);
  if (peers === undefined || ports === undefined) return undefined;
  return { ...(peers.length > 0 && { peers }), ...(ports.length > 0 && { ports }) };
}

/** @returns the readable members; undefined when there were some and none is readable */
function parseList<T>(
  value: unknown,
  path: string,
  report: Report,
  parse: (one: unknown, path: string, report: Report) => T | undefined,
): T[] | undefined {
  if (value == null) return [];
  if (!Array.isArray(value)) return refuse(report, path, "it is no list");
  const parsed = value.flatMap((one, index): T[] => {
    const item = parse(one, `${path}[${index}]`, report);
    return item === undefined ? [] : [item];
  });
  return parsed.length === 0 && value.length > 0 ? undefined : parsed;
}

function parsePeer(value: unknown, path: string, report: Report): Peer | undefined {
  if (!isObject(value)) return refuse(report, path, "it is no peer");
  const odd = unknownKey(value, ["podSelector", "namespaceSelector", "ipBlock"]);
  if (odd !== undefined) return refuse(report, path, `unknown key ${shown(odd)}`);
  const { podSelector, namespaceSelector, ipBlock } = value;
  if (ipBlock != null) {
    if (podSelector != null || namespaceSelector != null) {
      return refuse(report, path, "an ipBlock stands alone, without selectors");
    }
    return parseBlock(ipBlock, `${path}.ipBlock`, report);
  }
  if (podSelector == null && namespaceSelector == null) {
    return refuse(report, path, "it names nobody: give podSelector, namespaceSelector or ipBlock");
  }
  const pods = parseSelector(podSelector, `${path}.podSelector`, report);
  const namespaces = parseSelector(namespaceSelector, `${path}.namespaceSelector`, report);
  if (pods === undefined || namespaces === undefined) return undefined;
  return { ...(podSelector != null && { pods }), ...(namespaceSelector != null && { namespaces }) };
}

/** An exception that cannot be read, or takes nothing away, was meant to: the block goes whole. */
function parseBlock(value: unknown, path: string, report: Report): Peer | undefined {
  if (!isObject(value)) return refuse(report, path, "it is no object");
  const odd = unknownKey(value, ["cidr", "except"]);
  if (odd !== undefined) return refuse(report, path, `unknown key ${shown(odd)}`);
  const block = parseCidr(value["cidr"], `${path}.cidr`, report);
  const listed = value["except"] ?? [];
  if (!Array.isArray(listed)) return refuse(report, `${path}.except`, "it is no list");
  const except = listed.map((one, i) => parseCidr(one, `${path}.except[${i}]`, report));
  if (block === undefined || except.includes(undefined)) return undefined;
  const parts = except.filter((one) => one !== undefined);
  const outside = parts.findIndex(
    ({ family, base, size }) =>
      family !== block.family || base < block.base || base + size > block.base + block.size,
  );
  if (outside >= 0) {
    const what = `${shown(listed[outside])} is not inside ${formatSubnet(block)}`;
    return refuse(report, `${path}.except[${outside}]`, what);
  }
  const texts = [...new Set(parts.map(formatSubnet))].sort();
  return { block: formatSubnet(block), ...(texts.length > 0 && { except: texts }) };
}

function parseCidr(value: unknown, path: string, report: Report): Subnet | undefined {
  const given = typeof value === "string" ? parseSubnet(value) : undefined;
  if (typeof value !== "string" || given === undefined) {
    return refuse(report, path, `${shown(value)} is no CIDR such as 10.1.0.0/16 or fd00::/64`);
  }
  const subnet = unmapped(given);
  if (subnet === undefined) {
    return refuse(report, path, `${shown(value)} mixes IPv4 and IPv6: write the IPv4 CIDR`);
  }
  const text = formatSubnet(subnet);
  if (subnet !== given) report(path, `${shown(value)} is IPv4 in IPv6 form and counts as ${text}`);
  else if (isIP(value.slice(0, value.indexOf("/"))) !== 0 && hasHostBits(value, subnet)) {
    report(path, `${shown(value)} has bits behind its prefix and counts as ${text}`);
  }
  return subnet;
}

function hasHostBits(text: string, subnet: Subnet): boolean {
  const host = parseSubnet(`${text.slice(0, text.indexOf("/"))}/${subnet.family === 4 ? 32 : 128}`);
  return host?.base !== subnet.base;
}

function parsePort(value: unknown, path: string, report: Report): RulePort | undefined {
  if (!isObject(value)) return refuse(report, path, "it is no port");
  const odd = unknownKey(value, ["protocol", "port", "endPort"]);
  if (odd !== undefined) return refuse(report, path, `unknown key ${shown(odd)}`);
  const { port, endPort } = value;
  const protocol = protocols[String(value["protocol"] ?? "TCP")];
  if (protocol === undefined) {
    const what = `unknown protocol ${shown(value["protocol"])}, use TCP, UDP or SCTP`;
    return refuse(report, path, what);
  }
  if (port == null) {
    if (endPort != null) return refuse(report, path, "endPort needs port");
    return { protocol };
  }
  if (typeof port === "string" && !/^\d+$/.test(port)) {
    if (!isPortName(port)) return refuse(report, path, `${shown(port)} is no port and no name`);
    if (endPort != null) return refuse(report, path, "a named port takes no endPort");
    return { protocol, name: port };
  }
  if (!isPortNumber(port)) return refuse(report, path, `${shown(port)} is no port`);
  if (endPort == null) return { protocol, port };
  if (!isPortNumber(endPort) || endPort < port) {
    return refuse(report, path, `endPort ${shown(endPort)} is no port from ${port} up`);
  }
  return { protocol, port, ...(endPort > port && { endPort }) };
}

/** True for the number of a port. */
export function isPortNumber(value: unknown): value is number {
  return Number.isInteger(value) && Number(value) >= 1 && Number(value) <= 65535;
}

/** True for the name of a container's port (IANA_SVC_NAME). */
export function isPortName(value: unknown): value is string {
  return typeof value === "string" && /^(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*$/.test(value);
}

/** The protocol of a container's port; undefined for an unknown one. */
export function protocolOf(value: unknown): Protocol | undefined {
  return protocols[String(value ?? "TCP")];
}

/** Order of plain text, the same everywhere. */
export function compareText(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

function refuse(report: Report, path: string, reason: string): undefined {
  report(path, `${reason}: left out, it allows nothing until it is corrected`);
  return undefined;
}
