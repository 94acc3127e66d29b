/**
 * The documents of `genie report --json`. They are stable: `version` counts breaking changes, keys
 * may be added. All times are ISO 8601 in UTC; texts are "" and numbers 0 where there is nothing to
 * say. `genie report --cluster` reads those of other nodes, which are hostile until parsed: every
 * number is one, every list and text has its limit, and unknown keys are left out. Pure.
 */
import * as v from "valibot";

/**
 * Edges of the histograms, in µs: six per decade from 0.1 ms to 100 s. The first span begins at 0,
 * the last never ends.
 */
export const latencyEdgesUs: readonly number[] = [2, 3, 4, 5, 6, 7]
  .flatMap((decade) => [1, 1.5, 2, 3, 5, 7].map((step) => step * 10 ** decade))
  .concat(100_000_000);

/** Longest text kept, in characters; the longest in a ledger is shorter. */
const textMax = 2048;
/** Longest list of networks, causes or decisions. */
const namesMax = 10_000;
/** Longest list of attachments. */
export const attachmentsMax = 5000;
/** Longest list of other things. */
const listMax = 1000;
/** Longest list of failures. */
export const failuresMax = listMax;
const bucketsMax = 200;

const text = v.pipe(
  v.string(),
  v.transform((value) => value.slice(0, textMax)),
);
const count = v.pipe(v.number(), v.safeInteger(), v.minValue(0));
const time = v.pipe(
  v.string(),
  v.isoTimestamp(),
  v.check((value) => value.endsWith("Z") && !Number.isNaN(Date.parse(value)), "a time in UTC"),
);
const list = <const S extends v.GenericSchema>(item: S, max = listMax) =>
  v.pipe(v.array(item), v.maxLength(max));
/** The entries of an object that are texts. */
const texts = <K extends string>(...keys: K[]) => v.entriesFromList(keys, text);

/** Durations in µs; percentiles by nearest rank, null where there are none. */
const LatencySchema = v.pipe(
  v.object({
    count,
    ...v.entriesFromList(["p50Us", "p95Us", "p99Us"], v.nullable(count)),
    /** How many fall into each span between two of {@link latencyEdgesUs}. */
    histogram: v.pipe(v.array(count), v.length(latencyEdgesUs.length + 1)),
  }),
  v.check(
    ({ count: all, histogram }) => histogram.reduce((sum, one) => sum + one, 0) === all,
    "a histogram that adds up to its count",
  ),
);
const counts = {
  requests: count,
  /** All that did not succeed, denied ones too. */
  failures: count,
  denied: count,
  /** How long the ADDs that succeeded took. */
  add: LatencySchema,
};

const RequestSchema = v.object({
  /** When the call of genie began. */
  at: time,
  id: count,
  kind: v.picklist(["call", "network", "plugin"]),
  ...texts("command", "containerId", "podNamespace", "podName", "podUid"),
  ...texts("network", "plugin", "ifName"),
  durationUs: count,
  outcome: v.picklist(["ok", "failed", "denied"]),
  code: v.number(),
  ...texts("error", "addresses", "configHash", "decidedBy", "rule"),
});

const AttachmentSchema = v.object({
  ...texts("containerId", "namespace", "pod", "podUid", "network", "interface"),
  /** Plugin types of its chain, in order. */
  plugins: list(text),
  /** With prefix length, as its result says. */
  addresses: list(text),
  /** Hardware address; "" where its result has none, or an older genie does not say. */
  mac: v.optional(text, ""),
  /** The state is `planned`, `attached`, `failing` or `leaked`; the reason says why it exists. */
  ...texts("state", "reason", "error"),
  createdAt: v.nullable(time),
  /** When its first DEL failed; null when none did. */
  failingSince: v.nullable(time),
  /** When the network policies of its pod were put in force; null where none are. */
  policySince: v.optional(v.nullable(time), null),
});

const AddressSchema = v.object({
  /** Those of the attachments that exist now. */
  used: count,
  /** How many the network has; null where its config does not tell. */
  total: v.nullable(count),
});

const NetworkSchema = v.object({
  network: text,
  ...counts,
  addresses: v.object({ ipv4: AddressSchema, ipv6: AddressSchema }),
  /** Both directions; null where it was not measured. */
  bytesPerSecond: v.nullable(v.pipe(v.number(), v.minValue(0))),
  /** Attachments that exist now, whatever their state. */
  attachments: count,
  /**
   * Attachments at the end of each bucket of `timeline`: those of now, counted back by the ADDs and
   * DELs of the ledger. Absent where no total of its addresses is known, or a filter hides some.
   */
  held: v.exactOptional(list(count, bucketsMax)),
});

/** Failures that are the same but for their time: retries of one pod are one of these. */
const FailureSchema = v.object({
  ...texts("namespace", "pod", "podUid", "command", "network"),
  code: v.number(),
  denied: v.boolean(),
  requests: count,
  /** Time of the first and of the last one. */
  first: time,
  last: time,
  /** Message and rule of the last one. */
  ...texts("error", "rule"),
});

const CauseSchema = v.object({
  /** CNI error code: of the specification, genie's own, or the plugin's. */
  code: v.number(),
  /** In words, as in `delegate timeout`. */
  cause: text,
  denied: v.boolean(),
  requests: count,
  /** At most 16 networks, the one with the most failures first. */
  networks: list(v.object({ network: text, requests: count })),
  /** Time, message and rule of the newest one. An older genie does not say when. */
  at: v.optional(v.nullable(time), null),
  ...texts("error", "rule"),
});

const PolicySchema = v.object({
  /** When all inputs were last known, see `policy.max_age`; null when they never were. */
  knownAt: v.nullable(time),
  /** Network namespaces with rules. */
  enforced: count,
  /** The newest first. */
  rulesets: list(v.object({ at: v.nullable(time), ...texts("namespace", "pod") })),
  /** What is wrong with policies, the newest first; the rest of them is in force. */
  problems: list(
    v.object({ at: v.nullable(time), ...texts("kind", "namespace", "name", "path", "problem") }),
  ),
});

/** What is read of a node's report. */
const NodeSchema = v.object({
  version: v.literal(1),
  /** The version of genie that made this. */
  genie: v.optional(text, ""),
  generatedAt: time,
  /** What the reader should know: the record is absent, old, was set aside ... */
  notices: list(text),
  /** The span of `timeline`; null when the ledger is empty. */
  from: v.nullable(time),
  to: v.nullable(time),
  totals: v.object({
    ...counts,
    /** Pods with requests, and those of which one or more failed; an older genie counts none. */
    pods: v.optional(count, 0),
    failedPods: v.optional(count, 0),
    attachments: count,
    failing: count,
    leaked: count,
  }),
  /** Those with requests or attachments, by name. */
  networks: list(NetworkSchema, namesMax),
  /** Attachments whose DEL failed: `failing` is retried by the runtime, `leaked` by `genie gc`. */
  stuck: list(AttachmentSchema),
  /** Those that exist now, the newest {@link attachmentsMax}; an older genie has no such list. */
  attachments: v.optional(list(AttachmentSchema, attachmentsMax), () => []),
  /** `failed` is without `denied`. */
  timeline: v.object({
    bucketMs: count,
    buckets: list(v.object({ at: time, ok: count, failed: count, denied: count }), bucketsMax),
  }),
  /** Edges of every `histogram`: spans are 0 to the first, ..., the last to infinity. */
  latencyEdgesUs: v.pipe(
    v.array(v.number()),
    v.check((edges) => String(edges) === String(latencyEdgesUs), "the spans of this genie"),
    v.readonly(),
  ),
  causes: list(CauseSchema, namesMax),
  /** The newest first, at most {@link failuresMax}; an older genie has no such list. */
  failures: v.optional(list(FailureSchema), () => []),
  /** Why ADDs use a network: annotation, default, choice ... */
  decisions: list(v.object({ ...texts("network", "decidedBy"), requests: count }), namesMax),
  /** The newest requests, at most `--limit`. */
  requests: list(RequestSchema),
  /** The newest that did not succeed, at most `--limit`; an older genie has no such list. */
  failed: v.optional(list(RequestSchema)),
  /** Absent where none was ever enforced. */
  policy: v.exactOptional(PolicySchema),
});

/** Its node; only in a report of many. */
type OfNode = { node?: string };

/** How long requests took. */
export type Latency = v.InferOutput<typeof LatencySchema>;
/** One request, or one row of a pod's. */
export type RequestReport = v.InferOutput<typeof RequestSchema> & OfNode;
/** An attachment that exists now. */
export type AttachmentReport = v.InferOutput<typeof AttachmentSchema> & OfNode;
/** Addresses of one family. */
export type AddressReport = v.InferOutput<typeof AddressSchema>;
/** One network. */
export type NetworkReport = v.InferOutput<typeof NetworkSchema>;
/** How many requests, and how many of them did not succeed. */
export type Counts = Pick<NetworkReport, "requests" | "failures" | "denied">;
/** Failures of one code. */
export type CauseReport = v.InferOutput<typeof CauseSchema> & OfNode;
/** Failures of one pod that are the same. */
export type FailureReport = v.InferOutput<typeof FailureSchema> & OfNode;
/** Network policy on this node. */
export type PolicyReport = v.InferOutput<typeof PolicySchema>;
/** The report of another node, parsed. */
export type ParsedReport = v.InferOutput<typeof NodeSchema> & { failed: RequestReport[] };

/** What every report begins with. */
export interface ReportHead
  extends Pick<ParsedReport, "version" | "genie" | "generatedAt" | "notices"> {
  /** The node; "" in a report of many. */
  node: string;
  /** Path of the record; in a report of many nodes, who was asked. */
  record: string;
  /** Records that could not be used and were set aside, newest first. */
  setAside: { file: string; at: string | null }[];
}

/** One automatic choice. */
export interface ChoiceReport {
  at: string;
  namespace: string;
  pod: string;
  /** The network that was chosen. */
  network: string;
  outcome: string;
  /** Its numbers as they were recorded, see `select.ts`; a text where they cannot be read. */
  choice: unknown;
}

/** The default view: `genie report --json`. */
export interface Report extends ReportHead, Omit<ParsedReport, keyof ReportHead> {
  /** What was asked for; null does not limit. It limits the requests; attachments are of now. */
  filter: Record<"since" | "network" | "namespace" | "pod" | "command", string | null> & {
    only: "failed" | "denied" | null;
  };
  stuck: AttachmentReport[];
  attachments: AttachmentReport[];
  causes: CauseReport[];
  failures: FailureReport[];
  /** The newest automatic choices, at most `--limit`. */
  choices: ChoiceReport[];
  requests: RequestReport[];
  failed: RequestReport[];
}

/** One node, as it stands in the report of many. */
export interface NodeReport {
  node: string;
  /** Why it is not in this report; "" when it is, and then the rest is known. */
  error: string;
  /** Its version of genie; "" where it did not say. */
  genie: string;
  generatedAt: string | null;
  notices: string[];
  totals: Omit<Report["totals"], "add"> & { add: Omit<Latency, "histogram"> };
  /** Addresses in use, of each family. */
  addresses: { ipv4: number; ipv6: number };
}

/**
 * Many nodes: `genie report --cluster --json`. Counts and histograms are sums; percentiles are read
 * off the summed histogram: the upper edge of their span, or the largest of the nodes' own where
 * that is less. A total of addresses is null when a node does not know its own. Choices are left
 * out.
 */
export interface ClusterReport extends Report {
  /** By name. */
  nodes: NodeReport[];
}

/** One pod: `genie report NAMESPACE/POD --json`. */
export interface PodReport extends ReportHead {
  pod: { namespace: string; name: string };
  /** What it has now. */
  attachments: AttachmentReport[];
  /** The newest rows of every kind, at most `--limit`: calls, networks and requests to plugins. */
  requests: RequestReport[];
  choices: ChoiceReport[];
  /** Network policies in force on it; absent where none are. */
  rulesets?: RulesetReport[];
}

/** The rules of one network namespace, and when they were written. */
export type RulesetReport = PolicyReport["rulesets"][number] & {
  /** Text for `nft -f` in the namespace itself; "" where there is none. */
  ruleset: string;
  /** The same in the node's namespace, for the host ends of its interfaces. */
  hostRuleset: string;
};

/**
 * Reads the report of a node.
 * @returns it, or in words why it cannot be used
 */
export function parseReport(document: unknown): ParsedReport | string {
  const { version, genie } = (document ?? {}) as { version?: unknown; genie?: unknown };
  const parsed = v.safeParse(NodeSchema, document);
  if (parsed.success) {
    const { failed, ...report } = parsed.output;
    return { ...report, failed: failed ?? report.requests.filter((one) => one.outcome !== "ok") };
  }
  const by = typeof genie === "string" && genie !== "" ? ` by genie ${genie.slice(0, 40)}` : "";
  if (typeof version === "number" && version !== 1) {
    return `its report${by} is of version ${version}, only 1 is known here: ask with its genie`;
  }
  const [{ expected, message, type }] = parsed.issues;
  const wanted = type === "check" ? message : expected;
  const path = v.getDotPath(parsed.issues[0]);
  return `what it answers${by} is no report: expected ${wanted}${path ? ` at "${path}"` : ""}`;
}
