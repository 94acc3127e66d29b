/**
 * May this pod use this network, and how many? Every network passes here, however it was named, and
 * what is in doubt is closed (design D9; NPWG v1.3 §7.4). Loaded where the plugin table has a rule
 * at all, or a network is an object of the API.
 */
import type { NamedWanted, PlanCall, Resolved } from "../call.ts";
import { CniError, code, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import type { State } from "../database.ts";
import type { ResolvedObject } from "../kubernetes/networks.ts";
import { noteNetwork } from "../ledger.ts";
import type { Network, NetworkConfigList } from "../networks.ts";
import { objectsOf } from "../plan.ts";
import type { Pod } from "../pod.ts";
import type { Attachment } from "../record.ts";
import { entriesWith } from "../recovery/network_name.ts";
import { podLabel } from "../request.ts";
import { isConfigured } from "../settings.ts";
import {
  type AccessDecision,
  checkAccess,
  checkDefinition,
  type Definition,
} from "./access_rules.ts";

/**
 * Table entries whose rules a network of the node is under: its own; for one found on disk, every
 * entry with that list, by CNI name or by the file it stands in. Else a pod would pass their rules
 * by asking for the list under its other names.
 */
export function entriesOf(config: Config, network: Network): string[] {
  const { name, entry } = network;
  const names = (entry ? [entry] : entriesWith(config, network)).map((one) => one.name);
  return names.length > 0 ? names : [name];
}

/** A network a pod wants, as far as access to it is concerned. */
export interface AccessTarget {
  name: string;
  /** Names of the table entries whose rules apply. */
  entries: string[];
  /** Set for a NetworkAttachmentDefinition. */
  definition?: Definition;
}

/**
 * What access to a network that is no plain one of the node depends on.
 * @param namespace where its object is
 */
export function targetOf(config: Config, namespace: string, object: ResolvedObject): AccessTarget {
  const { name, rulesOf, defined } = object;
  if (rulesOf) return { name, entries: entriesOf(config, rulesOf) };
  const { onDisk, resourceName, list } = defined;
  // A device that the network will be given names one as well.
  const device = resourceName && { deviceID: "allocated by the kubelet" };
  const plugins = list.plugins.map((plugin) => ({ ...plugin, ...device }));
  const entries = onDisk ? entriesOf(config, { ...defined, name }) : [name];
  return { name, entries, definition: { namespace, onDisk, plugins } };
}

/** The decision about one network of a pod. */
export interface Verdict extends AccessDecision {
  network: string;
  ifName: string;
}

/** What a decision may need besides the rules: the pod's service account is in the API alone. */
export type AccessCall = Pick<PlanCall, "host" | "config" | "objects">;

/**
 * Lets a pod use a network, or does not.
 * @returns what allows it
 * @throws CniError 100, with the rule
 */
export async function checkMayUse(call: AccessCall, target: AccessTarget, pod: Pod) {
  const decision = await decideAll(call, target, pod);
  if (decision.allowed) return decision;
  throw denial(target.name, pod, decision);
}

async function decideAll(call: AccessCall, { entries, definition }: AccessTarget, pod: Pod) {
  const { config } = call;
  const passed: AccessDecision[] = [];
  if (definition && config.access.nad) {
    const decision = checkDefinition(config.access.nad, config.file, definition);
    if (!decision.allowed) return decision;
    passed.push(decision);
  }
  for (const entry of entries) {
    // A rule admits this config: of what nobody named, `access.default` has nothing to add.
    if (passed.length > 0 && definition?.onDisk === false && !config.plugins.has(entry)) continue;
    let decision = checkAccess(config, entry, pod);
    if (decision.needsServiceAccount) {
      decision = checkAccess(config, entry, await withServiceAccount(call, pod));
    }
    // Only the API names a service account: what a pod says of itself is no evidence.
    const hint = ": give genie credentials for the Kubernetes API, which alone names it";
    if (decision.needsServiceAccount) decision.reason += hint;
    if (!decision.allowed) return decision;
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
  const global = globalNamespaces.join(", ") || "none";
  const reason = `namespaces are isolated, and kubernetes.global_namespaces has ${global}`;
  // Without a line it is Multus' namespaceIsolation of the CNI config.
  const rule =
    isolationLine === undefined
      ? "namespaceIsolation of the CNI config"
      : `kubernetes.namespace_isolation at ${config.file}:${isolationLine}`;
  throw denial(`${namespace}/${network}`, pod, { allowed: false, reason, rule });
}

function denial(network: string, pod: Pod, { reason, rule = "" }: AccessDecision): CniError {
  return new CniError(
    code.accessDenied,
    `Access to network "${network}" denied for pod ${podLabel(pod)}: ${reason}`,
    { details: rule, rule: rule || reason },
  );
}

/**
 * The pod with its service account, from the API; as it is where there is none to ask.
 * @throws CniError 11 when it is gone, or was made anew under the same name
 */
async function withServiceAccount(call: AccessCall, pod: Pod): Promise<Pod> {
  const { namespace, name } = pod;
  if (namespace === "" || name === "" || !isConfigured(call.host, call.config.kubernetes)) {
    return pod;
  }
  const { fetchPod } = await import("../kubernetes/objects_of_call.ts");
  const { serviceAccount } = await fetchPod(await objectsOf(call), pod);
  return { ...pod, serviceAccount: serviceAccount ?? "default" };
}

/**
 * Refuses a plan that is too much. Call inside a transaction, with the plan not on record yet; one
 * of an earlier attempt of the same call has been undone.
 * @throws CniError 100, with the rule
 */
export function checkQuota(
  state: Pick<State, "database">,
  config: Pick<Config, "file" | "access">,
  planned: readonly Attachment[],
): void {
  judgeQuota(config, planned, readHeld(state, planned));
}

/**
 * Counts what the container, and the pods of its namespace here, have on record. What a failing DEL
 * left counts as long as its runtime may come back for it; what is leaked is the node's matter.
 */
export function readHeld({ database }: Pick<State, "database">, planned: readonly Attachment[]) {
  const count = (where: string, value = ""): number => {
    const row = database
      .query(`SELECT count(*) AS n FROM attachments WHERE state <> 'leaked' AND ${where}`)
      .get(value) as { n: number };
    return row.n;
  };
  const [first] = planned;
  const ofNamespace = "json_valid(plan) AND json_extract(plan, '$.pod.namespace') = ?";
  return {
    // By container: several calls of one runtime may attach it, each with its own interface.
    pod: count("container_id = ?", first?.containerId),
    namespace: count(ofNamespace, first?.pod.namespace),
  };
}

/** The rule alone. @throws CniError 100 */
export function judgeQuota(
  { file, access: { maxAttachments } }: Pick<Config, "file" | "access">,
  planned: readonly Attachment[],
  held: ReturnType<typeof readHeld>,
): void {
  const [first] = planned;
  if (!maxAttachments || !first) return;
  const { pod } = first;
  for (const key of ["pod", "namespace"] as const) {
    const max = maxAttachments[key];
    // Outside Kubernetes there are no namespaces to count by.
    if (max === undefined || (key === "namespace" && pod.namespace === "")) continue;
    if (held[key] + planned.length <= max) continue;
    const whose = key === "pod" ? "the pod" : `namespace "${pod.namespace}"`;
    const names = planned.map(({ network }) => `"${network}"`).join(", ");
    const rule = `access.max_attachments.${key} at ${file}:${maxAttachments.line}`;
    throw new CniError(
      code.accessDenied,
      `Access to networks ${names} denied for pod ${podLabel(pod)}: they are ${planned.length}, ` +
        `${whose} has ${held[key]} on this node, and access.max_attachments.${key} is ${max}`,
      { details: rule, rule },
    );
  }
}

/**
 * Is a wanted network found, and may the pod use it? Where all verdicts are asked for (`genie
 * plan`) a denial is noted and no error.
 *
 * @param outcome of resolving it
 * @returns the network, undefined for one that is denied
 * @throws CniError 100, or why it was not found
 */
export async function checkWanted(
  call: PlanCall,
  pod: Pod,
  wanted: NamedWanted,
  outcome: PromiseSettledResult<Resolved> | undefined,
): Promise<Resolved | undefined> {
  const { journal, request, verdicts } = call;
  const { ifName, reason } = wanted;
  const network = outcome?.status === "fulfilled" ? outcome.value : undefined;
  try {
    if (!network) throw (outcome as PromiseRejectedResult).reason;
    const decision = await checkMayUse(call, network, pod);
    verdicts?.push({ network: network.name, ifName, ...decision });
    return network;
  } catch (error) {
    const { message, rule } = toCniError(error);
    if (rule === "") throw error;
    // No delegate will run to write its row of the ledger.
    const { name, list } = network ?? {
      name: `${wanted.namespace}/${wanted.network}`,
      list: unread,
    };
    const { containerId } = request;
    const what = { command: "ADD", containerId, network: name, ifName, reason, pod, list };
    noteNetwork(journal, { ...what, durationUs: 0, error });
    if (!verdicts) throw error;
    verdicts.push({ network: name, ifName, allowed: false, reason: message, rule });
    return undefined;
  }
}

/** Stands for the config of an object that was not even read. */
const nothing = { plugins: [], disableCheck: false, disableGC: false };
const unread: NetworkConfigList = { ...nothing, cniVersion: "0.1.0", name: "" };
