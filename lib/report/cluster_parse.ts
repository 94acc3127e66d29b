/**
 * The report of another node, which is hostile until parsed: every number is one, every list and
 * text has its limit, and what this genie does not know is left out. Pure.
 */
import * as v from "valibot";
import type { Report } from "./shape.ts";
import { latencyEdgesUs } from "./tally.ts";

/** What is read of a node's report. */
export type ParsedReport = Omit<Report, "choices" | "filter" | "record" | "setAside">;

/** Longest text kept, in characters; what a node says of one failure is shorter. */
const textMax = 2048;
/** Longest list of names that a node may give: networks, causes, deciders. */
const namesMax = 10_000;
/** Longest list of what happened. */
const listMax = 1000;
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

const Latency = v.pipe(
  v.object({
    count,
    p50Us: v.nullable(count),
    p95Us: v.nullable(count),
    p99Us: v.nullable(count),
    histogram: v.pipe(v.array(count), v.length(latencyEdgesUs.length + 1)),
  }),
  v.check(
    ({ count: all, histogram }) => histogram.reduce((sum, one) => sum + one, 0) === all,
    "a histogram that adds up to its count",
  ),
);
const counts = { requests: count, failures: count, denied: count, add: Latency };

const Request = v.object({
  at: time,
  ...{ id: count, kind: v.picklist(["call", "network", "plugin"]), command: text },
  ...{ containerId: text, podNamespace: text, podName: text, podUid: text },
  ...{ network: text, plugin: text, ifName: text, durationUs: count },
  ...{ outcome: v.picklist(["ok", "failed", "denied"]), code: v.number(), error: text },
  ...{ addresses: text, configHash: text, decidedBy: text, rule: text },
});
const Attachment = v.object({
  ...{ containerId: text, namespace: text, pod: text, podUid: text, network: text },
  ...{ interface: text, plugins: list(text), addresses: list(text), state: text, reason: text },
  ...{ error: text, createdAt: v.nullable(time), failingSince: v.nullable(time) },
});
const Addresses = v.object({ used: count, total: v.nullable(count) });
const Network = v.object({
  network: text,
  ...counts,
  addresses: v.object({ ipv4: Addresses, ipv6: Addresses }),
  bytesPerSecond: v.nullable(v.pipe(v.number(), v.minValue(0))),
  attachments: count,
});
const Cause = v.object({
  ...{ code: v.number(), cause: text, denied: v.boolean(), requests: count },
  networks: list(v.object({ network: text, requests: count })),
  // An older genie does not say when.
  ...{ at: v.optional(v.nullable(time), null), error: text, rule: text },
});
const Policy = v.object({
  knownAt: v.nullable(time),
  enforced: count,
  rulesets: list(v.object({ at: v.nullable(time), namespace: text, pod: text })),
  problems: list(
    v.object({
      at: v.nullable(time),
      ...{ kind: text, namespace: text, name: text, path: text, problem: text },
    }),
  ),
});

const Node = v.object({
  version: v.literal(1),
  genie: v.optional(text, ""),
  generatedAt: time,
  notices: list(text),
  from: v.nullable(time),
  to: v.nullable(time),
  totals: v.object({ ...counts, attachments: count, failing: count, leaked: count }),
  networks: list(Network, namesMax),
  stuck: list(Attachment),
  timeline: v.object({
    bucketMs: count,
    buckets: list(v.object({ at: time, ok: count, failed: count, denied: count }), bucketsMax),
  }),
  latencyEdgesUs: v.pipe(
    v.array(v.number()),
    v.check((edges) => String(edges) === String(latencyEdgesUs), "the spans of this genie"),
  ),
  causes: list(Cause, namesMax),
  decisions: list(v.object({ network: text, decidedBy: text, requests: count }), namesMax),
  requests: list(Request),
  failed: v.optional(list(Request)),
  policy: v.exactOptional(Policy),
});

/**
 * Reads the report of a node.
 * @returns it, or in words why it cannot be used
 */
export function parseReport(document: unknown): ParsedReport | string {
  const { version, genie } = (document ?? {}) as { version?: unknown; genie?: unknown };
  const parsed = v.safeParse(Node, document);
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
