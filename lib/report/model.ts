/** `genie report`: what the record says of requests, networks and attachments. Only reads. */
import manifest from "../../package.json";
import { CniError, code, type Host } from "../cni.ts";
import { isoTime } from "../config/quantity.ts";
import { isObject, parseJson } from "../json.ts";
import {
  type RecordReader,
  readRecord,
  recordFile,
  type SetAside,
  setAsideRecords,
} from "./file.ts";
import {
  addLoad,
  type LiveAttachment,
  liveAttachments,
  type NetworkLoad,
  traffic,
} from "./live.ts";
import { readPodRulesets, readPolicy } from "./policy.ts";
import {
  type LedgerFilter,
  ledgerRows,
  ledgerSpan,
  type NumberedRow,
  requests,
  rowsById,
} from "./rows.ts";
import type {
  AttachmentReport,
  CauseReport,
  ChoiceReport,
  NetworkReport,
  PodReport,
  Report,
  ReportHead,
  RequestReport,
} from "./shape.ts";
import { latencyEdgesUs, type Tally, tally } from "./tally.ts";

/** Where the record is, and what the configuration adds to it. */
export interface ReportSource {
  stateDir: string;
  /** How many addresses of each family a network has, by name; absent where nobody tells. */
  totals: ReadonlyMap<string, { ipv4?: number; ipv6?: number }>;
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
      policy: readPolicy(record),
      newest: rowsById(record, counted.newestIds),
      failed: rowsById(record, counted.failedIds),
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
    decisions: decisionsOf(counted),
    choices: choicesOf(view?.choices ?? []).slice(0, limit),
    requests: (view?.newest ?? []).map(requestReport),
    failed: (view?.failed ?? []).map(requestReport),
    ...(view?.policy && { policy: view.policy }),
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
    rulesets: readPodRulesets(record, pod),
  }));
  const rows = view?.rows ?? [];
  return {
    ...head(host, source, view?.tables),
    pod,
    attachments: (view?.attachments ?? []).map(attachmentReport),
    requests: rows.map(requestReport),
    choices: choicesOf(rows),
    ...(view && view.rulesets.length > 0 && { rulesets: view.rulesets }),
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
    genie: manifest.version,
    generatedAt: iso(host.now()),
    record,
    notices: all,
    setAside: aside.map(({ file, atMs }) => ({ file, at: isoTime(atMs) })),
  };
}

function asideNotice({ file, atMs }: SetAside): string {
  const at = isoTime(atMs);
  return (
    `An unusable record was set aside${at ? ` at ${at}` : ""}: its requests and attachments are ` +
    `not in this report, they are in ${file}`
  );
}

/** What was asked for, as a report says it. */
export function shownFilter(filter: LedgerFilter): Report["filter"] {
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
    // Planned, with an error: a running pod lost it, and genie repair did not bring it back.
    const isBroken = one.state === "planned" && one.error !== "";
    if (one.state === "failing" || one.state === "leaked") totals[one.state]++;
    else if (!isBroken) continue;
    if (stuck.length < stuckMax) stuck.push(attachmentReport(one));
  }
  return { totals, loads, stuck };
}

function networksOf(
  counted: Tally,
  loads: Map<string, NetworkLoad>,
  { totals }: ReportSource,
  bytesPerSecond: Map<string, number> = new Map(),
): NetworkReport[] {
  const none = tally([], { fromMs: 0, toMs: 0, limit: 0 });
  const names = new Set([...counted.networks.keys(), ...loads.keys()]);
  return [...names].sort().map((network) => {
    const { requests, failures, denied, add } = counted.networks.get(network) ?? none;
    const { attachments, ipv4, ipv6 } = loads.get(network) ?? { attachments: 0, ipv4: 0, ipv6: 0 };
    return {
      ...{ network, requests, failures, denied, add },
      addresses: {
        ipv4: { used: ipv4, total: totals.get(network)?.ipv4 ?? null },
        ipv6: { used: ipv6, total: totals.get(network)?.ipv6 ?? null },
      },
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
      at: isoTime(example?.atMs ?? 0),
      error: example?.error ?? "",
      rule: example?.rule ?? "",
    };
  });
}

/** By network, of each the most frequent first. */
function decisionsOf({ networks }: Tally): Report["decisions"] {
  return [...networks.keys()].sort().flatMap((network) => {
    const deciders = [...(networks.get(network)?.decidedBy ?? [])].sort((a, b) => b[1] - a[1]);
    return deciders.map(([decidedBy, requests]) => ({ network, decidedBy, requests }));
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

/** The choices among rows; one that stands in the rows of a call and of its network is one. */
function choicesOf(rows: NumberedRow[]): ChoiceReport[] {
  const calls = new Map<string, NumberedRow>();
  for (const row of rows) {
    if (row.choice !== "") calls.set(`${row.containerId} ${row.atMs} ${row.choice}`, row);
  }
  return [...calls.values()].map(choiceReport);
}

function choiceReport(row: NumberedRow): ChoiceReport {
  const { podNamespace: namespace, podName: pod, outcome } = row;
  let choice: unknown = row.choice;
  try {
    choice = parseJson(row.choice, "recorded choice");
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
  }
  const named = isObject(choice) ? choice["network"] : undefined;
  const network = typeof named === "string" ? named : row.network;
  return { at: iso(row.atMs), namespace, pod, network, outcome, choice };
}
