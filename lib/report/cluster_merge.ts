/**
 * The reports of many nodes as one: each is added and let go, so that a thousand take no more
 * memory than their sum. Pure.
 */
import type { ParsedReport } from "./cluster_parse.ts";
import type {
  AddressReport,
  CauseReport,
  ClusterReport,
  NetworkReport,
  NodeReport,
  PolicyReport,
  ReportHead,
} from "./shape.ts";
import { type Latency, latencyEdgesUs, otherNetworks, timeBuckets } from "./tally.ts";

/** Names told apart, of networks and of causes: nodes may have others each. */
const namesMax = 2000;
/** Things listed beside the newest requests: stuck attachments, rulesets, problems. */
const listMax = 1000;
const causeNetworksMax = 16;
/** Notices of nodes shown, those of the most nodes first. */
const noticesMax = 20;

/** What a merge begins with. */
export type ClusterHead = Omit<ReportHead, "setAside" | "version"> &
  Pick<ClusterReport, "filter"> & {
    /** How many of the newest requests to list. */
    limit: number;
  };

/** A merge under way. */
export interface Merge {
  add(node: string, report: ParsedReport): void;
  /** A node that has no report, and why. */
  addMissing(node: string, error: string): void;
  result(): ClusterReport;
}

type Share = "p50Us" | "p95Us" | "p99Us";
const shares: [Share, number][] = [
  ["p50Us", 0.5],
  ["p95Us", 0.95],
  ["p99Us", 0.99],
];

const spans = latencyEdgesUs.length + 1;
const noLatency = { count: 0, p50Us: null, p95Us: null, p99Us: null };

/** A percentile of all lies between the least and the largest of the nodes'. */
function makeLatency() {
  const histogram = new Array<number>(spans).fill(0);
  const ends = new Map<Share, { min: number; max: number }>();
  let count = 0;
  return {
    add(one: Latency) {
      count += one.count;
      one.histogram.forEach((many, i) => {
        histogram[i] = (histogram[i] ?? 0) + many;
      });
      for (const [share] of shares) {
        const us = one[share];
        if (us === null) continue;
        const { min, max } = ends.get(share) ?? { min: us, max: us };
        ends.set(share, { min: Math.min(min, us), max: Math.max(max, us) });
      }
    },
    result(): Latency {
      const latency: Latency = { ...noLatency, count, histogram };
      for (const [share, part] of shares) {
        const between = ends.get(share);
        if (!between) continue;
        const edge = upperEdge(histogram, Math.ceil(part * count));
        latency[share] = Math.max(between.min, Math.min(between.max, edge));
      }
      return latency;
    },
  };
}

/** Where the span ends in which the n-th lies. */
function upperEdge(histogram: readonly number[], rank: number): number {
  let seen = 0;
  const span = histogram.findIndex((many) => {
    seen += many;
    return seen >= rank;
  });
  return latencyEdgesUs[span] ?? Number.POSITIVE_INFINITY;
}

/** Keeps those of a list with the greatest key, texts in order of the alphabet. */
function newest<T>(max: number, keyOf: (one: T) => string | null) {
  let kept: T[] = [];
  const trim = () => {
    const key = (one: T) => keyOf(one) ?? "";
    kept.sort((a, b) => (key(a) < key(b) ? 1 : key(a) > key(b) ? -1 : 0));
    kept = kept.slice(0, max);
    return kept;
  };
  return {
    add(one: T) {
      kept.push(one);
      if (kept.length > 2 * max + 1024) trim();
    },
    result: trim,
  };
}

interface Counts {
  requests: number;
  failures: number;
  denied: number;
}

interface NetworkSum extends Counts {
  latency: ReturnType<typeof makeLatency>;
  addresses: NetworkReport["addresses"];
  bytesPerSecond: number | null;
  attachments: number;
}

function addCounts(to: Counts, { requests, failures, denied }: Counts): void {
  to.requests += requests;
  to.failures += failures;
  to.denied += denied;
}

function addAddresses(to: AddressReport, { used, total }: AddressReport): void {
  to.used += used;
  to.total = to.total === null || total === null ? null : to.total + total;
}

function mergeNetworks() {
  const sums = new Map<string, NetworkSum>();
  return {
    add(one: NetworkReport) {
      const isTold = sums.has(one.network) || sums.size < namesMax;
      const name = isTold ? one.network : otherNetworks;
      const sum = sums.get(name) ?? {
        ...{ requests: 0, failures: 0, denied: 0, attachments: 0, bytesPerSecond: null },
        latency: makeLatency(),
        addresses: { ipv4: { used: 0, total: 0 }, ipv6: { used: 0, total: 0 } },
      };
      sums.set(name, sum);
      addCounts(sum, one);
      sum.latency.add(one.add);
      addAddresses(sum.addresses.ipv4, one.addresses.ipv4);
      addAddresses(sum.addresses.ipv6, one.addresses.ipv6);
      if (one.bytesPerSecond !== null) {
        sum.bytesPerSecond = (sum.bytesPerSecond ?? 0) + one.bytesPerSecond;
      }
      sum.attachments += one.attachments;
    },
    result: (): NetworkReport[] =>
      [...sums].sort(byName).map(([network, { latency, ...rest }]) => ({
        network,
        ...rest,
        add: latency.result(),
      })),
  };
}

const byName = ([a]: [string, unknown], [b]: [string, unknown]): number =>
  a < b ? -1 : a > b ? 1 : 0;

function mergeCauses() {
  const sums = new Map<string, CauseReport & { counts: Map<string, number> }>();
  return {
    add(node: string, one: CauseReport) {
      const exact = `${one.denied} ${one.code}`;
      const key = sums.has(exact) || sums.size < namesMax ? exact : `${one.denied} other`;
      const sum = sums.get(key) ?? {
        ...{ ...one, node, requests: 0, networks: [] },
        counts: new Map<string, number>(),
      };
      sums.set(key, sum);
      sum.requests += one.requests;
      for (const { network, requests } of one.networks) {
        if (sum.counts.size >= namesMax && !sum.counts.has(network)) continue;
        sum.counts.set(network, (sum.counts.get(network) ?? 0) + requests);
      }
      const { at, error, rule } = one;
      if ((at ?? "") > (sum.at ?? "")) Object.assign(sum, { at, error, rule, node });
    },
    result: (): CauseReport[] =>
      [...sums.values()]
        .map(({ counts, ...rest }) => ({
          ...rest,
          networks: [...counts]
            .map(([network, requests]) => ({ network, requests }))
            .sort((a, b) => b.requests - a.requests)
            .slice(0, causeNetworksMax),
        }))
        .sort((a, b) => b.requests - a.requests || a.code - b.code),
  };
}

/** Counts by time; the buckets of nodes differ, so each goes where it begins. */
function mergeTimes() {
  const counts = new Map<string, { ok: number; failed: number; denied: number }>();
  let from: string | null = null;
  let to: string | null = null;
  return {
    add(report: ParsedReport) {
      if (report.from !== null && (from === null || report.from < from)) from = report.from;
      if (report.to !== null && (to === null || report.to > to)) to = report.to;
      for (const { at, ok, failed, denied } of report.timeline.buckets) {
        const sum = counts.get(at) ?? { ok: 0, failed: 0, denied: 0 };
        counts.set(at, {
          ok: sum.ok + ok,
          failed: sum.failed + failed,
          denied: sum.denied + denied,
        });
      }
    },
    result(): Pick<ClusterReport, "from" | "to" | "timeline"> {
      const first = Date.parse(from ?? "1970-01-01T00:00:00Z");
      const last = Date.parse(to ?? "1970-01-01T00:00:00Z");
      const { bucketMs, timeline } = timeBuckets(first, last);
      const startMs = timeline[0]?.atMs ?? 0;
      for (const [at, { ok, failed, denied }] of counts) {
        const place = Math.floor((Date.parse(at) - startMs) / bucketMs);
        const bucket = timeline[Math.max(0, Math.min(timeline.length - 1, place))];
        if (!bucket) continue;
        bucket.ok += ok;
        bucket.failed += failed;
        bucket.denied += denied;
      }
      const buckets = timeline.map(({ atMs, ...rest }) => ({
        at: new Date(atMs).toISOString(),
        ...rest,
      }));
      return { from, to, timeline: { bucketMs, buckets: from === null ? [] : buckets } };
    },
  };
}

/** One policy is the same on every node, and so is what is wrong with it. */
function mergePolicy() {
  type Problem = PolicyReport["problems"][number];
  const problems = new Map<string, Problem>();
  const rulesets = newest<PolicyReport["rulesets"][number]>(listMax, ({ at }) => at);
  let merged: { knownAt: string | null; enforced: number } | undefined;
  return {
    add(policy: PolicyReport) {
      const oldest = merged?.knownAt ?? policy.knownAt;
      const isOlder = (policy.knownAt ?? "") < (oldest ?? "");
      const isFirst = merged === undefined;
      const isNever = policy.knownAt === null || (!isFirst && merged?.knownAt === null);
      merged = {
        knownAt: isNever ? null : isOlder ? policy.knownAt : oldest,
        enforced: (merged?.enforced ?? 0) + policy.enforced,
      };
      for (const one of policy.rulesets) rulesets.add(one);
      for (const one of policy.problems) {
        const { kind, namespace, name, path, problem } = one;
        const key = JSON.stringify([kind, namespace, name, path, problem]);
        const before = problems.get(key);
        if (before === undefined && problems.size >= listMax) continue;
        if ((one.at ?? "") > (before?.at ?? "") || before === undefined) problems.set(key, one);
      }
    },
    result(): PolicyReport | undefined {
      if (!merged) return undefined;
      const all = newest<Problem>(listMax, ({ at }) => at);
      for (const one of problems.values()) all.add(one);
      return { ...merged, rulesets: rulesets.result(), problems: all.result() };
    },
  };
}

/** What nodes say, each text once. */
function mergeNotices(nodes: readonly NodeReport[]): string[] {
  const tellers = new Map<string, string[]>();
  for (const { node, notices } of nodes) {
    for (const text of notices) tellers.set(text, [...(tellers.get(text) ?? []), node]);
  }
  const all = [...tellers].sort((a, b) => b[1].length - a[1].length);
  const shown = all
    .slice(0, noticesMax)
    .map(([text, who]) =>
      who.length === 1 ? `${who[0]}: ${text}` : `${who.length} nodes: ${text}`,
    );
  const more = all.length - shown.length;
  return more > 0 ? [...shown, `${more} more notices of nodes: --json has them`] : shown;
}

function versionNotices(nodes: readonly NodeReport[], own: string): string[] {
  const versions = new Map<string, number>();
  for (const { genie, error } of nodes) {
    if (error === "") versions.set(genie, (versions.get(genie) ?? 0) + 1);
  }
  versions.set(own, versions.get(own) ?? 0);
  if (versions.size === 1) return [];
  const said = [...versions].sort(byName).map(([version, many]) => {
    const name = version === "" ? "an older one" : version;
    return version === own && many === 0 ? `${name} here` : `${name} on ${many}`;
  });
  return [`Versions of genie differ: ${said.join(", ")}`];
}

/** Begins a merge of no nodes. */
export function startMerge({ limit, ...head }: ClusterHead): Merge {
  const nodes: NodeReport[] = [];
  const networks = mergeNetworks();
  const causes = mergeCauses();
  const times = mergeTimes();
  const policy = mergePolicy();
  const latency = makeLatency();
  const totals = { requests: 0, failures: 0, denied: 0, attachments: 0, failing: 0, leaked: 0 };
  const deciders = new Map<string, ClusterReport["decisions"][number]>();
  const stuck = newest<ClusterReport["stuck"][number]>(listMax, (one) => one.failingSince);
  const requests = newest<ClusterReport["requests"][number]>(limit, ({ at }) => at);
  const failed = newest<ClusterReport["requests"][number]>(limit, ({ at }) => at);
  return {
    add(node, report) {
      nodes.push(nodeOf(node, report));
      addCounts(totals, report.totals);
      for (const key of ["attachments", "failing", "leaked"] as const) {
        totals[key] += report.totals[key];
      }
      latency.add(report.totals.add);
      for (const one of report.networks) networks.add(one);
      for (const one of report.causes) causes.add(node, one);
      times.add(report);
      if (report.policy) policy.add(report.policy);
      for (const one of report.decisions) addDecision(deciders, one);
      for (const one of report.stuck) stuck.add({ ...one, node });
      for (const one of report.requests) requests.add({ ...one, node });
      for (const one of report.failed) failed.add({ ...one, node });
    },
    addMissing: (node, error) => nodes.push({ ...missing, node, error }),
    result() {
      nodes.sort((a, b) => byName([a.node, 0], [b.node, 0]));
      const merged = policy.result();
      return {
        version: 1,
        ...head,
        notices: [...head.notices, ...versionNotices(nodes, head.genie), ...mergeNotices(nodes)],
        setAside: [],
        ...times.result(),
        totals: { ...totals, add: latency.result() },
        nodes,
        networks: networks.result(),
        stuck: stuck.result(),
        latencyEdgesUs,
        causes: causes.result(),
        decisions: [...deciders].sort(byName).map(([, one]) => one),
        choices: [],
        requests: requests.result(),
        failed: failed.result(),
        ...(merged && { policy: merged }),
      };
    },
  };
}

type Decision = ClusterReport["decisions"][number];

function addDecision(deciders: Map<string, Decision>, one: Decision): void {
  const key = JSON.stringify([one.network, one.decidedBy]);
  const before = deciders.get(key);
  if (before === undefined && deciders.size >= namesMax) return;
  deciders.set(key, { ...one, requests: one.requests + (before?.requests ?? 0) });
}

const missing: NodeReport = {
  ...{ node: "", error: "", genie: "", generatedAt: null, notices: [] },
  totals: {
    ...{ requests: 0, failures: 0, denied: 0, attachments: 0, failing: 0, leaked: 0 },
    add: noLatency,
  },
  addresses: { ipv4: 0, ipv6: 0 },
};

function nodeOf(node: string, report: ParsedReport): NodeReport {
  const { genie, generatedAt, notices, networks, totals } = report;
  const { histogram: _, ...add } = totals.add;
  const used = (family: "ipv4" | "ipv6") =>
    networks.reduce((sum, { addresses }) => sum + addresses[family].used, 0);
  return {
    ...{ node, error: "", genie, generatedAt, notices },
    totals: { ...totals, add },
    addresses: { ipv4: used("ipv4"), ipv6: used("ipv6") },
  };
}
