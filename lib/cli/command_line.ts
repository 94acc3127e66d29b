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
import { type Flags, UsageError } from "../config/usage.ts";
import {
  type CommandLine,
  type CommandOption,
  commandLines,
  formatOverview,
  optionsOf,
} from "./commands.ts";
// @ts-expect-error a text, whatever its name
import bash from "./completion.bash" with { type: "text" };
// @ts-expect-error a text, whatever its name
import zsh from "./completion.zsh" with { type: "text" };

/**
 * Runs one command line.
 * @param args words after the program's name
 * @returns exit status: 0 done, 1 found a problem, 2 used wrongly
 */
export async function runCommand(host: Host, args: string[]): Promise<number> {
  const [name = "help", ...rest] = args;
  try {
    if (["help", "--help", "-h"].includes(name)) return help(host, rest[0]);
    const command = commandOf(name);
    if (rest.includes("--help") || rest.includes("-h")) return help(host, name);
    return await command.run(host, readFlags(command, rest));
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
  throw new UsageError(`Unknown command "${name}"`);
}

function readFlags(command: CommandLine, args: string[]): Flags {
  const options = optionsOf(command).map(({ name, value, text }) => {
    const type = value === "" ? ("boolean" as const) : ("string" as const);
    return [name, { type, multiple: text.includes("any number of times") }] as const;
  });
  try {
    const { values, positionals } = parseArgs({
      args,
      options: Object.fromEntries(options),
      strict: true,
      allowPositionals: /^ {2}[^ -]/m.test(command.help),
    });
    return { ...(values as Flags), words: positionals };
  } catch (error) {
    throw new UsageError(toCniError(error).message.replace(/^Internal error: /, ""));
  }
}

function help(host: Host, name?: string): number {
  host.stdout(name === undefined ? formatOverview() : commandOf(name).help);
  return 0;
}

/** What a shell needs to know of a command; `words` are those it takes besides its options. */
type Completed = { name: string; summary: string; options: CommandOption[]; words: string[] };

/** Options whose value is one of a few. */
const choices: Record<string, string> = { command: "ADD DEL CHECK GC STATUS" };
const isPath = ({ value }: CommandOption) => value === "FILE" || value === "DIR";

/** Shells, and who writes their script. */
const shells = new Map(Object.entries({ bash: formatBash, zsh: formatZsh, fish: formatFish }));

/** Prints the script for a shell. @throws UsageError for one that is not served */
export function runCompletion(host: Host, flags: Flags): number {
  const [shell = "", ...more] = Array.isArray(flags["words"]) ? flags["words"] : [];
  const format = shells.get(shell);
  const names = [...shells.keys()];
  if (!format || more.length > 0) {
    throw new UsageError(`genie completion needs one of ${names.join(", ")}`);
  }
  const completed = Object.entries(commandLines).map(([name, command]) => ({
    name,
    summary: command.summary,
    options: optionsOf(command),
    words: name === "completion" ? names : [],
  }));
  const help = { name: "help", summary: "show the options of a command", options: [] };
  host.stdout(format([...completed, { ...help, words: Object.keys(commandLines) }]));
  return 0;
}

/** What an option does, in as few words as a shell shows beside it. */
function meaning({ text }: CommandOption): string {
  const [clause = ""] = text.split(/[;:]/, 1);
  return clause.replace(/[^\w .,-]/g, "").trim();
}

/** A script from its template: `@name@` becomes the lines of that name. */
function fill(template: string, values: Record<string, string[]>): string {
  return template.replace(/@(\w+)@/g, (_, name) => values[name]?.join("\n") ?? "");
}

function formatBash(commands: readonly Completed[]): string {
  const taking = (paths: boolean) => {
    const options = commands.flatMap((command) => command.options);
    const those = options.filter(
      (one) => one.value !== "" && isPath(one) === paths && !choices[one.name],
    );
    return [[...new Set(those.map(({ name }) => `--${name}`))].join("|")];
  };
  return fill(bash, {
    commands: [commands.map(({ name }) => name).join(" ")],
    paths: taking(true),
    choices: Object.entries(choices).map(
      ([name, few]) => `    --${name}) COMPREPLY=($(compgen -W "${few}" -- "$cur")); return ;;`,
    ),
    values: taking(false),
    words: commands.map(({ name, options, words }) => {
      const all = [...words, ...options.map((one) => `--${one.name}`), "--help"];
      return `    ${name}) words="${all.join(" ")}" ;;`;
    }),
  });
}

function formatZsh(commands: readonly Completed[]): string {
  const text = (value: string) => value.replace(/['[\]:\\]/g, "");
  return fill(zsh, {
    commands: commands.map(({ name, summary }) => `    '${name}:${text(summary)}'`),
    arguments: commands.map(({ name, options, words }) => {
      const described = options.map((option) => {
        const about = `--${option.name}[${text(meaning(option))}]`;
        if (option.value === "") return `'${about}'`;
        const few = choices[option.name];
        const value = few ? `(${few})` : isPath(option) ? "_files" : "";
        return `'*${about}:${option.name}:${value}'`;
      });
      const word = words.length > 0 ? [`'1:word:(${words.join(" ")})'`] : [];
      const all = [...described, ...word, "'--help[show the options]'"].join(" \\\n        ");
      return `    ${name})\n      _arguments \\\n        ${all}\n      ;;`;
    }),
  });
}

function formatFish(commands: readonly Completed[]): string {
  const text = (value: string) => value.replace(/['\\]/g, "");
  const lines = commands.flatMap(({ name, summary, options, words }) => {
    const seen = `complete -c genie -n '__fish_seen_subcommand_from ${name}'`;
    return [
      `complete -c genie -n __fish_use_subcommand -a ${name} -d '${text(summary)}'`,
      ...words.map((word) => `${seen} -a ${word}`),
      ...options.map((option) => {
        const few = choices[option.name];
        const value = few ? ` -x -a '${few}'` : isPath(option) ? " -r -F" : " -x";
        const about = ` -d '${text(meaning(option))}'`;
        return `${seen} -l ${option.name}${option.value === "" ? "" : value}${about}`;
      }),
    ];
  });
  const head = "# fish completion of genie: genie completion fish | source\ncomplete -c genie -f";
  return `${head}\n${lines.join("\n")}\n`;
}
