/**
 * The custom resources (lib/cluster/crds.yaml): what their schemas refuse and let pass; and YAML
 * (lib/cluster/yaml.ts) as kubectl reads it.
 */
import { describe, expect, test } from "bun:test";
import { customResourceDefinitions as documents } from "../lib/cluster/manifest.ts";
import { comment, fillTemplate, toYaml } from "../lib/cluster/yaml.ts";
import { isObject } from "../lib/json.ts";
import { lacks } from "./skip.ts";

/** A structural OpenAPI v3 schema, as far as these manifests use it. */
interface Schema {
  type: "object" | "string" | "boolean";
  description?: string;
  properties?: Readonly<Record<string, Schema>>;
  required?: readonly string[];
  maxLength?: number;
  pattern?: string;
  /** CEL rules; `self` is the value of the schema. */
  "x-kubernetes-validations"?: readonly { rule: string; message: string }[];
}

/** A CustomResourceDefinition with its one version. */
interface CustomResourceDefinition {
  metadata: { name: string; annotations: Readonly<Record<string, string>> };
  spec: {
    group: string;
    names: {
      plural: string;
      singular: string;
      kind: string;
      listKind: string;
      shortNames?: readonly string[];
    };
    versions: readonly {
      storage: true;
      schema: { openAPIV3Schema: Schema };
      additionalPrinterColumns: readonly { name: string; jsonPath: string }[];
    }[];
  };
}

const customResourceDefinitions = documents as unknown as readonly CustomResourceDefinition[];
const byKind = new Map(customResourceDefinitions.map((one) => [one.spec.names.kind, one]));

/** The schema of a kind. */
function schemaOf(kind: string): Schema {
  const schema = byKind.get(kind)?.spec.versions[0]?.schema.openAPIV3Schema;
  if (schema === undefined) throw new Error(`No CustomResourceDefinition of ${kind}`);
  return schema;
}

/** Every schema in a schema, itself included, with its path. */
function schemasIn(schema: Schema, path = "self"): [string, Schema][] {
  const below = Object.entries(schema.properties ?? {});
  return [[path, schema], ...below.flatMap(([key, one]) => schemasIn(one, `${path}.${key}`))];
}

/**
 * Evaluates a rule in the little of CEL that these manifests use, which JavaScript nearly is:
 * `has(a.b)` and a few methods are translated, what else it names is refused.
 */
function evaluate(rule: string, self: unknown): unknown {
  const strings: string[] = [];
  const bare = rule.replace(/'([^'\\]*)'/g, (_, text) => `#${strings.push(text) - 1}#`);
  const tokens = bare.match(/[A-Za-z_]\w*|#\d+#|&&|\|\||[!=]=|\S/g) ?? [];
  const known = /^(self|has|trim|startsWith|endsWith|matches|#\d+#|&&|\|\||==|!=|[().!])$/;
  const fields = new Set(bare.match(/(?<=self\.)(?!trim|startsWith|endsWith|matches)\w+/g));
  const strange = tokens.filter((token) => !known.test(token) && !fields.has(token));
  if (strange.length > 0) throw new Error(`Not in our CEL: ${strange.join(" ")} in ${rule}`);
  const script = bare
    .replace(/has\((self\.\w+)\)/g, "($1 !== undefined)")
    .replace(/([\w.]+)\.matches\((#\d+#)\)/g, "new RegExp($2).test($1)")
    .replace(/#(\d+)#/g, (_, index) => JSON.stringify(strings[Number(index)]));
  return new Function("self", `"use strict"; return (${script});`)(self);
}

/** What the API server would say of an object; unknown keys are pruned, so they are no issue. */
function issues(schema: Schema, value: unknown, path = "self"): string[] {
  const type = isObject(value) ? "object" : typeof value;
  if (type !== schema.type) return [`${path}: expected ${schema.type}, got ${type}`];
  const found: string[] = [];
  if (isObject(value)) {
    for (const key of schema.required ?? []) {
      if (value[key] === undefined) found.push(`${path}.${key}: required`);
    }
    for (const [key, one] of Object.entries(schema.properties ?? {})) {
      if (value[key] !== undefined) found.push(...issues(one, value[key], `${path}.${key}`));
    }
  }
  if (typeof value === "string") {
    if (value.length > (schema.maxLength ?? Infinity)) found.push(`${path}: too long`);
    if (!new RegExp(schema.pattern ?? "").test(value)) found.push(`${path}: pattern`);
  }
  // As the API server does: rules are not evaluated on what has the wrong shape.
  if (found.length > 0) return found;
  for (const { rule, message } of schema["x-kubernetes-validations"] ?? []) {
    const verdict = evaluate(rule, value);
    if (typeof verdict !== "boolean") found.push(`${path}: ${rule} gives ${verdict}`);
    else if (!verdict) found.push(`${path}: ${message}`);
  }
  return found;
}

/** The keywords of a structural schema (apiextensions.k8s.io/v1) that we use. */
const keywords = new Set([
  "type",
  "description",
  "properties",
  "required",
  "maxLength",
  "pattern",
  "x-kubernetes-validations",
]);

describe.each(customResourceDefinitions.map((one) => [one.spec.names.kind, one] as const))(
  "%s",
  (kind, { metadata, spec }) => {
    const schema = schemaOf(kind);

    test("is named as Kubernetes demands", () => {
      const { plural, singular, listKind, shortNames = [] } = spec.names;
      expect(metadata.name).toBe(`${plural}.${spec.group}`);
      expect(singular.replaceAll("-", "")).toBe(kind.toLowerCase());
      expect(listKind).toBe(`${kind}List`);
      for (const name of [plural, singular, ...shortNames]) expect(name).toMatch(/^[a-z][a-z-]*$/);
      expect(metadata.annotations["api-approved.kubernetes.io"]).toBe("unapproved, experimental");
      expect(spec.versions.filter(({ storage }) => storage)).toHaveLength(1);
    });

    test("has a structural schema: every value has a type, and known keywords only", () => {
      expect(schema.type).toBe("object");
      for (const [path, one] of schemasIn(schema)) {
        const strange = Object.keys(one).filter((key) => !keywords.has(key));
        expect([path, strange, typeof one.type]).toEqual([path, [], "string"]);
        expect([path, one.type === "object" || !one.properties]).toEqual([path, true]);
        for (const key of one.required ?? []) expect(one.properties).toHaveProperty(key);
      }
    });

    test("restricts of metadata only what may be restricted", () => {
      const { metadata: schemaOfMetadata } = schema.properties ?? {};
      const { properties = {}, ...rest } = schemaOfMetadata ?? { type: "string" };
      expect(rest).toEqual({ type: "object" });
      expect(["", "name"]).toContain(Object.keys(properties).join());
    });

    test("bounds every string, and explains every key of its spec", () => {
      for (const [path, one] of schemasIn(schema)) {
        if (!path.startsWith("self.spec.")) continue;
        expect([path, Boolean(one.description)]).toEqual([path, true]);
        if (one.type === "string")
          expect([path, one.maxLength]).toEqual([path, expect.any(Number)]);
      }
    });

    test("has rules that can be evaluated and say in one line what is wrong", () => {
      for (const [path, one] of schemasIn(schema)) {
        for (const { rule, message } of one["x-kubernetes-validations"] ?? []) {
          const verdict = evaluate(rule, one.type === "object" ? {} : "");
          expect([path, typeof verdict]).toEqual([path, "boolean"]);
          expect(message).toMatch(/^[a-z][^\n]{10,}[^.]$/);
        }
      }
    });

    test("shows columns that exist", () => {
      const paths = new Set(schemasIn(schema, "").map(([path]) => path));
      for (const { name, jsonPath } of spec.versions[0]?.additionalPrinterColumns ?? []) {
        const exists = name === "Age" || paths.has(jsonPath);
        expect([name, exists]).toEqual([name, true]);
      }
    });
  },
);

/** CNI-Genie's sampleyamls, last lines of the config indented for YAML 1.2; its `sharedStaus`. */
const samples = `
apiVersion: "k8s.cni.cncf.io/v1"
kind: NetworkAttachmentDefinition
metadata:
  name: weave
  namespace: network
---
apiVersion: "k8s.cni.cncf.io/v1"
kind: NetworkAttachmentDefinition
metadata:
  name: weavenet
spec:
  config: '{
    "cniVersion": "0.3.0",
    "plugins": [
        { "name": "weave", "type": "weave-net", "hairpinMode": true },
        { "type": "portmap", "capabilities": {"portMappings": true}, "snat": true }
    ]
    }
    '
---
apiVersion: alpha.network.k8s.io/v1
kind: Logicalnetwork
metadata: { name: net1, namespace: default }
spec:
  physicalNet: "phynet1"
  sub_subnet: "10.32.0.0/24"
---
apiVersion: alpha.network.k8s.io/v1
kind: Logicalnetwork
metadata: { name: net2, namespace: default }
spec:
  physicalNet: "phynet2"
  plugin: "flannel"
  sub_subnet: "10.244.0.0/24"
---
apiVersion: alpha.network.k8s.io/v1
kind: Physicalnetwork
metadata: { name: phynet1, namespace: default }
spec:
  refer_nic: eth0
  sharedStatus:
    dedicatedNet: true
    plugin: weave
    subnet: "10.32.0.0/16"
---
apiVersion: alpha.network.k8s.io/v1
kind: Physicalnetwork
metadata: { name: phynet2, namespace: default }
spec:
  refer_nic: eth1
  sharedStaus:
    dedicatedNet: false
`;

test("CNI-Genie's sample objects are valid", () => {
  const objects = Bun.YAML.parse(samples) as { kind: string }[];
  expect(objects).toHaveLength(6);
  for (const object of objects) expect(issues(schemaOf(object.kind), object)).toEqual([]);
});

/** An object of a kind with this spec. */
const object = (spec: unknown, name = "net1") => ({ metadata: { name, namespace: "a" }, spec });

describe("valid", () => {
  test.each<[string, unknown]>([
    ["NetworkAttachmentDefinition", {}],
    ["NetworkAttachmentDefinition", { config: "" }],
    ["NetworkAttachmentDefinition", { config: ' {"type":"bridge"}\n' }],
    ["Logicalnetwork", { plugin: "calico" }],
    ["Logicalnetwork", { plugin: "calico", physicalNet: "", sub_subnet: "" }],
    ["Logicalnetwork", { plugin: "10-my_net.v2", sub_subnet: "fd00:32::/64" }],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "::/0" }],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "255.255.255.255/32" }],
    ["Physicalnetwork", {}],
    ["Physicalnetwork", { refer_nic: "bond0.100" }],
    ["Physicalnetwork", { sharedStatus: { dedicatedNet: false, plugin: "" } }],
    ["Physicalnetwork", { sharedStatus: { dedicatedNet: true, plugin: "weave" } }],
  ])("%s %j", (kind, spec) => {
    expect(issues(schemaOf(kind), object(spec))).toEqual([]);
  });
});

describe("invalid", () => {
  const noSubnet = "must be a subnet such as 10.32.0.0/24 or fd00:32::/64";
  const needsPlugin = "a logical network without physicalNet needs plugin";
  const dedicated = "self.spec.sharedStatus: a dedicated physical network needs plugin";
  const noObject = "config must be a JSON object, a CNI network config or config list";
  test.each<[string, unknown, string]>([
    ["NetworkAttachmentDefinition", { config: 1 }, "expected string, got number"],
    ["NetworkAttachmentDefinition", { config: "type: bridge" }, noObject],
    ["NetworkAttachmentDefinition", { config: "[]" }, noObject],
    ["NetworkAttachmentDefinition", { config: `{${" ".repeat(262144)}}` }, "too long"],
    ["Logicalnetwork", {}, needsPlugin],
    ["Logicalnetwork", { physicalNet: "", plugin: "" }, needsPlugin],
    ["Logicalnetwork", { sub_subnet: "10.0.0.0/8" }, needsPlugin],
    ["Logicalnetwork", { plugin: "../calico" }, "self.spec.plugin: pattern"],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "10.32.0.0" }, noSubnet],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "10.32.0.256/24" }, noSubnet],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "10.32.0.0/33" }, noSubnet],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "fd00::/129" }, noSubnet],
    ["Logicalnetwork", { plugin: "a", sub_subnet: "10.32.0.0/24\n" }, noSubnet],
    ["Physicalnetwork", { refer_nic: "an-interface-too-long" }, "too long"],
    ["Physicalnetwork", { refer_nic: "eth0/1" }, "self.spec.refer_nic: pattern"],
    ["Physicalnetwork", { refer_nic: "eth 0" }, "self.spec.refer_nic: pattern"],
    ["Physicalnetwork", { sharedStatus: { dedicatedNet: true } }, dedicated],
    ["Physicalnetwork", { sharedStatus: { dedicatedNet: true, plugin: "" } }, dedicated],
    ["Physicalnetwork", { sharedStatus: { dedicatedNet: "yes" } }, "expected boolean, got string"],
    ["Physicalnetwork", { sharedStatus: { subnet: "all" } }, noSubnet],
  ])("%s %.60j: %s", (kind, spec, issue) => {
    expect(issues(schemaOf(kind), object(spec)).join()).toContain(issue);
  });

  test.each(["Logicalnetwork", "Physicalnetwork"])("%s without spec, with a long name", (kind) => {
    const { spec: _, ...bare } = object({}, "n".repeat(64));
    expect(issues(schemaOf(kind), bare)).toEqual([
      "self.spec: required",
      "self.metadata.name: too long",
    ]);
  });
});

describe("toYaml()", () => {
  test("round-trips the manifests, one document each", () => {
    const text = toYaml(customResourceDefinitions);
    expect(Bun.YAML.parse(text)).toEqual(JSON.parse(JSON.stringify(customResourceDefinitions)));
    expect(text.match(/^---$/gm)).toHaveLength(customResourceDefinitions.length);
  });

  /** What YAML 1.1 or 1.2 takes for something else when it is bare, and what breaks lines. */
  const hostile =
    "yes|No|on|OFF|y|n|true|False|null|~||1|-1|1.5|.5|1e3|0x1F|0o17|017|1_000|12:30:45|" +
    "2024-01-01|.inf|.NaN|=|<<|-|?|: |a: b|a:|a #b|#a|!a|%a|@a|`a|*a|&a|" +
    "{a|[a|]|,|'|\"|\\| lead|trail |" +
    "two\nlines|\ttab|\r|\0|\u007f|\u0085|\u2028|\ufeff|😀 ü|--- |...|a, b.|a/b (c)";
  const words = [...hostile.split("|"), "|", "> folded"];

  test("round-trips hostile strings as values, items and keys", () => {
    const value = { list: words, map: Object.fromEntries(words.map((word) => [word, word])) };
    expect(Bun.YAML.parse(toYaml([value]))).toEqual(value);
  });

  test("leaves bare only what every reader takes for a string", () => {
    const bare = words.filter((word) => !toYaml([[word]]).includes('"'));
    expect(bare).toEqual(["a, b.", "a/b (c)"]);
  });

  test("round-trips every shape of value", () => {
    const value = {
      empty: {},
      none: [],
      nested: [[1, [2, [], {}]], [{ a: [{ b: 1, c: [true, null] }] }], "x"],
      deep: { a: { b: { c: [{ d: "e" }] } } },
      numbers: [0, -1, 1.5, 1e21, 262144],
      nothing: null,
    };
    expect(Bun.YAML.parse(toYaml([value]))).toEqual(value);
  });

  test.each([
    ["lines", "a = 1\n\n# b\n  c: [\n", "one:\n  two: |\n    a = 1\n\n    # b\n      c: [\n"],
    ["an indented first line", "  a\nb\n", 'one:\n  two: "  a\\nb\\n"\n'],
    ["no end of line", "a\nb", 'one:\n  two: "a\\nb"\n'],
    ["empty lines at the end", "a\nb\n\n", 'one:\n  two: "a\\nb\\n\\n"\n'],
    ["a tab", "a\n\tb\n", 'one:\n  two: "a\\n\\tb\\n"\n'],
  ])("a text: %s", (_what, text, expected) => {
    const value = { one: { two: text } };
    expect(toYaml([value])).toBe(`---\n${expected}`);
    expect(Bun.YAML.parse(toYaml([value]))).toEqual(value);
  });

  test("writes comments, which are no part of the objects", () => {
    const value = { a: [{ [comment]: "why: one\nand two", b: 1 }], c: { [comment]: "x", d: [] } };
    const text = toYaml([value]);
    expect(text).toBe("---\na:\n  - # why: one\n    # and two\n    b: 1\nc:\n  # x\n  d: []\n");
    expect(Bun.YAML.parse(text)).toEqual({ a: [{ b: 1 }], c: { d: [] } });
  });

  test("leaves undefined out", () => {
    expect(toYaml([{ a: undefined, b: 1 }])).toBe("---\nb: 1\n");
  });

  test.skipIf(lacks("kubernetes-client"))("is read by kubectl as it was meant", () => {
    const command = ["kubectl", "annotate", "--local", "-f", "-", "-o", "json", "read=yes"];
    const stdin = Buffer.from(toYaml(customResourceDefinitions));
    const { stdout, stderr } = Bun.spawnSync(command, { stdin });
    expect(stderr.toString()).toBe("");
    const read = JSON.parse(`[${stdout.toString().replaceAll("\n}\n{", "\n},\n{")}]`);
    const meant = customResourceDefinitions.map(({ metadata, ...rest }) => ({
      ...rest,
      metadata: { ...metadata, annotations: { ...metadata.annotations, read: "yes" } },
    }));
    expect(read).toEqual(JSON.parse(JSON.stringify(meant)));
  });
});

describe("fillTemplate()", () => {
  test("fills values, items and texts; what is undefined is left out; comments stay", () => {
    const place = (name: string) => `\${${name}}`;
    const template =
      `# about the file\n---\na: ${place("a")}\nb: x-${place("b")}-y\nc: ${place("c")}\nd:\n` +
      `  - 1\n  - ${place("d")}\n---\ne:\n  # one ${place("b")}\n  # two\n  f: 1\n` +
      "g:\n  - # three\n    h: []\n";
    const objects = fillTemplate(template, { a: { k: place("b") }, b: "B", d: [2, 3] });
    expect(toYaml(objects)).toBe(
      `---\na:\n  k: ${JSON.stringify(place("b"))}\nb: x-B-y\nd:\n  - 1\n  - 2\n  - 3\n` +
        "---\ne:\n  # one B\n  # two\n  f: 1\ng:\n  - # three\n    h: []\n",
    );
  });

  test("gives back what toYaml() wrote", () => {
    const text = toYaml(documents);
    expect(toYaml(fillTemplate(text))).toBe(text);
  });
});
