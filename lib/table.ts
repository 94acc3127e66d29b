/** Tables for a terminal: aligned, and never wider than it. Pure: rows in, text out. */

/** One column. */
export interface Column {
  title: string;
  /** Numbers stand right. */
  align?: "left" | "right";
  /** Gives way first when the terminal is narrow; at least one column should. */
  shrinks?: boolean;
}

/** Narrowest a shrinking column becomes. */
const columnWidthMin = 8;
const gap = "  ";

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
      .map((column, i) => fit(cells[i] ?? "", widths[i] ?? 0, column.align ?? "left"))
      .join(gap)
      .trimEnd();
  return `${[columns.map(({ title }) => title), ...clean].map(line).join("\n")}\n`;
}

/** Takes from the widest shrinking column until the line fits. */
function shrink(widths: number[], columns: Column[], width: number): void {
  for (;;) {
    const total = widths.reduce((sum, one) => sum + one, gap.length * (widths.length - 1));
    if (total <= width) return;
    let widest = -1;
    columns.forEach(({ shrinks }, i) => {
      if (shrinks && (widths[i] ?? 0) > (widths[widest] ?? columnWidthMin)) widest = i;
    });
    if (widest < 0) return;
    widths[widest] = Math.max(columnWidthMin, (widths[widest] ?? 0) - (total - width));
  }
}

function fit(text: string, width: number, align: "left" | "right"): string {
  const cut = displayWidth(text) > width ? `${cutTo(text, width - 1)}…` : text;
  const pad = " ".repeat(Math.max(0, width - displayWidth(cut)));
  return align === "right" ? pad + cut : cut + pad;
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
