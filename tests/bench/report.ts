/** What was measured, for people: a table each, for a terminal and as Markdown. Pure. */
import { formatTable } from "../../lib/report/table.ts";
import type { Anatomy, Floors } from "./anatomy.ts";
import type { ScaleFigures } from "./scale.ts";
import { oldName, type Verb } from "./scenarios.ts";
import type { Storm } from "./storm.ts";
import { median, mib, quantile, type Summary } from "./summary.ts";
import { overFloors, stormRatio, type Target, units, verdict } from "./targets.ts";

/** All that one run of the bench found. What was not measured is empty or absent. */
export interface Findings {
  summaries: Summary[];
  storms: Storm[];
  scale?: ScaleFigures;
  anatomies: Anatomy[];
  floors?: Floors;
  targets: Target[];
  /** Names of the peers, and what they could not do. */
  peers: string[];
  peerNotes: string[];
}

/** A heading, what to know before reading, and a table. */
export interface Section {
  title: string;
  notes: string;
  columns: string[];
  /** So many columns from the left hold words; the others hold numbers. */
  words: number;
  rows: string[][];
}

/** Every section that has something to say. */
export function sections(found: Findings): Section[] {
  return [
    targetSection(found),
    operationSection(found),
    compareSection(found),
    peerSection(found),
    stormSection(found),
    scaleSection(found),
    stageSection(found),
    anatomySection(found),
    floorSection(found),
  ].filter(({ rows }) => rows.length > 0);
}

/** For a terminal. */
export function formatSections(all: Section[], width: number): string {
  return all
    .map(({ title, notes, columns, words, rows }) => {
      const table = formatTable(
        columns.map((name, i) => ({
          title: name,
          ...(i === 1 && { shrinks: true }),
          ...(i >= words && { align: "right" as const }),
        })),
        rows,
        width,
      );
      return `${title}${notes === "" ? "" : `. ${notes}`}\n\n${table}\n`;
    })
    .join("");
}

/** For tests/bench/results.md. */
export function formatMarkdown(all: Section[], head: string): string {
  const line = (cells: string[]) => `| ${cells.join(" | ")} |\n`;
  return [
    `# What genie costs\n\n${head}\n`,
    ...all.map(({ title, notes, columns, words, rows }) => {
      const rule = columns.map((_, i) => (i < words ? "---" : "--:"));
      const table = [columns, rule, ...rows].map(line).join("");
      return `\n## ${title}\n\n${notes === "" ? "" : `${notes}\n\n`}${table}`;
    }),
  ].join("");
}

function targetSection({ targets }: Findings): Section {
  return {
    title: "Targets",
    notes:
      "In floors: times what a compiled Bun program that only reads stdin and answers takes in " +
      "the same rounds, CPU time by the CPU time of it.",
    columns: ["verdict", "row", "what", "target", "measured"],
    words: 3,
    rows: targets.map((target) => [
      verdict(target),
      target.row,
      target.what,
      `${target.max} ${target.unit}`,
      target.value === undefined
        ? ""
        : `${target.value.toFixed(units[target.unit])} ${target.unit}`,
    ]),
  };
}

/** What a row shall keep and whether it does: `time over bare 1.1 floors: holds`. */
function targetsOf(targets: Target[], row: string): string {
  return targets
    .filter((one) => one.row === row)
    .map((one) => `${one.what} ${one.max} ${one.unit}: ${verdict(one)}`)
    .join("; ");
}

function operationSection({ summaries, targets }: Findings): Section {
  const verbs = [...new Set(summaries.map(({ verb }) => verb))];
  const inOrder = verbs.flatMap((verb) => summaries.filter((one) => one.verb === verb));
  return {
    title: "One pod at a time",
    notes:
      "Medians; time from the spawn until the process is reaped, CPU with all that it calls, " +
      'peak memory of the process itself, "private" what it shares with no other. The difference ' +
      "and the ratio are to the bare plugins of the same networks; of VERSION and STATUS to the " +
      "floor, a compiled Bun program that only reads stdin and answers. In floors: by the time, " +
      "or the CPU time, of the floor's row of the same operation.",
    columns: [
      ...["operation", "contender", "ms", "floors", "quartiles", "p90", "over base", "in floors"],
      ...["times", "CPU ms", "over base", "in floors", "peak MiB", "private", "target"],
    ],
    words: 2,
    rows: inOrder.map((one) => [
      one.verb,
      one.scenario,
      one.wallMs.toFixed(1),
      ratio(one.wallMs, one.floor?.wallMs),
      one.quartilesMs.map((ms) => ms.toFixed(1)).join("-"),
      one.wallMsP90.toFixed(1),
      one.over ? signed(one.over.wallMs) : "",
      signed(overFloors(one), 2),
      one.over ? one.over.ratio.toFixed(2) : "",
      one.cpuMs.toFixed(1),
      one.over ? signed(one.over.cpuMs) : "",
      one.over ? signed(one.over.cpuMs / (one.floor?.cpuMs ?? Number.NaN), 2) : "",
      fixed(one.peakMiB, 1),
      fixed(one.privateMiB, 1),
      targetsOf(targets, `${one.verb} ${one.scenario}`),
    ]),
  };
}

/** Genie beside another genie: every operation of the rounds, every storm. */
function compareSection({ summaries, storms }: Findings): Section {
  const ofRounds = summaries.flatMap((one) => {
    const old = summaries.find(
      ({ scenario, verb }) => scenario === oldName(one.scenario) && verb === one.verb,
    );
    if (!old) return [];
    return [
      [
        ...[one.verb, one.scenario, one.wallMs.toFixed(1), old.wallMs.toFixed(1)],
        ...[ratio(old.wallMs, one.wallMs), signed(overFloors(one), 2), signed(overFloors(old), 2)],
        ...[one.cpuMs.toFixed(1), old.cpuMs.toFixed(1), ratio(old.cpuMs, one.cpuMs)],
        ...[fixed(one.peakMiB, 1), fixed(old.peakMiB, 1), ratio(old.peakMiB, one.peakMiB)],
        ...[fixed(one.ownFaults, 0), fixed(old.ownFaults, 0), ratio(old.ownFaults, one.ownFaults)],
      ],
    ];
  });
  const keys = [...new Set(storms.map((one) => `${one.count} ${one.verb} ${one.scenario}`))];
  const ofStorms = keys.flatMap((key) => {
    const [count, verb = "", ...words] = key.split(" ");
    const scenario = words.join(" ");
    const of = (name: string | undefined) =>
      storms.filter(
        (one) => one.scenario === name && one.verb === verb && one.count === Number(count),
      );
    const [mine, olds] = [of(scenario), of(oldName(scenario))].map(middle);
    if (!mine || !olds) return [];
    return [
      [
        ...[`${count} ${verb}`, scenario, mine.wallMs.toFixed(0), olds.wallMs.toFixed(0)],
        ...[ratio(olds.wallMs, mine.wallMs), "", ""],
        ...[mine.cpuMs.toFixed(0), olds.cpuMs.toFixed(0), ratio(olds.cpuMs, mine.cpuMs)],
        ...["", "", "", "", "", ""],
      ],
    ];
  });
  return {
    title: "Beside another genie",
    notes:
      "Of the same run, in turns; the ratio is the other's by this one's, so above 1 this one " +
      "takes less. In floors: over the base.",
    columns: [
      ...["operation", "contender", "ms", "other", "ratio", "floors over base", "other"],
      ...["CPU ms", "other", "ratio", "peak MiB", "other", "ratio", "page faults", "other"],
      "ratio",
    ],
    words: 2,
    rows: [...ofRounds, ...ofStorms],
  };
}

/** The medians of those storms that time was measured in; undefined where there is none. */
function middle(storms: Storm[]): { wallMs: number; cpuMs: number } | undefined {
  const timed = storms.filter(({ memory }) => memory === undefined);
  if (timed.length === 0) return undefined;
  return {
    wallMs: median(timed.map(({ wallMs }) => wallMs)),
    cpuMs: median(timed.map(({ cpuMs }) => cpuMs)),
  };
}

/** Genie and its peers, task by task. */
function peerSection({ summaries, peers, peerNotes }: Findings): Section {
  const contenders = ["genie", ...peers];
  const tasks = [
    ...new Set(
      peers.flatMap((peer) =>
        summaries
          .filter(({ scenario }) => scenario.startsWith(`${peer} `))
          .map(({ scenario, verb }) => `${verb} ${scenario.slice(peer.length + 1)}`),
      ),
    ),
  ].sort();
  const rows = tasks.flatMap((task) =>
    contenders.flatMap((contender) =>
      summaries
        .filter(({ verb, scenario }) => `${contender} ${task}` === swapped(verb, scenario))
        .map((one) => [
          task,
          contender,
          one.wallMs.toFixed(1),
          ratio(one.wallMs, one.floor?.wallMs),
          one.over ? signed(one.over.wallMs) : "",
          signed(overFloors(one), 2),
          one.over ? one.over.ratio.toFixed(2) : "",
          one.cpuMs.toFixed(1),
          fixed(one.peakMiB, 1),
        ]),
    ),
  );
  return {
    title: "Beside other delegating plugins",
    notes: [
      "From the same rounds, with the same pods, plugins and API server over TLS.",
      ...peerNotes.map((note) => `${note}.`),
    ].join(" "),
    columns: [
      ...["task", "contender", "ms", "floors", "over bare", "in floors", "times", "CPU ms"],
      "peak MiB",
    ],
    words: 2,
    rows,
  };

  /** `genie ADD API 1 network` of ADD and `genie API 1 network`. */
  function swapped(verb: Verb, scenario: string): string {
    const name = contenders.find((one) => scenario.startsWith(`${one} `)) ?? "";
    return `${name} ${verb}${scenario.slice(name.length)}`;
  }
}

function stormSection({ storms, targets }: Findings): Section {
  const keys = [...new Set(storms.map(({ count, verb }) => `${count} ${verb}`))];
  const names = [...new Set(storms.map(({ scenario }) => scenario))];
  const rows = keys.flatMap((key) => {
    const [count = 0, verb] = [Number.parseInt(key, 10), key.split(" ")[1] as Verb];
    return names.flatMap((scenario) => {
      const all = storms.filter(
        (one) => one.scenario === scenario && one.verb === verb && one.count === count,
      );
      const timed = all.filter(({ memory }) => memory === undefined);
      const watched = all.flatMap(({ memory }) => memory ?? []);
      if (timed.length === 0) return [];
      const timesOf = (baseline: string) =>
        fixed(stormRatio(storms, { scenario, verb, count }, baseline) ?? Number.NaN, 2);
      const largest = (pick: (one: (typeof watched)[number]) => number) =>
        watched.length === 0 ? "" : (Math.max(...watched.map(pick)) / mib).toFixed(0);
      return [
        [
          ...[`${count} ${verb}`, scenario, String(timed.length)],
          (median(timed.map(({ wallMs }) => wallMs)) / 1000).toFixed(2),
          ...[timesOf("floor"), timesOf("bare 1 network")],
          (median(timed.map(({ cpuMs }) => cpuMs)) / 1000).toFixed(2),
          largest(({ peakBytes }) => peakBytes),
          largest(({ sumBytes }) => sumBytes),
          largest(({ machineBytes }) => machineBytes),
          String(all.reduce((sum, { failures }) => sum + failures.length, 0)),
          targetsOf(targets, `storm of ${count} ${verb}s ${scenario}`),
        ],
      ];
    });
  });
  return {
    title: "Storms",
    notes:
      "All started at once, nothing holds them back; seconds until the last is reaped, medians. " +
      "In floors: by a storm of as many floors. " +
      "Memory in a further storm: the largest peak of one process, the sum of all that lived at " +
      "the worst moment (Pss: shared pages counted once), and how much less the machine had.",
    columns: [
      ...["storm", "contender", "storms", "s", "floors", "times bare", "CPU s", "peak MiB"],
      ...["sum MiB", "machine MiB", "failed", "target"],
    ],
    words: 2,
    rows,
  };
}

function scaleSection({ scale, targets }: Findings): Section {
  const [first] = scale?.series ?? [];
  const floorMs = median(scale?.floorMs ?? []);
  return {
    title: "Cost by size of the record",
    notes: scale
      ? "The plugin is a shell script of two lines. The largest record has " +
        `${(scale.fileBytes / mib).toFixed(0)} MiB. A choice is among 8 networks.`
      : "",
    columns: [
      ...["live attachments", "network", "ledger rows", "ADD ms", "floors", "more", "DEL ms"],
      ...["floors", "target"],
    ],
    words: 2,
    rows: (scale?.series ?? []).map(({ live, rows, isChoice, addMs, delMs }, i, all) => {
      const isLargest = !isChoice && i === all.length - 2;
      const row = isChoice ? "ADD largest record, choice" : "ADD largest record";
      return [
        ...[String(live), isChoice ? "chosen by genie" : "named", String(rows)],
        ...[median(addMs).toFixed(1), ratio(median(addMs), floorMs)],
        first ? `${signed((median(addMs) / median(first.addMs) - 1) * 100)} %` : "",
        ...[median(delMs).toFixed(1), ratio(median(delMs), floorMs)],
        isLargest || isChoice ? targetsOf(targets, row) : "",
      ];
    }),
  };
}

function stageSection({ anatomies, floors }: Findings): Section {
  const floorUs = median(floors?.floorMs ?? []) * 1000;
  const traced = anatomies.filter(({ stages }) => stages.length > 0);
  const names = [...new Set(traced.flatMap(({ stages }) => stages.flatMap(Object.keys)))];
  return {
    title: "Where the time of a call goes",
    notes:
      "Medians in µs, by GENIE_TRACE=1, behind each the same in floors. What is before genie's " +
      'first line and after its last is "start and end"; "attach" holds the plugins.',
    columns: ["stage", ...traced.map(({ scenario, verb }) => `${verb} ${scenario}`)],
    words: 1,
    rows: names.map((name) => [
      name,
      ...traced.map(({ stages }) => {
        const us = median(stages.flatMap((one) => one[name] ?? []));
        return [fixed(us, 0), ratio(us, floorUs)].filter((text) => text !== "").join(" / ");
      }),
    ]),
  };
}

function anatomySection({ anatomies, summaries }: Findings): Section {
  const orNot = (value: number, digits = 0) => fixed(value, digits) || "not available";
  const more = (value: number, base: number | undefined) =>
    base === undefined || Number.isNaN(value - base) ? "" : signed(value - base, 0);
  return {
    title: "System calls, page faults, instructions",
    notes:
      "Medians. System calls (strace -f -c) and instructions in user mode (perf stat) are of the " +
      "whole tree of processes, page faults also of the called process alone. What is over the " +
      "bare plugins of the same networks is genie's.",
    columns: [
      ...["operation", "contender", "system calls", "over base", "page faults", "over base"],
      ...["its own", "over the floor", "million instructions"],
    ],
    words: 2,
    rows: anatomies.map(({ scenario, verb, baseline, systemCalls, instructions }) => {
      const base = anatomies.find((one) => one.scenario === baseline && one.verb === verb);
      const faultsOf = (name: string | undefined) => {
        const one = summaries.find((other) => other.scenario === name && other.verb === verb);
        return one && { own: one.ownFaults, all: one.ownFaults + one.childFaults };
      };
      const faults = faultsOf(scenario) ?? { own: Number.NaN, all: Number.NaN };
      return [
        ...[verb, scenario, orNot(median(systemCalls))],
        more(median(systemCalls), base && median(base.systemCalls)),
        orNot(faults.all),
        more(faults.all, faultsOf(baseline)?.all),
        orNot(faults.own),
        more(faults.own, faultsOf("floor")?.own),
        orNot(median(instructions) / 1e6, 1),
      ];
    }),
  };
}

function floorSection({ floors, summaries }: Findings): Section {
  const floorMs = median(floors?.floorMs ?? []);
  const row = (name: string, values: number[]) => [
    ...[name, median(values).toFixed(2), ratio(median(values), floorMs)],
    ...[quantile(values, 0.9).toFixed(2), ""],
  ];
  const compared = summaries.filter(({ over }) => over?.baseline === "floor");
  return {
    title: "Floors",
    notes: "The least there could be on this machine, and how close the smallest operations come.",
    columns: ["what", "ms", "floors", "p90", "over the floor"],
    words: 1,
    rows: !floors
      ? []
      : [
          row("spawn and wait of /bin/true", floors.spawnMs),
          row("4 KiB written and synced where the record is", floors.fsyncMs),
          row("the floor", floors.floorMs),
          ...compared.map((one) => [
            ...[`${one.verb} of ${one.scenario}`, one.wallMs.toFixed(2)],
            ...[ratio(one.wallMs, one.floor?.wallMs), one.wallMsP90.toFixed(2)],
            one.over ? signed(one.over.wallMs) : "",
          ]),
        ],
  };
}

/** One by another, "" where one of them was not measured. */
function ratio(value: number, base = Number.NaN): string {
  return fixed(value / base, 2);
}

function signed(value: number, digits = 1): string {
  if (Number.isNaN(value)) return "";
  return value < 0 ? value.toFixed(digits) : `+${value.toFixed(digits)}`;
}

function fixed(value: number, digits: number): string {
  return Number.isNaN(value) ? "" : value.toFixed(digits);
}
