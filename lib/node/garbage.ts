/**
 * `genie gc`: finds what nobody needs any more by what is alive on the node, without a runtime's
 * list, and takes it away: attachments on record, addresses that host-local keeps for nobody, locks
 * of dead processes. It goes container by container, so that pods can start meanwhile. A pod that
 * lives is never touched: an attachment `planned` or `attached` whose network namespace is there
 * stays, whatever else is seen. The agent collects by the same rules.
 */
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import type { Host } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { type Flags, text } from "../config/usage.ts";
import { closeState, type State } from "../database.ts";
import { collectAttachment, containersOf, listsOf } from "../gc.ts";
import { canonicalIP } from "../ip.ts";
import { bootId, isForeignNetns, netnsId } from "../kernel.ts";
import { beginJournal, writeAlone } from "../ledger.ts";
import { newOperation, release, takeLock } from "../lock.ts";
import type { NetworkConfigList } from "../networks.ts";
import { listNetworks } from "../node_networks.ts";
import type { Journal, Operation, StoredAttachment } from "../record.ts";
import { attachments, recorded, storedResult } from "../recorded.ts";
import { openCopy, openState } from "../recovery/database.ts";
import { networkName } from "../recovery/network_name.ts";
import { abandonedOperations, endAbandoned } from "../recovery/orphans.ts";
import {
  isUnowned,
  type Reservation,
  readAllReservations,
  releaseReservation,
} from "../recovery/reservations.ts";
import { formatTable } from "../report/table.ts";
import { loadConfig, loadNodeSettings } from "../settings.ts";
import { readOwnConfig } from "./genie_config.ts";
import { findLiveContainers, type LiveContainers, seesProcesses } from "./live_containers.ts";

/** One thing that nobody needs, in words. */
interface Finding {
  /** An interface, an address, or an operation. */
  what: string;
  network: string;
  /** `namespace/name`, "" where nobody knows. */
  pod: string;
  containerId: string;
  /** Why nobody needs it. */
  why: string;
}
/** One thing that nobody needs. */
export type Garbage = Finding &
  (
    | { kind: "attachment"; row: StoredAttachment }
    | { kind: "reservation"; reservation: Reservation }
    | { kind: "lock"; operation: Operation }
  );

/** What decides. */
export interface Situation {
  /** Lists of our networks, see {@link listsOf}. */
  lists: readonly NetworkConfigList[];
  /** Undefined where nobody can be seen: then only what was given up is garbage. */
  alive: LiveContainers | undefined;
  /** How long the runtime retries a DEL that fails, in ms. */
  windowMs: number;
  nowMs: number;
}

/** Finds all of it. Reads alone. @throws CniError 106 when the record cannot be read */
export function findGarbage(host: Host, state: State, situation: Situation): Garbage[] {
  const { lists, alive, nowMs } = situation;
  const found = recorded(host, state);
  const garbage: Garbage[] = [];
  // In reverse: as DEL undoes them.
  for (const row of found.readable.toReversed()) {
    const why = whyStale(row, situation);
    if (why === undefined) continue;
    const { ifName: what, network, containerId } = row;
    const pod = row.pod.name === "" ? "" : `${row.pod.namespace}/${row.pod.name}`;
    garbage.push({ kind: "attachment", row, what, network, pod, containerId, why });
  }
  const known = containersOf(found);
  for (const reservation of alive ? readAllReservations(lists, nowMs) : []) {
    if (!alive || !isUnowned(reservation, { ...alive, known })) continue;
    const { address: what, network, containerId } = reservation;
    const why = `container ${containerId} has no attachment, nor any process`;
    garbage.push({ kind: "reservation", reservation, what, network, pod: "", containerId, why });
  }
  for (const operation of abandonedOperations(state, nowMs)) {
    const { command: what, containerId, pid } = operation;
    const why = `process ${pid} is dead`;
    garbage.push({ kind: "lock", operation, what, network: "", pod: "", containerId, why });
  }
  return garbage;
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
  if (netnsState(row) === "unknown" || !alive || isHidden(row, alive)) return undefined;
  if (alive.hasContainer(row.containerId)) return undefined;
  return "its network namespace is gone, and no process is of its container";
}

/** Is its namespace there, though not at its path? */
function isHidden(row: StoredAttachment, { netns, addresses }: LiveContainers): boolean {
  // The kernel gives the number of one that is gone to the next: then nobody has its addresses.
  const ips = storedResult(row)?.ips ?? [];
  const has = ({ address }: { address: string }) =>
    addresses.has(canonicalIP(address.replace(/\/.*/, "")) ?? address);
  return netns.has(row.netnsId) && (ips.length === 0 || ips.some(has));
}

/** What became of the network namespace of an attachment, as far as that is certain. */
export function netnsState({
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

/** What collecting one thing needs besides it. */
export interface Collecting {
  host: Host;
  state: State;
  situation: Situation;
  journal: Journal;
  /** Further folders to look for binaries in. */
  path: string[];
  /** The lists of the node as they are now. */
  now?: readonly NetworkConfigList[];
}

/** How long another operation of a container is waited for, in ms, and a whole collection. */
const busyMs = 10_000;
const collectMs = 600_000;

/** Takes one thing away, if it is still nobody's under its lock. @returns why it remains */
export async function collectOne(work: Collecting, one: Garbage): Promise<CniError | undefined> {
  try {
    if (one.kind === "attachment") return await collectRow(work, one.row);
    if (one.kind === "reservation") return await releaseOne(work, one.reservation);
    await endAbandoned(work.state, one.operation);
    return undefined;
  } catch (error) {
    return toCniError(error);
  }
}

async function collectRow(work: Collecting, stale: StoredAttachment) {
  const { host, state, situation, journal, path } = work;
  const { containerId, ifName, parkedAs } = stale;
  const operation = newOperation(host, containerId, "GC");
  const { signal } = host;
  const wait = { host, state, operation, deadlineMs: host.now() + busyMs, signal };
  const isIt = (one: StoredAttachment) => one.ifName === ifName && one.parkedAs === parkedAs;
  const row = await takeLock(wait, () => attachments(host, state, containerId).find(isIt));
  try {
    // Its runtime came first.
    if (!row || whyStale(row, situation) === undefined) return undefined;
    const deadlineMs = host.now() + collectMs;
    const chain = { host, netns: "", token: operation.token, deadlineMs, signal, journal };
    const options = { path, chain, windowMs: situation.windowMs };
    const { errors } = await collectAttachment(state, withVersionOfNow(row, work.now), options);
    return errors[0];
  } finally {
    release(state, operation, () => undefined);
  }
}

/**
 * Where a plugin refuses the CNI version on record, a DEL by the record fails for ever: where the
 * list was mended since, its version of now counts.
 */
function withVersionOfNow(row: StoredAttachment, now: readonly NetworkConfigList[] = []) {
  const typesOf = ({ plugins }: NetworkConfigList) => plugins.map(({ type }) => type).join();
  const isIt = (one: NetworkConfigList) =>
    one.name === row.list.name && typesOf(one) === typesOf(row.list);
  const { cniVersion = row.list.cniVersion } = now.find(isIt) ?? {};
  return { ...row, list: { ...row.list, cniVersion } };
}

/** Releases an address, if nobody has come for it since. */
async function releaseOne(work: Collecting, one: Reservation): Promise<CniError | undefined> {
  const { host, state, situation } = work;
  const { alive } = situation;
  const known = containersOf(recorded(host, state, one.containerId));
  if (alive && isUnowned(one, { ...alive, known })) {
    await releaseReservation(host, one, host.now() + busyMs);
    return undefined;
  }
  return new CniError(code.tryAgainLater, `Container ${one.containerId} has just come`);
}

/** One thing that nobody needs, as `genie gc` prints it. */
export interface Collected extends Finding {
  kind: Garbage["kind"];
  outcome: "found" | "collected" | "failed";
  error: string;
}

/**
 * Runs `genie gc`. @returns exit status: 1 when something remains
 * @param width columns of the terminal, Infinity for none
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
  let all: Collected[] = [];
  if (!isDry || existsSync(join(stateDir, "genie.db"))) {
    const state = isDry ? openCopy(stateDir) : openState(host, stateDir);
    try {
      const lists = listsOf(attachments(host, state), config);
      const situation = { lists, alive: findLiveContainers(), windowMs, nowMs: host.now() };
      const now = config ? listNetworks(config).networks.map(({ list }) => list) : [];
      const work = { host, state, situation, path: config?.binDirs ?? [], now };
      const asked = text(flags, "network");
      const network = config && asked !== undefined ? networkName(config, asked) : asked;
      all = await collectAll(work, network, isDry);
    } finally {
      closeState(state);
    }
  }
  host.stdout(flags["json"] ? `${JSON.stringify(all, null, 2)}\n` : formatAll(all, width));
  return all.every(({ outcome }) => outcome === "collected") ? 0 : 1;
}

async function collectAll(
  work: Omit<Collecting, "journal">,
  network: string | undefined,
  isDry: boolean,
): Promise<Collected[]> {
  const { host, state, situation } = work;
  if (!situation.alive) {
    log(host, "warn", "Others cannot be seen here: run it as root in the node's own pid namespace");
  }
  const garbage = findGarbage(host, state, situation).filter(
    (one) => network === undefined || networksOf(one).includes(network),
  );
  if (isDry) return garbage.map((one) => asCollected(one, "found", ""));
  const pod = { namespace: "", name: "", uid: "" };
  const call = { command: "GC", containerId: "", network: network ?? "", ifName: "", pod };
  const journal = beginJournal(host, { ...call, decidedBy: "operator" });
  const all: Collected[] = [];
  let failure: CniError | undefined;
  for (const one of garbage) {
    const error = await collectOne({ ...work, journal }, one);
    all.push(asCollected(one, error ? "failed" : "collected", error?.message ?? ""));
    failure ??= error;
  }
  if (garbage.length > 0) writeAlone(host, state, journal, failure);
  return all;
}

function networksOf(one: Garbage): string[] {
  if (one.kind === "attachment") return [one.network, one.row.list.name];
  return one.kind === "reservation" ? [one.network] : [];
}

function asCollected(one: Garbage, outcome: Collected["outcome"], error: string): Collected {
  const { kind, what, network, pod, containerId, why } = one;
  return { kind, what, network, pod, containerId, why, outcome, error };
}

/** The table that `genie gc` prints, with a sum below. */
export function formatAll(all: readonly Collected[], width: number): string {
  if (all.length === 0) return "Nothing to collect\n";
  const names = ["KIND", "WHAT", "NETWORK"].map((title) => ({ title }));
  const owner = { title: "POD OR CONTAINER", shrinks: true };
  const texts = ["WHY", "OUTCOME"].map((title) => ({ title, wraps: true }));
  const rows = all.map(({ kind, what, network, pod, containerId, why, outcome, error }) => {
    const end = error === "" ? outcome : `${outcome}: ${error}`;
    return [kind, what, network, pod || containerId, why, end];
  });
  const count = (outcome: string) => all.filter((one) => one.outcome === outcome).length;
  const found = count("found");
  const sum =
    found > 0
      ? `${found} to collect; nothing was changed`
      : `${count("collected")} collected, ${count("failed")} remain`;
  return `${formatTable([...names, owner, ...texts], rows, width)}\n${sum}\n`;
}
