/**
 * Tables. The first half aligns one for a terminal, never wider than that. The second half is what
 * the tables of a report hold and how it words things: the text and the page only lay them out.
 * Pure.
 */
import { isObject } from "../json.ts";
import type {
  AddressReport,
  ClusterReport,
  NetworkReport,
  NodeReport,
  Report,
  RequestReport,
} from "./document.ts";
import {
  formatCount,
  formatDuration,
  formatRate,
  formatShare,
  formatSpan,
  formatTime,
} from "./quantity.ts";
import type { Values } from "./template.ts";

/** One column. */
export interface Column {
  title: string;
  /** Numbers are aligned right. */
  align?: "left" | "right";
  /** Becomes narrower when the terminal is narrow; at least one column should. */
  shrinks?: boolean;
  /** Becomes narrower before all others: a text that does not fit is printed below its row. */
  wraps?: boolean;
  /** Where a text that does not fit is cut. Both ends of a name with a random suffix matter. */
  cut?: "end" | "middle";
}

/** Narrowest a shrinking column becomes. */
const columnWidthMin = 8;
const gap = "  ";
/** Most lines printed below one row. */
const belowMax = 12;

/** A column and how wide it is drawn. */
type SizedColumn = Column & { width: number };

/**
 * Formats rows under their titles.
 * @param width columns of the terminal; Infinity where it is none, then nothing is cut
 */
export function formatTable(columns: Column[], rows: string[][], width: number): string {
  const clean = rows.map((row) => row.map((cell) => visibleText(cell)));
  const sized = columns.map((column, i) => {
    const widths = clean.map((row) => displayWidth(row[i] ?? ""));
    return { ...column, width: Math.max(displayWidth(column.title), ...widths) };
  });
  narrow(sized, width);
  const line = (cells: string[]): string =>
    sized
      .map((column, i) => paint(cells[i] ?? "", fit(cells[i] ?? "", column)))
      .join(gap)
      .trimEnd();
  const isLong = (cell: string, i: number) =>
    sized[i]?.wraps === true && displayWidth(cell) > sized[i].width;
  const lines = (cells: string[]): string[] => [
    line(cells.map((cell, i) => (isLong(cell, i) ? "" : cell))),
    ...cells.filter(isLong).flatMap((cell) => below(cell, width)),
  ];
  return `${[line(columns.map(({ title }) => title)), ...clean.flatMap(lines)].join("\n")}\n`;
}

/** Narrows the columns that wrap, then those that shrink, until the line fits. */
function narrow(columns: SizedColumn[], lineWidth: number): void {
  let excess = gap.length * (columns.length - 1) - lineWidth;
  for (const { width } of columns) excess += width;
  const shrinking = columns.filter(({ shrinks, wraps }) => shrinks && !wraps);
  for (const some of [columns.filter(({ wraps }) => wraps), shrinking]) {
    for (; excess > 0; excess--) {
      // The widest gives way; of several the last.
      const widest = some.toSorted((a, b) => a.width - b.width).at(-1);
      if (!widest || widest.width <= leastOf(widest)) break;
      widest.width--;
    }
  }
}

/** The least width of a column. One that wraps loses nothing, so only its title must fit. */
function leastOf({ title, wraps = false }: Column): number {
  return wraps ? displayWidth(title) : columnWidthMin;
}

function fit(text: string, { width, align = "left", cut = "end" }: SizedColumn): string {
  const shown = displayWidth(text) > width ? cuts[cut](text, width) : text;
  const pad = " ".repeat(Math.max(0, width - displayWidth(shown)));
  return align === "right" ? pad + shown : shown + pad;
}

const cuts = {
  end: (text: string, width: number) => `${cutTo(text, width - 1)}…`,
  middle: (text: string, width: number) => {
    const tail = Math.floor((width - 1) / 2);
    const end = [...text].reverse().join("");
    return `${cutTo(text, width - 1 - tail)}…${[...cutTo(end, tail)].reverse().join("")}`;
  },
};

/** Breaks a text into indented lines that fit the terminal. */
function below(text: string, width: number): string[] {
  const room = Math.max(columnWidthMin, width - gap.length);
  const lines: string[] = [];
  let rest = text.trim();
  while (rest !== "" && lines.length < belowMax) {
    const most = cutTo(rest, room);
    const space = most.length < rest.length ? `${most}${rest[most.length]}`.lastIndexOf(" ") : -1;
    const part = space > 0 ? rest.slice(0, space) : most || [...rest][0] || "";
    rest = rest.slice(part.length).trimStart();
    const isCut = rest !== "" && lines.length === belowMax - 1;
    lines.push(gap + (isCut ? `${cutTo(part, room - 1)}…` : part));
  }
  return lines;
}

function cutTo(text: string, width: number): string {
  let kept = "";
  for (const char of text) {
    if (displayWidth(kept + char) > width) break;
    kept += char;
  }
  return kept;
}

let isColoured = false;

/** Says whether words that judge have colours from now on: for a terminal. */
export function colourTables(on: boolean): void {
  isColoured = on;
}

/** Words that judge, as whole cells, and the number of their colour (ECMA-48, SGR). */
const colours = new Map(
  Object.entries({ ok: 32, attached: 32, allowed: 32, ready: 32 }).concat(
    Object.entries({ warning: 33, planned: 33, failing: 33, unknown: 33 }),
    Object.entries({ problem: 31, leaked: 31, failed: 31, denied: 31, closed: 31 }),
  ),
);

/** Colours what is shown of a cell, where the cell is such a word. */
export function paint(cell: string, shown = cell): string {
  const colour = isColoured ? colours.get(cell) : undefined;
  return colour === undefined ? shown : `\x1b[${colour}m${shown}\x1b[39m`;
}

/** Columns a text takes in a terminal. */
const displayWidth = (text: string): number => Bun.stringWidth(text);

/** Text from others as it may be shown: each control or invisible character becomes "�". */
export function visibleText(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must go
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]/g, "�");
}

/**
 * JSON whose control and invisible characters are escapes: it means the same, and can be shown on a
 * terminal.
 */
export function asciiJson(json: string): string {
  return json.replace(
    /[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** A column of a report's table. */
export interface ReportColumn<T> {
  /** As on the page; a terminal shows it in capitals. */
  title: string;
  /**
   * What the cells hold decides how they are laid out. Both ends of a `name` matter, as its suffix
   * is random; a `message` is never cut; a `fault` is a message that is "ok" where nothing is
   * wrong; a terminal leaves out the domain that all names of a `node` column share.
   */
  kind?: "number" | "time" | "state" | "name" | "node" | "list" | "message" | "fault";
  cell: (row: T) => string;
  /** What the cell names, see {@link about}: the page has a section about it. */
  about?: (row: T) => string;
  /** Its cells are the headings of their rows. */
  isHead?: true;
  /** The title on a terminal, if it is a different one. */
  terminalTitle?: string;
  /** The only place that shows it; absent: both do. */
  only?: "terminal" | "page";
}

/** Keys of what the page has a section about. */
export const about = {
  network: (name: string): string => `network ${name}`,
  pod: (namespace: string, name: string): string => `pod ${namespace}/${name}`,
  cause: ({ denied, code }: { denied: boolean; code: number }): string => `cause ${denied} ${code}`,
};

/** The column of a network. */
export function networkColumn<T extends { network: string }>(
  shown: (row: T) => string = ({ network }) => network,
): ReportColumn<T> {
  const key = ({ network }: T) => about.network(network);
  return { title: "Network", kind: "name", cell: (row) => shownNetwork(shown(row)), about: key };
}

/** The column of a pod. */
export function podColumn<T extends { namespace: string; pod: string }>(): ReportColumn<T> {
  return {
    ...{ title: "Pod", kind: "name" },
    cell: ({ namespace, pod }) => shownPod(namespace, pod),
    about: ({ namespace, pod }) => about.pod(namespace, pod),
  };
}

/** A column of numbers: counts, or numbers that are texts already. */
export function numberColumn<T>(
  title: string,
  cell: (row: T) => number | string,
  more: Pick<ReportColumn<T>, "terminalTitle" | "only"> = {},
): ReportColumn<T> {
  const shown = (value: number | string) =>
    typeof value === "number" ? formatCount(value) : value;
  return { title, kind: "number", cell: (row) => shown(cell(row)), ...more };
}

/** Columns of the networks, with what they are judged by. */
export const networkColumns: ReportColumn<NetworkReport>[] = [
  { ...networkColumn(), isHead: true },
  numberColumn("Requests", ({ requests }) => requests),
  numberColumn("Failed", ({ failures }) => failures),
  numberColumn("Share", ({ failures, requests }) => formatShare(failures, requests), {
    only: "page",
  }),
  numberColumn("p50", ({ add }) => formatDuration(add.p50Us)),
  numberColumn("p95", ({ add }) => formatDuration(add.p95Us)),
  numberColumn("p99", ({ add }) => formatDuration(add.p99Us)),
  numberColumn("Addresses", shownAddresses, { terminalTitle: "USED" }),
  numberColumn("Traffic", ({ bytesPerSecond }) => formatRate(bytesPerSecond)),
  numberColumn("Attachments", ({ attachments }) => attachments, { terminalTitle: "LIVE" }),
];

/** A number that is known only of nodes that answered. */
const nodeNumber: typeof numberColumn<NodeReport> = (title, cell, more) =>
  numberColumn(title, (node) => (node.error === "" ? cell(node) : "–"), more);

const stuckOf = ({ totals }: NodeReport): number => totals.leaked + totals.failing;

/** Columns of the nodes in a report of many. */
export const nodeColumns: ReportColumn<NodeReport>[] = [
  { title: "Node", kind: "node", isHead: true, cell: ({ node }) => node },
  nodeNumber("Requests", ({ totals }) => totals.requests),
  nodeNumber("Failed", ({ totals }) => totals.failures),
  nodeNumber("p50", ({ totals }) => formatDuration(totals.add.p50Us)),
  nodeNumber("p95", ({ totals }) => formatDuration(totals.add.p95Us), { only: "terminal" }),
  nodeNumber("p99", ({ totals }) => formatDuration(totals.add.p99Us)),
  nodeNumber("Addresses", ({ addresses: { ipv4, ipv6 } }) => ipv4 + ipv6, {
    terminalTitle: "USED",
  }),
  nodeNumber("Attachments", ({ totals }) => totals.attachments, { terminalTitle: "LIVE" }),
  nodeNumber("Stuck", stuckOf),
  { title: "Genie", only: "page", cell: ({ genie }) => genie },
  { title: "Answer", kind: "fault", only: "page", cell: ({ error }) => error || "ok" },
];

/** Nodes without a report first, then those with the most trouble. */
export function rankedNodes(nodes: readonly NodeReport[]): NodeReport[] {
  const rank = (node: NodeReport) => (node.error === "" ? stuckOf(node) : Number.MAX_SAFE_INTEGER);
  return nodes.toSorted((a, b) => rank(b) - rank(a) || b.totals.failures - a.totals.failures);
}

/** A further column where the rows are of many nodes. */
export function nodeColumnOf<T extends { node?: string }>(rows: readonly T[]): ReportColumn<T>[] {
  if (rows.every(({ node }) => node === undefined)) return [];
  return [{ title: "Node", kind: "node", cell: ({ node = "" }) => node }];
}

type StuckReport = Report["stuck"][number];

/** Columns of the attachments that are leaked, failing or lost. */
export function stuckColumns(rows: readonly StuckReport[]): ReportColumn<StuckReport>[] {
  return [
    { title: "State", kind: "state", cell: ({ state }) => state },
    { title: "Since (UTC)", kind: "time", cell: ({ failingSince }) => formatTime(failingSince) },
    ...nodeColumnOf(rows),
    networkColumn(),
    podColumn(),
    { title: "Interface", cell: (one) => one.interface },
    { title: "Error", kind: "message", cell: ({ error }) => error },
  ];
}

/** Columns of what is wrong with policies. */
export const problemColumns: ReportColumn<NonNullable<Report["policy"]>["problems"][number]>[] = [
  { title: "Since (UTC)", kind: "time", cell: ({ at }) => formatTime(at) },
  { title: "Kind", cell: ({ kind }) => kind },
  { title: "Policy", kind: "name", cell: ({ namespace, name }) => shownPod(namespace, name) },
  { title: "Problem", kind: "message", cell: ({ path, problem }) => `${path}: ${problem}` },
];

/** Columns of the requests. */
export function requestColumns(rows: readonly RequestReport[]): ReportColumn<RequestReport>[] {
  return [
    { title: "Time (UTC)", kind: "time", cell: ({ at }) => formatTime(at) },
    { title: "Command", cell: ({ command }) => command },
    ...nodeColumnOf(rows),
    {
      ...{ title: "Pod", kind: "name" },
      cell: ({ podNamespace, podName }) => shownPod(podNamespace, podName),
      about: ({ podNamespace, podName }) => about.pod(podNamespace, podName),
    },
    // The row of a call that failed before any network has the name of genie's own config.
    networkColumn(({ kind, network }) => (kind === "call" ? "" : network)),
    numberColumn("Took", ({ durationUs }) => formatDuration(durationUs)),
    { title: "Outcome", kind: "fault", cell: shownOutcome },
  ];
}

const candidatesMax = 64;
const candidateColumnsMax = 12;

/** How the KPIs of an automatic choice are shown, by their key; others are shown as they are. */
const knownKpis = new Map<string, { title: string; show: (value: number) => string }>([
  ["occupancy", { title: "used", show: (share) => formatShare(share, 1) }],
  ["responseTimeUs", { title: "response", show: formatDuration }],
  ["failures", { title: "failures", show: (share) => formatShare(share, 1) }],
  ["bandwidth", { title: "traffic", show: formatRate }],
  ["recent", { title: "recent", show: String }],
  ["reason", { title: "why not", show: String }],
]);

/**
 * The numbers of an automatic choice: a row for each candidate, the best first, then those that
 * were rejected; columns in the order of their first mention. They are `candidates` and `rejected`
 * of an object, or a list: an older or a newer genie may have written them.
 * @returns no rows when there is nothing of the kind
 */
export function candidatesOf(choice: unknown): {
  columns: ReportColumn<string[]>[];
  rows: string[][];
} {
  const lists = isObject(choice) ? [choice["candidates"], choice["rejected"]] : [choice];
  const candidates = lists
    .flatMap((list) => (Array.isArray(list) ? list : []))
    .filter(isObject)
    .slice(0, candidatesMax);
  const isPlain = (value: unknown) => typeof value !== "object" || value === null;
  const named = candidates.flatMap((one) => Object.keys(one).filter((key) => isPlain(one[key])));
  const keys = [...new Set(["network", "score", ...named])]
    .filter((key) => candidates.some((one) => Object.hasOwn(one, key)))
    .slice(0, candidateColumnsMax);
  const kindOf = (key: string) => {
    if (candidates.every((one) => typeof (one[key] ?? 0) === "number")) return "number";
    return key === "reason" ? "message" : "list";
  };
  return {
    columns: keys.map((key, i) => ({
      title: knownKpis.get(key)?.title ?? key,
      kind: kindOf(key),
      cell: (row) => row[i] ?? "",
    })),
    rows: candidates.map((one) => keys.map((key) => shownKpi(key, one[key]))),
  };
}

function shownKpi(key: string, value: unknown): string {
  if (value === undefined || value === null) return "–";
  if (typeof value !== "number") return String(value);
  return knownKpis.get(key)?.show(value) ?? String(Math.round(value * 1000) / 1000);
}

/** The name of a network; a call can fail before it names one. */
export function shownNetwork(name: string): string {
  return name === "" ? "(none)" : name;
}

/** The family with the larger share in use; where no total is known, the one with more in use. */
export function fullerFamily({ addresses }: NetworkReport): AddressReport {
  const share = ({ used, total }: AddressReport) => (total === null ? -1 : used / total);
  const { ipv4, ipv6 } = addresses;
  if (share(ipv4) === share(ipv6)) return ipv4.used >= ipv6.used ? ipv4 : ipv6;
  return share(ipv4) > share(ipv6) ? ipv4 : ipv6;
}

/** `used/total` of the {@link fullerFamily}, or `used` where the total is not known. */
export function shownAddresses(network: NetworkReport): string {
  const { used, total } = fullerFamily(network);
  return total === null ? formatCount(used) : `${formatCount(used)}/${formatCount(total)}`;
}

/** `namespace/name` of a pod; "–" when it is not known. */
export function shownPod(namespace: string, name: string): string {
  return name === "" ? "–" : `${namespace}/${name}`;
}

/** The message of a failure, and the rule behind it where the message does not name it. */
export function shownError({ error, rule }: { error: string; rule: string }): string {
  return rule === "" || error.includes(rule) ? error : `${error} (${rule})`;
}

/** How a request ended: `ok`, or what failed and why. */
export function shownOutcome(request: RequestReport): string {
  const { outcome, code } = request;
  return outcome === "ok" ? "ok" : `${outcome} ${code}: ${shownError(request)}`;
}

/**
 * The time that a report covers and what its requests are limited to, on one line.
 * @param empty what stands for the time of an empty ledger
 */
function shownScope({ from, to, filter }: Report, empty: string): string {
  const span = from === null ? empty : `${formatTime(from)} to ${formatTime(to)} UTC`;
  const limits = [
    filter.since && `since ${formatTime(filter.since)}`,
    filter.network && `network ${filter.network}`,
    filter.namespace && `namespace ${filter.namespace}`,
    filter.pod && `pod ${filter.pod}`,
    filter.command && `command ${filter.command}`,
    filter.only && `${filter.only} only`,
  ];
  const shown = limits.filter((limit) => limit !== null).join(", ");
  return shown === "" ? span : visibleText(`${span}; ${shown}`);
}

/**
 * What a report tells in a word or a number, for its templates.
 * @param empty what stands for the time of an empty ledger
 */
export function factsOf(report: Report | ClusterReport, empty: string): Values {
  const { totals, stuck, requests: newest, policy, timeline } = report;
  const { requests, failures, denied, add, pods, failedPods } = totals;
  const { attachments, leaked, failing } = totals;
  const nodes = "nodes" in report ? report.nodes : [];
  const shown = busiest(report).length;
  const all = report.networks.filter(({ add }) => add.count > 0).length;
  const isKnown = report.networks.some((one) => fullerFamily(one).total !== null);
  const unknown = "No network's total is known; capacity in the plugin table tells it.";
  return {
    subtitle: shownScope(report, empty),
    notices: report.notices.map((text) => ({ notice: visibleText(text) })),
    made: formatTime(report.generatedAt),
    record: visibleText(report.record),
    requests: formatCount(requests),
    listedRequests: formatCount(newest.length),
    succeeded: formatCount(requests - failures),
    pods: formatCount(pods),
    failedPods: formatCount(failedPods),
    failedShare: formatShare(failedPods, pods),
    failures: formatCount(failures),
    isDenied: denied > 0,
    denied: formatCount(denied),
    noCauses: requests === 0 ? "No requests in this time." : "Nothing failed.",
    p50: formatDuration(add.p50Us),
    p99: formatDuration(add.p99Us),
    span: formatSpan(timeline.bucketMs),
    attachments: formatCount(attachments),
    where: "nodes" in report ? "these nodes" : "this node",
    leaked: formatCount(leaked),
    failing: formatCount(failing),
    isStuckCut: leaked + failing > stuck.length,
    listedStuck: formatCount(stuck.length),
    allStuck: formatCount(leaked + failing),
    isLost: stuck.some(({ state }) => state === "planned"),
    answered: formatCount(nodes.filter(({ error }) => error === "").length),
    asked: formatCount(nodes.length),
    whichNetworks: all > shown ? `, the ${shown} busiest of ${formatCount(all)}` : "",
    whichTotals: isKnown ? "Of the networks whose total is known." : unknown,
    isPolicy: policy !== undefined,
    enforced: formatCount(policy?.enforced ?? 0),
    known: policy?.knownAt ? `${formatTime(policy.knownAt)} UTC` : "",
  };
}

/** Most networks in one chart, each in its own colour. */
export const coloursMax = 8;
/** The networks with the most requests, as many as there are colours. */
export function busiest({ networks }: Report): NetworkReport[] {
  return networks
    .filter(({ add }) => add.count > 0)
    .sort((a, b) => b.add.count - a.add.count)
    .slice(0, coloursMax);
}
