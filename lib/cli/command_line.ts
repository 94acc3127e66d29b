/**
 * The operator's command line: finds the command, reads its options, prints its help.
 * Output for people on a terminal, `--json` for programs; exit status 0 done, 1 found a problem, 2
 * used wrongly.
 */
import { parseArgs } from "node:util";
import { type Host, toCniError } from "../cni.ts";
import { type CommandLine, commandLines } from "./commands.ts";
import { type Flags, UsageError } from "./usage.ts";

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
