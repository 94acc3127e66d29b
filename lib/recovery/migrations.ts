/** The steps of migrations.sql, in order. */
import text from "./migrations.sql" with { type: "text" };

/** Each brings a database from one version to the next. */
export const migrations: readonly string[] = (text as string).split(/^-- STEP \d+$/m).slice(1);
