/**
 * `genie webhook`: the API server asks it about every Logicalnetwork before it keeps it. The same
 * rules as ADD's, so what could not be attached is refused when it is written. Fails closed: where
 * the API cannot be asked, nothing is let through. The certificate is read again when it changes.
 * Source: Kubernetes admission.k8s.io/v1 AdmissionReview.
 */
import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import * as v from "valibot";
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { CniError, code, type Host, log, toCniError } from "../cni.ts";
import { defaultConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { parseJson } from "../json.ts";
import { isConfigured } from "../kubernetes/credentials.ts";
import { reviewLogical } from "../kubernetes/networks.ts";
import { openObjects } from "../kubernetes/objects_of_call.ts";
import { oneLine } from "../text.ts";

/** A request holds an object and its predecessor, of 1.5 MiB at most each. */
const bodyBytesMax = 4 * 1024 * 1024;
/** How often the files of the certificate are looked at, in ms. */
const certificatePollMs = 1_000;
/** How long requests may go on when we are asked to end, in ms: less than the 2 s we have. */
const endingMs = 1_500;

const Review = v.looseObject({
  apiVersion: v.literal("admission.k8s.io/v1"),
  kind: v.literal("AdmissionReview"),
  request: v.looseObject({
    uid: v.pipe(v.string(), v.minLength(1), v.maxLength(253)),
    operation: v.string(),
    namespace: v.optional(v.string(), ""),
    name: v.optional(v.string(), ""),
    resource: v.looseObject({ group: v.string(), version: v.string(), resource: v.string() }),
    subResource: v.optional(v.string(), ""),
    object: v.unknown(),
  }),
});
type ReviewRequest = v.InferOutput<typeof Review>["request"];

/** The answer: `code` is an HTTP status, for programs. */
interface Verdict {
  allowed: boolean;
  code: number;
  message: string;
}

/**
 * Runs `genie webhook` until SIGTERM or SIGINT.
 * @returns exit status
 * @throws UsageError for words that make no sense; CniError 5 for a certificate that cannot be used
 *   or an address that is taken, 7 without credentials
 */
export async function runWebhook(host: Host, flags: Flags): Promise<number> {
  const config = configOf(text(flags, "kubeconfig"));
  const files = { cert: needed(flags, "cert"), key: needed(flags, "key") };
  const address = parseListen(text(flags, "listen") ?? "0.0.0.0:8443");
  if (!isConfigured(host, config.kubernetes)) {
    throw new CniError(
      code.invalidConfig,
      "Cannot run the webhook: there are no credentials for the Kubernetes API, give " +
        "--kubeconfig or run it in a pod",
    );
  }
  host.catchSignals?.();
  const ended = new Promise<void>((done) => {
    if (host.signal.aborted) done();
    else host.signal.addEventListener("abort", () => done(), { once: true });
  });
  const server = serveRotating(host, address, files, (request) => answer(host, config, request));
  log(host, "info", "Webhook is listening", { address: `${address.hostname}:${server.port}` });
  await ended;
  await server.stop();
  log(host, "info", "Webhook has ended");
  return 0;
}

function configOf(kubeconfig: string | undefined): Config {
  const config = defaultConfig();
  if (kubeconfig === undefined) return config;
  const kubernetes = { ...config.kubernetes, kubeconfig, kubeconfigIsExplicit: true };
  return { ...config, kubernetes };
}

function needed(flags: Flags, name: string): string {
  const value = text(flags, name);
  if (value !== undefined) return value;
  throw new UsageError(`--${name} FILE is needed`);
}

/** `1.2.3.4:8443`, `[::1]:8443`, or a port alone. */
function parseListen(value: string): { hostname: string; port: number } {
  const [, bracketed, plain, digits = ""] = /^(?:\[(.*)\]:|([^:]*):)?(\d{1,5})$/.exec(value) ?? [];
  const hostname = bracketed ?? (plain || "0.0.0.0");
  const port = Number(digits);
  if (digits !== "" && port <= 65_535 && isIP(hostname) !== 0) return { hostname, port };
  throw new UsageError(`--listen cannot be "${oneLine(value, 80)}": expected ADDRESS:PORT`);
}

interface CertificateFiles {
  cert: string;
  key: string;
}
interface Certificate {
  cert: string;
  key: string;
}

/**
 * Serves with the certificate that the files hold at the time. Bun cannot change that of a server:
 * a new one takes over the port, and the old one ends with its last request. Files that do not go
 * together are in the middle of a change, or wrong: the old certificate stays.
 *
 * @throws CniError 5 when it cannot begin
 */
function serveRotating(
  host: Host,
  address: { hostname: string; port: number },
  files: CertificateFiles,
  fetch: (request: Request) => Promise<Response>,
): { port: number; stop: () => Promise<void> } {
  const serve = (tls: Certificate, port: number) =>
    Bun.serve({
      ...address,
      port,
      tls,
      reusePort: true,
      maxRequestBodySize: bodyBytesMax,
      idleTimeout: 30,
      fetch,
      error: (error) => {
        log(host, "error", toCniError(error).message);
        return new Response("internal error\n", { status: 500 });
      },
    });
  let current = begin(() => readCertificate(files));
  let server = begin(() => serve(current, address.port), `${address.hostname}:${address.port}`);
  const port = server.port ?? address.port;
  let complaint = "";
  const look = (): void => {
    try {
      const found = readCertificate(files);
      if (found.cert === current.cert && found.key === current.key) return;
      const next = serve(found, port);
      const before = server;
      [server, current, complaint] = [next, found, ""];
      log(host, "info", "The certificate has changed", { file: files.cert });
      void before.stop();
    } catch (error) {
      const reason = oneLine(toCniError(error).message.replace(/^Internal error: /, ""), 200);
      if (reason !== complaint) log(host, "warn", `Keeping the certificate: ${reason}`);
      complaint = reason;
    }
  };
  const timer = setInterval(look, certificatePollMs);
  return {
    port,
    stop: async () => {
      clearInterval(timer);
      await Promise.race([server.stop(), Bun.sleep(endingMs)]);
      await server.stop(true);
    },
  };
}

function begin<T>(start: () => T, what = ""): T {
  try {
    return start();
  } catch (error) {
    const reason = oneLine(toCniError(error).message.replace(/^Internal error: /, ""), 300);
    const place = what && ` on ${what}`;
    throw new CniError(code.ioFailure, `Cannot run the webhook${place}: ${reason}`, {
      cause: error,
    });
  }
}

function readCertificate({ cert, key }: CertificateFiles): Certificate {
  return { cert: readFileSync(cert, "utf8"), key: readFileSync(key, "utf8") };
}

async function answer(host: Host, config: Config, request: Request): Promise<Response> {
  const { pathname } = new URL(request.url);
  if (pathname === "/healthz" && request.method === "GET") return new Response("ok\n");
  if (pathname !== "/validate") return plain(404, "there is nothing here");
  if (request.method !== "POST") return plain(405, "only POST");
  const type = request.headers.get("Content-Type") ?? "";
  if (!/^application\/json *(;|$)/i.test(type)) return plain(415, "expected application/json");
  const review = await readReview(request).catch((error: unknown) => toCniError(error));
  if (review instanceof CniError) return plain(400, review.message);
  const { uid, operation, namespace, name } = review;
  const verdict = await judge(host, config, review);
  log(host, verdict.code >= 500 ? "error" : "info", verdict.allowed ? "allowed" : "refused", {
    operation,
    object: oneLine(`${namespace}/${name}`, 300),
    ...(verdict.message && { because: verdict.message }),
  });
  const { allowed, code: status, message } = verdict;
  return Response.json({
    apiVersion: "admission.k8s.io/v1",
    kind: "AdmissionReview",
    response: { uid, allowed, ...(!allowed && { status: { code: status, message } }) },
  });
}

function plain(status: number, message: string): Response {
  return new Response(`${oneLine(message, 300)}\n`, { status });
}

/** The question: hostile. @throws CniError 6 or 7 */
async function readReview(request: Request): Promise<ReviewRequest> {
  const parsed = v.safeParse(Review, parseJson(await request.text(), "the request"));
  if (parsed.success) return parsed.output.request;
  const [issue] = parsed.issues;
  const path = v.getDotPath(issue) ?? "request";
  throw new CniError(code.invalidConfig, `No AdmissionReview of v1: ${path}: ${issue.message}`);
}

/** HTTP status of a refusal by the code of its reason. */
const statuses: Record<number, number> = {
  [code.tryAgainLater]: 503,
  [code.invalidConfig]: 422,
  [code.networkNotFound]: 422,
};

/** What holds of a question; never an exception, since none may let anything through. */
async function judge(host: Host, config: Config, request: ReviewRequest): Promise<Verdict> {
  const { operation, namespace, name, object, resource, subResource } = request;
  const asked = [resource.group, resource.version, resource.resource].join("/");
  if (asked !== "alpha.network.k8s.io/v1/logicalnetworks" || subResource !== "") {
    const message = `the webhook of genie knows Logicalnetworks, not ${oneLine(asked, 100)}`;
    return { allowed: false, code: 400, message };
  }
  if (operation !== "CREATE" && operation !== "UPDATE") {
    return { allowed: true, code: 200, message: "" };
  }
  try {
    await reviewLogical(openObjects(host, config), { namespace, name, object });
    return { allowed: true, code: 200, message: "" };
  } catch (error) {
    const { code: number, message } = toCniError(error);
    return { allowed: false, code: statuses[number] ?? 500, message };
  }
}
