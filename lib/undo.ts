/**
 * Undoing one recorded attachment: with the binaries, the network namespace and the result that are
 * still there, and what becomes of its record afterwards. Source: design D4, D5; facts 9-11.
 */
import { existsSync } from "node:fs";
import { basename } from "node:path";
import { CniError, code, type Host } from "./cni.ts";
import { type ChainOptions, delChain } from "./delegate.ts";
import { isPluginGone } from "./ending.ts";
import { netnsId } from "./netns.ts";
import { findPlugin } from "./networks.ts";
import type { Result } from "./result.ts";
import { parseResult } from "./result_wire.ts";
import type { Attachment, StoredAttachment } from "./state.ts";

/** Limit for one delegate call of DEL, in ms: runtimes give a whole DEL a minute. */
export const delegateTimeoutMs = 25_000;

/**
 * Runs DEL on all plugins of a recorded attachment.
 *
 * @param path further folders to look for its binaries in
 * @param chain its `netns` is where the caller believes the attachment to be
 * @returns the errors; empty when everything is undone
 */
export async function undo(
  host: Host,
  attachment: StoredAttachment,
  path: string[],
  chain: ChainOptions,
): Promise<CniError[]> {
  const present = withPresentPlugins(attachment, path);
  const netns = presentNetns(attachment, chain.netns);
  return delChain(host, present, storedResult(attachment), { ...chain, netns });
}

/**
 * Undoes several attachments in the order given, then once more those that failed while another one
 * was still there: two attachments to one network may share what neither can remove first (bridge
 * keeps one chain of rules per network and container).
 *
 * @param errors filled as it goes on, so that what was undone is known whatever happens
 */
export async function undoAll<T>(
  attachments: readonly T[],
  undoOne: (attachment: T) => Promise<CniError[]>,
  errors: Map<T, CniError[]>,
): Promise<void> {
  for (const attachment of attachments) errors.set(attachment, await undoOne(attachment));
  if (errors.size < 2) return;
  for (const [attachment, failures] of [...errors]) {
    const isWorthIt = failures.some(({ code: number }) => !hopeless.has(number));
    if (isWorthIt) errors.set(attachment, await undoOne(attachment));
  }
}

/** Failures that the same call at once would only repeat. */
const hopeless = new Set<number>([code.delegateTimeout, code.delegateNotFound]);

/** Binaries may have moved since ADD: one that is gone is looked for by its name. */
export function withPresentPlugins<T extends Attachment>(attachment: T, path: string[]): T {
  const dirs = [...attachment.cniPath.split(":"), ...path];
  const plugins = attachment.plugins.map((file) =>
    existsSync(file) ? file : (findPlugin(basename(file), dirs) ?? file),
  );
  return { ...attachment, plugins, timeoutMs: Math.min(attachment.timeoutMs, delegateTimeoutMs) };
}

/**
 * The path, unless it leads to another namespace than the attachment was made in, or to none: a
 * reused `/proc/<pid>/ns/net`, the node's own. Plugins would delete what is there, or fail.
 */
function presentNetns(attachment: StoredAttachment, netns: string): string {
  const found = netnsId(netns);
  return found === "" || found === attachment.netnsId ? netns : "";
}

/** The final result of a stored attachment; undefined where it is missing or damaged. */
export function storedResult({ result, list, network }: StoredAttachment): Result | undefined {
  if (result === undefined) return undefined;
  try {
    return parseResult(result, list.cniVersion, `stored result of network "${network}"`);
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/** What becomes of an attachment after a DEL. */
export type Fate = "gone" | "failing" | "leaked";

/**
 * Decides it: a delegate that fails is tried again until the window since its first failure is
 * over. One whose binary is gone is given up at once: no retry brings it back.
 */
export function fateOf(
  attachment: StoredAttachment,
  errors: CniError[],
  windowMs: number,
  nowMs: number,
): Fate {
  if (errors.length === 0) return "gone";
  if (errors.every(isPluginGone)) return "leaked";
  const sinceMs = attachment.failedAtMs === 0 ? nowMs : attachment.failedAtMs;
  return nowMs - sinceMs >= windowMs ? "leaked" : "failing";
}
