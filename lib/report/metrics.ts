/**
 * Metrics as text. Pure. Label values come from others and may hold anything.
 * Source: OpenMetrics 1.0 (prometheus/OpenMetrics specification/OpenMetrics.md).
 */

/** What a scraper is told that it gets. */
export const metricsContentType = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/** Values of labels by their names. */
export type Labels = Readonly<Record<string, string>>;

/** One line: of a histogram and of an info the name has a suffix. */
export interface Sample {
  suffix?: "_bucket" | "_count" | "_sum";
  labels?: Labels;
  value: number;
}

/** Samples that belong together. */
export interface Family {
  /** Without `_total` or `_info`; with the unit at its end where it has one. */
  name: string;
  type: "counter" | "gauge" | "histogram" | "info";
  unit?: "seconds";
  help: string;
  samples: readonly Sample[];
}

/** Upper bounds of the buckets of durations, in seconds; above the last is +Inf. */
export const durationBounds = [
  ...[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5],
  ...[1, 2.5, 5, 10, 30, 60],
] as const;

/** How many values fell into each bucket, the last being +Inf, and their sum. */
export interface Histogram {
  counts: number[];
  sum: number;
}

/** A histogram of nothing yet. */
export function newHistogram(): Histogram {
  return { counts: new Array<number>(durationBounds.length + 1).fill(0), sum: 0 };
}

/** Puts a duration into a histogram. */
export function observe(histogram: Histogram, seconds: number): void {
  const found = durationBounds.findIndex((bound) => seconds <= bound);
  const bucket = found === -1 ? durationBounds.length : found;
  histogram.counts[bucket] = (histogram.counts[bucket] ?? 0) + 1;
  histogram.sum += seconds;
}

/** The samples of one histogram: each bucket counts the smaller ones too. */
export function histogramSamples({ counts, sum }: Histogram, labels: Labels): Sample[] {
  let total = 0;
  const buckets = counts.map((count, i): Sample => {
    total += count;
    const bound = durationBounds[i];
    const le = bound === undefined ? "+Inf" : formatValue(bound);
    return { suffix: "_bucket", labels: { ...labels, le }, value: total };
  });
  return [
    ...buckets,
    { suffix: "_count", labels, value: total },
    { suffix: "_sum", labels, value: sum },
  ];
}

const totals = { counter: "_total", info: "_info", gauge: "", histogram: "" } as const;

/** Families as one document; those without samples are left out. */
export function formatMetrics(families: readonly Family[]): string {
  const parts = families.filter(({ samples }) => samples.length > 0).map(formatFamily);
  return `${parts.join("")}# EOF\n`;
}

function formatFamily({ name, type, unit, help, samples }: Family): string {
  const head = [
    `# TYPE ${name} ${type}`,
    ...(unit ? [`# UNIT ${name} ${unit}`] : []),
    `# HELP ${name} ${escaped(help)}`,
  ];
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
  return text
    .toWellFormed()
    .replaceAll("\\", "\\\\")
    .replaceAll("\n", "\\n")
    .replaceAll('"', '\\"');
}
