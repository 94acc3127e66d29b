/** A node as `genie doctor` looks at it: its configuration, its conf dir, its networks. */
import { statSync } from "node:fs";
import { join } from "node:path";
import { type CniError, type Host, type StdinConfig, toCniError } from "../cni.ts";
import { defaultConfig, parseConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { listNetworks, type Network } from "../networks.ts";
import { loadConfig } from "../settings.ts";
import { readIfThere } from "./files.ts";
import { type ConfFile, callsGenie, pluginsOf } from "./genie_list.ts";
import { hostPath } from "./host_root.ts";
import { paths } from "./installation.ts";
import { readConfs } from "./node_ready.ts";
import { runtimePath } from "./runtime_settings.ts";

/** The node. */
export interface NodeView {
  host: Host;
  root: string;
  /** Where a path of the node is for us. */
  at: (path: string) => string;
  /** Its table; plugins are found as in a call of the runtime. */
  config: Config;
  /** Why the table cannot be used; the defaults stand for it then. */
  configError: CniError | undefined;
  confDir: string;
  confs: ConfFile[];
  /** The entry of the first config that calls genie. */
  own: Record<string, unknown> | undefined;
  networks: Network[];
  problems: CniError[];
  /** `key: value` words of a file of `/proc`, or a text; "" where there is none. */
  read: (path: string) => string;
}

/** Looks at a node. @param confDir where the runtime looks for CNI configs */
export async function viewNode(host: Host, root: string, confDir: string): Promise<NodeView> {
  const at = (path: string) => hostPath(root, path);
  const confs = readConfs(root, confDir);
  const first = confs.find(callsGenie);
  const own = first && pluginsOf(first).find(({ type }) => type === "genie");
  let config = defaultConfig();
  let configError: CniError | undefined;
  try {
    const table = await readConfig(root, own);
    config = { ...table, binDirs: [...new Set([...runtimePath(root), ...table.binDirs])] };
  } catch (error) {
    configError = toCniError(error);
  }
  const { networks, problems } = listNetworks(seenFrom(at, config));
  return {
    host,
    root,
    at,
    config,
    configError,
    confDir,
    confs,
    own,
    networks: networks.filter(({ list }) => !list.plugins.some(({ type }) => type === "genie")),
    problems,
    read: (path) => readIfThere(at(path)) ?? "",
  };
}

/** On the node itself as a call would see it, its own keys included. */
async function readConfig(root: string, own: Record<string, unknown> | undefined): Promise<Config> {
  const stdin: StdinConfig = { name: "genie", ...own };
  if (root === "/") return loadConfig(stdin);
  const path = typeof stdin["plugins_file"] === "string" ? stdin["plugins_file"] : paths.table;
  const text = readIfThere(hostPath(root, path));
  return text === undefined ? parseConfig("", "") : parseConfig(text, path);
}

/** The folders of a table as they are for us. */
function seenFrom(at: (path: string) => string, config: Config): Config {
  const plugins = [...config.plugins].map(([name, entry]) => {
    const { conf } = entry;
    return [name, conf?.startsWith("/") ? { ...entry, conf: at(conf) } : entry] as const;
  });
  return { ...config, confDir: at(config.confDir), plugins: new Map(plugins) };
}

/** Path of a program of the node in the usual folders, or in those given; undefined: none. */
export function findProgram(
  { at }: NodeView,
  name: string,
  dirs: readonly string[] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"],
): string | undefined {
  return dirs
    .map((dir) => at(join(dir, name)))
    .find((path) => statSync(path, { throwIfNoEntry: false })?.isFile());
}
