/** `genie report`: reads the command line, has the report made, and writes it as asked for. */
import { randomUUID } from "node:crypto";
import { existsSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { basename, dirname, join } from "node:path";
import type { Host, StdinConfig } from "../call.ts";
import { networkKpis } from "../choice/kpi.ts";
import { CniError, code, toCniError } from "../cni.ts";
import {
  askedPod,
  type Flags,
  namedPod,
  parseDuration,
  text,
  UsageError,
  wordsOf,
} from "../config/usage.ts";
import { listNetworks } from "../node_networks.ts";
import { networkName } from "../recovery/network_name.ts";
import { loadConfig, loadNodeSettings } from "../settings.ts";
import type { Report } from "./document.ts";
import { makePodReport, makeReport, type ReportSource, reportedFilter } from "./model.ts";
import type { PageDetails } from "./page.ts";
import { type LedgerFilter, ledgerRows, readOrEmpty, readRulesets } from "./record_reader.ts";
import { asciiJson } from "./table.ts";
import { formatCsv, formatNodesCsv, formatPodReport, formatReport } from "./text.ts";

const limitMax = 10_000_000;
/** Most requests that a node is asked to list. */
const clusterLimitMax = 1000;
const commands = ["ADD", "DEL", "CHECK", "GC", "STATUS"];
/** Options that need --cluster. */
const clusterOptions = ["agents", "endpoints", "kubeconfig", "port", "selector", "timeout"];

type PodName = Record<"namespace" | "name", string>;

/** What the command line gives the command besides its options. */
export interface ReportContext {
  /** Columns of the terminal, Infinity for none. */
  width: number;
  /** Reads genie's own CNI config from a file, or from the conf dir. */
  readOwnConfig: (file: string | undefined) => StdinConfig;
}

/**
 * Runs `genie report`.
 * @returns exit status: 1 where a node of a cluster did not answer
 * @throws UsageError for words that make no sense; CniError 106 for a record that is damaged or
 *   newer, 5 for a file that cannot be written
 */
export async function runReport(host: Host, flags: Flags, { width, readOwnConfig }: ReportContext) {
  const question = readQuestion(host, flags);
  if (flags["cluster"]) return runCluster(host, flags, question, width);
  const source = await sourceOf(host, readOwnConfig(text(flags, "cni-config")), question);
  const { filter, pod, limit } = question;
  if (flags["csv"]) {
    writeCsv(host, source, question);
    return 0;
  }
  const podReport = pod && makePodReport(host, source, pod, { filter, limit });
  if (podReport && flags["html"] === undefined) {
    host.stdout(flags["json"] ? jsonOf(podReport) : formatPodReport(podReport, width));
    return 0;
  }
  const rulesets = podReport?.rulesets ?? readOrEmpty(source.stateDir, (one) => readRulesets(one));
  const details = { rulesets, ...(podReport && { pod: podReport }) };
  await writeReport(host, flags, makeReport(host, source, { filter, limit }), { width, details });
  return 0;
}

async function runCluster(
  host: Host,
  flags: Flags,
  { filter, limit }: Question,
  width: number,
): Promise<number> {
  if (limit > clusterLimitMax) {
    throw new UsageError(`Invalid --limit "${limit}": up to ${clusterLimitMax} with --cluster`);
  }
  // Loaded here: nothing else needs the Kubernetes client.
  const { makeClusterReport } = await import("./cluster.ts");
  const report = await makeClusterReport(host, flags, { filter: reportedFilter(filter), limit });
  if (flags["csv"]) host.stdout(formatNodesCsv(report.nodes));
  else await writeReport(host, flags, report, { width });
  return report.nodes.some(({ error }) => error !== "") ? 1 : 0;
}

/** Writes a report as a page, as JSON or as text. */
async function writeReport(
  host: Host,
  flags: Flags,
  report: Report,
  { width, details }: { width: number; details?: PageDetails },
): Promise<void> {
  const file = text(flags, "html");
  if (file === undefined) {
    host.stdout(flags["json"] ? jsonOf(report) : formatReport(report, width));
    return;
  }
  // Loaded here: nothing else needs the 50 KB of the chart library.
  const { formatPage } = await import("./page.ts");
  const page = formatPage(report, details);
  if (file === "-") {
    host.stdout(page);
    return;
  }
  writeWhole(file, page);
  host.stdout(`Wrote ${file}\n`);
}

/** A document for programs. */
export function jsonOf(report: object): string {
  return `${asciiJson(JSON.stringify(report, null, 2))}\n`;
}

type Question = ReturnType<typeof readQuestion>;

/** What the command line asks for; `pod` asks for the view of that pod. */
function readQuestion(host: Host, flags: Flags) {
  const forms = ["json", "csv", "html"].filter((name) => flags[name] !== undefined);
  if (forms.length > 1) throw new UsageError(`Only one of --${forms.join(" and --")} at a time`);
  checkClusterOptions(flags);
  const pod = readPodWords(flags);
  const meant = pod ?? askedPod(flags, []);
  const since = text(flags, "since");
  const sinceMs = since === undefined ? undefined : parseDuration(since);
  if (since !== undefined && sinceMs === undefined) {
    throw new UsageError(`Invalid --since "${since}": expected a duration such as 30m, 2h or 7d`);
  }
  const command = text(flags, "command")?.toUpperCase();
  if (command !== undefined && !commands.includes(command)) {
    throw new UsageError(`Invalid --command "${command}": expected one of ${commands.join(", ")}`);
  }
  const filter: LedgerFilter = {
    sinceMs: sinceMs === undefined ? undefined : host.now() - sinceMs,
    network: text(flags, "network"),
    namespace: meant.namespace,
    pod: meant.name,
    command,
    only: flags["denied"] ? "denied" : flags["failed"] ? "failed" : undefined,
  };
  return { filter, pod, limit: readLimit(text(flags, "limit")) ?? usualLimit(flags) };
}

/** The stories of the pods of a page are made from its requests; each node sends so many. */
function usualLimit({ html, csv, cluster }: Flags): number {
  if (html !== undefined) return cluster ? 200 : 1000;
  return csv && !cluster ? limitMax : 20;
}

/** @throws UsageError for options of `--cluster` that do not go together, or stand without it */
export function checkClusterOptions(flags: Flags): void {
  const isGiven = (name: string) => flags[name] !== undefined;
  if (!flags["cluster"]) {
    const alone = clusterOptions.find(isGiven);
    if (alone !== undefined) throw new UsageError(`--${alone} needs --cluster`);
    return;
  }
  if (isGiven("cni-config")) {
    throw new UsageError("--cluster asks the nodes: each knows its own --cni-config");
  }
  if (!isGiven("endpoints")) return;
  if (isGiven("agents")) {
    throw new UsageError("--endpoints and --agents are two ways: give one");
  }
  const foreign = ["kubeconfig", "port", "selector"].find(isGiven);
  if (foreign !== undefined) {
    throw new UsageError(`--endpoints asks no API server: it excludes --${foreign}`);
  }
}

/** The pod of the words `NAMESPACE/POD`, or `pod NAMESPACE/POD`; undefined without words. */
function readPodWords(flags: Flags): PodName | undefined {
  const words = wordsOf(flags);
  if (words.length === 0) return undefined;
  const pod = namedPod(flags, words[0] === "pod" ? words.slice(1) : words);
  if (flags["cluster"]) {
    const instead = "--pod NAMESPACE/POD limits it to the requests of one pod";
    throw new UsageError(`--cluster shows all nodes: ${instead}`);
  }
  return pod;
}

function readLimit(given: string | undefined): number | undefined {
  if (given === undefined) return undefined;
  const limit = /^\d{1,9}$/.test(given) ? Number(given) : Number.NaN;
  if (limit <= limitMax) return limit;
  throw new UsageError(`Invalid --limit "${given}": expected a number up to ${limitMax}`);
}

/**
 * A plugin table that is wrong does not hide the record: only the totals are missing then.
 * @param filter its network may have any of its names; changed to that of the record
 */
export async function sourceOf(
  host: Host,
  own: StdinConfig,
  { filter }: Pick<Question, "filter">,
): Promise<ReportSource> {
  const { stateDir } = await loadNodeSettings(host, own);
  const totals = new Map<string, { ipv4?: number | undefined; ipv6?: number | undefined }>();
  const notices: string[] = [];
  try {
    const config = await loadConfig(own);
    if (filter.network !== undefined) filter.network = networkName(config, filter.network);
    for (const network of listNetworks(config).networks) {
      const { ipv4, ipv6 } = networkKpis(undefined, network, host.now());
      totals.set(network.name, { ipv4: ipv4.total.value, ipv6: ipv6.total.value });
    }
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    notices.push(`How many addresses networks have is not known: ${error.message}`);
  }
  return { stateDir, node: host.env["NODE_NAME"] || hostname(), totals, notices };
}

function writeCsv(host: Host, { stateDir }: ReportSource, { filter, limit }: Question) {
  readOrEmpty(stateDir, (record) => {
    for (const chunk of formatCsv(ledgerRows(record, filter, limit))) host.stdout(chunk);
  });
}

/** Writes a file whole or not at all, readable by its owner alone. */
function writeWhole(path: string, content: string): void {
  const draft = join(dirname(path), `.${basename(path)}.${randomUUID()}`);
  try {
    writeFileSync(draft, content, { flag: "wx", mode: 0o600, flush: true });
    renameSync(draft, path);
  } catch (error) {
    // Removing what is not there fails too on a read-only file system.
    if (existsSync(draft)) rmSync(draft);
    const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
    throw new CniError(code.ioFailure, `Cannot write ${path}: ${reason}`, { cause: error });
  }
}
