/**
 * ADD, CHECK and STATUS over all attachments of a container.
 *
 * ADD writes the plan down under the container's lock, attaches one network after the other, and
 * commits the results. Whatever goes wrong in between is undone in reverse, the failed delegate
 * included; what cannot be undone stays in the record for DEL and `genie gc`. A process killed at
 * any instant leaves rows from which the next DEL or ADD of the container can undo everything.
 * Source: CNI SPEC 1.1 §2-§4; design D4, D6, D7, D8.
 */
import { statSync } from "node:fs";
import { CniError, code, type Host, log, oneLine, type Request, toCniError } from "./cni.ts";
import type { Config } from "./config.ts";
import {
  addChain,
  type ChainOptions,
  checkChain,
  delChain,
  statusChain,
  storedResult,
  undoOptions,
} from "./delegate.ts";
import { newOperation, type Operation, release, takeLock } from "./lock.ts";
import { mayAddDefaultRoute } from "./netconf.ts";
import { findPlugins, resolveNetwork } from "./networks.ts";
import {
  candidateNetworks,
  loadConfig,
  loadNodeSettings,
  makePlan,
  pluginSearch,
  podLabel,
} from "./plan.ts";
import { mergeResults, type Result, toVersion, withoutDefaultRoutes } from "./result.ts";
import {
  defaultRouteFamilies,
  type Family,
  parkDefaultRoutes,
  restoreDefaultRoutes,
} from "./routes.ts";
import {
  type Attachment,
  attachments,
  closeState,
  forget,
  insertPlanned,
  netnsId,
  openState,
  type State,
  type StoredAttachment,
  setAttached,
  setEnded,
  setFailing,
  write,
} from "./state.ts";

/**
 * ADD: attaches the pod to every network it asked for, or to none.
 *
 * @returns the merged result in the version of the request
 * @throws CniError: what {@link makePlan} throws; the failed delegate's own; 105 when this
 *   container has the interface already; 106 when the plan cannot be written down; 11 when another
 *   operation of this container does not end in time
 */
export async function add(host: Host, request: Request): Promise<object> {
  const config = loadConfig(request.config);
  host.log = { level: config.logLevel, file: config.logFile };
  checkNetns(request.netns);
  const deadlineMs = host.now() + config.timeoutMs;
  const { attachments: planned, pod } = await makePlan(host, config, request);
  const state = openState(host, config.stateDir);
  try {
    const operation = newOperation(host, request.containerId, "ADD");
    const chain: ChainOptions = {
      netns: request.netns,
      token: operation.token,
      deadlineMs,
      signal: host.signal,
    };
    await intend(host, state, operation, planned, chain);
    const done = await attachAll(host, state, operation, planned, config, chain);
    log(host, "debug", "attached", { pod: podLabel(pod), container: request.containerId });
    const wanted = config.result === "primary" ? done.slice(0, 1) : done;
    const merged = mergeResults(
      wanted.map(({ attachment, result }) => ({
        ifName: attachment.ifName,
        netns: request.netns,
        result,
      })),
    );
    return toVersion(merged, request.cniVersion);
  } finally {
    closeState(state);
  }
}

/**
 * Refuses a network namespace that is absent or our own: delegates check it after they acted.
 * @throws CniError 4
 */
function checkNetns(netns: string): void {
  const found = statSync(netns, { throwIfNoEntry: false });
  if (!found) {
    throw new CniError(
      code.invalidEnvironment,
      `Invalid CNI_NETNS "${oneLine(netns, 200)}": it does not exist`,
    );
  }
  const own = statSync("/proc/self/ns/net");
  if (found.dev === own.dev && found.ino === own.ino) {
    throw new CniError(
      code.invalidEnvironment,
      `Invalid CNI_NETNS "${oneLine(netns, 200)}": it is the network namespace of genie itself`,
    );
  }
}

/**
 * Takes the lock and writes the plan down, after undoing what an earlier attempt left (a killed
 * ADD, a failed DEL, a container started again after a reboot).
 */
async function intend(
  host: Host,
  state: State,
  operation: Operation,
  planned: Attachment[],
  chain: ChainOptions,
): Promise<void> {
  const stale = await takeLock(host, state, operation, chain, () => {
    const left = leftovers(host, state, planned);
    if (left.length === 0) insertPlanned(state, planned, host.now());
    return left;
  });
  if (stale.length === 0) return;
  try {
    await undoStored(host, state, stale.reverse(), undoOptions(host, chain));
    write(state, () => insertPlanned(state, planned, host.now()));
  } catch (error) {
    release(state, operation, () => undefined);
    throw error;
  }
}

/** Attachments of an earlier attempt that are in the way; a live one in the way is an error. */
function leftovers(host: Host, state: State, planned: Attachment[]): StoredAttachment[] {
  const [first] = planned;
  if (!first) return [];
  const names = new Set(planned.map(({ ifName }) => ifName));
  const found = attachments(host, state, first.containerId).filter(
    (one) => one.requestIfName === first.requestIfName || names.has(one.ifName),
  );
  const here = netnsId(first.netns);
  const live = found.find((one) => one.state === "attached" && one.netnsId === here);
  if (!live) return found;
  throw new CniError(
    code.interfaceConflict,
    `Container ${first.containerId} has interface "${live.ifName}" on network "${live.network}" ` +
      "already: DEL it before another ADD",
  );
}

/** Undoes stored attachments, or keeps them and says why the new ADD cannot go on. */
async function undoStored(
  host: Host,
  state: State,
  stale: StoredAttachment[],
  chain: ChainOptions,
): Promise<void> {
  for (const attachment of stale) {
    // The namespace it was made in may be gone; the same path may now be another one.
    const netns = attachment.netnsId === netnsId(attachment.netns) ? attachment.netns : "";
    const errors = await delChain(host, attachment, storedResult(attachment), { ...chain, netns });
    if (errors.length > 0) {
      throw new CniError(
        code.tryAgainLater,
        `Cannot undo an earlier attempt on interface "${attachment.ifName}": ${errors[0]?.message}`,
        { cause: errors[0] },
      );
    }
    write(state, () => forget(state, attachment));
  }
}

interface Done {
  attachment: Attachment;
  result: Result;
}

/** Attaches everything and commits, or undoes everything and throws. */
async function attachAll(
  host: Host,
  state: State,
  operation: Operation,
  planned: Attachment[],
  config: Config,
  chain: ChainOptions,
): Promise<Done[]> {
  const done: Done[] = [];
  const undoErrors = new Map<Attachment, CniError[]>();
  try {
    const owned = new Set<Family>();
    for (const group of attachGroups(planned, config.parallel)) {
      const results = await Promise.all(
        group.map((attachment) => attachOne(host, attachment, chain, owned)),
      );
      results.forEach((added, i) => {
        const attachment = group[i];
        if (!attachment) return;
        if (added.kind === "attached") done.push({ attachment, result: added.result });
        else undoErrors.set(attachment, added.undo);
      });
      for (const added of results) if (added.kind === "failed") throw added.error;
      for (const { result } of done) for (const f of defaultRouteFamilies(result)) owned.add(f);
    }
    if (host.signal.aborted) throw new CniError(code.tryAgainLater, "Asked to end during ADD");
    release(state, operation, () => {
      for (const { attachment, result } of done) {
        setAttached(state, attachment, toVersion(result, attachment.list.cniVersion));
      }
    });
    return done;
  } catch (error) {
    await rollBack(host, state, operation, planned, done, undoErrors, undoOptions(host, chain));
    throw error;
  }
}

/**
 * Which attachments run side by side: none (CNI SPEC §3, NPWG §7.3), unless the table says so. The
 * first always runs alone, and one that may bring a default route too.
 */
function attachGroups(planned: Attachment[], parallel: boolean): Attachment[][] {
  if (!parallel) return planned.map((attachment) => [attachment]);
  const [first, ...others] = planned;
  const routed = others.filter(({ list }) => mayAddDefaultRoute(list));
  const free = others.filter(({ list }) => !mayAddDefaultRoute(list));
  return [first ? [first] : [], ...routed.map((one) => [one]), free].filter(
    (group) => group.length > 0,
  );
}

/** One attachment, with the default route kept by its owner (design D8). */
async function attachOne(
  host: Host,
  attachment: Attachment,
  chain: ChainOptions,
  owned: ReadonlySet<Family>,
): ReturnType<typeof addChain> {
  const guarded = owned.size > 0 && mayAddDefaultRoute(attachment.list);
  if (!guarded) return addChain(host, attachment, chain);
  const parked = await parkDefaultRoutes(host, chain.netns, [...owned]);
  const added = await addChain(host, attachment, chain);
  try {
    await restoreDefaultRoutes(host, parked);
  } catch (error) {
    if (added.kind === "failed") return added;
    const undo = await delChain(host, attachment, added.result, undoOptions(host, chain));
    return { kind: "failed", error: toCniError(error), undo };
  }
  if (added.kind === "failed") return added;
  // What the record and the merged result say is what the kernel has.
  return { kind: "attached", result: withoutDefaultRoutes(added.result, owned) };
}

/** Undoes in reverse what was attached; forgets what is gone, keeps what could not be undone. */
async function rollBack(
  host: Host,
  state: State,
  operation: Operation,
  planned: Attachment[],
  done: Done[],
  undoErrors: Map<Attachment, CniError[]>,
  chain: ChainOptions,
): Promise<void> {
  for (const { attachment, result } of done.toReversed()) {
    undoErrors.set(attachment, await delChain(host, attachment, result, chain));
  }
  const kept = planned.filter((attachment) => (undoErrors.get(attachment) ?? []).length > 0);
  for (const attachment of kept) {
    log(host, "error", "Cannot undo a failed ADD: kept for DEL and genie gc", {
      container: attachment.containerId,
      network: attachment.network,
      interface: attachment.ifName,
      error: undoErrors.get(attachment)?.[0]?.message,
    });
  }
  try {
    release(state, operation, () => {
      for (const attachment of planned) {
        const error = undoErrors.get(attachment)?.[0];
        if (!error) forget(state, attachment);
        else
          setFailing(state, attachment, {
            state: "failing",
            error: error.message,
            nowMs: host.now(),
          });
      }
      const [first] = planned;
      if (first && kept.length === 0) setEnded(state, first, host.now());
    });
  } catch (error) {
    // The rows stay as planned, and the lock names a process that is about to end: DEL undoes them
    // again, which costs a call and harms nothing.
    log(host, "error", toCniError(error).message, { container: operation.containerId });
  }
}

/**
 * CHECK: every attachment is still as ADD left it, says each delegate.
 *
 * @throws CniError of the first delegate that says no; 3 when there is no record of the container
 */
export async function check(host: Host, request: Request): Promise<undefined> {
  const settings = loadNodeSettings(host, request.config);
  if (request.config["disableCheck"] === true) return undefined;
  const state = openState(host, settings.stateDir);
  try {
    const found = attachments(host, state, request.containerId).filter(
      (one) => one.requestIfName === request.ifName,
    );
    if (found.length === 0) {
      throw new CniError(
        code.unknownContainer,
        `Cannot check container ${request.containerId}: no attachment for ${request.ifName} is on record`,
      );
    }
    const options: ChainOptions = {
      netns: request.netns,
      token: newOperation(host, request.containerId, "CHECK").token,
      deadlineMs: host.now() + checkTimeoutMs,
      signal: host.signal,
    };
    for (const attachment of found) {
      if (attachment.state !== "attached") {
        throw new CniError(
          code.tryAgainLater,
          `Cannot check network "${attachment.network}": it is ${attachment.state}`,
        );
      }
      await checkChain(host, attachment, storedResult(attachment), options);
    }
    return undefined;
  } finally {
    closeState(state);
  }
}

const checkTimeoutMs = 60_000;
/** STATUS is polled every few seconds, so a delegate that hangs must not hold it for long. */
const statusTimeoutMs = 5_000;

/**
 * STATUS: could an ADD of a pod that asks for nothing work now?
 *
 * @throws CniError 50 when not, or the code of the delegate that says no
 * @see CNI SPEC 1.1 §2 "STATUS"
 */
export async function status(host: Host, request: Request): Promise<undefined> {
  try {
    const config = loadConfig(request.config);
    host.log = { level: config.logLevel, file: config.logFile };
    const search = pluginSearch(config, request);
    const names = config.default.networks.map((text) => text.replace(/@.*/, ""));
    const needed = names.length > 0 ? names : candidateNetworks(config, search);
    if (needed.length === 0) throw new CniError(code.unavailable, "No network is configured");
    for (const name of new Set([...needed, ...config.default.always])) {
      const network = resolveNetwork(config, name.replace(/@.*/, ""));
      await statusChain(
        host,
        {
          network: network.name,
          list: network.list,
          plugins: findPlugins(network, search),
          cniPath: search.dirs.join(":"),
          timeoutMs: statusTimeoutMs,
        },
        {
          netns: "",
          token: "status",
          deadlineMs: host.now() + statusTimeoutMs,
          signal: host.signal,
        },
      );
    }
  } catch (error) {
    const { code: number, message, details } = toCniError(error);
    const known = number === code.unavailable || number === code.unavailableLimited;
    throw new CniError(known ? number : code.unavailable, message, { details, cause: error });
  }
  return undefined;
}
