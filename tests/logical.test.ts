/**
 * CNI-Genie's logical networks for real: parts of one bridge, and of one ptp network, beside plain
 * pods of it; and the five scenarios of its manual (docs/network-policy) with the compiled agent,
 * nft and packets.
 */
import { describe, expect, test } from "bun:test";
import { appendFileSync } from "node:fs";
import { join } from "node:path";
import { type NodeCluster, startNodeCluster } from "./fixtures/quirks/cluster.ts";
import {
  addressOf,
  hostLocal,
  linksGone,
  type Node,
  noTraces,
  type Pod,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { collections, inputsKnown, policyPath, startAgent, until } from "./policed.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds, "nftables", "curl");

const logicalPath = (name: string) =>
  `/apis/alpha.network.k8s.io/v1/namespaces/default/logicalnetworks/${name}`;
const logical = (name: string, sub_subnet: string) => ({
  [logicalPath(name)]: {
    metadata: { name, namespace: "default" },
    spec: { plugin: "phy", sub_subnet },
  },
});

/** A node with one physical network, which plain pods get, and an API server. */
async function withPhysical(
  plugin: object,
  subnets: string[],
  act: (node: Node, cluster: NodeCluster) => Promise<void>,
): Promise<void> {
  await withNode(async (node) => {
    await using cluster = await startNodeCluster(node);
    cluster.serve(...collections);
    cluster.put({ "/api/v1/namespaces/default": { metadata: {} } });
    const plugins = [{ ...plugin, ipam: hostLocal(node, subnets) }];
    node.network("phy", { cniVersion: "1.0.0", plugins });
    appendFileSync(
      join(node.dir, "plugins.toml"),
      `default.networks = ["phy"]
kubernetes.kubeconfig = "${cluster.kubeconfig}"
agent.listen = ""
`,
    );
    await act(node, cluster);
    await linksGone(node);
    expect(node.traces()).toEqual(noTraces);
  });
}

/** Attaches a pod to a logical network; to none: a plain one. */
async function attach(node: Node, { put }: NodeCluster, networks?: string): Promise<Pod> {
  const pod = node.pod();
  const uid = `uid-${pod.containerId}`;
  const annotations: Record<string, string> = networks === undefined ? {} : { cni: "", networks };
  const name = `p-${pod.containerId}`;
  put({ [`/api/v1/namespaces/default/pods/${name}`]: { metadata: { uid, annotations } } });
  await pod.add({ annotations, args: `;K8S_POD_UID=${uid}` });
  return pod;
}

async function reaches(from: Pod, to: string): Promise<boolean> {
  const enter = ["nsenter", `--net=${from.netns}`];
  return (await Bun.spawn([...enter, "ping", "-c1", "-W1", to], { stdout: "ignore" }).exited) === 0;
}

/** Who reaches whom, both ways, as `a-b`; one way as `a>b`. */
async function talking(pods: Record<string, Pod>): Promise<string[]> {
  const names = Object.keys(pods);
  const pairs = names.flatMap((a, i) => names.slice(i + 1).map((b) => [a, b] as const));
  const found = pairs.map(async ([a, b]) => {
    const [one, other] = [pods[a], pods[b]];
    if (!one || !other) return [];
    const there = await reaches(one, addressOf(other, "eth0"));
    const back = await reaches(other, addressOf(one, "eth0"));
    if (there && back) return [`${a}-${b}`];
    return [...(there ? [`${a}>${b}`] : []), ...(back ? [`${b}>${a}`] : [])];
  });
  return (await Promise.all(found)).flat().sort();
}

const kinds: [string, object][] = [
  ["bridge", { type: "bridge", bridge: "phy0", isDefaultGateway: true }],
  ["ptp", { type: "ptp" }],
];

describe.skipIf(skipReason !== undefined)("logical networks, for real", () => {
  test.each(kinds)("on one %s, beside plain pods", async (_kind, plugin) => {
    await withPhysical(plugin, ["10.219.0.0/24", "fd42:219::/64"], async (node, cluster) => {
      cluster.put({
        ...logical("net1", "10.219.0.16/28"),
        ...logical("net2", "10.219.0.32/28"),
        ...logical("net6", "fd42:219::100/120"),
      });
      const plain = await attach(node, cluster);
      const one = await attach(node, cluster, "net1");
      const two = await attach(node, cluster, "net2");
      const again = await attach(node, cluster, "net1");
      const six = await attach(node, cluster, "net6");
      const all = { plain, one, two, again, six };
      const addresses = Object.values(all).map((pod) => addressOf(pod, "eth0"));
      expect(addresses.slice(1, 4)).toEqual(["10.219.0.16", "10.219.0.32", "10.219.0.17"]);
      expect(six.run("ip", "-6", "addr", "show", "eth0")).toContain("fd42:219::100/");
      expect((await talking(all)).length).toBe(10);
      for (const pod of Object.values(all)) {
        expect(await reaches(pod, "10.219.0.1")).toBe(true);
        expect(await pod.call("CHECK")).toMatchObject({ status: 0 });
        await pod.del();
        pod.kill();
      }
    });
  });

  test.each(kinds)(
    "the five scenarios of the manual, on %s",
    async (_kind, plugin) => {
      await withPhysical(plugin, ["10.218.0.0/24"], async (node, cluster) => {
        const state = join(node.dir, "state");
        const table = join(node.dir, "plugins.toml");
        appendFileSync(table, "policy.enforce = true\n");
        const agent = startAgent(node.dir, table, node.bin, node.enter);
        const policy = (...entries: [network: string, peers: string][]) => {
          const list = entries.map(([networkSelector, peerNetworks]) => {
            return { networkSelector, peerNetworks };
          });
          const annotations = { genieNetworkpolicy: JSON.stringify(list) };
          const object = { metadata: { uid: "policy", annotations }, spec: { podSelector: {} } };
          cluster.put({ [policyPath("access-nginx")]: entries.length === 0 ? null : object });
        };
        const pods: Record<string, Pod> = {};
        const expectTalking = async (...expected: string[]) => {
          const wanted = [...expected].sort();
          await until(async () => Bun.deepEquals(await talking(pods), wanted));
        };
        try {
          // The plain pod happens to have the first address, which lies in the part of net1.
          cluster.put({
            ...logical("net1", "10.218.0.0/28"),
            ...logical("net2", "10.218.0.16/28"),
            ...logical("net3", "10.218.0.32/28"),
          });
          await inputsKnown(state);
          pods["plain"] = await attach(node, cluster);
          expect(addressOf(pods["plain"], "eth0")).toBe("10.218.0.2");
          for (const name of ["net1", "net2", "net3"])
            pods[name] = await attach(node, cluster, name);
          const second = await attach(node, cluster, "net1");
          // Scenario 4: a peer that is not there, and then is.
          policy(["net1", "net4"]);
          const others = ["plain-net2", "plain-net3", "net2-net3"];
          await expectTalking(...others);
          cluster.put(logical("net4", "10.218.0.48/28"));
          pods["net4"] = await attach(node, cluster, "net4");
          others.push("plain-net4", "net2-net4", "net3-net4");
          await expectTalking(...others, "net1-net4");
          // Scenario 1: no policy.
          policy();
          const net1 = ["net1-net2", "net1-net3", "net1-net4"];
          await expectTalking(...others, ...net1, "plain-net1");
          // Scenario 2: one peer. A network always talks within itself.
          policy(["net1", "net2"]);
          await expectTalking(...others, "net1-net2");
          expect(await talking({ a: pods["net1"] as Pod, b: second })).toEqual(["a-b"]);
          // Scenario 3: two entries.
          policy(["net1", "net2"], ["net1", "net3"]);
          await expectTalking(...others, "net1-net2", "net1-net3");
          // Scenario 5: two peers, and one of them taken out.
          policy(["net1", "net2,net3"]);
          await expectTalking(...others, "net1-net2", "net1-net3");
          policy(["net1", "net2"]);
          await expectTalking(...others, "net1-net2");
          // A plain pod with an address of net1 is no member of it as a peer either.
          policy(["net2", "net1"]);
          await expectTalking("plain-net1", "plain-net3", "plain-net4", "net3-net4", ...net1);
          for (const pod of [...Object.values(pods), second]) {
            await pod.del();
            pod.kill();
          }
        } finally {
          await agent.end("SIGKILL");
        }
      });
    },
    300_000,
  );
});
