/**
 * What `genie install` put on a node, and how to take it off again: each file with the digest of
 * what was written, noted before it is written. A file whose digest is none of ours was written, or
 * changed, by somebody else, and is never lost.
 */
import { join } from "node:path";
import * as v from "valibot";
import { CniError, code } from "../cni.ts";
import { parseJson } from "../json.ts";
import {
  type Content,
  digest,
  digestOf,
  keepAs,
  makeFolder,
  moveFile,
  placeFile,
  readIfThere,
  removeFile,
} from "./files.ts";
import { hostFile, hostPath } from "./host_root.ts";

/** Folder of the table, the credentials and the note of what was installed. */
export const ownDir = "/etc/cni/genie";
/** Paths on the node that every genie looks at. */
export const paths = {
  table: `${ownDir}/plugins.toml`,
  kubeconfig: `${ownDir}/kubeconfig`,
  token: `${ownDir}/token`,
  note: `${ownDir}/install.json`,
  stateDir: "/var/lib/cni/genie",
  confDir: "/etc/cni/net.d",
  binDir: "/opt/cni/bin",
} as const;
/** Name of our CNI config; runtimes take the first of the folder. */
export const conflistName = "00-genie.conflist";

const InstalledFile = v.strictObject({
  /** Path on the node. */
  path: v.string(),
  kind: v.picklist(["binary", "previous", "table", "kubeconfig", "token", "conflist"]),
  /** SHA-256 of what we wrote there; two while the file is being replaced. */
  written: v.array(v.string()),
  /** Where what stood there before is kept, on the node. */
  replaced: v.exactOptional(v.string()),
});
/** One file that install wrote. */
export type InstalledFile = v.InferOutput<typeof InstalledFile>;

const Installation = v.strictObject({
  version: v.literal(1),
  /** Version of the genie that installed last. */
  genie: v.string(),
  files: v.array(InstalledFile),
});
/** What is installed. */
export type Installation = v.InferOutput<typeof Installation>;

/** A node, and what is noted of it. */
export interface Site {
  /** The node's root for us. */
  root: string;
  note: Installation;
}

/** What was done with one file, for people and programs. */
export interface Step {
  did: "wrote" | "replaced" | "unchanged" | "kept" | "restored" | "removed" | "left" | "skipped";
  path: string;
  detail: string;
}

/** Reads the note of a node. @throws CniError 7 when it is damaged, 5 when it cannot be read */
export function openSite(root: string): Site {
  const file = hostFile(root, paths.note);
  const text = readIfThere(file);
  if (text === undefined) return { root, note: { version: 1, genie: "", files: [] } };
  const parsed = v.safeParse(Installation, parseJson(text, file));
  if (parsed.success) return { root, note: parsed.output };
  throw new CniError(
    code.invalidConfig,
    `Invalid note of the installation ${file}: move it away, genie install then takes what it ` +
      "finds for somebody else's and keeps it",
  );
}

/** Writes the note. @throws CniError 5 when it cannot be written */
export function writeNote({ root, note }: Site): void {
  makeFolder(hostPath(root, ownDir), 0o700);
  const text = `${JSON.stringify(note, null, 2)}\n`;
  placeFile(hostFile(root, paths.note), { text }, 0o600);
}

/** The file of a kind, where there is one on note. */
export function noted({ note }: Site, kind: InstalledFile["kind"]): InstalledFile | undefined {
  return note.files.find((file) => file.kind === kind);
}

/** One file to put on the node. */
export interface Wanted {
  kind: InstalledFile["kind"];
  path: string;
  content: Content;
  mode: number;
  /** What becomes of a file there that we did not write, or that was changed since. */
  others: "keep" | "replace";
}

/**
 * Puts one file in place: not when it is there already, and over another one only if that is ours
 * or may be replaced; then that one is kept beside it, or in our folder.
 * @throws CniError 5 when it cannot be written
 */
export function put(site: Site, wanted: Wanted): Step {
  const { kind, path } = wanted;
  const target = hostFile(site.root, path);
  const found = digestOf(target);
  const fresh = digest(wanted.content);
  const known = site.note.files.find((file) => file.path === path);
  if (found === fresh) return { did: "unchanged", path, detail: "" };
  const isOurs = found !== undefined && (known?.written.includes(found) ?? false);
  if (found !== undefined && !isOurs && wanted.others === "keep") {
    const detail = known ? "it was changed since it was installed" : "it was there before";
    return { did: "kept", path, detail };
  }
  const entry: InstalledFile = known ?? { path, kind, written: [] };
  if (!known) site.note.files.push(entry);
  let detail = "";
  if (found !== undefined && !isOurs) {
    entry.replaced = keep(site, entry, target);
    detail = `what was there is kept as ${entry.replaced}`;
  }
  entry.written = [...entry.written.slice(-1), fresh];
  writeNote(site);
  placeFile(target, wanted.content, wanted.mode);
  entry.written = [fresh];
  writeNote(site);
  return { did: found === undefined ? "wrote" : "replaced", path, detail };
}

/** Keeps a file of somebody else under another name; runtimes read every name of a conf dir. */
function keep({ root }: Site, { kind, path }: InstalledFile, target: string): string {
  if (kind === "binary") {
    const kept = `${path}.replaced`;
    keepAs(target, hostFile(root, kept));
    return kept;
  }
  const dir = `${ownDir}/replaced`;
  makeFolder(hostPath(root, dir), 0o700);
  const kept = join(dir, path.split("/").at(-1) ?? "");
  placeFile(hostFile(root, kept), { file: target }, 0o600);
  return kept;
}

/**
 * Takes one file off the node and puts back what it replaced. A file that was changed since stays.
 * @throws CniError 5 when it cannot be removed
 */
export function takeOff(site: Site, entry: InstalledFile): Step {
  const { path, replaced, kind } = entry;
  const target = hostFile(site.root, path);
  const found = digestOf(target);
  const isOurs = kind === "token" || (found !== undefined && entry.written.includes(found));
  const step = (): Step => {
    if (found !== undefined && !isOurs) {
      return { did: "left", path, detail: "it was changed since it was installed" };
    }
    const before = replaced === undefined ? undefined : hostFile(site.root, replaced);
    if (before !== undefined && digestOf(before) !== undefined) {
      if (kind === "binary") moveFile(before, target);
      else {
        placeFile(target, { file: before }, kind === "kubeconfig" ? 0o600 : 0o644);
        removeFile(before);
      }
      return { did: "restored", path, detail: "as it was before" };
    }
    if (found === undefined) return { did: "unchanged", path, detail: "it is gone already" };
    removeFile(target);
    return { did: "removed", path, detail: "" };
  };
  const done = step();
  site.note.files = site.note.files.filter((file) => file !== entry);
  writeNote(site);
  return done;
}
