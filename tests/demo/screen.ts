/**
 * What the demo prints: headlines, commands as one could type them, their output, and one line per
 * check. Fits the terminal; without one, lines are whole and plain.
 */

/** A command as the demo shows and runs it. */
export interface CommandLine {
  argv: string[];
  /** Variables put in front of it. */
  env?: Record<string, string>;
  /** File on its stdin. */
  stdin?: string;
}

/** The output of the demo, and how many of its checks held. */
export interface Screen {
  /** The first line: what this run is. */
  title: (text: string) => void;
  headline: (text: string) => void;
  /** A sentence or two for the reader. */
  say: (text: string) => void;
  command: (line: CommandLine) => void;
  /** What a program printed. */
  output: (text: string) => void;
  /** JSON, broken where a line would be too long. */
  json: (value: unknown) => void;
  /** One line `ok` or `FAILED`. */
  check: (ok: boolean, text: string) => void;
  checks: { passed: number; failed: number };
  /** True when programs may write to the terminal themselves. */
  isTerminal: boolean;
}

/** Width where there is no terminal, and the widest that is easy to read, in columns. */
const widthDefault = 100;

/** Makes the screen over a stream, usually `process.stdout`. */
export function makeScreen(stream: NodeJS.WriteStream): Screen {
  const isTerminal = stream.isTTY === true;
  const width = isTerminal ? stream.columns : widthDefault;
  const proseWidth = Math.min(width, widthDefault);
  const isColoured = isTerminal && !process.env["NO_COLOR"];
  const paint = (style: number, text: string) =>
    isColoured ? `\x1b[${style}m${text}\x1b[0m` : text;
  const print = (text: string) => stream.write(`${text}\n`);
  // A log keeps everything; on a terminal one line stays one line.
  const fit = (line: string) =>
    isTerminal && line.length > width ? `${line.slice(0, width - 1)}…` : line;
  const checks = { passed: 0, failed: 0 };
  let steps = 0;
  return {
    title: (text) => print(paint(1, wrap(text, proseWidth).join("\n"))),
    headline: (text) => {
      const words = `── ${++steps}. ${text} `;
      print(`\n${paint(1, words.padEnd(proseWidth, "─"))}`);
    },
    say: (text) => print(wrap(text, proseWidth).join("\n")),
    command: (line) => {
      const [first = "", ...more] = formatCommand(line, width).map(fit);
      print(
        `${paint(2, "$")} ${[paint(36, first), ...more.map((one) => paint(36, one))].join("\n")}`,
      );
    },
    output: (text) =>
      print(
        text
          .trimEnd()
          .split("\n")
          .map((line) => fit(line.trimEnd()))
          .join("\n"),
      ),
    json: (value) => print(formatJson(value, proseWidth).split("\n").map(fit).join("\n")),
    check: (ok, text) => {
      checks[ok ? "passed" : "failed"]++;
      const [first = "", ...more] = wrap(text, proseWidth - 8);
      const verdict = ok ? paint(32, "ok    ") : paint(31, "FAILED");
      print([`${verdict}  ${first}`, ...more.map((line) => `        ${line}`)].join("\n"));
    },
    checks,
    isTerminal,
  };
}

/** Breaks text into lines between its words. */
function wrap(text: string, width: number): string[] {
  return fill(text.split(" "), width, { suffix: "", indent: "" });
}

/** A command for a shell, in lines that end in `\` but for the last. */
export function formatCommand({ argv, env = {}, stdin }: CommandLine, width: number): string[] {
  const variables = Object.entries(env).map(([name, value]) => `${name}=${shellWord(value)}`);
  const program = [
    ...groupOptions(argv.map(shellWord)),
    ...(stdin === undefined ? [] : [`< ${shellWord(stdin)}`]),
  ];
  const continued = { suffix: " \\", indent: "    " };
  // The prompt takes two columns.
  const lines = fill([...variables, ...program], width - 2, continued);
  if (lines.length === 1 || variables.length === 0) return lines;
  const [first = "", ...more] = fill(program, width - 2, continued);
  const above = fill(variables, width - 2, continued);
  return [...above.slice(0, -1), `${above.at(-1)} \\`, `    ${first}`, ...more];
}

/** Keeps an option and its value together. */
function groupOptions(words: string[]): string[] {
  const groups: string[] = [];
  for (const word of words) {
    const last = groups.at(-1) ?? "";
    const isValue = /^--?[\w-]+$/.test(last) && !word.startsWith("-");
    if (isValue) groups.splice(-1, 1, `${last} ${word}`);
    else groups.push(word);
  }
  return groups;
}

/** Puts words into lines; a word longer than a line has one for itself. */
function fill(
  words: string[],
  width: number,
  { suffix, indent }: { suffix: string; indent: string },
): string[] {
  const lines: string[] = [];
  let line = "";
  for (const word of words) {
    const longer = line === "" ? word : `${line} ${word}`;
    if (line !== "" && longer.length + suffix.length > width) {
      lines.push(line + suffix);
      line = indent + word;
    } else line = longer;
  }
  return [...lines, line];
}

function shellWord(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`;
}

/** JSON with as much on a line as fits. */
export function formatJson(value: unknown, width: number, indent = "", used = 0): string {
  const flat = JSON.stringify(value, null, 1).replace(/\n\s*/g, " ");
  if (typeof value !== "object" || value === null) return flat;
  if (indent.length + used + flat.length <= width) return flat;
  const inner = `${indent}  `;
  const isList = Array.isArray(value);
  const entries = Object.entries(value).map(([name, one]) => {
    const key = isList ? "" : `${JSON.stringify(name)}: `;
    return inner + key + formatJson(one, width, inner, key.length + 1);
  });
  const [open, close] = isList ? "[]" : "{}";
  return `${open}\n${entries.join(",\n")}\n${indent}${close}`;
}
