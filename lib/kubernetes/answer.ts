/**
 * One call of the Kubernetes API in words: what it was to do, what the answer means, and the error
 * that its caller gets. Pure.
 */
import { CniError, code } from "../cni.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";

/** Parameters of a list or watch. */
export type Query = Readonly<Record<string, string>>;

/** What an error names: the server, and the files with the right to ask it. */
export interface Origin {
  server: string;
  credential: string;
}

/** Pause before the repetition where the server names none, and the shortest one. */
export const pauseMsDefault = 100;
/** Repetitions of a call: by ourselves, and where the server says when (as client-go). */
export const repeatsMax = { own: 1, told: 10 };

/** One request. */
export interface Call {
  method: "GET" | "PATCH" | "POST";
  path: readonly string[];
  /** Of a list or watch. */
  query?: Query;
  body?: unknown;
  /** Largest answer read, where that is not what every call may have. */
  bytesMax?: number;
  /** What it may take, where that is not what every call may. */
  timeoutMs?: number;
}
/** Why an attempt has no answer; `repeat` is set when it may be made again, after a pause. */
export interface Failure {
  reason: string;
  status?: number;
  details?: string;
  repeat?: { pauseMs: number; by: keyof typeof repeatsMax };
}

/** The HTTP status behind an error of this module; undefined when there was no answer. */
export function statusOf(error: unknown): number | undefined {
  const cause = error instanceof CniError ? error.cause : undefined;
  return isObject(cause) && typeof cause["status"] === "number" ? cause["status"] : undefined;
}

/** Why there is no answer, without what was asked of whom; the message of any other error. */
export function reasonOf(error: CniError): string {
  const { reason } = isObject(error.cause) ? error.cause : {};
  return typeof reason === "string" ? reason : error.message;
}

/** An answer, read. */
export interface Answer {
  status: number;
  headers: Headers;
  /** Undefined when it was longer than `bytesMax`. */
  body: string | undefined;
  bytesMax: number;
}

/** What an answer means: the object, or why there is none. */
export function judge(
  call: Call,
  { status, headers, body, bytesMax }: Answer,
  now: () => number,
): { value: unknown } | Failure {
  if (body === undefined) {
    return { status, reason: `the answer is larger than ${bytesMax} bytes` };
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
  const told = status === 429 || status >= 500 ? pauseTold(headers, now()) : undefined;
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

/** The error of a call without a usable answer, code 11. */
export function failed(
  { server, credential }: Origin,
  call: Call,
  { reason, status, details }: Failure,
): CniError {
  const { verb, target } = describe(call);
  return new CniError(
    code.tryAgainLater,
    `Cannot ${verb} ${target} at ${server}: ${reason} (credentials: ${credential})`,
    { ...(details && { details }), cause: { ...(status && { status }), reason } },
  );
}

/** A call in the words of RBAC: `get`, `pods`, `pods ns/name`. */
interface Described {
  verb: string;
  resource: string;
  target: string;
  /** Of one object; undefined for a list, and for what is behind a proxy. */
  name: string | undefined;
  namespace: string | undefined;
}

function describe({ method, path, query }: Call): Described {
  const inGroup = path[0] === "apis";
  const rest = path.slice(inGroup ? 3 : 2);
  const namespace = rest[0] === "namespaces" && rest.length > 2 ? rest[1] : undefined;
  const [type = path.join("/"), name, part] = namespace === undefined ? rest : rest.slice(2);
  const isWatch = query?.["watch"] !== undefined;
  const read = isWatch ? "watch" : name === undefined ? "list" : "get";
  const resource = [type + (inGroup ? `.${path[1]}` : ""), part].filter(Boolean).join("/");
  const place = [namespace, name].filter((one) => one !== undefined).join("/");
  return {
    verb: { GET: read, PATCH: "patch", POST: "create" }[method],
    resource,
    target: oneLine(`${resource} ${place}`, 300),
    name: part === "proxy" ? undefined : name,
    namespace,
  };
}
