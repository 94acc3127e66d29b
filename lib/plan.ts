/**
 * The plan of one ADD: which networks, on which interfaces, through which binaries, and why.
 * Attaches nothing and writes down nothing but a choice it makes; for `genie plan` not even that,
 * which shows exactly what ADD would do. Source: design D3, D8, D9.
 */
import { findPlugins, pluginSearch } from "./binaries.ts";
import type {
  AttachmentSource,
  Host,
  NamedWanted,
  Plan,
  PlanCall,
  Resolved,
  Wanted,
} from "./call.ts";
import type { Config } from "./config/schema.ts";
import { isObject } from "./json.ts";
import type { Objects } from "./kubernetes/objects_of_call.ts";
import { notePod } from "./ledger.ts";
import { declaresCapability, resolveNetwork } from "./networks.ts";
import { carriedPod, delegateArgs, type Pod, podWithoutAnnotations } from "./pod.ts";
import type { Attachment } from "./record.ts";
import { nameInterfaces, selectWanted } from "./selection.ts";
import { isConfigured } from "./settings.ts";

/**
 * Finds the pod of a call with its annotations (design D2).
 *
 * @throws CniError 7 for annotations of a wrong shape; 11 when the API cannot be asked, or the pod
 *   is gone or was made anew under the same name: never an empty success
 */
export async function findPod(call: PlanCall): Promise<Pod> {
  const carried = carriedPod(call.request);
  if (carried) return carried;
  const pod = podWithoutAnnotations(call.request);
  const isNamed = pod.namespace !== "" && pod.name !== "";
  if (!isNamed || !isConfigured(call.host, call.config.kubernetes)) return pod;
  const { fetchPod } = await import("./kubernetes/objects_of_call.ts");
  return fetchPod(await objectsOf(call), pod);
}

/** The API as a call uses it, opened when something first needs it. */
export async function objectsOf(call: {
  host: Host;
  config: Config;
  objects?: Objects | undefined;
}): Promise<Objects> {
  const { openObjects } = await import("./kubernetes/objects_of_call.ts");
  call.objects ??= openObjects(call.host, call.config);
  return call.objects;
}

/**
 * Plans an ADD of a pod: what it wants, each network with its config, on its interface, and
 * allowed.
 *
 * @throws CniError 7 for malformed annotations or configs, 11 when the API cannot be asked, 100
 *   when the pod may not use a network, 101 for an unknown network, 102 for a missing plugin, 105
 *   when interface names clash
 */
export async function makePlan(call: PlanCall, pod: Pod): Promise<Plan> {
  if (call.journal) notePod(call.journal, pod);
  const wanted = await selectWanted(call.config, pod);
  const choice =
    wanted.decision === "choice"
      ? await (await import("./choice/choose.ts")).addChosen(call, pod, wanted)
      : undefined;
  const named = nameInterfaces(wanted.primarySet, wanted.further, call.request.ifName);
  const attachments = await planNamed(call, pod, named);
  const primarySet = new Set<string>();
  for (const { isFurther, ifName } of named) if (!isFurther) primarySet.add(ifName);
  return { pod, decision: wanted.decision, primarySet, attachments, ...(choice && { choice }) };
}

/**
 * Plans the attachments of a pod to networks it may use, on the interfaces named.
 *
 * @param held what it has already: the devices of those are taken
 * @throws CniError as {@link makePlan}
 */
export async function planNamed(
  call: PlanCall,
  pod: Pod,
  named: readonly NamedWanted[],
  held: readonly Attachment[] = [],
): Promise<Attachment[]> {
  const { config, request } = call;
  const search = pluginSearch(config, request);
  // Objects are asked for side by side; the first that fails decides, in the order of the pod.
  const settled = await Promise.allSettled(named.map((wanted) => resolveWanted(call, wanted, pod)));
  const attachments: Attachment[] = [];
  const resolved: Resolved[] = [];
  for (const [index, wanted] of named.entries()) {
    const outcome = settled[index];
    let network = outcome?.status === "fulfilled" ? outcome.value : undefined;
    if (!network || call.verdicts || network.entries.length > 0 || network.definition) {
      const { checkWanted } = await import("./policy/access.ts");
      network = await checkWanted(call, pod, wanted, outcome);
      if (!network) continue;
    }
    resolved.push(network);
    const attachment = toAttachment({ config, request, search, pod }, wanted, network);
    // Only an element of the NPWG annotation asks for something; the room is loaded for it.
    const room = wanted.capabilityArgs ? await import("./kubernetes/networks.ts") : undefined;
    attachments.push(room?.withWishes(attachment, network, wanted) ?? attachment);
  }
  if (resolved.some(({ resourceName }) => resourceName)) {
    const { assignDevices } = await import("./kubernetes/devices.ts");
    const { kubeletDir } = config.kubernetes;
    await assignDevices(call.host, { pod, kubeletDir, held }, attachments, resolved);
  }
  if (held.length > 0 || attachments[1] || attachments[0]?.ifName !== "eth0") {
    (await import("./recovery/plugin_keys.ts")).fitTogether(config, attachments, held);
  }
  return attachments;
}

/** Does the table say anything that a network must be looked up for? */
function hasRules({ access, plugins }: Config): boolean {
  if (access.default === "deny" || access.nad) return true;
  return [...plugins.values()].some((one) => one.allow || one.deny || one.enforcePolicy);
}

async function resolveWanted(call: PlanCall, wanted: Wanted, pod: Pod): Promise<Resolved> {
  const { config, verdicts } = call;
  if (wanted.from === "node") {
    let network = resolveNetwork(config, wanted.network);
    if (!network.entry && (config.plugins.size > 0 || network.name !== network.list.name)) {
      network = (await import("./recovery/network_name.ts")).identified(config, network);
    }
    if (!verdicts && !hasRules(config)) return { ...network, entries: [] };
    const { entriesOf } = await import("./policy/access.ts");
    return { ...network, entries: entriesOf(config, network) };
  }
  const { checkIsolation, targetOf } = await import("./policy/access.ts");
  if (wanted.from === "definition") checkIsolation(config, wanted, pod);
  const { resolveObject } = await import("./kubernetes/networks.ts");
  const resolved = await resolveObject(call, wanted);
  const { name: _, ...target } = targetOf(config, wanted.namespace, resolved);
  return { ...resolved.network, ...target };
}

/** The attachment of a pod to a network. @throws CniError 102 for a missing plugin, 7 for genie */
export function toAttachment(
  { config, request, search, pod }: AttachmentSource,
  wanted: NamedWanted,
  network: Resolved,
): Attachment {
  const { ifName, reason, cniArgs, defaultRoute } = wanted;
  const { list } = network;
  const primary = ifName === request.ifName;
  const args = request.config.args ?? {};
  // NPWG v1.3 §7.5: what the runtime offers belongs to the primary alone. What no plugin declares,
  // all of a pod's annotations maybe, is not even recorded.
  const offered = primary ? (request.config.runtimeConfig ?? {}) : {};
  const declared = Object.entries(offered).filter(([name]) => declaresCapability(list, name));
  const enforcesPlain = network.entries.some((name) => config.plugins.get(name)?.enforcePolicy);
  return {
    containerId: request.containerId,
    requestIfName: request.ifName,
    requestNetwork: request.config.name,
    ifName,
    primary,
    network: network.name,
    reason,
    list,
    plugins: findPlugins(network, search),
    cniArgs: delegateArgs(request.args, primary),
    cniPath: search.dirs.join(":"),
    capabilityArgs: { ...Object.fromEntries(declared), ...wanted.capabilityArgs },
    // A pod's `cni-args` go below `args.cni` (CNI CONVENTIONS; NPWG §4.1.2.1.6).
    args: cniArgs
      ? { ...args, cni: { ...(isObject(args["cni"]) && args["cni"]), ...cniArgs } }
      : args,
    timeoutMs: network.entry?.timeoutMs ?? config.timeoutMs,
    netns: request.netns,
    pod: { namespace: pod.namespace, name: pod.name, uid: pod.uid },
    ...(defaultRoute && { defaultRoute }),
    ...(enforcesPlain && { enforcesPlain }),
  };
}
