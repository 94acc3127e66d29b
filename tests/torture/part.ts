/**
 * What a part of the torture bench is: many cases, each made from a seed of its own, so that one
 * that failed is repeated alone. Case number n of a run with seed s has seed s + n.
 */
import type { Need } from "../needs.ts";
import { type Random, randomOf } from "./seed.ts";

/** How a part is asked to run. */
export interface PartOptions {
  /** Of the first case. */
  seed: number;
  /** The form for every change that lands: as many cases as fit into seconds. */
  short: boolean;
  /** How many cases, in place of what the form has. */
  count?: number;
  /** When no further case is begun, ms since the epoch. */
  untilMs: number;
}

/** A case that went wrong. */
export interface Failure {
  /** Repeats it: `bun run torture <part> --seed <seed> --count 1`. */
  seed: number;
  what: string;
}

/** How a part ended. */
export interface Outcome {
  /** How many of what, for people: `{ kills: 300, "second ADDs": 52 }`. */
  counts: Record<string, number>;
  failures: Failure[];
}

/** A part. */
export interface Part {
  title: string;
  /** What it needs besides the binary. */
  needs: readonly Need[];
  /** Limits for the whole part, in seconds: no case is begun later. */
  limitSeconds: { short: number; full: number };
  run: (options: PartOptions) => Promise<Outcome>;
}

/** Counts something: `count("kills")`. */
export type Count = (what: string, by?: number) => void;

/** One case: what it is made from, its number in the run, and where it counts. */
export interface Case {
  random: Random;
  seed: number;
  index: number;
  /** Which of the workers runs it, from 0. */
  worker: number;
  count: Count;
}

/** How cases are run. */
export interface Cases {
  /** How many in each form. */
  short: number;
  full: number;
  /** How many at once. */
  workers: number;
  /** No case takes longer unless something hangs, in seconds; default 120. */
  caseSeconds?: number;
}

/** After so many failures the rest would only say the same. */
const failuresMax = 20;

/**
 * Runs cases until all are done, the time is over, or too many failed. A case fails by throwing, or
 * by not ending in its time.
 */
export async function runCases(
  { seed: first, short, count: asked, untilMs }: PartOptions,
  { short: inShort, full: inFull, workers, caseSeconds = 120 }: Cases,
  runCase: (one: Case) => Promise<void>,
): Promise<Outcome> {
  const total = asked ?? (short ? inShort : inFull);
  const counts: Record<string, number> = { cases: 0 };
  const count: Count = (what, by = 1) => {
    counts[what] = (counts[what] ?? 0) + by;
  };
  const failures: Failure[] = [];
  let next = 0;
  const work = async (worker: number) => {
    while (next < total && Date.now() < untilMs && failures.length < failuresMax) {
      const index = next++;
      const seed = first + index;
      try {
        const one = { random: randomOf(seed), seed, index, worker, count };
        await inTime(runCase(one), caseSeconds);
        count("cases");
      } catch (error) {
        failures.push({ seed, what: error instanceof Error ? error.message : String(error) });
      }
    }
  };
  await Promise.all(Array.from({ length: Math.min(workers, total) }, (_, i) => work(i)));
  const left = total - next;
  if (left > 0) count("cases left out", left);
  return { counts, failures };
}

async function inTime(work: Promise<void>, seconds: number): Promise<void> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    const error = new Error(`the case did not end within ${seconds} s`);
    timer = setTimeout(() => reject(error), seconds * 1000);
  });
  try {
    await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
  }
}
