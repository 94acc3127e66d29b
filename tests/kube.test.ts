/**
 * lib/kubernetes/client.ts, lib/kubernetes/kubeconfig.ts against
 * apiserver.ts: real TLS, files.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import type { Host } from "../lib/call.ts";
import { CniError, code } from "../lib/cni.ts";
import { connect, isConflict, isNotFound, type Kube, statusOf } from "../lib/kubernetes/client.ts";
import { findAccount, readSecrets } from "../lib/kubernetes/kubeconfig.ts";
import type { KubeSettings } from "../lib/kubernetes/objects_of_call.ts";
import { processStarted } from "../lib/lock.ts";
import { isConfigured } from "../lib/settings.ts";
import { type ApiServer, type Fault, type Kind, startApiServer } from "./apiserver.ts";

const clientModule = join(import.meta.dir, "../lib/kubernetes/client.ts");
const dir = mkdtempSync(join(tmpdir(), "genie-kube-"));
let server: ApiServer;
beforeAll(async () => {
  server = await startApiServer(join(dir, "api"), { keepAlive: false });
  server.put("/api/v1/namespaces/blue/pods/web", pod);
  mkdirSync(join(dir, "account"));
  writeFileSync(join(dir, "account", "token"), server.token);
  writeFileSync(join(dir, "account", "ca.crt"), pem("ca.crt"));
});
afterAll(async () => {
  await server.stop();
  rmSync(dir, { recursive: true });
});

const pod = {
  kind: "Pod",
  metadata: {
    name: "web",
    namespace: "blue",
    uid: "u-1",
    resourceVersion: "7",
    annotations: { cni: "calico,weave" },
    managedFields: [{ manager: "kubectl" }],
  },
  spec: { serviceAccountName: "default", nodeName: "n1" },
  status: { phase: "Pending" },
};
const podPath = ["api", "v1", "namespaces", "blue", "pods", "web"];
const pem = (name: string): string => readFileSync(join(server.dir, name), "utf8");
const base64 = (text: string): string => Buffer.from(text).toString("base64");

function makeHost(env: Host["env"] = {}, signal = new AbortController().signal): Host {
  const silent = (): void => undefined;
  const log = { level: "info", file: "" } as const;
  return { env, stdin: () => "", stdout: silent, stderr: silent, now: Date.now, signal, log };
}
function settingsOf(kubeconfig: string, more: Partial<KubeSettings> = {}): KubeSettings {
  const nodeRoot = join(dir, "no-node");
  return { kubeconfig, kubeconfigIsExplicit: true, timeoutMs: 5000, nodeRoot, ...more };
}
const open = (kind: Kind = "token", more: Partial<KubeSettings> = {}): Promise<Kube> =>
  connect(makeHost(), settingsOf(server.kubeconfig(kind), more));

/** The error of a promise that must fail, without the parts that vary per run. */
async function failure(promise: Promise<unknown>): Promise<{ code: number; msg: string }> {
  const error: unknown = await promise.then(
    () => new Error("it did not fail"),
    (reason: unknown) => reason,
  );
  if (!(error instanceof CniError)) throw error;
  expect(`${error.message} ${error.details}`).not.toContain(server.token);
  expect(error.message).not.toContain("\n");
  const msg = error.message.replaceAll(server.url, "URL").replaceAll(dir, "DIR");
  return { code: error.code, msg };
}

/** Writes a kubeconfig of one cluster and one user, as JSON. */
let written = 0;
function writeConfig(cluster: object, user: object = {}, more: object = {}): string {
  const file = join(dir, `config-${written++}`);
  const data = {
    "current-context": "c",
    contexts: [{ name: "c", context: { cluster: "k", user: "u" } }],
    clusters: [{ name: "other" }, { name: "k", cluster: { server: server.url, ...cluster } }],
    users: [{ name: "u", user }],
    ...more,
  };
  writeFileSync(file, JSON.stringify(data));
  return file;
}
const trusted = () => ({ "certificate-authority-data": base64(pem("ca.crt")) });

describe("credentials", () => {
  test.each<Kind>(["token", "tokenFile", "clientCertificate", "exec"])(
    "getPod() works with a kubeconfig that has a %s",
    async (kind) => {
      const kube = await open(kind);
      expect(await kube.getPod("blue", "web")).toEqual(pod);
      expect(kube.requests).toBe(1);
    },
  );

  const rows: [string, () => string][] = [
    ["PEM in place", () => writeConfig(trusted(), certificateData())],
    ["relative paths", () => writeConfig({ "certificate-authority": "api/ca.crt" }, files)],
    ["a token file that wins over a token", () => writeConfig(trusted(), stale)],
    ["a token where its file is missing", () => writeConfig(trusted(), instead())],
    ["a name for TLS", () => writeConfig({ ...trusted(), ...tlsName }, tokenUser())],
    ["a trailing slash", () => writeConfig({ ...trusted(), server: `${server.url}/` }, files)],
    [
      "the brackets that Multus' installer wrote around every host",
      () =>
        writeConfig(
          { ...trusted(), server: server.url.replace("127.0.0.1", "[127.0.0.1]") },
          files,
        ),
    ],
    [
      "the same with a scheme in capitals",
      () => {
        const url = server.url.replace("https://127.0.0.1", "HTTPS://[127.0.0.1]");
        return writeConfig({ ...trusted(), server: url }, files);
      },
    ],
  ];
  const files = { "client-certificate": "api/client.crt", "client-key": "api/client.key" };
  const certificateData = () => ({
    "client-certificate-data": base64(pem("client.crt")),
    "client-key-data": base64(pem("client.key")),
  });
  const stale = { token: "stale", tokenFile: "api/token" };
  const tokenUser = () => ({ token: server.token });
  const instead = () => ({ ...tokenUser(), tokenFile: "nowhere" });
  const tlsName = { "tls-server-name": "kubernetes.default.svc" };
  test.each(rows)("getPod() works with %s", async (_name, write) => {
    const kube = await connect(makeHost(), settingsOf(write()));
    expect((await kube.getPod("blue", "web")).metadata.uid).toBe("u-1");
    expect(kube.server).toBe(server.url);
  });

  test("getPod() works with the service account of a pod", async () => {
    const { hostname, port } = new URL(server.url);
    const env = { KUBERNETES_SERVICE_HOST: hostname, KUBERNETES_SERVICE_PORT: port };
    const missing = { kubeconfig: join(dir, "none"), kubeconfigIsExplicit: false, timeoutMs: 5000 };
    const settings = { ...missing, serviceAccountDir: join(dir, "account") };
    expect(isConfigured(makeHost(), settings)).toBe(false);
    expect(isConfigured(makeHost(env), settings)).toBe(true);
    const kube = await connect(makeHost(env), settings);
    expect((await kube.getPod("blue", "web")).metadata.name).toBe("web");
    expect(kube.credential).toBe(join(dir, "account", "token"));
  });

  test("getPod() works with CNI-Genie's keys, alone and over a kubeconfig", async () => {
    const at = (name: string): string => join(server.dir, name);
    const keys = { apiRoot: `${server.url}/api/v1/`, certificateAuthority: at("ca.crt") };
    const alone = { kubeconfigIsExplicit: false, timeoutMs: 5000, ...keys };
    const certificate = { clientCertificate: at("client.crt"), clientKey: at("client.key") };
    const all = await Promise.all([
      connect(makeHost(), { ...alone, authToken: server.token }),
      connect(makeHost(), { ...alone, ...certificate }),
      open("wrongCa", keys),
    ]);
    for (const kube of all) expect((await kube.getPod("blue", "web")).metadata.uid).toBe("u-1");
    expect(all[0]?.credential).toBe("k8s_auth_token");
  });

  test("readSecrets() runs an exec plugin that reads stdin, with an empty variable", async () => {
    const file = join(dir, "reads-stdin");
    const format = '{"status":{"token":"%s-%s."}}';
    const script = `#!/bin/sh\nprintf '${format}' "$(cat)" "\${EMPTY-unset}"\n`;
    writeFileSync(file, script, { mode: 0o755 });
    const user = { exec: { command: file, env: [{ name: "EMPTY" }] } };
    const account = findAccount(makeHost(), settingsOf(writeConfig(trusted(), user)));
    expect((await readSecrets(account)).headers).toEqual({ Authorization: "Bearer -." });
  });

  test("readSecrets() runs an exec plugin that nobody is to find again", async () => {
    const { headers } = await readSecrets(
      findAccount(makeHost(), settingsOf(server.kubeconfig("exec"))),
    );
    expect(headers).toEqual({ Authorization: `Bearer ${server.token}` });
  });

  test("a token file is read for each request", async () => {
    const kube = await open("tokenFile");
    await kube.getPod("blue", "web");
    const { token } = server;
    server.token = "rotated";
    expect(await failure(kube.getPod("blue", "web"))).toEqual({
      code: code.tryAgainLater,
      msg:
        "Cannot get pods blue/web at URL: 401 Unauthorized, the server does not accept these " +
        "credentials (credentials: DIR/api/kubeconfig-tokenFile, DIR/api/token)",
    });
    writeFileSync(join(server.dir, "token"), "rotated\n");
    await kube.getPod("blue", "web");
    server.token = token;
    writeFileSync(join(server.dir, "token"), token);
  });
});

describe("credentials refused", () => {
  const prefix = "Invalid Kubernetes credentials in ";
  const rows: [string, () => string, number, string][] = [
    ["a missing file", () => join(dir, "gone"), 5, "DIR/gone: it does not exist"],
    ["text that is not YAML", () => raw("a: [secret"), 7, "neither YAML nor JSON (SyntaxError)"],
    ["an empty file", () => raw(""), 7, "it does not hold an object"],
    ["no current context", () => writeConfig({}, {}, { "current-context": "" }), 7, "no current-c"],
    ["an unknown context", () => writeConfig({}, {}, { contexts: [] }), 7, 'no context "c"'],
    ["an unknown cluster", () => writeConfig({}, {}, { clusters: 5 }), 7, 'no cluster "k"'],
    ["an unknown user", () => writeConfig({}, {}, { users: null }), 7, 'no user "u"'],
    ["a number for a token", () => writeConfig({}, { token: 42 }), 7, 'user "u": expected string'],
    ["no server", () => writeConfig({ server: null }), 7, '"k8s_api_root" in the CNI config'],
    ["brackets around no host", () => writeConfig({ server: "https://[]:1" }), 7, "not a URL"],
    ["a server that is no URL", () => writeConfig({ server: "a b" }), 7, "server is not a URL"],
    ["plain http", () => writeConfig({ server: "http://10.0.0.1" }), 7, "must be an https URL"],
    ["TLS unverified", () => writeConfig({ "insecure-skip-tls-verify": true }), 7, "not supported"],
    ["a proxy", () => writeConfig({ "proxy-url": "http://p" }), 7, '"proxy-url" is not supported'],
    ["impersonation", () => writeConfig({}, { as: "root" }), 7, '"as" is not supported'],
    ["a password", () => writeConfig({}, { username: "u", password: "p" }), 7, '"username" is not'],
    ["an empty token file", () => writeConfig({}, { tokenFile: raw(" \n") }), 7, "empty or malf"],
    ["a token of two lines", () => writeConfig({}, { token: "a\nb" }), 7, "empty or malformed"],
    ["no token file", () => writeConfig({}, { tokenFile: "gone" }), 5, "DIR/gone: it does not"],
    ["a folder as file", () => writeConfig({ "certificate-authority": dir }), 5, "DIR: EISDIR"],
    ["a CA that is not PEM", () => writeConfig({ "certificate-authority-data": "YQ==" }), 7, "PEM"],
    ["a certificate without key", () => writeConfig({}, certificate), 7, "its key come together"],
    ["damaged PEM", () => writeConfig({ "certificate-authority-data": damaged }), 11, "damaged?"],
    ["an exec that fails", () => exec("echo sorry >&2; exit 1"), 11, "exec ./run of DIR/config-"],
    ["an exec that fails silently", () => exec("exit 1"), 11, "it printed nothing on stderr"],
    ["an exec that prints a token", () => exec("echo eyJleHB"), 11, "its answer is no credential"],
    ["an exec that prints no token", () => exec("echo {}"), 11, "its answer is no credential"],
    ["an exec that is missing", () => writeConfig({}, { exec: { command: "./no" } }), 11, "ENOENT"],
  ];
  const certificate = { "client-certificate": "api/client.crt" };
  const damaged = base64("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
  const raw = (text: string): string => {
    const file = join(dir, `config-${written++}`);
    writeFileSync(file, text);
    return file;
  };
  const exec = (script: string): string => {
    writeFileSync(join(dir, "run"), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
    return writeConfig(trusted(), { exec: { command: "./run" } });
  };
  test.each(rows)("%s", async (_name, write, expected, words) => {
    const settings = settingsOf(write());
    expect(isConfigured(makeHost(), settings)).toBe(true);
    const attempt = connect(makeHost(), settings).then((kube) => kube.get(podPath));
    const { code: actual, msg } = await failure(attempt);
    expect({ code: actual, msg }).toEqual({ code: expected, msg: expect.stringContaining(words) });
    if (actual === 7) expect(msg).toStartWith(prefix);
    expect(msg).not.toContain("eyJ");
  });

  test("nothing configured", async () => {
    const settings = settingsOf(join(dir, "gone"), { kubeconfigIsExplicit: false });
    expect(isConfigured(makeHost(), settings)).toBe(false);
    expect((await failure(connect(makeHost(), settings))).msg).toStartWith(
      "Missing Kubernetes credentials: looked for DIR/gone and /var/run/secrets/",
    );
  });

  test("a file without permission", async () => {
    const file = writeConfig({});
    chmodSync(file, 0);
    // Root may read everything, so another user asks; connect() reads before it first waits.
    const isRoot = process.getuid?.() === 0;
    if (isRoot) process.seteuid?.(65534);
    const attempt = connect(makeHost(), settingsOf(file));
    if (isRoot) process.seteuid?.(0);
    const { code: actual, msg } = await failure(attempt);
    expect(actual).toBe(code.ioFailure);
    expect(msg).toEndWith(`${file.replace(dir, "DIR")}: permission denied`);
  });
});

describe("what CNI-Genie's installer wrote", () => {
  // launch.sh of every release: no server, no user, no verification; the rest is in genie.conf.
  const installed = (cluster: object = {}) =>
    writeConfig({ server: undefined, "insecure-skip-tls-verify": true, ...cluster }, {}, unnamed);
  const unnamed = { users: [{ name: "u" }] };
  const keys = () => ({ apiRoot: server.url, authToken: server.token });
  const node = (name: string, files: Record<string, string>) => {
    const root = join(dir, `node-${name}`);
    for (const [path, text] of Object.entries(files)) {
      mkdirSync(dirname(join(root, path)), { recursive: true });
      writeFileSync(join(root, path), text);
    }
    return root;
  };
  const kubelet = (cluster: object) =>
    JSON.stringify({ ...kubeletRest, clusters: [{ name: "k", cluster }] });
  const kubeletRest = {
    "current-context": "c",
    contexts: [{ name: "c", context: { cluster: "k", user: "u" } }],
    users: [{ name: "u", user: { "client-certificate": "/var/lib/kubelet/pki/x.pem" } }],
  };
  const byFile = { server: "https://192.0.2.1", "certificate-authority": "/pki/own.crt" };
  const other = () => readFileSync(join(server.dir, "ca2.crt"), "utf8");

  test.each<[string, () => Record<string, string>]>([
    ["kubeadm's kubelet, in place", () => ({ "etc/kubernetes/kubelet.conf": kubelet(trusted()) })],
    [
      "kubeadm's kubelet, by a path",
      () => ({ "etc/kubernetes/kubelet.conf": kubelet(byFile), "pki/own.crt": pem("ca.crt") }),
    ],
    [
      "a kubelet by a path beside it, as k0s",
      () => ({
        "var/lib/k0s/kubelet.conf": kubelet({ "certificate-authority": "pki/x.crt" }),
        "var/lib/k0s/pki/x.crt": pem("ca.crt"),
      }),
    ],
    ["kubeadm", () => ({ "etc/kubernetes/pki/ca.crt": pem("ca.crt") })],
    ["k3s", () => ({ "var/lib/rancher/k3s/agent/server-ca.crt": pem("ca.crt") })],
    ["microk8s", () => ({ "var/snap/microk8s/current/certs/ca.crt": pem("ca.crt") })],
    [
      "the first that is whole",
      () => ({
        "etc/kubernetes/kubelet.conf": "{",
        "var/lib/kubelet/kubeconfig": kubelet({ "certificate-authority": "/gone" }),
        "etc/kubernetes/pki/ca.crt": "no PEM",
        "var/lib/k0s/pki/ca.crt": pem("ca.crt"),
      }),
    ],
  ])("works with the CA of the node: %s", async (name, files) => {
    const nodeRoot = node(name.replaceAll(/\W/g, "-"), files());
    let said = "";
    const host = { ...makeHost(), stderr: (text: string) => (said += text) };
    const kube = await connect(host, settingsOf(installed(), { ...keys(), nodeRoot }));
    expect((await kube.getPod("blue", "web")).metadata.uid).toBe("u-1");
    expect(said).toContain('set "certificate-authority"');
    expect(said).not.toContain(server.token);
  });

  test("works with a CA of its own, beside the key that asks for no verification", async () => {
    const own = installed(trusted());
    const kube = await connect(makeHost(), settingsOf(own, keys()));
    expect((await kube.getPod("blue", "web")).metadata.uid).toBe("u-1");
    expect(kube.warning).toContain("is ignored, TLS is verified");
    const certificateAuthority = join(server.dir, "ca.crt");
    const byKey = await connect(
      makeHost(),
      settingsOf(installed(), { ...keys(), certificateAuthority }),
    );
    expect((await byKey.getPod("blue", "web")).metadata.uid).toBe("u-1");
  });

  test("works without any CA, by that of the node", async () => {
    const nodeRoot = node("kubeadm", { "etc/kubernetes/pki/ca.crt": pem("ca.crt") });
    const plain = settingsOf(installed({ "insecure-skip-tls-verify": undefined }), keys());
    const kube = await connect(makeHost(), { ...plain, nodeRoot });
    expect((await kube.getPod("blue", "web")).metadata.uid).toBe("u-1");
    const none = await connect(makeHost(), plain);
    expect(await failure(none.get(podPath))).toEqual({
      code: 11,
      msg: expect.stringContaining('no CA is named: set "certificate-authority"'),
    });
  });

  test("is refused where the node has no CA, with what is missing", async () => {
    const attempt = connect(makeHost(), settingsOf(installed(), keys()));
    const { code: actual, msg } = await failure(attempt);
    expect(actual).toBe(7);
    expect(msg).toContain('set "certificate-authority"');
    expect(msg).toContain("kubectl get configmap kube-root-ca.crt");
  });

  test("is verified: the CA of another cluster is not enough", async () => {
    const before = server.requests.length;
    const nodeRoot = node("other", { "etc/kubernetes/pki/ca.crt": other() });
    const kube = await connect(makeHost(), settingsOf(installed(), { ...keys(), nodeRoot }));
    expect((await failure(kube.get(podPath))).code).toBe(11);
    expect(server.requests.length).toBe(before);
  });

  test.each(["http://10.96.0.1:8080", "http://127.0.0.1:8080/api/v1/", "http://localhost:8080"])(
    "k8s_api_root %s is refused with the remedy",
    async (apiRoot) => {
      const settings = settingsOf(writeConfig(trusted()), { ...keys(), apiRoot });
      expect(await failure(connect(makeHost(), settings))).toEqual({
        code: 7,
        msg: expect.stringContaining('must be an https URL in k8s_api_root: set it to "https://'),
      });
    },
  );
});

describe("the server is verified", () => {
  const rows: [string, () => string][] = [
    ["another CA", () => server.kubeconfig("wrongCa")],
    ["no CA", () => writeConfig({}, { token: server.token })],
    ["another name", () => writeConfig({ ...trusted(), "tls-server-name": "x" }, { token: "t" })],
  ];
  test.each(rows)("%s is refused, no request is sent", async (_name, write) => {
    const before = server.requests.length;
    const kube = await connect(makeHost(), settingsOf(write()));
    expect(await failure(kube.get(podPath))).toEqual({
      code: code.tryAgainLater,
      msg: expect.stringContaining("the server's certificate is not valid for our CA or its name"),
    });
    expect(server.requests.length).toBe(before);
  });

  test("NODE_TLS_REJECT_UNAUTHORIZED=0 has no effect; only exec loads client-node", async () => {
    const script = `
      import { connect } from ${JSON.stringify(clientModule)};
      const host = { env: {}, signal: new AbortController().signal };
      const words = [];
      for (const kubeconfig of process.argv.slice(1)) {
        const settings = { kubeconfig, kubeconfigIsExplicit: true, timeoutMs: 5000 };
        const kube = await connect(host, settings);
        const pod = kube.getPod("blue", "web");
        words.push(await pod.then((pod) => pod.metadata.name, (error) => error.code));
        words.push(Object.keys(require.cache).some((path) => path.includes("client-node")));
      }
      console.log(words.join(" "));`;
    const configs = (["wrongCa", "token", "exec"] as const).map(server.kubeconfig);
    const child = Bun.spawn(["bun", "-e", script, ...configs], {
      cwd: join(import.meta.dir, ".."),
      env: { ...process.env, NODE_TLS_REJECT_UNAUTHORIZED: "0" },
      stdio: ["ignore", "pipe", "inherit"],
    });
    expect(await child.stdout.text()).toBe("11 false web false web true\n");
  });
});

describe("answers", () => {
  const rows: [string, (Fault | "none")[], string, number][] = [
    ["403", [status(403)], '403 Forbidden, grant these credentials the verb "get" on "pods"', 1],
    ["404", [status(404)], "404, it does not exist", 1],
    ["500 twice", [status(500), status(500)], "status 500", 2],
    ["429 with a long pause", [status(429, "60")], "429, the server is too busy", 1],
    ["a broken connection, twice", [{ kind: "reset" }, { kind: "reset" }], "ECONNRESET", 2],
    ["half an answer, twice", [{ kind: "half" }, { kind: "half" }], "ECONNRESET", 2],
    ["50 MB", [{ kind: "flood", bytes: 50 << 20 }], "the answer is larger than 8388608 bytes", 1],
    ["a redirect", [{ kind: "redirect", location: "/x" }], "302, a redirect, is refused", 1],
    ["no JSON", [{ kind: "garbage", text: "<html>" }], "the answer is not a JSON object", 1],
    ["an array", [{ kind: "garbage", text: "[]" }], "the answer is not a JSON object", 1],
    ["no object", [{ kind: "garbage", text: "{}" }], "the answer is no object of the API", 1],
    ["not a pod", [garbage({ name: "web" })], "the answer is no pod", 1],
    ["another pod", [garbage({ name: "db" })], "the answer is another object, db", 1],
    [
      "a pod of another namespace",
      [garbage({ name: "web", namespace: "red" })],
      "the answer is another object, red/web",
      1,
    ],
    ["a status of 0", [bytes("000 x", "\r\n", '{"metadata":{"name":"web"}}')], "status 0", 1],
    [
      "an answer that is compressed, though nobody asked for it",
      [bytes("200 OK", "Content-Encoding: gzip\r\n\r\n", "garbage")],
      "the answer is not a JSON object",
      1,
    ],
  ];
  test.each(rows)("getPod() fails on %s", async (_name, faults, words, requests) => {
    server.misbehave(...faults);
    const kube = await open();
    const { code: actual, msg } = await failure(kube.getPod("blue", "web"));
    expect({ actual, msg }).toEqual({ actual: 11, msg: expect.stringContaining(words) });
    expect(msg).toStartWith("Cannot get pods blue/web at URL: ");
    expect(msg).toEndWith("(credentials: DIR/api/kubeconfig-token)");
    expect(kube.requests).toBe(requests);
  });

  const once: Fault[] = [status(500), status(429, "0"), { kind: "reset" }, { kind: "half" }];
  test.each(once)("getPod() survives one %j", async (fault) => {
    server.misbehave(fault);
    const kube = await open();
    expect(await kube.getPod("blue", "web")).toEqual(pod);
    expect(kube.requests).toBe(2);
  });

  function garbage(metadata: object): Fault {
    return { kind: "garbage", text: JSON.stringify({ kind: "Pod", metadata }) };
  }

  function bytes(status: string, headers: string, body: string): Fault {
    return { kind: "raw", parts: [`HTTP/1.1 ${status}\r\n${headers}${body}`], ending: "end" };
  }

  const later = (ms: number): string => new Date(Date.now() + ms).toUTCString();
  const tolds: [string, Fault[], string, number][] = [
    ["a second", [status(429, "1")], "", 2],
    ["again and again", Array<Fault>(5).fill(status(429, "0")), "", 6],
    ["for ever", Array<Fault>(20).fill(status(429, "0")), "429, the server is too busy", 11],
    ["a date that is over", [status(503, later(-60_000))], "", 2],
    ["too long", [status(503, "60")], "status 503, it says to come back in 60 s", 1],
    ["a date too far", [status(429, later(86_400_000))], "it says to come back in 86", 1],
    ["a number without end", [status(429, "9".repeat(400))], "too busy", 1],
    ["nonsense, twice", [status(429, "soon"), status(429, "-1")], "429, the server is too busy", 2],
  ];
  test.each(tolds)("a server that says to wait: %s", async (_name, faults, words, requests) => {
    server.misbehave(...faults);
    const kube = await open();
    const pending = kube.getPod("blue", "web");
    if (words === "") await pending;
    else expect((await failure(pending)).msg).toContain(words);
    expect(kube.requests).toBe(requests);
    server.heal();
  });

  function status(number: number, retryAfter?: string): Fault {
    return { kind: "status", status: number, ...(retryAfter !== undefined && { retryAfter }) };
  }

  test("a server that hangs costs the deadline, not more", async () => {
    server.misbehave({ kind: "hang" });
    const kube = await open("token", { timeoutMs: 200 });
    const begin = performance.now();
    expect((await failure(kube.get(podPath))).msg).toContain("no answer within 200 ms");
    expect(performance.now() - begin).toBeGreaterThan(190);
    expect(kube.requests).toBe(1);
  });

  test("what a server said before it hung is told", async () => {
    server.misbehave(status(503), { kind: "hang" });
    const kube = await open("token", { timeoutMs: 1000 });
    expect((await failure(kube.get(podPath))).msg).toContain(
      ": no answer within 1000 ms, before that: status 503 (credentials: ",
    );
  });

  test("a plugin for credentials that hangs is ended at the deadline, with its child", async () => {
    const pids = join(dir, "hang.pids");
    const script = `#!/bin/sh\nsleep 300 &\necho $$ $! > ${pids}\nwait\n`;
    writeFileSync(join(dir, "hang"), script, { mode: 0o755 });
    const file = writeConfig(trusted(), { exec: { command: "./hang" } });
    const kube = await connect(makeHost(), settingsOf(file, { timeoutMs: 1500 }));
    expect((await failure(kube.get(podPath))).msg).toContain("no answer within 1500 ms");
    expect(kube.requests).toBe(0);
    const running = readFileSync(pids, "utf8").trim().split(" ").map(Number).map(processStarted);
    expect(running).toEqual(["", ""]);
  });

  test("a server that is not there is named", async () => {
    const file = writeConfig({ server: "https://127.0.0.1:1" });
    const kube = await connect(makeHost({ HTTPS_PROXY: "x" }), settingsOf(file));
    const { msg } = await failure(kube.get(["apis", "k8s.cni.cncf.io", "v1", "networks"]));
    expect(msg).toStartWith(
      "Cannot list networks.k8s.cni.cncf.io at https://127.0.0.1:1: the connection failed " +
        "(ECONNREFUSED, HTTPS_PROXY is set) (credentials: DIR/config-",
    );
  });

  test("the end of the host ends a request", async () => {
    server.misbehave({ kind: "hang" });
    const end = new AbortController();
    const host = makeHost({}, end.signal);
    const kube = await connect(host, settingsOf(server.kubeconfig("token")));
    const begin = server.requests.length;
    const pending = failure(kube.get(podPath));
    while (server.requests.length === begin) await Bun.sleep(1);
    end.abort();
    expect((await pending).msg).toContain("we were asked to end");
  });
});

describe("requests", () => {
  test.each(["", ".", "..", "a/b", "a%2fb", "a\nb", "\ud800", "x".repeat(254)])(
    "the name %.20j is refused before anything is sent",
    async (name) => {
      const kube = await open();
      const { code: actual, msg } = await failure(kube.getPod("blue", name));
      expect({ actual, msg }).toEqual({ actual: 7, msg: expect.stringContaining("Invalid name") });
      expect(kube.requests).toBe(0);
    },
  );

  test.each([
    ["a?b#c", "a%3Fb%23c"],
    ["a b&c=d", "a%20b%26c%3Dd"],
    ["ä;@", "%C3%A4%3B%40"],
  ])("the name %j is sent as %s", async (name, encoded) => {
    const kube = await open();
    const error = await kube.getPod("blue", name).catch((reason: unknown) => reason);
    expect(isNotFound(error)).toBe(true);
    expect(server.requests.at(-1)?.path).toBe(`/api/v1/namespaces/blue/pods/${encoded}`);
  });

  test("get() reads a list, patch() merges, refuses a stale version; post() creates", async () => {
    const kube = await open();
    const path = ["apis", "g.io", "v1", "namespaces", "red", "things"];
    const made = await kube.post(path, { metadata: { name: "one" }, a: { b: 1 } });
    expect(made).toMatchObject({ metadata: { name: "one", resourceVersion: "1" } });
    const one = [...path, "one", "status"];
    expect(await kube.patch(one, { a: { b: null, c: 2 } })).toMatchObject({ a: { c: 2 } });
    const stale = kube.patch(one, { metadata: { resourceVersion: "1" }, a: 3 });
    const error: unknown = await stale.catch((reason: unknown) => reason);
    expect([isConflict(error), isNotFound(error), statusOf(error)]).toEqual([true, false, 409]);
    expect(String(error)).toContain("Cannot patch things.g.io/status red/one at");
    expect(await kube.get(path)).toMatchObject({ items: [{ a: { c: 2 } }] });
    expect((await failure(kube.post(path, { metadata: { name: "one" } }))).msg).toContain("create");
    expect(server.requests.at(-4)?.contentType).toBe("application/merge-patch+json");
  });

  test("post() is not repeated after a broken connection, patch() is", async () => {
    const kube = await open();
    server.misbehave({ kind: "reset" });
    const path = ["api", "v1", "namespaces", "blue", "events"];
    expect((await failure(kube.post(path, {}))).msg).toContain("ECONNRESET");
    expect(kube.requests).toBe(1);
    server.misbehave({ kind: "reset" });
    await kube.patch(podPath, {});
    expect(kube.requests).toBe(3);
    server.put("/api/v1/namespaces/blue/pods/web", pod);
  });
});
