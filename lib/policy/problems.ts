/** What an operator must look at in each policy, beside what concerns one pod alone. Pure. */
import type { Policy, PolicyProblem } from "./objects.ts";
import { type PolicyWorld, peerPods } from "./peers.ts";

/** More peers than this in one policy are worth a word: every change of it costs every node. */
const peersMax = 1000;

/** What is wrong with each policy: unreadable parts, nothing selected, unknown networks. */
export function policyProblems(world: PolicyWorld): PolicyProblem[] {
  return [...world.policies.values()].flat().flatMap((policy) => {
    const { kind, namespace, name, networks, between } = policy;
    const found = [...policy.problems];
    const add = (path: string, text: string) => found.push({ kind, namespace, name, path, text });
    if (policy.pods !== null && between === undefined) {
      if (peerPods(world, namespace, { pods: policy.pods }).length === 0) {
        add("spec.podSelector", `it selects no pod of namespace ${namespace}: correct its labels`);
      }
    }
    for (const one of unknownNetworks(world, namespace, networks ?? [])) {
      add("metadata.annotations", `unknown network "${one}": no object and no pod has it`);
    }
    for (const one of unknownLogical(world, policy)) {
      add("metadata.annotations", `unknown network "${one}": create it, or correct the name`);
    }
    const rules = [...(policy.ingress ?? []), ...(policy.egress ?? [])];
    const count = rules.reduce((sum, { peers = [] }) => sum + peers.length, 0);
    if (count > peersMax) {
      add(
        "spec",
        `it lists ${count} peers: use namespaceSelector or wider CIDRs; all are in force`,
      );
    }
    return found;
  });
}

function unknownNetworks(world: PolicyWorld, namespace: string, networks: string[]): string[] {
  const isKnown = (name: string) => world.networks.has(name) || world.members.has(name);
  const plain = new Set(networks.filter((name) => !name.includes("/")));
  return networks.filter((name) => {
    if (isKnown(name)) return false;
    if (plain.has(name)) return false;
    const short = name.startsWith(`${namespace}/`) ? name.slice(namespace.length + 1) : name;
    return !(plain.has(short) && isKnown(short));
  });
}

function unknownLogical(world: PolicyWorld, { namespace, between = [] }: Policy): string[] {
  const names = between.flatMap(({ network, peers }) => [network, ...peers]);
  const asked = [...new Set(names)].filter((name) => name !== "*");
  return asked.filter((name) => !world.networks.has(`${namespace}/${name}`));
}
