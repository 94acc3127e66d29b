/**
 * The node the bench runs on: bridges made beforehand, fresh network namespaces, throw-away
 * folders, the binaries under test and an API server. Whatever is made here goes away with
 * `closeNode`, also after a failure or an interrupt.
 */
import {
  closeSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { writeIdlePlugin } from "./idle.ts";

const root = join(import.meta.dir, "..", "..");
/** CNI version of every config: the newest that Debian's plugins speak. */
export const cniVersion = "1.0.0";
/** Name and namespace of the pod in every call; of the pods that ask for objects see below. */
export const podName = "bench-pod";
export const podNamespace = "bench";
const podUid = "7c8f0c8e-3b0e-4d5b-9d43-0b9a63b1c1a5";
/** Networks on the node; the largest scenario attaches a pod to all of them. */
export const networkCount = 5;

/** One container as the runtime knows it. */
export interface Pod {
  containerId: string;
  netnsName: string;
  /** What to pass as CNI_NETNS. */
  netns: string;
  /** What ADD printed, one per call: the runtime hands it back as `prevResult`. */
  results: object[];
}

/** A plugin config. */
type Network = { name: string; type: string; [key: string]: unknown };

/** Everything a scenario may refer to. */
export interface BenchNode {
  /** Short random word in every name, so that two benches never meet. */
  id: string;
  /** Folder of all files. */
  dir: string;
  /** Folder of the reference plugins. */
  pluginDir: string;
  /** Folder of the plugin that does nothing. */
  idleDir: string;
  /** Path of genie. */
  genie: string;
  /** Path of the other genie it is compared with; there is a file only with `--compare`. */
  old: string;
  /** Path of the compiled `floor.ts`. */
  floor: string;
  /** Plugin configs, one per network, as a runtime would hand them to `bridge`. */
  networks: Network[];
  /** The same of a network whose plugin does nothing. */
  idleNetwork: Network;
  /** API servers, see {@link startApi}. */
  apis: Map<string, { kubeconfig: string; server: Bun.Subprocess }>;
  netnsCount: number;
}

/** Runs a program to its end. @throws Error with what it said */
export function command(program: string, ...args: string[]): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync([program, ...args], { cwd: root });
  if (exitCode === 0) return stdout.toString();
  const said = stderr.toString().trim() || stdout.toString().trim();
  throw new Error(`${basename(program)} ${args.join(" ")} failed: ${said}`);
}

/**
 * Copies a program as one write of the whole file. The page cache holds such a file in larger
 * pieces than one that a linker or a build wrote part by part, and a program of 100 MB then starts
 * with fewer page faults: up to an eighth of a call. So whatever is compared is copied like this.
 * It also keeps a build that runs meanwhile from changing what is measured.
 */
export function copyAtOnce(from: string, to: string): void {
  const bytes = readFileSync(from);
  rmSync(to, { force: true });
  const fd = openSync(to, "wx", 0o755);
  try {
    const written = writeSync(fd, bytes);
    if (written !== bytes.length) throw new Error(`${to}: ${written} bytes of ${bytes.length}`);
  } finally {
    closeSync(fd);
  }
}

/**
 * Makes folders, network configs, bridges and the floor binary.
 *
 * @param genie the binary to measure
 * @param old the one to compare it with, or ""
 */
export function openNode(genie: string, pluginDir: string, old = ""): BenchNode {
  const dir = mkdtempSync(join(tmpdir(), "genie-bench-"));
  const id = basename(dir).slice(-6).toLowerCase();
  const node: BenchNode = {
    id,
    dir,
    pluginDir,
    idleDir: join(dir, "idle"),
    genie: join(dir, "bin", "genie"),
    old: join(dir, "bin", "old"),
    floor: join(dir, "bin", "floor"),
    networks: Array.from({ length: networkCount }, (_, i) => bridgeConfig(id, dir, i)),
    idleNetwork: { cniVersion, name: "idle", type: "idle" },
    apis: new Map(),
    netnsCount: 0,
  };
  try {
    mkdirSync(join(dir, "bin"));
    copyAtOnce(genie, node.genie);
    if (old !== "") copyAtOnce(old, node.old);
    const compiled = `${node.floor}.compiled`;
    compileFloor(compiled);
    copyAtOnce(compiled, node.floor);
    rmSync(compiled);
    mkdirSync(node.idleDir);
    writeIdlePlugin(join(node.idleDir, "idle"), idleAnswer);
    writeLists([...node.networks, node.idleNetwork], join(dir, "net.d"), cniVersion);
    for (const { bridge } of node.networks) {
      command("ip", "link", "add", String(bridge), "type", "bridge");
      command("ip", "link", "set", String(bridge), "up");
    }
  } catch (error) {
    closeNode(node);
    throw error;
  }
  return node;
}

/** What the plugin that does nothing says to ADD: an address, as most do. */
const idleAnswer = JSON.stringify({ cniVersion, ips: [{ address: "198.18.240.2/20" }] });

/** Compiles floor.ts as genie is compiled. */
export function compileFloor(path: string): void {
  const source = join(import.meta.dir, "floor.ts");
  command(process.execPath, "build", ...buildFlags(), `--outfile=${path}`, source);
}

/** Writes every network as a config list of its own into a folder, in one CNI version. */
export function writeLists(networks: Network[], dir: string, version: string): void {
  mkdirSync(dir, { recursive: true });
  for (const { name, cniVersion: _, ...plugin } of networks) {
    const list = { cniVersion: version, name, plugins: [plugin] };
    writeFileSync(join(dir, `${name}.conflist`), JSON.stringify(list));
  }
}

/** Addresses are those that RFC 2544 sets aside for benchmarks; only one network has a route. */
function bridgeConfig(id: string, dir: string, i: number): Network {
  return {
    cniVersion,
    name: `net${i}`,
    type: "bridge",
    bridge: `gb-${id}-${i}`,
    isGateway: true,
    ipam: {
      type: "host-local",
      ranges: [[{ subnet: `198.18.${16 * i}.0/20` }]],
      ...(i === 0 && { routes: [{ dst: "0.0.0.0/0" }] }),
      dataDir: join(dir, "ipam"),
    },
  };
}

/** The flags of tests/build.ts, so that the floor is built as genie is. */
function buildFlags(): string[] {
  const text = readFileSync(join(root, "tests", "build.ts"), "utf8");
  return [...text.matchAll(/^ +"(--[^"]+)",$/gm)]
    .map(([, flag = ""]) => flag)
    .filter((flag) => !flag.startsWith("--outfile"));
}

/**
 * Writes a plugin table with a state folder of its own.
 *
 * @param name of the scenario it belongs to
 * @param more TOML after the common keys
 * @param isIdle has it the network whose plugin does nothing, and no other?
 * @returns its path
 */
export function writeTable(node: BenchNode, name: string, more = "", isIdle = false): string {
  const dir = join(node.dir, name.replaceAll(" ", "-"));
  mkdirSync(dir, { recursive: true });
  const networks = isIdle ? [node.idleNetwork] : node.networks;
  const plugins = networks.map((one) => `[plugins.${one.name}]\nconf = "${one.name}.conflist"`);
  const path = tableFile(node, name);
  writeFileSync(
    path,
    `conf_dir = "${join(node.dir, "net.d")}"
bin_dirs = ["${isIdle ? node.idleDir : node.pluginDir}"]
state_dir = "${join(dir, "state")}"
${more}
${plugins.join("\n")}
`,
  );
  return path;
}

/** Path of what {@link writeTable} wrote for a scenario. */
export function tableFile(node: BenchNode, name: string): string {
  return join(node.dir, name.replaceAll(" ", "-"), "plugins.toml");
}

/** Path of a network as a NetworkAttachmentDefinition of the bench's namespace. */
function definitionPath(name: string): string {
  const group = "/apis/k8s.cni.cncf.io/v1/namespaces";
  return `${group}/${podNamespace}/network-attachment-definitions/${name}`;
}

/** The pod whose annotations name so many network objects; 0 for none. */
export function podWithObjects(count: number): string {
  return count === 0 ? podName : `${podName}-${count}`;
}

/** The pods, which ask for the first network and for objects, and every network as an object. */
function apiObjects(node: BenchNode, version: string): Record<string, object> {
  const [first, ...others] = node.networks.map(({ name }) => name);
  const pods = [0, 1, others.length].map((count) => {
    const networks = others.slice(0, count).join(",");
    const name = podWithObjects(count);
    const annotations = {
      cni: first,
      ...(count > 0 && { "k8s.v1.cni.cncf.io/networks": networks }),
    };
    const pod = {
      apiVersion: "v1",
      kind: "Pod",
      metadata: { name, namespace: podNamespace, uid: podUid, annotations },
      spec: { serviceAccountName: "default" },
    };
    return [`/api/v1/namespaces/${podNamespace}/pods/${name}`, pod];
  });
  const definitions = node.networks.map((network) => [
    definitionPath(network.name),
    {
      apiVersion: "k8s.cni.cncf.io/v1",
      kind: "NetworkAttachmentDefinition",
      metadata: { name: network.name, namespace: podNamespace },
      spec: { config: JSON.stringify({ ...network, cniVersion: version }) },
    },
  ]);
  return Object.fromEntries([...pods, ...definitions]);
}

/** An API server: how long it thinks, how far it is away, and the CNI version of its objects. */
export interface ApiKind {
  delayMs?: number;
  distanceMs?: number;
  version?: string;
}

/** Starts an API server, once per node and kind. @returns the path of a kubeconfig */
export async function startApi(
  node: BenchNode,
  { delayMs = 0, distanceMs = 0, version = cniVersion }: ApiKind,
): Promise<string> {
  const name = `api-${delayMs}-${distanceMs}-${version}`;
  const running = node.apis.get(name);
  if (running) return running.kubeconfig;
  if (distanceMs > 0) {
    const near = await startApi(node, { delayMs, version });
    return startDistance(node, name, near, distanceMs);
  }
  const dir = join(node.dir, name);
  mkdirSync(dir);
  writeFileSync(join(dir, "objects.json"), JSON.stringify(apiObjects(node, version)));
  const words = ["tests/apiserver.ts", "--dir", dir, "--delay", String(delayMs)];
  const { server, line } = await startServer(words);
  const { kubeconfig } = JSON.parse(line) as { kubeconfig: string };
  node.apis.set(name, { kubeconfig, server });
  return kubeconfig;
}

/** The same server so far away, see distance.ts. @returns the path of a kubeconfig */
async function startDistance(
  node: BenchNode,
  name: string,
  near: string,
  distanceMs: number,
): Promise<string> {
  const text = readFileSync(near, "utf8");
  const [, port = ""] = /server: https:\/\/127\.0\.0\.1:(\d+)/.exec(text) ?? [];
  const words = ["tests/bench/distance.ts", port, String(distanceMs)];
  const { server, line } = await startServer(words);
  const kubeconfig = join(node.dir, `${name}.kubeconfig`);
  writeFileSync(kubeconfig, text.replace(`127.0.0.1:${port}`, `127.0.0.1:${line}`), {
    mode: 0o600,
  });
  node.apis.set(name, { kubeconfig, server });
  return kubeconfig;
}

/** Starts a server of ours. @returns it and its first line, which says that it serves */
async function startServer(words: string[]): Promise<{ server: Bun.Subprocess; line: string }> {
  const server = Bun.spawn([process.execPath, ...words], {
    cwd: root,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "inherit",
  });
  let text = "";
  const decoder = new TextDecoder();
  for await (const chunk of server.stdout) {
    text += decoder.decode(chunk, { stream: true });
    if (text.includes("\n")) break;
  }
  if (!text.includes("\n")) throw new Error(`${words[0]} ended before it served`);
  return { server, line: text.trim() };
}

/** A new container in a fresh network namespace. */
export function addPod(node: BenchNode): Pod {
  const containerId = Buffer.from(crypto.getRandomValues(new Uint8Array(32))).toString("hex");
  const netnsName = `genie-bench-${node.id}-${node.netnsCount++}`;
  command("ip", "netns", "add", netnsName);
  return { containerId, netnsName, netns: `/var/run/netns/${netnsName}`, results: [] };
}

/** CNI_ARGS, as containerd sets them. */
export function cniArgs({ containerId }: Pod, name: string): string {
  const args = {
    IgnoreUnknown: "1",
    K8S_POD_NAMESPACE: podNamespace,
    K8S_POD_NAME: name,
    K8S_POD_INFRA_CONTAINER_ID: containerId,
    K8S_POD_UID: podUid,
  };
  return Object.entries(args)
    .map((pair) => pair.join("="))
    .join(";");
}

/** How long the kernel works on after `ip netns del`, in ms; nothing is measured meanwhile. */
const settleMs = 100;

/** Deletes namespaces and waits until the kernel is done with them. */
export async function removePods(pods: Pod[]): Promise<void> {
  for (const { netnsName } of pods) command("ip", "netns", "del", netnsName);
  await Bun.sleep(settleMs);
}

/** Removes all that the bench made; goes on after a failure. @returns what could not be removed */
export function closeNode(node: BenchNode): string[] {
  const failures: string[] = [];
  const attempt = (work: () => unknown) => {
    try {
      work();
    } catch (error) {
      failures.push(String(error));
    }
  };
  for (const { server } of node.apis.values()) attempt(() => server.kill("SIGKILL"));
  const mine = (name: string, prefix: string) => name.startsWith(`${prefix}-${node.id}-`);
  attempt(() => {
    // Each veth goes with the namespace that holds its other end.
    const lines = command("ip", "netns", "list").split("\n");
    for (const name of lines.map((line) => line.split(" ")[0] ?? "")) {
      if (mine(name, "genie-bench")) attempt(() => command("ip", "netns", "del", name));
    }
  });
  attempt(() => {
    const links = JSON.parse(command("ip", "-json", "link", "show", "type", "bridge"));
    for (const { ifname: name } of links as { ifname?: string }[]) {
      if (name && mine(name, "gb")) attempt(() => command("ip", "link", "del", name));
    }
  });
  attempt(() => rmSync(node.dir, { recursive: true, force: true }));
  return failures;
}
