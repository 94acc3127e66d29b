/**
 * `genie validate`: checks the plugin table, every config list and the plugin binaries, without a
 * pod; and finds rules of access that contradict each other (design D9).
 */
import { findPlugin, findPlugins, pluginSearch } from "../binaries.ts";
import type { Host, StdinConfig } from "../call.ts";
import { CniError, code, toCniError } from "../cni.ts";
import type { Config, PluginEntry, Rule } from "../config/schema.ts";
import { type Flags, text } from "../config/usage.ts";
import { isObject } from "../json.ts";
import { findAccount, readSecrets } from "../kubernetes/kubeconfig.ts";
import { type Network, resolveNetwork } from "../networks.ts";
import { listNetworks } from "../node_networks.ts";
import { knownPlugins, matchGlob } from "../policy/access_rules.ts";
import {
  oneInterfacePlugins,
  oneInterfaceTypes,
  rivalOf,
  typesOf,
} from "../recovery/plugin_keys.ts";
import { orUndefined } from "../recovery/tried.ts";
import { formatTable } from "../report/table.ts";
import { readPath } from "../request.ts";
import { isConfigured, loadConfig } from "../settings.ts";
import { readOwnConfig } from "./genie_config.ts";
import { askCniVersions, missingAgent } from "./node_view.ts";
import { askedPath } from "./runtimes.ts";

/** What is to be said of a network, or of the whole table where `network` is "-". */
interface NetworkFinding {
  network: string;
  verdict: "ok" | "problem";
  detail: string;
}

const problem = (detail: string, network = "-"): NetworkFinding => {
  return { network, verdict: "problem", detail };
};

/**
 * Runs `genie validate`. @returns exit status: 1 when there is a problem
 * @param width columns of the terminal, Infinity for none
 * @throws CniError 5-7 for a config or a table that cannot be read
 */
export async function runValidate(host: Host, flags: Flags, width: number): Promise<number> {
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const config = await loadConfig(stdin);
  const missing = missingAgent(config, host.now());
  const findings = [
    ...(missing === undefined ? [] : [problem(missing)]),
    ...(await checkCredentials(host, config)),
    ...(await validate(host, config, stdin)),
  ];
  const isWell = !findings.some(({ verdict }) => verdict === "problem");
  const table = config.file || "none, every config list in the conf dir is a network";
  const columns = [{ title: "NETWORK" }, { title: "VERDICT" }, { title: "DETAIL", wraps: true }];
  const rows = findings.map(({ network, verdict, detail }) => [network, verdict, detail]);
  host.stdout(
    flags["json"]
      ? `${JSON.stringify({ table: config.file, ok: isWell, findings }, null, 2)}\n`
      : `Plugin table: ${table}\n\n${formatTable(columns, rows, width)}`,
  );
  return isWell ? 0 : 1;
}

/** Could the credentials for the API be used, as far as the node alone tells? */
async function checkCredentials(host: Host, { kubernetes }: Config): Promise<NetworkFinding[]> {
  if (!isConfigured(host, kubernetes)) return [];
  try {
    const account = findAccount(host, kubernetes);
    // An exec plugin may ask others, so it is not run.
    if (!account.plugin) await readSecrets(account);
    return account.warning ? [{ network: "-", verdict: "ok", detail: account.warning }] : [];
  } catch (error) {
    return [problem(toCniError(error).message)];
  }
}

async function validate(host: Host, config: Config, stdin: StdinConfig): Promise<NetworkFinding[]> {
  const path = [...readPath(host.env), ...askedPath(config)];
  const search = pluginSearch(config, { path, config: stdin });
  const { networks, problems } = listNetworks(config);
  const findings: NetworkFinding[] = [];
  const own = oneInterfaceTypes(config);
  const versions = new Map<string, Promise<unknown[] | undefined>>();
  for (const network of networks) {
    const { name, list, entry, source } = network;
    const types = list.plugins.map(({ type }) => type);
    if (types.includes("genie") && !entry) continue;
    try {
      findPlugins(network, search);
      checkIpam(network, [...new Set(search.dirs)]);
      await checkVersions(network, search.dirs, versions);
      const once = oneInterfacePlugins(list, own).map(
        (plugin) => `; plugin "${plugin}" gives a container one interface`,
      );
      const detail = `${types.join(", ")} (CNI ${list.cniVersion}) from ${source}${once.join("")}`;
      findings.push({ network: name, verdict: "ok", detail });
    } catch (error) {
      findings.push(problem(toCniError(error).message, name));
    }
  }
  findings.push(...problems.map(({ message }) => problem(message)), ...findContradictions(config));
  findings.push(...sharedDefaults(config));
  const named = {
    "default.networks": config.default.networks,
    "default.always": config.default.always,
    "select.candidates": config.select.candidates ?? [],
  };
  for (const [key, names] of Object.entries(named)) {
    for (const name of onNode(names)) {
      try {
        resolveNetwork(config, name);
      } catch (error) {
        findings.push(problem(`named by ${key}: ${toCniError(error).message}`, name));
      }
    }
  }
  return findings;
}

/** Networks of the node; one with a namespace is an object of the API, which is not asked. */
function onNode(names: readonly string[]): string[] {
  return names.filter((one) => !one.includes("/")).map((one) => one.replace(/@.*/, ""));
}

/** Checks that the IPAM plugins, which interface plugins call, are there. @throws CniError 102 */
function checkIpam(network: Network, dirs: string[]): void {
  for (const { type, ipam } of network.list.plugins) {
    const ipamType = isObject(ipam) ? ipam["type"] : undefined;
    if (typeof ipamType !== "string" || ipamType === "" || findPlugin(ipamType, dirs)) continue;
    const what = `IPAM plugin "${ipamType}" of plugin "${type}" is in none of ${dirs.join(", ")}`;
    throw new CniError(code.delegateNotFound, `Cannot attach network "${network.name}": ${what}`);
  }
}

/**
 * Asks the plugins of a network, each once, whether they know the version of its list.
 * @throws CniError 1 for the first that does not: it would refuse ADD and DEL alike
 */
async function checkVersions(
  { name, list, source }: Network,
  dirs: string[],
  asked: Map<string, Promise<unknown[] | undefined>>,
): Promise<void> {
  for (const type of typesOf(list)) {
    const path = findPlugin(type, dirs);
    if (path === undefined) continue;
    const answer = asked.get(path) ?? askCniVersions(path);
    asked.set(path, answer);
    const spoken = await answer;
    if (!spoken || spoken.includes(list.cniVersion)) continue;
    const what = `plugin "${type}" does not know CNI ${list.cniVersion}, which ${source} asks for`;
    const remedy = `set cniVersion to ${spoken.at(-1)}, or install a newer ${type}`;
    const message = `Cannot attach network "${name}": ${what}: ${remedy}`;
    throw new CniError(code.incompatibleVersion, message);
  }
}

/** Networks that every pod gets, of a plugin that gives a container one interface. */
function sharedDefaults(config: Config): NetworkFinding[] {
  const names = onNode([...config.default.networks, ...config.default.always]);
  const all = names.flatMap((name) => orUndefined(() => resolveNetwork(config, name)) ?? []);
  return all.flatMap((one, i) => {
    const rival = rivalOf(one, all.slice(0, i), oneInterfaceTypes(config));
    if (!rival) return [];
    const why = `plugin "${rival.plugin}" gives a container one interface`;
    return [
      problem(`every pod gets it beside network "${rival.other.name}", and ${why}`, one.name),
    ];
  });
}

/** Rules that are valid alone, but together leave pods without a network or have no effect. */
export function findContradictions(config: Config): NetworkFinding[] {
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
  const covered = kinds.flatMap((kind) =>
    rule[kind].map((pattern) => {
      const [namespace = ""] = pattern.split("/");
      return (
        other.namespaces.some((one) => covers(one, namespace)) ||
        other[kind].some((one) => covers(one, pattern))
      );
    }),
  );
  return covered.length > 0 && covered.every(Boolean);
}

/** Does `wide` match all that `narrow` does, word by word? A "?" is taken to match itself alone. */
function covers(wide: string, narrow: string): boolean {
  const [words, others] = [wide.split("/"), narrow.split("/")];
  const coversWord = (word: string, other = "") =>
    word === other || (!word.includes("?") && matchGlob(word, other));
  return words.length === others.length && words.every((word, i) => coversWord(word, others[i]));
}

function closedByDeny({ file }: Config, { name, allow, deny }: PluginEntry): NetworkFinding[] {
  if (!allow || !deny || !isCovered(allow, deny)) return [];
  const detail =
    `plugins.${name}.deny at ${file}:${deny.line} names all that plugins.${name}.allow at ` +
    `${file}:${allow.line} opens it to: nobody may use it`;
  return [problem(detail, name)];
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

/** Networks that pods get without asking, but that nobody may use. */
function closedDefaults(config: Config): NetworkFinding[] {
  const { networks, always } = config.default;
  const closed = (key: string, names: string[]) =>
    onNode(names).flatMap((network) => {
      const why = closedToAll(config, config.plugins.get(network));
      if (why === undefined) return [];
      return [problem(`named by ${key}, and nobody may use it: ${why}`, network)];
    });
  return [...closed("default.networks", networks), ...closed("default.always", always)];
}

function nothingOpen({ access, plugins }: Config): NetworkFinding[] {
  const isOpen = [...plugins.values()].some(({ allow }) => allow !== undefined);
  if (access.default === "allow" || isOpen || (access.nad ?? []).length > 0) return [];
  return [problem('access.default is "deny" and no rule allows anything: no pod gets a network')];
}

function smallQuotas({ access, default: given, file }: Config): NetworkFinding[] {
  if (!access.maxAttachments) return [];
  const { pod, namespace, line } = access.maxAttachments;
  const place = `access.max_attachments at ${file}:${line}`;
  const unasked = given.networks.length + given.always.length;
  const details = [pod, namespace]
    .filter((max) => max !== undefined && max < unasked)
    .map((max) => `${place} is ${max}, and a pod that asks for nothing gets ${unasked}`);
  if (pod !== undefined && namespace !== undefined && namespace < pod) {
    details.push(`${place}: no pod can have ${pod} while its namespace may have ${namespace}`);
  }
  return details.map((detail) => problem(detail));
}

/** Rules that admit no object, because `masters` cannot be compared for any of their types. */
function uselessRules({ access: { nad = [] }, file }: Config): NetworkFinding[] {
  return nad.flatMap(({ masters, types, line }, i) => {
    const isKnown = (type: string) => knownPlugins.some((known) => matchGlob(type, known));
    if (!masters || !types || types.some(isKnown)) return [];
    const detail =
      `access.nad[${i}] at ${file}:${line} admits nothing: of none of its types is it known ` +
      "what device they take, so masters cannot be held against them";
    return [problem(detail)];
  });
}
