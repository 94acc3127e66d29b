/**
 * Grammar of CNI-Genie's annotations by which a pod selects networks: `cni`, and `networks`. Pure:
 * text in, data out.
 * Names select networks, they never carry configuration (design D9).
 */
import { CniError, code, interfaceNameIssue, isNetworkName } from "./cni.ts";
import { oneLine } from "./text.ts";

/** Keys read from a pod's annotations, or from what stands for them in other runtimes. */
export const annotationKeys = {
  cni: "cni",
  networks: "networks",
} as const;

/** Annotation keys of the specification, and Multus' key for a pod's own default network. */
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
 * What a pod's annotations select for the primary set (design D3):
 * - `networks`: those networks, in that order;
 * - `logical`: those Logicalnetwork objects of the pod's namespace;
 * - `choose`: the pod leaves the choice to us;
 * - `default`: it asks for nothing.
 */
export type Selection =
  | { kind: "networks"; elements: SelectionElement[] }
  | { kind: "logical"; elements: SelectionElement[] }
  | { kind: "choose" }
  | { kind: "default" };

/** Most attachments one pod may ask for. */
export const attachmentsMax = 32;
/** Longest selection text, in characters. */
const selectionLengthMax = 8192;

/**
 * Parses what a pod selects for its primary set.
 *
 * @param annotations all annotations of the pod, hostile
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
 *
 * @param what names the text in errors, e.g. the annotation's key
 * @throws CniError 7
 */
export function parseElements(text: string, what: string): SelectionElement[] {
  if (text.length > selectionLengthMax) {
    throw malformed(what, `it is longer than ${selectionLengthMax} characters`);
  }
  const parts = text.split(",");
  if (parts.length > attachmentsMax) {
    throw malformed(
      what,
      `it names ${parts.length} networks, at most ${attachmentsMax} are allowed`,
    );
  }
  return parts.map((part) => parseElement(part.trim(), what));
}

function parseElement(text: string, what: string): SelectionElement {
  if (text === "") throw malformed(what, "a name between commas is empty");
  const at = text.indexOf("@");
  const network = at < 0 ? text : text.slice(0, at).trim();
  if (!isNetworkName(network) || network.length > 253) {
    throw malformed(
      what,
      `"${oneLine(network, 64)}" is not a network name of letters, digits, "_", "." and "-"`,
    );
  }
  if (at < 0) return { network };
  const ifName = text.slice(at + 1).trim();
  const issue = ifName.includes("@") ? 'it holds "@"' : interfaceNameIssue(ifName);
  if (issue) {
    throw malformed(
      what,
      `"${oneLine(ifName, 40)}" cannot name an interface for network "${network}": ${issue}`,
    );
  }
  return { network, ifName };
}

/** Formats elements as the annotation writes them; the inverse of {@link parseElements}. */
export function formatElements(elements: SelectionElement[]): string {
  return elements
    .map(({ network, ifName }) => (ifName === undefined ? network : `${network}@${ifName}`))
    .join(",");
}

function malformed(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid annotation "${what}": ${issue}`);
}

/** Names every network namespace has already, as an interface or as a folder of sysctls. */
const reservedNames = new Set(["lo", "all", "default"]);

/** Why a pod may not ask for this interface name, or undefined when it may. */
export function requestedNameIssue(ifName: string): string | undefined {
  return reservedNames.has(ifName) ? "it is reserved" : interfaceNameIssue(ifName);
}
