/**
 * The agent's part that follows edits of what pods ask for: networks come and go while a pod runs
 * (`agent.follow_annotations`). What it followed last of each pod is on record, so that it acts on
 * edits alone, also on those made while no agent ran, and not on what it wrote itself: a table that
 * changed, or a choice that would fall otherwise today, moves no pod.
 *
 * One change at a time of a pod, under its lock as every other; a pod that is being deleted, or was
 * made anew under the same name, is left alone.
 */

import { annotationKeys, npwgKeys } from "../annotations.ts";
import { CniError, code, type Host, log, type StdinConfig, toCniError } from "../cni.ts";
import { closeState, openState, type State, write } from "../database.ts";
import { isObject } from "../json.ts";
import { connect } from "../kubernetes/client.ts";
import { postEvent } from "../kubernetes/event.ts";
import { openObjects } from "../kubernetes/objects_of_call.ts";
import { type Item, pause, type Sink, watchKind } from "../kubernetes/watch.ts";
import { netnsId } from "../netns.ts";
import { rowsOf, type Switched, switchNetwork } from "../node/change_networks.ts";
import { followedSelections, putFollowed } from "../node/followed.ts";
import { firstOf, nameFor, requestOf } from "../node/running_pods.ts";
import { planNamed } from "../plan.ts";
import { type Pod, podLabel } from "../pod.ts";
import { attachments, type StoredAttachment } from "../state.ts";
import { selectWanted } from "../wanted.ts";
import { changesOf, type FollowStep } from "./follow_record.ts";
import type { Agent } from "./part.ts";

/** How often the record and the pods are compared where something changed, in ms. */
const pollMs = 300;
/** Pods whose networks are changed at once. */
const workersMax = 4;
/** Pause after the first failure of a pod, and the longest one, in ms. */
const pauseMs = 1_000;
const pauseMsMax = 5 * 60_000;

/** A pod as the API has it, with what it asks for. */
interface Seen {
  namespace: string;
  name: string;
  uid: string;
  isGoing: boolean;
  annotations: Map<string, string>;
  /** A hash of them. */
  selection: string;
}

/** The part at work. */
interface Work extends Agent {
  own: StdinConfig;
  /** By `namespace/name`. */
  pods: Map<string, Seen>;
  /** Pods came, went or changed. */
  isDirty: boolean;
  /** By call: what ends the change that is under way. */
  busy: Map<string, { pod: string; uid: string; end: AbortController }>;
  /** By call: failures in a row of one selection. */
  failed: Map<string, { selection: string; failures: number; dueMs: number }>;
}

/** Runs the part until the host's signal aborts. @throws CniError of credentials */
export async function runFollow(agent: Agent): Promise<void> {
  const { host, config, record, health, own } = agent;
  const kube = await connect(host, config.kubernetes);
  const parts = { pods: new Map(), isDirty: false, busy: new Map(), failed: new Map() };
  const work: Work = { ...agent, own, ...parts };
  const node = host.env["NODE_NAME"] ?? "";
  const watched = {
    ...{ what: "pods", paths: [["api", "v1", "pods"]], mayBeAbsent: false },
    ...(node !== "" && { query: { fieldSelector: `spec.nodeName=${node}` } }),
  };
  const watching = watchKind(host, kube, watched, sinkOf(work), { signal: host.signal });
  let version = "";
  for (; !host.signal.aborted; await pause(pollMs, host.signal)) {
    health.beat("follow");
    try {
      const found = record.version();
      const isDue = [...work.failed.values()].some(({ dueMs }) => performance.now() >= dueMs);
      if (!work.isDirty && found === version && !isDue) continue;
      work.isDirty = false;
      record.use((state) => beginDue(work, state));
      version = found;
    } catch (error) {
      work.isDirty = true;
      log(host, "debug", `Annotations wait for the record: ${toCniError(error).message}`);
    }
  }
  await watching;
}

function sinkOf(work: Work): Sink {
  let listed: Set<string> | undefined;
  const put = (object: Item) => {
    const pod = readPod(object);
    if (!pod) return;
    const key = podLabel(pod);
    listed?.add(key);
    const before = work.pods.get(key);
    work.pods.set(key, pod);
    work.isDirty ||= before?.selection !== pod.selection || before.uid !== pod.uid;
    if (pod.isGoing) endChange(work, key);
  };
  const remove = (key: string) => {
    work.pods.delete(key);
    endChange(work, key);
  };
  return {
    begin: () => {
      listed = new Set();
    },
    put,
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
function endChange({ busy }: Work, pod: string): void {
  for (const one of busy.values()) if (one.pod === pod) one.end.abort();
}

const selectionKeys = [
  ...[npwgKeys.networks, npwgKeys.defaultNetwork],
  ...[annotationKeys.cni, annotationKeys.networks],
];

/** What is read of a pod; undefined for what is none. */
function readPod(object: Item): Seen | undefined {
  const { namespace, name, uid, deletionTimestamp, annotations } = isObject(object["metadata"])
    ? object["metadata"]
    : {};
  if (typeof namespace !== "string" || typeof name !== "string" || typeof uid !== "string") {
    return undefined;
  }
  const given = isObject(annotations) ? annotations : {};
  const selected = selectionKeys.flatMap((key) => {
    const value = Object.hasOwn(given, key) ? given[key] : undefined;
    return typeof value === "string" ? [[key, value] as const] : [];
  });
  return {
    ...{ namespace, name, uid, isGoing: deletionTimestamp !== undefined },
    annotations: new Map(selected),
    selection: Bun.hash(JSON.stringify(selected)).toString(16),
  };
}

/** Begins what is to be done, a few pods at a time. */
function beginDue(work: Work, state: State): void {
  const { host, pods, busy, failed } = work;
  const followed = followedSelections(state);
  const calls = Map.groupBy(
    attachments(host, state),
    ({ containerId, requestIfName }) => `${containerId} ${requestIfName}`,
  );
  for (const key of failed.keys()) if (!calls.has(key)) failed.delete(key);
  for (const [key, rows] of calls) {
    const { pod: own, netns, netnsId: id } = firstOf(rows);
    const pod = pods.get(podLabel(own));
    const isThere =
      pod && !pod.isGoing && pod.uid === own.uid && id !== "" && netnsId(netns) === id;
    if (!isThere || followed.get(key) === pod.selection) {
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
    busy.set(key, { pod: podLabel(pod), uid: pod.uid, end });
    // The operator changed its networks before it was ever seen: only the next edit counts.
    const isPassed = followed.get(key) === "";
    void follow(work, key, pod, rows, isPassed, end.signal).finally(() => {
      busy.delete(key);
      work.isDirty = true;
    });
  }
}

/** Follows what one pod asks for now. Never throws. */
async function follow(
  work: Work,
  key: string,
  pod: Seen,
  rows: readonly StoredAttachment[],
  isPassed: boolean,
  signal: AbortSignal,
): Promise<void> {
  const { config, failed } = work;
  const host = { ...work.host, signal: AbortSignal.any([work.host.signal, signal]) };
  let state: State | undefined;
  try {
    const opened = openState(host, config.stateDir);
    state = opened;
    if (!isPassed) await change({ ...work, host }, opened, pod, firstOf(rows));
    write(opened, () => putFollowed(opened, firstOf(rows), pod.selection, host.now()));
    failed.delete(key);
  } catch (error) {
    if (host.signal.aborted) return;
    const before = failed.get(key);
    const failures = before?.selection === pod.selection ? before.failures : 0;
    const waitMs = Math.min(pauseMsMax, pauseMs * 2 ** Math.min(failures, 20));
    const dueMs = performance.now() + waitMs;
    failed.set(key, { selection: pod.selection, failures: failures + 1, dueMs });
    const { code: number, message } = toCniError(error);
    // It may be in the middle of its ADD: the next try tells.
    if (failures === 0 && number === code.tryAgainLater) return;
    if (failures < 2) log(host, "warn", `Cannot follow a pod: ${message}`, { pod: podLabel(pod) });
    await tell(work, pod, "Warning", `Cannot follow its annotations: ${message}`);
  } finally {
    if (state) closeState(state);
  }
}

/** Makes the changes one after the other, and tells. @throws CniError of the first failure */
async function change(work: Work, state: State, seen: Seen, call: StoredAttachment): Promise<void> {
  const { host, config, own } = work;
  const pod: Pod = { ...seen, serviceAccount: undefined, source: "api" };
  const wanted = await selectWanted(config, pod);
  const ownArgs = own.args?.["cni"];
  const rows = rowsOf(host, state, call);
  if (rows.length === 0) return;
  const { steps, primary } = changesOf(wanted, rows, isObject(ownArgs) ? ownArgs : {});
  const told: string[] = [];
  try {
    for (const step of steps) {
      const present = rowsOf(host, state, call);
      if (present.length === 0) throw new CniError(code.tryAgainLater, "the pod has just gone");
      told.push(describe(await makeStep(work, state, pod, present, step)));
    }
  } finally {
    if (told.length > 0) {
      log(host, "info", "Followed the annotations of a pod", { pod: podLabel(pod) });
      await tell(work, seen, "Normal", told.join("; "));
    }
  }
  if (primary === "") return;
  const hint = "only genie switch --primary, or a new pod, changes that";
  await tell(work, seen, "Warning", `Edited annotations: ${primary}; ${hint}`);
}

async function makeStep(
  { host, config, own }: Work,
  state: State,
  pod: Pod,
  rows: readonly StoredAttachment[],
  { detach, want }: FollowStep,
): Promise<Switched> {
  const objects = openObjects(host, config);
  const switching = { host, config, state, objects, command: "follow" } as const;
  const gone = detach && rows.find(({ ifName }) => ifName === detach.ifName);
  const step = { planned: rows, ...(gone && { detach: gone }) };
  if (!want) return switchNetwork(switching, step);
  const ifName = nameFor(want, rows, gone);
  const call = { host, config, request: requestOf(own, rows), objects, pod };
  const held = rows.filter((row) => row !== gone);
  const [attach] = await planNamed(call, [{ ...want, ifName }], {}, held);
  return switchNetwork(switching, { ...step, ...(attach && { attach }) });
}

function describe({ attached, detached, problem }: Switched): string {
  const part = (verb: string, one: Switched["attached"]) =>
    one ? [`${verb} ${one.network} (${one.ifName}${verb === "attached" ? ipsOf(one) : ""})`] : [];
  const parts = [...part("attached", attached), ...part("detached", detached)];
  return [...parts, ...(problem === "" ? [] : [`not quite gone: ${problem}`])].join(", ");
}

function ipsOf({ addresses }: { addresses: string[] }): string {
  return addresses.length === 0 ? "" : ` ${addresses.join(" ")}`;
}

/** An Event on the pod. */
async function tell(
  { host, config }: { host: Host; config: Agent["config"] },
  { namespace, name, uid }: Seen,
  type: "Normal" | "Warning",
  note: string,
): Promise<void> {
  const about = { kind: "Pod", apiVersion: "v1", namespace, name, uid };
  const reason = type === "Normal" ? "NetworksSwitched" : "NetworksNotSwitched";
  await postEvent(host, config, { about, type, reason, note });
}
