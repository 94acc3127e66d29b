/** `genie report --cluster`: the reports of all nodes as one. Only reads. */
import { join } from "node:path";
import manifest from "../../package.json";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import type { Host } from "../cni.ts";
import { isoTime, parseDuration } from "../config/quantity.ts";
import { exists } from "../kubernetes/credentials.ts";
import { startMerge } from "./cluster_merge.ts";
import { askNodes, type NodeSource } from "./cluster_nodes.ts";
import type { ClusterReport, Report } from "./shape.ts";

const portDefault = 9477;
const timeoutMsDefault = 15_000;
/** Nodes on which the DaemonSet of `genie manifest` runs, and its pods there. */
const nodeSelector = "kubernetes.io/os=linux";
const podSelector = "app.kubernetes.io/name=genie";

/** Options that a node's agent takes as they are. */
const passed = ["since", "network", "namespace", "pod", "command", "failed", "denied"];

/**
 * Asks every node and merges what they say.
 *
 * @param limit how many of the newest requests to list
 * @throws UsageError for values that make no sense, CniError 5, 7, 11 or 50 when no node is found
 */
export async function makeClusterReport(
  host: Host,
  flags: Flags,
  { filter, limit }: { filter: Report["filter"]; limit: number },
): Promise<ClusterReport> {
  const source = readSource(host, flags);
  const timeoutMs = readTimeout(text(flags, "timeout"));
  const limits = passed.flatMap((name): [string, string][] => {
    const value = flags[name];
    return value === undefined || Array.isArray(value) ? [] : [[name, String(value)]];
  });
  const query = { ...Object.fromEntries(limits), limit: String(limit) };
  const { origin, answers } = await askNodes(host, source, query, timeoutMs);
  const merge = startMerge({
    ...{ genie: manifest.version, generatedAt: isoTime(host.now()) ?? "" },
    ...{ record: origin, notices: [], filter, limit },
  });
  for await (const { node, report } of answers) {
    if (typeof report === "string") merge.addMissing(node, report);
    else merge.add(node, report);
  }
  return merge.result();
}

function readSource(host: Host, flags: Flags): NodeSource {
  const endpoints = text(flags, "endpoints");
  if (endpoints !== undefined) {
    return { kind: "endpoints", urls: endpoints.split(",").map(readEndpoint) };
  }
  const kubeconfig = findKubeconfig(host, text(flags, "kubeconfig"));
  const port = readPort(text(flags, "port"));
  const namespace = text(flags, "agents");
  const selector = text(flags, "selector");
  const named = kubeconfig === undefined ? {} : { kubeconfig };
  return namespace === undefined
    ? { kind: "nodes", ...named, port, selector: selector ?? nodeSelector }
    : { kind: "pods", ...named, port, namespace, selector: selector ?? podSelector };
}

function readEndpoint(given: string): URL {
  const url = URL.parse(given.trim());
  const isWeb = url?.protocol === "http:" || url?.protocol === "https:";
  if (url && isWeb && url.username === "" && url.password === "" && url.search === "") return url;
  throw new UsageError(
    `Invalid --endpoints "${url?.password ? "..." : given}": expected http://ADDRESS:PORT or an ` +
      "https one, with commas between",
  );
}

/** As kubectl finds it; undefined for the service account of the pod we run in. */
function findKubeconfig(host: Host, given: string | undefined): string | undefined {
  const { KUBECONFIG: named = "", HOME: home = "" } = host.env;
  if (given !== undefined) return given;
  const files = named.split(":").filter((file) => file !== "");
  if (files.length > 1) {
    throw new UsageError(
      "KUBECONFIG names several files: give one with --kubeconfig, as from kubectl config view " +
        "--flatten --minify",
    );
  }
  const usual = home === "" ? "" : join(home, ".kube", "config");
  return files[0] ?? (usual !== "" && exists(usual) ? usual : undefined);
}

function readPort(given: string | undefined): number {
  if (given === undefined) return portDefault;
  const port = /^\d{1,5}$/.test(given) ? Number(given) : 0;
  if (port >= 1 && port <= 65_535) return port;
  throw new UsageError(`Invalid --port "${given}": expected a number from 1 to 65535`);
}

function readTimeout(given: string | undefined): number {
  if (given === undefined) return timeoutMsDefault;
  const ms = parseDuration(given);
  if (ms !== undefined && ms <= 3_600_000) return ms;
  throw new UsageError(`Invalid --timeout "${given}": expected a duration up to 1h, such as 15s`);
}
