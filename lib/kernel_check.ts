/**
 * What is gone of an attachment: its result against what the kernel has. Pure. Plugins differ in
 * what they look at in CHECK, and many look at nothing; so genie looks itself.
 *
 * An alarm that is false fails a healthy pod, so what plugins do with their own is no reason for
 * one: a route may stand in any table (sbr moves them), with any metric, an address with any prefix
 * length, and a network whose interface is not the kernel's (user space, a passed device) is not
 * looked at. Gateways and hardware addresses are compared where the reference plugins report them:
 * of others some name a gateway that is the cloud's, not the kernel's.
 */
import { canonicalIP, formatSubnet, parseSubnet } from "./ip.ts";
import type { NetworkConfigList } from "./netconf.ts";
import type { KernelNetwork } from "./netlink.ts";
import type { Result } from "./result.ts";

/** An attachment, as far as this needs it. */
export interface Looked {
  ifName: string;
  list: NetworkConfigList;
  /** The device of a device plugin that it was given. */
  device?: object;
}

/** Plugins that only give addresses: a network of one alone has no interface. */
const ipamTypes = new Set(["host-local", "static", "dhcp", "whereabouts"]);
/** Reference plugins that make interfaces: their results say what the kernel has. */
const exactTypes = new Set(["bridge", "ptp", "macvlan", "ipvlan", "vlan", "host-device", "dummy"]);
/** Keys by which a config passes a device, which may belong to a driver in user space. */
const deviceKeys = ["deviceID", "pciBusID", "vhostConf", "host", "container"];

/**
 * What is not there any more, in words: `address 10.1.0.5/16`.
 * @param kernel of the pod's network namespace
 */
export function findGone(looked: Looked, result: Result, kernel: KernelNetwork): string[] {
  const { ifName, list } = looked;
  const [first] = list.plugins;
  if (list.disableCheck || !first || ipamTypes.has(first.type)) return [];
  const said = result.interfaces.find(({ name, sandbox }) => name === ifName && sandbox);
  if (said?.socketPath !== undefined) return [];
  const link = kernel.links.find(({ name }) => name === ifName);
  if (!link) return mayBeElsewhere(looked) ? [] : [`interface "${ifName}"`];
  const isExact = exactTypes.has(first.type);
  const mac = isExact ? (said?.mac ?? "") : "";
  const isOther = mac !== "" && mac.toLowerCase() !== link.mac;
  return [
    ...(isOther ? [`interface "${ifName}" of address ${mac}, another one has its name`] : []),
    ...goneAddresses(ifName, result, kernel).map((address) => `address ${address}`),
    ...goneRoutes(result, kernel, isExact).map((route) => `route ${route}`),
  ];
}

/** A device may be driven from user space, where the kernel has no interface of it. */
function mayBeElsewhere({ device, list }: Looked): boolean {
  return (
    device !== undefined ||
    list.plugins.some((plugin) => deviceKeys.some((key) => plugin[key] !== undefined))
  );
}

/** Addresses of the result that no interface of their name has. */
function goneAddresses(ifName: string, result: Result, kernel: KernelNetwork): string[] {
  const { interfaces, ips } = result;
  const indexes = new Map(kernel.links.map(({ name, index }) => [name, index]));
  return ips.flatMap(({ address, interface: at }) => {
    const on = at === undefined ? undefined : interfaces[at];
    // Of the node's end, or of a machine inside the pod.
    if (on && (!on.sandbox || !indexes.has(on.name))) return [];
    const index = indexes.get(on?.name ?? ifName);
    const ip = canonicalIP(address.replace(/\/.*/, ""));
    const isThere = kernel.addresses.some((one) => one.index === index && one.ip === ip);
    return isThere ? [] : [address];
  });
}

/** Routes of the result that no table has. */
function goneRoutes(result: Result, kernel: KernelNetwork, isExact: boolean): string[] {
  return result.routes.flatMap(({ dst, gw }) => {
    const subnet = parseSubnet(dst);
    if (!subnet) return [];
    const wanted = formatSubnet(subnet);
    const gateway = gw === undefined || !isExact ? undefined : canonicalIP(gw);
    const isThere = kernel.routes.some(
      (route) =>
        route.dst === wanted && (gateway === undefined || route.gateways.includes(gateway)),
    );
    return isThere ? [] : [gw === undefined ? dst : `${dst} via ${gw}`];
  });
}

/** Where a pod's attachment is put right. */
export function repairCommand(pod: { namespace: string; name: string }, network: string): string {
  if (pod.namespace === "" || pod.name === "") return "";
  return `genie repair ${pod.namespace}/${pod.name} --network ${network}`;
}
