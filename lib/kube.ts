/**
 * Requests to the Kubernetes API server, through Bun's `fetch` with the cluster's CA: client-node
 * loses the CA on Bun. TLS is always verified, whatever the environment says. HTTPS_PROXY and
 * NO_PROXY count, as for every Kubernetes client. No usable answer is code 11: the runtime tries
 * again.
 */
import * as v from "valibot";
import { CniError, code, type Host } from "./cni.ts";
import type { KubeSettings } from "./credentials.ts";
import { isObject } from "./json.ts";
import {
  type Account,
  findAccount,
  issueText,
  override,
  readSecrets,
  type Secrets,
} from "./kubeconfig.ts";
import { oneLine } from "./text.ts";

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
  /** Reads an object or a list. @throws CniError 11, see {@link isNotFound} */
  get(path: readonly string[]): Promise<unknown>;
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

/** True when the server answered that there is no such object. */
export function isNotFound(error: unknown): boolean {
  return statusOf(error) === 404;
}

/** True when the server refused a change because the object is another one by now. */
export function isConflict(error: unknown): boolean {
  return statusOf(error) === 409;
}

/** The HTTP status behind an error of this module; undefined when there was no answer. */
export function statusOf(error: unknown): number | undefined {
  const cause = error instanceof CniError ? error.cause : undefined;
  return isObject(cause) && typeof cause["status"] === "number" ? cause["status"] : undefined;
}

/**
 * Finds the credentials; sends nothing.
 *
 * @throws CniError 7 when there are none, or for a kubeconfig that is malformed or asks for what we
 *   refuse (TLS without verification, a proxy, impersonation); 5 for a file that cannot be read
 */
export async function connect(host: Host, settings: KubeSettings): Promise<Kube> {
  const account = override(findAccount(host, settings), settings);
  const session: Session = { host, account, timeoutMs: settings.timeoutMs, requests: 0 };
  return {
    server: account.server,
    credential: account.credential,
    get requests() {
      return session.requests;
    },
    get: (path) => send(session, { method: "GET", path }),
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

/** What an error names: the server, and the files with the right to ask it. */
type Origin = Pick<Kube, "server" | "credential">;

/** Largest answer read, in bytes; an object in etcd has at most 1.5 MiB. */
const answerBytesMax = 8 * 1024 * 1024;
/** Pause before the repetition where the server names none, and the shortest one. */
const pauseMsDefault = 100;
/** Repetitions of a call: by ourselves, and where the server says when (as client-go). */
const repeatsMax = { own: 1, told: 10 };

interface Session {
  host: Host;
  account: Account;
  timeoutMs: number;
  requests: number;
}
interface Call {
  method: "GET" | "PATCH" | "POST";
  path: readonly string[];
  body?: unknown;
}
/** Why an attempt has no answer; `repeat` is set when it may be made again, after a pause. */
interface Failure {
  reason: string;
  status?: number;
  details?: string;
  repeat?: { pauseMs: number; by: keyof typeof repeatsMax };
}

/**
 * One call within one deadline. A server that is too busy says when to come back, and knows: to
 * come back costs less than to fail the pod, which the kubelet then makes anew.
 */
async function send(session: Session, call: Call): Promise<unknown> {
  const { account, host, timeoutMs } = session;
  const url = [account.server, ...call.path.map(segment)].join("/");
  const deadline = performance.now() + timeoutMs;
  const signal = AbortSignal.any([host.signal, AbortSignal.timeout(timeoutMs)]);
  for (let repeats = 0; ; repeats++) {
    const answer = await attempt(session, call, url, signal);
    if ("value" in answer) return answer.value;
    const { pauseMs, by } = answer.repeat ?? { pauseMs: Number.POSITIVE_INFINITY, by: "own" };
    if (repeats >= repeatsMax[by] || performance.now() + pauseMs >= deadline) {
      throw failed(account, call, answer);
    }
    // When the pause is cut short the attempt fails at once, and says why.
    await Promise.race([Bun.sleep(pauseMs), ended(signal)]);
  }
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
  const kind = call.method === "PATCH" ? "application/merge-patch+json" : "application/json";
  const sent = call.body === undefined ? {} : { body: JSON.stringify(call.body) };
  let response: Response;
  let body: string | undefined;
  try {
    const { headers, tls } = await readSecretsWithin(session.account, signal);
    session.requests++;
    response = await fetch(url, {
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
    body = await readBody(response);
  } catch (error) {
    return connectionFailure(session, call, error);
  }
  return judge(session, call, response, body);
}

/** An `exec` plugin may hang: it is left behind then. */
function readSecretsWithin(account: Account, signal: AbortSignal): Promise<Secrets> {
  const secrets = readSecrets(account);
  if (account.plugin === undefined) return secrets;
  return Promise.race([secrets, ended(signal).then(() => Promise.reject(signal.reason))]);
}

/** The body, or undefined when it is larger than allowed; what is left of it is dropped then. */
async function readBody(response: Response): Promise<string | undefined> {
  if (response.body === null) return "";
  const chunks: Uint8Array[] = [];
  let total = 0;
  for await (const chunk of response.body) {
    total += chunk.length;
    if (total > answerBytesMax) return undefined;
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

function judge(
  { host }: Session,
  call: Call,
  { status, headers }: Response,
  body: string | undefined,
): { value: unknown } | Failure {
  if (body === undefined) {
    return { status, reason: `the answer is larger than ${answerBytesMax} bytes` };
  }
  if (status >= 300 && status < 400) return { status, reason: `${status}, a redirect, is refused` };
  const value = readJson(body);
  if (status >= 200 && status < 300) {
    if (!isObject(value)) return { status, reason: "the answer is not a JSON object" };
    const other = otherObject(call, value);
    return other === undefined ? { value } : { status, reason: other };
  }
  const said = isObject(value) && typeof value["message"] === "string" ? value["message"] : "";
  const { verb, resource } = describe(call);
  const meaning: Record<number, string> = {
    401: "401 Unauthorized, the server does not accept these credentials",
    403: `403 Forbidden, grant these credentials the verb "${verb}" on "${resource}"`,
    404: "404, it does not exist",
    409: "409 Conflict, it exists already or has changed",
    429: "429, the server is too busy",
  };
  const told = status === 429 || status >= 500 ? pauseTold(headers, host.now()) : undefined;
  const wait = told ? `, it says to come back in ${Math.ceil(told / 1000)} s` : "";
  return {
    status,
    reason: (meaning[status] ?? `status ${status}`) + wait,
    details: oneLine(said, 1000),
    ...((status === 429 || status >= 500) && {
      repeat:
        told === undefined
          ? { pauseMs: pauseMsDefault, by: "own" }
          : { pauseMs: Math.max(told, pauseMsDefault), by: "told" },
    }),
  };
}

/** `Retry-After` in ms: seconds, or a date (RFC 9110 §10.2.3). Undefined for anything else. */
function pauseTold(headers: Headers, nowMs: number): number | undefined {
  const text = headers.get("Retry-After")?.trim() ?? "";
  if (/^\d+$/.test(text)) return Number(text) * 1000;
  const atMs = text.endsWith(" GMT") ? Date.parse(text) : Number.NaN;
  return Number.isNaN(atMs) ? undefined : Math.max(0, atMs - nowMs);
}

/**
 * What is wrong with an answer that is not the object asked for, by its name: a cache or a proxy in
 * between that mixes answers up would give a pod the networks of another one.
 */
function otherObject(call: Call, value: Record<string, unknown>): string | undefined {
  const { name, namespace } = describe(call);
  if (call.method !== "GET" || name === undefined) return undefined;
  const { name: own, namespace: place } = isObject(value["metadata"]) ? value["metadata"] : {};
  if (typeof own !== "string") return "the answer is no object of the API";
  if (own === name && (place ?? namespace) === namespace) return undefined;
  const label = typeof place === "string" ? `${place}/${own}` : own;
  return `the answer is another object, ${oneLine(label, 300)}`;
}

/** JSON of a server we trust, so without the checks of `parseJson`; undefined when it is none. */
function readJson(body: string): unknown {
  try {
    return JSON.parse(body);
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError) return undefined;
    throw error;
  }
}

function connectionFailure({ host, timeoutMs }: Session, call: Call, error: unknown): Failure {
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

function failed(
  { server, credential }: Origin,
  call: Call,
  { reason, status, details }: Failure,
): CniError {
  const { verb, target } = describe(call);
  return new CniError(
    code.tryAgainLater,
    `Cannot ${verb} ${target} at ${server}: ${reason} (credentials: ${credential})`,
    { ...(details && { details }), ...(status && { cause: { status } }) },
  );
}

/** A call in the words of RBAC: `get`, `pods`, `pods ns/name`. */
interface Described {
  verb: string;
  resource: string;
  target: string;
  /** Of one object; undefined for a list. */
  name: string | undefined;
  namespace: string | undefined;
}

function describe({ method, path }: Call): Described {
  const inGroup = path[0] === "apis";
  const rest = path.slice(inGroup ? 3 : 2);
  const namespace = rest[0] === "namespaces" && rest.length > 2 ? rest[1] : undefined;
  const [type = path.join("/"), name, part] = namespace === undefined ? rest : rest.slice(2);
  const read = name === undefined ? "list" : "get";
  const resource = [type + (inGroup ? `.${path[1]}` : ""), part].filter(Boolean).join("/");
  const place = [namespace, name].filter((one) => one !== undefined).join("/");
  return {
    verb: { GET: read, PATCH: "patch", POST: "create" }[method],
    resource,
    target: oneLine(`${resource} ${place}`, 300),
    name,
    namespace,
  };
}
