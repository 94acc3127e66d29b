/**
 * What is measured of a network: occupancy, subnets, response time, failure rate, bandwidth,
 * attachments. Each figure says where it comes from and how old it is, or that it is unknown.
 * Reads the record and host-local's store; `traffic.ts` counts the bytes.
 */
import { readdirSync, statSync } from "node:fs";
import { isIP } from "node:net";
import { join } from "node:path";
import type { State } from "./database.ts";
import { isObject } from "./json.ts";
import type { NetworkConfigList } from "./netconf.ts";
import type { Network } from "./networks.ts";

/** One figure; `value` undefined: unknown. */
export interface Measured {
  value: number | undefined;
  /** Where it comes from, for people. */
  source: string;
  /** How old it is in ms; 0 where it was read just now. */
  ageMs: number;
}

/** Addresses of one family. */
export interface Occupancy {
  used: Measured;
  total: Measured;
}

/** All KPIs of a network. */
export interface NetworkKpis {
  network: string;
  ipv4: Occupancy;
  ipv6: Occupancy;
  /** Share of the fuller family, 0 to 1. */
  occupancy: Measured;
  subnets: Measured;
  /** Median and 95th percentile of recent successful ADDs, in µs. */
  medianUs: Measured;
  p95Us: Measured;
  /** Share of recent ADDs that failed, 0 to 1. */
  failures: Measured;
  /** Bytes per second over the host-side interfaces of its attachments. */
  bandwidth: Measured;
  attachments: Measured;
}

/** ADDs that count as recent, newest first. */
const recentAdds = 50;
/** Traffic measured longer ago than this says nothing of now, in ms. */
const trafficAgeMaxMs = 10 * 60_000;
/** Where host-local keeps its reservations when the config names no `dataDir`. */
const hostLocalDir = "/var/lib/cni/networks";

const unknown = (source: string): Measured => ({ value: undefined, source, ageMs: 0 });
const measured = (value: number, source: string, ageMs = 0): Measured => ({ value, source, ageMs });

/**
 * Measures a network.
 * @param state the record; undefined where there is none yet
 */
export function networkKpis(
  state: State | undefined,
  { name, list, entry }: Network,
  nowMs: number,
): NetworkKpis {
  const ranges = rangesOf(list);
  const used = usedAddresses(list, ranges);
  const count = state ? countAttachments(state, name) : 0;
  const family = (is6: boolean): Occupancy => {
    const own = ranges.filter((range) => range.is6 === is6);
    const total = own.length > 0 ? own.reduce((sum, { size }) => sum + size, 0) : undefined;
    // `capacity` stands for the IPv4 addresses of a network whose IPAM cannot be read.
    const capacity = is6 ? undefined : entry?.capacity;
    return {
      total:
        capacity !== undefined
          ? measured(capacity, "capacity in the plugin table")
          : total === undefined
            ? unknown("its IPAM tells no range")
            : measured(total, "ranges in its config"),
      used: used
        ? measured(is6 ? used.ipv6 : used.ipv4, "host-local's store")
        : measured(count, "attachments on record"),
    };
  };
  const ipv4 = family(false);
  const ipv6 = family(true);
  const adds = state ? recent(state, name) : [];
  const durations = adds.filter(({ outcome }) => outcome === "ok").map((add) => add.duration_us);
  const ageMs = Math.max(0, nowMs - (adds[0]?.at_ms ?? nowMs));
  return {
    network: name,
    ipv4,
    ipv6,
    occupancy: fullest(ipv4, ipv6),
    subnets:
      ranges.length > 0
        ? measured(new Set(ranges.map(({ subnet }) => subnet)).size, "ranges in its config")
        : unknown("its IPAM tells no range"),
    medianUs: percentile(durations, 0.5, ageMs),
    p95Us: percentile(durations, 0.95, ageMs),
    failures:
      adds.length === 0
        ? unknown("no ADD on record")
        : measured(1 - durations.length / adds.length, `last ${adds.length} ADDs`, ageMs),
    bandwidth: state ? readTraffic(state, name, nowMs) : unknown("no record"),
    attachments: measured(count, "attachments on record"),
  };
}

/** Nearest-rank percentile of unsorted values. */
function percentile(values: number[], share: number, ageMs: number): Measured {
  if (values.length === 0) return unknown("no successful ADD on record");
  const sorted = values.toSorted((a, b) => a - b);
  const value = sorted[Math.ceil(share * sorted.length) - 1] ?? 0;
  return measured(value, `last ${values.length} ADDs`, ageMs);
}

/** A pod gets an address of each family, so the fuller one decides. */
function fullest(ipv4: Occupancy, ipv6: Occupancy): Measured {
  const shares = [ipv4, ipv6].flatMap(({ used, total }) =>
    used.value === undefined || !total.value
      ? []
      : [measured(Math.min(1, used.value / total.value), `${used.source}, ${total.source}`)],
  );
  return (
    shares.sort((a, b) => (b.value ?? 0) - (a.value ?? 0))[0] ?? unknown("its size is not known")
  );
}

function countAttachments({ database }: State, network: string): number {
  const { count } = database
    .query("SELECT count(*) AS count FROM attachments WHERE network = ? AND state <> 'leaked'")
    .get(network) as { count: number };
  return count;
}

interface RecentAdd {
  at_ms: number;
  duration_us: number;
  outcome: string;
}

function recent({ database }: State, network: string): RecentAdd[] {
  return database
    .query(
      `SELECT at_ms, duration_us, outcome FROM ledger
       WHERE kind = 'network' AND command = 'ADD' AND network = ? ORDER BY id DESC
       LIMIT ${recentAdds}`,
    )
    .all(network) as RecentAdd[];
}

function readTraffic({ database }: State, network: string, nowMs: number): Measured {
  const row = database
    .query(
      `SELECT sum(bytes_per_second) AS sum, count(*) AS count, min(at_ms) AS oldest FROM traffic
       WHERE network = ? AND at_ms > ?`,
    )
    .get(network, nowMs - trafficAgeMaxMs) as {
    sum: number | null;
    count: number;
    oldest: number | null;
  };
  if (row.sum === null || row.oldest === null) return unknown("no traffic measured lately");
  return measured(row.sum, `${row.count} host-side interfaces`, Math.max(0, nowMs - row.oldest));
}

/** A range of addresses that an IPAM gives out. */
interface Range {
  is6: boolean;
  subnet: string;
  size: number;
}

/** The ranges of host-local's and whereabouts' configs; none for an IPAM that tells of none. */
export function rangesOf(list: NetworkConfigList): Range[] {
  return list.plugins.flatMap(({ ipam }) => {
    if (!isObject(ipam)) return [];
    const sets = Array.isArray(ipam["ranges"]) ? ipam["ranges"].flat() : [];
    const whereabouts = Array.isArray(ipam["ipRanges"]) ? ipam["ipRanges"] : [];
    return [ipam, ...sets, ...whereabouts].flatMap((range) => readRange(range));
  });
}

function readRange(range: unknown): Range[] {
  if (!isObject(range)) return [];
  // whereabouts calls its subnet `range`, as "10.1.0.5-10.1.0.9/16" too.
  const text = range["subnet"] ?? range["range"];
  const [, first, last, network, digits] =
    /^(?:([^/-]+)-([^/-]+)|([^/-]+))\/(\d{1,3})$/.exec(typeof text === "string" ? text : "") ?? [];
  const address = network ?? first ?? "";
  const is6 = isIP(address) === 6;
  if (isIP(address) === 0) return [];
  const width = is6 ? 128 : 32;
  const prefix = Number(digits);
  if (prefix > width) return [];
  const subnet = `${address}/${digits}`;
  const from = toNumber(range["rangeStart"] ?? range["range_start"] ?? first);
  const to = toNumber(range["rangeEnd"] ?? range["range_end"] ?? last);
  const whole = 2n ** BigInt(width - prefix);
  const base = toNumber(address) ?? 0n;
  const low = base - (base % whole);
  // Without bounds: neither the network's own address, nor IPv4's broadcast, nor the gateway.
  const lowest = from ?? low + 1n;
  const highest = to ?? low + whole - (is6 ? 1n : 2n);
  const gateway = toNumber(range["gateway"]) ?? low + 1n;
  const hasGateway = gateway >= lowest && gateway <= highest;
  const size = Number(highest - lowest) + 1 - (hasGateway ? 1 : 0);
  return size > 0 ? [{ is6, subnet, size }] : [];
}

/** An IP address as a number; undefined for anything else. */
function toNumber(text: unknown): bigint | undefined {
  if (typeof text !== "string") return undefined;
  const version = isIP(text);
  if (version === 4) return text.split(".").reduce((sum, part) => sum * 256n + BigInt(part), 0n);
  if (version !== 6) return undefined;
  const [head = "", tail] = new URL(`http://[${text}]`).hostname.slice(1, -1).split("::");
  const groups = (part: string) => (part === "" ? [] : part.split(":"));
  const before = groups(head);
  const after = tail === undefined ? [] : groups(tail);
  const zeros = Array.from({ length: 8 - before.length - after.length }, () => "0");
  return [...before, ...zeros, ...after].reduce(
    (sum, group) => sum * 65536n + BigInt(`0x${group}`),
    0n,
  );
}

/** Reservations in host-local's store, by family; undefined where another IPAM gives addresses. */
function usedAddresses(
  list: NetworkConfigList,
  ranges: Range[],
): { ipv4: number; ipv6: number } | undefined {
  const ipam = list.plugins.map((plugin) => plugin["ipam"]).find(isObject);
  if (ipam?.["type"] !== "host-local" || ranges.length === 0) return undefined;
  const base = typeof ipam["dataDir"] === "string" ? ipam["dataDir"] : hostLocalDir;
  const dir = join(base, list.name);
  if (!statSync(dir, { throwIfNoEntry: false })) return { ipv4: 0, ipv6: 0 };
  let ipv4 = 0;
  let ipv6 = 0;
  for (const name of readdirSync(dir)) {
    // Files are named by their address; "lock" and "last_reserved_ip.0" are not.
    const char = name.charCodeAt(0);
    if (name.includes(":")) ipv6++;
    else if (char >= 0x30 && char <= 0x39 && name.includes(".")) ipv4++;
  }
  return { ipv4, ipv6 };
}
