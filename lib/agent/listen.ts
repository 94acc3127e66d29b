/**
 * The agent's part that answers: `/metrics` for Prometheus, `/healthz` for the kubelet's probes,
 * `/report` for genie report --cluster. Reads nothing of a request but its method and URL.
 */
import { join } from "node:path";
import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import { parseListen } from "../config/schema.ts";
import { pause } from "../kubernetes/watch.ts";
import { formatMetrics, metricsContentType } from "../report/metrics.ts";
import { gatherMetrics } from "./metrics.ts";
import type { Agent } from "./part.ts";
import { openReports, type Reports } from "./report.ts";
import { openTally, readPosition, type Tally, writePosition } from "./tally.ts";

/** How often the ledger is looked at, and where we stand in it written down, in ms. */
const pollMs = 2_000;
const positionMs = 30_000;
/** Name of the file with it, beside the record. */
const positionFile = "agent.json";

/** Runs the part until the host's signal aborts. @throws CniError 5 when it cannot listen */
export async function runListen(agent: Agent): Promise<void> {
  const { host, config, record, health } = agent;
  const listen = parseListen(config.agent.listen);
  if (!listen) return;
  const file = join(config.stateDir, positionFile);
  const tally = openTally(readPosition(file));
  const reports = openReports(agent);
  const server = serve(host, listen, (request) => answer(agent, tally, reports, request));
  const { hostname } = listen;
  const address = `${hostname.includes(":") ? `[${hostname}]` : hostname}:${server.port}`;
  log(host, "info", "Metrics and health are served", { address });
  let version = "";
  let written = JSON.stringify(readPosition(file));
  let writtenMs = performance.now();
  const keep = () => {
    const position = tally.position();
    if (!position || JSON.stringify(position) === written) return;
    keepPosition(host, file, position);
    written = JSON.stringify(position);
    writtenMs = performance.now();
  };
  try {
    for (; !host.signal.aborted; await pause(pollMs, host.signal)) {
      health.beat("listen");
      try {
        const found = record.version();
        if (found === version) continue;
        while (record.use((state) => tally.read(state)) && !host.signal.aborted)
          await pause(1, host.signal);
        version = found;
        if (written === undefined || performance.now() - writtenMs > positionMs) keep();
      } catch (error) {
        // Counted there; the next round reads on from the same row.
        log(host, "debug", `The ledger cannot be read: ${toCniError(error).message}`);
      }
    }
  } finally {
    keep();
    await server.stop(true);
  }
}

function serve(
  host: Host,
  { hostname, port }: { hostname: string; port: number },
  fetch: (request: Request) => Response | Promise<Response>,
) {
  try {
    return Bun.serve({
      hostname,
      port,
      idleTimeout: 30,
      maxRequestBodySize: 1024,
      fetch,
      error: (error) => {
        log(host, "error", toCniError(error).message);
        return new Response("internal error\n", { status: 500 });
      },
    });
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
    throw new CniError(code.ioFailure, `Cannot listen on ${hostname} port ${port}: ${reason}`, {
      cause: error,
    });
  }
}

function answer(
  agent: Agent,
  tally: Tally,
  reports: Reports,
  { method, url }: Request,
): Response | Promise<Response> {
  const text = (status: number, body: string) => new Response(body, { status });
  const asked = new URL(url);
  const { pathname } = asked;
  if (!["/metrics", "/healthz", "/report"].includes(pathname)) {
    return text(404, "There are /metrics, /healthz and /report\n");
  }
  if (method !== "GET" && method !== "HEAD") return text(405, "GET or HEAD\n");
  if (pathname === "/report") return reports(asked);
  if (pathname === "/healthz") {
    const reasons = agent.health.reasons();
    return reasons.length === 0 ? text(200, "ok\n") : text(503, `${reasons.join("\n")}\n`);
  }
  try {
    agent.record.use((state) => tally.read(state));
  } catch (error) {
    // Counted there: what was counted before is told.
    log(agent.host, "debug", `The ledger cannot be read: ${toCniError(error).message}`);
  }
  const body = formatMetrics(gatherMetrics(agent, tally));
  return new Response(body, { headers: { "Content-Type": metricsContentType } });
}

/** What cannot be written costs the counts of a restart. */
function keepPosition(host: Host, file: string, position: { inode: number; id: number }): void {
  try {
    writePosition(file, position);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    log(host, "debug", `Cannot write ${file}: ${toCniError(error).message}`);
  }
}
