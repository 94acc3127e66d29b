/**
 * IP addresses and subnets as numbers. Pure. `node:net` would take more than 1 ms to load.
 */

/** 4 or 6 for an IP address as text, 0 for anything else. Zones (`fe80::1%eth0`) are none. */
export function isIP(text: string): 0 | 4 | 6 {
  if (/^(\d{1,3}\.){3}\d{1,3}$/.test(text)) {
    const isByte = (part: string) => Number(part) <= 255 && String(Number(part)) === part;
    return text.split(".").every(isByte) ? 4 : 0;
  }
  if (!text.includes(":") || !/^[0-9a-f:.]+$/i.test(text)) return 0;
  return URL.canParse(`http://[${text}]/`) ? 6 : 0;
}

/** An IP address as a number; undefined for anything else. */
export function toNumber(text: unknown): bigint | undefined {
  if (typeof text !== "string") return undefined;
  const version = isIP(text);
  if (version === 4) return text.split(".").reduce((sum, part) => sum * 256n + BigInt(part), 0n);
  if (version !== 6) return undefined;
  // The URL writes IPv6 in its canonical form: hexadecimal groups, one "::" at most.
  const [head = "", tail] = new URL(`http://[${text}]/`).hostname.slice(1, -1).split("::");
  const groups = (part: string) => (part === "" ? [] : part.split(":"));
  const before = groups(head);
  const after = tail === undefined ? [] : groups(tail);
  const zeros = Array<string>(8 - before.length - after.length).fill("0");
  const all = [...before, ...zeros, ...after];
  return all.reduce((sum, group) => sum * 65536n + BigInt(`0x${group}`), 0n);
}

/** A subnet: its lowest address, its size, and its family. */
export interface Subnet {
  family: 4 | 6;
  prefix: number;
  base: bigint;
  size: bigint;
}

/** A subnet from `address/prefix`; undefined when the text is none. */
export function parseSubnet(text: string): Subnet | undefined {
  const [, address = "", digits = ""] = /^([^/]+)\/(\d{1,3})$/.exec(text) ?? [];
  const family = isIP(address);
  const number = toNumber(address);
  const prefix = Number(digits);
  const width = family === 4 ? 32 : 128;
  if (family === 0 || number === undefined || prefix > width) return undefined;
  const size = 2n ** BigInt(width - prefix);
  return { family, prefix, base: number - (number % size), size };
}

/** True when every address of `inner` is in `outer`. */
export function contains(outer: string, inner: string): boolean {
  const [a, b] = [parseSubnet(outer), parseSubnet(inner)];
  if (!a || !b || a.family !== b.family) return false;
  return b.base >= a.base && b.base + b.size <= a.base + a.size;
}

/** An IP address from its number; IPv6 in lower case, with "::" for the longest run of zeros. */
export function formatIP(family: 4 | 6, number: bigint): string {
  const width = family === 4 ? 8n : 16n;
  const parts = Array.from({ length: family === 4 ? 4 : 8 }, (_, i) =>
    BigInt.asUintN(Number(width), number >> (width * BigInt((family === 4 ? 3 : 7) - i))),
  );
  if (family === 4) return parts.join(".");
  const groups = parts.map((part) => part.toString(16)).join(":");
  return new URL(`http://[${groups}]/`).hostname.slice(1, -1);
}

/** A subnet as `address/prefix`. */
export function formatSubnet({ family, prefix, base }: Subnet): string {
  return `${formatIP(family, base)}/${prefix}`;
}

const mappedBase = 0xffffn << 32n;

/**
 * The IPv4 subnet behind one of IPv4-mapped addresses (`::ffff:10.0.0.0/104`); any other as it is,
 * but undefined where only some of its addresses are mapped ones.
 */
export function unmapped(subnet: Subnet): Subnet | undefined {
  const { family, prefix, base, size } = subnet;
  const isInside = base >= mappedBase && base < mappedBase + 2n ** 32n;
  if (family === 4 || !(isInside || (base > 0n && base + size > mappedBase && base < mappedBase))) {
    return subnet;
  }
  if (prefix < 96) return undefined;
  return { family: 4, prefix: prefix - 96, base: base - mappedBase, size };
}

/** An IP address in canonical form, an IPv4-mapped one as IPv4; undefined for anything else. */
export function canonicalIP(text: unknown): string | undefined {
  const number = toNumber(text);
  if (number === undefined || typeof text !== "string") return undefined;
  if (isIP(text) === 4) return text;
  const isMapped = number >> 32n === 0xffffn;
  return isMapped ? formatIP(4, number - mappedBase) : formatIP(6, number);
}
