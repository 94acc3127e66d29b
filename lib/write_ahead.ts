/**
 * What an ADD writes down. Before anything is done, its plan: under the container's lock, after
 * undoing what an earlier attempt left, and never over what is not ours. Afterwards its results,
 * and the bytes that have passed the host-side interfaces, for the bandwidth KPI. What reads it:
 * `recorded.ts`. Source: design D4, D6.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { Call } from "./call.ts";
import { CniError, code } from "./cni.ts";
import { type State, write } from "./database.ts";
import { interfacesIn, netnsId } from "./kernel.ts";
import { endOf, takeLock } from "./lock.ts";
import type { Attachment, TrafficSource } from "./record.ts";

/**
 * Takes the lock and writes the plan down, after undoing what an earlier attempt left (a killed
 * ADD, a failed DEL, a container started again after a reboot).
 *
 * @throws CniError 100 when there would be too many attachments; 105 when the container has an
 *   interface of a planned name already; 11 when another operation does not end in time, or what
 *   was left cannot be undone; 106
 */
export async function writeAhead(call: Call, planned: Attachment[]): Promise<void> {
  const { host, state, operation, chain, config } = call;
  const quota = config.access.maxAttachments ? await import("./policy/access.ts") : undefined;
  // Looked up before the database is locked, because every other call of the node waits for that.
  const mayClash = findPresent(planned) !== undefined;
  const insert = () => {
    quota?.checkQuota(state, config, planned);
    if (mayClash) checkNotPresent(planned);
    insertPlanned(state, planned, host.now());
  };
  try {
    const mayHaveLeftovers = await takeLock({ ...chain, state, operation }, () => {
      checkNotDeleted(call, planned);
      if (isOnRecord(state, operation.containerId)) return true;
      insert();
      return false;
    });
    if (!mayHaveLeftovers) return;
    const { undoLeftovers } = await import("./recovery/failed_add.ts");
    await undoLeftovers(call, planned);
    write(state, insert);
  } catch (error) {
    const { giveUp } = await import("./recovery/failed_add.ts");
    giveUp(call, planned);
    throw error;
  }
}

/**
 * Refuses a plan with an interface of a name that the pod has and we did not make: a delegate would
 * refuse it (SPEC §2 "ADD"), and its DEL would then remove what is not ours.
 * @throws CniError 105
 */
function checkNotPresent(planned: Attachment[]): void {
  const taken = findPresent(planned);
  if (!taken) return;
  throw new CniError(
    code.interfaceConflict,
    `Cannot attach network "${taken.network}": the pod has an interface "${taken.ifName}" ` +
      "already, and genie did not make it",
  );
}

/** The first that is planned with the name of an interface that the pod has. */
function findPresent(planned: Attachment[]): Attachment | undefined {
  const present = new Set(interfacesIn(planned[0]?.netns ?? ""));
  return planned.find(({ ifName }) => present.has(ifName));
}

/**
 * Refuses an ADD that was overtaken by a DEL of the same call, before it had the lock: its runtime
 * was killed or gave up, so nobody would ever delete what it attaches.
 * @throws CniError 11
 */
function checkNotDeleted({ host, state, startedMs }: Call, planned: Attachment[]): void {
  const [first] = planned;
  const end = first && endOf(state, first);
  // A DEL that is still to come was there before the clock was set back.
  if (end?.command !== "DEL" || end.atMs <= startedMs || end.atMs > host.now()) return;
  throw new CniError(
    code.tryAgainLater,
    `Cannot ADD container ${first?.containerId}: it was deleted while this ADD was being prepared`,
  );
}

const insertPlannedSql = `INSERT OR REPLACE INTO attachments (container_id, request_ifname, ifname,
    position, network, request_network, state, plan, netns_id, created_at_ms)
  VALUES (?, ?, ?, ?, ?, ?, 'planned', ?, ?, ?)`;

/**
 * Inserts the plan, one row per attachment, as `planned`. Call under the container's lock, with the
 * rows in the way undone; one that cannot be read is replaced.
 */
export function insertPlanned(state: State, attachments: Attachment[], nowMs: number): void {
  const insert = state.database.query(insertPlannedSql);
  for (const [position, attachment] of attachments.entries()) {
    insert.run(
      attachment.containerId,
      attachment.requestIfName,
      attachment.ifName,
      position,
      attachment.network,
      attachment.requestNetwork,
      JSON.stringify(attachment),
      netnsId(attachment.netns),
      nowMs,
    );
  }
  const first = attachments[0];
  if (!first) return;
  state.database
    .query("DELETE FROM ended WHERE container_id = ? AND request_ifname = ?")
    .run(first.containerId, first.requestIfName);
}

/** Writes the result of one attachment. */
export const attachedSql =
  "UPDATE attachments SET state = 'attached', result = ? WHERE container_id = ? AND ifname = ?";

/**
 * Marks one attachment as attached, with the wire form of its final result.
 * @throws CniError 11 when its row is gone: nobody could ever delete it
 */
export function setAttached({ database }: State, attachment: Attachment, result: object): void {
  const { containerId, ifName } = attachment;
  const text = JSON.stringify(result);
  if (database.query(attachedSql).run(text, containerId, ifName).changes === 1) return;
  throw new CniError(
    code.tryAgainLater,
    `Cannot record interface "${ifName}" of container ${containerId}: its plan has vanished from ` +
      "the record",
  );
}

const onRecordSql = "SELECT * FROM attachments WHERE container_id = ?";

/** Is any attachment of a container on record? Reads its rows whole: damage is to show here. */
export function isOnRecord({ database }: State, containerId: string): boolean {
  return database.query(onRecordSql).all(containerId).length > 0;
}

const interfacesDir = "/sys/class/net";

/**
 * The host-side interface of each attachment whose result has one: the first that is not a bridge,
 * which carries the traffic of others too.
 */
export function trafficSources(
  made: readonly {
    attachment: { containerId: string; ifName: string; network: string };
    result: { interfaces: readonly { name: string; sandbox?: string }[] };
  }[],
): TrafficSource[] {
  const sources: TrafficSource[] = [];
  for (const { attachment, result } of made) {
    const { containerId, ifName, network } = attachment;
    for (const { name, sandbox } of result.interfaces) {
      if (sandbox || (isName(name) && existsSync(join(interfacesDir, name, "bridge")))) continue;
      sources.push({ containerId, ifName, network, hostIfName: name });
      break;
    }
  }
  return sources;
}

/** A delegate wrote the name: it must not lead to another folder. */
function isName(name: string): boolean {
  return name !== "" && !name.includes("/") && !name.startsWith(".");
}

/** Writes the count of one interface. */
export const putTrafficSql = "INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?, ?, ?)";

/** Counts the bytes of host-side interfaces for the first time: their rate is not known yet. */
export function startTraffic(
  { database }: State,
  sources: readonly TrafficSource[],
  nowMs: number,
): void {
  const put = database.query(putTrafficSql);
  for (const { containerId, ifName, network, hostIfName } of sources) {
    const bytes = countBytes(hostIfName);
    // The count of an earlier attempt, of another network maybe, must not stay.
    const key = [containerId, ifName] as const;
    if (Number.isFinite(bytes)) put.run(...key, network, hostIfName, nowMs, bytes, null);
    else database.run("DELETE FROM traffic WHERE container_id = ? AND ifname = ?", [...key]);
  }
}

/** The bytes that have passed an interface of the node; NaN when there is no such interface. */
export function countBytes(name: string): number {
  if (!isName(name)) return Number.NaN;
  const dir = join(interfacesDir, name, "statistics");
  const read = (file: string) => Number(readFileSync(join(dir, file), "utf8"));
  try {
    return read("rx_bytes") + read("tx_bytes");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return Number.NaN;
  }
}
