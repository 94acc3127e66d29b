/**
 * What plugins leave out of their results though the kernel has it: the default routes of Weave,
 * Calico and Romana, and hardware addresses. Only of the pod's own interface, and not of the
 * reference plugins, whose results are complete. Known where genie looks into the namespace anyway:
 * beside another default route, in a pod that runs, and in CHECK.
 */
import type { Done, Host } from "../call.ts";
import { exactTypes, type KernelNetwork, readNetwork } from "../check.ts";
import { log, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import type { Attachment, Result, Route, StoredAttachment } from "../record.ts";
import { attachments, storedResult } from "../recorded.ts";
import { family, isInMainTable, isPodSide, toVersion } from "../result.ts";
import { setAttached } from "../write_ahead.ts";

/** Completes results, in place, by what the kernel has in this namespace now. */
export function addLeftOut(netns: string, done: readonly Done[]): void {
  const kernel = readNetwork(netns);
  if (!kernel) return;
  for (const one of done) one.result = withLeftOut(one.attachment, one.result, kernel);
}

/**
 * The result with the default routes that lead through its interface, one per family; its gateways
 * at the addresses, for the time when another attachment has the default route; and the mac.
 */
export function withLeftOut(
  { ifName, list }: Pick<Attachment, "ifName" | "list">,
  result: Result,
  kernel: KernelNetwork,
): Result {
  const link = kernel.links.find(({ name }) => name === ifName);
  if (!link || exactTypes.has(list.plugins[0]?.type ?? "")) return result;
  const isDefault = ({ dst }: { dst: string }) => dst.endsWith("/0");
  const named = result.routes.filter((route) => isDefault(route) && isInMainTable(route));
  const families = new Set(named.map(({ dst }) => family(dst)));
  const found = new Map<4 | 6, Route>();
  for (const route of kernel.routes) {
    const { dst, index, gateways } = route;
    if (index !== link.index || !isDefault(route) || families.has(family(dst))) continue;
    families.add(family(dst));
    const [gw] = gateways;
    found.set(family(dst), { dst, ...(gw !== undefined && { gw }) });
  }
  const ips = result.ips.map((ip) => {
    const gateway = ip.gateway ?? found.get(family(ip.address))?.gw;
    return gateway === undefined ? ip : { ...ip, gateway };
  });
  const interfaces = result.interfaces.map((one) => {
    const isOurs = one.name === ifName && isPodSide(one);
    return isOurs && !one.mac && link.mac !== "" ? { ...one, mac: link.mac } : one;
  });
  return { ...result, interfaces, ips, routes: [...result.routes, ...found.values()] };
}

/**
 * Records what a CHECK saw for the first time, so that the next one notices its loss. Where the
 * record has changed since it was read, the next one will see it. Never throws.
 */
export function noteLeftOut(
  host: Host,
  state: State,
  seen: StoredAttachment,
  kernel: KernelNetwork,
): void {
  const before = storedResult(seen);
  // A copy is open because the file cannot be written.
  if (!before || state.copyDir !== "") return;
  const version = seen.list.cniVersion;
  const after = toVersion(withLeftOut(seen, before, kernel), version);
  if (Bun.deepEquals(after, toVersion(before, version))) return;
  try {
    write(state, () => {
      const rows = attachments(host, state, seen.containerId);
      if (rows.some((row) => Bun.deepEquals(row, seen))) setAttached(state, seen, after);
    });
  } catch (error) {
    log(host, "warn", `Cannot record what a plugin left out: ${toCniError(error).message}`);
  }
}
