/**
 * A node whose network policies are enforced: an API server with pods and policies, the compiled
 * agent as a process of its own, and what both write. For tests.
 */
import { Database } from "bun:sqlite";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { compiledGenie } from "./wire.ts";

const policyGroup = "/apis/networking.k8s.io/v1";

/** Everything the agent watches. */
export const collections = [
  ...[`${policyGroup}/networkpolicies`, "/api/v1/pods", "/api/v1/namespaces"],
  ...["/apis/alpha.network.k8s.io/v1/logicalnetworks"],
  "/apis/k8s.cni.cncf.io/v1/network-attachment-definitions",
];
/** Custom resources may be absent: not served unless a test says so. */
export const multiPolicies = "/apis/k8s.cni.cncf.io/v1beta1/multi-networkpolicies";

/** Path of a plain policy. */
export function policyPath(name: string, namespace = "default"): string {
  return `${policyGroup}/namespaces/${namespace}/networkpolicies/${name}`;
}

/** A plain policy: who may reach the pods with `app: web`, in namespace default. */
export function allowFrom(...apps: string[]): Record<string, unknown> {
  const from = apps.map((app) => ({ podSelector: { matchLabels: { app } } }));
  return {
    metadata: { uid: "policy-uid" },
    spec: {
      podSelector: { matchLabels: { app: "web" } },
      policyTypes: ["Ingress"],
      ingress: from.length === 0 ? [] : [{ from }],
    },
  };
}

/** A pod as the API has it. */
export function podObject(app: string, uid: string, ips: string[] = []): Record<string, unknown> {
  return {
    metadata: { uid, labels: { app } },
    spec: { containers: [] },
    status: { phase: "Running", podIP: ips[0], podIPs: ips.map((ip) => ({ ip })) },
  };
}

/** An API server with what every cluster has. */
export async function startCluster(dir: string): Promise<ApiServer> {
  const api = await startApiServer(dir);
  api.serve(...collections);
  api.put("/api/v1/namespaces/default", { metadata: { labels: { team: "a" } } });
  return api;
}

/** A running agent. */
export interface AgentProcess {
  pid: number;
  /** What it wrote to stderr so far. */
  log: () => string;
  /** Waits until its log has this. */
  said: (text: string | RegExp, times?: number) => Promise<void>;
  /** Sends a signal and waits for the end. @returns the exit status, or the signal */
  end: (signal: "SIGTERM" | "SIGKILL" | "SIGINT") => Promise<number | string>;
}

/**
 * Starts the agent with a plugin table. End it.
 * @param bin searched for programs before PATH
 * @param enter what runs it, e.g. in the network namespace of a test's node
 */
export function startAgent(
  dir: string,
  table: string,
  bin = "/nonexistent",
  enter: string[] = [],
): AgentProcess {
  const config = join(dir, "agent.conf");
  writeFileSync(config, JSON.stringify({ name: "genie", type: "genie", plugins_file: table }));
  const child = Bun.spawn([...enter, compiledGenie(), "agent", "--cni-config", config], {
    env: { PATH: `${bin}:${process.env["PATH"] ?? ""}` },
    stdio: ["ignore", "ignore", "pipe"],
  });
  let log = "";
  const read = (async () => {
    const decoder = new TextDecoder();
    for await (const chunk of child.stderr) log += decoder.decode(chunk, { stream: true });
  })();
  const count = (text: string | RegExp) => log.split(text).length - 1;
  return {
    pid: child.pid,
    log: () => log,
    said: async (text, times = 1) => {
      while (count(text) < times) {
        if (child.exitCode !== null) throw new Error(`The agent ended: ${log}`);
        await Bun.sleep(5);
      }
    },
    end: async (signal) => {
      child.kill(signal);
      await child.exited;
      await read;
      return child.signalCode ?? child.exitCode ?? -1;
    },
  };
}

/** Rows of a query on the record; none where there is no record yet. */
export function rowsOf<T>(stateDir: string, query: string): T[] {
  const file = join(stateDir, "genie.db");
  if (!existsSync(file)) return [];
  using database = new Database(file, { readonly: true });
  database.run("PRAGMA busy_timeout = 5000");
  return database.query(query).all() as T[];
}

/** Waits until the agent has written down that everything is known. */
export async function inputsKnown(stateDir: string, resources = 6): Promise<void> {
  const query = "SELECT 1 FROM sqlite_schema WHERE name = 'policy_watches'";
  while (rowsOf(stateDir, query).length === 0) await Bun.sleep(5);
  while (rowsOf(stateDir, "SELECT * FROM policy_watches").length < resources) await Bun.sleep(5);
}

/** Waits for what must come: the runner's own limit ends it when it does not. */
export async function until(isTrue: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await isTrue())) await Bun.sleep(10);
}
