/**
 * Rulesets in the kernel: written, taken away, compared, by the program `nft` in the namespace they
 * are for. One run is one transaction: the kernel takes a ruleset whole or not at all.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import { type Ending, type Output, programDirs, run } from "../exec.ts";
import { emptyNetns, isForeignNetns, netnsId } from "../netns.ts";
import { oneLine } from "../text.ts";

/** The tables of a pod's netns; `policy.ts` writes them. */
const podTable = "inet genie";
const sealTable = "netdev genie";

/** A run of nft takes 3 ms, 10,000 addresses 50 ms; more than this is a stuck machine. */
const timeoutMs = 10_000;
/** A listing of some 100,000 addresses. */
const listBytesMax = 16 * 1024 * 1024;

/** The first line of each table in a ruleset. */
const tableLine = /^table (\S+ \S+) \{$/gm;

/** What a ruleset is known by in the kernel: the comment of its tables. */
export function rulesetHash(text: string): string {
  return new Bun.CryptoHasher("sha256").update(text).digest("hex").slice(0, 32);
}

/**
 * Puts a ruleset in force, in place of the one before; "" takes it away.
 *
 * @param netns path of the namespace; undefined for the node's own
 * @param options.isFirst none of ours is believed to be there. To take a table away the kernel
 *   waits until nobody looks at it any more, which is 10 ms of an ADD; one that is there after all
 *   is replaced
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
  const what = "put a network policy in force";
  const stdin = withSeal(text, newMarks());
  if (isFirst) {
    const comment = `{ comment "genie:${rulesetHash(text)}" ; }`;
    const fresh = stdin.replaceAll(replaceLines, `create table $1 ${comment}\n`);
    const made = await nft(host, netns, ["-f", "-"], fresh, what).catch(toCniError);
    if (typeof made === "string") return;
    if (isPassing(made)) throw made;
  }
  try {
    await nft(host, netns, ["-f", "-"], stdin, what);
  } catch (error) {
    if (!hasSeal(text) || isPassing(error)) throw error;
    await nft(host, netns, ["-f", "-"], withoutSeal(stdin), what);
    const reason = toCniError(error).message;
    const cost = "a pod with CAP_NET_RAW can send past its policies, take that from it";
    log(host, "warn", `This node cannot check packet sockets (${reason}): ${cost}`);
  }
}

/** What makes room for a table, whether there is one or not. */
const replaceLines = /^add table (.*)\ndelete table \1\n/gm;

/** The secrets of one ruleset; their names in it are those of policy_table.ts. */
type Marks = Record<"seal" | "seal_of_many" | "seal_of_all", string>;

/** Marks that nobody guesses, none of them 0: that is a packet without one. */
function newMarks(): Marks {
  const [a = 0, b = 0, c = 0] = crypto.getRandomValues(new Uint32Array(3));
  if (a === 0 || b === 0 || c === 0 || new Set([a, b, c]).size < 3) return newMarks();
  const [seal, many, all] = [a, b, c].map((one) => `0x${one.toString(16).padStart(8, "0")}`);
  return { seal: seal ?? "", seal_of_many: many ?? "", seal_of_all: all ?? "" };
}

/** The marks of a table in the kernel, as {@link listTable} shows it; others where it has none. */
function marksOf(listing: string): Marks {
  const of = (type: string) =>
    new RegExp(`meta mark (0x\\w+) fib daddr type ${type} meta mark set (0x\\w+)`).exec(listing);
  const [, seal = "0x1", many = "0x2"] = of("multicast") ?? [];
  return { seal, seal_of_many: many, seal_of_all: of("broadcast")?.[2] ?? "0x3" };
}

/** What a second try in another way would not change: it took too long, or was ended. */
function isPassing(error: unknown): boolean {
  return toCniError(error).code === code.tryAgainLater;
}

/** The text as it goes to the kernel: its marks are numbers, its tables are known by their text. */
function withSeal(text: string, marks: Marks): string {
  const comment = `\tcomment "genie:${rulesetHash(text)}"`;
  const known = text.replaceAll(tableLine, (line) => `${line}\n${comment}`);
  const defined = Object.entries(marks).map(([name, mark]) => `define ${name} = ${mark}\n`);
  return `${defined.join("")}${known}`;
}

function hasSeal(text: string): boolean {
  return text.includes(`table ${sealTable}`);
}

/** For kernels before 5.16 and nft before 1.0.1, which have no hook on the way out of a device. */
function withoutSeal(text: string): string {
  const lines = new RegExp(`^(add|delete) table ${sealTable}\\n`, "gm");
  return text.replaceAll(lines, "").replace(new RegExp(`^table ${sealTable} [^]*`, "m"), "");
}

/**
 * Takes the tables away. Where there is none, or no namespace any more, nothing is left to do.
 *
 * @throws CniError as {@link applyRuleset}
 */
export async function removeRuleset(
  host: Host,
  netns: string | undefined,
  tables: string[] = [podTable, sealTable],
): Promise<void> {
  if (netns !== undefined && netnsId(netns) === "") return;
  // To add it first is no error where there is one, and makes one to delete where there is none.
  const stdin = tables.map((table) => `add table ${table}\ndelete table ${table}\n`).join("");
  const what = "take a network policy away";
  try {
    await nft(host, netns, ["-f", "-"], stdin, what);
  } catch (error) {
    if (!hasSeal(stdin) || isPassing(error)) throw error;
    await nft(host, netns, ["-f", "-"], withoutSeal(stdin), what);
  }
}

/**
 * Which ruleset is in force: its {@link rulesetHash}. Undefined where there is none of ours.
 *
 * @throws CniError as {@link applyRuleset}
 */
export async function readRuleset(
  host: Host,
  netns: string | undefined,
  table: string = podTable,
): Promise<string | undefined> {
  const listed = await listTable(host, netns, table, ["-t"]);
  return /^\tcomment "genie:([0-9a-f]{32})"$/m.exec(listed ?? "")?.[1];
}

/**
 * Compares what the kernel has with what we wrote, rule by rule and address by address: the text is
 * loaded into an empty namespace, and nft lists both.
 *
 * @returns what differs, in words; undefined when nothing does
 * @throws CniError as {@link applyRuleset}
 */
export async function verifyRuleset(
  host: Host,
  netns: string | undefined,
  text: string,
): Promise<string | undefined> {
  const tables = [...text.matchAll(tableLine)].map(([, table = ""]) => table);
  if (tables.length === 0) {
    const found = await readRuleset(host, netns);
    return found === undefined
      ? undefined
      : `table ${podTable} is there, and no policy asks for it`;
  }
  using scratch = emptyNetns();
  if (scratch === undefined) {
    throw new CniError(
      code.ioFailure,
      "Cannot check a network policy: no network namespace can be made, run as root",
    );
  }
  const found = new Map<string, string | undefined>();
  for (const table of tables) found.set(table, await listTable(host, netns, table));
  // As loaded: the same marks, and on an interface that every namespace has.
  const marks = marksOf(found.get(podTable) ?? "");
  const same = withSeal(text, marks).replaceAll(device, 'device "lo"');
  const what = "check a network policy";
  const loaded = await nft(host, scratch.path, ["-f", "-"], same, what, /./);
  if (loaded === undefined) await nft(host, scratch.path, ["-f", "-"], withoutSeal(same), what);
  for (const table of tables) {
    const wanted = await listTable(host, scratch.path, table);
    const listing = found.get(table);
    // What this node cannot have at all is missed by nobody.
    if (wanted === undefined && table === sealTable) continue;
    if (listing === undefined) return `table ${table} is gone`;
    const devices = [text.match(device), listing.match(device)].map((one) => String(one));
    if (table === sealTable && devices[0] !== devices[1])
      return `table ${table} is on ${devices[1]}`;
    const bare = listing.replaceAll(device, 'device "lo"');
    const difference = compare(linesOf(wanted ?? ""), linesOf(bare));
    if (difference !== undefined) return `table ${table} differs: ${difference}`;
  }
  return undefined;
}

const device = /\bdevice "[^"]*"/g;

/**
 * A table as nft lists it; undefined where there is none. As text: the JSON of nft 1.0.6 leaves out
 * comments and breaks on flags of a table.
 */
function listTable(
  host: Host,
  netns: string | undefined,
  table: string,
  options: string[] = [],
): Promise<string | undefined> {
  const args = [...options, "list", "table", ...table.split(" ")];
  return nft(host, netns, args, "", "read a network policy", /No such file/);
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
async function nft(
  host: Host,
  netns: string | undefined,
  args: string[],
  stdin: string,
  what: string,
  missing?: RegExp,
): Promise<string | undefined> {
  const dirs = [...(host.env["PATH"] ?? "").split(":"), ...programDirs];
  const file = dirs
    .filter((dir) => dir.startsWith("/"))
    .map((dir) => join(dir, "nft"))
    .find((path) => existsSync(path));
  if (file === undefined) {
    throw new CniError(
      code.ioFailure,
      `Cannot ${what}: the program nft is in none of ${programDirs.join(", ")}, install the ` +
        "package nftables",
    );
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
  throw failed(ending, what, netns);
}

function failed(ending: Ending & Output, what: string, netns: string | undefined): CniError {
  const where = netns === undefined ? "" : ` in ${netns}`;
  // The kernel's word for connection tracking where it has none.
  const noTracking = /Protocol error/.test(ending.stderr)
    ? ", on a bridge this needs the kernel module nf_conntrack_bridge: load it, or keep rules in " +
      'the pod (policy.where = "pod")'
    : "";
  const reasons: Record<Exclude<Ending["kind"], "spawn" | "signal">, string> = {
    exit: `nft says "${oneLine(ending.stderr, 300)}"${noTracking}`,
    timeout: `nft took more than ${timeoutMs} ms`,
    overflow: `nft printed more than ${listBytesMax} bytes`,
    aborted: "we were asked to end",
  };
  const reason =
    ending.kind === "spawn"
      ? `nft did not run: ${ending.reason}`
      : ending.kind === "signal"
        ? `nft was killed by ${ending.signal}`
        : reasons[ending.kind];
  const isLater = ["timeout", "aborted", "signal"].includes(ending.kind);
  return new CniError(
    isLater ? code.tryAgainLater : code.ioFailure,
    `Cannot ${what}${where}: ${reason}`,
    { details: oneLine(ending.stderr, 4000) },
  );
}
