/**
 * The configuration of a call: the plugin table on disk, overridden by keys of the CNI config. DEL,
 * CHECK and GC read only settings that need no valid table. Parsing a table costs 5 ms of a call's
 * 10, so the parsed table is kept beside the record, with its text, for the next call.
 */
import { existsSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { isAbsolute, join } from "node:path";
import manifest from "../package.json";
import type { Host, StdinConfig } from "./call.ts";
import { CniError, code, oneLine, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { isObject, parseJson } from "./json.ts";
import type { KubeSettings } from "./kubernetes/objects_of_call.ts";
import { readSmallFile } from "./streams.ts";

/** Where the plugin table is when the CNI config has no `plugins_file`. */
const pluginsFileDefault = "/etc/cni/genie/plugins.toml";
const stateDirDefault = "/var/lib/cni/genie";

/** Path of the plugin table. @throws CniError 7 for a bad path */
function tableFile({ plugins_file: path = pluginsFileDefault }: StdinConfig): string {
  if (typeof path === "string" && isAbsolute(path)) return path;
  const msg = 'Invalid network config: "plugins_file" is not an absolute path';
  throw new CniError(code.invalidConfig, msg);
}

/** Keys of the CNI config itself by which CNI-Genie and Multus are configured. */
const genieKeys = ["kubernetes", "policy", "log_level", "default_plugin"];
const multusKeys = ["clusterNetwork", "delegates"];

/**
 * Loads the configuration: the plugin table, if there is one, overridden by CNI-Genie's and then by
 * Multus' keys in the CNI config.
 * @throws CniError 7 for a table that is wrong, or that was named and is missing
 */
export async function loadConfig(stdin: StdinConfig): Promise<Config> {
  let path = tableFile(stdin);
  let text = "";
  try {
    const isOptional = stdin["plugins_file"] === undefined;
    if (isOptional && !statSync(path, { throwIfNoEntry: false })) path = "";
    else text = readSmallFile(path);
  } catch (cause) {
    if (cause instanceof CniError) throw cause;
    const reason = (cause as NodeJS.ErrnoException).code;
    const msg = `Cannot read plugin table ${path}: ${reason}`;
    throw new CniError(code.invalidConfig, msg, { cause });
  }
  let config = await parseTable(text, path);
  if (genieKeys.some((key) => stdin[key] !== undefined)) {
    config = (await import("./config/foreign_config.ts")).withStdinConfig(config, stdin);
  }
  if (multusKeys.some((key) => stdin[key] !== undefined)) {
    config = (await import("./config/foreign_config.ts")).withMultusConfig(config, stdin);
  }
  return config;
}

/** Parses a table, or reads the one that an earlier call kept, and keeps it for the next call. */
async function parseTable(text: string, path: string): Promise<Config> {
  const kept = readParsed(text, path);
  if (kept) return kept;
  const { parseConfig } = await import("./config/parse.ts");
  const config = parseConfig(text, path);
  const file = parsedFile(text);
  const fresh = `${file}.${crypto.randomUUID()}`;
  const { version } = manifest;
  // The plugins are a Map, which JSON does not have.
  const parsed = { version, path, text, config, plugins: [...config.plugins] };
  try {
    writeFileSync(fresh, JSON.stringify(parsed), { mode: 0o600, flag: "wx" });
    renameSync(fresh, file);
  } catch (error) {
    // The folder is missing, read-only or full: the next call parses again.
    if (existsSync(fresh)) rmSync(fresh);
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
  }
  return config;
}

/** Where the parsed table is kept. A wrong guess of an unusual `state_dir` only costs a parse. */
function parsedFile(text: string): string {
  const [top = ""] = text.split(/^\s*\[/m, 1);
  const [, dir] = /^[ \t]*state_dir[ \t]*=[ \t]*["'](\/[^"'\\\n]*)["']/m.exec(top) ?? [];
  return join(dir ?? stateDirDefault, "table.json");
}

/** The kept table, if this version of genie parsed it from the same text at the same path. */
function readParsed(text: string, path: string): Config | undefined {
  let kept: unknown;
  try {
    kept = parseJson(readFileSync(parsedFile(text), "utf8"), "kept table");
  } catch (error) {
    // A missing or damaged file is no problem: the table is parsed again.
    if (error instanceof CniError || (error as NodeJS.ErrnoException).code) return undefined;
    throw error;
  }
  if (!isObject(kept) || kept["text"] !== text || kept["path"] !== path) return undefined;
  if (kept["version"] !== manifest.version) return undefined;
  const { config, plugins } = kept;
  if (!isObject(config) || !Array.isArray(plugins)) return undefined;
  return { ...(config as unknown as Config), plugins: new Map(plugins) };
}

/** True when genie enforces network policy on any network of the table. */
export function enforcesPolicy({ policy, plugins }: Pick<Config, "policy" | "plugins">): boolean {
  return policy.enforce || [...plugins.values()].some((plugin) => plugin.enforcePolicy === true);
}

/** What DEL, CHECK and GC read even from a broken table. */
export interface NodeSettings {
  stateDir: string;
  delRetryWindowMs: number;
  /** How long ledger rows are kept. */
  auditKeepMs: number;
}

/**
 * Reads the settings that need no valid table, and sets `host.log`. Never fails: a DEL must work
 * with a table that was broken after the ADD.
 */
export async function loadNodeSettings(host: Host, stdin: StdinConfig): Promise<NodeSettings> {
  let text = "";
  let path = "";
  try {
    path = tableFile(stdin);
    text = readSmallFile(path);
  } catch (error) {
    path = "";
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") {
      const reason = oneLine(toCniError(error).message, 200);
      host.stderr(`genie: warn: Cannot read plugin table: ${reason}\n`);
    }
  }
  const kept = readParsed(text, path);
  const top = kept
    ? { ...kept, auditKeepMs: kept.audit.keepMs }
    : (await import("./config/parse.ts")).parseNodeSettings(text);
  const file = typeof stdin["logFile"] === "string" ? stdin["logFile"] : top.logFile;
  host.log = { level: (await ownLevel(stdin)) ?? top.logLevel, file };
  return {
    stateDir: top.stateDir,
    delRetryWindowMs: top.delRetryWindowMs,
    auditKeepMs: top.auditKeepMs,
  };
}

/** The level that the CNI config itself names, CNI-Genie's or Multus' way. */
async function ownLevel(stdin: StdinConfig): Promise<Host["log"]["level"] | undefined> {
  if (stdin["log_level"] === undefined && stdin["logLevel"] === undefined) return undefined;
  const { logLevelOf, multusLevelOf } = await import("./config/foreign_config.ts");
  return logLevelOf(stdin["log_level"]) ?? multusLevelOf(stdin["logLevel"]);
}

/** Where Kubernetes mounts the service account of a pod. */
export const serviceAccountDirDefault = "/var/run/secrets/kubernetes.io/serviceaccount";

/** True when there are credentials for the API; reads no file. */
export function isConfigured(host: Host, settings: KubeSettings): boolean {
  return sourceOf(host, settings) !== undefined;
}

/**
 * Where the credentials for the API come from; undefined when there are none. A kubeconfig that was
 * named counts even if it is missing: connecting then fails and says so.
 */
export function sourceOf(
  host: Host,
  settings: KubeSettings,
): "kubeconfig" | "root" | "pod" | undefined {
  const { kubeconfig, serviceAccountDir: folder = serviceAccountDirDefault } = settings;
  if (kubeconfig && (settings.kubeconfigIsExplicit || exists(kubeconfig))) return "kubeconfig";
  if (settings.apiRoot) return "root";
  const inPod = Boolean(host.env["KUBERNETES_SERVICE_HOST"]) && exists(join(folder, "token"));
  return inPod ? "pod" : undefined;
}

/** False only when there certainly is no such file: one we may not see causes an error later. */
export function exists(file: string): boolean {
  try {
    return statSync(file, { throwIfNoEntry: false }) !== undefined;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== "ENOTDIR";
  }
}
