/** From a name to a config list: the table, the conf dir, its folders; and where plugins are. */
import { beforeAll, describe, expect, test } from "bun:test";
import { chmodSync, mkdirSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { delegatesToOurself, findPlugin, findPlugins } from "../lib/binaries.ts";
import { CniError } from "../lib/cni.ts";
import { parseConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { isObject } from "../lib/json.ts";
import { type Network, type NetworkConfigList, resolveNetwork } from "../lib/networks.ts";
import { listNetworks } from "../lib/node_networks.ts";
import { networkName } from "../lib/recovery/network_name.ts";
import { readSmallFile } from "../lib/streams.ts";
import { fakePlugin } from "./fakes.ts";
import { failureOf, fileDir, says } from "./stage.ts";

const dir = fileDir();
const confDir = join(dir.path, "net.d");
const bin = join(dir.path, "bin");
const otherBin = join(dir.path, "other");

/** A list of version 1.0.0, as a file holds it. */
const listOf = (name: string, ...types: string[]) => ({
  cniVersion: "1.0.0",
  name,
  plugins: types.map((type) => ({ type })),
});
/** The same as it is resolved. */
const resolved = (name: string, ...types: string[]): NetworkConfigList => ({
  ...listOf(name, ...types),
  cniVersion: "1.0.0",
  disableCheck: false,
  disableGC: false,
});

/** Writes a file below the conf dir; a text stays as it is. */
function writeConf(name: string, content: unknown): string {
  const path = join(confDir, name);
  mkdirSync(join(path, ".."), { recursive: true });
  writeFileSync(path, isObject(content) ? JSON.stringify(content) : String(content));
  return path;
}

const table = (text: string): Config => parseConfig(`conf_dir = "${confDir}"\n${text}`, "/p.toml");

beforeAll(() => {
  mkdirSync(bin);
  mkdirSync(otherBin);
  for (const type of ["bridge", "portmap"]) fakePlugin(bin, type);
  writeConf("10-calico.conflist", listOf("k8s-pod-network", "calico", "portmap"));
  writeConf("20-weave.conf", { cniVersion: "0.3.0", name: "weave-net", type: "weave-net" });
  writeConf("30-first.json", listOf("canal", "bridge"));
  // Answers to `blue` by its file's name, while another has that CNI name.
  writeConf("05-blue.conflist", listOf("green", "bridge"));
  writeConf("40-other.conflist", listOf("blue", "portmap"));
  writeConf("50-twice.conflist", listOf("canal", "portmap"));
  writeConf("60-broken.conflist", "{");
  writeConf("61-empty.conflist", listOf("empty"));
  writeConf("62-newer.conflist", { ...listOf("newer", "bridge"), cniVersion: "2.0.0" });
  writeConf("63-latin.conf", Buffer.from([0x7b, 0xff, 0x7d]).toString("latin1"));
  writeConf("64-large.conf", " ".repeat(1024 * 1024 + 1));
  writeConf("65-deep.conf", "[".repeat(100_000));
  writeConf("70-note.txt", listOf("note", "bridge"));
  mkdirSync(join(confDir, "71-folder.conflist"));
  symlinkSync("nowhere", join(confDir, "72-dangling.conflist"));
  writeConf("80-split.conflist", { cniVersion: "1.0.0", name: "split" });
  writeConf("split/20-b.conf", { type: "portmap", n: 2 });
  writeConf("split/10-a.conf", { type: "bridge", n: 1 });
  writeConf("split/30-c.conflist", { type: "not-read" });
  writeConf("81-mixed.conflist", { ...listOf("mixed", "bridge") });
  writeConf("mixed/10.conf", { type: "portmap" });
  writeConf("82-inlined.conflist", {
    ...listOf("inlined", "bridge"),
    loadOnlyInlinedPlugins: true,
  });
  writeConf("inlined/10.conf", { type: "portmap" });
  writeConf("83-spoilt.conflist", listOf("spoilt", "bridge"));
  writeConf("cni-flannel.conflist", listOf("cbr0", "flannel"));
  writeConf("a-many.conflist", listOf("many-a", "bridge"));
  writeConf("b-many.conflist", listOf("many-b", "bridge"));
  writeConf("spoilt/10.conf", { type: "../sh" });
});

/** What a call throws, as the runtime sees it, the throw-away folder left out. */
const failure = (act: () => unknown) => failureOf(act, [confDir, "NET"]);

/** A network, its path relative to the conf dir. */
function short({ list, source, name }: Network) {
  return { name, list, source: source.replace(`${confDir}/`, "") };
}

describe("resolveNetwork() finds", () => {
  test.each<[string, string, string, NetworkConfigList]>([
    [
      "a list by its CNI name",
      "k8s-pod-network",
      "10-calico.conflist",
      resolved("k8s-pod-network", "calico", "portmap"),
    ],
    [
      "a list by its file's name without number",
      "calico",
      "10-calico.conflist",
      resolved("k8s-pod-network", "calico", "portmap"),
    ],
    [
      "a list by what follows the first dash of its file's name, as CNI-Genie does",
      "flannel",
      "cni-flannel.conflist",
      resolved("cbr0", "flannel"),
    ],
    [
      "a list by its file's whole name",
      "10-calico",
      "10-calico.conflist",
      resolved("k8s-pod-network", "calico", "portmap"),
    ],
    [
      "a single config",
      "weave",
      "20-weave.conf",
      {
        ...resolved("weave-net"),
        cniVersion: "0.3.0",
        plugins: [
          { type: "weave-net", cniVersion: "0.3.0", name: "weave-net" } as { type: string },
        ],
      },
    ],
    [
      "a list by CNI name before one by file name",
      "blue",
      "40-other.conflist",
      resolved("blue", "portmap"),
    ],
    ["the first of two with one name", "canal", "30-first.json", resolved("canal", "bridge")],
    [
      "fact 17: plugins in the folder of the list, in order",
      "split",
      "80-split.conflist",
      {
        ...resolved("split"),
        plugins: [{ type: "bridge", n: 1 } as { type: string }, { type: "portmap", n: 2 } as never],
      },
    ],
    [
      "fact 17: plugins in the folder, behind the inlined ones",
      "mixed",
      "81-mixed.conflist",
      resolved("mixed", "bridge", "portmap"),
    ],
    [
      "fact 17: no plugin in the folder with loadOnlyInlinedPlugins",
      "inlined",
      "82-inlined.conflist",
      resolved("inlined", "bridge"),
    ],
  ])("%s", (_name, name, source, list) => {
    expect(short(resolveNetwork(table(""), name))).toEqual({ name, list, source });
  });

  const inline = `
[plugins.storage.config]
cniVersion = "1.1.0"
[[plugins.storage.config.plugins]]
type = "macvlan"
id = 9223372036854775807
[plugins.named.config]
cniVersion = "1.0.0"
name = "its-own"
type = "bridge"
[plugins.split.config]
cniVersion = "1.0.0"
`;
  test.each<[string, string, string, string, NetworkConfigList]>([
    [
      "an entry's file in the conf dir",
      "[plugins.a]\nconf = '10-calico.conflist'",
      "a",
      "10-calico.conflist",
      resolved("k8s-pod-network", "calico", "portmap"),
    ],
    [
      "an entry's file elsewhere",
      `[plugins.a]\nconf = '${confDir}/30-first.json'`,
      "a",
      "30-first.json",
      resolved("canal", "bridge"),
    ],
    [
      "an entry without file by its name",
      "[plugins.calico]",
      "calico",
      "10-calico.conflist",
      resolved("k8s-pod-network", "calico", "portmap"),
    ],
    [
      "an entry before a list on disk",
      "[plugins.blue]\nconf = '30-first.json'",
      "blue",
      "30-first.json",
      resolved("canal", "bridge"),
    ],
    [
      "a list in the table, named as its entry",
      inline,
      "storage",
      "plugins.storage.config",
      {
        ...resolved("storage"),
        cniVersion: "1.1.0",
        plugins: [{ type: "macvlan", id: expect.anything() } as { type: string }],
      },
    ],
    [
      "a list in the table with a name of its own",
      inline,
      "named",
      "plugins.named.config",
      {
        ...resolved("its-own"),
        plugins: [{ cniVersion: "1.0.0", name: "its-own", type: "bridge" } as { type: string }],
      },
    ],
    [
      "fact 17: a list in the table with plugins in a folder",
      inline,
      "split",
      "plugins.split.config",
      {
        ...resolved("split"),
        plugins: [{ type: "bridge", n: 1 } as { type: string }, { type: "portmap", n: 2 } as never],
      },
    ],
  ])("%s", (_name, text, name, source, list) => {
    const config = table(text);
    const network = resolveNetwork(config, name);
    expect(short(network)).toEqual({ name, list, source });
    expect(network.entry).toBe(config.plugins.get(name) as never);
  });

  test("fact 14: a big integer of the table as it was written", () => {
    const { list } = resolveNetwork(table(inline), "storage");
    expect(JSON.stringify(list.plugins)).toBe('[{"type":"macvlan","id":9223372036854775807}]');
  });
});

describe("resolveNetwork() refuses", () => {
  test.each<[string, string, string, number, string]>([
    [
      "a name nobody has",
      "",
      "red",
      101,
      'Unknown network "red": neither the plugin table nor NET',
    ],
    ["what follows the first dash of two", "", "many", 101, 'Unknown network "many"'],
    ["a name that climbs", "", "../10-calico", 101, 'network "../10-calico": it is not a network'],
    ["a path", "", "/etc/passwd", 101, "it is not a network name"],
    ["a name of two lines", "", "a\nb", 101, 'network "a b": it is not a network name'],
    ["a name with NUL", "", "calico\0", 101, "it is not a network name"],
    ["a name every object has", "", "constructor", 101, 'Unknown network "constructor"'],
    ["a key that could change every object", "", "__proto__", 101, "it is not a network name"],
    ["a file of another kind", "", "note", 101, 'Unknown network "note"'],
    ["a broken file", "", "broken", 6, "Cannot decode NET/60-broken.conflist: it is not valid"],
    ["a file without plugins", "", "empty", 7, "NET/61-empty.conflist: it has no plugins"],
    ["a file of later", "", "newer", 1, 'NET/62-newer.conflist: it names "2.0.0"'],
    ["a file that is not UTF-8", "", "latin", 6, "Cannot decode NET/63-latin.conf"],
    ["a large file", "", "large", 5, "a regular file of at most 1048576 bytes"],
    ["a deep file", "", "deep", 6, "NET/65-deep.conf: it nests deeper than 128 levels"],
    ["a folder for a file", "", "folder", 5, "NET/71-folder.conflist: expected a regular file"],
    ["a link to nothing", "", "dangling", 5, "network config NET/72-dangling.conflist: ENOENT"],
    ["fact 17: a bad plugin in the folder", "", "spoilt", 7, 'plugin type "../sh"'],
    ["an entry whose file is gone", "[plugins.a]\nconf = 'a.conf'", "a", 5, "NET/a.conf: ENOENT"],
    [
      "an entry nothing belongs to",
      "[plugins.red]",
      "red",
      101,
      'network "red": plugins.red at /p.toml:2 has neither conf nor config, and NET has no list',
    ],
    [
      "an entry whose list is not valid",
      "[plugins.a.config]\nplugins = [{ type = 'a/b' }]",
      "a",
      7,
      'network config plugins.a.config: plugin type "a/b"',
    ],
    [
      "an entry whose list has no plugins",
      "[plugins.a.config]\ncniVersion = '1.0.0'",
      "a",
      7,
      "plugins.a.config: it has no plugins",
    ],
  ])("%s", (_name, text, name, number, part) => {
    expect(failure(() => resolveNetwork(table(text), name))).toEqual(says(number, part));
  });

  test("any name where there is no conf dir", () => {
    const config = parseConfig('conf_dir = "/nowhere/at/all"', "");
    expect(failure(() => resolveNetwork(config, "a"))).toEqual(
      says(101, "nor /nowhere/at/all has it, known are none"),
    );
  });

  test("a conf dir that is a file", () => {
    const file = writeConf("90-file", "");
    const config = parseConfig(`conf_dir = "${file}"`, "");
    expect(failure(() => resolveNetwork(config, "a"))).toEqual(
      says(5, "Cannot read folder NET/90-file"),
    );
  });

  test("our own list is no network that could be asked for", () => {
    writeConf("00-genie.conflist", {
      cniVersion: "1.0.0",
      name: "own",
      plugins: [{ type: "genie" }],
    });
    try {
      expect(failure(() => resolveNetwork(table(""), "red")).msg).not.toMatch(/known are.*own/);
    } finally {
      rmSync(join(confDir, "00-genie.conflist"));
    }
  });

  test("an unknown name with the known ones beside it, and details of the broken", () => {
    try {
      resolveNetwork(table(""), "red");
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
      expect(error.message).toContain("known are green, k8s-pod-network, weave-net, canal, blue");
      expect(error.details).toContain("60-broken.conflist: it is not valid JSON");
    }
  });
});

describe("networkName() is one for all names of a network:", () => {
  const entry = (name: string, text = "") => `[plugins.${name}]\n${text}\n`;
  const inFile = (name: string) => entry(name, 'conf = "10-calico.conflist"');
  const inline = entry("k8s-pod-network", 'config = { plugins = [{ type = "bridge" }] }');
  test.each<[string, string, string[], string]>([
    ["the CNI name", "", ["calico", "10-calico", "k8s-pod-network"], "k8s-pod-network"],
    ["also with CNI-Genie's file names", "", ["flannel", "cni-flannel", "cbr0"], "cbr0"],
    ["the first list of a CNI name", "", ["canal", "first", "30-first"], "canal"],
    ["not the CNI name that leads to the first", "", ["50-twice"], "50-twice"],
    ["what was asked for, where nothing has it", "", ["nothing"], "nothing"],
    ["what was asked for, where it is broken", "", ["60-broken"], "60-broken"],
    [
      "the table entry of its file",
      inFile("storage"),
      ["storage", "calico", "10-calico", "k8s-pod-network"],
      "storage",
    ],
    ["the entry of its file name", entry("calico"), ["10-calico", "k8s-pod-network"], "calico"],
    [
      "the entry of its CNI name",
      entry("k8s-pod-network"),
      ["calico", "10-calico", "k8s-pod-network"],
      "k8s-pod-network",
    ],
    [
      "no entry of two",
      inFile("a") + inFile("b"),
      ["calico", "k8s-pod-network"],
      "k8s-pod-network",
    ],
    ["an entry of two by its own name", inFile("a") + inFile("b"), ["b"], "b"],
    ["not an entry with a list of its own", inline, ["calico"], "calico"],
    [
      "not an entry of its CNI name with another file",
      entry("k8s-pod-network", 'conf = "20-weave.conf"'),
      ["calico"],
      "calico",
    ],
  ])("%s", (_what, text, names, name) => {
    const config = table(text);
    expect(names.map((one) => networkName(config, one))).toEqual(names.map(() => name));
  });
});

describe("listNetworks()", () => {
  test("lists the table first, then what is on disk under another name", () => {
    const config = table("[plugins.calico]\n[plugins.red]\n[plugins.blue]\nconf = '30-first.json'");
    const { networks, problems } = listNetworks(config);
    expect(networks.map(({ name, source }) => `${name} ${source.replace(confDir, "NET")}`)).toEqual(
      [
        "calico NET/10-calico.conflist",
        "blue NET/30-first.json",
        "green NET/05-blue.conflist",
        "weave-net NET/20-weave.conf",
        "split NET/80-split.conflist",
        "mixed NET/81-mixed.conflist",
        "inlined NET/82-inlined.conflist",
        "many-a NET/a-many.conflist",
        "many-b NET/b-many.conflist",
        "cbr0 NET/cni-flannel.conflist",
      ],
    );
    expect(problems.map(({ code: number }) => number)).toEqual([101, 6, 7, 1, 6, 5, 6, 5, 5, 7]);
  });
});

describe("readSmallFile()", () => {
  test("reads 1 MiB", () => {
    const text = "x".repeat(1024 * 1024);
    expect(readSmallFile(writeConf("91-mib", text))).toBe(text);
  });
});

const network = (...types: string[]): Network => ({
  name: "net",
  list: resolved("net", ...types),
  source: "/n/10-net.conflist",
});

describe("findPlugins()", () => {
  beforeAll(() => {
    fakePlugin(otherBin, "bridge");
    fakePlugin(otherBin, "other");
    writeFileSync(join(bin, "not-executable"), "", { mode: 0o644 });
    mkdirSync(join(bin, "a-folder"));
    symlinkSync(process.execPath, join(bin, "disguised"));
    symlinkSync(join(bin, "disguised"), join(otherBin, "disguised-twice"));
    symlinkSync("nowhere", join(bin, "dangling"));
    chmodSync(bin, 0o755);
  });
  const search = (...dirs: string[]) => ({ dirs, ownType: "genie" });

  test.each<[string, string[], string[], string[]]>([
    ["each plugin in order", ["portmap", "bridge"], [bin], ["bin/portmap", "bin/bridge"]],
    ["the first folder's", ["bridge"], [bin, otherBin], ["bin/bridge"]],
    ["one from each folder", ["bridge", "other"], [bin, otherBin], ["bin/bridge", "other/other"]],
    ["the first folder's when the order differs", ["bridge"], [otherBin, bin], ["other/bridge"]],
    ["past a folder that is absent", ["bridge"], ["/nowhere", bin], ["bin/bridge"]],
    ["past a file for a folder", ["bridge"], [join(bin, "portmap"), bin], ["bin/bridge"]],
  ])("finds %s", (_name, types, dirs, expected) => {
    expect(findPlugins(network(...types), search(...dirs))).toEqual(
      expected.map((path) => join(dir.path, path)),
    );
  });

  test.each<[string, string[], string[], number, string]>([
    ["a missing plugin", ["bridge", "absent"], [bin], 102, 'plugin "absent" is in none of '],
    ["a plugin without folders", ["bridge"], [], 102, 'plugin "bridge" is in none of no folder'],
    ["a relative folder", ["bridge"], ["bin", "."], 102, 'plugin "bridge" is in none of bin, .'],
    ["a file that cannot run", ["not-executable"], [bin], 102, '"not-executable" is in none'],
    ["a folder for a plugin", ["a-folder"], [bin], 102, '"a-folder" is in none'],
    ["a link to nothing", ["dangling"], [bin], 102, '"dangling" is in none'],
    ["a type as long as it may be", ["a".repeat(255)], [bin], 102, "install it or extend bin_dirs"],
    ["genie by its type", ["genie"], [bin], 7, 'its plugin "genie" in /n/10-net.conflist is genie'],
    ["genie in a chain", ["bridge", "genie"], [bin], 7, "is genie itself, name another network"],
    ["genie by its file", ["disguised"], [bin], 7, 'its plugin "disguised"'],
    ["genie behind two links", ["disguised-twice"], [otherBin], 7, 'plugin "disguised-twice"'],
  ])("refuses %s", (_name, types, dirs, number, part) => {
    expect(failure(() => findPlugins(network(...types), search(...dirs)))).toEqual(
      says(number, part),
    );
  });

  test("refuses genie by the type the runtime calls it by", () => {
    const renamed = { dirs: [bin], ownType: "bridge" };
    expect(failure(() => findPlugins(network("bridge"), renamed))).toEqual(
      says(7, 'its plugin "bridge" in /n/10-net.conflist is genie itself'),
    );
  });

  test.each<[string[], string | undefined, boolean]>([
    [["bridge"], "genie", false],
    [["bridge", "genie"], undefined, true],
    [["bridge"], "bridge", true],
    [["disguised"], "genie", true],
    [["absent"], "genie", false],
  ])("delegatesToOurself() of %j called as %p", (types, ownType, does) => {
    expect(delegatesToOurself(network(...types), { dirs: [bin], ownType })).toBe(does);
  });

  test("findPlugin() finds nothing by a name that leaves the folder", () => {
    expect(findPlugin("nothing", [bin, otherBin])).toBeUndefined();
    expect(findPlugin("bridge", [bin])).toBe(join(bin, "bridge"));
  });
});
