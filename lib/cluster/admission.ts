/**
 * The rules of access as ValidatingAdmissionPolicies: a pod or an object that a node would refuse
 * is refused at `kubectl apply`. The node decides in any case; a policy refuses what a node
 * refuses, as far as an object tells, and leaves the rest to the node:
 * - an automatic choice, logical networks, a network asked for by another of its names;
 * - quotas, which are counted on the node;
 * - of a NetworkAttachmentDefinition's config, which CEL cannot parse, what its text does not show.
 * Pure. Source: Kubernetes admissionregistration.k8s.io/v1 (since 1.30), CEL in Kubernetes.
 */

import { annotationKeys, npwgKeys } from "../annotations.ts";
import type { Config, Rule } from "../config/schema.ts";
import type { NadRule } from "../kubernetes/nad_access.ts";
import { ipamsDefault, knownPlugins, parentKeyOf } from "../kubernetes/nad_access.ts";

/** Something for `kubectl apply`. */
export interface Manifest {
  apiVersion: string;
  kind: string;
  metadata: { name: string };
  spec: object;
  [key: string]: unknown;
}
interface Validation {
  expression: string;
  message: string;
  reason: "Forbidden";
}

/** The policies and their bindings; none where no rule speaks of pods or of objects. */
export function compileAccess(config: Config): Manifest[] {
  const pods = podValidations(config);
  const { nad } = config.access;
  return [
    ...(pods.length === 0 ? [] : policy("genie-pods", podMatch, podVariables(config), pods)),
    ...(nad
      ? policy("genie-definitions", nadMatch, nadVariables, [nadValidation(config, nad)])
      : []),
  ];
}

interface Match {
  constraints: object;
  conditions: { name: string; expression: string }[];
}
type Variables = { name: string; expression: string }[];

function policy(
  name: string,
  { constraints, conditions }: Match,
  variables: Variables,
  validations: Validation[],
): Manifest[] {
  const apiVersion = "admissionregistration.k8s.io/v1";
  return [
    {
      apiVersion,
      kind: "ValidatingAdmissionPolicy",
      metadata: { name },
      spec: {
        // What cannot be judged, a text so long that it costs too much, is refused.
        failurePolicy: "Fail",
        matchConstraints: { resourceRules: [constraints] },
        matchConditions: conditions,
        variables,
        validations,
      },
    },
    {
      apiVersion,
      kind: "ValidatingAdmissionPolicyBinding",
      metadata: { name },
      spec: { policyName: name, validationActions: ["Deny"] },
    },
  ];
}

const operations = ["CREATE", "UPDATE"];
/** Annotations that say which networks a pod gets. */
const selecting = [
  annotationKeys.cni,
  annotationKeys.networks,
  npwgKeys.networks,
  npwgKeys.defaultNetwork,
];

/** An annotation as a list of its one value, or of none. */
function annotationOf(object: string, key: string): string {
  const all = `${object}.metadata.annotations`;
  return `(has(${all}) && ${quote(key)} in ${all} ? [${all}[${quote(key)}]] : [])`;
}

const podMatch: Match = {
  constraints: { apiGroups: [""], apiVersions: ["v1"], operations, resources: ["pods"] },
  conditions: [
    {
      name: "has-networks",
      expression: "!has(object.spec.hostNetwork) || !object.spec.hostNetwork",
    },
    {
      // Every other change of a pod that runs already is not about its networks.
      name: "selects-anew",
      expression: [
        "request.operation == 'CREATE'",
        ...selecting.map(
          (key) => `${annotationOf("object", key)} != ${annotationOf("oldObject", key)}`,
        ),
      ].join(" || "),
    },
  ],
};

/**
 * Facts of a pod by the names of {@link checkAccess}; `asked`: the networks of the node that it
 * would get, as `selectWanted` says.
 */
function podVariables(config: Config): Variables {
  const { networks, always, systemNamespaces } = config.default;
  const names = (all: string[]) => list(all.filter((one) => !one.includes("/")).map(nameOf));
  // What Multus' keys name may be an object: the node decides.
  const initial = config.multus?.clusterNetwork ? [] : networks;
  const cni = annotationOf("object", annotationKeys.cni);
  return [
    { name: "namespace", expression: "request.namespace" },
    { name: "name", expression: "has(object.metadata.name) ? object.metadata.name : ''" },
    {
      name: "account",
      expression:
        "has(object.spec.serviceAccountName) && object.spec.serviceAccountName != '' " +
        "? object.spec.serviceAccountName : 'default'",
    },
    { name: "selected", expression: annotationOf("object", npwgKeys.networks) },
    { name: "primary", expression: annotationOf("object", npwgKeys.defaultNetwork) },
    { name: "cni", expression: cni },
    {
      name: "asked",
      expression:
        "(variables.primary.exists(t, t.trim() != '') ? [] : " +
        `size(variables.cni) == 0 ? ${names(initial)} : ` +
        "variables.cni[0].trim() == '' ? [] : " +
        "variables.cni[0].split(',').map(e, e.split('@')[0].trim())) + " +
        `(variables.namespace in ${list(systemNamespaces)} ? [] : ${names(always)})`,
    },
  ];
}

function nameOf(attachment: string): string {
  return attachment.replace(/@.*/, "");
}

function podValidations(config: Config): Validation[] {
  const { file, access } = config;
  const entries = [...config.plugins.values()];
  const ruled = entries.flatMap(({ name, allow, deny }) => [
    ...(deny ? [ruleValidation(name, "deny", deny, file)] : []),
    ...(allow ? [ruleValidation(name, "allow", allow, file)] : []),
  ]);
  const open = entries.filter(({ allow }) => allow).map(({ name }) => name);
  const closed: Validation = {
    expression: `variables.asked.all(n, n in ${list(open)})`,
    message: 'access.default is "deny" and no rule allows a network that this pod would get',
    reason: "Forbidden",
  };
  return [
    ...ruled,
    ...(access.default === "deny" ? [closed] : []),
    ...(config.kubernetes.namespaceIsolation ? [isolationValidation(config)] : []),
  ];
}

function ruleValidation(
  name: string,
  kind: "allow" | "deny",
  rule: Rule,
  file: string,
): Validation {
  const named = ruleExpression(rule);
  const isAllowed = kind === "allow" ? named : `!${named}`;
  return {
    expression: `!(${quote(name)} in variables.asked) || ${isAllowed}`,
    message:
      `network "${name}" is closed to this pod by plugins.${name}.${kind} at ` +
      `${file}:${rule.line}`,
    reason: "Forbidden",
  };
}

/** True where a rule names the pod: the lists are OR-ed; what is unknown no pattern covers. */
function ruleExpression({ namespaces, pods, serviceAccounts }: Rule): string {
  const parts = [
    ...(namespaces.length > 0 ? [`variables.namespace.matches(${regex(namespaces)})`] : []),
    ...(pods.length > 0 ? [namespaced("name", pods)] : []),
    ...(serviceAccounts.length > 0 ? [namespaced("account", serviceAccounts)] : []),
  ];
  return parts.length === 0 ? "false" : `(${parts.join(" || ")})`;
}

function namespaced(variable: string, patterns: string[]): string {
  const whole = `(variables.namespace + '/' + variables.${variable})`;
  return `(variables.${variable} != '' && ${whole}.matches(${regex(patterns)}))`;
}

/** Objects of other namespaces, in both formats of the annotation. */
function isolationValidation({ file, kubernetes: { globalNamespaces } }: Config): Validation {
  const global = list(globalNamespaces);
  const key = `"namespace"[ \\t\\r\\n]*:[ \\t\\r\\n]*"[^"]*"`;
  const isOwn = (text: string) => `(${text} == variables.namespace || ${text} in ${global})`;
  // The value of a key in JSON is what stands between its last two quotes.
  const value = "k.split('\"')[3]";
  const inJson =
    // Letters may be written as escapes, which hide a name from us.
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
    reason: "Forbidden",
  };
}

/** The config of an object as text, '' where it has none. */
function configOf(object: string): string {
  const spec = `${object}.spec`;
  return `(has(${spec}) && has(${spec}.config) ? ${spec}.config : '')`;
}

const nadMatch: Match = {
  constraints: {
    apiGroups: ["k8s.cni.cncf.io"],
    apiVersions: ["*"],
    operations,
    resources: ["network-attachment-definitions"],
  },
  conditions: [
    {
      name: "is-new",
      expression: [
        "request.operation == 'CREATE'",
        `${configOf("object")} != ${configOf("oldObject")}`,
      ].join(" || "),
    },
  ],
};

const blank = "[ \\t\\r\\n]*";
/** Values of a key of JSON text, as `"key": "value"`. */
const valuesOf = (key: string) =>
  `variables.config.findAll(${quote(`"${key}"${blank}:${blank}"[^"]*"`)})`;
const nadVariables: Variables = [
  { name: "config", expression: configOf("object") },
  { name: "types", expression: `${valuesOf("type")}.map(k, k.split('"')[3])` },
];

function nadValidation({ file }: Config, rules: readonly NadRule[]): Validation {
  const admitted = rules.map((rule) => `(${nadExpression(rule)})`);
  return {
    expression: admitted.length === 0 ? "false" : admitted.join(" || "),
    message:
      "no rule of access.nad admits this object: " +
      rules.map(({ line }, i) => `access.nad[${i}] at ${file}:${line}`).join("; "),
    reason: "Forbidden",
  };
}

/** Whether a rule admits an object, as far as its text shows. */
function nadExpression({ namespaces, types, ipams, masters, configOnDisk }: NadRule): string {
  const parts = [`request.namespace.matches(${regex(namespaces)})`];
  if (configOnDisk) parts.push("variables.config.trim() == ''");
  if (types) {
    // Of what else a config may hold under this key we know nothing: "policy": {"type": "k8s"}.
    const others = [...types, ...(ipams ?? ipamsDefault)];
    parts.push(
      `variables.types.all(t, !(t in ${list(knownPlugins)}) || t.matches(${regex(others)}))`,
    );
  }
  if (masters) {
    for (const type of knownPlugins) {
      const key = parentKeyOf(type);
      if (key === undefined) continue;
      const values = `${valuesOf(key)}.all(k, k.split('"')[3].matches(${regex(masters)}))`;
      parts.push(`(!(${quote(type)} in variables.types) || ${values})`);
    }
  }
  return parts.join(" && ");
}

/** Glob patterns as one regular expression, in CEL. */
function regex(globs: readonly string[]): string {
  const one = (glob: string) =>
    glob
      .split("/")
      .map((part) => (/^\*+$/.test(part) ? "[^/]+" : part.replace(/[^a-zA-Z0-9_-]/g, escaped)))
      .join("/");
  return quote(`^(${globs.map(one).join("|")})$`);
}

function escaped(char: string): string {
  if (char === "*") return "[^/]*";
  return char === "?" ? "[^/]" : `\\${char}`;
}

function list(texts: readonly string[]): string {
  return `[${texts.map(quote).join(", ")}]`;
}

/** A string of CEL. */
function quote(text: string): string {
  const safe = text.replace(/[\\']/g, (char) => `\\${char}`);
  return `'${safe.replace(/\n/g, "\\n").replace(/\t/g, "\\t").replace(/\r/g, "\\r")}'`;
}
