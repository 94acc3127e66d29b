/**
 * Who is the pod, and what do its annotations say? What the call itself carries (from the runtime,
 * Mesos labels or CNI_ARGS; from the API: `fetchPod` of `kubernetes/`), and the grammar of `cni`
 * and `networks`. Users write annotations: they select networks by name and never carry
 * configuration. Pure. Source: design D2, D3, D9; CNI-Genie's annotations.
 */
import type { Request } from "./call.ts";
import { CniError, code, interfaceNameIssue, isNetworkName, oneLine } from "./cni.ts";
import { isObject, parseJson } from "./json.ts";
import type { PodIdentity } from "./record.ts";
import { parseArgs, podIdentity } from "./request.ts";

/** Capability with which containerd ≥ 1.5 and CRI-O ≥ 1.29 pass a pod's annotations. */
export const annotationsCapability = "io.kubernetes.cri.pod-annotations";
/** Longest text of all annotations together, as Kubernetes limits them, in characters. */
const annotationsLengthMax = 256 * 1024;
/** Keys in CNI_ARGS that are for genie and never reach a delegate. */
const ownArgs = new Set(["K8S_ANNOT", "cni", "networks"]);
/** Keys in CNI_ARGS that ask something for one interface: for the runtime's own. */
const interfaceArgs = new Set(["IP", "MAC", "GATEWAY"]);

/** A pod as far as the call knows it. */
export interface Pod extends PodIdentity {
  /** Only the API knows it; undefined when it was not asked. */
  serviceAccount: string | undefined;
  annotations: Map<string, string>;
  /** Where the annotations came from. */
  source: "runtime" | "mesos" | "cni-args" | "api" | "none";
}

/** CNI_ARGS for delegates. What is asked for one interface is for the `primary` one. */
export function delegateArgs(args: string, primary: boolean): string {
  const parts = args.split(";").filter((part) => {
    const key = part.replace(/=.*/s, "").trim();
    return part !== "" && !ownArgs.has(key) && (primary || !interfaceArgs.has(key));
  });
  return parts.join(";");
}

/** The pod of a call that brings no annotations. */
export function podWithoutAnnotations(request: Request): Pod {
  const identity = podIdentity(request.args);
  return { ...identity, serviceAccount: undefined, annotations: new Map(), source: "none" };
}

/**
 * The pod with the annotations that the call itself brings; undefined where it brings none.
 * @throws CniError 7 for annotations of a wrong shape, 6 for K8S_ANNOT that is not JSON
 */
export function carriedPod(request: Request): Pod | undefined {
  const pod = podWithoutAnnotations(request);
  const passed = request.config.runtimeConfig?.[annotationsCapability] ?? undefined;
  if (passed !== undefined) {
    const annotations = readAnnotations(passed, annotationsCapability);
    return { ...pod, annotations, source: "runtime" };
  }
  const labels = mesosLabels(request.config.args);
  if (labels) return { ...pod, annotations: labels, source: "mesos" };
  const fromArgs = argsAnnotations(request.args);
  return fromArgs && { ...pod, annotations: fromArgs, source: "cni-args" };
}

/** Labels of a Mesos task: `args["org.apache.mesos"].network_info.labels.labels[{key,value}]`. */
function mesosLabels(args: Record<string, unknown> | undefined): Map<string, string> | undefined {
  const mesos = args?.["org.apache.mesos"];
  if (!isObject(mesos)) return undefined;
  const info = mesos["network_info"];
  const outer = isObject(info) ? info["labels"] : undefined;
  const list = (isObject(outer) ? outer["labels"] : outer) ?? [];
  if (!Array.isArray(list)) throw wrongShape("Mesos labels", "they are not a list");
  const labels = new Map<string, string>();
  for (const label of list) {
    const { key, value }: Record<string, unknown> = isObject(label) ? label : {};
    if (typeof key !== "string") throw wrongShape("Mesos labels", "one has no key");
    const text = value ?? "";
    if (typeof text !== "string") {
      throw wrongShape("Mesos labels", `the value of "${oneLine(key, 80)}" is no string`);
    }
    labels.set(key, text);
  }
  return labels;
}

function argsAnnotations(args: string): Map<string, string> | undefined {
  const pairs = parseArgs(args);
  const json = pairs.get("K8S_ANNOT");
  if (json !== undefined) return readAnnotations(parseJson(json, "K8S_ANNOT"), "K8S_ANNOT");
  const bare = [...pairs].filter(([key]) => key === "cni" || key === "networks");
  return bare.length === 0 ? undefined : new Map(bare);
}

/** Checks annotations: an object of strings, not too long. @throws CniError 7 */
export function readAnnotations(value: unknown, what: string): Map<string, string> {
  if (!isObject(value)) throw wrongShape(what, "they are not an object");
  const found = new Map<string, string>();
  let length = 0;
  for (const [key, text] of Object.entries(value)) {
    if (typeof text !== "string") {
      throw wrongShape(what, `the value of "${oneLine(key, 80)}" is not a string`);
    }
    length += key.length + text.length;
    found.set(key, text);
  }
  if (length > annotationsLengthMax) {
    throw wrongShape(what, `they are longer than ${annotationsLengthMax} characters`);
  }
  return found;
}

function wrongShape(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid ${what}: ${issue}`);
}

/** CNI-Genie's annotation keys; Mesos labels and CNI_ARGS have the same ones. */
export const annotationKeys = { cni: "cni", networks: "networks" } as const;

/** Annotation keys of the NPWG specification, and Multus' key for a pod's own default network. */
export const npwgKeys = {
  networks: "k8s.v1.cni.cncf.io/networks",
  status: "k8s.v1.cni.cncf.io/network-status",
  defaultNetwork: "v1.multus-cni.io/default-network",
  resourceName: "k8s.v1.cni.cncf.io/resourceName",
} as const;

/** One network a pod asks for, and the interface name it wants for it. */
export interface SelectionElement {
  network: string;
  ifName?: string;
}

/**
 * What a pod's annotations select for the primary set (design D3): networks of the node,
 * Logicalnetwork objects of its namespace, whatever genie chooses, or nothing (`default`).
 */
export type Selection =
  | { kind: "networks" | "logical"; elements: SelectionElement[] }
  | { kind: "choose" }
  | { kind: "default" };

/** Most attachments one pod may ask for. */
export const attachmentsMax = 32;
/** Longest selection text, in characters. */
const selectionLengthMax = 8192;

/**
 * Parses what a pod selects for its primary set by its (hostile) annotations.
 * @throws CniError 7 for an annotation that breaks the grammar or names too many networks
 */
export function parseSelection(annotations: ReadonlyMap<string, string>): Selection {
  const cni = annotations.get(annotationKeys.cni);
  if (cni === undefined) return { kind: "default" };
  if (cni.trim() !== "") return { kind: "networks", elements: parseElements(cni, "cni") };
  const networks = annotations.get(annotationKeys.networks);
  if (networks === undefined || networks.trim() === "") return { kind: "choose" };
  return { kind: "logical", elements: parseElements(networks, "networks") };
}

/**
 * Parses `a,b@eth3,a`: names separated by commas, each with an optional interface name.
 * @param what names the text in errors, e.g. the annotation's key
 * @throws CniError 7
 */
export function parseElements(text: string, what: string): SelectionElement[] {
  if (text.length > selectionLengthMax) {
    throw malformed(what, `it is longer than ${selectionLengthMax} characters`);
  }
  const parts = text.split(",");
  if (parts.length > attachmentsMax) {
    const issue = `it names ${parts.length} networks, at most ${attachmentsMax} are allowed`;
    throw malformed(what, issue);
  }
  return parts.map((part) => parseElement(part.trim(), what));
}

function parseElement(text: string, what: string): SelectionElement {
  if (text === "") throw malformed(what, "a name between commas is empty");
  // In the tagged releases of CNI-Genie the interface stands behind a colon, in `networks` alone.
  const at = text.search(what === annotationKeys.networks ? /[@:]/ : /@/);
  const network = at < 0 ? text : text.slice(0, at).trim();
  if (!isNetworkName(network) || network.length > 253) {
    const rule = 'a network name of letters, digits, "_", "." and "-"';
    throw malformed(what, `"${oneLine(network, 64)}" is not ${rule}`);
  }
  if (at < 0) return { network };
  const ifName = text.slice(at + 1).trim();
  const issue = ifName.includes("@") ? 'it holds "@"' : interfaceNameIssue(ifName);
  if (issue === undefined) return { network, ifName };
  const name = oneLine(ifName, 40);
  throw malformed(what, `"${name}" cannot name an interface for network "${network}": ${issue}`);
}

function malformed(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid annotation "${what}": ${issue}`);
}
