/**
 * The charts of the page, as data: few numbers each, in the order in which page.js draws them; null
 * where there is nothing to draw. Pure.
 */
import type { NetworkReport, Report } from "./document.ts";
import { formatCount, formatDuration, formatShare } from "./quantity.ts";
import * as tables from "./table.ts";

/** Horizontal bars, stacked. */
type BarChart = {
  type: "bars";
  /** The class of its place, which gives it its height before it is drawn. */
  size: string;
  names: string[];
  /** `tint` names a colour of the page. */
  series: { name: string; tint: string; values: number[] }[];
  /** The text after each bar. */
  labels: string[];
  /** The end of every bar's track; absent: the longest bar. */
  max?: number;
};

/** Most bars in one chart; page.css has a height for each number of them. */
const barsMax = 12;
const nameLengthMax = 60;

function shortName(network: string): string {
  const name = tables.visibleText(tables.shownNetwork(network));
  return name.length <= nameLengthMax ? name : `${name.slice(0, nameLengthMax - 1)}…`;
}

/**
 * Makes the data of every chart, by its name: few numbers, in the order drawn; null where there is
 * nothing to draw.
 */
export function chartsOf(report: Report) {
  return {
    time: timeChart(report, ["ok", "failed", "denied"]),
    failureChart: report.totals.failures > 0 ? timeChart(report, ["failed", "denied"]) : null,
    free: freeChart(report),
    latency: latencyChart(report),
    occupancy: occupancyChart(report),
    causes: causesChart(report),
    decisions: decisionsChart(report),
  };
}

type Outcome = "ok" | "failed" | "denied";

/** Requests over time that ended so, stacked. */
function timeChart({ totals, timeline: { bucketMs, buckets } }: Report, names: Outcome[]) {
  if (totals.requests === 0) return null;
  return {
    type: "time",
    /** Middle of each bucket, seconds since the epoch. */
    at: buckets.map(({ at }) => (Date.parse(at) + bucketMs / 2) / 1000),
    bucketS: bucketMs / 1000,
    series: names
      .filter((name) => name === "ok" || buckets.some((bucket) => bucket[name] > 0))
      .map((name) => ({ name, tint: name, values: buckets.map((bucket) => bucket[name]) })),
  };
}

/** The networks whose free addresses over time are known, the fullest first. */
export function heldNetworks({ networks }: Report) {
  const share = (one: NetworkReport) => {
    const { used, total } = tables.fullerFamily(one);
    return used / (total ?? 1);
  };
  return networks.filter(({ held }) => held !== undefined).sort((a, b) => share(b) - share(a));
}

/** Addresses of a network that were free at the end of each bucket of time. */
export function freeOver(network: NetworkReport): { total: number; free: number[] } {
  const { attachments, held = [] } = network;
  const { used, total } = tables.fullerFamily(network);
  // Attachments of a network have equally many addresses.
  const each = attachments > 0 ? used / attachments : 1;
  const all = total ?? 0;
  return { total: all, free: held.map((one) => Math.max(0, all - Math.round(one * each))) };
}

/** How many of their addresses networks had free over time, in percent. */
function freeChart(report: Report) {
  const { bucketMs, buckets } = report.timeline;
  const drawn = heldNetworks(report).slice(0, tables.coloursMax);
  if (drawn.length === 0 || buckets.length === 0) return null;
  return {
    type: "free",
    /** End of each bucket, seconds since the epoch. */
    at: buckets.map(({ at }) => (Date.parse(at) + bucketMs) / 1000),
    series: drawn.map((network, i) => {
      const { total, free } = freeOver(network);
      return {
        ...{ name: shortName(network.network), tint: `c${i}`, total, free },
        shares: free.map((one) => twoDigits((one / Math.max(1, total)) * 100)),
      };
    }),
  };
}

/** A span of the histograms in words. */
export function shownSpan(edges: readonly number[], span: number): string {
  const from = edges[span - 1];
  const to = edges[span];
  if (from === undefined) return `under ${formatDuration(to ?? null)}`;
  if (to === undefined) return `${formatDuration(from)} and more`;
  return `${formatDuration(from)} to ${formatDuration(to)}`;
}

/** Fewest spans drawn: more than a decade, so that a single duration has others around it. */
const spansMin = 9;

/** The spans of the histograms that have something in them, with empty ones around. */
export function usedSpans({ totals }: Report): number[] {
  const { histogram } = totals.add;
  const used = histogram.flatMap((count, span) => (count > 0 ? [span] : []));
  const [first = -1, last = -1] = [used.at(0), used.at(-1)];
  const around = Math.max(1, Math.ceil((spansMin - (last - first + 1)) / 2));
  const from = Math.max(0, first - around);
  const to = Math.min(histogram.length - 1, last + around);
  return Array.from({ length: to - from + 1 }, (_, i) => from + i);
}

/** How many of each network's ADDs took how long, in percent. */
function latencyChart(report: Report) {
  const { totals, latencyEdgesUs: edges } = report;
  if (totals.add.count === 0) return null;
  const spans = usedSpans(report);
  const centre = (span: number) => {
    const to = edges[span] ?? (edges.at(-1) ?? 1) * 2;
    return Math.sqrt((edges[span - 1] ?? to / 2) * to);
  };
  return {
    type: "latency",
    /** Middle of each span on a logarithmic scale. */
    centresUs: spans.map((span) => Math.round(centre(span))),
    labels: spans.map((span) => shownSpan(edges, span)),
    series: tables.busiest(report).map(({ network, add }, i) => ({
      name: shortName(network),
      tint: `c${i}`,
      shares: spans.map((span) => twoDigits(((add.histogram[span] ?? 0) / add.count) * 100)),
    })),
  };
}

/** Rounds to two digits after the point. */
const twoDigits = (value: number): number => Math.round(value * 100) / 100;

/** Shares where a total is known, else the counts. */
function occupancyChart({ networks }: Report): BarChart | null {
  const known = networks.filter((one) => tables.fullerFamily(one).total !== null);
  const used = networks.filter((one) => tables.fullerFamily(one).used > 0);
  const drawn = known.length > 0 ? known : used;
  const size = (one: NetworkReport) => {
    const { used, total } = tables.fullerFamily(one);
    return total === null ? used : Math.min(100, twoDigits((used / total) * 100));
  };
  const bars = drawn.toSorted((a, b) => size(b) - size(a)).slice(0, barsMax);
  if (bars.length === 0) return null;
  return {
    type: "bars",
    size: `bars-${bars.length}`,
    names: bars.map(({ network }) => shortName(network)),
    series: [{ name: "used", tint: "c0", values: bars.map(size) }],
    labels: bars.map((one) => {
      const { used, total } = tables.fullerFamily(one);
      if (total === null) return tables.shownAddresses(one);
      return `${formatShare(used, total)} of ${formatCount(total)}`;
    }),
    ...(known.length > 0 && { max: 100 }),
  };
}

function causesChart({ causes }: Report): BarChart | null {
  if (causes.length === 0) return null;
  const bars = causes.slice(0, barsMax);
  const series = (name: string, isDenied: boolean) => ({
    name,
    tint: name,
    values: bars.map(({ requests, denied }) => (denied === isDenied ? requests : 0)),
  });
  return {
    type: "bars",
    size: `bars-${bars.length}`,
    names: bars.map(({ cause }) => cause),
    series: [series("failed", false), series("denied", true)],
    labels: bars.map(({ requests }) => formatCount(requests)),
  };
}

function decisionsChart({ decisions }: Report): BarChart | null {
  if (decisions.length === 0) return null;
  const ranked = (key: "network" | "decidedBy") => {
    const sums = new Map<string, number>();
    for (const one of decisions) sums.set(one[key], (sums.get(one[key]) ?? 0) + one.requests);
    return [...sums].sort((a, b) => b[1] - a[1]);
  };
  const bars = ranked("network").slice(0, barsMax);
  const deciders = ranked("decidedBy").map(([name]) => name);
  const isMany = deciders.length > tables.coloursMax;
  const own = isMany ? deciders.slice(0, tables.coloursMax - 1) : deciders;
  const names = own.map((decider) => tables.visibleText(decider) || "not recorded");
  if (isMany) names.push("others");
  const value = (network: string, decider: string | undefined) =>
    decisions
      .filter((one) => one.network === network)
      .filter(({ decidedBy: by }) => (decider === undefined ? !own.includes(by) : by === decider))
      .reduce((sum, { requests }) => sum + requests, 0);
  return {
    type: "bars",
    size: `bars-${bars.length}`,
    names: bars.map(([network]) => shortName(network)),
    series: names.map((name, i) => ({
      name,
      tint: `c${i}`,
      values: bars.map(([network]) => value(network, own[i])),
    })),
    labels: bars.map(([, requests]) => formatCount(requests)),
  };
}
