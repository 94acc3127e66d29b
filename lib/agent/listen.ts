/**
 * The agent's task that answers requests: `/metrics` for Prometheus, `/healthz` for the kubelet's
 * probes, `/report` for `genie report --cluster`. Reads a request's method, URL and `Accept`,
 * nothing more.
 *
 * `GET /report` is what `genie report --json` prints. It names pods, their addresses and what
 * failed, and whoever reaches the port may read it, so the plugin table must ask for it
 * (`agent.report`). Counting a large ledger takes a second and its memory: a process of its own
 * does it, so that the agent goes on meanwhile and stays small; one of them at a time.
 */
import { join } from "node:path";
import type { Host } from "../call.ts";
import { CniError, code, log, oneLine, toCniError } from "../cni.ts";
import { parseListen } from "../config/schema.ts";
import { run } from "../exec.ts";
import { pause } from "../kubernetes/watch.ts";
import { metricsResponse, openLedgerCounts, readPosition, writePosition } from "./metrics.ts";
import { type Agent, watchRecord } from "./task.ts";

/** How often the ledger is read, and our place in it written beside the record, in ms. */
const pollMs = 2_000;
const positionMs = 30_000;

/** Runs the task until the host's signal aborts. @throws CniError 5 when it cannot listen */
export async function runListen(agent: Agent): Promise<void> {
  const { host, config, record } = agent;
  const listen = parseListen(config.agent.listen);
  if (!listen) return;
  const file = join(config.stateDir, "agent.json");
  const counts = openLedgerCounts(readPosition(file));
  const routes: Routes = {
    "/metrics": (_url, accept) => metricsResponse(agent, counts, accept),
    "/healthz": () => healthResponse(agent),
    "/report": openReports(agent),
  };
  const server = serve(host, listen, routes);
  const { hostname } = listen;
  const address = `${hostname.includes(":") ? `[${hostname}]` : hostname}:${server.port}`;
  log(host, "info", "Metrics and health are served", { address });
  let writtenMs = performance.now();
  const keepPosition = () => {
    writtenMs = performance.now();
    const position = counts.position();
    if (!position || Bun.deepEquals(position, readPosition(file))) return;
    try {
      writePosition(file, position);
    } catch (error) {
      // Without it an agent that is started again counts from its start on.
      log(host, "debug", `Cannot write ${file}: ${toCniError(error).message}`);
    }
  };
  try {
    await watchRecord(agent, { name: "listen", what: "Metrics wait", pollMs }, async () => {
      while (record.use((state) => counts.read(state)) && !host.signal.aborted) {
        await pause(1, host.signal);
      }
      if (performance.now() - writtenMs > positionMs) keepPosition();
    });
  } finally {
    keepPosition();
    await server.stop(true);
  }
}

type Routes = Record<string, (url: URL, accept: string) => Response | Promise<Response>>;

function serve(host: Host, { hostname, port }: { hostname: string; port: number }, routes: Routes) {
  try {
    return Bun.serve({
      hostname,
      port,
      idleTimeout: 30,
      maxRequestBodySize: 1024,
      fetch: (request) => answer(routes, request),
      error: (error) => {
        log(host, "error", toCniError(error).message);
        return new Response("internal error\n", { status: 500 });
      },
    });
  } catch (error) {
    const reason = (error as NodeJS.ErrnoException).code ?? toCniError(error).message;
    const message = `Cannot listen on ${hostname} port ${port}: ${reason}`;
    throw new CniError(code.ioFailure, message, { cause: error });
  }
}

function answer(routes: Routes, { method, url, headers }: Request): Response | Promise<Response> {
  const asked = new URL(url);
  const route = Object.hasOwn(routes, asked.pathname) ? routes[asked.pathname] : undefined;
  if (!route) return new Response("There are /metrics, /healthz and /report\n", { status: 404 });
  if (method === "GET" || method === "HEAD") return route(asked, headers.get("accept") ?? "");
  return new Response("GET or HEAD\n", { status: 405 });
}

function healthResponse({ health }: Agent): Response {
  const reasons = health.reasons();
  if (reasons.length === 0) return new Response("ok\n");
  return new Response(`${reasons.join("\n")}\n`, { status: 503 });
}

/** Options of `genie report` that a request may carry, as a flag or with a value. */
const flags = ["failed", "denied"];
const values = ["since", "network", "namespace", "pod", "command", "limit"];
const valueMax = 253;
/** Requests listed at most. */
const limitMax = 1000;
/** What making a report may take, in ms, and its size, in bytes. */
const timeoutMs = 20_000;
const reportBytesMax = 8 * 1024 * 1024;
/** The program that runs; after an upgrade it is not the file of its name any more. */
const ownProgram = "/proc/self/exe";

/** A report in JSON, or why there is none, in the form of the API server's errors. */
type NodeReport = { status: number; body: string };

const failure = (status: number, message: string): NodeReport => ({
  status,
  body: JSON.stringify({ message }),
});

/**
 * Answers requests for the report.
 * @param program makes the report; a test may give another one
 */
export function openReports(
  { host, config, cniConfig }: Pick<Agent, "host" | "config" | "cniConfig">,
  program = ownProgram,
): (url: URL) => Promise<Response> {
  let running: { key: string; report: Promise<NodeReport> } | undefined;
  const make = async (words: string[]): Promise<NodeReport> => {
    const key = JSON.stringify(words);
    if (running?.key === key) return running.report;
    if (running) return failure(503, "another report is being made");
    const own = cniConfig === undefined ? [] : [`--cni-config=${cniConfig}`];
    const report = makeReport(host, program, ["report", "--json", ...words, ...own]);
    running = { key, report };
    try {
      return await report;
    } finally {
      running = undefined;
    }
  };
  return async (url) => {
    if (!config.agent.report)
      return respond(failure(404, "agent.report of the plugin table is off"));
    const words = readWords(url.searchParams);
    return respond(typeof words === "string" ? failure(400, words) : await make(words));
  };
}

function respond({ status, body }: NodeReport): Response {
  return new Response(body, {
    status,
    headers: {
      "Content-Type": "application/json",
      "Cache-Control": "no-store",
      "X-Content-Type-Options": "nosniff",
      ...(status === 503 && { "Retry-After": "1" }),
    },
  });
}

/** The words of the command line; a text says what is wrong with the request. */
function readWords(asked: URLSearchParams): string[] | string {
  const words: string[] = [];
  for (const [name, value] of asked) {
    if (flags.includes(name) && value === "true") words.push(`--${name}`);
    else if (values.includes(name) && value.length <= valueMax && !/\p{Cc}/u.test(value)) {
      if (name === "limit" && !(Number(value) <= limitMax)) return `limit is at most ${limitMax}`;
      words.push(`--${name}=${value}`);
    } else return `cannot be asked: ${oneLine(`${name}=${value}`, 300)}`;
  }
  return words.sort();
}

async function makeReport(host: Host, program: string, args: string[]): Promise<NodeReport> {
  const options = { env: {}, stdin: "", timeoutMs, signal: host.signal };
  const ran = await run(program, args, { ...options, stdoutBytesMax: reportBytesMax });
  if (ran.kind === "exit" && ran.status === 0) return { status: 200, body: ran.stdout };
  const message = /^genie: error: (.*)/m.exec(ran.stderr)?.[1] ?? `no report, ${ran.kind}`;
  const isUsage = ran.kind === "exit" && ran.status === 2;
  return failure(isUsage ? 400 : 500, oneLine(message, 500));
}
