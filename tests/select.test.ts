/** Ranking of candidates: lib/choice/rank.ts is pure, so all of this is tables and properties. */
import { describe, expect, test } from "bun:test";
import { type Candidate, type Kpi, kpis, rank } from "../lib/choice/rank.ts";
import { noise } from "./record.ts";

const weights = { occupancy: 4, response_time: 3, failures: 2, bandwidth: 1, subnets: 0 };
const none = { occupancy: 0, response_time: 0, failures: 0, bandwidth: 0, subnets: 0 };
const only = (kpi: Kpi) => ({ ...none, [kpi]: 1 });

/** A candidate of which nothing is known, but for what is given. */
const candidate = (network: string, known: Partial<Candidate> = {}): Candidate => ({
  network,
  occupancy: undefined,
  responseTimeUs: undefined,
  failures: undefined,
  bandwidth: undefined,
  subnets: undefined,
  recent: 0,
  ...known,
});

const order = (candidates: Candidate[], by: Record<Kpi, number> = weights) =>
  rank(candidates, by)
    .map(({ candidate: { network } }) => network)
    .join(" ");

describe("rank()", () => {
  test.each<[string, Candidate[], Record<Kpi, number>, string]>([
    [
      "the freest first",
      [candidate("a", { occupancy: 0.5 }), candidate("b", { occupancy: 0.1 })],
      weights,
      "b a",
    ],
    [
      "the fastest first",
      [candidate("a", { responseTimeUs: 20_000 }), candidate("b", { responseTimeUs: 10_000 })],
      weights,
      "b a",
    ],
    [
      "the most reliable first",
      [candidate("a", { failures: 0.2 }), candidate("b", { failures: 0 })],
      weights,
      "b a",
    ],
    [
      "the quietest first",
      [candidate("a", { bandwidth: 9e6 }), candidate("b", { bandwidth: 1e6 })],
      weights,
      "b a",
    ],
    [
      "the one with most subnets, where that has a weight",
      [candidate("a", { subnets: 1 }), candidate("b", { subnets: 4 })],
      only("subnets"),
      "b a",
    ],
    [
      "no KPI of weight 0",
      [candidate("a", { subnets: 1 }), candidate("b", { subnets: 4 })],
      weights,
      "a b",
    ],
    [
      "the table's order where no weight is left",
      [candidate("b", { occupancy: 0.9 }), candidate("a", { occupancy: 0 }), candidate("c")],
      none,
      "b a c",
    ],
    [
      "the table's order where nothing is known",
      ["c", "a", "b"].map((name) => candidate(name)),
      weights,
      "c a b",
    ],
    [
      "the table's order where all is the same",
      ["c", "a", "b"].map((name) => candidate(name, { occupancy: 0.3, failures: 0.1, recent: 5 })),
      weights,
      "c a b",
    ],
    [
      "unknown between the better and the worse: neutral, not best",
      [
        candidate("full", { occupancy: 0.9 }),
        candidate("unknown"),
        candidate("free", { occupancy: 0.1 }),
      ],
      weights,
      "free unknown full",
    ],
    [
      "unknown like the only one that is known",
      [candidate("unknown"), candidate("known", { occupancy: 0.9, responseTimeUs: 1e6 })],
      weights,
      "unknown known",
    ],
    [
      "fewer pods on their way, where no weight is left",
      [candidate("a", { recent: 1 }), candidate("b")],
      none,
      "b a",
    ],
    [
      "fewer pods on their way, of two that are equal",
      [candidate("a", { recent: 3 }), candidate("b", { recent: 2 })],
      weights,
      "b a",
    ],
    [
      "the full one last, whatever else speaks for it",
      [
        candidate("full", { occupancy: 1, responseTimeUs: 1, failures: 0 }),
        candidate("slow", { occupancy: 0.99, responseTimeUs: 1e6, failures: 1 }),
      ],
      { ...weights, occupancy: 0 },
      "slow full",
    ],
  ])("takes %s", (_name, candidates, by, expected) => {
    expect(order(candidates, by)).toBe(expected);
  });

  test("tells the figures that decided", () => {
    const ranked = rank(
      [
        candidate("a", { occupancy: 0.5, responseTimeUs: 40_000, failures: 0.5, subnets: 1 }),
        candidate("b", { occupancy: 0, responseTimeUs: 10_000, bandwidth: 1e6, subnets: 2 }),
      ],
      weights,
    );
    const figures = ranked.map(({ candidate: { network }, score, figures }) => ({
      network,
      score,
      ...figures,
    }));
    expect(figures).toEqual([
      {
        ...{ network: "b", score: 8.5, occupancy: 1, response_time: 1, failures: 0.5 },
        ...{ bandwidth: 0.5, subnets: 1 },
      },
      {
        ...{ network: "a", score: 5, occupancy: 0.5, response_time: 0.5, failures: 0.5 },
        ...{ bandwidth: 0.5, subnets: 0.5 },
      },
    ]);
    const [unknown] = rank([candidate("a")], weights);
    expect(unknown).toMatchObject({ score: 0, figures: { occupancy: undefined } });
    expect(rank([], weights)).toEqual([]);
  });

  test("does not change what it is given, and is the same each time", () => {
    const random = noise(3);
    const all = Array.from({ length: 8 }, (_, i) => arbitrary(`n${i}`, random));
    const before = structuredClone(all);
    expect(rank(all, weights)).toEqual(rank(structuredClone(all), weights));
    expect(all).toEqual(before);
  });

  const odd = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, -1, 1e308, 5e-324];
  test("gives finite scores for any number, and leaves the others' figures whole", () => {
    const sane = candidate("sane", {
      occupancy: 0.5,
      responseTimeUs: 1e4,
      failures: 0,
      subnets: 2,
    });
    for (const value of odd) {
      for (const key of ["occupancy", "responseTimeUs", "failures", "bandwidth", "subnets"]) {
        const strange = candidate("odd", { ...sane, network: "odd", [key]: value });
        for (const by of [
          weights,
          { ...weights, subnets: value },
          { ...weights, occupancy: value },
        ]) {
          const ranked = rank([strange, sane, candidate("c", { recent: value })], by);
          for (const { score, figures } of ranked) {
            const all = [score, ...kpis.map((kpi) => figures[kpi] ?? 0)];
            expect([value, key, all.every(Number.isFinite)]).toEqual([value, key, true]);
          }
        }
      }
    }
  });
});

/** A candidate of which each thing is known or not. */
function arbitrary(network: string, random: Iterator<number>): Candidate {
  const next = () => Number(random.next().value);
  const maybe = (value: () => number) => (next() < 0.3 ? undefined : value());
  return {
    network,
    occupancy: maybe(() => next()),
    responseTimeUs: maybe(() => 1000 + next() * 1e6),
    failures: maybe(() => (next() < 0.5 ? 0 : next())),
    bandwidth: maybe(() => next() * 1e9),
    subnets: maybe(() => Math.ceil(next() * 8)),
    recent: next() < 0.5 ? 0 : Math.floor(next() * 100),
  };
}

describe("properties of rank()", () => {
  /** What makes a candidate worse. */
  const loads: [string, (one: Candidate, by: number) => Candidate][] = [
    ["fewer free addresses", (one, by) => worse(one, "occupancy", (was) => was + (1 - was) * by)],
    ["slower ADDs", (one, by) => worse(one, "responseTimeUs", (was) => was * (1 + 20 * by))],
    ["more failures", (one, by) => worse(one, "failures", (was) => was + (1 - was) * by)],
    ["more traffic", (one, by) => worse(one, "bandwidth", (was) => was + 1e9 * by)],
    ["fewer subnets", (one, by) => worse(one, "subnets", (was) => Math.floor(was * (1 - by)))],
    ["more pods on their way", (one, by) => ({ ...one, recent: one.recent + Math.ceil(100 * by) })],
  ];

  function worse(one: Candidate, key: keyof Candidate, change: (was: number) => number): Candidate {
    const was = one[key];
    return typeof was === "number" ? { ...one, [key]: change(was) } : one;
  }

  test.each(loads)("%s never improve a rank", (_name, load) => {
    const random = noise(11);
    const next = () => Number(random.next().value);
    for (let round = 0; round < 2000; round++) {
      const all = Array.from({ length: 2 + Math.floor(next() * 6) }, (_, i) =>
        arbitrary(`n${i}`, random),
      );
      const by = Object.fromEntries(
        kpis.map((kpi) => [kpi, next() < 0.2 ? 0 : next() * 5]),
      ) as Record<Kpi, number>;
      const at = Math.floor(next() * all.length);
      const place = (candidates: Candidate[]) => order(candidates, by).split(" ").indexOf(`n${at}`);
      const heavier = all.map((one, i) => (i === at ? load(one, next()) : one));
      if (place(heavier) < place(all)) throw new Error(JSON.stringify({ at, by, all, heavier }));
    }
  });

  test("the order of the table decides between equals alone", () => {
    const random = noise(5);
    for (let round = 0; round < 500; round++) {
      const all = Array.from({ length: 5 }, (_, i) => arbitrary(`n${i}`, random));
      const scores = new Set(rank(all, weights).map(({ score }) => score));
      if (scores.size === all.length) expect(order(all.toReversed())).toBe(order(all));
    }
  });

  const herd = (one: Partial<Candidate>, other: Partial<Candidate>, by = weights) => {
    const recent = { a: 0, b: 0 };
    for (let pod = 0; pod < 100; pod++) {
      const ranked = rank(
        [
          candidate("a", { ...one, recent: recent.a }),
          candidate("b", { ...other, recent: recent.b }),
        ],
        by,
      );
      recent[ranked[0]?.candidate.network === "a" ? "a" : "b"]++;
    }
    return recent.a;
  };
  const busy = { occupancy: 0.1, responseTimeUs: 20_000, failures: 0, bandwidth: 1e6 };
  test.each<[string, Partial<Candidate>, Partial<Candidate>, Record<Kpi, number>, number, number]>([
    ["equal", {}, {}, weights, 50, 50],
    ["equal and measured", busy, busy, weights, 50, 50],
    ["equal but for noise", busy, { ...busy, responseTimeUs: 80_000 }, weights, 50, 60],
    ["equal, one of them unknown", busy, {}, weights, 50, 50],
    ["equal without weights", busy, {}, none, 50, 50],
    ["equal by occupancy alone", busy, busy, only("occupancy"), 50, 50],
    ["far from equal", busy, { ...busy, occupancy: 0.9, failures: 0.9 }, weights, 70, 99],
  ])("a herd spreads over two networks that are %s", (_name, one, other, by, least, most) => {
    const share = herd(one, other, by);
    expect(share).toBeGreaterThanOrEqual(least);
    expect(share).toBeLessThanOrEqual(most);
  });
});
