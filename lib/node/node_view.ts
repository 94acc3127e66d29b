/**
 * A node as `genie install` and `genie doctor` examine it, from inside or with its root mounted
 * somewhere: its configuration, its networks and its programs. And the form of doctor's findings.
 */
import { basename, dirname, join } from "node:path";
import { findPlugin } from "../binaries.ts";
import type { Host, StdinConfig } from "../call.ts";
import { CniError, code, oneLine, toCniError } from "../cni.ts";
import { parseConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { programDirs, run } from "../exec.ts";
import { isObject, parseJson } from "../json.ts";
import { candidateNetworks, firstOfGenie, listNetworks } from "../node_networks.ts";
import { aliveSince, neededResources, whyStale } from "../policy/store.ts";
import { orUndefined } from "../recovery/tried.ts";
import { plural } from "../report/quantity.ts";
import { readOrEmpty } from "../report/record_reader.ts";
import { paint, visibleText } from "../report/table.ts";
import { enforcesPolicy, loadConfig } from "../settings.ts";
import { hostPath, readIfThere, statIfThere } from "./files.ts";
import { callsGenie, networkBefore, ownEntry, readConfs } from "./genie_config.ts";
import { paths } from "./installation.ts";
import { askRuntimes, type RunningRuntime, runtimePath } from "./runtimes.ts";

/** File in `state_dir` that a running agent holds locked. */
export const agentLock = "agent.lock";

/** A node. */
export type NodeView = Awaited<ReturnType<typeof viewNode>>;

/**
 * Reads a node.
 * @param confDir where the runtime looks for CNI configs
 * @param running what {@link askRuntimes} answered, if it was asked
 */
export async function viewNode(
  host: Host,
  root: string,
  confDir: string,
  running?: RunningRuntime[],
) {
  const runtimes = running ?? (await askRuntimes(host, root));
  const at = (path: string) => hostPath(root, path);
  const confs = readConfs(root, confDir);
  const own = ownEntry(confs.find(callsGenie)?.value);
  let config = parseConfig("", "");
  let configError: CniError | undefined;
  try {
    const table = await readConfig(root, own);
    config = {
      ...table,
      binDirs: [...new Set([...runtimePath(root, runtimes), ...table.binDirs])],
    };
  } catch (error) {
    configError = toCniError(error);
  }
  const { networks, problems } = listNetworks(configAt(root, config));
  return {
    host,
    root,
    /** Where a path of the node is for us. */
    at,
    /** Its plugin table; `binDirs` begins with the folders of the runtimes. */
    config,
    /** Why the table cannot be used; `config` has the defaults then. */
    configError,
    confDir,
    confs,
    /** genie's entry in the first config that calls it. */
    own,
    networks: networks.filter(({ list }) => !list.plugins.some(({ type }) => type === "genie")),
    problems,
    /** Runtimes that answer. */
    runtimes,
    /** The text of a file, such as one of `/proc`; "" when there is none. */
    read: (path: string) => readIfThere(at(path)) ?? "",
  };
}

/** What pods that ask for nothing get, for people. */
export async function sayDefault({ root, config, own, confDir }: NodeView): Promise<string> {
  const here = configAt(root, config);
  const search = { dirs: here.binDirs, ownType: "genie" };
  const named = config.multus?.clusterNetwork || config.default.networks.join(", ");
  const wanted = named || (await firstOfGenie(here, search, own));
  const candidates = candidateNetworks(here, search);
  const what = "pods that ask for nothing get";
  if (wanted || candidates.length < 2) return `${what} ${wanted || candidates[0] || "no network"}`;
  const before = networkBefore(root, confDir);
  const remedy =
    before && `: default.networks = ["${before}"] gives all of them what the runtime did`;
  return `${what} one of ${candidates.join(", ")}, chosen by KPI${remedy ?? ""}`;
}

/** The table; on the node itself as a call would read it, with the keys of the CNI config. */
async function readConfig(root: string, own: Record<string, unknown> | undefined): Promise<Config> {
  const stdin: StdinConfig = { name: "genie", ...own };
  if (root === "/") return loadConfig(stdin);
  const path = typeof stdin["plugins_file"] === "string" ? stdin["plugins_file"] : paths.table;
  const text = readIfThere(hostPath(root, path));
  return text === undefined ? parseConfig("", "") : parseConfig(text, path);
}

/** A table with the node's paths replaced by what they are for us. @throws CniError 5 */
export function configAt(root: string, config: Config): Config {
  const plugins = [...config.plugins].map(([name, entry]) => {
    const conf = entry.conf?.startsWith("/") ? hostPath(root, entry.conf) : entry.conf;
    return [name, { ...entry, ...(conf !== undefined && { conf }) }] as const;
  });
  return {
    ...config,
    confDir: hostPath(root, config.confDir),
    binDirs: config.binDirs.map((dir) => hostPath(root, dir)),
    plugins: new Map(plugins),
  };
}

/** Why pods do not start, where network policy is to be enforced and no agent says which. */
export function missingAgent(config: Config, nowMs: number): string | undefined {
  if (!enforcesPolicy(config)) return undefined;
  const { enforce, maxAgeMs, whenStale } = config.policy;
  const aliveMs = readOrEmpty(config.stateDir, ({ database, tables }) =>
    tables.has("policy_watches") ? aliveSince({ database }, neededResources(enforce)) : 0,
  );
  const why = whyStale(maxAgeMs, aliveMs, nowMs);
  if (why === undefined) return undefined;
  const pods = "pods on networks with network policy";
  const effect = whenStale === "closed" ? "are refused (code 11)" : "start without new policies";
  return `${pods} ${effect}: ${why}`;
}

/** Path of a program of the node in the first folder that has it; undefined: none. */
export function findProgram(
  { at }: NodeView,
  name: string,
  dirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/bin"],
): string | undefined {
  return dirs.map((dir) => at(join(dir, name))).find((path) => statIfThere(path)?.isFile());
}

/** True for a file that may be run. */
export function isExecutable(path: string): boolean {
  return findPlugin(basename(path), [dirname(path)]) !== undefined;
}

/** What a program prints within 5 s; "" when it cannot be run. */
export async function askProgram(
  path: string,
  args: string[],
  { env = {}, stdin = "" }: { env?: Record<string, string>; stdin?: string } = {},
): Promise<string> {
  return (await run(path, args, { env, stdin, timeoutMs: 5000 })).stdout;
}

/** The Debian packages of programs that commands run, where they have other names. */
const packageOf: Record<string, string> = {
  ip: "iproute2",
  ping: "iputils-ping",
  systemctl: "systemd",
};
/** How long such a program may take, in ms. */
const toolMs = 10_000;

/** Path of a program of this machine. @throws CniError 5 where it does not have it */
export function programOf(name: string): string {
  const path = findPlugin(name, programDirs);
  if (path !== undefined) return path;
  const message = `"${name}" is not on the node: install ${packageOf[name] ?? name}`;
  throw new CniError(code.ioFailure, message);
}

/** Runs a program of this machine. @throws CniError 5 when it fails, unless that `mayFail` */
export async function tool(host: Host, name: string, args: string[], mayFail = false) {
  const env = { PATH: host.env["PATH"] ?? programDirs.join(":") };
  const ended = await run(programOf(name), args, { env, stdin: "", timeoutMs: toolMs });
  if (mayFail || (ended.kind === "exit" && ended.status === 0)) return ended;
  const why = oneLine(ended.stderr || ended.kind, 300);
  const root = /not permitted|ermission denied/.test(why) ? ": run it as root" : "";
  throw new CniError(code.ioFailure, `"${name} ${args.join(" ")}" failed: ${why}${root}`);
}

/** A key of the JSON object that a program has printed; undefined for any other output. */
export function keyOf(output: string, key: string): unknown {
  const value = orUndefined(() => parseJson(output, "output"));
  return isObject(value) ? value[key] : undefined;
}

/** CNI versions that a plugin says it knows; undefined where it does not answer VERSION. */
export async function askCniVersions(path: string): Promise<unknown[] | undefined> {
  const env = { CNI_COMMAND: "VERSION", CNI_PATH: "/opt/cni/bin", PATH: "/usr/sbin:/usr/bin:/bin" };
  const answer = await askProgram(path, [], { env, stdin: '{"cniVersion":"1.0.0"}' });
  const spoken = keyOf(answer, "supportedVersions");
  return Array.isArray(spoken) ? spoken : undefined;
}

/** Version of a genie; undefined for another program, such as CNI-Genie's. */
export async function askVersion(path: string): Promise<string | undefined> {
  const version = keyOf(await askProgram(path, ["version", "--json"]), "version");
  return typeof version === "string" ? version : undefined;
}

/** What a check of `genie doctor` found. */
export interface Finding {
  check: string;
  verdict: "ok" | "warning" | "problem";
  detail: string;
  /** What to do; "" for what is in order. */
  remedy: string;
}

/** A finding before the table of checks adds the name of the check. */
export type CheckResult = Omit<Finding, "check">;

/** It is as it should be. */
export function ok(detail: string): CheckResult {
  return { verdict: "ok", detail, remedy: "" };
}

const finding =
  (verdict: "warning" | "problem") =>
  (detail: string, remedy: string): CheckResult => ({ verdict, detail, remedy });
/** It works now, and may fail later. */
export const warning = finding("warning");
/** Pods fail, or get what they should not, until it is put right. */
export const problem = finding("problem");

/** The results, or that everything is in order where there are none. */
export function orOk(results: CheckResult[], detail: string): CheckResult[] {
  return results.length > 0 ? results : [ok(detail)];
}

/** Findings as {@link listFindings}, and how many there are of each kind. */
export function formatFindings(findings: readonly Finding[], width: number): string {
  const count = (verdict: Finding["verdict"]) =>
    findings.filter((one) => one.verdict === verdict).length;
  const sum = `${plural(count("problem"), "problem")}, ${plural(count("warning"), "warning")}`;
  return `${listFindings(findings, width)}\n\n${sum}, ${count("ok")} ok\n`;
}

/** One entry for each finding, wrapped to `width` columns; a remedy is below its finding. */
export function listFindings(findings: readonly Finding[], width: number): string {
  const checkWidth = Math.max(...findings.map(({ check }) => check.length));
  const lines = findings.map(({ verdict, check, detail, remedy }) => {
    const lead = `${verdict.padEnd(7)}  ${check.padEnd(checkWidth)}  `;
    const text = visibleText(detail) + (remedy === "" ? "" : `\n→ ${visibleText(remedy)}`);
    const wrapped = Bun.wrapAnsi(text, width - lead.length, { hard: true });
    const shown = wrapped.replaceAll("\n", `\n${" ".repeat(lead.length)}`);
    return paint(verdict) + lead.slice(verdict.length) + shown;
  });
  return lines.join("\n");
}
