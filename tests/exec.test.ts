/**
 * `lib/exec.ts`, `lib/recovery/stuck_child.ts`: every ending, and that nothing holds us, fills us
 * or is left behind.
 */
import { describe, expect, test } from "bun:test";
import { closeSync, copyFileSync, existsSync, openSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Ending, Output, RunOptions } from "../lib/call.ts";
import { run } from "../lib/exec.ts";
import { calls, fakePlugin, groupMembers, type Script, tempDir } from "./fakes.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

const env = { PATH: "/usr/bin:/bin" };
/** Far longer than any row takes: only rows about the deadline set another. */
const timeoutMs = 20_000;
const defaults = { env, stdin: "", timeoutMs };
const empty = { stdout: "", stdoutIsText: true, stderr: "" };
const exit0 = { ...empty, kind: "exit", status: 0 } as const;

type Untimed = Ending & Omit<Output, "durationUs">;

/** Runs a shell script; the duration is apart, so that the rest can be compared whole. */
async function sh(script: string, options: Partial<RunOptions> = {}) {
  return timed(await run("/bin/sh", ["-c", script], { ...defaults, ...options }));
}

function timed({ durationUs, ...ending }: Ending & Output): { ending: Untimed; ms: number } {
  return { ending, ms: durationUs / 1000 };
}

/** The group of a script that prints its own process id first. */
function groupOf({ stdout, stderr }: Untimed): number {
  const group = Number.parseInt(stdout || stderr, 10);
  if (Number.isNaN(group)) throw new Error("The script did not name its group");
  return group;
}

const unread = { stdin: "x".repeat(2e6) };
const stderrFlood = "head -c 16777216 /dev/zero | tr '\\0' e >&2; echo last >&2; echo ok";
const outputs: [string, string, Partial<RunOptions>, Untimed][] = [
  [
    "stdout and stderr",
    "cat; echo e >&2",
    { stdin: "in" },
    { ...exit0, stdout: "in", stderr: "e\n" },
  ],
  ["the status", "exit 3", {}, { ...exit0, status: 3 }],
  ["status 143 for what it is", "exit 143", {}, { ...exit0, status: 143 }],
  ["the signal", "kill -KILL $$", {}, { ...empty, kind: "signal", signal: "SIGKILL" }],
  ["an empty stdin an end", "cat", {}, exit0],
  ["folder / to the child", "pwd", {}, { ...exit0, stdout: "/\n" }],
  ["UTF-8 as it is", "cat", { stdin: "é€😀" }, { ...exit0, stdout: "é€😀" }],
  ["bytes as such", "printf 'a\\377'", {}, { ...exit0, stdout: "a\ufffd", stdoutIsText: false }],
  ["an invalid stderr as text", "printf 'a\\377' >&2", {}, { ...exit0, stderr: "a\ufffd" }],
  ["what closes its outputs", "exec >&- 2>&-; sleep 0.05; exit 4", {}, { ...exit0, status: 4 }],
  ["what leaves stdin unread", "exit 0", unread, exit0],
  ["what closes stdin", "exec <&-; sleep 0.05", unread, exit0],
  [
    "the tail of a stderr flood",
    stderrFlood,
    {},
    { ...exit0, stdout: "ok\n", stderr: `${"e".repeat(65531)}last\n` },
  ],
  // Fails on Bun's own pipes: they are sockets, which cannot be opened by name.
  [
    "what opens /dev/stdout",
    "cat /dev/stdin >/dev/stdout; echo e >/dev/stderr",
    { stdin: "in" },
    { ...exit0, stdout: "in", stderr: "e\n" },
  ],
];

/** Time enough to name the group, also on a busy machine. */
const shortMs = 1000;
/** From SIGTERM to SIGKILL. */
const graceMs = 2000;
/** Whether the group obeys SIGTERM. */
const cuts: [string, string, obeys: boolean][] = [
  ["a child that hangs", "echo $$; sleep 60", true],
  ["a child that stopped itself", "echo $$; kill -STOP $$", false],
  ["a child that ignores SIGTERM", "trap '' TERM; echo $$; sleep 60", false],
  ["a grandchild that ignores SIGTERM", "echo $$; (trap '' TERM; sleep 60) & sleep 60", true],
  ["a child that ends well at SIGTERM", "trap 'exit 0' TERM; echo $$; sleep 60 & wait", true],
  ["a child whose output is closed", "echo $$; exec >&- 2>&-; sleep 60", true],
  ["a flood of stderr", "echo $$; yes >&2", true],
];

describe("run() gives", () => {
  test.each(outputs)("%s", async (_name, script, options, expected) => {
    expect((await sh(script, options)).ending).toEqual(expected);
  });

  test("the child no environment but the given one", async () => {
    const got = await run("/usr/bin/env", [], { ...defaults, env: { A: "b=c" } });
    expect(got.stdout).toBe("A=b=c\n");
  });

  test("arguments as they are, past any shell", async () => {
    const args = ["%s|", "a b", "$HOME", "'", ""];
    expect((await run("/usr/bin/printf", args, defaults)).stdout).toBe("a b|$HOME|'||");
  });

  test("1 MiB in full while 2 MB of stdin are read", async () => {
    const stdin = "y".repeat(2e6);
    const { ending } = await sh("head -c 1048576; cat >/dev/null", { stdin });
    expect(ending).toEqual({ ...exit0, stdout: stdin.slice(0, 1048576) });
  });

  test("all that was written before exit, 24 children at once", async () => {
    const script = "head -c 300000 /dev/zero; head -c 9 /dev/zero >&2";
    const all = await Promise.all(Array.from({ length: 24 }, () => sh(script)));
    const sizes = all.map(({ ending }) => `${ending.stdout.length} ${ending.stderr.length}`);
    expect(new Set(sizes)).toEqual(new Set(["300000 9"]));
  });

  test("no descriptor away", async () => {
    const count = () => readdirSync("/proc/self/fd").length;
    await sh("exit 0");
    const before = count();
    for (let i = 0; i < 20; i++) await run("/proc/nonexistent", [], defaults);
    expect(count() - before).toBeLessThanOrEqual(2);
  });
});

describe("run() is not held by", () => {
  test.each([
    ["in the group", "sleep 60 & echo $! >&2"],
    ["out of the group", "setsid sleep 60 & echo $! >&2"],
    ["that chatters", "(while :; do echo; sleep 0.02; done) >&2 & echo $! >&2"],
  ])("a grandchild %s with open outputs", async (_name, script) => {
    const { ending } = await sh(`${script}; echo $$`);
    const group = groupOf(ending);
    expect({ ...ending, stderr: "" }).toEqual({ ...exit0, stdout: `${group}\n` });
    // It runs still, and is left alone: it may be a daemon that was meant to stay.
    const grandchild = Number.parseInt(ending.stderr.trim(), 10);
    expect(existsSync(`/proc/${grandchild}`)).toBe(true);
    process.kill(grandchild, "SIGKILL");
  });
});

describe("run() ends", () => {
  test.concurrent.each(cuts)("%s", async (_name, script, obeys) => {
    const { ending, ms } = await sh(script, { timeoutMs: shortMs });
    const group = groupOf(ending);
    expect({ kind: ending.kind, left: groupMembers(group) }).toEqual({ kind: "timeout", left: [] });
    if (obeys) expect(ms).toBeWithin(shortMs, shortMs + graceMs);
    else expect(ms).toBeGreaterThanOrEqual(shortMs + graceMs);
  });

  test("a flood of stdout, keeping 1 MiB", async () => {
    const { ending } = await sh("echo $$ >&2; yes");
    const expected = { ...empty, kind: "overflow", stdout: "y\n".repeat(524288) };
    const group = groupOf({ ...ending, stdout: "" });
    expect({ ...ending, stderr: "" }).toEqual(expected as typeof ending);
    expect(groupMembers(group)).toEqual([]);
  });

  test("one byte too many, written by a child that is gone", async () => {
    const { ending } = await sh("head -c 1048577 /dev/zero");
    expect(ending.kind).toBe("overflow");
  });

  test("a child when aborted", async () => {
    const controller = new AbortController();
    const began = join(dir.path, "began");
    const running = sh(`echo $$; : >${began}; sleep 60`, { signal: controller.signal });
    while (!existsSync(began)) await Bun.sleep(5);
    controller.abort();
    const { ending } = await running;
    const left = groupMembers(groupOf(ending));
    expect({ kind: ending.kind, left }).toEqual({ kind: "aborted", left: [] });
  });

  test("no child that comes to its end soon after the abort", async () => {
    const controller = new AbortController();
    const began = join(dir.path, "soon");
    const script = `trap 'exit 9' TERM; echo a; : >${began}; sleep 1; echo b`;
    const running = sh(script, { signal: controller.signal });
    while (!existsSync(began)) await Bun.sleep(5);
    controller.abort();
    expect((await running).ending).toEqual({ ...exit0, stdout: "a\nb\n" });
  });

  test("before it starts when already aborted", async () => {
    const { ending } = await sh("echo ran", { signal: AbortSignal.abort() });
    expect(ending).toEqual({ ...empty, kind: "aborted" });
  });

  test("with the last words of a child that timed out", async () => {
    const script = "trap 'echo bye >&2; exit 0' TERM; sleep 60 & wait";
    const { ending } = await sh(script, { timeoutMs: shortMs });
    expect(ending).toEqual({ ...empty, kind: "timeout", stderr: "bye\n" });
  });
});

describe("run() cannot start", () => {
  const file = (name: string, text: string, mode: number) => {
    writeFileSync(join(dir.path, name), text, { mode });
    return join(dir.path, name);
  };
  test.each([
    ["a missing file", "/proc/nonexistent", "ENOENT"],
    ["a folder", "/tmp", "EACCES"],
    ["what is not executable", file("plain", "#!/bin/sh\n", 0o644), "EACCES"],
    ["what is no program", file("garbage", "\u0001\u0002\u0003", 0o755), "ENOEXEC"],
    ["an empty file", file("empty", "", 0o755), "ENOEXEC"],
    ["a script without its interpreter", file("orphan", "#!/proc/nonexistent\n", 0o755), "ENOENT"],
  ])("%s", async (_name, path, reason) => {
    const { ending } = timed(await run(path, [], defaults));
    expect(ending).toEqual({ ...empty, kind: "spawn", reason });
  });

  test("a relative path", async () => {
    await expect(run("bridge", [], defaults)).rejects.toMatchObject({ code: 999 });
  });
});

describe("run() of a file that is being written", () => {
  /** Five times 200 ms. */
  const busyMs = 1000;
  /** A program held open for writing for `heldMs`. */
  async function busy(heldMs: number, options: Partial<RunOptions> = {}) {
    const path = join(dir.path, `busy${heldMs}${Object.keys(options)}`);
    copyFileSync("/bin/true", path);
    const fd = openSync(path, "r+");
    const held = setTimeout(() => closeSync(fd), heldMs);
    const result = timed(await run(path, [], { ...defaults, ...options }));
    if (result.ms < heldMs) {
      clearTimeout(held);
      closeSync(fd);
    }
    return result;
  }
  test("waits until it can", async () => {
    expect((await busy(300)).ending).toEqual(exit0);
  });
  test("gives up after five times 200 ms", async () => {
    const { ending, ms } = await busy(60_000);
    expect(ending).toEqual({ ...empty, kind: "spawn", reason: "ETXTBSY" });
    expect(ms).toBeGreaterThanOrEqual(busyMs);
  });
  test("gives up at the deadline: nothing ran", async () => {
    const { ending, ms } = await busy(60_000, { timeoutMs: 100 });
    expect(ending).toEqual({ ...empty, kind: "spawn", reason: "ETXTBSY" });
    expect(ms).toBeLessThan(busyMs);
  });
  test("gives up when aborted", async () => {
    const { ending } = await busy(60_000, { signal: AbortSignal.timeout(50) });
    expect(ending).toEqual({ ...empty, kind: "aborted" });
  });
});

describe("the fake delegate", () => {
  const config = { cniVersion: "1.0.0", name: "n", type: "fake" };
  const attachment = { CNI_CONTAINERID: "c1", CNI_IFNAME: "eth0", CNI_NETNS: "/ns" };
  async function call(path: string, command: string, stdin: object = config) {
    const all = { ...env, ...attachment, CNI_COMMAND: command };
    const options = { env: all, stdin: JSON.stringify(stdin), timeoutMs };
    return timed(await run(path, [], options)).ending;
  }
  const result = {
    cniVersion: "1.0.0",
    interfaces: [{ name: "eth0", sandbox: "/ns" }],
    ips: [{ interface: 0, address: "10.22.0.5/24" }],
  };
  const error = { code: 7, msg: "no" };
  const refusal = JSON.stringify({ cniVersion: "1.1.0", ...error });
  const rows: [string, Script, object, object][] = [
    ["answers", {}, config, { stdout: JSON.stringify(result) }],
    ["fails", { error }, config, { status: 1, stdout: refusal }],
    ["fails with status 0", { error, status: 0 }, config, { stdout: refusal }],
    ["prints nothing, exit 1", { raw: "", status: 1 }, config, { status: 1 }],
    ["prints garbage", { ADD: { raw: "{" } }, config, { stdout: "{" }],
    [
      "passes prevResult on",
      { chain: "pass" },
      { ...config, prevResult: { a: 1 } },
      { stdout: '{"a":1}' },
    ],
    ["floods", { flood: { to: "stdout", bytes: 2e6 }, raw: "" }, config, { kind: "overflow" }],
    ["ends by a signal", { signal: "SIGKILL" }, config, { kind: "signal", signal: "SIGKILL" }],
    ["closes stdout", { closeStdout: true }, config, {}],
    [
      "leaves a grandchild",
      { grandchild: { seconds: 1, setsid: true }, raw: "x" },
      config,
      { stdout: "x" },
    ],
  ];
  test.each(rows)("%s", async (name, script, stdin, expected) => {
    const path = fakePlugin(dir.path, name.replace(/\W/g, "-"), script);
    expect(await call(path, "ADD", stdin)).toMatchObject({
      kind: "exit",
      ...("kind" in expected ? {} : { status: 0 }),
      ...expected,
    });
  });

  test("hangs and ignores SIGTERM", async () => {
    const path = fakePlugin(dir.path, "stubborn", { hang: true, ignoreSigterm: true });
    const all = { ...env, CNI_COMMAND: "ADD" };
    const { ending, ms } = timed(await run(path, [], { ...defaults, env: all, timeoutMs: 500 }));
    expect(ending).toEqual({ ...empty, kind: "timeout" });
    expect(ms).toBeGreaterThan(2500);
    expect(groupMembers(calls(dir.path, "stubborn")[0]?.pid ?? 0)).toEqual([]);
  });

  test("speaks 0.2.0 and 0.4.0, records, counts failures and reserves", async () => {
    using own = tempDir();
    const path = fakePlugin(own.path, "ipam", {
      reserve: join(own.path, "leases"),
      CHECK: { error, failTimes: 1 },
    });
    const old = await call(path, "ADD", { ...config, cniVersion: "0.2.0" });
    expect(JSON.parse(old.stdout)).toEqual({
      cniVersion: "0.2.0",
      ip4: { ip: "10.22.0.5/24" },
      dns: {},
    });
    expect(readdirSync(join(own.path, "leases"))).toEqual(["c1-eth0"]);
    const kinds = [];
    for (const command of ["CHECK", "CHECK", "DEL", "DEL", "CHECK"]) {
      const ending = await call(path, command, { ...config, cniVersion: "0.4.0" });
      kinds.push(ending.kind === "exit" ? ending.status : ending.kind);
    }
    expect(kinds).toEqual([1, 0, 0, 0, 1]);
    expect(readdirSync(join(own.path, "leases"))).toEqual([]);
    const [first, ...rest] = calls(own.path, "ipam");
    expect(first?.env).toEqual({ ...env, ...attachment, CNI_COMMAND: "ADD" });
    expect(rest.map((one) => one.command)).toEqual(["CHECK", "CHECK", "DEL", "DEL", "CHECK"]);
  });
});
