/** The words of a command line, as commands get them. Pure. */

/** Used wrongly: exit status 2 and a hint where to read on. */
export class UsageError extends Error {}

/** Options by name; `words` holds what stands there without an option. */
export type Flags = Record<string, string | boolean | string[] | undefined>;

/** The value of an option that takes one; undefined when it was not given. */
export function text(flags: Flags, name: string): string | undefined {
  const value = flags[name];
  return typeof value === "string" ? value : undefined;
}
