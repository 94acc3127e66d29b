/** The rate at which bytes pass the host-side interfaces: a further count beside the first one. */
import type { State } from "../database.ts";
import type { TrafficSource } from "../record.ts";
import { countBytes, putTrafficSql } from "../write_ahead.ts";

const findSql = `SELECT bytes, at_ms AS atMs, host_ifname AS hostIfName FROM traffic
  WHERE container_id = ? AND ifname = ?`;
type Counted = { bytes: number; atMs: number; hostIfName: string };

/**
 * Counts the bytes of host-side interfaces and keeps bytes and rate, which is unknown until the
 * second count. An interface that is gone is forgotten.
 */
export function sampleTraffic(
  { database }: State,
  sources: readonly TrafficSource[],
  nowMs: number,
): void {
  const find = database.query(findSql);
  const put = database.query(putTrafficSql);
  for (const { containerId, ifName, network, hostIfName } of sources) {
    const bytes = countBytes(hostIfName);
    if (!Number.isFinite(bytes)) {
      database
        .query("DELETE FROM traffic WHERE container_id = ? AND ifname = ?")
        .run(containerId, ifName);
      continue;
    }
    const before = find.get(containerId, ifName) as Counted | null;
    // Fewer bytes than before mean another interface of that name.
    const isSame = before?.hostIfName === hostIfName && bytes >= before.bytes;
    const seconds = isSame ? (nowMs - before.atMs) / 1000 : 0;
    const rate = isSame && seconds > 0 ? (bytes - before.bytes) / seconds : null;
    put.run(containerId, ifName, network, hostIfName, nowMs, bytes, rate);
  }
}

/** How many interfaces are counted at most, of those not counted for so long, in ms. */
export type Turn = { max: number; minAgeMs: number };

/** The interfaces whose turn it is, the one counted longest ago first. */
export function oldestSources({ database }: State, nowMs: number, turn: Turn): TrafficSource[] {
  const query = database.query(
    `SELECT container_id AS containerId, ifname AS ifName, network, host_ifname AS hostIfName
     FROM traffic WHERE at_ms < ? ORDER BY at_ms LIMIT ?`,
  );
  return query.all(nowMs - turn.minAgeMs, turn.max) as TrafficSource[];
}
