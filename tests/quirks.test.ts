/**
 * Calico, Canal, Flannel, Romana and Weave with their own config lists and result shapes: each as
 * primary, as secondary, alone and mixed, through the compiled program. Real interfaces.
 */
import { describe, expect, test } from "bun:test";
import { rmSync } from "node:fs";
import { join } from "node:path";
import { type KernelNetwork, readNetwork } from "../lib/check.ts";
import { closeState } from "../lib/database.ts";
import type { StoredAttachment } from "../lib/record.ts";
import { attachments } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { noteLeftOut } from "../lib/recovery/left_out.ts";
import { makeHost } from "./fakes.ts";
import {
  commandLine,
  kernelNetwork,
  linksGone,
  type Node,
  noTraces,
  type Pod,
  realNeeds,
  recorded,
  type WireResult,
  withNode,
} from "./fixtures/quirks/node.ts";
import {
  install,
  installBridge,
  type SystemName,
  subnetFile,
  systemNames,
  systems,
} from "./fixtures/quirks/systems.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);
const bareKernel: KernelNetwork = { links: [], addresses: [], routes: [] };

/** What containerd makes of a result: addresses by interface name, those without index on eth0. */
function asContainerd({ interfaces = [], ips = [] }: WireResult): Record<string, string[]> {
  const found: Record<string, string[]> = Object.fromEntries(
    interfaces.map(({ name }) => [name, []]),
  );
  for (const { address, interface: index } of ips) {
    // An index outside of the list makes containerd panic.
    expect(index === undefined || (index >= 0 && index < interfaces.length)).toBeTrue();
    const name = index === undefined ? "eth0" : (interfaces[index]?.name ?? "");
    found[name] = [...(found[name] ?? []), address];
  }
  return found;
}

/** Every interface of the pod is in the result with exactly the addresses that the kernel has. */
function expectAddresses(pod: Pod, result: WireResult): void {
  const { addresses, macs } = kernelNetwork(pod);
  const seen = asContainerd(result);
  const names = Object.keys(macs);
  expect(Object.fromEntries(names.map((name) => [name, seen[name]]))).toEqual(addresses);
  expect(addresses["eth0"]).toHaveLength(1);
  const onHost = Object.entries(seen).filter(([name]) => !names.includes(name));
  expect(onHost.filter(([, list]) => list.length > 0)).toEqual([]);
  const inPod = result.interfaces?.filter(({ sandbox }) => sandbox === pod.netns);
  expect(inPod?.map(({ name }) => name).sort()).toEqual(names.sort());
}

type Chain = [ifName: string, types: string[]];

/** Each plugin's DEL got what its own network's ADD gave: one address, that of its interface. */
async function expectOwnResults(
  node: Node,
  found: Record<string, string[]>,
  chains: Chain[],
): Promise<void> {
  for (const [ifName, types] of chains) {
    for (const type of types) {
      const { prevResult, cniVersion = "0.1.0" } = await recorded(node, type, "DEL", ifName);
      // libcni hands a result to DEL from 0.4.0 on.
      if (String(cniVersion) < "0.4.0") expect(prevResult).toBeUndefined();
      else expect(prevResult?.ips?.map(({ address }) => address)).toEqual(found[ifName] ?? []);
    }
  }
}

const single: [SystemName][] = systemNames.map((name) => [name]);
const shapes = ["0.2.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

describe.skipIf(skipReason !== undefined)("a system of the field alone:", () => {
  test.each(single)("%s answers in every version", async (name) => {
    await withNode(async (node) => {
      const { network, type } = install(node, name);
      for (const cniVersion of shapes) {
        const pod = node.pod();
        const result = await pod.add({ cni: network, cniVersion });
        const [address = ""] = kernelNetwork(pod).addresses["eth0"] ?? [];
        expect(result.cniVersion).toBe(cniVersion);
        if (cniVersion === "0.2.0") expect(result.ip4?.ip).toBe(address);
        else {
          expectAddresses(pod, result);
          expect(result.ips?.[0]?.version).toBe(cniVersion < "1.0.0" ? "4" : undefined);
        }
        await pod.del();
        await expectOwnResults(node, { eth0: [address] }, [["eth0", [type]]]);
        expect(kernelNetwork(pod).macs).toEqual({});
        expect(node.traces()).toEqual(noTraces);
      }
    });
  });

  test.each(single)("%s: DEL after the namespace is gone", async (name) => {
    await withNode(async (node) => {
      const pod = node.pod();
      await pod.add(install(node, name).network);
      pod.kill();
      await pod.del({ netns: "", prevResult: false });
      await linksGone(node);
      expect(node.traces()).toEqual(noTraces);
    });
  });

  // portmap leaves out addresses on an interface that is not the pod's, whoever calls it.
  const mapped = single.filter(
    ([name]) => "plugins" in systems[name].config && !name.includes("pointing"),
  );
  test.each(mapped)("%s: its portmap gets the pod's address", async (name) => {
    await withNode(async (node) => {
      const { network } = install(node, name);
      const pod = node.pod();
      const portMappings = [{ hostPort: 8200, containerPort: 80, protocol: "tcp" }];
      await pod.add({ cni: network, runtimeConfig: { portMappings } });
      const [address = ""] = kernelNetwork(pod).addresses["eth0"] ?? [];
      const to = `--to-destination ${address.replace(/\/.*/, "")}:80`;
      expect(node.traces().rules.join("\n")).toContain(to);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

/** The system before or after a bridge that brings a default route or none; Romana makes eth0. */
const mixes = systemNames.flatMap((name) => [
  [name, "first", "with"] as const,
  ...(name === "Romana"
    ? []
    : [[name, "second", "with"] as const, [name, "second", "without"] as const]),
]);

describe.skipIf(skipReason !== undefined)("a system of the field with a bridge:", () => {
  test.each(mixes)("%s %s, a bridge %s a default route", async (name, place, brings) => {
    await withNode(async (node) => {
      const { network, type } = install(node, name);
      const isDefault = brings === "with";
      installBridge(node, "plain", isDefault);
      const pod = node.pod();
      const isFirst = place === "first";
      const result = await pod.add(isFirst ? `${network},plain@eth5` : `plain,${network}@eth5`);
      expectAddresses(pod, result);
      const { addresses, defaults } = kernelNetwork(pod);
      const prefix = systems[name].script.subnet.replace(/0\.0\/.*/, "");
      expect(addresses[isFirst ? "eth0" : "eth5"]?.[0]).toStartWith(prefix);
      expect(addresses[isFirst ? "eth5" : "eth0"]?.[0]).toStartWith("10.239.");
      // One owner: the first network that brings one.
      expect(defaults).toHaveLength(1);
      const owner = pod.run("ip", "-o", "route", "show", "default");
      expect(owner).toContain(isFirst || isDefault ? "dev eth0" : "dev eth5");
      await pod.del();
      await expectOwnResults(node, addresses, [
        [isFirst ? "eth0" : "eth5", [type]],
        [isFirst ? "eth5" : "eth0", ["bridge"]],
      ]);
      expect(kernelNetwork(pod).macs).toEqual({});
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

describe.skipIf(skipReason !== undefined)("systems of the field together:", () => {
  // Romana always makes eth0.
  const all: SystemName[] = ["Calico, the host's end alone", "Flannel", "Weave"];
  const orders = all.map((_, i) => [...all.slice(i), ...all.slice(0, i)]);
  const withRomana: SystemName[][] = orders.map((order) => ["Romana", ...order]);
  test.each([...orders, ...withRomana])("%s, %s, %s", async (...names) => {
    await withNode(async (node) => {
      const networks = names.map((name) => install(node, name).network);
      const pod = node.pod();
      const result = await pod.add(networks.join(","));
      expectAddresses(pod, result);
      const { addresses, defaults } = kernelNetwork(pod);
      expect(defaults).toHaveLength(1);
      const prefixes = names.map((name) => systems[name].script.subnet.replace(/0\.0\/.*/, ""));
      prefixes.forEach((prefix, i) => {
        expect(addresses[`eth${i}`]?.[0]).toStartWith(prefix);
      });
      await pod.del();
      const chains = names.map((name, i): Chain => [`eth${i}`, [systems[name].type]]);
      await expectOwnResults(node, addresses, chains);
      expect(kernelNetwork(pod).macs).toEqual({});
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("Calico and Canal of one name in the conf dir: asked by file name", async () => {
    await withNode(async (node) => {
      install(node, "Calico, the host's end alone");
      install(node, "Canal");
      const pod = node.pod();
      await pod.add("canal");
      expect(kernelNetwork(pod).addresses["eth0"]?.[0]).toStartWith("10.232.");
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

describe.skipIf(skipReason !== undefined)("twice in one pod:", () => {
  const once: [SystemName, string][] = [
    ["Calico, no interfaces", "calico"],
    ["Calico, the host's end alone", "calico"],
    ["Romana", "romana"],
    ["Weave", "weave-net"],
  ];
  test.each(once)("%s is refused before %s runs, and stays as it was", async (name, type) => {
    await withNode(async (node) => {
      const { network } = install(node, name);
      installBridge(node, "plain", false);
      const said = `plugin "${type}" gives a container one interface`;
      const refused = await node.pod().call("ADD", { cni: `${network},plain,${network}` });
      expect(refused.json).toMatchObject({ code: 105, msg: expect.stringContaining(said) });
      const pod = node.pod();
      await pod.add(network);
      const before = kernelNetwork(pod);
      const to = [`default/p-${pod.containerId}`, "--to", `${network}@net5`];
      const env = [`CNI_PATH=${node.bin}`];
      const words = commandLine(node, "switch", ...to);
      const { exitCode, stderr } = Bun.spawnSync(["env", ...env, ...words]);
      expect([exitCode, stderr.toString()]).toEqual([1, expect.stringContaining(said)]);
      expect(kernelNetwork(pod)).toEqual(before);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each(["0.3.1", "1.0.0"])("Flannel leaves nothing, CNI %s", async (cniVersion) => {
    await withNode(async (node) => {
      const { network } = install(node, "Flannel");
      const pod = node.pod();
      await pod.add({ cni: `${network},${network},${network}@net7`, cniVersion });
      expect(Object.keys(kernelNetwork(pod).macs).sort()).toEqual(["eth0", "eth1", "net7"]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

describe.skipIf(skipReason !== undefined)("a default route that no result names:", () => {
  const own = (node: Node, pod: Pod, ...words: string[]) => {
    const env = [`CNI_PATH=${node.bin}`];
    const line = commandLine(node, "switch", `default/p-${pod.containerId}`, ...words);
    const { exitCode, stderr } = Bun.spawnSync(["env", ...env, ...line]);
    expect([exitCode, stderr.toString()]).toEqual([0, ""]);
  };
  const owner = (pod: Pod) => pod.run("ip", "-o", "route", "show", "default").trim();
  const quiet: [SystemName, string][] = [
    ["Calico, no interfaces", "via 169.254.1.1 dev eth0"],
    ["Calico, the host's end alone", "via 169.254.1.1 dev eth0"],
    ["Canal", "via 169.254.1.1 dev eth0"],
    ["Romana", "dev eth0"],
    ["Weave, no version", "via 10.236.0.1 dev eth0"],
    ["Weave", "via 10.236.0.1 dev eth0"],
  ];

  test.each(quiet)("CHECK notices that %s's is lost, once it has seen it", async (name, route) => {
    await withNode(async (node) => {
      const pod = node.pod();
      await pod.add(install(node, name).network);
      expect(owner(pod)).toStartWith(`default ${route}`);
      for (let i = 0; i < 2; i++) {
        expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      }
      pod.run("ip", "route", "del", "default");
      const { json } = await pod.call("CHECK");
      const gone = expect.stringMatching(/ gone is route 0\.0\.0\.0\/0( via [0-9.]+)?; /);
      expect(json).toMatchObject({ code: 11, msg: gone });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  const secret = quiet.filter(([name]) => name !== "Romana");

  test.each(secret)("%s's goes, and another network inherits", async (name, route) => {
    await withNode(async (node) => {
      const { network } = install(node, name);
      installBridge(node, "plain", false);
      installBridge(node, "blue", true);
      const pod = node.pod();
      await pod.add(`plain,${network}@net5,blue@net6`);
      expect(owner(pod)).toStartWith(`default ${route.replace("eth0", "net5")}`);
      own(node, pod, "--from", network);
      expect(owner(pod)).toStartWith("default via 10.239.0.1 dev net6");
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each(quiet)("%s's beside another one: in the result, and noticed", async (name, route) => {
    await withNode(async (node) => {
      const { network } = install(node, name);
      installBridge(node, "blue", true);
      const pod = node.pod();
      const result = await pod.add(`${network},blue@net6`);
      const [, gw] = /^via (\S+)/.exec(route) ?? [];
      expect(result.routes).toEqual([{ dst: "0.0.0.0/0", ...(gw !== undefined && { gw }) }]);
      expect(owner(pod)).toStartWith(`default ${route}`);
      const macs = result.interfaces?.filter(({ sandbox }) => sandbox).map(({ mac }) => mac);
      expect(macs).toEqual([kernelNetwork(pod).macs["eth0"], kernelNetwork(pod).macs["net6"]]);
      pod.run("ip", "route", "del", "default");
      // By the name of its list, whatever its file is called.
      const { name: own } = systems[name].config as { name: string };
      const gone = expect.stringContaining(`"${own}" (eth0) of pod`);
      expect((await pod.call("CHECK")).json).toMatchObject({ code: 11, msg: gone });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each(secret)("a switch from another owner gives it to %s", async (name, route) => {
    await withNode(async (node) => {
      const { network } = install(node, name);
      installBridge(node, "plain", false);
      installBridge(node, "blue", true);
      const pod = node.pod();
      await pod.add("plain,blue@net5");
      own(node, pod, "--from", "blue", "--to", `${network}@net6`);
      expect(owner(pod)).toStartWith(`default ${route.replace("eth0", "net6")}`);
      // Beside its owner the route is refused, and inherited when that goes.
      own(node, pod, "--from", network, "--to", "blue@net5");
      own(node, pod, "--to", `${network}@net6`);
      expect(owner(pod)).toStartWith("default via 10.239.0.1 dev net5");
      own(node, pod, "--from", "blue");
      expect(owner(pod)).toStartWith(`default ${route.replace("eth0", "net6")}`);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a repair of what lost it brings it back on record", async () => {
    await withNode(async (node) => {
      const { network } = install(node, "Weave");
      const pod = node.pod();
      await pod.add(network);
      for (let i = 0; i < 2; i++) {
        await pod.call("CHECK");
        pod.run("ip", "route", "del", "default");
        const words = commandLine(node, "repair", `default/p-${pod.containerId}`);
        const { stdout } = Bun.spawnSync(["env", `CNI_PATH=${node.bin}`, ...words]);
        expect(stdout.toString()).toContain("made anew");
        expect(owner(pod)).toBe("default via 10.236.0.1 dev eth0");
      }
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

test.skipIf(skipReason !== undefined)("a CHECK writes over no other operation", async () => {
  await withNode(async (node) => {
    const pod = node.pod();
    await pod.add(install(node, "Weave").network);
    const host = makeHost();
    const state = openState(host, join(node.dir, "state"));
    const kernel = readNetwork(pod.netns) ?? bareKernel;
    const read = () => attachments(host, state, pod.containerId)[0] as StoredAttachment;
    const before = read();
    noteLeftOut(host, state, { ...before, createdAtMs: 1 }, kernel);
    noteLeftOut(host, state, before, bareKernel);
    expect(read()).toEqual(before);
    noteLeftOut(host, state, before, kernel);
    expect(read().result).toMatchObject({ routes: [{ dst: "0.0.0.0/0", gw: "10.236.0.1" }] });
    closeState(state);
    await pod.del();
  });
});

describe.skipIf(skipReason !== undefined)("Flannel without its subnet file:", () => {
  test.each([100, 999, 11])("code %d is kept, nothing is left, DEL succeeds", async (errorCode) => {
    await withNode(async (node) => {
      const { network } = install(node, "Flannel", { errorCode });
      installBridge(node, "plain", true);
      rmSync(subnetFile(node));
      for (const cni of [network, `plain,${network}@eth5`, `${network},plain@eth5`]) {
        const pod = node.pod();
        const { status, json } = await pod.call("ADD", { cni });
        expect(json).toMatchObject({ cniVersion: "1.0.0", code: errorCode });
        expect(json?.msg).toContain(`network "${network}"`);
        expect(json?.msg).toContain("loadFlannelSubnetEnv failed");
        expect(status).toBe(1);
        expect(kernelNetwork(pod).macs).toEqual({});
        expect(node.traces()).toEqual(noTraces);
        await pod.del();
      }
    });
  });

  test("lost after ADD: DEL releases everything all the same", async () => {
    await withNode(async (node) => {
      const { network } = install(node, "Flannel");
      const pod = node.pod();
      await pod.add(network);
      rmSync(subnetFile(node));
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});
