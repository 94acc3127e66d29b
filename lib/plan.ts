/**
 * The plan of one ADD: which networks, on which interfaces, through which binaries, and why. Reads
 * the pod, the config lists and network objects; attaches nothing, and writes down nothing but a
 * choice it makes, and not that for `genie plan`, which shows exactly what ADD would do. Source:
 * design D3, D8, D9.
 */

import type { Choice, Chooser } from "./choice/choose.ts";
import { CniError, code, type Host, type Request, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { checkIsolation, checkMayUse, definitionOf, type Gated, gatesOf } from "./gate.ts";
import { isObject } from "./json.ts";
import { isConfigured } from "./kubernetes/credentials.ts";
import type { Objects } from "./kubernetes/objects_of_call.ts";
import { type Journal, noteNetwork, notePod } from "./ledger.ts";
import { declaresCapability, type NetworkConfigList } from "./netconf.ts";
import {
  findListOnDisk,
  findPlugins,
  type Network,
  networkAt,
  type PluginSearch,
  pluginSearch,
  resolveNetwork,
} from "./networks.ts";
import {
  type AskedPod,
  askForPod,
  carriedPod,
  delegateArgs,
  type Pod,
  podIdentity,
  podLabel,
} from "./pod.ts";
import type { Attachment } from "./state.ts";
import {
  candidateNetworks,
  type Decision,
  nameInterfaces,
  onNode,
  selectWanted,
  type Wanted,
} from "./wanted.ts";

export { podLabel };

/** What an ADD will do, in the order it will do it: the primary attachment first. */
export interface Plan {
  pod: Pod;
  /** What decided the primary set. */
  decision: Decision;
  /** Interfaces of the primary set. */
  primarySet: ReadonlySet<string>;
  attachments: Attachment[];
  /** The numbers behind it, where the choice was ours. */
  choice?: Choice;
  /** The API as this call used it, for the status that follows. */
  objects: Objects;
}

/** A wanted network with its config: the node's own, or an object's. */
type Resolved = Network &
  Gated & {
    /** Device plugin resource it takes a device from. */
    resourceName?: string;
  };

/**
 * Plans an ADD.
 *
 * @throws CniError 7 for malformed annotations or configs, 11 when the API cannot be asked, 100
 *   when the pod may not use a network, 101 for an unknown network, 102 for a missing plugin, 105
 *   when interface names clash
 */
export async function makePlan(
  host: Host,
  config: Config,
  request: Request,
  chooser: Chooser = { failed: new Map() },
  asked: AskedPod = askForPod(host, config, request),
): Promise<Plan> {
  const { objects } = asked;
  const pod = await asked.pod;
  if (chooser.journal) notePod(chooser.journal, pod);
  const search = pluginSearch(config, request);
  const { decision, primarySet, further } = await selectWanted(config, pod);
  const choice =
    decision === "choice"
      ? await (await import("./choice/choose.ts")).chooseNetwork(
          host,
          { config, search, objects, pod, containerId: request.containerId },
          chooser,
        )
      : undefined;
  if (choice) primarySet.push(onNode({ network: choice.network }, reasonOf(choice)));
  // What every pod gets besides it has already where the choice fell on it.
  const besides = further.filter((one) => one.from !== "node" || one.network !== choice?.network);
  const named = nameInterfaces(primarySet, besides, request.ifName);
  const attachments = await planNamed({ host, config, request, objects, pod }, named, chooser);
  const own = named.filter(({ isFurther }) => !isFurther).map(({ ifName }) => ifName);
  const parts = { pod, decision, primarySet: new Set(own), attachments, objects };
  return { ...parts, ...(choice && { choice }) };
}

/** For what is planned. */
export interface PlannedCall {
  host: Host;
  config: Config;
  request: Request;
  objects: Objects;
  pod: Pod;
}

/**
 * Plans the attachments of a pod to networks it may use, on the interfaces named.
 *
 * @param held what it has already: the devices of those are taken
 * @throws CniError as {@link makePlan}
 */
export async function planNamed(
  { host, config, request, objects, pod }: PlannedCall,
  named: readonly (Wanted & { ifName: string })[],
  chooser: Pick<Chooser, "journal" | "verdicts">,
  held: readonly Attachment[] = [],
): Promise<Attachment[]> {
  const search = pluginSearch(config, request);
  // Objects are asked for side by side; the first that fails decides, in the order of the pod.
  const settled = await Promise.allSettled(
    named.map((wanted) => resolveWanted(host, config, objects, wanted, pod)),
  );
  const attachments: Attachment[] = [];
  const resolved: Resolved[] = [];
  for (const [index, wanted] of named.entries()) {
    const outcome = settled[index];
    if (!outcome) continue;
    const network = outcome.status === "fulfilled" ? outcome.value : undefined;
    try {
      if (!network) throw (outcome as PromiseRejectedResult).reason;
      const verdict = await checkMayUse(host, config, objects, network, pod);
      chooser.verdicts?.push({ network: network.name, ifName: wanted.ifName, ...verdict });
    } catch (error) {
      const { message, rule } = toCniError(error);
      if (rule === "") throw error;
      const name = network?.name ?? `${wanted.namespace}/${wanted.network}`;
      noteDenied(chooser.journal, request, pod, wanted, network ?? { name, list: unread }, error);
      if (!chooser.verdicts) throw error;
      const verdict = { allowed: false, reason: message, rule };
      chooser.verdicts.push({ network: name, ifName: wanted.ifName, ...verdict });
      continue;
    }
    checkCapabilities(network, wanted);
    resolved.push(network);
    attachments.push(toAttachment(config, request, search, pod, wanted, network));
  }
  if (resolved.some(({ resourceName }) => resourceName)) {
    const { assignDevices } = await import("./kubernetes/device_assign.ts");
    await assignDevices(host, config.kubernetes.kubeletDir, pod, attachments, resolved, held);
  }
  return attachments;
}

/**
 * What an ADD of this request would attach, as far as the request and the node's disk tell: for a
 * DEL that has no record. Asks nobody, and not the gate either, since what was attached must go.
 *
 * @returns what is certain, and why the rest is not
 * @throws CniError 7, 101 or 105 when there is no plan at all
 */
export async function guessPlan(
  config: Config,
  request: Request,
): Promise<{ attachments: Attachment[]; problems: CniError[] }> {
  const carried = carriedPod(request);
  const nobody = {
    ...podIdentity(request.args),
    serviceAccount: undefined,
    source: "none",
  } as const;
  const pod: Pod = carried ?? { ...nobody, annotations: new Map() };
  const search = pluginSearch(config, request);
  const { decision, primarySet, further } = await selectWanted(config, pod);
  const attachments: Attachment[] = [];
  const problems: CniError[] = [];
  // Whichever was chosen is not known any more: DEL on a network that was not harms nothing.
  const named =
    decision === "choice"
      ? candidateNetworks(config, search).map((network) => ({
          ...onNode({ network }, "a candidate"),
          ifName: request.ifName,
        }))
      : nameInterfaces(primarySet, further, request.ifName);
  for (const wanted of named) {
    try {
      const network = resolveOnNode(config, wanted);
      const resolved = { ...network, gates: [] };
      attachments.push(toAttachment(config, request, search, pod, wanted, resolved));
    } catch (error) {
      problems.push(toCniError(error));
    }
  }
  return { attachments, problems };
}

function resolveOnNode(config: Config, { from, network: name }: Wanted): Network {
  if (from === "node") return resolveNetwork(config, name);
  if (from === "multus" && name.includes("/")) return networkAt(name);
  const found = findListOnDisk(config, name);
  if (found) return { name, ...found };
  throw new CniError(code.networkNotFound, `Unknown network "${name}": it is not on the node`);
}

/** Stands for the config of an object that was not even read. */
const unread: NetworkConfigList = {
  cniVersion: "0.1.0",
  name: "",
  plugins: [],
  disableCheck: false,
  disableGC: false,
};

/** A denial is told of by the network it was about: nothing is attached that could tell. */
function noteDenied(
  journal: Journal | undefined,
  { containerId }: Request,
  pod: Pod,
  { ifName, reason }: Wanted & { ifName: string },
  { name, list }: Pick<Network, "name" | "list">,
  error: unknown,
): void {
  const what = { command: "ADD", containerId, network: name, ifName, reason, pod, list };
  noteNetwork(journal, { ...what, durationUs: 0, error });
}

/** Why the chosen network was, for people. */
function reasonOf({ ranking, rejected }: Choice): string {
  const all = ranking.length + rejected.length;
  return all === 1 ? "the only candidate" : `best of ${all} candidates by KPIs`;
}

function toAttachment(
  config: Config,
  request: Request,
  search: PluginSearch,
  pod: Pod,
  wanted: Wanted & { ifName: string },
  network: Resolved,
): Attachment {
  const { ifName, reason, cniArgs, defaultRoute } = wanted;
  const primary = ifName === request.ifName;
  return {
    containerId: request.containerId,
    requestIfName: request.ifName,
    requestNetwork: request.config.name,
    ifName,
    primary,
    network: network.name,
    reason,
    list: network.list,
    plugins: findPlugins(network, search),
    cniArgs: delegateArgs(request.args),
    cniPath: search.dirs.join(":"),
    capabilityArgs: {
      // NPWG v1.3 §7.5: what the runtime offers belongs to the primary alone.
      ...(primary && declaredOnly(request.config.runtimeConfig ?? {}, network.list)),
      ...wanted.capabilityArgs,
    },
    args: withCniArgs(request.config.args ?? {}, cniArgs),
    timeoutMs: network.entry?.timeoutMs ?? config.timeoutMs,
    netns: request.netns,
    pod: { namespace: pod.namespace, name: pod.name, uid: pod.uid },
    ...(defaultRoute && { defaultRoute }),
    ...(network.gates.some((name) => config.plugins.get(name)?.enforcePolicy) && {
      enforcesPlain: true as const,
    }),
  };
}

/** What some plugin declares; the rest, all of a pod's annotations maybe, is not even recorded. */
function declaredOnly(
  offered: Record<string, unknown>,
  list: NetworkConfigList,
): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(offered).filter(([capability]) => declaresCapability(list, capability)),
  );
}

/** A pod's `cni-args` go below `args.cni` (CNI CONVENTIONS; NPWG §4.1.2.1.6). */
function withCniArgs(
  args: Record<string, unknown>,
  cniArgs: Record<string, unknown> | undefined,
): Record<string, unknown> {
  if (!cniArgs) return args;
  return { ...args, cni: { ...(isObject(args["cni"]) && args["cni"]), ...cniArgs } };
}

async function resolveWanted(
  host: Host,
  config: Config,
  objects: Objects,
  wanted: Wanted,
  pod: Pod,
): Promise<Resolved> {
  switch (wanted.from) {
    case "node": {
      const network = resolveNetwork(config, wanted.network);
      return { ...network, gates: gatesOf(config, network) };
    }
    case "logical": {
      const { behind, ...network } = await (
        await import("./kubernetes/networks.ts")
      ).resolveLogical(objects, config, wanted);
      return { ...network, gates: gatesOf(config, behind) };
    }
    case "definition": {
      checkIsolation(config, wanted, pod);
      const network = await (await import("./kubernetes/networks.ts")).resolveDefinition(
        objects,
        config,
        wanted,
      );
      const gates = network.onDisk ? gatesOf(config, network) : [network.name];
      return { ...network, gates, definition: definitionOf(wanted.namespace, network) };
    }
    case "multus":
      return resolveMultus(host, config, objects, wanted);
  }
}

/** Multus' order: an object in its namespace, a CNI name on disk, a folder's first list, a file. */
async function resolveMultus(
  host: Host,
  config: Config,
  objects: Objects,
  wanted: Wanted,
): Promise<Resolved> {
  const { network: name } = wanted;
  if (name.includes("/")) {
    const network = networkAt(name);
    return { ...network, gates: gatesOf(config, network) };
  }
  if (isConfigured(host, config.kubernetes)) {
    try {
      const { resolveDefinition } = await import("./kubernetes/networks.ts");
      const network = await resolveDefinition(objects, config, wanted);
      const gates = network.onDisk ? gatesOf(config, { ...network, name }) : [name];
      return { ...network, gates, definition: definitionOf(wanted.namespace, network) };
    } catch (error) {
      if (!(error instanceof CniError) || error.code !== code.networkNotFound) throw error;
    }
  }
  const found = findListOnDisk(config, name);
  if (found) return { name, ...found, gates: gatesOf(config, { name, ...found }) };
  throw new CniError(
    code.networkNotFound,
    `Unknown network "${name}" of the Multus config: it is no NetworkAttachmentDefinition in ` +
      `${wanted.namespace} and no CNI name in ${config.confDir}`,
  );
}

/** Capabilities a pod may ask for and a plugin must offer, or the attachment fails (§4.1.2.1). */
const requiredCapabilities = ["ips", "mac", "portMappings", "bandwidth", "infinibandGUID"] as const;

/** What a pod asks of a network, a plugin must offer (NPWG §4.1.2.1.3.2 ff). @throws CniError 7 */
function checkCapabilities(network: Resolved, { capabilityArgs = {} }: Wanted): void {
  for (const capability of requiredCapabilities) {
    if (!(capability in capabilityArgs) || declaresCapability(network.list, capability)) continue;
    throw new CniError(
      code.invalidConfig,
      `Cannot attach network "${network.name}": the pod asks for "${capability}", and no plugin ` +
        `of ${network.source} declares that capability`,
    );
  }
}
