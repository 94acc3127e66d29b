/**
 * lib/agent/metrics.ts and the health of lib/agent/task.ts, as text.
 */
import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  durationBounds,
  type Family,
  formatAsked,
  formatMetrics,
  histogramSamples,
  newHistogram,
  observe,
  openLedgerCounts,
  readPosition,
  writePosition,
} from "../lib/agent/metrics.ts";
import { openHealth } from "../lib/agent/task.ts";
import { closeState } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import type { LedgerRow } from "../lib/record.ts";
import { pruneLedger } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { makeHost, tempDir } from "./fakes.ts";
import { ledgerRow, startMs, withLedger } from "./record.ts";

describe("formatMetrics()", () => {
  test("each kind, as OpenMetrics has it", () => {
    const histogram = newHistogram();
    for (const seconds of [0.004, 0.005, 0.3, 61]) observe(histogram, seconds);
    const families: Family[] = [
      { name: "a", type: "info", help: "A.", samples: [{ labels: { version: "1" }, value: 1 }] },
      { name: "b", type: "counter", help: "B.", samples: [{ value: 3 }] },
      { name: "c", type: "gauge", help: "none", samples: [] },
      {
        ...{ name: "d_seconds", type: "histogram", unit: "seconds", help: "D." },
        samples: histogramSamples(histogram, { network: "blue" }).filter(
          ({ labels }) => !["0.01", "0.025", "0.05", "0.1", "0.25"].includes(labels?.["le"] ?? ""),
        ),
      },
      { name: "e", type: "gauge", help: "E.", samples: [{ value: Infinity }, { value: 0.25 }] },
    ];
    expect(formatMetrics(families, "openmetrics")).toBe(`# TYPE a info
# HELP a A.
a_info{version="1"} 1.0
# TYPE b counter
# HELP b B.
b_total 3.0
# TYPE d_seconds histogram
# UNIT d_seconds seconds
# HELP d_seconds D.
d_seconds_bucket{network="blue",le="0.005"} 2.0
d_seconds_bucket{network="blue",le="0.5"} 3.0
d_seconds_bucket{network="blue",le="1.0"} 3.0
d_seconds_bucket{network="blue",le="2.5"} 3.0
d_seconds_bucket{network="blue",le="5.0"} 3.0
d_seconds_bucket{network="blue",le="10.0"} 3.0
d_seconds_bucket{network="blue",le="30.0"} 3.0
d_seconds_bucket{network="blue",le="60.0"} 3.0
d_seconds_bucket{network="blue",le="+Inf"} 4.0
d_seconds_count{network="blue"} 4.0
d_seconds_sum{network="blue"} 61.309
# TYPE e gauge
# HELP e E.
e +Inf
e 0.25
# EOF
`);
    const plain = formatMetrics(families, "prometheus");
    expect(plain).toStartWith(`# TYPE a_info gauge
# HELP a_info A.
a_info{version="1"} 1.0
# TYPE b_total counter
# HELP b_total B.
b_total 3.0
# TYPE d_seconds histogram
# HELP d_seconds D.
d_seconds_bucket`);
    expect(plain).toEndWith("\ne 0.25\n");
    expect(durationBounds.toSorted((a, b) => a - b)).toEqual([...durationBounds]);
  });

  test.each([
    ["a quote", '"', '\\"'],
    ["a backslash", "\\", "\\\\"],
    ["a new line", 'a\n# EOF\nb 1"', 'a\\n# EOF\\nb 1\\"'],
    ["half a character", "\ud800x", "\ufffdx"],
  ])("a label cannot break out by %s", (_what, value, expected) => {
    const samples = [{ labels: { network: value }, value: 1 }];
    const [, , line, ...rest] = formatMetrics(
      [{ name: "a", type: "gauge", help: "", samples }],
      "openmetrics",
    )
      .trimEnd()
      .split("\n");
    expect([line, ...rest]).toEqual([`a{network="${expected}"} 1.0`, "# EOF"]);
  });
});

describe("formatAsked()", () => {
  const open = "application/openmetrics-text";
  test.each([
    ["nothing", "", "prometheus"],
    ["anything", "*/*", "prometheus"],
    ["plain text", "text/plain;version=0.0.4", "prometheus"],
    ["OpenMetrics", `${open}; version=1.0.0; charset=utf-8`, "openmetrics"],
    [
      "OpenMetrics in quotes and capitals",
      'Application/OpenMetrics-Text;VERSION="1.0.0"',
      "openmetrics",
    ],
    ["OpenMetrics of any version", open, "openmetrics"],
    ["OpenMetrics of an unknown version", `${open};version=0.0.1`, "prometheus"],
    ["OpenMetrics not at all", `${open};q=0,text/plain;q=0.1`, "prometheus"],
    ["plain text rather", `${open};q=0.4,text/plain;q=0.5`, "prometheus"],
    [
      "what Prometheus asks for",
      `${open};version=1.0.0;q=0.5,${open};version=0.0.1;q=0.4,` +
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
      "openmetrics",
    ],
    ["nonsense", `;;=,${open};q=x,;q=1`, "prometheus"],
  ] as const)("%s", (_what, accept, expected) => {
    expect(formatAsked(accept)).toBe(expected);
  });
});

describe("openHealth()", () => {
  test.each([
    ["before the first round", 0, [], ["p: it has not gone round yet"]],
    ["after a round", 0, ["beat"], []],
    ["at its limit", 60_000, ["beat"], []],
    ["in silence", 61_000, ["beat"], ["p: silent for 61 s"]],
    ["after a failure", 0, ["beat", "failed"], ["p: no rights"]],
    ["after a failure, begun anew", 0, ["beat", "failed", "begin"], ["p: no rights"]],
    ["after a round that follows it", 0, ["beat", "failed", "begin", "beat"], []],
  ] as const)("a part %s", (_when, passedMs, said, expected) => {
    let nowMs = 1000;
    const health = openHealth(() => nowMs);
    health.begin("p");
    for (const what of said) {
      if (what === "failed") health.failed("p", "no rights");
      else health[what]("p");
    }
    nowMs += passedMs;
    expect(health.reasons()).toEqual([...expected]);
  });

  test("a part may say that it will be silent for longer", () => {
    let nowMs = 0;
    const health = openHealth(() => nowMs);
    health.beat("slow", 600_000);
    health.beat("other");
    nowMs = 70_000;
    expect(health.reasons()).toEqual(["other: silent for 70 s"]);
  });

  test("counts", () => {
    const health = openHealth();
    health.count("api");
    health.count("api", 2);
    expect([health.counted("api"), health.counted("database")]).toEqual([3, 0]);
  });
});

/** Rows written, and what was counted of them. */
function tallied(rows: Partial<LedgerRow>[], position = { inode: -1, id: 0 }) {
  using dir = tempDir();
  withLedger(dir.path, (state) => insertLedger(state, rows.map(ledgerRow)));
  const state = openState(makeHost(), dir.path);
  try {
    const counts = openLedgerCounts(position);
    while (counts.read(state));
    const requests = [...counts.requests.values()].map(
      ({ labels, value }) => `${Object.values(labels).join(" ")} ${value}`,
    );
    const durations = [...counts.durations.values()].map(
      ({ labels, value: { counts, sum } }) =>
        `${Object.values(labels).join(" ")} ${counts.reduce((a, b) => a + b, 0)} ${sum}`,
    );
    return { requests, durations };
  } finally {
    closeState(state);
  }
}

describe("openLedgerCounts()", () => {
  test("calls by what became of them, networks by how long they took", () => {
    expect(
      tallied([
        { durationUs: 20_000 },
        { durationUs: 40_000, network: "red" },
        { kind: "plugin" },
        { kind: "call" },
        { kind: "call" },
        { outcome: "denied", code: 100 },
        { kind: "call", outcome: "denied", code: 100 },
        { command: "DEL", outcome: "failed", code: 11, durationUs: -5 },
        { kind: "call", command: "DEL", outcome: "failed", code: 11 },
        { kind: "call", command: "rm -rf" },
      ]),
    ).toEqual({
      requests: ["ADD ok 0 2", "ADD denied 100 1", "DEL failed 11 1", "other ok 0 1"],
      durations: ["ADD blue 1 0.02", "ADD red 1 0.04", "DEL blue 1 0"],
    });
  });

  test("is bounded, whatever the ledger holds", () => {
    const rows = Array.from({ length: 5000 }, (_, i): Partial<LedgerRow>[] => [
      { network: `n${i}` },
      { kind: "call", code: i, outcome: "failed" },
    ]).flat();
    const { requests, durations } = tallied(rows);
    expect([requests.length, durations.length]).toEqual([33, 65]);
    expect([requests.at(-1), durations.at(-1)?.replace(/ \S+$/, "")]).toEqual([
      "ADD failed other 4968",
      "ADD other 4936",
    ]);
  });

  test("an agent that is new on the node counts from now on", () => {
    using dir = tempDir();
    withLedger(dir.path, (state) => insertLedger(state, [ledgerRow({ kind: "call" })]));
    const state = openState(makeHost(), dir.path);
    const counts = openLedgerCounts();
    expect([counts.read(state), counts.requests.size]).toEqual([false, 0]);
    insertLedger(state, [ledgerRow({ kind: "call" })]);
    counts.read(state);
    expect([...counts.requests.values()].map(({ value }) => value)).toEqual([1]);
    closeState(state);
  });

  test("pruning takes nothing back, and ids that begin anew are counted", () => {
    using dir = tempDir();
    withLedger(dir.path, (state) =>
      insertLedger(state, [ledgerRow({ kind: "call" }), ledgerRow({ kind: "call" })]),
    );
    const state = openState(makeHost(), dir.path);
    const counts = openLedgerCounts({ inode: -1, id: 0 });
    const value = () => [...counts.requests.values()][0]?.value;
    counts.read(state);
    expect(value()).toBe(2);
    expect(pruneLedger(state, startMs + 2000, 1000)).toBe(2);
    counts.read(state);
    insertLedger(state, [ledgerRow({ kind: "call" })]);
    counts.read(state);
    expect(value()).toBe(3);
    closeState(state);
  });

  test.each([
    ["as it was written", { inode: 7, id: 9 }, { inode: 7, id: 9 }],
    ["damaged", "{", undefined],
    ["of another kind", '{"inode":"7","id":9}', undefined],
    ["a number", "7", undefined],
  ])("where it stands, %s", (_what, written, expected) => {
    using dir = tempDir();
    const file = join(dir.path, "agent.json");
    expect(readPosition(file)).toBeUndefined();
    if (typeof written === "string") writeFileSync(file, written);
    else writePosition(file, written);
    expect(readPosition(file)).toEqual(expected);
  });
});
