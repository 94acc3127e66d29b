/**
 * The report as one self-contained page: what failed, a map, tables with every number, charts, and
 * a section about each pod, network and cause. Its words are in page.html. Without scripts all of
 * it can be read; a script draws the charts, sorts the tables and searches.
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
import type {
  AttachmentReport,
  ClusterReport,
  FailureReport,
  NetworkReport,
  PodReport,
  Report,
  RequestReport,
  RulesetReport,
} from "./document.ts";
import { type Markup, scriptJson, toMarkup, trusted } from "./markup.ts";
import pageStyle from "./page.css" with { type: "text" };
import page from "./page.html" with { type: "text" };
// @ts-expect-error a text, not page.ts
import script from "./page.js" with { type: "text" };
import { chartsOf, heldNetworks, shownSpan, usedSpans } from "./page_charts.ts";
import itemTemplate from "./page_item.html" with { type: "text" };
import mapTemplate from "./page_map.html" with { type: "text" };
import {
  causeItems,
  type Index,
  indexOf,
  isAttached,
  itemsMax,
  link,
  mapOf,
  networkItems,
  podItems,
  shorten,
} from "./page_pods.ts";
import tableTemplate from "./page_table.html" with { type: "text" };
import { formatCount, formatSpan, formatTime } from "./quantity.ts";
import * as tables from "./table.ts";
import { fill, type Values } from "./template.ts";

/** What a page shows besides the report. */
export interface PageDetails {
  /** The rules in force, of the pods it is about. */
  rulesets: readonly RulesetReport[];
  /** The one pod that it is about. */
  pod?: PodReport;
}

/** Most text of rules in a page, in characters. */
const rulesLengthMax = 1_000_000;
/** Most nodes in the map. */
const mapNodesMax = 60;

/** Formats the page. Its size has its limits, however many requests there were. */
export function formatPage(report: Report | ClusterReport, details?: PageDetails): string {
  const charts = chartsOf(report);
  const style = `${libraryStyle}\n${pageStyle}`;
  const policy =
    `default-src 'none'; script-src ${hash(library)} ${hash(script)}; ` +
    `style-src ${hash(style)}; base-uri 'none'; form-action 'none'`;
  const pod = details?.pod;
  const index = indexOf(pod ? { ...report, requests: pod.requests, failed: [] } : report);
  const pods = items(podItems(index, rulesReader(details?.rulesets ?? []), pod !== undefined));
  const unsized = report.networks.flatMap((one) => (one.held ? [] : [one.network]));
  const values = {
    policy,
    style: trusted(style),
    ...charts,
    ...tables.factsOf(report, "No requests on record"),
    ...tablesOf(report, index),
    subject: tables.visibleText(subjectOf(report, pod)),
    map: mapMarkup(report, index),
    story: pod && pods,
    podItems: !pod && pods,
    networkItems: items(networkItems(report, index)),
    causeItems: items(causeItems(report, index)),
    unsized: tables.visibleText(unsized.slice(0, fewMax).join(", ")),
    moreUnsized: unsized.length > fewMax && formatCount(unsized.length - fewMax),
    morePods: index.pods.size > itemsMax && formatCount(index.pods.size - itemsMax),
    isHeldCut: heldNetworks(report).length > tables.coloursMax,
    isFailuresCut: report.failures.length >= rowsMax && formatCount(rowsMax),
    licence,
    data: scriptJson(charts),
    library: trusted(library),
    script: trusted(script),
  };
  // The template is a text, although Bun's types declare a bundle.
  return fill(String(page), values, toMarkup);
}

/** Sections that can be opened; "" where there are none. */
function items(all: Values[]): Markup | "" {
  if (all.length === 0) return "";
  const values = { items: all, all: all.length > fewMax && formatCount(all.length) };
  return trusted(fill(String(itemTemplate), values, toMarkup));
}

/** What the page is about. */
function subjectOf(report: Report | ClusterReport, pod: PageDetails["pod"]): string {
  const where = "nodes" in report ? `${formatCount(report.nodes.length)} nodes` : report.node;
  if (pod) return `Pod ${pod.pod.namespace}/${pod.pod.name}${where && ` on ${where}`}`;
  return "nodes" in report ? where : `Node ${where || "of an unknown name"}`;
}

/** Finds the rules of a pod, as long as the page has room for them. */
function rulesReader(rulesets: readonly RulesetReport[]) {
  const byPod = new Map<string, RulesetReport[]>();
  for (const one of rulesets) {
    byPod.getOrInsertComputed(tables.about.pod(one.namespace, one.pod), () => []).push(one);
  }
  let room = rulesLengthMax;
  return (namespace: string, name: string): Values[] =>
    (byPod.get(tables.about.pod(namespace, name)) ?? []).flatMap(({ at, ruleset, hostRuleset }) => {
      const since = `Network policy in force since ${formatTime(at)}`;
      const all = [
        { head: since, text: ruleset },
        { head: `${since}, at the node's side`, text: hostRuleset },
      ];
      return all.flatMap(({ head, text }) => {
        if (text === "") return [];
        room -= text.length;
        const shown = text.replace(/[^\n]+/g, (line) =>
          tables.visibleText(line.replaceAll("\t", "  ")),
        );
        return { head, text: room < 0 ? "See genie report, of this pod alone." : shown };
      });
    });
}

function mapMarkup(report: Report | ClusterReport, index: Index): Markup | "" {
  const nodes = "nodes" in report ? tables.rankedNodes(report.nodes) : undefined;
  const one = { node: report.node || "This node", error: "", totals: report.totals };
  const shown = (nodes ?? [one]).slice(0, mapNodesMax);
  const maps = shown.map(({ node, error, totals }) => {
    const map = mapOf(report, index, { node: nodes && node, nodes: shown.length });
    const isBad = error !== "" || map.networks.some(({ health }) => health === "bad");
    return {
      ...map,
      node: tables.visibleText(node),
      health: isBad ? "bad" : "good",
      about: tables.visibleText(error || `${formatCount(totals.attachments)} attached`),
    };
  });
  if (!nodes && maps[0]?.networks.length === 0) return "";
  const more = (nodes ?? []).length - mapNodesMax;
  const rest = more > 0 ? `<p class="about">${formatCount(more)} more nodes: see Nodes.</p>` : "";
  return trusted(fill(String(mapTemplate), { nodes: maps }, toMarkup) + rest);
}

/** A source expression of the policy that allows exactly this text. */
function hash(text: string): string {
  return `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
}

/** Rows and sections shown at first, as page.css has it. */
const fewMax = 10;
/** Most rows of one table; all of them are in the JSON. */
const rowsMax = 1000;

/**
 * A table that scrolls sideways in its own box. As `cards` a phone shows each row as a card, for
 * tables of long texts. "" where there are no rows.
 */
function table<T>(
  caption: string,
  columns: readonly tables.ReportColumn<T>[],
  rows: readonly T[],
  { layout, index }: { layout?: "cards"; index?: Index } = {},
): Markup | "" {
  if (rows.length === 0) return "";
  const shown = columns.filter(({ only }) => only !== "terminal");
  const more = rows.length - rowsMax;
  const values = {
    caption,
    layout: layout ?? "",
    heads: shown.map(({ title, kind }) => {
      return { title: tables.visibleText(title), mark: kind === "number" ? kind : "" };
    }),
    rows: rows
      .slice(0, rowsMax)
      .map((row) => ({ cells: shown.map((one) => cellOf(one, row, index)) })),
    isSorted: rows.length > 1,
    all: rows.length > fewMax && formatCount(Math.min(rows.length, rowsMax)),
    more: more > 0 ? formatCount(more) : "",
  };
  return trusted(fill(String(tableTemplate), values, toMarkup));
}

function cellOf<T>(column: tables.ReportColumn<T>, row: T, index?: Index): Values {
  const { title, kind, isHead, cell, about } = column;
  const text = tables.visibleText(cell(row));
  const isPlain = kind === "number" || kind === "time" || kind === "state";
  const isLong = kind === "message" || kind === "fault";
  const words = isLong ? "words long" : "words";
  const mark = isPlain ? kind : kind === "fault" && text !== "ok" ? `${words} bad` : words;
  const shown = index && about ? link(index, about(row), text) : text;
  return { title: tables.visibleText(title), text: shown, isHead, mark };
}

/** Every table; "" for one without rows. */
function tablesOf(report: Report | ClusterReport, index: Index): Values {
  const { networks, timeline, causes, decisions, stuck, requests, policy } = report;
  const span = formatSpan(timeline.bucketMs);
  const times = timeline.buckets.filter(({ ok, failed, denied }) => ok + failed + denied > 0);
  const linked = { index };
  const cards = { index, layout: "cards" } as const;
  return {
    failuresTable: table(
      "Failures, the newest first",
      failureColumns(report, index),
      report.failures,
      cards,
    ),
    attachmentsTable: table(
      "Attachments that exist now",
      attachmentColumns(report.attachments),
      report.attachments,
      cards,
    ),
    timeTable: table(
      `Requests by time, ${span} each; times without any are left out`,
      bucketColumns,
      times.toReversed(),
    ),
    networksTable: table("Networks and their numbers", tables.networkColumns, networks, linked),
    nodesTable:
      "nodes" in report
        ? table("Nodes and their numbers", tables.nodeColumns, tables.rankedNodes(report.nodes))
        : "",
    latencyTable: table("Successful ADDs by duration", latencyColumns(report), usedSpans(report)),
    causesTable: table("The newest message of each cause", causeColumns, causes, cards),
    occupancyTable: table("Addresses of the attachments that exist now", addressColumns, networks),
    decisionsTable: table("ADDs by network and who decided", decisionColumns, decisions, linked),
    choiceItems: items(report.choices.slice(0, choicesMax).map(choiceOf)),
    stuckTable: table("Attachments whose DEL failed", tables.stuckColumns(stuck), stuck, cards),
    problemsTable: table(
      "Problems in policies; the rest of each is in force",
      tables.problemColumns,
      policy?.problems ?? [],
      cards,
    ),
    requestsTable: table(
      "Newest requests, the newest first",
      // The list of failures has whole messages.
      tables
        .requestColumns(requests)
        .map((one) => ({ ...one, cell: (row: RequestReport) => shorten(one.cell(row)) })),
      requests,
      cards,
    ),
  };
}

/** Most automatic choices shown. */
const choicesMax = 100;

/** What failed: who, where, why, how often, since when, and whether it works by now. */
function failureColumns(report: Report, index: Index): tables.ReportColumn<FailureReport>[] {
  const causes = new Map(report.causes.map((one) => [tables.about.cause(one), one.cause]));
  const names = (one: FailureReport) => causes.get(tables.about.cause(one)) ?? "other";
  return [
    { title: "Last (UTC)", kind: "time", cell: ({ last }) => formatTime(last) },
    { title: "First (UTC)", kind: "time", cell: ({ first }) => formatTime(first) },
    tables.numberColumn("Tries", ({ requests }) => requests),
    ...tables.nodeColumnOf(report.failures),
    tables.podColumn(),
    tables.networkColumn(),
    { title: "Command", kind: "state", cell: ({ command }) => command },
    { title: "Cause", about: tables.about.cause, cell: (one) => `${one.code} ${names(one)}` },
    { title: "Message", kind: "message", cell: tables.shownError },
    { title: "Now", kind: "state", cell: (one) => (isAttached(index, one) ? "attached" : "–") },
  ];
}

function attachmentColumns(
  rows: readonly AttachmentReport[],
): tables.ReportColumn<AttachmentReport>[] {
  return [
    tables.podColumn(),
    ...tables.nodeColumnOf(rows),
    tables.networkColumn(),
    { title: "Interface", cell: (one) => one.interface },
    { title: "Addresses", kind: "list", cell: ({ addresses }) => addresses.join(", ") || "–" },
    { title: "MAC", kind: "time", cell: ({ mac }) => mac || "–" },
    { title: "Since (UTC)", kind: "time", cell: ({ createdAt }) => formatTime(createdAt) },
    { title: "State", kind: "state", cell: ({ state }) => state },
    { title: "Policy", cell: ({ policySince }) => (policySince ? "in force" : "–") },
  ];
}

function choiceOf({ at, namespace, pod, network, choice }: Report["choices"][number]): Values {
  const { columns, rows } = tables.candidatesOf(choice);
  const who = tables.shownPod(namespace, pod);
  const title = `${formatTime(at)}: ${tables.shownNetwork(network)} for ${who}`;
  const raw = toMarkup(tables.visibleText(JSON.stringify(choice)));
  const candidates = table("The candidates and their numbers", columns, rows);
  return { title: tables.visibleText(title), content: candidates || trusted(`<p>${raw}</p>`) };
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
  { title: "Cause", isHead: true, cell: ({ cause }) => cause, about: tables.about.cause },
  tables.numberColumn("Code", ({ code }) => String(code)),
  tables.numberColumn("Requests", ({ requests }) => requests),
  { title: "Newest", cell: tables.shownError },
];

const decisionColumns: tables.ReportColumn<Report["decisions"][number]>[] = [
  { ...tables.networkColumn(), isHead: true },
  { title: "Decided by", cell: ({ decidedBy }) => decidedBy || "not recorded" },
  tables.numberColumn("ADDs", ({ requests }) => requests),
];
