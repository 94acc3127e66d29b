/**
 * Events on objects of the API: what people see in `kubectl describe`. Best effort: an Event that
 * cannot be posted is reported and fails nothing, and it has little time. The same about the same
 * object is one Event that counts, because a runtime tries a denied pod again every few seconds.
 * Source: Kubernetes core/v1 Event.
 */
import { type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";
import type { Kube } from "./client.ts";
import { isConfigured } from "./credentials.ts";

/** The object an Event is about. */
export interface EventObject {
  kind: string;
  apiVersion: string;
  /** "" for an object without one: its Events stand in namespace default. */
  namespace: string;
  name: string;
  /** "" where it is not known: then `kubectl describe` may not find the Event. */
  uid: string;
}

/** What is to be told. */
export interface EventNote {
  about: EventObject;
  type: "Normal" | "Warning";
  /** One word in CamelCase, for programs. */
  reason: string;
  /** For people: what happened and what to do. What varies per try in it makes an Event each. */
  note: string;
}

/** Limit of one Event with all its requests, in ms. */
const eventTimeoutMs = 2_000;
/** As the API server limits it, in characters. */
const noteLengthMax = 1_024;
/** An object's name has at most 253 characters; the rest is a dot and the hash. */
const aboutLengthMax = 200;
const hashLength = 16;

/**
 * Posts an Event, or counts it once more. Does nothing where no credentials are configured.
 * @returns false when it was not posted; the reason is in the log then
 */
export async function postEvent(host: Host, config: Config, event: EventNote): Promise<boolean> {
  if (!isConfigured(host, config.kubernetes) || event.about.name === "") return false;
  const timeoutMs = Math.min(config.kubernetes.timeoutMs, eventTimeoutMs);
  // Of all requests together, and of a login that hangs.
  const timeout = AbortSignal.timeout(timeoutMs);
  const signal = AbortSignal.any([host.signal, timeout]);
  try {
    const { connect } = await import("./client.ts");
    const kube = await connect({ ...host, signal }, { ...config.kubernetes, timeoutMs });
    await postOrCount(kube, makeEvent(event, host.now()));
    return true;
  } catch (error) {
    const { kind, namespace, name } = event.about;
    const isLate = timeout.aborted && !host.signal.aborted;
    const why = isLate ? `no answer within ${timeoutMs} ms` : toCniError(error).message;
    log(host, "warn", `Cannot post an Event: ${why}`, {
      about: `${kind} ${namespace}/${name}`,
    });
    return false;
  }
}

/** Tells of a network that a pod may not have. Outside Kubernetes there is nobody to tell. */
export async function postDenial(
  host: Host,
  config: Config,
  pod: { podNamespace: string; podName: string; podUid: string },
  { message, rule }: { message: string; rule: string },
): Promise<boolean> {
  const { podNamespace: namespace, podName: name, podUid: uid } = pod;
  if (namespace === "" || name === "") return false;
  return postEvent(host, config, {
    about: { kind: "Pod", apiVersion: "v1", namespace, name, uid },
    type: "Warning",
    reason: "NetworkDenied",
    note: message.includes(rule) ? message : `${message} (${rule})`,
  });
}

/** An Event as it is posted the first time. */
type KubeEvent = ReturnType<typeof makeEvent>;

function makeEvent({ about, type, reason, note }: EventNote, nowMs: number) {
  const message = oneLine(note, noteLengthMax);
  const identity = JSON.stringify([about, type, reason, message]);
  const hash = new Bun.CryptoHasher("sha256").update(identity).digest("hex").slice(0, hashLength);
  const time = new Date(nowMs).toISOString().replace(/\.\d+Z$/, "Z");
  return {
    apiVersion: "v1",
    kind: "Event",
    metadata: {
      name: `${about.name.slice(0, aboutLengthMax).replace(/[.-]+$/, "")}.${hash}`,
      namespace: about.namespace || "default",
    },
    involvedObject: about,
    type,
    reason,
    message,
    source: { component: "genie" },
    reportingComponent: "genie",
    reportingInstance: "",
    firstTimestamp: time,
    lastTimestamp: time,
    count: 1,
  };
}

/** Two at once may count as one, and of two that are the first one is posted: both do no harm. */
async function postOrCount(kube: Kube, event: KubeEvent): Promise<void> {
  const { isConflict, isNotFound } = await import("./client.ts");
  const { namespace, name } = event.metadata;
  const collection = ["api", "v1", "namespaces", namespace, "events"];
  const found = await kube.get([...collection, name]).catch((error: unknown) => {
    if (isNotFound(error)) return undefined;
    throw error;
  });
  if (found === undefined) {
    await kube.post(collection, event).catch((error: unknown) => {
      if (!isConflict(error)) throw error;
    });
    return;
  }
  const before = isObject(found) && Number.isSafeInteger(found["count"]) ? found["count"] : 1;
  const count = Number(before) + 1;
  await kube.patch([...collection, name], { count, lastTimestamp: event.lastTimestamp });
}
