/** The outputs of a child: read without holding it up, kept in memory that is bounded. */
import { readSync } from "node:fs";

/** Between two looks into a pipe whose child still runs. */
const pumpMs = 20;

/** One output being read. */
export interface Collector {
  /** Settles at the end of the output. */
  done: Promise<void>;
  ended: () => boolean;
  /** Bytes seen so far, kept or not. */
  seen: () => number;
  bytes: () => Uint8Array;
  /** Takes what is there now, where that does not come by itself. */
  pump: () => void;
  cancel: () => Promise<void>;
}

/**
 * Keeps an output in memory that is bounded whatever comes. With `onOverflow` it keeps the first
 * `bytesMax` bytes and stops there; without, it keeps the last ones and goes on.
 */
function keep(bytesMax: number, onOverflow?: () => void) {
  const chunks: Uint8Array[] = [];
  let seen = 0;
  let held = 0;
  return {
    /** False when it is enough. */
    take(value: Uint8Array): boolean {
      seen += value.length;
      held += value.length;
      chunks.push(value);
      if (onOverflow !== undefined && seen > bytesMax) {
        onOverflow();
        return false;
      }
      while (held - (chunks[0]?.length ?? 0) >= bytesMax) held -= chunks.shift()?.length ?? 0;
      return true;
    },
    seen: () => seen,
    bytes: () => {
      const all = Buffer.concat(chunks);
      return onOverflow ? all.subarray(0, bytesMax) : all.subarray(-bytesMax);
    },
  };
}

/** Collects an output: our end of a pipe, or a stream of Bun's. */
export function collect(
  output: number | ReadableStream<Uint8Array>,
  bytesMax: number,
  onOverflow?: () => void,
): Collector {
  const kept = keep(bytesMax, onOverflow);
  return typeof output === "number" ? collectPipe(output, kept) : collectStream(output, kept);
}

function collectStream(
  stream: ReadableStream<Uint8Array>,
  { take, seen, bytes }: ReturnType<typeof keep>,
): Collector {
  const reader = stream.getReader();
  let ended = false;
  const read = async () => {
    for (;;) {
      const { done, value } = await reader.read();
      ended = done;
      if (done || !take(value)) return;
    }
  };
  return {
    done: read(),
    ended: () => ended,
    seen,
    bytes,
    pump: () => undefined,
    cancel: () => reader.cancel(),
  };
}

/**
 * Reads a pipe at exit, and every 20 ms before, so that a child with much to say is not held up.
 * A stream would be woken sooner, and costs each call two threads and half a millisecond.
 */
function collectPipe(fd: number, { take, seen, bytes }: ReturnType<typeof keep>): Collector {
  const buffer = Buffer.allocUnsafe(65536);
  const { promise: done, resolve, reject } = Promise.withResolvers<void>();
  let isOpen = true;
  let ended = false;
  const stop = () => {
    isOpen = false;
    clearInterval(timer);
    resolve();
  };
  const pump = () => {
    try {
      while (isOpen) {
        const count = readSync(fd, buffer);
        ended = count === 0;
        if (ended || !take(Buffer.from(buffer.subarray(0, count)))) stop();
      }
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EAGAIN") return;
      clearInterval(timer);
      reject(error);
    }
  };
  const timer = setInterval(pump, pumpMs);
  return { done, ended: () => ended, seen, bytes, pump, cancel: async () => stop() };
}
