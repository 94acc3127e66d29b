/**
 * The compiled program called several times at once, killed at random, and on disks that are full
 * or read-only: nothing overlaps that must not, and a DEL in the end leaves nothing behind.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { callOrder, calls, fakePlugin } from "./fakes.ts";
import {
  addCall,
  allDel,
  type Begun,
  begin,
  beginUntil,
  busy,
  children,
  clean,
  cleanDel,
  delCall,
  endAll,
  ending,
  gate,
  gcCall,
  hang,
  hasOpen,
  makeNetworks,
  ok,
  open,
  type Scripts,
  until,
  writePlugins,
} from "./fixtures/faults.ts";
import { lacks } from "./skip.ts";
import { annotated, left, type Node, type WireCall, wire, wireError } from "./wire.ts";

afterEach(endAll);

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
    using node = makeNetworks();
    expect(await wire(node, { ...addCall, env: env("c2") })).toMatchObject(ok);
    const before = calls(node.bin).length;
    writePlugins(node, {
      c: { ADD: { shell: gate(node, "added") } },
      a: { GC: { shell: gate(node, "collected") } },
    });
    const waits = ({ pid }: Begun) => until(() => hasOpen(pid, "genie.db"));
    const add = await beginUntil(node, addCall, "c ADD c1 eth1");
    const gc = begin(node, gcCall);
    await waits(gc);
    open(node, "added");
    await until(() => callOrder(node.bin).includes("a GC"));
    const others = [
      begin(node, { ...addCall, env: env("c3") }),
      begin(node, { ...delCall, env: env("c2") }),
    ];
    for (const one of others) await waits(one);
    open(node, "collected");
    const all = [add, gc, ...others].map(({ ended }) => ended);
    expect(await Promise.all(all)).toMatchObject([ok, ok, ok, ok]);
    const order = callOrder(node.bin).slice(before);
    // c1 was there when GC came: both containers are collected, c1's ADD having ended first.
    const [added, collected] = [order.indexOf("c ADD c1 eth1"), order.indexOf("a DEL c1 eth0")];
    expect(added).toBeLessThan(collected);
    expect(order.indexOf("c GC")).toBeLessThan(order.indexOf("a ADD c3 eth0"));
    expect(left(node).rows).toEqual(["c3 eth0 attached", "c3 eth1 attached"]);
  });

  test("an ADD that cannot have the lock in time says try again", async () => {
    using node = makeNetworks({ a: { ADD: hang } }, 'timeout = "1s"\n');
    using slow = makeNetworks({ a: { ADD: hang } });
    // The holder has a minute, the other one shares its record but not its table.
    const holder = await beginUntil(slow, addCall, "a ADD c1 eth0");
    rmSync(node.tableFile);
    const table = `state_dir = "${slow.state}"\nconf_dir = "${node.conf}"\ntimeout = "1s"\n`;
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

/** Mounts a small disk. @returns whether that worked */
function mountDisk(path: string): boolean {
  mkdirSync(path);
  const args = ["mount", "-t", "tmpfs", "-o", "size=256k", "genie-test", path];
  return Bun.spawnSync(args).exitCode === 0;
}

describe.skipIf(lacks("mounts"))("a state folder on a disk that is", () => {
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
echo '{"plugin":"c","command":"'$CNI_COMMAND'","env":{},"pid":'$$'}' >> ${node.bin}/.calls.jsonl
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
