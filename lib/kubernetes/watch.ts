/**
 * List and watch of one kind of object: a whole list, then every change after it, until the signal
 * aborts. A watch that ends resumes where it was. It lists again when the server has forgotten that
 * version (410) or a line was damaged, and pauses longer after each failure in a row.
 *
 * On a half-open connection nothing ever arrives, and on that of a kind that nobody changes hardly
 * more: a quiet server sends no bookmarks either. So the server is asked to end each watch in time,
 * which is news enough; one that is silent for longer is closed, and the kind listed again.
 * Source: Kubernetes API concepts, "Efficient detection of changes".
 */
import { setTimeout as sleep } from "node:timers/promises";
import type { Host } from "../call.ts";
import { CniError, code, log, oneLine, toCniError } from "../cni.ts";
import { isObject } from "../json.ts";
import { isNotFound, type Kube, type Query, readJson, statusOf } from "./client.ts";

/** An object as it came; only its name and version were checked. */
export type Item = Record<string, unknown>;

/** Where the objects go. What it throws is our own bug, and counts as a failure of the watch. */
export interface Sink {
  /** A whole list begins. */
  begin(): void;
  /** An object of the list, or one that is new or has changed. */
  put(object: Item): void;
  remove(object: Item): void;
  /** The list is complete: objects that were not put since `begin` are gone. */
  listed(): void;
  /** The sink has everything that the server knew just now. */
  alive(): void;
}

/** What is watched. */
export interface Watched {
  /** For people, as in `pods`. */
  what: string;
  /** Collections that may hold it, the preferred one first: a version may not be served. */
  paths: readonly (readonly string[])[];
  /** A server without any of them (an absent CRD) counts as one without objects. */
  mayBeAbsent: boolean;
  /** Narrows it down, e.g. `fieldSelector`. */
  query?: Query;
}

/** Limits of one watch, as they suit a real API server. */
export const watchTiming = {
  /** Silence after which a connection counts as dead, in ms; the server ends a watch sooner. */
  idleMs: 100_000,
  /** Pause after the first failure in a row, and the longest one, in ms. */
  pauseMs: 250,
  pauseMsMax: 30_000,
  /** Pause until an absent kind is looked for again, in ms. */
  absentMs: 30_000,
  /** Objects per page of a list. */
  pageItems: 250,
};
/** Limits of one watch, see {@link watchTiming}. */
export type WatchTiming = typeof watchTiming;

/** Counts for metrics that start at 0; `garbage` counts lines that were no event. */
export const newCounts = () => ({ lists: 0, watches: 0, events: 0, garbage: 0, failures: 0 });

/** A line may hold one object, and an object in etcd has at most 1.5 MiB. */
const lineLengthMax = 16 * 1024 * 1024;
/** A watch that ended sooner without a line made no progress, in ms. */
const shortMs = 1000;

/** The server no longer knows the version to resume from (status 410), or we lost an event. */
class MustList extends CniError {
  constructor(message: string, status?: unknown) {
    super(code.tryAgainLater, message, { cause: { status } });
  }
}

/** How a watch runs; `counts` are counted up meanwhile. */
export interface WatchOptions {
  sink: Sink;
  signal: AbortSignal;
  counts?: ReturnType<typeof newCounts>;
  timing?: WatchTiming;
}

/** One watch, and how far it is. */
interface Watch extends Required<WatchOptions> {
  host: Host;
  kube: Kube;
  watched: Watched;
  /** The collection that the server has. */
  path: readonly string[];
  /** Where to resume; "" when a list is due. */
  version: string;
  /** Failures in a row. */
  failures: number;
}

/** Keeps a sink up to date until the signal aborts. Never throws for what a server does. */
export async function watchKind(host: Host, kube: Kube, watched: Watched, options: WatchOptions) {
  const defaults = { counts: newCounts(), timing: watchTiming };
  const start = { path: watched.paths[0] ?? [], version: "", failures: 0 };
  const state: Watch = { ...defaults, ...options, ...start, host, kube, watched };
  const { signal } = state;
  while (!signal.aborted) {
    try {
      if (state.version !== "" || (await list(state))) await follow(state);
      else await pause(state.timing.absentMs, signal);
    } catch (error) {
      if (signal.aborted) return;
      // Only a list shows that a kind was removed or is served in another version.
      const mustList = error instanceof MustList || [404, 410].includes(statusOf(error) ?? 0);
      if (mustList) state.version = "";
      await recover(state, error);
    }
  }
}

/**
 * Logs the first failure in a row as a warning and the others for debugging, and pauses. A version
 * that the server has forgotten, of a kind that did not change for long, is no failure.
 */
async function recover(state: Watch, error: unknown): Promise<void> {
  const { host, timing, watched, signal, counts } = state;
  const isExpired = statusOf(error) === 410;
  if (!isExpired) counts.failures++;
  const delayMs = Math.min(timing.pauseMsMax, timing.pauseMs * 2 ** Math.min(state.failures, 20));
  const level = state.failures === 0 && !isExpired ? "warn" : "debug";
  state.failures++;
  const { message } = toCniError(error);
  log(host, level, `Watch of ${watched.what} failed: ${message}`, { failures: state.failures });
  // Half of it is random: a thousand nodes must not come back at the same moment.
  await pause(delayMs * (0.5 + Math.random() / 2), signal);
}

/** Resolves after this time, or when the signal aborts. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined);
}

/** Lists the kind into the sink. @returns false when it is absent and may be */
async function list(state: Watch): Promise<boolean> {
  const { watched, sink, counts } = state;
  for (const path of watched.paths) {
    try {
      state.version = await listPages(state, path);
      state.path = path;
      counts.lists++;
      return true;
    } catch (error) {
      if (!isNotFound(error)) throw error;
      if (!watched.mayBeAbsent && path === watched.paths.at(-1)) throw error;
    }
  }
  sink.begin();
  sink.listed();
  sink.alive();
  state.failures = 0;
  return false;
}

/** Reads all pages. @returns the version from which to watch */
async function listPages(state: Watch, path: readonly string[]): Promise<string> {
  const { kube, sink, timing, watched } = state;
  const limit = String(timing.pageItems);
  let next = "";
  let version = "";
  do {
    const more = next !== "" && { continue: next };
    const page = await kube.list(path, { ...watched.query, limit, ...more });
    const { items } = page;
    version = versionOf(page);
    if (!Array.isArray(items) || version === "") {
      throw new MustList(`the list of ${watched.what} has no items or no version`);
    }
    // Not before: a list that is refused must not look like an empty one.
    if (next === "") sink.begin();
    for (const item of items) {
      if (isNamed(item)) sink.put(item);
      else state.counts.garbage++;
    }
    const token = metadataOf(page)["continue"];
    next = typeof token === "string" ? token : "";
  } while (next !== "");
  sink.listed();
  sink.alive();
  return version;
}

/** Passes changes on until the watch ends. @throws MustList when a list must follow */
async function follow(state: Watch): Promise<void> {
  const { kube, timing, signal, counts, watched, sink } = state;
  const idle = new AbortController();
  const timer = setTimeout(() => idle.abort(), timing.idleMs);
  const startedMs = performance.now();
  // By chance: the watches of all nodes must not end at the same moment.
  const seconds = Math.max(1, Math.floor((timing.idleMs / 1000) * (0.6 + Math.random() / 5)));
  const place = { resourceVersion: state.version, timeoutSeconds: String(seconds) };
  const query = { ...watched.query, watch: "true", allowWatchBookmarks: "true", ...place };
  try {
    const stream = await kube.watch(state.path, query, AbortSignal.any([signal, idle.signal]));
    counts.watches++;
    for await (const line of lines(stream, () => timer.refresh())) {
      take(state, line);
      if (state.failures > 0) log(state.host, "info", `Watch of ${watched.what} is back`);
      state.failures = 0;
      sink.alive();
    }
  } catch (error) {
    if (idle.signal.aborted && !signal.aborted) {
      throw new MustList(`the connection was silent for ${timing.idleMs} ms`);
    }
    throw error;
  } finally {
    clearTimeout(timer);
  }
  if (signal.aborted) return;
  if (performance.now() - startedMs < shortMs) {
    throw new CniError(code.tryAgainLater, "the server ended it at once");
  }
  // The server ended it in good order: nothing is missing.
  sink.alive();
}

/** The lines of a stream. Text after the last line break is dropped: that event comes again. */
async function* lines(stream: AsyncIterable<Uint8Array>, onChunk: () => void) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of stream) {
    onChunk();
    const parts = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = parts.pop() ?? "";
    if (rest.length > lineLengthMax) throw new MustList("a line of it is too long");
    for (const part of parts) if (part.trim() !== "") yield part;
  }
}

/** Takes one event. @throws MustList when it cannot be used, so that a change is lost */
function take(state: Watch, line: string): void {
  const { sink, counts, watched } = state;
  const event = readJson(line);
  const { type, object } = isObject(event) ? event : {};
  if (type === "ERROR") {
    const { message = "", code: number = "" } = isObject(object) ? object : {};
    throw new MustList(`the server says ${number} ${oneLine(String(message), 200)}`, number);
  }
  const version = versionOf(object);
  const isEvent = version !== "" && (type === "BOOKMARK" || isNamed(object));
  if (!isEvent || !isObject(object)) {
    counts.garbage++;
    throw new MustList(`no event of ${watched.what}: ${oneLine(line, 80)}`);
  }
  counts.events++;
  if (type === "ADDED" || type === "MODIFIED") sink.put(object);
  else if (type === "DELETED") sink.remove(object);
  // A bookmark has only a version; a later Kubernetes may have other types.
  state.version = version;
}

function metadataOf(object: unknown): Record<string, unknown> {
  const metadata = isObject(object) ? object["metadata"] : undefined;
  return isObject(metadata) ? metadata : {};
}

function versionOf(object: unknown): string {
  const { resourceVersion } = metadataOf(object);
  return typeof resourceVersion === "string" ? resourceVersion : "";
}

/** True for an object that a sink can tell from others. */
function isNamed(object: unknown): object is Item {
  const { name, namespace = "" } = metadataOf(object);
  return typeof name === "string" && name !== "" && typeof namespace === "string";
}
