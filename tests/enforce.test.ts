/**
 * Policy at ADD, CHECK and DEL, through the compiled program, in real network namespaces:
 * lib/policy/enforce.ts, lib/policy/rulesets.ts, lib/policy/store.ts.
 */
import { describe, expect, test } from "bun:test";
import { appendFileSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { closeState, write } from "../lib/database.ts";
import { parsePolicy, parsePolicyPod } from "../lib/policy/objects.ts";
import { takeFileLock } from "../lib/policy/rulesets.ts";
import {
  aliveSince,
  neededResources,
  putAlive,
  putInputs,
  putProblems,
  type Resource,
} from "../lib/policy/store.ts";
import { openState } from "../lib/recovery/database.ts";
import { fakePlugin, makeHost, tempDir, withNetns } from "./fakes.ts";
import {
  addressOf,
  command,
  hostLocal,
  type Node,
  type Pod,
  pluginDir,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import {
  allowFrom,
  inputsKnown,
  podObject,
  policyPath,
  rowsOf,
  startAgent,
  startCluster,
  until,
} from "./policed.ts";
import { reasonToSkip } from "./skip.ts";
import { annotated, makeNode, wire, wireError, writeTable } from "./wire.ts";

const skipReason = reasonToSkip(...realNeeds, "nftables");

/** What the agent would have written. */
function know(
  state: string,
  {
    policies = {},
    pods = {},
    alive = Date.now(),
  }: { policies?: Record<string, object>; pods?: Record<string, object>; alive?: number },
): void {
  const open = openState(makeHost(), state);
  const metadata = (name: string, object: object) => ({
    ...object,
    metadata: { namespace: "default", ...(object as { metadata?: object }).metadata, name },
  });
  const change = (resource: Resource, name: string, value: unknown) => ({
    ...{ resource, namespace: "default", name },
    object: JSON.stringify(value),
  });
  write(open, () => {
    for (const [name, object] of Object.entries(policies)) {
      const parsed = parsePolicy({ kind: "NetworkPolicy", ...metadata(name, object) });
      if (parsed === undefined) throw new Error("no policy");
      const many = parsed.kind === "MultiNetworkPolicy";
      const resource = many ? "multi-networkpolicies" : "networkpolicies";
      putInputs(open, [change(resource, name, parsed)]);
    }
    for (const [name, object] of Object.entries(pods)) {
      putInputs(open, [change("pods", name, parsePolicyPod(metadata(name, object)))]);
    }
    if (alive > 0) putAlive(open, new Map(neededResources(true).map((one) => [one, alive])));
  });
  closeState(open);
}

/** blue: plain policy is ours. red: nobody's policy is. */
function makeNetworks(node: Node, table = ""): string {
  const text = `${table}\n[plugins.blue]\nenforce_policy = true\n[plugins.red]\n`;
  appendFileSync(join(node.dir, "plugins.toml"), text);
  for (const [i, name] of ["blue", "red"].entries()) {
    const ipam = hostLocal(node, [`10.${216 + i}.0.0/24`]);
    node.network(name, {
      cniVersion: "1.0.0",
      plugins: [{ type: "bridge", bridge: `${name}0`, ipam }],
    });
  }
  return join(node.dir, "state");
}

const uidOf = (pod: Pod) => `uid-${pod.containerId}`;
const args = (pod: Pod) => `;K8S_POD_UID=${uidOf(pod)}`;
const rulesIn = (pod: Pod): string => pod.run("nft", "list", "ruleset");
const seen = (pod: Pod, app: string) => ({ [`p-${pod.containerId}`]: podObject(app, uidOf(pod)) });
const rulesets = (state: string) => rowsOf<{ ruleset: string }>(state, "SELECT * FROM rulesets");

describe.skipIf(skipReason !== undefined)("policy at ADD", () => {
  test("is in force and on record for the interfaces it is about", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "red,blue", args: args(pod) });
      expect(rulesIn(pod)).toContain('iifname "eth1"');
      expect(rulesIn(pod)).not.toContain('"eth0"');
      const row = { container_id: pod.containerId, pod_namespace: "default" };
      expect(rulesets(state)).toMatchObject([row]);
      const ledger = "SELECT plugin, decided_by, outcome FROM ledger WHERE plugin = 'nft'";
      const noted = { plugin: "nft", decided_by: "network policy", outcome: "ok" };
      expect(rowsOf(state, ledger)).toEqual([noted]);
      expect(await pod.call("CHECK")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      await pod.del();
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
    });
  });

  test("stands before the interface that genie switch makes, and goes with it", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      const then = join(node.dir, "then");
      const look = `nsenter --net=$CNI_NETNS nft list ruleset > ${then}`;
      fakePlugin(node.bin, "bridge", `#!/bin/sh\n${look}\nexec ${join(pluginDir, "bridge")}\n`);
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "red", args: args(pod) });
      expect({ now: rulesIn(pod), before: readFileSync(then, "utf8") }).toEqual({
        now: "",
        before: "",
      });
      const words = ["switch", `default/p-${pod.containerId}`];
      expect(command(node, ...words, "--to", "blue")).toMatchObject({ status: 0, stderr: "" });
      expect(readFileSync(then, "utf8")).toContain('iifname "net1"');
      expect(rulesIn(pod)).toContain('iifname "net1"');
      expect(await pod.call("CHECK")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      // What is known of policies became too old: nothing is touched.
      know(state, { alive: 1000 });
      const before = pod.run("ip", "link");
      const refused = command(node, ...words, "--to", "blue");
      expect(refused.stderr).toContain("network policies were last known");
      expect({ status: refused.status, link: pod.run("ip", "link") }).toEqual({
        status: 1,
        link: before,
      });
      know(state, {});
      expect(command(node, ...words, "--from", "blue")).toMatchObject({ status: 0, stderr: "" });
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
      await pod.del();
    });
  });

  test("is in force again after genie repair, or nothing is touched", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "red,blue", args: args(pod) });
      const label = `default/p-${pod.containerId}`;
      pod.run("ip", "link", "del", "eth1");
      pod.run("nft", "flush", "ruleset");
      expect(command(node, "repair", label)).toMatchObject({ status: 0, stderr: "" });
      expect(rulesIn(pod)).toContain('iifname "eth1"');
      expect(await pod.call("CHECK")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      // What is known of policies became too old.
      know(state, { alive: 1000 });
      const before = [addressOf(pod, "eth1"), pod.run("ip", "link")];
      const refused = command(node, "repair", label, "--network", "blue");
      expect(refused).toMatchObject({ status: 1, stdout: "" });
      expect(refused.stderr).toContain("genie agent runs on this node");
      expect([addressOf(pod, "eth1"), pod.run("ip", "link")]).toEqual(before);
      expect(await pod.call("CHECK")).toMatchObject({ status: 0, stdout: "" });
      await pod.del();
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
    });
  });

  const unselected: [string, string, object][] = [
    ["selects other pods", "db", { web: allowFrom() }],
    ["is not there", "web", {}],
  ];
  test.each(unselected)("that %s leaves no trace", async (_, app, policies) => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: policies as Record<string, object>, pods: seen(pod, app) });
      await pod.add({ cni: "blue", args: args(pod) });
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
    });
  });

  const multi = (networks: string) => ({
    ...allowFrom(),
    kind: "MultiNetworkPolicy",
    metadata: { annotations: { "k8s.v1.cni.cncf.io/policy-for": networks } },
  });
  test.each([
    ["names it", "red", true],
    ["names another", "green", false],
  ])("a MultiNetworkPolicy that %s, and a network that a pod has first", async (_, name, is) => {
    await withNode(async (node) => {
      const state = makeNetworks(node, "policy.enforce = true");
      const pod = node.pod();
      know(state, { policies: { web: multi(name) }, pods: seen(pod, "web") });
      await pod.add({ cni: "red", args: args(pod) });
      expect(rulesIn(pod).includes('iifname "eth0"')).toBe(is);
    });
  });

  const old = 400_000;
  const stale: [
    why: string,
    alive: number,
    table: string,
    msg: RegExp | undefined,
    known: boolean,
  ][] = [
    [
      "never known",
      0,
      "",
      /: nothing is known of network policies on this node; check that genie/,
      true,
    ],
    [
      "too old",
      old,
      "",
      /: network policies were last known 40\d s ago, at \S+Z, and policy.max_age allows 300 s;/,
      true,
    ],
    ["of a clock that was set back", -old, "", /were last known -\d+ s ago/, true],
    ["of a damaged row, at no date", -9e15, "", /were last known \S+ s ago, at no date,/, true],
    ["old, with more time", old, 'policy.max_age = "1h"', undefined, true],
    ["too old, open", old, 'policy.when_stale = "open"', undefined, true],
    ["never known, open", 0, 'policy.when_stale = "open"', undefined, false],
  ];
  test.each(stale)("inputs %s", async (_, age, table, msg, isClosed) => {
    await withNode(async (node) => {
      const state = makeNetworks(node, table);
      const pod = node.pod();
      const alive = age === 0 ? 0 : Date.now() - age;
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web"), alive });
      const { status, json, stderr } = await pod.call("ADD", { cni: "blue", args: args(pod) });
      if (msg) {
        expect(json).toMatchObject({ code: 11, msg: expect.stringMatching(msg) });
        expect({ status, links: pod.run("ls", "/sys/class/net").length > 0 }).toMatchObject({
          status: 1,
        });
        expect(node.traces()).toMatchObject({ links: [], files: [], attachments: 0 });
        expect(rulesIn(pod)).toBe("");
        return;
      }
      expect({ status, isClosed: rulesIn(pod) !== "" }).toEqual({ status: 0, isClosed });
      expect(stderr.includes("Attached by policy.when_stale")).toBe(table.includes("open"));
    });
  });

  test.each([
    ["a network that policy is not about", "red", ""],
    ["a default network, enforced or not", "red", "policy.enforce = true"],
  ])("stale inputs fail nothing for %s", async (_, cni, table) => {
    await withNode(async (node) => {
      makeNetworks(node, table);
      const pod = node.pod();
      await pod.add({ cni, args: args(pod) });
      expect(rulesIn(pod)).toBe("");
    });
  });

  test("a pod whose labels nobody knows is closed", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const [pod, other] = [node.pod(), node.pod()];
      know(state, { policies: { web: allowFrom() }, pods: seen(other, "web") });
      const { json } = await pod.call("ADD", { cni: "blue", args: args(pod) });
      expect(json?.code).toBe(11);
      expect(json?.msg).toEndWith(
        "its labels are not known: genie agent has not seen it, and no Kubernetes credentials " +
          "are configured",
      );
      expect(node.traces().attachments).toBe(0);
    });
  });

  test("one whose labels nobody knows is open where stale inputs are", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node, 'policy.when_stale = "open"');
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, alive: Date.now() - old });
      const { status, stderr } = await pod.call("ADD", { cni: "blue", args: args(pod) });
      expect({ status, rules: rulesIn(pod) }).toEqual({ status: 0, rules: "" });
      expect(stderr).toContain("its labels are not known: genie agent has not seen it");
    });
  });

  test("rules that cannot be put in force fail the ADD, and all is undone", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      fakePlugin(node.bin, "nft", "#!/bin/sh\necho no >&2\nexit 1\n");
      const env = { PATH: `${node.bin}:${process.env["PATH"]}` };
      const { json } = await pod.call("ADD", { cni: "blue", args: args(pod), env });
      expect(json?.msg ?? "").toContain("Cannot put a network policy in force");
      expect(node.traces()).toMatchObject({ links: [], files: [], attachments: 0 });
    });
  });

  test("count as the node what the agent knows of it, but no address of a pod", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const [other, pod] = [node.pod(), node.pod()];
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await other.add({ cni: "red", args: args(other) });
      const open = openState(makeHost(), state);
      const object = JSON.stringify([
        "10.216.0.2",
        addressOf(other, "eth0"),
        "192.0.2.7",
        "fd00::7",
      ]);
      const row = { resource: "node-addresses", namespace: "", name: "", object } as const;
      write(open, () => putInputs(open, [row]));
      closeState(open);
      await pod.add({ cni: "blue", args: args(pod) });
      expect(addressOf(pod, "eth0")).toBe("10.216.0.2");
      const nodes = [...rulesIn(pod).matchAll(/saddr (.*) accept comment "node"/g)];
      expect(nodes.map(([, ips]) => ips)).toEqual(["{ 10.216.0.1, 192.0.2.7 }", "fd00::7"]);
    });
  });

  test("a damaged row is closed, with a listed code", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      for (const object of ["{", "null", "[]", '{"namespace":"default","pods":7}']) {
        const open = openState(makeHost(), state);
        const [resource, namespace, name] = ["networkpolicies", "default", "web"] as const;
        write(open, () => putInputs(open, [{ resource, namespace, name, object }]));
        closeState(open);
        const { json } = await pod.call("ADD", { cni: "blue", args: args(pod) });
        expect(json).toMatchObject({ code: 106, msg: expect.stringContaining("is damaged") });
      }
      expect(rulesIn(pod)).toBe("");
    });
  });

  test("of a routed network stands at its host end: nothing in the pod to take away", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node, 'policy.where = "host"');
      const ipam = hostLocal(node, ["10.218.0.0/24"], ["0.0.0.0/0"]);
      node.network("blue", { cniVersion: "1.0.0", plugins: [{ type: "ptp", ipam }] });
      const [web, peer] = [node.pod(), node.pod()];
      const pods = { ...seen(web, "web"), ...seen(peer, "peer") };
      know(state, { policies: { web: allowFrom() }, pods });
      await web.add({ cni: "blue", args: args(web) });
      await peer.add({ cni: "blue", args: args(peer) });
      expect(rulesIn(web)).toBe("");
      expect(node.run("nft", "list", "tables")).toContain("table inet genie_");
      const ping = ["ping", "-c1", "-W1"];
      expect(() => peer.run(...ping, addressOf(web, "eth0"))).toThrow();
      web.run(...ping, addressOf(peer, "eth0"));
      expect(await web.call("CHECK")).toMatchObject({ status: 0 });
      web.kill();
      await web.del({ netns: "" });
      expect(node.run("nft", "list", "tables")).not.toContain("genie_");
    });
  });

  // Weave and Calico list no interface of the node; what a plugin lists may also be a lie.
  const listed: [string, string][] = [
    ["nothing", "[]"],
    ["another pod's end", "ends.slice(0, 1).map((name) => ({ name }))"],
  ];
  /** A plugin that does what a real one does, but lists these interfaces of the node. */
  const disguised = (node: Node, type: string, list: string) =>
    fakePlugin(
      node.bin,
      "disguised",
      `#!${process.execPath}
const stdin = Buffer.from(await Bun.stdin.bytes());
const show = Bun.spawnSync(["ip", "-json", "link", "show", "type", "veth"]).stdout.toString();
const ends = JSON.parse(show).map((one) => one.ifname).filter((name) => !name.startsWith("up"));
const { exitCode, stdout } = Bun.spawnSync(["${join(pluginDir, type)}"], { stdin });
if (exitCode !== 0 || process.env.CNI_COMMAND !== "ADD") {
  process.stdout.write(stdout);
  process.exit(exitCode);
}
const result = JSON.parse(stdout.toString());
result.interfaces = [...${list}, ...result.interfaces.filter((one) => one.sandbox)];
const own = result.interfaces.findIndex((one) => one.sandbox);
for (const ip of result.ips) ip.interface = own;
process.stdout.write(JSON.stringify(result));
`,
    );

  test.each(listed)("stands at the true host end where a result lists %s", async (_what, list) => {
    await withNode(async (node) => {
      const state = makeNetworks(node, 'policy.where = "host"');
      disguised(node, "ptp", list);
      const ipam = hostLocal(node, ["10.218.0.0/24"], ["0.0.0.0/0"]);
      node.network("blue", { cniVersion: "1.0.0", plugins: [{ type: "disguised", ipam }] });
      const [peer, web] = [node.pod(), node.pod()];
      const pods = { ...seen(web, "web"), ...seen(peer, "peer") };
      know(state, { policies: { web: allowFrom() }, pods });
      await peer.add({ cni: "blue", args: args(peer) });
      await web.add({ cni: "blue", args: args(web) });
      expect(rulesIn(web)).toBe("");
      const [, index] = /@if(\d+):/.exec(web.run("ip", "link", "show", "eth0")) ?? [];
      const end = new RegExp(`^${index}: (\\S+)@`, "m").exec(node.run("ip", "link", "show"))?.[1];
      expect(node.run("nft", "list", "ruleset")).toContain(`oifname "${end}" goto ingress_0`);
      const ping = ["ping", "-c1", "-W1"];
      expect(() => peer.run(...ping, addressOf(web, "eth0"))).toThrow();
      web.run(...ping, addressOf(peer, "eth0"));
      expect(await web.call("CHECK")).toMatchObject({ status: 0 });
      await web.del();
      expect(node.run("nft", "list", "tables")).not.toContain("genie_");
    });
  });

  test.each(listed)("a macvlan that lists %s has none, and is refused", async (_what, list) => {
    await withNode(async (node) => {
      const state = makeNetworks(node, 'policy.where = "host"');
      disguised(node, "macvlan", list);
      node.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1");
      const ipam = hostLocal(node, ["10.218.0.0/24"]);
      const plugin = { type: "disguised", master: "up0", mode: "bridge", ipam };
      node.network("blue", { cniVersion: "1.0.0", plugins: [plugin] });
      const [peer, web] = [node.pod(), node.pod()];
      const pods = { ...seen(web, "web"), ...seen(peer, "peer") };
      know(state, { policies: { web: allowFrom() }, pods });
      await peer.add({ cni: "red", args: args(peer) });
      const before = node.traces();
      const { json } = await web.call("ADD", { cni: "blue", args: args(web) });
      const msg = expect.stringMatching(
        /^Cannot attach pod default\/p-\S+: interface eth0 .* no end on the node.*where = "pod"/,
      );
      expect(json).toMatchObject({ code: 7, msg });
      expect(node.traces()).toEqual(before);
      expect(node.run("nft", "list", "tables")).not.toContain("genie");
      // A pod that no policy selects needs no end.
      const free = node.pod();
      know(state, { pods: seen(free, "free") });
      await free.add({ cni: "blue", args: args(free) });
      expect(rulesIn(free)).toBe("");
    });
  });

  test("two calls for one namespace share a table, which goes with the last", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "blue@eth0", args: args(pod) });
      await pod.add({ cni: "blue@eth1", ifName: "eth1", args: args(pod) });
      expect(rulesIn(pod)).toContain('iifname "eth0"');
      expect(rulesIn(pod)).toContain('iifname "eth1"');
      expect(rulesets(state)).toHaveLength(1);
      await pod.del({ ifName: "eth0" });
      expect(rulesIn(pod)).toContain('iifname "eth1"');
      await pod.del({ ifName: "eth1" });
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
    });
  });

  test("a further call for a network that no policy is about leaves the rules", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "blue@eth0", args: args(pod) });
      const listed = () => pod.run("nft", "list", "table", "inet", "genie");
      const bare = () => listed().replaceAll(/\n\s*comment .*/g, "");
      const rules = bare();
      expect(rules).toContain("drop");
      await pod.add({ cni: "red@eth1", ifName: "eth1", args: args(pod) });
      expect(bare()).toBe(rules);
      expect(await pod.call("CHECK", { ifName: "eth0" })).toMatchObject({ status: 0 });
      await pod.del({ ifName: "eth1" });
      expect(rulesIn(pod)).not.toBe("");
      await pod.del({ ifName: "eth0" });
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
    });
  });

  test("what nothing is known of leaves the rules that stand", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node, 'policy.when_stale = "open"');
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "blue@eth0", args: args(pod) });
      const open = openState(makeHost(), state);
      write(open, () => putAlive(open, new Map([["pods" as const, 0]])));
      closeState(open);
      await pod.add({ cni: "blue@eth1", ifName: "eth1", args: args(pod) });
      expect(rulesIn(pod)).toContain('iifname "eth0"');
      await pod.del({ ifName: "eth1" });
      await pod.del({ ifName: "eth0" });
      expect({ rules: rulesIn(pod), rows: rulesets(state) }).toEqual({ rules: "", rows: [] });
    });
  });

  test("another ADD in the same namespace never meets the old rules", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "blue", args: args(pod) });
      await pod.del();
      know(state, { pods: seen(pod, "free") });
      await pod.add({ cni: "blue", args: args(pod) });
      expect(rulesIn(pod)).toBe("");
    });
  });

  test("DEL without the namespace forgets its ruleset", async () => {
    await withNode(async (node) => {
      const state = makeNetworks(node);
      const pod = node.pod();
      know(state, { policies: { web: allowFrom() }, pods: seen(pod, "web") });
      await pod.add({ cni: "blue", args: args(pod) });
      pod.kill();
      await pod.del({ netns: "" });
      expect(rulesets(state)).toEqual([]);
    });
  });
});

test.skipIf(skipReason !== undefined)(
  "labels of a pod that the agent has not seen are the API's",
  async () => {
    await withNetns(async (netns) => {
      const result = { cniVersion: "1.0.0", ips: [{ address: "10.9.0.2/24", interface: 0 }] };
      const interfaces = [{ name: "eth0", sandbox: netns.path }];
      const script = { ADD: { result: { ...result, interfaces } } };
      using node = makeNode({
        delegates: { plug: script },
        lists: { "a.conflist": { cniVersion: "1.0.0", name: "a", plugins: [{ type: "plug" }] } },
      });
      const api = await startCluster(join(node.dir, "api"));
      try {
        api.put("/api/v1/namespaces/default/pods/web", podObject("web", "u1"));
        const file = JSON.stringify(api.kubeconfig("token"));
        const table = `[kubernetes]\nkubeconfig = ${file}\nstatus = "off"\n`;
        writeTable(node, `${table}[plugins.a]\nenforce_policy = true\n`);
        know(node.state, { policies: { web: allowFrom() } });
        const add = (uid: string) =>
          wire(node, {
            command: "ADD",
            env: {
              PATH: process.env["PATH"],
              CNI_NETNS: netns.path,
              CNI_ARGS: `K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=${uid}`,
            },
            stdin: annotated({ cni: "a" }),
          });
        const other = await add("u2");
        expect(wireError(other)).toMatchObject({
          code: 11,
          msg: expect.stringContaining("made anew"),
        });
        expect(await add("u1")).toMatchObject({ status: 0 });
        const rules = Bun.spawnSync(["ip", "netns", "exec", netns.name, "nft", "list", "ruleset"]);
        expect(rules.stdout.toString()).toContain('iifname "eth0" goto ingress_0');
      } finally {
        await api.stop();
      }
    });
  },
);

/** A command on this machine. */
const sh = (...words: string[]): string => Bun.spawnSync(words).stdout.toString();

/** A pod of this machine on a network of plain policy, with rules at its host end. */
interface HostPod {
  veth: string;
  api: Awaited<ReturnType<typeof startCluster>>;
  node: ReturnType<typeof makeNode>;
  /** Starts the agent; it ends with the test. */
  agent: () => ReturnType<typeof startAgent>;
  call: (command: string) => ReturnType<typeof wire>;
  inPod: (...words: string[]) => string;
  onHost: () => string;
}

/** @param link makes the pod's interface `inside`, given a name for the machine's */
async function withHostPod(link: (veth: string) => string[], act: (pod: HostPod) => Promise<void>) {
  await withNetns(async (netns) => {
    const id = crypto.randomUUID().slice(0, 8);
    const veth = `g${id}`;
    sh("ip", "link", "add", veth, "type", "veth", "peer", "name", `h${id}`);
    sh("ip", "link", "add", ...link(veth), "netns", netns.name);
    const interfaces = [{ name: "lo" }, { name: veth }, { name: "eth0", sandbox: netns.path }];
    const result = { cniVersion: "1.0.0", ips: [{ address: "10.9.0.2/24", interface: 2 }] };
    const enter = "nsenter --net=$CNI_NETNS ip";
    const script = `#!/bin/sh
cat >/dev/null
[ $CNI_COMMAND = ADD ] || exit 0
${enter} link set inside name eth0 && ${enter} addr add 10.9.0.2/24 dev eth0
${enter} link set eth0 up
echo '${JSON.stringify({ ...result, interfaces })}'
`;
    using node = makeNode({
      delegates: { plug: script },
      lists: { "a.conflist": { cniVersion: "1.0.0", name: "a", plugins: [{ type: "plug" }] } },
    });
    const api = await startCluster(join(node.dir, "api"));
    api.put("/api/v1/namespaces/default/pods/web", podObject("web", "u1"));
    const file = JSON.stringify(api.kubeconfig("token"));
    const own = `[kubernetes]\nkubeconfig = ${file}\nstatus = "off"\n[policy]\nwhere = "host"\n`;
    writeTable(node, `agent.listen = ""\n${own}[plugins.a]\nenforce_policy = true\n`);
    const agents: ReturnType<typeof startAgent>[] = [];
    const env = {
      PATH: process.env["PATH"],
      CNI_NETNS: netns.path,
      CNI_CONTAINERID: id,
      CNI_ARGS: "K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_UID=u1",
    };
    try {
      await act({
        ...{ veth, api, node },
        agent: () => {
          const agent = startAgent(node.dir, node.tableFile);
          agents.push(agent);
          return agent;
        },
        call: (command) => wire(node, { command, env, stdin: annotated({ cni: "a" }) }),
        inPod: (...words) => sh("ip", "netns", "exec", netns.name, ...words),
        onHost: () => sh("nft", "list", "table", "inet", `genie_${id}`),
      });
    } finally {
      await Promise.all(agents.map((agent) => agent.end("SIGKILL")));
      for (const family of ["inet", "bridge"]) sh("nft", "delete", "table", family, `genie_${id}`);
      sh("ip", "link", "del", veth);
      await api.stop();
    }
  });
}

describe.skipIf(skipReason !== undefined)("rules at the host end", () => {
  const veth = (name: string) => [`p${name}`, "type", "veth", "peer", "name", "inside"];

  test("are out of the pod's reach, and follow edits", async () => {
    await withHostPod(veth, async ({ api, node, agent, call, inPod, onHost, ...pod }) => {
      api.put(policyPath("web"), allowFrom());
      const first = agent();
      await inputsKnown(node.state, 3);
      expect(await call("ADD")).toMatchObject({ status: 0 });
      // What it lists is another end than the pod's.
      expect(onHost()).toContain(`oifname "p${pod.veth}"`);
      expect(inPod("nft", "list", "ruleset")).toBe("");
      const spec = {
        ...(allowFrom()["spec"] as object),
        ingress: [{ from: [{ ipBlock: { cidr: "10.77.0.0/16" } }] }],
      };
      api.put(policyPath("web"), { spec });
      await until(() => onHost().includes("10.77.0.0/16"));
      expect((await call("CHECK")).status).toBe(0);
      await first.end("SIGKILL");
      sh("nft", "delete", "table", "inet", `genie_${pod.veth.slice(1)}`);
      const check = wireError(await call("CHECK"));
      expect(check.msg).toContain(`table inet genie_${pod.veth.slice(1)} is gone`);
      // Nor does it help to hide the interface behind another name.
      for (const change of ["down", "name hidden"]) {
        inPod("ip", "link", "set", "eth0", ...change.split(" "));
      }
      agent();
      await until(() => onHost().includes(`oifname "p${pod.veth}"`));
      expect((await call("DEL")).status).toBe(0);
      expect({ host: onHost(), rows: rulesets(node.state) }).toEqual({ host: "", rows: [] });
    });
  });

  test("let in what the node sends, whatever address of it that has; never a pod's", async () => {
    await withHostPod(veth, async ({ api, node, agent, call, inPod, onHost, ...pod }) => {
      const end = `p${pod.veth}`;
      api.put(policyPath("web"), allowFrom());
      agent();
      await inputsKnown(node.state, 3);
      // There before the ADD, so that its rules have it when it returns.
      const first = "203.0.113.9";
      const address = (verb: string, ip: string, dev = end) =>
        sh("ip", "addr", verb, `${ip}/32`, "dev", dev);
      const reaches = (from: string) =>
        Bun.spawnSync(["ping", "-c1", "-W1", "-I", from, "10.9.0.2"]).exitCode === 0;
      sh("ip", "link", "set", end, "up");
      address("add", first);
      const known = () =>
        rowsOf<{ object: string }>(
          node.state,
          "SELECT object FROM policy_inputs WHERE resource = 'node-addresses'",
        )[0]?.object ?? "";
      await until(() => known().includes(first));
      expect(await call("ADD")).toMatchObject({ status: 0 });
      expect(onHost()).toMatch(
        new RegExp(`ip saddr \\{[^}]*${first}[^}]*\\} accept comment "node"`),
      );
      sh("ip", "route", "add", "10.9.0.2/32", "dev", end);
      inPod("ip", "route", "add", "203.0.113.0/24", "dev", "eth0");
      expect(reaches(first)).toBe(true);
      // Another one that comes later; and what is the pod's own, though the node has it too.
      const later = "203.0.113.10";
      address("add", later);
      address("add", "10.9.0.2", pod.veth);
      sh("ip", "link", "set", pod.veth, "up");
      await until(() => onHost().includes(later));
      expect(onHost()).not.toContain("10.9.0.2");
      address("del", "10.9.0.2", pod.veth);
      expect(reaches(later)).toBe(true);
      // What is no address of the node any more does not count as the node.
      address("del", first);
      await until(() => !onHost().includes(first));
      expect(known()).not.toContain(first);
      expect((await call("CHECK")).status).toBe(0);
      expect((await call("DEL")).status).toBe(0);
    });
  });

  test("that a running pod has not are nothing at all in the pod, and reported", async () => {
    const macvlan = (name: string) => ["link", name, "name", "inside", "type", "macvlan"];
    await withHostPod(macvlan, async ({ api, node, agent, call, inPod, onHost }) => {
      agent();
      await inputsKnown(node.state, 3);
      expect(await call("ADD")).toMatchObject({ status: 0 });
      api.put(policyPath("web"), allowFrom("web"));
      await until(() => inPod("nft", "list", "ruleset").includes("chain egress"));
      const rules = inPod("nft", "list", "table", "inet", "genie");
      expect(rules).toContain('iifname "eth0" goto ingress_0');
      expect(rules).not.toContain('comment "default/web"');
      expect(onHost()).toBe("");
      const problems = () =>
        rowsOf<{ problem: string }>(node.state, "SELECT problem FROM policy_problems");
      await until(() => problems().length > 0);
      expect(problems()[0]?.problem).toContain("has no end on the node");
      api.remove(policyPath("web"));
      await until(() => inPod("nft", "list", "ruleset") === "");
      expect((await call("DEL")).status).toBe(0);
    });
  });
});

describe("takeFileLock()", () => {
  test("gives one thing to one at a time, other things to others", async () => {
    using dir = tempDir();
    const host = { ...makeHost(), now: Date.now };
    const file = join(dir.path, "lock");
    const take = (thing: string, waitMs: number) =>
      takeFileLock(host, file, thing, { what: thing, deadlineMs: Date.now() + waitMs });
    const [a] = [await take("a", 0), await take("b", 0)];
    expect(take("a", 10)).rejects.toThrow(`Cannot lock a: another genie holds it (${file})`);
    const later = take("a", 60_000);
    a.release();
    (await later).release();
  });

  test("says what is wrong with the file", async () => {
    const options = { what: "x", deadlineMs: 0 };
    expect(takeFileLock(makeHost(), "/proc/none/lock", "x", options)).rejects.toThrow(
      "Cannot use /proc/none/lock: ENOENT",
    );
  });
});

test("what is known is as old as the oldest part of it", () => {
  using dir = tempDir();
  const state = openState(makeHost(), dir.path);
  const needed = neededResources(false);
  expect(aliveSince(state, needed)).toBe(0);
  putAlive(state, new Map(needed.map((one, i) => [one, 100 - i])));
  expect(aliveSince(state, needed)).toBe(98);
  expect(aliveSince(state, neededResources(true))).toBe(0);
  closeState(state);
});

test("problems are new once", () => {
  using dir = tempDir();
  const state = openState(makeHost(), dir.path);
  const problem = { kind: "NetworkPolicy", namespace: "a", name: "b", path: "spec", text: "odd" };
  const other = { ...problem, text: "worse" };
  expect(putProblems(state, [problem], 1)).toEqual([problem]);
  expect(putProblems(state, [problem, other], 2)).toEqual([other]);
  expect(putProblems(state, [other], 3)).toEqual([]);
  expect(putProblems(state, [problem, other], 4)).toEqual([problem]);
  closeState(state);
});
