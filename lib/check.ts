/**
 * CHECK of one container, from the record: compares the kernel with the result of each attachment,
 * then asks each delegate. Source: CNI SPEC 1.1 §2 "CHECK".
 *
 * A false alarm fails a healthy pod. So a route may be in any table (sbr moves them) and have any
 * metric, an address any prefix length, and an interface that is not the kernel's (user space, a
 * passed device) is not looked for. Gateways and hardware addresses count only where the reference
 * plugins report them: others name a gateway that is the cloud's.
 *
 * What the kernel has of a network namespace is read by netlink: neither `ip` nor its output is
 * needed. Source: rtnetlink(7), netlink(7).
 */
import { dlopen, FFIType } from "bun:ffi";
import type { Chain, Host, Request } from "./call.ts";
import { CniError, code, compareVersions, oneLine, toCniError } from "./cni.ts";
import { closeState, openState } from "./database.ts";
import { callPlugin, noter } from "./delegate.ts";
import { canonicalIP, formatIP, formatSubnet, parseSubnet } from "./ip.ts";
import { isObject } from "./json.ts";
import { inNetns, isForeignNetns } from "./kernel.ts";
import { openJournal, writeAlone } from "./ledger.ts";
import { newOperation } from "./lock.ts";
import type { NetworkConfigList } from "./networks.ts";
import type { Attachment, Result, StoredAttachment } from "./record.ts";
import { attachments, hasRuleset, isCallRefused, storedResult } from "./recorded.ts";
import { loadNodeSettings } from "./settings.ts";

/**
 * CHECK: is every attachment still as ADD left it?
 * @throws CniError 11 for what is gone, that of the first delegate whose CHECK fails, 3 when the
 *   container is not on record
 */
export async function check(host: Host, request: Request): Promise<undefined> {
  const settings = await loadNodeSettings(host, request.config);
  const { disableCheck, delOnly } = request.config;
  if (disableCheck === true || delOnly === true) return undefined;
  const journal = openJournal(host, request);
  const state = await openState(host, settings.stateDir);
  try {
    const { containerId, ifName, netns } = request;
    const all = attachments(host, state, containerId);
    const found = all.filter((one) => one.requestIfName === ifName && !one.parkedAs);
    if (found.length === 0) {
      const msg = `Cannot check container ${containerId}: nothing for ${ifName} is on record`;
      throw new CniError(code.unknownContainer, msg);
    }
    const chain: Chain = {
      host,
      netns,
      token: newOperation(host, containerId, "CHECK").token,
      deadlineMs: host.now() + checkTimeoutMs,
      signal: host.signal,
      journal,
    };
    for (const attachment of found) {
      if (attachment.state !== "attached") {
        const msg = `Cannot check network "${attachment.network}": it is ${attachment.state}`;
        throw new CniError(code.tryAgainLater, msg);
      }
      const result = storedResult(attachment);
      const kernel = result && readNetwork(netns);
      if (kernel) checkPresence(attachment, result, kernel);
      await checkChain(chain, attachment, result).catch((error: unknown) => {
        throw withRemedy(toCniError(error), attachment);
      });
      if (!kernel || exactTypes.has(attachment.list.plugins[0]?.type ?? "")) continue;
      const { noteLeftOut } = await import("./recovery/left_out.ts");
      noteLeftOut(host, state, attachment, kernel);
    }
    for (const netnsId of new Set(found.map((one) => one.netnsId))) {
      if (!hasRuleset(state, netnsId)) continue;
      const { checkRuleset } = await import("./policy/enforce.ts");
      await checkRuleset(host, state, { netnsId, netns }, chain.deadlineMs);
    }
    writeAlone(host, state, journal);
    return undefined;
  } catch (error) {
    writeAlone(host, state, journal, error);
    throw error;
  } finally {
    closeState(state);
  }
}

const checkTimeoutMs = 60_000;

/** Looks for the attachment in the pod itself. @throws CniError 11 with everything that is gone */
function checkPresence(attachment: StoredAttachment, result: Result, kernel: KernelNetwork) {
  const gone = findGone(attachment, result, kernel);
  if (gone.length === 0) return;
  const { network, ifName, pod } = attachment;
  const command = repairCommand(pod, network);
  const podName = pod.namespace === "" ? pod.name : `${pod.namespace}/${pod.name}`;
  const where = `network "${network}" (${ifName})${pod.name && ` of pod ${podName}`}`;
  const remedy = command && `; to put it right: ${command}`;
  const msg = `Failed CHECK of ${where}: gone is ${oneLine(gone.join(", "), 600)}${remedy}`;
  throw new CniError(code.tryAgainLater, msg);
}

/**
 * Runs CHECK through the chain, unless the list turns it off or is older than CHECK.
 * @throws CniError of the first plugin that says no
 */
export async function checkChain(
  chain: Chain,
  attachment: Attachment,
  result: Result | undefined,
): Promise<void> {
  const { list } = attachment;
  if (list.disableCheck || compareVersions(list.cniVersion, "0.4.0") < 0) return;
  const note = noter(chain, attachment, "CHECK");
  try {
    for (const index of list.plugins.keys()) {
      await callPlugin(chain, attachment, { command: "CHECK", index, result });
    }
  } catch (error) {
    note(error);
    const { withKnownFault } = await import("./recovery/delegate_error.ts");
    throw withKnownFault(toCniError(error), result);
  }
  note(undefined);
}

/** Failures that say nothing about the attachment. */
const others = new Set<number>([
  code.tryAgainLater,
  code.delegateNotFound,
  code.delegateTimeout,
  code.delegateProtocol,
]);

/** Does a failed CHECK say nothing about the attachment? Old plugins do not know the command. */
export function saysNothing(error: CniError): boolean {
  const isUnknown = /unknown CNI_COMMAND/i.test(error.message);
  const isFault = isObject(error.cause) && error.cause["kind"] === "known-fault";
  return isUnknown || isFault || others.has(error.code) || isCallRefused(error);
}

/** Adds the repair command to the error of a plugin whose CHECK failed. */
function withRemedy(error: CniError, { pod, network }: StoredAttachment): CniError {
  const command = repairCommand(pod, network);
  if (command === "" || saysNothing(error)) return error;
  const details = [error.details, `To put it right: ${command}`].filter((text) => text !== "");
  return new CniError(error.code, error.message, { details: details.join("\n"), cause: error });
}

/** An attachment, as far as it is compared with the kernel. */
export interface CheckedAttachment {
  ifName: string;
  list: NetworkConfigList;
  /** The device of a device plugin that it was given. */
  device?: object;
}

/** Plugins that only give addresses: a network of these alone has no interface. */
const ipamTypes = new Set(["host-local", "static", "dhcp", "whereabouts"]);
/** Reference plugins that make interfaces: their results say what the kernel has. */
export const exactTypes = new Set([
  "bridge",
  "ptp",
  "macvlan",
  "ipvlan",
  "vlan",
  "host-device",
  "dummy",
]);
/** Keys that pass a device, which may belong to a driver in user space. */
const deviceKeys = ["deviceID", "pciBusID", "vhostConf", "host", "container"];

/** What the pod's network namespace has lost, in words: `address 10.1.0.5/16`. */
export function findGone(
  { ifName, list, device }: CheckedAttachment,
  result: Result,
  kernel: KernelNetwork,
): string[] {
  const [first] = list.plugins;
  if (list.disableCheck || !first || ipamTypes.has(first.type)) return [];
  const said = result.interfaces.find(({ name, sandbox }) => name === ifName && sandbox);
  if (said?.socketPath !== undefined) return [];
  const link = kernel.links.find(({ name }) => name === ifName);
  const hasDevice =
    device || list.plugins.some((plugin) => deviceKeys.some((key) => plugin[key] !== undefined));
  if (!link) return hasDevice ? [] : [`interface "${ifName}"`];
  const isExact = exactTypes.has(first.type);
  const mac = isExact ? (said?.mac ?? "") : "";
  const isOther = mac !== "" && mac.toLowerCase() !== link.mac;
  return [
    ...(isOther ? [`interface "${ifName}" of address ${mac}, another one has its name`] : []),
    ...goneAddresses(ifName, result, kernel).map((address) => `address ${address}`),
    ...goneRoutes(result, kernel, isExact).map((route) => `route ${route}`),
  ];
}

/** Addresses of the result that the interface they belong to does not have. */
function goneAddresses(ifName: string, result: Result, kernel: KernelNetwork): string[] {
  const { interfaces, ips } = result;
  const indexes = new Map(kernel.links.map(({ name, index }) => [name, index]));
  return ips.flatMap(({ address, interface: at }) => {
    const on = at === undefined ? undefined : interfaces[at];
    // It belongs to the node's end, or to a machine inside the pod.
    if (on && (!on.sandbox || !indexes.has(on.name))) return [];
    const index = indexes.get(on?.name ?? ifName);
    const ip = canonicalIP(address.replace(/\/.*/, ""));
    const isThere = kernel.addresses.some((one) => one.index === index && one.ip === ip);
    return isThere ? [] : [address];
  });
}

/** Routes of the result that are in no table. */
function goneRoutes(result: Result, kernel: KernelNetwork, isExact: boolean): string[] {
  return result.routes.flatMap(({ dst, gw }) => {
    const subnet = parseSubnet(dst);
    if (!subnet) return [];
    const wanted = formatSubnet(subnet);
    const gateway = gw === undefined || !isExact ? undefined : canonicalIP(gw);
    const isThere = kernel.routes.some(
      (route) =>
        route.dst === wanted && (gateway === undefined || route.gateways.includes(gateway)),
    );
    return isThere ? [] : [gw === undefined ? dst : `${dst} via ${gw}`];
  });
}

/** The command that repairs an attachment; "" where the pod is not known. */
export function repairCommand(pod: { namespace: string; name: string }, network: string): string {
  if (pod.namespace === "" || pod.name === "") return "";
  return `genie repair ${pod.namespace}/${pod.name} --network ${network}`;
}

const { i32, ptr, i64, u64 } = FFIType;

function openKernelCalls() {
  return dlopen("libc.so.6", {
    socket: { args: [i32, i32, i32], returns: i32 },
    send: { args: [i32, ptr, u64, i32], returns: i64 },
    recv: { args: [i32, ptr, u64, i32], returns: i64 },
    close: { args: [i32], returns: i32 },
    flock: { args: [i32, i32], returns: i32 },
    fcntl: { args: [i32, i32, ptr], returns: i32 },
  }).symbols;
}

type KernelCalls = ReturnType<typeof openKernelCalls>;

let kernel: KernelCalls | null | undefined;

/** Calls for netlink and for locks of files; null without libc. */
export function kernelCalls(): KernelCalls | null {
  try {
    kernel ??= openKernelCalls();
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    kernel = null;
  }
  return kernel;
}

/** What the kernel reports for one network namespace. */
export interface KernelNetwork {
  /** `mac` in lower case, with colons; "" for none. */
  links: { index: number; name: string; mac: string }[];
  /** `index` of the interface; `ip` canonical, without prefix length. */
  addresses: { index: number; ip: string }[];
  /**
   * Routes to hosts, of any table. `dst` with prefix length, the default as `0.0.0.0/0` or `::/0`;
   * `gateways` of all next hops; `index` of the interface, 0 for several, and for what is not in
   * the main table or comes and goes with a router's advertisements.
   */
  routes: { dst: string; gateways: string[]; index: number }[];
}

/** Reads a namespace; undefined where there is none at this path, or it cannot be entered. */
export function readNetwork(netns: string): KernelNetwork | undefined {
  return isForeignNetns(netns) ? inNetns(netns, readOwnNetwork) : undefined;
}

/** Reads the namespace that this thread is in. */
export function readOwnNetwork(): KernelNetwork | undefined {
  const links = dump(getLink, 16);
  const addresses = dump(getAddress, 8);
  const routes = dump(getRoute, 12);
  if (!links || !addresses || !routes) return undefined;
  return {
    links: links.map(toLink),
    addresses: addresses.flatMap(toAddress),
    routes: routes.flatMap(toRoute),
  };
}

const [getLink, getAddress, getRoute] = [18, 22, 26];
const netlinkFamily = 16;
/** `SOCK_RAW | SOCK_CLOEXEC`. */
const rawSocket = 3 | 0x80000;
const routeProtocol = 0;
/** `NLM_F_REQUEST | NLM_F_DUMP`. */
const dumpFlags = 1 | 0x300;
/** `NLM_F_REQUEST | NLM_F_ACK`: an error without a number ends the answer. */
const oneFlags = 1 | 4;
/** `NLM_F_DUMP_INTR`: something changed while it was listed. */
const interrupted = 0x10;
const [messageError, messageDone] = [2, 3];
const headerBytes = 16;
const bufferBytes = 256 * 1024;
const triesMax = 5;

/** One message: its fixed part, and its attributes by number, the last of each. */
interface Message {
  fixed: DataView;
  attributes: Map<number, Uint8Array>;
}

/**
 * Lists everything of a kind, or what a body of its fixed part and attributes asks for; undefined
 * where the kernel does not answer.
 */
export function dump(kind: number, fixedBytes: number, body?: Uint8Array) {
  const calls = kernelCalls();
  const request = new Uint8Array(headerBytes + (body?.length ?? fixedBytes));
  if (body) request.set(body, headerBytes);
  const header = new DataView(request.buffer);
  header.setUint32(0, request.length, true);
  header.setUint16(4, kind, true);
  header.setUint16(6, body ? oneFlags : dumpFlags, true);
  for (let tries = 0; calls && tries < triesMax; tries++) {
    const socket = calls.socket(netlinkFamily, rawSocket, routeProtocol);
    if (socket < 0) return undefined;
    try {
      if (calls.send(socket, request, BigInt(request.length), 0) < 0n) return undefined;
      const listed = receive(calls, socket, fixedBytes);
      if (listed !== "changed") return listed;
    } finally {
      calls.close(socket);
    }
  }
  return undefined;
}

function receive(calls: KernelCalls, socket: number, fixedBytes: number) {
  const messages: Message[] = [];
  const buffer = new Uint8Array(bufferBytes);
  let isChanged = false;
  for (;;) {
    const count = Number(calls.recv(socket, buffer, BigInt(buffer.length), 0));
    if (count <= 0) return undefined;
    const view = new DataView(buffer.buffer);
    for (let at = 0; at + headerBytes <= count; ) {
      const length = view.getUint32(at, true);
      const type = view.getUint16(at + 4, true);
      if (length < headerBytes || at + length > count) return undefined;
      if ((view.getUint16(at + 6, true) & interrupted) !== 0) isChanged = true;
      if (type === messageError && view.getInt32(at + headerBytes, true) !== 0) return undefined;
      if (type === messageError || type === messageDone) return isChanged ? "changed" : messages;
      // A copy, because the buffer is filled again.
      const bytes = buffer.slice(at + headerBytes, at + length);
      const attributes = parseAttributes(bytes, fixedBytes);
      messages.push({ fixed: new DataView(bytes.buffer), attributes });
      at += align(length);
    }
  }
}

const align = (length: number): number => (length + 3) & ~3;

/** The attributes of a message, or of one that holds others, by number; the last of each. */
export function parseAttributes(bytes: Uint8Array, from: number): Map<number, Uint8Array> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const attributes = new Map<number, Uint8Array>();
  for (let at = from; at + 4 <= bytes.length; ) {
    const length = view.getUint16(at, true);
    if (length < 4 || at + length > bytes.length) break;
    // The upper bits are flags.
    attributes.set(view.getUint16(at + 2, true) & 0x3fff, bytes.subarray(at + 4, at + length));
    at += align(length);
  }
  return attributes;
}

/** `IFLA_ADDRESS`, `IFLA_IFNAME`. */
const [linkMac, linkName] = [1, 3];

function toLink({ fixed, attributes }: Message): KernelNetwork["links"][number] {
  const name = attributes.get(linkName) ?? new Uint8Array();
  const mac = attributes.get(linkMac) ?? new Uint8Array();
  return {
    index: fixed.getInt32(4, true),
    name: new TextDecoder().decode(name).replace(/\0.*$/s, ""),
    mac: [...mac].map((byte) => byte.toString(16).padStart(2, "0")).join(":"),
  };
}

/** `IFA_ADDRESS`, `IFA_LOCAL`: on a point-to-point link, the second is ours. */
const [addressOfLink, addressLocal] = [1, 2];

/** The address in a message about one; none where it has none. */
export function toAddress({ fixed, attributes }: Message): KernelNetwork["addresses"] {
  const ip = formatBytes(attributes.get(addressLocal) ?? attributes.get(addressOfLink));
  return ip === "" ? [] : [{ index: fixed.getUint32(4, true), ip }];
}

function formatBytes(bytes: Uint8Array | undefined): string {
  if (bytes?.length !== 4 && bytes?.length !== 16) return "";
  const number = bytes.reduce((sum, byte) => sum * 256n + BigInt(byte), 0n);
  return formatIP(bytes.length === 4 ? 4 : 6, number);
}

/** `RTN_UNICAST`: other types are the kernel's own, or lead nowhere. */
const unicast = 1;
/** `RTM_F_CLONED`: a cached route. */
const cloned = 0x200;
/** `RTA_DST`, `RTA_OIF`, `RTA_GATEWAY`, `RTA_MULTIPATH`, `RTA_VIA`. */
const [routeDst, routeLink, routeGateway, routeMultipath, routeVia] = [1, 4, 5, 9, 18];
/** `RT_TABLE_MAIN`, `RTPROT_RA`. */
const [mainTable, advertised] = [254, 9];
const [inet, inet6] = [2, 10];
/** `struct rtnexthop`. */
const nexthopBytes = 8;

function toRoute({ fixed, attributes }: Message): KernelNetwork["routes"] {
  const family = fixed.getUint8(0);
  if (family !== inet && family !== inet6) return [];
  if (fixed.getUint8(7) !== unicast || (fixed.getUint32(8, true) & cloned) !== 0) return [];
  const any = family === inet ? "0.0.0.0" : "::";
  const base = formatBytes(attributes.get(routeDst)) || any;
  const ways = [attributes, ...nexthops(attributes.get(routeMultipath))];
  const isOwn = fixed.getUint8(4) === mainTable && fixed.getUint8(5) !== advertised;
  const link = isOwn ? attributes.get(routeLink) : undefined;
  const index = link ? new DataView(link.buffer, link.byteOffset).getInt32(0, true) : 0;
  return [{ dst: `${base}/${fixed.getUint8(1)}`, gateways: ways.flatMap(gatewayOf), index }];
}

function gatewayOf(attributes: Map<number, Uint8Array>): string[] {
  // A gateway of the other family has its family in front.
  const via = attributes.get(routeVia)?.subarray(2);
  const ip = formatBytes(attributes.get(routeGateway) ?? via);
  return ip === "" ? [] : [ip];
}

function nexthops(bytes: Uint8Array = new Uint8Array()): Map<number, Uint8Array>[] {
  const found: Map<number, Uint8Array>[] = [];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 0; at + nexthopBytes <= bytes.length; ) {
    const length = view.getUint16(at, true);
    if (length < nexthopBytes || at + length > bytes.length) break;
    found.push(parseAttributes(bytes.subarray(at, at + length), nexthopBytes));
    at += align(length);
  }
  return found;
}
