/**
 * Reports as text: tables that fit a terminal, and CSV (RFC 4180) for spreadsheets. Pure: a report
 * in, text out.
 *
 * CSV has the header first, CRLF at the end of every line, and quotes where needed. Texts come from
 * others: control characters are replaced, and a text that a spreadsheet would take for a formula
 * (it begins with `=`, `+`, `-` or `@`, also of full width) gets an apostrophe in front, which
 * spreadsheets hide.
 */
import type { ClusterReport, NodeReport, PodReport, Report, RequestReport } from "./document.ts";
import { formatCount, formatDuration, formatShare, formatTime, isoTime } from "./quantity.ts";
import type { NumberedRow } from "./record_reader.ts";
import {
  type Column,
  candidatesOf,
  formatTable,
  networkColumns,
  nodeColumns,
  numberColumn,
  problemColumns,
  type ReportColumn,
  rankedNodes,
  requestColumns,
  shownNetwork,
  shownOutcome,
  shownScope,
  stuckColumns,
  visibleText,
} from "./table.ts";

/** Most rows of a table of nodes; all of them are in the JSON. */
const nodesMax = 50;

/** Formats the default view. @param width columns of the terminal, Infinity for none */
export function formatReport(report: Report | ClusterReport, width: number): string {
  const { totals, networks } = report;
  const nodes = "nodes" in report ? rankedNodes(report.nodes) : [];
  const missing = nodes.filter(({ error }) => error !== "");
  const answered = nodes.filter(({ error }) => error === "");
  return sections([
    summary(report, nodes.length, answered.length),
    notices(report.notices),
    nodeTable("Nodes that are not in this report", missingColumns, missing, width),
    networks.length === 0
      ? "No network has requests or attachments.\n"
      : `${table(networkColumns, networks, width)}P50 to P99: successful ADDs; USED: addresses; ` +
        "LIVE: attachments now\n",
    nodeTable("Nodes, those with the most trouble first", nodeColumns, answered, width),
    stuckText(report, width),
    policyText(report, width),
    nodes.length === 0
      ? requestText("requests", report.requests, totals.requests, width)
      : requestText("failures", report.failed, totals.failures, width),
  ]);
}

const sections = (texts: string[]): string => texts.filter((text) => text !== "").join("\n");

function summary(report: Report, nodes: number, answered: number): string {
  const { totals } = report;
  const denied = totals.denied > 0 ? `, ${formatCount(totals.denied)} of them denied` : "";
  return (
    (nodes > 0 ? `Nodes: ${formatCount(nodes)}, answered ${formatCount(answered)}\n` : "") +
    `Requests: ${formatCount(totals.requests)}, failed ${formatCount(totals.failures)} ` +
    `(${formatShare(totals.failures, totals.requests)})${denied}\n` +
    `Span: ${shownScope(report, "no requests on record")}\n` +
    `Attachments now: ${formatCount(totals.attachments)}, leaked ` +
    `${formatCount(totals.leaked)}, failing ${formatCount(totals.failing)}\n`
  );
}

function notices(texts: string[]): string {
  return texts.map((text) => `Note: ${visibleText(text)}\n`).join("");
}

/** How a terminal lays out cells of each kind. */
const layouts: Record<NonNullable<ReportColumn<never>["kind"]>, Omit<Column, "title">> = {
  number: { align: "right" },
  time: {},
  state: {},
  name: { shrinks: true, cut: "middle" },
  node: { shrinks: true },
  list: { shrinks: true },
  message: { wraps: true },
  fault: { wraps: true },
};

/** @param max most rows shown */
function table<T>(
  columns: readonly ReportColumn<T>[],
  rows: readonly T[],
  width: number,
  max = rows.length,
): string {
  const shown = columns.filter(({ only }) => only !== "page");
  const cells = shown.map(({ kind, cell }) => {
    const texts = rows.map(cell);
    return kind === "node" ? withoutDomain(texts) : texts;
  });
  return formatTable(
    shown.map(({ title, terminalTitle = title.toUpperCase(), kind }) => ({
      title: visibleText(terminalTitle),
      ...(kind && layouts[kind]),
    })),
    rows.slice(0, max).map((_, i) => cells.map((texts) => texts[i] ?? "")),
    width,
  );
}

/** Leaves out the domain that all of these names end in. */
function withoutDomain(names: readonly string[]): readonly string[] {
  const domain = (name: string) => /^[^.]*[a-z][^.]*(\..+)$/i.exec(name)?.[1] ?? "";
  const shared = domain(names[0] ?? "");
  if (shared === "" || names.some((one) => domain(one) !== shared)) return names;
  return names.map((one) => one.slice(0, -shared.length));
}

const missingColumns: ReportColumn<NodeReport>[] = [
  { title: "Node", kind: "list", cell: ({ node }) => node },
  { title: "Why", kind: "message", cell: ({ error }) => error },
];

function nodeTable(
  title: string,
  columns: ReportColumn<NodeReport>[],
  nodes: NodeReport[],
  width: number,
): string {
  if (nodes.length === 0) return "";
  const more = nodes.length - nodesMax;
  const rest = more > 0 ? `${formatCount(more)} more nodes: --json and --csv have them\n` : "";
  return `${title}\n${table(columns, nodes, width, nodesMax)}${rest}`;
}

function stuckText({ stuck, totals }: Report, width: number): string {
  if (stuck.length === 0) return "";
  const all = totals.leaked + totals.failing;
  const more = all > stuck.length ? `, ${formatCount(stuck.length)} of ${formatCount(all)}` : "";
  const isAnyLost = stuck.some(({ state }) => state === "planned");
  const lost = isAnyLost ? ", planned (genie repair makes it)" : "";
  return (
    `Leaked (genie gc retries) and failing (the runtime retries)${lost}${more}\n` +
    table(stuckColumns(stuck), stuck, width)
  );
}

function policyText({ policy }: Report, width: number): string {
  if (!policy) return "";
  const { knownAt, enforced, problems } = policy;
  const known = knownAt === null ? "never" : `${formatTime(knownAt)} UTC`;
  const line = `Policies: pods with rules ${formatCount(enforced)}, known as of ${known}\n`;
  if (problems.length === 0) return line;
  return (
    `${line}Problems in policies; the rest of each is in force\n` +
    table(problemColumns, problems, width)
  );
}

function requestText(
  what: "requests" | "failures",
  requests: RequestReport[],
  all: number,
  width: number,
): string {
  if (requests.length === 0) return all === 0 ? `No ${what} in this time.\n` : "";
  return (
    `Newest ${what}, ${formatCount(requests.length)} of ${formatCount(all)}\n` +
    table(requestColumns(requests), requests, width)
  );
}

/** Formats the view of one pod. @param width columns of the terminal, Infinity for none */
export function formatPodReport(report: PodReport, width: number): string {
  const { pod, attachments, requests, choices, rulesets = [] } = report;
  const name = visibleText(`${pod.namespace}/${pod.name}`);
  return sections([
    attachments.length === 0
      ? `Pod ${name} has no attachments.\n`
      : `Pod ${name} has\n${table(podAttachmentColumns, attachments, width)}`,
    notices(report.notices),
    requests.length === 0
      ? "No requests in this time.\n"
      : `Its newest requests\n${table(podRequestColumns, requests, width)}`,
    ...choices.map((choice) => choiceText(choice, width)),
    ...rulesets.flatMap(({ at, ruleset, hostRuleset }) => [
      rulesText(at, "", ruleset),
      rulesText(at, ", at the node's side", hostRuleset),
    ]),
  ]);
}

const podAttachmentColumns: ReportColumn<PodReport["attachments"][number]>[] = [
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

const podRequestColumns: ReportColumn<RequestReport>[] = [
  { title: "Time (UTC)", kind: "time", cell: ({ at }) => formatTime(at) },
  { title: "Command", cell: ({ command }) => command },
  {
    title: "Network",
    kind: "list",
    cell: ({ kind, plugin, network }) => {
      if (kind === "plugin") return `  ${plugin} (plugin)`;
      return kind === "call" ? "call" : shownNetwork(network);
    },
  },
  { title: "Interface", cell: ({ ifName }) => ifName },
  numberColumn("Took", ({ durationUs }) => formatDuration(durationUs)),
  { title: "Why", cell: ({ decidedBy }) => decidedBy },
  { title: "Outcome", kind: "fault", cell: shownOutcome },
];

type Choice = PodReport["choices"][number];

function choiceText({ at, network, choice }: Choice, width: number): string {
  const { columns, rows } = candidatesOf(choice);
  const numbers =
    rows.length === 0 ? `${visibleText(JSON.stringify(choice))}\n` : table(columns, rows, width);
  return `Choice of ${formatTime(at)} UTC: ${visibleText(shownNetwork(network))}\n${numbers}`;
}

function rulesText(at: string | null, where: string, ruleset: string): string {
  if (ruleset === "") return "";
  const lines = ruleset.replace(/[^\n]+/g, (line) => visibleText(line.replaceAll("\t", "  ")));
  return `Network policy in force since ${formatTime(at)} UTC${where}\n${lines}`;
}

/** Names of the columns of `ledgerRows()`, in its order. */
const ledgerCsvHeader =
  "id,at,kind,command,container_id,pod_namespace,pod_name,pod_uid,network,plugin,interface," +
  "duration_us,outcome,code,error,addresses,config_hash,decided_by,rule,choice\r\n";

const nodeCsvColumns: [name: string, cell: (node: NodeReport) => string | number][] = [
  ["node", ({ node }) => node],
  ["error", ({ error }) => error],
  ["genie", ({ genie }) => genie],
  ["generated_at", ({ generatedAt }) => generatedAt ?? ""],
  ["requests", ({ totals }) => totals.requests],
  ["failures", ({ totals }) => totals.failures],
  ["denied", ({ totals }) => totals.denied],
  ["adds", ({ totals }) => totals.add.count],
  ["p50_us", ({ totals }) => totals.add.p50Us ?? ""],
  ["p95_us", ({ totals }) => totals.add.p95Us ?? ""],
  ["p99_us", ({ totals }) => totals.add.p99Us ?? ""],
  ["attachments", ({ totals }) => totals.attachments],
  ["failing", ({ totals }) => totals.failing],
  ["leaked", ({ totals }) => totals.leaked],
  ["ipv4", ({ addresses }) => addresses.ipv4],
  ["ipv6", ({ addresses }) => addresses.ipv6],
];

/** Formats the nodes of a report of many; one that has no report has an error, and no numbers. */
export function formatNodesCsv(nodes: readonly NodeReport[]): string {
  const cells = (one: NodeReport) =>
    nodeCsvColumns.map(([, cell], i) => (one.error === "" || i < 2 ? cell(one) : ""));
  return [nodeCsvColumns.map(([name]) => name), ...nodes.map(cells)].map(csvLine).join("");
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

function csvLine(cells: (string | number)[]): string {
  return `${cells.map(csvField).join(",")}\r\n`;
}

function csvField(cell: string | number): string {
  if (typeof cell === "number") return String(cell);
  const clean = visibleText(cell);
  const safe = /^\s*[=+\-@＝＋－＠]/.test(clean) ? `'${clean}` : clean;
  return /[",]|^\s|\s$/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
