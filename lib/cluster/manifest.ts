/**
 * What a cluster needs of genie, for `kubectl apply` and for those who watch it: the documents of
 * this folder, filled with what varies. The same for the same options.
 */
import { type Config, parseListen } from "../config/schema.ts";
import alerts from "./alerts.yaml" with { type: "text" };
import containerfile from "./containerfile.txt" with { type: "text" };
import crds from "./crds.yaml" with { type: "text" };
import foldersFile from "./folders.yaml" with { type: "text" };
import manifest from "./manifest.yaml" with { type: "text" };
import rightsFile from "./rights.yaml" with { type: "text" };
import webhook from "./webhook.yaml" with { type: "text" };
import { comment, fillTemplate, type KubeObject } from "./yaml.ts";

/** The dashboard as Grafana imports it (schema 39): it asks for its data source, offers nodes. */
export { default as dashboard } from "./dashboard.json";

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

/** A right to call the API, and why it is needed. */
export interface ApiRight {
  apiGroups: string[];
  resources: string[];
  verbs: string[];
  why: string;
  /** Granted only with this feature; absent: always. */
  feature?: Feature;
}

/** Every call to the API that genie or its agent makes, none else. */
export const rights = Bun.YAML.parse(rightsFile) as readonly ApiRight[];

/** The resources to create in a cluster before networks can be kept in it. */
export const customResourceDefinitions: readonly KubeObject[] = fillTemplate(crds);

/** All objects, in the order in which they must be created. */
export function makeManifest({ namespace, image, features, table }: ManifestOptions): KubeObject[] {
  const { confDir, binDirs, agent } = table.config;
  const folders = nodeFolders(table.config);
  const granted = rights.filter(({ feature }) => feature === undefined || features.has(feature));
  const objects = fillTemplate(manifest, {
    namespace,
    image,
    rights: granted.map(({ why, feature: _, ...right }) => ({ [comment]: why, ...right })),
    table: table.text,
    sha256: table.sha256,
    confDir,
    binDir: binDirs[0] ?? "/opt/cni/bin",
    installMounts: folders.flatMap(({ name, path, install }) =>
      install ? [{ name, mountPath: `/host${path}`, ...install }] : [],
    ),
    agentEnv: agent.followAnnotations ? [nodeName] : undefined,
    ...makeProbes(agent.listen),
    agentMounts: folders.map(({ name, path, agent }) => ({ name, mountPath: path, ...agent })),
    volumes: folders.map(({ name, path, why }) => ({
      [comment]: why,
      name,
      hostPath: { path, type: "DirectoryOrCreate" },
    })),
  });
  return objects.toSpliced(1, 0, ...customResourceDefinitions).filter(({ kind, metadata }) => {
    if (metadata.name === "genie-report") return features.has("cluster-report");
    return kind !== "Namespace" || namespace !== "kube-system";
  });
}

/** Whose pods the agent follows: without it, it would watch those of all nodes. */
const nodeName = {
  name: "NODE_NAME",
  valueFrom: { fieldRef: { fieldPath: "spec.nodeName" } },
};

/** A folder of the node: who mounts it, and where. */
interface NodeFolder {
  name: string;
  path: string;
  why: string;
  /** How each container mounts it; absent: it does not need it. */
  install?: Mount;
  agent: Mount;
}
type Mount = { readOnly?: true; mountPropagation?: "HostToContainer" };

/** The folders of the node, none of which lies in another one. */
function nodeFolders({ confDir, binDirs, stateDir }: Config): NodeFolder[] {
  const fixed: unknown[] = fillTemplate(foldersFile, { confDir, stateDir });
  const all = [
    ...(fixed as NodeFolder[]),
    ...binDirs.map(
      (path, i): NodeFolder => ({
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

/** Where the kubelet asks the agent how it is; nowhere, when it does not listen. */
function makeProbes(listen: string): Record<string, unknown> {
  const address = parseListen(listen);
  if (!address) return {};
  const { hostname, port } = address;
  // Who listens everywhere listens here too.
  const here: Record<string, string> = { "0.0.0.0": "127.0.0.1", "::": "::1" };
  const host = here[hostname] ?? hostname;
  const probe = { httpGet: { host, port, path: "/healthz" }, timeoutSeconds: 5 };
  return {
    agentPorts: [{ name: "metrics", containerPort: port }],
    livenessProbe: { ...probe, periodSeconds: 30, failureThreshold: 4 },
    readinessProbe: { ...probe, periodSeconds: 10 },
  };
}

/**
 * What a cluster needs for `genie webhook`, in the order in which it must be created.
 * @param place.ca PEM of the authority that signed the certificate of the webhook
 */
export function makeWebhook(place: { namespace: string; image: string; ca: string }): KubeObject[] {
  return fillTemplate(webhook, { ...place, ca: Buffer.from(place.ca).toString("base64") });
}

/** The alert rules as objects of the Prometheus operator. */
export function makeAlerts(namespace: string): KubeObject[] {
  return fillTemplate(alerts, { namespace });
}

/**
 * How to make the container image of the manifest: genie and the tools that it starts, with the
 * libraries they need and nothing else. The image is built in the folder that has `dist/genie`.
 */
export function formatContainerfile(version: string): string {
  return containerfile.replace(/\$\{version\}/g, version);
}
