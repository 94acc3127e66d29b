/**
 * CHECK of one container, from the record. Source: CNI SPEC 1.1 §2 "CHECK".
 */
import { CniError, code, type Host, type Request, toCniError } from "./cni.ts";
import { closeState, openState } from "./database.ts";
import { type ChainOptions, checkChain } from "./delegate.ts";
import { findGone, repairCommand } from "./kernel_check.ts";
import { openJournal, writeAlone } from "./ledger.ts";
import { newOperation } from "./lock.ts";
import { readNetwork } from "./netlink.ts";
import type { Result } from "./result.ts";
import { loadNodeSettings } from "./settings.ts";
import { attachments, hasRuleset, type StoredAttachment } from "./state.ts";
import { oneLine } from "./text.ts";
import { storedResult } from "./undo.ts";

/**
 * CHECK: every attachment is still as ADD left it, say the kernel and each delegate.
 *
 * @throws CniError 11 for what is gone; of the first delegate that says no; 3 when nothing of the
 *   container is on record
 */
export async function check(host: Host, request: Request): Promise<undefined> {
  const settings = await loadNodeSettings(host, request.config);
  const { disableCheck, delOnly } = request.config;
  if (disableCheck === true || delOnly === true) return undefined;
  const journal = openJournal(host, request);
  const state = openState(host, settings.stateDir);
  try {
    const found = attachments(host, state, request.containerId).filter(
      (one) => one.requestIfName === request.ifName,
    );
    if (found.length === 0) {
      throw new CniError(
        code.unknownContainer,
        `Cannot check container ${request.containerId}: nothing for ${request.ifName} is on record`,
      );
    }
    const options: ChainOptions = {
      netns: request.netns,
      token: newOperation(host, request.containerId, "CHECK").token,
      deadlineMs: host.now() + checkTimeoutMs,
      signal: host.signal,
      journal,
    };
    for (const attachment of found) {
      if (attachment.state !== "attached") {
        throw new CniError(
          code.tryAgainLater,
          `Cannot check network "${attachment.network}": it is ${attachment.state}`,
        );
      }
      const result = storedResult(attachment);
      checkPresence(attachment, result, request.netns);
      await checkChain(host, attachment, result, options).catch((error: unknown) => {
        throw withRemedy(toCniError(error), attachment);
      });
    }
    for (const netnsId of new Set(found.map((one) => one.netnsId))) {
      if (!hasRuleset(state, netnsId)) continue;
      const { checkRuleset } = await import("./policy/enforce.ts");
      await checkRuleset(host, state, { netnsId, netns: request.netns }, options.deadlineMs);
    }
    writeAlone(host, state, journal);
    return undefined;
  } catch (error) {
    writeAlone(host, state, journal, error);
    throw error;
  } finally {
    closeState(state);
  }
}

const checkTimeoutMs = 60_000;

/**
 * Looks for the attachment in the pod itself: its plugins may look at less, or at nothing.
 * @throws CniError 11 with everything that is gone
 */
function checkPresence(
  attachment: StoredAttachment,
  result: Result | undefined,
  netns: string,
): void {
  const kernel = result && readNetwork(netns);
  const gone = kernel ? findGone(attachment, result, kernel) : [];
  if (gone.length === 0) return;
  const { network, ifName, pod } = attachment;
  const command = repairCommand(pod, network);
  throw new CniError(
    code.tryAgainLater,
    `Failed CHECK of network "${network}" (${ifName})${podOf(attachment)}: gone is ` +
      `${oneLine(gone.join(", "), 600)}${command && `; to put it right: ${command}`}`,
  );
}

/** Failures that say nothing of the attachment. */
const others = new Set<number>([
  ...[code.tryAgainLater, code.delegateNotFound, code.delegateTimeout, code.delegateProtocol],
]);

/** A plugin that says no names no remedy. */
function withRemedy(error: CniError, { pod, network }: StoredAttachment): CniError {
  const command = repairCommand(pod, network);
  if (command === "" || others.has(error.code)) return error;
  const details = [error.details, `To put it right: ${command}`].filter((text) => text !== "");
  return new CniError(error.code, error.message, { details: details.join("\n"), cause: error });
}

function podOf({ pod: { namespace, name } }: StoredAttachment): string {
  return name === "" ? "" : ` of pod ${namespace === "" ? name : `${namespace}/${name}`}`;
}
