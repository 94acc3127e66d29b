/**
 * The nodes of a cluster and their reports: who has one, and how to ask for it. Through the API
 * server, which reaches the agent's port on every node or in every pod of the agent, or straight at
 * addresses. An agent gives the same as `genie report --json`.
 * Source: Kubernetes API reference, connect to proxies of nodes and pods.
 */

import { CniError, code, type Host, toCniError } from "../cni.ts";
import { isObject } from "../json.ts";
import { type Query, reasonOf } from "../kubernetes/answer.ts";
import { connect, type Kube, readBody } from "../kubernetes/client.ts";
import { oneLine } from "../text.ts";
import { type ParsedReport, parseReport } from "./cluster_parse.ts";

/** Where the nodes are found. */
export type NodeSource =
  | { kind: "endpoints"; urls: readonly URL[] }
  | { kind: "nodes"; kubeconfig?: string; selector: string; port: number }
  | { kind: "pods"; kubeconfig?: string; namespace: string; selector: string; port: number };

/** One node: its name, and its report, or in words why there is none. */
export interface NodeAnswer {
  node: string;
  report: ParsedReport | string;
}

/** Nodes asked at the same time. */
const askedAtOnce = 16;
/** Largest report read, in bytes; what is listed in one has its limits. */
const reportBytesMax = 8 * 1024 * 1024;
/** Nodes of one page of a list. */
const pageItems = "250";
const nodesMax = 20_000;
/** How long what an `exec` plugin said serves, in ms: tokens live for minutes. */
const pluginMs = 60_000;

/** A node to ask; `ask` gives the parsed JSON of its report. */
interface Target {
  node: string;
  ask: () => Promise<unknown>;
}

/** The nodes that were found: who told of them, how many, and their reports as they come. */
export interface Nodes {
  origin: string;
  count: number;
  answers: AsyncGenerator<NodeAnswer, void>;
}

/**
 * Finds the nodes and asks them, some at a time.
 *
 * @param query limits the reports, see `genie report --help`
 * @param timeoutMs of each request
 * @throws CniError 5, 7 or 11 when the nodes cannot be found
 */
export async function askNodes(
  host: Host,
  source: NodeSource,
  query: Query,
  timeoutMs: number,
): Promise<Nodes> {
  if (source.kind === "endpoints") {
    const targets = source.urls.map((url) => ({
      node: url.pathname === "/" ? url.host : oneLine(url.host + url.pathname, 253),
      ask: () => askEndpoint(host, url, query, timeoutMs),
    }));
    return { origin: "the addresses given", count: targets.length, answers: askAll(targets) };
  }
  const { kubeconfig } = source;
  const named = kubeconfig === undefined ? {} : { kubeconfig };
  const isNamed = kubeconfig !== undefined;
  const kube = await connect(host, {
    ...named,
    kubeconfigIsExplicit: isNamed,
    timeoutMs,
    pluginMs,
  });
  const targets = await findTargets(kube, source, query);
  const { kind } = source;
  return { origin: `${kind} of ${kube.server}`, count: targets.length, answers: askAll(targets) };
}

async function findTargets(
  kube: Kube,
  source: Exclude<NodeSource, { kind: "endpoints" }>,
  query: Query,
): Promise<Target[]> {
  const { kind, selector, port } = source;
  const inNamespace = kind === "pods" ? ["namespaces", source.namespace] : [];
  const collection = ["api", "v1", ...inNamespace, kind];
  const found: Target[] = [];
  for await (const item of items(kube, collection, selector)) {
    const { metadata, spec, status } = item as Record<string, unknown>;
    const { name } = isObject(metadata) ? metadata : {};
    if (typeof name !== "string") continue;
    // A pod that has no node yet, or is over, has no agent.
    const { nodeName } = isObject(spec) ? spec : {};
    const { phase } = isObject(status) ? status : {};
    if (kind === "pods" && (typeof nodeName !== "string" || phase !== "Running")) continue;
    const path = [...collection, `${name}:${port}`, "proxy", "report"];
    found.push({
      node: oneLine(kind === "pods" ? String(nodeName) : name, 253),
      ask: () => kube.get(path, query),
    });
  }
  if (found.length > 0) return found;
  const place = kind === "pods" ? ` in namespace ${source.namespace}` : "";
  throw new CniError(
    code.unavailable,
    `No node to ask: ${kube.server} has no running ${kind}${place} with ${selector}`,
  );
}

async function* items(kube: Kube, collection: readonly string[], selector: string) {
  let next = "";
  let seen = 0;
  do {
    const more = next === "" ? {} : { continue: next };
    const page = await kube.list(collection, {
      ...{ labelSelector: selector, limit: pageItems },
      ...more,
    });
    const list = page["items"];
    if (!Array.isArray(list)) {
      const what = `${collection.at(-1)} at ${kube.server}`;
      throw new CniError(code.tryAgainLater, `Cannot list ${what}: the answer is no list`);
    }
    yield* list.filter(isObject);
    seen += list.length;
    const { continue: token } = isObject(page["metadata"]) ? page["metadata"] : {};
    next = typeof token === "string" ? token : "";
  } while (next !== "" && seen < nodesMax);
}

/** Asks all, some at a time; whoever answers first comes first. */
async function* askAll(targets: readonly Target[]): AsyncGenerator<NodeAnswer, void> {
  const waiting = new Map<Target, Promise<[Target, NodeAnswer]>>();
  const rest = targets.values();
  for (;;) {
    while (waiting.size < askedAtOnce) {
      const { value: target } = rest.next();
      if (target === undefined) break;
      waiting.set(
        target,
        askOne(target).then((answer) => [target, answer]),
      );
    }
    if (waiting.size === 0) return;
    const [target, answer] = await Promise.race(waiting.values());
    waiting.delete(target);
    yield answer;
  }
}

async function askOne({ node, ask }: Target): Promise<NodeAnswer> {
  try {
    return { node, report: parseReport(await ask()) };
  } catch (error) {
    const known = toCniError(error);
    const details = known.details === "" ? "" : `: ${known.details}`;
    return { node, report: oneLine(`${reasonOf(known)}${details}`, 500) };
  }
}

/** One agent, asked without credentials: it has none to give to a stranger's address. */
async function askEndpoint(host: Host, base: URL, query: Query, timeoutMs: number) {
  const url = new URL(base);
  if (url.pathname === "/") url.pathname = "/report";
  url.search = new URLSearchParams(query).toString();
  const signal = AbortSignal.any([host.signal, AbortSignal.timeout(timeoutMs)]);
  const refuse = (reason: string, details = "") =>
    new CniError(code.tryAgainLater, reason, { details: oneLine(details, 300) });
  let status: number;
  let body: string | undefined;
  try {
    const response = await fetch(url, {
      ...{ redirect: "manual", decompress: false, signal },
      headers: { Accept: "application/json", "Accept-Encoding": "identity", "User-Agent": "genie" },
      tls: { rejectUnauthorized: true },
    });
    status = response.status;
    body = await readBody(response, reportBytesMax);
  } catch (error) {
    const { name, code: reason = name } = error as { name: string; code?: unknown };
    if (host.signal.aborted) throw refuse("we were asked to end");
    if (name === "TimeoutError") throw refuse(`no answer within ${timeoutMs} ms`);
    throw refuse(`the connection failed (${reason})`);
  }
  if (body === undefined) throw refuse(`the answer is larger than ${reportBytesMax} bytes`);
  const answer = readJson(body);
  if (status !== 200) {
    const message = isObject(answer) ? answer["message"] : body;
    throw refuse(`status ${status}`, typeof message === "string" ? message : "");
  }
  if (answer === undefined) throw refuse("the answer is not JSON");
  return answer;
}

function readJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError) return undefined;
    throw error;
  }
}
