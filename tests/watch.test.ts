/**
 * lib/kubernetes/watch.ts against the API server of apiserver.ts: real TLS, real streams, real
 * failures.
 */
import { afterAll, beforeAll, expect, test } from "bun:test";
import { getEventListeners } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { connect } from "../lib/kubernetes/client.ts";
import {
  newCounts,
  pause,
  type Sink,
  type Watched,
  type WatchTiming,
  watchKind,
  watchTiming,
} from "../lib/kubernetes/watch.ts";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { makeHost } from "./fakes.ts";

const dir = mkdtempSync(join(tmpdir(), "genie-watch-"));
let server: ApiServer;
beforeAll(async () => {
  server = await startApiServer(dir, { keepAlive: false });
});
afterAll(async () => {
  await server.stop();
  rmSync(dir, { recursive: true });
});

const quick: WatchTiming = { ...watchTiming, pauseMs: 1, pauseMsMax: 20, absentMs: 5 };

/** A kind of its own per test, and a sink that keeps what it is told. */
function makeKind(): { collection: string; watched: Watched; path: (name: string) => string } {
  const type = `things${crypto.randomUUID().slice(0, 8)}`;
  const collection = `/apis/test.io/v1/${type}`;
  return {
    collection,
    watched: {
      what: type,
      paths: [["apis", "test.io", "v1", type]],
      mayBeAbsent: false,
    },
    path: (name) => `/apis/test.io/v1/namespaces/blue/${type}/${name}`,
  };
}

function thing(name: string, value = 1): Record<string, unknown> {
  return { metadata: { name, namespace: "blue" }, value };
}

interface Kept extends Sink {
  objects: Map<string, unknown>;
  listings: number;
  alives: number;
}

function makeSink(): Kept {
  let fresh = new Set<string>();
  const nameOf = (object: Record<string, unknown>) => (object["metadata"] as { name: string }).name;
  const kept: Kept = {
    objects: new Map(),
    listings: 0,
    alives: 0,
    begin: () => {
      fresh = new Set();
    },
    put: (object) => {
      fresh.add(nameOf(object));
      kept.objects.set(nameOf(object), object["value"]);
    },
    remove: (object) => void kept.objects.delete(nameOf(object)),
    listed: () => {
      kept.listings++;
      for (const name of kept.objects.keys()) if (!fresh.has(name)) kept.objects.delete(name);
    },
    alive: () => {
      kept.alives++;
    },
  };
  return kept;
}

/** Waits for what must come: the runner's own limit ends it when it does not. */
async function until(isTrue: () => boolean): Promise<void> {
  while (!isTrue()) await Bun.sleep(2);
}

/** Runs a watch around `act`, then ends it: it must end. */
async function watching(
  watched: Watched,
  act: (view: { sink: Kept; counts: ReturnType<typeof newCounts>; log: () => string }) => unknown,
  timing: Partial<WatchTiming> = {},
): Promise<void> {
  const host = makeHost({ level: "debug" });
  const kubeconfig = server.kubeconfig("token");
  const kube = await connect(host, { kubeconfig, kubeconfigIsExplicit: true, timeoutMs: 5000 });
  const end = new AbortController();
  const [sink, counts] = [makeSink(), newCounts()];
  const running = watchKind(host, kube, watched, {
    sink,
    signal: end.signal,
    counts,
    timing: { ...quick, ...timing },
  });
  try {
    await act({ sink, counts, log: () => host.written.stderr });
  } finally {
    end.abort();
    await running;
  }
}

test("lists all pages, then takes what is new, changed and gone", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  for (let i = 0; i < 7; i++) server.put(path(`t${i}`), thing(`t${i}`));
  await watching(
    watched,
    async ({ sink, counts }) => {
      await until(() => server.watches.count(collection) === 1);
      expect([...sink.objects.keys()]).toEqual(["t0", "t1", "t2", "t3", "t4", "t5", "t6"]);
      server.put(path("t7"), thing("t7"));
      server.put(path("t1"), thing("t1", 2));
      server.remove(path("t0"));
      await until(() => counts.events === 3);
      const rest = ["t2", "t3", "t4", "t5", "t6", "t7"].map((name) => [name, 1]);
      expect(Object.fromEntries(sink.objects)).toEqual({ t1: 2, ...Object.fromEntries(rest) });
      expect(counts).toEqual({ lists: 1, watches: 1, events: 3, garbage: 0, failures: 0 });
    },
    { pageItems: 3 },
  );
  await until(() => server.watches.count(collection) === 0);
});

test("a bookmark keeps it alive, and a cut watch resumes from there without a list", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  await watching(watched, async ({ sink, counts }) => {
    await until(() => server.watches.count(collection) === 1);
    const { alives } = sink;
    server.watches.bookmark();
    await until(() => sink.alives === alives + 1);
    server.watches.cut();
    server.put(path("while-away"), thing("while-away"));
    await until(() => sink.objects.has("while-away"));
    expect(counts.lists).toBe(1);
    expect(counts.watches).toBeGreaterThanOrEqual(2);
  });
});

test.each(["event", "status"] as const)(
  "410 as %s: lists again, and forgets what is gone",
  async (goneAs) => {
    const { watched, path, collection } = makeKind();
    server.serve(collection);
    server.put(path("old"), thing("old"));
    server.watches.goneAs = goneAs;
    await watching(watched, async ({ sink, counts, log }) => {
      await until(() => server.watches.count(collection) === 1);
      server.watches.isMute = true;
      server.remove(path("old"));
      server.put(path("new"), thing("new"));
      server.watches.compact();
      server.watches.isMute = false;
      server.watches.cut();
      await until(() => sink.objects.has("new"));
      expect([...sink.objects.keys()]).toEqual(["new"]);
      expect(counts.lists).toBe(2);
      // One is the connection that broke; to have been quiet for long is none.
      expect(counts.failures).toBe(1);
      expect(log().match(/warn: /g)).toHaveLength(1);
    });
  },
);

test.each([
  ["no JSON", "garbage\n"],
  ["half an object", '{"type":"ADDED","object":{"metadata":\n'],
  ["no name", '{"type":"ADDED","object":{"metadata":{"resourceVersion":"1"}}}\n'],
  ["no object", '{"type":"ADDED","object":7}\n'],
  ["no version", '{"type":"MODIFIED","object":{"metadata":{"name":"x"}}}\n'],
  ["an error", '{"type":"ERROR","object":{"kind":"Status","code":500,"message":"boom"}}\n'],
  ["nothing known", "[]\n"],
])("a line that is %s: lists again, because an event is lost", async (_, line) => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  await watching(watched, async ({ sink, counts, log }) => {
    await until(() => server.watches.count(collection) === 1);
    server.watches.send(collection, line);
    await until(() => counts.lists === 2);
    server.put(path("later"), thing("later"));
    await until(() => sink.objects.has("later"));
    expect(counts.failures).toBe(1);
    expect(log()).toContain(`Watch of ${watched.what} failed: `);
    expect(log()).toContain(`Watch of ${watched.what} is back`);
  });
});

test("an event in many pieces is one event", async () => {
  const { watched, collection } = makeKind();
  server.serve(collection);
  await watching(watched, async ({ sink, counts }) => {
    await until(() => server.watches.count(collection) === 1);
    const object = { metadata: { name: "ä€😀", resourceVersion: "9999" }, value: 5 };
    const line = Buffer.from(`${JSON.stringify({ type: "ADDED", object })}\n\n`);
    for (const byte of line) {
      server.watches.send(collection, Buffer.from([byte]).toString("latin1"), "latin1");
      await Bun.sleep(0);
    }
    await until(() => sink.objects.get("ä€😀") === 5);
    expect(counts.garbage).toBe(0);
  });
});

test("a silent connection is given up, and the kind listed again", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  await watching(
    watched,
    async ({ sink, log }) => {
      await until(() => server.watches.count(collection) === 1);
      server.watches.isMute = true;
      server.put(path("unheard"), thing("unheard"));
      await until(() => sink.objects.has("unheard"));
      server.watches.isMute = false;
      expect(log()).toContain("the connection was silent for 50 ms");
    },
    { idleMs: 50 },
  );
});

test("a quiet watch is ended by the server in time, and goes on without a list", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  const asked = server.requests.length;
  await watching(
    watched,
    async ({ sink, counts, log }) => {
      const { alives } = sink;
      await until(() => counts.watches >= 3);
      expect(sink.alives).toBeGreaterThanOrEqual(alives + 2);
      expect(log()).toBe("");
      server.put(path("next"), thing("next"));
      await until(() => sink.objects.has("next"));
      expect({ lists: counts.lists, failures: counts.failures }).toEqual({ lists: 1, failures: 0 });
    },
    { idleMs: 1_700 },
  );
  const queries = server.requests.slice(asked).map(({ path: url }) => url.split("?")[1] ?? "");
  const watches = queries.filter((query) => query.includes("watch=true"));
  expect(watches.length).toBeGreaterThanOrEqual(3);
  for (const query of watches) {
    expect(query).toContain("allowWatchBookmarks=true");
    expect(query).toContain("timeoutSeconds=1");
    expect(query).toContain(watches[0]?.match(/resourceVersion=\d+/)?.[0] ?? "no version");
  }
});

test("the silence that is allowed is longer than the server is asked to keep a watch", async () => {
  const { watched, collection } = makeKind();
  server.serve(collection);
  await watching(watched, () => until(() => server.watches.count(collection) === 1));
  const seconds = Number(server.requests.at(-1)?.path.match(/timeoutSeconds=(\d+)/)?.[1]);
  expect(seconds).toBeGreaterThan(30);
  expect(seconds * 1000).toBeLessThanOrEqual(watchTiming.idleMs * 0.8);
});

test("failures of a list are waited out, longer each time, and told once", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  server.put(path("there"), thing("there"));
  // A list is asked for twice within a call.
  const faults = ["reset", "reset", "half", "half"] as const;
  server.misbehave(
    { kind: "status", status: 403 },
    { kind: "garbage", text: "{}" },
    ...faults.map((kind) => ({ kind })),
    { kind: "status", status: 401 },
  );
  await watching(watched, async ({ sink, counts, log }) => {
    await until(() => sink.objects.has("there"));
    expect(counts.failures).toBe(5);
    expect(log().match(/warn: Watch of/g)).toHaveLength(1);
    expect(log()).toContain('grant these credentials the verb "list" on "things');
    expect(sink.listings).toBe(1);
  });
});

test("an unknown kind is empty where it may be absent, and found once it is there", async () => {
  const { watched, path, collection } = makeKind();
  const older = { ...watched, paths: [["apis", "test.io", "v2", watched.what], ...watched.paths] };
  await watching({ ...older, mayBeAbsent: true }, async ({ sink, counts }) => {
    await until(() => sink.listings >= 2);
    expect(sink.alives).toBeGreaterThanOrEqual(1);
    expect(counts).toMatchObject({ lists: 0, failures: 0 });
    server.serve(collection);
    server.put(path("t"), thing("t"));
    await until(() => sink.objects.has("t"));
    expect(counts.lists).toBe(1);
  });
});

test("a kind that is taken away while it is watched is empty, and known", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  server.put(path("t"), thing("t"));
  await watching({ ...watched, mayBeAbsent: true }, async ({ sink, counts }) => {
    await until(() => sink.objects.has("t") && server.watches.count(collection) === 1);
    const { alives, listings } = sink;
    server.unserve(collection);
    await until(() => sink.listings >= listings + 2);
    expect([...sink.objects.keys()]).toEqual([]);
    expect(sink.alives).toBeGreaterThan(alives);
    // The server sent no list: an absent kind counts as an empty one.
    expect(counts.lists).toBe(1);
  });
});

test("an unknown kind is a failure where it must be there", async () => {
  const { watched } = makeKind();
  await watching(watched, async ({ sink, counts }) => {
    await until(() => counts.failures >= 2);
    expect({ listings: sink.listings, alives: sink.alives }).toEqual({ listings: 0, alives: 0 });
  });
});

test("pause() ends with the signal", async () => {
  const end = new AbortController();
  let isOver = false;
  const paused = pause(3_600_000, end.signal).then(() => {
    isOver = true;
  });
  await Bun.sleep(0);
  expect(isOver).toBe(false);
  end.abort();
  await paused;
  expect(isOver).toBe(true);
  // One that begins after the signal has aborted is over at once, and nothing listens on.
  await expect(pause(3_600_000, end.signal)).resolves.toBeUndefined();
  expect(getEventListeners(end.signal, "abort")).toEqual([]);
});

test("narrows lists and watches down as it is told", async () => {
  const { watched, path, collection } = makeKind();
  server.serve(collection);
  server.put(path("a"), thing("a"));
  const before = server.requests.length;
  const query = { fieldSelector: "spec.nodeName=n1" };
  await watching({ ...watched, query }, async ({ sink, counts }) => {
    await until(() => counts.watches === 1);
    expect([...sink.objects.keys()]).toEqual(["a"]);
  });
  const asked = server.requests.slice(before).map((request) => new URL(request.path, "http://x"));
  expect(asked.length).toBeGreaterThan(1);
  const given = asked.map(({ searchParams }) => searchParams.get("fieldSelector"));
  expect(new Set(given)).toEqual(new Set(["spec.nodeName=n1"]));
});
