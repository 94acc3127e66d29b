/**
 * Ranks candidate networks by their KPIs. Pure and deterministic: the same numbers give the same
 * order, and every number that decided is returned for people to read.
 *
 * Each KPI becomes a figure from 0 (bad) to 1 (the best candidate), by ratio to the best one:
 * nearly equal networks get nearly equal figures, so that noise does not send every pod to one of
 * them. An unknown figure counts as the mean of the known ones. Pods on their way lower the score
 * by their logarithm: pods that start at once spread over networks in a ratio that the scores
 * decide, evenly for equal scores. A KPI that gets worse never improves a rank.
 */

/** The KPIs that `select.weights` may name. */
export const kpis = ["occupancy", "response_time", "failures", "bandwidth", "subnets"] as const;
/** One of {@link kpis}. */
export type Kpi = (typeof kpis)[number];

/** The KPIs of a candidate; undefined: unknown. */
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
  /** Times it was chosen within the last seconds: pods on their way. */
  recent: number;
}

/** A candidate with the figures that rank it. */
export interface Ranked {
  candidate: Candidate;
  /** Sum of weight × figure over the KPIs, lowered by the pods on their way. */
  score: number;
  /** From 0 to 1; undefined when unknown for all candidates. */
  figures: Record<Kpi, number | undefined>;
}

/** The first so many pods on their way lower the score by this share of all weights. */
const recentPerDoubling = 8;
const shareOfDoubling = 0.4;
/** Traffic below which a difference does not matter, in bytes per second: 1 MB/s. */
const bandwidthScaleMin = 1e6;
/** Limits of a weight and of any other number, so that sums stay finite. */
const weightMax = 1e6;
const numberMax = 1e15;

/**
 * Ranks candidates, best first: those that are not full before those that are, then by score. Of
 * equal scores the one with fewer pods on their way comes first, then the earlier in `candidates`.
 * @param weights by KPI, 0 or more
 */
export function rank(candidates: Candidate[], weights: Record<Kpi, number>): Ranked[] {
  const sane = candidates.map(sanitize);
  const columns = byKpi((kpi) => neutral(figuresOf[kpi](sane)));
  const limited = byKpi((kpi) => number(weights[kpi], weightMax) ?? 0);
  const total = kpis.reduce((sum, kpi) => sum + limited[kpi], 0);
  const ranked = sane.map((candidate, i): Ranked => {
    const figures = byKpi((kpi) => columns[kpi][i]);
    const sum = kpis.reduce((all, kpi) => all + limited[kpi] * (figures[kpi] ?? 0), 0);
    const load = Math.log2(1 + candidate.recent / recentPerDoubling);
    // Rounded, so that equal networks do not differ in the last bit.
    const score = Math.round((sum - shareOfDoubling * total * load) * 1e9) / 1e9;
    return { candidate, score, figures };
  });
  const isFull = ({ candidate }: Ranked) => Number((candidate.occupancy ?? 0) >= 1);
  // Array.prototype.sort is stable: ties keep the order of the table.
  return ranked.sort(
    (a, b) => isFull(a) - isFull(b) || b.score - a.score || a.candidate.recent - b.candidate.recent,
  );
}

function byKpi<T>(value: (kpi: Kpi) => T): Record<Kpi, T> {
  return Object.fromEntries(kpis.map((kpi) => [kpi, value(kpi)])) as Record<Kpi, T>;
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
  // The free share.
  occupancy: (all) => ratioToMost(all.map(({ occupancy }) => known(occupancy, (used) => 1 - used))),
  // The root of the ratio: under load times vary more than networks differ. Below 1 µs is 1 µs.
  response_time: (all) => {
    const times = all.map(({ responseTimeUs }) => known(responseTimeUs, (us) => Math.max(1, us)));
    const least = Math.min(...times.flatMap((us) => us ?? []));
    return times.map((us) => known(us, (one) => Math.sqrt(least / one)));
  },
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

/** Unknown figures become the mean of the known ones; all unknown stays unknown. */
function neutral(column: Column): Column {
  const values = column.flatMap((value) => value ?? []);
  if (values.length === 0) return column;
  const middle = mean(values);
  return column.map((value) => value ?? middle);
}
