/**
 * The metrics of a node, as Prometheus text, or as OpenMetrics text for who asks for that: from the
 * record as it is now, from the agent's health, and from the rows of the ledger, which are counted
 * as they come, so that a scrape reads none of them again and pruning takes nothing back. The place
 * in the ledger outlives the agent: what happened while none ran is counted by the next one. Label
 * values may hold anything. Source: Prometheus text format 0.0.4 (prometheus/docs
 * content/docs/instrumenting/exposition_formats.md); OpenMetrics 1.0 (prometheus/OpenMetrics
 * specification/OpenMetrics.md); how a client asks: RFC 9110, 12.5.1.
 */
import { renameSync, writeFileSync } from "node:fs";
import manifest from "../../package.json";
import type { State } from "../database.ts";
import { isObject, parseJson } from "../json.ts";
import { readIfThere } from "../node/files.ts";
import { listNetworks } from "../node_networks.ts";
import { aliveSince, neededResources } from "../policy/store.ts";
import type { LedgerRow } from "../record.ts";
import { orUndefined } from "../recovery/tried.ts";
import { countWith, sql } from "../report/record_reader.ts";
import { enforcesPolicy } from "../settings.ts";
import described from "./metrics.json";
import { type Agent, inodeOf, type Trouble } from "./task.ts";

/** How metrics are written. */
export type MetricsFormat = "prometheus" | "openmetrics";
const mediaTypes: Record<MetricsFormat, string> = {
  prometheus: "text/plain; version=0.0.4; charset=utf-8",
  openmetrics: "application/openmetrics-text; version=1.0.0; charset=utf-8",
};
/** Different values of a label; further ones come under {@link other}. */
const labelsMax = { networks: 64, codes: 32 } as const;
const other = "other";
/** Rows read at once, some milliseconds of work. */
const rowsMax = 4000;

/** A place in the ledger: the file, and the last row that was counted. */
export type LedgerPosition = { inode: number; id: number };

/** What was counted, by JSON of its labels. */
type ByLabels<T> = Map<string, { labels: Labels; value: T }>;

function entryOf<T>(all: ByLabels<T>, labels: Labels, first: () => T) {
  return all.getOrInsertComputed(JSON.stringify(labels), () => ({ labels, value: first() }));
}

/** See {@link openLedgerCounts}. */
export type LedgerCounts = ReturnType<typeof openLedgerCounts>;

/**
 * What was counted of the ledger.
 * @param position where an earlier one stood; what is before it was counted then
 */
export function openLedgerCounts(position?: LedgerPosition) {
  /** Calls of genie, by command, outcome and code. */
  const requests: ByLabels<number> = new Map();
  /** Networks of these calls, by command and network. */
  const durations: ByLabels<Histogram> = new Map();
  const networks = new Set<string>();
  const codes = new Set<string>();
  let at = position;
  const count = (row: CountedRow) => {
    const command = commands.has(row.command) ? row.command : other;
    if (row.kind === "call") {
      const outcome = outcomes.has(row.outcome) ? row.outcome : other;
      const labels = { command, outcome, code: bounded(codes, `${row.code}`, labelsMax.codes) };
      entryOf(requests, labels, () => 0).value++;
    } else if (row.outcome !== "denied") {
      // A denial takes no time: it would say that the network is fast.
      const labels = { command, network: bounded(networks, row.network, labelsMax.networks) };
      const { value } = entryOf(durations, labels, newHistogram);
      observe(value, Math.max(0, row.durationUs) / 1e6);
    }
  };
  return {
    requests,
    durations,
    /** Counts what was written since. @returns true when there may be more */
    read: ({ database, file }: State) => {
      const inode = inodeOf(file);
      const newest = database.query("SELECT ifnull(max(id), 0) AS id FROM ledger").get();
      const { id: last } = newest as { id: number };
      // The first agent of a node counts from its start on; of a new file everything is new. Ids
      // begin anew once all rows were pruned.
      at ??= { inode, id: last };
      if (at.inode !== inode || last < at.id) at = { inode, id: 0 };
      if (last === at.id) return false;
      const rows = database.query(sql("rows since")).all(at.id, rowsMax) as CountedRow[];
      for (const row of rows) if (row.kind !== "plugin") count(row);
      at.id = rows.at(-1)?.id ?? at.id;
      return rows.length === rowsMax;
    },
    /** Where it stands, for another one. */
    position: () => at && { ...at },
  };
}

type CountedKey = "kind" | "command" | "outcome" | "code" | "network" | "durationUs";
type CountedRow = Pick<LedgerRow, CountedKey> & { id: number };

const commands = new Set(["ADD", "DEL", "CHECK", "GC", "STATUS"]);
const outcomes = new Set<string>(["ok", "failed", "denied"]);

/** The value, or {@link other} for one more than there may be. */
function bounded(known: Set<string>, value: string, max: number): string {
  if (!known.has(value) && known.size >= max) return other;
  known.add(value);
  return value;
}

/** Reads where an earlier agent stood; undefined where none did, or where it cannot be read. */
export function readPosition(file: string): LedgerPosition | undefined {
  const value = orUndefined(() => parseJson(readIfThere(file) ?? "", "position"));
  const { inode, id } = isObject(value) ? value : {};
  const isPosition = Number.isSafeInteger(inode) && Number.isSafeInteger(id);
  return isPosition ? { inode: Number(inode), id: Number(id) } : undefined;
}

/** @throws NodeJS.ErrnoException where it cannot be written */
export function writePosition(file: string, position: LedgerPosition): void {
  writeFileSync(`${file}.new`, JSON.stringify(position), { mode: 0o600 });
  renameSync(`${file}.new`, file);
}

/** Samples of what is in metrics.json, which says what each name means. */
type Measured = Partial<Record<keyof typeof described, readonly Sample[]>>;

/** The families of these samples, in the order in which they are described. */
function familiesOf(measured: Measured): Family[] {
  const names = Object.keys(described) as (keyof typeof described)[];
  return names.map((name) => ({
    name,
    ...(described[name] as Pick<Family, "type" | "help">),
    ...(name.endsWith("_seconds") && { unit: "seconds" }),
    samples: measured[name] ?? [],
  }));
}

/**
 * The format that an Accept header asks for: OpenMetrics where it is named and plain text is not
 * preferred, else Prometheus text, which whoever says nothing can read. Of versions only 1.0.0 is
 * known; who names none takes it.
 */
export function formatAsked(accept: string): MetricsFormat {
  const weights = { "application/openmetrics-text": 0, "text/plain": 0 };
  for (const range of accept.toLowerCase().split(",")) {
    const [type = "", ...given] = range.split(";").map((part) => part.trim());
    const parameters = new Map(given.map((one) => one.split(/\s*=\s*/) as [string, string]));
    const version = parameters.get("version")?.replaceAll('"', "") ?? "1.0.0";
    if (type !== "text/plain" && (type !== "application/openmetrics-text" || version !== "1.0.0")) {
      continue;
    }
    const weight = Number(parameters.get("q") ?? 1);
    if (weight > weights[type]) weights[type] = weight;
  }
  const { "application/openmetrics-text": open, "text/plain": plain } = weights;
  return open > 0 && open >= plain ? "openmetrics" : "prometheus";
}

/**
 * Answers with all metrics; without those of a record that cannot be read, which is counted too.
 * @param accept the request's header of that name
 */
export function metricsResponse(agent: Agent, counts: LedgerCounts, accept: string): Response {
  const found = orUndefined(() =>
    agent.record.use((state) => {
      counts.read(state);
      return measureRecord(agent, state);
    }),
  );
  const trouble = (what: Trouble): Sample[] => [{ value: agent.health.counted(what) }];
  const families = familiesOf({
    genie_agent: [{ labels: { version: manifest.version }, value: 1 }],
    genie_requests: [...counts.requests.values()],
    genie_request_duration_seconds: [...counts.durations.values()].flatMap(({ labels, value }) =>
      histogramSamples(value, labels),
    ),
    ...found,
    genie_api_errors: trouble("api"),
    genie_api_garbage: trouble("garbage"),
    genie_database_errors: trouble("database"),
    genie_part_failures: trouble("task"),
  });
  const format = formatAsked(accept);
  return new Response(formatMetrics(families, format), {
    headers: { "Content-Type": mediaTypes[format], Vary: "Accept" },
  });
}

function measureRecord({ host, config, health }: Agent, state: State): Measured {
  const attachments = attachmentSamples(state);
  const leaked = attachments.filter(({ labels }) => labels?.["state"] === "leaked");
  const waiting = state.database.query("SELECT count(*) AS value FROM statuses").get() as Sample;
  const networks = listNetworks(config).networks.slice(0, labelsMax.networks);
  const addresses = countWith(state, networks, host.now()).flatMap(
    ({ network, family, used, total }): Sample[] => {
      const labels = { network, family: family.toLowerCase() };
      const sample = (state: string, value: number) => ({ labels: { ...labels, state }, value });
      return [sample("used", used), sample("total", total)];
    },
  );
  const measured: Measured = {
    genie_attachments: attachments,
    genie_leaked_attachments: [{ value: leaked.reduce((sum, { value }) => sum + value, 0) }],
    genie_addresses: addresses,
    genie_status_pending: [waiting],
  };
  if (!enforcesPolicy(config)) return measured;
  const aliveMs = aliveSince(state, neededResources(config.policy.enforce));
  const age = aliveMs === 0 ? Infinity : Math.max(0, host.now() - aliveMs) / 1000;
  const { policyLagMs: lagMs } = health;
  return {
    ...measured,
    genie_policy_lag_seconds: lagMs === undefined ? [] : [{ value: lagMs / 1000 }],
    genie_policy_inputs_age_seconds: [{ value: age }],
  };
}

function attachmentSamples({ database }: State): Sample[] {
  type Row = Record<"network" | "state", string> & { value: number };
  const rows = database.query(sql("states")).all() as Row[];
  const networks = new Set<string>();
  const sums: ByLabels<number> = new Map();
  for (const { network, state, value } of rows) {
    const labels = { network: bounded(networks, network, labelsMax.networks), state };
    entryOf(sums, labels, () => 0).value += value;
  }
  return [...sums.values()];
}

/** Values of labels by their names. */
export type Labels = Readonly<Record<string, string>>;

/** One line. In a histogram its name has a suffix. */
export interface Sample {
  suffix?: "_bucket" | "_count" | "_sum";
  labels?: Labels;
  value: number;
}

/** A metric family: samples that belong together. */
export interface Family {
  /** Without `_total` or `_info`; with the unit at its end where it has one. */
  name: string;
  type: "counter" | "gauge" | "histogram" | "info";
  unit?: "seconds";
  help: string;
  samples: readonly Sample[];
}

/** Upper bounds of the buckets of durations, in seconds; above the last is +Inf. */
export const durationBounds = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60];

/** How many values fell into each bucket, the last being +Inf, and their sum. */
export type Histogram = { counts: number[]; sum: number };

/** An empty histogram. */
export function newHistogram(): Histogram {
  return { counts: new Array<number>(durationBounds.length + 1).fill(0), sum: 0 };
}

/** Counts a duration in a histogram. */
export function observe(histogram: Histogram, seconds: number): void {
  const found = durationBounds.findIndex((bound) => seconds <= bound);
  const bucket = found === -1 ? durationBounds.length : found;
  histogram.counts[bucket] = (histogram.counts[bucket] ?? 0) + 1;
  histogram.sum += seconds;
}

/** The samples of one histogram: each bucket includes the counts of the smaller ones. */
export function histogramSamples({ counts, sum }: Histogram, labels: Labels): Sample[] {
  let total = 0;
  const buckets = counts.map((count, i): Sample => {
    total += count;
    const bound = durationBounds[i];
    const le = bound === undefined ? "+Inf" : formatValue(bound);
    return { suffix: "_bucket", labels: { ...labels, le }, value: total };
  });
  const count: Sample = { suffix: "_count", labels, value: total };
  return [...buckets, count, { suffix: "_sum", labels, value: sum }];
}

const totals = { counter: "_total", info: "_info", gauge: "", histogram: "" } as const;

/** Families as one document; those without samples are left out. */
export function formatMetrics(families: readonly Family[], format: MetricsFormat): string {
  const parts = families
    .filter(({ samples }) => samples.length > 0)
    .map((family) => formatFamily(family, format));
  return parts.join("") + (format === "openmetrics" ? "# EOF\n" : "");
}

function formatFamily({ name, type, unit, help, samples }: Family, format: MetricsFormat): string {
  const isOpen = format === "openmetrics";
  // Prometheus text has no names of families: the name of the samples stands in their place.
  const family = isOpen ? name : name + totals[type];
  const shownType = !isOpen && type === "info" ? "gauge" : type;
  // Only OpenMetrics has quotes escaped in a help text.
  const shownHelp = isOpen ? escaped(help) : escaped(help).replaceAll('\\"', '"');
  const head = [`# TYPE ${family} ${shownType}`, `# HELP ${family} ${shownHelp}`];
  if (isOpen && unit) head.splice(1, 0, `# UNIT ${name} ${unit}`);
  const lines = samples.map(({ suffix = totals[type], labels = {}, value }) => {
    const pairs = Object.entries(labels).map(([label, text]) => `${label}="${escaped(text)}"`);
    const set = pairs.length > 0 ? `{${pairs.join(",")}}` : "";
    return `${name}${suffix}${set} ${formatValue(value)}`;
  });
  return `${[...head, ...lines].join("\n")}\n`;
}

/** Numbers as in the canonical form: "1.0", "0.005". */
function formatValue(value: number): string {
  if (!Number.isFinite(value)) return value > 0 ? "+Inf" : Number.isNaN(value) ? "NaN" : "-Inf";
  return Number.isInteger(value) && Math.abs(value) < 1e15 ? `${value}.0` : `${value}`;
}

function escaped(text: string): string {
  const replace = (one: string) => (one === "\n" ? "\\n" : `\\${one}`);
  return text.toWellFormed().replace(/[\\\n"]/g, replace);
}
