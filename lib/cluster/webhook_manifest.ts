/**
 * What a cluster needs for `genie webhook`: it runs beside the nodes' genie, with no right but to
 * read logical and physical networks, and the API server asks it about every Logicalnetwork. Pure.
 * Source: Kubernetes admissionregistration.k8s.io/v1 ValidatingWebhookConfiguration.
 */
import { comment } from "./crds.ts";
import type { KubeObject } from "./manifest.ts";

/** What varies. */
export interface WebhookOptions {
  namespace: string;
  image: string;
  /** PEM of the authority that signed the certificate of the webhook. */
  ca: string;
}

const name = "genie-webhook";
const labels = { "app.kubernetes.io/name": name };
const port = 8443;
const group = "rbac.authorization.k8s.io";
const networks = ["alpha.network.k8s.io"];

/** All objects, in the order in which they must be created. */
export function makeWebhook({ namespace, image, ca }: WebhookOptions): KubeObject[] {
  return [
    { apiVersion: "v1", kind: "ServiceAccount", metadata: { name, namespace, labels } },
    {
      apiVersion: `${group}/v1`,
      kind: "ClusterRole",
      metadata: { name, labels },
      rules: [
        { apiGroups: networks, resources: ["logicalnetworks"], verbs: ["list"] },
        { apiGroups: networks, resources: ["physicalnetworks"], verbs: ["get"] },
      ],
    },
    {
      apiVersion: `${group}/v1`,
      kind: "ClusterRoleBinding",
      metadata: { name, labels },
      roleRef: { apiGroup: group, kind: "ClusterRole", name },
      subjects: [{ kind: "ServiceAccount", name, namespace }],
    },
    makeDeployment(namespace, image),
    {
      apiVersion: "v1",
      kind: "Service",
      metadata: { name, namespace, labels },
      spec: { selector: labels, ports: [{ port: 443, targetPort: port }] },
    },
    makeConfiguration(namespace, ca),
  ];
}

function makeDeployment(namespace: string, image: string): KubeObject {
  const container = {
    name: "webhook",
    image,
    args: ["webhook", "--cert=/tls/tls.crt", "--key=/tls/tls.key", `--listen=0.0.0.0:${port}`],
    ports: [{ containerPort: port }],
    readinessProbe: { httpGet: { path: "/healthz", port, scheme: "HTTPS" } },
    livenessProbe: { httpGet: { path: "/healthz", port, scheme: "HTTPS" }, periodSeconds: 20 },
    resources: { requests: { cpu: "10m", memory: "64Mi" }, limits: { memory: "256Mi" } },
    securityContext: {
      readOnlyRootFilesystem: true,
      allowPrivilegeEscalation: false,
      capabilities: { drop: ["ALL"] },
    },
    volumeMounts: [{ name: "tls", mountPath: "/tls", readOnly: true }],
  };
  return {
    apiVersion: "apps/v1",
    kind: "Deployment",
    metadata: { name, namespace, labels },
    spec: {
      replicas: 2,
      selector: { matchLabels: labels },
      template: {
        metadata: { labels },
        spec: {
          serviceAccountName: name,
          securityContext: {
            runAsNonRoot: true,
            runAsUser: 65532,
            fsGroup: 65532,
            seccompProfile: { type: "RuntimeDefault" },
          },
          containers: [container],
          volumes: [
            {
              [comment]: `a certificate for ${name}.${namespace}.svc, as cert-manager writes it`,
              name: "tls",
              secret: { secretName: `${name}-tls`, defaultMode: 0o440 },
            },
          ],
        },
      },
    },
  };
}

function makeConfiguration(namespace: string, ca: string): KubeObject {
  return {
    apiVersion: "admissionregistration.k8s.io/v1",
    kind: "ValidatingWebhookConfiguration",
    metadata: { name, labels },
    webhooks: [
      {
        name: "logicalnetworks.alpha.network.k8s.io",
        admissionReviewVersions: ["v1"],
        clientConfig: {
          service: { namespace, name, path: "/validate", port: 443 },
          caBundle: Buffer.from(ca).toString("base64"),
        },
        rules: [
          {
            apiGroups: networks,
            apiVersions: ["v1"],
            operations: ["CREATE", "UPDATE"],
            resources: ["logicalnetworks"],
            scope: "Namespaced",
          },
        ],
        failurePolicy: "Fail",
        matchPolicy: "Equivalent",
        sideEffects: "None",
        timeoutSeconds: 10,
      },
    ],
  };
}
