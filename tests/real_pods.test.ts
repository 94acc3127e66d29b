/**
 * Pods with several real networks: order, names, rollback, default routes, capabilities, many pods
 * at once. The reference plugins in network namespaces, through the compiled program.
 */
import { describe, expect, test } from "bun:test";
import { fakePlugin } from "./fakes.ts";
import {
  addressOf,
  expectKernel,
  hostLocal,
  kernelNetwork,
  linksGone,
  type Node,
  noTraces,
  type Pod,
  realNeeds,
  recorded,
  recordPlugin,
  type WireResult,
  withNode,
} from "./fixtures/quirks/node.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);

const portmap = { type: "portmap", capabilities: { portMappings: true } };

/** blue: a bridge with portmap. green: ptp. red: macvlan. masq: a bridge with masquerading. */
function threeNetworks(node: Node): void {
  node.run(
    "sh",
    "-c",
    "ip link add up0 type veth peer up1; ip link set up0 up; ip link set up1 up",
  );
  node.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward");
  const blue = hostLocal(node, ["10.211.0.0/24"]);
  node.network("blue", {
    cniVersion: "1.0.0",
    plugins: [{ type: "bridge", bridge: "blue0", isDefaultGateway: true, ipam: blue }, portmap],
  });
  const masq = hostLocal(node, ["10.214.0.0/24"]);
  node.network("masq", {
    cniVersion: "1.0.0",
    plugins: [{ type: "bridge", bridge: "masq0", isGateway: true, ipMasq: true, ipam: masq }],
  });
  node.network("green", {
    cniVersion: "0.4.0",
    plugins: [{ type: "ptp", ipam: hostLocal(node, ["10.212.0.0/24"]) }, portmap],
  });
  const red = hostLocal(node, ["10.213.0.0/24"]);
  node.network("red", {
    cniVersion: "0.3.1",
    plugins: [{ type: "macvlan", master: "up0", ipam: red }],
  });
}

/** Names of the pod's interfaces in the order of the result. */
function podInterfaces(pod: Pod, { interfaces = [] }: WireResult): string[] {
  return interfaces.filter(({ sandbox }) => sandbox === pod.netns).map(({ name }) => name);
}

const rows: [string, string[]][] = [
  ["blue,green@eth5", ["eth0", "eth5"]],
  ["green,blue", ["eth0", "eth1"]],
  ["blue@eth3,green,blue", ["eth0", "eth3", "eth1"]],
  ["blue,blue", ["eth0", "eth1"]],
  ["masq,green,blue", ["eth0", "eth1", "eth2"]],
  ["green@eth7,blue", ["eth0", "eth7"]],
  ["red,red@m1,blue@b1,green@g1", ["eth0", "m1", "b1", "g1"]],
];

describe.skipIf(skipReason !== undefined)("a pod on several real networks:", () => {
  test.each(rows)("%s: ADD, CHECK, ping over each, DEL", async (cni, names) => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [pod, peer] = [node.pod(), node.pod()];
      const result = await pod.add(cni);
      await peer.add(cni);
      expect(podInterfaces(pod, result)).toEqual(names);
      expectKernel(pod, result);
      // CRI-O takes every address for the pod's: those of CNI_IFNAME come first.
      expect(result.interfaces?.[result.ips?.[0]?.interface ?? -1]?.name).toBe("eth0");
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", stderr: "", status: 0 });
      for (const name of names) {
        // The host answers for two interfaces on one bridge by either: tie the ping to its own.
        pod.run("ping", "-c1", "-W3", "-I", name, addressOf(peer, name));
      }
      await pod.del();
      expect(kernelNetwork(pod)).toEqual({ macs: {}, addresses: {}, defaults: [], routes: [] });
      await peer.del();
      await peer.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("the same masqueraded network twice goes with one DEL", async () => {
    // bridge names its chain after network and container: the first of two cannot delete it.
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      await pod.add("masq,masq");
      expect(await pod.call("DEL")).toMatchObject({ status: 0, stdout: "" });
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("the same masqueraded network twice is undone when the ADD fails", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const script = `[ $CNI_COMMAND != ADD ] || { echo '{"code":7,"msg":"no"}'; exit 1; }`;
      fakePlugin(node.bin, "bad", `#!/bin/sh\n${script}\n`);
      node.network("bad", { cniVersion: "1.0.0", plugins: [{ type: "bad" }] });
      const pod = node.pod();
      const { status, json } = await pod.call("ADD", { cni: "masq,masq,bad" });
      expect(json?.msg).toContain('network "bad" (eth2)');
      expect(status).toBe(1);
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("host interfaces appear once and never by a pod's name", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      const { interfaces = [] } = await pod.add("blue,blue,green,red");
      const onHost = interfaces.filter(({ sandbox = "" }) => sandbox === "");
      expect(onHost.filter(({ name }) => name === "blue0")).toHaveLength(1);
      expect(new Set(interfaces.map(({ name }) => name)).size).toBe(interfaces.length);
      for (const { name, mac } of onHost.filter(({ name }) => name.startsWith("veth"))) {
        expect(node.run("ip", "link", "show", name)).toContain(mac ?? "no mac");
      }
    });
  });

  test("DEL by record after the list changed, without namespace and prevResult", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      node.network("blue", {
        cniVersion: "1.0.0",
        plugins: [{ type: "bridge", bridge: "blue0", ipam: hostLocal(node, ["10.211.0.0/24"]) }],
      });
      const pod = node.pod();
      await pod.add("blue,green@eth5");
      node.network("blue", { cniVersion: "1.0.0", plugins: [{ type: "gone" }] });
      pod.kill();
      await pod.del({ cni: "nothing", netns: "", prevResult: false });
      await linksGone(node);
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("DEL gives each plugin the final result of its own network", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      for (const name of ["bridge", "ptp", "portmap"]) recordPlugin(node, name);
      const pod = node.pod();
      await pod.add("blue,green@eth5");
      await pod.del();
      for (const [plugin, ifName, prefix] of [
        ["bridge", "eth0", "10.211."],
        ["portmap", "eth0", "10.211."],
        ["ptp", "eth5", "10.212."],
        ["portmap", "eth5", "10.212."],
      ] as const) {
        const { prevResult, name } = await recorded(node, plugin, "DEL", ifName);
        expect(prevResult?.ips).toHaveLength(1);
        expect(prevResult?.ips?.[0]?.address).toStartWith(prefix);
        expect(prevResult?.cniVersion).toBe(ifName === "eth0" ? "1.0.0" : "0.4.0");
        expect(name).toBe(ifName === "eth0" ? "blue" : "green");
      }
    });
  });
});

describe.skipIf(skipReason !== undefined)("a failed ADD leaves nothing:", () => {
  test("the second network has no address left", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      node.network("tiny", {
        cniVersion: "1.0.0",
        // .0 and .3 are no hosts, .1 is the gateway: one address.
        plugins: [{ type: "bridge", bridge: "tiny0", ipam: hostLocal(node, ["10.217.0.0/30"]) }],
      });
      const [first, second] = [node.pod(), node.pod()];
      await first.add("tiny");
      const before = node.traces();
      const { status, json } = await second.call("ADD", { cni: "blue,tiny@eth4,green" });
      expect(json).toMatchObject({ cniVersion: "1.0.0", code: 999 });
      expect(json?.msg).toContain('network "tiny" (eth4)');
      expect(json?.msg).toContain("no IP addresses available in range set");
      expect(status).toBe(1);
      expect(kernelNetwork(second).macs).toEqual({});
      expect(node.traces()).toEqual(before);
      // The runtime's DEL after a failed ADD, and the pod's next attempt.
      await second.del();
      await first.del();
      await second.add("blue,tiny@eth4,green");
      await second.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("ptp twice in one subnet, which the kernel refuses", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      const { status, json } = await pod.call("ADD", { cni: "green,green@eth7" });
      expect(json?.msg).toContain("file exists");
      expect(status).toBe(1);
      expect(kernelNetwork(pod).macs).toEqual({});
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each([
    ["CNI_IFNAME", "eth0"],
    ["the name of the second network", "eth5"],
  ])("%s exists in the pod already: it stays as it is", async (_, taken) => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      pod.run("ip", "link", "add", taken, "type", "veth", "peer", "other");
      pod.run("ip", "addr", "add", "10.219.0.1/24", "dev", taken);
      pod.run("ip", "link", "set", taken, "up");
      const before = kernelNetwork(pod);
      const { status, json } = await pod.call("ADD", { cni: "blue,green@eth5" });
      expect(json?.msg).toContain(taken);
      expect(status).toBe(1);
      expect(kernelNetwork(pod)).toEqual(before);
      expect(node.traces()).toEqual(noTraces);
      // Nobody's interface: the DEL that follows a failed ADD has nothing to delete.
      await pod.del();
      expect(kernelNetwork(pod)).toEqual(before);
    });
  });

  test("a second ADD without DEL is refused, the first stays whole", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      await pod.add("blue,green@eth5");
      const before = [kernelNetwork(pod), node.traces()];
      const { status, json } = await pod.call("ADD");
      expect({ status, code: json?.code }).toEqual({ status: 1, code: 105 });
      expect([kernelNetwork(pod), node.traces()]).toEqual(before);
      expect((await pod.call("CHECK")).status).toBe(0);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a second ADD without DEL, into an empty namespace of the same number", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      await pod.add("blue,green@eth5");
      // The kernel gives the number again whenever it likes; an empty namespace is all that shows.
      for (const name of ["eth0", "eth5"]) pod.run("ip", "link", "del", name);
      const { status } = await pod.call("ADD", { cni: "blue,green@eth5" });
      expect(status).toBe(0);
      expect(Object.keys(kernelNetwork(pod).macs)).toEqual(["eth0", "eth5"]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("the address and the MAC of CNI_ARGS are for the runtime's own interface", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      const mac = "02:11:22:33:44:55";
      const args = `;IP=10.211.0.9;MAC=${mac}`;
      const { status, json } = await pod.call("ADD", { cni: "blue,masq", args });
      expect(status).toBe(0);
      expect(json?.ips?.[0]?.address).toBe("10.211.0.9/24");
      const { macs } = kernelNetwork(pod);
      expect([macs["eth0"] === mac, macs["eth1"] === mac]).toEqual([true, false]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

describe.skipIf(skipReason !== undefined)("capabilities of the runtime:", () => {
  test("portMappings reach the primary alone, and the rules go with DEL", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      const portMappings = [
        { hostPort: 8123, containerPort: 80, protocol: "tcp" },
        { hostPort: 8124, containerPort: 53, protocol: "udp" },
      ];
      const runtimeConfig = { portMappings };
      await pod.add({ cni: "blue,green@eth5", runtimeConfig });
      const [blue, green] = [addressOf(pod, "eth0"), addressOf(pod, "eth5")];
      const rules = node.traces().rules.join("\n");
      expect(rules).toContain(`--dport 8123 -j DNAT --to-destination ${blue}:80`);
      expect(rules).toContain(`--dport 8124 -j DNAT --to-destination ${blue}:53`);
      expect(rules).not.toContain(green);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
      // green as primary now has them.
      await pod.add({ cni: "green,blue@eth5", runtimeConfig });
      const swapped = node.traces().rules.join("\n");
      expect(swapped).toContain(`--to-destination ${addressOf(pod, "eth0")}:80`);
      expect(swapped).not.toContain(`--to-destination ${addressOf(pod, "eth5")}`);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a mapped port answers", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [pod, client] = [node.pod(), node.pod()];
      const portMappings = [{ hostPort: 8125, containerPort: 8080, protocol: "tcp" }];
      await pod.add({ cni: "blue", runtimeConfig: { portMappings } });
      await client.add("green");
      const server = Bun.spawn(
        ["nsenter", `--net=${pod.netns}`, process.execPath, "-e", serverText],
        { stdout: "pipe" },
      );
      try {
        await server.stdout.getReader().read();
        // From another pod to the address the node has on green's side.
        client.run("ip", "route", "add", "default", "via", "10.212.0.1");
        const url = "http://10.212.0.1:8125";
        expect(client.run(process.execPath, "-e", clientText, url)).toBe("hello");
      } finally {
        server.kill();
        await server.exited;
      }
    });
  });

  test("bandwidth, mac and ips go where they are declared, for the primary alone", async () => {
    await withNode(async (node) => {
      const shaped = (name: string, subnet: string) =>
        node.network(name, {
          cniVersion: "1.0.0",
          plugins: [
            {
              type: "bridge",
              bridge: `${name}0`,
              capabilities: { ips: true },
              ipam: { type: "static", addresses: [{ address: subnet.replace("0/", "9/") }] },
            },
            { type: "tuning", capabilities: { mac: true }, dataDir: `${node.data}/tuning` },
            { type: "bandwidth", capabilities: { bandwidth: true } },
          ],
        });
      shaped("fast", "10.215.0.0/24");
      shaped("slow", "10.216.0.0/24");
      for (const name of ["bridge", "tuning", "bandwidth"]) recordPlugin(node, name);
      const bandwidth = { ingressRate: 8e6, ingressBurst: 8e6, egressRate: 8e6, egressBurst: 8e6 };
      const runtimeConfig = {
        bandwidth,
        mac: "02:42:00:00:00:15",
        ips: ["10.215.0.77/24"],
        portMappings: [{ hostPort: 1, containerPort: 1, protocol: "tcp" }],
      };
      const pod = node.pod();
      const result = await pod.add({ cni: "fast,slow", runtimeConfig });
      expectKernel(pod, result);
      const { macs, addresses } = kernelNetwork(pod);
      expect(macs["eth0"]).toBe("02:42:00:00:00:15");
      expect(macs["eth1"]).not.toBe("02:42:00:00:00:15");
      expect(addresses["eth0"]).toContain("10.215.0.77/24");
      expect(addresses["eth1"]).toEqual(["10.216.0.9/24"]);
      const given = async (plugin: string, ifName: string) =>
        (await recorded(node, plugin, "ADD", ifName))["runtimeConfig"];
      expect(await given("bridge", "eth0")).toEqual({ ips: ["10.215.0.77/24"] });
      expect(await given("tuning", "eth0")).toEqual({ mac: "02:42:00:00:00:15" });
      expect(await given("bandwidth", "eth0")).toEqual({ bandwidth });
      for (const plugin of ["bridge", "tuning", "bandwidth"]) {
        expect(await given(plugin, "eth1")).toBeUndefined();
      }
      expect(node.run("tc", "qdisc", "show").match(/qdisc tbf/g)).toHaveLength(2);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

const serverText = `Bun.serve({ port: 8080, fetch: () => new Response("hello") }); console.log(1)`;
const clientText = "process.stdout.write(await (await fetch(process.argv.at(-1))).text())";

describe.skipIf(skipReason !== undefined)("many pods at once:", () => {
  test("20 ADDs, then 20 DELs", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pods = Array.from({ length: 20 }, () => node.pod());
      const results = await Promise.all(pods.map((pod) => pod.add("blue,red@eth5")));
      const all = results.flatMap(({ ips = [] }) => ips.map(({ address }) => address));
      expect(new Set(all).size).toBe(40);
      pods.forEach((pod, i) => {
        expectKernel(pod, results[i] ?? { cniVersion: "" });
      });
      expect(node.traces()).toMatchObject({ attachments: 40 });
      await Promise.all(pods.map((pod) => pod.del()));
      expect(node.traces()).toEqual(noTraces);
    });
  });
});
