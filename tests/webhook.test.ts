/**
 * `genie webhook` as the API server meets it: the compiled program (lib/kubernetes/webhook.ts), TLS
 * with a
 * client that verifies, certificates that change, an API that is away; and what
 * `genie manifest --webhook` prints (lib/cluster/webhook.yaml).
 */
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "bun:test";
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { connect } from "node:tls";
import { runCommand } from "../lib/cli/command_line.ts";
import { type ApiServer, issuerIn, startApiServer } from "./apiserver.ts";
import { makeCertificate } from "./certificate.ts";
import { makeHost, tempDir } from "./fakes.ts";
import { compiledGenie, spawnGenie } from "./wire.ts";

const dir = tempDir();
const tls = join(dir.path, "tls");
const file = (name: string) => join(tls, name);
let api: ApiServer;
let webhook: Running;

interface Running {
  url: string;
  port: number;
  /** Everything on stderr until a line has this. */
  until: (text: string) => Promise<string>;
  child: Bun.Subprocess<"ignore", "pipe", "pipe">;
}

async function start(...more: string[]): Promise<Running> {
  const files = ["--cert", file("tls.crt"), "--key", file("tls.key")];
  const words = ["webhook", ...files, "--listen", "127.0.0.1:0", ...more];
  const child = Bun.spawn([compiledGenie(), ...words], {
    env: {},
    cwd: "/",
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  let said = "";
  const reader = child.stderr.getReader();
  const decoder = new TextDecoder();
  const until = async (text: string): Promise<string> => {
    while (!said.includes(text)) {
      const { value, done } = await reader.read();
      if (done) throw new Error(`It ended without "${text}": ${said}`);
      said += decoder.decode(value, { stream: true });
    }
    return said;
  };
  const [, port = ""] = /address=127\.0\.0\.1:(\d+)/.exec(await until("listening")) ?? [];
  return { url: `https://127.0.0.1:${port}`, port: Number(port), until, child };
}

const alpha = "/apis/alpha.network.k8s.io/v1";
beforeAll(async () => {
  api = await startApiServer(join(dir.path, "api"), { keepAlive: false });
  mkdirSync(tls);
  for (const end of ["crt", "key"])
    copyFileSync(join(api.dir, `server.${end}`), file(`tls.${end}`));
  const put = (kind: string, name: string, spec: object, namespace = "team") =>
    api.put(`${alpha}/namespaces/${namespace}/${kind}/${name}`, {
      metadata: { name, namespace },
      spec,
    });
  put("physicalnetworks", "shared", { sharedStatus: { subnet: "10.0.0.0/8" } });
  put("physicalnetworks", "own", { sharedStatus: { dedicatedNet: true, plugin: "weave" } });
  put("logicalnetworks", "taken", { plugin: "calico", sub_subnet: "10.1.0.0/16" }, "other");
  webhook = await start("--kubeconfig", api.kubeconfig("token"));
});
afterAll(async () => {
  webhook.child.kill("SIGKILL");
  await webhook.child.exited;
  await api.stop();
  dir[Symbol.dispose]();
});
beforeEach(() => {
  api.requests.length = 0;
});

const ca = () => readFileSync(join(api.dir, "ca.crt"), "utf8");
const resource = { group: "alpha.network.k8s.io", version: "v1", resource: "logicalnetworks" };
const review = (spec: unknown, more: object = {}) => ({
  apiVersion: "admission.k8s.io/v1",
  kind: "AdmissionReview",
  request: {
    uid: "705ab4f5",
    operation: "CREATE",
    namespace: "team",
    name: "new",
    resource,
    object: { metadata: { name: "new", namespace: "team" }, spec },
    ...more,
  },
});
function send(body: unknown, init: RequestInit = {}, path = "/validate"): Promise<Response> {
  return fetch(`${webhook.url}${path}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: typeof body === "string" ? body : JSON.stringify(body),
    ...init,
    tls: { ca: ca(), rejectUnauthorized: true },
  });
}
async function ask(body: unknown): Promise<unknown> {
  const response = await send(body);
  expect(response.status).toBe(200);
  const { response: answer, ...head } = JSON.parse(await response.text());
  expect(head).toEqual({ apiVersion: "admission.k8s.io/v1", kind: "AdmissionReview" });
  const { uid, ...verdict } = answer;
  expect(uid).toBe("705ab4f5");
  return verdict;
}

describe("genie webhook", () => {
  test.each<[string, unknown]>([
    ["a plugin", { plugin: "calico" }],
    ["a free sub-subnet", { plugin: "calico", sub_subnet: "10.2.0.0/16" }],
    ["the same sub-subnet of another plugin", { plugin: "weave", sub_subnet: "10.1.0.0/16" }],
    ["a share", { physicalNet: "shared", plugin: "calico", sub_subnet: "10.3.0.0/16" }],
    ["a dedicated one", { physicalNet: "own" }],
  ])("lets %s through", async (_, spec) => {
    expect(await ask(review(spec))).toEqual({ allowed: true });
  });

  test.each<[string, unknown, string]>([
    ["no plugin", {}, "no plugin: set spec.plugin, or a dedicated physical network"],
    ["a share without plugin", { physicalNet: "shared", sub_subnet: "10.3.0.0/16" }, "no plugin"],
    ["a share without sub-subnet", { physicalNet: "shared", plugin: "a" }, "needs spec.sub_subnet"],
    [
      "a sub-subnet outside",
      { physicalNet: "shared", plugin: "a", sub_subnet: "11.0.0.0/16" },
      "sub_subnet 11.0.0.0/16 is not inside 10.0.0.0/8",
    ],
    [
      "an overlap",
      { plugin: "calico", sub_subnet: "10.1.128.0/17" },
      "sub_subnet 10.1.128.0/17 overlaps 10.1.0.0/16 of other/taken on the same plugin",
    ],
    ["another plugin", { physicalNet: "own", plugin: "a" }, 'plugin "a" is not "weave"'],
    ["a physical network that is not there", { physicalNet: "gone" }, "does not exist"],
    ["no subnet", { plugin: "a", sub_subnet: "10.1.0.0/99" }, '"10.1.0.0/99" is no subnet'],
    ["a spec of a wrong shape", "x", "Invalid Logicalnetwork team/new: spec"],
  ])("refuses %s", async (_, spec, message) => {
    expect(await ask(review(spec))).toEqual({
      allowed: false,
      status: { code: 422, message: expect.stringContaining(message) },
    });
  });

  test.each<[string, object, object]>([
    [
      "an update, which is not in its own way",
      { name: "taken", namespace: "other", operation: "UPDATE" },
      { allowed: true },
    ],
    ["a deletion, whatever it was", { operation: "DELETE", object: null }, { allowed: true }],
    [
      "another kind",
      { resource: { ...resource, resource: "pods" } },
      { allowed: false, status: { code: 400, message: expect.stringContaining("not alpha") } },
    ],
    [
      "a part of one",
      { subResource: "status" },
      { allowed: false, status: { code: 400, message: expect.any(String) } },
    ],
    [
      "nothing",
      { object: null },
      { allowed: false, status: { code: 422, message: expect.any(String) } },
    ],
  ])("judges %s", async (_, more, expected) => {
    const spec = { plugin: "calico", sub_subnet: "10.1.0.0/16" };
    expect(await ask(review(spec, more))).toEqual(expected);
  });

  test("says one line for each, and fails closed without the API", async () => {
    api.misbehave({ kind: "status", status: 500 }, { kind: "status", status: 500 });
    expect(await ask(review({ physicalNet: "own" }, { name: "x1" }))).toEqual({
      allowed: false,
      status: { code: 503, message: expect.stringContaining("Cannot get physicalnetworks") },
    });
    await ask(review({ plugin: "calico" }, { name: "x2\nforged" }));
    const said = await webhook.until("forged");
    const lines = said.split("\n").filter((line) => /team\/x/.test(line));
    expect(lines).toEqual([
      expect.stringMatching(
        /^genie: error: refused operation="?CREATE"? object="?team\/x1"? because="Cannot get/,
      ),
      expect.stringMatching(/^genie: info: allowed operation="?CREATE"? object="team\/x2 forged"$/),
    ]);
    expect(said).not.toContain(api.token);
  });

  const json = { "Content-Type": "application/json" };
  test.each<[string, unknown, RequestInit, string, number]>([
    ["no JSON", "{", {}, "/validate", 400],
    ["what is no review", { kind: "Pod" }, {}, "/validate", 400],
    ["a review without uid", review({}, { uid: "" }), {}, "/validate", 400],
    [
      "a review of another version",
      { ...review({}), apiVersion: "admission.k8s.io/v1beta1" },
      {},
      "/validate",
      400,
    ],
    ["JSON without end", "[".repeat(100_000), {}, "/validate", 400],
    ["another type", review({}), { headers: { "Content-Type": "text/plain" } }, "/validate", 415],
    ["no type", review({}), { headers: { "Content-Type": "" } }, "/validate", 415],
    [
      "a type with its charset",
      review({ plugin: "a" }),
      { headers: { "Content-Type": `${json["Content-Type"]}; charset=utf-8` } },
      "/validate",
      200,
    ],
    ["too much", `"${"x".repeat(5 * 1024 * 1024)}"`, {}, "/validate", 413],
    ["another method", review({}), { method: "PUT" }, "/validate", 405],
    ["another path", review({}), {}, "/", 404],
  ])("answers %s", async (_, body, init, path, status) => {
    expect((await send(body, init, path)).status).toBe(status);
  });

  test("is healthy, for clients that trust its authority alone", async () => {
    const at = `${webhook.url}/healthz`;
    const answer = await fetch(at, { tls: { ca: ca(), rejectUnauthorized: true } });
    expect([answer.status, await answer.text()]).toEqual([200, "ok\n"]);
    const other = readFileSync(join(api.dir, "ca2.crt"), "utf8");
    expect(fetch(at, { tls: { ca: other, rejectUnauthorized: true } })).rejects.toThrow();
  });
});

/** Serial number of the certificate that a server shows to somebody who verifies it. */
function serialOf(port: number): Promise<string> {
  return new Promise((done, fail) => {
    const socket = connect({ port, host: "127.0.0.1", ca: ca() }, () => {
      done(socket.getPeerCertificate().serialNumber);
      socket.destroy();
    });
    socket.on("error", fail);
  });
}
function renew(name: string): void {
  const made = makeCertificate({ name: "new", hosts: ["127.0.0.1"] }, issuerIn(api.dir));
  writeFileSync(file(`${name}.crt`), made.certificate);
  writeFileSync(file(`${name}.key`), made.key);
}

describe("genie webhook runs", () => {
  test("on with a new certificate, not with half of one, and ends when asked", async () => {
    const own = await start("--kubeconfig", api.kubeconfig("token"));
    try {
      const before = await serialOf(own.port);
      renew("next");
      copyFileSync(file("next.crt"), file("tls.crt"));
      await own.until("Keeping the certificate");
      expect(await serialOf(own.port)).toBe(before);
      copyFileSync(file("next.key"), file("tls.key"));
      await own.until("The certificate has changed");
      // The old server may take, or reset, what had come to it before it let go of the port.
      await serialOf(own.port).catch(() => undefined);
      expect(await serialOf(own.port)).not.toBe(before);
      const answer = await fetch(`https://127.0.0.1:${own.port}/healthz`, { tls: { ca: ca() } });
      expect(answer.status).toBe(200);
    } finally {
      own.child.kill("SIGTERM");
      await own.child.exited;
    }
    expect([own.child.exitCode, own.child.signalCode]).toEqual([0, null]);
    expect(await own.until("has ended")).toContain("Webhook is listening");
  });

  test("no longer than two seconds when asked to end, with a request that hangs", async () => {
    const own = await start("--kubeconfig", api.kubeconfig("token"));
    api.misbehave({ kind: "hang" });
    const asked = Promise.withResolvers<void>();
    api.gate = async () => asked.resolve();
    const pending = fetch(`${own.url}/validate`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(review({ physicalNet: "own" })),
      tls: { ca: ca() },
    }).then(
      (response) => response.status,
      () => "broken",
    );
    await asked.promise;
    delete api.gate;
    own.child.kill("SIGTERM");
    expect(await own.child.exited).toBe(0);
    expect([200, "broken"]).toContain(await pending);
  });

  const broken = () => {
    writeFileSync(file("broken"), "no PEM");
    return file("broken");
  };
  test.each<[string, () => string[], number, RegExp]>([
    ["without a certificate", () => [], 2, /--cert FILE is needed/],
    ["without a key", () => ["--cert", file("tls.crt")], 2, /--key FILE is needed/],
    [
      "an address that is none",
      () => [...pair(), "--listen", "here:1"],
      2,
      /expected ADDRESS:PORT/,
    ],
    ["a port that is none", () => [...pair(), "--listen", "127.0.0.1:70000"], 2, /ADDRESS:PORT/],
    ["without credentials", () => pair(), 1, /no credentials for the Kubernetes API/],
    [
      "a certificate that is none",
      () => ["--cert", broken(), "--key", file("tls.key"), ...account(), "--listen", "127.0.0.1:0"],
      1,
      /Cannot run the webhook.* \(code 5\)/,
    ],
    [
      "a file that is not there",
      () => ["--cert", file("none"), "--key", file("tls.key"), ...account()],
      1,
      /Cannot run the webhook: .*ENOENT.* \(code 5\)/,
    ],
  ])("not %s", async (_, args, status, said) => {
    const run = await spawnGenie([compiledGenie(), "webhook", ...args()], {});
    expect(run.stderr).toMatch(said);
    expect([run.status, run.stdout]).toEqual([status, ""]);
  });
  const pair = () => ["--cert", file("tls.crt"), "--key", file("tls.key")];
  const account = () => ["--kubeconfig", api.kubeconfig("token")];
});

describe("genie manifest", () => {
  async function print(...args: string[]) {
    const host = makeHost();
    const status = await runCommand(host, ["manifest", ...args]);
    return { status, ...host.written };
  }
  const at = (value: unknown, ...path: (string | number)[]): unknown =>
    path.reduce<unknown>((one, key) => (one as Record<string | number, unknown>)?.[key], value);

  test("--webhook: what runs it, with rights to read alone", async () => {
    const args = ["--webhook", "--ca", join(api.dir, "ca.crt"), "--namespace=net", "--image=g:1"];
    const { stdout, status, stderr } = await print(...args, "--json");
    expect([status, stderr]).toEqual([0, ""]);
    const { items } = JSON.parse(stdout);
    expect(items.map(({ kind }: { kind: string }) => kind)).toEqual([
      "ServiceAccount",
      "ClusterRole",
      "ClusterRoleBinding",
      "Deployment",
      "Service",
      "ValidatingWebhookConfiguration",
    ]);
    const [account, role, , deployment, service, configuration] = items;
    const verbs = (at(role, "rules") as { verbs: string[] }[]).flatMap((rule) => rule.verbs);
    expect(verbs.toSorted()).toEqual(["get", "list"]);
    const client = at(configuration, "webhooks", 0, "clientConfig") as Record<string, unknown>;
    expect(client["service"]).toEqual({
      namespace: "net",
      name: at(service, "metadata", "name"),
      path: "/validate",
      port: at(service, "spec", "ports", 0, "port"),
    });
    expect(Buffer.from(String(client["caBundle"]), "base64").toString()).toBe(ca());
    const pod = at(deployment, "spec", "template", "spec");
    expect(at(pod, "serviceAccountName")).toBe(at(account, "metadata", "name"));
    expect(at(pod, "containers", 0, "image")).toBe("g:1");
    expect(at(service, "spec", "selector")).toEqual(
      at(deployment, "spec", "template", "metadata", "labels"),
    );
    expect(at(configuration, "webhooks", 0, "failurePolicy")).toBe("Fail");
    expect(Bun.YAML.parse((await print(...args)).stdout)).toEqual(items);
  });

  test.each<[string, () => string[], number, string]>([
    ["--webhook without --ca", () => ["--webhook"], 2, "--webhook needs --ca"],
    ["a file that is not there", () => ["--webhook", "--ca=/none"], 1, "it does not exist"],
    [
      "a key for a certificate",
      () => ["--webhook", "--ca", join(api.dir, "ca.key")],
      1,
      "it is not certificates in PEM alone",
    ],
  ])("refuses %s", async (_, args, status, said) => {
    const run = await print(...args());
    expect([run.status, run.stdout]).toEqual([status, ""]);
    expect(run.stderr).toContain(said);
  });

  test("--access: the policies of a table, and none of one without rules", async () => {
    const table = join(dir.path, "access.toml");
    writeFileSync(
      table,
      '[plugins.a]\nallow = { namespaces = ["b"] }\n[[access.nad]]\nnamespaces = ["c"]',
    );
    const { stdout, stderr, status } = await print("--access", "--table", table);
    expect([status, stderr]).toEqual([0, ""]);
    const objects = Bun.YAML.parse(stdout) as { kind: string; metadata: { name: string } }[];
    expect(objects.map(({ kind, metadata }) => `${kind} ${metadata.name}`)).toEqual([
      "ValidatingAdmissionPolicy genie-pods",
      "ValidatingAdmissionPolicyBinding genie-pods",
      "ValidatingAdmissionPolicy genie-definitions",
      "ValidatingAdmissionPolicyBinding genie-definitions",
    ]);
    expect(stdout).toContain(`plugins.a.allow at ${table}:2`);
    expect(await print("--access")).toEqual({
      status: 0,
      stdout: "",
      stderr: expect.stringContaining("there is no policy"),
    });
  });
});
