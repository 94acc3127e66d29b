/**
 * The rules of the house that a program can check (style.md §5.2, §5.8): who imports whom, who
 * owns what, what is banned, how long things are, what is documented and tested.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";

const root = join(import.meta.dir, "..");

/**
 * A module imports values from lower layers only; of its own layer types alone. Within a layer the
 * order says nothing.
 */
const layers: string[][] = [
  // Data and text alone, and calls of libc.
  [
    ...["access", "crds", "html", "ip", "libc", "output", "quantity", "report_assets", "schema"],
    ...["select", "table", "text", "trace", "usage"],
    ...["agent_health", "containerfile", "finding", "metrics"],
  ],
  ["access_nad", "cni", "credentials", "netns"],
  ["grpc"],
  [
    ...[
      "annotations",
      "cri",
      "database",
      "device",
      "exec",
      "file_lock",
      "host_root",
      "json",
      "place",
      "streams",
    ],
    "traffic",
  ],
  // Formats of others, locks, the record.
  [
    ...[
      "device_info",
      "ending",
      "ipam",
      "kube_answer",
      "kubeconfig",
      "lock",
      "netconf",
      "npwg",
      "own_config",
      "request",
    ],
    ...["installation", "own_list"],
    ...["policy_rules", "report_choice", "report_file", "result", "state", "toml"],
  ],
  ["config_schema", "policy_between", "runtime_settings"],
  [
    ...[
      "admission",
      "config",
      "contradictions",
      "kpi",
      "kube",
      "multus",
      "netlink",
      "networks",
      "policy_objects",
      "presence",
    ],
    ...["result_wire", "routes"],
  ],
  ["host_end", "kube_access", "nft", "policy_peers", "policy_store"],
  [
    ...["api", "event", "genie_conf", "objects", "policy_problems", "policy_table"],
    ...["report_live", "watch"],
  ],
  // What a pod asks for, and on which networks.
  ["pod", "policy", "policy_watch", "settings", "wanted"],
  ["gate", "ledger", "quota", "report_rows", "report_tally"],
  ["report_shape"],
  ["cluster_parse", "report_csv", "report_policy", "report_words"],
  ["cluster_merge", "cluster_nodes"],
  ["delegate", "device_assign", "followed", "replan", "report", "report_charts", "report_text"],
  ["choose", "owner", "report_sections", "undo", "warm"],
  ["cluster_report", "report_nodes"],
  ["agent_record", "agent_problems", "alive", "netns_policy", "reattach", "reservations"],
  ["collect"],
  ["agent_local", "agent_part", "agent_tally"],
  [
    "agent_metrics",
    "agent_report",
    "agent_policy",
    "agent_token",
    "enforce",
    "explain_choice",
    "intend",
    "plan",
    "report_html",
    "status",
  ],
  ["agent_conflist", "agent_listen", "agent_status"],
  ["follow", "running", "status_running"],
  ["switching"],
  ["agent_follow"],
  // What genie is asked to do, one module each.
  ["attach", "check", "detach", "explain", "gc", "gc_command", "ready", "repair"],
  ["report_command", "switch"],
  ["agent_collect", "validate"],
  ["agent_upkeep"],
  ["agent"],
  ["readiness", "report_access", "webhook"],
  ["manifest"],
  ["monitoring"],
  ["webhook_manifest"],
  ["install", "manifest_command", "node_view"],
  ["doctor_api", "doctor_networks", "doctor_node", "doctor_plugins", "doctor_runtime"],
  ["completion", "doctor"],
  ["uninstall"],
  ["commands"],
  ["cli"],
];

/** Modules that decide on plain data: no file, clock, process or network; tests need no host. */
const pure = [
  ...["completion", "containerfile", "finding", "manifest", "monitoring", "webhook_manifest"],
  ...["cluster_merge", "cluster_parse", "contradictions", "report_access", "report_tally"],
  ...[
    "access",
    "access_nad",
    "admission",
    "annotations",
    "config",
    "config_schema",
    "crds",
    "ending",
    "genie_conf",
    "html",
    "ip",
  ],
  ...[
    "json",
    "kube_answer",
    "multus",
    "netconf",
    "npwg",
    "own_list",
    "quantity",
    "presence",
    "report_choice",
    "report_words",
    "result",
    "result_wire",
  ],
  ...["policy", "policy_between", "policy_objects", "policy_peers", "policy_problems"],
  ...["policy_rules", "policy_table"],
  ...["schema", "select", "table", "text", "toml", "usage"],
];
/** What a pure module may import besides ours. */
const pureImports = ["node:net", "smol-toml", "valibot"];

/** Who alone may write this. */
const owners: [what: string, pattern: RegExp, files: string[]][] = [
  ["a child process", /\bBun\.spawn(Sync)?\b|"node:child_process"|\bBun\.\$/, ["exec"]],
  // A report opens the file for reading only; whoever writes goes through database.ts.
  ["the database", /"bun:sqlite"/, ["database", "report_file"]],
  ["foreign functions", /"bun:ffi"/, ["libc"]],
  ["the Kubernetes client", /"@kubernetes\/client-node"/, ["kubeconfig"]],
  ["a request", /\bfetch\(/, ["cluster_nodes", "kube"]],
  ["the command line", /\bprocess\.argv\b/, ["genie"]],
  ["the environment", /\bprocess\.env\b|\bBun\.env\b/, ["genie"]],
  ["the end of the process", /\bprocess\.(exit|exitCode|on|once)\b/, ["genie"]],
  // Rather no process than one that stays in a pod's network namespace.
  ["an abort", /\bprocess\.abort\b/, ["netns"]],
  ["a signal", /\bprocess\.kill\b/, ["exec", "lock"]],
  ["the process id", /\bprocess\.p?pid\b/, ["lock"]],
  ["the path of the binary", /\bprocess\.execPath\b/, ["commands", "networks"]],
  // process.stdout costs milliseconds (style.md 4.6), so only the operator's commands touch it.
  ["the width of the terminal", /\bprocess\.stdout\.columns\b/, ["commands"]],
];

/** Everything of `process` that {@link owners} gives to someone. */
const ownedOfProcess =
  /\bprocess\.(argv|env|exit|exitCode|on|once|abort|kill|p?pid|execPath|stdout\.columns)\b/g;

const linesMax = 400;
const functionLinesMax = 70;
const columnsMax = 100;

const bannedNames = ["utils", "helpers", "common", "types", "index", "manager", "controller"];

interface Source {
  /** Path from the root, as in `lib/cni.ts`. */
  path: string;
  /** `cni` for `lib/cni.ts`. */
  name: string;
  text: string;
  /** Without comments. */
  uncommented: string;
  /** Without comments and without what stands in strings and regular expressions. */
  code: string;
}

function readSource(path: string): Source {
  const text = readFileSync(join(root, path), "utf8");
  const { uncommented, code } = blank(text);
  return { path, name: basename(path, ".ts"), text, uncommented, code };
}

/** Replaces comments, and in `code` also literals, by spaces; lines and columns stay. */
function blank(text: string): { uncommented: string; code: string } {
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

const lib = list("lib").map(readSource);
const product = [readSource("genie.ts"), ...lib];
const tests = list("tests").map(readSource);
const all = [...product, ...tests];

/** `lib/cni.ts:12` of every place where the pattern matches. */
function places({ path }: Source, text: string, pattern: RegExp): string[] {
  return [...text.matchAll(new RegExp(pattern, "g"))].map(
    ({ index }) => `${path}:${text.slice(0, index).split("\n").length}`,
  );
}

interface Import {
  from: string;
  typeOnly: boolean;
}

function importsOf({ uncommented }: Source): Import[] {
  const found: Import[] = [];
  const statement =
    /^(?:import|export) (type )?(?:([\w*]+|(?:\w+, )?\{[^}]*\}|\* as \w+) from )?"([^"]+)"/gm;
  for (const [, type, names = "", from = ""] of uncommented.matchAll(statement)) {
    const listed = /^\{([^}]*)\}/.exec(names)?.[1]?.split(",") ?? [];
    const given = listed.map((name) => name.trim()).filter((name) => name !== "");
    const onlyTypes = given.length > 0 && given.every((name) => name.startsWith("type "));
    found.push({ from, typeOnly: type !== undefined || onlyTypes });
  }
  for (const [, type, from = ""] of uncommented.matchAll(/(typeof )?\bimport\("([^"]+)"\)/g)) {
    found.push({ from, typeOnly: type !== undefined });
  }
  return found;
}

const layerOf = (name: string): number => layers.findIndex((names) => names.includes(name));

describe("layers", () => {
  test("every module has its layer, and every layer its modules", () => {
    expect(layers.flat().sort()).toEqual(lib.map(({ name }) => name).sort());
  });

  test.each(lib.map((source) => [source.name, source] as const))("of %s", (name, source) => {
    const wrong = importsOf(source)
      .filter(({ from }) => /^\..*\.ts$/.test(from))
      .filter(({ from, typeOnly }) => {
        const layer = layerOf(basename(from, ".ts"));
        return layer > layerOf(name) || (layer === layerOf(name) && !typeOnly) || layer < 0;
      })
      .map(({ from, typeOnly }) => `${typeOnly ? "type of " : ""}${from}`);
    expect(wrong).toEqual([]);
  });

  test("the product imports nothing of the tests, and of a folder only ./ or ./lib/", () => {
    const own = product.flatMap((source) =>
      importsOf(source)
        .filter(
          ({ from }) => from.startsWith(".") && !/^\.\.\/(package\.json|plugins\.toml)$/.test(from),
        )
        // The texts of a page are embedded, not run.
        .filter(({ from }) => !/^\.\/(lib\/)?[a-z_]+\.(ts|css|js)$/.test(from))
        .map(({ from }) => `${source.path}: ${from}`),
    );
    expect(own).toEqual([]);
  });

  test.each(pure)("%s is pure", (name) => {
    const source = readSource(`lib/${name}.ts`);
    const foreign = importsOf(source)
      .filter(({ typeOnly }) => !typeOnly)
      .map(({ from }) => from)
      .filter((from) => !pureImports.includes(from))
      .filter((from) => !["cni", ...pure].includes(basename(from, ".ts")));
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
    expect(users.map(({ name }) => name).filter((name) => !files.includes(name))).toEqual([]);
  });

  test("of everything of process", () => {
    const others = product.flatMap((source) =>
      places(source, source.code.replace(ownedOfProcess, " "), /\bprocess\./),
    );
    expect(others).toEqual([]);
  });

  test("genie.ts stays a few dozen lines", () => {
    expect(readSource("genie.ts").text.trimEnd().split("\n").length).toBeLessThanOrEqual(82);
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
    const stems = all.map(({ path, name }) => [path, name.replace(/\.test$/, "")] as const);
    expect(stems.filter(([, name]) => bannedNames.includes(name))).toEqual([]);
    expect(lib.filter(({ name }) => !/^[a-z]+(_[a-z]+)?$/.test(name))).toEqual([]);
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
    const long = lib.filter(({ text }) => text.trimEnd().split("\n").length > linesMax);
    expect(long.map(({ path }) => path)).toEqual([]);
  });

  test(`functions of at most ${functionLinesMax} lines`, () => {
    const sizes = product.flatMap(functionSizes);
    expect(sizes.length).toBeGreaterThan(200);
    expect(sizes.filter(([, lines]) => lines > functionLinesMax)).toEqual([]);
  });

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

  test("every module has a test, or is named by one", () => {
    const testFiles = tests.filter(({ path }) => /\.test\.ts$/.test(path));
    const others = testFiles.filter(({ name }) => name !== "tidy.test");
    const untested = lib.filter(({ path }) => !others.some(({ text }) => text.includes(path)));
    expect(untested.map(({ name }) => name)).toEqual([]);
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
    const source = { path: "", name: "", text: imports, ...blank(imports) };
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
