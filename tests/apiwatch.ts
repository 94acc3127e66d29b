/** The lists and watches of the API server for tests: pages, versions, events, bookmarks, 410. */
import type { ServerResponse } from "node:http";

type Json = Record<string, unknown>;

/** One change of one object. */
interface Change {
  version: number;
  type: "ADDED" | "MODIFIED" | "DELETED";
  path: string;
  object: Json;
}

interface Watcher {
  collection: string;
  response: ServerResponse;
  timer: ReturnType<typeof setTimeout>;
}

/** What a test does to the watches. */
export interface Watches {
  /** How many run. */
  count: (collection?: string) => number;
  /** Sends a bookmark to all. */
  bookmark: () => void;
  /** Sends this text to the watches of a collection, as it is. */
  send: (collection: string, text: string, encoding?: "utf8" | "latin1") => void;
  /** Breaks all connections of watches. */
  cut: () => void;
  /** Forgets all changes so far: older versions are gone (410). */
  compact: () => void;
  /** With an ERROR event, as the server does, or with the status of the answer. */
  goneAs: "event" | "status";
  /** Held back: nothing is sent to watches, as over a connection that is half open. */
  isMute: boolean;
}

/** Keeps the versions of objects, and the watches. */
export interface WatchCache extends Watches {
  changed: (path: string, object: Json, isNew: boolean) => void;
  removed: (path: string, object: Json) => void;
  /** A page of a list; undefined when there is nothing and the collection was never served. */
  list: (collection: string, items: [string, Json][], query: URLSearchParams) => Json;
  /** Answers a watch; the response stays open. */
  watch: (collection: string, query: URLSearchParams, response: ServerResponse) => void;
  stop: () => void;
}

/** True when an object's path lies in a collection, of one namespace or (`/api/v1/pods`) of all. */
export function isInside(path: string, collection: string): boolean {
  const [, root = "", type = ""] =
    /^(\/api\/[^/]+|\/apis\/[^/]+\/[^/]+)\/([^/]+)$/.exec(collection) ?? [];
  const parent = path.slice(0, path.lastIndexOf("/"));
  if (parent === collection) return true;
  return root !== "" && parent.startsWith(`${root}/namespaces/`) && parent.endsWith(`/${type}`);
}

/** Makes the cache. */
export function makeWatchCache(): WatchCache {
  let version = 100;
  let oldest = 0;
  const versions = new Map<string, number>();
  const changes: Change[] = [];
  const watchers = new Set<Watcher>();

  const versioned = (object: Json, at: number): Json => ({
    ...object,
    metadata: { ...(object["metadata"] as Json), resourceVersion: String(at) },
  });
  const write = ({ response }: Watcher, value: object) => {
    if (!cache.isMute) response.write(`${JSON.stringify(value)}\n`);
  };
  const note = (type: Change["type"], path: string, object: Json) => {
    version++;
    const change = { version, type, path, object: versioned(object, version) };
    versions.set(path, version);
    changes.push(change);
    for (const watcher of watchers) {
      if (isInside(path, watcher.collection)) write(watcher, { type, object: change.object });
    }
  };
  const expired = { kind: "Status", code: 410, reason: "Expired", message: "too old" };

  const cache: WatchCache = {
    goneAs: "event",
    isMute: false,
    changed: (path, object, isNew) => note(isNew ? "ADDED" : "MODIFIED", path, object),
    removed: (path, object) => note("DELETED", path, object),
    list: (collection, items, query) => {
      const limit = Number(query.get("limit") ?? Infinity);
      const from = Number(query.get("continue") ?? 0);
      const page = items.slice(from, from + limit);
      const next = from + limit < items.length ? String(from + limit) : "";
      return {
        kind: `List of ${collection}`,
        metadata: { resourceVersion: String(version), ...(next !== "" && { continue: next }) },
        items: page.map(([path, object]) => versioned(object, versions.get(path) ?? version)),
      };
    },
    watch: (collection, query, response) => {
      const from = Number(query.get("resourceVersion") ?? version);
      const isGone = from < oldest;
      response.writeHead(isGone && cache.goneAs === "status" ? 410 : 200, {
        "Content-Type": "application/json",
      });
      if (isGone) {
        const event = cache.goneAs === "event" ? { type: "ERROR", object: expired } : expired;
        response.end(`${JSON.stringify(event)}\n`);
        return;
      }
      const seconds = Number(query.get("timeoutSeconds") ?? 300);
      const timer = setTimeout(() => response.end(), seconds * 1000);
      const watcher = { collection, response, timer };
      watchers.add(watcher);
      response.on("close", () => {
        clearTimeout(timer);
        watchers.delete(watcher);
      });
      response.flushHeaders();
      for (const { version: at, type, path, object } of changes) {
        if (at > from && isInside(path, collection)) write(watcher, { type, object });
      }
    },
    count: (collection) =>
      [...watchers].filter((one) => collection === undefined || one.collection === collection)
        .length,
    bookmark: () => {
      const object = { metadata: { resourceVersion: String(version) } };
      for (const watcher of watchers) write(watcher, { type: "BOOKMARK", object });
    },
    send: (collection, text, encoding = "utf8") => {
      for (const watcher of watchers) {
        if (watcher.collection === collection) watcher.response.write(text, encoding);
      }
    },
    cut: () => {
      for (const { response } of watchers) response.socket?.destroy();
    },
    compact: () => {
      version++;
      oldest = version;
      changes.length = 0;
    },
    stop: () => {
      for (const { timer } of watchers) clearTimeout(timer);
    },
  };
  return cache;
}
