/**
 * The choice when it is ours: candidates that the pod may use, whose binaries exist, that are not
 * full and say that they work, ranked by their KPIs. The choice is written down for some seconds,
 * so that a herd of pods sees each other and spreads. Source: CNI-Genie's "smart" selection; design
 * D3.
 */
import { checkAccess } from "./access.ts";
import { CniError, code, type Host, toCniError } from "./cni.ts";
import type { Config } from "./config.ts";
import { type State, write } from "./database.ts";
import { statusChain } from "./delegate.ts";
import { type NetworkKpis, networkKpis } from "./kpi.ts";
import { configHash } from "./ledger.ts";
import { findPlugins, type Network, type PluginSearch, resolveNetwork } from "./networks.ts";
import type { Pod } from "./pod.ts";
import { type Candidate, type Ranked, rank } from "./select.ts";
import { oneLine } from "./text.ts";
import { sampleTraffic } from "./traffic.ts";
import { candidateNetworks } from "./wanted.ts";

/** How a choice is made. */
export interface Chooser {
  /** The record; undefined where there is none: KPIs are unknown then. */
  state: State | undefined;
  /** Writes the choice down; false for `genie plan`, which changes nothing. */
  reserves: boolean;
  /** Networks that failed to attach in this call, with the reason. */
  failed: ReadonlyMap<string, string>;
}

/** A choice with everything that decided it. */
export interface Choice {
  network: string;
  /** Best first; the first is the network chosen. */
  ranking: Ranked[];
  kpis: NetworkKpis[];
  /** Candidates that were out of the question, and why. */
  rejected: { network: string; reason: string }[];
}

/** How long a choice counts as a pod on its way, in ms. */
const recentMs = 10_000;
/** How long a network's STATUS is believed, in ms, and how long it may take. */
const healthMs = 5_000;
const statusTimeoutMs = 2_000;
/** Interfaces whose traffic is counted anew at one choice; the oldest counts first. */
const trafficSamples = 16;

/**
 * Chooses a network for a pod.
 *
 * @throws CniError 101 when there is no candidate, 11 when none of them can take the pod now
 */
export async function chooseNetwork(
  host: Host,
  config: Config,
  search: PluginSearch,
  pod: Pod,
  containerId: string,
  chooser: Chooser,
): Promise<Choice> {
  const names = candidateNetworks(config, search);
  if (names.length === 0) {
    throw new CniError(
      code.networkNotFound,
      `Cannot choose a network: neither the plugin table nor ${config.confDir} offers one`,
    );
  }
  const rejected: Choice["rejected"] = [];
  const kpis: NetworkKpis[] = [];
  for (const name of names) {
    const outcome = await examine(host, config, search, pod, chooser, name);
    if (typeof outcome === "string") rejected.push({ network: name, reason: outcome });
    else kpis.push(outcome);
  }
  if (kpis.length === 0) {
    const reasons = rejected.map((one) => `${one.network}: ${one.reason}`).join("; ");
    throw new CniError(code.tryAgainLater, `Cannot choose a network: ${reasons}`);
  }
  const decide = () => rank(candidatesOf(kpis, chooser.state, host.now()), config.select.weights);
  const ranking =
    chooser.state && chooser.reserves
      ? reserve(chooser.state, containerId, host.now(), decide)
      : decide();
  return { network: ranking[0]?.candidate.network ?? "", ranking, kpis, rejected };
}

/** The KPIs of a candidate, or why it is out of the question. */
async function examine(
  host: Host,
  config: Config,
  search: PluginSearch,
  pod: Pod,
  { state, reserves, failed }: Chooser,
  name: string,
): Promise<NetworkKpis | string> {
  const failure = failed.get(name);
  if (failure !== undefined) return `failed to attach: ${failure}`;
  try {
    const network = resolveNetwork(config, name);
    const plugins = findPlugins(network, search);
    const verdict = checkAccess(config, network.entry?.name ?? network.name, pod);
    if (!verdict.allowed) return `the pod may not use it: ${verdict.reason}`;
    const kpis = networkKpis(state, network, host.now());
    if ((kpis.occupancy.value ?? 0) >= 1) return `it is full (${kpis.occupancy.source})`;
    await checkHealth(host, network, plugins, search, reserves ? state : undefined);
    return kpis;
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return oneLine(error.message, 300);
  }
}

/** Asks a network's plugins for their STATUS, or believes what they said seconds ago. */
async function checkHealth(
  host: Host,
  network: Network,
  plugins: string[],
  search: PluginSearch,
  state: State | undefined,
): Promise<void> {
  const { name, list } = network;
  if (list.cniVersion !== "1.1.0") return;
  const hash = configHash(list);
  const known = state?.database
    .query("SELECT error FROM health WHERE network = ? AND config_hash = ? AND at_ms > ?")
    .get(name, hash, host.now() - healthMs) as { error: string } | null | undefined;
  let error = known?.error;
  if (error === undefined) {
    error = await askStatus(host, network, plugins, search);
    if (state) rememberHealth(state, name, hash, error, host.now());
  }
  if (error !== "") throw new CniError(code.unavailable, `it is not ready: ${error}`);
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
    return oneLine(toCniError(error).message, 300);
  }
}

function rememberHealth(
  state: State,
  network: string,
  hash: string,
  error: string,
  nowMs: number,
): void {
  write(state, () =>
    state.database
      .query("INSERT OR REPLACE INTO health VALUES (?, ?, ?, ?)")
      .run(network, hash, error, nowMs),
  );
}

function candidatesOf(kpis: NetworkKpis[], state: State | undefined, nowMs: number): Candidate[] {
  const recent = new Map(
    (
      (state?.database
        .query("SELECT network, count(*) AS count FROM choices WHERE at_ms > ? GROUP BY network")
        .all(nowMs - recentMs) ?? []) as { network: string; count: number }[]
    ).map(({ network, count }) => [network, count]),
  );
  return kpis.map((one) => ({
    network: one.network,
    occupancy: one.occupancy.value,
    responseTimeUs: one.medianUs.value,
    failures: one.failures.value,
    bandwidth: one.bandwidth.value,
    subnets: one.subnets.value,
    recent: recent.get(one.network) ?? 0,
  }));
}

/** Ranks and writes the choice down in one transaction: of two at once, one is first. */
function reserve(
  state: State,
  containerId: string,
  nowMs: number,
  decide: () => Ranked[],
): Ranked[] {
  const { database } = state;
  return write(state, () => {
    database.query("DELETE FROM choices WHERE at_ms <= ?").run(nowMs - recentMs);
    const ranking = decide();
    const network = ranking[0]?.candidate.network ?? "";
    database
      .query("INSERT OR REPLACE INTO choices VALUES (?, ?, ?)")
      .run(containerId, network, nowMs);
    const oldest = database
      .query(
        `SELECT container_id AS containerId, ifname AS ifName, network, host_ifname AS hostIfName
         FROM traffic ORDER BY at_ms LIMIT ${trafficSamples}`,
      )
      .all() as { containerId: string; ifName: string; network: string; hostIfName: string }[];
    sampleTraffic(state, oldest, nowMs);
    return ranking;
  });
}

/** The numbers of a choice as the ledger keeps them: JSON of candidates, figures and rejections. */
export function formatChoice({ network, ranking, rejected }: Choice): string {
  return JSON.stringify({
    network,
    candidates: ranking.map(({ candidate, score, figures }) => ({ ...candidate, score, figures })),
    rejected,
  });
}
