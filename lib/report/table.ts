/** Tables for a terminal: aligned, and never wider than it. Pure: rows in, text out. */

/** One column. */
export interface Column {
  title: string;
  /** Numbers stand right. */
  align?: "left" | "right";
  /** Gives way when the terminal is narrow; at least one column should. */
  shrinks?: boolean;
  /** Gives way before all others: what does not fit stands whole below its row. */
  wraps?: boolean;
  /** Where a text is cut that does not fit: of a name with a random end both ends matter. */
  cut?: "end" | "middle";
}

/** Narrowest a shrinking column becomes. */
const columnWidthMin = 8;
const gap = "  ";
/** Lines below one row, at most. */
const belowMax = 12;

/**
 * Formats rows under their titles.
 *
 * @param width columns of the terminal; Infinity where it is none, then nothing is cut
 */
export function formatTable(columns: Column[], rows: string[][], width: number): string {
  const clean = rows.map((row) => row.map((cell) => printable(cell)));
  const widths = columns.map(({ title }, i) =>
    Math.max(displayWidth(title), ...clean.map((row) => displayWidth(row[i] ?? ""))),
  );
  shrink(widths, columns, width);
  const line = (cells: string[]): string =>
    columns
      .map((column, i) => fit(cells[i] ?? "", widths[i] ?? 0, column))
      .join(gap)
      .trimEnd();
  const isLong = (cell: string, i: number) =>
    columns[i]?.wraps === true && displayWidth(cell) > (widths[i] ?? 0);
  const lines = (cells: string[]): string[] => [
    line(cells.map((cell, i) => (isLong(cell, i) ? "" : cell))),
    ...cells.filter(isLong).flatMap((cell) => below(cell, width)),
  ];
  return `${[line(columns.map(({ title }) => title)), ...clean.flatMap(lines)].join("\n")}\n`;
}

/** Takes from what wraps, then from the widest shrinking columns alike, until the line fits. */
function shrink(widths: number[], columns: Column[], width: number): void {
  const total = widths.reduce((sum, one) => sum + one, gap.length * (widths.length - 1));
  const rest = takeFrom(widths, columns, total - width, ({ wraps = false }) => wraps);
  takeFrom(widths, columns, rest, ({ shrinks = false, wraps = false }) => shrinks && !wraps);
}

/** What wraps loses nothing, so its title alone must stand. */
function leastOf({ title, wraps = false }: Column): number {
  return wraps ? displayWidth(title) : columnWidthMin;
}

/** @returns what is still too much */
function takeFrom(
  widths: number[],
  columns: Column[],
  excess: number,
  isMeant: (column: Column) => boolean,
): number {
  const meant = widths.map((_, i) => i).filter((i) => isMeant(columns[i] as Column));
  for (let rest = excess; ; ) {
    if (rest <= 0) return 0;
    const [widest, second] = meant.toSorted((a, b) => (widths[b] ?? 0) - (widths[a] ?? 0) || b - a);
    const found = widths[widest ?? -1] ?? 0;
    const least = widest === undefined ? 0 : leastOf(columns[widest] as Column);
    if (widest === undefined || found <= least) return rest;
    const next = Math.max(least, widths[second ?? -1] ?? 0);
    const step = Math.max(1, Math.min(rest, found - next));
    widths[widest] = found - step;
    rest -= step;
  }
}

function fit(text: string, width: number, { align = "left", cut = "end" }: Column): string {
  const shown = displayWidth(text) > width ? cuts[cut](text, width) : text;
  const pad = " ".repeat(Math.max(0, width - displayWidth(shown)));
  return align === "right" ? pad + shown : shown + pad;
}

const cuts = {
  end: (text: string, width: number) => `${cutTo(text, width - 1)}…`,
  middle: (text: string, width: number) => {
    const tail = Math.floor((width - 1) / 2);
    const end = [...text].reverse().join("");
    return `${cutTo(text, width - 1 - tail)}…${[...cutTo(end, tail)].reverse().join("")}`;
  },
};

/** A text in lines as wide as the terminal, set in. */
function below(text: string, width: number): string[] {
  const room = Math.max(columnWidthMin, width - gap.length);
  const lines: string[] = [];
  let rest = text.trim();
  while (rest !== "" && lines.length < belowMax) {
    const most = cutTo(rest, room);
    const space = most.length < rest.length ? `${most}${rest[most.length]}`.lastIndexOf(" ") : -1;
    const part = space > 0 ? rest.slice(0, space) : most || [...rest][0] || "";
    rest = rest.slice(part.length).trimStart();
    const isCut = rest !== "" && lines.length === belowMax - 1;
    lines.push(gap + (isCut ? `${cutTo(part, room - 1)}…` : part));
  }
  return lines;
}

function cutTo(text: string, width: number): string {
  let kept = "";
  for (const char of text) {
    if (displayWidth(kept + char) > width) break;
    kept += char;
  }
  return kept;
}

/** Columns a text takes in a terminal. */
function displayWidth(text: string): number {
  return Bun.stringWidth(text);
}

/** Names come from others: no control character may reach the terminal. */
export function printable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must go
  return text.replace(/[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]/g, "�");
}
