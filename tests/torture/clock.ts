/** A clock that tests set, for the compiled program: Debian's libfaketime. */
import { renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { findFaketime } from "../needs.ts";

/** A clock of its own: so many seconds ahead of everybody's, or behind. */
export interface Clock {
  /** Variables for a process that goes by it. Time that passes passes for it as well. */
  env: Record<string, string>;
  set: (seconds: number) => void;
  /** A line of shell that sets it, for a plugin. */
  line: (seconds: number) => string;
}

/** Makes a clock that is right. @throws Error where libfaketime is missing */
export function makeClock(dir: string): Clock {
  const faketime = findFaketime();
  if (faketime === undefined) throw new Error("not installed: libfaketime");
  const file = join(dir, "clock");
  const text = (seconds: number) => `${seconds < 0 ? "-" : "+"}${Math.abs(seconds)}`;
  const clock: Clock = {
    env: {
      LD_PRELOAD: faketime,
      FAKETIME_TIMESTAMP_FILE: file,
      FAKETIME_NO_CACHE: "1",
      DONT_FAKE_MONOTONIC: "1",
    },
    // Renamed, so that no reader finds half of it.
    set: (seconds) => {
      writeFileSync(`${file}.new`, `${text(seconds)}\n`);
      renameSync(`${file}.new`, file);
    },
    line: (seconds) => `echo ${text(seconds)} > ${file}.new; mv ${file}.new ${file}`,
  };
  clock.set(0);
  return clock;
}
