/**
 * Bytes that pass the host-side interfaces of the attachments, from `/sys/class/net`: behind the
 * bandwidth KPI. Loaded by every ADD, so it loads nothing itself.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import type { State } from "./database.ts";

/** Host-side interface of an attachment, by which its traffic is counted. */
export interface TrafficSource {
  containerId: string;
  ifName: string;
  network: string;
  hostIfName: string;
}

/** Where the kernel lists its interfaces. */
const interfacesDir = "/sys/class/net";

/**
 * The host-side interface of each attachment, where its plugins tell of one: the first that is no
 * bridge. A bridge carries the traffic of others too; the ifb of the bandwidth plugin comes last.
 */
export function trafficSources(
  made: readonly {
    attachment: { containerId: string; ifName: string; network: string };
    result: { interfaces: readonly { name: string; sandbox?: string }[] };
  }[],
): TrafficSource[] {
  return made.flatMap(({ attachment: { containerId, ifName, network }, result }) => {
    const outside = result.interfaces.filter(({ sandbox }) => !sandbox).map(({ name }) => name);
    const hostIfName = outside.find((name) => !isBridge(name));
    return hostIfName === undefined ? [] : [{ containerId, ifName, network, hostIfName }];
  });
}

function isBridge(name: string): boolean {
  return isName(name) && existsSync(join(interfacesDir, name, "bridge"));
}

/** A delegate wrote the name: it must not lead to another folder. */
function isName(name: string): boolean {
  return name !== "" && !name.includes("/") && !name.startsWith(".");
}

const findSql = `SELECT bytes, at_ms, host_ifname, bytes_per_second AS rate FROM traffic
  WHERE container_id = ? AND ifname = ?`;
const putSql = "INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?, ?, ?)";

/** Prepares what {@link sampleTraffic} runs. */
export function prepareTraffic({ database }: State): void {
  database.query(findSql);
  database.query(putSql);
}

/**
 * Counts the bytes of some host-side interfaces and keeps bytes and rate; the rate is unknown until
 * the second count. Call inside a transaction. An interface that is gone is forgotten.
 */
export function sampleTraffic(
  { database }: State,
  sources: readonly TrafficSource[],
  nowMs: number,
): void {
  const find = database.query(findSql);
  const put = database.query(putSql);
  for (const { containerId, ifName, network, hostIfName } of sources) {
    const received = readInterface(hostIfName, "statistics/rx_bytes");
    const sent = readInterface(hostIfName, "statistics/tx_bytes");
    if (received === undefined || sent === undefined) {
      database
        .query("DELETE FROM traffic WHERE container_id = ? AND ifname = ?")
        .run(containerId, ifName);
      continue;
    }
    const bytes = received + sent;
    const before = find.get(containerId, ifName) as {
      bytes: number;
      at_ms: number;
      host_ifname: string;
      rate: number | null;
    } | null;
    const seconds = before ? (nowMs - before.at_ms) / 1000 : 0;
    // Fewer bytes than before: it is another interface of that name.
    const isSame = before && before.host_ifname === hostIfName && bytes >= before.bytes;
    const rate = isSame && seconds > 0 ? (bytes - before.bytes) / seconds : null;
    put.run(containerId, ifName, network, hostIfName, nowMs, bytes, rate);
  }
}

/** Interfaces counted anew at one choice, the one counted longest ago first, and how often. */
const oldestMax = 2;
const periodMs = 5_000;

/**
 * Counts those whose turn it is. Call inside a transaction.
 * @param max interfaces at most, which were not counted for `minAgeMs`
 * @returns how many it were
 */
export function sampleOldest(
  state: State,
  nowMs: number,
  { max, minAgeMs } = { max: oldestMax, minAgeMs: periodMs },
): number {
  const sources = state.database
    .query(
      `SELECT container_id AS containerId, ifname AS ifName, network, host_ifname AS hostIfName
       FROM traffic WHERE at_ms < ? ORDER BY at_ms LIMIT ?`,
    )
    .all(nowMs - minAgeMs, max) as TrafficSource[];
  sampleTraffic(state, sources, nowMs);
  return sources.length;
}

/** Forgets the counts of a container's attachments that are not on record any more. */
export function forgetTraffic({ database }: State, containerId: string): void {
  database
    .query(
      `DELETE FROM traffic WHERE container_id = ?1 AND ifname NOT IN
         (SELECT ifname FROM attachments WHERE container_id = ?1)`,
    )
    .run(containerId);
}

/** A number the kernel tells of an interface of the node; undefined when there is none. */
function readInterface(name: string, file: string): number | undefined {
  const path = join(interfacesDir, name, file);
  if (!isName(name) || !existsSync(path)) return undefined;
  try {
    const value = Number(readFileSync(path, "utf8"));
    return Number.isFinite(value) ? value : undefined;
  } catch (error) {
    // It went away meanwhile.
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return undefined;
  }
}
