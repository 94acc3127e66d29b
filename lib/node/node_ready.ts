/** Is a pod's default network ready on this node (NPWG v1.3 §6.1)? And what its conf dir holds. */
import { accessSync, constants, readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { CniError, type Host } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { parseJson } from "../json.ts";
import { type Network, resolveNetwork } from "../networks.ts";
import { askNetworks, neededNetworks } from "../status.ts";
import { readIfThere } from "./files.ts";
import { type ConfFile, isConfName, sortConfs } from "./genie_list.ts";
import { hostPath } from "./host_root.ts";

/** The files of a conf dir that runtimes look at, in their order. @throws CniError 5 */
export function readConfs(root: string, confDir: string): ConfFile[] {
  const dir = hostPath(root, confDir);
  if (!statSync(dir, { throwIfNoEntry: false })?.isDirectory()) return [];
  return sortConfs(
    readdirSync(dir)
      .filter(isConfName)
      .map((name) => ({ name, value: readConf(hostPath(root, join(confDir, name))) })),
  );
}

function readConf(path: string): unknown {
  try {
    return parseJson(readIfThere(path) ?? "", path);
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/**
 * Why a pod that asks for nothing could not be attached; undefined when it could. On the node
 * itself the plugins are asked as by STATUS; from a container, where they cannot run, it is enough
 * that they are there.
 */
export async function whyNotReady(
  host: Host,
  root: string,
  config: Config,
): Promise<string | undefined> {
  try {
    const here = seenFrom(root, config);
    const search = { dirs: here.binDirs, ownType: "genie" };
    if (root === "/") await askNetworks(host, here, search);
    else await checkPresence(root, config, here);
  } catch (error) {
    if (error instanceof CniError) return error.message;
    throw error;
  }
  return undefined;
}

/** A table whose paths are ours, not the node's. */
function seenFrom(root: string, config: Config): Config {
  const plugins = [...config.plugins].map(([name, entry]) => {
    const { conf } = entry;
    return [
      name,
      conf?.startsWith("/") ? { ...entry, conf: hostPath(root, conf) } : entry,
    ] as const;
  });
  return {
    ...config,
    confDir: hostPath(root, config.confDir),
    binDirs: config.binDirs.map((dir) => hostPath(root, dir)),
    plugins: new Map(plugins),
  };
}

/** Every network that a pod needs is there, with its plugins. @throws CniError of the first */
async function checkPresence(root: string, config: Config, here: Config): Promise<void> {
  const search = { dirs: here.binDirs, ownType: "genie" };
  const { needed, candidates } = await neededNetworks(here, search);
  for (const network of needed) checkPlugins(root, config, network);
  const issues = candidates?.map((name) => {
    try {
      checkPlugins(root, config, resolveNetwork(here, name));
      return undefined;
    } catch (error) {
      if (error instanceof CniError) return error;
      throw error;
    }
  });
  if (issues?.every((issue) => issue !== undefined) && issues[0]) throw issues[0];
}

/** @throws CniError 102 for a plugin whose binary is not there */
function checkPlugins(root: string, { binDirs }: Config, { name, list }: Network): void {
  for (const { type } of list.plugins) {
    if (binDirs.some((dir) => isExecutable(hostPath(root, join(dir, type))))) continue;
    throw new CniError(102, `plugin "${type}" of network "${name}" is in none of ${binDirs}`);
  }
}

/** True for a file that may be run. */
export function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return statSync(path).isFile();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return false;
  }
}
