/**
 * DEL, from the record alone.
 *
 * It always ends (design D5): what is gone already is success; a delegate that fails keeps its
 * record and fails the DEL, so that the runtime retries; after the retry window the attachment is
 * parked as leaked, DEL succeeds, and `genie gc` goes on. A delegate whose binary is gone is parked
 * at once. A record that cannot be written is read all the same; one that cannot be read is
 * replaced by what the request itself carries.
 * Source: CNI SPEC 1.1 §2 DEL; design D4, D5; facts 9-11.
 */
import type { Chain, Host, Request } from "./call.ts";
import { CniError, code, log, toCniError } from "./cni.ts";
import { closeState, openState, type State } from "./database.ts";
import { openJournal, withAudit, writeAlone, writeAside, writeJournal } from "./ledger.ts";
import { endOf, newOperation, release, takeLock } from "./lock.ts";
import type { CallId, DamagedAttachment, Operation, StoredAttachment } from "./record.ts";
import {
  type DelOutcome,
  forget,
  forgetTraffic,
  hasRuleset,
  noteInterrupted,
  outcomeOf,
  pruneLedger,
  recorded,
  setEnded,
  setFailing,
  undo,
  undoAll,
} from "./recorded.ts";
import { loadNodeSettings, type NodeSettings } from "./settings.ts";
import { mark } from "./streams.ts";

/** Limit for a whole DEL, in ms. */
const delTimeoutMs = 55_000;
/** How long an ADD that is asked to end may take to roll back before it is killed, in ms. */
const addEndMs = 35_000;

/**
 * DEL: undoes every attachment of this container and CNI_IFNAME that is on record.
 *
 * @param isDue for a DEL that no runtime asked for: looks at what is on record, under the lock, and
 *   says whether it is to be undone; an ADD of the same container is waited for then, not ended
 * @throws CniError of the delegate that failed, inside the retry window; 11 when another operation
 *   of this container does not end in time
 */
export async function detach(
  host: Host,
  request: Request,
  isDue?: (rows: readonly StoredAttachment[]) => boolean,
): Promise<undefined> {
  mark("load");
  const settings = await loadNodeSettings(host, request.config);
  mark("config");
  const operation = newOperation(host, request.containerId, "DEL");
  const chain: Chain = {
    host,
    netns: request.netns,
    token: operation.token,
    deadlineMs: host.now() + delTimeoutMs,
    signal: host.signal,
    journal: openJournal(host, request),
  };
  const state = await openOrReport(host, settings.stateDir);
  mark("open");
  if (!state) return guessTheRest(request, chain, nothingFound);
  const call: DelCall = { host, request, settings, state, operation, chain, isDue };
  try {
    const found = await findLocked(call);
    mark("lock");
    if (isDue && !isDue(found.rows)) release(state, operation, () => undefined);
    else await undoFound(call, await withCached(call, found));
  } finally {
    closeState(state);
  }
}

/** One call of DEL, with its open record. */
interface DelCall {
  host: Host;
  request: Request;
  settings: NodeSettings;
  state: State;
  operation: Operation;
  chain: Chain;
  isDue: ((rows: readonly StoredAttachment[]) => boolean) | undefined;
}

/** DEL must not depend on the record: without it, it does what it can. */
async function openOrReport(host: Host, dir: string): Promise<State | undefined> {
  try {
    return await openState(host, dir);
  } catch (error) {
    log(host, "error", toCniError(error).message, { dir });
  }
  try {
    return (await import("./recovery/database.ts")).openCopy(dir);
  } catch (error) {
    log(host, "debug", toCniError(error).message, { dir });
    return undefined;
  }
}

/** What is on record of a call. */
interface Found {
  rows: StoredAttachment[];
  /** Of other calls of the container. */
  others: StoredAttachment[];
  damaged: DamagedAttachment[];
  /** Did it end before, with nothing left? */
  ended: boolean;
}

const nothingFound: Found = { rows: [], others: [], damaged: [], ended: false };

/** What is on record of a call; where that is nothing, what a runtime attached without genie. */
async function withCached({ host, state, request }: DelCall, found: Found): Promise<Found> {
  if (found.damaged.length > 0 || !isUnknown(request, found)) return found;
  const { adoptCall } = await import("./recovery/guess.ts");
  return { ...found, rows: await adoptCall(host, state, request, found.others) };
}

/** Nothing is on record of the call, though it may have attached something. */
function isUnknown(request: Request, { rows, ended }: Found): boolean {
  return rows.length === 0 && !ended && request.config["delOnly"] !== true;
}

/** Undoes what is on record of a call, in reverse, and writes down what became of it. */
async function undoFound(call: DelCall, found: Found): Promise<void> {
  const { host, request, settings, chain } = call;
  for (const row of found.rows) noteInterrupted(chain.journal, row);
  const errors = new Map<StoredAttachment, CniError[]>();
  let outcomes: Outcome[] = [];
  try {
    const undoOne = (row: StoredAttachment) => undo(chain, row, request.path, found.others);
    await undoAll(found.rows.toReversed(), undoOne, errors);
    await guessTheRest(request, chain, found);
  } finally {
    mark("undo");
    const nowMs = host.now();
    outcomes = [...errors].map(([attachment, failures]) => ({
      attachment,
      errors: failures,
      outcome: outcomeOf(attachment, failures, settings.delRetryWindowMs, nowMs),
    }));
    settle(call, found, outcomes, nowMs);
    mark("commit");
  }
  // Not before: as long as something is attached the node agent keeps its rules in force.
  await liftPolicies(call, errors);
  failIfRetryWanted(host, outcomes);
}

/** Rulesets that stand in a namespace where nothing of it is left. */
async function liftPolicies(
  { host, state, request }: DelCall,
  errors: ReadonlyMap<StoredAttachment, CniError[]>,
): Promise<void> {
  const rows = [...errors];
  const places = new Map(rows.map(([{ netnsId, netns }]) => [netnsId, netns]));
  for (const [netnsId, netns] of places) {
    const isLeft = rows.some(([row, failures]) => row.netnsId === netnsId && failures.length > 0);
    if (isLeft || !hasRuleset(state, netnsId)) continue;
    const { liftRuleset } = await import("./policy/rulesets.ts");
    await liftRuleset(host, state, { netnsId, netns }, callOf(request));
  }
}

/** What became of one attachment. */
interface Outcome {
  attachment: StoredAttachment;
  errors: CniError[];
  outcome: DelOutcome;
}

/** By what the call is on record. */
function callOf({ containerId, ifName }: Request): CallId {
  return { containerId, requestIfName: ifName };
}

/**
 * Takes the container's lock and reads what is on record. Where nothing can be written, on a disk
 * that is full or read-only, no ADD can begin either: DEL goes on without the lock.
 */
async function findLocked(call: DelCall): Promise<Found> {
  const { host, state, operation, chain, isDue } = call;
  const id = callOf(call.request);
  const find = (): Found => {
    const { readable, damaged } = recorded(host, state, id.containerId);
    const ofCall = (one: CallId) => one.requestIfName === id.requestIfName;
    return {
      rows: readable.filter(ofCall),
      others: readable.filter((one) => !ofCall(one)),
      damaged: damaged.filter(ofCall),
      ended: endOf(state, id) !== undefined,
    };
  };
  const startedMs = host.now();
  const asked = new Set<string>();
  try {
    if (state.copyDir === "") {
      return await takeLock({ ...chain, state, operation }, find, (holder) =>
        // One that no runtime asked for waits for an ADD.
        isDue ? undefined : endAdd(holder, asked, host.now() - startedMs),
      );
    }
  } catch (error) {
    if (!(error instanceof CniError) || error.code !== code.stateUnavailable) {
      if (chain.journal && !isDue) writeAlone(host, state, chain.journal, error);
      throw error;
    }
    log(host, "error", `${error.message}: DEL goes on without a lock`);
  }
  try {
    return find();
  } catch (error) {
    log(host, "error", `${toCniError(error).message}: DEL goes on without a record`);
    return nothingFound;
  }
}

/** Operations that roll back when they are asked to end. */
const attaching: ReadonlySet<string> = new Set(["ADD", "repair", "switch"]);

/** Asks an ADD that holds our container's lock to roll back, once; then ends it. */
async function endAdd(holder: Operation, asked: Set<string>, waitedMs: number): Promise<void> {
  if (!attaching.has(holder.command)) return;
  const isFirst = !asked.has(holder.token);
  asked.add(holder.token);
  if (!isFirst && waitedMs <= addEndMs) return;
  const { endHolder } = await import("./recovery/orphans.ts");
  endHolder(holder, waitedMs > addEndMs ? "SIGKILL" : "SIGTERM");
}

/** Writes down what became of everything, and gives the lock back. */
function settle(
  { host, state, operation, settings, request, chain: { journal } }: DelCall,
  { damaged }: Found,
  outcomes: Outcome[],
  nowMs: number,
): void {
  if (state.copyDir !== "") return;
  const retried = outcomes.find(({ outcome }) => outcome === "failing");
  try {
    withAudit(host, (isAudited) =>
      release(state, operation, () => {
        for (const { attachment, errors, outcome } of outcomes) {
          if (outcome === "gone") forget(state, attachment);
          else {
            const error = errors.map(({ message }) => message).join("; ");
            setFailing(state, attachment, { state: outcome, error, nowMs });
          }
        }
        for (const one of damaged) {
          setFailing(state, one, { state: "leaked", error: "Its plan cannot be read", nowMs });
        }
        // Whatever is left: an ADD that began before this moment must not attach any more.
        setEnded(state, callOf(request), "DEL", nowMs);
        if (!isAudited) return;
        // A DEL with nothing to do, of which runtimes send three per pod, is no news.
        if (journal && journal.rows.length > 0) {
          writeJournal(host, state, journal, retried?.errors[0]);
        }
        writeAside(host, state, "the ledger", () =>
          pruneLedger(state, nowMs, settings.auditKeepMs),
        );
        writeAside(host, state, "traffic", () => forgetTraffic(state, request.containerId));
      }),
    );
  } catch (error) {
    // The rows stay: a later DEL, ADD or gc calls the delegates again, which is harmless.
    log(host, "error", toCniError(error).message, { container: request.containerId });
  }
}

function failIfRetryWanted(host: Host, outcomes: Outcome[]): void {
  const retried: CniError[] = [];
  for (const { attachment, errors, outcome } of outcomes) {
    if (outcome === "failing") retried.push(...errors);
    if (outcome === "leaked") {
      log(host, "error", "Attachment parked as leaked: genie gc retries it", {
        container: attachment.containerId,
        network: attachment.network,
        interface: attachment.ifName,
        error: errors[0]?.message,
      });
    }
  }
  const [first, ...others] = retried;
  if (!first) return;
  throw new CniError(first.code, withoutSuccessWords(first.message), {
    details: withoutSuccessWords(
      [first.details, ...others.map(({ message }) => message)].filter((text) => text).join("\n"),
    ),
    cause: first,
  });
}

/**
 * containerd takes a DEL error with "not found" for success, and with an empty netns also "no such
 * file or directory" (go-cni): words that must not stand where a retry is wanted.
 */
export function withoutSuccessWords(text: string): string {
  return text
    .replace(/not found/gi, "absent")
    .replace(/no such file or directory/gi, "path is absent");
}

/** Best effort for what the record does not tell: a call it does not know, or damaged rows. */
async function guessTheRest(request: Request, chain: Chain, found: Found): Promise<undefined> {
  const { others, damaged, ended } = found;
  if (ended || (damaged.length === 0 && !isUnknown(request, found))) return;
  const { deleteByGuess } = await import("./recovery/guess.ts");
  const ifNames = damaged.length > 0 ? new Set(damaged.map(({ ifName }) => ifName)) : undefined;
  await deleteByGuess(chain, request, { ifNames, others });
}
