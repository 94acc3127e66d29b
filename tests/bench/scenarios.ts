/**
 * What the bench measures, as data: who is called, with which environment and stdin, and whom it is
 * compared with. Knows nothing of how it is measured.
 */
import { annotationsCapability } from "../../lib/pod.ts";
import {
  type ApiKind,
  type BenchNode,
  cniArgs,
  cniVersion,
  networkCount,
  type Pod,
  podName,
  startApi,
  tableFile,
  writeTable,
} from "./node.ts";

/** The operations that are measured, in the order a container sees them. */
export const verbs = ["VERSION", "STATUS", "ADD", "CHECK", "DEL"] as const;
export type Verb = (typeof verbs)[number];

/** One process. */
export interface Call {
  file: string;
  /** Its whole environment. */
  env: Record<string, string>;
  stdin: string;
}

/** One contender. */
export interface Scenario {
  name: string;
  /** Scenario it is compared with. */
  baseline?: string;
  verbs: readonly Verb[];
  /** Makes what it needs, once. */
  prepare?: (node: BenchNode) => Promise<void> | void;
  /** The processes of one operation, run one after the other. */
  calls: (node: BenchNode, verb: Verb, pod: Pod) => Call[];
}

const lifecycle = ["ADD", "CHECK", "DEL"] as const;

/** What the plugins themselves cost, and what the least program costs. */
const baselines: readonly Scenario[] = [
  {
    name: "floor",
    verbs,
    calls: (node, verb, pod) => [
      { file: node.floor, env: environment(node, verb, pod), stdin: "" },
    ],
  },
  bare("bare 1 network", 1, ["VERSION", ...lifecycle]),
  bare("bare 2 networks", 2, lifecycle),
  bare("bare 5 networks", networkCount, lifecycle),
  bareIdle("bare idle plugin"),
];

/** The genie that is measured, and the one that `--compare` names; each name is in `BenchNode`. */
export type Build = "genie" | "old";

/** All that one genie is asked to do. */
function ofBuild(build: Build): Scenario[] {
  return [
    genie(build, "1 network", 1, "bare 1 network"),
    genie(build, "2 networks", 2, "bare 2 networks"),
    genie(build, "5 networks", networkCount, "bare 5 networks"),
    genieIdle(build, "idle plugin", "bare idle plugin"),
    genieWithApi(build, "API 1 network", { baseline: "bare 1 network" }),
    genieWithApi(build, "API 1 object", { objects: 1, baseline: "bare 2 networks" }),
    genieWithApi(build, "API 4 objects", {
      ...{ objects: networkCount - 1, baseline: "bare 5 networks" },
    }),
    genieWithApi(build, "API 1 object, 10 ms away", {
      ...{ objects: 1, delayMs: 10, baseline: "bare 2 networks" },
    }),
    genieWithApi(build, "API 1 object, 10 ms of wire", {
      ...{ objects: 1, distanceMs: 10, baseline: "bare 2 networks" },
    }),
  ];
}

/** Every contender but peers. */
export const scenarios: readonly Scenario[] = [...baselines, ...ofBuild("genie")];
const olds: readonly Scenario[] = ofBuild("old");

/** The storms are run with these and their baselines, in this order. */
export const stormScenarios = ["genie 1 network", "genie API 1 network"];

/** The same task of the other genie: `old 1 network` of `genie 1 network`; else undefined. */
export function oldName(name: string): string | undefined {
  return name.startsWith("genie ") ? `old ${name.slice("genie ".length)}` : undefined;
}

/** Each of genie's followed by the same of the other genie, so that both meet the same machine. */
export function withOld(all: readonly Scenario[]): Scenario[] {
  return all.flatMap((one) => [one, ...olds.filter(({ name }) => name === oldName(one.name))]);
}

/** Whom one operation of a scenario is compared with. */
export function baselineOf({ name, baseline }: Scenario, verb: Verb): string | undefined {
  // These two run no delegate, so there the program is compared with the least program.
  if (verb === "VERSION" || verb === "STATUS") return name === "floor" ? undefined : "floor";
  return baseline;
}

/** Those of `all` whose name holds `only`, with their baselines. */
export function selectScenarios(all: readonly Scenario[], only: string): Scenario[] {
  const wanted = all.filter(({ name }) => name.includes(only));
  const baselines = new Set(wanted.flatMap((one) => verbs.map((verb) => baselineOf(one, verb))));
  return all.filter((one) => wanted.includes(one) || baselines.has(one.name));
}

/** The delegates themselves, one process per network, called as the runtime would call them. */
function bare(name: string, count: number, measured: readonly Verb[]): Scenario {
  return {
    name,
    verbs: measured,
    calls: (node, verb, pod) => {
      const calls = node.networks.slice(0, count).map((plugin, i) => ({
        file: `${node.pluginDir}/${plugin.type}`,
        env: environment(node, verb, pod, { ifName: `eth${i}` }),
        stdin: JSON.stringify({ ...plugin, ...previous(verb, pod.results[i]) }),
      }));
      return verb === "DEL" ? calls.reverse() : calls;
    },
  };
}

/** The plugin that does nothing. */
function bareIdle(name: string): Scenario {
  return {
    name,
    verbs: ["ADD", "DEL"],
    calls: (node, verb, pod) => [
      {
        file: `${node.idleDir}/${node.idleNetwork.type}`,
        env: { ...environment(node, verb, pod), CNI_PATH: node.idleDir },
        stdin: JSON.stringify({ ...node.idleNetwork, ...previous(verb, pod.results[0]) }),
      },
    ],
  };
}

/** Genie with the annotations handed over by the runtime: no API server is asked. */
function genie(build: Build, task: string, count: number, baseline: string): Scenario {
  const name = `${build} ${task}`;
  return {
    name,
    baseline,
    verbs: count === 1 ? verbs : lifecycle,
    prepare: (node) => void writeTable(node, name),
    calls: (node, verb, pod) => {
      const networks = node.networks.slice(0, count).map((network) => network.name);
      return [genieCall(node, verb, pod, { build, name, cni: networks.join(",") })];
    },
  };
}

/** Genie in front of a plugin that does nothing: what is left is genie's. */
function genieIdle(build: Build, task: string, baseline: string): Scenario {
  const name = `${build} ${task}`;
  return {
    name,
    baseline,
    verbs: ["ADD", "DEL"],
    prepare: (node) => void writeTable(node, name, "", true),
    calls: (node, verb, pod) => {
      const call = genieCall(node, verb, pod, { build, name, cni: node.idleNetwork.name });
      return [{ ...call, env: { ...call.env, CNI_PATH: node.idleDir } }];
    },
  };
}

/**
 * Genie with an API server. Without objects it reads the pod from it; with some the runtime hands
 * over the annotations, the first network is the node's, the others are
 * NetworkAttachmentDefinitions, and the status is written.
 */
function genieWithApi(
  build: Build,
  task: string,
  { objects = 0, baseline, ...api }: { objects?: number; baseline: string } & ApiKind,
): Scenario {
  const name = `${build} ${task}`;
  return {
    name,
    baseline,
    verbs: lifecycle,
    prepare: async (node) => {
      const kubeconfig = await startApi(node, api);
      writeTable(node, name, `[kubernetes]\nkubeconfig = "${kubeconfig}"`);
    },
    calls: (node, verb, pod) => {
      if (objects === 0) return [genieCall(node, verb, pod, { build, name })];
      const [cni = "", ...others] = node.networks.map((network) => network.name);
      const wanted = others.slice(0, objects).join(",");
      return [genieCall(node, verb, pod, { build, name, cni, objects: wanted })];
    },
  };
}

/** One call of genie; without `cni` the runtime hands over no annotations. */
function genieCall(
  node: BenchNode,
  verb: Verb,
  pod: Pod,
  { build, name, cni, objects }: { build: Build; name: string; cni?: string; objects?: string },
): Call {
  const annotations = {
    cni,
    ...(objects !== undefined && { "k8s.v1.cni.cncf.io/networks": objects }),
  };
  const config = {
    // STATUS exists since 1.1.0; the delegates of Debian do not know it and are passed over.
    cniVersion: verb === "STATUS" ? "1.1.0" : cniVersion,
    name: "genie",
    type: "genie",
    plugins_file: tableFile(node, name),
    capabilities: { [annotationsCapability]: true },
    ...(cni !== undefined && { runtimeConfig: { [annotationsCapability]: annotations } }),
    ...previous(verb, pod.results[0]),
  };
  return {
    file: node[build],
    env: environment(node, verb, pod),
    stdin: JSON.stringify(config),
  };
}

/** What the runtime hands back with CHECK and DEL. */
export function previous(verb: Verb, prevResult: object | undefined): object {
  return (verb === "CHECK" || verb === "DEL") && prevResult ? { prevResult } : {};
}

/** The environment of one call; `name` is that of the pod. */
export function environment(
  node: BenchNode,
  verb: Verb,
  pod: Pod,
  { ifName = "eth0", name = podName } = {},
): Record<string, string> {
  const common = {
    PATH: process.env["PATH"] ?? "/usr/sbin:/usr/bin:/sbin:/bin",
    CNI_COMMAND: verb,
    CNI_PATH: node.pluginDir,
  };
  if (verb === "VERSION" || verb === "STATUS") return common;
  return {
    ...common,
    CNI_CONTAINERID: pod.containerId,
    CNI_NETNS: pod.netns,
    CNI_IFNAME: ifName,
    CNI_ARGS: cniArgs(pod, name),
  };
}
