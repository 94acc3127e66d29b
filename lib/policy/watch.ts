/**
 * The inputs of network policy, watched: one watch per collection, each object reduced to what
 * policy needs, held in memory and written to the record in batches, so that an ADD finds them.
 * What an earlier agent wrote is where the first list starts from.
 */
import { type Host, log, toCniError } from "../cni.ts";
import type { State } from "../database.ts";
import { isObject } from "../json.ts";
import type { Kube } from "../kubernetes/client.ts";
import {
  type Item,
  newCounts,
  type Sink,
  type WatchCounts,
  type Watched,
  type WatchTiming,
  watchKind,
  watchTiming,
} from "../kubernetes/watch.ts";
import type { PolicyInputs } from "./compile.ts";
import {
  type Policy,
  parsePolicy,
  parsePolicyNamespace,
  parsePolicyNetwork,
  parsePolicyPod,
} from "./objects.ts";
import {
  type InputChange,
  type Inputs,
  neededResources,
  putAlive,
  putInputs,
  type Resource,
  readInputs,
} from "./store.ts";

/** How one collection is watched and reduced. */
interface Source {
  /** Group and version, the preferred one first; a custom resource may be absent. */
  groups: string[][];
  kind: string;
  reduce: (object: Item) => { namespace?: string; name: string } | undefined;
}

function reducePolicy(object: Item): Policy | undefined {
  const parsed = parsePolicy(object);
  return "policy" in parsed ? parsed.policy : undefined;
}

const multiGroups = [
  ["apis", "k8s.cni.cncf.io", "v1beta2"],
  ["apis", "k8s.cni.cncf.io", "v1beta1"],
];
const sources: Record<Resource, Source> = {
  networkpolicies: {
    groups: [["apis", "networking.k8s.io", "v1"]],
    kind: "NetworkPolicy",
    reduce: reducePolicy,
  },
  "multi-networkpolicies": {
    groups: multiGroups,
    kind: "MultiNetworkPolicy",
    reduce: reducePolicy,
  },
  pods: { groups: [["api", "v1"]], kind: "Pod", reduce: parsePolicyPod },
  namespaces: { groups: [["api", "v1"]], kind: "Namespace", reduce: parsePolicyNamespace },
  logicalnetworks: {
    groups: [["apis", "alpha.network.k8s.io", "v1"]],
    kind: "Logicalnetwork",
    reduce: parsePolicyNetwork,
  },
  "network-attachment-definitions": {
    groups: [["apis", "k8s.cni.cncf.io", "v1"]],
    kind: "NetworkAttachmentDefinition",
    reduce: parsePolicyNetwork,
  },
};
const custom: Resource[] = [
  "multi-networkpolicies",
  "logicalnetworks",
  "network-attachment-definitions",
];

function watchedOf(resource: Resource): Watched {
  const paths = sources[resource].groups.map((group) => [...group, resource]);
  return { what: resource, paths, mayBeAbsent: custom.includes(resource) };
}

/** API group and version of a kind, for Events about it. */
export function apiVersionOf(kind: string): string {
  const source = Object.values(sources).find((one) => one.kind === kind);
  return source?.groups[0]?.slice(1).join("/") ?? "";
}

/** What is known of one collection. */
interface Kept {
  objects: Map<string, { namespace: string; name: string; value: unknown }>;
  /** Listed since we began: what is held is all there is. */
  isListed: boolean;
  /** Named by the list that is under way. */
  named: Set<string>;
  /** When everything was known for the last time; 0 never, ms since the epoch. */
  aliveAtMs: number;
  writtenAtMs: number;
  counts: WatchCounts;
}

/** The inputs as they stand. */
export interface PolicyWatch {
  /** True once every collection was listed: before, rules are not to be changed. */
  isComplete: () => boolean;
  inputs: () => PolicyInputs;
  counts: ReadonlyMap<Resource, WatchCounts>;
  /** Changes that are not on record yet. */
  isDirty: () => boolean;
  /** Freshness that is on record is older than this. */
  isStale: (ageMs: number) => boolean;
  /** Writes what changed. Call inside a transaction; then `written`. */
  write: (state: State) => void;
  written: () => void;
  /** The record is another file: everything is to be written. */
  rewrite: () => void;
  /** Watches until the signal aborts. */
  run: (kube: Kube, signal: AbortSignal) => Promise<void>;
}

/**
 * Opens the inputs with what is on record; watches nothing yet.
 *
 * @param onChange called after each change that policy may depend on
 */
export function openPolicyWatch(
  host: Host,
  state: State,
  options: { enforce: boolean; maxAgeMs: number; onChange: () => void },
): PolicyWatch {
  const { enforce, maxAgeMs, onChange } = options;
  const resources = neededResources(enforce);
  const kept = new Map(resources.map((one) => [one, openKept(host, state, one)]));
  const dirty = new Map<string, InputChange>();
  const timing = { ...watchTiming, idleMs: Math.min(watchTiming.idleMs, maxAgeMs / 2) };
  const all = <R extends Resource>(resource: R): Inputs[R][] =>
    [...(kept.get(resource)?.objects.values() ?? [])].map(({ value }) => value as Inputs[R]);
  const note = (change: InputChange) => {
    dirty.set(`${change.resource} ${change.namespace}/${change.name}`, change);
    onChange();
  };
  return {
    isComplete: () => [...kept.values()].every(({ isListed }) => isListed),
    inputs: () => ({
      policies: [...all("networkpolicies"), ...all("multi-networkpolicies")],
      pods: all("pods"),
      namespaces: all("namespaces"),
      networks: [...all("logicalnetworks"), ...all("network-attachment-definitions")],
    }),
    counts: new Map([...kept].map(([resource, { counts }]) => [resource, counts])),
    isDirty: () => dirty.size > 0 || [...kept.values()].some(isNews),
    isStale: (ageMs) =>
      [...kept.values()].some(
        ({ aliveAtMs, writtenAtMs }) => Math.abs(aliveAtMs - writtenAtMs) >= ageMs,
      ),
    write: (to) => {
      putInputs(to, dirty.values());
      putAlive(to, new Map([...kept].flatMap(([name, one]) => aliveOf(name, one))));
    },
    written: () => {
      dirty.clear();
      for (const one of kept.values()) one.writtenAtMs = one.aliveAtMs;
    },
    rewrite: () => {
      for (const [resource, { objects }] of kept) {
        for (const { value, ...rest } of objects.values()) {
          note({ ...rest, resource, object: JSON.stringify(value) });
        }
      }
      for (const one of kept.values()) one.writtenAtMs = 0;
    },
    run: async (kube, signal) => {
      const watches = resources.map((resource) => {
        const one = kept.get(resource) ?? openKept(host, state, resource);
        const sink = makeSink(host, resource, one, note, onChange);
        const counts = one.counts;
        return watchOne(host, kube, watchedOf(resource), sink, { signal, counts, timing });
      });
      await Promise.all(watches);
    },
  };
}

function watchOne(
  host: Host,
  kube: Kube,
  watched: Watched,
  sink: Sink,
  options: { signal: AbortSignal; counts: WatchCounts; timing: WatchTiming },
): Promise<void> {
  return watchKind(host, kube, watched, sink, options);
}

/** Complete for the first time, as ADDs wait for it. */
function isNews({ aliveAtMs, writtenAtMs }: Kept): boolean {
  return writtenAtMs === 0 && aliveAtMs > 0;
}

function aliveOf(resource: Resource, { aliveAtMs }: Kept): [Resource, number][] {
  return aliveAtMs === 0 ? [] : [[resource, aliveAtMs]];
}

function openKept(host: Host, state: State, resource: Resource): Kept {
  const kept: Kept = {
    objects: new Map(),
    isListed: false,
    named: new Set(),
    aliveAtMs: 0,
    writtenAtMs: 0,
    counts: newCounts(),
  };
  try {
    for (const value of readInputs(state, resource)) {
      const { namespace = "", name } = value as { namespace?: string; name: string };
      kept.objects.set(`${namespace}/${name}`, { namespace, name, value });
    }
  } catch (error) {
    // The list to come replaces them.
    log(host, "warn", `Cannot read stored ${resource}: ${toCniError(error).message}`);
  }
  return kept;
}

/** Takes the objects of one collection. */
function makeSink(
  host: Host,
  resource: Resource,
  kept: Kept,
  note: (change: InputChange) => void,
  onChange: () => void,
): Sink {
  const { kind, reduce } = sources[resource];
  const remove = (key: string) => {
    const found = kept.objects.get(key);
    if (!found) return;
    kept.objects.delete(key);
    note({ resource, namespace: found.namespace, name: found.name, object: undefined });
  };
  return {
    begin: () => kept.named.clear(),
    put: (object) => {
      // Items of a list do not say their kind.
      const reduced = reduce({ ...object, kind });
      const key = keyOf(object);
      kept.named.add(key);
      if (!reduced) {
        kept.counts.garbage++;
        log(host, "debug", `Left out an object of ${resource} without a usable name`);
        remove(key);
        return;
      }
      const text = JSON.stringify(reduced);
      const known = kept.objects.get(key);
      if (known && JSON.stringify(known.value) === text) return;
      const { namespace = "", name } = reduced;
      kept.objects.set(key, { namespace, name, value: reduced });
      note({ resource, namespace, name, object: text });
    },
    remove: (object) => remove(keyOf(object)),
    listed: () => {
      for (const key of [...kept.objects.keys()]) if (!kept.named.has(key)) remove(key);
      kept.named.clear();
      kept.isListed = true;
      onChange();
    },
    alive: () => {
      // Before the first whole list what is held may be old.
      if (kept.isListed) kept.aliveAtMs = host.now();
      if (isNews(kept)) onChange();
    },
  };
}

function keyOf(object: Item): string {
  const metadata = isObject(object["metadata"]) ? object["metadata"] : {};
  return `${metadata["namespace"] ?? ""}/${metadata["name"] ?? ""}`;
}
