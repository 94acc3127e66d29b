/**
 * The configuration a call runs under: the plugin table on disk with the CNI config's own keys over
 * it. DEL, CHECK and GC read of it only what needs no valid table.
 */
import { statSync } from "node:fs";
import { isAbsolute } from "node:path";
import { CniError, code, type Host, type StdinConfig } from "./cni.ts";
import {
  type Config,
  defaultConfig,
  parseConfig,
  parseTopLevel,
  pluginsFileDefault,
} from "./config.ts";
import { logLevelOf, withStdinConfig } from "./genie_conf.ts";
import { multusLevelOf, withMultusConfig } from "./multus.ts";
import { readSmallFile } from "./networks.ts";
import { parseDuration } from "./quantity.ts";
import { oneLine } from "./text.ts";

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
export function loadConfig(stdin: StdinConfig): Config {
  const { path, explicit } = tableFile(stdin);
  if (!explicit && !statSync(path, { throwIfNoEntry: false })) {
    return withOwnKeys(defaultConfig(), stdin);
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
  return withOwnKeys(parseConfig(text, path), stdin);
}

/** The keys of the CNI config itself win over the table: CNI-Genie's, then Multus'. */
function withOwnKeys(config: Config, stdin: StdinConfig): Config {
  return withMultusConfig(withStdinConfig(config, stdin), stdin);
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
export function loadNodeSettings(host: Host, stdin: StdinConfig): NodeSettings {
  const defaults = defaultConfig();
  let text = "";
  try {
    text = readSmallFile(tableFile(stdin).path);
  } catch (error) {
    const absent = (error as NodeJS.ErrnoException).code === "ENOENT";
    if (!absent)
      host.stderr(`genie: warn: Cannot read plugin table: ${oneLine(String(error), 200)}\n`);
  }
  const top = { ...defaults, ...parseTopLevel(text) };
  const file = typeof stdin["logFile"] === "string" ? stdin["logFile"] : top.logFile;
  const level = logLevelOf(stdin["log_level"]) ?? multusLevelOf(stdin["logLevel"]);
  host.log = { level: level ?? top.logLevel, file };
  return {
    stateDir: top.stateDir,
    delRetryWindowMs: top.delRetryWindowMs,
    auditKeepMs: keepOf(text) ?? defaults.audit.keepMs,
  };
}

/** `audit.keep` of a table that may be invalid elsewhere, in ms. */
function keepOf(text: string): number | undefined {
  const [, keep = ""] = /^\[audit\][^[]*?^\s*keep\s*=\s*"([^"\n]*)"/m.exec(text) ?? [];
  return parseDuration(keep);
}
