/**
 * The compiled program killed and asked to end at whatever moment: a DEL in the end leaves nothing
 * behind, no address, no row, no lock, no process.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { startApiServer } from "./apiserver.ts";
import { callOrder, calls } from "./fakes.ts";
import {
  addCall,
  allDel,
  begin,
  beginUntil,
  busy,
  clean,
  cleanDel,
  delCall,
  delegates,
  endAll,
  ending,
  gcCall,
  hang,
  hasOpen,
  killAt,
  locks,
  makeNetworks,
  ok,
  type Scripts,
  until,
  writePlugins,
} from "./fixtures/faults.ts";
import { left, wire, wireError } from "./wire.ts";

afterEach(endAll);

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
  // Only listed, not opened: a process may end meanwhile, and grep says nothing of that.
  const pids = readdirSync("/proc").filter((name) => /^\d+$/.test(name));
  return pids.map((pid) => `/proc/${pid}/environ`);
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
    const pidOf = (command: string) =>
      calls(node.bin, "a").find((call) => call.command === command)?.pid ?? 0;
    await killAt(node, addCall, "a ADD c1 eth0");
    expect(delegates(node)).toEqual([pidOf("ADD")]);
    await killAt(node, delCall, "a DEL c1 eth0");
    expect(delegates(node)).toEqual([pidOf("DEL")]);
    writePlugins(node);
    await cleanDel(node);
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth0", ...allDel, ...allDel]);
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
    await until(() => hasOpen(second.pid, "genie.db"));
    second.kill("SIGTERM");
    const error = wireError(await second.ended);
    expect([error.code, error.msg]).toEqual([11, expect.stringContaining("is still running")]);
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth0"]);
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
    const api = await startApiServer(join(node.dir, "api"));
    api.put("/api/v1/namespaces/ns/pods/pod", {
      metadata: { uid: "u1", annotations: { cni: "blue" } },
    });
    api.gate = async () => {
      asked.resolve();
      await answer.promise;
    };
    try {
      const env = { CNI_ARGS: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;K8S_POD_UID=u1" };
      const kubernetes = { kubeconfig: api.kubeconfig("token") };
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
      await api.stop();
    }
  });
});
