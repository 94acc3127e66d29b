/**
 * Kubernetes networks through the compiled program: pods that name objects of the API, a TLS API
 * server that speaks the real paths and status codes, fake plugins. Real plugins and the kernel:
 * real_kubernetes.test.ts.
 */
import { Database } from "bun:sqlite";
import { afterEach, beforeEach, describe, expect, test } from "bun:test";
import {
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type Fault, startApiServer } from "./apiserver.ts";
import { calls, forgetCalls, type GenieRun, tempDir } from "./fakes.ts";
import { type Peer, startKubelet } from "./podresources.ts";
import { fileApi, fileDir } from "./stage.ts";
import {
  checkFailure,
  left,
  makeNode,
  type Node,
  nothing,
  wire,
  wireError,
  writeTable,
} from "./wire.ts";

const dir = fileDir();
const networksKey = "k8s.v1.cni.cncf.io/networks";
const statusKey = "k8s.v1.cni.cncf.io/network-status";
const defaultKey = "v1.multus-cni.io/default-network";
const podPath = "/api/v1/namespaces/team/pods/web";
const nadPath = (namespace: string, name: string) =>
  `/apis/k8s.cni.cncf.io/v1/namespaces/${namespace}/network-attachment-definitions/${name}`;
const alpha = "/apis/alpha.network.k8s.io/v1";

const api = await fileApi(dir);

type Annotations = Record<string, string>;
const putPod = (annotations: Annotations = {}, more: object = {}) =>
  api.put(podPath, {
    metadata: { name: "web", namespace: "team", uid: "u-1", annotations, ...more },
    spec: { serviceAccountName: "runner" },
  });
const putNad = (namespace: string, name: string, config?: object, annotations: Annotations = {}) =>
  api.put(nadPath(namespace, name), {
    apiVersion: "k8s.cni.cncf.io/v1",
    kind: "NetworkAttachmentDefinition",
    metadata: { name, namespace, annotations },
    spec: config === undefined ? {} : { config: JSON.stringify(config) },
  });

beforeEach(() => {
  api.requests.length = 0;
  putPod();
  putNad("team", "a", { cniVersion: "1.0.0", type: "macvlan", master: "eth0" });
  putNad("team", "b", { cniVersion: "0.4.0", plugins: [{ type: "ptp" }, { type: "tuning" }] });
  putNad("infra", "c", { cniVersion: "1.0.0", name: "own-name", type: "macvlan" });
});
afterEach(() => {
  delete api.gate;
  api.heal();
});

const reserve = "$DIR/reserved";
const single = (name: string, type: string, more: object = {}) => ({
  cniVersion: "1.0.0",
  name,
  plugins: [{ type, ...more }],
});

/** A node with networks of its own and credentials; `top` comes before the tables. */
function makeCluster({
  table = "",
  kubernetes = "",
  defaults = 'networks = ["blue"]',
  kubeconfig = api.kubeconfig("tokenFile"),
  macvlan = {},
  lists = {},
}: {
  table?: string;
  kubernetes?: string;
  defaults?: string;
  kubeconfig?: string;
  macvlan?: object;
  lists?: Record<string, object>;
} = {}): Node {
  const settings = `kubeconfig = "${kubeconfig}"\n${kubernetes}`;
  return makeNode({
    table: `[default]\n${defaults}\n[kubernetes]\n${settings}\n${table}`,
    lists: {
      "10-blue.conflist": single("blue", "bridge", {
        ipam: { type: "host-local", ranges: [[{ subnet: "10.244.0.0/16" }]] },
      }),
      "20-green.conflist": single("green", "ptp"),
      ...lists,
    },
    delegates: {
      bridge: { reserve, ips: ["10.0.0.2/24"] },
      ptp: { reserve, ips: ["10.1.0.2/24"] },
      macvlan: {
        reserve,
        ips: ["10.2.0.2/24", "fd02::2/64"],
        mac: "02:00:00:00:00:02",
        ...macvlan,
      },
      tuning: { chain: "pass" },
    },
  });
}

const podArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;K8S_POD_UID=u-1";

/** One call for team/web; with annotations the runtime hands them over. */
function call(node: Node, command: string, annotations?: Annotations, args = podArgs) {
  const runtimeConfig = annotations && { "io.kubernetes.cri.pod-annotations": annotations };
  const stdin = runtimeConfig ? { runtimeConfig } : {};
  return wire(node, { command, env: { CNI_ARGS: args }, stdin });
}

interface Added {
  interfaces: { name: string; sandbox?: string }[];
}
/** ADD that must succeed, in silence. */
async function add(node: Node, annotations?: Annotations, args = podArgs): Promise<Added> {
  const run = await call(node, "ADD", annotations, args);
  expect([run.status, run.stderr, run.status === 0 ? "" : run.stdout]).toEqual([0, "", ""]);
  return JSON.parse(run.stdout);
}

/** Without the Events that a denial is told by. */
const asked = () =>
  api.requests
    .filter(({ path }) => !path.includes("/events"))
    .map(({ method, path }) => `${method} ${path}`);
const inPod = (result: Added) =>
  result.interfaces.filter(({ sandbox }) => sandbox !== undefined).map(({ name }) => name);
/** The config a plugin got, by command and interface. */
function given(node: Node, plugin: string, ifName: string, command = "ADD") {
  const found = calls(node.bin, plugin).find(
    (one) => one.command === command && one.env["CNI_IFNAME"] === ifName,
  );
  return JSON.parse(found?.stdin ?? "null") as Record<string, unknown>;
}
function annotationsOfPod(): Annotations {
  const { metadata } = api.object(podPath) ?? {};
  return (metadata as { annotations: Annotations }).annotations;
}
function statusOfPod(): { name: string; interface: string; default: boolean }[] {
  return JSON.parse(annotationsOfPod()[statusKey] ?? "[]");
}
/** Status that waits in the record: `pod uid keys`. */
function waiting(node: Node): string[] {
  using database = new Database(join(node.state, "genie.db"), { readonly: true });
  const rows = database.query("SELECT * FROM statuses").all() as Record<string, string>[];
  return rows.map((row) => Object.values(row).join(" "));
}
/** DEL succeeds, leaves nothing, and asks nobody. */
async function del(node: Node, annotations?: Annotations): Promise<void> {
  const before = api.requests.length;
  const run = await call(node, "DEL", annotations);
  expect([run.status, run.stdout, run.stderr]).toEqual([0, "", ""]);
  expect(left(node)).toEqual(nothing);
  expect(waiting(node)).toEqual([]);
  expect(api.requests.slice(before)).toEqual([]);
}
/** An ADD that fails, with nothing attached and nothing left; DEL then succeeds without the API. */
async function refused(node: Node, annotations?: Annotations): Promise<GenieRun> {
  const run = await call(node, "ADD", annotations);
  checkFailure(run);
  expect(run.stdout + run.stderr).not.toContain(api.token);
  expect(calls(node.bin)).toEqual([]);
  expect(left(node)).toEqual(nothing);
  const before = api.requests.length;
  const ended = await call(node, "DEL", annotations);
  expect([ended.status, ended.stdout]).toEqual([0, ""]);
  expect(left(node)).toEqual(nothing);
  expect(api.requests.slice(before)).toEqual([]);
  // Without a record, that DEL was a guess from the node's own networks.
  forgetCalls(node.bin);
  return run;
}

describe("requests", () => {
  const all = "a,infra/c,b,a@x5";

  test("one GET per distinct object, one PATCH, DEL without any", async () => {
    using node = makeCluster();
    const result = await add(node, { [networksKey]: all });
    expect(inPod(result)).toEqual(["eth0", "net1", "net2", "net3", "x5"]);
    expect(asked().slice(0, -1).sort()).toEqual(
      [nadPath("infra", "c"), nadPath("team", "a"), nadPath("team", "b")].map(
        (one) => `GET ${one}`,
      ),
    );
    expect(asked().at(-1)).toBe(`PATCH ${podPath}/status`);
    expect(statusOfPod().map((one) => [one.name, one.interface, one.default])).toEqual([
      ["blue", "eth0", true],
      ["team/a", "net1", false],
      ["infra/c", "net2", false],
      ["team/b", "net3", false],
      ["team/a", "x5", false],
    ]);
    expect(waiting(node)).toEqual([]);
    expect((await call(node, "CHECK", { [networksKey]: all })).stdout).toBe("");
    await del(node, { [networksKey]: all });
    expect(asked()).toHaveLength(4);
  });

  test("one more for the pod where the runtime hands nothing over", async () => {
    putPod({ [networksKey]: "a", cni: "green" });
    using node = makeCluster();
    expect(inPod(await add(node))).toEqual(["eth0", "net1"]);
    expect(asked()).toEqual([
      `GET ${podPath}`,
      `GET ${nadPath("team", "a")}`,
      `PATCH ${podPath}/status`,
    ]);
    await del(node);
  });

  test("none for networks on disk and annotations of the runtime; the status waits", async () => {
    using node = makeCluster();
    await add(node, { cni: "blue,green@eth5" });
    expect(asked()).toEqual([]);
    const [row = "", ...others] = waiting(node);
    expect(others).toEqual([]);
    expect(row).toStartWith("c1 eth0 team web u-1 {");
    expect(row).toContain("multi-ip-preferences");
    await del(node, { cni: "blue,green@eth5" });
    expect(asked()).toEqual([]);
  });

  test("the GETs are in flight together", async () => {
    using node = makeCluster();
    const arrived = new Set<string>();
    const { promise, resolve } = Promise.withResolvers<void>();
    // Nobody gets an answer before all have asked: in turn, the first would wait for ever.
    api.gate = async ({ method, path }) => {
      if (method !== "GET") return;
      arrived.add(path);
      if (arrived.size === 3) resolve();
      await promise;
    };
    await add(node, { [networksKey]: "a,b,infra/c" });
    expect(arrived.size).toBe(3);
    await del(node);
  });

  test("a service account that decides is asked for once", async () => {
    using node = makeCluster({
      table: '[plugins.green]\nallow = { service_accounts = ["team/runner"] }',
    });
    await add(node, { cni: "blue,green,green" });
    expect(asked()).toEqual([`GET ${podPath}`, `PATCH ${podPath}/status`]);
    await del(node);
  });
});

describe("what a pod asks of a NetworkAttachmentDefinition", () => {
  const capabilities = {
    ips: true,
    mac: true,
    portMappings: true,
    bandwidth: true,
    infinibandGUID: true,
  };
  const values: Record<string, unknown> = {
    ips: ["10.2.0.9/24"],
    mac: "02:23:45:67:89:01",
    portMappings: [{ hostPort: 8080, containerPort: 80 }],
    bandwidth: { ingressRate: 2048, ingressBurst: 300 },
    "infiniband-guid": "24:8a:07:03:00:8d:ae:2f",
  };

  test("reaches the plugins that declare it, and args key by key", async () => {
    putNad("team", "a", {
      cniVersion: "1.0.0",
      plugins: [
        { type: "macvlan", capabilities, args: { cni: { keep: 1, color: "old" }, other: 2 } },
        { type: "tuning", capabilities: { mac: true } },
      ],
    });
    using node = makeCluster();
    const element = {
      name: "a",
      interface: "x1",
      ...values,
      "cni-args": { color: "new", more: [] },
    };
    await add(node, { [networksKey]: JSON.stringify([element]) });
    expect(given(node, "macvlan", "x1")).toMatchObject({
      name: "a",
      runtimeConfig: {
        ips: ["10.2.0.9/24"],
        mac: "02:23:45:67:89:01",
        portMappings: [{ hostPort: 8080, containerPort: 80, protocol: "tcp" }],
        bandwidth: { ingressRate: 2048, ingressBurst: 300 },
        infinibandGUID: "24:8a:07:03:00:8d:ae:2f",
      },
      args: { cni: { keep: 1, color: "new", more: [] }, other: 2 },
    });
    expect(given(node, "tuning", "x1")).toMatchObject({
      runtimeConfig: { mac: "02:23:45:67:89:01" },
      args: { cni: { color: "new", more: [] } },
    });
    // Nothing of it concerns the default network.
    expect(Object.keys(given(node, "bridge", "eth0"))).not.toContain("runtimeConfig");
    await del(node);
    expect(given(node, "macvlan", "x1", "DEL")["runtimeConfig"]).toEqual(
      given(node, "macvlan", "x1")["runtimeConfig"],
    );
  });

  const strict = Object.keys(values).filter((key) => key !== "ips" && key !== "mac");
  test.each(strict)("fact 31: %s that no plugin declares fails", async (key) => {
    using node = makeCluster();
    const text = JSON.stringify([{ name: "a", [key]: values[key] }]);
    const { code, msg } = wireError(await refused(node, { [networksKey]: text }));
    const capability = key === "infiniband-guid" ? "infinibandGUID" : key;
    expect([code, msg]).toEqual([
      7,
      `Cannot attach network "team/a": the pod asks for "${capability}", and no plugin of ` +
        "NetworkAttachmentDefinition team/a declares that capability",
    ]);
  });

  const heard = { ips: ["10.9.0.50", "fd09::50/64"], mac: "02:11:22:33:44:55" };
  const ips = ["10.9.0.50/24", "fd09:0::50/64"];
  test.each<[string, object, object, string | undefined]>([
    ["both", heard, { ips, mac: heard.mac.toUpperCase() }, undefined],
    ["the address alone", { ips: ["10.9.0.50/16"] }, { ips }, undefined],
    ["another address", heard, { ips: ["10.9.0.2/24"], mac: heard.mac }, "ips 10.9.0.50, which"],
    ["another MAC", heard, { ips }, `mac ${heard.mac}, which "macvlan" does not take`],
    ["no MAC", { mac: heard.mac }, { ips: [], mac: "" }, "(it has none)"],
  ])("fact 31: ips and mac without a capability, the result has %s", async (...row) => {
    const [, asked, macvlan, part] = row;
    using node = makeCluster({ macvlan });
    const annotations = { [networksKey]: JSON.stringify([{ name: "a", ...asked }]) };
    if (part === undefined) {
      await add(node, annotations);
      return;
    }
    const run = await call(node, "ADD", annotations);
    checkFailure(run);
    const { code, msg } = wireError(run);
    expect([code, msg]).toEqual([7, expect.stringContaining(part)]);
    expect(msg).toContain("declare the capability");
    expect(left(node)).toEqual(nothing);
  });

  test("fact 31: what the plugins of that network alone get in CNI_ARGS, in DEL too", async () => {
    putNad("team", "a", { cniVersion: "1.0.0", type: "macvlan", ipam: { type: "host-local" } });
    const able = { cniVersion: "1.0.0", type: "macvlan", capabilities: { ips: true } };
    putNad("team", "b", { ...able, ipam: { type: "static" } });
    using node = makeCluster({ macvlan: { ips, mac: heard.mac } });
    const elements = [
      { name: "a", ...heard },
      { name: "b", ...heard },
      { name: "a", ips: ["10.9.0.50"] },
    ];
    await add(node, { [networksKey]: JSON.stringify(elements) });
    expect((await call(node, "DEL")).status).toBe(0);
    const argsOf = (ifName: string, command = "ADD") =>
      calls(node.bin).find(
        ({ env }) => env["CNI_IFNAME"] === ifName && env["CNI_COMMAND"] === command,
      )?.env["CNI_ARGS"] ?? "";
    expect(argsOf("eth0")).not.toContain("MAC=");
    // Several addresses of host-local go into args.cni; what is declared, not into CNI_ARGS.
    expect(argsOf("net1")).toStartWith(`IgnoreUnknown=1;MAC=${heard.mac};`);
    expect(given(node, "macvlan", "net1")["args"]).toEqual({
      cni: { ips: ["10.9.0.50", "fd09::50"] },
    });
    expect(argsOf("net2")).toBe(argsOf("net1"));
    expect(given(node, "macvlan", "net2")["runtimeConfig"]).toEqual({ ips: heard.ips });
    expect(argsOf("net3")).toStartWith("IgnoreUnknown=1;IP=10.9.0.50;");
    expect(argsOf("net3", "DEL")).toBe(argsOf("net3"));
  });

  test("an ipam-claim-reference is for plugins that know it, and fails nobody", async () => {
    putNad("team", "a", { type: "macvlan", capabilities: { "ipam-claim-reference": true } });
    using node = makeCluster();
    const claim = { "ipam-claim-reference": "vm.blue" };
    await add(node, {
      [networksKey]: JSON.stringify([
        { name: "a", ...claim },
        { name: "b", ...claim },
      ]),
    });
    expect(given(node, "macvlan", "net1")["runtimeConfig"]).toEqual(claim);
    expect(Object.keys(given(node, "ptp", "net2"))).not.toContain("runtimeConfig");
    await del(node);
  });

  test.each<[string, string, number, string]>([
    ["a malformed annotation", "a,,b", 7, 'element 2 of "a,,b" is empty'],
    ["JSON that is cut", '[{"name":"a"', 6, "it is not valid JSON"],
    ["two with one interface", "a@x,b@x", 105, 'Interface name "x" is wanted by'],
    ["the interface of the default network", "a@eth0,b@eth0", 105, '"eth0" is wanted by'],
    ["an object that is not there", "none", 101, "NetworkAttachmentDefinition team/none does not"],
    ["one of a namespace that is not there", "no/a", 101, "NetworkAttachmentDefinition no/a does"],
  ])("%s fails the pod", async (_name, text, code, part) => {
    using node = makeCluster();
    expect(wireError(await refused(node, { [networksKey]: text }))).toMatchObject({
      code,
      msg: expect.stringContaining(part),
    });
  });

  test("what fails leaves nothing, and publishes nothing", async () => {
    using node = makeCluster({
      macvlan: { ADD: { error: { code: 100, msg: "no address left" } } },
    });
    const run = await call(node, "ADD", { [networksKey]: "b,a" });
    expect(wireError(run)).toMatchObject({
      code: 100,
      msg: expect.stringContaining(
        'network "team/a" (net2) of pod team/web: plugin "macvlan" failed',
      ),
    });
    expect(left(node)).toEqual(nothing);
    const done = calls(node.bin).map(({ plugin, command, env }) =>
      [plugin, command, env["CNI_IFNAME"]].join(" "),
    );
    expect(done).toEqual([
      "bridge ADD eth0",
      "ptp ADD net1",
      "tuning ADD net1",
      "macvlan ADD net2",
      "macvlan DEL net2",
      "tuning DEL net1",
      "ptp DEL net1",
      "bridge DEL eth0",
    ]);
    expect(asked().filter((one) => one.startsWith("PATCH"))).toEqual([]);
    await del(node);
  });
});

describe("the other ways to name an object", () => {
  test("v1.multus-cni.io/default-network is the whole primary set", async () => {
    using node = makeCluster();
    const annotations = { [defaultKey]: "infra/c", cni: "blue,green", [networksKey]: "b" };
    expect(inPod(await add(node, annotations))).toEqual(["eth0", "net1"]);
    expect(given(node, "macvlan", "eth0")["name"]).toBe("own-name");
    expect(statusOfPod().map((one) => [one.name, one.interface, one.default])).toEqual([
      ["infra/c", "eth0", true],
      ["team/b", "net1", false],
    ]);
    await del(node);
  });

  test("default.always with a namespace is an object, for all but the system's pods", async () => {
    using node = makeCluster({ defaults: 'networks = ["blue"]\nalways = ["infra/c@m1", "green"]' });
    expect(inPod(await add(node, {}))).toEqual(["eth0", "m1", "net1"]);
    await del(node);
    api.requests.length = 0;
    const system = podArgs.replace("=team", "=kube-system");
    expect(inPod(await add(node, {}, system))).toEqual(["eth0"]);
    expect(asked()).toEqual([]);
    await del(node);
  });

  const ways: [string, Annotations, string][] = [
    ["networks", { [networksKey]: "infra/c" }, ""],
    ["networks in JSON", { [networksKey]: '{"name":"c","namespace":"infra"}' }, ""],
    ["default-network", { [defaultKey]: "infra/c" }, ""],
    ["default-network in JSON", { [defaultKey]: '[{"name":"c","namespace":"infra"}]' }, ""],
    ["default.always", {}, '\nalways = ["infra/c"]'],
  ];
  test.each(ways)("isolation holds for %s", async (_name, annotations, always) => {
    const defaults = `networks = ["blue"]${always}`;
    {
      using node = makeCluster({ defaults, kubernetes: "namespace_isolation = true" });
      const { code, msg } = wireError(await refused(node, annotations));
      expect([code, msg]).toEqual([
        100,
        'Access to network "infra/c" denied for pod team/web: namespaces are isolated, and ' +
          "kubernetes.global_namespaces has default",
      ]);
      // It is not even read.
      expect(asked()).toEqual([]);
    }
    const open = 'namespace_isolation = true\nglobal_namespaces = ["infra"]';
    using node = makeCluster({ defaults, kubernetes: open });
    await add(node, annotations);
    await del(node);
  });

  test("isolation leaves a pod its own namespace", async () => {
    using node = makeCluster({ kubernetes: "namespace_isolation = true\nglobal_namespaces = []" });
    await add(node, { [networksKey]: "a,team/b" });
    await del(node);
  });

  const deny = 'deny = { namespaces = ["team"] }';
  test.each<[string, string, Annotations]>([
    ["the table's name", `[plugins.store]\nconf = "40-disk.conflist"\n${deny}`, { cni: "store" }],
    ["the CNI name", `[plugins.store]\nconf = "40-disk.conflist"\n${deny}`, { cni: "vault" }],
    ["the file name", `[plugins.store]\nconf = "40-disk.conflist"\n${deny}`, { cni: "disk" }],
    ["the file's stem", `[plugins.store]\nconf = "40-disk.conflist"\n${deny}`, { cni: "40-disk" }],
    ["the CNI name, listed by file", `[plugins.disk]\n${deny}`, { cni: "vault" }],
    ["an object without a config", `[plugins.disk]\n${deny}`, { [networksKey]: "vault" }],
    ["a default network", `[plugins.disk]\n${deny}`, { [defaultKey]: "vault" }],
    [
      "a logical network",
      `[plugins.store]\nconf = "40-disk.conflist"\n${deny}`,
      { cni: "", networks: "hidden" },
    ],
  ])("the table's rules hold for a list by %s", async (_name, table, annotations) => {
    putNad("team", "vault");
    api.put(`${alpha}/namespaces/team/logicalnetworks/hidden`, {
      metadata: { name: "hidden", namespace: "team" },
      spec: { plugin: "40-disk" },
    });
    using node = makeCluster({ table, lists: { "40-disk.conflist": single("vault", "ptp") } });
    expect(wireError(await refused(node, annotations))).toMatchObject({
      code: 100,
      msg: expect.stringMatching(/^Access to network ".*" denied for pod team\/web: plugins\./),
    });
  });
});

describe("CNI-Genie's logical networks", () => {
  const logical = (name: string, spec: object) =>
    api.put(`${alpha}/namespaces/team/logicalnetworks/${name}`, {
      apiVersion: "alpha.network.k8s.io/v1",
      kind: "Logicalnetwork",
      metadata: { name, namespace: "team" },
      spec,
    });
  beforeEach(() => {
    api.put(`${alpha}/namespaces/team/physicalnetworks/phy`, {
      kind: "Physicalnetwork",
      metadata: { name: "phy", namespace: "team" },
      spec: {
        refer_nic: "eth7",
        sharedStatus: { plugin: "blue", subnet: "10.244.0.0/16", dedicatedNet: true },
      },
    });
    logical("net1", { physicalNet: "phy", sub_subnet: "10.244.3.0/24" });
    logical("net2", { plugin: "green" });
    logical("hidden", { plugin: "green" });
  });
  const annotations = { cni: "", networks: "net1@eth0,net2" };

  test("cni empty and networks: the sub-subnet goes into the plugin's IPAM", async () => {
    using node = makeCluster();
    expect(inPod(await add(node, annotations))).toEqual(["eth0", "eth1"]);
    expect(given(node, "bridge", "eth0")["ipam"]).toEqual({
      type: "host-local",
      ranges: [[{ subnet: "10.244.0.0/16", rangeStart: "10.244.3.0", rangeEnd: "10.244.3.255" }]],
    });
    expect(asked().sort()).toEqual(
      [
        `GET ${alpha}/logicalnetworks`,
        `GET ${alpha}/namespaces/team/logicalnetworks/net1`,
        `GET ${alpha}/namespaces/team/logicalnetworks/net2`,
        `GET ${alpha}/namespaces/team/physicalnetworks/phy`,
        `PATCH ${podPath}/status`,
      ].sort(),
    );
    expect(statusOfPod().map((one) => [one.name, one.interface, one.default])).toEqual([
      ["team/net1", "eth0", true],
      ["team/net2", "eth1", false],
    ]);
    expect(JSON.parse(annotationsOfPod()["multi-ip-preferences"] ?? "")).toEqual({
      multi_entry: 2,
      ips: {
        ip1: { ip: "10.0.0.2", interface: "eth0" },
        ip2: { ip: "10.1.0.2", interface: "eth1" },
      },
    });
    await del(node, annotations);
  });

  test("a broken rule fails the pod", async () => {
    logical("net2", { plugin: "blue", sub_subnet: "10.244.3.128/25" });
    using node = makeCluster();
    expect(wireError(await refused(node, annotations))).toMatchObject({
      code: 7,
      msg: expect.stringContaining(
        "sub_subnet 10.244.3.0/24 overlaps 10.244.3.128/25 of team/net2",
      ),
    });
    logical("net2", { plugin: "green" });
  });
});

describe("device plugins", () => {
  const resource = { "k8s.v1.cni.cncf.io/resourceName": "intel.com/sriov" };
  const devices = [{ "intel.com/sriov": ["0000:01:02.1", "0000:01:02.2"] }];
  beforeEach(() => {
    putNad(
      "team",
      "vf",
      {
        cniVersion: "1.0.0",
        plugins: [
          { type: "macvlan", capabilities: { deviceID: true, CNIDeviceInfoFile: true } },
          { type: "tuning" },
        ],
      },
      resource,
    );
    putNad("team", "vf2", { cniVersion: "1.0.0", type: "macvlan" }, resource);
  });

  /** A node whose kubelet allocated these devices to team/web. */
  async function withKubelet(
    fn: (node: Node, kubelet: Peer) => Promise<void>,
    containers: Record<string, string[]>[] = devices,
  ): Promise<void> {
    using folder = tempDir();
    const resources = join(folder.path, "pod-resources");
    mkdirSync(resources);
    using node = makeCluster({ kubernetes: `kubelet_dir = "${folder.path}"` });
    await using kubelet = await startKubelet(resources, [
      { namespace: "team", name: "web", containers },
    ]);
    symlinkSync(kubelet.socket, join(resources, "kubelet.sock"));
    await fn(node, kubelet);
  }

  test("the device goes into every plugin's config and record; DEL asks nobody", async () => {
    await withKubelet(async (node, kubelet) => {
      await add(node, { [networksKey]: "vf,a,vf2" });
      const first = { deviceID: "0000:01:02.1", pciBusID: "0000:01:02.1" };
      expect(given(node, "macvlan", "net1")).toMatchObject({
        ...first,
        runtimeConfig: {
          deviceID: "0000:01:02.1",
          CNIDeviceInfoFile: "/var/run/k8s.cni.cncf.io/devinfo/cni/vf-c1_net1",
        },
      });
      expect(given(node, "tuning", "net1")).toMatchObject(first);
      expect(Object.keys(given(node, "macvlan", "net2"))).not.toContain("deviceID");
      expect(given(node, "macvlan", "net3")).toMatchObject({ deviceID: "0000:01:02.2" });
      expect(kubelet.calls).toEqual(["Get"]);
      using database = new Database(join(node.state, "genie.db"), { readonly: true });
      const rows = database.query("SELECT plan FROM attachments ORDER BY position").all();
      const plans = rows.map((row) => JSON.parse((row as { plan: string }).plan).device);
      expect(plans).toEqual([
        undefined,
        { resourceName: "intel.com/sriov", deviceId: "0000:01:02.1" },
        undefined,
        { resourceName: "intel.com/sriov", deviceId: "0000:01:02.2" },
      ]);
      await kubelet[Symbol.asyncDispose]();
      await del(node);
      expect(kubelet.calls).toEqual(["Get"]);
      expect(given(node, "macvlan", "net1", "DEL")).toMatchObject(first);
    });
  });

  test("the kubelet is asked only for networks that name a resource", async () => {
    await withKubelet(async (node, kubelet) => {
      await add(node, { [networksKey]: "a,b" });
      expect(kubelet.calls).toEqual([]);
      await del(node);
    });
  });

  test("fewer devices than networks fail the pod", async () => {
    await withKubelet(
      async (node) => {
        expect(wireError(await refused(node, { [networksKey]: "vf,vf2" }))).toMatchObject({
          code: 7,
          msg: expect.stringContaining('device 2 of "intel.com/sriov": it was allocated 1'),
        });
      },
      [{ "intel.com/sriov": ["0000:01:02.1"] }],
    );
  });

  test("a kubelet that is away: try again later, and nothing attached", async () => {
    await withKubelet(async (node, kubelet) => {
      await kubelet[Symbol.asyncDispose]();
      const folder = join(kubelet.socket, "..");
      for (const name of readdirSync(folder)) unlinkSync(join(folder, name));
      expect(wireError(await refused(node, { [networksKey]: "vf" }))).toMatchObject({
        code: 11,
        msg: expect.stringContaining("from the kubelet at "),
      });
      rmSync(folder, { recursive: true });
      expect(wireError(await refused(node, { [networksKey]: "vf" })).code).toBe(11);
    });
  });
});

describe("status", () => {
  const annotations = { [networksKey]: "a" };

  test("agent: no PATCH, the row waits, DEL takes it away", async () => {
    using node = makeCluster({ kubernetes: 'status = "agent"' });
    await add(node, annotations);
    expect(asked()).toEqual([`GET ${nadPath("team", "a")}`]);
    const [row = ""] = waiting(node);
    expect(row).toContain('\\"name\\":\\"team/a\\"');
    await del(node);
  });

  test("off: nothing", async () => {
    using node = makeCluster({ kubernetes: 'status = "off"' });
    await add(node, annotations);
    expect([asked(), waiting(node)]).toEqual([[`GET ${nadPath("team", "a")}`], []]);
    await del(node);
  });

  const none = "none" as const;
  test.each<[string, (Fault | "none")[], string]>([
    ["rights for no pods", Array(2).fill({ kind: "status", status: 403 }), '"patch" on "pods"'],
    ["a server that fails", Array(20).fill({ kind: "status", status: 500 }), "status 500"],
    ["a hang", [{ kind: "hang" }], "no answer within 1500 ms"],
    ["an expired token", [{ kind: "status", status: 401 }], `${join("api", "token")}`],
  ])("%s never fails the ADD: a warning, and the row waits", async (_name, faults, part) => {
    using node = makeCluster({ kubernetes: 'timeout = "1500ms"' });
    api.misbehave(none, ...faults);
    const run = await call(node, "ADD", annotations);
    expect(inPod(JSON.parse(run.stdout))).toEqual(["eth0", "net1"]);
    expect(run.stderr.trimEnd().split("\n")).toHaveLength(1);
    expect(run.stderr).toStartWith("genie: warn: Cannot publish network status: ");
    expect(run.stderr).toContain(part);
    expect(run.status).toBe(0);
    expect(statusOfPod()).toEqual([]);
    expect(waiting(node)).toHaveLength(1);
    await del(node);
  });

  test("a server that fails slowly is not asked again after kubernetes.timeout", async () => {
    using node = makeCluster({ kubernetes: 'timeout = "2s"' });
    const parts = [1950, "HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n"];
    api.misbehave(none, { kind: "raw", parts, ending: "end" });
    expect((await call(node, "ADD", annotations)).status).toBe(0);
    expect(asked()).toEqual([`GET ${nadPath("team", "a")}`, `PATCH ${podPath}/status`]);
    expect(waiting(node)).toHaveLength(1);
    await del(node);
  });

  test("a pod made anew meanwhile is not told: the uid is a condition", async () => {
    putPod({}, { uid: "u-2" });
    using node = makeCluster();
    const run = await call(node, "ADD", annotations);
    expect(run.status).toBe(0);
    expect(run.stderr).toContain("409 Conflict");
    expect(statusOfPod()).toEqual([]);
    await del(node);
  });

  test("a conflict passes", async () => {
    using node = makeCluster();
    api.misbehave(none, { kind: "status", status: 409 }, { kind: "status", status: 503 });
    await add(node, annotations);
    expect(statusOfPod()).toHaveLength(2);
    await del(node);
  });
});

describe("pods from the API", () => {
  test("a pod that is gone, or made anew, is no success", async () => {
    using node = makeCluster();
    putPod({}, { uid: "u-2" });
    expect(wireError(await refused(node))).toMatchObject({
      code: 11,
      msg: expect.stringContaining("it was made anew, its uid is u-2"),
    });
    api.remove(podPath);
    expect(wireError(await refused(node))).toMatchObject({
      code: 11,
      msg: expect.stringContaining("does not know it any more"),
    });
  });

  test("a static pod, which the kubelet knows by its mirror's hash", async () => {
    using node = makeCluster();
    putPod({ [networksKey]: "a", "kubernetes.io/config.mirror": "u-1" }, { uid: "u-9" });
    expect(inPod(await add(node))).toEqual(["eth0", "net1"]);
    expect(statusOfPod()).toHaveLength(2);
    await del(node);
  });
});

describe("a Multus config with only its type changed", () => {
  const multus = (node: Node, more: object = {}) => ({
    name: "multus-cni-network",
    kubeconfig: api.kubeconfig("token"),
    confDir: node.conf,
    clusterNetwork: join(node.conf, "10-blue.conflist"),
    defaultNetworks: ["green"],
    multusNamespace: "infra",
    logFile: join(node.dir, "multus.log"),
    logLevel: "debug",
    ...more,
  });
  const run = (node: Node, command: string, more: object = {}) =>
    wire(node, { command, env: { CNI_ARGS: podArgs }, stdin: multus(node, more) });

  test("ADD, CHECK and DEL; the pod's annotations come from the API", async () => {
    putPod({ [networksKey]: "infra/c" });
    using node = makeCluster();
    const added = await run(node, "ADD");
    expect(added.status).toBe(0);
    expect(inPod(JSON.parse(added.stdout))).toEqual(["eth0", "net1", "net2"]);
    expect(asked()).toEqual([
      `GET ${podPath}`,
      ...[nadPath("infra", "green"), nadPath("infra", "c")].map((path) => `GET ${path}`),
      `PATCH ${podPath}/status`,
    ]);
    expect(statusOfPod().map(({ name }) => name)).toEqual(["blue", "green", "infra/c"]);
    expect(await Bun.file(join(node.dir, "multus.log")).text()).toContain("debug: attached");
    expect((await run(node, "CHECK")).stdout).toBe("");
    expect((await run(node, "DEL")).status).toBe(0);
    expect([left(node), asked().length]).toEqual([nothing, 4]);
  });

  test("an ADD waits for the readiness file, in its time", async () => {
    using node = makeCluster();
    const file = join(node.dir, "ready");
    const waits = run(node, "ADD", { readinessindicatorfile: file, defaultNetworks: [] });
    // Whenever this comes, before or after the ADD looks for it: then the ADD goes on.
    writeFileSync(file, "");
    expect((await waits).status).toBe(0);
    await run(node, "DEL");
    writeTable(node, 'timeout = "1s"');
    const late = await run(node, "ADD", { readinessindicatorfile: `${file}-not` });
    expect(wireError(late)).toMatchObject({
      code: 11,
      msg: `Cannot attach yet: the default network is not ready, ${file}-not does not exist`,
    });
    expect(left(node)).toEqual(nothing);
  });
});

describe("when the API is slow, wrong or away", () => {
  const annotations = { [networksKey]: "a" };
  const half: Fault[] = [{ kind: "half" }, { kind: "half" }];
  const broken: Fault[] = [{ kind: "reset" }, { kind: "reset" }];
  const rows: [string, Fault[], string][] = [
    ["401", [{ kind: "status", status: 401 }], "(credentials: "],
    ["half an answer", half, "the connection failed"],
    ["a broken connection", broken, "the connection failed"],
    ["50 MB", [{ kind: "flood", bytes: 50 * 2 ** 20 }], "the answer is larger than 8388608 bytes"],
    [
      "a redirect",
      [{ kind: "redirect", location: "https://127.0.0.1/" }],
      "a redirect, is refused",
    ],
    ["a hang", [{ kind: "hang" }], "no answer within 300 ms"],
    ["a server that fails", Array(2).fill({ kind: "status", status: 500 }), "status 500"],
    ["no JSON", [{ kind: "garbage", text: "<html>" }], "the answer is not a JSON object"],
    ["a list for an object", [{ kind: "garbage", text: "[]" }], "the answer is not a JSON object"],
  ];
  const slow = 'timeout = "300ms"';

  test.each(rows)("%s, for a network: one line, code 11, nothing", async (name, faults, part) => {
    using node = makeCluster({ kubernetes: name === "a hang" ? slow : "" });
    api.misbehave(...faults);
    const { code, msg } = wireError(await refused(node, annotations));
    expect([code, msg]).toEqual([11, expect.stringContaining(part)]);
    expect(msg).toStartWith(
      `Cannot get network-attachment-definitions.k8s.cni.cncf.io team/a at ${api.url}: `,
    );
    expect(msg).toEndWith(join("api", "token)"));
  });

  test.each(rows)("%s, for the pod: one line, code 11, nothing", async (name, faults, part) => {
    putPod(annotations);
    using node = makeCluster({ kubernetes: name === "a hang" ? slow : "" });
    api.misbehave(...faults);
    const { code, msg } = wireError(await refused(node));
    expect([code, msg]).toEqual([11, expect.stringContaining(part)]);
    expect(msg).toStartWith(`Cannot get pods team/web at ${api.url}: `);
  });

  test("a whole ADD has its own limit, whatever one request may take", async () => {
    using node = makeCluster();
    const table = readFileSync(node.tableFile, "utf8");
    writeTable(node, `timeout = "2s"\n${table.slice(table.indexOf("[default]"))}`);
    api.misbehave({ kind: "hang" });
    const { code, msg } = wireError(await refused(node, annotations));
    expect([code, msg]).toEqual([11, expect.stringMatching(/: no answer within 1?\d{1,3} ms/)]);
  });

  test("403 names the verb and the resource to grant", async () => {
    using node = makeCluster();
    api.misbehave({ kind: "status", status: 403 });
    expect(wireError(await refused(node, annotations))).toMatchObject({
      code: 11,
      msg: expect.stringContaining(
        'grant these credentials the verb "get" on ' +
          '"network-attachment-definitions.k8s.cni.cncf.io"',
      ),
    });
    putPod(annotations);
    api.misbehave({ kind: "status", status: 403 });
    expect(wireError(await refused(node)).msg).toContain('the verb "get" on "pods"');
    api.put(`${alpha}/namespaces/team/logicalnetworks/l`, {
      metadata: { name: "l", namespace: "team" },
      spec: { plugin: "blue", sub_subnet: "10.244.1.0/24" },
    });
    api.misbehave("none", { kind: "status", status: 403 });
    const { msg } = wireError(await refused(node, { cni: "", networks: "l" }));
    expect(msg).toContain('the verb "list" on "logicalnetworks.alpha.network.k8s.io"');
  });

  test("a token that expired names its file, and a new one serves at once", async () => {
    using own = tempDir();
    const other = await startApiServer(own.path, { keepAlive: false });
    try {
      other.put(nadPath("team", "a"), { metadata: {}, spec: { config: '{"type":"macvlan"}' } });
      using node = makeCluster({ kubeconfig: other.kubeconfig("tokenFile") });
      const { token } = other;
      other.token = "another";
      const { code, msg } = wireError(await refused(node, annotations));
      expect([code, msg]).toEqual([11, expect.stringContaining("401 Unauthorized")]);
      expect(msg).toEndWith(`(credentials: ${own.path}/kubeconfig-tokenFile, ${own.path}/token)`);
      other.token = token;
      expect((await call(node, "ADD", annotations)).status).toBe(0);
    } finally {
      await other.stop();
    }
  });

  test("a server that is away, and one of another authority", async () => {
    using own = tempDir();
    const other = await startApiServer(own.path);
    const kubeconfig = other.kubeconfig("token");
    const wrongCa = other.kubeconfig("wrongCa");
    {
      using node = makeCluster({ kubeconfig: wrongCa });
      expect(wireError(await refused(node, annotations))).toMatchObject({
        code: 11,
        msg: expect.stringContaining("certificate is not valid for our CA"),
      });
      expect(other.requests).toEqual([]);
    }
    await other.stop();
    using node = makeCluster({ kubeconfig });
    expect(wireError(await refused(node, annotations))).toMatchObject({
      code: 11,
      msg: expect.stringMatching(
        /^Cannot get .* team\/a at https:.*: the connection failed \(.*\) \(credentials: .*\)$/,
      ),
    });
  });

  test.each<[string, string, number]>([
    ["a kubeconfig that is not there", "/none/kubeconfig", 5],
    ["a kubeconfig that is none", "/etc/hostname", 7],
  ])("%s is named", async (_name, kubeconfig, code) => {
    using node = makeCluster({ kubeconfig });
    const error = wireError(await refused(node, annotations));
    expect([error.code, error.msg]).toEqual([code, expect.stringContaining(kubeconfig)]);
  });

  test("the first failure in the pod's order is told, whichever came first", async () => {
    using node = makeCluster();
    const { promise, resolve } = Promise.withResolvers<void>();
    api.gate = async ({ path }) => {
      if (path.endsWith("/late")) await promise;
      else queueMicrotask(resolve);
    };
    const { msg } = wireError(await refused(node, { [networksKey]: "late,early" }));
    expect(msg).toContain("team/late does not exist");
  });

  test("DEL of what is attached needs no API, whatever became of it", async () => {
    using own = tempDir();
    const other = await startApiServer(own.path, { keepAlive: false });
    using node = makeCluster({ kubeconfig: other.kubeconfig("token") });
    other.put(nadPath("team", "a"), { metadata: {}, spec: { config: '{"type":"macvlan"}' } });
    await call(node, "ADD", annotations);
    expect(left(node).rows).toHaveLength(2);
    await other.stop();
    rmSync(own.path, { recursive: true });
    await del(node, annotations);
    expect(asked()).toEqual([]);
  });
});
