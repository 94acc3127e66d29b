/**
 * What genie.db keeps of network policy: the inputs that the node agent watches, how fresh they
 * are, the ruleset of each network namespace, and what is wrong with policies. What writes is
 * called inside a transaction of `database.ts`. Rows are hostile until parsed.
 */
import type { State } from "../database.ts";
import { isObject } from "../json.ts";
import type {
  Policy,
  PolicyNamespace,
  PolicyNetwork,
  PolicyPod,
  PolicyProblem,
} from "./objects.ts";

/** Everything the agent watches for policy, by the name of its collection. */
export interface Inputs {
  networkpolicies: Policy;
  "multi-networkpolicies": Policy;
  pods: PolicyPod;
  namespaces: PolicyNamespace;
  logicalnetworks: PolicyNetwork;
  "network-attachment-definitions": PolicyNetwork;
}
/** One of the watched collections. */
export type Resource = keyof Inputs;

/** What plain NetworkPolicy is decided on. */
const plainResources: Resource[] = ["networkpolicies", "pods", "namespaces"];
const otherResources: Resource[] = [
  "multi-networkpolicies",
  "logicalnetworks",
  "network-attachment-definitions",
];

/** What must be known for a decision. @param enforce `policy.enforce` of the table */
export function neededResources(enforce: boolean): Resource[] {
  return enforce ? [...plainResources, ...otherResources] : plainResources;
}

/** One object that changed: the reduced form as JSON, or undefined when it is gone. */
export interface InputChange {
  resource: Resource;
  namespace: string;
  name: string;
  object: string | undefined;
}

/** Writes changes. Call inside a transaction. */
export function putInputs({ database }: State, changes: Iterable<InputChange>): void {
  const put = database.query("INSERT OR REPLACE INTO policy_inputs VALUES (?, ?, ?, ?)");
  const remove = database.query(
    "DELETE FROM policy_inputs WHERE resource = ? AND namespace = ? AND name = ?",
  );
  for (const { resource, namespace, name, object } of changes) {
    if (object === undefined) remove.run(resource, namespace, name);
    else put.run(resource, namespace, name, object);
  }
}

/**
 * Reads stored objects of a collection: all, or of some namespaces.
 * @throws SyntaxError for a damaged row: a policy that is left out would be an open door
 */
export function readInputs<R extends Resource>(
  { database }: State,
  resource: R,
  namespaces?: readonly string[],
): Inputs[R][] {
  const where =
    namespaces === undefined ? "" : "AND namespace IN (SELECT value FROM json_each(?2))";
  const rows = database
    .query(`SELECT object FROM policy_inputs WHERE resource = ?1 ${where}`)
    .values(...(namespaces === undefined ? [resource] : [resource, JSON.stringify(namespaces)]));
  const objects = JSON.parse(`[${rows.join(",")}]`) as Inputs[R][];
  if (resource.endsWith("policies")) {
    for (const one of objects) if (!isPolicy(one)) throw new SyntaxError("no stored policy");
  }
  return objects;
}

/** What makes a policy count; of the rest a damaged part fails whoever uses it. */
function isPolicy(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { kind, namespace, name, pods, problems } = value;
  const lists = ["ingress", "egress", "between"].map((key) => value[key] ?? []);
  return (
    (kind === "NetworkPolicy" || kind === "MultiNetworkPolicy") &&
    [namespace, name].every((one) => typeof one === "string") &&
    [problems, pods ?? [], ...lists].every(Array.isArray)
  );
}

/** Reads one stored pod. */
export function readPod(
  { database }: State,
  { namespace, name }: { namespace: string; name: string },
): PolicyPod | undefined {
  const row = database
    .query(
      `SELECT object FROM policy_inputs
       WHERE resource = 'pods' AND namespace = ? AND name = ?`,
    )
    .get(namespace, name) as { object: string } | null;
  return row ? (JSON.parse(row.object) as PolicyPod) : undefined;
}

/** Notes when each collection was known in full for the last time. Call inside a transaction. */
export function putAlive({ database }: State, alive: ReadonlyMap<Resource, number>): void {
  const put = database.query("INSERT OR REPLACE INTO policy_watches VALUES (?, ?)");
  for (const [resource, atMs] of alive) put.run(resource, atMs);
}

/** When the inputs were last known in full, ms since the epoch; 0 when one of them never was. */
export function aliveSince({ database }: State, needed: readonly Resource[]): number {
  const rows = database.query("SELECT resource, alive_at_ms AS atMs FROM policy_watches").all() as {
    resource: Resource;
    atMs: number;
  }[];
  const known = new Map(rows.map(({ resource, atMs }) => [resource, atMs]));
  return Math.min(...needed.map((resource) => known.get(resource) ?? 0));
}

/** The ruleset of a network namespace. */
export interface StoredRuleset {
  netnsId: string;
  containerId: string;
  podNamespace: string;
  podName: string;
  /** In the namespace itself; "" for none. */
  ruleset: string;
  /** In the node's, for the ends of its interfaces there; "" for none. */
  hostRuleset: string;
  /** When it was written, ms since the epoch. */
  atMs: number;
}

const rulesetColumns = `netns_id AS netnsId, container_id AS containerId,
  pod_namespace AS podNamespace, pod_name AS podName, ruleset, host_ruleset AS hostRuleset,
  at_ms AS atMs`;

/** Writes a ruleset down, before it is in force. Call inside a transaction. */
export function putRuleset({ database }: State, ruleset: StoredRuleset): void {
  const { netnsId, containerId, podNamespace, podName, ruleset: text, hostRuleset, atMs } = ruleset;
  database
    .query("INSERT OR REPLACE INTO rulesets VALUES (?, ?, ?, ?, ?, ?, ?)")
    .run(netnsId, containerId, podNamespace, podName, text, atMs, hostRuleset);
}

/** Forgets a ruleset. Call inside a transaction. */
export function forgetRuleset({ database }: State, netnsId: string): void {
  database.query("DELETE FROM rulesets WHERE netns_id = ?").run(netnsId);
}

/** The rulesets of namespaces in which nothing is attached any more. */
export function leftRulesets({ database }: State): StoredRuleset[] {
  const where = "WHERE netns_id NOT IN (SELECT netns_id FROM attachments)";
  return database.query(`SELECT ${rulesetColumns} FROM rulesets ${where}`).all() as StoredRuleset[];
}

/** The ruleset that a network namespace should have. */
export function storedRuleset({ database }: State, netnsId: string): StoredRuleset | undefined {
  const row = database
    .query(`SELECT ${rulesetColumns} FROM rulesets WHERE netns_id = ?`)
    .get(netnsId) as StoredRuleset | null;
  return row ?? undefined;
}

/** All of them. */
export function storedRulesets({ database }: State): StoredRuleset[] {
  return database.query(`SELECT ${rulesetColumns} FROM rulesets`).all() as StoredRuleset[];
}

/** Problems on record at most: a cluster of broken policies must not fill the disk. */
const problemsMax = 1000;

/**
 * Replaces what is wrong with policies. Call inside a transaction.
 * @returns the problems that were not on record before
 */
export function putProblems(
  { database }: State,
  problems: readonly PolicyProblem[],
  nowMs: number,
): PolicyProblem[] {
  const keyOf = (one: PolicyProblem) =>
    JSON.stringify([one.kind, one.namespace, one.name, one.path, one.text]);
  const wanted = new Map(problems.slice(0, problemsMax).map((one) => [keyOf(one), one]));
  const columns = "kind, namespace, name, path, problem AS text";
  const stored = database.query(`SELECT ${columns} FROM policy_problems`).all() as PolicyProblem[];
  const known = new Set(stored.map(keyOf));
  const remove = database.query(
    `DELETE FROM policy_problems
     WHERE kind = ? AND namespace = ? AND name = ? AND path = ? AND problem = ?`,
  );
  for (const one of stored) {
    if (wanted.has(keyOf(one))) continue;
    remove.run(one.kind, one.namespace, one.name, one.path, one.text);
  }
  const fresh = [...wanted].filter(([key]) => !known.has(key)).map(([, one]) => one);
  const put = database.query("INSERT OR REPLACE INTO policy_problems VALUES (?, ?, ?, ?, ?, ?)");
  for (const { kind, namespace, name, path, text } of fresh) {
    put.run(kind, namespace, name, path, text, nowMs);
  }
  return fresh;
}
