/**
 * The agent's part that keeps genie's calls on the node able to ask the API: the token of a service
 * account expires within the hour, and the kubelet renews it in the agent's pod alone.
 */

import type { Host } from "../cni.ts";
import { isConfigured, serviceAccountDirDefault } from "../kubernetes/credentials.ts";
import { pause } from "../kubernetes/watch.ts";
import { copyToken } from "../node/credentials_file.ts";
import { readIfThere } from "../node/files.ts";
import { hostFile } from "../node/host_root.ts";
import { paths } from "../node/installation.ts";
import type { Health } from "./health.ts";

/** The kubelet renews a token when a fifth of its life is left, which is minutes. */
const renewMs = 30_000;

/** True in a pod of a node whose kubeconfig reads its token from the file that install wrote. */
export function keepsToken(
  host: Host,
  root = "/",
  serviceAccountDir = serviceAccountDirDefault,
): boolean {
  const inPod = { kubeconfigIsExplicit: false, timeoutMs: 0, serviceAccountDir };
  return isConfigured(host, inPod) && isInstalled(root);
}

function isInstalled(root: string): boolean {
  return readIfThere(hostFile(root, paths.token)) !== undefined;
}

/**
 * Copies the token whenever it is new, until the agent is asked to end.
 * @throws CniError 5 when it cannot be read or written
 */
export async function runToken(
  { host, health }: { host: Host; health?: Health },
  root = "/",
  serviceAccountDir = serviceAccountDirDefault,
  everyMs = renewMs,
): Promise<void> {
  while (!host.signal.aborted) {
    health?.beat("token");
    // What genie uninstall has removed stays removed.
    if (isInstalled(root)) copyToken(root, serviceAccountDir);
    await pause(everyMs, host.signal);
  }
}
