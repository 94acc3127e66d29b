/**
 * STATUS of the node, from the configuration: could an ADD work now? Source: CNI SPEC 1.1 §2
 * "STATUS". Runtimes poll it every few seconds, so it loads little.
 */
import { existsSync } from "node:fs";
import { findPlugins, type PluginSearch, pluginSearch } from "./binaries.ts";
import type { Host, Request } from "./call.ts";
import { CniError, code, compareVersions, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { type Network, type NetworkConfigList, resolveNetwork } from "./networks.ts";
import type { Attachment } from "./record.ts";
import { loadConfig } from "./settings.ts";

/** Short, because STATUS is polled every few seconds. */
const statusTimeoutMs = 5_000;

/**
 * STATUS: could an ADD of a pod that asks for nothing work now?
 * @throws CniError 50 when not, or 51 from a delegate that answers so
 */
export async function status(host: Host, request: Request): Promise<undefined> {
  if (request.config["delOnly"] === true) return undefined;
  try {
    const config = await loadConfig(request.config);
    host.log = { level: config.logLevel, file: config.logFile };
    if (config.readinessFile !== undefined && !existsSync(config.readinessFile)) {
      throw new CniError(
        code.unavailable,
        `The default network is not ready: ${config.readinessFile} does not exist`,
      );
    }
    await askNetworks(host, config, pluginSearch(config, request));
  } catch (error) {
    const { code: number, message, details } = toCniError(error);
    const known = number === code.unavailable || number === code.unavailableLimited;
    throw new CniError(known ? number : code.unavailable, message, { details, cause: error });
  }
  return undefined;
}

/**
 * Asks every network that a pod needs; where one is chosen, one candidate that works is enough.
 * @throws CniError of the first network that fails
 */
export async function askNetworks(host: Host, config: Config, search: PluginSearch): Promise<void> {
  const { needed, candidates } = await neededNetworks(config, search);
  if (candidates) {
    const asked = await Promise.allSettled(
      candidates.map(async (name) => askNetwork(host, resolveNetwork(config, name), search)),
    );
    const [first] = asked.flatMap((one) => (one.status === "rejected" ? [one.reason] : []));
    if (asked.every(({ status }) => status === "rejected")) throw first;
  }
  for (const network of needed) await askNetwork(host, network, search);
}

/** Asks a network. @throws CniError of the first plugin that fails, 102 for a missing one */
export async function askNetwork(host: Host, network: Network, search: PluginSearch) {
  const { name, list } = network;
  const plugins = findPlugins(network, search);
  const cniPath = search.dirs.join(":");
  await statusChain(host, { network: name, list, plugins, cniPath, timeoutMs: statusTimeoutMs });
}

/**
 * Asks the plugins of a network whether an ADD could work now; lists older than STATUS pass.
 * @throws CniError of the first plugin that fails, with its code
 */
export async function statusChain(host: Host, network: NetworkCall): Promise<void> {
  if (compareVersions(network.list.cniVersion, "1.1.0") < 0) return;
  const { callPlugin } = await import("./delegate.ts");
  const deadlineMs = host.now() + network.timeoutMs;
  const chain = { host, netns: "", token: "status", deadlineMs, signal: host.signal };
  for (const index of network.list.plugins.keys()) {
    await callPlugin(chain, withoutAttachment(network), { command: "STATUS", index });
  }
}

/**
 * The networks that every pod needs, and the names of those of which one is chosen. Objects of the
 * API are left out, because STATUS must not depend on the API server.
 * @throws CniError 50 when there are none at all
 */
export async function neededNetworks(
  config: Config,
  search: PluginSearch,
): Promise<{ needed: Network[]; candidates?: string[] }> {
  const clusterNetwork = config.multus?.clusterNetwork ?? "";
  if (clusterNetwork.includes("/")) {
    return { needed: [(await import("./node_networks.ts")).networkAt(clusterNetwork)] };
  }
  if (clusterNetwork !== "") {
    const { findListOnDisk } = await import("./node_networks.ts");
    const found = findListOnDisk(config, clusterNetwork);
    return { needed: found ? [{ name: clusterNetwork, ...found }] : [] };
  }
  const { networks, always } = config.default;
  const all = [...networks, ...always.filter((text) => !text.includes("/"))];
  const names = new Set(all.map((text) => text.replace(/@.*/, "")));
  const needed = () => [...names].map((name) => resolveNetwork(config, name));
  if (networks.length > 0) return { needed: needed() };
  const { candidateNetworks, firstOfGenie } = await import("./node_networks.ts");
  const first = await firstOfGenie(config, search);
  if (first !== undefined) return { needed: [resolveNetwork(config, first), ...needed()] };
  const candidates = candidateNetworks(config, search);
  if (candidates.length === 0) throw new CniError(code.unavailable, "No network is configured");
  return { needed: needed(), candidates };
}

/** A network as STATUS and GC see it, without a container or an interface. */
export interface NetworkCall {
  network: string;
  list: NetworkConfigList;
  plugins: string[];
  cniPath: string;
  timeoutMs: number;
}

/** A network as {@link callPlugin} takes it, for operations that concern no attachment. */
export function withoutAttachment(network: NetworkCall): Attachment {
  return {
    ...network,
    containerId: "",
    requestIfName: "",
    requestNetwork: "",
    ifName: "",
    primary: false,
    reason: "",
    cniArgs: "",
    capabilityArgs: {},
    args: {},
    netns: "",
    pod: { namespace: "", name: "", uid: "" },
  };
}
