/**
 * Kubernetes credentials: a kubeconfig file, the API root in a network config, or the service
 * account of the pod we run in; CNI-Genie's `k8s_*` keys override parts of them. Files are read
 * again for each request: tokens and certificates rotate (Multus #852, #1263, #1414). client-node
 * takes 20 ms to load, so only `exec` and `auth-provider` users load it.
 * Source: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
 */
import { readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import * as v from "valibot";
import { CniError, code, type Host } from "../cni.ts";
import { isObject } from "../json.ts";
import { oneLine } from "../text.ts";
import { exists, type KubeSettings, serviceAccountDirDefault, sourceOf } from "./credentials.ts";

/** Secrets in memory just long enough for one request. */
export interface Secrets {
  headers: Record<string, string>;
  tls: { ca?: string; cert?: string; key?: string; serverName?: string };
}
/** Where a server is; the functions read what is needed to ask it. */
export interface Account {
  server: string;
  credential: string;
  serverName?: string | null | undefined;
  ca?: Read;
  cert?: Read;
  key?: Read;
  token?: Read;
  /** Runs `exec`, with a variable more in its environment, or `auth-provider`. */
  plugin?: (mark?: Variable) => Promise<Secrets>;
}
/** One variable of an environment. */
export interface Variable {
  name: string;
  value: string;
}
type Read = (() => string) | undefined;

/** Finds the account to use, see {@link isConfigured}. @throws CniError 7 when there is none */
export function findAccount(host: Host, settings: KubeSettings): Account {
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
export function override(account: Account, settings: KubeSettings): Account {
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
    ...((exec || provider) && { plugin: (mark) => askPlugin(file, cluster.server, user, mark) }),
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
export function issueText(issue: v.BaseIssue<unknown>): string {
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
  mark?: Variable,
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
  const env = [
    { name: "KUBERNETES_EXEC_INFO", value: JSON.stringify(info) },
    ...(exec?.env ?? []),
    ...(mark ? [mark] : []),
  ];
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

/**
 * Reads what one request needs, afresh.
 *
 * @param mark goes into the environment of an `exec` plugin, to find it by
 * @throws CniError 5 or 7 for files that do not serve
 */
export async function readSecrets(
  { credential, ...account }: Account,
  mark?: Variable,
): Promise<Secrets> {
  const asked = await account.plugin?.(mark);
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
