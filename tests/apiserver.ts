/**
 * A Kubernetes API server for tests: TLS by a CA of its own, real paths, `Status` objects, bearer
 * token or client certificate, and faults on demand. `node:https` rather than `Bun.serve`, because
 * that shows the client certificate and lets a test break a connection.
 *
 * As a process: `bun tests/apiserver.ts --dir DIR [--delay MS] [--serve PATH ...]` prints
 * `{url, kubeconfig, dir}` and serves until it is killed. It starts with what `DIR/objects.json`
 * holds (path to object); later `POST /-/objects` with the same shape adds more (null removes).
 * `--serve` and `POST /-/serve` name collections that are known though empty,
 * `GET /-/requests` tells what was asked. Known collections are listed by pages and can be watched,
 * see tests/apiwatch.ts.
 */
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import type { IncomingMessage, ServerResponse } from "node:http";
import { createServer, type Server } from "node:https";
import type { AddressInfo } from "node:net";
import { join, resolve } from "node:path";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import type { TLSSocket } from "node:tls";
import { parseArgs } from "node:util";
import { isInside, makeWatchCache, type WatchCache, type Watches } from "./apiwatch.ts";
import { type Issuer, makeCertificate } from "./certificate.ts";

/** What may go wrong with one request. */
export type Fault =
  | { kind: "delay"; ms: number }
  | { kind: "hang" }
  | { kind: "reset" }
  /** Half of an answer, then the connection breaks. */
  | { kind: "half" }
  | { kind: "status"; status: number; retryAfter?: string }
  /** An endless-looking answer of `bytes`. */
  | { kind: "flood"; bytes: number }
  | { kind: "redirect"; location: string }
  /** Status 200 and this text. */
  | { kind: "garbage"; text: string }
  /**
   * These bytes of HTTP as they are, with pauses in ms between them. Then the connection is kept
   * open, closed by the rules of TLS, or dropped.
   */
  | {
      kind: "raw";
      parts: readonly (string | Uint8Array | number)[];
      ending: "keep" | "end" | "drop";
    };

/** A request as it arrived. */
export interface Seen {
  method: string;
  path: string;
  contentType: string;
  body: string;
  user: "token" | "certificate" | "nobody";
}

type Json = Record<string, unknown>;

/**
 * Ways to say who we are, each as a kubeconfig file; `wrongCa` trusts another authority, `caFile`
 * names the file of ours.
 */
export type Kind = "token" | "tokenFile" | "clientCertificate" | "exec" | "wrongCa" | "caFile";

/** A token as the API server signs it for a service account, valid from and to, in seconds. */
export function accountToken(
  account: string,
  [iat, exp]: readonly [number, number],
  more: Record<string, unknown> = {},
): string {
  const part = (value: object) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const claims = { sub: `system:serviceaccount:${account}`, iat, exp, "kubernetes.io": more };
  return `${part({ alg: "RS256" })}.${part(claims)}.c2lnbmF0dXJl${crypto.randomUUID().slice(0, 8)}`;
}

/** A running server. */
export interface ApiServer {
  url: string;
  /** Holds `ca.crt`, `ca2.crt`, `client.crt`, `client.key` and `token`. */
  dir: string;
  /** Accepted bearer token; a test may change it. */
  token: string;
  requests: Seen[];
  /** The next requests go wrong like this, one each; "none" lets one pass. */
  misbehave(...faults: (Fault | "none")[]): void;
  /** Forgets the faults that did not come to pass. */
  heal(): void;
  /** Serves on with a new certificate of its authority, or of a new one, which is in `ca.crt`. */
  rotate(what: "certificate" | "authority"): Promise<void>;
  /** Holds the answer to each request until it is done, where it is set. */
  gate?: (seen: Seen) => Promise<void>;
  /** What a SelfSubjectAccessReview says of these attributes, where it is set. */
  review?: (attributes: Record<string, string>) => boolean;
  /** The token that a TokenRequest for so many seconds gives, where it is set. */
  issue?: (account: string, seconds: number) => string;
  /** URL at which a port of a node or pod is reached; undefined where nobody is there. */
  proxy?: (name: string, port: string) => string | undefined;
  put(path: string, object: Json): void;
  object(path: string): Json | undefined;
  remove(path: string): void;
  /** Makes collections known: they can be empty, have pages, and be watched. */
  serve(...collections: string[]): void;
  /** Takes a collection away with its objects, as with its custom resource definition. */
  unserve(collection: string): void;
  watches: Watches;
  /** Writes a kubeconfig file into `dir` and returns its path. */
  kubeconfig(kind: Kind): string;
  stop(): Promise<void>;
}

/**
 * Starts a server on a free port; its keys live and die with `dir`. With `keepAlive` off each
 * request has a connection of its own, so that a fault hits the request that was meant.
 */
export async function startApiServer(
  dir: string,
  { delayMs = 0, keepAlive = true }: { delayMs?: number; keepAlive?: boolean } = {},
): Promise<ApiServer> {
  mkdirSync(dir, { recursive: true });
  makeKeys(dir, ["ca", "ca2", "server", "client"]);
  const objects = new Map<string, Json>();
  const cache = makeWatchCache();
  const served = new Set<string>();
  const faults: (Fault | "none")[] = [];
  const listener = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const seen = await see(request, api.token);
    if (seen.path.startsWith("/-/")) {
      answer(response, control(seen, api));
      return;
    }
    api.requests.push(seen);
    if (!keepAlive) response.setHeader("Connection", "close");
    if (delayMs > 0) await Bun.sleep(delayMs);
    await api.gate?.(seen);
    const fault = faults.shift() ?? "none";
    if (fault !== "none" && (await misbehave(response, fault))) return;
    const { pathname, searchParams } = new URL(seen.path, "https://localhost");
    if (isProxied(pathname) && seen.user !== "nobody") return relay(response, seen, api);
    const isKnown = served.has(pathname) && seen.user !== "nobody" && seen.method === "GET";
    if (isKnown && searchParams.has("watch")) cache.watch(pathname, searchParams, response);
    else if (isKnown) {
      const items = [...objects].filter(([key]) => isInside(key, pathname));
      answer(response, { status: 200, body: cache.list(pathname, items, searchParams) });
    } else answer(response, review(seen, api) ?? issue(seen, api) ?? serve(objects, seen, cache));
  };
  let server = await listen(dir, listener);
  const { port } = server.address() as AddressInfo;
  const api: ApiServer = {
    url: `https://127.0.0.1:${port}`,
    dir,
    token: `secret-${crypto.randomUUID()}`,
    requests: [],
    misbehave: (...more) => void faults.push(...more),
    heal: () => void faults.splice(0),
    rotate: async (what) => {
      await close(server);
      makeKeys(dir, what === "authority" ? ["ca", "server", "client"] : ["server"]);
      server = await listen(dir, listener, port);
    },
    put: (path, object) => {
      const isNew = !objects.has(path);
      const stored = withMeta(named(path, object));
      objects.set(path, stored);
      cache.changed(path, stored, isNew);
    },
    object: (path) => objects.get(path),
    remove: (path) => {
      const found = objects.get(path);
      objects.delete(path);
      if (found) cache.removed(path, found);
    },
    serve: (...collections) => {
      for (const one of collections) served.add(one);
    },
    unserve: (collection) => {
      served.delete(collection);
      for (const key of objects.keys()) if (isInside(key, collection)) objects.delete(key);
      cache.cut();
    },
    watches: cache,
    kubeconfig: (kind) => writeKubeconfig(api, kind),
    stop: () => {
      cache.stop();
      return close(server);
    },
  };
  writeFileSync(join(dir, "token"), `${api.token}\n`);
  return api;
}

/** Serves with the keys that lie in `dir` at this moment. */
async function listen(
  dir: string,
  listener: (request: IncomingMessage, response: ServerResponse) => void,
  port = 0,
): Promise<Server> {
  const read = (name: string): string => readFileSync(join(dir, name), "utf8");
  const tls = { cert: read("server.crt"), key: read("server.key"), ca: read("ca.crt") };
  const server = createServer({ ...tls, requestCert: true, rejectUnauthorized: false }, listener);
  await new Promise<void>((done) => server.listen(port, "127.0.0.1", done));
  return server;
}

async function close(server: Server): Promise<void> {
  server.closeAllConnections();
  await new Promise<void>((done) => server.close(() => done()));
}

type KeyName = "ca" | "ca2" | "server" | "client";

/**
 * A CA, a second one that signed nothing, a server and a client. The CAs come before what they
 * sign.
 */
function makeKeys(dir: string, names: readonly KeyName[]): void {
  const hosts = ["127.0.0.1", "localhost", "kubernetes.default.svc"];
  for (const name of names) {
    const isAuthority = name === "ca" || name === "ca2";
    const holder = { name, ...(name === "server" && { hosts }), isClient: name === "client" };
    const made = isAuthority ? makeCertificate(holder) : makeCertificate(holder, issuerIn(dir));
    writeFileSync(join(dir, `${name}.crt`), made.certificate);
    writeFileSync(join(dir, `${name}.key`), made.key, { mode: 0o600 });
  }
}

/** The CA of a server's folder, which signs certificates. */
export function issuerIn(dir: string): Issuer {
  return { name: "ca", key: readFileSync(join(dir, "ca.key"), "utf8") };
}

async function see(request: IncomingMessage, token: string): Promise<Seen> {
  const chunks: Buffer[] = [];
  for await (const chunk of request) chunks.push(Buffer.from(chunk));
  const { authorization } = request.headers;
  const isCertified = (request.socket as TLSSocket).authorized;
  return {
    method: request.method ?? "",
    path: request.url ?? "",
    contentType: request.headers["content-type"] ?? "",
    body: Buffer.concat(chunks).toString(),
    user: authorization === `Bearer ${token}` ? "token" : isCertified ? "certificate" : "nobody",
  };
}

const proxied = /^\/api\/v1\/(?:nodes|namespaces\/[^/]+\/pods)\/([^/]+):(\d+)\/proxy(\/.*)$/;
const isProxied = (path: string): boolean => proxied.test(decodeURIComponent(path));

/** What a port of a node or pod answers, as the API server passes it on. */
async function relay(response: ServerResponse, seen: Seen, api: ApiServer): Promise<void> {
  const { pathname, search } = new URL(seen.path, "https://localhost");
  const [, name = "", port = "", path] = proxied.exec(decodeURIComponent(pathname)) ?? [];
  const failed = (why: string) =>
    answer(response, refusal(503, "ServiceUnavailable", `error trying to reach service: ${why}`));
  const base = api.proxy?.(name, port);
  if (base === undefined) return failed(`dial tcp: lookup ${name}: no such host`);
  // A node is asked with none of the headers by which the server knows who asks.
  const target = await fetch(`${base}${path}${search}`).catch((error: Error) => error);
  if (target instanceof Error) return failed("dial tcp: connect: connection refused");
  const again = target.headers.get("Retry-After");
  if (again !== null) response.setHeader("Retry-After", again);
  response.writeHead(target.status, { "Content-Type": target.headers.get("Content-Type") ?? "" });
  response.end(await target.text());
}

interface Answer {
  status: number;
  body: Json;
}

function answer(response: ServerResponse, { status, body }: Answer): void {
  const text = JSON.stringify(body);
  const length = Buffer.byteLength(text);
  response.writeHead(status, { "Content-Type": "application/json", "Content-Length": length });
  response.end(text);
}

/** A `Status` object, the way the API server says no. */
function refusal(status: number, reason: string, message: string): Answer {
  const body = { kind: "Status", apiVersion: "v1", status: "Failure", message, reason };
  return { status, body: { ...body, code: status } };
}

function serve(
  objects: Map<string, Json>,
  { method, path, body, user, contentType }: Seen,
  cache: WatchCache,
): Answer {
  if (user === "nobody") return refusal(401, "Unauthorized", "Unauthorized");
  // The status subresource is a part of the object.
  const key = decodeURI(path)
    .replace(/\?.*/, "")
    .replace(/\/status$/, "");
  const found = objects.get(key);
  // Programs in Go write in protobuf, which is taken and not read: enough for a bench of them.
  const isRead = contentType !== "application/vnd.kubernetes.protobuf";
  if (method === "POST" && !isRead) {
    return { status: 201, body: { kind: "Event", apiVersion: "v1", metadata: {} } };
  }
  if (method === "POST") {
    const created = create(objects, key, JSON.parse(body));
    const { name } = (created.body["metadata"] ?? {}) as Json;
    if (created.status === 201) cache.changed(`${key}/${name}`, created.body, true);
    return created;
  }
  if (method === "GET" && !found) {
    const items = [...objects].filter(([one]) => isInside(one, key)).map(([, one]) => one);
    if (items.length > 0) return { status: 200, body: { kind: "List", items } };
  }
  if (!found) return refusal(404, "NotFound", `${key} not found`);
  if (method === "GET") return { status: 200, body: found };
  if (method !== "PATCH" && method !== "PUT") return refusal(405, "MethodNotAllowed", method);
  if (method === "PATCH" && !patchTypes(key).includes(contentType)) {
    return refusal(415, "UnsupportedMediaType", contentType);
  }
  const patch: Json = isRead ? JSON.parse(body) : found;
  const wanted = Object.entries((patch["metadata"] ?? {}) as Json);
  const current = found["metadata"] as Json;
  const differs = wanted.some(
    ([name, value]) => ["uid", "resourceVersion"].includes(name) && value !== current[name],
  );
  if (differs) return refusal(409, "Conflict", "the object has been modified");
  const next = method === "PUT" ? patch : (merge(found, patch) as Json);
  const merged = withMeta(next, Number(current["resourceVersion"]) + 1);
  objects.set(key, merged);
  cache.changed(key, merged, false);
  return { status: 200, body: merged };
}

/**
 * Only types of Kubernetes itself know the strategic patch; on annotations, which is all that is
 * patched here, both do the same.
 */
function patchTypes(path: string): string[] {
  const types = ["application/merge-patch+json"];
  return path.startsWith("/api/v1/") ? [...types, "application/strategic-merge-patch+json"] : types;
}

/** May the one who asks do that? (authorization.k8s.io/v1) */
function review({ method, path, body, user }: Seen, api: ApiServer): Answer | undefined {
  const isReview = method === "POST" && path.endsWith("/selfsubjectaccessreviews");
  if (!isReview || user === "nobody" || api.review === undefined) return undefined;
  const asked = JSON.parse(body);
  const allowed = api.review(asked.spec.resourceAttributes);
  return { status: 201, body: { ...asked, metadata: {}, status: { allowed } } };
}

/** A token of a service account (authentication.k8s.io/v1 TokenRequest). */
function issue({ method, path, body, user }: Seen, api: ApiServer): Answer | undefined {
  const [, namespace, name] =
    /^\/api\/v1\/namespaces\/([^/]+)\/serviceaccounts\/([^/]+)\/token$/.exec(path) ?? [];
  if (method !== "POST" || name === undefined || user === "nobody") return undefined;
  if (!api.issue) return refusal(403, "Forbidden", "cannot create resource serviceaccounts/token");
  const asked = JSON.parse(body);
  const token = api.issue(`${namespace}:${name}`, asked.spec.expirationSeconds);
  return { status: 201, body: { ...asked, status: { token } } };
}

function create(objects: Map<string, Json>, collection: string, object: Json): Answer {
  const { name, generateName } = (object["metadata"] ?? {}) as Record<string, string | undefined>;
  const chosen = name ?? `${generateName ?? "unnamed-"}${objects.size}`;
  const path = `${collection}/${chosen}`;
  if (objects.has(path)) return refusal(409, "AlreadyExists", `${chosen} already exists`);
  const metadata = { ...(object["metadata"] as Json), name: chosen };
  const created = withMeta({ ...object, metadata });
  objects.set(path, created);
  return { status: 201, body: created };
}

/** RFC 7396. */
function merge(target: unknown, patch: unknown): unknown {
  if (typeof patch !== "object" || patch === null || Array.isArray(patch)) return patch;
  const isMap = typeof target === "object" && target !== null && !Array.isArray(target);
  const result: Json = isMap ? { ...target } : {};
  for (const [key, value] of Object.entries(patch)) {
    if (value === null) delete result[key];
    else result[key] = merge(result[key], value);
  }
  return result;
}

/** Gives an object the name and the namespace of its path, unless it says other ones. */
function named(path: string, object: Json): Json {
  const namespace = /\/namespaces\/([^/]+)\/[^/]+\/[^/]+$/.exec(path)?.[1];
  const own = { name: path.slice(path.lastIndexOf("/") + 1), ...(namespace && { namespace }) };
  return { ...object, metadata: { ...own, ...((object["metadata"] ?? {}) as Json) } };
}

function withMeta(object: Json, resourceVersion?: number): Json {
  const given = (object["metadata"] ?? {}) as Json;
  const version = String(resourceVersion ?? given["resourceVersion"] ?? 1);
  const uid = given["uid"] ?? crypto.randomUUID();
  return { ...object, metadata: { ...given, uid, resourceVersion: version } };
}

/** Does what the fault says; false when the request is to be served after all. */
async function misbehave(response: ServerResponse, fault: Fault): Promise<boolean> {
  const { socket } = response;
  switch (fault.kind) {
    case "delay":
      await Bun.sleep(fault.ms);
      return false;
    case "hang":
      return true;
    case "reset":
      socket?.destroy();
      return true;
    case "half":
      response.writeHead(200, { "Content-Length": "1000" });
      response.write('{"kind":"Pod",', () => socket?.destroy());
      return true;
    case "status": {
      if (fault.retryAfter !== undefined) response.setHeader("Retry-After", fault.retryAfter);
      answer(response, refusal(fault.status, "Fault", `as the test says: ${fault.status}`));
      return true;
    }
    case "flood": {
      const block = "x".repeat(1024 * 1024);
      const blocks = Array.from({ length: fault.bytes / block.length }, () => block);
      // The client hangs up in the middle: that is the point.
      await pipeline(Readable.from(blocks), response).catch(() => undefined);
      return true;
    }
    case "redirect":
      response.writeHead(302, { Location: fault.location }).end();
      return true;
    case "garbage":
      response.end(fault.text);
      return true;
    case "raw":
      for (const part of fault.parts) {
        if (typeof part === "number") await Bun.sleep(part);
        else await new Promise<void>((done) => socket?.write(part, () => done()));
      }
      if (fault.ending === "end") socket?.end();
      if (fault.ending === "drop") socket?.destroy();
      return true;
  }
}

/** For a bench in another process; no credentials, as the port is ours alone. */
function control({ method, path, body }: Seen, api: ApiServer): Answer {
  if (path === "/-/requests") return { status: 200, body: { requests: api.requests } };
  if (method === "POST" && path === "/-/serve") {
    api.serve(...(JSON.parse(body) as string[]));
    return { status: 200, body: {} };
  }
  if (method !== "POST" || path !== "/-/objects") return refusal(404, "NotFound", path);
  for (const [key, object] of Object.entries(JSON.parse(body))) {
    if (object === null) api.remove(key);
    else api.put(key, object as Json);
  }
  return { status: 200, body: {} };
}

function writeKubeconfig({ dir, url, token }: ApiServer, kind: Kind): string {
  const users: Record<Kind, Json> = {
    token: { token },
    wrongCa: { token },
    tokenFile: { tokenFile: "token" },
    caFile: { tokenFile: "token" },
    clientCertificate: { "client-certificate": "client.crt", "client-key": "client.key" },
    exec: { exec: { apiVersion: "client.authentication.k8s.io/v1", command: "./credential" } },
  };
  const credential = { kind: "ExecCredential", status: { token } };
  const script = `#!/bin/sh\ncat <<'END'\n${JSON.stringify(credential)}\nEND\n`;
  writeFileSync(join(dir, "credential"), script, { mode: 0o755 });
  const data = readFileSync(join(dir, kind === "wrongCa" ? "ca2.crt" : "ca.crt"), "base64");
  const authority =
    kind === "caFile" ? "certificate-authority: ca.crt" : `certificate-authority-data: ${data}`;
  const file = join(dir, `kubeconfig-${kind}`);
  const yaml = `# Written by tests/apiserver.ts
apiVersion: v1
kind: Config
current-context: test
contexts:
- name: test
  context: {cluster: test, user: ${kind}}
clusters:
- name: test
  cluster:
    server: ${url}
    ${authority}
users:
- name: ${kind}
  user: ${JSON.stringify(users[kind])}
`;
  writeFileSync(file, yaml, { mode: 0o600 });
  return file;
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: {
      dir: { type: "string" },
      delay: { type: "string", default: "0" },
      serve: { type: "string", multiple: true, default: [] },
    },
  });
  const dir = resolve(values.dir ?? ".");
  const server = await startApiServer(dir, { delayMs: Number(values.delay) });
  server.serve(...values.serve);
  const file = join(dir, "objects.json");
  const objects: Record<string, Json> = existsSync(file) ? await Bun.file(file).json() : {};
  for (const [path, object] of Object.entries(objects)) server.put(path, object);
  const line = { url: server.url, kubeconfig: server.kubeconfig("token"), dir };
  process.stdout.write(`${JSON.stringify(line)}\n`);
}
