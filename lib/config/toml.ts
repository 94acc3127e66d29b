/**
 * Where things stand in a TOML text: the line of each header and key, for messages that name it,
 * and its statements, for reading a few keys of a table that is invalid elsewhere. Pure. A parser
 * gives the values (smol-toml); it does not tell lines of what it accepted. Source: TOML 1.0.
 */
import { parse, TomlDate, TomlError } from "smol-toml";
import { isObject, parseJson } from "../json.ts";
import { orUndefined } from "../recovery/tried.ts";

/** Deepest nesting followed. */
export const depthMax = 64;
/** A place in the table: keys, and indexes of lists. */
export type Path = (string | number)[];

/**
 * Line of each table header and key, by its path without list indexes; what stands below a
 * `[[header]]`, also by its path with them.
 */
export type Lines = Map<string, number>;

/** Finds the line of every header and key. */
export function locate(text: string): Lines {
  const lines: Lines = new Map();
  /** Of each list of `[[header]]`s, how many there were. */
  const counts = new Map<string, number>();
  let header: string[] = [];
  for (const { keys, line, isHeader, isListItem } of statements(text)) {
    if (isHeader) header = keys;
    const path = isHeader ? keys : [...header, ...keys];
    const name = path.join("\0");
    if (isListItem) counts.set(name, (counts.get(name) ?? 0) + 1);
    note(lines, path, line, isHeader);
    if (counts.size > 0) note(lines, withIndexes(path, counts), line, isHeader);
  }
  return lines;
}

/** Notes the line of a path, and of what it is in where that has none yet. */
function note(lines: Lines, path: Path, line: number, isHeader: boolean): void {
  for (let n = 1; n < Math.min(path.length, depthMax); n++) {
    lines.getOrInsert(path.slice(0, n).join("\0"), line);
  }
  const name = path.join("\0");
  if (isHeader || !lines.has(name)) lines.set(name, line);
}

/** A path with the index of the last item of every list it goes through. */
function withIndexes(path: string[], counts: ReadonlyMap<string, number>): Path {
  return path.slice(0, depthMax).flatMap((key, i) => {
    const count = counts.get(path.slice(0, i + 1).join("\0"));
    return count === undefined ? [key] : [key, count - 1];
  });
}

/** Line of the longest part of `path` that stands in the table. */
export function lineOf(lines: Lines, path: Path): number {
  const known: Path = [];
  for (const key of path) {
    // Items of a list in brackets have no lines of their own.
    if (typeof key === "string" || lines.has([...known, key].join("\0"))) known.push(key);
  }
  while (known.length > 0 && !lines.has(known.join("\0"))) known.pop();
  return lines.get(known.join("\0")) ?? 1;
}

/** One `[header]` or `key = value`; `value` is set when it is a single string. */
export type Statement = {
  keys: string[];
  line: number;
  isHeader: boolean;
  /** A `[[header]]`. */
  isListItem: boolean;
  value: string | undefined;
};
type Token = { text: string; line: number };
const newline: Token = { text: "\n", line: 0 };

/** The statements of a TOML text. One that does not end is taken for its first line. */
export function statements(text: string): Statement[] {
  const all = tokens(text);
  const found: Statement[] = [];
  for (let at = 0; at < all.length; at++) {
    const { text: first, line } = all[at] ?? newline;
    if (first === "\n") continue;
    const isHeader = first === "[";
    const isListItem = isHeader && all[at + 1]?.text === "[";
    const keys: string[] = [];
    let i = at;
    for (; i < all.length; i++) {
      const { text } = all[i] ?? newline;
      if (text === "\n" || text === "=" || text === "]") break;
      if (text !== "[" && text !== ".") keys.push(unquote(text));
    }
    const [equals, next, last] = [all[i] ?? newline, all[i + 1] ?? newline, all[i + 2] ?? newline];
    const isString = equals.text === "=" && isQuoted(next.text) && last.text === "\n";
    const value = isString ? unquote(next.text) : undefined;
    found.push({ keys, line, isHeader, isListItem, value });
    at = statementEnd(all, isHeader ? i + 1 : i);
  }
  return found;
}

/** Index of the newline that ends a statement. */
function statementEnd(all: Token[], from: number): number {
  const open: string[] = [];
  for (let i = from; i < all.length && open.length <= depthMax; i++) {
    const { text } = all[i] ?? newline;
    if (text === "\n" && open.length === 0) return i;
    if (text === "=" && open.at(-1) === "[") break; // the next statement: a "]" is missing
    if (text === "[" || text === "{") open.push(text);
    else if (text === "]" || text === "}") open.pop();
  }
  let i = from;
  while (i < all.length && all[i]?.text !== "\n") i++;
  return i;
}

/**
 * The tokens of a TOML text, comments left out. Newlines are tokens; a string is one token.
 * Without regular expressions: in a process that parses one table, compiling them is the cost.
 */
function tokens(text: string): Token[] {
  const found: Token[] = [];
  let line = 1;
  for (let at = 0; at < text.length; ) {
    const char = text.charAt(at);
    let end = at + 1;
    if (char === "#") {
      end = text.indexOf("\n", at);
      if (end < 0) break;
    } else if (!" \t\r\ufeff".includes(char)) {
      if (isQuoted(char)) end = stringEnd(text, at) ?? end;
      else if (!delimiters.includes(char)) {
        while (end < text.length && !delimiters.includes(text.charAt(end))) end++;
      }
      const token = text.slice(at, end);
      found.push({ text: token, line });
      for (let i = token.indexOf("\n"); i >= 0; i = token.indexOf("\n", i + 1)) line++;
    }
    at = end;
  }
  return found;
}

const delimiters = " \t\r\n\"'#[]{}=,.";

function isQuoted(token: string): boolean {
  return token.startsWith('"') || token.startsWith("'");
}

/** Index after the string that begins at `start`; undefined when it does not end. */
function stringEnd(text: string, start: number): number | undefined {
  const quote = text.charAt(start);
  const isMultiline = text.startsWith(quote.repeat(3), start);
  const fence = isMultiline ? quote.repeat(3) : quote;
  for (let end = start + fence.length; ; end++) {
    end = text.indexOf(fence, end);
    if (end < 0) return undefined;
    let escapes = 0;
    while (quote === '"' && text[end - 1 - escapes] === "\\") escapes++;
    if (escapes % 2 === 1) continue;
    if (!isMultiline) return text.slice(start, end).includes("\n") ? undefined : end + 1;
    // Up to two quotes before the fence belong to the string.
    for (let extra = 0; extra < 2 && text[end + 3] === quote; extra++) end++;
    return end + 3;
  }
}

/** The value of a string token; of any other token, and of a string that is wrong, its text. */
function unquote(token: string): string {
  if (!isQuoted(token)) return token;
  return orUndefined(() => String(parse(`_ = ${token}`)["_"]), TomlError) ?? token;
}

/** True for a table; smol-toml gives dates as objects too. */
export function isTable(value: unknown): value is Record<string, unknown> {
  return isObject(value) && !(value instanceof TomlDate);
}

/** A TOML value as JSON data; `fail` hears of what JSON cannot hold. */
export function toJson(
  value: unknown,
  path: Path,
  fail: (path: Path, what: string) => void,
): unknown {
  if (path.length > depthMax) fail(path, `is deeper than ${depthMax} levels`);
  else if (value instanceof TomlDate) fail(path, "is a date, expected a string: JSON has no dates");
  else if (typeof value === "number" && !Number.isFinite(value)) fail(path, `is ${value}`);
  else if (typeof value === "bigint")
    return parseJson(`${value}`, "integer"); // keeps every digit
  else if (Array.isArray(value)) return value.map((item, i) => toJson(item, [...path, i], fail));
  else if (isTable(value)) {
    const entries = Object.entries(value);
    return Object.fromEntries(entries.map(([k, item]) => [k, toJson(item, [...path, k], fail)]));
  }
  return value;
}

/** How many letters must be put in, taken out or changed to make `b` of `a` (Levenshtein). */
export function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const swap = (row[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1);
      next.push(Math.min(swap, (row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1));
    }
    row = next;
  }
  return row[b.length] ?? 0;
}
