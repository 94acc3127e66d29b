/**
 * What `genie install` put on a node, and how to take it off again. Before a file is written, the
 * digest of its new content is noted. A file with another digest was written or changed by somebody
 * else, and is never lost.
 */
import { dirname, isAbsolute, join } from "node:path";
import * as v from "valibot";
import type { Host } from "../call.ts";
import { CniError, code } from "../cni.ts";
import { type Flags, text, UsageError } from "../config/usage.ts";
import { parseJson } from "../json.ts";
import { serviceAccountDirDefault } from "../settings.ts";
import * as files from "./files.ts";

/** Folder of the table, the credentials and the note of what was installed. */
export const ownDir = "/etc/cni/genie";
/** Paths on the node that every genie looks at. */
export const paths = {
  table: `${ownDir}/plugins.toml`,
  kubeconfig: `${ownDir}/kubeconfig`,
  token: `${ownDir}/token`,
  note: `${ownDir}/install.json`,
  confDir: "/etc/cni/net.d",
  binDir: "/opt/cni/bin",
} as const;
/** Name of our CNI config; runtimes take the first of the folder. */
export const conflistName = "00-genie.conflist";

const InstalledFile = v.strictObject({
  path: v.string(),
  kind: v.picklist(["binary", "previous", "table", "kubeconfig", "token", "conflist", "taken"]),
  /** SHA-256 of what we wrote there; two while the file is being replaced. */
  written: v.array(v.string()),
  /** Where the file that stood there before is kept, on the node. */
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

/** A node, and the note of what is installed there. */
export interface Site {
  /** The node's root for us. */
  root: string;
  note: v.InferOutput<typeof Installation>;
}

/** What was done with one file. */
export interface FileOutcome {
  did:
    | "wrote"
    | "replaced"
    | "unchanged"
    | "kept"
    | "restored"
    | "removed"
    | "left"
    | "skipped"
    | "adopted";
  path: string;
  detail: string;
}

/** Collects outcomes, and prints each at once unless the command is to print JSON. */
export function outcomePrinter(host: Host, flags: Flags) {
  const steps: FileOutcome[] = [];
  const print = (outcome: FileOutcome) => {
    steps.push(outcome);
    const { did, path, detail } = outcome;
    const line = `${did.padEnd(9)}  ${path}${detail === "" ? "" : `: ${detail}`}\n`;
    if (!flags["json"]) host.stdout(line);
  };
  return { steps, print };
}

/** The value of an option that takes a folder. @throws UsageError for a relative path */
export function folderOption(flags: Flags, name: string): string | undefined {
  const path = text(flags, name);
  if (path === undefined || isAbsolute(path)) return path;
  throw new UsageError(`--${name} needs an absolute path, not "${path}"`);
}

/** Reads the note of a node. @throws CniError 7 when it is damaged, 5 when it cannot be read */
export function openSite(root: string): Site {
  const file = files.hostFile(root, paths.note);
  const content = files.readIfThere(file);
  if (content === undefined) return { root, note: { version: 1, genie: "", files: [] } };
  const parsed = v.safeParse(Installation, parseJson(content, file));
  if (parsed.success) return { root, note: parsed.output };
  const then = "genie install then takes what it finds for somebody else's and keeps it";
  const message = `Invalid note of the installation ${file}: move it away, ${then}`;
  throw new CniError(code.invalidConfig, message);
}

/** Writes the note. @throws CniError 5 when it cannot be written */
export function writeNote({ root, note }: Site): void {
  files.makeFolder(files.hostPath(root, ownDir), 0o700);
  const content = { text: `${JSON.stringify(note, null, 2)}\n` };
  files.placeFile(files.hostFile(root, paths.note), content, 0o600);
}

/** The noted file of a kind; undefined when install has written none. */
export function noted({ note }: Site, kind: InstalledFile["kind"]): InstalledFile | undefined {
  return note.files.find((file) => file.kind === kind);
}

/** One file to put on the node. */
export interface NodeFile {
  kind: InstalledFile["kind"];
  path: string;
  content: files.Content;
  /** 0o644 unless given. */
  mode?: number;
  /** A file there that we did not write, or that was changed since, stays. */
  keepsOthers?: boolean;
}

/**
 * Puts one file in place, unless it is there already. Somebody else's file in its place stays with
 * `keepsOthers`; without, it is kept under another name.
 * @throws CniError 5 when it cannot be written
 */
export function put(site: Site, file: NodeFile): FileOutcome {
  const { kind, path, content, mode = 0o644, keepsOthers = false } = file;
  const target = files.hostFile(site.root, path);
  const found = files.digestOf(target);
  const fresh = files.digest(content);
  const known = site.note.files.find((file) => file.path === path);
  if (found === fresh) return { did: "unchanged", path, detail: "" };
  const isForeign = found !== undefined && !known?.written.includes(found);
  if (isForeign && keepsOthers) {
    const detail = known ? "it was changed since it was installed" : "it was there before";
    return { did: "kept", path, detail };
  }
  const entry: InstalledFile = known ?? { path, kind, written: [] };
  if (!known) site.note.files.push(entry);
  if (isForeign) entry.replaced = keepForeign(site, entry, target);
  entry.written = [...entry.written.slice(-1), fresh];
  writeNote(site);
  files.placeFile(target, content, mode);
  entry.written = [fresh];
  writeNote(site);
  const detail = isForeign ? `what was there is kept as ${entry.replaced}` : "";
  return { did: found === undefined ? "wrote" : "replaced", path, detail };
}

/** Keeps somebody else's config, which one of ours with another name replaces. @returns where */
export function keepTaken(site: Site, path: string): string {
  const entry = noted(site, "taken") ?? { path, kind: "taken" as const, written: [] };
  site.note.files = [...site.note.files.filter((file) => file !== entry), entry];
  entry.replaced = keepForeign(site, entry, files.hostFile(site.root, path));
  writeNote(site);
  return entry.replaced;
}

/** Keeps somebody else's file, but not in a conf dir: runtimes read every name there. */
function keepForeign({ root }: Site, { kind, path }: InstalledFile, target: string): string {
  if (kind === "binary") {
    const kept = `${path}.replaced`;
    files.keepAs(target, files.hostFile(root, kept));
    return kept;
  }
  const dir = `${ownDir}/replaced`;
  files.makeFolder(files.hostPath(root, dir), 0o700);
  const kept = join(dir, path.split("/").at(-1) ?? "");
  files.placeFile(files.hostFile(root, kept), { file: target }, 0o600);
  return kept;
}

/**
 * Takes one file off the node and restores the one that it replaced. A file that was changed since
 * it was installed stays.
 * @throws CniError 5 when it cannot be removed
 */
export function takeOff(site: Site, entry: InstalledFile): FileOutcome {
  const outcome = { path: entry.path, ...removeOrRestore(site.root, entry) };
  site.note.files = site.note.files.filter((file) => file !== entry);
  writeNote(site);
  return outcome;
}

function removeOrRestore(root: string, entry: InstalledFile): Omit<FileOutcome, "path"> {
  const { path, kind, written, replaced } = entry;
  const target = files.hostFile(root, path);
  const found = files.digestOf(target);
  // The agent renews the token, so its digest says nothing.
  if (found !== undefined && kind !== "token" && !written.includes(found)) {
    return { did: "left", detail: "it was changed since it was installed" };
  }
  const before = replaced === undefined ? undefined : files.hostFile(root, replaced);
  if (before !== undefined && files.digestOf(before) !== undefined) {
    if (kind === "binary") files.moveFile(before, target);
    else {
      files.placeFile(target, { file: before }, kind === "kubeconfig" ? 0o600 : 0o644);
      files.removeFile(before);
    }
    return { did: "restored", detail: "as it was before" };
  }
  if (found === undefined) return { did: "unchanged", detail: "it is gone already" };
  files.removeFile(target);
  return { did: "removed", detail: "" };
}

/**
 * Copies the token of the pod we run in to where genie's calls on the node read it.
 * @param root the node's root for us
 * @returns true when the token is a new one
 * @throws CniError 5 when it cannot be read or written
 */
export function copyToken(root: string, folder = serviceAccountDirDefault): boolean {
  return placeToken(root, podToken(folder));
}

/** The token of the pod we run in. @throws CniError 5 when it cannot be read */
export function podToken(folder: string): string {
  const file = join(folder, "token");
  const token = files.readIfThere(file)?.trim() ?? "";
  if (token !== "") return token;
  throw new CniError(code.ioFailure, `Cannot read ${file}: there is no token in it`);
}

/** Writes the token for genie's calls. @returns true when it is a new one. @throws CniError 5 */
export function placeToken(root: string, token: string): boolean {
  const target = files.hostFile(root, paths.token);
  const content = { text: `${token}\n` };
  if (files.digestOf(target) === files.digest(content)) return false;
  files.makeFolder(dirname(target), 0o700);
  files.placeFile(target, content, 0o600);
  return true;
}
