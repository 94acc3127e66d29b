/** Fills templates in the manner of mustache(5): they have the words, the code the values. Pure. */
import { isObject } from "../json.ts";

/** What a template shows, by the names that stand in it. */
export type Values = { readonly [name: string]: unknown };

/**
 * Fills a template: `{{name}}` becomes what has that name; `{{#name}}` to `{{/name}}` stands once
 * for each item of a list, or once for anything else that is there, with the names in it before
 * those around it; `{{^name}}` to `{{/name}}` stands where nothing is there. Nothing is: undefined,
 * null, false, "" and an empty list. A tag on a line of its own takes its line with it. What is put
 * in is never read again.
 * @param show how a value becomes text, escaped where that is needed
 */
export function fill(
  template: string,
  values: Values,
  show: (value: unknown) => string = String,
): string {
  const places = /\{\{([#^])(\w+)\}\}(.*?)\{\{\/\2\}\}|\{\{(\w+)\}\}/gs;
  const tight = template.replace(/^(\{\{[#^/]\w+\}\})\n/gm, "$1");
  return tight.replace(places, (_, sign, part, inside, name) => {
    if (name !== undefined) return show(values[name] ?? "");
    const items = [values[part] ?? ""].flat().filter((one) => one !== "" && one !== false);
    if (sign === "^") return items.length === 0 ? fill(inside, values, show) : "";
    const within = (one: unknown) => (isObject(one) ? { ...values, ...one } : values);
    return items.map((one) => fill(inside, within(one), show)).join("");
  });
}
