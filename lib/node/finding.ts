/** What `genie doctor` finds: one line each, and what to do about it. Pure. */

/** One thing that was looked at. */
export interface Finding {
  check: string;
  verdict: "ok" | "warning" | "problem";
  detail: string;
  /** What to do; "" for what is in order. */
  remedy: string;
}

/** What a check says; its name comes with the table of checks. */
export type Said = Omit<Finding, "check">;

/** It is as it should be. */
export function ok(detail: string): Said {
  return { verdict: "ok", detail, remedy: "" };
}

/** It works, and may not tomorrow. */
export function warning(detail: string, remedy: string): Said {
  return { verdict: "warning", detail, remedy };
}

/** Pods fail, or get what they should not, until it is put right. */
export function problem(detail: string, remedy: string): Said {
  return { verdict: "problem", detail, remedy };
}
