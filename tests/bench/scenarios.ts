/**
 * What the bench measures, as data: who is called, with which environment and stdin, and whom it is
 * compared with. Knows nothing of how it is measured.
 */
import { annotationsCapability } from "../../lib/pod.ts";
import {
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

/** Every contender. A baseline comes before whoever refers to it. */
export const scenarios: readonly Scenario[] = [
  {
    name: "floor",
    verbs,
    calls: (node, verb, pod) => [
      { file: node.floor, env: environment(node, verb, pod), stdin: "" },
    ],
  },
  bare("bare 1 network", 1, ["VERSION", ...lifecycle]),
  genie("genie 1 network", 1, verbs, "bare 1 network"),
  bare("bare 2 networks", 2, lifecycle),
  genie("genie 2 networks", 2, lifecycle, "bare 2 networks"),
  bare("bare 5 networks", networkCount, lifecycle),
  genie("genie 5 networks", networkCount, lifecycle, "bare 5 networks"),
  genieWithApi("genie API 1 network", "bare 1 network"),
  genieWithObjects("genie API 1 object", 1, 0, "bare 2 networks"),
  genieWithObjects("genie API 4 objects", networkCount - 1, 0, "bare 5 networks"),
  genieWithObjects("genie API 1 object, 10 ms away", 1, 10, "bare 2 networks"),
];

/** The storms are run with these and their baseline, in this order. */
export const stormScenarios = ["genie 1 network", "genie API 1 network"];

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

/** Genie with the annotations handed over by the runtime: no API server is asked. */
function genie(name: string, count: number, measured: readonly Verb[], baseline: string): Scenario {
  return {
    name,
    baseline,
    verbs: measured,
    prepare: (node) => void writeTable(node, name),
    calls: (node, verb, pod) => {
      const networks = node.networks.slice(0, count).map((network) => network.name);
      return [genieCall(node, verb, pod, name, { cni: networks.join(",") })];
    },
  };
}

/** Genie that reads the pod from the API server. */
function genieWithApi(name: string, baseline: string): Scenario {
  return {
    name,
    baseline,
    verbs: lifecycle,
    prepare: async (node) => {
      const kubeconfig = await startApi(node, 0);
      writeTable(node, name, `[kubernetes]\nkubeconfig = "${kubeconfig}"`);
    },
    calls: (node, verb, pod) => [genieCall(node, verb, pod, name)],
  };
}

/**
 * The first network from the node, further ones as NetworkAttachmentDefinitions, status written.
 */
function genieWithObjects(
  name: string,
  count: number,
  delayMs: number,
  baseline: string,
): Scenario {
  return {
    name,
    baseline,
    verbs: lifecycle,
    prepare: async (node) => {
      const kubeconfig = await startApi(node, delayMs);
      writeTable(node, name, `[kubernetes]\nkubeconfig = "${kubeconfig}"`);
    },
    calls: (node, verb, pod) => {
      const [first = "", ...others] = node.networks.map((network) => network.name);
      const objects = others.slice(0, count).join(",");
      const annotations = { cni: first, "k8s.v1.cni.cncf.io/networks": objects };
      return [genieCall(node, verb, pod, name, annotations)];
    },
  };
}

function genieCall(
  node: BenchNode,
  verb: Verb,
  pod: Pod,
  scenario: string,
  annotations?: Record<string, string>,
): Call {
  const config = {
    // STATUS exists since 1.1.0; the delegates of Debian do not know it and are passed over.
    cniVersion: verb === "STATUS" ? "1.1.0" : cniVersion,
    name: "genie",
    type: "genie",
    plugins_file: tableFile(node, scenario),
    capabilities: { [annotationsCapability]: true },
    ...(annotations && { runtimeConfig: { [annotationsCapability]: annotations } }),
    ...previous(verb, pod.results[0]),
  };
  return {
    file: node.genie,
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
