/**
 * Are there credentials for a Kubernetes API server, and from where. Reads no file: every ADD asks.
 */
import { statSync } from "node:fs";
import { join } from "node:path";
import type { Host } from "../cni.ts";

/** Where credentials may come from. The optional strings may be "", which is the same as absent. */
export interface KubeSettings {
  /** Path of a kubeconfig file. */
  kubeconfig?: string;
  /** True when someone named that file: then it must exist. */
  kubeconfigIsExplicit: boolean;
  /** CNI-Genie's `k8s_api_root`: URL of the server; what follows `/api/` is dropped. */
  apiRoot?: string;
  /** CNI-Genie's `k8s_auth_token`: the secret itself. */
  authToken?: string;
  /** CNI-Genie's paths of PEM files: `k8s_client_certificate`, `k8s_client_key`, ... */
  clientCertificate?: string;
  clientKey?: string;
  certificateAuthority?: string;
  /** Limit of one call, its repetition included, in milliseconds. */
  timeoutMs: number;
  /** Whatever that allows, none is under way later than this, by {@link Host.now}. */
  untilMs?: number;
  /** How long what an `exec` plugin said serves for further requests, in ms; absent: for none. */
  pluginMs?: number;
  /** Folder of `token` and `ca.crt`; absent: where Kubernetes mounts them. */
  serviceAccountDir?: string;
}

/** Where Kubernetes mounts the service account of a pod. */
export const serviceAccountDirDefault = "/var/run/secrets/kubernetes.io/serviceaccount";

/**
 * True when {@link connect} would find credentials; reads no file. A kubeconfig that someone named
 * and that is missing counts, so that `connect` can say so.
 */
export function isConfigured(host: Host, settings: KubeSettings): boolean {
  return sourceOf(host, settings) !== undefined;
}

/** Which of the sources counts; undefined where there is none. */
export function sourceOf(
  host: Host,
  settings: KubeSettings,
): "kubeconfig" | "root" | "pod" | undefined {
  const { kubeconfig, serviceAccountDir: folder = serviceAccountDirDefault } = settings;
  if (kubeconfig && (settings.kubeconfigIsExplicit || exists(kubeconfig))) return "kubeconfig";
  if (settings.apiRoot) return "root";
  const inPod = Boolean(host.env["KUBERNETES_SERVICE_HOST"]) && exists(join(folder, "token"));
  return inPod ? "pod" : undefined;
}

/** False only for a file that is surely not there; one we may not look at is an error later. */
export function exists(file: string): boolean {
  try {
    return statSync(file, { throwIfNoEntry: false }) !== undefined;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== "ENOTDIR";
  }
}
