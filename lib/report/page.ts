/**
 * The report as one self-contained page: tables with every number, and above them charts that a
 * script draws from the same numbers.
 *
 * The page loads nothing: its policy allows its own two scripts and its own style, by hash, and no
 * request at all. Names come from others: `html` escapes every value put into it; the charts get
 * their names as JSON that cannot end its script, and draw them as text, never as HTML. Scripts
 * and styles are texts in the binary; genie itself runs none of them.
 */
import { createHash } from "node:crypto";
// @ts-expect-error imported as text
import library from "uplot/dist/uPlot.iife.min.js" with { type: "text" };
// @ts-expect-error imported as text
import libraryStyle from "uplot/dist/uPlot.min.css" with { type: "text" };
// @ts-expect-error imported as text
import licence from "uplot/LICENSE" with { type: "text" };
import type { ClusterReport, NetworkReport, NodeReport, Report } from "./document.ts";
// @ts-expect-error imported as text
import pageStyle from "./page.css" with { type: "text" };
import page from "./page.html" with { type: "text" };
// @ts-expect-error imported as text
import script from "./page.js" with { type: "text" };
import { formatCount, formatDuration, formatShare, formatSpan, formatTime } from "./quantity.ts";
import {
  asciiJson,
  candidatesOf,
  fullerFamily,
  networkColumns,
  nodeColumns,
  numberColumn,
  problemColumns,
  type ReportColumn,
  rankedNodes,
  requestColumns,
  shownAddresses,
  shownError,
  shownNetwork,
  shownPod,
  shownScope,
  stuckColumns,
  visibleText,
} from "./table.ts";

/** HTML that may be put into other HTML as it is. */
export interface Markup {
  markup: string;
}

/** What a template takes; a list is its items one after the other. */
export type Value = string | number | Markup | readonly Value[];

const entities: Record<string, string> = {
  "&": "amp",
  "<": "lt",
  ">": "gt",
  '"': "quot",
  "'": "#39",
};

function toMarkup(value: Value): string {
  if (typeof value === "number") return String(value);
  if (typeof value === "string") return value.replace(/[&<>"']/g, (char) => `&${entities[char]};`);
  return "markup" in value ? value.markup : value.map(toMarkup).join("");
}

/** Template tag: ``html`<p>${name}</p>` ``. Attribute values must stand in double quotes. */
export function html(strings: TemplateStringsArray, ...values: readonly Value[]): Markup {
  const texts = strings.map((text, i) => {
    const value = values[i];
    return value === undefined ? text : text + toMarkup(value);
  });
  return { markup: texts.join("") };
}

/** HTML, style or script of our own, which needs no escaping. */
const trusted = (markup: string): Markup => ({ markup });

/**
 * JSON for a `<script type="application/json">`: no `<` that could end it, and no character that
 * a parser could take for the end of a line.
 */
export function scriptJson(value: unknown): Markup {
  return trusted(asciiJson(JSON.stringify(value)).replaceAll("<", "\\u003c"));
}

/** Heights of the charts with horizontal bars, so that nothing moves when they are drawn. */
const barHeights = Array.from({ length: 12 }, (_, i) => `.bars-${i + 1}{height:${(i + 1) * 32}px}`);

/** Formats the page. Its size does not depend on how many requests there were. */
export function formatPage(report: Report | ClusterReport): string {
  const charts = chartsOf(report);
  const style = `${libraryStyle}\n${pageStyle}\n${barHeights.join("")}`;
  const policy =
    `default-src 'none'; script-src ${hash(library)} ${hash(script)}; ` +
    `style-src ${hash(style)}; base-uri 'none'; form-action 'none'`;
  const values: Record<string, Value> = {
    policy,
    style: trusted(style),
    subtitle: shownScope(report, "No requests on record"),
    notices: report.notices.map((text) => html`<p class="note">${visibleText(text)}</p>\n`),
    tiles: tiles(report),
    time: timeSection(report, charts),
    networks: networksSection(report),
    nodes: "nodes" in report ? nodesSection(report.nodes) : "",
    latency: latencySection(report, charts),
    causes: causesSection(report, charts),
    occupancy: occupancySection(report, charts),
    decisions: decisionsSection(report, charts),
    stuck: stuckSection(report),
    problems: policySection(report),
    requests: requestsSection(report),
    made: formatTime(report.generatedAt),
    record: visibleText(report.record),
    licence,
    data: scriptJson(charts),
    library: trusted(library),
    script: trusted(script),
  };
  // It is a text, although Bun's types declare a bundle.
  return String(page).replace(/\{\{(\w+)\}\}/g, (_, name) => toMarkup(values[name] ?? ""));
}

/** A source expression of the policy that allows exactly this text. */
function hash(text: string): string {
  return `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
}

function tiles(report: Report): Markup {
  const where = "nodes" in report ? "these nodes" : "this node";
  const { requests, failures, denied, add, attachments, leaked, failing } = report.totals;
  const ofThem = `${formatCount(failures)}, of them ${formatCount(denied)} denied`;
  const all: [title: string, value: string, more: string][] = [
    ["Requests", formatCount(requests), `${formatCount(requests - failures)} succeeded`],
    ["Failed", formatShare(failures, requests), ofThem],
    [
      "Time of an ADD",
      formatDuration(add.p50Us),
      `median; 99% within ${formatDuration(add.p99Us)}`,
    ],
    ["Attachments now", formatCount(attachments), `interfaces of pods on ${where}`],
    ["Leaked", formatCount(leaked), `${formatCount(failing)} failing`],
  ];
  const tile = ([title, value, more]: (typeof all)[number]) => html`<div><dt>${title}</dt>
<dd class="big">${value}</dd><dd class="small">${more}</dd></div>
`;
  return html`<dl class="tiles">${all.map(tile)}</dl>`;
}

/** A section that not every page has; the others are in the template. */
function section(title: string, inside: Value): Markup {
  return html`<section>\n<h2>${title}</h2>\n${inside}\n</section>`;
}

const about = (text: string): Markup => html`<p class="about">${text}</p>\n`;

const empty = (text: string): Markup => html`<p class="empty">${text}</p>`;

function details(summary: string, inside: Markup): Markup {
  return html`<details><summary>${summary}</summary>${inside}</details>`;
}

/** Most rows of one table; all of them are in the JSON. */
const rowsMax = 150;

/**
 * A table that scrolls sideways in its own box. As `cards` a phone shows each row as a card, for
 * tables of long texts.
 */
function table<T>(
  caption: string,
  columns: readonly ReportColumn<T>[],
  rows: readonly T[],
  layout: "cards" | "" = "",
): Markup {
  const shown = columns
    .filter(({ only }) => only !== "terminal")
    .map((column) => ({ ...column, title: visibleText(column.title) }));
  const more = rows.length - rowsMax;
  return html`<div class="scroll" role="region" aria-label="${caption}" tabindex="0">
<table class="${layout}"><caption>${caption}</caption>
<thead><tr>${shown.map(
    ({ title, kind }) =>
      html`<th scope="col" class="${kind === "number" ? "number" : ""}">${title}</th>`,
  )}</tr></thead>
<tbody>
${rows
  .slice(0, rowsMax)
  .map(
    (row) => html`<tr>${shown.map((column) => cellOf(column, row))}</tr>\n`,
  )}</tbody></table></div>
${more > 0 ? html`<p class="about">${formatCount(more)} more: genie report --json.</p>` : ""}`;
}

/** A table that is folded away. */
const numbers: typeof table = (...args) => details("Numbers", table(...args));

function cellOf<T>({ title, kind = "list", isHead, cell }: ReportColumn<T>, row: T): Markup {
  const text = visibleText(cell(row));
  const inside = html`data-label="${title}"><span>${text}</span>`;
  if (isHead) return html`<th scope="row" class="words" ${inside}</th>`;
  const isPlain = kind === "number" || kind === "time" || kind === "state";
  const mark = isPlain ? kind : kind === "fault" && text !== "ok" ? "words bad" : "words";
  return html`<td class="${mark}" ${inside}</td>`;
}

/** The place of a chart; it has its final height before the chart is drawn. */
function chart(name: keyof Charts, size: string, label: string, hint = ""): Markup {
  const line = hint === "" ? "" : html`\n<p class="readout" aria-live="off">${hint}</p>`;
  return html`<div><div class="chart ${size}" data-chart="${name}" role="img" aria-label="${label}">
<noscript>Charts need scripts; their numbers are in the tables.</noscript></div>${line}</div>`;
}

const barSize = ({ names }: BarChart): string => `bars-${names.length}`;

function legend(names: [tint: string, name: string][]): Markup {
  return html`<ul class="legend">${names.map(
    ([tint, name]) => html`<li><span class="swatch ${tint}"></span>${visibleText(name)}</li>`,
  )}</ul>\n`;
}

const noRequests = "No requests in this time.";

type Bucket = Report["timeline"]["buckets"][number];
const bucketColumns: ReportColumn<Bucket>[] = [
  { title: "From (UTC)", kind: "time", cell: ({ at }) => formatTime(at) },
  numberColumn("OK", ({ ok }) => ok),
  numberColumn("Failed", ({ failed }) => failed),
  numberColumn("Denied", ({ denied }) => denied),
];

function timeSection({ timeline }: Report, { time }: Charts): Value {
  if (!time) return empty(noRequests);
  const span = formatSpan(timeline.bucketMs);
  const rows = timeline.buckets.filter(({ ok, failed, denied }) => ok + failed + denied > 0);
  const hint = "Point at a bar, or tap it, for its numbers.";
  const caption = `Requests by time, ${span} each; times without any are left out`;
  return [
    about(`Each bar is ${span}.`),
    legend(time.series.map(({ name }) => [name, name])),
    chart("time", "tall", `Bars: requests in each ${span}`, hint),
    numbers(caption, bucketColumns, rows.toReversed()),
  ];
}

function networksSection({ networks }: Report): Value {
  if (networks.length === 0) return empty("No network has requests or attachments.");
  return [
    about("Percentiles are of ADDs that succeeded; addresses, traffic and attachments are of now."),
    table("Networks and their numbers", networkColumns, networks),
  ];
}

function nodesSection(nodes: readonly NodeReport[]): Value {
  const answered = nodes.filter(({ error }) => error === "").length;
  const many = `${formatCount(answered)} of ${formatCount(nodes.length)}`;
  return section("Nodes", [
    about(`${many} answered; those with the most trouble first.`),
    table("Nodes and their numbers", nodeColumns, rankedNodes(nodes)),
  ]);
}

function latencySection(report: Report, { latency }: Charts): Value {
  if (!latency) return empty("No ADD succeeded in this time.");
  const shown = busiest(report);
  const columns: ReportColumn<number>[] = [
    { title: "Took", isHead: true, cell: (span) => shownSpan(report.latencyEdgesUs, span) },
    ...shown.map(({ network, add }) =>
      numberColumn<number>(shownNetwork(network), (span) => add.histogram[span] ?? 0),
    ),
  ];
  const all = report.networks.filter(({ add }) => add.count > 0).length;
  const which = all > shown.length ? `, the ${shown.length} busiest of ${formatCount(all)}` : "";
  const label = "Lines: share of each network's ADDs by duration";
  const hint = "Point at the lines, or tap them, for their numbers.";
  return [
    about(`Share of each network's ADDs that took so long${which}.`),
    legend(latency.series.map(({ name }, i) => [`c${i}`, name])),
    chart("latency", "tall", label, hint),
    numbers("Successful ADDs by duration", columns, usedSpans(report)),
  ];
}

const addressColumns: ReportColumn<NetworkReport>[] = [
  { title: "Network", isHead: true, cell: ({ network }) => shownNetwork(network) },
  numberColumn("IPv4", ({ addresses }) => addresses.ipv4.used),
  numberColumn("IPv4 total", ({ addresses }) => addresses.ipv4.total ?? "unknown"),
  numberColumn("IPv6", ({ addresses }) => addresses.ipv6.used),
  numberColumn("IPv6 total", ({ addresses }) => addresses.ipv6.total ?? "unknown"),
];

function occupancySection({ networks }: Report, { occupancy }: Charts): Value {
  if (!occupancy) return empty("No attachment has an address.");
  const isKnown = occupancy.max !== undefined;
  const unknown = "No network's total is known; capacity in the plugin table tells it.";
  return [
    about(isKnown ? "Of the networks whose total is known." : unknown),
    chart("occupancy", barSize(occupancy), "Bars: addresses in use of each network"),
    numbers("Addresses of the attachments that exist now", addressColumns, networks),
  ];
}

const causeColumns: ReportColumn<Report["causes"][number]>[] = [
  { title: "Cause", isHead: true, cell: ({ cause }) => cause },
  numberColumn("Code", ({ code }) => String(code)),
  numberColumn("Requests", ({ requests }) => requests),
  { title: "Newest", cell: shownError },
];

function causesSection({ causes, totals }: Report, { causes: drawn }: Charts): Value {
  if (!drawn) return empty(totals.requests === 0 ? noRequests : "Nothing failed.");
  return [
    chart("causes", barSize(drawn), "Bars: failed requests by cause"),
    table("The newest message of each cause", causeColumns, causes, "cards"),
  ];
}

const decisionColumns: ReportColumn<Report["decisions"][number]>[] = [
  { title: "Network", isHead: true, cell: ({ network }) => shownNetwork(network) },
  { title: "Decided by", cell: ({ decidedBy }) => decidedBy || "not recorded" },
  numberColumn("ADDs", ({ requests }) => requests),
];

function decisionsSection(report: Report, { decisions: drawn }: Charts): Value {
  if (!drawn) return empty("No ADD in this time.");
  const choices = report.choices.slice(0, rowsMax).map(choiceDetails);
  const newest = choices.length > 0 ? choices : empty("None in this time.");
  return [
    about("Who decided that an ADD uses a network."),
    legend(drawn.series.map(({ name, tint }) => [tint, name])),
    chart("decisions", barSize(drawn), "Bars: ADDs of each network, by who decided"),
    numbers("ADDs by network and who decided", decisionColumns, report.decisions),
    "nodes" in report ? "" : [html`\n<h3>Newest automatic choices</h3>\n`, newest],
  ];
}

function choiceDetails(one: Report["choices"][number]): Markup {
  const { at, namespace, pod, network, choice } = one;
  const { columns, rows } = candidatesOf(choice);
  const title = `${formatTime(at)}: ${shownNetwork(network)} for ${shownPod(namespace, pod)}`;
  return details(
    visibleText(title),
    rows.length === 0
      ? html`<p>${visibleText(JSON.stringify(choice))}</p>`
      : table("The candidates and their numbers", columns, rows),
  );
}

function stuckSection({ stuck, totals: { leaked, failing } }: Report): Value {
  if (stuck.length === 0) return empty("None: every DEL came to its end.");
  const listed = leaked + failing > stuck.length ? ` Listed: ${stuck.length}.` : "";
  return [
    about(
      `${formatCount(leaked)} leaked, which genie gc retries; ` +
        `${formatCount(failing)} failing, which the runtime retries.${listed}`,
    ),
    table("Attachments whose DEL failed", stuckColumns(stuck), stuck, "cards"),
  ];
}

function policySection({ policy }: Report): Value {
  if (!policy) return "";
  const { knownAt, enforced, problems } = policy;
  const known = knownAt === null ? "never" : `as of ${formatTime(knownAt)} UTC`;
  const caption = "Problems in policies; the rest of each is in force";
  return section("Network policy", [
    about(`Pods with rules: ${formatCount(enforced)}. Policies known ${known}.`),
    problems.length === 0
      ? empty("Nothing is wrong with any policy.")
      : table(caption, problemColumns, problems, "cards"),
  ]);
}

function requestsSection({ requests, totals }: Report): Value {
  if (requests.length === 0) return empty(noRequests);
  return [
    about(`${formatCount(requests.length)} of ${formatCount(totals.requests)}.`),
    table("Newest requests, the newest first", requestColumns(requests), requests, "cards"),
  ];
}

/** Horizontal bars, stacked. */
interface BarChart {
  type: "bars";
  names: string[];
  /** `tint` names a colour of the page. */
  series: { name: string; tint: string; values: number[] }[];
  /** The text after each bar. */
  labels: string[];
  /** The end of every bar's track; absent: the longest bar. */
  max?: number;
}

type Charts = ReturnType<typeof chartsOf>;

/** Most networks in one chart, each in its own colour. */
const coloursMax = 8;
/** Most bars in one chart. */
const barsMax = 12;
const nameLengthMax = 60;

function shortName(network: string): string {
  const name = visibleText(shownNetwork(network));
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
      .map((name) => ({ name, values: buckets.map((bucket) => bucket[name]) })),
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

/** The networks with the most requests, as many as there are colours. */
function busiest({ networks }: Report): NetworkReport[] {
  return networks
    .filter(({ add }) => add.count > 0)
    .sort((a, b) => b.add.count - a.add.count)
    .slice(0, coloursMax);
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
    series: busiest(report).map(({ network, add }) => ({
      name: shortName(network),
      shares: spans.map((span) => twoDigits(((add.histogram[span] ?? 0) / add.count) * 100)),
    })),
  };
}

/** Rounds to two digits after the point. */
const twoDigits = (value: number): number => Math.round(value * 100) / 100;

/** Shares where a total is known, else the counts. */
function occupancyChart({ networks }: Report): BarChart | null {
  const known = networks.filter((one) => fullerFamily(one).total !== null);
  const drawn = known.length > 0 ? known : networks.filter((one) => fullerFamily(one).used > 0);
  const size = (one: NetworkReport) => {
    const { used, total } = fullerFamily(one);
    return total === null ? used : Math.min(100, twoDigits((used / total) * 100));
  };
  const bars = drawn.toSorted((a, b) => size(b) - size(a)).slice(0, barsMax);
  if (bars.length === 0) return null;
  return {
    type: "bars",
    names: bars.map(({ network }) => shortName(network)),
    series: [{ name: "used", tint: "c0", values: bars.map(size) }],
    labels: bars.map((one) => {
      const { used, total } = fullerFamily(one);
      if (total === null) return shownAddresses(one);
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
  const own = deciders.length > coloursMax ? deciders.slice(0, coloursMax - 1) : deciders;
  const names = own.map((decider) => visibleText(decider) || "not recorded");
  if (deciders.length > own.length) names.push("others");
  const value = (network: string, decider: string | undefined) =>
    decisions
      .filter((one) => one.network === network)
      .filter(({ decidedBy: by }) => (decider === undefined ? !own.includes(by) : by === decider))
      .reduce((sum, { requests }) => sum + requests, 0);
  return {
    type: "bars",
    names: bars.map(([network]) => shortName(network)),
    series: names.map((name, i) => ({
      name,
      tint: `c${i}`,
      values: bars.map(([network]) => value(network, own[i])),
    })),
    labels: bars.map(([, requests]) => formatCount(requests)),
  };
}
