/**
 * Requests to the Kubernetes API server, through Bun's `fetch` with the cluster's CA, because
 * client-node loses the CA on Bun. TLS is always verified; HTTPS_PROXY and NO_PROXY apply. A call
 * without a usable answer fails with code 11, so that the runtime tries again.
 */
import * as v from "valibot";
import type { Host } from "../call.ts";
import { CniError, code, log, oneLine } from "../cni.ts";
import { isObject } from "../json.ts";
import { type Account, findAccount, issueText, readSecrets, type Secrets } from "./kubeconfig.ts";
import type { KubeSettings } from "./objects_of_call.ts";

/** The keys we read of a pod; its other keys are kept. */
export const Pod = v.looseObject({
  metadata: v.looseObject({
    name: v.string(),
    namespace: v.string(),
    uid: v.string(),
    annotations: v.nullish(v.record(v.string(), v.string())),
  }),
  spec: v.optional(v.looseObject({ serviceAccountName: v.optional(v.string()) })),
});
/** A pod as the API server describes it. */
export type Pod = v.InferOutput<typeof Pod>;

/** Parameters of a list or watch. */
export type Query = Readonly<Record<string, string>>;
type Path = readonly string[];
type Chunks = AsyncIterable<Uint8Array>;

/**
 * A server and the credentials to use it. A path is its segments: `["api", "v1", "namespaces"]`.
 * Calls throw CniError 11 when there is no usable answer, 5 or 7 for unusable credentials.
 */
export type Kube = Awaited<ReturnType<typeof connect>>;
/** What an error says of a server. */
type Origin = Pick<Account, "server" | "credential">;

/** One request. */
interface ApiRequest {
  method: "GET" | "PATCH" | "POST";
  path: Path;
  query?: Query | undefined;
  body?: unknown;
  /** Largest answer read, in place of {@link answerBytesMax}. */
  bytesMax?: number;
  /** Limit of this request, in place of the session's. */
  timeoutMs?: number;
}

/** Why a request has no answer; `repeat` is set when it may be sent again, after a pause. */
interface Failure {
  reason: string;
  status?: number;
  details?: string;
  repeat?: { pauseMs: number; timesMax: number };
}

/** How a request is repeated; when the server asks for it, more often (as client-go). */
const repeatOnce = { pauseMs: 100, timesMax: 1 };
const repeatsAskedMax = 10;
/** Largest answer read, and page of a list, in bytes; an object in etcd has at most 1.5 MiB. */
const answerBytesMax = 8 * 1024 * 1024;
const pageBytesMax = 64 * 1024 * 1024;

/** The HTTP status behind an error of this module; undefined when there was no answer. */
export function statusOf(error: unknown): number | undefined {
  const cause = error instanceof CniError ? error.cause : undefined;
  return isObject(cause) && typeof cause["status"] === "number" ? cause["status"] : undefined;
}

/** Why there is no answer, without request and server; the message of any other error. */
export function reasonOf(error: CniError): string {
  const { reason } = isObject(error.cause) ? error.cause : {};
  return typeof reason === "string" ? reason : error.message;
}

/** True when the server answered that there is no such object. */
export const isNotFound = (error: unknown): boolean => statusOf(error) === 404;

/** True when the server refused a change because the object has changed or exists already. */
export const isConflict = (error: unknown): boolean => statusOf(error) === 409;

interface Session {
  host: Host;
  account: Account;
  settings: KubeSettings;
  requests: number;
  serverMs?: number;
}
type Answer = { value: Record<string, unknown> } | Failure;

/**
 * Finds the credentials; sends nothing.
 * @throws CniError 7 when there are none, or for a kubeconfig that is malformed or asks for what we
 *   refuse (TLS without verification, a proxy, impersonation); 5 for a file that cannot be read
 */
export async function connect(host: Host, settings: KubeSettings) {
  const account = findAccount(host, settings);
  const { server, credential, warning } = account;
  if (warning) log(host, "warn", warning);
  cacheSecrets(account, settings.pluginMs);
  const session: Session = { host, account, settings, requests: 0 };
  return {
    /** URL of the server, without a trailing slash. */
    server,
    /** The files to name in errors; never a secret. */
    credential,
    /** What to put right in the credentials, though they work. */
    warning,
    /** HTTP requests made, repetitions included. */
    get requests() {
      return session.requests;
    },
    /** The server's clock in its last answer, in ms; undefined when no answer carried it. */
    get serverMs() {
      return session.serverMs;
    },
    /** Reads an object or a list. @throws CniError 11, see {@link isNotFound} */
    get: (path: Path, query?: Query): Promise<unknown> =>
      send(session, { method: "GET", path, query }),
    /** Reads one page of a list. @throws CniError 11 */
    list: (path: Path, query: Query) =>
      send(session, { method: "GET", path, query, bytesMax: pageBytesMax }),
    /**
     * Watches a collection: the bytes as they come, until the server, the signal or a broken
     * connection ends them. @throws CniError 11, also in the middle
     */
    watch: (path: Path, query: Query, signal: AbortSignal) =>
      stream(session, { method: "GET", path, query }, signal),
    /**
     * Changes an object by JSON merge patch (RFC 7396). A `metadata.resourceVersion` or
     * `metadata.uid` in it is a precondition: after {@link isConflict}, the caller reads and
     * patches again.
     */
    patch: (path: Path, body: unknown): Promise<unknown> =>
      send(session, { method: "PATCH", path, body }),
    /** Creates an object. Not repeated after a broken connection: the object may exist by then. */
    post: (path: Path, body: unknown): Promise<unknown> =>
      send(session, { method: "POST", path, body }),
    /** Reads a pod. @throws CniError 11, also when the answer is no pod */
    async getPod(namespace: string, name: string) {
      const path = ["api", "v1", "namespaces", namespace, "pods", name];
      return parsePod(await send(session, { method: "GET", path }), path, account);
    },
  };
}

/**
 * Parses a pod that a server sent as the answer to a GET of this path.
 * @throws CniError 11 when it is no pod
 */
export function parsePod(object: unknown, path: Path, from: Origin): Pod {
  const pod = v.safeParse(Pod, object);
  if (pod.success) return pod.output;
  const reason = `the answer is no pod: ${issueText(pod.issues[0])}`;
  throw failed(from, { method: "GET", path }, { reason });
}

/** Lets the requests of this many ms share one answer of an `exec` plugin. */
function cacheSecrets(account: Account, pluginMs = 0): void {
  const { plugin } = account;
  if (plugin === undefined || pluginMs === 0) return;
  let cached: Promise<Secrets> | undefined;
  let untilMs = 0;
  account.plugin = (ownToken) => {
    if (cached !== undefined && performance.now() < untilMs) return cached;
    cached = plugin(ownToken);
    untilMs = performance.now() + pluginMs;
    cached.catch(() => {
      untilMs = 0;
    });
    return cached;
  };
}

/**
 * Sends a request and repeats it within one deadline. A server that is too busy says when to come
 * back: waiting costs less than failing the pod, which the kubelet would then create anew.
 */
async function send(session: Session, asked: ApiRequest): Promise<Record<string, unknown>> {
  const { account, host, settings } = session;
  const leftMs = settings.untilMs === undefined ? Infinity : settings.untilMs - host.now();
  const timeoutMs = Math.max(0, Math.round(Math.min(settings.timeoutMs, leftMs)));
  const call = { ...asked, timeoutMs };
  const deadline = performance.now() + timeoutMs;
  const signal = AbortSignal.any([host.signal, AbortSignal.timeout(timeoutMs)]);
  let firstReason = "";
  for (let repeats = 0; ; repeats++) {
    const answer = await request(session, call, signal)
      .then((response) => readAnswer(session, call, response))
      .catch((error: unknown) => connectionFailure(session, call, error));
    if ("value" in answer) return answer.value;
    firstReason ||= answer.reason;
    // The first failure says more than the timeout of its repetition does.
    if (firstReason !== answer.reason) answer.reason += `, before that: ${firstReason}`;
    const { pauseMs, timesMax } = answer.repeat ?? { pauseMs: 0, timesMax: 0 };
    if (repeats >= timesMax || performance.now() + pauseMs >= deadline) {
      throw failed(account, call, answer);
    }
    // When the signal cuts the pause short, the next attempt fails at once and says why.
    await Promise.race([Bun.sleep(pauseMs), aborted(signal)]);
  }
}

/** Opens a watch. Nothing is repeated: the caller knows where to go on. */
async function stream(session: Session, call: ApiRequest, signal: AbortSignal): Promise<Chunks> {
  // The limit of a call holds until the headers are there, which a server sends at once.
  const opening = new AbortController();
  const expire = () => opening.abort(new DOMException("", "TimeoutError"));
  const timer = setTimeout(expire, session.settings.timeoutMs);
  const signals = AbortSignal.any([session.host.signal, signal, opening.signal]);
  try {
    const response = await request(session, call, signals);
    if (response.status === 200) return chunks(session, call, response);
    const answer = await readAnswer(session, call, response);
    const failure = "value" in answer ? { reason: `status ${response.status}` } : answer;
    throw failed(session.account, call, { status: response.status, ...failure });
  } catch (error) {
    throw failed(session.account, call, connectionFailure(session, call, error));
  } finally {
    clearTimeout(timer);
  }
}

/** The chunks of a body; a connection that breaks is an error like any other. */
async function* chunks(session: Session, call: ApiRequest, { body }: Response) {
  if (body === null) return;
  try {
    yield* body as unknown as Chunks;
  } catch (error) {
    throw failed(session.account, call, connectionFailure(session, call, error));
  }
}

/** Resolves when the signal aborts. */
export function aborted(signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    if (signal.aborted) done();
    else signal.addEventListener("abort", () => done(), { once: true });
  });
}

/** A name as one URL segment. Kubernetes refuses the same names (path.IsValidPathSegmentName). */
function segment(name: string): string {
  const isSafe = name !== "" && name !== "." && name !== ".." && name.length <= 253;
  if (isSafe && name.isWellFormed() && !/[/%\p{Cc}]/u.test(name)) return encodeURIComponent(name);
  const shown = oneLine(name, 80);
  throw new CniError(code.invalidConfig, `Invalid name "${shown}" of a Kubernetes object`);
}

/** Sends one request; the body of its answer is still to be read. */
async function request(session: Session, asked: ApiRequest, signal: AbortSignal) {
  const { method, path, query, body } = asked;
  const url = [session.account.server, ...path.map(segment)].join("/");
  const contentType = method === "PATCH" ? "application/merge-patch+json" : "application/json";
  const { headers, tls } = await readSecretsWithin(session.account, signal);
  session.requests++;
  const response = await fetch(query === undefined ? url : `${url}?${new URLSearchParams(query)}`, {
    method,
    headers: {
      ...headers,
      Accept: "application/json",
      "Accept-Encoding": "identity",
      "User-Agent": "genie",
      ...(body !== undefined && { "Content-Type": contentType }),
    },
    ...(body !== undefined && { body: JSON.stringify(body) }),
    redirect: "manual",
    // We ask for no compression; Bun would write about a damaged compressed answer to stderr.
    decompress: false,
    signal,
    // Explicit, because NODE_TLS_REJECT_UNAUTHORIZED=0 would switch it off.
    tls: { ...tls, rejectUnauthorized: true },
  });
  const serverMs = Date.parse(response.headers.get("Date") ?? "");
  if (!Number.isNaN(serverMs)) session.serverMs = serverMs;
  return response;
}

/** Reads the secrets, and ends an `exec` plugin that hangs with all that it started. */
async function readSecretsWithin(account: Account, signal: AbortSignal): Promise<Secrets> {
  if (account.plugin === undefined) return readSecrets(account);
  const { endOrphans } = await import("../recovery/orphans.ts");
  const token = crypto.randomUUID();
  const secrets = readSecrets(account, token);
  const late = aborted(signal).then(() => Promise.reject(signal.reason));
  try {
    return await Promise.race([secrets, late]);
  } catch (error) {
    if (signal.aborted) await endOrphans(token);
    throw error;
  }
}

/** The body as text; undefined when it is larger than allowed, and then its rest is dropped. */
export async function readBody(response: Response, bytesMax: number): Promise<string | undefined> {
  if (response.body === null) return "";
  const parts: Uint8Array[] = [];
  let total = 0;
  for await (const part of response.body) {
    total += part.length;
    if (total > bytesMax) return undefined;
    parts.push(part);
  }
  return Buffer.concat(parts).toString("utf8");
}

/** Reads an answer: the object, or why there is none. */
async function readAnswer(
  { host }: Session,
  call: ApiRequest,
  response: Response,
): Promise<Answer> {
  const { status, headers } = response;
  const { bytesMax = answerBytesMax } = call;
  const body = await readBody(response, bytesMax);
  if (body === undefined) return { status, reason: `the answer is larger than ${bytesMax} bytes` };
  if (status >= 300 && status < 400) return { status, reason: `${status}, a redirect, is refused` };
  const value = readJson(body);
  if (status >= 200 && status < 300) {
    if (!isObject(value)) return { status, reason: "the answer is not a JSON object" };
    const mismatch = mismatchOf(call, value);
    return mismatch === undefined ? { value } : { status, reason: mismatch };
  }
  const message = isObject(value) && typeof value["message"] === "string" ? value["message"] : "";
  const { verb, resource } = describe(call);
  const meaning: Record<number, string> = {
    401: "401 Unauthorized, the server does not accept these credentials",
    403: `403 Forbidden, grant these credentials the verb "${verb}" on "${resource}"`,
    404: "404, it does not exist",
    409: "409 Conflict, it exists already or has changed",
    429: "429, the server is too busy",
  };
  const reason = meaning[status] ?? `status ${status}`;
  const failure: Failure = { status, reason, details: oneLine(message, 1000) };
  if (status !== 429 && status < 500) return failure;
  const waitMs = retryAfter(headers, host.now());
  if (waitMs === undefined) return { ...failure, repeat: repeatOnce };
  if (waitMs > 0) failure.reason += `, it says to come back in ${Math.ceil(waitMs / 1000)} s`;
  const pauseMs = Math.max(waitMs, repeatOnce.pauseMs);
  return { ...failure, repeat: { pauseMs, timesMax: repeatsAskedMax } };
}

/** `Retry-After` in ms: seconds, or a date (RFC 9110 §10.2.3). Undefined for anything else. */
function retryAfter(headers: Headers, nowMs: number): number | undefined {
  const text = headers.get("Retry-After")?.trim() ?? "";
  if (/^\d+$/.test(text)) return Number(text) * 1000;
  const atMs = text.endsWith(" GMT") ? Date.parse(text) : Number.NaN;
  return Number.isNaN(atMs) ? undefined : Math.max(0, atMs - nowMs);
}

/**
 * Says how an answer is not the object asked for, by its name: a cache or a proxy in between that
 * mixes answers up would give a pod the networks of another one.
 */
function mismatchOf(call: ApiRequest, value: Record<string, unknown>): string | undefined {
  const { name, namespace } = describe(call);
  if (call.method !== "GET" || name === undefined) return undefined;
  const { metadata } = value;
  const { name: ownName, namespace: ownNamespace } = isObject(metadata) ? metadata : {};
  if (typeof ownName !== "string") return "the answer is no object of the API";
  if (ownName === name && (ownNamespace ?? namespace) === namespace) return undefined;
  const label = typeof ownNamespace === "string" ? `${ownNamespace}/${ownName}` : ownName;
  return `the answer is another object, ${oneLine(label, 300)}`;
}

/** JSON of a server we trust, so without the checks of `parseJson`; undefined when it is none. */
export function readJson(body: string): unknown {
  try {
    return JSON.parse(body);
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError) return undefined;
    throw error;
  }
}

/** Why a request got no response. @throws CniError as it is: it says why already */
function connectionFailure(session: Session, call: ApiRequest, error: unknown): Failure {
  const { host, settings, account } = session;
  if (error instanceof CniError) throw error;
  if (host.signal.aborted) return { reason: "we were asked to end" };
  const { name, code: reason = name } = error as { name: string; code?: unknown };
  const { timeoutMs = settings.timeoutMs } = call;
  if (name === "TimeoutError") return { reason: `no answer within ${timeoutMs} ms` };
  if (/CERT|VERIFY|ISSUER/.test(String(reason))) {
    const none = ', no CA is named: set "certificate-authority", or k8s_certificate_authority';
    const hint = account.ca ? "" : none;
    const what = "the server's certificate is not valid for our CA or its name";
    return { reason: `${what} (${reason})${hint}` };
  }
  // Bun reports this when it cannot use what `tls` holds.
  const damaged = reason === "FailedToOpenSocket" ? ", is a certificate or key damaged?" : "";
  const proxy = ["HTTPS_PROXY", "https_proxy"].find((variable) => host.env[variable]);
  const hint = proxy === undefined ? damaged : `${damaged}, ${proxy} is set`;
  const failure = { reason: `the connection failed (${reason}${hint})` };
  return call.method === "POST" ? failure : { ...failure, repeat: repeatOnce };
}

/** The error of a request without a usable answer, code 11. */
function failed({ server, credential }: Origin, call: ApiRequest, failure: Failure): CniError {
  const { reason, status, details = "" } = failure;
  const { verb, target } = describe(call);
  const message = `Cannot ${verb} ${target} at ${server}: ${reason} (credentials: ${credential})`;
  return new CniError(code.tryAgainLater, message, { details, cause: { status, reason } });
}

/**
 * A request in the words of RBAC: verb `get`, resource `pods`, target `pods ns/name`. `name` is
 * undefined for a list, and for what is behind a proxy.
 */
function describe({ method, path, query }: ApiRequest) {
  const inGroup = path[0] === "apis";
  const rest = path.slice(inGroup ? 3 : 2);
  const namespace = rest[0] === "namespaces" && rest.length > 2 ? rest[1] : undefined;
  const [type = path.join("/"), name, subresource] = namespace === undefined ? rest : rest.slice(2);
  const read = query?.["watch"] ? "watch" : name === undefined ? "list" : "get";
  const resource = [type + (inGroup ? `.${path[1]}` : ""), subresource].filter(Boolean).join("/");
  const label = [namespace, name].filter((one) => one !== undefined).join("/");
  return {
    verb: { GET: read, PATCH: "patch", POST: "create" }[method],
    resource,
    target: oneLine(`${resource} ${label}`, 300),
    name: subresource === "proxy" ? undefined : name,
    namespace,
  };
}
