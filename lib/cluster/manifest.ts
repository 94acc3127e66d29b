/**
 * Everything a cluster needs of genie, as objects for `kubectl apply`. Pure: options in, objects
 * out, the same for the same options. What an operator may ask about has its reason beside it.
 * Sources: Kubernetes API reference (apps/v1, rbac.authorization.k8s.io), Pod Security Standards.
 */
import { type Config, parseListen } from "../config/schema.ts";
import { comment, customResourceDefinitions } from "./crds.ts";
import { makeReaders } from "./report_access.ts";

/** What an install may have besides: each brings rights, objects or both. */
export const features = ["policy", "switch", "cluster-report"] as const;
/** One of {@link features}. */
export type Feature = (typeof features)[number];

/** What varies. */
export interface ManifestOptions {
  namespace: string;
  image: string;
  features: ReadonlySet<Feature>;
  /** The plugin table: its text, its SHA-256, and what it says. */
  table: { text: string; sha256: string; config: Config };
}

/** An object of Kubernetes, as far as every object is alike. */
export interface KubeObject {
  apiVersion: string;
  kind: string;
  metadata: { name: string; namespace?: string; [key: string]: unknown };
  [key: string]: unknown;
}

/** Name of every object that is ours alone. */
const name = "genie";
const labels = { "app.kubernetes.io/name": name };
/** A right, and why it is needed. */
export interface Rule {
  apiGroups: string[];
  resources: string[];
  verbs: string[];
  why: string;
  /** Only with this feature; absent: always. */
  feature?: Feature;
}

const definitions = {
  apiGroups: ["k8s.cni.cncf.io"],
  resources: ["network-attachment-definitions"],
};

/** Every call to the API that genie or its agent makes, none else. */
export const rules: readonly Rule[] = [
  {
    apiGroups: [""],
    resources: ["pods"],
    verbs: ["get"],
    why: "ADD reads a pod's annotations and service account where the runtime does not say them",
  },
  {
    apiGroups: [""],
    resources: ["pods/status"],
    verbs: ["patch"],
    why: "publishes the networks of a pod in its annotations; its spec is out of reach",
  },
  {
    apiGroups: [""],
    resources: ["events"],
    verbs: ["create", "get", "patch"],
    why: "tells on a pod why it was denied a network, and counts when that happens again",
  },
  {
    ...definitions,
    verbs: ["get"],
    why: "ADD reads the networks that a pod names",
  },
  {
    apiGroups: ["alpha.network.k8s.io"],
    resources: ["logicalnetworks"],
    verbs: ["get", "list"],
    why: "ADD reads those that a pod names; sub-subnets must not overlap those of others",
  },
  {
    apiGroups: ["alpha.network.k8s.io"],
    resources: ["physicalnetworks"],
    verbs: ["get"],
    why: "ADD reads what a logical network lies on",
  },
  {
    feature: "policy",
    apiGroups: [""],
    resources: ["pods", "namespaces"],
    verbs: ["list", "watch"],
    why: "the peers that policies select, by their labels and addresses",
  },
  {
    feature: "policy",
    apiGroups: ["networking.k8s.io"],
    resources: ["networkpolicies"],
    verbs: ["list", "watch"],
    why: "the policies to enforce",
  },
  {
    feature: "policy",
    apiGroups: ["k8s.cni.cncf.io"],
    resources: ["multi-networkpolicies"],
    verbs: ["list", "watch"],
    why: "the policies to enforce on further networks",
  },
  {
    feature: "policy",
    ...definitions,
    verbs: ["list", "watch"],
    why: "the networks that policies name",
  },
  {
    feature: "policy",
    apiGroups: ["alpha.network.k8s.io"],
    resources: ["logicalnetworks"],
    verbs: ["list", "watch"],
    why: "the networks that policies name",
  },
  {
    feature: "switch",
    apiGroups: [""],
    resources: ["pods"],
    verbs: ["list", "watch"],
    why: "the agent follows edits of the annotations of this node's pods",
  },
];

/** A part of the manifest. Further ones hang in here. */
interface Section {
  /** Only with this feature; absent: always. */
  feature?: Feature;
  objects: (options: ManifestOptions) => readonly KubeObject[];
}

const sections: readonly Section[] = [
  { objects: ({ namespace }) => (namespace === "kube-system" ? [] : [makeNamespace(namespace)]) },
  {
    objects: () =>
      customResourceDefinitions.map(({ apiVersion, kind, metadata, spec }) => ({
        apiVersion,
        kind,
        metadata,
        spec,
      })),
  },
  { objects: makeAccess },
  { feature: "cluster-report", objects: ({ namespace }) => makeReaders(namespace, labels) },
  { objects: ({ namespace, table }) => [makeTable(namespace, table.text)] },
  { objects: (options) => [makeDaemonSet(options)] },
];

/** All objects, in the order in which they must be created. */
export function makeManifest(options: ManifestOptions): KubeObject[] {
  return sections
    .filter(({ feature }) => feature === undefined || options.features.has(feature))
    .flatMap(({ objects }) => objects(options));
}

function makeNamespace(namespace: string): KubeObject {
  return {
    apiVersion: "v1",
    kind: "Namespace",
    metadata: {
      name: namespace,
      labels: {
        [comment]: "what the DaemonSet needs of the node is what this standard calls privileged",
        "pod-security.kubernetes.io/enforce": "privileged",
      },
    },
  };
}

/** The identity of genie's calls on the nodes and of the agent, and its rights. */
function makeAccess({ namespace, features: wanted }: ManifestOptions): KubeObject[] {
  const group = "rbac.authorization.k8s.io";
  const granted = rules.filter(({ feature }) => feature === undefined || wanted.has(feature));
  return [
    { apiVersion: "v1", kind: "ServiceAccount", metadata: { name, namespace, labels } },
    {
      apiVersion: `${group}/v1`,
      kind: "ClusterRole",
      metadata: { name, labels },
      rules: granted.map(({ why, feature: _, ...rule }) => ({ [comment]: why, ...rule })),
    },
    {
      apiVersion: `${group}/v1`,
      kind: "ClusterRoleBinding",
      metadata: { name, labels },
      roleRef: { apiGroup: group, kind: "ClusterRole", name },
      subjects: [{ kind: "ServiceAccount", name, namespace }],
    },
  ];
}

function makeTable(namespace: string, text: string): KubeObject {
  return {
    apiVersion: "v1",
    kind: "ConfigMap",
    metadata: { name, namespace, labels },
    data: { "plugins.toml": text },
  };
}

/** A folder of the node: who mounts it, and where. */
interface Folder {
  name: string;
  path: string;
  why: string;
  /** How each container mounts it; absent: it does not need it. */
  install?: Mount;
  agent: Mount;
}
type Mount = { readOnly?: true; mountPropagation?: "HostToContainer" };

/** The folders of the node, none of which lies in another one. */
function folders({ confDir, binDirs, stateDir }: Config): Folder[] {
  const why = {
    etc: "the CNI config, the plugin table and the credentials; the agent renews the token",
    state: "the record; host-local keeps its addresses beside it",
    netns: "the pods' network namespaces; those of new pods must appear",
  };
  const all: Folder[] = [
    { name: "etc-cni", path: "/etc/cni", why: why.etc, install: {}, agent: {} },
    { name: "conf", path: confDir, why: "the CNI config", install: {}, agent: {} },
    { name: "state", path: "/var/lib/cni", why: why.state, agent: {} },
    { name: "record", path: stateDir, why: "the record", agent: {} },
    {
      name: "netns",
      path: "/var/run/netns",
      why: why.netns,
      agent: { readOnly: true, mountPropagation: "HostToContainer" },
    },
    ...binDirs.map(
      (path, i): Folder => ({
        name: `bin-${i}`,
        path,
        why: i === 0 ? "the plugins, genie among them" : "plugins",
        install: i === 0 ? {} : { readOnly: true },
        agent: { readOnly: true },
      }),
    ),
  ];
  const once = [...new Map(all.map((one) => [one.path, one])).values()];
  return once.filter(({ path }) => !all.some((one) => path.startsWith(`${one.path}/`)));
}

function makeDaemonSet({ namespace, image, table }: ManifestOptions): KubeObject {
  const { confDir, binDirs } = table.config;
  const mounts = folders(table.config);
  const template = {
    metadata: {
      labels,
      annotations: {
        [comment]: "a new table is a new rollout",
        "genie/table-sha256": table.sha256,
      },
    },
    spec: {
      ...podOptions(),
      initContainers: [
        {
          name: "install",
          image,
          args: [
            "install",
            "--host-root=/host",
            "--table=/etc/genie/plugins.toml",
            `--conf-dir=${confDir}`,
            `--bin-dir=${binDirs[0] ?? "/opt/cni/bin"}`,
          ],
          resources: { requests: { cpu: "10m", memory: "64Mi" }, limits: { memory: "512Mi" } },
          securityContext: {
            runAsUser: 0,
            readOnlyRootFilesystem: true,
            allowPrivilegeEscalation: false,
            capabilities: { drop: ["ALL"] },
          },
          volumeMounts: [
            { name: "table", mountPath: "/etc/genie", readOnly: true },
            { name: "tmp", mountPath: "/tmp" },
            ...mounts.flatMap(({ name, path, install }) =>
              install ? [{ name, mountPath: `/host${path}`, ...install }] : [],
            ),
          ],
        },
      ],
      containers: [makeAgent(image, table.config.agent, mounts)],
      volumes: [
        { name: "table", configMap: { name } },
        { name: "tmp", emptyDir: { sizeLimit: "256Mi" } },
        ...mounts.map(({ name, path, why }) => ({
          [comment]: why,
          name,
          hostPath: { path, type: "DirectoryOrCreate" },
        })),
      ],
    },
  };
  return {
    apiVersion: "apps/v1",
    kind: "DaemonSet",
    metadata: { name, namespace, labels },
    spec: {
      selector: { matchLabels: labels },
      updateStrategy: {
        [comment]: "a node's pods start and stop without its agent, so a tenth of them may wait",
        type: "RollingUpdate",
        rollingUpdate: { maxUnavailable: "10%" },
      },
      template,
    },
  };
}

/** What is said of the pod as a whole. */
function podOptions(): object {
  return {
    [comment]:
      "the node's network: the agent must run before the pods' network does\n" +
      "the node's processes: the record names those that hold a pod, and they must be seen",
    hostNetwork: true,
    hostPID: true,
    dnsPolicy: "ClusterFirstWithHostNet",
    serviceAccountName: name,
    priorityClassName: "system-node-critical",
    nodeSelector: { "kubernetes.io/os": "linux" },
    tolerations: [{ operator: "Exists" }],
    terminationGracePeriodSeconds: 10,
    securityContext: {
      seccompProfile: { type: "RuntimeDefault" },
      seLinuxOptions: {
        [comment]: "where SELinux is on, this type alone may use the folders of the node",
        type: "spc_t",
      },
    },
  };
}

/** Where the kubelet asks the agent how it is; nowhere, when it does not listen. */
function makeProbes(agent: Config["agent"]): object {
  const listen = parseListen(agent.listen);
  if (!listen) return {};
  const { hostname, port } = listen;
  // Who listens everywhere listens here too.
  const here: Record<string, string> = { "0.0.0.0": "127.0.0.1", "::": "::1" };
  const host = here[hostname] ?? hostname;
  const probe = { httpGet: { host, port, path: "/healthz" }, timeoutSeconds: 5 };
  return {
    ports: [{ name: "metrics", containerPort: port }],
    livenessProbe: { ...probe, periodSeconds: 30, failureThreshold: 4 },
    readinessProbe: { ...probe, periodSeconds: 10 },
  };
}

/** Whose pods the agent follows: without it, it would watch those of all nodes. */
const nodeName = {
  name: "NODE_NAME",
  valueFrom: { fieldRef: { fieldPath: "spec.nodeName" } },
};

function makeAgent(image: string, agent: Config["agent"], mounts: readonly Folder[]): object {
  return {
    name: "agent",
    image,
    args: ["agent"],
    ...(agent.followAnnotations && { env: [nodeName] }),
    securityContext: {
      runAsUser: 0,
      readOnlyRootFilesystem: true,
      capabilities: {
        [comment]:
          "NET_ADMIN: rulesets, and the interfaces that plugins take away\n" +
          "SYS_ADMIN: setns(2) into a pod's network namespace",
        drop: ["ALL"],
        add: ["NET_ADMIN", "SYS_ADMIN"],
      },
    },
    resources: { requests: { cpu: "20m", memory: "96Mi" }, limits: { memory: "512Mi" } },
    ...makeProbes(agent),
    volumeMounts: [
      { name: "tmp", mountPath: "/tmp" },
      ...mounts.map(({ name, path, agent }) => ({ name, mountPath: path, ...agent })),
    ],
  };
}
