/** `genie try` (lib/node/trial.ts): real plugins on a node of its own, by the compiled program. */
import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { makeHost, runGenie } from "./fakes.ts";
import { hostLocal, type Node, noTraces, realNeeds, withNode } from "./fixtures/quirks/node.ts";
import { lacks } from "./skip.ts";
import { compiledGenie } from "./wire.ts";

/** Two bridges that the node routes between, and one network whose plugin always fails. */
function makeNetworks(node: Node): string {
  node.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward");
  for (const [name, subnet] of [
    ["blue", "10.221.0.0/24"],
    ["green", "10.222.0.0/24"],
  ] as const) {
    const ipam = hostLocal(node, [subnet]);
    const plugin = { type: "bridge", bridge: `${name}0`, isDefaultGateway: true, ipam };
    node.network(name, { cniVersion: "1.0.0", plugins: [plugin] });
  }
  const red = { type: "macvlan", master: "absent0", ipam: hostLocal(node, ["10.223.0.0/24"]) };
  node.network("red", { cniVersion: "1.0.0", plugins: [red] });
  const conf = join(node.dir, "genie.conf");
  const own = { cniVersion: "1.0.0", name: "genie", type: "genie" };
  writeFileSync(conf, JSON.stringify({ ...own, plugins_file: join(node.dir, "plugins.toml") }));
  return conf;
}

const attemptOf = (node: Node, conf: string, ...words: string[]) => {
  const [enter = "", ...rest] = node.enter;
  const args = [...rest, compiledGenie(), "try", ...words, "--cni-config", conf];
  return runGenie(enter, { PATH: process.env["PATH"] ?? "" }, "", args);
};

/** Without what differs from run to run. */
const steady = (text: string) =>
  text.replace(/\d[\d.]*(µs|ms|s)\b/g, "TIME").replace(/MAC [0-9a-f:]{17}/g, "MAC");

describe.skipIf(lacks(...realNeeds, "the binary"))("genie try", () => {
  test("attaches, pings, and takes all away", async () => {
    await withNode(async (node) => {
      const conf = makeNetworks(node);
      const { status, stdout, stderr } = await attemptOf(node, conf, "blue,green");
      expect({ status, stdout: steady(stdout), stderr }).toEqual({
        status: 0,
        stderr: "",
        stdout: [
          "blue: attached in TIME: eth0 10.221.0.2/24, MAC; CHECK ok",
          "  blue → its gateway (10.221.0.1): answers in TIME",
          "green: attached in TIME: eth0 10.222.0.2/24, MAC; CHECK ok",
          "  green → its gateway (10.222.0.1): answers in TIME",
          "  blue → green (10.222.0.2): answers in TIME",
          "all is taken away again",
          "",
        ].join("\n"),
      });
      expect(node.traces()).toEqual(noTraces);
    });
  }, 60_000);

  test("says what does not work, and takes the rest away", async () => {
    await withNode(async (node) => {
      const conf = makeNetworks(node);
      node.run("iptables", "-P", "FORWARD", "DROP");
      const { status, stdout } = await attemptOf(node, conf, "blue", "red", "green", "--json");
      const shown = JSON.parse(stdout) as {
        ok: boolean;
        attempts: { network: string; error: string }[];
        pings: { from: string; to: string; us: number | null }[];
      };
      expect([status, shown.ok]).toEqual([1, false]);
      expect(shown.attempts.map(({ network, error }) => [network, error])).toEqual([
        ["blue", ""],
        ["red", expect.stringContaining('plugin "macvlan" failed: Link not found')],
        ["green", ""],
      ]);
      expect(shown.pings.map(({ from, to, us }) => [from, to, us === null])).toEqual([
        ["blue", "its gateway", false],
        ["green", "its gateway", false],
        ["blue", "green", true],
      ]);
      expect(node.traces()).toEqual(noTraces);
    });
  }, 60_000);

  test("knows no other network", async () => {
    await withNode(async (node) => {
      const { status, stdout } = await attemptOf(node, makeNetworks(node), "violet");
      expect(status).toBe(1);
      expect(stdout).toStartWith('violet: not attached: Unknown network "violet"');
    });
  });
});

describe("genie try, used wrongly", () => {
  test.each<[string[], string]>([
    [[], "Which networks? genie validate lists them"],
    [["a,b/c"], 'Invalid name of a network: "b/c"'],
    [["a,b,c,d,e,f,g,h,i"], "At most 8 at once"],
    [["a"], "Only the compiled program can try networks: bun run build"],
  ])("%p", async (words, message) => {
    const host = makeHost({ env: {} });
    expect(await runCommand(host, ["try", ...words])).toBe(2);
    expect(host.written.stderr).toContain(message);
  });
});
