/**
 * Another network for a pod that runs: one attachment takes the place of another one, comes beside
 * it, or goes. The new one is made before the old one goes where their interfaces have different
 * names; where the name stays the old one goes first, and comes back when the new one fails.
 *
 * Under the container's lock, and on record before each step (design D4): a process that is killed
 * at any instant leaves rows from which the pod's DEL undoes everything. The rules of network
 * policy stand before the new interface does.
 */

import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type State, write } from "../database.ts";
import { type Done, inheritDefaultRoutes } from "../default_route.ts";
import { type ChainOptions, undoOptions } from "../delegate.ts";
import type { PodStatus } from "../kubernetes/network_status.ts";
import type { Objects } from "../kubernetes/objects_of_call.ts";
import { beginJournal, type Journal, withAudit, writeAside, writeJournal } from "../ledger.ts";
import { newOperation, type Operation, release, takeLock } from "../lock.ts";
import { interfacesIn, netnsId } from "../netns.ts";
import { podLabel } from "../pod.ts";
import { judgeQuota, readHeld } from "../quota.ts";
import type { Result } from "../result.ts";
import { enforcesPolicy } from "../settings.ts";
import {
  type Attachment,
  attachments,
  type CallId,
  endOf,
  forget,
  putStatus,
  type StoredAttachment,
} from "../state.ts";
import { forgetTraffic, sampleTraffic, trafficSources } from "../traffic.ts";
import { storedResult, undo } from "../undo.ts";
import { putUnfollowed } from "./followed.ts";
import {
  askingFor,
  attachOneRecorded,
  commitDone,
  detachOne,
  doneOf,
  ownAddresses,
  type Reattaching,
} from "./reattach.ts";
import { setBroken } from "./replan.ts";
import { publishRunning, runningStatus } from "./running_status.ts";

/** What changes, and on whose behalf. */
export interface Switching {
  host: Host;
  config: Config;
  state: State;
  objects: Objects;
  /** `switch` ends when a DEL asks it to; what runs inside the agent has another name. */
  command: "switch" | "follow";
}

/** One change. Without `attach` one network goes, without `detach` one comes. */
export interface Step {
  /** What the pod had when this was planned, all rows of the call. */
  planned: readonly StoredAttachment[];
  detach?: StoredAttachment;
  attach?: Attachment;
}

/** What became of a change. */
export interface Switched {
  attached?: { network: string; ifName: string; addresses: string[] };
  detached?: { network: string; ifName: string; addresses: string[] };
  /** Why the old one is not quite gone; "" when it is. The record has it, for the pod's DEL. */
  problem: string;
}

/** A change at work. */
interface Run extends Switching {
  journal: Journal;
  chain: ChainOptions;
  reattaching: Reattaching;
  /** What the pod has, in the order in which it was made. */
  done: Done[];
}

/**
 * Makes one change of a running pod's networks.
 *
 * @throws CniError of the delegate that failed, 100 for a quota, 105 for a name that is taken, 3
 *   when the pod is gone, 11 when it changed meanwhile or another operation does not end in time.
 *   Then it has what it had, or the message says what it has not
 */
export async function switchNetwork(work: Switching, step: Step): Promise<Switched> {
  const [call] = step.planned;
  if (!call) throw new Error("a pod without attachments was let through");
  const { host, config, state } = work;
  const operation = newOperation(host, call.containerId, work.command);
  const deadlineMs = host.now() + config.timeoutMs;
  const limits = { deadlineMs, signal: host.signal };
  const find = () => presentRows(work, call, step);
  const rows = await takeLock(host, state, operation, limits, find);
  const [first] = rows;
  if (!first) throw new Error("a call without attachments was let through");
  const journal = beginJournal(host, {
    ...{ command: "ADD", containerId: call.containerId, ifName: call.requestIfName },
    ...{ network: first.requestNetwork, pod: first.pod, decidedBy: work.command },
  });
  const chain: ChainOptions = {
    ...{ netns: first.netns, token: operation.token, deadlineMs },
    ...{ signal: host.signal, journal },
  };
  const path = config.binDirs;
  const reattaching = { host, state, chain, path, why: work.command };
  const run: Run = { ...work, journal, chain, reattaching, done: doneOf(rows) };
  let failure: unknown;
  try {
    await freeName(run, rows, step);
    const isKept = step.detach !== undefined && step.attach?.ifName === step.detach.ifName;
    return isKept ? await breakThenMake(run, step) : await makeThenBreak(run, step);
  } catch (error) {
    failure = error;
    throw error;
  } finally {
    await settle(run, operation, rows, failure);
  }
}

/** The rows of the call, when it may be changed now. Runs in the transaction of the lock. */
function presentRows(
  { host, config, state }: Switching,
  call: CallId,
  { planned, detach, attach }: Step,
): StoredAttachment[] {
  const rows = rowsOf(host, state, call);
  const [first] = rows;
  const refuse = (number: number, why: string) =>
    new CniError(number, `Cannot switch networks of container ${call.containerId}: ${why}`);
  if (!first || endOf(state, call)) throw refuse(code.unknownContainer, "it is gone");
  if (netnsId(first.netns) !== first.netnsId) {
    throw refuse(code.unknownContainer, `its network namespace ${first.netns} is gone`);
  }
  const going = rows.find((row) => row.state === "failing" || row.state === "leaked");
  if (going) throw refuse(code.tryAgainLater, `its pod is being taken down: ${going.error}`);
  const of = (row: StoredAttachment) => `${row.ifName} ${row.network} ${row.state}`;
  if (rows.map(of).join() !== planned.map(of).join()) {
    throw refuse(code.tryAgainLater, "they have just been changed");
  }
  if (attach && config.access.maxAttachments) {
    const held = readHeld(state, [attach]);
    const freed = detach ? 1 : 0;
    const after = { pod: held.pod - freed, namespace: held.namespace - freed };
    judgeQuota(config, [attach], after);
  }
  return rows;
}

/** What is on record of one call. */
export function rowsOf(host: Host, state: State, call: CallId): StoredAttachment[] {
  return attachments(host, state, call.containerId).filter(
    (row) => row.requestIfName === call.requestIfName,
  );
}

/** A change that was killed may have left its half under the name that is wanted. @throws 105 */
async function freeName(
  run: Run,
  rows: readonly StoredAttachment[],
  { detach, attach }: Step,
): Promise<void> {
  if (!attach || attach.ifName === detach?.ifName) return;
  const { ifName, network, netns } = attach;
  const half = rows.find((row) => row.ifName === ifName);
  const taken = (why: string) =>
    new CniError(
      code.interfaceConflict,
      `Cannot attach network "${network}": the pod has an interface "${ifName}" already${why}`,
    );
  if (half) {
    const problem = half.state === "planned" ? await drop(run, half) : "it is attached";
    if (problem !== "") throw taken(` on network "${half.network}": ${problem}`);
    write(run.state, () => forget(run.state, half));
  }
  // Its DEL would remove what is not ours.
  if (interfacesIn(netns)?.includes(ifName)) throw taken(", and genie did not make it");
}

/** DEL of what was made, or half made; its row stays. @returns why it is still there, or "" */
async function drop(run: Run, row: StoredAttachment): Promise<string> {
  const { host, state, reattaching } = run;
  const chain = undoOptions(host, run.chain);
  const [error] = await undo(host, row, reattaching.path, chain);
  if (error) write(state, () => setBroken(state, row, error.message));
  return error?.message ?? "";
}

/** The same for what was made just now, whose row is read anew; then it is forgotten. */
async function dropNew(run: Run, attachment: Attachment, keepsRow: boolean): Promise<string> {
  const { host, state } = run;
  const row = rowsOf(host, state, attachment).find(({ ifName }) => ifName === attachment.ifName);
  if (!row) return "";
  const problem = await drop(run, row);
  if (problem === "" && !keepsRow) write(state, () => forget(state, row));
  return problem;
}

async function makeThenBreak(run: Run, { detach, attach }: Step): Promise<Switched> {
  const { state, reattaching } = run;
  const old = run.done.find(({ attachment }) => attachment.ifName === detach?.ifName);
  const switched: Switched = { problem: "" };
  if (attach) {
    await enforce(run, [...run.done, nothingYet(attach)]);
    let made: Done | undefined;
    try {
      made = await attachOneRecorded(reattaching, taking(attach, old), run.done);
      const done = [...run.done, made];
      await enforce(run, done);
      endIfAsked(run);
      write(state, () => commitDone(state, done));
      run.done = done;
      switched.attached = partOf(made);
    } catch (error) {
      const problem = await dropNew(run, attach, false);
      if (made) await inherit(run, made.result);
      throw withMore(error, problem === "" ? "" : `it is not quite gone: ${problem}`);
    }
  }
  if (!detach) return switched;
  const before = old ?? { attachment: detach, result: storedResult(detach) ?? noResult };
  switched.detached = partOf(before);
  run.done = run.done.filter((one) => one !== old);
  try {
    await detachOne(reattaching, detach);
    write(state, () => forget(state, detach));
    await inherit(run, before.result);
  } catch (error) {
    if (!attach) throw error;
    switched.problem = toCniError(error).message;
  }
  return switched;
}

async function breakThenMake(run: Run, { detach, attach }: Step): Promise<Switched> {
  if (!detach || !attach) throw new Error("an exchange needs both");
  const { state, reattaching } = run;
  const isOld = ({ attachment }: Done) => attachment.ifName === detach.ifName;
  const others = run.done.filter((one) => !isOld(one));
  const old = run.done.find(isOld) ?? { attachment: detach, result: noResult };
  await enforce(run, [...others, nothingYet(attach)]);
  endIfAsked(run);
  run.done = others;
  try {
    await detachOne(reattaching, detach);
    const made = await attachOneRecorded(reattaching, attach, others);
    const done = inPlace(made, others);
    await enforce(run, done);
    endIfAsked(run);
    write(state, () => commitDone(state, done));
    run.done = done;
    await inherit(run, old.result);
    return { attached: partOf(made), detached: partOf(old), problem: "" };
  } catch (error) {
    const problem = await dropNew(run, attach, true);
    if (problem !== "") throw withMore(error, `and cannot be undone: ${problem}`);
    throw await bringBack(run, detach, old.result, error);
  }
}

/** Makes the old one again, with the addresses it had. @returns the failure, which says so */
async function bringBack(
  run: Run,
  detach: StoredAttachment,
  result: Result,
  error: unknown,
): Promise<CniError> {
  const { state, done } = run;
  const { state: _, result: __, failedAtMs, error: ___, createdAtMs, netnsId: id, ...old } = detach;
  // Whoever asks us to end wants the pod as it was.
  const host = { ...run.host, signal: new AbortController().signal };
  const calm = { ...run.reattaching, host, chain: undoOptions(host, run.chain) };
  const asking = askingFor(old, ownAddresses(old, result));
  const what = `network "${old.network}" (${old.ifName})`;
  try {
    const made = await attachOneRecorded(calm, asking, done).catch((failure: unknown) => {
      if (asking === old) throw failure;
      log(host, "warn", `Cannot keep the address, trying any: ${toCniError(failure).message}`);
      return attachOneRecorded(calm, old, done);
    });
    run.done = inPlace(made, done);
    write(state, () => commitDone(state, run.done));
    return withMore(error, `${what} is attached again, ${ownAddresses(old, made.result).join()}`);
  } catch (failure) {
    const why = toCniError(failure).message;
    return withMore(error, `${what} could not be attached again, try genie repair: ${why}`);
  }
}

/** It comes where the old one was: the primary stays first. */
function inPlace(made: Done, others: readonly Done[]): Done[] {
  return made.attachment.primary ? [made, ...others] : [...others, made];
}

const noResult: Result = { interfaces: [], ips: [], routes: [], dns: {} };

/** For rules by the name of an interface that is still to come. */
function nothingYet(attachment: Attachment): Done {
  return { attachment, result: noResult };
}

/** What is left takes over the default route of what is gone; a failure costs that alone. */
async function inherit({ host, chain, done }: Run, gone: Result): Promise<void> {
  try {
    await inheritDefaultRoutes(host, chain.netns, gone, done);
  } catch (error) {
    log(host, "error", `A pod is left without default route: ${toCniError(error).message}`);
  }
}

/** The default route goes from the old one to the new one, where the old one has it. */
function taking(attach: Attachment, old: Done | undefined): Attachment {
  const owns = old?.result.routes.some(({ dst }) => dst.endsWith("/0")) ?? false;
  return owns && attach.defaultRoute === undefined ? { ...attach, defaultRoute: [] } : attach;
}

function endIfAsked({ host }: Run): void {
  if (host.signal.aborted) throw new CniError(code.tryAgainLater, "Asked to end during a switch");
}

function partOf({ attachment, result }: Done) {
  const { network, ifName } = attachment;
  return { network, ifName, addresses: ownAddresses(attachment, result) };
}

function withMore(error: unknown, more: string): CniError {
  const failure = toCniError(error);
  if (more === "") return failure;
  const { code: number, message, details, rule } = failure;
  return new CniError(number, `${message}; ${more}`, { details, rule, cause: error });
}

/** Network policy as for an ADD. @throws CniError 11 when it cannot be known */
async function enforce(run: Run, done: readonly Done[]): Promise<void> {
  const { host, config, state, journal, chain, objects } = run;
  const [first] = done;
  if (!first || !enforcesPolicy(config)) return;
  const { enforceAdd } = await import("../policy/enforce.ts");
  const plan = { pod: first.attachment.pod, objects };
  (await enforceAdd({ host, config, state, journal }, plan, done, chain))?.release();
}

/** Network policy as it is to be now, and the status that tells of it. */
async function upToDate(
  run: Run,
  before: readonly StoredAttachment[],
): Promise<PodStatus | undefined> {
  await enforce({ ...run, chain: undoOptions(run.host, run.chain) }, run.done);
  return runningStatus(run, before, run.done);
}

/** Rules, results, status and ledger as they are now, and the lock given back. Never throws. */
async function settle(
  run: Run,
  operation: Operation,
  before: readonly StoredAttachment[],
  failure: unknown,
): Promise<void> {
  const { host, state, journal, done } = run;
  const pod = podLabel(before[0]?.pod ?? { namespace: "", name: "" });
  const status = await upToDate(run, before).catch((error: unknown) => {
    // What it had before is guarded as it was, what is new was guarded before it came.
    log(host, "error", `Cannot bring a pod up to date: ${toCniError(error).message}`, { pod });
    return undefined;
  });
  try {
    withAudit(host, (isAudited) =>
      release(state, operation, () => {
        commitDone(state, done);
        if (run.command === "switch" && before[0]) putUnfollowed(state, before[0], host.now());
        if (status) putStatus(state, status, host.now());
        if (!isAudited) return;
        writeAside(host, state, "traffic", () => {
          forgetTraffic(state, operation.containerId);
          sampleTraffic(state, trafficSources(done), host.now());
        });
        writeJournal(host, state, journal, failure);
      }),
    );
  } catch (error) {
    log(host, "error", toCniError(error).message, { pod });
    return;
  }
  if (status) await publishRunning(run, status);
}
