/** Lists of networks: all of the node, the candidates of a choice, those on disk. */
import { statSync } from "node:fs";
import { delegatesToOurself, type PluginSearch } from "./binaries.ts";
import { CniError, code, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import {
  configFiles,
  type ListFile,
  type Network,
  type NetworkConfigList,
  readListFile,
  resolveEntry,
  usable,
} from "./networks.ts";

/**
 * Every network of the node: those of the table in its order, then those on disk with other names.
 * What cannot be used is returned as a problem, not thrown.
 */
export function listNetworks(config: Config): { networks: Network[]; problems: CniError[] } {
  const networks: Network[] = [];
  const problems: CniError[] = [];
  const files = configFiles(config.confDir).map(readListFile);
  for (const entry of config.plugins.values()) {
    try {
      networks.push({ name: entry.name, ...resolveEntry(config, entry, files), entry });
    } catch (error) {
      problems.push(toCniError(error));
    }
  }
  const taken = new Set([...config.plugins.keys(), ...networks.map(({ list }) => list.name)]);
  for (const { path, list } of files) {
    if (list instanceof CniError) problems.push(list);
    else if (!taken.has(list.name)) {
      taken.add(list.name);
      networks.push({ name: list.name, list, source: path });
    }
  }
  return { networks, problems };
}

/** Networks of the table by name, without those that cannot be resolved. */
function tableNetworks(config: Config): Map<string, Network> {
  let files: ListFile[] | undefined;
  const networks = new Map<string, Network>();
  for (const entry of config.plugins.values()) {
    const { name, conf } = entry;
    if (!conf && !entry.config) files ??= configFiles(config.confDir).map(readListFile);
    try {
      networks.set(name, { name, ...resolveEntry(config, entry, files), entry });
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
    }
  }
  return networks;
}

/**
 * The networks that may be chosen: `select.candidates`, else those of the table, else those on
 * disk. One without `network` cannot be used; resolving its name tells why.
 */
export function listCandidates(
  config: Config,
  search: PluginSearch,
): { name: string; network?: Network }[] {
  const { plugins, select } = config;
  const networks =
    plugins.size > 0
      ? tableNetworks(config)
      : new Map(listNetworks(config).networks.map((one) => [one.name, one]));
  const names = select.candidates ?? (plugins.size > 0 ? plugins : networks).keys();
  return [...new Set(names)].flatMap((name) => {
    const network = networks.get(name);
    // A network that leads back to genie is passed over; as a named candidate it is refused later.
    if (network && !select.candidates && delegatesToOurself(network, search)) return [];
    return [{ name, ...(network && { network }) }];
  });
}

/**
 * The network of pods that ask for nothing on a node that CNI-Genie set up, whose genie.conf names
 * no `default_plugin`: the first list of the conf dir, as CNI-Genie and the kubelet take it.
 * Undefined where nothing of CNI-Genie is there, or the table says what may be chosen.
 */
export async function firstOfGenie(
  config: Config,
  search: PluginSearch,
  stdin: Record<string, unknown> = {},
): Promise<string | undefined> {
  if (config.plugins.size > 0 || config.select.candidates) return undefined;
  const { isGenieConfig } = await import("./config/foreign_config.ts");
  const found = listNetworks(config).networks.flatMap(({ list }) => list.plugins);
  if (![stdin, ...found].some(isGenieConfig)) return undefined;
  return candidateNetworks(config, search)[0];
}

/** Names of the networks that may be chosen, see {@link listCandidates}. */
export function candidateNetworks(config: Config, search: PluginSearch): string[] {
  return listCandidates(config, search).map(({ name }) => name);
}

/**
 * The list on disk whose CNI name is `name`: config lists before single configs (NPWG §3.4.1).
 * @throws CniError 7 when the file that has it is not valid
 */
export function findListOnDisk(
  config: Config,
  name: string,
): { list: NetworkConfigList; source: string } | undefined {
  const files = configFiles(config.confDir).map(readListFile);
  const named = files.filter(({ list }) => !(list instanceof CniError) && list.name === name);
  const found = named.find(({ path }) => path.endsWith(".conflist")) ?? named[0];
  return found && { list: usable(found), source: found.path };
}

/** The config list of a file. @throws CniError 5 when it cannot be read, 7 when not valid */
export function readList(path: string): NetworkConfigList {
  return usable(readListFile(path));
}

/** The network of a file, or of the first file in a folder. @throws CniError 5, 7 or 101 */
export function networkAt(path: string): Network {
  const isFolder = statSync(path, { throwIfNoEntry: false })?.isDirectory();
  const file = isFolder ? configFiles(path)[0] : path;
  if (!file)
    throw new CniError(code.networkNotFound, `Unknown network: ${path} has no config list`);
  const list = readList(file);
  return { name: list.name, list, source: path };
}
