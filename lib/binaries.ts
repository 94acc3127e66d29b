/** Finds the binaries of plugins, and which is genie itself. Source: CNI SPEC 1.1 §2 CNI_PATH. */
import { accessSync, constants, realpathSync, statSync } from "node:fs";
import { isAbsolute, join } from "node:path";
import type { Request } from "./call.ts";
import { CniError, code } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import type { Network } from "./networks.ts";

/** The path without symbolic links; the same path when there is no such file. */
export function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return path;
  }
}

/** Where a call looks for plugin binaries. */
export interface PluginSearch {
  /** CNI_PATH, then the table's `bin_dirs`. */
  dirs: string[];
  /** `type` under which the runtime calls genie. */
  ownType: string | undefined;
  /** What was found by type: the networks of a call mostly share their plugins. */
  found?: Map<string, { path: string | undefined; isGenie: boolean }>;
}

/**
 * Absolute paths of the binaries of a network's plugins, in the order of its list.
 * @throws CniError 102 when one is missing, 7 when one is genie itself: that would never end
 */
export function findPlugins({ name, list, source }: Network, search: PluginSearch): string[] {
  return list.plugins.map(({ type }) => {
    const { path, isGenie } = findOnce(type, search);
    if (isGenie) {
      const issue = `its plugin "${type}" in ${source} is genie itself, name another network`;
      throw new CniError(code.invalidConfig, `Cannot attach network "${name}": ${issue}`);
    }
    if (path) return path;
    const dirs = [...new Set(search.dirs)].join(", ") || "no folder";
    const issue = `plugin "${type}" is in none of ${dirs}, install it or extend bin_dirs`;
    throw new CniError(code.delegateNotFound, `Cannot attach network "${name}": ${issue}`);
  });
}

/** True when a plugin of this network is genie itself. Such a network is never a candidate. */
export function delegatesToOurself(network: Network, search: PluginSearch): boolean {
  return network.list.plugins.some(({ type }) => findOnce(type, search).isGenie);
}

/** Path of the running program. */
let ownPath: string | undefined;

function findOnce(type: string, search: PluginSearch) {
  search.found ??= new Map();
  const known = search.found.get(type);
  if (known) return known;
  const path = findPlugin(type, search.dirs);
  let isGenie = type === "genie" || type === search.ownType;
  if (path !== undefined && !isGenie) {
    // When an upgrade has just replaced the binary, the kernel adds " (deleted)" to its path.
    ownPath ??= realPath(process.execPath.replace(/ \(deleted\)$/, ""));
    isGenie = realPath(path) === ownPath;
  }
  const found = { path, isGenie };
  search.found.set(type, found);
  return found;
}

/** Absolute path of a plugin's binary in the first folder that has it, or undefined. */
export function findPlugin(type: string, dirs: string[]): string | undefined {
  for (const dir of dirs) {
    if (!isAbsolute(dir)) continue;
    const path = join(dir, type);
    try {
      accessSync(path, constants.X_OK);
      if (statSync(path).isFile()) return path;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    }
  }
  return undefined;
}

/** Where this call looks for plugin binaries. */
export function pluginSearch(table: Config, call: Pick<Request, "path" | "config">): PluginSearch {
  return { dirs: [...call.path, ...table.binDirs], ownType: call.config.type };
}
