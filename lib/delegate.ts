/**
 * One request to one delegate: its configuration, its environment, its ending.
 * Source: CNI SPEC 1.1 §3 (request configuration), §4 (delegation).
 */
import type { Chain, PluginCall } from "./call.ts";
import { type CniError, compareVersions, log } from "./cni.ts";
import { run } from "./exec.ts";
import { isObject } from "./json.ts";
import { noteNetwork, notePlugin } from "./ledger.ts";
import { tokenVariable } from "./lock.ts";
import type { NetworkConfigList, PluginConfig } from "./networks.ts";
import type { Attachment, Result } from "./record.ts";
import { toVersion } from "./result.ts";

/** What varies per call. */
export interface RequestConfigOptions {
  /** Wire form of the previous plugin's result (ADD) or of the whole ADD (CHECK, DEL). */
  prevResult?: object | undefined;
  /** What the runtime offered, by capability name. */
  capabilityArgs?: Record<string, unknown>;
  /** Keys for `args`; they win over the config's own, key by key. */
  args?: Record<string, unknown>;
  /** Further reserved keys, e.g. `cni.dev/valid-attachments`. */
  reserved?: Record<string, unknown>;
}

/**
 * Derives the request config of one delegate. Keys reserved by the SPEC (`runtimeConfig`,
 * `prevResult`, `cni.dev/*`) are ours to set, so those of the stored config are dropped;
 * `capabilities` "must not be set" in a request, though libcni keeps it.
 *
 * @see CNI SPEC 1.1 §3 "Deriving request configuration from plugin configuration"
 */
export function requestConfig(
  list: NetworkConfigList,
  plugin: PluginConfig,
  { prevResult, capabilityArgs = {}, args = {}, reserved = {} }: RequestConfigOptions = {},
): PluginConfig {
  const { capabilities, runtimeConfig: _, prevResult: __, ...config } = plugin;
  for (const key of Object.keys(config)) if (key.startsWith("cni.dev/")) delete config[key];
  config["cniVersion"] = list.cniVersion;
  config["name"] = list.name;
  const declared = isObject(capabilities) ? capabilities : {};
  let offered: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(capabilityArgs)) {
    if (Object.hasOwn(declared, name) && declared[name] === true) {
      offered = { ...offered, [name]: value };
    }
  }
  if (Object.keys(offered).length > 0) config["runtimeConfig"] = offered;
  if (Object.keys(args).length > 0) {
    config["args"] = mergeArgs(isObject(plugin["args"]) ? plugin["args"] : {}, args);
  }
  return { ...config, ...(prevResult && { prevResult }), ...reserved };
}

/** Objects are merged once more: a pod's `args.cni` keys win (NPWG v1.3 §4.1.2.1.6.2). */
function mergeArgs(
  own: Record<string, unknown>,
  given: Record<string, unknown>,
): Record<string, unknown> {
  const merged = Object.entries(given).map(([key, value]) => {
    const before = Object.hasOwn(own, key) ? own[key] : undefined;
    return [key, isObject(before) && isObject(value) ? { ...before, ...value } : value];
  });
  return { ...own, ...Object.fromEntries(merged) };
}

/**
 * Runs one plugin of a chain and returns what it printed.
 * @throws CniError that says what its ending means
 */
export async function callPlugin(
  chain: Chain,
  attachment: Attachment,
  { command, index, result, reserved = {} }: PluginCall,
): Promise<string> {
  const { host, journal, signal } = chain;
  const { list, capabilityArgs, args } = attachment;
  const plugin = list.plugins[index];
  const path = attachment.plugins[index];
  if (!plugin || !path) throw new Error(`plan of network ${attachment.network} is incomplete`);
  const takesResult = command === "ADD" || compareVersions(list.cniVersion, "0.4.0") >= 0;
  const prevResult = result && takesResult ? toVersion(result, list.cniVersion) : undefined;
  const config = requestConfig(list, plugin, { prevResult, capabilityArgs, args, reserved });
  const ending = await run(path, [], {
    env: delegateEnv(chain, attachment, command),
    stdin: JSON.stringify(config),
    timeoutMs: Math.max(1, Math.min(attachment.timeoutMs, chain.deadlineMs - host.now())),
    signal,
  });
  // SPEC §4: what a delegate says on stderr belongs to our own.
  const said = ending.stderr;
  if (said !== "") host.stderr(host.relay?.(plugin.type, said) ?? said);
  let error: CniError | undefined;
  if (ending.kind !== "exit" || ending.status !== 0) {
    const { endingError } = await import("./recovery/delegate_error.ts");
    error = endingError(ending, attachment, plugin, command);
  }
  const { durationUs } = ending;
  if (command !== "STATUS") {
    notePlugin(journal, plugin.type, { ...attachment, command, durationUs, error });
  }
  if (error) throw error;
  log(host, "debug", `${command} done`, {
    network: attachment.network,
    plugin: plugin.type,
    interface: attachment.ifName,
    us: Math.round(durationUs),
  });
  return ending.stdout;
}

/** The environment of a delegate: ours, with every CNI variable set anew (SPEC §4). */
function delegateEnv(
  { host, token, netns }: Chain,
  attachment: Attachment,
  command: string,
): Record<string, string> {
  const env: Record<string, string> = {};
  for (const [name, value] of Object.entries(host.env)) {
    if (value !== undefined && !name.startsWith("CNI_")) env[name] = value;
  }
  env["CNI_COMMAND"] = command;
  env["CNI_PATH"] = attachment.cniPath;
  env[tokenVariable] = token;
  // STATUS and GC concern no attachment (SPEC §2), so they carry none.
  if (attachment.containerId === "") return env;
  env["CNI_CONTAINERID"] = attachment.containerId;
  env["CNI_NETNS"] = netns;
  env["CNI_IFNAME"] = attachment.ifName;
  env["CNI_ARGS"] = attachment.cniArgs;
  return env;
}

/** Starts the clock for a whole chain; what it returns notes the chain in the journal. */
export function noter({ journal }: Chain, attachment: Attachment, command: string) {
  const startedNs = Bun.nanoseconds();
  return (error: unknown, result?: Result): void => {
    const durationUs = (Bun.nanoseconds() - startedNs) / 1000;
    const addresses = result?.ips.map(({ address }) => address) ?? [];
    noteNetwork(journal, { ...attachment, command, durationUs, error }, addresses);
  };
}
