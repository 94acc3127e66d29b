/**
 * `genie plan`: what an ADD of a pod would do, and why. Asks what ADD would ask: of the plugins,
 * only the STATUS of those that an automatic choice considers. Attaches and changes nothing.
 */
import type { Host, Plan, PlanCall, Request, StdinConfig } from "../call.ts";
import type { Choice } from "../choice/choose.ts";
import type { Measured, NetworkKpis } from "../choice/kpi.ts";
import type { Kpi, Ranked } from "../choice/rank.ts";
import { CniError, interfaceNameIssue, log } from "../cni.ts";
import { ignoredMultusKeys } from "../config/foreign_config.ts";
import type { Config } from "../config/schema.ts";
import { type Flags, namedPod, text, UsageError } from "../config/usage.ts";
import { resolveNetwork } from "../networks.ts";
import { findPod, makePlan } from "../plan.ts";
import { annotationsCapability } from "../pod.ts";
import { judgeQuota, readHeld, type Verdict } from "../policy/access.ts";
import type { Attachment } from "../record.ts";
import { orUndefined } from "../recovery/tried.ts";
import { formatCount, formatDuration, formatRate, formatShare } from "../report/quantity.ts";
import { readRecord } from "../report/record_reader.ts";
import { formatTable, shownError } from "../report/table.ts";
import { podLabel, readPath } from "../request.ts";
import { loadConfig } from "../settings.ts";

/** What `genie plan` takes from the node and the terminal. */
export interface PlanSite {
  /** Our own CNI config. */
  own: StdinConfig;
  /** Folders of plugin binaries that the node's runtimes name. */
  askedPath: (config: Config) => string[];
  /** Why pods with network policy do not start now; undefined where they do. */
  missingAgent: (config: Config, nowMs: number) => string | undefined;
  /** Columns of the terminal, Infinity for none. */
  width: number;
}

/**
 * Runs `genie plan`.
 * @returns exit status: 1 when the pod may not have some of it
 * @throws UsageError for words that make no sense; else as `makePlan()`
 */
export async function runPlan(host: Host, flags: Flags, site: PlanSite): Promise<number> {
  const asked = dryRequest(host, site.own, flags);
  const config = await loadConfig(site.own);
  const ignored = ignoredMultusKeys(site.own);
  if (ignored) log(host, "warn", ignored);
  const missing = site.missingAgent(config, host.now());
  if (missing) log(host, "warn", missing);
  const request = { ...asked, path: [...asked.path, ...site.askedPath(config)] };
  const verdicts: Verdict[] = [];
  const reader: PlanCall["reader"] = (inside) => readRecord(config.stateDir, inside);
  const call = { host, config, request, reader, verdicts };
  const plan = await makePlan(call, await findPod(call));
  verdicts.push(...quotaVerdicts(config, plan));
  host.stdout(
    flags["json"]
      ? `${JSON.stringify(planDocument(config, plan, verdicts), null, 2)}\n`
      : formatPlan(config, plan, verdicts, site.width),
  );
  return verdicts.every(({ allowed }) => allowed) ? 0 : 1;
}

/** What the quotas say to the plan, where they refuse it: they count what is on record now. */
function quotaVerdicts(config: Config, { attachments }: Plan): Verdict[] {
  if (!config.access.maxAttachments) return [];
  try {
    const held = readRecord(config.stateDir, (reader) => readHeld(reader, attachments));
    judgeQuota(config, attachments, held ?? { pod: 0, namespace: 0 });
    return [];
  } catch (error) {
    if (!(error instanceof CniError) || error.rule === "") throw error;
    const { message: reason, rule } = error;
    return [{ network: "(all)", ifName: "", allowed: false, reason, rule }];
  }
}

const planColumns = ["NETWORK", "INTERFACE", "PLUGINS", "CNI", "CONFIG", "WHY"].map((title) => ({
  title,
  shrinks: ["PLUGINS", "CONFIG", "WHY"].includes(title),
}));
const verdictColumns = [
  ...["NETWORK", "INTERFACE", "ACCESS"].map((title) => ({ title })),
  { title: "BECAUSE", wraps: true },
];

function formatPlan(config: Config, plan: Plan, verdicts: Verdict[], width: number): string {
  const attachments = formatTable(
    planColumns,
    plan.attachments.map((one) => [
      one.network,
      one.ifName,
      one.list.plugins.map(({ type }) => type).join(", "),
      one.list.cniVersion,
      sourceOf(config, one),
      one.reason,
    ]),
    width,
  );
  const why = ({ reason, rule = "" }: Verdict) => shownError({ error: reason, rule });
  const access = formatTable(
    verdictColumns,
    verdicts.map((one) => [one.network, one.ifName, one.allowed ? "allowed" : "denied", why(one)]),
    width,
  );
  return [
    `Pod ${podLabel(plan.pod)}, annotations from: ${annotationOrigin[plan.pod.source]}\n`,
    attachments,
    ...(plan.choice ? [formatChoice(plan.choice, config.select.weights, width)] : []),
    access,
  ].join("\n");
}

/** Where the config of a network is from. Objects of the API are no files. */
function sourceOf(config: Config, { network }: Attachment): string {
  return orUndefined(() => resolveNetwork(config, network).source) ?? "the Kubernetes API";
}

const annotationOrigin: Record<Plan["pod"]["source"], string> = {
  runtime: "the command line",
  mesos: "Mesos labels",
  "cni-args": "CNI_ARGS",
  api: "the Kubernetes API",
  none: "nowhere, the pod asks for nothing",
};

/** Stable shape of `genie plan --json`. */
function planDocument(config: Config, plan: Plan, verdicts: Verdict[]): object {
  const { namespace, name, uid, source } = plan.pod;
  return {
    pod: { namespace, name, uid },
    annotationsFrom: source,
    attachments: plan.attachments.map((one) => ({
      network: one.network,
      interface: one.ifName,
      primary: one.primary,
      cniVersion: one.list.cniVersion,
      plugins: one.list.plugins.map(({ type }, i) => ({ type, path: one.plugins[i] })),
      config: sourceOf(config, one),
      reason: one.reason,
    })),
    access: verdicts.map(({ network, ifName, allowed, reason, rule = "" }) => {
      return { network, interface: ifName, allowed, reason, rule };
    }),
    ...(plan.choice && { choice: choiceDocument(plan.choice, config.select.weights) }),
  };
}

/** The request a runtime would send for this pod; none of it is executed. */
function dryRequest(host: Host, config: StdinConfig, flags: Flags): Request {
  const { namespace, name } = namedPod(flags);
  if (/[;=]/.test(namespace + name)) throw new UsageError('Names cannot hold ";" or "="');
  const ifName = text(flags, "ifname") ?? "eth0";
  const issue = interfaceNameIssue(ifName);
  if (issue) throw new UsageError(`Invalid --ifname ${JSON.stringify(ifName)}: ${issue}`);
  const annotations = readAnnotations(flags["annotation"]);
  const runtimeConfig = annotations && { [annotationsCapability]: annotations };
  return {
    command: "ADD",
    containerId: "plan",
    netns: "",
    ifName,
    args: `K8S_POD_NAMESPACE=${namespace};K8S_POD_NAME=${name}`,
    path: readPath(host.env),
    cniVersion: "1.1.0",
    config: { ...config, ...(runtimeConfig && { runtimeConfig }) },
  };
}

function readAnnotations(words: Flags[string]): Record<string, string> | undefined {
  if (!Array.isArray(words)) return undefined;
  const entries = words.map((word) => {
    const at = word.indexOf("=");
    if (at < 1) throw new UsageError(`Invalid --annotation "${word}": expected KEY=VALUE`);
    return [word.slice(0, at), word.slice(at + 1)];
  });
  return Object.fromEntries(entries);
}

type Weights = Config["select"]["weights"];

/** What a candidate lost by, per KPI, in the order of the weights. */
const shortfalls: Record<Kpi, string> = {
  occupancy: "fewer free addresses",
  response_time: "slower",
  failures: "failed more often",
  bandwidth: "more traffic",
  subnets: "fewer subnets",
};
const kpis = Object.keys(shortfalls) as Kpi[];

/** "chosen", or the KPI that cost a candidate most; pods that are being attached count like one. */
function judge(one: Ranked, { ranking: [winner] }: Choice, weights: Weights): string {
  if (!winner || one === winner) return "chosen";
  const { occupancy = 0, recent } = one.candidate;
  if (occupancy >= 1 && (winner.candidate.occupancy ?? 0) < 1)
    return "full with those on their way";
  if (one.score === winner.score) {
    return recent > winner.candidate.recent ? "as good, more pods on their way" : "as good, later";
  }
  const gaps = kpis.map((kpi) => ({
    what: shortfalls[kpi],
    gap: weights[kpi] * ((winner.figures[kpi] ?? 0) - (one.figures[kpi] ?? 0)),
  }));
  const byFigures = gaps.reduce((sum, { gap }) => sum + gap, 0);
  gaps.push({ what: "more pods on their way", gap: winner.score - one.score - byFigures });
  const [worst] = gaps.sort((a, b) => b.gap - a.gap);
  return worst?.what ?? "";
}

const kpisOf = ({ kpis: all }: Choice, network: string): NetworkKpis | undefined =>
  all.find((one) => one.network === network);

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

const columns = [
  { title: "CANDIDATE" },
  ...["OCCUPANCY", "RESPONSE", "FAILURES", "TRAFFIC", "SUBNETS", "ON THE WAY", "SCORE"].map(
    (title) => ({ title, align: "right" as const }),
  ),
  { title: "VERDICT", shrinks: true },
];

/** The table of an automatic choice: candidates × KPIs, the winner, and why the others lost. */
function formatChoice(choice: Choice, weights: Weights, width: number): string {
  const cellsOf = (network: string) => {
    const found = kpisOf(choice, network);
    if (!found) return [network, "", "", "", "", ""];
    return [
      network,
      occupancyCell(found),
      cell(found.medianUs, formatDuration),
      cell(found.failures, (share) => formatShare(share, 1)),
      cell(found.bandwidth, formatRate),
      cell(found.subnets, String),
    ];
  };
  const ranked = choice.ranking.map((one) => [
    ...cellsOf(one.candidate.network),
    String(one.candidate.recent),
    one.score.toFixed(2),
    judge(one, choice, weights),
  ]);
  const rejected = choice.rejected.map(({ network, reason }) =>
    cellsOf(network).concat("", "", `out: ${reason}`),
  );
  return formatTable(columns, [...ranked, ...rejected], width);
}

/** Stable shape of a choice in `genie plan --json`; what is unknown has the value null. */
function choiceDocument(choice: Choice, weights: Weights): object {
  return {
    network: choice.network,
    weights,
    candidates: choice.ranking.map((one) => ({
      network: one.candidate.network,
      score: one.score,
      onTheWay: one.candidate.recent,
      figures: Object.fromEntries(kpis.map((kpi) => [kpi, one.figures[kpi] ?? null])),
      verdict: judge(one, choice, weights),
      kpis: kpiDocument(kpisOf(choice, one.candidate.network)),
    })),
    rejected: choice.rejected.map(({ network, reason, code }) => {
      return { network, reason, code, kpis: kpiDocument(kpisOf(choice, network)) };
    }),
  };
}

function kpiDocument(one: NetworkKpis | undefined): object | null {
  if (!one) return null;
  const measure = ({ value, source, ageMs }: Measured) => ({ value: value ?? null, source, ageMs });
  const { ipv4, ipv6 } = one;
  const others = ["subnets", "medianUs", "p95Us", "failures", "bandwidth", "attachments"] as const;
  return {
    occupancy: measure(one.occupancy),
    ipv4: { used: measure(ipv4.used), total: measure(ipv4.total) },
    ipv6: { used: measure(ipv6.used), total: measure(ipv6.total) },
    ...Object.fromEntries(others.map((key) => [key, measure(one[key])])),
  };
}
