/**
 * What a run of the tests leaves on the machine: network namespaces, processes, mounts and
 * temporary files. A run has a folder for temporary files and an id of its own, so that a second
 * run on the same machine is not taken for it.
 */
import {
  appendFileSync,
  existsSync,
  lstatSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";

const netnsDir = "/var/run/netns";
/** Where genie keeps its record unless a table says otherwise. */
const recordDir = "/var/lib/cni/genie";
/** Longest wait for processes that were told to end, in ms. */
const patienceMs = 15_000;

/** A run that is going on. */
export interface Run {
  /** In the names of network namespaces. */
  id: string;
  /** For temporary files. */
  dir: string;
  /** Network namespaces that were there before. */
  namespaces: string[];
  /** Was the record at its default place there before? */
  hadRecord: boolean;
}

/** Begins a run. Its processes get {@link environment}. */
export function beginRun(): Run {
  const dir = mkdtempSync(join(tmpdir(), "genie-run-"));
  return { id: dir.slice(-6), dir, namespaces: namespaces(), hadRecord: existsSync(recordDir) };
}

/** Variables for the processes of a run. */
export function environment({ id, dir }: Run): Record<string, string> {
  return { TMPDIR: dir, GENIE_TEST_RUN: id };
}

/** Begin of the name of every network namespace that tests make by themselves. */
export function netnsPrefix(id: string | undefined = process.env["GENIE_TEST_RUN"]): string {
  return `genie-${id ?? "test"}-`;
}

function namespaces(): string[] {
  return existsSync(netnsDir) ? readdirSync(netnsDir) : [];
}

/** What a run left, a line for each thing. */
export interface Leftovers {
  /** What nobody removed. */
  left: string[];
  /**
   * Folders that their test had removed, made again by a process that outlived it: a program under
   * test makes the folder of its record where it is missing, and on a slow machine one that was
   * killed may leave a child that ends later than the test.
   */
  cameBack: string[];
}

/**
 * Ends a run: removes all that it left.
 *
 * @param waitMs how long processes may take that were told to end
 */
export async function endRun(run: Run, waitMs = patienceMs): Promise<Leftovers> {
  const untilMs = Date.now() + waitMs;
  while (processes(run).length > 0 && Date.now() < untilMs) await Bun.sleep(50);
  const left: string[] = [];
  for (const { pid, command } of processes(run)) {
    left.push(`process ${pid}: ${command}`);
    kill(pid);
  }
  for (const name of namespaces()) {
    if (run.namespaces.includes(name) || !isOfTests(name, run)) continue;
    left.push(`network namespace ${name}`);
    Bun.spawnSync(["ip", "netns", "del", name]);
  }
  for (const path of mounts(run)) {
    left.push(`mount ${path}`);
    Bun.spawnSync(["umount", "--lazy", path]);
  }
  if (!run.hadRecord && existsSync(recordDir)) {
    left.push(`record ${recordDir}: ${readdirSync(recordDir).join(", ")}`);
    rmSync(recordDir, { recursive: true, force: true });
  }
  const removed = existsSync(join(run.dir, removedName))
    ? readFileSync(join(run.dir, removedName), "utf8").split("\n")
    : [];
  const cameBack: string[] = [];
  for (const name of readdirSync(run.dir)) {
    if (name === removedName) continue;
    const line = `file ${describe(join(run.dir, name))}`;
    (removed.includes(name) ? cameBack : left).push(line);
  }
  rmSync(run.dir, { recursive: true, force: true });
  return { left, cameBack };
}

/** In the run's folder: the names of the folders that tests made and removed again. */
const removedName = ".removed";

/** Removes the folder of a test, and notes that in the run's folder, where it was in that. */
export function removeFolder(path: string): void {
  rmSync(path, { recursive: true, force: true });
  const folder = dirname(path);
  // Appended in one write: tests run side by side.
  if (folder.endsWith(`genie-run-${process.env["GENIE_TEST_RUN"]}`)) {
    appendFileSync(join(folder, removedName), `${basename(path)}\n`);
  }
}

/** A path, and what a folder holds: from that one sees which test made it. */
function describe(path: string): string {
  if (!lstatSync(path).isDirectory()) return path;
  const within = readdirSync(path, { recursive: true }).map(String).sort();
  return `${path} with ${within.slice(0, 20).join(", ") || "nothing in it"}`;
}

function kill(pid: number): void {
  try {
    process.kill(pid, "SIGKILL");
  } catch (error) {
    // It has ended since.
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

/** Demo and bench name theirs as they do for everybody. */
function isOfTests(name: string, { id }: Run): boolean {
  return [netnsPrefix(id), "genie-demo-", "genie-bench-"].some((one) => name.startsWith(one));
}

/** The living processes that name the folder of the run, in their words or their environment. */
function processes({ dir }: Run): { pid: number; command: string }[] {
  const pids = readdirSync("/proc").filter((name) => /^\d+$/.test(name));
  return pids.flatMap((pid) => {
    const words = readProc(pid, "cmdline");
    if (words === "" || Number(pid) === process.pid) return [];
    const isOurs = words.includes(dir) || readProc(pid, "environ").includes(dir);
    return isOurs ? [{ pid: Number(pid), command: words.replaceAll("\0", " ").trim() }] : [];
  });
}

/** A file of a process; "" where it has ended, or is somebody else's. */
function readProc(pid: string, name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, "utf8");
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code ?? "";
    if (["ENOENT", "ESRCH", "EACCES", "EPERM"].includes(reason)) return "";
    throw error;
  }
}

/** Mount points below the folder of the run, the innermost first. */
function mounts({ dir }: Run): string[] {
  return readFileSync("/proc/self/mountinfo", "utf8")
    .split("\n")
    .flatMap((line) => line.split(" ")[4] ?? [])
    .filter((path) => path.startsWith(`${dir}/`))
    .reverse();
}
