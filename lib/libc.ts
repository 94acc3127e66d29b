/**
 * The calls of libc that Bun does not offer. Opened once, when first needed (0.1 ms); null
 * where there is no glibc, and every caller has another way then.
 */
import { dlopen, FFIType } from "bun:ffi";

/** The functions, as C declares them. */
export interface Libc {
  pipe2: (fds: Int32Array, flags: number) => number;
  setns: (fd: number, kind: number) => number;
  unshare: (kinds: number) => number;
  _exit: (status: number) => void;
}

let opened: Libc | null | undefined;

/** Opens libc, or hands back what was opened before. */
export function libc(): Libc | null {
  opened ??= open();
  return opened;
}

function open(): Libc | null {
  try {
    return dlopen("libc.so.6", {
      pipe2: { args: [FFIType.ptr, FFIType.i32], returns: FFIType.i32 },
      setns: { args: [FFIType.i32, FFIType.i32], returns: FFIType.i32 },
      unshare: { args: [FFIType.i32], returns: FFIType.i32 },
      _exit: { args: [FFIType.i32], returns: FFIType.void },
    }).symbols;
  } catch (error) {
    if (error instanceof Error) return null;
    throw error;
  }
}

/** Locks on ranges of files, see `file_lock.ts`. */
export interface FileLocks {
  fcntl: (fd: number, command: number, lock: Uint8Array) => number;
}

let locks: FileLocks | null | undefined;

/** Opened apart from the others, which every ADD needs. */
export function fileLocks(): FileLocks | null {
  locks ??= openLocks();
  return locks;
}

function openLocks(): FileLocks | null {
  try {
    return dlopen("libc.so.6", {
      fcntl: { args: [FFIType.i32, FFIType.i32, FFIType.ptr], returns: FFIType.i32 },
    }).symbols;
  } catch (error) {
    if (error instanceof Error) return null;
    throw error;
  }
}

/** Questions to the kernel by netlink, see `netlink.ts`; and `flock(2)`, see `reservations.ts`. */
export interface KernelCalls {
  socket: (domain: number, type: number, protocol: number) => number;
  send: (fd: number, bytes: Uint8Array, length: bigint, flags: number) => bigint;
  recv: (fd: number, bytes: Uint8Array, length: bigint, flags: number) => bigint;
  close: (fd: number) => number;
  flock: (fd: number, operation: number) => number;
}

let kernel: KernelCalls | null | undefined;

/** Opened apart from the others, which every ADD needs. */
export function kernelCalls(): KernelCalls | null {
  kernel ??= openKernelCalls();
  return kernel;
}

function openKernelCalls(): KernelCalls | null {
  const { i32, ptr, i64, u64 } = FFIType;
  try {
    return dlopen("libc.so.6", {
      socket: { args: [i32, i32, i32], returns: i32 },
      send: { args: [i32, ptr, u64, i32], returns: i64 },
      recv: { args: [i32, ptr, u64, i32], returns: i64 },
      close: { args: [i32], returns: i32 },
      flock: { args: [i32, i32], returns: i32 },
    }).symbols;
  } catch (error) {
    if (error instanceof Error) return null;
    throw error;
  }
}
