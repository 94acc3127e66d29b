/**
 * DEL and GC: both work from the record alone.
 *
 * DEL always ends (design D5): what is gone already is success; a delegate that fails keeps its
 * record and fails the DEL, so that the runtime retries; after the retry window the attachment is
 * parked as leaked, DEL succeeds, and `genie gc` goes on. A delegate whose binary is gone is parked
 * at once: no retry brings it back.
 * Source: CNI SPEC 1.1 §2 DEL, GC; design D4, D5; pitfalls 9-11, 19-21.
 */
import { existsSync } from "node:fs";
import { basename } from "node:path";
import { CniError, code, type Host, isObject, log, type Request, toCniError } from "./cni.ts";
import {
  type ChainOptions,
  delChain,
  gcChain,
  storedResult,
  type ValidAttachment,
} from "./delegate.ts";
import {
  endProcess,
  everyContainer,
  newOperation,
  type Operation,
  release,
  takeLock,
} from "./lock.ts";
import { findPlugin, listNetworks } from "./networks.ts";
import { loadConfig, loadNodeSettings, makePlan, type NodeSettings, pluginSearch } from "./plan.ts";
import { annotationsCapability } from "./pod.ts";
import { parseResult, type Result } from "./result.ts";
import {
  type Attachment,
  attachments,
  closeState,
  forget,
  hasEnded,
  netnsId,
  openState,
  type State,
  type StoredAttachment,
  setEnded,
  setFailing,
  write,
} from "./state.ts";

/** Limit for one delegate call of DEL, in ms: runtimes give a whole DEL a minute. */
const delegateTimeoutMs = 25_000;
/** Limit for a whole DEL, in ms. */
const delTimeoutMs = 55_000;
/** How long an ADD that is asked to end may take to roll back before it is killed, in ms. */
const addEndMs = 35_000;
const gcTimeoutMs = 120_000;

/**
 * DEL: undoes every attachment of this container and CNI_IFNAME that is on record.
 *
 * @throws CniError of the delegate that failed, inside the retry window; 11 when another operation
 *   of this container does not end in time
 */
export async function del(host: Host, request: Request): Promise<undefined> {
  const settings = loadNodeSettings(host, request.config);
  const state = openOrReport(host, settings);
  if (!state) {
    await deleteByGuess(host, request);
    return undefined;
  }
  try {
    await deleteRecorded(host, request, settings, state);
  } finally {
    closeState(state);
  }
  return undefined;
}

/** DEL must not depend on the record: without it, it does what it can. */
function openOrReport(host: Host, settings: NodeSettings): State | undefined {
  try {
    return openState(host, settings.stateDir);
  } catch (error) {
    log(host, "error", toCniError(error).message, { dir: settings.stateDir });
    return undefined;
  }
}

async function deleteRecorded(
  host: Host,
  request: Request,
  settings: NodeSettings,
  state: State,
): Promise<void> {
  const operation = newOperation(host, request.containerId, "DEL");
  const startedMs = host.now();
  const chain: ChainOptions = {
    netns: request.netns,
    token: operation.token,
    deadlineMs: startedMs + delTimeoutMs,
    signal: host.signal,
  };
  const call = { containerId: request.containerId, requestIfName: request.ifName };
  const asked = new Set<string>();
  const found = await takeLock(
    host,
    state,
    operation,
    chain,
    () => ({
      rows: attachments(host, state, request.containerId).filter(
        (one) => one.requestIfName === request.ifName,
      ),
      ended: hasEnded(state, call),
    }),
    (holder) => endAdd(holder, asked, host.now() - startedMs),
  );
  const outcomes = new Map<StoredAttachment, CniError[]>();
  try {
    for (const attachment of found.rows.toReversed()) {
      outcomes.set(attachment, await delStored(host, attachment, request, chain));
    }
    if (found.rows.length === 0 && !found.ended) await deleteByGuess(host, request);
  } finally {
    settle(host, state, operation, outcomes, settings, call);
  }
  failIfRetryWanted(host, outcomes, settings);
}

/** Asks an ADD that holds our container's lock to roll back, once; then ends it. */
function endAdd(holder: Operation, asked: Set<string>, waitedMs: number): void {
  if (holder.command !== "ADD") return;
  if (waitedMs > addEndMs) endProcess(holder.pid, "SIGKILL");
  else if (!asked.has(holder.token)) endProcess(holder.pid, "SIGTERM");
  asked.add(holder.token);
}

async function delStored(
  host: Host,
  attachment: StoredAttachment,
  request: Request,
  chain: ChainOptions,
): Promise<CniError[]> {
  const moved = withPresentPlugins(attachment, request.path);
  return delChain(host, moved, storedResult(attachment), chain);
}

/** Binaries may have moved since ADD: one that is gone is looked for by its name. */
function withPresentPlugins<T extends Attachment>(attachment: T, path: string[]): T {
  const dirs = [...attachment.cniPath.split(":"), ...path];
  const plugins = attachment.plugins.map((file) =>
    existsSync(file) ? file : (findPlugin(basename(file), dirs) ?? file),
  );
  return { ...attachment, plugins, timeoutMs: Math.min(attachment.timeoutMs, delegateTimeoutMs) };
}

/** What becomes of an attachment after a DEL with these errors. */
function verdict(
  attachment: StoredAttachment,
  errors: CniError[],
  windowMs: number,
  nowMs: number,
): "gone" | "failing" | "leaked" {
  if (errors.length === 0) return "gone";
  if (errors.every(({ code: number }) => number === code.delegateNotFound)) return "leaked";
  const sinceMs = attachment.failedAtMs === 0 ? nowMs : attachment.failedAtMs;
  return nowMs - sinceMs >= windowMs ? "leaked" : "failing";
}

function settle(
  host: Host,
  state: State,
  operation: Operation,
  outcomes: Map<StoredAttachment, CniError[]>,
  settings: NodeSettings,
  call: { containerId: string; requestIfName: string },
): void {
  const nowMs = host.now();
  try {
    release(state, operation, () => {
      let left = 0;
      for (const [attachment, errors] of outcomes) {
        const what = verdict(attachment, errors, settings.delRetryWindowMs, nowMs);
        if (what === "gone") forget(state, attachment);
        else {
          left++;
          setFailing(state, attachment, {
            state: what,
            error: errors.map(({ message }) => message).join("; "),
            nowMs,
          });
        }
      }
      if (left === 0) setEnded(state, call, nowMs);
    });
  } catch (error) {
    // The rows stay: a later DEL, ADD or gc calls the delegates again, which is harmless.
    log(host, "error", toCniError(error).message, { container: call.containerId });
  }
}

function failIfRetryWanted(
  host: Host,
  outcomes: Map<StoredAttachment, CniError[]>,
  settings: NodeSettings,
): void {
  const retried: CniError[] = [];
  for (const [attachment, errors] of outcomes) {
    const what = verdict(attachment, errors, settings.delRetryWindowMs, host.now());
    if (what === "failing") retried.push(...errors);
    if (what === "leaked") {
      log(host, "error", "Attachment parked as leaked: genie gc retries it", {
        container: attachment.containerId,
        network: attachment.network,
        interface: attachment.ifName,
        error: errors[0]?.message,
      });
    }
  }
  const [first, ...others] = retried;
  if (!first) return;
  throw new CniError(first.code, withoutSuccessWords(first.message), {
    details: withoutSuccessWords(
      [first.details, ...others.map(({ message }) => message)].filter((text) => text).join("\n"),
    ),
    cause: first,
  });
}

/**
 * containerd takes a DEL error with "not found" for success, and with an empty netns also "no such
 * file or directory" (go-cni): words that must not stand where a retry is wanted.
 */
export function withoutSuccessWords(text: string): string {
  return text
    .replace(/not found/gi, "absent")
    .replace(/no such file or directory/gi, "path is absent");
}

/**
 * DEL without a record: plans again from what the request itself carries, never from the API, and
 * calls DEL on every plugin of that plan. Errors are reported, the DEL succeeds (CNI SPEC 1.1 §2).
 */
async function deleteByGuess(host: Host, request: Request): Promise<void> {
  const token = newOperation(host, request.containerId, "DEL").token;
  const deadlineMs = host.now() + delTimeoutMs;
  try {
    const config = loadConfig(request.config);
    const plan = await makePlan(host, config, withCarriedAnnotations(request));
    const result = carriedResult(request);
    for (const attachment of plan.attachments.toReversed()) {
      const chain = { netns: request.netns, token, deadlineMs, signal: host.signal };
      const present = withPresentPlugins(attachment, request.path);
      for (const error of await delChain(host, present, result, chain)) {
        log(host, "warn", `Best effort without a record: ${error.message}`);
      }
    }
  } catch (error) {
    log(host, "debug", `Nothing on record and nothing to guess: ${toCniError(error).message}`);
  }
}

/** The request with an answer to "what are the annotations", so that no one asks the API. */
function withCarriedAnnotations(request: Request): Request {
  const { runtimeConfig = {}, ...config } = request.config;
  const annotations = runtimeConfig[annotationsCapability];
  if (annotations !== undefined || isObject(config.args?.["org.apache.mesos"])) return request;
  if (/(^|;)(K8S_ANNOT|cni|networks)=/.test(request.args)) return request;
  return {
    ...request,
    config: { ...config, runtimeConfig: { ...runtimeConfig, [annotationsCapability]: {} } },
  };
}

function carriedResult(request: Request): Result | undefined {
  if (!isObject(request.config.prevResult)) return undefined;
  try {
    return parseResult(request.config.prevResult, request.cniVersion, "prevResult");
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/**
 * GC: deletes the attachments of this config that the runtime does not list any more, then has each
 * network's plugins collect theirs, by the interface names we gave them. A list that is absent
 * deletes nothing; an empty one everything. Goes on after errors and returns them all.
 *
 * @throws CniError of the first failure, the others in `details`; 11 when ADDs do not end in time
 */
export async function gc(host: Host, request: Request): Promise<undefined> {
  const settings = loadNodeSettings(host, request.config);
  const valid = validCalls(request);
  if (!valid || request.config["disableGC"] === true) return undefined;
  const state = openState(host, settings.stateDir);
  try {
    const operation = newOperation(host, everyContainer, "GC");
    const chain: ChainOptions = {
      netns: "",
      token: operation.token,
      deadlineMs: host.now() + gcTimeoutMs,
      signal: host.signal,
    };
    const rows = await takeLock(host, state, operation, chain, () => attachments(host, state));
    const errors: CniError[] = [];
    try {
      errors.push(...(await collectStale(host, state, request, rows, valid, chain, settings)));
      errors.push(...(await collectNetworks(host, state, request, chain)));
    } finally {
      release(state, operation, () => undefined);
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
          'Invalid network config: an entry of "cni.dev/valid-attachments" lacks containerID or ifname',
        );
      }
      return callKey(one["containerID"], one["ifname"]);
    }),
  );
}

/** Deletes what came through this config and is not valid any more. */
async function collectStale(
  host: Host,
  state: State,
  request: Request,
  rows: StoredAttachment[],
  valid: ReadonlySet<string>,
  chain: ChainOptions,
  settings: NodeSettings,
): Promise<CniError[]> {
  const collected: CniError[] = [];
  const stale = rows.filter(
    (row) =>
      row.requestNetwork === request.config.name &&
      !valid.has(callKey(row.containerId, row.requestIfName)),
  );
  for (const row of stale.reverse()) {
    const netns = row.netnsId === netnsId(row.netns) ? row.netns : "";
    const errors = await delStored(host, row, request, { ...chain, netns });
    const what = verdict(row, errors, settings.delRetryWindowMs, host.now());
    write(state, () => {
      if (what === "gone") return forget(state, row);
      const error = errors.map(({ message }) => message).join("; ");
      return setFailing(state, row, { state: what, error, nowMs: host.now() });
    });
    collected.push(...errors);
  }
  return collected;
}

/** Forwards GC to the plugins of every network, with that network's own attachments. */
async function collectNetworks(
  host: Host,
  state: State,
  request: Request,
  chain: ChainOptions,
): Promise<CniError[]> {
  const errors: CniError[] = [];
  const config = loadConfig(request.config);
  const search = pluginSearch(config, request);
  const kept = attachments(host, state).filter((row) => row.state === "attached");
  for (const { name, list } of listNetworks(config).networks) {
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
