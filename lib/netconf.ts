/**
 * Network config lists, and the request config that a delegate reads on stdin.
 * Pure: no I/O. Source: CNI SPEC 1.1 §1 (format, version selection), §3 (derivation).
 */
import {
  CniError,
  type CniVersion,
  code,
  compareVersions,
  isNetworkName,
  isSupported,
  supportedVersions,
} from "./cni.ts";
import { isObject } from "./json.ts";
import { oneLine } from "./text.ts";

/** One entry of a list's `plugins`. Kept whole: keys we do not know pass through (§1). */
export type PluginConfig = {
  type: string;
  capabilities?: Record<string, unknown>;
  [key: string]: unknown;
};

/** A network: the plugins to run in order for one attachment (§1). */
export interface NetworkConfigList {
  /** The highest version that the list and we know; every plugin is called at it. */
  cniVersion: CniVersion;
  name: string;
  disableCheck: boolean;
  disableGC: boolean;
  plugins: PluginConfig[];
}

/** A config list before plugins from its folder are added (§1 `loadOnlyInlinedPlugins`). */
export interface ParsedConfigList extends NetworkConfigList {
  /** True when `<folder of the list>/<name>/` may bring further plugins. */
  loadsFolder: boolean;
}

/** Plugins one list may chain; more is a mistake or an attack. */
const pluginsMax = 32;

/**
 * Parses a network config list, or a single plugin config as a list of one.
 *
 * @param value parsed JSON
 * @param what names it in errors, e.g. `/etc/cni/net.d/10-calico.conflist`
 * @throws CniError 7 for a list that breaks §1, 1 when no version of it is supported
 */
export function parseConfigList(value: unknown, what: string): ParsedConfigList {
  if (!isObject(value)) throw invalid(what, "expected a JSON object");
  if (!isNetworkName(value["name"])) {
    throw invalid(
      what,
      value["name"] === undefined || value["name"] === ""
        ? '"name" is missing'
        : `"name" is ${quote(value["name"])}, expected letters, digits, "_", "." and "-"`,
    );
  }
  const single = value["plugins"] === undefined && value["type"] !== undefined;
  const inlined = single ? [value] : (value["plugins"] ?? []);
  if (!Array.isArray(inlined)) throw invalid(what, '"plugins" is not a list');
  const onlyInlined = readFlag(value, "loadOnlyInlinedPlugins", what);
  if (value["plugins"] === undefined && !single && onlyInlined) {
    throw invalid(what, '"loadOnlyInlinedPlugins" is true but "plugins" is missing');
  }
  if (inlined.length > pluginsMax) throw invalid(what, `more than ${pluginsMax} plugins`);
  return {
    cniVersion: selectVersion(value, what),
    name: value["name"],
    disableCheck: readFlag(value, "disableCheck", what),
    disableGC: readFlag(value, "disableGC", what),
    plugins: inlined.map((plugin) => parsePluginConfig(plugin, what)),
    loadsFolder: !single && !onlyInlined,
  };
}

/**
 * Parses one plugin config object.
 * @throws CniError 7 for a missing or unsafe `type`
 */
export function parsePluginConfig(value: unknown, what: string): PluginConfig {
  if (!isObject(value)) throw invalid(what, "a plugin config is not an object");
  const { type, capabilities } = value;
  if (typeof type !== "string" || type === "") throw invalid(what, 'a plugin has no "type"');
  const typeIssue = pluginTypeIssue(type);
  if (typeIssue) throw invalid(what, typeIssue);
  const ipam = value["ipam"];
  if (isObject(ipam) && typeof ipam["type"] === "string") {
    const ipamIssue = pluginTypeIssue(ipam["type"]);
    if (ipam["type"] !== "" && ipamIssue) throw invalid(what, `ipam: ${ipamIssue}`);
  }
  if (capabilities !== undefined && capabilities !== null && !isObject(capabilities)) {
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
 * The version to speak: the highest of `cniVersion` and `cniVersions` that we support. Entries
 * newer than ours are passed over; what is no version at all is an error (§1, libcni).
 */
function selectVersion(list: Record<string, unknown>, what: string): CniVersion {
  const { cniVersion, cniVersions = [] } = list;
  if (!Array.isArray(cniVersions)) throw invalid(what, '"cniVersions" is not a list');
  // libcni: a config without any version is of the first one.
  const named = [
    ...(cniVersion === undefined || cniVersion === "" ? [] : [cniVersion]),
    ...cniVersions,
  ];
  for (const version of named) {
    if (typeof version !== "string" || !/^\d+\.\d+\.\d+$/.test(version)) {
      throw invalid(what, `${quote(version)} is not a CNI version`);
    }
  }
  if (named.length === 0) return "0.1.0";
  const known = named.filter(isSupported).sort(compareVersions);
  const highest = known.at(-1);
  if (highest) return highest;
  throw new CniError(
    code.incompatibleVersion,
    `Unsupported CNI version in ${what}: it names ${named.map(quote).join(", ")}, ` +
      `supported are ${supportedVersions.join(", ")}`,
  );
}

/** Reads a boolean that older lists write as a string, as libcni does. */
function readFlag(list: Record<string, unknown>, key: string, what: string): boolean {
  const value = list[key];
  if (value === undefined || value === null) return false;
  if (typeof value === "boolean") return value;
  if (typeof value === "string" && /^(true|false)$/i.test(value)) {
    return value.toLowerCase() === "true";
  }
  throw invalid(what, `"${key}" is ${quote(value)}, expected true or false`);
}

function invalid(what: string, issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid network config ${what}: ${issue}`);
}

function quote(value: unknown): string {
  return oneLine(JSON.stringify(value) ?? "undefined", 80);
}

/** What varies per call. */
export interface RequestConfigOptions {
  /** Wire form of the previous plugin's result (ADD) or of the whole ADD (CHECK, DEL). */
  prevResult?: object;
  /** What the runtime offered, by capability name. */
  capabilityArgs?: Record<string, unknown>;
  /** Keys for `args`; they win over the config's own, key by key. */
  args?: Record<string, unknown>;
  /** Further reserved keys, e.g. `cni.dev/valid-attachments`. */
  reserved?: Record<string, unknown>;
}

/**
 * Derives the request config of one delegate.
 *
 * Sets `cniVersion` and `name` from the list; `runtimeConfig` to the capabilities the plugin
 * declares and the runtime offers; `prevResult` when given. Reserved keys in the administrator's
 * config (`runtimeConfig`, `prevResult`, `cni.dev/*`) are ours to set, so his are dropped.
 * `capabilities` "must not be set" in a request, so it is dropped too (libcni keeps it).
 *
 * @see CNI SPEC 1.1 §3 "Deriving request configuration from plugin configuration"
 */
export function requestConfig(
  list: NetworkConfigList,
  plugin: PluginConfig,
  { prevResult, capabilityArgs = {}, args = {}, reserved = {} }: RequestConfigOptions = {},
): PluginConfig {
  const declared = isObject(plugin.capabilities) ? plugin.capabilities : {};
  const offered = Object.entries(capabilityArgs).filter(
    ([name]) => Object.hasOwn(declared, name) && declared[name] === true,
  );
  const own = Object.entries(plugin).filter(
    ([key]) => !dropped.has(key) && !key.startsWith("cni.dev/"),
  );
  const ownArgs = isObject(plugin["args"]) ? plugin["args"] : {};
  return {
    ...(Object.fromEntries(own) as PluginConfig),
    cniVersion: list.cniVersion,
    name: list.name,
    ...(offered.length > 0 && { runtimeConfig: Object.fromEntries(offered) }),
    ...(Object.keys(args).length > 0 && { args: mergeArgs(ownArgs, args) }),
    ...(prevResult && { prevResult }),
    ...reserved,
  };
}

/** Objects are merged once more: a pod's `args.cni` keys win (NPWG v1.3 §4.1.2.1.6.2). */
function mergeArgs(
  own: Record<string, unknown>,
  given: Record<string, unknown>,
): Record<string, unknown> {
  const merged = Object.entries(given).map(([key, value]) => {
    const before = Object.hasOwn(own, key) ? own[key] : undefined;
    return [key, isObject(before) && isObject(value) ? { ...before, ...value } : value];
  });
  return { ...own, ...Object.fromEntries(merged) };
}

/** Keys of a stored plugin config that never reach a delegate as they stand. */
const dropped = new Set(["capabilities", "runtimeConfig", "prevResult"]);

/** True when any plugin of the list declares the capability (SPEC 1.1 §3 "runtimeConfig"). */
export function declaresCapability(list: NetworkConfigList, capability: string): boolean {
  return list.plugins.some(
    ({ capabilities }) =>
      isObject(capabilities) &&
      Object.hasOwn(capabilities, capability) &&
      capabilities[capability] === true,
  );
}

/** Interface and IPAM plugins whose default route comes from their config alone. */
const routeFromConfig = new Set(["bridge", "ptp", "macvlan", "ipvlan", "vlan", "host-device"]);
const ipamFromConfig = new Set(["host-local", "static"]);
/** Chained plugins that never add a default route. */
const routeNever = new Set(["portmap", "firewall", "tuning", "bandwidth", "sbr", "loopback"]);

/**
 * May an attachment by this list put a default route into the pod? False only when every plugin
 * is one whose routes are known from its config and the config brings none; true costs a look at
 * the kernel, nothing else.
 */
export function mayAddDefaultRoute(list: NetworkConfigList): boolean {
  return list.plugins.some((plugin) => {
    if (routeNever.has(plugin.type)) return false;
    if (!routeFromConfig.has(plugin.type)) return true;
    if (plugin["isDefaultGateway"] === true) return true;
    const ipam = plugin["ipam"];
    if (!isObject(ipam) || Object.keys(ipam).length === 0) return false;
    if (typeof ipam["type"] !== "string" || !ipamFromConfig.has(ipam["type"])) return true;
    const routes = Array.isArray(ipam["routes"]) ? ipam["routes"] : [];
    return routes.some(
      (route) => isObject(route) && typeof route["dst"] === "string" && /\/0$/.test(route["dst"]),
    );
  });
}
