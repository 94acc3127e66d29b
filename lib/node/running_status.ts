/**
 * The status of a pod whose networks changed while it runs: written down with them, and published
 * at once where that is how this node does it. What cannot be published waits for the node agent.
 */

import { type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type State, write } from "../database.ts";
import type { Done } from "../default_route.ts";
import {
  makeStatus,
  type PodStatus,
  publishStatus,
  statusSource,
} from "../kubernetes/network_status.ts";
import type { Objects } from "../kubernetes/objects_of_call.ts";
import type { Plan } from "../plan.ts";
import { type Attachment, forgetPublished, type StoredAttachment } from "../state.ts";
import { waitingAnnotations } from "./replan.ts";

/** What a running pod's status needs. */
interface Running {
  host: Host;
  config: Config;
  state: State;
  objects: Objects;
}

/** Key of CNI-Genie's annotation of several addresses. */
const multiIp = "multi-ip-preferences";

/**
 * Makes the annotations of a running pod; undefined where none are wanted.
 * @param before its attachments when it was changed
 */
export async function runningStatus(
  { host, config, state, objects }: Running,
  before: readonly StoredAttachment[],
  done: readonly Done[],
): Promise<PodStatus | undefined> {
  const [first] = done;
  if (!first) return undefined;
  const ordered = done.toSorted(
    (a, b) => Number(b.attachment.primary) - Number(a.attachment.primary),
  );
  const { pod } = first.attachment;
  const own = before.filter(isOfSelection);
  const kept = done.filter(({ attachment }) => isOfSelection(attachment));
  const plan: Plan = {
    pod: { ...pod, serviceAccount: undefined, annotations: new Map(), source: "none" },
    decision: own.length > 0 ? "cni" : "default",
    primarySet: new Set(kept.map(({ attachment }) => attachment.ifName)),
    attachments: [],
    objects,
  };
  const status = await makeStatus(host, config, plan, ordered);
  if (!status) return undefined;
  if (own.length > 1 && kept.length < 2) {
    // It was published for more than one: it must not stay as it is.
    const { formatMultiIpPreferences } = await import("../kubernetes/npwg.ts");
    const sources = await Promise.all(kept.map((one) => statusSource(host, one)));
    status.annotations[multiIp] = formatMultiIpPreferences(sources);
  }
  const annotations = { ...waitingAnnotations(state, status), ...status.annotations };
  return { ...status, annotations, isInline: config.kubernetes.status === "inline" };
}

/** Selected by CNI-Genie's annotations. */
function isOfSelection({ reason }: Attachment): boolean {
  return /^asked for by (cni|networks)$/.test(reason);
}

/** Publishes it, where that is not left to the agent. Never throws. */
export async function publishRunning(
  { host, config, state, objects }: Running,
  status: PodStatus,
): Promise<void> {
  if (!status.isInline) return;
  const deadlineMs = host.now() + config.kubernetes.timeoutMs;
  try {
    if (!(await publishStatus(host, objects.kube, status, deadlineMs))) return;
    write(state, () => forgetPublished(state, status));
  } catch (error) {
    log(host, "warn", `A network status waits: ${toCniError(error).message}`);
  }
}
