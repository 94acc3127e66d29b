/**
 * A client of the Container Runtime Interface: a kubelet's side of it for pods that are nothing but
 * a sandbox. Source: k8s.io/cri-api pkg/apis/runtime/v1 api.proto, whose field numbers stand here.
 */
import { Client, credentials } from "@grpc/grpc-js";
import { field } from "../podresources.ts";

/** A pod to start. */
export interface SandboxConfig {
  namespace: string;
  name: string;
  uid: string;
  annotations?: Record<string, string>;
  /** Host ports by container port, TCP. */
  ports?: Record<number, number>;
  /** Its cgroups stand below this one. */
  cgroupParent: string;
}

/** What the runtime says of a pod. */
export interface SandboxStatus {
  isReady: boolean;
  /** The pod's addresses, the first one first. */
  ips: string[];
  /** Process of the sandbox; its namespaces are the pod's. */
  pid: number;
}

/** A runtime; a call that fails is thrown with what the runtime said. */
export interface Cri extends Disposable {
  /** @returns id of the sandbox */
  run: (config: SandboxConfig) => Promise<string>;
  stop: (id: string) => Promise<void>;
  remove: (id: string) => Promise<void>;
  status: (id: string) => Promise<SandboxStatus>;
  /** Sandboxes that the runtime knows. */
  list: () => Promise<string[]>;
  /** The condition NetworkReady: what is missing, or undefined when nothing is. */
  networkIssue: () => Promise<string | undefined>;
  /** Name of the config list it calls for new pods; containerd alone says so. */
  network: () => Promise<string | undefined>;
}

const callMs = 100_000;

/** Connects to the socket of a runtime; which must be there. */
export function connectCri(socket: string): Cri {
  const client = new Client(`unix:${socket}`, credentials.createInsecure());
  const call = (method: string, request: Uint8Array): Promise<Fields> =>
    new Promise((resolve, reject) => {
      client.makeUnaryRequest(
        `/runtime.v1.RuntimeService/${method}`,
        (bytes: Uint8Array) => Buffer.from(bytes),
        decode,
        request,
        { deadline: Date.now() + callMs },
        (error, fields) => {
          if (error) reject(new Error(`${method}: ${error.details}`));
          else resolve(fields ?? new Map());
        },
      );
    });
  const ofSandbox = (id: string) => field(1, id);
  return {
    run: async (config) => text(await call("RunPodSandbox", field(1, sandboxConfig(config))), 1),
    stop: async (id) => void (await call("StopPodSandbox", ofSandbox(id))),
    remove: async (id) => void (await call("RemovePodSandbox", ofSandbox(id))),
    status: async (id) => {
      const request = Buffer.concat([ofSandbox(id), verbose(2)]);
      return sandboxStatus(await call("PodSandboxStatus", request));
    },
    list: async () =>
      messages(await call("ListPodSandbox", new Uint8Array()), 1).map((one) => text(one, 1)),
    networkIssue: async () => {
      const [status = new Map()] = messages(await call("Status", new Uint8Array()), 1);
      const network = messages(status, 1).find((one) => text(one, 1) === "NetworkReady");
      if (!network) return "no condition NetworkReady";
      return network.get(2)?.[0] === 1 ? undefined : text(network, 4);
    },
    network: async () => {
      const status = await call("Status", verbose(1));
      const config = messages(status, 2).find((entry) => text(entry, 1) === "cniconfig");
      return loadedNetwork(config ? text(config, 2) : "{}");
    },
    [Symbol.dispose]: () => client.close(),
  };
}

function sandboxConfig(config: SandboxConfig): Buffer {
  const { namespace, name, uid, annotations = {}, ports = {}, cgroupParent } = config;
  const metadata = Buffer.concat([field(1, name), field(2, uid), field(3, namespace)]);
  return Buffer.concat([
    field(1, metadata),
    field(2, name),
    ...Object.entries(ports).map(([container, host]) =>
      field(5, Buffer.concat([number(2, Number(container)), number(3, host)])),
    ),
    ...Object.entries(annotations).map((pair) => field(7, keyed(...pair))),
    field(8, field(1, cgroupParent)),
  ]);
}

function sandboxStatus(response: Fields): SandboxStatus {
  const [status = new Map()] = messages(response, 1);
  const [network = new Map()] = messages(status, 5);
  const info = messages(response, 2).find((entry) => text(entry, 1) === "info");
  const { pid } = JSON.parse(info ? text(info, 2) : "{}") as { pid?: number };
  return {
    isReady: (status.get(3)?.[0] ?? 0) === 0,
    ips: [network, ...messages(network, 2)].map((one) => text(one, 1)).filter((ip) => ip !== ""),
    pid: pid ?? 0,
  };
}

/** The network beside the loopback in what go-cni has loaded. */
function loadedNetwork(json: string): string | undefined {
  const { Networks = [] } = JSON.parse(json) as { Networks?: { Config: { Name: string } }[] };
  return Networks.map(({ Config }) => Config.Name).find((name) => name !== "cni-loopback");
}

/** A flag that is set. */
const verbose = (at: number) => Buffer.from([at * 8, 1]);

/** An entry of a map from text to text. */
const keyed = (key: string, value: string) => Buffer.concat([field(1, key), field(2, value)]);

/** A varint field of a number below 2^21. */
function number(at: number, value: number): Buffer {
  return Buffer.from([at * 8, (value & 127) | 128, ((value >> 7) & 127) | 128, value >> 14]);
}

/** A protobuf message: what each field holds, in order; numbers, or bytes of texts and messages. */
type Fields = Map<number, (number | Buffer)[]>;

function decode(bytes: Uint8Array): Fields {
  const buffer = Buffer.from(bytes);
  const fields: Fields = new Map();
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      const byte = buffer[at++];
      if (byte === undefined) throw new Error("A message of the runtime is cut off");
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < buffer.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind !== 0 && kind !== 2) throw new Error(`Cannot read wire type ${kind}`);
    const size = varint();
    const value = kind === 2 ? buffer.subarray(at, at + size) : size;
    if (kind === 2) at += size;
    const key = Math.floor(tag / 8);
    fields.set(key, [...(fields.get(key) ?? []), value]);
  }
  return fields;
}

/** A field of text; "" where it is absent, as protobuf has it. */
function text(fields: Fields, at: number): string {
  return fields.get(at)?.[0]?.toString() ?? "";
}

/** A repeated field of messages. */
function messages(fields: Fields, at: number): Fields[] {
  return (fields.get(at) ?? []).filter((one) => typeof one !== "number").map(decode);
}
