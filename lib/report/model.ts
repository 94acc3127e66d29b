/** Makes the documents of a report from the record. Only reads. */
import manifest from "../../package.json";
import type { Host } from "../call.ts";
import { code } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import { orUndefined } from "../recovery/tried.ts";
import { family } from "../result.ts";
import * as doc from "./document.ts";
import { isoTime } from "./quantity.ts";
import * as reader from "./record_reader.ts";
import { newestOf, type RequestTally, rankedNetworks, tally } from "./tally.ts";

/** Where the record is, and what the configuration adds to it. */
export interface ReportSource {
  stateDir: string;
  /** Name of the node, for documents. */
  node?: string;
  /** How many addresses of each family a network has, by name; absent where it is not known. */
  totals: ReadonlyMap<string, { ipv4?: number | undefined; ipv6?: number | undefined }>;
  /** Notices to begin with. */
  notices: string[];
}

/** Which requests are meant, and how many of the newest requests and choices are listed. */
export interface ReportLimits {
  filter: reader.LedgerFilter;
  limit: number;
}

/** Most attachments listed as stuck; all of them are counted. */
const stuckMax = 1000;

/**
 * Makes the default view. No record gives an empty one.
 * @throws CniError as `readRecord()`
 */
export function makeReport(host: Host, source: ReportSource, limits: ReportLimits): doc.Report {
  const { tables, view } = reader.readOrEmpty(source.stateDir, (record) => ({
    tables: record.tables,
    view: readReport(host, record, limits, source.totals),
  }));
  return { ...makeHead(host, source, tables), ...view };
}

function readReport(
  host: Host,
  record: reader.RecordReader,
  { filter, limit }: ReportLimits,
  addressTotals: ReportSource["totals"],
): Omit<doc.Report, keyof doc.ReportHead> {
  const span = reader.ledgerSpan(record);
  const toMs = span ? Math.max(span.lastMs, filter.sinceMs === undefined ? 0 : host.now()) : 0;
  const fromMs = Math.min(toMs, filter.sinceMs ?? span?.firstMs ?? 0);
  const counted = tally(reader.requests(record, filter), { fromMs, toMs, limit });
  const { stuck, loads, listed, ...live } = readLive(record, filter);
  const { requests: all, failures, denied, add } = counted;
  const policy = reader.readPolicy(record);
  return {
    filter: reportedFilter(filter),
    from: isoTime(fromMs),
    to: isoTime(toMs),
    totals: { requests: all, failures, denied, add, ...reader.countPods(record, filter), ...live },
    networks: networksOf(counted, loads, {
      addressTotals,
      traffic: reader.traffic(record),
      filter,
    }),
    stuck,
    attachments: listed,
    timeline: {
      bucketMs: counted.bucketMs,
      buckets: span
        ? counted.timeline.map(({ atMs, ...rest }) => ({ at: iso(atMs), ...rest }))
        : [],
    },
    latencyEdgesUs: doc.latencyEdgesUs,
    causes: causesOf(counted, record),
    failures: failuresOf(record, filter),
    decisions: decisionsOf(counted),
    choices: choicesOf(reader.rowsById(record, counted.choiceIds)).slice(0, limit),
    requests: reader.rowsById(record, counted.newestIds).map(requestReport),
    failed: reader.rowsById(record, counted.failedIds).map(requestReport),
    ...(policy && { policy }),
  };
}

/**
 * Makes the view of one pod.
 * @throws CniError as `readRecord()`
 */
export function makePodReport(
  host: Host,
  source: ReportSource,
  pod: { namespace: string; name: string },
  { filter, limit }: ReportLimits,
): doc.PodReport {
  const own = { ...filter, namespace: pod.namespace, pod: pod.name };
  const view = reader.readOrEmpty(source.stateDir, (record) => ({
    tables: record.tables,
    attachments: [...reader.liveAttachments(record, own)],
    rows: [...reader.ledgerRows(record, own, limit)],
    rulesets: reader.readRulesets(record, pod),
  }));
  const { tables, attachments, rows, rulesets } = view;
  return {
    ...makeHead(host, source, tables),
    pod,
    attachments,
    requests: rows.map(requestReport),
    choices: choicesOf(rows),
    ...(rulesets.length > 0 && { rulesets }),
  };
}

const iso = (ms: number): string => isoTime(ms) ?? "";

/** What every document begins with. @param tables of the record; none where it is absent */
export function makeHead(
  host: Host,
  { stateDir, node = "", notices }: ReportSource,
  tables: ReadonlySet<string>,
) {
  const record = reader.recordFile(stateDir);
  const aside = reader.setAsideRecords(stateDir);
  const all = [...notices];
  if (tables.size === 0) {
    all.push(`No record yet: ${record} is absent or empty, no pod was attached here`);
  } else if (!tables.has("ledger")) {
    all.push(`${record} has no ledger: it was last written by a genie that keeps none`);
  }
  return {
    version: 1 as const,
    genie: manifest.version,
    generatedAt: iso(host.now()),
    node,
    record,
    notices: [...all, ...aside.map(asideNotice)],
    setAside: aside.map(({ file, atMs }) => ({ file, at: isoTime(atMs) })),
  };
}

function asideNotice({ file, atMs }: reader.SetAside): string {
  const at = isoTime(atMs);
  const what = `An unusable record was set aside${at ? ` at ${at}` : ""}`;
  return `${what}: its requests and attachments are not in this report, they are in ${file}`;
}

/** A filter as the JSON of a report has it. */
export function reportedFilter(filter: reader.LedgerFilter): doc.Report["filter"] {
  const { network = null, namespace = null, pod = null, command = null, only = null } = filter;
  const since = filter.sinceMs === undefined ? null : iso(filter.sinceMs);
  return { since, network, namespace, pod, command, only };
}

/** What one network carries now: attachments, and addresses in use by family. */
type NetworkLoad = Record<"attachments" | "ipv4" | "ipv6", number>;
const noLoad: NetworkLoad = { attachments: 0, ipv4: 0, ipv6: 0 };

/** Lists the attachments of now, counts them also by network, and lists those that are stuck. */
function readLive(record: reader.RecordReader, filter: reader.LedgerFilter) {
  const live = { attachments: 0, failing: 0, leaked: 0 };
  const loads = new Map<string, NetworkLoad>();
  const stuck: doc.Report["stuck"] = [];
  const newest = newestOf<doc.AttachmentReport>(doc.attachmentsMax, (one) => one.createdAt ?? "");
  for (const one of reader.liveAttachments(record, filter)) {
    const load = loads.getOrInsert(one.network, { ...noLoad });
    load.attachments++;
    for (const address of new Set(one.addresses)) load[family(address) === 6 ? "ipv6" : "ipv4"]++;
    live.attachments++;
    newest.add(one);
    // Planned with an error: a running pod lost it, and genie repair could not bring it back.
    const isLost = one.state === "planned" && one.error !== "";
    if (one.state === "failing" || one.state === "leaked") live[one.state]++;
    else if (!isLost) continue;
    if (stuck.length < stuckMax) stuck.push(one);
  }
  return { ...live, loads, stuck, listed: newest.result() };
}

/** The networks with requests or attachments; the maps have what else is known, by name. */
function networksOf(
  counted: RequestTally,
  loads: ReadonlyMap<string, NetworkLoad>,
  more: {
    addressTotals: ReportSource["totals"];
    /** Bytes per second. */
    traffic: ReadonlyMap<string, number>;
    filter: reader.LedgerFilter;
  },
): doc.Report["networks"] {
  const { addressTotals, traffic, filter } = more;
  const { namespace, pod, command, only } = filter;
  const isWhole = [namespace, pod, command, only].every((one) => one === undefined);
  const nothing = tally([], { fromMs: 0, toMs: 0, limit: 0 });
  const names = new Set([...counted.networks.keys(), ...loads.keys()]);
  return [...names].sort().map((network) => {
    const one = counted.networks.get(network);
    const { requests, failures, denied, add } = one ?? nothing;
    const load = loads.get(network) ?? noLoad;
    const totals = addressTotals.get(network);
    const isSized = totals?.ipv4 !== undefined || totals?.ipv6 !== undefined;
    return {
      network,
      requests,
      failures,
      denied,
      add,
      addresses: {
        ipv4: { used: load.ipv4, total: totals?.ipv4 ?? null },
        ipv6: { used: load.ipv6, total: totals?.ipv6 ?? null },
      },
      bytesPerSecond: traffic.get(network) ?? null,
      attachments: load.attachments,
      ...(isWhole && isSized && { held: heldOf(load.attachments, counted.timeline, one?.changes) }),
    };
  });
}

/** Attachments at the end of each bucket of time, from those of now and the changes in each. */
function heldOf(now: number, { length }: { length: number }, changes: readonly number[] = []) {
  let held = now;
  const back = Array.from({ length }, (_, i) => {
    const before = held;
    held = Math.max(0, held - (changes[length - 1 - i] ?? 0));
    return before;
  });
  return back.reverse();
}

/** The name of an error code in words, as in `delegate timeout`. */
function causeName(number: number): string {
  const [name] = Object.entries(code).find(([, one]) => one === number) ?? [];
  const words = name?.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`);
  return words ?? `plugin error ${number}`;
}

function causesOf({ causes }: RequestTally, record: reader.RecordReader): doc.Report["causes"] {
  const ids = causes.map(({ newestId }) => newestId);
  const newest = new Map(reader.rowsById(record, ids).map((row) => [row.id, row]));
  return causes.map(({ code: number, denied, requests, newestId, networks }) => {
    const row = newest.get(newestId);
    return {
      code: number,
      cause: denied ? "access denied" : causeName(number),
      denied,
      requests,
      networks: rankedNetworks(networks),
      at: isoTime(row?.atMs ?? 0),
      error: row?.error ?? "",
      rule: row?.rule ?? "",
    };
  });
}

function failuresOf(record: reader.RecordReader, filter: reader.LedgerFilter) {
  const groups = reader.failureGroups(record, filter, doc.failuresMax);
  const rows = new Map(
    reader
      .rowsById(record, [...groups.keys()])
      .map((row): [number, reader.NumberedRow] => [row.id, row]),
  );
  return [...groups].flatMap(([newestId, { requests, firstMs }]): doc.FailureReport[] => {
    const row = rows.get(newestId);
    if (!row) return [];
    const { podNamespace, podName, podUid, command, code, error, rule } = row;
    return [
      {
        ...{ namespace: podNamespace, pod: podName, podUid, command },
        // The row of a call that failed before any network has the name of genie's own config.
        network: row.kind === "call" ? "" : row.network,
        ...{ code, denied: row.outcome === "denied", requests },
        ...{ first: iso(firstMs), last: iso(row.atMs), error, rule },
      },
    ];
  });
}

/** By network, the most frequent decider of each first. */
function decisionsOf({ networks }: RequestTally): doc.Report["decisions"] {
  return [...networks.keys()].sort().flatMap((network) => {
    const deciders = [...(networks.get(network)?.decidedBy ?? [])].sort((a, b) => b[1] - a[1]);
    return deciders.map(([decidedBy, requests]) => ({ network, decidedBy, requests }));
  });
}

function requestReport({ atMs, choice: _, ...row }: reader.NumberedRow): doc.RequestReport {
  return { at: iso(atMs), ...row };
}

/** The choices among rows; one may be in the row of the call and in that of the network. */
function choicesOf(rows: reader.NumberedRow[]): doc.ChoiceReport[] {
  const calls = new Map<string, reader.NumberedRow>();
  for (const row of rows) {
    if (row.choice !== "") calls.set(`${row.containerId} ${row.atMs} ${row.choice}`, row);
  }
  return [...calls.values()].map((row) => {
    const parsed = orUndefined(() => parseJson(row.choice, "recorded choice"));
    const choice = parsed === undefined ? row.choice : parsed;
    const chosen = isObject(choice) ? choice["network"] : undefined;
    return {
      at: iso(row.atMs),
      namespace: row.podNamespace,
      pod: row.podName,
      network: typeof chosen === "string" ? chosen : row.network,
      outcome: row.outcome,
      choice,
    };
  });
}
