/** What was measured, for people: tables, one line per comparison, and which targets hold. Pure. */
import { formatTable } from "../../lib/table.ts";
import type { Series, Storm } from "./measure.ts";
import { baselineOf, scenarios, stormScenario, type Verb } from "./scenarios.ts";

/** The middle of a list; NaN of an empty one. */
export function median(values: number[]): number {
  return quantile(values, 0.5);
}

/** The smallest value that at least `share` of the values do not exceed; NaN of an empty list. */
export function quantile(values: number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? Number.NaN;
}

/** One operation of one scenario, in figures. */
export interface Summary {
  scenario: string;
  verb: Verb;
  wallMs: number;
  wallMsP95: number;
  cpuMs: number;
  peakMiB: number;
  privateMiB: number;
  /** Against the baseline; absent where there is none. */
  over?: { baseline: string; wallMs: number; ratio: number; cpuMs: number; peakMiB: number };
}

const mib = 1024 * 1024;

/** Condenses every series and compares it with its baseline. */
export function summarize(all: Series[]): Summary[] {
  const found = all.map(
    (one): Summary => ({
      scenario: one.scenario,
      verb: one.verb,
      wallMs: median(one.wallMs),
      wallMsP95: quantile(one.wallMs, 0.95),
      cpuMs: median(one.cpuMs),
      peakMiB: median(one.peakBytes) / mib,
      privateMiB: median(one.privateBytes) / mib,
    }),
  );
  return found.map((one) => {
    const scenario = scenarios.find(({ name }) => name === one.scenario);
    const baseline = scenario && baselineOf(scenario, one.verb);
    const other = found.find((base) => base.scenario === baseline && base.verb === one.verb);
    if (!baseline || !other) return one;
    const over = {
      baseline,
      wallMs: one.wallMs - other.wallMs,
      ratio: one.wallMs / other.wallMs,
      cpuMs: one.cpuMs - other.cpuMs,
      peakMiB: one.peakMiB - other.peakMiB,
    };
    return { ...one, over };
  });
}

/** The table of all scenarios, grouped by operation. */
export function formatSummaries(all: Summary[], width: number): string {
  const columns = ["ms", "p95", "over base", "ratio", "CPU ms", "over base", "peak MiB", "private"];
  const verbs = [...new Set(all.map(({ verb }) => verb))];
  const rows = verbs.flatMap((verb) => all.filter((one) => one.verb === verb));
  return formatTable(
    [
      { title: "operation" },
      { title: "contender", shrinks: true },
      ...columns.map((title) => ({ title, align: "right" as const })),
    ],
    rows.map(({ scenario, verb, wallMs, wallMsP95, cpuMs, peakMiB, privateMiB, over }) => [
      verb,
      scenario,
      wallMs.toFixed(1),
      wallMsP95.toFixed(1),
      over ? signed(over.wallMs) : "",
      over ? over.ratio.toFixed(2) : "",
      cpuMs.toFixed(1),
      over ? signed(over.cpuMs) : "",
      Number.isNaN(peakMiB) ? "" : peakMiB.toFixed(1),
      Number.isNaN(privateMiB) ? "" : privateMiB.toFixed(1),
    ]),
    width,
  );
}

/** `genie 1 network ADD: 8.9 ms over bare 1 network (11.2 → 20.1), CPU +9.0 ms, 41 MiB`. */
export function formatComparisons(all: Summary[]): string {
  return all
    .flatMap(({ scenario, verb, wallMs, cpuMs, peakMiB, over }) => {
      if (!over) return [];
      const from = (wallMs - over.wallMs).toFixed(1);
      const peak = Number.isNaN(peakMiB) ? "" : `, ${Math.round(peakMiB)} MiB`;
      return [
        `${scenario} ${verb}: ${over.wallMs.toFixed(1)} ms over ${over.baseline} ` +
          `(${from} → ${wallMs.toFixed(1)}), CPU ${signed(over.cpuMs)} ms ` +
          `(${cpuMs.toFixed(1)})${peak}\n`,
      ];
    })
    .join("");
}

function signed(value: number): string {
  return value < 0 ? value.toFixed(1) : `+${value.toFixed(1)}`;
}

/** All storms of one scenario and operation. */
function totals(storms: Storm[], scenario: string, verb: Verb) {
  const found = storms.filter((one) => one.scenario === scenario && one.verb === verb);
  const sum = (pick: (one: Storm) => number) => found.reduce((all, one) => all + pick(one), 0);
  return {
    runs: found.length,
    count: found[0]?.count ?? 0,
    wallMs: sum(({ wallMs }) => wallMs),
    cpuMs: sum(({ cpuMs }) => cpuMs),
    peakMiB: Math.max(...found.map(({ memoryBytes }) => memoryBytes)) / mib,
    failures: found.flatMap(({ failures }) => failures),
  };
}

function stormBaseline(): string {
  return scenarios.find(({ name }) => name === stormScenario)?.baseline ?? "";
}

/** The table of the storms: one row per scenario and operation, all of its storms together. */
export function formatStorms(storms: Storm[], width: number): string {
  const columns = ["at once", "storms", "s each", "ratio", "CPU s each", "memory MiB", "failed"];
  const rows = (["ADD", "DEL"] as const).flatMap((verb) =>
    [stormBaseline(), stormScenario].map((scenario) => {
      const all = totals(storms, scenario, verb);
      const base = totals(storms, stormBaseline(), verb);
      return [
        `storm ${verb}`,
        scenario,
        String(all.count),
        String(all.runs),
        (all.wallMs / all.runs / 1000).toFixed(2),
        scenario === stormScenario ? (all.wallMs / base.wallMs).toFixed(2) : "",
        (all.cpuMs / all.runs / 1000).toFixed(2),
        all.peakMiB.toFixed(0),
        String(all.failures.length),
      ];
    }),
  );
  return formatTable(
    [
      { title: "operation" },
      { title: "contender", shrinks: true },
      ...columns.map((title) => ({ title, align: "right" as const })),
    ],
    rows,
    width,
  );
}

/** One thing that shall hold; `value` is undefined when it was not measured. */
interface Target {
  name: string;
  max: number;
  unit: string;
  value: number | undefined;
}

/** Targets for pods with network objects, in ms over their bare delegates. */
const objectTargets = [
  { scenario: "genie API 1 object", max: 19 },
  { scenario: "genie API 4 objects", max: 23 },
  { scenario: "genie API 1 object, 10 ms away", max: 45 },
];

/** Every target with what was measured. They inform: missing one fails nothing. */
export function targets(all: Summary[], storms: Storm[]): Target[] {
  const of = (scenario: string, verb: Verb) =>
    all.find((one) => one.scenario === scenario && one.verb === verb);
  const plain = (one: Summary) => one.scenario.startsWith("genie") && !one.scenario.includes("API");
  const peak = (some: Summary[]) => {
    const known = some.map(({ peakMiB }) => peakMiB).filter((value) => !Number.isNaN(value));
    return known.length > 0 ? Math.max(...known) : undefined;
  };
  const [one, api] = ["genie 1 network", "genie API 1 network"];
  const stormAdd = totals(storms, stormScenario, "ADD").wallMs;
  return [
    {
      name: "ADD of 1 network over bare",
      max: 11,
      unit: "ms",
      value: of(one, "ADD")?.over?.wallMs,
    },
    {
      name: "DEL of 1 network over bare, CPU",
      max: 11,
      unit: "ms",
      value: of(one, "DEL")?.over?.cpuMs,
    },
    {
      name: "ADD with the pod from the API, over bare",
      max: 18,
      unit: "ms",
      value: of(api, "ADD")?.over?.wallMs,
    },
    ...objectTargets.map(({ scenario, max }) => ({
      name: `ADD of ${scenario.replace("genie ", "")}, over bare`,
      max,
      unit: "ms",
      value: of(scenario, "ADD")?.over?.wallMs,
    })),
    { name: "peak memory without API", max: 48, unit: "MiB", value: peak(all.filter(plain)) },
    {
      name: "peak memory with API",
      max: 64,
      unit: "MiB",
      value: peak(all.filter(({ scenario }) => scenario.includes("API"))),
    },
    {
      name: "storm of ADDs, times bare",
      max: 2.4,
      unit: "",
      value: stormAdd && stormAdd / totals(storms, stormBaseline(), "ADD").wallMs,
    },
  ].map((target) => ({ ...target, value: target.value || undefined }));
}

/** One line per target. */
export function formatTargets(all: Target[]): string {
  return all
    .map(({ name, max, unit, value }) => {
      const verdict = value === undefined ? "not measured" : value <= max ? "holds" : "MISSED";
      const found = value === undefined ? "" : `: ${value.toFixed(1)} ${unit}`.trimEnd();
      return `${verdict.padEnd(12)}  ${name}${found} (target ${max} ${unit}`
        .trimEnd()
        .concat(")\n");
    })
    .join("");
}
