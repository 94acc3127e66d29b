/**
 * Who is alive on this node, without asking a runtime: network namespaces that a process is in or
 * that have a name, the addresses in them, and containers that processes belong to. What decides
 * that something is nobody's any more; so when in doubt a container counts as alive.
 */
import { readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { type KernelNetwork, readNetwork, readOwnNetwork } from "../check.ts";
import { isForeignNetns, netnsId } from "../kernel.ts";
import { orElse } from "../recovery/tried.ts";

/** What was seen. */
export interface LiveContainers {
  /** Identities of network namespaces, see `netnsId`. */
  netns: ReadonlySet<string>;
  /** Addresses of their interfaces, canonical. */
  addresses: ReadonlySet<string>;
  /** Does some process, or a folder of a runtime, belong to this container? */
  hasContainer: (id: string) => boolean;
}

/** The inode of the first pid namespace, which the kernel fixes (`PROC_PID_INIT_INO`). */
const firstPidNamespace = "pid:[4026531836]";
/** What makes and keeps containers, or is the init of a machine: a pod has none of them. */
const nodeProgram =
  /^Name:\t(containerd(-shim)?|crio|dockerd|podman|conmon)$|^Name:\tsystemd\n(.*\n)*Pid:\t1$/m;
/** A process of the namespace of `/proc` itself, and of none below it. */
const isOfThisOne = /^NSpid:\t\d+$/m;
/** Where network namespaces have names. */
const namedDirs = ["/run/netns", "/run/docker/netns"];
/** Where runtimes have a folder per container. */
const containerDirs = [
  "/run/containerd/io.containerd.runtime.v2.task/k8s.io",
  "/run/containerd/io.containerd.runtime.v2.task/default",
  "/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io",
  "/run/crio",
  "/run/containers/storage/overlay-containers",
  ...namedDirs,
];
/** A shorter name of a container is looked for as a whole word. */
const longIdLength = 12;

/**
 * Looks around. @returns undefined where other processes of the node cannot be seen: in a pod with
 * a pid namespace of its own everybody would seem dead
 */
export function findLiveContainers(): LiveContainers | undefined {
  if (!seesProcesses()) return undefined;
  const processes = namesIn("/proc").filter((name) => /^\d+$/.test(name));
  const paths = [
    ...processes.map((pid) => `/proc/${pid}/ns/net`),
    ...namedDirs.flatMap((dir) => namesIn(dir).map((name) => join(dir, name))),
  ];
  const namespaces = new Map(paths.map((path) => [netnsId(path), path]));
  namespaces.delete("");
  const addresses = readAddresses(namespaces);
  if (!addresses) return undefined;
  const texts = processes.flatMap((pid) =>
    ["cgroup", "cmdline"].map((file) => textOf(`/proc/${pid}/${file}`)),
  );
  const said = [...texts, ...containerDirs.flatMap(namesIn)].join("\n");
  const words = new Set(said.split(/[^A-Za-z0-9_.]+/));
  const hasContainer = (id: string) =>
    id.length >= longIdLength ? said.includes(id) : words.has(id);
  return { netns: new Set(namespaces.keys()), addresses, hasContainer };
}

/**
 * Are the processes of the node those that we see? In a namespace that is not the first (kind, k3d,
 * LXC) they are when a runtime is among them: what it starts is in its namespace or in one below.
 */
export function seesProcesses(): boolean {
  if (readlinkSync("/proc/self/ns/pid") === firstPidNamespace) return true;
  return namesIn("/proc").some((name) => {
    const status = /^\d+$/.test(name) ? textOf(`/proc/${name}/status`) : "";
    return nodeProgram.test(status) && isOfThisOne.test(status);
  });
}

/** The addresses in all of them; undefined when one may not be entered. */
function readAddresses(namespaces: ReadonlyMap<string, string>): Set<string> | undefined {
  const found = readOwnNetwork();
  if (!found) return undefined;
  const addresses = new Set(found.addresses.map(({ ip }) => ip));
  for (const path of namespaces.values()) {
    const network = readIfThere(path);
    if (network === "hidden") return undefined;
    for (const { ip } of network?.addresses ?? []) addresses.add(ip);
  }
  return addresses;
}

/** It may end while we look, be our own, or a file that stands where a namespace was. */
function readIfThere(path: string): KernelNetwork | "hidden" | undefined {
  return orElse(undefined, () => {
    if (!isForeignNetns(path)) return undefined;
    return readNetwork(path) ?? (isForeignNetns(path) ? "hidden" : undefined);
  });
}

const namesIn = (dir: string): string[] => orElse([], () => readdirSync(dir));
const textOf = (path: string): string => orElse("", () => readFileSync(path, "utf8"));
