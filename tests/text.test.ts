/** Text from others, made fit to be shown. */
import { describe, expect, test } from "bun:test";
import { oneLine, printable } from "../lib/cni.ts";
import { editDistance } from "../lib/config/toml.ts";

describe("oneLine()", () => {
  test.each([
    ["plain", 10, "plain"],
    [" a\r\n\tb\0c ", 10, "a b c"],
    ["a\u2028b\u009bc", 10, "a b c"],
    ["abcdef", 6, "abcdef"],
    ["abcdefg", 6, "abcde…"],
  ])("%j to %d", (text, lengthMax, expected) => {
    expect(oneLine(text, lengthMax)).toBe(expected);
  });
});

test.each([
  ["a\nb\tc", "a\nb\tc"],
  ["a\u001b[31mb", "a [31mb"],
  ["a\r\u0000\u2028b", "a b"],
])("printable(%j)", (text, expected) => {
  expect(printable(text)).toBe(expected);
});

test.each([
  ["", "", 0],
  ["conf", "conf", 0],
  ["cofn", "conf", 2],
  ["networks", "network", 1],
  ["", "abc", 3],
  ["kitten", "sitting", 3],
])("editDistance(%j, %j) is %d", (a, b, edits) => {
  expect([editDistance(a, b), editDistance(b, a)]).toEqual([edits, edits]);
});
