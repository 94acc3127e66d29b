/**
 * The numbers of an automatic choice as a table: one row for each candidate. Reads them without
 * knowing the KPIs, so that a report can show what an older or a newer genie wrote. Pure.
 */
import { isObject } from "./cni.ts";

/** Candidates in the order they were recorded. */
export interface Candidates {
  columns: { name: string; isNumber: boolean }[];
  rows: string[][];
}

const candidatesMax = 64;
const columnsMax = 16;

/**
 * Finds the candidates of a choice: a list, or the list `candidates` of an object. Objects within a
 * candidate give a column for each of their keys, or one for their `value`.
 *
 * @returns no rows when there is nothing of the kind
 */
export function candidatesOf(choice: unknown): Candidates {
  const list = isObject(choice) ? choice["candidates"] : choice;
  if (!Array.isArray(list)) return { columns: [], rows: [] };
  const flat = list.filter(isObject).slice(0, candidatesMax).map(flatten);
  const names = [...new Set(flat.flatMap((one) => [...one.keys()]))].slice(0, columnsMax);
  return {
    columns: names.map((name) => ({
      name,
      isNumber: flat.every((one) => typeof (one.get(name) ?? 0) === "number"),
    })),
    rows: flat.map((one) => names.map((name) => show(one.get(name)))),
  };
}

function flatten(candidate: object): Map<string, unknown> {
  const flat = new Map<string, unknown>();
  for (const [key, value] of Object.entries(candidate)) {
    if (!isObject(value)) flat.set(key, value);
    else {
      for (const [inner, one] of Object.entries(value)) {
        flat.set(inner, isObject(one) && "value" in one ? one["value"] : one);
      }
    }
  }
  return flat;
}

function show(value: unknown): string {
  if (value === undefined || value === null) return "–";
  if (typeof value === "number") return String(Math.round(value * 1000) / 1000);
  return typeof value === "string" ? value : JSON.stringify(value);
}
