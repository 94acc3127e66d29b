/**
 * Kubernetes: credentials, and requests to the API server. The only module that talks to it.
 *
 * Credentials come from the first of: a kubeconfig file, the API root in a network config, the
 * service account of the pod we run in; CNI-Genie's `k8s_*` keys override parts of them. Files are
 * read again for each request: tokens and certificates rotate (Multus #852, #1263, #1414).
 *
 * Requests go through Bun's `fetch` with the cluster's CA. client-node loses the CA on Bun and
 * takes 20 ms to load, so only `exec` and `auth-provider` users load it. TLS is always verified,
 * whatever the environment says. HTTPS_PROXY and NO_PROXY count, as for every Kubernetes client.
 * No usable answer is code 11: the runtime tries again.
 * Source: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
 */
import { readFileSync, statSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import * as v from "valibot";
import { CniError, code, type Host, isObject, oneLine } from "./cni.ts";

/** Where credentials may come from. The optional strings may be "", which is the same as absent. */
export interface KubeSettings {
  /** Path of a kubeconfig file. */
  kubeconfig?: string;
  /** True when someone named that file: then it must exist. */
  kubeconfigIsExplicit: boolean;
  /** CNI-Genie's `k8s_api_root`: URL of the server; what follows `/api/` is dropped. */
  apiRoot?: string;
  /** CNI-Genie's `k8s_auth_token`: the secret itself. */
  authToken?: string;
  /** CNI-Genie's paths of PEM files: `k8s_client_certificate`, `k8s_client_key`, ... */
  clientCertificate?: string;
  clientKey?: string;
  certificateAuthority?: string;
  /** Limit of one call, its repetition included, in milliseconds. */
  timeoutMs: number;
  /** Folder of `token` and `ca.crt`; absent: where Kubernetes mounts them. */
  serviceAccountDir?: string;
}

/** Secrets in memory just long enough for one request. */
interface Secrets {
  headers: Record<string, string>;
  tls: { ca?: string; cert?: string; key?: string; serverName?: string };
}
/** Where a server is; the functions read what is needed to ask it. */
interface Account {
  server: string;
  credential: string;
  serverName?: string | null | undefined;
  ca?: Read;
  cert?: Read;
  key?: Read;
  token?: Read;
  /** Runs `exec` or `auth-provider`. */
  plugin?: () => Promise<Secrets>;
}
type Read = (() => string) | undefined;

const serviceAccountDirDefault = "/var/run/secrets/kubernetes.io/serviceaccount";

/**
 * True when {@link connect} would find credentials; reads no file. A kubeconfig that someone named
 * and that is missing counts, so that `connect` can say so.
 */
export function isConfigured(host: Host, settings: KubeSettings): boolean {
  return sourceOf(host, settings) !== undefined;
}

function sourceOf(host: Host, settings: KubeSettings): "kubeconfig" | "root" | "pod" | undefined {
  const { kubeconfig, serviceAccountDir: folder = serviceAccountDirDefault } = settings;
  if (kubeconfig && (settings.kubeconfigIsExplicit || exists(kubeconfig))) return "kubeconfig";
  if (settings.apiRoot) return "root";
  const inPod = Boolean(host.env["KUBERNETES_SERVICE_HOST"]) && exists(join(folder, "token"));
  return inPod ? "pod" : undefined;
}

/** False only for a file that is surely not there; one we may not look at is an error later. */
function exists(file: string): boolean {
  try {
    return statSync(file, { throwIfNoEntry: false }) !== undefined;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== "ENOTDIR";
  }
}

function findAccount(host: Host, settings: KubeSettings): Account {
  const { kubeconfig = "", serviceAccountDir: folder = serviceAccountDirDefault } = settings;
  const source = sourceOf(host, settings);
  if (source === "kubeconfig") return readKubeconfig(kubeconfig);
  if (source === "root") return { server: "", credential: "" };
  const token = join(folder, "token");
  if (source === undefined) {
    const looked = kubeconfig === "" ? token : `${kubeconfig} and ${token}`;
    throw new CniError(code.invalidConfig, `Missing Kubernetes credentials: looked for ${looked}`);
  }
  const name = host.env["KUBERNETES_SERVICE_HOST"] ?? "";
  const port = host.env["KUBERNETES_SERVICE_PORT"] || "443";
  return {
    server: `https://${name.includes(":") ? `[${name}]` : name}:${port}`,
    credential: token,
    ca: fromFile(join(folder, "ca.crt")),
    token: fromFile(token),
  };
}

/** CNI-Genie's own keys win over the kubeconfig, one by one, as in its client.go. */
function override(account: Account, settings: KubeSettings): Account {
  const { apiRoot, authToken, clientCertificate, clientKey, certificateAuthority } = settings;
  const named = [authToken && "k8s_auth_token", clientCertificate, account.credential];
  const credential = named.filter(Boolean).join(", ") || "none";
  const server = apiRoot ? (apiRoot.split("/api/")[0] ?? "") : account.server;
  return {
    ...account,
    server: checkServer(server, credential),
    credential,
    ...(authToken && { token: () => authToken }),
    ...(clientCertificate && { cert: fromFile(clientCertificate) }),
    ...(clientKey && { key: fromFile(clientKey) }),
    ...(certificateAuthority && { ca: fromFile(certificateAuthority) }),
  };
}

/** The URL of a server, fit for print. Plain http stays on this machine: it shows the token. */
function checkServer(server: string, credential: string): string {
  const url = URL.parse(server);
  if (url === null) throw invalid(credential, "the server is not a URL");
  const isLocal = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);
  if (url.protocol === "https:" || (url.protocol === "http:" && isLocal)) {
    return url.origin + url.pathname.replace(/\/+$/, "");
  }
  throw invalid(credential, `the server "${url.protocol}//${url.host}" must be an https URL`);
}

const text = v.nullish(v.string());
const Context = v.looseObject({ cluster: v.string(), user: text });
const Cluster = v.looseObject({
  server: v.string(),
  "certificate-authority": text,
  "certificate-authority-data": text,
  "tls-server-name": text,
});
const Exec = v.looseObject({
  command: v.string(),
  apiVersion: text,
  env: v.nullish(v.array(v.looseObject({ name: v.string(), value: v.string() }))),
});
const User = v.looseObject({
  token: text,
  tokenFile: text,
  "client-certificate": text,
  "client-certificate-data": text,
  "client-key": text,
  "client-key-data": text,
  exec: v.nullish(Exec),
  "auth-provider": v.nullish(v.looseObject({ name: v.string() })),
});
/** Keys that change what a request means or who sends it: to ignore them would be wrong. */
const refusedKeys = ["insecure-skip-tls-verify", "proxy-url", "as", "as-uid", "username"];

function readKubeconfig(file: string): Account {
  const root = parseKubeconfig(file);
  const context = entry(file, root, "context", root["current-context"], Context);
  const cluster = entry(file, root, "cluster", context.cluster, Cluster);
  const user = context.user ? entry(file, root, "user", context.user, User) : {};
  const refused = refusedKeys.find((key) => cluster[key] || (user as typeof cluster)[key]);
  if (refused) throw invalid(file, `"${refused}" is not supported`);
  return accountOf(file, cluster, user);
}

function accountOf(
  file: string,
  cluster: v.InferOutput<typeof Cluster>,
  user: v.InferOutput<typeof User>,
): Account {
  const folder = dirname(resolve(file));
  const pem = (data: string | null | undefined, path: string | null | undefined): Read => {
    if (data) return () => Buffer.from(data, "base64").toString("utf8");
    return path ? fromFile(resolve(folder, path)) : undefined;
  };
  const { token, tokenFile, exec, "auth-provider": provider } = user;
  const tokenPath = tokenFile ? resolve(folder, tokenFile) : "";
  // The file wins; the token beside it serves while there is no file (client-go).
  const useFile = () => tokenPath !== "" && (!token || exists(tokenPath));
  return {
    server: cluster.server,
    credential: tokenPath === "" ? file : `${file}, ${tokenPath}`,
    serverName: cluster["tls-server-name"],
    ca: pem(cluster["certificate-authority-data"], cluster["certificate-authority"]),
    cert: pem(user["client-certificate-data"], user["client-certificate"]),
    key: pem(user["client-key-data"], user["client-key"]),
    ...((token || tokenPath) && { token: () => (useFile() ? readText(tokenPath) : (token ?? "")) }),
    ...((exec || provider) && { plugin: () => askPlugin(file, cluster.server, user) }),
  };
}

function parseKubeconfig(file: string): Record<string, unknown> {
  const source = readText(file);
  let root: unknown;
  try {
    root = source.trimStart().startsWith("{") ? JSON.parse(source) : Bun.YAML.parse(source);
  } catch (error) {
    // Not the parser's words: they may quote a token.
    throw invalid(file, `it is neither YAML nor JSON (${error instanceof Error && error.name})`);
  }
  if (isObject(root)) return root;
  throw invalid(file, "it does not hold an object");
}

/** The entry of a list that is in use; the others may be anything. */
function entry<const S extends v.GenericSchema>(
  file: string,
  root: Record<string, unknown>,
  kind: "context" | "cluster" | "user",
  name: unknown,
  schema: S,
): v.InferOutput<S> {
  if (typeof name !== "string" || name === "") throw invalid(file, "it has no current-context");
  const list: unknown = root[`${kind}s`];
  const found = (Array.isArray(list) ? list : []).find(
    (one) => isObject(one) && one["name"] === name,
  );
  const label = `${kind} "${oneLine(name, 100)}"`;
  if (found === undefined) throw invalid(file, `it has no ${label}`);
  const parsed = v.safeParse(schema, found[kind] ?? {});
  if (parsed.success) return parsed.output;
  throw invalid(file, `${label}: ${issueText(parsed.issues[0])}`);
}

/** Not valibot's own message: it quotes what was received, which may be a secret. */
function issueText(issue: v.BaseIssue<unknown>): string {
  return `expected ${issue.expected} at "${v.getDotPath(issue) ?? ""}"`;
}

function invalid(file: string, reason: string): CniError {
  return new CniError(code.invalidConfig, `Invalid Kubernetes credentials in ${file}: ${reason}`);
}

function fromFile(file: string): () => string {
  return () => readText(file);
}

function readText(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch (error) {
    const { code: reason = "" } = error as NodeJS.ErrnoException;
    const why = { ENOENT: "it does not exist", EACCES: "permission denied" }[reason] ?? reason;
    throw new CniError(code.ioFailure, `Cannot read Kubernetes credentials ${file}: ${why}`);
  }
}

/** Runs `exec` or `auth-provider` through client-node. */
async function askPlugin(
  file: string,
  server: string,
  { exec, "auth-provider": authProvider }: v.InferOutput<typeof User>,
): Promise<Secrets> {
  const { KubeConfig } = await import("@kubernetes/client-node");
  const config = new KubeConfig();
  // As client-go: a command with a slash is relative to the kubeconfig; it is told its API version.
  const command = exec?.command.includes("/")
    ? resolve(dirname(file), exec.command)
    : exec?.command;
  const info = {
    apiVersion: exec?.apiVersion,
    kind: "ExecCredential",
    spec: { interactive: false },
  };
  const env = [{ name: "KUBERNETES_EXEC_INFO", value: JSON.stringify(info) }, ...(exec?.env ?? [])];
  config.loadFromClusterAndUser(
    { name: "cluster", server, skipTLSVerify: false },
    { name: "user", authProvider, exec: exec && { ...exec, command, env } },
  );
  const options: { headers?: Record<string, unknown>; cert?: unknown; key?: unknown } = {};
  try {
    await config.applyToHTTPSOptions(options);
  } catch (error) {
    const name = exec ? `exec ${exec.command}` : `auth-provider ${authProvider?.name}`;
    // client-node trips over a bad answer; a SyntaxError quotes it, and it may be the secret.
    const isBad = error instanceof SyntaxError || error instanceof TypeError;
    const why = isBad ? "its answer is no credential" : oneLine((error as Error).message, 200);
    const msg = `Cannot get Kubernetes credentials by ${name} of ${file}: ${why}`;
    throw new CniError(code.tryAgainLater, msg);
  }
  const { headers: { Authorization: authorization } = {}, cert, key } = options;
  return {
    headers: authorization ? { Authorization: String(authorization) } : {},
    tls: { ...(cert ? { cert: String(cert) } : {}), ...(key ? { key: String(key) } : {}) },
  };
}

async function readSecrets({ credential, ...account }: Account): Promise<Secrets> {
  const asked = await account.plugin?.();
  const tls: Secrets["tls"] = account.serverName ? { serverName: account.serverName } : {};
  for (const name of ["ca", "cert", "key"] as const) {
    const pem = asked?.tls[name] ?? account[name]?.();
    if (pem === undefined) continue;
    if (!pem.includes("-----BEGIN ")) throw invalid(credential, `its ${name} is not PEM`);
    tls[name] = pem;
  }
  if ((tls.cert === undefined) !== (tls.key === undefined)) {
    throw invalid(credential, "a client certificate and its key come together");
  }
  const token = account.token?.().trim();
  if (token === undefined) return { headers: asked?.headers ?? {}, tls };
  if (!/^[\x21-\x7e]+$/.test(token)) throw invalid(credential, "its token is empty or malformed");
  return { headers: { Authorization: `Bearer ${token}` }, tls };
}

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
      const call: Call = {
        method: "GET",
        path: ["api", "v1", "namespaces", namespace, "pods", name],
      };
      const pod = v.safeParse(Pod, await send(session, call));
      if (pod.success) return pod.output;
      throw failed(session, call, { reason: `the answer is no pod: ${issueText(pod.issues[0])}` });
    },
  };
}

/** Largest answer read, in bytes; an object in etcd has at most 1.5 MiB. */
const answerBytesMax = 8 * 1024 * 1024;
/** Pause before the repetition where the server names none. */
const pauseMsDefault = 100;

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
/** Why an attempt has no answer; `pauseMs` is set when it may be repeated. */
interface Failure {
  reason: string;
  status?: number;
  details?: string;
  pauseMs?: number;
}

/** One call: at most two attempts within one deadline. */
async function send(session: Session, call: Call): Promise<unknown> {
  const { account, host, timeoutMs } = session;
  const url = [account.server, ...call.path.map(segment)].join("/");
  const deadline = performance.now() + timeoutMs;
  const signal = AbortSignal.any([host.signal, AbortSignal.timeout(timeoutMs)]);
  let answer = await attempt(session, call, url, signal);
  const pauseMs = "pauseMs" in answer ? (answer.pauseMs ?? Infinity) : Infinity;
  if (performance.now() + pauseMs < deadline) {
    // When the pause is cut short the attempt fails at once, and says why.
    await Promise.race([Bun.sleep(pauseMs), ended(signal)]);
    answer = await attempt(session, call, url, signal);
  }
  if ("value" in answer) return answer.value;
  throw failed(session, call, answer);
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
      signal,
      // Said aloud, because NODE_TLS_REJECT_UNAUTHORIZED=0 would switch it off.
      tls: { ...tls, rejectUnauthorized: true },
    });
    body = await readBody(response);
  } catch (error) {
    return connectionFailure(session, call, error);
  }
  return judge(call, response, body);
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
  call: Call,
  { status, headers }: Response,
  body: string | undefined,
): { value: unknown } | Failure {
  if (body === undefined) {
    return { status, reason: `the answer is larger than ${answerBytesMax} bytes` };
  }
  if (status >= 300 && status < 400) return { status, reason: `${status}, a redirect, is refused` };
  const value = readJson(body);
  if (status < 300) {
    return isObject(value) ? { value } : { status, reason: "the answer is not a JSON object" };
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
  const pauseMs = Number(headers.get("Retry-After") ?? Number.NaN) * 1000;
  return {
    status,
    reason: meaning[status] ?? `status ${status}`,
    details: oneLine(said, 1000),
    ...((status === 429 || status >= 500) && { pauseMs: pauseMs >= 0 ? pauseMs : pauseMsDefault }),
  };
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
    ...(call.method !== "POST" && { pauseMs: pauseMsDefault }),
  };
}

function failed({ account }: Session, call: Call, { reason, status, details }: Failure): CniError {
  const { verb, target } = describe(call);
  return new CniError(
    code.tryAgainLater,
    `Cannot ${verb} ${target} at ${account.server}: ${reason} (credentials: ${account.credential})`,
    { ...(details && { details }), ...(status && { cause: { status } }) },
  );
}

/** What a call does in the words of RBAC, and to what: `get`, `pods`, `pods ns/name`. */
function describe({ method, path }: Call): { verb: string; resource: string; target: string } {
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
  };
}
