/**
 * How many attachments a pod may have, and the pods of a namespace on this node together:
 * `access.max_attachments`. Counted on the record in the transaction that writes the plan down, so
 * that no number of ADDs at once gets past it. Source: design D9.
 */
import { CniError, code } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import type { State } from "./database.ts";
import { podLabel } from "./pod.ts";
import type { Attachment } from "./state.ts";

/** Attachments on record that count against a plan. */
export interface Held {
  /** Of the same container. */
  pod: number;
  /** Of the pods of its namespace on this node. */
  namespace: number;
}

/**
 * Refuses a plan that is too much. Call inside a transaction, with the plan not on record yet; one
 * of an earlier attempt of the same call has been undone.
 *
 * @throws CniError 100, with the rule
 */
export function checkQuota(
  state: Pick<State, "database">,
  config: Pick<Config, "file" | "access">,
  planned: readonly Attachment[],
): void {
  judgeQuota(config, planned, readHeld(state, planned));
}

/**
 * Counts what is on record. What a failing DEL left counts as long as its runtime may come back for
 * it; what is leaked is the node's matter.
 */
export function readHeld(
  { database }: Pick<State, "database">,
  planned: readonly Attachment[],
): Held {
  const count = (where: string, value = ""): number => {
    const row = database
      .query(`SELECT count(*) AS n FROM attachments WHERE state <> 'leaked' AND ${where}`)
      .get(value) as { n: number };
    return row.n;
  };
  const [first] = planned;
  return {
    // By container: several calls of one runtime may attach it, each with its own interface.
    pod: count("container_id = ?", first?.containerId),
    namespace: count(
      "json_valid(plan) AND json_extract(plan, '$.pod.namespace') = ?",
      first?.pod.namespace,
    ),
  };
}

/** The rule alone. @throws CniError 100 */
export function judgeQuota(
  { file, access: { maxAttachments } }: Pick<Config, "file" | "access">,
  planned: readonly Attachment[],
  held: Held,
): void {
  const [first] = planned;
  if (!maxAttachments || !first) return;
  const { pod } = first;
  for (const key of ["pod", "namespace"] as const) {
    const max = maxAttachments[key];
    // Outside Kubernetes there are no namespaces to count by.
    if (max === undefined || (key === "namespace" && pod.namespace === "")) continue;
    if (held[key] + planned.length <= max) continue;
    const whose = key === "pod" ? "the pod" : `namespace "${pod.namespace}"`;
    const names = planned.map(({ network }) => `"${network}"`).join(", ");
    const rule = `access.max_attachments.${key} at ${file}:${maxAttachments.line}`;
    throw new CniError(
      code.accessDenied,
      `Access to networks ${names} denied for pod ${podLabel(pod)}: they are ${planned.length}, ` +
        `${whose} has ${held[key]} on this node, and access.max_attachments.${key} is ${max}`,
      { details: rule, rule },
    );
  }
}
