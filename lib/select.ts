/**
 * Automatic choice: ranks candidate networks by their KPIs. Pure and deterministic: the same numbers
 * give the same order, and every number that decided is handed back for people to read.
 *
 * Each KPI becomes a figure from 0 (bad) to 1 (the best candidate), by ratio to the best one: two
 * networks that are nearly equal get nearly equal figures, so that noise does not send every pod to
 * one of them. Unknown is neutral: the mean of those that are known.
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
  /** Sum of weight × figure over the KPIs. */
  score: number;
  /** From 0 to 1; undefined where it is unknown for all candidates. */
  figures: Record<Kpi, number | undefined>;
}

/** Pods on their way that make a network answer half as fast. */
const recentPerDoubling = 8;
/** Traffic below which a difference does not matter, in bytes per second: 1 MB/s. */
const bandwidthScaleMin = 1e6;

/**
 * Ranks candidates, best first; of equal scores the earlier in `candidates` comes first.
 * @param weights by KPI, 0 or more
 */
export function rank(candidates: Candidate[], weights: Record<Kpi, number>): Ranked[] {
  const columns = Object.fromEntries(
    kpis.map((kpi) => [kpi, neutral(figuresOf[kpi](candidates))]),
  ) as Record<Kpi, (number | undefined)[]>;
  const ranked = candidates.map((candidate, i): Ranked => {
    const figures = Object.fromEntries(kpis.map((kpi) => [kpi, columns[kpi][i]])) as Record<
      Kpi,
      number | undefined
    >;
    const score = kpis.reduce((sum, kpi) => sum + weights[kpi] * (figures[kpi] ?? 0), 0);
    return { candidate, score: Math.round(score * 1e6) / 1e6, figures };
  });
  // Array.prototype.sort is stable: ties keep the order of the table.
  return ranked.sort((a, b) => b.score - a.score);
}

type Column = (number | undefined)[];

/** How each KPI becomes a figure over all candidates. */
const figuresOf: Record<Kpi, (candidates: Candidate[]) => Column> = {
  // The share that is free, against the freest.
  occupancy: (all) => ratioToMost(all.map(({ occupancy }) => known(occupancy, (used) => 1 - used))),
  // Pods on their way make the next one wait, before any measurement can show it.
  response_time: (all) =>
    ratioToLeast(
      all.map(({ responseTimeUs, recent }) =>
        known(responseTimeUs ?? fallbackUs(all), (us) => us * (1 + recent / recentPerDoubling)),
      ),
    ),
  failures: (all) => all.map(({ failures }) => known(failures, (share) => 1 - share)),
  bandwidth: (all) => {
    const values = all.flatMap(({ bandwidth }) => (bandwidth === undefined ? [] : [bandwidth]));
    const mean = values.reduce((sum, one) => sum + one, 0) / Math.max(1, values.length);
    const scale = Math.max(mean, bandwidthScaleMin);
    return all.map(({ bandwidth }) => known(bandwidth, (bytes) => 1 / (1 + bytes / scale)));
  },
  subnets: (all) => ratioToMost(all.map(({ subnets }) => subnets)),
};

/** Where no candidate was ever measured, any time serves: only pods on their way differ. */
function fallbackUs(all: Candidate[]): number | undefined {
  const values = all.flatMap(({ responseTimeUs }) =>
    responseTimeUs === undefined ? [] : [responseTimeUs],
  );
  if (values.length === 0) return 10_000;
  return values.reduce((sum, one) => sum + one, 0) / values.length;
}

function known(value: number | undefined, map: (value: number) => number): number | undefined {
  return value === undefined || !Number.isFinite(value) ? undefined : map(value);
}

function ratioToMost(column: Column): Column {
  const most = Math.max(0, ...column.flatMap((value) => value ?? []));
  return column.map((value) => known(value, (one) => (most === 0 ? 1 : Math.max(0, one) / most)));
}

function ratioToLeast(column: Column): Column {
  const least = Math.min(...column.flatMap((value) => value ?? []));
  return column.map((value) => known(value, (one) => (one <= 0 ? 1 : least / one)));
}

/** Unknown figures become the mean of the known ones; all unknown stays unknown. */
function neutral(column: Column): Column {
  const values = column.flatMap((value) => value ?? []);
  if (values.length === 0) return column;
  const mean = values.reduce((sum, one) => sum + one, 0) / values.length;
  return column.map((value) => value ?? mean);
}
