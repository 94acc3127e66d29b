/**
 * Tells systemd that the agent works, that it still does, and that it ends. Where systemd did not
 * start it (NOTIFY_SOCKET is not set), nothing happens. The datagrams are sent by libc: Bun has no
 * sockets of this kind.
 * Source: sd_notify(3), "Description" and "Standalone Implementations"; sd_watchdog_enabled(3)
 */
import { dlopen, FFIType, ptr } from "bun:ffi";
import type { Host } from "../call.ts";
import { log } from "../cni.ts";

const { i32, u32, u64, i64, ptr: pointer } = FFIType;
const afUnix = 1;
/** SOCK_DGRAM | SOCK_CLOEXEC */
const datagramType = 2 | 0x80000;
/** MSG_DONTWAIT | MSG_NOSIGNAL: systemd may be slow, and the agent does not wait for it. */
const sendFlags = 0x40 | 0x4000;
/** `sun_path` holds so many bytes (unix(7)). */
const pathBytesMax = 108;

/** Sends one message, lines `NAME=value`, to systemd. */
export type Notify = (message: string) => void;

const sendNothing: Notify = () => undefined;

/**
 * Opens the way to systemd. From then on its watchdog hears of the agent for as long as the event
 * loop, on which all tasks run, is not blocked, and it hears when the agent is asked to end.
 * @returns sends nothing where systemd did not start the agent
 */
export function openNotify(host: Host): Notify {
  const { NOTIFY_SOCKET: socket = "", WATCHDOG_USEC: watchdogUs = "" } = host.env;
  if (!/^[/@]/.test(socket)) return sendNothing;
  const notify = senderTo(socket);
  if (notify === undefined) {
    log(host, "warn", `Cannot tell systemd how the agent is: no way to NOTIFY_SOCKET ${socket}`);
    return sendNothing;
  }
  // Four times in the time that systemd allows, which is in microseconds.
  const everyMs = Number(watchdogUs) / 1000 / 4;
  if (everyMs > 0) setInterval(notify, everyMs, "WATCHDOG=1").unref();
  host.signal.addEventListener("abort", () => notify("STOPPING=1"), { once: true });
  return notify;
}

/** Sends to this socket; undefined where its path is too long, or libc gives no socket. */
function senderTo(path: string): Notify | undefined {
  const encoder = new TextEncoder();
  const name = encoder.encode(path.replace(/^@/, "\0"));
  if (name.length > pathBytesMax) return undefined;
  const address = new Uint8Array(2 + name.length);
  new DataView(address.buffer).setUint16(0, afUnix, true);
  address.set(name, 2);
  try {
    const { socket, sendto } = dlopen("libc.so.6", {
      socket: { args: [i32, i32, i32], returns: i32 },
      sendto: { args: [i32, pointer, u64, i32, pointer, u32], returns: i64 },
    }).symbols;
    const fd = socket(afUnix, datagramType, 0);
    if (fd < 0) return undefined;
    return (message) => {
      const bytes = encoder.encode(message);
      sendto(fd, ptr(bytes), bytes.length, sendFlags, ptr(address), address.length);
    };
  } catch (error) {
    if (!(error instanceof Error)) throw error;
    return undefined;
  }
}
