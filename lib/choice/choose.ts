/**
 * The choice when it is ours: candidates that the pod may use, whose binaries exist, that are not
 * full and say that they work, ranked by their KPIs. The choice is written down for some seconds,
 * so that a herd of pods sees each other and spreads. A record that fails makes KPIs unknown, never
 * the choice impossible. Source: CNI-Genie's "smart" selection; design D3.
 */

import { CniError, code, compareVersions, type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { read, type State, write } from "../database.ts";
import { statusChain } from "../delegate.ts";
import { checkMayUse, gatesOf, type Verdict } from "../gate.ts";
import type { Objects } from "../kubernetes/objects_of_call.ts";
import { configHash, type Journal } from "../ledger.ts";
import { findPlugins, type Network, type PluginSearch, resolveNetwork } from "../networks.ts";
import type { Pod } from "../pod.ts";
import { oneLine } from "../text.ts";
import { sampleOldest } from "../traffic.ts";
import { listCandidates } from "../wanted.ts";
import { keepStore, storeBelievedMs } from "./ipam.ts";
import { type Figures, type NetworkKpis, networkKpis, occupancyWith, readFigures } from "./kpi.ts";
import { type Candidate, type Ranked, rank } from "./rank.ts";

export { networkKpis };

/** A database to read from. */
export type Reader = Pick<State, "database">;

/** With what a choice is made. */
export interface Chooser {
  /** The record, in which the choice is written down; undefined for `genie plan`. */
  state?: State;
  /** Reads the record in place of `state`; gives undefined where there is none. */
  reader?: <T>(inside: (reader: Reader) => T) => T | undefined;
  /** Networks that failed to attach in this call, with the reason. */
  failed: ReadonlyMap<string, string>;
  /** Takes a row for a network that the pod may not use. */
  journal?: Journal;
  /** Takes what the gate says to each network; then a denial ends nothing. */
  verdicts?: Verdict[];
}

/** For whom a network is chosen, and among which. */
export interface ChoiceRequest {
  config: Config;
  search: PluginSearch;
  objects: Objects;
  pod: Pod;
  containerId: string;
}

/** A candidate that is out of the question. */
export interface Rejected {
  network: string;
  reason: string;
  /** CNI error code of the reason. */
  code: number;
  /** The rule, where one denied it. */
  rule: string;
}

/** A choice with everything that decided it. */
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
/** How long a network's STATUS is believed, in ms, and how long it may take. */
const healthMs = 5_000;
const statusTimeoutMs = 2_000;
const reasonLengthMax = 300;

/**
 * Chooses a network for a pod.
 *
 * @throws CniError 101 when there is no candidate at all; when none can take the pod: 100 when it
 *   may use none of them, 11 when another try may find one, else the code of the first reason
 */
export async function chooseNetwork(
  host: Host,
  request: ChoiceRequest,
  chooser: Chooser,
): Promise<Choice> {
  const { config, search, containerId } = request;
  const names = listCandidates(config, search);
  if (names.length === 0) {
    throw new CniError(
      code.networkNotFound,
      `Cannot choose a network: neither the plugin table nor ${config.confDir} offers one`,
    );
  }
  const memory = openMemory(host, chooser);
  const figures = memory.read((reader) =>
    readFigures(
      reader,
      names.map(({ name }) => name),
      host.now(),
    ),
  );
  const all = await Promise.all(
    names.map(({ name, network }) =>
      examine(host, request, chooser, memory, { name, network, figures: figures?.get(name) }),
    ),
  );
  const rejected = all.flatMap((one) => one.rejected ?? []);
  const kpis = all.flatMap((one) => one.kpis ?? []);
  const usable = all.flatMap((one) => (one.kpis && !one.rejected ? [one.kpis] : []));
  if (usable.length === 0) throw noneUsable(rejected);
  const decide = (loads: Loads) => rank(candidatesOf(usable, loads), config.select.weights);
  const ranking =
    // What time it is, is asked once it is our turn: others have chosen while we waited for it.
    memory.write((state) => {
      for (const { store } of kpis) if (store) keepStore(state, store);
      return reserve(state, containerId, host.now(), decide);
    }) ?? decide(memory.read((reader) => readLoads(reader, containerId, host.now())) ?? new Map());
  return { network: ranking[0]?.candidate.network ?? "", ranking, kpis, rejected };
}

/** Why no candidate can take the pod, with the code that says whether another try makes sense. */
function noneUsable(rejected: Rejected[]): CniError {
  const reasons = rejected.map((one) => `${one.network}: ${one.reason}`).join("; ");
  const denied = rejected.filter(({ rule }) => rule !== "");
  const wrong = rejected.find(({ rule }) => rule === "");
  if (!wrong) {
    const rule = denied.map((one) => one.rule).join("; ");
    const msg = `Access to every network that could be chosen is denied: ${reasons}`;
    return new CniError(code.accessDenied, msg, { details: rule, rule });
  }
  const isPassing = rejected.some(({ code: number }) => number === code.tryAgainLater);
  const number = isPassing ? code.tryAgainLater : wrong.code;
  return new CniError(number, `Cannot choose a network: ${reasons}`);
}

/** The record as far as it works: the first failure is reported, then it is left alone. */
interface Memory {
  read: <T>(inside: (reader: Reader) => T) => T | undefined;
  /** Undefined as well where nothing is to be written. */
  write: <T>(inside: (state: State) => T) => T | undefined;
}

function openMemory(host: Host, { state, reader }: Chooser): Memory {
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
    read: (inside) =>
      guard(() => (reader ? reader(inside) : state && read(state, () => inside(state)))),
    write: (inside) => guard(() => state && write(state, () => inside(state))),
  };
}

/** What was found out of one candidate; without `rejected` it can take the pod. */
interface Examined {
  kpis?: NetworkKpis;
  rejected?: Rejected;
}

/** A candidate with what is known of it so far. */
interface Named {
  name: string;
  network: Network | undefined;
  figures: Figures | undefined;
}

async function examine(
  host: Host,
  { config, search, objects, pod }: ChoiceRequest,
  { failed, state }: Chooser,
  memory: Memory,
  { name, network: known, figures }: Named,
): Promise<Examined> {
  const reject = (number: number, reason: string, rule = ""): Rejected => ({
    network: name,
    reason: oneLine(reason, reasonLengthMax),
    code: number,
    rule,
  });
  // Whoever only asks wants to know everything.
  const isBrief = state !== undefined;
  let kpis: NetworkKpis | undefined;
  const examined = (rejected?: Rejected): Examined => ({
    ...(kpis && { kpis }),
    ...(rejected && { rejected }),
  });
  try {
    const network = known ?? resolveNetwork(config, name);
    await checkMayUse(host, config, objects, { name, gates: gatesOf(config, network) }, pod);
    const plugins = findPlugins(network, search);
    const nowMs = host.now();
    kpis =
      memory.read((reader) => networkKpis(reader, network, nowMs, isBrief, figures)) ??
      networkKpis(undefined, network, nowMs);
    const failure = failed.get(name);
    if (failure !== undefined) {
      return examined(reject(code.tryAgainLater, `it failed to attach: ${failure}`));
    }
    if ((kpis.occupancy.value ?? 0) >= 1) {
      return examined(reject(code.tryAgainLater, `it is full (${kpis.occupancy.source})`));
    }
    const illness = await checkHealth(host, network, plugins, search, memory);
    if (illness === "") return examined();
    return examined(reject(code.tryAgainLater, `it is not ready: ${illness}`));
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return examined(reject(error.code, error.message, error.rule));
  }
}

/** Asks a network's plugins for their STATUS, or believes what they said seconds ago. */
async function checkHealth(
  host: Host,
  network: Network,
  plugins: string[],
  search: PluginSearch,
  memory: Memory,
): Promise<string> {
  const { name, list } = network;
  if (compareVersions(list.cniVersion, "1.1.0") < 0) return "";
  const hash = configHash(list);
  const known = memory.read(
    ({ database }) =>
      database
        .query(
          `SELECT error FROM health
           WHERE network = ? AND config_hash = ? AND abs(? - at_ms) < ${healthMs}`,
        )
        .get(name, hash, host.now()) as { error: string } | null,
  );
  if (known) return known.error;
  const error = await askStatus(host, network, plugins, search);
  memory.write(({ database }) =>
    database
      .query("INSERT OR REPLACE INTO health VALUES (?, ?, ?, ?)")
      .run(name, hash, error, host.now()),
  );
  return error;
}

async function askStatus(
  host: Host,
  { name, list }: Network,
  plugins: string[],
  search: PluginSearch,
): Promise<string> {
  const cniPath = search.dirs.join(":");
  const deadlineMs = host.now() + statusTimeoutMs;
  const call = { network: name, list, plugins, cniPath, timeoutMs: statusTimeoutMs };
  try {
    await statusChain(host, call, { netns: "", token: "status", deadlineMs, signal: host.signal });
    return "";
  } catch (error) {
    return oneLine(toCniError(error).message, reasonLengthMax);
  }
}

/** Choices of the last seconds, by network, but for the pod's own. */
type Loads = ReadonlyMap<string, { recent: number; pending: number }>;

function readLoads({ database }: Reader, containerId: string, nowMs: number): Loads {
  const rows = database
    .query(
      `SELECT network, count(*) AS recent,
         sum(at_ms > ?1 - ${storeBelievedMs} OR NOT EXISTS (SELECT 1 FROM attachments AS a
           WHERE a.container_id = choices.container_id AND a.state = 'attached')) AS pending
       FROM choices WHERE abs(?1 - at_ms) < ${recentMs} AND container_id <> ?2 GROUP BY network`,
    )
    .all(nowMs, containerId) as {
    network: string;
    recent: number;
    pending: number;
  }[];
  return new Map(rows.map(({ network, ...load }) => [network, load]));
}

function candidatesOf(kpis: NetworkKpis[], loads: Loads): Candidate[] {
  return kpis.map((one) => {
    const { recent = 0, pending = 0 } = loads.get(one.network) ?? {};
    return {
      network: one.network,
      // Whoever is on the way will have an address that no store tells of yet.
      occupancy: occupancyWith(one, pending),
      responseTimeUs: one.medianUs.value,
      failures: one.failures.value,
      bandwidth: one.bandwidth.value,
      subnets: one.subnets.value,
      recent,
    };
  });
}

/** Ranks and writes the choice down in one transaction: of two at once, one is first. */
function reserve(
  state: State,
  containerId: string,
  nowMs: number,
  decide: (loads: Loads) => Ranked[],
): Ranked[] {
  const { database } = state;
  // Of a clock that was put back, too: they would count until it has caught up.
  database.query(`DELETE FROM choices WHERE abs(? - at_ms) >= ${recentMs}`).run(nowMs);
  const ranking = decide(readLoads(state, containerId, nowMs));
  const network = ranking[0]?.candidate.network ?? "";
  database
    .query("INSERT OR REPLACE INTO choices VALUES (?, ?, ?)")
    .run(containerId, network, nowMs);
  sampleOldest(state, nowMs);
  return ranking;
}

/** Longest numbers kept of a choice, in characters, and candidates told of at most. */
const numbersLengthMax = 8000;
const toldMax = 12;

/**
 * The numbers of a choice as the ledger keeps them: JSON of candidates, figures and rejections, of
 * the best and the first of them where there are many.
 */
export function formatChoice({ network, ranking, rejected }: Choice): string {
  for (let told = toldMax; told > 0; told--) {
    const text = JSON.stringify({
      network,
      candidates: ranking.slice(0, told).map(({ candidate, score, figures }) => ({
        ...rounded(candidate),
        score: round(score),
        figures: rounded(figures),
      })),
      rejected: rejected
        .slice(0, told)
        .map((one) => ({ network: one.network, reason: oneLine(one.reason, 200) })),
    });
    if (text.length <= numbersLengthMax) return text;
  }
  return JSON.stringify({ network, candidates: [], rejected: [] });
}

function rounded<T extends object>(numbers: T): object {
  return Object.fromEntries(
    Object.entries(numbers).map(([key, value]) => [
      key,
      typeof value === "number" ? round(value) : value,
    ]),
  );
}

/** To four digits after the point: more says nothing, and takes room a million times. */
function round(value: number): number {
  return Math.round(value * 1e4) / 1e4;
}
