/**
 * The reports of many nodes as one: each is added and let go, so that a thousand take no more
 * memory than their sum. Pure.
 */
import * as doc from "./document.ts";
import { keyIn, newestOf, otherNetworks, rankedNetworks, timeBuckets } from "./tally.ts";

/** Longest list of events, problems and the like. */
const listMax = 1000;
/** Longest list of attachments. */
const attachmentsMax = 100_000;
/** Most networks and causes counted by themselves: each node may have its own. */
const namesMax = 2000;
const causeNetworksMax = 16;
/** Most notices of nodes, those of the most nodes first. */
const noticesMax = 20;

type NetworkReport = doc.ClusterReport["networks"][number];
type CauseReport = doc.ClusterReport["causes"][number];
type Decision = doc.ClusterReport["decisions"][number];
type AttachmentReport = doc.ClusterReport["stuck"][number];
type RequestReport = doc.ClusterReport["requests"][number];
type HeadKey = "genie" | "generatedAt" | "record" | "notices" | "filter";

/**
 * Starts a merge, without any node yet.
 * @param head what it starts with; `limit` is how many of the newest requests to list
 * @returns functions to `add` the report of a node, or by `addMissing` a node that has none and
 *   why, and to get the `result`
 */
export function startMerge({
  limit,
  ...head
}: Pick<doc.ClusterReport, HeadKey> & { limit: number }) {
  const nodes: doc.NodeReport[] = [];
  const networks = mergeNetworks();
  const causes = mergeCauses();
  const times = mergeTimes();
  const policy = mergePolicy();
  const latency = mergeLatency();
  const totals = { ...noTotals };
  const decisions = new Map<string, Decision>();
  const stuck = newestOf<AttachmentReport>(listMax, ({ failingSince }) => failingSince ?? "");
  const attachments = newestOf<AttachmentReport>(attachmentsMax, (one) => one.createdAt ?? "");
  const failures = newestOf<doc.FailureReport>(doc.failuresMax, ({ last }) => last);
  const requests = newestOf<RequestReport>(limit, ({ at }) => at);
  const failed = newestOf<RequestReport>(limit, ({ at }) => at);
  return {
    add(node: string, report: doc.ParsedReport) {
      nodes.push(nodeOf(node, report));
      addTo(totals, report.totals);
      latency.add(report.totals.add);
      for (const one of report.networks) networks.add(one);
      for (const one of report.causes) causes.add(node, one);
      times.add(report);
      if (report.policy) policy.add(report.policy);
      for (const one of report.decisions) addDecision(decisions, one);
      for (const one of report.stuck) stuck.add({ ...one, node });
      for (const one of report.attachments) attachments.add({ ...one, node });
      for (const one of report.failures) failures.add({ ...one, node });
      for (const one of report.requests) requests.add({ ...one, node });
      for (const one of report.failed) failed.add({ ...one, node });
    },
    addMissing: (node: string, error: string) => nodes.push({ node, error, ...missingNode }),
    result(): doc.ClusterReport {
      nodes.sort((a, b) => byText(a.node, b.node));
      const merged = policy.result();
      return {
        version: 1,
        ...head,
        node: "",
        notices: [...head.notices, ...versionNotices(nodes, head.genie), ...nodeNotices(nodes)],
        setAside: [],
        ...times.result(),
        totals: { ...totals, add: latency.result() },
        nodes,
        networks: networks.result(),
        stuck: stuck.result(),
        attachments: attachments.result(),
        latencyEdgesUs: doc.latencyEdgesUs,
        causes: causes.result(),
        failures: failures.result(),
        decisions: inOrder(decisions).map(([, one]) => one),
        choices: [],
        requests: requests.result(),
        failed: failed.result(),
        ...(merged && { policy: merged }),
      };
    },
  };
}

const byText = (a: string, b: string): number => (a < b ? -1 : a > b ? 1 : 0);
const inOrder = <T>(map: ReadonlyMap<string, T>): [string, T][] =>
  [...map].sort(([a], [b]) => byText(a, b));

/** Adds to each number of a sum the one of that name. */
function addTo<K extends string>(sum: Record<K, number>, one: Record<NoInfer<K>, number>): void {
  for (const key of Object.keys(sum) as K[]) sum[key] += one[key];
}

const noLatency = { count: 0, p50Us: null, p95Us: null, p99Us: null };

const noCounts = { requests: 0, failures: 0, denied: 0, attachments: 0 };
const noTotals = { ...noCounts, pods: 0, failedPods: 0, failing: 0, leaked: 0 };

const missingNode = {
  genie: "",
  generatedAt: null,
  notices: [],
  totals: { ...noTotals, add: noLatency },
  addresses: { ipv4: 0, ipv6: 0 },
};

function nodeOf(node: string, report: doc.ParsedReport): doc.NodeReport {
  const { genie, generatedAt, notices, networks, totals } = report;
  const { histogram: _, ...add } = totals.add;
  const used = (family: "ipv4" | "ipv6") =>
    networks.reduce((sum, { addresses }) => sum + addresses[family].used, 0);
  return {
    node,
    error: "",
    genie,
    generatedAt,
    notices,
    totals: { ...totals, add },
    addresses: { ipv4: used("ipv4"), ipv6: used("ipv6") },
  };
}

const shares = { p50Us: 0.5, p95Us: 0.95, p99Us: 0.99 };
const percentiles = ["p50Us", "p95Us", "p99Us"] as const;

/** A percentile of all lies between the least and the largest of the nodes'. */
function mergeLatency() {
  const histogram = new Array<number>(doc.latencyEdgesUs.length + 1).fill(0);
  const ends = new Map<string, { min: number; max: number }>();
  let count = 0;
  return {
    add(one: doc.Latency) {
      count += one.count;
      one.histogram.forEach((many, i) => {
        histogram[i] = (histogram[i] ?? 0) + many;
      });
      for (const key of percentiles) {
        const us = one[key];
        if (us === null) continue;
        const { min, max } = ends.get(key) ?? { min: us, max: us };
        ends.set(key, { min: Math.min(min, us), max: Math.max(max, us) });
      }
    },
    result(): doc.Latency {
      const latency: doc.Latency = { ...noLatency, count, histogram };
      for (const key of percentiles) {
        const between = ends.get(key);
        if (!between) continue;
        const edge = upperEdge(histogram, Math.ceil(shares[key] * count));
        latency[key] = Math.max(between.min, Math.min(between.max, edge));
      }
      return latency;
    },
  };
}

/** The upper edge of the span that holds the n-th duration. */
function upperEdge(histogram: readonly number[], rank: number): number {
  let seen = 0;
  const span = histogram.findIndex((many) => {
    seen += many;
    return seen >= rank;
  });
  return doc.latencyEdgesUs[span] ?? Number.POSITIVE_INFINITY;
}

type NetworkSum = Pick<NetworkReport, "bytesPerSecond" | "addresses"> & {
  counts: typeof noCounts;
  latency: ReturnType<typeof mergeLatency>;
};

const newNetwork = (): NetworkSum => ({
  counts: { ...noCounts },
  bytesPerSecond: null,
  latency: mergeLatency(),
  addresses: { ipv4: { used: 0, total: 0 }, ipv6: { used: 0, total: 0 } },
});

function mergeNetworks() {
  const sums = new Map<string, NetworkSum>();
  return {
    add(one: NetworkReport) {
      const name = keyIn(sums, one.network, namesMax, otherNetworks);
      const sum = sums.getOrInsertComputed(name, newNetwork);
      addTo(sum.counts, one);
      sum.latency.add(one.add);
      for (const family of ["ipv4", "ipv6"] as const) {
        const to = sum.addresses[family];
        const { used, total } = one.addresses[family];
        to.used += used;
        to.total = to.total === null || total === null ? null : to.total + total;
      }
      if (one.bytesPerSecond !== null) {
        sum.bytesPerSecond = (sum.bytesPerSecond ?? 0) + one.bytesPerSecond;
      }
    },
    result: (): NetworkReport[] =>
      inOrder(sums).map(([network, { counts, latency, ...rest }]) => {
        return { network, ...counts, ...rest, add: latency.result() };
      }),
  };
}

function mergeCauses() {
  const sums = new Map<string, { cause: CauseReport; networks: Map<string, number> }>();
  return {
    add(node: string, one: CauseReport) {
      const key = keyIn(sums, `${one.denied} ${one.code}`, namesMax, `${one.denied} other`);
      const { cause, networks } = sums.getOrInsertComputed(key, () => ({
        cause: { ...one, node, requests: 0 },
        networks: new Map(),
      }));
      cause.requests += one.requests;
      for (const { network, requests } of one.networks) {
        if (networks.size >= namesMax && !networks.has(network)) continue;
        networks.set(network, (networks.get(network) ?? 0) + requests);
      }
      const { at, error, rule } = one;
      if ((at ?? "") > (cause.at ?? "")) Object.assign(cause, { at, error, rule, node });
    },
    result: (): CauseReport[] =>
      [...sums.values()]
        .map(({ cause, networks }) => ({
          ...cause,
          networks: rankedNetworks(networks).slice(0, causeNetworksMax),
        }))
        .sort((a, b) => b.requests - a.requests || a.code - b.code),
  };
}

function addDecision(decisions: Map<string, Decision>, one: Decision): void {
  const key = JSON.stringify([one.network, one.decidedBy]);
  const before = decisions.get(key);
  if (before === undefined && decisions.size >= namesMax) return;
  decisions.set(key, { ...one, requests: one.requests + (before?.requests ?? 0) });
}

/** Counts by time. Nodes have different buckets: each is added to the one it begins in. */
function mergeTimes() {
  const outcomes = ["ok", "failed", "denied"] as const;
  const counts = new Map<string, Record<(typeof outcomes)[number], number>>();
  const times: string[] = [];
  return {
    add(report: doc.ParsedReport) {
      times.push(...[report.from, report.to].filter((time) => time !== null));
      for (const bucket of report.timeline.buckets) {
        addTo(counts.getOrInsert(bucket.at, { ok: 0, failed: 0, denied: 0 }), bucket);
      }
    },
    result(): Pick<doc.ClusterReport, "from" | "to" | "timeline"> {
      times.sort();
      const [from, to] = [times.at(0) ?? null, times.at(-1) ?? null];
      const ms = (time: string | null) => (time === null ? 0 : Date.parse(time));
      const { bucketMs, timeline } = timeBuckets(ms(from), ms(to));
      const startMs = timeline[0]?.atMs ?? 0;
      for (const [at, sum] of counts) {
        const place = Math.floor((Date.parse(at) - startMs) / bucketMs);
        const bucket = timeline[Math.max(0, Math.min(timeline.length - 1, place))];
        if (bucket) for (const key of outcomes) bucket[key] += sum[key];
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
  type Problem = doc.PolicyReport["problems"][number];
  const problems = new Map<string, Problem>();
  const rulesets = newestOf<doc.PolicyReport["rulesets"][number]>(listMax, ({ at }) => at ?? "");
  const knownAt: (string | null)[] = [];
  let enforced = 0;
  return {
    add(policy: doc.PolicyReport) {
      knownAt.push(policy.knownAt);
      enforced += policy.enforced;
      for (const one of policy.rulesets) rulesets.add(one);
      for (const one of policy.problems) {
        const { kind, namespace, name, path, problem } = one;
        const key = JSON.stringify([kind, namespace, name, path, problem]);
        const before = problems.get(key);
        if (before === undefined && problems.size >= listMax) continue;
        if (before === undefined || (one.at ?? "") > (before.at ?? "")) problems.set(key, one);
      }
    },
    result(): doc.PolicyReport | undefined {
      if (knownAt.length === 0) return undefined;
      return {
        // Known for as long as by every node: the oldest time, or never.
        knownAt: knownAt.includes(null) ? null : (knownAt.sort()[0] ?? null),
        enforced,
        rulesets: rulesets.result(),
        problems: [...problems.values()].sort((a, b) => byText(b.at ?? "", a.at ?? "")),
      };
    },
  };
}

/** The notices of nodes, each text once. */
function nodeNotices(nodes: readonly doc.NodeReport[]): string[] {
  const sayers = new Map<string, string[]>();
  for (const { node, notices } of nodes) {
    for (const notice of notices) sayers.getOrInsert(notice, []).push(node);
  }
  const shown = [...sayers]
    .sort((a, b) => b[1].length - a[1].length)
    .slice(0, noticesMax)
    .map(([notice, who]) => `${who.length === 1 ? who[0] : `${who.length} nodes`}: ${notice}`);
  const more = sayers.size - shown.length;
  return more > 0 ? [...shown, `${more} more notices of nodes: --json has them`] : shown;
}

function versionNotices(nodes: readonly doc.NodeReport[], own: string): string[] {
  const versions = new Map([[own, 0]]);
  for (const { genie, error } of nodes) {
    if (error === "") versions.set(genie, (versions.get(genie) ?? 0) + 1);
  }
  if (versions.size === 1) return [];
  const said = inOrder(versions).map(([version, many]) => {
    const name = version === "" ? "an older one" : version;
    return version === own && many === 0 ? `${name} here` : `${name} on ${many}`;
  });
  return [`Versions of genie differ: ${said.join(", ")}`];
}
