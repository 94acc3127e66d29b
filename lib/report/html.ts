/** HTML as text: whatever is put into a template is escaped, unless it is markup already. Pure. */

/** HTML that may be put into other HTML as it is. */
export interface Markup {
  markup: string;
}

const entities: Record<string, string> = {
  "&": "&amp;",
  "<": "&lt;",
  ">": "&gt;",
  '"': "&quot;",
  "'": "&#39;",
};

/** What a template takes; a list is its parts one after the other. */
export type Value = string | number | Markup | readonly Value[];

function toMarkup(value: Value): string {
  if (typeof value === "number") return String(value);
  if (typeof value === "string") return value.replace(/[&<>"']/g, (char) => entities[char] ?? "");
  return "markup" in value ? value.markup : value.map(toMarkup).join("");
}

/** Template tag: ``html`<p>${name}</p>` ``. Attribute values must stand in double quotes. */
export function html(strings: TemplateStringsArray, ...values: readonly Value[]): Markup {
  const parts = strings.map((text, i) => {
    const value = values[i];
    return value === undefined ? text : text + toMarkup(value);
  });
  return { markup: parts.join("") };
}

/** Text that is HTML, style or script of our own. */
export function trusted(markup: string): Markup {
  return { markup };
}

/**
 * JSON for a `<script type="application/json">`: no `<` that could end it, and no character that
 * some parser takes for the end of a line.
 */
export function scriptJson(value: unknown): Markup {
  return { markup: asciiJson(JSON.stringify(value)).replaceAll("<", "\\u003c") };
}

/**
 * JSON whose control and invisible characters are escapes: it means the same, and can be shown on a
 * terminal.
 */
export function asciiJson(json: string): string {
  return json.replace(
    /[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}
