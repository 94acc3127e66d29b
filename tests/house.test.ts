/**
 * The rule of the house: `lib/*.ts` is the plugin, all that a plain call loads; `lib/<room>/` is
 * the rest, entered by `await import()`. Prints the table of what each operation loads.
 */
import { describe, expect, test } from "bun:test";
import {
  closureOf,
  importsOf,
  lib,
  lineCount,
  pathOf,
  product,
  roomOf,
  type Source,
} from "./sources.ts";

/** Files that each operation of a plain call begins with, and the most it may load. */
const operations: [name: string, entry: string[], filesMax: number, linesMax: number][] = [
  ["ADD", ["genie.ts", "lib/attach.ts"], 45, 8000],
  ["DEL", ["genie.ts", "lib/detach.ts"], 35, 6000],
  ["CHECK", ["genie.ts", "lib/check.ts"], 35, 6000],
  ["GC", ["genie.ts", "lib/gc.ts"], 40, 6500],
  ["STATUS", ["genie.ts", "lib/status.ts"], 20, 2000],
  ["VERSION", ["genie.ts"], 9, 800],
];

/** Most files and lines of the whole program, and of the plugin alone. */
const filesMax = 175;
const linesMax = 31_500;
const pluginFilesMax = 46;
const pluginLinesMax = 9_600;

const sumOf = (sources: readonly Source[]) =>
  sources.reduce((sum, source) => sum + lineCount(source), 0);
const plugin = lib.filter(({ path }) => roomOf(path) === "");

/** `from: to` of every import that leaves a place, as [place, place, text]. */
const crossings = product.flatMap((source) =>
  importsOf(source).flatMap((one) => {
    const to = pathOf(source, one);
    if (to === undefined || roomOf(to) === roomOf(source.path)) return [];
    return [{ ...one, from: roomOf(source.path), to: roomOf(to), text: `${source.path}: ${to}` }];
  }),
);

describe("sizes", () => {
  test.each(operations)("of %s", (_name, entry, files, lines) => {
    const closure = closureOf(entry);
    expect(closure.length).toBeLessThanOrEqual(files);
    expect(sumOf(closure)).toBeLessThanOrEqual(lines);
  });

  test("of the plugin and of the program", () => {
    expect(plugin.length).toBeLessThanOrEqual(pluginFilesMax);
    expect(sumOf(plugin)).toBeLessThanOrEqual(pluginLinesMax);
    expect(lib.length).toBeLessThanOrEqual(filesMax);
    expect(sumOf(lib)).toBeLessThanOrEqual(linesMax);
  });

  test("are printed", () => {
    const row = (name: string, sources: readonly Source[]) =>
      [name.padEnd(16), sources.length, "files", sumOf(sources), "lines"].join(" ");
    const rows = operations.map(([name, entry]) => row(name, closureOf(entry)));
    const rooms = [...new Set(lib.map(({ path }) => roomOf(path)))].sort().map((room) =>
      row(
        `lib/${room}`,
        lib.filter(({ path }) => roomOf(path) === room),
      ),
    );
    process.stderr.write(`${[...rows, ...rooms, row("lib", lib)].join("\n")}\n`);
    expect(rows.length).toBe(operations.length);
  });
});

describe("doors", () => {
  test("the plugin enters a room by await import() alone", () => {
    const others = crossings.filter(
      ({ from, lazy, typeOnly }) => from === "" && !lazy && !typeOnly,
    );
    const known = ["attach", "gate", "gate", "plan", "pod", "pod"].map((name) => `lib/${name}.ts`);
    expect(others.map(({ text }) => text.split(":")[0])).toEqual(known);
  });
});
