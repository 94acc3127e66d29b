/**
 * The words of the CNI protocol (versions, commands, names, error codes), how a call is answered,
 * and the log. Source: CNI SPEC 1.1 §2 (parameters, operations) and §5 (result types).
 */
import { appendFileSync } from "node:fs";
import type { Host } from "./call.ts";

const versions = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] as const;
/** One of {@link supportedVersions}. */
export type CniVersion = (typeof versions)[number];
/** Every CNI version genie speaks, oldest first (SPEC 1.1 §5 "Version"). */
export const supportedVersions: readonly CniVersion[] = versions;

/** Orders two supported versions: negative when `a` is older, 0 when equal. */
export function compareVersions(a: CniVersion, b: CniVersion): number {
  return supportedVersions.indexOf(a) - supportedVersions.indexOf(b);
}

/** True when `text` is a version genie speaks. */
export function isSupported(text: unknown): text is CniVersion {
  return supportedVersions.includes(text as CniVersion);
}

/** Error codes: 1-7, 11, 50, 51 are CNI SPEC 1.1 §5 "Error"; 100 and up are our own. */
export const code = {
  incompatibleVersion: 1,
  unsupportedField: 2,
  unknownContainer: 3,
  invalidEnvironment: 4,
  ioFailure: 5,
  decodingFailure: 6,
  invalidConfig: 7,
  tryAgainLater: 11,
  unavailable: 50,
  unavailableLimited: 51,
  accessDenied: 100,
  networkNotFound: 101,
  delegateNotFound: 102,
  delegateTimeout: 103,
  delegateProtocol: 104,
  interfaceConflict: 105,
  stateUnavailable: 106,
  internal: 999,
} as const;

/** Longest `msg` and `details` of an answer, in characters. */
const messageLengthMax = 1024;
const detailsLengthMax = 8192;

/**
 * The one error class; the runtime is told its code, message and details (SPEC 1.1 §5 "Error").
 * The message is one line: what failed, for which network or plugin, and what to do about it.
 */
export class CniError extends Error {
  /** A number from {@link code}, or the code of a delegate as it came. */
  readonly code: number;
  /** Longer text for the runtime's log, e.g. the end of stderr or every issue of a config. */
  readonly details: string;
  /** The rule that denied access, else "". A delegate may use code 100 for something else. */
  readonly rule: string;

  constructor(
    code: number,
    msg: string,
    options: { details?: string; rule?: string; cause?: unknown } = {},
  ) {
    super(msg, options);
    this.name = "CniError";
    this.code = code;
    this.details = options.details ?? "";
    this.rule = options.rule ?? "";
  }
}

/** Any thrown value as a CniError; one of another class is a bug of ours, code 999. */
export function toCniError(error: unknown): CniError {
  if (error instanceof CniError) return error;
  const reason = error instanceof Error ? error.message : String(error);
  return new CniError(code.internal, `Internal error: ${reason}`, { cause: error });
}

/** The text with control characters, which a terminal would obey, replaced by spaces. */
export function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: control characters are what to replace
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029]+/g, " ");
}

/** Text as one printable line: control characters become spaces, the end is cut. */
export function oneLine(text: string, lengthMax: number): string {
  const line = printable(text.replace(/[\n\r\t]+/g, " ")).trim();
  return line.length <= lengthMax ? line : `${line.slice(0, lengthMax - 1)}…`;
}

/** Severity of a log line, in rising order. */
export const logLevels = ["debug", "info", "warn", "error"] as const;
/** One of {@link logLevels}. */
export type LogLevel = (typeof logLevels)[number];

/** What a log line carries besides its message; undefined values are left out. */
export type LogFields = Record<string, string | number | boolean | undefined>;
/**
 * Writes one line `genie: level: msg key=value` to stderr and, when set, to the log file. A success
 * logs nothing at `info`, the default: runtimes mix stderr into what they show of a plugin.
 */
export function log(host: Host, level: LogLevel, msg: string, fields: LogFields = {}): void {
  if (logLevels.indexOf(level) < logLevels.indexOf(host.log.level)) return;
  let line = `genie: ${level}: ${oneLine(msg, messageLengthMax)}`;
  for (const [key, value] of Object.entries(fields)) {
    if (value === undefined) continue;
    const text = oneLine(String(value), messageLengthMax);
    line += ` ${key}=${/^[^\s"=]+$/.test(text) ? text : JSON.stringify(text)}`;
  }
  line += "\n";
  host.stderr(line);
  if (host.log.file === "") return;
  try {
    appendFileSync(host.log.file, `${new Date(host.now()).toISOString()} ${line}`, { mode: 0o600 });
  } catch (error) {
    host.stderr(`genie: warn: Cannot write log file: ${(error as Error).message}\n`);
    host.log = { ...host.log, file: "" };
  }
}

/** The CNI operations (SPEC 1.1 §2). */
export const commands = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] as const;
/** One of {@link commands}. */
export type Command = (typeof commands)[number];

/** Why `name` cannot name a network interface, or undefined when it can. */
export function interfaceNameIssue(name: string): string | undefined {
  if (name === "") return "it is empty";
  if (name.length > 15) return "it is longer than 15 characters";
  if (name === "." || name === "..") return "it is a folder name";
  if (!/^[\x21-\x7e]+$/.test(name)) return "it holds a character that is not printable ASCII";
  if (/[/:]/.test(name)) return 'it holds "/" or ":"';
  // The kernel takes "eth%d" as a pattern and picks a name itself.
  return name.includes("%") ? 'it holds "%"' : undefined;
}

/** True when `name` is a valid network name (SPEC 1.1 §1 `name`). */
export function isNetworkName(name: unknown): name is string {
  return typeof name === "string" && /^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/.test(name);
}

/** The answer to VERSION (SPEC 1.1 §5). It needs no stdin, which may stay open in a manual test. */
export function version(): { cniVersion: string; supportedVersions: readonly string[] } {
  return { cniVersion: "1.1.0", supportedVersions };
}

/** Writes the answer of a success; an operation without a result writes nothing. */
export function writeResult(host: Host, result: object | undefined): void {
  if (result !== undefined) host.stdout(`${JSON.stringify(result)}\n`);
}

/**
 * Writes the answer of a failure, `{cniVersion, code, msg, details?}`, to stdout: SPEC 1.1 §2 also
 * mentions stderr, but libcni reads stdout.
 */
export function writeError(host: Host, error: CniError, cniVersion: string = "1.1.0"): void {
  const msg = oneLine(error.message, messageLengthMax);
  const details = printable(error.details).slice(0, detailsLengthMax) || undefined;
  writeResult(host, { cniVersion, code: error.code, msg, details });
}
