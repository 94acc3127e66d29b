/**
 * Two tasks of the agent that keep what `genie install` put on the node: genie's CNI config, and
 * the token by which genie's calls ask the API. What `genie uninstall` removed stays removed.
 */
import { basename, dirname } from "node:path";
import type { Host } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import { connect } from "../kubernetes/client.ts";
import { claimsOf } from "../kubernetes/kubeconfig.ts";
import { pause } from "../kubernetes/watch.ts";
import * as files from "../node/files.ts";
import { callsGenie, ownListText } from "../node/genie_config.ts";
import * as installed from "../node/installation.ts";
import { orUndefined } from "../recovery/tried.ts";
import { isConfigured, serviceAccountDirDefault } from "../settings.ts";
import type { Agent } from "./task.ts";

type FileTask = Pick<Agent, "host" | "health">;

/** How often our CNI config is checked, in ms. */
const conflistMs = 5_000;
/** How often the node's token is looked at: that of a pod has minutes left when it is renewed. */
const tokenMs = 30_000;
/** How long a token of the node's own is asked for, in s; the server may give less. */
const tokenLifeSeconds = 7 * 24 * 3600;
/** It is renewed at this age, or when half of its life is over, in ms. */
const tokenAgeMs = 24 * 3600_000;
/** Pause after a request for a token, also where a clock is wrong, and limit of one, in ms. */
const askAgainMs = 5 * 60_000;
const requestMs = 10_000;

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
  const entry = installed.noted(installed.openSite(root), "conflist");
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
  const kept = `${installed.ownDir}/replaced/${basename(path)}.changed`;
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
  return files.readIfThere(files.hostFile(root, installed.paths.token)) !== undefined;
}

/**
 * Keeps the token for genie's calls fresh, until the host's signal aborts. It is one of the node's
 * own, by the API's TokenRequest: that of the agent's pod is refused from the moment on when the
 * pod is gone. Where the server gives none, the pod's token is copied as the kubelet renews it.
 * @throws CniError 5 when it cannot be read or written
 */
export async function runToken(
  { host, health }: FileTask,
  root = "/",
  serviceAccountDir = serviceAccountDirDefault,
  everyMs = tokenMs,
): Promise<void> {
  let asked = { message: "", againMs: 0 };
  for (; !host.signal.aborted; await pause(everyMs, host.signal)) {
    health.beat("token");
    const own = claimsOf(files.readIfThere(files.hostFile(root, installed.paths.token)) ?? "");
    const isOwn = own !== undefined && !own.isOfPod && own.untilMs > host.now();
    const ageMs = isOwn ? Math.min(tokenAgeMs, (own.untilMs - own.fromMs) / 2) : 0;
    if (!hasToken(root) || (isOwn && Math.abs(host.now() - own.fromMs) < ageMs)) continue;
    if (performance.now() >= asked.againMs) {
      try {
        const token = await requestToken(host, serviceAccountDir);
        if (hasToken(root)) installed.placeToken(root, token);
        asked = { message: "", againMs: performance.now() + askAgainMs };
        continue;
      } catch (error) {
        if (host.signal.aborted) return;
        const { message } = toCniError(error);
        if (message !== asked.message) log(host, "warn", `No token for the node: ${message}`);
        asked = { message, againMs: performance.now() + askAgainMs };
      }
    }
    if (!isOwn) installed.copyToken(root, serviceAccountDir);
  }
}

/**
 * Asks the API server for a token of our own service account that is bound to no pod.
 * @throws CniError 5, 7, 11
 */
async function requestToken(host: Host, serviceAccountDir: string): Promise<string> {
  const claims = claimsOf(installed.podToken(serviceAccountDir));
  if (!claims) throw new CniError(code.invalidConfig, "the token of this pod names no account");
  const { namespace, account } = claims;
  const inPod = { kubeconfigIsExplicit: false, timeoutMs: requestMs, serviceAccountDir };
  const kube = await connect(host, inPod);
  const path = ["api", "v1", "namespaces", namespace, "serviceaccounts", account, "token"];
  const answer = await kube.post(path, {
    apiVersion: "authentication.k8s.io/v1",
    kind: "TokenRequest",
    spec: { expirationSeconds: tokenLifeSeconds },
  });
  const status = isObject(answer) ? answer["status"] : undefined;
  const token = isObject(status) ? status["token"] : undefined;
  if (typeof token === "string" && claimsOf(token)) return token;
  // Without the answer, which may hold a token.
  throw new CniError(code.tryAgainLater, "the answer to a TokenRequest has no token");
}
