/**
 * The ledger as CSV (RFC 4180): one line for each row, with the header first, CRLF at every line's
 * end, quotes where needed.
 *
 * Texts come from others. Control characters are replaced, and a text that a spreadsheet would take
 * for a formula (it begins with `=`, `+`, `-`, `@`, also of full width) gets an apostrophe in
 * front, which spreadsheets hide. Numbers are bare. Pure: rows in, text out.
 */
import { isoTime } from "../config/quantity.ts";
import type { NumberedRow } from "./rows.ts";
import type { NodeReport } from "./shape.ts";
import { printable } from "./table.ts";

const columns: [name: string, cell: (row: NumberedRow) => string | number][] = [
  ["id", ({ id }) => id],
  ["at", ({ atMs }) => isoTime(atMs) ?? ""],
  ["kind", ({ kind }) => kind],
  ["command", ({ command }) => command],
  ["container_id", ({ containerId }) => containerId],
  ["pod_namespace", ({ podNamespace }) => podNamespace],
  ["pod_name", ({ podName }) => podName],
  ["pod_uid", ({ podUid }) => podUid],
  ["network", ({ network }) => network],
  ["plugin", ({ plugin }) => plugin],
  ["interface", ({ ifName }) => ifName],
  ["duration_us", ({ durationUs }) => durationUs],
  ["outcome", ({ outcome }) => outcome],
  ["code", ({ code }) => code],
  ["error", ({ error }) => error],
  ["addresses", ({ addresses }) => addresses],
  ["config_hash", ({ configHash }) => configHash],
  ["decided_by", ({ decidedBy }) => decidedBy],
  ["rule", ({ rule }) => rule],
  ["choice", ({ choice }) => choice],
];

const nodeColumns: [name: string, cell: (node: NodeReport) => string | number][] = [
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
    nodeColumns.map(([, cell], i) => (one.error === "" || i < 2 ? cell(one) : ""));
  return [nodeColumns.map(([name]) => name), ...nodes.map(cells)].map(line).join("");
}

/** Lines put together before they are given on. */
const chunkLines = 500;

/** Formats rows, in pieces of many lines each: a ledger may have a million. */
export function* formatCsv(rows: Iterable<NumberedRow>): Generator<string, void> {
  let chunk = [line(columns.map(([name]) => name))];
  for (const row of rows) {
    chunk.push(line(columns.map(([, cell]) => cell(row))));
    if (chunk.length < chunkLines) continue;
    yield chunk.join("");
    chunk = [];
  }
  yield chunk.join("");
}

function line(cells: (string | number)[]): string {
  return `${cells.map(field).join(",")}\r\n`;
}

function field(cell: string | number): string {
  if (typeof cell === "number") return String(cell);
  const clean = printable(cell);
  const safe = /^\s*[=+\-@＝＋－＠]/.test(clean) ? `'${clean}` : clean;
  return /[",]|^\s|\s$/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
