/**
 * Two tasks of the agent that keep what `genie install` put on the node: genie's CNI config, and
 * the token by which genie's calls ask the API. What `genie uninstall` removed stays removed.
 */
import { basename, dirname } from "node:path";
import type { Host } from "../call.ts";
import { CniError, log } from "../cni.ts";
import { parseJson } from "../json.ts";
import { pause } from "../kubernetes/watch.ts";
import * as files from "../node/files.ts";
import { callsGenie, ownListText } from "../node/genie_config.ts";
import { copyToken, noted, openSite, ownDir, paths } from "../node/installation.ts";
import { orUndefined } from "../recovery/tried.ts";
import { isConfigured, serviceAccountDirDefault } from "../settings.ts";
import type { Agent } from "./task.ts";

type FileTask = Pick<Agent, "host" | "health">;

/** How often our CNI config is checked, in ms. */
const conflistMs = 5_000;
/** The kubelet renews a token when a fifth of its life is left, which is minutes. */
const tokenMs = 30_000;

/**
 * Keeps our CNI config in its place until the host's signal aborts: without it the runtime takes
 * the next file, and pods silently get another network. A config that an operator edited is kept
 * while it still calls genie. `genie uninstall` removes the file before its note of it, so a fault
 * is acted on only when two checks agree, and the note is read last.
 */
export async function runConflist({ host, health }: FileTask, root = "/", everyMs = conflistMs) {
  let before = "";
  let logged = "";
  for (; !host.signal.aborted; await pause(everyMs, host.signal)) {
    health.beat("conflist");
    try {
      const fault = conflistFault(root);
      if (fault !== "" && fault === before) restoreConflist(host, root);
      before = fault;
      logged = "";
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
      const { message } = error;
      if (logged !== message) log(host, "warn", `Cannot keep the CNI config: ${message}`);
      logged = message;
    }
  }
}

/** Path of our config on the node; undefined unless this version of genie installed it. */
function conflistPath(root: string): string | undefined {
  const entry = noted(openSite(root), "conflist");
  const isOurs = entry?.written.at(-1) === files.digest({ text: ownListText() });
  return isOurs ? entry?.path : undefined;
}

/** What is wrong with the file; "" for nothing. @throws CniError 5, 7 */
function conflistFault(root: string): string {
  const path = conflistPath(root);
  if (path === undefined) return "";
  const text = files.readIfThere(files.hostFile(root, path));
  if (text === undefined) return "gone";
  const value = orUndefined(() => parseJson(text, ""));
  if (text === ownListText() || callsGenie({ name: path, value })) return "";
  return `changed ${files.digest({ text })}`;
}

/** Puts it back; what stood in its place is kept. @throws CniError 5, 7 */
function restoreConflist(host: Host, root: string): void {
  const path = conflistPath(root);
  if (path === undefined) return;
  const target = files.hostFile(root, path);
  const others = files.readIfThere(target);
  const kept = `${ownDir}/replaced/${basename(path)}.changed`;
  if (others !== undefined) {
    files.makeFolder(dirname(files.hostFile(root, kept)), 0o700);
    files.placeFile(files.hostFile(root, kept), { text: others }, 0o600);
  }
  files.makeFolder(files.hostPath(root, dirname(path)), 0o755);
  files.placeFile(target, { text: ownListText() }, 0o644);
  if (conflistPath(root) === undefined) {
    // It was uninstalled in this moment.
    files.removeFile(target);
    return;
  }
  const what = others === undefined ? "had been deleted" : `had been changed, see ${kept}`;
  log(host, "warn", `The CNI config ${path} ${what}, and is back`);
}

/** True in a pod of a node whose kubeconfig reads its token from the file that install wrote. */
export function keepsToken(host: Host, root = "/", serviceAccountDir = serviceAccountDirDefault) {
  const inPod = { kubeconfigIsExplicit: false, timeoutMs: 0, serviceAccountDir };
  return isConfigured(host, inPod) && hasToken(root);
}

function hasToken(root: string): boolean {
  return files.readIfThere(files.hostFile(root, paths.token)) !== undefined;
}

/**
 * Copies the token of the agent's service account for genie's calls, until the host's signal
 * aborts: it expires within the hour, and the kubelet renews it in the agent's pod alone.
 * @throws CniError 5 when it cannot be read or written
 */
export async function runToken(
  { host, health }: FileTask,
  root = "/",
  serviceAccountDir = serviceAccountDirDefault,
  everyMs = tokenMs,
): Promise<void> {
  for (; !host.signal.aborted; await pause(everyMs, host.signal)) {
    health.beat("token");
    if (hasToken(root)) copyToken(root, serviceAccountDir);
  }
}
