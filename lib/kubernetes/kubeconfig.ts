/**
 * Kubernetes credentials: a kubeconfig, the API root in a network config, or the service account
 * of our pod; CNI-Genie's `k8s_*` keys override parts of them. Files are read again for each
 * request, because tokens and certificates rotate (Multus #852, #1263, #1414). client-node takes
 * 20 ms to load, so only `exec` and `auth-provider` load it.
 * Source: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
 */
import { readFileSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { rootCertificates } from "node:tls";
import * as v from "valibot";
import type { Host } from "../call.ts";
import { CniError, code, oneLine } from "../cni.ts";
import { isObject } from "../json.ts";
import { tokenVariable } from "../lock.ts";
import { exists, serviceAccountDirDefault, sourceOf } from "../settings.ts";
import type { KubeSettings } from "./objects_of_call.ts";

/** What one request needs; kept in memory no longer than that. */
export interface Secrets {
  headers: Record<string, string>;
  tls: { ca?: string; cert?: string; key?: string; serverName?: string };
}
/** A server and how to read the secrets for it. */
export interface Account extends Partial<Record<"ca" | "cert" | "key" | "token", Read>> {
  server: string;
  /** The files to name in errors. */
  credential: string;
  serverName?: string | null | undefined;
  /** What an operator should put right, though the account works. */
  warning?: string;
  /** Runs `exec`, whose environment then has our token, or `auth-provider`. */
  plugin?: (ownToken?: string) => Promise<Secrets>;
}
type Read = (() => string) | undefined;
type PemKey = "certificate-authority" | "client-certificate" | "client-key";
type PemEntry = { [K in PemKey | `${PemKey}-data`]?: string | null | undefined };

/**
 * Finds the account to use, see {@link isConfigured}. CNI-Genie's own keys win over the kubeconfig,
 * one by one, as in its client.go: with them the kubeconfig needs neither server nor user, and that
 * of its installer has neither. TLS is verified also where the kubeconfig says it should not be.
 * @throws CniError 7 when there is none or it is not valid, 5 for a file that cannot be read
 */
export function findAccount(host: Host, settings: KubeSettings): Account {
  const { apiRoot, authToken, clientCertificate, clientKey, certificateAuthority } = settings;
  const { file, cluster, user } = readSource(host, settings);
  const folder = dirname(resolve(file));
  const pem = (own: string | undefined, entry: PemEntry, key: PemKey): Read => {
    const data = entry[`${key}-data`];
    if (data && !own) return () => Buffer.from(data, "base64").toString("utf8");
    const pemFile = own || entry[key];
    return pemFile ? () => readText(resolve(folder, pemFile)) : undefined;
  };
  const tokenPath = user.tokenFile ? resolve(folder, user.tokenFile) : "";
  const sources = [authToken && "k8s_auth_token", clientCertificate, file, tokenPath];
  const credential = sources.filter(Boolean).join(", ") || "none";
  const token = authToken || user.token;
  // A token file wins; the token beside it is used while there is no file (client-go).
  const useFile = () => tokenPath !== "" && !authToken && (!token || exists(tokenPath));
  const hasPlugin = user.exec || user["auth-provider"];
  const server = checkServer(apiRoot, cluster, credential);
  const ownCa = pem(certificateAuthority, cluster, "certificate-authority");
  const isOff = Boolean(cluster[insecureKey]);
  const isOpen = isOff || (apiRoot !== undefined && !ownCa);
  return {
    server,
    credential,
    serverName: cluster["tls-server-name"],
    ca: ownCa,
    ...(isOpen && verifyAnyway(credential, isOff, ownCa, settings.nodeRoot)),
    cert: pem(clientCertificate, user, "client-certificate"),
    key: pem(clientKey, user, "client-key"),
    ...((token || tokenPath) && { token: () => (useFile() ? readText(tokenPath) : (token ?? "")) }),
    ...(hasPlugin && { plugin: (ownToken = "") => askPlugin({ file, cluster, user }, ownToken) }),
  };
}

/** What a source gives, as the entries of a kubeconfig; `file` is "" without one. */
type Source = { file: string; cluster: v.InferOutput<typeof Cluster>; user: User };

function readSource(host: Host, settings: KubeSettings): Source {
  const { kubeconfig = "", serviceAccountDir: folder = serviceAccountDirDefault } = settings;
  const source = sourceOf(host, settings);
  if (source === "kubeconfig") return readKubeconfig(kubeconfig);
  if (source === "root") return { file: "", cluster: {}, user: {} };
  const tokenFile = join(folder, "token");
  if (source === undefined) {
    const looked = kubeconfig === "" ? tokenFile : `${kubeconfig} and ${tokenFile}`;
    throw new CniError(code.invalidConfig, `Missing Kubernetes credentials: looked for ${looked}`);
  }
  const name = host.env["KUBERNETES_SERVICE_HOST"] ?? "";
  const port = host.env["KUBERNETES_SERVICE_PORT"] || "443";
  const server = `https://${name.includes(":") ? `[${name}]` : name}:${port}`;
  const cluster = { server, "certificate-authority": join(folder, "ca.crt") };
  return { file: "", cluster, user: { tokenFile } };
}

/**
 * The URL of the server, normalized: the API root of the CNI config, else the kubeconfig's. Plain
 * http shows the token, so it is for a proxy on this machine that a kubeconfig names.
 */
function checkServer(apiRoot = "", cluster: { server?: unknown }, credential: string): string {
  const root = apiRoot.split("/api/")[0] ?? "";
  const server = root || cluster.server;
  if (typeof server !== "string" || server === "") {
    const remedy = 'set "server" there, or "k8s_api_root" in the CNI config';
    throw invalid(credential, `its cluster has no server: ${remedy}`);
  }
  // The installer of Multus wrote brackets around every host, which belong to IPv6 alone.
  const url = URL.parse(server.replace(/^(https?:\/\/)\[([^\]:]+)\]/i, "$1$2"));
  if (url === null) throw invalid(credential, "the server is not a URL");
  const isLocal = !root && /^(localhost|127(\.\d+){3}|\[::1\])$/.test(url.hostname);
  if (url.protocol === "https:" || (url.protocol === "http:" && isLocal)) {
    return url.origin + url.pathname.replace(/\/+$/, "");
  }
  const what = `the server "${url.protocol}//${url.host}" must be an https URL`;
  const place = root ? "k8s_api_root" : "the kubeconfig";
  throw invalid(credential, `${what} in ${place}: set it to "https://HOST:PORT"`);
}

const insecureKey = "insecure-skip-tls-verify";

/** Where nodes have the CA of their cluster: in the kubelet's kubeconfig, or as a file. */
const nodePlaces = [
  "/etc/kubernetes/kubelet.conf",
  "/var/lib/kubelet/kubeconfig",
  ...["k3s", "rke2"].map((name) => `/var/lib/rancher/${name}/agent/kubelet.kubeconfig`),
  "/var/lib/k0s/kubelet.conf",
  "/var/snap/microk8s/current/credentials/kubelet.config",
  ...["/etc/kubernetes/pki/ca.crt", "/etc/kubernetes/certs/ca.crt"],
  ...["k3s", "rke2"].map((name) => `/var/lib/rancher/${name}/agent/server-ca.crt`),
  ...["k3s", "rke2"].map((name) => `/var/lib/rancher/${name}/server/tls/server-ca.crt`),
  ...["/var/lib/k0s/pki/ca.crt", "/var/snap/microk8s/current/certs/ca.crt"],
  `${serviceAccountDirDefault}/ca.crt`,
];

/**
 * What TLS is verified with where no CA is named, or where a kubeconfig asks for no verification,
 * as that of CNI-Genie's installer does: the node's cluster is trusted besides what the system
 * trusts. Whoever sits in between could read the token and answer in place of the server.
 * @throws CniError 7 where verification is to be off, and there is no CA
 */
function verifyAnyway(credential: string, isOff: boolean, own: Read, root = "/") {
  const remedy = `set "certificate-authority"${isOff ? `, and take "${insecureKey}" out` : ""}`;
  const found = own ? undefined : findNodeCa(root);
  if (own || found) {
    const ignored = isOff ? `"${insecureKey}" is ignored, ` : "";
    const verified = `TLS is verified with the CA ${found ? `of ${found.path}` : "named"}`;
    // Read anew each time: certificates rotate.
    const ca = own ?? (() => [...rootCertificates, findNodeCa(root)?.ca ?? ""].join("\n"));
    return { ca, warning: `${credential}: ${ignored}${verified}: ${remedy}` };
  }
  if (!isOff) return {};
  const print = "kubectl get configmap kube-root-ca.crt -o jsonpath='{.data.ca\\.crt}'";
  const why = "and the CA of the cluster is in none of its usual places on this node";
  const what = `"${insecureKey}" is not supported, ${why}`;
  throw invalid(credential, `${what}: ${remedy}; ${print} prints that CA`);
}

/** The CA of the node's cluster. A file that is absent or damaged is as good as none. */
function findNodeCa(root: string): { path: string; ca: string } | undefined {
  for (const path of nodePlaces) {
    try {
      const isPem = path.endsWith(".crt");
      const ca = isPem ? readText(join(root, path)) : caOfKubeconfig(root, path);
      if (ca.includes("-----BEGIN CERTIFICATE-----")) return { path, ca };
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
    }
  }
  return undefined;
}

function caOfKubeconfig(root: string, path: string): string {
  const { cluster } = readKubeconfig(join(root, path));
  const { "certificate-authority-data": data, "certificate-authority": file } = cluster;
  if (data) return Buffer.from(data, "base64").toString("utf8");
  return file ? readText(join(root, resolve(dirname(path), file))) : "";
}

const text = v.nullish(v.string());
/** The entries of an object that are texts. */
const texts = <K extends string>(...keys: K[]) => v.entriesFromList(keys, text);
const Context = v.looseObject({ cluster: v.string(), user: text });
const caKeys = ["certificate-authority", "certificate-authority-data"] as const;
const Cluster = v.looseObject(texts("server", "tls-server-name", ...caKeys));
const Exec = v.looseObject({
  command: v.string(),
  apiVersion: text,
  env: v.nullish(v.array(v.looseObject({ name: v.string(), value: v.nullish(v.string(), "") }))),
});
const User = v.looseObject({
  ...texts("token", "tokenFile", "client-certificate", "client-certificate-data"),
  ...texts("client-key", "client-key-data"),
  exec: v.nullish(Exec),
  "auth-provider": v.nullish(v.looseObject({ name: v.string() })),
});
type User = v.InferOutput<typeof User>;
/** Keys that change what a request means or who sends it, so they must not be ignored. */
const refusedKeys = ["proxy-url", "as", "as-uid", "username"];

function readKubeconfig(file: string): Source {
  const root = parseKubeconfig(file);
  // The named entry of a list; the others are not checked.
  const entry = <const S extends v.GenericSchema>(
    kind: "context" | "cluster" | "user",
    name: unknown,
    schema: S,
  ): v.InferOutput<S> => {
    if (typeof name !== "string" || name === "") throw invalid(file, "it has no current-context");
    const list: unknown = root[`${kind}s`];
    const isNamed = (one: unknown) => isObject(one) && one["name"] === name;
    const found = Array.isArray(list) ? list.find(isNamed) : undefined;
    const label = `${kind} "${oneLine(name, 100)}"`;
    if (found === undefined) throw invalid(file, `it has no ${label}`);
    const parsed = v.safeParse(schema, found[kind] ?? {});
    if (parsed.success) return parsed.output;
    throw invalid(file, `${label}: ${issueText(parsed.issues[0])}`);
  };
  const context = entry("context", root["current-context"], Context);
  const cluster = entry("cluster", context.cluster, Cluster);
  const user: User = context.user ? entry("user", context.user, User) : {};
  const refused = refusedKeys.find((key) => cluster[key] || user[key]);
  if (refused) throw invalid(file, `"${refused}" is not supported`);
  return { file, cluster, user };
}

function parseKubeconfig(file: string): Record<string, unknown> {
  const source = readText(file);
  let root: unknown;
  try {
    root = source.trimStart().startsWith("{") ? JSON.parse(source) : Bun.YAML.parse(source);
  } catch (error) {
    // Without the parser's message, which may quote a token.
    throw invalid(file, `it is neither YAML nor JSON (${error instanceof Error && error.name})`);
  }
  if (isObject(root)) return root;
  throw invalid(file, "it does not hold an object");
}

/** What is wrong, without valibot's own message: it quotes the value, which may be a secret. */
export function issueText(issue: v.BaseIssue<unknown>): string {
  return `expected ${issue.expected} at "${v.getDotPath(issue) ?? ""}"`;
}

function invalid(file: string, reason: string): CniError {
  return new CniError(code.invalidConfig, `Invalid Kubernetes credentials in ${file}: ${reason}`);
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
async function askPlugin({ file, cluster, user }: Source, ownToken: string): Promise<Secrets> {
  const { exec, "auth-provider": authProvider } = user;
  const { KubeConfig } = await import("@kubernetes/client-node");
  const config = new KubeConfig();
  // As client-go: a command with a slash is relative to the kubeconfig and gets its API version.
  const { command: path = "", apiVersion } = exec ?? {};
  const command = path.includes("/") ? resolve(dirname(file), path) : path;
  const info = { apiVersion, kind: "ExecCredential", spec: { interactive: false } };
  const variable = { name: "KUBERNETES_EXEC_INFO", value: JSON.stringify(info) };
  const mark = { name: tokenVariable, value: ownToken };
  const env = [variable, ...(exec?.env ?? []), ...(ownToken ? [mark] : [])];
  config.loadFromClusterAndUser(
    { name: "cluster", server: cluster.server ?? "", skipTLSVerify: false },
    { name: "user", authProvider, exec: exec && { ...exec, command, env } },
  );
  closeStdin(config);
  const options: { headers?: Record<string, unknown>; cert?: unknown; key?: unknown } = {};
  try {
    await config.applyToHTTPSOptions(options);
  } catch (error) {
    const name = exec ? `exec ${exec.command}` : `auth-provider ${authProvider?.name}`;
    // client-node throws these for a bad answer; a SyntaxError quotes it, and it may be the secret.
    const isBad = error instanceof SyntaxError || error instanceof TypeError;
    const words = oneLine((error as Error).message, 200) || "it printed nothing on stderr";
    const why = isBad ? "its answer is no credential" : words;
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
 * A program that reads stdin meets its end, as under kubectl: client-node leaves it open, and the
 * program would wait for ever.
 */
function closeStdin(config: object): void {
  type Spawn = (...words: unknown[]) => { stdin: { end: () => void } | null };
  const { authenticators } = config as { authenticators: { execFn?: Spawn }[] };
  for (const one of authenticators) {
    const spawn = one.execFn;
    if (!spawn) continue;
    one.execFn = (...words) => {
      const child = spawn(...words);
      child.stdin?.end();
      return child;
    };
  }
}

/**
 * What the token of a service account says of itself, which nobody verified: whose it is, and from
 * when to when it is valid, ms since the epoch. Undefined for another kind of token, or one that
 * never ends. Source: Kubernetes, "Managing Service Accounts", bound tokens; RFC 7519.
 */
export function claimsOf(token: string) {
  let claims: unknown;
  try {
    claims = JSON.parse(Buffer.from(token.split(".")[1] ?? "", "base64url").toString());
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
  if (!isObject(claims)) return undefined;
  const { sub, iat, exp, "kubernetes.io": own } = claims;
  const [, namespace, account] =
    /^system:serviceaccount:([\w.-]+):([\w.-]+)$/.exec(String(sub)) ?? [];
  if (!namespace || !account || typeof exp !== "number" || typeof iat !== "number")
    return undefined;
  // That of a pod is refused once the pod is gone.
  const isOfPod = isObject(own) && own["pod"] !== undefined;
  return { namespace, account, fromMs: iat * 1000, untilMs: exp * 1000, isOfPod };
}

/**
 * Reads anew what one request needs.
 * @param ownToken goes into the environment of an `exec` plugin, so that it can be found
 * @throws CniError 5 or 7 for files that cannot be used, 11 for a plugin that fails
 */
export async function readSecrets(account: Account, ownToken?: string): Promise<Secrets> {
  const { credential } = account;
  const asked = await account.plugin?.(ownToken);
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
