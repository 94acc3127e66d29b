/**
 * `bun tests/bench/modules.ts [ADD|DEL|CHECK|GC|STATUS] [ROUNDS]`: what each module of a plain call
 * costs to load, in a compiled program as genie is one: its bytecode decoded, its top level run,
 * and the modules of Bun that it is the first to import. Medians of cold starts, in µs. What the
 * stages of a call cost, `GENIE_TRACE=1` tells.
 */
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { flags } from "../build.ts";
import { importsOf, lineCount, pathOf, product, root, type Source } from "../sources.ts";
import { median } from "./summary.ts";

const entries: Record<string, string> = {
  ADD: "lib/attach.ts",
  DEL: "lib/detach.ts",
  CHECK: "lib/check.ts",
  GC: "lib/gc.ts",
  STATUS: "lib/status.ts",
};

/** What one module adds to a cold start. */
export interface ModuleCost {
  path: string;
  lines: number;
  us: number;
}

/** The modules that an entry loads, each after those that it imports. */
export function loadOrder(entry: string): Source[] {
  const order: Source[] = [];
  const seen = new Set<string>();
  const visit = (path: string) => {
    const source = product.find((one) => one.path === path);
    if (!source || seen.has(path)) return;
    seen.add(path);
    for (const one of importsOf(source)) {
      const to = pathOf(source, one);
      if (to !== undefined && !one.lazy && !one.typeOnly) visit(to);
    }
    order.push(source);
  };
  for (const path of ["lib/streams.ts", "lib/kernel.ts", "lib/request.ts", entry]) visit(path);
  return order;
}

/** Compiles a program that loads the modules of an entry in turn, and runs it again and again. */
export function measureModules(entry: string, rounds: number): ModuleCost[] {
  const order = loadOrder(entry);
  const dir = mkdtempSync(join(tmpdir(), "genie-modules-"));
  try {
    const program = join(dir, "program");
    const steps = order.map(
      ({ path }) =>
        `await import(${JSON.stringify(join(root, path))}); at.push(Bun.nanoseconds());`,
    );
    // What nobody keeps would be left out of the program.
    const text = `const kept = (globalThis.kept = []);\nconst at = [Bun.nanoseconds()];
      ${steps.join("\n")}\nprocess.stdout.write(at.join(" "));\n`;
    writeFileSync(`${program}.ts`, text);
    const words = ["build", ...flags, `--outfile=${program}`, `${program}.ts`];
    const built = Bun.spawnSync([process.execPath, ...words], { cwd: root });
    if (built.exitCode !== 0) throw new Error(built.stderr.toString());
    const runs = Array.from({ length: rounds }, () => {
      const { stdout } = Bun.spawnSync([program], { cwd: "/", env: {} });
      return stdout.toString().trim().split(" ").map(Number);
    });
    return order.map((source, i) => ({
      path: source.path,
      lines: lineCount(source),
      us: median(runs.map((at) => ((at[i + 1] ?? 0) - (at[i] ?? 0)) / 1000)),
    }));
  } finally {
    rmSync(dir, { recursive: true, force: true });
  }
}

function say(path: string, lines: number, us: number): void {
  const [count, time] = [String(lines).padStart(5), us.toFixed(0).padStart(6)];
  process.stdout.write(`${path.padEnd(24)} ${count} lines ${time} us\n`);
}

if (import.meta.main) {
  const [verb = "ADD", rounds = "40"] = process.argv.slice(2);
  const entry = entries[verb];
  if (entry === undefined) throw new Error(`expected one of ${Object.keys(entries).join(", ")}`);
  const costs = measureModules(entry, Number(rounds));
  for (const { path, lines, us } of costs) say(path, lines, us);
  const sum = (key: "lines" | "us") => costs.reduce((all, one) => all + one[key], 0);
  say("all", sum("lines"), sum("us"));
}
