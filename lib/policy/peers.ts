/**
 * Everything policies are decided on, ready to be asked: which pods a peer means, and at which
 * addresses. Pure. Built once for all pods of a node, which mostly ask the same: answers are kept.
 */
import { formatIP, parseSubnet, type Subnet, toNumber } from "../ip.ts";
import type { Policy, PolicyNamespace, PolicyNetwork, PolicyPod } from "./objects.ts";
import {
  type BlockPeer,
  compareText,
  type PodPeer,
  type PolicyPeer,
  type RulePort,
  type Selector,
  selects,
} from "./rules.ts";

/** What the API server knows, reduced. */
export interface PolicyInputs {
  policies: Policy[];
  pods: PolicyPod[];
  namespaces: PolicyNamespace[];
  networks: PolicyNetwork[];
}

/** Addresses of peers as nftables takes them, without overlap; the same ones are one object. */
export interface AddressSet {
  family: "ip" | "ip6";
  /** The elements are ranges and prefixes, not single addresses. */
  isInterval: boolean;
  elements: string;
}

/** The index over {@link PolicyInputs}. */
export type PolicyWorld = ReturnType<typeof policyWorld>;

/** Builds the index. Pods that ended, or live in the node's own netns, are nobody's peers. */
export function policyWorld(inputs: PolicyInputs) {
  const policies = inputs.policies.toSorted(
    (a, b) => compareText(a.kind, b.kind) || compareText(a.name, b.name),
  );
  // Sorted here, so that no list of addresses has to be.
  const ranked = inputs.pods
    .filter(({ hostNetwork, phase }) => !hostNetwork && phase !== "Succeeded" && phase !== "Failed")
    .map((pod) => [`${pod.namespace}/${pod.name} ${pod.uid}`, pod] as const);
  const pods = ranked.sort(([a], [b]) => compareText(a, b)).map(([, pod]) => pod);
  const members = new Map<string, PolicyPod[]>();
  for (const pod of pods) {
    for (const { network } of pod.attachments)
      members.getOrInsertComputed(network, () => []).push(pod);
  }
  // Of two with one name the logical network counts, since policies may be about that one.
  const isLogical = ({ kind }: PolicyNetwork) => Number(kind === "Logicalnetwork");
  const networks = inputs.networks.toSorted((a, b) => isLogical(a) - isLogical(b));
  return {
    /** By namespace, sorted by kind and name. */
    policies: Map.groupBy(policies, ({ namespace }) => namespace),
    /** Pods that can be peers, by namespace; by namespace and label; by network. */
    pods: Map.groupBy(pods, ({ namespace }) => namespace),
    labelled: new Map<string, Map<string, PolicyPod[]>>(),
    members,
    namespaces: new Map(inputs.namespaces.map((one) => [one.name, one])),
    networks: new Map(networks.map((one) => [`${one.namespace}/${one.name}`, one])),
    /** Pods by peer; addresses by the peers of a rule, by peers and scope, by networks. */
    kept: {
      pods: new Map<string, PolicyPod[]>(),
      rules: new Map<PolicyPeer[], Map<string, AddressSet[]>>(),
      addresses: new Map<string, AddressSet[]>(),
      /** Addresses as numbers. */
      numbers: new Map<string, bigint>(),
      /** By family, kind and elements. */
      sets: new Map<string, AddressSet>(),
    },
  };
}

/** The pods that a peer of a policy in this namespace means. */
export function peerPods(world: PolicyWorld, namespace: string, peer: PodPeer): PolicyPod[] {
  const { pods = [], namespaces } = peer;
  return world.kept.pods.getOrInsertComputed(
    JSON.stringify([namespaces ?? namespace, pods]),
    () => {
      const names =
        namespaces === undefined
          ? [namespace]
          : [...world.pods.keys()].filter((name) => isSelectedNamespace(world, namespaces, name));
      const all = names.flatMap((name) => candidates(world, name, pods));
      return pods.length === 0 ? all : all.filter(({ labels }) => selects(pods, labels));
    },
  );
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
  const byLabel = world.labelled.getOrInsertComputed(namespace, () => {
    const index = new Map<string, PolicyPod[]>();
    for (const pod of all) {
      for (const [key, value] of Object.entries(pod.labels)) {
        index.getOrInsertComputed(`${key}=${value}`, () => []).push(pod);
      }
    }
    return index;
  });
  return byLabel.get(`${exact[0]}=${exact[2][0]}`) ?? [];
}

/** Where the peers of a policy are met. */
export interface Scope {
  /** Of the policy, and of the pods that it names without a namespace. */
  namespace: string;
  networks: string[];
  /** Also at the pods' own addresses. */
  podIps: boolean;
}

/** Adds where a pod is met. Called for every peer of every rule, so plain loops. */
function addIps(to: Set<string>, { podIps, attachments }: PolicyPod, scope: Scope): void {
  if (scope.podIps) for (const ip of podIps) to.add(ip);
  for (const { network, ips } of attachments) {
    if (scope.networks.includes(network)) for (const ip of ips) to.add(ip);
  }
}

/** Up to here each peer has a set of its own, which other rules share; beyond, all have one. */
const setsMax = 8;

/** The addresses of all these peers. */
export function peerAddresses(world: PolicyWorld, peers: PolicyPeer[], scope: Scope): AddressSet[] {
  const byScope = world.kept.rules.getOrInsertComputed(peers, () => new Map());
  return byScope.getOrInsertComputed(JSON.stringify(scope), () => {
    const podPeers = podPeersOf(peers);
    const groups = podPeers.length <= setsMax ? podPeers.map((one) => [one]) : [podPeers];
    const hosts = groups.flatMap((group) => podSets(world, group, scope));
    const blocks = peers.filter((peer) => "block" in peer);
    return [...new Set([...hosts, ...blockSets(world, blocks)])];
  });
}

function podPeersOf(peers: PolicyPeer[]): PodPeer[] {
  return peers.filter((peer): peer is PodPeer => !("block" in peer));
}

function podSets(world: PolicyWorld, peers: PodPeer[], scope: Scope): AddressSet[] {
  const { namespace, ...where } = scope;
  const asked = peers.map(({ pods = [], namespaces }) => [namespaces ?? namespace, pods]);
  return world.kept.addresses.getOrInsertComputed(JSON.stringify([asked, where]), () => {
    const hosts = new Set<string>();
    for (const peer of peers) {
      for (const pod of peerPods(world, namespace, peer)) addIps(hosts, pod, scope);
    }
    return hostSets(world, hosts);
  });
}

/** The addresses of the pods among these peers that have a port of this name, by its number. */
export function namedPeers(world: PolicyWorld, port: RulePort, scope: Scope, peers?: PolicyPeer[]) {
  const byNumber = new Map<number, Set<string>>();
  const podPeers = peers ? podPeersOf(peers) : [{ namespaces: [] }];
  for (const pod of podPeers.flatMap((peer) => peerPods(world, scope.namespace, peer))) {
    for (const own of pod.ports) {
      if (own.name !== port.name || own.protocol !== port.protocol) continue;
      const ips = byNumber.getOrInsertComputed(own.port, () => new Set());
      addIps(ips, pod, scope);
    }
  }
  const sorted = [...byNumber].sort(([a], [b]) => a - b);
  return sorted.map(([number, ips]) => [number, hostSets(world, ips)] as const);
}

/**
 * The addresses of the logical networks of a scope: subnets, and what their pods have besides. A
 * subnet may be a part of one that plain pods share: what pods of other networks have is left out.
 */
export function networkAddresses(world: PolicyWorld, scope: Scope): AddressSet[] {
  const { networks } = scope;
  return world.kept.addresses.getOrInsertComputed(JSON.stringify(networks), () => {
    const parts = networks.flatMap((name) => {
      const block = world.networks.get(name)?.subnet ?? "";
      const subnet = parseSubnet(block);
      return subnet ? [{ ...subnet, block, except: [] as string[] }] : [];
    });
    const partOf = (ip: string) => {
      const number = world.kept.numbers.getOrInsertComputed(ip, () => toNumber(ip) ?? -1n);
      return parts.find(
        ({ family, base, size }) =>
          (family === 6) === ip.includes(":") && number >= base && number < base + size,
      );
    };
    const ips = new Set<string>();
    for (const pod of networks.flatMap((name) => world.members.get(name) ?? [])) {
      addIps(ips, pod, scope);
    }
    for (const pod of parts.length === 0 ? [] : [...world.pods.values()].flat()) {
      for (const ip of [...pod.podIps, ...pod.attachments.flatMap((one) => one.ips)]) {
        if (!ips.has(ip)) partOf(ip)?.except.push(`${ip}/${ip.includes(":") ? 128 : 32}`);
      }
    }
    const hosts = ips.values().filter((ip) => partOf(ip) === undefined);
    return [...hostSets(world, hosts), ...blockSets(world, parts)];
  });
}

/** Single addresses as sets, one for each family. */
export function hostSets(world: PolicyWorld, hosts: Iterable<string>): AddressSet[] {
  const { ip = [], ip6 = [] } = Object.groupBy(hosts, (one) => (one.includes(":") ? "ip6" : "ip"));
  return [...asSet(world, "ip", false, ip), ...asSet(world, "ip6", false, ip6)];
}

/** Blocks without their exceptions. nftables refuses intervals that overlap: they are merged. */
function blockSets(world: PolicyWorld, blocks: BlockPeer[]): AddressSet[] {
  return ([4, 6] as const).flatMap((family) => {
    const ranges = mergeRanges(blocks.flatMap((one) => blockRanges(one, family)));
    const texts = ranges.map((range) => formatRange(family, range));
    return asSet(world, family === 4 ? "ip" : "ip6", true, texts);
  });
}

/** An empty set is none. */
function asSet({ kept }: PolicyWorld, family: "ip" | "ip6", isInterval: boolean, list: string[]) {
  if (list.length === 0) return [];
  const elements = list.join(", ");
  const key = `${family} ${isInterval} ${elements}`;
  return [kept.sets.getOrInsert(key, { family, isInterval, elements })];
}

/** Numbers from the first to the last. */
export interface NumberRange {
  first: bigint;
  last: bigint;
}

/** What is left of a block; nothing where it is of the other family. */
function blockRanges({ block, except = [] }: BlockPeer, family: 4 | 6): NumberRange[] {
  const whole = parseSubnet(block);
  if (whole?.family !== family) return [];
  const rangeOf = ({ base, size }: Subnet) => ({ first: base, last: base + size - 1n });
  const holes = except.flatMap((one) => parseSubnet(one) ?? []);
  const left: NumberRange[] = [];
  let { first: at, last: end } = rangeOf(whole);
  for (const { first, last } of mergeRanges(holes.map(rangeOf))) {
    if (first > at) left.push({ first: at, last: first - 1n });
    if (last >= at) at = last + 1n;
  }
  return at > end ? left : [...left, { first: at, last: end }];
}

/** Ranges in order; those that overlap, or touch, become one. */
export function mergeRanges(ranges: NumberRange[]): NumberRange[] {
  const merged: NumberRange[] = [];
  for (const { first, last } of ranges.toSorted((a, b) => Number(a.first - b.first))) {
    const before = merged.at(-1);
    if (before === undefined || first > before.last + 1n) merged.push({ first, last });
    else if (last > before.last) before.last = last;
  }
  return merged;
}

/** As nftables lists it: a prefix where the range is one. */
function formatRange(family: 4 | 6, { first, last }: NumberRange): string {
  const size = last - first + 1n;
  const bits = size.toString(2).length - 1;
  if (size === 1n) return formatIP(family, first);
  if (size === 1n << BigInt(bits) && first % size === 0n) {
    return `${formatIP(family, first)}/${(family === 4 ? 32 : 128) - bits}`;
  }
  return `${formatIP(family, first)}-${formatIP(family, last)}`;
}
