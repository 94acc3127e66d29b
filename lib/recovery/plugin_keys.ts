/**
 * What plugins and IPAMs keep their state by, where it is less than container and interface: the
 * second attachment of such a plugin in a container is refused before the plugin is called, and
 * its DEL is never sent for one attachment while another of the container lives, because it would
 * take what that one has. Loaded when a container has several attachments, or one that is not eth0.
 * Source: their binaries at work, see docs/plugins.md.
 */
import { isAbsolute, join } from "node:path";
import type { Added, Chain, Done } from "../call.ts";
import { exactTypes, findGone, readNetwork } from "../check.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { isObject } from "../json.ts";
import { interfacesIn } from "../kernel.ts";
import { type NetworkConfigList, resolveNetwork } from "../networks.ts";
import type { Attachment, StoredAttachment } from "../record.ts";
import { ip } from "./moved_routes.ts";
import { orUndefined } from "./tried.ts";

/** By type: what it keeps its state by within a container; two with one key share it. */
const keyOf: Readonly<Record<string, (list: NetworkConfigList) => string>> = {
  // Weave keeps addresses by container; its interface plugin and its IPAM share them.
  "weave-net": () => "weave",
  "weave-ipam": () => "weave",
  // Calico has one endpoint for each workload; its IPAM a handle of list name and container.
  calico: () => "calico",
  "calico-ipam": ({ name }) => `calico-ipam ${name}`,
  romana: () => "romana",
};

/** Plugins that give the pod's interface a name of their own. */
const fixedName: Readonly<Record<string, string>> = { romana: "eth0" };

/**
 * Types of which the table says `one_interface`: the first plugin of each such network, or its IPAM
 * where that plugin is one of the reference plugins, which keep their state by interface.
 */
export function oneInterfaceTypes(config: Config): ReadonlySet<string> {
  const entries = [...config.plugins.values()].filter(({ oneInterface }) => oneInterface);
  const types = entries.flatMap(({ name }) => {
    // A network that is not there has no attachment.
    const [plugin] = orUndefined(() => resolveNetwork(config, name))?.list.plugins ?? [];
    if (!plugin) return [];
    const { type, ipam } = plugin;
    return exactTypes.has(type) && isObject(ipam) ? `${ipam["type"]}` : type;
  });
  return new Set(types);
}

/** Keys of a list, each with its plugin. @param own types of {@link oneInterfaceTypes} */
function keysOf(list: NetworkConfigList, own?: ReadonlySet<string>): Map<string, string> {
  return new Map(
    typesOf(list).flatMap((type) => {
      const known = Object.hasOwn(keyOf, type) ? keyOf[type] : undefined;
      if (known) return [[known(list), type] as const];
      return own?.has(type) ? [[type, type] as const] : [];
    }),
  );
}

/** The types of all plugins of a list, its IPAM plugins included. */
export function typesOf({ plugins }: NetworkConfigList): string[] {
  const types = plugins.flatMap(({ type, ipam }) => [type, isObject(ipam) ? ipam["type"] : ""]);
  return types.filter((type): type is string => typeof type === "string" && type !== "");
}

/** The plugins of a network that give a container one interface. */
export function oneInterfacePlugins(list: NetworkConfigList, own: ReadonlySet<string>): string[] {
  return [...keysOf(list, own).values()];
}

/** The first of `others` that shares a key with an attachment, and the plugin. */
export function rivalOf<T extends Pick<Attachment, "list">>(
  { list }: Pick<Attachment, "list">,
  others: readonly T[],
  own?: ReadonlySet<string>,
): { plugin: string; other: T } | undefined {
  for (const [key, plugin] of keysOf(list, own)) {
    const other = others.find((one) => keysOf(one.list, own).has(key));
    if (other) return { plugin, other };
  }
  return undefined;
}

/**
 * Refuses attachments that a plugin cannot give a container, before any plugin runs.
 * @param held what the container has besides
 * @throws CniError 105 for a second attachment of a plugin that gives a container one interface,
 *   and for one that names it otherwise
 */
export function checkOneInterface(
  config: Config,
  planned: readonly Attachment[],
  held: readonly Attachment[],
): void {
  const own = oneInterfaceTypes(config);
  for (const [i, attachment] of planned.entries()) {
    const { network, ifName, list } = attachment;
    const refuse = (plugin: string, why: string) => {
      const what = `Cannot attach network "${network}" (${ifName})`;
      const msg = `${what}: plugin "${plugin}" gives a container one interface, ${why}`;
      return new CniError(code.interfaceConflict, msg);
    };
    const rival = rivalOf(attachment, [...held, ...planned.slice(0, i)], own);
    if (rival) {
      const { other, plugin } = rival;
      throw refuse(plugin, `and that is ${other.ifName} of network "${other.network}"`);
    }
    const named = list.plugins.find(({ type }) => (fixedName[type] ?? ifName) !== ifName);
    if (named) throw refuse(named.type, `and names it ${fixedName[named.type]}: ask for it there`);
  }
}

/**
 * Makes the attachments of a plan fit beside each other and beside what the container has.
 *
 * Flannel keeps one file for each container, with the config its DEL needs, and a second interface
 * would overwrite it: one that is not eth0 gets a folder of its own.
 * @throws CniError 105, see {@link checkOneInterface}
 */
export function fitTogether(
  config: Config,
  planned: readonly Attachment[],
  held: readonly Attachment[],
): void {
  checkOneInterface(config, planned, held);
  for (const attachment of planned) {
    const { list, ifName } = attachment;
    const isKept = ({ type }: { type: string }) => type === "flannel" && ifName !== "eth0";
    if (!list.plugins.some(isKept)) continue;
    const plugins = list.plugins.map((one) => {
      if (!isKept(one)) return one;
      const { dataDir } = one;
      const isNamed = typeof dataDir === "string" && isAbsolute(dataDir);
      const dir = isNamed ? dataDir : join(config.stateDir, "flannel");
      return { ...one, dataDir: join(dir, `genie-${ifName}`) };
    });
    attachment.list = { ...list, plugins };
  }
}

/**
 * Why the DEL of an attachment must wait: it would take from another of its container what that
 * one has. Undefined where it may be sent.
 * @param others what stays of the container
 */
export function sharedError(
  attachment: Pick<Attachment, "network" | "ifName" | "list">,
  others: readonly StoredAttachment[],
  own?: ReadonlySet<string>,
): CniError | undefined {
  const live = others.filter((one) => one.state === "attached" || one.state === "planned");
  const rival = rivalOf(attachment, live, own);
  if (!rival) return undefined;
  const { plugin, other } = rival;
  const msg =
    `Cannot detach network "${attachment.network}" (${attachment.ifName}): plugin "${plugin}" ` +
    "gives a container one interface, so its DEL would take away what network " +
    `"${other.network}" (${other.ifName}) has; it goes with the pod`;
  return new CniError(code.interfaceConflict, msg, { cause: { kind: "shared" } });
}

/**
 * After a failed ADD beside attachments of the same plugin: are those still there? A plugin that
 * keys by container may have taken their interface, or given back their addresses.
 * @returns the failure, which says what was found
 */
export function lookAtFirst(
  { netns }: Chain,
  { list, network }: Attachment,
  before: readonly Done[],
  added: Added & { kind: "failed" },
): Added & { kind: "failed" } {
  const type = list.plugins[0]?.type ?? "";
  const served = before.filter(({ attachment }) => attachment.list.plugins[0]?.type === type);
  const kernel = served.length > 0 ? readNetwork(netns) : undefined;
  if (!kernel) return added;
  const found = served.map(({ attachment, result }) => {
    const gone = findGone(attachment, result, kernel).join(", ");
    return gone === ""
      ? `${attachment.ifName} of network "${attachment.network}" is still there`
      : `network "${attachment.network}" (${attachment.ifName}) has lost ${gone}`;
  });
  const isHurt = found.some((one) => one.includes(" has lost "));
  const advice = isHurt ? `; set one_interface = true for "${network}" in the plugin table` : "";
  const { code: number, message, details, rule, cause } = added.error;
  const said = `${message}; plugin "${type}" serves the pod already: ${found.join(", ")}${advice}`;
  return { ...added, error: new CniError(number, said, { details, rule, cause }) };
}

/**
 * Takes away an interface that a DEL with status 0 left in the pod: Romana's does, and a file that
 * is missing makes others do nothing. With it goes its other end, and the routes of both.
 */
export async function removeLeft(
  { host, netns }: Pick<Chain, "host" | "netns">,
  { ifName, network, list, device, containerId: container }: Attachment,
): Promise<void> {
  // A device goes back to the node by its plugin alone.
  if (device || ifName === "lo" || list.plugins[0]?.type === "host-device") return;
  const error = await ip(host, netns, ["link", "del", "dev", ifName], "").then(
    () => undefined,
    (failure: unknown) => toCniError(failure).message,
  );
  const isGone = !interfacesIn(netns)?.includes(ifName);
  const what = isGone ? "Removed an interface that a DEL had left" : "A DEL left an interface";
  log(host, isGone ? "info" : "warn", what, { network, container, interface: ifName, error });
}
