/**
 * lib/kubernetes/event.ts against the API server of apiserver.ts: what is posted, how often, and
 * how long.
 */
import { beforeEach, describe, expect, test } from "bun:test";
import { parseConfig } from "../lib/config/parse.ts";
import { type EventNote, postEvent } from "../lib/kubernetes/event.ts";
import type { Fault } from "./apiserver.ts";
import { makeHost } from "./fakes.ts";
import { fileApi, fileDir } from "./stage.ts";
import { control } from "./wire.ts";

const dir = fileDir();
const api = await fileApi(dir);
beforeEach(() => {
  api.requests.length = 0;
});

const configOf = (kubeconfig: string, more = "") =>
  parseConfig(`[kubernetes]\nkubeconfig = "${kubeconfig}"\n${more}`, "/p.toml");
const config = () => configOf(api.kubeconfig("token"));

let pods = 0;
/** About a pod of its own: Events of other tests are not in the way. */
const denied = (more: Partial<EventNote> = {}): EventNote => ({
  about: { kind: "Pod", apiVersion: "v1", namespace: "team", name: `web-${pods++}`, uid: "u-1" },
  type: "Warning",
  reason: "NetworkDenied",
  note: 'Access to network "storage" denied',
  ...more,
});
const collection = "/api/v1/namespaces/team/events";
const asked = () =>
  api.requests.map(({ method, path }) => `${method} ${path.replace(/[0-9a-f]{16}$/, "HASH")}`);
/** The Event that the last requests were about. */
const stored = () => api.object(api.requests[0]?.path ?? "");

describe("postEvent()", () => {
  test("posts an Event about an object", async () => {
    const event = denied();
    const { name } = event.about;
    expect(await postEvent(makeHost(), config(), event)).toBe(true);
    expect(asked()).toEqual([`GET ${collection}/${name}.HASH`, `POST ${collection}`]);
    const time = "2023-11-14T22:13:20Z";
    expect(stored()).toEqual({
      apiVersion: "v1",
      kind: "Event",
      metadata: {
        name: expect.stringMatching(new RegExp(`^${name}\\.[0-9a-f]{16}$`)),
        namespace: "team",
        uid: expect.any(String),
        resourceVersion: "1",
      },
      involvedObject: event.about,
      type: "Warning",
      reason: "NetworkDenied",
      message: event.note,
      source: { component: "genie" },
      reportingComponent: "genie",
      reportingInstance: "",
      firstTimestamp: time,
      lastTimestamp: time,
      count: 1,
    });
  });

  test("the same again counts, something else is an Event of its own", async () => {
    const event = denied();
    await postEvent(makeHost(), config(), event);
    await postEvent(makeHost({ now: 1_700_000_060_000 }), config(), event);
    expect(await postEvent(makeHost({ now: 1_700_000_120_000 }), config(), event)).toBe(true);
    expect(stored()).toMatchObject({
      count: 3,
      firstTimestamp: "2023-11-14T22:13:20Z",
      lastTimestamp: "2023-11-14T22:15:20Z",
    });
    api.requests.length = 0;
    await postEvent(makeHost(), config(), { ...event, note: "another" });
    expect(stored()).toMatchObject({ count: 1, message: "another" });
  });

  test("two at once leave one Event, and both are content", async () => {
    const event = denied();
    // Both look before either has posted.
    const both = Promise.withResolvers<void>();
    let looked = 0;
    api.gate = async ({ method }) => {
      if (method !== "GET") return;
      if (++looked === 2) both.resolve();
      await both.promise;
    };
    const posted = [1, 2].map(() => postEvent(makeHost(), config(), event));
    expect(await Promise.all(posted)).toEqual([true, true]);
    delete api.gate;
    expect(asked().filter((one) => one.startsWith("POST"))).toHaveLength(2);
    expect(stored()).toMatchObject({ count: 1 });
  });

  test("bounds and cleans its texts; what has no namespace is told of in default", async () => {
    const name = `${"n".repeat(199)}-.${"x".repeat(52)}`;
    const about = { kind: "Node", apiVersion: "v1", namespace: "", name, uid: "" };
    const note = `a\u001b[31m\nb${"c".repeat(2000)}`;
    await postEvent(makeHost(), config(), denied({ about, note }));
    const event = stored() as { metadata: { name: string; namespace: string }; message: string };
    expect(event.metadata.namespace).toBe("default");
    expect(event.metadata.name).toMatch(/^n{199}\.[0-9a-f]{16}$/);
    expect(event.message.length).toBe(1024);
    expect(event.message).not.toMatch(control);
  });

  const silent: [string, () => Parameters<typeof postEvent>][] = [
    ["without credentials", () => [makeHost(), parseConfig("", ""), denied()]],
    [
      "about nothing that has a name",
      () => {
        const about = { kind: "Pod", apiVersion: "v1", namespace: "", name: "", uid: "" };
        return [makeHost(), config(), denied({ about })];
      },
    ],
  ];
  test.each(silent)("asks nobody and says nothing %s", async (_, make) => {
    const parts = make();
    expect(await postEvent(...parts)).toBe(false);
    expect(api.requests).toEqual([]);
    expect((parts[0] as ReturnType<typeof makeHost>).written).toEqual({ stdout: "", stderr: "" });
  });

  const forbidden: Fault = { kind: "status", status: 403 };
  test.each([
    ["we may not look", [forbidden], /403 Forbidden, grant .* "get" on "events"/],
    ["we may not post", ["none", forbidden], /403 Forbidden, grant .* "create" on "events"/],
    ["no answer comes", [{ kind: "hang" }], /no answer within 100 ms/],
    ["the answer is garbage", [{ kind: "garbage", text: "{" }], /not a JSON object/],
  ] as [string, (Fault | "none")[], RegExp][])("gives up when %s", async (_, faults, said) => {
    const host = makeHost();
    api.misbehave(...faults);
    const short = configOf(api.kubeconfig("token"), 'timeout = "100ms"');
    const quick = faults.some((one) => one !== "none" && one.kind === "hang") ? short : config();
    expect(await postEvent(host, quick, denied())).toBe(false);
    expect(host.written.stderr).toMatch(said);
    expect(host.written.stderr).toContain("about=");
    expect(host.written.stderr).not.toContain(api.token);
    expect(host.written.stderr.trimEnd().split("\n")).toHaveLength(1);
  });

  test("gives up when its time is over in the middle of several requests", async () => {
    const host = makeHost();
    const short = configOf(api.kubeconfig("token"), 'timeout = "300ms"');
    // Each alone would be in time.
    api.misbehave({ kind: "delay", ms: 200 }, { kind: "delay", ms: 200 });
    expect(await postEvent(host, short, denied())).toBe(false);
    expect(host.written.stderr).toContain("Cannot post an Event: no answer within 300 ms");
  });

  test("ends at once when the process is asked to", async () => {
    const host = makeHost();
    host.abort();
    expect(await postEvent(host, config(), denied())).toBe(false);
    expect(api.requests).toEqual([]);
  });
});
