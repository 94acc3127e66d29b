/**
 * What shall hold, as data, and whether it does. Pure. Times are in floors, the time of an empty
 * compiled Bun program in the same rounds, because machines differ in that by far more than in what
 * genie costs beside it. CPU time is in the CPU time of the same program.
 */
import type { ScaleFigures } from "./scale.ts";
import { stormScenarios, type Verb } from "./scenarios.ts";
import type { Storm } from "./storm.ts";
import { type Floor, median, type Summary } from "./summary.ts";

/** One thing that shall hold; `value` is undefined when it was not measured. */
export interface Target {
  /** Whose row it is about: `ADD genie 1 network`. */
  row: string;
  what: string;
  max: number;
  unit: Unit;
  value: number | undefined;
}

/** Each with the digits that it is shown with. */
export const units = { floors: 2, times: 2, ms: 1, MiB: 1, "%": 1, faults: 0, failures: 0 };
type Unit = keyof typeof units;

/** Of one operation of one scenario. */
const ofSummaries: [verb: Verb, scenario: string, what: keyof typeof measures, max: number][] = [
  ["ADD", "genie idle plugin", "whole call", 1.9],
  ["DEL", "genie idle plugin", "whole call", 1.8],
  ["ADD", "genie 1 network", "time over bare", 1.1],
  ["DEL", "genie 1 network", "CPU over bare", 1.1],
  ["ADD", "genie API 1 network", "time over bare", 2.2],
  ["ADD", "genie 5 networks", "each further network over bare", 0.15],
  ["STATUS", "genie 1 network", "time over the floor", 0.3],
  ["ADD", "genie 1 network", "page faults over the floor", 450],
  ["ADD", "genie 1 network", "peak memory over the floor", 8],
  // Over bare is what a pod waits; over the same without the distance are the round trips alone.
  ["ADD", "genie API 1 object, 10 ms away", "ms over bare", 27],
  ["ADD", "genie API 1 object, 10 ms away", "ms over the object nearby", 27],
];

/** Finds the same operation of another scenario. */
type Find = (scenario: string) => Summary | undefined;

const measures = {
  "whole call": { unit: "floors", of: (one) => one.wallMs / floorOf(one).wallMs },
  "time over bare": { unit: "floors", of: overFloors },
  "time over the floor": { unit: "floors", of: overFloors },
  "CPU over bare": { unit: "floors", of: (one) => overOf(one).cpuMs / floorOf(one).cpuMs },
  "each further network over bare": { unit: "floors", of: furtherNetwork },
  "page faults over the floor": {
    unit: "faults",
    of: (one) => one.ownFaults - floorOf(one).ownFaults,
  },
  "peak memory over the floor": { unit: "MiB", of: (one) => one.peakMiB - floorOf(one).peakMiB },
  "ms over bare": { unit: "ms", of: (one) => overOf(one).wallMs },
  "ms over the object nearby": {
    unit: "ms",
    of: (one, find) => one.wallMs - wallMsOf(find("genie API 1 object")),
  },
} satisfies Record<string, { unit: Unit; of: (one: Summary, find: Find) => number }>;

const unknown = { wallMs: Number.NaN, cpuMs: Number.NaN, peakMiB: Number.NaN };
const overOf = ({ over }: Summary) => over ?? unknown;
const floorOf = ({ floor }: Summary): Floor => floor ?? { ...unknown, ownFaults: Number.NaN };
const wallMsOf = (one: Summary | undefined): number => one?.wallMs ?? Number.NaN;

/** What a call takes beyond its baseline, in floors; NaN where one of both was not measured. */
export function overFloors(one: Summary): number {
  return overOf(one).wallMs / floorOf(one).wallMs;
}

/** What each network after the first adds to what genie takes beyond the plugins. */
function furtherNetwork(one: Summary, find: Find): number {
  const first = find("genie 1 network");
  const count = Number(/\d+/.exec(one.scenario)?.[0]);
  return (overFloors(one) - (first ? overFloors(first) : Number.NaN)) / (count - 1);
}

/** A storm of so many ADDs, in times of what the bare plugins take; none of it may fail. */
const stormTarget = { count: 100, max: 2, failures: 0 };

/** How much more an ADD may take with the largest record, and what a choice may add to it. */
const scaleTargets = { addPercent: 10, choiceMs: 3 };

/** The peer that an ADD from the API shall not take longer than, by the begin of its name. */
const fastestPeer = "cni-genie";

/** Every target with what was measured. They inform: missing one fails nothing. */
export function targets(
  summaries: Summary[],
  storms: Storm[],
  scale: ScaleFigures | undefined,
): Target[] {
  return [
    ...ofSummaries.map((one) => judge(summaries, one)),
    ...beforePeers(summaries),
    ...ofStorms(storms),
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

function judge(
  summaries: Summary[],
  [verb, scenario, what, max]: (typeof ofSummaries)[number],
): Target {
  const find: Find = (name) => summaries.find((one) => one.scenario === name && one.verb === verb);
  const found = find(scenario);
  const { unit, of } = measures[what];
  return { row: `${verb} ${scenario}`, what, max, unit, value: known(found && of(found, find)) };
}

/** Genie beside the fastest peer, where that was measured. */
function beforePeers(summaries: Summary[]): Target[] {
  const task = "API 1 network";
  const ofAdd = summaries.filter(({ verb }) => verb === "ADD");
  const mine = ofAdd.find(({ scenario }) => scenario === `genie ${task}`);
  return ofAdd
    .filter(({ scenario }) => scenario.startsWith(fastestPeer) && scenario.endsWith(` ${task}`))
    .map((peer) => ({
      row: `ADD genie ${task}`,
      what: `time over bare by that of ${peer.scenario.slice(0, -task.length - 1)}`,
      ...{ max: 1, unit: "times" },
      value: known(mine && overOf(mine).wallMs / overOf(peer).wallMs),
    }));
}

function ofStorms(storms: Storm[]): Target[] {
  const [scenario = ""] = stormScenarios;
  const { count, max, failures } = stormTarget;
  const mine = storms.filter((one) => one.scenario.startsWith("genie ") && one.count === count);
  const failed = mine.reduce((sum, one) => sum + one.failures.length, 0);
  return [
    {
      ...{ row: `storm of ${count} ADDs ${scenario}`, what: "time by bare", max, unit: "times" },
      value: stormRatio(storms, { scenario, verb: "ADD", count }),
    },
    {
      ...{ row: `storms of ${count}, all of genie`, what: "failed calls", max: failures },
      ...{ unit: "failures", value: mine.length === 0 ? undefined : failed },
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
