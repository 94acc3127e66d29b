/**
 * The table of the operator's commands. Each command loads only what it needs. What help says of
 * it, and which options it takes, is in help.txt: its pages stand there as they are printed.
 * Parsing and completion read the options there too, so none is described twice.
 */
import manifest from "../../package.json";
import type { Host } from "../call.ts";
import { supportedVersions } from "../cni.ts";
import { type Flags, text, UsageError } from "../config/usage.ts";
import pagesOfHelp from "./help.txt" with { type: "text" };

/** One command of the operator. */
export interface CommandLine {
  summary: string;
  /**
   * Its page of help: usage, summary, and rows that are read by {@link optionsOf}. It takes words
   * that belong to no option when one of the rows is about them.
   */
  help: string;
  run: (host: Host, flags: Flags) => Promise<number> | number;
}

/** One option of a command. */
export interface CommandOption {
  /** Without the dashes. */
  name: string;
  /** What its value is: FILE and DIR are paths; "" when it takes none. */
  value: string;
  /** What it does, in one line. */
  text: string;
}

/** Column of the help in which the text of an option begins. */
const textColumn = 23;

/** The options of a command: rows `  --name VALUE  text` of its help; a text may go on below. */
export function optionsOf({ help }: Pick<CommandLine, "help">): CommandOption[] {
  const options: CommandOption[] = [];
  for (const line of help.split("\n")) {
    const text = line.slice(textColumn);
    if (line.startsWith("  --")) {
      const [name = "", value = ""] = line.slice(4, textColumn).trim().split(" ");
      options.push({ name, value, text });
    } else if (line.startsWith(" ".repeat(textColumn))) {
      const last = options.at(-1);
      if (last) last.text += ` ${text}`;
    }
  }
  return options;
}

/** What each command does, by its name. */
const runs: Record<string, CommandLine["run"]> = {
  plan: async (host, flags) => {
    const { readOwnConfig } = await import("../node/genie_config.ts");
    const { askedPath } = await import("../node/runtimes.ts");
    const { missingAgent } = await import("../node/node_view.ts");
    const { runPlan } = await import("./plan_command.ts");
    const own = readOwnConfig(text(flags, "cni-config"));
    return runPlan(host, flags, { own, askedPath, missingAgent, width: terminalWidth(flags) });
  },
  validate: async (host, flags) =>
    (await import("../node/validate.ts")).runValidate(host, flags, terminalWidth(flags)),
  install: async (host, flags) =>
    (await import("../node/install.ts")).runInstall(host, flags, ownProgram("install itself")),
  uninstall: async (host, flags) => (await import("../node/install.ts")).runUninstall(host, flags),
  doctor: async (host, flags) =>
    (await import("../node/doctor.ts")).runDoctor(host, flags, terminalWidth(flags)),
  manifest: async (host, flags) =>
    (await import("../node/manifest_command.ts")).runManifest(host, flags),
  agent: async (host, flags) => (await import("../agent/agent.ts")).runAgent(host, flags),
  repair: async (host, flags) =>
    (await import("../node/repair.ts")).runRepair(host, flags, terminalWidth(flags)),
  switch: async (host, flags) =>
    (await import("../node/switch.ts")).runSwitch(host, flags, terminalWidth(flags)),
  gc: async (host, flags) =>
    (await import("../node/garbage.ts")).runGc(host, flags, terminalWidth(flags)),
  webhook: async (host, flags) =>
    (await import("../kubernetes/webhook.ts")).runWebhook(host, flags),
  version: runVersion,
  completion: async (host, flags) => {
    const { runCompletion } = await import("./command_line.ts");
    return runCompletion(host, flags, async (kind) => {
      const { readOwnConfig } = await import("../node/genie_config.ts");
      return (await import("../report/names.ts")).namesOf(kind, readOwnConfig(undefined));
    });
  },
  status: async (host, flags) =>
    (await import("../node/health.ts")).runStatus(host, flags, terminalWidth(flags)),
  try: async (host, flags) =>
    (await import("../node/trial.ts")).runTry(host, flags, () => ownProgram("try networks")),
  pods: async (host, flags) => {
    const { runPods } = await import("../report/pods.ts");
    return runPods(host, flags, await reportContext(flags));
  },
  report: async (host, flags) => {
    const { runReport } = await import("../report/command.ts");
    return runReport(host, flags, await reportContext(flags));
  },
};

const pages = pagesOfHelp.replace("{{version}}", manifest.version).split("----\n");

/** The template of what `genie help` prints; it shows the commands. */
export const [overview = ""] = pages;

/** Every command, by its name. */
export const commandLines: Record<string, CommandLine> = Object.fromEntries(
  Object.entries(runs).map(([name, run]) => {
    const help = pages.find((page) => page.startsWith(`genie ${name} `)) ?? "";
    const [, , summary = ""] = help.split("\n");
    return [name, { summary, help, run }];
  }),
);

/** Runs what prints JSON, and prints that as YAML. @returns its exit status */
export async function printYaml(
  host: Host,
  run: (host: Host) => Promise<number> | number,
): Promise<number> {
  let json = "";
  const status = await run({ ...host, stdout: (text) => (json += text) });
  const { toYaml } = await import("../cluster/yaml.ts");
  if (json !== "") host.stdout(toYaml([JSON.parse(json)]));
  return status;
}

/** Path of this program's own file. @throws UsageError when it runs from source */
function ownProgram(what: string): string {
  if (Bun.main.startsWith("/$bunfs/")) return process.execPath;
  throw new UsageError(`Only the compiled program can ${what}: bun run build`);
}

/** True where output goes to a terminal. */
export function isTerminal(): boolean {
  return process.stdout.columns !== undefined;
}

/** Columns of the terminal; where output goes elsewhere, or is to be wide, nothing is cut. */
function terminalWidth(flags: Flags): number {
  const columns = flags["output"] === "wide" ? undefined : process.stdout.columns;
  return columns ?? Number.POSITIVE_INFINITY;
}

async function reportContext(flags: Flags) {
  const { readOwnConfig } = await import("../node/genie_config.ts");
  return { width: terminalWidth(flags), readOwnConfig };
}

function runVersion(host: Host, flags: Flags): number {
  const document = { version: manifest.version, cniVersions: supportedVersions };
  const line = `genie ${manifest.version}, CNI ${supportedVersions.join(", ")}`;
  host.stdout(`${flags["json"] ? JSON.stringify(document) : line}\n`);
  return 0;
}
