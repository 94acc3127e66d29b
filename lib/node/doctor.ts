/** `genie doctor`: looks over a node and says what is wrong, and what to do. Changes nothing. */
import { isAbsolute } from "node:path";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { type Host, toCniError } from "../cni.ts";
import { printable } from "../report/table.ts";
import { checkApi } from "./doctor_api.ts";
import { checkCapacity, checkOverlaps, checkTable } from "./doctor_networks.ts";
import { checkClock, checkDisk, checkKernel, checkRecord } from "./doctor_node.ts";
import { checkInstalled, checkPlugins, checkTools } from "./doctor_plugins.ts";
import { checkOrder, checkRuntimes } from "./doctor_runtime.ts";
import { type Finding, problem, type Said } from "./finding.ts";
import { callsGenie } from "./genie_list.ts";
import { paths } from "./installation.ts";
import { readConfs } from "./node_ready.ts";
import { type NodeView, viewNode } from "./node_view.ts";
import { readRuntimes } from "./runtime_settings.ts";

/** Every check, in the order of the output. */
const checks: [name: string, look: (view: NodeView) => Said[] | Promise<Said[]>][] = [
  ["installed", checkInstalled],
  ["order", checkOrder],
  ["runtime", checkRuntimes],
  ["table", checkTable],
  ["plugins", checkPlugins],
  ["tools", checkTools],
  ["overlap", checkOverlaps],
  ["capacity", checkCapacity],
  ["kernel", checkKernel],
  ["disk", checkDisk],
  ["record", checkRecord],
  ["clock", checkClock],
  ["api", checkApi],
];

/** Longest time of one check; its parts have shorter ones. */
const checkMs = 60_000;

/**
 * Runs `genie doctor`.
 * @param width columns of the terminal, Infinity for none
 * @returns exit status: 1 when there is a problem
 */
export async function runDoctor(host: Host, flags: Flags, width: number): Promise<number> {
  const root = text(flags, "host-root") ?? "/";
  const told = text(flags, "conf-dir");
  for (const path of [root, told ?? "/"]) {
    if (!isAbsolute(path)) throw new UsageError(`"${path}" is not an absolute path`);
  }
  const view = await viewNode(host, root, told ?? findConfDir(root));
  const all = await Promise.all(
    checks.map(async ([check, look]): Promise<Finding[]> => {
      const said = await lookAt(view, look);
      return said.map((one) => ({ check, ...one }));
    }),
  );
  const findings = all.flat();
  const isWell = !findings.some(({ verdict }) => verdict === "problem");
  if (flags["json"]) {
    host.stdout(`${JSON.stringify({ ok: isWell, findings }, null, 2)}\n`);
  } else {
    host.stdout(formatFindings(findings, Math.min(width, 80)));
  }
  return isWell ? 0 : 1;
}

/** Where genie's CNI config is: in the usual folder, or in one that a runtime's settings name. */
function findConfDir(root: string): string {
  const named = readRuntimes(root).flatMap(({ confDir }) => confDir ?? []);
  const dirs = [paths.confDir, ...named];
  return dirs.find((dir) => readConfs(root, dir).some(callsGenie)) ?? paths.confDir;
}

/** One check that fails, or hangs, must not cost the others. */
async function lookAt(view: NodeView, look: (typeof checks)[number][1]): Promise<Said[]> {
  const late = Promise.withResolvers<Said[]>();
  const timer = setTimeout(
    () => late.resolve([problem("it took too long to look", "see the load of the node")]),
    checkMs,
  );
  try {
    return await Promise.race([look(view), late.promise]);
  } catch (error) {
    return [problem(toCniError(error).message, "that should not be: report it")];
  } finally {
    clearTimeout(timer);
  }
}

/** One line a finding, wrapped; the remedy below what is not in order. */
export function formatFindings(findings: readonly Finding[], width: number): string {
  const wide = Math.max(...findings.map(({ check }) => check.length));
  const lead = (one: Finding) => `${one.verdict.padEnd(7)}  ${one.check.padEnd(wide)}  `;
  const lines = findings.flatMap((one) => {
    const indent = " ".repeat(lead(one).length);
    const [first = "", ...rest] = wrap(printable(one.detail), width - indent.length);
    const remedy = one.remedy && wrap(`→ ${printable(one.remedy)}`, width - indent.length);
    return [lead(one) + first, ...[...rest, ...(remedy || [])].map((line) => indent + line)];
  });
  const count = (verdict: Finding["verdict"]) =>
    findings.filter((one) => one.verdict === verdict).length;
  const sum = `${count("problem")} problems, ${count("warning")} warnings, ${count("ok")} ok`;
  return `${lines.join("\n")}\n\n${sum}\n`;
}

/** Words into lines; a word that is too long is cut. */
function wrap(words: string, width: number): string[] {
  const lines: string[] = [];
  let line = "";
  const pieces = words.split(" ").flatMap((word) => word.match(new RegExp(`.{1,${width}}`, "gu")));
  for (const piece of pieces) {
    if (piece === null) continue;
    const longer = line === "" ? piece : `${line} ${piece}`;
    if (Bun.stringWidth(longer) <= width) line = longer;
    else {
      lines.push(line);
      line = piece;
    }
  }
  return line === "" ? lines : [...lines, line];
}
