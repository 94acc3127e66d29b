/**
 * Network namespaces as files: which one a path leads to, and which interfaces are in it.
 * `setns` is called through libc, on this thread and for the length of one read.
 */
import { closeSync, openSync, readFileSync, readSync, statfsSync, statSync } from "node:fs";
import { libc } from "./libc.ts";

/**
 * Identity of a network namespace: boot, device and inode of its file; "" when there is none at
 * this path. A path that was made anew after a reboot or a restart differs.
 */
export function netnsId(netns: string): string {
  if (netns === "") return "";
  try {
    const { dev, ino } = statSync(netns);
    return `${bootId()}:${dev}:${ino}`;
  } catch (error) {
    // Any errno (ENOENT, ENOTDIR, ENAMETOOLONG ...): nothing that a delegate could enter.
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return "";
  }
}

/** `f_type` of the file system that namespaces are files of. */
const nsfsType = 0x6e736673;

/** Is this the path of a namespace, and not of the network namespace we are in? */
export function isForeignNetns(netns: string): boolean {
  const found = netnsId(netns);
  if (found === "" || found === netnsId("/proc/self/ns/net")) return false;
  return statfsSync(netns).type === nsfsType;
}

let boot = "";

/**
 * Differs after every boot of the machine. Read once, and into a small buffer: for what is under
 * /proc/sys the kernel clears as much memory as the reader offers, 256 KiB with readFileSync.
 */
export function bootId(): string {
  if (boot !== "") return boot;
  const file = openSync("/proc/sys/kernel/random/boot_id", "r");
  try {
    const bytes = Buffer.allocUnsafe(64);
    boot = bytes.toString("latin1", 0, readSync(file, bytes)).trim();
  } finally {
    closeSync(file);
  }
  return boot;
}

/** `CLONE_NEWNET`, the kind of namespace that `setns` is to enter. */
const netKind = 0x40000000;

/**
 * Names of the interfaces in a network namespace, `lo` among them; undefined where we may not
 * enter it (no root), or it is none.
 */
export function interfacesIn(netns: string): string[] | undefined {
  if (!isForeignNetns(netns)) return undefined;
  const table = inNetns(netns, () => readFileSync("/proc/thread-self/net/dev", "utf8"));
  return table
    ?.split("\n")
    .slice(2)
    .flatMap((line) => (line.includes(":") ? [line.slice(0, line.lastIndexOf(":")).trim()] : []));
}

/**
 * Does one thing in a network namespace, on this thread: nothing that waits, for whatever runs
 * meanwhile would run there too.
 *
 * @returns what `act` returned; undefined where we may not enter
 */
export function inNetns<T>(netns: string, act: () => T): T | undefined {
  const calls = libc();
  if (!calls) return undefined;
  const own = openSync("/proc/self/ns/net", "r");
  const other = openSync(netns, "r");
  try {
    return calls.setns(other, netKind) === 0 ? act() : undefined;
  } finally {
    comeBack(own);
    closeSync(other);
    closeSync(own);
  }
}

/** To stay in another namespace would send everything that follows to the wrong place. */
function comeBack(own: number): void {
  if (libc()?.setns(own, netKind) !== 0) process.abort();
}

/** A network namespace of our own with nothing in it; it goes with its scope. */
export interface EmptyNetns extends Disposable {
  path: string;
}

/** Makes an empty network namespace; undefined where we may not (no root). */
export function emptyNetns(): EmptyNetns | undefined {
  const calls = libc();
  if (!calls) return undefined;
  const own = openSync("/proc/self/ns/net", "r");
  try {
    if (calls.unshare(netKind) !== 0) return undefined;
    const made = openSync("/proc/thread-self/ns/net", "r");
    return { path: `/proc/self/fd/${made}`, [Symbol.dispose]: () => closeSync(made) };
  } finally {
    comeBack(own);
    closeSync(own);
  }
}
