/**
 * List and watch of one kind of object: a whole list, then every change from there on, for as long
 * as the signal lasts. Resumes where it was, lists anew when the server has forgotten that place
 * (410) or a line was damaged, and waits longer after each failure in a row.
 *
 * A connection that is half open says nothing for ever. The API server sends a bookmark about every
 * minute, so a watch that is silent for longer is given up, and the kind listed again: that holds
 * for a server without bookmarks too.
 * Source: Kubernetes API concepts, "Efficient detection of changes".
 */
import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";
import { isNotFound, type Kube, statusOf } from "./client.ts";

/** An object as it came; its name and version were looked at. */
export type Item = Record<string, unknown>;

/** Where the objects go. What it throws is our own bug, and counts as a failure of the watch. */
export interface Sink {
  /** A whole list begins. */
  begin(): void;
  /** An object of the list, or one that is new or has changed. */
  put(object: Item): void;
  remove(object: Item): void;
  /** The list is whole: what it did not put since `begin` is gone. */
  listed(): void;
  /** Everything that the server knew just now has been handed over. */
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
  query?: Readonly<Record<string, string>>;
}

/** Limits of one watch. */
export interface WatchTiming {
  /** Silence after which a connection counts as dead, in ms. */
  idleMs: number;
  /** How long the server is asked to keep a watch, in s; spread so that nodes do not meet. */
  lifeSeconds: number;
  /** Pause after the first failure in a row, and the longest one, in ms. */
  pauseMs: number;
  pauseMsMax: number;
  /** Pause until an absent kind is looked for again, in ms. */
  absentMs: number;
  /** Objects per page of a list. */
  pageItems: number;
}

/** The limits that suit a real API server. */
export const watchTiming: WatchTiming = {
  idleMs: 100_000,
  lifeSeconds: 300,
  pauseMs: 250,
  pauseMsMax: 30_000,
  absentMs: 30_000,
  pageItems: 250,
};

/** What happened so far, for metrics and tests. */
export interface WatchCounts {
  lists: number;
  watches: number;
  events: number;
  /** Lines that were no event. */
  garbage: number;
  failures: number;
}

/** A line may hold one object, and an object in etcd has at most 1.5 MiB. */
const lineLengthMax = 16 * 1024 * 1024;
/** A watch that ended sooner without a line made no progress, in ms. */
const shortMs = 1000;

/** The server no longer knows the version from which we want to go on, or we lost an event. */
class MustList extends Error {}

/** One watch: what it goes to, and how far it is. */
interface Watch {
  host: Host;
  kube: Kube;
  watched: Watched;
  sink: Sink;
  timing: WatchTiming;
  signal: AbortSignal;
  counts: WatchCounts;
  /** The collection that the server has. */
  path: readonly string[];
  /** Where to go on; "" when a list is due. */
  version: string;
  /** Failures in a row. */
  failures: number;
}

/**
 * Keeps a sink up to date until the signal aborts. Never throws for what a server does.
 *
 * @param counts counted up as it goes
 */
export async function watchKind(
  host: Host,
  kube: Kube,
  watched: Watched,
  sink: Sink,
  options: { signal: AbortSignal; counts?: WatchCounts; timing?: WatchTiming },
): Promise<void> {
  const { signal, counts = newCounts(), timing = watchTiming } = options;
  const path = watched.paths[0] ?? [];
  const watch = { host, kube, watched, sink, timing, signal, counts, path };
  const state: Watch = { ...watch, version: "", failures: 0 };
  while (!signal.aborted) {
    try {
      if (state.version === "" && !(await list(state))) {
        await pause(timing.absentMs, signal);
        continue;
      }
      await follow(state);
    } catch (error) {
      if (signal.aborted) return;
      // Without a list nobody would find out that a kind was taken away, or is served otherwise.
      if (error instanceof MustList || isGone(error) || isNotFound(error)) state.version = "";
      await recover(state, error);
    }
  }
}

/** Counts that start at nothing. */
export function newCounts(): WatchCounts {
  return { lists: 0, watches: 0, events: 0, garbage: 0, failures: 0 };
}

/** Says once that something fails, then only at debug, and waits. */
async function recover(state: Watch, error: unknown): Promise<void> {
  const { host, timing, watched, signal, counts } = state;
  counts.failures++;
  const delayMs = Math.min(timing.pauseMsMax, timing.pauseMs * 2 ** Math.min(state.failures, 20));
  const level = state.failures === 0 && !isGone(error) ? "warn" : "debug";
  state.failures++;
  const reason = error instanceof MustList ? error.message : toCniError(error).message;
  log(host, level, `Watch of ${watched.what} failed: ${reason}`, { failures: state.failures });
  // Half of it is chance: a thousand nodes must not come back in one moment.
  await pause(delayMs * (0.5 + Math.random() / 2), signal);
}

function isGone(error: unknown): boolean {
  return statusOf(error) === 410;
}

/** Resolves after this time, or when the signal aborts. */
export function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    if (signal.aborted) return done();
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", end);
      done();
    };
    const timer = setTimeout(end, ms);
    signal.addEventListener("abort", end);
  });
}

/** Hands a whole list over. @returns false when the server has no such kind, and that is fine */
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
  let next = "";
  let isFirst = true;
  for (;;) {
    const more = next !== "" && { continue: next };
    const query = { ...watched.query, limit: String(timing.pageItems), ...more };
    const page = await kube.list(path, query);
    const metadata = isObject(page["metadata"]) ? page["metadata"] : {};
    const { resourceVersion: version, continue: token = "" } = metadata;
    const items = page["items"];
    if (!Array.isArray(items) || typeof version !== "string" || version === "") {
      throw new MustList(`the list of ${watched.what} has no items or no version`);
    }
    // Only now: a list that is refused must not look like an empty one.
    if (isFirst) sink.begin();
    isFirst = false;
    for (const item of items) {
      if (isNamed(item)) sink.put(item);
      else state.counts.garbage++;
    }
    next = typeof token === "string" ? token : "";
    if (next === "") {
      sink.listed();
      sink.alive();
      return version;
    }
  }
}

/** Hands changes over until the watch ends. @throws MustList when the next step is a list */
async function follow(state: Watch): Promise<void> {
  const { kube, timing, signal, counts, watched, sink } = state;
  const idle = new AbortController();
  const timer = setTimeout(() => idle.abort(), timing.idleMs);
  const startedMs = performance.now();
  const seconds = Math.max(1, Math.round(timing.lifeSeconds * (0.75 + Math.random() / 4)));
  const query = {
    ...watched.query,
    watch: "true",
    allowWatchBookmarks: "true",
    resourceVersion: state.version,
    timeoutSeconds: String(seconds),
  };
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
  // It ended in good order: nothing is missing.
  sink.alive();
}

/** The lines of a stream; what stands after the last line break is dropped: it comes again. */
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

/** Takes one event. @throws MustList when it cannot be used: what it said is lost */
function take(state: Watch, line: string): void {
  const { sink, counts, watched } = state;
  const event = readEvent(line);
  const { type, object } = event ?? {};
  if (type === "ERROR") throw serverError(object);
  const version = versionOf(object);
  const isEvent = version !== "" && (type === "BOOKMARK" || isNamed(object));
  if (!isEvent || !isObject(object)) {
    counts.garbage++;
    throw new MustList(`no event of ${watched.what}: ${oneLine(line, 80)}`);
  }
  counts.events++;
  if (type === "ADDED" || type === "MODIFIED") sink.put(object);
  else if (type === "DELETED") sink.remove(object);
  // A bookmark has nothing but a version; of a later Kubernetes there may be other types.
  state.version = version;
}

function readEvent(line: string): { type?: unknown; object?: unknown } | undefined {
  try {
    const event: unknown = JSON.parse(line);
    return isObject(event) ? event : undefined;
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError) return undefined;
    throw error;
  }
}

/** An `ERROR` event holds a Status. Where to go on from is uncertain after any. */
function serverError(status: unknown): MustList {
  const { message, code: number } = isObject(status) ? status : {};
  return new MustList(`the server says ${number ?? ""} ${oneLine(String(message ?? ""), 200)}`);
}

function metadataOf(object: unknown): Record<string, unknown> {
  const metadata = isObject(object) ? object["metadata"] : undefined;
  return isObject(metadata) ? metadata : {};
}

function versionOf(object: unknown): string {
  const { resourceVersion } = metadataOf(object);
  return typeof resourceVersion === "string" ? resourceVersion : "";
}

/** An object that a sink can keep apart from others. */
function isNamed(object: unknown): object is Item {
  const { name, namespace = "" } = metadataOf(object);
  return typeof name === "string" && name !== "" && typeof namespace === "string";
}
