/**
 * Atomic file writes on a node: whoever opens the name finds the old file or the new one whole,
 * even after a power failure. A running program is not disturbed (no ETXTBSY): its file lives on
 * until it ends. Also the paths of a node for a container that has the node's root mounted.
 */
import * as fs from "node:fs";
import { basename, dirname, join } from "node:path";
import { CniError, code } from "../cni.ts";

/** What a file is to hold: a text, or the content of another file, whose digest may be known. */
export type Content = { text: string } | { file: string; sha256?: string };

/** A temporary copy older than this was left by a killed process, and is removed. */
const staleMs = 3_600_000;
const chunkBytes = 4 * 1024 * 1024;
/** The kernel's own limit of links in one path (path_resolution(7)). */
const linksMax = 40;

/**
 * Writes a file: a temporary one beside it is synced, checked and renamed over it. Its folder must
 * exist.
 * @throws CniError 5 when it cannot be written; the old file is untouched then
 */
export function placeFile(target: string, content: Content, mode: number): void {
  replace(target, (fresh) => {
    removeStale(target);
    if ("text" in content) fs.writeFileSync(fresh, content.text, { mode: 0o600, flag: "wx" });
    else copyFile(content.file, fresh);
    sync(fresh, mode);
    if (digestOf(fresh) !== digest(content)) throw new Error("what was written reads differently");
  });
}

/**
 * Copies a file to a name that is not taken yet, with mode 0600, in pieces of 4 MiB. The kernel
 * keeps what is written in large pieces in large pieces of its page cache, and a program from there
 * starts an eighth sooner than one written in small pieces: it takes fewer page faults, and each
 * maps more (docs/performance.md).
 * @throws what `fs` throws
 */
export function copyFile(from: string, to: string): void {
  const buffer = Buffer.allocUnsafe(chunkBytes);
  const into = fs.openSync(to, "wx", 0o600);
  try {
    withOpen(from, (fd) => {
      for (let count = fs.readSync(fd, buffer); count > 0; count = fs.readSync(fd, buffer)) {
        for (let at = 0; at < count; ) at += fs.writeSync(into, buffer, at, count - at);
      }
    });
  } finally {
    fs.closeSync(into);
  }
}

/** Gives a file a second name on its file system, and replaces what had it. @throws CniError 5 */
export function keepAs(file: string, kept: string): void {
  replace(kept, (fresh) => {
    try {
      fs.linkSync(file, fresh);
    } catch (error) {
      // The file belongs to another user, or the file system has no links.
      if ((error as NodeJS.ErrnoException).code === undefined) throw error;
      copyFile(file, fresh);
      fs.chmodSync(fresh, fs.statSync(file).mode);
    }
  });
}

/** Makes a file under a temporary name beside `target`, then renames it. @throws CniError 5 */
function replace(target: string, make: (fresh: string) => void): void {
  const fresh = join(dirname(target), `.${basename(target)}.${crypto.randomUUID()}.new`);
  try {
    make(fresh);
    fs.renameSync(fresh, target);
    sync(dirname(target));
  } catch (error) {
    // Removing what is not there fails too on a read-only file system.
    if (fs.existsSync(fresh)) fs.rmSync(fresh);
    fail("write", target, error);
  }
}

/** Moves a file over another one and syncs the folder. @throws CniError 5 */
export function moveFile(from: string, to: string): void {
  attempt("write", to, () => {
    fs.renameSync(from, to);
    sync(dirname(to));
  });
}

/** Removes a file, if it is there, and syncs the folder. @throws CniError 5 */
export function removeFile(file: string): void {
  attempt("write", file, () => {
    if (!statIfThere(file)) return;
    fs.rmSync(file);
    sync(dirname(file));
  });
}

/** Makes a folder and those above it. @throws CniError 5 when that cannot be done */
export function makeFolder(path: string, mode: number): void {
  attempt("write", path, () => fs.mkdirSync(path, { recursive: true, mode }));
}

/** SHA-256 of what a file is to hold. @throws CniError 5 for a file that cannot be read */
export function digest(content: Content): string {
  if ("text" in content) return new Bun.CryptoHasher("sha256").update(content.text).digest("hex");
  return content.sha256 ?? digestOf(content.file) ?? fail("read", content.file, missing);
}

/** SHA-256 of a file; undefined when there is none. @throws CniError 5 when it cannot be read */
export function digestOf(file: string): string | undefined {
  return attempt("read", file, () => {
    if (!statIfThere(file)) return undefined;
    const hash = new Bun.CryptoHasher("sha256");
    const buffer = Buffer.allocUnsafe(chunkBytes);
    return withOpen(file, (fd) => {
      for (let count = fs.readSync(fd, buffer); count > 0; count = fs.readSync(fd, buffer)) {
        hash.update(buffer.subarray(0, count));
      }
      return hash.digest("hex");
    });
  });
}

/** A text file; undefined when there is none. @throws CniError 5 when it cannot be read */
export function readIfThere(file: string): string | undefined {
  try {
    return fs.readFileSync(file, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    fail("read", file, error);
  }
}

/** A text file that must be there. @throws CniError 5 when it cannot be read */
export function readText(file: string): string {
  return readIfThere(file) ?? fail("read", file, missing);
}

/** What stands at a path; undefined when there is nothing. */
export function statIfThere(path: string) {
  return fs.statSync(path, { throwIfNoEntry: false });
}

/** The names in a folder; none when there is no folder. */
export function listFolder(path: string): string[] {
  return statIfThere(path)?.isDirectory() ? fs.readdirSync(path) : [];
}

function sync(path: string, mode?: number): void {
  withOpen(path, (fd) => {
    if (mode !== undefined) fs.fchmodSync(fd, mode);
    fs.fsyncSync(fd);
  });
}

/** Opens a file or a folder for reading while the action runs. */
export function withOpen<T>(path: string, action: (fd: number) => T): T {
  const fd = fs.openSync(path, "r");
  try {
    return action(fd);
  } finally {
    fs.closeSync(fd);
  }
}

/** Removes the temporary copies that killed processes left: a binary has a hundred megabytes. */
function removeStale(target: string): void {
  const prefix = `.${basename(target)}.`;
  for (const name of fs.readdirSync(dirname(target))) {
    if (!name.startsWith(prefix) || !/\.[0-9a-f-]{36}\.new$/.test(name)) continue;
    const path = join(dirname(target), name);
    const found = statIfThere(path);
    if (found && Date.now() - found.mtimeMs > staleMs) fs.rmSync(path, { force: true });
  }
}

/**
 * Where a path of the node is for us. Every link on the way means what it means on the node, so
 * none leads out of the mount.
 * @param root the node's root: `/`, or where it is mounted
 * @param path absolute path on the node; components that do not exist are kept as they are
 * @throws CniError 5 for a circle of links or a folder that may not be read
 */
export function hostPath(root: string, path: string): string {
  const base = attempt("use", root, () => fs.realpathSync(root));
  const wanted = components(path);
  let found: string[] = [];
  let links = 0;
  for (let name = wanted.shift(); name !== undefined; name = wanted.shift()) {
    if (name === "..") {
      found.pop();
      continue;
    }
    const target = linkAt(join(base, ...found, name));
    if (target === undefined) {
      found.push(name);
      continue;
    }
    if (++links > linksMax) fail("use", path, new Error("too many links"));
    if (target.startsWith("/")) found = [];
    wanted.unshift(...components(target));
  }
  return join(base, ...found);
}

/** As {@link hostPath} for a file that is to be replaced: a link in its place is not followed. */
export function hostFile(root: string, path: string): string {
  return join(hostPath(root, dirname(path)), basename(path));
}

function components(path: string): string[] {
  return path.split("/").filter((name) => name !== "" && name !== ".");
}

function linkAt(path: string): string | undefined {
  try {
    return fs.lstatSync(path).isSymbolicLink() ? fs.readlinkSync(path) : undefined;
  } catch (error) {
    const { code: reason = "" } = error as NodeJS.ErrnoException;
    if (reason === "ENOENT" || reason === "ENOTDIR") return undefined;
    fail("use", path, error);
  }
}

/** Runs an action on a path. @throws CniError 5 for whatever it throws */
function attempt<T>(verb: "read" | "write" | "use", path: string, action: () => T): T {
  try {
    return action();
  } catch (error) {
    fail(verb, path, error);
  }
}

const missing = new Error("it does not exist");

function fail(verb: "read" | "write" | "use", path: string, cause: unknown): never {
  const { code: reason, message } = cause as NodeJS.ErrnoException;
  throw new CniError(code.ioFailure, `Cannot ${verb} ${path}: ${reason ?? message}`, { cause });
}
