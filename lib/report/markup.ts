/**
 * HTML from values of others: whatever is put in is escaped, unless it is markup of our own. Pure.
 */
import { isObject } from "../json.ts";
import { formatCount } from "./quantity.ts";
import { asciiJson, visibleText } from "./table.ts";

/** HTML, style or script of our own, which needs no escaping. */
export type Markup = { markup: string };

/** Says that a text is of our own. */
export const trusted = (markup: string): Markup => ({ markup });

const entities: Record<string, string> = {
  "&": "amp",
  "<": "lt",
  ">": "gt",
  '"': "quot",
  "'": "#39",
};

/** A value as HTML. Those of attributes must stand in double quotes. */
export function toMarkup(value: unknown): string {
  if (isObject(value)) return String(value["markup"]);
  return String(value).replace(/[&<>"']/g, (char) => `&${entities[char]};`);
}

/** Markup from a template of our own: texts become visible and are escaped, counts have commas. */
export function html(parts: TemplateStringsArray, ...values: (string | number | Markup)[]): Markup {
  const shown = values.map((one) => {
    if (typeof one === "number") return formatCount(one);
    return toMarkup(typeof one === "string" ? visibleText(one) : one);
  });
  return trusted(parts.map((part, i) => part + (shown[i] ?? "")).join(""));
}

/**
 * JSON for a `<script type="application/json">`: no `<` that could end it, and no character that
 * a parser could take for the end of a line.
 */
export function scriptJson(value: unknown): Markup {
  return trusted(asciiJson(JSON.stringify(value)).replaceAll("<", "\\u003c"));
}
