/**
 * `genie report`: what the record says of requests, networks and attachments, as plain data. The
 * shapes are stable, `version` counts their breaking changes; keys may be added. Only reads.
 */
import { code, type Host } from "./cni.ts";
import { isoTime } from "./quantity.ts";
import {
  type RecordReader,
  readRecord,
  recordFile,
  type SetAside,
  setAsideRecords,
} from "./report_file.ts";
import {
  addLoad,
  type LiveAttachment,
  liveAttachments,
  type NetworkLoad,
  traffic,
} from "./report_live.ts";
import {
  type LedgerFilter,
  ledgerRows,
  ledgerSpan,
  type NumberedRow,
  requests,
  rowsById,
} from "./report_rows.ts";
import { type Latency, latencyEdgesUs, type Tally, tally } from "./report_tally.ts";

/** One request, or one row of a pod's: texts are "" and numbers 0 where there is nothing to say. */
export interface RequestReport extends Omit<NumberedRow, "atMs" | "choice"> {
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
  addresses: AddressReport;
  /** Both directions; null where it was not measured. */
  bytesPerSecond: number | null;
  /** Attachments that exist now, whatever their state. */
  attachments: number;
}

/** Addresses of the attachments that exist now. */
export interface AddressReport {
  ipv4: number;
  ipv6: number;
  /** The larger of the two: what counts against `total`. */
  used: number;
  /** How many the network has; null where nobody said. */
  total: number | null;
}

/** An attachment that exists now. */
export interface AttachmentReport
  extends Omit<LiveAttachment, "createdAtMs" | "failedAtMs" | "ifName"> {
  interface: string;
  createdAt: string | null;
  /** When its first DEL failed; null when none did. */
  failingSince: string | null;
}

/** Failures of one code. */
export interface CauseReport {
  /** CNI error code: of the specification, genie's own, or the plugin's. */
  code: number;
  /** In words, as in `delegate timeout`. */
  cause: string;
  denied: boolean;
  requests: number;
  /** At most 16 networks, the one with the most failures first. */
  networks: { network: string; requests: number }[];
  /** Message and rule of the newest one. */
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
  generatedAt: string;
  /** Path of the record. */
  record: string;
  /** What whoever reads this should know: the record is absent, old, was set aside ... */
  notices: string[];
  /** Records that could not be used and were set aside, newest first. */
  setAside: { file: string; at: string | null }[];
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
}

/** One pod: `genie report pod NAMESPACE/NAME --json`. */
export interface PodReport extends ReportHead {
  pod: { namespace: string; name: string };
  /** What it has now. */
  attachments: AttachmentReport[];
  /** The newest rows of every kind, at most `--limit`: calls, networks and requests to plugins. */
  requests: RequestReport[];
  choices: ChoiceReport[];
}

/** Where the record is, and what the configuration adds to it. */
export interface ReportSource {
  stateDir: string;
  /** How many addresses a network has, by name. */
  capacities: ReadonlyMap<string, number>;
  /** Notices of the caller. */
  notices: string[];
}

/** Attachments listed as stuck; all of them are counted. */
const stuckMax = 1000;

/**
 * Makes the default view. No record gives an empty one.
 *
 * @param limit how many of the newest requests and choices to list
 * @throws CniError as `readRecord()`
 */
export function makeReport(
  host: Host,
  source: ReportSource,
  { filter, limit }: { filter: LedgerFilter; limit: number },
): Report {
  const view = readRecord(source.stateDir, (record) => {
    const span = ledgerSpan(record);
    const live = readLive(record, filter);
    const to = span ? Math.max(span.lastMs, filter.sinceMs === undefined ? 0 : host.now()) : 0;
    const fromMs = Math.min(to, filter.sinceMs ?? span?.firstMs ?? 0);
    const counted = tally(requests(record, filter), { fromMs, toMs: to, limit });
    return {
      tables: record.tables,
      span: span ? { fromMs, toMs: to } : undefined,
      live,
      counted,
      bytesPerSecond: traffic(record),
      newest: rowsById(record, counted.newestIds),
      choices: rowsById(record, counted.choiceIds),
      examples: rowsById(
        record,
        counted.causes.map(({ newestId }) => newestId),
      ),
    };
  });
  const counted = view?.counted ?? tally([], { fromMs: 0, toMs: 0, limit: 0 });
  const { requests: all, failures, denied, add } = counted;
  return {
    ...head(host, source, view?.tables),
    filter: shownFilter(filter),
    from: isoTime(view?.span?.fromMs ?? 0),
    to: isoTime(view?.span?.toMs ?? 0),
    totals: { requests: all, failures, denied, add, ...(view?.live.totals ?? noLive.totals) },
    networks: networksOf(counted, view?.live.loads ?? new Map(), source, view?.bytesPerSecond),
    stuck: view?.live.stuck ?? [],
    timeline: {
      bucketMs: counted.bucketMs,
      buckets: view?.span
        ? counted.timeline.map(({ atMs, ...rest }) => ({ at: iso(atMs), ...rest }))
        : [],
    },
    latencyEdgesUs,
    causes: causesOf(counted, view?.examples ?? []),
    decisions: [...counted.networks].flatMap(([network, { decidedBy }]) =>
      [...decidedBy].map(([by, requests]) => ({ network, decidedBy: by, requests })),
    ),
    choices: (view?.choices ?? []).map(choiceReport),
    requests: (view?.newest ?? []).map(requestReport),
  };
}

/**
 * Makes the view of one pod.
 *
 * @throws CniError as `readRecord()`
 */
export function makePodReport(
  host: Host,
  source: ReportSource,
  pod: { namespace: string; name: string },
  { filter, limit }: { filter: LedgerFilter; limit: number },
): PodReport {
  const own = { ...filter, namespace: pod.namespace, pod: pod.name };
  const view = readRecord(source.stateDir, (record) => ({
    tables: record.tables,
    attachments: [...liveAttachments(record, own)],
    rows: [...ledgerRows(record, own, limit)],
  }));
  const rows = view?.rows ?? [];
  return {
    ...head(host, source, view?.tables),
    pod,
    attachments: (view?.attachments ?? []).map(attachmentReport),
    requests: rows.map(requestReport),
    choices: rows
      .filter(({ kind, choice }) => kind === "network" && choice !== "")
      .map(choiceReport),
  };
}

const iso = (ms: number): string => isoTime(ms) ?? "";

function head(
  host: Host,
  { stateDir, notices }: ReportSource,
  tables: ReadonlySet<string> | undefined,
): ReportHead {
  const record = recordFile(stateDir);
  const aside = setAsideRecords(stateDir);
  const all = [...notices];
  if (!tables) all.push(`No record yet: ${record} is absent or empty, no pod was attached here`);
  else if (!tables.has("ledger")) {
    all.push(`${record} has no ledger: it was last written by a genie that keeps none`);
  }
  for (const one of aside) all.push(asideNotice(one));
  return {
    version: 1,
    generatedAt: iso(host.now()),
    record,
    notices: all,
    setAside: aside.map(({ file, atMs }) => ({ file, at: isoTime(atMs) })),
  };
}

function asideNotice({ file, atMs }: SetAside): string {
  const at = isoTime(atMs);
  return `An unusable record was set aside${at ? ` at ${at}` : ""}: its requests and attachments are not in this report, they are in ${file}`;
}

function shownFilter(filter: LedgerFilter): Report["filter"] {
  return {
    since: filter.sinceMs === undefined ? null : iso(filter.sinceMs),
    network: filter.network ?? null,
    namespace: filter.namespace ?? null,
    pod: filter.pod ?? null,
    command: filter.command ?? null,
    only: filter.only ?? null,
  };
}

interface Live {
  loads: Map<string, NetworkLoad>;
  stuck: AttachmentReport[];
  totals: { attachments: number; failing: number; leaked: number };
}

const noLive: Live = {
  loads: new Map(),
  stuck: [],
  totals: { attachments: 0, failing: 0, leaked: 0 },
};

function readLive(record: RecordReader, filter: LedgerFilter): Live {
  const { totals, loads, stuck }: Live = structuredClone(noLive);
  for (const one of liveAttachments(record, filter)) {
    addLoad(loads, one);
    totals.attachments++;
    if (one.state !== "failing" && one.state !== "leaked") continue;
    totals[one.state]++;
    if (stuck.length < stuckMax) stuck.push(attachmentReport(one));
  }
  return { totals, loads, stuck };
}

function networksOf(
  counted: Tally,
  loads: Map<string, NetworkLoad>,
  { capacities }: ReportSource,
  bytesPerSecond: Map<string, number> = new Map(),
): NetworkReport[] {
  const none = tally([], { fromMs: 0, toMs: 0, limit: 0 });
  const names = new Set([...counted.networks.keys(), ...loads.keys()]);
  return [...names].sort().map((network) => {
    const { requests, failures, denied, add } = counted.networks.get(network) ?? none;
    const { attachments, ipv4, ipv6 } = loads.get(network) ?? { attachments: 0, ipv4: 0, ipv6: 0 };
    return {
      ...{ network, requests, failures, denied, add },
      addresses: { ipv4, ipv6, used: Math.max(ipv4, ipv6), total: capacities.get(network) ?? null },
      bytesPerSecond: bytesPerSecond.get(network) ?? null,
      attachments,
    };
  });
}

/** `delegateTimeout` of the table of codes as words. */
const causeNames = new Map<number, string>(
  Object.entries(code).map(([name, number]) => [
    number,
    name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`),
  ]),
);

function causesOf({ causes }: Tally, examples: NumberedRow[]): CauseReport[] {
  return causes.map(({ code: number, denied, requests, newestId, networks }) => {
    const example = examples.find(({ id }) => id === newestId);
    return {
      code: number,
      cause: denied ? "access denied" : (causeNames.get(number) ?? `plugin error ${number}`),
      denied,
      requests,
      networks: [...networks]
        .map(([network, count]) => ({ network, requests: count }))
        .sort((a, b) => b.requests - a.requests),
      error: example?.error ?? "",
      rule: example?.rule ?? "",
    };
  });
}

function requestReport({ atMs, choice: _, ...row }: NumberedRow): RequestReport {
  return { at: iso(atMs), ...row };
}

function attachmentReport(one: LiveAttachment): AttachmentReport {
  const { createdAtMs, failedAtMs, ifName, ...rest } = one;
  return {
    ...rest,
    interface: ifName,
    createdAt: isoTime(createdAtMs),
    failingSince: isoTime(failedAtMs),
  };
}

function choiceReport(row: NumberedRow): ChoiceReport {
  const { podNamespace: namespace, podName: pod, network, outcome } = row;
  let choice: unknown = row.choice;
  try {
    choice = JSON.parse(row.choice);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  return { at: iso(row.atMs), namespace, pod, network, outcome, choice };
}
