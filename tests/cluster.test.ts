/**
 * `genie report --cluster`: lib/report/cluster.ts, and lib/agent/listen.ts of the agents that
 * answer; compiled agents behind an API server that passes requests on to them. The others are
 * imported below; the roles of its readers (lib/cluster/manifest.yaml) are in
 * tests/manifest.test.ts.
 */
import { describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openReports } from "../lib/agent/listen.ts";
import { runCommand } from "../lib/cli/command_line.ts";
import { parseConfig } from "../lib/config/parse.ts";
import type { State } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import type { LedgerRow } from "../lib/record.ts";
import { startMerge } from "../lib/report/cluster_merge.ts";
import {
  type ClusterReport,
  latencyEdgesUs,
  type ParsedReport,
  parseReport,
  type Report,
} from "../lib/report/document.ts";
import { makeReport } from "../lib/report/model.ts";
import manifest from "../package.json";
import { makeHost } from "./fakes.ts";
import { startAgent, until } from "./policed.ts";
import { addAttachment, addTraffic, ledgerRow, noise, startMs, withLedger } from "./record.ts";
import { lacks } from "./skip.ts";
import { fileApi, fileDir } from "./stage.ts";

const dir = fileDir();
const api = await fileApi(dir, true);

const minute = 60_000;
const nowMs = startMs + 12 * 60 * minute;
const failure = { outcome: "failed", code: 103, error: "plugin bridge timed out" } as const;

let folders = 0;
/** A report of a record that is made up, as a node gives it. */
function reportOf(rows: LedgerRow[], more?: (state: State) => void): Report {
  const stateDir = join(dir.path, `record-${folders++}`);
  withLedger(stateDir, (state) => {
    insertLedger(state, rows);
    more?.(state);
  });
  const totals = new Map([["blue", { ipv4: 100 }]]);
  const source = { node: "n1", stateDir, totals, notices: [] };
  return makeReport(makeHost({ now: nowMs }), source, { filter: {}, limit: 20 });
}

/** What another genie reads of it. */
function parsed(report: object): ParsedReport {
  const read = parseReport(JSON.parse(JSON.stringify(report)));
  if (typeof read === "string") throw new Error(read);
  return read;
}

const none = { since: null, network: null, namespace: null, pod: null, command: null, only: null };

function merge(nodes: Record<string, ParsedReport | string>, limit = 20): ClusterReport {
  const all = startMerge({
    ...{ genie: manifest.version, generatedAt: "2026-09-01T12:00:00.000Z", record: "here" },
    ...{ notices: [], filter: none, limit },
  });
  for (const [node, report] of Object.entries(nodes)) {
    if (typeof report === "string") all.addMissing(node, report);
    else all.add(node, report);
  }
  return all.result();
}

/** Rows of a time, with durations and outcomes of all kinds. */
function manyRows(count: number, seed: number): LedgerRow[] {
  const numbers = noise(seed);
  const next = () => numbers.next().value;
  return Array.from({ length: count }, (_, i) =>
    ledgerRow({
      atMs: startMs + Math.floor(i * (600 * minute) * (1 / count)),
      containerId: `c${seed}-${i}`,
      network: next() < 0.7 ? "blue" : "green",
      durationUs: Math.floor(2000 + next() ** 4 * 3_000_000),
      ...(next() < 0.1 && failure),
    }),
  );
}

describe("startMerge()", () => {
  test("gives what one record of all rows gives, percentiles to a span", () => {
    const parts = [manyRows(900, 1), manyRows(50, 2), manyRows(400, 3)];
    const whole = reportOf(parts.flat().sort((a, b) => a.atMs - b.atMs));
    const [a, b, c] = parts.map((rows) => parsed(reportOf(rows)));
    const merged = merge({ a, b, c } as Record<string, ParsedReport>);
    const counted = ({ requests, failures, denied, add }: Report["totals"]) => ({
      ...{ requests, failures, denied, adds: add.count, histogram: add.histogram },
    });
    expect(counted(merged.totals)).toEqual(counted(whole.totals));
    expect(merged.decisions).toEqual(whole.decisions);
    const named = ({ causes }: Report) =>
      causes.map(({ code, requests, networks, at }) => ({ code, requests, networks, at }));
    expect(named(merged)).toEqual(named(whole));
    expect([merged.from, merged.to]).toEqual([whole.from, whole.to]);
    const all = ({ timeline }: Report) =>
      timeline.buckets.reduce((sum, { ok, failed }) => sum + ok + failed, 0);
    expect(all(merged)).toBe(1350);
    for (const [i, network] of merged.networks.entries()) {
      const exact = whole.networks[i];
      expect(network).toMatchObject({
        ...{ network: exact?.network, requests: exact?.requests, failures: exact?.failures },
        add: { histogram: exact?.add.histogram },
      });
      for (const share of ["p50Us", "p95Us", "p99Us"] as const) {
        const [found, known] = [network.add[share] ?? 0, exact?.add[share] ?? 0];
        const edge = latencyEdgesUs.find((one) => one > known) ?? 0;
        expect(found).toBeGreaterThanOrEqual(known);
        expect(found).toBeLessThanOrEqual(edge);
      }
    }
    const ids = (rows: Report["failed"]) => rows.map(({ containerId }) => containerId);
    expect(ids(merged.failed)).toEqual(ids(whole.failed));
    expect(new Set(merged.failed.map(({ node }) => node)).size).toBeGreaterThan(1);
  });

  test("of one node is that node, to the microsecond", () => {
    const report = reportOf(manyRows(300, 4), (state) => addAttachment(state));
    const merged = merge({ a: parsed(report) });
    expect(merged.totals).toEqual(report.totals);
    // Each node has its own buckets of time.
    expect(merged.networks).toEqual(report.networks.map(({ held: _, ...one }) => one));
    expect(merged.failures).toEqual(report.failures.map((one) => ({ ...one, node: "a" })));
    expect(merged.failures.length).toBeGreaterThan(0);
  });

  test("adds up what is attached, and lists what is stuck by node", () => {
    const one = (ip: string, minutes: number) =>
      reportOf([], (state) => {
        addAttachment(state, { containerId: "c1", addresses: [ip] });
        addTraffic(state, { containerId: "c1", network: "blue", rate: 1000 });
        addAttachment(state, {
          ...{ containerId: "c2", addresses: ["10.1.0.9/16"] },
          stuck: { state: "leaked", error: "gone", atMs: startMs + minutes * minute },
        });
      });
    const merged = merge({ a: parsed(one("10.1.0.5/16", 1)), b: parsed(one("10.1.0.6/16", 2)) });
    expect(merged.networks).toMatchObject([
      {
        ...{ network: "blue", attachments: 4, bytesPerSecond: 2000 },
        addresses: { ipv4: { used: 4, total: 200 }, ipv6: { used: 0, total: null } },
      },
    ]);
    expect(merged.stuck.map(({ node }) => node)).toEqual(["b", "a"]);
    expect(
      merged.nodes.map(({ node, totals, addresses }) => [node, totals.leaked, addresses]),
    ).toEqual(["a", "b"].map((node) => [node, 1, { ipv4: 2, ipv6: 0 }]));
  });

  test("tells what differs, and what nodes say, once", () => {
    const report = parsed(reportOf([]));
    const merged = merge({
      a: { ...report, genie: "0.0.1", notices: ["odd", "even"] },
      b: { ...report, notices: ["odd"] },
      c: "no answer",
    });
    expect(merged.notices).toEqual([
      `Versions of genie differ: 0.0.1 on 1, ${manifest.version} on 1`,
      "2 nodes: odd",
      "a: even",
    ]);
    expect(merge({ b: report }).notices).toEqual([]);
  });

  test("says one problem of a policy once, and the oldest knowledge", () => {
    const problem = { kind: "NetworkPolicy", namespace: "n", name: "p", path: "x", problem: "y" };
    const policy = (knownAt: string | null, at: string) => ({
      ...{ knownAt, enforced: 2, rulesets: [], problems: [{ ...problem, at }] },
    });
    const report = parsed(reportOf([]));
    const [early, late] = ["2026-09-01T01:00:00.000Z", "2026-09-01T02:00:00.000Z"];
    const a = { ...report, policy: policy(late, early) };
    const b = { ...report, policy: policy(early, late) };
    expect(merge({ a, b, c: report }).policy).toEqual({
      ...{ knownAt: early, enforced: 4, rulesets: [], problems: [{ ...problem, at: late }] },
    });
    const never = { ...report, policy: policy(null, early) };
    expect(merge({ a, never }).policy?.knownAt).toBeNull();
    expect(merge({ never, a }).policy?.knownAt).toBeNull();
  });

  test("takes a thousand nodes with networks of their own in bounded memory", () => {
    const report = parsed(reportOf(manyRows(50, 5), (state) => addAttachment(state)));
    const all = startMerge({
      ...{ genie: "x", generatedAt: "", record: "", notices: [], filter: none, limit: 5 },
    });
    for (let i = 0; i < 1000; i++) {
      const networks = report.networks.flatMap((one) =>
        ["", i, i + 0.5].map((suffix) => ({ ...one, network: `${one.network}${suffix}` })),
      );
      all.add(`node-${i}`, { ...report, networks });
    }
    const merged = all.result();
    expect(merged.nodes).toHaveLength(1000);
    expect(merged.totals.requests).toBe(50_000);
    expect(merged.networks).toHaveLength(2001);
    expect([merged.failed.length, merged.requests.length]).toEqual([5, 5]);
  });
});

describe("parseReport()", () => {
  const report = (): Report => JSON.parse(JSON.stringify(reportOf(manyRows(20, 6))));
  const odd: [string, (report: Report) => unknown, string][] = [
    ["a number", () => 7, "no report"],
    ["null", () => null, "no report"],
    ["another object", () => ({ kind: "Pod" }), 'at "version"'],
    ["a later version", () => ({ version: 2, genie: "9.0.0" }), "by genie 9.0.0 is of version 2"],
    ["other spans", (one) => ({ ...one, latencyEdgesUs: [1, 2] }), "the spans of this genie"],
    [
      "a count below nothing",
      (one) => ({ ...one, totals: { ...one.totals, requests: -1 } }),
      'at "totals.requests"',
    ],
    ["a text for a list", (one) => ({ ...one, networks: "blue" }), 'at "networks"'],
    ["a time that is none", (one) => ({ ...one, from: "yesterday" }), 'at "from"'],
    ["too much", (one) => ({ ...one, notices: Array(5000).fill("x") }), 'at "notices"'],
    [
      "a histogram that does not add up",
      (one) => ({
        ...one,
        totals: { ...one.totals, add: { ...one.totals.add, count: 3 } },
      }),
      "adds up",
    ],
  ];
  test.each(odd)("refuses %s", (_name, change, reason) => {
    expect(parseReport(change(report()))).toContain(reason);
  });

  test("takes what an older and a newer genie of this version write", () => {
    const { genie: _, failed, ...older } = report();
    const read = parsed({ ...older, causes: older.causes.map(({ at: _at, ...one }) => one) });
    expect(read.genie).toBe("");
    expect(read.failed.length).toBe(failed.length);
    expect(read.causes.every(({ at }) => at === null)).toBe(true);
    expect(parsed({ ...report(), more: [1] })).toEqual(parsed(report()));
  });
});

describe("openReports()", () => {
  /** Reports of a program, by their query. */
  const reportsOf = (script: string) => {
    const program = join(dir.path, `program-${folders++}`);
    writeFileSync(program, `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    const config = parseConfig("agent.report = true", "table");
    const reports = openReports({ host: makeHost(), config, cniConfig: "/own" }, program);
    return (query = "") => reports(new URL(`http://node/report${query}`));
  };

  test("runs one program at a time, for all who ask the same", async () => {
    const gate = join(dir.path, "gate");
    const ask = reportsOf(
      `while [ ! -e ${gate} ]; do sleep 0.01; done; echo "$*"; echo x >>${gate}`,
    );
    const same = [ask("?since=2h&failed=true"), ask("?failed=true&since=2h")];
    const other = await ask("?since=3h");
    expect([other.status, other.headers.get("Retry-After")]).toEqual([503, "1"]);
    writeFileSync(gate, "");
    const texts = await Promise.all(same.map(async (one) => (await one).text()));
    expect(new Set(texts)).toEqual(
      new Set(["report --json --failed --since=2h --cni-config=/own\n"]),
    );
    expect(readFileSync(gate, "utf8")).toBe("x\n");
    expect((await ask("?since=3h")).status).toBe(200);
  });

  test.each([
    [
      "a record that is damaged",
      "echo 'genie: error: it is damaged' >&2; exit 1",
      500,
      "it is damaged",
    ],
    ["words that make no sense", "echo 'genie: error: no such' >&2; exit 2", 400, "no such"],
    ["a program that is killed", "kill -9 $$", 500, "no report, signal"],
    ["too much", "exec head -c 9000000 /dev/zero", 500, "no report, overflow"],
  ])("says so of %s", async (_name, script, status, message) => {
    const answer = await reportsOf(script)();
    expect([answer.status, await answer.json()]).toEqual([status, { message }]);
  });
});

/** Runs a command for all nodes in this process. */
async function ofCluster(command: string, ...args: string[]) {
  const host = makeHost({ now: nowMs });
  const status = await runCommand(host, [command, "--cluster", ...args]);
  return { status, ...host.written };
}

const cluster = (...args: string[]) => ofCluster("report", ...args);

const kubeconfig = () => `--kubeconfig=${api.kubeconfig("token")}`;

/** Servers in this process in place of agents, by name; and what they were asked. */
async function withServers(
  answers: Record<string, (request: Request) => Response | Promise<Response>>,
  act: (urls: Record<string, string>) => Promise<void>,
): Promise<void> {
  const servers = Object.entries(answers).map(([name, fetch]) => {
    return [name, Bun.serve({ port: 0, hostname: "127.0.0.1", fetch })] as const;
  });
  try {
    await act(Object.fromEntries(servers.map(([name, { url }]) => [name, url.origin])));
  } finally {
    await Promise.all(servers.map(([, server]) => server.stop(true)));
  }
}

/** Makes nodes of a cluster that has these and no others. */
async function withNodes(
  names: string[],
  urls: Record<string, string | undefined>,
  act: (selector: string) => Promise<void>,
): Promise<void> {
  const paths = names.map((name) => `/api/v1/nodes/${name}`);
  for (const path of paths) api.put(path, { kind: "Node" });
  api.proxy = (name, port) => (port === "9477" ? urls[name] : undefined);
  try {
    await act(kubeconfig());
  } finally {
    for (const path of paths) api.remove(path);
    delete api.proxy;
  }
}

describe("genie report --cluster", () => {
  const answer = (report: object) => () => Response.json(report);

  test.skipIf(lacks("the binary"))(
    "merges agents through the nodes: some are down, shut, garbage or old",
    async () => {
      const agents = ["one", "two", "shut"].map((name) => {
        const home = join(dir.path, name);
        const stateDir = join(home, "state");
        withLedger(stateDir, (state) => {
          insertLedger(state, manyRows(name === "one" ? 30 : 20, name.length));
          addAttachment(state, { containerId: name });
        });
        const file = join(home, "plugins.toml");
        const listen = `agent = { listen = "127.0.0.1:0", report = ${name !== "shut"} }`;
        writeFileSync(
          file,
          `state_dir = "${stateDir}"\nconf_dir = "${home}"\naudit.keep = "3650d"\n${listen}\n`,
        );
        return { name, agent: startAgent(home, file) };
      });
      try {
        const urls: Record<string, string> = {};
        for (const { name, agent } of agents) {
          await agent.said("Metrics and health are served");
          urls[name] = `http://${/address=(\S+)/.exec(agent.log())?.[1]}`;
        }
        const old = reportOf(manyRows(10, 7));
        const servers = {
          garbage: () => new Response("\u001b[2J<html>"),
          old: answer({ ...old, genie: "0.0.1" }),
          later: answer({ ...old, version: 2, genie: "9.0.0" }),
        };
        await withServers(servers, async (more) => {
          const names = ["down", "garbage", "later", "old", "one", "shut", "two"];
          await withNodes(names, { ...urls, ...more }, async (who) => {
            const { status, stdout } = await cluster(who, "--json", "--limit=3", "--timeout=5m");
            expect(status).toBe(1);
            const report = JSON.parse(stdout) as ClusterReport;
            expect(report.record).toBe(`nodes of ${api.url}`);
            expect(report.nodes.map(({ node, error, genie }) => [node, error, genie])).toEqual([
              ["down", expect.stringContaining("status 503: error trying to reach"), ""],
              ["garbage", "the answer is not a JSON object", ""],
              ["later", expect.stringContaining("of version 2"), ""],
              ["old", "", "0.0.1"],
              ["one", "", manifest.version],
              ["shut", "404, it does not exist: agent.report of the plugin table is off", ""],
              ["two", "", manifest.version],
            ]);
            expect(report.totals).toMatchObject({ requests: 60, attachments: 2 });
            expect(report.failed.length).toBeLessThanOrEqual(3);
            const limited = await cluster(who, "--json", "--network=green", "--timeout=5m");
            const { networks, filter } = JSON.parse(limited.stdout) as ClusterReport;
            expect(filter.network).toBe("green");
            expect(networks.length).toBeGreaterThan(0);
            const pods = await ofCluster("pods", who, "--address=10.1.0.5", "--timeout=5m");
            expect(pods.status).toBe(1);
            expect(pods.stdout).toMatch(
              /^NODE +POD .*\none +team-a\/web .*\ntwo +team-a\/web .*\n$/,
            );
            expect(pods.stderr).toContain("node down is not in this: status 503");
            const ofOne = await ofCluster("pods", who, "--node=two", "team-a", "-o", "json");
            expect(JSON.parse(ofOne.stdout).attachments).toMatchObject([{ node: "two" }]);
            const wrong = await fetch(`${urls["one"]}/report?since=soon`);
            expect([wrong.status, await wrong.json()]).toEqual([
              400,
              { message: expect.stringContaining('Invalid --since "soon"') },
            ]);
            const direct = await cluster(`--endpoints=${urls["shut"]}`, "--timeout=5m");
            expect(direct.stdout).toContain("status 404: agent.report of the plugin table is off");
            for (const query of ["limit=1001", "html=/tmp/x", "pod=%00", "failed=maybe"]) {
              expect((await fetch(`${urls["two"]}/report?${query}`)).status).toBe(400);
            }
          });
        });
      } finally {
        await Promise.all(agents.map(({ agent }) => agent.end("SIGKILL")));
      }
    },
    120_000,
  );

  test("goes on without a node that is slow", async () => {
    const hang = () => Promise.withResolvers<Response>().promise;
    await withServers({ slow: hang }, async ({ slow = "" }) => {
      const { status, stdout } = await cluster(`--endpoints=${slow}`, "--timeout=100ms");
      expect(status).toBe(1);
      expect(stdout).toContain("no answer within 100 ms");
      expect(stdout).toStartWith("Nodes: 1, answered 0\n");
    });
  });

  test("asks agents at their addresses, sixteen at a time, without credentials", async () => {
    let now = 0;
    let most = 0;
    const asked: string[] = [];
    const held: (() => void)[] = [];
    const report = reportOf(manyRows(5, 8));
    const slowly = async (request: Request) => {
      asked.push(request.headers.get("Authorization") ?? "none");
      most = Math.max(most, ++now);
      await new Promise<void>((done) => held.push(done));
      now--;
      return Response.json(report);
    };
    await withServers({ all: slowly }, async ({ all = "" }) => {
      const urls = Array.from({ length: 40 }, (_, i) => `${all}/node-${i}`);
      const running = cluster(`--endpoints=${urls.join(",")}`, "--json", "--timeout=5m");
      await until(() => now === 16);
      const free = setInterval(() => held.shift()?.(), 1);
      const { status, stdout } = await running;
      clearInterval(free);
      expect(status).toBe(0);
      expect((JSON.parse(stdout) as ClusterReport).totals.requests).toBe(200);
      expect([most, new Set(asked)]).toEqual([16, new Set(["none"])]);
    });
  });

  test("asks the agents' pods of a namespace, an exec plugin once", async () => {
    const report = reportOf(manyRows(5, 9));
    await withServers({ node: answer(report) }, async ({ node }) => {
      const pod = (name: string, nodeName?: string, phase = "Running") =>
        api.put(`/api/v1/namespaces/net/pods/${name}`, {
          ...{ metadata: { labels: { "app.kubernetes.io/name": "genie" } } },
          ...{ spec: { ...(nodeName && { nodeName }) }, status: { phase } },
        });
      pod("genie-a", "a");
      pod("genie-b", "b");
      pod("genie-c", "c", "Failed");
      pod("genie-d");
      api.proxy = (name) => (/^genie-[ab]$/.test(name) ? node : undefined);
      const file = api.kubeconfig("exec");
      const credential = join(api.dir, "credential");
      const log = join(dir.path, "asked");
      const text = readFileSync(credential, "utf8").replace("\n", `\necho x >>${log}\n`);
      writeFileSync(credential, text, { mode: 0o755 });
      const ways = ["--agents=net", `--kubeconfig=${file}`, "--timeout=5m"];
      const { status, stdout } = await cluster(...ways, "--json");
      const { nodes } = JSON.parse(stdout) as ClusterReport;
      expect([status, nodes.map(({ node }) => node)]).toEqual([0, ["a", "b"]]);
      expect(readFileSync(log, "utf8")).toBe("x\n");
      expect(api.requests.at(-1)?.path).toMatch(
        /^\/api\/v1\/namespaces\/net\/pods\/genie-[ab]%3A9477\/proxy\/report\?limit=20$/,
      );
      delete api.proxy;
    });
  });

  test("shows people what is wrong first, in 80 columns and 200", async () => {
    const evil = "\u001b]0;own\u0007\u202e";
    const wrong = parsed(
      reportOf(
        manyRows(40, 10).map((row) => ({ ...row, error: row.error + evil, podName: evil })),
        (state) => addAttachment(state, { stuck: { state: "leaked", error: evil, atMs: startMs } }),
      ),
    );
    const merged = merge({ [`a${evil}`]: wrong, b: parsed(reportOf([])), c: `down ${evil}` });
    const { formatReport } = await import("../lib/report/text.ts");
    for (const width of [80, 200]) {
      const text = formatReport(merged, width);
      expect(text).toStartWith("Nodes: 3, answered 2\nPods: 1, failed 1 (100%)\nRequests: 40,");
      expect(text.indexOf("Nodes that are not")).toBeLessThan(text.indexOf("NETWORK "));
      expect(text).toContain("Newest failures, ");
      expect(text.replace(/\n {2}/g, " ")).toContain("failed 103: plugin bridge timed out");
      expect(text.split("\n").filter((line) => Bun.stringWidth(line) > width)).toEqual([]);
      // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must not be there
      expect(text).not.toMatch(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u202e]/);
    }
  });

  test("leaves out the domain that all nodes are in", async () => {
    const report = parsed(reportOf(manyRows(40, 10)));
    const { formatReport } = await import("../lib/report/text.ts");
    const nodesOf = (...names: string[]) => {
      const text = formatReport(
        merge(Object.fromEntries(names.map((name) => [name, report]))),
        Number.POSITIVE_INFINITY,
      );
      return names.map((name) => text.includes(`\n${name} `));
    };
    expect(nodesOf("a.example.org", "b.example.org")).toEqual([false, false]);
    expect(nodesOf("a.example.org", "b.example.com")).toEqual([true, true]);
    expect(nodesOf("10.0.0.1:9477", "11.0.0.1:9477")).toEqual([true, true]);
  });

  test("has a line for each node in --csv, and a page in --html", async () => {
    const report = reportOf(manyRows(5, 11));
    await withServers({ good: answer(report), bad: answer({}) }, async ({ good, bad }) => {
      const ways = [`--endpoints=${good},${bad}`, "--timeout=5m"];
      const { status, stdout } = await cluster(...ways, "--csv");
      const lines = stdout.split("\r\n").sort();
      expect([status, lines.length]).toEqual([1, 4]);
      const host = (url = "") => new URL(url).host;
      const of = (url = "") => lines.find((line) => line.startsWith(`${host(url)},`));
      expect(of(good)).toMatch(/^[^,]+,,[\d.]+,2026-[^,]+,5,/);
      expect(of(bad)).toMatch(/^[^,]+,"what it answers is no report: [^,]+",{16}$/);
      const file = join(dir.path, "cluster.html");
      expect(await cluster(...ways, "--html", file)).toMatchObject({ status: 1, stderr: "" });
      const page = readFileSync(file, "utf8");
      expect(page).toContain("<h2>Nodes</h2>");
      expect(page).toContain("1 of 2 answered");
      expect(page).not.toContain("Newest automatic choices");
    });
  });

  test("no node at all is a problem", async () => {
    const { status, stderr } = await cluster(kubeconfig(), "--agents=empty");
    expect(status).toBe(1);
    expect(stderr).toContain("404");
  });

  const refused: [args: string[], message: string][] = [
    [["pod", "a/b"], "--cluster shows all nodes"],
    [["--cni-config=x"], "--cluster asks the nodes"],
    [["--endpoints=http://a:1", "--agents=net"], "two ways"],
    [["--endpoints=http://a:1", "--port=1"], "excludes --port"],
    [["--endpoints=ftp://a"], "Invalid --endpoints"],
    [["--endpoints=http://user:word@a:1"], "Invalid --endpoints"],
    [["--endpoints="], "Invalid --endpoints"],
    [["--port=0"], "Invalid --port"],
    [["--timeout=soon"], "Invalid --timeout"],
    [["--limit=1001"], "up to 1000"],
    [["--json", "--csv"], "Only one of"],
  ];
  test.each(refused)("refuses %p", async (args, message) => {
    const { status, stdout, stderr } = await cluster(...args);
    expect([status, stdout]).toEqual([2, ""]);
    expect(stderr).toContain(message);
    expect(stderr).not.toContain("word");
  });

  test.each(["--agents=x", "--endpoints=x", "--kubeconfig=x", "--port=1", "--timeout=1s"])(
    "%s alone is refused",
    async (option) => {
      const host = makeHost();
      expect(await runCommand(host, ["report", option])).toBe(2);
      expect(host.written.stderr).toContain("needs --cluster");
    },
  );

  const files: [string, Record<string, string>, number, string][] = [
    ["several files", { KUBECONFIG: "/a:/b" }, 2, "several files"],
    ["one that is absent", { KUBECONFIG: "/absent/config" }, 1, "/absent/config"],
    ["none", { HOME: "/absent" }, 1, "Missing Kubernetes credentials"],
  ];
  test.each(files)("KUBECONFIG with %s", async (_name, env, status, message) => {
    const host = makeHost({ env });
    expect(await runCommand(host, ["report", "--cluster"])).toBe(status);
    expect(host.written.stderr).toContain(message);
  });
});
