/** Numbers that look random and are the same in every run of one seed. */

/** A source of whole numbers: `random(6)` is one of 0 to 5. */
export type Random = (below: number) => number;

/** Makes a source from a seed of 32 bits (mulberry32). */
export function randomOf(seed: number): Random {
  let state = seed | 0;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  };
}

/** One of a list, each as likely as the others. @throws Error when there is none */
export function pick<T>(random: Random, from: readonly T[]): T {
  if (from.length === 0) throw new Error("Cannot pick from an empty list");
  return from[random(from.length)] as T;
}

/** True once in so many times. */
export const oneIn = (random: Random, times: number): boolean => random(times) === 0;

/** A seed nobody chose. */
export function newSeed(): number {
  return (crypto.getRandomValues(new Uint32Array(1))[0] ?? 1) >>> 1;
}
