/**
 * Automatic choice: ranks candidate networks by their KPIs. Pure and deterministic: the same
 * numbers give the same order, and every number that decided is handed back for people to read.
 *
 * Each KPI becomes a figure from 0 (bad) to 1 (the best candidate), by ratio to the best one: two
 * networks that are nearly equal get nearly equal figures, so that noise does not send every pod to
 * one of them. Unknown is neutral: the mean of those that are known. Pods on their way are taken
 * off the score by their logarithm: a herd spreads over networks in a ratio that their scores
 * decide, by halves where they are equal. A figure that gets worse never improves a rank.
 */

/** The KPIs that `select.weights` may name. */
export const kpis = ["occupancy", "response_time", "failures", "bandwidth", "subnets"] as const;
/** One of {@link kpis}. */
export type Kpi = (typeof kpis)[number];

/** What is known of a candidate; undefined: unknown. */
export interface Candidate {
  network: string;
  /** Share of its addresses in use, 0 to 1. */
  occupancy: number | undefined;
  /** Median of recent ADDs, in µs. */
  responseTimeUs: number | undefined;
  /** Share of recent ADDs that failed, 0 to 1. */
  failures: number | undefined;
  /** Traffic over its attachments, in bytes per second. */
  bandwidth: number | undefined;
  /** Subnets it gives addresses from. */
  subnets: number | undefined;
  /** Choices that fell on it within the last seconds: pods that are on their way. */
  recent: number;
}

/** A candidate with the figures that rank it. */
export interface Ranked {
  candidate: Candidate;
  /** Sum of weight × figure over the KPIs, less what the pods on their way take off. */
  score: number;
  /** From 0 to 1; undefined where it is unknown for all candidates. */
  figures: Record<Kpi, number | undefined>;
}

/** Pods on their way that count as one more, and what that takes off: this share of all weights. */
const recentPerDoubling = 8;
const shareOfDoubling = 0.4;
/** Traffic below which a difference does not matter, in bytes per second: 1 MB/s. */
const bandwidthScaleMin = 1e6;
/** Above this a weight, or any other number, says nothing more; sums stay finite. */
const weightMax = 1e6;
const numberMax = 1e15;

/**
 * Ranks candidates, best first: those that are not full before those that are, then by score. Of
 * equal scores the one with fewer pods on their way comes first, then the earlier in `candidates`.
 *
 * @param weights by KPI, 0 or more
 */
export function rank(candidates: Candidate[], weights: Record<Kpi, number>): Ranked[] {
  const sane = candidates.map(sanitize);
  const columns = Object.fromEntries(
    kpis.map((kpi) => [kpi, neutral(figuresOf[kpi](sane))]),
  ) as Record<Kpi, Column>;
  const weightOf = (kpi: Kpi) => number(weights[kpi], weightMax) ?? 0;
  const total = kpis.reduce((sum, kpi) => sum + weightOf(kpi), 0);
  const ranked = sane.map((candidate, i): Ranked => {
    const figures = Object.fromEntries(kpis.map((kpi) => [kpi, columns[kpi][i]])) as Record<
      Kpi,
      number | undefined
    >;
    const sum = kpis.reduce((all, kpi) => all + weightOf(kpi) * (figures[kpi] ?? 0), 0);
    const load = Math.log2(1 + candidate.recent / recentPerDoubling);
    // Rounded, so that equal networks do not differ in the last bit.
    const score = Math.round((sum - shareOfDoubling * total * load) * 1e9) / 1e9;
    return { candidate, score, figures };
  });
  // Array.prototype.sort is stable: ties keep the order of the table.
  return ranked.sort(
    (a, b) =>
      Number(isFull(a)) - Number(isFull(b)) ||
      b.score - a.score ||
      a.candidate.recent - b.candidate.recent,
  );
}

function isFull({ candidate: { occupancy = 0 } }: Ranked): boolean {
  return occupancy >= 1;
}

/** Numbers that make no sense are unknown. */
function sanitize(candidate: Candidate): Candidate {
  return {
    network: candidate.network,
    occupancy: number(candidate.occupancy, 1),
    responseTimeUs: number(candidate.responseTimeUs, numberMax),
    failures: number(candidate.failures, 1),
    bandwidth: number(candidate.bandwidth, numberMax),
    subnets: number(candidate.subnets, numberMax),
    recent: number(candidate.recent, numberMax) ?? 0,
  };
}

function number(value: number | undefined, max: number): number | undefined {
  return value === undefined || Number.isNaN(value) || value < 0 ? undefined : Math.min(value, max);
}

type Column = (number | undefined)[];

/** How each KPI becomes a figure over all candidates. */
const figuresOf: Record<Kpi, (candidates: Candidate[]) => Column> = {
  // The share that is free, against the freest.
  occupancy: (all) => ratioToMost(all.map(({ occupancy }) => known(occupancy, (used) => 1 - used))),
  // The root of the ratio: under load times vary more than networks differ.
  response_time: (all) =>
    ratioToLeast(all.map(({ responseTimeUs }) => responseTimeUs)).map((ratio) =>
      known(ratio, Math.sqrt),
    ),
  failures: (all) => all.map(({ failures }) => known(failures, (share) => 1 - share)),
  bandwidth: (all) => {
    const values = all.flatMap(({ bandwidth }) => bandwidth ?? []);
    const scale = Math.max(mean(values), bandwidthScaleMin);
    return all.map(({ bandwidth }) => known(bandwidth, (bytes) => 1 / (1 + bytes / scale)));
  },
  subnets: (all) => ratioToMost(all.map(({ subnets }) => subnets)),
};

function known(value: number | undefined, map: (value: number) => number): number | undefined {
  return value === undefined ? undefined : map(value);
}

function mean(values: number[]): number {
  return values.reduce((sum, one) => sum + one, 0) / Math.max(1, values.length);
}

function ratioToMost(column: Column): Column {
  const most = Math.max(0, ...column.flatMap((value) => value ?? []));
  return column.map((value) => known(value, (one) => (most === 0 ? 1 : one / most)));
}

/** Below 1 a number counts as 1: a ratio to nothing is none. */
function ratioToLeast(column: Column): Column {
  const floored = column.map((value) => known(value, (one) => Math.max(1, one)));
  const least = Math.min(...floored.flatMap((value) => value ?? []));
  return floored.map((value) => known(value, (one) => least / one));
}

/** Unknown figures become the mean of the known ones; all unknown stays unknown. */
function neutral(column: Column): Column {
  const values = column.flatMap((value) => value ?? []);
  if (values.length === 0) return column;
  const middle = mean(values);
  return column.map((value) => value ?? middle);
}
