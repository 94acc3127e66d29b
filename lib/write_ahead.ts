/**
 * The plan goes on disk before anything is done: under the container's lock, after undoing what an
 * earlier attempt left, and never over what is not ours.
 * Source: design D4, D6.
 */
import { CniError, code, type Host, log, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { type State, write } from "./database.ts";
import { type ChainOptions, undoOptions } from "./delegate.ts";
import { noteInterrupted } from "./ledger.ts";
import { type Operation, release, takeLock } from "./lock.ts";
import { interfacesIn, netnsId } from "./netns.ts";
import { checkQuota } from "./quota.ts";
import {
  type Attachment,
  attachments,
  type CallId,
  endOf,
  forget,
  hasRuleset,
  insertPlanned,
  recorded,
  type StoredAttachment,
  setEnded,
} from "./state.ts";
import { undo } from "./undo.ts";

/**
 * Takes the lock and writes the plan down, after undoing what an earlier attempt left (a killed
 * ADD, a failed DEL, a container started again after a reboot).
 *
 * @throws CniError 100 when there would be too many attachments; 105 when the container has an
 *   interface of a planned name already; 11 when another operation does not end in time, or what
 *   was left cannot be undone; 106
 */
export async function intend(
  host: Host,
  state: State,
  config: Config,
  operation: Operation,
  planned: Attachment[],
  chain: ChainOptions,
  startedMs: number,
): Promise<void> {
  const stale = await takeLock(host, state, operation, chain, () => {
    checkNotDeleted(state, planned, startedMs, host.now());
    const left = leftovers(host, state, planned);
    if (left.length === 0) insertAdmitted(state, config, planned, host.now());
    return left;
  });
  if (stale.length === 0) return;
  try {
    const path = planned[0]?.cniPath.split(":") ?? [];
    await undoStored(host, state, stale.reverse(), path, undoOptions(host, chain));
    write(state, () => insertAdmitted(state, config, planned, host.now()));
  } catch (error) {
    release(state, operation, () => undefined);
    throw error;
  }
}

/**
 * The DEL that follows a refused ADD has nothing to undo: guessing would delete what is not ours.
 */
export function rememberRefusal(host: Host, state: State, planned: Attachment[]): void {
  const [first] = planned;
  if (!first) return;
  try {
    write(state, () => {
      const { readable, damaged } = recorded(host, state, first.containerId);
      const rows: CallId[] = [...readable, ...damaged];
      const isKnown = rows.some((row) => row.requestIfName === first.requestIfName);
      // An end by DEL must stay one: other ADDs may have been overtaken by it as well.
      if (!isKnown && !endOf(state, first)) setEnded(state, first, "ADD", host.now());
    });
  } catch (error) {
    log(host, "warn", toCniError(error).message, { container: first.containerId });
  }
}

/**
 * Writes the plan down, unless it is too much, or the pod has an interface of a planned name that
 * we did not make: a delegate would refuse it (SPEC §2 "ADD"), and its DEL would then remove what
 * is not ours.
 * @throws CniError 100 or 105
 */
function insertAdmitted(state: State, config: Config, planned: Attachment[], nowMs: number): void {
  if (config.access.maxAttachments) checkQuota(state, config, planned);
  const present = new Set(interfacesIn(planned[0]?.netns ?? ""));
  const taken = planned.find(({ ifName }) => present.has(ifName));
  if (taken) {
    throw new CniError(
      code.interfaceConflict,
      `Cannot attach network "${taken.network}": the pod has an interface "${taken.ifName}" ` +
        "already, and genie did not make it",
    );
  }
  insertPlanned(state, planned, nowMs);
}

/**
 * Refuses an ADD that was overtaken by a DEL of the same call, before it had the lock: its runtime
 * was killed or gave up, so nobody would ever delete what it attaches.
 * @throws CniError 11
 */
function checkNotDeleted(
  state: State,
  planned: Attachment[],
  startedMs: number,
  nowMs: number,
): void {
  const [first] = planned;
  const end = first && endOf(state, first);
  // A DEL that is still to come was there before the clock was set back.
  if (end?.command !== "DEL" || end.atMs <= startedMs || end.atMs > nowMs) return;
  throw new CniError(
    code.tryAgainLater,
    `Cannot ADD container ${first?.containerId}: it was deleted while this ADD was being prepared`,
  );
}

/** Attachments of an earlier attempt that are in the way; a live one in the way is an error. */
function leftovers(host: Host, state: State, planned: Attachment[]): StoredAttachment[] {
  const [first] = planned;
  if (!first) return [];
  const names = new Set(planned.map(({ ifName }) => ifName));
  const found = attachments(host, state, first.containerId).filter(
    (one) => one.requestIfName === first.requestIfName || names.has(one.ifName),
  );
  const here = netnsId(first.netns);
  const live = found.find(
    (one) => one.state === "attached" && [here, netnsId(one.netns)].includes(one.netnsId),
  );
  if (!live) return found;
  throw new CniError(
    code.interfaceConflict,
    `Container ${first.containerId} has interface "${live.ifName}" on network "${live.network}" ` +
      "already: DEL it before another ADD",
  );
}

/** Undoes stored attachments, or keeps them and says why the new ADD cannot go on. */
async function undoStored(
  host: Host,
  state: State,
  stale: StoredAttachment[],
  path: string[],
  chain: ChainOptions,
): Promise<void> {
  for (const attachment of stale) {
    noteInterrupted(chain.journal, attachment);
    const errors = await undo(host, attachment, path, { ...chain, netns: attachment.netns });
    if (errors.length > 0) {
      throw new CniError(
        code.tryAgainLater,
        `Cannot undo an earlier attempt on interface "${attachment.ifName}": ${errors[0]?.message}`,
        { cause: errors[0] },
      );
    }
    write(state, () => forget(state, attachment));
    if (!hasRuleset(state, attachment.netnsId)) continue;
    const { liftRuleset } = await import("./policy/rulesets.ts");
    await liftRuleset(host, state, attachment, attachment);
  }
}
