/**
 * `genie report --cluster`: finds the nodes, asks the agent of each for its report, and merges the
 * reports. It asks through the API server, which reaches the agent's port on every node or in every
 * pod of the agent, or directly at addresses. An agent answers as `genie report --json`. Only
 * reads.
 * Source: Kubernetes API reference, connect to proxies of nodes and pods.
 */
import { join } from "node:path";
import manifest from "../../package.json";
import type { Host } from "../call.ts";
import { CniError, code, oneLine, toCniError } from "../cni.ts";
import { type Flags, parseDuration, text, UsageError } from "../config/usage.ts";
import { isObject } from "../json.ts";
import * as api from "../kubernetes/client.ts";
import { exists } from "../settings.ts";
import { startMerge } from "./cluster_merge.ts";
import { type ClusterReport, type ParsedReport, parseReport, type Report } from "./document.ts";
import { isoTime } from "./quantity.ts";

const portDefault = 9477;
const timeoutMsDefault = 15_000;
const timeoutMsMax = 3_600_000;
/** Selects the nodes on which the DaemonSet of `genie manifest` runs, and its pods. */
const nodeSelector = "kubernetes.io/os=linux";
const podSelector = "app.kubernetes.io/name=genie";
/** Nodes asked at the same time. */
const askedAtOnce = 16;
/** Largest report read, in bytes; the lists in a report have their limits. */
const reportBytesMax = 8 * 1024 * 1024;
/** Nodes of one page of a list. */
const pageItems = "250";
const nodesMax = 20_000;
/** Longest name of a node, in characters. */
const nameMax = 253;
/** How long the credentials from an `exec` plugin are used, in ms: tokens live for minutes. */
const pluginMs = 60_000;

/** Options that a node's agent takes as they are. */
const agentOptions = ["since", "network", "namespace", "pod", "command", "failed", "denied"];

/** A node to ask; `ask` gives the parsed JSON of its report. */
type Target = { node: string; ask: () => Promise<unknown> };

/** How a node is asked: what limits its report, and how long it may take. */
type AskOptions = { query: api.Query; timeoutMs: number };

/**
 * Asks every node and merges what they say.
 * @param limit how many of the newest requests to list
 * @throws UsageError for values that make no sense, CniError 5, 7, 11 or 50 when no node is found
 */
export async function makeClusterReport(
  host: Host,
  flags: Flags,
  { filter, limit }: { filter: Report["filter"]; limit: number },
): Promise<ClusterReport> {
  const timeoutMs = readTimeout(text(flags, "timeout"));
  const given = agentOptions.filter((name) => flags[name] !== undefined);
  const limits = Object.fromEntries(given.map((name) => [name, String(flags[name])]));
  const asking = { query: { ...limits, limit: String(limit) }, timeoutMs };
  const { origin, targets } = await findTargets(host, flags, asking);
  const made = { genie: manifest.version, generatedAt: isoTime(host.now()) ?? "" };
  const merge = startMerge({ ...made, record: origin, notices: [], filter, limit });
  const rest = targets.values();
  const askRest = async () => {
    for (const target of rest) {
      const report = await askOne(target);
      if (typeof report === "string") merge.addMissing(target.node, report);
      else merge.add(target.node, report);
    }
  };
  await Promise.all(Array.from({ length: askedAtOnce }, askRest));
  return merge.result();
}

function readEndpoint(given: string): URL {
  const url = URL.parse(given.trim());
  const isWeb = url?.protocol === "http:" || url?.protocol === "https:";
  if (url && isWeb && url.username === "" && url.password === "" && url.search === "") return url;
  const shown = url?.password ? "..." : given;
  const expected = "http://ADDRESS:PORT or an https one, with commas between";
  throw new UsageError(`Invalid --endpoints "${shown}": expected ${expected}`);
}

/** Finds it as kubectl does; undefined for the service account of the pod we run in. */
function findKubeconfig(host: Host, given: string | undefined): string | undefined {
  const { KUBECONFIG: variable = "", HOME: home = "" } = host.env;
  if (given !== undefined) return given;
  const files = variable.split(":").filter((file) => file !== "");
  if (files.length > 1) {
    const remedy = "give one with --kubeconfig, as from kubectl config view --flatten --minify";
    throw new UsageError(`KUBECONFIG names several files: ${remedy}`);
  }
  const usual = home === "" ? "" : join(home, ".kube", "config");
  return files[0] ?? (usual !== "" && exists(usual) ? usual : undefined);
}

function readPort(given: string | undefined): number {
  if (given === undefined) return portDefault;
  const port = /^\d{1,5}$/.test(given) ? Number(given) : 0;
  if (port >= 1 && port <= 65_535) return port;
  throw new UsageError(`Invalid --port "${given}": expected a number from 1 to 65535`);
}

function readTimeout(given: string | undefined): number {
  if (given === undefined) return timeoutMsDefault;
  const ms = parseDuration(given);
  if (ms !== undefined && ms <= timeoutMsMax) return ms;
  throw new UsageError(`Invalid --timeout "${given}": expected a duration up to 1h, such as 15s`);
}

/**
 * Finds the nodes.
 * @returns them, and who named them
 * @throws CniError 5, 7 or 11 when the nodes cannot be found
 */
async function findTargets(host: Host, flags: Flags, asking: AskOptions) {
  const endpoints = text(flags, "endpoints");
  if (endpoints !== undefined) {
    const targets = endpoints.split(",").map((given) => {
      const url = readEndpoint(given);
      const node = url.pathname === "/" ? url.host : oneLine(url.host + url.pathname, nameMax);
      return { node, ask: () => askEndpoint(host, url, asking) };
    });
    return { origin: "the addresses given", targets };
  }
  const kubeconfig = findKubeconfig(host, text(flags, "kubeconfig"));
  const port = readPort(text(flags, "port"));
  const namespace = text(flags, "agents");
  const isPods = namespace !== undefined;
  const kind = isPods ? "pods" : "nodes";
  const selector = text(flags, "selector") ?? (isPods ? podSelector : nodeSelector);
  const kube = await api.connect(host, {
    ...(kubeconfig !== undefined && { kubeconfig }),
    kubeconfigIsExplicit: kubeconfig !== undefined,
    timeoutMs: asking.timeoutMs,
    pluginMs,
  });
  const collection = ["api", "v1", ...(isPods ? ["namespaces", namespace] : []), kind];
  const targets: Target[] = [];
  for await (const { metadata, spec, status } of items(kube, collection, selector)) {
    const { name } = isObject(metadata) ? metadata : {};
    if (typeof name !== "string") continue;
    // A pod that has no node yet, or has ended, has no agent.
    const { nodeName } = isObject(spec) ? spec : {};
    const { phase } = isObject(status) ? status : {};
    if (isPods && (typeof nodeName !== "string" || phase !== "Running")) continue;
    const path = [...collection, `${name}:${port}`, "proxy", "report"];
    const node = oneLine(isPods ? String(nodeName) : name, nameMax);
    targets.push({ node, ask: () => kube.get(path, asking.query) });
  }
  if (targets.length > 0) return { origin: `${kind} of ${kube.server}`, targets };
  const sought = `${kind}${isPods ? ` in namespace ${namespace}` : ""} with ${selector}`;
  throw new CniError(code.unavailable, `No node to ask: ${kube.server} has no running ${sought}`);
}

async function* items(kube: api.Kube, collection: readonly string[], labelSelector: string) {
  let next = "";
  let seen = 0;
  do {
    const query = { labelSelector, limit: pageItems, ...(next !== "" && { continue: next }) };
    const page = await kube.list(collection, query);
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

/** @returns the report of a node, or in words why there is none */
async function askOne({ ask }: Target): Promise<ParsedReport | string> {
  try {
    return parseReport(await ask());
  } catch (error) {
    const known = toCniError(error);
    const details = known.details === "" ? "" : `: ${known.details}`;
    return oneLine(`${api.reasonOf(known)}${details}`, 500);
  }
}

/** Asks one agent at its address, without credentials: anyone could listen there. */
async function askEndpoint(host: Host, base: URL, { query, timeoutMs }: AskOptions) {
  const url = new URL(base);
  if (url.pathname === "/") url.pathname = "/report";
  url.search = new URLSearchParams(query).toString();
  const signal = AbortSignal.any([host.signal, AbortSignal.timeout(timeoutMs)]);
  const refuse = (reason: string, details = "") =>
    new CniError(code.tryAgainLater, reason, { details: oneLine(details, 300) });
  const read = async (response: Response) =>
    [response.status, await api.readBody(response, reportBytesMax)] as const;
  const answered = fetch(url, {
    redirect: "manual",
    decompress: false,
    signal,
    headers: { Accept: "application/json", "Accept-Encoding": "identity", "User-Agent": "genie" },
    tls: { rejectUnauthorized: true },
  }).then(read);
  const [status, body] = await answered.catch(({ name, code: reason = name }) => {
    if (host.signal.aborted) throw refuse("we were asked to end");
    if (name === "TimeoutError") throw refuse(`no answer within ${timeoutMs} ms`);
    throw refuse(`the connection failed (${reason})`);
  });
  if (body === undefined) throw refuse(`the answer is larger than ${reportBytesMax} bytes`);
  const answer = api.readJson(body);
  if (status !== 200) {
    const message = isObject(answer) ? answer["message"] : body;
    throw refuse(`status ${status}`, typeof message === "string" ? message : "");
  }
  if (answer === undefined) throw refuse("the answer is not JSON");
  return answer;
}
