/**
 * CHECK of one container, from the record; STATUS of the node, from the configuration.
 * Source: CNI SPEC 1.1 §2 "CHECK", "STATUS".
 */
import { existsSync } from "node:fs";
import { CniError, code, type Host, type Request, toCniError } from "./cni.ts";
import type { Config } from "./config_schema.ts";
import { closeState, openState } from "./database.ts";
import { type ChainOptions, checkChain, statusChain } from "./delegate.ts";
import { openJournal, writeAlone } from "./ledger.ts";
import { newOperation } from "./lock.ts";
import {
  findListOnDisk,
  findPlugins,
  type Network,
  type PluginSearch,
  resolveNetwork,
} from "./networks.ts";
import { networkAt, pluginSearch } from "./plan.ts";
import { loadConfig, loadNodeSettings } from "./settings.ts";
import { attachments } from "./state.ts";
import { storedResult } from "./undo.ts";
import { candidateNetworks } from "./wanted.ts";

/**
 * CHECK: every attachment is still as ADD left it, says each delegate.
 *
 * @throws CniError of the first delegate that says no; 3 when there is no record of the container
 */
export async function check(host: Host, request: Request): Promise<undefined> {
  const settings = await loadNodeSettings(host, request.config);
  const { disableCheck, delOnly } = request.config;
  if (disableCheck === true || delOnly === true) return undefined;
  const journal = openJournal(host, request);
  const state = openState(host, settings.stateDir);
  try {
    const found = attachments(host, state, request.containerId).filter(
      (one) => one.requestIfName === request.ifName,
    );
    if (found.length === 0) {
      throw new CniError(
        code.unknownContainer,
        `Cannot check container ${request.containerId}: nothing for ${request.ifName} is on record`,
      );
    }
    const options: ChainOptions = {
      netns: request.netns,
      token: newOperation(host, request.containerId, "CHECK").token,
      deadlineMs: host.now() + checkTimeoutMs,
      signal: host.signal,
      journal,
    };
    for (const attachment of found) {
      if (attachment.state !== "attached") {
        throw new CniError(
          code.tryAgainLater,
          `Cannot check network "${attachment.network}": it is ${attachment.state}`,
        );
      }
      await checkChain(host, attachment, storedResult(attachment), options);
    }
    writeAlone(host, state, journal);
    return undefined;
  } catch (error) {
    writeAlone(host, state, journal, error);
    throw error;
  } finally {
    closeState(state);
  }
}

const checkTimeoutMs = 60_000;
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
  const { needed, candidates } = neededNetworks(config, search);
  if (candidates) await askAny(host, config, candidates, search);
  for (const network of needed) await ask(host, network, search);
}

/**
 * Asks the plugins of a network. @throws CniError of the first that says no, 102 for a missing one
 */
async function ask(host: Host, network: Network, search: PluginSearch): Promise<void> {
  const { name, list } = network;
  const plugins = findPlugins(network, search);
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
export function neededNetworks(
  config: Config,
  search: PluginSearch,
): { needed: Network[]; candidates?: string[] } {
  const clusterNetwork = config.multus?.clusterNetwork ?? "";
  if (clusterNetwork.includes("/")) return { needed: [networkAt(clusterNetwork)] };
  if (clusterNetwork !== "") {
    const found = findListOnDisk(config, clusterNetwork);
    return { needed: found ? [{ name: clusterNetwork, ...found }] : [] };
  }
  const names = config.default.networks.map((text) => text.replace(/@.*/, ""));
  const always = config.default.always.filter((text) => !text.includes("/"));
  const candidates = names.length > 0 ? undefined : candidateNetworks(config, search);
  if (candidates?.length === 0) throw new CniError(code.unavailable, "No network is configured");
  const all = new Set([...names, ...always.map((text) => text.replace(/@.*/, ""))]);
  const needed = [...all].map((name) => resolveNetwork(config, name));
  return { needed, ...(candidates && { candidates }) };
}
