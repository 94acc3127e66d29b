/**
 * What watches the agents' metrics: a dashboard for Grafana and alert rules for Prometheus. Pure.
 * Sources: Grafana's dashboard JSON model (schema 39); monitoring.coreos.com/v1 PrometheusRule.
 */
import { comment } from "./crds.ts";
import type { KubeObject } from "./manifest.ts";

/** The metrics that the agent of a node serves, with their labels. */
export const metrics = {
  genie_requests_total: ["command", "outcome", "code"],
  genie_request_duration_seconds_bucket: ["network", "command", "le"],
  genie_attachments: ["network"],
  /** `state` is "used" or "total"; total is absent where the IPAM tells none. */
  genie_addresses: ["network", "state"],
  genie_leaked_attachments: [],
  genie_policy_lag_seconds: [],
  genie_status_pending: [],
  genie_api_errors_total: [],
  genie_database_errors_total: [],
} as const;

/** One picture of the dashboard. */
interface Panel {
  title: string;
  unit: "short" | "s" | "reqps" | "percentunit";
  queries: [expr: string, legend: string][];
}

const share = (network: string) =>
  `sum by (${network}) (genie_addresses{state="used",$node}) / ` +
  `sum by (${network}) (genie_addresses{state="total",$node})`;
const quantile = (q: number) =>
  `histogram_quantile(${q}, sum by (le, network) ` +
  `(rate(genie_request_duration_seconds_bucket{command="ADD",$node}[5m])))`;

const panels: readonly Panel[] = [
  {
    title: "Requests",
    unit: "reqps",
    queries: [["sum by (command) (rate(genie_requests_total{$node}[5m]))", "{{command}}"]],
  },
  {
    title: "Failed requests",
    unit: "reqps",
    queries: [
      [
        'sum by (command, code) (rate(genie_requests_total{outcome!="ok",$node}[5m]))',
        "{{command}} {{code}}",
      ],
    ],
  },
  {
    title: "Time of an ADD, by network",
    unit: "s",
    queries: [
      [quantile(0.5), "{{network}} p50"],
      [quantile(0.95), "{{network}} p95"],
    ],
  },
  {
    title: "Addresses in use",
    unit: "percentunit",
    queries: [[share("network"), "{{network}}"]],
  },
  {
    title: "Attachments",
    unit: "short",
    queries: [["sum by (network) (genie_attachments{$node})", "{{network}}"]],
  },
  {
    title: "Leaked attachments",
    unit: "short",
    queries: [["sum by (instance) (genie_leaked_attachments{$node})", "{{instance}}"]],
  },
  {
    title: "Policy lag",
    unit: "s",
    queries: [["max by (instance) (genie_policy_lag_seconds{$node})", "{{instance}}"]],
  },
  {
    title: "Errors of the API and the database, statuses that wait",
    unit: "short",
    queries: [
      ["sum(rate(genie_api_errors_total{$node}[5m]))", "API errors/s"],
      ["sum(rate(genie_database_errors_total{$node}[5m]))", "database errors/s"],
      ["sum(genie_status_pending{$node})", "statuses"],
    ],
  },
];

/** The dashboard as Grafana imports it; it asks for its data source, and offers the nodes. */
export function makeDashboard(): object {
  const datasource = { type: "prometheus", uid: "$datasource" };
  const one = { width: 12, height: 8 };
  return {
    uid: "genie",
    title: "genie",
    tags: ["cni", "kubernetes"],
    schemaVersion: 39,
    editable: true,
    refresh: "1m",
    time: { from: "now-6h", to: "now" },
    templating: {
      list: [
        { name: "datasource", label: "Data source", type: "datasource", query: "prometheus" },
        {
          name: "instance",
          label: "Node",
          type: "query",
          datasource,
          query: { query: "label_values(genie_requests_total, instance)", refId: "instance" },
          refresh: 2,
          includeAll: true,
          multi: true,
          current: { text: "All", value: "$__all" },
        },
      ],
    },
    panels: panels.map(({ title, unit, queries }, i) => ({
      id: i + 1,
      title,
      type: "timeseries",
      datasource,
      gridPos: {
        ...{ x: (i % 2) * one.width, y: Math.floor(i / 2) * one.height },
        ...{ w: one.width, h: one.height },
      },
      fieldConfig: { defaults: { unit, min: 0 }, overrides: [] },
      options: { legend: { displayMode: "table", placement: "right", calcs: ["lastNotNull"] } },
      targets: queries.map(([expr, legendFormat], at) => ({
        refId: "ABC".charAt(at),
        datasource,
        expr: expr.replaceAll("$node", 'instance=~"$instance"'),
        legendFormat,
      })),
    })),
  };
}

/** A rule, and what whoever is woken by it does. */
interface Alert {
  name: string;
  expr: string;
  for: string;
  severity: "warning" | "critical";
  summary: string;
  action: string;
}

const alerts: readonly Alert[] = [
  {
    name: "GenieAddFailures",
    expr:
      'sum by (instance) (rate(genie_requests_total{command="ADD",outcome!="ok"}[10m])) / ' +
      'sum by (instance) (rate(genie_requests_total{command="ADD"}[10m])) > 0.1',
    for: "10m",
    severity: "critical",
    summary: "More than a tenth of the pods of {{ $labels.instance }} do not get their networks",
    action: "genie report --failed --since 1h on the node says which, and why",
  },
  {
    name: "GenieNoAddresses",
    expr:
      'sum by (instance, network) (genie_addresses{state="used"}) / ' +
      'sum by (instance, network) (genie_addresses{state="total"}) > 0.9',
    for: "15m",
    severity: "warning",
    summary: "Network {{ $labels.network }} of {{ $labels.instance }} has few addresses left",
    action: "enlarge its range, or move pods to another network",
  },
  {
    name: "GenieLeakedAttachments",
    expr: "genie_leaked_attachments > 0",
    for: "1h",
    severity: "warning",
    summary: "{{ $value }} attachments of pods that are gone hold addresses",
    action: "genie report says whose plugin refuses DEL; genie gc tries again",
  },
  {
    name: "GeniePolicyLag",
    expr: "genie_policy_lag_seconds > 60",
    for: "5m",
    severity: "critical",
    summary: "Network policies of {{ $labels.instance }} are older than a minute",
    action: "see the agent's log and its right to watch; pods with policies will fail to start",
  },
  {
    name: "GenieStatusPending",
    expr: "genie_status_pending > 0",
    for: "15m",
    severity: "warning",
    summary: "{{ $value }} network statuses were not published",
    action: "genie doctor on the node says whether the API may be asked",
  },
  {
    name: "GenieDatabaseErrors",
    expr: "increase(genie_database_errors_total[15m]) > 0",
    for: "0m",
    severity: "critical",
    summary: "The record of {{ $labels.instance }} cannot be written: pods may not start",
    action: "genie doctor on the node looks at disk and record",
  },
  {
    name: "GenieSlowAdd",
    expr:
      "histogram_quantile(0.95, sum by (instance, network, le) " +
      '(rate(genie_request_duration_seconds_bucket{command="ADD"}[10m]))) > 10',
    for: "10m",
    severity: "warning",
    summary: "ADD on network {{ $labels.network }} of {{ $labels.instance }} takes over 10 s",
    action: "genie report --network says which plugin is slow",
  },
];

/** The alert rules as an object of the Prometheus operator. */
export function makeAlerts(namespace: string): KubeObject {
  return {
    apiVersion: "monitoring.coreos.com/v1",
    kind: "PrometheusRule",
    metadata: { name: "genie", namespace, labels: { "app.kubernetes.io/name": "genie" } },
    spec: {
      groups: [
        {
          name: "genie",
          rules: alerts.map(({ name, expr, for: time, severity, summary, action }) => ({
            [comment]: summary.replace(/\{\{ \$(labels\.)?(\w+) \}\}/g, "<$2>"),
            alert: name,
            expr,
            for: time,
            labels: { severity },
            annotations: { summary, description: action },
          })),
        },
      ],
    },
  };
}
