/**
 * `genie switch`: another network for a pod that runs, as its operator asks. Planned and checked by
 * the rules of an ADD; what the pod's own annotations ask for does not count.
 *
 * The change itself serves the node agent too: one attachment takes the place of another one, comes
 * beside it, or goes. Where the two have different interfaces the new one is made before the old
 * one goes; where the name stays the old one goes first, and comes back when the new one fails.
 * Under the container's lock, and on record before each step (design D4): a process that is killed
 * at any instant leaves rows from which the pod's DEL undoes everything. The rules of network
 * policy are in force before the new interface exists.
 */
import type { Done, Host, StdinConfig, Wanted } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { type Flags, namedPod, text, UsageError } from "../config/usage.ts";
import { write } from "../database.ts";
import { inheritDefaultRoutes } from "../default_route.ts";
import { interfacesIn } from "../kernel.ts";
import { requestedNameIssue } from "../kubernetes/npwg.ts";
import { writeAlone } from "../ledger.ts";
import { endOf } from "../lock.ts";
import { parseElements } from "../pod.ts";
import { judgeQuota, readHeld } from "../policy/access.ts";
import type { Attachment, CallId, Result, StoredAttachment } from "../record.ts";
import { attachments, forget, storedResult, undo, undoChain } from "../recorded.ts";
import { identifiedWanted } from "../recovery/network_name.ts";
import { checkOneInterface, oneInterfaceTypes, sharedError } from "../recovery/plugin_keys.ts";
import { formatTable } from "../report/table.ts";
import { podLabel } from "../request.ts";
import { onNode } from "../selection.ts";
import {
  attachAgain,
  attachRecorded,
  beginLiveJournal,
  beginOperation,
  commitDone,
  detachRecorded,
  endOperation,
  enforceOn,
  type LiveOperation,
  othersOf,
  ownAddresses,
  setBroken,
} from "./repair.ts";
import {
  attachmentsOfCall,
  firstOf,
  hasNetns,
  isNamed,
  type LiveContext,
  liveAttachments,
  nameFor,
  planFurther,
  podOf,
  publishRunning,
  withPods,
} from "./running_pod.ts";

type SwitchRequest = Awaited<ReturnType<typeof readRequest>>;

/**
 * Runs `genie switch NAMESPACE/POD`. @returns exit status: 1 when what was there is not quite gone
 * @param width columns of the terminal, Infinity for none
 * @throws UsageError; CniError of the plan and of what failed: then the pod has what it had, or the
 *   message says what it lacks
 */
export async function runSwitch(host: Host, flags: Flags, width: number): Promise<number> {
  const request = await readRequest(flags);
  return withPods(host, flags, "switch", async (context, stdin) => {
    const change = await planChange(context, stdin, request);
    const outcome = request.isDry ? previewOf(change) : await changeNetworks(context, change);
    host.stdout(
      flags["json"]
        ? formatJson(request, change, outcome)
        : formatOutcome(outcome, request.isDry ? orderOf(change) : "", width),
    );
    return outcome.problem === "" ? 0 : 1;
  });
}

async function readRequest(flags: Flags) {
  const pod = namedPod(flags);
  const [from, to] = [text(flags, "from"), text(flags, "to")];
  const isPrimary = flags["primary"] === true;
  if (from === undefined && to === undefined) throw new UsageError("Give --from, --to or both");
  if (isPrimary && to === undefined) throw new UsageError("--primary needs --to");
  const wanted = to === undefined ? undefined : await readWanted(flags, to, pod.namespace);
  if (isPrimary && wanted?.ifName !== undefined) {
    throw new UsageError("The primary attachment keeps its interface: leave the name out");
  }
  return { pod, from, to: wanted, isPrimary, isDry: flags["dry-run"] === true };
}

/** `blue`, `blue@net3`, `team-a/storage`; with --logical the name of a Logicalnetwork. */
async function readWanted(flags: Flags, to: string, podNamespace: string): Promise<Wanted> {
  const ifName = text(flags, "interface");
  const issue = ifName === undefined ? undefined : requestedNameIssue(ifName);
  if (issue) throw new UsageError(`Invalid --interface ${JSON.stringify(ifName)}: ${issue}`);
  const wanted = await parseWanted(to, podNamespace, flags["logical"] === true);
  if (ifName !== undefined && wanted.ifName !== undefined && ifName !== wanted.ifName) {
    throw new UsageError(`Two interfaces are named, ${wanted.ifName} and ${ifName}`);
  }
  return { ...wanted, isFurther: true, ...(ifName !== undefined && { ifName }) };
}

async function parseWanted(to: string, podNamespace: string, isLogical: boolean): Promise<Wanted> {
  const reason = "switch";
  if (to.includes("/") && !isLogical) {
    const { parseReference } = await import("../kubernetes/npwg.ts");
    return { ...parseReference(to, podNamespace, "--to"), from: "definition", reason };
  }
  const [element, ...others] = parseElements(to, "--to");
  if (!element || others.length > 0) throw new UsageError("--to takes one network");
  if (!isLogical) return onNode(element, reason);
  return { ...element, from: "logical", namespace: podNamespace, reason };
}

/** The attachments of the one call that is to be changed. @throws CniError 3, 101 */
function rowsToChange(context: LiveContext, { pod, from }: SwitchRequest): StoredAttachment[] {
  const live = liveAttachments(context, pod, "switch networks of");
  const calls = Map.groupBy(live, (row) => `${row.containerId} ${row.requestIfName}`);
  const [rows, other] = [...calls.values()].filter(
    (all) => from === undefined || all.some((row) => isNamed(context.config, row, from)),
  );
  if (rows && !other) return rows;
  const names = [...new Set(live.map((row) => `${row.network}@${row.ifName}`))].join(", ");
  const refuse = (number: number, what: string, why: string) =>
    new CniError(number, `Cannot switch ${what} of pod ${podLabel(pod)}: ${why}`);
  if (!other) throw refuse(code.networkNotFound, `network "${from}"`, `it has ${names}`);
  const why = `it was attached by several calls, name one of ${names} in --from`;
  throw refuse(code.unknownContainer, "networks", why);
}

async function planChange(
  context: LiveContext,
  stdin: StdinConfig,
  asked: SwitchRequest,
): Promise<NetworkChange> {
  const planned = rowsToChange(context, asked);
  const detach = rowToDetach(context, asked, planned);
  if (!asked.to) return { planned, detach };
  const to = identifiedWanted(context.config, asked.to);
  const first = firstOf(planned);
  const ifName = asked.isPrimary ? first.requestIfName : nameFor(to, planned, detach);
  const journal = beginLiveJournal(context, first);
  const call = { stdin, pod: podOf(first), rows: planned, journal };
  try {
    const attach = await planFurther(context, call, { ...to, ifName }, detach);
    if (attach && asked.isDry) checkChangeQuota(context, attach, detach);
    return { planned, detach, attach };
  } catch (error) {
    if (!asked.isDry) writeAlone(context.host, context.state, journal, error);
    throw error;
  }
}

/** Which attachment goes. @throws UsageError for a primary that was not meant, or two of a name */
function rowToDetach(
  { config }: LiveContext,
  { from, isPrimary, to }: SwitchRequest,
  rows: readonly StoredAttachment[],
): StoredAttachment | undefined {
  const primary = rows.find((row) => row.ifName === row.requestIfName);
  if (from === undefined) return isPrimary ? primary : undefined;
  const [row, other] = rows.filter((one) => isNamed(config, one, from));
  if (other) {
    const two = `${row?.ifName} and ${other.ifName}`;
    throw new UsageError(`The pod has it on ${two}: --from ${from}@...`);
  }
  if (row && row === primary && !(isPrimary && to)) {
    throw new UsageError(
      `Network "${row.network}" is the pod's primary one (${row.ifName}): only --primary with ` +
        "--to puts another one in its place, and its address with it",
    );
  }
  if (isPrimary && row !== primary) {
    throw new UsageError(`Network "${from}" is not the pod's primary one, ${primary?.network}`);
  }
  return row;
}

function previewOf({ detach, attach }: NetworkChange): ChangeOutcome {
  const preview = (one: Attachment | undefined) => one && changed(withoutResult(one));
  return { attached: preview(attach), detached: preview(detach), problem: "" };
}

function orderOf({ detach, attach }: NetworkChange): string {
  if (!detach || !attach) return "nothing else changes";
  if (detach.ifName !== attach.ifName) return "the new one is made before the old one goes";
  return "the old one goes first: the interface keeps its name";
}

/** Stable shape of `genie switch --json`. */
function formatJson(request: SwitchRequest, change: NetworkChange, outcome: ChangeOutcome): string {
  const { attached, detached, problem } = outcome;
  const { containerId, requestIfName } = firstOf(change.planned);
  const shapeOf = (one: ChangedAttachment | undefined) =>
    one ? { network: one.network, interface: one.ifName, addresses: one.addresses } : null;
  const shape = {
    pod: { ...request.pod, containerId },
    dryRun: request.isDry,
    attached: shapeOf(attached),
    detached: shapeOf(detached),
    primary: attached?.ifName === requestIfName,
    problem,
  };
  return `${JSON.stringify(shape, null, 2)}\n`;
}

/** @param order in which it would be done, of a preview; "" for what was done */
function formatOutcome(outcome: ChangeOutcome, order: string, width: number): string {
  const { attached, detached, problem } = outcome;
  const row = (verb: string, one: ChangedAttachment | undefined, more: string) =>
    one ? [[verb, one.network, one.ifName, one.addresses.join(", ") || "none", more]] : [];
  const rows = [
    ...row(order === "" ? "attached" : "attach", attached, order),
    ...row(order === "" ? "detached" : "detach", detached, problem || (attached ? "" : order)),
  ];
  const columns = ["", "NETWORK", "INTERFACE", "ADDRESSES"].map((title) => ({ title }));
  return formatTable([...columns, { title: "", wraps: true }], rows, width);
}

/** One change. Without `attach` one network goes, without `detach` one comes. */
export interface NetworkChange {
  /** What the pod had when this was planned, all rows of the call. */
  planned: readonly StoredAttachment[];
  detach?: StoredAttachment | undefined;
  attach?: Attachment | undefined;
}

/** One side of a change that was made. */
export interface ChangedAttachment {
  network: string;
  ifName: string;
  /** With prefix length. */
  addresses: string[];
}

/** How a change ended. */
export interface ChangeOutcome {
  attached?: ChangedAttachment | undefined;
  detached?: ChangedAttachment | undefined;
  /** Why the old one is not quite gone; "" when it is. The record has it, for the pod's DEL. */
  problem: string;
}

/**
 * Makes one change of a running pod's networks.
 * @throws CniError of the delegate that failed, 100 for a quota, 105 for a name that is taken, 3
 *   when the pod is gone, 11 when it changed meanwhile or another operation does not end in time.
 *   Then the pod has what it had, or the message says what it lacks
 */
export async function changeNetworks(
  context: LiveContext,
  change: NetworkChange,
): Promise<ChangeOutcome> {
  const { detach, attach } = change;
  const call = firstOf(change.planned);
  const live = await beginOperation(context, call, () => changeable(context, call, change));
  let failure: unknown;
  try {
    if (attach && attach.ifName !== detach?.ifName) await freeInterface(live, attach);
    return detach && attach && attach.ifName === detach.ifName
      ? await breakThenMake(live, detach, attach)
      : await makeThenBreak(live, change);
  } catch (error) {
    failure = error;
    throw error;
  } finally {
    await settle(live, failure);
  }
}

/** Attachments that a change adds, over the quota that it frees. @throws CniError 100 */
function checkChangeQuota(
  { config, state }: LiveContext,
  attach: Attachment,
  detach: StoredAttachment | undefined,
): void {
  if (!config.access.maxAttachments) return;
  const { pod, namespace } = readHeld(state, [attach]);
  const freed = detach ? 1 : 0;
  judgeQuota(config, [attach], { pod: pod - freed, namespace: namespace - freed });
}

/** The rows of the call, where it may be changed now. Runs in the transaction of the lock. */
function changeable(context: LiveContext, call: CallId, change: NetworkChange): StoredAttachment[] {
  const { planned, detach, attach } = change;
  const rows = attachmentsOfCall(context.host, context.state, call);
  const [first] = rows;
  const refuse = (number: number, why: string) =>
    new CniError(number, `Cannot switch networks of container ${call.containerId}: ${why}`);
  if (!first || endOf(context.state, call)) throw refuse(code.unknownContainer, "it is gone");
  if (!hasNetns(first)) {
    throw refuse(code.unknownContainer, `its network namespace ${first.netns} is gone`);
  }
  const going = rows.find((row) => row.state === "failing" || row.state === "leaked");
  if (going) throw refuse(code.tryAgainLater, `its pod is being taken down: ${going.error}`);
  const keyOf = (row: StoredAttachment) => `${row.ifName} ${row.network} ${row.state}`;
  if (rows.map(keyOf).join() !== planned.map(keyOf).join()) {
    throw refuse(code.tryAgainLater, "they have just been changed");
  }
  if (attach) checkChangeQuota(context, attach, detach);
  checkOthers(context, change);
  return rows;
}

/**
 * Refuses what would take from the container's other attachments what they have: a plugin that
 * gives a container one interface is asked for no second one, and for no DEL of one of several.
 * @throws CniError 105
 */
function checkOthers({ host, state, config }: LiveContext, { detach, attach }: NetworkChange) {
  const { containerId = "" } = attach ?? detach ?? {};
  const others = attachments(host, state, containerId).filter(
    (row) => ![detach?.ifName, attach?.ifName].includes(row.ifName) && !row.parkedAs,
  );
  const isReplaced = detach && attach && detach.ifName !== attach.ifName;
  const held = isReplaced ? [...others, detach] : others;
  if (attach) checkOneInterface(config, [attach], held);
  const error = detach && sharedError(detach, others, oneInterfaceTypes(config));
  if (error) throw error;
}

/** Removes what a change that was killed left under the name that is wanted. @throws 105 */
async function freeInterface(live: LiveOperation, attach: Attachment): Promise<void> {
  const { ifName, network, netns } = attach;
  const leftover = live.rows.find((row) => row.ifName === ifName);
  const what = `Cannot attach network "${network}": the pod has an interface "${ifName}" already`;
  const taken = (why: string) => new CniError(code.interfaceConflict, what + why);
  if (leftover) {
    const problem = leftover.state === "planned" ? await remove(live, leftover) : "it is attached";
    if (problem !== "") throw taken(` on network "${leftover.network}": ${problem}`);
    write(live.state, () => forget(live.state, leftover));
  }
  // A DEL would remove what is not ours.
  if (interfacesIn(netns)?.includes(ifName)) throw taken(", and genie did not make it");
}

/** DEL of what was made, or half made; its row stays. @returns why it is still there, or "" */
async function remove(live: LiveOperation, row: StoredAttachment): Promise<string> {
  const { config, state, chain } = live;
  const others = othersOf(live, row);
  const [error] = await undo(undoChain(chain), row, config.binDirs, others);
  if (error) write(state, () => setBroken(state, row, error.message));
  return error?.message ?? "";
}

/** DEL of what was made just now, by its row as it is now. @returns as {@link remove} */
async function removeNew(
  live: LiveOperation,
  made: Attachment,
  keepsRow: boolean,
): Promise<string> {
  const { host, state } = live;
  const rows = attachmentsOfCall(host, state, made);
  const row = rows.find(({ ifName }) => ifName === made.ifName);
  if (!row) return "";
  const problem = await remove(live, row);
  if (problem === "" && !keepsRow) write(state, () => forget(state, row));
  return problem;
}

async function makeThenBreak(live: LiveOperation, change: NetworkChange): Promise<ChangeOutcome> {
  const { state } = live;
  const { detach, attach } = change;
  const old = live.done.find(({ attachment }) => attachment.ifName === detach?.ifName);
  const outcome: ChangeOutcome = { problem: "" };
  if (attach) outcome.attached = await make(live, attach, old);
  if (!detach) return outcome;
  const before = old ?? { attachment: detach, result: storedResult(detach) ?? noResult };
  outcome.detached = changed(before);
  live.done = live.done.filter((one) => one !== old);
  try {
    await detachRecorded(live, detach);
    write(state, () => forget(state, detach));
    await inherit(live, before.result);
  } catch (error) {
    if (!attach) throw error;
    outcome.problem = toCniError(error).message;
  }
  return outcome;
}

/** Makes the new one beside all others. When it fails nothing is left, or the error says what. */
async function make(
  live: LiveOperation,
  attach: Attachment,
  old: Done | undefined,
): Promise<ChangedAttachment> {
  await putRulesInForce(live, [...live.done, withoutResult(attach)]);
  let made: Done | undefined;
  try {
    made = await attachRecorded(live, takingRoute(attach, old), live.done);
    await commit(live, [...live.done, made]);
    return changed(made);
  } catch (error) {
    const problem = await removeNew(live, attach, false);
    if (made) await inherit(live, made.result);
    throw problem === "" ? error : withMore(error, `it is not quite gone: ${problem}`);
  }
}

async function breakThenMake(
  live: LiveOperation,
  detach: StoredAttachment,
  attach: Attachment,
): Promise<ChangeOutcome> {
  const isOld = ({ attachment }: Done) => attachment.ifName === detach.ifName;
  const others = live.done.filter((one) => !isOld(one));
  const old = live.done.find(isOld) ?? withoutResult(detach);
  await putRulesInForce(live, [...others, withoutResult(attach)]);
  endIfAsked(live);
  live.done = others;
  try {
    await detachRecorded(live, detach);
    const made = await attachRecorded(live, attach, others);
    await commit(live, inPlace(made, others));
    await inherit(live, old.result);
    return { attached: changed(made), detached: changed(old), problem: "" };
  } catch (error) {
    const problem = await removeNew(live, attach, true);
    if (problem !== "") throw withMore(error, `and cannot be undone: ${problem}`);
    throw await bringBack(live, detach, old.result, error);
  }
}

/** What the pod has from now on, with its rules in force. @throws CniError 11 when asked to end */
async function commit(live: LiveOperation, done: Done[]): Promise<void> {
  await putRulesInForce(live, done);
  endIfAsked(live);
  write(live.state, () => commitDone(live.state, done));
  live.done = done;
}

/** Makes the old one again, with the addresses it had. @returns the failure, which says so */
async function bringBack(
  live: LiveOperation,
  detach: StoredAttachment,
  result: Result,
  error: unknown,
): Promise<CniError> {
  const { state, done } = live;
  // Whoever asks us to end wants the pod as it was.
  const host = { ...live.host, signal: new AbortController().signal };
  const unhurried = { ...live, host, chain: { ...undoChain(live.chain), host } };
  const what = `network "${detach.network}" (${detach.ifName})`;
  try {
    const made = await attachAgain(unhurried, detach, ownAddresses(detach, result), done);
    live.done = inPlace(made, done);
    write(state, () => commitDone(state, live.done));
    const addresses = ownAddresses(detach, made.result).join();
    return withMore(error, `${what} is attached again, ${addresses}`);
  } catch (failure) {
    const why = toCniError(failure).message;
    return withMore(error, `${what} could not be attached again, try genie repair: ${why}`);
  }
}

/** Puts a new attachment where the old one was: the primary stays first. */
function inPlace(made: Done, others: readonly Done[]): Done[] {
  return made.attachment.primary ? [made, ...others] : [...others, made];
}

const noResult: Result = { interfaces: [], ips: [], routes: [], dns: {} };
/** An attachment that is still to come, or of which no more is known. */
const withoutResult = (attachment: Attachment): Done => ({ attachment, result: noResult });

/** What is left takes over the default route of what is gone; a failure costs that alone. */
async function inherit({ host, chain, done }: LiveOperation, gone: Result): Promise<void> {
  try {
    await inheritDefaultRoutes(host, chain.netns, gone, done);
  } catch (error) {
    log(host, "error", `A pod is left without default route: ${toCniError(error).message}`);
  }
}

/** The default route goes from the old one to the new one, where the old one has it. */
function takingRoute(attach: Attachment, old: Done | undefined): Attachment {
  const owns = old?.result.routes.some(({ dst }) => dst.endsWith("/0")) ?? false;
  return owns && attach.defaultRoute === undefined ? { ...attach, defaultRoute: [] } : attach;
}

function endIfAsked({ host }: LiveOperation): void {
  if (host.signal.aborted) throw new CniError(code.tryAgainLater, "Asked to end during a switch");
}

function changed({ attachment, result }: Done): ChangedAttachment {
  const { network, ifName } = attachment;
  return { network, ifName, addresses: ownAddresses(attachment, result) };
}

function withMore(error: unknown, more: string): CniError {
  const { code: number, message, details, rule } = toCniError(error);
  return new CniError(number, `${message}; ${more}`, { details, rule, cause: error });
}

async function putRulesInForce(live: LiveOperation, done: readonly Done[]): Promise<void> {
  (await enforceOn(live, done))?.release();
}

/** Brings policy and record up to date and gives the lock back. Never throws. */
async function settle(live: LiveOperation, failure: unknown): Promise<void> {
  const { host, rows, done, chain } = live;
  const pod = podLabel(firstOf(rows).pod);
  const failed = (error: unknown, what = "") =>
    log(host, "error", `${what}${toCniError(error).message}`, { pod });
  try {
    await putRulesInForce({ ...live, chain: undoChain(chain) }, done);
  } catch (error) {
    // What it had before is guarded as it was, what is new was guarded before it came.
    failed(error, "Cannot bring a pod up to date: ");
  }
  try {
    const status = await endOperation(live, failure);
    if (status) await publishRunning(live, status);
  } catch (error) {
    failed(error);
  }
}
