/**
 * What the container runtime knows of pods, by the Container Runtime Interface: which sandboxes
 * there are, running or not. Source: k8s.io/cri-api pkg/apis/runtime/v1 api.proto.
 */
import { existsSync } from "node:fs";
import { CniError, code, type Host } from "../cni.ts";
import {
  empty,
  type GrpcChannel,
  grpc,
  openChannel,
  type Peer,
  readFields,
  unusable,
  utf8,
} from "./grpc.ts";

/** Where runtimes listen, as far as we know. */
const sockets = ["/run/containerd/containerd.sock", "/run/crio/crio.sock"];

const runtime: Peer = { name: "container runtime", absent: "does it run" };

/** The socket of this node's runtime; undefined where there is none. */
export function criSocket(configured?: string): string | undefined {
  const candidates = configured === undefined ? sockets : [configured];
  return candidates.find((socket) => existsSync(socket));
}

/**
 * Ids of all sandboxes that the runtime knows: what it does not know, it does not DEL any more.
 * @throws CniError 11 when there is no usable answer within `timeoutMs`
 */
export async function listSandboxes(
  host: Host,
  socket: string,
  timeoutMs = 5000,
): Promise<Set<string>> {
  let channel: GrpcChannel | undefined;
  try {
    channel = await openChannel(host, socket, runtime, timeoutMs);
    const answer = await channel.call("/runtime.v1.RuntimeService/ListPodSandbox", empty);
    if (answer.status !== grpc.ok) {
      throw unusable(`it answered ListPodSandbox with gRPC status ${answer.status}`, answer.text);
    }
    return readSandboxes(answer.message);
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    const { message, details } = error;
    throw new CniError(
      code.tryAgainLater,
      `Cannot list the pods of the container runtime at ${socket}: ${message}`,
      { details, cause: error },
    );
  } finally {
    channel?.close();
  }
}

/** A ListPodSandboxResponse: PodSandbox in field 1, its id in field 1 of that. */
function readSandboxes(message: Uint8Array): Set<string> {
  const ids = new Set<string>();
  readFields(message, (field, sandbox) => {
    if (field !== 1) return;
    readFields(sandbox, (part, value) => {
      if (part === 1) ids.add(utf8(value));
    });
  });
  return ids;
}
