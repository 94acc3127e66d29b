/**
 * The table of the operator's commands, and their help. Each command loads only what it needs.
 * Output for people on a terminal, `--json` for programs; exit status 0 done, 1 found a problem, 2
 * used wrongly.
 */
import { parseArgs } from "node:util";
import manifest from "../package.json";
import { type Host, supportedVersions, toCniError } from "./cni.ts";
import { type Flags, UsageError } from "./usage.ts";

/** One command of the operator. */
interface CommandLine {
  /** What stands after its name in the usage line. */
  usage: string;
  summary: string;
  /** Complete text for `--help`, after the usage line. */
  help: string;
  options: NonNullable<Parameters<typeof parseArgs>[0]>["options"];
  /** Takes words that belong to no option. */
  words?: boolean;
  run: (host: Host, flags: Flags) => Promise<number> | number;
}

const cniConfigHelp = `  --cni-config FILE    the CNI config through which the runtime calls genie;
                       default: the first one with type genie in /etc/cni/net.d
  --json               one JSON document, for programs`;

const commandLines: Record<string, CommandLine> = {
  plan: {
    usage: "--namespace NAME --pod NAME [options]",
    summary: "show what a pod would be attached to, and why; attaches nothing",
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
    run: async (host, flags) => {
      const { runPlan } = await import("./explain.ts");
      return runPlan(host, flags, terminalWidth());
    },
  },
  validate: {
    usage: "[--cni-config FILE] [--json]",
    summary: "check the plugin table, every config list and the plugin binaries",
    help: cniConfigHelp,
    options: { "cni-config": { type: "string" }, json: { type: "boolean" } },
    run: async (host, flags) => {
      const { runValidate } = await import("./validate.ts");
      return runValidate(host, flags, terminalWidth());
    },
  },
  version: {
    usage: "[--json]",
    summary: "show the version of genie and the CNI versions it speaks",
    help: "  --json               one JSON document, for programs",
    options: { json: { type: "boolean" } },
    run: runVersion,
  },
  report: {
    usage: "[pod NAMESPACE/NAME] [options]",
    summary: "show requests, networks, attachments and what failed, of the record",
    help: `  pod NAMESPACE/NAME   one pod: what it has, why, and each of its requests
  --since TIME         requests of the last 30m, 2h, 7d ...; default: all on record
  --network NAME       of one network
  --namespace NAME     of one namespace
  --pod NAME           of the pods of one name, or of NAMESPACE/NAME
  --command NAME       of ADD, DEL, CHECK, GC or STATUS
  --failed             failures alone
  --denied             failures by a rule alone
  --limit N            how many of the newest requests to list, default 20
  --csv                the rows themselves, for spreadsheets: all, unless there is a --limit
  --html FILE          a page for a browser: charts and tables, in one file
${cniConfigHelp}

Reads the record and changes nothing. Attachments, addresses and traffic are of now.`,
    options: {
      since: { type: "string" },
      network: { type: "string" },
      namespace: { type: "string" },
      pod: { type: "string" },
      command: { type: "string" },
      failed: { type: "boolean" },
      denied: { type: "boolean" },
      limit: { type: "string" },
      csv: { type: "boolean" },
      html: { type: "string" },
      "cni-config": { type: "string" },
      json: { type: "boolean" },
    },
    words: true,
    run: async (host, flags) => {
      const { runReport } = await import("./report_command.ts");
      return runReport(host, flags, terminalWidth());
    },
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
    const { values, positionals } = parseArgs({
      args: words,
      options: command.options ?? {},
      strict: true,
      allowPositionals: command.words ?? false,
    });
    return { ...(values as Flags), words: positionals };
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

/** Columns of the terminal; where output goes elsewhere nothing is cut. */
function terminalWidth(): number {
  return process.stdout.columns ?? Number.POSITIVE_INFINITY;
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
