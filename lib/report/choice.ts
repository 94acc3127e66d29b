/**
 * The numbers of an automatic choice as a table: one row for each candidate, best first, then those
 * that were out of the question. KPIs that are not known here are shown as they are, so that a
 * report can tell what an older or a newer genie wrote. Pure.
 */

import { formatDuration, formatRate, formatShare } from "../config/quantity.ts";
import { isObject } from "../json.ts";

/** Columns in the order of their first mention. */
export interface Candidates {
  columns: { title: string; isNumber: boolean }[];
  rows: string[][];
}

const candidatesMax = 64;
const columnsMax = 12;

/** Title of the column that says why a network was out of the question. */
export const whyNot = "why not";

/** KPIs of `select.ts` by their key in the ledger. */
const known = new Map<string, { title: string; show: (value: number) => string }>(
  Object.entries({
    occupancy: { title: "used", show: (share) => formatShare(share, 1) },
    responseTimeUs: { title: "response", show: formatDuration },
    failures: { title: "failures", show: (share) => formatShare(share, 1) },
    bandwidth: { title: "traffic", show: formatRate },
    recent: { title: "recent", show: String },
    reason: { title: whyNot, show: String },
  }),
);

/**
 * Finds the candidates of a choice: `candidates` and `rejected` of an object, or a list.
 *
 * @returns no rows when there is nothing of the kind
 */
export function candidatesOf(choice: unknown): Candidates {
  const parts = isObject(choice) ? [choice["candidates"], choice["rejected"]] : [choice];
  const list = parts
    .flatMap((part) => (Array.isArray(part) ? part : []))
    .filter(isObject)
    .slice(0, candidatesMax);
  const isPlain = (value: unknown) => typeof value !== "object" || value === null;
  const keys = list.flatMap((one) => Object.keys(one).filter((key) => isPlain(one[key])));
  const all = [...new Set(["network", "score", ...keys])]
    .filter((key) => list.some((one) => Object.hasOwn(one, key)))
    .slice(0, columnsMax);
  return {
    columns: all.map((key) => ({
      title: known.get(key)?.title ?? key,
      isNumber: list.every((one) => typeof (one[key] ?? 0) === "number"),
    })),
    rows: list.map((one) => all.map((key) => show(key, one[key]))),
  };
}

function show(key: string, value: unknown): string {
  if (value === undefined || value === null) return "–";
  if (typeof value !== "number") return String(value);
  return known.get(key)?.show(value) ?? String(Math.round(value * 1000) / 1000);
}
