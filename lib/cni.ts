/**
 * The words of the CNI protocol: versions, commands, names, error codes, and the one document that
 * answers a call; beside them the log line. How a call is read is in `request.ts`.
 * Source: CNI SPEC 1.1 §2 (parameters, operations) and §5 (result types).
 */
import { appendFileSync } from "node:fs";
import { oneLine, printable } from "./text.ts";

/** Every CNI version spoken, oldest first (SPEC 1.1 §5 "Version"). */
export const supportedVersions = [
  "0.1.0",
  "0.2.0",
  "0.3.0",
  "0.3.1",
  "0.4.0",
  "1.0.0",
  "1.1.0",
] as const;
/** One of {@link supportedVersions}. */
export type CniVersion = (typeof supportedVersions)[number];

/** Orders two supported versions: negative when `a` is older, 0 when equal. */
export function compareVersions(a: CniVersion, b: CniVersion): number {
  return supportedVersions.indexOf(a) - supportedVersions.indexOf(b);
}

/** True when `text` is a version we speak. */
export function isSupported(text: unknown): text is CniVersion {
  return supportedVersions.some((version) => version === text);
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

/** Longest `msg` and `details` that leave this program, in characters. */
const messageLengthMax = 1024;
const detailsLengthMax = 8192;

/** The one error class: what the runtime is told (SPEC 1.1 §5 "Error"). */
export class CniError extends Error {
  /** Numeric CNI code, see {@link code}; a delegate's own code is kept as it came. */
  readonly code: number;
  /** Longer text for the log of the runtime: stderr tail, every issue of a config. */
  readonly details: string;
  /** Of a denial the rule that denied; else "". Delegates may use code 100 for something else. */
  readonly rule: string;

  /**
   * @param code number from {@link code} or a delegate's own
   * @param msg one line: what failed, for which network or plugin, and what to do
   */
  constructor(
    code: number,
    msg: string,
    options: { details?: string; rule?: string; cause?: unknown } = {},
  ) {
    super(msg, options.cause === undefined ? {} : { cause: options.cause });
    this.name = "CniError";
    this.code = code;
    this.details = options.details ?? "";
    this.rule = options.rule ?? "";
  }
}

/** Any thrown value as a CniError; what is not one is our own bug, code 999. */
export function toCniError(error: unknown): CniError {
  if (error instanceof CniError) return error;
  const message = error instanceof Error ? error.message : String(error);
  return new CniError(code.internal, `Internal error: ${message}`, { cause: error });
}

/** Severity of a log line, in rising order. */
export const logLevels = ["debug", "info", "warn", "error"] as const;
/** One of {@link logLevels}. */
export type LogLevel = (typeof logLevels)[number];

/** Where log lines go; `file` empty means stderr alone. */
export interface LogSettings {
  level: LogLevel;
  file: string;
}

/** The world as a value: everything outside that a module may touch besides files. */
export interface Host {
  /** Environment as the caller gave it. */
  env: Record<string, string | undefined>;
  /** Reads stdin to its end. @throws CniError 6 when it is larger than the limit or not UTF-8 */
  stdin: () => string;
  stdout: (text: string) => void;
  stderr: (text: string) => void;
  /** Milliseconds since the epoch. */
  now: () => number;
  /** Aborts when we are asked to end (SIGTERM, SIGINT): an ADD then rolls back. */
  signal: AbortSignal;
  log: LogSettings;
  /**
   * True when the process ends with this call: what the kernel frees then need not be closed, which
   * for a database costs a checkpoint that the next call can do without.
   */
  endsAtOnce?: boolean;
  /** Makes SIGTERM and SIGINT abort `signal`; before that they end the process at once. */
  catchSignals?: () => void;
}

/** What a log line or an error may carry besides its message. */
export type LogFields = Record<string, string | number | boolean | undefined>;

/**
 * Writes one line `genie: level: msg key=value` to stderr and, when set, to the log file.
 * At `info`, the default, a success writes nothing: only `warn` and `error` reach stderr, because
 * runtimes mix stderr into what they show of a plugin.
 */
export function log(host: Host, level: LogLevel, msg: string, fields: LogFields = {}): void {
  if (logLevels.indexOf(level) < logLevels.indexOf(host.log.level)) return;
  const pairs = Object.entries(fields)
    .filter(([, value]) => value !== undefined)
    .map(([key, value]) => ` ${key}=${quoteField(String(value))}`)
    .join("");
  const line = `genie: ${level}: ${oneLine(msg, messageLengthMax)}${pairs}\n`;
  host.stderr(line);
  if (host.log.file === "") return;
  try {
    appendFileSync(host.log.file, `${new Date(host.now()).toISOString()} ${line}`, { mode: 0o600 });
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    host.stderr(`genie: warn: Cannot write log file: ${reason}\n`);
    host.log = { ...host.log, file: "" };
  }
}

function quoteField(text: string): string {
  const line = oneLine(text, messageLengthMax);
  return /^[^\s"=]+$/.test(line) ? line : JSON.stringify(line);
}

/** The CNI operations (SPEC 1.1 §2). */
export const commands = ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] as const;
/** One of {@link commands}. */
export type Command = (typeof commands)[number];

/** A network config as our caller sent it on stdin; only the protocol's keys are typed. */
export type StdinConfig = {
  cniVersion?: string;
  name: string;
  type?: string;
  args?: Record<string, unknown>;
  runtimeConfig?: Record<string, unknown>;
  prevResult?: unknown;
  [key: string]: unknown;
};

/** One call of the runtime, checked. Fields a command does not use are "". */
export interface Request {
  command: Exclude<Command, "VERSION">;
  containerId: string;
  /** Path of the network namespace; "" when it is gone or not given. */
  netns: string;
  ifName: string;
  /** CNI_ARGS as received. */
  args: string;
  /** CNI_PATH, split. */
  path: string[];
  /** The version to answer in: `cniVersion` of the config, 0.1.0 when it names none. */
  cniVersion: CniVersion;
  config: StdinConfig;
}

/** Why `name` cannot name a network interface, or undefined when it can. */
export function interfaceNameIssue(name: string): string | undefined {
  if (name === "") return "it is empty";
  if (name.length > 15) return "it is longer than 15 characters";
  if (name === "." || name === "..") return "it is a folder name";
  if (!/^[\x21-\x7e]+$/.test(name)) return "it holds a character that is not printable ASCII";
  if (/[/:]/.test(name)) return 'it holds "/" or ":"';
  // The kernel takes "eth%d" for a pattern and chooses a name itself.
  if (name.includes("%")) return 'it holds "%"';
  return undefined;
}

/** True when `name` may name a network (SPEC 1.1 §1 `name`). */
export function isNetworkName(name: unknown): name is string {
  return typeof name === "string" && /^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/.test(name);
}

/**
 * The answer to VERSION (SPEC 1.1 §5 "Version"). Reads no stdin, as libcni's own plugins do: a
 * caller that probes by hand may leave it open.
 */
export function version(): { cniVersion: string; supportedVersions: readonly string[] } {
  return { cniVersion: "1.1.0", supportedVersions };
}

/** Writes the one document of a success. Operations without a result write nothing. */
export function writeResult(host: Host, result: object | undefined): void {
  if (result !== undefined) host.stdout(`${JSON.stringify(result)}\n`);
}

/**
 * Writes the one document of a failure: `{cniVersion, code, msg, details?}` on stdout.
 * SPEC 1.1 §2 says stderr once and stdout for STATUS; libcni reads stdout for all.
 *
 * @param cniVersion version of the request, where it could be read
 */
export function writeError(host: Host, error: CniError, cniVersion: string = "1.1.0"): void {
  const details = printable(error.details).slice(0, detailsLengthMax);
  host.stdout(
    `${JSON.stringify({
      cniVersion,
      code: error.code,
      msg: oneLine(error.message, messageLengthMax),
      ...(details !== "" && { details }),
    })}\n`,
  );
}
