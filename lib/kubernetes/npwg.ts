/**
 * The two annotations of the NPWG multi-network specification v1.3: the selection a pod writes (§4)
 * and the status we publish (§5); and CNI-Genie's `multi-ip-preferences`. Pure: text and data.
 *
 * Where the specification calls an invalid annotation "ignored", we refuse it: a pod that starts
 * without a network it asked for is worse than one that says why it does not start.
 */
import * as v from "valibot";
import { CniError, code, interfaceNameIssue, isNetworkName, oneLine } from "../cni.ts";
import { isIP } from "../ip.ts";
import { isObject, parseJson } from "../json.ts";
import { attachmentsMax, npwgKeys, type SelectionElement } from "../pod.ts";
import type { Result } from "../record.ts";

/** One NetworkAttachmentDefinition a pod selects, with what it wants of it. */
export interface NetworkElement extends SelectionElement {
  /** Namespace of the object; the pod's own where the annotation names none. */
  namespace: string;
  /** For `runtimeConfig` (§4.1.2.1.3 ff), by CNI capability name. */
  capabilityArgs: Record<string, unknown>;
  /** For `args.cni`; the pod's value wins over the config's (§4.1.2.1.6). */
  cniArgs?: Record<string, unknown>;
  /** Gateways that become the pod's default route; empty: the attachment's own (§4.1.2.1.9). */
  defaultRoute?: string[];
  /** What is wrong in the annotation, though it is clear what is meant. */
  warning?: string;
}

/** Longest selection text, in characters. */
const selectionLengthMax = 64 * 1024;

const port = v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(65535));
const rate = v.pipe(v.number(), v.integer(), v.minValue(1), v.maxValue(Number.MAX_SAFE_INTEGER));
/** Takes these values of an object for absent ones: Go programs write them for what they lack. */
const without = (...blanks: unknown[]) =>
  v.transform((value: unknown) => {
    if (!isObject(value)) return value;
    return Object.fromEntries(Object.entries(value).filter(([, one]) => !blanks.includes(one)));
  });
const address = v.pipe(v.string(), v.check(isAddress, "expected an IP address"));
const isGateway = (text: string) => isIP(text) !== 0;
const gateway = v.pipe(v.string(), v.check(isGateway, "expected an IP address"));
const hexBytes = (count: number) =>
  v.pipe(v.string(), v.regex(new RegExp(`^[0-9a-f]{2}(:[0-9a-f]{2}){${count - 1}}$`, "i")));
const objectName = v.pipe(v.string(), v.check(isObjectName, "expected the name of an object"));
const cniArgs = v.pipe(
  v.custom<Record<string, unknown>>(isObject, "expected an object"),
  v.record(v.string(), v.unknown()),
);
/** CNI CONVENTIONS: protocols are lower case; absent means TCP (§4.1.2.1.7). */
const PortMapping = v.pipe(
  v.unknown(),
  without(null, ""),
  v.object({
    hostPort: port,
    containerPort: port,
    protocol: v.optional(v.pipe(v.string(), v.regex(/^(udp|tcp|sctp)$/i), v.toLowerCase()), "tcp"),
    hostIP: v.exactOptional(address),
  }),
);
const rates = ["ingressRate", "ingressBurst", "egressRate", "egressBurst"] as const;
const Bandwidth = v.pipe(
  v.unknown(),
  without(null, 0),
  v.strictObject(v.entriesFromList(rates, v.exactOptional(rate))),
);

/** §4.1.2.1; keys with a dot belong to others and are passed over, keys without one are errors. */
const Element = v.looseObject({
  name: objectName,
  namespace: v.exactOptional(objectName),
  ips: v.exactOptional(v.array(address)),
  mac: v.exactOptional(hexBytes(6)),
  interface: v.exactOptional(v.string()),
  "cni-args": v.exactOptional(cniArgs),
  portMappings: v.exactOptional(v.array(PortMapping)),
  bandwidth: v.exactOptional(Bandwidth),
  "default-route": v.exactOptional(v.array(gateway)),
  "infiniband-guid": v.exactOptional(hexBytes(8)),
  "ipam-claim-reference": v.exactOptional(objectName),
});
type Element = v.InferOutput<typeof Element>;
const knownKeys = new Set(["interfaceRequest", ...Object.keys(Element.entries)]);

/**
 * Parses `k8s.v1.cni.cncf.io/networks` in either format: `a,ns/b,c@eth5` or a JSON list.
 * @param podNamespace namespace of objects named without one
 * @param key annotation to name in errors
 * @throws CniError 7 for an annotation that breaks §4, names too many networks, or gives two of
 *   them the default route
 */
export function parseNetworkSelection(
  text: string,
  podNamespace: string,
  key: string = npwgKeys.networks,
): NetworkElement[] {
  if (text.length > selectionLengthMax) {
    throw invalid(key, `it is longer than ${selectionLengthMax} characters`);
  }
  const trimmed = text.trim();
  if (trimmed === "") return [];
  const elements = /^[[{]/.test(trimmed)
    ? parseJsonList(trimmed, podNamespace, key)
    : parseNames(trimmed, podNamespace, key);
  if (elements.length > attachmentsMax) {
    const count = elements.length;
    throw invalid(key, `it names ${count} networks, at most ${attachmentsMax} are allowed`);
  }
  if (elements.filter(({ defaultRoute }) => defaultRoute !== undefined).length > 1) {
    throw invalid(key, 'only one network may carry "default-route"');
  }
  return elements;
}

/** Parses `v1.multus-cni.io/default-network`: one element of that grammar. @throws CniError 7 */
export function parseDefaultNetwork(text: string, podNamespace: string): NetworkElement {
  const key = npwgKeys.defaultNetwork;
  const [only, ...others] = parseNetworkSelection(text, podNamespace, key);
  if (only && others.length === 0) return only;
  throw invalid(key, "expected exactly one network");
}

/** `[namespace/]name[@interface]` (§4.1.1, with Multus' interface suffix). */
export function parseReference(text: string, podNamespace: string, key: string): NetworkElement {
  // As in Multus, white space around a part means nothing.
  const parts = /^(?:([^/@]+)\/)?([^/@]*)(?:@(.*))?$/.exec(text) ?? [];
  const trimmed = parts.map((part: string | undefined) => part?.trim());
  const [, namespace = podNamespace, network = "", ifName] = trimmed;
  const isNamed = isObjectName(network) && (namespace === "" || isObjectName(namespace));
  if (!isNamed || ifName?.includes("@")) {
    throw invalid(key, `"${oneLine(text, 80)}" is not [namespace/]name[@interface]`);
  }
  checkInterface(ifName, network, key);
  return { network, namespace, capabilityArgs: {}, ...(ifName !== undefined && { ifName }) };
}

function parseNames(text: string, podNamespace: string, key: string): NetworkElement[] {
  return text.split(",").map((part, index) => {
    if (part.trim() !== "") return parseReference(part.trim(), podNamespace, key);
    throw invalid(key, `element ${index + 1} of "${oneLine(text, 80)}" is empty`);
  });
}

/**
 * An element as Multus reads it: templates write null and empty values for what they leave out, and
 * early releases wrote `interfaceRequest`. An empty "default-route" has a meaning (§4.1.2.1.9).
 */
function readLeniently(element: Record<string, unknown>): [Record<string, unknown>, string[]] {
  const warnings: string[] = [];
  // Not assigned one by one: a key may be "__proto__".
  const kept: [string, unknown][] = [];
  for (const [name, value] of Object.entries(element)) {
    const isEmpty = value === "" || (isObject(value) && Object.keys(value).length === 0);
    const isEmptyList = Array.isArray(value) && value.length === 0 && name !== "default-route";
    const isDropped = value === null || isEmpty || isEmptyList;
    if (name === "interfaceRequest" && !isDropped) {
      kept.unshift(["interface", value]);
      warnings.push('"interfaceRequest" is an old name of "interface"');
    } else if (!isDropped || name === "name" || !knownKeys.has(name)) {
      kept.push([name, value]);
    } else warnings.push(`"${name}" is empty and counts as absent`);
  }
  return [Object.fromEntries(kept), warnings];
}

function parseJsonList(text: string, podNamespace: string, key: string): NetworkElement[] {
  const value = parseJson(text, `annotation "${key}"`);
  const list = Array.isArray(value) ? value : [value];
  return list.map((one, index) => {
    const [element, warnings] = isObject(one) ? readLeniently(one) : [one, []];
    const parsed = v.safeParse(Element, element);
    if (!parsed.success) {
      const [issue] = parsed.issues;
      const path = oneLine(v.getDotPath(issue) ?? "element", 80);
      throw invalid(key, `element ${index + 1}, "${path}": ${oneLine(issue.message, 200)}`);
    }
    const isUnknown = (name: string) => !knownKeys.has(name) && !name.includes(".");
    const unknown = Object.keys(parsed.output).find(isUnknown);
    if (unknown !== undefined) {
      throw invalid(key, `element ${index + 1}: unknown key "${oneLine(unknown, 80)}"`);
    }
    const found = fromElement(parsed.output, podNamespace, key);
    if (warnings.length === 0) return found;
    return { ...found, warning: `${key}, element ${index + 1}: ${warnings.join(", ")}` };
  });
}

function fromElement(element: Element, podNamespace: string, key: string): NetworkElement {
  const { name, ips, mac, interface: ifName, bandwidth, portMappings } = element;
  const { "ipam-claim-reference": claim, "cni-args": cniArgs } = element;
  const { "default-route": defaultRoute, "infiniband-guid": infinibandGUID } = element;
  checkInterface(ifName, name, key);
  if (ips && claim !== undefined) {
    throw invalid(key, `network "${name}": "ips" and "ipam-claim-reference" exclude each other`);
  }
  const capabilities = {
    ips,
    mac,
    portMappings,
    bandwidth: bandwidth && toBandwidth(bandwidth, name, key),
    infinibandGUID,
    "ipam-claim-reference": claim,
  };
  const asked = Object.entries(capabilities).filter(([, value]) => value !== undefined);
  return {
    network: name,
    namespace: element.namespace || podNamespace,
    ...(ifName !== undefined && { ifName }),
    capabilityArgs: Object.fromEntries(asked),
    ...(cniArgs && { cniArgs }),
    ...(defaultRoute && { defaultRoute }),
  };
}

/**
 * A burst without its rate is invalid (§4.1.2.1.8). A rate without a burst gets one second's worth
 * of it, within what the bandwidth plugin accepts: that plugin refuses a rate alone.
 */
function toBandwidth(bandwidth: v.InferOutput<typeof Bandwidth>, network: string, key: string) {
  const args: Record<string, number> = {};
  for (const direction of ["ingress", "egress"] as const) {
    const bits = bandwidth[`${direction}Rate`];
    const burst = bandwidth[`${direction}Burst`];
    if (bits === undefined) {
      if (burst === undefined) continue;
      throw invalid(key, `network "${network}": "${direction}Burst" needs "${direction}Rate"`);
    }
    args[`${direction}Rate`] = bits;
    args[`${direction}Burst`] = burst ?? Math.min(bits, 2 ** 31 - 1);
  }
  return Object.keys(args).length > 0 ? args : undefined;
}

function checkInterface(ifName: string | undefined, network: string, key: string): void {
  const issue = ifName === undefined ? undefined : requestedNameIssue(ifName);
  if (issue === undefined) return;
  const shown = oneLine(ifName ?? "", 40);
  throw invalid(key, `"${shown}" cannot name an interface for "${network}": ${issue}`);
}

/** An IP address, with or without a prefix length. */
function isAddress(text: string): boolean {
  const [, ip = "", prefix] = /^([^/]*)(?:\/(\d{1,3}))?$/.exec(text) ?? [];
  const family = isIP(ip);
  return family !== 0 && (prefix === undefined || Number(prefix) <= (family === 4 ? 32 : 128));
}

/** A Kubernetes object's name (RFC 1123 subdomain). */
export function isObjectName(text: string): boolean {
  return isNetworkName(text) && /^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$/.test(text) && text.length <= 253;
}

function invalid(key: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid annotation "${key}": ${issue}`);
}

/** One attachment for the status annotation. */
export interface StatusSource {
  /** With its namespace, for an object of the API. */
  name: string;
  ifName: string;
  result: Result;
  /** True for the attachment of the cluster-wide default network, exactly one. */
  isDefault: boolean;
  defaultRoute?: string[];
  deviceInfo?: Record<string, unknown>;
}

/** Formats `k8s.v1.cni.cncf.io/network-status` (§5). */
export function formatStatus(sources: StatusSource[]): string {
  return JSON.stringify(sources.flatMap(statusEntries));
}

/**
 * One entry for each interface that a plugin made in the pod (§5.1.1 names the first alone), as
 * CreateNetworkStatuses() of network-attachment-definition-client: of the default network that one
 * is the default which has a gateway, else the first.
 */
function statusEntries({
  name,
  ifName,
  result,
  isDefault,
  defaultRoute,
  deviceInfo,
}: StatusSource) {
  const { interfaces, ips, dns } = result;
  const found = [...interfaces.keys()].filter((i) => Boolean(interfaces[i]?.sandbox));
  const inPod = found.length > 0 ? found : [-1];
  const routed = ips.find(({ gateway, interface: i = -1 }) => gateway && inPod.includes(i));
  const main = routed?.interface ?? inPod[0];
  return inPod.map((index, position) => {
    const own = ips.filter(({ interface: i = -1 }) => i === index || (index < 0 && i < 0));
    const texts = (index < 0 ? own.slice(0, 1) : own).map(withoutPrefix);
    const { name: given, mac } = interfaces[index] ?? {};
    return {
      name,
      interface: given ?? ifName,
      ...(texts.length > 0 && { ips: texts }),
      ...(mac && { mac }),
      default: isDefault && index === main,
      dns,
      ...(position === 0 && defaultRoute?.[0] !== undefined && { "default-route": defaultRoute }),
      ...(deviceInfo && { "device-info": deviceInfo }),
    };
  });
}

/** Formats CNI-Genie's `multi-ip-preferences`: the first address of each network, numbered. */
export function formatMultiIpPreferences(sources: StatusSource[]): string {
  const ips = sources.flatMap(({ ifName, result }) => {
    const [first] = result.ips;
    return first ? [{ ip: withoutPrefix(first), interface: ifName }] : [];
  });
  const numbered = Object.fromEntries(ips.map((one, i) => [`ip${i + 1}`, one]));
  return JSON.stringify({ multi_entry: ips.length, ips: numbered });
}

function withoutPrefix({ address }: { address: string }): string {
  return address.replace(/\/\d+$/, "");
}

/** Why a pod may not ask for this interface name, or undefined when it may. */
export function requestedNameIssue(ifName: string): string | undefined {
  // Every network namespace has these already, as an interface or as a folder of sysctls.
  return /^(lo|all|default)$/.test(ifName) ? "it is reserved" : interfaceNameIssue(ifName);
}
