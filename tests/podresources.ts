/**
 * A kubelet's pod-resources socket for tests: a real gRPC server (`@grpc/grpc-js`) that answers as
 * the kubelet does or misbehaves as told, and a raw peer for bytes that no gRPC server would send.
 * Source: k8s.io/kubelet pkg/apis/podresources/v1 api.proto.
 */
import { createServer, type Socket } from "node:net";
import { join } from "node:path";
import { Server, ServerCredentials, type ServerUnaryCall, type sendUnaryData } from "@grpc/grpc-js";

/** A pod and the devices of its containers: resource name to ids. */
export interface KubeletPod {
  namespace: string;
  name: string;
  containers: Record<string, string[]>[];
}

/** What a call gets instead of the truth: nothing at all, a status, or a message of these bytes. */
export type Reply = "truth" | "hang" | { code: number; details: string } | Uint8Array;

/** A listening socket; `calls` is what was asked of it so far. */
export interface Peer extends AsyncDisposable {
  socket: string;
  calls: string[];
}

/** gRPC status codes used in tests. */
export const grpcStatus = {
  unknown: 2,
  notFound: 5,
  permissionDenied: 7,
  resourceExhausted: 8,
  internal: 13,
} as const;

/**
 * Starts a kubelet in a folder.
 *
 * @param replies per method, consumed one by one, the last one for all further calls; without
 *   `Get` the method is not there, as in a kubelet before 1.27
 */
export async function startKubelet(
  dir: string,
  pods: readonly KubeletPod[],
  replies: { Get?: readonly Reply[]; List?: readonly Reply[] } = { Get: ["truth"] },
): Promise<Peer> {
  const calls: string[] = [];
  const server = new Server({ "grpc.max_send_message_length": -1 });
  const left = { Get: [...(replies.Get ?? [])], List: [...(replies.List ?? ["truth"])] };
  const handle =
    (method: "Get" | "List") =>
    ({ request }: ServerUnaryCall<Buffer, Uint8Array>, done: sendUnaryData<Uint8Array>) => {
      calls.push(method);
      const queue = left[method];
      const reply = (queue.length > 1 ? queue.shift() : queue[0]) ?? "truth";
      if (reply === "hang") return;
      if (reply instanceof Uint8Array) done(null, reply);
      else if (reply !== "truth") done(reply);
      else if (method === "List") done(null, listAnswer(pods));
      else answerGet(pods, request, done);
    };
  const definition = (method: "Get" | "List") => ({
    path: `/v1.PodResourcesLister/${method}`,
    requestStream: false as const,
    responseStream: false as const,
    requestSerialize: (bytes: Buffer) => bytes,
    requestDeserialize: (bytes: Buffer) => bytes,
    responseSerialize: (bytes: Uint8Array) => Buffer.from(bytes),
    responseDeserialize: (bytes: Buffer) => bytes,
  });
  if (replies.Get) server.addService({ Get: definition("Get") }, { Get: handle("Get") });
  server.addService({ List: definition("List") }, { List: handle("List") });
  const socket = join(dir, `kubelet-${crypto.randomUUID().slice(0, 8)}.sock`);
  await new Promise<void>((resolve, reject) => {
    const credentials = ServerCredentials.createInsecure();
    server.bindAsync(`unix:${socket}`, credentials, (error) => (error ? reject(error) : resolve()));
  });
  return { socket, calls, [Symbol.asyncDispose]: async () => server.forceShutdown() };
}

/** As the kubelet: a pod that it does not know is a bare error of its handler, status UNKNOWN. */
function answerGet(
  pods: readonly KubeletPod[],
  request: Buffer,
  done: sendUnaryData<Uint8Array>,
): void {
  const pod = pods.find((one) => getRequest(one).equals(request));
  const details = "pod in namespace not found";
  if (pod === undefined) done({ code: grpcStatus.unknown, details });
  else done(null, listAnswer([pod]));
}

/** A peer that is no gRPC server: `talk` gets each connection once the client has spoken. */
export async function startRawPeer(dir: string, talk: (socket: Socket) => void): Promise<Peer> {
  const calls: string[] = [];
  const open = new Set<Socket>();
  const server = createServer((connection) => {
    open.add(connection);
    // The client lets go as soon as it has had enough.
    connection.on("error", () => connection.destroy());
    connection.once("data", () => {
      calls.push("connection");
      talk(connection);
    });
  });
  const socket = join(dir, `raw-${crypto.randomUUID().slice(0, 8)}.sock`);
  await new Promise<void>((resolve) => server.listen(socket, resolve));
  return {
    socket,
    calls,
    [Symbol.asyncDispose]: async () => {
      for (const connection of open) connection.destroy();
      server.close();
    },
  };
}

/** A length-delimited protobuf field. */
export function field(number: number, value: string | Uint8Array): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([varint(number * 8 + 2), varint(bytes.length), bytes]);
}

function varint(value: number): Buffer {
  const bytes: number[] = [];
  let rest = value;
  for (; rest > 127; rest = Math.floor(rest / 128)) bytes.push((rest % 128) + 128);
  return Buffer.from([...bytes, rest]);
}

/** A ListPodResourcesResponse; of one pod, a GetPodResourcesResponse as well. */
export function listAnswer(pods: readonly KubeletPod[]): Buffer {
  return Buffer.concat(pods.map((pod) => field(1, podResources(pod))));
}

/** A GetPodResourcesRequest. */
function getRequest({ name, namespace }: KubeletPod): Buffer {
  return Buffer.concat([field(1, name), field(2, namespace)]);
}

function podResources({ name, namespace, containers }: KubeletPod): Buffer {
  return Buffer.concat([
    field(1, name),
    field(2, namespace),
    ...containers.map((devices, index) => field(3, container(`c${index}`, devices))),
  ]);
}

/** ContainerResources with all that a reader of devices skips. */
function container(name: string, devices: Record<string, string[]>): Buffer {
  const cpuIds = field(3, Buffer.concat([varint(3), varint(300)]));
  const size = Buffer.concat([Buffer.from([2 * 8]), varint(2 ** 40)]);
  const memory = field(4, Buffer.concat([field(1, "hugepages-1Gi"), size]));
  const dynamic = field(5, Buffer.concat([field(2, "claim"), field(3, "ns")]));
  // The kubelet sends each device by itself, in the order of a Go map, with its NUMA node.
  const one = (resource: string, id: string) => {
    const topology = field(3, field(1, Buffer.from([1 * 8, 1])));
    return field(2, Buffer.concat([field(1, resource), field(2, id), topology]));
  };
  const all = Object.entries(devices).flatMap(([resource, ids]) =>
    ids.toReversed().map((id) => one(resource, id)),
  );
  return Buffer.concat([field(1, name), cpuIds, ...all, memory, dynamic]);
}

const frameType = { data: 0, headers: 1, resetStream: 3, settings: 4, goAway: 7 } as const;

/** One HTTP/2 frame of stream 1 (SETTINGS and GOAWAY: of the connection). */
export function frame(type: keyof typeof frameType, flags: number, payload: Uint8Array): Buffer {
  const head = Buffer.alloc(9);
  head.writeUIntBE(payload.length, 0, 3);
  head[3] = frameType[type];
  head[4] = flags;
  head.writeUInt32BE(type === "settings" || type === "goAway" ? 0 : 1, 5);
  return Buffer.concat([head, payload]);
}

/** HTTP/2 header block of literals (HPACK, RFC 7541 §6.2.2), after `:status: 200` when asked. */
export function headerBlock(headers: Record<string, string>, hasStatus = false): Buffer {
  const text = (value: string) => Buffer.concat([Buffer.from([value.length]), Buffer.from(value)]);
  const literals = Object.entries(headers).map(([name, value]) =>
    Buffer.concat([Buffer.from([0]), text(name), text(value)]),
  );
  return Buffer.concat([Buffer.from(hasStatus ? [0x88] : []), ...literals]);
}
