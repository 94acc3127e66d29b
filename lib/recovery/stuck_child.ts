/**
 * A child that does not end by itself, or whose outputs do not: its process group is ended, and
 * what it wrote is read. Also its outputs where libc cannot be called: they are streams of Bun's.
 */
import { type Capture, type Child, type EarlyEnd, keep, pump } from "../exec.ts";

/**
 * How long a child may go on when we are asked to end, in ms. A plugin that is ended in the middle
 * leaves links that no DEL finds; one that comes to its end is undone.
 */
const graceMs = 5000;
/** Between SIGTERM and SIGKILL. */
const killAfterMs = 2000;
/** A killed process is waited for this long: the kernel may be stuck, or init slow to reap. */
const reapTickMs = 5;
const reapTicksMax = 40;
/** A pipe still open after exit is let go when it was quiet this often, or after the maximum. */
const drainTickMs = 10;
const drainQuietTicks = 10;
const drainTicksMax = 50;

/**
 * Ends the group of a child that is to end early, unless it ends by itself within its grace time;
 * reads what is left in the outputs.
 */
export async function endEarly(child: Child, early: EarlyEnd): Promise<void> {
  const outputs = [child.stdout, child.stderr];
  const { exited } = child.subprocess;
  if (early.reason === "aborted" && (await within(exited, graceMs))) early.reason = undefined;
  if (early.reason === undefined) await drain(outputs);
  if (early.reason === undefined) return;
  await endGroup(child);
  await drain(outputs);
}

/**
 * Waits until the outputs of an exited child end, or are only held open. All the child wrote is in
 * the pipe by then, so silence means that it has been read; ticks rather than one long wait, since
 * a busy event loop must not be taken for silence.
 */
async function drain(outputs: readonly Capture[]): Promise<void> {
  const seen = () => outputs.reduce((sum, output) => sum + output.seen, 0);
  pump(outputs);
  let last = seen();
  for (let tick = 0, quiet = 0; tick < drainTicksMax && quiet < drainQuietTicks; tick++) {
    if (!outputs.some(({ isOpen }) => isOpen)) return;
    await Bun.sleep(drainTickMs);
    pump(outputs);
    quiet = seen() === last ? quiet + 1 : 0;
    last = seen();
  }
}

/**
 * SIGTERM to the group, SIGKILL 2 s later or as soon as its leader is gone; then waits for the last
 * member to die, so that a rollback never runs beside what it undoes.
 */
async function endGroup({ subprocess: { pid, exited } }: Child): Promise<void> {
  signalGroup(pid, "SIGTERM");
  await within(exited, killAfterMs);
  for (let tick = 0; tick < reapTicksMax && signalGroup(pid, "SIGKILL"); tick++) {
    await Bun.sleep(reapTickMs);
  }
}

/** True when the group had a process to signal. */
export function signalGroup(pid: number, signal: NodeJS.Signals): boolean {
  try {
    return process.kill(-pid, signal);
  } catch (error) {
    // ESRCH: none left. EPERM: those left are not ours to end (a setuid helper).
    const reason = (error as NodeJS.ErrnoException).code;
    if (reason !== "ESRCH" && reason !== "EPERM") throw error;
    return false;
  }
}

/**
 * Reads the outputs that are streams of Bun's into their captures.
 * @param onError called when one cannot be read
 * @returns what lets the streams go
 */
export function readStreams(
  { subprocess, stdout, stderr }: Child,
  onError: (error: unknown) => void,
): () => Promise<unknown> {
  const streams = [
    { output: stdout, stream: subprocess.stdout },
    { output: stderr, stream: subprocess.stderr },
  ];
  const readers = streams.flatMap(({ output, stream }) => {
    if (output.fd !== undefined || !(stream instanceof ReadableStream)) return [];
    const reader = stream.getReader();
    const readAll = async () => {
      while (output.isOpen) {
        const { done, value } = await reader.read();
        if (done) output.isOpen = false;
        else keep(output, value);
      }
    };
    readAll().catch(onError);
    return [reader];
  });
  return () => Promise.all(readers.map((reader) => reader.cancel()));
}

/** True when `promise` settles within `ms`. */
export async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  const late = Promise.withResolvers<false>();
  const timer = setTimeout(late.resolve, ms, false);
  try {
    return await Promise.race([promise.then(() => true), late.promise]);
  } finally {
    clearTimeout(timer);
  }
}
