/**
 * The one gate every network passes, however it was named (design D9): whose rules a network is
 * under, and what is looked up when they need it.
 */
import { checkAccess } from "./access.ts";
import type { Objects } from "./api.ts";
import { CniError, code, type Host } from "./cni.ts";
import type { Config } from "./config_schema.ts";
import { isConfigured } from "./credentials.ts";
import { isObject } from "./json.ts";
import { entriesOf, type Network } from "./networks.ts";
import { type Pod, podLabel, podPath } from "./pod.ts";

/**
 * Whose rules a network of the node is under: its table entry's; found on disk, those of every
 * entry with that list, whatever name the pod found it by.
 */
export function gatesOf(config: Config, { name, list, source, entry }: Network): string[] {
  if (entry) return [entry.name];
  const names = entriesOf(config, { list, source });
  return names.length > 0 ? names : [name];
}

/**
 * Lets a pod pass to a network, or does not.
 * @param gates names in the plugin table whose rules apply
 * @throws CniError 100, with the rule
 */
export async function checkMayUse(
  host: Host,
  config: Config,
  objects: Objects,
  { name, gates }: { name: string; gates: string[] },
  pod: Pod,
): Promise<void> {
  for (const gate of gates) {
    let verdict = checkAccess(config, gate, pod);
    if (verdict.needsServiceAccount) {
      verdict = checkAccess(config, gate, await withServiceAccount(host, config, objects, pod));
    }
    if (verdict.allowed) continue;
    const { reason, rule = "" } = verdict;
    throw new CniError(
      code.accessDenied,
      `Access to network "${name}" denied for pod ${podLabel(pod)}: ${reason}`,
      { details: rule, rule: rule || reason },
    );
  }
}

/** The pod with its service account, from the API; as it is where there is none to ask. */
async function withServiceAccount(
  host: Host,
  config: Config,
  objects: Objects,
  pod: Pod,
): Promise<Pod> {
  if (pod.namespace === "" || pod.name === "" || !isConfigured(host, config.kubernetes)) return pod;
  const object = await objects.get(podPath(pod));
  const spec = isObject(object) ? object["spec"] : undefined;
  const account = isObject(spec) ? spec["serviceAccountName"] : undefined;
  return { ...pod, serviceAccount: typeof account === "string" ? account : "default" };
}
