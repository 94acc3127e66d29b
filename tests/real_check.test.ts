/**
 * CHECK by genie itself: what is gone is noticed whatever the plugins look at, and what plugins do
 * with their own is no alarm. Real plugins and namespaces. lib/check.ts,
 * lib/check.ts.
 */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import {
  type CheckedAttachment,
  findGone,
  type KernelNetwork,
  readNetwork,
  repairCommand,
} from "../lib/check.ts";
import type { Result } from "../lib/record.ts";
import { withLeftOut } from "../lib/recovery/left_out.ts";
import { fakePlugin } from "./fakes.ts";
import {
  addressOf,
  command,
  hostLocal,
  kernelNetwork,
  type Node,
  noTraces,
  type Pod,
  pluginDir,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);

const v4 = "10.241.0.0/24";
const v6 = "fd42:241::/64";

/** A plugin that says yes to every CHECK, and else is the real one. */
function carelessPlugin(node: Node, name: string): void {
  const real = join(pluginDir, name);
  fakePlugin(node.bin, name, `#!/bin/sh\n[ "$CNI_COMMAND" = CHECK ] && exit 0\nexec ${real}\n`);
}

/** blue: a bridge, dual stack, with a default route and another one. */
function blue(node: Node, more: object): void {
  const routes = ["10.97.0.0/16 via 10.241.0.1"];
  node.network("blue", {
    plugins: [{ type: "bridge", isDefaultGateway: true, ipam: hostLocal(node, [v4, v6], routes) }],
    ...more,
  });
}

const label = (pod: Pod) => `default/p-${pod.containerId}`;

const damages: [string, string[], string][] = [
  ["interface", ["ip", "link", "del", "eth0"], 'gone is interface "eth0"'],
  ["IPv4 address", ["ip", "addr", "del", "10.241.0.2/24", "dev", "eth0"], "address 10.241.0.2/24"],
  ["IPv6 address", ["ip", "addr", "del", "fd42:241::2/64", "dev", "eth0"], "fd42:241::2/64"],
  ["default route", ["ip", "route", "del", "default"], "gone is route 0.0.0.0/0"],
  ["IPv6 default route", ["ip", "-6", "route", "del", "default"], "gone is route ::/0"],
  ["route", ["ip", "route", "del", "10.97.0.0/16"], "gone is route 10.97.0.0/16 via 10.241.0.1"],
  ["link, which is down", ["ip", "link", "set", "eth0", "down"], "route 0.0.0.0/0"],
  [
    "gateway, which is another",
    ["ip", "route", "change", "10.97.0.0/16", "via", "10.241.0.9"],
    "route 10.97.0.0/16 via 10.241.0.1",
  ],
  [
    "interface, another one has its name",
    ["sh", "-c", "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:77 up"],
    "another one has its name",
  ],
];

describe.skipIf(skipReason !== undefined)("CHECK notices what is gone:", () => {
  test.each(damages)("the %s", async (_name, damage, said) => {
    await withNode(async (node) => {
      blue(node, { cniVersion: "1.0.0" });
      carelessPlugin(node, "bridge");
      const [pod, other] = [node.pod(), node.pod()];
      await pod.add("blue");
      await other.add("blue");
      expect(await pod.call("CHECK")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      pod.run(...damage);
      const { status, json } = await pod.call("CHECK");
      expect(status).toBe(1);
      expect([json?.code, json?.msg]).toEqual([11, expect.stringContaining(said)]);
      expect(json?.msg).toEndWith(`; to put it right: genie repair ${label(pod)} --network blue`);
      expect((await other.call("CHECK")).status).toBe(0);
      // And so it is.
      expect(command(node, "repair", label(pod), "--network", "blue").status).toBe(0);
      expect(await pod.call("CHECK")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      for (const one of [pod, other]) await one.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("of a list that is older than CHECK", async () => {
    await withNode(async (node) => {
      blue(node, { cniVersion: "0.3.1" });
      const pod = node.pod();
      await pod.add("blue");
      expect((await pod.call("CHECK")).status).toBe(0);
      pod.run("ip", "addr", "flush", "dev", "eth0");
      expect((await pod.call("CHECK")).json?.msg).toContain("address 10.241.0.2/24");
    });
  });

  test("but not of a list that switched CHECK off", async () => {
    await withNode(async (node) => {
      blue(node, { cniVersion: "1.0.0", disableCheck: true });
      const pod = node.pod();
      await pod.add("blue");
      pod.run("ip", "link", "del", "eth0");
      expect((await pod.call("CHECK")).status).toBe(0);
    });
  });

  test("of the second network, by its name", async () => {
    await withNode(async (node) => {
      blue(node, { cniVersion: "1.0.0" });
      node.network("green", {
        cniVersion: "1.0.0",
        plugins: [{ type: "bridge", bridge: "g0", ipam: hostLocal(node, ["10.242.0.0/24"]) }],
      });
      const pod = node.pod();
      await pod.add("blue,green@stor0");
      pod.run("ip", "link", "del", "stor0");
      const { json } = await pod.call("CHECK");
      expect(json?.msg).toContain('network "green" (stor0)');
      expect(json?.msg).toEndWith("--network green");
    });
  });
});

/** Chains whose plugins move, change or leave out what they report. */
const chains: [string, (node: Node) => object[]][] = [
  [
    "sbr, which moves the routes to another table",
    (node) => [
      { type: "bridge", isGateway: true, ipam: hostLocal(node, [v4], ["10.98.0.0/16"]) },
      { type: "sbr" },
    ],
  ],
  [
    "sbr, dual stack with default routes",
    (node) => [
      {
        ...{ type: "bridge", isGateway: true },
        ipam: hostLocal(node, [v4, v6], ["0.0.0.0/0", "::/0"]),
      },
      { type: "sbr" },
    ],
  ],
  [
    "tuning with another mac, portmap, firewall, bandwidth",
    (node) => [
      { type: "bridge", isDefaultGateway: true, ipMasq: true, ipam: hostLocal(node, [v4]) },
      { type: "tuning", mac: "02:42:aa:00:00:01", mtu: 1400, dataDir: `${node.data}/tuning` },
      { type: "portmap", capabilities: { portMappings: true } },
      { type: "firewall", backend: "iptables" },
      { type: "bandwidth", ingressRate: 8e6, ingressBurst: 8e6, egressRate: 8e6, egressBurst: 8e6 },
    ],
  ],
  ["a bridge without addresses", () => [{ type: "bridge", bridge: "l2", ipam: {} }]],
  [
    "ptp, dual stack",
    (node) => [{ type: "ptp", ipam: hostLocal(node, [v4, v6], ["0.0.0.0/0", "::/0"]) }],
  ],
  ["macvlan", (node) => [{ type: "macvlan", master: "up0", ipam: hostLocal(node, [v4]) }]],
  [
    "a device of the node",
    (node) => [{ type: "host-device", device: "updev", ipam: hostLocal(node, [v4]) }],
  ],
  [
    "static addresses of several subnets",
    () => [
      {
        type: "bridge",
        ipam: {
          type: "static",
          addresses: [
            { address: "10.243.0.7/24", gateway: "10.243.0.1" },
            { address: "10.244.0.7/32" },
            { address: "fd42:243::7/64", gateway: "fd42:243::1" },
          ],
          routes: [{ dst: "10.96.0.0/16", gw: "10.243.0.1" }, { dst: "::/0" }],
        },
      },
    ],
  ],
  ["addresses alone, without an interface", (node) => [hostLocalAlone(node)]],
];

function hostLocalAlone(node: Node): object {
  return { type: "host-local", ipam: hostLocal(node, [v4]) };
}

describe.skipIf(skipReason !== undefined)("a CHECK that a plugin's own fault fails", () => {
  const sysctl = { "net.ipv4.conf.IFNAME.arp_filter": "1" };
  const portMappings = [{ hostPort: 8127, containerPort: 80, protocol: "tcp" }];
  test.each<[string, (node: Node) => object, string]>([
    [
      "tuning, IFNAME in a sysctl",
      (node) => ({ type: "tuning", sysctl, dataDir: `${node.data}/tuning` }),
      'does not replace "IFNAME"',
    ],
    [
      "portmap, a pod without IPv6",
      () => ({ type: "portmap", capabilities: { portMappings: true } }),
      "looks for the IPv6 rules of a pod that has no IPv6 address",
    ],
  ])("%s: no repair is advised or done", async (_, plugin, fault) => {
    await withNode(async (node) => {
      const bridge = { type: "bridge", ipam: hostLocal(node, [v4]) };
      node.network("net", { cniVersion: "1.0.0", plugins: [bridge, plugin(node)] });
      const pod = node.pod();
      await pod.add({ cni: "net", runtimeConfig: { portMappings } });
      const { status, json } = await pod.call("CHECK", { runtimeConfig: { portMappings } });
      // A release without the fault says yes.
      if (status !== 0) {
        expect(json?.details).toContain(fault);
        expect(json?.details).toContain('"disableCheck": true');
        expect(JSON.stringify(json)).not.toContain("genie repair");
      }
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

describe.skipIf(skipReason !== undefined)("CHECK gives no false alarm right after ADD:", () => {
  // The plugins say yes: what they get wrong themselves is out of the way.
  test.each(chains)("%s", async (name, plugins) => {
    await withNode(async (node) => {
      node.run("sh", "-c", "ip link add up0 type veth peer up1; ip link set up0 up");
      node.run("sh", "-c", "ip link add updev type veth peer uppeer; ip link set up1 up");
      const all = plugins(node) as { type: string }[];
      for (const { type } of all) carelessPlugin(node, type);
      node.network("blue", { cniVersion: "1.0.0", plugins: all });
      const alone = name.startsWith("addresses alone");
      // containerd and strict readers want an interface with addresses first.
      node.network("first", {
        cniVersion: "1.0.0",
        plugins: [{ type: "bridge", bridge: "f0", ipam: hostLocal(node, ["10.245.0.0/24"]) }],
      });
      const pod = node.pod();
      await pod.add(alone ? "first,blue@eth7" : "blue,first@eth7");
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
      await pod.del();
    });
  });

  test("default routes of several networks, whoever owns them", async () => {
    await withNode(async (node) => {
      for (const [name, subnet] of [
        ["one", "10.246.0.0/24"],
        ["two", "10.247.0.0/24"],
      ] as const) {
        node.network(name, {
          cniVersion: "1.0.0",
          plugins: [
            {
              ...{ type: "bridge", bridge: `${name}0`, isDefaultGateway: true },
              ipam: hostLocal(node, [subnet]),
            },
          ],
        });
      }
      for (const cni of ["one,two", "two,one", "one@eth3,two,one"]) {
        const pod = node.pod();
        await pod.add(cni);
        expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
        await pod.del();
      }
    });
  });

  test("readNetwork() reads what ip shows", async () => {
    await withNode(async (node) => {
      blue(node, { cniVersion: "1.0.0" });
      const pod = node.pod();
      await pod.add("blue");
      pod.run("ip", "route", "add", "10.95.0.0/16", "via", "10.241.0.3", "table", "77");
      pod.run(
        ...["ip", "route", "add", "10.94.0.0/16", "nexthop", "via", "10.241.0.4"],
        ...["nexthop", "via", "10.241.0.5"],
      );
      pod.run("ip", "route", "add", "10.93.0.0/16", "via", "inet6", "fd42:241::1");
      const found = readNetwork(pod.netns);
      const { macs, addresses } = kernelNetwork(pod);
      const eth0 = found?.links.find(({ name }) => name === "eth0");
      expect(eth0?.mac).toBe(macs["eth0"] ?? "");
      const own = found?.addresses.filter(({ index }) => index === eth0?.index);
      const global = own?.filter(({ ip }) => !ip.startsWith("fe80:")).map(({ ip }) => ip);
      expect(global?.sort()).toEqual(
        addresses["eth0"]?.map((one) => one.replace(/\/.*/, "")) ?? [],
      );
      expect(global).toContain(addressOf(pod, "eth0"));
      const routes = (found?.routes ?? []).map(
        ({ dst, gateways, index }) => `${dst} ${gateways}${index === eth0?.index ? " eth0" : ""}`,
      );
      expect(routes.filter((route) => /^(0\.|::\/0|10\.)/.test(route)).sort()).toEqual([
        "0.0.0.0/0 10.241.0.1 eth0",
        "10.241.0.0/24  eth0",
        "10.93.0.0/16 fd42:241::1 eth0",
        "10.94.0.0/16 10.241.0.4,10.241.0.5",
        "10.95.0.0/16 10.241.0.3",
        "10.97.0.0/16 10.241.0.1 eth0",
        "::/0 fd42:241::1 eth0",
      ]);
      expect(readNetwork(join(node.dir, "plugins.toml"))).toBeUndefined();
    });
  });
});

const list = (plugin: object = {}, more: object = {}): CheckedAttachment["list"] => ({
  ...{ cniVersion: "1.0.0", name: "blue", disableCheck: false, disableGC: false },
  ...{ plugins: [{ type: "bridge", ...plugin }], ...more },
});
const result: Result = {
  interfaces: [{ name: "eth0", mac: "02:00:00:00:00:01", sandbox: "/run/netns/a" }],
  ips: [{ address: "10.1.0.5/16", interface: 0 }],
  routes: [{ dst: "10.9.1.1/16", gw: "10.1.0.1" }],
  dns: {},
};
const whole: KernelNetwork = {
  links: [{ index: 2, name: "eth0", mac: "02:00:00:00:00:01" }],
  addresses: [{ index: 2, ip: "10.1.0.5" }],
  routes: [{ dst: "10.9.0.0/16", gateways: ["10.1.0.1"], index: 2 }],
};
const bare: KernelNetwork = { links: [], addresses: [], routes: [] };

describe("findGone()", () => {
  test.each<[string, Partial<CheckedAttachment>, Partial<Result>, KernelNetwork, string[]]>([
    ["finds nothing where all is there", {}, {}, whole, []],
    ["finds the interface alone, not what was on it", {}, {}, bare, ['interface "eth0"']],
    [
      "looks at nothing with disableCheck",
      { list: list({}, { disableCheck: true }) },
      {},
      bare,
      [],
    ],
    ["looks at no network of addresses alone", { list: list({ type: "static" }) }, {}, bare, []],
    ["does not miss a device of user space", { device: {} }, {}, bare, []],
    ["nor one that the config passes", { list: list({ deviceID: "0000:01:00.1" }) }, {}, bare, []],
    [
      "nor a socket",
      {},
      { interfaces: [{ name: "eth0", sandbox: "/run/netns/a", socketPath: "/run/vhost" }] },
      bare,
      [],
    ],
    [
      "looks at a device that is there",
      { device: {} },
      {},
      { ...whole, addresses: [] },
      ["address 10.1.0.5/16"],
    ],
    [
      "passes over addresses of the node's end and of machines inside",
      {},
      {
        interfaces: [{ name: "br0" }, { name: "vm0", sandbox: "/vm" }],
        ips: [
          { address: "10.1.0.1/16", interface: 0 },
          { address: "10.1.0.2/16", interface: 1 },
        ],
      },
      whole,
      [],
    ],
    [
      "takes an address without interface for its own",
      {},
      { ips: [{ address: "10.1.0.5/32" }] },
      whole,
      [],
    ],
    [
      "reads letters of any case",
      {},
      { interfaces: [{ name: "eth0", mac: "0A:00:00:00:00:01", sandbox: "/a" }] },
      { ...whole, links: [{ index: 2, name: "eth0", mac: "0a:00:00:00:00:01" }] },
      [],
    ],
    [
      "compares no gateway and no mac that another plugin reports",
      { list: list({ type: "azure-vnet" }) },
      {
        interfaces: [{ name: "eth0", mac: "1", sandbox: "/a" }],
        routes: [{ dst: "10.9.0.0/16", gw: "10.1.0.9" }],
      },
      whole,
      [],
    ],
    [
      "but addresses and routes that it reports",
      { list: list({ type: "azure-vnet" }) },
      { routes: [{ dst: "0.0.0.0/0", gw: "10.1.0.1" }] },
      { ...whole, addresses: [] },
      ["address 10.1.0.5/16", "route 0.0.0.0/0 via 10.1.0.1"],
    ],
    [
      "compares the mac and the gateway of a reference plugin",
      {},
      {
        interfaces: [{ name: "eth0", mac: "02:00:00:00:00:09", sandbox: "/a" }],
        routes: [{ dst: "10.9.0.0/16", gw: "10.1.0.9" }],
      },
      whole,
      [
        'interface "eth0" of address 02:00:00:00:00:09, another one has its name',
        "route 10.9.0.0/16 via 10.1.0.9",
      ],
    ],
    [
      "does not take an address of another interface",
      {},
      {},
      { ...whole, addresses: [{ index: 3, ip: "10.1.0.5" }] },
      ["address 10.1.0.5/16"],
    ],
    ["passes over a route that is none", {}, { routes: [{ dst: "everywhere" }] }, whole, []],
    ["takes any way where none was said", {}, { routes: [{ dst: "10.9.0.0/16" }] }, whole, []],
  ])("%s", (_name, more, said, kernel, gone) => {
    const looked = { ifName: "eth0", list: list(), ...more };
    expect(findGone(looked, { ...result, ...said }, kernel)).toEqual(gone);
  });

  test("repairCommand() needs a pod of Kubernetes", () => {
    const command = "genie repair ns/web --network blue";
    expect(repairCommand({ namespace: "ns", name: "web" }, "blue")).toBe(command);
    expect(repairCommand({ namespace: "", name: "web" }, "blue")).toBe("");
  });
});

describe("withLeftOut()", () => {
  const mac = "02:00:00:00:00:01";
  const to = (...routes: KernelNetwork["routes"]): KernelNetwork => ({ ...whole, routes });
  const way = { dst: "0.0.0.0/0", gateways: ["169.254.1.1"], index: 2 };
  const way6 = { dst: "::/0", gateways: ["fe80::1"], index: 2 };
  const said: Result = {
    interfaces: [{ name: "cali1" }, { name: "eth0", sandbox: "/run/netns/a" }],
    ips: [{ address: "10.1.0.5/32", interface: 1 }],
    routes: [],
    dns: {},
  };
  const ips = (gateway?: string) => [{ ...said.ips[0], ...(gateway && { gateway }) }];
  const gw = "169.254.1.1";
  test.each<[string, string, Partial<Result>, KernelNetwork, object]>([
    ["a default route and a mac", "calico", {}, to(way), { ips: ips(gw), routes: [gw] }],
    ["no gateway", "romana", {}, to({ ...way, gateways: [] }), { routes: [""] }],
    ["a family each", "calico", {}, to(way6, way), { ips: ips(gw), routes: ["fe80::1", gw] }],
    [
      "the first of two metrics",
      "calico",
      {},
      to(way, { ...way, gateways: ["10.1.0.9"] }),
      {
        ips: ips(gw),
        routes: [gw],
      },
    ],
    ["not what is named", "weave", { routes: [{ dst: "0.0.0.0/0" }] }, to(way), { routes: [""] }],
    [
      "what another table has",
      "calico",
      { routes: [{ dst: "0.0.0.0/0", table: 7 }] },
      to(way),
      { ips: ips(gw), routes: ["", gw] },
    ],
    ["not another interface's", "calico", {}, to({ ...way, index: 3 }), {}],
    ["not that of no interface of its own", "calico", {}, to({ ...way, index: 0 }), {}],
    ["no other route", "calico", {}, to({ ...way, dst: "10.0.0.0/8" }), {}],
    ["nothing of a reference plugin", "bridge", {}, to(way), { mac: undefined }],
    ["nothing where the interface is gone", "calico", {}, bare, { mac: undefined }],
  ])("%s", (_name, type, given, kernel, expected) => {
    const before = { ...said, ...given };
    const after = withLeftOut({ ifName: "eth0", list: list({ type }) }, before, kernel);
    const found = {
      ips: after.ips,
      routes: after.routes.map((route) => route.gw ?? ""),
      mac: after.interfaces[1]?.mac,
    };
    expect(found as object).toEqual({ ips: ips(), routes: [], mac, ...expected });
    expect(after.interfaces[0]).toEqual({ name: "cali1" });
  });
});
