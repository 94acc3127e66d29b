/**
 * The compiled program under kills, signals, races and full disks: whatever happens at whatever
 * moment, a DEL in the end leaves nothing behind, no address, no row, no lock, no process.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { closeState, openState } from "../lib/database.ts";
import { processStarted } from "../lib/lock.ts";
import { callOrder, calls, fakePlugin, type GenieRun, makeHost, type Script } from "./fakes.ts";
import {
  annotated,
  compiledGenie,
  left,
  makeNode,
  type Node,
  nothing,
  type WireCall,
  wire,
  wireEnv,
  wireError,
  wireStdin,
} from "./wire.ts";

const list = (name: string, ...types: string[]) => ({
  cniVersion: "1.1.0",
  name,
  plugins: types.map((type) => ({ type })),
});

type Scripts = Partial<Record<"a" | "b" | "c", Script>>;

function writePlugins(node: Node, scripts: Scripts = {}): void {
  const reserve = node.reserved;
  fakePlugin(node.bin, "a", { reserve, ...scripts.a });
  fakePlugin(node.bin, "b", { chain: "pass", ...scripts.b });
  fakePlugin(node.bin, "c", { reserve, ...scripts.c });
}

/** Networks blue (plugins a, b) and green (plugin c). */
function makeNetworks(scripts: Scripts = {}, table = ""): Node {
  const lists = { "1.conflist": list("blue", "a", "b"), "2.conflist": list("green", "c") };
  const node = makeNode({ table: `${table}[plugins.blue]\n[plugins.green]\n`, lists });
  writePlugins(node, scripts);
  return node;
}

const cni = annotated({ cni: "blue,green" });
const addCall: WireCall = { command: "ADD", stdin: cni };
const delCall: WireCall = { command: "DEL" };
const gcCall: WireCall = { command: "GC", stdin: { "cni.dev/valid-attachments": [] } };
const ok = { status: 0, stderr: "" };
const allDel = ["c DEL c1 eth1", "b DEL c1 eth0", "a DEL c1 eth0"];

/** A call that was begun. */
interface Begun {
  kill: (signal: NodeJS.Signals) => void;
  ended: Promise<GenieRun>;
}

const children: Bun.Subprocess[] = [];
/** Folders of the nodes of a test, to find what runs on behalf of them. */
const nodes: Node[] = [];

afterEach(() => {
  for (const child of children.splice(0)) child.kill("SIGKILL");
  for (const node of nodes.splice(0)) {
    for (const pid of delegates(node)) process.kill(pid, "SIGKILL");
  }
});

function begin(node: Node, call: WireCall): Begun {
  if (!nodes.includes(node)) nodes.push(node);
  const child = Bun.spawn([compiledGenie()], {
    env: wireEnv(node, call),
    cwd: "/",
    stdin: wireStdin(node, call),
    stdout: "pipe",
    stderr: "pipe",
  });
  children.push(child);
  const ended = Promise.all([child.stdout.text(), child.stderr.text(), child.exited]).then(
    ([stdout, stderr]) => ({ status: child.exitCode ?? -1, stdout, stderr }),
  );
  return { kill: (signal) => child.kill(signal), ended };
}

async function until(holds: () => boolean): Promise<void> {
  for (let ms = 0; !holds(); ms += 5) {
    if (ms > 30_000) throw new Error("Waited too long");
    await Bun.sleep(5);
  }
}

/** Begins a call and waits until a plugin was reached. */
async function beginUntil(node: Node, call: WireCall, reached: string): Promise<Begun> {
  const begun = begin(node, call);
  await until(() => callOrder(node.bin).includes(reached));
  return begun;
}

/** Begins a call, kills it once a plugin was reached, and waits for its end. */
async function killAt(node: Node, call: WireCall, reached: string): Promise<void> {
  const begun = await beginUntil(node, call, reached);
  begun.kill("SIGKILL");
  // Not `ended`: the orphan holds the outputs open.
  await until(() => !children.some(({ exitCode, signalCode }) => exitCode === null && !signalCode));
}

/** The delegates of a node that are still running. */
function delegates(node: Node): number[] {
  return calls(node.bin)
    .map(({ pid }) => pid)
    .filter((pid) => processStarted(pid) !== "" && isFake(pid));
}

/** A number may belong to another process by now. */
function isFake(pid: number): boolean {
  const path = `/proc/${pid}/cmdline`;
  return existsSync(path) && statSync(path).size >= 0 && readCommand(pid).includes("delegate.ts");
}

function readCommand(pid: number): string {
  return Bun.spawnSync(["/bin/cat", `/proc/${pid}/cmdline`]).stdout.toString();
}

const locks = (node: Node): unknown[] => {
  const state = openState(makeHost(), node.state);
  try {
    return state.database.query("SELECT * FROM operations").all();
  } finally {
    closeState(state);
  }
};

const ending = (node: Node) => ({ ...left(node), locks: locks(node), running: delegates(node) });
const clean = { ...nothing, locks: [], running: [] };

async function cleanDel(node: Node, call: WireCall = delCall): Promise<void> {
  const run = await wire(node, call);
  expect(run).toEqual({ status: 0, stdout: "", stderr: "" });
  expect(ending(node)).toEqual(clean);
}

const hang = { hang: true };
const busy = { error: { code: 118, msg: "busy" } };

/** Where genie is killed in an ADD: the plugins' scripts, and the call that is reached. */
const stages: [string, Scripts, string][] = [
  ["the first plugin", { a: { ADD: hang } }, "a ADD c1 eth0"],
  ["a chained plugin", { b: { ADD: hang } }, "b ADD c1 eth0"],
  ["the second network", { c: { ADD: hang } }, "c ADD c1 eth1"],
  ["a plugin deaf to SIGTERM", { c: { ADD: { ...hang, ignoreSigterm: true } } }, "c ADD c1 eth1"],
  ["undoing the failed one", { c: { ADD: busy, DEL: hang } }, "c DEL c1 eth1"],
  ["undoing the chain", { c: { ADD: busy }, b: { DEL: hang } }, "b DEL c1 eth0"],
  ["undoing the first", { c: { ADD: busy }, a: { DEL: hang } }, "a DEL c1 eth0"],
];

describe("genie killed in ADD, at", () => {
  test.each(stages)("%s: DEL undoes it", async (_name, scripts, reached) => {
    using node = makeNetworks(scripts);
    await killAt(node, addCall, reached);
    // The plan was there before the first plugin was.
    expect(left(node).rows).toEqual(["c1 eth0 planned", "c1 eth1 planned"]);
    expect([locks(node).length, delegates(node).length]).toEqual([1, 1]);
    const before = calls(node.bin).length;
    writePlugins(node);
    await cleanDel(node);
    expect(callOrder(node.bin).slice(before)).toEqual(allDel);
  });

  test.each(stages)("%s: the next ADD undoes it first", async (_name, scripts, reached) => {
    using node = makeNetworks(scripts);
    await killAt(node, addCall, reached);
    const before = calls(node.bin).length;
    writePlugins(node);
    expect(await wire(node, addCall)).toMatchObject(ok);
    expect(callOrder(node.bin).slice(before)).toEqual([
      ...allDel,
      "a ADD c1 eth0",
      "b ADD c1 eth0",
      "c ADD c1 eth1",
    ]);
    expect(left(node).rows).toEqual(["c1 eth0 attached", "c1 eth1 attached"]);
    await cleanDel(node);
  });

  test("the second network: GC undoes it", async () => {
    using node = makeNetworks({ c: { ADD: hang } });
    await killAt(node, addCall, "c ADD c1 eth1");
    writePlugins(node);
    expect(await wire(node, gcCall)).toMatchObject(ok);
    expect(ending(node)).toEqual(clean);
  });

  test("a plugin that left a child in another session: it ends as well", async () => {
    using node = makeNetworks({
      c: { ADD: { ...hang, grandchild: { seconds: 600, setsid: true } } },
    });
    await killAt(node, addCall, "c ADD c1 eth1");
    const token = calls(node.bin, "c")[0]?.env["GENIE_OPERATION"] ?? "none";
    const marked = () => Bun.spawnSync(["grep", "-lsa", token, ...environs()]).stdout.toString();
    await until(() => marked().trim().split("\n").length === 2);
    writePlugins(node);
    await cleanDel(node);
    expect(marked()).toBe("");
  });
});

function environs(): string[] {
  return [...new Bun.Glob("[0-9]*/environ").scanSync({ cwd: "/proc", absolute: true })];
}

describe("genie killed in DEL", () => {
  test("leaves the rest to the next DEL, its own orphans included", async () => {
    using node = makeNetworks();
    expect(await wire(node, addCall)).toMatchObject(ok);
    writePlugins(node, { b: { DEL: hang } });
    await killAt(node, delCall, "b DEL c1 eth0");
    writePlugins(node);
    await cleanDel(node);
  });

  test("while it took over a killed ADD: the first one's orphans end too", async () => {
    using node = makeNetworks({ a: { ADD: hang, DEL: hang } });
    await killAt(node, addCall, "a ADD c1 eth0");
    await killAt(node, delCall, "a DEL c1 eth0");
    writePlugins(node);
    await cleanDel(node);
  });

  test("is as good as never begun for an ADD", async () => {
    using node = makeNetworks();
    expect(await wire(node, addCall)).toMatchObject(ok);
    writePlugins(node, { c: { DEL: hang } });
    await killAt(node, delCall, "c DEL c1 eth1");
    writePlugins(node);
    expect(wireError(await wire(node, addCall)).code).toBe(105);
    await cleanDel(node);
  });
});

test("genie killed in GC stands in nobody's way", async () => {
  using node = makeNetworks({ a: { GC: hang } });
  await killAt(node, gcCall, "a GC");
  expect(locks(node)).toMatchObject([{ container_id: "*", command: "GC" }]);
  expect(await wire(node, addCall)).toMatchObject(ok);
  await cleanDel(node);
});

describe("genie asked to end", () => {
  const signals = ["SIGTERM", "SIGINT"] as const;
  const adds = stages.filter(([, scripts]) => !JSON.stringify(scripts).includes("DEL"));
  test.each(adds.flatMap((stage) => signals.map((signal) => [signal, ...stage] as const)))(
    "by %s in ADD, at %s: it rolls back before it exits",
    async (signal, _name, scripts, reached) => {
      using node = makeNetworks(scripts);
      const { kill, ended } = await beginUntil(node, addCall, reached);
      kill(signal);
      kill(signal);
      const run = await ended;
      expect(wireError(run)).toMatchObject({ code: 11 });
      expect(ending(node)).toEqual(clean);
      const [plugin = ""] = reached;
      expect(callOrder(node.bin)).toContain(reached.replace("ADD", "DEL"));
      expect(calls(node.bin, plugin).at(-1)?.command).toBe("DEL");
    },
  );

  test("while it rolls back ends the rollback first", async () => {
    using node = makeNetworks({ c: { ADD: busy, DEL: { delayMs: 300 } } });
    const { kill, ended } = await beginUntil(node, addCall, "c DEL c1 eth1");
    kill("SIGTERM");
    expect(wireError(await ended).code).toBe(118);
    expect(ending(node)).toEqual(clean);
  });

  test("in DEL keeps what is not undone", async () => {
    using node = makeNetworks();
    expect(await wire(node, addCall)).toMatchObject(ok);
    writePlugins(node, { b: { DEL: hang } });
    const { kill, ended } = await beginUntil(node, delCall, "b DEL c1 eth0");
    kill("SIGTERM");
    expect(wireError(await ended).code).toBe(11);
    expect(ending(node)).toMatchObject({ rows: ["c1 eth0 failing"], locks: [], running: [] });
    writePlugins(node);
    await cleanDel(node);
  });

  test("while it waits for another operation ends at once", async () => {
    using node = makeNetworks({ a: { ADD: hang } });
    const first = await beginUntil(node, addCall, "a ADD c1 eth0");
    const second = begin(node, addCall);
    await Bun.sleep(0);
    second.kill("SIGKILL");
    await second.ended;
    first.kill("SIGTERM");
    expect(wireError(await first.ended).code).toBe(11);
    await cleanDel(node);
  });
});

describe("DEL while an orphaned ADD still runs (containerd was killed)", () => {
  test.each([
    ["makes it roll back", hang],
    ["makes it roll back, deaf as its plugin is", { ...hang, ignoreSigterm: true }],
  ])("%s", async (_name, does) => {
    using node = makeNetworks({ c: { ADD: does } });
    const orphan = await beginUntil(node, addCall, "c ADD c1 eth1");
    await cleanDel(node);
    expect(wireError(await orphan.ended).code).toBe(11);
    expect(callOrder(node.bin).slice(3)).toEqual(allDel);
    expect(ending(node)).toEqual(clean);
  });

  test("and another ADD waits behind it: neither attaches", async () => {
    using node = makeNetworks({ a: { ADD: hang } });
    const first = await beginUntil(node, addCall, "a ADD c1 eth0");
    const second = begin(node, addCall);
    const del = begin(node, delCall);
    expect(await del.ended).toMatchObject({ status: 0 });
    for (const { ended } of [first, second]) expect(wireError(await ended).code).toBe(11);
    expect(ending(node)).toEqual(clean);
  });

  test("that has not written anything down yet: it must not attach afterwards", async () => {
    using node = makeNetworks();
    const asked = Promise.withResolvers<void>();
    const answer = Promise.withResolvers<void>();
    const metadata = { name: "pod", namespace: "ns", uid: "u1", annotations: { cni: "blue" } };
    const server = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: async () => {
        asked.resolve();
        await answer.promise;
        return Response.json({ kind: "Pod", apiVersion: "v1", metadata });
      },
    });
    try {
      const env = { CNI_ARGS: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;K8S_POD_UID=u1" };
      const kubernetes = { k8s_api_root: server.url.origin };
      const orphan = begin(node, { command: "ADD", stdin: { kubernetes }, env });
      await asked.promise;
      expect(await wire(node, { ...delCall, env })).toMatchObject({ status: 0 });
      answer.resolve();
      const error = wireError(await orphan.ended);
      expect([error.code, error.msg]).toEqual([11, expect.stringContaining("was deleted while")]);
      expect(callOrder(node.bin).filter((call) => call.includes(" ADD "))).toEqual([]);
      expect(ending(node)).toEqual(clean);
      // An ADD that begins after the DEL is as good as any.
      expect(await wire(node, { command: "ADD", stdin: { kubernetes }, env })).toMatchObject(ok);
      await cleanDel(node, { ...delCall, env });
    } finally {
      answer.resolve();
      await server.stop(true);
    }
  });
});

describe("calls at once", () => {
  const env = (containerId: string, ifName = "eth0") => ({
    CNI_CONTAINERID: containerId,
    CNI_IFNAME: ifName,
  });
  const run = (node: Node, runs: WireCall[]) =>
    Promise.all(runs.map((one) => begin(node, one).ended));
  const ids = ["c1", "c2", "c3", "c4", "c5", "c6"];
  const delay = { a: { delayMs: 20 }, c: { delayMs: 20 } };

  test("six ADDs of six containers all succeed, and so do their DELs", async () => {
    using node = makeNetworks(delay);
    const adds = await run(
      node,
      ids.map((id) => ({ ...addCall, env: env(id) })),
    );
    expect(adds).toMatchObject(ids.map(() => ok));
    expect(left(node).reserved).toEqual(ids.flatMap((id) => [`${id}-eth0`, `${id}-eth1`]));
    const dels = await run(
      node,
      ids.map((id) => ({ ...delCall, env: env(id) })),
    );
    expect(dels).toMatchObject(ids.map(() => ok));
    expect(ending(node)).toEqual(clean);
  });

  test("six ADDs of one interface: one attaches, and its plugins hear of nobody else", async () => {
    using node = makeNetworks(delay);
    const runs = await run(
      node,
      ids.map(() => addCall),
    );
    expect(runs.map(({ status }) => status).sort()).toEqual([0, 1, 1, 1, 1, 1]);
    const refused = runs.filter(({ status }) => status === 1).map((one) => wireError(one));
    expect(refused).toEqual(refused.map((error) => ({ ...error, code: 105 })));
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth0", "b ADD c1 eth0", "c ADD c1 eth1"]);
    await cleanDel(node);
  });

  test("ADDs of several interfaces of one container (Mesos) take turns", async () => {
    using node = makeNetworks(delay);
    const names = ["eth0", "eth1", "eth2", "eth3"];
    const each = names.map((name) => ({
      command: "ADD",
      stdin: annotated({ cni: "blue" }),
      env: env("c1", name),
    }));
    expect(await run(node, each)).toMatchObject(names.map(() => ok));
    // Plugin a and its chained b, never another's a in between.
    const order = callOrder(node.bin).map((call) => call.replace(/ ADD c1 /, "@"));
    const turns = order.filter((call) => call.startsWith("a@"));
    expect(order).toEqual(turns.flatMap((call) => [call, call.replace("a@", "b@")]));
    const dels = await run(
      node,
      names.map((name) => ({ ...delCall, env: env("c1", name) })),
    );
    expect(dels).toMatchObject(names.map(() => ok));
    expect(ending(node)).toEqual(clean);
  });

  test("three DELs of one container call its plugins once", async () => {
    using node = makeNetworks({ a: { DEL: { delayMs: 50 } } });
    expect(await wire(node, addCall)).toMatchObject(ok);
    const before = calls(node.bin).length;
    expect(await run(node, [delCall, delCall, delCall])).toMatchObject([ok, ok, ok]);
    expect(callOrder(node.bin).slice(before)).toEqual(allDel);
    expect(ending(node)).toEqual(clean);
  });

  test("GC waits for an ADD, and ADD and DEL wait for GC", async () => {
    using node = makeNetworks({ c: { ADD: { delayMs: 200 } }, a: { GC: { delayMs: 200 } } });
    expect(await wire(node, { ...addCall, env: env("c2") })).toMatchObject(ok);
    const before = calls(node.bin).length;
    const add = begin(node, addCall);
    await until(() => callOrder(node.bin).slice(before).includes("c ADD c1 eth1"));
    const gc = begin(node, gcCall);
    await until(() => callOrder(node.bin).includes("a GC"));
    const others = run(node, [
      { ...addCall, env: env("c3") },
      { ...delCall, env: env("c2") },
    ]);
    expect(await Promise.all([add.ended, gc.ended, others])).toMatchObject([ok, ok, [ok, ok]]);
    const order = callOrder(node.bin).slice(before);
    // c1 was there when GC came: both containers are collected, c1's ADD having ended first.
    const [added, collected] = [order.indexOf("c ADD c1 eth1"), order.indexOf("a DEL c1 eth0")];
    expect(added).toBeLessThan(collected);
    expect(order.indexOf("c GC")).toBeLessThan(order.indexOf("a ADD c3 eth0"));
    expect(left(node).rows).toEqual(["c3 eth0 attached", "c3 eth1 attached"]);
  });

  test("an ADD that cannot have the lock in time says try again", async () => {
    using node = makeNetworks({ a: { ADD: hang } }, 'timeout = "400ms"\n');
    using slow = makeNetworks({ a: { ADD: hang } });
    // The holder has a minute, the other one shares its record but not its table.
    const holder = await beginUntil(slow, addCall, "a ADD c1 eth0");
    rmSync(node.tableFile);
    const table = `state_dir = "${slow.state}"\nconf_dir = "${node.conf}"\ntimeout = "400ms"\n`;
    writeFileSync(node.tableFile, table);
    const error = wireError(await begin(node, addCall).ended);
    expect([error.code, error.msg]).toEqual([11, expect.stringContaining("is still running")]);
    holder.kill("SIGTERM");
    expect(wireError(await holder.ended).code).toBe(11);
    expect([callOrder(node.bin), ending(slow)]).toEqual([[], clean]);
  });
});

/** Calls in random order and killed at random moments; the seed is in the test's name. */
describe("calls of one container, some of them killed", () => {
  test.each([1, 2, 3, 4])("seed %d: a DEL in the end leaves nothing", async (seed) => {
    using node = makeNetworks({ a: { delayMs: 3 }, c: { delayMs: 3 } });
    let random = seed;
    const next = (below: number) => {
      random = (random * 48_271) % 2_147_483_647;
      return random % below;
    };
    for (let round = 0; round < 8; round++) {
      const begun = Array.from({ length: 3 }, () => begin(node, next(3) === 0 ? delCall : addCall));
      const reached = calls(node.bin).length + next(6);
      const deadlineMs = Date.now() + 300;
      await until(() => calls(node.bin).length >= reached || Date.now() > deadlineMs);
      begun[next(3)]?.kill("SIGKILL");
      if (next(2) === 0) begun[next(3)]?.kill("SIGTERM");
      await until(() => children.every((one) => one.exitCode !== null || one.signalCode !== null));
    }
    const run = await wire(node, delCall);
    expect([run.status, run.stdout]).toEqual([0, ""]);
    expect(ending(node)).toEqual(clean);
  });
});

/** A small disk of its own, where we may mount one. */
function mountDisk(path: string): boolean {
  mkdirSync(path);
  const args = ["mount", "-t", "tmpfs", "-o", "size=256k", "genie-test", path];
  return process.getuid?.() === 0 && Bun.spawnSync(args).exitCode === 0;
}

const canMount = (() => {
  using node = makeNode();
  const path = join(node.dir, "disk");
  if (!mountDisk(path)) return false;
  return Bun.spawnSync(["umount", path]).exitCode === 0;
})();

describe.skipIf(!canMount)("a state folder on a disk that is", () => {
  async function withDisk(scripts: Scripts, fn: (node: Node, disk: string) => Promise<void>) {
    using made = makeNetworks(scripts);
    const disk = join(made.dir, "disk");
    if (!mountDisk(disk)) throw new Error("Cannot mount");
    const node: Node = { ...made, state: join(disk, "state") };
    const folders = `conf_dir = "${node.conf}"\nstate_dir = "${node.state}"\nbin_dirs = []\n`;
    writeFileSync(node.tableFile, `${folders}[plugins.blue]\n[plugins.green]\n`);
    try {
      await fn(node, disk);
    } finally {
      Bun.spawnSync(["umount", "--lazy", disk]);
    }
  }

  const fillDisk = (disk: string) => `dd if=/dev/zero of=${disk}/fill bs=1k 2>/dev/null || true`;
  const fill = (disk: string) => Bun.spawnSync(["/bin/sh", "-c", fillDisk(disk)]);
  const remount = (disk: string, how: "ro" | "rw") =>
    expect(Bun.spawnSync(["mount", "-o", `remount,${how}`, disk]).exitCode).toBe(0);

  test("full at the commit: rolled back, code 106", async () => {
    await withDisk({}, async (node, disk) => {
      // c fills the disk, and what is to be stored of b is more than its log has room for.
      const dns = {
        nameservers: Array.from({ length: 4000 }, (_, i) => `10.0.${i >> 8}.${i & 255}`),
      };
      writePlugins(node, { a: { dns } });
      fakePlugin(
        node.bin,
        "c",
        `#!/bin/sh
cat > /dev/null
echo "{\\"plugin\\":\\"c\\",\\"command\\":\\"$CNI_COMMAND\\",\\"env\\":{},\\"pid\\":$$}" >> ${node.bin}/.calls.jsonl
[ $CNI_COMMAND = ADD ] || exit 0
${fillDisk(disk)}
echo '{"cniVersion":"1.1.0","ips":[{"address":"10.1.0.2/24"}]}'
`,
      );
      const run = await wire(node, addCall);
      expect(wireError(run).code).toBe(106);
      expect(
        callOrder(node.bin)
          .slice(2)
          .map((call) => call.slice(0, 5)),
      ).toEqual(["c ADD", "c DEL", "b DEL", "a DEL"]);
      expect(left(node).reserved).toEqual([]);
      // Still full: the rows could not be taken back either, and DEL goes by them again.
      expect((await wire(node, delCall)).status).toBe(0);
      rmSync(join(disk, "fill"));
      expect(await wire(node, delCall)).toMatchObject({ status: 0 });
      expect(ending(node)).toEqual(clean);
    });
  });

  test("full before anything: ADD is refused, DEL works from the record", async () => {
    await withDisk({}, async (node, disk) => {
      expect(await wire(node, addCall)).toMatchObject(ok);
      const before = calls(node.bin).length;
      fill(disk);
      const other = { ...addCall, env: { CNI_CONTAINERID: "c2" } };
      expect(wireError(await wire(node, other)).code).toBe(106);
      const run = await wire(node, delCall);
      expect([run.status, run.stdout, run.stderr]).toEqual([
        0,
        "",
        expect.stringContaining("error"),
      ]);
      expect([callOrder(node.bin).slice(before), readdirSync(node.reserved)]).toEqual([allDel, []]);
      rmSync(join(disk, "fill"));
      await cleanDel(node);
    });
  });

  test("read-only: ADD is refused, DEL works from the record", async () => {
    await withDisk({}, async (node, disk) => {
      expect(await wire(node, addCall)).toMatchObject(ok);
      const before = calls(node.bin).length;
      remount(disk, "ro");
      const other = { ...addCall, env: { CNI_CONTAINERID: "c2" } };
      expect(wireError(await wire(node, other)).code).toBe(106);
      const run = await wire(node, delCall);
      expect([run.status, run.stdout, run.stderr]).toEqual([
        0,
        "",
        expect.stringContaining("error"),
      ]);
      expect([callOrder(node.bin).slice(before), readdirSync(node.reserved)]).toEqual([allDel, []]);
      remount(disk, "rw");
      await cleanDel(node);
    });
  });

  test("read-only, with a plugin that fails: DEL fails, for a retry", async () => {
    await withDisk({ c: { DEL: busy } }, async (node, disk) => {
      expect(await wire(node, addCall)).toMatchObject(ok);
      remount(disk, "ro");
      expect(wireError(await wire(node, delCall)).code).toBe(118);
      remount(disk, "rw");
      writePlugins(node);
      await cleanDel(node);
    });
  });
});
