/**
 * Everything policies are decided on, ready to be asked: which pods a peer means, and at which
 * addresses. Pure. Built once for all pods of a node; answers are kept, since policies of a
 * namespace and pods of a node mostly ask the same.
 */
import { formatIP, isIP, parseSubnet, type Subnet, toNumber } from "../ip.ts";
import type { Policy, PolicyNamespace, PolicyNetwork, PolicyPod } from "./objects.ts";
import { compareText, type Peer, type Protocol, type Selector, selects } from "./rules.ts";

/** What the API server knows, reduced. */
export interface PolicyInputs {
  policies: Policy[];
  pods: PolicyPod[];
  namespaces: PolicyNamespace[];
  networks: PolicyNetwork[];
}

/** What a set of nftables holds; `blocks` are ranges and prefixes. */
export type SetKind = "hosts4" | "blocks4" | "hosts6" | "blocks6";

/** Addresses of peers as nftables takes them, without overlap; two with one `id` are the same. */
export interface AddressSet {
  id: number;
  kind: SetKind;
  elements: string;
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
  kept: {
    pods: Map<string, PolicyPod[]>;
    /** By peers as they stand in a rule, then by scope. */
    rules: Map<Peer[], Map<string, AddressSet[]>>;
    /** By peer and scope, or by networks. */
    addresses: Map<string, AddressSet[]>;
    /** By kind and elements. */
    sets: Map<string, AddressSet>;
  };
}

/** Builds the index. Pods that ended, or live in the node's own netns, are nobody's peers. */
export function policyWorld(inputs: PolicyInputs): PolicyWorld {
  const world: PolicyWorld = {
    policies: new Map(),
    pods: new Map(),
    namespaces: new Map(inputs.namespaces.map((one) => [one.name, one])),
    networks: byName(inputs.networks),
    members: new Map(),
    labelled: new Map(),
    kept: { pods: new Map(), rules: new Map(), addresses: new Map(), sets: new Map() },
  };
  for (const policy of inputs.policies) append(world.policies, policy.namespace, policy);
  for (const policies of world.policies.values()) {
    policies.sort((a, b) => compareText(a.kind, b.kind) || compareText(a.name, b.name));
  }
  // In an order of their own, so that no list of addresses has to be sorted.
  const rank = ({ namespace, name, uid }: PolicyPod) => `${namespace}/${name} ${uid}`;
  const ranked = inputs.pods.map((pod) => [rank(pod), pod] as const);
  for (const [, pod] of ranked.sort(([a], [b]) => compareText(a, b))) {
    if (pod.hostNetwork || pod.phase === "Succeeded" || pod.phase === "Failed") continue;
    append(world.pods, pod.namespace, pod);
    for (const { network } of pod.attachments) append(world.members, network, pod);
  }
  return world;
}

/** Of two with one name it is the logical network: policies may be about that one. */
function byName(networks: PolicyNetwork[]): Map<string, PolicyNetwork> {
  const all = new Map<string, PolicyNetwork>();
  for (const one of networks) {
    const key = `${one.namespace}/${one.name}`;
    if (one.kind === "Logicalnetwork" || !all.has(key)) all.set(key, one);
  }
  return all;
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
  const found: PolicyPod[] = [];
  for (const name of names) {
    for (const pod of candidates(world, name, pods)) {
      if (pods.length === 0 || selects(pods, pod.labels)) found.push(pod);
    }
  }
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
export function peerAddresses(
  world: PolicyWorld,
  namespace: string,
  peers: Peer[],
  scope: Scope,
): AddressSet[] {
  const scopeKey = JSON.stringify(scope);
  const byScope = world.kept.rules.get(peers) ?? new Map<string, AddressSet[]>();
  world.kept.rules.set(peers, byScope);
  const kept = byScope.get(scopeKey);
  if (kept) return kept;
  const selectors = peers.flatMap((peer) => ("block" in peer ? [] : [peer]));
  const groups = selectors.length <= setsMax ? selectors.map((one) => [one]) : [selectors];
  const hosts = groups.flatMap((group) => podSets(world, namespace, group, scope));
  const blocks = peers.flatMap((peer) => ("block" in peer ? [peer] : []));
  const found = [...new Set([...hosts, ...blockSets(world, blocks)])];
  byScope.set(scopeKey, found);
  return found;
}

function podSets(
  world: PolicyWorld,
  namespace: string,
  peers: { pods?: Selector; namespaces?: Selector }[],
  scope: Scope,
): AddressSet[] {
  const named = peers.map(({ pods = [], namespaces }) => [namespaces ?? namespace, pods]);
  return keep(world, JSON.stringify([named, scope]), () => {
    const hosts = new Set<string>();
    for (const peer of peers) {
      for (const pod of peerPods(world, namespace, peer)) {
        addIps(hosts, pod, scope);
      }
    }
    return hostSets(world, hosts);
  });
}

function keep(world: PolicyWorld, key: string, make: () => AddressSet[]): AddressSet[] {
  const kept = world.kept.addresses.get(key) ?? make();
  world.kept.addresses.set(key, kept);
  return kept;
}

function blockSets(
  world: PolicyWorld,
  peers: { block: string; except?: string[] }[],
): AddressSet[] {
  const parts = peers.flatMap(({ block, except = [] }) => {
    const whole = parseSubnet(block);
    const holes = except.map(parseSubnet).filter((one) => one !== undefined);
    return whole === undefined ? [] : pierce(whole, holes);
  });
  return rangeSets(world, parts);
}

/** The addresses of the pods among these peers that have a port of this name, by its number. */
export function namedPeers(
  world: PolicyWorld,
  namespace: string,
  peers: Peer[] | undefined,
  port: { name: string; protocol: Protocol },
  scope: Scope,
): Map<number, AddressSet[]> {
  const everybody: Peer[] = [{ namespaces: [] }];
  const byNumber = new Map<number, Set<string>>();
  for (const peer of peers ?? everybody) {
    if ("block" in peer) continue;
    for (const pod of peerPods(world, namespace, peer)) {
      for (const { name, protocol, port: number } of pod.ports) {
        if (name !== port.name || protocol !== port.protocol) continue;
        const ips = byNumber.get(number) ?? new Set();
        addIps(ips, pod, scope);
        byNumber.set(number, ips);
      }
    }
  }
  const sorted = [...byNumber].sort(([a], [b]) => a - b);
  return new Map(sorted.map(([number, ips]) => [number, hostSets(world, ips)]));
}

/** The addresses of logical networks: their subnets, and what their pods have besides. */
export function networkAddresses(world: PolicyWorld, networks: string[]): AddressSet[] {
  return keep(world, JSON.stringify(networks), () => {
    const subnets = networks.map((name) => parseSubnet(world.networks.get(name)?.subnet ?? ""));
    const blocks = subnets.filter((one) => one !== undefined);
    const isInside = (ip: string) => {
      const number = toNumber(ip) ?? 0n;
      return blocks.some(
        ({ family, base, size }) => family === isIP(ip) && number >= base && number < base + size,
      );
    };
    const pods = networks.flatMap((name) => world.members.get(name) ?? []);
    const ips = new Set<string>();
    for (const pod of pods) addIps(ips, pod, { networks, podIps: false });
    const hosts = new Set([...ips].filter((ip) => !isInside(ip)));
    return [
      ...hostSets(world, hosts),
      ...rangeSets(
        world,
        blocks.flatMap((block) => pierce(block, [])),
      ),
    ];
  });
}

function hostSets(world: PolicyWorld, hosts: Set<string>): AddressSet[] {
  const v4: string[] = [];
  const v6: string[] = [];
  for (const ip of hosts) (ip.includes(":") ? v6 : v4).push(ip);
  return [...asSet(world, "hosts4", v4), ...asSet(world, "hosts6", v6)];
}

/** nftables refuses intervals that overlap, so they are merged. */
function rangeSets(world: PolicyWorld, parts: FamilyRange[]): AddressSet[] {
  return ([4, 6] as const).flatMap((family) => {
    const ranges = merge(parts.filter((part) => part.family === family));
    const texts = ranges.map((range) => formatRange(family, range));
    return asSet(world, family === 4 ? "blocks4" : "blocks6", texts);
  });
}

/** An empty set is none. */
function asSet({ kept }: PolicyWorld, kind: SetKind, elements: string[]): AddressSet[] {
  if (elements.length === 0) return [];
  const text = elements.join(", ");
  const key = `${kind} ${text}`;
  const set = kept.sets.get(key) ?? { id: kept.sets.size, kind, elements: text };
  kept.sets.set(key, set);
  return [set];
}

interface Range {
  first: bigint;
  last: bigint;
}

type FamilyRange = Range & { family: 4 | 6 };

/** What is left of a block. */
function pierce(block: Subnet, holes: Subnet[]): FamilyRange[] {
  const { family } = block;
  const end = block.base + block.size;
  const parts: FamilyRange[] = [];
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
