/** `genie report`: from the words of the command line to the record, and out as asked for. */
import { randomUUID } from "node:crypto";
import { closeSync, fsyncSync, openSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { CniError, code, type Host, type StdinConfig, toCniError } from "./cni.ts";
import { asciiJson } from "./html.ts";
import { listNetworks } from "./networks.ts";
import { readOwnConfig } from "./own_config.ts";
import { parseDuration } from "./quantity.ts";
import { makePodReport, makeReport, type ReportSource } from "./report.ts";
import { formatCsv } from "./report_csv.ts";
import { readRecord } from "./report_file.ts";
import { type LedgerFilter, ledgerRows } from "./report_rows.ts";
import { formatPodReport, formatReport } from "./report_text.ts";
import { loadConfig, loadNodeSettings } from "./settings.ts";
import { type Flags, text, UsageError } from "./usage.ts";

const limitDefault = 20;
const limitMax = 10_000_000;

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
  const source = await readSource(host, readOwnConfig(text(flags, "cni-config")));
  const { filter, pod, limit = limitDefault } = question;
  const file = text(flags, "html");
  if (flags["csv"]) {
    writeCsv(host, source, question);
  } else if (file !== undefined) {
    // The chart library is a text of 50 KB: only this needs it.
    const { formatPage } = await import("./report_html.ts");
    writeWhole(file, formatPage(makeReport(host, source, { filter, limit })));
    host.stdout(`Wrote ${file}\n`);
  } else if (pod) {
    const report = makePodReport(host, source, pod, { filter, limit });
    host.stdout(flags["json"] ? document(report) : formatPodReport(report, width));
  } else {
    const report = makeReport(host, source, { filter, limit });
    host.stdout(flags["json"] ? document(report) : formatReport(report, width));
  }
  return 0;
}

function document(report: object): string {
  return `${asciiJson(JSON.stringify(report, null, 2))}\n`;
}

const commands = ["ADD", "DEL", "CHECK", "GC", "STATUS"];

function readQuestion(host: Host, flags: Flags): Question {
  const forms = ["json", "csv", "html"].filter((name) => flags[name] !== undefined);
  if (forms.length > 1) throw new UsageError(`Only one of --${forms.join(" and --")} at a time`);
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
    const { networkKpis } = await import("./choose.ts");
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
