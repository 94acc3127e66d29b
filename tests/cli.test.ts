/**
 * The operator's commands (lib/cli/commands.ts, lib/cli/command_line.ts, lib/cli/plan_command.ts,
 * lib/config/usage.ts, lib/node/genie_config.ts, lib/node/validate.ts): what they print for people
 * and for programs, and their exit status. What a report says is in report.test.ts.
 */
import { beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { commandLines } from "../lib/cli/commands.ts";
import helpText from "../lib/cli/help.txt" with { type: "text" };
import { supportedVersions } from "../lib/cni.ts";
import { closeState, openState } from "../lib/database.ts";
import { neededResources, putAlive } from "../lib/policy/store.ts";
import manifest from "../package.json";
import { calls, fakePlugin, genieProgram, makeHost, runGenie, tempDir } from "./fakes.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();
const confDir = join(dir.path, "net.d");
const bin = join(dir.path, "bin");
const conf = join(dir.path, "genie.conf");

/** Writes a file into the throw-away folder and returns its path. */
function write(name: string, content: string | object): string {
  const path = join(dir.path, name);
  writeFileSync(path, typeof content === "string" ? content : JSON.stringify(content));
  return path;
}

const table = () =>
  `state_dir = "${dir.path}/state"\nconf_dir = "${confDir}"\nbin_dirs = ["${bin}"]\n`;
const ownConf = (pluginsFile: string, more: object = {}) => ({
  cniVersion: "1.0.0",
  name: "k8s-pod-network",
  type: "genie",
  plugins_file: pluginsFile,
  ...more,
});

beforeAll(() => {
  for (const path of [confDir, bin]) mkdirSync(path);
  for (const type of ["bridge", "portmap", "host-local"]) fakePlugin(bin, type);
  const lists: [string, string, object[]][] = [
    ["10-blue.conflist", "blue", [{ type: "bridge", ipam: { type: "host-local" } }]],
    ["20-green.conflist", "green", [{ type: "bridge" }, { type: "portmap" }]],
    ["30-red.conflist", "red", [{ type: "absent" }]],
    ["40-grey.conflist", "grey", [{ type: "bridge", ipam: { type: "no-ipam" } }]],
    ["50-genie.conflist", "k8s-pod-network", [{ type: "genie" }]],
  ];
  for (const [file, name, plugins] of lists) {
    write(join("net.d", file), { cniVersion: "1.0.0", name, plugins });
  }
  write(join("net.d", "60-broken.conf"), "{");
  writeFileSync(conf, JSON.stringify(ownConf(write("plugins.toml", table()))));
});

/** Runs one command line in this process; the throw-away folder is `DIR` in what it printed. */
async function cli(...args: string[]) {
  const host = makeHost({ env: {} });
  const status = await runCommand(host, args);
  const clean = (text: string) => text.replaceAll(dir.path, "DIR");
  return {
    status,
    stdout: clean(host.written.stdout),
    stderr: clean(host.written.stderr),
  };
}

const web = ["--namespace", "team", "--pod", "web"];
const planOf = (...more: string[]) => cli("plan", ...web, "--cni-config", conf, ...more);

describe("genie plan", () => {
  test("shows people what would be attached and why", async () => {
    const shown = await planOf("--annotation", "cni=green@eth4,blue", "--annotation", "a=b");
    // The title is as wide as the folder's real name.
    expect({ ...shown, stdout: shown.stdout.replace(/CONFIG +/, "CONFIG  ") }).toEqual({
      status: 0,
      stderr: "",
      stdout: `Pod team/web, annotations from: the command line

NETWORK  INTERFACE  PLUGINS          CNI    CONFIG  WHY
blue     eth0       bridge           1.0.0  DIR/net.d/10-blue.conflist   asked for by cni
green    eth4       bridge, portmap  1.0.0  DIR/net.d/20-green.conflist  asked for by cni

NETWORK  INTERFACE  ACCESS   BECAUSE
blue     eth0       allowed  access.default is "allow" and no rule speaks against it
green    eth4       allowed  access.default is "allow" and no rule speaks against it
`,
    });
    expect(calls(bin)).toEqual([]);
  });

  test("shows programs one document", async () => {
    const { status, stdout, stderr } = await planOf("--json", "--annotation", "cni=blue,green");
    expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
    expect(JSON.parse(stdout)).toEqual({
      pod: { namespace: "team", name: "web", uid: "" },
      annotationsFrom: "runtime",
      attachments: [
        {
          network: "blue",
          interface: "eth0",
          primary: true,
          cniVersion: "1.0.0",
          plugins: [{ type: "bridge", path: "DIR/bin/bridge" }],
          config: "DIR/net.d/10-blue.conflist",
          reason: "asked for by cni",
        },
        {
          network: "green",
          interface: "eth1",
          primary: false,
          cniVersion: "1.0.0",
          plugins: [
            { type: "bridge", path: "DIR/bin/bridge" },
            { type: "portmap", path: "DIR/bin/portmap" },
          ],
          config: "DIR/net.d/20-green.conflist",
          reason: "asked for by cni",
        },
      ],
      access: ["blue eth0", "green eth1"].map((one) => ({
        network: one.split(" ")[0],
        interface: one.split(" ")[1],
        allowed: true,
        reason: 'access.default is "allow" and no rule speaks against it',
        rule: "",
      })),
    });
  });

  test("takes a list that holds genie, and a default network", async () => {
    const list = write("genie.conflist", {
      cniVersion: "1.0.0",
      name: "k8s-pod-network",
      plugins: [
        { type: "portmap" },
        { type: "genie", plugins_file: write("p.toml", table()), default_plugin: "green" },
      ],
    });
    const { stdout } = await cli("plan", ...web, "--cni-config", list, "--ifname", "net9");
    expect(stdout).toContain("annotations from: nowhere, the pod asks for nothing\n");
    expect(stdout).toMatch(/\ngreen +net9 .* default network\n\n/);
  });

  test("finds plugins in CNI_PATH first", async () => {
    using other = tempDir();
    const path = fakePlugin(other.path, "bridge");
    const host = makeHost({ env: { CNI_PATH: other.path } });
    await runCommand(host, [
      ...["plan", ...web, "--cni-config", conf, "--json", "--annotation", "cni=blue"],
    ]);
    expect(JSON.parse(host.written.stdout).attachments[0].plugins).toEqual([
      { type: "bridge", path },
    ]);
  });

  test.each<[string, string[], string]>([
    [
      "an unknown network",
      ["cni=pink"],
      'Unknown network "pink": neither the plugin table nor DIR',
    ],
    [
      "a missing plugin",
      ["cni=red"],
      'plugin "absent" is in none of DIR/bin, install it or extend',
    ],
    ["a clash", ["cni=blue@a,green@a"], "give one of them another name (code 105)"],
    ["a malformed annotation", ["cni=../x"], 'Invalid annotation "cni": "../x" is not a network'],
    ["64 networks", [`cni=${"a,".repeat(63)}a`], "at most 32 are allowed (code 7)"],
    ["an escape sequence", ["cni=\u001b[31m"], 'cni": "[31m" is not a network name'],
  ])("says what is wrong with %s: status 1", async (_name, annotations, part) => {
    const { status, stdout, stderr } = await planOf(
      ...annotations.flatMap((annotation) => ["--annotation", annotation]),
    );
    expect({ status, stdout, stderr }).toEqual({
      status: 1,
      stdout: "",
      stderr: expect.stringMatching(/^genie: error: [^\n]+ \(code \d+\)\n/),
    });
    expect(stderr).toContain(part);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must not be there
    expect(stderr).not.toMatch(/[\u0000-\u0009\u000b-\u001f]/);
  });

  test.each<[string, () => string, string]>([
    ["a file that is missing", () => join(dir.path, "none"), "Cannot read DIR/none: ENOENT"],
    ["a file that is no JSON", () => write("no.json", "{"), "Cannot decode DIR/no.json: it is"],
    [
      "a config of another plugin",
      () => write("other.conf", { name: "a", type: "bridge" }),
      'Invalid CNI config DIR/other.conf: no plugin has type "genie"',
    ],
    [
      "a config without a name",
      () => write("noname.conf", { type: "genie" }),
      'Invalid CNI config DIR/noname.conf: "name" is not valid',
    ],
    [
      "a table with a mistake",
      () => write("t.conf", ownConf(write("t.toml", "\n[default]\nnetwork = []"))),
      'plugin table "DIR/t.toml" line 3: "default.network" is not a known key, did you mean',
    ],
    [
      "a table that is missing",
      () => write("m.conf", ownConf(join(dir.path, "m.toml"))),
      "Cannot read plugin table DIR/m.toml: ENOENT",
    ],
  ])("says what is wrong with %s: status 1", async (_name, file, part) => {
    const { status, stdout, stderr } = await cli("plan", ...web, "--cni-config", file());
    expect({ status, stdout }).toEqual({ status: 1, stdout: "" });
    expect(stderr).toStartWith("genie: error: ");
    expect(stderr).toContain(part);
  });
});

describe("genie plan chooses", () => {
  // The last would change every object, were annotations one.
  test.each([["cni="], ["other=x"], ["__proto__=x"]])("for %s", async (annotation) => {
    const { status, stdout, stderr } = await planOf("--annotation", annotation, "--json");
    expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
    const [first, ...others] = JSON.parse(stdout).attachments;
    expect([first.network, first.interface, others]).toEqual(["blue", "eth0", []]);
    expect(first.reason).toContain("candidates");
  });
});

test("genie plan tells of a key of Multus in a config that is not Multus'", async () => {
  const keys = { namespaceIsolation: true, logLevel: "debug" };
  const file = write("half-multus.conf", ownConf(join(dir.path, "plugins.toml"), keys));
  const { stderr } = await cli("plan", ...web, "--cni-config", file, "--annotation", "cni=blue");
  expect(stderr).toContain("warn: genie's CNI config has namespaceIsolation, and that is ignored");
});

describe("network policy to enforce, and no agent that says which:", () => {
  const state = join(dir.path, "policy-state");
  const refused = "pods on networks with network policy are refused (code 11): ";
  const opened = "pods on networks with network policy start without new policies: ";
  test.each<[string, string, number, string]>([
    ["never known", "policy.enforce = true", 0, `${refused}nothing is known of network policies`],
    ["known long ago", "policy.enforce = true", 600, `${refused}network policies were last known`],
    [
      "of one network alone",
      "[plugins.blue]\nenforce_policy = true",
      0,
      `${refused}nothing is known of network policies`,
    ],
    [
      "open",
      'policy = { enforce = true, when_stale = "open" }',
      0,
      `${opened}nothing is known of network policies`,
    ],
    ["known now", "policy.enforce = true", 5, ""],
    ["not to be enforced", "", 0, ""],
  ])("%s", async (name, policy, ageS, expected) => {
    const stateDir = join(state, name);
    mkdirSync(stateDir, { recursive: true });
    if (ageS > 0) {
      const open = await openState(makeHost(), stateDir);
      const atMs = makeHost().now() - ageS * 1000;
      putAlive(open, new Map(neededResources(true).map((one) => [one, atMs])));
      closeState(open);
    }
    const folders = `conf_dir = "${confDir}"\nbin_dirs = ["${bin}"]\n`;
    const file = write("policy.toml", `state_dir = "${stateDir}"\n${folders}${policy}\n`);
    const own = write("policy.conf", ownConf(file));
    const plan = await cli("plan", ...web, "--cni-config", own, "--annotation", "cni=blue");
    const [first] = JSON.parse(
      (await cli("validate", "--json", "--cni-config", own)).stdout,
    ).findings;
    if (expected === "") {
      expect([plan.stderr, first.network]).toEqual(["", "blue"]);
      return;
    }
    expect(plan.stderr).toStartWith(`genie: warn: ${expected}`);
    expect(first).toEqual({
      ...{ network: "-", verdict: "problem" },
      detail: expect.stringContaining("check that genie agent runs on this node"),
    });
    expect(first.detail).toStartWith(expected);
  });
});

describe("genie validate", () => {
  test("shows people every network, problems among them", async () => {
    const missing = "in none of DIR/bin";
    expect(await cli("validate", "--cni-config", conf)).toEqual({
      status: 1,
      stderr: "",
      stdout: [
        "Plugin table: DIR/plugins.toml\n",
        "NETWORK  VERDICT  DETAIL",
        "blue     ok       bridge (CNI 1.0.0) from DIR/net.d/10-blue.conflist",
        "green    ok       bridge, portmap (CNI 1.0.0) from DIR/net.d/20-green.conflist",
        `red      problem  Cannot attach network "red": plugin "absent" is ${missing}, ` +
          "install it or extend bin_dirs",
        'grey     problem  Cannot attach network "grey": IPAM plugin "no-ipam" of plugin ' +
          `"bridge" is ${missing}`,
        "-        problem  Cannot decode DIR/net.d/60-broken.conf: it is not valid JSON\n",
      ].join("\n"),
    });
    expect(calls(bin).filter(({ command }) => command !== "VERSION")).toEqual([]);
  });

  const good = `
[default]
networks = ["blue@eth4"]
always = ["green"]
[plugins.blue]
[plugins.green]
conf = "20-green.conflist"
`;
  const onlyGood = (text: string) => {
    const folder = join(dir.path, "good.d");
    mkdirSync(folder, { recursive: true });
    for (const name of ["blue", "green"]) {
      const list = { cniVersion: "1.0.0", name, plugins: [{ type: "bridge" }] };
      write(join("good.d", `20-${name}.conflist`), list);
    }
    const file = write("good.toml", `conf_dir = "${folder}"\nbin_dirs = ["${bin}"]\n${text}`);
    return write("good.conf", ownConf(file));
  };

  test("shows programs one document, status 0 where all is well", async () => {
    const { status, stdout } = await cli("validate", "--json", "--cni-config", onlyGood(good));
    expect([status, JSON.parse(stdout)]).toEqual([
      0,
      {
        table: "DIR/good.toml",
        ok: true,
        findings: ["blue", "green"].map((network) => ({
          network,
          verdict: "ok",
          detail: `bridge (CNI 1.0.0) from DIR/good.d/20-${network}.conflist`,
        })),
      },
    ]);
  });

  test.each<[string, string, string]>([
    ["a default network", "[default]\nnetworks = ['pink@eth1']", "default.networks"],
    ["a network for every pod", "[default]\nalways = ['pink']", "default.always"],
    ["a candidate", "[select]\ncandidates = ['pink']", "select.candidates"],
  ])("finds %s that does not exist", async (_name, text, key) => {
    const { status, stdout } = await cli("validate", "--json", "--cni-config", onlyGood(text));
    expect([status, JSON.parse(stdout).findings.at(-1)]).toEqual([
      1,
      {
        network: "pink",
        verdict: "problem",
        detail: expect.stringContaining(`named by ${key}: Unknown network "pink"`),
      },
    ]);
  });

  test("reads the credentials: those of CNI-Genie's installer lack the CA", async () => {
    const kubeconfig = write("genie-kubeconfig", {
      "current-context": "genie-context",
      contexts: [{ name: "genie-context", context: { cluster: "local", user: "genie" } }],
      clusters: [{ name: "local", cluster: { "insecure-skip-tls-verify": true } }],
      users: [{ name: "genie" }],
    });
    const text = `[kubernetes]\nkubeconfig = "${kubeconfig}"`;
    const keys = { kubernetes: { k8s_api_root: "https://192.0.2.1" } };
    const file = onlyGood(text).replace("good.conf", "good.toml");
    const own = write("installed.conf", ownConf(file, keys));
    const { stdout } = await cli("validate", "--json", "--cni-config", own);
    // A node of a cluster has the CA: then it is used, and said all the same.
    expect(JSON.parse(stdout).findings[0]).toEqual({
      network: "-",
      verdict: expect.any(String),
      detail: expect.stringContaining('set "certificate-authority"'),
    });
  });

  test("finds an entry of the table without a list, and genie in it", async () => {
    const text = "[plugins.pink]\n[plugins.self.config]\ntype = 'genie'";
    const { status, stdout } = await cli("validate", "--json", "--cni-config", onlyGood(text));
    const problems = JSON.parse(stdout)
      .findings.filter(({ verdict }: { verdict: string }) => verdict === "problem")
      .map(({ detail }: { detail: string }) => detail);
    expect([status, problems]).toEqual([
      1,
      [
        expect.stringContaining('network "self": its plugin "genie" in plugins.self.config'),
        expect.stringContaining('Unknown network "pink": plugins.pink at DIR/good.toml:3 has'),
      ],
    ]);
  });
});

describe("genie version", () => {
  test("is for people", async () => {
    expect(await cli("version")).toEqual({
      status: 0,
      stdout: `genie ${manifest.version}, CNI ${supportedVersions.join(", ")}\n`,
      stderr: "",
    });
  });
  test("is for programs", async () => {
    expect(JSON.parse((await cli("version", "--json")).stdout)).toEqual({
      version: manifest.version,
      cniVersions: [...supportedVersions],
    });
  });
});

describe("genie help", () => {
  test.each([[[]], [["help"]], [["--help"]], [["-h"]]])("of everything: %j", async (words) => {
    const { status, stdout, stderr } = await cli(...words);
    expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
    for (const name of ["plan", "validate", "version", "help"]) {
      expect(stdout).toMatch(new RegExp(`^  ${name} +\\S`, "m"));
    }
    expect(stdout).toContain("Exit status: 0 done, 1 found a problem, 2 used wrongly.");
  });

  const flags: Record<string, string[]> = {
    plan: ["--namespace", "--pod", "--annotation", "--ifname", "--cni-config", "--json"],
    validate: ["--cni-config", "--json"],
    version: ["--json"],
  };
  test.each(Object.entries(flags))("of %s names every flag", async (name, expected) => {
    const { status, stdout } = await cli("help", name);
    expect(status).toBe(0);
    expect(stdout).toStartWith(`genie ${name} `);
    for (const flag of expected) expect(stdout).toMatch(new RegExp(`^  ${flag}\\b`, "m"));
    expect(await cli(name, "--help")).toEqual(await cli("help", name));
    expect(await cli(name, "-h")).toEqual(await cli("help", name));
  });

  test("has a page for every command, and none besides", () => {
    const pages = [...helpText.matchAll(/^----\ngenie (\S+) .*\n\n(\S.*)\n\n/gm)];
    const listed = Object.entries(commandLines).map(([name, { summary }]) => [name, summary]);
    expect(pages.map(([, name, summary]) => [name, summary]).sort()).toEqual(listed.sort());
  });

  test("fits a terminal of 100 columns", async () => {
    for (const words of [[], ["plan"], ["validate"], ["version"]]) {
      const { stdout } = await cli("help", ...words);
      expect(Math.max(...stdout.split("\n").map((line) => line.length))).toBeLessThanOrEqual(100);
    }
  });
});

describe("colours", () => {
  const green = "\u001b[32mok";
  test.each<[string, Record<string, string>, boolean]>([
    ["no terminal", {}, false],
    ["no terminal, forced", { CLICOLOR_FORCE: "1" }, true],
    ["not forced", { CLICOLOR_FORCE: "0" }, false],
    ["none wanted", { CLICOLOR_FORCE: "1", NO_COLOR: "1" }, false],
    ["an empty NO_COLOR", { CLICOLOR_FORCE: "1", NO_COLOR: "" }, true],
  ])("%s", async (_name, env, has) => {
    const host = makeHost({ env });
    await runCommand(host, ["validate", "--cni-config", conf]);
    expect(host.written.stdout.includes(green)).toBe(has);
    await runCommand(makeHost({ env: {} }), ["version"]);
  });
});

describe("used wrongly: status 2", () => {
  test.each<[string, string[], string, string]>([
    ["an unknown command", ["polish"], 'Unknown command "polish"', "help"],
    ["a name every object has", ["constructor"], 'Unknown command "constructor"', "help"],
    ["nearly a command", ["plna"], 'Unknown command "plna". Did you mean "plan"?', "help"],
    ["nearly an option", ["plan", "--anotation=a"], 'Did you mean "annotation"?', "plan --help"],
    ["help of an unknown command", ["help", "polish"], 'Unknown command "polish"', "help"],
    ["an unknown flag", ["version", "--yaml"], "Unknown option '--yaml'", "version --help"],
    ["a word too many", ["version", "now"], "Unexpected argument 'now'", "version --help"],
    ["a flag without value", ["plan", "--pod"], "'--pod <value>' argument missing", "plan --help"],
    [
      "a value for a switch",
      ["version", "--json=1"],
      "does not take an argument",
      "version --help",
    ],
    ["no pod", ["plan", "--namespace", "team"], "No pod is named", "plan --help"],
    ["no namespace", ["plan", "--pod", "web"], 'Pod "web" has no namespace', "plan --help"],
    ["an empty pod", ["plan", "--namespace=a", "--pod="], 'Invalid pod ""', "plan --help"],
    [
      "a pod that would be another argument",
      ["plan", "--namespace", "a", "--pod", "b;cni=x"],
      'Names cannot hold ";" or "="',
      "plan --help",
    ],
    [
      "an annotation without value",
      ["plan", ...web, "--annotation", "cni"],
      'Invalid --annotation "cni": expected KEY=VALUE',
      "plan --help",
    ],
    [
      "an annotation without key",
      ["plan", ...web, "--annotation", "=a"],
      'Invalid --annotation "=a": expected KEY=VALUE',
      "plan --help",
    ],
    [
      "an interface that cannot be",
      ["plan", ...web, "--ifname", "a/b"],
      'Invalid --ifname "a/b": it holds "/" or ":"',
      "plan --help",
    ],
  ])("%s", async (_name, words, part, hint) => {
    const { status, stdout, stderr } = await cli(...words);
    expect({ status, stdout }).toEqual({ status: 2, stdout: "" });
    expect(stderr).toStartWith("genie: error: ");
    expect(stderr).toContain(part);
    expect(stderr).toEndWith(`\ngenie: hint: see genie ${hint}\n`);
  });
});

describe("the program", () => {
  const program = genieProgram();
  const run = (...args: string[]) => runGenie(program, {}, "", args);

  test("plans as in this process", async () => {
    const words = ["plan", ...web, "--cni-config", conf, "--annotation", "cni=blue,green"];
    const { status, stdout, stderr } = await run(...words);
    expect({ status, stdout: stdout.replaceAll(dir.path, "DIR"), stderr }).toEqual(
      await cli(...words),
    );
  });

  test.each<[string, string[], number, string, string]>([
    ["version", ["version"], 0, `genie ${manifest.version}, CNI 0.1.0`, ""],
    ["help, without a word", [], 0, "genie: a CNI plugin that attaches a pod", ""],
    ["an unknown command", ["polish"], 2, "", 'genie: error: Unknown command "polish"\n'],
    ["an unknown flag", ["plan", "--yaml"], 2, "", "genie: error: Unknown option '--yaml'"],
    [
      "a file that is missing",
      ["plan", ...web, "--cni-config=/x"],
      1,
      "",
      "Cannot read /x: ENOENT",
    ],
  ])("%s", async (_name, words, expected, out, err) => {
    const { status, stdout, stderr } = await run(...words);
    expect({ stdout, stderr, status }).toEqual({
      stdout: out === "" ? "" : expect.stringContaining(out),
      stderr: err === "" ? "" : expect.stringContaining(err),
      status: expected,
    });
  });

  test.each([
    [70, 11], // the reasons stand below their rows
    [100, 9],
  ])("keeps within a terminal of %d columns", async (cols, count) => {
    let written = "";
    const decoder = new TextDecoder();
    const own = program.endsWith(".ts") ? [process.execPath, program] : [program];
    const words = ["plan", ...web, "--cni-config", conf, "--annotation", "cni=blue,green"];
    const child = Bun.spawn([...own, ...words], {
      env: { TERM: "xterm" },
      cwd: "/",
      terminal: {
        cols,
        rows: 24,
        data: (_terminal, bytes) => {
          written += decoder.decode(bytes, { stream: true });
        },
      },
    });
    const status = await child.exited;
    child.terminal?.close();
    const lines = written.replaceAll("\r\n", "\n").trimEnd().split("\n");
    expect({ status, lines: lines.length }).toEqual({ status: 0, lines: count });
    const why = 'access.default is "allow" and no rule speaks against it';
    expect(lines.filter((line) => line.endsWith(why))).toHaveLength(2);
    expect(Math.max(...lines.map((line) => Bun.stringWidth(line)))).toBeLessThanOrEqual(cols);
    expect(lines[3]).toMatch(/^blue +eth0 +bridge .*…/);
  });
});
