/**
 * `genie manifest`: lib/cluster/manifest.ts, lib/node/manifest_command.ts. The objects agree with
 * each other and with the code, the YAML is the objects, and the rights suffice.
 */
import { describe, expect, test } from "bun:test";
import { cpSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { customResourceDefinitions, formatContainerfile, rights } from "../lib/cluster/manifest.ts";
import type { KubeObject } from "../lib/cluster/yaml.ts";
import manifest from "../package.json";
import { metrics } from "./agent_metrics.ts";
import { startApiServer } from "./apiserver.ts";
import { makeHost, tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { compiledGenie, makeNode, spawnGenie, wire } from "./wire.ts";

/** Runs the command in this process. */
async function print(...args: string[]) {
  const host = makeHost();
  const status = await runCommand(host, ["manifest", ...args]);
  return { status, ...host.written };
}

async function objectsOf(...args: string[]): Promise<KubeObject[]> {
  return JSON.parse((await print(...args, "--json")).stdout).items;
}

const find = (objects: KubeObject[], kind: string): KubeObject => {
  const found = objects.filter((one) => one.kind === kind);
  if (found[0] && found.length === 1) return found[0];
  throw new Error(`Expected one ${kind}, got ${found.length}`);
};

/** The value at a path of keys. */
const at = (value: unknown, ...path: (string | number)[]): unknown =>
  path.reduce<unknown>(
    (one, key) => (one as Record<string | number, unknown> | undefined)?.[key],
    value,
  );

describe("genie manifest", () => {
  test("prints YAML that is the objects, the same each time", async () => {
    const { stdout, stderr, status } = await print("--features", "policy,switch");
    expect([stderr, status]).toEqual(["", 0]);
    expect(Bun.YAML.parse(stdout)).toEqual(await objectsOf("--features=policy,switch"));
    expect((await print("--features", "switch,policy")).stdout).toBe(stdout);
    const run = await spawnGenie([compiledGenie(), "manifest", "--features=policy,switch"], {});
    expect(run.stdout).toBe(stdout);
  });

  test("has every kind in the order of creation, by its API version", async () => {
    const objects = await objectsOf();
    expect(objects.map(({ apiVersion, kind }) => `${apiVersion} ${kind}`)).toEqual([
      "v1 Namespace",
      ...customResourceDefinitions.map(() => "apiextensions.k8s.io/v1 CustomResourceDefinition"),
      "v1 ServiceAccount",
      "rbac.authorization.k8s.io/v1 ClusterRole",
      "rbac.authorization.k8s.io/v1 ClusterRoleBinding",
      "rbac.authorization.k8s.io/v1 Role",
      "rbac.authorization.k8s.io/v1 RoleBinding",
      "v1 ConfigMap",
      "apps/v1 DaemonSet",
    ]);
    const keys = objects.map(
      ({ kind, metadata }) => `${kind} ${metadata.namespace} ${metadata.name}`,
    );
    expect(new Set(keys).size).toBe(keys.length);
  });

  test("the agent may ask for tokens of its own account alone, in its namespace", async () => {
    const objects = await objectsOf("--namespace=net");
    const role = find(objects, "Role");
    expect(role.metadata).toMatchObject({ name: "genie-token", namespace: "net" });
    expect(at(role, "rules")).toEqual([
      {
        apiGroups: [""],
        resources: ["serviceaccounts/token"],
        resourceNames: [find(objects, "ServiceAccount").metadata.name],
        verbs: ["create"],
      },
    ]);
    const binding = find(objects, "RoleBinding");
    expect(binding.metadata.namespace).toBe("net");
    expect(at(binding, "roleRef")).toMatchObject({ kind: "Role", name: "genie-token" });
    expect(at(binding, "subjects")).toEqual([
      { kind: "ServiceAccount", name: "genie", namespace: "net" },
    ]);
  });

  test.each([
    [[], "genie-system", `genie:${manifest.version}`],
    [
      ["--namespace=net", "--image=registry.example/net/genie:2@sha256:0"],
      "net",
      "registry.example",
    ],
  ])("%p: the objects name each other", async (args, namespace, image) => {
    const objects = await objectsOf(...args);
    const set = find(objects, "DaemonSet");
    const spec = at(set, "spec", "template", "spec");
    expect(at(set, "spec", "selector", "matchLabels")).toEqual(
      at(set, "spec", "template", "metadata", "labels"),
    );
    const account = find(objects, "ServiceAccount").metadata.name;
    expect(at(spec, "serviceAccountName")).toBe(account);
    const binding = find(objects, "ClusterRoleBinding");
    expect(at(binding, "roleRef", "name")).toBe(find(objects, "ClusterRole").metadata.name);
    expect(at(binding, "subjects")).toEqual([{ kind: "ServiceAccount", name: account, namespace }]);
    expect(find(objects, "Namespace").metadata.name).toBe(namespace);
    for (const { kind, metadata } of objects) {
      const isGlobal = /^(Cluster|Custom|Namespace)/.test(kind);
      expect([kind, metadata.namespace]).toEqual([kind, isGlobal ? undefined : namespace]);
    }
    const volumes = at(spec, "volumes") as { name: string; configMap?: { name: string } }[];
    expect(volumes.flatMap(({ configMap }) => configMap?.name ?? [])).toEqual([
      find(objects, "ConfigMap").metadata.name,
    ]);
    const used = new Set<string>();
    const containers = ["initContainers", "containers"].flatMap(
      (key) =>
        at(spec, key) as { image: string; volumeMounts: { name: string; mountPath: string }[] }[],
    );
    expect(containers).toHaveLength(2);
    for (const container of containers) {
      expect(container.image).toStartWith(image);
      const paths = container.volumeMounts.map(({ mountPath }) => mountPath);
      expect(new Set(paths).size).toBe(paths.length);
      for (const { name } of container.volumeMounts) used.add(name);
    }
    expect(volumes.map(({ name }) => name).sort()).toEqual([...used].sort());
  });

  test("asks for no more than it needs, as the API server demands", async () => {
    const spec = at(find(await objectsOf(), "DaemonSet"), "spec", "template", "spec");
    const [install] = at(spec, "initContainers") as Record<string, unknown>[];
    const [agent] = at(spec, "containers") as Record<string, unknown>[];
    expect(at(install, "securityContext")).toEqual({
      runAsUser: 0,
      readOnlyRootFilesystem: true,
      allowPrivilegeEscalation: false,
      capabilities: { drop: ["ALL"] },
    });
    // With CAP_SYS_ADMIN the API server refuses `allowPrivilegeEscalation: false`.
    expect(at(agent, "securityContext")).toEqual({
      runAsUser: 0,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ["ALL"], add: ["NET_ADMIN", "SYS_ADMIN"] },
    });
    expect(spec).toMatchObject({
      hostNetwork: true,
      hostPID: true,
      priorityClassName: "system-node-critical",
      tolerations: [{ operator: "Exists" }],
      securityContext: { seccompProfile: { type: "RuntimeDefault" } },
    });
    for (const one of [install, agent]) {
      expect(at(one, "resources", "requests")).toEqual(expect.any(Object));
    }
    const probe = { host: "127.0.0.1", port: 9477, path: "/healthz" };
    expect([at(agent, "livenessProbe", "httpGet"), at(agent, "readinessProbe", "httpGet")]).toEqual(
      [probe, probe],
    );
  });

  test.each([
    ["0.0.0.0:99", { host: "127.0.0.1", port: 99, path: "/healthz" }],
    ["[::]:99", { host: "::1", port: 99, path: "/healthz" }],
    ["10.1.2.3:99", { host: "10.1.2.3", port: 99, path: "/healthz" }],
    ["", undefined],
  ])("probes the agent where it listens: %p", async (listen, expected) => {
    using dir = tempDir();
    const table = join(dir.path, "plugins.toml");
    writeFileSync(table, `agent.listen = "${listen}"\n`);
    const set = find(await objectsOf(`--table=${table}`), "DaemonSet");
    const [agent] = at(set, "spec", "template", "spec", "containers") as object[];
    const probes = ["livenessProbe", "readinessProbe"].map((key) => at(agent, key));
    expect(probes.map((probe) => probe && at(probe, "httpGet"))).toEqual([expected, expected]);
  });

  test.each([
    [true, [{ name: "NODE_NAME", valueFrom: { fieldRef: { fieldPath: "spec.nodeName" } } }]],
    [false, undefined],
  ])("tells an agent that follows annotations its node: %p", async (follows, env) => {
    using dir = tempDir();
    const table = join(dir.path, "plugins.toml");
    writeFileSync(table, `agent.follow_annotations = ${follows}\n`);
    const set = find(await objectsOf(`--table=${table}`), "DaemonSet");
    const [agent] = at(set, "spec", "template", "spec", "containers") as object[];
    expect(at(agent, "env")).toEqual(env);
  });

  test("into kube-system, which is there", async () => {
    const objects = await objectsOf("--namespace", "kube-system");
    expect(objects.map(({ kind }) => kind)).not.toContain("Namespace");
  });

  test("takes folders from the table, and rolls out a new one", async () => {
    using dir = tempDir();
    const file = join(dir.path, "plugins.toml");
    const paths = async (content: string) => {
      writeFileSync(file, content);
      const objects = await objectsOf("--table", file);
      expect(at(find(objects, "ConfigMap"), "data", "plugins.toml")).toBe(content);
      const template = at(find(objects, "DaemonSet"), "spec", "template");
      const volumes = at(template, "spec", "volumes") as { hostPath?: { path: string } }[];
      return {
        paths: volumes.flatMap(({ hostPath }) => hostPath?.path ?? []),
        args: at(template, "spec", "initContainers", 0, "args") as string[],
        sum: at(template, "metadata", "annotations", "genie/table-sha256"),
      };
    };
    const usual = await paths("# nothing\n");
    expect(usual.paths).toEqual(["/etc/cni", "/var/lib/cni", "/var/run/netns", "/opt/cni/bin"]);
    const other = await paths(
      'conf_dir = "/etc/net"\nbin_dirs = ["/usr/lib/cni", "/opt/cni/bin"]\nstate_dir = "/data"\n',
    );
    expect(other.paths).toEqual([
      ...["/etc/cni", "/etc/net", "/var/lib/cni", "/data", "/var/run/netns"],
      ...["/usr/lib/cni", "/opt/cni/bin"],
    ]);
    expect(other.args).toContain("--conf-dir=/etc/net");
    expect(other.args).toContain("--bin-dir=/usr/lib/cni");
    expect(other.sum).not.toBe(usual.sum);
  });

  test.each([
    [["--namespace", "Net"], 2, "--namespace"],
    [["--image", "a b"], 2, "--image"],
    [["--features", "speed"], 2, '"speed"'],
    [["--table", "/absent"], 1, "does not exist"],
  ])("%p is refused", async (args, status, message) => {
    expect(await print(...args)).toEqual({
      status,
      stdout: "",
      stderr: expect.stringContaining(message),
    });
  });
});

/** One right in the words of RBAC. */
const right = (group: string, resource: string, verb: string) => `${group}/${resource} ${verb}`;
const granted = (objects: KubeObject[]): string[] =>
  (find(objects, "ClusterRole")["rules"] as typeof rights).flatMap((rule) =>
    rule.apiGroups.flatMap((group) =>
      rule.resources.flatMap((resource) => rule.verbs.map((verb) => right(group, resource, verb))),
    ),
  );

describe("rights", () => {
  test("are given with a reason each, none twice, by features", async () => {
    const text = (await print("--features=policy,switch")).stdout;
    for (const { why } of rights) expect(text).toContain(`  - # ${why}\n`);
    const bare = granted(await objectsOf("--features="));
    expect(new Set(bare).size).toBe(bare.length);
    expect(bare.filter((one) => /watch|secrets|\*/.test(one))).toEqual([]);
    const policy = granted(await objectsOf("--features=policy"));
    expect(policy).toContain("networking.k8s.io/networkpolicies watch");
    expect(granted(await objectsOf())).toEqual(bare);
  });

  test("of policy come with a table that enforces it", async () => {
    using dir = tempDir();
    const file = join(dir.path, "plugins.toml");
    writeFileSync(file, "[policy]\nenforce = true\n");
    expect(granted(await objectsOf("--table", file))).toContain("/pods watch");
    expect(granted(await objectsOf("--table", file, "--features="))).not.toContain("/pods watch");
  });

  /** What the code names of the API must be granted; watches are asked for by collection. */
  test("to read the reports of all nodes are nobody's, in roles of their own", async () => {
    const objects = await objectsOf("--features=cluster-report", "--namespace=net");
    const isReader = ({ metadata }: KubeObject) => metadata.name === "genie-report";
    expect(objects.filter((one) => !isReader(one))).toEqual(
      await objectsOf("--features=", "--namespace=net"),
    );
    const readers = objects.filter(isReader);
    expect(
      readers.map(({ kind, metadata, rules: own }) => [kind, metadata.namespace, own]),
    ).toEqual([
      ["Role", "net", [grants("list", "pods"), grants("get", "pods/proxy")]],
      ["ClusterRole", undefined, [grants("list", "nodes"), grants("get", "nodes/proxy")]],
    ]);
  });
  const grants = (verb: string, resource: string) =>
    expect.objectContaining({ apiGroups: [""], resources: [resource], verbs: [verb] });

  test("cover every kind that the code names", async () => {
    const collections = [
      ...["pods", "events", "namespaces", "networkpolicies", "multi-networkpolicies", "nodes"],
      ...["network-attachment-definitions", "logicalnetworks", "physicalnetworks", "services"],
      ...["secrets", "configmaps", "leases", "serviceaccounts", "ipamclaims"],
    ];
    const kinds = new RegExp(`"(${collections.join("|")})"`, "g");
    const lib = join(import.meta.dir, "../lib");
    // What an operator asks with a right of his own is not genie's.
    const own = /^(cluster|report)\//;
    const named = readdirSync(lib, { recursive: true, encoding: "utf8" })
      .filter((name) => name.endsWith(".ts") && !own.test(name))
      .flatMap((name) => [...readFileSync(join(lib, name), "utf8").matchAll(kinds)])
      .map(([, kind]) => kind);
    expect(new Set(named).size).toBeGreaterThanOrEqual(5);
    // The last one by a role of its own, for one object.
    const known = [...rights.flatMap(({ resources }) => resources), "serviceaccounts"];
    expect([...new Set(named)].filter((kind) => !known.includes(kind ?? ""))).toEqual([]);
  });

  test("suffice for every request of an ADD", async () => {
    using dir = tempDir();
    const api = await startApiServer(join(dir.path, "api"));
    try {
      const kubeconfig = api.kubeconfig("token");
      using node = makeNode({
        table:
          `[kubernetes]\nkubeconfig = "${kubeconfig}"\n[plugins.blue]\n` +
          `[plugins.shut]\ndeny = { namespaces = ["team"] }\n`,
        lists: Object.fromEntries(
          ["blue", "shut"].map((name) => [
            `${name}.conflist`,
            {
              cniVersion: "1.0.0",
              name,
              plugins: [{ type: "bridge", ipam: { type: "host-local", subnet: "10.0.0.0/8" } }],
            },
          ]),
        ),
        delegates: { bridge: { ips: ["10.0.0.2/24"] } },
      });
      const alpha = "/apis/alpha.network.k8s.io/v1/namespaces/team";
      api.put("/apis/k8s.cni.cncf.io/v1/namespaces/team/network-attachment-definitions/a", {
        spec: { config: JSON.stringify({ cniVersion: "1.0.0", type: "bridge" }) },
      });
      const subnet = { sub_subnet: "10.1.0.0/24", physicalNet: "p", plugin: "blue" };
      api.put(`${alpha}/logicalnetworks/l`, { spec: subnet });
      api.put(`${alpha}/physicalnetworks/p`, { spec: { sharedStatus: { subnet: "10.1.0.0/16" } } });
      const pods: [string, Record<string, string>, number][] = [
        ["a", { cni: "blue", "k8s.v1.cni.cncf.io/networks": "a" }, 0],
        ["b", { cni: "", networks: "l@eth0" }, 0],
        ["c", { cni: "shut" }, 1],
      ];
      for (const [name, annotations, status] of pods) {
        api.put(`/api/v1/namespaces/team/pods/${name}`, { metadata: { uid: name, annotations } });
        const run = await wire(node, {
          command: "ADD",
          env: {
            CNI_CONTAINERID: name,
            CNI_ARGS: `IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=${name}`,
          },
        });
        expect([run.stdout, run.stderr, run.status]).toEqual([run.stdout, run.stderr, status]);
      }
      const used = new Set(api.requests.map(({ method, path }) => rightOf(method, path)));
      // Not granted, because not needed: the fallback where a server has no pods/status.
      expect([...used].filter((one) => !needed.includes(one))).toEqual([]);
      expect(used).toContain("/pods get");
      expect(used).toContain("/pods/status patch");
      expect(used).toContain("alpha.network.k8s.io/logicalnetworks list");
      expect(used).toContain("k8s.cni.cncf.io/network-attachment-definitions get");
    } finally {
      await api.stop();
    }
  });
  const needed = rights
    .filter(({ feature }) => feature === undefined)
    .flatMap(({ apiGroups, resources, verbs }) =>
      resources.flatMap((one) => verbs.map((verb) => right(apiGroups[0] ?? "", one, verb))),
    );

  /** A request in the words of RBAC (k8s.io/apiserver RequestInfo). */
  function rightOf(method: string, path: string): string {
    const [root, ...rest] = new URL(path, "https://a").pathname.slice(1).split("/");
    const group = root === "apis" ? (rest.shift() ?? "") : "";
    rest.shift();
    if (rest[0] === "namespaces" && rest.length > 2) rest.splice(0, 2);
    const [resource = "", name, part] = rest;
    const read = name === undefined ? "list" : "get";
    const verb = { GET: read, POST: "create", PATCH: "patch" }[method] ?? method;
    return right(group, part === undefined ? resource : `${resource}/${part}`, verb);
  }
});

/** The commands that gather the tools, and the libraries of `$genie` and theirs, in `$out`. */
function gatherCommands(): string {
  const [, script = ""] =
    /^RUN genie=\S+; out=\S+; \\\n((?: {4}.*\n)+)/m.exec(formatContainerfile("1")) ?? [];
  return script.replaceAll("\\\n", "\n");
}

describe("genie manifest --containerfile", () => {
  test("is of this version, and starts the agent", async () => {
    const { stdout } = await print("--containerfile");
    expect(stdout).toBe(formatContainerfile(manifest.version));
    expect(stdout).toContain(`-t genie:${manifest.version} .`);
    expect(stdout.split("\n").filter((line) => /^(FROM|ENTRYPOINT|CMD)/.test(line))).toEqual([
      "FROM docker.io/library/debian:bookworm-slim AS tools",
      "FROM scratch",
      'ENTRYPOINT ["/usr/bin/genie"]',
      'CMD ["agent"]',
    ]);
    expect(gatherCommands()).toContain("libraries=$(ldd");
  });

  test.skipIf(lacks("mounts", "network namespaces", "iptables", "nftables", "the binary"))(
    "gathers all that genie and its tools need",
    () => {
      using dir = tempDir();
      const out = join(dir.path, "image");
      const env = { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", genie: compiledGenie(), out };
      const gathered = Bun.spawnSync(["sh", "-c", gatherCommands()], { env, cwd: "/" });
      expect([gathered.stderr.toString(), gathered.exitCode]).toEqual(["", 0]);
      cpSync(compiledGenie(), join(out, "usr/bin/genie"));
      for (const folder of ["dev", "proc"]) mkdirSync(join(out, folder));
      const inside = (command: string): string => {
        const mounts = `mount --rbind /dev ${out}/dev && mount --rbind /proc ${out}/proc`;
        const script = `${mounts} && exec chroot ${out} /usr/bin/${command}`;
        const run = Bun.spawnSync(["unshare", "-m", "sh", "-c", script], { env });
        return run.stdout.toString() + run.stderr.toString();
      };
      expect(inside("genie version --json")).toContain(manifest.version);
      expect(inside("nft --version")).toContain("nftables v");
      expect(inside("ip -V")).toContain("iproute2");
      expect(inside("nsenter --version")).toContain("util-linux");
      expect(inside("iptables --version")).toContain("iptables v");
      expect(inside("iptables -m comment -h")).toContain("comment match options");
    },
  );
});

describe("monitoring", () => {
  /** Metrics and labels of an expression. */
  const partsOf = (expr: string) => ({
    names: [...expr.matchAll(/\bgenie_[a-z_]+/g)].map(([name]) => name),
    labels: [...expr.matchAll(/[{,](\w+)(?:=~|!=|=)/g)].map(([, label]) => label ?? ""),
    groups: [...expr.matchAll(/by \(([^)]*)\)/g)].flatMap(([, text = ""]) => text.split(", ")),
  });

  test("asks for metrics that there are, by labels that they have", async () => {
    const dashboard = JSON.parse((await print("--grafana")).stdout);
    const rule = Bun.YAML.parse((await print("--alerts")).stdout) as KubeObject;
    const rules = at(rule, "spec", "groups", 0, "rules") as { expr: string; alert: string }[];
    const targets = dashboard.panels.flatMap((one: { targets: { expr: string }[] }) => one.targets);
    const exprs = [...targets, ...rules].map(({ expr }: { expr: string }) => expr);
    expect(exprs.length).toBeGreaterThan(15);
    const seen = new Set<string>();
    for (const expr of exprs) {
      const { names, labels, groups } = partsOf(expr);
      expect(names.length).toBeGreaterThan(0);
      for (const name of names) {
        seen.add(name);
        const known: readonly string[] = metrics[name as keyof typeof metrics];
        const has = [...known, "instance"];
        expect([expr, [...labels, ...groups].filter((one) => !has.includes(one))]).toEqual([
          expr,
          [],
        ]);
      }
      expect(expr.split("(").length).toBe(expr.split(")").length);
    }
    expect([...seen].sort()).toEqual(Object.keys(metrics).sort());
  });

  test("the dashboard has a place for each panel", async () => {
    const { panels, templating } = JSON.parse((await print("--grafana")).stdout);
    const places = panels.map(
      ({ gridPos: { x, y } }: { gridPos: { x: number; y: number } }) => `${x} ${y}`,
    );
    expect(new Set(places).size).toBe(panels.length);
    expect(templating.list.map(({ name }: { name: string }) => name)).toEqual([
      "datasource",
      "instance",
    ]);
  });

  test("each alert says what to do", async () => {
    const { stdout } = await print("--alerts", "--namespace=net");
    const rule = Bun.YAML.parse(stdout) as KubeObject;
    expect(rule.metadata.namespace).toBe("net");
    for (const one of at(rule, "spec", "groups", 0, "rules") as object[]) {
      expect(one).toEqual({
        alert: expect.stringMatching(/^Genie\w+$/),
        expr: expect.any(String),
        for: expect.stringMatching(/^\d+[mh]$/),
        labels: { severity: expect.stringMatching(/^(warning|critical)$/) },
        annotations: { summary: expect.any(String), description: expect.any(String) },
      });
    }
  });
});
