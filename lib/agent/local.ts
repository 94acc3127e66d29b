/**
 * The network namespaces of this node with attachments, as the node agent sees them: what the
 * record says of each, and whether the kernel has it.
 */
import type { Host } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type State, write } from "../database.ts";
import { hostTables } from "../policy/compile.ts";
import type { HostEnd } from "../policy/host_end.ts";
import { readRuleset, rulesetHash } from "../policy/nft.ts";
import type { PolicyProblem } from "../policy/objects.ts";
import {
  type Attached,
  findHostEnds,
  guardedOf,
  type Rules,
  removeFromHost,
} from "../policy/rulesets.ts";
import { forgetRuleset, leftRulesets, storedRulesets } from "../policy/store.ts";
import { attachments, type PodIdentity } from "../state.ts";

/** One network namespace of this node with attachments. */
export interface Local {
  netnsId: string;
  netns: string;
  containerId: string;
  pod: PodIdentity;
  made: Attached[];
  /** On record. */
  rules: Rules;
  /** See {@link findHostEnds}. */
  ends: Map<string, HostEnd>;
  problems: PolicyProblem[];
}

/** Reads what is attached. @param before of the last time: what did not change is not looked up */
export async function readLocal(
  host: Host,
  { policy }: Config,
  state: State,
  before: ReadonlyMap<string, Local>,
): Promise<Map<string, Local>> {
  const rulesets = new Map(storedRulesets(state).map((one) => [one.netnsId, one]));
  const all = new Map<string, Local>();
  for (const [id, rows] of Map.groupBy(attachments(host, state), (one) => one.netnsId)) {
    const made = guardedOf(rows);
    const first = made.find(({ attachment }) => attachment.pod.namespace !== "");
    if (!first || id === "") continue;
    const { netns, containerId, pod } = first.attachment;
    const stored = rulesets.get(id);
    const { ruleset = "", hostRuleset = "" } = stored ?? {};
    const { problems = [] } = before.get(id) ?? {};
    all.set(id, {
      ...{ netnsId: id, netns, pod, made, problems, ends: new Map() },
      containerId: stored?.containerId ?? containerId,
      rules: { ruleset, hostRuleset },
    });
  }
  for (const [id, one] of all) {
    const known = before.get(id);
    const isSame = known && isSameMade(known.made, one.made);
    one.ends = isSame ? known.ends : await findHostEnds(host, policy.where, one.made);
  }
  return all;
}

/** The same interfaces, with the same ends on the node? */
export function isSameMade(a: readonly Attached[], b: readonly Attached[]): boolean {
  const keyOf = (made: readonly Attached[]) =>
    JSON.stringify(made.map(({ attachment, result }) => [attachment.ifName, result.interfaces]));
  return keyOf(a) === keyOf(b);
}

/** Rules of namespaces that are gone, after a DEL that could not be heard or a reboot. */
export async function forgetLeft(host: Host, state: State): Promise<void> {
  for (const one of leftRulesets(state)) {
    await removeFromHost(host, one);
    write(state, () => forgetRuleset(state, one.netnsId));
  }
}

/** Does policy isolate anything there? */
export function hasRules({ rules }: Local): boolean {
  return rules.ruleset !== "" || rules.hostRuleset !== "";
}

/** Are the tables of a pod there, with what we wrote? Cheap: their rules are not compared. */
export async function isThere(host: Host, { netns, rules, containerId }: Local): Promise<boolean> {
  const wanted = (text: string) => (text === "" ? undefined : rulesetHash(text));
  if ((await readRuleset(host, netns)) !== wanted(rules.ruleset)) return false;
  for (const table of hostTables(containerId)) {
    if (!rules.hostRuleset.includes(`\ntable ${table} {`)) continue;
    if ((await readRuleset(host, undefined, table)) !== wanted(rules.hostRuleset)) return false;
  }
  return true;
}
