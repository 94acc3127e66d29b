/**
 * `genie repair`: DEL and ADD of what is broken of a running pod, one attachment after the other,
 * on the same interface, in the same network namespace and, where the IPAM allows it, with the same
 * address. Works from the record alone, as DEL does: what the pod asks for by now does not count.
 *
 * Its single steps serve changes of a pod's networks too. Each is taken under the container's lock,
 * and on record before it is made: a process killed in between leaves rows from which the pod's DEL
 * undoes everything. Source: CNI SPEC 1.1 §2-§4; design D4, D8.
 */
import type { Chain, Done, Host } from "../call.ts";
import { checkChain, findGone, readNetwork, saysNothing } from "../check.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import { type Flags, namedPod, text } from "../config/usage.ts";
import { type State, write } from "../database.ts";
import { attachOne, giveUpDefaultRoutes, refreshHostInterfaces } from "../default_route.ts";
import { isObject } from "../json.ts";
import { interfacesIn, netnsId } from "../kernel.ts";
import { type PodStatus, putStatus } from "../kubernetes/network_status.ts";
import { beginJournal, withAudit, writeAside, writeJournal } from "../ledger.ts";
import { newOperation, release, takeLock } from "../lock.ts";
import { declaresCapability } from "../networks.ts";
import type { Enforced } from "../policy/enforce.ts";
import { attachedOf } from "../policy/rulesets.ts";
import type {
  Attachment,
  CallId,
  Journal,
  Operation,
  Result,
  StoredAttachment,
} from "../record.ts";
import {
  attachments,
  forgetTraffic,
  storedResult,
  undo,
  undoChain,
  withPresentPlugins,
} from "../recorded.ts";
import { addLeftOut } from "../recovery/left_out.ts";
import { oneInterfaceTypes, sharedError } from "../recovery/plugin_keys.ts";
import { sampleTraffic } from "../recovery/traffic_rate.ts";
import { formatTable } from "../report/table.ts";
import { podLabel } from "../request.ts";
import { toVersion } from "../result.ts";
import { enforcesPolicy } from "../settings.ts";
import { setAttached, trafficSources } from "../write_ahead.ts";
import {
  attachmentsOfCall,
  firstOf,
  hasNetns,
  isNamed,
  type LiveContext,
  liveAttachments,
  type PodName,
  putUnfollowed,
  runningStatus,
  withPods,
} from "./running_pod.ts";

/** How the repair of one attachment ended. */
export interface Repaired {
  network: string;
  ifName: string;
  containerId: string;
  primary: boolean;
  /** Addresses it had, and has now, with prefix length. */
  before: string[];
  after: string[];
  /** What was found broken, or that it was asked for; "" for what is healthy and was let alone. */
  why: string;
  /** Why it is not there; "" when it is. */
  error: string;
}

/** What of a pod is repaired: of one network alone, also what is healthy, only looked at. */
interface Wish {
  isAsked: (row: StoredAttachment) => boolean;
  isAll: boolean;
  isDry: boolean;
}

/**
 * Runs `genie repair NAMESPACE/POD`. @returns exit status: 1 when something is not as it was
 * @param width columns of the terminal, Infinity for none
 * @throws UsageError; CniError 3 for a pod without attachments here, or whose namespace is gone; 11
 *   when another operation of the pod does not end in time; 7 for a plugin table that is wrong
 */
export async function runRepair(host: Host, flags: Flags, width: number): Promise<number> {
  const pod = namedPod(flags);
  const isDry = flags["dry-run"] === true;
  const network = text(flags, "network");
  const all: Repaired[] = [];
  await withPods(host, flags, "repair", async (context) => {
    const isAsked = (row: StoredAttachment) =>
      network === undefined || isNamed(context.config, row, network);
    const wish = { isAsked, isAll: flags["all"] === true, isDry };
    for (const call of callsOf(context, pod, wish, network)) {
      all.push(...(await (isDry ? previewCall : repairCall)(context, call, wish)));
    }
  });
  const table = () => formatRepaired(all, width, isDry);
  host.stdout(flags["json"] ? `${JSON.stringify(all, null, 2)}\n` : table());
  return all.every((one) => (isDry ? one.why === "" : isAsBefore(one))) ? 0 : 1;
}

/** The calls that attached what is to be repaired. @throws CniError 3 or 101 */
function callsOf(context: LiveContext, pod: PodName, { isAsked }: Wish, network = ""): CallId[] {
  const live = liveAttachments(context, pod, "repair");
  const chosen = live.filter(isAsked);
  if (chosen.length === 0) {
    const names = [...new Set(live.map((row) => row.network))].join(", ");
    const what = `network "${network}" of pod ${podLabel(pod)}`;
    throw new CniError(code.networkNotFound, `Cannot repair ${what}: it has ${names}`);
  }
  const calls = Map.groupBy(chosen, (row) => `${row.containerId} ${row.requestIfName}`);
  return [...calls.values()].map(firstOf);
}

/** What a repair would do. Changes nothing, so it takes no lock. */
async function previewCall(context: LiveContext, call: CallId, wish: Wish): Promise<Repaired[]> {
  const { host, state, config } = context;
  const rows = attachmentsOfCall(host, state, call).filter(hasNetns);
  const { netns } = firstOf(rows);
  const { token } = newOperation(host, call.containerId, "repair");
  const deadlineMs = host.now() + config.timeoutMs;
  return findBroken({ host, netns, token, deadlineMs, signal: host.signal }, rows, wish);
}

/** Each attachment that is asked about, with what CHECK finds: the plugins', and our own look. */
async function findBroken(
  chain: Chain,
  rows: readonly StoredAttachment[],
  { isAsked, isAll }: Wish,
): Promise<Repaired[]> {
  const all: Repaired[] = [];
  for (const row of rows) {
    if (!isAsked(row)) continue;
    const { ifName, containerId, primary } = row;
    const result = storedResult(row);
    const before = result ? ownAddresses(row, result) : [];
    const why = isAll ? "asked for" : await whyBroken(chain, row, result);
    const what = { network: row.network, ifName, containerId, primary, before };
    all.push({ ...what, after: before, why, error: "" });
  }
  return all;
}

/** What is broken of an attachment, in words; "" where nothing is found. */
async function whyBroken(
  chain: Chain,
  row: StoredAttachment,
  result: Result | undefined,
): Promise<string> {
  if (row.state !== "attached") return row.error || `it is ${row.state}`;
  if (!result) return "its result on record cannot be read";
  const kernel = readNetwork(row.netns);
  // The list may turn CHECK off, which is about the plugins.
  const looked = { ...row, list: { ...row.list, disableCheck: false } };
  const gone = kernel ? findGone(looked, result, kernel) : [];
  if (gone.length > 0) return `gone is ${gone.join(", ")}`;
  try {
    await checkChain(chain, row, result);
    return "";
  } catch (error) {
    const failure = toCniError(error);
    return saysNothing(failure) ? "" : failure.message;
  }
}

async function repairCall(context: LiveContext, call: CallId, wish: Wish): Promise<Repaired[]> {
  const live = await beginOperation(context, call, () => {
    const rows = attachmentsOfCall(context.host, context.state, call).filter(hasNetns);
    if (rows.length > 0) return rows;
    throw new CniError(code.unknownContainer, "Cannot repair: the pod has just gone");
  });
  const all: Repaired[] = [];
  let failure: unknown;
  let enforced: Enforced | undefined;
  try {
    // What would fail afterwards fails before anything is touched.
    (await enforceOn(live, live.done))?.release();
    for (const found of await findBroken(live.chain, live.rows, wish)) {
      all.push(found.why === "" ? found : await repairOne(live, found));
    }
    enforced = await enforceOn(live, live.done).catch(async (error: unknown) => {
      await withdraw(live, all, toCniError(error));
      return undefined;
    });
  } catch (error) {
    failure = error;
    throw error;
  } finally {
    await endOperation(live, failure);
    enforced?.release();
  }
  return all;
}

/** Takes away what was made without its policy in force: a network that is closed, not open. */
async function withdraw(live: LiveOperation, all: Repaired[], cause: CniError): Promise<void> {
  const made = all.filter(({ why, error }) => why !== "" && error === "");
  for (const one of made.toReversed()) {
    const row = live.rows.find(({ ifName }) => ifName === one.ifName);
    if (!row) continue;
    await detachRecorded(live, row).catch((error: unknown) => {
      log(live.host, "error", toCniError(error).message, { interface: one.ifName });
    });
    write(live.state, () => setBroken(live.state, row, cause.message));
    Object.assign(one, { after: [], error: cause.message });
  }
  const gone = new Set(made.map(({ ifName }) => ifName));
  live.done = live.done.filter(({ attachment }) => !gone.has(attachment.ifName));
}

/** DEL and ADD of one attachment. Never throws: the outcome says why it is not there. */
async function repairOne(live: LiveOperation, what: Repaired): Promise<Repaired> {
  const { ifName, before } = what;
  try {
    const row = firstOf(live.rows.filter((one) => one.ifName === ifName));
    checkRepairable(row);
    const shared = sharedError(row, othersOf(live, row), oneInterfaceTypes(live.config));
    if (shared) throw shared;
    const others = live.done.filter(({ attachment }) => attachment.ifName !== ifName);
    live.done = others;
    await detachRecorded(live, row);
    const made = await attachAgain(live, row, before, others);
    const position = (one: Done) =>
      live.rows.findIndex(({ ifName: name }) => name === one.attachment.ifName);
    live.done = [...others, made].toSorted((a, b) => position(a) - position(b));
    return { ...what, after: ownAddresses(row, made.result), error: "" };
  } catch (error) {
    return { ...what, after: [], error: toCniError(error).message };
  }
}

/** Refuses what the runtime is about to delete or to make anew. @throws CniError 11 */
function checkRepairable({ state, result, error, network, ifName }: StoredAttachment): void {
  const isMade = result !== undefined || error !== "";
  if (state === "attached" || (state === "planned" && isMade)) return;
  const midway = "its ADD was ended in the middle, and the runtime makes the pod anew";
  const why = state === "planned" ? midway : `it is ${state}: its pod is being taken down`;
  throw new CniError(code.tryAgainLater, `Cannot repair network "${network}" (${ifName}): ${why}`);
}

/** Is it there, with the addresses it had? A secondary one may have others. */
function isAsBefore(one: Repaired): boolean {
  return one.error === "" && (!one.primary || !isMoved(one));
}

function isMoved({ before, after }: Repaired): boolean {
  return before.length > 0 && before.toSorted().join() !== after.toSorted().join();
}

/** The table that `genie repair` prints. */
export function formatRepaired(all: readonly Repaired[], width: number, isDry = false): string {
  const columns = ["NETWORK", "INTERFACE", "ADDRESSES"].map((title) => ({ title }));
  const rows = all.map((one) => {
    const addresses = one.after.join(", ") || "none";
    return [one.network, one.ifName, addresses, outcomeOf(one, isDry)];
  });
  return formatTable([...columns, { title: "OUTCOME", wraps: true }], rows, width);
}

function outcomeOf(one: Repaired, isDry: boolean): string {
  if (one.error !== "") return one.error;
  if (one.why === "") return "healthy, let alone";
  if (isDry) return `would be made anew: ${one.why}`;
  if (!isMoved(one)) return "made anew";
  const moved = `made anew, it had ${one.before.join(", ")}`;
  return one.primary ? `${moved}: Kubernetes knows the pod by that, delete the pod` : moved;
}

/** An operation on a running pod, which holds the container's lock. */
export interface LiveOperation extends LiveContext {
  operation: Operation;
  journal: Journal;
  /** Its `netns` is the pod's. */
  chain: Chain;
  /** The attachments of the call when the lock was taken. */
  rows: readonly StoredAttachment[];
  /** What is attached by now, in the order in which it was made. */
  done: Done[];
}

/**
 * Takes the container's lock and begins the journal. End it with {@link endOperation}.
 * @param find reads the attachments of the call in the transaction of the lock; throws where there
 *   are none, or where they may not be changed
 * @throws CniError 11 when another operation does not end in time; what `find` throws
 */
export async function beginOperation(
  context: LiveContext,
  { containerId }: CallId,
  find: () => StoredAttachment[],
): Promise<LiveOperation> {
  const { host, config, state, why } = context;
  const operation = newOperation(host, containerId, why);
  const deadlineMs = host.now() + config.timeoutMs;
  const { signal } = host;
  const rows = await takeLock({ host, state, operation, deadlineMs, signal }, find);
  const first = firstOf(rows);
  const journal = beginLiveJournal(context, first);
  const chain = { host, netns: first.netns, token: operation.token, deadlineMs, signal, journal };
  const done: Done[] = attachedOf(rows);
  addLeftOut(first.netns, done);
  return { ...context, operation, journal, chain, rows, done };
}

/** Begins the journal of an operation on a running pod. @param row one of its attachments */
export function beginLiveJournal({ host, why }: LiveContext, row: StoredAttachment): Journal {
  const { containerId, requestIfName: ifName, requestNetwork: network, pod } = row;
  const call = { command: "ADD", containerId, ifName, network, pod };
  return beginJournal(host, { ...call, decidedBy: why });
}

/**
 * Records results, status, traffic and ledger as they are now, and gives the lock back.
 * @param failure why the operation failed
 * @returns the status, on record; undefined where none is wanted
 * @throws CniError 106 when the record cannot be written
 */
export async function endOperation(
  live: LiveOperation,
  failure: unknown,
): Promise<PodStatus | undefined> {
  const { host, state, operation, journal, rows, done, why } = live;
  const status = await runningStatus(live, rows, done).catch((error: unknown) => {
    log(host, "error", `Cannot make the network status: ${toCniError(error).message}`);
    return undefined;
  });
  withAudit(host, (isAudited) =>
    release(state, operation, () => {
      commitDone(state, done);
      if (why === "switch") putUnfollowed(state, firstOf(rows), host.now());
      if (status) putStatus(state, status, host.now());
      if (!isAudited) return;
      writeAside(host, state, "traffic", () => {
        forgetTraffic(state, operation.containerId);
        sampleTraffic(state, trafficSources(done), host.now());
      });
      writeJournal(host, state, journal, failure);
    }),
  );
  return status;
}

/**
 * Puts network policy in force on these attachments, as for an ADD.
 * @returns undefined where the table asks for no policy
 * @throws CniError 11 when the policy cannot be known
 */
export async function enforceOn(
  { host, config, state, journal, objects, chain }: LiveOperation,
  done: readonly Done[],
): Promise<Enforced | undefined> {
  const [first] = done;
  if (!first || !enforcesPolicy(config)) return undefined;
  const { enforceAdd } = await import("../policy/enforce.ts");
  const plan = { pod: first.attachment.pod, objects };
  return enforceAdd({ host, config, state, journal }, plan, done, chain);
}

/**
 * DEL of one recorded attachment. Its row stays, as `planned`: forget it, or attach it again.
 * @throws CniError of the delegate that failed; the row then says so
 */
export async function detachRecorded(live: LiveOperation, stored: StoredAttachment): Promise<void> {
  const { config, state, why } = live;
  write(state, () => setBroken(state, stored, "it is being made anew"));
  // A DEL that was begun comes to its end, whoever asks us to end meanwhile.
  const chain = undoChain(live.chain);
  const others = othersOf(live, stored);
  const [first] = await undo(chain, { ...stored, reason: why }, config.binDirs, others);
  if (!first) return;
  write(state, () => setBroken(state, stored, first.message));
  throw first;
}

/** What else the container has on record, of other calls too. */
export function othersOf(
  { host, state }: LiveContext,
  { containerId, ifName }: StoredAttachment,
): StoredAttachment[] {
  return attachments(host, state, containerId).filter((row) => row.ifName !== ifName);
}

/**
 * ADD of one attachment beside those that the pod has. The default route stays with its owner,
 * unless this attachment was told to take it.
 * @param others what the pod has besides, in the order in which it was made. Where the new one
 *   takes routes from their results, that is changed in place; {@link commitDone} records it
 * @throws CniError of the delegate that failed; 105 when the interface is there. Then nothing of
 *   the attachment is left, or its row says what
 */
export async function attachRecorded(
  live: LiveOperation,
  attachment: Attachment,
  others: Done[],
): Promise<Done> {
  const { host, config, state, chain, why } = live;
  const { netns, ifName, network } = attachment;
  write(state, () => putPlanned(state, attachment, host.now()));
  try {
    // A delegate would refuse the name, and its DEL then remove what is not ours.
    if (interfacesIn(netns)?.includes(ifName)) {
      const why = `the pod still has an interface "${ifName}"`;
      throw new CniError(code.interfaceConflict, `Cannot attach network "${network}": ${why}`);
    }
    const { plugins } = withPresentPlugins(attachment, config.binDirs);
    const added = await attachOne(chain, { ...attachment, plugins, reason: why }, others);
    if (added.kind === "failed") throw withUndo(added.error, added.undo);
    giveUpDefaultRoutes(others, added.took);
    const done: Done = { attachment, result: added.result };
    addLeftOut(netns, [...others, done]);
    refreshHostInterfaces([...others, done]);
    return done;
  } catch (error) {
    const failure = toCniError(error);
    write(state, () => setBroken(state, attachment, failure.message));
    throw failure;
  }
}

/**
 * ADD of an attachment that was detached, with the addresses it had. Where its IPAM refuses these,
 * any address will do: a network with another address is better than none.
 * @throws CniError as {@link attachRecorded}
 */
export async function attachAgain(
  live: LiveOperation,
  stored: StoredAttachment,
  addresses: readonly string[],
  others: Done[],
): Promise<Done> {
  // What the record adds to the plan is not planned again.
  const { state, result, failedAtMs, error: _, createdAtMs, netnsId: id, ...attachment } = stored;
  const asking = askingFor(attachment, addresses);
  try {
    return await attachRecorded(live, asking, others);
  } catch (error) {
    if (asking === attachment || live.host.signal.aborted) throw error;
    log(live.host, "warn", `Cannot keep the address, trying any: ${toCniError(error).message}`);
    return attachRecorded(live, attachment, others);
  }
}

/** Records the results of attachments as they are now. Call inside a transaction. */
export function commitDone(state: State, done: readonly Done[]): void {
  for (const { attachment, result } of done) {
    setAttached(state, attachment, toVersion(result, attachment.list.cniVersion));
  }
}

function withUndo(error: CniError, undone: readonly CniError[]): CniError {
  if (undone.length === 0) return error;
  const details = [error.details, ...undone.map(({ message }) => message)];
  return new CniError(error.code, error.message, {
    details: details.filter((text) => text !== "").join("\n"),
    cause: error,
  });
}

/** Addresses of an attachment on its own interface, with prefix length. */
export function ownAddresses({ ifName }: Pick<Attachment, "ifName">, result: Result): string[] {
  return result.ips
    .filter(({ interface: index }) => {
      const name = index === undefined ? undefined : result.interfaces[index]?.name;
      return name === undefined || name === ifName;
    })
    .map(({ address }) => address);
}

/**
 * The same attachment, asking for addresses: of host-local by `args.cni.ips`, of others by the
 * capability `ips` where a plugin declares it. Unchanged where its IPAM takes no wishes, or where
 * it asks for addresses already. Of static too: asked for an address it would forget the gateway.
 */
export function askingFor<T extends Attachment>(attachment: T, addresses: readonly string[]): T {
  const { list, capabilityArgs, args, cniArgs } = attachment;
  const types = list.plugins.map(({ ipam }) => (isObject(ipam) ? ipam["type"] : undefined));
  const asks = "ips" in capabilityArgs || /(^|;)IP=/.test(cniArgs);
  if (addresses.length === 0 || asks || types.includes("static")) return attachment;
  if (types.includes("host-local")) {
    const ips = addresses.map((address) => address.replace(/\/.*/, ""));
    const cni = isObject(args["cni"]) ? args["cni"] : {};
    return { ...attachment, args: { ...args, cni: { ...cni, ips } } };
  }
  if (!declaresCapability(list, "ips")) return attachment;
  return { ...attachment, capabilityArgs: { ...capabilityArgs, ips: [...addresses] } };
}

/**
 * Records the plan of one attachment beside those of its container, as `planned`: over the row of
 * its interface, whose result stays while it is of the same network, so that a DEL can undo what
 * was there before and what comes; else behind the other rows.
 */
function putPlanned({ database }: State, attachment: Attachment, nowMs: number): void {
  const { containerId, requestIfName, ifName, network, requestNetwork, netns } = attachment;
  const plan = JSON.stringify(attachment);
  database
    .query(
      `INSERT INTO attachments (container_id, request_ifname, ifname, position, network,
         request_network, state, plan, netns_id, created_at_ms)
       VALUES (?1, ?2, ?3,
         (SELECT coalesce(max(position) + 1, 0) FROM attachments WHERE container_id = ?1),
         ?4, ?5, 'planned', ?6, ?7, ?8)
       ON CONFLICT (container_id, ifname) DO UPDATE SET state = 'planned', error = '',
         failed_at_ms = 0, result = CASE network WHEN ?4 THEN result END, network = ?4,
         request_network = ?5, plan = ?6, netns_id = ?7`,
    )
    .run(containerId, requestIfName, ifName, network, requestNetwork, plan, netnsId(netns), nowMs);
}

/**
 * Records why an attachment of a running pod is not there. It stays `planned`: no DEL was asked
 * for, so nobody may give it up, and `genie repair` or the pod's DEL find it. Call inside a
 * transaction.
 */
export function setBroken(
  { database }: State,
  { containerId, ifName }: Pick<Attachment, "containerId" | "ifName">,
  error: string,
): void {
  database
    .query(
      `UPDATE attachments SET state = 'planned', error = ?, failed_at_ms = 0
       WHERE container_id = ? AND ifname = ?`,
    )
    .run(error, containerId, ifName);
}
