/**
 * What the demo's two worlds share: the pods, the folder with the node's files, and the way a
 * runtime calls genie.
 */
import { readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { closeState } from "../../lib/database.ts";
import { isObject } from "../../lib/json.ts";
import { attachments } from "../../lib/recorded.ts";
import { openState } from "../../lib/recovery/database.ts";
import { makeHost } from "../fakes.ts";
import { type CommandLine, formatJson, type Screen } from "./screen.ts";

/** Folder of the repository: every command of the demo is typed there. */
export const root = dirname(dirname(import.meta.dir));
/** The program under show, as typed in {@link root}. */
export const genie = "dist/genie";
/** What the pods of the demo ask for. */
export const annotation = "blue,green@eth5";
/** Longest time one command may take, in ms. */
const commandTimeoutMs = 120_000;

/** A pod as the runtime knows it. */
export interface Pod {
  name: string;
  uid: string;
  containerId: string;
  netnsName: string;
  /** CNI_NETNS. */
  netns: string;
  /** From the call of ADD until DEL has succeeded. */
  isAttached: boolean;
  /** The merged result of ADD, as the runtime keeps it. */
  result: Record<string, unknown>;
}

/** Something that must hold, and whether it does. */
export interface Proof {
  ok: boolean;
  text: string;
}

/** Where the demo plays: in the kernel with the real plugins, or with the fakes of tests/. */
export interface World {
  /** The first line of the output. */
  title: string;
  /** CNI_PATH. */
  pluginDir: string;
  bridge: string;
  subnets: { blue: string; green: string };
  /** Path of the network namespace of a pod that is to be made. */
  netnsPath: (netnsName: string) => string;
  makeNetns: (pod: Pod) => Promise<void>;
  deleteNetns: (pod: Pod) => Promise<void>;
  /** Shows what a pod got. */
  showInside: (pod: Pod) => Promise<void>;
  /** Shows that two pods reach each other. */
  showTraffic: (from: Pod, to: Pod) => Promise<void>;
  /** Removes what belongs to the node rather than to a pod. */
  removeNetworks: () => Promise<void>;
  /** Is anything left of these pods? */
  proofs: (pods: Pod[]) => Proof[];
  /** Removes everything at once, whatever there is of it. Never throws. */
  cleanUp: (pods: Pod[]) => void;
}

/** Thrown where going on would show nothing. */
export class DemoError extends Error {}

/** Everything a step needs. */
export interface Stage {
  screen: Screen;
  world: World;
  /** Folder of this run. */
  dir: string;
  /** Marks what this run makes. */
  id: string;
}

/** What a command did. */
export interface Ran {
  status: number;
  stdout: string;
  stderr: string;
}

/** What varies between commands that are not shown. */
export interface RunSyncOptions {
  env?: Record<string, string>;
  stdin?: string;
  timeoutMs?: number;
}

/** Shows a command, runs it in the repository, and shows what it printed. */
export async function type(
  screen: Screen,
  line: CommandLine,
  { quiet = false, direct = false }: { quiet?: boolean; direct?: boolean } = {},
): Promise<Ran> {
  screen.command(line);
  const isDirect = direct && screen.isTerminal;
  const child = Bun.spawn(line.argv, {
    cwd: root,
    env: { ...process.env, ...line.env },
    stdin: line.stdin === undefined ? "ignore" : Bun.file(line.stdin),
    // A program that fits its output to the terminal must see it.
    stdout: isDirect ? "inherit" : "pipe",
    stderr: "pipe",
    timeout: commandTimeoutMs,
  });
  const [stdout, stderr] = await Promise.all([
    child.stdout?.text() ?? "",
    child.stderr.text(),
    child.exited,
  ]);
  const shown = [quiet ? "" : stdout, stderr].filter((text) => text.trim() !== "");
  for (const text of shown) screen.output(text);
  return { status: child.exitCode ?? -1, stdout, stderr };
}

/** Runs a command that is not shown, to its end. */
export function runSync(
  argv: string[],
  { env = {}, stdin = "", timeoutMs = commandTimeoutMs }: RunSyncOptions = {},
): Ran {
  const { exitCode, stdout, stderr } = Bun.spawnSync(argv, {
    cwd: root,
    env: { ...process.env, ...env },
    stdin: Buffer.from(stdin),
    timeout: timeoutMs,
  });
  return { status: exitCode ?? -1, stdout: stdout.toString(), stderr: stderr.toString() };
}

/** A pod of this run. */
export function makePod({ world, id }: Stage, name: string): Pod {
  const netnsName = `genie-demo-${id}-${name}`;
  return {
    name,
    uid: crypto.randomUUID(),
    containerId: `${id}-${name}`,
    netnsName,
    netns: world.netnsPath(netnsName),
    isAttached: false,
    result: {},
  };
}

/** Paths of the node's files in the folder of a run. */
export function files(dir: string) {
  return {
    table: join(dir, "plugins.toml"),
    config: join(dir, "00-genie.conflist"),
    ipam: join(dir, "ipam"),
    state: join(dir, "state"),
  };
}

/** The node's plugin table: blue is a bridge with port mapping, green is point to point. */
export function tableText({ dir, world }: Stage): string {
  const { ipam, state } = files(dir);
  return `conf_dir = "${join(dir, "net.d")}"
bin_dirs = ["${world.pluginDir}"]
state_dir = "${state}"

[default]
networks = ["blue"]

[plugins.blue.config]
cniVersion = "1.0.0"
[[plugins.blue.config.plugins]]
type = "bridge"
bridge = "${world.bridge}"
isDefaultGateway = true
[plugins.blue.config.plugins.ipam]
type = "host-local"
ranges = [[{ subnet = "${world.subnets.blue}" }]]
dataDir = "${ipam}"
[[plugins.blue.config.plugins]]
type = "portmap"
capabilities = { portMappings = true }

[plugins.green.config]
cniVersion = "1.0.0"
[[plugins.green.config.plugins]]
type = "ptp"
[plugins.green.config.plugins.ipam]
type = "host-local"
ranges = [[{ subnet = "${world.subnets.green}" }]]
routes = [{ dst = "0.0.0.0/0" }]
dataDir = "${ipam}"
`;
}

/** The key under which containerd and CRI-O hand over annotations. */
const capability = "io.kubernetes.cri.pod-annotations";

/** The CNI config through which a runtime finds genie. */
export function cniConfig(dir: string) {
  return {
    cniVersion: "1.0.0",
    cniVersions: ["0.4.0", "1.0.0", "1.1.0"],
    name: "genie",
    plugins: [
      { type: "genie", capabilities: { [capability]: true }, plugins_file: files(dir).table },
    ],
  };
}

/**
 * One call of a runtime, as containerd makes it: the plugin's entry of the CNI config with version,
 * name, runtimeConfig and the last result on stdin, the rest in the environment.
 *
 * @param netns in place of the pod's: "" when it is gone
 * @returns the command line; its stdin is a file in the folder of the run
 */
export function runtimeCall(
  { dir, world }: Stage,
  command: "ADD" | "CHECK" | "DEL",
  pod: Pod,
  netns = pod.netns,
): CommandLine & { stdin: string } {
  const { name, plugins } = cniConfig(dir);
  const hasResult = command !== "ADD" && netns !== "" && Object.keys(pod.result).length > 0;
  const request = {
    cniVersion: "1.0.0",
    name,
    ...plugins[0],
    runtimeConfig: { [capability]: { cni: annotation } },
    ...(hasResult && { prevResult: pod.result }),
  };
  const stdin = join(dir, `${pod.name}-${command.toLowerCase()}.json`);
  writeFileSync(stdin, `${formatJson(request, 100)}\n`);
  const args = [
    "IgnoreUnknown=1",
    "K8S_POD_NAMESPACE=demo",
    `K8S_POD_NAME=${pod.name}`,
    `K8S_POD_INFRA_CONTAINER_ID=${pod.containerId}`,
    `K8S_POD_UID=${pod.uid}`,
  ];
  const env = {
    CNI_COMMAND: command,
    CNI_IFNAME: "eth0",
    CNI_CONTAINERID: pod.containerId,
    CNI_NETNS: netns,
    CNI_PATH: world.pluginDir,
    CNI_ARGS: args.join(";"),
  };
  return { argv: [genie], env, stdin };
}

/** The names of a result's interfaces: inside the pod, or on the node. */
export function interfaceNames({ result }: Pod, where: "pod" | "node"): string[] {
  const list = Array.isArray(result["interfaces"]) ? result["interfaces"] : [];
  return list
    .filter((one) => isObject(one) && Boolean(one["sandbox"]) === (where === "pod"))
    .map((one) => String(one["name"]));
}

/** The address of a pod on one of its interfaces, without its prefix length. */
export function addressOf({ result }: Pod, ifName: string): string {
  const interfaces = Array.isArray(result["interfaces"]) ? result["interfaces"] : [];
  const ips = Array.isArray(result["ips"]) ? result["ips"] : [];
  const found = ips.find((ip) => {
    const one = interfaces[ip["interface"]];
    return one?.["name"] === ifName && Boolean(one["sandbox"]);
  });
  return String(found?.["address"] ?? "").replace(/\/.*/, "");
}

/** What genie's record holds: attachments such as `579ab5-web eth0`, and locks. */
export function record(dir: string): { attached: string[]; locks: unknown[] } {
  const host = makeHost();
  const state = openState(host, files(dir).state);
  try {
    const attached = attachments(host, state).map(
      ({ containerId, ifName }) => `${containerId} ${ifName}`,
    );
    return { attached, locks: state.database.query("SELECT * FROM operations").all() };
  } finally {
    closeState(state);
  }
}

/** The record must be empty: no attachment, no lock, no file but it and the parsed table. */
export function recordProofs(dir: string): Proof[] {
  const { attached, locks } = record(dir);
  const { state } = files(dir);
  const own = /^(genie\.db(-wal|-shm)?|table\.json)$/;
  const names = readdirSync(state).filter((name) => !own.test(name));
  return [
    {
      ok: attached.length + locks.length === 0,
      text: `no attachment and no lock in genie.db${list(attached)}`,
    },
    { ok: names.length === 0, text: `no file of a pod beside genie.db in ${state}${list(names)}` },
  ];
}

/** What is there against the claim, for the end of a proof's line. */
export function list(left: string[]): string {
  return left.length === 0 ? "" : `, but: ${left.join(", ")}`;
}
