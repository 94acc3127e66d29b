/** What `bun test` says of a run, in its JUnit report, and what people read of it. Pure. */
import { basename } from "node:path";
import { excusePrefix, reasonPrefix } from "./needs.ts";

/** One test file of a run. */
export interface FileOutcome {
  /** `kpi.test.ts`. */
  name: string;
  seconds: number;
  skipped: number;
  /** Why tests of it were skipped. */
  reasons: string[];
}

/** Reads a report. */
export function readReport(xml: string): FileOutcome[] {
  // Files stand at the second level, the `describe` blocks of each below it.
  const files = xml.split(/^ {2}<testsuite /m).slice(1);
  return files.map((text) => {
    const attribute = (name: string) => new RegExp(`\\b${name}="([^"]*)"`).exec(text)?.[1] ?? "";
    const names = [...text.matchAll(/<testcase name="([^"]*)"[^>]*>\s*<skipped/g)];
    const reasons = names
      .map(([, name = ""]) => plainText(name))
      .flatMap((name) => name.split(reasonPrefix)[1] ?? []);
    return {
      name: basename(attribute("file")),
      seconds: Number(attribute("time")),
      skipped: Number(attribute("skipped")),
      reasons: [...new Set(reasons)],
    };
  });
}

function plainText(text: string): string {
  const signs: Record<string, string> = { quot: '"', apos: "'", lt: "<", gt: ">", amp: "&" };
  return text.replace(/&(quot|apos|lt|gt|amp);/g, (_all, name: string) => signs[name] ?? "");
}

/** How many tests were skipped in files whose every reason is that something cannot be had. */
export function sumOfExcused(files: readonly FileOutcome[]): number {
  const isExcused = ({ reasons }: FileOutcome) =>
    reasons.length > 0 && reasons.every((one) => one.startsWith(excusePrefix));
  return files.filter(isExcused).reduce((sum, { skipped }) => sum + skipped, 0);
}

/** The files with skipped tests as a table, with the reasons; "" where there are none. */
export function formatSkipped(files: readonly FileOutcome[]): string {
  const rows = files
    .filter(({ skipped }) => skipped > 0)
    .sort((a, b) => a.name.localeCompare(b.name))
    .map(({ name, skipped, reasons }) => [
      name,
      String(skipped),
      reasons.join("; ") || "the file does not say why",
    ]);
  if (rows.length === 0) return "";
  const all = [["FILE", "SKIPPED", "WHY"], ...rows];
  const width = (column: number) => Math.max(...all.map((row) => row[column]?.length ?? 0));
  const lines = all.map(([name = "", skipped = "", why = ""]) =>
    [name.padEnd(width(0)), skipped.padStart(width(1)), why].join("  "),
  );
  return `${lines.join("\n")}\n`;
}

/** The files that took longest, in one line. */
export function formatSlowest(files: readonly FileOutcome[], count: number): string {
  const slowest = [...files].sort((a, b) => b.seconds - a.seconds).slice(0, count);
  const parts = slowest.map(({ name, seconds }) => `${name} ${seconds.toFixed(0)} s`);
  return `Slowest: ${parts.join(", ")}\n`;
}

/** `4 min 44 s`. */
export function formatSeconds(seconds: number): string {
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
