/**
 * The operator's command line: finds the command, reads its options, prints its help, and the
 * scripts by which a shell completes it.
 * Output for people on a terminal, `--json` for programs; exit status 0 done, 1 found a problem, 2
 * used wrongly.
 * Sources: bash(1) "Programmable Completion", zshcompsys(1), fish's complete(1).
 */
import { parseArgs } from "node:util";
import type { Host } from "../call.ts";
import { toCniError } from "../cni.ts";
import { didYouMean, type Flags, text, UsageError, wordsOf } from "../config/usage.ts";
import { colourTables } from "../report/table.ts";
import { fill } from "../report/template.ts";
import {
  type CommandLine,
  type CommandOption,
  commandLines,
  isTerminal,
  optionsOf,
  overview,
  printYaml,
} from "./commands.ts";
import bash from "./completion.bash" with { type: "text" };
import fish from "./completion.fish" with { type: "text" };
import zsh from "./completion.zsh" with { type: "text" };

/**
 * Runs one command line.
 * @param args words after the program's name
 * @returns exit status: 0 done, 1 found a problem, 2 used wrongly
 */
export async function runCommand(host: Host, args: string[]): Promise<number> {
  const [name = "help", ...rest] = args;
  // People are told who speaks.
  host.relay = (plugin, said) => said.replace(/^(?=.*\S)/gm, `${plugin}: `).replace(/\n?$/, "\n");
  colourTables(isColourful(host.env));
  try {
    if (["help", "--help", "-h"].includes(name)) return help(host, rest[0]);
    if (["--version", "-V"].includes(name)) return await runCommand(host, ["version", ...rest]);
    const command = commandOf(name);
    if (rest.includes("--help") || rest.includes("-h")) return help(host, name);
    const flags = readFlags(command, rest);
    const isYaml = flags["output"] === "yaml";
    return await (isYaml
      ? printYaml(host, (inner) => command.run(inner, flags))
      : command.run(host, flags));
  } catch (error) {
    if (error instanceof UsageError) {
      const about = Object.hasOwn(commandLines, name) ? ` ${name} --help` : " help";
      host.stderr(`genie: error: ${error.message}\ngenie: hint: see genie${about}\n`);
      return 2;
    }
    const { code: number, message, details } = toCniError(error);
    host.stderr(`genie: error: ${message} (code ${number})\n${details ? `${details}\n` : ""}`);
    return 1;
  }
}

function commandOf(name: string): CommandLine {
  const command = Object.hasOwn(commandLines, name) ? commandLines[name] : undefined;
  if (command) return command;
  throw new UsageError(`Unknown command "${name}"${didYouMean(name, Object.keys(commandLines))}`);
}

/** Colour where a terminal is; see https://no-color.org and https://bixense.com/clicolors */
function isColourful({ NO_COLOR, CLICOLOR_FORCE = "0", TERM }: Host["env"]): boolean {
  if (NO_COLOR) return false;
  return CLICOLOR_FORCE !== "0" || (isTerminal() && TERM !== "dumb");
}

/** What `-o` takes, where a command has `--json`. */
const outputForms = ["json", "yaml", "table", "wide"];
/** Letters for options, in each command that has them. */
const letters: Record<string, string> = { namespace: "n", output: "o" };

function readFlags(command: CommandLine, args: string[]): Flags {
  const known = allOptionsOf(command);
  const options = known.map(({ name, value, text: meaning }) => {
    const type = value === "" ? ("boolean" as const) : ("string" as const);
    const short = letters[name];
    const multiple = meaning.includes("any number of times");
    return [name, { type, multiple, ...(short !== undefined && { short }) }] as const;
  });
  let flags: Flags;
  try {
    const { values, positionals } = parseArgs({
      args,
      options: Object.fromEntries(options),
      strict: true,
      allowPositionals: /^ {2}[^ -]/m.test(command.help),
    });
    flags = { ...(values as Flags), words: positionals };
  } catch (error) {
    const message = toCniError(error).message.replace(/^Internal error: /, "");
    const [, name] = /^Unknown option '--([^']+)'/.exec(message) ?? [];
    const names = known.map((one) => one.name);
    throw new UsageError(name === undefined ? message : message + didYouMean(name, names));
  }
  const { output } = flags;
  if (output === undefined) return flags;
  if (!outputForms.includes(String(output))) {
    throw new UsageError(`Invalid --output "${output}": expected one of ${outputForms.join(", ")}`);
  }
  return output === "json" || output === "yaml" ? { ...flags, json: true } : flags;
}

/** The options of a command, with the one that all have whose help has `--json`. */
function allOptionsOf(command: CommandLine): CommandOption[] {
  const options = optionsOf(command);
  if (!options.some(({ name }) => name === "json")) return options;
  return [...options, { name: "output", value: "FORM", text: "json, yaml, table or wide" }];
}

function help(host: Host, name?: string): number {
  host.stdout(name === undefined || name === "help" ? formatOverview() : commandOf(name).help);
  return 0;
}

/** What `genie help` prints. */
function formatOverview(): string {
  const lines = Object.entries(commandLines);
  const commands = lines.map(([name, { summary }]) => ({ name: name.padEnd(10), summary }));
  return fill(overview, { commands });
}

/** Options whose value is one of a few. */
const choices: Record<string, string> = {
  command: "ADD DEL CHECK GC STATUS",
  output: outputForms.join(" "),
  features: "policy switch cluster-report",
};

/** What the program itself is asked for while a person types, by option. */
const asked: Record<string, string> = {
  network: "networks",
  from: "networks",
  to: "networks",
  pod: "pods",
  namespace: "namespaces",
  annotation: "annotations",
};

/** The script of each shell, and what its quotes cannot hold. */
const shells = new Map<string, { script: string; unsafe: RegExp }>([
  ["bash", { script: bash, unsafe: /['\\]/g }],
  ["zsh", { script: zsh, unsafe: /['[\]:\\]/g }],
  ["fish", { script: fish, unsafe: /['\\]/g }],
]);

/**
 * Prints the script for a shell, or what a person may type where the script asks for it.
 * @param valuesOf the names of a kind: networks, pods, namespaces, annotations
 * @throws UsageError for a shell that is not served
 */
export async function runCompletion(
  host: Host,
  flags: Flags,
  valuesOf: (kind: string) => Promise<readonly string[]>,
): Promise<number> {
  const kind = text(flags, "values");
  if (kind !== undefined) {
    for (const value of await valuesOf(kind)) host.stdout(`${value}\n`);
    return 0;
  }
  const [name = "", ...more] = wordsOf(flags);
  const shell = shells.get(name);
  const names = [...shells.keys()];
  if (!shell || more.length > 0) {
    throw new UsageError(`genie completion needs one of ${names.join(", ")}`);
  }
  const commands = Object.entries(commandLines).map(([command, line]) => ({
    command,
    summary: line.summary,
    options: allOptionsOf(line).map(completed),
    words: command === "completion" ? names.join(" ") : "",
    kind: /^ {2}NAMESPACE\S*POD/m.test(line.help)
      ? "pods"
      : /^ {2}NETWORK/m.test(line.help) && "networks",
  }));
  const words = Object.keys(commandLines).join(" ");
  const help = {
    command: "help",
    summary: "show the options of a command",
    options: [],
    words,
    kind: "",
  };
  const options = commands.flatMap((one) => one.options);
  const those = (some: typeof options) =>
    [...new Set(some.map((option) => `--${option.name}`))].join("|");
  const few = Object.entries(choices).map(([option, some]) => ({ name: option, few: some }));
  const values = {
    asked: Object.entries(asked).map(([option, one]) => ({ name: option, kind: one })),
    commands: [...commands, help],
    paths: those(options.filter(({ isPath }) => isPath)),
    others: those(options.filter(({ isOther }) => isOther)),
    choices: few,
  };
  host.stdout(fill(shell.script, values, (value) => String(value).replace(shell.unsafe, "")));
  return 0;
}

/** An option as the scripts take it: what it does, in few words, and what its value may be. */
function completed({ name, value, text: said }: CommandOption) {
  const [clause = ""] = said.split(/[;:]/, 1);
  const meaning = clause.replace(/[^\w .,-]/g, "").trim();
  const few = choices[name] ?? "";
  const kind = asked[name] ?? "";
  const isPath = value === "FILE" || value === "DIR";
  const isOther = value !== "" && few === "" && kind === "" && !isPath;
  return { name, value, meaning, few, kind, isPath, isOther };
}
