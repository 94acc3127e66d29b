/**
 * `bun tests/bench/distance.ts PORT MS`: a way to a server on this machine as long as if it were so
 * many ms away, there and back. Prints the port that it listens on, and serves until it is killed.
 * Each byte takes half of it in either direction, and the first ones of a connection a whole round
 * more: the handshake of TCP, which the kernel answers at once. So unlike with a server that thinks
 * for so long, connecting and TLS also cost what they do over a real distance.
 */
import { type AddressInfo, connect, createServer, type Socket } from "node:net";

const [port = 0, distanceMs = 0] = process.argv.slice(2).map(Number);

/** Hands on what comes, in its order and so much later; the end and a failure too. */
function pass(from: Socket, to: Socket, firstMs: number): void {
  const openMs = performance.now() + firstMs;
  // Timers of almost the same moment may come in any order, so each takes the oldest of the queue.
  const queue: (() => void)[] = [];
  const later = (work: () => void) => {
    const waitMs = Math.max(0, openMs - performance.now()) + distanceMs / 2;
    queue.push(work);
    setTimeout(() => queue.shift()?.(), Math.ceil(waitMs));
  };
  from.on("data", (bytes) => later(() => to.write(bytes)));
  from.on("end", () => later(() => to.end()));
  from.on("error", () => later(() => to.destroy()));
}

const server = createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
  const target = connect({ port, host: "127.0.0.1", allowHalfOpen: true, noDelay: true });
  pass(client, target, distanceMs);
  pass(target, client, 0);
});
server.listen(0, "127.0.0.1", () => {
  process.stdout.write(`${(server.address() as AddressInfo).port}\n`);
});
