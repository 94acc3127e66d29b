/** What each ending of a delegate means to the runtime. */
import { describe, expect, test } from "bun:test";
import type { Ending, Output } from "../lib/call.ts";
import { saysNothing } from "../lib/check.ts";
import { CniError, code } from "../lib/cni.ts";
import type { Attachment, Result } from "../lib/record.ts";
import { isHopeless } from "../lib/recorded.ts";
import { endingError, protocolError, withKnownFault } from "../lib/recovery/delegate_error.ts";

const attachment: Attachment = {
  containerId: "c1",
  requestIfName: "eth0",
  requestNetwork: "genie-net",
  ifName: "eth1",
  primary: false,
  network: "blue",
  reason: "",
  list: {
    cniVersion: "1.0.0",
    name: "blue",
    disableCheck: false,
    disableGC: false,
    plugins: [{ type: "bridge" }],
  },
  plugins: ["/opt/cni/bin/bridge"],
  cniArgs: "",
  cniPath: "/opt/cni/bin",
  capabilityArgs: {},
  args: {},
  timeoutMs: 1000,
  netns: "",
  pod: { namespace: "ns", name: "pod", uid: "" },
};
const output: Output = { stdout: "", stdoutIsText: true, stderr: "", durationUs: 1_234_567 };
const plugin = { type: "bridge" };

function meaning(ending: Ending, said: Partial<Output> = {}, command = "ADD") {
  const error = endingError({ ...output, ...said, ...ending }, attachment, plugin, command);
  return error && { code: error.code, msg: error.message, details: error.details };
}

const exit = (status: number): Ending => ({ kind: "exit", status });
const start = 'Cannot attach network "blue" (eth1) of pod ns/pod: plugin "bridge"';
const text = (value: object) => JSON.stringify(value);
const document = (value: object) => ({ stdout: text(value) });

const rows: [string, Ending, Partial<Output>, [number, string, string] | undefined][] = [
  ["a success", exit(0), { stderr: "chatter" }, undefined],
  [
    "its own error",
    exit(1),
    document({ code: 11, msg: "busy", details: "of address" }),
    [11, "failed: busy", "of address"],
  ],
  [
    "its own error, and what it said",
    exit(1),
    { ...document({ code: 999, msg: "a\nb" }), stderr: "trace\n" },
    [999, "failed: a b", "trace\n"],
  ],
  ["a code of ours", exit(1), document({ code: 102, msg: "x" }), [102, "failed: x", ""]],
  ["code 0", exit(1), document({ code: 0, msg: "x" }), [104, "failed: x", ""]],
  ["no code", exit(1), document({ msg: "x" }), [104, "failed: x", ""]],
  ["a text for a code", exit(1), document({ code: "7", msg: "x" }), [104, "failed: x", ""]],
  [
    "no message",
    exit(1),
    document({ code: 7 }),
    [104, 'exited with status 1 without a message: {"code":7}', '{"code":7}'],
  ],
  [
    "an empty message, and details",
    exit(1),
    document({ code: 100, msg: " ", details: "the range is full" }),
    [100, "failed: the range is full", "the range is full"],
  ],
  [
    "an empty message alone",
    exit(1),
    document({ code: 100, msg: "" }),
    [100, "failed: it does not say why", ""],
  ],
  ["a list", exit(1), document([]), [104, "exited with status 1 without a message: []", "[]"]],
  ["nothing at all", exit(3), {}, [104, "exited with status 3 and printed nothing", ""]],
  [
    "nothing on stdout",
    exit(3),
    { stderr: "why\n" },
    [104, "exited with status 3 and printed nothing: why", "why"],
  ],
  [
    "garbage",
    exit(2),
    { stdout: "oops", stderr: "why" },
    [104, "exited with status 2 and printed no error document: oops", "oops\nwhy"],
  ],
  [
    "a log line, then an error document",
    exit(1),
    { stdout: `I0101 no {braces}\n${text({ code: 11, msg: "no addresses" })}\n` },
    [11, "failed: no addresses", ""],
  ],
  [
    "a result, then an error document of several lines",
    exit(1),
    {
      stdout: `${text({ ips: [{ address: "10.0.0.1/8" }] })}${JSON.stringify(
        { code: 7, msg: "no subnet", details: "d", more: { msg: "not this" } },
        null,
        2,
      )}`,
    },
    [7, "failed: no subnet", "d"],
  ],
  [
    "an error document, then a log line",
    exit(1),
    { stdout: `${text({ code: 7, msg: "no subnet" })}\nbye` },
    [7, "failed: no subnet", ""],
  ],
  [
    "a result alone",
    exit(1),
    { stdout: `log\n${text({ ips: [] })}` },
    [104, 'exited with status 1 and printed no error document: log {"ips":[]}', 'log\n{"ips":[]}'],
  ],
  [
    "a signal",
    { kind: "signal", signal: "SIGSEGV" },
    { stderr: "e" },
    [104, "was killed by SIGSEGV", "e"],
  ],
  ["a timeout", { kind: "timeout" }, {}, [103, "timed out after 1235 ms, it was killed", ""]],
  ["a flood", { kind: "overflow" }, {}, [104, "printed more than 1 MiB, it was killed", ""]],
  ["our own end", { kind: "aborted" }, {}, [11, "was ended because genie was asked to end", ""]],
  ...["ENOENT", "EACCES", "ENOEXEC", "ENOTDIR", "ELOOP", "EISDIR", "EPERM"].map(
    (reason): (typeof rows)[number] => [
      `a binary that is unusable: ${reason}`,
      { kind: "spawn", reason },
      {},
      [102, `cannot be started (${reason}), install it or mend its file`, ""],
    ],
  ),
  [
    "a binary being replaced",
    { kind: "spawn", reason: "ETXTBSY" },
    {},
    [11, "is being replaced (text file busy), try again", ""],
  ],
  // A storm of pods must not make DEL believe that a plugin was uninstalled.
  ...["EAGAIN", "ENOMEM", "EMFILE", "ENFILE"].map((reason): (typeof rows)[number] => [
    `a node at its limit: ${reason}`,
    { kind: "spawn", reason },
    {},
    [11, `cannot be started now (${reason}), try again`, ""],
  ]),
];

describe("endingError()", () => {
  test.each(rows)("%s", (_name, ending, said, expected) => {
    const [number, issue, details] = expected ?? [];
    expect(meaning(ending, said)).toEqual(
      number === undefined
        ? undefined
        : { code: number, msg: `${start} ${issue}`, details: details ?? "" },
    );
  });

  test.each([
    ["DEL", "detach"],
    ["CHECK", "check"],
    ["GC", "collect garbage of"],
    ["STATUS", "use"],
  ])("names what %s could not do", (command, verb) => {
    expect(meaning({ kind: "timeout" }, {}, command)?.msg).toStartWith(`Cannot ${verb} network`);
  });

  test("keeps the tail of a long stderr", () => {
    const details = meaning(exit(1), { stderr: `${"x".repeat(9000)}end` })?.details ?? "";
    expect([details.length, details.endsWith("end")]).toEqual([4096, true]);
  });
});

describe("isHopeless()", () => {
  const ended = (ending: Ending, said = {}) =>
    endingError({ ...output, ...said, ...ending }, attachment, plugin, "DEL");
  test.each([
    ["a missing binary", ended({ kind: "spawn", reason: "ENOENT" }), true],
    ["a busy one", ended({ kind: "spawn", reason: "ETXTBSY" }), false],
    ["a node at its limit", ended({ kind: "spawn", reason: "EAGAIN" }), false],
    ["a plugin whose own code is 102", ended(exit(1), document({ code: 102, msg: "x" })), false],
    ["our 102 from elsewhere", new CniError(code.delegateNotFound, "x"), false],
  ])("of %s", (_name, error, expected) => {
    expect(error && isHopeless(error)).toBe(expected);
  });
});

describe("protocolError()", () => {
  test("quotes the beginning of the answer in its details alone", () => {
    const {
      code: number,
      message,
      details,
    } = protocolError(attachment, plugin, "it printed noise", "n".repeat(5000));
    expect([number, message, details.length]).toEqual([
      104,
      `${start} broke the protocol: it printed noise`,
      1024,
    ]);
  });
});

describe("withKnownFault()", () => {
  const result = (address: string) => ({
    ...{ interfaces: [], routes: [], dns: {} },
    ips: [{ address }],
  });
  const none = { ...result(""), ips: [] };
  const v4 = result("10.0.0.2/24");
  const v6 = result("fd00::2/64");
  test.each<[string, string, Result, boolean]>([
    ["tuning", 'plugin "tuning" failed: open /proc/sys/net/ipv4/conf/IFNAME/x: none', v4, true],
    ["another sysctl", 'plugin "tuning" failed: open /proc/sys/net/ipv4/x: none', v4, false],
    ["portmap", 'plugin "portmap" failed: could not check ipv6 dnat: chain x', v4, true],
    ["IPv6 rules", 'plugin "portmap" failed: could not check ipv6 dnat: chain x', v6, false],
    ["IPv4 rules", 'plugin "portmap" failed: could not check ipv4 dnat: chain x', v4, false],
    ["another plugin", 'plugin "portmap2" failed: could not check ipv6 dnat', v4, false],
    ["a bridge without IPAM", 'plugin "bridge" failed: no plugin name provided', none, true],
    ["a bridge with IPAM", 'plugin "bridge" failed: no plugin name provided', v4, false],
  ])("%s", (_name, message, made, isFault) => {
    const error = new CniError(999, `Cannot check network "n": ${message}`, { details: "d" });
    const found = withKnownFault(error, made);
    expect([found.code, found.message]).toEqual([999, error.message]);
    expect(found.details).toEndWith("d");
    expect(found.details.includes("disableCheck")).toBe(isFault);
    expect(saysNothing(found)).toBe(isFault);
  });
});
