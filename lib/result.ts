/**
 * Results of ADD: types, conversion between CNI versions, completing and merging.
 * One internal form, CNI 1.1.0 without `cniVersion`; other versions exist only in `result_wire.ts`,
 * which reads them, and in `toVersion`. Pure: no I/O. Nothing here mutates what it is given.
 * Source: CNI SPEC 1.1 §5 "ADD Success"; the older shapes are those of libcni's pkg/types.
 */
import { type CniVersion, compareVersions } from "./cni.ts";

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

type Absent<T> = { [K in keyof T]-?: T[K] & (null | undefined) extends never ? never : K }[keyof T];
type Compact<T> = Omit<T, Absent<T>> & { [K in Absent<T>]?: NonNullable<T[K]> };

/** A copy without the keys that are undefined or null. */
export function compact<T extends object>(value: T): Compact<T> {
  const copy: Partial<T> = {};
  for (const key in value)
    if (value[key] !== undefined && value[key] !== null) copy[key] = value[key];
  return copy as Compact<T>;
}

/** The address pointing at `index`, or at nothing when that is outside of `interfaces`. */
export function pointAt(ip: Ip, index: number | undefined, interfaces: Interface[]): Ip {
  const { interface: _, ...rest } = ip;
  return index !== undefined && interfaces[index] ? { ...rest, interface: index } : rest;
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
  const namesFamily = compareVersions(version, "1.0.0") < 0;
  const { interfaces, routes } = result;
  const pointed = result.ips.map((ip) => pointAt(ip, ip.interface, interfaces));
  const withFamily = (ip: Ip) => ({ version: `${family(ip.address)}`, ...withOwnGateway(ip) });
  const ips = namesFamily ? pointed.map(withFamily) : pointed;
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
    const { address, gateway } = withOwnGateway(ip ?? { address: "" });
    return ip && compact({ ip: address, gateway, routes: own.length > 0 ? own : undefined });
  };
  return compact({ ip4: ofFamily(4), ip6: ofFamily(6) });
}

/** Before 1.0.0 a gateway is of the family of its address: "valid for the given `version`". */
function withOwnGateway({ gateway, ...ip }: Ip): Ip {
  return gateway && family(gateway) === family(ip.address) ? { ...ip, gateway } : ip;
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
  const same = Map.groupBy(routes, (route) => {
    const { dst, gw, priority, scope } = route;
    return JSON.stringify([dst, gw, priority, scope, isInMainTable(route) || route.table]);
  });
  return [...same.values()].flatMap(([first]) => first ?? []);
}

function mergeDns(parts: Result[]): Dns {
  const joined = (key: "nameservers" | "search" | "options") => {
    const values = new Set(parts.flatMap(({ dns }) => dns[key] ?? []));
    return values.size > 0 && { [key]: [...values] };
  };
  const domain = compact({ domain: parts.find(({ dns }) => dns.domain)?.dns.domain });
  return { ...joined("nameservers"), ...domain, ...joined("search"), ...joined("options") };
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
