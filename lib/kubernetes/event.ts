/**
 * Events on objects of the API: what people see in `kubectl describe`. Best effort: an Event that
 * cannot be posted in a short time is logged and fails nothing. Equal Events on one object are one
 * with a count, because a runtime tries a denied pod again every few seconds.
 * Source: Kubernetes core/v1 Event.
 */
import type { Host } from "../call.ts";
import { log, oneLine, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { isObject } from "../json.ts";
import { isConfigured } from "../settings.ts";
import type { Kube } from "./client.ts";

/** An Event to post. */
export interface EventNote {
  about: {
    kind: string;
    apiVersion: string;
    /** "" for an object without one: its Events are in namespace `default`. */
    namespace: string;
    name: string;
    /** "" when unknown: then `kubectl describe` may not find the Event. */
    uid: string;
  };
  type: "Normal" | "Warning";
  /** One word in CamelCase, for programs. */
  reason: string;
  /** For people: what happened and what to do. Each different text is an Event of its own. */
  note: string;
}

/** Limit of one Event with all its requests and its login, in ms. */
const eventTimeoutMs = 2_000;
/** The API server's limit, in characters. */
const noteLengthMax = 1_024;
/** An Event is named by its object, cut to this, and a hash; a name has at most 253 characters. */
const aboutLengthMax = 200;

/**
 * Posts an Event, or counts it once more. Does nothing when no credentials are configured.
 * @returns false when it was not posted; then the log says why
 */
export async function postEvent(host: Host, config: Config, event: EventNote): Promise<boolean> {
  if (!isConfigured(host, config.kubernetes) || event.about.name === "") return false;
  const timeoutMs = Math.min(config.kubernetes.timeoutMs, eventTimeoutMs);
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
    log(host, "warn", `Cannot post an Event: ${why}`, { about: `${kind} ${namespace}/${name}` });
    return false;
  }
}

/** Posts the denial of a network on its pod; does nothing for a pod outside Kubernetes. */
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

/** The object to post the first time. */
function makeEvent({ about, type, reason, note }: EventNote, nowMs: number) {
  const message = oneLine(note, noteLengthMax);
  const identity = JSON.stringify([about, type, reason, message]);
  const hash = new Bun.CryptoHasher("sha256").update(identity).digest("hex").slice(0, 16);
  const prefix = about.name.slice(0, aboutLengthMax).replace(/[.-]+$/, "");
  const time = new Date(nowMs).toISOString().replace(/\.\d+Z$/, "Z");
  return {
    apiVersion: "v1",
    kind: "Event",
    metadata: { name: `${prefix}.${hash}`, namespace: about.namespace || "default" },
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

/** Of two calls at the same time one may go uncounted, which does no harm. */
async function postOrCount(kube: Kube, event: ReturnType<typeof makeEvent>): Promise<void> {
  const { isConflict, isNotFound } = await import("./client.ts");
  const { namespace, name } = event.metadata;
  const collection = ["api", "v1", "namespaces", namespace, "events"];
  let found: unknown;
  try {
    found = await kube.get([...collection, name]);
  } catch (error) {
    if (!isNotFound(error)) throw error;
    await kube.post(collection, event).catch((refused: unknown) => {
      if (!isConflict(refused)) throw refused;
    });
    return;
  }
  const before = isObject(found) && Number.isSafeInteger(found["count"]) ? found["count"] : 1;
  const count = Number(before) + 1;
  await kube.patch([...collection, name], { count, lastTimestamp: event.lastTimestamp });
}
