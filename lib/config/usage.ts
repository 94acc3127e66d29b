/** The words of a command line as commands get them, and durations as people write them. Pure. */

/** Used wrongly: exit status 2 and a hint where to read on. */
export class UsageError extends Error {}

/** Options by name; `words` holds what stands there without an option. */
export type Flags = Record<string, string | boolean | string[] | undefined>;

/** The value of an option that takes one; undefined when it was not given. */
export function text(flags: Flags, name: string): string | undefined {
  const value = flags[name];
  return typeof value === "string" ? value : undefined;
}

const unitsMs = new Map(Object.entries({ ms: 1, s: 1000, m: 60_000, h: 3600_000, d: 86400_000 }));

/** Milliseconds of "250ms", "90s", "5m", "1h" or "30d"; undefined for anything else and for 0. */
export function parseDuration(text: string): number | undefined {
  const [, count, unit = ""] = /^(\d{1,9})(ms|s|m|h|d)$/.exec(text) ?? [];
  return Number(count) * (unitsMs.get(unit) ?? 0) || undefined;
}
