/**
 * The only place that starts a program. Whatever comes first decides how the run ended: the child's
 * exit, the deadline, an abort, or too much output. After the last three the whole process group is
 * ended (`recovery/stuck_child.ts`). A grandchild that keeps the outputs open does not delay it.
 */
import { closeSync, constants, openSync, readSync } from "node:fs";
import type { Ending, Output, RunOptions } from "./call.ts";
import { CniError, code, toCniError } from "./cni.ts";
import { inNetns, libc } from "./kernel.ts";

/** Folders of the administrator's programs, which a runtime's PATH often leaves out. */
export const programDirs = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin"];

type Untimed = Ending & Omit<Output, "durationUs">;

const noOutput = { stdout: "", stdoutIsText: true, stderr: "" };
const stderrBytesMax = 64 * 1024;
const busyRetries = 5;
const busyRetryMs = 200;
/** Time between two reads of the pipes while the child runs. */
const pumpMs = 20;

/**
 * Runs one executable in its own process group, in folder `/`. Never rejects for what it does.
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
  const timed = (ending: Untimed) => ({
    ...ending,
    durationUs: Math.round((Bun.nanoseconds() - startNs) / 1000),
  });
  const early = watchForEarlyEnd(options);
  const start = () => spawn(file, args, options, early);
  try {
    for (let retries = 0; early.reason !== "aborted"; retries++) {
      try {
        const child = options.netns === undefined ? start() : inNetns(options.netns, start);
        if (child) return timed(await waitFor(child, early));
        return timed({ kind: "spawn", reason: `no way into ${options.netns}`, ...noOutput });
      } catch (error) {
        if (error instanceof CniError) throw error;
        const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
        // ETXTBSY: somebody is just replacing the plugin.
        if (reason !== "ETXTBSY" || retries === busyRetries || early.reason === "timeout") {
          return timed({ kind: "spawn", reason, ...noOutput });
        }
        const { within } = await import("./recovery/stuck_child.ts");
        await within(early.happened, busyRetryMs);
      }
    }
    return timed({ kind: "aborted", ...noOutput });
  } finally {
    early.release();
  }
}

/** The first reason to end a run early; later ones are ignored. */
export interface EarlyEnd {
  reason: "timeout" | "aborted" | "overflow" | undefined;
  /** Settles once there is a reason. */
  happened: Promise<void>;
  because: (reason: "timeout" | "aborted" | "overflow") => void;
  release: () => void;
}

function watchForEarlyEnd({ timeoutMs, signal }: RunOptions): EarlyEnd {
  const { promise, resolve } = Promise.withResolvers<void>();
  const early: EarlyEnd = {
    reason: undefined,
    happened: promise,
    because: (reason) => {
      early.reason ??= reason;
      resolve();
    },
    release: () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", onAbort);
    },
  };
  const onAbort = () => early.because("aborted");
  const timer = setTimeout(early.because, timeoutMs, "timeout");
  if (signal?.aborted) onAbort();
  signal?.addEventListener("abort", onAbort, { once: true });
  return early;
}

/** One output of a child, as far as it has been read. */
export interface Capture {
  /** Our end of the pipe; undefined where a stream of Bun's takes its place. */
  fd: number | undefined;
  bytesMax: number;
  /** Called when there is more; the first `bytesMax` bytes are kept. Without it, the last are. */
  onOverflow?: () => void;
  chunks: Uint8Array[];
  /** Bytes in `chunks`, and bytes read altogether. */
  held: number;
  seen: number;
  /** False after the end of the output, or once it has given enough. */
  isOpen: boolean;
}

/** A started child with its outputs. */
export interface Child {
  subprocess: Bun.Subprocess;
  stdout: Capture;
  stderr: Capture;
}

function spawn(file: string, args: string[], options: RunOptions, early: EarlyEnd): Child {
  const out = openPipe();
  const err = openPipe();
  const pipes: { read: number; write: number }[] = [];
  for (const pipe of [out, err]) if (pipe) pipes.push(pipe);
  try {
    const subprocess = Bun.spawn([file, ...args], {
      env: options.env,
      cwd: "/",
      detached: true,
      // The child gets a buffer as a file in memory: no write to wait for, no broken pipe.
      stdin: new TextEncoder().encode(options.stdin),
      stdout: out?.write ?? "pipe",
      stderr: err?.write ?? "pipe",
    });
    const bytesMax = options.stdoutBytesMax ?? 1024 * 1024;
    const onOverflow = () => early.because("overflow");
    const unread = { held: 0, seen: 0, isOpen: true };
    return {
      subprocess,
      stdout: { fd: out?.read, bytesMax, onOverflow, chunks: [], ...unread },
      stderr: { fd: err?.read, bytesMax: stderrBytesMax, chunks: [], ...unread },
    };
  } catch (error) {
    for (const { read } of pipes) closeSync(read);
    throw error;
  } finally {
    for (const { write } of pipes) closeSync(write);
  }
}

const closeOnExec = 0o2000000;

/**
 * A pipe(2), or undefined where libc cannot be called. Bun's own are sockets, and a script that
 * opens /dev/stdout fails on one. Our end is opened again, so that reading it never waits.
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

/**
 * Waits for the ending and reads the outputs: at exit, and every 20 ms before, so that a child that
 * writes much can go on. Streams would cost each call two threads and half a millisecond.
 */
async function waitFor(child: Child, early: EarlyEnd): Promise<Untimed> {
  const { subprocess, stdout, stderr } = child;
  const outputs = [stdout, stderr];
  const { promise: failure, reject } = Promise.withResolvers<never>();
  const timer = setInterval(() => {
    try {
      pump(outputs);
    } catch (error) {
      reject(error);
    }
  }, pumpMs);
  let closeStreams: (() => Promise<unknown>) | undefined;
  try {
    if (stdout.fd === undefined || stderr.fd === undefined) {
      closeStreams = (await import("./recovery/stuck_child.ts")).readStreams(child, reject);
    }
    await Promise.race([subprocess.exited.then(early.release), early.happened, failure]);
    pump(outputs);
    if (early.reason !== undefined || stdout.isOpen || stderr.isOpen) {
      await (await import("./recovery/stuck_child.ts")).endEarly(child, early);
    }
    const last = joined(stderr.chunks).subarray(-stderr.bytesMax);
    const output = { ...decode(stdout), stderr: new TextDecoder().decode(last) };
    if (early.reason !== undefined) return { kind: early.reason, ...output };
    const { exitCode, signalCode } = subprocess;
    if (signalCode !== null) return { kind: "signal", signal: String(signalCode), ...output };
    return { kind: "exit", status: exitCode ?? 0, ...output };
  } catch (error) {
    (await import("./recovery/stuck_child.ts")).signalGroup(subprocess.pid, "SIGKILL");
    const msg = `Cannot read output: ${toCniError(error).message}`;
    throw new CniError(code.ioFailure, msg, { cause: error });
  } finally {
    clearInterval(timer);
    await closeStreams?.();
    for (const { fd } of outputs) if (fd !== undefined) closeSync(fd);
  }
}

/** Reads what the pipes hold now. */
export function pump(outputs: readonly Capture[]): void {
  for (const output of outputs) {
    while (output.isOpen && output.fd !== undefined) {
      try {
        const count = readSync(output.fd, readBuffer);
        if (count === 0) output.isOpen = false;
        else keep(output, readBuffer.slice(0, count));
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === "EAGAIN") break;
        throw error;
      }
    }
  }
}

// A `Buffer` would cost 0.2 ms: its methods are written in JavaScript and compiled when first used.
const readBuffer = new Uint8Array(16 * 1024);

function joined(chunks: Uint8Array[]): Uint8Array {
  return new Uint8Array(Bun.concatArrayBuffers(chunks));
}

/** Adds to an output, which stays bounded whatever the child writes. */
export function keep(output: Capture, bytes: Uint8Array): void {
  output.seen += bytes.length;
  output.held += bytes.length;
  output.chunks.push(bytes);
  if (output.onOverflow && output.seen > output.bytesMax) {
    output.isOpen = false;
    output.onOverflow();
  }
  while (!output.onOverflow && output.held - (output.chunks[0]?.length ?? 0) >= output.bytesMax) {
    output.held -= output.chunks.shift()?.length ?? 0;
  }
}

function decode({ chunks, bytesMax }: Capture): { stdout: string; stdoutIsText: boolean } {
  const bytes = joined(chunks).subarray(0, bytesMax);
  try {
    return { stdout: new TextDecoder("utf-8", { fatal: true }).decode(bytes), stdoutIsText: true };
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    return { stdout: new TextDecoder().decode(bytes), stdoutIsText: false };
  }
}
