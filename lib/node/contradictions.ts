/**
 * What rules of access say against themselves: each is valid alone, together they leave pods
 * without a network, or a rule without effect. Pure. Source: design D9.
 */
import { matchGlob } from "../access.ts";
import type { Config, PluginEntry, Rule } from "../config/schema.ts";
import { knownPlugins } from "../kubernetes/nad_access.ts";

/** One contradiction, about a network where it is about one. */
export interface Contradiction {
  network?: string;
  detail: string;
}

/** Every contradiction, in the order of the table. */
export function findContradictions(config: Config): Contradiction[] {
  return [
    ...[...config.plugins.values()].flatMap((entry) => closedByDeny(config, entry)),
    ...closedDefaults(config),
    ...nothingOpen(config),
    ...smallQuotas(config),
    ...uselessRules(config),
  ];
}

const kinds = ["namespaces", "pods", "serviceAccounts"] as const;

/** True when every pattern of `rule` is covered by one of the same list of `other`. */
function isCovered(rule: Rule, other: Rule): boolean {
  const patterns = kinds.flatMap((kind) => rule[kind].map((pattern) => ({ kind, pattern })));
  return (
    patterns.length > 0 &&
    patterns.every(({ kind, pattern }) => {
      const [namespace = ""] = pattern.split("/");
      return (
        other.namespaces.some((one) => covers(one, namespace)) ||
        other[kind].some((one) => coversAll(one.split("/"), pattern.split("/")))
      );
    })
  );
}

function coversAll(wide: string[], narrow: string[]): boolean {
  return wide.length === narrow.length && wide.every((one, i) => covers(one, narrow[i] ?? ""));
}

/** Whether all that `narrow` matches `wide` matches too; "?" is too fine a thing to tell. */
function covers(wide: string, narrow: string): boolean {
  return wide === narrow || (!wide.includes("?") && matchGlob(wide, narrow));
}

function closedByDeny({ file }: Config, { name, allow, deny }: PluginEntry): Contradiction[] {
  if (!allow || !deny || !isCovered(allow, deny)) return [];
  const detail =
    `plugins.${name}.deny at ${file}:${deny.line} names all that plugins.${name}.allow at ` +
    `${file}:${allow.line} opens it to: nobody may use it`;
  return [{ network: name, detail }];
}

/** Why nobody may use a network; undefined where somebody may. */
function closedToAll({ access, file }: Config, entry: PluginEntry | undefined): string | undefined {
  const { name = "", allow, deny } = entry ?? {};
  if (deny?.namespaces.some((pattern) => /^\*+$/.test(pattern))) {
    return `plugins.${name}.deny at ${file}:${deny.line} names every pod`;
  }
  if (allow && kinds.every((kind) => allow[kind].length === 0)) {
    return `plugins.${name}.allow at ${file}:${allow.line} names nobody`;
  }
  if (!allow && access.default === "deny") return 'access.default is "deny" and no rule allows it';
  return undefined;
}

/** Networks that pods get unasked, and that nobody may use. */
function closedDefaults(config: Config): Contradiction[] {
  const { networks, always } = config.default;
  const named = [
    ...networks.map((one) => ({ key: "default.networks", one })),
    ...always.filter((one) => !one.includes("/")).map((one) => ({ key: "default.always", one })),
  ];
  return named.flatMap(({ key, one }) => {
    const network = one.replace(/@.*/, "");
    const why = closedToAll(config, config.plugins.get(network));
    if (why === undefined) return [];
    return [{ network, detail: `named by ${key}, and nobody may use it: ${why}` }];
  });
}

function nothingOpen({ access, plugins }: Config): Contradiction[] {
  const isOpen = [...plugins.values()].some(({ allow }) => allow !== undefined);
  if (access.default === "allow" || isOpen || (access.nad ?? []).length > 0) return [];
  return [
    { detail: 'access.default is "deny" and no rule allows anything: no pod gets a network' },
  ];
}

function smallQuotas({ access: { maxAttachments }, default: given, file }: Config) {
  if (!maxAttachments) return [];
  const { pod, namespace, line } = maxAttachments;
  const place = `access.max_attachments at ${file}:${line}`;
  const unasked = given.networks.length + given.always.length;
  return [
    ...[pod, namespace].flatMap((max) =>
      max !== undefined && max < unasked
        ? [{ detail: `${place} is ${max}, and a pod that asks for nothing gets ${unasked}` }]
        : [],
    ),
    ...(pod !== undefined && namespace !== undefined && namespace < pod
      ? [{ detail: `${place}: no pod can have ${pod} while its namespace may have ${namespace}` }]
      : []),
  ];
}

/** Rules that admit no object because `masters` cannot be held against any of their types. */
function uselessRules({ access: { nad = [] }, file }: Config): Contradiction[] {
  return nad.flatMap(({ masters, types, line }, i) => {
    const isKnown = (type: string) => knownPlugins.some((known) => matchGlob(type, known));
    if (!masters || !types || types.some(isKnown)) return [];
    const detail =
      `access.nad[${i}] at ${file}:${line} admits nothing: of none of its types is it known ` +
      "what device they take, so masters cannot be held against them";
    return [{ detail }];
  });
}
