/**
 * Networks that live in the Kubernetes API: NetworkAttachmentDefinition (NPWG v1.3 §3), and
 * CNI-Genie's Logicalnetwork and Physicalnetwork. One GET per distinct object and call; asked for
 * only when a pod names one. Everything read is hostile until parsed.
 */
import * as v from "valibot";
import { npwgKeys } from "../annotations.ts";
import { CniError, code } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { contains, parseSubnet } from "../ip.ts";
import { isObject, parseJson } from "../json.ts";
import { type NetworkConfigList, type PluginConfig, parseConfigList } from "../netconf.ts";
import { findListOnDisk, type Network, resolveNetwork } from "../networks.ts";
import { oneLine } from "../text.ts";
import type { Objects } from "./objects_of_call.ts";

const Definition = v.looseObject({
  metadata: v.looseObject({
    annotations: v.nullish(v.record(v.string(), v.string())),
  }),
  spec: v.nullish(v.looseObject({ config: v.nullish(v.string()) })),
});

/** A network from a NetworkAttachmentDefinition. */
export interface DefinedNetwork extends Network {
  /** Device plugin resource it takes a device from. */
  resourceName?: string;
  /** True when its config stands on the node's disk and not in the object. */
  onDisk: boolean;
}

/** Path of a NetworkAttachmentDefinition. */
export function definitionPath(namespace: string, name: string): string[] {
  const group = ["apis", "k8s.cni.cncf.io", "v1", "namespaces"];
  return [...group, namespace, "network-attachment-definitions", name];
}

/**
 * Resolves a NetworkAttachmentDefinition: its `spec.config`, else the list on disk with its name,
 * else the single config, else failure (NPWG §3.4.1). A config without a name gets the object's.
 *
 * @throws CniError 101 when the object or its config is missing, 7 when the config is not valid,
 *   11 when the API cannot be asked
 */
export async function resolveDefinition(
  objects: Objects,
  config: Config,
  { namespace, network: name }: { namespace: string; network: string },
): Promise<DefinedNetwork> {
  const label = `${namespace}/${name}`;
  const what = `NetworkAttachmentDefinition ${label}`;
  const object = await getObject(objects, definitionPath(namespace, name), what);
  const { metadata, spec } = parseObject(Definition, object, what);
  const resourceName = metadata.annotations?.[npwgKeys.resourceName];
  const device = resourceName ? { resourceName } : {};
  const text = spec?.config?.trim() ?? "";
  if (text !== "") {
    const value = parseJson(text, `spec.config of ${what}`);
    const named = isObject(value) && !value["name"] ? { ...value, name } : value;
    const { loadsFolder, ...list } = parseConfigList(named, what);
    if (list.plugins.length === 0) {
      throw new CniError(code.invalidConfig, `Invalid network config ${what}: it has no plugins`);
    }
    return { name: label, list, source: what, onDisk: false, ...device };
  }
  const found = findListOnDisk(config, name);
  if (!found) {
    throw new CniError(
      code.networkNotFound,
      `Cannot resolve ${what}: it has no spec.config, and ${config.confDir} has no list named ` +
        `"${name}"`,
    );
  }
  return { name: label, ...found, onDisk: true, ...device };
}

/** Reads an object; one that is absent is a network that is not known. */
async function getObject(objects: Objects, path: string[], what: string): Promise<unknown> {
  try {
    return await objects.get(path);
  } catch (error) {
    const { isNotFound } = await import("./client.ts");
    if (!isNotFound(error)) throw error;
    throw new CniError(code.networkNotFound, `Unknown network: ${what} does not exist`, {
      cause: error,
    });
  }
}

function parseObject<T extends v.GenericSchema>(
  schema: T,
  value: unknown,
  what: string,
): v.InferOutput<T> {
  const parsed = v.safeParse(schema, value);
  if (parsed.success) return parsed.output;
  const [issue] = parsed.issues;
  throw new CniError(
    code.invalidConfig,
    `Invalid ${what}: ${v.getDotPath(issue) ?? "object"}: ${oneLine(issue.message, 200)}`,
  );
}

const text = v.nullish(v.string(), "");
const LogicalNetwork = v.looseObject({
  spec: v.looseObject({ physicalNet: text, sub_subnet: text, plugin: text }),
});
type LogicalSpec = v.InferOutput<typeof LogicalNetwork>["spec"];
const LogicalNetworkItem = v.looseObject({
  metadata: v.looseObject({ name: v.string(), namespace: v.string() }),
  spec: LogicalNetwork.entries.spec,
});
const LogicalNetworkList = v.looseObject({ items: v.array(v.unknown()) });
const PhysicalNetwork = v.looseObject({
  spec: v.looseObject({
    refer_nic: text,
    sharedStatus: v.nullish(
      v.looseObject({ plugin: text, subnet: text, dedicatedNet: v.nullish(v.boolean(), false) }),
    ),
  }),
});

const logicalGroup = ["apis", "alpha.network.k8s.io", "v1"];

/** A network from a Logicalnetwork, and the node's network behind it, for the gate. */
export interface LogicalResolved extends Network {
  behind: Network;
}

/** A Logicalnetwork that keeps the rules: what it asks of the network of its plugin. */
interface LogicalReviewed {
  /** Name of the network of the node that serves it. */
  plugin: string;
  /** What replaces that network's subnet; "" for nothing. */
  subnet: string;
  /** What replaces its parent device; "" for nothing. */
  referNic: string;
}

/**
 * Holds a Logicalnetwork against CNI-Genie's rules: a dedicated physical network brings its plugin;
 * a shared one needs plugin and sub-subnet on the logical one; the sub-subnet lies inside the
 * physical one and overlaps no other logical network of the same plugin.
 *
 * @param object the Logicalnetwork: hostile
 * @throws CniError 101 for a physical network that does not exist, 7 where a rule is broken, 11
 *   without the API
 */
export async function reviewLogical(
  objects: Objects,
  { namespace, name, object }: { namespace: string; name: string; object: unknown },
): Promise<LogicalReviewed> {
  const what = `Logicalnetwork ${namespace}/${name}`;
  const { spec } = parseObject(LogicalNetwork, object, what);
  const physical = await getPhysical(objects, namespace, spec, what);
  const plugin = physical?.dedicatedNet ? physical.plugin : spec.plugin;
  if (!plugin) throw broken(what, "no plugin: set spec.plugin, or a dedicated physical network");
  if (physical?.dedicatedNet && spec.plugin !== "" && spec.plugin !== plugin) {
    throw broken(what, `plugin "${spec.plugin}" is not "${plugin}", that of its physical network`);
  }
  const subnet = spec.sub_subnet;
  if (physical && !physical.dedicatedNet && subnet === "") {
    throw broken(what, "a shared physical network needs spec.sub_subnet");
  }
  if (subnet !== "") {
    if (!parseSubnet(subnet))
      throw broken(what, `sub_subnet "${oneLine(subnet, 80)}" is no subnet`);
    if (physical && physical.subnet !== "" && !contains(physical.subnet, subnet)) {
      throw broken(what, `sub_subnet ${subnet} is not inside ${physical.subnet}`);
    }
    await checkOverlap(objects, { namespace, name, plugin, subnet }, what);
  }
  return {
    plugin,
    subnet: subnet || (physical?.dedicatedNet ? physical.subnet : ""),
    referNic: physical?.referNic ?? "",
  };
}

/**
 * Resolves a Logicalnetwork of the pod's namespace to the network of its plugin: its sub-subnet
 * replaces the plugin's own, `refer_nic` becomes the parent device where the plugin takes one.
 *
 * @throws CniError 101 for objects that do not exist, else as {@link reviewLogical}
 */
export async function resolveLogical(
  objects: Objects,
  config: Config,
  { namespace, network: name }: { namespace: string; network: string },
): Promise<LogicalResolved> {
  const what = `Logicalnetwork ${namespace}/${name}`;
  const path = [...logicalGroup, "namespaces", namespace, "logicalnetworks", name];
  const object = await getObject(objects, path, what);
  const { plugin, subnet, referNic } = await reviewLogical(objects, { namespace, name, object });
  const network = resolveNetwork(config, plugin);
  const list = withParent(
    subnet === "" ? network.list : withSubnet(network.list, subnet, what),
    referNic,
  );
  return {
    ...network,
    name: `${namespace}/${name}`,
    list,
    source: `${what} on ${network.source}`,
    behind: network,
  };
}

async function getPhysical(
  objects: Objects,
  namespace: string,
  { physicalNet }: LogicalSpec,
  logical: string,
): Promise<
  { referNic: string; plugin: string; subnet: string; dedicatedNet: boolean } | undefined
> {
  if (physicalNet === "") return undefined;
  const what = `Physicalnetwork ${namespace}/${physicalNet} of ${logical}`;
  const path = [...logicalGroup, "namespaces", namespace, "physicalnetworks", physicalNet];
  const { spec } = parseObject(PhysicalNetwork, await getObject(objects, path, what), what);
  const { plugin = "", subnet = "", dedicatedNet = false } = spec.sharedStatus ?? {};
  if (dedicatedNet && plugin === "") throw broken(what, "it is dedicated but names no plugin");
  if (subnet !== "" && !parseSubnet(subnet)) throw broken(what, `"${subnet}" is no subnet`);
  return { referNic: spec.refer_nic, plugin, subnet, dedicatedNet };
}

/** Another tenant's network that is malformed, or has no plugin, is in nobody's way. */
async function checkOverlap(
  objects: Objects,
  self: { namespace: string; name: string; plugin: string; subnet: string },
  what: string,
): Promise<void> {
  const answer = await objects.get([...logicalGroup, "logicalnetworks"]);
  const { items } = parseObject(LogicalNetworkList, answer, "list of Logicalnetworks");
  for (const item of items) {
    const parsed = v.safeParse(LogicalNetworkItem, item);
    if (!parsed.success) continue;
    const { metadata, spec } = parsed.output;
    if (metadata.namespace === self.namespace && metadata.name === self.name) continue;
    const { sub_subnet: other } = spec;
    if (!contains(other, self.subnet) && !contains(self.subnet, other)) continue;
    if ((await pluginOf(objects, metadata.namespace, spec)) !== self.plugin) continue;
    throw broken(
      what,
      `sub_subnet ${self.subnet} overlaps ${other} of ${metadata.namespace}/${metadata.name} ` +
        "on the same plugin",
    );
  }
}

/** The plugin another logical network ends up with; undefined where it is broken. */
async function pluginOf(
  objects: Objects,
  namespace: string,
  spec: LogicalSpec,
): Promise<string | undefined> {
  if (spec.physicalNet === "") return spec.plugin;
  try {
    const physical = await getPhysical(objects, namespace, spec, "another Logicalnetwork");
    return physical?.dedicatedNet ? physical.plugin : spec.plugin;
  } catch (error) {
    if (error instanceof CniError && error.code !== code.tryAgainLater) return undefined;
    throw error;
  }
}

function broken(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid ${what}: ${issue}`);
}

/** Replaces the subnet from which the first plugin with an IPAM gives addresses. */
function withSubnet(list: NetworkConfigList, subnet: string, what: string): NetworkConfigList {
  const index = list.plugins.findIndex(({ ipam }) => isObject(ipam) && ipam["type"]);
  const plugin = list.plugins[index];
  const ipam = plugin?.["ipam"];
  if (!plugin || !isObject(ipam)) {
    throw broken(what, `network "${list.name}" has no IPAM whose subnet could be replaced`);
  }
  const plugins = list.plugins.with(index, { ...plugin, ipam: replaceSubnet(ipam, subnet) });
  return { ...list, plugins };
}

/** The same IPAM on another subnet: ranges and gateways outside it go. */
function replaceSubnet(ipam: Record<string, unknown>, subnet: string): Record<string, unknown> {
  const is6 = subnet.includes(":");
  if (ipam["type"] === "calico-ipam")
    return { ...ipam, [is6 ? "ipv6_pools" : "ipv4_pools"]: [subnet] };
  if (ipam["type"] === "whereabouts") return { ...ipam, range: subnet };
  const { rangeStart: _s, rangeEnd: _e, gateway: _g, ranges, subnet: _old, ...rest } = ipam;
  if (!Array.isArray(ranges)) return { ...rest, subnet };
  // Range sets of the other family stay: a logical network narrows one of them.
  const others = ranges.filter(
    (set) =>
      Array.isArray(set) &&
      set.every((range) => isObject(range) && String(range["subnet"]).includes(":") !== is6),
  );
  return { ...rest, ranges: [[{ subnet }], ...others] };
}

/** Keys under which plugins take their parent device. */
const parentKeys: Record<string, string> = {
  macvlan: "master",
  ipvlan: "master",
  vlan: "master",
  sriov: "master",
  "host-device": "device",
};

function withParent(list: NetworkConfigList, nic: string): NetworkConfigList {
  if (nic === "") return list;
  const plugins = list.plugins.map((plugin): PluginConfig => {
    const present = ["master", "device"].find((key) => plugin[key] !== undefined);
    const key = parentKeys[plugin.type] ?? present;
    return key === undefined ? plugin : { ...plugin, [key]: nic };
  });
  return { ...list, plugins };
}
