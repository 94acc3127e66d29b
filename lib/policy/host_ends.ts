/**
 * The node's ends of a pod's interfaces, for `policy.where = "host"`, as the kernel tells them:
 * a veth whose two ends name each other. What a plugin lists is not asked, for many list none, and
 * what it lists may be another pod's. What ADD finds is kept: later a process in the pod that has
 * CAP_NET_ADMIN can rename its interface, or move it away.
 * Source: rtnetlink(7); if_link.h and net_namespace.h of Linux.
 */
import { closeSync, openSync, readFileSync } from "node:fs";
import { dump, parseAttributes } from "../check.ts";
import type { Config } from "../config/schema.ts";
import { type State, write } from "../database.ts";
import { inNetns, isForeignNetns } from "../kernel.ts";
import type { HostEnd } from "./compile.ts";
import type { Attached, NetnsPlace } from "./rulesets.ts";
import { putInputs, readInputs } from "./store.ts";

/** The end of each interface, by its name in the pod; null: it has none. */
export type HostEnds = Map<string, HostEnd | null>;

/**
 * The ends where rules belong; none where they belong in the pod. What is still being attached has
 * no entry either: its rules stand in the pod before it comes, and its ADD finds the end.
 */
export function hostEndsOf(
  state: State,
  where: Config["policy"]["where"],
  { netnsId, netns }: NetnsPlace,
  made: readonly Attached[],
): HostEnds {
  if (where === "pod") return new Map();
  // One that was kept may be of an interface that is gone.
  const onNode = readFileSync("/proc/self/net/dev", "utf8").split(/[\s:]+/);
  const kept = readInputs(state, "host-ends", [netnsId]);
  const there = kept.filter(({ end }) => onNode.includes(end.ifName));
  const ends: HostEnds = new Map(there.map(({ name, end }) => [name, end]));
  for (const { ifName, state: at } of made.map((one) => one.attachment)) {
    if (at === "planned") ends.delete(ifName);
    else ends.getOrInsertComputed(ifName, () => findHostEnd(netns, ifName));
  }
  return ends;
}

/** Asks the kernel for the ends of what an ADD made, and keeps them. @throws CniError 106 */
export function keepHostEnds(state: State, place: NetnsPlace, made: readonly Attached[]): void {
  const resource = "host-ends";
  const rows = made.map(({ attachment: { ifName: name } }) => {
    const end = findHostEnd(place.netns, name);
    const object = end ? JSON.stringify({ name, end }) : undefined;
    return { resource, namespace: place.netnsId, name, object } as const;
  });
  const gone = "namespace NOT IN (SELECT netns_id FROM attachments)";
  write(state, () => {
    state.database.query(`DELETE FROM policy_inputs WHERE resource = ? AND ${gone}`).run(resource);
    putInputs(state, rows);
  });
}

const [getLink, getNetnsId] = [18, 90];
/** Bytes of `struct ifinfomsg`, and of `struct rtgenmsg` with what aligns it. */
const [linkBytes, netnsIdBytes] = [16, 4];
/** `IFLA_IFNAME`, `IFLA_LINK`, `IFLA_LINKINFO`, `IFLA_LINK_NETNSID`. */
const [linkName, linkPeer, linkInfo, linkPeerNetns] = [3, 5, 18, 37];
/** `IFLA_INFO_KIND`, `IFLA_INFO_SLAVE_KIND`. */
const [infoKind, infoSlaveKind] = [1, 4];
/** `IFF_UP`. */
const up = 1;
/** `NETNSA_NSID`, `NETNSA_FD`. */
const [netnsNumber, netnsFile] = [1, 3];

/** The end of an interface on the node; null where it has none, or the kernel cannot be asked. */
function findHostEnd(netns: string, ifName: string): HostEnd | null {
  if (!isForeignNetns(netns)) return null;
  const own = openSync("/proc/self/ns/net", "r");
  try {
    const inside = inNetns(netns, () => {
      // A link that is shown gives the namespace of its peer a number: so the links come first.
      const link = readLinks().find(({ name }) => name === ifName);
      const question = new Uint8Array(Int32Array.of(0, (netnsFile << 16) | 8, own).buffer);
      const [answer] = dump(getNetnsId, netnsIdBytes, question) ?? [];
      return { link, node: numberOf(answer?.attributes.get(netnsNumber)) };
    });
    const link = inside?.link;
    // The index of a peer means nothing in another namespace than its own: there it is some link.
    if (link?.kind !== "veth" || link.peerNetns < 0 || link.peerNetns !== inside?.node) return null;
    const end = readLinks().find(({ index }) => index === link.peer);
    if (end?.kind !== "veth" || end.peer !== link.index) return null;
    // Packets of a port of Open vSwitch and its like are seen by no table of ours.
    if (!["", "bridge", "vrf"].includes(end.slaveKind)) return null;
    return { ifName: end.name, bridged: end.slaveKind === "bridge" };
  } finally {
    closeSync(own);
  }
}

/** The interfaces of the namespace that this thread is in. */
export function readLinks() {
  return (dump(getLink, linkBytes) ?? []).map(({ fixed, attributes }) => {
    const info = parseAttributes(attributes.get(linkInfo) ?? new Uint8Array(), 0);
    return {
      index: fixed.getInt32(4, true),
      isUp: (fixed.getUint32(8, true) & up) !== 0,
      name: textOf(attributes.get(linkName)),
      kind: textOf(info.get(infoKind)),
      slaveKind: textOf(info.get(infoSlaveKind)),
      peer: numberOf(attributes.get(linkPeer)),
      peerNetns: numberOf(attributes.get(linkPeerNetns)),
    };
  });
}

function textOf(bytes?: Uint8Array): string {
  return new TextDecoder().decode(bytes).replace(/\0.*$/s, "");
}

/** NaN where there is none: it equals nothing. */
function numberOf(bytes?: Uint8Array): number {
  return bytes?.length === 4 ? (new Int32Array(bytes.slice().buffer)[0] ?? Number.NaN) : Number.NaN;
}
