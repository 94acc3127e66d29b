/**
 * Can every plugin of the table be called? Its binary, whose it is, for which machine, and which
 * CNI versions it speaks. Source: CNI SPEC 1.1 §2 VERSION; elf(5).
 */
import { closeSync, openSync, readSync, statSync } from "node:fs";
import { arch } from "node:os";
import { join } from "node:path";
import manifest from "../../package.json";
import { CniError } from "../cni.ts";
import { run } from "../exec.ts";
import { isObject, parseJson } from "../json.ts";
import { enforcesPolicy } from "../settings.ts";
import { ok, problem, type Said, warning } from "./finding.ts";
import { openSite } from "./installation.ts";
import { isExecutable } from "./node_ready.ts";
import { findProgram, type NodeView } from "./node_view.ts";

const probeMs = 5000;
/** `e_machine` of the machines that genie is built for. */
const machines: Record<string, number> = { x64: 0x3e, arm64: 0xb7 };

/** Each plugin once, with the networks that use it and the highest version one of them asks for. */
export async function checkPlugins(view: NodeView): Promise<Said[]> {
  const users = new Map<string, { networks: string[]; versions: Set<string> }>();
  const use = (type: unknown, network: string, version: string) => {
    if (typeof type !== "string" || type === "") return;
    const user = users.get(type) ?? { networks: [], versions: new Set() };
    user.networks.push(network);
    user.versions.add(version);
    users.set(type, user);
  };
  for (const { name, list } of view.networks) {
    for (const { type, ipam } of list.plugins) {
      use(type, name, list.cniVersion);
      if (isObject(ipam)) use(ipam["type"], name, list.cniVersion);
    }
  }
  const said = await Promise.all(
    [...users].map(([type, { networks, versions }]) =>
      checkPlugin(view, type, [...new Set(networks)], [...versions]),
    ),
  );
  const bad = said.filter((one) => one.verdict !== "ok");
  if (bad.length > 0) return bad;
  return users.size === 0 ? [] : [ok(`${[...users.keys()].join(", ")} answer VERSION`)];
}

async function checkPlugin(
  view: NodeView,
  type: string,
  networks: string[],
  versions: string[],
): Promise<Said> {
  const { binDirs } = view.config;
  const path = findProgram(view, type, binDirs);
  const who = `${type} (${networks.join(", ")})`;
  if (path === undefined) {
    return problem(
      `${who} is in none of ${binDirs.join(", ")}`,
      `install ${type}, or set bin_dirs`,
    );
  }
  if (!isExecutable(path)) return problem(`${path} cannot be run`, `chmod 755 ${path}`);
  if ((statSync(path).mode & 0o022) !== 0) {
    return problem(`${path} can be changed by others, and runs as root`, `chmod go-w ${path}`);
  }
  const foreign = foreignMachine(path);
  if (foreign !== undefined) {
    return problem(`${path} is for another machine (${foreign})`, `install ${type} for this one`);
  }
  const spoken = await probe(path);
  if (spoken === undefined) {
    return problem(
      `${path} does not answer VERSION`,
      `run it by hand: CNI_COMMAND=VERSION ${path}`,
    );
  }
  const unknown = versions.filter((version) => !spoken.includes(version));
  if (unknown.length === 0) return ok(who);
  return problem(
    `${who} does not speak CNI ${unknown.join(", ")}`,
    `set cniVersion to ${spoken.at(-1)}, or install a newer ${type}`,
  );
}

/** Which machine an ELF file is for, where it is not ours; undefined for ours and for scripts. */
export function foreignMachine(path: string): string | undefined {
  const header = Buffer.alloc(20);
  const fd = openSync(path, "r");
  try {
    if (readSync(fd, header) < header.length) return undefined;
  } finally {
    closeSync(fd);
  }
  if (header.readUInt32BE(0) !== 0x7f454c46) return undefined;
  const isLittle = header[5] === 1;
  const machine = isLittle ? header.readUInt16LE(18) : header.readUInt16BE(18);
  if (machine === machines[arch()]) return undefined;
  const known = Object.entries(machines).find(([, number]) => number === machine)?.[0];
  return known ?? `ELF machine ${machine}`;
}

/** The versions that a plugin says it speaks; undefined when it does not answer. */
async function probe(path: string): Promise<string[] | undefined> {
  const env = { CNI_COMMAND: "VERSION", CNI_PATH: "/opt/cni/bin", PATH: "/usr/sbin:/usr/bin:/bin" };
  const stdin = '{"cniVersion":"1.0.0"}';
  const { stdout } = await run(path, [], { env, stdin, timeoutMs: probeMs });
  try {
    const answer = parseJson(stdout, path);
    const list = isObject(answer) ? answer["supportedVersions"] : undefined;
    return Array.isArray(list) ? list.filter((one) => typeof one === "string") : undefined;
  } catch (error) {
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/** The programs that genie itself starts. */
export function checkTools(view: NodeView): Said[] {
  const route = "it keeps the default route with its owner";
  const said: Said[] = [];
  const miss = (name: string) => findProgram(view, name) === undefined;
  if (miss("ip")) said.push(warning("ip is not on the node", `install iproute2: ${route}`));
  if (miss("nsenter"))
    said.push(warning("nsenter is not on the node", `install util-linux: ${route}`));
  if (enforcesPolicy(view.config) && miss("nft")) {
    said.push(problem("nft is not on the node", "install nftables: it puts policies in force"));
  }
  return said.length > 0 ? said : [ok("ip, nsenter and what policies need are there")];
}

/** Is what the runtime calls this very version? */
export async function checkInstalled(view: NodeView): Promise<Said[]> {
  const path = findProgram(view, "genie", view.config.binDirs);
  const dirs = view.config.binDirs.join(", ");
  if (path === undefined) return [problem(`genie is in none of ${dirs}`, "genie install")];
  const { stdout } = await run(path, ["version", "--json"], {
    env: {},
    stdin: "",
    timeoutMs: probeMs,
  });
  const there = /"version":"([^"]+)"/.exec(stdout)?.[1];
  if (there === undefined) {
    return [problem(`${path} is no genie, or does not run here`, "genie install")];
  }
  if (there !== manifest.version) {
    const what = `genie ${there} is installed, this is ${manifest.version}`;
    return [warning(what, "genie install, or ask the installed one")];
  }
  const note = openSite(view.root).note.files.length > 0;
  return [ok(`genie ${there} in ${join(path, "..")}${note ? "" : ", put there by hand"}`)];
}
