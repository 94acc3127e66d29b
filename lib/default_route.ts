/**
 * Makes one attachment with the default route kept by its owner (design D8): the first attachment
 * that brings one, per address family, unless one was told to take it (`default-route`, NPWG v1.3
 * §4.1.2.1.9). What the record and the merged result say is what the kernel has.
 */
import { type CniError, type Host, toCniError } from "./cni.ts";
import { type Added, addChain, type ChainOptions, delChain, undoOptions } from "./delegate.ts";
import { mayAddDefaultRoute } from "./netconf.ts";
import { family, type Result, withoutDefaultRoutes } from "./result.ts";
import {
  defaultRouteFamilies,
  type Family,
  type ParkedRoutes,
  parkDefaultRoutes,
  parkedFamilies,
  restoreDefaultRoutes,
  takeDefaultRoutes,
} from "./routes.ts";
import type { Attachment } from "./state.ts";

/** An attachment that was made. */
export interface Done {
  attachment: Attachment;
  result: Result;
}

/** How one attachment ended; `took` names the families whose default route is its own now. */
export type Attached =
  | { kind: "attached"; result: Result; took: ReadonlySet<Family> }
  | { kind: "failed"; error: CniError; undo: CniError[] };

const nothing: ReadonlySet<Family> = new Set();

/**
 * Makes one attachment. Nothing of it is left when it failed, but for what `undo` tells.
 * @param before the attachments made before it, whose default route stays theirs
 */
export async function attachOne(
  host: Host,
  attachment: Attachment,
  chain: ChainOptions,
  before: readonly Done[],
): Promise<Attached> {
  if (attachment.device && attachment.deviceInfoFile !== undefined) {
    const { copyDeviceInfo } = await import("./kubernetes/device_info.ts");
    copyDeviceInfo(host, attachment.deviceInfoFile, attachment.device);
  }
  const claimed = before.flatMap(({ result }) => defaultRouteFamilies(result));
  const isOwned =
    claimed.length > 0 || before.some((one) => mayAddDefaultRoute(one.attachment.list));
  const isGuarded = isOwned && mayAddDefaultRoute(attachment.list);
  if (!isGuarded && attachment.defaultRoute === undefined) {
    const added = await addChain(host, attachment, chain);
    return added.kind === "failed" ? added : { ...added, took: nothing };
  }
  let parked: ParkedRoutes;
  try {
    parked = await parkDefaultRoutes(host, chain.netns, claimed);
  } catch (error) {
    return { kind: "failed", error: toCniError(error), undo: [] };
  }
  const added = await addChain(host, attachment, chain);
  try {
    return await settle(host, attachment, added, parked, claimed);
  } catch (error) {
    if (added.kind === "failed") return added;
    const undo = await delChain(host, attachment, added.result, undoOptions(host, chain));
    return { kind: "failed", error: toCniError(error), undo };
  }
}

/** Gives the default routes back to their owner, or to this attachment where it was told so. */
async function settle(
  host: Host,
  attachment: Attachment,
  added: Added,
  parked: ParkedRoutes,
  claimed: Family[],
): Promise<Attached> {
  if (added.kind === "failed") {
    await restoreDefaultRoutes(host, parked);
    return added;
  }
  const { defaultRoute: gateways } = attachment;
  const took = new Set(
    gateways === undefined
      ? []
      : gateways.length > 0
        ? gateways.map((gateway) => family(gateway))
        : defaultRouteFamilies(added.result),
  );
  const others = parked.routes.filter((route) => !took.has(route.family));
  await restoreDefaultRoutes(host, { ...parked, routes: others });
  if (took.size > 0) {
    await takeDefaultRoutes(host, parked.netns, attachment.ifName, [...took], gateways ?? []);
  }
  const owned = new Set([...claimed, ...parkedFamilies(parked)].filter((one) => !took.has(one)));
  const kept = withoutDefaultRoutes(added.result, owned);
  return { kind: "attached", result: withGateways(kept, gateways ?? []), took };
}

/** The result with these gateways as its default routes; without any it keeps its own. */
function withGateways(result: Result, gateways: string[]): Result {
  if (gateways.length === 0) return result;
  const own = withoutDefaultRoutes(result, new Set(gateways.map((gateway) => family(gateway))));
  const routes = gateways.map((gw) => ({ dst: family(gw) === 4 ? "0.0.0.0/0" : "::/0", gw }));
  return { ...own, routes: [...own.routes, ...routes] };
}

/**
 * Gives the default routes of an attachment that is gone to the first of the others that would have
 * brought one: while both were there it was without (design D8).
 *
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
      const gateways = heir.result.ips.flatMap(({ gateway }) => gateway ?? []);
      const gateway = gateways.find((one) => family(one) === lost);
      if (gateway === undefined) continue;
      await takeDefaultRoutes(host, netns, heir.attachment.ifName, [lost], [gateway]);
      heir.result = withGateways(heir.result, [gateway]);
      break;
    }
  }
}

/**
 * Brings the host-side interfaces of all results up to date, in place: a bridge takes another
 * address when a port joins it, so what an earlier attachment reported is not what the kernel has
 * any more, and CHECK would compare with it.
 *
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
 * Which attachments run side by side: none (CNI SPEC §3, NPWG §7.3), unless the table says so.
 * The first always runs alone, and one that may bring a default route too.
 */
export function attachGroups(planned: Attachment[], parallel: boolean): Attachment[][] {
  if (!parallel) return planned.map((attachment) => [attachment]);
  const alone = planned.filter(
    ({ list, defaultRoute }, i) => i === 0 || defaultRoute || mayAddDefaultRoute(list),
  );
  const free = planned.filter((attachment) => !alone.includes(attachment));
  return [...alone.map((one) => [one]), ...(free.length > 0 ? [free] : [])];
}
