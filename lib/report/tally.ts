/**
 * Counts requests: what a report says of a million rows, from one pass over them. Exact
 * percentiles, buckets of time and of duration. Pure: rows in, numbers out.
 */
import type { LedgerOutcome } from "../record.ts";
import { type Counts, type Latency, latencyEdgesUs } from "./document.ts";

/** What counting needs of one request. */
export interface TallyRow {
  id: number;
  atMs: number;
  network: string;
  /** 1 for ADD, 0 for other commands: a million numbers are cheaper than a million texts. */
  isAdd: number;
  /** The same for DEL. */
  isDel: number;
  durationUs: number;
  outcome: LedgerOutcome;
  code: number;
  decidedBy: string;
  /** 1 for a row with the numbers of an automatic choice. */
  isChoice: number;
  /** 0 for a row that has such numbers but is not counted as a request. */
  isRequest: number;
}

/** The result of counting. */
export type RequestTally = ReturnType<typeof tally>;

const bucketsMax = 120;
/** Shortest span of time that is shown, so that a single request has a place in it. */
const spanMinMs = 600_000;
/** Lengths a bucket of time may have, in ms: from a second to a year. */
const bucketLengths = [1, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600]
  .concat([43_200, 86_400, 172_800, 604_800, 2_592_000, 31_536_000])
  .map((seconds) => seconds * 1000);

/** Networks counted by name. Names come from pods, so the rest share {@link otherNetworks}. */
const networksMax = 500;
/** The name under which networks beyond the limit are counted. */
export const otherNetworks = "(other networks)";
/** Causes, and reasons of one network, that are counted by themselves. */
const causesMax = 200;
const decidersMax = 16;

/** A growing list of durations in µs; those above 71 minutes are cut to that. */
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
  const histogram = new Array<number>(latencyEdgesUs.length + 1).fill(0);
  let span = 0;
  for (const us of sorted) {
    while (us >= (latencyEdgesUs[span] ?? Number.POSITIVE_INFINITY)) span++;
    histogram[span] = (histogram[span] ?? 0) + 1;
  }
  return {
    count,
    p50Us: percentile(0.5),
    p95Us: percentile(0.95),
    p99Us: percentile(0.99),
    histogram,
  };
}

/** Divides a span of time into at most 120 buckets, with edges at round times. */
export function timeBuckets(startMs: number, toMs: number) {
  const fromMs = Math.min(startMs, toMs - spanMinMs);
  const fits = (length: number) => (toMs - fromMs) / length < bucketsMax - 1;
  const bucketMs = bucketLengths.find(fits) ?? Math.ceil((toMs - fromMs) / (bucketsMax - 2));
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

/**
 * Counts requests of a span of time. Memory grows by four bytes for each ADD.
 * @param rows by number, the lowest first
 * @param options `limit` is how many of the newest requests to name
 * @returns networks in the order they were first seen; numbers of rows, the newest first
 */
export function tally(
  rows: Iterable<TallyRow>,
  { fromMs, toMs, limit }: { fromMs: number; toMs: number; limit: number },
) {
  const { bucketMs, timeline } = timeBuckets(fromMs, toMs);
  const firstMs = timeline[0]?.atMs ?? 0;
  const networks = new Map<string, ReturnType<typeof newNetwork>>();
  const causes = new Map<string, ReturnType<typeof newCause>>();
  const byId = (id: number) => id;
  const newest = newestOf(limit, byId);
  const failed = newestOf(limit, byId);
  // One choice may stand in two rows, that of the call and that of the network.
  const choices = newestOf(2 * limit, byId);
  for (const row of rows) {
    if (row.isChoice === 1) choices.add(row.id);
    if (row.isRequest === 0) continue;
    const name = keyIn(networks, row.network, networksMax, otherNetworks);
    const one = networks.getOrInsertComputed(name, newNetwork);
    one.requests++;
    newest.add(row.id);
    const place = Math.floor((row.atMs - firstMs) / bucketMs);
    const bucket = timeline[place];
    if (bucket) {
      bucket[row.outcome]++;
      one.changes[place] = (one.changes[place] ?? 0) + changeBy(row, one);
    }
    if (row.isAdd === 1) count(one.decidedBy, row.decidedBy, decidersMax, "other");
    if (row.outcome === "ok") {
      if (row.isAdd === 1) push(one.durations, row.durationUs);
      continue;
    }
    const denied = row.outcome === "denied";
    one.failures++;
    if (denied) one.denied++;
    const key = keyIn(causes, `${denied} ${row.code}`, causesMax, `${denied} other`);
    const cause = causes.getOrInsertComputed(key, () => newCause(row.code, denied));
    cause.requests++;
    cause.newestId = Math.max(cause.newestId, row.id);
    count(cause.networks, row.network, decidersMax, otherNetworks);
    failed.add(row.id);
  }
  const all = [...networks.values()];
  const sum = (key: keyof Counts) => all.reduce((total, one) => total + one[key], 0);
  return {
    requests: sum("requests"),
    failures: sum("failures"),
    denied: sum("denied"),
    add: latencyOf(all.map(({ durations }) => durations)),
    networks: new Map(
      [...networks].map(([name, one]) => [name, { ...one, add: latencyOf([one.durations]) }]),
    ),
    causes: [...causes.values()].sort((a, b) => b.requests - a.requests || a.code - b.code),
    bucketMs,
    timeline,
    newestIds: newest.result(),
    failedIds: failed.result(),
    choiceIds: choices.result(),
  };
}

/** By how many attachments a request changes its network. The DEL that undoes an ADD by none. */
function changeBy(row: TallyRow, network: { failedAtMs: number }): number {
  const isOk = row.outcome === "ok";
  if (row.isAdd === 1 && !isOk) network.failedAtMs = row.atMs;
  // The rows of one call have one time.
  if (row.isDel === 1 && isOk) return row.atMs === network.failedAtMs ? 0 : -1;
  return row.isAdd === 1 && isOk ? 1 : 0;
}

const newNetwork = () => ({
  /** More attachments than before, in each bucket of time; a hole is none. */
  changes: [] as number[],
  /** When the newest ADD that failed began, ms since the epoch. */
  failedAtMs: -1,
  requests: 0,
  failures: 0,
  denied: 0,
  durations: { values: new Uint32Array(64), length: 0 } as Durations,
  /** How many ADDs use this network for each reason, as in `annotation` or `choice`. */
  decidedBy: new Map<string, number>(),
});

/** How many requests each network has, the one with the most first. */
export function rankedNetworks(counts: ReadonlyMap<string, number>) {
  const ranked = [...counts].sort((a, b) => b[1] - a[1]);
  return ranked.map(([network, requests]) => ({ network, requests }));
}

/** Keeps the items with the greatest keys; the result begins with the greatest. */
export function newestOf<T>(max: number, keyOf: (one: T) => number | string) {
  let kept: T[] = [];
  const result = (): T[] => {
    kept.sort((a, b) => (keyOf(a) < keyOf(b) ? 1 : keyOf(a) > keyOf(b) ? -1 : 0));
    kept = kept.slice(0, max);
    return kept;
  };
  const add = (one: T): void => {
    kept.push(one);
    if (kept.length > 2 * max + 1024) result();
  };
  return { add, result };
}

/** Failures of one code; `newestId` is the row of the newest one. */
const newCause = (code: number, denied: boolean) => ({
  code,
  denied,
  requests: 0,
  newestId: 0,
  networks: new Map<string, number>(),
});

/** Under what a name is counted: under itself, or under `other` once there are `max` names. */
export function keyIn(
  counts: ReadonlyMap<string, unknown>,
  name: string,
  max: number,
  other: string,
): string {
  return counts.has(name) || counts.size < max ? name : other;
}

/** Adds to a count kept by name; names beyond the limit are counted as `other`. */
function count(counts: Map<string, number>, name: string, max: number, other: string): void {
  const key = keyIn(counts, name, max, other);
  counts.set(key, (counts.get(key) ?? 0) + 1);
}
