/**
 * The configuration a call runs under: the plugin table on disk with the CNI config's own keys over
 * it. DEL, CHECK and GC read of it only what needs no valid table.
 *
 * Parsing and checking a table costs 5 ms in a process that lives for 10, so the checked table is
 * kept beside the record, with its text: the next call reads that.
 */
import { readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { isAbsolute, join } from "node:path";
import manifest from "../package.json";
import { CniError, code, type Host, type StdinConfig, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { isObject, parseJson } from "./json.ts";
import { readSmallFile } from "./networks.ts";
import { oneLine } from "./text.ts";

/** Where the plugin table is when the CNI config has no `plugins_file`. */
const pluginsFileDefault = "/etc/cni/genie/plugins.toml";
const stateDirDefault = "/var/lib/cni/genie";

/** Path of the plugin table, and whether someone named it. @throws CniError 7 for a bad path */
function tableFile(stdin: StdinConfig): { path: string; explicit: boolean } {
  const path = stdin["plugins_file"];
  if (path === undefined) return { path: pluginsFileDefault, explicit: false };
  if (typeof path === "string" && isAbsolute(path)) return { path, explicit: true };
  throw new CniError(
    code.invalidConfig,
    'Invalid network config: "plugins_file" is not an absolute path',
  );
}

/**
 * Loads the configuration: the plugin table where there is one, with the CNI config's own keys
 * over it.
 * @throws CniError 7 for a table that is wrong, or that was named and is missing
 */
export async function loadConfig(stdin: StdinConfig): Promise<Config> {
  const { path, explicit } = tableFile(stdin);
  if (!explicit && !statSync(path, { throwIfNoEntry: false })) {
    return withOwnKeys(await parseTable("", ""), stdin);
  }
  let text: string;
  try {
    text = readSmallFile(path);
  } catch (error) {
    if (error instanceof CniError) throw error;
    const reason = (error as NodeJS.ErrnoException).code;
    throw new CniError(code.invalidConfig, `Cannot read plugin table ${path}: ${reason}`, {
      cause: error,
    });
  }
  return withOwnKeys(await parseTable(text, path), stdin);
}

/** Keys by which CNI-Genie and Multus configure in the CNI config itself. */
const genieKeys = ["kubernetes", "policy", "log_level", "default_plugin"];
const multusKeys = ["clusterNetwork", "delegates"];

/** The keys of the CNI config itself win over the table: CNI-Genie's, then Multus'. */
async function withOwnKeys(table: Config, stdin: StdinConfig): Promise<Config> {
  let config = table;
  if (genieKeys.some((key) => stdin[key] !== undefined)) {
    config = (await import("./config/genie_conf.ts")).withStdinConfig(config, stdin);
  }
  if (multusKeys.some((key) => stdin[key] !== undefined)) {
    config = (await import("./config/multus.ts")).withMultusConfig(config, stdin);
  }
  return config;
}

/** Parses a table, or reads what an earlier call made of the same text. */
async function parseTable(text: string, path: string): Promise<Config> {
  const known = readParsed(text, path);
  if (known) return known;
  const { parseConfig } = await import("./config/parse.ts");
  const config = parseConfig(text, path);
  keepParsed(text, path, config);
  return config;
}

/** `state_dir` of a table as simple as it is mostly written; a wrong guess costs a parse. */
function likelyStateDir(text: string): string {
  const head = text.split(/^\s*\[/m, 1)[0] ?? "";
  const [, dir] = /^[ \t]*state_dir[ \t]*=[ \t]*["'](\/[^"'\\\n]*)["']/m.exec(head) ?? [];
  return dir ?? stateDirDefault;
}

function parsedFile(text: string): string {
  return join(likelyStateDir(text), "table.json");
}

/** The parsed table, where this genie made it of the same text at the same path. */
function readParsed(text: string, path: string): Config | undefined {
  let kept: unknown;
  try {
    kept = parseJson(readFileSync(parsedFile(text), "utf8"), "kept table");
  } catch (error) {
    // Absent, or damaged: the table itself is there to be parsed.
    if (error instanceof CniError || (error as NodeJS.ErrnoException).code) return undefined;
    throw error;
  }
  if (!isObject(kept) || kept["text"] !== text || kept["path"] !== path) return undefined;
  if (kept["version"] !== manifest.version) return undefined;
  const { config, plugins } = kept;
  if (!isObject(config) || !Array.isArray(plugins)) return undefined;
  return { ...(config as unknown as Config), plugins: new Map(plugins) };
}

/** Keeps a parsed table for the next call, where the folder of the record exists already. */
function keepParsed(text: string, path: string, config: Config): void {
  const file = parsedFile(text);
  const { plugins, ...rest } = config;
  const from = { version: manifest.version, path, text };
  const kept = { ...from, config: rest, plugins: [...plugins] };
  const fresh = `${file}.${crypto.randomUUID()}`;
  try {
    writeFileSync(fresh, JSON.stringify(kept), { mode: 0o600, flag: "wx" });
    renameSync(fresh, file);
  } catch (error) {
    // Not yet there, read-only or full: the next call parses again.
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
  }
}

/** Does genie enforce network policy on any network of the table? */
export function enforcesPolicy({ policy, plugins }: Pick<Config, "policy" | "plugins">): boolean {
  return policy.enforce || [...plugins.values()].some((plugin) => plugin.enforcePolicy === true);
}

/** What DEL, CHECK and GC need to know of the node, readable however broken the table is. */
export interface NodeSettings {
  stateDir: string;
  delRetryWindowMs: number;
  /** How long ledger rows are kept. */
  auditKeepMs: number;
}

/**
 * Reads the settings that need no valid table, and puts the log settings into `host`. Never fails:
 * a DEL must work with a table that became wrong after ADD.
 */
export async function loadNodeSettings(host: Host, stdin: StdinConfig): Promise<NodeSettings> {
  let text = "";
  let path = "";
  try {
    path = tableFile(stdin).path;
    text = readSmallFile(path);
  } catch (error) {
    path = "";
    const absent = (error as NodeJS.ErrnoException).code === "ENOENT";
    if (!absent) {
      host.stderr(
        `genie: warn: Cannot read plugin table: ${oneLine(toCniError(error).message, 200)}\n`,
      );
    }
  }
  const known = readParsed(text, path);
  const top = known
    ? { ...known, auditKeepMs: known.audit.keepMs }
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
  const { logLevelOf } = await import("./config/genie_conf.ts");
  const { multusLevelOf } = await import("./config/multus.ts");
  return logLevelOf(stdin["log_level"]) ?? multusLevelOf(stdin["logLevel"]);
}
