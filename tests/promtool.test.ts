/**
 * What Prometheus and Grafana read of genie: metrics in both formats, alert rules and dashboard, as
 * promtool and the OpenMetrics parser of Prometheus' Python client judge them. The dashboard is
 * held against Grafana's schema (grafana/grafana kinds/dashboard/dashboard_kind.cue, version 39).
 */
import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import * as v from "valibot";
import described from "../lib/agent/metrics.json";
import {
  type Family,
  formatMetrics,
  histogramSamples,
  newHistogram,
  observe,
} from "../lib/agent/metrics.ts";
import { dashboard, makeAlerts } from "../lib/cluster/manifest.ts";
import { metrics } from "./agent_metrics.ts";
import { lacks } from "./skip.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

/** Debian's, which has Debian's modules. */
const python = "/usr/bin/python3";

/** Runs a program with a text on its stdin. */
function run(command: string[], stdin = "") {
  const { exitCode, stdout, stderr } = Bun.spawnSync(command, { stdin: Buffer.from(stdin) });
  return { status: exitCode, said: `${stdout}${stderr}`.trim() };
}

/** Every metric that there is, each with the labels it has, one of them hostile. */
const families = Object.entries(described).map(([name, { type, help }]): Family => {
  const [, known = []] =
    Object.entries(metrics).find(([full]) => full.replace(/_(total|info|bucket)$/, "") === name) ??
    [];
  const own = known.filter((label) => label !== "le");
  const labels = Object.fromEntries(own.map((label) => [label, `blue"\\ \n# EOF ${label}`]));
  const histogram = newHistogram();
  observe(histogram, 0.3);
  const samples =
    type === "histogram" ? histogramSamples(histogram, labels) : [{ labels, value: Infinity }];
  return {
    ...{ name, type: type as Family["type"], help: `${help} A "quote" and a \\.` },
    ...(name.endsWith("_seconds") && { unit: "seconds" as const }),
    samples: type === "info" ? [{ labels, value: 1 }] : samples,
  };
});

describe.skipIf(lacks("prometheus"))("promtool", () => {
  const check = (text: string) => run(["promtool", "check", "metrics"], text);

  test("finds nothing to say of the metrics, and much of others", () => {
    const text = formatMetrics(families, "prometheus");
    expect(text.match(/^# TYPE/gm)).toHaveLength(Object.keys(described).length);
    expect(check(text)).toEqual({ status: 0, said: "" });
    expect(check(`${text}broken{ 1\n`).status).not.toBe(0);
    expect(check(text.replaceAll("genie_requests_total", "genie_requests")).status).not.toBe(0);
  });

  const write = (name: string, value: object) => {
    const file = join(dir.path, name);
    writeFileSync(file, JSON.stringify(value));
    return file;
  };
  const [alerts] = makeAlerts("genie-system");
  type Rule = { alert: string; labels: { severity: string }; annotations: { description: string } };
  const { groups } = (alerts?.["spec"] ?? { groups: [] }) as { groups: { rules: Rule[] }[] };
  const rules = write("rules.json", { groups });

  test("accepts the alert rules", () => {
    const { status, said } = run(["promtool", "check", "rules", rules]);
    expect([status, said]).toEqual([0, expect.stringContaining("SUCCESS: 7 rules found")]);
    const broken = write("broken.json", {
      groups: [{ name: "x", rules: [{ alert: "a", expr: "(" }] }],
    });
    expect(run(["promtool", "check", "rules", broken]).status).not.toBe(0);
  });

  /** What each alert is tested with: series, and the values of it that must and must not fire. */
  const fires: [alert: string, at: string, fires: Series[], stays: Series[], text: string][] = [
    [
      "GenieAddFailures",
      "30m",
      [
        ['genie_requests_total{instance="n",command="ADD",outcome="ok",code="0"}', "0+8x60"],
        ['genie_requests_total{instance="n",command="ADD",outcome="failed",code="7"}', "0+2x60"],
      ],
      [
        ['genie_requests_total{instance="n",command="ADD",outcome="ok",code="0"}', "0+95x60"],
        ['genie_requests_total{instance="n",command="ADD",outcome="failed",code="7"}', "0+5x60"],
        ['genie_requests_total{instance="n",command="DEL",outcome="failed",code="7"}', "0+99x60"],
      ],
      "More than a tenth of the pods of n do not get their networks",
    ],
    [
      "GenieNoAddresses",
      "30m",
      [
        ['genie_addresses{instance="n",network="blue",family="ipv4",state="used"}', "95x60"],
        ['genie_addresses{instance="n",network="blue",family="ipv4",state="total"}', "100x60"],
      ],
      [
        ['genie_addresses{instance="n",network="blue",family="ipv4",state="used"}', "90x60"],
        ['genie_addresses{instance="n",network="blue",family="ipv4",state="total"}', "100x60"],
        ['genie_addresses{instance="n",network="red",family="ipv4",state="total"}', "1x60"],
      ],
      "Network blue of n has few addresses left",
    ],
    [
      "GenieLeakedAttachments",
      "90m",
      [['genie_leaked_attachments{instance="n"}', "3x120"]],
      [['genie_leaked_attachments{instance="n"}', "0x120"]],
      "3 attachments of pods that are gone hold addresses",
    ],
    [
      "GeniePolicyLag",
      "30m",
      [['genie_policy_lag_seconds{instance="n"}', "61x60"]],
      [['genie_policy_lag_seconds{instance="n"}', "60x60"]],
      "Network policies of n are older than a minute",
    ],
    [
      "GenieStatusPending",
      "30m",
      [['genie_status_pending{instance="n"}', "2x60"]],
      [['genie_status_pending{instance="n"}', "2x5 0x60"]],
      "2 network statuses were not published",
    ],
    [
      "GenieDatabaseErrors",
      "10m",
      [['genie_database_errors_total{instance="n"}', "0x5 1x60"]],
      [['genie_database_errors_total{instance="n"}', "4x60"]],
      "The record of n cannot be written: pods may not start",
    ],
    [
      "GenieSlowAdd",
      "30m",
      [
        [durations("10"), "0x60"],
        [durations("30"), "0+1x60"],
        [durations("+Inf"), "0+1x60"],
      ],
      [
        [durations("10"), "0+1x60"],
        [durations("30"), "0+1x60"],
        [durations("+Inf"), "0+1x60"],
      ],
      "ADD on network blue of n takes over 10 s",
    ],
  ];

  test("each alert is tried out", () => {
    const known = groups.flatMap(({ rules }) => rules.map(({ alert }) => alert));
    expect(fires.map(([alert]) => alert)).toEqual(known);
  });

  test.each(fires)("%s fires when it should, and only then", (alert, at, fires, stays, text) => {
    const tried = (series: Series[], fired: boolean) => ({
      interval: "1m",
      input_series: series.map(([series, values]) => ({ series, values })),
      alert_rule_test: [{ eval_time: at, alertname: alert, exp_alerts: fired ? [expected] : [] }],
    });
    const rule = groups.flatMap(({ rules }) => rules).find((one) => one.alert === alert);
    const labels = /^GenieNoAddresses|^GenieSlowAdd/.test(alert) ? { network: "blue" } : {};
    const { description } = rule?.annotations ?? {};
    const expected = {
      exp_labels: { instance: "n", severity: rule?.labels.severity, ...labels },
      exp_annotations: { summary: text, description },
    };
    const judge = (tests: object[]) =>
      run([
        ...["promtool", "test", "rules"],
        write(`${alert}.json`, { rule_files: [rules], evaluation_interval: "1m", tests }),
      ]);
    expect(judge([tried(fires, true), tried(stays, false)])).toMatchObject({ status: 0 });
    // Such a test can fail.
    expect(judge([tried(stays, true)]).status).not.toBe(0);
    expect(judge([tried(fires, false)]).status).not.toBe(0);
  });

  test("accepts each expression of the dashboard", () => {
    const exprs = targets.map(({ expr }) => expr.replaceAll("$instance", "n.*"));
    expect(exprs.length).toBeGreaterThan(8);
    const named = exprs.map((expr, i) => ({ record: `panel:${i}`, expr }));
    const file = write("panels.json", { groups: [{ name: "panels", rules: named }] });
    expect(run(["promtool", "check", "rules", file])).toMatchObject({ status: 0 });
  });
});

type Series = [series: string, values: string];

function durations(le: string): string {
  const labels = `instance="n",command="ADD",network="blue",le="${le}"`;
  return `genie_request_duration_seconds_bucket{${labels}}`;
}

describe.skipIf(lacks("python3-prometheus-client"))("the OpenMetrics parser", () => {
  const script = `
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
print([one.name for one in text_string_to_metric_families(sys.stdin.read())])`;

  test("reads every metric, and refuses the other format", () => {
    const names = Object.keys(described).map((name) => `'${name}'`);
    expect(run([python, "-c", script], formatMetrics(families, "openmetrics"))).toEqual({
      ...{ status: 0, said: `[${names.join(", ")}]` },
    });
    const other = run([python, "-c", script], formatMetrics(families, "prometheus"));
    expect(other.status).not.toBe(0);
  });
});

const whole = v.pipe(v.number(), v.integer(), v.minValue(0));
const text = v.pipe(v.string(), v.minLength(1));
const DatasourceSchema = v.strictObject({
  type: v.literal("prometheus"),
  uid: v.literal("$datasource"),
});
const TargetSchema = v.strictObject({
  refId: v.pipe(v.string(), v.regex(/^[A-Z]$/)),
  datasource: DatasourceSchema,
  expr: text,
  legendFormat: v.optional(text),
  instant: v.optional(v.boolean()),
});
const PanelSchema = v.strictObject({
  id: whole,
  title: text,
  description: v.optional(text),
  type: v.picklist(["timeseries", "stat", "gauge", "bargauge", "table"]),
  datasource: DatasourceSchema,
  gridPos: v.strictObject({
    x: v.pipe(whole, v.maxValue(23)),
    y: whole,
    w: v.pipe(whole, v.minValue(1), v.maxValue(24)),
    h: v.pipe(whole, v.minValue(1)),
  }),
  fieldConfig: v.looseObject({
    defaults: v.record(v.string(), v.unknown()),
    overrides: v.array(v.unknown()),
  }),
  options: v.record(v.string(), v.unknown()),
  targets: v.pipe(v.array(TargetSchema), v.minLength(1)),
});
const VariableSchema = v.variant("type", [
  v.strictObject({
    ...{ name: text, label: text, type: v.literal("datasource"), query: v.literal("prometheus") },
  }),
  v.strictObject({
    ...{ name: text, label: text, type: v.literal("query"), datasource: DatasourceSchema },
    query: v.strictObject({ query: text, refId: text }),
    // 0: never, 1: when the dashboard is loaded, 2: when the time is changed.
    refresh: v.picklist([0, 1, 2]),
    ...{ includeAll: v.boolean(), multi: v.boolean() },
    current: v.strictObject({ text, value: text }),
  }),
]);
const DashboardSchema = v.strictObject({
  uid: v.pipe(text, v.maxLength(40)),
  title: text,
  tags: v.array(text),
  schemaVersion: v.literal(39),
  editable: v.boolean(),
  refresh: text,
  time: v.strictObject({ from: text, to: text }),
  templating: v.strictObject({ list: v.array(VariableSchema) }),
  panels: v.array(PanelSchema),
});

const targets = v.parse(DashboardSchema, dashboard).panels.flatMap(({ targets }) => targets);

describe("the dashboard", () => {
  test("is of Grafana's schema, its panels lie side by side, each target has its letter", () => {
    const { panels } = v.parse(DashboardSchema, dashboard);
    expect(new Set(panels.map(({ id }) => id)).size).toBe(panels.length);
    const cells = panels.flatMap(({ gridPos: { x, y, w, h } }) =>
      Array.from({ length: w * h }, (_, i) => [x + (i % w), y + Math.floor(i / w)]),
    );
    expect(cells.filter(([x = 24]) => x > 23)).toEqual([]);
    expect(new Set(cells.map(String)).size).toBe(cells.length);
    for (const { targets } of panels) {
      expect(targets.map(({ refId }) => refId)).toEqual([..."ABCDEFGH"].slice(0, targets.length));
    }
  });

  test("a key that Grafana does not know is refused", () => {
    expect(v.is(DashboardSchema, { ...dashboard, panel: [] })).toBe(false);
    expect(v.is(DashboardSchema, { ...dashboard, schemaVersion: 1 })).toBe(false);
  });
});
