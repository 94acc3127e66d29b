/** Numbers as people read them: counts, durations, rates, shares, times. Pure. */

/** A count in groups of three: `1,234,567`. Not Intl, which takes a millisecond to load. */
export function formatCount(count: number): string {
  return count.toFixed(0).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** A count and what is counted: `1 problem`, `3 problems`. */
export function plural(count: number, noun: string): string {
  return `${formatCount(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** Three digits, as in 1.23, 12.3 and 123. */
function threeDigits(value: number): string {
  return value.toFixed(value < 9.995 ? 2 : value < 99.95 ? 1 : 0);
}

/** A duration given in µs: `850µs`, `12.3ms`, `4.10s`, `2m05s`, `3h20m`; "–" for null. */
export function formatDuration(us: number | null): string {
  if (us === null) return "–";
  if (us < 999.5) return `${Math.round(us)}µs`;
  if (us < 999_500) return `${threeDigits(us / 1000)}ms`;
  if (us < 59_950_000) return `${threeDigits(us / 1_000_000)}s`;
  const seconds = Math.round(us / 1_000_000);
  const two = (value: number) => String(value).padStart(2, "0");
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m${two(seconds % 60)}s`;
  return `${Math.floor(seconds / 3600)}h${two(Math.floor((seconds % 3600) / 60))}m`;
}

/** Bytes per second: `512B/s`, `12.3MB/s`; "–" for null. */
export function formatRate(bytesPerSecond: number | null): string {
  if (bytesPerSecond === null) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytesPerSecond;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) {
    value /= 1000;
    unit++;
  }
  return `${unit === 0 ? Math.round(value) : threeDigits(value)}${units[unit]}/s`;
}

/** A share: `0%`, `<0.1%`, `1.2%`, `100%`; "–" of nothing. */
export function formatShare(part: number, whole: number): string {
  if (whole <= 0) return "–";
  if (part === 0) return "0%";
  const percent = (part / whole) * 100;
  if (percent < 0.1) return "<0.1%";
  if (percent > 99.9 && part < whole) return ">99.9%";
  return `${percent.toFixed(percent >= 99.95 ? 0 : 1)}%`;
}

/** A moment given as ISO 8601 in UTC: `2026-09-01 08:30:00`; "–" for none. */
export function formatTime(iso: string | null): string {
  return iso ? iso.slice(0, 19).replace("T", " ") : "–";
}

/** A moment as ISO 8601 in UTC; null when it is 0 or cannot be a date. */
export function isoTime(ms: number): string | null {
  return ms > 0 && ms < 253_402_300_800_000 ? new Date(ms).toISOString() : null;
}

/** How long ago something was, given in ms, in its largest unit: `40s`, `12m`, `3h`, `8d`. */
export function formatAge(ms: number): string {
  const units = [
    ["d", 86_400_000],
    ["h", 3_600_000],
    ["m", 60_000],
  ] as const;
  const [unit, size] = units.find(([, one]) => ms >= one) ?? ["s", 1000];
  return `${Math.max(0, Math.floor(ms / size))}${unit}`;
}

/** A whole span in words: `1 hour`, `30 days`; of a length that the units divide. */
export function formatSpan(ms: number): string {
  const units = { day: 86_400_000, hour: 3_600_000, minute: 60_000, second: 1000 };
  const fits = ([, unit]: [string, number]) => ms >= unit && ms % unit === 0;
  const [name, size] = Object.entries(units).find(fits) ?? ["ms", 1];
  const count = ms / size;
  return name === "ms" ? `${count} ms` : `${formatCount(count)} ${name}${count === 1 ? "" : "s"}`;
}
