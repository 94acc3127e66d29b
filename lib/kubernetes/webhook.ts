/**
 * `genie webhook`: the API server asks it about every Logicalnetwork before it stores it. The rules
 * are those of ADD, so what could not be attached is refused when it is written. It fails closed:
 * where the API cannot be asked, nothing is let through. A changed certificate is read again.
 * Source: Kubernetes admission.k8s.io/v1 AdmissionReview.
 */
import { readFileSync } from "node:fs";
import { isIP } from "node:net";
import * as v from "valibot";
import type { Host } from "../call.ts";
import { CniError, code, log, oneLine, toCniError } from "../cni.ts";
import { defaultConfig } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { type Flags, text, UsageError } from "../config/usage.ts";
import { parseJson } from "../json.ts";
import { isConfigured } from "../settings.ts";
import { aborted } from "./client.ts";
import { reviewLogical } from "./networks.ts";
import { openObjects } from "./objects_of_call.ts";

/** A request holds an object and its predecessor, of 1.5 MiB at most each. */
const bodyBytesMax = 4 * 1024 * 1024;
/** How often the files of the certificate are read, in ms. */
const certificatePollMs = 1_000;
/** How long open requests may take once we are asked to end, in ms; we have 2 s. */
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

/** Why an object is refused; `code` is an HTTP status, for programs. */
type Refusal = { code: number; message: string };

/**
 * Runs `genie webhook` until SIGTERM or SIGINT.
 * @returns exit status
 * @throws UsageError for words that make no sense; CniError 5 for a certificate that cannot be used
 *   or an address that is taken, 7 without credentials
 */
export async function runWebhook(host: Host, flags: Flags): Promise<number> {
  const config = defaultConfig();
  const kubeconfig = text(flags, "kubeconfig");
  const named = kubeconfig !== undefined && { kubeconfig, kubeconfigIsExplicit: true };
  config.kubernetes = { ...config.kubernetes, ...named };
  const files = { cert: needed(flags, "cert"), key: needed(flags, "key") };
  const address = parseAddress(text(flags, "listen") ?? "0.0.0.0:8443");
  if (!isConfigured(host, config.kubernetes)) {
    const why = "there are no credentials for the Kubernetes API";
    const remedy = "give --kubeconfig or run it in a pod";
    throw new CniError(code.invalidConfig, `Cannot run the webhook: ${why}, ${remedy}`);
  }
  host.catchSignals?.();
  const server = serveRotating(host, address, files, (request) => answer(host, config, request));
  log(host, "info", "Webhook is listening", { address: `${address.hostname}:${server.port}` });
  await aborted(host.signal);
  await server.stop();
  log(host, "info", "Webhook has ended");
  return 0;
}

function needed(flags: Flags, name: string): string {
  const value = text(flags, name);
  if (value !== undefined) return value;
  throw new UsageError(`--${name} FILE is needed`);
}

/** `1.2.3.4:8443`, `[::1]:8443`, or a port alone. */
function parseAddress(value: string): { hostname: string; port: number } {
  const [, bracketed, plain, digits = ""] = /^(?:\[(.*)\]:|([^:]*):)?(\d{1,5})$/.exec(value) ?? [];
  const hostname = bracketed ?? (plain || "0.0.0.0");
  const port = Number(digits);
  if (digits !== "" && port <= 65_535 && isIP(hostname) !== 0) return { hostname, port };
  throw new UsageError(`--listen cannot be "${oneLine(value, 80)}": expected ADDRESS:PORT`);
}

/** A certificate and its key: their files, or the PEM in them. */
type Certificate = { cert: string; key: string };

/**
 * Serves with the certificate that the files hold at the time. Bun cannot change the certificate of
 * a server: a new server takes over the port, and the old one ends with its last request. Files
 * that do not match are wrong or in the middle of a change: the old certificate stays.
 * @throws CniError 5 when it cannot start
 */
function serveRotating(
  host: Host,
  address: { hostname: string; port: number },
  files: Certificate,
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
  let current = start(() => readCertificate(files));
  let server = start(() => serve(current, address.port), ` on ${address.hostname}:${address.port}`);
  const port = server.port ?? address.port;
  let complaint = "";
  const reload = (): void => {
    try {
      const found = readCertificate(files);
      if (found.cert === current.cert && found.key === current.key) return;
      const next = serve(found, port);
      const before = server;
      [server, current, complaint] = [next, found, ""];
      log(host, "info", "The certificate has changed", { file: files.cert });
      void before.stop();
    } catch (error) {
      const reason = reasonOf(error);
      if (reason !== complaint) log(host, "warn", `Keeping the certificate: ${reason}`);
      complaint = reason;
    }
  };
  const timer = setInterval(reload, certificatePollMs);
  return {
    port,
    stop: async () => {
      clearInterval(timer);
      await Promise.race([server.stop(), Bun.sleep(endingMs)]);
      await server.stop(true);
    },
  };
}

function start<T>(run: () => T, place = ""): T {
  try {
    return run();
  } catch (error) {
    const message = `Cannot run the webhook${place}: ${reasonOf(error)}`;
    throw new CniError(code.ioFailure, message, { cause: error });
  }
}

function reasonOf(error: unknown): string {
  return oneLine(toCniError(error).message.replace(/^Internal error: /, ""), 300);
}

function readCertificate({ cert, key }: Certificate): Certificate {
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
  const refusal = await decide(host, config, review);
  const allowed = refusal === undefined;
  log(host, refusal && refusal.code >= 500 ? "error" : "info", allowed ? "allowed" : "refused", {
    operation,
    object: oneLine(`${namespace}/${name}`, 300),
    because: refusal?.message,
  });
  return Response.json({
    apiVersion: "admission.k8s.io/v1",
    kind: "AdmissionReview",
    response: { uid, allowed, ...(refusal && { status: refusal }) },
  });
}

function plain(status: number, message: string): Response {
  return new Response(`${oneLine(message, 300)}\n`, { status });
}

/** The review that a request asks for; anyone may send one. @throws CniError 6 or 7 */
async function readReview(request: Request): Promise<ReviewRequest> {
  const parsed = v.safeParse(Review, parseJson(await request.text(), "the request"));
  if (parsed.success) return parsed.output.request;
  const [issue] = parsed.issues;
  const path = v.getDotPath(issue) ?? "request";
  throw new CniError(code.invalidConfig, `No AdmissionReview of v1: ${path}: ${issue.message}`);
}

/** Decides a review. Never throws: an error of ours must not let anything through. */
async function decide(
  host: Host,
  config: Config,
  { operation, namespace, name, object, resource, subResource }: ReviewRequest,
): Promise<Refusal | undefined> {
  const asked = [resource.group, resource.version, resource.resource].join("/");
  if (asked !== "alpha.network.k8s.io/v1/logicalnetworks" || subResource !== "") {
    const message = `the webhook of genie knows Logicalnetworks, not ${oneLine(asked, 100)}`;
    return { code: 400, message };
  }
  if (operation !== "CREATE" && operation !== "UPDATE") return undefined;
  try {
    await reviewLogical(openObjects(host, config), { namespace, name, object });
    return undefined;
  } catch (error) {
    const { code: number, message } = toCniError(error);
    if (number === code.tryAgainLater) return { code: 503, message };
    const isInvalid = number === code.invalidConfig || number === code.networkNotFound;
    return { code: isInvalid ? 422 : 500, message };
  }
}
