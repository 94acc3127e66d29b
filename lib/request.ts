/**
 * One call of the runtime, read and checked: the variables, then stdin, then the version.
 * Source: CNI SPEC 1.1 §2 (parameters, operations).
 * Pure but for the stdin of its host.
 */
import type { Host, Request, StdinConfig } from "./call.ts";
import {
  CniError,
  type CniVersion,
  type Command,
  code,
  commands,
  compareVersions,
  interfaceNameIssue,
  isNetworkName,
  isSupported,
  oneLine,
  supportedVersions,
} from "./cni.ts";
import { isObject, parseJson } from "./json.ts";
import type { PodIdentity } from "./record.ts";

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

/** The command named by the environment. @throws CniError 4 when there is no such command */
export function readCommand({ CNI_COMMAND: name = "" }: Host["env"]): Command {
  const command = commands.find((known) => known === name);
  if (command) return command;
  throw invalid("CNI_COMMAND", oneLine(name, 64), `: expected one of ${commands.join(", ")}`);
}

function invalid(variable: string, value: string, issue: string): CniError {
  return new CniError(code.invalidEnvironment, `Invalid ${variable} "${value}"${issue}`);
}

/**
 * Reads and checks one call.
 *
 * @throws CniError 4 for a missing or invalid variable, 6 for stdin that is not JSON,
 *   7 for a config without a valid `name`, 1 for a version or command we cannot serve
 */
export function readRequest(host: Host, command: Request["command"]): Request {
  const required = requiredVariables[command];
  const missing = required.filter((name) => !host.env[name]).join(", ");
  if (missing !== "") {
    const msg = `Missing required environment variable ${missing} for ${command}`;
    throw new CniError(code.invalidEnvironment, msg);
  }
  // GC and STATUS are about no container: they ignore what the environment says of one.
  const given: Host["env"] = required.includes("CNI_CONTAINERID") ? host.env : {};
  const { CNI_CONTAINERID: containerId, CNI_IFNAME: ifName, CNI_NETNS: netns = "" } = given;
  if (containerId !== undefined) checkContainerId(containerId);
  const issue = ifName === undefined ? undefined : interfaceNameIssue(ifName);
  if (issue !== undefined) {
    throw invalid("CNI_IFNAME", oneLine(ifName ?? "", 40), ` for an interface name: ${issue}`);
  }
  const config = readConfig(host);
  return {
    command,
    containerId: containerId ?? "",
    netns,
    ifName: ifName ?? "",
    args: host.env["CNI_ARGS"] ?? "",
    path: readPath(host.env),
    cniVersion: requestVersion(config, command),
    config,
  };
}

/** The folders of CNI_PATH. */
export function readPath(env: Host["env"]): string[] {
  return (env["CNI_PATH"] ?? "").split(":").filter((folder) => folder !== "");
}

function checkContainerId(id: string): void {
  if (isNetworkName(id) && id.length <= 256) return;
  const rule = 'letters, digits, "_", "." and "-", first a letter or digit, at most 256';
  throw invalid("CNI_CONTAINERID", oneLine(id, 80), `: expected ${rule}`);
}

function readConfig(host: Host): StdinConfig {
  const what = "network config on stdin";
  const text = host.stdin();
  if (text.trim() === "")
    throw new CniError(code.decodingFailure, `Cannot read ${what}: it is empty`);
  const value = parseJson(text, what);
  if (!isObject(value)) {
    throw new CniError(code.decodingFailure, `Cannot decode ${what}: expected a JSON object`);
  }
  for (const key of ["args", "runtimeConfig"]) {
    if (value[key] === null) delete value[key];
    if (value[key] !== undefined && !isObject(value[key])) {
      throw new CniError(code.invalidConfig, `Invalid network config: "${key}" is not an object`);
    }
  }
  if (isNetworkName(value["name"])) return value as StdinConfig;
  throw new CniError(
    code.invalidConfig,
    `Invalid network config: "name" is ${"name" in value ? "not valid" : "missing"}, ` +
      'expected letters, digits, "_", "." and "-", first a letter or digit',
  );
}

function requestVersion({ cniVersion = "" }: StdinConfig, command: Command): CniVersion {
  // libcni: a config without a version is of the first one.
  const version = cniVersion === "" ? "0.1.0" : cniVersion;
  if (!isSupported(version)) {
    const named = oneLine(JSON.stringify(version), 40);
    const msg = `Unsupported CNI version ${named}: supported are ${supportedVersions.join(", ")}`;
    throw new CniError(code.incompatibleVersion, msg);
  }
  const since = commandSince[command];
  if (since === undefined || compareVersions(version, since) >= 0) return version;
  const msg = `Config version ${version} does not allow ${command}: it exists since ${since}`;
  throw new CniError(code.incompatibleVersion, msg);
}

/**
 * CNI_ARGS as pairs. Values may contain `=`; of a repeated key the last one counts.
 * @see CNI SPEC 1.1 §2 "Parameters"
 */
export function parseArgs(args: string): Map<string, string> {
  const pairs = new Map<string, string>();
  for (const part of args.split(";")) {
    const at = part.indexOf("=");
    if (at > 0) pairs.set(part.slice(0, at).trim(), part.slice(at + 1));
  }
  return pairs;
}

/** Which pod the call is for, as CNI_ARGS says. */
export function podIdentity(args: string): PodIdentity {
  const pairs = parseArgs(args);
  return {
    namespace: pairs.get("K8S_POD_NAMESPACE") ?? "",
    name: pairs.get("K8S_POD_NAME") ?? "",
    uid: pairs.get("K8S_POD_UID") ?? "",
  };
}

/** The pod as people write it: `namespace/name`. */
export function podLabel({ namespace, name }: { namespace: string; name: string }): string {
  if (name === "") return "(unnamed)";
  return namespace === "" ? name : `${namespace}/${name}`;
}
