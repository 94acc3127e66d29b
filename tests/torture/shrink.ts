/** Makes a failing input smaller, so that what is printed is what matters. */
import type { Input } from "./inputs.ts";

/** Does the input still fail in the same way? */
type Fails = (input: Input) => Promise<boolean>;

/** How often an input is tried again while it is made smaller. */
const triesMax = 300;

/**
 * Takes away whatever is not needed to fail: first whole files, rows and variables, then halves,
 * quarters, ... of every text.
 */
export async function shrink(input: Input, fails: Fails): Promise<Input> {
  let best = input;
  let tries = 0;
  const keep = async (candidate: Input): Promise<boolean> => {
    if (tries++ >= triesMax || !(await fails(candidate))) return false;
    best = candidate;
    return true;
  };
  for (const field of ["files", "objects", "answers", "env"] as const) {
    for (const name of Object.keys(best[field])) {
      const { [name]: _, ...rest } = best[field] as Record<string, never>;
      await keep({ ...best, [field]: rest });
    }
  }
  for (const row of best.rows) {
    await keep({ ...best, rows: best.rows.filter((other) => other !== row) });
  }
  await shorten(best.stdin, (stdin) => keep({ ...best, stdin }));
  await shorten(best.table, (table) => keep({ ...best, table }));
  for (const field of ["env", "files", "objects"] as const) {
    for (const [name, text] of Object.entries(best[field])) {
      await shorten(text, (shorter) =>
        keep({ ...best, [field]: { ...best[field], [name]: shorter } }),
      );
    }
  }
  for (const [command, one] of Object.entries(best.answers)) {
    await shorten(one.stdout, (stdout) =>
      keep({ ...best, answers: { ...best.answers, [command]: { ...one, stdout } } }),
    );
  }
  return best;
}

async function shorten(text: string, keep: (shorter: string) => Promise<boolean>): Promise<void> {
  let left = text;
  for (let size = Math.ceil(left.length / 2); size >= 1; size = Math.floor(size / 2)) {
    for (let at = 0; at < left.length; ) {
      const shorter = left.slice(0, at) + left.slice(at + size);
      if (await keep(shorter)) left = shorter;
      else at += size;
    }
  }
}
