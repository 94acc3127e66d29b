/** The bench: its arithmetic, its options, its peers, a short run of all of it, and its results. */
import { describe, expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { readCount, readStages } from "./bench/anatomy.ts";
import { writeIdlePlugin } from "./bench/idle.ts";
import { loadOrder } from "./bench/modules.ts";
import { copyAtOnce } from "./bench/node.ts";
import { benchNeeds, readOptions } from "./bench/options.ts";
import { fillTemplate, needFolders, readPeer } from "./bench/peers.ts";
import { formatMarkdown, formatSections, sections } from "./bench/report.ts";
import { scenarios, type Verb, withOld } from "./bench/scenarios.ts";
import type { Storm } from "./bench/storm.ts";
import { median, quantile, type Summary, summarize } from "./bench/summary.ts";
import { targets, verdict } from "./bench/targets.ts";
import { buildIfStale, binary as built } from "./build.ts";
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
    expect(summarize(all)[1]?.floor).toBeUndefined();
  });

  test("gives each the empty program of the same operation", () => {
    const other = { ...series("floor", 3), verb: "DEL" as const };
    const all = [series("floor", 4), other, series("genie", 25)];
    expect(summarize(all)[2]?.floor).toEqual({ wallMs: 4, cpuMs: 4, peakMiB: 32, ownFaults: 10 });
  });
});

describe("targets()", () => {
  /** One that takes `overMs` more than its baseline, on a machine whose floor is 10 ms. */
  const summary = (scenario: string, overMs: number, verb: Verb = "ADD"): Summary => ({
    ...{ scenario, verb, wallMs: overMs + 5, quartilesMs: [1, 2], wallMsP90: 3 },
    ...{ cpuMs: 1, peakMiB: Number.NaN, privateMiB: 1, ownFaults: 900, childFaults: 1 },
    over: { baseline: "b", wallMs: overMs, ratio: 1, cpuMs: overMs / 2 },
    floor: { wallMs: 10, cpuMs: 5, peakMiB: 30, ownFaults: 450 },
  });
  const storms = (genieMs: number, failures: string[] = []): Storm[] =>
    ["bare 1 network", "genie 1 network"].map((scenario, i) => ({
      ...{ scenario, verb: "ADD", count: 100, cpuMs: 1, failures: i === 0 ? [] : failures },
      wallMs: i === 0 ? 100 : genieMs,
    }));
  const one = (overMs: number, verb?: Verb) => [summary("genie 1 network", overMs, verb)];
  const apart = (overMs: number) => [
    ...[summary("genie API 1 object", 10), summary("genie API 1 object, 10 ms away", overMs)],
  ];
  const five = (overMs: number) => [...one(10), summary("genie 5 networks", overMs)];
  const further = ["ADD genie 5 networks", "each further network over bare"] as const;
  const peer = (overMs: number) => [
    ...[summary("genie API 1 network", 20), summary("cni-genie-1 API 1 network", overMs)],
  ];
  test.each<[string, string, Summary[], Storm[], string]>([
    ["ADD genie 1 network", "time over bare", one(11), [], "1.1 holds"],
    ["ADD genie 1 network", "time over bare", one(11.1), [], "1.11 MISSED"],
    ["DEL genie 1 network", "CPU over bare", one(11, "DEL"), [], "1.1 holds"],
    ["DEL genie 1 network", "CPU over bare", one(12, "DEL"), [], "1.2 MISSED"],
    ["STATUS genie 1 network", "time over the floor", one(3, "STATUS"), [], "0.3 holds"],
    ["STATUS genie 1 network", "time over the floor", one(4, "STATUS"), [], "0.4 MISSED"],
    ["ADD genie idle plugin", "whole call", [summary("genie idle plugin", 14)], [], "1.9 holds"],
    ["ADD genie idle plugin", "whole call", [summary("genie idle plugin", 15)], [], "2 MISSED"],
    [...further, five(15), [], "0.125 holds"],
    [...further, five(18), [], "0.2 MISSED"],
    // Without one of the two there is nothing to say.
    [...further, five(15).slice(1), [], "not measured"],
    ["ADD genie 1 network", "page faults over the floor", one(1), [], "450 holds"],
    // Not a number is no measurement.
    ["ADD genie 1 network", "peak memory over the floor", one(1), [], "not measured"],
    ["ADD genie API 1 object, 10 ms away", "ms over bare", apart(27), [], "27 holds"],
    ["ADD genie API 1 object, 10 ms away", "ms over bare", apart(28), [], "28 MISSED"],
    ["ADD genie API 1 object, 10 ms away", "ms over the object nearby", apart(37), [], "27 holds"],
    ["ADD genie API 1 network", "time over bare by that of cni-genie-1", peer(20), [], "1 holds"],
    [
      "ADD genie API 1 network",
      "time over bare by that of cni-genie-1",
      peer(16),
      [],
      "1.25 MISSED",
    ],
    ["storm of 100 ADDs genie 1 network", "time by bare", [], storms(200), "2 holds"],
    ["storm of 100 ADDs genie 1 network", "time by bare", [], storms(201), "2.01 MISSED"],
    ["storms of 100, all of genie", "failed calls", [], storms(1), "0 holds"],
    ["storms of 100, all of genie", "failed calls", [], storms(1, ["locked"]), "1 MISSED"],
    ["storms of 100, all of genie", "failed calls", [], [], "not measured"],
  ])("%s, %s", (row, what, summaries, stormed, expected) => {
    const found = targets(summaries, stormed, undefined).filter(
      (target) => target.row === row && target.what === what,
    );
    const said = found.map((target) =>
      [target.value === undefined ? [] : Number(target.value.toFixed(3)), verdict(target)]
        .flat()
        .join(" "),
    );
    expect(said).toEqual([expected]);
  });
});

describe("withOld()", () => {
  test("puts the same task of the other genie behind each of genie's, and of nobody else's", () => {
    const all = withOld(scenarios);
    expect(all.filter(({ name }) => !name.startsWith("old "))).toEqual([...scenarios]);
    const names = all.map(({ name }) => name);
    const mine = names.filter((name) => name.startsWith("genie "));
    expect(mine.map((name) => names[names.indexOf(name) + 1])).toEqual(
      mine.map((name) => name.replace("genie", "old")),
    );
    expect(new Set(names).size).toBe(scenarios.length + mine.length);
  });
});

describe("the plugin that does nothing", () => {
  const answer = '{"cniVersion":"1.0.0"}';
  test.each<[string, Record<string, string>, string]>([
    ["ADD", { PATH: "/", CNI_COMMAND: "ADD", CNI_IFNAME: "eth0" }, `${answer}\n`],
    ["DEL", { PATH: "/", CNI_COMMAND: "DEL", CNI_IFNAME: "eth0" }, ""],
    ["ADDED", { CNI_COMMAND: "ADDED" }, ""],
    ["nothing", {}, ""],
  ])("answers %s", (_name, env, expected) => {
    using dir = tempDir();
    const path = join(dir.path, "idle");
    writeIdlePlugin(path, answer);
    // More than a pipe holds: it reads to the end.
    const stdin = Buffer.alloc(200_000, 32);
    const child = Bun.spawnSync([path], { env, stdin });
    expect(child.exitCode).toBe(0);
    // Where it is a script it cannot tell what it is asked.
    expect(child.stdout.toString()).toBe(process.arch === "x64" ? expected : `${answer}\n`);
  });
});

test("a distance hands on every byte in its order, and takes its time", async () => {
  using server = Bun.serve({ port: 0, fetch: async (request) => new Response(request.body) });
  const program = join(import.meta.dir, "bench", "distance.ts");
  const far = Bun.spawn([process.execPath, program, String(server.port), "20"]);
  try {
    let port = "";
    for await (const chunk of far.stdout) {
      port += new TextDecoder().decode(chunk);
      if (port.endsWith("\n")) break;
    }
    const body = Array.from({ length: 60_000 }, (_, i) => String(i)).join(" ");
    const startMs = performance.now();
    const answer = await fetch(`http://127.0.0.1:${port.trim()}/`, { method: "POST", body });
    expect(await answer.text()).toBe(body);
    // One round for the connection and one for the request: never less, however fast all else is.
    expect(performance.now() - startMs).toBeGreaterThan(38);
  } finally {
    far.kill();
    await far.exited;
  }
});

describe("copyAtOnce()", () => {
  test("copies a program over another, with the right to run it", () => {
    using dir = tempDir();
    const [from, to] = [join(dir.path, "from"), join(dir.path, "to")];
    writeFileSync(from, Buffer.alloc(3_000_000, 7));
    writeFileSync(to, "old", { mode: 0o600 });
    copyAtOnce(from, to);
    expect(readFileSync(to).equals(readFileSync(from))).toBe(true);
    expect(statSync(to).mode & 0o777).toBe(0o755);
    expect(() => copyAtOnce(join(dir.path, "absent"), to)).toThrow("ENOENT");
  });
});

describe("report", () => {
  const findings = {
    summaries: summarize([series("bare 1 network", 10), series("floor", 4)]),
    storms: [] as Storm[],
    ...{ anatomies: [], targets: targets([], [], undefined), peers: [], peerNotes: [] },
  };
  test("says what was measured, the same to terminals and as Markdown", () => {
    const all = sections(findings);
    expect(all.map(({ title }) => title)).toEqual(["Targets", "One pod at a time"]);
    const markdown = formatMarkdown(all, "Here.");
    expect(markdown).toStartWith("# What genie costs\n\nHere.\n\n## Targets\n\nIn floors: ");
    expect(markdown).toContain("| ADD | bare 1 network | 10.0 | 2.50 | 9.0-11.0 | 11.0 |");
    expect(formatSections(all, 200)).toMatch(/^ADD +bare 1 network +10\.0 +2\.50 +9\.0-11\.0 /m);
  });

  test("prints another genie beside this one, with the ratio of each row", () => {
    const storm = (scenario: string, wallMs: number): Storm => ({
      ...{ scenario, verb: "ADD", count: 100, wallMs, cpuMs: wallMs / 2, failures: [] },
    });
    const all = sections({
      ...findings,
      summaries: summarize([
        ...[series("floor", 4), series("genie 1 network", 10), series("old 1 network", 15)],
        series("genie 2 networks", 9),
      ]),
      storms: [storm("genie 1 network", 400), storm("old 1 network", 500)],
    });
    const section = all.find(({ title }) => title === "Beside another genie");
    expect(section?.rows.map((row) => row.slice(0, 5))).toEqual([
      ["ADD", "genie 1 network", "10.0", "15.0", "1.50"],
      ["100 ADD", "genie 1 network", "400", "500", "1.25"],
    ]);
    expect(section?.rows.every((row) => row.length === section.columns.length)).toBe(true);
  });
});

describe("readOptions()", () => {
  test.each<[string, string[], object]>([
    ["nothing", [], { rounds: 31, stormCounts: [100, 300], only: "", peers: [] }],
    ["--quick", ["--quick"], { rounds: 3, stormCounts: [10], storms: 1, results: "" }],
    ["another genie", ["--compare", "/old"], { compare: "/old", results: "" }],
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
    const words = ["--quick", "--rounds", "1", "--storm", "3", "--results", at("results.md")];
    const binary = existsSync(built) ? ["--binary", built] : [];
    const child = Bun.spawn(
      [
        ...[process.execPath, join(import.meta.dir, "bench", "bench.ts"), ...words, ...binary],
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
  600_000,
);

test.skipIf(lacks("the binary", ...benchNeeds))(
  "a short bench of some contenders runs another genie beside this one",
  async () => {
    using tmp = tempDir();
    const binary = existsSync(built) ? built : buildIfStale();
    const words = ["--quick", "--rounds", "1", "--only", "idle", "--binary", binary];
    const child = Bun.spawn(
      [process.execPath, join(import.meta.dir, "bench", "bench.ts"), ...words, "--compare", binary],
      { env: { ...process.env, TMPDIR: tmp.path }, stdout: "pipe", stderr: "pipe" },
    );
    const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    expect({ stderr, status: await child.exited }).toEqual({ stderr: "", status: 0 });
    expect(stdout).toMatch(/^ADD +old idle plugin +\d/m);
    const [, beside = ""] = stdout.split("\nBeside another genie.");
    expect(beside).toMatch(/^ADD +genie idle plugin +\d+\.\d +\d+\.\d +\d\.\d\d /m);
    expect(beside).toMatch(/^DEL +genie idle plugin /m);
    expect(readdirSync(tmp.path)).toEqual([]);
  },
  120_000,
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

test("modules are loaded after those that they import, each once", () => {
  const paths = loadOrder("lib/attach.ts").map(({ path }) => path);
  expect(new Set(paths).size).toBe(paths.length);
  expect(paths.at(-1)).toBe("lib/attach.ts");
  for (const [before, after] of [
    ["lib/json.ts", "lib/result.ts"],
    ["lib/exec.ts", "lib/delegate.ts"],
    ["lib/delegate.ts", "lib/attach.ts"],
  ]) {
    expect(paths.indexOf(before ?? "")).toBeLessThan(paths.indexOf(after ?? ""));
  }
  // Types load nothing, and rooms are loaded when they are needed.
  expect(paths.filter((path) => path.split("/").length > 2 || path === "lib/call.ts")).toEqual([]);
});
