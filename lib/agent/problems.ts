/**
 * Tells what is wrong with policies as Events on them. Best effort: `genie report` has them all.
 */
import { type Host, log } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { postEvent } from "../kubernetes/event.ts";
import type { PolicyProblem } from "../policy/objects.ts";
import { apiVersionOf } from "../policy/watch.ts";

/** Events of one gathering at most. */
const eventsMax = 20;

/** Posts what is new, one after the other. @param uidOf of the policy that a problem is about */
export async function postProblems(
  host: Host,
  config: Config,
  problems: readonly PolicyProblem[],
  uidOf: (problem: PolicyProblem) => string | undefined,
): Promise<void> {
  for (const problem of problems.slice(0, eventsMax)) {
    const { kind, namespace, name, path, text } = problem;
    log(host, "warn", `Problem in a network policy: ${text}`, { kind, namespace, name, path });
    const apiVersion = apiVersionOf(kind);
    const about = { kind, apiVersion, namespace, name, uid: uidOf(problem) ?? "" };
    const note = `${path}: ${text}`;
    await postEvent(host, config, { about, type: "Warning", reason: "PolicyProblem", note });
  }
}
