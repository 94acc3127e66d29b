/**
 * JSON from others: hostile until parsed, and passed on unchanged. Pure.
 * Source: CNI SPEC 1.1 §1 (unknown fields), fact 14.
 */
import { CniError, code } from "./cni.ts";

/** Deepest nesting accepted; deeper JSON is an attack. */
const jsonDepthMax = 128;

/**
 * Parses hostile JSON. A number that a double cannot hold, or would print differently, keeps its
 * text (SPEC §1: unknown fields pass through unchanged).
 *
 * @param what names the text in the error, e.g. `network config on stdin`
 * @throws CniError 6 when it is not JSON or nests deeper than 128
 */
export function parseJson(text: string, what: string): unknown {
  const isPlain = scan(text, what);
  try {
    // The reviver is slow, so it is used only where the text has a number worth keeping.
    return isPlain ? JSON.parse(text) : JSON.parse(text, keepNumberText);
  } catch (error) {
    // The word that the parser quotes is cut off: it may be a secret that lost its quotation mark.
    const details = (error instanceof Error ? error.message : String(error)).replace(/ ".*/s, "");
    const msg = `Cannot decode ${what}: it is not valid JSON`;
    throw new CniError(code.decodingFailure, msg, { details, cause: error });
  }
}

/** TypeScript's library does not know these yet: they are ES2026. */
const rawJson = JSON as unknown as {
  rawJSON(text: string): unknown;
  isRawJSON(value: unknown): boolean;
};

function keepNumberText(_key: string, value: unknown, context?: { source?: string }): unknown {
  const source = context?.source;
  if (typeof value !== "number" || source === undefined) return value;
  return JSON.stringify(value) === source ? value : rawJson.rawJSON(source);
}

/** Checks the depth; false when a number is -0 or has a fraction, an exponent or over 15 digits. */
function scan(text: string, what: string): boolean {
  let depth = 0;
  let digits = 0;
  let isPlain = true;
  for (let i = 0; i < text.length; i++) {
    const char = text.charCodeAt(i);
    if (char === 0x22) i = endOfString(text, i);
    else if (char === 0x7b || char === 0x5b) {
      if (++depth > jsonDepthMax) {
        const msg = `Cannot decode ${what}: it nests deeper than ${jsonDepthMax} levels`;
        throw new CniError(code.decodingFailure, msg);
      }
    } else if (char === 0x7d || char === 0x5d) depth--;
    // Outside strings only numbers have "e" after a digit, a dot, "E", "+" or "-0".
    if (char === 0x65 && digits > 0) isPlain = false;
    digits = char >= 0x30 && char <= 0x39 ? digits + 1 : 0;
    if (digits > 15 || char === 0x2e || char === 0x45 || char === 0x2b) isPlain = false;
    if (char === 0x2d && text.charCodeAt(i + 1) === 0x30) isPlain = false;
  }
  return isPlain;
}

/** The index where the string that begins at `at` ends, or the length of the text. */
function endOfString(text: string, at: number): number {
  // indexOf is far faster than a loop over characters, and most of a text is in strings.
  for (let end = at; ; ) {
    end = text.indexOf('"', end + 1);
    if (end < 0) return text.length;
    let backslashes = 0;
    while (text[end - 1 - backslashes] === "\\") backslashes++;
    if (backslashes % 2 === 0) return end;
  }
}

/** True for a JSON object: not null, not an array, not a number that kept its text. */
export function isObject(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return false;
  return !rawJson.isRawJSON(value);
}
