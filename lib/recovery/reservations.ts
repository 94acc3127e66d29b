/**
 * Addresses that host-local keeps for containers: one file each, named by the address, under
 * `<dataDir>/<network>`. Read as hostile; those that nobody has are removed under host-local's own
 * lock. Source: its backend/disk, which writes `<container>\r\n<interface>`, and once wrote the
 * container alone.
 */
import { closeSync, openSync, readdirSync, readFileSync, statSync, unlinkSync } from "node:fs";
import { isAbsolute, join } from "node:path";
import type { Chain, Host } from "../call.ts";
import { kernelCalls } from "../check.ts";
import { CniError, code, isNetworkName, log, toCniError } from "../cni.ts";
import { canonicalIP, isIP } from "../ip.ts";
import { isObject } from "../json.ts";
import type { NetworkConfigList } from "../networks.ts";
import type { LiveContainers } from "../node/live_containers.ts";
import { orElse } from "./tried.ts";

/** An address that host-local keeps for a container. */
export interface Reservation {
  network: string;
  /** Folder of the network's reservations. */
  dir: string;
  /** Name of the file in it: the address. */
  address: string;
  containerId: string;
  /** "" where an old host-local wrote it. */
  ifName: string;
}

const dataDirDefault = "/var/lib/cni/networks";
const fileBytesMax = 512;
/** A reservation is left alone for this long: its ADD, not ours alone, may still be under way. */
const youngMs = 5 * 60_000;

/**
 * Folders in which host-local keeps the addresses of a network; none for another IPAM. Flannel has
 * it keep them under the name of its own list.
 */
export function storesOf({ name, plugins }: NetworkConfigList): string[] {
  if (!isNetworkName(name)) return [];
  const dirs = plugins.flatMap(
    ({ type, ipam = type === "flannel" ? { type: "host-local" } : {} }) => {
      if (!isObject(ipam) || ipam["type"] !== "host-local") return [];
      const { dataDir = "" } = ipam;
      if (dataDir === "") return [join(dataDirDefault, name)];
      return typeof dataDir === "string" && isAbsolute(dataDir) ? [join(dataDir, name)] : [];
    },
  );
  return [...new Set(dirs)];
}

/** What is reserved in a network, and not just now. Other files are ignored. */
export function readReservations(list: NetworkConfigList, nowMs: number): Reservation[] {
  return storesOf(list).flatMap((dir) =>
    namesIn(dir).flatMap((address) => {
      const found = readReservation(dir, address, nowMs);
      return found ? [{ network: list.name, dir, address, ...found }] : [];
    }),
  );
}

/** Addresses with a file in a folder; none where no address was ever given, or it is no folder. */
function namesIn(dir: string): string[] {
  const names = orElse<string[]>([], () => readdirSync(dir));
  return names.filter((name) => isIP(name) !== 0).sort();
}

/** Who has an address, from its file in a store; undefined where it is none, or too young. */
export function readReservation(dir: string, address: string, nowMs: number) {
  const file = join(dir, address);
  // It may be released meanwhile.
  return orElse(undefined, () => {
    const found = statSync(file);
    if (!found.isFile() || found.size > fileBytesMax) return undefined;
    if (Math.abs(nowMs - found.mtimeMs) < youngMs) return undefined;
    const text = readFileSync(file, "utf8");
    const [, containerId, ifName = ""] =
      /^([A-Za-z0-9][A-Za-z0-9_.-]*)(?:\r?\n([^\s/:]{1,15}))?\s*$/.exec(text) ?? [];
    return containerId === undefined ? undefined : { containerId, ifName };
  });
}

/**
 * What shows whether somebody still has an address: who is alive, and `known` containers whose
 * addresses stay, on record or of the runtime's list.
 */
type Evidence = Omit<LiveContainers, "netns"> & { known: ReadonlySet<string> };

/** Does nobody have this address any more? */
export function isUnowned({ address, containerId }: Reservation, evidence: Evidence): boolean {
  const { known, addresses, hasContainer } = evidence;
  const ip = canonicalIP(address) ?? address;
  return !known.has(containerId) && !addresses.has(ip) && !hasContainer(containerId);
}

/** The reservations of several lists, each once: two versions of a list may share a store. */
export function readAllReservations(lists: readonly NetworkConfigList[], nowMs: number) {
  const all = lists.flatMap((list) => readReservations(list, nowMs));
  return [...new Map(all.map((one) => [`${one.dir}/${one.address}`, one])).values()];
}

/**
 * Removes the reservations that nobody has, going on after errors, which it returns.
 * @param known containers whose addresses stay
 */
export async function releaseUnowned(
  { host, deadlineMs }: Pick<Chain, "host" | "deadlineMs">,
  lists: readonly NetworkConfigList[],
  known: ReadonlySet<string>,
): Promise<CniError[]> {
  const all = readAllReservations(lists, host.now());
  const candidates = all.filter(({ containerId }) => !known.has(containerId));
  // Reading all processes of the node is slow.
  if (candidates.length === 0) return [];
  const alive = (await import("../node/live_containers.ts")).findLiveContainers();
  const errors: CniError[] = [];
  if (!alive) return errors;
  for (const one of candidates.filter((each) => isUnowned(each, { ...alive, known }))) {
    const { network, address, containerId } = one;
    try {
      await releaseReservation(host, one, deadlineMs);
      log(host, "info", "Released an address of nobody", { network, address, containerId });
    } catch (error) {
      errors.push(toCniError(error));
    }
  }
  return errors;
}

/** `LOCK_EX | LOCK_NB`. */
const exclusiveNow = 2 | 4;
const pollMs = 5;

/**
 * Removes a reservation, unless it is another's by now.
 * @throws CniError 11 when the store stays locked until the deadline, 5 for a file that stays
 */
export async function releaseReservation(host: Host, one: Reservation, deadlineMs: number) {
  const { network, dir, address } = one;
  const what = `Cannot release ${address} of network "${network}"`;
  let lock: number | undefined;
  try {
    // As host-local opens it, so that either may be first.
    lock = openSync(join(dir, "lock"), "a", 0o644);
    while (kernelCalls()?.flock(lock, exclusiveNow) !== 0) {
      if (host.signal.aborted || host.now() >= deadlineMs) {
        throw new CniError(code.tryAgainLater, `${what}: host-local is at work`);
      }
      await Bun.sleep(pollMs);
    }
    const now = readReservation(dir, address, host.now());
    const isSame = now?.containerId === one.containerId && now.ifName === one.ifName;
    if (isSame) unlinkSync(join(dir, address));
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    if (error instanceof CniError || reason === undefined) throw error;
    throw new CniError(code.ioFailure, `${what}: ${reason}`, { cause: error });
  } finally {
    if (lock !== undefined) closeSync(lock);
  }
}
