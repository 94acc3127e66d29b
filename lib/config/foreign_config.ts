/**
 * A CNI config written for another plugin, through which the runtime calls genie: CNI-Genie's
 * `genie.conf`, or Multus' with only its `type` changed. Its keys are put over the plugin table.
 * Pure. Source: CNI-Genie's utils/types.go, client/client.go; multus-cni's docs/configuration.md.
 */
import * as v from "valibot";
import type { StdinConfig } from "../call.ts";
import { CniError, code, type LogLevel, logLevels, oneLine } from "../cni.ts";
import { isObject } from "../json.ts";
import { attachment, type Config, isPath, type PluginEntry } from "./schema.ts";

/** Levels a CNI config may name, CNI-Genie's included, by the one we have. */
const stdinLevels = new Map<string, LogLevel>([
  ...logLevels.map((level) => [level, level] as const),
  ["trace", "debug"],
  ["notice", "info"],
  ["warning", "warn"],
  ["critical", "error"],
  ["fatal", "error"],
  ["panic", "error"],
]);

/** Our level for one a CNI config names, whatever its case; undefined for none. */
export function logLevelOf(name: unknown): LogLevel | undefined {
  return typeof name === "string" ? stdinLevels.get(name.trim().toLowerCase()) : undefined;
}

const genieKeys = ["datastore_type", "hostname", "romana_root", "segment_label_name", "policy"];

/** True for CNI-Genie's own CNI config, by keys that all its releases write. */
export function isGenieConfig(config: Record<string, unknown>): boolean {
  const isPlain = config["type"] === "genie" && config["plugins"] === undefined;
  return isPlain && genieKeys.some((key) => config[key] !== undefined);
}

/**
 * The config with CNI-Genie's own keys of the CNI config put over it; its other keys are ignored.
 * As in CNI-Genie, a key that is "" counts as absent and `kubernetes` wins over `policy`.
 * @throws CniError 7 naming a key that is wrong, never its value: it may be a secret
 */
export function withStdinConfig(config: Config, stdin: StdinConfig): Config {
  const read = (name: string, kind: TextKind) => stdinText(stdin, name, kind);
  const level = read("log_level", levels);
  const networks = read("default_plugin", lists);
  const kubeconfig = read("kubernetes.kubeconfig", paths);
  // Both are checked, whichever wins.
  const policyRoot = read("policy.k8s_api_root", urls);
  const apiRoot = read("kubernetes.k8s_api_root", urls) || policyRoot;
  const credentials = Object.entries({
    authToken: read("policy.k8s_auth_token", ["a string", () => true]),
    clientCertificate: read("policy.k8s_client_certificate", paths),
    clientKey: read("policy.k8s_client_key", paths),
    certificateAuthority: read("policy.k8s_certificate_authority", paths),
  }).filter(([, value]) => value !== "");
  return {
    ...config,
    logLevel: logLevelOf(level) ?? config.logLevel,
    default: { ...config.default, ...(networks && { networks: splitNames(networks) }) },
    kubernetes: {
      ...config.kubernetes,
      ...(kubeconfig && { kubeconfig, kubeconfigIsExplicit: true }),
      // Early configs of CNI-Genie hold "https://host/api/v1/".
      ...(apiRoot && { apiRoot: apiRoot.replace(/\/api\/.*$|\/+$/, "") }),
      ...Object.fromEntries(credentials),
    },
  };
}

const splitNames = (value: string) => value.split(",").map((name) => name.trim());

/** True for a URL without user information, which would be printed with the server's name. */
function isApiRoot(value: string): boolean {
  return /^https?:\/\/[^/@?#]+(\/[^@?#]*)?$/i.test(value) && URL.canParse(value);
}

/** What a key of the CNI config may hold: in words, and how it is checked. */
type TextKind = [expected: string, test: (value: string) => boolean];
const urls: TextKind = ['a URL such as "https://10.96.0.1:443"', isApiRoot];
const paths: TextKind = ["an absolute path", isPath];
const levelNames = [...stdinLevels.keys()].join(", ");
const levels: TextKind = [`one of ${levelNames}`, (name) => logLevelOf(name) !== undefined];
const areNetworks = (value: string) => splitNames(value).every((name) => v.is(attachment, name));
const lists: TextKind = ['a list of networks such as "weave,calico"', areNetworks];

/** A string of the CNI config, "" when absent. @param name "key" or "object.key" */
function stdinText(stdin: StdinConfig, name: string, [expected, test]: TextKind): string {
  const [first = "", key] = name.split(".");
  let value = stdin[first] ?? undefined;
  if (key !== undefined && value !== undefined) {
    if (!isObject(value)) throw invalidStdin(`"${first}" is not an object`);
    value = value[key] ?? undefined;
  }
  if (value === undefined) return "";
  const trimmed = typeof value === "string" ? value.trim() : undefined;
  if (trimmed === "" || (trimmed !== undefined && test(trimmed))) return trimmed;
  throw invalidStdin(`"${name}" is not ${expected}`);
}

function invalidStdin(issue: string): CniError {
  return new CniError(code.invalidConfig, `Invalid network config: ${issue}`);
}

const text = v.nullish(v.string());
const texts = v.nullish(v.array(v.string()));
const MultusConfig = v.looseObject({
  ...v.entriesFromList(["clusterNetwork", "confDir", "binDir", "kubeconfig"], text),
  ...v.entriesFromList(["globalNamespaces", "multusNamespace", "readinessindicatorfile"], text),
  ...v.entriesFromList(["logFile", "logLevel"], text),
  ...v.entriesFromList(["defaultNetworks", "systemNamespaces"], texts),
  delegates: v.nullish(v.array(v.custom<Record<string, unknown>>(isObject))),
  namespaceIsolation: v.nullish(v.boolean()),
});

/** Multus' levels, and what we call them. */
const multusLevels = new Map<unknown, LogLevel>([
  ["debug", "debug"],
  ["verbose", "info"],
  ["error", "error"],
  ["panic", "error"],
]);

/** Our level for one of Multus'; undefined for none. */
export const multusLevelOf = (name: unknown): LogLevel | undefined => multusLevels.get(name);

/** True for a CNI config that was written for Multus. */
export function isMultusConfig(stdin: StdinConfig): boolean {
  return Boolean(stdin["clusterNetwork"]) || (stdin["delegates"] ?? undefined) !== undefined;
}

/** What of Multus' config genie reads in any CNI config. */
const alwaysRead = ["logFile", "logLevel"];

/** What to tell of Multus' keys in a config that is not Multus'; undefined where there are none. */
export function ignoredMultusKeys(stdin: Record<string, unknown>): string | undefined {
  const isKey = (key: string) =>
    Object.hasOwn(MultusConfig.entries, key) && !alwaysRead.includes(key);
  const keys = Object.keys(stdin).filter(isKey);
  if (keys.length === 0 || keys.includes("clusterNetwork") || keys.includes("delegates")) return;
  const why = "a key of Multus counts only beside clusterNetwork or delegates";
  return `genie's CNI config has ${keys.join(", ")}, and that is ignored: ${why}`;
}

/**
 * Puts the Multus keys of a CNI config over our configuration. `delegates` become table entries of
 * their own: the first is the default network, the others are attached to every pod.
 * @throws CniError 7 for a key of a wrong type, or a delegate without a type
 */
export function withMultusConfig(config: Config, stdin: StdinConfig): Config {
  if (!isMultusConfig(stdin)) return config;
  const parsed = v.safeParse(MultusConfig, stdin);
  if (!parsed.success) {
    const [issue] = parsed.issues;
    throw invalidStdin(`"${v.getDotPath(issue) ?? ""}": ${oneLine(issue.message, 200)}`);
  }
  const own = parsed.output;
  const given = own.clusterNetwork ? [] : (own.delegates ?? []);
  const delegates = inlineDelegates(given, stdin, config.plugins);
  const global = splitNames(own.globalNamespaces ?? "").filter((name) => name !== "");
  return {
    ...config,
    confDir: own.confDir || "/etc/cni/multus/net.d",
    binDirs: own.binDir ? [own.binDir, ...config.binDirs] : config.binDirs,
    logFile: own.logFile || config.logFile,
    logLevel: multusLevelOf(own.logLevel) ?? config.logLevel,
    kubernetes: {
      ...config.kubernetes,
      ...(own.kubeconfig && { kubeconfig: own.kubeconfig, kubeconfigIsExplicit: true }),
      namespaceIsolation: own.namespaceIsolation ?? config.kubernetes.namespaceIsolation,
      // Multus: "default" is one of them only while the key is absent.
      globalNamespaces: own.globalNamespaces ? global : config.kubernetes.globalNamespaces,
    },
    default: {
      ...config.default,
      systemNamespaces: own.systemNamespaces ?? config.default.systemNamespaces,
      ...(delegates.length > 0 && {
        networks: delegates.slice(0, 1).map(({ name }) => name),
        always: delegates.slice(1).map(({ name }) => name),
      }),
    },
    plugins: new Map([...config.plugins, ...delegates.map((one) => [one.name, one] as const)]),
    multus: {
      namespace: own.multusNamespace || "kube-system",
      clusterNetwork: own.clusterNetwork || "",
      defaultNetworks: (own.clusterNetwork && own.defaultNetworks) || [],
    },
    ...(own.readinessindicatorfile && { readinessFile: own.readinessindicatorfile }),
  };
}

/**
 * Each delegate as an entry under its own name; the table's entry of that name keeps its rules and
 * limits. What a delegate leaves out of name and version, Multus' config has.
 */
function inlineDelegates(
  delegates: Record<string, unknown>[],
  { name: configName, cniVersion }: StdinConfig,
  plugins: Config["plugins"],
): PluginEntry[] {
  const taken = new Set<string>();
  return delegates.map((config, index) => {
    const { name: given } = config;
    const wanted = typeof given === "string" && given !== "" ? given : configName;
    const name = taken.has(wanted) ? `${wanted}-${index + 1}` : wanted;
    taken.add(name);
    const version = config["cniVersion"] || cniVersion;
    const versioned = version === undefined ? config : { ...config, cniVersion: version };
    const { conf: _, ...entry } = plugins.get(name) ?? { name, line: 0 };
    return { ...entry, config: { ...versioned, name: given || name } };
  });
}
