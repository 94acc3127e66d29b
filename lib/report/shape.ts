/**
 * The documents of `genie report --json`. They are stable: `version` counts breaking changes, keys
 * may be added. All times are ISO 8601 in UTC.
 */
import type { LiveAttachment } from "./live.ts";
import type { NumberedRow } from "./rows.ts";
import type { Latency } from "./tally.ts";

/** Of which node it is; only in a report of many. */
interface OfNode {
  node?: string;
}

/** One request, or one row of a pod's: texts are "" and numbers 0 where there is nothing to say. */
export interface RequestReport extends Omit<NumberedRow, "atMs" | "choice">, OfNode {
  /** When it began, ISO 8601 in UTC. */
  at: string;
}

/** One network. */
export interface NetworkReport {
  network: string;
  requests: number;
  /** All that did not succeed, denied ones too. */
  failures: number;
  denied: number;
  /** How long the ADDs that succeeded took; its `histogram` is along `latencyEdgesUs`. */
  add: Latency;
  addresses: { ipv4: AddressReport; ipv6: AddressReport };
  /** Both directions; null where it was not measured. */
  bytesPerSecond: number | null;
  /** Attachments that exist now, whatever their state. */
  attachments: number;
}

/** Addresses of one family. */
export interface AddressReport {
  /** Those of the attachments that exist now. */
  used: number;
  /** How many the network has; null where its config does not tell. */
  total: number | null;
}

/** An attachment that exists now. */
export interface AttachmentReport
  extends Omit<LiveAttachment, "createdAtMs" | "failedAtMs" | "ifName">,
    OfNode {
  interface: string;
  createdAt: string | null;
  /** When its first DEL failed; null when none did. */
  failingSince: string | null;
}

/** Failures of one code. */
export interface CauseReport extends OfNode {
  /** CNI error code: of the specification, genie's own, or the plugin's. */
  code: number;
  /** In words, as in `delegate timeout`. */
  cause: string;
  denied: boolean;
  requests: number;
  /** At most 16 networks, the one with the most failures first. */
  networks: { network: string; requests: number }[];
  /** Time, message and rule of the newest one. */
  at: string | null;
  error: string;
  rule: string;
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

/** What every report begins with. */
export interface ReportHead {
  version: 1;
  /** The version of genie that made this. */
  genie: string;
  generatedAt: string;
  /** Path of the record; in a report of many nodes, who was asked. */
  record: string;
  /** What whoever reads this should know: the record is absent, old, was set aside ... */
  notices: string[];
  /** Records that could not be used and were set aside, newest first. */
  setAside: { file: string; at: string | null }[];
}

/** Rules of one network namespace. */
export interface RulesetReport {
  /** When it was written. */
  at: string | null;
  namespace: string;
  pod: string;
  /** Text for `nft -f` in the namespace itself; "" where there is none. */
  ruleset: string;
  /** The same in the node's, for the ends of its interfaces there. */
  hostRuleset: string;
}

/** Network policy on this node. */
export interface PolicyReport {
  /** When all inputs were last known, see `policy.max_age`; null when they never were. */
  knownAt: string | null;
  /** Network namespaces with rules. */
  enforced: number;
  /** The newest first. */
  rulesets: Omit<RulesetReport, "ruleset" | "hostRuleset">[];
  /** What is wrong with policies, the newest first; the rest of them is in force. */
  problems: {
    at: string | null;
    kind: string;
    namespace: string;
    name: string;
    path: string;
    problem: string;
  }[];
}

/** The default view: `genie report --json`. All times are ISO 8601 in UTC. */
export interface Report extends ReportHead {
  /** What was asked for; null does not limit. It limits the requests; attachments are of now. */
  filter: {
    since: string | null;
    network: string | null;
    namespace: string | null;
    pod: string | null;
    command: string | null;
    only: "failed" | "denied" | null;
  };
  /** The span of `timeline`; null when the ledger is empty. */
  from: string | null;
  to: string | null;
  totals: {
    requests: number;
    failures: number;
    denied: number;
    add: Latency;
    attachments: number;
    failing: number;
    leaked: number;
  };
  /** Those with requests or attachments, by name. */
  networks: NetworkReport[];
  /** Attachments whose DEL failed: `failing` is retried by the runtime, `leaked` by `genie gc`. */
  stuck: AttachmentReport[];
  timeline: {
    bucketMs: number;
    /** `failed` is without `denied`. */
    buckets: { at: string; ok: number; failed: number; denied: number }[];
  };
  /** Edges of every `histogram`: spans are 0 to the first, ..., the last to infinity. */
  latencyEdgesUs: readonly number[];
  causes: CauseReport[];
  /** Who decided that an ADD uses a network: annotation, default, choice ... */
  decisions: { network: string; decidedBy: string; requests: number }[];
  /** The newest automatic choices, at most `--limit`. */
  choices: ChoiceReport[];
  /** The newest requests, at most `--limit`. */
  requests: RequestReport[];
  /** The newest of them that did not succeed, at most `--limit`. */
  failed: RequestReport[];
  /** Absent where none was ever enforced. */
  policy?: PolicyReport;
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

/** One pod: `genie report pod NAMESPACE/NAME --json`. */
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
