/**
 * The record in trouble while it is needed: its disk full to a few pages, read-only, its file held
 * by another process, cut, overwritten, replaced or removed; before a call or in the middle of one,
 * and by a clock that jumps. ADD attaches or undoes itself and says so, DEL always ends; once the
 * trouble is over nothing is left, and the node is as good as new.
 */
import { Database } from "bun:sqlite";
import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { code } from "../../lib/cni.ts";
import type { GenieRun } from "../fakes.ts";
import { clean, ending, makeNetworks, writePlugins } from "../fixtures/faults.ts";
import { annotated, checkFailure, type Node, type WireCall, wire } from "../wire.ts";
import { makeClock } from "./clock.ts";
import { endMarked, newMark } from "./marked.ts";
import { type Case, type Part, runCases } from "./part.ts";
import { oneIn, pick, type Random } from "./seed.ts";

/** A node whose record is on a small disk of its own. */
interface DiskNode extends Node {
  disk: string;
  file: string;
}

/** What happens to the record. */
interface Trouble {
  told: string;
  /** A line of shell. */
  line: string;
  /** Makes it good again. */
  mend?: string;
  /** Only while no call runs. */
  isQuiet?: boolean;
  /** The file stays locked for so long, in ms, once the line is reached. */
  lockMs?: number;
  /** How an ADD may end while it lasts; 0 is success. */
  add: number[];
  /** The same for DEL. */
  del: number[];
  env?: Record<string, string>;
}

const { stateUnavailable: unavailable, tryAgainLater: later } = code;
/** Whatever became of the file, ADD may have been done with it before. */
const damage = { add: [0, unavailable, later], del: [0, unavailable, later] };

/** Every kind, as often as it is worth. */
const troubles: ((random: Random, node: DiskNode) => Trouble)[] = [
  full,
  full,
  full,
  (_random, { disk }) => ({
    told: "the disk is read-only",
    line: `mount -o remount,ro ${disk}`,
    mend: `mount -o remount,rw ${disk}`,
    isQuiet: true,
    add: [unavailable],
    del: [0],
  }),
  () => ({ told: "the file is locked for 3 s", line: "", lockMs: 3000, add: [0], del: [0] }),
  () => ({
    told: "the file is locked for 13 s",
    line: "",
    lockMs: 13_000,
    add: [0],
    del: [0, later],
  }),
  (random, { file }) => {
    const bytes = random(20) * 1000;
    const line = `[ ! -e ${file} ] || truncate -s ${bytes} ${file}`;
    return { told: `the file is cut to ${bytes} bytes`, line, ...damage };
  },
  (random, node) => overwritten(random, node, ""),
  (random, node) => overwritten(random, node, "-wal"),
  (_random, { file }) => ({ told: "the log is removed", line: `rm -f ${file}-wal`, ...damage }),
  (_random, { file }) => ({ told: "the file is removed", line: `rm -f ${file}`, ...damage }),
  (_random, { state }) => ({ told: "the folder is removed", line: `rm -rf ${state}`, ...damage }),
  (_random, { dir, file }) => {
    const other = join(dir, "other.db");
    using database = new Database(other);
    database.run("CREATE TABLE attachments (a)");
    const line = `cp ${other} ${other}.new; [ ! -e ${file} ] || mv ${other}.new ${file}`;
    return { told: "another program's file is in its place", line, ...damage };
  },
  jump,
  jump,
];

function full(random: Random, { disk }: DiskNode): Trouble {
  const pages = random(50);
  const fill = join(disk, "fill");
  return {
    told: `the disk is full but for ${pages} pages`,
    line: `dd if=/dev/zero of=${fill} bs=4k 2>/dev/null; truncate -s -${pages * 4096} ${fill}`,
    mend: `rm -f ${fill}`,
    add: [0, unavailable],
    del: [0],
  };
}

function overwritten(random: Random, { dir, file }: DiskNode, suffix: string): Trouble {
  const noise = join(dir, "noise");
  const bytes = 1 + random(8000);
  const at = random(40_000);
  writeFileSync(noise, Buffer.from(Array.from({ length: bytes }, () => random(256))));
  const target = `${file}${suffix}`;
  return {
    told: `${bytes} bytes of noise are in genie.db${suffix} at ${at}`,
    line: `[ ! -e ${target} ] || dd if=${noise} of=${target} bs=1 seek=${at} conv=notrunc 2>&1`,
    ...damage,
  };
}

function jump(random: Random, { dir }: DiskNode): Trouble {
  const clock = makeClock(dir);
  const seconds = (oneIn(random, 2) ? -1 : 1) * pick(random, [2, 70, 3600, 86_400, 40_000_000]);
  const { env } = clock;
  return {
    told: `the clock jumps by ${seconds} s`,
    line: clock.line(seconds),
    add: [0],
    del: [0],
    env,
  };
}

/** When: before a call, or in the middle of one, in the hands of a plugin. */
const stages = [
  ...["before ADD", "a ADD", "b ADD", "c ADD"],
  ...["before DEL", "a DEL", "b DEL", "c DEL"],
] as const;

const stdin = annotated({ cni: "blue,green" });
const shell = (line: string) => Bun.spawnSync(["/bin/sh", "-c", line]);

/** Locks the file for a while; `held` settles when it is free again. */
async function lock(file: string, ms: number): Promise<{ held: Promise<void> }> {
  const database = new Database(file);
  for (let tries = 0; ; tries++) {
    try {
      database.run("BEGIN EXCLUSIVE");
      break;
    } catch (error) {
      if (tries === 6000) throw error;
      await Bun.sleep(10);
    }
  }
  const held = Bun.sleep(ms).then(() => {
    database.run("COMMIT");
    database.close();
  });
  return { held };
}

/** Makes the trouble now, or has a plugin make it; returns what is to be waited for in the end. */
function makeTrouble(node: DiskNode, trouble: Trouble, stage: string): () => Promise<void> {
  const [plugin, verb] = stage.split(" ");
  const { file } = node;
  const lockMs = trouble.lockMs ?? 0;
  const isNow = plugin === "before";
  const asked = join(node.dir, "asked");
  const given = join(node.dir, "given");
  const wait = `touch ${asked}; while [ ! -e ${given} ]; do sleep 0.01; done`;
  const line = lockMs > 0 ? wait : trouble.line;
  if (!isNow) writePlugins(node, { [plugin as "a"]: { [verb as "ADD"]: { shell: line } } });
  else if (lockMs === 0) shell(line);
  if (lockMs === 0) return async () => undefined;
  let isOver = false;
  const locked = (async () => {
    while (!isNow && !isOver && !readdirSync(node.dir).includes("asked")) await Bun.sleep(10);
    const { held } = await lock(file, lockMs);
    writeFileSync(given, "");
    await held;
  })();
  return async () => {
    isOver = true;
    await locked;
  };
}

function checkAnswer(what: string, run: GenieRun, allowed: number[]): number {
  const found = run.status === 0 ? 0 : checkFailure(run);
  if (allowed.includes(found)) return found;
  throw new Error(`${what} ended with ${found}, not ${allowed}: ${run.stdout}${run.stderr}`);
}

function same(what: string, found: unknown, expected: unknown): void {
  if (Bun.deepEquals(found, expected)) return;
  throw new Error(`${what}: ${JSON.stringify(found)}, not ${JSON.stringify(expected)}`);
}

async function withDisk(fn: (node: DiskNode) => Promise<void>): Promise<void> {
  using made = makeNetworks();
  const disk = join(made.dir, "disk");
  mkdirSync(disk);
  const mounted = shell(`mount -t tmpfs -o size=1m genie-torture ${disk}`);
  if (mounted.exitCode !== 0) throw new Error(`Cannot mount: ${mounted.stderr}`);
  const state = join(disk, "state");
  const node = { ...made, state, disk, file: join(state, "genie.db") };
  const folders = `conf_dir = "${node.conf}"\nstate_dir = "${state}"\nbin_dirs = []\n`;
  writeFileSync(node.tableFile, `${folders}[plugins.blue]\n[plugins.green]\n`);
  try {
    await fn(node);
  } finally {
    shell(`umount --lazy ${disk}`);
  }
}

const reserved = (node: Node) => readdirSync(node.reserved).sort();

/** ADD and DEL of one container around the trouble, and what is left of it afterwards. */
async function live(
  node: DiskNode,
  trouble: Trouble,
  stage: string,
  call: (command: string, id?: string) => Promise<GenieRun>,
): Promise<void> {
  const isInAdd = stage.endsWith("ADD");
  const none: number[] = [0];
  const own = (names: string[]) => names.filter((name) => name.startsWith("c1-"));
  let over = isInAdd ? makeTrouble(node, trouble, stage) : undefined;
  const added = checkAnswer("ADD", await call("ADD"), isInAdd ? trouble.add : none);
  if (added === 0) same("attached", own(reserved(node)), ["c1-eth0", "c1-eth1"]);
  else same("after a failed ADD", own(reserved(node)), []);
  over ??= makeTrouble(node, trouble, stage);
  const deleted = checkAnswer("DEL", await call("DEL"), trouble.del);
  if (deleted === 0) same("after DEL", own(reserved(node)), []);
  await over();
}

async function runCase({ random, count }: Case): Promise<void> {
  await withDisk(async (node) => {
    const trouble = pick(random, troubles)(random, node);
    const stage = pick(
      random,
      stages.filter((one) => !trouble.isQuiet || one.startsWith("before")),
    );
    const mark = newMark();
    const env = { ...trouble.env, ...mark };
    const call = (command: string, id = "c1"): Promise<GenieRun> => {
      const made: WireCall = { command, stdin, env: { ...env, CNI_CONTAINERID: id } };
      return wire(node, made);
    };
    try {
      // A record that has lived already, with one pod that stays.
      checkAnswer("ADD of another", await call("ADD", "c0"), [0]);
      await live(node, trouble, stage, call);
      shell(trouble.mend ?? "");
      writePlugins(node);
      // Runtimes repeat a DEL; one of a container nobody knows any more undoes what it carries.
      for (const id of ["c1", "c0", "c1", "c0"])
        checkAnswer(`DEL of ${id}`, await call("DEL", id), [0]);
      same("left in the end", ending(node), clean);
      checkAnswer("ADD of the next", await call("ADD", "c2"), [0]);
      checkAnswer("DEL of the next", await call("DEL", "c2"), [0]);
      same("left of the next", ending(node), clean);
      count(
        trouble.told.replace(/\d+ bytes of |but for \d+ pages| to \d+ bytes| at \d+| by .*/g, ""),
      );
    } catch (error) {
      const said = error instanceof Error ? error.message : String(error);
      throw new Error(`${trouble.told}, ${stage}: ${said}`);
    } finally {
      endMarked(mark);
    }
  });
}

/** See above. */
export const state: Part = {
  title: "a record on a bad disk, locked, damaged or gone, and a clock that jumps",
  needs: ["libfaketime", "mounts"],
  limitSeconds: { short: 40, full: 180 },
  run: (asked) => runCases(asked, { short: 40, full: 400, workers: 6 }, runCase),
};
