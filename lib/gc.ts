/**
 * GC, from the runtime's list and the record; and the addresses that host-local keeps for nobody.
 * Source: CNI SPEC 1.1 §2 "GC"; facts 19-21.
 */
import { delegatesToOurself, findPlugin, pluginSearch } from "./binaries.ts";
import type { Chain, Host, Request } from "./call.ts";
import { CniError, code, compareVersions, log, toCniError } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import { closeState, openState, type State, write } from "./database.ts";
import { callPlugin, noter } from "./delegate.ts";
import { isObject } from "./json.ts";
import { openJournal, withAudit, writeAlone, writeAside, writeJournal } from "./ledger.ts";
import { everyContainer, newOperation, release, takeLock } from "./lock.ts";
import type { NetworkConfigList, PluginConfig } from "./networks.ts";
import { listNetworks } from "./node_networks.ts";
import type { Journal, Operation, Recorded, StoredAttachment } from "./record.ts";
import {
  attachments,
  type DelOutcome,
  delegateTimeoutMs,
  forget,
  forgetTraffic,
  hasRuleset,
  noteInterrupted,
  outcomeOf,
  pruneLedger,
  recorded,
  setFailing,
  undo,
} from "./recorded.ts";
import { loadConfig, loadNodeSettings, type NodeSettings } from "./settings.ts";
import { type NetworkCall, withoutAttachment } from "./status.ts";

const gcTimeoutMs = 120_000;

/** One GC, under the lock of every container. */
interface Collection {
  request: Request;
  settings: NodeSettings;
  /** Keys of the calls that the runtime lists as valid. */
  valid: ReadonlySet<string>;
  state: State;
  operation: Operation;
  chain: Chain & { journal: Journal };
  found: Recorded;
  /** Filled by every step. */
  errors: CniError[];
}

/**
 * GC: deletes the attachments of this config that the runtime does not list any more, then has each
 * network's plugins collect theirs, by the interface names we gave them. A list that is absent
 * deletes nothing; an empty one everything. Goes on after errors.
 *
 * @throws CniError of the first failure, the others in `details`; 11 when ADDs do not end in time
 */
export async function gc(host: Host, request: Request): Promise<undefined> {
  const settings = await loadNodeSettings(host, request.config);
  const valid = validCalls(request);
  const { disableGC, delOnly } = request.config;
  if (!valid || disableGC === true || delOnly === true) return undefined;
  const journal = openJournal(host, request);
  const state = await openState(host, settings.stateDir);
  try {
    const operation = newOperation(host, everyContainer, "GC");
    const chain = {
      host,
      netns: "",
      token: operation.token,
      deadlineMs: host.now() + gcTimeoutMs,
      signal: host.signal,
      journal,
    };
    const found = await takeLock({ ...chain, state, operation }, () => recorded(host, state)).catch(
      (error: unknown) => {
        writeAlone(host, state, journal, error);
        throw error;
      },
    );
    const errors: CniError[] = [];
    const collection = { request, settings, valid, state, operation, chain, found, errors };
    for (const step of [collectStale, releaseAddresses, giveLockBack]) {
      await step(collection).catch((error: unknown) => errors.push(toCniError(error)));
    }
    const [first, ...others] = errors;
    if (!first) return undefined;
    throw new CniError(first.code, first.message, {
      details: [first.details, ...others.map(({ message }) => message)].join("\n").trim(),
      cause: first,
    });
  } finally {
    closeState(state);
  }
}

/** Key of a call in the runtime's list. */
function callKey(containerId: string, ifName: string): string {
  return `${containerId} ${ifName}`;
}

/** Keys of the runtime's list, which has a current and an old name; undefined without one. */
function validCalls(request: Request): Set<string> | undefined {
  const list = request.config["cni.dev/valid-attachments"] ?? request.config["cni.dev/attachments"];
  if (list === undefined || list === null) return undefined;
  const refuse = (what: string) =>
    new CniError(code.invalidConfig, `Invalid network config: ${what}`);
  if (!Array.isArray(list)) throw refuse('"cni.dev/valid-attachments" is not a list');
  const keys = list.map((one) => {
    const { containerID, ifname } = isObject(one) ? one : {};
    if (typeof containerID === "string" && typeof ifname === "string") {
      return callKey(containerID, ifname);
    }
    throw refuse('an entry of "cni.dev/valid-attachments" is incomplete');
  });
  return new Set(keys);
}

/** Deletes what came through this config and is not valid any more; then asks the networks. */
async function collectStale(collection: Collection): Promise<void> {
  const { request, settings, valid, state, chain, found, errors } = collection;
  const stale = found.readable.filter(
    (row) =>
      row.requestNetwork === request.config.name &&
      !valid.has(callKey(row.containerId, row.requestIfName)),
  );
  const options = { path: request.path, chain, windowMs: settings.delRetryWindowMs };
  for (const row of stale.reverse()) {
    errors.push(...(await collectAttachment(state, row, options)).errors);
  }
  if (isComplete(collection)) await collectNetworks(collection);
}

async function giveLockBack(collection: Collection): Promise<void> {
  const { settings, state, operation, chain, errors } = collection;
  const { host, journal } = chain;
  withAudit(host, (isAudited) =>
    release(state, operation, () => {
      if (!isAudited) return;
      writeJournal(host, state, journal, errors[0]);
      const prune = () => pruneLedger(state, host.now(), settings.auditKeepMs);
      writeAside(host, state, "the ledger", prune);
    }),
  );
}

/**
 * Does the record know every attachment that the runtime lists? When it was lost, or the pods are
 * older than genie, it does not: networks would be told that live addresses are free.
 */
function isComplete({ chain, found, valid }: Collection): boolean {
  const known = new Set(found.readable.map((row) => callKey(row.containerId, row.requestIfName)));
  const unknown = [...valid].filter((call) => !known.has(call));
  const damaged = found.damaged.length;
  if (unknown.length === 0 && damaged === 0) return true;
  const msg = "Networks collect no garbage: the record does not know all attachments";
  log(chain.host, "warn", msg, { unknown: unknown.length, damaged, first: unknown[0] });
  return false;
}

/**
 * Forwards GC to the plugins of our networks, with each network's own attachments. Ours are those
 * in the plugin table and those on record: any other list in the conf dir may serve another
 * runtime, whose attachments genie does not know (cni#1098).
 */
async function collectNetworks({ request, state, chain, found, errors }: Collection) {
  const ours = new Set(found.readable.map(({ list }) => list.name));
  const config = await loadConfig(request.config);
  const search = pluginSearch(config, request);
  const kept = attachments(chain.host, state).filter((row) => row.state === "attached");
  for (const network of listNetworks(config).networks) {
    const { name, list, entry } = network;
    if (!entry && !ours.has(list.name)) continue;
    if (delegatesToOurself(network, search)) continue;
    const valid = kept
      .filter((row) => row.list.name === list.name)
      .map((row) => ({ containerID: row.containerId, ifname: row.ifName }));
    const plugins = list.plugins.map(({ type }) => findPlugin(type, search.dirs) ?? `/${type}`);
    const cniPath = search.dirs.join(":");
    const call = { network: name, list, plugins, cniPath, timeoutMs: delegateTimeoutMs };
    errors.push(...(await gcChain(chain, call, valid)));
  }
}

/**
 * Runs GC on the plugins of a network. Goes on after a failure.
 * @param valid the network's own attachments, by the names we gave its delegates
 * @returns the errors
 * @see CNI SPEC 1.1 §2 "GC"; the second key is what libcni sends for older plugins
 */
export async function gcChain(
  chain: Chain,
  network: NetworkCall,
  valid: { containerID: string; ifname: string }[],
): Promise<CniError[]> {
  const { list } = network;
  if (list.disableGC || compareVersions(list.cniVersion, "1.1.0") < 0) return [];
  const reserved = { "cni.dev/valid-attachments": valid, "cni.dev/attachments": valid };
  const attachment = withoutAttachment(network);
  const note = noter(chain, attachment, "GC");
  const errors: CniError[] = [];
  for (const index of list.plugins.keys()) {
    try {
      await callPlugin(chain, attachment, { command: "GC", index, reserved });
    } catch (error) {
      errors.push(toCniError(error));
    }
  }
  note(errors[0]);
  return errors;
}

/** Containers of which anything is on record. */
export function containersOf({ readable, damaged }: Recorded): Set<string> {
  return new Set([...readable, ...damaged].map(({ containerId }) => containerId));
}

/** The lists of our networks, on record and of the plugin table: see {@link collectNetworks}. */
export function listsOf(
  rows: readonly StoredAttachment[],
  config: Config | undefined,
): NetworkConfigList[] {
  const table = config ? listNetworks(config).networks.filter(({ entry }) => entry) : [];
  const all = [...rows, ...table].map(({ list }) => list).filter(({ disableGC }) => !disableGC);
  return [...new Map(all.map((list) => [JSON.stringify(list), list])).values()];
}

/**
 * DEL of one attachment, and of its record what the outcome says. Call under its container's lock,
 * or everybody's.
 * @param options `path` has further folders to look for its binaries in
 */
export async function collectAttachment(
  state: State,
  row: StoredAttachment,
  options: { path: string[]; chain: Chain; windowMs: number },
): Promise<{ outcome: DelOutcome; errors: CniError[] }> {
  const { path, chain, windowMs } = options;
  const { host } = chain;
  noteInterrupted(chain.journal, row);
  const isOther = ({ ifName, parkedAs }: StoredAttachment) =>
    ifName !== row.ifName || parkedAs !== row.parkedAs;
  const others = attachments(host, state, row.containerId).filter(isOther);
  const errors = await undo({ ...chain, netns: row.netns }, row, path, others);
  const nowMs = host.now();
  const outcome = outcomeOf(row, errors, windowMs, nowMs);
  try {
    write(state, () => {
      if (outcome === "gone") {
        forget(state, row);
        return writeAside(host, state, "traffic", () => forgetTraffic(state, row.containerId));
      }
      const error = errors.map(({ message }) => message).join("; ");
      return setFailing(state, row, { state: outcome, error, nowMs });
    });
    if (outcome === "gone" && hasRuleset(state, row.netnsId)) {
      const { liftRuleset } = await import("./policy/rulesets.ts");
      await liftRuleset(host, state, row, row);
    }
  } catch (error) {
    errors.push(toCniError(error));
  }
  return { outcome, errors };
}

/** Releases the reservations of our networks that nobody has: host-local before 1.3 has no GC. */
async function releaseAddresses({ request, valid, state, chain, found, errors }: Collection) {
  const { host } = chain;
  let lists = listsOf(found.readable, undefined);
  try {
    lists = listsOf(found.readable, await loadConfig(request.config));
  } catch (error) {
    log(host, "debug", toCniError(error).message);
  }
  const reserves = ({ ipam }: PluginConfig) => isObject(ipam) && ipam["type"] === "host-local";
  if (!lists.some(({ plugins }) => plugins.some(reserves))) return;
  const listed = [...valid].map((call) => call.replace(/ .*/, ""));
  const known = new Set([...listed, ...containersOf(recorded(host, state))]);
  const { releaseUnowned } = await import("./recovery/reservations.ts");
  errors.push(...(await releaseUnowned(chain, lists, known)));
}
