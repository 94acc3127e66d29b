/** What listens where an API server should be, and does not get as far as HTTP. */
import type { AddressInfo } from "node:net";
import { createServer, type Socket } from "node:net";

/** A way to answer a TCP connection. */
export interface Door {
  name: string;
  /** What becomes of a connection; undefined: nobody listens. */
  open: ((socket: Socket) => void) | undefined;
  says: string;
}

const broken = "the connection failed";
const late = "no answer within ";

/** The whole table. */
export const doors: readonly Door[] = [
  { name: "nobody listens", open: undefined, says: broken },
  { name: "closed at once", open: (socket) => void socket.end(), says: broken },
  { name: "dropped at once", open: (socket) => void socket.destroy(), says: broken },
  { name: "accepted, then silence", open: () => undefined, says: late },
  {
    name: "dropped in the handshake",
    open: (socket) => void socket.once("data", () => socket.destroy()),
    says: broken,
  },
  {
    name: "plain HTTP",
    open: (socket) => void socket.once("data", () => socket.end("HTTP/1.1 400 no\r\n\r\n")),
    says: broken,
  },
  {
    name: "noise",
    open: (socket) => void socket.end(crypto.getRandomValues(new Uint8Array(4096))),
    says: broken,
  },
  {
    name: "an alert of TLS",
    open: (socket) => void socket.end(new Uint8Array([21, 3, 3, 0, 2, 2, 40])),
    says: broken,
  },
];

/** Listens on a free port until it is stopped. */
export async function openDoor({
  open,
}: Door): Promise<{ url: string; stop: () => Promise<void> }> {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    // A client that goes away is the point.
    socket.on("error", () => socket.destroy());
    open?.(socket);
  });
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  const stop = async (): Promise<void> => {
    for (const socket of sockets) socket.destroy();
    if (server.listening) await new Promise<void>((done) => server.close(() => done()));
  };
  const url = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
  if (!open) await stop();
  return { url, stop };
}
