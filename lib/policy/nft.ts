/**
 * Rulesets in the kernel: put in force, taken away, compared, by the program `nft` in the namespace
 * they are for. One run is one transaction: the kernel takes a ruleset whole or not at all.
 */
import { closeSync, existsSync, openSync } from "node:fs";
import { join } from "node:path";
import type { Ending, Host, Output } from "../call.ts";
import { CniError, code, log, oneLine, toCniError } from "../cni.ts";
import { programDirs, run } from "../exec.ts";
import { comeBack, isForeignNetns, libc, netKind, netnsId } from "../kernel.ts";
import { deleteTables, podTable, podTables, sealTable } from "./compile.ts";

/**
 * A run of nft takes 3 ms, 10,000 addresses 50 ms; where a hundred pods start at once on two cores
 * it waits for its turn for seconds, and one that is ended begins anew. More is a stuck machine.
 */
const timeoutMs = 25_000;
/** A listing of some 100,000 addresses. */
const listBytesMax = 16 * 1024 * 1024;

/** The first line of each table in a ruleset. */
const tableLine = /^table (\S+ \S+) \{$/gm;
/** What makes room for a table, whether there is one or not. */
const replaceLines = /^add table (.*)\ndelete table \1\n/gm;
const device = /\bdevice "[^"]*"/g;

/** One run of nft. */
interface Task {
  host: Host;
  /** Path of the namespace; undefined for the node's own. */
  netns: string | undefined;
  /** What it is for, as in "Cannot ...". */
  what: string;
}

const reading = "read a network policy";

/** What a ruleset is known by in the kernel: the comment of its tables. */
export function rulesetHash(text: string): string {
  return new Bun.CryptoHasher("sha256").update(text).digest("hex").slice(0, 32);
}

/**
 * Puts a ruleset in force, in place of the one before; "" takes it away.
 * @param netns path of the namespace; undefined for the node's own
 * @param options.isFirst none of ours is believed to be there: to take one away costs an ADD 10 ms,
 *   until nobody looks at it any more. One that is there after all is replaced
 * @throws CniError 5 when nft is missing, the namespace cannot be entered or the kernel refuses;
 *   11 when it takes too long, or is ended
 */
export async function applyRuleset(
  host: Host,
  netns: string | undefined,
  text: string,
  { isFirst = false } = {},
): Promise<void> {
  if (text === "") return removeRuleset(host, netns);
  const task = { host, netns, what: "put a network policy in force" };
  const stdin = withSeal(text, newMarks());
  if (isFirst) {
    const comment = `{ comment "genie:${rulesetHash(text)}" ; }`;
    const fresh = stdin.replaceAll(replaceLines, `create table $1 ${comment}\n`);
    const made = await nft(task, ["-f", "-"], fresh).catch(toCniError);
    if (typeof made === "string") return;
    if (isPassing(made)) throw made;
  }
  const reason = await load(task, stdin);
  if (reason === undefined) return;
  const cost = "a pod with CAP_NET_RAW can send past its policies, take that from it";
  log(host, "warn", `This node cannot check packet sockets (${reason}): ${cost}`);
}

/**
 * Takes the tables away. Where there is none, or no namespace any more, nothing is left to do.
 * @throws CniError as {@link applyRuleset}
 */
export async function removeRuleset(host: Host, netns: string | undefined, tables = podTables) {
  if (netns !== undefined && netnsId(netns) === "") return;
  await load({ host, netns, what: "take a network policy away" }, deleteTables(tables));
}

/**
 * Loads a text, without the table against packet sockets where the kernel refuses the whole: those
 * before 5.16, and nft before 1.0.1, have no hook on the way out of a device.
 * @returns why it did; undefined when it took everything
 */
async function load(task: Task, stdin: string): Promise<string | undefined> {
  try {
    await nft(task, ["-f", "-"], stdin);
    return undefined;
  } catch (error) {
    if (!stdin.includes(`table ${sealTable}`) || isPassing(error)) throw error;
    const lines = new RegExp(`^(add|delete) table ${sealTable}\\n`, "gm");
    const table = new RegExp(`^table ${sealTable} [^]*`, "m");
    await nft(task, ["-f", "-"], stdin.replaceAll(lines, "").replace(table, ""));
    return toCniError(error).message;
  }
}

/** It took too long, or was ended: a second try in another way would not change that. */
function isPassing(error: unknown): boolean {
  return toCniError(error).code === code.tryAgainLater;
}

/** The secrets of one ruleset; their names in it are those of compile.ts. */
type Marks = Record<"seal" | "seal_of_many" | "seal_of_all", string>;

/** Marks that nobody guesses, none of them 0: that is a packet without one. */
function newMarks(): Marks {
  const [a = 0, b = 0, c = 0] = crypto.getRandomValues(new Uint32Array(3));
  if (a === 0 || b === 0 || c === 0 || new Set([a, b, c]).size < 3) return newMarks();
  const hex = (mark: number) => `0x${mark.toString(16).padStart(8, "0")}`;
  return { seal: hex(a), seal_of_many: hex(b), seal_of_all: hex(c) };
}

/** The marks of a table in the kernel, as {@link listTable} shows it; others where it has none. */
function marksOf(listing: string): Marks {
  const of = (type: string) =>
    new RegExp(`meta mark (0x\\w+) fib daddr type ${type} meta mark set (0x\\w+)`).exec(listing);
  const [, seal = "0x1", many = "0x2"] = of("multicast") ?? [];
  return { seal, seal_of_many: many, seal_of_all: of("broadcast")?.[2] ?? "0x3" };
}

/** The text as it goes to the kernel: its marks are numbers, its tables are known by their text. */
function withSeal(text: string, marks: Marks): string {
  const comment = `\tcomment "genie:${rulesetHash(text)}"`;
  const known = text.replaceAll(tableLine, (line) => `${line}\n${comment}`);
  const defined = Object.entries(marks).map(([name, mark]) => `define ${name} = ${mark}\n`);
  return `${defined.join("")}${known}`;
}

/**
 * Which ruleset is in force: its {@link rulesetHash}. Undefined where there is none of ours.
 * @throws CniError as {@link applyRuleset}
 */
export async function readRuleset(host: Host, netns: string | undefined, table = podTable) {
  const listed = await listTable({ host, netns, what: reading }, table, ["-t"]);
  return /^\tcomment "genie:([0-9a-f]{32})"$/m.exec(listed ?? "")?.[1];
}

/**
 * Compares what the kernel has with what we wrote, rule by rule and address by address: the text is
 * loaded into an empty namespace, and nft lists both.
 * @returns what differs, in words; undefined when nothing does
 * @throws CniError as {@link applyRuleset}
 */
export async function verifyRuleset(host: Host, netns: string | undefined, text: string) {
  const tables = [...text.matchAll(tableLine)].map(([, table = ""]) => table);
  if (tables.length === 0) {
    if ((await readRuleset(host, netns)) === undefined) return undefined;
    return `table ${podTable} is there, and no policy asks for it`;
  }
  using scratch = emptyNetns();
  if (scratch === undefined) {
    const reason = "no network namespace can be made, run as root";
    throw new CniError(code.ioFailure, `Cannot check a network policy: ${reason}`);
  }
  const task = { host, netns, what: reading };
  const found = new Map<string, string | undefined>();
  for (const table of tables) found.set(table, await listTable(task, table));
  // With the same marks, and on an interface that every namespace has.
  const same = withSeal(text, marksOf(found.get(podTable) ?? "")).replaceAll(device, 'device "lo"');
  await load({ host, netns: scratch.path, what: "check a network policy" }, same);
  for (const table of tables) {
    const wanted = await listTable({ ...task, netns: scratch.path }, table);
    const listing = found.get(table);
    // What this node cannot have at all is missed by nobody.
    if (wanted === undefined && table === sealTable) continue;
    if (listing === undefined) return `table ${table} is gone`;
    const [due, actual] = [text, listing].map((one) => String(one.match(device)));
    if (table === sealTable && due !== actual) return `table ${table} is on ${actual}`;
    const bare = listing.replaceAll(device, 'device "lo"');
    const difference = compare(linesOf(wanted ?? ""), linesOf(bare));
    if (difference !== undefined) return `table ${table} differs: ${difference}`;
  }
  return undefined;
}

/** Makes a namespace with nothing in it, which goes with its scope; undefined without root. */
export function emptyNetns() {
  const calls = libc();
  if (!calls) return undefined;
  const own = openSync("/proc/self/ns/net", "r");
  try {
    if (calls.unshare(netKind) !== 0) return undefined;
    const made = openSync("/proc/thread-self/ns/net", "r");
    return { path: `/proc/self/fd/${made}`, [Symbol.dispose]: () => closeSync(made) };
  } finally {
    comeBack(own);
    closeSync(own);
  }
}

/**
 * A table as nft lists it; undefined where there is none. As text: the JSON of nft 1.0.6 leaves out
 * comments and breaks on flags of a table.
 */
function listTable(task: Task, table: string, options: string[] = []) {
  const args = [...options, "list", "table", ...table.split(" ")];
  return nft(task, args, "", /No such file/);
}

/** The lines of a listing. The elements of a set are one line, sorted: they have no order. */
function linesOf(listing: string): string[] {
  const sorted = listing.replaceAll(/elements = \{([^}]*)\}/g, (_all, elements: string) => {
    const each = elements.split(",").map((one) => one.trim());
    return `elements = { ${each.sort().join(", ")} }`;
  });
  return sorted.split("\n").filter((line) => line !== "");
}

/** The first line that one of the listings lacks. */
function compare(wanted: string[], found: string[]): string | undefined {
  const at = wanted.findIndex((one, i) => one !== found[i]);
  if (at >= 0) return `expected ${brief(wanted[at])}, found ${brief(found[at])}`;
  const extra = found[wanted.length];
  return extra === undefined ? undefined : `nobody wrote ${brief(extra)}`;
}

function brief(line: string | undefined): string {
  return line === undefined ? "nothing" : `"${oneLine(line, 120)}"`;
}

/** Runs nft once. @returns what it printed; undefined when it failed with words like `missing` */
async function nft(task: Task, args: string[], stdin: string, missing?: RegExp) {
  const { host, netns, what } = task;
  const dirs = [...(host.env["PATH"] ?? "").split(":"), ...programDirs];
  const files = dirs.filter((dir) => dir.startsWith("/")).map((dir) => join(dir, "nft"));
  const file = files.find((path) => existsSync(path));
  if (file === undefined) {
    const where = `the program nft is in none of ${programDirs.join(", ")}`;
    throw new CniError(code.ioFailure, `Cannot ${what}: ${where}, install the package nftables`);
  }
  // In the node's own namespace it would close the node.
  if (netns !== undefined && !isForeignNetns(netns)) {
    const text = `Cannot ${what}: ${netns} is no network namespace of a pod`;
    throw new CniError(code.ioFailure, text);
  }
  const ending = await run(file, args, {
    // The C locale: its messages are read.
    env: { PATH: programDirs.join(":"), LC_ALL: "C" },
    stdin,
    timeoutMs,
    signal: host.signal,
    stdoutBytesMax: listBytesMax,
    ...(netns !== undefined && { netns }),
  });
  if (ending.kind === "exit" && ending.status === 0) return ending.stdout;
  if (ending.kind === "exit" && missing?.test(ending.stderr)) return undefined;
  throw failed(ending, task);
}

function failed(ending: Ending & Output, { what, netns }: Task): CniError {
  const { kind, stderr } = ending;
  // The kernel's word for connection tracking where it has none.
  const noTracking = /Protocol error/.test(stderr)
    ? ", on a bridge this needs the kernel module nf_conntrack_bridge: load it, or keep rules in " +
      'the pod (policy.where = "pod")'
    : "";
  const reasons: Record<Ending["kind"], string> = {
    exit: `nft says "${oneLine(stderr, 300)}"${noTracking}`,
    timeout: `nft took more than ${timeoutMs} ms`,
    overflow: `nft printed more than ${listBytesMax} bytes`,
    aborted: "we were asked to end",
    spawn: `nft did not run: ${kind === "spawn" ? ending.reason : ""}`,
    signal: `nft was killed by ${kind === "signal" ? ending.signal : ""}`,
  };
  const isLater = kind === "timeout" || kind === "aborted" || kind === "signal";
  const where = netns === undefined ? "" : ` in ${netns}`;
  const details = oneLine(stderr, 4000);
  const codeOf = isLater ? code.tryAgainLater : code.ioFailure;
  return new CniError(codeOf, `Cannot ${what}${where}: ${reasons[kind]}`, { details });
}
