/**
 * genie's own CNI config, as install and uninstall write it and an operator's command reads it; and
 * where container runtimes look for it and for plugins, by their own settings: Debian's containerd,
 * for one, has its plugins elsewhere than others. Sources: CNI SPEC 1.1 §1, CONVENTIONS.md
 * (capabilities); libcni (order of files); containerd's docs/cri/config.md, crio.conf(5),
 * containers.conf(5).
 */
import { basename, dirname, join } from "node:path";
import { parse } from "smol-toml";
import type { StdinConfig } from "../call.ts";
import { CniError, code, isNetworkName, isSupported } from "../cni.ts";
import { isMultusConfig } from "../config/foreign_config.ts";
import type { Config } from "../config/schema.ts";
import { isObject, parseJson } from "../json.ts";
import { configFiles, finishList, type PluginConfig, parseConfigList } from "../networks.ts";
import { orUndefined } from "../recovery/tried.ts";
import { hostPath, listFolder, readIfThere, readText, statIfThere } from "./files.ts";
import conflist from "./genie.json";
import { noted, paths, type Site } from "./installation.ts";

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

/** What the settings of a runtime say about CNI. */
export interface RuntimeSettings {
  file: string;
  confDir?: string | undefined;
  binDirs: string[];
  /** containerd: how many configs it loads. */
  confsMax?: number | undefined;
  /** CRI-O: the network it takes by name. */
  network?: string | undefined;
  isDisabled?: boolean;
}

/** Settings of the runtimes on the node; a file that is not TOML is left out. @throws CniError 5 */
export function readRuntimes(root: string): RuntimeSettings[] {
  return [...containerd(root), ...crio(root), ...podman(root)];
}

function enabledRuntimes(root: string): RuntimeSettings[] {
  return readRuntimes(root).filter(({ isDisabled }) => !isDisabled);
}

/** What the runtimes put into CNI_PATH, as far as their settings say. @throws CniError 5 */
export function runtimePath(root: string): string[] {
  return [...new Set(enabledRuntimes(root).flatMap(({ binDirs }) => binDirs))];
}

/** CNI_PATH for an operator's command: as the runtimes say, where the table does not. */
export function askedPath({ binDirs }: Pick<Config, "binDirs">): string[] {
  return binDirs.join() === paths.binDir ? runtimePath("/") : [];
}

/** The CNI folders as the runtimes say, else those where genie was put before, else the usual. */
export function cniFolders(site: Site): { confDir: string; binDirs: string[] } {
  const runtimes = enabledRuntimes(site.root);
  const [confDir] = runtimes.flatMap((one) => one.confDir ?? []);
  const named = runtimes.find(({ binDirs }) => binDirs.length > 0);
  const before = (kind: "conflist" | "binary") => {
    const path = noted(site, kind)?.path;
    return path === undefined ? undefined : dirname(path);
  };
  return {
    confDir: confDir ?? before("conflist") ?? paths.confDir,
    binDirs: named?.binDirs ?? [before("binary") ?? paths.binDir],
  };
}

const textOf = (value: unknown) => (typeof value === "string" ? value : undefined);
const texts = (value: unknown) =>
  Array.isArray(value) ? value.filter((one) => typeof one === "string") : [];
/** A folder; an empty name means the runtime's default. */
const folder = (value: unknown) => textOf(value)?.replace(/(?<=.)\/+$/, "") || undefined;
const folders = (value: unknown) => texts(value).flatMap((one) => folder(one) ?? []);

/** A value in nested tables; undefined where one is missing. */
function below(value: unknown, ...keys: string[]): unknown {
  const isNested = (one: unknown) => isObject(one) || Array.isArray(one);
  return keys.reduce<unknown>((one, key) => (isNested(one) ? Object(one)[key] : undefined), value);
}

function readToml(root: string, path: string): unknown {
  const text = readIfThere(hostPath(root, path));
  // A runtime with a broken file says so itself, and does not start.
  return text === undefined ? undefined : orUndefined(() => parse(text), Error);
}

function containerd(root: string): RuntimeSettings[] {
  const file = "/etc/containerd/config.toml";
  const value = readToml(root, file);
  if (value === undefined) return [];
  const cni =
    below(value, "plugins", "io.containerd.cri.v1.runtime", "cni") ??
    below(value, "plugins", "io.containerd.grpc.v1.cri", "cni") ??
    below(value, "plugins", "cri", "cni");
  const confsMax = below(cni, "max_conf_num");
  const disabled = texts(below(value, "disabled_plugins"));
  return [
    {
      file,
      confDir: folder(below(cni, "conf_dir")),
      binDirs: folders([...texts(below(cni, "bin_dirs")), below(cni, "bin_dir")]),
      confsMax: typeof confsMax === "number" ? confsMax : undefined,
      isDisabled: disabled.some((one) => ["cri", "io.containerd.grpc.v1.cri"].includes(one)),
    },
  ];
}

/** CRI-O's main file and the files of its drop-in folder; each may set any key. */
function crio(root: string): RuntimeSettings[] {
  const dir = "/etc/crio/crio.conf.d";
  const dropIns = listFolder(hostPath(root, dir)).sort();
  const files = ["/etc/crio/crio.conf", ...dropIns.map((name) => join(dir, name))];
  return files.flatMap((file) => {
    const network = below(readToml(root, file), "crio", "network");
    if (!isObject(network)) return [];
    const confDir = folder(network["network_dir"]);
    const binDirs = folders(network["plugin_dirs"]);
    return [{ file, confDir, binDirs, network: textOf(network["cni_default_network"]) }];
  });
}

/** Where podman looks for plugins unless its settings say otherwise. */
const podmanDirs = [
  "/usr/local/libexec/cni",
  "/usr/libexec/cni",
  "/usr/local/lib/cni",
  "/usr/lib/cni",
  "/opt/cni/bin",
];

/** podman, where its settings choose CNI. */
function podman(root: string): RuntimeSettings[] {
  const file = "/etc/containers/containers.conf";
  const network = below(readToml(root, file), "network");
  if (!isObject(network) || network["network_backend"] !== "cni") return [];
  const set = folders(network["cni_plugin_dirs"]);
  const isFolder = (dir: string) => statIfThere(hostPath(root, dir))?.isDirectory();
  const binDirs = (set.length > 0 ? set : podmanDirs).filter(isFolder);
  return [{ file, confDir: folder(network["network_config_dir"]), binDirs }];
}
