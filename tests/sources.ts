/** The sources as a program sees them: their text, what they import, and what loads with them. */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";

/** The folder of the project. */
export const root = join(import.meta.dir, "..");

/** One source file. */
export interface Source {
  /** Path from the root, as in `lib/cni.ts`. */
  path: string;
  text: string;
  /** Without comments. */
  uncommented: string;
  /** Without comments and without what stands in strings and regular expressions. */
  code: string;
}

/** Reads a source file by its path from the root. */
export function readSource(path: string): Source {
  const text = readFileSync(join(root, path), "utf8");
  const { uncommented, code } = blank(text);
  return { path, text, uncommented, code };
}

/** Replaces comments, and in `code` also literals, by spaces; lines and columns stay. */
export function blank(text: string): { uncommented: string; code: string } {
  let uncommented = "";
  let code = "";
  /** Braces open in each `${` that is open. */
  const holes: number[] = [];
  const spaces = (part: string) => part.replace(/[^\n]/g, " ");
  const token =
    /\/\/[^\n]*|\/\*[\s\S]*?\*\/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`|[{}]|[\s\S]/y;
  const template = /(?:\\[\s\S]|\$(?!\{)|[^`\\$])*(?:`|\$\{)?/y;
  const regex = /\/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n[])+\/[a-z]*/y;
  const take = (part: string, kind: "comment" | "literal" | "code") => {
    uncommented += kind === "comment" ? spaces(part) : part;
    code += kind === "code" ? part : spaces(part);
  };
  for (let at = 0; at < text.length; ) {
    let [part = ""] = match(token, text, at);
    let kind: Parameters<typeof take>[1] = "code";
    if (part.startsWith("//") || part.startsWith("/*")) kind = "comment";
    else if (/^["']/.test(part) && part.length > 1) kind = "literal";
    else if (part === "/" && /(^|[(,=:[!&|?{};+*%<>~^-]|\b(return|case|of|in))\s*$/.test(code)) {
      part = match(regex, text, at)[0] ?? part;
      kind = part.length > 1 ? "literal" : "code";
    } else if (part === "`" || (part === "}" && holes.at(-1) === 0)) {
      if (part === "}") holes.pop();
      part += match(template, text, at + 1)[0] ?? "";
      if (part.endsWith("${")) holes.push(0);
      kind = "literal";
    } else if (part === "{") holes.push((holes.pop() ?? 0) + 1);
    else if (part === "}") holes.push((holes.pop() ?? 1) - 1);
    take(part, kind);
    at += part.length;
  }
  return { uncommented, code };
}

function match(pattern: RegExp, text: string, at: number): string[] {
  pattern.lastIndex = at;
  return pattern.exec(text) ?? [];
}

const list = (folder: string): string[] =>
  readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((path) => path.endsWith(".ts"))
    .sort()
    .map((path) => `${folder}/${path}`);

/** All of `lib/`. */
export const lib = list("lib").map(readSource);
/** All of the program. */
export const product = [readSource("genie.ts"), ...lib];
/** All of `tests/`. */
export const tests = list("tests").map(readSource);
/** Everything. */
export const all = [...product, ...tests];

/** `lib/cni.ts:12` of every place where the pattern matches. */
export function places({ path }: Source, text: string, pattern: RegExp): string[] {
  return [...text.matchAll(new RegExp(pattern, "g"))].map(
    ({ index }) => `${path}:${text.slice(0, index).split("\n").length}`,
  );
}

/** One import of a module. */
export interface Import {
  from: string;
  typeOnly: boolean;
  /** `await import()`. */
  lazy: boolean;
}

/** What a module imports. */
export function importsOf({ uncommented }: Source): Import[] {
  const found: Import[] = [];
  const statement =
    /^(?:import|export) (type )?(?:([\w*]+|(?:\w+, )?\{[^}]*\}|\* as \w+) from )?"([^"]+)"/gm;
  for (const [, type, names = "", from = ""] of uncommented.matchAll(statement)) {
    const listed = /^\{([^}]*)\}/.exec(names)?.[1]?.split(",") ?? [];
    const given = listed.map((name) => name.trim()).filter((name) => name !== "");
    const onlyTypes = given.length > 0 && given.every((name) => name.startsWith("type "));
    found.push({ from, typeOnly: type !== undefined || onlyTypes, lazy: false });
  }
  for (const [, type, from = ""] of uncommented.matchAll(/(typeof )?\bimport\("([^"]+)"\)/g)) {
    found.push({ from, typeOnly: type !== undefined, lazy: type === undefined });
  }
  return found;
}

/** Path from the root of what a module of ours imports; undefined for a package or a text. */
export function pathOf({ path }: Source, { from }: Import): string | undefined {
  if (!/^\..*\.ts$/.test(from)) return undefined;
  return normalize(join(dirname(path), from));
}

/** `report` for `lib/report/text.ts`, "" for the plugin's own files. */
export function roomOf(path: string): string {
  return /^lib\/(\w+)\//.exec(path)?.[1] ?? "";
}

/** Lines of a source. */
export function lineCount({ text }: Source): number {
  return text.trimEnd().split("\n").length;
}

const byPath = new Map(product.map((source) => [source.path, source]));

/**
 * All that loads with these files before anything runs: no types, no `await import()`.
 * @param withLazy also what they may load later
 */
export function closureOf(paths: readonly string[], withLazy = false): Source[] {
  const found = new Set<Source>();
  const visit = (path: string): void => {
    const source = byPath.get(path);
    if (!source) throw new Error(`there is no ${path}`);
    if (found.has(source)) return;
    found.add(source);
    for (const one of importsOf(source)) {
      const isLoaded = !one.typeOnly && (withLazy || !one.lazy);
      const to = isLoaded ? pathOf(source, one) : undefined;
      if (to !== undefined) visit(to);
    }
  };
  paths.forEach(visit);
  return [...found];
}
