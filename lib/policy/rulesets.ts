/**
 * The ruleset of one network namespace: what is attached there as policy sees it, and putting a
 * ruleset in force or taking it away. One table per namespace, whatever number of calls attached
 * there, so ADD, DEL, CHECK and the node agent take turns by a lock of the namespace. What is to be
 * in force is on record before it is.
 */
import { closeSync, openSync } from "node:fs";
import { dirname, join } from "node:path";
import type { Host } from "../call.ts";
import { kernelCalls } from "../check.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import { netnsId } from "../kernel.ts";
import type { Attachment, CallId, Result, StoredAttachment } from "../record.ts";
import { attachmentsIn, storedResult } from "../recorded.ts";
import { hostTables, type PolicyAttachment, type Rules } from "./compile.ts";
import type { HostEnds } from "./host_ends.ts";
import { applyRuleset, removeRuleset, verifyRuleset } from "./nft.ts";
import { type NodeAddresses, nodeIpsOf, ownIps } from "./node_addresses.ts";
import { forgetRuleset, putRuleset, type StoredRuleset, storedRuleset } from "./store.ts";

/** An attachment with its result. */
export interface Attached {
  /** With its state where it was read from the record. */
  attachment: Attachment & Partial<Pick<StoredAttachment, "state">>;
  result: Result;
}

/** The policies that the table asks for. */
export function isEnforced(policy: { kind: string; between?: unknown }, enforce: boolean): boolean {
  return enforce || (policy.kind === "NetworkPolicy" && policy.between === undefined);
}

/** The interfaces of a pod as policy sees them. @param node absent: nothing counts as the node */
export function policyAttachments(
  made: readonly Attached[],
  node?: NodeAddresses,
  ends: HostEnds = new Map(),
): PolicyAttachment[] {
  return made.map((one) => {
    const { network, ifName, primary, enforcesPlain } = one.attachment;
    const own = ownIps(one);
    const hostEnd = ends.get(ifName);
    const nodeIps = node
      ? nodeIpsOf(
          node,
          own.flatMap(({ gateway }) => gateway ?? []),
        )
      : [];
    return {
      network,
      ifName,
      ips: own.map(({ ip }) => ip),
      ...(enforcesPlain && { enforcesPlain }),
      ...(hostEnd !== undefined && { hostEnd }),
      ...(primary && { isDefault: true as const, nodeIps }),
    };
  });
}

/** What is attached in a namespace, but for what one call attaches. */
export function attachedIn(host: Host, state: State, id: string, except?: CallId): Attached[] {
  const isOther = ({ containerId, requestIfName }: StoredAttachment) =>
    containerId !== except?.containerId || requestIfName !== except.requestIfName;
  return attachedOf(attachmentsIn(host, state, id).filter(isOther));
}

/** Those of the rows that are attached, with their results. */
export function attachedOf(rows: readonly StoredAttachment[]): Attached[] {
  return rows.flatMap((attachment) => {
    const result = attachment.state === "attached" ? storedResult(attachment) : undefined;
    return result ? [{ attachment, result }] : [];
  });
}

/**
 * What has rules among the rows of a namespace: what is attached, and what is being attached beside
 * it in a pod that runs: its interface may be there at any moment, and the rules were there before.
 */
export function guardedOf(rows: readonly StoredAttachment[]): Attached[] {
  const attached = attachedOf(rows);
  if (attached.length === 0) return [];
  const noResult: Result = { interfaces: [], ips: [], routes: [], dns: {} };
  const coming = rows.filter(({ state }) => state === "planned");
  return [
    ...attached,
    ...coming.map((attachment) => ({ attachment, result: storedResult(attachment) ?? noResult })),
  ];
}

/** Are they the same? What is absent has none. */
export function sameRules(a: Rules | undefined, b: Rules | undefined): boolean {
  const keys = ["ruleset", "hostRuleset"] as const;
  return keys.every((key) => (a?.[key] ?? "") === (b?.[key] ?? ""));
}

/**
 * Replaces the rules of a namespace: first in the record, then in the kernel, where the new ones
 * stand before the old ones go. Call under {@link lockNetns}.
 * @throws CniError of nft; 106 when it cannot be written down: then nothing has changed
 */
export async function installRuleset(
  host: Host,
  state: State,
  netns: string,
  rules: Omit<StoredRuleset, "atMs">,
): Promise<void> {
  const { netnsId: id, ruleset, hostRuleset, containerId } = rules;
  const before = storedRuleset(state, id);
  const isEmpty = ruleset === "" && hostRuleset === "";
  if (!isEmpty) write(state, () => putRuleset(state, { ...rules, atMs: host.now() }));
  const isFirst = before === undefined;
  if (hostRuleset !== "") await applyRuleset(host, undefined, hostRuleset, { isFirst });
  await applyRuleset(host, netns, ruleset, { isFirst });
  // The tables at the host end have the name of the container.
  if (before && (hostRuleset === "" || before.containerId !== containerId)) {
    await removeFromHost(host, before);
  }
  if (isEmpty) write(state, () => forgetRuleset(state, id));
}

/** Takes the rules of a pod at the node's ends away. @throws CniError of nft */
export async function removeFromHost(host: Host, stored: StoredRuleset): Promise<void> {
  if (stored.hostRuleset === "") return;
  await removeRuleset(host, undefined, hostTables(stored.containerId));
}

/** What differs between the kernel and the record, in words. @throws CniError of nft */
export async function differenceOf(host: Host, netns: string, { ruleset, hostRuleset }: Rules) {
  const inside = await verifyRuleset(host, netns, ruleset);
  return hostRuleset === "" ? inside : (inside ?? verifyRuleset(host, undefined, hostRuleset));
}

/** A network namespace: its identity, and a path of it that is "" when it is gone. */
export type NetnsPlace = Pick<StoredAttachment, "netnsId" | "netns">;

/** How long a DEL waits for others at the same namespace, in ms. */
const liftWaitMs = 5_000;

/**
 * Takes the ruleset away after the last attachment of a namespace was forgotten. Never throws: a
 * DEL that cannot do it leaves closed doors, not open ones, and the next ADD there begins anew.
 * @param call whose attachments went
 */
export async function liftRuleset(
  host: Host,
  state: State,
  place: NetnsPlace,
  call: CallId,
): Promise<void> {
  const { netnsId: id, netns } = place;
  // A copy of the record stands for a disk that is read-only: nothing is ever forgotten there, and
  // no ADD can be at work either.
  const isCopy = state.copyDir !== "";
  let lock: FileLock | undefined;
  try {
    if (!isCopy) lock = await lockNetns(host, state, id, host.now() + liftWaitMs);
    const stored = storedRuleset(state, id);
    if (!stored || attachedIn(host, state, id, isCopy ? call : undefined).length > 0) return;
    if (netnsId(netns) === id) await removeRuleset(host, netns);
    await removeFromHost(host, stored);
    if (!isCopy) write(state, () => forgetRuleset(state, id));
  } catch (error) {
    log(host, "warn", `Network policy stays in force: ${toCniError(error).message}`, {
      container: call.containerId,
    });
  } finally {
    lock?.release();
  }
}

/** A lock that is held. */
export interface FileLock {
  release: () => void;
}

/** Takes the lock of a namespace. @throws CniError 11 when it stays taken, 106 */
export async function lockNetns(host: Host, state: State, id: string, deadlineMs: number) {
  const file = join(dirname(state.file), "policy.lock");
  return takeFileLock(host, file, id, { what: "the network policy of a pod", deadlineMs });
}

/**
 * Takes the lock of one thing of many: a range of a file (`F_OFD_SETLK`). The kernel gives it back
 * when its holder dies, whichever container that was in. A row in the record cannot do that: the
 * node agent may run in another pid namespace, where nobody could tell that it is dead.
 * @param file made when absent; it must stay the same file
 * @param thing what is locked, `what` in errors; two may share a lock, which only costs time
 * @throws CniError 11 when it stays taken until the deadline, or we are asked to end; 106 when the
 *   file cannot be used
 */
export async function takeFileLock(
  host: Host,
  file: string,
  thing: string,
  options: { what: string; deadlineMs: number; pollMs?: number },
): Promise<FileLock> {
  const { what, deadlineMs, pollMs = 3 } = options;
  const descriptor = openLock(file);
  try {
    while (!tryLock(descriptor, thing)) {
      if (host.signal.aborted || host.now() >= deadlineMs) {
        const reason = `another genie holds it (${file})`;
        throw new CniError(code.tryAgainLater, `Cannot lock ${what}: ${reason}`);
      }
      await Bun.sleep(pollMs);
    }
    return { release: () => closeSync(descriptor) };
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}

function openLock(file: string): number {
  try {
    return openSync(file, "a", 0o600);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    throw new CniError(code.stateUnavailable, `Cannot use ${file}: ${reason}`, { cause: error });
  }
}

/** `F_OFD_SETLK`, and `F_WRLCK`. */
const setLock = 37;
const writeLock = 1n;

/** Without glibc there are no locks to be had: two at a time are better than none. */
function tryLock(descriptor: number, thing: string): boolean {
  const calls = kernelCalls();
  // `struct flock` of 64-bit Linux: its type, where the range begins, its length, a process.
  const lock = new BigInt64Array([writeLock, BigInt(Bun.hash.crc32(thing)), 1n, 0n]);
  return !calls || calls.fcntl(descriptor, setLock, new Uint8Array(lock.buffer)) === 0;
}
