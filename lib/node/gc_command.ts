/**
 * `genie gc`: the operator's garbage collection, without a runtime's list. Finds what nobody needs
 * by what is alive on the node, and collects it container by container, so that pods start
 * meanwhile; with `--dry-run` it reads a copy of the record and changes nothing.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Flags, text } from "../cli/usage.ts";
import { type CniError, type Host, log, toCniError } from "../cni.ts";
import { type Collecting, collectOne, findGarbage, type Garbage, listsOf } from "../collect.ts";
import type { Config } from "../config/schema.ts";
import { closeState, openCopy, openState, type State } from "../database.ts";
import { beginJournal, writeAlone } from "../ledger.ts";
import { lookAround } from "../live_containers.ts";
import { formatTable } from "../report/table.ts";
import { loadConfig, loadNodeSettings } from "../settings.ts";
import { attachments } from "../state.ts";
import { readOwnConfig } from "./genie_config.ts";

/** One thing that nobody needs, as it is told. */
export interface Collected {
  kind: Garbage["kind"];
  /** An interface, an address, or an operation. */
  what: string;
  network: string;
  /** `namespace/name`, "" where nobody knows. */
  pod: string;
  containerId: string;
  why: string;
  outcome: "found" | "collected" | "failed";
  /** Why it is still there. */
  error: string;
}

/**
 * Runs `genie gc`.
 *
 * @param width columns of the terminal, Infinity for none
 * @returns exit status: 1 when something remains
 * @throws CniError 106 when the record cannot be used
 */
export async function runGc(host: Host, flags: Flags, width: number): Promise<number> {
  const isDry = flags["dry-run"] === true;
  host.catchSignals?.();
  const own = readOwnConfig(text(flags, "cni-config"));
  const { stateDir, delRetryWindowMs: windowMs } = await loadNodeSettings(host, own);
  const config = await loadConfig(own).catch((error: unknown) => {
    log(host, "warn", `Of networks those on record alone: ${toCniError(error).message}`);
    return undefined;
  });
  const isThere = existsSync(join(stateDir, "genie.db"));
  const open = () => (isDry ? openCopy(stateDir) : openState(host, stateDir));
  const state = isDry && !isThere ? undefined : open();
  try {
    const all = state ? await collectAll(host, state, { config, windowMs, flags }) : [];
    host.stdout(flags["json"] ? `${JSON.stringify(all, null, 2)}\n` : formatAll(all, width));
    return all.every(({ outcome }) => outcome === "collected") ? 0 : 1;
  } finally {
    if (state) closeState(state);
  }
}

async function collectAll(
  host: Host,
  state: State,
  given: { config: Config | undefined; windowMs: number; flags: Flags },
): Promise<Collected[]> {
  const { config, windowMs, flags } = given;
  const lists = listsOf(attachments(host, state), config);
  const alive = lookAround();
  if (!alive) {
    log(host, "warn", "Others cannot be seen here: run it as root in the node's own pid namespace");
  }
  const situation = { lists, alive, windowMs, nowMs: host.now() };
  const network = text(flags, "network");
  const garbage = findGarbage(host, state, situation).filter(
    (one) => network === undefined || networksOf(one).includes(network),
  );
  if (flags["dry-run"]) return garbage.map((one) => told(one, "found", ""));
  const journal = beginJournal(host, {
    ...{ command: "GC", containerId: "", network: network ?? "", ifName: "" },
    ...{ decidedBy: "operator", pod: { namespace: "", name: "", uid: "" } },
  });
  const work: Collecting = { host, state, situation, journal, path: config?.binDirs ?? [] };
  const all: Collected[] = [];
  let failure: CniError | undefined;
  for (const one of garbage) {
    const error = await collectOne(work, one);
    all.push(told(one, error ? "failed" : "collected", error?.message ?? ""));
    failure ??= error;
  }
  if (garbage.length > 0) writeAlone(host, state, journal, failure);
  return all;
}

/** Names under which a thing's network may be asked for. */
function networksOf(one: Garbage): string[] {
  if (one.kind === "attachment") return [one.row.network, one.row.list.name];
  return one.kind === "reservation" ? [one.reservation.network] : [];
}

function told(one: Garbage, outcome: Collected["outcome"], error: string): Collected {
  const { kind, why } = one;
  const end = { why, outcome, error };
  switch (one.kind) {
    case "attachment": {
      const { ifName, network, pod, containerId } = one.row;
      const name = pod.name === "" ? "" : `${pod.namespace}/${pod.name}`;
      return { kind, what: ifName, network, pod: name, containerId, ...end };
    }
    case "reservation": {
      const { address, network, containerId } = one.reservation;
      return { kind, what: address, network, pod: "", containerId, ...end };
    }
    case "lock": {
      const { command, containerId } = one.operation;
      return { kind, what: command, network: "", pod: "", containerId, ...end };
    }
  }
}

/** What was found and what became of it, for people. */
export function formatAll(all: readonly Collected[], width: number): string {
  if (all.length === 0) return "Nothing to collect\n";
  const columns = [
    { title: "KIND" },
    { title: "WHAT" },
    { title: "NETWORK" },
    { title: "POD OR CONTAINER", shrinks: true },
    { title: "WHY", wraps: true },
    { title: "OUTCOME", wraps: true },
  ];
  const rows = all.map((one) => [
    ...[one.kind, one.what, one.network, one.pod || one.containerId, one.why],
    one.error === "" ? one.outcome : `${one.outcome}: ${one.error}`,
  ]);
  const count = (outcome: string) => all.filter((one) => one.outcome === outcome).length;
  const found = count("found");
  const sum =
    found > 0
      ? `${found} to collect; nothing was changed`
      : `${count("collected")} collected, ${count("failed")} remain`;
  return `${formatTable(columns, rows, width)}\n${sum}\n`;
}
