/**
 * Devices of device plugins: which device the kubelet gave a pod. Loaded only when a
 * NetworkAttachmentDefinition names a resource, so its 4 ms are paid by nobody else.
 *
 * The kubelet answers gRPC on a Unix socket. `@grpc/grpc-js` would bring 31 packages and take 24 ms
 * where this takes 12; the two unary calls needed are one HTTP/2 request each and three levels of
 * protobuf, so node:http2 and a reader of 40 lines do. Whatever the socket sends is hostile until
 * read, and everything that goes wrong on the way is a CniError 11.
 * Sources: k8s.io/kubelet pkg/apis/podresources/v1 api.proto; grpc/grpc doc/PROTOCOL-HTTP2.md.
 */
import { type ClientHttp2Session, connect, constants, type IncomingHttpHeaders } from "node:http2";
import { createConnection, type Socket } from "node:net";
import { CniError, code, type Host, toCniError } from "./cni.ts";
import { oneLine } from "./text.ts";

/** Where the kubelet of a node listens unless its root folder was moved. */
export const podResourcesSocket = "/var/lib/kubelet/pod-resources/kubelet.sock";

/** The pod whose devices are wanted. The kubelet's API knows no uid. */
export interface DeviceRequest {
  namespace: string;
  name: string;
}

/** Largest answer read: 16 MiB, the limit every client of this API uses. */
const answerBytesMax = 16 * 1024 * 1024;
/** A gRPC message has a prefix: one byte of flags, four of length. */
const prefixBytes = 5;
/** Pauses before a call is repeated that the kubelet refused for its rate limit. */
const pausesMs = [20, 50, 100, 200, 400];

/** The gRPC status codes that mean something here. */
const grpc = { ok: 0, unknown: 2, notFound: 5, exhausted: 8, unimplemented: 12 } as const;
/**
 * `Get` is younger than `List` (KubeletPodResourcesGet, on since 1.34). An old kubelet says
 * UNIMPLEMENTED; one with the gate off, or that knows no such pod, returns a bare error: UNKNOWN.
 */
const useListInstead: readonly number[] = [grpc.unknown, grpc.notFound, grpc.unimplemented];

/**
 * Asks the kubelet which devices it gave a pod. Ids are sorted, as Multus has
 * them, because the kubelet's own order changes from call to call, and each is there once.
 *
 * @returns device ids by resource name; empty when the pod has none
 * @throws CniError 11 when there is no usable answer within `timeoutMs`, or the pod is not in it
 */
export async function podDevices(
  host: Host,
  socket: string,
  pod: DeviceRequest,
  timeoutMs = 2000,
): Promise<Map<string, string[]>> {
  const cut = cutter(host, timeoutMs);
  let channel: Channel | undefined;
  try {
    channel = await open(socket, cut);
    for (const method of ["Get", "List"] as const) {
      const answer = await ask(channel, method, method === "Get" ? getRequest(pod) : empty, cut);
      if (answer.status !== grpc.ok) {
        if (method === "Get" && useListInstead.includes(answer.status)) continue;
        throw unusable(`it answered ${method} with gRPC status ${answer.status}`, answer.text);
      }
      const devices = readDevices(answer.message, pod);
      if (devices !== undefined) return devices;
    }
    throw unusable("it does not list that pod, which may be deleted or new");
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    const { message, details } = error;
    throw new CniError(
      code.tryAgainLater,
      `Cannot get the devices of pod "${label(pod)}" from the kubelet at ${socket}: ${message}`,
      { details, cause: error },
    );
  } finally {
    cut.release();
    channel?.session.destroy();
    channel?.raw.destroy();
  }
}

/**
 * The device of the n-th network of a pod that names a resource: the n-th device of that resource.
 *
 * @param devices what {@link podDevices} gave
 * @param index how many networks before this one name the same resource, from 0
 * @throws CniError 7 when the pod asked for fewer devices than it names networks
 */
export function takeDevice(
  devices: ReadonlyMap<string, readonly string[]>,
  resourceName: string,
  index: number,
  pod: DeviceRequest,
): string {
  const ids = devices.get(resourceName) ?? [];
  const id = ids[index];
  if (id !== undefined) return id;
  const resource = oneLine(resourceName, 200);
  throw new CniError(
    code.invalidConfig,
    `Cannot give pod "${label(pod)}" device ${index + 1} of "${resource}": it was allocated ` +
      `${ids.length}, name the resource in the limits of its containers once per network`,
  );
}

function label({ namespace, name }: DeviceRequest): string {
  return oneLine(`${namespace}/${name}`, 330);
}

/** Why there is no usable answer; {@link podDevices} puts whose answer in front. */
function unusable(reason: string, details = ""): CniError {
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
async function open(socket: string, cut: Cutter): Promise<Channel> {
  const raw = createConnection(socket);
  try {
    const connected = new Promise<void>((resolve, reject) => {
      raw.once("connect", resolve);
      // Stays: the session reports its own errors here as well, after all is over.
      raw.on("error", (error) => reject(unusable(connectionReason(error))));
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

function connectionReason(error: Error): string {
  const { code: reason = error.name } = error as NodeJS.ErrnoException;
  const why: Record<string, string> = {
    ENOENT: "there is no such socket, does the kubelet run, with another root folder",
    ECONNREFUSED: "nobody listens there, is the kubelet starting",
    EACCES: "permission denied, run as root",
  };
  return why[reason] ?? `the connection failed (${reason})`;
}

interface Answer {
  status: number;
  /** What the kubelet said of a failure. */
  text: string;
  message: Uint8Array;
}

/** One unary call, repeated while the kubelet says that it has too many. */
async function ask(
  channel: Channel,
  method: "Get" | "List",
  request: Uint8Array,
  cut: Cutter,
): Promise<Answer> {
  for (const pauseMs of pausesMs) {
    const answer = await Promise.race([attempt(channel, method, request), cut.happened]);
    if (answer.status !== grpc.exhausted) return answer;
    await Promise.race([Bun.sleep(pauseMs), cut.happened]);
  }
  return Promise.race([attempt(channel, method, request), cut.happened]);
}

/** One HTTP/2 request. @throws CniError 11 */
function attempt({ session }: Channel, method: string, request: Uint8Array): Promise<Answer> {
  const { promise, resolve, reject } = Promise.withResolvers<Answer>();
  // It may lose the race against the deadline and fail when nobody waits for it.
  promise.catch(() => undefined);
  const chunks: Buffer[] = [];
  let total = 0;
  let head: IncomingHttpHeaders = {};
  let trailers: IncomingHttpHeaders = {};
  try {
    const stream = session.request({
      ":method": "POST",
      ":path": `/v1.PodResourcesLister/${method}`,
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
function readAnswer(headers: IncomingHttpHeaders, body: Buffer): Answer {
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

const empty = new Uint8Array(0);

/** A GetPodResourcesRequest: pod_name = 1, pod_namespace = 2. */
function getRequest({ name, namespace }: DeviceRequest): Uint8Array {
  const field = (number: number, text: string) => {
    const bytes = Buffer.from(text);
    const length: number[] = [];
    let rest = bytes.length;
    for (; rest > 0x7f; rest >>>= 7) length.push((rest & 0x7f) | 0x80);
    return Buffer.concat([Buffer.from([(number << 3) | lengthDelimited, ...length, rest]), bytes]);
  };
  return Buffer.concat([field(1, name), field(2, namespace)]);
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
function readFields(bytes: Uint8Array, take: (field: number, value: Uint8Array) => void): void {
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

/** Reads a List or a Get answer, which look alike: PodResources in field 1. */
function readDevices(answer: Uint8Array, pod: DeviceRequest): Map<string, string[]> | undefined {
  const found = new Map<string, Set<string>>();
  let isListed = false;
  readFields(answer, (field, bytes) => {
    if (field !== 1) return;
    let name = "";
    let namespace = "";
    const containers: Uint8Array[] = [];
    readFields(bytes, (part, value) => {
      if (part === 1) name = utf8(value);
      else if (part === 2) namespace = utf8(value);
      else if (part === 3) containers.push(value);
    });
    if (name !== pod.name || namespace !== pod.namespace) return;
    isListed = true;
    for (const container of containers) {
      readFields(container, (part, value) => part === 2 && readContainerDevices(value, found));
    }
  });
  if (!isListed) return undefined;
  return new Map([...found].map(([resource, ids]) => [resource, [...ids].sort()]));
}

/** ContainerDevices: resource_name = 1, device_ids = 2. */
function readContainerDevices(bytes: Uint8Array, found: Map<string, Set<string>>): void {
  let resource = "";
  const ids: string[] = [];
  readFields(bytes, (part, value) => {
    if (part === 1) resource = utf8(value);
    else if (part === 2) ids.push(utf8(value));
  });
  const known = found.get(resource) ?? new Set();
  for (const id of ids) known.add(id);
  found.set(resource, known);
}

function utf8(bytes: Uint8Array): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString("utf8");
}
