/**
 * Pods come and go, 20 at once, on one node with real bridges and host-local; one in twenty meets a
 * fault, followed by what a runtime does then: DEL, and the ADD again. At the end nothing is left,
 * no address was ever given twice, and the ledger tells of every call.
 */
import { Database } from "bun:sqlite";
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fakePlugin } from "../fakes.ts";
import {
  hostLocal,
  type Node,
  type Pod,
  realNeeds,
  type WireResult,
  withNode,
} from "../fixtures/quirks/node.ts";
import { strictIssues } from "../strict_result.ts";
import { endMarked, marked, newMark } from "./marked.ts";
import { type Case, type Outcome, type Part, type PartOptions, runCases } from "./part.ts";
import { oneIn, pick, type Random } from "./seed.ts";
import { contradictions, type Told } from "./story.ts";

/** The longest a call may take; its own limits are far below. */
const callMsMax = 60_000;

/** One node and what was seen of it. */
interface Storm {
  node: Node;
  mark: Record<string, string>;
  /** Once in so many pods something goes wrong. */
  faultIn: number;
  story: Told[];
  /** Who has an address at this moment. */
  owners: Map<string, string>;
  /** The calls that are running. */
  pids: Set<number>;
  peakKiB: { rss: number; pss: number };
}

/** One pod, as its runtime keeps it. */
interface Life {
  storm: Storm;
  pod: Pod;
  cni: string;
  random: Random;
  count: Case["count"];
}

/** A call that was begun; `answer` comes with its end, or once it was killed. */
interface Begun {
  kill: (signal: NodeJS.Signals) => void;
  answer: Promise<Told>;
}

function begin(life: Life, command: string): Begun {
  const { storm, pod, cni } = life;
  const { words, env, stdin } = pod.prepare(command, { cni });
  const child = Bun.spawn(words, {
    env: { ...env, ...storm.mark },
    cwd: "/",
    stdin: Buffer.from(stdin),
    stdout: "pipe",
    stderr: "pipe",
  });
  storm.pids.add(child.pid);
  const limit = setTimeout(() => child.kill("SIGABRT"), callMsMax);
  const ended = async (): Promise<Told> => {
    await child.exited;
    clearTimeout(limit);
    storm.pids.delete(child.pid);
    const told = { containerId: pod.containerId, command, msg: "", result: undefined };
    if (child.signalCode === "SIGABRT") throw new Error(`${command} hung for ${callMsMax} ms`);
    if (child.exitCode === null) {
      // Not the outputs: an orphan would hold them.
      storm.story.push({ ...told, code: undefined });
      return { ...told, code: undefined };
    }
    const [stdout, stderr] = await Promise.all([child.stdout.text(), child.stderr.text()]);
    const document: WireResult = stdout === "" ? { cniVersion: "" } : JSON.parse(stdout);
    const { code = child.exitCode, msg = "" } = document;
    const isAdded = command === "ADD" && code === 0;
    if (isAdded) {
      const asked = { version: "1.0.0", ifName: "eth0", netns: pod.netns };
      const issues = strictIssues(stdout, asked);
      if (issues.length > 0) throw new Error(`no result: ${issues}: ${stdout}`);
    }
    if ((code === 0) !== (child.exitCode === 0) || /\n\s+at /.test(stderr)) {
      throw new Error(`${command} ended with ${child.exitCode}: ${stdout}${stderr}`);
    }
    storm.story.push({ ...told, code, msg, result: isAdded ? document : undefined });
    return { ...told, code, msg, result: isAdded ? document : undefined };
  };
  return { kill: (signal) => child.kill(signal), answer: ended() };
}

const call = (life: Life, command: string): Promise<Told> => begin(life, command).answer;

const shown = ({ command, code, msg }: Told): string => `${command}: ${code ?? "killed"} ${msg}`;

function expectCode(told: Told, ...codes: (number | undefined)[]): void {
  if (!codes.includes(told.code)) throw new Error(`not ${codes.join(" or ")}: ${shown(told)}`);
}

/** From its ADD on the addresses are the pod's; from the beginning of its DEL on not any more. */
function claim({ storm, pod, count }: Life, { result }: Told): void {
  for (const { address } of result?.ips ?? []) {
    const owner = storm.owners.get(address);
    if (owner !== undefined && owner !== pod.containerId) {
      throw new Error(`${address} belongs to ${owner} and was given to ${pod.containerId}`);
    }
    storm.owners.set(address, pod.containerId);
    count("addresses");
  }
}

function unclaim({ storm: { owners }, pod }: Life): void {
  for (const [address, owner] of owners) if (owner === pod.containerId) owners.delete(address);
}

/** The reference plugins race each other over one bridge at times; a runtime tries again. */
const isTheirs = ({ msg }: Told): boolean => /plugin "(bridge|host-local)" failed: /.test(msg);

/** ADD that has to work, after whatever went before. */
async function add(life: Life): Promise<void> {
  for (let tries = 1; ; tries++) {
    const told = await call(life, "ADD");
    if (told.code === 0) {
      claim(life, told);
      return;
    }
    if (!isTheirs(told) || tries === 5) throw new Error(`ADD has to work: ${shown(told)}`);
    life.count("ADDs that the bridge plugin failed");
    if (oneIn(life.random, 2)) await del(life);
  }
}

/** DEL that has to work. */
async function del(life: Life): Promise<void> {
  unclaim(life);
  expectCode(await call(life, "DEL"), 0);
}

/** What a runtime does after an ADD that failed: most delete first, Nomad adds again. */
async function addAfterFailure(life: Life): Promise<void> {
  if (oneIn(life.random, 2)) await del(life);
  await add(life);
}

/** Tells the plugin of network `odd` what to do in its next calls for this pod, one each. */
function order({ storm, pod }: Life, command: "ADD" | "DEL", ...what: string[]): void {
  const file = join(storm.node.dir, "orders", `${pod.containerId}.${command}`);
  writeFileSync(file, what.map((line) => `${line}\n`).join(""));
}

/** Lets a call run for some milliseconds, then sends it a signal. */
async function interrupt(
  life: Life,
  command: string,
  signal: "SIGKILL" | "SIGTERM",
): Promise<Told> {
  const begun = begin(life, command);
  await Promise.race([Bun.sleep(life.random(120)), begun.answer]);
  begun.kill(signal);
  return begun.answer;
}

/** An ADD that was interrupted may have come to its end before; if so, a second one is refused. */
async function addInterrupted(life: Life, signal: "SIGKILL" | "SIGTERM"): Promise<void> {
  const told = await interrupt(life, "ADD", signal);
  if (told.code === 0) {
    claim(life, told);
    return;
  }
  if (!isTheirs(told)) expectCode(told, undefined, 11);
  if (oneIn(life.random, 2)) {
    const again = await call(life, "ADD");
    // Killed after its commit, it has attached the pod, and nobody knows.
    if (again.code === 0) claim(life, again);
    else if (again.code !== 105 && !isTheirs(again)) throw new Error(shown(again));
    if (again.code === 0) return;
  }
  await del(life);
  await add(life);
}

async function delInterrupted(life: Life, signal: "SIGKILL" | "SIGTERM"): Promise<void> {
  await add(life);
  unclaim(life);
  expectCode(await interrupt(life, "DEL", signal), 0, undefined, 11);
}

/** An ADD whose plugin misbehaves, and the code it has to end with. */
async function addOrdered(life: Life, what: string, code: number): Promise<void> {
  order(life, "ADD", what);
  const told = await call(life, "ADD");
  if (isTheirs(told)) {
    await addAfterFailure(life);
    return;
  }
  expectCode(told, code);
  if (code === 0) claim(life, told);
  else await addAfterFailure(life);
}

async function delOrdered(life: Life, what: string, code: number): Promise<void> {
  await add(life);
  // A DEL that fails in part is made a second time by the same call.
  order(life, "DEL", ...(code === 0 ? [what] : [what, what]));
  unclaim(life);
  expectCode(await call(life, "DEL"), code);
}

/** Another process holds the database for a while, once it is there. */
async function lockDatabase({ storm: { node }, random }: Life): Promise<void> {
  const file = join(node.dir, "state", "genie.db");
  using database = new Database(file, { readwrite: true, create: false });
  for (;;) {
    try {
      database.run("BEGIN IMMEDIATE");
      break;
    } catch (error) {
      if (!String(error).includes("locked")) throw error;
      await Bun.sleep(2);
    }
  }
  await Bun.sleep(300 + random(1200));
  database.run("COMMIT");
}

/** What goes wrong. Each leaves the pod with its networks, or deleted; a DEL follows. */
const faults: Record<string, (life: Life) => Promise<void>> = {
  "ADD killed": (life) => addInterrupted(life, "SIGKILL"),
  "DEL killed": (life) => delInterrupted(life, "SIGKILL"),
  "ADD asked to end": (life) => addInterrupted(life, "SIGTERM"),
  "DEL asked to end": (life) => delInterrupted(life, "SIGTERM"),
  "plugin fails ADD": (life) => addOrdered(life, "fail", 7),
  "plugin dies in ADD": (life) => addOrdered(life, "die", 104),
  "plugin prints noise in ADD": (life) => addOrdered(life, "noise", 104),
  "plugin hangs in ADD": (life) => addOrdered(life, "hang", 0),
  "plugin fails DEL": (life) => delOrdered(life, "fail", 7),
  "plugin dies in DEL": (life) => delOrdered(life, "die", 104),
  "plugin hangs in DEL": (life) => delOrdered(life, "hang", 0),
  "database locked": async (life) => {
    await add(life);
    await Promise.all([lockDatabase(life), del(life)]);
    await Promise.all([lockDatabase(life), add(life)]);
  },
  "DEL twice": async (life) => {
    await add(life);
    await del(life);
    await del(life);
  },
  "DEL thrice at once": async (life) => {
    await add(life);
    await Promise.all([del(life), del(life), del(life)]);
  },
  "ADD twice": async (life) => {
    await add(life);
    expectCode(await call(life, "ADD"), 105);
    expectCode(await call(life, "CHECK"), 0);
  },
  "ADD twice at once": async (life) => {
    const both = await Promise.all([call(life, "ADD"), call(life, "ADD")]);
    for (const told of both) if (told.code === 0) claim(life, told);
    const codes = both.map(({ code }) => code).sort();
    if (both.some(isTheirs)) await del(life);
    else if (!Bun.deepEquals(codes, [0, 105])) throw new Error(both.map(shown).join("; "));
  },
  "DEL in the middle of ADD": async (life) => {
    const begun = begin(life, "ADD");
    await Promise.race([Bun.sleep(life.random(120)), begun.answer]);
    const deleted = call(life, "DEL");
    const told = await begun.answer;
    if (!isTheirs(told)) expectCode(told, 0, 11);
    expectCode(await deleted, 0);
  },
  "namespace gone": async (life) => {
    await add(life);
    life.pod.kill();
  },
};

const asked = ["blue", "blue", "blue", "green", "blue,green"];

async function live(storm: Storm, { random, count }: Case): Promise<void> {
  const [name, fault] = oneIn(random, storm.faultIn)
    ? pick(random, Object.entries(faults))
    : [undefined, add];
  const network = pick(random, asked);
  const cni = name?.startsWith("plugin ") ? `${network},odd` : network;
  const pod = storm.node.pod(`c${crypto.randomUUID()}`);
  const life: Life = { storm, pod, cni, random, count };
  try {
    await fault(life);
    if (name !== undefined) count(`x ${name}`);
    else if (oneIn(random, 8)) expectCode(await call(life, "CHECK"), 0);
    await Bun.sleep(random(200));
    await del(life);
  } catch (error) {
    throw new Error(
      `${cni}, ${name ?? "no fault"}, ${pod.containerId}: ${(error as Error).message}`,
    );
  } finally {
    unclaim(life);
    pod.kill();
  }
}

/** Two bridges with few addresses, which are soon given again, and a plugin that obeys orders. */
function makeNetworks(node: Node): void {
  for (const [name, subnet] of [
    ["blue", "10.201.0.0/25"],
    ["green", "10.202.0.0/25"],
  ] as const) {
    const ipam = hostLocal(node, [subnet]);
    const plugin = { type: "bridge", bridge: `br-${name}`, isGateway: true, ipam };
    node.network(name, { cniVersion: "1.0.0", plugins: [plugin] });
  }
  node.network("odd", { cniVersion: "1.0.0", plugins: [{ type: "odd" }] });
  for (const name of ["orders", "data/odd"]) mkdirSync(join(node.dir, name));
  fakePlugin(node.bin, "odd", oddPlugin(node.dir));
}

const oddPlugin = (dir: string): string => `#!/bin/sh
cat > /dev/null
order=${dir}/orders/$CNI_CONTAINERID.$CNI_COMMAND
kept=${dir}/data/odd/$CNI_CONTAINERID-$CNI_IFNAME
what=
[ $CNI_COMMAND != ADD ] || : > $kept
if [ -e $order ]; then read -r what < $order; sed -i 1d $order; [ -s $order ] || rm $order; fi
case $what in
fail) echo '{"code":7,"msg":"as ordered"}'; exit 1;;
die) kill -9 $$;;
noise) echo noise; exit 0;;
hang) sleep 0.5;;
esac
case $CNI_COMMAND in
ADD) cat <<END
{"cniVersion":"1.0.0","interfaces":[{"name":"$CNI_IFNAME","sandbox":"$CNI_NETNS"}]}
END
;;
DEL) rm -f $kept;;
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}';;
esac
`;

/** Sums what the running genies have in memory. */
function sampleMemory({ pids, peakKiB }: Storm): void {
  const sum = { rss: 0, pss: 0 };
  for (const pid of pids) {
    const text = readRollup(pid);
    sum.rss += Number(/^Rss: +(\d+)/m.exec(text)?.[1] ?? 0);
    sum.pss += Number(/^Pss: +(\d+)/m.exec(text)?.[1] ?? 0);
  }
  peakKiB.rss = Math.max(peakKiB.rss, sum.rss);
  peakKiB.pss = Math.max(peakKiB.pss, sum.pss);
}

function readRollup(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    return ""; // It ended meanwhile.
  }
}

/** What is left of all of them, as text; "" for nothing. */
async function leftBehind({ node, mark, owners }: Storm): Promise<string> {
  const look = () => {
    using database = new Database(join(node.dir, "state", "genie.db"), { readonly: true });
    const all = (table: string) => database.query(`SELECT * FROM ${table}`).all();
    const orders = readdirSync(join(node.dir, "orders"));
    const { attachments, links, rules, files } = node.traces();
    const kept = { operations: all("operations"), statuses: all("statuses"), orders };
    const processes = marked(mark);
    return { attachments, links, rules, files, ...kept, processes, addresses: [...owners] };
  };
  // The kernel removes the interfaces of a dead namespace in its own time.
  for (let tries = 0; ; tries++) {
    const entries = Object.entries(look());
    const found = entries.filter(
      ([, value]) => (Array.isArray(value) ? value.length : value) !== 0,
    );
    if (found.length === 0) return "";
    if (tries === 6000) return JSON.stringify(Object.fromEntries(found));
    await Bun.sleep(10);
  }
}

async function run(options: PartOptions): Promise<Outcome> {
  let outcome: Outcome = { counts: {}, failures: [] };
  const form = { short: 60, full: 1000, workers: options.short ? 8 : 20 };
  await withNode(async (node) => {
    makeNetworks(node);
    const storm: Storm = {
      node,
      mark: newMark(),
      faultIn: options.short ? 3 : 20,
      story: [],
      owners: new Map(),
      pids: new Set(),
      peakKiB: { rss: 0, pss: 0 },
    };
    const sampler = setInterval(() => sampleMemory(storm), 100);
    const startedMs = performance.now();
    try {
      outcome = await runCases(options, form, (one) => live(storm, one));
      const seconds = (performance.now() - startedMs) / 1000;
      const fail = (what: string) => outcome.failures.push({ seed: options.seed, what });
      const left = await leftBehind(storm);
      if (left !== "") fail(`left behind: ${left}`);
      for (const issue of contradictions(join(node.dir, "state", "genie.db"), storm.story)) {
        fail(`the ledger: ${issue}`);
      }
      const { counts } = outcome;
      counts["calls"] = storm.story.length;
      counts["calls in a second"] = Math.round(storm.story.length / seconds);
      counts["MiB of all genies at once, at most"] = Math.round(storm.peakKiB.rss / 1024);
      counts["MiB of them unshared"] = Math.round(storm.peakKiB.pss / 1024);
    } finally {
      clearInterval(sampler);
      endMarked(storm.mark);
    }
  });
  return outcome;
}

/** See above. */
export const storm: Part = {
  title: "pods that come and go, many at once, some of them in trouble",
  needs: realNeeds,
  limitSeconds: { short: 60, full: 420 },
  run,
};
