/**
 * The rules of the code that a program can check: who owns what, what is banned, how long things
 * are, what is documented and tested. The rooms and what a call loads: house.test.ts.
 */
import { describe, expect, test } from "bun:test";
import { basename } from "node:path";
import { commandLines } from "../lib/cli/commands.ts";
import {
  all,
  blank,
  closureOf,
  importsOf,
  lib,
  lineCount,
  pathOf,
  places,
  product,
  readSource,
  roomOf,
  type Source,
  tests,
} from "./sources.ts";

/** Who alone may write this. */
const owners: [what: string, pattern: RegExp, files: string[]][] = [
  ["a child process", /\bBun\.spawn(Sync)?\b|"node:child_process"|\bBun\.\$/, ["lib/exec.ts"]],
  // A report opens the file for reading only; whoever writes goes through database.ts.
  [
    "the database",
    /"bun:sqlite"/,
    ["lib/database.ts", "lib/recovery/database.ts", "lib/report/record_reader.ts"],
  ],
  ["foreign functions", /"bun:ffi"/, ["lib/agent/notify.ts", "lib/check.ts", "lib/kernel.ts"]],
  ["the Kubernetes client", /"@kubernetes\/client-node"/, ["lib/kubernetes/kubeconfig.ts"]],
  [
    "a request",
    /\bfetch\(/,
    [
      "lib/kubernetes/client.ts",
      "lib/node/health.ts",
      "lib/node/runtimes.ts",
      "lib/report/cluster.ts",
    ],
  ],
  ["the command line", /\bprocess\.argv\b/, ["genie.ts"]],
  ["the environment", /\bprocess\.env\b|\bBun\.env\b/, ["genie.ts"]],
  ["the end of the process", /\bprocess\.(exit|exitCode|on|once)\b/, ["genie.ts"]],
  // Rather no process than one that stays in a pod's network namespace.
  ["an abort", /\bprocess\.abort\b/, ["lib/kernel.ts"]],
  ["a signal", /\bprocess\.kill\b/, ["lib/recovery/orphans.ts", "lib/recovery/stuck_child.ts"]],
  ["the process id", /\bprocess\.p?pid\b/, ["lib/lock.ts", "lib/recovery/orphans.ts"]],
  ["the path of the binary", /\bprocess\.execPath\b/, ["lib/binaries.ts", "lib/cli/commands.ts"]],
  // process.stdout costs milliseconds to load, so only the operator's commands touch it.
  ["the width of the terminal", /\bprocess\.stdout\.columns\b/, ["lib/cli/commands.ts"]],
];

/** Everything of `process` that {@link owners} gives to someone. */
const ownedOfProcess =
  /\bprocess\.(argv|env|exit|exitCode|on|once|abort|kill|p?pid|execPath|stdout\.columns)\b/g;

const linesMax = 600;
const functionLinesMax = 60;
/** A function that needs more takes a context. */
const parametersMax = 4;
const columnsMax = 100;

const bannedNames = ["utils", "helpers", "common", "types", "index", "manager", "controller"];

/** What a module without effects may import besides ours. */
const pureImports = ["node:net", "smol-toml", "valibot"];

/** Modules that say so in their header decide on plain data alone: their tests need no host. */
const pure = lib.filter(({ text }) => /\bPure\b/.test(text.slice(0, text.indexOf("*/"))));

describe("modules without effects", () => {
  test("there are some", () => expect(pure.length).toBeGreaterThan(20));

  test.each(pure.map((source) => [source.path, source] as const))("%s", (_path, source) => {
    const foreign = importsOf(source)
      .filter(({ typeOnly }) => !typeOnly)
      .filter((one) => {
        const to = pathOf(source, one);
        if (to === undefined)
          return (
            !pureImports.includes(one.from) && !/\.(css|js|toml|json|ya?ml|txt|md)$/.test(one.from)
          );
        return to !== "lib/cni.ts" && !pure.some(({ path }) => path === to);
      });
    const world = new RegExp(
      "\\bBun\\.(?!stringWidth\\b)|\\bprocess\\.|\\bDate\\.now\\b|\\bDate\\(\\)|" +
        "\\bfetch\\b|\\bawait\\b|\\bperformance\\b",
    );
    expect({ foreign, world: places(source, source.code, world) }).toEqual({
      foreign: [],
      world: [],
    });
  });
});

describe("owners", () => {
  test.each(owners)("of %s", (_what, pattern, files) => {
    const users = product.filter(({ uncommented }) => pattern.test(uncommented));
    expect(users.map(({ path }) => path).filter((path) => !files.includes(path))).toEqual([]);
  });

  test("of everything of process", () => {
    const others = product.flatMap((source) =>
      places(source, source.code.replace(ownedOfProcess, " "), /\bprocess\./),
    );
    expect(others).toEqual([]);
  });

  test("genie.ts stays a few dozen lines", () => {
    expect(lineCount(readSource("genie.ts"))).toBeLessThanOrEqual(82);
  });
});

describe("banned", () => {
  const inCode: [string, RegExp][] = [
    ["console", /\bconsole\./],
    ["as any", /\bas any\b|<any>/],
    ["a catch without a name", /\bcatch\s*\{/],
    ["a non-null assertion", /[\w)\]]!(?![=\w])/],
    ["a test alone", /\.only\(/],
  ];
  test.each(inCode)("%s", (_what, pattern) => {
    expect(all.flatMap((source) => places(source, source.code, pattern))).toEqual([]);
  });

  test.each([
    ["console", "console.log(1); konsole.log(1)", 1],
    ["as any", "x as any; y as anything; <any>z", 2],
    ["a catch without a name", "try {} catch {} try {} catch (e) {} try {} catch{}", 2],
    ["a non-null assertion", "a!.b; f()!; c[0]![1]; let d!: E; a !== b; !a; a != b; (!a)", 4],
    ["a test alone", 'test.only("x"); describe.only("y"); only(z)', 2],
  ])("sees %s", (what, text, count) => {
    const pattern = inCode.find(([name]) => name === what)?.[1] ?? /$^/;
    expect([...text.matchAll(new RegExp(pattern, "g"))].length).toBe(count);
  });

  const inText: [string, RegExp][] = [
    // Letters in brackets, so that these lines are not what they look for.
    ["a type error passed over", /@ts-(?:[i]gnore|[n]ocheck)/],
    ["work without an issue", /\b(?:TO[D]O|FIX[M]E)\b(?!\(#\d+\))/],
    ["a tab or a space at the end of a line", /[\t ]+$/m],
  ];
  test.each(inText)("%s", (_what, pattern) => {
    const flags = new RegExp(pattern.source, "gm");
    const found = all.flatMap(({ path, text }) =>
      [...text.matchAll(flags)].map(
        ({ index }) => `${path}:${text.slice(0, index).split("\n").length}`,
      ),
    );
    expect(found).toEqual([]);
  });

  test("a catch without a statement", () => {
    const empty = /\bcatch \(\w+\) \{\s*\}/;
    expect(all.flatMap((source) => places(source, source.code, empty))).toEqual([]);
  });

  test("names that say nothing", () => {
    const stems = all.map(({ path }) => basename(path).replace(/(\.test)?\.ts$/, ""));
    expect(stems.filter((stem) => bannedNames.includes(stem))).toEqual([]);
    const paths = lib.map(({ path }) => path);
    expect(
      paths.filter((path) => !/^lib\/([a-z]+\/)?[a-z0-9]+(_[a-z0-9]+)*\.ts$/.test(path)),
    ).toEqual([]);
  });
});

describe("sizes", () => {
  test(`lines of at most ${columnsMax} columns`, () => {
    const isWide = (line: string) => [...line].length > columnsMax;
    const wide = all.flatMap(({ path, text }) =>
      text.split("\n").flatMap((line, i) => (isWide(line) ? [`${path}:${i + 1}`] : [])),
    );
    expect(wide).toEqual([]);
  });

  test(`modules of at most ${linesMax} lines`, () => {
    const long = lib.filter((source) => lineCount(source) > linesMax);
    expect(long.map(({ path }) => path)).toEqual([]);
  });

  test(`functions of at most ${functionLinesMax} lines`, () => {
    const sizes = product.flatMap(functionSizes);
    expect(sizes.length).toBeGreaterThan(200);
    expect(sizes.filter(([, lines]) => lines > functionLinesMax)).toEqual([]);
  });

  test(`functions of at most ${parametersMax} parameters`, () => {
    const many = product.flatMap(({ path, code }) =>
      [...code.matchAll(/function\*? (\w+)(?:<[^(]*>)?\(/g)].flatMap((match) => {
        const count = countParameters(code, match.index + match[0].length);
        return count > parametersMax ? [`${path} ${match[1]}(): ${count}`] : [];
      }),
    );
    expect(many).toEqual([]);
  });

  test.each([
    ["a: A, b = f(1, 2), { c, d }: E) {", 3],
    [") {", 0],
    ["\n  a: A,\n  b: Map<B, C>,\n) {", 2],
    ["a: (b: B, c: C) => D, e: E): F {", 2],
  ])("parameters of %p", (text, count) => expect(countParameters(text, 0)).toBe(count));

  /** Parameters of a function whose list begins at `at`, after the bracket. */
  function countParameters(code: string, at: number): number {
    let depth = 0;
    let commas = 0;
    let end = at;
    for (; depth >= 0 && end < code.length; end++) {
      const char = code[end] ?? "";
      if ("([{<".includes(char)) depth++;
      else if (")]}".includes(char) || (char === ">" && code[end - 1] !== "=")) depth--;
      else if (char === "," && depth === 0) commas++;
    }
    const list = code.slice(at, end - 1).trim();
    return list === "" ? 0 : commas + (list.endsWith(",") ? 0 : 1);
  }

  /** Every function as formatted: it ends at the first `}` in the column of its first line. */
  function functionSizes({ path, code }: Source): [string, number][] {
    const lines = code.split("\n");
    return lines.flatMap((line, start): [string, number][] => {
      const [, indent = "", name] =
        /^( *)(?:export )?(?:async )?(?:function\*? (\w+)|const (?:\w+)[^=]*= .*=> \{$)/.exec(
          line,
        ) ?? [];
      if (!/function|=> \{$/.test(line) || !/^ *(export |async |function|const )/.test(line)) {
        return [];
      }
      const label = name ?? /const (\w+)/.exec(line)?.[1];
      if (label === undefined) return [];
      const end = lines.findIndex((one, i) => i > start && one.startsWith(`${indent}}`));
      return [[`${path} ${label}()`, end - start + 1]];
    });
  }
});

describe("documented and tested", () => {
  test.each(product.map((source) => [source.path, source.text] as const))("%s", (_path, text) => {
    expect(text).toStartWith("/**");
  });

  test("every export has a docstring", () => {
    const bare = lib.flatMap(({ path, text }) => {
      const lines = text.split("\n");
      return lines.flatMap((line, i) => {
        if (!/^export (?!\{|\*|type \{)/.test(line)) return [];
        const above = lines.slice(0, i).findLast((one) => !one.startsWith("// biome-ignore"));
        return above?.endsWith("*/") ? [] : [`${path}:${i + 1} ${line}`];
      });
    });
    expect(bare).toEqual([]);
  });

  const testFiles = tests.filter(({ path }) => /\.test\.ts$/.test(path));
  /** Modules that tests call themselves. */
  const called = tests.flatMap((source) =>
    importsOf(source).flatMap((one) => {
      const to = one.typeOnly ? undefined : pathOf(source, one);
      return to?.startsWith("lib/") ? [to] : [];
    }),
  );

  test("every module is called by a test, or is part of what is called or run", () => {
    // genie.ts is what runs, as the binary: reading the streams is its alone.
    const run = closureOf(["genie.ts"]).map(({ path }) => path);
    const reached = closureOf(called, true).map(({ path }) => path);
    const known = new Set([...run, ...reached]);
    const others = lib.filter(({ path, code }) => !known.has(path) && hasValues(code));
    expect(others.map(({ path }) => path)).toEqual([]);
  });

  /** Types alone are gone when a program runs. */
  function hasValues(code: string): boolean {
    return /^export (?!type\b|interface\b)/m.test(code);
  }

  test("every room is entered by tests themselves", () => {
    const rooms = (paths: string[]) => [...new Set(paths.map(roomOf))].sort();
    expect(rooms(called)).toEqual(rooms(lib.map(({ path }) => path)));
  });

  test.each(Object.keys(commandLines))("genie %s is run by a test", (name) => {
    const words = new RegExp(`["\`]${name}["\` ]`);
    const runs = testFiles.filter(({ uncommented }) => words.test(uncommented));
    expect(runs.length).toBeGreaterThan(0);
  });
});

describe("these rules see what they look for", () => {
  const nested = "`a #{b + `c#{d}`} e` f".replaceAll("#", "$");
  const braces = "`#{{ a: 1 }.a}` b".replaceAll("#", "$");
  test.each([
    ["a comment", "a // b\nc /* d\ne */ f", "a     \nc     \n     f", "a     \nc     \n     f"],
    ["a text", 'a "// b" c', 'a "// b" c', "a        c"],
    ["a template", nested, nested, "     b +     d       f"],
    ["braces in a template", braces, braces, "   { a: 1 }.a   b"],
    ["a regular expression", "x = /[/*]'\\//g; y", "x = /[/*]'\\//g; y", "x =           ; y"],
    ["a division", "a / b / c", "a / b / c", "a / b / c"],
  ])("around %s", (_name, text, uncommented, code) => {
    expect(blank(text)).toEqual({ uncommented, code });
  });

  const imports = `import type { A } from "./a.ts";
import { type B, b } from "./b.ts";
import {
  type C,
  type D,
} from "./c.ts";
import e from "./e.ts";
import "./f.ts";
export { g } from "./g.ts";
const h = await import("./h.ts");
type I = typeof import("./i.ts");
`;
  test("imports", () => {
    const source = { path: "", text: imports, ...blank(imports) };
    const kinds = importsOf(source).map(({ from, typeOnly }) => `${from} ${typeOnly}`);
    expect(kinds).toEqual([
      "./a.ts true",
      "./b.ts false",
      "./c.ts true",
      "./e.ts false",
      "./f.ts false",
      "./g.ts false",
      "./h.ts false",
      "./i.ts true",
    ]);
  });
});
