/**
 * What the kernel has in a network namespace: interfaces, addresses, routes of all tables. Asked by
 * netlink, so that neither `ip` nor its output is needed. Source: rtnetlink(7), netlink(7).
 */
import { formatIP } from "./ip.ts";
import { type KernelCalls, kernelCalls } from "./libc.ts";
import { inNetns, isForeignNetns } from "./netns.ts";

/** A network interface. */
export interface KernelLink {
  index: number;
  name: string;
  /** Lower case, with colons; "" for none. */
  mac: string;
}

/** An address of an interface. */
export interface KernelAddress {
  index: number;
  /** Canonical, without prefix length. */
  ip: string;
}

/** A route to hosts, of any table. */
export interface KernelRoute {
  /** With prefix length; that of everything is `0.0.0.0/0` or `::/0`. */
  dst: string;
  /** Of all its ways. */
  gateways: string[];
}

/** All of it. */
export interface KernelNetwork {
  links: KernelLink[];
  addresses: KernelAddress[];
  routes: KernelRoute[];
}

/** Reads a namespace; undefined where there is none at this path, or we may not look. */
export function readNetwork(netns: string): KernelNetwork | undefined {
  if (!isForeignNetns(netns)) return undefined;
  return inNetns(netns, readOwnNetwork);
}

/** Reads the namespace that this thread is in. */
export function readOwnNetwork(): KernelNetwork | undefined {
  const calls = kernelCalls();
  if (!calls) return undefined;
  const links = dump(calls, getLink, 16);
  const addresses = dump(calls, getAddress, 8);
  const routes = dump(calls, getRoute, 12);
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
/** `NLM_F_DUMP_INTR`: what was listed has changed meanwhile. */
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

/** Lists everything of a kind; undefined where the kernel does not answer. */
function dump(calls: KernelCalls, kind: number, fixedBytes: number): Message[] | undefined {
  for (let tries = 0; tries < triesMax; tries++) {
    const listed = dumpOnce(calls, kind, fixedBytes);
    if (listed !== "changed") return listed;
  }
  return undefined;
}

function dumpOnce(
  calls: KernelCalls,
  kind: number,
  fixedBytes: number,
): Message[] | "changed" | undefined {
  const socket = calls.socket(netlinkFamily, rawSocket, routeProtocol);
  if (socket < 0) return undefined;
  try {
    const request = new Uint8Array(headerBytes + fixedBytes);
    const header = new DataView(request.buffer);
    header.setUint32(0, request.length, true);
    header.setUint16(4, kind, true);
    header.setUint16(6, dumpFlags, true);
    if (calls.send(socket, request, BigInt(request.length), 0) < 0n) return undefined;
    return receive(calls, socket, fixedBytes);
  } finally {
    calls.close(socket);
  }
}

function receive(
  calls: KernelCalls,
  socket: number,
  fixedBytes: number,
): Message[] | "changed" | undefined {
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
      if (type === messageError) return undefined;
      if (type === messageDone) return isChanged ? "changed" : messages;
      // Copied: the buffer is filled again.
      messages.push(parseMessage(buffer.slice(at + headerBytes, at + length), fixedBytes));
      at += align(length);
    }
  }
}

const align = (length: number): number => (length + 3) & ~3;

function parseMessage(bytes: Uint8Array, fixedBytes: number): Message {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  return {
    fixed: view,
    attributes: parseAttributes(bytes, fixedBytes),
  };
}

function parseAttributes(bytes: Uint8Array, from: number): Map<number, Uint8Array> {
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

function toLink({ fixed, attributes }: Message): KernelLink {
  const name = attributes.get(linkName) ?? new Uint8Array();
  const mac = attributes.get(linkMac) ?? new Uint8Array();
  return {
    index: fixed.getInt32(4, true),
    name: new TextDecoder().decode(name).replace(/\0.*$/s, ""),
    mac: [...mac].map((byte) => byte.toString(16).padStart(2, "0")).join(":"),
  };
}

/** `IFA_ADDRESS`, `IFA_LOCAL`: of a link between two ends the second is ours. */
const [addressOfLink, addressLocal] = [1, 2];

function toAddress({ fixed, attributes }: Message): KernelAddress[] {
  const ip = formatBytes(attributes.get(addressLocal) ?? attributes.get(addressOfLink));
  return ip === "" ? [] : [{ index: fixed.getUint32(4, true), ip }];
}

function formatBytes(bytes: Uint8Array | undefined): string {
  if (bytes?.length !== 4 && bytes?.length !== 16) return "";
  const number = bytes.reduce((sum, byte) => sum * 256n + BigInt(byte), 0n);
  return formatIP(bytes.length === 4 ? 4 : 6, number);
}

/** `RTN_UNICAST`: the others are the kernel's own, or lead nowhere. */
const unicast = 1;
/** `RTM_F_CLONED`: a cached one. */
const cloned = 0x200;
/** `RTA_DST`, `RTA_GATEWAY`, `RTA_MULTIPATH`, `RTA_VIA`. */
const [routeDst, routeGateway, routeMultipath, routeVia] = [1, 5, 9, 18];
const [inet, inet6] = [2, 10];
/** `struct rtnexthop`. */
const nexthopBytes = 8;

function toRoute({ fixed, attributes }: Message): KernelRoute[] {
  const family = fixed.getUint8(0);
  if (family !== inet && family !== inet6) return [];
  if (fixed.getUint8(7) !== unicast || (fixed.getUint32(8, true) & cloned) !== 0) return [];
  const any = family === inet ? "0.0.0.0" : "::";
  const base = formatBytes(attributes.get(routeDst)) || any;
  const ways = [attributes, ...nexthops(attributes.get(routeMultipath))];
  return [{ dst: `${base}/${fixed.getUint8(1)}`, gateways: ways.flatMap(gatewayOf) }];
}

function gatewayOf(attributes: Map<number, Uint8Array>): string[] {
  // A gateway of the other family has that in front.
  const via = attributes.get(routeVia)?.subarray(2);
  const ip = formatBytes(attributes.get(routeGateway) ?? via);
  return ip === "" ? [] : [ip];
}

function nexthops(bytes: Uint8Array | undefined): Map<number, Uint8Array>[] {
  const found: Map<number, Uint8Array>[] = [];
  if (!bytes) return found;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  for (let at = 0; at + nexthopBytes <= bytes.length; ) {
    const length = view.getUint16(at, true);
    if (length < nexthopBytes || at + length > bytes.length) break;
    found.push(parseAttributes(bytes.subarray(at, at + length), nexthopBytes));
    at += align(length);
  }
  return found;
}
