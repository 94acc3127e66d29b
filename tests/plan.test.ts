/**
 * The plan of an ADD, from the configuration it is made under (lib/settings.ts) and what the pod is
 * to have (lib/selection.ts) to the names of the interfaces. Nothing runs here.
 */
import { beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pluginSearch } from "../lib/binaries.ts";
import type { Plan, Request, StdinConfig } from "../lib/call.ts";
import { defaultConfig, parseConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { candidateNetworks } from "../lib/node_networks.ts";
import { findPod, makePlan } from "../lib/plan.ts";
import { annotationsCapability } from "../lib/pod.ts";
import { podLabel } from "../lib/request.ts";
import { nameInterfaces } from "../lib/selection.ts";
import { loadConfig, loadNodeSettings } from "../lib/settings.ts";
import { neededNetworks } from "../lib/status.ts";
import { fakePlugin, makeHost, tempDir } from "./fakes.ts";
import { failureOfAsync, fileDir, says } from "./stage.ts";

const dir = fileDir();
const confDir = join(dir.path, "net.d");
const emptyDir = join(dir.path, "empty.d");
const bin = join(dir.path, "bin");

beforeAll(() => {
  for (const path of [confDir, emptyDir, bin]) mkdirSync(path);
  for (const type of ["bridge", "macvlan", "portmap"]) fakePlugin(bin, type);
  symlinkSync(process.execPath, join(bin, "disguised"));
  const lists: [string, string, string[]][] = [
    ["00-genie.conflist", "k8s-pod-network", ["genie"]],
    ["10-blue.conflist", "blue", ["bridge", "portmap"]],
    ["20-green.conflist", "green", ["macvlan"]],
    ["30-red.conflist", "red", ["absent"]],
    ["40-self.conflist", "self", ["disguised"]],
  ];
  for (const [file, name, types] of lists) {
    const plugins = types.map((type) => ({
      type,
      ...(type === "portmap" && { capabilities: { mac: true } }),
    }));
    writeFileSync(join(confDir, file), JSON.stringify({ cniVersion: "1.0.0", name, plugins }));
  }
});

/** What a call throws, as the runtime sees it, the throw-away folder left out. */
const failure = (act: () => unknown) => failureOfAsync(act, [dir.path, "DIR"]);

const table = (text = "", folder = confDir): Config =>
  parseConfig(`conf_dir = "${folder}"\nbin_dirs = ["${bin}"]\n${text}`, "/p.toml");

/** A request of Kubernetes whose runtime hands over these annotations. */
function requestOf(
  annotations: Record<string, string> | undefined,
  {
    ifName = "eth0",
    args = "",
    config = {},
  }: { ifName?: string; args?: string; config?: object } = {},
): Request {
  const runtimeConfig = annotations && { [annotationsCapability]: annotations };
  return {
    command: "ADD",
    containerId: "c1",
    netns: "/n",
    ifName,
    args: args || "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;K8S_POD_UID=u-1",
    path: [],
    cniVersion: "1.1.0",
    config: { name: "genie", type: "genie", ...(runtimeConfig && { runtimeConfig }), ...config },
  };
}

const plan = async (config: Config, request: Request): Promise<Plan> => {
  const call = { host: makeHost(), config, request };
  return makePlan(call, await findPod(call));
};
/** A plan in short: `blue@eth0 asked for by cni`, the primary first. */
const short = ({ attachments }: Plan): string[] =>
  attachments.map(({ network, ifName, reason }) => `${network}@${ifName} ${reason}`);

describe("makePlan()", () => {
  test("plans every field", async () => {
    const config = table("timeout = '20s'\n[plugins.green]\ntimeout = '3s'");
    const request = requestOf(
      { cni: "blue,green" },
      {
        args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;cni=x",
        config: {
          args: { a: 1 },
          runtimeConfig: { [annotationsCapability]: { cni: "blue,green" }, mac: "c2:11", ips: [] },
        },
      },
    );
    const common = {
      containerId: "c1",
      requestIfName: "eth0",
      requestNetwork: "genie",
      reason: "asked for by cni",
      cniArgs: "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web",
      cniPath: `/first:${bin}`,
      args: { a: 1 },
      netns: "/n",
      pod: { namespace: "team", name: "web", uid: "" },
    };
    const { pod, attachments } = await plan(config, { ...request, path: ["/first"] });
    expect(pod.source).toBe("runtime");
    expect(attachments).toMatchObject([
      {
        ...common,
        ifName: "eth0",
        primary: true,
        network: "blue",
        list: { name: "blue", plugins: [{ type: "bridge" }, { type: "portmap" }] },
        plugins: [join(bin, "bridge"), join(bin, "portmap")],
        // NPWG §7.5, fact 38: to the primary alone.
        // Of what the runtime offers, what a plugin declares: annotations are not recorded.
        capabilityArgs: { mac: "c2:11" },
        timeoutMs: 20_000,
      },
      {
        ...common,
        ifName: "eth1",
        primary: false,
        network: "green",
        list: { name: "green", plugins: [{ type: "macvlan" }] },
        plugins: [join(bin, "macvlan")],
        capabilityArgs: {},
        timeoutMs: 3000,
      },
    ]);
    expect(attachments[1]?.capabilityArgs).toEqual({});
  });

  const defaults = "[default]\nnetworks = ['green', 'blue@eth7']";
  const always = "[default]\nnetworks = ['green']\nalways = ['blue']";
  const one = "[plugins.blue]";
  const mesosArgs = {
    "org.apache.mesos": {
      network_info: { name: "genie", labels: { labels: [{ key: "cni", value: "green,blue" }] } },
    },
  };
  test.each<[string, string, Request, string[]]>([
    ["one network", "", requestOf({ cni: "blue" }), ["blue@eth0 asked for by cni"]],
    [
      "several in their order",
      "",
      requestOf({ cni: "green,blue" }),
      ["green@eth0 asked for by cni", "blue@eth1 asked for by cni"],
    ],
    [
      "fact 34: the same network twice",
      "",
      requestOf({ cni: "blue,blue" }),
      ["blue@eth0 asked for by cni", "blue@eth1 asked for by cni"],
    ],
    [
      "the one with CNI_IFNAME first",
      "",
      requestOf({ cni: "blue@eth3,green,blue" }),
      ["green@eth0 asked for by cni", "blue@eth3 asked for by cni", "blue@eth1 asked for by cni"],
    ],
    [
      "the default networks",
      defaults,
      requestOf({}),
      ["green@eth0 default network", "blue@eth7 default network"],
    ],
    [
      "fact 36: cni in place of the default networks",
      defaults,
      requestOf({ cni: "blue" }),
      ["blue@eth0 asked for by cni"],
    ],
    ["the only candidate of the table", one, requestOf({}), ["blue@eth0 the only candidate"]],
    [
      "the only candidate, asked for",
      one,
      requestOf({ cni: "" }),
      ["blue@eth0 the only candidate"],
    ],
    [
      "the only candidate named",
      "select.candidates = ['green']",
      requestOf({}),
      ["green@eth0 the only candidate"],
    ],
    [
      "the only candidate even with a default",
      `${defaults}\n[select]\ncandidates = ['blue']`,
      requestOf({ cni: "" }),
      ["blue@eth0 the only candidate"],
    ],
    [
      "the best of several candidates",
      "[plugins.blue]\n[plugins.green]",
      requestOf({}),
      ["blue@eth0 best of 2 candidates by KPIs"],
    ],
    [
      "the best of several candidates on disk, genie none of them",
      "",
      requestOf({ cni: "" }),
      ["blue@eth0 best of 3 candidates by KPIs"],
    ],
    [
      "what every pod gets besides",
      always,
      requestOf({}),
      ["green@eth0 default network", "blue@net1 attached to every pod"],
    ],
    [
      "what every pod gets besides what it asks for",
      always,
      requestOf({ cni: "green,green" }),
      [
        "green@eth0 asked for by cni",
        "green@eth1 asked for by cni",
        "blue@net1 attached to every pod",
      ],
    ],
    [
      "what every pod gets once, where the pod asks for it too",
      always,
      requestOf({ cni: "green,blue@eth5" }),
      ["green@eth0 asked for by cni", "blue@eth5 asked for by cni"],
    ],
    [
      "nothing besides for a system namespace",
      always,
      requestOf({}, { args: "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns" }),
      ["green@eth0 default network"],
    ],
    [
      "pods of Mesos on its eth1",
      "",
      requestOf(undefined, { ifName: "eth1", args: " ", config: { args: mesosArgs } }),
      ["green@eth1 asked for by cni", "blue@eth0 asked for by cni"],
    ],
    [
      "pods of Nomad by CNI_ARGS",
      "",
      requestOf(undefined, { args: "IgnoreUnknown=true;NOMAD_JOB_ID=j;cni=blue,green@eth4" }),
      ["blue@eth0 asked for by cni", "green@eth4 asked for by cni"],
    ],
    [
      "pods of podman by the default",
      defaults,
      requestOf(undefined, { args: "IgnoreUnknown=1;K8S_POD_NAME=web" }),
      ["green@eth0 default network", "blue@eth7 default network"],
    ],
    [
      "a network the pod may use",
      "[plugins.blue]\nallow = { namespaces = ['team'] }",
      requestOf({ cni: "blue" }),
      ["blue@eth0 asked for by cni"],
    ],
  ])("plans %s", async (_name, text, request, expected) => {
    expect(short(await plan(table(text), request))).toEqual(expected);
  });

  const names = (count: number) => Array.from({ length: count }, () => "blue").join();
  const deny = "[plugins.blue]\ndeny = { namespaces = ['team'] }\n[plugins.green]\n";
  test.each<[string, string, Request, number, string]>([
    ["a network nobody knows", "", requestOf({ cni: "pink" }), 101, 'Unknown network "pink"'],
    ["a malformed annotation", "", requestOf({ cni: "a,,b" }), 7, 'Invalid annotation "cni"'],
    ["a name that climbs", "", requestOf({ cni: "../blue" }), 7, '"../blue" is not a network'],
    ["a name with NUL", "", requestOf({ cni: "blue\0" }), 7, "is not a network name"],
    ["a missing plugin", "", requestOf({ cni: "blue,red" }), 102, 'plugin "absent" is in none of'],
    ["genie by its type", "", requestOf({ cni: "k8s-pod-network" }), 7, "is genie itself"],
    ["genie by its file's name", "", requestOf({ cni: "genie" }), 7, "is genie itself"],
    ["genie by its file", "", requestOf({ cni: "self" }), 7, "is genie itself, name another"],
    ["genie as the only candidate", "select.candidates = ['self']", requestOf({}), 7, "itself"],
    ["a clash", "", requestOf({ cni: "blue@eth1,green@eth1" }), 105, 'Interface name "eth1"'],
    ["no CNI_IFNAME", "", requestOf({ cni: "blue@eth1" }), 7, "must have interface eth0"],
    ["33 networks", "", requestOf({ cni: names(33) }), 7, "at most 32 are allowed"],
    ["64 networks", "", requestOf({ cni: names(64) }), 7, "at most 32 are allowed"],
    [
      "32 networks and one for every pod",
      "[default]\nalways = ['green']",
      requestOf({ cni: names(32) }),
      7,
      "Cannot attach 33 networks to one pod: at most 32",
    ],
    ["no candidate", "select.candidates = []", requestOf({}), 101, "Cannot choose a network"],
    [
      "fact 40: a network the pod may not use",
      deny,
      requestOf({ cni: "green,blue" }),
      100,
      'Access to network "blue" denied for pod team/web: plugins.blue.deny.namespaces "team"',
    ],
    [
      "fact 40: a default network the pod may not use",
      `${deny}[default]\nnetworks = ['blue']`,
      requestOf({}),
      100,
      'Access to network "blue" denied',
    ],
    [
      "fact 40: a network for every pod that this one may not use",
      `${deny}[default]\nalways = ['blue']`,
      requestOf({ cni: "green" }),
      100,
      'Access to network "blue" denied',
    ],
    [
      "fact 40: the only candidate, which the pod may not use",
      `${deny}[select]\ncandidates = ['blue']`,
      requestOf({ cni: "" }),
      100,
      'Access to network "blue" denied for pod team/web: plugins.blue.deny.namespaces "team"',
    ],
    [
      "annotations of a wrong shape",
      "",
      requestOf({}, { config: { runtimeConfig: { [annotationsCapability]: [] } } }),
      7,
      "they are not an object",
    ],
  ])("refuses %s", async (_name, text, request, number, part) => {
    expect(await failure(() => plan(table(text), request))).toEqual(says(number, part));
  });

  test("refuses to choose where there is nothing", async () => {
    for (const folder of [emptyDir, "/nowhere/at/all"]) {
      expect(await failure(() => plan(table("", folder), requestOf({})))).toEqual(
        says(101, "Cannot choose a network: neither the plugin table nor"),
      );
    }
  });

  test("is the same each time", async () => {
    const request = requestOf({ cni: "blue@eth3,green,blue" });
    const [first, second] = [await plan(table(), request), await plan(table(), request)];
    expect(first.attachments).toEqual(second.attachments);
  });
});

describe("a pod that asks for nothing, where CNI-Genie's config names no default_plugin", () => {
  const genies = { datastore_type: "kubernetes", hostname: "n1", log_level: "info" };
  const first = "blue@eth0 default network (the first config list)";
  const chosen = expect.stringContaining("best of 3 candidates by KPIs");
  const planned = async (text: string, annotations: Record<string, string>, keys: object) => {
    const made = await plan(table(text), requestOf(annotations, { config: keys }));
    return [made.decision, ...short(made)];
  };
  test.each<[string, string, Record<string, string>, object, unknown[]]>([
    ["gets the first list", "", {}, genies, ["default", first]],
    ["by a key of any of its releases", "", {}, { policy: { type: "k8s" } }, ["default", first]],
    [
      "gets what every pod gets besides, once",
      "default.always = ['blue', 'green']",
      {},
      genies,
      ["default", first, "green@net1 attached to every pod"],
    ],
    ["leaves the choice to genie by an empty cni", "", { cni: "" }, genies, ["choice", chosen]],
    ["of genie's own config is chosen for", "", {}, { log_level: "info" }, ["choice", chosen]],
    [
      "is chosen for where the table has networks",
      "[plugins.green]",
      {},
      genies,
      ["choice", "green@eth0 the only candidate"],
    ],
    [
      "gets default.networks",
      "default.networks = ['green']",
      {},
      genies,
      ["default", "green@eth0 default network"],
    ],
  ])("%s", async (_name, text, annotations, keys, expected) => {
    expect<unknown[]>(await planned(text, annotations, keys)).toEqual(expected);
  });

  test("also where its file is in the conf dir, and STATUS asks that list", async () => {
    const folder = join(dir.path, "genies.d");
    mkdirSync(folder);
    const lists = { "00-genie.conf": { name: "k8s", type: "genie", ...genies } };
    const bridged = { name: "b", type: "bridge" };
    for (const [file, value] of Object.entries({
      ...lists,
      "20-b.conf": bridged,
      "10-a.conf": { name: "a", type: "macvlan" },
    })) {
      writeFileSync(join(folder, file), JSON.stringify(value));
    }
    const config = table("", folder);
    expect(short(await plan(config, requestOf({})))).toEqual([
      "a@eth0 default network (the first config list)",
    ]);
    const { needed, candidates } = await neededNetworks(
      config,
      pluginSearch(config, requestOf({})),
    );
    expect([needed.map(({ name }) => name), candidates]).toEqual([["a"], undefined]);
  });
});

describe("a network asked for by any of its names", () => {
  const names = ["brown", "file", "35-file"];
  const folder = join(dir.path, "names.d");
  beforeAll(() => {
    mkdirSync(folder);
    const brown = { cniVersion: "1.0.0", name: "brown", plugins: [{ type: "bridge" }] };
    writeFileSync(join(folder, "35-file.conflist"), JSON.stringify(brown));
  });
  const deny = 'deny = { namespaces = ["*"] }';
  const alias = '[plugins.alias]\nconf = "35-file.conflist"\n';

  test.each([
    ["an empty table", "", "brown"],
    ["an entry of its CNI name", "[plugins.brown]", "brown"],
    ["an entry of its file name", "[plugins.file]", "file"],
    ["an entry with its file", alias, "alias"],
  ])("has one name with %s", async (_what, text, name) => {
    for (const asked of names) {
      expect(short(await plan(table(text, folder), requestOf({ cni: asked })))).toEqual([
        `${name}@eth0 asked for by cni`,
      ]);
    }
  });

  test.each([
    ["CNI name", `[plugins.brown]\n${deny}`],
    ["file name", `[plugins.file]\n${deny}`],
    ["whole file name", `[plugins.35-file]\n${deny}`],
    ["file", alias + deny],
    ["one of two entries", `${alias}${deny}\n[plugins.b]\nconf = "35-file.conflist"`],
    ["default", 'access.default = "deny"'],
  ])("is denied under each, by a rule on its %s", async (_what, text) => {
    for (const cni of names) {
      const refused = await failure(() => plan(table(text, folder), requestOf({ cni })));
      expect(refused).toMatchObject({ code: 100 });
    }
  });

  test.each(["brown", "file", "35-file"])("is allowed under each, by %s", async (entry) => {
    const text = `access.default = "deny"\n[plugins.${entry}]\nallow = { namespaces = ["team"] }`;
    for (const cni of names) {
      const { attachments } = await plan(table(text, folder), requestOf({ cni }));
      expect(attachments.map(({ network }) => network)).toEqual([entry]);
    }
  });

  test("is not attached once more for every pod", async () => {
    for (const always of names) {
      const config = table(`default.always = ["${always}"]`, folder);
      for (const cni of names) {
        expect(short(await plan(config, requestOf({ cni })))).toHaveLength(1);
      }
      expect(short(await plan(config, requestOf({ cni: "" })))).toHaveLength(1);
    }
  });
});

test("names each folder once where CNI_PATH and bin_dirs are the same", async () => {
  const request = { ...requestOf({ cni: "red" }), path: [bin] };
  const { msg } = await failure(() => plan(table(), request));
  expect(msg).toContain('plugin "absent" is in none of DIR/bin, install it or extend bin_dirs');
});

test("candidateNetworks() takes the table before the disk, and never genie", () => {
  const names = (text: string) => {
    const config = table(text);
    return candidateNetworks(config, pluginSearch(config, requestOf({})));
  };
  expect([
    names(""),
    names("[plugins.green]"),
    names("select.candidates = ['a', 'b']\n[plugins.green]"),
    names("[plugins.self]\n[plugins.blue]"),
  ]).toEqual([["blue", "green", "red"], ["green"], ["a", "b"], ["blue"]]);
});

test.each([
  ["", "", "(unnamed)"],
  ["team", "", "(unnamed)"],
  ["", "web", "web"],
  ["team", "web", "team/web"],
])("podLabel() of %j and %j", (namespace, name, label) => {
  expect(podLabel({ namespace, name })).toBe(label);
});

describe("nameInterfaces()", () => {
  const element = (text: string) => {
    const [network = "", ifName] = text.split("@");
    return { network, ...(ifName !== undefined && { ifName }) };
  };
  const elements = (text: string) => (text === "" ? [] : text.split(",").map(element));
  const names = (primary: string, further: string, requestIfName: string) =>
    nameInterfaces(elements(primary), elements(further), requestIfName)
      .map(({ network, ifName }) => `${network}@${ifName}`)
      .join();

  test.each([
    ["one", "a", "", "eth0", "a@eth0"],
    ["eth0, eth1 ... for the primary set", "a,b,c", "", "eth0", "a@eth0,b@eth1,c@eth2"],
    [
      "a name asked for, the first unnamed CNI_IFNAME",
      "a@eth3,b,a",
      "",
      "eth0",
      "b@eth0,a@eth3,a@eth1",
    ],
    ["no name someone asked for", "a,b@eth1,c", "", "eth0", "a@eth0,b@eth1,c@eth2"],
    ["no name someone asked for later", "a,b,c@eth1", "", "eth0", "a@eth0,b@eth2,c@eth1"],
    ["CNI_IFNAME to who asked for it, then first", "a,b@eth0", "", "eth0", "b@eth0,a@eth1"],
    ["another CNI_IFNAME", "a,b", "", "net0", "a@net0,b@eth0"],
    ["the eth1 of Mesos", "a,b,c", "", "eth1", "a@eth1,b@eth0,c@eth2"],
    ["net1, net2 ... besides", "a,b", "x,y", "eth0", "a@eth0,b@eth1,x@net1,y@net2"],
    [
      "names besides that are not taken",
      "a,b@net1",
      "x,y@net2",
      "eth0",
      "a@eth0,b@net1,x@net3,y@net2",
    ],
    ["CNI_IFNAME like the names besides", "a", "x", "net1", "a@net1,x@net2"],
    ["CNI_IFNAME to one besides that asked for it", "a", "x@eth0", "eth0", "x@eth0,a@eth1"],
  ])("gives %s", (_name, primary, further, requestIfName, expected) => {
    expect(names(primary, further, requestIfName)).toBe(expected);
  });

  const many = (count: number) => Array.from({ length: count }, () => "a").join();
  test.each<[string, string, string, number, string]>([
    ["two of one name", "a@eth1,b@eth1", "", 105, 'wanted by network "a" and by network "b"'],
    ["the same network twice with one name", "a@eth1,a@eth1", "", 105, "give one of them another"],
    ["one of each set with one name", "a,b@net1", "x@net1", 105, '"net1" is wanted by network "b"'],
    ["CNI_IFNAME unused", "a@eth1", "", 7, "Cannot attach a@eth1: one of them must have interface"],
    ["CNI_IFNAME unused by several", "a@eth1,b@eth2", "x", 7, "a@eth1,b@eth2,x@net1: one of them"],
    ["none at all", "", "", 7, "one of them must have interface eth0"],
    ["33", many(33), "", 7, "Cannot attach 33 networks to one pod: at most 32 are allowed"],
    ["64", many(32), many(32), 7, "Cannot attach 64 networks to one pod"],
  ])("refuses %s", async (_name, primary, further, number, part) => {
    expect(await failure(() => names(primary, further, "eth0"))).toEqual(says(number, part));
  });
});

describe("loadConfig()", () => {
  const write = (name: string, text: string): string => {
    const path = join(dir.path, name);
    writeFileSync(path, text);
    return path;
  };
  /** An empty table, so that none of the machine's own is read. */
  const stdinOf = (keys: object): StdinConfig => ({
    name: "k8s-pod-network",
    type: "genie",
    plugins_file: write("empty.toml", ""),
    ...keys,
  });

  // What CNI-Genie ships and documents, placeholders filled in as its launch.sh does.
  const shipped = {
    log_level: "info",
    datastore_type: "kubernetes",
    hostname: "node-1",
    policy: { type: "k8s", k8s_auth_token: "t0ken" },
    kubernetes: {
      k8s_api_root: "https://10.96.0.1:443",
      kubeconfig: "/etc/cni/net.d/genie-kubeconfig",
    },
    romana_root: "http://:",
    segment_label_name: "romanaSegment",
  };
  const kubernetes = {
    ...defaultConfig().kubernetes,
    apiRoot: "https://10.96.0.1:443",
    authToken: "t0ken",
    kubeconfig: "/etc/cni/net.d/genie-kubeconfig",
    kubeconfigIsExplicit: true,
  };
  test.each<[string, object, object]>([
    ["conf/1.5/genie.yaml", shipped, { kubernetes }],
    [
      "conf/1.8/genie-plugin.yaml",
      { ...shipped, cniVersion: "0.2.0", romana_root: "http://10.96.0.99:9600" },
      { kubernetes },
    ],
    [
      "sampleconfigs/Default-plugin-support",
      { default_plugin: "weave", ...shipped },
      { kubernetes, default: { ...defaultConfig().default, networks: ["weave"] } },
    ],
    [
      "a default of two plugins",
      { ...shipped, default_plugin: "weave,calico" },
      { kubernetes, default: { ...defaultConfig().default, networks: ["weave", "calico"] } },
    ],
    [
      "sampleconfigs/CAdvisor-customization",
      { ...shipped, cAdvisor_address: "http://127.0.0.1:5050" },
      { kubernetes },
    ],
    [
      "docs/HLD.md",
      {
        etcd_endpoints: "http://10.96.232.136:6666",
        log_level: "debug",
        policy: {
          type: "k8s",
          k8s_api_root: "https://10.96.0.1:443",
          k8s_auth_token: "t0ken",
        },
        kubernetes: { kubeconfig: "/etc/cni/net.d/genie-kubeconfig" },
      },
      { kubernetes, logLevel: "debug" },
    ],
  ])("takes CNI-Genie's %s unchanged", async (_name, keys, changed) => {
    const stdin = stdinOf(keys);
    expect(await loadConfig(stdin)).toEqual({
      ...defaultConfig(),
      file: String(stdin["plugins_file"]),
      ...changed,
    });
  });

  test("reads the table that is named, the CNI config's keys over it", async () => {
    const file = write("plugins.toml", "log_level = 'warn'\nresult = 'primary'\n[plugins.a]\n");
    const config = await loadConfig(stdinOf({ plugins_file: file, log_level: "debug" }));
    expect([config.file, config.result, config.logLevel, [...config.plugins.keys()]]).toEqual([
      file,
      "primary",
      "debug",
      ["a"],
    ]);
  });

  test("leaves nothing behind where the parsed table cannot be kept", async () => {
    const state = join(dir.path, "unkept");
    mkdirSync(join(state, "table.json"), { recursive: true });
    const file = write("unkept.toml", `state_dir = "${state}"\n`);
    expect((await loadConfig(stdinOf({ plugins_file: file }))).stateDir).toBe(state);
    expect(readdirSync(state)).toEqual(["table.json"]);
  });

  test("a default plugin written by CNI-Genie's users is attached", async () => {
    const file = write("two.toml", `conf_dir = "${confDir}"\nbin_dirs = ["${bin}"]\n`);
    const config = await loadConfig(stdinOf({ plugins_file: file, default_plugin: "green, blue" }));
    expect(short(await plan(config, requestOf({})))).toEqual([
      "green@eth0 default network",
      "blue@eth1 default network",
    ]);
  });

  test.each<[string, () => object, number, string]>([
    ["a relative file", () => ({ plugins_file: "p.toml" }), 7, '"plugins_file" is not an absolute'],
    ["a file that is a list", () => ({ plugins_file: ["/p"] }), 7, '"plugins_file" is not an'],
    [
      "a file that was named and is missing",
      () => ({ plugins_file: join(dir.path, "none.toml") }),
      7,
      "Cannot read plugin table DIR/none.toml: ENOENT",
    ],
    ["a folder", () => ({ plugins_file: dir.path }), 5, "expected a regular file"],
    [
      "a table that is wrong, with file, line and key",
      () => ({ plugins_file: write("wrong.toml", "\n[default]\nnetwork = []") }),
      7,
      'Invalid plugin table "DIR/wrong.toml" line 3: "default.network" is not a known key',
    ],
    [
      "a table that is not UTF-8",
      () => {
        const path = write("latin.toml", "");
        writeFileSync(path, Buffer.from([0x61, 0xff]));
        return { plugins_file: path };
      },
      7,
      'latin.toml" line 1: not valid TOML',
    ],
    ["a large table", () => ({ plugins_file: write("l", "#".repeat(2 ** 20 + 1)) }), 5, "at most"],
    ["a key that is wrong", () => ({ kubernetes: [] }), 7, '"kubernetes" is not an object'],
  ])("refuses %s", async (_name, keys, number, part) => {
    expect(await failure(() => loadConfig(stdinOf(keys())))).toEqual(says(number, part));
  });
});

describe("loadNodeSettings()", () => {
  const settings = async (text: string | undefined, keys: object = {}) => {
    using own = tempDir();
    const file = join(own.path, "plugins.toml");
    if (text !== undefined) writeFileSync(file, text);
    const host = makeHost();
    const found = await loadNodeSettings(host, { name: "a", plugins_file: file, ...keys });
    return { ...found, log: host.log, stderr: host.written.stderr };
  };
  const none = {
    stateDir: "/var/lib/cni/genie",
    delRetryWindowMs: 600_000,
    auditKeepMs: 2_592_000_000,
    log: { level: "info", file: "" },
    stderr: "",
  } as const;
  const read = {
    stateDir: "/s",
    delRetryWindowMs: 60_000,
    auditKeepMs: 2_592_000_000,
    log: { level: "debug", file: "/l" },
    stderr: "",
  } as const;
  const head = "state_dir = '/s'\nlog_level = 'debug'\nlog_file = '/l'\ndel_retry_window = '1m'\n";
  const warns = { ...none, stderr: expect.stringMatching(/^genie: warn: Cannot read .*\n$/) };
  test.each<[string, string | undefined, object, object]>([
    ["an empty table", "", {}, none],
    ["a whole table", head, {}, read],
    [
      "the CNI config's level over it",
      head,
      { log_level: "error" },
      { ...read, log: { level: "error", file: "/l" } },
    ],
    ["fact 9: a table that became wrong", `${head}[default]\nnetwork = 1`, {}, read],
    ["fact 9: a table that is no TOML any more", `${head}[[[\nx`, {}, read],
    ["fact 9: a table that is gone", undefined, {}, none],
    ["fact 9: a folder in its place", "", { plugins_file: "/" }, warns],
    ["fact 9: a path that became wrong", "", { plugins_file: "p.toml" }, warns],
    ["fact 9: keys that became wrong", "", { log_level: 1, kubernetes: [], policy: 2 }, none],
  ])("reads %s", async (_name, text, keys, expected) => {
    expect(await settings(text, keys)).toEqual(expected as typeof read);
  });

  test("fact 27: state is not kept where CRI-O and libcni keep results", async () => {
    expect((await settings("")).stateDir).not.toStartWith("/var/lib/cni/results");
  });
});
