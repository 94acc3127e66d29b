/**
 * What nobody needs any more, and taking it away: attachments on record, addresses that host-local
 * keeps for nobody, locks of dead processes. Used by CNI GC, which has the runtime's list, and by
 * `genie gc`, which has what is alive on the node. A pod that lives is never touched: an attachment
 * `planned` or `attached` whose network namespace is there stays, whatever else is seen.
 */
import { existsSync } from "node:fs";
import { dirname } from "node:path";
import { CniError, code, type Host, log, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { type State, write } from "./database.ts";
import type { ChainOptions } from "./delegate.ts";
import { canonicalIP } from "./ip.ts";
import { type Journal, noteInterrupted, writeAside } from "./ledger.ts";
import { type Alive, lookAround, seesProcesses } from "./live_containers.ts";
import {
  abandonedOperations,
  endAbandoned,
  newOperation,
  type Operation,
  release,
  takeLock,
} from "./lock.ts";
import type { NetworkConfigList } from "./netconf.ts";
import { bootId, isForeignNetns, netnsId } from "./netns.ts";
import { listNetworks } from "./networks.ts";
import { isStray, type Reservation, readReservations, releaseReservation } from "./reservations.ts";
import {
  attachments,
  forget,
  hasRuleset,
  type Recorded,
  recorded,
  type StoredAttachment,
  setFailing,
} from "./state.ts";
import { forgetTraffic } from "./traffic.ts";
import { type Fate, fateOf, storedResult, undo } from "./undo.ts";

/** One thing that nobody needs, and why that is so. */
export type Garbage =
  | { kind: "attachment"; row: StoredAttachment; why: string }
  | { kind: "reservation"; reservation: Reservation; why: string }
  | { kind: "lock"; operation: Operation; why: string };

/** What decides. */
export interface Situation {
  /** Lists of our networks, see {@link listsOf}. */
  lists: readonly NetworkConfigList[];
  /** Undefined where nobody can be seen: then only what was given up is garbage. */
  alive: Alive | undefined;
  /** How long the runtime retries a DEL that fails, in ms. */
  windowMs: number;
  nowMs: number;
}

/** Finds all of it. Reads alone. @throws CniError 106 when the record cannot be read */
export function findGarbage(host: Host, state: State, situation: Situation): Garbage[] {
  const { lists, alive, nowMs } = situation;
  const found = recorded(host, state);
  const stale = found.readable.flatMap((row): Garbage[] => {
    const why = whyStale(row, situation);
    return why === undefined ? [] : [{ kind: "attachment", row, why }];
  });
  const evidence = alive && { ...alive, known: containersOf(found) };
  const stray = evidence ? readAll(lists, nowMs).filter((one) => isStray(one, evidence)) : [];
  return [
    // In reverse: as DEL undoes them.
    ...stale.reverse(),
    ...stray.map((reservation): Garbage => {
      const why = `container ${reservation.containerId} has no attachment, nor any process`;
      return { kind: "reservation", reservation, why };
    }),
    ...abandonedOperations(state, nowMs).map((operation): Garbage => {
      return { kind: "lock", operation, why: `process ${operation.pid} is dead` };
    }),
  ];
}

function readAll(lists: readonly NetworkConfigList[], nowMs: number): Reservation[] {
  // A network may be known in two versions of its list, over one store.
  const all = lists.flatMap((list) => readReservations(list, nowMs));
  return [...new Map(all.map((one) => [`${one.dir}/${one.address}`, one])).values()];
}

/** Why an attachment is nobody's any more; undefined for one that may be somebody's. */
export function whyStale(
  row: StoredAttachment,
  { alive, windowMs, nowMs }: Omit<Situation, "lists">,
): string | undefined {
  if (row.state === "leaked") return `its DEL was given up: ${row.error}`;
  if (row.state === "failing" && row.failedAtMs > 0 && nowMs - row.failedAtMs >= windowMs) {
    return `its DEL fails since ${new Date(row.failedAtMs).toISOString()}: ${row.error}`;
  }
  if (netnsFate(row) === "unknown" || !alive || isHidden(row, alive)) return undefined;
  if (alive.hasContainer(row.containerId)) return undefined;
  return "its network namespace is gone, and no process is of its container";
}

/**
 * Is its namespace there, though not at its path? The kernel gives the number of one that is gone
 * to the next one that is made: then nobody has its addresses.
 */
function isHidden(row: StoredAttachment, { netns, addresses }: Alive): boolean {
  const ips = storedResult(row)?.ips ?? [];
  const has = ({ address }: { address: string }) =>
    addresses.has(canonicalIP(address.replace(/\/.*/, "")) ?? address);
  return netns.has(row.netnsId) && (ips.length === 0 || ips.some(has));
}

/** What became of the network namespace of an attachment, as far as that is certain. */
export function netnsFate({
  netns,
  netnsId: id,
}: Pick<StoredAttachment, "netns" | "netnsId">): "gone" | "rebooted" | "unknown" {
  if (netns === "" || id === "") return "unknown";
  if (!id.startsWith(`${bootId()}:`)) return "rebooted";
  const found = netnsId(netns);
  if (found === id) return "unknown";
  // Where its folder is not there either, we do not see what the runtime sees; that of a process
  // goes with it.
  const isSeen = /^\/proc\/\d+\//.test(netns) ? seesProcesses() : existsSync(dirname(netns));
  if (found === "") return isSeen ? "gone" : "unknown";
  // A plain file: a mount that we do not see.
  return isForeignNetns(netns) ? "gone" : "unknown";
}

/** Containers of which anything is on record. */
function containersOf({ readable, damaged }: Recorded): Set<string> {
  return new Set([...readable, ...damaged].map(({ containerId }) => containerId));
}

/**
 * The lists of our networks: those on record and those of the plugin table. Any other list in the
 * conf dir may serve another runtime, whose containers nobody here knows (cni#1098).
 */
export function listsOf(
  rows: readonly StoredAttachment[],
  config: Config | undefined,
): NetworkConfigList[] {
  const table = config ? listNetworks(config).networks.filter(({ entry }) => entry) : [];
  const all = [...rows, ...table].map(({ list }) => list).filter(({ disableGC }) => !disableGC);
  return [...new Map(all.map((list) => [JSON.stringify(list), list])).values()];
}

/** What a DEL of a row needs besides it. */
export interface CollectOptions {
  /** Further folders to look for its binaries in. */
  path: string[];
  chain: ChainOptions;
  windowMs: number;
}

/**
 * DEL of one attachment, and of its record what the outcome says. Call under its container's lock,
 * or everybody's.
 */
export async function collectAttachment(
  host: Host,
  state: State,
  row: StoredAttachment,
  { path, chain, windowMs }: CollectOptions,
): Promise<{ fate: Fate; errors: CniError[] }> {
  noteInterrupted(chain.journal, row);
  const errors = await undo(host, row, path, { ...chain, netns: row.netns });
  const nowMs = host.now();
  const fate = fateOf(row, errors, windowMs, nowMs);
  try {
    write(state, () => {
      if (fate === "gone") {
        forget(state, row);
        return writeAside(host, state, "traffic", () => forgetTraffic(state, row.containerId));
      }
      const error = errors.map(({ message }) => message).join("; ");
      return setFailing(state, row, { state: fate, error, nowMs });
    });
    if (fate === "gone" && hasRuleset(state, row.netnsId)) {
      const { liftRuleset } = await import("./policy/rulesets.ts");
      await liftRuleset(host, state, row, row);
    }
  } catch (error) {
    errors.push(toCniError(error));
  }
  return { fate, errors };
}

/** What collecting one thing needs besides it. */
export interface Collecting {
  host: Host;
  state: State;
  situation: Situation;
  journal: Journal;
  /** Further folders to look for binaries in. */
  path: string[];
}

/** How long another operation of a container is waited for, in ms, and a whole collection. */
const busyMs = 10_000;
const collectMs = 600_000;

/** Takes one thing away, if it is still nobody's under its lock. @returns why it remains */
export function collectOne(work: Collecting, one: Garbage): Promise<CniError | undefined> {
  return collectAny(work, one).catch((error: unknown) => toCniError(error));
}

function collectAny(work: Collecting, one: Garbage): Promise<CniError | undefined> {
  switch (one.kind) {
    case "attachment":
      return collectRow(work, one.row);
    case "reservation":
      return releaseOne(work, one.reservation);
    case "lock":
      return endAbandoned(work.state, one.operation).then(() => undefined);
  }
}

/** DEL of one attachment, if it is still nobody's under the container's lock. */
async function collectRow(
  { host, state, situation, journal, path }: Collecting,
  { containerId, ifName }: { containerId: string; ifName: string },
): Promise<CniError | undefined> {
  const operation = newOperation(host, containerId, "GC");
  const deadlineMs = host.now() + busyMs;
  const find = () => attachments(host, state, containerId).find((row) => row.ifName === ifName);
  const row = await takeLock(host, state, operation, { deadlineMs, signal: host.signal }, find);
  try {
    // Its runtime came first.
    if (!row || whyStale(row, situation) === undefined) return undefined;
    const chain = {
      ...{ netns: "", token: operation.token, deadlineMs: host.now() + collectMs },
      ...{ signal: host.signal, journal },
    };
    const options = { path, chain, windowMs: situation.windowMs };
    const { errors } = await collectAttachment(host, state, row, options);
    return errors[0];
  } finally {
    release(state, operation, () => undefined);
  }
}

/** Releases an address, if nobody has come for it since. */
async function releaseOne(
  { host, state, situation: { alive } }: Collecting,
  one: Reservation,
): Promise<CniError | undefined> {
  const { readable, damaged } = recorded(host, state, one.containerId);
  const known = new Set([...readable, ...damaged].map(({ containerId }) => containerId));
  if (alive && isStray(one, { ...alive, known })) {
    await releaseReservation(host, one, host.now() + busyMs);
    return undefined;
  }
  return new CniError(code.tryAgainLater, `Container ${one.containerId} has just come`);
}

/**
 * Releases the reservations of our networks that nobody has: host-local before 1.3 knows no GC.
 * @param valid containers of the runtime's list
 * @returns the errors
 */
export async function releaseStray(
  host: Host,
  state: State,
  lists: readonly NetworkConfigList[],
  valid: ReadonlySet<string>,
  deadlineMs: number,
): Promise<CniError[]> {
  const known = new Set([...valid, ...containersOf(recorded(host, state))]);
  const candidates = readAll(lists, host.now()).filter(
    ({ containerId }) => !known.has(containerId),
  );
  // A look at all processes is dear.
  const alive = candidates.length > 0 ? lookAround() : undefined;
  if (!alive) return [];
  const errors: CniError[] = [];
  for (const one of candidates.filter((each) => isStray(each, { ...alive, known }))) {
    const { network, address, containerId } = one;
    try {
      await releaseReservation(host, one, deadlineMs);
      log(host, "info", "Released an address of nobody", { network, address, containerId });
    } catch (error) {
      errors.push(toCniError(error));
    }
  }
  return errors;
}
