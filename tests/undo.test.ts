/** Undoing a recorded attachment with what is still there: lib/recorded.ts. */
import { describe, expect, test } from "bun:test";
import { mkdirSync, renameSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Chain } from "../lib/call.ts";
import { CniError, code } from "../lib/cni.ts";
import { netnsId } from "../lib/kernel.ts";
import type { StoredAttachment } from "../lib/record.ts";
import { outcomeOf, storedResult, undo, withPresentPlugins } from "../lib/recorded.ts";
import { calls, fakePlugin, makeHost } from "./fakes.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();
const at = (...names: string[]) => join(dir.path, ...names);
const bin = at("bin");
for (const folder of [bin, at("moved"), at("path")]) mkdirSync(folder);
const netns = at("netns");
writeFileSync(netns, "");
writeFileSync(at("other-netns"), "");
symlinkSync(netns, at("link"));

const result = { cniVersion: "1.0.0", ips: [{ address: "10.1.0.2/24" }] };

function stored(more: Partial<StoredAttachment> = {}): StoredAttachment {
  return {
    containerId: "c1",
    requestIfName: "eth0",
    requestNetwork: "genie-net",
    ifName: "eth0",
    primary: true,
    network: "blue",
    reason: "",
    list: {
      cniVersion: "1.0.0",
      name: "blue",
      disableCheck: false,
      disableGC: false,
      plugins: [{ type: "a" }],
    },
    plugins: [join(bin, "a")],
    cniArgs: "",
    cniPath: at("moved"),
    capabilityArgs: {},
    args: {},
    timeoutMs: 90_000,
    netns,
    pod: { namespace: "", name: "", uid: "" },
    state: "attached",
    result,
    failedAtMs: 0,
    error: "",
    createdAtMs: 1,
    netnsId: netnsId(netns),
    ...more,
  };
}

describe("undo()", () => {
  const host = { ...makeHost({ env: { PATH: "/usr/bin:/bin" } }), now: Date.now };
  fakePlugin(bin, "a");
  /** What the plugin gets as CNI_NETNS and prevResult. */
  async function given(requested: string, more: Partial<StoredAttachment> = {}) {
    const chain: Chain = { host, netns: requested, token: "t", deadlineMs: Date.now() + 20_000 };
    expect(await undo(chain, stored(more), [])).toEqual([]);
    const call = calls(bin).at(-1);
    return [call?.env["CNI_NETNS"], "prevResult" in JSON.parse(call?.stdin ?? "{}")];
  }

  test.each([
    ["the path of ADD", netns, netns],
    ["another path to that namespace", at("link"), at("link")],
    ["none", "", ""],
    ["one that is gone", at("absent"), at("absent")],
    // Plugins would fail on these, or delete what belongs to somebody else.
    ["a file that is no namespace", "/dev/null", ""],
    ["another namespace", at("other-netns"), ""],
    ["the namespace of the node", "/proc/self/ns/net", ""],
  ])(
    "tells the plugins of the namespace when asked with %s",
    async (_name, requested, expected) => {
      expect(await given(requested)).toEqual([expected, true]);
    },
  );

  test.each([
    ["none", undefined],
    ["of a wrong shape", []],
    ["with an address that is none", { ips: [{ address: "nowhere" }] }],
  ])("goes without prevResult for a result %s (fact 11)", async (_name, damaged) => {
    expect(storedResult(stored({ result: damaged }))).toBeUndefined();
    expect(await given(netns, { result: damaged })).toEqual([netns, false]);
  });
});

describe("withPresentPlugins()", () => {
  const present = (path: string[] = []) => withPresentPlugins(stored(), path).plugins[0];

  test("looks for a binary that is gone where ADD did, then where DEL does", () => {
    expect(present()).toBe(join(bin, "a"));
    renameSync(join(bin, "a"), at("path", "a"));
    expect([present(), present([at("path")])]).toEqual([join(bin, "a"), at("path", "a")]);
    renameSync(at("path", "a"), at("moved", "a"));
    expect(present()).toBe(at("moved", "a"));
  });

  test("limits each call to what a runtime gives a DEL", () => {
    const limits = [1000, 90_000].map((timeoutMs) => withPresentPlugins(stored({ timeoutMs }), []));
    expect(limits.map(({ timeoutMs }) => timeoutMs)).toEqual([1000, 25_000]);
  });
});

describe("outcomeOf()", () => {
  const busy = new CniError(11, "busy");
  const gone = new CniError(code.delegateNotFound, "x", { cause: { kind: "spawn" } });
  const own102 = new CniError(102, "its own");
  test.each([
    ["no error", [], 5, "gone"],
    ["no error, after failures", [], 900, "gone"],
    ["a first failure", [busy], 0, "failing"],
    ["a failure inside the window", [busy], 599, "failing"],
    ["a failure at its end", [busy], 600, "leaked"],
    ["a binary that is gone", [gone], 0, "leaked"],
    ["two that are gone", [gone, gone], 0, "leaked"],
    ["one gone, one failing", [gone, busy], 0, "failing"],
    ["a plugin's own code 102", [own102], 0, "failing"],
  ] as const)("%s", (_name, errors, laterMs, fate) => {
    const failedAtMs = laterMs === 0 ? 0 : 1000;
    expect(outcomeOf(stored({ failedAtMs }), [...errors], 600, 1000 + laterMs)).toBe(fate);
  });
});
