/**
 * Bytes that pass the host-side interfaces of the attachments, from `/sys/class/net`: behind the
 * bandwidth KPI. Loaded by every ADD, so it loads nothing itself.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { State } from "./database.ts";

/** Host-side interface of an attachment, by which its traffic is counted. */
export interface TrafficSource {
  containerId: string;
  ifName: string;
  network: string;
  hostIfName: string;
}

/**
 * Counts the bytes of some host-side interfaces and keeps bytes and rate. Call inside a
 * transaction. An interface that is gone is passed over.
 */
export function sampleTraffic(
  { database }: State,
  sources: readonly TrafficSource[],
  nowMs: number,
): void {
  const find = database.query(
    "SELECT bytes, at_ms FROM traffic WHERE container_id = ? AND ifname = ?",
  );
  const put = database.query("INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?, ?, ?)");
  for (const { containerId, ifName, network, hostIfName } of sources) {
    const bytes = countBytes(hostIfName);
    if (bytes === undefined) continue;
    const before = find.get(containerId, ifName) as { bytes: number; at_ms: number } | null;
    const seconds = before ? (nowMs - before.at_ms) / 1000 : 0;
    const rate = before && seconds > 0 ? Math.max(0, bytes - before.bytes) / seconds : 0;
    put.run(containerId, ifName, network, hostIfName, nowMs, bytes, rate);
  }
}

/** Received and sent bytes of an interface of the node; undefined when there is none. */
function countBytes(name: string): number | undefined {
  // A delegate wrote the name: it must not lead to another folder.
  if (name.includes("/") || name.startsWith(".")) return undefined;
  const dir = join("/sys/class/net", name, "statistics");
  try {
    const read = (file: string) => Number(readFileSync(join(dir, file), "utf8"));
    return read("rx_bytes") + read("tx_bytes");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return undefined;
  }
}
