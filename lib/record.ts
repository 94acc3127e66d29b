/** Types of what is on record: attachments, locks, the ledger. Nothing of it is loaded. */
import type { NetworkConfigList } from "./networks.ts";

/** Who the pod is, as far as the caller said. */
export interface PodIdentity {
  namespace: string;
  name: string;
  uid: string;
}

/** One network of one container on one interface: what is needed to add, check and delete it. */
export interface Attachment {
  containerId: string;
  /** CNI_IFNAME of the call it belongs to; a DEL names it by this. */
  requestIfName: string;
  /** Name of the genie config it came through; a GC of another config ignores it. */
  requestNetwork: string;
  /** Interface name in the pod, fixed before the first delegate runs. */
  ifName: string;
  /** The one that carries CNI_IFNAME: first in the result, receives the runtime's capabilities. */
  primary: boolean;
  /** Name by which it was selected. */
  network: string;
  /** Why it is attached, for people. */
  reason: string;
  list: NetworkConfigList;
  /** Absolute path of the binary of each plugin of the list. */
  plugins: string[];
  /** CNI_ARGS for the delegates: the runtime's without our own keys. */
  cniArgs: string;
  /** CNI_PATH for the delegates. */
  cniPath: string;
  capabilityArgs: Record<string, unknown>;
  /** Keys for `args` of the request config. */
  args: Record<string, unknown>;
  /** Limit for each delegate call. */
  timeoutMs: number;
  netns: string;
  pod: PodIdentity;
  /** Gateways that become the pod's default route; empty: its own (NPWG v1.3 §4.1.2.1.9). */
  defaultRoute?: string[];
  /** The device of a device plugin that it was given. */
  device?: { resourceName: string; deviceId: string };
  /** The table says that genie enforces plain NetworkPolicy on it. */
  enforcesPlain?: true;
  /** File with its device information (NPWG Device Information Specification). */
  deviceInfoFile?: string;
  /** A runtime made it: libcni's cache has an entry of it, which goes with its DEL. */
  isCached?: true;
}

/**
 * `planned`: its delegates may be running or dead; `attached`: ADD succeeded; `failing`: a DEL
 * failed, the runtime will retry; `leaked`: given up after the retry window, `genie gc` retries.
 */
export type AttachmentState = "planned" | "attached" | "failing" | "leaked";

/** An attachment as it stands in the record. */
export interface StoredAttachment extends Attachment {
  state: AttachmentState;
  /** Wire form of its final result at the list's version, as stored: hostile until parsed. */
  result: unknown;
  /** When its first DEL failed, ms since the epoch; 0 when none did. */
  failedAtMs: number;
  error: string;
  createdAtMs: number;
  /** Identity of the network namespace it was made in, "" when unknown. */
  netnsId: string;
  /**
   * Key of its row, `eth0/1a2b3c4d`, where its DEL waits while another network has its interface:
   * it left nothing in the pod.
   */
  parkedAs?: string;
}

/** One call of the runtime by what identifies it. */
export interface CallId {
  containerId: string;
  requestIfName: string;
}

/** A row whose plan cannot be read: its interface is known, its plugins are not. */
export interface DamagedAttachment extends CallId {
  ifName: string;
}

/** What is on record; each list in the order it was made. */
export interface Recorded {
  readable: StoredAttachment[];
  damaged: DamagedAttachment[];
}

/** Annotations of a pod that wait to be published. */
export interface WaitingStatus extends CallId {
  pod: PodIdentity;
  annotations: Record<string, string>;
}

/** Who holds the lock of a container. */
export interface Operation {
  containerId: string;
  command: string;
  pid: number;
  /** Start time of the process in clock ticks after boot; a reused pid has another. */
  started: string;
  /** Boot of the machine in which `pid` and `started` mean anything. */
  bootId: string;
  /** Identity of the pid namespace in which `pid` means anything. */
  pidNamespace: string;
  /** Marks the delegates of this operation, see {@link tokenVariable}. Never used twice. */
  token: string;
  atMs: number;
}

/** One call of genie, one network of it with its whole chain, or one request to a plugin. */
export type LedgerKind = "call" | "network" | "plugin";

/** How it ended; `denied`: a rule forbade it. */
export type LedgerOutcome = "ok" | "failed" | "denied";

/** One row of the ledger. Texts are "" and numbers 0 where there is nothing to say. */
export interface LedgerRow {
  /** When the call of genie began, ms since the epoch. */
  atMs: number;
  kind: LedgerKind;
  /** ADD, DEL, CHECK, GC or STATUS. */
  command: string;
  containerId: string;
  podNamespace: string;
  podName: string;
  podUid: string;
  network: string;
  /** Plugin type; for a network those of its chain, separated by commas. */
  plugin: string;
  ifName: string;
  durationUs: number;
  outcome: LedgerOutcome;
  /** CNI error code, 0 for a success. */
  code: number;
  error: string;
  /** Addresses of the result, separated by commas. */
  addresses: string;
  /** 16 hex digits: a hash of the config list. */
  configHash: string;
  /** Why: annotation, default, choice, definition ... */
  decidedBy: string;
  /** The rule that denied, with file and line. */
  rule: string;
  /** The numbers of an automatic choice, JSON. */
  choice: string;
}

/** The rows of one call of genie, collected while it runs. */
export interface Journal {
  /** What all rows of the call have in common. */
  base: LedgerRow;
  rows: LedgerRow[];
  /** On the monotonic clock, in ns. */
  startedNs: number;
}

/** What a row says about one attachment. */
export interface Noted {
  command: string;
  containerId: string;
  network: string;
  ifName: string;
  reason: string;
  pod: PodIdentity;
  list: NetworkConfigList;
  durationUs: number;
  error?: unknown;
}

/** A network interface that an attachment made, in the pod or on the host. */
export interface Interface {
  name: string;
  mac?: string;
  mtu?: number;
  /** Network namespace it is in; absent for one on the host. */
  sandbox?: string;
  socketPath?: string;
  pciID?: string;
}

/** An IP address that an attachment assigned. */
export interface Ip {
  /** Canonical text with prefix length, e.g. `10.1.0.5/16`. */
  address: string;
  gateway?: string;
  /** Index into {@link Result.interfaces}; never out of range. */
  interface?: number;
}

/** A route that an attachment made. */
export interface Route {
  /** Canonical text with prefix length. */
  dst: string;
  gw?: string;
  mtu?: number;
  advmss?: number;
  /** Lower is preferred. */
  priority?: number;
  /** Routing table; absent means main. */
  table?: number;
  /** 0 global, 253 link, 254 host. */
  scope?: number;
}

/** Resolver settings of a network; no list is ever empty. */
export interface Dns {
  nameservers?: string[];
  domain?: string;
  search?: string[];
  options?: string[];
}

/** The result of an ADD, in the one internal form. */
export interface Result {
  interfaces: Interface[];
  ips: Ip[];
  routes: Route[];
  dns: Dns;
}

/** Host-side interface of an attachment, by which its traffic is counted. */
export interface TrafficSource {
  containerId: string;
  ifName: string;
  network: string;
  hostIfName: string;
}
