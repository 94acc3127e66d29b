/**
 * `genie report` from the record to what is printed: lib/report/command.ts, and what is imported
 * below.
 */
import { Database } from "bun:sqlite";
import { beforeAll, describe, expect, test } from "bun:test";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { closeState, write } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import { putRuleset } from "../lib/policy/store.ts";
import type { LedgerRow } from "../lib/record.ts";
import { openState } from "../lib/recovery/database.ts";
import { latencyEdgesUs, type Report } from "../lib/report/document.ts";
import { scriptJson, toMarkup } from "../lib/report/markup.ts";
import { makePodReport, makeReport } from "../lib/report/model.ts";
import {
  formatCount,
  formatDuration,
  formatRate,
  formatShare,
  formatSpan,
  formatTime,
  isoTime,
} from "../lib/report/quantity.ts";
import { readRecord, setAsideRecords } from "../lib/report/record_reader.ts";
import { asciiJson, candidatesOf } from "../lib/report/table.ts";
import { type TallyRow, tally } from "../lib/report/tally.ts";
import { fill } from "../lib/report/template.ts";
import { formatPodReport, formatReport } from "../lib/report/text.ts";
import manifest from "../package.json";
import { makeHost } from "./fakes.ts";
import {
  addAttachment,
  addBusyWeek,
  addTraffic,
  choiceOfTwo,
  ledgerRow,
  startMs,
  withLedger,
} from "./record.ts";
import { lacks } from "./skip.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

let folders = 0;
/** A state folder that is not there yet, with a CNI config that leads to it. */
function node(table = ""): { stateDir: string; conf: string } {
  const stateDir = join(dir.path, `state-${folders++}`);
  const tableFile = `${stateDir}.toml`;
  const conf = `${stateDir}.conf`;
  writeFileSync(tableFile, `state_dir = "${stateDir}"\nconf_dir = "${dir.path}/none"\n${table}`);
  const own = { cniVersion: "1.0.0", name: "pods", type: "genie", plugins_file: tableFile };
  writeFileSync(conf, JSON.stringify(own));
  return { stateDir, conf };
}

/** 12 hours after the first row. */
const nowMs = startMs + 12 * 3_600_000;

/** Runs `genie report` in this process. */
async function report(conf: string, ...args: string[]) {
  const host = makeHost({ now: nowMs });
  const status = await runCommand(host, ["report", ...args, "--cni-config", conf]);
  const { stdout, stderr } = host.written;
  return { status, stdout: stdout.replaceAll(dir.path, "DIR"), stderr };
}

const json = async (conf: string, ...args: string[]) =>
  JSON.parse((await report(conf, ...args, "--json")).stdout) as Report;

const minute = 60_000;
const denial = {
  outcome: "denied",
  code: 100,
  error: 'Access to network "red" denied for pod team-b/db',
  rule: "plugins.red.allow at /etc/cni/genie/plugins.toml:12",
} as const;
const failure = { outcome: "failed", code: 103, error: "plugin bridge timed out" } as const;

const denied = `${denial.error} (${denial.rule})`;

/** Six hours of a small node: every kind of row, from old to new. */
const rows: LedgerRow[] = [
  ledgerRow({ containerId: "c1", durationUs: 10_000 }),
  ledgerRow({ containerId: "c1", kind: "plugin", plugin: "bridge", durationUs: 9000 }),
  ledgerRow({ containerId: "c1", kind: "call", network: "", durationUs: 11_000 }),
  ledgerRow({ atMs: startMs + 60 * minute, containerId: "c2", podName: "api", durationUs: 30_000 }),
  // A network failed, and with it the call: one request.
  ledgerRow({ atMs: startMs + 120 * minute, containerId: "c3", ...failure }),
  ledgerRow({ atMs: startMs + 120 * minute, containerId: "c3", kind: "call", ...failure }),
  // The call failed before any network: a request of its own.
  ledgerRow({
    ...{ atMs: startMs + 180 * minute, containerId: "c4", kind: "call", network: "pods" },
    ...{ podNamespace: "team-b", podName: "db", durationUs: 900, decidedBy: "", ...denial },
  }),
  ledgerRow({
    ...{ atMs: startMs + 240 * minute, containerId: "c5", podName: "api", network: "green" },
    ...{ durationUs: 1_500_000, decidedBy: "choice", choice: choiceOfTwo },
  }),
  ledgerRow({ atMs: startMs + 360 * minute, containerId: "c1", command: "DEL", durationUs: 500 }),
];

const small = node(`[plugins.blue]\ncapacity = 100\n[plugins.blue.config]
cniVersion = "1.0.0"\nplugins = [{ type = "bridge" }]\n`);

beforeAll(() => {
  withLedger(small.stateDir, (state) => {
    insertLedger(state, rows);
    addAttachment(state, {
      containerId: "c2",
      pod: "api",
      addresses: ["10.1.0.6/16", "fd00::6/64"],
    });
    addAttachment(state, { containerId: "c2", pod: "api", ifName: "net1", network: "green" });
    addAttachment(state, {
      ...{ containerId: "c9", pod: "gone", namespace: "team-b" },
      stuck: { state: "leaked", error: "plugin bridge is gone", atMs: startMs + 5 * minute },
    });
    addTraffic(state, { containerId: "c2", network: "blue", rate: 1_200_000 });
    addTraffic(state, { containerId: "c9", network: "blue", rate: 300_000 });
  });
});

describe("genie report", () => {
  test("shows networks, stuck attachments and the newest requests", async () => {
    expect(await report(small.conf)).toEqual({
      status: 0,
      stderr: "",
      stdout: `Pods: 3, failed 2 (66.7%)
Requests: 6, failed 2, 1 of them denied
Span: 2026-09-01 00:00:00 to 2026-09-01 06:00:00 UTC
Attachments now: 3, leaked 1, failing 0

NETWORK  REQUESTS  FAILED     P50     P95     P99   USED   TRAFFIC  LIVE
(none)          1       1       –       –       –      0         –     0
blue            4       1  10.0ms  30.0ms  30.0ms  2/100  1.50MB/s     2
green           1       0   1.50s   1.50s   1.50s      1         –     1
P50 to P99: successful ADDs; USED: addresses; LIVE: attachments now

Leaked (genie gc retries) and failing (the runtime retries)
STATE   SINCE (UTC)          NETWORK  POD          INTERFACE  ERROR
leaked  2026-09-01 00:05:00  blue     team-b/gone  eth0       plugin bridge is gone

Newest requests, 6 of 6
TIME (UTC)           COMMAND  POD         NETWORK    TOOK  OUTCOME
2026-09-01 06:00:00  DEL      team-a/web  blue      500µs  ok
2026-09-01 04:00:00  ADD      team-a/api  green     1.50s  ok
2026-09-01 03:00:00  ADD      team-b/db   (none)    900µs  denied 100: ${denied}
2026-09-01 02:00:00  ADD      team-a/web  blue     12.0ms  failed 103: plugin bridge timed out
2026-09-01 01:00:00  ADD      team-a/api  blue     30.0ms  ok
2026-09-01 00:00:00  ADD      team-a/web  blue     10.0ms  ok
`,
    });
  });

  const counted: [name: string, args: string[], requests: number, failures: number][] = [
    ["everything", [], 6, 2],
    ["a time", ["--since", "9h"], 3, 1],
    ["a network", ["--network", "blue"], 4, 1],
    ["a namespace", ["--namespace", "team-b"], 1, 1],
    ["a pod", ["--pod", "api"], 2, 0],
    ["a pod of a namespace", ["--pod", "team-a/web"], 3, 1],
    ["a command", ["--command", "del"], 1, 0],
    ["failures", ["--failed"], 2, 2],
    ["denials", ["--denied"], 1, 1],
    ["all of them", ["--since", "12h", "--network", "blue", "--failed", "--pod", "web"], 1, 1],
    ["nothing that is there", ["--network", "absent"], 0, 0],
  ];
  test.each(counted)("limits to %s", async (_name, args, requests, failures) => {
    const { totals } = await json(small.conf, ...args);
    expect([totals.requests, totals.failures]).toEqual([requests, failures]);
  });

  test("counts a pod once, whatever number of sandboxes was tried for it", async () => {
    const { conf, stateDir } = node();
    const tries = (podName: string, count: number, more: Partial<LedgerRow>) =>
      Array.from({ length: count }, (_, i) =>
        ledgerRow({ containerId: `${podName}-${i}`, podUid: `uid-${podName}`, podName, ...more }),
      );
    const good = Array.from({ length: 47 }, (_, i) => tries(`good-${i}`, 1, {})).flat();
    const bad = [tries("a", 8, failure), tries("b", 8, { kind: "call", ...denial })].flat();
    // A runtime that names no uid, one that names no pod, and what is of no pod at all.
    const named = tries("c", 7, { podUid: "", ...failure });
    const nameless = tries("d", 2, { podUid: "", podName: "", podNamespace: "", ...failure });
    const none = { containerId: "", podUid: "", podName: "", podNamespace: "" };
    const gc = ledgerRow({ command: "GC", ...none, ...failure });
    withLedger(stateDir, (state) =>
      insertLedger(state, [...good, ...bad, ...named, ...nameless, gc]),
    );
    const { totals } = await json(conf);
    expect(totals).toMatchObject({ requests: 73, failures: 26, pods: 52, failedPods: 5 });
    const { stdout } = await report(conf);
    expect(stdout).toStartWith(
      "Pods: 52, failed 5 (9.6%)\nRequests: 73, failed 26, 8 of them denied",
    );
    const limited = await json(conf, "--pod", "a");
    expect(limited.totals).toMatchObject({ failures: 8, pods: 1, failedPods: 1 });
  });

  test("lists as many requests as --limit says", async () => {
    const { requests, choices } = await json(small.conf, "--limit", "2");
    expect(requests.map(({ id }) => id)).toEqual([9, 8]);
    expect(choices).toHaveLength(1);
    expect((await json(small.conf, "--limit", "0")).requests).toEqual([]);
  });

  test("gives programs the whole of it", async () => {
    const whole = await json(small.conf);
    const { timeline, latencyEdgesUs: edges, networks, requests, failed, ...rest } = whole;
    expect(failed).toEqual(requests.filter(({ outcome }) => outcome !== "ok"));
    const [, blue] = networks;
    expect(rest).toEqual({
      version: 1,
      genie: manifest.version,
      generatedAt: "2026-09-01T12:00:00.000Z",
      node: hostname(),
      record: join(small.stateDir, "genie.db").replace(dir.path, "DIR"),
      notices: [],
      setAside: [],
      filter: {
        ...{ since: null, network: null, namespace: null, pod: null, command: null, only: null },
      },
      from: "2026-09-01T00:00:00.000Z",
      to: "2026-09-01T06:00:00.000Z",
      totals: {
        ...{ requests: 6, failures: 2, denied: 1, pods: 3, failedPods: 2 },
        ...{ attachments: 3, failing: 0, leaked: 1 },
        add: {
          ...{ count: 3, p50Us: 30_000, p95Us: 1_500_000, p99Us: 1_500_000 },
          histogram: expect.any(Array),
        },
      },
      stuck: [
        {
          ...{ containerId: "c9", namespace: "team-b", pod: "gone", podUid: "uid-1" },
          ...{ network: "blue", interface: "eth0", plugins: ["bridge"], mac: "" },
          ...{ addresses: ["10.1.0.5/16"], state: "leaked", reason: "asked for by cni" },
          policySince: null,
          error: "plugin bridge is gone",
          createdAt: "2026-09-01T00:00:00.000Z",
          failingSince: "2026-09-01T00:05:00.000Z",
        },
      ],
      attachments: expect.any(Array),
      causes: [
        {
          ...{ code: 100, cause: "access denied", denied: true, requests: 1 },
          ...{
            networks: [{ network: "", requests: 1 }],
            at: "2026-09-01T03:00:00.000Z",
            error: denial.error,
            rule: denial.rule,
          },
        },
        {
          ...{ code: 103, cause: "delegate timeout", denied: false, requests: 1 },
          ...{ networks: [{ network: "blue", requests: 1 }], error: failure.error, rule: "" },
          at: "2026-09-01T02:00:00.000Z",
        },
      ],
      failures: [
        {
          ...{ namespace: "team-b", pod: "db", podUid: "uid-1", command: "ADD", network: "" },
          ...{ code: 100, denied: true, requests: 1, error: denial.error, rule: denial.rule },
          ...{ first: "2026-09-01T03:00:00.000Z", last: "2026-09-01T03:00:00.000Z" },
        },
        {
          ...{ namespace: "team-a", pod: "web", podUid: "uid-1", command: "ADD", network: "blue" },
          ...{ code: 103, denied: false, requests: 1, error: failure.error, rule: "" },
          ...{ first: "2026-09-01T02:00:00.000Z", last: "2026-09-01T02:00:00.000Z" },
        },
      ],
      decisions: [
        { network: "", decidedBy: "", requests: 1 },
        { network: "blue", decidedBy: "annotation", requests: 3 },
        { network: "green", decidedBy: "choice", requests: 1 },
      ],
      choices: [
        {
          ...{ at: "2026-09-01T04:00:00.000Z", namespace: "team-a", pod: "api" },
          ...{ network: "calico", outcome: "ok", choice: JSON.parse(choiceOfTwo) },
        },
      ],
    });
    expect(blue).toEqual({
      ...{ network: "blue", requests: 4, failures: 1, denied: 0, bytesPerSecond: 1_500_000 },
      ...{ attachments: 2, add: expect.objectContaining({ count: 2, p50Us: 10_000 }) },
      addresses: { ipv4: { used: 2, total: 100 }, ipv6: { used: 1, total: null } },
      held: expect.any(Array),
    });
    // Of the ADDs one is undone by the last DEL; the attachments of now were made by nobody known.
    expect([blue?.held?.length, blue?.held?.at(0), blue?.held?.at(-2), blue?.held?.at(-1)]).toEqual(
      [timeline.buckets.length, 2, 3, 2],
    );
    const sum = (name: "ok" | "failed" | "denied") =>
      timeline.buckets.reduce((total, bucket) => total + bucket[name], 0);
    expect([timeline.bucketMs, sum("ok"), sum("failed"), sum("denied")]).toEqual([
      ...[300_000, 4, 1, 1],
    ]);
    expect(edges).toEqual([...latencyEdgesUs]);
    const { choice: _, atMs: _ms, ...newest } = rows[8] ?? ledgerRow();
    expect(requests[0]).toEqual({ id: 9, at: "2026-09-01T06:00:00.000Z", ...newest });
  });

  test("lists failures: retries of one pod are one, with the newest words", async () => {
    const { stateDir, conf } = node();
    const at = (minutes: number) => ({ atMs: startMs + minutes * minute });
    const retries = Array.from({ length: 20 }, (_, i) => {
      const containerId = `sandbox-${i}`;
      const error = `plugin calico says: ${containerId} got no address`;
      const one = { ...at(i), containerId, outcome: "failed", code: 11, error } as const;
      // The call fails with its network, in words of its own.
      return [
        ledgerRow(one),
        ledgerRow({ ...one, kind: "call", error: `Cannot attach: ${error}` }),
      ];
    });
    withLedger(stateDir, (state) => {
      insertLedger(state, [
        ledgerRow(),
        ...retries.flat(),
        ledgerRow({ ...at(30), podName: "api", ...failure }),
        ledgerRow({ ...at(31), podName: "api", network: "red", ...failure }),
        ledgerRow({ ...at(32), podName: "api", network: "red", kind: "plugin", ...failure }),
        ledgerRow({ ...at(33), command: "DEL", ...failure }),
        ledgerRow({ ...at(34), containerId: "c2", kind: "call", network: "pods", ...denial }),
      ]);
    });
    const { failures, totals } = await json(conf);
    const shown = failures.map(({ pod, command, network, code, requests, first, last }) =>
      [pod, command, network, code, requests, first.slice(11, 16), last.slice(11, 16)].join(" "),
    );
    expect(shown).toEqual([
      "web ADD  100 1 00:34 00:34",
      "web DEL blue 103 1 00:33 00:33",
      "api ADD red 103 1 00:31 00:31",
      "api ADD blue 103 1 00:30 00:30",
      "web ADD blue 11 20 00:00 00:19",
    ]);
    expect(failures.at(-1)?.error).toBe("plugin calico says: sandbox-19 got no address");
    // They add up to what is counted.
    expect(failures.reduce((sum, { requests }) => sum + requests, 0)).toBe(totals.failures);
    const limited = await json(conf, "--network", "red");
    expect(limited.failures.map(({ network }) => network)).toEqual(["red"]);
    expect((await json(conf, "--denied")).failures.map(({ denied }) => denied)).toEqual([true]);
  });

  test("shows one pod: what it has, why, its requests and choices", async () => {
    const full = "it is full (host-local's store)";
    const shown = await report(small.conf, "pod", "team-a/api");
    expect(shown.stdout).toBe(`Pod team-a/api has
NETWORK  INTERFACE  ADDRESSES                STATE     SINCE (UTC)          WHY
blue     eth0       10.1.0.6/16, fd00::6/64  attached  2026-09-01 00:00:00  asked for by cni
green    net1       10.1.0.5/16              attached  2026-09-01 00:00:00  asked for by cni

Its newest requests
TIME (UTC)           COMMAND  NETWORK  INTERFACE    TOOK  WHY         OUTCOME
2026-09-01 04:00:00  ADD      green    eth0        1.50s  choice      ok
2026-09-01 01:00:00  ADD      blue     eth0       30.0ms  annotation  ok

Choice of 2026-09-01 04:00:00 UTC: calico
NETWORK  SCORE   USED  RESPONSE  FAILURES   TRAFFIC  SUBNETS  RECENT  WHY NOT
calico    8.91  12.0%    34.0ms      2.0%  1.20MB/s        1       0  –
flannel    6.4  61.0%    51.0ms        0%         –        1       3  –
storage      –      –         –         –         –        –       –  ${full}
`);
    const pod = JSON.parse((await report(small.conf, "pod", "team-a/web", "--json")).stdout);
    expect(pod).toMatchObject({ version: 1, pod: { namespace: "team-a", name: "web" } });
    expect(pod.requests.map(({ kind }: { kind: string }) => kind)).toEqual([
      ...["network", "call", "network", "call", "plugin", "network"],
    ]);
    const none = await report(small.conf, "pod", "team-a/absent");
    expect(none.stdout).toBe(
      "Pod team-a/absent has no attachments.\n\nNo requests in this time.\n",
    );
  });

  const wrong: [args: string[], message: string][] = [
    [["pod"], "No pod is named: expected NAMESPACE/POD"],
    [["web"], 'Pod "web" has no namespace: expected NAMESPACE/POD'],
    [["pod", "a/b", "--pod", "c"], "The pod is named twice: a/b, and --pod c"],
    [["--since", "yesterday"], 'Invalid --since "yesterday": expected a duration such as 30m'],
    [["--command", "FLY"], 'Invalid --command "FLY": expected one of ADD, DEL, CHECK, GC, STATUS'],
    [["--limit", "-1"], "--limit"],
    [["--limit", "ten"], 'Invalid --limit "ten"'],
    [["--json", "--csv"], "Only one of --json and --csv at a time"],
  ];
  test.each(wrong)("refuses %p", async (args, message) => {
    const { status, stdout, stderr } = await report(small.conf, ...args);
    expect([status, stdout]).toEqual([2, ""]);
    expect(stderr).toContain(message);
  });

  test("fits a terminal of 80 columns, escape sequences of names taken out", () => {
    const hostile = node();
    const evil = "\u001b]0;own\u0007\u001b[2J\u009b31m\u202egnp.exe";
    withLedger(hostile.stateDir, (state) => {
      addBusyWeek(state, 3000);
      insertLedger(state, [ledgerRow({ network: evil, podName: evil, ...failure, error: evil })]);
      addAttachment(state, {
        ...{ network: evil, pod: evil },
        stuck: { state: "failing", error: evil, atMs: 1 },
      });
    });
    const source = { node: "n1", stateDir: hostile.stateDir, totals: new Map(), notices: [] };
    const made = makeReport(makeHost(), source, { filter: {}, limit: 20 });
    const text = formatReport(made, 80);
    // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must not be there
    expect(text).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u202e]/);
    const wide = text.split("\n").filter((line) => Bun.stringWidth(line) > 80);
    expect(wide).toEqual([]);
  });

  test("shows the rules of a pod, also those at the node's side", async () => {
    const both = node();
    const row = { netnsId: "1", containerId: "c1", podNamespace: "a", podName: "b" };
    const rules = { ruleset: "in the pod\n", hostRuleset: "at the node\n" };
    withLedger(both.stateDir, (state) => {
      putRuleset(state, { ...row, ...rules, atMs: startMs });
      putRuleset(state, { ...row, ...rules, netnsId: "2", ruleset: "", atMs: startMs + 1 });
    });
    const since = "Network policy in force since 2026-09-01 00:00:00 UTC";
    const shown = async () => (await report(both.conf, "pod", "a/b")).stdout;
    const text = await shown();
    expect(text.slice(text.indexOf(since))).toBe(
      `${since}, at the node's side\nat the node\n\n${since}\nin the pod\n\n` +
        `${since}, at the node's side\nat the node\n`,
    );
    const older = new Database(join(both.stateDir, "genie.db"));
    older.run("ALTER TABLE rulesets DROP COLUMN host_ruleset");
    older.close();
    expect((await shown()).split(since)).toHaveLength(2);
    expect((await json(both.conf)).policy?.enforced).toBe(2);
  });

  test("says in 80 columns all of why something failed, below its row", () => {
    const record = node();
    const long = { podName: "ledger-api-6c9f7d8b5f-x2x7q", podNamespace: "production-payments" };
    const error = "Plugin macvlan of network storage took longer than 5000 ms and was ended";
    withLedger(record.stateDir, (state) => {
      insertLedger(state, [ledgerRow({ ...long, ...failure, error })]);
    });
    const source = { node: "n1", stateDir: record.stateDir, totals: new Map(), notices: [] };
    const text = formatReport(makeReport(makeHost(), source, { filter: {}, limit: 20 }), 80);
    expect(text).toContain(
      "2026-09-01 00:00:00  ADD      production-p…d8b5f-x2x7q  blue     12.0ms\n" +
        "  failed 103: Plugin macvlan of network storage took longer than 5000 ms and was\n" +
        "  ended\n",
    );
  });

  test("tells the story of a pod in 80 columns: plugins by name, reasons whole", () => {
    const record = node();
    withLedger(record.stateDir, (state) => {
      const call = { kind: "call", network: "pods", ...denial } as const;
      insertLedger(state, [
        ledgerRow({ kind: "plugin", plugin: "bridge" }),
        ledgerRow({ ...call, choice: choiceOfTwo }),
      ]);
    });
    const source = { node: "n1", stateDir: record.stateDir, totals: new Map(), notices: [] };
    const pod = { namespace: "team-a", name: "web" };
    const made = makePodReport(makeHost(), source, pod, { filter: {}, limit: 20 });
    const text = formatPodReport(made, 80);
    expect(text).toMatch(/ADD {8}bridge …/);
    expect(text.replace(/\n {2}/g, " ")).toContain(denied);
    expect(text).toContain("\n  it is full (host-local's store)\n");
    expect(text.split("\n").filter((line) => Bun.stringWidth(line) > 80)).toEqual([]);
  });
});

/** Rows of a CSV text, by the grammar of RFC 4180. */
function parseCsv(text: string): string[][] {
  const parsed: string[][] = [];
  let row: string[] = [];
  for (const [, quoted, plain, end] of text.matchAll(
    /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r\n)/g,
  )) {
    row.push(quoted?.replaceAll('""', '"') ?? plain ?? "");
    if (end === ",") continue;
    parsed.push(row);
    row = [];
  }
  return parsed;
}

describe("a request", () => {
  const call = { kind: "call", network: "pods" } as const;
  const told: [name: string, rows: Partial<LedgerRow>[], requests: number, choices: number][] = [
    ["is a network", [{}, { ...call }, { kind: "plugin" }], 1, 0],
    ["is a call that failed alone", [{ ...call, ...failure }], 1, 0],
    ["is a network, not the call it failed", [failure, { ...call, ...failure }], 1, 0],
    [
      "is each of two calls that failed alike",
      [
        { ...call, ...failure },
        { ...call, ...failure },
      ],
      2,
      0,
    ],
    [
      "is a failed call whose networks did not fail: those of another container did",
      [{}, { ...failure, containerId: "c2" }, { ...call, ...failure }],
      ...([3, 0] as const),
    ],
    [
      "is a call that failed alone after one whose network failed",
      [failure, { ...call, ...failure }, { ...call, ...failure }],
      ...([2, 0] as const),
    ],
    ["is no call with a choice", [{}, { ...call, choice: choiceOfTwo }], 1, 1],
    [
      "has one choice, in how many rows it may stand",
      [{ choice: choiceOfTwo }, { ...call, choice: choiceOfTwo }],
      ...([1, 1] as const),
    ],
    [
      "has the choice of a failed attempt",
      [failure, { ...call, ...failure, choice: choiceOfTwo }, {}, { ...call }],
      ...([2, 1] as const),
    ],
  ];
  test.each(told)("%s", async (_name, parts, requests, choices) => {
    const { stateDir, conf } = node();
    withLedger(stateDir, (state) => insertLedger(state, parts.map(ledgerRow)));
    const made = await json(conf);
    expect([made.totals.requests, made.choices.length]).toEqual([requests, choices]);
    expect(made.requests).toHaveLength(requests);
  });
});

describe("genie report --csv", () => {
  test("gives every row of every kind, newest first", async () => {
    const { stdout } = await report(small.conf, "--csv");
    const [head, ...lines] = parseCsv(stdout);
    expect(stdout.replaceAll("\r\n", "")).not.toMatch(/[\r\n]/);
    expect(head?.slice(0, 4)).toEqual(["id", "at", "kind", "command"]);
    expect(lines.map(([id]) => id)).toEqual(["9", "8", "7", "6", "5", "4", "3", "2", "1"]);
    expect(lines[1]?.at(-1)).toBe(choiceOfTwo);
    expect(parseCsv((await report(small.conf, "--csv", "--limit", "3")).stdout)).toHaveLength(4);
    expect(parseCsv((await report(small.conf, "--csv", "--denied")).stdout)).toHaveLength(2);
  });

  const cells: [name: string, error: string, cell: string][] = [
    ["plain text", "it failed", "it failed"],
    ["a comma", "a,b", '"a,b"'],
    ["quotes", 'the "blue" one', '"the ""blue"" one"'],
    ["the end of a line", "a\r\nb", "a��b"],
    ["an escape sequence", "\u001b[31m", "�[31m"],
    ["a formula", "=1+1", "'=1+1"],
    ["a formula by plus", "+1", "'+1"],
    ["a formula by minus", "-1", "'-1"],
    ["a formula by at", '@SUM("A1",2)', `"'@SUM(""A1"",2)"`],
    ["a formula behind a tab", "\t=1", "�=1"],
    ["a formula behind a space", " =1", "' =1"],
    ["spaces around", " a ", '" a "'],
  ];
  test.each(cells)("writes %s", async (_name, error, cell) => {
    const { stateDir, conf } = node();
    withLedger(stateDir, (state) => insertLedger(state, [ledgerRow({ ...failure, error })]));
    const [, line = ""] = (await report(conf, "--csv")).stdout.split("\r\n");
    expect(line).toEndWith(`,failed,103,${cell},10.1.0.5/16,0123456789abcdef,annotation,,`);
  });
});

describe("the record of a report", () => {
  const names = (path: string) => readdirSync(path).sort();
  const contentOf = (stateDir: string) => readFileSync(join(stateDir, "genie.db"));

  test("absent is no failure, and nothing is made", async () => {
    const { stateDir, conf } = node();
    const file = join(stateDir.replace(dir.path, "DIR"), "genie.db");
    const shown = await report(conf);
    expect(shown).toEqual({
      status: 0,
      stderr: "",
      stdout: `Pods: 0, failed 0 (–)
Requests: 0, failed 0
Span: no requests on record
Attachments now: 0, leaked 0, failing 0

Note: No record yet: ${file} is absent or empty, no pod was attached here

No network has requests or attachments.

No requests in this time.
`,
    });
    expect(existsSync(stateDir)).toBe(false);
    expect((await json(conf)).networks).toEqual([]);
    expect((await report(conf, "--csv")).stdout).toStartWith("id,at,kind");
  });

  test("an empty file, and one without a ledger, are empty reports", async () => {
    const { stateDir, conf } = node();
    mkdirSync(stateDir);
    writeFileSync(join(stateDir, "genie.db"), "");
    expect((await json(conf)).notices[0]).toContain("is absent or empty");
    expect(statSync(join(stateDir, "genie.db")).size).toBe(0);
    const old = node();
    withLedger(old.stateDir, (state) => {
      state.database.run("DROP TABLE ledger; DROP TABLE traffic; PRAGMA user_version = 1");
      addAttachment(state);
    });
    const { notices, totals } = await json(old.conf);
    expect(notices).toEqual([expect.stringContaining("has no ledger")]);
    expect([totals.requests, totals.attachments]).toEqual([0, 1]);
  });

  test("is not changed, whether closed or in use", async () => {
    const before = contentOf(small.stateDir);
    await report(small.conf);
    expect(contentOf(small.stateDir).equals(before)).toBe(true);
    const state = openState(makeHost(), small.stateDir);
    try {
      // A reader neither waits for a writer nor sees what it has not finished.
      state.database.run("BEGIN IMMEDIATE");
      insertLedger(state, [ledgerRow()]);
      expect((await json(small.conf)).totals.requests).toBe(6);
      state.database.run("ROLLBACK");
    } finally {
      closeState(state);
    }
    expect(names(small.stateDir).filter((name) => /^genie/.test(name))).toEqual(["genie.db"]);
  });

  test("of a newer genie is refused", async () => {
    const { stateDir, conf } = node();
    withLedger(stateDir, ({ database }) => database.run("PRAGMA user_version = 99"));
    const { status, stderr } = await report(conf);
    expect(status).toBe(1);
    expect(stderr).toContain("its schema version 99 is newer than");
  });

  const damage: [name: string, harm: (file: string) => void, message: string][] = [
    ["no database", (file) => writeFileSync(file, "x".repeat(8192)), "left as it is"],
    ["cut", (file) => truncateSync(file, 20_480), "left as it is"],
    ["of another program", (file) => foreign(file), "it is another program's database"],
  ];
  function foreign(file: string): void {
    const database = new Database(file);
    database.run("PRAGMA application_id = 7");
    database.close();
  }
  test.each(damage)("%s is told of and left alone", async (_name, harm, message) => {
    const { stateDir, conf } = node();
    withLedger(stateDir, (state) => addBusyWeek(state, 3000));
    harm(join(stateDir, "genie.db"));
    const before = contentOf(stateDir);
    const { status, stdout, stderr } = await report(conf);
    expect([status, stdout]).toEqual([1, ""]);
    expect(stderr).toContain(`Cannot read ${stateDir}/genie.db: `);
    expect(stderr).toContain(message);
    expect(contentOf(stateDir).equals(before)).toBe(true);
    expect(names(stateDir).filter((name) => name.includes("unusable"))).toEqual([]);
  });

  test("set aside is told of", async () => {
    const { stateDir, conf } = node();
    withLedger(stateDir, (state) => insertLedger(state, [ledgerRow()]));
    for (const name of [`unusable-${startMs}`, `unusable-${startMs}-wal`, "unusable-x"]) {
      writeFileSync(join(stateDir, `genie.db.${name}`), "");
    }
    expect(setAsideRecords(stateDir)).toEqual([
      { file: join(stateDir, `genie.db.unusable-${startMs}`), atMs: startMs },
      { file: join(stateDir, "genie.db.unusable-x"), atMs: 0 },
    ]);
    const { stdout } = await report(conf);
    expect(stdout).toContain("Note: An unusable record was set aside at 2026-09-01T00:00:00.000Z");
    expect((await json(conf)).setAside[0]?.at).toBe("2026-09-01T00:00:00.000Z");
  });

  test("with hostile plans and results is still shown", async () => {
    const { stateDir, conf } = node();
    withLedger(stateDir, (state) => {
      for (const id of ["a", "b", "c"]) addAttachment(state, { containerId: id });
      const set = state.database.query(
        "UPDATE attachments SET plan = ?, result = ? WHERE container_id = ?",
      );
      set.run("{", "]", "a");
      set.run('{"pod":7,"list":{"plugins":[1]}}', '{"ips":[{"address":"x"}]}', "b");
      insertLedger(state, [ledgerRow({ choice: "{" })]);
    });
    const { totals, networks, choices } = await json(conf);
    expect([totals.attachments, networks[0]?.addresses.ipv4.used]).toEqual([3, 1]);
    expect(choices[0]?.choice).toBe("{");
  });

  test("with a table that is wrong is shown, without totals", async () => {
    const { stateDir, conf } = node("nonsense = 1\n");
    withLedger(stateDir, (state) => insertLedger(state, [ledgerRow()]));
    const { notices, totals } = await json(conf);
    expect(notices).toEqual([expect.stringContaining("How many addresses networks have is not")]);
    expect(totals.requests).toBe(1);
  });

  test.skipIf(lacks("mounts"))("on a disk that is full or read-only is read", () => {
    const disk = join(dir.path, "disk");
    mkdirSync(disk);
    const sh = (...words: string[]) => {
      const { exitCode, stderr } = Bun.spawnSync(words);
      if (exitCode !== 0) throw new Error(`${words.join(" ")}: ${stderr}`);
    };
    const read = () =>
      readRecord(disk, ({ database }) => database.query("SELECT count(*) FROM ledger").values());
    sh("mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk);
    try {
      copyFileSync(join(small.stateDir, "genie.db"), join(disk, "genie.db"));
      const room = 400 * 1024 - statSync(join(disk, "genie.db")).size;
      writeFileSync(join(disk, "filler"), Buffer.alloc(Math.floor(room / 4096) * 4096));
      expect(read()).toEqual([[9]]);
      // SQLite got as far as making them.
      for (const end of ["-shm", "-wal"]) rmSync(join(disk, `genie.db${end}`), { force: true });
      sh("mount", "-o", "remount,ro", disk);
      expect(read()).toEqual([[9]]);
      expect(names(disk)).toEqual(["filler", "genie.db"]);
      // What is in the log alone counts too.
      sh("mount", "-o", "remount,rw,size=8m", disk);
      const state = openState(makeHost(), node().stateDir);
      write(state, () => insertLedger(state, [ledgerRow()]));
      for (const end of ["", "-wal"]) copyFileSync(state.file + end, join(disk, `genie.db${end}`));
      closeState(state);
      sh("mount", "-o", "remount,ro", disk);
      expect(read()).toEqual([[1]]);
    } finally {
      sh("umount", disk);
    }
  });
});

/** A request to count. */
const counts = (more: Partial<TallyRow>): TallyRow => ({
  ...{ id: 1, atMs: startMs, network: "blue", isAdd: 1, isDel: 0, durationUs: 1000, outcome: "ok" },
  ...{ code: 0, decidedBy: "cni", isChoice: 0, isRequest: 1 },
  ...more,
});

describe("tally()", () => {
  const span = { fromMs: startMs, toMs: startMs + 7 * 86_400_000, limit: 2 };

  test("gives exact percentiles of any order, by nearest rank", () => {
    const durations = Array.from({ length: 1000 }, (_, i) => ((i * 7919) % 1000) + 1);
    const { add } = tally(
      durations.map((durationUs) => counts({ durationUs })),
      span,
    );
    expect([add.count, add.p50Us, add.p95Us, add.p99Us]).toEqual([1000, 500, 950, 990]);
    expect(add.histogram.reduce((sum, one) => sum + one, 0)).toBe(1000);
    expect(add.histogram.slice(0, 5)).toEqual([99, 50, 50, 100, 200]);
  });

  test("times neither failures nor other commands", () => {
    const { add } = tally([counts({ isAdd: 0 }), counts({ outcome: "failed", code: 11 })], span);
    expect([add.count, add.p50Us]).toEqual([0, null]);
  });

  const spans: [name: string, lengthMs: number, bucketMs: number][] = [
    ["nothing", 0, 10_000],
    ["an hour", 3_600_000, 60_000],
    ["a day", 86_400_000, 15 * 60_000],
    ["a week", 7 * 86_400_000, 2 * 3_600_000],
    ["a century", 36_500 * 86_400_000, 365 * 86_400_000],
  ];
  test.each(spans)("cuts %s into at most 120 buckets", (_name, lengthMs, bucketMs) => {
    const toMs = startMs + lengthMs;
    const at = [startMs, toMs];
    const { bucketMs: found, timeline } = tally(
      at.map((atMs) => counts({ atMs })),
      { fromMs: startMs, toMs, limit: 2 },
    );
    expect(found).toBe(bucketMs);
    expect(timeline.length).toBeLessThanOrEqual(120);
    expect(timeline.reduce((sum, { ok }) => sum + ok, 0)).toBe(2);
  });

  test("counts what comes and goes; the DEL that undoes an ADD is neither", () => {
    const at = (atMs: number, more: Partial<TallyRow>) => counts({ atMs: startMs + atMs, ...more });
    const del = { isAdd: 0, isDel: 1 };
    const { networks } = tally(
      [
        ...[at(0, {}), at(0, {}), at(1, { outcome: "failed", code: 7 }), at(1, del)],
        ...[at(2, del), at(3, { ...del, outcome: "failed", code: 7 }), at(4, { isAdd: 0 })],
        at(7 * 86_400_000, { network: "red" }),
      ],
      span,
    );
    const changes = [...networks.values()].map((one) => Object.values(one.changes));
    expect(changes).toEqual([[1], [1]]);
  });

  test("keeps its memory within limits, whatever the names", () => {
    const many = Array.from({ length: 3000 }, (_, i) =>
      counts({ id: i, network: `n${i}`, outcome: "failed", code: i, decidedBy: `d${i}` }),
    );
    const { networks, causes, requests, newestIds } = tally(many, span);
    expect([networks.size, causes.length, requests]).toEqual([501, 201, 3000]);
    expect(networks.get("(other networks)")?.requests).toBe(2500);
    expect(newestIds).toEqual([2999, 2998]);
  });
});

describe("words", () => {
  const durations: [us: number, text: string][] = [
    [0, "0µs"],
    [999, "999µs"],
    [1000, "1.00ms"],
    [12_345, "12.3ms"],
    [999_499, "999ms"],
    [1_000_000, "1.00s"],
    [59_940_000, "59.9s"],
    [60_000_000, "1m00s"],
    [3_599_000_000, "59m59s"],
    [3_600_000_000, "1h00m"],
  ];
  test.each(durations)("formatDuration() of %p is %p", (us, text) => {
    expect(formatDuration(us)).toBe(text);
  });

  test("of counts, rates, shares, spans and times", () => {
    expect([formatCount(1_234_567), formatCount(0)]).toEqual(["1,234,567", "0"]);
    expect([0, 999, 1000, 12_345_678, 1e18].map(formatRate)).toEqual([
      ...["0B/s", "999B/s", "1.00kB/s", "12.3MB/s", "1000000TB/s"],
    ]);
    const shares: [number, number][] = [
      [0, 0],
      [0, 5],
      [1, 1e6],
      [1, 3],
      [999_999, 1e6],
      [5, 5],
    ];
    expect(shares.map(([part, whole]) => formatShare(part, whole))).toEqual([
      ...["–", "0%", "<0.1%", "33.3%", ">99.9%", "100%"],
    ]);
    expect([1000, 60_000, 7_200_000, 172_800_000, 1500].map(formatSpan)).toEqual([
      ...["1 second", "1 minute", "2 hours", "2 days", "1500 ms"],
    ]);
    expect([startMs, 0, 1e300].map((ms) => formatTime(isoTime(ms)))).toEqual([
      ...["2026-09-01 00:00:00", "–", "–"],
    ]);
    expect(isoTime(Number.NaN)).toBe(null);
  });

  const filled: [name: string, template: string, text: string][] = [
    ["what has a name", "<{{a}}>, {{absent}}.", "<1>, ."],
    ["each item of a list, with names around it", "{{#list}}{{b}}{{a}} {{/list}}", "21 31 "],
    ["what is there", "{{#a}}{{a}} is{{/a}}{{^a}}no{{/a}}", "1 is"],
    ["what is not there", "{{#none}}yes{{/none}}{{^none}}no{{/none}}", "no"],
    ["nothing for false and an empty text", "{{#off}}a{{/off}}{{#empty}}b{{/empty}}", ""],
    ["no line for a tag alone", "{{#a}}\nx\n{{/a}}\ny\n", "x\ny\n"],
    ["nothing of what it was given", "{{hostile}}{{#hostile}}!{{/hostile}}", "{{a}}!"],
  ];
  test.each(filled)("a template shows %s", (_name, template, text) => {
    const values = { a: 1, list: [{ b: 2 }, { b: 3 }], none: [], off: false, empty: "" };
    expect(fill(template, { ...values, hostile: "{{a}}" })).toBe(text);
    expect(fill("{{a}}", { a: "x" }, (value) => `<${value}>`)).toBe("<x>");
  });

  test("toMarkup() escapes what is put into the page, but for what is HTML already", () => {
    expect(toMarkup('<a href="x">&\'')).toBe("&lt;a href=&quot;x&quot;&gt;&amp;&#39;");
    expect(toMarkup({ markup: "<b>" })).toBe("<b>");
    expect(toMarkup(1)).toBe("1");
  });

  test("JSON for a page and for a terminal means the same", () => {
    const value = { "</script><!--": "\u2028\u009b\u202e é" };
    const { markup } = scriptJson(value);
    expect(markup).not.toMatch(/[<\u2028\u009b\u202e]/);
    expect(JSON.parse(markup)).toEqual(value);
    expect(JSON.parse(asciiJson(JSON.stringify(value)))).toEqual(value);
  });

  const choices: [name: string, choice: unknown, rows: string[][]][] = [
    ["a text", "nonsense", []],
    ["nothing", null, []],
    ["a list", [{ network: "a", score: 1.23456 }, 7], [["a", "1.235"]]],
    ["unknown KPIs", { candidates: [{ network: "a", luck: true }] }, [["a", "true"]]],
  ];
  test.each(choices)("candidatesOf() reads %s", (_name, choice, expected) => {
    expect(candidatesOf(choice).rows).toEqual(expected);
  });
});
