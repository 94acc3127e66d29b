/**
 * What genie.db keeps of network policy: the inputs that the node agent watches, how fresh they
 * are, the ruleset of each network namespace, and what is wrong with policies. What writes is
 * called inside a transaction of `database.ts`. Rows are hostile until parsed.
 */
import type { State } from "../database.ts";
import { isObject } from "../json.ts";
import type { HostEnd, Rules } from "./compile.ts";
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
/** What is kept besides, each by network namespace and name. */
export interface Kept extends Inputs {
  /** See host_ends.ts; `name` is that of the interface in the pod. */
  "host-ends": { name: string; end: HostEnd };
  /** One row: the addresses of the node that no pod holds. */
  "node-addresses": string[];
}

/** What plain NetworkPolicy is decided on; every API server has it. */
const plainResources: readonly Resource[] = ["networkpolicies", "pods", "namespaces"];
/** Custom resources: a server may lack them. */
export const customResources: readonly Resource[] = [
  "multi-networkpolicies",
  "logicalnetworks",
  "network-attachment-definitions",
];

/** What must be known for a decision. @param enforce `policy.enforce` of the table */
export function neededResources(enforce: boolean): readonly Resource[] {
  return enforce ? [...plainResources, ...customResources] : plainResources;
}

/** One object that changed: the reduced form as JSON, or undefined when it is gone. */
export interface InputChange {
  resource: keyof Kept;
  namespace: string;
  name: string;
  object: string | undefined;
}

const ofOne = "WHERE resource = ? AND namespace = ? AND name = ?";

/** Writes changes. Call inside a transaction. */
export function putInputs({ database }: State, changes: Iterable<InputChange>): void {
  const put = database.query("INSERT OR REPLACE INTO policy_inputs VALUES (?, ?, ?, ?)");
  const remove = database.query(`DELETE FROM policy_inputs ${ofOne}`);
  for (const { resource, namespace, name, object } of changes) {
    if (object === undefined) remove.run(resource, namespace, name);
    else put.run(resource, namespace, name, object);
  }
}

/**
 * Reads stored objects of a collection: all, of some namespaces, or one.
 * @throws SyntaxError for a damaged row: a policy that is left out would be an open door
 */
export function readInputs<R extends keyof Kept>(
  { database }: State,
  resource: R,
  namespaces?: readonly string[],
  name?: string,
): Kept[R][] {
  const where = namespaces ? "AND namespace IN (SELECT value FROM json_each(?2))" : "";
  const one = name === undefined ? "" : "AND name = ?3";
  const values = [resource, namespaces && JSON.stringify(namespaces), name];
  const rows = database
    .query(`SELECT object FROM policy_inputs WHERE resource = ?1 ${where} ${one}`)
    .values(...values.filter((value) => value !== undefined));
  const objects = JSON.parse(`[${rows.join(",")}]`) as Kept[R][];
  if (resource.endsWith("policies") && !objects.every(isPolicy)) {
    throw new SyntaxError("no stored policy");
  }
  return objects;
}

/** Checks the fields without which a policy cannot be placed; damage in others throws in use. */
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

/** Notes when each collection was known in full for the last time. Call inside a transaction. */
export function putAlive({ database }: State, alive: ReadonlyMap<Resource, number>): void {
  const put = database.query("INSERT OR REPLACE INTO policy_watches VALUES (?, ?)");
  for (const [resource, atMs] of alive) put.run(resource, atMs);
}

/** When the inputs were last known in full, ms since the epoch; 0 when one of them never was. */
export function aliveSince(
  { database }: Pick<State, "database">,
  needed: readonly Resource[],
): number {
  const rows = database.query("SELECT resource, alive_at_ms FROM policy_watches").values();
  const known = new Map(rows as [Resource, number][]);
  return Math.min(...needed.map((resource) => known.get(resource) ?? 0));
}

/** Why what is known of policies is too old to go by, and what to do; undefined where it is not. */
export function whyStale(maxAgeMs: number, aliveMs: number, nowMs: number): string | undefined {
  const ageMs = nowMs - aliveMs;
  // A time in the future is of a clock that was set back since.
  if (aliveMs > 0 && Math.abs(ageMs) <= maxAgeMs) return undefined;
  const since =
    aliveMs === 0
      ? "nothing is known of network policies on this node"
      : `network policies were last known ${Math.round(ageMs / 1000)} s ago, at ` +
        `${timeText(aliveMs)}, and policy.max_age allows ${maxAgeMs / 1000} s`;
  return `${since}; check that genie agent runs on this node and reaches the API server`;
}

/** A moment of the record; it may be damaged. */
export function timeText(ms: number): string {
  return ms > 0 && ms < 253_402_300_800_000 ? new Date(ms).toISOString() : "no date";
}

/** The rules of a network namespace. */
export interface StoredRuleset extends Rules {
  netnsId: string;
  containerId: string;
  podNamespace: string;
  podName: string;
  /** When it was written, ms since the epoch. */
  atMs: number;
}

/** Writes a ruleset down, before it is in force. Call inside a transaction. */
export function putRuleset({ database }: State, rules: StoredRuleset): void {
  const { netnsId, containerId, podNamespace, podName, ruleset, hostRuleset, atMs } = rules;
  database
    .query("INSERT OR REPLACE INTO rulesets VALUES (?, ?, ?, ?, ?, ?, ?)")
    .run(netnsId, containerId, podNamespace, podName, ruleset, atMs, hostRuleset);
}

/** Forgets a ruleset. Call inside a transaction. */
export function forgetRuleset({ database }: State, netnsId: string): void {
  database.query("DELETE FROM rulesets WHERE netns_id = ?").run(netnsId);
}

function selectRulesets({ database }: State, where: string, ...values: string[]): StoredRuleset[] {
  const query = database.query(
    `SELECT netns_id AS netnsId, container_id AS containerId, pod_namespace AS podNamespace,
       pod_name AS podName, ruleset, host_ruleset AS hostRuleset, at_ms AS atMs
     FROM rulesets ${where}`,
  );
  return query.all(...values) as StoredRuleset[];
}

/** The ruleset that a network namespace should have. */
export function storedRuleset(state: State, netnsId: string): StoredRuleset | undefined {
  return selectRulesets(state, "WHERE netns_id = ?", netnsId)[0];
}

/** All of them. */
export function storedRulesets(state: State): StoredRuleset[] {
  return selectRulesets(state, "");
}

/** The rulesets of namespaces in which nothing is attached any more. */
export function leftoverRulesets(state: State): StoredRuleset[] {
  return selectRulesets(state, "WHERE netns_id NOT IN (SELECT netns_id FROM attachments)");
}

/** Problems on record at most: a cluster of broken policies must not fill the disk. */
const problemsMax = 1000;

/**
 * Replaces what is wrong with policies. Call inside a transaction.
 * @returns the problems that were not on record before
 */
export function putProblems({ database }: State, problems: readonly PolicyProblem[], atMs: number) {
  const rowOf = (one: PolicyProblem) =>
    [one.kind, one.namespace, one.name, one.path, one.text] as const;
  const keyOf = (one: PolicyProblem) => JSON.stringify(rowOf(one));
  const fresh = new Map(problems.slice(0, problemsMax).map((one) => [keyOf(one), one]));
  const columns = "kind, namespace, name, path, problem";
  const stored = database.query(`SELECT ${columns} AS text FROM policy_problems`).all();
  const remove = database.query(`DELETE FROM policy_problems WHERE (${columns}) = (?, ?, ?, ?, ?)`);
  for (const one of stored as PolicyProblem[]) {
    const isStill = fresh.delete(keyOf(one));
    if (!isStill) remove.run(...rowOf(one));
  }
  const put = database.query("INSERT OR REPLACE INTO policy_problems VALUES (?, ?, ?, ?, ?, ?)");
  for (const one of fresh.values()) put.run(...rowOf(one), atMs);
  return [...fresh.values()];
}
