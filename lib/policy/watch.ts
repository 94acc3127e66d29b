/**
 * The inputs of network policy, watched: one watch per collection, each object reduced to what
 * policy needs, held in memory and written to the record in batches, so that an ADD finds them.
 * What an earlier agent wrote is where the first list starts from.
 */
import type { Host } from "../call.ts";
import { log, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import { isObject } from "../json.ts";
import type { Kube } from "../kubernetes/client.ts";
import { type Item, newCounts, type Sink, watchKind, watchTiming } from "../kubernetes/watch.ts";
import type { PolicyInputs } from "./compile.ts";
import {
  parsePolicy,
  parsePolicyNamespace,
  parsePolicyNetwork,
  parsePolicyPod,
} from "./objects.ts";
import {
  customResources,
  type InputChange,
  type Inputs,
  neededResources,
  putAlive,
  putInputs,
  type Resource,
  readInputs,
} from "./store.ts";

/** What is kept of an object: one of the {@link Inputs}. */
type Reduced = { namespace?: string; name: string };
/** How a collection is watched and reduced. The preferred version comes first. */
type Source = [kind: string, versions: string[], reduce: (object: Item) => Reduced | undefined];

const multiVersions = ["k8s.cni.cncf.io/v1beta2", "k8s.cni.cncf.io/v1beta1"];
const sources: Record<Resource, Source> = {
  networkpolicies: ["NetworkPolicy", ["networking.k8s.io/v1"], parsePolicy],
  "multi-networkpolicies": ["MultiNetworkPolicy", multiVersions, parsePolicy],
  pods: ["Pod", ["v1"], parsePolicyPod],
  namespaces: ["Namespace", ["v1"], parsePolicyNamespace],
  logicalnetworks: ["Logicalnetwork", ["alpha.network.k8s.io/v1"], parsePolicyNetwork],
  "network-attachment-definitions": [
    "NetworkAttachmentDefinition",
    ["k8s.cni.cncf.io/v1"],
    parsePolicyNetwork,
  ],
};

/** API group and version of a kind, for Events about it. */
export function apiVersionOf(kind: string): string {
  return Object.values(sources).find((one) => one[0] === kind)?.[1][0] ?? "";
}

/** Notes an object that changed: its JSON, undefined when it is gone. */
type Note = (resource: Resource, object: Reduced, json: string | undefined) => void;

/** What is known of one collection. */
type Collection = ReturnType<typeof openCollection>;

/**
 * Opens the inputs as they stand, with what is on record; watches nothing yet.
 * @param onChange called after each change that policy may depend on
 */
export function openPolicyWatch(
  host: Host,
  state: State,
  { enforce, maxAgeMs, onChange }: { enforce: boolean; maxAgeMs: number; onChange: () => void },
) {
  const all = neededResources(enforce).map((resource) => openCollection(host, state, resource));
  const dirty = new Map<string, InputChange>();
  const timing = { ...watchTiming, idleMs: Math.min(watchTiming.idleMs, maxAgeMs / 2) };
  const held = <R extends Resource>(resource: R): Inputs[R][] => {
    const found = all.find((one) => one.resource === resource);
    return [...(found?.objects.values() ?? [])] as Inputs[R][];
  };
  const note: Note = (resource, { namespace = "", name }, object) => {
    dirty.set(`${resource} ${namespace}/${name}`, { resource, namespace, name, object });
    onChange();
  };
  return {
    /** True once every collection was listed: before, rules are not to be changed. */
    isComplete: () => all.every(({ isListed }) => isListed),
    inputs: (): PolicyInputs => ({
      policies: [...held("networkpolicies"), ...held("multi-networkpolicies")],
      pods: held("pods"),
      namespaces: held("namespaces"),
      networks: [...held("logicalnetworks"), ...held("network-attachment-definitions")],
    }),
    counts: new Map(all.map(({ resource, counts }) => [resource, counts])),
    /** Writes what changed, or where the record is this far behind. @throws CniError 106 */
    flush: (to: State, behindMs: number) => {
      const isBehind = (one: Collection) =>
        isNews(one) || Math.abs(one.aliveAtMs - one.writtenAtMs) >= behindMs;
      if (dirty.size === 0 && !all.some(isBehind)) return;
      const alive = all.filter(({ aliveAtMs }) => aliveAtMs > 0);
      write(to, () => {
        putInputs(to, dirty.values());
        putAlive(to, new Map(alive.map(({ resource, aliveAtMs }) => [resource, aliveAtMs])));
      });
      dirty.clear();
      for (const one of all) one.writtenAtMs = one.aliveAtMs;
    },
    /** The record is another file: everything is to be written. */
    rewrite: () => {
      for (const one of all) {
        one.writtenAtMs = 0;
        for (const object of one.objects.values()) {
          note(one.resource, object, JSON.stringify(object));
        }
      }
    },
    /** Watches until the signal aborts. */
    run: async (kube: Kube, signal: AbortSignal): Promise<void> => {
      const watches = all.map((one) => {
        const sink = makeSink(host, one, note, onChange);
        const options = { sink, signal, counts: one.counts, timing };
        return watchKind(host, kube, watchedOf(one.resource), options);
      });
      await Promise.all(watches);
    },
  };
}

function watchedOf(what: Resource) {
  const paths = sources[what][1].map((version) => {
    return [version.includes("/") ? "apis" : "api", ...version.split("/"), what];
  });
  return { what, paths, mayBeAbsent: customResources.includes(what) };
}

/** Complete for the first time, as ADDs wait for it. */
function isNews({ aliveAtMs, writtenAtMs }: Collection): boolean {
  return writtenAtMs === 0 && aliveAtMs > 0;
}

function openCollection(host: Host, state: State, resource: Resource) {
  const objects = new Map<string, Reduced>();
  try {
    for (const value of readInputs(state, resource) as Reduced[]) {
      objects.set(`${value.namespace ?? ""}/${value.name}`, value);
    }
  } catch (error) {
    // The list to come replaces them.
    log(host, "warn", `Cannot read stored ${resource}: ${toCniError(error).message}`);
  }
  return {
    resource,
    objects,
    /** Listed since we began: what is held is all there is. */
    isListed: false,
    /** Keys that the list under way has had so far. */
    listed: new Set<string>(),
    /** When everything was known for the last time; 0 never, ms since the epoch. */
    aliveAtMs: 0,
    writtenAtMs: 0,
    counts: newCounts(),
  };
}

/** Takes the objects of one collection. */
function makeSink(host: Host, kept: Collection, note: Note, onChange: () => void): Sink {
  const { resource, objects, listed } = kept;
  const [kind, , reduce] = sources[resource];
  const remove = (key: string) => {
    const found = objects.get(key);
    if (!found) return;
    objects.delete(key);
    note(resource, found, undefined);
  };
  return {
    begin: () => listed.clear(),
    put: (object) => {
      // Items of a list do not say their kind.
      const reduced = reduce({ ...object, kind });
      const key = keyOf(object);
      listed.add(key);
      if (!reduced) {
        kept.counts.garbage++;
        log(host, "debug", `Left out an object of ${resource} without a usable name`);
        remove(key);
        return;
      }
      const text = JSON.stringify(reduced);
      if (JSON.stringify(objects.get(key)) === text) return;
      objects.set(key, reduced);
      note(resource, reduced, text);
    },
    remove: (object) => remove(keyOf(object)),
    listed: () => {
      for (const key of [...objects.keys()]) if (!listed.has(key)) remove(key);
      listed.clear();
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
