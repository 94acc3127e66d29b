/**
 * Where the time of one call goes: with `GENIE_TRACE=1` one JSON line of stage → µs on stderr.
 * Off, a mark costs one comparison.
 */

let marks: [stage: string, atNs: number][] | undefined;

/** Begins tracing; `sinceNs` is when the process began its own code. */
export function startTrace(sinceNs: number): void {
  marks = [["start", sinceNs]];
}

/** Marks the end of a stage. Stages with one name are added up. */
export function mark(stage: string): void {
  marks?.push([stage, Bun.nanoseconds()]);
}

/** The line to print, or undefined where nothing was traced. */
export function formatTrace(): string | undefined {
  if (!marks) return undefined;
  const stages: Record<string, number> = {};
  marks.forEach(([stage, atNs], i) => {
    const before = marks?.[i - 1];
    if (before) stages[stage] = (stages[stage] ?? 0) + Math.round((atNs - before[1]) / 1000);
  });
  return JSON.stringify({ genieTraceUs: stages });
}
