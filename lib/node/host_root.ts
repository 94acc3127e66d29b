/**
 * Paths of a node seen from a container that has the node's root mounted somewhere (`/host`): a
 * link there means what it means on the node, and none leads out of the mount. Reads links only.
 */
import { lstatSync, readlinkSync, realpathSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { CniError, code } from "../cni.ts";

/** As the kernel's own limit of links in one path (path_resolution(7)). */
const linksMax = 40;

/**
 * Where a path of the node is for us, every link on it followed as on the node.
 *
 * @param root the node's root: `/`, or where it is mounted
 * @param path absolute path on the node; what of it does not exist is taken as it stands
 * @throws CniError 5 for a circle of links or a folder that may not be read
 */
export function hostPath(root: string, path: string): string {
  const base = realRoot(root);
  const wanted = parts(path);
  let found: string[] = [];
  let links = 0;
  for (let part = wanted.shift(); part !== undefined; part = wanted.shift()) {
    if (part === "..") {
      found.pop();
      continue;
    }
    const target = linkAt(join(base, ...found, part));
    if (target === undefined) {
      found.push(part);
      continue;
    }
    if (++links > linksMax) throw unusable(path, "too many links");
    if (target.startsWith("/")) found = [];
    wanted.unshift(...parts(target));
  }
  return join(base, ...found);
}

/** As {@link hostPath} for a file that is to be replaced: a link in its place is not followed. */
export function hostFile(root: string, path: string): string {
  return join(hostPath(root, dirname(path)), basename(path));
}

function parts(path: string): string[] {
  return path.split("/").filter((part) => part !== "" && part !== ".");
}

function realRoot(root: string): string {
  try {
    return realpathSync(root);
  } catch (error) {
    throw unusable(root, (error as NodeJS.ErrnoException).code ?? "");
  }
}

/** Where a link leads; undefined for what is none, or not there. */
function linkAt(path: string): string | undefined {
  try {
    return lstatSync(path).isSymbolicLink() ? readlinkSync(path) : undefined;
  } catch (error) {
    const { code: reason = "" } = error as NodeJS.ErrnoException;
    if (reason === "ENOENT" || reason === "ENOTDIR") return undefined;
    throw unusable(path, reason);
  }
}

function unusable(path: string, reason: string): CniError {
  return new CniError(code.ioFailure, `Cannot use ${path}: ${reason}`);
}
