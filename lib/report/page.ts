/**
 * The report as one self-contained page: tables with every number, and above them charts that a
 * script draws from the same numbers. Its words are in page.html.
 *
 * The page loads nothing: its policy allows its own two scripts and its own style, by hash, and no
 * request at all. Names come from others: `fill()` escapes what is put in; the charts get
 * their names as JSON that cannot end its script, and draw them as text, never as HTML. Scripts
 * and styles are texts in the binary; genie itself runs none of them.
 */
import { createHash } from "node:crypto";
import library from "uplot/dist/uPlot.iife.min.js" with { type: "text" };
import libraryStyle from "uplot/dist/uPlot.min.css" with { type: "text" };
import licence from "uplot/LICENSE" with { type: "text" };
import { isObject } from "../json.ts";
import type { ClusterReport, NetworkReport, Report } from "./document.ts";
import pageStyle from "./page.css" with { type: "text" };
import page from "./page.html" with { type: "text" };
// @ts-expect-error a text, not page.ts
import script from "./page.js" with { type: "text" };
import tableTemplate from "./page_table.html" with { type: "text" };
import { formatCount, formatDuration, formatShare, formatSpan, formatTime } from "./quantity.ts";
import * as tables from "./table.ts";
import { fill, type Values } from "./template.ts";

/** HTML, style or script of our own, which needs no escaping. */
export type Markup = { markup: string };
const trusted = (markup: string): Markup => ({ markup });

const entities: Record<string, string> = {
  "&": "amp",
  "<": "lt",
  ">": "gt",
  '"': "quot",
  "'": "#39",
};

/** A value as HTML. Those of attributes must stand in double quotes. */
export function toMarkup(value: unknown): string {
  if (isObject(value)) return String(value["markup"]);
  return String(value).replace(/[&<>"']/g, (char) => `&${entities[char]};`);
}

/**
 * JSON for a `<script type="application/json">`: no `<` that could end it, and no character that
 * a parser could take for the end of a line.
 */
export function scriptJson(value: unknown): Markup {
  return trusted(tables.asciiJson(JSON.stringify(value)).replaceAll("<", "\\u003c"));
}

/** Formats the page. Its size does not depend on how many requests there were. */
export function formatPage(report: Report | ClusterReport): string {
  const charts = chartsOf(report);
  const style = `${libraryStyle}\n${pageStyle}`;
  const policy =
    `default-src 'none'; script-src ${hash(library)} ${hash(script)}; ` +
    `style-src ${hash(style)}; base-uri 'none'; form-action 'none'`;
  const values = {
    policy,
    style: trusted(style),
    ...charts,
    ...tables.factsOf(report, "No requests on record"),
    ...tablesOf(report),
    licence,
    data: scriptJson(charts),
    library: trusted(library),
    script: trusted(script),
  };
  // The template is a text, although Bun's types declare a bundle.
  return fill(String(page), values, toMarkup);
}

/** A source expression of the policy that allows exactly this text. */
function hash(text: string): string {
  return `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
}

/** Most rows of one table; all of them are in the JSON. */
const rowsMax = 150;

/**
 * A table that scrolls sideways in its own box. As `cards` a phone shows each row as a card, for
 * tables of long texts. "" where there are no rows.
 */
function table<T>(
  caption: string,
  columns: readonly tables.ReportColumn<T>[],
  rows: readonly T[],
  layout: "cards" | "" = "",
): Markup | "" {
  if (rows.length === 0) return "";
  const shown = columns.filter(({ only }) => only !== "terminal");
  const more = rows.length - rowsMax;
  const values = {
    caption,
    layout,
    heads: shown.map(({ title, kind }) => {
      return { title: tables.visibleText(title), mark: kind === "number" ? kind : "" };
    }),
    rows: rows.slice(0, rowsMax).map((row) => ({ cells: shown.map((one) => cellOf(one, row)) })),
    more: more > 0 ? formatCount(more) : "",
  };
  return trusted(fill(String(tableTemplate), values, toMarkup));
}

function cellOf<T>({ title, kind, isHead, cell }: tables.ReportColumn<T>, row: T): Values {
  const text = tables.visibleText(cell(row));
  const isPlain = kind === "number" || kind === "time" || kind === "state";
  const mark = isPlain ? kind : kind === "fault" && text !== "ok" ? "words bad" : "words";
  return { title: tables.visibleText(title), text, isHead, mark };
}

/** Every table; "" for one without rows. */
function tablesOf(report: Report | ClusterReport): Values {
  const { networks, timeline, causes, decisions, stuck, requests, policy } = report;
  const span = formatSpan(timeline.bucketMs);
  const times = timeline.buckets.filter(({ ok, failed, denied }) => ok + failed + denied > 0);
  return {
    timeTable: table(
      `Requests by time, ${span} each; times without any are left out`,
      bucketColumns,
      times.toReversed(),
    ),
    networksTable: table("Networks and their numbers", tables.networkColumns, networks),
    nodesTable:
      "nodes" in report
        ? table("Nodes and their numbers", tables.nodeColumns, tables.rankedNodes(report.nodes))
        : "",
    latencyTable: table("Successful ADDs by duration", latencyColumns(report), usedSpans(report)),
    causesTable: table("The newest message of each cause", causeColumns, causes, "cards"),
    occupancyTable: table("Addresses of the attachments that exist now", addressColumns, networks),
    decisionsTable: table("ADDs by network and who decided", decisionColumns, decisions),
    choices: report.choices.slice(0, rowsMax).map(choiceOf),
    stuckTable: table("Attachments whose DEL failed", tables.stuckColumns(stuck), stuck, "cards"),
    problemsTable: table(
      "Problems in policies; the rest of each is in force",
      tables.problemColumns,
      policy?.problems ?? [],
      "cards",
    ),
    requestsTable: table(
      "Newest requests, the newest first",
      tables.requestColumns(requests),
      requests,
      "cards",
    ),
  };
}

function choiceOf({ at, namespace, pod, network, choice }: Report["choices"][number]): Values {
  const { columns, rows } = tables.candidatesOf(choice);
  const who = tables.shownPod(namespace, pod);
  const title = `${formatTime(at)}: ${tables.shownNetwork(network)} for ${who}`;
  const raw = toMarkup(tables.visibleText(JSON.stringify(choice)));
  const candidates = table("The candidates and their numbers", columns, rows);
  return { title: tables.visibleText(title), candidates: candidates || trusted(`<p>${raw}</p>`) };
}

type Bucket = Report["timeline"]["buckets"][number];
const bucketColumns: tables.ReportColumn<Bucket>[] = [
  { title: "From (UTC)", kind: "time", cell: ({ at }) => formatTime(at) },
  tables.numberColumn("OK", ({ ok }) => ok),
  tables.numberColumn("Failed", ({ failed }) => failed),
  tables.numberColumn("Denied", ({ denied }) => denied),
];

function latencyColumns(report: Report): tables.ReportColumn<number>[] {
  const networks = tables.busiest(report).map(({ network, add }) => {
    const title = tables.shownNetwork(network);
    return tables.numberColumn(title, (span: number) => add.histogram[span] ?? 0);
  });
  const cell = (span: number) => shownSpan(report.latencyEdgesUs, span);
  return [{ title: "Took", isHead: true, cell }, ...networks];
}

const addressColumns: tables.ReportColumn<NetworkReport>[] = [
  { title: "Network", isHead: true, cell: ({ network }) => tables.shownNetwork(network) },
  tables.numberColumn("IPv4", ({ addresses }) => addresses.ipv4.used),
  tables.numberColumn("IPv4 total", ({ addresses }) => addresses.ipv4.total ?? "unknown"),
  tables.numberColumn("IPv6", ({ addresses }) => addresses.ipv6.used),
  tables.numberColumn("IPv6 total", ({ addresses }) => addresses.ipv6.total ?? "unknown"),
];

const causeColumns: tables.ReportColumn<Report["causes"][number]>[] = [
  { title: "Cause", isHead: true, cell: ({ cause }) => cause },
  tables.numberColumn("Code", ({ code }) => String(code)),
  tables.numberColumn("Requests", ({ requests }) => requests),
  { title: "Newest", cell: tables.shownError },
];

const decisionColumns: tables.ReportColumn<Report["decisions"][number]>[] = [
  { title: "Network", isHead: true, cell: ({ network }) => tables.shownNetwork(network) },
  { title: "Decided by", cell: ({ decidedBy }) => decidedBy || "not recorded" },
  tables.numberColumn("ADDs", ({ requests }) => requests),
];

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
    time: timeChart(report),
    latency: latencyChart(report),
    occupancy: occupancyChart(report),
    causes: causesChart(report),
    decisions: decisionsChart(report),
  };
}

/** Requests over time, stacked. */
function timeChart({ totals, timeline: { bucketMs, buckets } }: Report) {
  if (totals.requests === 0) return null;
  const names = ["ok", "failed", "denied"] as const;
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

/** A span of the histograms in words. */
function shownSpan(edges: readonly number[], span: number): string {
  const from = edges[span - 1];
  const to = edges[span];
  if (from === undefined) return `under ${formatDuration(to ?? null)}`;
  if (to === undefined) return `${formatDuration(from)} and more`;
  return `${formatDuration(from)} to ${formatDuration(to)}`;
}

/** Fewest spans drawn: more than a decade, so that a single duration has others around it. */
const spansMin = 9;

/** The spans of the histograms that have something in them, with empty ones around. */
function usedSpans({ totals }: Report): number[] {
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
