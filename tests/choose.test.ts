/**
 * The automatic choice: lib/choice/choose.ts and lib/policy/access.ts, with fake plugins and a real
 * record.
 */
import { beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { PlanCall, Request } from "../lib/call.ts";
import { type Choice, chooseNetwork, formatChoice } from "../lib/choice/choose.ts";
import { CniError } from "../lib/cni.ts";
import { parseConfig } from "../lib/config/parse.ts";
import { closeState, type State, write } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import type { Pod } from "../lib/pod.ts";
import { openState } from "../lib/recovery/database.ts";
import { calls, type FakeHost, fakePlugin, forgetCalls, makeHost } from "./fakes.ts";
import { addAttachment, ledgerRow } from "./record.ts";
import { configList, fileDir } from "./stage.ts";

const dir = fileDir();
const confDir = join(dir.path, "net.d");
const bin = join(dir.path, "bin");
const nowMs = 1_700_000_000_000;
let folders = 0;

const list = (name: string, type: string, more: object = {}) =>
  configList(name, [{ type, ...more }], "1.0.0");

beforeAll(() => {
  for (const path of [confDir, bin]) mkdirSync(path);
  fakePlugin(bin, "bridge");
  fakePlugin(bin, "ill", { STATUS: { error: { code: 50, msg: "no route to its peers" } } });
  fakePlugin(bin, "well");
  // Answers once six of it are running: in turns it never would.
  const began = join(dir.path, "began");
  const six = `until [ $(wc -l <${began}) -ge 6 ]; do sleep 0.02; done`;
  fakePlugin(bin, "slow", `#!/bin/sh\ncat >/dev/null\necho >>${began}\n${six}\n`);
  const lists: [string, object][] = [
    ["10-blue", list("blue", "bridge")],
    ["20-green", list("green", "bridge")],
    ["30-red", list("red", "absent")],
    ["40-self", list("self", "genie")],
    ["80-other", list("other", "bridge")],
    ["90-small", list("small", "bridge")],
    ["50-ill", { ...list("ill", "ill"), cniVersion: "1.1.0" }],
    ["60-well", { ...list("well", "well"), cniVersion: "1.1.0" }],
  ];
  for (const [file, text] of lists) {
    writeFileSync(join(confDir, `${file}.conflist`), JSON.stringify(text));
  }
  writeFileSync(join(confDir, "70-broken.conflist"), "{");
});

const pod: Pod = {
  namespace: "team",
  name: "web",
  uid: "u-1",
  annotations: new Map(),
  serviceAccount: undefined,
  source: "runtime",
};

/** Chooses for a pod; `table` comes after the folders. */
function choose(
  table: string,
  more: Partial<PlanCall> = {},
  host: FakeHost = makeHost({ now: nowMs }),
  containerId = "c1",
): Promise<Choice> {
  const head = `conf_dir = "${confDir}"\nbin_dirs = ["${bin}"]\n`;
  const config = parseConfig(`${head}[kubernetes]\nkubeconfig = "/nowhere"\n${table}`, "/p.toml");
  const kubeless = { ...config.kubernetes, kubeconfigIsExplicit: false };
  const own = { ...config, kubernetes: kubeless };
  const request: Request = {
    command: "ADD",
    containerId,
    netns: "",
    ifName: "eth0",
    args: "",
    path: [],
    cniVersion: "1.1.0",
    config: { name: "genie", type: "genie" },
  };
  return chooseNetwork({ host, config: own, request, ...more }, pod);
}

const asErrors = (failed: ReadonlyMap<string, string>) =>
  new Map([...failed].map(([network, message]) => [network, new CniError(11, message)]));

const among = (...names: string[]) => `[select]\ncandidates = ${JSON.stringify(names)}\n`;
const at = (ms: number) => makeHost({ now: nowMs + ms });

/** A record of its own. */
async function withRecord<T>(fn: (state: State) => Promise<T>): Promise<T> {
  const state = openState(makeHost(), join(dir.path, `state-${folders++}`));
  try {
    return await fn(state);
  } finally {
    closeState(state);
  }
}

async function failure(act: () => Promise<unknown>): Promise<CniError> {
  try {
    await act();
  } catch (error) {
    if (error instanceof CniError) return error;
    throw error;
  }
  throw new Error("It did not fail");
}

const order = ({ ranking }: Choice) => ranking.map(({ candidate: { network } }) => network);

describe("chooseNetwork()", () => {
  test("takes the best by KPIs, ties by the order of the table", async () => {
    expect(order(await choose("[plugins.green]\n[plugins.blue]"))).toEqual(["green", "blue"]);
    expect(order(await choose(among("blue", "green", "blue")))).toEqual(["blue", "green"]);
    await withRecord(async (state) => {
      const add = (network: string, durationUs: number, outcome: "ok" | "failed" = "ok") =>
        ledgerRow({ atMs: nowMs - 1000, network, durationUs, outcome });
      const rows = [add("blue", 20_000), add("green", 10_000), add("well", 1000, "failed")];
      write(state, () => insertLedger(state, rows));
      const choice = await choose(among("blue", "green", "well"), { state });
      expect([choice.network, order(choice)]).toEqual(["green", ["green", "blue", "well"]]);
    });
  });

  test("knows a candidate by all its names", async () => {
    const { network, kpis } = await choose(among("10-blue", "blue", "20-green"));
    expect([network, kpis.map((one) => one.network)]).toEqual(["blue", ["blue", "green"]]);
  });

  test("says why a candidate is out of the question, and goes on without it", async () => {
    const choice = await choose(
      `${among("blue", "green", "red", "self", "ill", "pink", "broken", "closed", "full")}
       [plugins.closed]
       conf = "80-other.conflist"
       deny = { namespaces = ["team"] }
       [plugins.full]
       conf = "90-small.conflist"
       capacity = 1`,
      { failed: new Map([["green", new CniError(11, "plugin bridge timed out")]]) },
    );
    // Without a record nobody knows that it is full.
    expect([choice.network, order(choice)]).toEqual(["blue", ["blue", "full"]]);
    const says = (part: string) => expect.stringContaining(part);
    const rejected = choice.rejected.map(({ network, reason, code }) => [network, code, reason]);
    expect(rejected).toEqual([
      ["green", 11, "it failed to attach: plugin bridge timed out"],
      ["red", 102, says('plugin "absent" is in none of')],
      ["self", 7, says("is genie itself")],
      ["ill", 11, says("it is not ready: Cannot use network")],
      ["pink", 101, says('Unknown network "pink"')],
      ["broken", 6, says("70-broken.conflist: it is not valid JSON")],
      ["closed", 100, says('plugins.closed.deny.namespaces "team" names it')],
    ]);
  });

  test("passes over what is full, by store or by record", async () => {
    const dataDir = join(dir.path, "ipam");
    mkdirSync(join(dataDir, "stored"), { recursive: true });
    for (let i = 2; i < 7; i++) writeFileSync(join(dataDir, "stored", `10.1.0.${i}`), "");
    const ipam = `{ type = "host-local", dataDir = "${dataDir}", subnet = "10.1.0.0/29" }`;
    const table = `[plugins.stored.config]
      cniVersion = "1.0.0"
      plugins = [{ type = "bridge", ipam = ${ipam} }]
      [plugins.blue]
      capacity = 1
      [plugins.green]`;
    await withRecord(async (state) => {
      write(state, () => addAttachment(state, { containerId: "c9", network: "blue" }));
      const choice = await choose(table, { state });
      expect([choice.network, choice.rejected.map((one) => one.reason)]).toEqual([
        "green",
        [
          "it is full (host-local's store, ranges in its config)",
          "it is full (attachments on record, capacity in the plugin table)",
        ],
      ]);
      // Its KPIs are told all the same.
      expect(choice.kpis.map(({ network }) => network)).toEqual(["stored", "blue", "green"]);
    });
  });

  test("counts pods that are on their way as if they had their address", async () => {
    const table = "[plugins.blue]\ncapacity = 2\n[plugins.green]\ncapacity = 2";
    await withRecord(async (state) => {
      const taken: string[] = [];
      for (const id of ["c1", "c2", "c3", "c4"]) {
        taken.push((await choose(table, { state }, at(0), id)).network);
      }
      expect(taken).toEqual(["blue", "green", "blue", "green"]);
    });
  });

  const deny = "deny = { namespaces = ['team'] }";
  test.each<[string, string, ReadonlyMap<string, string>, number, string]>([
    [
      "100 where the pod may use none",
      `[plugins.blue]\n${deny}\n[plugins.green]\n${deny}`,
      new Map(),
      100,
      'Access to every network that could be chosen is denied: blue: Access to network "blue"',
    ],
    [
      "101 where none is known",
      among("pink"),
      new Map(),
      101,
      "Cannot choose a network: pink: Unkn",
    ],
    [
      "101 where none is configured",
      "select.candidates = []",
      new Map(),
      101,
      "neither the plugin",
    ],
    ["7 where it would be genie itself", among("self", "pink"), new Map(), 7, "is genie itself"],
    ["102 where its binary is missing", among("red"), new Map(), 102, "plugin"],
    [
      "the first wrong one's where the others are denied",
      `${among("blue", "red")}[plugins.blue]\n${deny}`,
      new Map(),
      102,
      "Cannot choose a network: blue: Access",
    ],
    [
      "11 where another try may find one",
      `${among("red", "blue", "ill")}[plugins.blue]\n${deny}`,
      new Map(),
      11,
      "ill: it is not ready",
    ],
    [
      "11 where all have failed",
      among("blue"),
      new Map([["blue", "no address"]]),
      11,
      "blue: it failed to attach: no address",
    ],
  ])("fails with %s", async (_name, table, failed, number, part) => {
    const head = table.startsWith("select") ? `[select]\n${table.slice(7)}` : table;
    const error = await failure(() => choose(head, { failed: asErrors(failed) }));
    expect([error.code, error.message]).toEqual([number, expect.stringContaining(part)]);
    // Only a denial by a rule is one in the ledger.
    expect(error.rule !== "").toBe(number === 100);
  });

  test("needs a service account only where a rule asks for one, and closes there", async () => {
    const rule = "allow = { service_accounts = ['team/db'] }";
    const error = await failure(() => choose(`[plugins.blue]\n${rule}`));
    expect([error.code, error.rule]).toEqual([100, "plugins.blue.allow at /p.toml:6"]);
    expect((await choose(`[plugins.blue]\n${rule}\n[plugins.green]`)).network).toBe("green");
  });

  test("a list on disk is under the rules of the entry that has it", async () => {
    const table = `${among("blue", "green")}[plugins.alias]\nconf = "10-blue.conflist"\n${deny}`;
    const choice = await choose(table);
    expect([choice.network, choice.rejected[0]?.code]).toEqual(["green", 100]);
  });
});

describe("STATUS", () => {
  const asked = () => calls(bin).map(({ plugin, command }) => `${plugin} ${command}`);
  const both = among("ill", "well", "blue");

  test("is asked of plugins that know it, and believed for seconds", async () => {
    await withRecord(async (state) => {
      forgetCalls(bin);
      expect((await choose(both, { state })).network).toBe("well");
      expect(asked().sort()).toEqual(["ill STATUS", "well STATUS"]);
      for (const ms of [1, 1000, 4999]) {
        const again = await choose(both, { state }, at(ms), `c${ms}`);
        expect(again.rejected).toMatchObject([
          { network: "ill", reason: expect.stringContaining("no route") },
        ]);
      }
      expect(asked()).toHaveLength(2);
      await choose(both, { state }, at(5001), "c8");
      expect(asked()).toHaveLength(4);
      // Of a clock that was put back nothing is believed.
      await choose(both, { state }, at(-60_000), "c9");
      expect(asked()).toHaveLength(6);
    });
  });

  test("is asked anew when the config changed", async () => {
    const table = (mtu: number) => `[plugins.inline.config]
      cniVersion = "1.1.0"
      plugins = [{ type = "well", mtu = ${mtu} }]`;
    await withRecord(async (state) => {
      forgetCalls(bin);
      await choose(table(1400), { state });
      await choose(table(1400), { state }, at(1), "c2");
      await choose(table(1500), { state }, at(2), "c3");
      expect(asked()).toEqual(["well STATUS", "well STATUS"]);
    });
  });

  test("is asked of all candidates side by side", async () => {
    const names = Array.from({ length: 6 }, (_, i) => `slow${i}`);
    const table = names
      .map((name) => `[plugins.${name}.config]\ncniVersion="1.1.0"\nplugins=[{type="slow"}]\n`)
      .join("");
    expect(order(await choose(table))).toEqual(names);
    expect(readFileSync(join(dir.path, "began"), "utf8")).toBe("\n".repeat(6));
  });

  test("of a plan is asked, and leaves nothing behind", async () => {
    await withRecord(async (state) => {
      forgetCalls(bin);
      const reader: PlanCall["reader"] = (inside) => inside(state);
      expect((await choose(both, { reader })).network).toBe("well");
      expect(asked().sort()).toEqual(["ill STATUS", "well STATUS"]);
      for (const table of ["health", "choices", "ledger", "traffic"]) {
        expect([table, state.database.query(`SELECT * FROM ${table}`).all()]).toEqual([table, []]);
      }
    });
  });
});

describe("choices", () => {
  const two = "[plugins.blue]\n[plugins.green]";
  const rows = ({ database }: State) =>
    database.query("SELECT container_id, network, at_ms FROM choices ORDER BY 1").values();
  const put = (state: State, id: string, network: string, ms: number) =>
    state.database.query("INSERT INTO choices VALUES (?, ?, ?)").run(id, network, nowMs + ms);

  test("are written down, so that the next one goes elsewhere", async () => {
    await withRecord(async (state) => {
      const networks: string[] = [];
      for (let i = 0; i < 6; i++) {
        networks.push((await choose(two, { state }, at(i), `c${i}`)).network);
      }
      expect(networks).toEqual(["blue", "green", "blue", "green", "blue", "green"]);
      expect(rows(state)).toHaveLength(6);
    });
  });

  test("of the pod itself do not count: its second ADD finds the same", async () => {
    await withRecord(async (state) => {
      for (const ms of [0, 1, 2])
        expect((await choose(two, { state }, at(ms))).network).toBe("blue");
      expect(rows(state)).toEqual([["c1", "blue", nowMs + 2]]);
    });
  });

  test("are forgotten after seconds, and so are those of a clock that was put back", async () => {
    await withRecord(async (state) => {
      put(state, "old", "blue", -10_000);
      put(state, "future", "blue", 3_600_000);
      put(state, "young", "green", -9999);
      const { network, ranking } = await choose(two, { state });
      expect([network, ranking.map(({ candidate: { recent } }) => recent)]).toEqual([
        "blue",
        [0, 1],
      ]);
      expect(rows(state).map(([id]) => id)).toEqual(["c1", "young"]);
    });
  });

  test.each(["choices", "health", "ledger", "traffic", "attachments"])(
    "are made without the record when its table %s is gone",
    async (table) => {
      await withRecord(async (state) => {
        state.database.run(`DROP TABLE ${table}`);
        const host = at(0);
        const choice = await choose(among("blue", "well"), { state }, host);
        expect(["blue", "well"]).toContain(choice.network);
        expect(host.written.stderr).toMatch(
          /^genie: warn: Choosing without the record: Cannot use .*\n$/,
        );
      });
    },
  );

  test("are made where there is no record", async () => {
    const host = at(0);
    const choice = await choose(two, { reader: () => undefined }, host);
    expect([choice.network, host.written.stderr]).toEqual(["blue", ""]);
  });
});

describe("formatChoice()", () => {
  const figures = {
    occupancy: 1 / 3,
    response_time: 1,
    failures: undefined,
    bandwidth: 0.5,
    subnets: 1,
  };
  const ranked = (network: string) => ({
    candidate: {
      network,
      occupancy: 1 / 3,
      responseTimeUs: 12_345.678,
      failures: undefined,
      bandwidth: 2 / 3,
      subnets: 1,
      recent: 2,
    },
    score: 5.000049,
    figures,
  });
  const rejected = (network: string, reason: string) => ({ network, reason, code: 11, rule: "" });

  test("keeps the numbers that decided, in short", () => {
    const text = formatChoice({
      network: "a",
      ranking: [ranked("a")],
      kpis: [],
      rejected: [rejected("b", "it is full")],
    });
    expect(JSON.parse(text)).toEqual({
      network: "a",
      candidates: [
        {
          ...{ network: "a", occupancy: 0.3333, responseTimeUs: 12_345.678, bandwidth: 0.6667 },
          ...{ subnets: 1, recent: 2, score: 5 },
          figures: { occupancy: 0.3333, response_time: 1, bandwidth: 0.5, subnets: 1 },
        },
      ],
      rejected: [{ network: "b", reason: "it is full" }],
    });
  });

  test.each(["plain", '"\\'.repeat(200), "\u{1f525}".repeat(200)])("fits its column", (reason) => {
    const names = Array.from({ length: 500 }, (_, i) => `${"n".repeat(60)}${i}`);
    const text = formatChoice({
      network: names[0] ?? "",
      ranking: names.map(ranked),
      kpis: [],
      rejected: names.map((name) => rejected(name, reason)),
    });
    expect(text.length).toBeLessThanOrEqual(8000);
    const { network, candidates } = JSON.parse(text);
    expect([network, candidates[0].network]).toEqual([names[0], names[0]]);
  });
});
