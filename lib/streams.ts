/**
 * The three streams of the process, read and written whole. Synchronous on purpose: the runtime's
 * own streams cost milliseconds that every pod would pay.
 */
import { readSync, writeSync } from "node:fs";
import { CniError, code } from "./cni.ts";

/** Largest stdin read, in bytes: a config, a result and 256 KiB of annotations fit many times. */
const stdinBytesMax = 4 * 1024 * 1024;

/**
 * Reads file descriptor 0 to its end, as text.
 * @throws CniError 6 when it is larger than 4 MiB or not UTF-8, 5 when it cannot be read
 */
export function readStdin(): string {
  const chunks: Buffer[] = [];
  let total = 0;
  for (;;) {
    const chunk = Buffer.allocUnsafe(65536);
    let count: number;
    try {
      count = readSync(0, chunk, 0, chunk.length, null);
    } catch (error) {
      const reason = (error as NodeJS.ErrnoException).code;
      if (reason === "EOF") break;
      if (reason === "EAGAIN") {
        Bun.sleepSync(1);
        continue;
      }
      throw new CniError(code.ioFailure, `Cannot read stdin: ${reason}`, { cause: error });
    }
    if (count === 0) break;
    total += count;
    if (total > stdinBytesMax) {
      throw new CniError(
        code.decodingFailure,
        `Cannot read network config on stdin: it is larger than ${stdinBytesMax} bytes`,
      );
    }
    chunks.push(chunk.subarray(0, count));
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(chunks));
  } catch (error) {
    throw new CniError(
      code.decodingFailure,
      "Cannot read network config on stdin: it is not UTF-8",
      { cause: error },
    );
  }
}

/** Writes everything, however short each write is; a reader that went away is no error of ours. */
export function writeAll(fd: number, text: string): void {
  const bytes = Buffer.from(text);
  for (let at = 0; at < bytes.length; ) {
    try {
      at += writeSync(fd, bytes, at);
    } catch (error) {
      const reason = (error as NodeJS.ErrnoException).code;
      if (reason !== "EAGAIN") return;
      Bun.sleepSync(1);
    }
  }
}
