/**
 * Locks that the kernel gives back when their holder dies, whichever container that was in: ranges
 * of one file (`F_OFD_SETLK`). For what a row in the record cannot do: the node agent may run in
 * another pid namespace, where nobody could tell that it is dead.
 */
import { closeSync, openSync } from "node:fs";
import { CniError, code, type Host } from "../cni.ts";
import { fileLocks } from "../libc.ts";

/** Pause between two attempts, in ms. */
const pollMs = 3;
/** `fcntl(2)`, and the `struct flock` of 64-bit Linux. */
const setLock = 37;
const writeLock = 1;
const flockBytes = 32;

/** A lock that is held. */
export interface FileLock {
  release: () => void;
}

/**
 * Takes the lock of one thing of many, as long as the file stays the same.
 *
 * @param file made when absent
 * @param thing what is locked; two things may share a lock, which only costs time
 * @param options.what names it in the error
 * @throws CniError 11 when it stays taken until the deadline, or we are asked to end; 106 when the
 *   file cannot be used
 */
export async function takeFileLock(
  host: Host,
  file: string,
  thing: string,
  options: { what: string; deadlineMs: number; pollMs?: number },
): Promise<FileLock> {
  const descriptor = open(file);
  try {
    for (;;) {
      if (tryLock(descriptor, thing)) return { release: () => closeSync(descriptor) };
      if (host.signal.aborted || host.now() >= options.deadlineMs) {
        throw new CniError(
          code.tryAgainLater,
          `Cannot lock ${options.what}: another genie holds it (${file})`,
        );
      }
      await Bun.sleep(options.pollMs ?? pollMs);
    }
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}

function open(file: string): number {
  try {
    return openSync(file, "a", 0o600);
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    throw new CniError(code.stateUnavailable, `Cannot use ${file}: ${reason}`, { cause: error });
  }
}

/** Without glibc there are no locks to be had: two at a time are better than none. */
function tryLock(descriptor: number, thing: string): boolean {
  const calls = fileLocks();
  if (!calls) return true;
  const lock = new DataView(new ArrayBuffer(flockBytes));
  lock.setInt16(0, writeLock, true);
  lock.setBigInt64(8, BigInt(Bun.hash.crc32(thing)), true);
  lock.setBigInt64(16, 1n, true);
  return calls.fcntl(descriptor, setLock, new Uint8Array(lock.buffer)) === 0;
}
