/**
 * One owner of the default route per address family (design D8): the first attachment that brings
 * one, unless `default-route` gives it to another (NPWG v1.3 §4.1.2.1.9). If a later attachment
 * adds its own, the kernel refuses it ("file exists") or keeps two. So the owner's route is moved
 * to a high metric while such an attachment is made, the new one is removed, and the owner's is put
 * back: connectivity is never lost, and the record and the merged result say what the kernel has.
 *
 * Works through `ip` (iproute2) inside the pod's network namespace. Loaded when a pod has several
 * networks, or one that is to take the default route.
 */
import { addChain } from "./attach.ts";
import type { Added, Chain, Done, Host } from "./call.ts";
import { toCniError } from "./cni.ts";
import { isObject } from "./json.ts";
import type { NetworkConfigList } from "./networks.ts";
import type { Attachment, Result, Route } from "./record.ts";
import { delChain, undoChain } from "./recorded.ts";
import type { ParkedRoutes } from "./recovery/moved_routes.ts";
import { family, isInMainTable } from "./result.ts";

/** How one attachment ended; `took` has the families whose default route is its own now. */
export type Attached = Added & { took?: ReadonlySet<Family> };

/**
 * Makes one attachment. When it fails nothing of it is left but for the errors in `undo`.
 * @param before the attachments made before it, which keep their default route
 */
export async function attachOne(
  chain: Chain,
  attachment: Attachment,
  before: readonly Done[],
): Promise<Attached> {
  const added = await attachGuarded(chain, attachment, before);
  if (added.kind === "attached" || before.length === 0) return added;
  return (await import("./recovery/plugin_keys.ts")).lookAtFirst(chain, attachment, before, added);
}

async function attachGuarded(
  chain: Chain,
  attachment: Attachment,
  before: readonly Done[],
): Promise<Attached> {
  const { host } = chain;
  if (attachment.device && attachment.deviceInfoFile !== undefined) {
    const { copyDeviceInfo } = await import("./kubernetes/devices.ts");
    copyDeviceInfo(host, attachment.deviceInfoFile, attachment.device);
  }
  const claimed = before.flatMap(({ result }) => defaultRouteFamilies(result));
  const isOwned =
    claimed.length > 0 || before.some((one) => mayAddDefaultRoute(one.attachment.list));
  const isGuarded = isOwned && mayAddDefaultRoute(attachment.list);
  if (!isGuarded && attachment.defaultRoute === undefined) return addChain(chain, attachment);
  const { parkDefaultRoutes, restoreDefaultRoutes } = await import("./recovery/moved_routes.ts");
  let parked: ParkedRoutes;
  try {
    parked = await parkDefaultRoutes(host, chain.netns, claimed);
  } catch (error) {
    return { kind: "failed", error: toCniError(error), undo: [] };
  }
  const added = await addChain(chain, attachment);
  try {
    if (added.kind === "failed") {
      await restoreDefaultRoutes(host, parked);
      return added;
    }
    const done = { attachment, result: added.result };
    (await import("./recovery/left_out.ts")).addLeftOut(chain.netns, [...before, done]);
    return await giveBack(host, done, parked);
  } catch (error) {
    if (added.kind === "failed") return added;
    const undo = await delChain(undoChain(chain), attachment, added);
    return { kind: "failed", error: toCniError(error), undo };
  }
}

/** Gives the default routes back to their owner, or to this attachment where it is to take them. */
async function giveBack(
  host: Host,
  { attachment: { defaultRoute, ifName }, result }: Done,
  parked: ParkedRoutes,
): Promise<Attached> {
  const { parkedFamilies, restoreDefaultRoutes, takeDefaultRoutes } = await import(
    "./recovery/moved_routes.ts"
  );
  const gateways = defaultRoute ?? [];
  const isOwn = defaultRoute?.length === 0;
  const took = new Set(isOwn ? defaultRouteFamilies(result) : gateways.map(family));
  const others = parked.routes.filter((route) => !took.has(route.family));
  await restoreDefaultRoutes(host, { ...parked, routes: others });
  if (took.size > 0) {
    await takeDefaultRoutes(host, parked.netns, { ifName, taken: [...took], gateways });
  }
  const owners = [...parked.claimed, ...parkedFamilies(parked)];
  const kept = withoutDefaultRoutes(result, new Set(owners.filter((one) => !took.has(one))));
  return { kind: "attached", result: withGateways(kept, gateways), took };
}

/** The result with these gateways as its default routes; without any it keeps its own. */
function withGateways(result: Result, gateways: string[]): Result {
  if (gateways.length === 0) return result;
  const own = withoutDefaultRoutes(result, new Set(gateways.map(family)));
  const routes = gateways.map((gw) => ({ dst: family(gw) === 4 ? "0.0.0.0/0" : "::/0", gw }));
  return { ...own, routes: [...own.routes, ...routes] };
}

/**
 * Gives the default routes of an attachment that is gone to the first of the others that would have
 * brought one (design D8).
 * @param done what is left, the primary first; changed in place
 * @throws CniError 104 when `ip` fails
 */
export async function inheritDefaultRoutes(
  host: Host,
  netns: string,
  gone: Result,
  done: readonly Done[],
): Promise<void> {
  const owned = new Set(done.flatMap(({ result }) => defaultRouteFamilies(result)));
  for (const lost of defaultRouteFamilies(gone).filter((one) => !owned.has(one))) {
    for (const heir of done) {
      if (!mayAddDefaultRoute(heir.attachment.list)) continue;
      const { gateway } =
        heir.result.ips.find((ip) => ip.gateway !== undefined && family(ip.gateway) === lost) ?? {};
      if (gateway === undefined) continue;
      const { takeDefaultRoutes } = await import("./recovery/moved_routes.ts");
      const { ifName } = heir.attachment;
      await takeDefaultRoutes(host, netns, { ifName, taken: [lost], gateways: [gateway] });
      heir.result = withGateways(heir.result, [gateway]);
      break;
    }
  }
}

/** Removes from the results, in place, the default routes that another attachment has taken. */
export function giveUpDefaultRoutes(done: Done[], took: ReadonlySet<Family> | undefined): void {
  if (!took) return;
  for (const other of done) other.result = withoutDefaultRoutes(other.result, took);
}

/**
 * Brings the host-side interfaces of all results up to date, in place: a bridge takes another
 * hardware address when a port joins it, and CHECK would compare with the old one.
 * @param done in the order in which they were made
 */
export function refreshHostInterfaces(done: Done[]): void {
  const macs = new Map<string, string>();
  for (const { result } of done) {
    for (const { name, mac, sandbox } of result.interfaces) {
      if (!sandbox && mac !== undefined) macs.set(name, mac);
    }
  }
  for (const one of done) {
    const interfaces = one.result.interfaces.map((each) => {
      const mac = each.sandbox ? undefined : macs.get(each.name);
      return mac === undefined ? each : { ...each, mac };
    });
    one.result = { ...one.result, interfaces };
  }
}

/**
 * The attachments in groups that are made at the same time: one by one (CNI SPEC §3, NPWG §7.3),
 * unless the table says so. The first is always alone, and any that may bring a default route.
 */
export function attachGroups(planned: Attachment[], parallel: boolean): Attachment[][] {
  if (!parallel) return planned.map((attachment) => [attachment]);
  const isAlone = ({ list, defaultRoute }: Attachment, index: number) =>
    index === 0 || defaultRoute !== undefined || mayAddDefaultRoute(list);
  const free = planned.filter((attachment, index) => !isAlone(attachment, index));
  const groups = planned.filter(isAlone).map((attachment) => [attachment]);
  return free.length > 0 ? [...groups, free] : groups;
}

/** Interface and IPAM plugins whose default route comes from their config alone. */
const routeFromConfig = new Set(["bridge", "ptp", "macvlan", "ipvlan", "vlan", "host-device"]);
const ipamFromConfig = new Set(["host-local", "static"]);
/** Chained plugins that never add a default route. */
const routeNever = new Set(["portmap", "firewall", "tuning", "bandwidth", "sbr", "loopback"]);

/**
 * May an attachment by this list put a default route into the pod? False only when the configs of
 * all its plugins show that they bring none; true costs no more than reading the kernel's routes.
 */
export function mayAddDefaultRoute(list: NetworkConfigList): boolean {
  return list.plugins.some((plugin) => {
    if (routeNever.has(plugin.type)) return false;
    if (!routeFromConfig.has(plugin.type)) return true;
    if (plugin["isDefaultGateway"] === true) return true;
    const ipam = plugin["ipam"];
    if (!isObject(ipam) || Object.keys(ipam).length === 0) return false;
    if (typeof ipam["type"] !== "string" || !ipamFromConfig.has(ipam["type"])) return true;
    const routes: unknown[] = Array.isArray(ipam["routes"]) ? ipam["routes"] : [];
    const targets = routes.map((route) => (isObject(route) ? route["dst"] : undefined));
    return targets.some((dst) => typeof dst === "string" && dst.endsWith("/0"));
  });
}

/** Address family of a route. */
export type Family = 4 | 6;
/** Both. */
export const families: readonly Family[] = [4, 6];

/** Which address families a result brings a default route for. */
export function defaultRouteFamilies(result: Result): Family[] {
  const found = new Set(result.routes.filter(isDefaultRoute).map(({ dst }) => family(dst)));
  return families.filter((one) => found.has(one));
}

/** True for a default route in the main table; other tables are for policy routing. */
export function isDefaultRoute(route: Route): boolean {
  return route.dst.endsWith("/0") && isInMainTable(route);
}

/** The result without the default routes of `families`. */
export function withoutDefaultRoutes(result: Result, families: ReadonlySet<4 | 6>): Result {
  const isKept = (route: Route) => !isDefaultRoute(route) || !families.has(family(route.dst));
  return { ...result, routes: result.routes.filter(isKept) };
}
