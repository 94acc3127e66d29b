/**
 * YAML, both ways: objects as documents for kubectl, and the YAML files of this folder as objects.
 * Both keep comments: an operator who reads the manifest may ask why.
 */
import { isObject } from "../json.ts";

/** An object of Kubernetes, as far as every object is alike. */
export interface KubeObject {
  apiVersion: string;
  kind: string;
  metadata: { name: string; namespace?: string; [key: string]: unknown };
  [key: string]: unknown;
}

/** Key of what is written as a comment above an object's keys; it is no part of the object. */
export const comment = Symbol("comment");

/**
 * Plain JSON values as YAML, one document each. Strings are quoted whenever a reader of YAML 1.1 or
 * 1.2 could take them for something else; Bun's own emitter leaves 1_000 and 2024-01-01 bare, which
 * kubectl reads as a number and a time.
 * @param objects the documents; keys with the value undefined are left out
 */
export function toYaml(objects: readonly object[]): string {
  return objects.map((value) => `---\n${block(value, "").join("\n")}\n`).join("");
}

/** A value as lines, each indented. Collections that are empty stand on one line. */
function block(value: unknown, indent: string): string[] {
  if (Array.isArray(value) && value.length > 0) {
    return value.flatMap((item) => {
      const [first = "", ...rest] = block(item, `${indent}  `);
      return [`${indent}- ${first.trimStart()}`, ...rest];
    });
  }
  const object: { [comment]?: string; [key: string]: unknown } = isObject(value) ? value : {};
  const entries = Object.entries(object).filter(([, one]) => one !== undefined);
  if (entries.length === 0) return [`${indent}${scalar(value)}`];
  const above = object[comment]?.split("\n").map((line) => `${indent}# ${line}`) ?? [];
  const keys = entries.flatMap(([key, one]) => {
    if (isText(one)) {
      const lines = one.slice(0, -1).split("\n");
      return [
        `${indent}${scalar(key)}: |`,
        ...lines.map((line) => (line === "" ? "" : `${indent}  ${line}`)),
      ];
    }
    const isNested = typeof one === "object" && one !== null && Object.keys(one).length > 0;
    const lines = block(one, isNested ? `${indent}  ` : "");
    return isNested
      ? [`${indent}${scalar(key)}:`, ...lines]
      : [`${indent}${scalar(key)}: ${lines.join("")}`];
  });
  return [...above, ...keys];
}

/** A text of whole lines that can stand as it is, for people to read. */
function isText(value: unknown): value is string {
  return typeof value === "string" && /^[!-~][ -~]*\n(([ -~]*\n)* *[!-~][ -~]*\n)?$/.test(value);
}

function scalar(value: unknown): string {
  if (Array.isArray(value)) return "[]";
  if (isObject(value)) return "{}";
  if (typeof value !== "string") return String(value);
  const isPlain = /^[A-Za-z][A-Za-z0-9_./()-]*(,? [A-Za-z0-9_./()-]+)*[,.]?$/.test(value);
  if (isPlain && !/^(y|n|yes|no|on|off|true|false|null)$/i.test(value)) return value;
  // JSON is YAML but for characters that YAML calls unprintable or a line's end.
  return JSON.stringify(value).replace(
    /[\u007f-\u009f\u2028\u2029\ufeff]/g,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/**
 * The objects of a template: YAML documents with placeholders. A value `${name}` becomes what
 * `values` has by that name, and leaves its key out when that is undefined; an item `${name}`
 * becomes the items of a list; within a longer text `${name}` becomes text. Comments above the keys
 * of an object stay, see {@link comment}. What stands before the first `---` is about the file.
 */
export function fillTemplate(template: string, values: Readonly<Record<string, unknown>> = {}) {
  const documents = template.slice(template.indexOf("---\n"));
  const keyed = documents.replace(
    /^( *(?:- )?)# (.*(?:\n *# .*)*)/gm,
    (_, indent, lines) => `${indent}"#": ${JSON.stringify(lines.replace(/\n *# /g, "\n"))}`,
  );
  return [Bun.YAML.parse(keyed)].flat().map((one) => fill(one, values) as KubeObject);
}

function fill(value: unknown, values: Readonly<Record<string, unknown>>): unknown {
  if (typeof value === "string") {
    const [, whole] = /^\$\{(\w+)\}$/.exec(value) ?? [];
    if (whole !== undefined) return values[whole];
    return value.replace(/\$\{(\w+)\}/g, (_, name) => String(values[name]));
  }
  if (Array.isArray(value)) return value.flatMap((item) => fill(item, values));
  if (!isObject(value)) return value;
  const { "#": above, ...rest } = value;
  const entries = Object.entries(rest).map(([key, one]) => [key, fill(one, values)]);
  return {
    ...(above !== undefined && { [comment]: fill(above, values) }),
    ...Object.fromEntries(entries),
  };
}
