/**
 * What a pod is to be attached to, by name, before any config is read: the primary set by the first
 * rule that applies, then what comes on top; and which interface each gets. Source: design D3.
 */
import {
  attachmentsMax,
  npwgKeys,
  parseElements,
  parseSelection,
  type SelectionElement,
} from "./annotations.ts";
import { CniError, code } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import type { NetworkElement } from "./kubernetes/npwg.ts";
import {
  delegatesToOurself,
  listNetworks,
  type Network,
  type PluginSearch,
  tableNetworks,
} from "./networks.ts";
import type { Pod } from "./pod.ts";

/** Where the config of a wanted network is found. */
export type WantedFrom =
  /** The plugin table, or the node's disk. */
  | "node"
  /** A NetworkAttachmentDefinition. */
  | "definition"
  /** A Logicalnetwork. */
  | "logical"
  /** By Multus' rules: an object, a name on disk, a folder or a file. */
  | "multus";

/** One network a pod is to have. */
export interface Wanted extends SelectionElement {
  from: WantedFrom;
  /** Namespace of the object, for those that are objects. */
  namespace: string;
  /** For people: which rule or annotation brought it. */
  reason: string;
  capabilityArgs?: Record<string, unknown>;
  cniArgs?: Record<string, unknown>;
  defaultRoute?: string[];
  /** Not of the primary set. */
  isFurther?: true;
}

/** The name by which an attachment to it is on record. */
export function nameOfWanted({ from, namespace, network }: Wanted): string {
  return from === "node" || from === "multus" ? network : `${namespace}/${network}`;
}

/** What decided the primary set; `cni` and `logical` lead to CNI-Genie's own status annotation. */
export type Decision = "default-network" | "cni" | "logical" | "choice" | "default";

/** Everything a pod is to have, in order. Of a choice the primary set is still empty. */
export interface WantedSet {
  decision: Decision;
  primarySet: Wanted[];
  further: Wanted[];
}

/**
 * Reads what a pod is to have from its annotations and the configuration.
 *
 * @throws CniError 7 for malformed annotations, or when there is nothing to choose by; 101 when
 *   there is no network at all
 */
export async function selectWanted(config: Config, pod: Pod): Promise<WantedSet> {
  const { decision, primarySet } = await selectPrimarySet(config, pod);
  const networks = pod.annotations.get(npwgKeys.networks) ?? "";
  const asked = (await parseAsked(networks, pod.namespace)).map(
    (element): Wanted => ({
      ...element,
      from: "definition",
      reason: `asked for by ${npwgKeys.networks}`,
    }),
  );
  const further = [...selectAlways(config, pod, primarySet), ...asked];
  return { decision, primarySet, further: further.map((one) => ({ ...one, isFurther: true })) };
}

/** Most pods ask for nothing here: then nothing is loaded for it. */
async function parseAsked(text: string, podNamespace: string): Promise<NetworkElement[]> {
  if (text.trim() === "") return [];
  return (await import("./kubernetes/npwg.ts")).parseNetworkSelection(text, podNamespace);
}

async function selectPrimarySet(
  config: Config,
  pod: Pod,
): Promise<{ decision: Decision; primarySet: Wanted[] }> {
  const own = pod.annotations.get(npwgKeys.defaultNetwork);
  if (own !== undefined && own.trim() !== "") {
    // Multus looks for it in its own namespace.
    const { parseDefaultNetwork } = await import("./kubernetes/npwg.ts");
    const element = parseDefaultNetwork(own, config.multus?.namespace ?? pod.namespace);
    const reason = `asked for by ${npwgKeys.defaultNetwork}`;
    return {
      decision: "default-network",
      primarySet: [{ ...element, from: "definition", reason }],
    };
  }
  const selection = parseSelection(pod.annotations);
  switch (selection.kind) {
    case "networks":
      return {
        decision: "cni",
        primarySet: selection.elements.map((one) => onNode(one, "asked for by cni")),
      };
    case "logical":
      return {
        decision: "logical",
        primarySet: selection.elements.map((element) => ({
          ...element,
          from: "logical",
          namespace: pod.namespace,
          reason: "asked for by networks",
        })),
      };
    case "choose":
      return { decision: "choice", primarySet: [] };
    case "default":
      return selectDefault(config);
  }
}

/** A network of the node. */
export function onNode(element: SelectionElement, reason: string): Wanted {
  return { ...element, from: "node", namespace: "", reason };
}

function selectDefault(config: Config): { decision: Decision; primarySet: Wanted[] } {
  const { clusterNetwork: network = "", namespace = "" } = config.multus ?? {};
  if (network !== "") {
    const reason = "default network (clusterNetwork)";
    return { decision: "default", primarySet: [{ network, namespace, from: "multus", reason }] };
  }
  if (config.default.networks.length === 0) {
    return { decision: "choice", primarySet: [] };
  }
  const elements = config.default.networks.flatMap((text) =>
    parseElements(text, "default.networks"),
  );
  return {
    decision: "default",
    primarySet: elements.map((one) => onNode(one, "default network")),
  };
}

/**
 * The networks that may be chosen: `select.candidates`, else the table, else the disk. Without its
 * config where that is not at hand or is wrong: resolving it says why.
 */
export function listCandidates(
  config: Config,
  search: PluginSearch,
): { name: string; network?: Network }[] {
  const inTable = [...config.plugins.keys()];
  const listed =
    inTable.length > 0
      ? tableNetworks(config)
      : new Map(listNetworks(config).networks.map((one) => [one.name, one]));
  const names = config.select.candidates ?? (inTable.length > 0 ? inTable : [...listed.keys()]);
  return [...new Set(names)].flatMap((name) => {
    const network = listed.get(name);
    const isOurs = network !== undefined && delegatesToOurself(network, search);
    // One that was named is refused with a reason.
    if (isOurs && !config.select.candidates) return [];
    return [{ name, ...(network && { network }) }];
  });
}

/** Names of the networks that may be chosen, see {@link listCandidates}. */
export function candidateNetworks(config: Config, search: PluginSearch): string[] {
  return listCandidates(config, search).map(({ name }) => name);
}

/**
 * `default.always`: for every pod outside the system namespaces, unless it has them anyway. A name
 * with a namespace is a NetworkAttachmentDefinition.
 */
function selectAlways(config: Config, pod: Pod, primarySet: Wanted[]): Wanted[] {
  if (config.default.systemNamespaces.includes(pod.namespace)) return [];
  const reason = "attached to every pod";
  const { multus } = config;
  const fromMultus = (multus?.defaultNetworks ?? []).map(
    (network): Wanted => ({ network, namespace: multus?.namespace ?? "", from: "multus", reason }),
  );
  const fromTable = config.default.always.map((text): Wanted => {
    const slash = text.indexOf("/");
    const [element] = parseElements(text.slice(slash + 1), "default.always");
    const { network = "", ifName } = element ?? {};
    return {
      network,
      ...(ifName !== undefined && { ifName }),
      namespace: slash < 0 ? "" : text.slice(0, slash),
      from: slash < 0 ? "node" : "definition",
      reason,
    };
  });
  return [...fromMultus, ...fromTable].filter(
    (one) =>
      !primarySet.some(
        (have) =>
          have.network === one.network &&
          have.namespace === one.namespace &&
          have.from === one.from,
      ),
  );
}

/**
 * Fixes every interface name, before anything runs (design D3). Named ones keep theirs; the first
 * unnamed of the primary set gets CNI_IFNAME when nobody asked for it, the others eth0, eth1 ...;
 * further attachments net1, net2 ... as Multus names them. The one with CNI_IFNAME comes first.
 *
 * @throws CniError 105 when two want one name, 7 when CNI_IFNAME stays unused or there are too many
 */
export function nameInterfaces<T extends SelectionElement>(
  primarySet: T[],
  further: T[],
  requestIfName: string,
): (T & { ifName: string })[] {
  const all = [...primarySet, ...further];
  if (all.length > attachmentsMax) {
    throw new CniError(
      code.invalidConfig,
      `Cannot attach ${all.length} networks to one pod: at most ${attachmentsMax} are allowed`,
    );
  }
  const taken = new Map<string, string>();
  for (const { ifName, network } of all) {
    if (ifName === undefined) continue;
    const other = taken.get(ifName);
    if (other !== undefined) throw clash(ifName, other, network);
    taken.set(ifName, network);
  }
  const free = (prefix: string, from: number, network: string): string => {
    for (let i = from; ; i++) {
      // The first unnamed one of the primary set has the name the runtime asks for.
      const name = i < 0 ? requestIfName : `${prefix}${i}`;
      if (taken.has(name)) continue;
      taken.set(name, network);
      return name;
    }
  };
  const named = [
    ...primarySet.map((one) => ({ ...one, ifName: one.ifName ?? free("eth", -1, one.network) })),
    ...further.map((one) => ({ ...one, ifName: one.ifName ?? free("net", 1, one.network) })),
  ];
  if (!named.some(({ ifName }) => ifName === requestIfName)) {
    throw new CniError(
      code.invalidConfig,
      `Cannot attach ${named.map(({ network, ifName }) => `${network}@${ifName}`).join(",")}: ` +
        `one of them must have interface ${requestIfName}, leave one name out`,
    );
  }
  return named.sort(
    (a, b) => Number(b.ifName === requestIfName) - Number(a.ifName === requestIfName),
  );
}

function clash(ifName: string, one: string, other: string): CniError {
  return new CniError(
    code.interfaceConflict,
    `Interface name "${ifName}" is wanted by network "${one}" and by network "${other}": ` +
      "give one of them another name",
  );
}
