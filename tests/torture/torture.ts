/**
 * `bun run torture`: tries to break the compiled program, part by part, and says what is left
 * behind. Every case is made from a seed, which is printed; the same seed makes the same case. See
 * `bun run torture --help`.
 *
 * Exit status: 0 nothing broke; 1 something did; 2 used wrongly or something is missing.
 */
import { parseArgs } from "node:util";
import { missing } from "../needs.ts";
import { compiledGenie } from "../wire.ts";
import type { Outcome, Part } from "./part.ts";
import { newSeed } from "./seed.ts";

/** The parts, each in a file of its own that is loaded when it runs. */
export const parts: Record<string, () => Promise<Part>> = {
  kills: async () => (await import("./kills.ts")).kills,
  delegates: async () => (await import("./delegates.ts")).delegates,
  state: async () => (await import("./state.ts")).state,
  api: async () => (await import("./api.ts")).api,
  storm: async () => (await import("./storm.ts")).storm,
  fuzz: async () => (await import("./fuzz.ts")).fuzz,
};

/** Limit for a whole run, in ms: parts that come late have what is left. */
const runMs = 15 * 60_000;

/**
 * Runs one part, in its time.
 *
 * @param endMs when the whole run has to end, ms since the epoch
 * @throws Error with what this machine lacks for it
 */
export async function runPart(
  part: Part,
  options: { seed: number; short: boolean; count?: number },
  endMs: number = Number.POSITIVE_INFINITY,
): Promise<Outcome> {
  const { short, full } = part.limitSeconds;
  const lack = missing(...part.needs);
  if (lack !== undefined) throw new Error(lack);
  const untilMs = Math.min(endMs, Date.now() + (options.short ? short : full) * 1000);
  return part.run({ ...options, untilMs });
}

const usage = `Usage: bun run torture [part ...] [options]

Kills, starves and misleads genie, and looks at what is left behind. Needs root, and the packages
that bun tests/needs.ts installs.

  --short      the form that every change has to pass: seconds, not minutes
  --seed N     seed of the first case of each part (default: a new one, printed)
  --count N    how many cases: with the seed of a failure and 1, that case alone
  --help       this text

Parts: ${Object.keys(parts).join(", ")}.
`;

interface Words {
  names: string[];
  short: boolean;
  seed: number;
  count?: number;
}

/** The words of the command line, or what to say and with which exit status. */
function readWords(args: string[]): Words | { status: number; text: string } {
  const options = {
    short: { type: "boolean", default: false },
    seed: { type: "string" },
    count: { type: "string" },
    help: { type: "boolean", default: false },
  } as const;
  try {
    const { values, positionals } = parseArgs({ args, options, allowPositionals: true });
    if (values.help) return { status: 0, text: usage };
    const unknown = positionals.find((name) => !Object.hasOwn(parts, name));
    if (unknown !== undefined) throw new Error(`no part is named "${unknown}"`);
    return {
      names: positionals.length > 0 ? positionals : Object.keys(parts),
      short: values.short,
      seed: values.seed === undefined ? newSeed() : readNumber("--seed", values.seed),
      ...(values.count !== undefined && { count: readNumber("--count", values.count) }),
    };
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    return { status: 2, text: `torture: ${said}\n\n${usage}` };
  }
}

function readNumber(option: string, text: string): number {
  if (/^[1-9]\d{0,9}$/.test(text)) return Number(text);
  throw new Error(`${option} needs a whole number, 1 or more`);
}

/** One line for people, and one for every failure. */
function formatOutcome(name: string, { counts, failures }: Outcome, seconds: number): string {
  const all = Object.entries(counts).map(([what, number]) => `${number} ${what}`);
  const failed = failures.map(
    ({ seed, what }) =>
      `  FAILED: ${what.trim().replaceAll("\n", "\n    ")}\n` +
      `    again: bun run torture ${name} --seed ${seed} --count 1\n`,
  );
  const said = `${name}: ${all.join(", ")}; ${failures.length} failed, in ${seconds.toFixed(1)} s`;
  return [`${said}\n`, ...failed].join("");
}

async function main(args: string[]): Promise<number> {
  const words = readWords(args);
  if ("status" in words) {
    (words.status === 0 ? process.stdout : process.stderr).write(words.text);
    return words.status;
  }
  if (process.platform !== "linux" || process.getuid?.() !== 0) {
    process.stderr.write("torture: it must run as root on Linux\n");
    return 2;
  }
  compiledGenie();
  const { names, ...options } = words;
  process.stdout.write(`torture: seed ${options.seed}\n`);
  let failed = 0;
  const endMs = Date.now() + runMs;
  for (const name of names) {
    const part = await parts[name]?.();
    if (!part) continue;
    process.stdout.write(`${name}: ${part.title}\n`);
    const startedMs = Date.now();
    const outcome = await runPart(part, options, endMs).catch((error: unknown) => ({
      counts: {},
      failures: [{ seed: options.seed, what: String(error) }],
    }));
    process.stdout.write(formatOutcome(name, outcome, (Date.now() - startedMs) / 1000));
    if (outcome.failures.length > 0) failed++;
  }
  process.stdout.write(`torture: ${names.length - failed} ok, ${failed} failed\n`);
  return failed === 0 ? 0 : 1;
}

if (import.meta.main) process.exit(await main(process.argv.slice(2)));
