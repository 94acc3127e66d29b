/**
 * Automatic choice through the compiled program: what a pod gets that asks for nothing, what
 * happens when that fails, how a herd spreads, and how `genie plan` explains it
 * (`lib/cli/plan_command.ts`).
 */
import { Database } from "bun:sqlite";
import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { closeState, write } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import type { LedgerRow } from "../lib/record.ts";
import { openState } from "../lib/recovery/database.ts";
import { startApiServer } from "./apiserver.ts";
import {
  callOrder,
  calls,
  fakePlugin,
  type GenieRun,
  makeHost,
  type Script,
  tempDir,
} from "./fakes.ts";
import { hostLocal, noTraces, realNeeds, withNode } from "./fixtures/quirks/node.ts";
import { ledgerRow } from "./record.ts";
import { reasonToSkip } from "./skip.ts";
import {
  annotated,
  compiledGenie,
  left,
  makeNode,
  type Node,
  nothing,
  spawnGenie,
  type WireCall,
  wire,
  wireEnv,
  wireError,
} from "./wire.ts";

const skipReason = reasonToSkip(...realNeeds);

const listOf = (name: string, cniVersion = "1.0.0") => ({
  cniVersion,
  name,
  plugins: [{ type: name }],
});
const names = ["a", "b", "c"];

/** Networks a, b and c, each of the plugin of its name. */
function makeNetworks(scripts: Record<string, Script> = {}, top = "", table = ""): Node {
  return makeNode({
    table: `${top}\n[plugins.a]\n[plugins.b]\n[plugins.c]\n${table}`,
    lists: Object.fromEntries(names.map((name) => [`${name}.conflist`, listOf(name)])),
    delegates: Object.fromEntries(
      names.map((name) => [name, { reserve: "$DIR/reserved", ...scripts[name] }]),
    ),
  });
}

const add = (containerId = "c1", annotations: Record<string, string> = {}): WireCall => ({
  command: "ADD",
  stdin: annotated(annotations),
  env: { CNI_CONTAINERID: containerId },
});
const fails = (code: number, msg = "broken"): Script => ({ ADD: { error: { code, msg } } });

/** The ledger of a node. */
function ledger(node: Node): LedgerRow[] {
  using database = new Database(join(node.state, "genie.db"));
  return database.query("SELECT * FROM ledger ORDER BY id").all() as LedgerRow[];
}

/** Rows in short: `network ADD a failed 42`. */
const short = (rows: LedgerRow[]): string[] =>
  rows.map((row) => [row.kind, row.command, row.network, row.outcome, row.code].join(" "));
const numbersOf = ({ choice }: LedgerRow) => (choice === "" ? undefined : JSON.parse(choice));

/** As if networks had been used before. */
function remember(node: Node, rows: Partial<LedgerRow>[]): void {
  const state = openState(makeHost(), node.state);
  write(state, () =>
    insertLedger(
      state,
      rows.map((row) => ledgerRow({ atMs: Date.now() - 1000, ...row })),
    ),
  );
  closeState(state);
}

describe("a pod that leaves the choice to us", () => {
  test.each<[string, Record<string, string>]>([
    ["by an empty annotation", { cni: "" }],
    ["by none, where there is no default", {}],
  ])("%s has the best network", async (_name, annotations) => {
    using node = makeNetworks();
    remember(node, [
      { network: "a", durationUs: 30_000 },
      { network: "b", durationUs: 10_000 },
      { network: "c", durationUs: 10_000, outcome: "failed" },
    ]);
    expect(await wire(node, add("c1", annotations))).toMatchObject({ status: 0, stderr: "" });
    expect(callOrder(node.bin)).toEqual(["b ADD c1 eth0"]);
    const [, row, call] = ledger(node).slice(-3);
    if (!row || !call) throw new Error("there are no rows");
    expect(numbersOf(row)).toMatchObject({
      network: "b",
      candidates: [
        { network: "b", responseTimeUs: 10_000, failures: 0, recent: 0 },
        { network: "a", responseTimeUs: 30_000, figures: { response_time: 0.5774 } },
        { network: "c", failures: 1 },
      ],
      rejected: [],
    });
    expect([short([row, call]), call.choice]).toEqual([
      ["network ADD b ok 0", "call ADD genie-net ok 0"],
      "",
    ]);
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test("has the default where there is one, unless it asks", async () => {
    using node = makeNetworks({}, "[default]\nnetworks = ['c']");
    await wire(node, add("c1"));
    await wire(node, add("c2", { cni: "" }));
    expect(callOrder(node.bin)).toEqual(["c ADD c1 eth0", "a ADD c2 eth0"]);
  });

  test("has what every pod gets besides, once", async () => {
    using node = makeNetworks({}, "[default]\nalways = ['a', 'c']");
    await wire(node, add());
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth0", "c ADD c1 net1"]);
  });

  test("has the next best when the chosen one fails: both are told of, one is left", async () => {
    using node = makeNetworks({ a: fails(42, "no carrier") });
    const run = await wire(node, add());
    expect(run).toMatchObject({ status: 0 });
    expect(run.stderr).toMatch(/^genie: warn: Chosen network failed, trying the next best .*\n$/);
    expect(callOrder(node.bin)).toEqual(["a ADD c1 eth0", "a DEL c1 eth0", "b ADD c1 eth0"]);
    expect(left(node)).toEqual({ rows: ["c1 eth0 attached"], reserved: ["c1-eth0"] });
    const rows = ledger(node);
    expect(short(rows)).toEqual([
      "plugin ADD a failed 42",
      "network ADD a failed 42",
      "plugin DEL a ok 0",
      "network DEL a ok 0",
      "plugin ADD b ok 0",
      "network ADD b ok 0",
      "call ADD genie-net ok 0",
    ]);
    const choices = rows.flatMap((row) => numbersOf(row) ?? []);
    expect(choices).toMatchObject([
      { network: "a", rejected: [] },
      {
        network: "b",
        rejected: [{ network: "a", reason: expect.stringContaining("no carrier") }],
      },
    ]);
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test("is told of the last failure when as many as allowed failed", async () => {
    using node = makeNetworks({ a: fails(42, "no carrier"), b: fails(43, "no address") });
    const error = wireError(await wire(node, add()));
    expect([error.code, error.msg]).toEqual([43, expect.stringContaining("no address")]);
    expect(error.details).toMatch(/^Another try: Cannot attach network "a".*no carrier$/);
    // c was never tried: two attempts are the default.
    expect([callOrder(node.bin).length, calls(node.bin, "c"), left(node)]).toEqual([
      4,
      [],
      nothing,
    ]);
    expect(short(ledger(node)).at(-1)).toBe("call ADD genie-net failed 43");
    expect(short(ledger(node)).filter((row) => row.startsWith("call"))).toHaveLength(1);
  });

  test.each<[string, string, string[], number]>([
    ["once", "[select]\nattempts = 1", ["a ADD c1 eth0", "a DEL c1 eth0"], 42],
    [
      "three times",
      "[select]\nattempts = 3",
      ["a ADD c1 eth0", "a DEL c1 eth0", "b ADD c1 eth0", "b DEL c1 eth0", "c ADD c1 eth0"],
      0,
    ],
    [
      "as often as there are candidates, with the failure of the first",
      "[select]\nattempts = 8\ncandidates = ['a']",
      ["a ADD c1 eth0", "a DEL c1 eth0"],
      42,
    ],
  ])("is tried %s", async (_name, top, order, number) => {
    using node = makeNetworks({ a: fails(42), b: fails(43) }, top);
    const run = await wire(node, add());
    expect(run.status === 0 ? 0 : wireError(run).code).toBe(number);
    expect(callOrder(node.bin)).toEqual(order);
  });

  test("fails as a whole when another network of it fails", async () => {
    using node = makeNetworks({ c: fails(44) }, "[default]\nalways = ['c']");
    expect(wireError(await wire(node, add())).code).toBe(44);
    expect(callOrder(node.bin)).toEqual([
      "a ADD c1 eth0",
      "c ADD c1 net1",
      "c DEL c1 net1",
      "a DEL c1 eth0",
    ]);
    expect(left(node)).toEqual(nothing);
  });

  test("is not tried again when what failed cannot be undone", async () => {
    const stuck = { ...fails(42), DEL: { error: { code: 118, msg: "busy" } } };
    using node = makeNetworks({ a: stuck });
    const error = wireError(await wire(node, add()));
    expect([error.code, left(node).rows]).toEqual([42, ["c1 eth0 failing"]]);
    expect(error.details).toContain("Cannot undo an earlier attempt");
    expect(calls(node.bin, "b")).toEqual([]);
    fakePlugin(node.bin, "a", { reserve: node.reserved });
    expect((await wire(node, { command: "DEL" })).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });

  test("is refused when it may use none, with the rule", async () => {
    using node = makeNetworks({}, "[access]\ndefault = 'deny'");
    expect(wireError(await wire(node, add())).code).toBe(100);
    expect([callOrder(node.bin), left(node)]).toEqual([[], nothing]);
  });

  test("does not go where STATUS says no; the question is asked once in seconds", async () => {
    using node = makeNetworks({ a: { STATUS: { error: { code: 50, msg: "not yet" } } } });
    for (const name of names) {
      writeFileSync(join(node.conf, `${name}.conflist`), JSON.stringify(listOf(name, "1.1.0")));
    }
    const begun = Date.now();
    for (const id of ["c1", "c2", "c3"]) {
      expect((await wire(node, add(id))).status).toBe(0);
    }
    const tookMs = Date.now() - begun;
    const asked = calls(node.bin).filter(({ command }) => command === "STATUS");
    // A machine that stood still for that long may ask again.
    if (tookMs < 5000) expect(asked).toHaveLength(3);
    expect(calls(node.bin, "a").map(({ command }) => command)).not.toContain("ADD");
  });

  test("makes STATUS good as long as one network is", async () => {
    const no: Script = { STATUS: { error: { code: 50, msg: "not yet" } } };
    using node = makeNetworks({ a: no, c: no });
    for (const name of names) {
      writeFileSync(join(node.conf, `${name}.conflist`), JSON.stringify(listOf(name, "1.1.0")));
    }
    const env = { CNI_CONTAINERID: undefined, CNI_IFNAME: undefined, CNI_NETNS: undefined };
    expect(await wire(node, { command: "STATUS", env })).toMatchObject({ status: 0, stdout: "" });
    fakePlugin(node.bin, "b", no);
    expect(wireError(await wire(node, { command: "STATUS", env })).code).toBe(50);
  });

  test("writes its choice back to the pod, for it alone", async () => {
    using dir = tempDir();
    const api = await startApiServer(dir.path, { keepAlive: false });
    try {
      const kubeconfig = api.kubeconfig("tokenFile");
      using node = makeNetworks({}, "", `[kubernetes]\nkubeconfig = "${kubeconfig}"\n`);
      const path = (name: string) => `/api/v1/namespaces/team/pods/${name}`;
      const annotationsOf = (name: string) =>
        (api.object(path(name)) as { metadata: { annotations: object } }).metadata.annotations;
      const pods: [string, Record<string, string>, string][] = [
        ["asks", { cni: "" }, "a"],
        ["silent", {}, "b"],
        ["knows", { cni: "c" }, "c"],
      ];
      for (const [name, annotations, expected] of pods) {
        const metadata = { name, namespace: "team", uid: `u-${name}`, annotations };
        api.put(path(name), { metadata, spec: {} });
        const env = {
          CNI_CONTAINERID: name,
          CNI_ARGS: `K8S_POD_NAMESPACE=team;K8S_POD_NAME=${name};K8S_POD_UID=u-${name}`,
        };
        expect(await wire(node, { command: "ADD", env })).toMatchObject({ status: 0, stderr: "" });
        expect(annotationsOf(name)).toMatchObject({ cni: expected });
      }
      // A sandbox made anew has the network that the pod had: it says so itself by now.
      const again = {
        CNI_CONTAINERID: "again",
        CNI_ARGS: "K8S_POD_NAMESPACE=team;K8S_POD_NAME=asks",
      };
      await wire(node, { command: "ADD", env: again });
      expect(callOrder(node.bin).at(-1)).toBe("a ADD again eth0");
    } finally {
      await api.stop();
    }
  });
});

describe("a herd of 100 pods at once on two equal networks", () => {
  const count = 100;
  /** At most 40:60. */
  const expectSpread = (share: Record<string, number>) => {
    const all = Object.values(share);
    expect([share, all.reduce((sum, one) => sum + one, 0)]).toEqual([share, count]);
    expect([share, Math.min(...all) >= 40 && all.length === 2]).toEqual([share, true]);
  };

  test("spreads, with fake plugins", async () => {
    using node = makeNetworks({}, "[select]\ncandidates = ['a', 'b']");
    // A whole plugin in two lines: a hundred Buns at once measure this machine, not the herd.
    for (const name of ["a", "b"]) {
      const result = '{"cniVersion":"1.0.0","ips":[{"address":"10.1.0.2/24"}]}';
      fakePlugin(node.bin, name, `#!/bin/sh\ncat > /dev/null\necho '${result}'\n`);
    }
    const runs = await Promise.all(
      Array.from({ length: count }, (_, i) => wire(node, add(`pod-${i}`))),
    );
    expect(runs.filter(({ status }) => status !== 0)).toEqual([]);
    expectSpread(shareOf(node.state));
  });

  test.skipIf(skipReason !== undefined)("spreads, with bridge and host-local", async () => {
    await withNode(async (node) => {
      for (const [i, name] of ["blue", "green"].entries()) {
        node.network(name, {
          cniVersion: "1.0.0",
          plugins: [
            { type: "bridge", bridge: `up-${name}`, ipam: hostLocal(node, [`10.${i + 1}.0.0/24`]) },
          ],
        });
      }
      const pods = Array.from({ length: count }, () => node.pod());
      const results = await Promise.all(pods.map((pod) => pod.call("ADD")));
      expect(results.filter(({ status }) => status !== 0)).toEqual([]);
      expectSpread(shareOf(join(node.dir, "state")));
      const addresses = readdirSync(join(node.data, "blue")).filter((name) => /^\d/.test(name));
      expect(addresses.length).toBe(shareOf(join(node.dir, "state"))["blue"] ?? 0);
      await Promise.all(pods.map((pod) => pod.del()));
      expect(node.traces()).toEqual(noTraces);
    });
  });

  /** Attachments by network. */
  function shareOf(stateDir: string): Record<string, number> {
    using database = new Database(join(stateDir, "genie.db"));
    return Object.fromEntries(
      database
        .query(
          "SELECT network, count(*) FROM attachments WHERE state = 'attached' GROUP BY 1" +
            " ORDER BY 1",
        )
        .values() as [string, number][],
    );
  }
});

describe("genie plan", () => {
  async function plan(node: Node, ...words: string[]): Promise<GenieRun> {
    const config = join(node.dir, "genie.conf");
    const stdin = { cniVersion: "1.0.0", name: "genie-net", type: "genie" };
    writeFileSync(config, JSON.stringify({ ...stdin, plugins_file: node.tableFile }));
    const pod = ["--namespace", "team", "--pod", "web", "--cni-config", config];
    const env = { CNI_PATH: wireEnv(node, { command: "ADD" })["CNI_PATH"] ?? "" };
    return spawnGenie([compiledGenie(), "plan", ...pod, "--annotation", "cni=", ...words], env);
  }

  const table = "capacity = 8\n[plugins.full]\nconf = 'b.conflist'\ncapacity = 1\n[plugins.pink]\n";

  /** A node on which a choice has something to say. */
  async function makeStory(): Promise<Node> {
    const node = makeNetworks({}, "", table);
    remember(node, [
      { network: "a", durationUs: 30_000 },
      { network: "b", durationUs: 10_000 },
      { network: "c", durationUs: 40_000, outcome: "failed" },
    ]);
    await wire(node, add("c9", { cni: "full" }));
    return node;
  }

  test("shows candidates × KPIs, the winner, and why the others lost", async () => {
    using node = await makeStory();
    const run = await plan(node);
    expect([run.status, run.stderr]).toEqual([0, ""]);
    const [, , , , , head = "", ...below] = run.stdout.trimEnd().split("\n");
    const rows = below.slice(0, below.indexOf(""));
    expect(run.stdout).toMatch(/^b +eth0 +b +1\.0\.0 /m);
    expect(run.stdout).toMatch(/\bbest of 5 candidates by KPIs\n/);
    const cells = (line: string) => line.split(/ {2,}/);
    expect(cells(head)).toEqual([
      ...["CANDIDATE", "OCCUPANCY", "RESPONSE", "FAILURES", "TRAFFIC", "SUBNETS", "ON THE WAY"],
      ...["SCORE", "VERDICT"],
    ]);
    expect(rows.map((line) => [cells(line)[0], cells(line).at(-1)])).toEqual([
      ["b", "chosen"],
      ["a", "slower"],
      ["c", "failed more often"],
      ["full", expect.stringMatching(/^out: it is full/)],
      ["pink", expect.stringMatching(/^out: Unknown network "pink"/)],
    ]);
    expect(rows[0]).toMatch(/^b +unknown +10\.0ms, .* ago +0%, .* ago +unknown +unknown +0 +\d/);
    expect(rows[2]).toMatch(/^c +0% \(0 of 8\) +unknown +100%, /);
    expect(rows[3]).toMatch(/^full +100\.?0?% \(1 of 1\) /);
  });

  test("says all of it as JSON: values, sources, ages", async () => {
    using node = await makeStory();
    const run = await plan(node, "--json");
    const { choice, attachments } = JSON.parse(run.stdout);
    expect(attachments).toMatchObject([{ network: "b", interface: "eth0" }]);
    expect(choice).toMatchObject({
      network: "b",
      weights: { occupancy: 4, response_time: 3, failures: 2, bandwidth: 1, subnets: 0 },
      candidates: [
        {
          network: "b",
          verdict: "chosen",
          onTheWay: 0,
          figures: { response_time: 1, failures: 1, bandwidth: null },
          kpis: {
            occupancy: { value: null, source: "its size is not known", ageMs: 0 },
            medianUs: { value: 10_000, source: "last 1 ADDs", ageMs: expect.any(Number) },
            p95Us: { value: 10_000 },
            failures: { value: 0 },
            bandwidth: { value: null, source: "no traffic measured lately" },
            attachments: { value: 0, source: "attachments on record" },
            ipv4: { used: { value: 0 }, total: { value: null } },
          },
        },
        { network: "a", verdict: "slower" },
        { network: "c", verdict: "failed more often", kpis: { occupancy: { value: 0 } } },
      ],
      rejected: [
        { network: "full", code: 11, kpis: { ipv4: { used: { value: 1 }, total: { value: 1 } } } },
        { network: "pink", code: 101, kpis: null },
      ],
    });
  });

  test("is what ADD then does, and changes nothing", async () => {
    using node = await makeStory();
    const file = join(node.state, "genie.db");
    const before = readFileSync(file);
    const mtime = (await Bun.file(file).stat()).mtimeMs;
    const begun = calls(node.bin).length;
    const { choice } = JSON.parse((await plan(node, "--json")).stdout);
    await plan(node);
    expect(readFileSync(file).equals(before)).toBe(true);
    expect([(await Bun.file(file).stat()).mtimeMs, calls(node.bin).length]).toEqual([mtime, begun]);
    expect((await wire(node, add("c1", { cni: "" }))).status).toBe(0);
    expect(callOrder(node.bin).at(-1)).toBe(`${choice.network} ADD c1 eth0`);
  });

  test("works where there is no record yet, and makes none", async () => {
    using node = makeNetworks();
    const run = await plan(node);
    expect([run.status, run.stderr]).toEqual([0, ""]);
    expect(run.stdout).toContain("as good, later");
    expect(existsSync(node.state)).toBe(false);
  });

  test.each<[string, (file: string) => void]>([
    ["is no database", (file) => writeFileSync(file, "x".repeat(10_000))],
    [
      "is a folder",
      (file) => {
        rmSync(file);
        mkdirSync(file);
      },
    ],
    [
      "is of a newer genie",
      (file) => {
        using database = new Database(file);
        database.run("PRAGMA user_version = 99");
      },
    ],
  ])("chooses without a record that %s, says so, and leaves it", async (_name, spoil) => {
    using node = makeNetworks();
    mkdirSync(node.state, { recursive: true });
    const file = join(node.state, "genie.db");
    const state = openState(makeHost(), node.state);
    closeState(state);
    spoil(file);
    const run = await plan(node);
    expect([run.status, run.stdout]).toEqual([0, expect.stringContaining("as good, later")]);
    expect(run.stderr).toStartWith("genie: warn: Choosing without the record: Cannot read ");
    expect(readdirSync(node.state).filter((name) => name.includes("unusable"))).toEqual([]);
  });

  test("fails as ADD would where nothing can be chosen", async () => {
    using node = makeNetworks({}, "[select]\ncandidates = ['pink']");
    const run = await plan(node);
    expect([run.status, run.stderr]).toEqual([1, expect.stringContaining("(code 101)")]);
  });
});
