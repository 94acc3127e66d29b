/**
 * What an edit of a pod's selection changes while the pod runs: what it asks for now against what
 * it has, as far as it asked for that. What every pod gets, and what an operator attached, stays.
 * Data in, data out.
 */
import type { StoredAttachment } from "../state.ts";
import { nameInterfaces, nameOfWanted, type Wanted, type WantedSet } from "../wanted.ts";

/** One thing to do: one goes, one comes, or one takes the place of another one. */
export interface FollowStep {
  detach?: StoredAttachment;
  want?: Wanted;
}

/** What an edit changes. */
export interface Followed {
  steps: FollowStep[];
  /** Why the primary network stays though another one is asked for; "" when none is. */
  primary: string;
}

/** By their reasons: what an annotation of the pod brought. */
const isAsked = ({ reason }: { reason: string }): boolean => reason.startsWith("asked for by ");

/**
 * Compares.
 *
 * @param rows what the pod has, all of one call
 * @param ownCniArgs `args.cni` of our own CNI config, which every attachment has besides its own
 * @throws CniError 7 or 105 for a selection that no ADD would take
 */
export function changesOf(
  wanted: WantedSet,
  rows: readonly StoredAttachment[],
  ownCniArgs: Record<string, unknown> = {},
): Followed {
  const { primarySet, further } = wanted;
  const requestIfName = rows[0]?.requestIfName ?? "";
  const nobody = { network: "", from: "node", namespace: "", reason: "" } as const;
  // For its errors: an ADD refuses what clashes or is too much.
  nameInterfaces(primarySet.length > 0 ? primarySet : [nobody], further, requestIfName);
  const primaryRow = rows.find(({ ifName }) => ifName === requestIfName);
  const primary =
    primarySet.find(({ ifName }) => ifName === requestIfName) ??
    primarySet.find(({ ifName }) => ifName === undefined);
  const asked = [...primarySet, ...further].filter((one) => one !== primary && isAsked(one));
  const left = new Set(rows.filter((row) => row !== primaryRow));
  const take = (match: (row: StoredAttachment) => boolean): StoredAttachment | undefined => {
    const found = [...left].find(match);
    if (found) left.delete(found);
    return found;
  };
  // Those that name an interface first: the others take what is left.
  const named = asked.toSorted(
    (a, b) => Number(b.ifName !== undefined) - Number(a.ifName !== undefined),
  );
  const fresh = named.filter((want) => !take((row) => isSame(want, row, ownCniArgs)));
  const steps = fresh.map((want): FollowStep => {
    const sameName = take((row) => isAsked(row) && row.ifName === want.ifName);
    const detach = sameName ?? take((row) => row.reason === want.reason && !isNamed(row, fresh));
    return { want, ...(detach && { detach }) };
  });
  const gone = [...left].filter(isAsked).map((detach): FollowStep => ({ detach }));
  return { steps: [...steps, ...gone], primary: keptPrimary(primary, primaryRow) };
}

function isNamed({ ifName }: StoredAttachment, fresh: readonly Wanted[]): boolean {
  return fresh.some((want) => want.ifName === ifName);
}

function keptPrimary(primary: Wanted | undefined, row: StoredAttachment | undefined): string {
  if (!row) return "";
  const asked = primary && isAsked(primary) ? nameOfWanted(primary) : undefined;
  if (asked === row.network) return "";
  if (asked !== undefined) {
    return `its primary network stays "${row.network}" though it asks for "${asked}"`;
  }
  return isAsked(row) ? `its primary network stays "${row.network}", which it asked for` : "";
}

/** Is this what the pod has on that interface? */
function isSame(want: Wanted, row: StoredAttachment, ownCniArgs: Record<string, unknown>): boolean {
  return (
    row.state === "attached" &&
    row.network === nameOfWanted(want) &&
    (want.ifName === undefined || want.ifName === row.ifName) &&
    isEqual(want.capabilityArgs ?? {}, wishesOf(want, row)) &&
    isEqual({ ...ownCniArgs, ...want.cniArgs }, cniArgsOf(want, row)) &&
    // One that took the default route over with the place of another one has an empty list.
    isEqual(want.defaultRoute ?? [], row.defaultRoute ?? []) &&
    (want.defaultRoute === undefined || row.defaultRoute !== undefined)
  );
}

/** What genie itself adds to the wishes of a pod: a device, the address it had before a repair. */
function wishesOf({ capabilityArgs = {} }: Wanted, row: StoredAttachment): object {
  const own = new Set([
    "deviceID",
    "CNIDeviceInfoFile",
    ...("ips" in capabilityArgs ? [] : ["ips"]),
  ]);
  return Object.fromEntries(Object.entries(row.capabilityArgs).filter(([key]) => !own.has(key)));
}

function cniArgsOf({ cniArgs = {} }: Wanted, { args }: StoredAttachment): object {
  const entries = Object.entries((args["cni"] ?? {}) as object);
  return Object.fromEntries(entries.filter(([key]) => key !== "ips" || "ips" in cniArgs));
}

/** The order of keys means nothing. */
function isEqual(a: unknown, b: unknown): boolean {
  return Bun.deepEquals(a, b);
}
