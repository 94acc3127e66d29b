/**
 * The ruleset of one network namespace: what is attached there as policy sees it, and putting a
 * ruleset in force or taking it away. One table per namespace, whatever number of calls attached
 * there, so ADD, DEL, CHECK and the node agent take turns by a lock of the namespace. What is to be
 * in force is on record before it is.
 */
import { dirname, join } from "node:path";
import { type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type State, write } from "../database.ts";
import { netnsId } from "../netns.ts";
import type { Result } from "../result.ts";
import { type Attachment, attachmentsIn, type StoredAttachment } from "../state.ts";
import { storedResult } from "../undo.ts";
import {
  compileHostPolicies,
  compilePolicies,
  type HostAttachment,
  hostTables,
  type PolicyAttachment,
  type PolicyTarget,
  type PolicyWorld,
} from "./compile.ts";
import { type FileLock, takeFileLock } from "./file_lock.ts";
import type { HostEnd } from "./host_end.ts";
import { applyRuleset, removeRuleset, verifyRuleset } from "./nft.ts";
import type { PolicyProblem } from "./objects.ts";
import { forgetRuleset, putRuleset, type StoredRuleset, storedRuleset } from "./store.ts";

type Where = Config["policy"]["where"];

/** An attachment with its result. */
export interface Attached {
  attachment: Attachment;
  result: Result;
}

/** May a policy be about this network? Of plain NetworkPolicy the table says so. */
export function isConcerned(
  { primary, network, enforcesPlain }: Attachment,
  enforce: boolean,
): boolean {
  // MultiNetworkPolicy is hardly ever about the default network; CNI-Genie's is about logical ones.
  return enforcesPlain === true || (enforce && (!primary || network.includes("/")));
}

/** The policies that the table asks for. */
export function isEnforced(policy: { kind: string; between?: unknown }, enforce: boolean): boolean {
  return enforce || (policy.kind === "NetworkPolicy" && policy.between === undefined);
}

/** The interfaces of a pod as policy sees them. @param hostIps addresses of its node */
export function policyAttachments(
  made: readonly Attached[],
  hostIps: readonly string[],
): PolicyAttachment[] {
  return made.map(({ attachment: { network, ifName, primary, enforcesPlain }, result }) => {
    const own = result.ips.filter(({ interface: index }) => {
      const name = index === undefined ? undefined : result.interfaces[index]?.name;
      return name === undefined || name === ifName;
    });
    const gateways = own.flatMap(({ gateway }) => (gateway === undefined ? [] : [gateway]));
    return {
      network,
      ifName,
      ips: own.map(({ address }) => address.replace(/\/.*/, "")),
      ...(enforcesPlain && { enforcesPlain }),
      ...(primary && { isDefault: true as const, nodeIps: [...gateways, ...hostIps] }),
    };
  });
}

/** Namespaces whose policies may be about a pod: its own, and those of its logical networks. */
export function policyNamespaces(namespace: string, made: readonly Attached[]): string[] {
  const others = made.flatMap(({ attachment: { network } }) =>
    network.includes("/") ? [network.replace(/\/.*/, "")] : [],
  );
  return [...new Set([namespace, ...others])];
}

/** What is attached in a namespace, but for what one call attaches. */
export function attachedIn(
  host: Host,
  state: State,
  id: string,
  except?: { containerId: string; requestIfName: string },
): Attached[] {
  return attachedOf(attachmentsIn(host, state, id).filter((one) => !isOf(one, except)));
}

function attachedOf(rows: readonly StoredAttachment[]): Attached[] {
  return rows.flatMap((attachment) => {
    const result = attachment.state === "attached" ? storedResult(attachment) : undefined;
    return result ? [{ attachment, result }] : [];
  });
}

/**
 * What of the rows of a namespace has rules: what is attached, and what is being made beside it,
 * in a pod that runs. Its interface may be there at any moment, and the rules were there before.
 */
export function guardedOf(rows: readonly StoredAttachment[]): Attached[] {
  const attached = attachedOf(rows);
  if (attached.length === 0) return [];
  const planned = rows.filter(({ state }) => state === "planned");
  const noResult: Result = { interfaces: [], ips: [], routes: [], dns: {} };
  const coming = planned.map((attachment) => ({
    attachment,
    result: storedResult(attachment) ?? noResult,
  }));
  return [...attached, ...coming];
}

function isOf(
  one: StoredAttachment,
  call: { containerId: string; requestIfName: string } | undefined,
): boolean {
  return one.containerId === call?.containerId && one.requestIfName === call.requestIfName;
}

/** Takes the lock of a namespace. @throws CniError 11 when it stays taken, 106 */
export async function lockNetns(
  host: Host,
  state: State,
  id: string,
  deadlineMs: number,
): Promise<FileLock> {
  const file = join(dirname(state.file), "policy.lock");
  return takeFileLock(host, file, id, { what: "the network policy of a pod", deadlineMs });
}

/** The rules of a pod, in its namespace and at its ends on the node; "" for none. */
export type Rules = Pick<StoredRuleset, "ruleset" | "hostRuleset">;

/** The host end of each interface that has one, by its name in the pod. */
export async function findHostEnds(
  host: Host,
  where: Where,
  made: readonly Attached[],
): Promise<Map<string, HostEnd>> {
  const ends = new Map<string, HostEnd>();
  if (where === "pod") return ends;
  const { findHostEnd } = await import("./host_end.ts");
  for (const { attachment, result } of made) {
    const outside = result.interfaces.filter(({ sandbox }) => !sandbox).map(({ name }) => name);
    const end = await findHostEnd(host, outside);
    if (end) ends.set(attachment.ifName, end);
  }
  return ends;
}

/** Compiles the rules of a pod for where they are to stand. */
export function compileRules(
  world: PolicyWorld,
  target: PolicyTarget,
  attachments: readonly PolicyAttachment[],
  place: { where: Where; containerId: string; ends: ReadonlyMap<string, HostEnd> },
): Rules & { problems: PolicyProblem[] } {
  if (place.where === "pod") {
    return { hostRuleset: "", ...compilePolicies(world, target, [...attachments]) };
  }
  const withEnds = attachments.map((one): HostAttachment => {
    const hostEnd = place.ends.get(one.ifName);
    return hostEnd ? { ...one, hostEnd } : one;
  });
  const { pod, host, problems } = compileHostPolicies(world, target, withEnds, place.containerId);
  return { ruleset: pod, hostRuleset: host, problems };
}

/** Are they the same? What is absent has none. */
export function sameRules(a: Rules | undefined, b: Rules | undefined): boolean {
  return (
    (a?.ruleset ?? "") === (b?.ruleset ?? "") && (a?.hostRuleset ?? "") === (b?.hostRuleset ?? "")
  );
}

/**
 * Puts rules in force in place of those on record, and on record before that. What is new stands
 * before what is old goes. Call under {@link lockNetns}.
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
  if (ruleset !== "" || hostRuleset !== "") {
    write(state, () => putRuleset(state, { ...rules, atMs: host.now() }));
  }
  const isFirst = before === undefined;
  if (hostRuleset !== "") await applyRuleset(host, undefined, hostRuleset, { isFirst });
  await applyRuleset(host, netns, ruleset, { isFirst });
  if (before && before.hostRuleset !== "" && hostRuleset === "") await removeFromHost(host, before);
  if (before && before.containerId !== containerId && hostRuleset !== "") {
    await removeFromHost(host, before);
  }
  if (ruleset === "" && hostRuleset === "") write(state, () => forgetRuleset(state, id));
}

/** Takes the rules of a pod at the node's ends away. @throws CniError of nft */
export async function removeFromHost(host: Host, stored: StoredRuleset): Promise<void> {
  if (stored.hostRuleset === "") return;
  await removeRuleset(host, undefined, hostTables(stored.containerId));
}

/** What differs between the kernel and the record, in words. @throws CniError of nft */
export async function differenceOf(
  host: Host,
  netns: string,
  { ruleset, hostRuleset }: Rules,
): Promise<string | undefined> {
  const inside = await verifyRuleset(host, netns, ruleset);
  return hostRuleset === "" ? inside : (inside ?? verifyRuleset(host, undefined, hostRuleset));
}

/** How long a DEL waits for others at the same namespace, in ms. */
const liftWaitMs = 5_000;

/**
 * Takes the ruleset away after the last attachment of a namespace was forgotten. Never throws: a
 * DEL that cannot do it leaves closed doors, not open ones, and the next ADD there begins anew.
 *
 * @param netns path of the namespace, "" when it is gone
 * @param call whose attachments went
 */
export async function liftRuleset(
  host: Host,
  state: State,
  place: { netnsId: string; netns: string },
  call: { containerId: string; requestIfName: string },
): Promise<void> {
  const { netnsId: id, netns } = place;
  let lock: FileLock | undefined;
  try {
    // On a disk that is read-only no ADD can be at work either.
    if (state.copyDir === "") lock = await lockNetns(host, state, id, host.now() + liftWaitMs);
    const stored = storedRuleset(state, id);
    // In a copy of the record nothing is ever forgotten.
    const going = state.copyDir === "" ? undefined : call;
    if (!stored || attachedIn(host, state, id, going).length > 0) return;
    if (netnsId(netns) === id) await removeRuleset(host, netns);
    await removeFromHost(host, stored);
    if (state.copyDir === "") write(state, () => forgetRuleset(state, id));
  } catch (error) {
    log(host, "warn", `Network policy stays in force: ${toCniError(error).message}`, {
      container: call.containerId,
    });
  } finally {
    lock?.release();
  }
}
