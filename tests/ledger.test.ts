/**
 * The audit ledger: what lib/ledger.ts keeps and prunes, and what the compiled program leaves in it
 * for every way a call can end.
 */
import { Database } from "bun:sqlite";
import { describe, expect, test } from "bun:test";
import { existsSync, statSync } from "node:fs";
import { join } from "node:path";
import type { Request } from "../lib/call.ts";
import { noteNumbers } from "../lib/choice/choose.ts";
import { CniError, code } from "../lib/cni.ts";
import { closeState, type State, write } from "../lib/database.ts";
import {
  configHash,
  insertLedger,
  noteNetwork,
  notePlugin,
  openJournal,
  withAudit,
  writeAlone,
  writeAside,
  writeJournal,
} from "../lib/ledger.ts";
import { processStarted } from "../lib/lock.ts";
import type { LedgerRow } from "../lib/record.ts";
import { attachments, noteInterrupted, pruneLedger, rowsMax } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { callOrder, calls, fakePlugin, makeHost, type Script } from "./fakes.ts";
import { addAttachment, ledgerRow } from "./record.ts";
import { lacks } from "./skip.ts";
import { fileDir } from "./stage.ts";
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
  writeTable,
} from "./wire.ts";

const dir = fileDir();
let folders = 0;

function withState<T>(fn: (state: State) => T): T {
  const state = openState(makeHost(), join(dir.path, `state-${folders++}`));
  try {
    return fn(state);
  } finally {
    closeState(state);
  }
}

const rowsOf = ({ database }: Pick<State, "database">): LedgerRow[] =>
  database
    .query(
      `SELECT at_ms AS atMs, kind, command, container_id AS containerId,
         pod_namespace AS podNamespace, pod_name AS podName, pod_uid AS podUid, network, plugin,
         ifname AS ifName, duration_us AS durationUs, outcome, code, error, addresses,
         config_hash AS configHash, decided_by AS decidedBy, rule, choice FROM ledger ORDER BY id`,
    )
    .all() as LedgerRow[];

const request: Request = {
  command: "ADD",
  containerId: "c1",
  netns: "",
  ifName: "eth0",
  args: "K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;K8S_POD_UID=u-1",
  path: [],
  cniVersion: "1.1.0",
  config: { name: "genie-net", type: "genie" },
};
const list = {
  cniVersion: "1.1.0" as const,
  name: "blue",
  disableCheck: false,
  disableGC: false,
  plugins: [{ type: "bridge", password: "s3cret" }, { type: "portmap" }],
};
const noted = {
  command: "ADD",
  containerId: "c1",
  network: "blue",
  ifName: "eth0",
  reason: "asked for by cni",
  pod: { namespace: "team", name: "web", uid: "u-1" },
  list,
  durationUs: 1234.6,
};

describe("rows", () => {
  test("come back as they were written", () => {
    const row = ledgerRow({ choice: '{"network":"blue"}', rule: "r", error: "e", code: 7 });
    withState((state) => {
      write(state, () => insertLedger(state, [row, ledgerRow()]));
      expect(rowsOf(state)).toEqual([row, ledgerRow()]);
    });
  });

  test("are bounded, whatever others call things", () => {
    const long = "x".repeat(100_000);
    const texts = ["containerId", "podNamespace", "podName", "podUid", "network", "plugin"];
    const more = ["ifName", "error", "addresses", "decidedBy", "rule", "choice"];
    const row = Object.fromEntries([...texts, ...more].map((key) => [key, long]));
    withState((state) => {
      write(state, () => insertLedger(state, [ledgerRow(row)]));
      const [found] = rowsOf(state);
      expect(JSON.stringify(found).length).toBeLessThan(16_000);
      // Half of its JSON would be none.
      expect(found?.choice).toBe("");
    });
  });

  test("of a journal: plugins, networks, then the call", () => {
    const host = makeHost();
    const journal = openJournal(host, request);
    notePlugin(journal, "bridge", noted);
    const error = new CniError(code.delegateTimeout, "too slow", { details: "s3cret" });
    notePlugin(journal, "portmap", { ...noted, error });
    noteNetwork(journal, { ...noted, error });
    noteNetwork(journal, { ...noted, network: "green" }, ["10.1.0.5/24", "fd00::5/64"]);
    noteNumbers(journal, { network: "blue", ranking: [], kpis: [], rejected: [] });
    withState((state) => {
      write(state, () => writeJournal(host, state, journal, error));
      const rows = rowsOf(state);
      const common = {
        atMs: host.now(),
        command: "ADD",
        containerId: "c1",
        podNamespace: "team",
        podName: "web",
        podUid: "u-1",
        ifName: "eth0",
        rule: "",
      };
      const ok = { outcome: "ok" as const, code: 0, error: "", addresses: "", choice: "" };
      const failed = { ...ok, outcome: "failed" as const, code: 103, error: "too slow" };
      const own = { configHash: configHash(list), decidedBy: "asked for by cni", durationUs: 1235 };
      const chain = { plugin: "bridge,portmap", kind: "network" as const };
      expect(rows).toEqual([
        { ...common, ...ok, ...own, kind: "plugin", network: "blue", plugin: "bridge" },
        { ...common, ...failed, ...own, kind: "plugin", network: "blue", plugin: "portmap" },
        {
          ...common,
          ...failed,
          ...own,
          ...chain,
          network: "blue",
          choice: '{"network":"blue","candidates":[],"rejected":[]}',
        },
        {
          ...{ ...common, ...ok, ...own, ...chain, network: "green" },
          addresses: "10.1.0.5/24,fd00::5/64",
        },
        {
          ...{ ...common, ...failed, kind: "call", network: "genie-net", plugin: "" },
          ...{ configHash: "", decidedBy: "", durationUs: expect.any(Number) },
        },
      ]);
      expect(JSON.stringify(rows)).not.toContain("s3cret");
    });
  });

  test.each<[string, CniError, object]>([
    [
      "by a rule",
      new CniError(code.accessDenied, "no", { rule: "plugins.blue.deny at /p.toml:3" }),
      { outcome: "denied", code: 100, rule: "plugins.blue.deny at /p.toml:3" },
    ],
    [
      "by a plugin whose own code is 100",
      new CniError(100, "address in use", { details: "by c2" }),
      { outcome: "failed", code: 100, rule: "" },
    ],
  ])("of what was refused %s", (_name, error, expected) => {
    const host = makeHost();
    const journal = openJournal(host, request);
    withState((state) => {
      writeAlone(host, state, journal, error);
      expect(rowsOf(state)).toMatchObject([{ kind: "call", ...expected }]);
    });
  });

  test("of an ADD that was killed are written by whoever finds it", () => {
    const host = makeHost();
    const journal = openJournal(host, { ...request, command: "DEL" });
    withState((state) => {
      addAttachment(state);
      const [attached] = attachments(host, state);
      if (!attached) throw new Error("there is no attachment");
      noteInterrupted(journal, attached);
      expect(journal.rows).toEqual([]);
      noteInterrupted(journal, { ...attached, state: "planned", createdAtMs: 77 });
    });
    expect(journal.rows).toMatchObject([
      { kind: "network", command: "ADD", atMs: 77, network: "blue", outcome: "failed", code: 11 },
    ]);
  });

  test("tell configs apart without showing them", () => {
    const [one, other] = [configHash(list), configHash({ ...list, name: "green" })];
    expect([one.length, one === other, configHash({ ...list })]).toEqual([16, false, one]);
    expect(one).toMatch(/^[0-9a-f]{16}$/);
  });
});

describe("a ledger that cannot be written", () => {
  const journal = openJournal(makeHost(), request);
  const insertEnded = "INSERT INTO ended VALUES ('c1', 'eth0', 'DEL', 1)";
  const ended = ({ database }: State) => database.query("SELECT * FROM ended").all().length;
  const refuse = (how: string) =>
    `CREATE TRIGGER no BEFORE INSERT ON ledger BEGIN SELECT RAISE(${how}, 'read-only'); END`;

  test.each([
    ["is gone", "DROP TABLE ledger"],
    ["lacks a column", "ALTER TABLE ledger DROP COLUMN rule"],
    ["is a view", "DROP TABLE ledger; CREATE VIEW ledger AS SELECT 1 AS id"],
    ["refuses", refuse("ABORT")],
    ["fails half-way", refuse("FAIL")],
  ])("because it %s takes nothing else with it", (_name, sql) => {
    const host = makeHost();
    withState((state) => {
      state.database.run(sql);
      write(state, () => {
        state.database.run(insertEnded);
        writeJournal(host, state, journal);
      });
      expect(ended(state)).toBe(1);
    });
    expect(host.written.stderr).toMatch(/^genie: warn: Cannot write the ledger: .+\n$/);
  });

  test("because it ends the whole transaction: the rest is written without it", () => {
    const host = makeHost();
    withState((state) => {
      state.database.run(refuse("ROLLBACK"));
      withAudit(host, (isAudited) =>
        write(state, () => {
          state.database.run(insertEnded);
          if (isAudited) writeJournal(host, state, journal);
        }),
      );
      expect([ended(state), rowsOf(state)]).toEqual([1, []]);
    });
    expect(host.written.stderr).toContain("Cannot write the ledger");
  });

  test("other failures are not its business", () => {
    const host = makeHost();
    const tries: boolean[] = [];
    const fail = () =>
      withAudit(host, (isAudited) => {
        tries.push(isAudited);
        throw new CniError(code.tryAgainLater, "vanished");
      });
    expect(fail).toThrow("vanished");
    expect([tries, host.written.stderr]).toEqual([[true], ""]);
  });

  test("writeAside() takes back its own writes alone", () => {
    const host = makeHost();
    withState((state) => {
      write(state, () => {
        state.database.run(insertEnded);
        writeAside(host, state, "traffic", () => {
          state.database.run("DELETE FROM ended");
          throw new Error("no");
        });
      });
      expect(ended(state)).toBe(1);
    });
    expect(host.written.stderr).toBe("genie: warn: Cannot write traffic: no\n");
  });

  test("is left alone where what is open is a copy", () => {
    withState((state) => {
      writeAlone(makeHost(), { ...state, copyDir: "/somewhere" }, journal);
      expect(rowsOf(state)).toEqual([]);
    });
  });
});

describe("pruneLedger()", () => {
  const day = 86_400_000;
  const nowMs = 1000 * day;
  const fill = (state: State, ages: number[]) =>
    write(state, () =>
      insertLedger(
        state,
        ages.map((days) => ledgerRow({ atMs: nowMs - days * day })),
      ),
    );
  const prune = (state: State, keepDays: number, max?: number) =>
    write(state, () => pruneLedger(state, nowMs, keepDays * day, max));
  const ages = (state: State) => rowsOf(state).map(({ atMs }) => (nowMs - atMs) / day);

  test("removes what is past its time, and nothing else", () => {
    withState((state) => {
      expect(prune(state, 30)).toBe(0);
      fill(state, [40, 31, 30, 29, 1, 0]);
      expect([prune(state, 30), ages(state), prune(state, 30)]).toEqual([2, [30, 29, 1, 0], 0]);
    });
  });

  test("is not held up by rows of a clock that was wrong", () => {
    withState((state) => {
      fill(state, [-9000, -9000, 40, 31, 1]);
      expect([prune(state, 30), ages(state)]).toEqual([2, [-9000, -9000, 1]]);
    });
  });

  test("takes a step of at most 512, oldest first", () => {
    withState((state) => {
      fill(
        state,
        Array.from({ length: 1200 }, (_, i) => 2000 - i),
      );
      expect([prune(state, 30), prune(state, 30), prune(state, 30)]).toEqual([512, 512, 176]);
    });
  });

  test("keeps no more than so many, however young", () => {
    withState((state) => {
      fill(state, [9, 8, 7, 6, 5]);
      expect([prune(state, 30, 3), ages(state), prune(state, 30, 3)]).toEqual([2, [7, 6, 5], 0]);
      expect(prune(state, 30, rowsMax)).toBe(0);
    });
  });

  test("keeps pace with the most that pods can add", () => {
    // 32 networks of four plugins: 161 rows of ADD, as many of DEL.
    withState((state) => {
      for (let pod = 0; pod < 20; pod++) {
        fill(state, Array(322).fill(1));
        prune(state, 30, 1000);
      }
      expect(rowsOf(state).length).toBeLessThanOrEqual(1000);
    });
  });

  test("does not read the whole table", () => {
    withState(({ database }) => {
      const plan = (sql: string) =>
        database
          .query(`EXPLAIN QUERY PLAN ${sql}`)
          .values()
          .map((row) => String(row.at(-1)));
      const all = [
        ...plan("SELECT id FROM ledger WHERE at_ms < ? ORDER BY at_ms LIMIT 512"),
        ...plan("SELECT (SELECT max(id) FROM ledger) - (SELECT min(id) FROM ledger)"),
        ...plan("SELECT id FROM ledger ORDER BY id LIMIT 9"),
      ];
      expect(all.filter((step) => /^SCAN (?!CONSTANT|ledger$)|TEMP B-TREE/.test(step))).toEqual([]);
      expect(all[0]).toBe("SEARCH ledger USING COVERING INDEX ledger_at (at_ms<?)");
    });
  });
});

/** Networks blue (plugins a, b) and green (plugin c). */
const listOf = (name: string, ...types: string[]) => ({
  cniVersion: "1.1.0",
  name,
  plugins: types.map((type) => ({ type, secret: "s3cret-of-config" })),
});

function makeNetworks(scripts: Record<string, Script> = {}, table = ""): Node {
  return makeNode({
    table: `${table}\n[plugins.blue]\n[plugins.green]\n`,
    lists: { "1.conflist": listOf("blue", "a", "b"), "2.conflist": listOf("green", "c") },
    delegates: {
      a: { reserve: "$DIR/reserved", ips: ["10.1.0.5/24"], ...scripts["a"] },
      b: { chain: "pass", ...scripts["b"] },
      c: { reserve: "$DIR/reserved", ips: ["10.2.0.7/24", "fd00::7/64"], ...scripts["c"] },
    },
  });
}

const args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;K8S_POD_UID=u-1";
const both = annotated({ cni: "blue,green" });
const call = (command: string, stdin: object = both, env: object = {}): WireCall => ({
  command,
  stdin,
  env: { CNI_ARGS: args, ...env },
});

/** The ledger of a node. */
function ledger(node: Node): LedgerRow[] {
  const file = join(node.state, "genie.db");
  if (!existsSync(file)) return [];
  const database = new Database(file);
  try {
    return rowsOf({ database });
  } finally {
    database.close();
  }
}

/** A row in short: `network ADD blue a,b ok 0 asked for by cni`. */
const short = (rows: LedgerRow[]): string[] =>
  rows.map((row) =>
    [row.kind, row.command, row.network, row.plugin, row.outcome, row.code, row.decidedBy]
      .filter((part) => part !== "")
      .join(" "),
  );
const sql = (node: Node, text: string) => {
  using database = new Database(join(node.state, "genie.db"));
  database.run(text);
};

describe("the compiled program", () => {
  test("tells of an ADD, a CHECK and a DEL: each plugin, each network, the call", async () => {
    using node = makeNetworks();
    const startMs = Date.now();
    const by = "asked for by cni";
    expect(await wire(node, call("ADD"))).toMatchObject({ status: 0, stderr: "" });
    const rows = ledger(node);
    expect(short(rows)).toEqual([
      `plugin ADD blue a ok 0 ${by}`,
      `plugin ADD blue b ok 0 ${by}`,
      `network ADD blue a,b ok 0 ${by}`,
      `plugin ADD green c ok 0 ${by}`,
      `network ADD green c ok 0 ${by}`,
      "call ADD genie-net ok 0 cni",
    ]);
    for (const row of rows) {
      const pod = { podNamespace: "team", podName: "web", podUid: "u-1", containerId: "c1" };
      expect(row).toMatchObject({ ...pod, error: "", rule: "", choice: "" });
      expect(row.atMs).toBeGreaterThanOrEqual(startMs);
      expect(row.atMs).toBeLessThanOrEqual(Date.now());
      expect(row.durationUs).toBeGreaterThan(1000);
      expect(row.configHash).toMatch(row.kind === "call" ? /^$/ : /^[0-9a-f]{16}$/);
    }
    expect(rows.map(({ addresses, ifName }) => [addresses, ifName])).toEqual([
      ["", "eth0"],
      ["", "eth0"],
      ["10.1.0.5/24", "eth0"],
      ["", "eth1"],
      ["10.2.0.7/24,fd00::7/64", "eth1"],
      ["", "eth0"],
    ]);
    const times = rows.map(({ durationUs }) => durationUs);
    const [first = 0, second = 0, chain = 0] = times;
    expect(chain).toBeGreaterThanOrEqual(first + second);
    expect(times.at(-1) ?? 0).toBeGreaterThanOrEqual(chain);

    expect(await wire(node, call("CHECK"))).toMatchObject({ status: 0 });
    const afterCheck = ledger(node).slice(rows.length);
    expect(short(afterCheck)).toEqual([
      `plugin CHECK blue a ok 0 ${by}`,
      `plugin CHECK blue b ok 0 ${by}`,
      `network CHECK blue a,b ok 0 ${by}`,
      `plugin CHECK green c ok 0 ${by}`,
      `network CHECK green c ok 0 ${by}`,
      "call CHECK genie-net ok 0",
    ]);
    // Without CNI_ARGS too it is known whose DEL it was.
    expect(await wire(node, call("DEL", {}, { CNI_ARGS: "" }))).toMatchObject({ status: 0 });
    const afterDel = ledger(node).slice(rows.length + afterCheck.length);
    expect(short(afterDel)).toEqual([
      `plugin DEL green c ok 0 ${by}`,
      `network DEL green c ok 0 ${by}`,
      `plugin DEL blue b ok 0 ${by}`,
      `plugin DEL blue a ok 0 ${by}`,
      `network DEL blue a,b ok 0 ${by}`,
      "call DEL genie-net ok 0",
    ]);
    expect(afterDel.at(-1)).toMatchObject({ podNamespace: "team", podName: "web", podUid: "u-1" });
    // Runtimes repeat DEL: those are no news.
    const { length } = ledger(node);
    for (const _ of [1, 2]) expect((await wire(node, call("DEL"))).status).toBe(0);
    expect(ledger(node)).toHaveLength(length);
    expect(JSON.stringify(ledger(node))).not.toContain("s3cret");
  });

  test("tells of a failed ADD, whose plugin has code 100, and of its undoing", async () => {
    using node = makeNetworks({ c: { ADD: { error: { code: 100, msg: "no address left" } } } });
    const error = wireError(await wire(node, call("ADD")));
    expect(error.code).toBe(100);
    const by = "asked for by cni";
    expect(short(ledger(node))).toEqual([
      `plugin ADD blue a ok 0 ${by}`,
      `plugin ADD blue b ok 0 ${by}`,
      `network ADD blue a,b ok 0 ${by}`,
      `plugin ADD green c failed 100 ${by}`,
      `network ADD green c failed 100 ${by}`,
      `plugin DEL green c ok 0 ${by}`,
      `network DEL green c ok 0 ${by}`,
      `plugin DEL blue b ok 0 ${by}`,
      `plugin DEL blue a ok 0 ${by}`,
      `network DEL blue a,b ok 0 ${by}`,
      "call ADD genie-net failed 100 cni",
    ]);
    const failed = ledger(node).filter(({ outcome }) => outcome !== "ok");
    expect(failed.map((row) => [row.error, row.rule])).toEqual(failed.map(() => [error.msg, ""]));
    expect(left(node)).toEqual(nothing);
  });

  test.each<[string, string, object, number, string[], object]>([
    [
      "a network the pod may not use, though nothing is attached",
      "",
      annotated({ cni: "blue,red" }),
      100,
      ["network ADD red c denied 100 asked for by cni", "call ADD genie-net denied 100"],
      { rule: expect.stringMatching(/^plugins\.red\.deny at .*plugins\.toml:\d+$/) },
    ],
    [
      "a network without a rule, where none is allowed",
      "[access]\ndefault = 'deny'",
      annotated({ cni: "blue" }),
      100,
      ["network ADD blue a,b denied 100 asked for by cni", "call ADD genie-net denied 100"],
      { rule: expect.stringMatching(/^access\.default at .*plugins\.toml:\d+$/) },
    ],
    [
      "every candidate of a choice",
      "select.candidates = ['red']",
      annotated({ cni: "" }),
      100,
      ["call ADD genie-net denied 100"],
      { rule: expect.stringContaining("plugins.red.deny at ") },
    ],
    [
      "an unknown network",
      "",
      annotated({ cni: "pink" }),
      101,
      ["call ADD genie-net failed 101"],
      { rule: "", error: expect.stringContaining("pink") },
    ],
    [
      "a malformed annotation",
      "",
      annotated({ cni: "a,,b" }),
      7,
      ["call ADD genie-net failed 7"],
      { rule: "" },
    ],
  ])("tells of %s", async (_name, top, stdin, number, rows, last) => {
    using node = makeNetworks();
    const denied = "conf = '2.conflist'\ndeny = { namespaces = ['team'] }";
    writeTable(node, `${top}\n[plugins.blue]\n[plugins.red]\n${denied}\n`);
    expect(wireError(await wire(node, call("ADD", stdin))).code).toBe(number);
    const found = ledger(node);
    expect(short(found)).toEqual(rows);
    for (const row of found) expect(row).toMatchObject(last);
    expect(callOrder(node.bin)).toEqual([]);
  });

  test.each<[string, (node: Node) => WireCall, number]>([
    [
      "a plugin table that is wrong",
      (node) => {
        writeTable(node, "[default]\nnetwork = 1\n");
        return call("ADD");
      },
      7,
    ],
    ["a network namespace that is none", () => call("ADD", both, { CNI_NETNS: "/nowhere" }), 4],
    ["a CHECK of nobody", () => call("CHECK"), 3],
  ])("tells of %s", async (_name, prepare, number) => {
    using node = makeNetworks();
    const prepared = prepare(node);
    expect(wireError(await wire(node, prepared)).code).toBe(number);
    expect(short(ledger(node))).toEqual([`call ${prepared.command} genie-net failed ${number}`]);
  });

  test("tells of a DEL that fails, of the retry, and of what was given up", async () => {
    using node = makeNetworks({ c: { DEL: { error: { code: 118, msg: "busy" } } } });
    await wire(node, call("ADD"));
    const { length } = ledger(node);
    expect(wireError(await wire(node, call("DEL"))).code).toBe(118);
    const rows = ledger(node).slice(length);
    // Tried again once the other network is gone.
    expect(short(rows).filter((row) => row.includes("failed"))).toEqual([
      "plugin DEL green c failed 118 asked for by cni",
      "network DEL green c failed 118 asked for by cni",
      "plugin DEL green c failed 118 asked for by cni",
      "network DEL green c failed 118 asked for by cni",
      "call DEL genie-net failed 118",
    ]);
    sql(node, "UPDATE attachments SET failed_at_ms = 1");
    expect((await wire(node, call("DEL"))).status).toBe(0);
    const parked = ledger(node).slice(length + rows.length);
    // The runtime was told of a success, whatever became of the plugin.
    expect(short(parked)).toEqual([
      "plugin DEL green c failed 118 asked for by cni",
      "network DEL green c failed 118 asked for by cni",
      "call DEL genie-net ok 0",
    ]);
  });

  test("tells of GC: what it deleted, and what the networks collected", async () => {
    using node = makeNetworks();
    await wire(node, call("ADD"));
    const { length } = ledger(node);
    const valid = { "cni.dev/valid-attachments": [] };
    const gc = { CNI_CONTAINERID: undefined, CNI_IFNAME: undefined, CNI_NETNS: undefined };
    expect(await wire(node, call("GC", valid, { ...gc, CNI_ARGS: undefined }))).toMatchObject({
      status: 0,
    });
    expect(short(ledger(node).slice(length))).toEqual([
      "plugin DEL green c ok 0 asked for by cni",
      "network DEL green c ok 0 asked for by cni",
      "plugin DEL blue b ok 0 asked for by cni",
      "plugin DEL blue a ok 0 asked for by cni",
      "network DEL blue a,b ok 0 asked for by cni",
      "plugin GC blue a ok 0",
      "plugin GC blue b ok 0",
      "network GC blue a,b ok 0",
      "plugin GC green c ok 0",
      "network GC green c ok 0",
      "call GC genie-net ok 0",
    ]);
    expect(left(node)).toEqual(nothing);
  });

  test("tells of a DEL that it can only guess", async () => {
    using node = makeNetworks();
    expect((await wire(node, call("DEL"))).status).toBe(0);
    expect(short(ledger(node)).at(-1)).toBe("call DEL genie-net ok 0");
    expect(callOrder(node.bin)).toHaveLength(3);
    expect(ledger(node).filter(({ kind }) => kind === "plugin")).toHaveLength(3);
  });

  test.each<[string, string]>([
    ["is gone", "DROP TABLE ledger"],
    ["and what counts traffic are gone", "DROP TABLE ledger; DROP TABLE traffic"],
    [
      "refuses every row",
      `CREATE TRIGGER no BEFORE INSERT ON ledger BEGIN SELECT RAISE(ABORT, 'read-only'); END;
       CREATE TRIGGER never BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'read-only'); END`,
    ],
    [
      "ends the whole transaction",
      "CREATE TRIGGER no BEFORE INSERT ON ledger BEGIN SELECT RAISE(ROLLBACK, 'read-only'); END",
    ],
  ])("fails no ADD, CHECK, DEL or GC because the ledger %s", async (_name, text) => {
    using node = makeNetworks();
    await wire(node, call("ADD", both, { CNI_CONTAINERID: "c0" }));
    sql(node, text);
    for (const stdin of [both, annotated({ cni: "" })]) {
      for (const command of ["ADD", "CHECK", "DEL"]) {
        const run = await wire(node, call(command, stdin));
        expect([command, run]).toMatchObject([command, { status: 0 }]);
        expect(run.stderr).toContain("genie: warn: Cannot write the ledger: ");
      }
    }
    expect(left(node).rows).toEqual(["c0 eth0 attached", "c0 eth1 attached"]);
    const gc = await wire(node, call("GC", { "cni.dev/valid-attachments": [] }));
    expect(gc.status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test("says why an ADD failed, not that the ledger did", async () => {
    using node = makeNetworks({ a: { ADD: { error: { code: 42, msg: "no" } } } });
    await wire(node, call("DEL"));
    sql(node, "DROP TABLE ledger");
    expect(wireError(await wire(node, call("ADD"))).code).toBe(42);
  });

  test("prunes on DEL and GC, never on ADD", async () => {
    using node = makeNetworks({}, "[audit]\nkeep = '1h'");
    await wire(node, call("ADD"));
    sql(node, "UPDATE ledger SET at_ms = 1, network = 'old'");
    const old = () => ledger(node).filter(({ network }) => network === "old").length;
    await wire(node, call("ADD", both, { CNI_CONTAINERID: "c2" }));
    expect(old()).toBe(6);
    await wire(node, call("DEL"));
    expect(old()).toBe(0);
    // Where every ADD fails, a DEL has nothing to do but that.
    sql(node, "UPDATE ledger SET at_ms = 1, network = 'old'");
    await wire(node, call("DEL"));
    expect(old()).toBe(0);
    await wire(node, call("ADD"));
    sql(node, "UPDATE ledger SET at_ms = 1, network = 'old'");
    const valid = ["c1", "c2"].map((containerID) => ({ containerID, ifname: "eth0" }));
    expect((await wire(node, call("GC", { "cni.dev/valid-attachments": valid }))).status).toBe(0);
    expect(old()).toBe(0);
  });

  test("keeps its file as large as it is, however many come and go", async () => {
    using node = makeNetworks({}, "[audit]\nkeep = '1h'");
    await wire(node, call("ADD"));
    await wire(node, call("DEL"));
    const file = join(node.state, "genie.db");
    const size = () => {
      using database = new Database(file);
      database.run("PRAGMA wal_checkpoint(TRUNCATE)");
      return statSync(file).size;
    };
    const busy = () => {
      const state = openState(makeHost(), node.state);
      write(state, () => insertLedger(state, Array(400).fill(ledgerRow({ atMs: 1 }))));
      closeState(state);
    };
    busy();
    const before = size();
    for (let i = 0; i < 8; i++) {
      await wire(node, call("DEL"));
      busy();
    }
    expect(size()).toBeLessThanOrEqual(before * 1.1);
  });
});

describe.skipIf(lacks("the binary"))("genie killed with SIGKILL", () => {
  const spawn = (node: Node, one: WireCall) =>
    Bun.spawn([compiledGenie()], {
      env: wireEnv(node, one),
      cwd: "/",
      stdin: wireStdin(node, one),
      stdout: "ignore",
      stderr: "ignore",
    });
  async function until(holds: () => boolean): Promise<void> {
    while (!holds()) await Bun.sleep(5);
  }

  test("at any moment: rows of calls that ended are whole, and stay", async () => {
    using node = makeNetworks();
    for (let i = 0; i < 12; i++) {
      const ids = [`k${i}a`, `k${i}b`];
      const children = ids.map((id) => spawn(node, call("ADD", both, { CNI_CONTAINERID: id })));
      // A moment of its own each time: by what the plugins have heard so far.
      const heard = calls(node.bin).length + (i % 6);
      await until(() => calls(node.bin).length >= heard || children.every((one) => one.killed));
      for (const child of children) child.kill("SIGKILL");
      await Promise.all(children.map((child) => child.exited));
    }
    for (const pid of calls(node.bin).map((one) => one.pid)) {
      await until(() => processStarted(pid) === "");
    }
    const rows = ledger(node);
    const byCall = Map.groupBy(rows, ({ containerId }) => containerId);
    for (const [id, own] of byCall) {
      expect([id, short(own).at(-1), own.length]).toEqual([id, "call ADD genie-net ok 0 cni", 6]);
    }
    const attached = left(node).rows.filter((row) => row.endsWith("eth0 attached"));
    expect([...byCall.keys()].sort()).toEqual(
      attached.map((row) => row.split(" ")[0] ?? "").sort(),
    );
    using database = new Database(join(node.state, "genie.db"));
    expect(database.query("PRAGMA integrity_check").values()).toEqual([["ok"]]);
  });

  test("in an ADD: the DEL that finds it tells of it", async () => {
    using node = makeNetworks({ c: { ADD: { hang: true } } });
    const child = spawn(node, call("ADD"));
    await until(() => callOrder(node.bin).includes("c ADD c1 eth1"));
    child.kill("SIGKILL");
    await child.exited;
    expect(ledger(node)).toEqual([]);
    fakePlugin(node.bin, "c", { reserve: node.reserved });
    expect((await wire(node, call("DEL"))).status).toBe(0);
    expect(short(ledger(node))).toEqual([
      "network ADD blue a,b failed 11 asked for by cni",
      "network ADD green c failed 11 asked for by cni",
      "plugin DEL green c ok 0 asked for by cni",
      "network DEL green c ok 0 asked for by cni",
      "plugin DEL blue b ok 0 asked for by cni",
      "plugin DEL blue a ok 0 asked for by cni",
      "network DEL blue a,b ok 0 asked for by cni",
      "call DEL genie-net ok 0",
    ]);
    expect(left(node)).toEqual(nothing);
  });
});
