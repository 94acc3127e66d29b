/**
 * What is measured of a network: occupancy, subnets, response time, failure rate, bandwidth,
 * attachments. Each figure says where it comes from and how old it is, or that it is unknown.
 * Reads the record; `ipam.ts` counts the addresses, `traffic.ts` the bytes.
 */
import type { State } from "../database.ts";
import type { Network } from "../networks.ts";
import { rangesOf, type StoreCount, usedAddresses } from "./ipam.ts";

/** One figure; `value` undefined: unknown. */
export interface Measured {
  value: number | undefined;
  /** Where it comes from, for people. */
  source: string;
  /** How old it is in ms; 0 where it was read just now. */
  ageMs: number;
}

/** Addresses of one family. */
export interface Occupancy {
  used: Measured;
  total: Measured;
}

/** All KPIs of a network. */
export interface NetworkKpis {
  network: string;
  ipv4: Occupancy;
  ipv6: Occupancy;
  /** Share of the fuller family, 0 to 1. */
  occupancy: Measured;
  subnets: Measured;
  /** Median and 95th percentile of recent successful ADDs, in µs. */
  medianUs: Measured;
  p95Us: Measured;
  /** Share of recent ADDs that failed, 0 to 1. */
  failures: Measured;
  /** Bytes per second over the host-side interfaces of its attachments. */
  bandwidth: Measured;
  attachments: Measured;
  /** Of host-local's store, where it had to be read: keep it, see `keepStore()`. */
  store?: StoreCount;
}

/**
 * ADDs that count as recent: so many of the newest, and none older than this, in ms. A network that
 * failed is given another chance once its failures are that old.
 */
const recentAdds = 32;
const recentAgeMaxMs = 60 * 60_000;
/** Traffic measured longer ago than this says nothing of now, in ms. */
const trafficAgeMaxMs = 10 * 60_000;
/** Reads nothing but a database. */
type Reader = Pick<State, "database">;

const unknown = (source: string): Measured => ({ value: undefined, source, ageMs: 0 });
const measured = (value: number, source: string, ageMs = 0): Measured => ({ value, source, ageMs });

/**
 * Measures a network.
 *
 * @param state the record; undefined where there is none that can be read
 * @param isBrief measures no more than a choice needs: attachments may stay unknown
 * @param figures what the record tells, where it was read already
 */
export function networkKpis(
  state: Reader | undefined,
  { name, list, entry }: Network,
  nowMs: number,
  isBrief = false,
  figures = state && readFigures(state, [name], nowMs).get(name),
): NetworkKpis {
  const ranges = rangesOf(list);
  const used = usedAddresses(state, list, ranges, nowMs);
  const isNeeded = !isBrief || (!used && (entry?.capacity !== undefined || ranges.length > 0));
  const attachments = !state
    ? unknown("no record")
    : isNeeded
      ? measured(countAttachments(state, name), "attachments on record")
      : unknown("not counted");
  const family = (is6: boolean): Occupancy => {
    const own = ranges.filter((range) => range.is6 === is6);
    const total = own.length > 0 ? own.reduce((sum, { size }) => sum + size, 0) : undefined;
    // `capacity` stands for the IPv4 addresses of a network whose IPAM cannot be read.
    const capacity = is6 ? undefined : entry?.capacity;
    return {
      total:
        capacity !== undefined
          ? measured(capacity, "capacity in the plugin table")
          : total === undefined
            ? unknown("its IPAM tells no range")
            : measured(total, "ranges in its config"),
      used: used ? measured(is6 ? used.ipv6 : used.ipv4, "host-local's store") : attachments,
    };
  };
  const ipv4 = family(false);
  const ipv6 = family(true);
  // Counting attachments costs more than the store has told already.
  const pods = used ? Math.max(used.ipv4, used.ipv6) : (attachments.value ?? 0);
  const { adds = 0, durations = [], newestMs = nowMs } = figures ?? {};
  const ageMs = Math.max(0, nowMs - newestMs);
  return {
    network: name,
    ipv4,
    ipv6,
    occupancy: fullest(ipv4, ipv6),
    subnets:
      ranges.length > 0
        ? measured(new Set(ranges.map(({ subnet }) => subnet)).size, "ranges in its config")
        : unknown("its IPAM tells no range"),
    medianUs: percentile(durations, 0.5, ageMs),
    p95Us: percentile(durations, 0.95, ageMs),
    failures:
      adds === 0
        ? unknown("no recent ADD on record")
        : measured(1 - durations.length / adds, `last ${adds} ADDs`, ageMs),
    bandwidth: figures ? bandwidthOf(figures, pods, nowMs) : unknown("no record"),
    attachments,
    ...(used?.read && { store: used.read }),
  };
}

/** Share of the fuller family once so many more pods have an address; undefined where unknown. */
export function occupancyWith(
  { ipv4, ipv6 }: Pick<NetworkKpis, "ipv4" | "ipv6">,
  more: number,
): number | undefined {
  const shares = [ipv4, ipv6].flatMap(({ used, total }) =>
    used.value === undefined || !total.value ? [] : [(used.value + more) / total.value],
  );
  return shares.length === 0 ? undefined : Math.min(1, Math.max(...shares));
}

/** Nearest-rank percentile of sorted values. */
function percentile(values: number[], share: number, ageMs: number): Measured {
  if (values.length === 0) return unknown("no recent ADD that succeeded");
  const value = values[Math.ceil(share * values.length) - 1] ?? 0;
  return measured(value, `last ${values.length} ADDs`, ageMs);
}

/** A pod gets an address of each family, so the fuller one decides. */
function fullest(ipv4: Occupancy, ipv6: Occupancy): Measured {
  const shares = [ipv4, ipv6].flatMap(({ used, total }) =>
    used.value === undefined || !total.value
      ? []
      : [measured(Math.min(1, used.value / total.value), `${used.source}, ${total.source}`)],
  );
  return (
    shares.sort((a, b) => (b.value ?? 0) - (a.value ?? 0))[0] ?? unknown("its size is not known")
  );
}

function countAttachments({ database }: Reader, network: string): number {
  const { count } = database
    .query("SELECT count(*) AS count FROM attachments WHERE network = ? AND state <> 'leaked'")
    .get(network) as { count: number };
  return count;
}

/** Attachments whose traffic stands for that of all, of one network. */
const trafficRowsMax = 32;

/** What the record tells of a network. */
export interface Figures {
  /** Recent ADDs, durations of those that succeeded in µs, sorted, and when the newest began. */
  adds: number;
  durations: number[];
  newestMs: number;
  /** Host-side interfaces that were measured lately, their rates' sum, the oldest's time. */
  measured: number;
  rate: number;
  oldestMs: number;
}

/**
 * Reads what the record tells of some networks, all at once: each question more costs an ADD.
 *
 * Of ADDs the newest, none that is old: a filter in SQL would look through all that are older. Whom
 * a rule denied says nothing of the network.
 */
export function readFigures(
  { database }: Reader,
  networks: readonly string[],
  nowMs: number,
): Map<string, Figures> {
  const rows = database
    .query(
      `SELECT value,
         (SELECT json_array(count(*), max(at_ms),
            group_concat(CASE outcome WHEN 'ok' THEN duration_us END))
          FROM (SELECT at_ms, duration_us, outcome FROM ledger
                WHERE kind = 'network' AND command = 'ADD' AND network = value
                ORDER BY id DESC LIMIT ${recentAdds})
          WHERE outcome <> 'denied' AND at_ms > ?2),
         (SELECT json_array(count(*), total(rate), min(at_ms))
          FROM (SELECT at_ms, bytes_per_second AS rate FROM traffic
                WHERE network = value AND at_ms > ?3 AND bytes_per_second IS NOT NULL
                ORDER BY at_ms DESC LIMIT ${trafficRowsMax}))
       FROM json_each(?1)`,
    )
    .values(JSON.stringify(networks), nowMs - recentAgeMaxMs, nowMs - trafficAgeMaxMs) as [
    string,
    string,
    string,
  ][];
  return new Map(
    rows.map(([network, addsText, trafficText]) => {
      const [adds, newestMs, durations] = JSON.parse(addsText);
      const [measured, rate, oldestMs] = JSON.parse(trafficText);
      const all = durations === null ? [] : String(durations).split(",").map(Number);
      all.sort((a, b) => a - b);
      return [network, { adds, newestMs, durations: all, measured, rate, oldestMs }];
    }),
  );
}

/** The traffic of all its pods, from those that were measured lately: they share it alike. */
function bandwidthOf({ measured: count, rate, oldestMs }: Figures, pods: number, nowMs: number) {
  if (count === 0) return unknown("no traffic measured lately");
  const all = Math.max(count, pods);
  const source = `${count} of ${all} host-side interfaces`;
  return measured((rate * all) / count, source, Math.max(0, nowMs - oldestMs));
}
