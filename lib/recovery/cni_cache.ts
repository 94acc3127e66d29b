/**
 * libcni's cache: of each attachment that a runtime made, a file with its network, config,
 * arguments and result. By it genie knows what was attached before it came (design D14). Files of
 * the cache are hostile until parsed. Source: `cachedInfo` and `getCacheFilePath` in libcni/api.go.
 */
import {
  closeSync,
  constants,
  fstatSync,
  openSync,
  readdirSync,
  readSync,
  rmSync,
  statSync,
} from "node:fs";
import { dirname, isAbsolute, join } from "node:path";
import { delegatesToOurself, findPlugin, type PluginSearch, pluginSearch } from "../binaries.ts";
import type { Host, Request } from "../call.ts";
import { CniError, code, interfaceNameIssue, isNetworkName, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type State, write } from "../database.ts";
import { isObject, parseJson } from "../json.ts";
import { isForeignNetns, netnsId } from "../kernel.ts";
import {
  declaresCapability,
  finishList,
  type NetworkConfigList,
  parseConfigList,
} from "../networks.ts";
import { findListOnDisk } from "../node_networks.ts";
import { delegateArgs } from "../pod.ts";
import type { Attachment, Result, StoredAttachment } from "../record.ts";
import { podIdentity } from "../request.ts";
import { parseResult, toVersion } from "../result.ts";
import { attachedSql, insertPlanned } from "../write_ahead.ts";
import { networkName } from "./network_name.ts";
import { orElse, orUndefined } from "./tried.ts";

/** Where libcni keeps it, unless a runtime says otherwise: containerd, CRI-O and podman do not. */
export const cacheDir = "/var/lib/cni/results";
/** Largest entry, in bytes: a config, a result and 256 KiB of annotations fit. */
const bytesMax = 4 * 1024 * 1024;

/** What an entry says of one attachment. */
export interface CachedAttachment {
  containerId: string;
  ifName: string;
  /** Path of its network namespace; "" where neither libcni (before 1.3) nor its result says it. */
  netns: string;
  list: NetworkConfigList;
  /** CNI_ARGS as the runtime gave them; undefined where libcni did not note them. */
  cniArgs: string | undefined;
  capabilityArgs: Record<string, unknown>;
  /** Undefined where it cannot be read. */
  result: Result | undefined;
}

/** What reading an entry takes besides its file. */
export interface CacheReader {
  /** Folder of the cache. */
  dir: string;
  config: Config;
  search: PluginSearch;
  /** The call that the entry must be of; entries of old libcni, a bare result, are read only so. */
  of?: Pick<CachedAttachment, "containerId" | "ifName">;
}

/** Name of the file of an attachment. */
export function cacheName(list: { name: string }, { containerId, ifName }: CacheKey): string {
  return `${list.name}-${containerId}-${ifName}`;
}

type CacheKey = Pick<CachedAttachment, "containerId" | "ifName">;

/**
 * Reads one entry. @returns undefined where it is of genie itself, or of the loopback interface,
 *   which runtimes attach and delete on their own
 * @throws CniError 5, 6 or 7 for one that cannot be used
 */
export function readCached(reader: CacheReader, file: string): CachedAttachment | undefined {
  const { dir, config, search, of } = reader;
  const value = parseJson(readBounded(join(dir, file), file), `libcni's ${file}`);
  const isBare = isObject(value) && value["kind"] === undefined && value["cniVersion"];
  const read = of && isBare ? readBare(config, value, file, of) : readEntry(config, value, file);
  if (of && read.containerId !== of.containerId) throw unusable(file, "another container is in it");
  const { list } = read;
  const isOwn = delegatesToOurself({ name: list.name, list, source: file }, search);
  return isOwn || list.plugins.every(({ type }) => type === "loopback") ? undefined : read;
}

function readEntry(config: Config, value: unknown, file: string): CachedAttachment {
  if (!isObject(value) || value["kind"] !== "cniCacheV1") {
    throw unusable(file, 'it is not of kind "cniCacheV1"');
  }
  const { networkName: name, containerId, ifName, netns = "", config: base64 } = value;
  const { cniArgs, capabilityArgs } = value;
  const isKey = isNetworkName(name) && isNetworkName(containerId) && typeof ifName === "string";
  if (
    !isKey ||
    interfaceNameIssue(ifName) ||
    cacheName({ name }, { containerId, ifName }) !== file
  ) {
    throw unusable(file, "network, container and interface in it are not those of its name");
  }
  const isPath = (path: unknown): path is string => typeof path === "string" && isAbsolute(path);
  if (netns !== "" && !isPath(netns)) throw unusable(file, '"netns" is not a path');
  if (typeof base64 !== "string") throw unusable(file, "it has no config");
  const text = decode(Buffer.from(base64, "base64"), file);
  const what = `of libcni's ${file}`;
  const list = finishList(parseConfigList(parseJson(text, what), what), config.confDir, what);
  if (list.name !== name) throw unusable(file, "its config is of another network");
  const result = readResult(value["result"], list);
  const sandbox = result?.interfaces.find((one) => one.name === ifName && isPath(one.sandbox));
  return {
    containerId,
    ifName,
    netns: netns || (sandbox?.sandbox ?? ""),
    list,
    cniArgs: cniArgs === undefined ? undefined : joinArgs(cniArgs, file),
    capabilityArgs: isObject(capabilityArgs) ? capabilityArgs : {},
    result,
  };
}

/** The result alone, as libcni before 0.8 wrote it; the config is today's list of that name. */
function readBare(config: Config, value: unknown, file: string, of: CacheKey): CachedAttachment {
  const name = file.slice(0, -cacheName({ name: "" }, of).length);
  const found = findListOnDisk(config, name);
  if (!found) throw unusable(file, `there is no network "${name}" any more`);
  const { list } = found;
  const result = readResult(value, list);
  return { ...of, netns: "", list, cniArgs: undefined, capabilityArgs: {}, result };
}

function joinArgs(pairs: unknown, file: string): string {
  const isText = (one: unknown) => typeof one === "string" && !/[;\0]/.test(one);
  const isPair = (pair: unknown) => Array.isArray(pair) && pair.length === 2 && pair.every(isText);
  if (!Array.isArray(pairs) || !pairs.every(isPair)) throw unusable(file, '"cniArgs" is no list');
  return pairs.map(([key, value]) => `${key}=${value}`).join(";");
}

function readResult(value: unknown, list: NetworkConfigList): Result | undefined {
  if (value === undefined) return undefined;
  // As in libcni, the DEL of one that is damaged goes without a prevResult.
  return orUndefined(() => parseResult(value, list.cniVersion));
}

/** A file that the folder's owner alone may write, no link, not large. @throws CniError 5 or 6 */
function readBounded(path: string, file: string): string {
  let fd: number;
  try {
    fd = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  } catch (error) {
    const { code: reason = String(error) } = error as NodeJS.ErrnoException;
    throw unusable(file, reason === "ELOOP" ? "it is a symbolic link" : reason, code.ioFailure);
  }
  try {
    const { size, mode, uid } = fstatSync(fd);
    if ((mode & constants.S_IFMT) !== constants.S_IFREG || size > bytesMax) {
      throw unusable(file, `it is no regular file of at most ${bytesMax} bytes`, code.ioFailure);
    }
    if (uid !== statSync(dirname(path)).uid || (mode & 0o022) !== 0) {
      throw unusable(file, "others may write it", code.ioFailure);
    }
    const bytes = Buffer.alloc(size);
    return decode(bytes.subarray(0, readSync(fd, bytes)), file);
  } finally {
    closeSync(fd);
  }
}

function decode(bytes: Uint8Array, file: string): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    throw unusable(file, `it is not UTF-8 (${toCniError(error).message})`, code.decodingFailure);
  }
}

function unusable(file: string, why: string, number: number = code.invalidConfig): CniError {
  return new CniError(number, `Cannot use ${JSON.stringify(file)} of libcni's cache: ${why}`);
}

/** The attachment that an entry is of, as if genie had made it. */
export function toStored(
  entry: CachedAttachment,
  of: Pick<
    Attachment,
    "network" | "plugins" | "cniPath" | "requestNetwork" | "timeoutMs" | "netns" | "cniArgs"
  >,
  made: Pick<StoredAttachment, "createdAtMs" | "netnsId">,
): StoredAttachment {
  const { containerId, ifName, list, capabilityArgs, result } = entry;
  const declared = Object.entries(capabilityArgs).filter(([key]) => declaresCapability(list, key));
  return {
    containerId,
    requestIfName: ifName,
    ifName,
    primary: true,
    reason: "attached before genie was there",
    list,
    capabilityArgs: Object.fromEntries(declared),
    args: {},
    pod: podIdentity(of.cniArgs),
    isCached: true,
    ...of,
    ...made,
    state: "attached",
    result: result && toVersion(result, list.cniVersion),
    failedAtMs: 0,
    error: "",
  };
}

/** Writes attachments down that were made without genie. Call inside a transaction. */
export function insertAttached(state: State, rows: readonly StoredAttachment[]): void {
  for (const row of rows) {
    const { state: _, result, failedAtMs: _f, error: _e, createdAtMs, netnsId: id, ...plan } = row;
    const { containerId, ifName } = row;
    insertPlanned(state, [plan], createdAtMs);
    state.database.query(attachedSql).run(JSON.stringify(result) ?? null, containerId, ifName);
    // Its path may be another one here than on the node.
    state.database
      .query("UPDATE attachments SET netns_id = ? WHERE container_id = ? AND ifname = ?")
      .run(id, containerId, ifName);
  }
}

/** Removes the entry of an attachment whose DEL has succeeded, if it is there. */
export function removeCached({ list, containerId, ifName }: Attachment): void {
  const file = cacheName(list, { containerId, ifName });
  if (!file.includes("/")) rmSync(join(cacheDir, file), { force: true });
}

/**
 * What the cache says of a call that is not on record. What cannot be used is reported.
 * @param ifName the interface; the entry is of the call's container
 */
export function cachedOf(
  host: Host,
  request: Request,
  config: Config,
  ifName: string,
): StoredAttachment[] {
  const { containerId } = request;
  const search = pluginSearch(config, request);
  const reader = { dir: cacheDir, config, search, of: { containerId, ifName } };
  const rows: StoredAttachment[] = [];
  const end = cacheName({ name: "" }, reader.of);
  for (const file of orElse([], () => readdirSync(cacheDir))) {
    if (!file.endsWith(end)) continue;
    try {
      const entry = readCached(reader, file);
      if (!entry) continue;
      const { dirs } = search;
      const place = ({ type }: { type: string }) => findPlugin(type, dirs) ?? `/${type}`;
      const of = {
        plugins: entry.list.plugins.map(place),
        cniPath: dirs.join(":"),
        requestNetwork: request.config.name,
        network: networkName(config, entry.list.name),
        timeoutMs: config.timeoutMs,
        netns: request.netns,
        cniArgs: entry.cniArgs ?? delegateArgs(request.args, true),
      };
      // A DEL must not enter what is no network namespace of a container.
      const id = isForeignNetns(request.netns) ? netnsId(request.netns) : "";
      const capabilityArgs = { ...request.config.runtimeConfig, ...entry.capabilityArgs };
      rows.push(
        toStored({ ...entry, capabilityArgs }, of, { createdAtMs: host.now(), netnsId: id }),
      );
    } catch (error) {
      log(host, "warn", toCniError(error).message);
    }
  }
  return rows;
}

/** Puts attachments on record of which the cache alone knows, so that their DEL may be retried. */
export function putOnRecord(host: Host, state: State, rows: readonly StoredAttachment[]): void {
  if (rows.length === 0 || state.copyDir !== "") return;
  try {
    write(state, () => insertAttached(state, rows));
  } catch (error) {
    log(host, "error", toCniError(error).message);
  }
}
