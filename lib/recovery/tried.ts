/** Reads that may fail in a way that is foreseen; every other error is thrown on. Pure. */
import { CniError } from "../cni.ts";

/** What `read` returns; undefined where it throws an error of this kind. */
export function orUndefined<T>(read: () => T, kind: new (...args: never[]) => Error = CniError) {
  try {
    return read();
  } catch (error) {
    if (error instanceof kind) return undefined;
    throw error;
  }
}

/** What `read` returns; `fallback` where the system refuses: it is gone, or not ours to read. */
export function orElse<T>(fallback: T, read: () => T): T {
  try {
    return read();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return fallback;
  }
}
