/**
 * The agent as a service of systemd, on nodes that have no Kubernetes to run it: `genie install
 * --systemd` writes, enables and starts genie-agent.service, `genie uninstall` takes it off. A unit
 * that a package brought is used as it is, and stays with its package.
 * Source: systemctl(1), systemd.service(5), systemd.exec(5), systemd.unit(5)
 */
import { lstatSync } from "node:fs";
import { dirname, join } from "node:path";
import type { Host } from "../call.ts";
import * as files from "./files.ts";
import unitTemplate from "./genie-agent.service" with { type: "text" };
import type { FileOutcome, Site } from "./installation.ts";
import { tool } from "./node_view.ts";

const unit = "genie-agent.service";
const ownPath = join("/etc/systemd/system", unit);
/** What `systemctl enable` makes. */
const enabledPath = join("/etc/systemd/system/multi-user.target.wants", unit);
const packagedPath = join("/usr/lib/systemd/system", unit);
/** How the units begin that this file writes, of any version. */
const [mark = ""] = unitTemplate.split("\n");

/**
 * The text of the unit.
 * @param binary path of genie on the node
 * @param writable folders that the agent writes to, where /usr, /boot and /etc are read-only
 */
export function unitText(binary: string, writable: readonly string[]): string {
  const folders = [...new Set(["/etc/cni", ...writable])].map((dir) => quoted(`-${dir}`));
  return unitTemplate
    .replace(/^ExecStart=\S+/m, () => `ExecStart=${quoted(binary)}`)
    .replace(/^ReadWritePaths=.*/m, () => `ReadWritePaths=${folders.join(" ")}`);
}

/** One word of a setting (systemd.syntax(7), systemd.unit(5) "Specifiers"). */
function quoted(word: string): string {
  const text = word.replaceAll("%", "%%").replaceAll("\\", "\\\\").replaceAll('"', '\\"');
  return /[\s"'\\]/.test(word) ? `"${text}"` : text;
}

/** systemctl looks after the machine it runs on, or only at the files of another root. */
function isRunning({ root }: Site): boolean {
  return root === "/" && files.statIfThere("/run/systemd/system") !== undefined;
}

function systemctl(host: Host, { root }: Site, ...args: string[]) {
  return tool(host, "systemctl", root === "/" ? args : [`--root=${root}`, ...args]);
}

/**
 * Puts the service in place and starts it, anew where something has changed. Where systemd does not
 * run, it starts with the next boot.
 * @param node path of genie on the node, the folder of its CNI config, and `isNew`: install has
 *   changed something
 * @throws CniError 5 when a file cannot be written, or systemctl fails or is absent
 */
export async function putService(
  host: Host,
  site: Site,
  node: { binary: string; confDir: string; isNew: boolean },
): Promise<FileOutcome[]> {
  const steps: FileOutcome[] = [];
  const target = files.hostFile(site.root, ownPath);
  const there = files.readIfThere(target);
  const text = unitText(node.binary, [node.confDir]);
  const isPackaged = files.statIfThere(files.hostPath(site.root, packagedPath)) !== undefined;
  if (there !== undefined && !there.startsWith(mark)) {
    steps.push({ did: "kept", path: ownPath, detail: "it is not genie's, and is used as it is" });
  } else if (isPackaged && there === undefined) {
    steps.push({ did: "unchanged", path: packagedPath, detail: "it belongs to a package" });
  } else if (there === text) steps.push({ did: "unchanged", path: ownPath, detail: "" });
  else {
    files.makeFolder(dirname(target), 0o755);
    files.placeFile(target, { text }, 0o644);
    steps.push({ did: there === undefined ? "wrote" : "replaced", path: ownPath, detail: "" });
  }
  const wasEnabled = isEnabled(site);
  const runs = isRunning(site);
  const detail = runs ? "" : "systemd does not run here: it starts with the next boot";
  await systemctl(host, site, "enable", unit);
  steps.push({ did: wasEnabled ? "unchanged" : "wrote", path: enabledPath, detail });
  if (runs) {
    await systemctl(host, site, "daemon-reload");
    const isNew = node.isNew || steps.some(({ did }) => did === "wrote" || did === "replaced");
    await systemctl(host, site, isNew ? "restart" : "start", unit);
  }
  return steps;
}

function isEnabled({ root }: Site): boolean {
  const path = files.hostFile(root, enabledPath);
  return lstatSync(path, { throwIfNoEntry: false }) !== undefined;
}

/**
 * Ends the service and takes off what {@link putService} made.
 * @throws CniError 5 when a file cannot be removed, or systemctl fails
 */
export async function removeService(host: Host, site: Site): Promise<FileOutcome[]> {
  const steps: FileOutcome[] = [];
  const runs = isRunning(site);
  if (isEnabled(site)) {
    await systemctl(host, site, "disable", ...(runs ? ["--now"] : []), unit);
    steps.push({ did: "removed", path: enabledPath, detail: "" });
  }
  const target = files.hostFile(site.root, ownPath);
  if (!files.readIfThere(target)?.startsWith(mark)) return steps;
  files.removeFile(target);
  if (runs) await systemctl(host, site, "daemon-reload");
  return [...steps, { did: "removed", path: ownPath, detail: "" }];
}
