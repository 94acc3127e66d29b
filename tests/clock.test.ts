/**
 * A clock that jumps (a step of NTP, a machine that was paused): in the middle of a call, which
 * goes by the time that passed; and between two calls, which must not wait for it to catch up.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { readFileSync, rmSync, writeFileSync } from "node:fs";
import { callOrder, fakePlugin } from "./fakes.ts";
import {
  addCall,
  begin,
  beginUntil,
  busy,
  cleanDel,
  delCall,
  endAll,
  ending,
  hang,
  hasOpen,
  makeNetworks,
  ok,
  until,
  writePlugins,
} from "./fixtures/faults.ts";
import { lacks } from "./skip.ts";
import { type Clock, makeClock } from "./torture/clock.ts";
import { annotated, left, type Node, type WireCall, wire, wireError } from "./wire.ts";

afterEach(endAll);

const hour = 3600;
const jumps: [string, number][] = [
  ["an hour ahead", hour],
  ["an hour back", -hour],
];

const by = ({ env }: Clock, call: WireCall): WireCall => ({
  ...call,
  env: { ...call.env, ...env },
});

/** A plugin that sets the clock in ADD, and attaches nothing else. */
function writeJumper(node: Node, name: string, line: string): void {
  const result = '{"cniVersion":"1.1.0","ips":[{"address":"10.1.0.2/24"}]}';
  const add = `${line}; echo '${result}'`;
  fakePlugin(
    node.bin,
    name,
    `#!/bin/sh\ncat >/dev/null\n[ $CNI_COMMAND = ADD ] || exit 0\n${add}\n`,
  );
}

describe.skipIf(lacks("libfaketime"))("a clock that jumps", () => {
  test.each(jumps)("%s in an ADD: the rest has the time it had", async (_name, seconds) => {
    using node = makeNetworks();
    const clock = makeClock(node.dir);
    writeJumper(node, "c", clock.line(seconds));
    const cni = annotated({ cni: "green,blue" });
    expect(await wire(node, by(clock, { ...addCall, stdin: cni }))).toMatchObject(ok);
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth1", "b ADD c1 eth1"]);
    await cleanDel(node, by(clock, { ...delCall, stdin: cni }));
  });

  test("an hour back while an ADD waits for its container: it gives up in time", async () => {
    using node = makeNetworks({ a: { ADD: hang } });
    const clock = makeClock(node.dir);
    const first = await beginUntil(node, by(clock, addCall), "a ADD c1 eth0");
    const table = readFileSync(node.tableFile, "utf8");
    rmSync(node.tableFile);
    writeFileSync(node.tableFile, `timeout = "4s"\n${table}`);
    const second = begin(node, by(clock, addCall));
    await until(() => hasOpen(second.pid, "genie.db"));
    clock.set(-hour);
    expect(wireError(await second.ended)).toMatchObject({ code: 11 });
    first.kill("SIGTERM");
    expect(wireError(await first.ended).code).toBe(11);
    expect(ending(node)).toMatchObject({ rows: [], locks: [], running: [] });
  });

  test.each(jumps)("%s after a DEL: the container can be added again", async (_name, seconds) => {
    using node = makeNetworks();
    const clock = makeClock(node.dir);
    expect(await wire(node, by(clock, addCall))).toMatchObject(ok);
    await cleanDel(node, by(clock, delCall));
    clock.set(seconds);
    expect(await wire(node, by(clock, addCall))).toMatchObject(ok);
    await cleanDel(node, by(clock, delCall));
  });

  test("a day back after a DEL that failed: the retry window begins anew, and ends", async () => {
    using node = makeNetworks();
    const clock = makeClock(node.dir);
    expect(await wire(node, by(clock, addCall))).toMatchObject(ok);
    writePlugins(node, { c: { DEL: busy } });
    const del = () => wire(node, by(clock, delCall));
    expect(wireError(await del()).code).toBe(118);
    clock.set(-24 * hour);
    expect(wireError(await del()).code).toBe(118);
    clock.set(-24 * hour + 9 * 60);
    expect(wireError(await del()).code).toBe(118);
    clock.set(-24 * hour + 11 * 60);
    expect((await del()).status).toBe(0);
    expect(left(node).rows).toEqual(["c1 eth1 leaked"]);
  });
});
