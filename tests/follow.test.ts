/**
 * Edits of what a pod asks for, while it runs: what they change, and the compiled agent that does
 * it on real networks. lib/agent/follow.ts, lib/node/running_pod.ts.
 */
import { Database } from "bun:sqlite";
import { describe, expect, test } from "bun:test";
import { appendFileSync, existsSync, renameSync } from "node:fs";
import { join } from "node:path";
import { changesOf } from "../lib/agent/follow.ts";
import type { Wanted } from "../lib/call.ts";
import { CniError } from "../lib/cni.ts";
import { parseReference } from "../lib/kubernetes/npwg.ts";
import { requestOf } from "../lib/node/running_pod.ts";
import type { StoredAttachment } from "../lib/record.ts";
import { onNode } from "../lib/selection.ts";
import { fakePlugin } from "./fakes.ts";
import { type Asked, type NodeCluster, startNodeCluster } from "./fixtures/quirks/cluster.ts";
import {
  command,
  hostLocal,
  kernelNetwork,
  type Node,
  noTraces,
  type Pod,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { type AgentProcess, rowsOf, startAgent, until } from "./policed.ts";
import { madeAttachment } from "./record.ts";
import { reasonToSkip } from "./skip.ts";

const byNetworks = "asked for by k8s.v1.cni.cncf.io/networks";

/** What is attached: `net1 a` is network default/a. */
function had(text: string, more: Partial<StoredAttachment> = {}): StoredAttachment {
  const [ifName = "", network = ""] = text.split(" ");
  return {
    ...madeAttachment({ ifName, network: `default/${network}`, reason: byNetworks }),
    ...{ state: "attached", result: {}, failedAtMs: 0, error: "", createdAtMs: 0, netnsId: "x" },
    ...more,
  };
}

const eth0 = had("eth0", { network: "blue", reason: "default network" });

/** What is asked for, by the annotation. */
function want(text: string, more: Partial<Wanted> = {}): Wanted {
  const element = parseReference(text, "default", "test");
  return { ...element, from: "definition", reason: byNetworks, isFurther: true, ...more };
}

/** In short: `net1>b` one for another one, `net1>` gone, `>b@x` one more. */
function stepsOf(asked: Wanted[], rows: StoredAttachment[], primarySet: Wanted[] = []): string[] {
  const wanted = { decision: "default", primarySet, further: asked } as const;
  return changesOf(wanted, [eth0, ...rows]).steps.map(({ detach, want: one }) => {
    const at = one?.ifName === undefined ? "" : `@${one.ifName}`;
    return `${detach?.ifName ?? ""}>${one?.network ?? ""}${at}`;
  });
}

describe("changesOf()", () => {
  const ips = { ips: ["10.0.0.9"] };
  test.each<[string, Wanted[], StoredAttachment[], string[]]>([
    ["nothing", [want("a"), want("b@x")], [had("net1 a"), had("x b")], []],
    ["one for another", [want("b")], [had("net1 a")], ["net1>b"]],
    ["one more", [want("a"), want("b")], [had("net1 a")], [">b"]],
    ["the same once more", [want("a"), want("a")], [had("net1 a")], [">a"]],
    ["one less, the other keeps its name", [want("b")], [had("net1 a"), had("net2 b")], ["net1>"]],
    ["all", [], [had("net1 a"), had("net2 b")], ["net1>", "net2>"]],
    ["the name of an interface", [want("a@x")], [had("net1 a")], ["net1>a@x"]],
    ["a name that was fixed and is free", [want("a")], [had("x a")], []],
    [
      "what stands on a name",
      [want("b@x"), want("c")],
      [had("net1 a"), had("x a")],
      ["x>b@x", "net1>c"],
    ],
    ["order", [want("b"), want("a")], [had("net1 a"), had("net2 b")], []],
    ["a wish", [want("a", { capabilityArgs: ips })], [had("net1 a")], ["net1>a"]],
    ["no wish", [want("a", { capabilityArgs: ips })], [had("net1 a", { capabilityArgs: ips })], []],
    ["what a repair asked for", [want("a")], [had("net1 a", { args: { cni: ips } })], []],
    ["arguments", [want("a", { cniArgs: { x: 1 } })], [had("net1 a")], ["net1>a"]],
    [
      "their order",
      [want("a", { cniArgs: { x: 1, y: 2 } })],
      [had("net1 a", { args: { cni: { y: 2, x: 1 } } })],
      [],
    ],
    ["a device", [want("a")], [had("net1 a", { capabilityArgs: { deviceID: "1" } })], []],
    ["the default route", [want("a", { defaultRoute: [] })], [had("net1 a")], ["net1>a"]],
    [
      "its gateway",
      [want("a", { defaultRoute: ["10.0.0.1"] })],
      [had("net1 a", { defaultRoute: ["10.0.0.2"] })],
      ["net1>a"],
    ],
    ["a default route that it inherited", [want("a")], [had("net1 a", { defaultRoute: [] })], []],
    ["what an operator attached", [], [had("net1 a", { reason: "switch" })], []],
    ["what every pod gets", [], [had("net1 a", { reason: "attached to every pod" })], []],
    ["a half", [want("a")], [had("net1 a", { state: "planned" })], ["net1>a"]],
  ])("changes %s", (_, asked, rows, steps) => {
    expect(stepsOf(asked, rows)).toEqual(steps);
  });

  test("members of the primary set come and go, but for the primary", () => {
    const cni = (network: string, ifName?: string): Wanted =>
      onNode({ network, ...(ifName !== undefined && { ifName }) }, "asked for by cni");
    const red = had("eth1", { network: "red", reason: "asked for by cni" });
    expect(stepsOf([], [red], [cni("blue"), cni("green")])).toEqual(["eth1>green"]);
    expect(stepsOf([], [red], [cni("red", "eth1"), cni("green")])).toEqual([]);
  });

  test.each<[string, Wanted[], string, string]>([
    ["the same", [onNode({ network: "blue" }, "asked for by cni")], "asked for by cni", ""],
    [
      "chosen, and written down by us",
      [onNode({ network: "blue" }, "asked for by cni")],
      "best of 3 candidates by KPIs",
      "",
    ],
    [
      "another",
      [onNode({ network: "red" }, "asked for by cni")],
      "asked for by cni",
      'its primary network stays "blue" though it asks for "red"',
    ],
    [
      "none any more",
      [onNode({ network: "red" }, "default network")],
      "asked for by cni",
      'its primary network stays "blue", which it asked for',
    ],
    [
      "of the table, which changed",
      [onNode({ network: "red" }, "default network")],
      "default network",
      "",
    ],
  ])("never changes the primary: %s", (_, primarySet, reason, primary) => {
    const wanted = { decision: "cni" as const, primarySet, further: [] };
    const rows = [{ ...eth0, reason }];
    expect(changesOf(wanted, rows)).toEqual({ steps: [], primary });
  });

  test("refuses what an ADD would refuse", () => {
    expect(() => stepsOf([want("a@x"), want("b@x")], [])).toThrow(CniError);
  });

  test("requestOf() carries what the runtime offered, and no wish of one network", () => {
    const portMappings = [{ hostPort: 80, containerPort: 80 }];
    const primary = had("eth0 a", {
      capabilityArgs: { portMappings, ips: ["10.0.0.9"], mac: "aa" },
      cniArgs: "IgnoreUnknown=1;IP=10.0.0.9;K8S_POD_NAME=web",
    });
    const { args, config, ifName } = requestOf(
      { cniVersion: "1.1.0", name: "other", type: "genie", runtimeConfig: { aliases: {} } },
      [primary, had("net1 b", { capabilityArgs: { bandwidth: {} } })],
    );
    expect({ args, ifName }).toEqual({
      args: "IgnoreUnknown=1;K8S_POD_NAME=web",
      ifName: "eth0",
    });
    expect(config).toMatchObject({ name: "genie", runtimeConfig: { portMappings } });
    expect(Object.keys(config.runtimeConfig ?? {})).toEqual(["portMappings"]);
  });
});

const missing = reasonToSkip(...realNeeds, "curl");

const networksKey = "k8s.v1.cni.cncf.io/networks";
const statusKey = "k8s.v1.cni.cncf.io/network-status";

/** A pod of the node that the API has too. */
interface Known {
  pod: Pod;
  path: string;
  /** Writes its annotations, as `kubectl annotate` would. */
  edit: (annotations: Record<string, string>, metadata?: object) => void;
  /** `<interface> <prefix>` of what the kernel has. */
  has: () => string[];
}

/** A node that follows. */
interface Following {
  node: Node;
  api: NodeCluster;
  agent: () => AgentProcess;
  add: (annotations: Record<string, string>) => Promise<Known>;
  /** Waits until the agent has done with all that was edited so far. */
  settled: () => Promise<void>;
}

const prefixes: Record<string, string> = {
  ...{ blue: "10.241.0", red: "10.242.0", white: "10.243.0", green: "10.244.0" },
};
const nadPath = (name: string) =>
  `/apis/k8s.cni.cncf.io/v1/namespaces/default/network-attachment-definitions/${name}`;

async function withFollowing(act: (following: Following) => Promise<void>): Promise<void> {
  await withNode(async (node) => {
    await using api = await startNodeCluster(node);
    const agents: AgentProcess[] = [];
    const file = join(node.dir, "plugins.toml");
    appendFileSync(
      file,
      `default.networks = ["blue"]
kubernetes = { kubeconfig = "${api.kubeconfig}" }
agent = { follow_annotations = true, listen = "", cri_socket = "${node.dir}/absent.sock" }
`,
    );
    const list = (name: string) => ({
      cniVersion: "1.0.0",
      plugins: [
        {
          ...{ type: "bridge", bridge: `${name}0`, isGateway: true },
          ipam: hostLocal(node, [`${prefixes[name]}.0/24`]),
        },
      ],
    });
    for (const name of ["blue", "green"]) node.network(name, list(name));
    api.serve("/api/v1/pods");
    for (const name of ["red", "white"]) {
      api.put({ [nadPath(name)]: { spec: { config: JSON.stringify(list(name)) } } });
    }
    const add = async (annotations: Record<string, string>): Promise<Known> => {
      const pod = node.pod();
      const path = `/api/v1/namespaces/default/pods/p-${pod.containerId}`;
      const uid = `uid-${pod.containerId}`;
      const edit: Known["edit"] = (edited, metadata = {}) =>
        api.put({ [path]: { metadata: { uid, annotations: edited, ...metadata } } });
      edit(annotations);
      await pod.add({ annotations, args: `;K8S_POD_UID=${uid}` });
      const has = () =>
        Object.entries(kernelNetwork(pod).addresses)
          .map(([ifName, [address = ""]]) => `${ifName} ${nameOf(address)}`)
          .sort();
      return { pod, path, edit, has };
    };
    // Pods are begun in the order of the record: what stands before this one was looked at.
    const settled = async () => {
      const last = await add({});
      const query = `SELECT 1 FROM followed WHERE container_id = '${last.pod.containerId}'`;
      const state = join(node.dir, "state");
      await until(() => rowsOf(state, query).length > 0);
      await until(() => rowsOf(state, "SELECT 1 FROM operations").length === 0);
      await last.pod.del();
    };
    const agent = () => {
      const started = startAgent(node.dir, file, undefined, node.enter);
      agents.push(started);
      return started;
    };
    try {
      await act({ node, api, agent, add, settled });
    } finally {
      await Promise.all(agents.map((one) => one.end("SIGKILL")));
    }
  });
}

/** The network of an address. */
function nameOf(address: string): string {
  return Object.keys(prefixes).find((name) => address.startsWith(prefixes[name] ?? "?")) ?? "none";
}

/** What the last status says: `<interface> <name>`. */
function statusOf(requests: Asked[], path: string): string[] {
  const [found] = requests
    .filter((one) => one.method === "PATCH" && one.path.startsWith(path))
    .map(({ body }) => JSON.parse(body).metadata?.annotations?.[statusKey])
    .slice(-1);
  const list = JSON.parse(found ?? "[]") as { interface: string; name: string }[];
  return list.map((one) => `${one.interface} ${one.name}`);
}

/** Events: `<reason> <message>`. */
function events(requests: Asked[]): string[] {
  return requests
    .filter(({ method, path }) => method === "POST" && path.endsWith("/events"))
    .map(({ body }) => JSON.parse(body))
    .map(({ reason, message }) => `${reason} ${message}`);
}

describe.skipIf(missing !== undefined)("genie agent, follow_annotations", () => {
  test("networks come, are replaced and go; status and Events say so", async () => {
    await withFollowing(async ({ node, api, agent, add, settled }) => {
      agent();
      const { pod, path, edit, has } = await add({ [networksKey]: "red" });
      expect(has()).toEqual(["eth0 blue", "net1 red"]);
      edit({ [networksKey]: "white" });
      await until(() => has().join() === "eth0 blue,net2 white");
      await until(() => statusOf(api.requests(), path).join() === "eth0 blue,net2 default/white");
      const { macs } = kernelNetwork(pod);
      edit({ [networksKey]: "red@x1,white" });
      await until(() => has().join() === "eth0 blue,net2 white,x1 red");
      expect(kernelNetwork(pod).macs).toMatchObject(macs);
      await until(() => events(api.requests()).length === 2);
      expect(events(api.requests())).toEqual([
        expect.stringMatching(
          /^NetworksSwitched attached default\/white \(net2 10.*\), detached default\/red \(net1\)/,
        ),
        expect.stringMatching(/^NetworksSwitched attached default\/red \(x1 10\.\S+\)$/),
      ]);
      edit({});
      await until(() => has().join() === "eth0 blue");
      await settled();
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("another name of a network that is there changes nothing", async () => {
    await withFollowing(async ({ node, api, agent, add, settled }) => {
      renameSync(join(node.dir, "net.d/green.conflist"), join(node.dir, "net.d/20-leaf.conflist"));
      agent();
      const { pod, edit, has } = await add({ cni: "blue,20-leaf" });
      await settled();
      const { macs } = kernelNetwork(pod);
      const state = join(node.dir, "state");
      for (const cni of ["blue,green", "blue,leaf", "blue,green@eth1"]) {
        edit({ cni });
        await settled();
        // An older genie recorded the name that was asked for.
        using database = new Database(join(state, "genie.db"));
        database.run("PRAGMA busy_timeout = 5000");
        database.run(
          `UPDATE attachments SET network = 'leaf', plan = json_set(plan, '$.network', 'leaf')
           WHERE ifname = 'eth1'`,
        );
      }
      expect(has()).toEqual(["eth0 blue", "eth1 green"]);
      expect(kernelNetwork(pod).macs).toEqual(macs);
      expect(events(api.requests())).toEqual([]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("never the primary one, of which an Event warns", async () => {
    await withFollowing(async ({ api, agent, add, settled }) => {
      agent();
      const { pod, edit, has } = await add({ cni: "blue,green" });
      edit({ cni: "green" });
      await until(() => events(api.requests()).some((one) => one.includes("primary")));
      await settled();
      expect(has()).toEqual(["eth0 blue"]);
      expect(events(api.requests()).at(-1)).toContain(
        'stays "blue" though it asks for "green"; only genie switch --primary, or a new pod',
      );
      await pod.del();
    });
  });

  test.each<[string, (one: Known) => void]>([
    [
      "is being deleted",
      ({ edit }) => edit({ [networksKey]: "white" }, { deletionTimestamp: "2026-01-01T00:00:00Z" }),
    ],
    ["was made anew", ({ edit }) => edit({ [networksKey]: "white" }, { uid: "another" })],
  ])("a pod that %s is left alone", async (_, happen) => {
    await withFollowing(async ({ node, agent, add, settled }) => {
      agent();
      const known = await add({ [networksKey]: "red" });
      await settled();
      const before = kernelNetwork(known.pod);
      happen(known);
      await settled();
      expect(kernelNetwork(known.pod)).toEqual(before);
      await known.pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a pod that goes does not wait for a change that hangs", async () => {
    await withFollowing(async ({ node, api, agent, add }) => {
      agent();
      const { pod, edit, has } = await add({ [networksKey]: "red" });
      const marker = join(node.dir, "in");
      const script = `[ $CNI_COMMAND != ADD ] || { touch ${marker}; sleep 60; }`;
      fakePlugin(node.bin, "slow", `#!/bin/sh\n${script}\n`);
      const config = JSON.stringify({ cniVersion: "1.0.0", plugins: [{ type: "slow" }] });
      api.put({ [nadPath("slow")]: { spec: { config } } });
      edit({ [networksKey]: "slow" });
      await until(() => existsSync(marker));
      expect(has()).toEqual(["eth0 blue", "net1 red"]);
      edit({ [networksKey]: "slow" }, { deletionTimestamp: "2026-01-01T00:00:00Z" });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("an edit while no agent ran is followed; what the operator did is not undone", async () => {
    await withFollowing(async ({ node, agent, add, settled }) => {
      const before = agent();
      const edited = await add({ [networksKey]: "red" });
      await settled();
      await before.end("SIGKILL");
      const switched = await add({ [networksKey]: "red" });
      const words = ["switch", `default/p-${switched.pod.containerId}`, "--from", "default/red"];
      expect(command(node, ...words, "--to", "green")).toMatchObject({ status: 0, stderr: "" });
      edited.edit({ [networksKey]: "white" });
      agent();
      await until(() => edited.has().join() === "eth0 blue,net2 white");
      await settled();
      expect(switched.has()).toEqual(["eth0 blue", "net2 green"]);
      for (const { pod } of [edited, switched]) await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a network that fails is told of, and tried again; what was there stays", async () => {
    await withFollowing(async ({ node, api, agent, add }) => {
      agent();
      const { pod, edit, has } = await add({ [networksKey]: "red" });
      const script = `[ $CNI_COMMAND != ADD ] || { echo '{"code":7,"msg":"no luck"}'; exit 1; }`;
      fakePlugin(node.bin, "bad", `#!/bin/sh\n${script}\n`);
      const config = (type: string) => ({
        [nadPath("bad")]: {
          spec: {
            config: JSON.stringify({
              cniVersion: "1.0.0",
              plugins: [{ type, bridge: "bad0", ipam: hostLocal(node, ["10.243.0.0/24"]) }],
            }),
          },
        },
      });
      api.put(config("bad"));
      edit({ [networksKey]: "bad" });
      await until(() => events(api.requests()).some((one) => one.includes("no luck")));
      expect(has()).toEqual(["eth0 blue", "net1 red"]);
      api.put(config("bridge"));
      await until(() => has().join() === "eth0 blue,net2 white");
      edit({ [networksKey]: "not a network!" });
      await until(() => events(api.requests()).some((one) => one.includes("not [namespace/]name")));
      expect(has()).toEqual(["eth0 blue", "net2 white"]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });
});
