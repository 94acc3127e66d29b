/** The numbers of a report as its charts want them: few, named, in the order drawn. Pure. */
import { formatCount, formatShare } from "../config/quantity.ts";
import type { NetworkReport, Report } from "./shape.ts";
import { printable } from "./table.ts";
import { fullerFamily, shownAddresses, shownDuration, shownNetwork } from "./words.ts";

/** Requests over time, stacked. */
export interface TimeChart {
  type: "time";
  /** Middle of each bucket, seconds since the epoch. */
  at: number[];
  bucketS: number;
  series: { name: "ok" | "failed" | "denied"; values: number[] }[];
}

/** How many of each network's ADDs took how long. */
export interface LatencyChart {
  type: "latency";
  /** Middle of each span on a logarithmic scale, in µs. */
  centresUs: number[];
  /** Each span in words. */
  labels: string[];
  /** Percent of the network's ADDs. */
  series: { name: string; shares: number[] }[];
}

/** Lying bars, stacked. */
export interface BarChart {
  type: "bars";
  names: string[];
  /** `tint` names a colour of the page. */
  series: { name: string; tint: string; values: number[] }[];
  /** What stands behind each bar. */
  labels: string[];
  /** The end of every bar's track; absent: the longest bar. */
  max?: number;
}

/** Each is null where there is nothing to draw. */
export interface Charts {
  time: TimeChart | null;
  latency: LatencyChart | null;
  occupancy: BarChart | null;
  causes: BarChart | null;
  decisions: BarChart | null;
}

/** Networks drawn in one colour each. */
const coloursMax = 8;
/** Bars in one chart. */
const barsMax = 12;
const nameLengthMax = 60;

const shortName = (name: string): string => {
  const clean = printable(shownNetwork(name));
  return clean.length <= nameLengthMax ? clean : `${clean.slice(0, nameLengthMax - 1)}…`;
};

/** Makes the data of every chart. */
export function chartsOf(report: Report): Charts {
  return {
    time: timeChart(report),
    latency: latencyChart(report),
    occupancy: occupancyChart(report),
    causes: causesChart(report),
    decisions: decisionsChart(report),
  };
}

function timeChart({ totals, timeline: { bucketMs, buckets } }: Report): TimeChart | null {
  if (totals.requests === 0) return null;
  const names = ["ok", "failed", "denied"] as const;
  return {
    type: "time",
    at: buckets.map(({ at }) => (Date.parse(at) + bucketMs / 2) / 1000),
    bucketS: bucketMs / 1000,
    series: names
      .filter((name) => name === "ok" || buckets.some((bucket) => bucket[name] > 0))
      .map((name) => ({ name, values: buckets.map((bucket) => bucket[name]) })),
  };
}

/** One span of the histograms in words. */
export function shownSpan(edges: readonly number[], i: number): string {
  const from = edges[i - 1];
  const to = edges[i];
  if (from === undefined) return `under ${shownDuration(to ?? null)}`;
  if (to === undefined) return `${shownDuration(from)} and more`;
  return `${shownDuration(from)} to ${shownDuration(to)}`;
}

/** Spans drawn at least, more than one decade: a single duration stands among others. */
const spansMin = 9;

/** First and last span of the histogram that has something in it, with empty ones around. */
export function usedSpans(histogram: readonly number[]): { first: number; last: number } {
  const first = histogram.findIndex((count) => count > 0);
  const last = histogram.findLastIndex((count) => count > 0);
  const around = Math.max(1, Math.ceil((spansMin - (last - first + 1)) / 2));
  return {
    first: Math.max(0, first - around),
    last: Math.min(histogram.length - 1, last + around),
  };
}

/** The networks with the most requests, as many as there are colours. */
export function busiest({ networks }: Report): Report["networks"] {
  return networks
    .filter(({ add }) => add.count > 0)
    .sort((a, b) => b.add.count - a.add.count)
    .slice(0, coloursMax);
}

function latencyChart(report: Report): LatencyChart | null {
  const { totals, latencyEdgesUs: edges } = report;
  if (totals.add.count === 0) return null;
  const { first, last } = usedSpans(totals.add.histogram);
  const spans = Array.from({ length: last - first + 1 }, (_, i) => first + i);
  const centre = (i: number) => {
    const to = edges[i] ?? (edges.at(-1) ?? 1) * 2;
    return Math.sqrt((edges[i - 1] ?? to / 2) * to);
  };
  return {
    type: "latency",
    centresUs: spans.map((i) => Math.round(centre(i))),
    labels: spans.map((i) => shownSpan(edges, i)),
    series: busiest(report).map(({ network, add }) => ({
      name: shortName(network),
      shares: spans.map((i) => round(((add.histogram[i] ?? 0) / add.count) * 100)),
    })),
  };
}

/** Two digits after the point. */
const round = (value: number): number => Math.round(value * 100) / 100;

/** Shares where a total is known, else the counts. */
function occupancyChart({ networks }: Report): BarChart | null {
  const known = networks.filter((one) => fullerFamily(one).total !== null);
  const drawn = known.length > 0 ? known : networks.filter((one) => fullerFamily(one).used > 0);
  const share = (one: NetworkReport) => {
    const { used, total } = fullerFamily(one);
    return total === null ? used : Math.min(100, round((used / total) * 100));
  };
  const bars = drawn.toSorted((a, b) => share(b) - share(a)).slice(0, barsMax);
  if (bars.length === 0) return null;
  return {
    type: "bars",
    names: bars.map(({ network }) => shortName(network)),
    series: [{ name: "used", tint: "c0", values: bars.map(share) }],
    labels: bars.map((one) => {
      const { used, total } = fullerFamily(one);
      const count = shownAddresses(one);
      return total === null ? count : `${formatShare(used, total)} of ${formatCount(total)}`;
    }),
    ...(known.length > 0 && { max: 100 }),
  };
}

function causesChart({ causes }: Report): BarChart | null {
  if (causes.length === 0) return null;
  const bars = causes.slice(0, barsMax);
  return {
    type: "bars",
    names: bars.map(({ cause }) => cause),
    series: [
      {
        name: "failed",
        tint: "failed",
        values: bars.map(({ requests, denied }) => (denied ? 0 : requests)),
      },
      {
        name: "denied",
        tint: "denied",
        values: bars.map(({ requests, denied }) => (denied ? requests : 0)),
      },
    ],
    labels: bars.map(({ requests }) => formatCount(requests)),
  };
}

function decisionsChart({ decisions }: Report): BarChart | null {
  const sums = new Map<string, number>();
  const deciders = new Map<string, number>();
  for (const { network, decidedBy, requests } of decisions) {
    sums.set(network, (sums.get(network) ?? 0) + requests);
    deciders.set(decidedBy, (deciders.get(decidedBy) ?? 0) + requests);
  }
  if (sums.size === 0) return null;
  const ranked = (counts: Map<string, number>) => [...counts].sort((a, b) => b[1] - a[1]);
  const bars = ranked(sums).slice(0, barsMax);
  const values = (by: (name: string) => boolean) =>
    bars.map(([network]) =>
      decisions
        .filter((one) => one.network === network && by(one.decidedBy))
        .reduce((sum, { requests }) => sum + requests, 0),
    );
  const named = ranked(deciders).map(([name]) => name);
  const own = named.length > coloursMax ? named.slice(0, coloursMax - 1) : named;
  const series = own.map((name, i) => ({
    name: printable(name) || "not recorded",
    tint: `c${i}`,
    values: values((one) => one === name),
  }));
  const others = {
    name: "others",
    tint: `c${coloursMax - 1}`,
    values: values((one) => !own.includes(one)),
  };
  return {
    type: "bars",
    names: bars.map(([network]) => shortName(network)),
    series: named.length > own.length ? [...series, others] : series,
    labels: bars.map(([, requests]) => formatCount(requests)),
  };
}
