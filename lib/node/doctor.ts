/**
 * `genie doctor`: examines a node, says what is wrong, and what to do. Changes nothing. Here are
 * the command, the table of all checks, and the checks of the installation: runtime, conf dir,
 * plugin table and programs. Sources: containerd's and CRI-O's configuration, what Cilium and
 * Multus do in a conf dir, CNI SPEC 1.1 §2 VERSION, elf(5).
 */
import { readSync, statSync } from "node:fs";
import { arch } from "node:os";
import { dirname, join } from "node:path";
import manifest from "../../package.json";
import type { Host } from "../call.ts";
import { toCniError } from "../cni.ts";
import { ignoredMultusKeys } from "../config/foreign_config.ts";
import type { Flags } from "../config/usage.ts";
import { isObject } from "../json.ts";
import type { Network } from "../networks.ts";
import { typesOf } from "../recovery/plugin_keys.ts";
import { enforcesPolicy } from "../settings.ts";
import * as node from "./doctor_node.ts";
import { listFolder, statIfThere, withOpen } from "./files.ts";
import { callsGenie, metaPlugins, pluginsOf, readConfs, whyNotLoaded } from "./genie_config.ts";
import { folderOption, openSite, paths } from "./installation.ts";
import {
  askCniVersions,
  askProgram,
  askVersion,
  type CheckResult,
  type Finding,
  findProgram,
  formatFindings,
  isExecutable,
  type NodeView,
  ok,
  orOk,
  problem,
  sayDefault,
  viewNode,
  warning,
} from "./node_view.ts";
import {
  askRuntimes,
  type RunningRuntime,
  type RuntimeSettings,
  readRuntimes,
} from "./runtimes.ts";

type Check = [name: string, check: (view: NodeView) => CheckResult[] | Promise<CheckResult[]>];

const checks: Check[] = [
  ["policy", node.checkPolicy],
  ["installed", checkInstalled],
  ["order", checkOrder],
  ["runtime", checkRuntimes],
  ["table", checkTable],
  ["plugins", checkPlugins],
  ["tools", checkTools],
  ["overlap", node.checkOverlaps],
  ["capacity", node.checkCapacity],
  ["kernel", node.checkKernel],
  ["disk", node.checkDisk],
  ["record", node.checkRecord],
  ["clock", node.checkClock],
  ["api", node.checkApi],
];

/** Longest time of one check; what it waits for has shorter limits. */
const checkMs = 60_000;

/**
 * Runs `genie doctor`. @returns exit status: 1 when there is a problem
 * @param width columns of the terminal, Infinity for none
 */
export async function runDoctor(host: Host, flags: Flags, width: number): Promise<number> {
  const view = await lookAtNode(host, flags);
  const findings = await examine(view);
  const isWell = !findings.some(({ verdict }) => verdict === "problem");
  host.stdout(
    flags["json"]
      ? `${JSON.stringify({ ok: isWell, findings }, null, 2)}\n`
      : formatFindings(findings, Math.min(width, 80)),
  );
  return isWell ? 0 : 1;
}

/** The node that the options name. */
export async function lookAtNode(host: Host, flags: Flags): Promise<NodeView> {
  const root = folderOption(flags, "host-root") ?? "/";
  const running = await askRuntimes(host, root);
  const confDir = folderOption(flags, "conf-dir") ?? findConfDir(root, running);
  return viewNode(host, root, confDir, running);
}

/** What the checks find, or some of them by their names. */
export async function examine(view: NodeView, some?: readonly string[]): Promise<Finding[]> {
  const wanted = checks.filter(([name]) => some?.includes(name) ?? true);
  return (await Promise.all(wanted.map((check) => runCheck(view, check)))).flat();
}

/** Where genie's CNI config is: in the folder of a runtime that answers or of its settings. */
function findConfDir(root: string, running: RunningRuntime[]): string {
  const dirsOf = (all: RuntimeSettings[]) => all.flatMap(({ confDir }) => confDir ?? []);
  const dirs = [...dirsOf(running), paths.confDir, ...dirsOf(readRuntimes(root))];
  return dirs.find((dir) => readConfs(root, dir).some(callsGenie)) ?? paths.confDir;
}

/** Runs one check; if it fails or hangs, the others still have their say. */
async function runCheck(view: NodeView, [name, check]: Check): Promise<Finding[]> {
  const late = Promise.withResolvers<CheckResult[]>();
  const tooLate = [problem("it took too long to look", "see the load of the node")];
  const timer = setTimeout(late.resolve, checkMs, tooLate);
  let results: CheckResult[];
  try {
    results = await Promise.race([check(view), late.promise]);
  } catch (error) {
    results = [problem(toCniError(error).message, "that should not be: report it")];
  } finally {
    clearTimeout(timer);
  }
  return results.map((one) => ({ check: name, ...one }));
}

/** Is what the runtime calls this very version? */
async function checkInstalled(view: NodeView): Promise<CheckResult[]> {
  const { binDirs } = view.config;
  const path = findProgram(view, "genie", binDirs);
  if (path === undefined) {
    return [problem(`genie is in none of ${binDirs.join(", ")}`, "genie install")];
  }
  const version = await askVersion(path);
  if (version === undefined) {
    return [problem(`${path} is no genie, or does not run here`, "genie install")];
  }
  if (version !== manifest.version) {
    const what = `genie ${version} is installed, this is ${manifest.version}`;
    return [warning(what, "genie install, or ask the installed one")];
  }
  const isNoted = openSite(view.root).note.files.length > 0;
  return [ok(`genie ${version} in ${dirname(path)}${isNoted ? "" : ", put there by hand"}`)];
}

/** The order of the conf dir, and who takes the place of genie. */
function checkOrder({ confs, confDir, at, own }: NodeView): CheckResult[] {
  const results: CheckResult[] = [];
  const first = confs.find(({ value }) => isObject(value));
  if (!first) results.push(problem(`${confDir} has no CNI config`, "genie install"));
  else if (callsGenie(first)) results.push(ok(`runtimes take ${first.name}, which calls genie`));
  else {
    const type = String(pluginsOf(first.value)[0]?.["type"]);
    const remedy = own ? `rename ${first.name} to stand behind genie's` : "genie install";
    results.push(problem(`runtimes take ${first.name} (${type}) in ${confDir}, not genie`, remedy));
  }
  for (const { name } of confs.filter(({ value }) => !isObject(value))) {
    const what = `${name} is no JSON: containerd stops there, CRI-O passes over it`;
    results.push(warning(what, `repair or remove ${name}`));
  }
  for (const name of listFolder(at(confDir)).filter((one) => one.endsWith(".cilium_bak"))) {
    const what = `${name}: Cilium puts configs of others out of use`;
    results.push(problem(what, "set cni.exclusive=false in it"));
  }
  for (const { name, value } of confs) {
    const meta = pluginsOf(value).find(({ type }) => metaPlugins.includes(String(type)));
    if (!meta) continue;
    const what = `${name} is a config of ${String(meta["type"])}, which calls plugins too`;
    results.push(warning(what, `remove ${name}: genie serves its annotations`));
  }
  const calling = confs.filter(callsGenie).map(({ name }) => name);
  if (calling.length > 1) {
    results.push(warning(`${calling.join(" and ")} call genie`, "keep the first of them"));
  }
  const ignored = own && ignoredMultusKeys(own);
  if (ignored) results.push(warning(ignored, "say it in the plugin table"));
  const { capabilities, delOnly } = own ?? {};
  const key = "io.kubernetes.cri.pod-annotations";
  if (delOnly === true) {
    const what = "genie is being uninstalled: it answers DEL alone";
    results.push(warning(what, "genie uninstall, again"));
  } else if (own && !(isObject(capabilities) && capabilities[key] === true)) {
    const what = "genie's config does not ask for annotations: each ADD asks the API for its pod";
    results.push(warning(what, `add capabilities = { "${key}": true } to it`));
  }
  return results;
}

/** Settings and versions of the runtimes and the kubelet that are on the node. */
async function checkRuntimes(view: NodeView): Promise<CheckResult[]> {
  // The files of one that answers may have been changed since it started.
  const asked = view.runtimes.map(({ socket }) => view.at(socket));
  const silent = readRuntimes(view.root).filter(
    ({ socket }) => socket === undefined || !asked.includes(view.at(socket)),
  );
  const results = [...view.runtimes, ...silent].flatMap((one) => checkSettings(view, one));
  results.push(...view.runtimes.flatMap((one) => checkLoaded(view, one)));
  for (const name of ["containerd", "crio", "kubelet"]) {
    const file = findProgram(view, name);
    if (file === undefined) continue;
    const output = await askProgram(file, ["--version"]);
    results.push(checkRelease(view, name, /\bv?(\d+\.\d+\.\d+)/.exec(output)?.[1]));
  }
  if (results.length > 0) return results;
  return [warning("no container runtime was found", "see its own log")];
}

/** Does it call what stands in its folder now? */
function checkLoaded({ confDir, confs }: NodeView, runtime: RunningRuntime): CheckResult[] {
  if (runtime.confDir !== confDir) return [];
  const why = whyNotLoaded(runtime, confs);
  const remedy = `touch ${confDir}/.reload && rm ${confDir}/.reload: it then looks anew`;
  return why === undefined ? [] : [problem(why, remedy)];
}

function checkSettings({ confDir, at }: NodeView, settings: RuntimeSettings): CheckResult[] {
  const { file, binDirs, confsMax, network, isDisabled } = settings;
  const results: CheckResult[] = [];
  if (isDisabled) {
    results.push(warning(`${file} switches CRI off`, "take cri out of disabled_plugins"));
  }
  if (settings.confDir !== undefined && settings.confDir !== confDir) {
    const what = `${file} reads CNI configs from ${settings.confDir}`;
    results.push(problem(what, `genie install --conf-dir ${settings.confDir}`));
  }
  if (binDirs.length > 0 && !binDirs.some((dir) => statIfThere(at(join(dir, "genie"))))) {
    const what = `${file} looks for plugins in ${binDirs.join(", ")}, and genie is not there`;
    results.push(problem(what, `genie install --bin-dir ${binDirs[0]}`));
  }
  if (confsMax !== undefined && confsMax !== 1) {
    const what = `${file} has max_conf_num = ${confsMax}: the runtime takes several configs`;
    results.push(problem(what, "set max_conf_num = 1"));
  }
  if (network !== undefined && network !== "" && network !== "genie") {
    const what = `${file} has cni_default_network = "${network}"`;
    results.push(problem(what, 'set it to "genie", or take it out'));
  }
  return orOk(results, `${file} suits`);
}

/** The first releases that hand the annotations of a pod to plugins. */
const annotationsSince: Record<string, string> = { containerd: "1.5.0", crio: "1.29.0" };

function checkRelease({ config }: NodeView, name: string, release: string | undefined) {
  if (release === undefined) return warning(`${name} does not say its version`, `see ${name}`);
  const since = annotationsSince[name];
  if (since !== undefined && Bun.semver.order(release, since) < 0) {
    const what = `${name} ${release} hands over no annotations (since ${since})`;
    return warning(what, "give genie a kubeconfig that may get pods");
  }
  if (name === "crio" && config.result === "merged") {
    const what = `${name} ${release} takes every address of the result for the pod's`;
    return warning(what, 'set result = "primary" in the plugin table');
  }
  return ok(`${name} ${release}`);
}

async function checkTable(view: NodeView): Promise<CheckResult[]> {
  const { configError, config, networks, problems } = view;
  if (configError) return [problem(configError.message, "put it right: until then no pod starts")];
  const results = problems.map(({ message }) => problem(message, "genie validate says more"));
  const names = networks.map(({ name }) => name);
  if (names.length === 0) results.push(problem("there is no network", "install one, see README"));
  for (const name of config.default.networks.map((one) => one.replace(/@.*/, ""))) {
    if (names.includes(name)) continue;
    const what = `default.networks names ${name}, which is none`;
    results.push(problem(what, "install it, or rename it"));
  }
  const detail = `${config.file || "no table"}; networks: ${names.join(", ")}`;
  return [...orOk(results, detail), ok(await sayDefault(view))];
}

/** Can every plugin of the networks be called, IPAM plugins included? Each is asked once. */
async function checkPlugins(view: NodeView): Promise<CheckResult[]> {
  const users = new Map<string, Set<Network>>();
  for (const network of view.networks) {
    for (const type of typesOf(network.list)) {
      users.getOrInsertComputed(type, () => new Set()).add(network);
    }
  }
  const results = await Promise.all(
    [...users].map(([type, networks]) => checkPlugin(view, type, [...networks])),
  );
  const bad = results.filter(({ verdict }) => verdict !== "ok");
  return users.size === 0 ? [] : orOk(bad, `${[...users.keys()].join(", ")} answer VERSION`);
}

async function checkPlugin(view: NodeView, type: string, users: Network[]): Promise<CheckResult> {
  const { binDirs } = view.config;
  const path = findProgram(view, type, binDirs);
  const who = `${type} (${users.map(({ name }) => name).join(", ")})`;
  if (path === undefined) {
    const remedy = `install ${type}, or set bin_dirs`;
    return problem(`${who} is in none of ${binDirs.join(", ")}`, remedy);
  }
  if (!isExecutable(path)) return problem(`${path} cannot be run`, `chmod 755 ${path}`);
  if ((statSync(path).mode & 0o022) !== 0) {
    return problem(`${path} can be changed by others, and runs as root`, `chmod go-w ${path}`);
  }
  const foreign = foreignMachine(path);
  if (foreign !== undefined) {
    return problem(`${path} is for another machine (${foreign})`, `install ${type} for this one`);
  }
  const spoken = await askCniVersions(path);
  if (!spoken) {
    const remedy = `run it by hand: CNI_COMMAND=VERSION ${path}`;
    return problem(`${path} does not answer VERSION`, remedy);
  }
  const asking = users.filter(({ list }) => !spoken.includes(list.cniVersion));
  if (asking.length === 0) return ok(who);
  const unknown = [...new Set(asking.map(({ list }) => list.cniVersion))].join(", ");
  const remedy = `set cniVersion to ${spoken.at(-1)}, or install a newer ${type}`;
  const names = asking.map(({ name }) => name).join(", ");
  return problem(`${type} (${names}) does not speak CNI ${unknown}`, remedy);
}

/** `e_machine` of the machines that genie is built for. */
const machines: Record<string, number> = { x64: 0x3e, arm64: 0xb7 };

/** Which machine an ELF file is for, where it is not ours; undefined for ours and for scripts. */
export function foreignMachine(path: string): string | undefined {
  const header = Buffer.alloc(20);
  const length = withOpen(path, (fd) => readSync(fd, header));
  if (length < header.length || header.readUInt32BE(0) !== 0x7f454c46) return undefined;
  const machine = header[5] === 1 ? header.readUInt16LE(18) : header.readUInt16BE(18);
  if (machine === machines[arch()]) return undefined;
  const known = Object.entries(machines).find(([, number]) => number === machine)?.[0];
  return known ?? `ELF machine ${machine}`;
}

function checkTools(view: NodeView): CheckResult[] {
  const missing = (name: string, verdict: typeof problem, remedy: string) =>
    findProgram(view, name) ? [] : [verdict(`${name} is not on the node`, remedy)];
  const route = "it keeps the default route with its owner";
  const results = [
    ...missing("ip", warning, `install iproute2: ${route}`),
    ...missing("nsenter", warning, `install util-linux: ${route}`),
  ];
  const nft = "install nftables: it puts policies in force";
  if (enforcesPolicy(view.config)) results.push(...missing("nft", problem, nft));
  return orOk(results, "ip, nsenter and what policies need are there");
}
