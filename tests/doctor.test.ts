/**
 * `genie doctor`, by the compiled program in throw-away roots of a node that has one fault each:
 * lib/node/doctor.ts, lib/node/doctor_node.ts, lib/node/node_view.ts, lib/report/record_reader.ts.
 */
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { chmodSync, copyFileSync, cpSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { gzipSync } from "node:zlib";
import { closeState, write } from "../lib/database.ts";
import { foreignMachine } from "../lib/node/doctor.ts";
import { checkApi, nodeRoutes } from "../lib/node/doctor_node.ts";
import { ownList } from "../lib/node/genie_config.ts";
import { type Finding, formatFindings, viewNode } from "../lib/node/node_view.ts";
import { openState } from "../lib/recovery/database.ts";
import manifest from "../package.json";
import { type ApiServer, accountToken, startApiServer } from "./apiserver.ts";
import { fakePlugin, makeHost, tempDir } from "./fakes.ts";
import { compiledGenie, spawnGenie } from "./wire.ts";

const base = tempDir();
const healthy = join(base.path, "healthy");
const own = "etc/cni/net.d/00-genie.conflist";
const table = "etc/cni/genie/plugins.toml";
const spoken = { VERSION: { cniVersion: "1.0.0", supportedVersions: ["0.4.0", "1.0.0"] } };
const script = (output: string) => `#!/bin/sh\ncat >/dev/null\ncat <<'END'\n${output}\nEND\n`;
const speaks = (...versions: string[]) =>
  script(JSON.stringify({ ...spoken.VERSION, supportedVersions: versions }));

const blue = {
  cniVersion: "1.0.0",
  name: "blue",
  plugins: [{ type: "bridge", ipam: { type: "host-local", subnet: "10.244.0.0/24" } }],
};

function put(root: string, name: string, content: string | object | Uint8Array, mode = 0o644) {
  const path = join(root, name);
  mkdirSync(dirname(path), { recursive: true });
  const isBytes = typeof content === "string" || content instanceof Uint8Array;
  writeFileSync(path, isBytes ? content : JSON.stringify(content), { mode });
  chmodSync(path, mode);
}

const routes =
  "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n" +
  "eth0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\n" +
  "eth0\t0000A8C0\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\n" +
  "cni0\t0000F40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\n";

beforeAll(() => {
  put(healthy, own, ownList());
  put(healthy, "etc/cni/net.d/10-blue.conflist", blue);
  put(healthy, table, "[default]\nnetworks = ['blue']\n");
  for (const name of ["bridge", "host-local"]) {
    put(healthy, `opt/cni/bin/${name}`, speaks("0.4.0", "1.0.0"), 0o755);
  }
  put(healthy, "opt/cni/bin/genie", script(JSON.stringify({ version: manifest.version })), 0o755);
  for (const name of ["ip", "nsenter"]) put(healthy, `usr/sbin/${name}`, "#!/bin/sh\n", 0o755);
  put(healthy, "usr/bin/containerd", script("containerd github.com/x v1.7.2 abc"), 0o755);
  put(healthy, "etc/containerd/config.toml", containerd());
  put(healthy, "proc/sys/kernel/osrelease", "6.1.0\n");
  put(healthy, "proc/modules", "bridge 1 0 - Live\nveth 2 0 - Live\n");
  put(healthy, "proc/stat", "cpu 1\nbtime 1700000000\n");
  put(healthy, "proc/net/route", routes);
});
afterAll(() => base[Symbol.dispose]());

/** containerd's config, version 2, with more lines for CNI. */
function containerd(cni = "", top = ""): string {
  return `version = 2\n${top}\n[plugins."io.containerd.grpc.v1.cri".cni]\n${cni}\n`;
}

let count = 0;
/** What the program finds on a healthy node after `change`. */
async function examine(change: (root: string) => void = () => undefined) {
  const root = join(base.path, `node-${count++}`);
  cpSync(healthy, root, { recursive: true });
  change(root);
  const run = await spawnGenie([compiledGenie(), "doctor", "--json", "--host-root", root], {});
  expect(run.stderr).toBe("");
  const { ok, findings } = JSON.parse(run.stdout) as { ok: boolean; findings: Finding[] };
  expect(run.status).toBe(ok ? 0 : 1);
  rmSync(root, { recursive: true });
  for (const one of findings) {
    expect([one, one.remedy === ""]).toEqual([one, one.verdict === "ok"]);
  }
  return findings;
}

/** In short, what is not in order. */
const issues = (findings: Finding[]) =>
  findings
    .filter(({ verdict }) => verdict !== "ok")
    .map(({ check, verdict, detail }) => `${verdict} ${check}: ${detail}`);

const attach = (root: string, state: string, atMs: number) => {
  const opened = openState(makeHost(), join(root, "var/lib/cni/genie"));
  write(opened, () =>
    opened.database
      .query(
        `INSERT INTO attachments (container_id, request_ifname, ifname, position, network,
           request_network, state, plan, netns_id, created_at_ms)
         VALUES ('c', 'eth0', 'eth0', 0, 'blue', 'genie', ?, '{}', '', ?)`,
      )
      .run(state, atMs),
  );
  closeState(opened);
};
const sql = (root: string, text: string) => {
  const opened = openState(makeHost(), join(root, "var/lib/cni/genie"));
  write(opened, () => opened.database.run(text));
  closeState(opened);
};

describe("genie doctor", () => {
  test("finds nothing wrong with a node that is well", async () => {
    const findings = await examine();
    expect(issues(findings)).toEqual([]);
    expect(new Set(findings.map(({ check }) => check)).size).toBe(14);
    expect(findings.find(({ check }) => check === "runtime")?.detail).toContain("config.toml");
  });

  const conf = (name: string) => `etc/cni/net.d/${name}`;
  const bin = (name: string) => `opt/cni/bin/${name}`;
  const foreign = Buffer.concat([
    Buffer.from([0x7f, 0x45, 0x4c, 0x46, 2, 1, 1]),
    Buffer.alloc(11),
    Buffer.from([process.arch === "x64" ? 0xb7 : 0x3e, 0, 0, 0]),
  ]);
  const policy = "[default]\nnetworks = ['blue']\n[policy]\nenforce = true\n";

  test.each<[string, (root: string) => void, RegExp]>([
    [
      "no genie",
      (root) => rmSync(join(root, bin("genie"))),
      /^problem installed: genie is in none/,
    ],
    [
      "another genie",
      (root) => put(root, bin("genie"), script('{"version":"0.0.1"}'), 0o755),
      /^warning installed: genie 0\.0\.1 is installed/,
    ],
    [
      "a genie that does not run",
      (root) => put(root, bin("genie"), "#!/bin/false\n", 0o755),
      /^problem installed: .* is no genie/,
    ],
    ["no config", (root) => rmSync(join(root, own)), /^problem order: runtimes take 10-blue/],
    [
      "a hijacker",
      (root) => put(root, conf("00-aaa.conf"), { name: "x", type: "flannel" }),
      /^problem order: runtimes take 00-aaa\.conf \(flannel\)/,
    ],
    [
      "Cilium",
      (root) => put(root, conf("10-blue.conf.cilium_bak"), "{}"),
      /^problem order: 10-blue\.conf\.cilium_bak: Cilium/,
    ],
    [
      "Multus",
      (root) =>
        put(root, conf("00-multus.conf"), { cniVersion: "1.0.0", name: "m", type: "multus" }),
      /^warning order: 00-multus\.conf is a config of multus/,
    ],
    [
      "a broken file",
      (root) => put(root, conf("50-x.conf"), "{"),
      /^warning order: 50-x\.conf is no/,
    ],
    [
      "two that call genie",
      (root) => put(root, conf("01-g.conf"), { cniVersion: "1.0.0", name: "g", type: "genie" }),
      /^warning order: 00-genie\.conflist and 01-g\.conf call genie/,
    ],
    [
      "no annotations",
      (root) =>
        put(root, own, { cniVersion: "1.0.0", name: "genie", plugins: [{ type: "genie" }] }),
      /^warning order: genie's config does not ask for annotations/,
    ],
    [
      "an unfinished uninstall",
      (root) =>
        put(root, own, {
          cniVersion: "1.0.0",
          name: "blue",
          plugins: [{ type: "bridge" }, { type: "genie", delOnly: true }],
        }),
      /^warning order: genie is being uninstalled/,
    ],
    [
      "another conf dir",
      (root) => put(root, "etc/containerd/config.toml", containerd('conf_dir = "/etc/net"')),
      /^problem runtime: .* reads CNI configs from \/etc\/net/,
    ],
    [
      "another bin dir",
      (root) => put(root, "etc/containerd/config.toml", containerd('bin_dir = "/usr/cni"')),
      /^problem runtime: .* looks for plugins in \/usr\/cni/,
    ],
    [
      "many configs",
      (root) => put(root, "etc/containerd/config.toml", containerd("max_conf_num = 0")),
      /^problem runtime: .* max_conf_num = 0/,
    ],
    [
      "containerd without CRI",
      (root) =>
        put(root, "etc/containerd/config.toml", containerd("", 'disabled_plugins = ["cri"]')),
      /^warning runtime: .* switches CRI off/,
    ],
    [
      "containerd 2 with another conf dir",
      (root) =>
        put(
          root,
          "etc/containerd/config.toml",
          'version = 3\n[plugins."io.containerd.cri.v1.runtime".cni]\nconf_dir = "/etc/net"\n',
        ),
      /^problem runtime: .* \/etc\/net/,
    ],
    [
      "an old containerd",
      (root) => put(root, "usr/bin/containerd", script("containerd x 1.4.13 abc"), 0o755),
      /^warning runtime: containerd 1\.4\.13 hands over no annotations/,
    ],
    [
      "an old containerd of a distribution",
      (root) => put(root, "usr/bin/containerd", script("containerd x 1.4.13~ds1 1.4-2"), 0o755),
      /^warning runtime: containerd 1\.4\.13 hands over no annotations/,
    ],
    [
      "CRI-O with another network",
      (root) =>
        put(root, "etc/crio/crio.conf.d/10.conf", '[crio.network]\ncni_default_network = "blue"\n'),
      /^problem runtime: .* cni_default_network = "blue"/,
    ],
    [
      "CRI-O and merged results",
      (root) => put(root, "usr/bin/crio", script("crio version 1.30.1"), 0o755),
      /^warning runtime: crio 1\.30\.1 takes every address/,
    ],
    [
      "no runtime",
      (root) => {
        rmSync(join(root, "usr/bin/containerd"));
        rmSync(join(root, "etc/containerd"), { recursive: true });
      },
      /^warning runtime: no container runtime/,
    ],
    ["a wrong table", (root) => put(root, table, "nonsense = 1\n"), /^problem table: .*nonsense/],
    [
      "a default that is none",
      (root) => put(root, table, "[default]\nnetworks = ['red']\n"),
      /^problem table: default\.networks names red/,
    ],
    [
      "a missing plugin",
      (root) => rmSync(join(root, bin("bridge"))),
      /^problem plugins: bridge \(blue\)/,
    ],
    [
      "a missing IPAM",
      (root) => rmSync(join(root, bin("host-local"))),
      /^problem plugins: host-local/,
    ],
    [
      "a plugin that cannot run",
      (root) => chmodSync(join(root, bin("bridge")), 0o644),
      /^problem plugins: .*bridge cannot be run/,
    ],
    [
      "a plugin others may change",
      (root) => chmodSync(join(root, bin("bridge")), 0o777),
      /^problem plugins: .*bridge can be changed by others/,
    ],
    [
      "a plugin of another machine",
      (root) => put(root, bin("bridge"), foreign, 0o755),
      /^problem plugins: .*bridge is for another machine/,
    ],
    [
      "an old plugin",
      (root) => put(root, bin("bridge"), speaks("0.3.1", "0.4.0"), 0o755),
      /^problem plugins: bridge \(blue\) does not speak CNI 1\.0\.0/,
    ],
    [
      "an old plugin, which another list asks for no more than it knows",
      (root) => {
        put(root, bin("bridge"), speaks("0.3.1", "0.4.0"), 0o755);
        put(root, conf("30-old.conflist"), {
          ...{ cniVersion: "0.4.0", name: "old" },
          plugins: [{ type: "bridge", bridge: "old0" }],
        });
      },
      /^problem plugins: bridge \(blue\) does not speak CNI 1\.0\.0/,
    ],
    [
      "a plugin without a word",
      (root) => put(root, bin("bridge"), "#!/bin/sh\necho nonsense\n", 0o755),
      /^problem plugins: .*bridge does not answer VERSION/,
    ],
    [
      "no nsenter",
      (root) => rmSync(join(root, "usr/sbin/nsenter")),
      /^warning tools: nsenter is not/,
    ],
    ["policy without nft", (root) => put(root, table, policy), /^problem tools: nft is not/],
    [
      "networks that overlap",
      (root) =>
        put(root, conf("20-red.conflist"), {
          ...blue,
          name: "red",
          plugins: [{ type: "bridge", ipam: { type: "host-local", subnet: "10.244.0.128/25" } }],
        }),
      /^warning overlap: 10\.244\.0\.0\/24 of blue overlaps 10\.244\.0\.128\/25 of red/,
    ],
    [
      "a key of Multus in a config that is not Multus'",
      (root) =>
        put(root, conf("00-genie.conflist"), {
          ...ownList(),
          plugins: [{ type: "genie", namespaceIsolation: true, logLevel: "debug" }],
        }),
      /^warning order: genie's CNI config has namespaceIsolation, and that is ignored/,
    ],
    [
      "a route of the node",
      (root) => put(root, "proc/net/route", routes.replace("0000A8C0", "0000F40A")),
      /^warning overlap: .* overlaps the node's route 10\.244\.0\.0\/16 by eth0/,
    ],
    [
      "no addresses left",
      (root) => {
        const ranges = [[{ subnet: "10.244.0.0/30" }]];
        const ipam = { type: "host-local", ranges, dataDir: join(root, "networks") };
        put(root, conf("10-blue.conflist"), { ...blue, plugins: [{ type: "bridge", ipam }] });
        put(root, "networks/blue/10.244.0.2", "c eth0");
      },
      /^problem capacity: blue has 0 of 1 IPv4 addresses left/,
    ],
    [
      "a kernel without veth",
      (root) => put(root, "proc/modules", "bridge 1 0\n"),
      /^warning kernel: kernel 6\.1\.0: no trace of veth/,
    ],
    [
      "policy to enforce, and no agent",
      (root) => put(root, table, "policy.enforce = true\n"),
      /^problem policy: pods on networks with network policy are refused \(code 11\): nothing is/,
    ],
    [
      "a damaged record",
      (root) => put(root, "var/lib/cni/genie/genie.db", "no database"),
      /^problem record: /,
    ],
    [
      "a record for all to read",
      (root) => {
        attach(root, "attached", 1);
        chmodSync(join(root, "var/lib/cni/genie/genie.db"), 0o644);
      },
      /^problem record: .* can be read by others/,
    ],
    ["a leak", (root) => attach(root, "leaked", 1), /^warning record: 1 attachments are leaked/],
    [
      "a lost ADD",
      (root) => attach(root, "planned", 1),
      /^warning record: 1 attachments were never/,
    ],
    [
      "a status that waits",
      (root) => sql(root, "INSERT INTO statuses VALUES ('c','eth0','n','p','u','{}',1)"),
      /^warning record: 1 network statuses wait/,
    ],
    [
      "a record set aside",
      (root) => put(root, "var/lib/cni/genie/genie.db.unusable-1", "x"),
      /^warning record: .* was damaged and set aside/,
    ],
    [
      "a clock before boot",
      (root) => put(root, "proc/stat", "btime 99999999999\n"),
      /^problem clock: .*before the machine was booted/,
    ],
  ])("sees %s", async (_what, change, expected) => {
    const found = issues(await examine(change));
    expect(found).toContainEqual(expect.stringMatching(expected));
  });

  test("weaver's range is one for all its networks, and for its own route", async () => {
    const weave = (file: string, name: string, plugin: object) => (root: string) =>
      put(root, conf(file), { cniVersion: "0.3.0", name, plugins: [plugin] });
    const ipam = { type: "weave-ipam", subnet: "10.40.0.0/16" };
    const found = await examine((root) => {
      weave("20-weave.conflist", "weave", { type: "weave-net", ipam: { subnet: "10.32.0.0/12" } })(
        root,
      );
      weave("30-part.conflist", "part", { type: "bridge", ipam })(root);
      weave("40-own.conflist", "own", { type: "bridge", ipam: { ...ipam, type: "host-local" } })(
        root,
      );
      // 10.32.0.0/12 by weave
      put(
        root,
        "proc/net/route",
        `${routes}weave\t0000200A\t00000000\t1\t0\t0\t0\t0000F0FF\t0\t0\t0\n`,
      );
    });
    const overlaps = issues(found).filter((one) => one.includes(" overlap"));
    // What host-local gives out of that range may be in use.
    expect(overlaps.filter((one) => !one.includes(" own"))).toEqual([]);
    expect(overlaps.length).toBeGreaterThan(1);
  });

  test("reads kernel options where there are no modules", async () => {
    const found = await examine((root) => {
      put(root, "proc/modules", "");
      put(root, "proc/config.gz", gzipSync("CONFIG_BRIDGE=y\nCONFIG_VETH=m\n"));
    });
    expect(issues(found)).toEqual([]);
  });

  test("fits a terminal of 80 columns, whatever the names", () => {
    const detail = `a ${"long ".repeat(40)} ${"x".repeat(200)} \u001b[31m end`;
    const text = formatFindings(
      [
        { check: "order", verdict: "problem", detail, remedy: detail },
        { check: "a", verdict: "ok", detail: "fine", remedy: "" },
      ],
      80,
    );
    for (const line of text.split("\n")) expect(Bun.stringWidth(line)).toBeLessThanOrEqual(80);
    expect(text).toContain("1 problem, 0 warnings, 1 ok");
    expect(text).not.toContain("\u001b");
  });

  test("prints for people", async () => {
    const run = await spawnGenie([compiledGenie(), "doctor", "--host-root", healthy], {});
    expect([run.stderr, run.status]).toEqual(["", 0]);
    expect(run.stdout).toMatch(/^ok {7}order +runtimes take 00-genie\.conflist/m);
    expect(run.stdout).toContain("0 problems, 0 warnings");
  });
});

describe("parts", () => {
  test("foreignMachine() of our own, of a script, of a short file", () => {
    using dir = tempDir();
    expect(foreignMachine(compiledGenie())).toBeUndefined();
    expect(
      foreignMachine(fakePlugin(dir.path, "a", `#!/bin/sh\n${"# ".repeat(20)}`)),
    ).toBeUndefined();
    expect(foreignMachine(fakePlugin(dir.path, "b", "x"))).toBeUndefined();
  });

  test("nodeRoutes() leaves out what every node has", () => {
    const six =
      "fd000000000000000000000000000000 40 00000000000000000000000000000000 00 " +
      "00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n" +
      "fe800000000000000000000000000000 40 00000000000000000000000000000000 00 " +
      "00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth0\n" +
      "00000000000000000000000000000001 80 00000000000000000000000000000000 00 " +
      "00000000000000000000000000000000 00000000 00000002 00000000 80200001       lo\n";
    const read = (path: string) => (path.endsWith("ipv6_route") ? six : routes);
    expect(nodeRoutes({ read })).toEqual([
      { subnet: "192.168.0.0/16", device: "eth0" },
      { subnet: "10.244.0.0/24", device: "cni0" },
      { subnet: "fd00:0000:0000:0000:0000:0000:0000:0000/64", device: "eth0" },
    ]);
  });
});

describe("the API", () => {
  let api: ApiServer;
  beforeAll(async () => {
    api = await startApiServer(join(base.path, "api"));
  });
  afterAll(() => api.stop());

  /** Asks the server as a node with that kubeconfig; `allowed` says what it grants. */
  async function ask(allowed: (attributes: Record<string, string>) => boolean, now = Date.now()) {
    const root = join(base.path, `api-${count++}`);
    cpSync(healthy, root, { recursive: true });
    mkdirSync(join(root, "etc/cni/genie"), { recursive: true });
    const kubeconfig = join(root, "etc/cni/genie/kubeconfig");
    copyFileSync(api.kubeconfig("token"), kubeconfig);
    chmodSync(kubeconfig, 0o600);
    api.review = allowed;
    return {
      root,
      look: async () => checkApi(await viewNode(makeHost({ now }), root, "/etc/cni/net.d")),
    };
  }

  test("grants everything", async () => {
    const { look } = await ask(() => true);
    expect(await look()).toMatchObject([
      { verdict: "ok", detail: expect.stringContaining("grants all") },
    ]);
    const asked = api.requests.map(({ path }) => path);
    expect(new Set(asked)).toEqual(
      new Set(["/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"]),
    );
  });

  test("denies some: each is named", async () => {
    const { look } = await ask(({ resource, verb }) => resource !== "events" && verb !== "patch");
    expect((await look()).map(({ detail }) => detail)).toEqual([
      "no right to patch pods/status",
      "no right to create events",
      "no right to get events",
      "no right to patch events",
    ]);
  });

  test("has another clock", async () => {
    const { look } = await ask(() => true, Date.now() + 120_000);
    expect(await look()).toContainEqual({
      verdict: "problem",
      detail: expect.stringMatching(/the clock is 1[12]\d s ahead of the API server's/),
      remedy: expect.any(String),
    });
  });

  const nowMs = Date.now();
  const [hour, day] = [3600, 24 * 3600];
  const pod = { pod: { name: "genie-x" } };
  test.each([
    ["has half its life left", -day, 6 * day, {}, "ok", "grants all rights"],
    [
      "is one of a strict server, and fresh",
      -0.2 * hour,
      0.8 * hour,
      {},
      "ok",
      "grants all rights",
    ],
    ["ends within a day", -6.2 * day, 0.8 * day, {}, "warning", "genie ends at 20"],
    ["is one of a strict server, and old", -0.9 * hour, 0.1 * hour, {}, "warning", "ends at 20"],
    ["has ended", -8 * day, -day, {}, "problem", "genie ended at 20"],
    ["ends with the pod of the agent", -hour, 364 * day, pod, "warning", "with the agent's pod"],
  ])("a token that %s", async (_what, from, to, more, verdict, words) => {
    const { token } = api;
    const times = [Math.round(nowMs / 1000 + from), Math.round(nowMs / 1000 + to)] as const;
    api.token = accountToken("genie-system:genie", times, more);
    const { look } = await ask(() => true, nowMs);
    const results = await look();
    expect(results[0]).toMatchObject({ verdict, detail: expect.stringContaining(words) });
    expect(results).toHaveLength(verdict === "ok" ? 1 : 2);
    expect(JSON.stringify(results)).not.toContain(api.token.split(".")[2]);
    api.token = token;
  });

  test("does not know us, or is gone; a kubeconfig is for all to read", async () => {
    const { root, look } = await ask(() => true);
    chmodSync(join(root, "etc/cni/genie/kubeconfig"), 0o644);
    const { token } = api;
    api.token = "another";
    expect(await look()).toMatchObject([
      { verdict: "problem", detail: expect.stringContaining("can be read by others") },
      { verdict: "problem", detail: expect.stringContaining("401 Unauthorized") },
    ]);
    api.token = token;
    put(root, "etc/cni/genie/kubeconfig", "{", 0o600);
    expect(await look()).toMatchObject([
      { verdict: "problem", detail: expect.stringContaining("neither YAML nor JSON") },
    ]);
  });
});
