/** What reports read of network policy: how fresh its inputs are, whose rules, what is wrong. */
import { isoTime } from "../config/quantity.ts";
import type { RecordReader } from "./file.ts";
import type { PolicyReport, RulesetReport } from "./shape.ts";

/** Problems and rulesets listed; all of them are counted. */
const listedMax = 1000;

/** Reads what is on record of policy; undefined where nothing is. */
export function readPolicy({ database, tables }: RecordReader): PolicyReport | undefined {
  if (!tables.has("policy_watches") || !tables.has("rulesets")) return undefined;
  const { knownMs } = database
    .query("SELECT min(alive_at_ms) AS knownMs FROM policy_watches")
    .get() as { knownMs: number | null };
  const { count } = database.query("SELECT count(*) AS count FROM rulesets").get() as {
    count: number;
  };
  if (knownMs === null && count === 0) return undefined;
  const problems = database
    .query(
      `SELECT kind, namespace, name, path, problem, at_ms AS atMs FROM policy_problems
       ORDER BY at_ms DESC, namespace, name, path LIMIT ${listedMax}`,
    )
    .all() as (Omit<PolicyReport["problems"][number], "at"> & { atMs: number })[];
  return {
    knownAt: isoTime(knownMs ?? 0),
    enforced: count,
    rulesets: rulesets(database).map(({ at, namespace, pod }) => ({ at, namespace, pod })),
    problems: problems.map(({ atMs, ...rest }) => ({ at: isoTime(atMs), ...rest })),
  };
}

/** The rulesets of the pods of one name, with their text. */
export function readPodRulesets(
  { database, tables }: RecordReader,
  pod: { namespace: string; name: string },
): RulesetReport[] {
  return tables.has("rulesets") ? rulesets(database, pod) : [];
}

function rulesets(
  database: RecordReader["database"],
  pod?: { namespace: string; name: string },
): RulesetReport[] {
  // Whole rows: an older record lacks the last column.
  const rows = database
    .query(
      `SELECT * FROM rulesets WHERE ?1 IS NULL OR (pod_namespace = ?1 AND pod_name = ?2)
       ORDER BY at_ms DESC LIMIT ${listedMax}`,
    )
    .all(pod?.namespace ?? null, pod?.name ?? null) as Row[];
  return rows.map((row) => ({
    at: isoTime(row.at_ms),
    namespace: row.pod_namespace,
    pod: row.pod_name,
    ruleset: row.ruleset,
    hostRuleset: row.host_ruleset ?? "",
  }));
}

interface Row {
  pod_namespace: string;
  pod_name: string;
  at_ms: number;
  ruleset: string;
  host_ruleset?: string;
}
