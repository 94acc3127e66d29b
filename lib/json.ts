/**
 * JSON from others: hostile until parsed, and passed on unchanged. Pure.
 * Source: CNI SPEC 1.1 §1 (unknown fields), fact 14.
 */
import { CniError, code } from "./cni.ts";

/** JSON read from others is deeper than this only on purpose. */
const jsonDepthMax = 128;
const quoteChar = 0x22;
const backslashChar = 0x5c;

/**
 * Parses JSON that is hostile until parsed. Numbers that a double cannot hold, or would print
 * otherwise, keep their text (SPEC §1: unknown fields pass through unchanged).
 *
 * @param what names the text in the error, e.g. `network config on stdin`
 * @throws CniError 6 when it is not JSON or nests deeper than 128
 */
export function parseJson(text: string, what: string): unknown {
  const plain = scan(text, what);
  try {
    // The reviver is slow, so it is used only where the text has a number worth keeping.
    return plain ? JSON.parse(text) : JSON.parse(text, keepNumberText);
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new CniError(code.decodingFailure, `Cannot decode ${what}: it is not valid JSON`, {
      // Without the word it stumbled over: that may be a token that lost its quote.
      details: reason.replace(/ ".*/s, ""),
      cause: error,
    });
  }
}

/** Has no type in TypeScript's library yet: the third argument and `rawJSON` are ES2026. */
const rawJson = JSON as unknown as {
  rawJSON(text: string): unknown;
  isRawJSON(value: unknown): boolean;
};

function keepNumberText(_key: string, value: unknown, context?: { source?: string }): unknown {
  const source = context?.source;
  if (typeof value !== "number" || source === undefined) return value;
  return JSON.stringify(value) === source ? value : rawJson.rawJSON(source);
}

/** Checks the depth; false when a number has a fraction, an exponent or 16 digits and more. */
function scan(text: string, what: string): boolean {
  let depth = 0;
  let digits = 0;
  let plain = true;
  for (let i = 0; i < text.length; i++) {
    const char = text.charCodeAt(i);
    if (char === quoteChar) i = endOfString(text, i);
    else if (char === 0x7b || char === 0x5b) {
      if (++depth > jsonDepthMax) {
        throw new CniError(
          code.decodingFailure,
          `Cannot decode ${what}: it nests deeper than ${jsonDepthMax} levels`,
        );
      }
    } else if (char === 0x7d || char === 0x5d) depth--;
    digits = char >= 0x30 && char <= 0x39 ? digits + 1 : 0;
    // A dot, an exponent's sign or capital, and -0 occur outside strings in numbers alone.
    if (digits > 15 || char === 0x2e || char === 0x45 || char === 0x2b) plain = false;
    if (char === 0x2d && text.charCodeAt(i + 1) === 0x30) plain = false;
    if (char === 0x65 && isDigit(text.charCodeAt(i - 1))) plain = false;
  }
  return plain;
}

/**
 * Where the string that begins at `at` ends; the end of the text when it does not. Most of a text
 * is in strings, and going through them a character at a time would take most of the time.
 */
function endOfString(text: string, at: number): number {
  for (let end = at; ; ) {
    end = text.indexOf('"', end + 1);
    if (end < 0) return text.length;
    let backslashes = 0;
    while (text.charCodeAt(end - 1 - backslashes) === backslashChar) backslashes++;
    if (backslashes % 2 === 0) return end;
  }
}

function isDigit(char: number): boolean {
  return char >= 0x30 && char <= 0x39;
}

/** True for a JSON object: not null, not an array, not a number that kept its text. */
export function isObject(value: unknown): value is Record<string, unknown> {
  return (
    typeof value === "object" &&
    value !== null &&
    !Array.isArray(value) &&
    !rawJson.isRawJSON(value)
  );
}
