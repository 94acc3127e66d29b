/**
 * The rules of the plugin table about access: may a pod have a network (`allow`, `deny`,
 * `access.default`), and which NetworkAttachmentDefinitions may a namespace have (`access.nad`)?
 * Whoever may write such an object writes a config that runs as root on the node, so a rule sees
 * the final config and checks every key that names a binary or a device. Closed when in doubt.
 * Pure. Source: design D9; NPWG v1.3 §7.4; the plugins' own documentation for their keys.
 */
import type { Config, Rule } from "../config/schema.ts";
import { isObject } from "../json.ts";
import type { Pod } from "../pod.ts";

/** Who asks. A field that is "" or undefined is unknown; outside Kubernetes all are. */
export type AccessPod = Partial<Pick<Pod, "namespace" | "name" | "serviceAccount">>;

/** The answer of {@link checkAccess} and {@link checkDefinition}. */
export interface AccessDecision {
  allowed: boolean;
  /** A clause for an error message: what allows it or stands against it. */
  reason: string;
  /** The rule that decided, as in `plugins.storage.allow at /etc/cni/genie/plugins.toml:12`. */
  rule?: string;
  /** Set when the pod's service account would decide and is not known. */
  needsServiceAccount?: true;
}

/**
 * Decides whether a pod may use a network. A matching deny rule wins. Then an allow rule opens the
 * network to whom it names and closes it to all others; without one `access.default` holds. What
 * is unknown matches no pattern: a pod without namespace passes no allow rule. A rule that hangs on
 * a service account that a pod of Kubernetes has, but that we do not know, denies.
 * @param network name of the network, as in the plugin table
 */
export function checkAccess(
  config: Pick<Config, "file" | "access" | "plugins">,
  network: string,
  pod: AccessPod,
): AccessDecision {
  const { allow, deny } = config.plugins.get(network) ?? {};
  const decide = (allowed: boolean, kind: "allow" | "deny", match: Match, line: number) => ({
    allowed,
    reason: `plugins.${network}.${kind}${match.text}`,
    rule: `plugins.${network}.${kind} at ${config.file}:${line}`,
    ...(match.kind === "unknown" && { needsServiceAccount: true as const }),
  });
  if (deny) {
    const match = matchRule(deny, pod);
    if (match.kind !== "no") return decide(false, "deny", match, deny.line);
  }
  if (allow) {
    const match = matchRule(allow, pod);
    return decide(match.kind === "yes", "allow", match, allow.line);
  }
  return config.access.default === "allow"
    ? { allowed: true, reason: 'access.default is "allow" and no rule speaks against it' }
    : {
        allowed: false,
        reason: 'access.default is "deny" and no rule allows it',
        rule: `access.default at ${config.file}:${config.access.line ?? 1}`,
      };
}

/** Whether a rule names a pod; `text` continues the name of the rule. */
type Match = { kind: "yes" | "no" | "unknown"; text: string };

function matchRule({ namespaces, pods, serviceAccounts }: Rule, pod: AccessPod): Match {
  const { namespace = "", name = "", serviceAccount = "" } = pod;
  const isAccount = (pattern: string) => matchNamespaced(pattern, namespace, serviceAccount);
  const matches = {
    namespaces: namespaces.find((pattern) => matchGlob(pattern, namespace)),
    pods: pods.find((pattern) => matchNamespaced(pattern, namespace, name)),
    service_accounts: serviceAccounts.find(isAccount),
  };
  for (const [list, pattern] of Object.entries(matches)) {
    if (pattern !== undefined) return { kind: "yes", text: `.${list} "${pattern}" names it` };
  }
  const open = serviceAccounts.find(
    // Unknown, and the pattern names some account of the pod's namespace.
    (pattern) => serviceAccount === "" && matchGlob(pattern.split("/")[0] ?? "", namespace),
  );
  if (open === undefined) return { kind: "no", text: ` does not name ${describePod(pod)}` };
  const text = `.service_accounts "${open}" needs the service account of ${describePod(pod)}`;
  return { kind: "unknown", text: `${text}, which is not known` };
}

function describePod({ namespace = "", name = "", serviceAccount = "" }: AccessPod): string {
  if (namespace === "") return "a pod without namespace";
  const account = serviceAccount === "" ? "" : ` of service account "${serviceAccount}"`;
  return `pod "${namespace}/${name}"${account}`;
}

function matchNamespaced(pattern: string, namespace: string, name: string): boolean {
  const [namespacePattern = "", namePattern = "", ...more] = pattern.split("/");
  if (more.length > 0) return false;
  return matchGlob(namespacePattern, namespace) && matchGlob(namePattern, name);
}

/**
 * True when `pattern` covers all of `text`: `*` is any run of characters, `?` any one.
 * An unknown text, "", is covered by nothing. What stands between two `*` is taken where it comes
 * first: the steps are at most pattern × text, both bounded by the config and by Kubernetes.
 */
export function matchGlob(pattern: string, text: string): boolean {
  const [head = "", ...parts] = pattern.split("*");
  const isAt = (part: string, at: number) =>
    at + part.length <= text.length &&
    part.split("").every((char, i) => char === "?" || char === text[at + i]);
  const tail = parts.pop();
  if (text === "" || !isAt(head, 0)) return false;
  if (tail === undefined) return head.length === text.length;
  let at = head.length;
  for (const part of parts) {
    while (!isAt(part, at)) if (++at > text.length) return false;
    at += part.length;
  }
  return at + tail.length <= text.length && isAt(tail, text.length - tail.length);
}

/**
 * One rule of `access.nad`: all its keys must hold, an absent key limits nothing. Lists hold glob
 * patterns: `namespaces` of the object, not of the pod; `types` for every plugin of the chain and
 * those it delegates to; `ipams` for IPAM plugins, {@link ipamsDefault} when only `types` is given;
 * `masters` for devices of the node on which an interface is made, or which are moved into the pod.
 */
export type NadRule = NonNullable<Config["access"]["nad"]>[number];

/** The facts of a NetworkAttachmentDefinition that rules check. */
export interface Definition {
  namespace: string;
  onDisk: boolean;
  /** The plugins of its chain as they will run. */
  plugins: readonly Record<string, unknown>[];
}

/** IPAM plugins that make no interface: a rule with `types` need not name them. */
export const ipamsDefault = ["host-local", "static", "dhcp", "whereabouts"];

/**
 * Decides whether a definition is allowed. Without rules every one is; with some, one of them must
 * admit it.
 * @param file path of the plugin table, for {@link AccessDecision.rule}
 */
export function checkDefinition(
  rules: readonly NadRule[] | undefined,
  file: string,
  definition: Definition,
): AccessDecision {
  if (!rules) return { allowed: true, reason: "no rule of access.nad limits it" };
  const checked = rules.flatMap((rule, index) => {
    const pattern = rule.namespaces.find((one) => matchGlob(one, definition.namespace));
    if (pattern === undefined) return [];
    const name = `access.nad[${index}]`;
    const issue = issueOf(rule, definition);
    return [{ name, pattern, issue, rule: `${name} at ${file}:${rule.line}` }];
  });
  if (checked.length === 0) {
    const reason = `no rule of access.nad names namespace "${definition.namespace}"`;
    return { allowed: false, reason, rule: `access.nad at ${file}:${rules[0]?.line ?? 1}` };
  }
  const admitting = checked.find(({ issue }) => issue === undefined);
  if (admitting) {
    const { name, pattern, rule } = admitting;
    const reason = `${name}.namespaces "${pattern}" names it, and it keeps to that rule`;
    return { allowed: true, reason, rule };
  }
  return {
    allowed: false,
    reason: checked.map(({ name, issue }) => `${name}${issue}`).join("; "),
    rule: checked.map(({ rule }) => rule).join("; "),
  };
}

/** Why a rule does not admit a definition, as the continuation of its name. */
function issueOf(rule: NadRule, { onDisk, plugins }: Definition): string | undefined {
  if (rule.configOnDisk && !onDisk) {
    return ".config_on_disk wants its config on the node's disk, and it has a spec.config";
  }
  const { types, masters, ipams = types && ipamsDefault } = rule;
  for (const program of plugins.flatMap((plugin) => programsOf(plugin))) {
    const { kind, type } = program;
    if (kind === "ipam") {
      if (!ipams || covers(ipams, type)) continue;
      return `.ipams does not have "${type}", with which it gets addresses`;
    }
    if (types && !covers(types, type)) return `.types does not have its plugin "${type}"`;
    const issue = masters && masterIssue(masters, program);
    if (issue !== undefined) return issue;
  }
  return undefined;
}

/** A program that would run for a chain, and the plugin config that names it. */
interface Program {
  kind: "plugin" | "ipam";
  type: string;
  config: Record<string, unknown>;
}

/** No useful config nests delegates deeper. */
const nestingMax = 4;

/** Everything that runs for one plugin of a chain: itself, its IPAM plugin, its delegates. */
function programsOf(config: Record<string, unknown>, depth = 0): Program[] {
  if (depth > nestingMax) return [{ kind: "plugin", type: "(nested too deep)", config }];
  const programs = (kind: Program["kind"], types: unknown[]) =>
    types.map((type) => ({ kind, type: asText(type), config }));
  const ipams = valuesOf(config, "ipam").filter(isObject);
  const ipamTypes = ipams.flatMap((ipam) => valuesOf(ipam, "type"));
  const isGiven = (type: unknown) => type !== "" && type !== null;
  const delegates = [...valuesOf(config, "delegate"), ...valuesOf(config, "delegates").flat()];
  return [
    ...programs("plugin", valuesOf(config, "type")),
    ...programs("ipam", ipamTypes.filter(isGiven)),
    ...delegates.filter(isObject).flatMap((one) => programsOf(one, depth + 1)),
  ];
}

/**
 * Plugins that take a device of the node: the key of its name, the `initial` one without that key,
 * and `others`, keys that name a device by something that no pattern of names covers.
 */
export const devicePlugins = new Map<string, { key: string; initial?: string; others?: string[] }>([
  ["bridge", { key: "bridge", initial: "cni0" }],
  ["macvlan", { key: "master" }],
  ["ipvlan", { key: "master" }],
  ["vlan", { key: "master" }],
  ["host-device", { key: "device", others: ["hwaddr", "kernelpath", "pcibusid", "deviceid"] }],
  ["ovs", { key: "bridge" }],
]);

/** Plugins that take none. */
const parentless = "ptp loopback dummy portmap bandwidth firewall sbr tuning vrf".split(" ");

/** Types of plugins whose devices we know, or of which we know that they take none. */
export const knownPlugins: readonly string[] = [...devicePlugins.keys(), ...parentless];

function masterIssue(masters: readonly string[], { type, config }: Program): string | undefined {
  if (parentless.includes(type)) return undefined;
  const parent = devicePlugins.get(type);
  if (!parent) return `.masters cannot be held against plugin "${type}": its device is not known`;
  const { key, initial, others = [] } = parent;
  const configs = [config, ...valuesOf(config, "runtimeconfig").filter(isObject)];
  const other = others.find((one) =>
    configs.some((place) => valuesOf(place, one).some((value) => value !== "")),
  );
  if (other !== undefined) {
    return `.masters cannot be held against "${other}" of plugin "${type}", which names a device`;
  }
  const found = valuesOf(config, key).filter((value) => value !== "");
  if (found.length === 0 && initial === undefined) {
    return `.masters wants "${key}" of plugin "${type}", which is absent`;
  }
  const names = (found.length === 0 ? [initial] : found).map(asText);
  const denied = names.find((name) => !covers(masters, name));
  return denied === undefined
    ? undefined
    : `.masters does not have device "${denied}" of plugin "${type}"`;
}

/**
 * Every value of a key in any case: plugins in Go read `Master` and `MASTER` as `master`, also with
 * the two letters that Unicode folds into ASCII, hence upper case first.
 */
function valuesOf(config: Record<string, unknown>, key: string): unknown[] {
  return Object.entries(config)
    .filter(([name]) => name.toUpperCase().toLowerCase() === key)
    .map(([, value]) => value);
}

function covers(patterns: readonly string[], text: string): boolean {
  return patterns.some((pattern) => matchGlob(pattern, text));
}

/** A value as a name; no pattern covers what is not text. */
function asText(value: unknown): string {
  return typeof value === "string" ? value : `(${value === null ? "null" : typeof value})`;
}
