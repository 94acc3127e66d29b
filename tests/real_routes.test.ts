/**
 * Who owns the default route when several real networks bring one: the first that does, per address
 * family, in whatever order the pod names them; and the result says what the kernel has
 * (lib/default_route.ts).
 */
import { describe, expect, test } from "bun:test";
import {
  expectKernel,
  hostLocal,
  kernelNetwork,
  type Node,
  noTraces,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);

describe.skipIf(skipReason !== undefined)("default routes:", () => {
  /** one and two: bridges that each bring a default route per family. */
  function twoDefaults(node: Node, first: string[], second: string[]): void {
    const bridge = (name: string, subnets: string[]) =>
      node.network(name, {
        cniVersion: "1.0.0",
        plugins: [
          {
            type: "bridge",
            bridge: `${name}0`,
            isDefaultGateway: true,
            ipam: hostLocal(node, subnets),
          },
        ],
      });
    bridge("one", first);
    bridge("two", second);
    const defaults = second.map((subnet) => (subnet.includes(":") ? "::/0" : "0.0.0.0/0"));
    node.network("ptp", {
      cniVersion: "0.3.1",
      plugins: [{ type: "ptp", ipam: hostLocal(node, second, defaults) }],
    });
  }
  const [one4, one6] = ["10.221.0.0/24", "fd42:221::/64"];
  const [two4, two6] = ["10.222.0.0/24", "fd42:222::/64"];
  const gw = (subnet: string) => subnet.replace(/0?\/\d+$/, "1");

  test.each([
    ["IPv4", "one,two", [one4], [two4], [gw(one4)]],
    ["IPv4", "two,one", [one4], [two4], [gw(two4)]],
    ["IPv6", "one,two", [one6], [two6], [gw(one6)]],
    ["IPv6", "two,one", [one6], [two6], [gw(two6)]],
    ["dual stack", "one,two", [one4, one6], [two4, two6], [gw(one4), gw(one6)]],
    ["dual stack", "two,one", [one4, one6], [two4, two6], [gw(two4), gw(two6)]],
    ["each another family", "one,two", [one4], [two6], [gw(one4), gw(two6)]],
    ["each another family", "two,one", [one4], [two6], [gw(one4), gw(two6)]],
    ["one family, both families", "one,two", [one4], [two4, two6], [gw(one4), gw(two6)]],
    ["one family, both families", "two,one", [one4], [two4, two6], [gw(two4), gw(two6)]],
    ["bridge and ptp", "one,ptp", [one4, one6], [two4, two6], [gw(one4), gw(one6)]],
    ["ptp and bridge", "ptp,one", [one4, one6], [two4, two6], [gw(two4), gw(two6)]],
    ["three of them", "ptp,one,two", [one4], [two4], [gw(two4)]],
    ["one twice", "one,one", [one4], [two4], [gw(one4)]],
    ["named out of order", "one@eth3,two", [one4], [two4], [gw(two4)]],
  ])("%s: %s", async (_, cni, first, second, owners) => {
    await withNode(async (node) => {
      twoDefaults(node, first, second);
      const pod = node.pod();
      const result = await pod.add(cni);
      expectKernel(pod, result);
      expect(kernelNetwork(pod).defaults).toEqual(owners.toSorted());
      // No route is left at the metric that held the owner's meanwhile.
      expect(pod.run("ip", "-4", "route") + pod.run("ip", "-6", "route")).not.toContain(
        "metric 40",
      );
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      await pod.del();
      expect(kernelNetwork(pod).defaults).toEqual([]);
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("the owner's route survives the failure of the second network", async () => {
    await withNode(async (node) => {
      twoDefaults(node, [one4], [two4]);
      const pod = node.pod();
      const { status } = await pod.call("ADD", { cni: "one,two,none" });
      expect(status).toBe(1);
      expect(kernelNetwork(pod)).toEqual({ macs: {}, addresses: {}, defaults: [], routes: [] });
      expect(node.traces()).toEqual(noTraces);
    });
  });
});
