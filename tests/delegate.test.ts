/** One attachment through its chain: what each plugin is given, and what its ending leads to. */
import { describe, expect, test } from "bun:test";
import { closeSync, copyFileSync, mkdirSync, openSync, rmSync } from "node:fs";
import { join } from "node:path";
import { addChain } from "../lib/attach.ts";
import type { Chain as DelegateChain, Host } from "../lib/call.ts";
import { checkChain } from "../lib/check.ts";
import { code } from "../lib/cni.ts";
import { gcChain } from "../lib/gc.ts";
import { isObject } from "../lib/json.ts";
import type { PluginConfig } from "../lib/networks.ts";
import type { Attachment } from "../lib/record.ts";
import { delChain, undoChain } from "../lib/recorded.ts";
import { toVersion } from "../lib/result.ts";
import { type NetworkCall, statusChain } from "../lib/status.ts";
import { callOrder, calls, fakePlugin, makeHost, type Script } from "./fakes.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

/** Variables of our own caller, none of which may reach a delegate. */
const leaking = {
  CNI_COMMAND: "VERSION",
  CNI_IFNAME: "parent0",
  CNI_ARGS: "cni=x",
  CNI_NETNS: "/parent",
  CNI_CONTAINERID: "parent",
  CNI_PATH: "/parent",
  CNI_NETNS_OVERRIDE: "1",
  GENIE_OPERATION: "parent",
};
const makeClock = (): Host => ({
  ...makeHost({ env: { PATH: "/usr/bin:/bin", OTHER: "kept", ...leaking } }),
  now: Date.now,
});

interface Chain {
  host: Host;
  bin: string;
  attachment: Attachment;
  options: Omit<DelegateChain, "host">;
}

let folders = 0;

/** A chain of fake plugins named a, b, c ..., in that order. */
function makeChain(scripts: (Script | string)[], more: Partial<Attachment["list"]> = {}): Chain {
  const bin = join(dir.path, `bin-${folders++}`);
  mkdirSync(bin);
  const names = scripts.map((_script, i) => String.fromCharCode(97 + i));
  const attachment: Attachment = {
    containerId: "c1",
    requestIfName: "eth0",
    requestNetwork: "genie-net",
    ifName: "eth1",
    primary: false,
    network: "blue",
    reason: "",
    list: {
      cniVersion: "1.1.0",
      name: "blue-list",
      disableCheck: false,
      disableGC: false,
      plugins: names.map((type): PluginConfig => ({ type })),
      ...more,
    },
    plugins: names.map((name, i) => fakePlugin(bin, name, scripts[i] ?? {})),
    cniArgs: "K=V",
    cniPath: bin,
    capabilityArgs: {},
    args: {},
    timeoutMs: 20_000,
    netns: "/netns",
    pod: { namespace: "", name: "", uid: "" },
  };
  const options = { netns: "/netns", token: "token-1", deadlineMs: Date.now() + 20_000 };
  return { host: makeClock(), bin, attachment, options };
}

const add = ({ host, attachment, options }: Chain) => addChain({ host, ...options }, attachment);

/** What the failed ADD of a chain gives: code, message after the subject, errors of the undoing. */
async function failure(chain: Chain): Promise<[number, string, number[]]> {
  const added = await add(chain);
  if (added.kind === "attached") throw new Error("It did not fail");
  return [added.error.code, added.error.message, added.undo.map(({ code: number }) => number)];
}

const stdinOf = (chain: Chain, plugin: string, command: string) => {
  const found = calls(chain.bin, plugin).find((call) => call.command === command);
  const config: unknown = JSON.parse(found?.stdin ?? "null");
  return isObject(config) ? config : {};
};

describe("addChain()", () => {
  test("runs the plugins in order, each with the result of the one before", async () => {
    const chain = makeChain([{}, { chain: "append", ips: ["10.9.0.1/24"] }, { chain: "pass" }]);
    const eth1 = { name: "eth1", sandbox: "/netns" };
    const first = { interface: 0, address: "10.22.0.5/24" };
    const second = { interface: 1, address: "10.9.0.1/24" };
    const interfaces = [eth1, eth1];
    expect(await add(chain)).toEqual({
      kind: "attached",
      result: { interfaces, ips: [first, second], routes: [], dns: {} },
    });
    expect(callOrder(chain.bin)).toEqual(["a ADD c1 eth1", "b ADD c1 eth1", "c ADD c1 eth1"]);
    const previous = (plugin: string) => stdinOf(chain, plugin, "ADD")["prevResult"];
    expect(previous("a")).toBeUndefined();
    const rest = { cniVersion: "1.1.0", routes: [] };
    expect(previous("b")).toEqual({ ...rest, interfaces: [eth1], ips: [first] });
    expect(previous("c")).toEqual({ ...rest, interfaces, ips: [first, second] });
  });

  test("gives each plugin what it declares, and the args (facts 13, 15)", async () => {
    const chain = makeChain([{}, { chain: "pass" }]);
    const [a, b] = [
      { type: "a", capabilities: { mac: true, ips: false }, args: { own: 1, both: 1 }, unknown: 7 },
      { type: "b", capabilities: { portMappings: true }, runtimeConfig: { stolen: 1 } },
    ];
    chain.attachment.list.plugins = [a, b];
    chain.attachment.capabilityArgs = { mac: "m", ips: ["i"], other: 1 };
    chain.attachment.args = { both: 2 };
    await add(chain);
    expect(stdinOf(chain, "a", "ADD")).toEqual({
      type: "a",
      args: { own: 1, both: 2 },
      unknown: 7,
      cniVersion: "1.1.0",
      name: "blue-list",
      runtimeConfig: { mac: "m" },
    });
    expect(stdinOf(chain, "b", "ADD")).not.toContainAnyKeys(["runtimeConfig", "capabilities"]);
  });

  test("sets every CNI variable anew and passes all else on (fact 25)", async () => {
    const chain = makeChain([{}]);
    await add(chain);
    const [call] = calls(chain.bin);
    const { _: _shell, PWD: _folder, SHLVL: _level, ...env } = call?.env ?? {};
    expect(env).toEqual({
      PATH: "/usr/bin:/bin",
      OTHER: "kept",
      CNI_COMMAND: "ADD",
      CNI_CONTAINERID: "c1",
      CNI_NETNS: "/netns",
      CNI_IFNAME: "eth1",
      CNI_ARGS: "K=V",
      CNI_PATH: chain.bin,
      GENIE_OPERATION: "token-1",
    });
  });

  test("completes a result without the pod's interface", async () => {
    const result = { cniVersion: "0.2.0", ip4: { ip: "10.1.0.2/24" } };
    const chain = makeChain([{ result }], { cniVersion: "0.2.0" });
    expect(await add(chain)).toMatchObject({
      result: {
        interfaces: [{ name: "eth1", sandbox: "/netns" }],
        ips: [{ address: "10.1.0.2/24", interface: 0 }],
      },
    });
  });

  const inPod = { cniVersion: "1.1.0", interfaces: [{ name: "net9", sandbox: "/netns" }] };
  const broke = 'plugin "a" broke the protocol:';
  const endings: [string, Script | string, number, string][] = [
    ["an error document", { error: { code: 118, msg: "pool empty" } }, 118, "failed: pool empty"],
    ["an exit status", { status: 3, raw: "" }, 104, "exited with status 3 and printed nothing"],
    ["garbage with a status", { status: 1, raw: "no" }, 104, "printed no error document"],
    ["garbage", { raw: "OK" }, 104, `${broke} Cannot decode its output`],
    ["two documents", { raw: "{}{}" }, 104, `${broke} Cannot decode its output`],
    ["nothing", { raw: "" }, 104, `${broke} it printed no result`],
    ["only spaces", { raw: " \n" }, 104, `${broke} it printed no result`],
    ["a closed stdout", { closeStdout: true }, 104, `${broke} it printed no result`],
    [
      "an error with status 0",
      { raw: '{"code":7,"msg":"x"}' },
      104,
      `${broke} it printed an error`,
    ],
    ["a list", { raw: "[]" }, 104, "Invalid result of plugin"],
    ["an unknown version", { result: { cniVersion: "9.0.0" } }, 104, "Invalid cniVersion"],
    ["another interface", { result: inPod }, 104, `${broke} it reports interface "net9"`],
    ["a flood", { flood: { to: "stdout", bytes: 2e6 } }, 104, "printed more than 1 MiB"],
    ["a signal", { signal: "SIGSEGV" }, 104, "was killed by SIGSEGV"],
    ["no interpreter", "#!/nowhere/sh\n", 102, "cannot be started (ENOENT)"],
    ["no program", "\0\0\0\0", 102, "cannot be started (ENOEXEC)"],
  ];
  test.each(endings)("fails by %s, and undoes it", async (_name, script, number, issue) => {
    const only = typeof script === "string" ? script : { ADD: script };
    const [found, message, undo] = await failure(makeChain([only]));
    expect([found, message]).toEqual([number, expect.stringContaining(issue)]);
    // What never ran has nothing to undo.
    expect(undo).toEqual([]);
  });

  test("fails by the deadline of the plugin, or of the whole operation", async () => {
    const slow = makeChain([{ ADD: { hang: true } }]);
    slow.attachment.timeoutMs = 1500;
    expect(await failure(slow)).toEqual([103, expect.stringContaining("timed out after 1"), []]);
    const late = makeChain([{ ADD: { hang: true } }]);
    late.options.deadlineMs = Date.now() + 1500;
    expect(await failure(late)).toEqual([103, expect.stringContaining("timed out after"), []]);
    expect(callOrder(late.bin)).toEqual(["a ADD c1 eth1", "a DEL c1 eth1"]);
  });

  test("fails with code 11 when we are asked to end, and undoes it all the same", async () => {
    const chain = makeChain([{ ADD: { hang: true } }]);
    const ended = new AbortController();
    chain.options.signal = ended.signal;
    const adding = failure(chain);
    while (calls(chain.bin).length === 0) await Bun.sleep(5);
    ended.abort();
    expect(await adding).toEqual([11, expect.stringContaining("genie was asked to end"), []]);
    expect(callOrder(chain.bin)).toEqual(["a ADD c1 eth1", "a DEL c1 eth1"]);
  });

  test("fails with code 102 for a missing binary, and with 11 for a busy one", async () => {
    const gone = makeChain([{}]);
    rmSync(join(gone.bin, "a"));
    expect(await failure(gone)).toEqual([102, expect.stringContaining("(ENOENT)"), []]);
    const busy = makeChain([{}]);
    const path = join(busy.bin, "a");
    copyFileSync("/bin/true", path);
    const held = openSync(path, "r+");
    busy.attachment.timeoutMs = 300;
    try {
      expect(await failure(busy)).toEqual([11, expect.stringContaining("is being replaced"), [11]]);
    } finally {
      closeSync(held);
    }
  });

  test("undoes from the failed plugin to the first (CNI 1.1 §4)", async () => {
    const busy = { error: { code: 118, msg: "no" } };
    const chain = makeChain([{}, { chain: "pass" }, { ADD: busy }, {}]);
    expect(await failure(chain)).toEqual([
      118,
      expect.stringContaining('plugin "c" failed: no'),
      [],
    ]);
    expect(callOrder(chain.bin)).toEqual(
      ["a ADD", "b ADD", "c ADD", "c DEL", "b DEL", "a DEL"].map((call) => `${call} c1 eth1`),
    );
  });

  test("goes on undoing after a failure, which does not replace the original error", async () => {
    const chain = makeChain([
      {},
      { chain: "pass", DEL: { error: { code: 119, msg: "del" } } },
      { ADD: { error: { code: 118, msg: "add" } }, DEL: { signal: "SIGKILL" } },
    ]);
    expect(await failure(chain)).toEqual([
      118,
      expect.stringContaining('plugin "c" failed: add'),
      [104, 119],
    ]);
    expect(callOrder(chain.bin).slice(3)).toEqual(
      ["c DEL", "b DEL", "a DEL"].map((call) => `${call} c1 eth1`),
    );
  });

  test("undoes in a time of its own when its time is over", async () => {
    const chain = makeChain([{ ADD: { hang: true } }]);
    chain.options.deadlineMs = Date.now() - 1000;
    const [number, , undo] = await failure(chain);
    expect([number, undo]).toEqual([103, []]);
    expect(undoChain({ host: chain.host, ...chain.options }).deadlineMs).toBeGreaterThan(
      Date.now() + 20_000,
    );
  });
});

describe("delChain()", () => {
  const result = {
    interfaces: [{ name: "eth1", sandbox: "/netns", mtu: 1400 }],
    ips: [{ address: "10.1.0.2/24", interface: 0 }],
    routes: [],
    dns: {},
  };
  const del = ({ host, attachment, options }: Chain, final: typeof result | undefined = result) =>
    delChain({ host, ...options }, attachment, { result: final });

  test("runs in reverse, with the final result for each (fact 10)", async () => {
    const chain = makeChain([{}, {}, {}]);
    expect(await del(chain)).toEqual([]);
    expect(callOrder(chain.bin)).toEqual(["c DEL c1 eth1", "b DEL c1 eth1", "a DEL c1 eth1"]);
    for (const plugin of ["a", "b", "c"]) {
      expect(stdinOf(chain, plugin, "DEL")["prevResult"]).toEqual(toVersion(result, "1.1.0"));
    }
  });

  test.each([
    ["without a result", "1.1.0", undefined, false],
    ["before 0.4.0", "0.3.1", result, false],
    ["since 0.4.0", "0.4.0", result, true],
  ] as const)("%s: prevResult", async (_name, cniVersion, final, expected) => {
    const chain = makeChain([{}], { cniVersion });
    await delChain({ host: chain.host, ...chain.options }, chain.attachment, { result: final });
    expect("prevResult" in stdinOf(chain, "a", "DEL")).toBe(expected);
  });

  test("asks every plugin, whatever the others say, and returns all errors", async () => {
    const chain = makeChain([
      { error: { code: 7, msg: "a" } },
      { raw: "noise on success is nothing to us" },
      { error: { code: 11, msg: "c" } },
    ]);
    expect((await del(chain)).map((error) => error.code)).toEqual([11, 7]);
    expect(calls(chain.bin)).toHaveLength(3);
  });

  test("says what holds when the namespace is gone", async () => {
    const chain = makeChain([{}]);
    chain.options.netns = "";
    await del(chain);
    expect(calls(chain.bin)[0]?.env["CNI_NETNS"]).toBe("");
  });

  /** A chain of bridge and a plugin of this type, both of which fail. */
  function makeFailing(type: string): Chain {
    const chain = makeChain([]);
    for (const name of ["bridge", type]) {
      chain.attachment.list.plugins.push({ type: name });
      chain.attachment.plugins.push(join(chain.bin, name));
      fakePlugin(chain.bin, name, { error: { code: 7, msg: "no such file or directory" } });
    }
    return chain;
  }

  const ofBoth = [7, 7];
  test.each([
    ["sbr", "", [7], ""],
    ["sbr", "/absent/netns", [7], ""],
    ["tuning", "/absent/netns", [7], ""],
    ["loopback", "/absent/netns", [7], ""],
    ["portmap", "/absent/netns", ofBoth, "/absent/netns"],
    ["sbr", "/proc/self/ns/net", ofBoth, "/proc/self/ns/net"],
  ])("of bridge and %s in namespace %p fails with %j", async (type, netns, codes, given) => {
    const chain = makeFailing(type);
    chain.options.netns = netns;
    expect((await del(chain)).map((error) => error.code)).toEqual(codes);
    expect(calls(chain.bin).map(({ env }) => env["CNI_NETNS"])).toEqual([given, netns]);
  });
});

describe("checkChain()", () => {
  const check = ({ host, attachment, options }: Chain) =>
    checkChain({ host, ...options }, attachment, { interfaces: [], ips: [], routes: [], dns: {} });

  test("runs forward, with the final result, and stops at the first that says no", async () => {
    const chain = makeChain([{}, { error: { code: 119, msg: "gone" } }, {}]);
    await expect(check(chain)).rejects.toMatchObject({ code: 119 });
    expect(callOrder(chain.bin)).toEqual(["a CHECK c1 eth1", "b CHECK c1 eth1"]);
    expect(stdinOf(chain, "a", "CHECK")["prevResult"]).toMatchObject({ cniVersion: "1.1.0" });
  });

  test.each([
    ["disableCheck", { disableCheck: true }],
    ["0.3.1", { cniVersion: "0.3.1" }],
    ["0.1.0", { cniVersion: "0.1.0" }],
  ] as const)("asks nobody with %s", async (_name, more) => {
    const chain = makeChain([{ error: { code: 119, msg: "gone" } }], more);
    await check(chain);
    expect(calls(chain.bin)).toEqual([]);
  });
});

function asNetwork({ attachment }: Chain): NetworkCall {
  const { network, list, plugins, cniPath, timeoutMs } = attachment;
  return { network, list, plugins, cniPath, timeoutMs };
}

describe("statusChain()", () => {
  const status = (chain: Chain) => statusChain(chain.host, asNetwork(chain));

  test("asks each plugin, of no attachment, and throws the first no", async () => {
    const chain = makeChain([{}, { error: { code: 51, msg: "full" } }, {}]);
    await expect(status(chain)).rejects.toMatchObject({ code: 51 });
    expect(callOrder(chain.bin)).toEqual(["a STATUS", "b STATUS"]);
    const names = Object.keys(calls(chain.bin)[0]?.env ?? {}).filter((name) => /^CNI_/.test(name));
    expect(names.sort()).toEqual(["CNI_COMMAND", "CNI_PATH"]);
    expect(stdinOf(chain, "a", "STATUS")).toEqual({
      type: "a",
      cniVersion: "1.1.0",
      name: "blue-list",
    });
  });

  test("passes lists older than STATUS", async () => {
    const chain = makeChain([{ error: { code: 50, msg: "no" } }], { cniVersion: "1.0.0" });
    await status(chain);
    expect(calls(chain.bin)).toEqual([]);
  });
});

describe("gcChain()", () => {
  const valid = [{ containerID: "c1", ifname: "eth1" }];
  const gc = (chain: Chain) =>
    gcChain({ host: chain.host, ...chain.options }, asNetwork(chain), valid);

  test("sends the list under both keys, over what the config has, and goes on", async () => {
    const chain = makeChain([{ error: { code: 120, msg: "no" } }, {}]);
    chain.attachment.list.plugins[1] = { type: "b", "cni.dev/valid-attachments": [], x: 1 };
    expect((await gc(chain)).map((error) => error.code)).toEqual([120]);
    expect(callOrder(chain.bin)).toEqual(["a GC", "b GC"]);
    expect(stdinOf(chain, "b", "GC")).toEqual({
      type: "b",
      x: 1,
      cniVersion: "1.1.0",
      name: "blue-list",
      "cni.dev/valid-attachments": valid,
      "cni.dev/attachments": valid,
    });
  });

  test.each([
    ["disableGC", { disableGC: true }],
    ["1.0.0", { cniVersion: "1.0.0" }],
  ] as const)("asks nobody with %s", async (_name, more) => {
    const chain = makeChain([{}], more);
    expect([await gc(chain), calls(chain.bin)]).toEqual([[], []]);
  });
});

describe("a delegate's stderr", () => {
  test("is passed on, of a success too (SPEC §4)", async () => {
    const chain = makeChain([{ stderr: "a hint\n" }]);
    const host = { ...makeHost(), now: Date.now };
    await addChain({ host, ...chain.options }, chain.attachment);
    expect(host.written).toEqual({ stdout: "", stderr: "a hint\n" });
  });

  test("is the tail of the details of its failure", async () => {
    const chain = makeChain([{ ADD: { stderr: "panic: x", status: 2, raw: "" } }]);
    const added = await add(chain);
    expect(added).toMatchObject({ error: { code: code.delegateProtocol, details: "panic: x" } });
  });
});
