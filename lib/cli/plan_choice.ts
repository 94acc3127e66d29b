/**
 * An automatic choice for people: candidates × KPIs, the winner, and why the others lost. Pure.
 */
import type { Choice } from "../choice/choose.ts";
import type { Measured, NetworkKpis } from "../choice/kpi.ts";
import type { Kpi, Ranked } from "../choice/rank.ts";
import { formatCount, formatDuration, formatRate, formatShare } from "../config/quantity.ts";
import type { Config } from "../config/schema.ts";
import { formatTable } from "../report/table.ts";

type Weights = Config["select"]["weights"];

/** What a candidate lost by, per KPI. */
const shortfalls: Record<Kpi, string> = {
  occupancy: "fewer free addresses",
  response_time: "slower",
  failures: "failed more often",
  bandwidth: "more traffic",
  subnets: "fewer subnets",
};

/** The KPIs in the order of the weights. */
const kpis = Object.keys(shortfalls) as Kpi[];

/** The KPI of which most is missing to the winner's score; pods on their way count like one. */
function verdict(loser: Ranked, winner: Ranked, weights: Weights): string {
  const { occupancy = 0, recent } = loser.candidate;
  if (occupancy >= 1 && (winner.candidate.occupancy ?? 0) < 1)
    return "full with those on their way";
  if (loser.score === winner.score) {
    return recent > winner.candidate.recent ? "as good, more pods on their way" : "as good, later";
  }
  const gaps = kpis.map((kpi) => ({
    what: shortfalls[kpi],
    gap: weights[kpi] * ((winner.figures[kpi] ?? 0) - (loser.figures[kpi] ?? 0)),
  }));
  const byFigures = gaps.reduce((sum, { gap }) => sum + gap, 0);
  gaps.push({
    what: "more pods on their way",
    gap: winner.score - loser.score - byFigures,
  });
  const [worst] = gaps.sort((a, b) => b.gap - a.gap);
  return worst?.what ?? "";
}

/** A figure, and how old it is where it was not read just now. */
function cell({ value, ageMs }: Measured, show: (value: number) => string): string {
  if (value === undefined) return "unknown";
  return ageMs < 1000 ? show(value) : `${show(value)}, ${formatDuration(ageMs * 1000)} ago`;
}

function occupancyCell({ occupancy, ipv4, ipv6 }: NetworkKpis): string {
  if (occupancy.value === undefined) return "unknown";
  const families = [ipv4, ipv6].flatMap(({ used, total }) =>
    used.value !== undefined && total.value ? [{ used: used.value, total: total.value }] : [],
  );
  const [fullest] = families.sort((a, b) => b.used / b.total - a.used / a.total);
  if (!fullest) return "unknown";
  const total = fullest.total < 1e9 ? formatCount(fullest.total) : fullest.total.toExponential(1);
  const share = formatShare(fullest.used, fullest.total);
  return `${share} (${formatCount(fullest.used)} of ${total})`;
}

/** The table of `genie plan`. */
export function formatChoiceTable(choice: Choice, weights: Weights, width: number): string {
  const measures = new Map(choice.kpis.map((one) => [one.network, one]));
  const [winner] = choice.ranking;
  const ranked = choice.ranking.map((one) => [
    ...cells(one.candidate.network, measures),
    String(one.candidate.recent),
    one.score.toFixed(2),
    one === winner || !winner ? "chosen" : verdict(one, winner, weights),
  ]);
  const rejected = choice.rejected.map(({ network, reason }) => [
    ...cells(network, measures),
    "",
    "",
    `out: ${reason}`,
  ]);
  const number = (title: string) => ({ title, align: "right" as const });
  return formatTable(
    [
      { title: "CANDIDATE" },
      number("OCCUPANCY"),
      number("RESPONSE"),
      number("FAILURES"),
      number("TRAFFIC"),
      number("SUBNETS"),
      number("ON THE WAY"),
      number("SCORE"),
      { title: "VERDICT", shrinks: true },
    ],
    [...ranked, ...rejected],
    width,
  );
}

function cells(network: string, measures: ReadonlyMap<string, NetworkKpis>): string[] {
  const found = measures.get(network);
  if (!found) return [network, "", "", "", "", ""];
  return [
    network,
    occupancyCell(found),
    cell(found.medianUs, formatDuration),
    cell(found.failures, (share) => formatShare(share, 1)),
    cell(found.bandwidth, formatRate),
    cell(found.subnets, String),
  ];
}

/** Stable shape of a choice in `genie plan --json`; what is unknown has the value null. */
export function choiceDocument(choice: Choice, weights: Weights): object {
  const measures = new Map(choice.kpis.map((one) => [one.network, one]));
  const [winner] = choice.ranking;
  const measuresOf = (network: string) => {
    const found = measures.get(network);
    return { kpis: found ? kpiDocument(found) : null };
  };
  return {
    network: choice.network,
    weights,
    candidates: choice.ranking.map((one) => ({
      network: one.candidate.network,
      score: one.score,
      onTheWay: one.candidate.recent,
      figures: Object.fromEntries(kpis.map((kpi) => [kpi, one.figures[kpi] ?? null])),
      verdict: one === winner || !winner ? "chosen" : verdict(one, winner, weights),
      ...measuresOf(one.candidate.network),
    })),
    rejected: choice.rejected.map(({ network, reason, code }) => ({
      network,
      reason,
      code,
      ...measuresOf(network),
    })),
  };
}

function kpiDocument(one: NetworkKpis): object {
  const measure = ({ value, source, ageMs }: Measured) => ({ value: value ?? null, source, ageMs });
  const family = ({ used, total }: NetworkKpis["ipv4"]) => ({
    used: measure(used),
    total: measure(total),
  });
  return {
    occupancy: measure(one.occupancy),
    ipv4: family(one.ipv4),
    ipv6: family(one.ipv6),
    subnets: measure(one.subnets),
    medianUs: measure(one.medianUs),
    p95Us: measure(one.p95Us),
    failures: measure(one.failures),
    bandwidth: measure(one.bandwidth),
    attachments: measure(one.attachments),
  };
}
