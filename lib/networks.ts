/**
 * From the name of a network to its config list: the plugin table, then the config lists on disk by
 * CNI name, then by file name. Reads files, asks no one. Source: design D3; libcni for the folder.
 */
import { accessSync, constants, readdirSync, readFileSync, realpathSync, statSync } from "node:fs";
import { basename, isAbsolute, join } from "node:path";
import { CniError, code, isNetworkName, type Request, toCniError } from "./cni.ts";
import type { Config, PluginEntry } from "./config/schema.ts";
import { parseJson } from "./json.ts";
import { type NetworkConfigList, parseConfigList, parsePluginConfig } from "./netconf.ts";
import { oneLine } from "./text.ts";

/** A network a pod can be attached to. */
export interface Network {
  /** Name it was asked by, or its own where it was listed. */
  name: string;
  list: NetworkConfigList;
  /** Where the list came from: a path, or the table's entry. */
  source: string;
  /** The table's entry for it, where there is one. */
  entry?: PluginEntry;
}

/** A config list found on disk. */
interface ListFile {
  path: string;
  /** The list, or why it cannot be used. */
  list: NetworkConfigList | CniError;
}

/** Largest config file read, in bytes. */
const fileBytesMax = 1024 * 1024;
const listSuffix = /\.(conflist|conf|json)$/;

/**
 * Resolves the name of a network.
 *
 * @throws CniError 101 when no table entry and no list has it, 7 when its list is not valid,
 *   1 when its version is not supported
 */
export function resolveNetwork(config: Config, name: string): Network {
  if (!isNetworkName(name)) {
    throw new CniError(
      code.networkNotFound,
      `Cannot resolve network "${oneLine(name, 64)}": it is not a network name`,
    );
  }
  const entry = config.plugins.get(name);
  if (entry) return { name, ...resolveEntry(config, entry), entry };
  const found = findOnDisk(config, name);
  if (!found) throw unknownNetwork(config, name);
  return { name, list: usable(found), source: found.path };
}

/**
 * Networks of the table by name, what is in the conf dir read once at most. One that cannot be
 * resolved is left out.
 */
export function tableNetworks(config: Config): Map<string, Network> {
  let files: ListFile[] | undefined;
  const networks = new Map<string, Network>();
  for (const entry of config.plugins.values()) {
    if (entry.conf === undefined && entry.config === undefined) {
      files ??= listFiles(config.confDir).map(readListFile);
    }
    try {
      networks.set(entry.name, { name: entry.name, ...resolveEntry(config, entry, files), entry });
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
    }
  }
  return networks;
}

/** The list of a table entry: inline, in a file, or in the conf dir under the entry's own name. */
function resolveEntry(
  config: Config,
  entry: PluginEntry,
  files?: ListFile[],
): { list: NetworkConfigList; source: string } {
  if (entry.config !== undefined) {
    const source = `plugins.${entry.name}.config`;
    // An inline list is named after its entry unless it names itself.
    const list = parseConfigList({ name: entry.name, ...entry.config }, source);
    return { list: finishList(list, config.confDir, source), source };
  }
  if (entry.conf !== undefined) {
    const path = listPath(config, entry.conf);
    return { list: usable(readListFile(path)), source: path };
  }
  const found = findOnDisk(config, entry.name, files);
  if (found) return { list: usable(found), source: found.path };
  throw new CniError(
    code.networkNotFound,
    `Unknown network "${entry.name}": plugins.${entry.name} at ${config.file}:${entry.line} has ` +
      `neither conf nor config, and ${config.confDir} has no list of that name`,
  );
}

function usable(file: ListFile): NetworkConfigList {
  if (file.list instanceof CniError) throw file.list;
  return file.list;
}

/** @param files what is in the conf dir, where it was read already */
function findOnDisk(
  config: Config,
  name: string,
  files: ListFile[] = listFiles(config.confDir).map(readListFile),
): ListFile | undefined {
  return (
    files.find(({ list }) => !(list instanceof CniError) && list.name === name) ??
    files.find(({ path }) => fileNames(path).includes(name))
  );
}

/**
 * The list on disk whose CNI name is `name`: config lists before single configs (NPWG §3.4.1).
 * @throws CniError 7 when the file that has it is not valid
 */
export function findListOnDisk(
  config: Config,
  name: string,
): { list: NetworkConfigList; source: string } | undefined {
  const files = listFiles(config.confDir).map(readListFile);
  const named = files.filter(({ list }) => !(list instanceof CniError) && list.name === name);
  const found = named.find(({ path }) => path.endsWith(".conflist")) ?? named[0];
  return found && { list: usable(found), source: found.path };
}

/**
 * Names of the table entries whose list is this one: by CNI name, or by the file it stands in.
 * Without this a pod would pass their rules by asking for the list under its other names.
 */
export function entriesOf(
  config: Config,
  { list, source }: { list: NetworkConfigList; source: string },
): string[] {
  const isSame = ({ name, conf, config: inline }: PluginEntry): boolean => {
    if (name === list.name) return true;
    if (inline !== undefined) return false;
    const path = conf === undefined ? findOnDisk(config, name)?.path : listPath(config, conf);
    return path !== undefined && realPath(path) === realPath(source);
  };
  return [...config.plugins.values()].filter(isSame).map(({ name }) => name);
}

/** Where `conf` of a table entry is. */
function listPath({ confDir }: Config, conf: string): string {
  return isAbsolute(conf) ? conf : join(confDir, conf);
}

/** A path without links; as it is where nothing is, or nothing any more. */
function realPath(path: string): string {
  try {
    return realpathSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return path;
  }
}

/**
 * Reads one config list from a file.
 * @throws CniError 5 when it cannot be read, 7 when it is not valid
 */
export function readList(path: string): NetworkConfigList {
  return usable(readListFile(path));
}

/**
 * The first config list in a folder, in the order runtimes read them.
 * @throws CniError 101 when there is none, 7 when it is not valid
 */
export function firstListIn(dir: string): NetworkConfigList {
  const [first] = listFiles(dir);
  if (first) return readList(first);
  throw new CniError(code.networkNotFound, `Unknown network: ${dir} has no config list`);
}

/** Names a file answers to: `10-calico.conflist` is `calico` and `10-calico`. */
function fileNames(path: string): string[] {
  const stem = basename(path).replace(listSuffix, "");
  return [stem.replace(/^\d+-/, ""), stem];
}

/** Looks at no entry's list: that an entry has none may be the very error. */
function unknownNetwork(config: Config, name: string): CniError {
  const files = listFiles(config.confDir).map(readListFile);
  const lists = files.flatMap(({ list }) => (list instanceof CniError ? [] : [list]));
  const others = lists.filter(({ plugins }) => !plugins.some(({ type }) => type === "genie"));
  const listed = others.map((list) => list.name);
  const names = new Set([...config.plugins.keys(), ...listed]);
  names.delete(name);
  const broken = files.flatMap(({ list }) => (list instanceof CniError ? [list.message] : []));
  return new CniError(
    code.networkNotFound,
    `Unknown network "${name}": neither the plugin table nor ${config.confDir} has it, known are ` +
      (names.size === 0 ? "none" : [...names].join(", ")),
    { details: broken.join("; ") },
  );
}

/**
 * Lists every network of the node: the table's in its order, then those on disk whose name the
 * table does not take. What cannot be used is returned as a problem, not thrown.
 */
export function listNetworks(config: Config): { networks: Network[]; problems: CniError[] } {
  const networks: Network[] = [];
  const problems: CniError[] = [];
  const files = listFiles(config.confDir).map(readListFile);
  for (const entry of config.plugins.values()) {
    try {
      networks.push({ name: entry.name, ...resolveEntry(config, entry, files), entry });
    } catch (error) {
      problems.push(toCniError(error));
    }
  }
  const taken = new Set([
    ...networks.flatMap(({ name, list }) => [name, list.name]),
    ...config.plugins.keys(),
  ]);
  for (const { path, list } of files) {
    if (list instanceof CniError) problems.push(list);
    else if (!taken.has(list.name)) {
      taken.add(list.name);
      networks.push({ name: list.name, list, source: path });
    }
  }
  return { networks, problems };
}

/** Paths of the config files in a folder, in the order runtimes read them. */
function listFiles(dir: string): string[] {
  try {
    return readdirSync(dir)
      .filter((name) => listSuffix.test(name))
      .sort()
      .map((name) => join(dir, name));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return [];
    throw new CniError(code.ioFailure, `Cannot read folder ${dir}: ${toCniError(error).message}`, {
      cause: error,
    });
  }
}

function readListFile(path: string): ListFile {
  try {
    const parsed = parseConfigList(parseJson(readSmallFile(path), path), path);
    return { path, list: finishList(parsed, join(path, ".."), path) };
  } catch (error) {
    if (error instanceof CniError) return { path, list: error };
    const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
    const list = new CniError(code.ioFailure, `Cannot read network config ${path}: ${reason}`, {
      cause: error,
    });
    return { path, list };
  }
}

/**
 * Reads a text file of bounded size.
 * @throws CniError 5 when it is larger than 1 MiB or no regular file; what `fs` throws otherwise
 */
export function readSmallFile(path: string): string {
  const found = statSync(path);
  if (!found.isFile() || found.size > fileBytesMax) {
    throw new CniError(
      code.ioFailure,
      `Cannot read ${path}: expected a regular file of at most ${fileBytesMax} bytes`,
    );
  }
  return readFileSync(path, "utf8");
}

/** Adds the plugins from `<dir>/<name>/*.conf` (SPEC 1.1 §1) and checks that there are any. */
function finishList(
  { loadsFolder, ...list }: ReturnType<typeof parseConfigList>,
  dir: string,
  what: string,
): NetworkConfigList {
  const added = loadsFolder ? readPluginFolder(join(dir, list.name)) : [];
  const plugins = [...list.plugins, ...added];
  if (plugins.length === 0) {
    throw new CniError(code.invalidConfig, `Invalid network config ${what}: it has no plugins`);
  }
  return { ...list, plugins };
}

function readPluginFolder(dir: string): NetworkConfigList["plugins"] {
  if (!statSync(dir, { throwIfNoEntry: false })?.isDirectory()) return [];
  return listFiles(dir)
    .filter((path) => path.endsWith(".conf"))
    .map((path) => parsePluginConfig(parseJson(readSmallFile(path), path), path));
}

/** Where plugin binaries are looked for, and what counts as ourselves. */
export interface PluginSearch {
  /** CNI_PATH, then the table's `bin_dirs`. */
  dirs: string[];
  /** `type` under which the runtime calls us. */
  ownType: string | undefined;
  /** What was found in this call: a plugin's path by type, and where a path leads. */
  found?: Map<string, string | undefined>;
  real?: Map<string, string>;
}

/**
 * Finds the binary of every plugin of a network.
 *
 * @returns absolute paths, in the order of the list's plugins
 * @throws CniError 102 when one is missing, 7 when one is genie itself, which would never end
 */
export function findPlugins(network: Network, search: PluginSearch): string[] {
  return network.list.plugins.map(({ type }) => {
    const path = findOnce(type, search);
    if (isOurself(type, path, search)) {
      throw new CniError(
        code.invalidConfig,
        `Cannot attach network "${network.name}": its plugin "${type}" in ${network.source} is ` +
          "genie itself, name another network",
      );
    }
    if (path) return path;
    throw new CniError(
      code.delegateNotFound,
      `Cannot attach network "${network.name}": plugin "${type}" is in none of ` +
        `${search.dirs.join(", ") || "no folder"}, install it or extend bin_dirs`,
    );
  });
}

/** Is any plugin of this network genie itself? Such a network is never a candidate. */
export function delegatesToOurself(network: Network, search: PluginSearch): boolean {
  return network.list.plugins.some(({ type }) => isOurself(type, findOnce(type, search), search));
}

function isOurself(type: string, path: string | undefined, search: PluginSearch): boolean {
  if (type === "genie" || type === search.ownType) return true;
  if (path === undefined) return false;
  search.real ??= new Map();
  const real = search.real.get(path) ?? realPath(path);
  search.real.set(path, real);
  // An upgrade may just have replaced it: the kernel says so behind the path.
  ownPath ??= realPath(process.execPath.replace(/ \(deleted\)$/, ""));
  return real === ownPath;
}

/** Where this program is; it does not move while it runs. */
let ownPath: string | undefined;

/** As {@link findPlugin}; networks of one call mostly share their plugins. */
function findOnce(type: string, search: PluginSearch): string | undefined {
  search.found ??= new Map();
  if (!search.found.has(type)) search.found.set(type, findPlugin(type, search.dirs));
  return search.found.get(type);
}

/** Absolute path of a plugin's binary in the first folder that has it, or undefined. */
export function findPlugin(type: string, dirs: string[]): string | undefined {
  return dirs
    .filter((dir) => isAbsolute(dir))
    .map((dir) => join(dir, type))
    .find((path) => {
      try {
        accessSync(path, constants.X_OK);
        return statSync(path).isFile();
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === undefined) throw error;
        return false;
      }
    });
}

/** Where this call looks for plugin binaries. */
export function pluginSearch(
  config: Config,
  request: Pick<Request, "path" | "config">,
): PluginSearch {
  return { dirs: [...request.path, ...config.binDirs], ownType: request.config.type };
}

/** A folder's first list, or the list of a file. @throws CniError 5, 7 or 101 */
export function networkAt(path: string): Network {
  const isFolder = statSync(path, { throwIfNoEntry: false })?.isDirectory() ?? false;
  const list = isFolder ? firstListIn(path) : readList(path);
  return { name: list.name, list, source: path };
}
