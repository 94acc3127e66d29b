/**
 * The agent's part that keeps our CNI config where `genie install` put it: without it the runtime
 * takes the next file, and pods silently get another network.
 *
 * What an operator changed stays as long as it calls genie. `genie uninstall` takes the file away
 * before its note: what is amiss must be so at two looks, and the note is looked at last.
 */
import { basename, dirname } from "node:path";
import { CniError, type Host, log } from "../cni.ts";
import { parseJson } from "../json.ts";
import { pause } from "../kubernetes/watch.ts";
import { digest, makeFolder, placeFile, readIfThere, removeFile } from "../node/files.ts";
import { callsGenie, ownListText } from "../node/genie_list.ts";
import { hostFile, hostPath } from "../node/host_root.ts";
import { noted, openSite, ownDir } from "../node/installation.ts";
import type { Health } from "./health.ts";

const lookMs = 5_000;

/** Runs the part until the host's signal aborts. */
export async function runConflist(
  { host, health }: { host: Host; health: Health },
  root = "/",
  everyMs = lookMs,
): Promise<void> {
  let before = "";
  let said = "";
  for (; !host.signal.aborted; await pause(everyMs, host.signal)) {
    health.beat("conflist");
    try {
      const found = whatIsAmiss(root);
      if (found !== "" && found === before) restore(host, root);
      before = found;
      said = "";
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
      if (said !== error.message) log(host, "warn", `Cannot keep the CNI config: ${error.message}`);
      said = error.message;
    }
  }
}

/** Path of our config on the node, where it is as this version of genie installed it. */
function ownPath(root: string): string | undefined {
  const entry = noted(openSite(root), "conflist");
  const isOurs = entry?.written.at(-1) === digest({ text: ownListText() });
  return isOurs ? entry?.path : undefined;
}

/** What of it is not as it should be; "" for nothing. @throws CniError 5, 7 */
function whatIsAmiss(root: string): string {
  const path = ownPath(root);
  if (path === undefined) return "";
  const text = readIfThere(hostFile(root, path));
  if (text === undefined) return "gone";
  if (text === ownListText() || callsGenie({ name: path, value: parsed(text) })) return "";
  return `changed ${digest({ text })}`;
}

function parsed(text: string): unknown {
  try {
    return parseJson(text, "");
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/** Puts it back; what stood in its place is kept. @throws CniError 5, 7 */
function restore(host: Host, root: string): void {
  const path = ownPath(root);
  if (path === undefined) return;
  const target = hostFile(root, path);
  const others = readIfThere(target);
  const kept = `${ownDir}/replaced/${basename(path)}.changed`;
  if (others !== undefined) {
    makeFolder(dirname(hostFile(root, kept)), 0o700);
    placeFile(hostFile(root, kept), { text: others }, 0o600);
  }
  makeFolder(hostPath(root, dirname(path)), 0o755);
  placeFile(target, { text: ownListText() }, 0o644);
  if (ownPath(root) === undefined) {
    // It was uninstalled in this moment.
    removeFile(target);
    return;
  }
  const what = others === undefined ? "had been deleted" : `had been changed, see ${kept}`;
  log(host, "warn", `The CNI config ${path} ${what}, and is back`);
}
