/**
 * Kubernetes networks for real: the reference plugins, network namespaces, and a TLS API server
 * inside the node's own. Above all who has the default route, in the result and in the kernel.
 */
import { describe, expect, test } from "bun:test";
import { appendFileSync } from "node:fs";
import { join } from "node:path";
import { startNodeCluster } from "./fixtures/quirks/cluster.ts";
import {
  expectKernel,
  hostLocal,
  kernelNetwork,
  type Node,
  noTraces,
  type Pod,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { reasonToSkip } from "./skip.ts";

const missing = reasonToSkip(...realNeeds, "curl");

const networksKey = "k8s.v1.cni.cncf.io/networks";
const statusKey = "k8s.v1.cni.cncf.io/network-status";

/** A node with an API server of its own. */
interface Cluster {
  node: Node;
  pod: Pod;
  /** Makes objects, by path. */
  put: (objects: Record<string, object>) => void;
  /** `GET /path` of all requests so far. */
  asked: () => string[];
  /** The status annotation of the pod. */
  status: () => Record<string, unknown>[];
}

const nadPath = (name: string) =>
  `/apis/k8s.cni.cncf.io/v1/namespaces/default/network-attachment-definitions/${name}`;
const nad = (name: string, config: object) => ({
  [nadPath(name)]: {
    metadata: { name, namespace: "default" },
    spec: { config: JSON.stringify({ cniVersion: "1.0.0", ...config }) },
  },
});
const bridge = (node: Node, name: string, subnets: string[], more: object = {}) => ({
  type: "bridge",
  bridge: `${name}0`,
  ipam: hostLocal(node, subnets),
  ...more,
});

/** Calls `fn` with a node that has one bridge network, blue, for pods that ask for nothing. */
async function withCluster(
  subnets: string[],
  fn: (cluster: Cluster) => Promise<void>,
): Promise<void> {
  await withNode(async (node) => {
    await using cluster = await startNodeCluster(node);
    const { kubeconfig, put, requests } = cluster;
    node.network("blue", {
      cniVersion: "1.0.0",
      plugins: [bridge(node, "blue", subnets, { isDefaultGateway: true })],
    });
    appendFileSync(
      join(node.dir, "plugins.toml"),
      `[default]\nnetworks = ["blue"]\n[kubernetes]\nkubeconfig = "${kubeconfig}"\n`,
    );
    const pod = node.pod();
    const podPath = `/api/v1/namespaces/default/pods/p-${pod.containerId}`;
    put({ [podPath]: { metadata: { name: `p-${pod.containerId}`, namespace: "default" } } });
    await fn({
      node,
      pod,
      put,
      asked: () => requests().map(({ method, path }) => `${method} ${path}`),
      status: () => {
        const body = requests().findLast(({ method }) => method === "PATCH")?.body ?? "{}";
        return JSON.parse(JSON.parse(body).metadata?.annotations[statusKey] ?? "[]");
      },
    });
  });
}

const [blue4, blue6] = ["10.231.0.0/24", "fd42:231::/64"];
const [red4, red6] = ["10.232.0.0/24", "fd42:232::/64"];
const [green4, green6] = ["10.233.0.0/24", "fd42:233::/64"];
const first = (subnet: string) => subnet.replace(/0?\/\d+$/, "1");
const gateways = (...subnets: string[]) => subnets.map(first).sort();

describe.skipIf(missing !== undefined)("NetworkAttachmentDefinitions, for real:", () => {
  test("ips and mac where nothing declares them, also where no result has a MAC", async () => {
    await withCluster([blue4], async ({ node, pod, put }) => {
      const old = (name: string, config: object) => ({
        [nadPath(name)]: { metadata: { name }, spec: { config: JSON.stringify(config) } },
      });
      put({
        ...nad("red", bridge(node, "red", [red4, red6])),
        // Without a version it is 0.1.0, whose results have neither interfaces nor MAC.
        ...old("old", bridge(node, "old", [green4])),
        ...nad("deaf", { type: "ptp", ipam: hostLocal(node, [green4]) }),
      });
      const [mac, other] = ["02:11:22:33:44:55", "02:11:22:33:44:56"];
      const ask = (...elements: object[]) => ({
        annotations: { [networksKey]: JSON.stringify(elements) },
      });
      const both = ["10.232.0.50", "fd42:232::50"];
      await pod.add(
        ask({ name: "red", ips: both, mac }, { name: "old", ips: ["10.233.0.9/24"], mac: other }),
      );
      const { addresses, macs } = kernelNetwork(pod);
      expect(addresses["net1"]?.sort()).toEqual(["10.232.0.50/24", "fd42:232::50/64"]);
      expect(addresses["net2"]).toEqual(["10.233.0.9/24"]);
      expect([macs["net1"], macs["net2"]]).toEqual([mac, other]);
      expect([mac, other]).not.toContain(macs["eth0"]);
      await pod.del();
      // ptp 1.1 takes no MAC: the ADD fails, and nothing stays.
      const { status, json } = await pod.call("ADD", ask({ name: "deaf", mac }));
      expect([status, json?.code, json?.msg]).toEqual([
        1,
        7,
        expect.stringContaining(`mac ${mac}, which "ptp" does not take from CNI_ARGS`),
      ]);
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("two of them, one twice: result, kernel, status, CHECK, DEL", async () => {
    await withCluster([blue4, blue6], async ({ node, pod, put, asked, status }) => {
      put({
        ...nad("red", bridge(node, "red", [red4, red6])),
        ...nad("green", {
          plugins: [bridge(node, "green", [green4]), { type: "tuning", mtu: 1400 }],
        }),
      });
      const result = await pod.add({ annotations: { [networksKey]: "red,green@g1,red" } });
      expectKernel(pod, result);
      const { addresses, macs, defaults } = kernelNetwork(pod);
      expect(Object.keys(addresses).sort()).toEqual(["eth0", "g1", "net1", "net2"]);
      expect(defaults).toEqual(gateways(blue4, blue6));
      const entry = (name: string, ifName: string) => ({
        name,
        interface: ifName,
        ips: addresses[ifName]?.map((address) => address.replace(/\/.*/, "")),
        mac: macs[ifName],
        default: ifName === "eth0",
        dns: {},
      });
      expect(status()).toEqual([
        entry("blue", "eth0"),
        entry("default/red", "net1"),
        entry("default/green", "g1"),
        entry("default/red", "net2"),
      ]);
      expect(asked().slice(0, -1).sort()).toEqual([
        `GET ${nadPath("green")}`,
        `GET ${nadPath("red")}`,
      ]);
      expect(asked().at(-1)).toMatch(/^PATCH .*\/status$/);
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
      for (const _ of [1, 2]) await pod.del();
      expect(node.traces()).toEqual(noTraces);
      expect(asked()).toHaveLength(3);
    });
  });

  const selection = (element: object) => ({
    annotations: {
      [networksKey]: JSON.stringify([{ name: "green" }, { name: "red", ...element }]),
    },
  });
  const rows: [string, object, string[], string[]][] = [
    ["IPv4 alone", { "default-route": [first(red4)] }, gateways(red4, blue6), [first(red4)]],
    ["IPv6 alone", { "default-route": [first(red6)] }, gateways(blue4, red6), [first(red6)]],
    [
      "both families",
      { "default-route": [first(red4), first(red6)] },
      gateways(red4, red6),
      [first(red4), first(red6)],
    ],
    ["an empty list: the network has none of its own", { "default-route": [] }, [], []],
    ["no default-route", {}, gateways(blue4, blue6), []],
  ];
  test.each(rows)("default-route, %s", async (_name, element, expected, told) => {
    await withCluster([blue4, blue6], async ({ node, pod, put, status }) => {
      const objects = {
        // It brings default routes, and never keeps them.
        ...nad("green", bridge(node, "green", [green4, green6], { isDefaultGateway: true })),
        ...nad("red", bridge(node, "red", [red4, red6], { isGateway: true })),
      };
      put(objects);
      const result = await pod.add(selection(element));
      expectKernel(pod, result);
      const { defaults } = kernelNetwork(pod);
      expect(defaults).toEqual(expected.length > 0 ? expected : gateways(blue4, blue6));
      const entries = status().map((one) => one["default-route"]);
      expect(entries).toEqual([undefined, undefined, told.length > 0 ? told : undefined]);
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("an empty default-route gives the network its own", async () => {
    await withCluster([blue4, blue6], async ({ node, pod, put }) => {
      put({
        ...nad("green", bridge(node, "green", [green4, green6], { isDefaultGateway: true })),
        ...nad("red", bridge(node, "red", [red4], { isDefaultGateway: true })),
      });
      const result = await pod.add(selection({ "default-route": [] }));
      expectKernel(pod, result);
      expect(kernelNetwork(pod).defaults).toEqual(gateways(red4, blue6));
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("default-route over and over, for one pod and for several at once", async () => {
    await withCluster([blue4, blue6], async ({ node, pod, put }) => {
      put({
        ...nad("green", bridge(node, "green", [green4], { isDefaultGateway: true })),
        ...nad("red", bridge(node, "red", [red4, red6])),
      });
      const asked = selection({ "default-route": [first(red4), first(red6)] });
      const others = [node.pod(), node.pod(), node.pod()];
      await Promise.all(
        [pod, ...others].map(async (one) => {
          for (const _ of [1, 2]) {
            const result = await one.add(asked);
            expectKernel(one, result);
            expect(kernelNetwork(one).defaults).toEqual(gateways(red4, red6));
            await one.del();
          }
        }),
      );
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a gateway out of reach fails the pod, and leaves nothing", async () => {
    await withCluster([blue4], async ({ node, pod, put, asked }) => {
      put({
        ...nad("green", bridge(node, "green", [green4])),
        ...nad("red", bridge(node, "red", [red4])),
      });
      const { status, json } = await pod.call("ADD", selection({ "default-route": ["192.0.2.1"] }));
      expect(json).toMatchObject({
        code: 104,
        msg: expect.stringContaining("Nexthop has invalid gateway"),
      });
      expect(status).toBe(1);
      expect(node.traces()).toEqual(noTraces);
      expect(kernelNetwork(pod)).toEqual({ macs: {}, addresses: {}, defaults: [], routes: [] });
      expect(asked().filter((one) => one.startsWith("PATCH"))).toEqual([]);
      await pod.del();
    });
  });

  test("a NAD that fails leaves nothing of those before it", async () => {
    await withCluster([blue4], async ({ node, pod, put }) => {
      // One address, which another pod has.
      const range = { subnet: red4, rangeStart: "10.232.0.2", rangeEnd: "10.232.0.2" };
      const ipam = { type: "host-local", dataDir: node.data, ranges: [[range]] };
      put({
        ...nad("green", bridge(node, "green", [green4])),
        ...nad("red", bridge(node, "red", [], { ipam })),
      });
      const holder = node.pod();
      await holder.add({ annotations: { [networksKey]: "red" } });
      const before = node.traces();
      const { status, json } = await pod.call("ADD", selection({}));
      expect(json?.msg).toContain('"default/red" (net2)');
      expect(status).toBe(1);
      expect(node.traces()).toEqual(before);
      expect(kernelNetwork(pod)).toEqual({ macs: {}, addresses: {}, defaults: [], routes: [] });
      await pod.del();
      await holder.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("ips and mac of the pod's choice", async () => {
    await withCluster([blue4], async ({ node, pod, put, status }) => {
      put(
        nad("fixed", {
          plugins: [
            {
              type: "bridge",
              bridge: "fixed0",
              capabilities: { ips: true, mac: true },
              ipam: { type: "static" },
            },
          ],
        }),
      );
      const element = { name: "fixed", ips: ["10.240.0.9/24"], mac: "02:23:45:67:89:01" };
      const result = await pod.add({ annotations: { [networksKey]: JSON.stringify(element) } });
      expectKernel(pod, result);
      expect(status()[1]).toMatchObject({
        interface: "net1",
        ips: ["10.240.0.9"],
        mac: "02:23:45:67:89:01",
      });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("logical networks: the address is of the sub-subnet, the parent refer_nic", async () => {
    await withCluster([blue4], async ({ node, pod, put, status }) => {
      node.run(
        "sh",
        "-c",
        "ip link add up7 type veth peer up8; ip link set up7 up; ip link set up8 up",
      );
      node.network("vlans", {
        cniVersion: "1.0.0",
        plugins: [{ type: "macvlan", master: "absent0", ipam: hostLocal(node, ["10.0.0.0/8"]) }],
      });
      const path = (kind: string, name: string) =>
        `/apis/alpha.network.k8s.io/v1/namespaces/default/${kind}/${name}`;
      put({
        [path("physicalnetworks", "phy")]: {
          metadata: { name: "phy", namespace: "default" },
          spec: {
            refer_nic: "up7",
            sharedStatus: { plugin: "vlans", subnet: "10.244.0.0/16", dedicatedNet: true },
          },
        },
        [path("logicalnetworks", "l1")]: {
          metadata: { name: "l1", namespace: "default" },
          spec: { physicalNet: "phy", sub_subnet: "10.244.3.0/24" },
        },
        [path("logicalnetworks", "l2")]: {
          metadata: { name: "l2", namespace: "default" },
          spec: { plugin: "blue", sub_subnet: "10.231.0.128/25" },
        },
      });
      const result = await pod.add({ cni: "", annotations: { networks: "l2@eth0,l1" } });
      expectKernel(pod, result);
      expect(kernelNetwork(pod).addresses).toEqual({
        eth0: ["10.231.0.128/24"],
        eth1: ["10.244.3.0/8"],
      });
      expect(status().map((one) => one["name"])).toEqual(["default/l2", "default/l1"]);
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});
