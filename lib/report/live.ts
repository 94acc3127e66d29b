/** What reports read of the attachments that exist now: who holds what, and which are stuck. */
import { CniError } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import { family } from "../result.ts";
import { parseResult } from "../result_wire.ts";
import type { RecordReader } from "./file.ts";

/** An attachment, as far as a report tells of it. */
export interface LiveAttachment {
  containerId: string;
  namespace: string;
  pod: string;
  podUid: string;
  network: string;
  ifName: string;
  /** Plugin types of its chain, in order. */
  plugins: string[];
  /** With prefix length, as its result says. */
  addresses: string[];
  /** `planned`, `attached`, `failing` or `leaked`. */
  state: string;
  /** Why it is attached. */
  reason: string;
  error: string;
  createdAtMs: number;
  /** When its first DEL failed, ms since the epoch; 0 when none did. */
  failedAtMs: number;
}

/** Which attachments are meant; what is absent does not limit. */
export interface LiveFilter {
  network?: string;
  namespace?: string;
  pod?: string;
}

interface Row {
  container_id: string;
  ifname: string;
  network: string;
  state: string;
  plan: string;
  result: string | null;
  error: string;
  created_at_ms: number;
  failed_at_ms: number;
}

/** Every attachment that is meant, in the order they were made. Hostile texts become "". */
export function* liveAttachments(
  { database, tables }: RecordReader,
  filter: LiveFilter,
): Generator<LiveAttachment, void> {
  if (!tables.has("attachments")) return;
  const rows = database
    .query(
      `SELECT container_id, ifname, network, state, plan, result, error, created_at_ms, failed_at_ms
       FROM attachments WHERE ?1 IS NULL OR network = ?1
       ORDER BY created_at_ms, container_id, position`,
    )
    .iterate(filter.network ?? null) as IterableIterator<Row>;
  for (const row of rows) {
    const one = attachmentOf(row);
    if (filter.namespace !== undefined && one.namespace !== filter.namespace) continue;
    if (filter.pod !== undefined && one.pod !== filter.pod) continue;
    yield one;
  }
}

function attachmentOf(row: Row): LiveAttachment {
  const plan = readJson(row.plan);
  const pod = isObject(plan) && isObject(plan["pod"]) ? plan["pod"] : {};
  const list = isObject(plan) && isObject(plan["list"]) ? plan["list"] : {};
  const plugins = Array.isArray(list["plugins"]) ? list["plugins"] : [];
  return {
    containerId: row.container_id,
    namespace: textOf(pod["namespace"]),
    pod: textOf(pod["name"]),
    podUid: textOf(pod["uid"]),
    network: row.network,
    ifName: row.ifname,
    plugins: plugins.map((plugin) => (isObject(plugin) ? textOf(plugin["type"]) : "")),
    addresses: row.result === null ? [] : addressesOf(readJson(row.result)),
    state: row.state,
    reason: isObject(plan) ? textOf(plan["reason"]) : "",
    error: row.error,
    createdAtMs: row.created_at_ms,
    failedAtMs: row.failed_at_ms,
  };
}

const textOf = (value: unknown): string => (typeof value === "string" ? value : "");

function readJson(text: string): unknown {
  try {
    return parseJson(text, "stored text");
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

function addressesOf(result: unknown): string[] {
  try {
    return parseResult(result, "1.0.0").ips.map(({ address }) => address);
  } catch (error) {
    if (error instanceof CniError) return [];
    throw error;
  }
}

/** What one network carries now. */
export interface NetworkLoad {
  attachments: number;
  /** Addresses in use, by family. */
  ipv4: number;
  ipv6: number;
}

/** Adds one attachment to what its network carries. */
export function addLoad(loads: Map<string, NetworkLoad>, one: LiveAttachment): void {
  const load = loads.get(one.network) ?? { attachments: 0, ipv4: 0, ipv6: 0 };
  load.attachments++;
  for (const address of new Set(one.addresses)) load[family(address) === 6 ? "ipv6" : "ipv4"]++;
  loads.set(one.network, load);
}

/** Bytes per second of each network's attachments, both directions; only where it was measured. */
export function traffic({ database, tables }: RecordReader): Map<string, number> {
  if (!tables.has("traffic")) return new Map();
  const sums = database
    .query(
      `SELECT network, sum(bytes_per_second) FROM traffic WHERE bytes_per_second IS NOT NULL
       GROUP BY network`,
    )
    .values();
  return new Map(sums.map(([network, sum]) => [String(network), Number(sum)]));
}
