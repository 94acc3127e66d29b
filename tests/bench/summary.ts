/** Many figures in few: medians, quartiles, and the difference to a baseline. Pure. */
import type { Series } from "./measure.ts";
import type { Verb } from "./scenarios.ts";

/** The middle of a list; NaN of an empty one. */
export function median(values: number[]): number {
  return quantile(values, 0.5);
}

/** The smallest value that at least `share` of the values do not exceed; NaN of an empty list. */
export function quantile(values: number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? Number.NaN;
}

/** One operation of one scenario, in figures: medians where nothing else is said. */
export interface Summary {
  scenario: string;
  verb: Verb;
  wallMs: number;
  quartilesMs: [number, number];
  wallMsP90: number;
  cpuMs: number;
  peakMiB: number;
  privateMiB: number;
  ownFaults: number;
  childFaults: number;
  /** Against the baseline; absent where there is none. */
  over?: { baseline: string; wallMs: number; ratio: number; cpuMs: number };
  /** The floor in the same rounds; absent where it was not measured. */
  floor?: Floor;
}

/** What the floor takes, see floor.ts: the unit of what a call takes. */
export type Floor = Pick<Summary, "wallMs" | "cpuMs" | "peakMiB" | "ownFaults">;

/** Bytes of a MiB. */
export const mib = 1024 * 1024;

/** Condenses every series and compares it with its baseline. */
export function summarize(all: Series[]): Summary[] {
  const found = all.map(
    (one): Summary => ({
      scenario: one.scenario,
      verb: one.verb,
      wallMs: median(one.wallMs),
      quartilesMs: [quantile(one.wallMs, 0.25), quantile(one.wallMs, 0.75)],
      wallMsP90: quantile(one.wallMs, 0.9),
      cpuMs: median(one.cpuMs),
      peakMiB: median(one.peakBytes) / mib,
      privateMiB: median(one.privateBytes) / mib,
      ownFaults: median(one.ownFaults),
      childFaults: median(one.childFaults),
    }),
  );
  return found.map((alone, i) => {
    const baseline = all[i]?.baseline;
    const of = (name?: string) =>
      found.find(({ scenario, verb }) => scenario === name && verb === alone.verb);
    const [other, floor] = [of(baseline), of("floor")];
    const one = { ...alone, ...(floor && { floor: floorOf(floor) }) };
    if (baseline === undefined || !other) return one;
    const over = {
      baseline,
      wallMs: one.wallMs - other.wallMs,
      ratio: one.wallMs / other.wallMs,
      cpuMs: one.cpuMs - other.cpuMs,
    };
    return { ...one, over };
  });
}

function floorOf({ wallMs, cpuMs, peakMiB, ownFaults }: Summary): Floor {
  return { wallMs, cpuMs, peakMiB, ownFaults };
}
