/**
 * Networks that are no plain ones of the node: objects of the Kubernetes API, namely a
 * NetworkAttachmentDefinition (NPWG v1.3 §3) or CNI-Genie's Logicalnetwork and Physicalnetwork, and
 * what a Multus config names. An object is read when a pod names it, and hostile until parsed.
 */
import { existsSync } from "node:fs";
import * as v from "valibot";
import type { Host, PlanCall, Wanted } from "../call.ts";
import { CniError, code, log, oneLine } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { canonicalIP, contains, formatIP, formatSubnet, parseSubnet, toNumber } from "../ip.ts";
import { isObject, parseJson } from "../json.ts";
import {
  declaresCapability,
  type Network,
  type NetworkConfigList,
  type PluginConfig,
  parseConfigList,
  resolveNetwork,
} from "../networks.ts";
import { findListOnDisk, networkAt } from "../node_networks.ts";
import { objectsOf } from "../plan.ts";
import { npwgKeys } from "../pod.ts";
import type { Attachment, Result } from "../record.ts";
import { identified } from "../recovery/network_name.ts";
import { podLabel } from "../request.ts";
import { isConfigured } from "../settings.ts";
import type { Objects } from "./objects_of_call.ts";

/** A network from a NetworkAttachmentDefinition. */
export interface DefinedNetwork extends Network {
  /** Resource of a device plugin from which each attachment takes a device. */
  resourceName?: string;
  /** True when its config is on the node's disk and not in the object. */
  onDisk: boolean;
}

/**
 * A network that is no plain one of the node. The rules of the table know it by `name`; those of
 * `rulesOf` apply, the network of the node behind it, where there is one.
 */
export type ResolvedObject = { network: Network & { resourceName?: string }; name: string } & (
  | { rulesOf: Network; defined?: undefined }
  | { defined: DefinedNetwork; rulesOf?: undefined }
);

/**
 * Resolves a wanted network that is not the node's own.
 * @throws CniError 101 for an unknown one, 11, 7
 */
export async function resolveObject(call: PlanCall, wanted: Wanted): Promise<ResolvedObject> {
  if (wanted.warning !== undefined) log(call.host, "warn", wanted.warning);
  if (wanted.from === "multus") return resolveMultus(call, wanted);
  if (wanted.from === "definition") return resolveNad(call, wanted);
  const logical = await resolveLogical(await objectsOf(call), call.config, wanted);
  const { behind, ...network } = logical;
  return { network, name: network.name, rulesOf: behind };
}

async function resolveNad(call: PlanCall, wanted: Wanted, name?: string): Promise<ResolvedObject> {
  const defined = await resolveDefinition(await objectsOf(call), call.config, wanted);
  return { network: defined, name: name ?? defined.name, defined };
}

/** Multus' order: an object in its namespace, a CNI name on disk, a folder's first list, a file. */
async function resolveMultus(call: PlanCall, wanted: Wanted): Promise<ResolvedObject> {
  const { host, config } = call;
  const { network: name } = wanted;
  const onNode = (network: Network) => ({ network, name: network.name, rulesOf: network });
  if (name.includes("/")) return onNode(networkAt(name));
  if (isConfigured(host, config.kubernetes)) {
    try {
      return await resolveNad(call, wanted, name);
    } catch (error) {
      if (!(error instanceof CniError) || error.code !== code.networkNotFound) throw error;
    }
  }
  const found = findListOnDisk(config, name);
  if (found) return onNode(identified(config, { name, ...found }));
  const why = `it is no NetworkAttachmentDefinition in ${wanted.namespace} and no CNI name in`;
  const message = `Unknown network "${name}" of the Multus config: ${why} ${config.confDir}`;
  throw new CniError(code.networkNotFound, message);
}

/**
 * The attachment with what the pod asks of it beside the network (NPWG §4.1.2.1). `ips` and `mac`
 * that no plugin declares go into CNI_ARGS, as in Multus and CNI-Genie, and {@link checkWishes}
 * looks whether they were heard.
 * @throws CniError 7 for another wish that no plugin declares
 */
export function withWishes(
  attachment: Attachment,
  { name, list, source }: Network,
  { capabilityArgs: asked = {} }: Wanted,
): Attachment {
  const isDeaf = (one: string) => one in asked && !declaresCapability(list, one);
  const missing = ["portMappings", "bandwidth", "infinibandGUID"].find(isDeaf);
  if (missing) {
    const what = `Cannot attach network "${name}": the pod asks for "${missing}"`;
    const why = `no plugin of ${source} declares that capability`;
    throw new CniError(code.invalidConfig, `${what}, and ${why}`);
  }
  const ips = isDeaf("ips") ? [asked["ips"]].flat().map(String) : [];
  const mac = isDeaf("mac") ? [`MAC=${asked["mac"]}`] : [];
  // host-local takes one address in CNI_ARGS, and several in `args.cni` (CNI CONVENTIONS).
  const isHostLocal = list.plugins.some((one) => ipamType(one) === "host-local");
  const several = isHostLocal && ips.length > 1 ? ips.map((one) => one.replace(/\/.*/, "")) : [];
  const pairs = [...(ips.length > several.length ? [`IP=${ips.join(",")}`] : []), ...mac];
  const { cniArgs: given, args } = attachment;
  // What the runtime wants for its own first network is not for this one.
  const others = given.split(";").filter((part) => !/^((IP|MAC|IgnoreUnknown)=.*)?$/s.test(part));
  const cniArgs = pairs.length > 0 ? ["IgnoreUnknown=1", ...pairs, ...others].join(";") : given;
  if (several.length === 0) return { ...attachment, cniArgs };
  const cni = { ...(isObject(args["cni"]) && args["cni"]), ips: several };
  return { ...attachment, cniArgs, args: { ...args, cni } };
}

const ipamType = ({ ipam }: PluginConfig) => (isObject(ipam) ? ipam["type"] : undefined);

/** Looks whether an attachment has what was asked for in CNI_ARGS. @throws CniError 7 */
export async function checkWishes(attachment: Attachment, result: Result): Promise<void> {
  const { list, ifName, capabilityArgs, network, netns, pod } = attachment;
  const inPod = result.interfaces.find(({ name, sandbox }) => name === ifName && sandbox);
  const macOf = async () => {
    if (inPod?.mac) return inPod.mac;
    // Not every result names it: those before CNI 0.3.0 cannot.
    const { links = [] } = (await import("../check.ts")).readNetwork(netns) ?? {};
    return links.find(({ name }) => name === ifName)?.mac;
  };
  const normal = (text: unknown) => {
    const [plain = ""] = String(text).toLowerCase().split("/");
    return canonicalIP(plain) ?? plain;
  };
  for (const key of ["ips", "mac"]) {
    if (!(key in capabilityArgs) || declaresCapability(list, key)) continue;
    const asked = [capabilityArgs[key]].flat().map(normal);
    const found = key === "ips" ? result.ips.map(({ address }) => address) : [await macOf()];
    const missing = asked.find((one) => !found.map(normal).includes(one));
    if (missing === undefined) continue;
    const types = list.plugins.map(({ type }) => `"${type}"`).join(", ");
    const made = oneLine(found.filter(Boolean).join(", ") || "none", 200);
    const what = `Cannot attach network "${network}" (${ifName}) of pod ${podLabel(pod)}`;
    const why = `${types} does not take from CNI_ARGS (it has ${made})`;
    const remedy = `declare the capability "${key}" in the network's config, or leave ${key} out`;
    const msg = `${what}: it asks for ${key} ${missing}, which ${why}: ${remedy}`;
    throw new CniError(code.invalidConfig, msg);
  }
}

const DefinitionObject = v.looseObject({
  metadata: v.looseObject({ annotations: v.nullish(v.record(v.string(), v.string())) }),
  spec: v.nullish(v.looseObject({ config: v.nullish(v.string()) })),
});

/** Path of a NetworkAttachmentDefinition. */
export function definitionPath(namespace: string, name: string): string[] {
  const collection = ["namespaces", namespace, "network-attachment-definitions"];
  return ["apis", "k8s.cni.cncf.io", "v1", ...collection, name];
}

/**
 * Resolves a NetworkAttachmentDefinition: its `spec.config`, else the list on disk with its name,
 * else the single config, else failure (NPWG §3.4.1). A config without a name gets the object's.
 * @throws CniError 101 without the object or its config, 7 for an invalid config, 11 without the
 *   API
 */
export async function resolveDefinition(
  objects: Objects,
  config: Config,
  { namespace, network: name }: { namespace: string; network: string },
): Promise<DefinedNetwork> {
  const label = `${namespace}/${name}`;
  const what = `NetworkAttachmentDefinition ${label}`;
  const object = await getObject(objects, definitionPath(namespace, name), what);
  const { metadata, spec } = parseObject(DefinitionObject, object, what);
  const resourceName = metadata.annotations?.[npwgKeys.resourceName];
  const device = resourceName ? { resourceName } : {};
  const text = spec?.config?.trim() ?? "";
  if (text !== "") {
    const value = parseJson(text, `spec.config of ${what}`);
    const named = isObject(value) && !value["name"] ? { ...value, name } : value;
    const { loadsFolder, ...list } = parseConfigList(named, what);
    if (list.plugins.length === 0) throw invalid(`network config ${what}`, "it has no plugins");
    return { name: label, list, source: what, onDisk: false, ...device };
  }
  const found = findListOnDisk(config, name);
  if (!found) {
    const issue = `it has no spec.config, and ${config.confDir} has no list named "${name}"`;
    throw new CniError(code.networkNotFound, `Cannot resolve ${what}: ${issue}`);
  }
  return { name: label, ...found, onDisk: true, ...device };
}

/** Reads an object. @throws CniError 101 when there is none */
async function getObject(objects: Objects, path: string[], what: string): Promise<unknown> {
  try {
    return await objects.get(path);
  } catch (error) {
    const { isNotFound } = await import("./client.ts");
    if (!isNotFound(error)) throw error;
    const message = `Unknown network: ${what} does not exist`;
    throw new CniError(code.networkNotFound, message, { cause: error });
  }
}

function parseObject<T extends v.GenericSchema>(schema: T, value: unknown, what: string) {
  const parsed = v.safeParse(schema, value);
  if (parsed.success) return parsed.output;
  const [issue] = parsed.issues;
  throw invalid(what, `${v.getDotPath(issue) ?? "object"}: ${oneLine(issue.message, 200)}`);
}

function invalid(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid ${what}: ${issue}`);
}

const text = v.nullish(v.string(), "");
const LogicalSpec = v.looseObject({ physicalNet: text, sub_subnet: text, plugin: text });
type LogicalSpec = v.InferOutput<typeof LogicalSpec>;
const LogicalNetwork = v.looseObject({ spec: LogicalSpec });
const metadata = v.looseObject({ name: v.string(), namespace: v.string() });
const LogicalNetworkItem = v.looseObject({ metadata, spec: LogicalSpec });
const LogicalNetworkList = v.looseObject({
  // Another tenant's network that is malformed overlaps nothing.
  items: v.array(v.fallback(v.nullable(LogicalNetworkItem), null)),
});
const isDedicated = v.nullish(v.boolean(), false);
const SharedStatus = v.looseObject({ plugin: text, subnet: text, dedicatedNet: isDedicated });
const PhysicalNetwork = v.looseObject({
  spec: v.looseObject({ refer_nic: text, sharedStatus: v.nullish(SharedStatus, {}) }),
});

const logicalGroup = ["apis", "alpha.network.k8s.io", "v1"];

/**
 * Checks a Logicalnetwork by CNI-Genie's rules: a dedicated physical network brings its plugin; a
 * shared one needs plugin and sub-subnet in the logical one; the sub-subnet lies inside that of the
 * physical one and overlaps no other logical network of the same plugin.
 * @param object the Logicalnetwork: hostile
 * @returns the node's network that serves it, and what replaces its subnet and parent device, or ""
 * @throws CniError 101 for an unknown physical network, 7 for a broken rule, 11 without the API
 */
export async function reviewLogical(
  objects: Objects,
  { namespace, name, object }: { namespace: string; name: string; object: unknown },
): Promise<{ plugin: string; subnet: string; referNic: string }> {
  const what = `Logicalnetwork ${namespace}/${name}`;
  const { spec } = parseObject(LogicalNetwork, object, what);
  const physical = await getPhysical(objects, namespace, spec, what);
  const { plugin, dedicated, shared, referNic } = physical;
  if (!plugin) throw invalid(what, "no plugin: set spec.plugin, or a dedicated physical network");
  if (dedicated && spec.plugin !== "" && spec.plugin !== plugin) {
    throw invalid(what, `plugin "${spec.plugin}" is not "${plugin}", that of its physical network`);
  }
  const subnet = spec.sub_subnet;
  if (subnet === "") {
    if (shared) throw invalid(what, "a shared physical network needs spec.sub_subnet");
    return { plugin, subnet: dedicated ? physical.subnet : "", referNic };
  }
  if (!parseSubnet(subnet)) throw invalid(what, `sub_subnet "${oneLine(subnet, 80)}" is no subnet`);
  if (physical.subnet !== "" && !contains(physical.subnet, subnet)) {
    throw invalid(what, `sub_subnet ${subnet} is not inside ${physical.subnet}`);
  }
  await checkOverlap(objects, { namespace, name, plugin, subnet }, what);
  return { plugin, subnet, referNic };
}

/**
 * Resolves a Logicalnetwork of the pod's namespace to the network of its plugin: addresses come
 * from its sub-subnet, `refer_nic` becomes the parent device where the plugin takes one.
 * @returns with the node's network `behind` it, whose access rules apply
 * @throws CniError 101 for objects that do not exist, else as {@link reviewLogical}
 */
export async function resolveLogical(
  objects: Objects,
  config: Config,
  { namespace, network: name }: { namespace: string; network: string },
): Promise<Network & { behind: Network }> {
  const what = `Logicalnetwork ${namespace}/${name}`;
  const path = [...logicalGroup, "namespaces", namespace, "logicalnetworks", name];
  const object = await getObject(objects, path, what);
  const { plugin, subnet, referNic } = await reviewLogical(objects, { namespace, name, object });
  const network = resolveNetwork(config, plugin);
  const list = withSubnet(network.list, subnet, what);
  const isCalico = list.plugins.some((one) => ipamType(one) === "calico-ipam");
  if (subnet !== "" && isCalico) await checkPool(objects, subnet, what);
  return {
    ...network,
    name: `${namespace}/${name}`,
    list: withParent(list, referNic),
    source: `${what} on ${network.source}`,
    behind: network,
  };
}

/** The physical network of a logical one, if it names one, and the plugin that serves both. */
async function getPhysical(objects: Objects, namespace: string, own: LogicalSpec, logical: string) {
  const { physicalNet } = own;
  if (physicalNet === "") {
    return { plugin: own.plugin, subnet: "", referNic: "", dedicated: false, shared: false };
  }
  const what = `Physicalnetwork ${namespace}/${physicalNet} of ${logical}`;
  const path = [...logicalGroup, "namespaces", namespace, "physicalnetworks", physicalNet];
  const { spec } = parseObject(PhysicalNetwork, await getObject(objects, path, what), what);
  const { plugin, subnet, dedicatedNet: dedicated } = spec.sharedStatus;
  if (dedicated && plugin === "") throw invalid(what, "it is dedicated but names no plugin");
  if (subnet !== "" && !parseSubnet(subnet)) throw invalid(what, `"${subnet}" is no subnet`);
  const serving = dedicated ? plugin : own.plugin;
  return { plugin: serving, subnet, referNic: spec.refer_nic, dedicated, shared: !dedicated };
}

type Placed = Record<"namespace" | "name" | "plugin" | "subnet", string>;

async function checkOverlap(objects: Objects, self: Placed, what: string): Promise<void> {
  const answer = await objects.get([...logicalGroup, "logicalnetworks"]);
  const { items } = parseObject(LogicalNetworkList, answer, "list of Logicalnetworks");
  for (const { metadata, spec } of items.flatMap((item) => item ?? [])) {
    if (metadata.namespace === self.namespace && metadata.name === self.name) continue;
    const { sub_subnet: other } = spec;
    if (!contains(other, self.subnet) && !contains(self.subnet, other)) continue;
    if ((await pluginOf(objects, metadata.namespace, spec)) !== self.plugin) continue;
    const label = `${metadata.namespace}/${metadata.name} on the same plugin`;
    throw invalid(what, `sub_subnet ${self.subnet} overlaps ${other} of ${label}`);
  }
}

/** The plugin of another logical network; undefined for one that breaks a rule. */
async function pluginOf(objects: Objects, namespace: string, spec: LogicalSpec) {
  try {
    return (await getPhysical(objects, namespace, spec, "another Logicalnetwork")).plugin;
  } catch (error) {
    if (error instanceof CniError && error.code !== code.tryAgainLater) return undefined;
    throw error;
  }
}

/**
 * Gives the network's addresses from a part: of the first plugin with an IPAM, else of weave-net,
 * whose own IPAM takes `ipam.subnet` though its lists have none.
 */
function withSubnet(list: NetworkConfigList, subnet: string, what: string): NetworkConfigList {
  if (subnet === "") return list;
  const { plugins, name } = list;
  if (plugins.some(({ type }) => type === "flannel")) {
    const issue = "takes all addresses from the node's subnet.env, and gives out no part of them";
    const remedy = "name a network of bridge and host-local on the same subnet as plugin";
    throw invalid(what, `plugin "flannel" of network "${name}" ${issue}: ${remedy}`);
  }
  const withIpam = plugins.findIndex(ipamType);
  const index = withIpam < 0 ? plugins.findIndex(({ type }) => type === "weave-net") : withIpam;
  const plugin = plugins[index];
  if (!plugin) throw invalid(what, `network "${name}" has no IPAM whose subnet could be replaced`);
  const ipam = isObject(plugin["ipam"]) ? plugin["ipam"] : {};
  const { type } = ipam;
  if (type === "dhcp" || type === "static") {
    throw invalid(what, `IPAM "${type}" of network "${name}" gives out no part of a subnet`);
  }
  const changed = { ...plugin, ipam: replaceSubnet(ipam, subnet) };
  return { ...list, plugins: plugins.with(index, changed) };
}

/** How an IPAM names subnet, first and last address of a range, and its list of ranges. */
const hostLocalKeys = ["subnet", "rangeStart", "rangeEnd", "ranges"] as const;
const whereaboutsKeys = ["range", "range_start", "range_end", "ipRanges"] as const;
type RangeKeys = typeof hostLocalKeys | typeof whereaboutsKeys;

/**
 * The same IPAM for a part. Where the part lies inside a range, that range stays, with its gateway
 * and mask, and only first and last address change: on one bridge all pods need one gateway. Else
 * the part takes the place of the ranges of its family. Those of the other family stay.
 */
function replaceSubnet(ipam: Record<string, unknown>, part: string): Record<string, unknown> {
  const { type } = ipam;
  const is6 = part.includes(":");
  if (type === "calico-ipam") return { ...ipam, [is6 ? "ipv6_pools" : "ipv4_pools"]: [part] };
  const keys = type === "whereabouts" ? whereaboutsKeys : hostLocalKeys;
  const [subnetKey, startKey, endKey, listKey] = keys;
  const isOther = (range: unknown) =>
    isObject(range) && String(range[subnetKey]).includes(":") !== is6;
  const narrowed = (range: unknown) =>
    type === "whereabouts" || type === "host-local" ? narrow(range, part, keys) : undefined;
  const { [listKey]: listed, ...own } = ipam;
  const sets = Array.isArray(listed) ? listed.filter((set) => typeof set === "object") : [];
  const others = sets.filter((set) => [set].flat().every(isOther));
  const ownPart = narrowed(own);
  if (ownPart) return { ...ownPart, ...(listed !== undefined && { [listKey]: others }) };
  const { [subnetKey]: subnet, [startKey]: _s, [endKey]: _e, gateway: _g, ...rest } = own;
  const kept = subnet !== undefined && isOther(own) ? own : rest;
  if (sets.length === 0 && kept === rest) return { ...rest, [subnetKey]: part };
  const [found = { [subnetKey]: part }] = sets.flat().flatMap((range) => narrowed(range) ?? []);
  return { ...kept, [listKey]: [keys === hostLocalKeys ? [found] : found, ...others] };
}

/** A range from which only a part of its subnet is given out; undefined for a part of none. */
function narrow(range: unknown, part: string, [subnetKey, startKey, endKey]: RangeKeys) {
  const inner = parseSubnet(part);
  if (!isObject(range) || !inner) return undefined;
  // whereabouts may write first and last address in front of the prefix.
  const text = String(range[subnetKey]);
  const [, first, last, prefix] = /^([^-]+)-([^/]+)\/(\d+)$/.exec(text) ?? [];
  const whole = parseSubnet(first ? `${first}/${prefix}` : text);
  if (!whole || !contains(formatSubnet(whole), part)) return undefined;
  const max = (a: bigint, b: bigint) => (a > b ? a : b);
  const min = (a: bigint, b: bigint) => (a < b ? a : b);
  // Neither the address of the subnet nor that of its broadcast.
  const lowest = max(inner.base, whole.base + 1n);
  const highest = min(inner.base + inner.size, whole.base + whole.size - 1n) - 1n;
  if (lowest > highest) return undefined;
  const from = max(lowest, toNumber(first ?? range[startKey]) ?? lowest);
  const to = min(highest, toNumber(last ?? range[endKey]) ?? highest);
  // A range that ends before the part keeps plain pods out of it.
  const [start, end] = from > to ? [lowest, highest] : [from, to];
  return {
    ...range,
    ...(first && { [subnetKey]: formatSubnet(whole) }),
    [startKey]: formatIP(inner.family, start),
    [endKey]: formatIP(inner.family, end),
  };
}

const PoolList = v.looseObject({
  items: v.array(v.looseObject({ spec: v.looseObject({ cidr: text, disabled: isDedicated }) })),
});

/**
 * calico-ipam gives addresses of a subnet only where an IPPool has exactly that one.
 * @throws CniError 7 where there is none, 11 without the API; passes where pools cannot be listed
 */
async function checkPool(objects: Objects, subnet: string, what: string): Promise<void> {
  let answer: unknown;
  try {
    answer = await objects.get(["apis", "crd.projectcalico.org", "v1", "ippools"]);
  } catch (error) {
    const { statusOf } = await import("./client.ts");
    // Calico keeps its pools elsewhere, or we may not see them: its plugin will say.
    if ([403, 404].includes(statusOf(error) ?? 0)) return;
    throw error;
  }
  const { items } = parseObject(PoolList, answer, "list of IPPools");
  const isSame = (cidr: string) => contains(cidr, subnet) && contains(subnet, cidr);
  if (items.some(({ spec: { cidr, disabled } }) => !disabled && isSame(cidr))) return;
  throw invalid(what, `Calico has no enabled IPPool with cidr ${subnet}: create one first`);
}

/** Plugins that take their parent device as `master`; host-device takes it as `device`. */
const mastered = ["macvlan", "ipvlan", "vlan", "sriov"];

function withParent(list: NetworkConfigList, nic: string): NetworkConfigList {
  if (nic === "") return list;
  const plugins = list.plugins.map((plugin): PluginConfig => {
    const { type, master, device } = plugin;
    const isMaster = mastered.includes(type) || (type !== "host-device" && master !== undefined);
    if (isMaster) return { ...plugin, master: nic };
    return type === "host-device" || device !== undefined ? { ...plugin, device: nic } : plugin;
  });
  return { ...list, plugins };
}

/** How long an ADD waits for Multus' readiness file, in ms, and how often it looks. */
const readyWaitMs = 45_000;
const readyPollMs = 100;

/** Waits for the file by which Multus' default network says it is ready. @throws CniError 11 */
export async function waitUntilReady(host: Host, file: string, deadlineMs: number): Promise<void> {
  const untilMs = Math.min(deadlineMs, host.now() + readyWaitMs);
  while (!existsSync(file)) {
    if (host.now() >= untilMs || host.signal.aborted) {
      const message = `the default network is not ready, ${file} does not exist`;
      throw new CniError(code.tryAgainLater, `Cannot attach yet: ${message}`);
    }
    await Bun.sleep(readyPollMs);
  }
}
