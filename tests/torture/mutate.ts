/** Changes texts into what parsers stumble over: by letters, and by JSON values. */
import { isObject } from "../../lib/json.ts";
import { oneIn, pick, type Random } from "./seed.ts";

/** Pieces of text put in anywhere. No path of the machine: a fuzz writes where it is told. */
export const spices = [
  ..."{}[],:\"\\@/;=*%-.'#",
  ...["null", "true", "-1", "0", "1e999", "-0", "1.50", "99999999999999999999", '""', "[]", "{}"],
  ...["__proto__", "constructor", "toString", "../", "..", "\\u0000", "\\ud800"],
  ...["\u001b[2J", "\u009b31m", "\u202e", "\ufffd", "\ufeff", "é", "\u2028", "\n", "\r", "\t", " "],
  ...["eth0", "blue", "green", "cni", "name", "type", "ips", "interface", "1.1.0", "0.2.0", "::/0"],
  ...["a".repeat(300), "[".repeat(200), "blue,".repeat(40), "x".repeat(20_000)],
];

/** Values put in the place of others. */
export const values: readonly unknown[] = [
  ...[
    null,
    true,
    false,
    0,
    -1,
    2 ** 40,
    1.5,
    "",
    "x",
    "../x",
    "\u001b[2J",
    "\0",
    "1.1.0",
    "\ud800",
  ],
  ...["10.0.0.1/8", "::1/128", "::ffff:1.2.3.4/96", "eth0", "blue", [], [[]], {}, { a: 1 }],
  ...[["blue"], [null], "y".repeat(5000), { toString: 1 }],
  JSON.parse('{"__proto__":{"name":"x"}}'),
];

/** The text with one to three changes; half of the time it stays JSON. */
export function mutate(random: Random, text: string): string {
  let mutated = text;
  for (let left = 1 + random(3); left > 0; left--) {
    mutated = oneIn(random, 2) ? mutateText(random, mutated) : mutateJson(random, mutated);
  }
  return mutated;
}

/** Takes a few letters away, doubles them, cuts the text, or puts something in. */
export function mutateText(random: Random, text: string): string {
  const from = random(text.length + 1);
  const to = Math.min(text.length, from + random(20));
  const before = text.slice(0, from);
  switch (random(4)) {
    case 0: // take away
      return before + text.slice(to);
    case 1: // double
      return text.slice(0, to) + text.slice(from);
    case 2: // cut
      return oneIn(random, 4) ? before : before + pick(random, spices) + text.slice(to);
    default: // put in
      return before + pick(random, spices) + text.slice(from);
  }
}

/** Changes one value or key somewhere in the document; text that is no JSON stays as it is. */
export function mutateJson(random: Random, text: string): string {
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError) return text;
    throw error;
  }
  const places: { holder: Record<string, unknown>; key: string }[] = [];
  const visit = (value: unknown) => {
    if (typeof value !== "object" || value === null) return;
    for (const [key, item] of Object.entries(value)) {
      places.push({ holder: value as Record<string, unknown>, key });
      visit(item);
    }
  };
  visit(document);
  if (places.length === 0) return JSON.stringify(pick(random, values));
  const { holder, key } = pick(random, places);
  const value = holder[key];
  if (oneIn(random, 4)) delete holder[key];
  else if (oneIn(random, 3)) holder[pick(random, spices)] = value;
  // JSON inside of JSON, as annotations have it.
  else if (typeof value === "string" && oneIn(random, 2)) holder[key] = mutate(random, value);
  else holder[key] = pick(random, values);
  return JSON.stringify(document);
}

/** Every text in a JSON value, keys left out. */
export function textsOf(value: unknown): string[] {
  if (typeof value === "string") return [value];
  if (Array.isArray(value)) return value.flatMap(textsOf);
  return isObject(value) ? Object.values(value).flatMap(textsOf) : [];
}
