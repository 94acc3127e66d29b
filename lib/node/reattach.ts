/**
 * DEL and ADD of single attachments of a pod that runs, behind `genie repair` and whatever else
 * changes the networks of a pod between its ADD and its DEL. Call under the container's lock. The
 * record is written before each step: a process killed in between leaves what DEL undoes.
 * Source: CNI SPEC 1.1 §2-§4; design D4, D8.
 */
import { CniError, code, type Host, toCniError } from "../cni.ts";
import { type State, write } from "../database.ts";
import { attachOne, type Done, refreshHostInterfaces } from "../default_route.ts";
import { type ChainOptions, undoOptions } from "../delegate.ts";
import { isObject } from "../json.ts";
import { declaresCapability } from "../netconf.ts";
import { interfacesIn } from "../netns.ts";
import { type Result, toVersion, withoutDefaultRoutes } from "../result.ts";
import { type Attachment, type StoredAttachment, setAttached } from "../state.ts";
import { storedResult, undo, withPresentPlugins } from "../undo.ts";
import { planOne, setBroken } from "./replan.ts";

/** What changes the networks of a pod. */
export interface Reattaching {
  host: Host;
  state: State;
  /** Its `netns` is the pod's. */
  chain: ChainOptions;
  /** Further folders to look for the binaries in. */
  path: string[];
  /** Stands in the ledger as what decided: `repair`. */
  why: string;
}

/**
 * DEL of one recorded attachment. Its row stays, as `planned`: forget it, or make another one.
 *
 * @throws CniError of the delegate that failed; the row then says so
 */
export async function detachOne(call: Reattaching, stored: StoredAttachment): Promise<void> {
  const { host, state, why } = call;
  write(state, () => setBroken(state, stored, "it is being made anew"));
  // A DEL that was begun comes to its end, whoever asks us to end meanwhile.
  const chain = undoOptions(host, call.chain);
  const [first] = await undo(host, { ...stored, reason: why }, call.path, chain);
  if (!first) return;
  write(state, () => setBroken(state, stored, first.message));
  throw first;
}

/**
 * ADD of one attachment beside those that the pod has. The default route stays with its owner, or
 * comes to this attachment where it is told to take it.
 *
 * @param others what the pod has besides, in the order in which it was made; what the new one
 *   changes of their results is changed in place, and is on record with {@link commitDone}
 * @throws CniError of the delegate that failed; 105 when the interface is there; then nothing of it
 *   is left, or the row says what
 */
export async function attachOneRecorded(
  call: Reattaching,
  attachment: Attachment,
  others: Done[],
): Promise<Done> {
  const { host, state, chain, why } = call;
  write(state, () => planOne(state, attachment, host.now()));
  try {
    checkFree(attachment);
    const { plugins } = withPresentPlugins(attachment, call.path);
    const named = { ...attachment, plugins, reason: why };
    const added = await attachOne(host, named, chain, others);
    if (added.kind === "failed") throw withUndo(added.error, added.undo);
    for (const other of others) other.result = withoutDefaultRoutes(other.result, added.took);
    const done: Done = { attachment, result: added.result };
    refreshHostInterfaces([...others, done]);
    return done;
  } catch (error) {
    const failure = toCniError(error);
    write(state, () => setBroken(state, attachment, failure.message));
    throw failure;
  }
}

/** Writes the results of attachments down, as they are now. Call inside a transaction. */
export function commitDone(state: State, done: readonly Done[]): void {
  for (const { attachment, result } of done) {
    setAttached(state, attachment, toVersion(result, attachment.list.cniVersion));
  }
}

/** What is attached, of the rows of one call, as {@link attachOneRecorded} wants it. */
export function doneOf(rows: readonly StoredAttachment[]): Done[] {
  return rows.flatMap((attachment) => {
    const result = attachment.state === "attached" ? storedResult(attachment) : undefined;
    return result ? [{ attachment, result }] : [];
  });
}

/** A delegate would refuse the name, and its DEL then remove what is not ours. @throws 105 */
function checkFree({ netns, ifName, network }: Attachment): void {
  if (!interfacesIn(netns)?.includes(ifName)) return;
  throw new CniError(
    code.interfaceConflict,
    `Cannot attach network "${network}": the pod still has an interface "${ifName}"`,
  );
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
 * capability `ips` where a plugin declares it. As it is where its IPAM takes no wishes, or was
 * asked for these already; static gives what its config says, and would forget the gateway.
 */
export function askingFor<T extends Attachment>(attachment: T, addresses: readonly string[]): T {
  const { list, capabilityArgs, args, cniArgs } = attachment;
  const types = list.plugins.map(({ ipam }) => (isObject(ipam) ? ipam["type"] : undefined));
  if (addresses.length === 0 || "ips" in capabilityArgs || types.includes("static")) {
    return attachment;
  }
  if (/(^|;)IP=/.test(cniArgs)) return attachment;
  if (types.includes("host-local")) {
    const ips = addresses.map((address) => address.replace(/\/.*/, ""));
    const cni = isObject(args["cni"]) ? args["cni"] : {};
    return { ...attachment, args: { ...args, cni: { ...cni, ips } } };
  }
  if (!declaresCapability(list, "ips")) return attachment;
  return { ...attachment, capabilityArgs: { ...capabilityArgs, ips: [...addresses] } };
}
