/**
 * The one name of a network of the node, whichever of its names it was asked for by: record, KPIs,
 * rules of access and reports go by it. It is that of the table entry that alone has the list, else
 * the CNI name of the list; where that leads elsewhere, the name that was asked for.
 */
import { realPath } from "../binaries.ts";
import type { Wanted } from "../call.ts";
import { CniError } from "../cni.ts";
import type { Config, PluginEntry } from "../config/schema.ts";
import { findOnDisk, listPath, type Network, resolveNetwork } from "../networks.ts";

/** Table entries with a list that was found on disk: by its CNI name, or by the file it is in. */
export function entriesWith(config: Config, { list, source }: Network): PluginEntry[] {
  return [...config.plugins.values()].filter(({ name, conf, config: inline }) => {
    if (name === list.name) return true;
    if (inline !== undefined) return false;
    const path = conf === undefined ? findOnDisk(config, name)?.path : listPath(config, conf);
    return path !== undefined && realPath(path) === realPath(source);
  });
}

/** A network under its one name. @throws CniError 5, 7 or 101 of a table entry that is broken */
export function identified(config: Config, network: Network): Network {
  if (network.entry) return network;
  const [entry, other] = entriesWith(config, network);
  const own = resolveNetwork(config, entry && !other ? entry.name : network.list.name);
  // Of several entries no single one decides: the rules of all count.
  const isOne = !(other && own.entry) && realPath(own.source) === realPath(network.source);
  return isOne ? own : network;
}

/** The one name of a network; the same where none is found. */
export function networkName(config: Config, name: string): string {
  try {
    return identified(config, resolveNetwork(config, name)).name;
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return name;
  }
}

/** What is wanted, by the one name of its network. */
export function identifiedWanted(config: Config, wanted: Wanted): Wanted {
  if (wanted.from !== "node") return wanted;
  return { ...wanted, network: networkName(config, wanted.network) };
}

/** Those that lead to none of the networks of `others`. */
export function otherThan(config: Config, all: Wanted[], others: Wanted[]): Wanted[] {
  const keyOf = (one: Wanted) => {
    const { from, namespace, network } = identifiedWanted(config, one);
    return `${from} ${namespace} ${network}`;
  };
  const keys = new Set(others.map(keyOf));
  return all.filter((one) => !keys.has(keyOf(one)));
}
