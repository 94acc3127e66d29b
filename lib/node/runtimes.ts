/**
 * Where container runtimes look for CNI configs and plugins: by the word of those that run, which
 * also say what they have loaded, and by their settings. Debian's containerd, for one, has its
 * plugins elsewhere than others. Sources: CRI api.proto (Status); containerd's docs/cri/config.md
 * and containerd-config.toml(5) (imports), go-cni; crio.conf(5), containers.conf(5).
 */
import { readlinkSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { parse } from "smol-toml";
import type { Host } from "../call.ts";
import type { Config } from "../config/schema.ts";
import { isObject, parseJson } from "../json.ts";
import { orElse, orUndefined } from "../recovery/tried.ts";
import { hostPath, listFolder, readIfThere, readText, statIfThere } from "./files.ts";
import { noted, paths, type Site } from "./installation.ts";

/** What the settings of a runtime say about CNI. */
export interface RuntimeSettings {
  /** The file that says so, or the runtime that does. */
  file: string;
  /** Where the runtime listens; podman does not. */
  socket?: string;
  confDir?: string | undefined;
  binDirs: string[];
  /** containerd: how many configs it loads. */
  confsMax?: number | undefined;
  /** CRI-O: the network it takes by name. */
  network?: string | undefined;
  isDisabled?: boolean;
}

/** A runtime that runs, by its own word. */
export interface RunningRuntime extends RuntimeSettings {
  socket: string;
  /** containerd: the config list that it calls for new pods, null for none. CRI-O does not say. */
  loaded?: unknown;
  /** containerd: why it could not load its configs; "" when it could. */
  loadError: string;
}

/**
 * Asks the runtimes that run on the node, where they listen, for what they go by: their files may
 * have been changed since they started. One that gives no answer is left out.
 */
export async function askRuntimes(host: Host, root: string): Promise<RunningRuntime[]> {
  const { criSockets, runtimeInfo } = await import("../kubernetes/grpc.ts");
  const named = readRuntimes(root).flatMap(({ socket }) => socket ?? []);
  const sockets = new Map([...named, ...criSockets].map((one) => [hostPath(root, one), one]));
  const there = [...sockets].filter(([path]) => statIfThere(path)?.isSocket());
  const asked = there.map(async ([path, socket]): Promise<RunningRuntime> => {
    const about = { file: `the runtime at ${socket}`, socket, loadError: "" };
    const info = await runtimeInfo(host, path);
    const cni = jsonOf(info.get("cniconfig"));
    if (!isObject(cni)) return { ...about, ...crioSettings(await crioConfig(path)) };
    const lists = [cni["Networks"]].flat().map((one) => below(one, "Config"));
    const list = lists.find((one) => isObject(one) && one["Name"] !== "cni-loopback");
    const name = below(list, "Name");
    const loadError = info.get("lastCNILoadStatus") ?? "OK";
    return {
      ...about,
      confDir: folder(cni["PluginConfDir"]),
      binDirs: folders(cni["PluginDirs"]),
      confsMax: numberOf(cni["PluginMaxConfNum"]),
      loaded: list === undefined ? null : (jsonOf(below(list, "Source")) ?? { name }),
      loadError: loadError === "OK" ? "" : loadError,
    };
  });
  const answers = await Promise.all(asked.map((one) => one.catch(() => undefined)));
  return answers.flatMap((one) => one ?? []);
}

const jsonOf = (text: unknown) =>
  orUndefined(() => parseJson(String(text), "what the runtime says"));

/** The settings that CRI-O goes by (its server/inspect.go). */
async function crioConfig(socket: string): Promise<unknown> {
  const signal = AbortSignal.timeout(2000);
  const answer = await fetch("http://localhost/config", { unix: socket, signal });
  return parse(await answer.text());
}

/** Settings of the runtimes on the node; a file that is not TOML is left out. @throws CniError 5 */
export function readRuntimes(root: string): RuntimeSettings[] {
  return [...containerd(root), ...crio(root), ...podman(root)];
}

/** Those of them that serve pods. @throws CniError 5 */
export function enabledRuntimes(root: string): RuntimeSettings[] {
  return readRuntimes(root).filter(({ isDisabled }) => !isDisabled);
}

/** What the runtimes put into CNI_PATH, as far as their settings say. @throws CniError 5 */
export function runtimePath(root: string, running: readonly RunningRuntime[] = []): string[] {
  return [...new Set([...running, ...enabledRuntimes(root)].flatMap(({ binDirs }) => binDirs))];
}

/** CNI_PATH for an operator's command: as the runtimes say, where the table does not. */
export function askedPath({ binDirs }: Pick<Config, "binDirs">): string[] {
  return binDirs.join() === paths.binDir ? runtimePath("/") : [];
}

/** The CNI folders as the runtimes say, else those where genie was put before, else the usual. */
export function cniFolders(site: Site, running: readonly RunningRuntime[]) {
  const runtimes = [...running, ...enabledRuntimes(site.root)];
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

/** A text; undefined for anything else. */
export const textOf = (value: unknown) => (typeof value === "string" ? value : undefined);
const numberOf = (value: unknown) => (typeof value === "number" ? value : undefined);
const texts = (value: unknown) =>
  Array.isArray(value) ? value.filter((one) => typeof one === "string") : [];
/** A folder; an empty name means the runtime's default. */
const folder = (value: unknown) => textOf(value)?.replace(/(?<=.)\/+$/, "") || undefined;
const folders = (value: unknown) => texts(value).flatMap((one) => folder(one) ?? []);

/** A value in nested tables; undefined where one is missing. */
export function below(value: unknown, ...keys: string[]): unknown {
  const isNested = (one: unknown) => isObject(one) || Array.isArray(one);
  return keys.reduce<unknown>((one, key) => (isNested(one) ? Object(one)[key] : undefined), value);
}

function readToml(root: string, path: string): unknown {
  const text = readIfThere(hostPath(root, path));
  // A runtime with a broken file says so itself, and does not start.
  return text === undefined ? undefined : orUndefined(() => parse(text), Error);
}

/** Command lines of each containerd that runs on the node itself, not in a container there. */
function containerdCommands(root: string): string[] {
  const proc = hostPath(root, "/proc");
  // Without the right to see a namespace all of them count.
  const mounts = (pid: string) => orElse("", () => readlinkSync(join(proc, pid, "ns/mnt")));
  const own = mounts("1");
  return listFolder(proc).flatMap((pid) => {
    if (!/^\d+$/.test(pid)) return [];
    const command = orElse("", () => readText(join(proc, pid, "cmdline")));
    return /^([^\0]*\/)?containerd(\0|$)/.test(command) && mounts(pid) === own ? [command] : [];
  });
}

/** Each containerd that runs, else what one would go by that starts with the usual file. */
function containerd(root: string): RuntimeSettings[] {
  const commands = containerdCommands(root);
  return (commands.length > 0 ? commands : [""]).flatMap((command) => {
    const flag = (names: string) =>
      new RegExp(`\\0--?(?:${names})[=\\0]([^\\0]+)`).exec(command)?.[1];
    const file = join("/", flag("config|c") ?? "/etc/containerd/config.toml");
    const values = withImports(root, file);
    if (values.length === 0 && command === "") return [];
    // The last file that has a key counts.
    const last = <T>(read: (value: unknown) => T | undefined) =>
      values.map(read).findLast((one) => one !== undefined);
    const cniOf = (value: unknown) =>
      below(value, "plugins", "io.containerd.cri.v1.runtime", "cni") ??
      below(value, "plugins", "io.containerd.grpc.v1.cri", "cni") ??
      below(value, "plugins", "cri", "cni");
    const dirsOf = (cni: unknown) =>
      folders([...texts(below(cni, "bin_dirs")), below(cni, "bin_dir")]);
    const disabled = values.flatMap((value) => texts(below(value, "disabled_plugins")));
    const settings: RuntimeSettings = {
      file,
      socket:
        flag("address|a") ??
        last((value) => textOf(below(value, "grpc", "address"))) ??
        "/run/containerd/containerd.sock",
      confDir: last((value) => folder(below(cniOf(value), "conf_dir"))),
      binDirs: values.map((one) => dirsOf(cniOf(one))).findLast((dirs) => dirs.length > 0) ?? [],
      confsMax: last((value) => numberOf(below(cniOf(value), "max_conf_num"))),
      isDisabled: disabled.some((one) => ["cri", "io.containerd.grpc.v1.cri"].includes(one)),
    };
    return [settings];
  });
}

/** A file of containerd and those that it imports, in the order in which they count. */
function withImports(root: string, file: string): unknown[] {
  const values = new Map<string, unknown>();
  const pending = [file];
  for (let path = pending.shift(); path !== undefined; path = pending.shift()) {
    if (values.has(path)) continue;
    const value = readToml(root, path);
    values.set(path, value);
    for (const one of texts(below(value, "imports"))) {
      const dir = resolve(dirname(path), dirname(one));
      const glob = new Bun.Glob(basename(one));
      const names = listFolder(hostPath(root, dir)).filter((name) => glob.match(name));
      pending.push(...names.sort().map((name) => join(dir, name)));
    }
  }
  return [...values.values()].filter((value) => value !== undefined);
}

/** CRI-O's main file and the files of its drop-in folder; each may set any key. */
function crio(root: string): RuntimeSettings[] {
  const dir = "/etc/crio/crio.conf.d";
  const dropIns = listFolder(hostPath(root, dir)).sort();
  const files = ["/etc/crio/crio.conf", ...dropIns.map((name) => join(dir, name))];
  return files.flatMap((file) => {
    const value = readToml(root, file);
    return isObject(below(value, "crio", "network"))
      ? [{ file, socket: "/run/crio/crio.sock", ...crioSettings(value) }]
      : [];
  });
}

function crioSettings(value: unknown) {
  const network = below(value, "crio", "network");
  return {
    confDir: folder(below(network, "network_dir")),
    binDirs: folders(below(network, "plugin_dirs")),
    network: textOf(below(network, "cni_default_network")),
  };
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
