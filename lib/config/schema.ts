/**
 * The schema of the plugin table `plugins.toml`: every key, default and limit. Pure. A name ends
 * with its unit. A schema's message is what was expected; parse.ts makes the sentence around it.
 */
import * as v from "valibot";
import { interfaceNameIssue, isNetworkName, logLevels } from "../cni.ts";
import { editDistance, isTable } from "./toml.ts";
import { parseDuration } from "./usage.ts";

const kubeconfigDefault = "/etc/cni/genie/kubeconfig";

/** Refuses unknown keys. The check: strictObject would take a list or a date for an empty table. */
function strictTable<const T extends v.ObjectEntries>(entries: T) {
  const strict = v.strictObject(entries, (issue) => suggestion(`${issue.input}`, entries));
  return v.pipe(v.unknown(), v.check(isTable, "a table"), strict);
}

const durations = ["timeout", "max_age", "del_retry_window", "keep"] as const;
type Duration = (typeof durations)[number];
type Camel<K> = K extends `${infer A}_${infer B}` ? `${A}${Capitalize<Camel<B>>}` : K;
type Name<K> = K extends Duration ? `${Camel<K>}Ms` : Camel<K>;
type Named<T> = { [K in keyof T as Name<K>]: T[K] };

/** A strict table whose keys become names of our code: `max_age` is `maxAgeMs`. */
function table<const T extends v.ObjectEntries>(entries: T) {
  const nameOf = (key: string) =>
    key.replace(/_./g, (pair) => pair.slice(1).toUpperCase()) +
    (durations.some((one) => one === key) ? "Ms" : "");
  return v.pipe(
    strictTable(entries),
    v.transform((keys) => {
      const renamed = Object.entries(keys).map(([key, value]) => [nameOf(key), value]);
      return Object.fromEntries(renamed) as Named<typeof keys>;
    }),
  );
}

function text(expected: string, test: (value: string) => boolean) {
  return v.pipe(v.string(expected), v.check(test, expected));
}

function pattern(expected: string, test: RegExp) {
  return text(expected, (value) => test.test(value));
}

function globs(expected: string, test: RegExp) {
  return pattern(`${expected}, "*" and "?" being wildcards`, test);
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
const fileName = pattern("a file name or an absolute path", /^(\/|(?![^/]*\/))[^\p{Cc}]+$/u);
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
const namespace = pattern("the name of a namespace", /^[a-z0-9.-]{1,253}$/);
// A glob that cannot match any Kubernetes name ("team_*", "[ab]") is a mistake, and in a deny rule
// it would leave the network open.
const glob = globs("a namespace", /^[a-z0-9.*?-]{1,253}$/);
const namespacedGlob = globs('"namespace/name"', /^[a-z0-9.*?-]{1,253}\/[a-z0-9.*?-]{1,253}$/);

/** Who a rule names. Its lists are OR-ed; `serviceAccounts` and `pods` are "namespace/name". */
const Rule = table({
  namespaces: list(glob),
  service_accounts: list(namespacedGlob),
  pods: list(namespacedGlob),
});
/** A rule, with its line in the table. */
export type Rule = v.InferOutput<typeof Rule> & { line: number };

function some<T extends v.GenericSchema>(item: T) {
  return v.pipe(v.array(item, "a list"), v.minLength(1, "a list with something in it"));
}

const pluginTypes = some(globs("the type of a plugin", /^[A-Za-z0-9_.*?-]{1,64}$/));
/**
 * What NetworkAttachmentDefinitions of some namespaces may be: all its keys must hold. An absent
 * key says nothing; an empty list would admit nobody, and is refused as a mistake.
 */
const NadRule = table({
  namespaces: v.optional(some(glob), []),
  types: v.exactOptional(pluginTypes),
  ipams: v.exactOptional(pluginTypes),
  masters: v.exactOptional(some(globs("the name of a device", /^[!-.0-9;-~]{1,15}$/))),
  config_on_disk: v.optional(toggle, false),
});
const positive = v.pipe(count, v.minValue(1, "1 or more"));
const quota = v.exactOptional(positive);
const Access = table({
  /** What holds for a network without an allow rule. */
  default: v.optional(oneOf("allow", "deny"), "allow"),
  /** Absent: NetworkAttachmentDefinitions may be anything. */
  nad: v.exactOptional(v.array(NadRule, "a list")),
  /** How many attachments a pod may have, and the pods of a namespace on this node. */
  max_attachments: v.exactOptional(table({ pod: quota, namespace: quota })),
});
type Access = v.InferOutput<typeof Access>;
/** Who may use what, beside the rules of the plugins; with its lines in the table. */
export interface AccessTable extends Omit<Access, "nad" | "maxAttachments"> {
  /** Line of `default`, where it is "deny". */
  line?: number;
  nad?: (v.InferOutput<typeof NadRule> & { line: number })[];
  maxAttachments?: Required<Access>["maxAttachments"] & { line: number };
}

/** Schema of one `[plugins.NAME]`. */
export const Plugin = table({
  /** File of a config list: a file name in `confDir`, or an absolute path. */
  conf: v.exactOptional(fileName),
  config: v.exactOptional(v.custom<object>(isTable, "a table")),
  allow: v.exactOptional(Rule),
  deny: v.exactOptional(Rule),
  /** Limit of each call of a delegate. */
  timeout: v.exactOptional(duration("1h")),
  /** Addresses the network has, where its IPAM cannot be read. */
  capacity: v.exactOptional(positive),
  /** Its first plugin gives a container one interface, whatever its name. */
  one_interface: v.exactOptional(toggle),
  /** Genie enforces plain NetworkPolicy on it: its own plugin does not. */
  enforce_policy: v.exactOptional(toggle),
});
type PluginTable = Omit<v.InferOutput<typeof Plugin>, "config" | "allow" | "deny">;
/** One `[plugins.NAME]`. Without `conf` and `config`: a list in `confDir` by that name. */
export interface PluginEntry extends PluginTable {
  name: string;
  /** A config list written in the table: JSON data, not checked yet; `name` may be missing. */
  config?: Record<string, unknown>;
  allow?: Rule;
  deny?: Rule;
  /** Line of its `[plugins.NAME]` header, or else of its first key. */
  line: number;
}

const Weights = strictTable({
  occupancy: v.optional(weight, 4),
  response_time: v.optional(weight, 3),
  failures: v.optional(weight, 2),
  bandwidth: v.optional(weight, 1),
  subnets: v.optional(weight, 0),
});
const Default = table({
  networks: list(attachment),
  always: list(always),
  system_namespaces: list(namespace, "kube-system"),
});
const Kubernetes = v.pipe(
  table({
    kubeconfig: v.exactOptional(path),
    timeout: v.optional(duration("5m"), "5s"),
    namespace_isolation: v.optional(toggle, false),
    global_namespaces: list(namespace, "default"),
    status: v.optional(oneOf("inline", "agent", "off"), "inline"),
    /** Root folder of the kubelet: its pod-resources socket tells a pod's devices. */
    kubelet_dir: v.optional(path, "/var/lib/kubelet"),
  }),
  v.transform(({ kubeconfig, ...rest }) => ({
    ...rest,
    kubeconfig: kubeconfig ?? kubeconfigDefault,
    /** True when someone named the file: then it must exist. */
    kubeconfigIsExplicit: kubeconfig !== undefined,
  })),
);
const Policy = table({
  enforce: v.optional(toggle, false),
  /** Inputs that nobody refreshed for longer are stale. */
  max_age: v.optional(duration("1d"), "5m"),
  /** What an ADD does with stale inputs. */
  when_stale: v.optional(oneOf("closed", "open"), "closed"),
  where: v.optional(oneOf("pod", "host"), "pod"),
});
const listen = text('an address and a port such as "127.0.0.1:9477", or ""', (value) => {
  return value === "" || (parseListen(value)?.port ?? Infinity) <= 65_535;
});
/** Parts of `127.0.0.1:9477` or `[::1]:9477`; undefined for what is neither. */
export function parseListen(value: string): { hostname: string; port: number } | undefined {
  const [, six, four, digits] =
    /^(?:\[([0-9a-f:.]+)\]|([0-9]+(?:\.[0-9]+){3}|localhost)):(\d{1,5})$/i.exec(value) ?? [];
  const hostname = six ?? four;
  return hostname === undefined ? undefined : { hostname, port: Number(digits) };
}
const Agent = table({
  listen: v.optional(listen, "127.0.0.1:9477"),
  report: v.optional(toggle, false),
  cri_socket: v.exactOptional(path),
  follow_annotations: v.optional(toggle, false),
});
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

/** The top-level keys that DEL needs, see parseTopLevel of parse.ts. */
export const topLevel = {
  state_dir: v.optional(path, "/var/lib/cni/genie"),
  log_level: v.optional(oneOf(...logLevels), "info"),
  /** "" for none. */
  log_file: v.optional(pathOrNone, ""),
  del_retry_window: v.optional(duration("7d"), "10m"),
};
/** Schema of the whole table; entries of `plugins` are checked one by one, by {@link Plugin}. */
export const Table = table({
  ...topLevel,
  conf_dir: v.optional(path, "/etc/cni/net.d"),
  /** Searched after CNI_PATH. */
  bin_dirs: list(path, "/opt/cni/bin"),
  result: v.optional(oneOf("merged", "primary"), "merged"),
  /** Limit of a whole ADD. */
  timeout: v.optional(duration("1h"), "90s"),
  parallel: v.optional(toggle, false),
  /** `networks` and `always` hold names, or "name@interface". */
  default: v.optional(Default, {}),
  select: v.optional(
    table({
      /** Absent: every entry of `plugins`. */
      candidates: v.exactOptional(v.array(network, "a list")),
      weights: v.optional(Weights, {}),
      attempts: v.optional(v.pipe(positive, v.maxValue(8, "at most 8")), 2),
    }),
    {},
  ),
  kubernetes: v.optional(Kubernetes, {}),
  access: v.optional(Access, {}),
  policy: v.optional(Policy, {}),
  agent: v.optional(Agent, {}),
  audit: v.optional(table({ keep: v.optional(duration("3650d"), "30d") }), {}),
  plugins: v.optional(v.custom<object>(isTable, "a table"), {}),
});
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
