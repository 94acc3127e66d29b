/**
 * Plugins that keep their state by less than container and interface, and failures after which
 * nothing is left to undo: lib/recovery/plugin_keys.ts, lib/recovery/failed_add.ts.
 */
import { describe, expect, test } from "bun:test";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseConfig } from "../lib/config/parse.ts";
import type { Attachment, StoredAttachment } from "../lib/record.ts";
import { isCallRefused, outcomeOf } from "../lib/recorded.ts";
import { checkOneInterface, fitTogether, sharedError } from "../lib/recovery/plugin_keys.ts";
import { callOrder, fakePlugin, forgetCalls } from "./fakes.ts";
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
import { madeAttachment } from "./record.ts";
import { reasonToSkip } from "./skip.ts";
import { configList, failureOf, runSql, says, storedRows } from "./stage.ts";
import { annotated, makeNode, wire, wireError } from "./wire.ts";

const skipReason = reasonToSkip(...realNeeds);

/** An attachment in short: `weave/weave-net@eth0`, with an IPAM `br/bridge+weave-ipam@net1`. */
function attachment(text: string): Attachment {
  const [, network = "", type = "", ipam, ifName = ""] =
    /^(.*)\/([^+@]*)(?:\+(.*))?@(.*)$/.exec(text) ?? [];
  const plugin = { type, ...(ipam !== undefined && { ipam: { type: ipam } }) };
  const made = madeAttachment({ network, ifName });
  return { ...made, list: { ...made.list, plugins: [plugin, { type: "portmap" }] } };
}

function stored(text: string, state: StoredAttachment["state"] = "attached"): StoredAttachment {
  const more = { result: {}, failedAtMs: 0, error: "", createdAtMs: 0, netnsId: "" };
  return { ...attachment(text), ...more, state };
}

const table = parseConfig(
  `state_dir = "/state"
[plugins.own]
one_interface = true
config = { cniVersion = "1.0.0", plugins = [{ type = "keyed" }] }
[plugins.pool]
one_interface = true
config = { cniVersion = "1.0.0", plugins = [{ type = "bridge", ipam = { type = "pooled" } }] }
[plugins.gone]
one_interface = true
`,
  "/plugins.toml",
);

describe("checkOneInterface()", () => {
  test.each([
    ["w/weave-net@eth0", "", ""],
    ["w/weave-net@eth0 b/bridge@eth1", "", ""],
    ["w/weave-net@eth0 c/calico@eth1", "", ""],
    ["w/weave-net@eth0 v/weave-net@eth1", "", "weave-net"],
    ["w/weave-net@eth0 b/bridge+weave-ipam@net1", "", "weave-ipam"],
    ["a/bridge+weave-ipam@eth0 b/ptp+weave-ipam@eth1", "", "weave-ipam"],
    ["c/calico@eth0 c/calico@eth1", "", "calico"],
    ["c/calico@eth1", "b/bridge@eth0 d/calico@net1", "calico"],
    ["c/calico+calico-ipam@eth0 b/bridge+calico-ipam@net1", "", ""],
    ["b/bridge+calico-ipam@eth0 b/bridge+calico-ipam@net1", "", "calico-ipam"],
    ["r/romana@eth0 b/bridge@eth1", "", ""],
    ["b/bridge@eth0 r/romana@eth1", "", "romana"],
    ["f/flannel@eth0 f/flannel@eth1", "", ""],
    ["b/bridge+host-local@eth0 b/bridge+host-local@eth1", "", ""],
    ["x/keyed@eth0 own/keyed@eth1", "", "keyed"],
    ["x/other@eth0 y/other@eth1", "", ""],
    ["pool/bridge+pooled@eth0 x/bridge@eth1", "", ""],
    ["pool/bridge+pooled@eth0 x/macvlan+pooled@eth1", "", "pooled"],
    ["x/bridge+keyed@eth0 y/bridge+keyed@eth1", "", "keyed"],
  ])("of %s beside [%s]: %s", (planned, held, refused) => {
    const read = (text: string) => text.split(" ").filter(Boolean).map(attachment);
    const failure = failureOf(() => checkOneInterface(table, read(planned), read(held)));
    if (refused === "") expect(failure.code).toBe(0);
    else expect(failure).toEqual(says(105, `plugin "${refused}" gives a container one interface`));
  });
});

test("fitTogether() gives flannel a folder for each interface that is not eth0", () => {
  const dataDirs = (given: object) => {
    const all = ["f/flannel@eth0", "f/flannel@eth1"].map(attachment);
    for (const one of all) Object.assign(one.list.plugins[0] ?? {}, given);
    fitTogether(table, all, []);
    return all.map(({ list }) => list.plugins.map(({ dataDir }) => dataDir));
  };
  expect(dataDirs({})).toEqual([
    [undefined, undefined],
    ["/state/flannel/genie-eth1", undefined],
  ]);
  expect(dataDirs({ dataDir: "/data" })).toEqual([
    ["/data", undefined],
    ["/data/genie-eth1", undefined],
  ]);
});

test.each([
  ["attached", true],
  ["planned", true],
  ["failing", false],
  ["leaked", false],
] as const)("sharedError() beside one that is %s: %p", (state, waits) => {
  const error = sharedError(stored("w/weave-net@eth1"), [stored("v/weave-net@eth0", state)]);
  expect(error !== undefined).toBe(waits);
  if (!error) return;
  expect(error.message).toContain('plugin "weave-net" gives a container one interface');
  expect(outcomeOf(stored("w/weave-net@eth1"), [error], 600_000, 0)).toBe("leaked");
});

const versions = { error: { code: 1, msg: "incompatible CNI versions" } };
const args = { error: { code: 999, msg: 'ARGS: invalid pair "a"' } };
const config = { error: { code: 7, msg: "invalid config" } };
const master = { error: { code: 999, msg: "Link not found" } };
const daemon = { error: { code: 100, msg: "connection refused" } };
const ipam = { error: { code: 999, msg: 'failed to find plugin "whereabouts" in path [/b]' } };
const other = { error: { code: 7, msg: "another" } };

describe("an ADD whose plugin refuses DEL, too", () => {
  const one = { "1.conflist": configList("blue", ["a", "macvlan"]) };
  test.each([
    ["in the same words, its version", versions, versions, 0],
    ["in the same words, CNI_ARGS", args, args, 0],
    ["in the same words, its config", config, config, 0],
    ["in the same words, its master", master, master, 0],
    ["in the same words, its IPAM is not installed", ipam, ipam, 0],
    ["in other words", config, other, 1],
    ["because its daemon is down", daemon, daemon, 1],
  ])("%s", async (_name, ADD, DEL, count) => {
    using node = makeNode({ lists: one, delegates: { a: {}, macvlan: { ADD, DEL } } });
    const add = () => wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
    const first = wireError(await add());
    expect(first.code).toBe(ADD.error.code);
    expect(callOrder(node.bin)).toEqual(
      ["a ADD", "macvlan ADD", "macvlan DEL", "a DEL"].map((c) => `${c} c1 eth0`),
    );
    expect(storedRows(node)).toHaveLength(count);
    if (count > 0) return;
    expect(wireError(await add())).toEqual(first);
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
  });

  test("and genie was killed: a row without a result goes, another stays", () => {
    const refused = stored("w/weave-net@eth0", "planned");
    const error = Object.assign(new Error("x"), { code: 1, details: "", rule: "" });
    expect(isCallRefused(error)).toBe(true);
    expect(outcomeOf({ ...refused, result: undefined }, [error], 1000, 0)).toBe("gone");
    expect(outcomeOf(refused, [error], 1000, 0)).toBe("failing");
    expect(outcomeOf({ ...refused, state: "leaked" }, [error], 1000, 0)).toBe("leaked");
  });
});

describe("two attachments of one key, from before", () => {
  const lists = {
    "1.conflist": configList("w", ["weave-net"]),
    "2.conflist": configList("b", ["b"]),
  };
  const both = async () => {
    const node = makeNode({ lists, delegates: { "weave-net": {}, b: {} } });
    const stdin = annotated({ cni: "w,b" });
    expect((await wire(node, { command: "ADD", stdin })).status).toBe(0);
    // As if b were of the same plugin.
    const sql = `UPDATE attachments SET plan = replace(plan, '"type":"b"', '"type":"weave-net"')`;
    runSql(node, sql);
    forgetCalls(node.bin);
    return node;
  };

  test("DEL of the pod undoes both", async () => {
    using node = await both();
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect(callOrder(node.bin)).toEqual(["b DEL c1 eth1", "weave-net DEL c1 eth0"]);
    expect(storedRows(node)).toEqual([]);
  });

  test("DEL of one call alone is not sent, and done when the other has gone", async () => {
    using node = await both();
    runSql(node, "UPDATE attachments SET request_ifname = 'eth1' WHERE ifname = 'eth1'");
    const CNI_IFNAME = "eth1";
    expect((await wire(node, { command: "DEL", env: { CNI_IFNAME } })).status).toBe(0);
    expect(callOrder(node.bin)).toEqual([]);
    expect(storedRows(node)).toMatchObject([{ state: "attached" }, { state: "leaked" }]);
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect((await wire(node, { command: "DEL", env: { CNI_IFNAME } })).status).toBe(0);
    expect(callOrder(node.bin)).toEqual(["weave-net DEL c1 eth0", "b DEL c1 eth1"]);
    expect(storedRows(node)).toEqual([]);
  });

  test("GC of one is not sent either", async () => {
    using node = await both();
    runSql(node, "UPDATE attachments SET request_ifname = 'eth1' WHERE ifname = 'eth1'");
    const valid = [{ containerID: "c1", ifname: "eth0" }];
    const stdin = { cniVersion: "1.1.0", "cni.dev/valid-attachments": valid };
    await wire(node, { command: "GC", stdin });
    expect(callOrder(node.bin).filter((call) => call.includes("DEL"))).toEqual([]);
  });

  test("another call of the container is refused, before its plugin runs", async () => {
    using node = makeNode({ lists, delegates: { "weave-net": {}, b: {} } });
    const stdin = annotated({ cni: "w" });
    expect((await wire(node, { command: "ADD", stdin })).status).toBe(0);
    const env = { CNI_IFNAME: "eth1" };
    const refused = wireError(await wire(node, { command: "ADD", stdin, env }));
    expect(refused).toMatchObject(says(105, 'plugin "weave-net" gives a container one interface'));
    expect((await wire(node, { command: "DEL", env })).status).toBe(0);
    expect(callOrder(node.bin)).toEqual(["weave-net ADD c1 eth0"]);
  });
});

const label = (pod: Pod) => `default/p-${pod.containerId}`;

/** A script plugin that makes a veth pair, and has its addresses by container in a file. */
function veth(node: Node, name: string, { add = "", del = "" } = {}): void {
  fakePlugin(
    node.bin,
    name,
    `#!/bin/bash
cat >/dev/null; D=${node.dir}; c=$CNI_CONTAINERID; p="ip -n $(basename "$CNI_NETNS")"
in_pod() { nsenter --net="$CNI_NETNS" ip "$@"; }
echo "$CNI_COMMAND $CNI_IFNAME" >> $D/${name}.calls
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0"]}';;
ADD) ${add}
  ip link add h$CNI_IFNAME type veth peer name $CNI_IFNAME netns $CNI_NETNS
  in_pod addr add 10.9.0.2/24 dev $CNI_IFNAME
  in_pod link set $CNI_IFNAME up
  link='{"name":"'$CNI_IFNAME'","sandbox":"'$CNI_NETNS'"}'
  ip='{"interface":0,"address":"10.9.0.2/24"}'
  echo '{"cniVersion":"1.0.0","interfaces":['$link'],"ips":['$ip']}';;
DEL) ${del}
  [ -n "$CNI_NETNS" ] && in_pod link del $CNI_IFNAME 2>/dev/null; exit 0;;
esac
`,
  );
}

/** Lets the operator's commands find the test's plugins; more lines of the table at its end. */
function extendTable(node: Node, more = ""): void {
  const file = join(node.dir, "plugins.toml");
  const table = readFileSync(file, "utf8").replace(/bin_dirs = \[/, `bin_dirs = ["${node.bin}", `);
  writeFileSync(file, `${table}${more}`);
}

const callsOf = (node: Node, name: string) =>
  readFileSync(join(node.dir, `${name}.calls`), "utf8")
    .trim()
    .split("\n");

describe.skipIf(skipReason !== undefined)("on a real node", () => {
  const networkOf = (node: Node, name: string, type = name, cniVersion = "1.0.0") =>
    node.network(name, { cniVersion, plugins: [{ type }] });
  const plain = (node: Node) =>
    node.network("plain", {
      cniVersion: "1.0.0",
      plugins: [{ type: "bridge", bridge: "plain0", ipam: hostLocal(node, ["10.239.0.0/24"]) }],
    });

  test("an interface that a DEL leaves is taken away, and repair can go on", async () => {
    await withNode(async (node) => {
      veth(node, "lazy", { del: "exit 0" });
      networkOf(node, "lazy");
      const pod = node.pod();
      await pod.add("lazy");
      expect(command(node, "repair", label(pod)).stdout).toContain("healthy, let alone");
      expect(callsOf(node, "lazy")).toEqual(["ADD eth0", "CHECK eth0"]);
      const run = command(node, "repair", label(pod), "--all");
      expect([run.status, run.stdout]).toEqual([0, expect.stringContaining("made anew\n")]);
      expect(kernelNetwork(pod).addresses["eth0"]).toEqual(["10.9.0.2/24"]);
      await pod.call("DEL");
      expect(kernelNetwork(pod).macs).toEqual({});
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("what delegates print on stderr in a command has their name before it", async () => {
    await withNode(async (node) => {
      veth(node, "loud", { del: "printf 'one\\ntwo' >&2" });
      networkOf(node, "loud");
      const pod = node.pod();
      await pod.add("loud");
      expect(command(node, "repair", label(pod), "--all").stderr).toBe("loud: one\nloud: two\n");
      await pod.call("DEL");
    });
  });

  test("a second ADD that fails: what became of the first is said", async () => {
    await withNode(async (node) => {
      const second = '[ -e $D/first ] || { touch $D/first; FIRST=1; }; [ "$FIRST" ] || ';
      const fail = `{ $HURT; echo '{"code":100,"msg":"no"}'; exit 1; }`;
      for (const [name, hurt] of [
        ["kind", "true"],
        ["cruel", "in_pod link del eth0"],
      ] as const) {
        rmSync(join(node.dir, "first"), { force: true });
        veth(node, name, { add: second + fail.replace("$HURT", hurt) });
        networkOf(node, name);
        networkOf(node, `${name}-too`, name);
        const pod = node.pod();
        await pod.add(name);
        const run = command(node, "switch", label(pod), "--to", `${name}-too@net5`);
        expect(run.status).toBe(1);
        const said =
          hurt === "true" ? `eth0 of network "${name}" is still there` : "has lost interface";
        expect(run.stderr).toContain(`plugin "${name}" serves the pod already: `);
        expect(run.stderr).toContain(said);
        expect(run.stderr.includes("one_interface = true")).toBe(hurt !== "true");
        await pod.call("DEL");
      }
    });
  });

  test("chosen, and its daemon is down: the next best is tried, the DEL waits", async () => {
    await withNode(async (node) => {
      const down = `[ -e $D/down ] && { echo '{"code":100,"msg":"refused"}'; exit 1; }`;
      veth(node, "aa", { add: down, del: down });
      networkOf(node, "aa");
      plain(node);
      const weights = "[select.weights]\noccupancy = 0\nresponse_time = 0\nfailures = 0\n";
      extendTable(node, `[select]\ncandidates = ["aa", "plain"]\n${weights}`);
      writeFileSync(join(node.dir, "down"), "");
      const pod = node.pod();
      await pod.add("");
      expect(kernelNetwork(pod).addresses["eth0"]?.[0]).toStartWith("10.239.");
      expect(node.traces().attachments).toBe(2);
      expect(callsOf(node, "aa")).toEqual(["ADD eth0", "DEL eth0"]);
      expect((await pod.call("CHECK")).status).toBe(0);
      // The pod has its interface: a DEL of the other network must not find it.
      expect(command(node, "gc").status).toBe(1);
      rmSync(join(node.dir, "down"));
      expect(command(node, "gc").stdout).toContain("1 collected");
      expect(kernelNetwork(pod).addresses["eth0"]?.[0]).toStartWith("10.239.");
      expect(node.traces().attachments).toBe(1);
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
      // And with the daemon down until the end: DEL succeeds.
      writeFileSync(join(node.dir, "down"), "");
      const late = node.pod();
      await late.add("");
      expect((await late.call("DEL")).status).toBe(0);
      expect(node.traces()).toEqual({ ...noTraces, attachments: 1 });
    });
  });

  test.each(["weave-net", "own"])(
    "switch, repair, plan and validate say it of %s",
    async (type) => {
      await withNode(async (node) => {
        veth(node, type);
        networkOf(node, "one", type);
        networkOf(node, "two", type);
        plain(node);
        extendTable(node, type === "own" ? "[plugins.one]\none_interface = true\n" : "");
        const said = `plugin "${type}" gives a container one interface`;
        const pod = node.pod();
        await pod.add("one");
        const before = kernelNetwork(pod);
        for (const words of [
          ["switch", label(pod), "--to", "two@net5"],
          ["switch", label(pod), "--to", "two@net5", "--dry-run"],
          ["plan", "--namespace", "a", "--pod", "b", "--annotation", "cni=one,two"],
        ]) {
          const run = command(node, ...words);
          expect([run.status, run.stderr]).toEqual([1, expect.stringContaining(said)]);
        }
        expect(command(node, "validate").stdout).toContain(said);
        const refused = await node.pod().call("ADD", { cni: "plain,one,two" });
        expect(refused.json?.msg).toContain(said);
        expect(command(node, "switch", label(pod), "--to", "plain@net1").status).toBe(0);
        expect(kernelNetwork(pod).macs["eth0"]).toBe(before.macs["eth0"] ?? "");
        expect(callsOf(node, type).filter((call) => call !== "VERSION")).toEqual(["ADD eth0"]);
        await pod.call("DEL");
        expect(node.traces()).toEqual(noTraces);
      });
    },
  );

  test("validate asks for VERSION, and says which list asks for more", async () => {
    await withNode(async (node) => {
      veth(node, "old");
      networkOf(node, "fits", "old", "0.4.0");
      networkOf(node, "asks", "old", "1.1.0");
      extendTable(node);
      const { status, stdout } = command(node, "validate", "--json");
      expect(status).toBe(1);
      const { findings } = JSON.parse(stdout) as {
        findings: { network: string; detail: string }[];
      };
      const detail = (name: string) => findings.find(({ network }) => network === name)?.detail;
      expect(detail("asks")).toContain('plugin "old" does not know CNI 1.1.0');
      expect(detail("fits")).toStartWith("old (CNI 0.4.0)");
    });
  });
});
