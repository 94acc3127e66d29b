/**
 * What `kubectl apply` meets at an API server: every object that genie prints keeps to the
 * published OpenAPI of Kubernetes, as @kubernetes/client-node has it, and to the rules that its
 * validation adds (k8s.io/apimachinery/pkg/util/validation, and validation of each API group).
 */
import { describe, expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import type { KubeObject } from "../lib/cluster/yaml.ts";
import { isObject } from "../lib/json.ts";
import { makeCertificate } from "./certificate.ts";
import { makeHost, tempDir } from "./fakes.ts";

const models = join(
  dirname(createRequire(import.meta.url).resolve("@kubernetes/client-node")),
  "gen/models",
);
interface Field {
  type: string;
  isRequired: boolean;
}
const read = new Map<string, Map<string, Field>>();

/** The fields of a published type, from its declaration; undefined where it is no such type. */
function fieldsOf(type: string): Map<string, Field> | undefined {
  const known = read.get(type);
  if (known) return known;
  if (!/^(Core|Admission|Storage|Discovery|Rbac|Events|[VR])\w+$/.test(type)) return undefined;
  const js = readFileSync(join(models, `${type}.js`), "utf8");
  const declared = readFileSync(join(models, `${type}.d.ts`), "utf8");
  const fields = new Map<string, Field>();
  const one = /"name": "(\w+)",\s+"baseName": "([^"]+)",\s+"type": "([^"]+)"/g;
  for (const [, name, key = "", kind = ""] of js.matchAll(one)) {
    fields.set(key, { type: kind, isRequired: declared.includes(`'${name}': `) });
  }
  read.set(type, fields);
  return fields;
}

/** Where a value is not of a published type. */
function typeIssues(value: unknown, type: string, path: string): string[] {
  const list = /^Array<(.*)>$/.exec(type)?.[1];
  if (list !== undefined) {
    if (!Array.isArray(value)) return [`${path}: no list`];
    return value.flatMap((one, i) => typeIssues(one, list, `${path}[${i}]`));
  }
  const values = /^\{ \[key: string\]: (.*); \}$/.exec(type)?.[1];
  if (values !== undefined) {
    if (!isObject(value)) return [`${path}: no map`];
    return Object.entries(value).flatMap(([k, one]) => typeIssues(one, values, `${path}.${k}`));
  }
  if (type === "any" || type === "IntOrString" || type === "Date") return [];
  if (["string", "number", "boolean"].includes(type)) {
    return typeof value === type ? [] : [`${path}: no ${type}`];
  }
  const fields = fieldsOf(type);
  if (!fields) return [`${path}: no type ${type}`];
  if (!isObject(value)) return [`${path}: no object`];
  const missing = [...fields].filter(([key, { isRequired }]) => isRequired && !(key in value));
  return [
    ...missing.map(([key]) => `${path}.${key}: is missing`),
    ...Object.entries(value).flatMap(([key, one]) => {
      const field = fields.get(key);
      return field ? typeIssues(one, field.type, `${path}.${key}`) : [`${path}.${key}: is unknown`];
    }),
  ];
}

const label = /^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$/;
const subdomain = /^(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$/;
const qualified = /^(?:([^/]+)\/)?([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)$/;
const labelValue = /^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$/;
/** The language definition of CEL, "Syntax": words that are no identifiers. */
const reserved = new Set(
  `as break const continue else false for function if import in let loop namespace null package
  return true var void while`.split(/\s+/),
);
const isIdentifier = (name: string) => /^[a-zA-Z_]\w*$/.test(name) && !reserved.has(name);

type Json = Record<string, unknown>;
const list = (value: unknown): Json[] => (Array.isArray(value) ? value : []);
const isUnique = (values: unknown[]) => new Set(values).size === values.length;
/** The names of those rows that do not hold. */
const broken = (rules: Record<string, boolean>) =>
  Object.entries(rules).flatMap(([name, holds]) => (holds ? [] : [name]));

/** Texts of CEL outside of its strings. */
const code = (expression = "") => expression.replace(/'(?:\\.|[^'\\])*'/g, "''");

function metadataIssues({ kind, metadata }: KubeObject): string[] {
  const { name, namespace = "x", labels = {}, annotations = {} } = metadata as Json;
  const isQualified = (key: string) => {
    const [, prefix = "x", own] = qualified.exec(key) ?? [];
    return own !== undefined && subdomain.test(prefix);
  };
  return broken({
    "metadata.name": (kind === "Service" || kind === "Namespace" ? label : subdomain).test(
      `${name}`,
    ),
    "metadata.namespace": label.test(`${namespace}`),
    labels: Object.entries(labels as Json).every(
      ([key, value]) => isQualified(key) && labelValue.test(`${value}`),
    ),
    annotations: Object.keys(annotations as Json).every((key) => isQualified(key.toLowerCase())),
  });
}

/** pkg/apis/admissionregistration/validation: policies. */
function policyIssues(spec: Json): string[] {
  const variables = list(spec["variables"]) as { name: string; expression: string }[];
  const conditions = list(spec["matchConditions"]) as { name: string; expression: string }[];
  const validations = list(spec["validations"]);
  const { resourceRules } = spec["matchConstraints"] as Json;
  const all = [...variables, ...conditions, ...validations].map((one) => `${one["expression"]}`);
  const isDeclared = (expression: string, before: number) =>
    [...code(expression).matchAll(/\bvariables\.(\w+)/g)].every(([, name]) =>
      variables.slice(0, before).some((one) => one.name === name),
    );
  return broken({
    "names of variables": variables.every(({ name }) => isIdentifier(name)),
    "variables twice": isUnique(variables.map(({ name }) => name)),
    "variables before they are used": variables.every((one, i) => isDeclared(one.expression, i)),
    "variables in conditions": conditions.every((one) => isDeclared(one.expression, 0)),
    "variables that are used": validations.every((one) => isDeclared(`${one["expression"]}`, 99)),
    "names of conditions": conditions.every(({ name }) => qualified.test(name)),
    "conditions twice": isUnique(conditions.map(({ name }) => name)),
    "number of conditions": conditions.length <= 64,
    validations: validations.length > 0,
    "empty expressions": all.every((expression) => expression.trim() !== ""),
    "fields by keywords": all.every(
      (expression) => !/\.(in|true|false|null)\b/.test(code(expression)),
    ),
    messages: validations.every((one) => !/[\n\r]/.test(`${one["message"]}`)),
    reasons: validations.every((one) =>
      ["Unauthorized", "Forbidden", "Invalid", "RequestEntityTooLarge"].includes(
        `${one["reason"]}`,
      ),
    ),
    failurePolicy: ["Fail", "Ignore"].includes(`${spec["failurePolicy"]}`),
    matchConstraints: ruleIssues(list(resourceRules)),
  });
}

/** What a policy or a webhook matches. */
function ruleIssues(rules: Json[]): boolean {
  const isFilled = (value: unknown) => Array.isArray(value) && value.length > 0;
  return (
    rules.length > 0 &&
    rules.every(
      (one) =>
        ["apiGroups", "apiVersions", "operations", "resources"].every((key) =>
          isFilled(one[key]),
        ) &&
        (one["operations"] as string[]).every((name) =>
          ["CREATE", "UPDATE", "DELETE", "CONNECT", "*"].includes(name),
        ),
    )
  );
}

/** pkg/apis/core and apps/validation: what runs. */
function workloadIssues(spec: Json): string[] {
  const { metadata = {}, spec: pod = {} } = spec["template"] as { metadata?: Json; spec?: Json };
  const { matchLabels = {} } = spec["selector"] as Json;
  const containers = [...list(pod["initContainers"]), ...list(pod["containers"])];
  const volumes = list(pod["volumes"]).map(({ name }) => `${name}`);
  const mounts = containers.flatMap((one) => list(one["volumeMounts"]));
  const ports = containers.flatMap((one) => list(one["ports"]));
  const quantities = containers.flatMap((one) =>
    Object.values((one["resources"] ?? {}) as Json).flatMap((each) => Object.values(each as Json)),
  );
  return broken({
    "selector and labels": Object.entries(matchLabels as Json).every(
      ([key, value]) => ((metadata["labels"] ?? {}) as Json)[key] === value,
    ),
    "names of containers": containers.every(({ name }) => label.test(`${name}`)),
    "containers twice": isUnique(containers.map(({ name }) => name)),
    "names of volumes": volumes.every((name) => label.test(name)) && isUnique(volumes),
    "volumes of mounts": mounts.every(({ name }) => volumes.includes(`${name}`)),
    "paths of mounts": mounts.every(({ mountPath }) => `${mountPath}`.startsWith("/")),
    "names of ports": ports.every(({ name }) => /^(?=.*[a-z])[a-z0-9-]{1,15}$/.test(`${name}`)),
    quantities: quantities.every((text) => /^\d+(\.\d+)?(m|k|M|G|Ki|Mi|Gi)?$/.test(`${text}`)),
  });
}

/** What a kind demands beyond its types. */
function kindIssues(object: KubeObject): string[] {
  const spec = (object["spec"] ?? {}) as Json;
  switch (object.kind) {
    case "ValidatingAdmissionPolicy":
      return policyIssues(spec);
    case "ValidatingAdmissionPolicyBinding":
      return broken({
        validationActions: isUnique(spec["validationActions"] as string[]),
        policyName: subdomain.test(`${spec["policyName"]}`),
      });
    case "ValidatingWebhookConfiguration":
      return list(object["webhooks"]).flatMap((one) =>
        broken({
          name: subdomain.test(`${one["name"]}`) && `${one["name"]}`.split(".").length >= 3,
          sideEffects: ["None", "NoneOnDryRun"].includes(`${one["sideEffects"]}`),
          admissionReviewVersions: (one["admissionReviewVersions"] as string[]).includes("v1"),
          timeoutSeconds: Number(one["timeoutSeconds"]) >= 1 && Number(one["timeoutSeconds"]) <= 30,
          rules: ruleIssues(list(one["rules"])),
        }),
      );
    case "DaemonSet":
    case "Deployment":
      return workloadIssues(spec);
    case "Role":
    case "ClusterRole":
      return list(object["rules"]).flatMap((one) =>
        broken({
          verbs: (one["verbs"] as string[]).length > 0,
          apiGroups: (one["apiGroups"] as string[]).length > 0,
          resources: (one["resources"] as string[]).length > 0,
        }),
      );
    case "ConfigMap":
      return Object.keys((object["data"] ?? {}) as Json)
        .filter((key) => !/^[-._a-zA-Z0-9]{1,253}$/.test(key))
        .map((key) => `data.${key}`);
    default:
      return [];
  }
}

/** Everything that an API server would say about an object. */
function issuesOf(object: KubeObject): string[] {
  const [version = "", group = ""] = `${object.apiVersion}`.split("/").reverse();
  // Its rules are in crds.test.ts.
  const isOwn = group.includes(".") && !group.endsWith(".k8s.io");
  const types = isOwn ? [] : typeIssues(object, `${version.toUpperCase()}${object.kind}`, "");
  return [...types, ...metadataIssues(object), ...kindIssues(object)];
}

const table = `[default]
networks = ["red", "blue@eth0"]
always = ["team/red"]
[access]
default = "deny"
[[access.nad]]
namespaces = ["team-*"]
types = ["macvlan"]
masters = ["eth*"]
[kubernetes]
namespace_isolation = true
[plugins.red.allow]
namespaces = ["a-?"]
pods = ["a/*"]
service_accounts = ["a/b"]
[plugins.blue.deny]
namespaces = ["*"]
`;

describe("an API server takes what is printed by genie manifest", () => {
  test.each<[string, string[], string[]]>([
    ["", [], ["Namespace", "CustomResourceDefinition", "ClusterRole", "DaemonSet", "ConfigMap"]],
    ["--features", ["--features=policy,switch,cluster-report"], ["Role", "ClusterRoleBinding"]],
    ["--access", ["--access"], ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]],
    ["--webhook", ["--webhook"], ["ValidatingWebhookConfiguration", "Service"]],
  ])("%s", async (_name, options, kinds) => {
    using dir = tempDir();
    const file = join(dir.path, "plugins.toml");
    writeFileSync(file, table);
    const host = makeHost();
    const authority = join(dir.path, "ca.crt");
    writeFileSync(authority, makeCertificate({ name: "ca" }).certificate);
    const ca = options.includes("--webhook") ? ["--ca", authority] : [];
    const words = ["manifest", "--json", "--table", file, ...options, ...ca];
    expect([await runCommand(host, words), host.written.stderr]).toEqual([0, ""]);
    const { items } = JSON.parse(host.written.stdout) as { items: KubeObject[] };
    expect(items.map(({ kind }) => kind)).toEqual(expect.arrayContaining(kinds));
    const found = items.map((one) => [`${one.kind} ${one.metadata.name}`, issuesOf(one)]);
    expect(found).toEqual(items.map((one) => [`${one.kind} ${one.metadata.name}`, []]));
  });
});

describe("it would refuse", () => {
  const policy = (spec: object): KubeObject => ({
    ...{ apiVersion: "admissionregistration.k8s.io/v1", kind: "ValidatingAdmissionPolicy" },
    metadata: { name: "p" },
    spec: {
      failurePolicy: "Fail",
      matchConstraints: {
        resourceRules: [
          { apiGroups: [""], apiVersions: ["v1"], operations: ["CREATE"], resources: ["pods"] },
        ],
      },
      validations: [{ expression: "true", message: "m", reason: "Forbidden" }],
      ...spec,
    },
  });
  const variable = (name: string, expression = "1") => ({ variables: [{ name, expression }] });
  test.each<[string, KubeObject, string[]]>([
    ["nothing of a good one", policy(variable("ns")), []],
    ["a reserved word", policy(variable("namespace")), ["names of variables"]],
    ["no identifier", policy(variable("a-b")), ["names of variables"]],
    [
      "an unknown variable",
      policy(variable("a", "variables.b")),
      ["variables before they are used"],
    ],
    ["a field that is a reserved word", policy(variable("a", "x.in")), ["fields by keywords"]],
    ["an unknown key", policy({ variable: [] }), [".spec.variable: is unknown"]],
    [
      "a missing key",
      policy({ variables: [{ name: "a" }] }),
      [".spec.variables[0].expression: is missing"],
    ],
    [
      "a label of two words",
      { ...policy({}), metadata: { name: "p", labels: { a: "b c" } } },
      ["labels"],
    ],
    ["capitals", { ...policy({}), metadata: { name: "P" } }, ["metadata.name"]],
  ])("%s", (_name, object, expected) => {
    expect(issuesOf(object)).toEqual(expected);
  });
});
