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
import { CniError, code, type Host, log, type Request, toCniError } from "./cni.ts";
import { closeState, openCopy, openState, type State } from "./database.ts";
import { type ChainOptions, delChain } from "./delegate.ts";
import { isObject } from "./json.ts";
import {
  type Journal,
  noteInterrupted,
  openJournal,
  pruneLedger,
  withAudit,
  writeAlone,
  writeAside,
  writeJournal,
} from "./ledger.ts";
import { endHolder, newOperation, type Operation, release, takeLock } from "./lock.ts";
import { isForeignNetns } from "./netns.ts";
import type { Result } from "./result.ts";
import { parseResult } from "./result_wire.ts";
import { loadConfig, loadNodeSettings, type NodeSettings } from "./settings.ts";
import {
  type CallId,
  type DamagedAttachment,
  endOf,
  forget,
  hasRuleset,
  recorded,
  type StoredAttachment,
  setEnded,
  setFailing,
} from "./state.ts";
import { mark } from "./trace.ts";
import { forgetTraffic } from "./traffic.ts";
import { type Fate, fateOf, undo, undoAll, withPresentPlugins } from "./undo.ts";

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
export async function del(
  host: Host,
  request: Request,
  isDue?: (rows: readonly StoredAttachment[]) => boolean,
): Promise<undefined> {
  mark("load");
  const settings = await loadNodeSettings(host, request.config);
  mark("config");
  const operation = newOperation(host, request.containerId, "DEL");
  const chain: ChainOptions = {
    netns: request.netns,
    token: operation.token,
    deadlineMs: host.now() + delTimeoutMs,
    signal: host.signal,
    journal: openJournal(host, request),
  };
  const state = openOrReport(host, settings);
  mark("open");
  if (!state) {
    if (request.config["delOnly"] === true) return undefined;
    await deleteByGuess(host, request, chain);
    return undefined;
  }
  try {
    await deleteRecorded(host, request, settings, state, operation, chain, isDue);
  } finally {
    closeState(state);
  }
  return undefined;
}

/** DEL must not depend on the record: without it, it does what it can. */
function openOrReport(host: Host, { stateDir }: NodeSettings): State | undefined {
  try {
    return openState(host, stateDir);
  } catch (error) {
    log(host, "error", toCniError(error).message, { dir: stateDir });
  }
  try {
    return openCopy(stateDir);
  } catch (error) {
    log(host, "debug", toCniError(error).message, { dir: stateDir });
    return undefined;
  }
}

/** What is on record of a call. */
interface Found {
  rows: StoredAttachment[];
  damaged: DamagedAttachment[];
  /** Did it end before, with nothing left? */
  ended: boolean;
}

async function deleteRecorded(
  host: Host,
  request: Request,
  settings: NodeSettings,
  state: State,
  operation: Operation,
  chain: ChainOptions,
  isDue?: (rows: readonly StoredAttachment[]) => boolean,
): Promise<void> {
  const call = { containerId: request.containerId, requestIfName: request.ifName };
  const endsAdd = isDue === undefined;
  const found = await findLocked(host, state, operation, call, chain, endsAdd).catch(
    (error: unknown) => {
      if (chain.journal && endsAdd) writeAlone(host, state, chain.journal, error);
      throw error;
    },
  );
  mark("lock");
  if (isDue && !isDue(found.rows)) return release(state, operation, () => undefined);
  for (const row of found.rows) noteInterrupted(chain.journal, row);
  const errors = new Map<StoredAttachment, CniError[]>();
  let outcomes: Outcome[] = [];
  try {
    await undoAll(
      found.rows.toReversed(),
      (attachment) => undo(host, attachment, request.path, chain),
      errors,
    );
    await guessTheRest(host, request, found, chain);
  } finally {
    mark("undo");
    const nowMs = host.now();
    outcomes = [...errors].map(([attachment, failures]) => ({
      attachment,
      errors: failures,
      fate: fateOf(attachment, failures, settings.delRetryWindowMs, nowMs),
    }));
    const settled = { call, outcomes, damaged: found.damaged };
    settle(host, state, operation, settled, settings, chain.journal, nowMs);
    mark("commit");
  }
  // Not before: as long as something is attached the node agent keeps its rules in force.
  await liftPolicies(host, state, call, errors);
  failIfRetryWanted(host, outcomes);
}

/** Rulesets that stand in a namespace where nothing of it is left. */
async function liftPolicies(
  host: Host,
  state: State,
  call: CallId,
  errors: ReadonlyMap<StoredAttachment, CniError[]>,
): Promise<void> {
  const rows = [...errors];
  const places = new Map(rows.map(([{ netnsId, netns }]) => [netnsId, netns]));
  for (const [netnsId, netns] of places) {
    const isLeft = rows.some(([row, failures]) => row.netnsId === netnsId && failures.length > 0);
    if (isLeft || !hasRuleset(state, netnsId)) continue;
    const { liftRuleset } = await import("./policy/rulesets.ts");
    await liftRuleset(host, state, { netnsId, netns }, call);
  }
}

/** What became of one attachment. */
interface Outcome {
  attachment: StoredAttachment;
  errors: CniError[];
  fate: Fate;
}

/**
 * Takes the container's lock and reads what is on record. Where nothing can be written, on a disk
 * that is full or read-only, no ADD can begin either: DEL goes on without the lock.
 */
async function findLocked(
  host: Host,
  state: State,
  operation: Operation,
  call: CallId,
  chain: ChainOptions,
  endsAdd: boolean,
): Promise<Found> {
  const find = (): Found => {
    const { readable, damaged } = recorded(host, state, call.containerId);
    const ofCall = (one: CallId) => one.requestIfName === call.requestIfName;
    return {
      rows: readable.filter(ofCall),
      damaged: damaged.filter(ofCall),
      ended: endOf(state, call) !== undefined,
    };
  };
  const startedMs = host.now();
  const asked = new Set<string>();
  try {
    if (state.copyDir === "") {
      return await takeLock(host, state, operation, chain, find, (holder) => {
        if (endsAdd) endAdd(holder, asked, host.now() - startedMs);
      });
    }
  } catch (error) {
    if (!(error instanceof CniError) || error.code !== code.stateUnavailable) throw error;
    log(host, "error", `${error.message}: DEL goes on without a lock`);
  }
  try {
    return find();
  } catch (error) {
    log(host, "error", `${toCniError(error).message}: DEL goes on without a record`);
    return { rows: [], damaged: [], ended: false };
  }
}

/** Operations that roll back when they are asked to end. */
const attaching: ReadonlySet<string> = new Set(["ADD", "repair", "switch"]);

/** Asks an ADD that holds our container's lock to roll back, once; then ends it. */
function endAdd(holder: Operation, asked: Set<string>, waitedMs: number): void {
  if (!attaching.has(holder.command)) return;
  if (waitedMs > addEndMs) endHolder(holder, "SIGKILL");
  else if (!asked.has(holder.token)) endHolder(holder, "SIGTERM");
  asked.add(holder.token);
}

function settle(
  host: Host,
  state: State,
  operation: Operation,
  found: { call: CallId; outcomes: Outcome[]; damaged: DamagedAttachment[] },
  { auditKeepMs }: NodeSettings,
  journal: Journal | undefined,
  nowMs: number,
): void {
  if (state.copyDir !== "") return;
  const retried = found.outcomes.find(({ fate }) => fate === "failing");
  try {
    withAudit(host, (isAudited) =>
      release(state, operation, () => {
        for (const { attachment, errors, fate } of found.outcomes) {
          if (fate === "gone") forget(state, attachment);
          else {
            const error = errors.map(({ message }) => message).join("; ");
            setFailing(state, attachment, { state: fate, error, nowMs });
          }
        }
        for (const one of found.damaged) {
          setFailing(state, one, { state: "leaked", error: "Its plan cannot be read", nowMs });
        }
        // Whatever is left: an ADD that began before this moment must not attach any more.
        setEnded(state, found.call, "DEL", nowMs);
        if (!isAudited) return;
        // A DEL with nothing to do, of which runtimes send three per pod, is no news.
        if (journal && journal.rows.length > 0) {
          writeJournal(host, state, journal, retried?.errors[0]);
        }
        writeAside(host, state, "the ledger", () => pruneLedger(state, nowMs, auditKeepMs));
        writeAside(host, state, "traffic", () => forgetTraffic(state, found.call.containerId));
      }),
    );
  } catch (error) {
    // The rows stay: a later DEL, ADD or gc calls the delegates again, which is harmless.
    log(host, "error", toCniError(error).message, { container: found.call.containerId });
  }
}

function failIfRetryWanted(host: Host, outcomes: Outcome[]): void {
  const retried: CniError[] = [];
  for (const { attachment, errors, fate } of outcomes) {
    if (fate === "failing") retried.push(...errors);
    if (fate === "leaked") {
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
async function guessTheRest(
  host: Host,
  request: Request,
  found: Found,
  chain: ChainOptions,
): Promise<void> {
  if (found.ended) return;
  if (found.damaged.length > 0) {
    await deleteByGuess(host, request, chain, new Set(found.damaged.map(({ ifName }) => ifName)));
  } else if (found.rows.length === 0 && request.config["delOnly"] !== true) {
    await deleteByGuess(host, request, chain);
  }
}

/**
 * DEL without a record: plans again from what the request itself carries, never from the API, and
 * calls DEL on every plugin of that plan. Errors are reported, the DEL succeeds (CNI SPEC 1.1 §2).
 *
 * @param ifNames the interfaces to delete; absent: all
 */
async function deleteByGuess(
  host: Host,
  request: Request,
  chain: ChainOptions,
  ifNames?: ReadonlySet<string>,
): Promise<void> {
  const netns = isForeignNetns(request.netns) ? request.netns : "";
  try {
    const { guessPlan } = await import("./plan.ts");
    const plan = await guessPlan(await loadConfig(request.config), request);
    const result = carriedResult(request);
    for (const attachment of plan.attachments.toReversed()) {
      if (ifNames && !ifNames.has(attachment.ifName)) continue;
      const present = withPresentPlugins(attachment, request.path);
      for (const error of await delChain(host, present, result, { ...chain, netns })) {
        log(host, "warn", `Best effort without a record: ${error.message}`);
      }
    }
    for (const { message } of plan.problems) log(host, "debug", `Nothing to guess: ${message}`);
  } catch (error) {
    log(host, "debug", `Nothing on record and nothing to guess: ${toCniError(error).message}`);
  }
}

function carriedResult(request: Request): Result | undefined {
  if (!isObject(request.config.prevResult)) return undefined;
  try {
    return parseResult(request.config.prevResult, request.cniVersion, "prevResult");
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}
