/**
 * Unary gRPC calls over a Unix socket, and enough of protobuf to read their answers.
 *
 * `@grpc/grpc-js` would bring 31 packages and take 24 ms where this takes 12: one HTTP/2 request is
 * a call, so node:http2 and a reader of 40 lines do. Whatever the socket sends is hostile until
 * read, and everything that goes wrong on the way is a CniError 11.
 * Source: grpc/grpc doc/PROTOCOL-HTTP2.md; protobuf.dev/programming-guides/encoding.
 */
import { type ClientHttp2Session, connect, constants, type IncomingHttpHeaders } from "node:http2";
import { createConnection, type Socket } from "node:net";
import { CniError, code, type Host, toCniError } from "../cni.ts";
import { oneLine } from "../text.ts";

/** Largest answer read: 16 MiB, the limit every client of this API uses. */
const answerBytesMax = 16 * 1024 * 1024;
/** A gRPC message has a prefix: one byte of flags, four of length. */
const prefixBytes = 5;
/** Pauses before a call is repeated that was refused for a rate limit. */
const pausesMs = [20, 50, 100, 200, 400];

/** The gRPC status codes that mean something here. */
export const grpc = { ok: 0, unknown: 2, notFound: 5, exhausted: 8, unimplemented: 12 } as const;
/** Whose socket it is, for messages. */
export interface Peer {
  name: string;
  /** What to ask when there is no socket. */
  absent: string;
}

/** A connection. */
export interface GrpcChannel {
  /** One unary call by its path, repeated while the peer says that it has too many. */
  call(path: string, request: Uint8Array): Promise<GrpcAnswer>;
  close(): void;
}

/** The end of a call. */
export interface GrpcAnswer {
  status: number;
  /** What the peer said of a failure. */
  text: string;
  message: Uint8Array;
}

/**
 * Connects. Everything on the connection has to be over within `timeoutMs`. Close it.
 * @throws CniError 11 with the reason alone
 */
export async function openChannel(
  host: Host,
  socket: string,
  peer: Peer,
  timeoutMs: number,
): Promise<GrpcChannel> {
  const cut = cutter(host, timeoutMs);
  try {
    const channel = await open(socket, peer, cut);
    return {
      call: (path, request) => ask(channel, path, request, cut),
      close: () => {
        cut.release();
        channel.session.destroy();
        channel.raw.destroy();
      },
    };
  } catch (error) {
    cut.release();
    throw error;
  }
}

/** Why there is no usable answer; the caller puts whose answer in front. */
export function unusable(reason: string, details = ""): CniError {
  return new CniError(code.tryAgainLater, reason, { details: oneLine(details, 1000) });
}

/** The deadline of a call, and the wish of our caller to end it. */
interface Cutter {
  /** Rejects with CniError 11; never resolves. */
  happened: Promise<never>;
  release: () => void;
}

function cutter(host: Host, timeoutMs: number): Cutter {
  const { promise, reject } = Promise.withResolvers<never>();
  const abort = () => reject(unusable("we were asked to end"));
  const late = () => reject(unusable(`no answer within ${timeoutMs} ms, is it overloaded`));
  const timer = setTimeout(late, timeoutMs);
  host.signal.addEventListener("abort", abort, { once: true });
  if (host.signal.aborted) abort();
  // Nobody may be waiting when it happens.
  promise.catch(() => undefined);
  const release = () => {
    clearTimeout(timer);
    host.signal.removeEventListener("abort", abort);
  };
  return { happened: promise, release };
}

interface Channel {
  raw: Socket;
  session: ClientHttp2Session;
}

/** Connects, so that a socket that is not there is told apart from one that talks nonsense. */
async function open(socket: string, peer: Peer, cut: Cutter): Promise<Channel> {
  const raw = createConnection(socket);
  try {
    const connected = new Promise<void>((resolve, reject) => {
      raw.once("connect", resolve);
      // Stays: the session reports its own errors here as well, after all is over.
      raw.on("error", (error) => reject(unusable(connectionReason(error, peer))));
    });
    await Promise.race([connected, cut.happened]);
  } catch (error) {
    raw.destroy();
    throw error;
  }
  const session = connect("http://localhost", {
    createConnection: () => raw,
    settings: { enablePush: false, initialWindowSize: 1024 * 1024 },
  });
  // What breaks the session breaks its streams: the reason is read there.
  session.on("error", () => undefined);
  return { raw, session };
}

function connectionReason(error: Error, { name, absent }: Peer): string {
  const { code: reason = error.name } = error as NodeJS.ErrnoException;
  const why: Record<string, string> = {
    ENOENT: `there is no such socket, ${absent}`,
    ECONNREFUSED: `nobody listens there, is the ${name} starting`,
    EACCES: "permission denied, run as root",
  };
  return why[reason] ?? `the connection failed (${reason})`;
}

/** One unary call, repeated while the peer says that it has too many. */
async function ask(
  channel: Channel,
  path: string,
  request: Uint8Array,
  cut: Cutter,
): Promise<GrpcAnswer> {
  for (const pauseMs of pausesMs) {
    const answer = await Promise.race([attempt(channel, path, request), cut.happened]);
    if (answer.status !== grpc.exhausted) return answer;
    await Promise.race([Bun.sleep(pauseMs), cut.happened]);
  }
  return Promise.race([attempt(channel, path, request), cut.happened]);
}

/** One HTTP/2 request. @throws CniError 11 */
function attempt({ session }: Channel, path: string, request: Uint8Array): Promise<GrpcAnswer> {
  const { promise, resolve, reject } = Promise.withResolvers<GrpcAnswer>();
  // It may lose the race against the deadline and fail when nobody waits for it.
  promise.catch(() => undefined);
  const chunks: Buffer[] = [];
  let total = 0;
  let head: IncomingHttpHeaders = {};
  let trailers: IncomingHttpHeaders = {};
  try {
    const stream = session.request({
      ":method": "POST",
      ":path": path,
      "content-type": "application/grpc",
      te: "trailers",
      "user-agent": "genie",
    });
    stream.on("response", (headers) => {
      head = headers;
    });
    stream.on("trailers", (headers) => {
      trailers = headers;
    });
    stream.on("data", (chunk: Buffer) => {
      total += chunk.length;
      if (total <= answerBytesMax + prefixBytes) {
        chunks.push(chunk);
        return;
      }
      chunks.length = 0;
      reject(unusable(`its answer is larger than ${answerBytesMax} bytes`));
      stream.close(constants.NGHTTP2_CANCEL);
    });
    stream.on("error", (error) => reject(unusable(protocolReason(error.message))));
    stream.on("close", () => {
      try {
        resolve(readAnswer({ ...head, ...trailers }, Buffer.concat(chunks)));
      } catch (error) {
        reject(error);
      }
    });
    const prefix = Buffer.alloc(prefixBytes);
    prefix.writeUInt32BE(request.length, 1);
    stream.end(Buffer.concat([prefix, request]));
  } catch (error) {
    reject(unusable(protocolReason(toCniError(error).message)));
  }
  return promise;
}

function protocolReason(said: string): string {
  return `it broke off or does not speak gRPC (${oneLine(said, 200)})`;
}

/** Reads status and message of a finished call. @throws CniError 11 when half of it is missing */
function readAnswer(headers: IncomingHttpHeaders, body: Buffer): GrpcAnswer {
  const http = headers[":status"];
  if (http === undefined) throw unusable(protocolReason("no answer"));
  const isGrpc = String(headers["content-type"] ?? "").startsWith("application/grpc");
  if (Number(http) !== 200 || !isGrpc) throw unusable(protocolReason(`HTTP status ${http}`));
  const given = headers["grpc-status"];
  if (given === undefined) throw unusable(protocolReason("half an answer"));
  const status = /^\d{1,3}$/.test(String(given)) ? Number(given) : grpc.unknown;
  const text = percentDecode(String(headers["grpc-message"] ?? ""));
  if (status !== grpc.ok) return { status, text, message: empty };
  const length = body.length < prefixBytes ? -1 : body.readUInt32BE(1);
  if (body[0] !== 0 || length !== body.length - prefixBytes) {
    throw unusable(protocolReason("its message is compressed, cut or not alone"));
  }
  return { status, text, message: body.subarray(prefixBytes) };
}

/** `grpc-message` is percent-encoded; what is not well encoded stays as it is. */
function percentDecode(text: string): string {
  return text.replace(/(?:%[0-9A-Fa-f]{2})+/g, (bytes) =>
    Buffer.from(bytes.replaceAll("%", ""), "hex").toString("utf8"),
  );
}

/** A request that says nothing. */
export const empty: Uint8Array = new Uint8Array(0);

/** One text field of a request. */
export function textField(number: number, text: string): Uint8Array {
  const bytes = Buffer.from(text);
  const length: number[] = [];
  let rest = bytes.length;
  for (; rest > 0x7f; rest >>>= 7) length.push((rest & 0x7f) | 0x80);
  return Buffer.concat([Buffer.from([(number << 3) | lengthDelimited, ...length, rest]), bytes]);
}

/** Protobuf's wire types that are still in use; groups (3, 4) are refused. */
const varint = 0;
const fixed64 = 1;
const lengthDelimited = 2;
const fixed32 = 5;

function malformed(): CniError {
  return unusable("its message is not what the API describes");
}

/** Calls `take` with each length-delimited field of a message; other fields are skipped. */
export function readFields(
  bytes: Uint8Array,
  take: (field: number, value: Uint8Array) => void,
): void {
  let at = 0;
  const number = () => {
    let value = 0;
    for (let scale = 1, count = 0; count < 10; scale *= 128, count++) {
      const byte = bytes[at++];
      if (byte === undefined) break;
      value += (byte & 0x7f) * scale;
      if (byte < 0x80) return value;
    }
    throw malformed();
  };
  const step = (count: number) => {
    at += count;
    if (at > bytes.length) throw malformed();
  };
  while (at < bytes.length) {
    const key = number();
    const wireType = key % 8;
    if (wireType === varint) number();
    else if (wireType === fixed64) step(8);
    else if (wireType === fixed32) step(4);
    else if (wireType === lengthDelimited) {
      const length = number();
      const start = at;
      step(length);
      take(Math.floor(key / 8), bytes.subarray(start, at));
    } else throw malformed();
  }
}

/** The text of a field. */
export function utf8(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("utf8");
}
