/**
 * GC through the compiled program: what it deletes, what it tells the networks, and above all what
 * it must leave alone. lib/gc.ts; the wire format is in tests/vectors (c19-c21).
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { callOrder, calls, fakePlugin, forgetCalls } from "./fakes.ts";
import { configList, runSql } from "./stage.ts";
import {
  annotated,
  left,
  makeNode,
  type Node,
  nothing,
  wire,
  wireError,
  writeTable,
} from "./wire.ts";

const list = (name: string, type: string, more: object = {}) =>
  configList(name, [{ type, ...more }]);

const table = "[plugins.blue]\n[plugins.green]\n";

/** A node with networks blue (bridge, keeps reservations) and green (macvlan). */
function makeNetworks(more: { bridge?: object; macvlan?: object; table?: string } = {}): Node {
  return makeNode({
    table: more.table ?? table,
    lists: { "1.conflist": list("blue", "bridge"), "2.conflist": list("green", "macvlan") },
    delegates: {
      bridge: { reserve: "$DIR/reserved", ...more.bridge },
      macvlan: { ...more.macvlan },
    },
  });
}

async function add(node: Node, containerId: string, more: object = {}): Promise<void> {
  const env = { CNI_CONTAINERID: containerId };
  const stdin = { ...annotated({ cni: "blue,green" }), ...more };
  expect(await wire(node, { command: "ADD", env, stdin })).toMatchObject({ status: 0 });
  forgetCalls(node.bin);
}

const eth0 = (...ids: string[]) => ids.map((containerID) => ({ containerID, ifname: "eth0" }));
const gc = (node: Node, valid: object[] | undefined, more: object = {}) =>
  wire(node, { command: "GC", stdin: { "cni.dev/valid-attachments": valid, ...more } });

const silent = { status: 0, stdout: "", stderr: "" };
const bothOf = (...ids: string[]) => ({
  rows: ids.flatMap((id) => [`${id} eth0 attached`, `${id} eth1 attached`]),
  reserved: ids.map((id) => `${id}-eth0`),
});

/** The list that a plugin's GC was given. */
function told(node: Node, plugin: string): unknown {
  const call = calls(node.bin, plugin).find(({ command }) => command === "GC");
  return call && JSON.parse(call.stdin)["cni.dev/valid-attachments"];
}

const sql = runSql;

describe("GC deletes", () => {
  test("what is not listed, in reverse, and tells each network of the rest", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    await add(node, "c2");
    expect(await gc(node, eth0("c2"))).toEqual(silent);
    expect(callOrder(node.bin)).toEqual([
      "macvlan DEL c1 eth1",
      "bridge DEL c1 eth0",
      "bridge GC",
      "macvlan GC",
    ]);
    expect(
      calls(node.bin)
        .slice(0, 2)
        .map(({ env }) => env["CNI_NETNS"]),
    ).toEqual([node.netns, node.netns]);
    expect(told(node, "bridge")).toEqual([{ containerID: "c2", ifname: "eth0" }]);
    expect(told(node, "macvlan")).toEqual([{ containerID: "c2", ifname: "eth1" }]);
    expect(left(node)).toEqual(bothOf("c2"));
  });

  test("everything of its own config, and nothing of another one", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    await add(node, "c2", { name: "other" });
    expect(await gc(node, [])).toEqual(silent);
    expect(told(node, "bridge")).toEqual([{ containerID: "c2", ifname: "eth0" }]);
    expect(left(node)).toEqual(bothOf("c2"));
  });

  test("what a killed ADD and a given-up DEL left, listed or not by then", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    sql(
      node,
      "UPDATE attachments SET state = CASE ifname WHEN 'eth0' THEN 'planned' ELSE 'leaked' END",
    );
    expect(await gc(node, [])).toEqual(silent);
    expect(left(node)).toEqual(nothing);
  });

  test("with an empty namespace where the pod's is gone", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    rmSync(node.netns);
    writeFileSync(join(node.dir, "filler"), "");
    writeFileSync(node.netns, "");
    sql(node, "UPDATE attachments SET netns_id = 'another'");
    expect(await gc(node, [])).toEqual(silent);
    expect(
      calls(node.bin)
        .slice(0, 2)
        .map(({ env }) => env["CNI_NETNS"]),
    ).toEqual(["", ""]);
  });

  test.each([
    ["an absent list", {}],
    ["null", { "cni.dev/valid-attachments": null }],
    ["disableGC", { "cni.dev/valid-attachments": [], disableGC: true }],
  ])("nothing for %s", async (_name, stdin) => {
    using node = makeNetworks();
    await add(node, "c1");
    expect(await wire(node, { command: "GC", stdin })).toEqual(silent);
    expect([callOrder(node.bin), left(node)]).toEqual([[], bothOf("c1")]);
  });

  test.each([
    ["no list", "all"],
    ["an entry without container", [{ ifname: "eth0" }]],
    ["an entry without interface", [{ containerID: "c1" }]],
    ["an entry that is a text", ["c1"]],
  ])("nothing for %s, which is an error", async (_name, valid) => {
    using node = makeNetworks();
    await add(node, "c1");
    const stdin = { "cni.dev/valid-attachments": valid };
    expect(wireError(await wire(node, { command: "GC", stdin })).code).toBe(7);
    expect([callOrder(node.bin), left(node)]).toEqual([[], bothOf("c1")]);
  });
});

describe("GC frees no live address", () => {
  test("when the record was lost", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    for (const name of readdirSync(node.state)) rmSync(join(node.state, name));
    const run = await gc(node, eth0("c1"));
    expect(run).toMatchObject({ status: 0, stderr: expect.stringContaining("collect no garbage") });
    expect([callOrder(node.bin), left(node).reserved]).toEqual([[], ["c1-eth0"]]);
  });

  test("when a row of the record is damaged", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    sql(node, "UPDATE attachments SET plan = '{' WHERE ifname = 'eth1'");
    const run = await gc(node, eth0("c1"));
    expect(run).toMatchObject({ status: 0, stderr: expect.stringContaining("damaged=1") });
    expect([callOrder(node.bin), left(node).reserved]).toEqual([[], ["c1-eth0"]]);
  });

  test("when it is older than genie: another runtime's container is listed", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    await add(node, "c2");
    writeFileSync(join(node.reserved, "c9-eth0"), "");
    const run = await gc(node, eth0("c1", "c9"));
    expect(run).toMatchObject({ status: 0, stderr: expect.stringContaining('first="c9 eth0"') });
    expect(callOrder(node.bin)).toEqual(["macvlan DEL c2 eth1", "bridge DEL c2 eth0"]);
    expect(left(node)).toEqual({ ...bothOf("c1"), reserved: ["c1-eth0", "c9-eth0"] });
  });

  test("of a network that is neither in the table nor on record: others may use it", async () => {
    using node = makeNetworks({ table: "" });
    writeFileSync(join(node.conf, "3.conflist"), JSON.stringify(list("podman", "theirs")));
    fakePlugin(node.bin, "theirs");
    await add(node, "c1");
    expect(await gc(node, [])).toEqual(silent);
    expect(callOrder(node.bin).slice(2)).toEqual(["bridge GC", "macvlan GC"]);
  });

  test("through itself: our own config lies in the same folder", async () => {
    using node = makeNetworks({ table: `${table}[plugins.genie-net]\n` });
    writeFileSync(join(node.conf, "00-genie.conflist"), JSON.stringify(list("genie-net", "genie")));
    fakePlugin(node.bin, "genie");
    await add(node, "c1");
    expect(await gc(node, eth0("c1"))).toEqual(silent);
    expect(callOrder(node.bin)).toEqual(["bridge GC", "macvlan GC"]);
  });
});

describe("GC goes on", () => {
  test("after every failure, and returns them all", async () => {
    using node = makeNetworks({
      bridge: { GC: { error: { code: 120, msg: "no collection" } } },
      macvlan: { DEL: { error: { code: 121, msg: "no deletion" } } },
    });
    await add(node, "c1");
    const error = wireError(await gc(node, []));
    expect([error.code, error.msg]).toEqual([121, expect.stringContaining("no deletion")]);
    expect(error.details).toContain("no collection");
    expect(callOrder(node.bin)).toEqual([
      "macvlan DEL c1 eth1",
      "bridge DEL c1 eth0",
      "bridge GC",
      "macvlan GC",
    ]);
    expect(left(node).rows).toEqual(["c1 eth1 failing"]);
  });

  test("with a table that became invalid, as far as the record leads", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    writeTable(node, "no toml");
    const error = wireError(await gc(node, []));
    expect([error.code, error.msg]).toEqual([7, expect.stringContaining("plugin table")]);
    expect(left(node)).toEqual(nothing);
  });

  test("with what was parked as leaked, until its plugin is back", async () => {
    using node = makeNetworks();
    await add(node, "c1");
    rmSync(join(node.bin, "bridge"));
    rmSync(join(node.conf, "1.conflist"));
    writeTable(node, "[plugins.green]\n");
    expect(wireError(await gc(node, [])).code).toBe(102);
    expect(left(node)).toEqual({ rows: ["c1 eth0 leaked"], reserved: ["c1-eth0"] });
    fakePlugin(node.bin, "bridge", { reserve: node.reserved });
    expect(await gc(node, [])).toEqual(silent);
    expect(left(node)).toEqual(nothing);
  });
});
