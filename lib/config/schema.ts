/**
 * The plugin table `plugins.toml`, by its schema: every key, default and limit. Pure. Units end the
 * field names. A schema's message is what was expected; config.ts makes the sentence around it.
 */
import * as v from "valibot";
import { interfaceNameIssue, isNetworkName, logLevels } from "../cni.ts";
import { editDistance } from "../text.ts";
import { parseDuration } from "./quantity.ts";
import { isTable } from "./toml.ts";

const kubeconfigDefault = "/etc/cni/genie/kubeconfig";

/** Our own tables refuse unknown keys. The check: strictObject takes a list or date for empty. */
function table<const T extends v.ObjectEntries>(entries: T) {
  const strict = v.strictObject(entries, (issue) => suggestion(`${issue.input}`, entries));
  return v.pipe(v.unknown(), v.check(isTable, "a table"), strict);
}

function text(expected: string, test: (value: string) => boolean) {
  return v.pipe(v.string(expected), v.check(test, expected));
}

function duration(max: string) {
  const limitMs = parseDuration(max) ?? 0;
  return v.pipe(
    text(`a duration such as "90s", "5m" or "1h", more than 0 and at most "${max}"`, (value) => {
      return (parseDuration(value) ?? Infinity) <= limitMs;
    }),
    v.transform((value) => parseDuration(value) ?? 0),
  );
}

function oneOf<const T extends readonly string[]>(...names: T) {
  return v.picklist(names, names.map((name) => `"${name}"`).join(" or "));
}

function list<T extends v.GenericSchema>(item: T, ...initial: v.InferInput<T>[]) {
  return v.optional(v.array(item, "a list"), () => initial);
}

/** True for an absolute path without control characters. */
export const isPath = (value: string) => /^\/[^\p{Cc}]{0,4094}$/u.test(value);
const path = text("an absolute path", isPath);
const pathOrNone = text('an absolute path, or ""', (value) => value === "" || isPath(value));
const fileName = text("a file name or an absolute path", (value) =>
  /^(\/|(?![^/]*\/))[^\p{Cc}]+$/u.test(value),
);
const toggle = v.boolean("true or false");
const weight = v.pipe(v.number("a number"), v.finite("a number"), v.minValue(0, "0 or more"));
const count = v.pipe(v.number("a whole number"), v.safeInteger("a whole number"));
/** Schema of the name of a network. */
export const network = text("the name of a network", isNetworkName);
/** Schema of a network's name, or `name@interface`. */
export const attachment = text('the name of a network, or "name@interface"', (value) => {
  const [name, ifName = "eth0", ...more] = value.split("@");
  return isNetworkName(name) && interfaceNameIssue(ifName) === undefined && more.length === 0;
});
/** Schema of what every pod gets: a network, or a NetworkAttachmentDefinition by namespace/name. */
const always = text('the name of a network, or "namespace/name" of an object', (value) => {
  const [first = "", second, ...more] = value.split("/");
  if (second === undefined) return v.is(attachment, first);
  return v.is(namespace, first) && v.is(attachment, second) && more.length === 0;
});
const namespace = text("the name of a namespace", (value) => /^[a-z0-9.-]{1,253}$/.test(value));
// A pattern that cannot match any Kubernetes name ("team_*", "[ab]") is a mistake, and in a deny
// rule it would leave the network open.
const glob = text('a namespace, "*" and "?" being wildcards', (value) =>
  /^[a-z0-9.*?-]{1,253}$/.test(value),
);
const namespacedGlob = text('"namespace/name", "*" and "?" being wildcards', (value) =>
  /^[a-z0-9.*?-]{1,253}\/[a-z0-9.*?-]{1,253}$/.test(value),
);

/** Who a rule names. Its lists are OR-ed; `serviceAccounts` and `pods` are "namespace/name". */
const Rule = v.pipe(
  table({
    namespaces: list(glob),
    service_accounts: list(namespacedGlob),
    pods: list(namespacedGlob),
  }),
  v.transform(({ service_accounts: serviceAccounts, ...rest }) => ({ ...rest, serviceAccounts })),
);
/** A rule, with its line in the table. */
export type Rule = v.InferOutput<typeof Rule> & { line: number };

function patterns(expected: string, test: RegExp) {
  const item = text(`${expected}, "*" and "?" being wildcards`, (value) => test.test(value));
  return v.pipe(v.array(item, "a list"), v.minLength(1, "a list with something in it"));
}

const pluginTypes = patterns("the type of a plugin", /^[A-Za-z0-9_.*?-]{1,64}$/);
/**
 * What NetworkAttachmentDefinitions of some namespaces may be: all its keys must hold. An absent
 * key says nothing; an empty list would admit nobody, and is refused as a mistake.
 */
const NadRule = v.pipe(
  table({
    namespaces: v.optional(patterns("a namespace", /^[a-z0-9.*?-]{1,253}$/), []),
    types: v.exactOptional(pluginTypes),
    ipams: v.exactOptional(pluginTypes),
    masters: v.exactOptional(patterns("the name of a device", /^[!-.0-9;-~]{1,15}$/)),
    config_on_disk: v.optional(toggle, false),
  }),
  v.transform(({ config_on_disk: configOnDisk, ...rest }) => ({ ...rest, configOnDisk })),
);
const quota = v.exactOptional(v.pipe(count, v.minValue(1, "1 or more")));
const Access = v.pipe(
  table({
    default: v.optional(oneOf("allow", "deny"), "allow"),
    nad: v.exactOptional(v.array(NadRule, "a list")),
    max_attachments: v.exactOptional(table({ pod: quota, namespace: quota })),
  }),
  v.transform(({ max_attachments: maxAttachments, ...rest }) => ({
    ...rest,
    ...(maxAttachments && { maxAttachments }),
  })),
);
/** Who may use what, beside the rules of the plugins; with its lines in the table. */
export interface AccessTable {
  /** What holds for a network without an allow rule. */
  default: "allow" | "deny";
  /** Line of `default`, where it is "deny". */
  line?: number;
  /** Absent: NetworkAttachmentDefinitions may be anything. */
  nad?: (v.InferOutput<typeof NadRule> & { line: number })[];
  /** How many attachments a pod may have, and the pods of a namespace on this node. */
  maxAttachments?: { pod?: number; namespace?: number; line: number };
}

/** Schema of one `[plugins.NAME]`. */
export const Plugin = v.pipe(
  table({
    conf: v.exactOptional(fileName),
    config: v.exactOptional(v.custom<object>(isTable, "a table")),
    allow: v.exactOptional(Rule),
    deny: v.exactOptional(Rule),
    timeout: v.exactOptional(duration("1h")),
    capacity: v.exactOptional(v.pipe(count, v.minValue(1, "1 or more"))),
    enforce_policy: v.exactOptional(toggle),
  }),
  v.transform(({ timeout, enforce_policy: enforcePolicy, ...rest }) => ({
    ...rest,
    ...(timeout && { timeoutMs: timeout }),
    ...(enforcePolicy && { enforcePolicy }),
  })),
);
/** One `[plugins.NAME]`. Without `conf` and `config`: a list in `confDir` by that name. */
export interface PluginEntry {
  name: string;
  /** File of a config list: a file name in `confDir`, or an absolute path. */
  conf?: string;
  /** A config list written in the table: JSON data, not checked yet; `name` may be missing. */
  config?: Record<string, unknown>;
  allow?: Rule;
  deny?: Rule;
  /** Limit of each call of a delegate. */
  timeoutMs?: number;
  /** Addresses the network has, where its IPAM cannot be read. */
  capacity?: number;
  /** Genie enforces plain NetworkPolicy on it: its own plugin does not. */
  enforcePolicy?: true;
  /** Line of its `[plugins.NAME]` header, or else of its first key. */
  line: number;
}

const Weights = table({
  occupancy: v.optional(weight, 4),
  response_time: v.optional(weight, 3),
  failures: v.optional(weight, 2),
  bandwidth: v.optional(weight, 1),
  subnets: v.optional(weight, 0),
});
const Default = v.pipe(
  table({
    networks: list(attachment),
    always: list(always),
    system_namespaces: list(namespace, "kube-system"),
  }),
  v.transform(({ system_namespaces: systemNamespaces, ...rest }) => ({
    ...rest,
    systemNamespaces,
  })),
);
const Kubernetes = v.pipe(
  table({
    kubeconfig: v.exactOptional(path),
    timeout: v.optional(duration("5m"), "5s"),
    namespace_isolation: v.optional(toggle, false),
    global_namespaces: list(namespace, "default"),
    status: v.optional(oneOf("inline", "agent", "off"), "inline"),
    kubelet_dir: v.optional(path, "/var/lib/kubelet"),
  }),
  v.transform((keys) => ({
    kubeconfig: keys.kubeconfig ?? kubeconfigDefault,
    /** True when someone named the file: then it must exist. */
    kubeconfigIsExplicit: keys.kubeconfig !== undefined,
    timeoutMs: keys.timeout,
    namespaceIsolation: keys.namespace_isolation,
    globalNamespaces: keys.global_namespaces,
    status: keys.status,
    /** Root folder of the kubelet: its pod-resources socket tells a pod's devices. */
    kubeletDir: keys.kubelet_dir,
  })),
);
const Policy = v.pipe(
  table({
    enforce: v.optional(toggle, false),
    max_age: v.optional(duration("1d"), "5m"),
    when_stale: v.optional(oneOf("closed", "open"), "closed"),
    where: v.optional(oneOf("pod", "host"), "pod"),
  }),
  v.transform(({ max_age: maxAgeMs, when_stale: whenStale, ...rest }) => ({
    ...rest,
    /** Inputs that nobody refreshed for longer are stale. */
    maxAgeMs,
    /** What an ADD does with stale inputs. */
    whenStale,
  })),
);
const listen = text('an address and a port such as "127.0.0.1:9477", or ""', (value) => {
  const { port } = parseListen(value) ?? { port: -1 };
  return value === "" || (port >= 0 && port <= 65_535);
});
/** Parts of `127.0.0.1:9477` or `[::1]:9477`; undefined for what is neither. */
export function parseListen(value: string): { hostname: string; port: number } | undefined {
  const [, six, four, digits] =
    /^(?:\[([0-9a-f:.]+)\]|([0-9]+(?:\.[0-9]+){3}|localhost)):(\d{1,5})$/i.exec(value) ?? [];
  const hostname = six ?? four;
  return hostname === undefined ? undefined : { hostname, port: Number(digits) };
}
const Agent = v.pipe(
  table({
    listen: v.optional(listen, "127.0.0.1:9477"),
    report: v.optional(toggle, false),
    cri_socket: v.exactOptional(path),
    follow_annotations: v.optional(toggle, false),
  }),
  v.transform(({ cri_socket: criSocket, follow_annotations: followAnnotations, ...rest }) => ({
    ...rest,
    followAnnotations,
    ...(criSocket && { criSocket }),
  })),
);
/** How to reach the Kubernetes API; the optional fields come from the CNI config alone. */
export interface KubernetesConfig extends v.InferOutput<typeof Kubernetes> {
  /** Line of `namespace_isolation`, where the table switches it on. */
  isolationLine?: number;
  /** URL without a trailing slash. */
  apiRoot?: string;
  /** A secret: never in a message. */
  authToken?: string;
  /** Absolute paths of PEM files, these three. */
  clientCertificate?: string;
  clientKey?: string;
  certificateAuthority?: string;
}

/** The top-level keys that DEL needs, see parseTopLevel of config.ts. */
export const topLevel = {
  state_dir: v.optional(path, "/var/lib/cni/genie"),
  log_level: v.optional(oneOf(...logLevels), "info"),
  log_file: v.optional(pathOrNone, ""),
  del_retry_window: v.optional(duration("7d"), "10m"),
};
/** Schema of the whole table; entries of `plugins` are checked one by one, by {@link Plugin}. */
export const Table = v.pipe(
  table({
    ...topLevel,
    conf_dir: v.optional(path, "/etc/cni/net.d"),
    bin_dirs: list(path, "/opt/cni/bin"),
    result: v.optional(oneOf("merged", "primary"), "merged"),
    timeout: v.optional(duration("1h"), "90s"),
    parallel: v.optional(toggle, false),
    default: v.optional(Default, {}),
    select: v.optional(
      table({
        /** Absent: every entry of `plugins`. */
        candidates: v.exactOptional(v.array(network, "a list")),
        weights: v.optional(Weights, {}),
        attempts: v.optional(
          v.pipe(count, v.minValue(1, "1 or more"), v.maxValue(8, "at most 8")),
          2,
        ),
      }),
      {},
    ),
    kubernetes: v.optional(Kubernetes, {}),
    access: v.optional(Access, {}),
    policy: v.optional(Policy, {}),
    agent: v.optional(Agent, {}),
    audit: v.optional(table({ keep: v.optional(duration("3650d"), "30d") }), {}),
    plugins: v.optional(v.custom<object>(isTable, "a table"), {}),
  }),
  v.transform((keys) => ({
    confDir: keys.conf_dir,
    /** Searched after CNI_PATH. */
    binDirs: keys.bin_dirs,
    stateDir: keys.state_dir,
    logLevel: keys.log_level,
    /** "" for none. */
    logFile: keys.log_file,
    result: keys.result,
    /** Limit of a whole ADD. */
    timeoutMs: keys.timeout,
    parallel: keys.parallel,
    delRetryWindowMs: keys.del_retry_window,
    /** `networks` and `always` hold names, or "name@interface". */
    default: keys.default,
    select: keys.select,
    access: keys.access,
    policy: keys.policy,
    agent: keys.agent,
    audit: { keepMs: keys.audit.keep },
    kubernetes: keys.kubernetes,
    plugins: keys.plugins,
  })),
);
/** Networks that a Multus config names for every pod. */
export interface MultusNetworks {
  /** Namespace in which names are looked up as NetworkAttachmentDefinitions first. */
  namespace: string;
  /** The default network: an object's name, a CNI name, a folder or a file; "" for `delegates`. */
  clusterNetwork: string;
  /** Further networks of every pod outside the system namespaces, named likewise. */
  defaultNetworks: string[];
}

/** Everything an operator configures, after defaults. */
export interface Config
  extends Omit<v.InferOutput<typeof Table>, "plugins" | "kubernetes" | "access"> {
  /** Path of the plugin table, for messages; "" when there is none. */
  file: string;
  access: AccessTable;
  kubernetes: KubernetesConfig;
  /** By name, in the order of the table. */
  plugins: ReadonlyMap<string, PluginEntry>;
  /** Networks of every pod, where the CNI config was written for Multus. */
  multus?: MultusNetworks;
  /** A file that must exist before pods are attached; only from a Multus config. */
  readinessFile?: string;
}

/** What an unknown key was meant to be: the nearest of `known`, or a key of the top of the file. */
function suggestion(key: string, known: object): string {
  const [near] = Object.keys(known)
    .map((name) => ({ name, edits: editDistance(key.slice(0, 40), name) }))
    .sort((a, b) => a.edits - b.edits);
  if (near && near.edits <= Math.max(2, key.length / 3)) return `, did you mean "${near.name}"`;
  return Object.hasOwn(topLevel, key) ? ": it belongs above the first [table]" : "";
}
