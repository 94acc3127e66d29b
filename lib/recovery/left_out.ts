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
import type { Attachment, Ip, Result, StoredAttachment } from "../record.ts";
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
  const routes = [...result.routes];
  for (const { dst, gateways, index } of kernel.routes) {
    if (index !== link.index || !dst.endsWith("/0")) continue;
    const isNamed = routes.some(
      (one) => one.dst.endsWith("/0") && isInMainTable(one) && family(one.dst) === family(dst),
    );
    const [gw] = gateways;
    if (!isNamed) routes.push({ dst, ...(gw !== undefined && { gw }) });
  }
  const found = routes.slice(result.routes.length);
  const withGateway = (ip: Ip): Ip => {
    const { gw } = found.find(({ dst }) => family(dst) === family(ip.address)) ?? {};
    return ip.gateway !== undefined || gw === undefined ? ip : { ...ip, gateway: gw };
  };
  const interfaces = result.interfaces.map((one) => {
    const isOurs = one.name === ifName && isPodSide(one);
    return isOurs && !one.mac && link.mac !== "" ? { ...one, mac: link.mac } : one;
  });
  return { ...result, interfaces, ips: result.ips.map(withGateway), routes };
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
