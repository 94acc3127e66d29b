/**
 * Finds the config list of a network by name: in the plugin table, then among the lists on disk by
 * CNI name, then by file name; and parses it. Source: design D3; CNI SPEC 1.1 §1 (format, version
 * selection); libcni for the folder.
 */
import { readdirSync, statSync } from "node:fs";
import { basename, isAbsolute, join } from "node:path";
import {
  CniError,
  type CniVersion,
  code,
  compareVersions,
  isNetworkName,
  isSupported,
  oneLine,
  supportedVersions,
  toCniError,
} from "./cni.ts";
import type { Config, PluginEntry } from "./config/schema.ts";
import { isObject, parseJson } from "./json.ts";
import { readSmallFile } from "./streams.ts";

/** A network a pod can be attached to. */
export interface Network {
  /** The name it was asked for by, or its own name in a list of all networks. */
  name: string;
  list: NetworkConfigList;
  /** Where the list came from: a path, or the key in the table. */
  source: string;
  /** Its entry in the table, where there is one. */
  entry?: PluginEntry;
}

/** A config list found on disk, or why it cannot be used. */
export interface ListFile {
  path: string;
  list: NetworkConfigList | CniError;
}

const listSuffix = /\.(conflist|conf|json)$/;

/**
 * Resolves the name of a network.
 * @throws CniError 101 when no table entry and no list has it, 7 when its list is not valid,
 *   1 when its version is not supported
 */
export function resolveNetwork(config: Config, name: string): Network {
  if (!isNetworkName(name)) {
    const msg = `Cannot resolve network "${oneLine(name, 64)}": it is not a network name`;
    throw new CniError(code.networkNotFound, msg);
  }
  const entry = config.plugins.get(name);
  if (entry) return { name, ...resolveEntry(config, entry), entry };
  const files = configFiles(config.confDir).map(readListFile);
  const found = findOnDisk(config, name, files);
  if (!found) throw unknownNetwork(config, name, files);
  return { name, list: usable(found), source: found.path };
}

/** The list of a table entry: inline, in a file, or in the conf dir under the entry's own name. */
export function resolveEntry(
  config: Config,
  entry: PluginEntry,
  files?: ListFile[],
): Pick<Network, "list" | "source"> {
  const { name, conf } = entry;
  if (entry.config !== undefined) {
    const source = `plugins.${name}.config`;
    // An inline list is named after its entry unless it names itself.
    const list = parseConfigList({ name, ...entry.config }, source);
    return { list: finishList(list, config.confDir, source), source };
  }
  const found =
    conf === undefined ? findOnDisk(config, name, files) : readListFile(listPath(config, conf));
  if (found) return { list: usable(found), source: found.path };
  const place = `plugins.${name} at ${config.file}:${entry.line}`;
  const issue = `has neither conf nor config, and ${config.confDir} has no list of that name`;
  throw new CniError(code.networkNotFound, `Unknown network "${name}": ${place} ${issue}`);
}

/** The list of a file. @throws CniError when it cannot be used */
export function usable({ list }: ListFile): NetworkConfigList {
  if (list instanceof CniError) throw list;
  return list;
}

/**
 * Finds a list by its CNI name, else by its file name: `10-calico.conflist` is `calico` and
 * `10-calico`; and, where one file alone has it, what follows the first dash, as in CNI-Genie.
 * Reads the conf dir unless `files` has its lists already.
 */
export function findOnDisk(
  config: Config,
  name: string,
  files: ListFile[] = configFiles(config.confDir).map(readListFile),
): ListFile | undefined {
  const stemOf = ({ path }: ListFile) => basename(path).replace(listSuffix, "");
  const isNamed = (file: ListFile) => stemOf(file).replace(/^\d+-/, "") === name;
  const found =
    files.find(({ list }) => !(list instanceof CniError) && list.name === name) ??
    files.find((file) => stemOf(file) === name || isNamed(file));
  const others = found
    ? [found]
    : files.filter((one) => stemOf(one).replace(/^[^-]+-/, "") === name);
  return others.length === 1 ? others[0] : undefined;
}

/** Path of the file that `conf` of a table entry names. */
export function listPath({ confDir }: Config, conf: string): string {
  return isAbsolute(conf) ? conf : join(confDir, conf);
}

/** The error lists all known networks except those that delegate to genie. */
function unknownNetwork({ confDir, plugins }: Config, name: string, files: ListFile[]): CniError {
  const names = new Set(plugins.keys());
  const broken: string[] = [];
  for (const { list } of files) {
    if (list instanceof CniError) broken.push(list.message);
    else if (!list.plugins.some(({ type }) => type === "genie")) names.add(list.name);
  }
  const known = `known are ${[...names].join(", ") || "none"}`;
  const msg = `Unknown network "${name}": neither the plugin table nor ${confDir} has it, ${known}`;
  return new CniError(code.networkNotFound, msg, { details: broken.join("; ") });
}

/** Paths of the config files in a folder, in the order runtimes read them. */
export function configFiles(dir: string): string[] {
  try {
    const names = readdirSync(dir).filter((name) => listSuffix.test(name));
    return names.sort().map((name) => join(dir, name));
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code === "ENOENT") return [];
    const msg = `Cannot read folder ${dir}: ${toCniError(cause).message}`;
    throw new CniError(code.ioFailure, msg, { cause });
  }
}

/** Reads a config list; for one that cannot be used it returns the reason. */
export function readListFile(path: string): ListFile {
  try {
    const parsed = parseConfigList(parseJson(readSmallFile(path), path), path);
    return { path, list: finishList(parsed, join(path, ".."), path) };
  } catch (cause) {
    if (cause instanceof CniError) return { path, list: cause };
    const reason = (cause as NodeJS.ErrnoException).code ?? toCniError(cause).message;
    const msg = `Cannot read network config ${path}: ${reason}`;
    return { path, list: new CniError(code.ioFailure, msg, { cause }) };
  }
}

/** Adds the plugins from `<dir>/<name>/*.conf` (SPEC 1.1 §1) and checks that there are any. */
export function finishList(parsed: ParsedConfigList, dir: string, what: string): NetworkConfigList {
  const { loadsFolder, ...list } = parsed;
  const folder = join(dir, list.name);
  if (loadsFolder && statSync(folder, { throwIfNoEntry: false })?.isDirectory()) {
    const paths = configFiles(folder).filter((path) => path.endsWith(".conf"));
    const read = (path: string) => parsePluginConfig(parseJson(readSmallFile(path), path), path);
    list.plugins = [...list.plugins, ...paths.map(read)];
  }
  if (list.plugins.length === 0) throw invalid(what, "it has no plugins");
  return list;
}

/** One entry of a list's `plugins`, kept whole: unknown keys pass through (§1). */
export type PluginConfig = {
  type: string;
  capabilities?: Record<string, unknown>;
  [key: string]: unknown;
};

/** A network: the plugins to run in order for one attachment (§1). */
export interface NetworkConfigList {
  /** The highest version that both the list and genie know; every plugin is called with it. */
  cniVersion: CniVersion;
  name: string;
  disableCheck: boolean;
  disableGC: boolean;
  plugins: PluginConfig[];
}

/** A list without the plugins that its folder may add (§1 `loadOnlyInlinedPlugins`). */
export type ParsedConfigList = NetworkConfigList & { loadsFolder: boolean };

/** Most plugins in one list; more is a mistake or an attack. */
const pluginsMax = 32;

/**
 * Parses a network config list, or a single plugin config as a list of one.
 * @param what names it in errors, e.g. `/etc/cni/net.d/10-calico.conflist`
 * @throws CniError 7 for a list that breaks §1, 1 when no version of it is supported
 */
export function parseConfigList(value: unknown, what: string): ParsedConfigList {
  if (!isObject(value)) throw invalid(what, "expected a JSON object");
  const { name = "", plugins } = value;
  if (name === "") throw invalid(what, '"name" is missing');
  if (!isNetworkName(name)) {
    throw invalid(what, `"name" is ${quote(name)}, expected letters, digits, "_", "." and "-"`);
  }
  const isSingle = plugins === undefined && value["type"] !== undefined;
  const inlined = isSingle ? [value] : (plugins ?? []);
  if (!Array.isArray(inlined)) throw invalid(what, '"plugins" is not a list');
  const onlyInlined = readFlag(value, "loadOnlyInlinedPlugins", what);
  if (plugins === undefined && !isSingle && onlyInlined) {
    throw invalid(what, '"loadOnlyInlinedPlugins" is true but "plugins" is missing');
  }
  if (inlined.length > pluginsMax) throw invalid(what, `more than ${pluginsMax} plugins`);
  return {
    cniVersion: selectVersion(value, what),
    name,
    disableCheck: readFlag(value, "disableCheck", what),
    disableGC: readFlag(value, "disableGC", what),
    plugins: inlined.map((plugin) => parsePluginConfig(plugin, what)),
    loadsFolder: !isSingle && !onlyInlined,
  };
}

/** Parses one plugin config. @throws CniError 7 for a missing or unsafe `type` */
export function parsePluginConfig(value: unknown, what: string): PluginConfig {
  if (!isObject(value)) throw invalid(what, "a plugin config is not an object");
  const { type, capabilities, ipam } = value;
  if (typeof type !== "string" || type === "") throw invalid(what, 'a plugin has no "type"');
  const typeIssue = pluginTypeIssue(type);
  if (typeIssue) throw invalid(what, typeIssue);
  const ipamType = isObject(ipam) ? ipam["type"] : undefined;
  const ipamIssue = typeof ipamType === "string" && ipamType !== "" && pluginTypeIssue(ipamType);
  if (ipamIssue) throw invalid(what, `ipam: ${ipamIssue}`);
  if (!isObject(capabilities ?? {})) {
    throw invalid(what, `"capabilities" of plugin ${quote(type)} is not an object`);
  }
  return value as PluginConfig;
}

/** Why `type` cannot name a plugin binary, or undefined when it can (§1 `type`). */
export function pluginTypeIssue(type: string): string | undefined {
  if (/^[a-zA-Z0-9_][a-zA-Z0-9_.+-]*$/.test(type) && type.length <= 255) return undefined;
  return `plugin type ${quote(type)} is not a file name of letters, digits, "_", ".", "+", "-"`;
}

/**
 * The version to speak: the highest of `cniVersion` and `cniVersions` that genie supports. Newer
 * ones are ignored; anything that is not a version is an error (§1, libcni).
 */
function selectVersion(list: Record<string, unknown>, what: string): CniVersion {
  const { cniVersion = "", cniVersions = [] } = list;
  if (!Array.isArray(cniVersions)) throw invalid(what, '"cniVersions" is not a list');
  const named = cniVersion === "" ? cniVersions : [cniVersion, ...cniVersions];
  for (const version of named) {
    if (typeof version !== "string" || !/^\d+\.\d+\.\d+$/.test(version)) {
      throw invalid(what, `${quote(version)} is not a CNI version`);
    }
  }
  // libcni: a config without any version is of the first one.
  if (named.length === 0) return "0.1.0";
  const highest = named.filter(isSupported).sort(compareVersions).pop();
  if (highest) return highest;
  const issue = `it names ${named.map(quote).join(", ")}`;
  const msg = `${issue}, supported are ${supportedVersions.join(", ")}`;
  throw new CniError(code.incompatibleVersion, `Unsupported CNI version in ${what}: ${msg}`);
}

/** Reads a boolean that older lists write as a string, as libcni does. */
function readFlag(list: Record<string, unknown>, key: string, what: string): boolean {
  const value = list[key] ?? false;
  if (typeof value === "boolean") return value;
  if (typeof value === "string" && /^(true|false)$/i.test(value)) return /^true$/i.test(value);
  throw invalid(what, `"${key}" is ${quote(value)}, expected true or false`);
}

function invalid(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid network config ${what}: ${issue}`);
}

function quote(value: unknown): string {
  return oneLine(JSON.stringify(value) ?? "undefined", 80);
}

/** True when any plugin of the list declares the capability (SPEC 1.1 §3 "runtimeConfig"). */
export function declaresCapability(list: NetworkConfigList, name: string): boolean {
  for (const { capabilities: own } of list.plugins) {
    if (isObject(own) && Object.hasOwn(own, name) && own[name] === true) return true;
  }
  return false;
}
