/**
 * Completes the result of one attachment, and merges those of all attachments of a pod. Pure:
 * nothing here changes what it is given. Source: CNI SPEC 1.1 §5 "ADD Success"; NPWG v1.3 §7.
 */
import type { Dns, Interface, Ip, Result, Route } from "./record.ts";
import { family, isInMainTable, isPodSide, pointAt } from "./result.ts";

/** The result of one attachment, with what identifies its interface in the pod. */
export interface AttachmentResult {
  ifName: string;
  /** Path of the pod's network namespace; "" when there is none. */
  netns: string;
  result: Result;
}

/**
 * Completes the result of one attachment: it then has an interface `ifName` in a sandbox, and every
 * address points at an interface. Many plugins leave that out: Weave and Romana speak 0.2.0 and
 * have no interfaces, Calico lists none or only the host's end. Idempotent.
 *
 * - An interface `ifName` without a sandbox counts as the pod's; one in another sandbox stays as it
 *   is (a VM's, or the same namespace by another path). Without `netns` none is added.
 * - Addresses without a valid index get the pod's interface; so do all of them when the plugin
 *   listed nothing in a sandbox, because it then lists only addresses of the pod.
 */
export function normalizeResult(
  result: Result,
  { ifName, netns }: Omit<AttachmentResult, "result">,
): Result {
  const interfaces = [...result.interfaces];
  const listsPod = interfaces.some(isPodSide);
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
 * Merges the results of a pod's attachments, primary first; each is completed first.
 *
 * - Interfaces and addresses are concatenated, every index adjusted.
 * - A host interface that several attachments list (a bridge: equal name and mac) appears once.
 *   One named like an interface of the pod is dropped, because containerd tells interfaces apart by
 *   name only; its addresses go to the pod interface of that attachment.
 * - Duplicate routes and DNS entries are dropped. A route without `gw` of a further attachment gets
 *   the gateway of its own network, which a reader of the whole could not tell (§5 `routes`).
 */
export function mergeResults(attachments: AttachmentResult[]): Result {
  const parts = attachments.map((part) => ({ ...part, ...normalizeResult(part.result, part) }));
  const podNames = new Set<string>();
  for (const part of parts) {
    for (const item of part.interfaces) if (isPodSide(item)) podNames.add(item.name);
  }
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
  const ips: Ip[] = [];
  const routes = new Map<string, Route>();
  for (const [i, part] of parts.entries()) {
    const indexes = part.interfaces.map(place);
    const pod = indexes[podIndex(part.interfaces, part.ifName, part.netns) ?? -1];
    for (const ip of part.ips) {
      const index = ip.interface === undefined ? undefined : (indexes[ip.interface] ?? pod);
      ips.push(pointAt(ip, index, interfaces));
    }
    for (const route of i === 0 ? part.routes : routesWithGateway(part)) {
      const key = routeKey(route);
      if (!routes.has(key)) routes.set(key, route);
    }
  }
  return { interfaces, ips, routes: [...routes.values()], dns: mergeDns(parts) };
}

/** Gives routes without `gw` the first gateway of their family, as plugins do. */
function routesWithGateway({ ips, routes }: Result): Route[] {
  const gateways = ips.flatMap(({ gateway }) => gateway ?? []);
  return routes.map((route) => {
    const gw = gateways.find((gateway) => family(gateway) === family(route.dst));
    const isDirect = route.gw !== undefined || (route.scope ?? 0) !== 0;
    return isDirect || gw === undefined ? route : { ...route, gw };
  });
}

/** The same for routes that the kernel takes for one. */
function routeKey(route: Route): string {
  const { dst, gw, priority, scope } = route;
  return JSON.stringify([dst, gw, priority, scope, isInMainTable(route) || route.table]);
}

function mergeDns(parts: Result[]): Dns {
  const merged: Dns = {};
  for (const key of ["nameservers", "domain", "search", "options"] as const) {
    const values = new Set<string>();
    for (const { dns } of parts) {
      const own = dns[key] ?? [];
      for (const value of typeof own === "string" ? [own] : own) values.add(value);
    }
    const [first] = values;
    if (first === undefined) continue;
    if (key === "domain") merged.domain = first;
    else merged[key] = [...values];
  }
  return merged;
}
