/**
 * A Multus CNI config with only its `type` changed to `genie` (moving in from Multus): its keys,
 * read into our configuration. Pure. Source: multus-cni's docs/configuration.md.
 */
import * as v from "valibot";
import { CniError, code, type LogLevel, type StdinConfig } from "../cni.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";
import type { Config, PluginEntry } from "./schema.ts";

const text = v.exactOptional(v.nullable(v.string()));
const texts = v.exactOptional(v.nullable(v.array(v.string())));
const MultusConfig = v.looseObject({
  clusterNetwork: text,
  defaultNetworks: texts,
  delegates: v.exactOptional(v.nullable(v.array(v.custom<Record<string, unknown>>(isObject)))),
  confDir: text,
  binDir: text,
  kubeconfig: text,
  namespaceIsolation: v.exactOptional(v.nullable(v.boolean())),
  globalNamespaces: text,
  systemNamespaces: texts,
  multusNamespace: text,
  readinessindicatorfile: text,
  logFile: text,
  logLevel: text,
});

/** Multus' levels, and what we call them. */
const levels: Record<string, LogLevel> = {
  debug: "debug",
  verbose: "info",
  error: "error",
  panic: "error",
};

/** Our level for one of Multus'; undefined for none. */
export function multusLevelOf(name: unknown): LogLevel | undefined {
  return typeof name === "string" && Object.hasOwn(levels, name) ? levels[name] : undefined;
}

/** True for a CNI config that was written for Multus. */
export function isMultusConfig(stdin: StdinConfig): boolean {
  return Boolean(stdin["clusterNetwork"]) || (stdin["delegates"] ?? undefined) !== undefined;
}

/**
 * Reads the Multus keys of a CNI config over our configuration. Without them it stays as it is.
 * `delegates` become table entries of their own: the first is the default network, the others are
 * attached to every pod.
 *
 * @throws CniError 7 for a key of a wrong type, or a delegate without a type
 */
export function withMultusConfig(config: Config, stdin: StdinConfig): Config {
  if (!isMultusConfig(stdin)) return config;
  const parsed = v.safeParse(MultusConfig, stdin);
  if (!parsed.success) {
    const [issue] = parsed.issues;
    throw new CniError(
      code.invalidConfig,
      `Invalid network config: "${v.getDotPath(issue) ?? ""}": ${oneLine(issue.message, 200)}`,
    );
  }
  const own = parsed.output;
  const delegates = own.clusterNetwork ? [] : inlineDelegates(own.delegates ?? [], stdin);
  const global = (own.globalNamespaces ?? "").split(",").map((name) => name.trim());
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
      globalNamespaces: own.globalNamespaces
        ? global.filter((name) => name !== "")
        : config.kubernetes.globalNamespaces,
    },
    default: {
      ...config.default,
      systemNamespaces: own.systemNamespaces ?? config.default.systemNamespaces,
      ...(delegates.length > 0 && {
        networks: delegates.slice(0, 1).map(({ name }) => name),
        always: delegates.slice(1).map(({ name }) => name),
      }),
    },
    plugins: new Map<string, PluginEntry>([
      ...config.plugins,
      ...delegates.map((one) => [one.name, withRules(one, config.plugins.get(one.name))] as const),
    ]),
    multus: {
      namespace: own.multusNamespace || "kube-system",
      clusterNetwork: own.clusterNetwork || "",
      defaultNetworks: (own.clusterNetwork && own.defaultNetworks) || [],
    },
    ...(own.readinessindicatorfile && { readinessFile: own.readinessindicatorfile }),
  };
}

/** The table's entry of that name, if any, keeps its rules and limits. */
function withRules(
  { name, config }: { name: string; config: Record<string, unknown> },
  entry: PluginEntry = { name, line: 0 },
): PluginEntry {
  const { conf: _conf, ...rest } = entry;
  return { ...rest, config };
}

/** Each delegate under its own name; what it leaves out of name and version, Multus' config has. */
function inlineDelegates(
  delegates: Record<string, unknown>[],
  { name: configName, cniVersion }: StdinConfig,
): { name: string; config: Record<string, unknown> }[] {
  const taken = new Set<string>();
  return delegates.map((config, index) => {
    const wanted =
      typeof config["name"] === "string" && config["name"] ? config["name"] : configName;
    const name = taken.has(wanted) ? `${wanted}-${index + 1}` : wanted;
    taken.add(name);
    const version = config["cniVersion"] || cniVersion;
    const versioned = version === undefined ? config : { ...config, cniVersion: version };
    return { name, config: { ...versioned, name: config["name"] || name } };
  });
}
