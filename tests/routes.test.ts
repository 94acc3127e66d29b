/**
 * The default route while a second attachment is made, on the kernel: lib/recovery/moved_routes.ts.
 * Which networks may bring one is in netconf.test.ts; whole pods with the reference plugins are in
 * real_routes.test.ts.
 */
import { describe, expect, test } from "bun:test";
import type { Host } from "../lib/call.ts";
import { supportedVersions } from "../lib/cni.ts";
import { defaultRouteFamilies, type Family } from "../lib/default_route.ts";
import {
  parkDefaultRoutes,
  parkedFamilies,
  restoreDefaultRoutes,
} from "../lib/recovery/moved_routes.ts";
import { parseResult } from "../lib/result.ts";
import { callOrder, fakePlugin, makeHost, type Netns, withNetns } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { annotated, left, makeNode, nothing, wire, wireError } from "./wire.ts";

const host: Host = {
  ...makeHost({ env: { PATH: "/usr/sbin:/usr/bin:/sbin:/bin" } }),
  now: Date.now,
};

describe("defaultRouteFamilies()", () => {
  const sbr = { dst: "0.0.0.0/0", table: 100 };
  test.each([
    ["none", [], []],
    ["of no default", [{ dst: "10.0.0.0/8" }, { dst: "::1/128" }], []],
    ["of IPv4", [{ dst: "0.0.0.0/0", gw: "10.1.0.1" }], [4]],
    ["of IPv6", [{ dst: "::/0" }], [6]],
    [
      "of both, one twice",
      [{ dst: "::/0" }, { dst: "0.0.0.0/0" }, { dst: "::/0", mtu: 9 }],
      [4, 6],
    ],
    ["of policy routing", [sbr], []],
    ["of the main table by its number", [{ ...sbr, table: 254 }], [4]],
  ])("routes %s", (_name, routes, families) => {
    const [version = "1.1.0"] = supportedVersions.slice(-1);
    expect(defaultRouteFamilies(parseResult({ routes }, version))).toEqual(families as Family[]);
  });
});

/** A namespace with eth0 (10.1.0.2/24, fd01::2/64) and eth1 (10.2.0.2/24, fd02::2/64), both up. */
async function withLinks(fn: (netns: Netns) => Promise<void>): Promise<void> {
  await withNetns(async (netns) => {
    for (const [i, name] of ["eth0", "eth1"].entries()) {
      netns.ip("link", "add", name, "type", "veth", "peer", "name", `peer${i}`);
      netns.ip("link", "set", `peer${i}`, "up");
      netns.ip("link", "set", name, "up");
      netns.ip("addr", "add", `10.${i + 1}.0.2/24`, "dev", name);
      netns.ip("-6", "addr", "add", `fd0${i + 1}::2/64`, "dev", name, "nodad");
    }
    await fn(netns);
  });
}

const defaults = (netns: Netns) =>
  ["-4", "-6"].flatMap((family) =>
    netns
      .ip(family, "-oneline", "route", "show", "default")
      .split("\n")
      .map((line) => line.replace(/ (pref \w+|linkdown|proto \w+)(?= |$)/g, "").trim())
      .filter((line) => line !== ""),
  );

const v4 = "-4 route add default via 10.1.0.1 dev eth0";
const v6 = "-6 route add default via fd01::1 dev eth0";
const second4 = "-4 route add default via 10.2.0.1 dev eth1";
const second6 = "-6 route add default via fd02::1 dev eth1";
const owner4 = "default via 10.1.0.1 dev eth0";
const owner6 = "default via fd01::1 dev eth0 metric 1024";

/** Before, what the second attachment does, what is left in the end. */
const rows: [string, string[], string[], string[]][] = [
  ["IPv4", [v4], [second4], [owner4]],
  ["IPv6", [v6], [second6], [owner6]],
  ["both", [v4, v6], [second4, second6], [owner4, owner6]],
  ["the other family", [v4], [second6], [owner4, "default via fd02::1 dev eth1 metric 1024"]],
  ["a second that brings nothing", [v4], [], [owner4]],
  ["nobody, so the second keeps its own", [], [second4], ["default via 10.2.0.1 dev eth1"]],
  ["a metric of its own", [`${v4} metric 50`], [second4], [`${owner4} metric 50`]],
  ["the same metric twice", [`${v4} metric 50`], [`${second4} metric 50`], [`${owner4} metric 50`]],
  ["a second with a metric", [v4], [`${second4} metric 50`], [owner4]],
  [
    "two routes of the owner",
    [v4, `${v4} metric 7`],
    [second4, `${second4} metric 7`],
    [owner4, `${owner4} metric 7`],
  ],
  [
    "a route with attributes",
    [`${v4} src 10.1.0.2 mtu 1300 advmss 1200 proto static`],
    [second4],
    [`${owner4} src 10.1.0.2 mtu 1300 advmss 1200`],
  ],
  [
    "a gateway off the link (Calico)",
    ["-4 route add 169.254.1.1 dev eth0", "-4 route add default via 169.254.1.1 dev eth0"],
    [second4],
    ["default via 169.254.1.1 dev eth0"],
  ],
  [
    "a gateway off the link, which the second takes away (AWS)",
    ["-4 route add 169.254.1.1 dev eth0", "-4 route add default via 169.254.1.1 dev eth0"],
    ["-4 route replace 169.254.1.1 dev eth1", "-4 route add default via 169.254.1.1 dev eth1"],
    ["default via 169.254.1.1 dev eth0 onlink"],
  ],
  ["no gateway", ["-4 route add default dev eth0"], [second4], ["default dev eth0 scope link"]],
  [
    "an onlink gateway",
    ["-4 route add default via 172.16.0.1 dev eth0 onlink"],
    [second4],
    ["default via 172.16.0.1 dev eth0 onlink"],
  ],
  [
    "several next hops",
    ["-4 route add default nexthop via 10.1.0.1 dev eth0 nexthop via 10.1.0.9 dev eth0 weight 3"],
    [second4],
    [
      "default \\\tnexthop via 10.1.0.1 dev eth0 weight 1 " +
        "\\\tnexthop via 10.1.0.9 dev eth0 weight 3",
    ],
  ],
  ["a second that takes the parked one away", [v4], ["-4 route flush default", second4], [owner4]],
  ["an unusable link", [v4, "link set peer0 down"], [second4], [owner4]],
  [
    "what a router advertises",
    [v6, "-6 route add default via fd01::9 dev eth0 proto ra metric 900 expires 600"],
    [],
    [],
  ],
];

describe.skipIf(lacks("network namespaces"))(
  "parkDefaultRoutes() and restoreDefaultRoutes()",
  () => {
    test.each(rows)("keep the owner: %s", async (name, before, second, after) => {
      await withLinks(async (netns) => {
        for (const line of before) netns.ip(...line.split(" "));
        const parked = await parkDefaultRoutes(host, netns.path, []);
        for (const line of second) netns.ip(...line.split(" "));
        await restoreDefaultRoutes(host, parked);
        const found = defaults(netns).map((line) => line.replace(/ expires \w+/, ""));
        if (name !== "what a router advertises") expect(found).toEqual(after);
        else expect(found.join()).toContain("fd01::9");
      });
    });

    test("never take the connection away", async () => {
      await withLinks(async (netns) => {
        netns.ip(...v4.split(" "));
        const parked = await parkDefaultRoutes(host, netns.path, [4]);
        expect(defaults(netns)).toEqual([`${owner4} metric 4000000000`]);
        expect(parkedFamilies(parked)).toEqual([4]);
        await restoreDefaultRoutes(host, parked);
        expect(defaults(netns)).toEqual([owner4]);
      });
    });

    test("put back those that were asked for alone", async () => {
      await withLinks(async (netns) => {
        for (const line of [v4, v6]) netns.ip(...line.split(" "));
        const parked = await parkDefaultRoutes(host, netns.path, [4, 6]);
        const routes = parked.routes.filter(({ family }) => family === 6);
        await restoreDefaultRoutes(host, { ...parked, routes });
        expect(defaults(netns)).toEqual([`${owner4} metric 4000000000`, owner6]);
      });
    });

    test.each([
      ["was killed", []],
      ["was killed before it took the first away", [v4]],
    ])("put back what one that %s had moved aside", async (_, again) => {
      await withLinks(async (netns) => {
        for (const line of [v4, v6]) netns.ip(...line.split(" "));
        await parkDefaultRoutes(host, netns.path, [4, 6]);
        for (const line of again) netns.ip(...line.split(" "));
        const parked = await parkDefaultRoutes(host, netns.path, [4, 6]);
        expect(defaults(netns)[0]).toBe(`${owner4} metric 4000000000`);
        await restoreDefaultRoutes(host, parked);
        expect(defaults(netns)).toEqual([owner4, owner6]);
      });
    });

    test("fail when the owner's route cannot be put back", async () => {
      await withLinks(async (netns) => {
        netns.ip(...v4.split(" "));
        const parked = await parkDefaultRoutes(host, netns.path, [4]);
        netns.ip("link", "del", "eth0");
        const said = expect.stringMatching(/ip -4 -batch - failed: Cannot find device "eth0"/);
        const error = { code: 104, message: said };
        await expect(restoreDefaultRoutes(host, parked)).rejects.toMatchObject(error);
      });
    });
  },
);

describe("parkDefaultRoutes()", () => {
  test.each(["", "/nowhere", "/dev/null", "/proc/self/ns/net"])(
    "touches nothing for %p, which is no pod's namespace",
    async (netns) => {
      expect(await parkDefaultRoutes(host, netns, [4, 6])).toEqual({
        netns,
        claimed: [4, 6],
        routes: [],
      });
    },
  );
});

describe.skipIf(lacks("network namespaces"))("a pod on two networks", () => {
  /** A plugin that makes an interface and a default route, and reports what it is told to. */
  function routing(number: 1 | 2, routes: object[]): string {
    const address = `10.${number}.0.2/24`;
    const result = JSON.stringify({
      cniVersion: "1.0.0",
      interfaces: [{ name: "$CNI_IFNAME", sandbox: "$CNI_NETNS" }],
      ips: [{ address, interface: 0 }],
      routes,
    }).replaceAll('"', '\\"');
    return `#!/bin/sh
cat > /dev/null
echo "{\\"plugin\\":\\"$(basename $0)\\",\\"command\\":\\"$CNI_COMMAND\\",\\"env\\":{}}" \
  >> $(dirname $0)/.calls.jsonl
ip="nsenter --net=$CNI_NETNS ip"
if [ $CNI_COMMAND = DEL ]; then
  $ip -4 route show default >> $(dirname $0)/routes
  $ip link del $CNI_IFNAME
  exit 0
fi
$ip link add $CNI_IFNAME type veth peer name peer${number} &&
$ip link set peer${number} up &&
$ip link set $CNI_IFNAME up &&
$ip addr add ${address} dev $CNI_IFNAME &&
$ip route add default via 10.${number}.0.1 dev $CNI_IFNAME || exit 1
if [ -e $(dirname $0)/fail-${number} ]; then echo '{"code":118,"msg":"full"}'; exit 1; fi
echo "${result}"
`;
  }

  const env = { PATH: "/usr/sbin:/usr/bin:/sbin:/bin" };

  async function withPod(
    routes: object[],
    fn: (node: ReturnType<typeof makeNode>, netns: Netns) => Promise<void>,
  ): Promise<void> {
    await withNetns(async (netns) => {
      const list = (name: string, type: string) => ({
        cniVersion: "1.0.0",
        name,
        plugins: [{ type }],
      });
      using node = makeNode({
        lists: { "1.conflist": list("one", "first"), "2.conflist": list("two", "second") },
      });
      fakePlugin(node.bin, "first", routing(1, routes));
      fakePlugin(node.bin, "second", routing(2, [{ dst: "0.0.0.0/0", gw: "10.2.0.1" }]));
      await fn({ ...node, netns: netns.path }, netns);
    });
  }

  const two = { command: "ADD", stdin: annotated({ cni: "one,two" }), env };

  // Calico's results name no routes.
  test.each([
    ["reports it", [{ dst: "0.0.0.0/0", gw: "10.1.0.1" }]],
    ["does not report it", []],
  ])("keeps the default route of the first, which %s", async (_name, routes) => {
    await withPod(routes, async (node, netns) => {
      const { status, stdout, stderr } = await wire(node, two);
      expect([status, stderr]).toEqual([0, ""]);
      expect(JSON.parse(stdout).routes).toEqual([{ dst: "0.0.0.0/0", gw: "10.1.0.1" }]);
      expect(defaults(netns)).toEqual([owner4]);
      await wire(node, { ...two, command: "DEL" });
      expect(netns.interfaces()).toEqual([]);
    });
  });

  test("gives it back before a failing second is undone, and the first after that", async () => {
    await withPod([{ dst: "0.0.0.0/0" }], async (node, netns) => {
      await Bun.write(`${node.bin}/fail-2`, "");
      const error = wireError(await wire(node, two));
      expect([error.code, error.msg]).toEqual([118, expect.stringContaining("full")]);
      expect(callOrder(node.bin)).toEqual(["first ADD", "second ADD", "second DEL", "first DEL"]);
      const lines = (await Bun.file(`${node.bin}/routes`).text()).trim().split("\n");
      // In the end, when the first is undone, its own route is all there is.
      expect(lines.at(-1)?.trim()).toBe(owner4);
      expect(netns.interfaces()).toEqual([]);
      expect(left(node)).toEqual(nothing);
    });
  });
});
