/** What the node agent tells of a node: families of metrics, from the record and its own counts. */
import manifest from "../../package.json";
import { networkKpis, readFigures } from "../choice/kpi.ts";
import { CniError } from "../cni.ts";
import type { State } from "../database.ts";
import { listNetworks } from "../networks.ts";
import { aliveSince, neededResources } from "../policy/store.ts";
import { type Family, histogramSamples, type Sample } from "../report/metrics.ts";
import { enforcesPolicy } from "../settings.ts";
import type { Agent } from "./part.ts";
import { labelsMax, other, type Tally } from "./tally.ts";

/** All families; without those of the record where it cannot be read, which is counted too. */
export function gatherMetrics(agent: Agent, tally: Tally): Family[] {
  const { health } = agent;
  const found = readRecord(agent);
  const count = (name: string, help: string, value: number): Family => ({
    ...{ name, help, type: "counter" },
    samples: [{ value }],
  });
  return [
    {
      ...{ name: "genie_agent", type: "info", help: "The agent that tells this." },
      samples: [{ labels: { version: manifest.version }, value: 1 }],
    },
    {
      name: "genie_requests",
      type: "counter",
      help: "Calls of genie by the runtime, since an agent first ran here.",
      samples: [...tally.requests.values()],
    },
    {
      ...{ name: "genie_request_duration_seconds", type: "histogram", unit: "seconds" },
      help: "How long each network of a call took, through all of its plugins.",
      samples: [...tally.durations.values()].flatMap(({ labels, histogram }) =>
        histogramSamples(histogram, labels),
      ),
    },
    ...found,
    count("genie_api_errors", "Requests to the Kubernetes API that failed.", health.counted("api")),
    count(
      "genie_api_garbage",
      "Objects and events of the Kubernetes API that make no sense.",
      health.counted("garbage"),
    ),
    count(
      "genie_database_errors",
      "Times that the record could not be read or written.",
      health.counted("database"),
    ),
    count("genie_part_failures", "Parts of the agent begun anew.", health.counted("part")),
  ];
}

function readRecord(agent: Agent): Family[] {
  try {
    return agent.record.use((state) => ofRecord(agent, state));
  } catch (error) {
    if (error instanceof CniError) return [];
    throw error;
  }
}

/** What the record says now. */
function ofRecord(agent: Agent, state: State): Family[] {
  const gauge = (name: string, help: string, samples: Sample[]): Family => ({
    ...{ name, help, type: "gauge", samples },
  });
  const attachments = attachmentSamples(state);
  const leaked = attachments.filter(({ labels }) => labels?.["state"] === "leaked");
  const pending = state.database.query("SELECT count(*) AS value FROM statuses").get() as Sample;
  return [
    gauge("genie_attachments", "Attachments on record.", attachments),
    gauge("genie_leaked_attachments", "Attachments whose DEL was given up.", [
      { value: leaked.reduce((sum, { value }) => sum + value, 0) },
    ]),
    gauge("genie_addresses", "Addresses of a network, on this node.", addresses(agent, state)),
    gauge("genie_status_pending", "Network statuses that wait to be published.", [pending]),
    ...policyFamilies(agent, state),
  ];
}

function attachmentSamples({ database }: State): Sample[] {
  const rows = database
    .query(
      `SELECT network, state, count(*) AS value FROM attachments GROUP BY network, state
       ORDER BY count(*) DESC`,
    )
    .all() as { network: string; state: string; value: number }[];
  const networks = [...new Set(rows.map(({ network }) => network))];
  const named = new Set(networks.slice(0, labelsMax.networks));
  const sums = new Map<string, { labels: Record<string, string>; value: number }>();
  for (const { network, state, value } of rows) {
    const labels = { network: named.has(network) ? network : other, state };
    const key = JSON.stringify(labels);
    sums.set(key, { labels, value: (sums.get(key)?.value ?? 0) + value });
  }
  return [...sums.values()];
}

/** Used and total of each family, of networks whose size is known. */
function addresses({ host, config }: Agent, state: State): Sample[] {
  const { networks } = listNetworks(config);
  const nowMs = host.now();
  const known = networks.slice(0, labelsMax.networks);
  const names = known.map(({ name }) => name);
  const figures = readFigures(state, names, nowMs);
  return known.flatMap((network) => {
    const kpis = networkKpis(state, network, nowMs, false, figures.get(network.name));
    return (["ipv4", "ipv6"] as const).flatMap((family): Sample[] => {
      const { used, total } = kpis[family];
      if (used.value === undefined || total.value === undefined) return [];
      const labels = { network: network.name, family };
      return [
        { labels: { ...labels, state: "used" }, value: used.value },
        { labels: { ...labels, state: "total" }, value: total.value },
      ];
    });
  });
}

/** How fresh network policy is, where it is enforced. */
function policyFamilies({ host, config, health }: Agent, state: State): Family[] {
  if (!enforcesPolicy(config)) return [];
  const aliveMs = aliveSince(state, neededResources(config.policy.enforce));
  const lagMs = health.figures.get("policyLagMs");
  const seconds = (name: string, help: string, samples: Sample[]): Family => ({
    ...{ name, help, type: "gauge", unit: "seconds", samples },
  });
  return [
    seconds(
      "genie_policy_lag_seconds",
      "From the newest change of what policies depend on until its rules were in force.",
      lagMs === undefined ? [] : [{ value: lagMs / 1000 }],
    ),
    seconds(
      "genie_policy_inputs_age_seconds",
      "Since when what policies depend on may have changed unseen; +Inf: it was never known.",
      [{ value: aliveMs === 0 ? Infinity : Math.max(0, host.now() - aliveMs) / 1000 }],
    ),
  ];
}
