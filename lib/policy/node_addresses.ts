/**
 * Which addresses are the node's. What it sends to its pods counts as the node (kubelet's probes),
 * whichever of its addresses that leaves with. The agent keeps them on record, for ADDs.
 */
import { dump, toAddress } from "../check.ts";
import { canonicalIP } from "../ip.ts";
import { readLinks } from "./host_ends.ts";
import type { Attached } from "./rulesets.ts";

/** What is known of the node, and of its pods. */
export interface NodeAddresses {
  /** The node's own. */
  ips: readonly string[];
  /** See {@link heldBy}. */
  held: ReadonlySet<string>;
}

/**
 * The addresses that count as the node to a pod, on its default network: the gateways there and all
 * of the node's own, but none that a pod of this node holds. That one would pass for the node.
 */
export function nodeIpsOf({ ips, held }: NodeAddresses, gateways: string[]): string[] {
  const all = [...gateways, ...ips].flatMap((ip) => canonicalIP(ip) ?? []);
  return all.filter((ip) => !held.has(ip));
}

/** The addresses of an attachment in its pod, and their gateways. */
export function ownIps({ attachment: { ifName }, result }: Attached) {
  return result.ips.flatMap(({ interface: index, address, gateway }) => {
    const name = index === undefined ? undefined : result.interfaces[index]?.name;
    if (name !== undefined && name !== ifName) return [];
    return [{ ip: address.replace(/\/.*/, ""), gateway }];
  });
}

/** The addresses that these pods hold. */
export function heldBy(made: readonly Attached[]): Set<string> {
  return new Set(made.flatMap(ownIps).map(({ ip }) => canonicalIP(ip) ?? ip));
}

const getAddress = 22;
/** Bytes of `struct ifaddrmsg`. */
const addressBytes = 8;
/** `RT_SCOPE_LINK`: from here on an address means something on one link, or on the node alone. */
const linkScope = 253;

/**
 * The addresses of the node's interfaces, sorted; undefined where the kernel cannot be asked. Those
 * of an interface that is down are left out: kube-proxy keeps there what is no node's (IPVS).
 */
export function readNodeIps(): string[] | undefined {
  const addresses = dump(getAddress, addressBytes);
  const up = new Set(readLinks().flatMap(({ index, isUp }) => (isUp ? [index] : [])));
  if (!addresses || up.size === 0) return undefined;
  const wide = addresses.filter(({ fixed }) => fixed.getUint8(3) < linkScope).flatMap(toAddress);
  const ips = wide.flatMap(({ index, ip }) => (up.has(index) ? [ip] : []));
  return [...new Set(ips)].sort();
}
