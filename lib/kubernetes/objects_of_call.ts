/**
 * The Kubernetes API as one call of genie uses it: connected when first needed, each object read
 * once. Loads nothing of Kubernetes before that.
 */
import type { Host } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import type { Kube } from "./client.ts";

/** The API as one call uses it: connected when first needed, each object read once. */
export interface Objects {
  /** The connection. @throws CniError 7 without credentials */
  kube(): Promise<Kube>;
  /** Reads an object, or hands back what this call read before. */
  get(path: readonly string[]): Promise<unknown>;
  /** True once a connection was asked for. */
  used(): boolean;
}

/** Opens a view of the API for one call; sends nothing yet. */
export function openObjects(host: Host, config: Config): Objects {
  let connection: Promise<Kube> | undefined;
  const read = new Map<string, Promise<unknown>>();
  const kube = () => {
    connection ??= import("./client.ts").then(({ connect }) => connect(host, config.kubernetes));
    return connection;
  };
  return {
    kube,
    get: (path) => {
      const key = path.join("\0");
      const known = read.get(key) ?? kube().then((api) => api.get(path));
      read.set(key, known);
      return known;
    },
    used: () => connection !== undefined,
  };
}
