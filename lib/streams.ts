/**
 * Stdin, stdout and small files, read and written whole and synchronously: Bun's own streams cost
 * milliseconds. Also the trace: with `GENIE_TRACE=1` one JSON line of stage → µs on stderr.
 */
import { readFileSync, readSync, statSync, writeSync } from "node:fs";
import { CniError, code } from "./cni.ts";

/** Largest stdin, in bytes: a config, a result and 256 KiB of annotations fit many times over. */
const stdinBytesMax = 4 * 1024 * 1024;
/** Largest config file, in bytes. */
const fileBytesMax = 1024 * 1024;

/**
 * Reads file descriptor 0 to its end, as text.
 * @throws CniError 6 when it is larger than 4 MiB or not UTF-8, 5 when it cannot be read
 */
export function readStdin(): string {
  const what = "network config on stdin";
  const chunks: Uint8Array[] = [];
  for (let total = 0; ; ) {
    const chunk = new Uint8Array(16 * 1024);
    let count = 0;
    try {
      count = readSync(0, chunk, 0, chunk.length, null);
    } catch (error) {
      const reason = (error as NodeJS.ErrnoException).code;
      if (reason === "EAGAIN") {
        Bun.sleepSync(1);
        continue;
      }
      if (reason !== "EOF") {
        throw new CniError(code.ioFailure, `Cannot read stdin: ${reason}`, { cause: error });
      }
    }
    if (count === 0) break;
    total += count;
    if (total > stdinBytesMax) {
      const msg = `Cannot read ${what}: it is larger than ${stdinBytesMax} bytes`;
      throw new CniError(code.decodingFailure, msg);
    }
    chunks.push(chunk.subarray(0, count));
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Bun.concatArrayBuffers(chunks));
  } catch (cause) {
    throw new CniError(code.decodingFailure, `Cannot read ${what}: it is not UTF-8`, { cause });
  }
}

/**
 * Reads a text file of bounded size.
 * @throws CniError 5 when it is larger than 1 MiB or no regular file; what `fs` throws otherwise
 */
export function readSmallFile(path: string): string {
  const found = statSync(path);
  if (found.isFile() && found.size <= fileBytesMax) return readFileSync(path, "utf8");
  const msg = `Cannot read ${path}: expected a regular file of at most ${fileBytesMax} bytes`;
  throw new CniError(code.ioFailure, msg);
}

/** Writes the whole text, in as many writes as it takes; that nobody reads any more is no error. */
export function writeAll(fd: number, text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length; ) {
    try {
      at += writeSync(fd, bytes, at);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "EAGAIN") return;
      Bun.sleepSync(1);
    }
  }
}

let marks: [stage: string, atNs: number][] | undefined;

/** Starts the trace; `sinceNs` is when our own code started. */
export function startTrace(sinceNs: number): void {
  marks = [["start", sinceNs]];
}

/** Marks the end of a stage; the times of stages with the same name are added up. */
export function mark(stage: string): void {
  marks?.push([stage, Bun.nanoseconds()]);
}

/** The line to print, or undefined when the trace is off. */
export function formatTrace(): string | undefined {
  if (!marks) return undefined;
  const stages: Record<string, number> = {};
  let beforeNs = marks[0]?.[1] ?? 0;
  for (const [stage, atNs] of marks.slice(1)) {
    stages[stage] = (stages[stage] ?? 0) + Math.round((atNs - beforeNs) / 1000);
    beforeNs = atNs;
  }
  return JSON.stringify({ genieTraceUs: stages });
}
