/**
 * One call of the runtime, read and checked: the variables, then stdin, then the version.
 * Source: CNI SPEC 1.1 §2 (parameters, operations).
 */
import {
  CniError,
  type CniVersion,
  type Command,
  code,
  commands,
  compareVersions,
  type Host,
  interfaceNameIssue,
  isNetworkName,
  isSupported,
  type Request,
  type StdinConfig,
  supportedVersions,
} from "./cni.ts";
import { isObject, parseJson } from "./json.ts";
import { oneLine } from "./text.ts";

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
    path: readPath(env),
    cniVersion: requestVersion(config, command),
    config,
  };
}

/** The folders of CNI_PATH. */
export function readPath(env: Host["env"]): string[] {
  return (env["CNI_PATH"] ?? "").split(":").filter((folder) => folder !== "");
}

/**
 * Checks a container id.
 * @throws CniError 4 @see CNI SPEC 1.1 §2 "Parameters"
 */
function checkContainerId(containerId: string): void {
  if (/^[a-zA-Z0-9][a-zA-Z0-9_.-]*$/.test(containerId) && containerId.length <= 256) return;
  throw new CniError(
    code.invalidEnvironment,
    `Invalid CNI_CONTAINERID "${oneLine(containerId, 80)}": expected letters, digits, "_", "." ` +
      `and "-", first a letter or digit, at most 256`,
  );
}

/**
 * Checks an interface name against the kernel's rules.
 * @param what names its origin in the error, e.g. `CNI_IFNAME`
 * @throws CniError 4
 */
function checkInterfaceName(name: string, what: string): void {
  const issue = interfaceNameIssue(name);
  if (issue === undefined) return;
  throw new CniError(
    code.invalidEnvironment,
    `Invalid ${what} "${oneLine(name, 40)}" for an interface name: ${issue}`,
  );
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
