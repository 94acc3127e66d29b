/**
 * An ADD that does not succeed, or that follows one that did not: what an earlier attempt left is
 * undone before, what this one made is undone after, and the record says what remains (design D4).
 */
import type { Added, Call, Chain, Host, Plan, Request } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { closeState, openState, type State, write } from "../database.ts";
import { isObject } from "../json.ts";
import { interfacesIn, netnsId } from "../kernel.ts";
import { writeAlone } from "../ledger.ts";
import { endOf, release } from "../lock.ts";
import type { Attachment, CallId, Journal, Result, StoredAttachment } from "../record.ts";
import * as onRecord from "../recorded.ts";
import { loadNodeSettings } from "../settings.ts";

/** Records a failed ADD in the ledger of the `state_dir` that the broken table names, if it can. */
export async function noteUnconfigured(
  host: Host,
  request: Request,
  journal: Journal,
  cause: unknown,
): Promise<void> {
  try {
    const state = await openState(host, (await loadNodeSettings(host, request.config)).stateDir);
    writeAlone(host, state, journal, cause);
    closeState(state);
  } catch (error) {
    log(host, "debug", `Cannot write the ledger: ${toCniError(error).message}`);
  }
}

/** Attachments of an earlier attempt that are in the way; a live one in the way is an error. */
function findLeftovers(host: Host, state: State, planned: Attachment[]): StoredAttachment[] {
  const [first] = planned;
  const found = first ? onRecord.attachments(host, state, first.containerId) : [];
  if (!first || found.length === 0) return [];
  const names = new Set(planned.map(({ ifName }) => ifName));
  const inTheWay = found.filter(
    (one) => !one.parkedAs && (one.requestIfName === first.requestIfName || names.has(one.ifName)),
  );
  const live = inTheWay.find((one) => one.state === "attached" && mayLive(one, first.netns));
  if (!live) return inTheWay;
  const has = `has interface "${live.ifName}" on network "${live.network}" already`;
  const message = `Container ${first.containerId} ${has}: DEL it before another ADD`;
  throw new CniError(code.interfaceConflict, message);
}

/**
 * May an attachment still be there, at the path where it was made or at the one of this call? The
 * kernel gives the inode number of a namespace that has gone to a new one, so that an equal
 * number proves nothing where the interface is missing.
 */
function mayLive(one: StoredAttachment, netns: string): boolean {
  const path = [netns, one.netns].find((each) => netnsId(each) === one.netnsId);
  if (path === undefined) return false;
  const made = onRecord.storedResult(one)?.interfaces.find(({ sandbox }) => sandbox)?.name;
  return made === undefined || (interfacesIn(path)?.includes(made) ?? true);
}

/**
 * Undoes what an earlier attempt left, under the container's lock.
 * @throws CniError 105 when an attachment in the way is a live one, or another call has what a
 *   plugin gives a container once; 11 when one cannot be undone, so that the new ADD cannot go on
 */
export async function undoLeftovers(call: Call, planned: Attachment[]): Promise<void> {
  const { host, state, chain, config } = call;
  const leftovers = findLeftovers(host, state, planned).reverse();
  const [{ containerId = "", cniPath = "" } = {}] = planned;
  const isLeft = ({ ifName }: Attachment) => leftovers.some((one) => one.ifName === ifName);
  const all = onRecord.attachments(host, state, containerId);
  const others = all.filter((one) => one.state === "attached" && !isLeft(one));
  if (others.length > 0) {
    const { checkOneInterface } = await import("./plugin_keys.ts");
    checkOneInterface(config, planned, others);
  }
  const undoing = onRecord.undoChain(chain);
  for (const attachment of leftovers) {
    onRecord.noteInterrupted(chain.journal, attachment);
    const at = { ...undoing, netns: attachment.netns };
    const isTried = attachment.state === "failing" && attachment.failedAtMs >= call.startedMs;
    const mayWait = mayBeParked(attachment, planned);
    const errors =
      isTried && mayWait ? [] : await onRecord.undo(at, attachment, cniPath.split(":"), others);
    if (mayWait && (isTried || errors.length > 0)) {
      parkRow(call, attachment, errors[0]?.message ?? attachment.error);
      continue;
    }
    if (errors.length > 0) {
      const [cause] = errors;
      const what = `Cannot undo an earlier attempt on interface "${attachment.ifName}"`;
      throw new CniError(code.tryAgainLater, `${what}: ${cause?.message}`, { cause });
    }
    write(state, () => onRecord.forget(state, attachment));
    if (!onRecord.hasRuleset(state, attachment.netnsId)) continue;
    const { liftRuleset } = await import("../policy/rulesets.ts");
    await liftRuleset(host, state, attachment, attachment);
  }
}

/**
 * May the DEL of a leftover wait, so that another network can have its interface now? Only where it
 * left nothing in the pod, and where that DEL cannot hit what comes: neither plugin nor network is
 * the same.
 */
function mayBeParked({ ifName, list }: StoredAttachment, planned: readonly Attachment[]): boolean {
  const [{ netns = "" } = {}] = planned;
  const type = list.plugins[0]?.type;
  const isSame = (one: Attachment) =>
    one.list.plugins[0]?.type === type || one.list.name === list.name;
  return interfacesIn(netns)?.includes(ifName) === false && !planned.some(isSame);
}

/** Keeps a row whose DEL fails as given up, under a key that leaves its interface to another. */
function parkRow({ host, state }: Call, row: StoredAttachment, error: string): void {
  const { containerId, ifName, network } = row;
  write(state, () => {
    onRecord.setFailing(state, row, { state: "leaked", error, nowMs: host.now() });
    state.database
      .query(
        `UPDATE attachments SET ifname = ?1 || '/' || lower(hex(randomblob(4)))
         WHERE container_id = ?2 AND ifname = ?1`,
      )
      .run(ifName, containerId);
  });
  const fields = { container: containerId, network, error };
  log(host, "warn", "The DEL of a network that failed is retried later, by genie gc", fields);
}

/**
 * Undoes a chain whose ADD failed at plugin `index`: DEL runs on that one and those before it (CNI
 * SPEC 1.1 §4). What did nothing is not held against it: a plugin that could not be started, or
 * that refuses DEL with the words with which it refused ADD.
 */
export async function undoFailed(
  chain: Chain,
  attachment: Attachment,
  { result, index, error }: { result: Result | undefined; index: number; error: CniError },
): Promise<Added & { kind: "failed" }> {
  const { ifName } = attachment;
  const neverRan = isObject(error.cause) && error.cause["kind"] === "spawn";
  const last = neverRan ? index - 1 : index;
  const undoing = onRecord.undoChain(chain);
  const undone = await onRecord.delChain(undoing, attachment, { result, last });
  const undo = undone.filter((one) => !isRefusedAlike(one, error));
  const isLeft = undo.length < undone.length && interfacesIn(chain.netns)?.includes(ifName);
  // An IPAM that refuses makes its interface plugin fail, which may have begun.
  if (isLeft) await (await import("./plugin_keys.ts")).removeLeft(undoing, attachment);
  return { kind: "failed", error, undo };
}

/** Codes of CNI SPEC 1.1 §5 for a call that is refused as it stands, before anything is done. */
const refusals = new Set<number>([
  code.incompatibleVersion,
  code.unsupportedField,
  code.invalidEnvironment,
  code.decodingFailure,
  code.invalidConfig,
]);

/** macvlan and vlan look up the device that they build on before anything else, in DEL as well. */
const noMaster = /: plugin "(macvlan|vlan)" failed: Link not found$/;
/** Where even the IPAM plugin could not be started in ADD, there is no address to give back. */
const lacksPlugin = / failed: failed to find plugin "/;

function isRefusedAlike(del: CniError, add: CniError): boolean {
  const textOf = ({ message }: CniError) => message.replace(/^Cannot \w+ /, "");
  const isRefusal = refusals.has(del.code) || onRecord.isCallRefused(del);
  const didNothing = isRefusal || [noMaster, lacksPlugin].some((one) => one.test(del.message));
  return didNothing && del.code === add.code && textOf(del) === textOf(add);
}

/**
 * Gives the lock back after a plan was refused, and remembers that: the DEL that follows has
 * nothing to undo, and guessing would delete what is not ours.
 */
export function giveUp({ host, state, operation }: Call, planned: Attachment[]): void {
  const [first] = planned;
  try {
    release(state, operation, () => {
      if (!first) return;
      const { readable, damaged } = onRecord.recorded(host, state, first.containerId);
      const rows: CallId[] = [...readable, ...damaged];
      const isKnown = rows.some((row) => row.requestIfName === first.requestIfName);
      // An end by DEL must stay one: other ADDs may have been overtaken by it as well.
      if (!isKnown && !endOf(state, first)) onRecord.setEnded(state, first, "ADD", host.now());
    });
  } catch (error) {
    log(host, "warn", toCniError(error).message, { container: operation.containerId });
    // The lock goes back at least; where even that fails, DEL takes it over from a dead process.
    try {
      release(state, operation, () => undefined);
    } catch (failure) {
      log(host, "debug", toCniError(failure).message);
    }
  }
}

/**
 * Rolls an ADD back that failed. Returns only where another try makes sense: the network that
 * failed was of our own choice, and there may be a next best.
 * @throws `error`, or a CniError that also tells of the tries before: why the best network failed
 *   says most
 */
export async function rollBackOrThrow(call: Call, error: unknown): Promise<void> {
  const { host, config, failed, startedMs, plan } = call;
  call.plan = undefined;
  if (!plan) throw afterOthers(failed, error);
  const { choice, attachments, primarySet } = plan;
  const chosen = attachments.find(
    ({ network, ifName }) => network === choice?.network && primarySet.has(ifName),
  );
  const isChosen = chosen !== undefined && call.undoErrors.has(chosen);
  await rollBack(call, plan);
  if (!choice || !isChosen) throw afterOthers(failed, error);
  const { noteNumbers } = await import("../choice/choose.ts");
  noteNumbers(call.journal, choice);
  const failure = toCniError(error);
  const before = [...failed.values()];
  failed.set(choice.network, failure);
  const isOver = host.signal.aborted || host.now() >= startedMs + config.timeoutMs;
  if (isOver || failed.size >= config.select.attempts) throw withOthers(failure, before);
  log(host, "warn", "Chosen network failed, trying the next best", {
    container: call.request.containerId,
    network: choice.network,
    error: failure.message,
  });
}

/** Undoes in reverse what was attached; forgets what is gone, keeps what could not be undone. */
async function rollBack(call: Call, { attachments }: Plan): Promise<void> {
  const { host, state, operation, made, undoErrors } = call;
  const results = new Map(made.map(({ attachment, result }) => [attachment, result]));
  const undoing = onRecord.undoChain(call.chain);
  await onRecord.undoAll(
    made.toReversed().map(({ attachment }) => attachment),
    (attachment) => onRecord.delChain(undoing, attachment, { result: results.get(attachment) }),
    undoErrors,
  );
  const nowMs = host.now();
  const errorOf = (attachment: Attachment) => undoErrors.get(attachment)?.[0]?.message;
  const kept = attachments.filter((attachment) => errorOf(attachment) !== undefined);
  for (const attachment of kept) {
    log(host, "error", "Cannot undo a failed ADD: kept for DEL and genie gc", {
      container: attachment.containerId,
      network: attachment.network,
      interface: attachment.ifName,
      error: errorOf(attachment),
    });
  }
  try {
    release(state, operation, () => {
      for (const attachment of attachments) {
        const error = errorOf(attachment);
        if (error === undefined) onRecord.forget(state, attachment);
        else onRecord.setFailing(state, attachment, { state: "failing", error, nowMs });
      }
      const [first] = attachments;
      if (first && kept.length === 0) onRecord.setEnded(state, first, "ADD", nowMs);
    });
  } catch (error) {
    // The rows stay as planned, and the lock names a process that is about to end: DEL undoes them
    // again, which costs a call and harms nothing.
    log(host, "error", toCniError(error).message, { container: operation.containerId });
  }
  await call.enforced?.undo();
}

/** Why the best network failed says more than why there is no other one. */
function afterOthers(failed: ReadonlyMap<string, CniError>, error: unknown): unknown {
  const [first] = failed.values();
  return first ? withOthers(first, [toCniError(error)]) : error;
}

function withOthers(error: CniError, others: CniError[]): CniError {
  if (others.length === 0) return error;
  const details = [error.details, ...others.map((one) => `Another try: ${one.message}`)];
  return new CniError(error.code, error.message, {
    details: details.join("\n").trim(),
    cause: error,
  });
}

/** Leaves a failed ADD in the ledger; a denial gets an Event too, for who looks at the pod. */
export async function reportFailure(call: Call, error: unknown): Promise<void> {
  const { host, state, config, journal } = call;
  writeAlone(host, state, journal, error);
  const failure = toCniError(error);
  if (!failure.rule) return;
  const { postDenial } = await import("../kubernetes/event.ts");
  await postDenial(host, config, journal.base, failure);
}
