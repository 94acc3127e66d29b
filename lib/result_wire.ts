/**
 * Reads results of ADD as they come on the wire, of every CNI version, into the one internal form.
 * Pure: no I/O. Source: CNI SPEC 1.1 §5 "ADD Success"; the older shapes are those of libcni's
 * pkg/types.
 *
 * What libcni reads without complaint is read here too, because plugins in the field rely on it:
 * null lists, empty gateways, unknown keys (dropped). What it would lose silently is kept (a
 * result whose shape is not that of its version) or refused (an address that is none).
 */
import {
  CniError,
  type CniVersion,
  code,
  compareVersions,
  isSupported,
  supportedVersions,
} from "./cni.ts";
import { isObject } from "./json.ts";
import {
  compact,
  type Dns,
  family,
  type Interface,
  type Ip,
  pointAt,
  type Result,
  type Route,
} from "./result.ts";
import { oneLine } from "./text.ts";

/** Largest value of the numbers in a result: all are 32 bits wide in the kernel. */
const uint32Max = 0xffff_ffff;
/** Longest part of a hostile value that an error message quotes, in characters. */
const quoteLengthMax = 80;

/** What is wrong in a value, and where; told by {@link parseResult}. */
class Unfit extends Error {
  readonly path: string;
  readonly value: unknown;
  readonly expected: string;
  constructor(path: string, value: unknown, expected: string) {
    super(expected);
    this.path = path;
    this.value = value;
    this.expected = expected;
  }
}

/** An object of the value, and the path to it. */
interface Part {
  value: Record<string, unknown>;
  path: string;
}

// Read by hand, not by a schema: one took 1 ms of the 7 that an ADD has. Absent, null and "" are
// the same, as in Go.

function unfit({ value, path }: Part, key: string, expected: string): Unfit {
  return new Unfit(path === "" ? key : `${path}.${key}`, value[key], expected);
}

function readPart(value: unknown, path: string): Part {
  if (!isObject(value)) throw new Unfit(path, value, "an object");
  return { value, path };
}

function readText(part: Part, key: string, expected = "a string"): string | undefined {
  const text = part.value[key] ?? "";
  if (typeof text !== "string") throw unfit(part, key, expected);
  return text === "" ? undefined : text;
}

function readCount(part: Part, key: string): number | undefined {
  const count = part.value[key] ?? undefined;
  if (count === undefined || isUint32(count)) return count;
  throw unfit(part, key, `an integer from 0 to ${uint32Max}`);
}

/** A count for which 0 means "not set", as it does in libcni. */
function readSize(part: Part, key: string): number | undefined {
  return readCount(part, key) || undefined;
}

function readIndex(part: Part, key: string): number | undefined {
  const index = part.value[key] ?? undefined;
  if (index === undefined || (typeof index === "number" && Number.isInteger(index))) return index;
  throw unfit(part, key, "an index");
}

function readCidr(part: Part, key: string): string {
  const expected = "an IP with prefix length";
  const address = canonicalCidr(readText(part, key, expected) ?? "");
  if (address === undefined) throw unfit(part, key, expected);
  return address;
}

function readAddress(part: Part, key: string): string | undefined {
  const text = readText(part, key, "an IP");
  const address = text === undefined ? undefined : canonicalAddress(text);
  if (text !== undefined && address === undefined) throw unfit(part, key, "an IP");
  return address;
}

function readList<T>(part: Part, key: string, read: (item: Part) => T): T[] {
  const items = part.value[key] ?? [];
  if (!Array.isArray(items)) throw unfit(part, key, "a list");
  const path = part.path === "" ? key : `${part.path}.${key}`;
  return items.map((item, i) => read(readPart(item, `${path}.${i}`)));
}

function readTexts(part: Part, key: string): string[] | undefined {
  const items = part.value[key] ?? [];
  if (!Array.isArray(items)) throw unfit(part, key, "a list");
  const path = part.path === "" ? key : `${part.path}.${key}`;
  const list = { value: items as unknown as Part["value"], path };
  const texts = items.flatMap((_, i) => readText(list, String(i)) ?? []);
  return texts.length > 0 ? texts : undefined;
}

function readInterface(part: Part): Interface {
  const name = readText(part, "name", "a name");
  if (name === undefined) throw unfit(part, "name", "a name");
  return compact({
    name,
    mac: readText(part, "mac"),
    mtu: readSize(part, "mtu"),
    sandbox: readText(part, "sandbox"),
    socketPath: readText(part, "socketPath"),
    pciID: readText(part, "pciID"),
  });
}

function readIp(part: Part): Ip {
  return compact({
    address: readCidr(part, "address"),
    gateway: readAddress(part, "gateway"),
    interface: readIndex(part, "interface"),
  });
}

function readRoute(part: Part): Route {
  return compact({
    dst: readCidr(part, "dst"),
    gw: readAddress(part, "gw"),
    mtu: readSize(part, "mtu"),
    advmss: readSize(part, "advmss"),
    priority: readSize(part, "priority"),
    table: readCount(part, "table"),
    scope: readCount(part, "scope"),
  });
}

function readDns(part: Part): Dns {
  return compact({
    nameservers: readTexts(part, "nameservers"),
    domain: readText(part, "domain"),
    search: readTexts(part, "search"),
    options: readTexts(part, "options"),
  });
}

/** The one address of a family, in the shape of 0.1.0 and 0.2.0, with its routes. */
function readOldIp(whole: Part, key: string): { ip: Ip; routes: Route[] } | undefined {
  if ((whole.value[key] ?? undefined) === undefined) return undefined;
  const part = readPart(whole.value[key], key);
  const address = readCidr(part, "ip");
  const ip = compact({ address, gateway: readAddress(part, "gateway") });
  return { ip, routes: readList(part, "routes", readRoute) };
}

function isUint32(value: unknown): value is number {
  return typeof value === "number" && Number.isInteger(value) && value >= 0 && value <= uint32Max;
}

/**
 * Reads the result of a delegate, a `prevResult` or a stored row.
 *
 * Addresses in `ip4`/`ip6` (0.1.0, 0.2.0) or in `ips` (0.3.0 and up) are found by these keys; the
 * version decides only when both are there. `ips[].version` is not read, the address knows. An
 * index outside of `interfaces` is dropped.
 *
 * @param value parsed JSON, hostile
 * @param listVersion version the plugin was called with, used when the value names none
 * @param what names the value in the error, e.g. `result of plugin "bridge"`
 * @throws CniError 104 for a version we do not speak, a wrong type, an address that is none, or
 *   a missing `name`, `address`, `dst` or `ip`
 * @see CNI SPEC 1.1 §5 "ADD Success"
 */
export function parseResult(value: unknown, listVersion: CniVersion, what = "result"): Result {
  try {
    return readResult(readPart(value, ""), listVersion);
  } catch (error) {
    if (!(error instanceof Unfit)) throw error;
    return refuse(what, error);
  }
}

function readResult(whole: Part, listVersion: CniVersion): Result {
  const version = readText(whole, "cniVersion") ?? listVersion;
  const interfaces = readList(whole, "interfaces", readInterface);
  const ips = readList(whole, "ips", readIp);
  const routes = readList(whole, "routes", readRoute);
  const dns = readDns(readPart(whole.value["dns"] ?? {}, "dns"));
  const ip4 = readOldIp(whole, "ip4");
  const ip6 = readOldIp(whole, "ip6");
  if (!isSupported(version)) {
    throw unfit(whole, "cniVersion", `one of ${supportedVersions.join(", ")}`);
  }
  const old = [ip4, ip6].filter((item) => item !== undefined);
  if (old.length === 0 || (ips.length > 0 && compareVersions(version, "0.3.0") >= 0)) {
    return { interfaces, ips: ips.map((ip) => pointAt(ip, ip.interface, interfaces)), routes, dns };
  }
  const oldRoutes = old.flatMap((item) => item.routes);
  return { interfaces, ips: old.map(({ ip }) => ip), routes: oldRoutes, dns };
}

function refuse(what: string, { path, value, expected }: Unfit): never {
  const place = path === "" ? what : `${path} in ${what}`;
  const isMissing = value === undefined || value === "";
  const found = isMissing ? "nothing" : oneLine(JSON.stringify(value), quoteLengthMax);
  const msg = `Invalid ${place}: got ${found}, expected ${expected}`;
  throw new CniError(code.delegateProtocol, msg);
}

const ipv4 = /^(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!$)|$)){4}$/;

/** The address as libcni would print it, or undefined when it is none. */
function canonicalAddress(text: string): string | undefined {
  if (ipv4.test(text)) return text;
  // The URL parser knows every spelling of IPv6, and its shortest.
  if (!/^[0-9a-f:.]{2,45}$/i.test(text) || !text.includes(":")) return undefined;
  return URL.parse(`http://[${text}]`)?.hostname.slice(1, -1);
}

function canonicalCidr(text: string): string | undefined {
  const [, host = "", length = ""] = /^([^/]+)\/(\d{1,3})$/.exec(text) ?? [];
  const address = canonicalAddress(host);
  const bits = Number(length);
  if (address === undefined || bits > (family(address) === 4 ? 32 : 128)) return undefined;
  return `${address}/${bits}`;
}
