/**
 * What a NetworkAttachmentDefinition may be, by the namespace that it stands in: `access.nad`.
 * Whoever may write such an object writes a config that is run as root on the node. Judged is the
 * config as it would be run, by everything in it that names a program or a device. Pure, and closed
 * when in doubt. Source: design D9; the plugins' own documentation for their keys.
 */
import { type Decision, matchGlob } from "../access.ts";

/** One rule: all its keys must hold. An absent key says nothing. Glob patterns. */
export interface NadRule {
  /** Of the object, not of the pod. */
  namespaces: readonly string[];
  /** Every plugin of the chain, and those that a plugin of it delegates to. */
  types?: readonly string[];
  /** Plugins that give addresses; absent while `types` is there: {@link ipamsDefault}. */
  ipams?: readonly string[];
  /** Devices of the node on which an interface is made, or which are moved into the pod. */
  masters?: readonly string[];
  /** The config must stand on the node's disk, the object has no `spec.config`. */
  configOnDisk: boolean;
  /** Line of the rule in the plugin table. */
  line: number;
}

/** A NetworkAttachmentDefinition as the gate sees it. */
export interface Definition {
  namespace: string;
  onDisk: boolean;
  /** The plugins of its chain as they would be run. */
  plugins: readonly Record<string, unknown>[];
}

/** Address plugins that make no interface: a rule with `types` need not name them. */
export const ipamsDefault = ["host-local", "static", "dhcp", "whereabouts"];

/**
 * Decides whether a definition may be what it is. Without rules everything is allowed; with some,
 * one of them must admit it.
 *
 * @param file path of the plugin table, for {@link Decision.rule}
 */
export function checkDefinition(
  rules: readonly NadRule[] | undefined,
  file: string,
  definition: Definition,
): Decision {
  if (!rules) return { allowed: true, reason: "no rule of access.nad limits it" };
  const inScope = rules.flatMap((rule, index) => {
    const pattern = rule.namespaces.find((one) => matchGlob(one, definition.namespace));
    return pattern === undefined ? [] : [{ rule, pattern, name: `access.nad[${index}]` }];
  });
  if (inScope.length === 0) {
    const reason = `no rule of access.nad names namespace "${definition.namespace}"`;
    return { allowed: false, reason, rule: `access.nad at ${file}:${rules[0]?.line ?? 1}` };
  }
  const judged = inScope.map((one) => ({ ...one, issue: issueOf(one.rule, definition) }));
  const admitting = judged.find(({ issue }) => issue === undefined);
  if (admitting) {
    const { name, pattern, rule } = admitting;
    const reason = `${name}.namespaces "${pattern}" names it, and it keeps to that rule`;
    return { allowed: true, reason, rule: `${name} at ${file}:${rule.line}` };
  }
  return {
    allowed: false,
    reason: judged.map(({ name, issue }) => `${name}${issue}`).join("; "),
    rule: judged.map(({ name, rule }) => `${name} at ${file}:${rule.line}`).join("; "),
  };
}

/** What a definition does that a rule does not admit; continues the name of the rule. */
function issueOf(rule: NadRule, { onDisk, plugins }: Definition): string | undefined {
  if (rule.configOnDisk && !onDisk) {
    return ".config_on_disk wants its config on the node's disk, and it has a spec.config";
  }
  const run = plugins.flatMap((plugin) => programsOf(plugin));
  return firstOf(run, (one) => {
    if (one.kind === "ipam") {
      const ipams = rule.ipams ?? (rule.types && ipamsDefault);
      return !ipams || covers(ipams, one.type)
        ? undefined
        : `.ipams does not have "${one.type}", with which it gets addresses`;
    }
    if (rule.types && !covers(rule.types, one.type)) {
      return `.types does not have its plugin "${one.type}"`;
    }
    return rule.masters && masterIssue(rule.masters, one);
  });
}

/** A program that would run for a chain, with the config it reads. */
type Program =
  | { kind: "plugin"; type: string; config: Record<string, unknown> }
  | { kind: "ipam"; type: string };

/** A delegate nested deeper is not a config anybody needs. */
const nestingMax = 4;

/**
 * Everything that runs for one plugin of a chain: itself, its address plugin, what it delegates to.
 * A type that is no text is told as such: no pattern covers it.
 */
function programsOf(config: Record<string, unknown>, depth = 0): Program[] {
  const delegates = [...valuesOf(config, "delegate"), ...valuesOf(config, "delegates").flat()];
  const ipams = valuesOf(config, "ipam").flatMap((ipam) =>
    isRecord(ipam) ? valuesOf(ipam, "type") : [],
  );
  const own = valuesOf(config, "type").map(
    (type): Program => ({ kind: "plugin", type: asText(type), config }),
  );
  const addresses = ipams
    .filter((type) => type !== "" && type !== null)
    .map((type): Program => ({ kind: "ipam", type: asText(type) }));
  const below = delegates
    .filter((one) => isRecord(one))
    .flatMap((one): Program[] =>
      depth < nestingMax
        ? programsOf(one, depth + 1)
        : [{ kind: "plugin", type: "(nested too deep)", config: one }],
    );
  return [...own, ...addresses, ...below];
}

/** Which key of a plugin names the device, and which others would as well. */
interface ParentKeys {
  key: string;
  /** What the plugin takes where the key is absent; undefined where that is not known. */
  initial?: string;
  /** Other keys that name a device, in ways that no pattern of names covers. */
  others?: readonly string[];
}

/** Plugins that take a device of the node. */
const parents: Record<string, ParentKeys> = {
  bridge: { key: "bridge", initial: "cni0" },
  macvlan: { key: "master" },
  ipvlan: { key: "master" },
  vlan: { key: "master" },
  "host-device": { key: "device", others: ["hwaddr", "kernelpath", "pcibusid", "deviceid"] },
  ovs: { key: "bridge" },
};

/** Plugins that take none. */
const parentless = new Set([
  ...["ptp", "loopback", "dummy", "portmap", "bandwidth", "firewall", "sbr", "tuning", "vrf"],
]);

/** Types of plugins of which it is known what device they take, or that they take none. */
export const knownPlugins: readonly string[] = [...Object.keys(parents), ...parentless];

/** The key under which a plugin of this type names its device, where it takes one. */
export function parentKeyOf(type: string): string | undefined {
  return Object.hasOwn(parents, type) ? parents[type]?.key : undefined;
}

function masterIssue(
  masters: readonly string[],
  { type, config }: { type: string; config: Record<string, unknown> },
): string | undefined {
  if (parentless.has(type)) return undefined;
  const parent = Object.hasOwn(parents, type) ? parents[type] : undefined;
  if (!parent) return `.masters cannot be held against plugin "${type}": its device is not known`;
  const { key, initial, others = [] } = parent;
  const places = [config, ...valuesOf(config, "runtimeconfig").filter((one) => isRecord(one))];
  const other = others.find((one) =>
    places.some((place) => valuesOf(place, one).some((value) => value !== "")),
  );
  if (other !== undefined) {
    return `.masters cannot be held against "${other}" of plugin "${type}", which names a device`;
  }
  const found = valuesOf(config, key).filter((value) => value !== "");
  if (found.length === 0 && initial === undefined) {
    return `.masters wants "${key}" of plugin "${type}", which is absent`;
  }
  return firstOf(found.length === 0 ? [initial] : found, (value) =>
    covers(masters, asText(value))
      ? undefined
      : `.masters does not have device "${asText(value)}" of plugin "${type}"`,
  );
}

/**
 * Every value of a key however it is written: plugins in Go read `Master` and `MASTER` as `master`,
 * also with the two letters that Unicode folds into ASCII.
 */
function valuesOf(config: Record<string, unknown>, key: string): unknown[] {
  return Object.entries(config)
    .filter(([name]) => fold(name) === key)
    .map(([, value]) => value);
}

function fold(name: string): string {
  return name.toUpperCase().toLowerCase();
}

function covers(patterns: readonly string[], text: string): boolean {
  return patterns.some((pattern) => matchGlob(pattern, text));
}

/** A value for a pattern and a message: what is no text no name can be. */
function asText(value: unknown): string {
  return typeof value === "string" ? value : `(${value === null ? "null" : typeof value})`;
}

function firstOf<T>(items: readonly T[], find: (item: T) => string | undefined) {
  for (const item of items) {
    const found = find(item);
    if (found !== undefined) return found;
  }
  return undefined;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
