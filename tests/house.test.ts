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
  ["ADD", ["genie.ts", "lib/attach.ts"], 21, 3500],
  ["DEL", ["genie.ts", "lib/detach.ts"], 16, 2800],
  ["CHECK", ["genie.ts", "lib/check.ts"], 17, 3000],
  ["GC", ["genie.ts", "lib/gc.ts"], 19, 3300],
  ["STATUS", ["genie.ts", "lib/status.ts"], 10, 1400],
  ["VERSION", ["genie.ts"], 6, 700],
];

/** Most files and lines of the whole program, and of the plugin alone. */
const filesMax = 130;
const linesMax = 29_200;
const pluginFilesMax = 30;
/** Of the plugin's lines, those of modules that load something: shapes alone load nothing. */
const pluginLinesMax = 5_500;

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
    const loading = plugin.filter(({ code }) => /^export (?!type\b|interface\b)/m.test(code));
    expect(sumOf(loading)).toBeLessThanOrEqual(pluginLinesMax);
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

/** The plugin's own rooms: what it needs seldom. Whoever may enter the plugin may enter them. */
const ownRooms = ["config", "recovery"];

/** Which room may enter which, `await import()` and types included. None of them leads back. */
const pairs: readonly string[] = [
  "agent kubernetes",
  "agent node",
  "agent policy",
  "agent report",
  "choice policy",
  "node cluster",
  "node kubernetes",
  "node policy",
  "node report",
  "policy kubernetes",
  "report choice",
  "report kubernetes",
];

describe("doors", () => {
  test("the plugin and its own rooms enter the others by await import() alone", () => {
    const isPlugin = (room: string) => room === "" || room === "recovery";
    const others = crossings.filter(
      ({ from, to, lazy, typeOnly }) => isPlugin(from) && to !== "" && !lazy && !typeOnly,
    );
    expect(others.map(({ text }) => text)).toEqual([]);
  });

  test("the command table enters rooms by await import() alone, the rest of cli two", () => {
    const fromCli = crossings.filter(
      ({ from, to }) => from === "cli" && to !== "" && !ownRooms.includes(to),
    );
    const others = fromCli.filter(({ text, lazy, typeOnly, to }) => {
      if (text.startsWith("lib/cli/commands.ts:")) return !lazy;
      return !typeOnly && !["report", "policy"].includes(to);
    });
    expect(others.map(({ text }) => text)).toEqual([]);
  });

  test("rooms enter each other along the list", () => {
    const between = crossings.filter(
      ({ from, to }) => !["", "cli", ...ownRooms].includes(from) && !["", ...ownRooms].includes(to),
    );
    const others = between.filter(({ from, to }) => !pairs.includes(`${from} ${to}`));
    expect(others.map(({ text }) => text)).toEqual([]);
    const used = new Set(between.map(({ from, to }) => `${from} ${to}`));
    expect([...used].sort()).toEqual([...pairs]);
  });
});
