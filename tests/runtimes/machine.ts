/**
 * A machine of its own for one test, as Debian's packages leave one: processes, mounts, network and
 * /etc are nobody else's, so runtimes run on it with their usual paths. Its first process ends when
 * our end of its stdin is closed, be it by our death, and takes every other one along.
 */
import {
  existsSync,
  lstatSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  writeFileSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { realPluginDir } from "../fakes.ts";
import { type Need, nextDir } from "../needs.ts";
import { imageName, writeImage } from "./image.ts";

/** What the machines of tests need. */
export const machineNeeds: Need[] = [
  "network namespaces",
  "mounts",
  "containernetworking-plugins",
  "iptables",
  "containerd",
  "podman",
  "busybox-static",
];

/** Those with containerd and plugins of Debian's next release, and the runc of this one. */
export const nextNeeds: Need[] = [...machineNeeds, "containerd of Debian's next release"];

/** What Debian's containerd is configured by. */
export const debianConfig = "/etc/containerd/config.toml";

/** How a program ended. */
export interface Ended {
  status: number;
  stdout: string;
  stderr: string;
}

/** One test's machine. */
export interface Machine extends AsyncDisposable {
  /** Where a path of the machine is for us. */
  at: (path: string) => string;
  /** Parent of the cgroups of its pods. */
  cgroup: string;
  /** Writes a file, JSON unless it is a text. */
  write: (path: string, content: string | object) => void;
  /** Runs a program on it and says how it ended. */
  call: (...words: string[]) => Promise<Ended>;
  /** Runs a program that must succeed. @returns its stdout @throws Error with what it said */
  run: (...words: string[]) => Promise<string>;
  /** Starts a program that stays, and waits until its output has this. */
  start: (ready: string, ...words: string[]) => Promise<Service>;
}

/** A program that runs on the machine. */
export interface Service {
  /** What it wrote so far. */
  log: () => string;
  /** Ends it, with SIGTERM unless told otherwise, and waits. */
  stop: (signal?: NodeJS.Signals) => Promise<void>;
}

/**
 * The first process. Plugins are copied, so that genie may be put beside them; a cgroup is on no
 * tmpfs, so it is taken away by hand.
 */
const init = `set -e
mount -t tmpfs none /run
mkdir -p /run/netns /run/lock /run/plugins /run/etc /run/repo /run/bun
mount --bind "$3" /run/repo
mount --bind "$4" /run/bun
cp "$1"/* /run/plugins
cp -a /etc/. /run/etc
for dir in /opt /var/lib /var/log; do mount -t tmpfs none $dir; done
mkdir -p /usr/lib/cni
mount -t tmpfs none /usr/lib/cni
mv /run/plugins/* /usr/lib/cni
mount -t tmpfs none /etc
cp -a /run/etc/. /etc
[ -z "$5" ] || {
  for name in containerd ctr containerd-shim-runc-v2; do
    mount --bind "$5/usr/bin/$name" /usr/bin/$name
  done
  cp "$5/etc/containerd/config.toml" /etc/containerd
}
rm -rf /run/etc /run/plugins /etc/cni
ip link set lo up
echo 1 >/proc/sys/net/ipv4/ip_forward
echo ready
cat >/dev/null
set +e
kill -KILL -1 2>/dev/null
for try in 1 2 3 4 5 6 7 8 9; do
  for parent in /sys/fs/cgroup"$2" /sys/fs/cgroup/*"$2"; do
    [ -d "$parent" ] && find "$parent" -depth -type d -exec rmdir {} ";" 2>/dev/null
  done
  [ -z "$(find /sys/fs/cgroup -maxdepth 2 -name "\${2#/}")" ] && break
  sleep 0.1
done
`;

/** This repository, and the Bun that runs it, on a machine. */
export const repoDir = "/run/repo";
export const bunProgram = `/run/bun/${basename(process.execPath)}`;

/** Which of Debian's releases a machine has containerd and plugins of. */
export type Release = "this" | "next";

/** Boots a machine. */
export async function bootMachine(release: Release = "this"): Promise<Machine> {
  const cgroup = `/genie-${crypto.randomUUID().slice(0, 8)}`;
  const kinds = ["--mount", "--net", "--pid", "--ipc", "--uts"];
  const repo = join(import.meta.dir, "..", "..");
  const isNext = release === "next";
  const plugins = isNext ? join(nextDir, "usr/lib/cni") : (realPluginDir ?? "");
  const words = [plugins, cgroup, repo, dirname(process.execPath), isNext ? nextDir : ""];
  const leader = Bun.spawn(
    ["unshare", ...kinds, "--fork", "--mount-proc", "sh", "-c", init, "sh", ...words],
    { stdin: "pipe", stdout: "pipe", stderr: "inherit" },
  );
  const dispose = async () => {
    leader.stdin.end();
    await leader.exited;
  };
  try {
    await until(leader.stdout, "ready", () => undefined);
    const children = readFileSync(`/proc/${leader.pid}/task/${leader.pid}/children`, "utf8");
    return { ...makeMachine(children.trim(), cgroup), [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** Reads an output to a text that it must have, then goes on in the background. */
async function until(
  output: ReadableStream<Uint8Array>,
  text: string,
  note: (log: string) => void,
): Promise<void> {
  const found = Promise.withResolvers<void>();
  const read = async () => {
    let log = "";
    const decoder = new TextDecoder();
    for await (const chunk of output) {
      log += decoder.decode(chunk, { stream: true });
      note(log);
      if (log.includes(text)) found.resolve();
    }
    found.reject(new Error(`It ended before it said "${text}": ${log}`));
  };
  read().catch(found.reject);
  await found.promise;
}

function makeMachine(pid: string, cgroup: string): Omit<Machine, typeof Symbol.asyncDispose> {
  const enter = ["nsenter", `--target=${pid}`, "--mount", "--net", "--pid", "--ipc", "--uts", "--"];
  const env = { PATH: process.env["PATH"] ?? "", HOME: "/run", TMPDIR: "/run" };
  const at = (path: string) => `/proc/${pid}/root${path}`;
  const call = async (...words: string[]): Promise<Ended> => {
    const child = Bun.spawn([...enter, ...words], { env, stdin: "ignore", stderr: "pipe" });
    const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    return { status: await child.exited, stdout, stderr };
  };
  return {
    at,
    cgroup,
    write: (path, content) => {
      writeFileSync(at(path), typeof content === "string" ? content : JSON.stringify(content));
    },
    call,
    run: async (...words) => {
      const { status, stdout, stderr } = await call(...words);
      if (status === 0) return stdout;
      throw new Error(`Cannot run ${words.join(" ")}: ${stdout}${stderr}`);
    },
    start: async (ready, ...words) => {
      let log = "";
      // Its own process group would not do: what it forks into the background must stay.
      const script = 'exec "$@" 2>&1';
      const child = Bun.spawn([...enter, "sh", "-c", script, "sh", ...words], {
        env,
        stdin: "ignore",
      });
      await until(child.stdout, ready, (text) => {
        log = text;
      });
      return { log: () => log, stop: (signal = "SIGTERM") => stop(child, signal) };
    },
  };
}

/** nsenter waits for the program it started, which alone gets the signal. */
async function stop(child: Bun.Subprocess, signal: NodeJS.Signals): Promise<void> {
  const children = readFileSync(`/proc/${child.pid}/task/${child.pid}/children`, "utf8").trim();
  for (const pid of children.split(" ")) process.kill(Number(pid), signal);
  await child.exited;
}

/** Files and links below folders, with what they hold; sizes for what is large. */
export function tree(machine: Machine, dirs: readonly string[]): Record<string, string> {
  const found: Record<string, string> = {};
  for (const dir of dirs) {
    if (!existsSync(machine.at(dir))) continue;
    for (const name of readdirSync(machine.at(dir), { recursive: true, encoding: "utf8" }).sort()) {
      const file = machine.at(join(dir, name));
      const entry = lstatSync(file);
      let content = "";
      if (entry.isFile()) content = contentOf(file, entry.size);
      if (entry.isSymbolicLink()) content = readlinkSync(file);
      found[join(dir, name)] = `${entry.mode.toString(8)} ${content}`;
    }
  }
  return found;
}

/** A binary by its size; and what keeps a namespace cannot be read. */
function contentOf(file: string, size: number): string {
  return size === 0 || size > 65_536 ? String(size) : readFileSync(file, "utf8");
}

/** What the CRI plugin of Debian's containerd needs here besides what Debian's config says. */
const criLines = `
    sandbox_image = "${imageName}"
    restrict_oom_score_adj = true
    [plugins."io.containerd.grpc.v1.cri".containerd]
      snapshotter = "native"
`;

/** Starts Debian's containerd on a machine, with an image of the sandboxes in its store. */
export async function startContainerd(machine: Machine): Promise<Service> {
  const config = debianConfig;
  const section = '[plugins."io.containerd.grpc.v1.cri"]';
  const text = readFileSync(machine.at(config), "utf8");
  if (!text.includes(section)) throw new Error(`${config} is not Debian's`);
  machine.write(config, text.replace(section, `${section}${criLines}`));
  const service = await machine.start("containerd successfully booted", "containerd");
  writeImage(machine.at("/run/image.tar"));
  await machine.run("ctr", "--namespace=k8s.io", "images", "import", "/run/image.tar");
  return service;
}

/** Has podman use CNI, as its settings offer, with the image in its store. */
export async function preparePodman(machine: Machine): Promise<void> {
  await machine.run("mkdir", "-p", "/etc/containers");
  const engine = 'cgroup_manager = "cgroupfs"\nevents_logger = "file"\n';
  const network = 'network_backend = "cni"\n';
  machine.write("/etc/containers/containers.conf", `[network]\n${network}[engine]\n${engine}`);
  const dirs = 'runroot = "/run/containers"\ngraphroot = "/var/lib/containers"\n';
  machine.write("/etc/containers/storage.conf", `[storage]\ndriver = "vfs"\n${dirs}`);
  writeImage(machine.at("/run/image.tar"));
  await machine.run("podman", "load", "--quiet", "--input=/run/image.tar");
}

/** Starts an API server on a machine. @returns path of a kubeconfig there */
export async function startApi(
  machine: Machine,
  objects: object,
  collections: string[],
): Promise<string> {
  const dir = "/run/api";
  await machine.run("mkdir", dir);
  machine.write(`${dir}/objects.json`, objects);
  const words = [bunProgram, `${repoDir}/tests/apiserver.ts`, "--dir", dir];
  words.push(...collections.map((path) => `--serve=${path}`));
  const { log } = await machine.start("\n", ...words);
  return (JSON.parse(log()) as { kubeconfig: string }).kubeconfig;
}
