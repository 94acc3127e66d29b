/**
 * Other delegating plugins, measured beside genie: the same real plugins, networks, pods and API
 * server, called as the runtime would. A peer is a binary and the text of its CNI config, in which
 * these words are replaced:
 *
 * - `{{KUBECONFIG}}`: path of a kubeconfig of the test's API server, which holds the pods and, as
 *   NetworkAttachmentDefinitions, the networks
 * - `{{CONF_DIR}}`: folder with a config list per network, in the `cniVersion` of the config
 * - `{{BIN_DIR}}`: folder of the real plugins, also in CNI_PATH
 * - `{{STATE_DIR}}`: an empty folder of the peer's own
 * - `{{NETWORK}}`: name of the network that every pod gets on eth0
 *
 * A peer whose config does not name CONF_DIR looks where CNI says, so the bench then runs in a
 * mount namespace of its own in which the node's folders are those of the bench. (They must be
 * there to be mounted on: `/etc/cni/net.d`, `/opt/cni/bin`, `/var/lib/cni` are made, and stay.)
 */
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import {
  addPod,
  type BenchNode,
  command,
  copyAtOnce,
  networkCount,
  type Pod,
  podWithObjects,
  removePods,
  startApi,
  writeLists,
} from "./node.ts";
import { type Call, environment, previous, type Scenario, type Verb } from "./scenarios.ts";

/** One peer as the command line names it. */
export interface PeerFiles {
  binary: string;
  conf: string;
}

/** A peer, its config read. */
export interface Peer {
  /** The name of its binary: what is compared should be named with its version. */
  name: string;
  binary: string;
  template: string;
  cniVersion: string;
}

/** @throws Error when a file cannot be read, or the config is not JSON with a `cniVersion` */
export function readPeer({ binary, conf }: PeerFiles): Peer {
  const template = readFileSync(conf, "utf8");
  const { cniVersion } = JSON.parse(template) as { cniVersion?: unknown };
  if (typeof cniVersion !== "string") throw new Error(`${conf} has no "cniVersion"`);
  return { name: basename(binary), binary, template, cniVersion };
}

/** Does one of them read the folders that CNI prescribes, and no others? */
export function needFolders(peers: Peer[]): boolean {
  return peers.some(({ template }) => !template.includes("{{CONF_DIR}}"));
}

/**
 * Runs this program again with a mount namespace of its own, and hands on how it ended; an abort
 * ends it.
 * @returns its exit status
 */
export function enterMounts(argv: string[], marker: string, signal: AbortSignal): Promise<number> {
  const words = ["unshare", "--mount", "--propagation", "private", "--", process.execPath];
  const child = Bun.spawn([...words, ...argv], {
    env: { ...process.env, [marker]: "1" },
    stdio: ["inherit", "inherit", "inherit"],
  });
  signal.addEventListener("abort", () => child.kill("SIGTERM"));
  return child.exited;
}

/** Mounts the bench's folders where CNI says. Only in a mount namespace of our own. */
export function mountFolders(node: BenchNode, peers: Peer[]): void {
  const lowest = peers.map(({ cniVersion }) => cniVersion).sort()[0] ?? "";
  const shared = join(node.dir, "mounted");
  mkdirSync(join(shared, "state"), { recursive: true });
  writeLists(node.networks, join(shared, "net.d"), lowest);
  // Also for the pods, whose namespaces other programs would see as files that mean nothing.
  mkdirSync("/run/netns", { recursive: true });
  command("mount", "-t", "tmpfs", "tmpfs", "/run/netns");
  const folders: [from: string, to: string][] = [
    [join(shared, "net.d"), "/etc/cni/net.d"],
    [node.pluginDir, "/opt/cni/bin"],
    [join(shared, "state"), "/var/lib/cni"],
  ];
  for (const [from, to] of folders) {
    mkdirSync(to, { recursive: true });
    command("mount", "--bind", from, to);
  }
}

/** What a peer is asked to do, and the scenarios of genie and of the delegates beside it. */
const tasks = [
  { name: "API 1 network", objects: 0, delayMs: 0, baseline: "bare 1 network" },
  { name: "API 1 object", objects: 1, delayMs: 0, baseline: "bare 2 networks" },
  { name: "API 4 objects", objects: networkCount - 1, delayMs: 0, baseline: "bare 5 networks" },
  { name: "API 1 object, 10 ms away", objects: 1, delayMs: 10, baseline: "bare 2 networks" },
];

/** The name of what a peer does in a storm. */
export function peerStorm({ name }: Peer): string {
  return `${name} ${tasks[0]?.name}`;
}

/**
 * Everything one peer is asked to do. Not CHECK: Multus answers it without a call of the plugins
 * that it found by the API, CNI-Genie without any, so there is nothing to compare.
 */
export function peerScenarios(peer: Peer): Scenario[] {
  return tasks.map(({ name: task, objects, delayMs, baseline }): Scenario => {
    const name = `${peer.name} ${task}`;
    let stdin: object = {};
    return {
      name,
      baseline,
      verbs: ["ADD", "DEL"],
      prepare: async (node) => {
        const kubeconfig = await startApi(node, { delayMs, version: peer.cniVersion });
        stdin = fill(node, peer, task, kubeconfig);
      },
      calls: (node, verb, pod): Call[] => [
        {
          file: join(node.dir, "bin", peer.name),
          env: environment(node, verb, pod, { name: podWithObjects(objects) }),
          stdin: JSON.stringify({ ...stdin, ...previous(verb, pod.results[0]) }),
        },
      ],
    };
  });
}

/** The config of a peer for one task, with folders of its own. */
function fill(node: BenchNode, peer: Peer, task: string, kubeconfig: string): object {
  const dir = join(node.dir, `${peer.name}-${task}`.replaceAll(/\W+/g, "-"));
  const binary = join(node.dir, "bin", peer.name);
  const confDir = join(node.dir, `net.d-${peer.cniVersion}`);
  mkdirSync(join(dir, "state"), { recursive: true });
  writeLists(node.networks, confDir, peer.cniVersion);
  if (!existsSync(binary)) copyAtOnce(peer.binary, binary);
  const words: Record<string, string> = {
    KUBECONFIG: kubeconfig,
    CONF_DIR: confDir,
    BIN_DIR: node.pluginDir,
    STATE_DIR: join(dir, "state"),
    NETWORK: node.networks[0]?.name ?? "",
  };
  return fillTemplate(peer.template, words);
}

/** Puts the words of {@link readPeer}'s template in place; those it does not know stay. */
export function fillTemplate(template: string, words: Record<string, string>): object {
  return JSON.parse(template.replaceAll(/\{\{(\w+)\}\}/g, (all, word) => words[word] ?? all));
}

/**
 * Asks every scenario of a peer for the life of one pod, before anything is measured.
 *
 * @returns the scenarios that work, with the operations that do, and a line for all else
 */
export async function probe(
  node: BenchNode,
  scenarios: Scenario[],
): Promise<{ able: Scenario[]; notes: string[] }> {
  const able: Scenario[] = [];
  const notes: string[] = [];
  for (const scenario of scenarios) {
    await scenario.prepare?.(node);
    const failed = new Map<Verb, string>();
    const pod = addPod(node);
    for (const verb of scenario.verbs) {
      for (const { file, env, stdin } of scenario.calls(node, verb, pod)) {
        const { exitCode, stdout } = Bun.spawnSync([file], {
          env,
          cwd: "/",
          stdin: Buffer.from(stdin),
        });
        const said = stdout.toString().trim();
        if (exitCode !== 0) failed.set(verb, messageOf(said, exitCode));
        else if (verb === "ADD") pod.results.push(JSON.parse(said));
      }
      if (failed.has("ADD")) break;
    }
    const left = failed.has("ADD") ? [] : interfacesIn(pod);
    if (left.length > 0) {
      notes.push(`${scenario.name} DEL: not timed, it leaves ${left.join(", ")} in the pod`);
      failed.set("DEL", "");
    }
    await removePods([pod]);
    for (const [verb, said] of failed) {
      if (said === "") continue;
      notes.push(`${scenario.name} ${verb}: not available, it says "${said}"`);
    }
    if (failed.has("ADD")) continue;
    able.push({ ...scenario, verbs: scenario.verbs.filter((verb) => !failed.has(verb)) });
  }
  return { able, notes };
}

/** The interfaces of a pod besides its loopback. */
function interfacesIn({ netnsName }: Pod): string[] {
  const links = JSON.parse(command("ip", "-netns", netnsName, "-json", "link", "show"));
  return (links as { ifname: string }[]).map(({ ifname }) => ifname).filter((one) => one !== "lo");
}

/** The message of a CNI error, without what is this run's alone. */
function messageOf(stdout: string, exitCode: number): string {
  const said = /"msg":\s*"((?:\\.|[^"\\])*)"/.exec(stdout)?.[1] ?? `exit status ${exitCode}`;
  return said.replaceAll(/genie-bench-\w+/g, "BENCH").replaceAll(/[0-9a-f]{64}/g, "ID");
}
