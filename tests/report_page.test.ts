/**
 * The page of `genie report --html`, as text and in a real browser: lib/report/page.ts with its
 * script and style.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import type { State } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import { putAlive, putProblems } from "../lib/policy/store.ts";
import { startMerge } from "../lib/report/cluster_merge.ts";
import { parseReport, type Report } from "../lib/report/document.ts";
import { makePodReport, makeReport } from "../lib/report/model.ts";
import { formatPage } from "../lib/report/page.ts";
import { chartsOf } from "../lib/report/page_charts.ts";
import { formatCount } from "../lib/report/quantity.ts";
import { type Browser, type Loaded, type Look, startBrowser } from "./chromium.ts";
import { genieProgram, makeHost, runGenie } from "./fakes.ts";
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

const weekMs = 7 * 86_400_000;
const totals = new Map([["calico", { ipv4: 4000 }]]);
const evil = `</script><script>alert("x")</script><img src=x onerror=alert(1)>'\u2028\u0000`;

/** Knowledge of policies, and one that something is wrong with. */
function addPolicy(state: State, text: string): void {
  putAlive(state, new Map([["pods", startMs]]));
  const one = { kind: "NetworkPolicy", namespace: "team-a", name: text, path: "spec", text };
  putProblems(state, [one], startMs);
}

/** Rules that are in force on pod team-a/web. */
function addRuleset({ database }: State, text: string): void {
  database
    .query("INSERT INTO rulesets VALUES ('n', 'c1', 'team-a', 'web', ?, ?, '')")
    .run(text, startMs);
}

/** A node with so many requests in a week, 480 attachments and two that are stuck. */
function addNode(state: State, count: number): void {
  addBusyWeek(state, count);
  const chosen = { atMs: startMs + weekMs - 1, decidedBy: "choice", choice: choiceOfTwo };
  insertLedger(state, [ledgerRow({ ...chosen, network: "calico" })]);
  for (let i = 0; i < 480; i++) {
    addAttachment(state, {
      ...{ containerId: `a${i}`, network: "calico", pod: `web-${i}` },
      addresses: [`10.1.${i >> 8}.${i & 255}/16`],
    });
    addTraffic(state, { containerId: `a${i}`, network: "calico", rate: 20_000 });
  }
  const stuck = { error: "plugin weave-net exited with status 1", atMs: startMs };
  addAttachment(state, { containerId: "l", stuck: { ...stuck, state: "leaked" } });
  addAttachment(state, { containerId: "f", stuck: { ...stuck, state: "failing" } });
}

/** What each page shows; the folders of their records are made before all tests. */
const fills: Record<string, (state: State) => void> = {
  none: () => undefined,
  one: (state) => insertLedger(state, [ledgerRow()]),
  some: (state) => {
    addNode(state, 3000);
    addPolicy(state, 'operator "Inn" is not known: the element selects nothing');
  },
  many: (state) => addNode(state, 100_000),
  five: (state) => addFleet(state, 5),
  fleet: (state) => addFleet(state, 500),
  hostile: (state) => {
    const all = { network: evil, podName: evil, podNamespace: evil, decidedBy: evil, ifName: evil };
    const choice = JSON.stringify({ candidates: [{ network: evil, [evil]: 1 }], rejected: [] });
    insertLedger(state, [
      ledgerRow({ ...all, choice }),
      ledgerRow({ ...all, outcome: "denied", code: 100, error: evil, rule: evil }),
      ledgerRow({ ...all, outcome: "failed", code: 31_337, error: evil, command: evil }),
    ]);
    addPolicy(state, evil);
    addAttachment(state, {
      ...{ network: evil, pod: evil, namespace: evil },
      stuck: { state: "leaked", error: evil, atMs: startMs },
    });
  },
};

const reports = new Map<string, Report>();
const fileOf = (name: string) => join(dir.path, `${name}.html`);

beforeAll(() => {
  for (const [name, fill] of Object.entries(fills)) {
    const stateDir = join(dir.path, name);
    if (name !== "none") withLedger(stateDir, fill);
    const notices = name === "hostile" ? [evil] : [];
    const report = makeReport(
      makeHost({ now: startMs + weekMs }),
      { node: "n1", stateDir, totals, notices },
      { filter: name === "hostile" ? { namespace: evil } : {}, limit: 1000 },
    );
    reports.set(name, report);
    const rules = { at: report.generatedAt, ruleset: `drop # ${evil}`, hostRuleset: "" };
    const pods = [
      { ...rules, namespace: evil, pod: evil },
      { ...rules, namespace: "team-a", pod: "web-0" },
    ];
    writeFileSync(fileOf(name), formatPage(report, { rulesets: pods }));
  }
  const merge = startMerge({
    ...{ genie: "0.1.0", generatedAt: "2026-09-08T00:00:00.000Z", record: evil },
    ...{ notices: [evil], filter: none, limit: 20 },
  });
  for (const name of ["some", "hostile"]) {
    const read = parseReport(JSON.parse(JSON.stringify(reports.get(name))));
    if (typeof read === "string") throw new Error(read);
    merge.add(`${name} ${evil}`, read);
  }
  for (let i = 0; i < 400; i++) merge.addMissing(`node-${i}`, evil);
  writeFileSync(fileOf("cluster"), formatPage(merge.result()));
});
const none = { since: null, network: null, namespace: null, pod: null, command: null, only: null };

const page = (name: string) => readFileSync(fileOf(name), "utf8");

describe("the page", () => {
  test("of one pod tells its story, down to plugins and rules", () => {
    const stateDir = join(dir.path, "pod");
    const one = { network: "blue", podName: "web", containerId: "c1" };
    withLedger(stateDir, (state) => {
      insertLedger(state, [
        ledgerRow({ ...one, kind: "plugin", plugin: "bridge" }),
        ledgerRow(one),
        ledgerRow({ ...one, kind: "call", network: "pods" }),
        ledgerRow({ podName: "other", containerId: "c2" }),
      ]);
      addAttachment(state);
      addRuleset(state, "table inet genie {\n\tchain in { }\n}");
    });
    const source = { node: "n1", stateDir, totals, notices: [] };
    const host = makeHost({ now: startMs });
    const asked = { filter: { namespace: "team-a", pod: "web" }, limit: 100 };
    const pod = makePodReport(host, source, { namespace: "team-a", name: "web" }, asked);
    const rulesets = pod.rulesets ?? [];
    const text = formatPage(makeReport(host, source, asked), { rulesets, pod });
    const story =
      /<section id="story">.*?<\/section>/s.exec(text)?.[0].replace(/<[^>]+>/g, "") ?? "";
    for (const line of [
      "eth0 on blue: 10.1.0.5/16; attached since 2026-09-01 00:00:00; asked for by cni",
      "2026-09-01 00:00:00 ADD plugin bridge: ok (eth0, 12.0ms, because of annotation, 10.1",
      "2026-09-01 00:00:00 ADD blue: ok",
      "2026-09-01 00:00:00 ADD the call: ok",
      "Network policy in force since 2026-09-01 00:00:00",
      "table inet genie {\n  chain in { }\n}",
    ]) {
      expect(story).toContain(line);
    }
    expect(text).not.toContain("team-a/other");
  });

  test.each(Object.keys(fills))("of %s records is one file that names no other", (name) => {
    const text = page(name);
    const own = text.replace(/<pre>.*<\/pre>|\/\*!.*?\*\//gs, "");
    expect(own).not.toMatch(/\b(src|action|url|import|srcset)\s*=\s*["']|@import|url\(/i);
    const marked = own.replace(/<(style|script)\b.*?<\/\1>/gs, "");
    expect(marked.match(/\bhref\s*=\s*(?!"#[a-z]+\d*")/gi)).toBeNull();
    expect(text.match(/<script\b/g)).toHaveLength(3);
  });

  test("has its limits: a thousand rows of a kind, whatever there is", () => {
    const { failures, requests } = reports.get("many") ?? { failures: [], requests: [] };
    expect([failures.length, requests.length]).toEqual([1000, 1000]);
    expect(page("many").length).toBeLessThan(3_000_000);
    expect(page("none").length).toBeLessThan(100_000);
  });

  test("allows nothing but its own scripts and style", () => {
    const [, policy = ""] = /http-equiv="Content-Security-Policy" content="([^"]*)"/.exec(
      page("many"),
    ) ?? [""];
    const hash = "&#39;sha256-[A-Za-z0-9+/=]{44}&#39;";
    expect(policy).toMatch(
      new RegExp(
        `^default-src &#39;none&#39;; script-src ${hash} ${hash}; style-src ${hash}; ` +
          "base-uri &#39;none&#39;; form-action &#39;none&#39;$",
      ),
    );
  });

  test("tells of policies where there are some", () => {
    expect(page("some")).toContain("Policies known as of 2026-09-01 00:00:00 UTC.");
    expect(page("some")).toContain("spec: operator &quot;Inn&quot; is not known");
    expect(page("one")).not.toContain("Network policy");
  });

  test("draws free addresses: counted back from now, only where their number is known", () => {
    const report = reports.get("fleet");
    if (!report) throw new Error("There is no report");
    const { free } = chartsOf(report);
    expect(free?.series.map(({ name, total }) => [name, total])).toEqual([["calico", 4000]]);
    // Of 400 attachments the ledger knows two ADDs.
    expect([free?.series[0]?.free[0], free?.series[0]?.free.at(-1)]).toEqual([3602, 3600]);
    expect(page("fleet")).toContain("Not known for blue, storage.");
    expect(chartsOf(reports.get("hostile") ?? report).free).toBeNull();
  });

  test("draws at most twelve bars and eight networks, whatever there is", () => {
    const [report] = reports.values();
    if (!report) throw new Error("There is no report");
    const one = reports.get("one")?.networks[0];
    const names = Array.from({ length: 40 }, (_, i) => `network-${i}`);
    const charts = chartsOf({
      ...report,
      totals: { ...report.totals, add: one?.add ?? report.totals.add },
      networks: one ? names.map((network) => ({ ...one, network })) : [],
      decisions: names.map((network, i) => ({ network, decidedBy: `by-${i}`, requests: 1 })),
    });
    expect([charts.latency?.series.length, charts.decisions?.names.length]).toEqual([8, 12]);
    expect(charts.decisions?.series.map(({ name }) => name).at(-1)).toBe("others");
    expect(charts.decisions?.series).toHaveLength(8);
  });

  test("is written whole, for its owner alone, or not at all", async () => {
    const conf = join(dir.path, "genie.conf");
    const table = join(dir.path, "plugins.toml");
    writeFileSync(table, `state_dir = "${dir.path}/one"\nconf_dir = "${dir.path}/none"\n`);
    const own = { cniVersion: "1.0.0", name: "pods", type: "genie", plugins_file: table };
    writeFileSync(conf, JSON.stringify(own));
    const folder = join(dir.path, "out");
    mkdirSync(folder);
    const run = async (file: string) => {
      const host = makeHost({ now: startMs });
      const status = await runCommand(host, ["report", "--html", file, "--cni-config", conf]);
      return { status, ...host.written };
    };
    const file = join(folder, "report.html");
    writeFileSync(file, "older", { mode: 0o644 });
    expect(await run(file)).toEqual({ status: 0, stdout: `Wrote ${file}\n`, stderr: "" });
    expect(statSync(file).mode & 0o777).toBe(0o600);
    expect(readFileSync(file, "utf8")).toEndWith("</html>\n");
    mkdirSync(join(folder, "taken"));
    expect(await run(join(folder, "taken"))).toMatchObject({ status: 1, stdout: "" });
    expect((await run("/absent/report.html")).stderr).toBe(
      "genie: error: Cannot write /absent/report.html: ENOENT (code 5)\n",
    );
    // A folder that is a file: what cannot be written has nothing to take back.
    expect((await run(join(file, "report.html"))).stderr).toBe(
      `genie: error: Cannot write ${file}/report.html: ENOTDIR (code 5)\n`,
    );
    expect(readdirSync(folder).sort()).toEqual(["report.html", "taken"]);

    // To stdout, and of one pod: its story with the calls of its plugins.
    const asked = async (...words: string[]) => {
      const host = makeHost({ now: startMs });
      await runCommand(host, ["report", ...words, "--html", "-", "--cni-config", conf]);
      return host.written.stdout;
    };
    expect(await asked()).toStartWith("<!doctype html>");
    const whole = await asked("team-a/web");
    expect(whole).toContain(`<h1>Pod team-a/web on ${hostname()}</h1>`);
    expect(whole).toContain("<h2>The story of this pod</h2>");
    expect(await asked("team-a/api")).toContain("No requests in this time.");

    // The program as it is installed carries the library with it.
    const other = join(folder, "other.html");
    const args = ["report", "--html", other, "--cni-config", conf];
    const { status, stderr } = await runGenie(genieProgram(), {}, "", args);
    expect({ status, stderr }).toEqual({ status: 0, stderr: "" });
    expect(readFileSync(other, "utf8")).toContain("var uPlot=function()");
  });
});

const desk: Look = { width: 1280, height: 900 };
const phone: Look = { width: 390, height: 844, phone: true };

/** A node with three pods that fail again and again, and so many that are attached. */
function addFleet(state: State, count: number): void {
  const at = (minutes: number) => startMs + weekMs - 3_600_000 + minutes * 60_000;
  for (let i = 0; i < count; i++) {
    const one = { containerId: `f${i}`, pod: `app-${i}`, network: i % 5 === 0 ? "blue" : "calico" };
    addAttachment(state, { ...one, addresses: [`10.2.${i >> 8}.${i & 255}/16`] });
    if (i % 10 === 0) addAttachment(state, { ...one, network: "storage", ifName: "net1" });
  }
  const [bad, slow] = ["no address is free", "no answer in time"];
  for (let minute = 1; minute <= 20; minute++) {
    for (const [i, podName] of ["bad-0", "bad-1", "bad-2"].entries()) {
      const containerId = `${podName}-${minute}`;
      const one = { atMs: at(minute), podName, containerId, network: "calico", addresses: "" };
      const error = `${i === 2 ? slow : bad} for ${containerId}`;
      const code = i === 2 ? 103 : 11;
      insertLedger(state, [ledgerRow({ ...one, outcome: "failed", code, error })]);
    }
  }
  // It failed, and is attached by now.
  const healed = { podName: "app-1", containerId: "f1", network: "calico" };
  const once = { outcome: "failed", code: 7, error: "invalid master" } as const;
  // It failed, was attached, and is gone by now.
  const gone = { podName: "gone", containerId: "g", network: "calico" };
  insertLedger(state, [
    ledgerRow({ ...gone, ...once, atMs: at(25) }),
    ledgerRow({ ...gone, atMs: at(26) }),
    ledgerRow({ ...gone, command: "DEL", atMs: at(27) }),
    ledgerRow({ ...healed, ...once, atMs: at(30) }),
    ledgerRow({ ...healed, atMs: at(31), durationUs: 2_500_000 }),
    ledgerRow({ ...healed, podName: "app-2", containerId: "f2", atMs: at(32), durationUs: 900 }),
  ]);
}

describe.skipIf(lacks("chromium"))("the page in Chromium", () => {
  let browser: Browser;
  beforeAll(async () => {
    browser = await startBrowser();
  });
  afterAll(() => browser?.close());

  const look = <T>(name: string, how: Look, fn: (page: Loaded) => Promise<T>) =>
    browser.open(`file://${fileOf(name)}`, how, fn);
  const canvases = "document.querySelectorAll('.chart canvas').length";
  /** Canvases with something on them. */
  const drawn = `[...document.querySelectorAll(".chart canvas")].filter((canvas) =>
    canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
      .some((value) => value !== 0)).length`;
  const headings = "[...document.querySelectorAll('h2')].map((one) => one.textContent)";
  const emptyTexts = "[...document.querySelectorAll('.empty')].map((one) => one.textContent)";
  const wider = "document.documentElement.scrollWidth - innerWidth";

  const shown: [name: string, charts: number][] = [
    ["none", 0],
    ["one", 3],
    ["many", 7],
    ["hostile", 6],
    ["cluster", 6],
  ];
  /** Sections that not every page has. */
  const further: Record<string, string[]> = {
    hostile: ["Network policy"],
    cluster: ["Nodes", "Network policy"],
  };
  const looks: [name: string, look: Look][] = [
    ["a desk", desk],
    ["a phone", phone],
    ["a desk in the dark", { ...desk, dark: true }],
  ];
  const all = shown.flatMap(([name, charts]) =>
    looks.map(([where, how]) => [name, where, charts, how] as const),
  );
  test.each(all)("of %s records on %s", async (name, _where, charts, how) => {
    await look(name, how, async (page) => {
      expect(await page.evaluate<number>(canvases)).toBe(charts);
      expect(await page.evaluate<number>(drawn)).toBe(charts);
      expect(await page.evaluate<number>(wider)).toBe(0);
      expect(await page.evaluate<string[]>(headings)).toEqual([
        ...["Failures", "Map", "Attachments", "Networks"],
        ...(further[name] ?? []).filter((one) => one === "Nodes"),
        ...["Requests over time", "How long an ADD takes", "Failures by cause"],
        ...["Addresses in use", "Free addresses over time", "Choices made"],
        "Leaked and failing attachments",
        ...(further[name] ?? []).filter((one) => one !== "Nodes"),
        ...(name === "none" ? [] : ["Pods"]),
        "Newest requests",
      ]);
      expect({ problems: page.problems, requests: page.requests }).toEqual({
        ...{ problems: [], requests: [] },
      });
    });
  });

  test("says where there is nothing", async () => {
    await look("none", desk, async (page) => {
      expect(await page.evaluate<string[]>(emptyTexts)).toEqual([
        ...["No requests in this time.", "No network has requests or attachments."],
        ...["No pod is attached now.", "No network has requests or attachments."],
        ...["No requests in this time.", "No ADD succeeded in this time."],
        ...["No requests in this time.", "No attachment has an address."],
        expect.stringMatching(/^Not known: no network tells its size, there are no requests/),
        "No ADD in this time.",
        ...["None: every DEL came to its end.", "No requests in this time."],
      ]);
    });
  });

  test("shows hostile names as text", async () => {
    await look("hostile", desk, async (page) => {
      const text = await page.evaluate<string>("document.body.innerText");
      expect(text).toContain(`</script><script>alert("x")</script><img src=x onerror=alert(1)>'��`);
      expect(await page.evaluate<number>("document.querySelectorAll('img').length")).toBe(0);
      expect(page.problems).toEqual([]);
    });
  });

  /** Types into the search, and waits until it has been done. */
  const typed = (text: string) => `(() => {
    const input = document.getElementById("search");
    input.value = ${JSON.stringify(text)};
    input.dispatchEvent(new Event("input", { bubbles: true }));
    return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  })()`;
  const visible = (selector: string) =>
    `[...document.querySelectorAll(${JSON.stringify(selector)})]
      .filter((one) => one.checkVisibility())`;
  const texts = (selector: string) => `${visible(selector)}.map((one) => one.textContent)`;

  test("shows failures first: retries are one row, and who is attached by now", async () => {
    await look("fleet", desk, async (page) => {
      const cells = `${visible("#failures tbody tr")}.map((row) =>
        [2, 3, 4, 6, 7, 8].map((i) => row.cells[i].textContent).join(" | "))`;
      expect(await page.evaluate<string[]>(cells)).toEqual([
        "1 | team-a/app-1 | calico | 7 invalid config | invalid master | attached",
        "1 | team-a/gone | calico | 7 invalid config | invalid master | –",
        "20 | team-a/bad-2 | calico | 103 delegate timeout | no answer in time for bad-2-20 | –",
        "20 | team-a/bad-1 | calico | 11 try again later | no address is free for bad-1-20 | –",
        "20 | team-a/bad-0 | calico | 11 try again later | no address is free for bad-0-20 | –",
      ]);
      const about = await page.evaluate<string>(
        "document.querySelector('#failures .about').innerText",
      );
      expect(about).toStartWith("5 of 6 pods failed, in 62 tries");
    });
  });

  test("a search hides all else, and what it finds can be opened", async () => {
    await look("fleet", desk, async (page) => {
      const rows = await page.evaluate<number>(`${visible("tbody tr")}.length`);
      await page.evaluate(typed("app-33 calico"));
      expect(
        await page.evaluate<string[]>(
          texts("#attachments tbody th, #attachments tbody td:first-child"),
        ),
      ).toEqual(["", 1, 2, 3, 4, 6, 7, 8, 9].map((i) => `team-a/app-33${i}`));
      expect(await page.evaluate<string[]>(texts(".pods a span"))).toHaveLength(9);
      expect(await page.evaluate<string[]>(texts("main h2"))).toEqual([
        ...["Map", "Attachments"],
        ...["Networks", "Pods"],
      ]);
      expect(await page.evaluate<string>("found.textContent")).toBe("28 of 1,744 found");
      await page.evaluate(typed("10.2.1.33/16"));
      expect(await page.evaluate<string[]>(texts("#attachments tbody td:first-child"))).toEqual([
        "team-a/app-289",
      ]);
      await page.evaluate(typed("no address is free"));
      expect(await page.evaluate<number>(`${visible("#failures tbody tr")}.length`)).toBe(2);
      // Numbers below a chart are opened where they have it.
      await page.evaluate(typed("2026-09-07 23:30"));
      expect(await page.evaluate<string[]>(texts("#time tbody td:first-child"))).toEqual([
        "2026-09-07 23:30:00",
      ]);
      await page.evaluate(typed("nothing has this name"));
      expect(await page.evaluate<string[]>(texts("main h2"))).toEqual([]);
      // Escape brings all back.
      await page.press("Escape");
      expect(await page.evaluate<number>(`${visible("tbody tr")}.length`)).toBe(rows);
      await page.press("/");
      expect(await page.evaluate<string>("document.activeElement.id")).toBe("search");
      expect(page.problems).toEqual([]);
    });
  });

  test("a head sorts its table, by key too, and says so", async () => {
    await look("fleet", desk, async (page) => {
      const column = (table: string, i: number) =>
        page.evaluate<string[]>(
          `${visible(`${table} tbody tr`)}.slice(0, 4).map((row) => row.cells[${i}].textContent)`,
        );
      const sorts = (table: string) =>
        page.evaluate<string[]>(
          `[...document.querySelectorAll("${table} thead th")]
            .map((one) => one.getAttribute("aria-sort") ?? "")`,
        );
      const focus = (table: string, i: number) =>
        page.evaluate(`document.querySelectorAll("${table} thead button")[${i}].focus()`);
      await focus("#failures", 2);
      await page.press("Enter");
      expect(await column("#failures", 2)).toEqual(["20", "20", "20", "1"]);
      expect(await sorts("#failures")).toEqual(["", "", "descending", ...Array(6).fill("")]);
      await page.press("Enter");
      expect(await column("#failures", 2)).toEqual(["1", "1", "20", "20"]);
      expect((await sorts("#failures"))[2]).toBe("ascending");
      await focus("#requests", 4);
      await page.press("Enter");
      // 2.50s, 12.0ms, 900µs: by what they are worth, of all rows, not only of those shown.
      expect((await column("#requests", 4)).slice(0, 2)).toEqual(["2.50s", "12.0ms"]);
      await page.press("Enter");
      expect((await column("#requests", 4))[0]).toBe("900µs");
      await focus("#attachments", 0);
      await page.press("Enter");
      expect(await column("#attachments", 0)).toEqual([0, 0, 1, 2].map((i) => `team-a/app-${i}`));
      const scopes = await page.evaluate<string[]>(
        `[...new Set([...document.querySelectorAll("th")].map((one) => one.scope))].sort()`,
      );
      expect(scopes).toEqual(["col", "row"]);
    });
  });

  test("links lead to the section about a pod, a network, a cause", async () => {
    await look("fleet", desk, async (page) => {
      const click = (selector: string, text: string) =>
        page.evaluate(`(() => {
          const link = [...document.querySelectorAll(${JSON.stringify(selector)})].find((one) =>
            one.textContent === ${JSON.stringify(text)});
          link.click();
          return new Promise((done) => setTimeout(done, 100));
        })()`);
      const open = () =>
        page.evaluate<string[]>(
          `${visible("details.item[open]")}.map((one) => one.innerText.replaceAll("\\n", " "))`,
        );
      await click("#failures td a", "team-a/bad-1");
      expect((await open())[0]).toMatch(
        /^team-a\/bad-1 not attached, 20 failures Failed .*ADD 20 times, code 11: no address/,
      );
      await click(".item[open] a", "11");
      expect((await open()).find((one) => one.startsWith("try again later"))).toContain(
        "By network calico: 40",
      );
      await click("#failures td a", "calico");
      expect((await open()).find((one) => one.startsWith("calico"))).toContain(
        "4,000 addresses free",
      );
      // In the map, also where a search has hidden the section.
      await page.evaluate(typed("app-77"));
      await click(".pods a span", "app-77");
      const [pod = ""] = (await open()).filter((one) => one.startsWith("team-a/app-77 "));
      expect(pod).toContain("eth0 on calico: 10.2.0.77/16; attached since 2026-09-01 00:00:00");
      const seen = `(() => {
        const { top, bottom } = document.querySelector(location.hash).getBoundingClientRect();
        return top >= 0 && top < innerHeight && document.activeElement.tagName;
      })()`;
      expect(await page.evaluate<string>(seen)).toBe("SUMMARY");
      expect(page.problems).toEqual([]);
    });
  });

  test.each([
    ["five", 5],
    ["fleet", 500],
  ] as const)("the map of %s shows each pod on its networks", async (name, count) => {
    await look(name, desk, async (page) => {
      const networks = await page.evaluate<string[]>(texts(".network h4"));
      const blue = Math.ceil(count / 5);
      expect(networks).toEqual([
        `calico ${count - blue} attached · 3 failed · ` +
          `${formatCount(4000 - count + blue)} of 4,000 addresses free`,
        `blue ${blue} attached`,
        `storage ${Math.ceil(count / 10)} attached`,
      ]);
      const first = await page.evaluate<string[]>(texts(".network:first-child a.bad"));
      expect(first).toEqual(["bad-0", "bad-1", "bad-2"]);
      // A pod on two networks is marked on both.
      const same = `(() => {
        const link = document.querySelector('.pods a[title^="team-a/app-0:"]');
        link.dispatchEvent(new Event("focusin", { bubbles: true }));
        return [...document.querySelectorAll(".same")].map((one) => one.title.split(",")[1]).sort();
      })()`;
      expect(await page.evaluate<string[]>(same)).toEqual([" eth0", " net1"]);
      const height = await page.evaluate<number>("document.querySelector('.map').clientHeight");
      expect(height).toBeLessThan(900);
      expect(await page.evaluate<number>(wider)).toBe(0);
    });
  });

  test("on a phone, whatever is wider than it says so", async () => {
    await look("fleet", phone, async (page) => {
      const boxes = await page.evaluate<
        [cut: boolean, wide: boolean][]
      >(`${visible(".scroll")}.map((one) =>
        [one.classList.contains("cut"), one.scrollWidth > one.clientWidth + 1])`);
      expect(boxes.filter(([, wide]) => wide).length).toBeGreaterThan(0);
      expect(boxes.filter(([cut, wide]) => cut !== wide)).toEqual([]);
      // Cards can be sorted too.
      expect(await page.evaluate<number>(`${visible("#failures thead button")}.length`)).toBe(9);
    });
  });

  test("in print there is no bar, and nothing is wider than the paper", async () => {
    await look("fleet", { ...desk, width: 800, dark: true, print: true }, async (page) => {
      expect(await page.evaluate<number>(`${visible(".bar")}.length`)).toBe(0);
      expect(await page.evaluate<number>(wider)).toBe(0);
      const paper = "getComputedStyle(document.documentElement).getPropertyValue('--card').trim()";
      expect(await page.evaluate<string>(paper)).toBe("#ffffff");
    });
  });

  test("without scripts all rows are there, and no search", async () => {
    await look("fleet", { ...desk, withoutScripts: true }, async (page) => {
      expect(await page.evaluate<number>(`${visible("#attachments tbody tr")}.length`)).toBe(550);
      expect(await page.evaluate<number>(`${visible("#search")}.length`)).toBe(0);
    });
  });

  test("has the numbers without scripts too", async () => {
    await look("many", { ...desk, withoutScripts: true }, async (page) => {
      const picture = await page.screenshot();
      expect(picture.length).toBeGreaterThan(10_000);
      expect(page.problems).toEqual([]);
    });
    expect(page("many")).toContain('<td class="number" data-label="Requests"><span>52,');
  });

  test("tells what is under the pointer", async () => {
    await look("many", desk, async (page) => {
      const said = await page.evaluate<string>(`(() => {
        const area = document.querySelector('[data-chart="time"] .u-over');
        const { left, top, width, height } = area.getBoundingClientRect();
        const at = { clientX: left + width / 2, clientY: top + height / 2, bubbles: true };
        area.dispatchEvent(new MouseEvent("mouseenter", at));
        area.dispatchEvent(new MouseEvent("mousemove", at));
        return new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() =>
          resolve(document.querySelector("#time .readout").textContent))));
      })()`);
      expect(said).toMatch(/^2026-09-04 \d\d:00 UTC: [\d,]+ ok, \d+ failed, \d+ denied$/);
    });
  });

  test("does not move while it is drawn, and follows the window's width and the dark", async () => {
    const tops = "[...document.querySelectorAll('h2')].map((one) => one.getBoundingClientRect().y)";
    const still = await look("many", desk, (page) => page.evaluate<number[]>(tops));
    const text = page("many").replace(/<script>.*<\/script>/s, "");
    const bare = join(dir.path, "bare.html");
    writeFileSync(bare, text);
    await browser.open(`file://${bare}`, desk, async (page) => {
      expect(await page.evaluate<number[]>(tops)).toEqual(still);
    });
    await look("many", desk, async (page) => {
      await page.change({ ...desk, width: 700, dark: true });
      const widths = await page.evaluate<number[]>(`[...document.querySelectorAll(".uplot")].map(
        (one) => one.getBoundingClientRect().width - one.parentElement.clientWidth)`);
      expect(widths).toEqual([0, 0, 0, 0, 0, 0, 0]);
      expect(await page.evaluate<number>(drawn)).toBe(7);
      expect(page.problems).toEqual([]);
    });
  });

  const contrasts: [name: string, look: Look][] = [
    ["in the light", desk],
    ["in the dark", { ...desk, dark: true }],
  ];
  test.each(contrasts)("has texts of good contrast %s", async (_name, how) => {
    await look("many", how, async (page) => {
      const colours = await page.evaluate<Record<string, string>>(`(() => {
        const style = getComputedStyle(document.documentElement);
        const names = ["card", "good", "warn", "text", "muted", "accent", "failed"];
        return Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name)]));
      })()`);
      const { card = "", ...texts } = colours;
      const ratios = Object.values(texts).map((one) => contrast(one.trim(), card.trim()));
      expect(ratios.filter((ratio) => !(ratio >= 4.5))).toEqual([]);
    });
  });
});

/** Contrast of two colours, WCAG 2.2. */
function contrast(one: string, other: string): number {
  const luminance = (colour: string) => {
    const [red = 0, green = 0, blue = 0] = [1, 3, 5].map((at) => {
      const part = Number.parseInt(colour.slice(at, at + 2), 16) / 255;
      return part <= 0.040_45 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const [dark = 0, light = 0] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
}
