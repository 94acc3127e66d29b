/** `genie pods` (lib/report/pods.ts): who is attached where, of this node; see cluster.test.ts. */
import { beforeAll, describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { putRuleset } from "../lib/policy/store.ts";
import { namesOf } from "../lib/report/names.ts";
import { setAttached } from "../lib/write_ahead.ts";
import { makeHost } from "./fakes.ts";
import { addAttachment, madeAttachment, startMs, withLedger } from "./record.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();
const stateDir = join(dir.path, "state");
const conf = join(dir.path, "genie.conf");

async function pods(...args: string[]) {
  const host = makeHost({ env: {}, now: startMs + 3 * 3_600_000 + 59_000 });
  const status = await runCommand(host, ["pods", ...args, "--cni-config", conf]);
  return { status, ...host.written };
}

beforeAll(() => {
  const table = join(dir.path, "plugins.toml");
  const own = { cniVersion: "1.0.0", name: "pods", type: "genie", plugins_file: table };
  writeFileSync(table, `state_dir = "${stateDir}"\nconf_dir = "${dir.path}/none"\n`);
  writeFileSync(conf, JSON.stringify(own));
  withLedger(stateDir, (state) => {
    addAttachment(state, { containerId: "c1", addresses: ["10.1.0.57/16", "fd00::39/64"] });
    addAttachment(state, { containerId: "c1", ifName: "net1", network: "green", addresses: [] });
    addAttachment(state, {
      ...{ containerId: "c2", namespace: "team-b", pod: "db", addresses: ["10.1.0.58/16"] },
      stuck: { state: "leaked", error: "plugin bridge is gone", atMs: startMs },
    });
    const interfaces = [
      { name: "vethe1", mac: "aa:aa:aa:aa:aa:aa" },
      { name: "eth0", mac: "0a:58:0a:01:00:39", sandbox: "/run/netns/a" },
    ];
    const ips = ["10.1.0.57/16", "fd00::39/64"].map((address) => ({ address }));
    setAttached(state, madeAttachment(), { cniVersion: "1.0.0", interfaces, ips });
    state.database.run("UPDATE attachments SET netns_id = 'n1' WHERE container_id = 'c1'");
    const pod = { podNamespace: "team-a", podName: "web" };
    const rules = { ruleset: "table inet genie {}", hostRuleset: "" };
    putRuleset(state, { netnsId: "n1", containerId: "c1", ...pod, ...rules, atMs: startMs });
  });
});

const header =
  "POD         NETWORK  IFNAME  ADDRESSES                 MAC                PLUGINS  AGE  STATE" +
  "     POLICY\n";
const web =
  "team-a/web  blue     eth0    10.1.0.57/16,fd00::39/64  0a:58:0a:01:00:39  bridge    3h  " +
  "attached  in force\n";
const net1 =
  "team-a/web  green    net1    –                         –                  bridge    3h  " +
  "attached  in force\n";
const db =
  "team-b/db   blue     eth0    10.1.0.58/16              –                  bridge    3h  " +
  "leaked    –\n";

describe("genie pods", () => {
  test("shows who is attached where", async () => {
    const stdout = header + web + net1 + db;
    expect(await pods()).toEqual({ status: 0, stderr: "", stdout });
  });

  const found: [string, string[], string[]][] = [
    ["a namespace", ["team-b"], ["c2"]],
    ["a namespace by its option", ["-n", "team-a"], ["c1", "c1"]],
    ["a pod", ["team-a/web"], ["c1", "c1"]],
    ["a pod by namespace and word", ["-n", "team-b", "db"], ["c2"]],
    ["pods of one name", ["--pod", "db"], ["c2"]],
    ["a network", ["--network", "green"], ["c1"]],
    ["an address", ["--address", "10.1.0.57"], ["c1"]],
    ["an address with its prefix", ["--address", "10.1.0.58/16"], ["c2"]],
    ["an IPv6 address, written otherwise", ["--address", "fd00:0::0039"], ["c1"]],
    ["an address on a network", ["--address", "10.1.0.57", "--network", "blue"], ["c1"]],
  ];
  test.each(found)("limits to %s", async (_name, args, containers) => {
    const { status, stdout } = await pods(...args, "-o", "json");
    const { attachments } = JSON.parse(stdout) as { attachments: { containerId: string }[] };
    expect([status, attachments.map((one) => one.containerId)]).toEqual([0, containers]);
  });

  const absent: [string[], string][] = [
    [["team-c"], "No pod of namespace team-c"],
    [["team-a/gone"], "No pod team-a/gone"],
    [["--address", "10.1.0.9"], "No pod with address 10.1.0.9"],
    [["-n", "team-b", "--network", "green"], "No pod of namespace team-b on network green"],
  ];
  test.each(absent)("says that nothing is found of %p", async (args, what) => {
    const stderr = `genie: ${what} is attached on this node; genie report shows earlier ones\n`;
    expect(await pods(...args)).toEqual({ status: 1, stdout: "", stderr });
  });

  const wrong: [string[], string][] = [
    [["--address", "10.1.0"], 'Invalid --address "10.1.0": expected one such as 10.1.0.57'],
    [["a/b/c"], 'Invalid pod "a/b/c": expected NAMESPACE/POD'],
    [["a/b", "-n", "c"], "Pod a/b is not in namespace c: leave one of them out"],
    [["a/b", "--pod", "c"], "The pod is named twice: a/b, and --pod c"],
    [["a", "b"], 'Invalid pod "a b": expected NAMESPACE/POD'],
    [["--node", "a"], "--node needs --cluster"],
    [["-o", "xml"], 'Invalid --output "xml": expected one of json, yaml, table, wide'],
  ];
  test.each(wrong)("refuses %p", async (args, message) => {
    const stderr = `genie: error: ${message}\ngenie: hint: see genie pods --help\n`;
    expect(await pods(...args)).toEqual({ status: 2, stdout: "", stderr });
  });

  test("prints lines for spreadsheets, and YAML", async () => {
    const { stdout } = await pods("team-b", "--csv");
    const [head, line] = stdout.split("\r\n");
    expect(head).toStartWith("node,namespace,pod,pod_uid,network,interface,addresses,mac,");
    expect(line).toStartWith(",team-b,db,uid-1,blue,eth0,10.1.0.58/16,,bridge,leaked,2026-09-01T");
    const yaml = await pods("team-b", "-o", "yaml");
    expect(Bun.YAML.parse(yaml.stdout)).toEqual(
      JSON.parse((await pods("team-b", "--json")).stdout) as object,
    );
  });
});

describe("what a shell offers", () => {
  const own = { cniVersion: "1.0.0", name: "pods", type: "genie" } as const;
  const table = { ...own, plugins_file: join(dir.path, "plugins.toml") };
  test.each<[string, string[]]>([
    ["pods", ["team-a/web", "team-b/db"]],
    ["namespaces", ["team-a", "team-b"]],
    ["networks", []],
    ["annotations", ["cni=", "networks=", "k8s.v1.cni.cncf.io/networks="]],
  ])("%s", async (kind, names) => {
    expect(await namesOf(kind, table)).toEqual(expect.arrayContaining(names));
    expect(await namesOf(kind, { ...own, plugins_file: "/absent" })).toEqual(
      kind === "annotations" ? expect.anything() : [],
    );
  });

  test("but nothing of another kind", async () => {
    expect(namesOf("files", table)).rejects.toThrow('Invalid --values "files"');
  });
});
