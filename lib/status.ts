/**
 * STATUS of the node, from the configuration: could an ADD work now? Runtimes poll it every few
 * seconds, so it loads little. Source: CNI SPEC 1.1 §2 "STATUS".
 */
import { existsSync } from "node:fs";
import { CniError, code, compareVersions, type Host, type Request, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import {
  findListOnDisk,
  findPlugins,
  type Network,
  networkAt,
  type PluginSearch,
  pluginSearch,
  resolveNetwork,
} from "./networks.ts";
import { loadConfig } from "./settings.ts";

/** STATUS is polled every few seconds, so a delegate that hangs must not hold it for long. */
const statusTimeoutMs = 5_000;

/**
 * STATUS: could an ADD of a pod that asks for nothing work now?
 *
 * @throws CniError 50 when not, or the code of the delegate that says no
 * @see CNI SPEC 1.1 §2 "STATUS"
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
 * Asks every network that a pod needs, and where one is chosen, the candidates.
 * @throws CniError of the first that says no
 */
export async function askNetworks(host: Host, config: Config, search: PluginSearch): Promise<void> {
  const { needed, candidates } = await neededNetworks(config, search);
  if (candidates) await askAny(host, config, candidates, search);
  for (const network of needed) await ask(host, network, search);
}

/**
 * Asks the plugins of a network. @throws CniError of the first that says no, 102 for a missing one
 */
async function ask(host: Host, network: Network, search: PluginSearch): Promise<void> {
  const { name, list } = network;
  const plugins = findPlugins(network, search);
  // Older plugins do not know STATUS: nothing runs, and nothing is loaded for running it.
  if (compareVersions(list.cniVersion, "1.1.0") < 0) return;
  const { statusChain } = await import("./delegate.ts");
  const cniPath = search.dirs.join(":");
  const deadlineMs = host.now() + statusTimeoutMs;
  const call = { network: name, list, plugins, cniPath, timeoutMs: statusTimeoutMs };
  await statusChain(host, call, { netns: "", token: "status", deadlineMs, signal: host.signal });
}

/**
 * Where the choice is ours, one network that works is enough. @throws as {@link ask}, of the first
 */
async function askAny(
  host: Host,
  config: Config,
  names: string[],
  search: PluginSearch,
): Promise<void> {
  const asked = await Promise.allSettled(
    names.map(async (name) => ask(host, resolveNetwork(config, name), search)),
  );
  const [first] = asked.flatMap((one) => (one.status === "rejected" ? [one.reason] : []));
  if (asked.every(({ status }) => status === "rejected")) throw first;
}

/**
 * Networks of the node that every pod needs, and those of which one is chosen. Those that are
 * objects of the API are left out: STATUS is polled, and must not depend on the API server.
 * @throws CniError 50 when there are none at all
 */
export async function neededNetworks(
  config: Config,
  search: PluginSearch,
): Promise<{ needed: Network[]; candidates?: string[] }> {
  const clusterNetwork = config.multus?.clusterNetwork ?? "";
  if (clusterNetwork.includes("/")) return { needed: [networkAt(clusterNetwork)] };
  if (clusterNetwork !== "") {
    const found = findListOnDisk(config, clusterNetwork);
    return { needed: found ? [{ name: clusterNetwork, ...found }] : [] };
  }
  const names = config.default.networks.map((text) => text.replace(/@.*/, ""));
  const always = config.default.always.filter((text) => !text.includes("/"));
  const candidates =
    names.length > 0 ? undefined : (await import("./wanted.ts")).candidateNetworks(config, search);
  if (candidates?.length === 0) throw new CniError(code.unavailable, "No network is configured");
  const all = new Set([...names, ...always.map((text) => text.replace(/@.*/, ""))]);
  const needed = [...all].map((name) => resolveNetwork(config, name));
  return { needed, ...(candidates && { candidates }) };
}
