/**
 * `genie uninstall`: takes off the node what `genie install` put there, the CNI config first, and
 * puts back what was there before. Refuses while pods are attached; with `--force` new pods get the
 * network that follows, and genie stays behind it until the last DEL.
 */
import { readdirSync, rmdirSync, rmSync, statSync } from "node:fs";
import { basename, dirname, isAbsolute, join } from "node:path";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { CniError, code, type Host } from "../cni.ts";
import { parseNodeSettings } from "../config/parse.ts";
import { readRecord } from "../report/file.ts";
import { liveAttachments } from "../report/live.ts";
import { readIfThere, removeFile } from "./files.ts";
import { lastList } from "./genie_list.ts";
import { hostFile, hostPath } from "./host_root.ts";
import { formatStep } from "./install.ts";
import {
  conflistName,
  type InstalledFile,
  noted,
  openSite,
  ownDir,
  paths,
  put,
  type Site,
  type Step,
  takeOff,
} from "./installation.ts";
import { readConfs } from "./node_ready.ts";

/** Where libcni keeps the results of its calls, on the node. */
const cacheDir = "/var/lib/cni/results";
/** Pods named in the message; there may be hundreds. */
const namedMax = 3;

/**
 * Runs `genie uninstall`.
 * @returns exit status: 1 when it is not complete yet, since pods live
 * @throws CniError 7 while pods are attached and there is no `--force`; 5 for what stays
 */
export async function runUninstall(host: Host, flags: Flags): Promise<number> {
  const root = text(flags, "host-root") ?? "/";
  if (!isAbsolute(root)) throw new UsageError(`--host-root needs an absolute path, not "${root}"`);
  const site = openSite(root);
  const steps: Step[] = [];
  const tell = (step: Step) => {
    steps.push(step);
    if (!flags["json"]) host.stdout(formatStep(step));
  };
  const stateDir = recordDir(site);
  const before = attachedPods(root, stateDir);
  if (before.length > 0 && !flags["force"]) throw stillAttached(before);
  const conflist = noted(site, "conflist");
  if (before.length > 0) {
    if (conflist) tell(retire(site, conflist));
  } else if (conflist) tell(takeOff(site, conflist));
  // A pod may have started between the look and the removal.
  const pods = before.length > 0 ? before : attachedPods(root, stateDir);
  if (before.length === 0 && pods.length > 0 && conflist) tell(retire(site, conflist));
  const kinds: InstalledFile["kind"][] = ["kubeconfig", "token"];
  if (pods.length === 0) kinds.push("previous", "binary", "table");
  for (const kind of kinds) {
    for (const entry of site.note.files.filter((file) => file.kind === kind)) {
      tell(takeOff(site, entry));
    }
  }
  if (pods.length === 0) finish(site, stateDir, flags["purge"] === true).forEach(tell);
  const done = pods.length === 0;
  const waitsFor = [...new Set(pods)];
  if (flags["json"]) host.stdout(`${JSON.stringify({ done, waitsFor, steps }, null, 2)}\n`);
  else host.stdout(done ? "genie is uninstalled\n" : unfinished(waitsFor));
  return done ? 0 : 1;
}

function unfinished(pods: string[]): string {
  return `New pods no longer get genie. Its binary and record stay until the last of
${pods.length} pods is gone (${nameSome(pods)}): the DEL of each still works.
Then run genie uninstall again.
`;
}

function stillAttached(pods: string[]): CniError {
  const names = [...new Set(pods)];
  return new CniError(
    code.invalidConfig,
    `Cannot uninstall: ${names.length} pods are attached through genie (${nameSome(names)}): ` +
      "drain the node, run genie gc for what is leaked, or use --force, which keeps their DEL",
  );
}

function nameSome(names: string[]): string {
  const more = names.length > namedMax ? ", ..." : "";
  return names.slice(0, namedMax).join(", ") + more;
}

/** Folder of the record on the node. */
function recordDir({ root }: Site): string {
  const table = readIfThere(hostFile(root, paths.table)) ?? "";
  return parseNodeSettings(table).stateDir;
}

/** Pods with anything on record, one entry for each attachment. */
function attachedPods(root: string, stateDir: string): string[] {
  return (
    readRecord(hostPath(root, stateDir), (record) =>
      [...liveAttachments(record, {})].map(({ namespace, pod, containerId }) =>
        pod === "" ? containerId : `${namespace}/${pod}`,
      ),
    ) ?? []
  );
}

/** Our config makes way for the network that follows; genie only answers DEL from now on. */
function retire(site: Site, { path, replaced }: InstalledFile): Step {
  const kept = replaced === undefined ? undefined : readIfThere(hostFile(site.root, replaced));
  const others = readConfs(site.root, dirname(path)).filter(({ name }) => name !== conflistName);
  const [next] = others.filter(({ value }) => value !== undefined);
  const list = lastList(kept === undefined ? next?.value : JSON.parse(kept));
  const content = { text: `${JSON.stringify(list, null, 2)}\n` };
  const step = put(site, { kind: "conflist", path, content, mode: 0o644, others: "keep" });
  if (step.did !== "replaced" && step.did !== "wrote") return step;
  return {
    ...step,
    detail: `new pods get ${next ? basename(next.name) : "no network"}, DEL works`,
  };
}

/** What is left when every file is off: the note, empty folders, and the record. */
function finish(site: Site, stateDir: string, isPurge: boolean): Step[] {
  const steps: Step[] = [];
  const state = hostPath(site.root, stateDir);
  if (statSync(state, { throwIfNoEntry: false })) {
    if (isPurge) purge(state);
    const detail = isPurge ? "" : "the record of what happened, --purge removes it";
    steps.push({ did: isPurge ? "removed" : "left", path: stateDir, detail });
  }
  const cached = removeCached(site.root);
  if (cached > 0) {
    const detail = `${cached} that runtimes kept of pods whose DEL went by another config`;
    steps.push({ did: "removed", path: cacheDir, detail });
  }
  if (site.note.files.length === 0) removeFile(hostFile(site.root, paths.note));
  for (const dir of [join(ownDir, "replaced"), ownDir]) removeEmpty(hostPath(site.root, dir));
  return steps;
}

/**
 * Removes the results that libcni keeps under our name. It looks for them by the name of the config
 * of now, so that those of pods that lived while our config was retired are never found again.
 * @returns how many there were
 */
function removeCached(root: string): number {
  const dir = hostPath(root, cacheDir);
  if (!statSync(dir, { throwIfNoEntry: false })?.isDirectory()) return 0;
  const files = readdirSync(dir)
    .filter((name) => name.startsWith("genie-"))
    .map((name) => join(dir, name))
    .filter((file) => /"networkName":"genie"/.test(readIfThere(file) ?? ""));
  for (const file of files) rmSync(file, { force: true });
  return files.length;
}

/** Removes what genie's calls keep in their folder, and nothing else that is in it. */
function purge(dir: string): void {
  for (const name of readdirSync(dir)) {
    if (/^(genie\.db|table\.json|agent\.(json|lock))/.test(name))
      rmSync(join(dir, name), { force: true });
  }
  removeEmpty(dir);
}

function removeEmpty(dir: string): void {
  try {
    rmdirSync(dir);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
  }
}
