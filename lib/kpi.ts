/**
 * What is measured of a network: occupancy, subnets, response time, failure rate, bandwidth,
 * attachments. Each figure says where it comes from and how old it is, or that it is unknown.
 * Reads the record and host-local's store; `traffic.ts` counts the bytes.
 */
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import type { State } from "./database.ts";
import { isIP, toNumber } from "./ip.ts";
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
  /** Of host-local's store, where it had to be read: keep it, see {@link keepStore}. */
  store?: StoreCount;
}

/** How many addresses a folder of host-local held, and at which state of it. */
export interface StoreCount {
  dir: string;
  stamp: string;
  ipv4: number;
  ipv6: number;
}

/**
 * ADDs that count as recent: so many of the newest, and none older than this, in ms. A network that
 * failed is given another chance once its failures are that old.
 */
const recentAdds = 50;
const recentAgeMaxMs = 60 * 60_000;
/** Traffic measured longer ago than this says nothing of now, in ms. */
const trafficAgeMaxMs = 10 * 60_000;
/** Where host-local keeps its reservations when the config names no `dataDir`. */
const hostLocalDir = "/var/lib/cni/networks";

/** Reads nothing but a database. */
type Reader = Pick<State, "database">;

const unknown = (source: string): Measured => ({ value: undefined, source, ageMs: 0 });
const measured = (value: number, source: string, ageMs = 0): Measured => ({ value, source, ageMs });

/**
 * Measures a network.
 *
 * @param state the record; undefined where there is none that can be read
 * @param isBrief measures no more than a choice needs: attachments may stay unknown
 */
export function networkKpis(
  state: Reader | undefined,
  { name, list, entry }: Network,
  nowMs: number,
  isBrief = false,
): NetworkKpis {
  const ranges = rangesOf(list);
  const used = usedAddresses(state, list, ranges, nowMs);
  const isNeeded = !isBrief || (!used && (entry?.capacity !== undefined || ranges.length > 0));
  const attachments = !state
    ? unknown("no record")
    : isNeeded
      ? measured(countAttachments(state, name), "attachments on record")
      : unknown("not counted");
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
      used: used ? measured(is6 ? used.ipv6 : used.ipv4, "host-local's store") : attachments,
    };
  };
  const ipv4 = family(false);
  const ipv6 = family(true);
  const adds = state ? recent(state, name, nowMs) : [];
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
        ? unknown("no recent ADD on record")
        : measured(1 - durations.length / adds.length, `last ${adds.length} ADDs`, ageMs),
    bandwidth: state ? readTraffic(state, name, nowMs) : unknown("no record"),
    attachments,
    ...(used?.read && { store: used.read }),
  };
}

/** Share of the fuller family once so many more pods have an address; undefined where unknown. */
export function occupancyWith(
  { ipv4, ipv6 }: Pick<NetworkKpis, "ipv4" | "ipv6">,
  more: number,
): number | undefined {
  const shares = [ipv4, ipv6].flatMap(({ used, total }) =>
    used.value === undefined || !total.value ? [] : [(used.value + more) / total.value],
  );
  return shares.length === 0 ? undefined : Math.min(1, Math.max(...shares));
}

/** Nearest-rank percentile of unsorted values. */
function percentile(values: number[], share: number, ageMs: number): Measured {
  if (values.length === 0) return unknown("no recent ADD that succeeded");
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

function countAttachments({ database }: Reader, network: string): number {
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

/** Attachments whose traffic stands for that of all, of one network. */
const trafficRowsMax = 64;

/** The recent ADDs of a network, newest first. Whom a rule denied says nothing of the network. */
function recent({ database }: Reader, network: string, nowMs: number): RecentAdd[] {
  const rows = database
    .query(
      `SELECT at_ms, duration_us, outcome FROM ledger
       WHERE kind = 'network' AND command = 'ADD' AND network = ? ORDER BY id DESC
       LIMIT ${recentAdds}`,
    )
    .all(network) as RecentAdd[];
  // Not in SQL: it would look for fifty through all that are older.
  return rows.filter((row) => row.outcome !== "denied" && row.at_ms > nowMs - recentAgeMaxMs);
}

/**
 * The traffic of all its attachments, from those that were measured lately: they share it alike.
 */
function readTraffic({ database }: Reader, network: string, nowMs: number): Measured {
  const row = database
    .query(
      `SELECT (SELECT count(*) FROM traffic WHERE network = ?1) AS count, count(*) AS lately,
         sum(rate) AS sum, min(at_ms) AS oldest
       FROM (SELECT at_ms, bytes_per_second AS rate FROM traffic
             WHERE network = ?1 AND at_ms > ?2 AND bytes_per_second IS NOT NULL
             ORDER BY at_ms DESC LIMIT ${trafficRowsMax})`,
    )
    .get(network, nowMs - trafficAgeMaxMs) as {
    count: number;
    lately: number;
    sum: number | null;
    oldest: number | null;
  };
  if (row.sum === null || row.oldest === null) return unknown("no traffic measured lately");
  const source = `${row.lately} of ${row.count} host-side interfaces`;
  const ageMs = Math.max(0, nowMs - row.oldest);
  return measured((row.sum * row.count) / row.lately, source, ageMs);
}

/** A range of addresses that an IPAM gives out. */
interface Range {
  is6: boolean;
  subnet: string;
  /** Addresses it has to give. */
  size: number;
  /** First and last of them. */
  lowest: bigint;
  highest: bigint;
}

/**
 * The ranges of host-local's and whereabouts' configs; none for an IPAM that tells of none. What
 * whereabouts leaves out (`exclude`) is taken off.
 */
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
  const size = Number(highest - lowest) + 1 - (hasGateway ? 1 : 0) - countExcluded(range, is6);
  return size > 0 ? [{ is6, subnet, size, lowest, highest }] : [];
}

/** Addresses that a range of whereabouts leaves out: single ones, and whole subnets. */
function countExcluded(range: Record<string, unknown>, is6: boolean): number {
  const all = Array.isArray(range["exclude"]) ? range["exclude"] : [];
  return all.reduce<number>((sum, text) => {
    const [address, digits] = typeof text === "string" ? text.split("/") : [];
    const width = is6 ? 128 : 32;
    const prefix = digits === undefined ? width : Number(digits);
    const isOwn = isIP(address ?? "") === (is6 ? 6 : 4) && prefix >= 0 && prefix <= width;
    return isOwn ? sum + 2 ** (width - prefix) : sum;
  }, 0);
}

/**
 * Reservations in host-local's store, by family; undefined where another IPAM gives addresses, or
 * where the store cannot be read.
 */
function usedAddresses(
  state: Reader | undefined,
  list: NetworkConfigList,
  ranges: Range[],
  nowMs: number,
): { ipv4: number; ipv6: number; read?: StoreCount } | undefined {
  const ipam = list.plugins.map((plugin) => plugin["ipam"]).find(isObject);
  if (ipam?.["type"] !== "host-local" || ranges.length === 0) return undefined;
  const base = typeof ipam["dataDir"] === "string" ? ipam["dataDir"] : hostLocalDir;
  const dir = join(base, list.name);
  const stamp = stampOf(dir);
  const known = state && stamp !== undefined ? findStore(state, dir, stamp.text) : undefined;
  const counted = known ?? countStore(readStore(dir));
  if (!counted) return undefined;
  const seemsFull = (is6: boolean, count: number): boolean => {
    const own = ranges.filter((range) => range.is6 === is6);
    return own.length > 0 && count >= own.reduce((sum, { size }) => sum + size, 0);
  };
  // A folder that has just changed may change again without being newer by its clock.
  const isSettled = stamp !== undefined && Math.abs(nowMs - stamp.atMs) > storeSettleMs;
  const isWorthKeeping = !known && isSettled;
  const read = isWorthKeeping ? { read: { dir, stamp: stamp.text, ...counted } } : {};
  if (!seemsFull(false, counted.ipv4) && !seemsFull(true, counted.ipv6)) {
    return { ...counted, ...read };
  }
  // Full, unless some are left of ranges that the config does not have any more.
  const inside = countStore(readStore(dir)?.filter((name) => isInside(name, ranges)));
  return inside && { ...inside, ...read };
}

/** How long a store must have been left alone before its count is kept, in ms. */
const storeSettleMs = 100;

/** What changes when a file is made in a folder or removed; undefined where there is no folder. */
function stampOf(dir: string): { text: string; atMs: number } | undefined {
  const found = statSync(dir, { bigint: true, throwIfNoEntry: false });
  if (!found) return undefined;
  return { text: `${found.ino} ${found.mtimeNs}`, atMs: Number(found.mtimeNs / 1_000_000n) };
}

function findStore(
  { database }: Reader,
  dir: string,
  stamp: string,
): { ipv4: number; ipv6: number } | undefined {
  const row = database
    .query("SELECT ipv4, ipv6 FROM stores WHERE dir = ? AND stamp = ?")
    .get(dir, stamp) as { ipv4: number; ipv6: number } | null;
  return row ?? undefined;
}

/** Keeps a count, so that the folder is not read again before it changes. In a transaction. */
export function keepStore({ database }: Reader, { dir, stamp, ipv4, ipv6 }: StoreCount): void {
  database.query("INSERT OR REPLACE INTO stores VALUES (?, ?, ?, ?)").run(dir, stamp, ipv4, ipv6);
}

/** Files are named by their address; "lock" and "last_reserved_ip.0" are not. */
function countStore(names: string[] | undefined): { ipv4: number; ipv6: number } | undefined {
  if (!names) return undefined;
  let ipv4 = 0;
  let ipv6 = 0;
  for (const name of names) {
    const char = name.charCodeAt(0);
    if (name.includes(":")) ipv6++;
    else if (char >= 0x30 && char <= 0x39 && name.includes(".")) ipv4++;
  }
  return { ipv4, ipv6 };
}

/** The files of a store; none of one that is not there yet, undefined of one that is unreadable. */
function readStore(dir: string): string[] | undefined {
  try {
    return readdirSync(dir);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    if (reason === undefined) throw error;
    return reason === "ENOENT" ? [] : undefined;
  }
}

function isInside(text: string, ranges: Range[]): boolean {
  const address = toNumber(text);
  if (address === undefined) return false;
  const is6 = text.includes(":");
  return ranges.some(
    (range) => range.is6 === is6 && range.lowest <= address && address <= range.highest,
  );
}
