/**
 * Reports as text: tables that fit a terminal, and CSV (RFC 4180) for spreadsheets. Pure: a report
 * in, text out. Its words are in report.txt and pod.txt.
 *
 * CSV has the header first, CRLF at the end of every line, and quotes where needed. Texts come from
 * others: control characters are replaced, and a text that a spreadsheet would take for a formula
 * (it begins with `=`, `+`, `-` or `@`, also of full width) gets an apostrophe in front, which
 * spreadsheets hide.
 */
import type { ClusterReport, NodeReport, PodReport, Report, RequestReport } from "./document.ts";
import podTemplate from "./pod.txt" with { type: "text" };
import { formatCount, formatDuration, formatTime, isoTime } from "./quantity.ts";
import type { NumberedRow } from "./record_reader.ts";
import reportTemplate from "./report.txt" with { type: "text" };
import * as tables from "./table.ts";
import { fill, type Values } from "./template.ts";

/** Most rows of a table of nodes; all of them are in the JSON. */
const nodesMax = 50;

/** Formats the default view. @param width columns of the terminal, Infinity for none */
export function formatReport(report: Report | ClusterReport, width: number): string {
  const { totals, networks, stuck, policy } = report;
  const nodes = "nodes" in report ? tables.rankedNodes(report.nodes) : [];
  const missing = nodes.filter(({ error }) => error !== "");
  const answered = nodes.filter(({ error }) => error === "");
  const [what, newest, all] =
    nodes.length === 0
      ? ["requests", report.requests, totals.requests]
      : ["failures", report.failed, totals.failures];
  return fillSections(reportTemplate, {
    ...tables.factsOf(report, "no requests on record"),
    isMany: nodes.length > 0,
    missingTable: nodeTable(missingColumns, missing, width),
    networksTable: table(tables.networkColumns, networks, width),
    nodesTable: nodeTable(tables.nodeColumns, answered, width),
    stuckTable: table(tables.stuckColumns(stuck), stuck, width),
    problemsTable: table(tables.problemColumns, policy?.problems ?? [], width),
    what,
    listed: formatCount(newest.length),
    all: formatCount(all),
    newestTable: table(tables.requestColumns(newest), newest, width),
    isNone: all === 0,
  });
}

/**
 * Fills a template whose sections have a line of dashes between them. In the text an empty line
 * parts them, and those that are empty are left out.
 */
export function fillSections(template: string, values: Values): string {
  const sections = template.split("----\n").map((section) => fill(section, values).trimEnd());
  return `${sections.filter((text) => text !== "").join("\n\n")}\n`;
}

type Kind = tables.ReportColumn<never>["kind"];
/** How a terminal lays out cells of each kind. */
const layouts: { [kind in Kind & string]?: Omit<tables.Column, "title"> } = {
  number: { align: "right" },
  name: { shrinks: true, cut: "middle" },
  node: { shrinks: true },
  list: { shrinks: true },
  message: { wraps: true },
  fault: { wraps: true },
};

/** A table without the end of its last line; "" where there are no rows. */
export function table<T>(
  columns: readonly tables.ReportColumn<T>[],
  rows: readonly T[],
  width: number,
  max = rows.length,
): string {
  if (rows.length === 0) return "";
  const shown = columns.filter(({ only }) => only !== "page");
  const cells = shown.map(({ kind, cell }) => {
    const texts = rows.map(cell);
    return kind === "node" ? withoutDomain(texts) : texts;
  });
  const titled = shown.map(({ title, terminalTitle = title.toUpperCase(), kind }) => {
    return { title: tables.visibleText(terminalTitle), ...(kind && layouts[kind]) };
  });
  const lines = rows.slice(0, max).map((_, i) => cells.map((texts) => texts[i] ?? ""));
  return tables.formatTable(titled, lines, width).trimEnd();
}

/** Leaves out the domain that all of these names end in. */
function withoutDomain(names: readonly string[]): readonly string[] {
  const domain = (name: string) => /^[^.]*[a-z][^.]*(\..+)$/i.exec(name)?.[1] ?? "";
  const shared = domain(names[0] ?? "");
  if (shared === "" || names.some((one) => domain(one) !== shared)) return names;
  return names.map((one) => one.slice(0, -shared.length));
}

const missingColumns: tables.ReportColumn<NodeReport>[] = [
  { title: "Node", kind: "list", cell: ({ node }) => node },
  { title: "Why", kind: "message", cell: ({ error }) => error },
];

function nodeTable(columns: tables.ReportColumn<NodeReport>[], nodes: NodeReport[], width: number) {
  const more = nodes.length - nodesMax;
  const rest = more > 0 ? `\n${formatCount(more)} more nodes: --json and --csv have them` : "";
  return table(columns, nodes, width, nodesMax) + rest;
}

/** Formats the view of one pod. @param width columns of the terminal, Infinity for none */
export function formatPodReport(report: PodReport, width: number): string {
  const { pod, notices, attachments, requests, choices, rulesets = [] } = report;
  const rules = (at: string | null, where: string, ruleset: string) =>
    ruleset === "" ? [] : [{ at: formatTime(at), where, rules: visibleRules(ruleset) }];
  return fillSections(podTemplate, {
    pod: tables.visibleText(`${pod.namespace}/${pod.name}`),
    attachmentsTable: table(podAttachmentColumns, attachments, width),
    notices: notices.map((text) => ({ notice: tables.visibleText(text) })),
    requestsTable: table(podRequestColumns, requests, width),
    choices: choices.map(({ at, network, choice }) => {
      const { columns, rows } = tables.candidatesOf(choice);
      const numbers = table(columns, rows, width) || tables.visibleText(JSON.stringify(choice));
      const name = tables.visibleText(tables.shownNetwork(network));
      return { at: formatTime(at), network: name, numbers };
    }),
    rulesets: rulesets.flatMap(({ at, ruleset, hostRuleset }) => [
      ...rules(at, "", ruleset),
      ...rules(at, ", at the node's side", hostRuleset),
    ]),
  });
}

function visibleRules(ruleset: string): string {
  const shown = (line: string) => tables.visibleText(line.replaceAll("\t", "  "));
  return ruleset.replace(/[^\n]+/g, shown).trimEnd();
}

const podAttachmentColumns: tables.ReportColumn<PodReport["attachments"][number]>[] = [
  { title: "Network", kind: "name", cell: ({ network }) => network },
  { title: "Interface", cell: (one) => one.interface },
  { title: "Addresses", kind: "list", cell: ({ addresses }) => addresses.join(", ") || "–" },
  { title: "State", kind: "state", cell: ({ state }) => state },
  {
    title: "Since (UTC)",
    kind: "time",
    cell: ({ failingSince, createdAt }) => formatTime(failingSince ?? createdAt),
  },
  {
    title: "Why",
    kind: "message",
    cell: ({ reason, error }) => (error === "" ? reason : `${reason}; ${error}`),
  },
];

const podRequestColumns: tables.ReportColumn<RequestReport>[] = [
  { title: "Time (UTC)", kind: "time", cell: ({ at }) => formatTime(at) },
  { title: "Command", cell: ({ command }) => command },
  {
    title: "Network",
    kind: "list",
    cell: ({ kind, plugin, network }) => {
      if (kind === "plugin") return `  ${plugin} (plugin)`;
      return kind === "call" ? "call" : tables.shownNetwork(network);
    },
  },
  { title: "Interface", cell: ({ ifName }) => ifName },
  tables.numberColumn("Took", ({ durationUs }) => formatDuration(durationUs)),
  { title: "Why", cell: ({ decidedBy }) => decidedBy },
  { title: "Outcome", kind: "fault", cell: tables.shownOutcome },
];

/** Names of the columns of `ledgerRows()`, in its order. */
const ledgerCsvHeader =
  "id,at,kind,command,container_id,pod_namespace,pod_name,pod_uid,network,plugin,interface," +
  "duration_us,outcome,code,error,addresses,config_hash,decided_by,rule,choice\r\n";

const nodeCsvHeader =
  "node,error,genie,generated_at,requests,failures,denied,adds,p50_us,p95_us,p99_us," +
  "attachments,failing,leaked,ipv4,ipv6,pods,failed_pods\r\n";

/** Formats the nodes of a report of many; one that has no report has an error, and no numbers. */
export function formatNodesCsv(nodes: readonly NodeReport[]): string {
  const lines = nodes.map(({ node, error, genie, generatedAt, totals, addresses }) => {
    const { requests, failures, denied, add, attachments, failing, leaked } = totals;
    const counts = [requests, failures, denied, add.count, add.p50Us, add.p95Us, add.p99Us];
    const { ipv4, ipv6 } = addresses;
    const now = [attachments, failing, leaked, ipv4, ipv6, totals.pods, totals.failedPods];
    const rest = [genie, generatedAt, ...counts, ...now];
    return [node, error, ...rest.map((cell) => (error === "" ? (cell ?? "") : ""))];
  });
  return formatRowsCsv(nodeCsvHeader, lines);
}

/** Lines in one chunk. */
const chunkLines = 500;

/** Formats rows of the ledger, in chunks of many lines: there may be a million. */
export function* formatCsv(rows: Iterable<NumberedRow>): Generator<string, void> {
  let chunk = [ledgerCsvHeader];
  for (const { id, atMs, ...rest } of rows) {
    chunk.push(csvLine([id, isoTime(atMs) ?? "", ...Object.values(rest)]));
    if (chunk.length < chunkLines) continue;
    yield chunk.join("");
    chunk = [];
  }
  yield chunk.join("");
}

/** Formats lines of cells below a header. */
export function formatRowsCsv(header: string, lines: readonly (string | number)[][]): string {
  return header + lines.map(csvLine).join("");
}

function csvLine(cells: (string | number)[]): string {
  return `${cells.map(csvField).join(",")}\r\n`;
}

function csvField(cell: string | number): string {
  if (typeof cell === "number") return String(cell);
  const clean = tables.visibleText(cell);
  const safe = /^\s*[=+\-@＝＋－＠]/.test(clean) ? `'${clean}` : clean;
  return /[",]|^\s|\s$/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
