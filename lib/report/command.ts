/** `genie report`: from the words of the command line to the record, and out as asked for. */
import { randomUUID } from "node:crypto";
import { closeSync, fsyncSync, openSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { CniError, code, type Host, type StdinConfig, toCniError } from "../cni.ts";
import { parseDuration } from "../config/quantity.ts";
import { listNetworks } from "../networks.ts";
import { readOwnConfig } from "../node/genie_config.ts";
import { loadConfig, loadNodeSettings } from "../settings.ts";
import { formatCsv, formatNodesCsv } from "./csv.ts";
import { readRecord } from "./file.ts";
import { asciiJson } from "./html.ts";
import { makePodReport, makeReport, type ReportSource, shownFilter } from "./model.ts";
import { type LedgerFilter, ledgerRows } from "./rows.ts";
import type { Report } from "./shape.ts";
import { formatPodReport, formatReport } from "./text.ts";

const limitDefault = 20;
const limitMax = 10_000_000;
/** Most that a node is asked to list. */
const clusterLimitMax = 1000;

/** What the words of a command line ask for. */
interface Question {
  filter: LedgerFilter;
  /** The pod whose view is wanted. */
  pod?: { namespace: string; name: string };
  /** Absent where nobody said. */
  limit?: number;
}

/**
 * Runs `genie report`.
 *
 * @param width columns of the terminal, Infinity for none
 * @returns exit status
 * @throws UsageError for words that make no sense; CniError 106 for a record that is damaged or
 *   newer, 5 for a file that cannot be written
 */
export async function runReport(host: Host, flags: Flags, width: number): Promise<number> {
  const question = readQuestion(host, flags);
  if (flags["cluster"]) return runCluster(host, flags, question, width);
  const source = await readSource(host, readOwnConfig(text(flags, "cni-config")));
  const { filter, pod, limit = limitDefault } = question;
  const file = text(flags, "html");
  if (flags["csv"]) {
    writeCsv(host, source, question);
  } else if (file !== undefined) {
    await writePage(host, file, makeReport(host, source, { filter, limit }));
  } else if (pod) {
    const report = makePodReport(host, source, pod, { filter, limit });
    host.stdout(flags["json"] ? document(report) : formatPodReport(report, width));
  } else {
    const report = makeReport(host, source, { filter, limit });
    host.stdout(flags["json"] ? document(report) : formatReport(report, width));
  }
  return 0;
}

/** All nodes. @returns exit status: 1 where a node did not answer */
async function runCluster(
  host: Host,
  flags: Flags,
  { filter, limit = limitDefault }: Question,
  width: number,
): Promise<number> {
  if (limit > clusterLimitMax) {
    throw new UsageError(`Invalid --limit "${limit}": up to ${clusterLimitMax} with --cluster`);
  }
  // Only this needs requests to an API server.
  const { makeClusterReport } = await import("./cluster_report.ts");
  const report = await makeClusterReport(host, flags, { filter: shownFilter(filter), limit });
  const file = text(flags, "html");
  if (file !== undefined) await writePage(host, file, report);
  else if (flags["csv"]) host.stdout(formatNodesCsv(report.nodes));
  else host.stdout(flags["json"] ? document(report) : formatReport(report, width));
  return report.nodes.some(({ error }) => error !== "") ? 1 : 0;
}

async function writePage(host: Host, file: string, report: Report): Promise<void> {
  // The chart library is a text of 50 KB: only this needs it.
  const { formatPage } = await import("./page.ts");
  writeWhole(file, formatPage(report));
  host.stdout(`Wrote ${file}\n`);
}

function document(report: object): string {
  return `${asciiJson(JSON.stringify(report, null, 2))}\n`;
}

const commands = ["ADD", "DEL", "CHECK", "GC", "STATUS"];

/** Options that mean something with --cluster alone. */
const clusterOptions = ["agents", "endpoints", "kubeconfig", "port", "selector", "timeout"];
/** @throws UsageError for options that do not go together */
function checkClusterOptions(flags: Flags): void {
  const given = (names: string[]) => names.filter((name) => flags[name] !== undefined);
  if (!flags["cluster"]) {
    const [alone] = given(clusterOptions);
    if (alone !== undefined) throw new UsageError(`--${alone} needs --cluster`);
    return;
  }
  if (Array.isArray(flags["words"]) && flags["words"].length > 0) {
    throw new UsageError(
      "--cluster shows all nodes: --pod NAMESPACE/NAME limits it to the requests of one pod",
    );
  }
  if (flags["cni-config"] !== undefined) {
    throw new UsageError("--cluster asks the nodes: each knows its own --cni-config");
  }
  const ways = ["endpoints", "agents"].filter((name) => flags[name] !== undefined);
  if (ways.length > 1) throw new UsageError("--endpoints and --agents are two ways: give one");
  const [foreign] = given(["kubeconfig", "port", "selector"]);
  if (flags["endpoints"] !== undefined && foreign !== undefined) {
    throw new UsageError(`--endpoints asks no API server: it excludes --${foreign}`);
  }
}

function readQuestion(host: Host, flags: Flags): Question {
  const forms = ["json", "csv", "html"].filter((name) => flags[name] !== undefined);
  if (forms.length > 1) throw new UsageError(`Only one of --${forms.join(" and --")} at a time`);
  checkClusterOptions(flags);
  const pod = readPod(flags);
  const since = text(flags, "since");
  const sinceMs = since === undefined ? undefined : parseDuration(since);
  if (since !== undefined && sinceMs === undefined) {
    throw new UsageError(`Invalid --since "${since}": expected a duration such as 30m, 2h or 7d`);
  }
  const command = text(flags, "command")?.toUpperCase();
  if (command !== undefined && !commands.includes(command)) {
    throw new UsageError(`Invalid --command "${command}": expected one of ${commands.join(", ")}`);
  }
  const network = text(flags, "network");
  const namespace = pod.namespace ?? text(flags, "namespace");
  const limit = readLimit(text(flags, "limit"));
  return {
    filter: {
      ...(sinceMs !== undefined && { sinceMs: host.now() - sinceMs }),
      ...(network !== undefined && { network }),
      ...(namespace !== undefined && { namespace }),
      ...(pod.name !== undefined && { pod: pod.name }),
      ...(command !== undefined && { command }),
      ...(flags["failed"] && { only: "failed" }),
      ...(flags["denied"] && { only: "denied" }),
    },
    ...(pod.view && { pod: pod.view }),
    ...(limit !== undefined && { limit }),
  };
}

/** The pod of `--pod`, or of the words `pod NAMESPACE/NAME`. */
function readPod(flags: Flags): {
  namespace?: string;
  name?: string;
  view?: { namespace: string; name: string };
} {
  const words = Array.isArray(flags["words"]) ? flags["words"] : [];
  const option = text(flags, "pod");
  if (words.length === 0) {
    const [, namespace, name] = /^([^/]+)\/([^/]+)$/.exec(option ?? "") ?? [];
    if (namespace !== undefined && name !== undefined) return { namespace, name };
    return option === undefined ? {} : { name: option };
  }
  const [word, named = ""] = words;
  const [, namespace, name] = /^([^/]+)\/([^/]+)$/.exec(named) ?? [];
  if (word !== "pod" || words.length > 2 || namespace === undefined || name === undefined) {
    throw new UsageError(`Invalid words "${words.join(" ")}": expected pod NAMESPACE/NAME`);
  }
  if (option !== undefined || flags["namespace"] !== undefined) {
    throw new UsageError("The words pod NAMESPACE/NAME exclude --pod and --namespace");
  }
  return { namespace, name, view: { namespace, name } };
}

function readLimit(given: string | undefined): number | undefined {
  if (given === undefined) return undefined;
  const limit = /^\d{1,9}$/.test(given) ? Number(given) : Number.NaN;
  if (limit <= limitMax) return limit;
  throw new UsageError(`Invalid --limit "${given}": expected a number up to ${limitMax}`);
}

/** A table that is wrong must not hide the record: only the totals are missing then. */
async function readSource(host: Host, own: StdinConfig): Promise<ReportSource> {
  const { stateDir } = await loadNodeSettings(host, own);
  const totals = new Map<string, { ipv4?: number; ipv6?: number }>();
  const notices: string[] = [];
  try {
    // With the choice, so that an ADD has all that it loads for one in one place.
    const { networkKpis } = await import("../choice/choose.ts");
    for (const network of listNetworks(await loadConfig(own)).networks) {
      const { ipv4, ipv6 } = networkKpis(undefined, network, host.now());
      totals.set(network.name, {
        ...(ipv4.total.value !== undefined && { ipv4: ipv4.total.value }),
        ...(ipv6.total.value !== undefined && { ipv6: ipv6.total.value }),
      });
    }
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    notices.push(`How many addresses networks have is not known: ${error.message}`);
  }
  return { stateDir, totals, notices };
}

function writeCsv(host: Host, { stateDir }: ReportSource, { filter, limit = limitMax }: Question) {
  const write = (rows: Parameters<typeof formatCsv>[0]) => {
    for (const chunk of formatCsv(rows)) host.stdout(chunk);
    return true;
  };
  readRecord(stateDir, (record) => write(ledgerRows(record, filter, limit))) ?? write([]);
}

/** Writes a file that is there whole or not at all, for its owner's eyes alone. */
function writeWhole(path: string, content: string): void {
  const draft = join(dirname(path), `.${basename(path)}.${randomUUID()}`);
  try {
    const descriptor = openSync(draft, "wx", 0o600);
    try {
      writeFileSync(descriptor, content);
      fsyncSync(descriptor);
    } finally {
      closeSync(descriptor);
    }
    renameSync(draft, path);
  } catch (error) {
    rmSync(draft, { force: true });
    const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
    throw new CniError(code.ioFailure, `Cannot write ${path}: ${reason}`, { cause: error });
  }
}
