/** What shall hold, as data, and whether it does. Pure. */
import type { ScaleFigures } from "./scale.ts";
import { stormScenarios, type Verb } from "./scenarios.ts";
import type { Storm } from "./storm.ts";
import { median, type Summary } from "./summary.ts";

/** One thing that shall hold; `value` is undefined when it was not measured. */
export interface Target {
  /** Whose row it is about: `ADD genie 1 network`. */
  row: string;
  what: string;
  max: number;
  unit: string;
  value: number | undefined;
}

/** Of one operation of one scenario. */
const ofSummaries: [verb: Verb, scenario: string, what: keyof typeof measures, max: number][] = [
  ["ADD", "genie 1 network", "time over bare", 9],
  ["DEL", "genie 1 network", "CPU over bare", 9],
  ["ADD", "genie API 1 network", "time over bare", 15],
  ["ADD", "genie 1 network", "peak memory", 40],
  ["ADD", "genie API 1 network", "peak memory", 56],
  ["ADD", "genie API 4 objects", "peak memory", 56],
  ["STATUS", "genie 1 network", "time over the floor", 1],
  ["VERSION", "genie 1 network", "time over the floor", 1],
];

const measures = {
  "time over bare": { unit: "ms", of: (one: Summary) => one.over?.wallMs },
  "time over the floor": { unit: "ms", of: (one: Summary) => one.over?.wallMs },
  "CPU over bare": { unit: "ms", of: (one: Summary) => one.over?.cpuMs },
  "peak memory": { unit: "MiB", of: (one: Summary) => one.peakMiB },
};

/** A storm of so many ADDs, in times of what the bare plugins take. */
const stormTarget = { count: 100, max: 2.1 };

/** How much more an ADD may take with the largest record, and what a choice may add to it. */
const scaleTargets = { addPercent: 10, choiceMs: 3 };

/** Every target with what was measured. They inform: missing one fails nothing. */
export function targets(
  summaries: Summary[],
  storms: Storm[],
  scale: ScaleFigures | undefined,
): Target[] {
  const [stormScenario = ""] = stormScenarios;
  const all = ofSummaries.map(([verb, scenario, what, max]): Target => {
    const found = summaries.find((one) => one.scenario === scenario && one.verb === verb);
    const value = found && measures[what].of(found);
    const { unit } = measures[what];
    return { row: `${verb} ${scenario}`, what, max, unit, value: known(value) };
  });
  const { count, max } = stormTarget;
  const storm = `storm of ${count} ADDs`;
  const ratio = stormRatio(storms, { scenario: stormScenario, verb: "ADD", count });
  return [
    ...all,
    { row: `${storm} ${stormScenario}`, what: "time by bare", max, unit: "times", value: ratio },
    {
      row: "ADD largest record",
      what: "time over the smallest record",
      max: scaleTargets.addPercent,
      unit: "%",
      value: known(scale?.addPercent),
    },
    {
      row: "ADD largest record, choice",
      what: "time over a named network",
      max: scaleTargets.choiceMs,
      unit: "ms",
      value: known(scale?.choiceMs),
    },
  ];
}

function known(value: number | undefined): number | undefined {
  return value === undefined || Number.isNaN(value) ? undefined : value;
}

/** The median time of storms by that of the bare plugins; undefined where one is missing. */
export function stormRatio(
  storms: Storm[],
  { scenario, verb, count }: { scenario: string; verb: Verb; count: number },
  baseline = "bare 1 network",
): number | undefined {
  const timeOf = (name: string) =>
    median(
      storms
        .filter((one) => one.scenario === name && one.verb === verb && one.count === count)
        .filter(({ memory }) => memory === undefined)
        .map(({ wallMs }) => wallMs),
    );
  return known(timeOf(scenario) / timeOf(baseline));
}

/** `holds`, `MISSED` or `not measured`. */
export function verdict({ value, max }: Target): string {
  return value === undefined ? "not measured" : value <= max ? "holds" : "MISSED";
}
