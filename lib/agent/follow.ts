/**
 * The agent's task that follows edits of what pods ask for: networks come and go while a pod runs
 * (`agent.follow_annotations`). The selection that it followed last of each pod is on record, so
 * that it acts on edits alone, also on those made while no agent ran, and not on what it wrote
 * itself: a table that changed, or a choice that would fall otherwise today, moves no pod.
 *
 * One change at a time of a pod, under its lock as every other; a pod that is being deleted, or was
 * made anew under the same name, is left alone.
 */
import type { Wanted, WantedSet } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { closeState, type State, write } from "../database.ts";
import { isObject } from "../json.ts";
import { connect } from "../kubernetes/client.ts";
import { postEvent } from "../kubernetes/event.ts";
import { openObjects } from "../kubernetes/objects_of_call.ts";
import { type Item, type Sink, watchKind } from "../kubernetes/watch.ts";
import * as running from "../node/running_pod.ts";
import { type ChangeOutcome, changeNetworks } from "../node/switch.ts";
import { annotationKeys, npwgKeys, type Pod } from "../pod.ts";
import type { StoredAttachment } from "../record.ts";
import { attachments } from "../recorded.ts";
import { openState } from "../recovery/database.ts";
import { identifiedWanted, networkName } from "../recovery/network_name.ts";
import { podLabel } from "../request.ts";
import { nameInterfaces, selectWanted } from "../selection.ts";
import { type Agent, pauseAfter, watchRecord } from "./task.ts";

/** How often the record and the pods are compared where something changed, in ms. */
const pollMs = 300;
/** Pods whose networks are changed at once. */
const workersMax = 4;
/** Pause after the first failure of a pod, and the longest one, in ms. */
const pauseMs = 1_000;
const pauseMsMax = 5 * 60_000;

/** A pod as the API has it, with what it asks for. */
interface WatchedPod {
  namespace: string;
  name: string;
  uid: string;
  isGoing: boolean;
  /** Those that select networks. */
  annotations: Map<string, string>;
  /** A hash of them. */
  selection: string;
}

/** The task at work. */
type FollowWork = ReturnType<typeof beginWork>;

function beginWork(agent: Agent) {
  return {
    ...agent,
    /** By `namespace/name`. */
    pods: new Map<string, WatchedPod>(),
    /** Pods came, went or changed. */
    isDirty: false,
    /** By call: what ends the change that is under way. */
    busy: new Map<string, { pod: string; end: AbortController }>(),
    /** By call: failures in a row of one selection. */
    failed: new Map<string, { selection: string; failures: number; dueMs: number }>(),
  };
}

/** Runs the task until the host's signal aborts. @throws CniError of credentials */
export async function runFollow(agent: Agent): Promise<void> {
  const { host, config, record } = agent;
  const kube = await connect(host, config.kubernetes);
  const work = beginWork(agent);
  const node = host.env["NODE_NAME"] ?? "";
  const watched = {
    what: "pods",
    paths: [["api", "v1", "pods"]],
    mayBeAbsent: false,
    ...(node !== "" && { query: { fieldSelector: `spec.nodeName=${node}` } }),
  };
  const watching = watchKind(host, kube, watched, { sink: sinkOf(work), signal: host.signal });
  const task = { name: "follow", what: "Annotations wait", pollMs };
  const begin = () => {
    work.isDirty = false;
    record.use((state) => beginDue(work, state));
  };
  const isDue = () =>
    work.isDirty || work.failed.values().some(({ dueMs }) => performance.now() >= dueMs);
  await watchRecord(agent, task, begin, isDue);
  await watching;
}

function sinkOf(work: FollowWork): Sink {
  let listed: Set<string> | undefined;
  const remove = (key: string) => {
    work.pods.delete(key);
    endChange(work, key);
  };
  return {
    begin: () => {
      listed = new Set();
    },
    put: (object) => {
      const pod = readPod(object);
      if (!pod) return;
      const key = podLabel(pod);
      listed?.add(key);
      const before = work.pods.get(key);
      work.pods.set(key, pod);
      work.isDirty ||= before?.selection !== pod.selection || before.uid !== pod.uid;
      if (pod.isGoing) endChange(work, key);
    },
    remove: (object) => {
      const pod = readPod(object);
      if (pod) remove(podLabel(pod));
    },
    listed: () => {
      for (const key of work.pods.keys()) if (!listed?.has(key)) remove(key);
      listed = undefined;
      work.isDirty = true;
    },
    alive: () => undefined,
  };
}

/** A pod that goes is not to wait for its change: its DEL is on the way. */
function endChange({ busy }: FollowWork, pod: string): void {
  for (const one of busy.values()) if (one.pod === pod) one.end.abort();
}

const { cni, networks } = annotationKeys;
const selectionKeys = [npwgKeys.networks, npwgKeys.defaultNetwork, cni, networks];

/** Reads a pod; undefined for what is none. */
function readPod(object: Item): WatchedPod | undefined {
  const metadata = isObject(object["metadata"]) ? object["metadata"] : {};
  const { namespace, name, uid, deletionTimestamp, annotations } = metadata;
  if (typeof namespace !== "string" || typeof name !== "string" || typeof uid !== "string") {
    return undefined;
  }
  const given = isObject(annotations) ? annotations : {};
  const selected = selectionKeys.flatMap((key) => {
    const value = Object.hasOwn(given, key) ? given[key] : undefined;
    return typeof value === "string" ? [[key, value] as const] : [];
  });
  return {
    namespace,
    name,
    uid,
    isGoing: deletionTimestamp !== undefined,
    annotations: new Map(selected),
    selection: Bun.hash(JSON.stringify(selected)).toString(16),
  };
}

/** Begins what is to be done, a few pods at a time. */
function beginDue(work: FollowWork, state: State): void {
  const { host, pods, busy, failed } = work;
  const followed = running.followedSelections(state);
  const keyOf = (row: StoredAttachment) => `${row.containerId} ${row.requestIfName}`;
  const calls = Map.groupBy(attachments(host, state), keyOf);
  for (const key of failed.keys()) if (!calls.has(key)) failed.delete(key);
  for (const [key, rows] of calls) {
    const first = running.firstOf(rows);
    const pod = pods.get(podLabel(first.pod));
    const isPresent = pod && !pod.isGoing && pod.uid === first.pod.uid && running.hasNetns(first);
    if (!isPresent || followed.get(key) === pod.selection) {
      failed.delete(key);
      continue;
    }
    if (busy.has(key)) continue;
    const before = failed.get(key);
    if (before?.selection === pod.selection && performance.now() < before.dueMs) continue;
    if (busy.size >= workersMax) {
      work.isDirty = true;
      return;
    }
    const end = new AbortController();
    busy.set(key, { pod: podLabel(pod), end });
    const signal = AbortSignal.any([host.signal, end.signal]);
    const own = { ...work, host: { ...host, signal } };
    void follow(own, key, { pod, call: first, followed: followed.get(key) }).finally(() => {
      busy.delete(key);
      work.isDirty = true;
    });
  }
}

/** One pod whose selection is not the one `followed` last; "" for none that counts. */
type EditedPod = { pod: WatchedPod; call: StoredAttachment; followed: string | undefined };

/** Follows what one pod asks for now. Never throws. */
async function follow(work: FollowWork, key: string, edited: EditedPod): Promise<void> {
  const { host, config, failed } = work;
  const { pod, call, followed } = edited;
  let state: State | undefined;
  try {
    const opened = openState(host, config.stateDir);
    state = opened;
    // "": the operator changed its networks before it was ever seen; only the next edit counts.
    if (followed !== "") await changePod(work, opened, edited);
    write(opened, () => running.putFollowed(opened, call, pod.selection, host.now()));
    failed.delete(key);
  } catch (error) {
    if (host.signal.aborted) return;
    const before = failed.get(key);
    const failures = before?.selection === pod.selection ? before.failures : 0;
    const dueMs = performance.now() + pauseAfter(failures, pauseMs, pauseMsMax);
    failed.set(key, { selection: pod.selection, failures: failures + 1, dueMs });
    const { code: number, message } = toCniError(error);
    // It may be in the middle of its ADD: only a second failure is logged.
    if (failures === 0 && number === code.tryAgainLater) return;
    if (failures < 2) log(host, "warn", `Cannot follow a pod: ${message}`, { pod: podLabel(pod) });
    await post(work, pod, "Warning", `Cannot follow its annotations: ${message}`);
  } finally {
    if (state) closeState(state);
  }
}

/** Makes the changes one after the other, and posts them. @throws CniError of the first failure */
async function changePod(work: FollowWork, state: State, { pod: watched, call }: EditedPod) {
  const { host, config, own } = work;
  const pod: Pod = { ...watched, serviceAccount: undefined, source: "api" };
  const { primarySet, further, ...asked } = await selectWanted(config, pod);
  const named = (one: Wanted) => identifiedWanted(config, one);
  const wanted = { ...asked, primarySet: primarySet.map(named), further: further.map(named) };
  const ownArgs = own.args?.["cni"];
  // Those that an older genie recorded may have the name that the pod asked by.
  const rows = running.attachmentsOfCall(host, state, call).map((row) => {
    return { ...row, network: networkName(config, row.network) };
  });
  if (rows.length === 0) return;
  const { steps, primary } = changesOf(wanted, rows, isObject(ownArgs) ? ownArgs : {});
  const notes: string[] = [];
  try {
    for (const step of steps) {
      const present = running.attachmentsOfCall(host, state, call);
      if (present.length === 0) throw new CniError(code.tryAgainLater, "the pod has just gone");
      notes.push(describe(await makeStep(work, state, pod, { ...step, rows: present })));
    }
  } finally {
    if (notes.length > 0) {
      log(host, "info", "Followed the annotations of a pod", { pod: podLabel(pod) });
      await post(work, watched, "Normal", notes.join("; "));
    }
  }
  if (primary === "") return;
  const hint = "only genie switch --primary, or a new pod, changes that";
  await post(work, watched, "Warning", `Edited annotations: ${primary}; ${hint}`);
}

async function makeStep(
  { host, config, own }: FollowWork,
  state: State,
  pod: Pod,
  { detach, want, rows }: SelectionStep & { rows: readonly StoredAttachment[] },
): Promise<ChangeOutcome> {
  const objects = openObjects(host, config);
  const context = { host, config, state, objects, why: "follow" } as const;
  const gone = detach && rows.find(({ ifName }) => ifName === detach.ifName);
  const change = { planned: rows, ...(gone && { detach: gone }) };
  if (!want) return changeNetworks(context, change);
  const ifName = running.nameFor(want, rows, gone);
  const place = { stdin: own, pod, rows };
  const attach = await running.planFurther(context, place, { ...want, ifName }, gone);
  return changeNetworks(context, { ...change, ...(attach && { attach }) });
}

function describe({ attached, detached, problem }: ChangeOutcome): string {
  const notes: string[] = [];
  if (attached) {
    const { network, ifName, addresses } = attached;
    notes.push(`attached ${network} (${[ifName, ...addresses].join(" ")})`);
  }
  if (detached) notes.push(`detached ${detached.network} (${detached.ifName})`);
  if (problem !== "") notes.push(`not quite gone: ${problem}`);
  return notes.join(", ");
}

/** Posts an Event on the pod. */
async function post(
  { host, config }: FollowWork,
  { namespace, name, uid }: WatchedPod,
  type: "Normal" | "Warning",
  note: string,
): Promise<void> {
  const about = { kind: "Pod", apiVersion: "v1", namespace, name, uid };
  const reason = type === "Normal" ? "NetworksSwitched" : "NetworksNotSwitched";
  await postEvent(host, config, { about, type, reason, note });
}

/** One thing to do: a network goes, comes, or takes the place of another one. */
export type SelectionStep = { detach?: StoredAttachment; want?: Wanted };

/** By their reasons: what an annotation of the pod brought. */
const isAsked = ({ reason }: { reason: string }): boolean => reason.startsWith("asked for by ");

/**
 * Compares what a pod asks for now with what it has, as far as it asked for that. What every pod
 * gets, and what an operator attached, stays.
 * @param rows what the pod has, all of one call
 * @param ownCniArgs `args.cni` of our own CNI config, which every attachment has besides its own
 * @returns what to do, and why the primary network stays though another one is asked for; "" where
 *   none is
 * @throws CniError 7 or 105 for a selection that no ADD would take
 */
export function changesOf(
  { primarySet, further }: WantedSet,
  rows: readonly StoredAttachment[],
  ownCniArgs: Record<string, unknown> = {},
): { steps: SelectionStep[]; primary: string } {
  const requestIfName = rows[0]?.requestIfName ?? "";
  const nobody = { network: "", from: "node", namespace: "", reason: "" } as const;
  // For its errors: an ADD refuses what clashes or is too much.
  nameInterfaces(primarySet.length > 0 ? primarySet : [nobody], further, requestIfName);
  const primaryRow = rows.find(({ ifName }) => ifName === requestIfName);
  const named = (name: string | undefined) => primarySet.find(({ ifName }) => ifName === name);
  const primary = named(requestIfName) ?? named(undefined);
  const asked = [...primarySet, ...further].filter((one) => one !== primary && isAsked(one));
  const left = new Set(rows.filter((row) => row !== primaryRow));
  const take = (match: (row: StoredAttachment) => boolean): StoredAttachment | undefined => {
    const found = [...left].find(match);
    if (found) left.delete(found);
    return found;
  };
  // Those that name an interface first: the others take what is left.
  const isFree = ({ ifName }: Wanted) => Number(ifName === undefined);
  const ordered = asked.toSorted((a, b) => isFree(a) - isFree(b));
  const fresh = ordered.filter((want) => !take((row) => isSame(want, row, ownCniArgs)));
  const isTaken = ({ ifName }: StoredAttachment) => fresh.some((want) => want.ifName === ifName);
  const steps = fresh.map((want): SelectionStep => {
    const sameName = take((row) => isAsked(row) && row.ifName === want.ifName);
    const detach = sameName ?? take((row) => row.reason === want.reason && !isTaken(row));
    return { want, ...(detach && { detach }) };
  });
  const gone = [...left].filter(isAsked).map((detach): SelectionStep => ({ detach }));
  return { steps: [...steps, ...gone], primary: keptPrimary(primary, primaryRow) };
}

function keptPrimary(primary: Wanted | undefined, row: StoredAttachment | undefined): string {
  if (!row) return "";
  const stays = `its primary network stays "${row.network}"`;
  const asked = primary && isAsked(primary) ? running.nameOfWanted(primary) : undefined;
  if (asked === row.network) return "";
  if (asked !== undefined) return `${stays} though it asks for "${asked}"`;
  return isAsked(row) ? `${stays}, which it asked for` : "";
}

/** Is this what the pod has on that interface? The order of keys means nothing. */
function isSame(want: Wanted, row: StoredAttachment, ownCniArgs: Record<string, unknown>): boolean {
  const { capabilityArgs = {}, cniArgs = {} } = want;
  // What genie itself adds to the wishes of a pod: a device, the address it had before a repair.
  const added = ["deviceID", "CNIDeviceInfoFile", ...("ips" in capabilityArgs ? [] : ["ips"])];
  const addedArgs = "ips" in cniArgs ? [] : ["ips"];
  return (
    row.state === "attached" &&
    row.network === running.nameOfWanted(want) &&
    (want.ifName === undefined || want.ifName === row.ifName) &&
    Bun.deepEquals(capabilityArgs, without(row.capabilityArgs, added)) &&
    Bun.deepEquals({ ...ownCniArgs, ...cniArgs }, without(row.args["cni"] ?? {}, addedArgs)) &&
    // One that took the default route over with the place of another one has an empty list.
    Bun.deepEquals(want.defaultRoute ?? [], row.defaultRoute ?? []) &&
    (want.defaultRoute === undefined || row.defaultRoute !== undefined)
  );
}

function without(object: object, keys: readonly string[]): object {
  return Object.fromEntries(Object.entries(object).filter(([key]) => !keys.includes(key)));
}
