/**
 * A container runtime at its socket, for tests: a real gRPC server (`@grpc/grpc-js`) that answers
 * as containerd or CRI-O do. CRI-O serves HTTP on the same socket, by the first bytes of a
 * connection. The answers are those of containerd 1.6.20, containerd 2.1.9, and CRI-O's
 * server/inspect.go.
 */
import { mkdirSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import { dirname } from "node:path";
import { Server, ServerCredentials, type sendUnaryData } from "@grpc/grpc-js";
import { field } from "./podresources.ts";

/** Answers by method of the RuntimeService: a message, or the number of a gRPC status. */
export type Answers = Record<string, () => Uint8Array | number>;

/**
 * Starts a runtime.
 * @param config what it answers to `GET /config`, as CRI-O does; undefined: no HTTP, as containerd
 */
export async function startRuntime(
  socket: string,
  answers: Answers,
  config?: string,
): Promise<AsyncDisposable> {
  mkdirSync(dirname(socket), { recursive: true });
  const server = new Server();
  const bytes = (value: Buffer) => value;
  const wire = {
    ...{ requestStream: false as const, responseStream: false as const },
    ...{ requestSerialize: bytes, requestDeserialize: bytes },
    ...{ responseSerialize: bytes, responseDeserialize: bytes },
  };
  for (const [method, answer] of Object.entries(answers)) {
    const call = (_: unknown, done: sendUnaryData<Buffer>) => {
      const given = answer();
      if (typeof given === "number") done({ code: given, details: "no" });
      else done(null, Buffer.from(given));
    };
    const path = `/runtime.v1.RuntimeService/${method}`;
    server.addService({ [method]: { path, ...wire } }, { [method]: call });
  }
  const own = config === undefined ? `unix:${socket}` : "127.0.0.1:0";
  const port = await new Promise<number>((resolve, reject) => {
    const credentials = ServerCredentials.createInsecure();
    server.bindAsync(own, credentials, (error, port) => (error ? reject(error) : resolve(port)));
  });
  if (config === undefined) {
    return { [Symbol.asyncDispose]: async () => server.forceShutdown() };
  }
  const http = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: ({ url }) =>
      new URL(url).pathname === "/config"
        ? new Response(config)
        : new Response("", { status: 404 }),
  });
  const front = createServer((client) => {
    client.once("data", (first: Buffer) => {
      const isGrpc = first.toString("latin1").startsWith("PRI ");
      join(client, connect(isGrpc ? port : Number(http.port), "127.0.0.1"), first);
    });
    client.on("error", () => client.destroy());
  });
  await new Promise<void>((resolve) => front.listen(socket, resolve));
  return {
    [Symbol.asyncDispose]: async () => {
      front.close();
      server.forceShutdown();
      await http.stop(true);
    },
  };
}

function join(client: Socket, behind: Socket, first: Buffer): void {
  behind.on("error", () => client.destroy());
  behind.write(first);
  client.pipe(behind);
  behind.pipe(client);
}

/** What containerd says of its CNI, by the names that it has in Status. */
export interface Containerd {
  confDir?: string;
  binDirs?: string[];
  confsMax?: number;
  /** Text of the list that it has loaded; absent: none. */
  source?: string;
  /** Why it could not load. */
  error?: string;
}

/** A StatusResponse, verbose, of containerd. */
export function containerdStatus(containerd: Containerd): Buffer {
  const { confDir = "/etc/cni/net.d", binDirs = ["/opt/cni/bin"], confsMax = 1 } = containerd;
  const { source, error = "OK" } = containerd;
  const network = (Source: string, IFName: string) => {
    const { name: Name, cniVersion: CNIVersion, plugins } = JSON.parse(Source);
    const Plugins = plugins.map((one: object) => ({ Network: one, Source: JSON.stringify(one) }));
    return { Config: { Name, CNIVersion, Plugins, Source }, IFName };
  };
  const loopback = '{"cniVersion":"0.3.1","name":"cni-loopback","plugins":[{"type":"loopback"}]}';
  const cni = {
    ...{ PluginDirs: binDirs, PluginConfDir: confDir, PluginMaxConfNum: confsMax, Prefix: "eth" },
    Networks: [network(loopback, "lo"), ...(source ? [network(source, "eth0")] : [])],
  };
  const condition = (type: string) =>
    field(1, Buffer.concat([field(1, type), Buffer.from([16, 1])]));
  return Buffer.concat([
    field(1, Buffer.concat([condition("RuntimeReady"), condition("NetworkReady")])),
    ...infoOf({
      lastCNILoadStatus: error,
      "lastCNILoadStatus.default": error,
      cniconfig: JSON.stringify(cni),
      golang: '"go1.27.1"',
      config: '{"containerd":{"snapshotter":"native"}}',
    }),
    // RuntimeHandler with its features, since 2.0: a field that clients of 1.6 do not know.
    field(3, field(1, "runc")),
  ]);
}

/** The map of a verbose answer. */
export function infoOf(texts: Record<string, string>): Buffer[] {
  const entries = Object.entries(texts);
  return entries.map(([key, value]) => field(2, Buffer.concat([field(1, key), field(2, value)])));
}

/** A StatusResponse, verbose, of CRI-O: its settings are elsewhere. */
export const crioStatus = Buffer.concat(infoOf({ config: '{"sandboxImage":"pause:3.10"}' }));
