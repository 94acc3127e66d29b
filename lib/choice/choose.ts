/**
 * The automatic choice of a network: among candidates that the pod may use, whose binaries exist,
 * and that are neither full nor unready, the one with the best KPIs. The choice is written down for
 * some seconds, so that pods that start at once see each other and spread. When the record fails,
 * KPIs are unknown, but a network is chosen all the same.
 * Source: CNI-Genie's "smart" selection; design D3.
 */
import { findPlugins, type PluginSearch, pluginSearch } from "../binaries.ts";
import type { PlanCall, WantedSet } from "../call.ts";
import { CniError, code, compareVersions, log, oneLine, toCniError } from "../cni.ts";
import { read, type State, write } from "../database.ts";
import { configHash } from "../ledger.ts";
import { type Network, resolveNetwork } from "../networks.ts";
import { firstOfGenie, listCandidates } from "../node_networks.ts";
import { annotationKeys, type Pod } from "../pod.ts";
import { checkMayUse, entriesOf } from "../policy/access.ts";
import type { Journal } from "../record.ts";
import { networkName, otherThan } from "../recovery/network_name.ts";
import { onNode } from "../selection.ts";
import { statusChain } from "../status.ts";
import { keepStore, type Reader, storeBelievedMs } from "./ipam.ts";
import {
  type Figures,
  type NetworkKpis,
  networkKpis,
  occupancyWith,
  readFigures,
  sampleOldest,
} from "./kpi.ts";
import { type Ranked, rank } from "./rank.ts";

/** A candidate that cannot take the pod. */
export interface Rejected {
  network: string;
  reason: string;
  /** CNI error code of the reason. */
  code: number;
  /** The rule that denies it, else "". */
  rule: string;
}

/** A choice and all that decided it. */
export interface Choice {
  network: string;
  /** Best first; the first is the network chosen. */
  ranking: Ranked[];
  /** Of every candidate that could be measured. */
  kpis: NetworkKpis[];
  rejected: Rejected[];
}

/** How long a choice counts as a pod on its way, in ms. */
const recentMs = 10_000;
/** How long the answer of a network's STATUS is used, in ms, and how long STATUS may take. */
const healthMs = 5_000;
const statusTimeoutMs = 2_000;
const reasonLengthMax = 300;

/** What the steps of one choice share. */
interface Choosing {
  /** What it asks the API serves the rest of the call too. */
  call: PlanCall;
  pod: Pod;
  search: PluginSearch;
  record: SafeRecord;
}

/**
 * Chooses a network for a pod.
 * @throws CniError 101 when there is no candidate at all; when none can take the pod: 100 when it
 *   may use none of them, 11 when another try may find one, else the code of the first reason
 */
export async function chooseNetwork(call: PlanCall, pod: Pod): Promise<Choice> {
  const { host, config, request } = call;
  const { containerId } = request;
  const search = pluginSearch(config, request);
  const named = config.select.candidates?.map((name) => networkName(config, name));
  const select = { ...config.select, ...(named && { candidates: named }) };
  const candidates = listCandidates({ ...config, select }, search);
  if (candidates.length === 0) {
    const issue = `neither the plugin table nor ${config.confDir} offers one`;
    throw new CniError(code.networkNotFound, `Cannot choose a network: ${issue}`);
  }
  const record = safeRecord(call);
  const names = candidates.map(({ name }) => name);
  const figures = record.read((reader) => readFigures(reader, names, host.now()));
  const choosing = { call, pod, search, record };
  const all = await Promise.all(
    candidates.map((one) => examine(choosing, { ...one, figures: figures?.get(one.name) })),
  );
  const rejected = all.flatMap((one) => one.rejected ?? []);
  const kpis = all.flatMap((one) => one.kpis ?? []);
  const usable = all.flatMap((one) => (one.rejected ? [] : (one.kpis ?? [])));
  if (usable.length === 0) throw noneUsable(rejected);
  const decide = (loads: Loads) => rank(rankable(usable, loads), config.select.weights);
  const ranking =
    // The clock is read inside the transaction: others may have chosen while we waited for it.
    record.write((state) => {
      for (const { store } of kpis) if (store) keepStore(state, store);
      return reserve(state, containerId, host.now(), decide);
    }) ?? decide(record.read((reader) => readLoads(reader, containerId, host.now())) ?? new Map());
  return { network: ranking[0]?.candidate.network ?? "", ranking, kpis, rejected };
}

/** Why no candidate can take the pod, with the code that says whether another try makes sense. */
function noneUsable(rejected: Rejected[]): CniError {
  const reasons = rejected.map((one) => `${one.network}: ${one.reason}`).join("; ");
  const allowed = rejected.find(({ rule }) => rule === "");
  if (!allowed) {
    const rule = rejected.map((one) => one.rule).join("; ");
    const msg = `Access to every network that could be chosen is denied: ${reasons}`;
    return new CniError(code.accessDenied, msg, { details: rule, rule });
  }
  const isPassing = rejected.some(({ code: number }) => number === code.tryAgainLater);
  const number = isPassing ? code.tryAgainLater : allowed.code;
  return new CniError(number, `Cannot choose a network: ${reasons}`);
}

type SafeRecord = ReturnType<typeof safeRecord>;

/** The record as long as it works: its first failure is logged, and then it is not used again. */
function safeRecord({ host, state, reader }: PlanCall) {
  let works = true;
  const guard = <T>(use: () => T | undefined): T | undefined => {
    if (!works) return undefined;
    try {
      return use();
    } catch (error) {
      works = false;
      log(host, "warn", `Choosing without the record: ${toCniError(error).message}`);
      return undefined;
    }
  };
  return {
    read: <T>(inside: (reader: Reader) => T) =>
      guard(() => (reader ? reader(inside) : state && read(state, () => inside(state)))),
    /** Does nothing for `genie plan`. */
    write: <T>(inside: (state: State) => T) =>
      guard(() => state && write(state, () => inside(state))),
  };
}

/** Measures one candidate; without `rejected` it can take the pod. */
async function examine(
  choosing: Choosing,
  candidate: { name: string; network?: Network; figures: Figures | undefined },
): Promise<{ kpis?: NetworkKpis | undefined; rejected?: Rejected }> {
  const { call, pod, search, record } = choosing;
  const { host, config } = call;
  const { name, figures } = candidate;
  let kpis: NetworkKpis | undefined;
  const reject = (text: string, number: number = code.tryAgainLater, rule = "") => {
    const reason = oneLine(text, reasonLengthMax);
    return { kpis, rejected: { network: name, reason, code: number, rule } };
  };
  // `genie plan`, which has no state, shows all KPIs; an ADD needs only those it ranks by.
  const options = { isBrief: call.state !== undefined, figures };
  try {
    const network = candidate.network ?? resolveNetwork(config, name);
    await checkMayUse(call, { name, entries: entriesOf(config, network) }, pod);
    const plugins = findPlugins(network, search);
    const nowMs = host.now();
    kpis =
      record.read((reader) => networkKpis(reader, network, nowMs, options)) ??
      networkKpis(undefined, network, nowMs);
    const failure = call.failed?.get(name)?.message;
    if (failure !== undefined) return reject(`it failed to attach: ${failure}`);
    const { value: share = 0, source } = kpis.occupancy;
    if (share >= 1) return reject(`it is full (${source})`);
    const issue = await unreadyReason(choosing, network, plugins);
    return issue === "" ? { kpis } : reject(`it is not ready: ${issue}`);
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return reject(error.message, error.code, error.rule);
  }
}

/** The STATUS of a network's plugins, asked now or seconds ago: why it is not ready, or "". */
async function unreadyReason(
  { call: { host }, search, record }: Choosing,
  { name, list }: Network,
  plugins: string[],
): Promise<string> {
  if (compareVersions(list.cniVersion, "1.1.0") < 0) return "";
  const hash = configHash(list);
  const sql = `SELECT error FROM health
    WHERE network = ? AND config_hash = ? AND abs(? - at_ms) < ${healthMs}`;
  const known = record.read(({ database }) => database.query(sql).get(name, hash, host.now()));
  if (known) return (known as { error: string }).error;
  const cniPath = search.dirs.join(":");
  const asked = { network: name, list, plugins, cniPath, timeoutMs: statusTimeoutMs };
  const issue = await statusChain(host, asked).then(
    () => "",
    (error: unknown) => oneLine(toCniError(error).message, reasonLengthMax),
  );
  record.write(({ database }) => {
    const insert = database.query("INSERT OR REPLACE INTO health VALUES (?, ?, ?, ?)");
    insert.run(name, hash, issue, host.now());
  });
  return issue;
}

/** By network: pods on their way there, and those of them that hold no address yet. */
type Loads = ReadonlyMap<string, { recent: number; pending: number }>;

/** Reads the choices of the last seconds but for the pod's own. */
function readLoads({ database }: Reader, containerId: string, nowMs: number): Loads {
  const rows = database
    .query(
      `SELECT network, count(*) AS recent,
         sum(at_ms > ?1 - ${storeBelievedMs} OR NOT EXISTS (SELECT 1 FROM attachments AS a
           WHERE a.container_id = choices.container_id AND a.state = 'attached')) AS pending
       FROM choices WHERE abs(?1 - at_ms) < ${recentMs} AND container_id <> ?2 GROUP BY network`,
    )
    .all(nowMs, containerId) as { network: string; recent: number; pending: number }[];
  return new Map(rows.map(({ network, ...load }) => [network, load]));
}

function rankable(kpis: NetworkKpis[], loads: Loads): Ranked["candidate"][] {
  return kpis.map((one) => {
    const { recent = 0, pending = 0 } = loads.get(one.network) ?? {};
    return {
      network: one.network,
      // Pods on their way will have addresses that no store holds yet.
      occupancy: occupancyWith(one, pending),
      responseTimeUs: one.medianUs.value,
      failures: one.failures.value,
      bandwidth: one.bandwidth.value,
      subnets: one.subnets.value,
      recent,
    };
  });
}

/** Ranks and writes the choice down in one transaction, so that calls choose one by one. */
function reserve(
  state: State,
  containerId: string,
  nowMs: number,
  decide: (loads: Loads) => Ranked[],
): Ranked[] {
  const { database } = state;
  // Also choices of the future, left by a clock that was put back.
  database.query(`DELETE FROM choices WHERE abs(? - at_ms) >= ${recentMs}`).run(nowMs);
  const ranking = decide(readLoads(state, containerId, nowMs));
  const network = ranking[0]?.candidate.network ?? "";
  const insert = database.query("INSERT OR REPLACE INTO choices VALUES (?, ?, ?)");
  insert.run(containerId, network, nowMs);
  sampleOldest(state, nowMs);
  return ranking;
}

/** Longest text of a choice in the ledger, in characters, and most candidates in it. */
const numbersLengthMax = 8000;
const candidatesMax = 12;

/**
 * Chooses the primary network of a pod that leaves that to genie, and adds it to what it wants.
 * @returns undefined where CNI-Genie's config decides for a pod that asks for nothing
 */
export async function addChosen(call: PlanCall, pod: Pod, wanted: WantedSet) {
  const { config, request } = call;
  const asks = pod.annotations.has(annotationKeys.cni);
  const search = pluginSearch(config, request);
  const first = asks ? undefined : await firstOfGenie(config, search, request.config);
  const choice = first === undefined ? await chooseNetwork(call, pod) : undefined;
  const network = choice?.network ?? first ?? "";
  const reason = choice ? reasonOf(choice) : "default network (the first config list)";
  wanted.decision = choice ? "choice" : "default";
  const chosen = onNode({ network }, reason);
  wanted.primarySet.push(chosen);
  // What every pod gets besides it has already where the choice fell on it.
  wanted.further = otherThan(config, wanted.further, [chosen]);
  return choice;
}

/** Why the chosen network was, for people. */
function reasonOf({ ranking, rejected }: Choice): string {
  const all = ranking.length + rejected.length;
  return all === 1 ? "the only candidate" : `best of ${all} candidates by KPIs`;
}

/** Leaves the numbers of a choice in the ledger, with the newest ADD of the network it fell on. */
export function noteNumbers(journal: Journal, choice: Choice): void {
  const adds = journal.rows.filter(({ kind, command }) => kind === "network" && command === "ADD");
  const row = adds.findLast(({ network }) => network === choice.network);
  if (row) row.choice = formatChoice(choice);
}

/**
 * Formats the numbers of a choice for the ledger: JSON of candidates, figures and rejections, as
 * many of the first ones as fit.
 */
export function formatChoice({ network, ranking, rejected }: Choice): string {
  // Four digits after the point: more would only take room in every row.
  const round = (_key: string, value: unknown) =>
    typeof value === "number" ? Math.round(value * 1e4) / 1e4 : value;
  for (let count = candidatesMax; count > 0; count--) {
    const candidates = ranking
      .slice(0, count)
      .map(({ candidate, score, figures }) => ({ ...candidate, score, figures }));
    const refused = rejected
      .slice(0, count)
      .map((one) => ({ network: one.network, reason: oneLine(one.reason, 200) }));
    const text = JSON.stringify({ network, candidates, rejected: refused }, round);
    if (text.length <= numbersLengthMax) return text;
  }
  return JSON.stringify({ network, candidates: [], rejected: [] });
}
