/**
 * The KPIs of a network: occupancy, subnets, response time, failure rate, bandwidth, attachments.
 * Each has its source and age, or is unknown. Reads the record; `ipam.ts` counts the addresses,
 * `traffic.ts` the bytes. A new KPI is measured here and ranked in `rank.ts`.
 */
import type { State } from "../database.ts";
import type { Network } from "../networks.ts";
import { oldestSources, sampleTraffic } from "../recovery/traffic_rate.ts";
import { type Reader, rangesOf, type StoreCount, sizeOf, usedAddresses } from "./ipam.ts";

/** One figure; `value` undefined: unknown. */
export interface Measured {
  value: number | undefined;
  /** Where it comes from, for people. */
  source: string;
  /** Age in ms; 0 when it was read just now. */
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
  /** Set when host-local's store had to be read, for `keepStore()`. */
  store?: StoreCount;
}

/**
 * Recent ADDs: at most so many, and none older than this, in ms. A network that failed gets another
 * chance once its failures are that old.
 */
const recentAdds = 32;
const recentAgeMaxMs = 60 * 60_000;
/** Traffic measured longer ago says nothing about now, in ms. */
const trafficAgeMaxMs = 10 * 60_000;

const noRange = "its IPAM tells no range";
const inConfig = "ranges in its config";
const unknown = (source: string): Measured => ({ value: undefined, source, ageMs: 0 });
const measured = (value: number, source: string, ageMs = 0): Measured => ({ value, source, ageMs });

/**
 * Measures a network.
 * @param record undefined when there is none that can be read
 * @param options `isBrief` measures no more than a choice needs, so that attachments may stay
 *   unknown; `figures` are those that {@link readFigures} has read already
 */
export function networkKpis(
  record: Reader | undefined,
  { name, list, entry }: Network,
  nowMs: number,
  options: { isBrief?: boolean; figures?: Figures | undefined } = {},
): NetworkKpis {
  const { figures = record && readFigures(record, [name], nowMs).get(name) } = options;
  const capacity = entry?.capacity;
  const ranges = rangesOf(list);
  const used = usedAddresses(record, list, ranges, nowMs);
  const isNeeded = !options.isBrief || (!used && (capacity !== undefined || ranges.length > 0));
  const attachments = isNeeded ? countAttachments(record, name) : unknown("not counted");
  const family = (is6: boolean): Occupancy => {
    const size = sizeOf(ranges, is6);
    const total = size === undefined ? unknown(noRange) : measured(size, inConfig);
    return {
      // `capacity` stands for the IPv4 addresses of a network whose IPAM cannot be read.
      total:
        is6 || capacity === undefined ? total : measured(capacity, "capacity in the plugin table"),
      used: used ? measured(is6 ? used.ipv6 : used.ipv4, "host-local's store") : attachments,
    };
  };
  const families = { ipv4: family(false), ipv6: family(true) };
  const subnets = new Set(ranges.map(({ subnet }) => subnet)).size;
  // The store's count is at hand, while counting attachments costs a query.
  const pods = used ? Math.max(used.ipv4, used.ipv6) : (attachments.value ?? 0);
  const { bandwidth, ...ofAdds } = figures ?? noFigures;
  return {
    network: name,
    ...families,
    occupancy: sharesOf(families)[0] ?? unknown("its size is not known"),
    subnets: subnets > 0 ? measured(subnets, inConfig) : unknown(noRange),
    ...ofAdds,
    bandwidth: bandwidth(pods),
    attachments,
    ...(used?.read && { store: used.read }),
  };
}

type Families = Pick<NetworkKpis, "ipv4" | "ipv6">;

/**
 * Share in use of each family whose numbers are known, with so many more pods. The fuller family
 * comes first, and decides: a pod gets an address of each.
 */
function sharesOf({ ipv4, ipv6 }: Families, more = 0): Measured[] {
  const shares = [ipv4, ipv6].flatMap(({ used, total }) => {
    if (used.value === undefined || !total.value) return [];
    const share = Math.min(1, (used.value + more) / total.value);
    return [measured(share, `${used.source}, ${total.source}`)];
  });
  return shares.sort((a, b) => (b.value ?? 0) - (a.value ?? 0));
}

/** Share of the fuller family once so many more pods have an address; undefined when unknown. */
export function occupancyWith(families: Families, more: number): number | undefined {
  return sharesOf(families, more)[0]?.value;
}

function countAttachments(record: Reader | undefined, network: string): Measured {
  if (!record) return unknown("no record");
  const { count } = record.database
    .query("SELECT count(*) AS count FROM attachments WHERE network = ? AND state <> 'leaked'")
    .get(network) as { count: number };
  return measured(count, "attachments on record");
}

/** Attachments of one network whose traffic stands for that of all. */
const trafficRowsMax = 32;

/** What the record has about a network. */
export interface Figures extends Pick<NetworkKpis, "medianUs" | "p95Us" | "failures"> {
  /** Traffic of so many pods, estimated from the interfaces that were measured lately. */
  bandwidth: (pods: number) => Measured;
}

const noFigures: Figures = { ...addFigures(0, [], 0), bandwidth: () => unknown("no record") };

/** The figures of recent ADDs, of which those that succeeded have durations, in µs. */
function addFigures(adds: number, durations: number[], ageMs: number) {
  const sorted = durations.toSorted((a, b) => a - b);
  // Nearest-rank percentile.
  const percentile = (share: number) => {
    const value = sorted[Math.ceil(share * sorted.length) - 1];
    if (value === undefined) return unknown("no recent ADD that succeeded");
    return measured(value, `last ${sorted.length} ADDs`, ageMs);
  };
  const failures =
    adds === 0
      ? unknown("no recent ADD on record")
      : measured(1 - sorted.length / adds, `last ${adds} ADDs`, ageMs);
  return { medianUs: percentile(0.5), p95Us: percentile(0.95), failures };
}

/**
 * Reads the figures of some networks with one query, to keep an ADD fast. The newest ADDs are taken
 * before the old ones are filtered out, so that SQLite does not read all older rows. A denied ADD
 * says nothing about the network.
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
    .values(JSON.stringify(networks), nowMs - recentAgeMaxMs, nowMs - trafficAgeMaxMs);
  return new Map(
    (rows as [string, string, string][]).map(([network, addsText, trafficText]) => {
      const [adds, newestMs, durations] = JSON.parse(addsText);
      const [interfaces, rate, oldestMs] = JSON.parse(trafficText);
      const all = durations === null ? [] : String(durations).split(",").map(Number);
      const bandwidth = (pods: number) => {
        if (interfaces === 0) return unknown("no traffic measured lately");
        const count = Math.max(interfaces, pods);
        const source = `${interfaces} of ${count} host-side interfaces`;
        return measured((rate * count) / interfaces, source, Math.max(0, nowMs - oldestMs));
      };
      const ageMs = Math.max(0, nowMs - (newestMs ?? nowMs));
      return [network, { ...addFigures(adds, all, ageMs), bandwidth }];
    }),
  );
}

/** Counts those interfaces whose turn it is at a choice of a network. In a transaction. */
export function sampleOldest(state: State, nowMs: number): void {
  sampleTraffic(state, oldestSources(state, nowMs, { max: 2, minAgeMs: 5_000 }), nowMs);
}
