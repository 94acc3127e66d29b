/**
 * The Kubernetes API for one call of genie, and the pod of the call as the API describes it. Loads
 * the client when the first object is read.
 */
import type { Host } from "../call.ts";
import { CniError, code, oneLine } from "../cni.ts";
import type { Config, KubernetesConfig } from "../config/schema.ts";
import { type Pod, readAnnotations } from "../pod.ts";
import type { PodIdentity } from "../record.ts";
import type { Kube, Pod as PodObject } from "./client.ts";

/**
 * Where credentials for an API server may come from: keys of the config, of which one that is ""
 * counts as absent, and what a caller adds. `settings.ts` says whether there are any.
 */
export interface KubeSettings extends Partial<KubernetesConfig> {
  timeoutMs: number;
  kubeconfigIsExplicit: boolean;
  /** End of all calls, by {@link Host.now}. */
  untilMs?: number;
  /** How long an answer of an `exec` plugin is reused, in ms; absent: never. */
  pluginMs?: number;
  /** Folder of `token` and `ca.crt`; absent: where Kubernetes mounts them. */
  serviceAccountDir?: string;
  /** Where the node's files are, "/" where absent: among them the CA of its cluster. */
  nodeRoot?: string;
}

/** The API for one call: connected when first needed, each object read once. */
export interface Objects {
  /** The connection. @throws CniError 7 without credentials */
  kube(): Promise<Kube>;
  /** Reads an object, or returns what this call read before. @throws CniError 11 */
  get(path: readonly string[]): Promise<unknown>;
  /** True once the call has used the API. */
  used(): boolean;
}

/** Opens a view of the API for one call; sends nothing yet. */
export function openObjects(host: Host, config: Config): Objects {
  let connection: Promise<Kube> | undefined;
  const read = new Map<string, Promise<unknown>>();
  const kube = () => {
    connection ??= import("./client.ts").then(({ connect }) => connect(host, config.kubernetes));
    return connection;
  };
  return {
    kube,
    get: (path) =>
      read.getOrInsertComputed(path.join("\0"), () => kube().then((api) => api.get(path))),
    used: () => connection !== undefined,
  };
}

/**
 * Reads a pod, surely the one meant (design D2).
 * @throws CniError 11 when it is gone, was made anew, or the API cannot be asked
 */
export async function fetchPodObject(objects: Objects, identity: PodIdentity): Promise<PodObject> {
  const { isNotFound, parsePod } = await import("./client.ts");
  const { namespace, name, uid } = identity;
  const path = ["api", "v1", "namespaces", namespace, "pods", name];
  const api = await objects.kube();
  const refuse = (reason: string, cause?: unknown) => {
    const message = `Cannot attach pod ${namespace}/${name}: ${reason}`;
    throw new CniError(code.tryAgainLater, message, { cause });
  };
  const object = await objects.get(path).catch((error: unknown) => {
    if (!isNotFound(error)) throw error;
    return refuse(`${api.server} does not know it any more`, error);
  });
  const pod = parsePod(object, path, api);
  // The kubelet knows a static pod by another uid than the API, where its mirror names that one.
  const known = [pod.metadata.uid, pod.metadata.annotations?.["kubernetes.io/config.mirror"]];
  if (uid === "" || known.includes(uid)) return pod;
  const asked = `the runtime asks for ${oneLine(uid, 64)}`;
  return refuse(`it was made anew, its uid is ${pod.metadata.uid} and ${asked}`);
}

/**
 * A pod from the API, which alone knows its service account.
 * @throws CniError 11 when it is gone or was made anew under the same name
 */
export async function fetchPod(objects: Objects, identity: PodIdentity): Promise<Pod> {
  const { metadata, spec } = await fetchPodObject(objects, identity);
  const { namespace, name } = identity;
  const what = `annotations of pod ${namespace}/${name}`;
  const annotations = readAnnotations(metadata.annotations ?? {}, what);
  const serviceAccount = spec?.serviceAccountName;
  return { namespace, name, uid: metadata.uid, serviceAccount, annotations, source: "api" };
}
