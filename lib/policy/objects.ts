/**
 * What network policy is decided on, as small plain data: policies, pods, namespaces, networks.
 * Pure. Everything the API server hands out is hostile until parsed here; what comes out is JSON
 * that is stored and compared as text.
 *
 * Sources: MultiNetworkPolicy k8s.cni.cncf.io/v1beta1 and v1beta2, NetworkPolicy
 * networking.k8s.io/v1, CNI-Genie's annotation `genieNetworkpolicy` between logical networks.
 */
import { canonicalIP, parseSubnet } from "../ip.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";
import { between, genieKeys, type NetworkRule } from "./between.ts";
import {
  compareText,
  isPortName,
  isPortNumber,
  type Protocol,
  parseRules,
  parseSelector,
  protocolOf,
  type Report,
  type Rule,
  type Selector,
  shown,
  unknownKey,
} from "./rules.ts";

/** Something an operator must look at. The rest of the policy stays in force. */
export interface PolicyProblem {
  /** The object it is about, and where in it: `spec.ingress[0].ports[1]`. */
  kind: string;
  namespace: string;
  name: string;
  path: string;
  /** What is wrong, what happens meanwhile, what to do. */
  text: string;
}

/** One policy, whichever of the three kinds. */
export interface Policy {
  kind: "MultiNetworkPolicy" | "NetworkPolicy";
  namespace: string;
  name: string;
  uid: string;
  /**
   * MultiNetworkPolicy: the networks it is for, `namespace/name` or a plain name of the plugin
   * table. Null when that cannot be read: every network but the default one, closed.
   */
  networks?: string[] | null;
  /** CNI-Genie's policy between networks: it selects networks and no pods. */
  between?: NetworkRule[];
  /** Null when it cannot be read: every pod of the namespace. */
  pods: Selector | null;
  /** Absent: this direction is not isolated. Empty: nothing is allowed. */
  ingress?: Rule[];
  egress?: Rule[];
  problems: PolicyProblem[];
}

/** A port a container has a name for. */
export interface NamedPort {
  name: string;
  protocol: Protocol;
  port: number;
}

/** An interface of a pod on a network. */
export interface PodAttachment {
  /** `namespace/name` or a plain name. */
  network: string;
  ifName: string;
  ips: string[];
  /** Set on the attachment that carries the pod's own address. */
  isDefault?: true;
}

/** A pod, as a peer and as one to whom policies apply. */
export interface PolicyPod {
  namespace: string;
  name: string;
  uid: string;
  labels: Record<string, string>;
  phase: string;
  hostNetwork: boolean;
  ports: NamedPort[];
  podIps: string[];
  /** Addresses of the node it runs on. */
  hostIps: string[];
  attachments: PodAttachment[];
}

/** A namespace, by its labels. */
export interface PolicyNamespace {
  name: string;
  labels: Record<string, string>;
}

/** A logical network, or a NetworkAttachmentDefinition; only the first has a subnet. */
export interface PolicyNetwork {
  kind: "Logicalnetwork" | "NetworkAttachmentDefinition";
  namespace: string;
  name: string;
  /** CIDR; "" where it has none. */
  subnet: string;
}

/** Annotation that names the networks of a MultiNetworkPolicy. */
export const policyForKey = "k8s.v1.cni.cncf.io/policy-for";
const statusKey = "k8s.v1.cni.cncf.io/network-status";

/**
 * A policy from what the API server handed out. Whatever of it cannot be read is closed and listed
 * in `problems`; only an object without an identity is refused whole.
 */
export function parsePolicy(object: unknown): { policy: Policy } | { problem: PolicyProblem } {
  const group = isObject(object) ? object["apiVersion"] : undefined;
  const listedKind = isObject(object) ? object["kind"] : undefined;
  const kind =
    listedKind === "MultiNetworkPolicy" ||
    (typeof group === "string" && group.startsWith("k8s.cni.cncf.io/"))
      ? "MultiNetworkPolicy"
      : "NetworkPolicy";
  const found = identity(object);
  if (found === undefined || !isObject(object)) {
    const text = "it has no usable name and namespace and is left out: delete it";
    const problem = { kind, namespace: "", name: "", path: "metadata", text };
    return { problem };
  }
  const { namespace, name, uid, annotations } = found;
  const problems: PolicyProblem[] = [];
  const report: Report = (path, reason) => {
    if (problems.length >= problemsMax) return;
    problems.push({ kind, namespace, name, path, text: oneLine(reason, 400) });
  };
  const base = { kind, namespace, name, uid } as const;
  const key = genieKeys.find((one) => annotations[one] !== undefined);
  if (kind === "NetworkPolicy" && key !== undefined) {
    const rules = between(annotations[key], `metadata.annotations.${key}`, report);
    return { policy: { ...base, pods: [], between: rules, problems } };
  }
  const spec = parseSpec(object["spec"], report);
  if (kind === "NetworkPolicy") return { policy: { ...base, ...spec, problems } };
  const networks = parsePolicyFor(annotations[policyForKey], namespace, report);
  return { policy: { ...base, networks, ...spec, problems } };
}

/** A policy with thousands of mistakes needs no thousand sentences. */
const problemsMax = 20;

interface Identity {
  namespace: string;
  name: string;
  uid: string;
  annotations: Record<string, string>;
  labels: Record<string, string>;
}

/** @param isNamespaced false for objects that stand in no namespace */
function identity(object: unknown, isNamespaced = true): Identity | undefined {
  const metadata = isObject(object) ? object["metadata"] : undefined;
  if (!isObject(metadata)) return undefined;
  const { name, uid } = metadata;
  const namespace = metadata["namespace"] ?? "";
  if (!isObjectName(name) || (isNamespaced && !isObjectName(namespace))) return undefined;
  return {
    namespace: isNamespaced ? String(namespace) : "",
    name,
    uid: typeof uid === "string" ? oneLine(uid, 64) : "",
    annotations: strings(metadata["annotations"]),
    labels: strings(metadata["labels"]),
  };
}

/** Names of objects as the API server allows them (RFC 1123 subdomain). */
function isObjectName(value: unknown): value is string {
  return typeof value === "string" && /^(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/.test(value);
}

/** The entries whose value is a string, in the order of their keys. */
function strings(value: unknown): Record<string, string> {
  if (!isObject(value)) return {};
  const entries = Object.entries(value).filter(
    (entry): entry is [string, string] => typeof entry[1] === "string",
  );
  return Object.fromEntries(entries.sort(([a], [b]) => compareText(a, b)));
}

const directions = [
  { type: "Ingress", key: "ingress", side: "from" },
  { type: "Egress", key: "egress", side: "to" },
] as const;

type Spec = Pick<Policy, "pods" | "ingress" | "egress">;

/** A spec that may mean more than we can read isolates both directions. */
function parseSpec(value: unknown, report: Report): Spec {
  if (!isObject(value)) {
    report("spec", "it is missing or no object, every pod of the namespace is closed");
    return { pods: null, ingress: [], egress: [] };
  }
  const odd = unknownKey(value, ["podSelector", "policyTypes", "ingress", "egress"]);
  if (odd !== undefined) report("spec", `unknown key ${shown(odd)}, both directions are isolated`);
  const types = parseTypes(value, report);
  const pods = parseSelector(value["podSelector"], "spec.podSelector", (path, reason) =>
    report(path, `${reason}, and every pod of the namespace is closed`),
  );
  if (pods === undefined) return { pods: null, ingress: [], egress: [] };
  const spec: Spec = { pods };
  for (const { type, key, side } of directions) {
    if (odd === undefined && !types.includes(type)) continue;
    spec[key] = parseRules(value[key], side, `spec.${key}`, report);
  }
  return spec;
}

/** Which directions are isolated; unreadable: both. Absent: ingress, and egress if it has rules. */
function parseTypes(spec: Record<string, unknown>, report: Report): string[] {
  const both = directions.map(({ type }) => type);
  const given = spec["policyTypes"] ?? [];
  if (!Array.isArray(given)) {
    report("spec.policyTypes", "it is no list, both directions are isolated");
    return both;
  }
  const odd = given.find((one) => one !== "Ingress" && one !== "Egress");
  if (odd !== undefined) {
    report("spec.policyTypes", `unknown type ${shown(odd)}, both directions are isolated`);
    return both;
  }
  if (given.length > 0) return given;
  const { egress } = spec;
  const hasEgress = egress != null && !(Array.isArray(egress) && egress.length === 0);
  return hasEgress ? both : ["Ingress"];
}

/** A plain name is one of the policy's namespace, or of the node's plugin table. */
function parsePolicyFor(
  value: string | undefined,
  namespace: string,
  report: Report,
): string[] | null {
  const path = `metadata.annotations.${policyForKey}`;
  if (value === undefined || value.trim() === "") {
    report(path, "it names no network, so the policy applies to none");
    return [];
  }
  const parts = value.split(",").map((part) => part.replaceAll(/\s*\/\s*/g, "/").trim());
  const odd = parts.find((part) => !/^([a-z0-9][-a-z0-9.]*\/)?[a-zA-Z0-9][\w.-]*$/.test(part));
  if (odd !== undefined) {
    report(
      path,
      `${shown(odd)} is no network "name" or "namespace/name", so every network but the ` +
        "default one is closed",
    );
    return null;
  }
  const names = parts.flatMap((part) =>
    part.includes("/") ? [part] : [part, `${namespace}/${part}`],
  );
  return [...new Set(names)].sort();
}

/** Most that is taken of a pod. */
const ipsMax = 64;
const portsMax = 256;
const attachmentsMax = 64;

/** A pod from what the API server handed out; undefined for an object that is none. */
export function parsePolicyPod(object: unknown): PolicyPod | undefined {
  const found = identity(object);
  if (found === undefined || !isObject(object)) return undefined;
  const { namespace, name, uid, labels, annotations } = found;
  const spec = isObject(object["spec"]) ? object["spec"] : {};
  const status = isObject(object["status"]) ? object["status"] : {};
  return {
    namespace,
    name,
    uid,
    labels,
    phase: typeof status["phase"] === "string" ? oneLine(status["phase"], 20) : "",
    hostNetwork: spec["hostNetwork"] === true,
    ports: namedPorts(spec),
    podIps: addressesOf(status["podIPs"], status["podIP"]),
    hostIps: addressesOf(status["hostIPs"], status["hostIP"]),
    attachments: attachmentsOf(annotations[statusKey]),
  };
}

function addressesOf(list: unknown, single: unknown): string[] {
  const listed = Array.isArray(list) ? list.map((one) => (isObject(one) ? one["ip"] : one)) : [];
  return addresses(listed.length > 0 ? listed : [single]);
}

/** Addresses in one spelling; what is none, or could not be a peer's, is left out. */
function addresses(list: unknown): string[] {
  if (!Array.isArray(list)) return [];
  const texts = list.slice(0, ipsMax).map((one) => canonicalIP(one));
  return [...new Set(texts.filter((one) => one !== undefined))];
}

/** Sidecars are init containers that keep running, so those count too. */
function namedPorts(spec: Record<string, unknown>): NamedPort[] {
  const ports = ["initContainers", "containers"].flatMap((key) => {
    const containers = spec[key];
    if (!Array.isArray(containers)) return [];
    return containers.flatMap((container) => {
      const listed = isObject(container) ? container["ports"] : undefined;
      return Array.isArray(listed) ? listed.flatMap(namedPort) : [];
    });
  });
  return ports.slice(0, portsMax);
}

function namedPort(value: unknown): NamedPort[] {
  if (!isObject(value)) return [];
  const { name, containerPort: port } = value;
  const protocol = protocolOf(value["protocol"]);
  return isPortName(name) && isPortNumber(port) && protocol ? [{ name, protocol, port }] : [];
}

/** The interfaces that `network-status` lists; a text that is none lists nothing. */
function attachmentsOf(text: string | undefined): PodAttachment[] {
  if (text === undefined) return [];
  let listed: unknown;
  try {
    listed = JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) return [];
    throw error;
  }
  if (!Array.isArray(listed)) return [];
  return listed.slice(0, attachmentsMax).flatMap((one): PodAttachment[] => {
    if (!isObject(one) || typeof one["name"] !== "string") return [];
    const ips = addresses(one["ips"]);
    const ifName = typeof one["interface"] === "string" ? oneLine(one["interface"], 15) : "";
    const network = oneLine(one["name"], 317);
    return [{ network, ifName, ips, ...(one["default"] === true && { isDefault: true }) }];
  });
}

/** A namespace from what the API server handed out; undefined for an object that is none. */
export function parsePolicyNamespace(object: unknown): PolicyNamespace | undefined {
  const found = identity(object, false);
  return found && { name: found.name, labels: found.labels };
}

/** A network object from what the API server handed out; undefined for an object that is none. */
export function parsePolicyNetwork(object: unknown): PolicyNetwork | undefined {
  const found = identity(object);
  if (found === undefined || !isObject(object)) return undefined;
  const { namespace, name } = found;
  if (object["kind"] === "NetworkAttachmentDefinition") {
    return { kind: "NetworkAttachmentDefinition", namespace, name, subnet: "" };
  }
  const spec = isObject(object["spec"]) ? object["spec"] : {};
  const subnet = spec["sub_subnet"];
  const isSubnet = typeof subnet === "string" && parseSubnet(subnet) !== undefined;
  return { kind: "Logicalnetwork", namespace, name, subnet: isSubnet ? subnet : "" };
}
