/**
 * Addresses that host-local keeps for containers: one file each, named by the address, under
 * `<dataDir>/<network>`. Read as hostile; removed under host-local's own lock. Source: its
 * backend/disk, which writes `<container>\r\n<interface>`, and once wrote the container alone.
 */
import { closeSync, openSync, readdirSync, readFileSync, statSync, unlinkSync } from "node:fs";
import { isAbsolute, join } from "node:path";
import { CniError, code, type Host, isNetworkName } from "./cni.ts";
import { canonicalIP, isIP } from "./ip.ts";
import { isObject } from "./json.ts";
import { kernelCalls } from "./libc.ts";
import type { NetworkConfigList } from "./netconf.ts";

/** An address that is kept for a container. */
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
/**
 * A reservation is left alone for this long, in ms: between it and the address on its interface
 * other plugins may be at work, and not ours alone.
 */
const youngMs = 5 * 60_000;

/** Folders in which host-local keeps the addresses of a network; none for another IPAM. */
export function storesOf({ name, plugins }: NetworkConfigList): string[] {
  if (!isNetworkName(name)) return [];
  const dirs = plugins.flatMap(({ ipam }) => {
    if (!isObject(ipam) || ipam["type"] !== "host-local") return [];
    const { dataDir = "" } = ipam;
    if (dataDir === "") return [join(dataDirDefault, name)];
    return typeof dataDir === "string" && isAbsolute(dataDir) ? [join(dataDir, name)] : [];
  });
  return [...new Set(dirs)];
}

/** What is reserved in a network and not just made. Files that are something else are passed. */
export function readReservations(list: NetworkConfigList, nowMs: number): Reservation[] {
  return storesOf(list).flatMap((dir) =>
    namesIn(dir).flatMap((address) => {
      const found = readReservation(dir, address, nowMs);
      return found ? [{ network: list.name, dir, address, ...found }] : [];
    }),
  );
}

function namesIn(dir: string): string[] {
  try {
    return readdirSync(dir)
      .filter((name) => isIP(name) !== 0)
      .sort();
  } catch (error) {
    // No address was ever given, or it is no folder.
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return [];
  }
}

function readReservation(
  dir: string,
  address: string,
  nowMs: number,
): Pick<Reservation, "containerId" | "ifName"> | undefined {
  const file = join(dir, address);
  try {
    const found = statSync(file);
    if (!found.isFile() || found.size > fileBytesMax) return undefined;
    if (Math.abs(nowMs - found.mtimeMs) < youngMs) return undefined;
    const text = readFileSync(file, "utf8");
    const [, containerId, ifName = ""] =
      /^([A-Za-z0-9][A-Za-z0-9_.-]*)(?:\r?\n([^\s/:]{1,15}))?\s*$/.exec(text) ?? [];
    return containerId === undefined ? undefined : { containerId, ifName };
  } catch (error) {
    // Released meanwhile.
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return undefined;
  }
}

/** What tells whether somebody still has an address. */
export interface Evidence {
  /** Containers whose addresses stay: on record, or of the runtime's list. */
  known: ReadonlySet<string>;
  /** Addresses of all interfaces of the node and its pods. */
  addresses: ReadonlySet<string>;
  hasContainer: (id: string) => boolean;
}

/** Has nobody this address any more? When in doubt somebody has. */
export function isStray({ address, containerId }: Reservation, evidence: Evidence): boolean {
  const { known, addresses, hasContainer } = evidence;
  const ip = canonicalIP(address) ?? address;
  return !known.has(containerId) && !addresses.has(ip) && !hasContainer(containerId);
}

/** `LOCK_EX | LOCK_NB`. */
const exclusiveNow = 2 | 4;
const pollMs = 5;

/**
 * Removes a reservation, unless it is another's by now.
 * @throws CniError 11 when the store stays locked until the deadline, 5 for a file that stays
 */
export async function releaseReservation(
  host: Host,
  one: Reservation,
  deadlineMs: number,
): Promise<void> {
  const lock = openFile(join(one.dir, "lock"), one);
  try {
    while (kernelCalls()?.flock(lock, exclusiveNow) !== 0) {
      if (host.signal.aborted || host.now() >= deadlineMs) {
        throw new CniError(
          code.tryAgainLater,
          `Cannot release ${one.address} of network "${one.network}": host-local is at work`,
        );
      }
      await Bun.sleep(pollMs);
    }
    const now = readReservation(one.dir, one.address, host.now());
    const isSame = now?.containerId === one.containerId && now.ifName === one.ifName;
    if (isSame) unlinkSync(join(one.dir, one.address));
  } catch (error) {
    throw failed(error, one);
  } finally {
    closeSync(lock);
  }
}

function openFile(file: string, one: Reservation): number {
  try {
    // As host-local opens it, so that either may be first.
    return openSync(file, "a", 0o644);
  } catch (error) {
    throw failed(error, one);
  }
}

function failed(error: unknown, { address, network }: Reservation): unknown {
  const reason = (error as NodeJS.ErrnoException).code;
  if (error instanceof CniError || reason === undefined) return error;
  const msg = `Cannot release ${address} of network "${network}": ${reason}`;
  return new CniError(code.ioFailure, msg, { cause: error });
}
