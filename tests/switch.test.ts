/**
 * `genie switch` on real networks: a running pod loses one network and gains another one, and
 * whatever fails leaves it what it had. lib/node/switch.ts, lib/node/running_pod.ts.
 */
import { describe, expect, test } from "bun:test";
import { appendFileSync, existsSync, renameSync } from "node:fs";
import { join } from "node:path";
import { closeState } from "../lib/database.ts";
import { attachments } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { fakePlugin, makeHost } from "./fakes.ts";
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
import { rowsOf } from "./policed.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);

const label = (pod: Pod) => `default/p-${pod.containerId}`;

/** blue and green bring a default route, red and white do not; bad fails as `DIR/fails` says. */
function networks(node: Node): void {
  const bridge = (name: string, subnet: string, more: object) =>
    node.network(name, {
      cniVersion: "1.0.0",
      plugins: [
        { type: "bridge", bridge: `${name}0`, ...more, ipam: hostLocal(node, [subnet]) },
        { type: "portmap", capabilities: { portMappings: true } },
      ],
    });
  bridge("blue", "10.221.0.0/24", { isDefaultGateway: true });
  bridge("green", "10.222.0.0/24", { isDefaultGateway: true });
  bridge("red", "10.223.0.0/24", { isGateway: true });
  bridge("white", "10.224.0.0/24", { isGateway: true });
}

/** A network on a real bridge whose second plugin runs a script first. */
function scripted(node: Node, name: string, script: string): void {
  fakePlugin(node.bin, name, `#!/bin/sh\n${script}\nexec ${join(pluginDir, "portmap")}\n`);
  node.network(name, {
    cniVersion: "1.0.0",
    plugins: [
      { type: "bridge", bridge: `${name}0`, ipam: hostLocal(node, ["10.225.0.0/24"]) },
      { type: name, capabilities: { portMappings: true } },
    ],
  });
}

const failAdd = `[ $CNI_COMMAND != ADD ] || { echo '{"code":7,"msg":"no such luck"}'; exit 1; }`;

/** What is on record of a pod, or of all: `<interface> <network> <state>`. */
function rows(node: Node, pod?: Pod): string[] {
  const host = makeHost();
  const state = openState(host, join(node.dir, "state"));
  try {
    return attachments(host, state, pod?.containerId).map(
      (row) => `${row.ifName} ${row.network} ${row.state}`,
    );
  } finally {
    closeState(state);
  }
}

/** The networks of the ledger that a switch touched, in order. */
function ledger(node: Node): string[] {
  return rowsOf<{ line: string }>(
    join(node.dir, "state"),
    `SELECT command || ' ' || network || ' ' || ifname || ' ' || outcome AS line
     FROM ledger WHERE kind = 'network' AND decided_by = 'switch' ORDER BY id`,
  ).map(({ line }) => line);
}

/** What the kernel has, without what is anew each time. */
function shape(pod: Pod): object {
  const { addresses, defaults } = kernelNetwork(pod);
  return { addresses, defaults };
}

/** The pod reaches the other one by this interface. */
function pings(pod: Pod, to: Pod, ifName: string, toName = ifName): void {
  pod.run("ping", "-c1", "-W3", "-I", ifName, addressOf(to, toName));
}

interface Row {
  name: string;
  words: string[];
  /** `<interface> <network>` afterwards. */
  has: string[];
  defaults: string[];
  noted: string[];
}

const moves: Row[] = [
  {
    name: "a secondary: the new one is there before the old one goes",
    words: ["--from", "red", "--to", "white"],
    has: ["eth0 blue", "eth2 white"],
    defaults: ["10.221.0.1"],
    noted: ["ADD white eth2 ok", "DEL red eth1 ok"],
  },
  {
    name: "a secondary on the same interface",
    words: ["--from", "red", "--to", "white", "--interface", "eth1"],
    has: ["eth0 blue", "eth1 white"],
    defaults: ["10.221.0.1"],
    noted: ["DEL red eth1 ok", "ADD white eth1 ok"],
  },
  {
    name: "the primary, whose default route comes from the new one",
    words: ["--from", "blue", "--to", "green", "--primary"],
    has: ["eth0 green", "eth1 red"],
    defaults: ["10.222.0.1"],
    noted: ["DEL blue eth0 ok", "ADD green eth0 ok"],
  },
  {
    name: "one more, which leaves the default route where it is",
    words: ["--to", "green"],
    has: ["eth0 blue", "eth1 red", "net1 green"],
    defaults: ["10.221.0.1"],
    noted: ["ADD green net1 ok"],
  },
  {
    name: "one more of the same network",
    words: ["--to", "red@r7"],
    has: ["eth0 blue", "eth1 red", "r7 red"],
    defaults: ["10.221.0.1"],
    noted: ["ADD red r7 ok"],
  },
  {
    name: "one less",
    words: ["--from", "red@eth1"],
    has: ["eth0 blue"],
    defaults: ["10.221.0.1"],
    noted: ["DEL red eth1 ok"],
  },
];

describe.skipIf(skipReason !== undefined)("genie switch", () => {
  test.each(moves)("$name", async ({ words, has, defaults, noted }) => {
    await withNode(async (node) => {
      networks(node);
      const [pod, peer] = [node.pod(), node.pod()];
      await pod.add("blue,red");
      await peer.add("blue,red,white@w1,green@g1");
      const before = [shape(pod), node.traces()];
      const dry = command(node, "switch", label(pod), ...words, "--dry-run");
      expect(dry).toMatchObject({ status: 0, stderr: "" });
      expect([shape(pod), node.traces()]).toEqual(before);
      const run = command(node, "switch", label(pod), ...words, "--json");
      expect(run).toMatchObject({ status: 0, stderr: "" });
      expect(rows(node, pod).sort()).toEqual(has.map((one) => `${one} attached`));
      const { addresses, defaults: found } = kernelNetwork(pod);
      expect(Object.keys(addresses).sort()).toEqual(has.map((one) => one.split(" ")[0] ?? ""));
      expect(found).toEqual(defaults);
      expect(ledger(node)).toEqual(noted);
      const { attached } = JSON.parse(run.stdout);
      if (attached) {
        const there = { white: "w1", green: "g1" }[attached.network as string] ?? "eth1";
        pings(pod, peer, attached.interface, there);
        expect(attached.addresses[0]).toStartWith(addressOf(pod, attached.interface));
      }
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      for (const one of [pod, peer]) await one.del();
      expect(kernelNetwork(pod).macs).toEqual({});
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("reads a network by the name of its file, as repair and report do", async () => {
    await withNode(async (node) => {
      networks(node);
      for (const name of ["red", "white"]) {
        const [old, file] = [`net.d/${name}.conflist`, `net.d/40-${name}-file.conflist`];
        renameSync(join(node.dir, old), join(node.dir, file));
      }
      const pod = node.pod();
      await pod.add("blue,red-file");
      const run = (...words: string[]) => command(node, ...words);
      const repair = run("repair", label(pod), "--network", "40-red-file", "--all");
      expect([repair.status, repair.stdout.includes("red")]).toEqual([0, true]);
      const to = ["--from", "red-file@eth1", "--to", "40-white-file"];
      expect(run("switch", label(pod), ...to).status).toBe(0);
      expect(rows(node, pod)).toEqual(["eth0 blue attached", "eth2 white attached"]);
      const report = run("report", "--network", "red-file", "--json");
      const { networks: reported } = JSON.parse(report.stdout) as {
        networks: { network: string }[];
      };
      expect(reported.map(({ network }) => network)).toEqual(["red"]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a network that would have had the default route gets it when its owner goes", async () => {
    await withNode(async (node) => {
      networks(node);
      const pod = node.pod();
      await pod.add("blue,green");
      expect(kernelNetwork(pod).defaults).toEqual(["10.221.0.1"]);
      expect(command(node, "switch", label(pod), "--to", "red", "--primary").status).toBe(0);
      expect(kernelNetwork(pod).defaults).toEqual(["10.222.0.1"]);
      // Back again: whoever has it keeps it.
      expect(command(node, "switch", label(pod), "--to", "blue", "--primary").status).toBe(0);
      expect(kernelNetwork(pod).defaults).toEqual(["10.222.0.1"]);
      const run = command(node, "switch", label(pod), "--from", "green", "--to", "white");
      expect(run.status).toBe(0);
      expect(kernelNetwork(pod).defaults).toEqual(["10.221.0.1"]);
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each([
    [2, ["--from", "blue", "--to", "white"], "only --primary with --to"],
    [2, ["--from", "blue"], "only --primary with --to"],
    [2, ["--from", "red", "--to", "white", "--primary"], "is not the pod's primary one, blue"],
    [2, ["--primary"], "Give --from, --to or both"],
    [2, ["--from", "red", "--primary"], "--primary needs --to"],
    [1, ["--to", "white@eth0"], "see genie switch --primary"],
    [2, ["--to", "white", "--interface", "no/name"], "Invalid --interface"],
    [2, ["--to", "white@a", "--interface", "b"], "Two interfaces are named"],
    [2, ["--to", "white,red"], "--to takes one network"],
    [2, ["--from", "red", "--to", "white", "--primary", "--interface", "x"], "leave the name out"],
    [1, ["--to", "white@eth1"], 'an interface "eth1" already on network "red": it is attached'],
    [1, ["--to", "white@own0"], "and genie did not make it"],
    [1, ["--from", "white"], "it has blue@eth0, red@eth1"],
    [1, ["--to", "nothing"], 'Unknown network "nothing"'],
    [1, ["--to", "closed"], 'Access to network "closed" denied for pod default/p-'],
    [1, ["--to", "white"], "access.max_attachments.pod is 2"],
    [1, ["--to", "team-a/storage"], "kubeconfig"],
  ])("refuses with %i %j", async (status, words, why) => {
    await withNode(async (node) => {
      networks(node);
      scripted(node, "closed", "");
      const table = [
        `[access]\nmax_attachments = { pod = ${why.includes("max_att") ? 2 : 9} }\n`,
        `[plugins.closed]\nallow = { namespaces = ["others"] }\n`,
      ];
      appendFileSync(join(node.dir, "plugins.toml"), table.join(""));
      const pod = node.pod();
      await pod.add("blue,red");
      pod.run("ip", "link", "add", "own0", "type", "veth", "peer", "own1");
      const before = [shape(pod), rows(node), node.traces()];
      const run = command(node, "switch", label(pod), ...words);
      expect(run.stderr).toContain(why);
      expect(run).toMatchObject({ status, stdout: "" });
      expect([shape(pod), rows(node), node.traces()]).toEqual(before);
      // The quota counts what goes: an exchange is none more.
      const exchange = command(node, "switch", label(pod), "--from", "red", "--to", "white");
      expect(exchange.status).toBe(0);
      await pod.del();
    });
  });

  test.each([
    ["default/p-nobody", "nothing of it is on record on this node"],
    ["nobody", "expected NAMESPACE/POD"],
  ])("%s is no pod of this node", async (name, why) => {
    await withNode(async (node) => {
      networks(node);
      expect(command(node, "switch", name, "--to", "blue").stderr).toContain(why);
    });
  });

  test("a pod whose namespace is gone is refused", async () => {
    await withNode(async (node) => {
      networks(node);
      const pod = node.pod();
      await pod.add("blue");
      pod.kill();
      const run = command(node, "switch", label(pod), "--to", "red");
      expect(run.stderr).toContain("its network namespace is gone");
      await pod.del({ netns: "" });
    });
  });
});

describe.skipIf(skipReason !== undefined)("genie switch that fails", () => {
  test.each([
    ["another interface", ["--from", "red"], "eth1"],
    ["the same interface", ["--from", "red", "--interface", "eth1"], "eth1"],
    ["the primary", ["--primary"], "eth0"],
    ["one more", [], "eth1"],
  ])("%s: the pod has what it had, with its address", async (_, words, ifName) => {
    await withNode(async (node) => {
      networks(node);
      scripted(node, "bad", failAdd);
      const [pod, peer] = [node.pod(), node.pod()];
      await pod.add("blue,red");
      // What the old one had is not the next free address any more.
      await peer.add("blue,red");
      const before = [shape(pod), rows(node), node.traces().files];
      const run = command(node, "switch", label(pod), "--to", "bad", ...words);
      expect(run.stderr).toContain("no such luck");
      expect(run.stderr.includes("is attached again")).toBe(/eth1|primary/.test(words.join()));
      expect(run).toMatchObject({ status: 1, stdout: "" });
      expect([shape(pod), rows(node), node.traces().files]).toEqual(before);
      pings(pod, peer, ifName);
      expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      for (const one of [pod, peer]) await one.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("an old one that cannot be undone is told of, and stays on record for DEL", async () => {
    await withNode(async (node) => {
      networks(node);
      scripted(node, "sticky", `[ $CNI_COMMAND != DEL ] || [ -e ${node.dir}/lets-go ] || exit 9`);
      const pod = node.pod();
      await pod.add("blue,sticky");
      const run = command(node, "switch", label(pod), "--from", "sticky", "--to", "red");
      expect(run.status).toBe(1);
      expect(run.stdout).toMatch(/^attached +red +eth2 /m);
      expect(run.stdout).toContain("exited with status 9");
      expect(rows(node)).toEqual([
        "eth0 blue attached",
        "eth1 sticky planned",
        "eth2 red attached",
      ]);
      node.run("touch", `${node.dir}/lets-go`);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each([
    ["make before break", []],
    ["break before make", ["--interface", "eth1"]],
    ["the primary", ["--primary"]],
  ])("killed in the middle, %s: DEL leaves nothing", async (_, words) => {
    await withNode(async (node) => {
      networks(node);
      scripted(node, "slow", `[ $CNI_COMMAND != ADD ] || { touch ${node.dir}/in; sleep 60; }`);
      const pod = node.pod();
      await pod.add("blue,red");
      const from = words.includes("--primary") ? [] : ["--from", "red"];
      const child = start(node, pod, "--to", "slow", ...from, ...words);
      try {
        while (!existsSync(join(node.dir, "in"))) await Bun.sleep(5);
      } finally {
        child.kill("SIGKILL");
      }
      await child.exited;
      expect(rows(node).filter((row) => row.endsWith("slow planned"))).toHaveLength(1);
      await pod.del();
      expect(kernelNetwork(pod).macs).toEqual({});
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test.each([
    ["killed, and tried again: the half of it makes room", "SIGKILL"],
    ["ended: the pod has what it had", "SIGTERM"],
  ] as const)("%s", async (_, signal) => {
    await withNode(async (node) => {
      networks(node);
      scripted(
        node,
        "slow",
        `[ $CNI_COMMAND != ADD ] || [ -e ${node.dir}/in ] ||
        { touch ${node.dir}/in; sleep 60; }`,
      );
      const pod = node.pod();
      await pod.add("blue,red");
      const before = shape(pod);
      const child = start(node, pod, "--from", "red", "--to", "slow");
      while (!existsSync(join(node.dir, "in"))) await Bun.sleep(5);
      child.kill(signal);
      await child.exited;
      if (signal === "SIGTERM") expect(shape(pod)).toEqual(before);
      const again = command(node, "switch", label(pod), "--from", "red", "--to", "slow");
      expect(again).toMatchObject({ status: 0, stderr: "" });
      expect(rows(node)).toEqual(["eth0 blue attached", "eth2 slow attached"]);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a DEL does not wait for a switch that hangs", async () => {
    await withNode(async (node) => {
      networks(node);
      scripted(node, "slow", `[ $CNI_COMMAND != ADD ] || { touch ${node.dir}/in; sleep 60; }`);
      const pod = node.pod();
      await pod.add("blue,red");
      const child = start(node, pod, "--to", "slow");
      while (!existsSync(join(node.dir, "in"))) await Bun.sleep(5);
      await pod.del();
      expect(await child.exited).toBe(1);
      expect(node.traces()).toEqual(noTraces);
    });
  });
});

/** Begins a switch on the node. */
function start(node: Node, pod: Pod, ...words: string[]): Bun.Subprocess {
  // Writes the config that it is to be found by.
  command(node, "version");
  const { words: program, env } = pod.prepare("ADD");
  const line = [...program, "switch", label(pod), ...words, "--cni-config"];
  return Bun.spawn([...line, join(node.dir, "own.conf")], {
    env: { PATH: env["PATH"] ?? "" },
    stdio: ["ignore", "ignore", "ignore"],
  });
}
