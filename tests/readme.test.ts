/**
 * The documents say what is true: every snippet of README.md is run or checked, every table
 * compared; links, commands and paths of all documents exist; docs/architecture.md lists what the
 * sources have.
 */
import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { commandLines, optionsOf } from "../lib/cli/commands.ts";
import { code, supportedVersions } from "../lib/cni.ts";
import { defaultConfig, parseConfig } from "../lib/config/parse.ts";
import { parseConfigList } from "../lib/networks.ts";
import { annotationsCapability } from "../lib/pod.ts";
import manifest from "../package.json";
import { buildIfStale } from "./build.ts";
import { demoNeeds } from "./demo/real.ts";
import { fakePlugin, genieProgram, runGenie, type TempDir, tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { importsOf, pathOf, product, roomOf } from "./sources.ts";

const root = join(import.meta.dir, "..");
const readme = readFileSync(join(root, "README.md"), "utf8");

/** The fenced blocks of one language. */
function blocks(language: string): string[] {
  const fence = new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\`$`, "gms");
  return [...readme.matchAll(fence)].map(([, text = ""]) => text);
}

/** The rows of the table under a heading, without its head. */
function rows(heading: string): string[][] {
  const [, section = ""] = readme.split(`\n## ${heading}\n`);
  const [text = ""] = section.split("\n## ");
  const lines = text.split("\n").filter((line) => line.startsWith("|"));
  return lines.slice(2).map((line) => line.slice(2, -2).split(" | "));
}

/** Commands of the sh blocks, comments left out. */
const commands = blocks("sh")
  .flatMap((block) => block.trimEnd().split("\n"))
  .map((line) => line.replace(/\s+#.*/, ""));

describe("README", () => {
  test("tags every block, so that none escapes these tests", () => {
    const tags = [...readme.matchAll(/^```([^\n]*)\n.*?^```$/gms)].map(([, tag]) => tag);
    const known = ["sh", "toml", "json", "console", "text"];
    expect(tags.filter((tag) => !known.includes(tag ?? ""))).toEqual([]);
    expect(blocks("text")).toHaveLength(1); // the diagram
  });

  test("lists every error code once, by number and name", () => {
    const listed = rows("Error codes").map(([number, name]) => [name, Number(number)]);
    expect(listed).toEqual(Object.entries(code));
    expect(new Set(Object.values(code)).size).toBe(listed.length);
  });

  test("names every CNI version and dependency, and one version of Bun", () => {
    const named = [
      ...supportedVersions,
      ...Object.keys(manifest.dependencies),
      ...Object.keys(manifest.devDependencies),
    ];
    expect(named.filter((name) => !readme.includes(name))).toEqual([]);
    const bun = [...readme.matchAll(/bun@([\d.]+)/g)].map(([, version]) => version);
    expect(new Set(bun)).toEqual(new Set([manifest.engines.bun]));
  });
});

describe("README, configs", () => {
  test.each(blocks("toml").map((text) => [text.split("\n")[0] ?? "", text]))(
    "the table that begins with %s is valid",
    (_, text) => {
      for (const [name, { config }] of parseConfig(text, "README.md").plugins) {
        if (config) expect(parseConfigList({ name, ...config }, "README.md").name).toBe(name);
      }
    },
  );

  test("the long table shows the defaults", () => {
    const { plugins, file, ...shown } = parseConfig(blocks("toml")[1] ?? "", "README.md");
    expect([...plugins.keys()]).toEqual(["storage"]);
    const { plugins: none, file: noFile, ...defaults } = defaultConfig();
    expect(shown).toEqual(defaults);
  });

  test("the table of keys shows the defaults", () => {
    const shown = rows("plugins.toml")
      .map(([key = "", value = ""]) => [key.slice(1, -1), /^`(.*)`$/.exec(value)?.[1]] as const)
      .filter(([key, value]) => value !== undefined && !key.startsWith("plugins."));
    expect(shown.length).toBeGreaterThan(20);
    const text = shown.map(([key, value]) => `${key} = ${value}\n`).join("");
    const { file, kubernetes, ...config } = parseConfig(text, "README.md");
    const defaults = defaultConfig();
    // A kubeconfig that is named must exist.
    const { kubeconfigIsExplicit } = defaults.kubernetes;
    const own = { ...config, kubernetes: { ...kubernetes, kubeconfigIsExplicit } };
    expect({ file: "", ...own }).toEqual({ ...defaults, file: "" });
  });

  test("names every key of the table", () => {
    const keys = (value: object): string[] =>
      Object.entries(value).flatMap(([key, one]) =>
        typeof one === "object" && one !== null && !Array.isArray(one)
          ? [key, ...keys(one)]
          : [key],
      );
    const { plugins, file, kubernetes, ...config } = defaultConfig();
    const { kubeconfigIsExplicit, ...ofKubernetes } = kubernetes;
    const names = keys({ ...config, ofKubernetes, select: {} })
      .filter((key) => key !== "ofKubernetes")
      .map((key) =>
        key.replace(/Ms$/, "").replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`),
      );
    const plugin = ["conf", "config", "allow", "deny", "timeout", "capacity", "candidates"];
    expect(
      [...names, ...plugin].filter((name) => !new RegExp(`\\b${name}\\b`).test(readme)),
    ).toEqual([]);
  });

  test("the CNI config is a config list that calls genie and asks for annotations", () => {
    const [text = ""] = blocks("json");
    const { cniVersion, name, plugins } = parseConfigList(JSON.parse(text), "README.md");
    expect({ cniVersion, name, types: plugins.map(({ type }) => type) }).toEqual({
      cniVersion: "1.1.0",
      name: "genie",
      types: ["genie"],
    });
    expect(plugins[0]?.capabilities).toMatchObject({ [annotationsCapability]: true });
    expect(JSON.parse(text).cniVersion).toBe("1.0.0");
  });
});

/** A node with the networks that the README talks of, in a folder; replaces the paths in texts. */
function makeNode(dir: TempDir): (text: string) => string {
  const here = (text: string) =>
    text.replace(/\/(etc|opt|var)\/(cni|lib\/cni)\b/g, (path) => join(dir.path, path));
  for (const path of ["/etc/cni/net.d", "/etc/cni/genie", "/opt/cni/bin"]) {
    mkdirSync(here(path), { recursive: true });
  }
  const [smallest = ""] = blocks("toml");
  const paths = here('conf_dir = "/etc/cni/net.d"\nbin_dirs = ["/opt/cni/bin"]\n');
  writeFileSync(here("/etc/cni/genie/plugins.toml"), paths + smallest);
  const [own = ""] = blocks("json");
  const config = JSON.parse(own);
  config.plugins[0].plugins_file = here("/etc/cni/genie/plugins.toml");
  writeFileSync(here("/etc/cni/net.d/00-genie.conflist"), JSON.stringify(config));
  for (const [name, type] of Object.entries({ calico: "calico", blue: "bridge", green: "ptp" })) {
    fakePlugin(here("/opt/cni/bin"), type);
    const list = { cniVersion: "1.0.0", name, plugins: [{ type }] };
    writeFileSync(here(`/etc/cni/net.d/10-${name}.conflist`), JSON.stringify(list));
  }
  return here;
}

describe("README, the annotation", () => {
  /** What each row that is no list of networks gives on {@link makeNode}'s node. */
  const special: Record<string, string> = {
    "the node chooses": "blue on eth0",
    "`default.networks` of the table": "calico on eth0",
  };

  test.each(rows("The annotation"))("%s gives %s", async (cell, expected) => {
    using dir = tempDir();
    const here = makeNode(dir);
    const config = here("/etc/cni/net.d/00-genie.conflist");
    const annotation = cell === "absent" ? "other=" : `cni=${cell.slice(2, -2)}`;
    const words = ["plan", "--namespace", "demo", "--pod", "web", "--annotation", annotation];
    const args = [...words, "--cni-config", config, "--json"];
    const { stdout, stderr } = await runGenie(genieProgram(), {}, "", args);
    const plan = stdout === "" ? { attachments: [] } : JSON.parse(stdout);
    const given = plan.attachments.map(
      (one: { network: string; interface: string }) => `${one.network} on ${one.interface}`,
    );
    expect(given.join(", ") || stderr).toContain(special[expected] ?? expected);
  });
});

describe("README, commands", () => {
  const genieCommands = commands.filter((command) => command.startsWith("genie "));

  const shows: Record<string, RegExp> = {
    plan: /^blue +eth0 .*\ngreen +eth5 /m,
    validate: /^calico +ok /m,
    version: /^\{.*"cniVersions"/,
    help: /^genie plan NAMESPACE\/POD/,
  };

  test.each(genieCommands)("%s does what it says", async (command) => {
    using dir = tempDir();
    const here = makeNode(dir);
    const [, verb = "", ...words] = command.split(" ");
    const config = here("/etc/cni/net.d/00-genie.conflist");
    const args = ["plan", "validate"].includes(verb) ? [...words, "--cni-config", config] : words;
    const { status, stdout, stderr } = await runGenie(genieProgram(), {}, "", [verb, ...args]);
    expect(stderr).toBe("");
    expect(stdout).toMatch(shows[verb] ?? /./);
    expect(stdout).not.toContain("problem");
    expect(status).toBe(0);
  });

  test("are those that genie help lists, and the others are named", async () => {
    const { stdout } = await runGenie(genieProgram(), {}, "", ["help"]);
    const listed = [...stdout.matchAll(/^ {2}(\w+) {2}/gm)].map(([, one]) => one ?? "");
    const shown = genieCommands.map((command) => command.split(" ")[1]);
    expect(shown.filter((one) => !listed.includes(one ?? ""))).toEqual([]);
    expect(listed.filter((one) => !new RegExp(`\\bgenie ${one}\\b`).test(readme))).toEqual([]);
  });

  test("run scripts of package.json", () => {
    const scripts = [...readme.matchAll(/npx -y bun@[\d.]+ (\w+)(?: (\S+?))?[\s`]/g)];
    expect(scripts.length).toBeGreaterThanOrEqual(5);
    for (const [text, verb, script = ""] of scripts) {
      if (verb === "install") expect(text).toContain("--frozen-lockfile");
      else
        expect([verb, Object.keys(manifest.scripts)]).toEqual([
          "run",
          expect.arrayContaining([script]),
        ]);
    }
  });

  test("install the binary", async () => {
    using dir = tempDir();
    const [command = "", ...others] = commands.filter((one) => /^(?!genie |npx )/.test(one));
    expect(others).toEqual([]);
    buildIfStale();
    const args = [...command.split(" "), "--no-wait", "--host-root", dir.path];
    const child = Bun.spawn(args, { cwd: root, stderr: "pipe" });
    expect(await child.stderr.text()).toBe("");
    for (const path of ["opt/cni/bin/genie", "etc/cni/net.d/00-genie.conflist"]) {
      expect(existsSync(join(dir.path, path))).toBe(true);
    }
    expect(await child.exited).toBe(0);
  });
});

/** Every document, by its path from the root. */
const documents = [".", "docs"].flatMap((folder) =>
  readdirSync(join(root, folder))
    .filter((name) => name.endsWith(".md"))
    .map((name) => join(folder, name)),
);

/** The anchors of the headings of a document. */
function anchorsOf(path: string): string[] {
  return [...readFileSync(path, "utf8").matchAll(/^#+ (.*)$/gm)].map(([, title = ""]) =>
    title
      .toLowerCase()
      .replace(/[^\w -]/g, "")
      .replaceAll(" ", "-"),
  );
}

describe.each(documents)("%s", (name) => {
  const document = readFileSync(join(root, name), "utf8");

  test("names commands and options that exist", () => {
    const text = document.replace(/\s+/g, " ");
    for (const [, line = ""] of text.matchAll(/`((?:dist\/)?genie [a-z][^`]*)`/g)) {
      const [call = ""] = line.split(" | ");
      const [, verb = "", ...words] = call.replace(/^dist\//, "").split(" ");
      const command = Object.hasOwn(commandLines, verb) ? commandLines[verb] : undefined;
      const options = command ? optionsOf(command).map(({ name: option }) => option) : [];
      const known = verb === "help" || command !== undefined;
      const flags = words.flatMap((word) => /^--([a-z-]+)/.exec(word)?.[1] ?? []);
      expect([line, known, flags.filter((flag) => !options.includes(flag))]).toEqual([
        line,
        true,
        [],
      ]);
    }
  });

  test("has links that lead to a file and a heading", () => {
    const links = [...document.matchAll(/\]\((?!https?:)([^)#]*)#?([^)]*)\)/g)];
    const dead = links.filter(([, file = "", anchor = ""]) => {
      const path = file === "" ? join(root, name) : join(root, dirname(name), file);
      return !existsSync(path) || (anchor !== "" && !anchorsOf(path).includes(anchor));
    });
    expect(dead.map(([link]) => link)).toEqual([]);
  });

  test("names files that exist", () => {
    const paths = [...document.matchAll(/`((?:lib|tests|docs|\.ci)\/[\w./-]+)`/g)];
    const gone = paths.map(([, path = ""]) => path).filter((path) => !existsSync(join(root, path)));
    expect(gone).toEqual([]);
  });
});

describe("docs/architecture.md", () => {
  const text = readFileSync(join(root, "docs", "architecture.md"), "utf8");
  /** The cells of the tables under a heading, without code quotes. */
  const cells = (heading: string): string[][] => {
    const [, section = ""] = text.split(`\n## ${heading}\n`);
    return (section.split("\n## ")[0] ?? "")
      .split("\n")
      .filter((line) => line.startsWith("| `"))
      .map((line) => line.slice(2, -2).replaceAll("`", "").split(" | "));
  };
  const imports = product.flatMap((source) =>
    importsOf(source).flatMap((one) => {
      const to = pathOf(source, one);
      return to === undefined ? [] : [{ ...one, from: source.path, to }];
    }),
  );
  /** Without repetition, in order. */
  const sorted = (words: string[]) => [...new Set(words)].sort();

  test("lists every file of the plugin", () => {
    const own = product.map(({ path }) => path).filter((path) => /^lib\/[^/]+$/.test(path));
    const listed = cells("The plugin").map(([file = ""]) => `lib/${file}`);
    expect(listed.sort()).toEqual(own.sort());
  });

  test("lists every room, and which rooms it enters", () => {
    const entered = imports
      .map(({ from, to }) => [roomOf(from), roomOf(to)] as const)
      .filter(([from, to]) => from !== "" && !["", from, "config", "recovery"].includes(to));
    const rooms = sorted(product.map(({ path }) => roomOf(path))).filter((room) => room !== "");
    const expected = rooms.map((room) => {
      const to = sorted(entered.flatMap(([from, one]) => (from === room ? [one] : [])));
      return [room, to.join(", ") || "none"];
    });
    const listed = cells("The rooms").map(([room, , to]) => [room, to]);
    expect(listed.sort()).toEqual(expected);
  });

  test("lists every seam", () => {
    const seams = imports
      .filter(({ from, to, lazy }) => lazy && roomOf(from) === "" && roomOf(to) !== "")
      .map(({ from, to }) => `${from.replace("lib/", "")} to ${to.replace("lib/", "")}`);
    const listed = cells("The seams").map(([from, to]) => `${from} to ${to}`);
    expect(listed.sort()).toEqual(sorted(seams));
  });
});

/** What differs between two runs of the demo, taken out. */
function withoutChance(text: string): string {
  return text
    .replace(/\bgenie-demo-[0-9a-f]{6}\b/g, "genie-demo-ID")
    .replace(/@if\d+ +/g, "@ifN ")
    .replace(/\b198\.1([89])\.\d+\.(\d+)/g, "198.1$1.N.$2")
    .replace(/time=[\d.]+ ms/g, "time=T");
}

test.skipIf(lacks("the binary", ...demoNeeds))(
  "README, transcript is what the demo prints",
  async () => {
    using tmp = tempDir();
    const child = Bun.spawn([process.execPath, join(import.meta.dir, "demo", "demo.ts")], {
      env: { ...process.env, TMPDIR: tmp.path },
      stdout: "pipe",
      stderr: "pipe",
    });
    const printed = withoutChance(await child.stdout.text()).split("\n");
    const [transcript = ""] = blocks("console");
    // A command may go on in the demo.
    const missing = withoutChance(transcript)
      .trimEnd()
      .split("\n")
      .filter((line) => !printed.some((one) => one === line || one === `${line} \\`));
    expect(missing).toEqual([]);
    expect(await child.exited).toBe(0);
  },
);
