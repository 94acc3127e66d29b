/**
 * The one gate every network passes, however it was named (design D9): whose rules a network is
 * under, and what is looked up when they need it.
 */
import { checkAccess, type Decision } from "./access.ts";
import { CniError, code, type Host } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { isConfigured } from "./kubernetes/credentials.ts";
import { checkDefinition, type Definition } from "./kubernetes/nad_access.ts";
import type { DefinedNetwork } from "./kubernetes/networks.ts";
import type { Objects } from "./kubernetes/objects_of_call.ts";
import { entriesOf, type Network } from "./networks.ts";
import { fetchPod, type Pod, podLabel } from "./pod.ts";

/**
 * Whose rules a network of the node is under: its table entry's; found on disk, those of every
 * entry with that list, whatever name the pod found it by.
 */
export function gatesOf(config: Config, { name, list, source, entry }: Network): string[] {
  if (entry) return [entry.name];
  const names = entriesOf(config, { list, source });
  return names.length > 0 ? names : [name];
}

/** A network a pod wants, as the gate sees it. */
export interface Gated {
  name: string;
  /** Names in the plugin table whose rules apply. */
  gates: string[];
  /** Set for a NetworkAttachmentDefinition. */
  definition?: Definition;
}

/** What the gate asks of an object: a device that it will be given names one as well. */
export function definitionOf(
  namespace: string,
  { list: { plugins }, onDisk, resourceName }: DefinedNetwork,
): Definition {
  const device = { deviceID: "allocated by the kubelet" };
  const run = resourceName ? plugins.map((plugin) => ({ ...plugin, ...device })) : plugins;
  return { namespace, onDisk, plugins: run };
}

/** What the gate says to one network of a pod. */
export interface Verdict extends Decision {
  network: string;
  ifName: string;
}

/**
 * Lets a pod pass to a network, or does not.
 * @returns what allows it
 * @throws CniError 100, with the rule
 */
export async function checkMayUse(
  host: Host,
  config: Config,
  objects: Objects,
  gated: Gated,
  pod: Pod,
): Promise<Decision> {
  const decision = await judge(host, config, objects, gated, pod);
  if (decision.allowed) return decision;
  throw denial(gated.name, pod, decision);
}

async function judge(
  host: Host,
  config: Config,
  objects: Objects,
  { gates, definition }: Gated,
  pod: Pod,
): Promise<Decision> {
  const passed: Decision[] = [];
  const { nad } = config.access;
  if (definition && nad) {
    const decision = checkDefinition(nad, config.file, definition);
    if (!decision.allowed) return decision;
    passed.push(decision);
  }
  for (const gate of gates) {
    // A rule admits this config: of what nobody named, `access.default` has nothing to add.
    if (passed.length > 0 && definition?.onDisk === false && !config.plugins.has(gate)) continue;
    let decision = checkAccess(config, gate, pod);
    if (decision.needsServiceAccount) {
      decision = checkAccess(config, gate, await withServiceAccount(host, config, objects, pod));
    }
    if (!decision.allowed)
      return decision.needsServiceAccount ? explainUnknown(decision) : decision;
    passed.push(decision);
  }
  const rules = passed.flatMap(({ rule }) => rule ?? []);
  return {
    allowed: true,
    reason: passed.map(({ reason }) => reason).join("; "),
    ...(rules.length > 0 && { rule: rules.join("; ") }),
  };
}

/**
 * A NetworkAttachmentDefinition of another namespace needs that namespace to be global, by whatever
 * way it was named (Multus forgets the default network's annotation). Asked before it is read.
 * @throws CniError 100
 */
export function checkIsolation(
  config: Config,
  { namespace, network }: { namespace: string; network: string },
  pod: Pod,
): void {
  const { namespaceIsolation, globalNamespaces, isolationLine } = config.kubernetes;
  if (!namespaceIsolation || namespace === pod.namespace) return;
  if (globalNamespaces.includes(namespace)) return;
  throw denial(`${namespace}/${network}`, pod, {
    allowed: false,
    reason:
      "namespaces are isolated, and kubernetes.global_namespaces has " +
      `${globalNamespaces.join(", ") || "none"}`,
    // Without a line it is Multus' namespaceIsolation of the CNI config.
    rule:
      isolationLine === undefined
        ? "namespaceIsolation of the CNI config"
        : `kubernetes.namespace_isolation at ${config.file}:${isolationLine}`,
  });
}

/** A denial as the runtime is told of it. */
export function denial(network: string, pod: Pod, { reason, rule = "" }: Decision): CniError {
  return new CniError(
    code.accessDenied,
    `Access to network "${network}" denied for pod ${podLabel(pod)}: ${reason}`,
    { details: rule, rule: rule || reason },
  );
}

/** Nothing that a pod says of itself is evidence: only the API names a service account. */
function explainUnknown({ reason, ...decision }: Decision): Decision {
  const hint = "give genie credentials for the Kubernetes API, which alone names it";
  return { ...decision, reason: `${reason}: ${hint}` };
}

/**
 * The pod with its service account, from the API; as it is where there is none to ask.
 * @throws CniError 11 when it is gone, or was made anew under the same name
 */
async function withServiceAccount(
  host: Host,
  config: Config,
  objects: Objects,
  pod: Pod,
): Promise<Pod> {
  if (pod.namespace === "" || pod.name === "" || !isConfigured(host, config.kubernetes)) return pod;
  const { serviceAccount } = await fetchPod(objects, pod);
  return { ...pod, serviceAccount: serviceAccount ?? "default" };
}
