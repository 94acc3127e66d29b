/**
 * How the node agent is: which of its parts make progress, and what went wrong so far. What probes
 * and metrics tell. Trouble of others (an API server that is away, a record that is locked) is
 * counted and is no lack of health: to start the agent anew would not end it.
 */

/** What is counted, from the start of the agent on. */
export type Trouble = "api" | "database" | "garbage" | "part";

/** The health of one agent. */
export interface Health {
  /** A part begins: until its first {@link beat} the agent is not ready. */
  begin(part: string): void;
  /** A part has gone round once, and will again within this time. */
  beat(part: string, withinMs?: number): void;
  /** A part ended with an error and is begun anew, after a pause. */
  failed(part: string, reason: string): void;
  /** Counts something that went wrong, so often. */
  count(what: Trouble, times?: number): void;
  counted(what: Trouble): number;
  /** What else a part tells, by name: gauges. */
  readonly figures: Map<string, number>;
  /** Why it is not healthy, a line for each part; none when it is. */
  reasons(): string[];
}

/** A part that says nothing for longer hangs, in ms; unless it said so itself. */
const silenceMsDefault = 60_000;

/** @param nowMs the monotonic clock */
export function openHealth(nowMs: () => number = () => performance.now()): Health {
  const parts = new Map<string, { beatMs: number; withinMs: number; reason: string }>();
  const counts = new Map<Trouble, number>();
  const set = (part: string, reason: string, withinMs = silenceMsDefault) =>
    void parts.set(part, { beatMs: nowMs(), withinMs, reason });
  return {
    begin: (part) => {
      if (!parts.has(part)) set(part, "it has not gone round yet");
    },
    beat: (part, withinMs) => set(part, "", withinMs),
    failed: (part, reason) => set(part, reason),
    count: (what, times = 1) => void counts.set(what, (counts.get(what) ?? 0) + times),
    counted: (what) => counts.get(what) ?? 0,
    figures: new Map(),
    reasons: () =>
      [...parts].flatMap(([part, { beatMs, withinMs, reason }]) => {
        if (reason !== "") return [`${part}: ${reason}`];
        const silentMs = nowMs() - beatMs;
        return silentMs > withinMs ? [`${part}: silent for ${Math.round(silentMs / 1000)} s`] : [];
      }),
  };
}
