/** Processes that carry a mark in their environment, which genie hands on to its delegates. */
import { readdirSync, readFileSync } from "node:fs";

/** A mark nobody else has. */
export function newMark(): Record<string, string> {
  return { GENIE_TORTURE: crypto.randomUUID() };
}

/** The living processes with a mark; a zombie has no environment any more. */
export function marked(mark: Record<string, string>): number[] {
  const [line = "none"] = Object.entries(mark).map((pair) => pair.join("="));
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => pid !== process.pid && environment(pid).includes(line));
}

/** Ends all of them but one, and returns how many those were. */
export function endMarked(mark: Record<string, string>, but?: number): number {
  const found = marked(mark).filter((pid) => pid !== but);
  for (const pid of found) {
    try {
      process.kill(pid, "SIGKILL");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
    }
  }
  return found.length;
}

function environment(pid: number): string[] {
  try {
    return readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return []; // It ended meanwhile.
  }
}
