/**
 * Who is the pod, and what do its annotations say. Five sources, first hit wins (design D2):
 * the runtime's hand-over, Mesos labels, CNI_ARGS, the Kubernetes API, none.
 */

import { CniError, code, type Host, type Request } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { isObject, parseJson } from "./json.ts";
import type { Pod as PodObject } from "./kubernetes/client.ts";
import { isConfigured } from "./kubernetes/credentials.ts";
import { type Objects, openObjects } from "./kubernetes/objects_of_call.ts";
import type { PodIdentity } from "./state.ts";
import { oneLine } from "./text.ts";

/** Capability under which containerd ≥ 1.5 and CRI-O ≥ 1.29 hand over a pod's annotations. */
export const annotationsCapability = "io.kubernetes.cri.pod-annotations";
/** Longest text of all annotations together, as Kubernetes limits them, in characters. */
const annotationsLengthMax = 256 * 1024;
/** Keys in CNI_ARGS that are ours and never reach a delegate. */
const ownArgs = new Set(["K8S_ANNOT", "cni", "networks"]);

/** Where the annotations came from. */
export type AnnotationSource = "runtime" | "mesos" | "cni-args" | "api" | "none";

/** A pod as far as this call knows it. */
export interface Pod extends PodIdentity {
  /** Only from the API; undefined where nobody asked it. */
  serviceAccount: string | undefined;
  annotations: Map<string, string>;
  source: AnnotationSource;
}

/**
 * CNI_ARGS as pairs. Values may contain `=`; of a repeated key the last one counts.
 * @see CNI SPEC 1.1 §2 "Parameters"
 */
export function parseArgs(args: string): Map<string, string> {
  const pairs = new Map<string, string>();
  for (const part of args.split(";")) {
    const at = part.indexOf("=");
    if (at > 0) pairs.set(part.slice(0, at).trim(), part.slice(at + 1));
  }
  return pairs;
}

/** CNI_ARGS for the delegates: as received, without our own keys (fact 24). */
export function delegateArgs(args: string): string {
  return args
    .split(";")
    .filter((part) => part !== "" && !ownArgs.has(part.replace(/=.*/s, "").trim()))
    .join(";");
}

/** Who the call is for, as CNI_ARGS says. */
export function podIdentity(args: string): PodIdentity {
  const pairs = parseArgs(args);
  return {
    namespace: pairs.get("K8S_POD_NAMESPACE") ?? "",
    name: pairs.get("K8S_POD_NAME") ?? "",
    uid: pairs.get("K8S_POD_UID") ?? "",
  };
}

/** The sources that need no request: what the call itself carries; undefined where that is none. */
export function carriedPod(request: Request): Pod | undefined {
  const base = { ...podIdentity(request.args), serviceAccount: undefined };
  const handed = request.config.runtimeConfig?.[annotationsCapability];
  if (handed !== undefined && handed !== null) {
    return {
      ...base,
      annotations: readAnnotations(handed, annotationsCapability),
      source: "runtime",
    };
  }
  const labels = mesosLabels(request.config.args);
  if (labels) return { ...base, annotations: labels, source: "mesos" };
  const fromArgs = argsAnnotations(request.args);
  if (fromArgs) return { ...base, annotations: fromArgs, source: "cni-args" };
  return undefined;
}

/**
 * Finds the pod and its annotations.
 *
 * @throws CniError 7 for annotations of a wrong shape; 11 when the API cannot be asked, or the pod
 *   is gone or was made anew under the same name: never an empty success
 */
export async function lookupPod(
  host: Host,
  config: Config,
  request: Request,
  objects: Objects = openObjects(host, config),
): Promise<Pod> {
  const carried = carriedPod(request);
  if (carried) return carried;
  const identity = podIdentity(request.args);
  if (identity.namespace !== "" && identity.name !== "") {
    if (isConfigured(host, config.kubernetes)) {
      return fetchPod(objects, identity);
    }
  }
  return { ...identity, serviceAccount: undefined, annotations: new Map(), source: "none" };
}

/** A pod that is being looked up, and the API as it is asked for it. */
export interface AskedPod {
  objects: Objects;
  pod: Promise<Pod>;
}

/** Begins to look a pod up, see {@link lookupPod}: what the caller does meanwhile costs nothing. */
export function askForPod(host: Host, config: Config, request: Request): AskedPod {
  const objects = openObjects(host, config);
  const pod = lookupPod(host, config, request, objects);
  // Whoever waits for it is told; a call that fails before that has its own reason.
  pod.catch(() => undefined);
  return { objects, pod };
}

/** Path of a pod in the API. */
function podPath({ namespace, name }: { namespace: string; name: string }): string[] {
  return ["api", "v1", "namespaces", namespace, "pods", name];
}

/**
 * The pod as the API describes it, and surely the one meant.
 * @throws CniError 11 when it is gone, was made anew, or the API cannot be asked
 */
export async function fetchPodObject(objects: Objects, identity: PodIdentity): Promise<PodObject> {
  const { isNotFound, parsePod } = await import("./kubernetes/client.ts");
  const api = await objects.kube();
  const label = `${identity.namespace}/${identity.name}`;
  const object = await objects.get(podPath(identity)).catch((error: unknown) => {
    if (!isNotFound(error)) throw error;
    throw new CniError(
      code.tryAgainLater,
      `Cannot attach pod ${label}: ${api.server} does not know it any more`,
      { cause: error },
    );
  });
  const pod = parsePod(object, podPath(identity), api);
  // The kubelet knows a static pod by another uid than the API, where its mirror names that one.
  const known = [pod.metadata.uid, pod.metadata.annotations?.["kubernetes.io/config.mirror"]];
  if (identity.uid !== "" && !known.includes(identity.uid)) {
    throw new CniError(
      code.tryAgainLater,
      `Cannot attach pod ${label}: it was made anew, its uid is ${pod.metadata.uid} ` +
        `and the runtime asks for ${oneLine(identity.uid, 64)}`,
    );
  }
  return pod;
}

/**
 * A pod from the API, which alone knows its service account.
 * @throws CniError 11 when it is gone or was made anew under the same name
 */
export async function fetchPod(objects: Objects, identity: PodIdentity): Promise<Pod> {
  const pod = await fetchPodObject(objects, identity);
  const label = `${identity.namespace}/${identity.name}`;
  return {
    namespace: identity.namespace,
    name: identity.name,
    uid: pod.metadata.uid,
    serviceAccount: pod.spec?.serviceAccountName,
    annotations: readAnnotations(pod.metadata.annotations ?? {}, `annotations of pod ${label}`),
    source: "api",
  };
}

/** Labels of a Mesos task: `args["org.apache.mesos"].network_info.labels.labels[{key,value}]`. */
function mesosLabels(args: Record<string, unknown> | undefined): Map<string, string> | undefined {
  const mesos = args?.["org.apache.mesos"];
  if (!isObject(mesos)) return undefined;
  const info = mesos["network_info"];
  const outer = isObject(info) ? info["labels"] : undefined;
  const list = isObject(outer) ? outer["labels"] : outer;
  const found = new Map<string, string>();
  if (list === undefined || list === null) return found;
  if (!Array.isArray(list)) throw wrongShape("Mesos labels", "they are not a list");
  for (const label of list) {
    if (!isObject(label) || typeof label["key"] !== "string") {
      throw wrongShape("Mesos labels", "one has no key");
    }
    const text = label["value"] ?? "";
    if (typeof text !== "string") {
      throw wrongShape("Mesos labels", `the value of "${oneLine(label["key"], 80)}" is no string`);
    }
    found.set(label["key"], text);
  }
  return found;
}

function argsAnnotations(args: string): Map<string, string> | undefined {
  const pairs = parseArgs(args);
  const json = pairs.get("K8S_ANNOT");
  if (json !== undefined) return readAnnotations(parseJson(json, "K8S_ANNOT"), "K8S_ANNOT");
  const bare = ["cni", "networks"].flatMap((key) => {
    const value = pairs.get(key);
    return value === undefined ? [] : ([[key, value]] as const);
  });
  return bare.length === 0 ? undefined : new Map(bare);
}

/** Hostile until parsed: an object of strings, bounded. A Map, because users write the keys. */
function readAnnotations(value: unknown, what: string): Map<string, string> {
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

/** Pod as people know it. */
export function podLabel({ namespace, name }: { namespace: string; name: string }): string {
  if (name === "") return "(unnamed)";
  return namespace === "" ? name : `${namespace}/${name}`;
}
