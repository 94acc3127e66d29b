/**
 * `genie repair` on real networks: what a running pod lost is there again, with its address, its
 * routes and its place on record. lib/node/repair.ts, lib/node/running_pod.ts.
 */
import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { closeState, write } from "../lib/database.ts";
import { askingFor, formatRepaired, type Repaired, setBroken } from "../lib/node/repair.ts";
import { waitingAnnotations } from "../lib/node/running_pod.ts";
import { attachedOf } from "../lib/policy/rulesets.ts";
import type { StoredAttachment } from "../lib/record.ts";
import { attachments } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { fakePlugin, makeHost, tempDir } from "./fakes.ts";
import {
  addressOf,
  command,
  commandLine,
  expectKernel,
  hostLocal,
  kernelNetwork,
  type Node,
  noTraces,
  type Pod,
  pluginDir,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { addAttachment, withLedger } from "./record.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);

/** Rows of the record: `<interface> <state> <error>`. */
function rows(node: Node): string[] {
  const host = makeHost();
  const state = openState(host, join(node.dir, "state"));
  try {
    return attachments(host, state).map(({ ifName, state: how, error }) =>
      `${ifName} ${how} ${error}`.trim(),
    );
  } finally {
    closeState(state);
  }
}

/** The ledger's networks in the order they were written: `repair DEL blue eth0 ok`. */
function ledger(node: Node): string[] {
  const state = openState(makeHost(), join(node.dir, "state"));
  try {
    return state.database
      .query(
        `SELECT decided_by || ' ' || command || ' ' || network || ' ' || ifname || ' ' || outcome
         FROM ledger WHERE kind = 'network' AND decided_by = 'repair' ORDER BY id`,
      )
      .values()
      .map(([line]) => String(line));
  } finally {
    closeState(state);
  }
}

const label = (pod: Pod) => `default/p-${pod.containerId}`;

/** blue: a bridge with a default route. green: another one. red: macvlan. */
function threeNetworks(node: Node): void {
  node.run("sh", "-c", "ip link add up0 type veth peer up1; ip link set up0 up");
  const bridge = (name: string, subnets: string[], route: string, gateway: string) =>
    node.network(name, {
      cniVersion: "1.0.0",
      plugins: [
        {
          ...{ type: "bridge", bridge: `${name}0`, isDefaultGateway: true },
          ipam: hostLocal(node, subnets, [`${route} via ${gateway}`]),
        },
        { type: "portmap", capabilities: { portMappings: true } },
      ],
    });
  bridge("blue", ["10.231.0.0/24", "fd42:231::/64"], "10.99.0.0/16", "10.231.0.1");
  bridge("green", ["10.232.0.0/24"], "10.98.0.0/16", "10.232.0.1");
  node.network("red", {
    cniVersion: "0.3.1",
    plugins: [{ type: "macvlan", master: "up0", ipam: hostLocal(node, ["10.233.0.0/24"]) }],
  });
}

describe.skipIf(skipReason !== undefined)("genie repair", () => {
  test.each([
    ["a primary that lost its interface", "blue", "eth0", ["ip", "link", "del", "eth0"]],
    ["a primary that lost its default route", "blue", "eth0", ["ip", "route", "del", "default"]],
    ["a secondary that lost its address", "green", "eth1", ["ip", "addr", "flush", "dev", "eth1"]],
    ["a macvlan that is gone", "red", "net7", ["ip", "link", "del", "net7"]],
    ["what is whole", "blue", "eth0", ["true"]],
  ])("%s", async (_name, network, ifName, damage) => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [other, pod] = [node.pod(), node.pod()];
      await other.add("blue,green,red@net7");
      // Its own CHECK fails with IPv4 mappings (Debian's 1.1.1).
      const isMapped = damage[0] === "true";
      const mapping = { hostPort: 8199, containerPort: 80, protocol: "tcp" };
      const result = await pod.add({
        cni: "blue,green,red@net7",
        runtimeConfig: isMapped ? { portMappings: [mapping] } : {},
      });
      const { macs: _, ...before } = kernelNetwork(pod);
      const reserved = node.traces().files;
      pod.run(...damage);
      const isWhole = damage[0] === "true";
      const seen = command(node, "repair", label(pod), "--dry-run", "--network", network);
      if (!isWhole) expect(seen.stdout).toContain("would be made anew: gone is ");
      const all = isWhole ? ["--all"] : [];
      const run = command(node, "repair", label(pod), "--network", network, ...all);
      expect(run).toMatchObject({ status: 0, stderr: "" });
      expect(run.stdout).toContain("made anew\n");
      const { macs, ...after } = kernelNetwork(pod);
      expect(after).toEqual(before);
      expect(node.traces().files).toEqual(reserved);
      const rules = node.traces().rules.join("\n");
      expect(rules.includes("--to-destination 10.231.0.3:80")).toBe(isMapped);
      const known = result.interfaces?.map((one) =>
        one.sandbox === pod.netns ? { ...one, mac: macs[one.name] ?? "" } : one,
      );
      expectKernel(pod, { ...result, interfaces: known ?? [] });
      expect(rows(node).slice(3)).toEqual(["eth0 attached", "eth1 attached", "net7 attached"]);
      expect(ledger(node)).toEqual([
        `repair DEL ${network} ${ifName} ok`,
        `repair ADD ${network} ${ifName} ok`,
      ]);
      if (!isMapped) expect(await pod.call("CHECK")).toMatchObject({ stdout: "", status: 0 });
      expect((await other.call("CHECK")).status).toBe(0);
      for (const one of [pod, other]) await one.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("all of a pod, and then once more", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      await pod.add("green@eth3,blue,red@net7");
      const { macs: _, ...before } = kernelNetwork(pod);
      for (const name of ["eth0", "eth3", "net7"]) pod.run("ip", "link", "del", name);
      for (const _again of [1, 2]) {
        const { status, stdout } = command(node, "repair", label(pod), "--json", "--all");
        expect(status).toBe(0);
        expect(JSON.parse(stdout).map((one: Repaired) => [one.ifName, one.error])).toEqual([
          ["eth0", ""],
          ["eth3", ""],
          ["net7", ""],
        ]);
        const { macs: _macs, ...after } = kernelNetwork(pod);
        expect(after).toEqual(before);
        expect((await pod.call("CHECK")).status).toBe(0);
      }
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("an ADD that fails is told and stays on record, until it works", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const script = `[ "$CNI_COMMAND" = ADD ] && [ -e "${node.dir}/broken" ] && exit 3\n`;
      const real = join(pluginDir, "macvlan");
      fakePlugin(node.bin, "macvlan", `#!/bin/sh\n${script}exec ${real}\n`);
      const pod = node.pod();
      await pod.add("blue,red@net7");
      const address = addressOf(pod, "net7");
      writeFileSync(join(node.dir, "broken"), "");
      const failed = command(node, "repair", label(pod), "--network", "red", "--all");
      expect(failed).toMatchObject({ status: 1, stdout: expect.stringContaining("status 3") });
      expect(rows(node)).toEqual([
        "eth0 attached",
        expect.stringMatching(/^net7 planned Cannot attach network "red"/),
      ]);
      expect(command(node, "report").stdout).toContain("planned (genie repair makes it)\n");
      expect(Object.keys(kernelNetwork(pod).macs)).toEqual(["eth0"]);
      expect((await pod.call("CHECK")).json).toMatchObject({ code: 11 });
      expect(node.traces().files.filter((file) => file.startsWith("red/"))).toEqual([]);
      rmSync(join(node.dir, "broken"));
      expect(command(node, "repair", label(pod), "--network", "red").status).toBe(0);
      expect(addressOf(pod, "net7")).toBe(address);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a DEL that fails leaves the record, and what is there", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const script = `[ "$CNI_COMMAND" = DEL ] && [ -e "${node.dir}/broken" ] && exit 3\n`;
      fakePlugin(node.bin, "macvlan", `#!/bin/sh\n${script}exec ${join(pluginDir, "macvlan")}\n`);
      const pod = node.pod();
      await pod.add("blue,red@net7");
      writeFileSync(join(node.dir, "broken"), "");
      const asked = ["repair", label(pod), "--network", "red", "--all"] as const;
      expect(command(node, ...asked).status).toBe(1);
      expect(rows(node)[1]).toStartWith("net7 planned Cannot detach network");
      rmSync(join(node.dir, "broken"));
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("another address where the old one is taken: a problem for the primary alone", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      await pod.add("green,red@net7");
      for (const [network, ifName, status] of [
        ["green", "eth0", 1],
        ["red", "net7", 0],
      ] as const) {
        const before = addressOf(pod, ifName);
        // Of somebody else from here on: the pod's DEL does not free it.
        writeFileSync(join(node.data, network, before), "somebody\r\nelse");
        const run = command(node, "repair", label(pod), "--network", network, "--all");
        expect(run).toMatchObject({ status, stderr: expect.stringContaining("trying any") });
        expect(run.stdout).toContain(`it had ${before}`);
        expect(addressOf(pod, ifName)).not.toBe(before);
        expect((await pod.call("CHECK")).status).toBe(0);
        rmSync(join(node.data, network, before));
      }
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("a binary that moved since ADD", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const path = fakePlugin(
        node.bin,
        "macvlan",
        `#!/bin/sh\nexec ${join(pluginDir, "macvlan")}\n`,
      );
      const pod = node.pod();
      await pod.add("blue,red@net7");
      renameSync(path, join(node.dir, "macvlan.gone"));
      expect(command(node, "repair", label(pod), "--network", "red", "--all").status).toBe(0);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  /** red: a macvlan whose ADD, while `broken` is there, says so in `begun` and hangs. */
  function hangingNetwork(node: Node): { begun: string } {
    threeNetworks(node);
    const begun = join(node.dir, "begun");
    const hangs = `[ "$CNI_COMMAND" = ADD ] && [ -e "${node.dir}/broken" ]`;
    const script = `if ${hangs}; then echo $PPID > "${begun}.new"; mv "${begun}.new" "${begun}"\n`;
    const real = join(pluginDir, "macvlan");
    fakePlugin(node.bin, "macvlan", `#!/bin/sh\n${script}exec sleep 60; fi\nexec ${real}\n`);
    return { begun };
  }

  async function begins(file: string): Promise<number> {
    while (!existsSync(file)) await Bun.sleep(5);
    return Number(await Bun.file(file).text());
  }

  test.each([
    ["killed in the middle", "SIGKILL"],
    ["asked to end by the DEL that comes", ""],
  ])("%s: the pod's DEL leaves nothing", async (_name, signal) => {
    await withNode(async (node) => {
      const { begun } = hangingNetwork(node);
      const pod = node.pod();
      await pod.add("blue,red@net7");
      writeFileSync(join(node.dir, "broken"), "");
      const words = ["repair", label(pod), "--network", "red", "--all"];
      const child = Bun.spawn(commandLine(node, ...words), { stdout: "pipe", stderr: "pipe" });
      try {
        const pid = await begins(begun);
        if (signal !== "") process.kill(pid, "SIGKILL");
        await pod.del();
        expect(node.traces()).toEqual(noTraces);
        expect(Object.keys(kernelNetwork(pod).macs)).toEqual([]);
      } finally {
        child.kill("SIGKILL");
        await child.exited;
      }
    });
  });

  test("leaves the pod's new status for the agent", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const table = join(node.dir, "plugins.toml");
      const kubeconfig = join(node.dir, "kubeconfig");
      writeFileSync(kubeconfig, "{}");
      writeFileSync(
        table,
        `${readFileSync(table, "utf8")}kubernetes.kubeconfig = "${kubeconfig}"\n`,
      );
      const pod = node.pod();
      await pod.add("green,red@net7");
      const read = () => {
        const state = openState(makeHost(), join(node.dir, "state"));
        try {
          return waitingAnnotations(state, { containerId: pod.containerId, requestIfName: "eth0" });
        } finally {
          closeState(state);
        }
      };
      const before = read();
      const key = "k8s.v1.cni.cncf.io/network-status";
      expect(JSON.parse(before[key] ?? "[]")).toHaveLength(2);
      pod.run("ip", "link", "del", "net7");
      expect(command(node, "repair", label(pod), "--network", "red").status).toBe(0);
      const { macs } = kernelNetwork(pod);
      const after: { interface: string; mac: string }[] = JSON.parse(read()[key] ?? "[]");
      expect(after.map(({ mac }) => mac)).toEqual([macs["eth0"] ?? "", macs["net7"] ?? ""]);
      expect(Object.keys(read())).toEqual(Object.keys(before));
      await pod.del();
      expect(read()).toEqual({});
    });
  });

  test("refuses what it cannot repair, and touches nothing", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [gone, pod] = [node.pod(), node.pod()];
      await gone.add("blue");
      await pod.add("green");
      gone.kill();
      const before = [kernelNetwork(pod), node.traces().files];
      const all: [string[], number, string][] = [
        [["repair", label(gone)], 1, "namespace is gone; genie gc collects"],
        [["repair", "default/nobody"], 1, "nothing of it is on record"],
        [["repair", label(pod), "--network", "blue"], 1, "it has green"],
        [["repair", "nobody"], 2, "expected NAMESPACE/POD"],
        [["repair"], 2, "expected NAMESPACE/POD"],
      ];
      for (const [words, status, stderr] of all) {
        const run = command(node, ...words);
        expect(run).toMatchObject({ status, stdout: "", stderr: expect.stringContaining(stderr) });
      }
      expect([kernelNetwork(pod), node.traces().files]).toEqual(before);
    });
  });

  test("one whose DEL was asked for is left to it", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod();
      await pod.add("blue");
      const state = openState(makeHost(), join(node.dir, "state"));
      write(state, () => state.database.run("UPDATE attachments SET state = 'failing'"));
      closeState(state);
      const run = command(node, "repair", label(pod));
      expect(run).toMatchObject({ status: 1, stdout: expect.stringContaining("taken down") });
      expect(Object.keys(kernelNetwork(pod).macs)).toEqual(["eth0"]);
      expect(rows(node)).toEqual(["eth0 failing"]);
    });
  });
});

const stored = (more: object): StoredAttachment =>
  ({
    ...{ capabilityArgs: {}, args: {}, cniArgs: "", ifName: "eth0" },
    ...more,
  }) as StoredAttachment;
const list = (ipam: object, more: object = {}) => ({
  list: { name: "blue", plugins: [{ type: "bridge", ipam, ...more }] },
});
const local = list({ type: "host-local" });
const capable = list({ type: "own" }, { capabilities: { ips: true } });

describe("the same address", () => {
  test.each([
    ["of host-local", local, { args: { cni: { ips: ["10.1.0.5", "fd00::5"] } } }],
    [
      "of host-local, beside other arguments",
      { ...local, args: { a: 1, cni: { b: 2 } } },
      { args: { a: 1, cni: { b: 2, ips: ["10.1.0.5", "fd00::5"] } } },
    ],
    [
      "of a plugin with the capability",
      capable,
      { capabilityArgs: { ips: ["10.1.0.5/24", "fd00::5/64"] } },
    ],
    ["is asked for already", { ...local, capabilityArgs: { ips: ["10.1.0.5"] } }, {}],
    ["is asked for in CNI_ARGS", { ...local, cniArgs: "A=1;IP=10.1.0.5" }, {}],
    [
      "of static comes from its config",
      list({ type: "static" }, { capabilities: { ips: true } }),
      {},
    ],
    ["of others cannot be asked for", list({ type: "dhcp" }), {}],
  ])("%s", (_name, more, expected) => {
    const attachment = stored(more);
    expect(askingFor(attachment, ["10.1.0.5/24", "fd00::5/64"])).toEqual({
      ...attachment,
      ...expected,
    } as StoredAttachment);
    expect(askingFor(attachment, [])).toBe(attachment);
  });
});

describe("the record of a running pod", () => {
  test("attachedOf() knows what is attached alone", () => {
    using dir = tempDir();
    withLedger(dir.path, (state) => {
      addAttachment(state, { ifName: "eth0" });
      addAttachment(state, { ifName: "eth1" });
      setBroken(state, { containerId: "c1", ifName: "eth1" }, "it was cut");
      const found = attachments(makeHost(), state);
      expect(found.map(({ state: how, error }) => [how, error])).toEqual([
        ["attached", ""],
        ["planned", "it was cut"],
      ]);
      expect(attachedOf(found).map(({ attachment }) => attachment.ifName)).toEqual(["eth0"]);
    });
  });

  test.each([
    ["a status", '{"a":"1","b":2}', { a: "1" }],
    ["damage", "{", {}],
    ["another value", "[]", {}],
  ])("waitingAnnotations() of %s", (_name, text, expected) => {
    using dir = tempDir();
    const call = { containerId: "c1", requestIfName: "eth0" };
    withLedger(dir.path, (state) => {
      expect(waitingAnnotations(state, call)).toEqual({});
      const insert = "INSERT INTO statuses VALUES ('c1', 'eth0', 'ns', 'web', '', ?, 0)";
      state.database.query(insert).run(text);
      expect(waitingAnnotations(state, call)).toEqual(expected);
    });
    expect(existsSync(join(dir.path, "genie.db"))).toBe(true);
  });
});

test("formatRepaired() says what became of each", () => {
  const one = { network: "blue", ifName: "eth0", containerId: "c1", primary: true, error: "" };
  const [why, before] = ["gone is route 10.9.0.0/16", ["10.1.0.5/16"]];
  const healthy = { ...one, before, after: before, why: "" };
  const all: Repaired[] = [
    healthy,
    { ...one, why, before, after: ["10.1.0.5/16"] },
    { ...one, why, before, after: ["10.1.0.6/16"] },
    { ...one, primary: false, why, before, after: ["10.1.0.6/16"] },
    { ...one, why, before, after: [], error: "Cannot attach" },
  ];
  const moved = "made anew, it had 10.1.0.5/16";
  expect(formatRepaired(all, Number.POSITIVE_INFINITY)).toBe(`\
NETWORK  INTERFACE  ADDRESSES    OUTCOME
blue     eth0       10.1.0.5/16  healthy, let alone
blue     eth0       10.1.0.5/16  made anew
blue     eth0       10.1.0.6/16  ${moved}: Kubernetes knows the pod by that, delete the pod
blue     eth0       10.1.0.6/16  ${moved}
blue     eth0       none         Cannot attach
`);
  const broken = { ...healthy, why };
  expect(formatRepaired([healthy, broken], Number.POSITIVE_INFINITY, true)).toBe(`\
NETWORK  INTERFACE  ADDRESSES    OUTCOME
blue     eth0       10.1.0.5/16  healthy, let alone
blue     eth0       10.1.0.5/16  would be made anew: gone is route 10.9.0.0/16
`);
});
