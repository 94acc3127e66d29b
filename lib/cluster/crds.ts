/**
 * The custom resources of this program, as manifests: NetworkAttachmentDefinition (NPWG v1.3 §3)
 * and CNI-Genie's Logicalnetwork and Physicalnetwork. Pure data, and YAML for it.
 *
 * The schemas refuse what could never work, and nothing that works with Multus or CNI-Genie today:
 * an empty string means absent, as it does there, and unknown keys are pruned, not refused. Rules
 * that need a second object (a sub-subnet inside the physical subnet) are checked at ADD.
 * Sources: apiextensions.k8s.io/v1; CNI-Genie sampleyamls/ and utils/types.go.
 */

/** A structural OpenAPI v3 schema, as far as these manifests use it. */
export interface Schema {
  type: "object" | "string" | "boolean";
  description?: string;
  properties?: Readonly<Record<string, Schema>>;
  required?: readonly string[];
  maxLength?: number;
  pattern?: string;
  "x-kubernetes-validations"?: readonly ValidationRule[];
}

/** A CEL rule; `self` is the value of the schema that carries it. */
export interface ValidationRule {
  rule: string;
  message: string;
}

/** A column of `kubectl get`. */
export interface PrinterColumn {
  name: string;
  type: "string" | "boolean" | "date";
  description?: string;
  jsonPath: string;
}

/** A CustomResourceDefinition with its one version. */
export interface CustomResourceDefinition {
  apiVersion: "apiextensions.k8s.io/v1";
  kind: "CustomResourceDefinition";
  metadata: { name: string; annotations: Readonly<Record<string, string>> };
  spec: {
    group: string;
    scope: "Namespaced";
    names: {
      plural: string;
      singular: string;
      kind: string;
      listKind: string;
      shortNames?: readonly string[];
    };
    versions: readonly {
      name: string;
      served: true;
      storage: true;
      schema: { openAPIV3Schema: Schema };
      additionalPrinterColumns: readonly PrinterColumn[];
    }[];
  };
}

/** What the API server stores at most is 1.5 MiB; a config list has a few hundred bytes. */
const configLengthMax = 256 * 1024;
/** An interface name of the Linux kernel. */
const interfaceLengthMax = 15;
/** Printable ASCII but "/" and ":", as the kernel wants it; empty is absent. */
const interfacePattern = "^[!-.0-9;-~]*$";
/** An IPv6 address and its prefix length. */
const subnetLengthMax = 43;
const objectNameLengthMax = 253;
/** Short, because the `networks` annotation holds many. */
const networkNameLengthMax = 63;

const byte = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
const subnet4 = `${byte}([.]${byte}){3}/(3[0-2]|[12]?[0-9])`;
const subnet6 = "[0-9a-fA-F]{0,4}(:[0-9a-fA-F]{0,4}){2,7}/(12[0-8]|1[01][0-9]|[1-9]?[0-9])";

/** An address with prefix length, or nothing. `isCIDR` of CEL needs Kubernetes 1.31. */
function subnet(field: string, description: string): Schema {
  return {
    type: "string",
    description,
    maxLength: subnetLengthMax,
    "x-kubernetes-validations": [
      {
        rule: `self == '' || self.matches('^(${subnet4}|${subnet6})$')`,
        message: `${field} must be a subnet such as 10.32.0.0/24 or fd00:32::/64`,
      },
    ],
  };
}

/** The name of a network of the node (CNI SPEC 1.1 §1 `name`), or nothing. */
function plugin(description: string): Schema {
  return {
    type: "string",
    description,
    maxLength: objectNameLengthMax,
    pattern: "^([a-zA-Z0-9][a-zA-Z0-9_.-]*)?$",
  };
}

const shortName: Schema = {
  type: "object",
  properties: { name: { type: "string", maxLength: networkNameLengthMax } },
};

const age: PrinterColumn = { name: "Age", type: "date", jsonPath: ".metadata.creationTimestamp" };

/** A manifest from its names, the schema of its `spec` and its columns. */
function define(
  {
    group,
    ...names
  }: { group: string } & Omit<CustomResourceDefinition["spec"]["names"], "listKind">,
  openAPIV3Schema: Schema,
  columns: readonly PrinterColumn[],
): CustomResourceDefinition {
  return {
    apiVersion: "apiextensions.k8s.io/v1",
    kind: "CustomResourceDefinition",
    metadata: {
      name: `${names.plural}.${group}`,
      // The API server refuses a group under k8s.io without it.
      annotations: { "api-approved.kubernetes.io": "unapproved, experimental" },
    },
    spec: {
      group,
      scope: "Namespaced",
      names: { ...names, listKind: `${names.kind}List` },
      versions: [
        {
          name: "v1",
          served: true,
          storage: true,
          schema: { openAPIV3Schema },
          additionalPrinterColumns: [...columns, age],
        },
      ],
    },
  };
}

/** The keys every object has; the API server takes them as given. */
const apiVersion: Schema = {
  type: "string",
  description: "Version of the schema this object follows",
};
const kind: Schema = { type: "string", description: "Kind of this object" };

const networkAttachmentDefinition = define(
  {
    group: "k8s.cni.cncf.io",
    plural: "network-attachment-definitions",
    singular: "network-attachment-definition",
    kind: "NetworkAttachmentDefinition",
    shortNames: ["net-attach-def"],
  },
  {
    type: "object",
    description:
      "A network that pods select with the annotation k8s.v1.cni.cncf.io/networks. Its own " +
      "annotation k8s.v1.cni.cncf.io/resourceName names the resource it takes a device of.",
    properties: {
      apiVersion,
      kind,
      metadata: { type: "object" },
      spec: {
        type: "object",
        properties: {
          config: {
            type: "string",
            description:
              "A CNI network config or config list as JSON. When it is absent, the node's own " +
              "config whose name is the name of this object is taken.",
            maxLength: configLengthMax,
            "x-kubernetes-validations": [
              {
                rule:
                  "self.trim() == '' || " +
                  "(self.trim().startsWith('{') && self.trim().endsWith('}'))",
                message: "config must be a JSON object, a CNI network config or config list",
              },
            ],
          },
        },
      },
    },
  },
  [],
);

const geniesGroup = "alpha.network.k8s.io";

const logicalNetwork = define(
  {
    group: geniesGroup,
    plural: "logicalnetworks",
    singular: "logicalnetwork",
    kind: "Logicalnetwork",
  },
  {
    type: "object",
    description:
      "A network that pods of its namespace select with the annotations cni (empty) and networks.",
    required: ["spec"],
    properties: {
      apiVersion,
      kind,
      metadata: shortName,
      spec: {
        type: "object",
        properties: {
          physicalNet: {
            type: "string",
            description: "The Physicalnetwork of the same namespace it lies on",
            maxLength: objectNameLengthMax,
          },
          sub_subnet: subnet(
            "sub_subnet",
            "Where its addresses come from, instead of the subnet of its plugin. It must lie " +
              "inside the subnet of its physical network, and is needed on a shared one.",
          ),
          plugin: plugin(
            "The network of the node that serves it. A dedicated physical network brings its own.",
          ),
        },
        "x-kubernetes-validations": [
          {
            rule:
              "(has(self.physicalNet) && self.physicalNet != '') || " +
              "(has(self.plugin) && self.plugin != '')",
            message: "a logical network without physicalNet needs plugin",
          },
        ],
      },
    },
  },
  [
    { name: "Physical", type: "string", jsonPath: ".spec.physicalNet" },
    { name: "Plugin", type: "string", jsonPath: ".spec.plugin" },
    { name: "Subnet", type: "string", jsonPath: ".spec.sub_subnet" },
  ],
);

const physicalNetwork = define(
  {
    group: geniesGroup,
    plural: "physicalnetworks",
    singular: "physicalnetwork",
    kind: "Physicalnetwork",
  },
  {
    type: "object",
    description: "A network interface of the nodes, and how logical networks may use it.",
    required: ["spec"],
    properties: {
      apiVersion,
      kind,
      metadata: shortName,
      spec: {
        type: "object",
        properties: {
          refer_nic: {
            type: "string",
            description: "The parent device, for plugins that take one: macvlan, ipvlan, vlan, ...",
            maxLength: interfaceLengthMax,
            pattern: interfacePattern,
          },
          sharedStatus: {
            type: "object",
            description: "Who may use it. Absent: it is shared by plugins.",
            properties: {
              dedicatedNet: {
                type: "boolean",
                description: "True when it belongs to one plugin, which its logical networks get",
              },
              plugin: plugin("The network of the node it is dedicated to"),
              subnet: subnet("subnet", "The subnet that holds those of its logical networks"),
            },
            "x-kubernetes-validations": [
              {
                rule:
                  "!has(self.dedicatedNet) || !self.dedicatedNet || " +
                  "(has(self.plugin) && self.plugin != '')",
                message: "a dedicated physical network needs plugin",
              },
            ],
          },
        },
      },
    },
  },
  [
    { name: "Device", type: "string", jsonPath: ".spec.refer_nic" },
    { name: "Dedicated", type: "boolean", jsonPath: ".spec.sharedStatus.dedicatedNet" },
    { name: "Plugin", type: "string", jsonPath: ".spec.sharedStatus.plugin" },
    { name: "Subnet", type: "string", jsonPath: ".spec.sharedStatus.subnet" },
  ],
);

/** The resources to create in a cluster before networks can be kept in it. */
export const customResourceDefinitions: readonly CustomResourceDefinition[] = [
  networkAttachmentDefinition,
  logicalNetwork,
  physicalNetwork,
];

/** Key of what is written as a comment above an object's keys; it is no part of the object. */
export const comment = Symbol("comment");

/**
 * Plain JSON values as YAML, one document each. Strings are quoted whenever a reader of YAML 1.1 or
 * 1.2 could take them for something else; Bun's own emitter leaves 1_000 and 2024-01-01 bare, which
 * kubectl reads as a number and a time.
 *
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
  const entries = isRecord(value)
    ? Object.entries(value).filter(([, one]) => one !== undefined)
    : [];
  if (entries.length === 0) return [`${indent}${scalar(value)}`];
  const said = isRecord(value) ? (value as { [comment]?: string })[comment] : undefined;
  const above = said === undefined ? [] : said.split("\n").map((line) => `${indent}# ${line}`);
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

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function scalar(value: unknown): string {
  if (Array.isArray(value)) return "[]";
  if (typeof value === "object" && value !== null) return "{}";
  if (typeof value !== "string") return String(value);
  const isPlain = /^[A-Za-z][A-Za-z0-9_./()-]*(,? [A-Za-z0-9_./()-]+)*[,.]?$/.test(value);
  if (isPlain && !/^(y|n|yes|no|on|off|true|false|null)$/i.test(value)) return value;
  // JSON is YAML but for characters that YAML calls unprintable or a line's end.
  return JSON.stringify(value).replace(
    /[\u007f-\u009f\u2028\u2029\ufeff]/g,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}
