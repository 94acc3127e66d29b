/**
 * What a pod is told of its networks (lib/kubernetes/network_status.ts): when, what, and how it
 * gets to the API server
 * without ever failing an ADD.
 */
import { beforeEach, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { wantsStatus } from "../lib/attach.ts";
import type { Done, Plan } from "../lib/call.ts";
import { defaultConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { connect } from "../lib/kubernetes/client.ts";
import { makeStatus, publishStatus } from "../lib/kubernetes/network_status.ts";
import type { Attachment, Result } from "../lib/record.ts";
import type { Fault } from "./apiserver.ts";
import { makeHost } from "./fakes.ts";
import { fileApi, fileDir } from "./stage.ts";

const dir = fileDir();
const podPath = "/api/v1/namespaces/team/pods/web";
const pod = { namespace: "team", name: "web", uid: "u-1" };
const api = await fileApi(dir);
beforeEach(() => {
  api.requests.length = 0;
  const metadata = { ...pod, annotations: { own: "kept" } };
  api.put(podPath, { metadata });
});

const settings = (more: object = {}): Config["kubernetes"] => ({
  ...defaultConfig().kubernetes,
  kubeconfig: api.kubeconfig("token"),
  kubeconfigIsExplicit: true,
  ...more,
});

function attachment(part: Partial<Attachment>): Attachment {
  return {
    containerId: "c1",
    requestIfName: "eth0",
    requestNetwork: "genie",
    ifName: "eth0",
    primary: true,
    network: "blue",
    reason: "",
    list: {
      cniVersion: "1.0.0",
      name: "blue",
      disableCheck: false,
      disableGC: false,
      plugins: [{ type: "bridge" }],
    },
    plugins: ["/bin/bridge"],
    cniArgs: "",
    cniPath: "",
    capabilityArgs: {},
    args: {},
    timeoutMs: 1,
    netns: "/n",
    pod,
    ...part,
  };
}

const resultOf = (ifName: string, address: string): Result => ({
  interfaces: [{ name: ifName, mac: "02:00:00:00:00:01", sandbox: "/n" }],
  ips: [{ address, interface: 0 }],
  routes: [],
  dns: {},
});
const done = (part: Partial<Attachment>, address: string): Done => ({
  attachment: attachment(part),
  result: resultOf(part.ifName ?? "eth0", address),
});
const blue = () => done({}, "10.0.0.2/24");
const green = () => done({ ifName: "eth1", network: "green", primary: false }, "10.1.0.2/24");
const nad = (part: Partial<Attachment> = {}) =>
  done({ ifName: "net1", network: "team/net", primary: false, ...part }, "10.2.0.2/24");

/** The status of a pod with these attachments, its primary set being all but net1. */
function statusOf(
  attached: Done[],
  {
    decision = "cni",
    used = true,
    kubernetes = settings(),
    identity = pod,
  }: {
    decision?: Plan["decision"];
    used?: boolean;
    kubernetes?: Config["kubernetes"];
    identity?: typeof pod;
  } = {},
) {
  const names = attached.map((one) => one.attachment.ifName).filter((name) => name !== "net1");
  const plan: Plan = {
    pod: { ...identity, serviceAccount: undefined, annotations: new Map(), source: "runtime" },
    decision,
    primarySet: new Set(names),
    attachments: attached.map((one) => one.attachment),
  };
  const objects = {
    kube: () => Promise.reject(new Error("making a status sends nothing")),
    get: () => Promise.reject(new Error("making a status asks nothing")),
    used: () => used,
  };
  const config = { ...defaultConfig(), kubernetes };
  const host = makeHost();
  if (!wantsStatus({ host, config, objects }, plan)) return undefined;
  return makeStatus({ host, config, objects }, plan, attached);
}

const entry = (name: string, ifName: string, ip: string, isDefault: boolean) => ({
  name,
  interface: ifName,
  ips: [ip],
  mac: "02:00:00:00:00:01",
  default: isDefault,
  dns: {},
});

describe("makeStatus()", () => {
  test("tells of every attachment, the one with CNI_IFNAME being the default", async () => {
    const status = await statusOf([blue(), nad({ defaultRoute: ["10.2.0.1"] })]);
    expect(status).toMatchObject({ containerId: "c1", requestIfName: "eth0", pod, isInline: true });
    const { "k8s.v1.cni.cncf.io/network-status": text = "", ...others } = status?.annotations ?? {};
    expect(JSON.parse(text)).toEqual([
      entry("blue", "eth0", "10.0.0.2", true),
      { ...entry("team/net", "net1", "10.2.0.2", false), "default-route": ["10.2.0.1"] },
    ]);
    expect(others).toEqual({});
  });

  test.each<[Plan["decision"], boolean]>([
    ["cni", true],
    ["logical", true],
    ["default", false],
    ["choice", false],
    ["default-network", false],
  ])("multi-ip-preferences for a primary set of two, decided by %s: %p", async (decision, has) => {
    const status = await statusOf([blue(), green(), nad()], { decision });
    expect(status?.annotations["multi-ip-preferences"]).toBe(
      (has
        ? '{"multi_entry":2,"ips":{"ip1":{"ip":"10.0.0.2","interface":"eth0"},' +
          '"ip2":{"ip":"10.1.0.2","interface":"eth1"}}}'
        : undefined) as string,
    );
  });

  test("no multi-ip-preferences for cni of one network, whatever came besides", async () => {
    const status = await statusOf([blue(), nad()]);
    expect(Object.keys(status?.annotations ?? {})).toEqual(["k8s.v1.cni.cncf.io/network-status"]);
  });

  test("device-info is what the file says", async () => {
    const file = join(dir.path, "info.json");
    writeFileSync(file, '{"type":"pci","pci":{"pci-address":"0000:00:01.0"}}');
    const status = await statusOf([blue(), nad({ deviceInfoFile: file })]);
    const [, second] = JSON.parse(status?.annotations["k8s.v1.cni.cncf.io/network-status"] ?? "");
    expect(second["device-info"]).toEqual({ type: "pci", pci: { "pci-address": "0000:00:01.0" } });
    mkdirSync(join(dir.path, "folder"));
    const broken = await statusOf([nad({ deviceInfoFile: join(dir.path, "folder") })]);
    expect(broken?.annotations["k8s.v1.cni.cncf.io/network-status"]).not.toContain("device-info");
  });

  test.each<[string, Parameters<typeof statusOf>[1], boolean | undefined]>([
    ["inline, the API was asked", {}, true],
    ["inline, no request so far: it waits", { used: false }, false],
    ["agent", { kubernetes: { ...defaultConfig().kubernetes, status: "agent" } }, false],
    ["off", { kubernetes: { ...defaultConfig().kubernetes, status: "off" } }, undefined],
    ["no API to publish to", { used: false, kubernetes: defaultConfig().kubernetes }, undefined],
    ["a pod without a name", { identity: { ...pod, name: "" } }, undefined],
    ["a pod without a namespace", { identity: { ...pod, namespace: "" } }, undefined],
  ])("%s", async (_name, options, expected) => {
    expect((await statusOf([blue()], options))?.isInline).toBe(expected as boolean);
  });
});

const annotations = { "k8s.v1.cni.cncf.io/network-status": "[]", "multi-ip-preferences": "{}" };

/** Publishes, and tells what came of it. */
async function publish({
  faults = [],
  uid = "u-1",
  deadlineMs = Infinity,
  more = {},
}: {
  faults?: (Fault | "none")[];
  uid?: string;
  deadlineMs?: number;
  more?: object;
} = {}) {
  const host = makeHost();
  api.misbehave(...faults);
  const published = await publishStatus(
    host,
    () => connect(host, settings(more)),
    { pod: { ...pod, uid }, annotations },
    deadlineMs,
  );
  const metadata = api.object(podPath)?.["metadata"] as { annotations: object };
  return {
    published,
    asked: api.requests.map(({ method, path }) => `${method} ${path}`),
    annotations: metadata.annotations,
    stderr: host.written.stderr,
  };
}
const toStatus = `PATCH ${podPath}/status`;
const toPod = `PATCH ${podPath}`;
const fault = (status: number): Fault => ({ kind: "status", status });
const good = { published: true, stderr: "", annotations: { own: "kept", ...annotations } };
const bad = { published: false, annotations: { own: "kept" } };

describe("publishStatus()", () => {
  test("is one merge-patch of pods/status with the uid as its condition", async () => {
    expect(await publish()).toEqual({ ...good, asked: [toStatus] });
    const [request] = api.requests;
    expect(request?.contentType).toBe("application/merge-patch+json");
    expect(JSON.parse(request?.body ?? "")).toEqual({ metadata: { annotations, uid: "u-1" } });
  });

  test("has no condition where the runtime named no uid", async () => {
    expect(await publish({ uid: "" })).toEqual({ ...good, asked: [toStatus] });
    expect(JSON.parse(api.requests[0]?.body ?? "")).toEqual({ metadata: { annotations } });
  });

  test.each([403, 404, 405])("falls back to pods on %d", async (status) => {
    expect(await publish({ faults: [fault(status)] })).toEqual({
      ...good,
      asked: [toStatus, toPod],
    });
  });

  test.each<[string, Fault[], number]>([
    ["409", [fault(409)], 2],
    ["409 twice", [fault(409), fault(409)], 3],
    ["500", [fault(500)], 2],
    ["503 for some time", [fault(503), fault(503), fault(503)], 4],
    ["429", [{ kind: "status", status: 429, retryAfter: "0" }], 2],
    ["a broken connection", [{ kind: "reset" }], 2],
  ])("goes on after %s", async (_name, faults, count) => {
    expect(await publish({ faults })).toEqual({ ...good, asked: Array(count).fill(toStatus) });
  });

  test("a pod made anew is never told: 409", async () => {
    expect(await publish({ uid: "u-0" })).toEqual({
      ...bad,
      asked: [toStatus, toStatus, toStatus],
      stderr: expect.stringMatching(
        /^genie: warn: Cannot publish network status: .* pods\/status team\/web .*409 .*\n$/,
      ),
    });
  });

  test("a pod that is gone", async () => {
    api.remove(podPath);
    const host = makeHost();
    const kube = () => connect(host, settings());
    expect(await publishStatus(host, kube, { pod, annotations }, Infinity)).toBe(false);
    expect(host.written.stderr).toContain("404, it does not exist");
    expect(api.requests).toHaveLength(2);
  });

  test.each<[string, Fault[], object, number, string]>([
    ["rights for neither", [fault(403), fault(403)], {}, 2, 'the verb "patch" on "pods"'],
    ["401", [fault(401)], {}, 1, "401 Unauthorized"],
    ["a redirect", [{ kind: "redirect", location: "https://x" }], {}, 1, "a redirect, is refused"],
    ["a hang", [{ kind: "hang" }], { timeoutMs: 200 }, 1, "no answer within 200 ms"],
    ["500 for ever", Array(6).fill(fault(500)), {}, 6, "status 500"],
    ["50 MB", [{ kind: "flood", bytes: 50 * 2 ** 20 }], {}, 1, "the answer is larger than"],
    ["no JSON", [{ kind: "garbage", text: "<html>" }], {}, 1, "the answer is not a JSON object"],
  ])("gives up with a warning at %s", async (_name, faults, more, count, part) => {
    const { asked, stderr, published } = await publish({ faults, more });
    expect([published, asked.length]).toEqual([false, count]);
    expect(stderr).toStartWith("genie: warn: Cannot publish network status: ");
    expect(stderr).toContain(part);
    expect(stderr.trimEnd().split("\n")).toHaveLength(1);
  });

  test("repeats nothing once its time is over", async () => {
    const deadlineMs = makeHost().now();
    const { asked, published } = await publish({ faults: [fault(409)], deadlineMs });
    expect([published, asked.length]).toEqual([false, 1]);
  });

  test("repeats nothing when it is asked to end", async () => {
    const host = makeHost();
    api.misbehave(fault(409));
    api.gate = async () => host.abort();
    const kube = () => connect(host, settings());
    expect(await publishStatus(host, kube, { pod, annotations }, Infinity)).toBe(false);
    delete api.gate;
    expect(api.requests).toHaveLength(1);
  });

  test("credentials that went away are a warning too", async () => {
    const host = makeHost();
    const kube = () => connect(host, settings({ kubeconfig: "/none/kubeconfig" }));
    expect(await publishStatus(host, kube, { pod, annotations }, Infinity)).toBe(false);
    expect(host.written.stderr).toContain("/none/kubeconfig: it does not exist");
  });
});
