/**
 * DEL through the compiled program: lib/detach.ts. It always ends, whatever changed since ADD, and
 * forgets nothing. Kills, signals and disks that are full are in faults.test.ts.
 */
import { describe, expect, test } from "bun:test";
import { mkdirSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { withoutSuccessWords } from "../lib/detach.ts";
import { callOrder, calls, fakePlugin, forgetCalls, type Script } from "./fakes.ts";
import { runSql } from "./stage.ts";
import {
  annotated,
  left,
  makeNode,
  type Node,
  nothing,
  type WireCall,
  wire,
  wireError,
  writeTable,
} from "./wire.ts";

const list = (name: string, ...types: string[]) => ({
  cniVersion: "1.1.0",
  name,
  plugins: types.map((type) => ({ type, from: "ADD" })),
});
const table = "[plugins.blue]\n[plugins.green]\n";

/** Networks blue (plugins a, tuner) and green (plugin b). */
function makeNetworks(more: { a?: Script; b?: Script; table?: string } = {}): Node {
  return makeNode({
    table: more.table ?? table,
    lists: { "1.conflist": list("blue", "a", "tuner"), "2.conflist": list("green", "b") },
    delegates: {
      a: { reserve: "$DIR/reserved", ...more.a },
      b: { reserve: "$DIR/reserved", ...more.b },
      tuner: { chain: "pass" },
    },
  });
}

const cni = annotated({ cni: "blue,green" });
const ok = { status: 0, stdout: "", stderr: "" };
const all = ["b DEL c1 eth1", "tuner DEL c1 eth0", "a DEL c1 eth0"];

async function add(node: Node): Promise<void> {
  expect(await wire(node, { command: "ADD", stdin: cni })).toMatchObject({ status: 0, stderr: "" });
  forgetCalls(node.bin);
}

const del = (node: Node, call: Partial<WireCall> = {}) => wire(node, { ...call, command: "DEL" });
const netnsGiven = (node: Node) => [...new Set(calls(node.bin).map(({ env }) => env["CNI_NETNS"]))];

const sql = runSql;

const broken = { error: { code: 118, msg: "lease file not found" } };

/** What may have changed between ADD and DEL: on the node, and in the call that comes then. */
const changes: [string, (node: Node) => unknown, Partial<WireCall>][] = [
  ["nothing", () => 0, { stdin: cni }],
  ["no annotations come any more", () => 0, {}],
  ["other annotations come", () => 0, { stdin: annotated({ cni: "nowhere@bad/name" }) }],
  ["the config has another name", () => 0, { stdin: { name: "renamed", type: "genie2" } }],
  ["the config is of 0.2.0", () => 0, { stdin: { cniVersion: "0.2.0" } }],
  ["the config has wrong keys", () => 0, { stdin: { default_plugin: 7, log_level: "loud" } }],
  ["the table is no TOML", (node) => writeTable(node, "no toml ["), {}],
  ["a key of the table is wrong", (node) => writeTable(node, 'timeout = "soon"\n'), {}],
  ["the networks left the table", (node) => writeTable(node, "[plugins.other]\n"), {}],
  ["the config lists are gone", (node) => rmSync(node.conf, { recursive: true }), {}],
  ["a config list changed", changeList, {}],
  ["the kubeconfig is gone", () => 0, { stdin: { kubernetes: { kubeconfig: "/nowhere" } } }],
  ["CNI_PATH is missing", () => 0, { env: { CNI_PATH: undefined } }],
  ["CNI_ARGS are other ones", () => 0, { env: { CNI_ARGS: "K8S_POD_NAME=other;cni=red" } }],
];

function changeList(node: Node): void {
  const other = { ...list("blue"), plugins: [{ type: "b", from: "later" }] };
  writeFileSync(join(node.conf, "1.conflist"), JSON.stringify(other));
}

describe("DEL works from the record", () => {
  test.each(changes)("although %s", async (_name, change, call) => {
    using node = makeNetworks();
    await add(node);
    change(node);
    expect(await del(node, call)).toEqual(ok);
    expect(callOrder(node.bin)).toEqual(all);
    for (const { stdin, env } of calls(node.bin)) {
      const { from, prevResult } = JSON.parse(stdin);
      expect([from, env["CNI_ARGS"], env["CNI_PATH"]]).toEqual(["ADD", "", node.bin]);
      const name = env["CNI_IFNAME"];
      expect(prevResult).toMatchObject({ interfaces: [{ name, sandbox: node.netns }] });
    }
    expect(left(node)).toEqual(nothing);
  });

  test.each([
    ["is given", (node: Node) => node.netns, (node: Node) => node.netns],
    ["is empty", () => "", () => ""],
    ["is absent", () => undefined, () => ""],
    ["is gone", () => "/nowhere", () => "/nowhere"],
    ["is a path through a file", () => "/dev/null/x", () => "/dev/null/x"],
    ["is no namespace", () => "/dev/null", () => ""],
    ["is that of the node", () => "/proc/self/ns/net", () => ""],
    ["is another kind of namespace", () => "/proc/self/ns/mnt", () => ""],
  ])("when CNI_NETNS %s", async (_name, netns, expected) => {
    using node = makeNetworks();
    await add(node);
    expect(await del(node, { env: { CNI_NETNS: netns(node) } })).toEqual(ok);
    expect(netnsGiven(node)).toEqual([expected(node)]);
    expect(left(node)).toEqual(nothing);
  });

  test("three times, and asks nobody again", async () => {
    using node = makeNetworks();
    await add(node);
    for (let i = 0; i < 3; i++) expect(await del(node, { stdin: cni })).toEqual(ok);
    expect(callOrder(node.bin)).toEqual(all);
  });

  test("of its own interface alone", async () => {
    using node = makeNetworks();
    await add(node);
    expect(await del(node, { env: { CNI_IFNAME: "eth1" } })).toEqual(ok);
    expect(await del(node, { env: { CNI_CONTAINERID: "c2" } })).toEqual(ok);
    expect(left(node).rows).toEqual(["c1 eth0 attached", "c1 eth1 attached"]);
  });

  test.each(["'{'", '\'{"ips":[{"address":7}]}\'', "NULL"])(
    "without prevResult when the stored one is %s (fact 11)",
    async (damage) => {
      using node = makeNetworks();
      await add(node);
      sql(node, `UPDATE attachments SET result = ${damage}`);
      expect(await del(node)).toEqual(ok);
      expect(callOrder(node.bin)).toEqual(all);
      const results = calls(node.bin).filter(({ stdin }) => stdin.includes("prevResult"));
      expect([results, left(node)]).toEqual([[], nothing]);
    },
  );

  test("and by a guess for the row that is damaged, of its interface alone", async () => {
    using node = makeNetworks();
    await add(node);
    sql(node, "UPDATE attachments SET plan = '{}' WHERE ifname = 'eth1'");
    const run = await del(node, { stdin: cni });
    expect(run).toMatchObject({
      status: 0,
      stderr: expect.stringContaining("Cannot read a stored"),
    });
    expect(callOrder(node.bin)).toEqual([...all.slice(1), ...all.slice(0, 1)]);
    expect(left(node).reserved).toEqual([]);
    forgetCalls(node.bin);
    expect((await del(node, { stdin: cni })).status).toBe(0);
    expect(callOrder(node.bin)).toEqual([]);
  });
});

describe("a plugin that fails in DEL", () => {
  const window = (text: string) => `del_retry_window = "${text}"\n${table}`;

  test("fails the DEL and keeps its record, until it succeeds", async () => {
    using node = makeNetworks({ b: { DEL: broken } });
    await add(node);
    for (let i = 0; i < 2; i++) {
      const run = await del(node);
      // containerd takes these words for success.
      expect(run.stdout).not.toContain("not found");
      const error = wireError(run);
      expect([error.code, error.msg]).toEqual([118, expect.stringContaining("lease file absent")]);
      expect(left(node)).toEqual({ rows: ["c1 eth1 failing"], reserved: ["c1-eth1"] });
    }
    fakePlugin(node.bin, "b", { reserve: node.reserved });
    expect(await del(node)).toEqual(ok);
    expect(left(node)).toEqual(nothing);
  });

  test("is parked when the window is over, and tried again by each DEL", async () => {
    using node = makeNetworks({ b: { DEL: broken }, table: window("1ms") });
    await add(node);
    expect(wireError(await del(node)).code).toBe(118);
    const parked = { rows: ["c1 eth1 leaked"], reserved: ["c1-eth1"] };
    for (let i = 0; i < 2; i++) {
      const run = await del(node);
      expect(run).toMatchObject({ status: 0, stdout: "" });
      expect(run.stderr).toContain("parked as leaked");
      expect(left(node)).toEqual(parked);
    }
    fakePlugin(node.bin, "b", { reserve: node.reserved });
    expect(await del(node)).toEqual(ok);
    expect(left(node)).toEqual(nothing);
  });

  test("finds its window in a table that is broken below", async () => {
    using node = makeNetworks({ b: { DEL: broken } });
    await add(node);
    writeTable(node, `${window("1ms")}[plugins.blue\n`);
    expect(wireError(await del(node)).code).toBe(118);
    expect(await del(node)).toMatchObject({ status: 0 });
  });

  test("is not taken for a missing binary by its own code 102", async () => {
    using node = makeNetworks({ b: { DEL: { error: { code: 102, msg: "pool locked" } } } });
    await add(node);
    expect(wireError(await del(node)).code).toBe(102);
    expect(left(node).rows).toEqual(["c1 eth1 failing"]);
  });

  test("that hangs is ended, and the others are asked", async () => {
    using node = makeNetworks({
      b: { DEL: { hang: true } },
      // Of green alone: its ADD has that time as well.
      table: `${table}timeout = "2s"\n`,
    });
    await add(node);
    expect(wireError(await del(node)).code).toBe(103);
    expect(new Set(callOrder(node.bin))).toEqual(new Set(all));
    expect(left(node).rows).toEqual(["c1 eth1 failing"]);
  });
});

describe("a plugin whose binary", () => {
  test("is gone is parked at once; it comes back, and the next DEL frees its address", async () => {
    using node = makeNetworks();
    await add(node);
    renameSync(join(node.bin, "b"), join(node.bin, "b.gone"));
    const run = await del(node);
    expect([run.status, run.stdout]).toEqual([0, ""]);
    expect(run.stderr).toMatch(/parked as leaked.*network=green interface=eth1.*ENOENT/);
    expect(left(node)).toEqual({ rows: ["c1 eth1 leaked"], reserved: ["c1-eth1"] });
    renameSync(join(node.bin, "b.gone"), join(node.bin, "b"));
    expect(await del(node)).toEqual(ok);
    expect(left(node)).toEqual(nothing);
  });

  test("is gone beside one that fails is tried again", async () => {
    using node = makeNetworks({ a: { DEL: broken } });
    await add(node);
    rmSync(join(node.bin, "tuner"));
    expect(wireError(await del(node)).details).toContain("lease file absent");
    expect(left(node).rows).toEqual(["c1 eth0 failing"]);
  });

  test("moved is found in the CNI_PATH of DEL", async () => {
    using node = makeNetworks();
    await add(node);
    const moved = join(node.dir, "moved");
    renameSync(node.bin, moved);
    mkdirSync(node.bin);
    expect(await del(node, { env: { CNI_PATH: `/nowhere:${moved}` } })).toEqual(ok);
    expect([callOrder(moved), left(node)]).toEqual([all, nothing]);
  });
});

describe("DEL without a record", () => {
  const lose = (node: Node) => rmSync(node.state, { recursive: true });

  test("before any ADD (nerdctl), and that ADD is as good as any", async () => {
    using node = makeNetworks();
    expect(await del(node, { stdin: cni, env: { CNI_NETNS: "" } })).toEqual(ok);
    expect(callOrder(node.bin)).toEqual(all);
    await add(node);
    expect(await del(node)).toEqual(ok);
    expect(left(node)).toEqual(nothing);
  });

  const carried: [string, Partial<WireCall>, string[]][] = [
    ["the runtime's annotations", { stdin: cni }, all],
    ["K8S_ANNOT", { env: { CNI_ARGS: 'K8S_ANNOT={"cni":"green"}' } }, ["b DEL c1 eth0"]],
    ["CNI_ARGS", { env: { CNI_ARGS: "IgnoreUnknown=1; cni=green@eth0" } }, ["b DEL c1 eth0"]],
    [
      "the labels of Mesos",
      {
        stdin: {
          args: {
            "org.apache.mesos": {
              network_info: { labels: { labels: [{ key: "cni", value: "green" }] } },
            },
          },
        },
      },
      ["b DEL c1 eth0"],
    ],
    ["the default networks", {}, ["tuner DEL c1 eth0", "a DEL c1 eth0"]],
    [
      "null for annotations",
      { stdin: { runtimeConfig: { "io.kubernetes.cri.pod-annotations": null } } },
      ["tuner DEL c1 eth0", "a DEL c1 eth0"],
    ],
    [
      "what of it is on the node",
      { stdin: annotated({ cni: "green", "k8s.v1.cni.cncf.io/networks": "team/nad" }) },
      ["b DEL c1 eth0"],
    ],
    ["nothing that can be read", { stdin: annotated({ cni: "a b@@" }) }, []],
  ];

  test.each(carried)("goes by %s, and asks no API", async (_name, call, expected) => {
    using node = makeNetworks({
      table: '[default]\nnetworks = ["blue"]\n[access]\ndefault = "deny"\n[plugins.blue]\n',
    });
    let requests = 0;
    const server = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: () => {
        requests++;
        return new Response("{}", { status: 500 });
      },
    });
    try {
      const kubeconfig = join(node.dir, "kubeconfig");
      const cluster = { clusters: [{ name: "x", cluster: { server: server.url.origin } }] };
      const context = { contexts: [{ name: "x", context: { cluster: "x", user: "x" } }] };
      const users = { users: [{ name: "x", user: { token: "t" } }], "current-context": "x" };
      writeFileSync(kubeconfig, JSON.stringify({ ...cluster, ...context, ...users }));
      const pod = "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod";
      const args = [call.env?.["CNI_ARGS"], pod].filter(Boolean).join(";");
      const stdin = { kubernetes: { kubeconfig }, ...(call.stdin as object) };
      expect(await del(node, { stdin, env: { CNI_ARGS: args } })).toEqual(ok);
      expect([callOrder(node.bin), requests]).toEqual([expected, 0]);
    } finally {
      await server.stop(true);
    }
  });

  test("gives the plugins the result that the runtime kept", async () => {
    using node = makeNetworks();
    const { stdout } = await wire(node, { command: "ADD", stdin: cni });
    lose(node);
    forgetCalls(node.bin);
    expect(await del(node, { stdin: { ...cni, prevResult: JSON.parse(stdout) } })).toEqual(ok);
    const [last] = calls(node.bin);
    expect(JSON.parse(last?.stdin ?? "{}").prevResult).toEqual(JSON.parse(stdout));
    expect(left(node).reserved).toEqual([]);
  });

  test("never touches the node's own interfaces, nor enters what is no namespace", async () => {
    using node = makeNetworks();
    for (const netns of ["/proc/self/ns/net", "/dev/null", node.netns]) {
      forgetCalls(node.bin);
      rmSync(node.state, { recursive: true, force: true });
      expect(await del(node, { stdin: cni, env: { CNI_NETNS: netns } })).toEqual(ok);
      expect(netnsGiven(node)).toEqual([""]);
    }
  });

  test("reports what fails, and succeeds", async () => {
    using node = makeNetworks({ b: { DEL: broken } });
    const run = await del(node, { stdin: cni });
    expect(run).toMatchObject({ status: 0, stdout: "" });
    expect(run.stderr).toContain("Best effort without a record");
    expect(callOrder(node.bin)).toEqual(all);
  });

  const unusable: [string, (node: Node) => void, string][] = [
    ["of a newer genie", (node) => sql(node, "PRAGMA user_version = 99"), "is newer than"],
    [
      "that is a folder",
      (node) => {
        lose(node);
        mkdirSync(join(node.state, "genie.db"), { recursive: true });
      },
      "genie.db",
    ],
    [
      "in a folder that is a file",
      (node) => {
        lose(node);
        writeFileSync(node.state, "");
      },
      "genie.db",
    ],
    [
      "that is noise",
      (node) => {
        // Its log goes too: from that SQLite brings the whole record back.
        lose(node);
        mkdirSync(node.state, { recursive: true });
        writeFileSync(join(node.state, "genie.db"), "x".repeat(9000));
      },
      "Set aside unusable database",
    ],
  ];
  test.each(unusable)("ends for a file %s", async (_name, spoil, said) => {
    using node = makeNetworks();
    await add(node);
    spoil(node);
    const run = await del(node, { stdin: cni });
    expect(run).toMatchObject({ status: 0, stdout: "", stderr: expect.stringContaining(said) });
    expect(callOrder(node.bin)).toEqual(all);
  });
});

describe("withoutSuccessWords()", () => {
  test.each([
    ["Link not found", "Link absent"],
    ["Not Found: not found", "absent: absent"],
    ["open x: no such file or directory", "open x: path is absent"],
    ["notfound, found not", "notfound, found not"],
  ])("%p", (text, expected) => {
    expect(withoutSuccessWords(text)).toBe(expected);
  });
});
