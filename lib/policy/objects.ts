/**
 * What network policy is decided on, as small plain data: policies, pods, namespaces, networks.
 * Pure. Everything the API server hands out is hostile until parsed here; what comes out is JSON
 * that is stored and compared as text.
 * Sources: MultiNetworkPolicy k8s.cni.cncf.io/v1beta1 and v1beta2, NetworkPolicy
 * networking.k8s.io/v1, CNI-Genie's annotation `genieNetworkpolicy` between logical networks.
 */
import { CniError, oneLine } from "../cni.ts";
import { canonicalIP, parseSubnet } from "../ip.ts";
import { isObject } from "../json.ts";
import { parseSelection } from "../pod.ts";
import {
  compareText,
  genieKeys,
  isObjectName,
  isPortName,
  isPortNumber,
  type NetworkRule,
  type Place,
  type PolicyRule,
  type Protocol,
  parseAnnotation,
  parseNetworkRules,
  parseRules,
  parseSelector,
  protocolOf,
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
  /** The interface of a pod that lets nothing through because of it. */
  closes?: string;
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
  ingress?: PolicyRule[];
  egress?: PolicyRule[];
  problems: PolicyProblem[];
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
  /** Ports that a container has a name for. */
  ports: { name: string; protocol: Protocol; port: number }[];
  podIps: string[];
  /** Addresses of the node it runs on. */
  hostIps: string[];
  attachments: PodAttachment[];
}

/** A namespace, by its labels. */
export type PolicyNamespace = Pick<PolicyPod, "name" | "labels">;

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
 * in `problems`; undefined for an object without an identity.
 */
export function parsePolicy(object: unknown): Policy | undefined {
  const found = identity(object);
  if (found === undefined) return undefined;
  const { namespace, name, uid, annotations, fields } = found;
  const { apiVersion, spec } = fields;
  // Items of a list may not say their kind.
  const isMulti =
    fields["kind"] === "MultiNetworkPolicy" ||
    (typeof apiVersion === "string" && apiVersion.startsWith("k8s.cni.cncf.io/"));
  const kind = isMulti ? "MultiNetworkPolicy" : "NetworkPolicy";
  const problems: PolicyProblem[] = [];
  const report: Report = (path, reason) => {
    if (problems.length >= problemsMax) return;
    problems.push({ kind, namespace, name, path, text: oneLine(reason, 400) });
  };
  const base = { kind, namespace, name, uid } as const;
  if (isMulti) {
    const rules = parseSpec(spec, report);
    const networks = parsePolicyFor(annotations[policyForKey], namespace, report);
    return { ...base, networks, ...rules, problems };
  }
  const key = genieKeys.find((one) => annotations[one] !== undefined);
  if (key === undefined) return { ...base, ...parseSpec(spec, report), problems };
  const place = { path: `metadata.annotations.${key}`, report };
  const between = parseNetworkRules(annotations[key] ?? "", place);
  return { ...base, pods: [], between, problems };
}

type Report = Place["report"];

/** A policy with thousands of mistakes needs no thousand sentences. */
const problemsMax = 20;

/** Who an object is, and its fields. @param isNamespaced false for what stands in no namespace */
function identity(object: unknown, isNamespaced = true) {
  const metadata = isObject(object) ? object["metadata"] : undefined;
  if (!isObject(object) || !isObject(metadata)) return undefined;
  const { name, uid, namespace = "" } = metadata;
  if (!isObjectName(name) || (isNamespaced && !isObjectName(namespace))) return undefined;
  return {
    namespace: isNamespaced ? String(namespace) : "",
    name,
    uid: typeof uid === "string" ? oneLine(uid, 64) : "",
    annotations: strings(metadata["annotations"]),
    labels: strings(metadata["labels"]),
    fields: object,
  };
}

/** The entries whose value is a string, in the order of their keys. */
function strings(value: unknown): Record<string, string> {
  const entries = Object.entries(isObject(value) ? value : {}).filter(
    (entry): entry is [string, string] => typeof entry[1] === "string",
  );
  return Object.fromEntries(entries.sort(([a], [b]) => compareText(a, b)));
}

const directions = [
  { type: "Ingress", key: "ingress", side: "from" },
  { type: "Egress", key: "egress", side: "to" },
] as const;

type Spec = Pick<Policy, "pods" | "ingress" | "egress">;
const everythingClosed: Spec = { pods: null, ingress: [], egress: [] };

/** A spec that may mean more than we can read isolates both directions. */
function parseSpec(value: unknown, report: Report): Spec {
  if (!isObject(value)) {
    report("spec", "it is missing or no object, every pod of the namespace is closed");
    return everythingClosed;
  }
  const unknown = unknownKey(value, ["podSelector", "policyTypes", "ingress", "egress"]);
  if (unknown !== undefined) {
    report("spec", `unknown key ${shown(unknown)}, both directions are isolated`);
  }
  const types = parseTypes(value, report);
  const pods = parseSelector(value["podSelector"], {
    path: "spec.podSelector",
    report: (path, reason) => report(path, `${reason}, and every pod of the namespace is closed`),
  });
  if (pods === undefined) return everythingClosed;
  const spec: Spec = { pods };
  for (const { type, key, side } of directions) {
    if (unknown === undefined && !types.includes(type)) continue;
    spec[key] = parseRules(value[key], side, { path: `spec.${key}`, report });
  }
  return spec;
}

/** Which directions are isolated; unreadable: both. Absent: ingress, and egress if it has rules. */
function parseTypes({ policyTypes, egress }: Record<string, unknown>, report: Report): string[] {
  const both = directions.map(({ type }) => type);
  const given = policyTypes ?? [];
  const isolateBoth = (what: string) => {
    report("spec.policyTypes", `${what}, both directions are isolated`);
    return both;
  };
  if (!Array.isArray(given)) return isolateBoth("it is no list");
  const unknown = given.find((one) => one !== "Ingress" && one !== "Egress");
  if (unknown !== undefined) return isolateBoth(`unknown type ${shown(unknown)}`);
  if (given.length > 0) return given;
  const hasEgress = egress != null && !(Array.isArray(egress) && egress.length === 0);
  return hasEgress ? both : ["Ingress"];
}

/** A plain name is one of the policy's namespace, or of the node's plugin table. */
function parsePolicyFor(text = "", namespace: string, report: Report): string[] | null {
  const path = `metadata.annotations.${policyForKey}`;
  if (text.trim() === "") {
    report(path, "it names no network, so the policy applies to none");
    return [];
  }
  const given = text.split(",").map((one) => one.replaceAll(/\s*\/\s*/g, "/").trim());
  const bad = given.find((one) => !/^([a-z0-9][-a-z0-9.]*\/)?[a-zA-Z0-9][\w.-]*$/.test(one));
  if (bad !== undefined) {
    const what = `${shown(bad)} is no network "name" or "namespace/name"`;
    report(path, `${what}, so every network but the default one is closed`);
    return null;
  }
  const names = given.flatMap((one) => (one.includes("/") ? [one] : [one, `${namespace}/${one}`]));
  return [...new Set(names)].sort();
}

/** Most that is taken of a pod. */
const ipsMax = 64;
const portsMax = 256;
const attachmentsMax = 64;

/** A pod from what the API server handed out; undefined for an object that is none. */
export function parsePolicyPod(object: unknown): PolicyPod | undefined {
  const found = identity(object);
  if (found === undefined) return undefined;
  const { namespace, name, uid, labels, annotations, fields } = found;
  const spec = isObject(fields["spec"]) ? fields["spec"] : {};
  const status = isObject(fields["status"]) ? fields["status"] : {};
  const podIps = addressesOf(status["podIPs"], status["podIP"]);
  const listed = attachmentsOf(annotations[statusKey]);
  return {
    namespace,
    name,
    uid,
    labels,
    phase: typeof status["phase"] === "string" ? oneLine(status["phase"], 20) : "",
    hostNetwork: spec["hostNetwork"] === true,
    ports: namedPorts(spec).slice(0, portsMax),
    podIps,
    hostIps: addressesOf(status["hostIPs"], status["hostIP"]),
    attachments: listed.length > 0 ? listed : askedFor(namespace, annotations, podIps),
  };
}

/** The logical network that carries the address of a pod whose networks are not published. */
function askedFor(namespace: string, annotations: Record<string, string>, ips: string[]) {
  try {
    const selection = parseSelection(new Map(Object.entries(annotations)));
    if (selection.kind !== "logical" || ips.length === 0) return [];
    const named = (name?: string) => selection.elements.find(({ ifName }) => ifName === name);
    const first = named("eth0") ?? named();
    const place = { network: `${namespace}/${first?.network}`, ifName: "eth0" };
    return first ? [{ ...place, ips, isDefault: true as const }] : [];
  } catch (error) {
    // genie attaches no pod with such an annotation.
    if (error instanceof CniError) return [];
    throw error;
  }
}

function addressesOf(list: unknown, single: unknown): string[] {
  const listed = Array.isArray(list) ? list.map((one) => (isObject(one) ? one["ip"] : one)) : [];
  return addresses(listed.length > 0 ? listed : [single]);
}

/** Addresses in one spelling; what is none, or could not be a peer's, is left out. */
function addresses(list: unknown): string[] {
  const texts = Array.isArray(list) ? list.slice(0, ipsMax).map(canonicalIP) : [];
  return [...new Set(texts.filter((one) => one !== undefined))];
}

/** Sidecars are init containers that keep running, so those count too. */
function namedPorts({ initContainers, containers }: Record<string, unknown>): PolicyPod["ports"] {
  const all = [...objectsIn(initContainers), ...objectsIn(containers)];
  const given = all.flatMap((container) => objectsIn(container["ports"]));
  return given.flatMap(({ name, containerPort: port, ...others }) => {
    const protocol = protocolOf(others["protocol"]);
    return isPortName(name) && isPortNumber(port) && protocol ? [{ name, protocol, port }] : [];
  });
}

/** The members of a list that are objects. */
function objectsIn(list: unknown): Record<string, unknown>[] {
  return Array.isArray(list) ? list.filter(isObject) : [];
}

/** The interfaces that `network-status` lists; a text that is none lists nothing. */
function attachmentsOf(text = ""): PodAttachment[] {
  const listed = parseAnnotation(text);
  const some = Array.isArray(listed) ? listed.slice(0, attachmentsMax) : [];
  return objectsIn(some).flatMap(({ name, interface: ifName, ips, default: isDefault }) => {
    if (typeof name !== "string") return [];
    return {
      network: oneLine(name, 317),
      ifName: typeof ifName === "string" ? oneLine(ifName, 15) : "",
      ips: addresses(ips),
      ...(isDefault === true && { isDefault }),
    };
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
  if (found === undefined) return undefined;
  const { namespace, name, fields } = found;
  if (fields["kind"] === "NetworkAttachmentDefinition") {
    return { kind: "NetworkAttachmentDefinition", namespace, name, subnet: "" };
  }
  const subnet = isObject(fields["spec"]) ? fields["spec"]["sub_subnet"] : undefined;
  const isSubnet = typeof subnet === "string" && parseSubnet(subnet) !== undefined;
  return { kind: "Logicalnetwork", namespace, name, subnet: isSubnet ? subnet : "" };
}
