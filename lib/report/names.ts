/** Names for a shell to offer: of networks, pods and namespaces on record, and of annotations. */
import type { StdinConfig } from "../call.ts";
import { UsageError } from "../config/usage.ts";
import { listNetworks } from "../node_networks.ts";
import { annotationKeys, npwgKeys } from "../pod.ts";
import { orUndefined } from "../recovery/tried.ts";
import { loadConfig } from "../settings.ts";
import { liveAttachments, readOrEmpty } from "./record_reader.ts";

/** The annotations of a pod that genie reads. */
const readKeys = [...Object.values(annotationKeys), npwgKeys.networks, npwgKeys.defaultNetwork];

/**
 * The names of a kind, each once, in order. Whatever cannot be read offers nothing: a person who
 * types is not told about it.
 * @throws UsageError for an unknown kind
 */
export async function namesOf(kind: string, own: StdinConfig): Promise<readonly string[]> {
  if (kind === "annotations") return readKeys.map((key) => `${key}=`);
  if (!["networks", "pods", "namespaces"].includes(kind)) {
    throw new UsageError(`Invalid --values "${kind}"`);
  }
  const config = await loadConfig(own).catch(() => undefined);
  if (!config) return [];
  const names = new Set<string>();
  if (kind === "networks") {
    for (const { name } of orUndefined(() => listNetworks(config).networks) ?? []) names.add(name);
  } else {
    const read = () => readOrEmpty(config.stateDir, (record) => [...liveAttachments(record, {})]);
    for (const { namespace, pod } of orUndefined(read) ?? []) {
      if (pod !== "") names.add(kind === "pods" ? `${namespace}/${pod}` : namespace);
    }
  }
  // What a shell might read as more than a name is not offered.
  return [...names].filter((name) => /^[\w./-]+$/.test(name)).sort();
}
