/**
 * IP addresses and subnets as numbers. Pure. Not `node:net`: loading that costs every call of genie
 * more than a millisecond, which is a tenth of what it may take.
 */

/** 4 or 6 for an IP address as text, 0 for anything else. Zones (`fe80::1%eth0`) are none. */
export function isIP(text: string): 0 | 4 | 6 {
  if (/^(\d{1,3}\.){3}\d{1,3}$/.test(text)) {
    return text.split(".").every((part) => Number(part) <= 255 && String(Number(part)) === part)
      ? 4
      : 0;
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
  const zeros = Array.from({ length: 8 - before.length - after.length }, () => "0");
  return [...before, ...zeros, ...after].reduce(
    (sum, group) => sum * 65536n + BigInt(`0x${group}`),
    0n,
  );
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
