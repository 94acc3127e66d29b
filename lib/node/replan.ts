/**
 * One attachment of a pod that runs, planned anew on record: what was there before is kept until
 * the new one is made, so that a process killed at any instant leaves a row from which DEL can undo
 * both. What writes is called inside a transaction of `database.ts`.
 */
import { CniError } from "../cni.ts";
import type { State } from "../database.ts";
import { isObject, parseJson } from "../json.ts";
import { netnsId } from "../netns.ts";
import type { Attachment, CallId } from "../state.ts";

/**
 * Writes the plan of one attachment down beside those of its container, as `planned`: over the row
 * of its interface, whose result stays while it is of the same network, else behind the others.
 */
export function planOne({ database }: State, attachment: Attachment, nowMs: number): void {
  database
    .query(
      `INSERT INTO attachments (container_id, request_ifname, ifname, position, network,
         request_network, state, plan, netns_id, created_at_ms)
       VALUES (?1, ?2, ?3,
         (SELECT coalesce(max(position) + 1, 0) FROM attachments WHERE container_id = ?1),
         ?4, ?5, 'planned', ?6, ?7, ?8)
       ON CONFLICT (container_id, ifname) DO UPDATE SET state = 'planned', error = '',
         failed_at_ms = 0, result = CASE network WHEN ?4 THEN result END, network = ?4,
         request_network = ?5, plan = ?6, netns_id = ?7`,
    )
    .run(
      attachment.containerId,
      attachment.requestIfName,
      attachment.ifName,
      attachment.network,
      attachment.requestNetwork,
      JSON.stringify(attachment),
      netnsId(attachment.netns),
      nowMs,
    );
}

/**
 * Says why an attachment of a pod that runs is not there. It stays `planned`: no DEL was asked for,
 * so nobody may give it up, and `genie repair` or the pod's DEL find it.
 */
export function setBroken(
  { database }: State,
  { containerId, ifName }: Pick<Attachment, "containerId" | "ifName">,
  error: string,
): void {
  database
    .query(
      `UPDATE attachments SET state = 'planned', error = ?, failed_at_ms = 0
       WHERE container_id = ? AND ifname = ?`,
    )
    .run(error, containerId, ifName);
}

/** Annotations of a call that wait to be published; none where they cannot be read. */
export function waitingAnnotations(
  { database }: State,
  { containerId, requestIfName }: CallId,
): Record<string, string> {
  const row = database
    .query("SELECT annotations FROM statuses WHERE container_id = ? AND request_ifname = ?")
    .get(containerId, requestIfName) as { annotations: string } | null;
  if (!row) return {};
  try {
    const value = parseJson(row.annotations, "waiting annotations");
    const isText = (pair: [string, unknown]): pair is [string, string] =>
      typeof pair[1] === "string";
    return isObject(value) ? Object.fromEntries(Object.entries(value).filter(isText)) : {};
  } catch (error) {
    if (error instanceof CniError) return {};
    throw error;
  }
}
