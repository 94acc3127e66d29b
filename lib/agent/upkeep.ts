/**
 * The agent's part that keeps the node in order, as a table of jobs that are done one after the
 * other, each in its own time. A job that fails is told once, and tried again when it is due.
 */

import { log, toCniError } from "../cni.ts";
import { write } from "../database.ts";
import { pause } from "../kubernetes/watch.ts";
import { pruneLedger } from "../ledger.ts";
import { sampleOldest } from "../traffic.ts";
import { collectStray, newCollector } from "./collect.ts";
import type { Agent } from "./part.ts";

/** One job. */
interface Job {
  name: string;
  /** How long after the end of one time the next one begins, in ms. */
  everyMs: number;
  /** @throws CniError what kept it from being done */
  run: (agent: Agent) => void | Promise<void>;
}

const makeJobs = ({ own }: Agent): readonly Job[] => [
  { name: "traffic", everyMs: 15_000, run: sampleAll },
  { name: "ledger", everyMs: 30_000, run: pruneAll },
  { name: "leftovers", everyMs: 20_000, run: newCollector(own) },
  { name: "strays", everyMs: 10 * 60_000, run: collectStray },
];

const tickMs = 1_000;
/** The whole of a job may take so long, in ms: plugins may hang. */
const silenceMs = 10 * 60_000;

/** Runs the part until the host's signal aborts. */
export async function runUpkeep(agent: Agent): Promise<void> {
  const { host, health } = agent;
  const dueMs = new Map<string, number>();
  const failing = new Set<string>();
  const jobs = makeJobs(agent);
  for (; !host.signal.aborted; await pause(tickMs, host.signal)) {
    health.beat("upkeep", silenceMs);
    for (const { name, everyMs, run } of jobs) {
      if (host.signal.aborted) return;
      if (performance.now() < (dueMs.get(name) ?? 0)) continue;
      try {
        await run(agent);
        if (failing.delete(name)) log(host, "info", `Upkeep works again: ${name}`);
      } catch (error) {
        const level = failing.has(name) ? "debug" : "warn";
        failing.add(name);
        log(host, level, `Upkeep failed: ${name}: ${toCniError(error).message}`);
      }
      dueMs.set(name, performance.now() + everyMs);
    }
  }
}

/** Interfaces counted in one transaction, which others wait for, and how old a count may get. */
const samplesMax = 32;
const sampleAgeMs = 60_000;

/** Counts what was not counted for a while, so that a choice between networks has fresh rates. */
async function sampleAll({ host, record }: Agent): Promise<void> {
  const limits = { max: samplesMax, minAgeMs: sampleAgeMs };
  const sample = () =>
    record.use((state) => {
      // Mostly there is none: no need to lock the others out.
      const { oldest } = state.database.query("SELECT min(at_ms) AS oldest FROM traffic").get() as {
        oldest: number | null;
      };
      if (oldest === null || oldest >= host.now() - sampleAgeMs) return 0;
      return write(state, () => sampleOldest(state, host.now(), limits));
    });
  while (sample() === samplesMax && !host.signal.aborted) await pause(1, host.signal);
}

/** Steps of one time: more than a busy node writes meanwhile. */
const pruneStepsMax = 40;

/** Takes what is too old or too much off the ledger; DEL does too, but a node may be quiet. */
async function pruneAll({ host, config, record }: Agent): Promise<void> {
  const prune = () =>
    record.use((state) => write(state, () => pruneLedger(state, host.now(), config.audit.keepMs)));
  for (let step = 0; step < pruneStepsMax && !host.signal.aborted; step++) {
    if (prune() === 0) return;
    await pause(1, host.signal);
  }
}
