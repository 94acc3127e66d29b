/**
 * Which networks a pod gets, by name, and on which interface each: the primary set by the first
 * rule that applies, and further networks. Source: design D3.
 */
import type { Wanted, WantedSet } from "./call.ts";
import { CniError, code } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import {
  attachmentsMax,
  npwgKeys,
  type Pod,
  parseElements,
  parseSelection,
  type SelectionElement,
} from "./pod.ts";

type PrimarySet = Omit<WantedSet, "further">;

/**
 * Selects the networks of a pod by its annotations and the configuration.
 * @throws CniError 7 for malformed annotations, or when there is nothing to choose by; 101 when
 *   there is no network at all
 */
export async function selectWanted(config: Config, pod: Pod): Promise<WantedSet> {
  const { decision, primarySet } = await selectPrimarySet(config, pod);
  // What the pod has anyway is not attached once more.
  const always = selectAlways(config, pod);
  const room = always[0] && (await import("./recovery/network_name.ts"));
  const further = room?.otherThan(config, always, primarySet) ?? [];
  const asked = pod.annotations.get(npwgKeys.networks) ?? "";
  if (asked.trim() !== "") {
    const { parseNetworkSelection } = await import("./kubernetes/npwg.ts");
    const origin = { from: "definition" as const, reason: `asked for by ${npwgKeys.networks}` };
    const elements = parseNetworkSelection(asked, pod.namespace);
    further.push(...elements.map((element) => ({ ...element, ...origin })));
  }
  return { decision, primarySet, further: further.map((one) => ({ ...one, isFurther: true })) };
}

async function selectPrimarySet(config: Config, pod: Pod): Promise<PrimarySet> {
  const own = pod.annotations.get(npwgKeys.defaultNetwork) ?? "";
  if (own.trim() !== "") {
    const { parseDefaultNetwork } = await import("./kubernetes/npwg.ts");
    // Multus looks for it in its own namespace.
    const element = parseDefaultNetwork(own, config.multus?.namespace ?? pod.namespace);
    const reason = `asked for by ${npwgKeys.defaultNetwork}`;
    const primarySet: Wanted[] = [{ ...element, from: "definition", reason }];
    return { decision: "default-network", primarySet };
  }
  const selection = parseSelection(pod.annotations);
  if (selection.kind === "default") return selectDefault(config);
  if (selection.kind === "choose") return { decision: "choice", primarySet: [] };
  const { kind, elements } = selection;
  if (kind === "networks") {
    return { decision: "cni", primarySet: elements.map((one) => onNode(one, "asked for by cni")) };
  }
  const { namespace } = pod;
  const origin = { from: "logical" as const, namespace, reason: "asked for by networks" };
  return { decision: "logical", primarySet: elements.map((one) => ({ ...one, ...origin })) };
}

/** A network of the node. */
export function onNode(element: SelectionElement, reason: string): Wanted {
  return { ...element, from: "node", namespace: "", reason };
}

function selectDefault(config: Config): PrimarySet {
  const { clusterNetwork: network = "", namespace = "" } = config.multus ?? {};
  if (network !== "") {
    const reason = "default network (clusterNetwork)";
    return { decision: "default", primarySet: [{ network, namespace, from: "multus", reason }] };
  }
  const { networks } = config.default;
  const elements = networks.flatMap((text) => parseElements(text, "default.networks"));
  const primarySet = elements.map((one) => onNode(one, "default network"));
  return { decision: primarySet.length === 0 ? "choice" : "default", primarySet };
}

/**
 * `default.always`, the networks of every pod outside the system namespaces. A name with a
 * namespace is a NetworkAttachmentDefinition.
 */
function selectAlways(config: Config, pod: Pod): Wanted[] {
  const { always, systemNamespaces } = config.default;
  if (systemNamespaces.includes(pod.namespace)) return [];
  const reason = "attached to every pod";
  const { defaultNetworks = [], namespace = "" } = config.multus ?? {};
  const wanted: Wanted[] = defaultNetworks.map((network) => {
    return { network, namespace, from: "multus", reason };
  });
  for (const text of always) {
    const slash = text.indexOf("/");
    for (const element of parseElements(text.slice(slash + 1), "default.always")) {
      const one = onNode(element, reason);
      if (slash < 0) wanted.push(one);
      else wanted.push({ ...one, from: "definition", namespace: text.slice(0, slash) });
    }
  }
  return wanted;
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
    const limit = `at most ${attachmentsMax} are allowed`;
    const msg = `Cannot attach ${all.length} networks to one pod: ${limit}`;
    throw new CniError(code.invalidConfig, msg);
  }
  const taken = new Map<string, string>();
  for (const { ifName, network } of all) {
    if (ifName === undefined) continue;
    const other = taken.get(ifName);
    if (other !== undefined) {
      throw new CniError(
        code.interfaceConflict,
        `Interface name "${ifName}" is wanted by network "${other}" and by network "${network}": ` +
          "give one of them another name",
      );
    }
    taken.set(ifName, network);
  }
  const named = all.map((one, position) => {
    let { ifName } = one;
    const [prefix, from] = position < primarySet.length ? ["eth", -1] : ["net", 1];
    for (let i = from; ifName === undefined; i++) {
      const name = i < 0 ? requestIfName : `${prefix}${i}`;
      if (!taken.has(name)) ifName = name;
    }
    taken.set(ifName, one.network);
    return { ...one, ifName };
  });
  const first = named.find(({ ifName }) => ifName === requestIfName);
  if (first) return [first, ...named.filter((one) => one !== first)];
  const names = named.map(({ network, ifName }) => `${network}@${ifName}`).join(",");
  throw new CniError(
    code.invalidConfig,
    `Cannot attach ${names}: one of them must have interface ${requestIfName}, leave one name out`,
  );
}
