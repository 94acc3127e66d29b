/**
 * genie's own CNI config, as install and uninstall write it and an operator's command reads it, and
 * the files beside it. Sources: CNI SPEC 1.1 §1, CONVENTIONS.md (capabilities); libcni and go-cni
 * (order of files).
 */
import { basename, join } from "node:path";
import type { StdinConfig } from "../call.ts";
import { CniError, code, isNetworkName, isSupported } from "../cni.ts";
import { isMultusConfig } from "../config/foreign_config.ts";
import { isObject, parseJson } from "../json.ts";
import { configFiles, finishList, type PluginConfig, parseConfigList } from "../networks.ts";
import { orUndefined } from "../recovery/tried.ts";
import { hostPath, readIfThere, readText, statIfThere } from "./files.ts";
import conflist from "./genie.json";
import { paths } from "./installation.ts";
import { below, enabledRuntimes, type RunningRuntime, textOf } from "./runtimes.ts";

/**
 * The config list by which a runtime calls genie. containerd 1.7 takes no version above 1.0.0 and
 * does not know `cniVersions`; containerd 2 takes the highest of them. Its capabilities are what
 * runtimes hand over where a plugin declares it (CNI CONVENTIONS.md; the annotations: containerd
 * 1.5, CRI-O 1.29), and genie passes it to the plugins of the pod's first network that declare it.
 * @param keys of CNI-Genie's config, where ours takes its place
 */
export function ownList(keys: object = {}): object {
  return { ...conflist, plugins: conflist.plugins.map((own) => ({ ...keys, ...own })) };
}

/** The text of {@link ownList}, as `genie install` writes it. */
export function ownListText(keys?: object): string {
  return `${JSON.stringify(ownList(keys), null, 2)}\n`;
}

/**
 * The list that stays while pods from before live: the network that follows for new pods, with
 * genie behind it, which passes ADD on and answers the DEL of what it has on record. It must stay
 * because containerd calls DEL by today's config, not by the one a pod was started with (go-cni).
 * @param next the config that the runtime would take without ours; undefined: none
 */
export function lastList(next: unknown): object {
  const own = { type: "genie", delOnly: true };
  if (!isObject(next)) return { cniVersion: "1.0.0", name: "genie", plugins: [own] };
  if (Array.isArray(next["plugins"])) return { ...next, plugins: [...next["plugins"], own] };
  const { cniVersion, name, ...plugin } = next;
  return { ...(cniVersion !== undefined && { cniVersion }), name, plugins: [plugin, own] };
}

/** A file of a conf dir; `value` is undefined where it is not JSON. */
export interface ConfFile {
  name: string;
  value: unknown;
}

/** The config files of a conf dir of the node, in the order of runtimes. @throws CniError 5 */
export function readConfs(root: string, confDir: string): ConfFile[] {
  const dir = hostPath(root, confDir);
  if (!statIfThere(dir)?.isDirectory()) return [];
  const names = configFiles(dir).map((path) => basename(path));
  return names.sort(compareNames).map((name) => ({
    name,
    value: orUndefined(() => parseJson(readText(hostPath(root, join(confDir, name))), name)),
  }));
}

/** Plugins that call other plugins: one of them and genie stand in each other's way. */
export const metaPlugins = ["multus", "multus-shim", "danm", "knitter", "cni-genie"];

/**
 * The network that the runtime uses without genie, by its CNI name: the one that CRI-O's settings
 * name, else the first that can be read, as containerd, CRI-O and Multus choose. Multus' own config
 * stands for its default network. Undefined where there is none, and where genie's own config says
 * what the default is, in the words of CNI-Genie or Multus.
 */
export function networkBefore(root: string, confDir: string): string | undefined {
  const confs = readConfs(root, confDir);
  const own = ownEntry(confs.find(callsGenie)?.value);
  if (own && (own["default_plugin"] || isMultusConfig({ ...own, name: "genie" }))) return undefined;
  const dir = hostPath(root, confDir);
  const listOf = ({ name, value }: ConfFile) => finishList(parseConfigList(value, name), dir, name);
  const others = confs.filter((one) => !callsGenie(one));
  const lists = others.flatMap((one) => orUndefined(() => listOf(one)) ?? []);
  const metaOf = ({ plugins }: { plugins: PluginConfig[] }) =>
    plugins.find(({ type }) => metaPlugins.includes(type));
  const plain = lists.filter((list) => !metaOf(list)).map(({ name }) => name);
  const taken = lists.map((list) => {
    const meta = metaOf(list);
    if (!meta) return list.name;
    // An index is a key as well: of `delegates` the first is the default.
    return textOf(meta["clusterNetwork"]) || textOf(below(meta["delegates"], "0", "name"));
  });
  const named = enabledRuntimes(root).map(({ network }) => network);
  return [...named, ...taken].find((name) => name !== undefined && plain.includes(name));
}

/** As Go sorts: by bytes. */
function compareNames(a: string, b: string): number {
  return Buffer.compare(Buffer.from(a), Buffer.from(b));
}

/** Which of the files a runtime takes before `name`; it skips what is not JSON. */
export function confsBefore(files: readonly ConfFile[], name: string): ConfFile[] {
  return files.filter((one) => isObject(one.value) && compareNames(one.name, name) < 0);
}

/** The plugin configs of a list, or the single config that the file is. */
export function pluginsOf(value: unknown): Record<string, unknown>[] {
  if (!isObject(value)) return [];
  const plugins = Array.isArray(value["plugins"]) ? value["plugins"] : [value];
  return plugins.filter(isObject);
}

/** The entry of genie itself in a config; undefined where the config does not call genie. */
export function ownEntry(value: unknown): Record<string, unknown> | undefined {
  return pluginsOf(value).find(({ type }) => type === "genie");
}

/** True when a runtime that takes this file calls genie. */
export function callsGenie({ value }: ConfFile): boolean {
  return ownEntry(value) !== undefined;
}

/**
 * What a runtime that runs calls for new pods instead of the first config of its folder; undefined
 * where that is what it calls, and where it does not say. containerd overlooks a file that a rename
 * brings from another folder, and while a file before the first is broken it loads none (go-cni).
 */
export function whyNotLoaded(runtime: RunningRuntime, confs: readonly ConfFile[]) {
  const { file, loaded, loadError } = runtime;
  const first = confs.find(({ value }) => isObject(value));
  // containerd makes a list of a single config.
  const partsOf = (one: unknown) => [
    below(one, "name"),
    below(one, "cniVersion") ?? "",
    pluginsOf(one),
  ];
  if (!first || loaded === undefined) return undefined;
  if (Bun.deepEquals(partsOf(first.value), partsOf(loaded))) return undefined;
  const calls = loaded === null ? "has no network" : `calls ${textOf(below(loaded, "name"))}`;
  return `${file} has not loaded ${first.name}, it ${calls}${loadError && `: ${loadError}`}`;
}

/**
 * The keys of genie's own CNI config: those of the file named, else of the first list in the conf
 * dir that calls genie, else none.
 * @throws CniError 5 when the file named cannot be read, 6 or 7 when it is not a config of genie
 */
export function readOwnConfig(file: string | undefined): StdinConfig {
  if (file !== undefined) {
    const own = ownConfigIn(file);
    if (own) return own;
    throw invalid(file, 'no plugin has type "genie"');
  }
  for (const path of configFiles(paths.confDir)) {
    // Other files may be broken; genie validate reports those that a network needs.
    const own = orUndefined(() => ownConfigIn(path));
    if (own) return own;
  }
  return { cniVersion: "1.1.0", name: "genie", type: "genie" };
}

function ownConfigIn(path: string): StdinConfig | undefined {
  const text = readIfThere(path);
  if (text === undefined) throw new CniError(code.ioFailure, `Cannot read ${path}: ENOENT`);
  const value = parseJson(text, path);
  const own = ownEntry(value);
  if (!isObject(value) || !own) return undefined;
  const { name } = value;
  if (!isNetworkName(name)) throw invalid(path, '"name" is not valid');
  const cniVersion = isSupported(value["cniVersion"]) ? value["cniVersion"] : "1.1.0";
  return { ...own, name, cniVersion };
}

const invalid = (path: string, why: string) =>
  new CniError(code.invalidConfig, `Invalid CNI config ${path}: ${why}`);
