/** One call of the runtime: what is taken, and what is refused with which code. */
import { describe, expect, test } from "bun:test";
import type { Request } from "../lib/call.ts";
import { supportedVersions } from "../lib/cni.ts";
import { readCommand, readPath, readRequest } from "../lib/request.ts";
import { makeHost } from "./fakes.ts";
import { failureOf, says } from "./stage.ts";

/** What a call throws, as the runtime sees it. */
const failure = failureOf;

const config = { cniVersion: "1.1.0", name: "genie", type: "genie" };
const env = {
  CNI_CONTAINERID: "c1",
  CNI_NETNS: "/var/run/netns/blue",
  CNI_IFNAME: "eth0",
  CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAME=web",
  CNI_PATH: "/opt/cni/bin:/b",
};
const add: Request = {
  command: "ADD",
  containerId: "c1",
  netns: "/var/run/netns/blue",
  ifName: "eth0",
  args: "IgnoreUnknown=1;K8S_POD_NAME=web",
  path: ["/opt/cni/bin", "/b"],
  cniVersion: "1.1.0",
  config,
};
const nobody = { containerId: "", netns: "", ifName: "" };

describe("readCommand()", () => {
  test.each(["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION"] as const)("takes %s", (name) => {
    expect(readCommand({ CNI_COMMAND: name })).toBe(name);
  });
  test.each([undefined, "", "add", "ADD\n", "UPDATE", "__proto__"])("refuses %j", (name) => {
    expect(failure(() => readCommand({ CNI_COMMAND: name }))).toEqual(
      says(4, "expected one of ADD, DEL, CHECK, GC, STATUS, VERSION"),
    );
  });
});

describe("readRequest() takes", () => {
  type Row = [string, Request["command"], Record<string, string | undefined>, object, Request];
  const { CNI_NETNS: _netns, CNI_PATH: _path, ...delEnv } = env;
  test.each<Row>([
    ["an ADD", "ADD", env, config, add],
    [
      "fact 9: a DEL without netns and folders",
      "DEL",
      delEnv,
      config,
      { ...add, command: "DEL", netns: "", path: [] },
    ],
    [
      "fact 9: a DEL whose netns is gone",
      "DEL",
      { ...env, CNI_NETNS: "" },
      config,
      { ...add, command: "DEL", netns: "" },
    ],
    ["a CHECK", "CHECK", env, config, { ...add, command: "CHECK" }],
    [
      "fact 6: a GC without container, and forgets one",
      "GC",
      { ...env, CNI_CONTAINERID: "../x", CNI_IFNAME: "" },
      config,
      { ...add, ...nobody, command: "GC" },
    ],
    [
      "fact 6: a STATUS without any variable",
      "STATUS",
      {},
      config,
      { ...add, ...nobody, command: "STATUS", args: "", path: [] },
    ],
    [
      "the STATUS of containerd, its variables set and empty",
      "STATUS",
      { CNI_CONTAINERID: "", CNI_NETNS: "", CNI_IFNAME: "", CNI_ARGS: "", CNI_PATH: "/b" },
      config,
      { ...add, ...nobody, command: "STATUS", args: "", path: ["/b"] },
    ],
    [
      "fact 5: a CHECK at 0.4.0",
      "CHECK",
      env,
      { ...config, cniVersion: "0.4.0" },
      { ...add, command: "CHECK", cniVersion: "0.4.0", config: { ...config, cniVersion: "0.4.0" } },
    ],
    [
      "a config without version as the first one",
      "ADD",
      env,
      { name: "n" },
      { ...add, cniVersion: "0.1.0", config: { name: "n" } },
    ],
    [
      "a config with an empty version as the first one",
      "ADD",
      env,
      { name: "n", cniVersion: "" },
      { ...add, cniVersion: "0.1.0", config: { name: "n", cniVersion: "" } },
    ],
    [
      "null for an object as absent",
      "ADD",
      env,
      { ...config, args: null, runtimeConfig: null },
      add,
    ],
    [
      "folders with gaps between them",
      "ADD",
      { ...env, CNI_PATH: ":/a::/b:" },
      config,
      { ...add, path: ["/a", "/b"] },
    ],
    [
      "a nested container of Mesos",
      "ADD",
      { ...env, CNI_CONTAINERID: "a-1.b_2" },
      config,
      { ...add, containerId: "a-1.b_2" },
    ],
  ])("%s", (_name, command, variables, stdin, expected) => {
    expect(readRequest(makeHost({ env: variables, stdin }), command)).toEqual(expected);
  });

  test.each(supportedVersions)("fact 3: an ADD at %s", (cniVersion) => {
    const host = makeHost({ env, stdin: { ...config, cniVersion } });
    expect(readRequest(host, "ADD").cniVersion).toBe(cniVersion);
  });
});

describe("readRequest() refuses", () => {
  const missing: [Request["command"], string[], string][] = [
    ["ADD", ["CNI_CONTAINERID"], "CNI_CONTAINERID for ADD"],
    ["ADD", ["CNI_NETNS"], "CNI_NETNS for ADD"],
    ["ADD", ["CNI_IFNAME"], "CNI_IFNAME for ADD"],
    ["ADD", Object.keys(env), "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME for ADD"],
    ["DEL", ["CNI_CONTAINERID"], "CNI_CONTAINERID for DEL"],
    ["DEL", ["CNI_IFNAME"], "CNI_IFNAME for DEL"],
    ["CHECK", ["CNI_NETNS"], "CNI_NETNS for CHECK"],
    ["GC", ["CNI_PATH"], "CNI_PATH for GC"],
  ];
  test.each(missing)("fact 6: %s without %j", (command, names, part) => {
    const unset = Object.fromEntries(names.map((name) => [name, undefined]));
    const empty = Object.fromEntries(names.map((name) => [name, ""]));
    for (const change of [unset, empty]) {
      const host = makeHost({ env: { ...env, ...change }, stdin: config });
      expect(failure(() => readRequest(host, command))).toEqual(
        says(4, `Missing required environment variable ${part}`),
      );
    }
  });

  const variables: [string, Record<string, string>, string][] = [
    ["a container id that climbs", { CNI_CONTAINERID: "../x" }, 'CNI_CONTAINERID "../x"'],
    ["a container id like an option", { CNI_CONTAINERID: "-x" }, 'CNI_CONTAINERID "-x"'],
    ["a container id of two lines", { CNI_CONTAINERID: "a\nb" }, 'CNI_CONTAINERID "a b"'],
    ["a long container id", { CNI_CONTAINERID: "a".repeat(257) }, "at most 256"],
    ["fact 7: a long interface", { CNI_IFNAME: "e".repeat(16) }, "longer than 15"],
    ["fact 7: a slash", { CNI_IFNAME: "a/b" }, 'it holds "/" or ":"'],
    ["fact 7: a colon", { CNI_IFNAME: "eth0:1" }, 'it holds "/" or ":"'],
    ["fact 7: a space", { CNI_IFNAME: "eth 0" }, "not printable ASCII"],
    ["fact 7: a dot", { CNI_IFNAME: "." }, "folder name"],
    ["fact 7: two dots", { CNI_IFNAME: ".." }, "folder name"],
  ];
  test.each(variables)("%s", (_name, change, part) => {
    const host = makeHost({ env: { ...env, ...change }, stdin: config });
    expect(failure(() => readRequest(host, "ADD"))).toEqual(says(4, part));
  });

  const nested = (depth: number) => `{"name":"n","x":${"[".repeat(depth)}${"]".repeat(depth)}}`;
  const inputs: [string, string, number, string][] = [
    ["nothing", "", 6, "it is empty"],
    ["only spaces", " \n\t", 6, "it is empty"],
    ["half a document", '{"name":"n"', 6, "it is not valid JSON"],
    ["two documents", '{"name":"n"}{}', 6, "it is not valid JSON"],
    ["NUL bytes", "\0\0", 6, "it is not valid JSON"],
    ["a list", "[]", 6, "expected a JSON object"],
    ["a string", '"x"', 6, "expected a JSON object"],
    ["null", "null", 6, "expected a JSON object"],
    ["a number that keeps its text", "1e400", 6, "expected a JSON object"],
    ["deep JSON", nested(128), 6, "nests deeper than 128 levels"],
    ["JSON so deep that it would end the stack", nested(1_000_000), 6, "nests deeper"],
    ["fact 7: no name", "{}", 7, '"name" is missing'],
    ["fact 7: a slash in the name", '{"name":"a/b"}', 7, '"name" is not valid'],
    ["a name that climbs", '{"name":"../x"}', 7, '"name" is not valid'],
    ["a name of two lines", '{"name":"a\\nb"}', 7, '"name" is not valid'],
    ["a name that ends in a newline", '{"name":"a\\n"}', 7, '"name" is not valid'],
    ["a name with NUL", '{"name":"a\\u0000"}', 7, '"name" is not valid'],
    ["a name that is a list", '{"name":["a"]}', 7, '"name" is not valid'],
    ["a name inherited", '{"__proto__":{"name":"a"}}', 7, '"name" is missing'],
    ["args that are a list", '{"name":"a","args":[]}', 7, '"args" is not an object'],
    ["a runtimeConfig that is text", '{"name":"a","runtimeConfig":"x"}', 7, '"runtimeConfig" is'],
    ["a version of later", '{"name":"a","cniVersion":"2.0.0"}', 1, 'CNI version "2.0.0"'],
    ["a version that is a number", '{"name":"a","cniVersion":1}', 1, "CNI version 1:"],
    // Bun: such a number is an object without toString.
    ["a version like a number", '{"name":"a","cniVersion":1.10}', 1, "CNI version 1.10:"],
    ["a version that is a trap", '{"name":"a","cniVersion":{"toString":1}}', 1, "CNI version {"],
  ];
  test.each(inputs)("%s", (_name, stdin, number, part) => {
    expect(failure(() => readRequest(makeHost({ env, stdin }), "ADD"))).toEqual(says(number, part));
  });

  const versions: [Request["command"], string, string][] = [
    ["CHECK", "0.3.1", "Config version 0.3.1 does not allow CHECK: it exists since 0.4.0"],
    ["CHECK", "", "Config version 0.1.0 does not allow CHECK"],
    ["GC", "1.0.0", "Config version 1.0.0 does not allow GC: it exists since 1.1.0"],
    ["STATUS", "1.0.0", "Config version 1.0.0 does not allow STATUS: it exists since 1.1.0"],
  ];
  test.each(versions)("fact 5: %s at version %j", (command, cniVersion, part) => {
    const host = makeHost({ env, stdin: { ...config, cniVersion } });
    expect(failure(() => readRequest(host, command))).toEqual(says(1, part));
  });
});

test.each([
  [undefined, []],
  ["", []],
  ["/a", ["/a"]],
  [":/a::/b:", ["/a", "/b"]],
])("readPath() of %j", (path, folders) => {
  expect(readPath({ CNI_PATH: path })).toEqual(folders);
});
