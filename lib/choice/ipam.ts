/**
 * Addresses of a network, as its IPAM's config and host-local's store tell: how many there are, and
 * how many are taken. A store is read anew when it has changed.
 */
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import type { State } from "../database.ts";
import { isIP, toNumber } from "../ip.ts";
import { isObject } from "../json.ts";
import type { NetworkConfigList } from "../netconf.ts";

/** Reads nothing but a database. */
type Reader = Pick<State, "database">;

/** Where host-local keeps its reservations when the config names no `dataDir`. */
const hostLocalDir = "/var/lib/cni/networks";

/** How many addresses a folder of host-local held, and at which state of it. */
export interface StoreCount {
  dir: string;
  /** Empty where the folder had only just changed. */
  stamp: string;
  atMs: number;
  ipv4: number;
  ipv6: number;
}

/** A range of addresses that an IPAM gives out. */
export interface Range {
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
  const base = toNumber(address);
  if (base === undefined) return [];
  const is6 = address.includes(":");
  const width = is6 ? 128 : 32;
  const prefix = Number(digits);
  if (prefix > width) return [];
  const subnet = `${address}/${digits}`;
  const from = toNumber(range["rangeStart"] ?? range["range_start"] ?? first);
  const to = toNumber(range["rangeEnd"] ?? range["range_end"] ?? last);
  const whole = 2n ** BigInt(width - prefix);
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
export function usedAddresses(
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
  const known = state && stamp && findStore(state, dir, stamp.text, nowMs);
  const counted = known ?? countStore(readStore(dir));
  if (!counted) return undefined;
  const seemsFull = (is6: boolean, count: number): boolean => {
    const own = ranges.filter((range) => range.is6 === is6);
    return own.length > 0 && count >= own.reduce((sum, { size }) => sum + size, 0);
  };
  // A folder that has just changed may change again without being newer by its clock.
  const isSettled = stamp !== undefined && Math.abs(nowMs - stamp.atMs) > storeSettleMs;
  const kept = { dir, stamp: isSettled ? stamp.text : "", atMs: nowMs, ...counted };
  const read = stamp && !known ? { read: kept } : {};
  if (!seemsFull(false, counted.ipv4) && !seemsFull(true, counted.ipv6)) {
    return { ...counted, ...read };
  }
  // Full, unless some are left of ranges that the config does not have any more.
  const inside = countStore(readStore(dir)?.filter((name) => isInside(name, ranges)));
  return inside && { ...inside, ...read };
}

/** How long a store must have been left alone for its stamp to mean anything, in ms. */
const storeSettleMs = 100;
/**
 * How long a count is believed whatever became of the store, in ms: reading one with thousands of
 * addresses for each pod of a herd would cost more than it tells.
 */
export const storeBelievedMs = 1000;

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
  nowMs: number,
): { ipv4: number; ipv6: number } | undefined {
  const row = database
    .query(
      `SELECT ipv4, ipv6 FROM stores
       WHERE dir = ? AND (stamp = ? OR abs(? - at_ms) < ${storeBelievedMs})`,
    )
    .get(dir, stamp, nowMs) as { ipv4: number; ipv6: number } | null;
  return row ?? undefined;
}

/** Keeps a count, so that the folder is not read again before it changes. In a transaction. */
export function keepStore({ database }: Reader, one: StoreCount): void {
  database
    .query("INSERT OR REPLACE INTO stores VALUES (?, ?, ?, ?, ?)")
    .run(one.dir, one.stamp, one.atMs, one.ipv4, one.ipv6);
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
