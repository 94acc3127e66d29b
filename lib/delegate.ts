/**
 * One attachment through its chain of plugins: ADD and CHECK forward, DEL in reverse. Derives what
 * each delegate gets, runs it, and turns every ending into a result or a CniError.
 * Source: CNI SPEC 1.1 §3 (chains), §4 (delegation); libcni for what the SPEC leaves open.
 */
import { type CniError, compareVersions, type Host, log, toCniError } from "./cni.ts";
import { endingError, protocolError } from "./ending.ts";
import { run } from "./exec.ts";
import { isObject, parseJson } from "./json.ts";
import { type Journal, noteNetwork, notePlugin } from "./ledger.ts";
import { tokenVariable } from "./lock.ts";
import { type NetworkConfigList, type PluginConfig, requestConfig } from "./netconf.ts";
import { netnsId } from "./netns.ts";
import { normalizeResult, type Result, toVersion } from "./result.ts";
import { parseResult } from "./result_wire.ts";
import type { Attachment } from "./state.ts";
import { oneLine } from "./text.ts";

/** What a chain needs besides the attachment. */
export interface ChainOptions {
  /** CNI_NETNS for the delegates; "" when it is gone. */
  netns: string;
  /** Marks the delegates of this operation in their environment, so that orphans can be found. */
  token: string;
  /** When the whole operation must have ended, ms since the epoch. */
  deadlineMs: number;
  /** Ends the running delegate when it aborts. */
  signal?: AbortSignal;
  /** Takes a row for every request to a plugin, and for every network. */
  journal?: Journal;
}

/** How an ADD through a chain ended. */
export type Added =
  | { kind: "attached"; result: Result }
  /** `undo` holds the errors of its own undoing: empty when nothing of it is left. */
  | { kind: "failed"; error: CniError; undo: CniError[] };

/**
 * Runs ADD through the chain. When plugin k fails, DEL runs on k, k-1 ... 0 before this returns
 * (CNI SPEC 1.1 §4), in its own time: an ADD whose time is over must still be undone.
 *
 * @returns the result with the pod's interface always in it, or the original error, with the
 *   delegate's own code, or 102-104, or 11 when it was ended from outside
 */
export async function addChain(
  host: Host,
  attachment: Attachment,
  options: ChainOptions,
): Promise<Added> {
  const { list, ifName } = attachment;
  const note = noter(attachment, "ADD", options);
  let result: Result | undefined;
  for (const index of list.plugins.keys()) {
    try {
      result = await addOne(host, attachment, index, options, result);
    } catch (error) {
      note(error);
      const undo = await delChain(host, attachment, result, undoOptions(host, options), index);
      return { kind: "failed", error: toCniError(error), undo };
    }
  }
  if (!result) throw new Error(`network ${attachment.network} has no plugins`);
  note(undefined, result);
  return { kind: "attached", result: normalizeResult(result, { ifName, netns: options.netns }) };
}

/** Notes a whole chain in the journal, with the time since this was called. */
function noter(attachment: Attachment, command: string, { journal }: ChainOptions) {
  const startedNs = Bun.nanoseconds();
  return (error: unknown, result?: Result): void => {
    const durationUs = (Bun.nanoseconds() - startedNs) / 1000;
    const addresses = result?.ips.map(({ address }) => address) ?? [];
    noteNetwork(journal, { ...attachment, command, durationUs, error }, addresses);
  };
}

/** Limit for undoing one attachment, in ms. */
const undoTimeoutMs = 30_000;

/** Undoing has a deadline of its own, and is not ended by the signal that may have caused it. */
export function undoOptions(host: Host, options: ChainOptions): ChainOptions {
  return {
    netns: options.netns,
    token: options.token,
    deadlineMs: host.now() + undoTimeoutMs,
    ...(options.journal && { journal: options.journal }),
  };
}

async function addOne(
  host: Host,
  attachment: Attachment,
  index: number,
  options: ChainOptions,
  previous: Result | undefined,
): Promise<Result> {
  const { list, network } = attachment;
  const { stdout, plugin } = await call(host, attachment, index, "ADD", options, previous);
  if (stdout.trim() === "") throw protocolError(attachment, plugin, "it printed no result", "");
  const value = decode(stdout, attachment, plugin);
  if (isObject(value) && typeof value["code"] === "number" && "msg" in value) {
    throw protocolError(attachment, plugin, "it printed an error but exited with status 0", stdout);
  }
  const what = `result of plugin "${plugin.type}" of network "${network}"`;
  const result = parseResult(value, list.cniVersion, what);
  checkOwnInterface(result, attachment, plugin);
  return result;
}

/** A delegate that reports only other pod interfaces did not do what it was asked. */
function checkOwnInterface(result: Result, attachment: Attachment, plugin: PluginConfig): void {
  const inPod = result.interfaces.filter(({ sandbox }) => sandbox !== undefined && sandbox !== "");
  if (inPod.length === 0 || inPod.some(({ name }) => name === attachment.ifName)) return;
  throw protocolError(
    attachment,
    plugin,
    `it reports interface "${oneLine(inPod[0]?.name ?? "", 40)}" instead of "${attachment.ifName}"`,
    "",
  );
}

function decode(stdout: string, attachment: Attachment, plugin: PluginConfig): unknown {
  try {
    return parseJson(stdout, "its output");
  } catch (error) {
    throw protocolError(attachment, plugin, toCniError(error).message, stdout);
  }
}

/**
 * Runs DEL through the whole chain in reverse, each plugin with the final result (SPEC §3).
 * Goes on after a failure.
 *
 * @param last index of the plugin to begin with: the one that failed in ADD, else the last
 * @returns the errors, in the order they happened; empty when everything is undone
 */
export async function delChain(
  host: Host,
  attachment: Attachment,
  result: Result | undefined,
  options: ChainOptions,
  last: number = attachment.list.plugins.length - 1,
): Promise<CniError[]> {
  const { list } = attachment;
  const note = noter(attachment, "DEL", options);
  const isGone = netnsId(options.netns) === "";
  const errors: CniError[] = [];
  for (let index = last; index >= 0; index--) {
    const isUndone = isGone && insideOnly.has(list.plugins[index]?.type ?? "");
    // Of a path that leads to nothing sbr makes a file, on which those before it would fail.
    const given = isUndone ? { ...options, netns: "" } : options;
    try {
      await call(host, attachment, index, "DEL", given, result);
    } catch (error) {
      if (!isUndone) errors.push(toCniError(error));
    }
  }
  note(errors[0]);
  if (attachment.deviceInfoFile !== undefined && errors.length === 0) {
    (await import("./kubernetes/device_info.ts")).removeDeviceInfo(host, attachment.deviceInfoFile);
  }
  return errors;
}

/**
 * Plugins that change nothing outside the pod's namespace, and some of which fail without it (sbr):
 * with the namespace gone, so is all they did.
 */
const insideOnly = new Set(["sbr", "tuning", "loopback"]);

/**
 * Runs CHECK through the chain, unless the list turns it off or is older than CHECK.
 * @throws CniError of the first plugin that says no
 */
export async function checkChain(
  host: Host,
  attachment: Attachment,
  result: Result | undefined,
  options: ChainOptions,
): Promise<void> {
  const { list } = attachment;
  if (list.disableCheck || compareVersions(list.cniVersion, "0.4.0") < 0) return;
  const note = noter(attachment, "CHECK", options);
  try {
    for (const index of list.plugins.keys()) {
      await call(host, attachment, index, "CHECK", options, result);
    }
  } catch (error) {
    note(error);
    throw error;
  }
  note(undefined);
}

/** A network as STATUS and GC see it: no container, no interface. */
export interface NetworkCall {
  network: string;
  list: NetworkConfigList;
  plugins: string[];
  cniPath: string;
  timeoutMs: number;
}

/**
 * Asks the plugins of a network whether an ADD could work now. Lists older than STATUS are passed.
 * @throws CniError of the first plugin that says no, with its code
 */
export async function statusChain(
  host: Host,
  network: NetworkCall,
  options: ChainOptions,
): Promise<void> {
  if (compareVersions(network.list.cniVersion, "1.1.0") < 0) return;
  for (const index of network.list.plugins.keys()) {
    await call(host, nobody(network), index, "STATUS", options, undefined);
  }
}

/** One attachment that is still valid, by the names we gave its delegates. */
export interface ValidAttachment {
  containerID: string;
  ifname: string;
}

/**
 * Runs GC on the plugins of a network with that network's own attachments. Goes on after a failure.
 * @returns the errors
 * @see CNI SPEC 1.1 §2 "GC"; the second key is what libcni sends for older plugins
 */
export async function gcChain(
  host: Host,
  network: NetworkCall,
  valid: ValidAttachment[],
  options: ChainOptions,
): Promise<CniError[]> {
  const { list } = network;
  if (list.disableGC || compareVersions(list.cniVersion, "1.1.0") < 0) return [];
  const reserved = { "cni.dev/valid-attachments": valid, "cni.dev/attachments": valid };
  const note = noter(nobody(network), "GC", options);
  const errors: CniError[] = [];
  for (const index of list.plugins.keys()) {
    try {
      await call(host, nobody(network), index, "GC", options, undefined, reserved);
    } catch (error) {
      errors.push(toCniError(error));
    }
  }
  note(errors[0]);
  return errors;
}

function nobody(network: NetworkCall): Attachment {
  return {
    ...network,
    containerId: "",
    requestIfName: "",
    requestNetwork: "",
    ifName: "",
    primary: false,
    reason: "",
    cniArgs: "",
    capabilityArgs: {},
    args: {},
    netns: "",
    pod: { namespace: "", name: "", uid: "" },
  };
}

/** Runs one plugin of the chain and returns what it printed, or throws what its ending means. */
async function call(
  host: Host,
  attachment: Attachment,
  index: number,
  command: "ADD" | "DEL" | "CHECK" | "GC" | "STATUS",
  options: ChainOptions,
  result: Result | undefined,
  reserved: Record<string, unknown> = {},
): Promise<{ stdout: string; plugin: PluginConfig }> {
  const { list } = attachment;
  const plugin = list.plugins[index];
  const path = attachment.plugins[index];
  if (!plugin || !path) throw new Error(`plan of network ${attachment.network} is incomplete`);
  const hasResult =
    result !== undefined && (command === "ADD" || compareVersions(list.cniVersion, "0.4.0") >= 0);
  const config = requestConfig(list, plugin, {
    ...(hasResult && { prevResult: toVersion(result, list.cniVersion) }),
    capabilityArgs: attachment.capabilityArgs,
    args: attachment.args,
    reserved,
  });
  const ending = await run(path, [], {
    env: delegateEnv(host, attachment, command, options),
    stdin: JSON.stringify(config),
    timeoutMs: Math.max(1, Math.min(attachment.timeoutMs, options.deadlineMs - host.now())),
    ...(options.signal && { signal: options.signal }),
  });
  // SPEC §4: what a delegate says on stderr belongs to our own.
  if (ending.stderr !== "") host.stderr(ending.stderr);
  const error = endingError(ending, attachment, plugin, command);
  const { durationUs } = ending;
  if (command !== "STATUS") {
    notePlugin(options.journal, plugin.type, { ...attachment, command, durationUs, error });
  }
  if (error) throw error;
  log(host, "debug", `${command} done`, {
    network: attachment.network,
    plugin: plugin.type,
    interface: attachment.ifName,
    us: Math.round(durationUs),
  });
  return { stdout: ending.stdout, plugin };
}

/** The environment of a delegate: ours, with every CNI variable set anew (SPEC §4). */
function delegateEnv(
  host: Host,
  attachment: Attachment,
  command: string,
  options: ChainOptions,
): Record<string, string> {
  const env: Record<string, string> = {};
  for (const [name, value] of Object.entries(host.env)) {
    if (value !== undefined && !name.startsWith("CNI_")) env[name] = value;
  }
  env["CNI_COMMAND"] = command;
  env["CNI_PATH"] = attachment.cniPath;
  env[tokenVariable] = options.token;
  // STATUS and GC concern no attachment (SPEC §2), so they carry none.
  if (attachment.containerId === "") return env;
  env["CNI_CONTAINERID"] = attachment.containerId;
  env["CNI_NETNS"] = options.netns;
  env["CNI_IFNAME"] = attachment.ifName;
  env["CNI_ARGS"] = attachment.cniArgs;
  return env;
}
