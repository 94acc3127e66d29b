/**
 * Shell completion, made from the table of commands. Pure: the table in, a script out.
 * Sources: bash(1) "Programmable Completion", zshcompsys(1), fish's complete(1).
 */
import { type Flags, UsageError } from "./usage.ts";

/** What a shell needs to know of a command. */
export interface Completed {
  name: string;
  summary: string;
  help: string;
  options: Record<string, { type: "string" | "boolean" }>;
  /** Words it takes besides its options. */
  words?: readonly string[];
}

/** Options whose value is a file or a folder. */
const pathOptions = new Set([
  ...["bin-dir", "cni-config", "conf-dir", "host-root", "html", "kubeconfig", "table"],
]);
/** Options whose value is one of a few. */
const choices: Record<string, string> = { command: "ADD DEL CHECK GC STATUS" };

/** Shells, and who writes their script. */
const shells: Record<string, (commands: readonly Completed[]) => string> = {
  bash: formatBash,
  zsh: formatZsh,
  fish: formatFish,
};
/** Names of the shells that are served. */
export const shellNames: readonly string[] = Object.keys(shells);

/** The script for a shell. @throws UsageError for one that is not served */
export function formatCompletion(flags: Flags, commands: readonly Completed[]): string {
  const [shell = "", ...more] = Array.isArray(flags["words"]) ? flags["words"] : [];
  const format = Object.hasOwn(shells, shell) ? shells[shell] : undefined;
  if (format && more.length === 0) return format([...commands, help(commands)]);
  throw new UsageError(`genie completion needs one of ${shellNames.join(", ")}`);
}

/** `genie help` is no command of the table. */
function help(commands: readonly Completed[]): Completed {
  const words = commands.map(({ name }) => name);
  return { name: "help", summary: "show the options of a command", help: "", options: {}, words };
}

/** What the help says of an option, in one line. */
function meaning({ help }: Completed, option: string): string {
  const [, text = ""] = new RegExp(`^ {2}--${option}(?: \\S+)* {2,}(.*)$`, "m").exec(help) ?? [];
  return text.replace(/[^\w .,-]/g, "").trim();
}

function formatBash(commands: readonly Completed[]): string {
  const names = commands.map(({ name }) => name).join(" ");
  const values = commands.flatMap(({ options }) => Object.entries(options));
  const taking = (isPath: boolean) =>
    [...new Set(values.filter(([, { type }]) => type === "string").map(([name]) => name))]
      .filter((name) => pathOptions.has(name) === isPath && !choices[name])
      .map((name) => `--${name}`)
      .join("|");
  const cases = commands.map(({ name, options, words = [] }) => {
    const all = [...words, ...Object.keys(options).map((one) => `--${one}`), "--help"];
    return `    ${name}) words="${all.join(" ")}" ;;`;
  });
  const few = Object.entries(choices).map(
    ([name, list]) => `    --${name}) COMPREPLY=($(compgen -W "${list}" -- "$cur")); return ;;`,
  );
  return `# bash completion of genie: . <(genie completion bash)
_genie() {
  local cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD-1]} words=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "${names}" -- "$cur"))
    return
  fi
  case $prev in
    ${taking(true)})
      compopt -o filenames 2>/dev/null
      COMPREPLY=($(compgen -f -- "$cur"))
      return ;;
${few.join("\n")}
    ${taking(false)}) return ;;
  esac
  case \${COMP_WORDS[1]} in
${cases.join("\n")}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -F _genie genie
`;
}

function formatZsh(commands: readonly Completed[]): string {
  const text = (value: string) => value.replace(/['[\]:\\]/g, "");
  const described = commands.map(({ name, summary }) => `    '${name}:${text(summary)}'`);
  const cases = commands.map((command) => {
    const options = Object.entries(command.options).map(([option, { type }]) => {
      const about = `--${option}[${text(meaning(command, option))}]`;
      if (type === "boolean") return `'${about}'`;
      const few = choices[option];
      const value = few ? `(${few})` : pathOptions.has(option) ? "_files" : "";
      return `'*${about}:${option}:${value}'`;
    });
    const words = command.words ? [`'1:word:(${command.words.join(" ")})'`] : [];
    const all = [...options, ...words, "'--help[show the options]'"].join(" \\\n        ");
    return `    ${command.name})\n      _arguments \\\n        ${all}\n      ;;`;
  });
  return `#compdef genie
# zsh completion of genie: genie completion zsh > "\${fpath[1]}/_genie"
_genie() {
  local -a commands
  commands=(
${described.join("\n")}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
${cases.join("\n")}
  esac
}
if [[ $funcstack[1] == _genie ]]; then _genie "$@"; else compdef _genie genie; fi
`;
}

function formatFish(commands: readonly Completed[]): string {
  const text = (value: string) => value.replace(/['\\]/g, "");
  const lines = commands.flatMap((command) => {
    const { name, summary, options, words = [] } = command;
    const seen = `complete -c genie -n '__fish_seen_subcommand_from ${name}'`;
    return [
      `complete -c genie -n __fish_use_subcommand -a ${name} -d '${text(summary)}'`,
      ...words.map((word) => `${seen} -a ${word}`),
      ...Object.entries(options).map(([option, { type }]) => {
        const few = choices[option];
        const value = few ? ` -x -a '${few}'` : pathOptions.has(option) ? " -r -F" : " -x";
        const about = ` -d '${text(meaning(command, option))}'`;
        return `${seen} -l ${option}${type === "string" ? value : ""}${about}`;
      }),
    ];
  });
  return `# fish completion of genie: genie completion fish | source
complete -c genie -f
${lines.join("\n")}
`;
}
