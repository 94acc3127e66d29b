/**
 * The operator's commands: `genie plan`, `validate`, `version`, `help`. Output for people on a
 * terminal, `--json` for programs; exit status 0 done, 1 found a problem, 2 used wrongly.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import manifest from "../package.json";
import {
  CniError,
  code,
  type Host,
  interfaceNameIssue,
  isNetworkName,
  isObject,
  isSupported,
  parseJson,
  type Request,
  type StdinConfig,
  supportedVersions,
  toCniError,
} from "./cni.ts";
import type { Config } from "./config.ts";
import { findPlugin, findPlugins, listNetworks, type Network, resolveNetwork } from "./networks.ts";
import { makePlan, type Plan, pluginSearch, podLabel } from "./plan.ts";
import { annotationsCapability } from "./pod.ts";
import { loadConfig } from "./settings.ts";
import { formatTable } from "./table.ts";

/** Used wrongly: exit status 2 and a hint where to read on. */
class UsageError extends Error {}

type Flags = Record<string, string | boolean | string[] | undefined>;

/** One command of the operator. */
interface CommandLine {
  /** What stands after its name in the usage line. */
  usage: string;
  summary: string;
  /** Complete text for `--help`, after the usage line. */
  help: string;
  options: NonNullable<Parameters<typeof parseArgs>[0]>["options"];
  run: (host: Host, flags: Flags) => Promise<number> | number;
}

const cniConfigHelp = `  --cni-config FILE    the CNI config through which the runtime calls genie;
                       default: the first one with type genie in /etc/cni/net.d
  --json               one JSON document, for programs`;

const commandLines: Record<string, CommandLine> = {
  plan: {
    usage:
      "--namespace NAME --pod NAME [--annotation KEY=VALUE ...] [--ifname NAME] [--cni-config FILE] [--json]",
    summary: "show what a pod would be attached to, and why; runs nothing",
    help: `  --namespace NAME     namespace of the pod
  --pod NAME           name of the pod
  --annotation K=V     an annotation of the pod, any number of times; without one, the pod is
                       looked up in the Kubernetes API where credentials are configured
  --ifname NAME        interface the runtime asks for (CNI_IFNAME), default eth0
${cniConfigHelp}

Folders for plugin binaries: CNI_PATH, then bin_dirs of the plugin table.`,
    options: {
      namespace: { type: "string" },
      pod: { type: "string" },
      annotation: { type: "string", multiple: true },
      ifname: { type: "string" },
      "cni-config": { type: "string" },
      json: { type: "boolean" },
    },
    run: runPlan,
  },
  validate: {
    usage: "[--cni-config FILE] [--json]",
    summary: "check the plugin table, every config list and the plugin binaries",
    help: cniConfigHelp,
    options: { "cni-config": { type: "string" }, json: { type: "boolean" } },
    run: runValidate,
  },
  version: {
    usage: "[--json]",
    summary: "show the version of genie and the CNI versions it speaks",
    help: "  --json               one JSON document, for programs",
    options: { json: { type: "boolean" } },
    run: runVersion,
  },
};

/**
 * Runs one command line.
 * @param args words after the program's name
 * @returns exit status: 0 done, 1 found a problem, 2 used wrongly
 */
export async function runCommand(host: Host, args: string[]): Promise<number> {
  const [name = "help", ...rest] = args;
  if (["help", "--help", "-h"].includes(name)) return help(host, rest[0]);
  const command = Object.hasOwn(commandLines, name) ? commandLines[name] : undefined;
  try {
    if (!command) throw new UsageError(`Unknown command "${name}"`);
    if (rest.includes("--help") || rest.includes("-h")) return help(host, name);
    return await command.run(host, readFlags(command, rest));
  } catch (error) {
    if (error instanceof UsageError) {
      const about = command ? ` ${name} --help` : " help";
      host.stderr(`genie: error: ${error.message}\ngenie: hint: see genie${about}\n`);
      return 2;
    }
    const { code: number, message, details } = toCniError(error);
    host.stderr(`genie: error: ${message} (code ${number})\n${details ? `${details}\n` : ""}`);
    return 1;
  }
}

function readFlags(command: CommandLine, words: string[]): Flags {
  try {
    const { values } = parseArgs({ args: words, options: command.options ?? {}, strict: true });
    return values as Flags;
  } catch (error) {
    throw new UsageError(toCniError(error).message.replace(/^Internal error: /, ""));
  }
}

function help(host: Host, name?: string): number {
  const command = name && Object.hasOwn(commandLines, name) ? commandLines[name] : undefined;
  if (command) {
    host.stdout(`genie ${name} ${command.usage}\n\n${command.summary}\n\n${command.help}\n`);
    return 0;
  }
  if (name !== undefined) {
    host.stderr(`genie: error: Unknown command "${name}"\ngenie: hint: see genie help\n`);
    return 2;
  }
  const width = Math.max(...Object.keys(commandLines).map((one) => one.length));
  const lines = Object.entries(commandLines).map(
    ([one, { summary }]) => `  ${one.padEnd(width)}  ${summary}`,
  );
  host.stdout(`genie: a CNI plugin that attaches a pod to the networks it asks for

With CNI_COMMAND in the environment genie is a CNI plugin: a container runtime calls it.
Without it, genie is the node operator's tool:

${lines.join("\n")}
  ${"help".padEnd(width)}  show this, or the options of one command: genie help plan

Exit status: 0 done, 1 found a problem, 2 used wrongly.
`);
  return 0;
}

function text(flags: Flags, name: string): string | undefined {
  const value = flags[name];
  return typeof value === "string" ? value : undefined;
}

const confDirDefault = "/etc/cni/net.d";

/**
 * Our own CNI config: of the file named, else of the first list in the conf dir that calls genie,
 * else one with nothing set.
 */
function readOwnConfig(file: string | undefined): StdinConfig {
  if (file !== undefined) {
    const own = ownConfigOf(readText(file), file);
    if (own) return own;
    throw new CniError(
      code.invalidConfig,
      `Invalid CNI config ${file}: no plugin has type "genie"`,
    );
  }
  for (const path of confFiles(confDirDefault)) {
    try {
      const own = ownConfigOf(readText(path), path);
      if (own) return own;
    } catch (error) {
      // Files of others may be broken; validate reports those that a network needs.
      if (!(error instanceof CniError)) throw error;
    }
  }
  return { cniVersion: "1.1.0", name: "genie", type: "genie" };
}

function confFiles(dir: string): string[] {
  try {
    return readdirSync(dir)
      .filter((name) => /\.(conflist|conf|json)$/.test(name))
      .sort()
      .map((name) => join(dir, name));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return [];
    throw error;
  }
}

function readText(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code;
    throw new CniError(code.ioFailure, `Cannot read ${path}: ${reason}`, { cause: error });
  }
}

function ownConfigOf(content: string, path: string): StdinConfig | undefined {
  const value = parseJson(content, path);
  if (!isObject(value)) return undefined;
  const plugins = Array.isArray(value["plugins"]) ? value["plugins"] : [value];
  const own = plugins.find((plugin) => isObject(plugin) && plugin["type"] === "genie");
  if (!isObject(own)) return undefined;
  const name = value["name"];
  if (!isNetworkName(name)) {
    throw new CniError(code.invalidConfig, `Invalid CNI config ${path}: "name" is not valid`);
  }
  const cniVersion = isSupported(value["cniVersion"]) ? value["cniVersion"] : "1.1.0";
  return { ...own, name, cniVersion };
}

/** The request a runtime would send for this pod; nothing of it is executed. */
function dryRequest(host: Host, config: StdinConfig, flags: Flags): Request {
  const annotations = readAnnotationFlags(flags["annotation"]);
  const pod = { namespace: text(flags, "namespace"), name: text(flags, "pod") };
  if (!pod.namespace || !pod.name) throw new UsageError("Both --namespace and --pod are needed");
  if (/[;=]/.test(pod.namespace + pod.name)) throw new UsageError('Names cannot hold ";" or "="');
  const ifName = text(flags, "ifname") ?? "eth0";
  const issue = interfaceNameIssue(ifName);
  if (issue) throw new UsageError(`Invalid --ifname ${JSON.stringify(ifName)}: ${issue}`);
  const runtimeConfig = annotations && { [annotationsCapability]: annotations };
  return {
    command: "ADD",
    containerId: "plan",
    netns: "",
    ifName,
    args: `K8S_POD_NAMESPACE=${pod.namespace};K8S_POD_NAME=${pod.name}`,
    path: (host.env["CNI_PATH"] ?? "").split(":").filter((dir) => dir !== ""),
    cniVersion: "1.1.0",
    config: { ...config, ...(runtimeConfig && { runtimeConfig }) },
  };
}

function readAnnotationFlags(flags: Flags[string]): Record<string, string> | undefined {
  if (!Array.isArray(flags)) return undefined;
  return Object.fromEntries(
    flags.map((flag) => {
      const at = flag.indexOf("=");
      if (at < 1) throw new UsageError(`Invalid --annotation "${flag}": expected KEY=VALUE`);
      return [flag.slice(0, at), flag.slice(at + 1)];
    }),
  );
}

async function runPlan(host: Host, flags: Flags): Promise<number> {
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const request = dryRequest(host, stdin, flags);
  const config = loadConfig(stdin);
  const plan = await makePlan(host, config, request);
  if (flags["json"]) {
    host.stdout(`${JSON.stringify(planDocument(config, plan), null, 2)}\n`);
    return 0;
  }
  const rows = plan.attachments.map((one) => [
    one.network,
    one.ifName,
    one.list.plugins.map(({ type }) => type).join(", "),
    one.list.cniVersion,
    resolveNetwork(config, one.network).source,
    one.reason,
  ]);
  host.stdout(
    `Pod ${podLabel(plan.pod)}, annotations from: ${annotationOrigin[plan.pod.source]}\n\n` +
      formatTable(
        [
          { title: "NETWORK" },
          { title: "INTERFACE" },
          { title: "PLUGINS", shrinks: true },
          { title: "CNI" },
          { title: "CONFIG", shrinks: true },
          { title: "WHY", shrinks: true },
        ],
        rows,
        terminalWidth(),
      ),
  );
  return 0;
}

const annotationOrigin: Record<Plan["pod"]["source"], string> = {
  runtime: "the command line",
  mesos: "Mesos labels",
  "cni-args": "CNI_ARGS",
  api: "the Kubernetes API",
  none: "nowhere, the pod asks for nothing",
};

/** Columns of the terminal; where output goes elsewhere nothing is cut. */
function terminalWidth(): number {
  return process.stdout.columns ?? Number.POSITIVE_INFINITY;
}

/** Stable shape of `genie plan --json`. */
function planDocument(config: Config, { pod, attachments }: Plan): object {
  return {
    pod: { namespace: pod.namespace, name: pod.name, uid: pod.uid },
    annotationsFrom: pod.source,
    attachments: attachments.map((one) => ({
      network: one.network,
      interface: one.ifName,
      primary: one.primary,
      cniVersion: one.list.cniVersion,
      plugins: one.list.plugins.map(({ type }, i) => ({ type, path: one.plugins[i] })),
      config: resolveNetwork(config, one.network).source,
      reason: one.reason,
    })),
  };
}

/** A finding of `genie validate`. */
interface Finding {
  network: string;
  verdict: "ok" | "problem";
  detail: string;
}

function runValidate(host: Host, flags: Flags): number {
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const config = loadConfig(stdin);
  const findings = validate(host, config, stdin);
  const bad = findings.some(({ verdict }) => verdict === "problem");
  if (flags["json"]) {
    host.stdout(`${JSON.stringify({ table: config.file, ok: !bad, findings }, null, 2)}\n`);
    return bad ? 1 : 0;
  }
  host.stdout(
    `Plugin table: ${config.file || "none, every config list in the conf dir is a network"}\n\n` +
      formatTable(
        [{ title: "NETWORK" }, { title: "VERDICT" }, { title: "DETAIL", shrinks: true }],
        findings.map(({ network, verdict, detail }) => [network, verdict, detail]),
        terminalWidth(),
      ),
  );
  return bad ? 1 : 0;
}

/** Checks every network and every name the table refers to. */
function validate(host: Host, config: Config, stdin: StdinConfig): Finding[] {
  const request = dryRequest(host, stdin, { namespace: "validate", pod: "validate" });
  const search = pluginSearch(config, request);
  const { networks, problems } = listNetworks(config);
  const own = (network: Network) =>
    network.list.plugins.some(({ type }) => type === "genie") && !network.entry;
  const findings = networks
    .filter((network) => !own(network))
    .map((network): Finding => {
      try {
        findPlugins(network, search);
        missingIpam(network, search.dirs);
        const types = network.list.plugins.map(({ type }) => type).join(", ");
        return {
          network: network.name,
          verdict: "ok",
          detail: `${types} (CNI ${network.list.cniVersion}) from ${network.source}`,
        };
      } catch (error) {
        return { network: network.name, verdict: "problem", detail: toCniError(error).message };
      }
    });
  for (const problem of problems) {
    findings.push({ network: "-", verdict: "problem", detail: problem.message });
  }
  const named: [string, string[]][] = [
    ["default.networks", config.default.networks],
    ["default.always", config.default.always],
    ["select.candidates", config.select.candidates ?? []],
  ];
  for (const [key, names] of named) {
    for (const name of names.map((one) => one.replace(/@.*/, ""))) {
      try {
        resolveNetwork(config, name);
      } catch (error) {
        findings.push({
          network: name,
          verdict: "problem",
          detail: `named by ${key}: ${toCniError(error).message}`,
        });
      }
    }
  }
  return findings;
}

/** The IPAM plugin is a binary of its own that the interface plugin will look for. */
function missingIpam(network: Network, dirs: string[]): void {
  for (const { type, ipam } of network.list.plugins) {
    const ipamType = isObject(ipam) ? ipam["type"] : undefined;
    if (typeof ipamType !== "string" || ipamType === "" || findPlugin(ipamType, dirs)) continue;
    throw new CniError(
      code.delegateNotFound,
      `Cannot attach network "${network.name}": IPAM plugin "${ipamType}" of plugin "${type}" is ` +
        `in none of ${dirs.join(", ")}`,
    );
  }
}

function runVersion(host: Host, flags: Flags): number {
  if (flags["json"]) {
    host.stdout(
      `${JSON.stringify({ version: manifest.version, cniVersions: supportedVersions })}\n`,
    );
  } else {
    host.stdout(`genie ${manifest.version}, CNI ${supportedVersions.join(", ")}\n`);
  }
  return 0;
}
