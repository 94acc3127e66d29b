/** The wire: variables, stdin, JSON that is hostile until parsed, versions, log lines, errors. */
import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import {
  CniError,
  code,
  compareVersions,
  interfaceNameIssue,
  isNetworkName,
  isSupported,
  type LogLevel,
  log,
  type Request,
  supportedVersions,
  toCniError,
  version,
  writeError,
  writeResult,
} from "../lib/cni.ts";
import { isObject, parseJson } from "../lib/json.ts";
import { readCommand, readRequest } from "../lib/request.ts";
import { oneLine } from "../lib/text.ts";
import { genieProgram, makeHost, tempDir } from "./fakes.ts";

/** What a call throws, as the runtime sees it. */
function failure(act: () => unknown): { code: number; msg: string } {
  try {
    act();
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return { code: error.code, msg: error.message };
  }
  return { code: 0, msg: "it did not fail" };
}

const says = (code: number, part: string) => ({ code, msg: expect.stringContaining(part) });

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
      "pitfall 9: a DEL without netns and folders",
      "DEL",
      delEnv,
      config,
      { ...add, command: "DEL", netns: "", path: [] },
    ],
    [
      "pitfall 9: a DEL whose netns is gone",
      "DEL",
      { ...env, CNI_NETNS: "" },
      config,
      { ...add, command: "DEL", netns: "" },
    ],
    ["a CHECK", "CHECK", env, config, { ...add, command: "CHECK" }],
    [
      "pitfall 6: a GC without container, and forgets one",
      "GC",
      { ...env, CNI_CONTAINERID: "../x", CNI_IFNAME: "" },
      config,
      { ...add, ...nobody, command: "GC" },
    ],
    [
      "pitfall 6: a STATUS without any variable",
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
      "pitfall 5: a CHECK at 0.4.0",
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

  test.each(supportedVersions)("pitfall 3: an ADD at %s", (cniVersion) => {
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
  test.each(missing)("pitfall 6: %s without %j", (command, names, part) => {
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
    ["pitfall 7: a long interface", { CNI_IFNAME: "e".repeat(16) }, "longer than 15"],
    ["pitfall 7: a slash", { CNI_IFNAME: "a/b" }, 'it holds "/" or ":"'],
    ["pitfall 7: a colon", { CNI_IFNAME: "eth0:1" }, 'it holds "/" or ":"'],
    ["pitfall 7: a space", { CNI_IFNAME: "eth 0" }, "not printable ASCII"],
    ["pitfall 7: a dot", { CNI_IFNAME: "." }, "folder name"],
    ["pitfall 7: two dots", { CNI_IFNAME: ".." }, "folder name"],
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
    ["pitfall 7: no name", "{}", 7, '"name" is missing'],
    ["pitfall 7: a slash in the name", '{"name":"a/b"}', 7, '"name" is not valid'],
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
  test.each(versions)("pitfall 5: %s at version %j", (command, cniVersion, part) => {
    const host = makeHost({ env, stdin: { ...config, cniVersion } });
    expect(failure(() => readRequest(host, command))).toEqual(says(1, part));
  });
});

describe("parseJson()", () => {
  test.each([
    "{}",
    '{"b":1,"a":[true,false,null,"x"]}',
    '{"id":9223372036854775807,"more":12345678901234567890123}',
    '{"a":1.0,"b":1.50,"c":1e400,"d":-0,"e":1E5,"f":2e+3,"g":-0.0}',
    '{"__proto__":{"polluted":1.5},"constructor":1}',
    '{"text":"1.0 \\" 12345678901234567890 {[\\\\"}',
    '"12345678901234567890"',
    `${"[".repeat(128)}${"]".repeat(128)}`,
  ])("pitfall 14: gives back %s", (text) => {
    const value = parseJson(text, "it");
    expect(JSON.stringify(value)).toBe(text);
    expect((value as { polluted?: unknown }).polluted).toBeUndefined();
  });

  test.each([
    ["nothing", "", "it is not valid JSON"],
    ["a comment", "{} // x", "it is not valid JSON"],
    ["an open string", '{"a":"\\', "it is not valid JSON"],
    ["brackets the wrong way round", "}}{{", "it is not valid JSON"],
    ["129 levels", `${"[".repeat(129)}${"]".repeat(129)}`, "it nests deeper than 128 levels"],
  ])("refuses %s", (_name, text, part) => {
    expect(failure(() => parseJson(text, "it"))).toEqual(says(6, `Cannot decode it: ${part}`));
  });
});

test.each([
  [{}, true],
  [Object.create(null), true],
  [null, false],
  [[], false],
  ["x", false],
  [parseJson("1.0", "it"), false],
])("isObject(%j) is %p", (value, is) => {
  expect(isObject(value)).toBe(is);
});

test.each([
  ["eth0", undefined],
  ["a".repeat(15), undefined],
  ["wg-0.1_x", undefined],
  ["br@1", undefined],
  ["", "it is empty"],
  ["a".repeat(16), "longer than 15"],
  ["..", "folder name"],
  ["éth0", "not printable ASCII"],
  ["a\0", "not printable ASCII"],
  ["a\n", "not printable ASCII"],
  ["../x", 'it holds "/" or ":"'],
  ["eth%d", 'it holds "%"'],
])("pitfall 7: interfaceNameIssue(%j)", (name, issue) => {
  expect(interfaceNameIssue(name)).toEqual(issue && expect.stringContaining(issue));
});

test.each<[unknown, boolean]>([
  ["calico", true],
  ["10-k8s_pod.network", true],
  ["", false],
  ["-a", false],
  [".a", false],
  ["a b", false],
  ["a/b", false],
  ["a\n", false],
  [undefined, false],
  [1, false],
])("isNetworkName(%j) is %p", (name, is) => {
  expect(isNetworkName(name)).toBe(is);
});

test("versions have an order", () => {
  const shuffled = supportedVersions.toReversed();
  expect(shuffled.sort(compareVersions)).toEqual([...supportedVersions]);
  expect(["1.1.0", "1.2.0", "", undefined, 1].map(isSupported)).toEqual([
    true,
    false,
    false,
    false,
    false,
  ]);
});

test("error codes are unique, and the SPEC's or above 99", () => {
  const numbers = Object.values(code);
  expect(new Set(numbers).size).toBe(numbers.length);
  const spec = [1, 2, 3, 4, 5, 6, 7, 11, 50, 51];
  expect(numbers.filter((number) => number < 100)).toEqual(spec as typeof numbers);
});

describe("toCniError()", () => {
  const own = new CniError(7, "own");
  test("keeps ours", () => {
    expect(toCniError(own)).toBe(own);
  });
  test.each<[string, unknown, string]>([
    ["an error of others", new TypeError("x is undefined"), "Internal error: x is undefined"],
    ["a text", "text", "Internal error: text"],
    ["nothing", undefined, "Internal error: undefined"],
  ])("takes %s for a bug of ours", (_name, thrown, message) => {
    const { code: number, message: msg, cause } = toCniError(thrown);
    expect({ number, msg, cause }).toEqual({ number: 999, msg: message, cause: thrown });
  });
});

describe("oneLine()", () => {
  test.each([
    ["plain", 10, "plain"],
    [" a\r\n\tb\0c ", 10, "a b c"],
    ["a\u2028b\u009bc", 10, "a b c"],
    ["abcdef", 6, "abcdef"],
    ["abcdefg", 6, "abcde…"],
  ])("%j to %d", (text, lengthMax, expected) => {
    expect(oneLine(text, lengthMax)).toBe(expected);
  });
});

describe("log()", () => {
  test.each<[string, LogLevel, LogLevel, string, object, string]>([
    ["a warning at info", "info", "warn", "late", { ms: 5 }, "genie: warn: late ms=5\n"],
    ["nothing below the level", "warn", "info", "done", {}, ""],
    ["debug at debug", "debug", "debug", "x", {}, "genie: debug: x\n"],
    [
      "one line whatever comes",
      "info",
      "error",
      "a\nb",
      { pod: 'x"y', empty: "", gone: undefined, two: "a\nb" },
      'genie: error: a b pod="x\\"y" empty="" two="a b"\n',
    ],
  ])("writes %s", (_name, threshold, level, msg, fields, expected) => {
    const host = makeHost({ level: threshold });
    log(host, level, msg, { ...fields });
    expect(host.written).toEqual({ stdout: "", stderr: expected });
  });

  test("writes to the file as well, with the time", () => {
    using dir = tempDir();
    const file = join(dir.path, "genie.log");
    const host = makeHost();
    host.log = { level: "info", file };
    log(host, "error", "a");
    log(host, "error", "b");
    expect(readFileSync(file, "utf8")).toBe(
      "2023-11-14T22:13:20.000Z genie: error: a\n2023-11-14T22:13:20.000Z genie: error: b\n",
    );
  });

  test("says once that the file cannot be written", () => {
    using dir = tempDir();
    const host = makeHost();
    host.log = { level: "info", file: join(dir.path, "none", "genie.log") };
    log(host, "error", "a");
    log(host, "error", "b");
    const [first, second, ...others] = host.written.stderr.split("\n");
    expect([first, others]).toEqual(["genie: error: a", ["genie: error: b", ""]]);
    expect(second).toStartWith("genie: warn: Cannot write log file: ");
  });
});

describe("what goes to stdout", () => {
  const written = (write: (host: ReturnType<typeof makeHost>) => void) => {
    const host = makeHost();
    write(host);
    return host.written;
  };
  test("pitfall 5: a success without result is nothing", () => {
    expect(written((host) => writeResult(host, undefined))).toEqual({ stdout: "", stderr: "" });
  });
  test("a result is one line", () => {
    expect(written((host) => writeResult(host, version())).stdout).toBe(
      '{"cniVersion":"1.1.0","supportedVersions":' +
        '["0.1.0","0.2.0","0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}\n',
    );
  });
  test.each<[string, CniError, string | undefined, object]>([
    [
      "pitfall 2: an error",
      new CniError(code.invalidConfig, "bad"),
      undefined,
      { cniVersion: "1.1.0", code: 7, msg: "bad" },
    ],
    [
      "the version of the request",
      new CniError(11, "later", { details: "a\nb" }),
      "0.3.1",
      { cniVersion: "0.3.1", code: 11, msg: "later", details: "a\nb" },
    ],
    [
      "pitfall 23: a msg of one bounded line, details longer",
      new CniError(100, `a\n${"b".repeat(2000)}`, { details: "c".repeat(10_000) }),
      "1.0.0",
      {
        cniVersion: "1.0.0",
        code: 100,
        msg: `a ${"b".repeat(1021)}…`,
        details: "c".repeat(8192),
      },
    ],
  ])("%s", (_name, error, cniVersion, expected) => {
    const { stdout, stderr } = written((host) => writeError(host, error, cniVersion));
    expect([JSON.parse(stdout), stdout.trimEnd().split("\n").length, stderr]).toEqual([
      expected,
      1,
      "",
    ]);
  });
});

/** The program with raw bytes for stdin; without them stdin stays open and silent. */
async function genie(variables: Record<string, string>, stdin?: Uint8Array) {
  const program = genieProgram();
  const child = Bun.spawn(program.endsWith(".ts") ? [process.execPath, program] : [program], {
    env: variables,
    cwd: "/",
    stdin: stdin ?? "pipe",
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr, status] = await Promise.all([
    child.stdout.text(),
    child.stderr.text(),
    child.exited,
  ]);
  return { stdout, stderr, status };
}

describe("the program", () => {
  const addEnv = { ...env, CNI_COMMAND: "ADD" };
  const bytes = (text: string) => Buffer.from(text);

  test.each<[string, Record<string, string>]>([
    ["without another variable", {}],
    ["as podman asks", { CNI_CONTAINERID: "", CNI_IFNAME: "dummy", CNI_NETNS: "dummy" }],
  ])("pitfall 1: answers VERSION %s and reads no stdin", async (_name, variables) => {
    const { stdout, stderr, status } = await genie({ ...variables, CNI_COMMAND: "VERSION" });
    expect(JSON.parse(stdout)).toEqual({
      cniVersion: "1.1.0",
      supportedVersions: [...supportedVersions],
    });
    expect({ stderr, status }).toEqual({ stderr: "", status: 0 });
  });

  const rejects: [string, Record<string, string>, Uint8Array, number, string, string][] = [
    ["an empty command", { CNI_COMMAND: "" }, bytes("{}"), 4, 'CNI_COMMAND ""', "1.1.0"],
    ["an unknown command", { CNI_COMMAND: "HELP" }, bytes("{}"), 4, '"HELP"', "1.1.0"],
    ["an ADD without variables", { CNI_COMMAND: "ADD" }, bytes("{}"), 4, "Missing", "1.1.0"],
    ["an empty stdin", addEnv, bytes(""), 6, "it is empty", "1.1.0"],
    ["broken UTF-8", addEnv, Buffer.from([0x22, 0xff, 0x22]), 6, "it is not UTF-8", "1.1.0"],
    ["10 MB", addEnv, Buffer.alloc(10_000_000, " "), 6, "larger than 4194304 bytes", "1.1.0"],
    ["10 MB of brackets", addEnv, Buffer.alloc(10_000_000, "["), 6, "larger than", "1.1.0"],
    ["4 MB of brackets", addEnv, Buffer.alloc(4_000_000, "["), 6, "nests deeper", "1.1.0"],
    [
      "pitfall 5: a GC at 1.0.0",
      { CNI_COMMAND: "GC", CNI_PATH: "/b" },
      bytes('{"cniVersion":"1.0.0","name":"n"}'),
      1,
      "it exists since 1.1.0",
      "1.1.0",
    ],
  ];
  test.each(rejects)("pitfall 2: refuses %s on stdout", async (_name, vars, stdin, ...expected) => {
    const [number, part, cniVersion] = expected;
    const { stdout, stderr, status } = await genie(vars, stdin);
    expect(JSON.parse(stdout)).toEqual({
      cniVersion,
      ...says(number, part),
      ...anyDetails(stdout),
    });
    expect({ stderr, status }).toEqual({ stderr: "", status: 1 });
  });

  /** `details` where the answer has them. */
  function anyDetails(stdout: string): object {
    return stdout.includes('"details"') ? { details: expect.any(String) } : {};
  }

  test("is tested as the binary where it was built", () => {
    const binary = join(import.meta.dir, "..", "dist", "genie");
    expect(genieProgram() === binary).toBe(existsSync(binary));
  });
});
