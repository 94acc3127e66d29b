/** Who is the pod, and what does it ask: the five sources, and which of them asks nobody. */
import { beforeEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import type { Request } from "../lib/call.ts";
import { withStdinConfig } from "../lib/config/foreign_config.ts";
import { defaultConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { findPod } from "../lib/plan.ts";
import { annotationsCapability, carriedPod, delegateArgs, type Pod } from "../lib/pod.ts";
import { parseArgs, podIdentity } from "../lib/request.ts";
import { makeHost } from "./fakes.ts";
import { failureOfAsync, fileApi, fileDir, says } from "./stage.ts";

/** Finds the pod of a call as ADD does. */
const lookupPod = (config: Config, request: Request): Promise<Pod> =>
  findPod({ host: makeHost(), config, request });

const dir = fileDir();
const api = await fileApi(dir);
beforeEach(() => {
  api.requests.length = 0;
  api.put(path, { kind: "Pod", metadata, spec: { serviceAccountName: "db" } });
});

const path = "/api/v1/namespaces/blue/pods/web";
const metadata = {
  name: "web",
  namespace: "blue",
  uid: "u-1",
  annotations: { cni: "calico,weave", "a/b": "c" },
};

/** A request that carries this. */
function requestOf(args: string, config: object = {}): Request {
  return {
    command: "ADD",
    containerId: "c1",
    netns: "/n",
    ifName: "eth0",
    args,
    path: [],
    cniVersion: "1.1.0",
    config: { name: "genie", type: "genie", ...config },
  };
}

const handed = (annotations: unknown) => ({
  runtimeConfig: { [annotationsCapability]: annotations },
});
const mesos = (labels: unknown) => ({
  args: { "org.apache.mesos": { network_info: { name: "genie", labels } } },
});
const label = (key: string, value?: unknown) => ({ key, ...(value !== undefined && { value }) });
const k8sArgs =
  "IgnoreUnknown=1;K8S_POD_NAMESPACE=blue;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1;" +
  "K8S_POD_UID=u-1";

/** The config of a node with credentials. */
function withApi(kind: "token" | "wrongCa" = "token"): Config {
  const kubernetes = { kubeconfig: api.kubeconfig(kind) };
  return withStdinConfig(defaultConfig(), { name: "genie", kubernetes });
}

/** What a call throws, as the runtime sees it, the server's address left out. */
const failure = (act: () => unknown) => failureOfAsync(act, [api.url, "URL"]);

describe("parseArgs()", () => {
  test.each<[string, string, [string, string][]]>([
    ["nothing", "", []],
    [
      "pairs",
      "a=1;b=2",
      [
        ["a", "1"],
        ["b", "2"],
      ],
    ],
    [
      "fact 24: values with =",
      "a=b=c;d==",
      [
        ["a", "b=c"],
        ["d", "="],
      ],
    ],
    ["an empty value", "a=", [["a", ""]]],
    ["pieces that are no pair", ";;a;=b;c=d;", [["c", "d"]]],
    ["the last of two", "a=1;a=2", [["a", "2"]]],
    ["a space around a key, values as they are", " a = 1 ", [["a", " 1 "]]],
    ["a key that could change every object", "__proto__=1", [["__proto__", "1"]]],
  ])("reads %s", (_name, args, pairs) => {
    expect([...parseArgs(args)]).toEqual(pairs);
  });
});

describe("delegateArgs()", () => {
  test.each([
    ["fact 24: IgnoreUnknown of Nomad", "IgnoreUnknown=true;NOMAD_JOB_ID=a", undefined],
    ["fact 24: IgnoreUnknown of others", "IgnoreUnknown=1;K8S_POD_NAME=a=b", undefined],
    ["an argument it does not know, without IgnoreUnknown", "FOO=1", undefined],
    ["fact 24: our own keys", "A=1;cni=a,b;networks=n;K8S_ANNOT={};B=2", "A=1;B=2"],
    ["our own keys with spaces", " cni = a;A=1", "A=1"],
    ["our own key of two lines", "cni=a\nb;A=1", "A=1"],
    ["keys that only look like ours", "cnix;CNI=a;cni2=b;networksx", undefined],
    ["our own key without value", "cni;A=1", "A=1"],
    ["nothing", "", undefined],
    ["empty pieces", ";A=1;;", "A=1"],
    [
      "an address for its own interface",
      "IP=10.0.0.5;MAC=02:00:00:00:00:01;GATEWAY=10.0.0.1",
      undefined,
    ],
  ])("%s", (_name, args, expected) => {
    expect(delegateArgs(args, true)).toBe(expected ?? args);
  });

  test.each([
    [
      "address, MAC and gateway",
      "A=1;IP=10.0.0.5;MAC=02:00:00:00:00:01;GATEWAY=10.0.0.1;B=2",
      "A=1;B=2",
    ],
    ["keys that only look like them", "IPS=1;IP6=2;ip=3;MACVLAN=4", "IPS=1;IP6=2;ip=3;MACVLAN=4"],
    ["our own keys", "cni=a;A=1", "A=1"],
  ])("of a further network: %s", (_name, args, expected) => {
    expect(delegateArgs(args, false)).toBe(expected);
  });
});

test("podIdentity() reads what Kubernetes sends, in any order", () => {
  const blue = { namespace: "blue", name: "web", uid: "u-1" };
  expect(podIdentity(k8sArgs)).toEqual(blue);
  expect(podIdentity(k8sArgs.split(";").reverse().join(";"))).toEqual(blue);
  expect(podIdentity("")).toEqual({ namespace: "", name: "", uid: "" });
});

/** A pod in short: where it is from and what it says. */
const pod = (source: Pod["source"], annotations: Record<string, string>, known = true): Pod => ({
  ...(known
    ? { namespace: "blue", name: "web", uid: "u-1" }
    : { namespace: "", name: "", uid: "" }),
  serviceAccount: undefined,
  annotations: new Map(Object.entries(annotations)),
  source,
});

describe("lookupPod() without a request", () => {
  const big = { cni: "a", note: "x".repeat(256 * 1024 - 8) };
  test.each<[string, Request, Pod]>([
    [
      "the runtime's annotations",
      requestOf(k8sArgs, handed({ cni: "a" })),
      pod("runtime", { cni: "a" }),
    ],
    ["an empty map of the runtime", requestOf(k8sArgs, handed({})), pod("runtime", {})],
    ["256 KiB of annotations", requestOf(k8sArgs, handed(big)), pod("runtime", big)],
    [
      "the runtime before all others",
      requestOf(`${k8sArgs};cni=c`, {
        ...mesos({ labels: [label("cni", "b")] }),
        ...handed({ cni: "a" }),
      }),
      pod("runtime", { cni: "a" }),
    ],
    [
      "Mesos labels before CNI_ARGS",
      requestOf("cni=c", mesos({ labels: [label("cni", "b"), label("x", "y")] })),
      pod("mesos", { cni: "b", x: "y" }, false),
    ],
    [
      "a Mesos label without value",
      requestOf("", mesos({ labels: [label("cni")] })),
      pod("mesos", { cni: "" }, false),
    ],
    ["Mesos without labels", requestOf("", mesos(undefined)), pod("mesos", {}, false)],
    [
      "Mesos with labels that are null",
      requestOf("", mesos({ labels: null })),
      pod("mesos", {}, false),
    ],
    [
      "Mesos without network_info",
      requestOf("", { args: { "org.apache.mesos": {} } }),
      pod("mesos", {}, false),
    ],
    [
      "the K8S_ANNOT of CNI_ARGS",
      requestOf(`${k8sArgs};K8S_ANNOT={"cni":"a,b","x":"="};cni=c`),
      pod("cni-args", { cni: "a,b", x: "=" }),
    ],
    [
      "fact 24: the bare keys of Nomad",
      requestOf("IgnoreUnknown=true;NOMAD_ALLOC_ID=1;cni=calico,weave@eth4"),
      pod("cni-args", { cni: "calico,weave@eth4" }, false),
    ],
    [
      "bare keys for logical networks",
      requestOf("cni=;networks=n1@eth0,n2"),
      pod("cni-args", { cni: "", networks: "n1@eth0,n2" }, false),
    ],
    ["nothing at all", requestOf(""), pod("none", {}, false)],
    [
      "a namespace without name",
      requestOf("K8S_POD_NAMESPACE=blue"),
      { ...pod("none", {}, false), namespace: "blue" },
    ],
    [
      "the lone K8S_POD_NAME of podman",
      requestOf("IgnoreUnknown=1;K8S_POD_NAME=web;MAC=c2:11:22:33:44:55"),
      { ...pod("none", {}, false), name: "web" },
    ],
  ])("%s", async (_name, request, expected) => {
    expect(await lookupPod(withApi(), request)).toEqual(expected);
    expect(api.requests).toEqual([]);
  });

  test("nowhere, on a node without credentials", async () => {
    const found = await lookupPod(defaultConfig(), requestOf(k8sArgs));
    expect(found).toEqual(pod("none", {}));
  });

  test("keys that could change every object stay keys", () => {
    const annotations = JSON.parse('{"__proto__":"a","constructor":"b"}');
    const found = carriedPod(requestOf("", handed(annotations)));
    expect([...(found?.annotations ?? [])]).toEqual([
      ["__proto__", "a"],
      ["constructor", "b"],
    ]);
    expect(found?.annotations.get("cni")).toBeUndefined();
  });
});

describe("lookupPod() refuses", () => {
  const long = { cni: "a", note: "x".repeat(256 * 1024) };
  test.each<[string, Request, number, string]>([
    [
      "annotations that are a list",
      requestOf("", handed([])),
      7,
      `Invalid ${annotationsCapability}: they are not`,
    ],
    ["annotations that are text", requestOf("", handed("cni=a")), 7, "they are not an object"],
    [
      "an annotation that is no text",
      requestOf("", handed({ cni: ["a"] })),
      7,
      'the value of "cni" is not',
    ],
    [
      "an annotation key of two lines",
      requestOf("", handed({ "a\nb": 1 })),
      7,
      'the value of "a b" is',
    ],
    ["more than 256 KiB", requestOf("", handed(long)), 7, "longer than 262144 characters"],
    [
      "Mesos labels that are text",
      requestOf("", mesos("cni")),
      7,
      "Invalid Mesos labels: they are not a list",
    ],
    [
      "Mesos labels that are an object",
      requestOf("", mesos({ labels: {} })),
      7,
      "they are not a list",
    ],
    ["a Mesos label that is text", requestOf("", mesos({ labels: ["cni"] })), 7, "one has no key"],
    [
      "a Mesos label whose value is no text",
      requestOf("", mesos({ labels: [label("cni", ["a"])] })),
      7,
      'Invalid Mesos labels: the value of "cni" is no string',
    ],
    ["a K8S_ANNOT that is no JSON", requestOf("K8S_ANNOT={cni"), 6, "Cannot decode K8S_ANNOT"],
    [
      "a K8S_ANNOT that is a list",
      requestOf('K8S_ANNOT=["cni"]'),
      7,
      "Invalid K8S_ANNOT: they are not",
    ],
    ["a deep K8S_ANNOT", requestOf(`K8S_ANNOT=${"[".repeat(100_000)}`), 6, "nests deeper"],
  ])("%s", async (_name, request, number, part) => {
    const error = await failure(() => lookupPod(withApi(), request));
    expect(error).toEqual(says(number, part));
    expect(api.requests).toEqual([]);
  });
});

describe("lookupPod() asks the API", () => {
  test("for the pod, once", async () => {
    expect(await lookupPod(withApi(), requestOf(k8sArgs))).toEqual({
      namespace: "blue",
      name: "web",
      uid: "u-1",
      serviceAccount: "db",
      annotations: new Map(Object.entries(metadata.annotations)),
      source: "api",
    });
    expect(api.requests.map(({ method, path: asked }) => `${method} ${asked}`)).toEqual([
      `GET ${path}`,
    ]);
  });

  test("and takes the uid from it where the runtime gives none", async () => {
    const args = "K8S_POD_NAMESPACE=blue;K8S_POD_NAME=web";
    expect((await lookupPod(withApi(), requestOf(args))).uid).toBe("u-1");
  });

  test("where the runtime hands over null", async () => {
    const request = requestOf(k8sArgs, handed(null));
    expect((await lookupPod(withApi(), request)).source).toBe("api");
  });

  test("and a pod without annotations asks for nothing", async () => {
    api.put(path, { kind: "Pod", metadata: { ...metadata, annotations: null } });
    const { annotations, serviceAccount } = await lookupPod(withApi(), requestOf(k8sArgs));
    expect({ annotations, serviceAccount }).toEqual({
      annotations: new Map(),
      serviceAccount: undefined,
    });
  });

  test("by the keys of a CNI-Genie config alone", async () => {
    const policy = {
      type: "k8s",
      k8s_api_root: `${api.url}/api/v1/`,
      k8s_auth_token: api.token,
      k8s_certificate_authority: join(api.dir, "ca.crt"),
    };
    const config = withStdinConfig(defaultConfig(), { name: "genie", policy });
    expect((await lookupPod(config, requestOf(k8sArgs))).source).toBe("api");
  });

  const other = k8sArgs.replace("u-1", "u-2");
  test.each<[string, string, () => void, string]>([
    [
      "a pod that is gone",
      k8sArgs,
      () => api.remove(path),
      "Cannot attach pod blue/web: URL does not know it any more",
    ],
    [
      "a pod that was made anew",
      other,
      () => undefined,
      "Cannot attach pod blue/web: it was made anew, its uid is u-1 and the runtime asks for u-2",
    ],
    ["a server that says no", k8sArgs, () => api.misbehave({ kind: "status", status: 403 }), "403"],
    [
      "an answer that is no pod",
      k8sArgs,
      () => api.misbehave({ kind: "garbage", text: "{}" }),
      "the answer is no object of the API",
    ],
    [
      "annotations that are no text",
      k8sArgs,
      () => api.put(path, { kind: "Pod", metadata: { ...metadata, annotations: { cni: 1 } } }),
      "the answer is no pod",
    ],
  ])("fact 23: %s is for later", async (_name, args, prepare, part) => {
    prepare();
    const error = await failure(() => lookupPod(withApi(), requestOf(args)));
    expect(error).toEqual(says(11, part));
    expect(error.msg).not.toContain(api.token);
  });

  test("fact 23: a server of another authority is for later, and gets no token", async () => {
    const request = requestOf(k8sArgs);
    const error = await failure(() => lookupPod(withApi("wrongCa"), request));
    expect(error).toEqual(says(11, "URL"));
    expect(api.requests).toEqual([]);
  });

  test("a kubeconfig that was named and is missing is not a pod without wishes", async () => {
    const kubernetes = { kubeconfig: "/nowhere/kubeconfig" };
    const config = withStdinConfig(defaultConfig(), { name: "genie", kubernetes });
    expect(await failure(() => lookupPod(config, requestOf(k8sArgs)))).toEqual(
      says(5, "/nowhere/kubeconfig"),
    );
  });

  test.each([
    ["climbs", "K8S_POD_NAMESPACE=..;K8S_POD_NAME=secrets"],
    ["holds a slash", "K8S_POD_NAMESPACE=blue;K8S_POD_NAME=../secrets/x"],
    ["holds a newline", "K8S_POD_NAMESPACE=blue;K8S_POD_NAME=a\nb"],
    ["holds NUL", "K8S_POD_NAMESPACE=blue\0;K8S_POD_NAME=a"],
  ])("no name that %s reaches the server", async (_name, args) => {
    expect(await failure(() => lookupPod(withApi(), requestOf(args)))).toEqual(
      says(7, "of a Kubernetes object"),
    );
    expect(api.requests).toEqual([]);
  });
});
