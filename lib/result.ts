/**
 * Results of ADD: types, conversion between CNI versions, completing and merging.
 * One internal form, CNI 1.1.0 without `cniVersion`; other versions exist only in `parseResult`
 * and `toVersion`. Pure: no I/O. Nothing here mutates what it is given.
 * Source: CNI SPEC 1.1 §5 "ADD Success"; the older shapes are those of libcni's pkg/types.
 *
 * What libcni reads without complaint is read here too, because plugins in the field rely on it:
 * null lists, empty gateways, unknown keys (dropped). What it would lose silently is kept (a
 * result whose shape is not that of its version) or refused (an address that is none).
 */
import * as v from "valibot";
import {
  CniError,
  type CniVersion,
  code,
  compareVersions,
  isSupported,
  supportedVersions,
} from "./cni.ts";
import { isObject } from "./json.ts";
import { oneLine } from "./text.ts";

/** A network interface an attachment made, in the pod or on the host. */
export interface Interface {
  name: string;
  mac?: string;
  mtu?: number;
  /** Network namespace it is in; absent for one on the host. */
  sandbox?: string;
  socketPath?: string;
  pciID?: string;
}

/** An IP address that an attachment assigned. */
export interface Ip {
  /** Canonical text with prefix length, e.g. `10.1.0.5/16`. */
  address: string;
  gateway?: string;
  /** Index into {@link Result.interfaces}; never outside of it. */
  interface?: number;
}

/** A route that an attachment made. */
export interface Route {
  /** Canonical text with prefix length. */
  dst: string;
  gw?: string;
  mtu?: number;
  advmss?: number;
  /** Lower is preferred. */
  priority?: number;
  /** Routing table; absent means main. */
  table?: number;
  /** 0 global, 253 link, 254 host. */
  scope?: number;
}

/** Resolver settings a network knows of; no list is ever empty. */
export interface Dns {
  nameservers?: string[];
  domain?: string;
  search?: string[];
  options?: string[];
}

/** What an ADD achieved, in the one internal form. */
export interface Result {
  interfaces: Interface[];
  ips: Ip[];
  routes: Route[];
  dns: Dns;
}

/** The result of one attachment, with what identifies its interface in the pod. */
export interface AttachmentResult {
  ifName: string;
  /** Path of the pod's network namespace; "" when there is none. */
  netns: string;
  result: Result;
}

/** Largest value of the numbers in a result: all are 32 bits wide in the kernel. */
const uint32Max = 0xffff_ffff;
/** Longest part of a hostile value that an error message quotes, in characters. */
const quoteLengthMax = 80;

// The message of a schema says what it expects. Absent, null and "" are the same, as in Go.
const Count = v.nullish(v.custom<number>(isUint32, `an integer from 0 to ${uint32Max}`));
/** A count for which 0 means "not set", as it does in libcni. */
const Size = v.pipe(Count, v.transform(orAbsent));
const Index = v.nullish(v.pipe(v.number("an index"), v.integer("an index")));
const Text = v.pipe(v.nullish(v.string("a string"), ""), v.transform(orAbsent));
const TextList = v.pipe(
  v.nullish(v.array(Text, "a list"), []),
  v.transform((texts) => texts.filter((text) => text !== undefined)),
  v.transform((texts) => (texts.length > 0 ? texts : undefined)),
);
const Name = v.pipe(v.nullish(v.string("a name"), ""), v.nonEmpty("a name"));
const Cidr = converted("an IP with prefix length", canonicalCidr);
const Address = v.pipe(
  converted("an IP", (text) => (text === "" ? "" : canonicalAddress(text))),
  v.transform(orAbsent),
);
const links = { name: Name, mac: Text, mtu: Size, sandbox: Text, socketPath: Text, pciID: Text };
const metrics = { mtu: Size, advmss: Size, priority: Size, table: Count, scope: Count };
const RouteList = list({ dst: Cidr, gw: Address, ...metrics });
const Ip4 = v.nullish(object({ ip: Cidr, gateway: Address, routes: RouteList }));
const dnsKeys = { nameservers: TextList, domain: Text, search: TextList, options: TextList };

/** All that a result may hold, of any version. */
const WireResult = object({
  cniVersion: Text,
  interfaces: list(links),
  ips: list({ address: Cidr, gateway: Address, interface: Index }),
  routes: RouteList,
  dns: v.nullish(object(dnsKeys), {}),
  ip4: Ip4,
  ip6: Ip4,
});

function isUint32(value: unknown): boolean {
  return typeof value === "number" && Number.isInteger(value) && value >= 0 && value <= uint32Max;
}

function orAbsent<T>(value: T): T | undefined {
  return value || undefined;
}

function object<const T extends v.ObjectEntries>(entries: T) {
  // A number that `parseJson` keeps as text is an object too.
  const isPlain = (value: unknown) => isObject(value) && !json.isRawJSON(value);
  return v.pipe(v.custom<object>(isPlain, "an object"), v.object(entries), v.transform(compact));
}

function list<const T extends v.ObjectEntries>(entries: T) {
  return v.nullish(v.array(object(entries), "a list"), []);
}

function converted(expected: string, convert: (text: string) => string | undefined) {
  return v.pipe(
    v.nullish(v.string(expected), ""),
    v.rawTransform(({ dataset, addIssue, NEVER }) => {
      const text = convert(dataset.value);
      if (text === undefined) addIssue({ message: expected });
      return text ?? NEVER;
    }),
  );
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
  const parsed = v.safeParse(WireResult, value, { abortEarly: true });
  if (!parsed.success) {
    const [issue] = parsed.issues;
    return refuse(what, v.getDotPath(issue), issue.input, issue.message);
  }
  const { interfaces, ips, routes, dns, ip4, ip6 } = parsed.output;
  const version = parsed.output.cniVersion ?? listVersion;
  if (!isSupported(version)) {
    return refuse(what, "cniVersion", version, `one of ${supportedVersions.join(", ")}`);
  }
  const old = [ip4, ip6].filter((item) => item !== undefined);
  if (old.length === 0 || (ips.length > 0 && compareVersions(version, "0.3.0") >= 0)) {
    return { interfaces, ips: ips.map((ip) => pointAt(ip, ip.interface, interfaces)), routes, dns };
  }
  const oldIps = old.map(({ routes: _, ip: address, ...gateway }) => ({ address, ...gateway }));
  return { interfaces, ips: oldIps, routes: old.flatMap((item) => item.routes), dns };
}

function refuse(what: string, path: string | null, value: unknown, expected: string): never {
  const place = path === null ? what : `${path} in ${what}`;
  const isMissing = value === undefined || value === "";
  const found = isMissing ? "nothing" : oneLine(JSON.stringify(value), quoteLengthMax);
  const msg = `Invalid ${place}: got ${found}, expected ${expected}`;
  throw new CniError(code.delegateProtocol, msg);
}

/** Not in TypeScript's library yet. */
const json = JSON as unknown as { isRawJSON(value: unknown): boolean };
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

type Absent<T> = { [K in keyof T]-?: T[K] & (null | undefined) extends never ? never : K }[keyof T];
type Compact<T> = Omit<T, Absent<T>> & { [K in Absent<T>]?: NonNullable<T[K]> };

/** A copy without the keys that are undefined or null. */
function compact<T extends object>(value: T): Compact<T> {
  const entries = Object.entries(value).filter(([, item]) => item !== undefined && item !== null);
  return Object.fromEntries(entries) as Compact<T>;
}

/** The address pointing at `index`, or at nothing when that is outside of `interfaces`. */
function pointAt(ip: Ip, index: number | undefined, interfaces: Interface[]): Ip {
  const { interface: _, ...rest } = ip;
  return index !== undefined && interfaces[index] ? { ...rest, interface: index } : rest;
}

/**
 * The result as it goes on the wire in `version`, `cniVersion` included. What a version cannot say
 * is left out: before 1.1.0 interface `mtu`, `socketPath`, `pciID` and every route key but `dst`
 * and `gw`; before 0.3.0 the interfaces and all but one address per family (see `toIp4Shape`).
 * `interfaces`, `ips` and `routes` are always lists; `dns` is left out when empty, as in libcni.
 */
export function toVersion(result: Result, version: CniVersion): Record<string, unknown> {
  const dns = Object.keys(result.dns).length > 0 ? { dns: result.dns } : {};
  if (compareVersions(version, "0.3.0") < 0) {
    return { cniVersion: version, ...toIp4Shape(result), ...dns };
  }
  const namesFamily = compareVersions(version, "1.0.0") < 0;
  const { interfaces, routes } = result;
  const ips = result.ips.map((ip) => ({
    ...(namesFamily && { version: String(family(ip.address)) }),
    ...pointAt(ip, ip.interface, interfaces),
  }));
  if (version === "1.1.0") return { cniVersion: version, interfaces, ips, routes, ...dns };
  const links = interfaces.map(({ name, mac, sandbox }) => compact({ name, mac, sandbox }));
  return { cniVersion: version, interfaces: links, ips, routes: routes.map(plainRoute), ...dns };
}

/**
 * The shape of 0.1.0 and 0.2.0: of each family the first address of the pod, else the first there
 * is, with the routes of the family. libcni refuses a result without addresses; here it is just
 * empty, because a network may have none.
 */
function toIp4Shape({ interfaces, ips, routes }: Result): Record<string, unknown> {
  const isOfPod = ({ interface: index = -1 }: Ip) => isPodSide(interfaces[index]);
  const ofFamily = (wanted: 4 | 6) => {
    const candidates = ips.filter(({ address }) => family(address) === wanted);
    const ip = candidates.find(isOfPod) ?? candidates[0];
    const own = routes.filter(({ dst }) => family(dst) === wanted).map(plainRoute);
    const { address, gateway } = ip ?? {};
    return ip && compact({ ip: address, gateway, routes: own.length > 0 ? own : undefined });
  };
  return compact({ ip4: ofFamily(4), ip6: ofFamily(6) });
}

function plainRoute({ dst, gw }: Route): object {
  return compact({ dst, gw });
}

/** True for an interface in a sandbox, and for none at all: that is assumed to be the pod's. */
function isPodSide(item: Interface | undefined): boolean {
  return item === undefined || (item.sandbox ?? "") !== "";
}

/**
 * Completes the result of one attachment: an interface `ifName` in a sandbox exists, and every
 * address points at an interface. Many plugins leave that out: Weave and Romana speak 0.2.0 and
 * have no interfaces, Calico lists none or only the host's end. Idempotent.
 *
 * - An interface of that name without a sandbox is taken for the pod's; one with another sandbox
 *   than `netns` is left as it is (a VM's, or the same namespace by another path).
 * - Addresses without a valid index get the pod's interface. So do all of them when the plugin
 *   listed nothing in a sandbox: it then knows of no address but the pod's.
 * - Without `netns` no interface is made up.
 */
export function normalizeResult(
  result: Result,
  { ifName, netns }: Pick<AttachmentResult, "ifName" | "netns">,
): Result {
  const listsPod = result.interfaces.some(isPodSide);
  const interfaces = [...result.interfaces];
  let pod = podIndex(interfaces, ifName, netns);
  if (netns !== "") {
    pod ??= interfaces.length;
    const found = interfaces[pod] ?? { name: ifName };
    interfaces[pod] = isPodSide(found) ? found : { ...found, sandbox: netns };
  }
  const ips = result.ips.map((ip) => {
    const index = pointAt(ip, ip.interface, result.interfaces).interface;
    return pointAt(ip, listsPod ? (index ?? pod) : (pod ?? index), interfaces);
  });
  return { ...result, interfaces, ips };
}

/** Index of the interface `ifName` in the pod: in `netns`, else in any sandbox, else anywhere. */
function podIndex(interfaces: Interface[], ifName: string, netns: string): number | undefined {
  const named = interfaces.filter(({ name }) => name === ifName);
  const found = named.find(({ sandbox }) => sandbox === netns) ?? named.find(isPodSide) ?? named[0];
  return found && interfaces.indexOf(found);
}

/**
 * Merges the results of a pod's attachments, each completed by `normalizeResult`.
 *
 * - Interfaces and addresses are concatenated, every index re-pointed to the same interface.
 * - A host interface that several attachments list (a bridge: equal name and mac) appears once.
 *   One named like an interface of the pod is dropped and its addresses go to that attachment's
 *   pod interface: containerd tells interfaces apart by name only.
 * - Routes and DNS are de-duplicated, earlier ones win. After the first attachment a route without
 *   `gw` gets its own network's gateway, which a reader could no longer tell (§5 `routes`).
 *
 * @param attachments in the order they were asked for, primary first
 */
export function mergeResults(attachments: AttachmentResult[]): Result {
  const parts = attachments.map((part) => ({ ...part, ...normalizeResult(part.result, part) }));
  const inPod = parts.flatMap((part) => part.interfaces.filter(isPodSide));
  const podNames = new Set(inPod.map(({ name }) => name));
  const interfaces: Interface[] = [];
  const hostIndexes = new Map<string, number>();
  const place = (item: Interface): number | undefined => {
    if (isPodSide(item)) return interfaces.push(item) - 1;
    if (podNames.has(item.name)) return undefined;
    const { name, mac = "", socketPath, pciID } = item;
    const key = JSON.stringify([name, mac.toLowerCase(), socketPath, pciID]);
    const index = hostIndexes.get(key) ?? interfaces.push(item) - 1;
    hostIndexes.set(key, index);
    return index;
  };
  const ips = parts.flatMap((part) => {
    const indexes = part.interfaces.map(place);
    const pod = indexes[podIndex(part.interfaces, part.ifName, part.netns) ?? -1];
    return part.ips.map((ip) => {
      const index = ip.interface === undefined ? undefined : (indexes[ip.interface] ?? pod);
      return pointAt(ip, index, interfaces);
    });
  });
  const routes = parts.flatMap((part, i) => (i === 0 ? part.routes : routesWithGateway(part)));
  return { interfaces, ips, routes: uniqueRoutes(routes), dns: mergeDns(parts) };
}

/** Plugins give a route without `gw` the first gateway of its family, as done here. */
function routesWithGateway({ ips, routes }: Result): Route[] {
  const gateways = ips.flatMap(({ gateway }) => gateway ?? []);
  return routes.map((route) => {
    const gw = gateways.find((gateway) => family(gateway) === family(route.dst));
    const isDirect = route.gw !== undefined || (route.scope ?? 0) !== 0;
    return isDirect || gw === undefined ? route : { ...route, gw };
  });
}

function uniqueRoutes(routes: Route[]): Route[] {
  const unique = new Map<string, Route>();
  for (const route of routes) {
    const { dst, gw, priority, scope } = route;
    const key = JSON.stringify([dst, gw, priority, scope, isInMainTable(route) || route.table]);
    if (!unique.has(key)) unique.set(key, route);
  }
  return [...unique.values()];
}

function mergeDns(parts: Result[]): Dns {
  const joined = (key: "nameservers" | "search" | "options") => {
    const values = new Set(parts.flatMap(({ dns }) => dns[key] ?? []));
    return values.size > 0 && { [key]: [...values] };
  };
  const domain = parts.find(({ dns }) => dns.domain)?.dns.domain;
  const own = domain !== undefined && { domain };
  return { ...joined("nameservers"), ...own, ...joined("search"), ...joined("options") };
}

/** Tables 0 (unspecified) and 254 are what a route without `table` goes to. */
function isInMainTable({ table = 0 }: Route): boolean {
  return table === 0 || table === 254;
}

/** True for a route to everywhere in the main table; those of policy routing do not count. */
export function isDefaultRoute(route: Route): boolean {
  return route.dst.endsWith("/0") && isInMainTable(route);
}

/** IP version of an address, with or without prefix length, that was validated before. */
export function family(address: string): 4 | 6 {
  return address.includes(":") ? 6 : 4;
}

/** The result without the default routes of `families`; all else as it was. */
export function withoutDefaultRoutes(result: Result, families: ReadonlySet<4 | 6>): Result {
  const isKept = (route: Route) => !isDefaultRoute(route) || !families.has(family(route.dst));
  return { ...result, routes: result.routes.filter(isKept) };
}
