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

/** ` Did you mean "..."?` for a word that is nearly one of these; "" for any other. */
export function didYouMean(word: string, known: Iterable<string>): string {
  let best = "";
  let least = Math.max(1, Math.floor(word.length / 3)) + 1;
  for (const one of known) {
    const distance = distanceOf(word, one);
    if (distance < least) [best, least] = [one, distance];
  }
  return best === "" ? "" : `. Did you mean "${best}"?`;
}

/** How many letters to add, take away, change or swap with the next: Damerau and Levenshtein. */
function distanceOf(a: string, b: string): number {
  if (Math.abs(a.length - b.length) > a.length) return a.length + b.length;
  let [before, last]: number[][] = [[], Array.from({ length: b.length + 1 }, (_, j) => j)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const isSame = a[i - 1] === b[j - 1];
      const change = (last?.[j - 1] ?? 0) + (isSame ? 0 : 1);
      row[j] = Math.min((last?.[j] ?? 0) + 1, (row[j - 1] ?? 0) + 1, change);
      const isSwap = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      if (isSwap) row[j] = Math.min(row[j] ?? 0, (before?.[j - 2] ?? 0) + 1);
    }
    [before, last] = [last, row];
  }
  return last?.[b.length] ?? 0;
}

/** The words of a command line that belong to no option. */
export function wordsOf(flags: Flags): string[] {
  return Array.isArray(flags["words"]) ? flags["words"] : [];
}

/** A pod as a command line names it; what it leaves open is undefined. */
export type AskedPod = Record<"namespace" | "name", string | undefined>;

/**
 * The pod that is meant: by a word or `--pod`, as NAMESPACE/POD or as POD, the namespace then by
 * `--namespace` where it is given.
 * @throws UsageError for anything else, and where it is said twice
 */
export function askedPod(flags: Flags, words = wordsOf(flags)): AskedPod {
  const [namespace, pod] = [text(flags, "namespace"), text(flags, "pod")];
  const [word, ...more] = words;
  if (word !== undefined && pod !== undefined) {
    throw new UsageError(`The pod is named twice: ${word}, and --pod ${pod}`);
  }
  const given = word ?? pod;
  const parts = given?.split("/") ?? [];
  if (parts.length > 2 || parts.includes("") || more.length > 0) {
    throw new UsageError(`Invalid pod "${[given, ...more].join(" ")}": expected NAMESPACE/POD`);
  }
  const [first, second] = parts;
  if (second === undefined) return { namespace, name: first };
  if (namespace !== undefined && namespace !== first) {
    throw new UsageError(`Pod ${given} is not in namespace ${namespace}: leave one of them out`);
  }
  return { namespace: first, name: second };
}

/** The one pod that is meant, as {@link askedPod}. @throws UsageError where a part is missing */
export function namedPod(flags: Flags, words = wordsOf(flags)) {
  const { namespace, name } = askedPod(flags, words);
  if (namespace !== undefined && name !== undefined) return { namespace, name };
  const why = name === undefined ? "No pod is named" : `Pod "${name}" has no namespace`;
  throw new UsageError(`${why}: expected NAMESPACE/POD`);
}

const unitsMs = new Map(Object.entries({ ms: 1, s: 1000, m: 60_000, h: 3600_000, d: 86400_000 }));

/** Milliseconds of "250ms", "90s", "5m", "1h" or "30d"; undefined for anything else and for 0. */
export function parseDuration(text: string): number | undefined {
  const [, count, unit = ""] = /^(\d{1,9})(ms|s|m|h|d)$/.exec(text) ?? [];
  return Number(count) * (unitsMs.get(unit) ?? 0) || undefined;
}
