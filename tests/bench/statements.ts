/**
 * Preloaded into genie run from source (`bun --preload`): appends each SQL statement, when it is
 * executed, as a line to the file that GENIE_STATEMENTS names. The compiled program is left alone.
 */
import { Database, type Statement } from "bun:sqlite";
import { appendFileSync } from "node:fs";

const file = process.env["GENIE_STATEMENTS"] ?? "";

/** A text may hold several; none of ours has a semicolon within a literal. */
function note(sql: string): void {
  const statements = sql.split(";").map((one) => one.replace(/\s+/g, " ").trim());
  for (const one of statements) if (one !== "") appendFileSync(file, `${one}\n`);
}

/** Makes a function note a text before it does what it did. */
function noting<F extends (...words: never[]) => unknown>(
  original: F,
  textOf: (words: Parameters<F>) => string,
): F {
  return function (this: unknown, ...words: Parameters<F>) {
    note(textOf(words));
    return original.apply(this, words);
  } as F;
}

const { prototype } = Database;
for (const name of ["run", "exec"] as const) {
  prototype[name] = noting(prototype[name], ([sql]) => sql);
}

/** Each is wrapped once: `query` hands out the one it has made before. */
const wrapped = new WeakSet<object>();
const methods = ["run", "get", "all", "values", "raw", "iterate"] as const;

for (const name of ["prepare", "query"] as const) {
  const original = prototype[name];
  Object.assign(prototype, {
    [name](this: Database, sql: string, ...words: []): Statement {
      const statement: Statement = original.call(this, sql, ...words);
      if (wrapped.has(statement)) return statement;
      wrapped.add(statement);
      for (const method of methods) {
        Object.assign(statement, { [method]: noting(statement[method], () => sql) });
      }
      return statement;
    },
  });
}
