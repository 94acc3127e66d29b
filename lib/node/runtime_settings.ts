/**
 * Where the container runtimes of a node look for CNI configs and plugins, as their own files say;
 * Debian's containerd looks for plugins elsewhere than others. Sources: containerd's docs/cri
 * config.md, crio.conf(5), containers.conf(5).
 */
import { readdirSync, statSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { parse } from "smol-toml";
import type { Config } from "../config/schema.ts";
import { isObject } from "../json.ts";
import { readIfThere } from "./files.ts";
import { hostPath } from "./host_root.ts";
import { noted, paths, type Site } from "./installation.ts";

/** What a runtime's settings say of CNI. */
export interface RuntimeSettings {
  file: string;
  confDir: string | undefined;
  binDirs: string[];
  /** containerd: how many configs it loads. */
  confsMax: number | undefined;
  /** CRI-O: the network it takes by name. */
  network: string | undefined;
  isDisabled: boolean;
}

/** Settings of the runtimes on the node; a file that is no TOML is left out. @throws CniError 5 */
export function readRuntimes(root: string): RuntimeSettings[] {
  return [containerd(root), ...crio(root), podman(root)].filter((one) => one !== undefined);
}

/** Folders of CNI on the node. */
export interface CniFolders {
  confDir: string;
  /** Where plugins are; genie's own place is the first. */
  binDirs: string[];
}

/** What the runtimes put into CNI_PATH, as far as their settings say. @throws CniError 5 */
export function runtimePath(root: string): string[] {
  const runtimes = readRuntimes(root).filter(({ isDisabled }) => !isDisabled);
  return [...new Set(runtimes.flatMap(({ binDirs }) => binDirs))];
}

/**
 * CNI_PATH of a call that an operator only asks about: where the table does not say where plugins
 * are, the runtimes of this node do.
 */
export function askedPath({ binDirs }: Pick<Config, "binDirs">): string[] {
  return binDirs.join() === paths.binDir ? runtimePath("/") : [];
}

/** As the runtime's settings say; else where genie was put before; else where most look. */
export function cniFolders(site: Site): CniFolders {
  const runtimes = readRuntimes(site.root).filter(({ isDisabled }) => !isDisabled);
  const conf = noted(site, "conflist");
  const binary = noted(site, "binary");
  return {
    confDir:
      runtimes.find(({ confDir }) => confDir !== undefined)?.confDir ??
      (conf ? dirname(conf.path) : paths.confDir),
    binDirs: runtimes.find(({ binDirs }) => binDirs.length > 0)?.binDirs ?? [
      binary ? dirname(binary.path) : paths.binDir,
    ],
  };
}

const textOf = (value: unknown) => (typeof value === "string" ? value : undefined);
const texts = (value: unknown) =>
  Array.isArray(value) ? value.filter((one) => typeof one === "string") : [];
/** Folders that may be used: an empty name means the runtime's default. */
const folder = (value: unknown) => textOf(value)?.replace(/(?<=.)\/+$/, "") || undefined;
const folders = (value: unknown) => texts(value).flatMap((one) => folder(one) ?? []);

/** A value below nested tables; undefined where one is missing. */
function below(value: unknown, ...keys: string[]): unknown {
  return keys.reduce<unknown>((one, key) => (isObject(one) ? one[key] : undefined), value);
}

function readToml(root: string, path: string): unknown {
  const text = readIfThere(hostPath(root, path));
  if (text === undefined) return undefined;
  try {
    return parse(text);
  } catch (error) {
    // The runtime says so itself, and does not start.
    if (error instanceof Error) return undefined;
    throw error;
  }
}

function containerd(root: string): RuntimeSettings | undefined {
  const path = "/etc/containerd/config.toml";
  const value = readToml(root, path);
  if (value === undefined) return undefined;
  const cni =
    below(value, "plugins", "io.containerd.cri.v1.runtime", "cni") ??
    below(value, "plugins", "io.containerd.grpc.v1.cri", "cni") ??
    below(value, "plugins", "cri", "cni");
  const confsMax = below(cni, "max_conf_num");
  const disabled = texts(below(value, "disabled_plugins"));
  return {
    file: path,
    confDir: folder(below(cni, "conf_dir")),
    binDirs: folders([...texts(below(cni, "bin_dirs")), below(cni, "bin_dir")]),
    confsMax: typeof confsMax === "number" ? confsMax : undefined,
    network: undefined,
    isDisabled: disabled.some((one) => ["cri", "io.containerd.grpc.v1.cri"].includes(one)),
  };
}

/** CRI-O's file and those of its folder, each of which may say something. */
function crio(root: string): RuntimeSettings[] {
  const dir = "/etc/crio/crio.conf.d";
  const there = hostPath(root, dir);
  const inDir = statSync(there, { throwIfNoEntry: false })?.isDirectory()
    ? readdirSync(there).sort()
    : [];
  return ["/etc/crio/crio.conf", ...inDir.map((name) => join(dir, basename(name)))].flatMap(
    (file) => {
      const network = below(readToml(root, file), "crio", "network");
      if (!isObject(network)) return [];
      return [
        {
          file,
          confDir: folder(network["network_dir"]),
          binDirs: folders(network["plugin_dirs"]),
          confsMax: undefined,
          network: textOf(network["cni_default_network"]),
          isDisabled: false,
        },
      ];
    },
  );
}

/** Where podman looks unless its settings say otherwise. */
const podmanDirs = [
  ...["/usr/local/libexec/cni", "/usr/libexec/cni", "/usr/local/lib/cni", "/usr/lib/cni"],
  "/opt/cni/bin",
];

/** podman, where it has been told to use CNI. */
function podman(root: string): RuntimeSettings | undefined {
  const file = "/etc/containers/containers.conf";
  const network = below(readToml(root, file), "network");
  if (!isObject(network) || network["network_backend"] !== "cni") return undefined;
  const named = folders(network["cni_plugin_dirs"]);
  const isThere = (dir: string) =>
    statSync(hostPath(root, dir), { throwIfNoEntry: false })?.isDirectory();
  return {
    file,
    confDir: folder(network["network_config_dir"]),
    binDirs: (named.length > 0 ? named : podmanDirs).filter(isThere),
    confsMax: undefined,
    network: undefined,
    isDisabled: false,
  };
}
