/**
 * Access, through the compiled program (lib/policy/access.ts): every way to name a
 * network × every kind of rule, quotas under concurrency, who counts as a witness, and how a denial
 * is told: error, ledger, Event, plan.
 */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { join } from "node:path";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { calls, tempDir } from "./fakes.ts";
import {
  checkFailure,
  compiledGenie,
  left,
  makeNode,
  type Node,
  nothing,
  spawnGenie,
  type WireCall,
  wire,
  wireError,
  writeTable,
} from "./wire.ts";

const dir = tempDir();
const networksKey = "k8s.v1.cni.cncf.io/networks";
const defaultKey = "v1.multus-cni.io/default-network";
const podArgs = "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;K8S_POD_UID=u-1";
let api: ApiServer;
beforeAll(async () => {
  api = await startApiServer(join(dir.path, "api"), { keepAlive: false });
  const put = (path: string, name: string, spec: object) =>
    api.put(`/apis/${path}/${name}`, { metadata: { name, namespace: "team" }, spec });
  const objects = "k8s.cni.cncf.io/v1/namespaces/team/network-attachment-definitions";
  const config = { cniVersion: "1.0.0", type: "macvlan", master: "eth0" };
  put(objects, "a", { config: JSON.stringify(config) });
  put(objects, "green", {});
  put("alpha.network.k8s.io/v1/namespaces/team/logicalnetworks", "n1", { plugin: "green" });
  api.put("/api/v1/namespaces/team/pods/web", {
    metadata: { name: "web", namespace: "team", uid: "u-1" },
    spec: { serviceAccountName: "runner" },
  });
});
afterAll(async () => {
  await api.stop();
  dir[Symbol.dispose]();
});
beforeEach(() => {
  api.requests.length = 0;
});

const reserve = "$DIR/reserved";
/** A table: its keys at the top, `defaults` of [default], and whether there is an API. */
function tableOf(rules = "", defaults = 'networks = ["blue"]', hasApi = true): string {
  const kubernetes = hasApi ? `kubernetes.kubeconfig = "${api.kubeconfig("token")}"` : "";
  return `${kubernetes}\n[default]\n${defaults}\n${rules}\n`;
}
function nodeWith(table: string): Node {
  const list = (name: string, type: string) => ({
    cniVersion: "1.0.0",
    name,
    plugins: [{ type, ipam: { type: "host-local", subnet: "10.1.0.0/24" } }],
  });
  return makeNode({
    table,
    lists: {
      "10-blue.conflist": list("blue", "bridge"),
      "20-green.conflist": list("green", "ptp"),
    },
    delegates: {
      bridge: { reserve, ips: ["10.0.0.2/24"] },
      ptp: { reserve, ips: ["10.1.0.2/24"] },
      macvlan: { reserve, ips: ["10.2.0.2/24"] },
    },
  });
}

type Annotations = Record<string, string>;
interface How extends Omit<WireCall, "command" | "stdin"> {
  annotations?: Annotations;
  config?: object;
  args?: string;
}
function call(node: Node, command: string, { annotations = {}, config, args, env }: How = {}) {
  const runtimeConfig = { "io.kubernetes.cri.pod-annotations": annotations };
  return wire(node, {
    command,
    env: { CNI_ARGS: args ?? podArgs, ...env },
    stdin: { runtimeConfig, ...config },
  });
}
/** The error of a call, 0 for none. */
async function codeOf(node: Node, command: string, how?: How): Promise<number> {
  const run = await call(node, command, how);
  return run.status === 0 ? 0 : checkFailure(run);
}

/** Where the network lies: on the node, in an object, or in an object that names one on disk. */
type Where = "node" | "object" | "disk";
interface Way extends How {
  where: Where;
  defaults?: string;
}
const multus = (keys: object) => ({ multusNamespace: "team", ...keys });
const ways: Record<string, Way> = {
  cni: { where: "node", annotations: { cni: "green" } },
  "cni, as the second": { where: "node", annotations: { cni: "blue,green" } },
  "default.networks": { where: "node", defaults: 'networks = ["green"]' },
  "default.always": { where: "node", defaults: 'networks = ["blue"]\nalways = ["green"]' },
  "an automatic choice": {
    where: "node",
    annotations: { cni: "" },
    defaults: '[select]\ncandidates = ["green"]',
  },
  "a logical network": { where: "node", annotations: { cni: "", networks: "n1" } },
  "Multus' clusterNetwork on disk": {
    where: "node",
    config: multus({ clusterNetwork: "green", multusNamespace: "none" }),
  },
  "Multus' delegates": {
    where: "node",
    config: multus({ delegates: [{ cniVersion: "1.0.0", name: "green", type: "ptp" }] }),
  },
  "the NPWG annotation": { where: "object", annotations: { [networksKey]: "a" } },
  "the NPWG annotation in JSON": {
    where: "object",
    annotations: { [networksKey]: '[{"name":"a","namespace":"team"}]' },
  },
  "default-network": { where: "object", annotations: { [defaultKey]: "team/a" } },
  "default.always, an object": {
    where: "object",
    defaults: 'networks=["blue"]\nalways=["team/a"]',
  },
  "Multus' clusterNetwork": { where: "object", config: multus({ clusterNetwork: "a" }) },
  "Multus' defaultNetworks": {
    where: "object",
    config: multus({ clusterNetwork: "blue", defaultNetworks: ["a"] }),
  },
  "Multus' clusterNetwork, an object on disk": {
    where: "disk",
    config: multus({ clusterNetwork: "green" }),
  },
  "the NPWG annotation, on disk": { where: "disk", annotations: { [networksKey]: "green" } },
  "default-network, on disk": { where: "disk", annotations: { [defaultKey]: "team/green" } },
};
/** Rules, and where they deny. */
const rules: Record<string, { table: string; denies: Where[] }> = {
  "no rule": { table: "", denies: [] },
  "deny of the network": {
    table: '[plugins.green]\ndeny = { namespaces = ["te*"] }',
    denies: ["node", "disk"],
  },
  "allow of others": {
    table: '[plugins.green]\nallow = { pods = ["team/db"] }',
    denies: ["node", "disk"],
  },
  "allow of this pod": { table: '[plugins.green]\nallow = { pods = ["team/w?b"] }', denies: [] },
  "a closed node": {
    table: '[access]\ndefault = "deny"\n[plugins.blue]\nallow = { namespaces = ["*"] }',
    denies: ["node", "object", "disk"],
  },
  "types of objects": {
    table: '[[access.nad]]\nnamespaces = ["*"]\ntypes = ["bridge"]',
    denies: ["object", "disk"],
  },
  "devices of objects": {
    table: '[[access.nad]]\nnamespaces = ["*"]\nmasters = ["eth1"]',
    denies: ["object"],
  },
  "objects on disk alone": {
    table: '[[access.nad]]\nnamespaces = ["*"]\nconfig_on_disk = true',
    denies: ["object"],
  },
  "a closed node that admits objects": {
    table:
      '[access]\ndefault = "deny"\n[plugins.blue]\nallow = { namespaces = ["*"] }\n' +
      '[[access.nad]]\nnamespaces = ["team"]\nmasters = ["eth0"]',
    denies: ["node", "disk"],
  },
};

describe("by whatever way a network is named", () => {
  const rows = Object.entries(ways).flatMap(([way, how]) =>
    Object.entries(rules).map(([name, { table, denies }]) => {
      return [way, name, how, table, denies.includes(how.where) ? 100 : 0] as const;
    }),
  );
  test.each(rows)("%s, %s", async (_way, _rule, how, table, expected) => {
    using node = nodeWith(tableOf(table, how.defaults));
    const asked = how.config ? { ...how, config: { ...how.config, confDir: node.conf } } : how;
    expect(await codeOf(node, "ADD", asked)).toBe(expected);
    if (expected !== 0) {
      expect(calls(node.bin)).toEqual([]);
      expect(left(node)).toEqual(nothing);
    }
    api.requests.length = 0;
    // What may be no more must still go, and asks nobody.
    const deny = '[access]\ndefault = "deny"\nnad = []\nmax_attachments = { pod = 1 }';
    writeTable(node, tableOf(deny, how.defaults));
    if (expected === 0) expect(await codeOf(node, "CHECK", asked)).toBe(0);
    expect(await codeOf(node, "DEL", asked)).toBe(0);
    expect(left(node)).toEqual(nothing);
    expect(api.requests).toEqual([]);
  });

  test.each(
    Object.entries(ways).filter(([way, { where }]) => where !== "object" && !/delegates/.test(way)),
  )("%s, which a rule knows by its file", async (_, how) => {
    const rule = '[plugins.store]\nconf = "20-green.conflist"\ndeny = { namespaces = ["team"] }';
    using node = nodeWith(tableOf(rule, how.defaults));
    const asked = how.config ? { ...how, config: { ...how.config, confDir: node.conf } } : how;
    expect(await codeOf(node, "ADD", asked)).toBe(100);
  });

  test("GC looks at no rule either", async () => {
    using node = nodeWith(tableOf());
    expect(await codeOf(node, "ADD")).toBe(0);
    writeTable(node, tableOf('[access]\ndefault = "deny"'));
    const valid = { "cni.dev/valid-attachments": [] };
    expect(await codeOf(node, "GC", { config: valid })).toBe(0);
    expect(left(node)).toEqual(nothing);
  });
});

describe("quotas", () => {
  const quota = (keys: string) => `[access]\nmax_attachments = { ${keys} }`;

  test("six ADDs at once do not get past that of the namespace", async () => {
    using node = nodeWith(tableOf(quota("namespace = 3")));
    const pod = (n: number): How => ({
      env: { CNI_CONTAINERID: `c${n}` },
      args: podArgs.replace("web", `web-${n}`),
    });
    const codes = await Promise.all([1, 2, 3, 4, 5, 6].map((n) => codeOf(node, "ADD", pod(n))));
    expect(codes.toSorted()).toEqual([0, 0, 0, 100, 100, 100]);
    expect(left(node).rows).toHaveLength(3);
    // Another namespace has its own; one that ends makes room; the refused are deleted in peace.
    const other = { ...pod(7), args: podArgs.replace("=team", "=other") };
    expect(await codeOf(node, "ADD", other)).toBe(0);
    const [first = 0] = codes.flatMap((one, i) => (one === 0 ? [i + 1] : []));
    const [refused = 0] = codes.flatMap((one, i) => (one === 100 ? [i + 1] : []));
    expect(await codeOf(node, "DEL", pod(refused))).toBe(0);
    expect(await codeOf(node, "ADD", pod(refused))).toBe(100);
    expect(await codeOf(node, "DEL", pod(first))).toBe(0);
    expect(await codeOf(node, "ADD", pod(refused))).toBe(0);
  });

  test.each([
    ["as many as allowed", "pod = 2", "blue,green", 0],
    ["one more", "pod = 1", "blue,green", 100],
    ["the same twice", "pod = 1", "blue,blue", 100],
    ["more than the namespace may have", "namespace = 1", "blue,green", 100],
  ])("of a pod: %s", async (_, keys, cni, expected) => {
    using node = nodeWith(tableOf(quota(keys)));
    const how = { annotations: { cni } };
    expect(await codeOf(node, "ADD", how)).toBe(expected);
    if (expected !== 0) expect([calls(node.bin), left(node)]).toEqual([[], nothing]);
    expect(await codeOf(node, "DEL", how)).toBe(0);
  });

  test("count every call of a container, and an ADD again but once", async () => {
    using node = nodeWith(tableOf(quota("pod = 1")));
    const second = { env: { CNI_IFNAME: "eth7" } };
    expect(await codeOf(node, "ADD")).toBe(0);
    const run = await call(node, "ADD", second);
    expect(wireError(run)).toEqual({
      cniVersion: "1.1.0",
      code: 100,
      msg:
        'Access to networks "blue" denied for pod team/web: they are 1, the pod has 1 on this ' +
        "node, and access.max_attachments.pod is 1",
      details: expect.stringMatching(/^access\.max_attachments\.pod at .*plugins\.toml:\d+$/),
    });
    // The namespace of a container that was started again: what was there is undone, not counted.
    await Bun.write(node.netns, "");
    expect(await codeOf(node, "DEL")).toBe(0);
    expect(await codeOf(node, "ADD", second)).toBe(0);
  });

  test("that of a namespace says nothing to what has none", async () => {
    using node = nodeWith(tableOf(quota("namespace = 1")));
    for (const id of ["c1", "c2"]) {
      expect(await codeOf(node, "ADD", { args: "", env: { CNI_CONTAINERID: id } })).toBe(0);
    }
  });
});

describe("witnesses", () => {
  const allow = (text: string) => `[plugins.green]\nallow = { ${text} }`;
  const claims: Annotations = {
    cni: "green",
    serviceAccountName: "root",
    "kubernetes.io/service-account.name": "root",
    "spec.serviceAccountName": "root",
    K8S_POD_NAMESPACE: "vip",
    namespace: "vip",
    "kubernetes.io/metadata.name": "vip",
  };
  test.each([
    ["its service account", 'service_accounts = ["team/root"]'],
    ["its namespace", 'namespaces = ["vip"]'],
    ["its name", 'pods = ["vip/*"]'],
  ])("what a pod writes of itself is none: %s", async (_, rule) => {
    using node = nodeWith(tableOf(allow(rule)));
    expect(await codeOf(node, "ADD", { annotations: claims })).toBe(100);
    using other = nodeWith(tableOf(allow(rule), "", false));
    expect(await codeOf(other, "ADD", { annotations: claims })).toBe(100);
  });

  const needs = allow('service_accounts = ["team/runner"]');
  const green = { annotations: { cni: "green" } };
  test("the API is one, for the pod of that uid alone", async () => {
    using node = nodeWith(tableOf(needs));
    expect(await codeOf(node, "ADD", green)).toBe(0);
    using other = nodeWith(tableOf(needs));
    const earlier = { ...green, args: podArgs.replace("u-1", "u-0") };
    const run = await call(other, "ADD", earlier);
    expect(wireError(run)).toMatchObject({
      code: 11,
      msg: expect.stringContaining("it was made anew, its uid is u-1"),
    });
  });

  test("without one, a rule that needs it denies and says so", async () => {
    using node = nodeWith(tableOf(needs, "", false));
    expect(wireError(await call(node, "ADD", green))).toMatchObject({
      code: 100,
      msg:
        'Access to network "green" denied for pod team/web: plugins.green.allow.service_accounts ' +
        '"team/runner" needs the service account of pod "team/web", which is not known: give ' +
        "genie credentials for the Kubernetes API, which alone names it",
    });
  });
});

describe("a denial", () => {
  const deny = '[plugins.green]\ndeny = { namespaces = ["team"] }';
  const green = { annotations: { cni: "blue,green@eth5" } };
  const events = () => api.requests.filter(({ path }) => path.includes("/events"));
  /** The CNI config of the node, for commands. */
  async function ownConfig(node: Node): Promise<string[]> {
    const file = join(node.dir, "own.conf");
    const own = { cniVersion: "1.0.0", name: "genie-net", type: "genie" };
    await Bun.write(file, JSON.stringify({ ...own, plugins_file: node.tableFile }));
    return ["--cni-config", file];
  }
  async function reportOf(node: Node): Promise<string> {
    const words = ["report", "--denied", "--csv", ...(await ownConfig(node))];
    const run = await spawnGenie([compiledGenie(), ...words], {});
    expect([run.status, run.stderr]).toEqual([0, ""]);
    return run.stdout;
  }

  test("is told by error, ledger and Event, which counts", async () => {
    using node = nodeWith(tableOf(deny));
    const line = (await Bun.file(node.tableFile).text())
      .split("\n")
      .indexOf(deny.split("\n")[1] ?? "");
    const rule = `plugins.green.deny at ${node.tableFile}:${line + 1}`;
    const msg =
      'Access to network "green" denied for pod team/web: plugins.green.deny.namespaces "team" ' +
      "names it";
    for (const count of [1, 2]) {
      api.requests.length = 0;
      expect(wireError(await call(node, "ADD", green))).toEqual({
        cniVersion: "1.1.0",
        code: 100,
        msg,
        details: rule,
      });
      const [first] = events();
      expect(events().map(({ method }) => method)).toEqual(["GET", count === 1 ? "POST" : "PATCH"]);
      expect(api.object(first?.path ?? "")).toMatchObject({
        involvedObject: {
          kind: "Pod",
          apiVersion: "v1",
          namespace: "team",
          name: "web",
          uid: "u-1",
        },
        type: "Warning",
        reason: "NetworkDenied",
        message: `${msg} (${rule})`,
        count,
      });
    }
    const rows = (await reportOf(node)).trimEnd().split(/\r?\n/);
    const network = rows.find((row) => row.includes(",network,ADD,")) ?? "";
    for (const text of [
      "team",
      "web",
      "green",
      "eth5",
      "denied",
      "100",
      rule,
      "asked for by cni",
    ]) {
      expect(network).toContain(text);
    }
    expect(rows.filter((row) => row.includes(",call,ADD,"))).toHaveLength(2);
  });

  test("of an object that is not even read has a row and an Event too", async () => {
    const isolated = tableOf("").replace(
      "[default]",
      "kubernetes.namespace_isolation = true\n[default]",
    );
    using node = nodeWith(isolated);
    const how = { annotations: { [networksKey]: "infra/c" } };
    const { code, details } = wireError(await call(node, "ADD", how));
    const rule = expect.stringMatching(/^kubernetes\.namespace_isolation at .*plugins\.toml:\d+$/);
    expect([code, details]).toEqual([100, rule]);
    expect(events()).toHaveLength(2);
    expect(await reportOf(node)).toContain("infra/c");
  });

  test("is not held up by an API that does not answer, nor is a success told of", async () => {
    using node = nodeWith(tableOf(deny));
    expect(await codeOf(node, "ADD", { annotations: { cni: "blue" } })).toBe(0);
    expect(events()).toEqual([]);
    expect(await codeOf(node, "DEL")).toBe(0);
    writeTable(node, tableOf(deny).replace("[default]", 'kubernetes.timeout = "200ms"\n[default]'));
    api.misbehave({ kind: "hang" });
    const run = await call(node, "ADD", green);
    expect(wireError(run).code).toBe(100);
    expect(run.stderr).toContain("Cannot post an Event: no answer within 200 ms");
    expect(run.stderr).not.toContain(api.token);
  });

  test("without credentials asks nobody", async () => {
    using node = nodeWith(tableOf(deny, "", false));
    const run = await call(node, "ADD", green);
    expect([wireError(run).code, run.stderr]).toEqual([100, ""]);
  });

  test("stands in the plan beside what is allowed, and changes nothing", async () => {
    using node = nodeWith(tableOf(`${deny}\n[access.max_attachments]\npod = 1`));
    const pod = ["--namespace", "team", "--pod", "web", ...(await ownConfig(node))];
    const plan = async (cni: string, ...more: string[]) =>
      spawnGenie([compiledGenie(), "plan", ...pod, "--annotation", `cni=${cni}`, ...more], {
        CNI_PATH: node.bin,
      });
    const run = await plan("blue,green@eth5");
    expect([run.status, run.stderr]).toEqual([1, ""]);
    expect(run.stdout).toMatch(/^blue +eth0 +allowed +access\.default is "allow"/m);
    expect(run.stdout).toMatch(
      /^green +eth5 +denied +Access .* names it \(plugins\.green\.deny at /m,
    );
    const json = JSON.parse((await plan("blue,blue", "--json")).stdout);
    expect(json.access.map((one: { allowed: boolean }) => one.allowed)).toEqual([
      true,
      true,
      false,
    ]);
    expect(json.access[2]).toMatchObject({
      network: "(all)",
      rule: expect.stringMatching(/^access\.max_attachments\.pod at .*:\d+$/),
    });
    expect(events()).toEqual([]);
    expect(left(node)).toEqual(nothing);
  });
});
