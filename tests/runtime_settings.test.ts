/**
 * Where the runtimes of a node look for CNI configs and plugins, and what they have loaded: by
 * their files, and by the word of one that answers as containerd 1.6, containerd 2.1 and CRI-O do.
 * lib/node/runtimes.ts, lib/kubernetes/grpc.ts; install and doctor by the compiled program.
 */
import { describe, expect, test } from "bun:test";
import { mkdirSync, symlinkSync, watch, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { ownListText, readConfs, whyNotLoaded } from "../lib/node/genie_config.ts";
import { openSite } from "../lib/node/installation.ts";
import { askRuntimes, cniFolders, readRuntimes } from "../lib/node/runtimes.ts";
import * as fake from "./fake_runtime.ts";
import { fakePlugin, makeHost, tempDir } from "./fakes.ts";
import { compiledGenie, spawnGenie } from "./wire.ts";

const containerdSocket = "/run/containerd/containerd.sock";
const crioSocket = "/run/crio/crio.sock";
const confDir = "/etc/cni/net.d";
const blue = '{"cniVersion":"1.0.0","name":"blue","plugins":[{"type":"bridge"}]}';

/** Files of a node below a root; a link where the text begins with "→ ". */
function write(root: string, files: Record<string, string>): void {
  for (const [name, text] of Object.entries(files)) {
    const path = join(root, name);
    mkdirSync(dirname(path), { recursive: true });
    if (text.startsWith("→ ")) symlinkSync(text.slice(2), path);
    else writeFileSync(path, text);
  }
}

const two = (cni: string, top = "") =>
  `version = 2\n${top}\n[plugins."io.containerd.grpc.v1.cri".cni]\n${cni}\n`;
const three = (cni: string, top = "") =>
  `version = 3\n${top}\n[plugins."io.containerd.cri.v1.runtime".cni]\n${cni}\n`;
const main = "etc/containerd/config.toml";
const running = (...words: string[]) => `${words.join("\0")}\0`;

describe("readRuntimes(), cniFolders()", () => {
  const usual = { file: `/${main}`, socket: containerdSocket };
  test.each<[string, Record<string, string>, object[], string, string[]]>([
    ["no runtime", {}, [], confDir, ["/opt/cni/bin"]],
    ["version 2", { [main]: two('conf_dir = "/c"\nbin_dir = "/b"') }, [usual], "/c", ["/b"]],
    ["version 3", { [main]: three('conf_dir = "/c"\nbin_dirs = ["/b"]') }, [usual], "/c", ["/b"]],
    [
      "a drop-in by a pattern beside the file, and one by its path",
      {
        [main]: two(
          'conf_dir = "/c"\nbin_dir = "/b"',
          'imports = ["conf.d/*.toml", "/srv/x.toml"]',
        ),
        "etc/containerd/conf.d/10.toml": two('bin_dir = "/b10"'),
        "etc/containerd/conf.d/20.toml": two('bin_dir = "/b20"'),
        "etc/containerd/conf.d/30.txt": two('bin_dir = "/b30"'),
        "srv/x.toml": three('conf_dir = "/cx"'),
      },
      [usual],
      "/cx",
      ["/b20"],
    ],
    [
      "imports of imports, in a circle, of a broken file and of one that is not there",
      {
        [main]: two('conf_dir = "/c"', 'imports = ["a.toml", "no.toml", "bad.toml"]'),
        "etc/containerd/a.toml": two("", 'imports = ["config.toml", "../b.toml"]'),
        "etc/b.toml": two('bin_dir = "/b"', 'disabled_plugins = ["io.containerd.x"]'),
        "etc/containerd/bad.toml": "bin_dir =",
      },
      [usual],
      "/c",
      ["/b"],
    ],
    [
      "CRI switched off by a drop-in",
      {
        [main]: two('conf_dir = "/c"', 'imports = ["x.toml"]'),
        "etc/containerd/x.toml": 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n',
      },
      [{ ...usual, isDisabled: true }],
      confDir,
      ["/opt/cni/bin"],
    ],
    ...(
      [
        ["--config FILE", ["/usr/bin/containerd", "--config", "/srv/c.toml"]],
        ["-c=FILE", ["containerd", "--log-level=debug", "-c=/srv/c.toml"]],
        ["--config=FILE", ["/var/lib/k/containerd", "--config=/srv/c.toml", "--root", "/k"]],
      ] as const
    ).map(([what, words]): [string, Record<string, string>, object[], string, string[]] => [
      `one that runs with ${what}`,
      {
        [main]: two('conf_dir = "/c"\nbin_dir = "/b"'),
        "srv/c.toml": two('conf_dir = "/cs"', '[grpc]\naddress = "/run/k/c.sock"'),
        "proc/42/cmdline": running(...words),
      },
      [{ file: "/srv/c.toml", socket: "/run/k/c.sock" }],
      "/cs",
      ["/opt/cni/bin"],
    ]),
    [
      "one that is told where to listen, and has no file",
      { "proc/42/cmdline": running("containerd", "-a", "/run/k/c.sock") },
      [{ ...usual, socket: "/run/k/c.sock" }],
      confDir,
      ["/opt/cni/bin"],
    ],
    [
      "one in a container, and what is named alike",
      {
        [main]: two('conf_dir = "/c"'),
        "srv/c.toml": two('conf_dir = "/cs"'),
        "proc/1/ns/mnt": "→ mnt:[1]",
        "proc/42/cmdline": running("containerd", "--config", "/srv/c.toml"),
        "proc/42/ns/mnt": "→ mnt:[2]",
        "proc/43/cmdline": running("containerd-shim-runc-v2", "--config", "/srv/c.toml"),
        "proc/44/cmdline": running("vi", "containerd", "--config", "/srv/c.toml"),
      },
      [usual],
      "/c",
      ["/opt/cni/bin"],
    ],
  ])("%s", (_what, files, settings, folder, binDirs) => {
    using dir = tempDir();
    write(dir.path, files);
    expect(readRuntimes(dir.path)).toEqual(settings.map((one) => expect.objectContaining(one)));
    expect(readRuntimes(dir.path).length).toBe(settings.length);
    expect(cniFolders(openSite(dir.path), [])).toEqual({ confDir: folder, binDirs });
  });
});

const crioConfig = (lines: string) => `[crio]\nroot = "/r"\n[crio.network]\n${lines}\n`;
const about = (socket: string) => ({ file: `the runtime at ${socket}`, socket, loadError: "" });

describe("askRuntimes()", () => {
  const status = (answer: Uint8Array | number) => ({ Status: () => answer });
  test.each<[string, string, fake.Answers, string | undefined, object | undefined]>([
    [
      "containerd",
      containerdSocket,
      status(fake.containerdStatus({ confDir: "/c/", binDirs: ["/b", "/x"], source: blue })),
      undefined,
      {
        ...about(containerdSocket),
        ...{ confDir: "/c", binDirs: ["/b", "/x"], confsMax: 1, loaded: JSON.parse(blue) },
      },
    ],
    [
      "containerd without a network",
      containerdSocket,
      status(fake.containerdStatus({ error: "cni config load failed: no" })),
      undefined,
      {
        ...{ ...about(containerdSocket), loadError: "cni config load failed: no" },
        ...{ confDir, binDirs: ["/opt/cni/bin"], confsMax: 1, loaded: null },
      },
    ],
    [
      "CRI-O",
      crioSocket,
      status(fake.crioStatus),
      crioConfig('network_dir = "/c"\nplugin_dirs = ["/b"]\ncni_default_network = "blue"'),
      { ...about(crioSocket), confDir: "/c", binDirs: ["/b"], network: "blue" },
    ],
    ["CRI-O that says no TOML", crioSocket, status(fake.crioStatus), "network_dir =", undefined],
    ["a containerd without CRI", containerdSocket, {}, undefined, undefined],
    ["one that is not well", containerdSocket, status(14), undefined, undefined],
    [
      "one that says nothing of use",
      containerdSocket,
      status(Buffer.concat(fake.infoOf({ cniconfig: "{" }))),
      undefined,
      undefined,
    ],
  ])("%s", async (_what, socket, answers, config, expected) => {
    using dir = tempDir();
    await using _runtime = await fake.startRuntime(join(dir.path, socket), answers, config);
    const answer = await askRuntimes(makeHost(), dir.path);
    expect(answer).toEqual(expected === undefined ? [] : [expected as (typeof answer)[0]]);
  });

  test("one that listens where its file says, once though a link leads there too", async () => {
    using dir = tempDir();
    write(dir.path, {
      [main]: two("", '[grpc]\naddress = "/var/run/x/c.sock"'),
      "var/run": "→ /run",
      "run/containerd": "→ x",
    });
    const answers = status(fake.containerdStatus({ source: blue }));
    mkdirSync(join(dir.path, "run/x"));
    symlinkSync("c.sock", join(dir.path, "run/x/containerd.sock"));
    await using _runtime = await fake.startRuntime(join(dir.path, "run/x/c.sock"), answers);
    const found = await askRuntimes(makeHost(), dir.path);
    expect(found.map(({ confDir }) => confDir)).toEqual([confDir]);
  });

  test("none, and a file where a socket should be", async () => {
    using dir = tempDir();
    write(dir.path, { [containerdSocket]: "x" });
    expect(await askRuntimes(makeHost(), dir.path)).toEqual([]);
  });
});

describe("whyNotLoaded()", () => {
  const single = '{"cniVersion":"0.3.1","name":"one","type":"bridge"}';
  const asList = (cniVersion: string) => ({
    cniVersion,
    name: "one",
    plugins: [JSON.parse(single)],
  });
  test.each<[string, Record<string, string>, unknown, string | undefined]>([
    ["the first", { "10-a.conflist": blue }, JSON.parse(blue), undefined],
    [
      "the first, with other spaces",
      { "10-a.conflist": ` ${blue}\n` },
      JSON.parse(blue),
      undefined,
    ],
    ["a single config", { "10-a.conf": single }, asList("0.3.1"), undefined],
    ["no word of it", { "10-a.conflist": blue }, undefined, undefined],
    ["nothing, and there is none", {}, null, undefined],
    [
      "nothing",
      { "10-a.conflist": blue },
      null,
      "runtime has not loaded 10-a.conflist, it has no network",
    ],
    [
      "another",
      { "00-g.conflist": ownListText(), "10-a.conflist": blue },
      JSON.parse(blue),
      "runtime has not loaded 00-g.conflist, it calls blue",
    ],
    [
      "what stood there before",
      { "10-a.conflist": blue.replace("bridge", "ptp") },
      JSON.parse(blue),
      "runtime has not loaded 10-a.conflist, it calls blue",
    ],
    [
      "another version of it",
      { "10-a.conf": single },
      asList("1.0.0"),
      "runtime has not loaded 10-a.conf, it calls one",
    ],
  ])("%s", (_what, files, loaded, expected) => {
    using dir = tempDir();
    write(join(dir.path, confDir), files);
    const runtime = { ...about(containerdSocket), file: "runtime", binDirs: [], loaded };
    expect(whyNotLoaded(runtime, readConfs(dir.path, confDir))).toBe(expected);
  });
});

/** A node with a network, and genie's files if it is installed. */
function makeNode(root: string, dir = confDir): void {
  write(root, { [`${dir}/10-blue.conflist`]: blue });
  mkdirSync(join(root, "opt/cni/bin"), { recursive: true });
  fakePlugin(join(root, "opt/cni/bin"), "bridge");
}

const genie = (root: string, ...words: string[]) =>
  spawnGenie([compiledGenie(), ...words, "--host-root", root], {});

describe("genie install", () => {
  test("goes where the runtime that answers looks, whatever the files say", async () => {
    using dir = tempDir();
    makeNode(dir.path, "/c");
    write(dir.path, { [main]: two('conf_dir = "/d"\nbin_dir = "/e"') });
    const status = () =>
      fake.containerdStatus({
        confDir: "/c",
        binDirs: ["/b", "/opt/cni/bin"],
        source: ownListText(),
      });
    const socket = join(dir.path, containerdSocket);
    await using _runtime = await fake.startRuntime(socket, { Status: status });
    const run = await genie(dir.path, "install");
    expect([run.stderr, run.status]).toEqual(["", 0]);
    expect(run.stdout).toContain("wrote      /b/genie\n");
    expect(run.stdout).toContain("wrote      /c/00-genie.conflist\n");
    const doctor = await genie(dir.path, "doctor");
    expect(doctor.stdout).toContain(`the runtime at ${containerdSocket} suits`);
    expect(doctor.stdout).not.toContain("/d");
  });

  test.each([
    ["has containerd load what it overlooked", true],
    ["fails where containerd does not load it", false],
  ])("%s", async (_what, loads) => {
    using dir = tempDir();
    makeNode(dir.path);
    let source = blue;
    const status = () => fake.containerdStatus({ source });
    const socket = join(dir.path, containerdSocket);
    await using _runtime = await fake.startRuntime(socket, { Status: status });
    // Only a change of this file makes it look.
    const watcher = watch(join(dir.path, confDir), (_event, name) => {
      if (loads && name === ".reload") source = ownListText();
    });
    const run = await genie(dir.path, "install");
    watcher.close();
    const why =
      `the runtime at ${containerdSocket} has not loaded 00-genie.conflist, it calls blue. Put ` +
      "that right, or restart it, and run this again (code 50)";
    expect([run.stderr, run.status]).toEqual(loads ? ["", 0] : [`genie: error: ${why}\n`, 1]);
    expect(readConfs(dir.path, confDir).map(({ name }) => name)).toEqual([
      "00-genie.conflist",
      "10-blue.conflist",
    ]);
  });
});

describe("genie doctor asks the runtime", () => {
  const one = "the runtime at /run/containerd/containerd.sock";
  const own = { source: ownListText() };
  test.each<[string, fake.Containerd, string[]]>([
    ["which is well", own, [`ok ${one} suits`]],
    [
      "which has not noticed our config",
      { source: blue },
      [`ok ${one} suits`, `problem ${one} has not loaded 00-genie.conflist, it calls blue`],
    ],
    [
      "which could not load",
      { error: "cni config load failed: x" },
      [
        `ok ${one} suits`,
        `problem ${one} has not loaded 00-genie.conflist, it has no network: cni config load ` +
          "failed: x",
      ],
    ],
    [
      "which reads elsewhere",
      { ...own, confDir: "/c" },
      [`problem ${one} reads CNI configs from /c`],
    ],
    [
      "which looks for plugins elsewhere",
      { ...own, binDirs: ["/b"] },
      [`problem ${one} looks for plugins in /b, and genie is not there`],
    ],
    [
      "which takes several",
      { ...own, confsMax: 0 },
      [`problem ${one} has max_conf_num = 0: the runtime takes several configs`],
    ],
  ])("%s", async (_what, containerd, expected) => {
    using dir = tempDir();
    makeNode(dir.path);
    expect((await genie(dir.path, "install")).status).toBe(0);
    const status = () => fake.containerdStatus(containerd);
    const socket = join(dir.path, containerdSocket);
    await using _runtime = await fake.startRuntime(socket, { Status: status });
    const { stdout } = await genie(dir.path, "doctor", "--json");
    const { findings } = JSON.parse(stdout) as {
      findings: { check: string; verdict: string; detail: string; remedy: string }[];
    };
    const found = findings.filter(({ check }) => check === "runtime");
    expect(found.map(({ verdict, detail }) => `${verdict} ${detail}`)).toEqual(expected);
    const reload = `touch ${confDir}/.reload && rm ${confDir}/.reload: it then looks anew`;
    const isLate = ({ detail }: { detail: string }) => detail.includes("has not loaded");
    expect(found.filter(isLate).every(({ remedy }) => remedy === reload)).toBe(true);
  });

  test("CRI-O by its own word", async () => {
    using dir = tempDir();
    makeNode(dir.path);
    expect((await genie(dir.path, "install")).status).toBe(0);
    const config = crioConfig('network_dir = "/c"\ncni_default_network = "blue"');
    const answers = { Status: () => fake.crioStatus };
    await using _runtime = await fake.startRuntime(join(dir.path, crioSocket), answers, config);
    const { stdout } = await genie(dir.path, "doctor", "--json");
    expect(stdout).toContain(`the runtime at ${crioSocket} reads CNI configs from /c`);
    expect(stdout).toContain(`the runtime at ${crioSocket} has cni_default_network = \\"blue\\"`);
  });
});
