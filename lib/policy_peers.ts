/**
 * Everything policies are decided on, ready to be asked: which pods a peer means, and at which
 * addresses. Pure. Built once for all pods of a node; answers are kept, since policies of a
 * namespace and pods of a node mostly ask the same.
 */
import { formatIP, isIP, parseSubnet, type Subnet, toNumber } from "./ip.ts";
import type { Policy, PolicyNamespace, PolicyNetwork, PolicyPod } from "./policy_objects.ts";
import { compareText, type Peer, type Protocol, type Selector, selects } from "./policy_rules.ts";

/** What the API server knows, reduced. */
export interface PolicyInputs {
  policies: Policy[];
  pods: PolicyPod[];
  namespaces: PolicyNamespace[];
  networks: PolicyNetwork[];
}

/** Addresses of peers as nftables takes them, sorted and without overlap. */
export interface Addresses {
  /** Single addresses. */
  hosts4: string;
  hosts6: string;
  /** Ranges and prefixes. */
  blocks4: string;
  blocks6: string;
}

/** The index over {@link PolicyInputs}. */
export interface PolicyWorld {
  /** By namespace, sorted by kind and name. */
  policies: Map<string, Policy[]>;
  /** Pods that can be peers, by namespace. */
  pods: Map<string, PolicyPod[]>;
  namespaces: Map<string, PolicyNamespace>;
  /** By `namespace/name`. */
  networks: Map<string, PolicyNetwork>;
  /** Pods by the networks they are attached to. */
  members: Map<string, PolicyPod[]>;
  /** Pods by namespace and one label, `key=value`. */
  labelled: Map<string, Map<string, PolicyPod[]>>;
  kept: { pods: Map<string, PolicyPod[]>; addresses: Map<string, Addresses> };
}

/** Builds the index. Pods that ended, or live in the node's own netns, are nobody's peers. */
export function policyWorld(inputs: PolicyInputs): PolicyWorld {
  const world: PolicyWorld = {
    policies: new Map(),
    pods: new Map(),
    namespaces: new Map(inputs.namespaces.map((one) => [one.name, one])),
    networks: new Map(inputs.networks.map((one) => [`${one.namespace}/${one.name}`, one])),
    members: new Map(),
    labelled: new Map(),
    kept: { pods: new Map(), addresses: new Map() },
  };
  for (const policy of inputs.policies) append(world.policies, policy.namespace, policy);
  for (const policies of world.policies.values()) {
    policies.sort((a, b) => compareText(a.kind, b.kind) || compareText(a.name, b.name));
  }
  for (const pod of inputs.pods) {
    if (pod.hostNetwork || pod.phase === "Succeeded" || pod.phase === "Failed") continue;
    append(world.pods, pod.namespace, pod);
    for (const { network } of pod.attachments) append(world.members, network, pod);
  }
  return world;
}

function append<T>(map: Map<string, T[]>, key: string, value: T): void {
  const list = map.get(key);
  if (list) list.push(value);
  else map.set(key, [value]);
}

/** The pods that a peer of a policy in this namespace means. */
export function peerPods(
  world: PolicyWorld,
  namespace: string,
  { pods = [], namespaces }: { pods?: Selector; namespaces?: Selector },
): PolicyPod[] {
  const key = JSON.stringify([namespaces ?? namespace, pods]);
  const kept = world.kept.pods.get(key);
  if (kept) return kept;
  const names =
    namespaces === undefined
      ? [namespace]
      : [...world.pods.keys()].filter((name) => isSelectedNamespace(world, namespaces, name));
  const found = names.flatMap((name) =>
    candidates(world, name, pods).filter(({ labels }) => selects(pods, labels)),
  );
  world.kept.pods.set(key, found);
  return found;
}

/** Of a namespace whose labels we do not know only "all namespaces" is true. */
function isSelectedNamespace(world: PolicyWorld, selector: Selector, name: string): boolean {
  if (selector.length === 0) return true;
  const known = world.namespaces.get(name);
  return known !== undefined && selects(selector, known.labels);
}

/** The pods of a namespace, narrowed down by one label where the selector asks for one value. */
function candidates(world: PolicyWorld, namespace: string, selector: Selector): PolicyPod[] {
  const all = world.pods.get(namespace) ?? [];
  const exact = selector.find(([, operator, values]) => operator === "In" && values.length === 1);
  if (exact === undefined || all.length < 32) return all;
  let byLabel = world.labelled.get(namespace);
  if (!byLabel) {
    byLabel = new Map();
    for (const pod of all) {
      for (const [key, value] of Object.entries(pod.labels))
        append(byLabel, `${key}=${value}`, pod);
    }
    world.labelled.set(namespace, byLabel);
  }
  return byLabel.get(`${exact[0]}=${exact[2][0]}`) ?? [];
}

/**
 * Where peers are met: on these networks; with `podIps` also at the pods' own addresses.
 */
export interface Scope {
  networks: string[];
  podIps: boolean;
}

function ipsOf({ podIps, attachments }: PolicyPod, scope: Scope): string[] {
  const attached = attachments.flatMap(({ network, ips }) =>
    scope.networks.includes(network) ? ips : [],
  );
  return scope.podIps ? [...podIps, ...attached] : attached;
}

/** The addresses of all these peers. */
export function peerAddresses(
  world: PolicyWorld,
  namespace: string,
  peers: Peer[],
  scope: Scope,
): Addresses {
  const key = JSON.stringify([namespace, peers, scope]);
  const kept = world.kept.addresses.get(key);
  if (kept) return kept;
  const hosts = new Set<string>();
  const blocks: Subnet[] = [];
  const holes: Subnet[][] = [];
  for (const peer of peers) {
    if ("block" in peer) {
      const block = parseSubnet(peer.block);
      if (block === undefined) continue;
      blocks.push(block);
      holes.push((peer.except ?? []).map(parseSubnet).filter((one) => one !== undefined));
    } else {
      for (const pod of peerPods(world, namespace, peer)) {
        for (const ip of ipsOf(pod, scope)) hosts.add(ip);
      }
    }
  }
  const found = { ...hostTexts([...hosts]), ...blockTexts(blocks, holes) };
  world.kept.addresses.set(key, found);
  return found;
}

/** The addresses of the pods among these peers that have a port of this name, by its number. */
export function namedPeers(
  world: PolicyWorld,
  namespace: string,
  peers: Peer[] | undefined,
  port: { name: string; protocol: Protocol },
  scope: Scope,
): Map<number, Addresses> {
  const everybody: Peer[] = [{ namespaces: [] }];
  const byNumber = new Map<number, Set<string>>();
  for (const peer of peers ?? everybody) {
    if ("block" in peer) continue;
    for (const pod of peerPods(world, namespace, peer)) {
      for (const { name, protocol, port: number } of pod.ports) {
        if (name !== port.name || protocol !== port.protocol) continue;
        const ips = byNumber.get(number) ?? new Set();
        for (const ip of ipsOf(pod, scope)) ips.add(ip);
        byNumber.set(number, ips);
      }
    }
  }
  const sorted = [...byNumber].sort(([a], [b]) => a - b);
  return new Map(
    sorted.map(([number, ips]) => [number, { ...hostTexts([...ips]), ...blockTexts([], []) }]),
  );
}

/** The addresses of logical networks: their subnets, and what their pods have besides. */
export function networkAddresses(world: PolicyWorld, networks: string[]): Addresses {
  const key = JSON.stringify(networks);
  const kept = world.kept.addresses.get(key);
  if (kept) return kept;
  const subnets = networks.flatMap((name) => parseSubnet(world.networks.get(name)?.subnet ?? ""));
  const blocks = subnets.filter((one) => one !== undefined);
  const scope = { networks, podIps: false };
  const pods = networks.flatMap((name) => world.members.get(name) ?? []);
  const isInside = (ip: string) => {
    const number = toNumber(ip) ?? 0n;
    return blocks.some(
      ({ family, base, size }) => family === isIP(ip) && number >= base && number < base + size,
    );
  };
  const hosts = new Set(pods.flatMap((pod) => ipsOf(pod, scope)).filter((ip) => !isInside(ip)));
  const found = {
    ...hostTexts([...hosts]),
    ...blockTexts(
      blocks,
      blocks.map(() => []),
    ),
  };
  world.kept.addresses.set(key, found);
  return found;
}

function hostTexts(ips: string[]): { hosts4: string; hosts6: string } {
  const sorted = ips.sort();
  return {
    hosts4: sorted.filter((ip) => !ip.includes(":")).join(", "),
    hosts6: sorted.filter((ip) => ip.includes(":")).join(", "),
  };
}

/** nftables refuses intervals that overlap, so we merge. `holes[i]` are those of `blocks[i]`. */
function blockTexts(blocks: Subnet[], holes: Subnet[][]): { blocks4: string; blocks6: string } {
  const parts = blocks.flatMap((block, i) => pierce(block, holes[i] ?? []));
  const text = (family: 4 | 6) =>
    merge(parts.filter((part) => part.family === family))
      .map((range) => formatRange(family, range))
      .join(", ");
  return { blocks4: text(4), blocks6: text(6) };
}

interface Range {
  first: bigint;
  last: bigint;
}

/** What is left of a block. */
function pierce(block: Subnet, holes: Subnet[]): (Range & { family: 4 | 6 })[] {
  const { family } = block;
  const end = block.base + block.size;
  const parts: (Range & { family: 4 | 6 })[] = [];
  let at = block.base;
  const asRange = ({ base, size }: Subnet) => ({ first: base, last: base + size - 1n });
  for (const { first, last } of merge(holes.map(asRange))) {
    if (first > at) parts.push({ family, first: at, last: first - 1n });
    if (last >= at) at = last + 1n;
  }
  if (at < end) parts.push({ family, first: at, last: end - 1n });
  return parts;
}

function merge(ranges: Range[]): Range[] {
  const sorted = [...ranges].sort((a, b) => (a.first < b.first ? -1 : a.first > b.first ? 1 : 0));
  const merged: Range[] = [];
  for (const { first, last } of sorted) {
    const before = merged.at(-1);
    if (before === undefined || first > before.last + 1n) merged.push({ first, last });
    else if (last > before.last) before.last = last;
  }
  return merged;
}

/** As nftables lists it: a prefix where the range is one. */
function formatRange(family: 4 | 6, { first, last }: Range): string {
  const width = family === 4 ? 32 : 128;
  const size = last - first + 1n;
  const bits = size.toString(2).length - 1;
  if (size === 1n) return formatIP(family, first);
  if (size === 1n << BigInt(bits) && first % size === 0n) {
    return `${formatIP(family, first)}/${width - bits}`;
  }
  return `${formatIP(family, first)}-${formatIP(family, last)}`;
}
