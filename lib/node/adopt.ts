/**
 * Pods that were there before genie, and those that stay when it goes (design D14): install takes
 * the attachments that libcni's cache knows on record, uninstall gives them back to that cache.
 * Both under the lock of each container, so that a DEL of the runtime comes before or after.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Host } from "../call.ts";
import { findGone, readNetwork } from "../check.ts";
import { CniError, code, toCniError } from "../cni.ts";
import { parseConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { closeState, openState, type State } from "../database.ts";
import { isObject } from "../json.ts";
import { isForeignNetns, netnsId } from "../kernel.ts";
import { newOperation, release, takeLock } from "../lock.ts";
import { type NetworkConfigList, parseConfigList } from "../networks.ts";
import type { CallId, StoredAttachment } from "../record.ts";
import { attachments, forget, hasRuleset, recorded } from "../recorded.ts";
import {
  type CachedAttachment,
  cacheDir,
  cacheName,
  insertAttached,
  readCached,
  toStored,
} from "../recovery/cni_cache.ts";
import { networkName } from "../recovery/network_name.ts";
import { orUndefined } from "../recovery/tried.ts";
import { parseArgs } from "../request.ts";
import { hostPath, listFolder, makeFolder, placeFile, readIfThere, statIfThere } from "./files.ts";
import { callsGenie, ownEntry, readConfs } from "./genie_config.ts";
import { type FileOutcome, paths, type Site } from "./installation.ts";
import { configAt, isExecutable } from "./node_view.ts";

/** How long another operation of a container is waited for, in ms. */
const busyMs = 10_000;
/** How many entries are named that cannot be used. */
const namedMax = 10;

/** The folders in which install found CNI configs and plugins, on the node. */
interface Folders {
  confDir: string;
  binDirs: string[];
}

/** What install does for all entries. */
interface Adoption {
  host: Host;
  root: string;
  /** Folder of the cache, for us. */
  dir: string;
  binDirs: string[];
  /** Name of the config by which the runtime calls genie. */
  requestNetwork: string;
  config: Config;
  open: () => Promise<State>;
}

/**
 * Takes what runs and is not on record into the record, from libcni's cache. A second time finds
 * nothing to do.
 * @returns what was adopted, and what cannot be and why; empty where there is nothing
 * @throws CniError 106 when the record cannot be used
 */
export async function adoptRunning(
  host: Host,
  site: Site,
  { confDir, binDirs }: Folders,
): Promise<FileOutcome[]> {
  const { root } = site;
  const dir = hostPath(root, cacheDir);
  const config = parseConfig(readIfThere(hostPath(root, paths.table)) ?? "", paths.table);
  const own = readConfs(root, confDir).find(callsGenie)?.value;
  // Where the runtime does not call genie, or only for what is on record, it deletes them itself.
  if (!isObject(own) || ownEntry(own)?.["delOnly"] === true) return [];
  const search = { dirs: binDirs.map((one) => hostPath(root, one)), ownType: "genie" };
  const reader = { dir, config: configAt(root, { ...config, confDir }), search };
  let state: State | undefined;
  const requestNetwork = String(own["name"]);
  const open = async () => {
    state ??= await openState(host, hostPath(root, config.stateDir));
    return state;
  };
  const adoption = { host, root, dir, binDirs, requestNetwork, config: reader.config, open };
  const adopted = new Map<string, number>();
  const refused: FileOutcome[] = [];
  try {
    for (const file of listFolder(dir).sort()) {
      try {
        const entry = readCached(reader, file);
        if (!entry || !(await adopt(adoption, entry))) continue;
        adopted.set(entry.list.name, (adopted.get(entry.list.name) ?? 0) + 1);
      } catch (error) {
        const { code: number, message } = toCniError(error);
        if (number === code.stateUnavailable) throw error;
        refused.push({ did: "left", path: cacheDir, detail: `not adopted: ${message}` });
      }
    }
  } finally {
    if (state) closeState(state);
  }
  const more = refused.length - namedMax;
  const detail = `not adopted: ${more} others`;
  return [
    ...sumOf("adopted", "genie knows", adopted),
    ...refused.slice(0, namedMax),
    ...(more > 0 ? [{ did: "left" as const, path: cacheDir, detail }] : []),
  ];
}

/** One line about attachments, counted by network; none where there are none. */
function sumOf(
  did: "adopted" | "restored",
  who: string,
  counts: ReadonlyMap<string, number>,
): FileOutcome[] {
  if (counts.size === 0) return [];
  const sum = [...counts.values()].reduce((all, one) => all + one, 0);
  const networks = [...counts].map(([name, count]) => `${name} ${count}`).join(", ");
  return [
    { did, path: cacheDir, detail: `${who} ${sum} attachments of running pods: ${networks}` },
  ];
}

/**
 * Takes one on record. @returns false for one that does not run, or that is on record
 * @throws CniError for one that runs and cannot be adopted
 */
async function adopt(adoption: Adoption, entry: CachedAttachment): Promise<boolean> {
  const { host, root, dir, binDirs, open, requestNetwork, config } = adoption;
  const { containerId, ifName, list } = entry;
  const file = cacheName(list, entry);
  const refuse = (why: string) => new CniError(code.invalidConfig, `${file}: ${why}`);
  if (entry.netns === "") throw refuse("it does not say its network namespace");
  const netns = hostPath(root, entry.netns);
  if (!isForeignNetns(netns)) return false;
  const state = await open();
  const isKnown = () =>
    attachments(host, state, containerId).some((one) => one.ifName === ifName && !one.parkedAs);
  if (isKnown()) return false;
  const pod = parseArgs(entry.cniArgs ?? "");
  // Not on record: a GC of the pods' runtime would take it for stale while it runs.
  if (!pod.has("K8S_POD_NAMESPACE") || ifName !== "eth0") {
    throw refuse("it is not eth0 of a pod: its runtime deletes it by its own network");
  }
  if (!entry.result) throw refuse("its result cannot be read");
  const kernel = readNetwork(netns);
  const gone = kernel ? findGone(entry, entry.result, kernel) : [];
  if (gone.length > 0) throw refuse(`its namespace does not have ${gone.join(", ")}`);
  const plugins = list.plugins.map(({ type }) => {
    const found = binDirs.map((one) => join(one, type));
    const path = found.find((one) => isExecutable(hostPath(root, one)));
    if (path !== undefined) return path;
    throw refuse(`plugin "${type}" is in none of ${binDirs.join(", ")}`);
  });
  const row = toStored(
    entry,
    {
      plugins,
      cniPath: binDirs.join(":"),
      requestNetwork,
      network: networkName(config, list.name),
      timeoutMs: config.timeoutMs,
      netns: entry.netns,
      cniArgs: entry.cniArgs ?? "",
    },
    { createdAtMs: host.now(), netnsId: netnsId(netns) },
  );
  return underLock(host, state, containerId, () => {
    // Its DEL came first.
    if (isKnown() || !existsSync(join(dir, file))) return false;
    insertAttached(state, [row]);
    return true;
  });
}

/** Runs a transaction under the lock of a container. @throws CniError 11 where it stays taken */
async function underLock<T>(
  host: Host,
  state: State,
  containerId: string,
  inside: () => T,
): Promise<T> {
  const operation = newOperation(host, containerId, "install");
  const { signal } = host;
  const wait = { host, state, operation, deadlineMs: host.now() + busyMs, signal };
  const value = await takeLock(wait, inside);
  release(state, operation, () => undefined);
  return value;
}

/** Calls with the record of a node; gives undefined where there is none. */
async function withRecord<T>(
  host: Host,
  dir: string,
  act: (state: State) => T | Promise<T>,
): Promise<T | undefined> {
  if (!statIfThere(join(dir, "genie.db"))) return undefined;
  const state = await openState(host, dir);
  try {
    return await act(state);
  } finally {
    closeState(state);
  }
}

/**
 * Attachments that the runtime itself will delete once genie's config is gone: the one of its
 * container, of the network that the runtime takes then, in a namespace that lives, and without
 * rules of ours in it.
 * @param stateDir folder of the record, for us
 */
export async function findReturnable(
  host: Host,
  { root }: Site,
  stateDir: string,
  confDir: string,
): Promise<StoredAttachment[]> {
  const next = readConfs(root, confDir).find((one) => isObject(one.value) && !callsGenie(one));
  const list = next && orUndefined(() => parseConfigList(next.value, next.name));
  if (!list) return [];
  const keyOf = ({ name, plugins }: Pick<NetworkConfigList, "name" | "plugins">) =>
    [name, ...plugins.map(({ type }) => type)].join();
  const isAlive = ({ netns, netnsId: id }: StoredAttachment) => {
    const path = netns === "" ? "" : hostPath(root, netns);
    return isForeignNetns(path) && netnsId(path) === id;
  };
  const found = await withRecord(host, stateDir, (state) => {
    const { readable, damaged } = recorded(host, state);
    const countOf = ({ containerId }: CallId) =>
      [...readable, ...damaged].filter((one) => one.containerId === containerId).length;
    return readable.filter(
      (row) =>
        row.state === "attached" &&
        row.ifName === row.requestIfName &&
        keyOf(row.list) === keyOf(list) &&
        countOf(row) === 1 &&
        // Those that the runtime's own DEL does not hand over.
        !row.device &&
        !row.deviceInfoFile &&
        Object.keys(row.args).length === 0 &&
        isAlive(row) &&
        !hasRuleset(state, row.netnsId),
    );
  });
  return found ?? [];
}

/** Gives attachments back to libcni's cache, and forgets them. @throws CniError 5, 11 or 106 */
export async function giveBack(
  host: Host,
  { root }: Site,
  stateDir: string,
  rows: readonly StoredAttachment[],
): Promise<FileOutcome[]> {
  const dir = hostPath(root, cacheDir);
  const counts = new Map<string, number>();
  await withRecord(host, stateDir, async (state) => {
    for (const row of rows) {
      const { containerId, list } = row;
      const isThere = (one: StoredAttachment) => one.ifName === row.ifName;
      const isBack = await underLock(host, state, containerId, () => {
        if (!attachments(host, state, containerId).some(isThere)) return false;
        const file = join(dir, cacheName(list, row));
        makeFolder(dir, 0o700);
        // What the runtime wrote itself says more.
        if (!row.isCached || !existsSync(file)) placeFile(file, { text: entryOf(row) }, 0o600);
        forget(state, row);
        return true;
      });
      if (isBack) counts.set(list.name, (counts.get(list.name) ?? 0) + 1);
    }
  });
  return sumOf("restored", "the runtime knows", counts);
}

/** The entry that libcni would have written. */
function entryOf(row: StoredAttachment): string {
  const { containerId, ifName, list, netns, cniArgs, capabilityArgs, result } = row;
  const config = Buffer.from(JSON.stringify(list)).toString("base64");
  const key = { kind: "cniCacheV1", containerId, config, ifName, networkName: list.name, netns };
  return JSON.stringify({ ...key, cniArgs: [...parseArgs(cniArgs)], capabilityArgs, result });
}
