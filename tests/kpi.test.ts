/**
 * What is measured of a network: lib/choice/kpi.ts, ipam.ts and traffic.ts, on real files and
 * links.
 */

import type { Database } from "bun:sqlite";
import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, rmSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { keepStore, rangesOf } from "../lib/choice/ipam.ts";
import { networkKpis, occupancyWith, sampleOldest } from "../lib/choice/kpi.ts";
import type { PluginEntry } from "../lib/config/schema.ts";
import { closeState, type State, write } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import type { Network } from "../lib/networks.ts";
import type { TrafficSource } from "../lib/record.ts";
import { forgetTraffic } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { sampleTraffic } from "../lib/recovery/traffic_rate.ts";
import { traffic } from "../lib/report/record_reader.ts";
import { startTraffic, trafficSources } from "../lib/write_ahead.ts";
import { makeHost, tempDir, withNetns } from "./fakes.ts";
import { addAttachment, ledgerRow } from "./record.ts";
import { lacks } from "./skip.ts";

const dir = tempDir();
afterAll(() => dir[Symbol.dispose]());
const nowMs = 1_800_000_000_000;
let folders = 0;

/** A record of its own, with what `fill` puts in. */
function withRecord<T>(fill: (state: State) => void, fn: (state: State) => T): T {
  const state = openState(makeHost(), join(dir.path, `state-${folders++}`));
  try {
    write(state, () => fill(state));
    return fn(state);
  } finally {
    closeState(state);
  }
}

/** Network blue with this IPAM. */
function network(ipam: object | undefined, entry: Partial<PluginEntry> = {}): Network {
  return {
    name: "blue",
    source: "/etc/cni/net.d/10-blue.conflist",
    list: {
      cniVersion: "1.0.0",
      name: "blue-list",
      disableCheck: false,
      disableGC: false,
      plugins: [{ type: "bridge", ...(ipam && { ipam }) }, { type: "portmap" }],
    },
    entry: { name: "blue", line: 1, ...entry },
  };
}

/** A store of host-local with these files. */
function store(files: string[]): string {
  const dataDir = join(dir.path, `data-${folders++}`);
  mkdirSync(join(dataDir, "blue-list"), { recursive: true });
  const all = ["lock", "last_reserved_ip.0", "last_reserved_ip.1", ...files];
  for (const name of all) writeFileSync(join(dataDir, "blue-list", name), "c1");
  return dataDir;
}

const hostLocal = (files: string[], more: object) => ({
  type: "host-local",
  dataDir: store(files),
  ...more,
});
const numbers = (first: string, count: number, from = 2) =>
  Array.from({ length: count }, (_, i) => `${first}${from + i}`);

/** Used and total per family, and the share, in short. */
function short(one: Network, state?: State) {
  const { ipv4, ipv6, occupancy, subnets } = networkKpis(state, one, nowMs);
  const { value: share } = occupancy;
  return {
    v4: [ipv4.used.value, ipv4.total.value],
    v6: [ipv6.used.value, ipv6.total.value],
    share: share === undefined ? undefined : Math.round(share * 1e4) / 1e4,
    subnets: subnets.value,
  };
}

describe("occupancy of host-local", () => {
  const v6 = 2 ** 64 - 2;
  test.each<[string, () => object, ReturnType<typeof short>]>([
    [
      "one subnet",
      () => hostLocal(numbers("10.1.0.", 5), { subnet: "10.1.0.0/24" }),
      { v4: [5, 253], v6: [0, undefined], share: 0.0198, subnets: 1 },
    ],
    [
      "both families apart, the fuller one decides",
      () =>
        hostLocal([...numbers("10.1.0.", 5), ...numbers("fd00::", 9)], {
          ranges: [[{ subnet: "10.1.0.0/28" }], [{ subnet: "fd00::/64" }]],
        }),
      { v4: [5, 13], v6: [9, v6], share: 0.3846, subnets: 2 },
    ],
    [
      "several ranges of one set, with bounds and gateways of their own",
      () =>
        hostLocal(["10.1.0.20", "10.2.0.9"], {
          ranges: [
            [
              { subnet: "10.1.0.0/24", rangeStart: "10.1.0.20", rangeEnd: "10.1.0.29" },
              { subnet: "10.2.0.0/24", rangeStart: "10.2.0.1", rangeEnd: "10.2.0.10" },
              { subnet: "10.3.0.0/29", gateway: "10.3.0.6" },
            ],
          ],
        }),
      { v4: [2, 10 + 9 + 5], v6: [0, undefined], share: 0.0833, subnets: 3 },
    ],
    [
      "a subnet beside ranges",
      () => hostLocal([], { subnet: "10.1.0.0/29", ranges: [[{ subnet: "10.2.0.0/29" }]] }),
      { v4: [0, 10], v6: [0, undefined], share: 0, subnets: 2 },
    ],
    [
      "two ranges of one subnet",
      () =>
        hostLocal([], {
          ranges: [
            [
              { subnet: "10.1.0.0/24", rangeStart: "10.1.0.10", rangeEnd: "10.1.0.19" },
              { subnet: "10.1.0.0/24", rangeStart: "10.1.0.30", rangeEnd: "10.1.0.39" },
            ],
          ],
        }),
      { v4: [0, 20], v6: [0, undefined], share: 0, subnets: 1 },
    ],
    [
      "a store that is not there yet",
      () => ({ type: "host-local", dataDir: "/nowhere/at/all", subnet: "10.1.0.0/24" }),
      { v4: [0, 253], v6: [0, undefined], share: 0, subnets: 1 },
    ],
    [
      "a full one",
      () => hostLocal(numbers("10.1.0.", 5), { subnet: "10.1.0.0/29" }),
      { v4: [5, 5], v6: [0, undefined], share: 1, subnets: 1 },
    ],
    [
      "one that only what was left by another config would fill",
      () =>
        hostLocal([...numbers("10.9.0.", 200), "10.1.0.3", "fd09::1"], { subnet: "10.1.0.0/29" }),
      { v4: [1, 5], v6: [0, undefined], share: 0.2, subnets: 1 },
    ],
    [
      "names that are no addresses",
      () => hostLocal(["10", "x.1", "1.tmp", "10.1.0.3"], { subnet: "10.1.0.0/24" }),
      { v4: [2, 253], v6: [0, undefined], share: 0.0079, subnets: 1 },
    ],
    [
      "no range that could be read",
      () => hostLocal(["10.1.0.3"], { subnet: "ten" }),
      {
        v4: [undefined, undefined],
        v6: [undefined, undefined],
        share: undefined,
        subnets: undefined,
      },
    ],
  ])("%s", (_name, ipam, expected) => {
    expect(short(network(ipam()))).toEqual(expected);
  });

  test("in its default folder", () => {
    // Nothing of this name is there, whatever machine this is.
    const one = network({ type: "host-local", subnet: "10.1.0.0/24" });
    one.list.name = `absent-${crypto.randomUUID()}`;
    expect(short(one).v4).toEqual([0, 253]);
  });

  test("a store that cannot be read is no store: the record counts", () => {
    const dataDir = store([]);
    rmSync(join(dataDir, "blue-list"), { recursive: true });
    writeFileSync(join(dataDir, "blue-list"), "a file");
    const one = network({ type: "host-local", dataDir, subnet: "10.1.0.0/24" });
    expect(short(one).v4).toEqual([undefined, 253]);
    withRecord(addAttachment, (state) => expect(short(one, state).v4).toEqual([1, 253]));
  });

  test("is counted anew when the store has changed, and not before", () => {
    const dataDir = store(numbers("10.1.0.", 5));
    const one = network({ type: "host-local", dataDir, subnet: "10.1.0.0/24" });
    const folder = join(dataDir, "blue-list");
    // The folder's clock is set, so that nothing here depends on how long it takes.
    const changedMs = nowMs - 7_200_000;
    utimesSync(folder, changedMs / 1000, changedMs / 1000);
    const later = changedMs + 3_600_000;
    withRecord(
      () => undefined,
      (state) => {
        const measure = (at: number) => networkKpis(state, one, at);
        const keep = (at: number) => {
          const { store: read } = measure(at);
          if (!read) throw new Error("it was not read");
          write(state, () => keepStore(state, read));
          return read.stamp;
        };
        // Its clock may stand still while it changes once more.
        const stamps = [-101, -100, 100, 101].map((ms) => measure(changedMs + ms).store?.stamp);
        expect(stamps.map((stamp) => stamp === "")).toEqual([false, true, true, false]);
        expect([keep(changedMs), keep(later) === ""]).toEqual(["", false]);
        expect([measure(later).store, measure(later).ipv4.used.value]).toEqual([undefined, 5]);
        // What is kept is believed: nobody looked.
        state.database.run("UPDATE stores SET ipv4 = 77");
        expect(measure(later + 60_000).ipv4.used.value).toBe(77);
        for (const [name, at] of [
          ["10.1.0.200", 10_000],
          ["fd00::1", 20_000],
        ] as const) {
          writeFileSync(join(folder, name), "c1");
          utimesSync(folder, at, at);
          expect(measure(later + at).ipv4.used.value).toBe(6);
          keep(later + at);
        }
        rmSync(join(folder, "10.1.0.2"));
        utimesSync(folder, 30_000, 30_000);
        // For a second nobody looks again.
        const times = [20_999, 21_000];
        expect(times.map((ms) => measure(later + ms).ipv4.used.value)).toEqual([6, 5]);
        expect(state.database.query("SELECT count(*) FROM stores").values()).toEqual([[1]]);
      },
    );
  });

  test("says where it has its numbers from", () => {
    const one = network(hostLocal(["10.1.0.3"], { subnet: "10.1.0.0/24" }));
    expect(networkKpis(undefined, one, nowMs)).toMatchObject({
      network: "blue",
      ipv4: {
        used: { value: 1, source: "host-local's store", ageMs: 0 },
        total: { value: 253, source: "ranges in its config", ageMs: 0 },
      },
      occupancy: { source: "host-local's store, ranges in its config", ageMs: 0 },
    });
  });
});

describe("occupancy of other networks", () => {
  const two = (state: State) => {
    for (const containerId of ["c1", "c2"]) addAttachment(state, { containerId });
    addAttachment(state, { containerId: "c3", network: "green" });
    const stuck = { state: "leaked" as const, error: "x", atMs: 1 };
    addAttachment(state, { containerId: "c4", stuck });
  };

  test.each<[string, object | undefined, Partial<PluginEntry>, ReturnType<typeof short>]>([
    [
      "static: unknown",
      { type: "static", addresses: [{ address: "10.1.0.5/24" }] },
      {},
      { v4: [2, undefined], v6: [2, undefined], share: undefined, subnets: undefined },
    ],
    [
      "dhcp: unknown",
      { type: "dhcp" },
      {},
      { v4: [2, undefined], v6: [2, undefined], share: undefined, subnets: undefined },
    ],
    [
      "no IPAM: unknown",
      undefined,
      {},
      { v4: [2, undefined], v6: [2, undefined], share: undefined, subnets: undefined },
    ],
    [
      "an IPAM that cannot be read, by its capacity",
      { type: "calico-ipam" },
      { capacity: 8 },
      { v4: [2, 8], v6: [2, undefined], share: 0.25, subnets: undefined },
    ],
    [
      "whereabouts",
      { type: "whereabouts", range: "10.1.0.0/28" },
      {},
      { v4: [2, 13], v6: [2, undefined], share: 0.1538, subnets: 1 },
    ],
    [
      "whereabouts with bounds in the range",
      { type: "whereabouts", range: "10.1.0.5-10.1.0.9/16" },
      {},
      { v4: [2, 5], v6: [2, undefined], share: 0.4, subnets: 1 },
    ],
    [
      "whereabouts with bounds beside it, and what it leaves out",
      {
        type: "whereabouts",
        range: "10.1.0.0/16",
        range_start: "10.1.0.10",
        range_end: "10.1.0.29",
        exclude: ["10.1.0.12/30", "10.1.0.20", "nonsense", 7, "fd00::/120"],
      },
      {},
      { v4: [2, 15], v6: [2, undefined], share: 0.1333, subnets: 1 },
    ],
    [
      "whereabouts of both families",
      { type: "whereabouts", ipRanges: [{ range: "10.1.0.0/28" }, { range: "fd00::/120" }] },
      {},
      { v4: [2, 13], v6: [2, 254], share: 0.1538, subnets: 2 },
    ],
    [
      "more attachments than addresses",
      { type: "calico-ipam" },
      { capacity: 1 },
      { v4: [2, 1], v6: [2, undefined], share: 1, subnets: undefined },
    ],
  ])("%s", (_name, ipam, entry, expected) => {
    withRecord(two, (state) => expect(short(network(ipam, entry), state)).toEqual(expected));
  });

  test("capacity goes before what a config says", () => {
    const one = network(hostLocal(["10.1.0.3"], { subnet: "10.1.0.0/24" }), { capacity: 10 });
    expect(short(one).v4).toEqual([1, 10]);
  });

  test("without a record nothing is known of it", () => {
    const one = network({ type: "calico-ipam" }, { capacity: 8 });
    const kpis = networkKpis(undefined, one, nowMs);
    expect(kpis.attachments).toEqual({ value: undefined, source: "no record", ageMs: 0 });
    expect(kpis.occupancy.value).toBeUndefined();
  });

  test("attachments are counted where a choice needs them, else for whoever asks", () => {
    withRecord(two, (state) => {
      const count = (ipam: object | undefined, entry = {}) =>
        networkKpis(state, network(ipam, entry), nowMs, { isBrief: true }).attachments.value;
      expect([
        count({ type: "x" }),
        count({ type: "x" }, { capacity: 8 }),
        count({ type: "whereabouts", range: "10.1.0.0/28" }),
        count(hostLocal([], { subnet: "10.1.0.0/28" })),
      ]).toEqual([undefined, 2, 2, undefined]);
    });
  });

  test("pods on their way fill it further", () => {
    withRecord(two, (state) => {
      const kpis = networkKpis(state, network({ type: "x" }, { capacity: 8 }), nowMs);
      expect([0, 2, 6, 60].map((more) => occupancyWith(kpis, more))).toEqual([0.25, 0.5, 1, 1]);
      expect(occupancyWith(networkKpis(state, network({}), nowMs), 5)).toBeUndefined();
    });
  });
});

test.each<[string, unknown, number[]]>([
  ["a prefix that is too long", { subnet: "10.0.0.0/33" }, []],
  ["no prefix", { subnet: "10.0.0.0" }, []],
  ["a single address", { subnet: "10.0.0.0/32" }, []],
  ["two addresses", { subnet: "10.0.0.0/31" }, []],
  ["an address in the middle", { subnet: "10.0.0.77/24" }, [253]],
  ["everything", { subnet: "0.0.0.0/0" }, [2 ** 32 - 3]],
  ["a single IPv6 range", { subnet: "fd00::/126" }, [2]],
  ["an IPv6 address with IPv4 in it", { subnet: "::ffff:10.0.0.0/120" }, [254]],
  [
    "bounds the wrong way round",
    { subnet: "10.0.0.0/24", rangeStart: "10.0.0.9", rangeEnd: "10.0.0.1" },
    [],
  ],
  ["bounds that are no addresses", { subnet: "10.0.0.0/24", rangeStart: 7, rangeEnd: "x" }, [253]],
  ["lists in lists that are none", { ranges: [[null, 1, "x", []], {}, "y"] }, []],
  ["ranges that are no list", { ranges: { a: 1 }, ipRanges: "x" }, []],
  ["a number", 7, []],
  ["a list", [], []],
])("rangesOf() %s", (_name, ipam, sizes) => {
  const { list } = network(undefined);
  const found = rangesOf({ ...list, plugins: [{ type: "bridge", ipam }] });
  expect(found.map(({ size }) => size)).toEqual(sizes);
});

describe("recent ADDs", () => {
  const add = (more: Parameters<typeof ledgerRow>[0] = {}) => ledgerRow({ atMs: nowMs, ...more });
  const measure = (rows: ReturnType<typeof ledgerRow>[]) =>
    withRecord(
      (state) => insertLedger(state, rows),
      (state) => {
        const { medianUs, p95Us, failures } = networkKpis(state, network(undefined), nowMs);
        return [medianUs.value, p95Us.value, failures.value];
      },
    );

  test("give median, 95th percentile and failure rate", () => {
    const rows = Array.from({ length: 20 }, (_, i) => add({ durationUs: (i + 1) * 1000 }));
    expect(measure(rows)).toEqual([10_000, 19_000, 0]);
    expect(measure([add({ durationUs: 7 })])).toEqual([7, 7, 0]);
    expect(measure([])).toEqual([undefined, undefined, undefined]);
  });

  test("that failed are no response times", () => {
    const failed = add({ outcome: "failed", durationUs: 90_000_000 });
    expect(measure([add(), add(), add(), failed])).toEqual([12_000, 12_000, 0.25]);
    expect(measure([failed, failed])).toEqual([undefined, undefined, 1]);
  });

  test.each<[string, Parameters<typeof ledgerRow>[0]]>([
    ["of another network", { network: "green" }],
    ["that are no ADDs", { command: "DEL" }],
    ["of single plugins", { kind: "plugin" }],
    ["of the whole call", { kind: "call" }],
    ["that a rule denied", { outcome: "denied" }],
    ["of an hour ago", { atMs: nowMs - 3_600_000 }],
  ])("%s do not count", (_name, more) => {
    const failed = add({ outcome: "failed", ...more });
    expect(measure([failed, add(), failed])).toEqual([12_000, 12_000, 0]);
  });

  test("are the newest, and their age is told", () => {
    const old = Array.from({ length: 40 }, () => add({ outcome: "failed" }));
    const young = Array.from({ length: 32 }, (_, i) => add({ atMs: nowMs - 5000 + i }));
    expect(measure([...old, ...young])).toEqual([12_000, 12_000, 0]);
    withRecord(
      (state) => insertLedger(state, [...old, ...young]),
      (state) =>
        expect(networkKpis(state, network(undefined), nowMs).failures).toEqual({
          value: 0,
          source: "last 32 ADDs",
          ageMs: 4969,
        }),
    );
  });

  test("are found without reading a table, however long it is, and so is all the rest", () => {
    withRecord(
      (state) => addAttachment(state),
      (state) => {
        const { database } = state;
        const asked: string[] = [];
        const query = (sql: string) => {
          asked.push(sql);
          return database.query(sql);
        };
        const watched = { ...state, database: { query } as unknown as Database };
        networkKpis(watched, network(hostLocal([], { subnet: "10.1.0.0/24" })), nowMs);
        networkKpis(watched, network({ type: "x" }, { capacity: 8 }), nowMs);
        sampleOldest(watched, nowMs);
        forgetTraffic(watched, "c1");
        const steps = asked.flatMap((sql) =>
          database
            .query(`EXPLAIN QUERY PLAN ${sql}`)
            .values()
            .map((row) => String(row.at(-1))),
        );
        // What is read in whole is what was asked for, or the few rows found already.
        const scans = steps.filter((step) => /^SCAN|TEMP B-TREE/.test(step));
        expect(scans.filter((step) => !/^SCAN (json_each|\(subquery)/.test(step))).toEqual([]);
        expect(steps).toContain("SEARCH ledger USING COVERING INDEX ledger_network (network=?)");
        expect(steps).toContain(
          "SEARCH traffic USING COVERING INDEX traffic_network (network=? AND at_ms>?)",
        );
        expect(steps).toContain("SEARCH traffic USING INDEX traffic_at (at_ms<?)");
      },
    );
  });
});

describe("traffic", () => {
  const source = (hostIfName: string, containerId = "c1"): TrafficSource => ({
    containerId,
    ifName: "eth0",
    network: "blue",
    hostIfName,
  });
  const bandwidth = (state: State, at = nowMs) =>
    networkKpis(state, network(undefined), at).bandwidth;
  const rows = ({ database }: State) =>
    database.query("SELECT container_id FROM traffic ORDER BY 1").values().flat();
  /** As if the interface had been counted before. */
  const counted = (state: State, containerId: string, atMs: number, rate: number | null) =>
    state.database
      .query("INSERT INTO traffic VALUES (?, 'eth0', 'blue', 'lo', ?, 0, ?)")
      .run(containerId, atMs, rate);

  test("is unknown until it was counted twice, and then its own age tells", () => {
    withRecord(
      () => undefined,
      (state) => {
        const sample = (at: number) => write(state, () => sampleTraffic(state, [source("lo")], at));
        expect(bandwidth(state).value).toBeUndefined();
        sample(nowMs - 9000);
        expect(bandwidth(state).value).toBeUndefined();
        sample(nowMs - 4000);
        expect(bandwidth(state)).toMatchObject({
          value: expect.any(Number),
          source: "1 of 1 host-side interfaces",
          ageMs: 4000,
        });
        // Ten minutes later it says nothing of now.
        expect(bandwidth(state, nowMs + 600_000).value).toBeUndefined();
      },
    );
  });

  test("is not nothing in a report either, as long as it is unknown", () => {
    withRecord(
      (state) => counted(state, "c1", nowMs, null),
      ({ database }) => {
        const tables = new Set(["traffic"]);
        expect(traffic({ database, tables })).toEqual(new Map());
        database.run("UPDATE traffic SET bytes_per_second = 5");
        expect(traffic({ database, tables })).toEqual(new Map([["blue", 5]]));
      },
    );
  });

  test("of some stands for all of a network", () => {
    withRecord(
      (state) => {
        counted(state, "c1", nowMs - 1000, 100);
        counted(state, "c2", nowMs - 2000, 300);
        counted(state, "c3", nowMs - 3000, null);
        counted(state, "c4", nowMs - 900_000, 5e9);
        for (const id of ["c1", "c2", "c3", "c4"]) addAttachment(state, { containerId: id });
      },
      (state) =>
        expect(bandwidth(state)).toEqual({
          value: 800,
          source: "2 of 4 host-side interfaces",
          ageMs: 2000,
        }),
    );
  });

  test.each([
    ["an interface that is gone is forgotten", "genie-absent"],
    ["a name that leads elsewhere is none", "../../../proc"],
    ["no name is none", ""],
    ["a dot is none", "."],
    ["a name too long is none", "x".repeat(5000)],
  ])("%s", (_name, hostIfName) => {
    withRecord(
      (state) => counted(state, "c1", nowMs - 5000, 7),
      (state) => {
        write(state, () => sampleTraffic(state, [source(hostIfName)], nowMs));
        expect(rows(state)).toEqual([]);
      },
    );
    // An ADD begins anew: no count of an earlier attempt stays.
    withRecord(
      (state) => counted(state, "c1", nowMs - 5000, 7),
      (state) => {
        write(state, () => startTraffic(state, [source(hostIfName)], nowMs));
        expect(rows(state)).toEqual([]);
      },
    );
  });

  test.each<[string, number, number]>([
    ["a counter that went back", nowMs - 1000, 2 ** 52],
    ["a clock that went back", nowMs + 1000, 0],
    ["a clock that stands still", nowMs, 0],
  ])("of %s is unknown, not negative", (_name, atMs, bytes) => {
    withRecord(
      (state) =>
        state.database
          .query("INSERT INTO traffic VALUES ('c1', 'eth0', 'blue', 'lo', ?, ?, 5)")
          .run(atMs, bytes),
      (state) => {
        write(state, () => sampleTraffic(state, [source("lo")], nowMs));
        expect(bandwidth(state).value).toBeUndefined();
      },
    );
  });

  test("is counted where that was longest ago; the dead do not stand in the way", () => {
    withRecord(
      (state) => {
        for (let i = 0; i < 40; i++) counted(state, `c${i}`, nowMs - 60_000 + i, 1);
        state.database.run("UPDATE traffic SET host_ifname = 'genie-gone' WHERE at_ms % 2 = 0");
        counted(state, "young", nowMs - 1000, 1);
      },
      (state) => {
        const waiting = () =>
          state.database.query("SELECT count(*) FROM traffic WHERE at_ms < ?").values(nowMs - 5000);
        for (const left of [38, 36, 34]) {
          write(state, () => sampleOldest(state, nowMs));
          expect(waiting()).toEqual([[left]]);
        }
        // One of each two was gone.
        expect(rows(state)).toHaveLength(41 - 3);
      },
    );
  });

  test("of attachments that are not on record any more is forgotten", () => {
    withRecord(
      (state) => {
        addAttachment(state, { containerId: "c1" });
        for (const id of ["c1", "c2"]) counted(state, id, nowMs, 1);
      },
      (state) => {
        for (const id of ["c1", "c2", "c3"]) write(state, () => forgetTraffic(state, id));
        expect(rows(state)).toEqual(["c1"]);
      },
    );
  });

  test("is that of the first host-side interface that is no bridge", () => {
    const made = (interfaces: { name: string; sandbox?: string }[]) =>
      trafficSources([
        {
          attachment: { containerId: "c1", ifName: "eth0", network: "blue" },
          result: { interfaces },
        },
      ]).map(({ hostIfName }) => hostIfName);
    const inPod = { name: "eth0", sandbox: "/run/netns/x" };
    expect(made([{ name: "veth1" }, inPod, { name: "ifb1" }])).toEqual(["veth1"]);
    expect([made([inPod]), made([])]).toEqual([[], []]);
  });

  test.skipIf(lacks("network namespaces"))("of a real veth is what a pod sent", async () => {
    const ip = (...args: string[]) => {
      const { exitCode, stderr } = Bun.spawnSync(["ip", ...args]);
      if (exitCode !== 0) throw new Error(`ip ${args.join(" ")}: ${stderr}`);
    };
    const id = crypto.randomUUID().slice(0, 8);
    const [veth, bridge] = [`gk-${id}`, `gb-${id}`];
    await withNetns(async (netns) => {
      ip("link", "add", bridge, "type", "bridge");
      try {
        ip("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", netns.name);
        ip("link", "set", veth, "up");
        netns.ip("link", "set", "eth0", "up");
        const attachment = { containerId: "c1", ifName: "eth0", network: "blue" };
        const interfaces = [{ name: bridge }, { name: veth }];
        const sources = trafficSources([{ attachment, result: { interfaces } }]);
        expect(sources).toEqual([{ ...attachment, hostIfName: veth }]);
        withRecord(
          () => undefined,
          (state) => {
            const sample = (at: number) => write(state, () => sampleTraffic(state, sources, at));
            sample(nowMs - 10_000);
            const before = state.database.query("SELECT bytes FROM traffic").values()[0]?.[0];
            // One neighbour of link scope, to which a datagram goes without anybody's answer.
            netns.ip("addr", "add", "198.19.255.1/30", "dev", "eth0");
            const to = ["198.19.255.2", "lladdr", "02:00:00:00:00:02", "dev", "eth0"];
            netns.ip("neigh", "replace", ...to);
            const send = `const s = require("node:dgram").createSocket("udp4");
              let left = 50;
              const next = () => left-- > 0
                ? s.send(Buffer.alloc(1400), 9, "198.19.255.2", next) : s.close();
              next();`;
            const sent = Bun.spawnSync([
              ...["ip", "netns", "exec", netns.name, process.execPath, "-e", send],
            ]);
            expect([sent.exitCode, sent.stderr.toString()]).toEqual([0, ""]);
            sample(nowMs);
            const rate = bandwidth(state).value ?? 0;
            const after = state.database.query("SELECT bytes FROM traffic").values()[0]?.[0];
            expect(Number(after) - Number(before)).toBeGreaterThanOrEqual(50 * 1428);
            expect(rate).toBe((Number(after) - Number(before)) / 10);
          },
        );
      } finally {
        ip("link", "del", bridge);
      }
    });
  });
});
