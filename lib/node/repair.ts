/**
 * `genie repair`: DEL and ADD of what a running pod has, one attachment after the other, on the
 * same interface, in the same network namespace and, where the IPAM allows it, with the same
 * address. Works from the record alone, as DEL does: what the pod asks for by now is not looked at.
 */

import { npwgKeys } from "../annotations.ts";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { closeState, openState, type State, write } from "../database.ts";
import type { Done } from "../default_route.ts";
import type { ChainOptions } from "../delegate.ts";
import { isConfigured } from "../kubernetes/credentials.ts";
import { statusSource } from "../kubernetes/network_status.ts";
import { openObjects } from "../kubernetes/objects_of_call.ts";
import { beginJournal, type Journal, writeJournal } from "../ledger.ts";
import { newOperation, type Operation, release, takeLock } from "../lock.ts";
import { netnsId } from "../netns.ts";
import type { Enforced } from "../policy/enforce.ts";
import { formatTable } from "../report/table.ts";
import { enforcesPolicy, loadConfig } from "../settings.ts";
import { type Attachment, attachments, putStatus, type StoredAttachment } from "../state.ts";
import { storedResult } from "../undo.ts";
import { readOwnConfig } from "./genie_config.ts";
import {
  askingFor,
  attachOneRecorded,
  commitDone,
  detachOne,
  doneOf,
  ownAddresses,
  type Reattaching,
} from "./reattach.ts";
import { setBroken, waitingAnnotations } from "./replan.ts";

/** What became of one attachment. */
export interface Repaired {
  network: string;
  ifName: string;
  containerId: string;
  primary: boolean;
  /** Addresses it had, and has now, with prefix length. */
  before: string[];
  after: string[];
  /** Why it is not there; "" when it is. */
  error: string;
}

/**
 * Runs `genie repair NAMESPACE/POD`.
 *
 * @param width columns of the terminal, Infinity for none
 * @returns exit status: 1 when something is not as it was
 * @throws UsageError; CniError 3 for a pod without attachments here, or whose namespace is gone; 11
 *   when another operation of the pod does not end in time; 7 for a plugin table that is wrong
 */
export async function runRepair(host: Host, flags: Flags, width: number): Promise<number> {
  const pod = readPod(flags);
  const network = text(flags, "network");
  host.catchSignals?.();
  const config = await loadConfig(readOwnConfig(text(flags, "cni-config")));
  host.log = { level: config.logLevel, file: config.logFile };
  const state = openState(host, config.stateDir);
  try {
    const all: Repaired[] = [];
    for (const call of callsOf(host, state, pod, network)) {
      all.push(...(await repairCall({ host, config, state, network }, call)));
    }
    host.stdout(flags["json"] ? `${JSON.stringify(all, null, 2)}\n` : formatRepaired(all, width));
    return all.every(isAsBefore) ? 0 : 1;
  } finally {
    closeState(state);
  }
}

function readPod(flags: Flags): { namespace: string; name: string } {
  const words = Array.isArray(flags["words"]) ? flags["words"] : [];
  const [, namespace, name] = /^([^/]+)\/([^/]+)$/.exec(words[0] ?? "") ?? [];
  if (words.length === 1 && namespace !== undefined && name !== undefined) {
    return { namespace, name };
  }
  throw new UsageError(`Invalid words "${words.join(" ")}": expected NAMESPACE/POD`);
}

/** One call of the runtime by which a pod was attached. */
interface Call {
  containerId: string;
  requestIfName: string;
}

/** The calls that attached what is to be repaired. @throws CniError 3 or 101 */
function callsOf(
  host: Host,
  state: State,
  pod: { namespace: string; name: string },
  network: string | undefined,
): Call[] {
  const label = `${pod.namespace}/${pod.name}`;
  const rows = attachments(host, state).filter(
    (row) => row.pod.namespace === pod.namespace && row.pod.name === pod.name,
  );
  if (rows.length === 0) {
    throw new CniError(
      code.unknownContainer,
      `Cannot repair pod ${label}: nothing of it is on record on this node`,
    );
  }
  const alive = rows.filter(isThere);
  if (alive.length === 0) {
    throw new CniError(
      code.unknownContainer,
      `Cannot repair pod ${label}: its network namespace is gone; genie gc collects what it left`,
    );
  }
  const meant = alive.filter((row) => network === undefined || row.network === network);
  if (meant.length === 0) {
    const names = [...new Set(alive.map((row) => row.network))].join(", ");
    throw new CniError(
      code.networkNotFound,
      `Cannot repair network "${network}" of pod ${label}: it has ${names}`,
    );
  }
  const keys = meant.map(({ containerId, requestIfName }) => ({ containerId, requestIfName }));
  return [...new Map(keys.map((key) => [JSON.stringify(key), key])).values()];
}

/** Is the namespace still the one in which it was made? */
function isThere({ netnsId: id, netns }: StoredAttachment): boolean {
  return id !== "" && netnsId(netns) === id;
}

/** What every step needs. */
interface Repairing {
  host: Host;
  config: Config;
  state: State;
  network: string | undefined;
}

async function repairCall(work: Repairing, call: Call): Promise<Repaired[]> {
  const { host, config, state, network } = work;
  const operation = newOperation(host, call.containerId, "repair");
  const deadlineMs = host.now() + config.timeoutMs;
  const found = () =>
    attachments(host, state, call.containerId).filter(
      (row) => row.requestIfName === call.requestIfName && isThere(row),
    );
  const rows = await takeLock(host, state, operation, { deadlineMs, signal: host.signal }, found);
  const [first] = rows;
  const journal = beginJournal(host, {
    ...{ command: "ADD", containerId: call.containerId, ifName: call.requestIfName },
    ...{ network: first?.requestNetwork ?? "", decidedBy: "repair" },
    pod: first?.pod ?? { namespace: "", name: "", uid: "" },
  });
  const all: Repaired[] = [];
  let failure: unknown;
  let done = doneOf(rows);
  let enforced: Enforced | undefined;
  try {
    if (!first) throw new CniError(code.unknownContainer, "Cannot repair: the pod has just gone");
    const chain: ChainOptions = {
      ...{ netns: first.netns, token: operation.token, deadlineMs },
      ...{ signal: host.signal, journal },
    };
    // What would fail afterwards fails before anything is touched.
    (await enforce(work, journal, done, chain))?.release();
    const reattaching = { host, state, chain, path: config.binDirs, why: "repair" };
    for (const row of rows) {
      if (network !== undefined && row.network !== network) continue;
      const one = await repairOne(reattaching, row, done);
      all.push(one.repaired);
      done = inOrder(rows, one.done);
    }
    enforced = await enforce(work, journal, done, chain).catch(async (error: unknown) => {
      done = await withdraw(reattaching, rows, all, done, toCniError(error));
      return undefined;
    });
  } catch (error) {
    failure = error;
    throw error;
  } finally {
    await settle(work, operation, call, { journal, done, failure });
    enforced?.release();
  }
  return all;
}

/** Takes away what was made without its policy in force: a network that is closed, not open. */
async function withdraw(
  call: Reattaching,
  rows: readonly StoredAttachment[],
  all: Repaired[],
  done: readonly Done[],
  cause: CniError,
): Promise<Done[]> {
  const made = all.filter(({ error }) => error === "");
  for (const one of made.toReversed()) {
    const row = rows.find(({ ifName }) => ifName === one.ifName);
    if (!row) continue;
    await detachOne(call, row).catch((error: unknown) => {
      log(call.host, "error", toCniError(error).message, { interface: one.ifName });
    });
    write(call.state, () => setBroken(call.state, row, cause.message));
    Object.assign(one, { after: [], error: cause.message });
  }
  const gone = new Set(made.map(({ ifName }) => ifName));
  return done.filter(({ attachment }) => !gone.has(attachment.ifName));
}

/** Network policy on what the pod has now. @throws CniError 11 when it cannot be known */
async function enforce(
  { host, config, state }: Repairing,
  journal: Journal,
  done: readonly Done[],
  chain: ChainOptions,
): Promise<Enforced | undefined> {
  const [first] = done;
  if (!first || !enforcesPolicy(config)) return undefined;
  const { enforceAdd } = await import("../policy/enforce.ts");
  const plan = { pod: first.attachment.pod, objects: openObjects(host, config) };
  return enforceAdd({ host, config, state, journal }, plan, done, chain);
}

/**
 * DEL and ADD of one attachment. When no other address will do than the one it had, it gets none of
 * its own choice: a network that is there with another address is better than none.
 */
async function repairOne(
  call: Reattaching,
  row: StoredAttachment,
  done: readonly Done[],
): Promise<{ repaired: Repaired; done: Done[] }> {
  const { network, ifName, containerId, primary } = row;
  const result = storedResult(row);
  const before = result ? ownAddresses(row, result) : [];
  const what = { network, ifName, containerId, primary, before };
  const others = done.filter(({ attachment }) => attachment.ifName !== ifName);
  try {
    checkRepairable(row);
    await detachOne(call, row);
    const made = await attachAgain(call, asAttachment(row), before, others);
    const after = ownAddresses(row, made.result);
    return { repaired: { ...what, after, error: "" }, done: [...others, made] };
  } catch (error) {
    const { message } = toCniError(error);
    // One that was not touched is as it was.
    const kept = isRefused(row) ? [...done] : others;
    return { repaired: { ...what, after: [], error: message }, done: kept };
  }
}

async function attachAgain(
  call: Reattaching,
  attachment: Attachment,
  addresses: readonly string[],
  others: Done[],
): Promise<Done> {
  const asking = askingFor(attachment, addresses);
  try {
    return await attachOneRecorded(call, asking, others);
  } catch (error) {
    if (asking === attachment || call.host.signal.aborted) throw error;
    log(call.host, "warn", `Cannot keep the address, trying any: ${toCniError(error).message}`);
    return attachOneRecorded(call, attachment, others);
  }
}

/** Its DEL was asked for, or its ADD never ended: the runtime is at it. */
function isRefused({ state, result, error }: StoredAttachment): boolean {
  if (state === "planned") return result === undefined && error === "";
  return state !== "attached";
}

/** @throws CniError 11 for one that is not there to stay */
function checkRepairable(row: StoredAttachment): void {
  if (!isRefused(row)) return;
  const why =
    row.state === "planned"
      ? "its ADD was ended in the middle, and the runtime makes the pod anew"
      : `it is ${row.state}: its pod is being taken down`;
  const what = `network "${row.network}" (${row.ifName})`;
  throw new CniError(code.tryAgainLater, `Cannot repair ${what}: ${why}`);
}

/** The plan alone, without what the record adds. */
function asAttachment(row: StoredAttachment): Attachment {
  const { state, result, failedAtMs, error, createdAtMs, netnsId: id, ...attachment } = row;
  return attachment;
}

function inOrder(rows: readonly StoredAttachment[], done: readonly Done[]): Done[] {
  const position = ({ attachment }: Done) =>
    rows.findIndex(({ ifName }) => ifName === attachment.ifName);
  return done.toSorted((a, b) => position(a) - position(b));
}

/** Results, status and ledger, and the lock given back, in one transaction. */
async function settle(
  { host, config, state }: Repairing,
  operation: Operation,
  call: Call,
  { journal, done, failure }: { journal: Journal; done: Done[]; failure: unknown },
): Promise<void> {
  const isWanted = config.kubernetes.status !== "off" && isConfigured(host, config.kubernetes);
  const [first] = done;
  const { formatStatus } = await import("../kubernetes/npwg.ts");
  const sources = await Promise.all(done.map((one) => statusSource(host, one)));
  release(state, operation, () => {
    commitDone(state, done);
    if (first && isWanted && first.attachment.pod.name !== "") {
      const status = { [npwgKeys.status]: formatStatus(sources) };
      const annotations = { ...waitingAnnotations(state, call), ...status };
      putStatus(state, { ...call, pod: first.attachment.pod, annotations }, host.now());
    }
    writeJournal(host, state, journal, failure);
  });
}

/** Is it there, with the addresses it had? Of a secondary other ones will do. */
function isAsBefore({ primary, before, after, error }: Repaired): boolean {
  return error === "" && (!primary || !isMoved({ before, after }));
}

function isMoved({ before, after }: Pick<Repaired, "before" | "after">): boolean {
  return before.length > 0 && before.toSorted().join() !== after.toSorted().join();
}

/** What was done, for people. */
export function formatRepaired(all: readonly Repaired[], width: number): string {
  const columns = [
    { title: "NETWORK" },
    { title: "INTERFACE" },
    { title: "ADDRESSES" },
    { title: "OUTCOME", wraps: true },
  ];
  const rows = all.map((one) => [
    one.network,
    one.ifName,
    one.after.join(", ") || "none",
    outcomeOf(one),
  ]);
  return formatTable(columns, rows, width);
}

function outcomeOf(one: Repaired): string {
  if (one.error !== "") return one.error;
  if (!isMoved(one)) return "made anew";
  const moved = `made anew, it had ${one.before.join(", ")}`;
  return one.primary ? `${moved}: Kubernetes knows the pod by that, delete the pod` : moved;
}
