/**
 * Puts whole files in place: whoever opens the name finds the old file or the new one, never a part
 * of either, also after a power failure. A program that runs is not disturbed (no ETXTBSY), since
 * its file lives on until it ends.
 */
import {
  closeSync,
  constants,
  copyFileSync,
  fchmodSync,
  fsyncSync,
  linkSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { CniError, code } from "../cni.ts";

/** What a file is to hold: a text, or what another file holds, whose digest may be known. */
export type Content = { text: string } | { file: string; sha256?: string };

/** A copy that nobody finished is removed after this long. */
const staleMs = 3_600_000;
const chunkBytes = 4 * 1024 * 1024;

/**
 * Writes a file: a new one beside it, synced, checked, then renamed over it. Its folder must exist.
 * @throws CniError 5 when it cannot be written; the old file is untouched then
 */
export function placeFile(target: string, content: Content, mode: number): void {
  const dir = dirname(target);
  const fresh = join(dir, `.${basename(target)}.${crypto.randomUUID()}.new`);
  try {
    removeStale(target);
    if ("text" in content) writeFileSync(fresh, content.text, { mode: 0o600, flag: "wx" });
    else copyFileSync(content.file, fresh, constants.COPYFILE_EXCL | constants.COPYFILE_FICLONE);
    settle(fresh, mode);
    if (digestOf(fresh) !== digest(content)) throw new Error("what was written reads differently");
    renameSync(fresh, target);
    settle(dir);
  } catch (error) {
    rmSync(fresh, { force: true });
    throw unwritable(target, error);
  }
}

/**
 * Gives a file a second name, in place of what has that name; both are on one file system.
 * @throws CniError 5 when that cannot be done
 */
export function keepAs(file: string, kept: string): void {
  const fresh = join(dirname(kept), `.${basename(kept)}.${crypto.randomUUID()}.new`);
  try {
    try {
      linkSync(file, fresh);
    } catch (error) {
      // A file of another user, or a file system without links.
      if ((error as NodeJS.ErrnoException).code === undefined) throw error;
      copyFileSync(file, fresh, constants.COPYFILE_EXCL);
    }
    renameSync(fresh, kept);
    settle(dirname(kept));
  } catch (error) {
    rmSync(fresh, { force: true });
    throw unwritable(kept, error);
  }
}

/** Moves a file over another one, and sees that this is on disk. @throws CniError 5 */
export function moveFile(from: string, to: string): void {
  try {
    renameSync(from, to);
    settle(dirname(to));
  } catch (error) {
    throw unwritable(to, error);
  }
}

/** Removes a file, if it is there, and sees that this is on disk. @throws CniError 5 */
export function removeFile(file: string): void {
  try {
    if (!statSync(file, { throwIfNoEntry: false })) return;
    rmSync(file);
    settle(dirname(file));
  } catch (error) {
    throw unwritable(file, error);
  }
}

/** Makes a folder and those above it. @throws CniError 5 when that cannot be done */
export function makeFolder(path: string, mode: number): void {
  try {
    mkdirSync(path, { recursive: true, mode });
  } catch (error) {
    throw unwritable(path, error);
  }
}

/** SHA-256 of what a file is to hold. @throws CniError 5 for a file that cannot be read */
export function digest(content: Content): string {
  if ("text" in content) return new Bun.CryptoHasher("sha256").update(content.text).digest("hex");
  const found = content.sha256 ?? digestOf(content.file);
  if (found !== undefined) return found;
  throw new CniError(code.ioFailure, `Cannot read ${content.file}: it does not exist`);
}

/** SHA-256 of a file; undefined when there is none. @throws CniError 5 when it cannot be read */
export function digestOf(file: string): string | undefined {
  try {
    if (!statSync(file, { throwIfNoEntry: false })) return undefined;
    const hash = new Bun.CryptoHasher("sha256");
    const buffer = Buffer.allocUnsafe(chunkBytes);
    const fd = openSync(file, "r");
    try {
      for (;;) {
        const count = readSync(fd, buffer);
        if (count === 0) return hash.digest("hex");
        hash.update(buffer.subarray(0, count));
      }
    } finally {
      closeSync(fd);
    }
  } catch (error) {
    throw unreadable(file, error);
  }
}

/** A text file; undefined when there is none. @throws CniError 5 when it cannot be read */
export function readIfThere(file: string): string | undefined {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw unreadable(file, error);
  }
}

/** On disk before anything is built on it; `mode` where it is a file of ours. */
function settle(path: string, mode?: number): void {
  const fd = openSync(path, "r");
  try {
    if (mode !== undefined) fchmodSync(fd, mode);
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

/** Copies of this file that a killed process left: a binary has a hundred megabytes. */
function removeStale(target: string): void {
  const prefix = `.${basename(target)}.`;
  for (const name of readdirSync(dirname(target))) {
    if (!name.startsWith(prefix) || !/\.[0-9a-f-]{36}\.new$/.test(name)) continue;
    const path = join(dirname(target), name);
    const found = statSync(path, { throwIfNoEntry: false });
    if (found && Date.now() - found.mtimeMs > staleMs) rmSync(path, { force: true });
  }
}

function unwritable(path: string, error: unknown): CniError {
  return new CniError(code.ioFailure, `Cannot write ${path}: ${reasonOf(error)}`, { cause: error });
}

function unreadable(path: string, error: unknown): CniError {
  return new CniError(code.ioFailure, `Cannot read ${path}: ${reasonOf(error)}`, { cause: error });
}

function reasonOf(error: unknown): string {
  const { code: reason, message } = error as NodeJS.ErrnoException;
  return reason ?? message;
}
