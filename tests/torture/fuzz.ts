/**
 * Fuzzing: whatever comes from others, changed in every way, through the entry inside this process
 * and for a sample through the compiled program. Each time there is one well-formed answer with a
 * listed code, in time, on stdout alone, that tells no secret; every result is what the
 * specification says, and what was attached is deleted.
 */
import { type Input, makeInput } from "./inputs.ts";
import { type Case, type Part, runCases } from "./part.ts";
import { randomOf } from "./seed.ts";
import { shrink } from "./shrink.ts";
import { leftOn, makeStage, runInput, type Stage } from "./stage.ts";

/** Every so many inputs go through the program. */
const programEvery = { short: 160, full: 330 };
/** What this process may grow by, in bytes. */
const growthMax = 600 * 1024 * 1024;
/** Longest input that is printed, in characters. */
const printedMax = 8000;

/** The part of the bench. */
export const fuzz: Part = {
  title: "changed inputs of every kind: one well-formed answer, and nothing left",
  needs: [],
  limitSeconds: { short: 90, full: 3000 },
  run: async (options) => {
    const stages = new Map<number, Stage>();
    const before = process.memoryUsage.rss();
    const every = options.short ? programEvery.short : programEvery.full;
    try {
      const cases = { short: 5000, full: 100_000, workers: 4 };
      const outcome = await runCases(options, cases, async (one) => {
        const stage = stages.get(one.worker) ?? makeStage();
        stages.set(one.worker, stage);
        await runCase(stage, one, one.index % every === every - 1);
      });
      const rest = [...stages.values()].flatMap(leftOn);
      Bun.gc(true);
      const growth = process.memoryUsage.rss() - before;
      const fail = (what: string) => outcome.failures.push({ seed: options.seed, what });
      if (rest.length > 0) fail(`left on record in the end: ${rest.join(", ")}`);
      if (growth > growthMax) fail(`this process has grown by ${growth} bytes`);
      outcome.counts["MiB grown"] = Math.round(growth / 1024 / 1024);
      return outcome;
    } finally {
      for (const stage of stages.values()) stage[Symbol.dispose]();
    }
  },
};

async function runCase(stage: Stage, { seed, count }: Case, program: boolean): Promise<void> {
  const input = makeInput(randomOf(seed), `fz${seed}`);
  try {
    const ended = await runInput(stage, input, program);
    count(`${input.kind} ${ended}`);
    if (program) count("through the program");
  } catch (error) {
    throw new Error(await describe(stage, input, program, error), { cause: error });
  }
}

/** What failed, and the smallest input that fails so. */
async function describe(
  stage: Stage,
  input: Input,
  program: boolean,
  error: unknown,
): Promise<string> {
  const kindOf = (one: unknown) => String(one).replace(/\d+/g, "0").slice(0, 60);
  const smaller = await shrink(input, (candidate) =>
    runInput(stage, candidate, program).then(
      () => false,
      (again: unknown) => kindOf(again) === kindOf(error),
    ),
  );
  const said = error instanceof Error ? error.message : String(error);
  const through = program ? " through the program" : "";
  return `${input.kind}${through}: ${said}\n${JSON.stringify(smaller).slice(0, printedMax)}`;
}
