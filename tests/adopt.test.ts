/**
 * Pods from before genie, and after it: what `genie install` makes the default, what it adopts
 * from libcni's cache, DEL by that cache, and what `genie uninstall` gives back. Debian's bridge,
 * portmap and host-local on a node of its own: a network namespace, and a mount namespace with
 * /etc, /opt and /var/lib of its own.
 * lib/recovery/cni_cache.ts, lib/node/adopt.ts, lib/node/genie_config.ts.
 */
import { expect, test } from "bun:test";
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { type GenieRun, newNetnsName, runGenie, withNetns } from "./fakes.ts";
import { pluginDir, realNeeds } from "./fixtures/quirks/node.ts";
import { needing } from "./skip.ts";
import { compiledGenie } from "./wire.ts";

const { describe: describeReal } = needing("mounts", "the binary", ...realNeeds);

type List = { cniVersion: string; name: string; plugins: Record<string, unknown>[] };
type Run = GenieRun & { json: Record<string, unknown> };

/** A node whose runtime is this test. */
interface Node {
  /** Path of its root for us. */
  root: string;
  run: (...words: string[]) => GenieRun;
  start: (...words: string[]) => Bun.Subprocess<"ignore", "ignore", "pipe">;
  pod: (name: string) => Pod;
  put: (path: string, content: string | object) => void;
  entries: () => string[];
  /** Leases, and iptables lines of pods. */
  left: () => { leases: string[]; rules: string[] };
}

interface Pod {
  id: string;
  netns: string;
  /** As libcni: ADD through the chain, then the entry of its cache. */
  attach: (list: List) => Promise<void>;
  /** As libcni's DEL through the chain of a list, with the result that its cache has. */
  detach: (list: List) => Promise<GenieRun[]>;
  /** A call of genie by its installed config. */
  genie: (command: string, more?: object) => Promise<Run>;
  entry: (list: { name: string }) => string;
  /** Name of the bridge that its interface leads to. */
  bridge: () => string;
}

const ports = [{ hostPort: 8080, containerPort: 80, protocol: "tcp" }];
const results = "/var/lib/cni/results";

function network(name: string, octet: number): List {
  const ipam = { type: "host-local", ranges: [[{ subnet: `10.${octet}.0.0/24` }]] };
  const bridge = { type: "bridge", bridge: `${name}0`, isGateway: true, ipMasq: true, ipam };
  const portmap = { type: "portmap", capabilities: { portMappings: true } };
  return { cniVersion: "1.0.0", name, plugins: [bridge, portmap] };
}
const [blue, green] = [network("blue", 221), network("green", 222)];
// Without portmap: that of Debian fails its CHECK of healthy pods that have IPv4 alone.
const red = { ...network("red", 223), plugins: network("red", 223).plugins.slice(0, 1) };

function must(words: string[]): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(words);
  if (exitCode !== 0) throw new Error(`${words.join(" ")}: ${stdout}${stderr}`);
  return stdout.toString();
}

async function withNode(fn: (node: Node) => Promise<void>): Promise<void> {
  await withNetns(async ({ name }) => {
    // New namespaces below /run/netns must show: hence a slave.
    const hide = ["/etc", "/opt", "/var/lib"].map((path) => `mount -t tmpfs none ${path}`);
    const script = `${hide.join(" && ")} && echo ready && exec sleep 600`;
    const holder = Bun.spawn(["unshare", "-m", "--propagation", "slave", "sh", "-c", script], {
      stdout: "pipe",
    });
    const made: string[] = [];
    try {
      await holder.stdout.getReader().read();
      const enter = ["nsenter", `--mount=/proc/${holder.pid}/ns/mnt`, `--net=/run/netns/${name}`];
      must([...enter, "ip", "link", "set", "lo", "up"]);
      await fn(makeNode(`/proc/${holder.pid}/root`, enter, made));
    } finally {
      holder.kill();
      await holder.exited;
      for (const one of made) Bun.spawnSync(["ip", "netns", "del", one]);
    }
  });
}

function makeNode(root: string, enter: string[], made: string[]): Node {
  for (const dir of ["etc/cni/net.d", "opt/cni/bin", "var/lib/cni/results"]) {
    mkdirSync(join(root, dir), { recursive: true });
  }
  for (const one of readdirSync(pluginDir)) {
    symlinkSync(join(pluginDir, one), join(root, "opt/cni/bin", one));
  }
  // Debian's iptables is found by links there.
  mkdirSync(join(root, "etc/alternatives"));
  for (const one of readdirSync("/etc/alternatives").filter((name) => /^ip6?tables/.test(name))) {
    symlinkSync(readlinkSync(join("/etc/alternatives", one)), join(root, "etc/alternatives", one));
  }
  const run: Node["run"] = (...words) => {
    const env = { PATH: "/usr/sbin:/usr/bin:/sbin:/bin" };
    const { exitCode, stdout, stderr } = Bun.spawnSync([...enter, ...words], { env });
    return { status: exitCode, stdout: stdout.toString(), stderr: stderr.toString() };
  };
  const node: Node = {
    root,
    run,
    start: (...words) => {
      const env = { PATH: "/usr/sbin:/usr/bin:/sbin:/bin" };
      return Bun.spawn([...enter, ...words], { env, stdout: "ignore", stderr: "pipe" });
    },
    pod: (name) => makePod(node, enter, made, name),
    put: (path, content) => {
      const text = typeof content === "string" ? content : JSON.stringify(content);
      writeFileSync(join(root, path), text, { mode: 0o600 });
    },
    entries: () => readdirSync(join(root, results)).sort(),
    left: () => ({
      leases: ["blue", "green", "red"].flatMap((one) => {
        const dir = join(root, "var/lib/cni/networks", one);
        return existsSync(dir) ? readdirSync(dir).filter((file) => /^10\./.test(file)) : [];
      }),
      rules: run("iptables-save")
        .stdout.split("\n")
        .filter((line) => /CNI-[0-9a-f]{24}|CNI-DN-|10\.22\d\./.test(line)),
    }),
  };
  return node;
}

function makePod(node: Node, enter: string[], made: string[], name: string): Pod {
  const nsName = newNetnsName();
  must(["ip", "netns", "add", nsName]);
  made.push(nsName);
  const id = `${name}${crypto.randomUUID().replaceAll("-", "")}`;
  const netns = `/run/netns/${nsName}`;
  const args = [
    ["IgnoreUnknown", "1"],
    ["K8S_POD_NAMESPACE", "team"],
    ["K8S_POD_NAME", name],
  ];
  const env = (command: string) => ({
    PATH: "/usr/sbin:/usr/bin:/sbin:/bin",
    CNI_COMMAND: command,
    CNI_CONTAINERID: id,
    CNI_NETNS: netns,
    CNI_IFNAME: "eth0",
    CNI_PATH: "/opt/cni/bin",
    CNI_ARGS: args.map((pair) => pair.join("=")).join(";"),
  });
  const call = async (type: string, command: string, stdin: object) => {
    const words = [...enter, `/opt/cni/bin/${type}`];
    return runGenie(words[0] ?? "", env(command), stdin, words.slice(1));
  };
  const request = ({ name, cniVersion }: List, plugin: List["plugins"][number]) => ({
    ...plugin,
    name,
    cniVersion,
    ...(plugin["capabilities"] !== undefined && { runtimeConfig: { portMappings: ports } }),
  });
  const pod: Pod = {
    id,
    netns,
    entry: (list) => `${list.name}-${id}-eth0`,
    attach: async (list) => {
      let prevResult: unknown;
      for (const plugin of list.plugins) {
        const stdin = { ...request(list, plugin), ...(prevResult !== undefined && { prevResult }) };
        const { status, stdout } = await call(String(plugin["type"]), "ADD", stdin);
        if (status !== 0) throw new Error(stdout);
        prevResult = JSON.parse(stdout);
      }
      node.put(join(results, pod.entry(list)), {
        kind: "cniCacheV1",
        containerId: id,
        config: btoa(JSON.stringify(list)),
        ifName: "eth0",
        networkName: list.name,
        netns,
        cniArgs: args,
        capabilityArgs: { portMappings: ports, dns: { searches: [] } },
        result: prevResult,
      });
    },
    detach: async (list) => {
      const file = join(node.root, results, pod.entry(list));
      const { result } = JSON.parse(readFileSync(file, "utf8"));
      const runs: GenieRun[] = [];
      for (const plugin of list.plugins.toReversed()) {
        const stdin = { ...request(list, plugin), prevResult: result };
        runs.push(await call(String(plugin["type"]), "DEL", stdin));
      }
      rmSync(file);
      return runs;
    },
    genie: async (command, more = {}) => {
      const file = join(node.root, "etc/cni/net.d/00-genie.conflist");
      const { name, plugins } = JSON.parse(readFileSync(file, "utf8"));
      const annotations = { "io.kubernetes.cri.pod-annotations": {} };
      const runtimeConfig = { ...annotations, portMappings: ports };
      const stdin = { ...plugins[0], name, cniVersion: "1.1.0", runtimeConfig, ...more };
      const ended = await call("genie", command, stdin);
      return { ...ended, json: ended.stdout === "" ? {} : JSON.parse(ended.stdout) };
    },
    bridge: () => {
      const of = JSON.parse(must(["nsenter", `--net=${netns}`, "ip", "-json", "addr", "show"]));
      const [, eth0] = of as { addr_info: { family: string; local: string }[] }[];
      const address = eth0?.addr_info.find(({ family }) => family === "inet")?.local ?? "";
      return (
        [blue, green, red].find(({ plugins: [first] }) =>
          JSON.stringify(first).includes(address.replace(/\.\d+$/, ".0/24")),
        )?.name ?? address
      );
    },
  };
  return pod;
}

const genie = (node: Node, ...words: string[]) => node.run(compiledGenie(), ...words);
const nothingLeft = { leases: [], rules: [] };

function threeNetworks(node: Node): void {
  node.put("etc/cni/net.d/10-blue.conflist", blue);
  node.put("etc/cni/net.d/20-green.conflist", green);
  node.put("etc/cni/net.d/30-red.conflist", red);
}

describeReal("the default after a plain install", () => {
  test("is the network that the runtime used before", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const before = node.pod("before");
      await before.attach(blue);
      const run = genie(node, "install");
      expect([run.stderr, run.status]).toEqual(["", 0]);
      expect(run.stdout).toContain("pods that ask for nothing get blue");
      for (const name of ["a", "b", "c", "d"]) {
        const pod = node.pod(name);
        expect(await pod.genie("ADD")).toMatchObject({ status: 0 });
        expect([name, pod.bridge()]).toEqual([name, before.bridge()]);
        expect(await pod.genie("DEL")).toMatchObject({ status: 0 });
      }
      expect(genie(node, "doctor").stdout).toContain("pods that ask for nothing get blue");
    });
  });

  test("is what a table says that was there, and install says what that does", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      mkdirSync(join(node.root, "etc/cni/genie"));
      node.put("etc/cni/genie/plugins.toml", "log_level = 'warn'\n");
      const run = genie(node, "install");
      expect(run.stdout).toContain("get one of blue, green, red, chosen by KPI");
      expect(run.stdout).toContain('default.networks = ["blue"]');
      const table = readFileSync(join(node.root, "etc/cni/genie/plugins.toml"), "utf8");
      expect(table).toBe("log_level = 'warn'\n");
    });
  });
});

describeReal("pods that were attached before genie", () => {
  test("are adopted once, and CHECK, DEL, GC and report know them", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [one, two, whole] = [node.pod("one"), node.pod("two"), node.pod("whole")];
      const dead = node.pod("dead");
      await one.attach(blue);
      await two.attach(green);
      await dead.attach(red);
      await dead.detach(red);
      await whole.attach(red);
      // libcni before 1.3, as in containerd 1.6, notes no namespace.
      const older = join(results, whole.entry(red));
      const { netns: _, ...rest } = JSON.parse(readFileSync(join(node.root, older), "utf8"));
      node.put(older, rest);
      node.put(join(results, dead.entry(red)), "{");
      // The loopback interface is the runtime's own affair.
      const lo = { cniVersion: "1.0.0", name: "lo", plugins: [{ type: "loopback" }] };
      const loFile = `lo-${one.id}-lo`;
      node.put(join(results, loFile), {
        kind: "cniCacheV1",
        containerId: one.id,
        config: btoa(JSON.stringify(lo)),
        ifName: "lo",
        networkName: "lo",
        netns: one.netns,
      });
      const run = genie(node, "install");
      expect([run.stderr, run.status]).toEqual(["", 0]);
      expect(run.stdout).toContain(
        "genie knows 3 attachments of running pods: blue 1, green 1, red 1",
      );
      expect(run.stdout).toContain(`not adopted: Cannot decode libcni's ${dead.entry(red)}`);
      rmSync(join(node.root, results, dead.entry(red)));
      const again = genie(node, "install");
      expect(again.stdout).toContain("nothing has changed");
      expect(again.stdout).not.toContain("adopted");

      const report = genie(node, "report", "pod", "team/one");
      expect([report.status, report.stdout]).toEqual([0, expect.stringContaining("blue")]);
      expect(await whole.genie("CHECK")).toMatchObject({ status: 0, stdout: "" });
      expect(await whole.genie("DEL")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      const valid = [one, two].map(({ id }) => ({ containerID: id, ifname: "eth0" }));
      const kept = await one.genie("GC", { "cni.dev/valid-attachments": valid });
      expect([kept.status, kept.stderr]).toEqual([0, ""]);
      expect(node.left().leases).toHaveLength(2);

      expect(await one.genie("DEL")).toMatchObject({ status: 0, stdout: "", stderr: "" });
      expect(node.left().leases).toEqual(["10.222.0.2"]);
      expect(node.left().rules.join("\n")).not.toContain("10.221.");
      expect(node.entries()).toEqual([two.entry(green), loFile].sort());
      const gc = await one.genie("GC", { "cni.dev/valid-attachments": [] });
      expect([gc.status, gc.stderr]).toEqual([0, ""]);
      expect(node.left()).toEqual(nothingLeft);
      expect(node.entries()).toEqual([loFile]);
    });
  });

  test("of which the record knows nothing: DEL goes by the cache, and is retried", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      genie(node, "install");
      const pod = node.pod("late");
      await pod.attach(green);
      // What the list says today is not what was attached.
      node.put("etc/cni/net.d/20-green.conflist", { ...green, plugins: [{ type: "ptp" }] });
      expect(await pod.genie("DEL")).toMatchObject({ status: 0, stdout: "" });
      expect([node.left(), node.entries()]).toEqual([nothingLeft, []]);

      const stuck = node.pod("stuck");
      await stuck.attach(blue);
      const portmap = join(node.root, "opt/cni/bin/portmap");
      rmSync(portmap);
      writeFileSync(portmap, '#!/bin/sh\necho \'{"code":99,"msg":"no"}\'; exit 1\n', {
        mode: 0o755,
      });
      expect(await stuck.genie("DEL")).toMatchObject({ status: 1, json: { code: 99 } });
      expect(node.entries()).toEqual([stuck.entry(blue)]);
      rmSync(portmap);
      symlinkSync(join(pluginDir, "portmap"), portmap);
      expect(await stuck.genie("DEL")).toMatchObject({ status: 0 });
      expect([node.left(), node.entries()]).toEqual([nothingLeft, []]);
    });
  });

  test("whose namespace is gone: leases, host ports and the entry go", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const pod = node.pod("dead");
      await pod.attach(blue);
      must(["ip", "netns", "del", pod.netns.replace("/run/netns/", "")]);
      expect(genie(node, "install").stdout).not.toContain("adopted");
      expect(await pod.genie("DEL")).toMatchObject({ status: 0, stdout: "" });
      expect([node.left().leases, node.entries()]).toEqual([[], []]);
      expect(node.left().rules.filter((line) => line.includes("CNI-DN-"))).toEqual([]);
    });
  });

  test.each<[string, [string, string][], string]>([
    ["podman", [["K8S_POD_NAME", "podman"]], "eth0"],
    ["nerdctl", [["NERDCTL_CNI_DHCP_HOSTNAME", "host"]], "eth0"],
    ["a second list of the runtime", [["K8S_POD_NAMESPACE", "team"]], "eth1"],
  ])("of %s are left to it, and no GC takes them", async (_, cniArgs, ifName) => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [pod, other] = [node.pod("pod"), node.pod("other")];
      await pod.attach(blue);
      await other.attach(green);
      const file = join(results, other.entry(green));
      const text = readFileSync(join(node.root, file), "utf8").replaceAll("eth0", ifName);
      rmSync(join(node.root, file));
      node.put(file.replace("eth0", ifName), { ...JSON.parse(text), cniArgs });
      if (ifName !== "eth0") {
        const ip = ["nsenter", `--net=${other.netns}`, "ip", "link", "set"];
        for (const words of ["eth0 down", `eth0 name ${ifName}`, `${ifName} up`]) {
          must([...ip, ...words.split(" ")]);
        }
      }
      const { stdout } = genie(node, "install");
      expect(stdout).toContain("genie knows 1 attachments of running pods: blue 1");
      expect(stdout).toContain("it is not eth0 of a pod");
      const valid = [{ containerID: pod.id, ifname: "eth0" }];
      const gc = await pod.genie("GC", { "cni.dev/valid-attachments": valid });
      expect([gc.status, gc.stderr]).toEqual([0, ""]);
      must(["nsenter", `--net=${other.netns}`, "ip", "link", "show", ifName]);
      expect(node.left().leases.sort()).toEqual(["10.221.0.2", "10.222.0.2"]);
    });
  });

  test("the agent adopts them as well, where install could not see them", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      genie(node, "install");
      const pod = node.pod("late");
      await pod.attach(blue);
      const agent = node.start(compiledGenie(), "agent");
      try {
        const reader = agent.stderr.getReader();
        let said = "";
        while (!said.includes("genie knows 1 attachments of running pods: blue 1")) {
          const { done, value } = await reader.read();
          if (done) throw new Error(said);
          said += new TextDecoder().decode(value);
        }
      } finally {
        agent.kill();
        await agent.exited;
      }
      expect(genie(node, "report", "pod", "team/late").stdout).toContain("blue");
      expect(await pod.genie("DEL")).toMatchObject({ status: 0 });
      expect([node.left(), node.entries()]).toEqual([nothingLeft, []]);
    });
  });

  test("by an entry of old libcni, the bare result", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      genie(node, "install");
      const pod = node.pod("old");
      await pod.attach(green);
      const file = join(results, pod.entry(green));
      node.put(file, JSON.parse(readFileSync(join(node.root, file), "utf8")).result);
      expect(await pod.genie("DEL")).toMatchObject({ status: 0, stdout: "" });
      expect([node.left(), node.entries()]).toEqual([nothingLeft, []]);
    });
  });

  const other = "f".repeat(32);
  test.each<[string, (entry: Record<string, unknown>, pod: Pod) => object | string, string]>([
    ["no JSON", () => "{", "is not valid JSON"],
    ["too large", () => " ".repeat(4 * 1024 * 1024 + 1), "no regular file of at most"],
    ["another kind", (entry) => ({ ...entry, kind: "x" }), "is not of kind"],
    ["another container", (entry) => ({ ...entry, containerId: other }), "not those of its name"],
    [
      "a path for a network",
      (entry) => ({ ...entry, networkName: "../x" }),
      "not those of its name",
    ],
    ["a path for an interface", (entry) => ({ ...entry, ifName: "../x" }), "not those of its name"],
    ["no config", (entry) => ({ ...entry, config: undefined }), "has no config"],
    [
      "a plugin that is a path",
      (entry) => ({ ...entry, config: btoa('{"name":"blue","plugins":[{"type":"../x"}]}') }),
      "plugin type",
    ],
    [
      "the config of another network",
      (entry) => ({ ...entry, config: btoa(JSON.stringify(green)) }),
      "of another network",
    ],
    ["arguments that are two", (entry) => ({ ...entry, cniArgs: [["a", "b;c=d"]] }), '"cniArgs"'],
    ["a relative namespace", (entry) => ({ ...entry, netns: "x" }), '"netns" is not a path'],
    [
      "the namespace of somebody else",
      (entry, pod) => ({ ...entry, netns: pod.netns }),
      'does not have interface "eth0"',
    ],
  ])("an entry with %s is refused, without harm", async (_what, change, why) => {
    await withNode(async (node) => {
      node.put("etc/cni/net.d/10-blue.conflist", blue);
      const [pod, bystander] = [node.pod("pod"), node.pod("other")];
      await pod.attach(blue);
      const file = join(results, pod.entry(blue));
      const entry = JSON.parse(readFileSync(join(node.root, file), "utf8"));
      node.put(file, change(entry, bystander));
      const run = genie(node, "install");
      expect([run.stderr, run.status]).toEqual(["", 0]);
      expect(run.stdout).toContain("not adopted: ");
      expect(run.stdout).toContain(why);
      expect(run.stdout).not.toContain("genie knows");
      // DEL guesses then, as it does without a cache.
      const ended = await pod.genie("DEL");
      expect(ended.status).toBe(0);
      expect(node.left().leases).toEqual([]);
    });
  });

  test("an entry that others may write is refused", async () => {
    await withNode(async (node) => {
      node.put("etc/cni/net.d/10-blue.conflist", blue);
      const [open, foreign] = [node.pod("open"), node.pod("foreign")];
      for (const pod of [open, foreign]) await pod.attach(blue);
      chmodSync(join(node.root, results, open.entry(blue)), 0o666);
      chownSync(join(node.root, results, foreign.entry(blue)), 65534, 65534);
      const { stdout } = genie(node, "install");
      expect(stdout.match(/others may write it/g)).toHaveLength(2);
      expect(stdout).not.toContain("genie knows");
    });
  });

  test("a symbolic link is not followed", async () => {
    await withNode(async (node) => {
      node.put("etc/cni/net.d/10-blue.conflist", blue);
      const pod = node.pod("pod");
      await pod.attach(blue);
      const file = join(results, pod.entry(blue));
      const entry = readFileSync(join(node.root, file), "utf8");
      node.put("etc/entry", entry);
      rmSync(join(node.root, file));
      symlinkSync("/etc/entry", join(node.root, file));
      expect(genie(node, "install").stdout).toContain("it is a symbolic link");
      const ended = await pod.genie("DEL");
      expect([ended.status, ended.stderr]).toEqual([0, expect.stringContaining("symbolic link")]);
      expect(existsSync(join(node.root, "etc/entry"))).toBe(true);
    });
  });
});

describeReal("genie uninstall", () => {
  test("gives pods of the runtime's own network back to libcni's cache", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      const [old, fresh] = [node.pod("old"), node.pod("fresh")];
      await old.attach(blue);
      genie(node, "install");
      expect(await fresh.genie("ADD")).toMatchObject({ status: 0 });
      const run = genie(node, "uninstall");
      expect([run.stderr, run.status]).toEqual(["", 0]);
      expect(run.stdout).toContain("the runtime knows 2 attachments of running pods: blue 2");
      expect(node.entries()).toEqual([old.entry(blue), fresh.entry(blue)].sort());
      for (const pod of [old, fresh]) {
        const ended = await pod.detach(blue);
        expect(ended.map(({ status }) => status)).toEqual([0, 0]);
      }
      expect(node.left()).toEqual(nothingLeft);
    });
  });

  test("with --force: what is given back and what stays both end with their DEL", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      genie(node, "install");
      const [plain, other] = [node.pod("plain"), node.pod("other")];
      await plain.genie("ADD");
      const annotations = { "io.kubernetes.cri.pod-annotations": { cni: "red" } };
      await other.genie("ADD", { runtimeConfig: annotations });
      const run = genie(node, "uninstall", "--force");
      expect([run.status, run.stdout]).toEqual([1, expect.stringContaining("blue 1")]);
      expect(node.entries()).toEqual([plain.entry(blue)]);
      await plain.detach(blue);
      // The list that stays: genie behind the network that follows.
      expect(await other.genie("DEL", { type: "genie", delOnly: true })).toMatchObject({
        status: 0,
      });
      expect(node.left()).toEqual(nothingLeft);
      expect(genie(node, "uninstall")).toMatchObject({ status: 0, stderr: "" });
    });
  });

  test("refuses while a pod has another network, and changes nothing", async () => {
    await withNode(async (node) => {
      threeNetworks(node);
      genie(node, "install");
      const [plain, other] = [node.pod("plain"), node.pod("other")];
      await plain.genie("ADD");
      const annotations = { "io.kubernetes.cri.pod-annotations": { cni: "green" } };
      expect(await other.genie("ADD", { runtimeConfig: annotations })).toMatchObject({ status: 0 });
      const run = genie(node, "uninstall");
      expect([run.status, run.stderr]).toEqual([1, expect.stringContaining("team/other")]);
      expect(run.stderr).not.toContain("team/plain");
      expect(node.entries()).toEqual([]);
      for (const pod of [plain, other]) expect(await pod.genie("DEL")).toMatchObject({ status: 0 });
      expect(node.left()).toEqual(nothingLeft);
    });
  });
});
