/**
 * Which selection of each pod the node agent has followed last. What writes is called inside a
 * transaction of `database.ts`.
 */
import type { State } from "../database.ts";
import type { CallId } from "../state.ts";

/** What the agent followed last of each call: a hash of the selection, by container and name. */
export function followedSelections({ database }: State): Map<string, string> {
  const rows = database.query("SELECT * FROM followed").all() as {
    container_id: string;
    request_ifname: string;
    selection: string;
  }[];
  return new Map(
    rows.map((row) => [`${row.container_id} ${row.request_ifname}`, row.selection] as const),
  );
}

/** Remembers a selection that was followed, and forgets those of calls that are gone. */
export function putFollowed(
  { database }: State,
  { containerId, requestIfName }: CallId,
  selection: string,
  nowMs: number,
): void {
  database
    .query("INSERT OR REPLACE INTO followed VALUES (?, ?, ?, ?)")
    .run(containerId, requestIfName, selection, nowMs);
  database.run(
    `DELETE FROM followed WHERE NOT EXISTS (SELECT 1 FROM attachments AS one
       WHERE one.container_id = followed.container_id
         AND one.request_ifname = followed.request_ifname)`,
  );
}

/** The operator changed it: what the pod asks for so far is not followed. */
export function putUnfollowed({ database }: State, call: CallId, nowMs: number): void {
  database
    .query("INSERT OR IGNORE INTO followed VALUES (?, ?, '', ?)")
    .run(call.containerId, call.requestIfName, nowMs);
}
