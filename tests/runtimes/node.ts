/**
 * A machine with containerd as Debian ships it, genie as an operator puts it there, and pods as the
 * kubelet starts them.
 */
import { dirname, join } from "node:path";
import { compiledGenie } from "../wire.ts";
import { type Cri, connectCri, type SandboxConfig } from "./cri.ts";
import {
  bootMachine,
  bunProgram,
  type Ended,
  type Machine,
  type Release,
  repoDir,
  type Service,
  startContainerd,
  tree,
} from "./machine.ts";

/** A pod that runs. */
export interface Pod {
  id: string;
  /** Its process, on the machine. */
  pid: number;
  /** Its address, as the runtime says. */
  ip: string;
  /** Addresses of IPv4 by interface, as they are in the pod. */
  addresses: () => Promise<Record<string, string>>;
  /** Runs a program of the machine in the pod's network. */
  call: (...words: string[]) => Promise<Ended>;
  /** As the kubelet ends a pod. */
  end: () => Promise<void>;
}

/** The node. */
export interface Node extends AsyncDisposable {
  machine: Machine;
  cri: Cri;
  /** Runs genie as the operator has it, before it is installed. */
  genie: (...args: string[]) => Promise<Ended>;
  /** The same, which must succeed. */
  install: (...args: string[]) => Promise<void>;
  /** Writes config lists into the runtime's folder. */
  networks: (...lists: { name: string }[]) => Promise<void>;
  start: (annotations?: Record<string, string>, more?: Partial<SandboxConfig>) => Promise<Pod>;
  /** Waits until the runtime has loaded a config of this name; undefined: none at all. */
  loaded: (name: string | undefined) => Promise<void>;
  /** Restarts containerd. @param meanwhile what happens while there is none */
  restart: (
    meanwhile?: () => Promise<unknown>,
    signal?: NodeJS.Signals,
    flags?: string[],
  ) => Promise<void>;
}

/** A bridge with a way out and host ports. */
export const blue = {
  cniVersion: "1.0.0",
  name: "blue",
  plugins: [
    {
      type: "bridge",
      bridge: "blue0",
      isGateway: true,
      ipMasq: true,
      ipam: {
        type: "host-local",
        ranges: [[{ subnet: "10.91.0.0/16" }]],
        routes: [{ dst: "0.0.0.0/0" }],
      },
    },
    { type: "portmap", capabilities: { portMappings: true } },
  ],
};
/** An older list. */
export const green = {
  cniVersion: "0.4.0",
  name: "green",
  plugins: [{ type: "ptp", ipam: { type: "host-local", subnet: "10.92.0.0/16" } }],
};
/** Its list names a bridge of its own. */
export const red = {
  cniVersion: "1.0.0",
  name: "red",
  plugins: [
    { type: "bridge", bridge: "red0", ipam: { type: "host-local", subnet: "10.93.0.0/16" } },
  ],
};

/** Addresses of these. */
export const on = {
  blue: /^10\.91\.\d+\.\d+$/,
  green: /^10\.92\.\d+\.\d+$/,
  red: /^10\.93\.\d+\.\d+$/,
};

/** Boots a machine with containerd, and no network yet. */
export async function openNode(release: Release = "this"): Promise<Node> {
  const program = `${repoDir}/dist/genie`;
  compiledGenie();
  const machine = await bootMachine(release);
  try {
    let service: Service = await startContainerd(machine);
    const cri = connectCri(machine.at("/run/containerd/containerd.sock"));
    await answers(cri);
    const node: Node = {
      machine,
      cri,
      genie: (...args) => machine.call(program, ...args),
      install: async (...args) => void (await machine.run(program, "install", ...args)),
      networks: (...lists) => writeNetworks(machine, lists),
      start: (annotations = {}, more = {}) => startPod(node, annotations, more),
      loaded: async (name) => {
        while ((await cri.network()) !== name) await Bun.sleep(5);
      },
      restart: async (meanwhile = async () => undefined, signal = "SIGTERM", flags = []) => {
        await service.stop(signal);
        await meanwhile();
        service = await machine.start("containerd successfully booted", "containerd", ...flags);
        await answers(cri);
      },
      [Symbol.asyncDispose]: async () => {
        cri[Symbol.dispose]();
        await machine[Symbol.asyncDispose]();
      },
    };
    return node;
  } catch (error) {
    await machine[Symbol.asyncDispose]();
    throw error;
  }
}

/** Its socket is there before its CRI is. */
async function answers(cri: Cri): Promise<void> {
  for (;;) {
    try {
      await cri.list();
      return;
    } catch (error) {
      if (!String(error).includes("server is not initialized yet")) throw error;
      await Bun.sleep(5);
    }
  }
}

/** Writes config lists into the folder of every runtime. */
export async function writeNetworks(machine: Machine, lists: { name: string }[]): Promise<void> {
  const dir = "/etc/cni/net.d";
  await machine.run("mkdir", "-p", dir);
  for (const [i, list] of lists.entries()) {
    machine.write(`${dir}/${10 * (i + 1)}-${list.name}.conflist`, list);
  }
}

async function startPod(
  { machine, cri }: Node,
  annotations: Record<string, string>,
  more: Partial<SandboxConfig>,
): Promise<Pod> {
  const uid = crypto.randomUUID();
  const pod = { namespace: "default", name: `pod-${uid.slice(0, 8)}`, uid };
  const id = await cri.run({ ...pod, annotations, cgroupParent: machine.cgroup, ...more });
  const { pid, ips } = await cri.status(id);
  const call = (...words: string[]) =>
    machine.call("nsenter", `--target=${pid}`, "--net", "--", ...words);
  return {
    id,
    pid,
    ip: ips.join(" "),
    call,
    addresses: async () => readAddresses((await call("ip", "-json", "-4", "addr")).stdout),
    end: async () => {
      await cri.stop(id);
      await cri.remove(id);
    },
  };
}

/** Addresses by interface in what `ip -json addr` prints, but for the loopback. */
export function readAddresses(json: string): Record<string, string> {
  const links = JSON.parse(json) as { ifname: string; addr_info: { local: string }[] }[];
  return Object.fromEntries(
    links
      .filter(({ ifname }) => ifname !== "lo")
      .map(({ ifname, addr_info }) => [ifname, addr_info.map(({ local }) => local).join(" ")]),
  );
}

/**
 * Rows of a table of genie's record, read on the machine: SQLite resolves the links of a path, so
 * from outside it would open the record of this very machine. None where there is no record.
 */
export async function rowsOn(machine: Machine, table: string): Promise<unknown[]> {
  const script = `import { rowsOf } from "${repoDir}/tests/policed.ts";
    console.log(JSON.stringify(rowsOf("/var/lib/cni/genie", "SELECT * FROM ${table}")))`;
  return JSON.parse(await machine.run(bunProgram, "--eval", script));
}

/** What a machine still has of its pods. */
export interface Traces {
  links: string[];
  netns: string[];
  /** Reserved addresses, and results that a runtime keeps. */
  files: string[];
  rules: string[];
  attachments: number;
}

export const noTraces: Traces = { links: [], netns: [], files: [], rules: [], attachments: 0 };

/** Looks for what pods leave. */
export async function traces(machine: Machine): Promise<Traces> {
  const links = JSON.parse(await machine.run("ip", "-json", "-details", "link")) as {
    ifname: string;
    linkinfo?: { info_kind?: string };
  }[];
  const rules = await machine.run("iptables-save");
  return {
    links: links
      .filter(({ ifname, linkinfo }) => ifname !== "lo" && linkinfo?.info_kind !== "bridge")
      .map(({ ifname }) => ifname),
    netns: Object.keys(tree(machine, ["/run/netns"])),
    files: Object.keys(tree(machine, ["/var/lib/cni/networks", "/var/lib/cni/results"])).filter(
      (path) => /\/(\d+\.\d+\.\d+\.\d+|genie-.*)$/.test(path),
    ),
    rules: rules
      .split("\n")
      .filter((rule) => /\b10\.9\d\.\d+\.\d+\/32|CNI-[0-9a-f]{24}/.test(rule)),
    attachments: (await rowsOn(machine, "attachments")).length,
  };
}

/** Every file of the machine that an operator would find changed; not what other plugins keep. */
export function nodeFiles(machine: Machine): Record<string, string> {
  const all = tree(machine, ["/etc", "/opt", "/usr/lib/cni", "/var/lib/cni"]);
  const others = /^\/var\/lib\/cni\/(networks|results)(\/|$)/;
  return Object.fromEntries(Object.entries(all).filter(([path]) => !others.test(path)));
}

/** Another build of genie on the machine, of the same version. @returns its path */
export async function anotherGenie(machine: Machine, name = "newer"): Promise<string> {
  const path = join("/run", name, "genie");
  const copy = `{ cat ${repoDir}/dist/genie; echo; } > ${path}`;
  await machine.run("sh", "-c", `mkdir ${dirname(path)} && ${copy} && chmod +x ${path}`);
  return path;
}
