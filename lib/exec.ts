/**
 * The only spawn of the program: one child, one deadline, one ending.
 *
 * How a run ends is decided once, by whichever comes first: the child's exit, the deadline, an
 * abort, or too much output. Only the first is the child's own doing; after the other three its
 * whole process group is ended. A grandchild that outlives the child and keeps its stdout open
 * holds nobody: what the child wrote is read to its end, then the pipe is let go.
 *
 * Delegates get real pipes, made with pipe(2). Bun's own "pipe" is a socket pair, and a script that
 * writes to /dev/stdout or /dev/stderr fails on a socket (ENXIO) though it works under libcni.
 */
import { closeSync, constants, openSync } from "node:fs";
import { CniError, code, toCniError } from "./cni.ts";
import { libc } from "./libc.ts";
import { inNetns } from "./netns.ts";
import { type Collector, collect } from "./output.ts";

/** Folders besides PATH: runtimes often leave out those of the administrator's programs. */
export const programDirs = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin"];

/** The one way a run ended. `spawn` means that nothing ran at all. */
export type Ending =
  | { kind: "exit"; status: number }
  | { kind: "signal"; signal: string }
  | { kind: "timeout" }
  | { kind: "overflow" }
  | { kind: "aborted" }
  /** `reason` is an errno name: ENOENT, EACCES, ENOEXEC, ETXTBSY, … */
  | { kind: "spawn"; reason: string };

/** What a run gave, whatever its ending. */
export interface Output {
  /** At most 1 MiB, or what was allowed; the beginning when the ending is `overflow`. */
  stdout: string;
  /** False when stdout was not UTF-8: `stdout` then holds replacement characters. */
  stdoutIsText: boolean;
  /** The last 64 KiB; invalid UTF-8 is replaced. */
  stderr: string;
  durationUs: number;
}

/** What varies per run. */
export interface RunOptions {
  /** The whole environment of the child: nothing is inherited. */
  env: Record<string, string>;
  stdin: string;
  /** Deadline for everything, retries included. */
  timeoutMs: number;
  /** Ends the run like the deadline does, with the ending `aborted`. */
  signal?: AbortSignal;
  /** Path of the network namespace to run in; absent: ours. */
  netns?: string;
  /** Most that is read of stdout; default 1 MiB. */
  stdoutBytesMax?: number;
}

const stdoutBytesMaxDefault = 1024 * 1024;
const stderrBytesMax = 64 * 1024;
/** Between SIGTERM and SIGKILL. */
const killAfterMs = 2000;
/** A killed process is waited for this long: the kernel may be stuck, or init slow to reap. */
const reapTickMs = 5;
const reapTicksMax = 40;
/** A pipe still open after exit is let go when it was quiet this often, or after the maximum. */
const drainTickMs = 10;
const drainQuietTicks = 10;
const drainTicksMax = 50;
const busyRetries = 5;
const busyRetryMs = 200;

type Cut = "timeout" | "aborted" | "overflow";

/**
 * Runs one executable in its own process group, in folder `/`, and waits for its ending.
 * Never rejects for anything the child does.
 *
 * @param file absolute path; never a shell line
 * @throws CniError 999 when `file` is not absolute, 5 when our own end of a pipe fails
 * @see CNI SPEC 1.1 §2 "Protocol parameters", §4 (delegation)
 */
export async function run(
  file: string,
  args: string[],
  options: RunOptions,
): Promise<Ending & Output> {
  if (!file.startsWith("/")) {
    throw new CniError(code.internal, `Cannot run "${file}": expected an absolute path`);
  }
  const startNs = Bun.nanoseconds();
  const cut = cutter(options);
  try {
    const child = await start(file, args, options, cut);
    const { ending, stdout, stderr } =
      "pid" in child
        ? await finish(child, cut, options)
        : { ending: child, stdout: none, stderr: none };
    return {
      ...ending,
      ...decode(stdout),
      stderr: new TextDecoder().decode(stderr),
      durationUs: Math.round((Bun.nanoseconds() - startNs) / 1000),
    };
  } finally {
    cut.release();
  }
}

const none = new Uint8Array(0);

function decode(bytes: Uint8Array): { stdout: string; stdoutIsText: boolean } {
  try {
    return { stdout: new TextDecoder("utf-8", { fatal: true }).decode(bytes), stdoutIsText: true };
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return { stdout: new TextDecoder().decode(bytes), stdoutIsText: false };
  }
}

/** The first reason to end a run early; later ones are ignored. */
interface Cutter {
  reason: Cut | undefined;
  /** Settles once there is a reason. */
  happened: Promise<void>;
  because: (reason: Cut) => void;
  release: () => void;
}

function cutter({ timeoutMs, signal }: RunOptions): Cutter {
  const { promise, resolve } = Promise.withResolvers<void>();
  const onAbort = () => cut.because("aborted");
  const timer = setTimeout(() => cut.because("timeout"), timeoutMs);
  const cut: Cutter = {
    reason: undefined,
    happened: promise,
    because: (reason) => {
      cut.reason ??= reason;
      resolve();
    },
    release: () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
    },
  };
  if (signal?.aborted) onAbort();
  signal?.addEventListener("abort", onAbort, { once: true });
  return cut;
}

/** A started child and the ends of its output that are ours. */
interface Child {
  pid: number;
  exited: Promise<unknown>;
  ending: () => Ending;
  /** Our end of a pipe, or Bun's stream where there is none. */
  stdout: number | ReadableStream<Uint8Array>;
  stderr: number | ReadableStream<Uint8Array>;
  /** Gives our ends back. Once, after both streams are done with. */
  close: () => void;
}

/** Spawns, retrying while the file is being written (ETXTBSY: a plugin is just replaced). */
async function start(
  file: string,
  args: string[],
  options: RunOptions,
  cut: Cutter,
): Promise<Child | Ending> {
  for (let retries = 0; ; retries++) {
    if (cut.reason === "aborted") return { kind: "aborted" };
    try {
      return spawnIn(options.netns, () => spawn(file, args, options));
    } catch (error) {
      const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
      if (reason !== "ETXTBSY" || retries === busyRetries || cut.reason === "timeout") {
        return { kind: "spawn", reason };
      }
      await within(cut.happened, busyRetryMs);
    }
  }
}

/** Every try enters anew, so that no retry ever runs in our own namespace instead. */
function spawnIn(netns: string | undefined, act: () => Child): Child | Ending {
  if (netns === undefined) return act();
  return inNetns(netns, act) ?? { kind: "spawn", reason: `no way into ${netns}` };
}

function spawn(file: string, args: string[], { env, stdin }: RunOptions): Child {
  const out = openPipe();
  const err = openPipe();
  const pipes = [out, err].filter((pipe) => pipe !== undefined);
  const close = () => {
    for (const pipe of pipes) closeSync(pipe.read);
  };
  try {
    const child = Bun.spawn([file, ...args], {
      env,
      cwd: "/",
      detached: true,
      // A buffer reaches the child as a file in memory: no write to wait for, no broken pipe.
      stdin: Buffer.from(stdin),
      stdout: out?.write ?? "pipe",
      stderr: err?.write ?? "pipe",
    });
    return {
      pid: child.pid,
      exited: child.exited,
      ending: () =>
        child.signalCode === null
          ? { kind: "exit", status: child.exitCode ?? 0 }
          : { kind: "signal", signal: String(child.signalCode) },
      stdout: out?.read ?? streamOf(child.stdout),
      stderr: err?.read ?? streamOf(child.stderr),
      close,
    };
  } catch (error) {
    close();
    throw error;
  } finally {
    for (const pipe of pipes) closeSync(pipe.write);
  }
}

function streamOf(stream: unknown): ReadableStream<Uint8Array> {
  if (stream instanceof ReadableStream) return stream;
  throw new CniError(code.internal, "Bun.spawn gave no stream for an output it was asked to pipe");
}

const closeOnExec = 0o2000000;

/**
 * A pipe(2), or undefined where libc cannot be called: Bun's socket pair then has to do. Our end is
 * opened again, to be read without waiting; the child's stays as every program expects it.
 */
function openPipe(): { read: number; write: number } | undefined {
  const fds = new Int32Array(2);
  if (libc()?.pipe2(fds, closeOnExec) !== 0) return undefined;
  const [blocking = -1, write = -1] = fds;
  try {
    const read = openSync(`/proc/self/fd/${blocking}`, constants.O_RDONLY | constants.O_NONBLOCK);
    return { read, write };
  } catch (error) {
    closeSync(write);
    throw error;
  } finally {
    closeSync(blocking);
  }
}

/** Waits for the ending, ends the group where it is not the child's own, reads what is left. */
async function finish(child: Child, cut: Cutter, options: RunOptions) {
  const bytesMax = options.stdoutBytesMax ?? stdoutBytesMaxDefault;
  const stdout = collect(child.stdout, bytesMax, () => cut.because("overflow"));
  const stderr = collect(child.stderr, stderrBytesMax);
  const read = Promise.all([stdout.done, stderr.done]);
  try {
    const exited = child.exited.then(cut.release);
    await Promise.race([exited, cut.happened, read.then(() => exited)]);
    if (cut.reason === undefined) await drain([stdout, stderr]);
    if (cut.reason !== undefined) {
      if (cut.reason === "overflow") await stdout.cancel();
      await endGroup(child);
      await drain([stdout, stderr]);
    }
    const ending: Ending = cut.reason === undefined ? child.ending() : { kind: cut.reason };
    return { ending, stdout: stdout.bytes(), stderr: stderr.bytes() };
  } catch (error) {
    signalGroup(child.pid, "SIGKILL");
    throw new CniError(code.ioFailure, `Cannot read output: ${toCniError(error).message}`, {
      cause: error,
    });
  } finally {
    await Promise.all([stdout.cancel(), stderr.cancel()]);
    child.close();
  }
}

/**
 * Waits until the outputs of an exited child end, or are only held open. All the child wrote is in
 * the pipe by then, so silence means that it has been read; ticks rather than one long wait, since
 * a busy event loop must not be taken for silence.
 */
async function drain(outputs: Collector[]): Promise<void> {
  for (const output of outputs) output.pump();
  if (outputs.every((output) => output.ended())) return;
  const ended = Promise.all(outputs.map((output) => output.done));
  const seen = () => outputs.reduce((sum, output) => sum + output.seen(), 0);
  let last = seen();
  for (let tick = 0, quiet = 0; tick < drainTicksMax && quiet < drainQuietTicks; tick++) {
    if (await within(ended, drainTickMs)) return;
    for (const output of outputs) output.pump();
    quiet = seen() === last ? quiet + 1 : 0;
    last = seen();
  }
}

/**
 * SIGTERM to the group, SIGKILL 2 s later or as soon as its leader is gone; then waits for the last
 * member to die, so that a rollback never runs beside what it undoes.
 */
async function endGroup(child: Child): Promise<void> {
  signalGroup(child.pid, "SIGTERM");
  await within(child.exited, killAfterMs);
  for (let tick = 0; tick < reapTicksMax && signalGroup(child.pid, "SIGKILL"); tick++) {
    await Bun.sleep(reapTickMs);
  }
}

/** True when the group had a process to signal. */
function signalGroup(pid: number, signal: NodeJS.Signals): boolean {
  try {
    return process.kill(-pid, signal);
  } catch (error) {
    // ESRCH: none left. EPERM: those left are not ours to end (a setuid helper).
    const reason = (error as NodeJS.ErrnoException).code;
    if (reason !== "ESRCH" && reason !== "EPERM") throw error;
    return false;
  }
}

/** True when `promise` settles within `ms`. */
async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: Timer | undefined;
  const late = new Promise<false>((resolve) => {
    timer = setTimeout(() => resolve(false), ms);
  });
  try {
    return await Promise.race([promise.then(() => true), late]);
  } finally {
    clearTimeout(timer);
  }
}
