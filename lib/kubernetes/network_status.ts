/**
 * Publishes what a pod got: one merge-patch of its annotations with a precondition on its uid, so
 * that a pod made anew under the same name is never told of its predecessor's networks. Never fails
 * an ADD: what cannot be published waits in the record for the node agent.
 * Source: NPWG v1.3 §5; CNI-Genie's `multi-ip-preferences`.
 */

import { annotationKeys, npwgKeys } from "../annotations.ts";
import { type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import type { Done } from "../default_route.ts";
import type { Plan } from "../plan.ts";
import type { WaitingStatus } from "../state.ts";
import type { Kube } from "./client.ts";
import { isConfigured } from "./credentials.ts";
import type { StatusSource } from "./npwg.ts";

/** Attempts of one publication, and the pause between two, in ms. */
const attemptsMax = 3;
const pauseMs = 100;

/** What is to be published of one call. */
export interface PodStatus extends WaitingStatus {
  /** Published by this call; else by the agent. */
  isInline: boolean;
}

/** False where status is off, no pod is known, or there is no API to publish to. */
export function wantsStatus(host: Host, config: Config, { pod, objects }: Plan): boolean {
  if (config.kubernetes.status === "off" || pod.name === "" || pod.namespace === "") return false;
  return objects.used() || isConfigured(host, config.kubernetes);
}

/** Begins to load what {@link makeStatus} needs. */
export function prepareStatus(): void {
  import("./npwg.ts").catch(() => undefined);
}

/**
 * Makes the annotations of a pod. Published by the call itself only where it talks to the API
 * anyway: a pod whose networks all live on the node, handed over by its runtime, costs no request.
 *
 * @returns undefined where none is wanted, see {@link wantsStatus}
 */
export async function makeStatus(
  host: Host,
  config: Config,
  plan: Plan,
  done: readonly Done[],
): Promise<PodStatus | undefined> {
  const [first] = done;
  if (!first || !wantsStatus(host, config, plan)) return undefined;
  const { pod, decision, primarySet, choice, objects } = plan;
  const { formatMultiIpPreferences, formatStatus } = await import("./npwg.ts");
  const sources = await Promise.all(done.map((one) => statusSource(host, one)));
  // As in CNI-Genie: for what `cni` and `networks` select, when that is more than one network.
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
      // As in CNI-Genie: the pod says from now on which network was chosen for it.
      ...(choice && { [annotationKeys.cni]: choice.network }),
    },
    isInline: config.kubernetes.status === "inline" && objects.used(),
  };
}

/** One attachment as the status tells of it. */
export async function statusSource(
  host: Host,
  { attachment, result }: Done,
): Promise<StatusSource> {
  const { network, ifName, primary, defaultRoute, deviceInfoFile } = attachment;
  const deviceInfo =
    deviceInfoFile === undefined
      ? undefined
      : (await import("./device_info.ts")).readDeviceInfo(host, deviceInfoFile);
  return {
    name: network,
    ifName,
    result,
    isDefault: primary,
    ...(defaultRoute && { defaultRoute }),
    ...(deviceInfo && { deviceInfo }),
  };
}

/**
 * Changes the annotations of a pod once: in `pods/status`, or in `pods` where the server or our
 * rights do not allow that.
 * @throws CniError 11
 */
export async function patchStatus(
  kube: Kube,
  { pod, annotations }: Pick<PodStatus, "pod" | "annotations">,
): Promise<void> {
  const { isNotFound, statusOf } = await import("./client.ts");
  const path = ["api", "v1", "namespaces", pod.namespace, "pods", pod.name];
  const metadata = { annotations, ...(pod.uid !== "" && { uid: pod.uid }) };
  try {
    await kube.patch([...path, "status"], { metadata });
  } catch (error) {
    const isRefused = isNotFound(error) || [403, 405].includes(statusOf(error) ?? 0);
    if (!isRefused) throw error;
    await kube.patch(path, { metadata });
  }
}

/**
 * Publishes annotations on a pod, see {@link patchStatus}. Repeated on conflicts and failures of
 * the server, until the deadline.
 *
 * @returns false, after a warning, when it could not be published
 */
export async function publishStatus(
  host: Host,
  kube: () => Promise<Kube>,
  status: Pick<PodStatus, "pod" | "annotations">,
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
