/**
 * Hostile input through the compiled program: whatever comes on stdin, in the environment, in
 * annotations, from delegates and from the disk, there is one document with a listed code on
 * stdout, no stack trace, no control character, nothing attached and nothing left.
 */
import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { calls, type Script } from "./fakes.ts";
import {
  annotated,
  checkFailure,
  compiledGenie,
  control,
  left,
  makeNode,
  type Node,
  nothing,
  spawnGenie,
  stackTrace,
  type WireCall,
  wire,
  wireError,
} from "./wire.ts";

const list = (name: string, type: string) => ({ cniVersion: "1.1.0", name, plugins: [{ type }] });
const lists = {
  "10-blue.conflist": list("blue", "bridge"),
  "20-green.conflist": list("green", "ptp"),
};
const reserve = "$DIR/reserved";

/** A node where `blue` and `green` would work. */
function goodNode(bridge: Script = {}): Node {
  return makeNode({ lists, delegates: { bridge: { reserve, ...bridge }, ptp: { reserve } } });
}

/** Runs a call that must fail before any delegate runs. @returns its code */
async function refused(node: Node, call: Omit<WireCall, "command">): Promise<number> {
  const run = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }), ...call });
  const found = checkFailure(run);
  expect(calls(node.bin)).toEqual([]);
  expect(left(node)).toEqual(nothing);
  return found;
}

const text = (value: unknown) => JSON.stringify(value);
const mebibytes = (count: number, filler = " ") => filler.repeat(count * 1024 * 1024);
const good = { cniVersion: "1.1.0", name: "genie-net", type: "genie" };
/** A table that is not there must not be taken for the node's own at its default path. */
const plain = (more: object) => text({ ...good, plugins_file: "/proc/nonexistent", ...more });

const stdins: [string, string | Uint8Array | object, number][] = [
  ["nothing", "", 6],
  ["white space", " \n\t", 6],
  ["10 MB of spaces", mebibytes(10), 6],
  ["10 MB of JSON", plain({ big: mebibytes(10, "x") }), 6],
  ["broken UTF-8", Buffer.from('{"name":"\xff\xfe"}', "latin1"), 6],
  ["a cut UTF-8 sequence", Buffer.from('{"name":"a"}\xe2\x82', "latin1"), 6],
  ["UTF-16", Buffer.from('{"name":"a"}', "utf16le"), 6],
  ["zero bytes", new Uint8Array(1000), 6],
  ["a zero byte in JSON", '{"name":"a\0"}', 6],
  ["cut JSON", '{"name":"a"', 6],
  ["JSON with a comment", '{"name":"a" /* */}', 6],
  ["two documents", "{} {}", 6],
  ["deep lists", "[".repeat(100_000), 6],
  ["deep lists, closed", `{"name":"a","x":${"[".repeat(5000)}${"]".repeat(5000)}}`, 6],
  ["deep objects", `${'{"a":'.repeat(100_000)}1${"}".repeat(100_000)}`, 6],
  ["a list", "[]", 6],
  ["a string", '"genie"', 6],
  ["a number", "1", 6],
  ["null", "null", 6],
  ["a huge number", "1e999", 6],
  ["no name", { name: undefined }, 7],
  ["a name from __proto__", '{"cniVersion":"1.1.0","__proto__":{"name":"a"}}', 7],
  ["a name that is a path", { name: "../../etc/passwd" }, 7],
  ["a name with a newline", { name: "a\nb" }, 7],
  ["a name with an escape sequence", { name: "\u001b[2Ja" }, 7],
  ["a name that is an object", { name: { toString: "a" } }, 7],
  ["a name that is half a character", '{"name":"\\ud800"}', 7],
  ["a version with an escape sequence", { cniVersion: "\u001b]0;x\u0007" }, 1],
  ["a version that is a list", { cniVersion: ["1.1.0"] }, 1],
  ["a version that is __proto__", { cniVersion: "__proto__" }, 1],
  ["a version of 1 MB", { cniVersion: mebibytes(1, "1") }, 1],
  ["a plugins_file that is relative", { plugins_file: "plugins.toml" }, 7],
  ["a plugins_file that is a list", { plugins_file: ["/etc"] }, 7],
  ["a plugins_file that is a folder", { plugins_file: "/" }, 5],
  ["a plugins_file that is a device", { plugins_file: "/dev/zero" }, 5],
  ["a plugins_file with a zero byte", { plugins_file: "/etc/\0passwd" }, 7],
  ["a plugins_file that is very long", { plugins_file: `/${"x".repeat(10_000)}` }, 7],
  ["a plugins_file below a file", { plugins_file: "/etc/passwd/x" }, 7],
  ["a plugins_file that is no table", { plugins_file: "/bin/sh" }, 7],
  ["args that are text", { args: "cni=blue" }, 7],
  ["a runtimeConfig that is a list", { runtimeConfig: [{}] }, 7],
  ["annotations that are text", annotatedAs("cni"), 7],
  ["annotations that are a list", annotatedAs(["cni"]), 7],
  ["annotations that are a number", annotatedAs(1.5), 7],
  ["a default_plugin that is a path", { default_plugin: "../blue", runtimeConfig: {} }, 7],
  ["a default_plugin that is a list", { default_plugin: ["blue"], runtimeConfig: {} }, 7],
  ["a log_level of its own", { log_level: { valueOf: 1 } }, 7],
  ["a kubeconfig that is a list", { kubernetes: { kubeconfig: ["/x"] } }, 7],
];

function annotatedAs(value: unknown): object {
  return { runtimeConfig: { "io.kubernetes.cri.pod-annotations": value } };
}

describe("stdin", () => {
  test.concurrent.each(stdins)("with %s is refused", async (name, stdin, expected) => {
    using node = goodNode();
    const isSealed = name.startsWith("a plugins_file ");
    expect(await refused(node, { stdin, isSealed })).toBe(expected);
  });

  test("may hold __proto__ and constructor as keys, which mean nothing", async () => {
    using node = goodNode();
    const keys = '"__proto__":{"cni":"green","name":"x"},"constructor":{"prototype":{"cni":1}}';
    const annotations = '{"__proto__":"x","constructor":"y","toString":"z","cni":"blue"}';
    const handed = `"io.kubernetes.cri.pod-annotations":${annotations}`;
    const own = `"cniVersion":"1.1.0","name":"a","type":"genie","args":{${keys}}`;
    const table = `"plugins_file":${text(node.tableFile)}`;
    const stdin = `{${keys},${own},${table},"runtimeConfig":{${keys},${handed}}}`;
    const run = await wire(node, { command: "ADD", stdin });
    expect(run).toEqual({ stdout: expect.stringContaining("10.22.0.5"), stderr: "", status: 0 });
    expect(calls(node.bin).map(({ plugin }) => plugin)).toEqual(["bridge"]);
    const sent = JSON.parse(calls(node.bin)[0]?.stdin ?? "") as Record<string, unknown>;
    expect(Object.keys(sent).sort()).toEqual(["args", "cniVersion", "name", "type"]);
    await wire(node, { command: "DEL", stdin });
    expect(left(node)).toEqual(nothing);
  });

  test.concurrent.each([
    ["text", "prevResult", "none"],
    ["a foreign shape", "prevResult", { ips: { a: 1 }, interfaces: 7 }],
    ["a foreign version", "prevResult", { cniVersion: "9.0.0" }],
    ["an index of nowhere", "prevResult", { ips: [{ address: "10.0.0.1/8", interface: -1 }] }],
    ["annotations that are a list", "runtimeConfig", { "io.kubernetes.cri.pod-annotations": [] }],
    ["an annotation of 1 MB", "runtimeConfig", annotatedAs({ cni: mebibytes(1, "a") })],
  ])("of DEL with %s as %s deletes", async (_name, key, value) => {
    using node = goodNode();
    await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
    const run = await wire(node, { command: "DEL", stdin: { [key]: value } });
    expect(run).toEqual({ stdout: "", stderr: "", status: 0 });
    expect(left(node)).toEqual(nothing);
  });
});

const long = "x".repeat(100_000);
const variables: [string, Record<string, string>, number][] = [
  ["a path as id", { CNI_CONTAINERID: "../../c1" }, 4],
  ["an id of an option", { CNI_CONTAINERID: "-rf" }, 4],
  ["an id with a newline", { CNI_CONTAINERID: "c1\nc2" }, 4],
  ["an id with an escape sequence", { CNI_CONTAINERID: "\u001b[2J" }, 4],
  ["an id of 100 KB", { CNI_CONTAINERID: long }, 4],
  ["the lock of all as id", { CNI_CONTAINERID: "*" }, 4],
  ["an SQL id", { CNI_CONTAINERID: "c1'; DROP TABLE attachments; --" }, 4],
  ["a path as interface", { CNI_IFNAME: "../eth0" }, 4],
  ["a pattern as interface", { CNI_IFNAME: "eth%d" }, 4],
  ["an interface with a newline", { CNI_IFNAME: "eth0\n" }, 4],
  ["an interface with an escape sequence", { CNI_IFNAME: "\u001b[2J" }, 4],
  ["an interface of 100 KB", { CNI_IFNAME: long }, 4],
  ["a netns that is absent", { CNI_NETNS: "/proc/nonexistent" }, 4],
  ["a netns that is relative", { CNI_NETNS: "nonexistent" }, 4],
  ["a netns that is relative and there", { CNI_NETNS: "proc/version" }, 4],
  ["a netns below a file", { CNI_NETNS: "/etc/passwd/x" }, 4],
  ["a netns of 100 KB", { CNI_NETNS: `/${long}` }, 4],
  ["a netns with an escape sequence", { CNI_NETNS: "/\u001b]0;x\u0007" }, 4],
  ["our own netns", { CNI_NETNS: "/proc/thread-self/ns/net" }, 4],
  ["a CNI_PATH of nowhere", { CNI_PATH: "/proc/nonexistent" }, 102],
  ["a CNI_PATH of relative folders", { CNI_PATH: ".:..:bin:~" }, 102],
  ["a CNI_PATH of 100 KB", { CNI_PATH: `/${long}:${":".repeat(20_000)}` }, 102],
  ["a command of 100 KB", { CNI_COMMAND: long }, 4],
  ["a command with an escape sequence", { CNI_COMMAND: "\u001b[2JADD" }, 4],
  ["a command that is a property", { CNI_COMMAND: "constructor" }, 4],
];

const args: [string, string, number][] = [
  ["K8S_ANNOT that is no JSON", "K8S_ANNOT={", 6],
  ["K8S_ANNOT that is deep", `K8S_ANNOT=${"[".repeat(50_000)}`, 6],
  ["K8S_ANNOT that is a list", "K8S_ANNOT=[]", 7],
  ["K8S_ANNOT with numbers", 'K8S_ANNOT={"cni":7}', 7],
  ["a path as network", "cni=../../etc/passwd", 7],
  ["an escape sequence as network", "cni=\u001b]8;;http://x\u0007", 7],
  ["an unknown network", "IgnoreUnknown=1;cni=red", 101],
  ["100 KB of networks", `cni=${"a,".repeat(50_000)}a`, 7],
];

describe("the environment", () => {
  test.concurrent.each(variables)("with %s is refused", async (_name, env, expected) => {
    using node = goodNode();
    expect(await refused(node, { env })).toBe(expected);
  });

  test.concurrent.each(args)("with CNI_ARGS of %s is refused", async (_name, value, expected) => {
    using node = goodNode();
    expect(await refused(node, { env: { CNI_ARGS: value }, stdin: {} })).toBe(expected);
  });

  test.concurrent.each([
    ["separators alone", ";;;=;=;;"],
    ["100 KB of keys", "K=v;".repeat(25_000)],
    ["properties of objects as keys", "__proto__=1;constructor=2;toString=3"],
    [
      "pod names that are paths",
      "K8S_POD_NAMESPACE=../..;K8S_POD_NAME=..%2f;K8S_POD_UID=\u001b[2J",
    ],
  ])("with CNI_ARGS of %s does no harm", async (_name, value) => {
    using node = goodNode();
    const call = { env: { CNI_ARGS: value }, stdin: annotated({ cni: "blue" }) };
    const run = await wire(node, { command: "ADD", ...call });
    expect(run).toEqual({ stdout: expect.stringContaining("10.22.0.5"), stderr: "", status: 0 });
    expect((await wire(node, { command: "DEL", ...call })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });
});

const many = (count: number) => Array.from({ length: count }, (_, i) => `blue@e${i}`).join(",");
const annotations: [string, Record<string, unknown>, number, string?][] = [
  ["a path", { cni: "../blue" }, 7],
  ["a path with an interface", { cni: "blue/../green@eth0" }, 7],
  ["a zero byte", { cni: "blue\0" }, 7],
  ["a newline inside", { cni: "bl\nue" }, 7],
  ["an escape sequence", { cni: "\u001b[31mblue\u001b[0m" }, 7],
  ["a C1 escape sequence", { cni: "\u009b31mblue" }, 7],
  ["a name from right to left", { cni: "\u202eeulb" }, 7],
  ["half a character", { cni: "\ud800" }, 7],
  ["empty names", { cni: ",," }, 7],
  ["a name of 8 KB", { cni: "b".repeat(8192) }, 7],
  ["a name of 200 KB", { cni: "b".repeat(200_000) }, 7],
  ["64 networks", { cni: many(64) }, 7, "at most 32"],
  ["33 networks", { cni: many(33) }, 7, "at most 32"],
  ["a number", { cni: 7 }, 7],
  ["null", { cni: null }, 7],
  ["an object", { cni: { toString: "blue" } }, 7],
  ["more than 256 KiB beside it", { cni: "blue", other: "x".repeat(256 * 1024) }, 7],
  ["100 000 keys", Object.fromEntries(Array.from({ length: 1e5 }, (_, i) => [`k${i}`, "v"])), 7],
  ["a network __proto__", { cni: "__proto__" }, 7],
  ["a network constructor", { cni: "constructor" }, 101],
  ["a network toString", { cni: "toString,blue" }, 101],
  ["an unknown network", { cni: "blue@eth0,red" }, 101],
  ["an interface that is a path", { cni: "blue@../x" }, 7],
  ["an interface that is a pattern", { cni: "blue,green@e%d" }, 7],
  ["an interface of 16 characters", { cni: `blue,green@${"e".repeat(16)}` }, 7],
  ["an interface with a space", { cni: "blue,green@a b" }, 7],
  ["an interface beyond ASCII", { cni: "blue,green@\u00e9th1" }, 7],
  ["an interface with an escape sequence", { cni: "blue,green@\u001b[2J" }, 7],
  ["two interfaces for one network", { cni: "blue@eth0@eth1" }, 7],
  ["no name before an interface", { cni: "@eth0" }, 7],
  ["interfaces that collide", { cni: "blue@net1,green@net1,blue" }, 105],
  ["CNI_IFNAME twice", { cni: "blue@eth0,green@eth0" }, 105],
  ["no network with CNI_IFNAME", { cni: "blue@net1" }, 7],
];

describe("annotations", () => {
  test.concurrent.each(annotations)("with %s are refused", async (...row) => {
    const [, value, expected, says = ""] = row;
    using node = goodNode();
    const call = { command: "ADD", stdin: annotated(value) };
    const run = await wire(node, call);
    expect(checkFailure(run)).toBe(expected);
    expect(wireError(run).msg).toContain(says);
    expect(calls(node.bin)).toEqual([]);
    expect(left(node)).toEqual(nothing);
  });

  test("of 256 KiB, as Kubernetes allows, are read", async () => {
    using node = goodNode();
    const other = "x".repeat(256 * 1024 - 12);
    const run = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue", other }) });
    expect(run).toEqual({ stdout: expect.stringContaining("10.22.0.5"), stderr: "", status: 0 });
    // The annotations are not for delegates, and none of them declared them.
    expect(calls(node.bin)[0]?.stdin.length).toBeLessThan(200);
  });

  test("of 32 networks are attached and detached", async () => {
    using node = goodNode();
    const cni = `blue,${many(31)}`;
    const run = await wire(node, { command: "ADD", stdin: annotated({ cni }) });
    expect(JSON.parse(run.stdout).interfaces).toHaveLength(32);
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test.concurrent.each([
    ["networks", { cni: "\u001b[31mred\u001b[0m\n\u009b2J" }],
    ["interfaces", { cni: "blue,green@\u001b]0;x\u0007" }],
    ["keys", { cni: "blue", "\u001b[2J": 7 }],
  ])("with escape sequences in %s print none in genie plan", async (_name, value) => {
    using node = goodNode();
    const file = join(node.dir, "genie.conf");
    writeFileSync(file, text({ ...good, plugins_file: node.tableFile }));
    const flags = Object.entries(value).flatMap(([key, item]) => [
      "--annotation",
      `${key}=${item}`,
    ]);
    const words = ["plan", "--namespace", "a", "--pod", "b", "--cni-config", file, ...flags];
    const env = { CNI_PATH: node.bin };
    for (const form of [[], ["--json"]]) {
      const run = await spawnGenie([compiledGenie(), ...words, ...form], env);
      expect(run.stdout + run.stderr).not.toMatch(control);
      expect(run.stderr).not.toMatch(stackTrace);
    }
  });
});

const sequence = "\u001b[2J\u001b]0;owned\u0007\u009b31m";
const pod = { name: "eth0", sandbox: "$NETNS" };
const ip = { address: "10.0.0.5/24", interface: 0 };
const result = (more: object) => ({ cniVersion: "1.1.0", interfaces: [pod], ips: [ip], ...more });
const raw = (json: string): Script => ({ ADD: { raw: json } });

const hostileIp = '{"address":"10.0.0.5/24","__proto__":{"gateway":"x"}}';

const refusedResults: [string, Script | string, number?][] = [
  ["2 MiB", { ADD: { flood: { to: "stdout", bytes: 2 * 1024 * 1024 } } }],
  ["no JSON", raw("panic: runtime error")],
  ["escape sequences", raw(sequence)],
  ["broken UTF-8", "#!/bin/sh\nprintf '{\"ips\":[\\377]}'\n"],
  ["two documents", raw('{"cniVersion":"1.1.0"}\n{"cniVersion":"1.1.0"}')],
  ["deep JSON", raw(`{"ips":${"[".repeat(10_000)}${"]".repeat(10_000)}}`)],
  ["a list", raw("[]")],
  ["a foreign interface", { ADD: { result: result({ interfaces: [{ ...pod, name: "eth9" }] }) } }],
  [
    "an escape sequence as interface",
    {
      ADD: { result: result({ interfaces: [{ ...pod, name: sequence }] }) },
    },
  ],
  ["an interface without a name", { ADD: { result: result({ interfaces: [{}] }) } }],
  [
    "an index of 1e999",
    raw('{"interfaces":[{"name":"eth0"}],"ips":[{"address":"1.2.3.4/8","interface":1e999}]}'),
  ],
  ["an index that is text", { ADD: { result: result({ ips: [{ ...ip, interface: "0" }] }) } }],
  ["an address that is none", { ADD: { result: result({ ips: [{ address: sequence }] }) } }],
  ["an address without a length", { ADD: { result: result({ ips: [{ address: "10.0.0.1" }] }) } }],
  ["a length of 33", { ADD: { result: result({ ips: [{ address: "10.0.0.1/33" }] }) } }],
  ["a route to nowhere", { ADD: { result: result({ routes: [{ dst: "everywhere" }] }) } }],
  ["an mtu of 1e999", raw('{"interfaces":[{"name":"eth0","mtu":1e999}]}')],
  ["an mtu below zero", { ADD: { result: result({ interfaces: [{ ...pod, mtu: -1 }] }) } }],
  ["ips that are an object", { ADD: { result: result({ ips: { length: 1 } }) } }],
  ["dns that is a list", { ADD: { result: result({ dns: [] }) } }],
  ["a version __proto__", { ADD: { result: result({ cniVersion: "__proto__" }) } }],
  ["an error of escape sequences", { ADD: { error: { code: 11, msg: `a${sequence}b` } } }, 11],
  ["an error of many lines", { ADD: { error: { code: 11, msg: "a\r\nb\u2028c\tstack" } } }, 11],
  ["an error of 200 KB", { ADD: { error: { code: 11, msg: long, details: long } } }, 11],
  [
    "details of escape sequences",
    { ADD: { error: { code: 11, msg: "a", details: sequence } } },
    11,
  ],
  ["an error of code 1e999", { ADD: { raw: '{"code":1e999,"msg":"a"}', status: 1 } }],
  ["an error of code -1", { ADD: { error: { code: -1, msg: "a" } } }],
  ["an error of code 0", { ADD: { error: { code: 0, msg: "a" } } }],
  ["an error of code 1.5", { ADD: { error: { code: 1.5, msg: "a" } } }],
  ["an error without a message", { ADD: { raw: '{"code":11}', status: 1 } }],
  ["an error of lists", { ADD: { raw: '{"code":[11],"msg":["a"]}', status: 1 } }],
  ["death", { ADD: { signal: "SIGSEGV" } }],
];

describe("a delegate", () => {
  test.concurrent.each(refusedResults)("that answers %s is refused", async (...row) => {
    const [, script, expected = 104] = row;
    using node = makeNode({ lists, delegates: { bridge: withReserve(script), ptp: { reserve } } });
    const run = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue@eth0" }) });
    expect(checkFailure(run)).toBe(expected);
    const second = await wire(node, {
      command: "ADD",
      stdin: annotated({ cni: "blue,green@eth0" }),
      env: { CNI_CONTAINERID: "c2" },
    });
    checkFailure(second);
    expect(left(node)).toEqual(nothing);
  });

  test.concurrent.each<[string, Script, object]>([
    ["a negative index", { result: result({ ips: [{ ...ip, interface: -1 }] }) }, {}],
    ["an index beyond the end", { result: result({ ips: [{ ...ip, interface: 9 }] }) }, {}],
    [
      "keys twice",
      raw('{"cniVersion":"9","cniVersion":"1.1.0","ips":[{"address":"10.0.0.5/24"}]}'),
      {},
    ],
    [
      "__proto__ and constructor",
      raw(`{"__proto__":{"routes":[7]},"constructor":1,"ips":[${hostileIp}]}`),
      {},
    ],
  ])("that answers %s gives a result that holds together", async (_name, script) => {
    using node = goodNode(script);
    const run = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
    expect(JSON.parse(run.stdout)).toEqual({
      ...result({}),
      interfaces: [{ ...pod, sandbox: node.netns }],
      routes: [],
    });
    expect(run).toEqual({ ...run, stderr: "", status: 0 });
  });

  test("that answers 800 KB is heard, in full", async () => {
    const routes = Array.from({ length: 20_000 }, (_, i) => ({
      dst: `10.${i >> 8}.${i & 255}.0/24`,
    }));
    using node = goodNode({ result: result({ routes }) });
    const run = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
    expect(JSON.parse(run.stdout).routes).toHaveLength(20_000);
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test("cannot write escape sequences to the terminal of an operator", async () => {
    using node = goodNode({ stderr: `warning ${sequence}\n` });
    const run = await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
    expect(run.stderr).toContain("warning ");
    expect(run.stderr).not.toMatch(control);
  });
});

function withReserve(script: Script | string): Script | string {
  return typeof script === "string" ? script : { reserve, ...script };
}

const files: [string, Record<string, unknown>, number][] = [
  ["no JSON", { "10-blue.conflist": "{" }, 101],
  ["a type that is a path", { "10-blue.conflist": list("blue", "../bridge") }, 7],
  ["a type with an escape sequence", { "10-blue.conflist": list("blue", sequence) }, 7],
  ["an ipam type that is a path", { "10-blue.conflist": withIpam("/bin/sh") }, 7],
  [
    "33 plugins",
    { "10-blue.conflist": { ...good, name: "blue", plugins: Array(33).fill({ type: "bridge" }) } },
    7,
  ],
  [
    "1 MiB and more",
    { "10-blue.conflist": text({ ...list("blue", "bridge"), x: mebibytes(1, "x") }) },
    101,
  ],
  ["deep JSON", { "10-blue.conflist": `{"name":"blue","plugins":${"[".repeat(9999)}` }, 101],
  [
    "an escape sequence in a name",
    { [`${sequence}.conflist`]: "{", "x.conf": { ...good, name: sequence } },
    101,
  ],
];

function withIpam(type: string): object {
  return { cniVersion: "1.1.0", name: "blue", plugins: [{ type: "bridge", ipam: { type } }] };
}

describe("a config list on disk", () => {
  test.concurrent.each(files)("with %s is refused", async (_name, content, expected) => {
    using node = makeNode({ lists: content, delegates: { bridge: { reserve } } });
    const found = await refused(node, { stdin: annotated({ cni: "blue" }) });
    // A broken file that answers to the name by its own name says what is wrong with it.
    expect([expected, 5, 6]).toContain(found);
    const file = join(node.dir, "genie.conf");
    writeFileSync(file, text({ ...good, plugins_file: node.tableFile }));
    const run = await spawnGenie([compiledGenie(), "validate", "--cni-config", file], {});
    expect(run.stdout + run.stderr).not.toMatch(control);
    expect(run.stdout + run.stderr).not.toMatch(stackTrace);
  });
});
