/**
 * `genie install` and `genie uninstall`, by the compiled program in throw-away roots of a node:
 * lib/node/install.ts, lib/node/installation.ts, lib/node/files.ts,
 * lib/node/genie_config.ts, lib/node/service.ts, lib/agent/installed_files.ts.
 */
import { describe, expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { keepsToken, runToken } from "../lib/agent/installed_files.ts";
import { openHealth } from "../lib/agent/task.ts";
import { parseConfig } from "../lib/config/parse.ts";
import { connect } from "../lib/kubernetes/client.ts";
import { parseConfigList } from "../lib/networks.ts";
import { digestOf, hostFile, hostPath, keepAs, placeFile } from "../lib/node/files.ts";
import { confsBefore, lastList, ownList } from "../lib/node/genie_config.ts";
import { kubeAccess } from "../lib/node/install.ts";
import { copyToken, openSite } from "../lib/node/installation.ts";
import { unitText } from "../lib/node/service.ts";
import manifest from "../package.json";
import { accountToken, startApiServer } from "./apiserver.ts";
import { calls, fakePlugin, makeHost, tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { annotated, compiledGenie, left, makeNode, nothing, spawnGenie, wire } from "./wire.ts";

const conflist = "etc/cni/net.d/00-genie.conflist";
const binary = "opt/cni/bin/genie";
const table = "etc/cni/genie/plugins.toml";
const kubeconfig = "etc/cni/genie/kubeconfig";

/** The root of a node that goes away with its scope. */
interface Root extends Disposable {
  path: string;
  write: (name: string, content: string | object) => void;
  read: (name: string) => string;
  has: (name: string) => boolean;
  /** Every file and link, with what it holds but for the binary's bytes. */
  files: () => Record<string, string>;
  genie: (...args: string[]) => Promise<{ status: number; stdout: string; stderr: string }>;
}

/** A node with one network, blue, whose plugin is there. */
function makeRoot({ network = true } = {}): Root {
  const dir = tempDir();
  const at = (name: string) => join(dir.path, name);
  const write: Root["write"] = (name, content) => {
    mkdirSync(dirname(at(name)), { recursive: true });
    writeFileSync(at(name), typeof content === "string" ? content : JSON.stringify(content));
  };
  const root: Root = {
    path: dir.path,
    write,
    read: (name) => readFileSync(at(name), "utf8"),
    has: (name) => existsSync(at(name)),
    files: () =>
      Object.fromEntries(
        readdirSync(dir.path, { recursive: true, encoding: "utf8" })
          .filter((name) => statSync(at(name)).isFile())
          .map((name) => [name, digestOf(at(name)) ?? ""]),
      ),
    genie: (...args) => spawnGenie([compiledGenie(), ...args, "--host-root", dir.path], {}),
    [Symbol.dispose]: () => dir[Symbol.dispose](),
  };
  for (const folder of ["etc/cni/net.d", "opt/cni/bin"]) mkdirSync(at(folder), { recursive: true });
  if (network) {
    write("etc/cni/net.d/10-blue.conflist", list("blue"));
    fakePlugin(at("opt/cni/bin"), "bridge");
  }
  return root;
}

const list = (name: string, type = "bridge") => ({
  cniVersion: "1.0.0",
  name,
  plugins: [{ type }],
});

/** What a run did, by file name. */
function did(stdout: string): Record<string, string> {
  const { steps } = JSON.parse(stdout) as { steps: { did: string; path: string }[] };
  return Object.fromEntries(steps.map(({ did, path }) => [path.split("/").at(-1), did]));
}

describe("genie install", () => {
  test("puts everything in place, once, and uninstall leaves the node as it was", async () => {
    using root = makeRoot();
    const untouched = root.files();
    const first = await root.genie("install", "--json");
    expect([first.stderr, first.status]).toEqual(["", 0]);
    expect(did(first.stdout)).toEqual({
      genie: "wrote",
      "plugins.toml": "wrote",
      kubeconfig: "skipped",
      "00-genie.conflist": "wrote",
    });
    const shipped = readFileSync(join(import.meta.dir, "../plugins.toml"), "utf8");
    // Pods that ask for nothing keep what they had.
    const [none, blue] = ["networks = []      ", 'networks = ["blue"]'];
    expect(root.read(table)).toBe(shipped.replace(none, blue));
    expect(JSON.parse(root.read(conflist))).toEqual(ownList());
    const mode = (name: string) => (statSync(join(root.path, name)).mode & 0o777).toString(8);
    expect([binary, conflist, table].map(mode)).toEqual(["755", "644", "644"]);
    expect([dirname(table), "etc/cni/genie/install.json"].map(mode)).toEqual(["700", "600"]);
    const version = await spawnGenie([join(root.path, binary), "version", "--json"], {});
    expect(JSON.parse(version.stdout).version).toBe(manifest.version);

    const installed = root.files();
    const second = await root.genie("install", "--json");
    expect(JSON.parse(second.stdout)).toMatchObject({ changed: false });
    expect(root.files()).toEqual(installed);
    expect((await root.genie("install")).stdout).toContain("nothing has changed");

    const gone = await root.genie("uninstall");
    expect([gone.stderr, gone.status]).toEqual(["", 0]);
    expect(root.files()).toEqual(untouched);
    expect(root.has("etc/cni/genie")).toBe(false);
    expect((await root.genie("uninstall")).status).toBe(0);
  });

  const multus = (keys: object) => ({ cniVersion: "1.0.0", name: "m", type: "multus", ...keys });
  const lists = { "20-red.conflist": list("red"), "05-green.conf": { ...list("green") } };
  test.each<[string, Record<string, object | string>, string[]]>([
    ["the first by file name", lists, ["green"]],
    ["not one that is no JSON", { "01-a.conf": "{", "02-b.conflist": { name: "b" } }, ["blue"]],
    ["not one that calls genie", { "05-x.conf": { ...list("x", "genie"), name: "x" } }, ["blue"]],
    [
      "Multus' clusterNetwork",
      { ...lists, "01-m.conf": multus({ clusterNetwork: "red" }) },
      ["red"],
    ],
    [
      "Multus' delegate",
      { ...lists, "01-m.conf": multus({ delegates: [{ name: "red" }] }) },
      ["red"],
    ],
    ["Multus with an object", { "01-m.conf": multus({ clusterNetwork: "ns/x" }) }, ["blue"]],
    [
      "genie in Multus' place",
      { "00-multus.conf": { ...multus({ clusterNetwork: "blue" }), type: "genie" } },
      [],
    ],
    [
      "CNI-Genie's default_plugin",
      { "00-genie.conf": { name: "x", type: "genie", hostname: "h", default_plugin: "blue" } },
      [],
    ],
  ])("the default of a fresh table is %s", async (_what, files, expected) => {
    using root = makeRoot();
    for (const [name, content] of Object.entries(files)) {
      root.write(`etc/cni/net.d/${name}`, content);
    }
    const run = await root.genie("install", "--no-wait", "--json");
    expect([run.stderr, run.status]).toEqual(["", 0]);
    expect(parseConfig(root.read(table), table).default.networks).toEqual(expected);
    if (expected.length === 0) return;
    expect(JSON.parse(run.stdout).default).toBe(`pods that ask for nothing get ${expected}`);
  });

  test("the CNI config is one that containerd 1.7 and 2.x load", () => {
    const own = ownList() as { cniVersion: string; cniVersions: string[] };
    expect(own.cniVersion).toBe("1.0.0");
    expect(own.cniVersions).toEqual(["0.4.0", "1.0.0", "1.1.0"]);
    const { plugins } = parseConfigList(own, "our own");
    expect(plugins.map(({ type }) => type)).toEqual(["genie"]);
    expect(plugins[0]?.capabilities).toMatchObject({
      "io.kubernetes.cri.pod-annotations": true,
      portMappings: true,
      bandwidth: true,
    });
  });

  test("other folders stand in the table it writes", async () => {
    using root = makeRoot();
    root.write("etc/net/10-blue.conflist", list("blue"));
    fakePlugin(join(root.path, "opt/cni/bin"), "bridge");
    mkdirSync(join(root.path, "usr/lib"), { recursive: true });
    symlinkSync("/opt/cni/bin", join(root.path, "usr/lib/cni"));
    const run = await root.genie("install", "--conf-dir=/etc/net", "--bin-dir=/usr/lib/cni");
    expect([run.stderr, run.status]).toEqual(["", 0]);
    expect(root.read(table)).toMatch(/^conf_dir +\S* *= "\/etc\/net"/m);
    expect(root.read(table)).toMatch(/^bin_dirs +\S* *= \["\/usr\/lib\/cni"\]/m);
    expect(root.has("etc/net/00-genie.conflist")).toBe(true);
    expect(root.has(binary)).toBe(true);
  });

  const cri = (lines: string) => `[plugins."io.containerd.grpc.v1.cri".cni]\n${lines}\n`;
  const cri2 = (lines: string) => `[plugins."io.containerd.cri.v1.runtime".cni]\n${lines}\n`;
  const containerd = "etc/containerd/config.toml";
  test.each([
    ["Debian's containerd", containerd, cri('bin_dir = "/b"\nconf_dir = "/c"'), [], "/c", ["/b"]],
    ["a conf dir alone", containerd, cri('conf_dir = "/c/"'), [], "/c", ["/opt/cni/bin"]],
    ["containerd 2", containerd, cri2('bin_dirs = ["/b", "/x"]'), [], "", ["/b", "/x"]],
    ["an empty name", containerd, cri('bin_dir = ""\nconf_dir = ""'), [], "", ["/opt/cni/bin"]],
    ["CRI-O", "etc/crio/crio.conf", '[crio.network]\nplugin_dirs = ["/b/"]', [], "", ["/b"]],
    ["what we are told", containerd, cri('bin_dir = "/b"'), ["--bin-dir=/x"], "", ["/x"]],
    [
      "no CRI",
      containerd,
      `disabled_plugins = ["cri"]\n${cri('bin_dir = "/b"')}`,
      [],
      "",
      ["/opt/cni/bin"],
    ],
    [
      "podman with CNI",
      "etc/containers/containers.conf",
      '[network]\nnetwork_backend = "cni"\n',
      [],
      "",
      ["/usr/lib/cni", "/opt/cni/bin"],
    ],
    [
      "podman with folders of its own",
      "etc/containers/containers.conf",
      '[network]\nnetwork_backend = "cni"\ncni_plugin_dirs = ["/none", "/b"]\n',
      [],
      "",
      ["/b"],
    ],
    [
      "podman with netavark",
      "etc/containers/containers.conf",
      '[network]\nnetwork_backend = "netavark"\ncni_plugin_dirs = ["/b"]\n',
      [],
      "",
      ["/opt/cni/bin"],
    ],
    ["no TOML", containerd, "bin_dir =", [], "", ["/opt/cni/bin"]],
  ])("goes where the runtime looks: %s", async (_, file, text, args, confDir, binDirs) => {
    using root = makeRoot();
    const conf = confDir || "/etc/cni/net.d";
    root.write(file, text);
    root.write(`${conf}/10-blue.conflist`, list("blue"));
    for (const dir of binDirs) {
      mkdirSync(join(root.path, dir), { recursive: true });
      // The last one has the plugin.
      if (dir === binDirs.at(-1)) fakePlugin(join(root.path, dir), "bridge");
    }
    if (!binDirs.includes("/opt/cni/bin")) rmSync(join(root.path, "opt/cni/bin/bridge"));
    const run = await root.genie("install", ...args);
    expect([run.stderr, run.status]).toEqual(["", 0]);
    expect(root.has(join(binDirs[0] ?? "", "genie"))).toBe(true);
    expect(root.has(join(conf, "00-genie.conflist"))).toBe(true);
    const { confDir: there, binDirs: dirs } = parseConfig(root.read(table), table);
    expect([there, dirs]).toEqual([conf, binDirs]);
    await root.genie("uninstall", "--purge");
    expect(Object.keys(root.files()).filter((name) => name.includes("genie"))).toEqual([]);
  });

  test("plugins beside genie are found whatever the table says", async () => {
    using root = makeRoot();
    root.write(containerd, cri('bin_dir = "/b"'));
    mkdirSync(join(root.path, "b"));
    fakePlugin(join(root.path, "b"), "bridge");
    rmSync(join(root.path, "opt/cni/bin/bridge"));
    root.write("table.toml", '[default]\nnetworks = ["blue"]\n');
    const run = await root.genie("install", `--table=${join(root.path, "table.toml")}`);
    expect([run.stderr, run.status]).toEqual(["", 0]);
    const doctor = await root.genie("doctor");
    expect(doctor.stdout).not.toContain("is in none of");
  });

  test("an upgrade goes where the version before was put", async () => {
    using root = makeRoot();
    root.write("c/10-blue.conflist", list("blue"));
    fakePlugin(join(root.path, "opt/cni/bin"), "bridge");
    mkdirSync(join(root.path, "b"));
    fakePlugin(join(root.path, "b"), "bridge");
    await root.genie("install", "--conf-dir=/c", "--bin-dir=/b");
    const again = await root.genie("install", "--json");
    expect(JSON.parse(again.stdout)).toMatchObject({ changed: false });
    expect([root.has(binary), root.has(conflist)]).toEqual([false, false]);
  });

  const other = list("other");
  test.each([
    ["00-aaa.conflist", other, "stands before 00-genie.conflist"],
    [
      "00-bridge.conf",
      { cniVersion: "1.0.0", name: "x", type: "bridge" },
      "rename it to 10-bridge",
    ],
    ["00-multus.conf", { cniVersion: "1.0.0", name: "x", type: "multus" }, ""],
    ["00-aaa.conflist.bak", other, ""],
    ["00-aaa.conf", "{ broken", ""],
    ["01-other.conflist", other, ""],
  ])("beside %s: %o %s", async (name, content, refused) => {
    using root = makeRoot();
    root.write(`etc/cni/net.d/${name}`, content);
    const run = await root.genie("install");
    expect(run.status).toBe(refused === "" ? 0 : 1);
    expect(run.stderr).toContain(refused);
    expect([root.has(conflist), root.has(binary)]).toEqual([refused === "", refused === ""]);
  });

  test("uninstall takes along what libcni keeps under its name, and nothing else", async () => {
    using root = makeRoot();
    const dir = "var/lib/cni/results";
    const kept = (networkName: string) => ({ kind: "cniCacheV1", networkName });
    root.write(`${dir}/genie-c1-eth0`, kept("genie"));
    root.write(`${dir}/genie-blue-c1-eth0`, kept("genie-blue"));
    root.write(`${dir}/blue-c1-eth0`, kept("blue"));
    await root.genie("install");
    const { stdout } = await root.genie("uninstall");
    expect(stdout).toContain("removed    /var/lib/cni/results: 1 that runtimes kept");
    expect(readdirSync(join(root.path, dir)).sort()).toEqual([
      "blue-c1-eth0",
      "genie-blue-c1-eth0",
    ]);
  });

  test("a CNI-Genie config goes on to call genie, and its binary comes back", async () => {
    using root = makeRoot();
    root.write("etc/cni/net.d/00-genie.conf", {
      cniVersion: "0.3.1",
      name: "k8s-pod-network",
      type: "genie",
    });
    root.write(binary, "#!/bin/sh\nexit 1\n");
    const untouched = root.files();
    const run = await root.genie("install", "--json");
    expect(did(run.stdout)).toMatchObject({ genie: "replaced", "00-genie.conflist": "skipped" });
    expect(root.has(conflist)).toBe(false);
    expect(root.read(`${binary}.replaced`)).toBe("#!/bin/sh\nexit 1\n");
    expect((await root.genie("uninstall")).status).toBe(0);
    expect(root.files()).toEqual(untouched);
  });

  test("takes over what CNI-Genie's installer left, from start to end", async () => {
    using root = makeRoot();
    const api = await startApiServer(join(root.path, "api"), { keepAlive: false });
    await using _ = { [Symbol.asyncDispose]: () => api.stop() };
    root.write("etc/cni/net.d/20-green.conflist", list("green"));
    // As launch.sh of its releases writes them: a token, and neither server, user nor CA.
    const own = "etc/cni/net.d/00-genie.conf";
    const credentials = "etc/cni/net.d/genie-kubeconfig";
    const cluster = (key: string) => `apiVersion: v1
kind: Config
clusters:
- name: local
  cluster:
    ${key}
users:
- name: genie
contexts:
- name: genie-context
  context:
    cluster: local
    user: genie
current-context: genie-context
`;
    root.write(credentials, cluster("insecure-skip-tls-verify: true"));
    root.write(own, {
      name: "k8s-pod-network",
      type: "genie",
      cniVersion: "0.2.0",
      log_level: "info",
      datastore_type: "kubernetes",
      hostname: "node-1",
      policy: { type: "k8s", k8s_auth_token: api.token },
      kubernetes: { k8s_api_root: api.url, kubeconfig: join(root.path, credentials) },
      romana_root: "http://:",
      segment_label_name: "romanaSegment",
    });
    root.write(binary, "#!/bin/sh\nexit 1\n");
    const nodeFiles = () =>
      Object.entries(root.files()).filter(
        ([name]) => /^(etc|opt)/.test(name) && !/calls/.test(name),
      );
    const untouched = nodeFiles();

    const run = await root.genie("install");
    expect([run.status, run.stderr]).toEqual([0, ""]);
    expect(run.stdout).toContain(`${own}: CNI-Genie's config is kept as /etc/cni/genie/replaced/`);
    expect(run.stdout).toContain("Delete CNI-Genie's DaemonSet");
    expect(run.stdout).not.toContain(api.token);
    expect([root.has(own), root.has(conflist)]).toEqual([false, true]);
    expect(statSync(join(root.path, conflist)).mode & 0o777).toBe(0o600);
    const [entry] = JSON.parse(root.read(conflist)).plugins;
    expect(entry).toMatchObject({
      datastore_type: "kubernetes",
      kubernetes: { k8s_api_root: api.url },
    });
    expect(did((await root.genie("install", "--json")).stdout)).toMatchObject({
      "00-genie.conflist": "unchanged",
      "plugins.toml": "unchanged",
    });

    // The runtime's calls by the new config; what a node has in /etc is in the folder here.
    root.write("netns", "");
    const at = (name: string) => join(root.path, name);
    const folders = `conf_dir = "${at("etc/cni/net.d")}"\nbin_dirs = ["${at("opt/cni/bin")}"]\n`;
    root.write("plugins.toml", `${folders}state_dir = "${at("state")}"\n`);
    const call = async (command: string, pod: string) => {
      const stdin = {
        ...entry,
        name: "genie",
        cniVersion: "1.0.0",
        plugins_file: at("plugins.toml"),
      };
      const env = {
        CNI_COMMAND: command,
        CNI_CONTAINERID: pod,
        CNI_IFNAME: "eth0",
        CNI_NETNS: at("netns"),
        CNI_PATH: at("opt/cni/bin"),
        CNI_ARGS: `IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=${pod}`,
      };
      return spawnGenie([at(binary)], env, Buffer.from(JSON.stringify(stdin)));
    };
    const alpha = "/apis/alpha.network.k8s.io/v1/namespaces/team/logicalnetworks";
    for (const [name, plugin] of Object.entries({ net1: "green", net2: "blue" })) {
      api.put(`${alpha}/${name}`, { metadata: { name, namespace: "team" }, spec: { plugin } });
    }
    const put = (name: string, annotations: object) =>
      api.put(`/api/v1/namespaces/team/pods/${name}`, { metadata: { uid: name, annotations } });
    put("plain", {});
    put("multi", { cni: "", networks: "net1:eth0,net2:eth4" });
    // Without verification nothing is sent; with the CA that the message asks for all works.
    const before = await call("ADD", "plain");
    expect(before.stdout + before.stderr).toContain("certificate-authority");
    if (before.status !== 0) expect(api.requests).toEqual([]);
    root.write(credentials, cluster(`certificate-authority: ${join(api.dir, "ca.crt")}`));
    await call("DEL", "plain");
    const made = () =>
      calls(at("opt/cni/bin"))
        .filter(({ command }) => command === "ADD")
        .map(({ stdin, env }) => `${JSON.parse(stdin).name} ${env["CNI_IFNAME"]}`);
    for (const pod of ["plain", "multi"]) expect((await call("ADD", pod)).status).toBe(0);
    // A pod that asks for nothing gets the first list, as from CNI-Genie and the kubelet.
    expect(made().slice(-3)).toEqual(["blue eth0", "green eth0", "blue eth4"]);
    for (const pod of ["plain", "multi"]) expect((await call("DEL", pod)).status).toBe(0);

    root.write(credentials, cluster("insecure-skip-tls-verify: true"));
    const end = await root.genie("uninstall");
    expect([end.status, end.stderr]).toEqual([0, ""]);
    expect(nodeFiles()).toEqual(untouched);
  });

  test("waits for the default network, and says for what", async () => {
    using root = makeRoot({ network: false });
    const late = await root.genie("install", "--wait=1ms");
    expect(late.status).toBe(1);
    expect(late.stderr).toContain("No network is configured");
    expect([root.has(binary), root.has(conflist)]).toEqual([true, false]);

    const child = Bun.spawn([compiledGenie(), "install", "--wait=1m", "--host-root", root.path], {
      env: {},
      stdout: "pipe",
      stderr: "pipe",
    });
    const reader = child.stderr.getReader();
    expect(new TextDecoder().decode((await reader.read()).value)).toContain("waiting for");
    root.write("etc/cni/net.d/10-blue.conflist", list("blue"));
    expect(new TextDecoder().decode((await reader.read()).value)).toContain('plugin "bridge"');
    fakePlugin(join(root.path, "opt/cni/bin"), "bridge");
    expect(await child.exited).toBe(0);
    expect(root.has(conflist)).toBe(true);
    expect(parseConfig(root.read(table), table).default.networks).toEqual(["blue"]);
  });

  test("writes the CNI config of a node that is not ready only when told to", async () => {
    using root = makeRoot({ network: false });
    expect((await root.genie("install", "--no-wait")).status).toBe(0);
    expect(root.has(conflist)).toBe(true);
  });

  test("keeps the version before, and takes no step back unless told to", async () => {
    using root = makeRoot();
    await root.genie("install");
    const make = (version: string) => {
      rmSync(join(root.path, binary));
      root.write(binary, `another ${version}`);
      const note = JSON.parse(root.read("etc/cni/genie/install.json"));
      note.genie = version;
      note.files[0].written = [digestOf(join(root.path, binary))];
      root.write("etc/cni/genie/install.json", note);
    };
    make("0.0.9");
    const up = await root.genie("install");
    expect([up.status, up.stdout]).toEqual([0, expect.stringContaining("genie.previous")]);
    expect(root.read(`${binary}.previous`)).toBe("another 0.0.9");

    make("99.0.0");
    const down = await root.genie("install");
    expect([down.status, down.stderr]).toEqual([1, expect.stringContaining("--downgrade")]);
    expect(root.read(binary)).toBe("another 99.0.0");
    expect((await root.genie("install", "--downgrade")).status).toBe(0);
    expect((await root.genie("uninstall")).status).toBe(0);
    expect(readdirSync(join(root.path, "opt/cni/bin"))).toEqual(["bridge"]);
  });

  test("asks a binary that somebody else put there for its version", async () => {
    using root = makeRoot();
    fakePlugin(
      join(root.path, "opt/cni/bin"),
      "genie",
      '#!/bin/sh\necho \'{"version":"9.9.9"}\'\n',
    );
    const run = await root.genie("install");
    expect([run.status, run.stderr]).toEqual([1, expect.stringContaining("genie 9.9.9")]);
  });

  test("pods start while the binary is replaced", async () => {
    using root = makeRoot();
    await root.genie("install");
    const note = "etc/cni/genie/install.json";
    const pods = async () => {
      for (let i = 0; i < 8; i++) {
        const env = { CNI_COMMAND: "VERSION" };
        const run = await spawnGenie([join(root.path, binary)], env);
        expect([run.stderr, run.status]).toEqual(["", 0]);
      }
    };
    const install = async () => {
      for (let i = 0; i < 3; i++) {
        // Not on note as it is, so it is replaced.
        root.write(note, root.read(note).replace(/"written": \[\s*"\w/, '"written": ["0'));
        rmSync(join(root.path, `${binary}.replaced`), { force: true });
        expect((await root.genie("install")).status).toBe(0);
      }
    };
    await Promise.all([pods(), install()]);
    // A program that runs holds its file: the old way, writing into it, fails.
    const held = Bun.spawn([join(root.path, binary)], {
      env: { CNI_COMMAND: "STATUS" },
      stdin: "pipe",
      stdout: "ignore",
      stderr: "ignore",
    });
    try {
      expect(() => writeFileSync(join(root.path, binary), "")).toThrow("ETXTBSY");
      placeFile(join(root.path, binary), { text: "new" }, 0o755);
      expect(root.read(binary)).toBe("new");
    } finally {
      held.kill();
      await held.exited;
    }
  });

  test("a file that cannot be given a second name is code 5", () => {
    using root = makeRoot();
    root.write(binary, "");
    const file = join(root.path, binary);
    expect(() => keepAs(file, join(file, "kept"))).toThrow(
      expect.objectContaining({ code: 5, message: expect.stringContaining("ENOTDIR") }),
    );
  });

  test.each([
    ["a wrong table", ["--table", "$F"], "nonsense = 1\n", "nonsense"],
    ["a table that is not there", ["--table", "$F.absent"], "", "does not exist"],
    ["a folder that is relative", ["--conf-dir", "net.d"], "", "absolute path"],
    ["a duration that is none", ["--wait", "soon"], "", "--wait"],
    ["a kubeconfig that is not there", ["--kubeconfig", "$F.absent"], "", "does not exist"],
  ])("refuses %s", async (_what, args, content, message) => {
    using root = makeRoot();
    using dir = tempDir();
    const file = join(dir.path, "file");
    writeFileSync(file, content);
    const run = await root.genie("install", ...args.map((arg) => arg.replace("$F", file)));
    expect(run.status).toBeGreaterThan(0);
    expect(run.stderr).toContain(message);
    expect(root.has(conflist)).toBe(false);
  });

  test("a table that is named wins, and the one before comes back", async () => {
    using root = makeRoot();
    using dir = tempDir();
    root.write(table, "log_level = 'warn'\n");
    const untouched = root.files();
    await root.genie("install");
    expect(root.read(table)).toBe("log_level = 'warn'\n");
    const file = join(dir.path, "table");
    for (const level of ["debug", "error"]) {
      writeFileSync(file, `log_level = "${level}"\n`);
      expect((await root.genie("install", "--table", file)).status).toBe(0);
      expect(root.read(table)).toBe(`log_level = "${level}"\n`);
    }
    expect((await root.genie("uninstall")).status).toBe(0);
    expect(root.files()).toEqual(untouched);
  });

  test("what an operator changed since stays", async () => {
    using root = makeRoot();
    await root.genie("install");
    const edited = JSON.stringify({ ...ownList(), disableCheck: true });
    root.write(conflist, edited);
    root.write(table, "log_level = 'warn'\n");
    expect(did((await root.genie("install", "--json")).stdout)).toMatchObject({
      "00-genie.conflist": "kept",
      "plugins.toml": "unchanged",
    });
    expect(root.read(conflist)).toBe(edited);
    const gone = await root.genie("uninstall");
    expect([gone.status, gone.stdout]).toEqual([0, expect.stringContaining("was changed since")]);
    expect(root.read(table)).toBe("log_level = 'warn'\n");
  });

  test("says which note is damaged, and what to do", async () => {
    using root = makeRoot();
    root.write("etc/cni/genie/install.json", { version: 2 });
    const run = await root.genie("install");
    expect([run.status, run.stderr]).toEqual([1, expect.stringContaining("install.json: move it")]);
  });
});

/**
 * Runs a shell script on this machine's own paths, where nobody else sees it: /etc, /opt and
 * /var/lib are empty folders of a mount namespace.
 */
function onThisNode(script: string) {
  const hide = ["/etc", "/opt", "/var/lib"].map((path) => `mount -t tmpfs none ${path}`);
  const make = "mkdir -p /etc/cni/net.d /opt/cni/bin";
  const env = { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", genie: compiledGenie() };
  const whole = [...hide, make, script].join(" && ");
  const run = Bun.spawnSync(["unshare", "-m", "sh", "-c", whole], { env, cwd: "/" });
  return { status: run.exitCode, stdout: run.stdout.toString(), stderr: run.stderr.toString() };
}

describe.skipIf(lacks("mounts", "the binary"))("on the node itself", () => {
  const blue = JSON.stringify({ ...list("blue"), cniVersion: "1.1.0" });
  const error = JSON.stringify({ cniVersion: "1.1.0", code: 50, msg: "not yet" });
  /** A network, and a plugin that answers STATUS so. */
  const network = (answer: string) =>
    [
      `printf '%s' '${blue}' >/etc/cni/net.d/10-blue.conflist`,
      `printf '%s' '${answer}' >/opt/cni/answer`,
      "printf '#!/bin/sh\\ncat /opt/cni/answer; [ ! -s /opt/cni/answer ]' >/opt/cni/bin/bridge",
      "chmod 755 /opt/cni/bin/bridge",
    ].join(" && ");

  test("the default network is asked whether it is ready", () => {
    const yes = onThisNode(
      `${network("")} && $genie install && $genie install && ls /etc/cni/net.d && ` +
        "$genie uninstall && find /etc /opt/cni/bin /var/lib -type f",
    );
    expect([yes.stderr, yes.status]).toEqual(["", 0]);
    expect(yes.stdout).toContain("nothing has changed");
    expect(yes.stdout).toContain("00-genie.conflist\n10-blue.conflist\n");
    expect(yes.stdout).toEndWith("/etc/cni/net.d/10-blue.conflist\n/opt/cni/bin/bridge\n");

    const late = onThisNode(`${network(error)} && $genie install --wait 1ms`);
    expect([late.status, late.stderr]).toEqual([1, expect.stringContaining("not yet")]);
  });
});

describe("genie uninstall while pods are attached", () => {
  /** A node with genie installed and one pod, whose root is the throw-away folder itself. */
  async function makeBusy(next: boolean) {
    const node = makeNode({
      table: `[plugins.blue.config]\ncniVersion = "1.0.0"\nplugins = [{ type = "bridge" }]\n`,
      delegates: { bridge: { ADD: { result: { cniVersion: "1.0.0", ips: [] } } } },
    });
    if (next) writeFileSync(join(node.conf, "10-next.conflist"), JSON.stringify(list("next")));
    writeFileSync(
      join(node.dir, "given.toml"),
      `state_dir = "/state"\nconf_dir = "/conf"\nbin_dirs = ["/bin"]\n` +
        `[plugins.blue.config]\ncniVersion = "1.0.0"\nplugins = [{ type = "bridge" }]\n`,
    );
    const genie = (...args: string[]) =>
      spawnGenie([compiledGenie(), ...args, "--host-root", node.dir], {});
    const installed = await genie(
      "install",
      ...["--table", join(node.dir, "given.toml"), "--conf-dir=/conf", "--bin-dir=/bin"],
    );
    expect([installed.stderr, installed.status]).toEqual(["", 0]);
    const added = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
    expect([added.stderr, added.status]).toEqual(["", 0]);
    const own = () => JSON.parse(readFileSync(join(node.conf, "00-genie.conflist"), "utf8"));
    return { node, genie, own };
  }

  test("refuses and names them", async () => {
    const { node, genie } = await makeBusy(true);
    using _ = node;
    const run = await genie("uninstall");
    expect([run.status, run.stderr]).toEqual([1, expect.stringContaining("c1")]);
    expect(run.stderr).toContain("--force");
    expect(existsSync(join(node.conf, "00-genie.conflist"))).toBe(true);
  });

  test("with --force new pods get what follows, and each DEL still works", async () => {
    const { node, genie, own } = await makeBusy(true);
    using _ = node;
    const run = await genie("uninstall", "--force", "--json");
    expect([run.status, JSON.parse(run.stdout)]).toMatchObject([
      1,
      { done: false, waitsFor: ["c1"] },
    ]);
    const { name, plugins } = own();
    expect([name, plugins]).toEqual([
      "next",
      [{ type: "bridge" }, { type: "genie", delOnly: true }],
    ]);
    parseConfigList(own(), "what stays");
    const stdin = { delOnly: true, name };
    // What the runtime does for a new pod: bridge has answered, genie passes it on.
    const prevResult = { cniVersion: "1.1.0", ips: [{ address: "192.0.2.9/24" }] };
    const env = { CNI_CONTAINERID: "new" };
    const seen = calls(node.bin).length;
    const fresh = await wire(node, { command: "ADD", env, stdin: { ...stdin, prevResult } });
    expect([fresh.status, JSON.parse(fresh.stdout)]).toEqual([0, prevResult]);
    for (const command of ["CHECK", "STATUS", "GC", "DEL"]) {
      const more = { ...stdin, prevResult, "cni.dev/valid-attachments": [] };
      const quiet = await wire(node, { command, env, stdin: more });
      expect([command, quiet.status, quiet.stdout, quiet.stderr]).toEqual([command, 0, "", ""]);
    }
    expect(calls(node.bin).length).toBe(seen);
    expect((await genie("uninstall")).status).toBe(1);
    expect((await genie("uninstall", "--force")).status).toBe(1);

    const ended = await wire(node, { command: "DEL", stdin });
    expect([ended.stderr, ended.status]).toEqual(["", 0]);
    expect(calls(node.bin).at(-1)?.command).toBe("DEL");
    expect(left(node)).toEqual(nothing);
    const gone = await genie("uninstall", "--purge");
    expect([gone.stderr, gone.status]).toEqual(["", 0]);
    expect(readdirSync(node.conf)).toEqual(["10-next.conflist"]);
    expect(existsSync(join(node.bin, "genie"))).toBe(false);
    expect(existsSync(node.state)).toBe(false);
  });

  test("without another network new pods fail, and each DEL still works", async () => {
    const { node, genie, own } = await makeBusy(false);
    using _ = node;
    expect((await genie("uninstall", "--force")).status).toBe(1);
    const { plugins, name } = own();
    expect(plugins).toEqual([{ type: "genie", delOnly: true }]);
    const stdin = { delOnly: true, name };
    const env = { CNI_CONTAINERID: "new" };
    const fresh = await wire(node, { command: "ADD", env, stdin });
    expect([fresh.status, JSON.parse(fresh.stdout).code]).toEqual([1, 50]);
    expect((await wire(node, { command: "DEL", stdin })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test("genie comes back by install", async () => {
    const { node, genie, own } = await makeBusy(true);
    using _ = node;
    await genie("uninstall", "--force");
    const run = await genie("install", "--conf-dir=/conf", "--bin-dir=/bin");
    expect([run.stderr, run.status]).toEqual(["", 0]);
    expect(own()).toEqual(ownList());
  });
});

describe("credentials", () => {
  const pem = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n";
  const valid = {
    apiVersion: "v1",
    "current-context": "a",
    contexts: [{ name: "a", context: { cluster: "a", user: "a" } }],
    clusters: [{ name: "a", cluster: { server: "https://192.0.2.1" } }],
    users: [{ name: "a", user: { token: "secret" } }],
  };
  const with_ = (cluster: object) => ({
    ...valid,
    clusters: [{ name: "a", cluster: { server: "https://192.0.2.1", ...cluster } }],
  });

  test.each<[string, string | object, string]>([
    ["a kubeconfig", valid, ""],
    ["one with an absolute path", with_({ "certificate-authority": "/etc/ca.crt" }), ""],
    ["one with a relative path", with_({ "certificate-authority": "ca.crt" }), "--flatten"],
    ["one without TLS verification", with_({ "insecure-skip-tls-verify": true }), "not supported"],
    ["plain http", with_({ server: "http://192.0.2.1" }), "https"],
    ["no kubeconfig", "secret: [", "neither YAML nor JSON"],
  ])("%s", async (_what, content, refused) => {
    using root = makeRoot();
    root.write("given", content);
    const run = await root.genie("install", "--kubeconfig", join(root.path, "given"));
    expect([run.stderr, run.status]).toEqual([
      refused === "" ? "" : expect.stringContaining(refused),
      refused === "" ? 0 : 1,
    ]);
    expect(run.stderr).not.toContain("secret");
    expect(root.has(kubeconfig)).toBe(refused === "");
    if (refused !== "") return;
    expect(root.read(kubeconfig)).toBe(root.read("given"));
    expect(statSync(join(root.path, kubeconfig)).mode & 0o777).toBe(0o600);
  });

  test("of the service account we run as: a token in a file of its own, copied anew", async () => {
    using root = makeRoot();
    const folder = join(root.path, "account");
    root.write("account/token", "first\n");
    root.write("account/ca.crt", pem);
    const env = { KUBERNETES_SERVICE_HOST: "fd00::1", KUBERNETES_SERVICE_PORT: "6443" };
    const host = makeHost({ env });
    const site = openSite(root.path);
    const steps = await kubeAccess(host, site, undefined, folder);
    expect(steps.map(({ did, path }) => `${did} ${path}`)).toEqual([
      "wrote /etc/cni/genie/token",
      "wrote /etc/cni/genie/kubeconfig",
    ]);
    const written = join(root.path, kubeconfig);
    const { server } = await connect(makeHost(), {
      kubeconfig: written,
      kubeconfigIsExplicit: true,
      timeoutMs: 1,
    });
    expect(server).toBe("https://[fd00::1]:6443");
    expect(Bun.YAML.parse(root.read(kubeconfig))).toMatchObject({
      clusters: [{ cluster: { "certificate-authority-data": btoa(pem) } }],
      users: [{ user: { tokenFile: "/etc/cni/genie/token" } }],
    });
    expect(root.read(kubeconfig)).not.toContain("first");

    expect(copyToken(root.path, folder)).toBe(false);
    root.write("account/token", "second\n");
    expect(copyToken(root.path, folder)).toBe(true);
    expect(root.read("etc/cni/genie/token")).toBe("second\n");
    expect(statSync(join(root.path, "etc/cni/genie/token")).mode & 0o777).toBe(0o600);
    expect([
      keepsToken(host, root.path, folder),
      keepsToken(makeHost(), root.path, folder),
    ]).toEqual([true, false]);
    const running = runToken({ host, health: openHealth() }, root.path, folder, 1);
    root.write("account/token", "third\n");
    while (root.read("etc/cni/genie/token") !== "third\n") await Bun.sleep(1);
    host.abort();
    await running;
    rmSync(join(root.path, "etc/cni/genie/token"));
    const other = makeHost({ env });
    const idle = runToken({ host: other, health: openHealth() }, root.path, folder, 1);
    other.abort();
    await idle;
    expect(root.has("etc/cni/genie/token")).toBe(false);
    root.write("account/token", "");
    expect(() => copyToken(root.path, folder)).toThrow("there is no token in it");
  });

  test("a token of the node's own, kept fresh; the pod's while the server gives none", async () => {
    using root = makeRoot();
    const api = await startApiServer(join(root.path, "api"), { keepAlive: false });
    try {
      const second = () => Math.floor(Date.now() / 1000);
      const folder = join(root.path, "account");
      const file = "etc/cni/genie/token";
      const ofPod = { pod: { name: "genie-x" } };
      api.token = accountToken("net:genie", [second(), second() + 3600], ofPod);
      root.write("account/token", `${api.token}\n`);
      root.write("account/ca.crt", readFileSync(join(api.dir, "ca.crt"), "utf8"));
      const { hostname, port } = new URL(api.url);
      const env = { KUBERNETES_SERVICE_HOST: hostname, KUBERNETES_SERVICE_PORT: port };
      const runs = async (act: () => Promise<void>) => {
        const host = makeHost({ env, now: Date.now() });
        const running = runToken({ host, health: openHealth() }, root.path, folder, 1);
        await act();
        host.abort();
        await running;
        expect(host.written.stderr).not.toContain(api.token);
        return host.written.stderr;
      };
      const becomes = async (token: string) => {
        while (root.read(file) !== `${token}\n`) await Bun.sleep(1);
      };
      root.write(file, "of before\n");
      const log = await runs(async () => {
        await becomes(api.token);
        await Bun.sleep(20);
      });
      expect(log).toContain('grant these credentials the verb "create" on "serviceaccounts/token"');
      expect(api.requests).toHaveLength(1);

      const given: string[] = [];
      api.issue = (account, seconds) => {
        expect([account, seconds]).toEqual(["net:genie", 604_800]);
        given.push(accountToken(account, [second(), second() + seconds]));
        return given.at(-1) ?? "";
      };
      expect(
        await runs(async () => {
          while (given.length === 0) await Bun.sleep(1);
          await becomes(given[0] ?? "");
          await Bun.sleep(20);
        }),
      ).toBe("");
      expect(given).toHaveLength(1);
      expect(statSync(join(root.path, file)).mode & 0o777).toBe(0o600);
      // One that is a day old, and one of a server that gives short ones.
      for (const [from, to] of [
        [-86_401, 518_400],
        [-31, 29],
      ] as const) {
        root.write(file, accountToken("net:genie", [second() + from, second() + to]));
        const before = given.length;
        await runs(async () => {
          while (given.length === before) await Bun.sleep(1);
          await becomes(given.at(-1) ?? "");
        });
      }
      // An answer that makes no sense, or a server that is away: one of our own that holds is kept.
      const old = accountToken("net:genie", [second() - 86_401, second() + 60]);
      root.write(file, old);
      api.issue = () => "no token";
      expect(await runs(() => Bun.sleep(50))).toContain(
        "the answer to a TokenRequest has no token",
      );
      expect(root.read(file)).toBe(old);
    } finally {
      await api.stop();
    }
  });
});

describe("hostPath()", () => {
  const links: [string, string][] = [
    ["absolute", "/opt/real"],
    ["relative", "opt/real"],
    ["above", "../../../../../../opt/real"],
    ["opt/up", "../.."],
    ["chain", "absolute"],
  ];
  test.each([
    ["/absolute/bin", "opt/real/bin"],
    ["/relative/bin", "opt/real/bin"],
    ["/above", "opt/real"],
    ["/opt/up/up/opt", "up/opt"],
    ["/chain/x", "opt/real/x"],
    ["/../../etc", "etc"],
    ["/absent/x/../y", "absent/y"],
    ["//opt/./real/", "opt/real"],
    ["/", ""],
  ])("%s is %s of the root", (path, expected) => {
    using dir = tempDir();
    mkdirSync(join(dir.path, "opt/real"), { recursive: true });
    for (const [name, target] of links) symlinkSync(target, join(dir.path, name));
    expect(hostPath(dir.path, path)).toBe(join(dir.path, expected));
  });

  test("refuses a circle, and replaces a link itself", () => {
    using dir = tempDir();
    symlinkSync("b", join(dir.path, "a"));
    symlinkSync("a", join(dir.path, "b"));
    expect(() => hostPath(dir.path, "/a/x")).toThrow("too many links");
    expect(hostFile(dir.path, "/a")).toBe(join(dir.path, "a"));
    expect(() => hostPath(join(dir.path, "absent"), "/a")).toThrow("ENOENT");
  });

  test("install never writes outside the root", async () => {
    using root = makeRoot();
    using outside = tempDir();
    for (const folder of ["etc/cni/net.d", "opt/cni/bin", "etc/cni/genie"]) {
      rmSync(join(root.path, folder), { recursive: true, force: true });
      symlinkSync(outside.path, join(root.path, folder));
    }
    expect((await root.genie("install", "--no-wait")).status).toBe(0);
    expect(readdirSync(outside.path)).toEqual([]);
    expect(readdirSync(join(root.path, outside.path)).sort()).toContain("00-genie.conflist");
  });
});

describe("our entry in a conf dir", () => {
  test("confsBefore() goes by bytes, and passes over what is no JSON", () => {
    const names = ["00-Z.conf", "00-a.conf", "00-genie.conf", "00-genie.conflist", "05-a.conf"];
    const files = [
      { name: "00-0.conf", value: undefined },
      ...names.map((name) => ({ name, value: {} })),
    ];
    expect(confsBefore(files, "00-genie.conflist").map(({ name }) => name)).toEqual([
      "00-Z.conf",
      "00-a.conf",
      "00-genie.conf",
    ]);
  });

  test.each<[string, unknown, object]>([
    ["a list", list("a"), { ...list("a"), plugins: [{ type: "bridge" }, "own"] }],
    [
      "a single config",
      { cniVersion: "0.3.1", name: "a", type: "bridge", mtu: 1 },
      { cniVersion: "0.3.1", name: "a", plugins: [{ type: "bridge", mtu: 1 }, "own"] },
    ],
    ["nothing", undefined, { cniVersion: "1.0.0", name: "genie", plugins: ["own"] }],
  ])("lastList() of %s", (_what, next, expected) => {
    const own = { type: "genie", delOnly: true };
    expect(lastList(next)).toEqual(
      JSON.parse(JSON.stringify(expected).replace('"own"', JSON.stringify(own))),
    );
  });
});

describe.skipIf(lacks("systemd"))("the service of systemd", () => {
  const unit = "etc/systemd/system/genie-agent.service";
  const wants = "etc/systemd/system/multi-user.target.wants/genie-agent.service";

  test("comes once, holds what systemd asks of a unit, and goes with genie", async () => {
    using root = makeRoot();
    const untouched = root.files();
    const first = await root.genie("install", "--systemd");
    expect([first.stderr, first.status]).toEqual(["", 0]);
    expect(first.stdout).toContain("systemd does not run here: it starts with the next boot");
    expect(readlinkSync(join(root.path, wants))).toBe(`/${unit}`);
    const text = root.read(unit).replace("/opt/cni/bin/genie", compiledGenie());
    root.write("here/genie-agent.service", text);
    const file = join(root.path, "here/genie-agent.service");
    const verify = Bun.spawnSync(["systemd-analyze", "verify", "--man=no", file]);
    expect([verify.stderr.toString(), verify.exitCode]).toEqual(["", 0]);
    const security = ["security", "--offline=true", "--threshold=55", file];
    expect(Bun.spawnSync(["systemd-analyze", ...security]).exitCode).toBe(0);
    rmSync(join(root.path, "here"), { recursive: true });

    const second = await root.genie("install", "--systemd", "--json");
    expect(JSON.parse(second.stdout)).toMatchObject({ changed: false });
    root.write(unit, `${root.read(unit)}# of an older version\n`);
    const third = await root.genie("install", "--systemd");
    expect(third.stdout).toContain(`replaced   /${unit}`);
    const gone = await root.genie("uninstall");
    expect([gone.stderr, gone.status]).toEqual(["", 0]);
    expect(root.files()).toEqual(untouched);
  });

  test("that is somebody else's, or a package's, stays", async () => {
    using root = makeRoot();
    root.write(unit, "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n");
    const kept = await root.genie("install", "--systemd");
    expect(kept.stdout).toContain(`kept       /${unit}: it is not genie's`);
    await root.genie("uninstall");
    expect([root.has(unit), root.has(wants)]).toEqual([true, false]);

    using other = makeRoot();
    const packaged = "usr/lib/systemd/system/genie-agent.service";
    other.write(packaged, unitText("/usr/sbin/genie", []));
    const used = await other.genie("install", "--systemd");
    expect(used.stdout).toContain(`unchanged  /${packaged}: it belongs to a package`);
    expect([other.has(unit), readlinkSync(join(other.path, wants))]).toEqual([
      false,
      `/${packaged}`,
    ]);
    await other.genie("uninstall");
    expect(other.has(packaged)).toBe(true);
  });

  test.each([
    ["a plain path", "/opt/cni/bin/genie", "ExecStart=/opt/cni/bin/genie agent"],
    ["spaces", "/opt/my cni/genie", 'ExecStart="/opt/my cni/genie" agent'],
    ["a specifier", "/opt/%h/genie", "ExecStart=/opt/%%h/genie agent"],
    ["a dollar", "/opt/$&/genie", "ExecStart=/opt/$&/genie agent"],
  ])("names a binary with %s", (_what, binary, line) => {
    expect(unitText(binary, ["/srv/cni"])).toContain(`${line}\n`);
    expect(unitText(binary, ["/srv/cni"])).toContain("ReadWritePaths=-/etc/cni -/srv/cni\n");
  });
});
