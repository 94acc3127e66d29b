/**
 * Results of ADD: reading and writing them in any CNI version. The internal form is 1.1.0
 * without `cniVersion`. Pure: nothing here changes what it is given.
 * Source: CNI SPEC 1.1 §5 "ADD Success"; libcni's pkg/types for older shapes, and for what plugins
 * rely on: null lists, empty gateways and unknown keys pass. What libcni would silently lose is
 * kept (a result whose shape is not that of its version) or refused (an invalid address).
 */
import {
  CniError,
  type CniVersion,
  code,
  compareVersions,
  isSupported,
  oneLine,
  supportedVersions,
} from "./cni.ts";
import { isObject } from "./json.ts";
import type { Dns, Interface, Ip, Result, Route } from "./record.ts";

/** The address pointing at interface `index`, or at none when there is no such interface. */
export function pointAt(ip: Ip, index: number | undefined, interfaces: Interface[]): Ip {
  const { interface: _, ...rest } = ip;
  return index !== undefined && interfaces[index] ? { ...rest, interface: index } : rest;
}

/** A copy of the value with the keys that are named and set. */
function pick<T extends object>(value: T, ...keys: (keyof T)[]): Partial<T> {
  const copy: Partial<T> = {};
  for (const key of keys) if (value[key] !== undefined) copy[key] = value[key];
  return copy;
}

/**
 * The result as it goes on the wire in `version`, `cniVersion` included. What a version cannot say
 * is left out: before 1.1.0 interface `mtu`, `socketPath`, `pciID` and every route key but `dst`
 * and `gw`; before 1.0.0 a gateway of the other family; before 0.3.0 the interfaces and all but one
 * address per family. `interfaces`, `ips` and `routes` are always lists; empty `dns` is left out.
 */
export function toVersion(result: Result, version: CniVersion): Record<string, unknown> {
  const dns = Object.keys(result.dns).length > 0 ? { dns: result.dns } : {};
  if (compareVersions(version, "0.3.0") < 0) {
    return { cniVersion: version, ...toIp4Shape(result), ...dns };
  }
  const { interfaces, routes } = result;
  const ips = result.ips.map((ip) => pointAt(ip, ip.interface, interfaces));
  if (version === "1.1.0") return { cniVersion: version, interfaces, ips, routes, ...dns };
  const namesFamily = compareVersions(version, "1.0.0") < 0;
  const withFamily = (ip: Ip) => ({ version: `${family(ip.address)}`, ...withOwnGateway(ip) });
  return {
    cniVersion: version,
    interfaces: interfaces.map((item) => pick(item, "name", "mac", "sandbox")),
    ips: namesFamily ? ips.map(withFamily) : ips,
    routes: routes.map((route) => pick(route, "dst", "gw")),
    ...dns,
  };
}

/**
 * The shape of 0.1.0 and 0.2.0: for each family the first address of the pod, else the first of
 * all, with the routes of the family. A result without addresses, which libcni refuses, is empty.
 */
function toIp4Shape({ interfaces, ips, routes }: Result): Record<string, unknown> {
  const shape: Record<string, unknown> = {};
  for (const wanted of [4, 6] as const) {
    const candidates = ips.filter(({ address }) => family(address) === wanted);
    const ofPod = candidates.find(({ interface: i = -1 }) => isPodSide(interfaces[i]));
    const ip = ofPod ?? candidates[0];
    if (!ip) continue;
    const { address, gateway } = withOwnGateway(ip);
    const ofFamily = routes.filter(({ dst }) => family(dst) === wanted);
    const own = ofFamily.map((route) => pick(route, "dst", "gw"));
    const more = { ...(gateway && { gateway }), ...(own.length > 0 && { routes: own }) };
    shape[`ip${wanted}`] = { ip: address, ...more };
  }
  return shape;
}

/** Before 1.0.0 a gateway must be of its address's family ("valid for the given `version`"). */
function withOwnGateway({ gateway, ...ip }: Ip): Ip {
  return gateway && family(gateway) === family(ip.address) ? { ...ip, gateway } : ip;
}

/** True for an interface in a sandbox; also for undefined, which is taken for the pod's. */
export function isPodSide(item: Interface | undefined): boolean {
  return item === undefined || (item.sandbox ?? "") !== "";
}

/** True for a route in the main table (254), where routes without a table or with 0 go too. */
export function isInMainTable({ table = 0 }: Route): boolean {
  return table === 0 || table === 254;
}

/** IP version of a valid address, with or without prefix length. */
export function family(address: string): 4 | 6 {
  return address.includes(":") ? 6 : 4;
}

/** An object within the value that is read, its path (e.g. `ips.0`), and the name of the value. */
interface Part {
  value: Record<string, unknown>;
  path: string;
  what: string;
}

/** Parses a value (undefined if it is null, as in Go): undefined if not set, null if wrong. */
type Parse<T> = (value: unknown, part: Part, key: string) => T | undefined | null;
/** How one kind of value is read. A schema library would take 1 ms of an ADD's 7. */
type Kind<T> = [expected: string, parse: Parse<T>];
/** The kind of each key of an object, in the order they are read. */
type Fields<T> = { [K in keyof T]-?: Kind<NonNullable<T[K]>> };

function readValue<T>(part: Part, key: string, [expected, parse]: Kind<T>): T | undefined {
  const found = parse(part.value[key] ?? undefined, part, key);
  if (found === null) throw unfit(part, key, expected);
  return found;
}

function unfit(part: Part, key: string, expected: string): CniError {
  const path = pathTo(part, key);
  const place = path === "" ? part.what : `${path} in ${part.what}`;
  const { [key]: value = "" } = part.value;
  const got = value === "" ? "nothing" : oneLine(JSON.stringify(value), 80);
  return new CniError(code.delegateProtocol, `Invalid ${place}: got ${got}, expected ${expected}`);
}

const pathTo = ({ path }: Part, key: string) => (path === "" ? key : `${path}.${key}`);

function optional<T>([expected, parse]: Kind<T>): Kind<T> {
  return [expected, (v, part, key) => (v === undefined ? undefined : parse(v, part, key))];
}

/** A list of one kind of value; an empty one is not set. */
function listOf<T>(kind: Kind<T>): Kind<T[]> {
  const parse: Parse<T[]> = (items = [], part, key) => {
    if (!Array.isArray(items)) return null;
    const list = { value: { ...items }, path: pathTo(part, key), what: part.what };
    const found: T[] = [];
    for (const i of items.keys()) {
      const item = readValue(list, String(i), kind);
      if (item !== undefined) found.push(item);
    }
    return found.length > 0 ? found : undefined;
  };
  return ["a list", parse];
}

function objectOf<T extends object>(fields: Fields<T>): Kind<T> {
  const parse: Parse<T> = (value, part, key) => {
    if (!isObject(value)) return null;
    const object = { value, path: pathTo(part, key), what: part.what };
    const read: Partial<T> = {};
    for (const name in fields) {
      const found = readValue(object, name, fields[name]);
      if (found !== undefined) read[name] = found;
    }
    return read as T;
  };
  return ["an object", parse];
}

const isText = (value: unknown) => typeof value === "string";
const isInteger = (value: unknown): value is number => Number.isInteger(value);
const text: Kind<string> = ["a string", (v = "") => (isText(v) ? v || undefined : null)];
const name: Kind<string> = ["a name", (v) => (isText(v) && v !== "" ? v : null)];
const address: Kind<string> = ["an IP", (v = "") => (v === "" ? undefined : canonicalAddress(v))];
const cidr: Kind<string> = ["an IP with prefix length", canonicalCidr];
const index = optional<number>(["an index", (v) => (isInteger(v) ? v : null)]);
/** All numbers in a result but indexes are 32 bits wide in the kernel. */
const count = optional<number>([
  `an integer from 0 to ${0xffff_ffff}`,
  (v) => (isInteger(v) && v >= 0 && v <= 0xffff_ffff ? v : null),
]);
/** A count for which 0 means "not set", as in libcni. */
const size: Kind<number> = [count[0], (v, ...at) => (v === 0 ? undefined : count[1](v, ...at))];
const texts = listOf(text);
const link = objectOf<Interface>({
  name,
  mac: text,
  mtu: size,
  sandbox: text,
  socketPath: text,
  pciID: text,
});
const route = objectOf<Route>({
  dst: cidr,
  gw: address,
  mtu: size,
  advmss: size,
  priority: size,
  table: count,
  scope: count,
});
/** The address of one family, as in 0.1.0 and 0.2.0. */
type OldIp = { ip: string; gateway?: string; routes?: Route[] };
const oldIp = optional(objectOf<OldIp>({ ip: cidr, gateway: address, routes: listOf(route) }));
const wire = objectOf<Partial<Result> & { cniVersion?: string; ip4?: OldIp; ip6?: OldIp }>({
  cniVersion: text,
  interfaces: listOf(link),
  ips: listOf(objectOf<Ip>({ address: cidr, gateway: address, interface: index })),
  routes: listOf(route),
  dns: optional(objectOf<Dns>({ nameservers: texts, domain: text, search: texts, options: texts })),
  ip4: oldIp,
  ip6: oldIp,
});

/**
 * Reads the result of a delegate, a `prevResult` or a stored row. Addresses are found in
 * `ip4`/`ip6` (0.1.0, 0.2.0) or `ips` (0.3.0 and up); the version decides only when there are both.
 * `ips[].version` is not read, the address tells it. An index out of range is dropped.
 *
 * @param input parsed JSON, hostile
 * @param listVersion version the plugin was called with, used when the value names none
 * @param what names the value in the error, e.g. `result of plugin "bridge"`
 * @throws CniError 104 for a version we do not speak, a wrong type, an invalid address, or a
 *   missing `name`, `address`, `dst` or `ip`
 */
export function parseResult(input: unknown, listVersion: CniVersion, what = "result"): Result {
  const whole = { value: { "": input }, path: "", what };
  const read = readValue(whole, "", wire) ?? {};
  const { cniVersion = listVersion, interfaces = [], ips = [], routes = [], dns = {} } = read;
  if (!isSupported(cniVersion)) {
    const expected = `one of ${supportedVersions.join(", ")}`;
    throw unfit({ ...whole, value: { cniVersion } }, "cniVersion", expected);
  }
  const old: OldIp[] = [];
  for (const item of [read.ip4, read.ip6]) if (item) old.push(item);
  if (old.length === 0 || (ips.length > 0 && compareVersions(cniVersion, "0.3.0") >= 0)) {
    return { interfaces, ips: ips.map((ip) => pointAt(ip, ip.interface, interfaces)), routes, dns };
  }
  const oldIps = old.map(({ ip, gateway }) => ({ address: ip, ...(gateway && { gateway }) }));
  return { interfaces, ips: oldIps, routes: old.flatMap((one) => one.routes ?? []), dns };
}

const ipv4 = /^(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)(?:\.(?!$)|$)){4}$/;

/** The address as libcni would print it, or null when it is none. */
function canonicalAddress(input: unknown): string | null {
  if (!isText(input)) return null;
  if (ipv4.test(input)) return input;
  // The URL parser knows every spelling of IPv6, and its shortest.
  if (!/^[0-9a-f:.]{2,45}$/i.test(input) || !input.includes(":")) return null;
  return URL.parse(`http://[${input}]`)?.hostname.slice(1, -1) ?? null;
}

function canonicalCidr(input: unknown): string | null {
  const [, host, length] = (isText(input) && /^([^/]+)\/(\d{1,3})$/.exec(input)) || [];
  const found = canonicalAddress(host);
  const bits = Number(length);
  return found === null || bits > (family(found) === 4 ? 32 : 128) ? null : `${found}/${bits}`;
}
