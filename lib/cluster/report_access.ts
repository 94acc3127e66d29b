/**
 * Who may read the reports of all nodes: roles as objects for `kubectl apply`. Pure.
 * Source: Kubernetes API reference (rbac.authorization.k8s.io), connect to proxies.
 */
import { comment } from "./crds.ts";

/**
 * Rights for people who run `genie report --cluster`; bound to nobody, least of all to nodes.
 *
 * @param namespace of the agents
 */
export function makeReaders(namespace: string, labels: Record<string, string>) {
  const group = "rbac.authorization.k8s.io";
  const metadata = { name: "genie-report", labels };
  const right = (why: string, verb: string, resource: string) => ({
    [comment]: why,
    ...{ apiGroups: [""], resources: [resource], verbs: [verb] },
  });
  return [
    {
      apiVersion: `${group}/v1`,
      kind: "Role",
      metadata: {
        [comment]: `enough for genie report --cluster --agents ${namespace}`,
        ...{ ...metadata, namespace },
      },
      rules: [
        right("which nodes have an agent", "list", "pods"),
        right("asks the agents for their reports", "get", "pods/proxy"),
      ],
    },
    {
      apiVersion: `${group}/v1`,
      kind: "ClusterRole",
      metadata: {
        [comment]:
          "for genie report --cluster where agents run outside of pods; give it to nobody who\n" +
          "may not do everything: nodes/proxy reaches every kubelet too, which runs commands",
        ...metadata,
      },
      rules: [
        right("which nodes there are", "list", "nodes"),
        right("asks the agents for their reports", "get", "nodes/proxy"),
      ],
    },
  ];
}
