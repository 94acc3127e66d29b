/**
 * `genie status`: one screen of what this node's networks do now, and what to do next. What is
 * wrong with the installation comes from the checks of `genie doctor`, numbers from the record.
 * Changes nothing.
 */
import { statSync } from "node:fs";
import { hostname } from "node:os";
import { join } from "node:path";
import manifest from "../../package.json";
import { findPlugins } from "../binaries.ts";
import type { Host } from "../call.ts";
import { oneLine, toCniError } from "../cni.ts";
import { parseListen } from "../config/schema.ts";
import type { Flags } from "../config/usage.ts";
import { takeFileLock } from "../policy/rulesets.ts";
import { makeReport } from "../report/model.ts";
import { formatAge, formatCount, plural } from "../report/quantity.ts";
import { countAddresses } from "../report/record_reader.ts";
import { formatTable, visibleText } from "../report/table.ts";
import { fillSections } from "../report/text.ts";
import { askNetwork } from "../status.ts";
import { examine, lookAtNode } from "./doctor.ts";
import healthTemplate from "./health.txt" with { type: "text" };
import {
  agentLock,
  type CheckResult,
  configAt,
  type Finding,
  listFindings,
  type NodeView,
  problem,
  warning,
} from "./node_view.ts";

/** The checks of `genie doctor` that take no longer than a person likes to wait. */
const checks = ["policy", "installed", "order", "runtime", "table", "plugins", "capacity", "disk"];
/** What counts as lately, in ms. */
const latelyMs = 3_600_000;
/** How long the agent may take to answer, in ms. */
const agentMs = 1_000;
/** Most lines of the agent that are shown. */
const linesMax = 10;

/**
 * Runs `genie status`. @returns exit status: 1 when something is wrong
 * @param width columns of the terminal, Infinity for none
 */
export async function runStatus(host: Host, flags: Flags, width: number): Promise<number> {
  const health = await lookAt(await lookAtNode(host, flags));
  host.stdout(flags["json"] ? `${JSON.stringify(health, null, 2)}\n` : format(health, width));
  return health.ok ? 0 : 1;
}

/** The document of `genie status --json`. Its `version` counts breaking changes. */
type Health = Awaited<ReturnType<typeof lookAt>>;

async function lookAt(view: NodeView) {
  const [findings, agent, ready] = await Promise.all([
    examine(view, checks),
    lookAtAgent(view),
    lookAtNetworks(view),
  ]);
  const { of, error, lately, ...record } = lookAtRecord(view);
  const wrong = [
    ...findings.filter(({ verdict }) => verdict !== "ok"),
    ...adviceOn(agent, { error, lately, ...record }),
  ].sort((a, b) => rank(a) - rank(b));
  const sayOf = (name: string) =>
    findings.filter(({ check, verdict }) => check === name && verdict === "ok");
  return {
    version: 1,
    genie: manifest.version,
    node: hostname(),
    at: new Date(view.host.now()).toISOString(),
    ok: !wrong.some(({ verdict }) => verdict === "problem"),
    runtime: [...sayOf("runtime"), ...sayOf("order")].map(({ detail }) => detail),
    confDir: view.confDir,
    networks: ready.map((one) => ({ ...one, ...of(one.network) })),
    agent,
    ...record,
    findings: wrong,
    next: wrong[0]?.remedy ?? "",
  };
}

const rank = ({ verdict }: Finding) => ["problem", "warning", "ok"].indexOf(verdict);

/**
 * Why an ADD on each network would fail now; "" when it would not, as its plugins tell. In a
 * container, where they cannot run, they need only exist.
 */
async function lookAtNetworks({ host, networks, root, config }: NodeView) {
  const search = { dirs: configAt(root, config).binDirs, ownType: "genie" };
  return Promise.all(
    networks.map(async (network) => {
      const ask = async () => {
        if (root === "/") await askNetwork(host, network, search);
        else findPlugins(network, search);
        return "";
      };
      const reason = await ask().catch((error: unknown) => toCniError(error).message);
      return { network: network.name, reason };
    }),
  );
}

/** Is the agent there, since when (ISO 8601), and what does it say is wrong with itself? */
interface AgentHealth {
  runs: boolean;
  since: string | null;
  says: string[];
}

async function lookAtAgent({ host, at, config }: NodeView): Promise<AgentHealth> {
  const file = join(at(config.stateDir), agentLock);
  const stat = statSync(file, { throwIfNoEntry: false });
  if (!stat || (await isFree(host, file))) return { runs: false, since: null, says: [] };
  const listen = parseListen(config.agent.listen);
  const says = listen ? await askAgent(listen) : [];
  return { runs: true, since: new Date(stat.mtimeMs).toISOString(), says };
}

/** The kernel gives the lock of an agent back when the agent ends. */
async function isFree(host: Host, file: string): Promise<boolean> {
  const asked = { what: "this node for genie agent", deadlineMs: 0 };
  const [taken] = await Promise.allSettled([takeFileLock(host, file, "agent", asked)]);
  if (taken.status === "fulfilled") taken.value.release();
  return taken.status === "fulfilled";
}

/** Lines of the agent about what is wrong with itself; none where all is well. */
async function askAgent({ hostname: name, port }: { hostname: string; port: number }) {
  const here =
    new Map([
      ["0.0.0.0", "127.0.0.1"],
      ["::", "::1"],
    ]).get(name) ?? name;
  const at = `${here.includes(":") ? `[${here}]` : here}:${port}`;
  try {
    const signal = AbortSignal.timeout(agentMs);
    const response = await fetch(`http://${at}/healthz`, { signal });
    const lines = (await response.text()).split("\n").filter((line) => line !== "");
    return response.ok ? [] : lines.slice(0, linesMax).map((line) => oneLine(line, 300));
  } catch (error) {
    const { name, code: reason = name } = error as NodeJS.ErrnoException;
    const hint = "is the port its own? agent.listen of the plugin table says which";
    return [`it does not answer at ${at} (${reason}): ${hint}`];
  }
}

/** What the record knows: of the last hour, and of now. */
function lookAtRecord({ host, at, config, networks }: NodeView) {
  const stateDir = at(config.stateDir);
  const path = join(config.stateDir, "genie.db");
  const bytes = statSync(at(path), { throwIfNoEntry: false })?.size ?? 0;
  const nowMs = host.now();
  try {
    const source = { stateDir, totals: new Map(), notices: [] };
    const filter = { sinceMs: nowMs - latelyMs };
    const report = makeReport(host, source, { filter, limit: 0 });
    const counts = countAddresses(stateDir, networks, nowMs);
    const { attachments, failing, leaked, pods, failedPods } = report.totals;
    const { notices, stuck, policy = null } = report;
    const lost = stuck.filter(({ state }) => state === "planned").length;
    return {
      error: "",
      record: { path, bytes, attachments, notices },
      leftovers: { failing, leaked, lost },
      lately: { pods, failedPods },
      policy: policy && { ...policy, rulesets: policy.rulesets.length },
      of: (name: string) => ({
        free: counts
          .filter(({ network }) => network === name)
          .map(({ family, left, total }) => ({ family, left, total })),
        attachments: report.networks.find(({ network }) => network === name)?.attachments ?? 0,
        failedLately: report.networks.find(({ network }) => network === name)?.failures ?? 0,
      }),
    };
  } catch (error) {
    return {
      error: toCniError(error).message,
      record: { path, bytes, attachments: 0, notices: [] },
      leftovers: { failing: 0, leaked: 0, lost: 0 },
      lately: { pods: 0, failedPods: 0 },
      policy: null,
      of: () => ({ free: [], attachments: 0, failedLately: 0 }),
    };
  }
}

/** What agent and record add to the findings of doctor. */
function adviceOn(
  { says }: AgentHealth,
  { error, leftovers, lately, policy }: Omit<ReturnType<typeof lookAtRecord>, "of" | "record">,
): Finding[] {
  const { failing, leaked, lost } = leftovers;
  const { pods, failedPods } = lately;
  const problems = policy?.problems ?? [];
  const ofPolicies = `${problems.length} in policies, the newest: ${problems[0]?.problem}`;
  const all: [isFound: boolean, check: string, result: CheckResult][] = [
    [error !== "", "record", problem(error, "genie doctor says more")],
    ...says.map((line): [boolean, string, CheckResult] => {
      return [true, "agent", problem(line, "see the log of genie agent")];
    }),
    [
      lost > 0,
      "record",
      problem(`attachments of running pods that are lost: ${lost}`, "genie repair NAMESPACE/POD"),
    ],
    [leaked > 0, "record", warning(`attachments that are leaked: ${leaked}`, "genie gc")],
    [
      failing > 0,
      "record",
      warning(`attachments that could not be detached yet: ${failing}`, "genie report says why"),
    ],
    [
      failedPods > 0,
      "pods",
      warning(`${failedPods} of ${pods} pods failed in the last hour`, "genie report --since 1h"),
    ],
    [problems.length > 0, "policy", warning(`problems: ${ofPolicies}`, "genie report lists them")],
  ];
  return all.flatMap(([isFound, check, result]) => (isFound ? [{ check, ...result }] : []));
}

const columns = [
  { title: "NETWORK", shrinks: true },
  { title: "STATUS" },
  { title: "FREE", align: "right" as const },
  { title: "PODS", align: "right" as const },
  { title: "FAILED (1h)", align: "right" as const },
  { title: "WHY NOT", wraps: true },
];

function format(health: Health, width: number): string {
  const { agent, policy, record, leftovers, networks, findings } = health;
  const nowMs = Date.parse(health.at);
  const ago = (at: string | null) => (at === null ? "never" : formatAge(nowMs - Date.parse(at)));
  const runs = agent.says.length === 0 ? "and is well" : "and is not well";
  const known = policy?.knownAt ? `known as of ${ago(policy.knownAt)} ago` : "never known";
  const { failing, leaked, lost } = leftovers;
  const left = Object.entries({ leaked, failing, lost }).filter(([, count]) => count > 0);
  const rows = networks.map(({ network, reason, free, attachments, failedLately }) => [
    network,
    reason === "" ? "ready" : "failing",
    free.map((one) => `${formatCount(one.left)}/${formatCount(one.total)}`).join(" ") || "–",
    formatCount(attachments),
    formatCount(failedLately),
    reason,
  ]);
  const count = (verdict: Finding["verdict"]) =>
    findings.filter((one) => one.verdict === verdict).length;
  const sum = `${plural(count("problem"), "problem")}, ${plural(count("warning"), "warning")}`;
  return fillSections(healthTemplate, {
    version: health.genie,
    node: visibleText(health.node),
    verdict: findings.length === 0 ? "healthy" : `${health.ok ? "healthy, " : ""}${sum}`,
    runtime: visibleText(health.runtime.join("; ")) || "see below",
    agent: agent.runs ? `runs since ${ago(agent.since)}, ${runs}` : "does not run",
    policy: policy ? `pods with rules: ${formatCount(policy.enforced)}, ${known}` : "not enforced",
    record: visibleText(
      `${record.path}, ${(record.bytes / 1e6).toFixed(1)} MB, ` +
        `${plural(record.attachments, "attachment")}`,
    ),
    leftovers: left.map(([what, many]) => `${many} ${what}`).join(", ") || "none",
    networks: rows.length === 0 ? "" : formatTable(columns, rows, width),
    findings: findings.length === 0 ? "" : listFindings(findings, Math.min(width, 80)),
    next: health.next === "" ? "nothing to do" : visibleText(health.next),
  });
}
