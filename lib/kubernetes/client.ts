/**
 * Requests to the Kubernetes API server, through Bun's `fetch` with the cluster's CA: client-node
 * loses the CA on Bun. TLS is always verified, whatever the environment says. HTTPS_PROXY and
 * NO_PROXY count, as for every Kubernetes client. No usable answer is code 11: the runtime tries
 * again.
 */
import * as v from "valibot";
import { CniError, code, type Host } from "../cni.ts";
import { oneLine } from "../text.ts";
import {
  type Answer,
  type Call,
  type Failure,
  failed,
  judge,
  type Origin,
  pauseMsDefault,
  type Query,
  repeatsMax,
  statusOf,
} from "./answer.ts";
import type { KubeSettings } from "./credentials.ts";
import {
  type Account,
  findAccount,
  issueText,
  override,
  readSecrets,
  type Secrets,
} from "./kubeconfig.ts";

const string = v.optional(v.string());
const strings = v.nullish(v.record(v.string(), v.string()));
/** What we read of a pod; its other keys are kept. */
export const Pod = v.looseObject({
  metadata: v.looseObject({
    name: v.string(),
    namespace: v.string(),
    uid: v.string(),
    resourceVersion: string,
    deletionTimestamp: string,
    annotations: strings,
    labels: strings,
  }),
  spec: v.optional(v.looseObject({ serviceAccountName: string, nodeName: string })),
  status: v.optional(v.looseObject({})),
});
/** One pod as the API server describes it. */
export type Pod = v.InferOutput<typeof Pod>;

/**
 * A server and the right to ask it. A path is its segments: `["api", "v1", "namespaces", ...]`.
 * Calls throw CniError 11 when there is no usable answer, 5 or 7 for unusable credentials.
 */
export interface Kube {
  /** URL of the server, without a trailing slash. */
  readonly server: string;
  /** The files to name in errors; never a secret. */
  readonly credential: string;
  /** HTTP requests made, repetitions included. */
  readonly requests: number;
  /** What the server's clock said in its last answer; undefined where it has not said. */
  readonly serverMs: number | undefined;
  /** Reads an object or a list. @throws CniError 11, see {@link isNotFound} */
  get(path: readonly string[], query?: Query): Promise<unknown>;
  /** Reads one page of a list. @throws CniError 11 */
  list(path: readonly string[], query: Query): Promise<Record<string, unknown>>;
  /**
   * Watches a collection: the bytes as they come, until the server, the signal or a broken
   * connection ends them. @throws CniError 11, also in the middle
   */
  watch(
    path: readonly string[],
    query: Query,
    signal: AbortSignal,
  ): Promise<AsyncIterable<Uint8Array>>;
  /** Reads a pod. @throws CniError 11, also when the answer is no pod */
  getPod(namespace: string, name: string): Promise<Pod>;
  /**
   * Changes an object by JSON merge patch (RFC 7396). `metadata.resourceVersion` or `metadata.uid`
   * in it is a condition: see {@link isConflict}; to read and patch again is the caller's.
   */
  patch(path: readonly string[], patch: unknown): Promise<unknown>;
  /** Creates an object. Not repeated after a broken connection: it may exist by then. */
  post(path: readonly string[], object: unknown): Promise<unknown>;
}

export { statusOf };

/** True when the server answered that there is no such object. */
export function isNotFound(error: unknown): boolean {
  return statusOf(error) === 404;
}

/** True when the server refused a change because the object is another one by now. */
export function isConflict(error: unknown): boolean {
  return statusOf(error) === 409;
}

/**
 * Finds the credentials; sends nothing.
 *
 * @throws CniError 7 when there are none, or for a kubeconfig that is malformed or asks for what we
 *   refuse (TLS without verification, a proxy, impersonation); 5 for a file that cannot be read
 */
export async function connect(host: Host, settings: KubeSettings): Promise<Kube> {
  const account = override(findAccount(host, settings), settings);
  const { timeoutMs, untilMs, pluginMs } = settings;
  if (pluginMs !== undefined) keepAsked(account, pluginMs);
  const session: Session = { host, account, timeoutMs, untilMs, requests: 0 };
  return {
    server: account.server,
    credential: account.credential,
    get requests() {
      return session.requests;
    },
    get serverMs() {
      return session.serverMs;
    },
    get: (path, query) => send(session, { method: "GET", path, ...(query && { query }) }),
    list: async (path, query) => {
      // `send` gives objects alone.
      const call = { method: "GET", path, query, bytesMax: pageBytesMax } as const;
      return (await send(session, call)) as Record<string, unknown>;
    },
    watch: (path, query, signal) => stream(session, { method: "GET", path, query }, signal),
    patch: (path, body) => send(session, { method: "PATCH", path, body }),
    post: (path, body) => send(session, { method: "POST", path, body }),
    async getPod(namespace, name) {
      const path = ["api", "v1", "namespaces", namespace, "pods", name];
      return parsePod(await send(session, { method: "GET", path }), path, account);
    },
  };
}

/**
 * A pod from what a server answered to a GET.
 * @throws CniError 11 when it is no pod
 */
export function parsePod(object: unknown, path: readonly string[], from: Origin): Pod {
  const pod = v.safeParse(Pod, object);
  if (pod.success) return pod.output;
  const reason = `the answer is no pod: ${issueText(pod.issues[0])}`;
  throw failed(from, { method: "GET", path }, { reason });
}

/** Lets many requests share what an `exec` plugin said once. */
function keepAsked(account: Account, keptMs: number): void {
  const { plugin } = account;
  if (plugin === undefined) return;
  let asked: Promise<Secrets> | undefined;
  let untilMs = 0;
  account.plugin = (mark) => {
    if (asked !== undefined && performance.now() < untilMs) return asked;
    const now = plugin(mark);
    asked = now;
    untilMs = performance.now() + keptMs;
    now.catch(() => {
      if (asked === now) asked = undefined;
    });
    return now;
  };
}

/** Largest answer read, in bytes; an object in etcd has at most 1.5 MiB. */
const answerBytesMax = 8 * 1024 * 1024;
/** The same of a page of a list. */
const pageBytesMax = 64 * 1024 * 1024;

interface Session {
  host: Host;
  account: Account;
  timeoutMs: number;
  untilMs: number | undefined;
  requests: number;
  serverMs?: number;
}
/**
 * One call within one deadline. A server that is too busy says when to come back, and knows: to
 * come back costs less than to fail the pod, which the kubelet then makes anew.
 */
async function send(session: Session, asked: Call): Promise<unknown> {
  const { account, host } = session;
  const timeoutMs = limitOf(session);
  const call = { ...asked, timeoutMs };
  const url = urlOf(session, call);
  const deadline = performance.now() + timeoutMs;
  const signal = AbortSignal.any([host.signal, AbortSignal.timeout(timeoutMs)]);
  let before = "";
  for (let repeats = 0; ; repeats++) {
    const answer = await attempt(session, call, url, signal);
    if ("value" in answer) return answer.value;
    // Why it was asked again says more than that the time was over then.
    if (before !== "" && before !== answer.reason) answer.reason += `, before that: ${before}`;
    else before = answer.reason;
    const { pauseMs, by } = answer.repeat ?? { pauseMs: Number.POSITIVE_INFINITY, by: "own" };
    if (repeats >= repeatsMax[by] || performance.now() + pauseMs >= deadline) {
      throw failed(account, call, answer);
    }
    // When the pause is cut short the attempt fails at once, and says why.
    await Promise.race([Bun.sleep(pauseMs), ended(signal)]);
  }
}

/** What a call may take: its own limit, or what is left to all of them. */
function limitOf({ host, timeoutMs, untilMs }: Session): number {
  if (untilMs === undefined) return timeoutMs;
  return Math.max(0, Math.round(Math.min(timeoutMs, untilMs - host.now())));
}

/** One watch: nothing is repeated, its caller knows where to go on. */
async function stream(
  session: Session,
  call: Call,
  signal: AbortSignal,
): Promise<AsyncIterable<Uint8Array>> {
  // The headers come at once, or never: the limit of a call holds until then.
  const opening = new AbortController();
  const expire = () => opening.abort(new DOMException("", "TimeoutError"));
  const timer = setTimeout(expire, session.timeoutMs);
  const both = AbortSignal.any([session.host.signal, signal, opening.signal]);
  try {
    const response = await request(session, call, urlOf(session, call), both);
    if (response.status === 200) return chunks(session, call, response);
    const answer = judge(call, await readAnswer(call, response), session.host.now);
    const odd = { status: response.status, reason: `status ${response.status}` };
    throw failed(session.account, call, "value" in answer ? odd : answer);
  } catch (error) {
    if (error instanceof CniError) throw error;
    throw failed(session.account, call, connectionFailure(session, call, error));
  } finally {
    clearTimeout(timer);
  }
}

/** The chunks of a body; a connection that breaks is an error like any other. */
async function* chunks(session: Session, call: Call, { body }: Response) {
  if (body === null) return;
  try {
    yield* body as unknown as AsyncIterable<Uint8Array>;
  } catch (error) {
    throw failed(session.account, call, connectionFailure(session, call, error));
  }
}

function urlOf({ account }: Session, { path, query }: Call): string {
  const url = [account.server, ...path.map(segment)].join("/");
  return query === undefined ? url : `${url}?${new URLSearchParams(query)}`;
}

/** Resolves when the signal aborts. */
function ended(signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    if (signal.aborted) done();
    else signal.addEventListener("abort", () => done(), { once: true });
  });
}

/** A name as one URL segment. Kubernetes refuses the same (path.IsValidPathSegmentName). */
function segment(name: string): string {
  const isSafe = name !== "" && name !== "." && name !== ".." && name.length <= 253;
  if (isSafe && name.isWellFormed() && !/[/%\p{Cc}]/u.test(name)) return encodeURIComponent(name);
  const shown = oneLine(name, 80);
  throw new CniError(code.invalidConfig, `Invalid name "${shown}" of a Kubernetes object`);
}

async function attempt(
  session: Session,
  call: Call,
  url: string,
  signal: AbortSignal,
): Promise<{ value: unknown } | Failure> {
  try {
    const answer = await readAnswer(call, await request(session, call, url, signal));
    return judge(call, answer, session.host.now);
  } catch (error) {
    return connectionFailure(session, call, error);
  }
}

/** Sends one request; the body of its answer is still to be read. */
async function request(
  session: Session,
  call: Call,
  url: string,
  signal: AbortSignal,
): Promise<Response> {
  const kind = call.method === "PATCH" ? "application/merge-patch+json" : "application/json";
  const sent = call.body === undefined ? {} : { body: JSON.stringify(call.body) };
  const { headers, tls } = await readSecretsWithin(session.account, signal);
  session.requests++;
  const response = await fetch(url, {
    method: call.method,
    headers: {
      ...headers,
      Accept: "application/json",
      "Accept-Encoding": "identity",
      "User-Agent": "genie",
      ...(sent.body && { "Content-Type": kind }),
    },
    ...sent,
    redirect: "manual",
    // Nobody asked for a compressed answer; of a broken one Bun itself would write to stderr.
    decompress: false,
    signal,
    // Said aloud, because NODE_TLS_REJECT_UNAUTHORIZED=0 would switch it off.
    tls: { ...tls, rejectUnauthorized: true },
  });
  const said = Date.parse(response.headers.get("Date") ?? "");
  if (!Number.isNaN(said)) session.serverMs = said;
  return response;
}

async function readAnswer(call: Call, response: Response): Promise<Answer> {
  const { bytesMax = answerBytesMax } = call;
  const { status, headers } = response;
  return { status, headers, body: await readBody(response, bytesMax), bytesMax };
}

/** An `exec` plugin may hang: it is ended then, with all that it started. */
async function readSecretsWithin(account: Account, signal: AbortSignal): Promise<Secrets> {
  if (account.plugin === undefined) return readSecrets(account);
  const { endOrphans, tokenVariable } = await import("../lock.ts");
  const token = crypto.randomUUID();
  const secrets = readSecrets(account, { name: tokenVariable, value: token });
  const late = ended(signal).then(() => Promise.reject(signal.reason));
  try {
    return await Promise.race([secrets, late]);
  } catch (error) {
    if (signal.aborted) await endOrphans(token);
    throw error;
  }
}

/** The body, or undefined when it is larger than allowed; what is left of it is dropped then. */
export async function readBody(response: Response, bytesMax: number): Promise<string | undefined> {
  if (response.body === null) return "";
  const chunks: Uint8Array[] = [];
  let total = 0;
  for await (const chunk of response.body) {
    total += chunk.length;
    if (total > bytesMax) return undefined;
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

function connectionFailure(session: Session, call: Call, error: unknown): Failure {
  const { host } = session;
  const timeoutMs = call.timeoutMs ?? session.timeoutMs;
  if (error instanceof CniError) throw error;
  if (host.signal.aborted) return { reason: "we were asked to end" };
  const { name, code: reason = name } = error as { name: string; code?: unknown };
  if (name === "TimeoutError") return { reason: `no answer within ${timeoutMs} ms` };
  if (/CERT|VERIFY|ISSUER/.test(String(reason))) {
    return { reason: `the server's certificate is not valid for our CA or its name (${reason})` };
  }
  // Bun's word when it cannot use what `tls` holds.
  const damaged = reason === "FailedToOpenSocket" ? ", is a certificate or key damaged?" : "";
  const proxy = ["HTTPS_PROXY", "https_proxy"].find((variable) => host.env[variable]);
  const hint = proxy === undefined ? damaged : `${damaged}, ${proxy} is set`;
  return {
    reason: `the connection failed (${reason}${hint})`,
    ...(call.method !== "POST" && { repeat: { pauseMs: pauseMsDefault, by: "own" } }),
  };
}
