/**
 * The wire of the CNI protocol: environment and stdin in, one JSON document and an exit status out.
 * Owns the error codes, the log line and the VERSION answer. Imports nothing of ours.
 * Source: CNI SPEC 1.1 §2 (parameters, operations) and §5 (result types).
 */
import { appendFileSync, readSync } from "node:fs";

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

  /**
   * @param code number from {@link code} or a delegate's own
   * @param msg one line: what failed, for which network or plugin, and what to do
   */
  constructor(code: number, msg: string, options: { details?: string; cause?: unknown } = {}) {
    super(msg, options.cause === undefined ? {} : { cause: options.cause });
    this.name = "CniError";
    this.code = code;
    this.details = options.details ?? "";
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

/** Text of many lines without what a terminal would obey: other control characters become spaces. */
export function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must go
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029]+/g, " ");
}

/** Text as one printable line: control characters become spaces, the end is cut. */
export function oneLine(text: string, lengthMax: number): string {
  const line = printable(text.replace(/[\n\r\t]+/g, " ")).trim();
  return line.length <= lengthMax ? line : `${line.slice(0, lengthMax - 1)}…`;
}

/** JSON read from others is deeper than this only on purpose. */
const jsonDepthMax = 128;

/**
 * Parses JSON that is hostile until parsed. Numbers that a double cannot hold, or would print
 * otherwise, keep their text (SPEC §1: unknown fields pass through unchanged).
 *
 * @param what names the text in the error, e.g. `network config on stdin`
 * @throws CniError 6 when it is not JSON or nests deeper than 128
 */
export function parseJson(text: string, what: string): unknown {
  const plain = scan(text, what);
  try {
    // The reviver is slow, so it is used only where the text has a number worth keeping.
    return plain ? JSON.parse(text) : JSON.parse(text, keepNumberText);
  } catch (error) {
    throw new CniError(code.decodingFailure, `Cannot decode ${what}: it is not valid JSON`, {
      details: error instanceof Error ? error.message : String(error),
      cause: error,
    });
  }
}

/** Has no type in TypeScript's library yet: the third argument and `rawJSON` are ES2026. */
const rawJson = JSON as unknown as {
  rawJSON(text: string): unknown;
  isRawJSON(value: unknown): boolean;
};

function keepNumberText(_key: string, value: unknown, context?: { source?: string }): unknown {
  const source = context?.source;
  if (typeof value !== "number" || source === undefined) return value;
  return JSON.stringify(value) === source ? value : rawJson.rawJSON(source);
}

/** Checks the depth; false when a number has a fraction, an exponent or 16 digits and more. */
function scan(text: string, what: string): boolean {
  let depth = 0;
  let digits = 0;
  let plain = true;
  for (let i = 0; i < text.length; i++) {
    const char = text.charCodeAt(i);
    if (char === quoteChar) {
      for (i++; i < text.length && text.charCodeAt(i) !== quoteChar; i++) {
        if (text.charCodeAt(i) === backslashChar) i++;
      }
    } else if (char === 0x7b || char === 0x5b) {
      if (++depth > jsonDepthMax) {
        throw new CniError(
          code.decodingFailure,
          `Cannot decode ${what}: it nests deeper than ${jsonDepthMax} levels`,
        );
      }
    } else if (char === 0x7d || char === 0x5d) depth--;
    digits = char >= 0x30 && char <= 0x39 ? digits + 1 : 0;
    // A dot, an exponent's sign or capital, and -0 occur outside strings in numbers alone.
    if (digits > 15 || char === 0x2e || char === 0x45 || char === 0x2b) plain = false;
    if (char === 0x2d && text.charCodeAt(i + 1) === 0x30) plain = false;
    if (char === 0x65 && isDigit(text.charCodeAt(i - 1))) plain = false;
  }
  return plain;
}

const quoteChar = 0x22;
const backslashChar = 0x5c;

function isDigit(char: number): boolean {
  return char >= 0x30 && char <= 0x39;
}

/** True for a JSON object: not null, not an array, not a number that kept its text. */
export function isObject(value: unknown): value is Record<string, unknown> {
  return (
    typeof value === "object" &&
    value !== null &&
    !Array.isArray(value) &&
    !rawJson.isRawJSON(value)
  );
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

/** Which variables a command requires (SPEC 1.1 §2, "Required environment parameters"). */
const requiredVariables: Record<Request["command"], readonly string[]> = {
  ADD: ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
  DEL: ["CNI_CONTAINERID", "CNI_IFNAME"],
  CHECK: ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"],
  GC: ["CNI_PATH"],
  STATUS: [],
};
/** The oldest config version in which a command exists (SPEC 1.1 changelog). */
const commandSince: Partial<Record<Command, CniVersion>> = {
  CHECK: "0.4.0",
  GC: "1.1.0",
  STATUS: "1.1.0",
};

/** Largest stdin read, in bytes: a config, a result and 256 KiB of annotations fit many times. */
const stdinBytesMax = 4 * 1024 * 1024;

/**
 * Reads file descriptor 0 to its end, as text.
 * Synchronous on purpose: the runtime's streams cost milliseconds that every pod would pay.
 *
 * @throws CniError 6 when it is larger than 4 MiB or not UTF-8, 5 when it cannot be read
 */
export function readStdin(): string {
  const chunks: Buffer[] = [];
  let total = 0;
  for (;;) {
    const chunk = Buffer.allocUnsafe(65536);
    let count: number;
    try {
      count = readSync(0, chunk, 0, chunk.length, null);
    } catch (error) {
      const reason = (error as NodeJS.ErrnoException).code;
      if (reason === "EOF") break;
      if (reason === "EAGAIN") {
        Bun.sleepSync(1);
        continue;
      }
      throw new CniError(code.ioFailure, `Cannot read stdin: ${reason}`, { cause: error });
    }
    if (count === 0) break;
    total += count;
    if (total > stdinBytesMax) {
      throw new CniError(
        code.decodingFailure,
        `Cannot read network config on stdin: it is larger than ${stdinBytesMax} bytes`,
      );
    }
    chunks.push(chunk.subarray(0, count));
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(chunks));
  } catch (error) {
    throw new CniError(
      code.decodingFailure,
      "Cannot read network config on stdin: it is not UTF-8",
      { cause: error },
    );
  }
}

/** The command named by the environment. @throws CniError 4 when it is none of ours */
export function readCommand(env: Host["env"]): Command {
  const name = env["CNI_COMMAND"] ?? "";
  const command = commands.find((known) => known === name);
  if (command) return command;
  throw new CniError(
    code.invalidEnvironment,
    `Invalid CNI_COMMAND "${oneLine(name, 64)}": expected one of ${commands.join(", ")}`,
  );
}

/**
 * Reads and checks one call: variables, then stdin, then the version.
 *
 * @throws CniError 4 for a missing or invalid variable, 6 for stdin that is not JSON,
 *   7 for a config without a valid `name`, 1 for a version or command we cannot serve
 */
export function readRequest(host: Host, command: Request["command"]): Request {
  const { env } = host;
  const missing = requiredVariables[command].filter((name) => !env[name]);
  if (missing.length > 0) {
    throw new CniError(
      code.invalidEnvironment,
      `Missing required environment variable ${missing.join(", ")} for ${command}`,
    );
  }
  const needsAttachment = requiredVariables[command].includes("CNI_CONTAINERID");
  const containerId = needsAttachment ? (env["CNI_CONTAINERID"] ?? "") : "";
  const ifName = needsAttachment ? (env["CNI_IFNAME"] ?? "") : "";
  if (needsAttachment) {
    checkContainerId(containerId);
    checkInterfaceName(ifName, "CNI_IFNAME");
  }
  const config = readConfig(host);
  return {
    command,
    containerId,
    netns: needsAttachment ? (env["CNI_NETNS"] ?? "") : "",
    ifName,
    args: env["CNI_ARGS"] ?? "",
    path: (env["CNI_PATH"] ?? "").split(":").filter((folder) => folder !== ""),
    cniVersion: requestVersion(config, command),
    config,
  };
}

/**
 * Checks a container id.
 * @throws CniError 4 @see CNI SPEC 1.1 §2 "Parameters"
 */
export function checkContainerId(containerId: string): void {
  if (/^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/.test(containerId) && containerId.length <= 256) return;
  throw new CniError(
    code.invalidEnvironment,
    `Invalid CNI_CONTAINERID "${oneLine(containerId, 80)}": expected letters, digits, "_", "." ` +
      `and "-", first a letter or digit, at most 256`,
  );
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

/**
 * Checks an interface name against the kernel's rules.
 * @param what names its origin in the error, e.g. `CNI_IFNAME`
 * @throws CniError 4
 */
export function checkInterfaceName(name: string, what: string): void {
  const issue = interfaceNameIssue(name);
  if (issue === undefined) return;
  throw new CniError(
    code.invalidEnvironment,
    `Invalid ${what} "${oneLine(name, 40)}" for an interface name: ${issue}`,
  );
}

/** True when `name` may name a network (SPEC 1.1 §1 `name`). */
export function isNetworkName(name: unknown): name is string {
  return typeof name === "string" && /^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/.test(name);
}

function readConfig(host: Host): StdinConfig {
  const text = host.stdin();
  if (text.trim() === "") {
    throw new CniError(code.decodingFailure, "Cannot read network config on stdin: it is empty");
  }
  const value = parseJson(text, "network config on stdin");
  if (!isObject(value)) {
    throw new CniError(
      code.decodingFailure,
      "Cannot decode network config on stdin: expected a JSON object",
    );
  }
  for (const key of ["args", "runtimeConfig"]) {
    if (value[key] !== undefined && value[key] !== null && !isObject(value[key])) {
      throw new CniError(code.invalidConfig, `Invalid network config: "${key}" is not an object`);
    }
    if (value[key] === null) delete value[key];
  }
  if (!isNetworkName(value["name"])) {
    throw new CniError(
      code.invalidConfig,
      `Invalid network config: "name" is ${"name" in value ? "not valid" : "missing"}, ` +
        'expected letters, digits, "_", "." and "-", first a letter or digit',
    );
  }
  return value as StdinConfig;
}

function requestVersion(config: StdinConfig, command: Command): CniVersion {
  // libcni: a config without a version is of the first one.
  const version =
    config.cniVersion === undefined || config.cniVersion === "" ? "0.1.0" : config.cniVersion;
  if (!isSupported(version)) {
    throw new CniError(
      code.incompatibleVersion,
      `Unsupported CNI version ${oneLine(JSON.stringify(version), 40)}: supported are ` +
        supportedVersions.join(", "),
    );
  }
  const since = commandSince[command];
  if (since !== undefined && compareVersions(version, since) < 0) {
    throw new CniError(
      code.incompatibleVersion,
      `Config version ${version} does not allow ${command}: it exists since ${since}`,
    );
  }
  return version;
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
