/**
 * Unary gRPC calls over a Unix socket of this node, and the three that we make: the devices that
 * the kubelet gave a pod; the sandboxes that the container runtime knows, and what it goes by.
 *
 * `@grpc/grpc-js` would bring 31 packages and take 24 ms where this takes 12: a call is one HTTP/2
 * request, so node:http2 and a small reader of protobuf do. Whatever the socket sends is hostile
 * until read, and everything that goes wrong on the way is a CniError 11.
 * Source: grpc/grpc doc/PROTOCOL-HTTP2.md; protobuf.dev/programming-guides/encoding;
 * k8s.io/cri-api pkg/apis/runtime/v1 api.proto; k8s.io/kubelet pkg/apis/podresources/v1 api.proto.
 */
import { once } from "node:events";
import { existsSync } from "node:fs";
import { type ClientHttp2Session, connect, type IncomingHttpHeaders } from "node:http2";
import { createConnection } from "node:net";
import { basename } from "node:path";
import type { Host } from "../call.ts";
import { CniError, code, oneLine, toCniError } from "../cni.ts";
import type { PodIdentity } from "../record.ts";
import { podLabel } from "../request.ts";

/** Largest answer read: 16 MiB, the limit every client of this API uses. */
const answerBytesMax = 16 * 1024 * 1024;
/** A gRPC message has a prefix: one byte of flags, four of length. */
const prefixBytes = 5;
/** Pauses before a call is repeated that was refused for a rate limit, in ms. */
const pausesMs = [20, 50, 100, 200, 400];

/** gRPC status codes. */
const grpc = { ok: 0, unknown: 2, notFound: 5, exhausted: 8, unimplemented: 12 } as const;

/** A server on this node; `hint` is what to check when there is no socket. */
type GrpcServer = { name: string; hint: string; socket: string; timeoutMs: number };

/** The end of a call; `text` has the server's words about a failure. */
type GrpcAnswer = { status: number; text: string; message: Uint8Array };

/**
 * One unary call by its path, repeated while the server says that it has too many.
 * @throws CniError 11 for a status that is neither ok nor in `allowed`
 */
type Call = (path: string, request: Uint8Array, allowed?: readonly number[]) => Promise<GrpcAnswer>;

/**
 * Connects to a server, lets `use` make calls, and closes the connection, all within `timeoutMs`.
 * @param purpose for the error, as in `Cannot <purpose> at <socket>: <reason>`
 * @throws CniError 11 when there is no usable answer in time
 */
async function withServer<T>(
  host: Host,
  server: GrpcServer,
  purpose: string,
  use: (call: Call) => Promise<T>,
): Promise<T> {
  const { timeoutMs, socket } = server;
  const raw = createConnection(socket);
  let session: ClientHttp2Session | undefined;
  const { promise: cut, reject } = Promise.withResolvers<never>();
  // It may be rejected when nobody waits for it.
  cut.catch(() => undefined);
  const abort = () => reject(unusable("we were asked to end"));
  const late = () => reject(unusable(`no answer within ${timeoutMs} ms, is it overloaded`));
  const timer = setTimeout(late, timeoutMs);
  host.signal.addEventListener("abort", abort, { once: true });
  if (host.signal.aborted) abort();
  try {
    // Connected first, to tell a socket that is not there from one that does not speak gRPC.
    const connected = new Promise<void>((resolve, refuse) => {
      raw.once("connect", resolve);
      // Stays: the session reports its own errors here as well, after all is over.
      raw.on("error", (error) => refuse(unusable(connectionReason(error, server))));
    });
    await Promise.race([connected, cut]);
    session = connect("http://localhost", {
      createConnection: () => raw,
      settings: { enablePush: false, initialWindowSize: 1024 * 1024 },
    });
    // What breaks the session breaks its streams, where the reason is read.
    session.on("error", () => undefined);
    const channel = session;
    return await use(async (path, request, allowed = []) => {
      for (let repeats = 0; ; repeats++) {
        const answer = await Promise.race([attempt(channel, path, request), cut]);
        const { status, text } = answer;
        if (status === grpc.ok || allowed.includes(status)) return answer;
        const pauseMs = pausesMs[repeats];
        if (status !== grpc.exhausted || pauseMs === undefined) {
          throw unusable(`it answered ${basename(path)} with gRPC status ${status}`, text);
        }
        await Promise.race([Bun.sleep(pauseMs), cut]);
      }
    });
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    const { message, details } = error;
    const failure = `Cannot ${purpose} at ${socket}: ${message}`;
    throw new CniError(code.tryAgainLater, failure, { details, cause: error });
  } finally {
    clearTimeout(timer);
    host.signal.removeEventListener("abort", abort);
    session?.destroy();
    raw.destroy();
  }
}

/** Why there is no usable answer; {@link withServer} puts whose answer in front. */
function unusable(reason: string, details = ""): CniError {
  return new CniError(code.tryAgainLater, reason, { details: oneLine(details, 1000) });
}

function connectionReason(error: Error, { name, hint }: GrpcServer): string {
  const { code: reason = error.name } = error as NodeJS.ErrnoException;
  const why: Record<string, string> = {
    ENOENT: `there is no such socket, ${hint}`,
    ECONNREFUSED: `nobody listens there, is the ${name} starting`,
    EACCES: "permission denied, run as root",
  };
  return why[reason] ?? `the connection failed (${reason})`;
}

/** One HTTP/2 request. @throws CniError 11 */
async function attempt(session: ClientHttp2Session, path: string, request: Uint8Array) {
  const chunks: Buffer[] = [];
  let total = 0;
  const headers: IncomingHttpHeaders = {};
  const add = (more: IncomingHttpHeaders) => Object.assign(headers, more);
  try {
    const stream = session.request({
      ":method": "POST",
      ":path": path,
      "content-type": "application/grpc",
      te: "trailers",
      "user-agent": "genie",
    });
    stream.on("response", add);
    stream.on("trailers", add);
    const prefix = Buffer.alloc(prefixBytes);
    prefix.writeUInt32BE(request.length, 1);
    stream.end(Buffer.concat([prefix, request]));
    for await (const chunk of stream) {
      total += chunk.length;
      if (total > answerBytesMax + prefixBytes) {
        throw unusable(`its answer is larger than ${answerBytesMax} bytes`);
      }
      chunks.push(chunk);
    }
    if (!stream.closed) await once(stream, "close");
  } catch (error) {
    if (error instanceof CniError) throw error;
    throw unusable(protocolReason(toCniError(error).message));
  }
  return readAnswer(headers, Buffer.concat(chunks));
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

/** A request without a field. */
const empty = new Uint8Array(0);

/** Protobuf's wire types that are still in use; groups (3, 4) are refused. */
const wireType = { varint: 0, fixed64: 1, bytes: 2, fixed32: 5 } as const;

/** One text field of a request. */
function textField(number: number, text: string): Uint8Array {
  const bytes = Buffer.from(text);
  const length: number[] = [];
  let rest = bytes.length;
  for (; rest > 0x7f; rest >>>= 7) length.push((rest & 0x7f) | 0x80);
  return Buffer.concat([Buffer.from([(number << 3) | wireType.bytes, ...length, rest]), bytes]);
}

/** All values of one length-delimited field of a message. @throws CniError 11 when malformed */
function fieldsOf(bytes: Uint8Array, wanted: number): Uint8Array[] {
  const found: Uint8Array[] = [];
  let at = 0;
  const malformed = () => unusable("its message is not what the API describes");
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
    const type = key % 8;
    if (type === wireType.varint) number();
    else if (type === wireType.fixed64) step(8);
    else if (type === wireType.fixed32) step(4);
    else if (type === wireType.bytes) {
      const length = number();
      const start = at;
      step(length);
      if (Math.floor(key / 8) === wanted) found.push(bytes.subarray(start, at));
    } else throw malformed();
  }
  return found;
}

function textsOf(bytes: Uint8Array, wanted: number): string[] {
  return fieldsOf(bytes, wanted).map((value) => Buffer.from(value).toString("utf8"));
}

/** The text of a field that is there once; of more the last counts. */
function textOf(bytes: Uint8Array, wanted: number): string {
  return textsOf(bytes, wanted).at(-1) ?? "";
}

/** A pod as the kubelet's API names it, which knows no uid. */
export type PodName = Pick<PodIdentity, "namespace" | "name">;

/**
 * `Get` is younger than `List` (KubeletPodResourcesGet, on since 1.34). An old kubelet says
 * UNIMPLEMENTED; one with the gate off, or that knows no such pod, returns a bare error: UNKNOWN.
 */
const useListInstead: readonly number[] = [grpc.unknown, grpc.notFound, grpc.unimplemented];

/**
 * Asks the kubelet which devices it gave a pod. Ids are unique, and sorted as Multus has them,
 * because the kubelet's own order changes from call to call.
 * @returns device ids by resource name; empty when the pod has none
 * @throws CniError 11 when there is no usable answer within `timeoutMs`, or the pod is not in it
 */
export async function podDevices(host: Host, socket: string, pod: PodName, timeoutMs = 2000) {
  const hint = "does the kubelet run, with another root folder";
  const kubelet = { name: "kubelet", hint, socket, timeoutMs };
  const purpose = `get the devices of pod "${oneLine(podLabel(pod), 330)}" from the kubelet`;
  return withServer(host, kubelet, purpose, async (call) => {
    const lister = "/v1.PodResourcesLister";
    // A GetPodResourcesRequest: pod_name = 1, pod_namespace = 2.
    const request = Buffer.concat([textField(1, pod.name), textField(2, pod.namespace)]);
    const answer = await call(`${lister}/Get`, request, useListInstead);
    const devices = answer.status === grpc.ok ? readDevices(answer.message, pod) : undefined;
    if (devices !== undefined) return devices;
    const listed = readDevices((await call(`${lister}/List`, empty)).message, pod);
    if (listed !== undefined) return listed;
    throw unusable("it does not list that pod, which may be deleted or new");
  });
}

/** Reads a List or a Get answer, which look alike; undefined when the pod is not in it. */
function readDevices(answer: Uint8Array, pod: PodName): Map<string, string[]> | undefined {
  // PodResources in field 1: name = 1, namespace = 2, containers = 3, with their devices in 2.
  const listed = fieldsOf(answer, 1).filter(
    (one) => textOf(one, 1) === pod.name && textOf(one, 2) === pod.namespace,
  );
  if (listed.length === 0) return undefined;
  const containers = listed.flatMap((one) => fieldsOf(one, 3));
  const found = new Map<string, Set<string>>();
  for (const devices of containers.flatMap((one) => fieldsOf(one, 2))) {
    // ContainerDevices: resource_name = 1, device_ids = 2.
    const ids = found.getOrInsertComputed(textOf(devices, 1), () => new Set());
    for (const id of textsOf(devices, 2)) ids.add(id);
  }
  return new Map([...found].map(([resource, ids]) => [resource, [...ids].sort()]));
}

/** Where container runtimes listen; the last one: k3s, k3d and RKE2. */
export const criSockets = [
  "/run/containerd/containerd.sock",
  "/run/crio/crio.sock",
  "/run/k3s/containerd/containerd.sock",
];

/** The socket of this node's runtime; undefined where there is none. */
export function criSocket(configured?: string): string | undefined {
  return (configured ? [configured] : criSockets).find((socket) => existsSync(socket));
}

/**
 * Ids of all sandboxes that the container runtime knows, running or not: it sends no DEL any more
 * for a sandbox it does not know.
 * @throws CniError 11 when there is no usable answer within `timeoutMs`
 */
export async function listSandboxes(host: Host, socket: string, timeoutMs = 5000) {
  const runtime = { name: "container runtime", hint: "does it run", socket, timeoutMs };
  return withServer(host, runtime, "list the pods of the container runtime", async (call) => {
    const { message } = await call("/runtime.v1.RuntimeService/ListPodSandbox", empty);
    // A ListPodSandboxResponse: PodSandbox in field 1, its id in field 1 of that.
    return new Set(fieldsOf(message, 1).flatMap((sandbox) => textsOf(sandbox, 1)));
  });
}

/**
 * What the container runtime says of itself: texts by names that are its own. containerd 2 runs
 * STATUS of its plugins first.
 * @throws CniError 11 when there is no usable answer within `timeoutMs`
 */
export async function runtimeInfo(host: Host, socket: string, timeoutMs = 10_000) {
  const runtime = { name: "container runtime", hint: "does it run", socket, timeoutMs };
  return withServer(host, runtime, "get the status of the container runtime", async (call) => {
    // A StatusRequest: verbose = 1. Of its answer: info = 2, a map from key = 1 to value = 2.
    const { message } = await call("/runtime.v1.RuntimeService/Status", Buffer.from([8, 1]));
    return new Map(fieldsOf(message, 2).map((entry) => [textOf(entry, 1), textOf(entry, 2)]));
  });
}
