/** JSON from others: what is passed on unchanged, and what is refused. */
import { describe, expect, test } from "bun:test";
import type { CniError } from "../lib/cni.ts";
import { isObject, parseJson } from "../lib/json.ts";

describe("parseJson()", () => {
  test.each([
    "{}",
    '{"b":1,"a":[true,false,null,"x"]}',
    '{"id":9223372036854775807,"more":12345678901234567890123}',
    '{"a":1.0,"b":1.50,"c":1e400,"d":-0,"e":1E5,"f":2e+3,"g":-0.0}',
    '{"__proto__":{"polluted":1.5},"constructor":1}',
    '{"text":"1.0 \\" 12345678901234567890 {[\\\\"}',
    '"12345678901234567890"',
    `${"[".repeat(128)}${"]".repeat(128)}`,
  ])("fact 14: gives back %s", (text) => {
    const value = parseJson(text, "it");
    expect(JSON.stringify(value)).toBe(text);
    expect((value as { polluted?: unknown }).polluted).toBeUndefined();
  });

  test.each([
    ["nothing", "", "it is not valid JSON"],
    ["a comment", "{} // x", "it is not valid JSON"],
    ["an open string", '{"a":"\\', "it is not valid JSON"],
    ["brackets the wrong way round", "}}{{", "it is not valid JSON"],
    ["129 levels", `${"[".repeat(129)}${"]".repeat(129)}`, "it nests deeper than 128 levels"],
  ])("refuses %s", (_name, text, part) => {
    expect(() => parseJson(text, "it")).toThrow(
      expect.objectContaining({ code: 6, message: expect.stringContaining(`decode it: ${part}`) }),
    );
  });
});

test.each(['{"token":s3cr3t"}', '{"token":"a" s3cr3t}', '{"token":"s3cr3t', "s3cr3t"])(
  "what is no JSON, as %s, is not quoted: a secret may have lost its quotes",
  (text) => {
    const found: { message?: string; details?: string } = {};
    try {
      parseJson(text, "it");
    } catch (error) {
      Object.assign(found, { message: String(error), details: (error as CniError).details });
    }
    expect(found.message).toContain("it is not valid JSON");
    expect(found.details).toMatch(/^JSON Parse error: /);
    expect(JSON.stringify(found)).not.toContain("s3cr3t");
  },
);

test.each([
  [{}, true],
  [Object.create(null), true],
  [null, false],
  [[], false],
  ["x", false],
  [parseJson("1.0", "it"), false],
])("isObject(%j) is %p", (value, is) => {
  expect(isObject(value)).toBe(is);
});
