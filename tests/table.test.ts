/** Tables for a terminal: alignment, the width that is kept, and what never reaches a terminal. */
import { describe, expect, test } from "bun:test";
import { type Column, formatTable, visibleText } from "../lib/report/table.ts";

const columns: Column[] = [
  { title: "NAME" },
  { title: "SIZE", align: "right" },
  { title: "WHY", shrinks: true },
];
const wide = Number.POSITIVE_INFINITY;

describe("formatTable()", () => {
  test.each<[string, string[][], number, string]>([
    ["no rows", [], wide, "NAME  SIZE  WHY\n"],
    [
      "columns as wide as their widest cell, numbers right, no space at the end",
      [
        ["a", "1", "x"],
        ["long name", "12345", ""],
      ],
      wide,
      "NAME        SIZE  WHY\na              1  x\nlong name  12345\n",
    ],
    ["a row with a cell missing", [["a"]], wide, "NAME  SIZE  WHY\na\n"],
    [
      "nothing cut where it just fits",
      [["a", "1", "0123456789"]],
      22,
      "NAME  SIZE  WHY\na        1  0123456789\n",
    ],
    [
      "the column that gives way",
      [["a", "1", "0123456789"]],
      21,
      "NAME  SIZE  WHY\na        1  01234567…\n",
    ],
    [
      "not less than 8 columns of it",
      [["a", "1", "0123456789"]],
      5,
      "NAME  SIZE  WHY\na        1  0123456…\n",
    ],
    [
      "wide characters as two columns",
      [["日本", "1", "日本日本日本"]],
      21,
      "NAME  SIZE  WHY\n日本     1  日本日本…\n",
    ],
    [
      "control characters as a sign that cannot act",
      [["\u001b[31mred", "\n", "a\u202eb"]],
      wide,
      "NAME      SIZE  WHY\n\ufffd[31mred     \ufffd  a\ufffdb\n",
    ],
  ])("%s", (_name, rows, width, expected) => {
    expect(formatTable(columns, rows, width)).toBe(expected);
  });

  test("the widest of several columns gives way first", () => {
    const two: Column[] = [
      { title: "A", shrinks: true },
      { title: "B", shrinks: true },
    ];
    const row = ["0123456789", "0123456789".repeat(3)];
    expect(formatTable(two, [row], 32)).toBe("A           B\n0123456789  0123456789012345678…\n");
    expect(formatTable(two, [row], 19)).toBe("A          B\n01234567…  0123456…\n");
  });

  test("what wraps gives way before all others, and stands whole below its row", () => {
    const wrapping: Column[] = [
      { title: "POD", shrinks: true, cut: "middle" },
      { title: "WHY", wraps: true },
    ];
    const rows = [
      ["team/web-7f-x2x7q", "it was refused by 日本 as it is"],
      ["a", "ok"],
    ];
    expect(formatTable(wrapping, rows, wide)).toBe(
      `POD                WHY\n${rows[0]?.join("  ")}\na                  ok\n`,
    );
    expect(formatTable(wrapping, rows, 27)).toBe(
      "POD                WHY\nteam/web-7f-x2x7q\n  it was refused by 日本 as\n  it is\n" +
        "a                  ok\n",
    );
    expect(formatTable(wrapping, rows, 20)).toBe(
      "POD              WHY\nteam/we…f-x2x7q\n  it was refused by\n  日本 as it is\n" +
        "a                ok\n",
    );
    const long = formatTable(wrapping, [["a", `${"日".repeat(3000)} end`]], 20).split("\n");
    expect([long.length, long.at(-2)]).toEqual([15, `  ${"日".repeat(8)}…`]);
  });

  test("never wider than the terminal, whatever it holds", () => {
    for (let width = 20; width < 60; width++) {
      const rows = [
        ["a", "1", "é日".repeat(width)],
        ["b", "22", "x".repeat(width * 2)],
      ];
      const lines = formatTable(columns, rows, width).trimEnd().split("\n");
      expect(Math.max(...lines.map((line) => Bun.stringWidth(line)))).toBeLessThanOrEqual(width);
    }
  });
});

test.each([
  ["plain é日😀", "plain é日😀"],
  ["a\tb\r\nc", "a\ufffdb\ufffd\ufffdc"],
  ["\u001b]0;title\u0007", "\ufffd]0;title\ufffd"],
  ["a\u0000\u007f\u009b", "a\ufffd\ufffd\ufffd"],
  ["zero\u200bwidth\u2066", "zero\ufffdwidth\ufffd"],
])("visibleText(%j)", (text, expected) => {
  expect(visibleText(text)).toBe(expected);
});
