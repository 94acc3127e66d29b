/**
 * The rules of access as ValidatingAdmissionPolicies: a pod or an object that a node would refuse
 * is refused at `kubectl apply`. The node decides in any case; a policy refuses what a node
 * refuses, as far as the object alone shows it, and leaves the rest to the node:
 * - an automatic choice, logical networks, a network asked for by another of its names;
 * - quotas, which are counted on the node;
 * - what the text of a NetworkAttachmentDefinition's config does not show: CEL cannot parse it.
 * Pure. Source: Kubernetes admissionregistration.k8s.io/v1 (since 1.30), CEL in Kubernetes.
 */
import type { Config, Rule } from "../config/schema.ts";
import { annotationKeys, npwgKeys } from "../pod.ts";
import { devicePlugins, ipamsDefault, knownPlugins, type NadRule } from "./access_rules.ts";

interface Validation {
  expression: string;
  message: string;
}

/** One object of what is printed, as `kubectl apply` takes it. */
export interface AccessObject {
  apiVersion: string;
  kind: string;
  metadata: { name: string };
  [key: string]: unknown;
}

/** The policies and their bindings; none where no rule is about pods or objects. */
export function compileAccess(config: Config): AccessObject[] {
  const pods = podValidations(config);
  const { nad } = config.access;
  return [
    ...(pods.length === 0 ? [] : policy("genie-pods", podSpec(config), pods)),
    ...(nad ? policy("genie-definitions", nadSpec, [nadValidation(config, nad)]) : []),
  ];
}

/** @param about what it matches, and the variables of its validations */
function policy(name: string, about: object, validations: Validation[]): AccessObject[] {
  const apiVersion = "admissionregistration.k8s.io/v1";
  const object = (kind: string, spec: object) => ({ apiVersion, kind, metadata: { name }, spec });
  return [
    object("ValidatingAdmissionPolicy", {
      // What cannot be evaluated, such as a text so long that it costs too much, is refused.
      failurePolicy: "Fail",
      ...about,
      validations: validations.map((one) => ({ ...one, reason: "Forbidden" })),
    }),
    object("ValidatingAdmissionPolicyBinding", { policyName: name, validationActions: ["Deny"] }),
  ];
}

function matching(apiGroup: string, version: string, resource: string): object {
  const operations = ["CREATE", "UPDATE"];
  const rule = { apiGroups: [apiGroup], apiVersions: [version], operations, resources: [resource] };
  return { resourceRules: [rule] };
}

/** Expressions with their names, as the API lists them. */
function named(expressions: Record<string, string>): object[] {
  return Object.entries(expressions).map(([name, expression]) => ({ name, expression }));
}

const isCreated = "request.operation == 'CREATE'";
/** Annotations that say which networks a pod gets. */
const selecting = [...Object.values(annotationKeys), npwgKeys.networks, npwgKeys.defaultNetwork];

/** An annotation as a list of its one value, or of none. */
function annotationOf(object: string, key: string): string {
  const all = `${object}.metadata.annotations`;
  return `(has(${all}) && ${quote(key)} in ${all} ? [${all}[${quote(key)}]] : [])`;
}

/**
 * Facts of a pod, by the names that the node's access check has for them. `asked` are the networks
 * of the node that the pod would get.
 */
function podSpec(config: Config): object {
  const { networks, always, systemNamespaces } = config.default;
  const names = (all: string[]) =>
    list(all.filter((one) => !one.includes("/")).map((one) => one.replace(/@.*/, "")));
  // What Multus' keys name may be an object of the API: the node decides.
  const initial = config.multus?.clusterNetwork ? [] : networks;
  const changes = selecting.map(
    (key) => `${annotationOf("object", key)} != ${annotationOf("oldObject", key)}`,
  );
  return {
    matchConstraints: matching("", "v1", "pods"),
    matchConditions: named({
      "has-networks": "!has(object.spec.hostNetwork) || !object.spec.hostNetwork",
      // Any other change of a running pod does not touch its networks.
      "selects-anew": [isCreated, ...changes].join(" || "),
    }),
    variables: named({
      podNamespace: "request.namespace",
      name: "has(object.metadata.name) ? object.metadata.name : ''",
      account:
        "has(object.spec.serviceAccountName) && object.spec.serviceAccountName != '' " +
        "? object.spec.serviceAccountName : 'default'",
      selected: annotationOf("object", npwgKeys.networks),
      primary: annotationOf("object", npwgKeys.defaultNetwork),
      cni: annotationOf("object", annotationKeys.cni),
      asked:
        "(variables.primary.exists(t, t.trim() != '') ? [] : " +
        `size(variables.cni) == 0 ? ${names(initial)} : ` +
        "variables.cni[0].trim() == '' ? [] : " +
        "variables.cni[0].split(',').map(e, e.split('@')[0].trim())) + " +
        `(variables.podNamespace in ${list(systemNamespaces)} ? [] : ${names(always)})`,
    }),
  };
}

function podValidations(config: Config): Validation[] {
  const { file, access } = config;
  const validations: Validation[] = [];
  const open: string[] = [];
  for (const { name, allow, deny } of config.plugins.values()) {
    const add = (kind: "allow" | "deny", isAllowed: string, line: number) =>
      validations.push({
        expression: `!(${quote(name)} in variables.asked) || ${isAllowed}`,
        message:
          `network "${name}" is closed to this pod by plugins.${name}.${kind} at ` +
          `${file}:${line}`,
      });
    if (deny) add("deny", `!${ruleExpression(deny)}`, deny.line);
    if (!allow) continue;
    add("allow", ruleExpression(allow), allow.line);
    open.push(name);
  }
  if (access.default === "deny") {
    validations.push({
      expression: `variables.asked.all(n, n in ${list(open)})`,
      message: 'access.default is "deny" and no rule allows a network that this pod would get',
    });
  }
  if (config.kubernetes.namespaceIsolation) validations.push(isolationValidation(config));
  return validations;
}

/** True where a rule matches the pod: its lists are OR-ed, an unknown name matches no pattern. */
function ruleExpression({ namespaces, pods, serviceAccounts }: Rule): string {
  const parts: string[] = [];
  if (namespaces.length > 0) parts.push(`variables.podNamespace.matches(${regex(namespaces)})`);
  for (const [name, patterns] of Object.entries({ name: pods, account: serviceAccounts })) {
    if (patterns.length === 0) continue;
    const whole = `(variables.podNamespace + '/' + variables.${name})`;
    parts.push(`(variables.${name} != '' && ${whole}.matches(${regex(patterns)}))`);
  }
  return parts.length === 0 ? "false" : `(${parts.join(" || ")})`;
}

/** Refuses objects of other namespaces, in both formats of the annotation. */
function isolationValidation({ file, kubernetes: { globalNamespaces } }: Config): Validation {
  const global = list(globalNamespaces);
  const key = `"namespace"[ \\t\\r\\n]*:[ \\t\\r\\n]*"[^"]*"`;
  const isOwn = (text: string) => `(${text} == variables.podNamespace || ${text} in ${global})`;
  // In `"key": "value"` the value stands between the last two quotes.
  const value = "k.split('\"')[3]";
  const inJson =
    // Letters may be written as escapes, which would hide a name.
    "!t.contains('\\\\') && " +
    `t.findAll(${quote(key)}).all(k, ${value} == '' || ${isOwn(value)})`;
  const inText = `t.split(',').all(e, !e.contains('/') || ${isOwn("e.split('/')[0].trim()")})`;
  const isJson = "t.trim().startsWith('[') || t.trim().startsWith('{')";
  return {
    expression:
      `(variables.selected + variables.primary).all(t, ` +
      `(${isJson}) ? (${inJson}) : (${inText}))`,
    message:
      "a network of another namespace is closed to this pod by kubernetes.namespace_isolation " +
      `at ${file}; a JSON annotation must not hold a backslash`,
  };
}

/** The config of an object as text, '' where it has none. */
function configOf(object: string): string {
  const spec = `${object}.spec`;
  return `(has(${spec}) && has(${spec}.config) ? ${spec}.config : '')`;
}

const blank = "[ \\t\\r\\n]*";
/** Values of a key of JSON text, as `"key": "value"`. */
const valuesOf = (key: string) =>
  `variables.config.findAll(${quote(`"${key}"${blank}:${blank}"[^"]*"`)})`;
const nadSpec = {
  matchConstraints: matching("k8s.cni.cncf.io", "*", "network-attachment-definitions"),
  matchConditions: named({
    "is-new": `${isCreated} || ${configOf("object")} != ${configOf("oldObject")}`,
  }),
  variables: named({
    config: configOf("object"),
    types: `${valuesOf("type")}.map(k, k.split('"')[3])`,
  }),
};

function nadValidation({ file }: Config, rules: readonly NadRule[]): Validation {
  const admitted = rules.map((rule) => `(${nadExpression(rule)})`);
  return {
    expression: admitted.length === 0 ? "false" : admitted.join(" || "),
    message:
      "no rule of access.nad admits this object: " +
      rules.map(({ line }, i) => `access.nad[${i}] at ${file}:${line}`).join("; "),
  };
}

/** Whether a rule admits an object, as far as its text shows. */
function nadExpression({ namespaces, types, ipams, masters, configOnDisk }: NadRule): string {
  const parts = [`request.namespace.matches(${regex(namespaces)})`];
  if (configOnDisk) parts.push("variables.config.trim() == ''");
  if (types) {
    // The key may stand for something else too: "policy": {"type": "k8s"}. Only plugins we know
    // are checked.
    const others = [...types, ...(ipams ?? ipamsDefault)];
    parts.push(
      `variables.types.all(t, !(t in ${list(knownPlugins)}) || t.matches(${regex(others)}))`,
    );
  }
  if (masters) {
    for (const [type, { key }] of devicePlugins) {
      const values = `${valuesOf(key)}.all(k, k.split('"')[3].matches(${regex(masters)}))`;
      parts.push(`(!(${quote(type)} in variables.types) || ${values})`);
    }
  }
  return parts.join(" && ");
}

/** Glob patterns as one regular expression, in CEL. */
function regex(globs: readonly string[]): string {
  const onePart = (part: string) => {
    if (/^\*+$/.test(part)) return "[^/]+";
    const safe = part.replace(/[^\w*?-]/g, "\\$&");
    return safe.replaceAll("*", "[^/]*").replaceAll("?", "[^/]");
  };
  const all = globs.map((glob) => glob.split("/").map(onePart).join("/"));
  return quote(`^(${all.join("|")})$`);
}

function list(texts: readonly string[]): string {
  return `[${texts.map(quote).join(", ")}]`;
}

/** A string of CEL. */
function quote(text: string): string {
  const safe = text.replace(/[\\']/g, (char) => `\\${char}`);
  return `'${safe.replace(/\n/g, "\\n").replace(/\t/g, "\\t").replace(/\r/g, "\\r")}'`;
}
