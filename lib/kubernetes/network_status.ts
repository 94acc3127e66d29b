/**
 * Publishes the networks of a pod: one merge-patch of its annotations with a precondition on its
 * uid, so that a new pod of the same name never gets the status of its predecessor. Never fails an
 * ADD: what cannot be published waits in the record for the node agent.
 * Source: NPWG v1.3 §5; CNI-Genie's `multi-ip-preferences`.
 */
import type { Call, Done, Host, Plan } from "../call.ts";
import { log, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import { objectsOf } from "../plan.ts";
import { annotationKeys, npwgKeys } from "../pod.ts";
import type { CallId, WaitingStatus } from "../record.ts";
import { podLabel } from "../request.ts";
import type { Kube } from "./client.ts";
import { formatMultiIpPreferences, formatStatus, type StatusSource } from "./npwg.ts";

/** Attempts of one publication, and the pause between two, in ms. */
const attemptsMax = 3;
const pauseMs = 100;

/** The status of a pod, which the call publishes when `isInline`, else the agent. */
export type PodStatus = WaitingStatus & { isInline: boolean };
type Annotated = Pick<PodStatus, "pod" | "annotations">;

/**
 * Makes the annotations of a pod. A call publishes them itself only when it has used the API
 * anyway: a pod from the runtime whose networks are all on the node costs no request.
 * @returns undefined where nothing was attached
 */
export async function makeStatus(
  { host, config, objects }: Pick<Call, "host" | "config" | "objects">,
  plan: Plan,
  done: readonly Done[],
): Promise<PodStatus | undefined> {
  const [first] = done;
  if (!first) return undefined;
  const { pod, decision, primarySet, choice } = plan;
  const sources = await Promise.all(done.map((one) => statusSource(host, one)));
  // As in CNI-Genie: for the networks that `cni` or `networks` select, when there are several.
  const own = sources.filter(({ ifName }) => primarySet.has(ifName));
  const isGenies = (decision === "cni" || decision === "logical") && own.length > 1;
  const { containerId, requestIfName } = first.attachment;
  return {
    containerId,
    requestIfName,
    pod: { namespace: pod.namespace, name: pod.name, uid: pod.uid },
    annotations: {
      [npwgKeys.status]: formatStatus(sources),
      ...(isGenies && { "multi-ip-preferences": formatMultiIpPreferences(own) }),
      // As in CNI-Genie: the pod names the network that was chosen for it.
      ...(choice && { [annotationKeys.cni]: choice.network }),
    },
    isInline: config.kubernetes.status === "inline" && objects?.used() === true,
  };
}

/** One attachment for the status, with its device information file read. */
export async function statusSource(
  host: Host,
  { attachment, result }: Done,
): Promise<StatusSource> {
  const { network: name, ifName, primary: isDefault, defaultRoute, deviceInfoFile } = attachment;
  const source = { name, ifName, result, isDefault, ...(defaultRoute && { defaultRoute }) };
  if (deviceInfoFile === undefined) return source;
  const { readDeviceInfo } = await import("./devices.ts");
  const deviceInfo = readDeviceInfo(host, deviceInfoFile);
  return deviceInfo ? { ...source, deviceInfo } : source;
}

/**
 * Patches the annotations of a pod once: in `pods/status`, or in `pods` when the server or our
 * rights do not allow that. @throws CniError 11
 */
export async function patchStatus(kube: Kube, { pod, annotations }: Annotated): Promise<void> {
  const { statusOf } = await import("./client.ts");
  const path = ["api", "v1", "namespaces", pod.namespace, "pods", pod.name];
  const metadata = { annotations, ...(pod.uid !== "" && { uid: pod.uid }) };
  try {
    await kube.patch([...path, "status"], { metadata });
  } catch (error) {
    if (![403, 404, 405].includes(statusOf(error) ?? 0)) throw error;
    await kube.patch(path, { metadata });
  }
}

/**
 * Publishes annotations on a pod by {@link patchStatus}, again after conflicts and failures of the
 * server, until the deadline.
 * @returns false, after a warning, when they could not be published
 */
export async function publishStatus(
  host: Host,
  kube: () => Promise<Kube>,
  status: Annotated,
  deadlineMs: number,
): Promise<boolean> {
  const { isConflict, statusOf } = await import("./client.ts");
  for (let attempt = 1; ; attempt++) {
    try {
      await patchStatus(await kube(), status);
      return true;
    } catch (error) {
      const mayPass = isConflict(error) || (statusOf(error) ?? 0) >= 500;
      const hasTime = attempt < attemptsMax && host.now() + pauseMs < deadlineMs;
      if (!mayPass || !hasTime || host.signal.aborted) {
        log(host, "warn", `Cannot publish network status: ${toCniError(error).message}`);
        return false;
      }
      await Bun.sleep(pauseMs);
    }
  }
}

/** Leaves a status for the agent, unless its call was deleted meanwhile. Call in a transaction. */
export function putStatus({ database }: State, status: WaitingStatus, nowMs: number): void {
  const { containerId, requestIfName, pod } = status;
  const annotations = JSON.stringify(status.annotations);
  database
    .query(
      `INSERT OR REPLACE INTO statuses SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7 WHERE EXISTS
         (SELECT 1 FROM attachments WHERE container_id = ?1 AND request_ifname = ?2)`,
    )
    .run(containerId, requestIfName, pod.namespace, pod.name, pod.uid, annotations, nowMs);
}

/**
 * Forgets the status of a call, unless another one waits by now. Call inside a transaction.
 * @param annotations as they are stored, in JSON
 */
export function forgetStatus({ database }: State, call: CallId, annotations: string): void {
  database
    .query("DELETE FROM statuses WHERE container_id = ? AND request_ifname = ? AND annotations = ?")
    .run(call.containerId, call.requestIfName, annotations);
}

/** Publishes the status of an ADD at once; what cannot be published waits for the agent. */
export async function publishOrKeep(call: Call, status: PodStatus): Promise<void> {
  const { host, config, state, chain } = call;
  const deadlineMs = Math.min(chain.deadlineMs, host.now() + config.kubernetes.timeoutMs);
  const objects = await objectsOf(call);
  if (await publishStatus(host, objects.kube, status, deadlineMs)) return;
  try {
    write(state, () => putStatus(state, status, host.now()));
  } catch (error) {
    log(host, "warn", toCniError(error).message, { pod: podLabel(status.pod) });
  }
}
