/**
 * The words of the protocol: names, versions, errors, log lines, what goes to stdout; and, through
 * the program, lib/streams.ts.
 */
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
  supportedVersions,
  toCniError,
  version,
  writeError,
  writeResult,
} from "../lib/cni.ts";
import { binary } from "./build.ts";
import { genieProgram, makeHost, tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";

const env = {
  CNI_CONTAINERID: "c1",
  CNI_NETNS: "/var/run/netns/blue",
  CNI_IFNAME: "eth0",
  CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAME=web",
  CNI_PATH: "/opt/cni/bin:/b",
};

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
])("fact 7: interfaceNameIssue(%j)", (name, issue) => {
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
  test("fact 5: a success without result is nothing", () => {
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
      "fact 2: an error",
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
      "fact 23: a msg of one bounded line, details longer",
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
  ])("fact 1: answers VERSION %s and reads no stdin", async (_name, variables) => {
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
      "fact 5: a GC at 1.0.0",
      { CNI_COMMAND: "GC", CNI_PATH: "/b" },
      bytes('{"cniVersion":"1.0.0","name":"n"}'),
      1,
      "it exists since 1.1.0",
      "1.1.0",
    ],
  ];
  test.each(rejects)("fact 2: refuses %s on stdout", async (_name, vars, stdin, ...expected) => {
    const [number, part, cniVersion] = expected;
    const { stdout, stderr, status } = await genie(vars, stdin);
    expect(JSON.parse(stdout)).toEqual({
      cniVersion,
      code: number,
      msg: expect.stringContaining(part),
      ...anyDetails(stdout),
    });
    expect({ stderr, status }).toEqual({ stderr: "", status: 1 });
  });

  /** `details` where the answer has them. */
  function anyDetails(stdout: string): object {
    return stdout.includes('"details"') ? { details: expect.any(String) } : {};
  }

  test.skipIf(lacks("the binary"))("is tested as the binary where it was built", () => {
    expect(genieProgram() === binary).toBe(existsSync(binary));
  });
});
