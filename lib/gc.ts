/**
 * GC, from the runtime's list and the record. Source: CNI SPEC 1.1 §2 GC; facts 19-21.
 */
import { CniError, code, type Host, log, type Request, toCniError } from "./cni.ts";
import { collectAttachment, listsOf, releaseStray } from "./collect.ts";
import { closeState, openState, type State } from "./database.ts";
import { type ChainOptions, gcChain, type ValidAttachment } from "./delegate.ts";
import { isObject } from "./json.ts";
import {
  openJournal,
  pruneLedger,
  withAudit,
  writeAlone,
  writeAside,
  writeJournal,
} from "./ledger.ts";
import { everyContainer, newOperation, release, takeLock } from "./lock.ts";
import type { NetworkConfigList } from "./netconf.ts";
import { delegatesToOurself, findPlugin, listNetworks, pluginSearch } from "./networks.ts";
import { loadConfig, loadNodeSettings } from "./settings.ts";
import { attachments, type Recorded, recorded, type StoredAttachment } from "./state.ts";
import { delegateTimeoutMs } from "./undo.ts";

/** Limit for a whole GC, in ms. */
const gcTimeoutMs = 120_000;

/**
 * GC: deletes the attachments of this config that the runtime does not list any more, then has each
 * network's plugins collect theirs, by the interface names we gave them. A list that is absent
 * deletes nothing; an empty one everything. Goes on after errors and returns them all.
 *
 * @throws CniError of the first failure, the others in `details`; 11 when ADDs do not end in time
 */
export async function gc(host: Host, request: Request): Promise<undefined> {
  const settings = await loadNodeSettings(host, request.config);
  const valid = validCalls(request);
  const { disableGC, delOnly } = request.config;
  if (!valid || disableGC === true || delOnly === true) return undefined;
  const journal = openJournal(host, request);
  const state = openState(host, settings.stateDir);
  try {
    const operation = newOperation(host, everyContainer, "GC");
    const chain: ChainOptions = {
      netns: "",
      token: operation.token,
      deadlineMs: host.now() + gcTimeoutMs,
      signal: host.signal,
      journal,
    };
    const found = await takeLock(host, state, operation, chain, () => recorded(host, state)).catch(
      (error: unknown) => {
        writeAlone(host, state, journal, error);
        throw error;
      },
    );
    const errors: CniError[] = [];
    try {
      for (const row of staleRows(request, found.readable, valid).reverse()) {
        const windowMs = settings.delRetryWindowMs;
        const options = { path: request.path, chain, windowMs };
        errors.push(...(await collectAttachment(host, state, row, options)).errors);
      }
      if (isComplete(host, found, valid)) {
        const ours = new Set(found.readable.map(({ list }) => list.name));
        errors.push(...(await collectNetworks(host, state, request, ours, chain)));
      }
    } catch (error) {
      errors.push(toCniError(error));
    }
    try {
      const lists = await ownLists(host, found.readable, request.config);
      const known = new Set([...valid].map((call) => call.replace(/ .*/, "")));
      errors.push(...(await releaseStray(host, state, lists, known, chain.deadlineMs)));
    } catch (error) {
      errors.push(toCniError(error));
    }
    try {
      withAudit(host, (isAudited) =>
        release(state, operation, () => {
          if (!isAudited) return;
          writeJournal(host, state, journal, errors[0]);
          const prune = () => pruneLedger(state, host.now(), settings.auditKeepMs);
          writeAside(host, state, "the ledger", prune);
        }),
      );
    } catch (error) {
      errors.push(toCniError(error));
    }
    const [first, ...others] = errors;
    if (first) {
      throw new CniError(first.code, first.message, {
        details: [first.details, ...others.map(({ message }) => message)].join("\n").trim(),
        cause: first,
      });
    }
    return undefined;
  } finally {
    closeState(state);
  }
}

/** Lists of our networks: those on record alone where the plugin table cannot be used. */
async function ownLists(
  host: Host,
  rows: readonly StoredAttachment[],
  config: Request["config"],
): Promise<NetworkConfigList[]> {
  try {
    return listsOf(rows, await loadConfig(config));
  } catch (error) {
    log(host, "debug", toCniError(error).message);
    return listsOf(rows, undefined);
  }
}

/** Key of a call in the runtime's list. */
function callKey(containerId: string, ifName: string): string {
  return `${containerId} ${ifName}`;
}

/** The runtime's list of valid attachments, under its current or its old key; undefined: absent. */
function validCalls(request: Request): Set<string> | undefined {
  const list = request.config["cni.dev/valid-attachments"] ?? request.config["cni.dev/attachments"];
  if (list === undefined || list === null) return undefined;
  if (!Array.isArray(list)) {
    throw new CniError(
      code.invalidConfig,
      'Invalid network config: "cni.dev/valid-attachments" is not a list',
    );
  }
  return new Set(
    list.map((one) => {
      if (
        !isObject(one) ||
        typeof one["containerID"] !== "string" ||
        typeof one["ifname"] !== "string"
      ) {
        throw new CniError(
          code.invalidConfig,
          'Invalid network config: an entry of "cni.dev/valid-attachments" is incomplete',
        );
      }
      return callKey(one["containerID"], one["ifname"]);
    }),
  );
}

/** What came through this config and is not valid any more. */
function staleRows(
  request: Request,
  rows: StoredAttachment[],
  valid: ReadonlySet<string>,
): StoredAttachment[] {
  return rows.filter(
    (row) =>
      row.requestNetwork === request.config.name &&
      !valid.has(callKey(row.containerId, row.requestIfName)),
  );
}

/**
 * Does the record know every attachment that the runtime lists? When it was lost, or the pods are
 * older than genie, it does not: networks would be told that live addresses are free.
 */
function isComplete(host: Host, found: Recorded, valid: ReadonlySet<string>): boolean {
  const known = new Set(found.readable.map((row) => callKey(row.containerId, row.requestIfName)));
  const unknown = [...valid].filter((call) => !known.has(call));
  if (unknown.length === 0 && found.damaged.length === 0) return true;
  log(host, "warn", "Networks collect no garbage: the record does not know all attachments", {
    unknown: unknown.length,
    damaged: found.damaged.length,
    first: unknown[0],
  });
  return false;
}

/**
 * Forwards GC to the plugins of our networks, with each network's own attachments. Ours are those
 * in the plugin table and those on record: any other list in the conf dir may serve another
 * runtime, whose attachments nobody here knows (cni#1098).
 */
async function collectNetworks(
  host: Host,
  state: State,
  request: Request,
  ours: ReadonlySet<string>,
  chain: ChainOptions,
): Promise<CniError[]> {
  const errors: CniError[] = [];
  const config = await loadConfig(request.config);
  const search = pluginSearch(config, request);
  const kept = attachments(host, state).filter((row) => row.state === "attached");
  for (const network of listNetworks(config).networks) {
    const { name, list, entry } = network;
    if (!entry && !ours.has(list.name)) continue;
    if (delegatesToOurself(network, search)) continue;
    const valid = kept
      .filter((row) => row.list.name === list.name)
      .map((row): ValidAttachment => ({ containerID: row.containerId, ifname: row.ifName }));
    const plugins = list.plugins.map(({ type }) => findPlugin(type, search.dirs) ?? `/${type}`);
    const cniPath = search.dirs.join(":");
    errors.push(
      ...(await gcChain(
        host,
        { network: name, list, plugins, cniPath, timeoutMs: delegateTimeoutMs },
        valid,
        chain,
      )),
    );
  }
  return errors;
}
