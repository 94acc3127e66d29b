/** The bench: its arithmetic, its options, its peers, a short run of all of it, and its results. */
import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { readCount, readStages } from "./bench/anatomy.ts";
import { benchNeeds, readOptions } from "./bench/options.ts";
import { fillTemplate, needFolders, readPeer } from "./bench/peers.ts";
import { formatMarkdown, formatSections, sections } from "./bench/report.ts";
import type { Storm } from "./bench/storm.ts";
import { median, quantile, type Summary, summarize } from "./bench/summary.ts";
import { targets, verdict } from "./bench/targets.ts";
import { fakePlugin, tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";

const root = join(import.meta.dir, "..");
describe("quantile()", () => {
  test.each<[number[], number, number]>([
    [[3, 1, 2], 0.5, 2],
    [[4, 1, 3, 2], 0.5, 2],
    [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.9, 9],
    [[5], 0.25, 5],
    [[], 0.5, Number.NaN],
  ])("of %j at %d is %d", (values, share, expected) => {
    expect(quantile(values, share)).toBe(expected);
    if (share === 0.5) expect(median(values)).toBe(expected);
  });
});

/** One series of every figure alike. */
const series = (scenario: string, ms: number, baseline?: string) => ({
  ...{ scenario, verb: "ADD" as const, ...(baseline !== undefined && { baseline }) },
  ...{ wallMs: [ms, ms + 1, ms - 1], cpuMs: [ms], peakBytes: [2 ** 25], privateBytes: [2 ** 20] },
  ...{ ownFaults: [10], childFaults: [5] },
});

describe("summarize()", () => {
  test("compares with the baseline of the same operation, where it was measured", () => {
    const all = [series("bare", 10), series("genie", 25, "bare"), series("lone", 5, "absent")];
    expect(summarize(all).map(({ over }) => over)).toEqual([
      undefined,
      { baseline: "bare", wallMs: 15, ratio: 2.5, cpuMs: 15 },
      undefined,
    ]);
    expect(summarize(all)[1]).toMatchObject({ wallMs: 25, quartilesMs: [24, 26], peakMiB: 32 });
  });
});

describe("targets()", () => {
  const summary = (wallMs: number): Summary => ({
    ...{ scenario: "genie 1 network", verb: "ADD", wallMs, quartilesMs: [1, 2], wallMsP90: 3 },
    ...{ cpuMs: 1, peakMiB: Number.NaN, privateMiB: 1, ownFaults: 1, childFaults: 1 },
    over: { baseline: "bare 1 network", wallMs, ratio: 1, cpuMs: 1 },
  });
  const storms = (genieMs: number): Storm[] =>
    ["bare 1 network", "genie 1 network"].map((scenario, i) => ({
      ...{ scenario, verb: "ADD", count: 100, cpuMs: 1, failures: [] },
      wallMs: i === 0 ? 100 : genieMs,
    }));
  test.each<[string, number, number, string]>([
    ["both hold", 9, 210, "holds holds"],
    ["both are missed", 9.1, 211, "MISSED MISSED"],
  ])("%s", (_name, overMs, stormMs, expected) => {
    const all = targets([summary(overMs)], storms(stormMs), undefined);
    const judged = ["ADD genie 1 network", "storm of 100 ADDs genie 1 network"].map((row) =>
      all.find((one) => one.row === row),
    );
    expect(judged.map((one) => one && verdict(one)).join(" ")).toBe(expected);
    // Not a number is no measurement.
    const memory = all.find(({ what }) => what === "peak memory");
    expect(memory && verdict(memory)).toBe("not measured");
  });
});

describe("report", () => {
  const findings = {
    ...{ summaries: summarize([series("bare 1 network", 10), series("floor", 4)]), storms: [] },
    ...{ anatomies: [], targets: targets([], [], undefined), peers: [], peerNotes: [] },
  };
  test("says what was measured, the same to terminals and as Markdown", () => {
    const all = sections(findings);
    expect(all.map(({ title }) => title)).toEqual(["Targets", "One pod at a time"]);
    const markdown = formatMarkdown(all, "Here.");
    expect(markdown).toStartWith("# What genie costs\n\nHere.\n\n## Targets\n\n| verdict |");
    expect(markdown).toContain("| ADD | bare 1 network | 10.0 | 9.0-11.0 | 11.0 |");
    expect(formatSections(all, 200)).toMatch(/^ADD +bare 1 network +10\.0 +9\.0-11\.0 /m);
  });
});

describe("readOptions()", () => {
  test.each<[string, string[], object]>([
    ["nothing", [], { rounds: 31, stormCounts: [100, 300], only: "", peers: [] }],
    ["--quick", ["--quick"], { rounds: 3, stormCounts: [10], storms: 1, results: "" }],
    ["a part", ["--only", "storms"], { parts: ["storms"], only: "", results: "" }],
    ["a contender", ["--only", "API"], { parts: ["rounds"], only: "API", results: "" }],
    ["no storm", ["--storm", "0"], { stormCounts: [] }],
    [
      "two peers",
      ["--peer", "/a", "--peer", "/b", "--peer-conf", "c", "--peer-conf", "d"],
      {
        peers: [
          { binary: "/a", conf: "c" },
          { binary: "/b", conf: "d" },
        ],
      },
    ],
    ["--help", ["--help"], { status: 0 }],
    ["an unknown contender", ["--only", "nobody"], { status: 2 }],
    ["no rounds", ["--rounds", "0"], { status: 2 }],
    ["a storm of words", ["--storm", "many"], { status: 2 }],
    ["a peer without a config", ["--peer", "/a"], { status: 2 }],
    ["an unknown option", ["--fast"], { status: 2 }],
  ])("%s", (_name, args, expected) => {
    expect(readOptions(args)).toMatchObject(expected);
  });
});

describe("anatomy", () => {
  test.each<[string, string, Record<string, number>]>([
    [
      "a trace among other lines",
      'x\n{"genieTraceUs":{"request":500,"attach":1500}}\n',
      { "start and end": 8000, request: 500, attach: 1500 },
    ],
    ["no trace", "x\n", {}],
  ])("readStages() of %s", (_name, stderr, expected) => {
    expect(readStages(stderr, 10_000)).toEqual(expected);
  });

  const strace = "100.00    0.000231           1       138         3 total\n";
  test.each<[string, "strace" | "perf", string, number | undefined]>([
    ["strace", "strace", `% time\n  9.09 0.1 1 12 read\n${strace}`, 138],
    ["strace without errors", "strace", "100.00    0.000231           1       77 total\n", 77],
    ["strace that could not", "strace", "", undefined],
    ["perf", "perf", "# started\n\n52345678,,instructions:u,100,100.00,,\n", 52345678],
    ["perf that could not", "perf", "<not supported>,,instructions:u,0,100.00,,\n", undefined],
  ])("readCount() of %s", (_name, tool, text, expected) => {
    expect(readCount(tool, text)).toBe(expected);
  });
});

describe("peers", () => {
  test("fillTemplate() knows its words and leaves others", () => {
    const template = '{"a":"{{CONF_DIR}}/x","b":["{{NETWORK}}"],"c":"{{OTHER}}"}';
    expect(fillTemplate(template, { CONF_DIR: "/c", NETWORK: "net0" })).toEqual({
      ...{ a: "/c/x", b: ["net0"], c: "{{OTHER}}" },
    });
  });

  test.each(["multus.json", "cni-genie.json"])("%s is a config for a peer", (file) => {
    const conf = join(import.meta.dir, "bench", "peers", file);
    const peer = readPeer({ binary: "/x/peer-1.2", conf });
    expect(peer.name).toBe("peer-1.2");
    expect(peer.template).toContain("{{KUBECONFIG}}");
    // CNI-Genie reads the folders of the node, wherever it is told to.
    expect(needFolders([peer])).toBe(file === "cni-genie.json");
  });

  test.each(["[]", "{}", "{"])("readPeer() refuses %s", (text) => {
    using dir = tempDir();
    const conf = join(dir.path, "conf.json");
    writeFileSync(conf, text);
    expect(() => readPeer({ binary: "/x", conf })).toThrow();
  });
});

test.skipIf(lacks("the binary", ...benchNeeds))(
  "a short bench measures everything, peers too, and leaves nothing",
  async () => {
    using dir = tempDir();
    using tmp = tempDir();
    const at = (name: string) => join(dir.path, name);
    const script = (answer: string) => `#!/bin/sh\ncat >>${at("stdin")}\n${answer}\n`;
    const no = '{"cniVersion":"1.0.0","code":7,"msg":"not \\"today\\""}';
    fakePlugin(dir.path, "able-1.0", script(`echo '{"cniVersion":"1.0.0"}'`));
    fakePlugin(dir.path, "unable-2.0", script(`echo '${no}'\nexit 1`));
    writeFileSync(at("conf"), '{"cniVersion":"1.0.0","x":"{{CONF_DIR}}","y":"{{NETWORK}}"}');
    const peer = (name: string) => ["--peer", at(name), "--peer-conf", at("conf")];
    const binary = join(root, "dist", "genie");
    const words = ["--quick", "--rounds", "1", "--storm", "3", "--results", at("results.md")];
    const built = existsSync(binary) ? ["--binary", binary] : [];
    const child = Bun.spawn(
      [
        ...[process.execPath, join(import.meta.dir, "bench", "bench.ts"), ...words, ...built],
        ...["--json", at("json"), ...peer("able-1.0"), ...peer("unable-2.0")],
      ],
      { env: { ...process.env, TMPDIR: tmp.path }, stdout: "pipe", stderr: "pipe" },
    );
    const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    expect({ stderr, status: await child.exited }).toEqual({ stderr: "", status: 0 });
    expect(readdirSync(tmp.path)).toEqual([]);

    const markdown = readFileSync(at("results.md"), "utf8");
    const titles = [...markdown.matchAll(/^## (.*)$/gm)].map(([, title = ""]) => title);
    expect(titles).toEqual([
      ...["Targets", "One pod at a time", "Beside other delegating plugins", "Storms"],
      ...["Cost by size of the record", "Where the time of a call goes"],
      ...["System calls, page faults, instructions", "Floors"],
    ]);
    for (const title of titles) expect(stdout).toContain(title);
    expect(markdown).not.toMatch(/NaN|undefined|Infinity/);
    expect(markdown).not.toContain(tmp.path);
    expect(markdown).toMatch(/^\| ADD \| able-1\.0 API 4 objects \| \d/m);
    expect(markdown).toMatch(/^\| 3 ADD \| able-1\.0 API 1 network \| 1 \| \d/m);
    expect(markdown).toContain('unable-2.0 API 1 network ADD: not available, it says "not ');
    expect(markdown).not.toMatch(/^\| ADD \| unable/m);
    expect(readFileSync(at("stdin"), "utf8")).toMatch(/"x":"[^"{]*net\.d-1\.0\.0","y":"net0"/);

    const { anatomies, series: all } = JSON.parse(readFileSync(at("json"), "utf8"));
    const ofAdd = (scenario: string) => (one: { scenario: string; verb: string }) =>
      one.scenario === scenario && one.verb === "ADD";
    const stages = Object.keys(anatomies.find(ofAdd("genie 1 network")).stages[0]);
    expect(stages.slice(0, 2)).toEqual(["start and end", "request"]);
    expect(stages).toContain("attach");
    // The delegates are children of genie, and of nobody where they are called as they are.
    expect(all.find(ofAdd("genie 1 network")).childFaults[0]).toBeGreaterThan(100);
    expect(all.find(ofAdd("floor")).childFaults).toEqual([0]);
  },
  240_000,
);

/**
 * The figures of a text that no figure of the results rounds to. Counts and names are no figures:
 * what stands in code spans, versions, and how many of something there are.
 */
function unfounded(text: string, results: string): string[] {
  const found = [...results.matchAll(/\d+(?:\.\d+)?/g)].map(([number]) => Number(number));
  const plain = text
    .replaceAll(/`[^`]*`/g, " ")
    .replaceAll(/\b\d+ (?:cores?|ADDs|DELs|pods)\b/g, " ");
  return [...plain.matchAll(/(?<![\w.])\d+(?:\.(\d+))?(?![\w.]*\w)/g)]
    .filter(([number, decimals = ""]) => {
      const quoted = Number(number).toFixed(decimals.length);
      return !found.some((one) => one.toFixed(decimals.length) === quoted);
    })
    .map(([number]) => number);
}

describe("the figures of the README", () => {
  test.each<[string, string[]]>([
    ["ADD +12.6 ms (7.6 → 20.2), 42 MiB on 2 cores, `bun@1.4.5`", []],
    ["ADD +13 ms, 100 ADDs 2.0 times", ["2.0"]],
    ["ADD +12.5 ms", ["12.5"]],
    ["44 MiB", ["44"]],
  ])("unfounded() in %j: %j", (text, expected) => {
    const results = "| ADD | 20.2 | +12.6 | 7.6 |\n| 41.8 | 2.12 |\n";
    expect(unfounded(text, results)).toEqual(expected);
  });

  test("are those of tests/bench/results.md, once it refers to them", () => {
    const readme = readFileSync(join(root, "README.md"), "utf8");
    const [, section = ""] = /\n## Performance\n(.*?)(?:\n## |$)/s.exec(readme) ?? [];
    expect(section).not.toBe("");
    if (!section.includes("tests/bench/results.md")) return;
    const results = readFileSync(join(import.meta.dir, "bench", "results.md"), "utf8");
    expect(unfounded(section, results)).toEqual([]);
  });
});
