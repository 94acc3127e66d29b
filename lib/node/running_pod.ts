/**
 * A pod between its ADD and its DEL: its attachments on record, the request that a runtime would
 * send for it now, the name of one more interface, the selection that the node agent followed last,
 * and the status that is published of it. What writes is called inside a transaction of
 * `database.ts`, unless it says otherwise.
 */
import { wantsStatus } from "../attach.ts";
import type { Done, Host, Plan, Request, StdinConfig, Wanted } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type Flags, text } from "../config/usage.ts";
import { closeState, type State, write } from "../database.ts";
import { isObject, parseJson } from "../json.ts";
import { interfacesIn, netnsId } from "../kernel.ts";
import {
  forgetStatus,
  makeStatus,
  type PodStatus,
  publishStatus,
  statusSource,
} from "../kubernetes/network_status.ts";
import { type Objects, openObjects } from "../kubernetes/objects_of_call.ts";
import { planNamed } from "../plan.ts";
import type { Pod } from "../pod.ts";
import type { Attachment, CallId, Journal, PodIdentity, StoredAttachment } from "../record.ts";
import { attachments } from "../recorded.ts";
import { openState } from "../recovery/database.ts";
import { networkName } from "../recovery/network_name.ts";
import { checkOneInterface } from "../recovery/plugin_keys.ts";
import { orUndefined } from "../recovery/tried.ts";
import { podLabel } from "../request.ts";
import { loadConfig } from "../settings.ts";
import { readOwnConfig } from "./genie_config.ts";

/** What acts on running pods, and on whose behalf. */
export interface LiveContext {
  host: Host;
  config: Config;
  state: State;
  objects: Objects;
  /** Command of the lock, reason in the ledger. A DEL ends a repair and a switch, not the agent. */
  why: "repair" | "switch" | "follow";
}

/**
 * Opens what a command acts on, as its options say, and closes it after the action.
 * @throws CniError 7 for a plugin table that is wrong, 106 for a record that cannot be used
 */
export async function withPods<T>(
  host: Host,
  flags: Flags,
  why: LiveContext["why"],
  action: (context: LiveContext, stdin: StdinConfig) => Promise<T>,
): Promise<T> {
  host.catchSignals?.();
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const config = await loadConfig(stdin);
  host.log = { level: config.logLevel, file: config.logFile };
  const state = openState(host, config.stateDir);
  try {
    return await action({ host, config, state, objects: openObjects(host, config), why }, stdin);
  } finally {
    closeState(state);
  }
}

/** A pod as an operator names it. */
export type PodName = Pick<PodIdentity, "namespace" | "name">;

/**
 * The attachments of a pod whose network namespace is still there: at least one.
 * @param purpose what cannot be done without them, for the message
 * @throws CniError 3 when there are none
 */
export function liveAttachments(
  { host, state }: LiveContext,
  pod: PodName,
  purpose: string,
): StoredAttachment[] {
  const all = attachments(host, state).filter(
    (row) => row.pod.namespace === pod.namespace && row.pod.name === pod.name && !row.parkedAs,
  );
  const live = all.filter(hasNetns);
  if (live.length > 0) return live;
  const isGone = "its network namespace is gone; genie gc collects what it left";
  const why = all.length > 0 ? isGone : "nothing of it is on record on this node";
  throw new CniError(code.unknownContainer, `Cannot ${purpose} pod ${podLabel(pod)}: ${why}`);
}

/** True while the path leads to the network namespace in which the attachment was made. */
export function hasNetns({ netns, netnsId: id }: StoredAttachment): boolean {
  return id !== "" && netnsId(netns) === id;
}

/** Is it what `blue` or `blue@net3` of a command line means, by whichever name of its network? */
export function isNamed(config: Config, { network, ifName }: StoredAttachment, name: string) {
  const [asked = "", at = ifName] = name.split("@");
  return at === ifName && networkName(config, asked) === networkName(config, network);
}

/** The pod of an attachment, as far as the record knows it. */
export function podOf({ pod }: Attachment): Pod {
  return { ...pod, serviceAccount: undefined, annotations: new Map(), source: "none" };
}

/** The attachments of one call of the runtime, in the order in which they were made. */
export function attachmentsOfCall(host: Host, state: State, call: CallId): StoredAttachment[] {
  return attachments(host, state, call.containerId).filter(
    (row) => row.requestIfName === call.requestIfName && !row.parkedAs,
  );
}

/** The first attachment of a call, which has at least one. */
export function firstOf(rows: readonly StoredAttachment[]): StoredAttachment {
  const [first] = rows;
  if (!first) throw new Error("a pod without attachments was let through");
  return first;
}

/**
 * The interface of a new attachment: the one asked for; else that of a row that a killed switch
 * left; else the next free name by the rules of an ADD, like the name of the one it replaces.
 * @throws CniError 105 for CNI_IFNAME
 */
export function nameFor(
  wanted: Wanted,
  rows: readonly StoredAttachment[],
  replaced: StoredAttachment | undefined,
): string {
  const { requestIfName, netns } = firstOf(rows);
  const { network, ifName } = wanted;
  if (ifName === requestIfName) {
    throw new CniError(
      code.interfaceConflict,
      `Cannot attach network "${network}" as ${ifName}: that is the pod's primary interface, see ` +
        "genie switch --primary",
    );
  }
  if (ifName !== undefined) return ifName;
  const name = nameOfWanted(wanted);
  const leftover = rows.find((row) => row.state === "planned" && row.network === name);
  if (leftover && leftover !== replaced) return leftover.ifName;
  const taken = new Set([...rows.map((row) => row.ifName), ...(interfacesIn(netns) ?? [])]);
  const isEth = replaced !== undefined && /^eth\d+$/.test(replaced.ifName);
  for (let i = isEth ? 0 : 1; ; i++) {
    const free = `${isEth ? "eth" : "net"}${i}`;
    if (!taken.has(free)) return free;
  }
}

/** Capability args that are meant for one network, and mean nothing to another one. */
const ofOneNetwork = /^(ips|mac|infinibandGUID|ipam-claim-reference|deviceID|CNIDeviceInfoFile)$/;

/** The ADD that the runtime would send for this pod now: further networks are planned from it. */
export function requestOf(stdin: StdinConfig, rows: readonly StoredAttachment[]): Request {
  const { containerId, netns, requestIfName, requestNetwork, cniArgs, cniPath } = firstOf(rows);
  const primary = rows.find((row) => row.ifName === requestIfName);
  const offered = Object.entries(primary?.capabilityArgs ?? {});
  const { runtimeConfig: _, ...config } = stdin;
  return {
    command: "ADD",
    containerId,
    netns,
    ifName: requestIfName,
    args: cniArgs
      .split(";")
      .filter((pair) => !/^(IP|MAC|GATEWAY)=/.test(pair))
      .join(";"),
    path: [...new Set(cniPath.split(":"))],
    cniVersion: "1.1.0",
    config: {
      ...config,
      name: requestNetwork,
      runtimeConfig: Object.fromEntries(offered.filter(([key]) => !ofOneNetwork.test(key))),
    },
  };
}

/**
 * Plans one more network for a running pod, by the rules of an ADD.
 * @param replaced the attachment whose place it takes
 * @param call what the plan is made from, see {@link requestOf}
 * @throws CniError as the plan of an ADD
 */
export async function planFurther(
  { host, config, objects }: LiveContext,
  call: { stdin: StdinConfig; pod: Pod; rows: readonly StoredAttachment[]; journal?: Journal },
  wanted: Wanted & { ifName: string },
  replaced: StoredAttachment | undefined,
): Promise<Attachment | undefined> {
  const { stdin, pod, rows, journal } = call;
  const held = rows.filter((row) => row !== replaced);
  const request = requestOf(stdin, rows);
  const planned = { host, config, request, objects, ...(journal && { journal }) };
  const [attachment] = await planNamed(planned, pod, [wanted], held);
  if (attachment && replaced && replaced.ifName !== attachment.ifName) {
    // The new one is made while the old one is still there.
    checkOneInterface(config, [attachment], [replaced]);
  }
  return attachment;
}

/** A hash of the selection that the agent followed last, by "container interface" of the call. */
export function followedSelections({ database }: State): Map<string, string> {
  const sql = "SELECT container_id || ' ' || request_ifname, selection FROM followed";
  return new Map(database.query(sql).values() as [call: string, selection: string][]);
}

/** Remembers the selection that was followed, and forgets those of calls that are gone. */
export function putFollowed(
  { database }: State,
  { containerId, requestIfName }: CallId,
  selection: string,
  nowMs: number,
): void {
  database
    .query("INSERT OR REPLACE INTO followed VALUES (?, ?, ?, ?)")
    .run(containerId, requestIfName, selection, nowMs);
  database.run(
    `DELETE FROM followed WHERE NOT EXISTS (SELECT 1 FROM attachments AS one
       WHERE one.container_id = followed.container_id
         AND one.request_ifname = followed.request_ifname)`,
  );
}

/** After an operator's change: what the pod's annotations ask for until now is not followed. */
export function putUnfollowed({ database }: State, call: CallId, nowMs: number): void {
  database
    .query("INSERT OR IGNORE INTO followed VALUES (?, ?, '', ?)")
    .run(call.containerId, call.requestIfName, nowMs);
}

/** Annotations of a call that wait to be published; none where they cannot be read. */
export function waitingAnnotations(state: State, call: CallId): Record<string, string> {
  const row = state.database
    .query("SELECT annotations FROM statuses WHERE container_id = ? AND request_ifname = ?")
    .get(call.containerId, call.requestIfName) as { annotations: string } | null;
  const value = row && orUndefined(() => parseJson(row.annotations, "waiting annotations"));
  const isText = (pair: [string, unknown]): pair is [string, string] => typeof pair[1] === "string";
  return isObject(value) ? Object.fromEntries(Object.entries(value).filter(isText)) : {};
}

/**
 * Makes the status of a pod whose networks changed while it runs. Reads the record alone.
 * @param before its attachments before the change; `done` are those of now
 * @returns undefined where no status is wanted
 */
export async function runningStatus(
  { host, config, state, objects }: LiveContext,
  before: readonly StoredAttachment[],
  done: readonly Done[],
): Promise<PodStatus | undefined> {
  const [first] = done;
  if (!first) return undefined;
  const rank = ({ attachment }: Done) => Number(!attachment.primary);
  const ordered = done.toSorted((a, b) => rank(a) - rank(b));
  const selectedBefore = before.filter(isOfSelection);
  const selected = done.filter(({ attachment }) => isOfSelection(attachment));
  const plan: Plan = {
    pod: podOf(first.attachment),
    decision: selectedBefore.length > 0 ? "cni" : "default",
    primarySet: new Set(selected.map(({ attachment }) => attachment.ifName)),
    attachments: [],
  };
  const call = { host, config, objects };
  const status = wantsStatus(call, plan) ? await makeStatus(call, plan, ordered) : undefined;
  if (!status) return undefined;
  if (selectedBefore.length > 1 && selected.length < 2) {
    // It was published while there were several: the old value must not stay.
    const { formatMultiIpPreferences } = await import("../kubernetes/npwg.ts");
    const sources = await Promise.all(selected.map((one) => statusSource(host, one)));
    status.annotations["multi-ip-preferences"] = formatMultiIpPreferences(sources);
  }
  const annotations = { ...waitingAnnotations(state, status), ...status.annotations };
  return { ...status, annotations, isInline: config.kubernetes.status === "inline" };
}

/** Selected by CNI-Genie's annotations. */
const isOfSelection = ({ reason }: Attachment) => /^asked for by (cni|networks)$/.test(reason);

/**
 * Publishes a status that is on record, where this node publishes inline; else, or when it fails,
 * the node agent does. Opens a transaction of its own. Never throws.
 */
export async function publishRunning(context: LiveContext, status: PodStatus): Promise<void> {
  const { host, config, state, objects } = context;
  if (!status.isInline) return;
  const deadlineMs = host.now() + config.kubernetes.timeoutMs;
  try {
    if (!(await publishStatus(host, objects.kube, status, deadlineMs))) return;
    write(state, () => forgetStatus(state, status, JSON.stringify(status.annotations)));
  } catch (error) {
    log(host, "warn", `A network status waits: ${toCniError(error).message}`);
  }
}

/** The name under which the record has an attachment to this network. */
export function nameOfWanted({ from, namespace, network }: Wanted): string {
  return from === "node" || from === "multus" ? network : `${namespace}/${network}`;
}
