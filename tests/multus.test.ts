/**
 * Moving in from Multus (lib/config/foreign_config.ts): each key of its config, and whole configs
 * of its documentation with only `type` changed, down to the plan of a pod.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Request, StdinConfig } from "../lib/call.ts";
import { isMultusConfig, multusLevelOf, withMultusConfig } from "../lib/config/foreign_config.ts";
import { defaultConfig, parseConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { findPod, makePlan } from "../lib/plan.ts";
import { guessPlan } from "../lib/recovery/guess.ts";
import { loadConfig, loadNodeSettings } from "../lib/settings.ts";
import { status } from "../lib/status.ts";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { fakePlugin, makeHost, tempDir } from "./fakes.ts";
import { configList, failureOfAsync, says } from "./stage.ts";

const dir = tempDir();
const at = (...parts: string[]) => join(dir.path, ...parts);
let api: ApiServer;

const list = (name: string, type: string, more: object = {}) =>
  configList(name, [{ type, ...more }], "1.0.0");
const definition = (namespace: string, name: string, config?: object) =>
  api.put(
    `/apis/k8s.cni.cncf.io/v1/namespaces/${namespace}/network-attachment-definitions/${name}`,
    {
      metadata: { name, namespace },
      spec: config === undefined ? {} : { config: JSON.stringify(config) },
    },
  );

beforeAll(async () => {
  for (const name of ["net.d", "cluster.d", "empty.d", "bin"]) mkdirSync(at(name));
  for (const type of ["flannel", "calico", "macvlan", "weave-net"]) fakePlugin(at("bin"), type);
  writeFileSync(at("empty.toml"), `state_dir = "${at("state")}"\nbin_dirs = []\n`);
  const files: Record<string, object> = {
    "net.d/10-flannel.conflist": list("cbr0", "flannel"),
    "net.d/20-side.conf": { cniVersion: "0.4.0", name: "sidecar", type: "macvlan" },
    "cluster.d/20-calico.conflist": list("k8s-pod-network", "calico"),
    "cluster.d/10-flannel.conf": { cniVersion: "0.4.0", name: "first", type: "flannel" },
  };
  for (const [name, value] of Object.entries(files)) {
    writeFileSync(at(name), JSON.stringify(value));
  }
  api = await startApiServer(at("api"), { keepAlive: false });
  definition("kube-system", "sidecarCRD".toLowerCase(), { cniVersion: "0.4.0", type: "macvlan" });
  definition("kube-system", "by-name");
  definition("kube-system", "calico-conf", list("calico", "calico"));
  definition("infra", "calico-conf", list("infra-calico", "calico"));
  writeFileSync(at("net.d/30-by-name.conflist"), JSON.stringify(list("by-name", "calico")));
});
afterAll(async () => {
  await api.stop();
  dir[Symbol.dispose]();
});

/** A Multus config as in docs/configuration.md, `type` changed, paths of this test. */
const multus = (keys: object = {}): StdinConfig => ({
  cniVersion: "1.0.0",
  name: "node-cni-network",
  type: "genie",
  plugins_file: at("empty.toml"),
  kubeconfig: api.kubeconfig("token"),
  confDir: at("net.d"),
  binDir: at("bin"),
  ...keys,
});

const request = (
  config: StdinConfig,
  { annotations = {}, namespace = "team" }: { annotations?: object; namespace?: string } = {},
): Request => ({
  command: "ADD",
  containerId: "c1",
  netns: "/n",
  ifName: "eth0",
  args: `K8S_POD_NAMESPACE=${namespace};K8S_POD_NAME=web`,
  path: [],
  cniVersion: "1.0.0",
  config: { ...config, runtimeConfig: { "io.kubernetes.cri.pod-annotations": annotations } },
});

/** A plan in short: `cbr0@eth0 flannel`, the primary first. */
async function plan(config: StdinConfig, pod = {}): Promise<string[]> {
  const call = {
    host: makeHost(),
    config: await loadConfig(config),
    request: request(config, pod),
  };
  const { attachments } = await makePlan(call, await findPod(call));
  return attachments.map(
    ({ network, ifName, list: { plugins } }) =>
      `${network}@${ifName} ${plugins.map(({ type }) => type)}`,
  );
}

const failure = (act: () => unknown) => failureOfAsync(act, [dir.path, "DIR"]);

describe("withMultusConfig(), key by key", () => {
  const base = (keys: object): StdinConfig => ({ name: "m", clusterNetwork: "a", ...keys });
  const own = defaultConfig();
  const kubernetes = own.kubernetes;
  const networks = { namespace: "kube-system", clusterNetwork: "a", defaultNetworks: [] };
  /** What a config of nothing but clusterNetwork gives. */
  const bare: Config = { ...own, confDir: "/etc/cni/multus/net.d", multus: networks };

  test.each<[string, object, Partial<Config>]>([
    ["clusterNetwork alone", {}, {}],
    ["clusterNetwork", { clusterNetwork: "b" }, { multus: { ...networks, clusterNetwork: "b" } }],
    [
      "defaultNetworks",
      { defaultNetworks: ["x", "/y"] },
      { multus: { ...networks, defaultNetworks: ["x", "/y"] } },
    ],
    [
      "multusNamespace",
      { multusNamespace: "infra" },
      { multus: { ...networks, namespace: "infra" } },
    ],
    ["confDir", { confDir: "/c" }, { confDir: "/c" }],
    ["binDir, besides the usual", { binDir: "/b" }, { binDirs: ["/b", ...own.binDirs] }],
    [
      "kubeconfig",
      { kubeconfig: "/k" },
      { kubernetes: { ...kubernetes, kubeconfig: "/k", kubeconfigIsExplicit: true } },
    ],
    [
      "namespaceIsolation",
      { namespaceIsolation: true },
      { kubernetes: { ...kubernetes, namespaceIsolation: true } },
    ],
    [
      "globalNamespaces, without default unless it is named",
      { globalNamespaces: "infra, shared," },
      { kubernetes: { ...kubernetes, globalNamespaces: ["infra", "shared"] } },
    ],
    [
      "systemNamespaces",
      { systemNamespaces: ["kube-system", "admin"] },
      { default: { ...own.default, systemNamespaces: ["kube-system", "admin"] } },
    ],
    ["readinessindicatorfile", { readinessindicatorfile: "/r" }, { readinessFile: "/r" }],
    ["logFile", { logFile: "/l" }, { logFile: "/l" }],
    ["logLevel debug", { logLevel: "debug" }, { logLevel: "debug" }],
    ["logLevel verbose", { logLevel: "verbose" }, { logLevel: "info" }],
    ["logLevel error", { logLevel: "error" }, { logLevel: "error" }],
    ["logLevel panic", { logLevel: "panic" }, { logLevel: "error" }],
    ["a logLevel that Multus would ignore", { logLevel: "loud" }, {}],
    [
      "keys that have no meaning here",
      {
        cniDir: "/d",
        logToStderr: false,
        logOptions: { maxAge: 5 },
        capabilities: { portMappings: true },
        retryDeleteOnError: true,
        auxiliaryCNIChainName: "x",
      },
      {},
    ],
    [
      "empty keys and null as absent",
      {
        confDir: "",
        binDir: "",
        kubeconfig: null,
        namespaceIsolation: null,
        globalNamespaces: "",
        systemNamespaces: null,
        defaultNetworks: null,
        delegates: null,
        multusNamespace: "",
        readinessindicatorfile: "",
        logFile: "",
        logLevel: "",
      },
      {},
    ],
  ])("takes %s", (_name, keys, expected) => {
    expect(withMultusConfig(defaultConfig(), base(keys))).toEqual({ ...bare, ...expected });
  });

  test.each<[string, object]>([
    ["clusterNetwork", { clusterNetwork: ["a"] }],
    ["clusterNetwork", { clusterNetwork: 1 }],
    ["defaultNetworks", { defaultNetworks: "x" }],
    ["defaultNetworks.0", { defaultNetworks: [1] }],
    ["delegates", { clusterNetwork: "", delegates: { type: "x" } }],
    ["delegates.0", { clusterNetwork: "", delegates: ["x"] }],
    ["delegates.1", { delegates: [{ type: "x" }, []] }],
    ["confDir", { confDir: 1 }],
    ["binDir", { binDir: ["/b"] }],
    ["kubeconfig", { kubeconfig: {} }],
    ["namespaceIsolation", { namespaceIsolation: "true" }],
    ["globalNamespaces", { globalNamespaces: ["a"] }],
    ["systemNamespaces", { systemNamespaces: "a" }],
    ["multusNamespace", { multusNamespace: 1 }],
    ["readinessindicatorfile", { readinessindicatorfile: true }],
    ["logFile", { logFile: 1 }],
    ["logLevel", { logLevel: 1 }],
  ])("refuses a wrong %s: %j", async (key, keys) => {
    expect(await failure(() => withMultusConfig(defaultConfig(), base(keys)))).toEqual(
      says(7, `Invalid network config: "${key}"`),
    );
  });

  test("a config that is not Multus' stays as it is", () => {
    const config = defaultConfig();
    const stdin = { name: "genie", confDir: "/x", logLevel: "debug" };
    expect(isMultusConfig(stdin)).toBe(false);
    expect(withMultusConfig(config, stdin)).toBe(config);
  });

  test.each([
    ["debug", "debug"],
    ["verbose", "info"],
    ["toString", undefined],
    [1, undefined],
  ])("multusLevelOf(%j) is %p", (name, expected) => {
    expect(multusLevelOf(name)).toBe(expected as never);
  });

  test("DEL logs as ADD does", async () => {
    const host = makeHost();
    await loadNodeSettings(host, multus({ logLevel: "debug", logFile: "/l" }));
    expect(host.log).toEqual({ level: "debug", file: "/l" });
  });
});

describe("withMultusConfig(), delegates", () => {
  const read = (delegates: object[], keys: object = {}, config = defaultConfig()) =>
    withMultusConfig(config, { name: "m", cniVersion: "0.3.1", delegates, ...keys } as StdinConfig);

  test("the first is the default network, the others every pod's", () => {
    const config = read([
      { type: "weave-net", hairpinMode: true },
      { cniVersion: "1.0.0", name: "side", plugins: [{ type: "macvlan" }] },
      { type: "ptp" },
    ]);
    expect(config.default).toEqual({
      networks: ["m"],
      always: ["side", "m-3"],
      systemNamespaces: ["kube-system"],
    });
    // As in Multus, a delegate without a version has that of the whole.
    expect([...config.plugins.values()]).toEqual([
      {
        name: "m",
        line: 0,
        config: { type: "weave-net", hairpinMode: true, cniVersion: "0.3.1", name: "m" },
      },
      {
        name: "side",
        line: 0,
        config: { cniVersion: "1.0.0", name: "side", plugins: [{ type: "macvlan" }] },
      },
      { name: "m-3", line: 0, config: { type: "ptp", cniVersion: "0.3.1", name: "m-3" } },
    ]);
  });

  test("clusterNetwork wins over them", () => {
    const config = read([{ type: "weave-net" }], { clusterNetwork: "cbr0" });
    expect([config.default.networks, config.plugins.size, config.multus?.clusterNetwork]).toEqual([
      [],
      0,
      "cbr0",
    ]);
  });

  test("the table's rules for a name stay", () => {
    const table = parseConfig(
      "[plugins.side]\nconf = 'x.conf'\ntimeout = '3s'\ndeny = { namespaces = ['a'] }",
      "/p.toml",
    );
    const found = read([{ name: "side", type: "ptp" }], {}, table).plugins.get("side");
    expect(found).toMatchObject({ timeoutMs: 3000, deny: { namespaces: ["a"] }, line: 1 });
    expect([found?.conf, found?.config?.["type"]]).toEqual([undefined, "ptp"]);
  });
});

describe("a Multus config with only its type changed", () => {
  test("docs/configuration.md, clusterNetwork by file, two default networks", async () => {
    const config = multus({
      logFile: at("multus.log"),
      logLevel: "debug",
      logOptions: { maxAge: 5, maxSize: 100, maxBackups: 5, compress: true },
      capabilities: { portMappings: true },
      cniDir: "/var/lib/cni/multus",
      namespaceIsolation: false,
      clusterNetwork: at("net.d/10-flannel.conflist"),
      defaultNetworks: ["sidecarcrd", "sidecar"],
      systemNamespaces: ["kube-system", "admin"],
      multusNamespace: "kube-system",
      allowTryDeleteOnErr: false,
    });
    expect(await plan(config)).toEqual([
      "cbr0@eth0 flannel",
      "kube-system/sidecarcrd@net1 macvlan",
      "sidecar@net2 macvlan",
    ]);
    for (const namespace of ["kube-system", "admin"]) {
      expect(await plan(config, { namespace })).toEqual(["cbr0@eth0 flannel"]);
    }
    // Both at once would be Calico twice in a container.
    for (const network of ["kube-system/calico-conf", "infra/calico-conf"]) {
      const annotations = { "k8s.v1.cni.cncf.io/networks": network };
      expect(await plan(config, { annotations })).toEqual([
        "cbr0@eth0 flannel",
        "kube-system/sidecarcrd@net1 macvlan",
        "sidecar@net2 macvlan",
        `${network}@net3 calico`,
      ]);
    }
  });

  test("docs/configuration.md, delegates", async () => {
    const config = multus({
      delegates: [
        { type: "weave-net", hairpinMode: true },
        { type: "macvlan", name: "side", cniVersion: "0.3.1" },
      ],
    });
    expect(await plan(config)).toEqual(["node-cni-network@eth0 weave-net", "side@net1 macvlan"]);
  });

  test.each<[string, string, string]>([
    ["an object of its namespace", "calico-conf", "kube-system/calico-conf@eth0 calico"],
    ["an object without a config", "by-name", "kube-system/by-name@eth0 calico"],
    ["a CNI name on disk", "cbr0", "cbr0@eth0 flannel"],
    ["a single config by its CNI name", "sidecar", "sidecar@eth0 macvlan"],
    ["a folder: its first file", "$DIR/cluster.d", "first@eth0 flannel"],
    ["a file", "$DIR/cluster.d/20-calico.conflist", "k8s-pod-network@eth0 calico"],
    ["a single config's file", "$DIR/net.d/20-side.conf", "sidecar@eth0 macvlan"],
  ])("clusterNetwork as %s", async (_name, clusterNetwork, expected) => {
    const name = clusterNetwork.replace("$DIR", dir.path);
    expect(await plan(multus({ clusterNetwork: name }))).toEqual([expected]);
    const side = multus({
      clusterNetwork: at("net.d/10-flannel.conflist"),
      defaultNetworks: [name],
    });
    expect(await plan(side)).toEqual(["cbr0@eth0 flannel", expected.replace("eth0", "net1")]);
  });

  test("another multusNamespace", async () => {
    const config = multus({ clusterNetwork: "calico-conf", multusNamespace: "infra" });
    expect(await plan(config)).toEqual(["infra/calico-conf@eth0 calico"]);
  });

  test.each<[string, string, number, string]>([
    ["a name that nothing has", "nothing", 101, 'Unknown network "nothing" of the Multus config'],
    ["an empty folder", "$DIR/empty.d", 101, "DIR/empty.d has no config list"],
    ["a file that is not there", "$DIR/none.conf", 5, "Cannot read network config DIR/none.conf"],
    ["a name that is a path out", "../net.d", 5, "Cannot read network config ../net.d"],
  ])("refuses clusterNetwork as %s", async (_name, clusterNetwork, code, part) => {
    const name = clusterNetwork.replace("$DIR", dir.path);
    expect(await failure(() => plan(multus({ clusterNetwork: name })))).toEqual(says(code, part));
  });

  test("asks no API for a file, and for a name only whether it is an object", async () => {
    api.requests.length = 0;
    await plan(multus({ clusterNetwork: at("net.d/10-flannel.conflist") }));
    expect(api.requests).toEqual([]);
    await plan(multus({ clusterNetwork: "cbr0" }));
    expect(api.requests.map(({ method, path }) => `${method} ${path}`)).toEqual([
      "GET /apis/k8s.cni.cncf.io/v1/namespaces/kube-system/network-attachment-definitions/cbr0",
    ]);
  });

  test("an API that is away is no answer: no other network instead", async () => {
    api.misbehave({ kind: "reset" }, { kind: "reset" });
    expect((await failure(() => plan(multus({ clusterNetwork: "cbr0" })))).code).toBe(11);
  });

  test("without a kubeconfig, names are those of the disk", async () => {
    const config = multus({ clusterNetwork: "cbr0", kubeconfig: null });
    expect(await plan(config)).toEqual(["cbr0@eth0 flannel"]);
  });

  test("the pod's own default network is looked up in multusNamespace", async () => {
    const own = (text: string) => ({ annotations: { "v1.multus-cni.io/default-network": text } });
    for (const keys of [{ clusterNetwork: "cbr0" }, { delegates: [{ type: "weave-net" }] }]) {
      expect(await plan(multus(keys), own("calico-conf"))).toEqual([
        "kube-system/calico-conf@eth0 calico",
      ]);
      expect(await plan(multus(keys), own("infra/calico-conf"))).toEqual([
        "infra/calico-conf@eth0 calico",
      ]);
    }
  });

  test("isolation holds for every way a pod can name an object (Multus forgets one)", async () => {
    const config = (keys: object = {}) =>
      multus({ clusterNetwork: "cbr0", namespaceIsolation: true, ...keys });
    const asked = [
      { "k8s.v1.cni.cncf.io/networks": "infra/calico-conf" },
      { "k8s.v1.cni.cncf.io/networks": '[{"name":"calico-conf","namespace":"infra"}]' },
      { "v1.multus-cni.io/default-network": "infra/calico-conf" },
    ];
    for (const annotations of asked) {
      expect(await failure(() => plan(config(), { annotations }))).toEqual(
        says(100, 'Access to network "infra/calico-conf" denied for pod team/web'),
      );
      const open = config({ globalNamespaces: "default,infra" });
      expect((await plan(open, { annotations })).at(-1)).toStartWith("infra/calico-conf@");
      expect((await plan(config(), { annotations, namespace: "infra" })).length).toBeGreaterThan(0);
    }
    // What the operator names is not the pod's choice.
    expect(await plan(config())).toEqual(["cbr0@eth0 flannel"]);
  });

  test("DEL without a record guesses what is on disk, and asks nobody", async () => {
    api.requests.length = 0;
    for (const clusterNetwork of ["cbr0", at("net.d/10-flannel.conflist"), at("cluster.d")]) {
      const config = multus({ clusterNetwork, defaultNetworks: ["sidecar", "sidecarcrd"] });
      const { attachments, problems } = await guessPlan(await loadConfig(config), request(config));
      expect(attachments.map(({ ifName }) => ifName)).toEqual(["eth0", "net1"]);
      expect(problems.map(({ code }) => code)).toEqual([101]);
    }
    expect(api.requests).toEqual([]);
  });
});

describe("STATUS under a Multus config", () => {
  const ask = (keys: object) => status(makeHost(), request(multus(keys)));

  test.each<[string, object]>([
    ["an object", { clusterNetwork: "calico-conf" }],
    ["a name on disk", { clusterNetwork: "cbr0" }],
    ["a file", { clusterNetwork: "$DIR/net.d/10-flannel.conflist" }],
    ["delegates", { delegates: [{ type: "weave-net" }] }],
    ["a readiness file that is there", { clusterNetwork: "cbr0", readinessindicatorfile: "$DIR" }],
  ])("is fine with %s, and asks no API", async (_name, keys) => {
    api.requests.length = 0;
    await ask(JSON.parse(JSON.stringify(keys).replaceAll("$DIR", dir.path)));
    expect(api.requests).toEqual([]);
  });

  test.each<[string, object, string]>([
    ["a file that is not there", { clusterNetwork: "/none/x.conf" }, "/none/x.conf"],
    ["an empty folder", { clusterNetwork: "$DIR/empty.d" }, "DIR/empty.d has no config list"],
    ["a missing plugin", { delegates: [{ type: "absent" }] }, 'plugin "absent" is in none of'],
    [
      "a readiness file that is not there",
      { clusterNetwork: "cbr0", readinessindicatorfile: "/none/ready" },
      "The default network is not ready: /none/ready does not exist",
    ],
  ])("says 50 for %s", async (_name, keys, part) => {
    const own = JSON.parse(JSON.stringify(keys).replaceAll("$DIR", dir.path));
    expect(await failure(() => ask(own))).toEqual(says(50, part));
  });
});
