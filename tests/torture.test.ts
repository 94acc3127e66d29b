/** Every part of the torture bench in its short form; `bun run torture` runs them in full. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { parts, runPart } from "./torture/torture.ts";

// `bun run test` allows two minutes, a plain `bun test` must too.
setDefaultTimeout(120_000);

/** The same cases every time; `bun run torture` draws new ones. */
const seed = 20_261_121;

test.each(Object.keys(parts))("torture: %s", async (name) => {
  const part = await parts[name]?.();
  if (!part) throw new Error(`No part is named ${name}`);
  const { counts, failures } = await runPart(part, { seed, short: true });
  expect(failures).toEqual([]);
  expect(counts["cases"]).toBeGreaterThan(0);
});
