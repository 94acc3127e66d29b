/**
 * Counting requests: what a report says of a million rows, from one pass over them. Exact
 * percentiles, buckets of time and of duration. Pure: rows in, numbers out.
 */
import type { LedgerOutcome } from "../ledger.ts";

/** What counting needs of one request. */
export interface TallyRow {
  id: number;
  atMs: number;
  network: string;
  /** 1 for ADD, 0 for other commands: numbers are cheaper than texts, a million times. */
  isAdd: number;
  durationUs: number;
  outcome: LedgerOutcome;
  code: number;
  decidedBy: string;
  /** 1 for a row with the numbers of an automatic choice. */
  isChoice: number;
  /** 0 for a row that carries such numbers and is counted nowhere. */
  isRequest: number;
}

/** Durations of the ADDs that succeeded, in µs; percentiles by nearest rank, null of none. */
export interface Latency {
  count: number;
  p50Us: number | null;
  p95Us: number | null;
  p99Us: number | null;
  /** How many took as long as each span between two of {@link latencyEdgesUs}. */
  histogram: number[];
}

/** The requests of one network. */
export interface NetworkTally {
  requests: number;
  /** All that did not succeed, denied ones too. */
  failures: number;
  denied: number;
  add: Latency;
  /** How many ADDs each cause decided, as in `annotation` or `choice`. */
  decidedBy: Map<string, number>;
}

/** Failures of one code. */
export interface CauseTally {
  code: number;
  denied: boolean;
  requests: number;
  /** Row of the newest one. */
  newestId: number;
  networks: Map<string, number>;
}

/** One span of time. */
export interface TimeBucket {
  atMs: number;
  ok: number;
  /** Without the denied ones. */
  failed: number;
  denied: number;
}

/** Everything that one pass gives. */
export interface Tally {
  requests: number;
  failures: number;
  denied: number;
  add: Latency;
  /** By name, in the order of first sight. */
  networks: Map<string, NetworkTally>;
  causes: CauseTally[];
  bucketMs: number;
  timeline: TimeBucket[];
  /** Rows of the newest requests, newest first. */
  newestIds: number[];
  /** The same of those that did not succeed. */
  failedIds: number[];
  /** The newest of those that carry the numbers of a choice, newest first. */
  choiceIds: number[];
}

/**
 * Edges of the histograms, in µs: six per decade from 0.1 ms to 100 s. The first span begins at 0,
 * the last never ends.
 */
export const latencyEdgesUs: readonly number[] = [2, 3, 4, 5, 6, 7]
  .flatMap((decade) => [1, 1.5, 2, 3, 5, 7].map((step) => step * 10 ** decade))
  .concat(100_000_000);

const bucketsMax = 120;
const minuteMs = 60_000;
/** Lengths a bucket of time may have, in ms. */
const bucketSteps = [
  ...[1000, 5000, 10_000, 30_000],
  ...[1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10_080, 43_200, 525_600].map(
    (minutes) => minutes * minuteMs,
  ),
];

/** Networks told apart; their names come from pods, so the rest share {@link otherNetworks}. */
const networksMax = 500;
/** The name under which networks beyond the limit are counted. */
export const otherNetworks = "(other networks)";
/** Causes and deciders told apart. */
const causesMax = 200;
const decidersMax = 16;

/** Durations, growing; µs above 71 minutes are cut to that. */
interface Durations {
  values: Uint32Array;
  length: number;
}

function push(durations: Durations, us: number): void {
  if (durations.length === durations.values.length) {
    const grown = new Uint32Array(durations.length * 2);
    grown.set(durations.values);
    durations.values = grown;
  }
  durations.values[durations.length++] = Math.min(0xffff_ffff, Math.max(0, us));
}

const noDurations = (): Durations => ({ values: new Uint32Array(64), length: 0 });

/** Percentiles and histogram of durations in any order. */
function latencyOf(durations: Durations[]): Latency {
  const count = durations.reduce((sum, { length }) => sum + length, 0);
  const sorted = new Uint32Array(count);
  let at = 0;
  for (const { values, length } of durations) {
    sorted.set(values.subarray(0, length), at);
    at += length;
  }
  sorted.sort();
  const percentile = (share: number) => sorted[Math.ceil(share * count) - 1] ?? null;
  const histogram: number[] = [];
  let below = 0;
  for (const edge of [...latencyEdgesUs, Number.POSITIVE_INFINITY]) {
    const end = firstAtLeast(sorted, edge);
    histogram.push(end - below);
    below = end;
  }
  return {
    count,
    p50Us: percentile(0.5),
    p95Us: percentile(0.95),
    p99Us: percentile(0.99),
    histogram,
  };
}

function firstAtLeast(sorted: Uint32Array, value: number): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >>> 1;
    if ((sorted[middle] ?? 0) < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Shortest span that is shown, so that a single request stands somewhere. */
const spanMinMs = 10 * minuteMs;

/** The buckets of a span of time: at most 120, their edges at round times. */
export function timeBuckets(
  startMs: number,
  toMs: number,
): { bucketMs: number; timeline: TimeBucket[] } {
  const fromMs = Math.min(startMs, toMs - spanMinMs);
  const fits = (step: number) => (toMs - fromMs) / step < bucketsMax - 1;
  const bucketMs = bucketSteps.find(fits) ?? Math.ceil((toMs - fromMs) / (bucketsMax - 2));
  const first = Math.floor(fromMs / bucketMs) * bucketMs;
  const count = Math.floor((toMs - first) / bucketMs) + 1;
  const timeline = Array.from({ length: count }, (_, i) => ({
    atMs: first + i * bucketMs,
    ok: 0,
    failed: 0,
    denied: 0,
  }));
  return { bucketMs, timeline };
}

/** The span that a tally covers, and how many of its rows it names. */
export interface TallyOptions {
  fromMs: number;
  toMs: number;
  /** How many of the newest requests to name. */
  limit: number;
}

/** Adds to a count kept by name; names beyond the limit are not told apart. */
function count(counts: Map<string, number>, name: string, max: number, other: string): void {
  const found = counts.get(name);
  if (found !== undefined || counts.size < max) counts.set(name, (found ?? 0) + 1);
  else counts.set(other, (counts.get(other) ?? 0) + 1);
}

/**
 * Counts requests. Memory grows by four bytes for each ADD.
 *
 * @param rows by number, the lowest first
 */
export function tally(rows: Iterable<TallyRow>, { fromMs, toMs, limit }: TallyOptions): Tally {
  const { bucketMs, timeline } = timeBuckets(fromMs, toMs);
  const firstMs = timeline[0]?.atMs ?? 0;
  const networks = new Map<string, Omit<NetworkTally, "add"> & { durations: Durations }>();
  const causes = new Map<string, CauseTally>();
  const newest = newestOf(limit);
  const failed = newestOf(limit);
  // One may stand in two rows, see report_rows.ts.
  const choices = newestOf(2 * limit);
  const sum = { requests: 0, failures: 0, denied: 0 };
  for (const row of rows) {
    if (row.isChoice === 1) choices.add(row.id);
    if (row.isRequest === 0) continue;
    let one = networks.get(row.network);
    if (!one) {
      const name = networks.size < networksMax ? row.network : otherNetworks;
      one = networks.get(name) ?? {
        ...{ requests: 0, failures: 0, denied: 0 },
        durations: noDurations(),
        decidedBy: new Map(),
      };
      networks.set(name, one);
    }
    one.requests++;
    sum.requests++;
    const bucket = timeline[Math.floor((row.atMs - firstMs) / bucketMs)];
    if (bucket) bucket[row.outcome]++;
    if (row.outcome === "ok") {
      if (row.isAdd === 1) push(one.durations, row.durationUs);
    } else {
      one.failures++;
      sum.failures++;
      if (row.outcome === "denied") {
        one.denied++;
        sum.denied++;
      }
      countCause(causes, row);
      failed.add(row.id);
    }
    if (row.isAdd === 1) count(one.decidedBy, row.decidedBy, decidersMax, "other");
    newest.add(row.id);
  }
  return {
    ...sum,
    add: latencyOf([...networks.values()].map(({ durations }) => durations)),
    networks: new Map(
      [...networks].map(([name, { durations, ...rest }]) => [
        name,
        { ...rest, add: latencyOf([durations]) },
      ]),
    ),
    causes: [...causes.values()].sort((a, b) => b.requests - a.requests || a.code - b.code),
    bucketMs,
    timeline,
    newestIds: newest.ids(),
    failedIds: failed.ids(),
    choiceIds: choices.ids(),
  };
}

/** Keeps the last of many numbers, and gives them from the last on. */
function newestOf(limit: number): { add: (id: number) => void; ids: () => number[] } {
  let kept: number[] = [];
  const last = () => (limit === 0 ? [] : kept.slice(-limit));
  const add = (id: number) => {
    kept.push(id);
    if (kept.length > 2 * limit + 1024) kept = last();
  };
  return { add, ids: () => last().reverse() };
}

function countCause(causes: Map<string, CauseTally>, row: TallyRow): void {
  const denied = row.outcome === "denied";
  const exact = `${denied} ${row.code}`;
  const key = causes.has(exact) || causes.size < causesMax ? exact : `${denied} other`;
  const cause = causes.get(key) ?? {
    ...{ code: row.code, denied, requests: 0, newestId: 0 },
    networks: new Map<string, number>(),
  };
  cause.requests++;
  cause.newestId = Math.max(cause.newestId, row.id);
  count(cause.networks, row.network, decidersMax, otherNetworks);
  causes.set(key, cause);
}
