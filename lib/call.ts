/**
 * The shapes of one call of genie: the host it runs on, what the runtime asks, the plan, the
 * requests to delegates and how they end. Types alone: nothing of it is loaded.
 */
import type { PluginSearch } from "./binaries.ts";
import type { Choice } from "./choice/choose.ts";
import type { Reader } from "./choice/ipam.ts";
import type { CniError, CniVersion, Command, LogLevel } from "./cni.ts";
import type { Config } from "./config/schema.ts";
import type { State } from "./database.ts";
import type { Objects } from "./kubernetes/objects_of_call.ts";
import type { Network } from "./networks.ts";
import type { Pod, SelectionElement } from "./pod.ts";
import type { AccessTarget, Verdict } from "./policy/access.ts";
import type { Enforced } from "./policy/enforce.ts";
import type { Attachment, Journal, Operation, Result } from "./record.ts";

/** Everything outside the program except files. Tests pass their own. */
export interface Host {
  env: Record<string, string | undefined>;
  /** Reads stdin to its end. @throws CniError 6 when it is larger than the limit or not UTF-8 */
  stdin: () => string;
  stdout: (text: string) => void;
  stderr: (text: string) => void;
  /** Milliseconds since the epoch. */
  now: () => number;
  /** Aborts on SIGTERM and SIGINT: an ADD then rolls back. */
  signal: AbortSignal;
  /** Log lines below the level are dropped; with `file` "" they go to stderr alone. */
  log: { level: LogLevel; file: string };
  /** The process ends with this call: closing the database, with its checkpoint, can be skipped. */
  endsAtOnce?: boolean;
  /** What to print of a delegate's stderr; absent: that as it is. */
  relay?: (plugin: string, text: string) => string;
  /** Makes SIGTERM and SIGINT abort `signal`; before that they end the process at once. */
  catchSignals?: () => void;
}

/** The network config on stdin; only the keys of the protocol are typed. */
export type StdinConfig = {
  cniVersion?: string;
  name: string;
  type?: string;
  args?: Record<string, unknown>;
  runtimeConfig?: Record<string, unknown>;
  [key: string]: unknown;
};

/** One checked call of the runtime. Fields that a command does not use are "". */
export interface Request {
  command: Exclude<Command, "VERSION">;
  containerId: string;
  /** Path of the network namespace; "" when it is gone or not given. */
  netns: string;
  ifName: string;
  /** CNI_ARGS as received. */
  args: string;
  /** CNI_PATH, split. */
  path: string[];
  /** The version to answer in: `cniVersion` of the config, 0.1.0 when it names none. */
  cniVersion: CniVersion;
  config: StdinConfig;
}

/** One network a pod is to have. */
export interface Wanted extends SelectionElement {
  /**
   * Where its config is: `node`, in the plugin table or on disk; `definition`, in a
   * NetworkAttachmentDefinition; `logical`, in a Logicalnetwork; `multus`, where Multus looks.
   */
  from: "node" | "definition" | "logical" | "multus";
  /** Namespace of the object; "" for what is not an object. */
  namespace: string;
  /** For people: the rule or annotation that selects it. */
  reason: string;
  capabilityArgs?: Record<string, unknown>;
  cniArgs?: Record<string, unknown>;
  defaultRoute?: string[];
  /** What is wrong in the annotation, though it is clear what is meant. */
  warning?: string;
  /** Set when it is not of the primary set. */
  isFurther?: true;
}

/** A wanted network on its interface. */
export type NamedWanted = Wanted & { ifName: string };

/** What decided the primary set; `cni` and `logical` lead to CNI-Genie's own status annotation. */
export type Decision = "default-network" | "cni" | "logical" | "choice" | "default";

/** All networks of a pod, in order. When `decision` is "choice" the primary set is still empty. */
export interface WantedSet {
  decision: Decision;
  primarySet: Wanted[];
  further: Wanted[];
}

/** The call that is planned for. */
export interface PlanCall {
  host: Host;
  config: Config;
  request: Request;
  /** The API as this call uses it; set when something first needs it. */
  objects?: Objects;
  /** The record, in which a choice is written down; undefined for `genie plan`. */
  state?: State;
  /** Reads the record in place of `state`; gives undefined where there is none. */
  reader?: <T>(inside: (reader: Reader) => T) => T | undefined;
  /** Takes a row for a network that the pod may not use. */
  journal?: Journal;
  /** Takes the decision about each network; then a denial ends nothing. */
  verdicts?: Verdict[];
  /** Networks of our own choice that failed to attach in this call. */
  failed?: ReadonlyMap<string, CniError>;
}

/** What an ADD will do, in the order it will do it: the primary attachment first. */
export interface Plan {
  pod: Pod;
  /** What decided the primary set. */
  decision: Decision;
  /** Interfaces of the primary set. */
  primarySet: ReadonlySet<string>;
  attachments: Attachment[];
  /** The numbers behind it, where the choice was ours. */
  choice?: Choice;
}

/** A wanted network with its config: the node's own, or an object's. */
export type Resolved = Network &
  AccessTarget & {
    /** Device plugin resource it takes a device from. */
    resourceName?: string;
  };

/** What an attachment is made from, besides the network. */
export interface AttachmentSource {
  config: Config;
  request: Request;
  search: PluginSearch;
  pod: Pod;
}

/** What running delegates takes besides the attachment. */
export interface Chain {
  host: Host;
  /** CNI_NETNS for the delegates; "" when it is gone. */
  netns: string;
  /** Marks the delegates of this operation in their environment, see `lock.ts`. */
  token: string;
  /** When the whole operation must have ended, ms since the epoch. */
  deadlineMs: number;
  /** Ends the running delegate when it aborts. */
  signal?: AbortSignal | undefined;
  /** Takes a row for every request to a plugin, and for every network. */
  journal?: Journal;
}

/** One request to one plugin of a chain. */
export interface PluginCall {
  command: "ADD" | "DEL" | "CHECK" | "GC" | "STATUS";
  /** Index of the plugin in the list. */
  index: number;
  /** The result before it (ADD), or of the whole ADD. */
  result?: Result | undefined;
  /** Reserved keys of the request config. */
  reserved?: Record<string, unknown>;
}

/** One call of ADD. */
export interface Call {
  host: Host;
  request: Request;
  config: Config;
  state: State;
  journal: Journal;
  startedMs: number;
  operation: Operation;
  chain: Chain;
  /** The pod, being looked up. */
  pod: Promise<Pod>;
  /** The API as this call uses it; set when something first needs it. */
  objects?: Objects;
  /** What is on record and being attached; undefined before. */
  plan?: Plan | undefined;
  /** What was attached, the primary first. */
  made: Done[];
  /** Attachments that are not there any more, with the errors of their undoing. */
  undoErrors: Map<Attachment, CniError[]>;
  /** Networks of our own choice that failed to attach, in the order they were tried. */
  failed: Map<string, CniError>;
  /** Policy in force; its lock is held until this attempt ends. */
  enforced?: Enforced | undefined;
}

/** An attachment that was made. */
export interface Done {
  attachment: Attachment;
  result: Result;
}

/** How an ADD through a chain ended. */
export type Added =
  | { kind: "attached"; result: Result }
  /** `undo` holds the errors of its own undoing: empty when nothing of it is left. */
  | { kind: "failed"; error: CniError; undo: CniError[] };

/** What varies per run. The child has no environment but `env`. */
export interface RunOptions {
  env: Record<string, string>;
  stdin: string;
  /** Deadline for everything, retries included. */
  timeoutMs: number;
  /** Ends the run like the deadline does. */
  signal?: AbortSignal | undefined;
  /** Path of the network namespace to run in; absent: ours. */
  netns?: string;
  /** Default 1 MiB; more is an `overflow`. */
  stdoutBytesMax?: number;
}

/** How a run ended. `spawn` means that nothing ran at all. */
export type Ending =
  | { kind: "exit"; status: number }
  | { kind: "signal"; signal: string }
  | { kind: "timeout" }
  | { kind: "overflow" }
  | { kind: "aborted" }
  /** `reason` is an errno name: ENOENT, EACCES, ENOEXEC, ETXTBSY, … */
  | { kind: "spawn"; reason: string };

/** The outputs of a run, whatever its ending. */
export interface Output {
  /** The first 1 MiB, or `stdoutBytesMax`. */
  stdout: string;
  /** False when stdout was not UTF-8: `stdout` then holds replacement characters. */
  stdoutIsText: boolean;
  /** The last 64 KiB; invalid UTF-8 is replaced. */
  stderr: string;
  durationUs: number;
}
