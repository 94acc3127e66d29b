/**
 * Network namespaces (their identity, their interfaces, running code in one), and the calls of
 * libc for that, which Bun does not offer.
 */
import { dlopen, FFIType } from "bun:ffi";
import { closeSync, openSync, readFileSync, readSync, statfsSync, statSync } from "node:fs";

const openLibc = () =>
  dlopen("libc.so.6", {
    pipe2: { args: [FFIType.ptr, FFIType.i32], returns: FFIType.i32 },
    setns: { args: [FFIType.i32, FFIType.i32], returns: FFIType.i32 },
    unshare: { args: [FFIType.i32], returns: FFIType.i32 },
    _exit: { args: [FFIType.i32], returns: FFIType.void },
  }).symbols;
let opened: ReturnType<typeof openLibc> | null | undefined;

/** Opens libc on the first call; null where it cannot be opened. */
export function libc(): NonNullable<typeof opened> | null {
  if (opened !== undefined) return opened;
  try {
    opened = openLibc();
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    opened = null;
  }
  return opened;
}

/**
 * Identity of a network namespace: boot, device and inode of its file; "" when the path has none.
 * It changes when the path is made anew after a reboot or a restart.
 */
export function netnsId(netns: string): string {
  if (netns === "") return "";
  try {
    const { dev, ino } = statSync(netns);
    return `${bootId()}:${dev}:${ino}`;
  } catch (error) {
    // Whatever the errno is, no delegate could enter it either.
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return "";
  }
}

/** `f_type` of the file system whose files are namespaces. */
const nsfsType = 0x6e736673;
/** `CLONE_NEWNET`: tells `setns` that the namespace is a network namespace. */
export const netKind = 0x40000000;

/** True for the path of a network namespace that is not our own. */
export function isForeignNetns(netns: string): boolean {
  const id = netnsId(netns);
  if (id === "" || id === netnsId("/proc/self/ns/net")) return false;
  return statfsSync(netns).type === nsfsType;
}

let boot = "";

/** A text that differs after every boot of the machine. */
export function bootId(): string {
  if (boot !== "") return boot;
  const file = openSync("/proc/sys/kernel/random/boot_id", "r");
  try {
    // Not readFileSync: it offers 256 KiB, and here the kernel clears as much as is offered.
    const bytes = new Uint8Array(64);
    const count = readSync(file, bytes);
    boot = new TextDecoder().decode(bytes.subarray(0, count)).trim();
  } finally {
    closeSync(file);
  }
  return boot;
}

/**
 * Names of the interfaces in a network namespace, `lo` included; undefined when it is none, or when
 * we may not enter it (no root).
 */
export function interfacesIn(netns: string): string[] | undefined {
  if (!isForeignNetns(netns)) return undefined;
  const table = inNetns(netns, () => readFileSync("/proc/thread-self/net/dev", "utf8"));
  const rows = table?.split("\n").filter((line) => line.includes(":"));
  return rows?.map((row) => row.slice(0, row.lastIndexOf(":")).trim());
}

/**
 * Calls `act` in a network namespace, on this thread. It must not wait for anything: other code
 * that runs meanwhile would be in that namespace too.
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

/** Returns to our own namespace; failing that, ends the process before it acts in the wrong one. */
export function comeBack(own: number): void {
  if (libc()?.setns(own, netKind) !== 0) process.abort();
}
