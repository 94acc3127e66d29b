/**
 * The plan of one ADD: which networks, on which interfaces, through which binaries, and why.
 * Reads the plugin table, the pod and the config lists; runs nothing and writes nothing, so that
 * `genie plan` shows exactly what ADD would do. Source: design §3, D3, D8.
 */
import { readFileSync, statSync } from "node:fs";
import { isAbsolute } from "node:path";
import { checkAccess } from "./access.ts";
import {
  attachmentsMax,
  parseElements,
  parseSelection,
  type SelectionElement,
} from "./annotations.ts";
import {
  CniError,
  code,
  type Host,
  logLevels,
  oneLine,
  type Request,
  type StdinConfig,
} from "./cni.ts";
import {
  type Config,
  defaultConfig,
  parseConfig,
  parseTopLevel,
  pluginsFileDefault,
} from "./config.ts";
import { withStdinConfig } from "./genie_conf.ts";
import {
  delegatesToOurself,
  findPlugins,
  listNetworks,
  type Network,
  type PluginSearch,
  readSmallFile,
  resolveNetwork,
} from "./networks.ts";
import { delegateArgs, lookupPod, type Pod } from "./pod.ts";
import type { Attachment } from "./state.ts";

/** What an ADD will do, in the order it will do it: the primary attachment first. */
export interface Plan {
  pod: Pod;
  attachments: Attachment[];
}

/** Path of the plugin table, and whether someone named it. @throws CniError 7 for a bad path */
function tableFile(stdin: StdinConfig): { path: string; explicit: boolean } {
  const path = stdin["plugins_file"];
  if (path === undefined) return { path: pluginsFileDefault, explicit: false };
  if (typeof path === "string" && isAbsolute(path)) return { path, explicit: true };
  throw new CniError(
    code.invalidConfig,
    'Invalid network config: "plugins_file" is not an absolute path',
  );
}

/**
 * Loads the configuration: the plugin table where there is one, with the CNI config's own keys
 * over it.
 * @throws CniError 7 for a table that is wrong, or that was named and is missing
 */
export function loadConfig(stdin: StdinConfig): Config {
  const { path, explicit } = tableFile(stdin);
  if (!explicit && !statSync(path, { throwIfNoEntry: false })) {
    return withStdinConfig(defaultConfig(), stdin);
  }
  let text: string;
  try {
    text = readSmallFile(path);
  } catch (error) {
    if (error instanceof CniError) throw error;
    const reason = (error as NodeJS.ErrnoException).code;
    throw new CniError(code.invalidConfig, `Cannot read plugin table ${path}: ${reason}`, {
      cause: error,
    });
  }
  return withStdinConfig(parseConfig(text, path), stdin);
}

/** What DEL, CHECK and GC need to know of the node, readable however broken the table is. */
export interface NodeSettings {
  stateDir: string;
  delRetryWindowMs: number;
}

/**
 * Reads the settings that need no valid table, and puts the log settings into `host`. Never fails:
 * a DEL must work with a table that became wrong after ADD.
 */
export function loadNodeSettings(host: Host, stdin: StdinConfig): NodeSettings {
  const defaults = defaultConfig();
  let text = "";
  try {
    text = readFileSync(tableFile(stdin).path, "utf8");
  } catch (error) {
    const absent = (error as NodeJS.ErrnoException).code === "ENOENT";
    if (!absent)
      host.stderr(`genie: warn: Cannot read plugin table: ${oneLine(String(error), 200)}\n`);
  }
  const top = { ...defaults, ...parseTopLevel(text) };
  const named = logLevels.find((level) => level === stdin["log_level"]);
  host.log = { level: named ?? top.logLevel, file: top.logFile };
  return { stateDir: top.stateDir, delRetryWindowMs: top.delRetryWindowMs };
}

/** Where this call looks for plugin binaries. */
export function pluginSearch(config: Config, request: Request): PluginSearch {
  return { dirs: [...request.path, ...config.binDirs], ownType: request.config.type };
}

/** One network of the plan before its config is resolved. */
interface Wanted extends SelectionElement {
  reason: string;
}

/**
 * Plans an ADD.
 *
 * @throws CniError 7 for malformed annotations or configs, 11 when the pod cannot be looked up,
 *   100 when the pod may not use a network, 101 for an unknown network, 102 for a missing plugin,
 *   105 when interface names clash
 */
export async function makePlan(host: Host, config: Config, request: Request): Promise<Plan> {
  const pod = await lookupPod(host, config, request);
  const search = pluginSearch(config, request);
  const primarySet = selectPrimarySet(config, pod, search);
  const always = selectAlways(config, pod, primarySet);
  const named = nameInterfaces(primarySet, always, request.ifName);
  const cniArgs = delegateArgs(request.args);
  const attachments = named.map(({ network: name, ifName, reason }): Attachment => {
    const network = resolveNetwork(config, name);
    checkMayUse(config, network, pod);
    const primary = ifName === request.ifName;
    return {
      containerId: request.containerId,
      requestIfName: request.ifName,
      requestNetwork: request.config.name,
      ifName,
      primary,
      network: name,
      reason,
      list: network.list,
      plugins: findPlugins(network, search),
      cniArgs,
      cniPath: search.dirs.join(":"),
      // NPWG v1.3 §7.5: what the runtime offers belongs to the primary alone.
      capabilityArgs: primary ? (request.config.runtimeConfig ?? {}) : {},
      args: request.config.args ?? {},
      timeoutMs: network.entry?.timeoutMs ?? config.timeoutMs,
      netns: request.netns,
      pod: { namespace: pod.namespace, name: pod.name, uid: pod.uid },
    };
  });
  return { pod, attachments };
}

function checkMayUse(config: Config, network: Network, pod: Pod): void {
  const verdict = checkAccess(config, network.entry?.name ?? network.name, pod);
  if (verdict.allowed) return;
  throw new CniError(
    code.accessDenied,
    `Access to network "${network.name}" denied for pod ${podLabel(pod)}: ${verdict.reason}`,
    { details: verdict.rule ?? "" },
  );
}

/** Pod as people know it. */
export function podLabel({ namespace, name }: { namespace: string; name: string }): string {
  if (name === "") return "(unnamed)";
  return namespace === "" ? name : `${namespace}/${name}`;
}

function selectPrimarySet(config: Config, pod: Pod, search: PluginSearch): Wanted[] {
  const selection = parseSelection(pod.annotations);
  switch (selection.kind) {
    case "networks":
      return selection.elements.map((element) => ({ ...element, reason: `asked for by cni` }));
    case "logical":
      throw new CniError(
        code.invalidConfig,
        'Unsupported annotation "networks": logical networks need the Kubernetes API',
      );
    case "default":
      if (config.default.networks.length > 0) {
        return config.default.networks.flatMap((text) =>
          parseElements(text, "default.networks").map((element) => ({
            ...element,
            reason: "default network",
          })),
        );
      }
      return [chooseNetwork(config, search)];
    case "choose":
      return [chooseNetwork(config, search)];
  }
}

/** The choice when it is ours: the only candidate there is. */
function chooseNetwork(config: Config, search: PluginSearch): Wanted {
  const candidates = candidateNetworks(config, search);
  const [only] = candidates;
  if (only && candidates.length === 1) return { network: only, reason: "the only candidate" };
  if (!only) {
    throw new CniError(
      code.networkNotFound,
      `Cannot choose a network: neither the plugin table nor ${config.confDir} offers one`,
    );
  }
  throw new CniError(
    code.invalidConfig,
    `Cannot choose among ${candidates.join(", ")}: set default.networks in the plugin table, or ` +
      'annotate the pod with cni: "<name>"',
  );
}

/** Names of the networks that may be chosen (`select.candidates`, else the table, else the disk). */
export function candidateNetworks(config: Config, search: PluginSearch): string[] {
  if (config.select.candidates) return config.select.candidates;
  const tableOnly = config.plugins.size > 0;
  return listNetworks(config)
    .networks.filter((network) => network.entry || !tableOnly)
    .filter((network) => !delegatesToOurself(network, search))
    .map(({ name }) => name);
}

/** `default.always`: for every pod outside the system namespaces, unless it has them anyway. */
function selectAlways(config: Config, pod: Pod, primarySet: Wanted[]): Wanted[] {
  if (config.default.systemNamespaces.includes(pod.namespace)) return [];
  return config.default.always
    .flatMap((text) => parseElements(text, "default.always"))
    .filter(({ network }) => !primarySet.some((wanted) => wanted.network === network))
    .map((element) => ({ ...element, reason: "attached to every pod" }));
}

/**
 * Fixes every interface name, before anything runs (design D3). Named ones keep theirs; the first
 * unnamed of the primary set gets CNI_IFNAME when nobody asked for it, the others eth0, eth1 ...;
 * further attachments net1, net2 ... as Multus names them. The one with CNI_IFNAME comes first.
 *
 * @throws CniError 105 when two want one name, 7 when CNI_IFNAME stays unused or there are too many
 */
export function nameInterfaces<T extends SelectionElement>(
  primarySet: T[],
  further: T[],
  requestIfName: string,
): (T & { ifName: string })[] {
  const all = [...primarySet, ...further];
  if (all.length > attachmentsMax) {
    throw new CniError(
      code.invalidConfig,
      `Cannot attach ${all.length} networks to one pod: at most ${attachmentsMax} are allowed`,
    );
  }
  const taken = new Map<string, string>();
  for (const { ifName, network } of all) {
    if (ifName === undefined) continue;
    const other = taken.get(ifName);
    if (other !== undefined) throw clash(ifName, other, network);
    taken.set(ifName, network);
  }
  const next = (names: Iterator<string>, network: string): string => {
    for (;;) {
      const name: string = names.next().value;
      if (taken.has(name)) continue;
      taken.set(name, network);
      return name;
    }
  };
  const primaryNames = ethernetNames(requestIfName);
  const furtherNames = numbered("net", 1);
  const named = [
    ...primarySet.map((one) => ({ ...one, ifName: one.ifName ?? next(primaryNames, one.network) })),
    ...further.map((one) => ({ ...one, ifName: one.ifName ?? next(furtherNames, one.network) })),
  ];
  if (!named.some(({ ifName }) => ifName === requestIfName)) {
    throw new CniError(
      code.invalidConfig,
      `Cannot attach ${named.map(({ network, ifName }) => `${network}@${ifName}`).join(",")}: one ` +
        `of them must have interface ${requestIfName}, leave one name out`,
    );
  }
  return named.sort(
    (a, b) => Number(b.ifName === requestIfName) - Number(a.ifName === requestIfName),
  );
}

function* ethernetNames(first: string): Generator<string, never> {
  yield first;
  return yield* numbered("eth", 0);
}

function* numbered(prefix: string, from: number): Generator<string, never> {
  for (let i = from; ; i++) yield `${prefix}${i}`;
}

function clash(ifName: string, one: string, other: string): CniError {
  return new CniError(
    code.interfaceConflict,
    `Interface name "${ifName}" is wanted by network "${one}" and by network "${other}": ` +
      "give one of them another name",
  );
}
