/**
 * Addresses of a network: how many its IPAM config offers, and how many host-local's store holds.
 * A store is read again when it has changed.
 */
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import type { State } from "../database.ts";
import { parseSubnet, toNumber } from "../ip.ts";
import { isObject } from "../json.ts";
import type { NetworkConfigList } from "../networks.ts";

/** The record, to read from. */
export type Reader = Pick<State, "database">;

/** Where host-local keeps its reservations when the config names no `dataDir`. */
const hostLocalDir = "/var/lib/cni/networks";

/** Addresses by family. */
interface Count {
  ipv4: number;
  ipv6: number;
}

/** How many addresses a folder of host-local held, and in which state of the folder. */
export interface StoreCount extends Count {
  dir: string;
  /** State of the folder; "" when it had only just changed. */
  stamp: string;
  atMs: number;
}

/** A range of addresses that an IPAM gives out. */
export interface Range {
  is6: boolean;
  subnet: string;
  /** How many it can give out. */
  size: number;
  /** First and last of them. */
  lowest: bigint;
  highest: bigint;
}

/** The ranges of host-local and whereabouts configs, less what whereabouts is to `exclude`. */
export function rangesOf(list: NetworkConfigList): Range[] {
  return list.plugins.flatMap(({ ipam }) => {
    if (!isObject(ipam)) return [];
    const sets = Array.isArray(ipam["ranges"]) ? ipam["ranges"].flat() : [];
    const whereabouts = Array.isArray(ipam["ipRanges"]) ? ipam["ipRanges"] : [];
    return [ipam, ...sets, ...whereabouts].flatMap((range) => readRange(range));
  });
}

/** How many addresses ranges of one family can give out; undefined when there is none. */
export function sizeOf(ranges: Range[], is6: boolean): number | undefined {
  const own = ranges.filter((range) => range.is6 === is6);
  return own.length === 0 ? undefined : own.reduce((sum, { size }) => sum + size, 0);
}

function readRange(range: unknown): Range[] {
  if (!isObject(range)) return [];
  // whereabouts calls its subnet `range`, as "10.1.0.5-10.1.0.9/16" too.
  const text = range["subnet"] ?? range["range"];
  const [, first, last, network, digits] =
    /^(?:([^/-]+)-([^/-]+)|([^/-]+))\/(\d{1,3})$/.exec(typeof text === "string" ? text : "") ?? [];
  const subnet = `${network ?? first}/${digits}`;
  const parsed = parseSubnet(subnet);
  if (!parsed) return [];
  const { base, size: whole } = parsed;
  const is6 = parsed.family === 6;
  // Without bounds: neither the network's own address, nor IPv4's broadcast, nor the gateway.
  const lowest = toNumber(range["rangeStart"] ?? range["range_start"] ?? first) ?? base + 1n;
  const highest =
    toNumber(range["rangeEnd"] ?? range["range_end"] ?? last) ?? base + whole - (is6 ? 1n : 2n);
  const gateway = toNumber(range["gateway"]) ?? base + 1n;
  const hasGateway = gateway >= lowest && gateway <= highest;
  const size = Number(highest - lowest) + 1 - (hasGateway ? 1 : 0) - countExcluded(range, is6);
  return size > 0 ? [{ is6, subnet, size, lowest, highest }] : [];
}

/** Addresses that a range of whereabouts leaves out: single ones, and whole subnets. */
function countExcluded(range: Record<string, unknown>, is6: boolean): number {
  const all = Array.isArray(range["exclude"]) ? range["exclude"] : [];
  return all.reduce<number>((sum, text) => {
    if (typeof text !== "string") return sum;
    const subnet = parseSubnet(text.includes("/") ? text : `${text}/${is6 ? 128 : 32}`);
    return subnet && (subnet.family === 6) === is6 ? sum + Number(subnet.size) : sum;
  }, 0);
}

/**
 * Counts the reservations in host-local's store. `read` is set when the folder had to be read, for
 * {@link keepStore}.
 * @returns undefined for another IPAM, and for a store that cannot be read
 */
export function usedAddresses(
  state: Reader | undefined,
  list: NetworkConfigList,
  ranges: Range[],
  nowMs: number,
): (Count & { read?: StoreCount }) | undefined {
  const ipam = list.plugins.map((plugin) => plugin["ipam"]).find(isObject);
  if (ipam?.["type"] !== "host-local" || ranges.length === 0) return undefined;
  const base = typeof ipam["dataDir"] === "string" ? ipam["dataDir"] : hostLocalDir;
  const dir = join(base, list.name);
  const folder = statSync(dir, { bigint: true, throwIfNoEntry: false });
  // Changes when a file of the folder is made or removed.
  const stamp = folder && `${folder.ino} ${folder.mtimeNs}`;
  const known = state && stamp ? findStore(state, dir, stamp, nowMs) : undefined;
  const counted = known ?? countStore(dir);
  if (!counted) return undefined;
  // A folder that has just changed may change again within the same tick of its clock.
  const isSettled = Math.abs(nowMs - Number(folder?.mtimeMs)) > storeSettleMs;
  const kept = { dir, stamp: stamp && isSettled ? stamp : "", atMs: nowMs, ...counted };
  const read = stamp && !known ? { read: kept } : {};
  const [size4 = Infinity, size6 = Infinity] = [sizeOf(ranges, false), sizeOf(ranges, true)];
  if (counted.ipv4 < size4 && counted.ipv6 < size6) return { ...counted, ...read };
  // Full, unless some are leftovers of ranges that the config no longer has.
  const inside = countStore(dir, ranges);
  return inside && { ...inside, ...read };
}

/** Age from which a change of the folder is settled, so that its stamp can be trusted, in ms. */
const storeSettleMs = 100;
/**
 * How long a count is used even if the store has changed, in ms: to read thousands of addresses
 * for each of many pods that start at once costs too much.
 */
export const storeBelievedMs = 1000;

function findStore({ database }: Reader, dir: string, stamp: string, nowMs: number) {
  const query = database.query(
    `SELECT ipv4, ipv6 FROM stores
     WHERE dir = ? AND (stamp = ? OR abs(? - at_ms) < ${storeBelievedMs})`,
  );
  return (query.get(dir, stamp, nowMs) as Count | null) ?? undefined;
}

/** Stores a count, so that the folder is not read again before it changes. In a transaction. */
export function keepStore({ database }: Reader, one: StoreCount): void {
  const insert = database.query("INSERT OR REPLACE INTO stores VALUES (?, ?, ?, ?, ?)");
  insert.run(one.dir, one.stamp, one.atMs, one.ipv4, one.ipv6);
}

/**
 * Counts the addresses of a store, or those of them in some ranges. Its files are named by their
 * address, but for "lock" and "last_reserved_ip.0". A store that is not there yet is empty.
 * @returns undefined when it is unreadable
 */
function countStore(dir: string, ranges?: Range[]): Count | undefined {
  const count = { ipv4: 0, ipv6: 0 };
  try {
    for (const name of readdirSync(dir)) {
      if (ranges && !isInside(name, ranges)) continue;
      const char = name.charCodeAt(0);
      if (name.includes(":")) count.ipv6++;
      else if (char >= 0x30 && char <= 0x39 && name.includes(".")) count.ipv4++;
    }
    return count;
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    if (reason === undefined) throw error;
    return reason === "ENOENT" ? count : undefined;
  }
}

function isInside(text: string, ranges: Range[]): boolean {
  const address = toNumber(text);
  if (address === undefined) return false;
  const own = ranges.filter(({ is6 }) => is6 === text.includes(":"));
  return own.some(({ lowest, highest }) => lowest <= address && address <= highest);
}
