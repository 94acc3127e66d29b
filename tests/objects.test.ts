/**
 * Networks that are objects of the API (lib/kubernetes/networks.ts): how a
 * NetworkAttachmentDefinition
 * becomes a config list, and CNI-Genie's rules for logical and physical networks. Everything read
 * is hostile until parsed.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CniError } from "../lib/cni.ts";
import { defaultConfig, parseConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { contains } from "../lib/ip.ts";
import { definitionPath, resolveDefinition, resolveLogical } from "../lib/kubernetes/networks.ts";
import { type Objects, openObjects } from "../lib/kubernetes/objects_of_call.ts";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { makeHost, tempDir } from "./fakes.ts";
import { configList, failureOfAsync, says } from "./stage.ts";

const dir = tempDir();
const confDir = join(dir.path, "net.d");
let api: ApiServer;
beforeAll(async () => {
  mkdirSync(confDir);
  api = await startApiServer(join(dir.path, "api"));
});
afterAll(async () => {
  await api.stop();
  dir[Symbol.dispose]();
});

const list = (name: string, type: string, more: object = {}) =>
  configList(name, [{ type, ...more }], "1.0.0");

/** A config whose conf dir holds these files. */
function configOf(files: Record<string, object> = {}, table = ""): Config {
  const folder = join(confDir, crypto.randomUUID());
  mkdirSync(folder);
  for (const [name, value] of Object.entries(files)) {
    writeFileSync(join(folder, name), JSON.stringify(value));
  }
  return parseConfig(`conf_dir = "${folder}"\n${table}`, "/p.toml");
}

/** The API as a map from path to object; `asked` tells what was read. */
function objectsOf(objects: Record<string, unknown>): Objects & { asked: string[] } {
  const asked: string[] = [];
  return {
    asked,
    kube: () => Promise.reject(new Error("not in this test")),
    get: async (path) => {
      const key = path.join("/");
      asked.push(key);
      if (Object.hasOwn(objects, key)) return objects[key];
      throw new CniError(11, `Cannot get ${key}: 404`, { cause: { status: 404 } });
    },
    used: () => asked.length > 0,
  };
}

/** What a call throws, the throw-away folder left out. */
const failure = (promise: Promise<unknown>) => failureOfAsync(promise);

const nadPath = definitionPath("team", "net").join("/");
/** Resolves team/net, a NetworkAttachmentDefinition with this spec. */
function resolve(object: unknown, config = configOf()) {
  const objects = objectsOf(object === undefined ? {} : { [nadPath]: object });
  return resolveDefinition(objects, config, { namespace: "team", network: "net" });
}
const nad = (config: unknown, annotations?: unknown) => ({
  metadata: { name: "net", namespace: "team", annotations },
  spec: { config: typeof config === "string" ? config : JSON.stringify(config) },
});

describe("resolveDefinition(), fact 35: where the config is (NPWG §3.4.1)", () => {
  const onDisk = {
    "10-a.conf": { cniVersion: "0.4.0", name: "net", type: "macvlan" },
    "20-net.conflist": list("other", "vlan"),
    "30-z.conflist": list("net", "bridge"),
  };

  test("spec.config first", async () => {
    expect(await resolve(nad(list("inline", "ptp")), configOf(onDisk))).toEqual({
      name: "team/net",
      source: "NetworkAttachmentDefinition team/net",
      onDisk: false,
      list: {
        cniVersion: "1.0.0",
        name: "inline",
        disableCheck: false,
        disableGC: false,
        plugins: [{ type: "ptp" }],
      },
    });
  });

  test.each<[string, object]>([
    ["no spec", { metadata: {} }],
    ["a spec of null", { metadata: {}, spec: null }],
    ["no config", { metadata: {}, spec: {} }],
    ["a config of null", { metadata: {}, spec: { config: null } }],
    ["an empty config", nad("")],
    ["a config of white space", nad(" \n")],
  ])("the list on disk with its CNI name, for %s", async (_name, object) => {
    const { list, source, onDisk: isOnDisk, name } = await resolve(object, configOf(onDisk));
    expect([name, isOnDisk, list.plugins]).toEqual(["team/net", true, [{ type: "bridge" }]]);
    expect(source).toEndWith("/30-z.conflist");
  });

  test("then the single config on disk", async () => {
    const { "30-z.conflist": _list, ...files } = onDisk;
    const { list, source } = await resolve(nad(""), configOf(files));
    expect([list.cniVersion, list.plugins]).toEqual([
      "0.4.0",
      [{ cniVersion: "0.4.0", name: "net", type: "macvlan" }],
    ]);
    expect(source).toEndWith("/10-a.conf");
  });

  test("never a file name, and no damaged file in between", async () => {
    const config = configOf({ "10-net.conflist": list("other", "vlan"), "11-x.conflist": [] });
    expect(await failure(resolve(nad(""), config))).toEqual(
      says(101, "Cannot resolve NetworkAttachmentDefinition team/net: it has no spec.config, and "),
    );
  });

  test("an object that is not there is an unknown network", async () => {
    expect(await failure(resolve(undefined, configOf(onDisk)))).toEqual(
      says(101, "Unknown network: NetworkAttachmentDefinition team/net does not exist"),
    );
  });
});

describe("resolveDefinition(), fact 35: the name (NPWG §3.4.2)", () => {
  test.each<[string, object, string]>([
    ["missing in a single config", { cniVersion: "0.3.0", type: "awesome-plugin" }, "net"],
    ["empty in a single config", { name: "", type: "awesome-plugin" }, "net"],
    ["missing in a list", { cniVersion: "1.0.0", plugins: [{ type: "awesome-plugin" }] }, "net"],
    ["of its own in a single config", { name: "mine", type: "awesome-plugin" }, "mine"],
    ["of its own in a list", { name: "mine", plugins: [{ type: "awesome-plugin" }] }, "mine"],
  ])("%s", async (_name, config, name) => {
    const resolved = await resolve(nad(config));
    expect([resolved.list.name, resolved.list.plugins.map(({ type }) => type)]).toEqual([
      name,
      ["awesome-plugin"],
    ]);
  });
});

describe("resolveDefinition(), the rest", () => {
  test("names the resource of a device plugin", async () => {
    const annotations = { "k8s.v1.cni.cncf.io/resourceName": "intel.com/sriov", other: "x" };
    expect((await resolve(nad(list("n", "sriov"), annotations))).resourceName).toBe(
      "intel.com/sriov",
    );
    expect("resourceName" in (await resolve(nad(list("n", "sriov"), {})))).toBe(false);
    expect("resourceName" in (await resolve(nad(list("n", "sriov"), null)))).toBe(false);
  });

  test("takes a config of 1 MB, and keys of the language as they are", async () => {
    const big = list("n", "ptp", { note: "x".repeat(1024 * 1024) });
    expect((await resolve(nad(big))).list.plugins[0]?.["note"]).toHaveLength(1024 * 1024);
    const text = '{"__proto__":{"name":"evil","plugins":[]},"constructor":1,"type":"ptp"}';
    const { list: found } = await resolve(nad(text));
    expect([found.name, found.plugins.map(({ type }) => type)]).toEqual(["net", ["ptp"]]);
    const hidden = await failure(resolve(nad('{"__proto__":{"type":"ptp"}}')));
    expect(hidden.code).toBe(7);
  });

  test.each<[string, unknown, number, string]>([
    ["a list for an object", [], 7, "Invalid NetworkAttachmentDefinition team/net"],
    ["text for an object", "x", 7, "Invalid NetworkAttachmentDefinition team/net"],
    ["no metadata", { spec: {} }, 7, "metadata"],
    ["annotations that are text", nad("", "x"), 7, "metadata.annotations"],
    ["an annotation that is a number", nad("", { a: 1 }), 7, "metadata.annotations.a"],
    ["a spec that is text", { metadata: {}, spec: "x" }, 7, "spec"],
    ["a config that is an object", { metadata: {}, spec: { config: {} } }, 7, "spec.config"],
    [
      "a config that is no JSON",
      nad("{"),
      6,
      "spec.config of NetworkAttachmentDefinition team/net",
    ],
    ["a config that is a list", nad("[]"), 7, "expected a JSON object"],
    ["a config that is a number", nad("1e999"), 7, "expected a JSON object"],
    ["a config that nests deep", nad("[".repeat(100_000)), 6, "nests deeper than 128"],
    ["a config without plugins", nad({ name: "n" }), 7, "it has no plugins"],
    ["an empty list of plugins", nad({ plugins: [] }), 7, "it has no plugins"],
    ["plugins that are an object", nad({ plugins: {} }), 7, '"plugins" is not a list'],
    ["a plugin without type", nad({ plugins: [{}] }), 7, 'a plugin has no "type"'],
    ["a plugin that is a path", nad({ type: "../../bin/sh" }), 7, "plugin type"],
    [
      "an IPAM that is a path",
      nad({ type: "ptp", ipam: { type: "../x" } }),
      7,
      "ipam: plugin type",
    ],
    ["a name that is a path", nad({ name: "../x", type: "ptp" }), 7, '"name" is "../x"'],
    ["a name that is a list", nad({ name: ["x"], type: "ptp" }), 7, '"name"'],
    ["33 plugins", nad({ plugins: Array(33).fill({ type: "ptp" }) }), 7, "more than 32 plugins"],
    ["a version of the future", nad({ cniVersion: "9.0.0", type: "ptp" }), 1, '"9.0.0"'],
  ])("refuses %s", async (_name, object, code, part) => {
    expect(await failure(resolve(object))).toEqual(says(code, part));
  });
});

const group = "apis/alpha.network.k8s.io/v1";
const logicalAt = (name: string, namespace = "team") =>
  `${group}/namespaces/${namespace}/logicalnetworks/${name}`;
const physicalAt = (name: string, namespace = "team") =>
  `${group}/namespaces/${namespace}/physicalnetworks/${name}`;
interface LogicalSpec {
  physicalNet?: string;
  sub_subnet?: string;
  plugin?: string;
}
const logical = (spec: LogicalSpec, name = "l", namespace = "team") => ({
  metadata: { name, namespace },
  spec,
});
const physical = (sharedStatus: unknown, refer_nic?: string) => ({
  spec: { refer_nic, sharedStatus },
});

const shared = physical({ plugin: "ignored", subnet: "10.0.0.0/8", dedicatedNet: false });
const dedicated = physical({ plugin: "flannel", subnet: "10.0.0.0/8", dedicatedNet: true });

const ipam = { type: "host-local", subnet: "10.244.0.0/16", gateway: "10.244.0.1" };
const nodeConfig = () =>
  configOf({
    "10-flannel.conflist": list("flannel", "bridge", { ipam }),
    "20-vlans.conflist": list("vlans", "macvlan", { master: "eth0", ipam }),
    "30-none.conflist": list("none", "ptp"),
  });

/** Resolves team/l with these objects; `others` are in the list of all logical networks. */
async function resolveL(
  spec: LogicalSpec,
  objects: Record<string, unknown> = {},
  { config = nodeConfig(), others = [] as unknown[] } = {},
) {
  const own = logical(spec);
  const all = objectsOf({
    [logicalAt("l")]: own,
    [`${group}/logicalnetworks`]: { items: [own, ...others] },
    ...objects,
  });
  const network = await resolveLogical(all, config, { namespace: "team", network: "l" });
  return { network, asked: all.asked, ipam: network.list.plugins[0]?.["ipam"] };
}
const withP = (object: unknown) => ({ [physicalAt("p")]: object });

describe("resolveLogical(), CNI-Genie's rules", () => {
  test("a plugin alone is that plugin, and one GET", async () => {
    const { network, asked, ipam: found } = await resolveL({ plugin: "flannel" });
    expect([network.name, network.behind.name, found]).toEqual(["team/l", "flannel", ipam]);
    expect(asked).toEqual([logicalAt("l")]);
    expect(network.source).toStartWith("Logicalnetwork team/l on ");
  });

  test.each<[string, LogicalSpec, unknown, object]>([
    [
      "a shared physical network takes plugin and sub-subnet of the logical one",
      { physicalNet: "p", plugin: "flannel", sub_subnet: "10.244.9.0/24" },
      shared,
      { ...ipam, rangeStart: "10.244.9.0", rangeEnd: "10.244.9.255" },
    ],
    [
      "a physical network without a status is shared",
      { physicalNet: "p", plugin: "flannel", sub_subnet: "10.9.0.0/24" },
      physical(undefined),
      { type: "host-local", subnet: "10.9.0.0/24" },
    ],
    [
      "a dedicated physical network brings plugin and subnet",
      { physicalNet: "p" },
      dedicated,
      { type: "host-local", subnet: "10.0.0.0/8" },
    ],
    [
      "a dedicated one takes a sub-subnet inside it",
      { physicalNet: "p", sub_subnet: "10.255.255.0/24" },
      dedicated,
      { type: "host-local", subnet: "10.255.255.0/24" },
    ],
    [
      "a dedicated one takes its whole subnet as sub-subnet",
      { physicalNet: "p", sub_subnet: "10.0.0.0/8", plugin: "flannel" },
      dedicated,
      { type: "host-local", subnet: "10.0.0.0/8" },
    ],
    [
      "a dedicated one without a subnet leaves the plugin's",
      { physicalNet: "p" },
      physical({ plugin: "flannel", dedicatedNet: true }),
      ipam,
    ],
  ])("%s", async (_name, spec, object, expected) => {
    const { network, ipam: found } = await resolveL(spec, withP(object));
    expect([network.behind.name, found]).toEqual(["flannel", expected]);
  });

  test.each<[string, LogicalSpec, Record<string, unknown>, number, string]>([
    ["no plugin at all", {}, {}, 7, "no plugin: set spec.plugin"],
    [
      "a shared physical network without a plugin on the logical one",
      { physicalNet: "p", sub_subnet: "10.1.0.0/24" },
      withP(shared),
      7,
      "no plugin",
    ],
    [
      "a shared physical network without a sub-subnet",
      { physicalNet: "p", plugin: "flannel" },
      withP(shared),
      7,
      "a shared physical network needs spec.sub_subnet",
    ],
    [
      "a dedicated physical network without a plugin",
      { physicalNet: "p", plugin: "flannel" },
      withP(physical({ dedicatedNet: true })),
      7,
      "it is dedicated but names no plugin",
    ],
    [
      "two plugins",
      { physicalNet: "p", plugin: "vlans" },
      withP(dedicated),
      7,
      'plugin "vlans" is not "flannel", that of its physical network',
    ],
    [
      "a sub-subnet outside",
      { physicalNet: "p", plugin: "flannel", sub_subnet: "11.0.0.0/24" },
      withP(shared),
      7,
      "sub_subnet 11.0.0.0/24 is not inside 10.0.0.0/8",
    ],
    [
      "a sub-subnet that is larger",
      { physicalNet: "p", sub_subnet: "10.0.0.0/7" },
      withP(dedicated),
      7,
      "is not inside",
    ],
    [
      "a sub-subnet of the other family",
      { physicalNet: "p", sub_subnet: "fd00::/64" },
      withP(dedicated),
      7,
      "is not inside",
    ],
    [
      "a sub-subnet that is none",
      { plugin: "flannel", sub_subnet: "10.0.0.0" },
      {},
      7,
      "no subnet",
    ],
    ["a prefix that is none", { plugin: "flannel", sub_subnet: "10.0.0.0/33" }, {}, 7, "no subnet"],
    ["a zone", { plugin: "flannel", sub_subnet: "fe80::%eth0/64" }, {}, 7, "no subnet"],
    [
      "a physical subnet that is none",
      { physicalNet: "p" },
      withP(physical({ plugin: "flannel", subnet: "x", dedicatedNet: true })),
      7,
      '"x" is no subnet',
    ],
    [
      "a sub-subnet for a plugin without IPAM",
      { plugin: "none", sub_subnet: "10.9.0.0/24" },
      {},
      7,
      'network "none" has no IPAM whose subnet could be replaced',
    ],
    ["an unknown plugin", { plugin: "nothing" }, {}, 101, 'Unknown network "nothing"'],
    ["a plugin that is a path", { plugin: "../x" }, {}, 101, "it is not a network name"],
    [
      "a physical network that does not exist",
      { physicalNet: "p" },
      {},
      101,
      "Physicalnetwork team/p of Logicalnetwork team/l does not exist",
    ],
  ])("refuses %s", async (_name, spec, objects, code, part) => {
    expect(await failure(resolveL(spec, objects))).toEqual(says(code, part));
  });

  test("refuses a logical network that does not exist", async () => {
    const promise = resolveLogical(objectsOf({}), nodeConfig(), { namespace: "a", network: "b" });
    expect(await failure(promise)).toEqual(says(101, "Logicalnetwork a/b does not exist"));
  });

  test.each<[string, Record<string, unknown>, string]>([
    ["a logical network that is text", { [logicalAt("l")]: "x" }, "Invalid Logicalnetwork team/l"],
    ["one without a spec", { [logicalAt("l")]: { metadata: {} } }, "spec"],
    ["a plugin that is a list", { [logicalAt("l")]: { spec: { plugin: ["a"] } } }, "spec.plugin"],
    [
      "a sub-subnet that is a number",
      { [logicalAt("l")]: { spec: { plugin: "flannel", sub_subnet: 10 } } },
      "spec.sub_subnet",
    ],
    ["a physical network that is a list", withP([]), "Invalid Physicalnetwork team/p"],
    ["a status that is text", withP({ spec: { sharedStatus: "x" } }), "spec.sharedStatus"],
    [
      "a flag that is text",
      withP(physical({ plugin: "flannel", dedicatedNet: "true" })),
      "spec.sharedStatus.dedicatedNet",
    ],
    ["a device that is an object", withP({ spec: { refer_nic: {} } }), "spec.refer_nic"],
    ["a list of logical networks that is none", { [`${group}/logicalnetworks`]: [] }, "list of"],
  ])("refuses %s", async (_name, objects, part) => {
    const spec = { physicalNet: "p", sub_subnet: "10.1.0.0/24" };
    const promise = resolveL(spec, { ...withP(dedicated), ...objects });
    expect(await failure(promise)).toEqual(says(7, part));
  });
});

describe("resolveLogical(), overlap with other logical networks", () => {
  const spec = { plugin: "flannel", sub_subnet: "10.244.8.0/22" };
  const inB = (object: LogicalSpec) => [logical(object, "x", "b")];
  test.each<[string, unknown[]]>([
    ["an equal subnet of the same plugin", inB(spec)],
    ["a smaller one", inB({ plugin: "flannel", sub_subnet: "10.244.9.0/24" })],
    ["a larger one", inB({ plugin: "flannel", sub_subnet: "10.0.0.0/8" })],
    ["one of the same namespace", [logical(spec, "x")]],
    ["one of the same name elsewhere", [logical(spec, "l", "b")]],
    [
      "one that has the plugin by its dedicated physical network",
      inB({ physicalNet: "q", sub_subnet: "10.244.9.0/24" }),
    ],
    ["one behind malformed ones", [null, {}, { metadata: {}, spec: { plugin: 1 } }, ...inB(spec)]],
  ])("refuses %s", async (_name, others) => {
    const promise = resolveL(spec, { [physicalAt("q", "b")]: dedicated }, { others });
    expect(await failure(promise)).toEqual(
      says(7, "Invalid Logicalnetwork team/l: sub_subnet 10.244.8.0/22 overlaps "),
    );
  });

  test("refuses one whose plugin both have by dedicated physical networks", async () => {
    const own = { physicalNet: "p", sub_subnet: "10.1.0.0/16" };
    const others = [logical({ physicalNet: "q", sub_subnet: "10.1.2.0/24" }, "x", "b")];
    const objects = { ...withP(dedicated), [physicalAt("q", "b")]: dedicated };
    expect(await failure(resolveL(own, objects, { others }))).toEqual(says(7, "overlaps"));
  });

  test.each<[string, unknown[]]>([
    ["itself", []],
    ["a neighbour", inB({ plugin: "flannel", sub_subnet: "10.244.12.0/22" })],
    ["the same subnet of another plugin", inB({ ...spec, plugin: "vlans" })],
    ["one without a subnet", inB({ plugin: "flannel" })],
    ["one with a subnet that is none", inB({ plugin: "flannel", sub_subnet: "all" })],
    ["one of the other family", inB({ plugin: "flannel", sub_subnet: "fd00::/8" })],
    ["one whose physical network is gone", inB({ ...spec, physicalNet: "gone" })],
    ["malformed ones", [1, [], { metadata: { name: "x" }, spec }]],
  ])("lets pass %s", async (_name, others) => {
    const { ipam: found } = await resolveL(spec, {}, { others });
    expect(found).toEqual({ ...ipam, rangeStart: "10.244.8.0", rangeEnd: "10.244.11.255" });
  });

  test("no API means no answer, not no overlap", async () => {
    const objects = objectsOf({ [logicalAt("l")]: logical(spec) });
    const promise = resolveLogical(objects, nodeConfig(), { namespace: "team", network: "l" });
    expect((await failure(promise)).code).toBe(11);
  });
});

describe("resolveLogical(), what it changes in the config", () => {
  const sub = (sub_subnet: string, own: object) =>
    resolveL(
      { plugin: "a", sub_subnet },
      {},
      { config: configOf({ "a.conflist": list("a", "bridge", { ipam: own }) }) },
    );
  const rest = { type: "host-local", dataDir: "/d", routes: [{ dst: "0.0.0.0/0" }] };
  test.each<[string, string, object, object]>([
    [
      "a subnet, with what belonged to it",
      "10.9.0.0/24",
      {
        ...rest,
        subnet: "10.0.0.0/16",
        rangeStart: "10.0.0.2",
        rangeEnd: "10.0.0.9",
        gateway: "g",
      },
      { ...rest, subnet: "10.9.0.0/24" },
    ],
    [
      "host-local's ranges",
      "10.9.0.0/24",
      { ...rest, ranges: [[{ subnet: "10.0.0.0/16", rangeStart: "10.0.0.2", gateway: "g" }]] },
      { ...rest, ranges: [[{ subnet: "10.9.0.0/24" }]] },
    ],
    [
      "the ranges of its family, the others stay",
      "10.9.0.0/24",
      { ...rest, ranges: [[{ subnet: "fd00::/64" }], [{ subnet: "10.0.0.0/16" }]] },
      { ...rest, ranges: [[{ subnet: "10.9.0.0/24" }], [{ subnet: "fd00::/64" }]] },
    ],
    [
      "IPv6 ranges",
      "fd01::/80",
      { ...rest, ranges: [[{ subnet: "10.0.0.0/8" }], [{ subnet: "fd00::/64" }]] },
      { ...rest, ranges: [[{ subnet: "fd01::/80" }], [{ subnet: "10.0.0.0/8" }]] },
    ],
    [
      "a subnet beside ranges",
      "10.9.0.0/24",
      { ...rest, subnet: "10.0.0.0/16", ranges: [[{ subnet: "10.1.0.0/16" }], "x", [1]] },
      { ...rest, ranges: [[{ subnet: "10.9.0.0/24" }]] },
    ],
    [
      "Calico's pools",
      "10.9.0.0/24",
      { type: "calico-ipam", ipv4_pools: ["10.0.0.0/8"], assign_ipv6: "true" },
      { type: "calico-ipam", ipv4_pools: ["10.9.0.0/24"], assign_ipv6: "true" },
    ],
    [
      "Whereabouts' range",
      "fd01::/80",
      { type: "whereabouts", range: "fd00::/64", range_start: "fd00::2" },
      { type: "whereabouts", range: "fd01::/80" },
    ],
    [
      "the subnet of an IPAM that knows no parts",
      "10.32.4.0/24",
      { type: "weave-ipam", subnet: "10.32.0.0/12" },
      { type: "weave-ipam", subnet: "10.32.4.0/24" },
    ],
  ])("replaces %s", async (_name, subnet, own, expected) => {
    expect((await sub(subnet, own)).ipam).toEqual(expected);
  });

  const four = { subnet: "10.61.0.0/24", gateway: "10.61.0.1" };
  const six = { subnet: "fd61::/64" };
  const part = { rangeStart: "10.61.0.16", rangeEnd: "10.61.0.31" };
  const abouts = { type: "whereabouts", range: "10.61.0.0/24", exclude: ["10.61.0.20/32"] };
  const aboutsPart = { range_start: "10.61.0.16", range_end: "10.61.0.31" };
  test.each<[string, object, object]>([
    ["the old form", { ...rest, ...four }, { ...rest, ...four, ...part }],
    ["ranges", { ...rest, ranges: [[four]] }, { ...rest, ranges: [[{ ...four, ...part }]] }],
    [
      "dual-stack ranges",
      { ...rest, ranges: [[six], [four]] },
      { ...rest, ranges: [[{ ...four, ...part }], [six]] },
    ],
    [
      "one of several ranges and sets",
      { ...rest, ranges: [[{ subnet: "10.9.0.0/24" }, four], [{ subnet: "10.8.0.0/24" }]] },
      { ...rest, ranges: [[{ ...four, ...part }]] },
    ],
    [
      "the old form with ranges of the other family",
      { ...rest, ...four, ranges: [[six]] },
      { ...rest, ...four, ...part, ranges: [[six]] },
    ],
    [
      "ranges beside the old form of the other family",
      { ...rest, ...six, ranges: [[four]] },
      { ...rest, ...six, ranges: [[{ ...four, ...part }]] },
    ],
    [
      "what first and last address leave of it",
      { ...rest, ...four, rangeStart: "10.61.0.20", rangeEnd: "10.61.0.90" },
      { ...rest, ...four, rangeStart: "10.61.0.20", rangeEnd: "10.61.0.31" },
    ],
    [
      "the part whole, where plain pods are kept out of it",
      { ...rest, ...four, rangeStart: "10.61.0.2", rangeEnd: "10.61.0.15" },
      { ...rest, ...four, ...part },
    ],
    ["whereabouts' range", abouts, { ...abouts, ...aboutsPart }],
    [
      "whereabouts' range with first and last",
      { ...abouts, range: "10.61.0.10-10.61.0.20/24" },
      { ...abouts, range_start: "10.61.0.16", range_end: "10.61.0.20" },
    ],
    [
      "one of whereabouts' ranges",
      { type: "whereabouts", ipRanges: [{ range: "fd61::/64" }, { range: "10.61.0.0/24" }] },
      {
        type: "whereabouts",
        ipRanges: [{ range: "10.61.0.0/24", ...aboutsPart }, { range: "fd61::/64" }],
      },
    ],
  ])("takes addresses of a part of %s", async (_name, own, expected) => {
    expect((await sub("10.61.0.16/28", own)).ipam).toEqual(expected);
  });

  test.each<[string, object]>([
    ["10.61.0.0/28", { rangeStart: "10.61.0.1", rangeEnd: "10.61.0.15" }],
    ["10.61.0.240/28", { rangeStart: "10.61.0.240", rangeEnd: "10.61.0.254" }],
    ["10.61.0.0/24", { rangeStart: "10.61.0.1", rangeEnd: "10.61.0.254" }],
    ["10.61.0.7/32", { rangeStart: "10.61.0.7", rangeEnd: "10.61.0.7" }],
  ])("never gives out the address of the subnet or its broadcast: %s", async (subnet, range) => {
    expect((await sub(subnet, { ...rest, ...four })).ipam).toEqual({
      ...rest,
      ...four,
      ...range,
    });
  });

  test.each<[string, object, object]>([
    ["without an IPAM, as Weave installs it", {}, { subnet: "10.35.0.0/24" }],
    ["with a subnet", { ipam: { subnet: "10.40.0.0/16" } }, { subnet: "10.35.0.0/24" }],
  ])("weave-net %s gets it", async (_name, more, expected) => {
    const plugins = [{ type: "weave-net", hairpinMode: true, ...more }, { type: "portmap" }];
    const config = configOf({ "10-weave.conflist": { name: "weave", plugins } });
    const spec = { plugin: "weave", sub_subnet: "10.35.0.0/24" };
    const { network } = await resolveL(spec, {}, { config });
    expect(network.list.plugins).toEqual([
      { type: "weave-net", hairpinMode: true, ipam: expected },
      { type: "portmap" },
    ] as never);
  });

  test.each<[string, object]>([
    ["flannel", { type: "flannel", ipam: { type: "host-local" } }],
    ["flannel", { type: "flannel", delegate: { isDefaultGateway: true } }],
    ["dhcp", { type: "macvlan", ipam: { type: "dhcp" } }],
    ["static", { type: "bridge", ipam: { type: "static" } }],
  ])("%s gives out no part, and is refused before it runs", async (what, plugin) => {
    const config = configOf({ "a.conflist": { name: "a", plugins: [plugin] } });
    const spec = { plugin: "a", sub_subnet: "10.244.7.64/26" };
    expect(await failure(resolveL(spec, {}, { config }))).toEqual(says(7, `"${what}"`));
    // Without a part it is a network like any other.
    const { network } = await resolveL({ plugin: "a" }, {}, { config });
    expect(network.list.plugins).toEqual([plugin] as never);
  });

  const pools = (...specs: object[]) => ({
    "apis/crd.projectcalico.org/v1/ippools": { items: specs.map((spec) => ({ spec })) },
  });
  test.each<[string, Record<string, unknown>, boolean]>([
    ["has a pool of it", pools({ cidr: "10.0.0.0/8" }, { cidr: "10.9.0.0/24" }), true],
    ["keeps its pools elsewhere", {}, true],
    ["has only a larger pool", pools({ cidr: "10.0.0.0/8" }), false],
    ["has it disabled", pools({ cidr: "10.9.0.0/24", disabled: true }), false],
    ["has none", pools(), false],
  ])("Calico %s", async (_name, objects, passes) => {
    const plugins = [{ type: "calico", ipam: { type: "calico-ipam" } }];
    const config = configOf({ "a.conflist": { name: "a", plugins } });
    const asked = resolveL({ plugin: "a", sub_subnet: "10.9.0.0/24" }, objects, { config });
    if (passes) expect((await asked).ipam).toMatchObject({ ipv4_pools: ["10.9.0.0/24"] });
    else expect(await failure(asked)).toEqual(says(7, "no enabled IPPool with cidr 10.9.0.0/24"));
  });

  test("leaves the node's own list as it was", async () => {
    const config = configOf(
      {},
      "[plugins.a.config]\ntype = 'bridge'\nipam = {type = 'host-local'}",
    );
    const before = JSON.stringify([...config.plugins]);
    await resolveL({ plugin: "a", sub_subnet: "10.9.0.0/24" }, {}, { config });
    expect(JSON.stringify([...config.plugins])).toBe(before);
  });

  test.each<[string, object, object]>([
    ["macvlan's master", { type: "macvlan" }, { type: "macvlan", master: "bond0" }],
    ["ipvlan's, replaced", { type: "ipvlan", master: "x" }, { type: "ipvlan", master: "bond0" }],
    ["vlan's", { type: "vlan", vlanId: 5 }, { type: "vlan", vlanId: 5, master: "bond0" }],
    ["host-device's device", { type: "host-device" }, { type: "host-device", device: "bond0" }],
    [
      "that of a plugin with a master",
      { type: "own", master: "x" },
      { type: "own", master: "bond0" },
    ],
    ["nothing of a plugin that takes none", { type: "bridge" }, { type: "bridge" }],
  ])("refer_nic becomes %s", async (_name, plugin, expected) => {
    const config = configOf({ "a.conflist": { name: "a", plugins: [plugin, { type: "tuning" }] } });
    const object = physical({ plugin: "a", dedicatedNet: true }, "bond0");
    const { network } = await resolveL({ physicalNet: "p" }, withP(object), { config });
    expect(network.list.plugins).toEqual([expected, { type: "tuning" }] as never);
  });
});

test.each([
  ["10.0.0.0/8", "10.1.0.0/16", true],
  ["10.0.0.0/8", "10.0.0.0/8", true],
  ["10.1.0.0/16", "10.0.0.0/8", false],
  ["10.0.0.0/9", "10.128.0.0/9", false],
  ["0.0.0.0/0", "192.0.2.1/32", true],
  ["fd00::/8", "fd12::/64", true],
  ["fd00::/8", "fe80::/64", false],
  ["::/0", "10.0.0.0/8", false],
  ["10.0.0.0/8", "", false],
  ["x", "10.0.0.0/8", false],
])("contains(%j, %j) is %p", (outer, inner, expected) => {
  expect(contains(outer, inner)).toBe(expected);
});

describe("openObjects()", () => {
  const path = (name: string) => ["api", "v1", "namespaces", "team", "pods", name];
  const open = () =>
    openObjects(makeHost(), {
      ...defaultConfig(),
      kubernetes: {
        ...defaultConfig().kubernetes,
        kubeconfig: api.kubeconfig("token"),
        kubeconfigIsExplicit: true,
      },
    });

  test("sends nothing by itself, and reads each object once, absent ones too", async () => {
    api.put("/api/v1/namespaces/team/pods/a", { metadata: { name: "a", namespace: "team" } });
    api.requests.length = 0;
    const objects = open();
    expect([objects.used(), api.requests.length]).toEqual([false, 0]);
    const both = await Promise.all([objects.get(path("a")), objects.get(path("a"))]);
    expect(both[0]).toBe(both[1]);
    const gone = [objects.get(path("b")), objects.get(path("b"))].map(failure);
    expect(await Promise.all(gone)).toEqual([says(11, "404"), says(11, "404")]);
    expect(objects.used()).toBe(true);
    expect(api.requests.map(({ method, path: where }) => `${method} ${where}`).sort()).toEqual([
      "GET /api/v1/namespaces/team/pods/a",
      "GET /api/v1/namespaces/team/pods/b",
    ]);
  });

  test.each(["..", "a/b", "a%2f", ""])("never asks for %j", async (name) => {
    api.requests.length = 0;
    expect(await failure(open().get(path(name)))).toEqual(says(7, "of a Kubernetes object"));
    expect(api.requests).toEqual([]);
  });
});
