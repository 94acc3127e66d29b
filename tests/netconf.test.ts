/** Network config lists, and the request config that a delegate reads on stdin. */
import { describe, expect, test } from "bun:test";
import { mayAddDefaultRoute } from "../lib/default_route.ts";
import { type RequestConfigOptions, requestConfig } from "../lib/delegate.ts";
import { parseJson } from "../lib/json.ts";
import {
  declaresCapability,
  type NetworkConfigList,
  type ParsedConfigList,
  type PluginConfig,
  parseConfigList,
  parsePluginConfig,
  pluginTypeIssue,
} from "../lib/networks.ts";
import { failureOf, says } from "./stage.ts";

/** What a call throws, as the runtime sees it. */
const failure = failureOf;

const plain: ParsedConfigList = {
  cniVersion: "1.0.0",
  name: "blue",
  disableCheck: false,
  disableGC: false,
  plugins: [{ type: "bridge" }],
  loadsFolder: true,
};
const input = { cniVersion: "1.0.0", name: "blue", plugins: [{ type: "bridge" }] };

describe("parseConfigList() reads", () => {
  const single = { cniVersion: "0.2.0", name: "romana", type: "romana", ipam: { type: "x" } };
  test.each<[string, object, ParsedConfigList]>([
    ["a list", input, plain],
    [
      "a single config as a list of one",
      single,
      { ...plain, cniVersion: "0.2.0", name: "romana", plugins: [single], loadsFolder: false },
    ],
    [
      "fact 16: no version as the first one",
      { ...input, cniVersion: undefined },
      { ...plain, cniVersion: "0.1.0" },
    ],
    [
      "fact 16: the highest of several versions, newer ones passed over",
      { ...input, cniVersion: "0.4.0", cniVersions: ["1.0.0", "0.3.1", "7.0.0", "1.1.0"] },
      { ...plain, cniVersion: "1.1.0" },
    ],
    [
      "fact 16: cniVersion where it is the highest",
      { ...input, cniVersions: ["0.4.0"] },
      { ...plain, cniVersion: "1.0.0" },
    ],
    [
      "fact 16: cniVersions alone",
      { ...input, cniVersion: "", cniVersions: ["0.4.0", "0.3.1"] },
      { ...plain, cniVersion: "0.4.0" },
    ],
    [
      "fact 16: a newer cniVersion beside one we know",
      { ...input, cniVersion: "7.0.0", cniVersions: ["0.4.0"] },
      { ...plain, cniVersion: "0.4.0" },
    ],
    [
      "fact 17: a list without plugins, which its folder may have",
      { ...input, plugins: undefined },
      { ...plain, plugins: [] },
    ],
    [
      "fact 17: loadOnlyInlinedPlugins",
      { ...input, loadOnlyInlinedPlugins: true },
      { ...plain, loadsFolder: false },
    ],
    [
      "fact 18: disableCheck and disableGC",
      { ...input, disableCheck: true, disableGC: true },
      { ...plain, disableCheck: true, disableGC: true },
    ],
    [
      "fact 18: flags written as text",
      { ...input, disableCheck: "true", disableGC: "False", loadOnlyInlinedPlugins: "TRUE" },
      { ...plain, disableCheck: true, loadsFolder: false },
    ],
    ["null flags as absent", { ...input, disableCheck: null, disableGC: null }, plain],
    [
      "an IPAM without type and capabilities that are null",
      { ...input, plugins: [{ type: "bridge", ipam: {}, capabilities: null }] },
      { ...plain, plugins: [{ type: "bridge", ipam: {}, capabilities: null } as never] },
    ],
  ])("%s", (_name, value, expected) => {
    expect(parseConfigList(value, "F")).toEqual(expected);
  });
});

describe("parseConfigList() refuses", () => {
  const many = Array.from({ length: 33 }, () => ({ type: "bridge" }));
  const rows: [string, unknown, number, string][] = [
    ["a list of lists", [], 7, "expected a JSON object"],
    ["null", null, 7, "expected a JSON object"],
    ["fact 7: no name", { ...input, name: undefined }, 7, '"name" is missing'],
    ["fact 7: an empty name", { ...input, name: "" }, 7, '"name" is missing'],
    ["fact 7: a slash in the name", { ...input, name: "a/b" }, 7, '"name" is "a/b", expected'],
    ["a name that climbs", { ...input, name: "../a" }, 7, '"name" is "../a"'],
    ["a name of two lines", { ...input, name: "a\nb" }, 7, '"name" is "a\\nb"'],
    ["a name with NUL", { ...input, name: "a\0" }, 7, '"name" is "a\\u0000"'],
    ["a name that is a number", { ...input, name: 1 }, 7, '"name" is 1'],
    ["plugins that are an object", { ...input, plugins: {} }, 7, '"plugins" is not a list'],
    ["too many plugins", { ...input, plugins: many }, 7, "more than 32 plugins"],
    ["a plugin that is text", { ...input, plugins: ["bridge"] }, 7, "is not an object"],
    ["a plugin without type", { ...input, plugins: [{}] }, 7, 'a plugin has no "type"'],
    ["an empty type", { ...input, plugins: [{ type: "" }] }, 7, 'a plugin has no "type"'],
    ["a type that climbs", { ...input, plugins: [{ type: "../sh" }] }, 7, 'plugin type "../sh"'],
    ["a type that is a path", { ...input, plugins: [{ type: "/bin/sh" }] }, 7, '"/bin/sh" is not'],
    ["a type with NUL", { ...input, plugins: [{ type: "a\0b" }] }, 7, '"a\\u0000b" is not'],
    [
      "an IPAM type that climbs",
      { ...input, plugins: [{ type: "bridge", ipam: { type: "../sh" } }] },
      7,
      'ipam: plugin type "../sh"',
    ],
    [
      "capabilities that are a list",
      { ...input, plugins: [{ type: "bridge", capabilities: ["mac"] }] },
      7,
      '"capabilities" of plugin "bridge" is not an object',
    ],
    [
      "fact 16: a version that is none",
      { ...input, cniVersions: ["1.0.0", "newest"] },
      7,
      '"newest" is not a CNI version',
    ],
    ["fact 16: a version in pieces", { ...input, cniVersions: [1] }, 7, "1 is not a CNI"],
    ["fact 16: a text of versions", { ...input, cniVersions: "1.0.0" }, 7, "is not a list"],
    [
      "fact 16: only versions of later",
      { ...input, cniVersion: "2.0.0", cniVersions: ["1.2.0"] },
      1,
      'names "2.0.0", "1.2.0", supported are 0.1.0',
    ],
    [
      "fact 17: loadOnlyInlinedPlugins without any",
      { ...input, plugins: undefined, loadOnlyInlinedPlugins: true },
      7,
      '"loadOnlyInlinedPlugins" is true but "plugins" is missing',
    ],
    ["a flag that is neither", { ...input, disableCheck: "yes" }, 7, '"disableCheck" is "yes"'],
    [
      "a flag like a number",
      parseJson('{"name":"a","disableGC":1.0}', ""),
      7,
      '"disableGC" is 1.0',
    ],
  ];
  test.each(rows)("%s", (_name, value, number, part) => {
    const error = failure(() => parseConfigList(value, "/n/10-a.conflist"));
    expect(error).toEqual(says(number, part));
    expect(error.msg).toContain(" /n/10-a.conflist: ");
  });
});

test("parsePluginConfig() keeps the object it was given", () => {
  const value = { type: "bridge", anything: { deep: [1] } };
  expect(parsePluginConfig(value, "F")).toBe(value);
});

test.each([
  ["bridge", true],
  ["host-local", true],
  ["calico_v3.1+x", true],
  [".hidden", false],
  ["..", false],
  ["-rf", false],
  ["a/b", false],
  ["a b", false],
  ["a\n", false],
  ["a".repeat(256), false],
  ["", false],
])("pluginTypeIssue(%j) is none: %p", (type, fits) => {
  expect(pluginTypeIssue(type) === undefined).toBe(fits);
});

describe("requestConfig()", () => {
  const list: NetworkConfigList = { ...plain };
  const declaring = { type: "bridge", capabilities: { mac: true, ips: false, dns: "true" } };
  const head = { type: "bridge", cniVersion: "1.0.0", name: "blue" };
  type Row = [string, PluginConfig, RequestConfigOptions, object];
  test.each<Row>([
    ["sets version and name", { type: "bridge" }, {}, head],
    [
      "sets version and name of the list over the plugin's own",
      { type: "bridge", cniVersion: "0.1.0", name: "mine" },
      {},
      head,
    ],
    [
      "fact 13: hands over what is declared and offered, nothing else",
      declaring,
      { capabilityArgs: { mac: "c2:11", ips: ["10.0.0.1"], dns: {}, portMappings: [] } },
      { ...head, runtimeConfig: { mac: "c2:11" } },
    ],
    ["fact 13: no runtimeConfig where nothing is offered", declaring, { capabilityArgs: {} }, head],
    [
      "fact 13: no runtimeConfig where nothing is declared",
      { type: "bridge" },
      { capabilityArgs: { mac: "c2:11", toString: 1 } },
      head,
    ],
    [
      "fact 13: capabilities that are null",
      { type: "bridge", capabilities: null } as object as PluginConfig,
      { capabilityArgs: { mac: "c2:11" } },
      head,
    ],
    [
      "fact 14: unknown keys, those of a list too",
      { type: "bridge", mtu: 1450, plugins: [1], cniVersions: ["x"], disableGC: true, a: null },
      {},
      { ...head, mtu: 1450, plugins: [1], cniVersions: ["x"], disableGC: true, a: null },
    ],
    [
      "fact 15: reserved keys of the administrator give way",
      {
        type: "bridge",
        runtimeConfig: { mac: "admin" },
        prevResult: { ips: [] },
        "cni.dev/valid-attachments": [],
        "cni.dev/attachments": [],
      },
      {},
      head,
    ],
    [
      "fact 15: args are merged, the runtime's win key by key",
      { type: "bridge", args: { a: "admin", b: "admin" } },
      { args: { b: "runtime", "org.apache.mesos": {} } },
      { ...head, args: { a: "admin", b: "runtime", "org.apache.mesos": {} } },
    ],
    [
      "fact 32: args.cni of a pod and of the config are one, the pod's win key by key",
      { type: "bridge", args: { cni: { a: "admin", b: "admin" }, x: 1 } },
      { args: { cni: { b: "pod" }, x: { y: 2 } } },
      { ...head, args: { cni: { a: "admin", b: "pod" }, x: { y: 2 } } },
    ],
    [
      "fact 15: the administrator's args alone",
      { type: "bridge", args: { a: "admin" } },
      {},
      { ...head, args: { a: "admin" } },
    ],
    [
      "prevResult and reserved keys",
      { type: "bridge" },
      { prevResult: { cniVersion: "1.0.0" }, reserved: { "cni.dev/attachments": [] } },
      { ...head, prevResult: { cniVersion: "1.0.0" }, "cni.dev/attachments": [] },
    ],
  ])("%s", (_name, plugin, options, expected) => {
    const before = JSON.stringify(plugin);
    expect(requestConfig(list, plugin, options)).toEqual(expected as PluginConfig);
    expect(JSON.stringify(plugin)).toBe(before);
  });

  test.each([
    ["big integers", '"type":"t","id":9223372036854775807,"more":[12345678901234567890]'],
    ["numbers as they were written", '"type":"t","rate":1.0,"big":1e400,"zero":-0,"e":1E5'],
    ["key order", '"zeta":1,"type":"t","alpha":{"z":1,"a":2},"mid":[]'],
    ["a key that could change every object", '"type":"t","__proto__":{"x":1.5},"constructor":1'],
    ["text of every kind", '"type":"t","x":"\\u0000\\n\\\\ \\"€😀"'],
    ["deep JSON", `"type":"t","x":${"[".repeat(120)}${"]".repeat(120)}`],
  ])("fact 14: %s survives", (_name, keys) => {
    const text = `{"cniVersion":"1.0.0","name":"blue","plugins":[{${keys}}]}`;
    const parsed = parseConfigList(parseJson(text, "F"), "F");
    const [plugin] = parsed.plugins;
    const request = plugin && requestConfig(parsed, plugin);
    expect(JSON.stringify(request)).toBe(
      // JSON.stringify writes what needs no escape as it is.
      `{${keys},"cniVersion":"1.0.0","name":"blue"}`,
    );
    expect(({} as { x?: unknown }).x).toBeUndefined();
  });

  test("fact 14: big integers of the runtime's args and capabilities survive", () => {
    const offered = parseJson('{"mac":{"id":12345678901234567890}}', "F") as never;
    const request = requestConfig(list, declaring as never, {
      capabilityArgs: offered,
      args: offered,
    });
    expect(JSON.stringify(request)).toBe(
      '{"type":"bridge","cniVersion":"1.0.0","name":"blue",' +
        '"runtimeConfig":{"mac":{"id":12345678901234567890}},' +
        '"args":{"mac":{"id":12345678901234567890}}}',
    );
  });
});

test.each([
  [{ mac: true }, true],
  [{ mac: false }, false],
  [{ mac: "true" }, false],
  [{ ips: true }, false],
  [{}, false],
  [undefined, false],
])("declaresCapability() of %j", (capabilities, does) => {
  const plugins = [{ type: "a" }, { type: "b", ...(capabilities && { capabilities }) }];
  expect(declaresCapability({ ...plain, plugins }, "mac")).toBe(does);
  expect(declaresCapability({ ...plain, plugins }, "toString")).toBe(false);
});

describe("mayAddDefaultRoute()", () => {
  const local = (...dst: unknown[]) => ({
    type: "host-local",
    routes: dst.map((one) => ({ dst: one })),
  });
  test.each<[string, object[], boolean]>([
    ["a bridge without IPAM", [{ type: "bridge" }], false],
    ["a bridge with an empty IPAM", [{ type: "bridge", ipam: {} }], false],
    ["a bridge without routes", [{ type: "bridge", ipam: local() }], false],
    ["a bridge with other routes", [{ type: "bridge", ipam: local("10.0.0.0/8") }], false],
    ["a bridge with a default route", [{ type: "bridge", ipam: local("0.0.0.0/0") }], true],
    ["a default route of IPv6", [{ type: "macvlan", ipam: local("10.0.0.0/8", "::/0") }], true],
    ["a bridge that is the gateway", [{ type: "bridge", isDefaultGateway: true }], true],
    ["an IPAM we do not know", [{ type: "bridge", ipam: { type: "dhcp" } }], true],
    ["a plugin we do not know", [{ type: "calico" }], true],
    ["chained plugins that add none", [{ type: "portmap" }, { type: "tuning" }], false],
    ["one that may, behind one that does not", [{ type: "bridge" }, { type: "calico" }], true],
    ["an IPAM type that is no text", [{ type: "bridge", ipam: { type: { toString: 1 } } }], true],
    ["routes that are no text", [{ type: "bridge", ipam: local({ toString: 1 }, null) }], false],
    [
      "numbers that keep their text",
      [
        parseJson(
          '{"type":"bridge","ipam":{"type":"static","routes":[{"dst":1.0},2.0]}}',
          "",
        ) as object,
      ],
      false,
    ],
  ])("%s", (_name, plugins, may) => {
    expect(mayAddDefaultRoute({ ...plain, plugins: plugins as PluginConfig[] })).toBe(may);
  });
});
