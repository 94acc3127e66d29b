/** Every part of the torture bench in its short form; `bun run torture` runs them in full. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { lacks } from "./skip.ts";
import { parts, runPart } from "./torture/torture.ts";

// `bun run test` allows two minutes, a plain `bun test` must too.
setDefaultTimeout(120_000);

/** The same cases every time; `bun run torture` draws new ones. */
const seed = 20_261_121;

for (const [name, load] of Object.entries(parts)) {
  const part = await load();
  test.skipIf(lacks("the binary", ...part.needs))(`torture: ${name}`, async () => {
    const { counts, failures } = await runPart(part, { seed, short: true });
    expect(failures).toEqual([]);
    expect(counts["cases"]).toBeGreaterThan(0);
  });
}
