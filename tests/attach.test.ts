/**
 * ADD over all attachments of a container, through the compiled program: lib/attach.ts and
 * lib/write_ahead.ts. What comes after an attempt that failed, what stays untouched, and what is
 * left
 * when undoing fails. Kills and signals are in faults.test.ts.
 */
import { describe, expect, test } from "bun:test";
import { renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { closeState } from "../lib/database.ts";
import { openState } from "../lib/recovery/database.ts";
import { type Behaviour, callOrder, calls, fakePlugin, forgetCalls, makeHost } from "./fakes.ts";
import { configList, runSql, storedRows, withRecordIn } from "./stage.ts";
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

const list = (name: string, ...types: string[]) => configList(name, types);

/** Networks blue, green and red, each of one plugin; red may bring no default route. */
function makeNetworks(more: Record<string, object> = {}, table = ""): Node {
  const red = { cniVersion: "1.1.0", name: "red", plugins: [{ type: "macvlan", ipam: {} }] };
  return makeNode({
    table,
    lists: { "1.conflist": list("blue", "a"), "2.conflist": list("green", "b"), "3.conflist": red },
    delegates: Object.fromEntries(
      ["a", "b", "macvlan"].map((name) => [name, { reserve: "$DIR/reserved", ...more[name] }]),
    ),
  });
}

const add = (node: Node, cni: string, env: Record<string, string> = {}) =>
  wire(node, { command: "ADD", stdin: annotated({ cni }), env });
const del = (node: Node, env: Record<string, string> = {}) => wire(node, { command: "DEL", env });
const ok = { status: 0, stderr: "" };
const busy: Behaviour = { error: { code: 118, msg: "busy" } };

const rows = storedRows;

/** A namespace made anew at the same path; the old file stays, or its inode would come again. */
function remakeNetns(node: Node): void {
  renameSync(node.netns, `${node.netns}.old`);
  writeFileSync(node.netns, "");
}

describe("ADD writes down", () => {
  test("what DEL needs, and the final result of each plugin chain", async () => {
    using node = makeNetworks();
    const args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;cni=no";
    expect(await add(node, "blue,green@net7", { CNI_ARGS: args })).toMatchObject(ok);
    const common = {
      containerId: "c1",
      requestIfName: "eth0",
      requestNetwork: "genie-net",
      cniArgs: "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod",
      cniPath: node.bin,
      netns: node.netns,
      pod: { namespace: "ns", name: "pod", uid: "" },
      state: "attached",
      failedAtMs: 0,
    };
    const result = (name: string) => ({ interfaces: [{ name, sandbox: node.netns }] });
    expect(rows(node)).toMatchObject([
      { ...common, ifName: "eth0", primary: true, plugins: [join(node.bin, "a")] },
      { ...common, ifName: "net7", primary: false, plugins: [join(node.bin, "b")] },
    ]);
    expect(rows(node).map((row) => row.result)).toMatchObject([result("eth0"), result("net7")]);
  });

  test("nothing for a call it refuses", async () => {
    using node = makeNetworks();
    expect(wireError(await add(node, "blue,nowhere")).code).toBe(101);
    for (const netns of ["/nowhere", "/dev/null/x", `/${"n".repeat(300)}`, "/proc/self/ns/net"]) {
      expect(wireError(await add(node, "blue", { CNI_NETNS: netns })).code).toBe(4);
    }
    expect([callOrder(node.bin), left(node)]).toEqual([[], nothing]);
  });
});

describe("a second ADD without DEL", () => {
  test("is refused, and the first stays untouched", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue")).toMatchObject(ok);
    const before = rows(node);
    forgetCalls(node.bin);
    expect(wireError(await add(node, "green")).code).toBe(105);
    // Another path, and yet the first one's namespace is there: it lives.
    writeFileSync(join(node.dir, "netns2"), "");
    const elsewhere = { CNI_NETNS: join(node.dir, "netns2") };
    expect(wireError(await add(node, "blue", elsewhere)).code).toBe(105);
    expect([callOrder(node.bin), rows(node)]).toEqual([[], before]);
    expect(await del(node)).toMatchObject(ok);
    expect(left(node)).toEqual(nothing);
  });

  test("is refused for an interface that another call of the container made (Mesos)", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue,green")).toMatchObject(ok);
    expect(wireError(await add(node, "red", { CNI_IFNAME: "eth1" })).code).toBe(105);
    expect(await add(node, "red", { CNI_IFNAME: "eth2" })).toMatchObject(ok);
    expect(await del(node, { CNI_IFNAME: "eth2" })).toMatchObject(ok);
    expect(left(node).rows).toEqual(["c1 eth0 attached", "c1 eth1 attached"]);
  });

  test("gives its lock back where nothing else can be written", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue,green")).toMatchObject(ok);
    const full = "BEGIN SELECT RAISE(ABORT, 'disk full'); END";
    runSql(node, `CREATE TRIGGER full BEFORE INSERT ON ended ${full}`);
    expect(wireError(await add(node, "red", { CNI_IFNAME: "eth1" })).code).toBe(105);
    const held = withRecordIn(node.state, ({ database }) =>
      database.query("SELECT command FROM operations").values(),
    );
    expect(held).toEqual([]);
  });

  test("succeeds after one that failed (Nomad)", async () => {
    using node = makeNetworks({ b: { ADD: { ...busy, failTimes: 2 } } });
    for (let i = 0; i < 2; i++) {
      expect(wireError(await add(node, "blue,green")).code).toBe(118);
      expect(left(node)).toEqual(nothing);
    }
    expect(await add(node, "blue,green")).toMatchObject(ok);
    expect(left(node).reserved).toEqual(["c1-eth0", "c1-eth1"]);
  });

  test("undoes what a reboot left, whose namespace is gone", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue,green")).toMatchObject(ok);
    remakeNetns(node);
    forgetCalls(node.bin);
    expect(await add(node, "blue")).toMatchObject(ok);
    expect(calls(node.bin).map(({ plugin, command, env }) => [plugin, command, env["CNI_NETNS"]]))
      // The same path, but not the namespace they were made in.
      .toEqual([
        ["b", "DEL", ""],
        ["a", "DEL", ""],
        ["a", "ADD", node.netns],
      ]);
    expect(left(node)).toEqual({ rows: ["c1 eth0 attached"], reserved: ["c1-eth0"] });
  });

  test("waits until what is left can be undone", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue")).toMatchObject(ok);
    remakeNetns(node);
    fakePlugin(node.bin, "a", { reserve: node.reserved, DEL: busy });
    const error = wireError(await add(node, "blue"));
    expect([error.code, error.msg]).toEqual([11, expect.stringContaining("busy")]);
    expect(left(node).reserved).toEqual(["c1-eth0"]);
    fakePlugin(node.bin, "a", { reserve: node.reserved });
    expect(await add(node, "blue")).toMatchObject(ok);
    expect(await del(node)).toMatchObject(ok);
    expect(left(node)).toEqual(nothing);
  });

  test("finds the binary of a stale attachment where it is now", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue")).toMatchObject(ok);
    remakeNetns(node);
    const moved = join(node.dir, "moved");
    renameSync(node.bin, moved);
    const env = { CNI_PATH: `${moved}:${node.bin}` };
    expect(await add(node, "blue", env)).toMatchObject(ok);
    expect(callOrder(moved)).toEqual(["a ADD c1 eth0", "a DEL c1 eth0", "a ADD c1 eth0"]);
  });

  test("takes the place of a row that cannot be read", async () => {
    using node = makeNetworks();
    expect(await add(node, "blue")).toMatchObject(ok);
    const state = openState(makeHost(), node.state);
    state.database.run("UPDATE attachments SET plan = '{'");
    closeState(state);
    rmSync(join(node.reserved, "c1-eth0"));
    const run = await add(node, "blue");
    expect([run.status, run.stderr]).toEqual([0, expect.stringContaining("Cannot read a stored")]);
    expect(left(node).rows).toEqual(["c1 eth0 attached"]);
  });
});

describe("a failing ADD", () => {
  test("undoes in reverse, the failed one included", async () => {
    using node = makeNetworks({ macvlan: { ADD: busy } });
    expect(wireError(await add(node, "blue,green,red,blue")).code).toBe(118);
    expect(callOrder(node.bin)).toEqual([
      "a ADD c1 eth0",
      "b ADD c1 eth1",
      "macvlan ADD c1 eth2",
      "macvlan DEL c1 eth2",
      "b DEL c1 eth1",
      "a DEL c1 eth0",
    ]);
    const given = calls(node.bin).filter(({ command }) => command === "DEL");
    expect(given.map(({ stdin }) => "prevResult" in JSON.parse(stdin))).toEqual([
      false,
      true,
      true,
    ]);
    expect(left(node)).toEqual(nothing);
    forgetCalls(node.bin);
    // The DEL that follows has nothing to do, and knows it.
    expect([await del(node), callOrder(node.bin)]).toMatchObject([ok, []]);
  });

  test("keeps what it cannot undo, for the DEL that follows", async () => {
    using node = makeNetworks({ a: { DEL: busy }, b: { ADD: { error: { code: 7, msg: "no" } } } });
    const run = await add(node, "blue,green");
    expect(wireError(run)).toMatchObject({ code: 7, msg: expect.stringContaining("failed: no") });
    expect(run.stderr).toContain("Cannot undo a failed ADD");
    expect(left(node)).toEqual({ rows: ["c1 eth0 failing"], reserved: ["c1-eth0"] });
    expect(rows(node)[0]?.failedAtMs).toBeGreaterThan(0);
    expect(wireError(await del(node)).code).toBe(118);
    fakePlugin(node.bin, "a", { reserve: node.reserved });
    expect(await del(node)).toMatchObject(ok);
    expect(left(node)).toEqual(nothing);
  });

  test("gives a plugin that hangs its own limit, and ends it", async () => {
    const blue = (timeout: string) => `[plugins.blue]\ntimeout = "${timeout}"\n`;
    using node = makeNetworks({ a: { ADD: { hang: true } } }, blue("1s"));
    expect(wireError(await add(node, "blue")).code).toBe(103);
    writeTable(node, `timeout = "1s"\n${blue("1h")}`);
    expect(wireError(await add(node, "blue")).code).toBe(103);
    expect(left(node)).toEqual(nothing);
  });
});

describe("the result", () => {
  test("is the primary's alone where the table says so", async () => {
    using node = makeNetworks({}, 'result = "primary"\n');
    const { stdout } = await add(node, "blue,green");
    expect(JSON.parse(stdout)).toMatchObject({ interfaces: [{ name: "eth0" }], ips: [{}] });
    expect(left(node).rows).toHaveLength(2);
    await del(node);
    expect(left(node)).toEqual(nothing);
  });

  test("has the order of the networks, whichever ran first", async () => {
    using node = makeNetworks({}, "parallel = true\n");
    const { stdout } = await add(node, "blue,red,green");
    expect(JSON.parse(stdout)).toMatchObject({
      interfaces: [{ name: "eth0" }, { name: "eth1" }, { name: "eth2" }],
    });
    // green may bring a default route, so it goes first and alone.
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth0", "b ADD c1 eth2", "macvlan ADD c1 eth1"]);
  });
});

describe("parallel = true", () => {
  const table = "parallel = true\n";
  /** Ends once three of it are running: in turns it never would. */
  const three =
    "until [ $(grep -c '\"macvlan\"' $DIR/bin/.calls.jsonl) -ge 3 ]; do sleep 0.02; done";
  const chain = { cniVersion: "1.1.0", name: "pink", plugins: [{ type: "vlan", ipam: {} }] };

  test("attaches side by side what comes after the first", async () => {
    using node = makeNetworks({ macvlan: { ADD: { shell: three } } }, table);
    expect(await add(node, "blue,red,red,red")).toMatchObject(ok);
    const [first, ...others] = calls(node.bin).map(({ plugin }) => plugin);
    expect([first, others]).toEqual(["a", ["macvlan", "macvlan", "macvlan"]]);
  });

  test("waits for all before it undoes any", async () => {
    using node = makeNetworks({ macvlan: { ADD: busy } }, table);
    writeFileSync(join(node.conf, "4.conflist"), JSON.stringify(chain));
    fakePlugin(node.bin, "vlan", { reserve: node.reserved, ADD: { delayMs: 600 } });
    expect(wireError(await add(node, "blue,red,pink")).code).toBe(118);
    const order = callOrder(node.bin);
    expect(order.slice(0, 4).sort()).toEqual([
      "a ADD c1 eth0",
      "macvlan ADD c1 eth1",
      "macvlan DEL c1 eth1",
      "vlan ADD c1 eth2",
    ]);
    expect(order.slice(4)).toEqual(["vlan DEL c1 eth2", "a DEL c1 eth0"]);
    expect(left(node)).toEqual(nothing);
  });
});
