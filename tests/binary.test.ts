/**
 * The compiled program as a process: real pipes, slow and closed ones, hostile surroundings, many
 * at once. Stdout, stderr, then the exit status.
 */
import { dlopen, FFIType } from "bun:ffi";
import { afterAll, describe, expect, test } from "bun:test";
import {
  closeSync,
  copyFileSync,
  existsSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { startApiServer } from "./apiserver.ts";
import { calls, fakePlugin, type GenieRun, tempDir } from "./fakes.ts";
import {
  annotated,
  compiledGenie,
  left,
  makeNode,
  type Node,
  nothing,
  spawnGenie,
  wire,
  wireEnv,
  wireError,
  wireStdin,
} from "./wire.ts";

const program = compiledGenie();
const blue = { cniVersion: "1.1.0", name: "blue", plugins: [{ type: "bridge" }] };

/** A node with one network, blue, whose result has this many routes. */
function blueNode(routes = 0): Node {
  const made = Array.from({ length: routes }, (_, i) => ({
    dst: `10.${i >> 8}.${i & 255}.0/24`,
    gw: "10.22.0.1",
  }));
  return makeNode({
    lists: { "10-blue.conflist": blue },
    delegates: { bridge: { reserve: "$DIR/reserved", ...(routes > 0 && { routes: made }) } },
  });
}

/** The same with a plugin of /bin/sh: Bun, which runs the other fakes, minds more variables. */
function shellNode(): Node {
  const node = blueNode();
  const result = { cniVersion: "1.1.0", ips: [{ address: "10.22.0.5/24" }] };
  const script = `#!/bin/sh\nenv >"$0.env"\necho '${JSON.stringify(result)}'\n`;
  fakePlugin(node.bin, "bridge", script);
  return node;
}

/** Runs a shell line in which `"$0"` is the program; its stdin is the pipe of `cat`. */
async function shell(node: Node, line: string, command = "ADD"): Promise<GenieRun> {
  const stdin = wireStdin(node, { stdin: annotated({ cni: "blue" }) });
  const env = { ...wireEnv(node, { command }), PATH: "/usr/bin:/bin" };
  return spawnGenie(["/bin/sh", "-c", line, program], env, stdin);
}

const added = (ifName = "eth0") => expect.stringContaining(`"name":"${ifName}"`);

describe("the binary", () => {
  test("reads a pipe, writes a pipe, and is silent on stderr", async () => {
    using node = blueNode();
    const run = await shell(node, 'cat | { "$0"; echo "status $?"; } | cat');
    const [document = "", ...rest] = run.stdout.split("\n");
    expect(JSON.parse(document)).toEqual({
      cniVersion: "1.1.0",
      interfaces: [{ name: "eth0", sandbox: node.netns }],
      ips: [{ interface: 0, address: "10.22.0.5/24" }],
      routes: [],
    });
    expect({ rest, stderr: run.stderr }).toEqual({ rest: ["status 0", ""], stderr: "" });
  });

  test.concurrent.each(["CHECK", "DEL", "DEL"])(
    "says nothing on a successful %s",
    async (command) => {
      using node = blueNode();
      await wire(node, { command: "ADD", stdin: annotated({ cni: "blue" }) });
      const run = await wire(node, { command, stdin: annotated({ cni: "blue" }) });
      expect(run).toEqual({ stdout: "", stderr: "", status: 0 });
    },
  );

  test("writes all of a result to a pipe that is read byte by byte", async () => {
    using node = blueNode(5000);
    const slow = "dd bs=64 count=2000 2>/dev/null; cat";
    const run = await shell(node, `"$0" | { ${slow}; }`);
    expect(JSON.parse(run.stdout).routes).toHaveLength(5000);
    expect(run).toEqual({ ...run, stderr: "", status: 0 });
  });

  test("writes all of a result to a pipe that does not block", async () => {
    using node = blueNode(5000);
    const { read, write } = openPipe();
    const stdin = wireStdin(node, { stdin: annotated({ cni: "blue" }) });
    const env = wireEnv(node, { command: "ADD" });
    const child = Bun.spawn([program], { env, cwd: "/", stdin, stdout: write, stderr: "pipe" });
    closeSync(write);
    const stdout = await Bun.file(read).text();
    expect(JSON.parse(stdout).routes).toHaveLength(5000);
    expect([await child.stderr.text(), await child.exited]).toEqual(["", 0]);
  });

  test.each([
    ["whose reader went away", '"$0" | true'],
    ["that is closed", '"$0" >&-'],
    ["that is full", '"$0" >/dev/full'],
  ])("ends on a stdout %s, and keeps its record in order", async (_name, line) => {
    using node = blueNode(5000);
    const run = await shell(node, line);
    expect(run).toEqual({ stdout: "", stderr: "", status: 0 });
    expect(left(node).rows).toEqual(["c1 eth0 attached"]);
    const deleted = await wire(node, { command: "DEL" });
    expect(deleted).toEqual({ stdout: "", stderr: "", status: 0 });
    expect(left(node)).toEqual(nothing);
  });

  test("ends when stderr is closed", async () => {
    using node = blueNode();
    fakePlugin(node.bin, "bridge", { stderr: "a warning of the plugin\n".repeat(10_000) });
    const run = await shell(node, '"$0" 2>&-');
    expect(JSON.parse(run.stdout).ips).toHaveLength(1);
    expect(run).toEqual({ ...run, stderr: "", status: 0 });
  });

  test("refuses a stdin that is closed", async () => {
    using node = blueNode();
    const run = await shell(node, 'exec "$0" <&-');
    expect([5, 6]).toContain(wireError(run).code);
    expect(run.stderr).toBe("");
    expect(left(node)).toEqual(nothing);
  });

  test.each([
    ["closed", 'exec "$0" <&-'],
    ["a folder", 'exec "$0" </'],
    ["a pipe that nobody writes to", 'sleep 60 | { "$0"; kill 0; }'],
  ])("answers VERSION with a stdin that is %s", async (_name, line) => {
    using node = makeNode();
    const child = Bun.spawn(["/bin/sh", "-c", line, program], {
      env: { ...wireEnv(node, { command: "VERSION" }), PATH: "/usr/bin:/bin" },
      // `kill 0` ends the shell's group: the sleep, and nothing of the tests.
      detached: true,
      stdin: "ignore",
      stdout: "pipe",
      stderr: "pipe",
    });
    const stdout = await child.stdout.text();
    expect(JSON.parse(stdout)).toMatchObject({ cniVersion: "1.1.0" });
    expect(await child.stderr.text()).toBe("");
    await child.exited;
  });

  test("is a command line without CNI_COMMAND", async () => {
    const run = await spawnGenie([program, "version"], {});
    expect(run.stdout).toMatch(/^genie \d+\.\d+\.\d+/);
    expect(run).toEqual({ ...run, stderr: "", status: 0 });
  });

  test("keeps its record in one place, and none where runtimes keep results", async () => {
    using node = shellNode();
    const CNI_CONTAINERID = crypto.randomUUID();
    const env = { HOME: node.dir, XDG_CACHE_HOME: node.dir, TMPDIR: node.dir, CNI_CONTAINERID };
    await wire(node, { command: "ADD", env, stdin: annotated({ cni: "blue" }) });
    expect(readdirSync(node.state).filter((name) => !name.startsWith("genie.db"))).toEqual([]);
    const own = ["bin", "conf", "netns", "plugins.toml", "reserved", "state"];
    expect(readdirSync(node.dir).sort()).toEqual(own);
    const results = "/var/lib/cni/results";
    const kept = existsSync(results) ? readdirSync(results) : [];
    expect(kept.filter((name) => name.includes(CNI_CONTAINERID))).toEqual([]);
  });
});

describe("six at once", () => {
  test("for six containers all succeed, and go again", async () => {
    using node = blueNode();
    const ids = Array.from({ length: 6 }, (_, i) => ({ CNI_CONTAINERID: `c${i}` }));
    const run = (command: string) =>
      Promise.all(
        ids.map((env) => wire(node, { command, env, stdin: annotated({ cni: "blue" }) })),
      );
    const adds = await run("ADD");
    expect(adds).toEqual(ids.map(() => ({ stdout: added(), stderr: "", status: 0 })));
    expect(left(node).rows.sort()).toEqual(ids.map((id) => `${id.CNI_CONTAINERID} eth0 attached`));
    const deletes = await run("DEL");
    expect(deletes).toEqual(ids.map(() => ({ stdout: "", stderr: "", status: 0 })));
    expect(left(node)).toEqual(nothing);
  });

  test("for one container and one interface one succeeds, and is not harmed", async () => {
    using node = blueNode();
    const call = { command: "ADD", stdin: annotated({ cni: "blue" }) };
    const adds = await Promise.all(Array.from({ length: 6 }, () => wire(node, call)));
    const codes = adds.filter(({ status }) => status !== 0).map((run) => wireError(run).code);
    expect(codes).toEqual([105, 105, 105, 105, 105]);
    expect(calls(node.bin).map(({ command }) => command)).toEqual(["ADD"]);
    expect(left(node)).toEqual({ rows: ["c1 eth0 attached"], reserved: ["c1-eth0"] });
  });

  test("for one container never run two delegates side by side", async () => {
    using node = blueNode();
    fakePlugin(node.bin, "bridge", { reserve: node.reserved, delayMs: 30 });
    const names = Array.from({ length: 6 }, (_, i) => `eth${i}`);
    const adds = await Promise.all(
      names.map((CNI_IFNAME) =>
        wire(node, { command: "ADD", env: { CNI_IFNAME }, stdin: annotated({ cni: "blue" }) }),
      ),
    );
    const statuses = adds.map(({ stderr, status }) => ({ stderr, status }));
    expect(statuses).toEqual(names.map(() => ({ stderr: "", status: 0 })));
    const times = calls(node.bin).map(({ timeMs }) => timeMs);
    const gaps = times.slice(1).map((time, i) => time - (times[i] ?? 0));
    expect(gaps.every((gap) => gap > 30)).toBe(true);
  });
});

describe("an upgrade in the middle of an ADD", () => {
  test.each([
    ["replaces", (file: string) => renameSync(`${file}.new`, file)],
    ["removes", (file: string) => rmSync(file)],
  ])("%s the binary: the ADD goes on", async (_name, change) => {
    using node = blueNode();
    const own = join(node.dir, "genie");
    for (const file of [own, `${own}.new`]) copyFileSync(program, file);
    const api = await startApiServer(join(node.dir, "api"));
    api.put("/api/v1/namespaces/ns/pods/pod", {
      metadata: { uid: "u1", annotations: { cni: "blue" } },
    });
    // The pod is asked for first, before its networks are looked up.
    api.gate = async () => {
      if (api.requests.length === 1) change(own);
    };
    try {
      const env = { CNI_ARGS: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;K8S_POD_UID=u1" };
      const stdin = { kubernetes: { kubeconfig: api.kubeconfig("token") } };
      const run = await spawnGenie(
        [own],
        wireEnv(node, { command: "ADD", env }),
        wireStdin(node, { stdin }),
      );
      expect(run).toEqual({ stdout: added(), stderr: "", status: 0 });
    } finally {
      await api.stop();
    }
  });
});

describe("hostile surroundings", () => {
  const trap = tempDir();
  afterAll(() => trap[Symbol.dispose]());
  const marker = join(trap.path, "sprung");
  const write = (name: string, text: string) => writeFileSync(join(trap.path, name), text);
  write("evil.js", `require("node:fs").writeFileSync(${JSON.stringify(marker)}, "")`);
  for (const name of ["bunfig.toml", ".bunfig.toml"]) {
    write(name, `preload = ["./evil.js"]\n[run]\nshell = "bun"\n[define]\n"fetch" = "0"\n`);
  }
  for (const name of [".env", ".env.local", ".env.production", ".env.development"]) {
    write(name, "CNI_COMMAND=DEL\nCNI_IFNAME=evil0\nCNI_CONTAINERID=evil\nBUN_OPTIONS=--help\n");
  }
  write("package.json", '{"name":"evil","type":"commonjs","imports":{"#x":"./evil.js"},"main":');
  write("tsconfig.json", '{"compilerOptions":{"paths":{"*":["./evil.js"]},"jsx":"evil"}}');
  write("npmrc", "registry=http://127.0.0.1:1\n");

  test("in the working folder and at home are not looked at", async () => {
    using node = shellNode();
    const env = { HOME: trap.path, XDG_CONFIG_HOME: trap.path };
    const run = await wire(node, {
      ...{ command: "ADD", env, cwd: trap.path },
      stdin: annotated({ cni: "blue" }),
    });
    expect(run).toEqual({ stdout: added(), stderr: "", status: 0 });
    expect(existsSync(marker)).toBe(false);
    const bare = await spawnGenie([program], {}, undefined, trap.path);
    expect(bare.stdout).not.toContain("cniVersion");
    expect(existsSync(marker)).toBe(false);
  });

  test.each([
    ["VERSION", '"supportedVersions"'],
    ["ADD", '"name":"eth0"'],
    ["DEL", ""],
  ])("%s works in a folder that was deleted", async (command, answer) => {
    using node = shellNode();
    // As a runtime's own folder goes when somebody takes it away.
    const line = `cat | (mkdir ${node.dir}/gone; cd ${node.dir}/gone; rmdir ../gone; exec "$0")`;
    const run = await shell(node, line, command);
    expect(run).toMatchObject({ stderr: "", status: 0 });
    expect(run.stdout).toContain(answer);
  });

  test("for Node do not reach it", async () => {
    using node = shellNode();
    const evil = join(trap.path, "evil.js");
    const env = {
      ...{ NODE_OPTIONS: `--require ${evil}`, NODE_PATH: trap.path, NODE_ENV: "development" },
      ...{ NODE_EXTRA_CA_CERTS: "/proc/nonexistent", NODE_DEBUG: "fs,net", DEBUG: "*" },
      ...{ FORCE_COLOR: "1", BUN_DEBUG_ALL: "1" },
    };
    const call = { command: "ADD", env, stdin: annotated({ cni: "blue" }) };
    expect(await wire(node, call)).toEqual({ stdout: added(), stderr: "", status: 0 });
    expect(existsSync(marker)).toBe(false);
    // They belong to the plugin as much as to us (CNI SPEC 1.1 §4).
    const received = readFileSync(join(node.bin, "bridge.env"), "utf8");
    expect(received).toContain(`NODE_OPTIONS=${env.NODE_OPTIONS}\n`);
  });

  test.each([
    ["no HOME and no PATH", {}],
    ["an empty PATH", { PATH: "" }],
    ["a PATH of nowhere", { PATH: "/proc/nonexistent" }],
    ["a HOME that is not there", { HOME: "/proc/nonexistent", TMPDIR: "/proc/nonexistent" }],
    ["a HOME that cannot be written", { HOME: "/proc", TMPDIR: "/proc", XDG_CACHE_HOME: "/proc" }],
  ])("such as %s do no harm", async (_name, env) => {
    using node = blueNode();
    const add = await wire(node, { command: "ADD", env, stdin: annotated({ cni: "blue" }) });
    expect(add).toEqual({ stdout: added(), stderr: "", status: 0 });
    const del = await wire(node, { command: "DEL", env });
    expect(del).toEqual({ stdout: "", stderr: "", status: 0 });
    expect(left(node)).toEqual(nothing);
  });
});

/** A pipe whose writing end does not block: writes to it are short or fail with EAGAIN. */
function openPipe(): { read: number; write: number } {
  const { symbols } = dlopen("libc.so.6", {
    pipe2: { args: [FFIType.ptr, FFIType.i32], returns: FFIType.i32 },
    fcntl: { args: [FFIType.i32, FFIType.i32, FFIType.i32], returns: FFIType.i32 },
  });
  const fds = new Int32Array(2);
  const [closeOnExec, setFlags, nonBlocking] = [0o2000000, 4, 0o4000];
  if (symbols.pipe2(fds, closeOnExec) !== 0) throw new Error("Cannot make a pipe");
  const [read = -1, write = -1] = fds;
  symbols.fcntl(write, setFlags, nonBlocking);
  return { read, write };
}
