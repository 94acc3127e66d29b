/**
 * Counts the rows of the ledger as they come, so that a scrape reads none of them again and nothing
 * that is pruned is taken back. Where it stands in the ledger outlives the agent: what happened
 * while none ran is counted by the next one.
 */
import { readFileSync, renameSync, writeFileSync } from "node:fs";
import type { State } from "../database.ts";
import { isObject } from "../json.ts";
import { type Histogram, newHistogram, observe } from "../report/metrics.ts";
import { inodeOf } from "./record.ts";

/** Labels of a count; further ones come under {@link other}. */
export const labelsMax = { networks: 64, codes: 32 } as const;
/** Stands for what there is too much of. */
export const other = "other";
/** Rows read at once, some milliseconds of work. */
const rowsMax = 4000;

/** What was counted. */
export interface Tally {
  /** Calls of genie, by command, outcome and code. */
  requests: Map<string, { labels: Record<string, string>; value: number }>;
  /** Networks of these calls, by command and network. */
  durations: Map<string, { labels: Record<string, string>; histogram: Histogram }>;
  /** Counts what was written since. @returns true when there may be more */
  read(state: State): boolean;
  /** Where it stands, for {@link openTally}. */
  position(): { inode: number; id: number } | undefined;
}

/** @param position where an earlier one stood; what is before it was counted then */
export function openTally(position?: { inode: number; id: number }): Tally {
  const requests: Tally["requests"] = new Map();
  const durations: Tally["durations"] = new Map();
  const networks = new Set<string>();
  const codes = new Set<string>();
  let at = position;
  const take = (row: Row) => {
    const command = commands.has(row.command) ? row.command : other;
    if (row.kind === "call") {
      const outcome = outcomes.has(row.outcome) ? row.outcome : other;
      const labels = { command, outcome, code: bounded(codes, `${row.code}`, labelsMax.codes) };
      const found = requests.get(JSON.stringify(labels)) ?? { labels, value: 0 };
      found.value++;
      requests.set(JSON.stringify(labels), found);
    } else if (row.outcome !== "denied") {
      // A denial takes no time: it would say that the network is fast.
      const labels = { command, network: bounded(networks, row.network, labelsMax.networks) };
      const key = JSON.stringify(labels);
      const found = durations.get(key) ?? { labels, histogram: newHistogram() };
      observe(found.histogram, Math.max(0, row.duration_us) / 1e6);
      durations.set(key, found);
    }
  };
  return {
    requests,
    durations,
    read: (state) => {
      const inode = inodeOf(state.file);
      const { last } = state.database.query("SELECT max(id) AS last FROM ledger").get() as {
        last: number | null;
      };
      // The first agent of a node counts from its start on; of a new file everything is new. Ids
      // begin anew once all rows were pruned.
      at ??= { inode, id: last ?? 0 };
      if (at.inode !== inode || (last ?? 0) < at.id) at = { inode, id: 0 };
      if (last === null || last === at.id) return false;
      const rows = state.database
        .query(
          `SELECT id, kind, command, outcome, code, network, duration_us FROM ledger
           WHERE id > ? ORDER BY id LIMIT ${rowsMax}`,
        )
        .all(at.id) as Row[];
      for (const row of rows) if (row.kind !== "plugin") take(row);
      at.id = rows.at(-1)?.id ?? at.id;
      return rows.length === rowsMax;
    },
    position: () => at && { ...at },
  };
}

interface Row {
  id: number;
  kind: string;
  command: string;
  outcome: string;
  code: number;
  network: string;
  duration_us: number;
}

const commands = new Set(["ADD", "DEL", "CHECK", "GC", "STATUS"]);
const outcomes = new Set(["ok", "failed", "denied"]);

/** The value, or {@link other} for one more than there may be. */
function bounded(known: Set<string>, value: string, max: number): string {
  if (!known.has(value) && known.size >= max) return other;
  known.add(value);
  return value;
}

/** Reads where an earlier agent stood; undefined where none did, or where it cannot be read. */
export function readPosition(file: string): { inode: number; id: number } | undefined {
  try {
    const value: unknown = JSON.parse(readFileSync(file, "utf8"));
    const { inode, id } = isObject(value) ? value : {};
    const isPosition = Number.isSafeInteger(inode) && Number.isSafeInteger(id);
    return isPosition ? { inode: Number(inode), id: Number(id) } : undefined;
  } catch (error) {
    const isExpected = error instanceof SyntaxError || (error as NodeJS.ErrnoException).code;
    if (isExpected) return undefined;
    throw error;
  }
}

/** @throws NodeJS.ErrnoException where it cannot be written */
export function writePosition(file: string, position: { inode: number; id: number }): void {
  writeFileSync(`${file}.new`, JSON.stringify(position), { mode: 0o600 });
  renameSync(`${file}.new`, file);
}
