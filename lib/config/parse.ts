/**
 * The plugin table `plugins.toml`: text in, data out. Pure: no I/O. Its keys, defaults and limits
 * are in schema.ts.
 */
import { parse, TomlError } from "smol-toml";
import * as v from "valibot";
import { CniError, code, oneLine } from "../cni.ts";
import { isObject } from "../json.ts";
import { type Config, network, Plugin, type PluginEntry, Table, topLevel } from "./schema.ts";
import { depthMax, isTable, lineOf, locate, type Path, statements, toJson } from "./toml.ts";
import { parseDuration } from "./usage.ts";

/** Largest plugin table, in characters. */
const tableLengthMax = 1024 * 1024;

/**
 * Parses a plugin table.
 * @param file its path, for messages
 * @throws CniError 7 naming file, line and key of the first problem; `details` has all of them
 */
export function parseConfig(text: string, file: string): Config {
  const tree = parseToml(text, file);
  const lines = locate(text);
  const at = (...path: Path) => lineOf(lines, path);
  const problems: Problem[] = [];
  const fail = (path: Path, what: string) => {
    problems.push({ line: at(...path), text: `"${formatPath(path)}" ${what}` });
  };
  function check<T extends v.GenericSchema>(schema: T, value: unknown, ...above: Path) {
    const parsed = v.safeParse(schema, value);
    if (parsed.success) return parsed.output;
    for (const issue of parsed.issues) fail([...above, ...pathOf(issue)], describe(issue));
    return undefined;
  }
  const config = check(Table, tree);
  const plugins = new Map<string, PluginEntry>();
  for (const [name, value] of Object.entries(isTable(tree["plugins"]) ? tree["plugins"] : {})) {
    const path = ["plugins", name];
    check(network, name, ...path);
    const entry = check(Plugin, value, ...path);
    if (entry === undefined) continue;
    const { allow, deny, config, ...rest } = entry;
    if (rest.conf !== undefined && config) fail([...path, "config"], 'excludes "conf"');
    const list = config && toJson(config, [...path, "config"], fail);
    plugins.set(name, {
      ...rest,
      name,
      ...(isObject(list) && { config: list }),
      ...(allow && { allow: { ...allow, line: at(...path, "allow") } }),
      ...(deny && { deny: { ...deny, line: at(...path, "deny") } }),
      line: at(...path),
    });
  }
  if (config === undefined || problems.length > 0) throw invalidTable(file, problems);
  const { nad, maxAttachments: quotas, ...others } = config.access;
  const access = {
    ...others,
    ...(others.default === "deny" && { line: at("access", "default") }),
    ...(nad && { nad: nad.map((rule, i) => ({ ...rule, line: at("access", "nad", i) })) }),
    ...(quotas && { maxAttachments: { ...quotas, line: at("access", "max_attachments") } }),
  };
  const isolation = { isolationLine: at("kubernetes", "namespace_isolation") };
  const { kubernetes: given } = config;
  const kubernetes = { ...given, ...(given.namespaceIsolation && isolation) };
  return { ...config, access, kubernetes, file, plugins };
}

/** What holds when there is no plugin table: every list in `confDir` is a network. */
export function defaultConfig(): Config {
  return parseConfig("", "");
}

function parseToml(text: string, file: string): Record<string, unknown> {
  const invalid = (line: number, what: string) => invalidTable(file, [{ line, text: what }]);
  if (text.length > tableLengthMax) {
    throw invalid(1, `it is longer than ${tableLengthMax} characters`);
  }
  try {
    // Throws for the keys "__proto__" and "constructor".
    const options = { integersAsBigInt: "asNeeded", unsafeKeyBehaviour: "throw" } as const;
    return parse(text, { ...options, maxDepth: depthMax });
  } catch (error) {
    if (!(error instanceof TomlError)) throw error;
    // The rest of the message quotes the table, which may hold a secret of a delegate.
    const [reason = ""] = error.message.replace("Invalid TOML document: ", "").split("\n");
    throw invalid(error.line, `not valid TOML at column ${error.column}: ${reason}`);
  }
}

/** One thing wrong in a plugin table. */
type Problem = { line: number; text: string };

function invalidTable(file: string, problems: Problem[]): CniError {
  const sorted = problems.toSorted((a, b) => a.line - b.line);
  const [first = "", ...more] = sorted.map(({ line, text }) => `line ${line}: ${text}`);
  const msg = `Invalid plugin table "${file}" ${first}`;
  return new CniError(code.invalidConfig, msg, { details: more.join("\n") });
}

function pathOf(issue: v.BaseIssue<unknown>): Path {
  return (issue.path ?? []).map(({ key }) => (typeof key === "number" ? key : String(key)));
}

function formatPath(path: Path): string {
  const name = path.map((key) => (typeof key === "number" ? `[${key}]` : `.${key}`)).join("");
  return oneLine(name.slice(1), 120);
}

function describe(issue: v.BaseIssue<unknown>): string {
  const isUnknownKey = issue.type === "strict_object" && issue.expected === "never";
  if (isUnknownKey) return `is not a known key${issue.message}`;
  return `is ${show(issue.input)}, expected ${issue.message}`;
}

function show(value: unknown): string {
  if (Array.isArray(value)) return value.length === 0 ? "an empty list" : "a list";
  if (isObject(value)) return isTable(value) ? "a table" : "a date";
  return typeof value === "string" ? `"${oneLine(value, 60)}"` : String(value);
}

/** What {@link parseTopLevel} finds: the part of the config that DEL needs. */
export type TopLevel = Pick<Config, "stateDir" | "logLevel" | "logFile" | "delRetryWindowMs">;

/**
 * Reads the top-level keys that DEL needs, from a table that may be invalid elsewhere.
 * A key that is absent or wrong is left out. Never throws; agrees with {@link parseConfig}.
 */
export function parseTopLevel(text: string): Partial<TopLevel> {
  const found: Record<string, string> = {};
  for (const { keys, isHeader, value } of statements(text.slice(0, tableLengthMax))) {
    if (isHeader) break;
    const [key = ""] = keys;
    if (keys.length === 1 && Object.hasOwn(topLevel, key) && value) found[key] ??= value;
  }
  const read = <K extends keyof TopLevel>(name: K, key: keyof typeof topLevel) => {
    const parsed = v.safeParse(topLevel[key], found[key]);
    return found[key] !== undefined && parsed.success ? { [name]: parsed.output } : {};
  };
  return {
    ...read("stateDir", "state_dir"),
    ...read("logLevel", "log_level"),
    ...read("logFile", "log_file"),
    ...read("delRetryWindowMs", "del_retry_window"),
  };
}

/** The settings DEL needs, with defaults, of a table that may be invalid anywhere. Never throws. */
export function parseNodeSettings(text: string): TopLevel & { auditKeepMs: number } {
  const defaults = defaultConfig();
  const [, keep = ""] = /^\[audit\][^[]*?^\s*keep\s*=\s*"([^"\n]*)"/m.exec(text) ?? [];
  return {
    ...defaults,
    ...parseTopLevel(text),
    auditKeepMs: parseDuration(keep) ?? defaults.audit.keepMs,
  };
}
