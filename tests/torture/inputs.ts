/**
 * What the fuzz feeds to genie: everything that comes from others, in one value that can be printed
 * and made smaller. Made by grammars of what is right and nearly right, and by changing what was
 * recorded from real runtimes.
 *
 * In all texts `$DIR` is the node's folder and `$API` the address of its API server.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { supportedVersions } from "../../lib/cni.ts";
import { isObject } from "../../lib/json.ts";
import { mutate, mutateJson, mutateText, spices, values } from "./mutate.ts";
import { oneIn, pick, type Random } from "./seed.ts";

/** What the delegates do with one command; all of them do the same. */
export interface Answer {
  stdout: string;
  stderr?: string;
  /** Exit status, or `kill`, or `stop`: it hangs then. */
  status?: string;
}

/** Everything that reaches genie in one call. */
export interface Input {
  kind: Kind;
  env: Record<string, string>;
  stdin: string;
  table: string;
  /** Files below `$DIR`: config lists, a kubeconfig. */
  files: Record<string, string>;
  /** Bodies by path of the API. */
  objects: Record<string, string>;
  /** Rows of genie.db by table. */
  rows: [table: string, columns: Record<string, string | number | null>][];
  answers: Record<string, Answer>;
}

/** Stands where a secret may stand, and must never be seen again; a word, as parsers quote them. */
export const secret = "s3cr3t7c1f0a5be9d24";

const root = join(import.meta.dir, "..");
interface Sample {
  env: Record<string, string>;
  stdin: string;
  stdout: unknown;
}
const samples = readdirSync(join(root, "samples"))
  .filter((name) => /-(ADD|DEL|STATUS|VERSION)-/.test(name))
  .sort()
  .map((name) => JSON.parse(readFileSync(join(root, "samples", name), "utf8")) as Sample);
/** Results of real plugins, and what fakes answer in the vectors, errors too. */
const recordedResults = samples.flatMap(({ stdout }) => (isObject(stdout) ? [stdout] : []));
const vectorResults = readdirSync(join(root, "vectors"))
  .sort()
  .flatMap((name) => {
    const vector: unknown = JSON.parse(readFileSync(join(root, "vectors", name), "utf8"));
    const delegates = isObject(vector) && isObject(vector["delegates"]) ? vector["delegates"] : {};
    return Object.values(delegates).flatMap((does) =>
      isObject(does) ? [does["result"], does["error"]].filter(isObject) : [],
    );
  });
const shippedTable = readFileSync(join(root, "..", "plugins.toml"), "utf8");

const text = (value: unknown) => JSON.stringify(value);
const annotationsKey = "io.kubernetes.cri.pod-annotations";
const npwg = "k8s.v1.cni.cncf.io/networks";
const versions = [...supportedVersions, "1.1.0", "1.0.0"];

/** Each thing of the world, changed the more often the more there is to it. */
const makers = {
  env: changeEnv,
  stdin: changeStdin,
  annotations: changeAnnotations,
  table: changeTable,
  conf: changeConf,
  delegate: changeDelegate,
  rows: changeRows,
  objects: changeObjects,
  kubeconfig: changeKubeconfig,
};
export type Kind = keyof typeof makers;
/** The kinds of input. */
export const kinds = Object.keys(makers) as Kind[];
const weights: Record<Kind, number> = {
  ...{ env: 14, stdin: 20, annotations: 24, table: 10, conf: 10 },
  ...{ delegate: 9, rows: 6, objects: 5, kubeconfig: 2 },
};
const drawn = kinds.flatMap((kind) => Array.from({ length: weights[kind] }, () => kind));

/** Makes the next input. */
export function makeInput(random: Random, containerId: string): Input {
  const kind = pick(random, drawn);
  const input = plainInput(random, kind, containerId);
  makers[kind](random, input);
  return input;
}

/** A call that would go well, but for the version. */
function plainInput(random: Random, kind: Kind, containerId: string): Input {
  const command = pick(random, ["ADD", "ADD", "ADD", "ADD", "DEL", "CHECK", "STATUS", "GC"]);
  const cniVersion = command === "ADD" || command === "DEL" ? pick(random, versions) : "1.1.0";
  return {
    kind,
    env: {
      CNI_COMMAND: command,
      CNI_CONTAINERID: containerId,
      CNI_NETNS: "$DIR/netns",
      CNI_IFNAME: "eth0",
      CNI_PATH: "$DIR/bin",
      CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod;K8S_POD_UID=u",
      SOME_TOKEN: secret,
    },
    stdin: text({
      cniVersion,
      name: "genie-net",
      type: "genie",
      runtimeConfig: { [annotationsKey]: { cni: "blue", "example.org/token": secret } },
    }),
    table: '[default]\nnetworks = ["blue"]\n',
    files: {
      "conf/10-blue.conflist": text({
        cniVersion: pick(random, versions),
        name: "blue",
        plugins: [{ type: "fz-a", password: secret, capabilities: { mac: true, ips: true } }],
      }),
      "conf/20-green.conflist": text({
        cniVersion: pick(random, versions),
        name: "green",
        plugins: [{ type: "fz-a" }, { type: "fz-b" }],
      }),
    },
    objects: {},
    rows: [],
    answers: { ADD: { stdout: text({ ips: [{ address: "10.0.0.1/8" }] }) } },
  };
}

type Json = Record<string, unknown>;
const withStdin = (input: Input, change: (config: Json) => Json) => {
  input.stdin = text(change(JSON.parse(input.stdin) as Json));
};
const annotate = (input: Input, annotations: Json) =>
  withStdin(input, (config) => ({
    ...config,
    runtimeConfig: { [annotationsKey]: { "example.org/token": secret, ...annotations } },
  }));

function changeEnv(random: Random, input: Input): void {
  const { env } = input;
  env["CNI_COMMAND"] = pick(random, ["ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "add", ""]);
  for (let left = 1 + random(3); left > 0; left--) {
    const name = pick(
      random,
      Object.keys(env).filter((one) => one.startsWith("CNI_")),
    );
    const draw = random(60);
    if (draw < 12) delete env[name];
    else if (draw < 24) env[name] = pick(random, spices);
    else if (draw < 27) env[name] = "z".repeat(1 + random(120_000));
    else env[name] = mutateText(random, env[name] ?? "");
  }
  if (oneIn(random, 3)) {
    const pairs = ["cni", "networks", "K8S_ANNOT", "K8S_POD_NAME", "", "IP", pick(random, spices)];
    env["CNI_ARGS"] = Array.from({ length: random(5) }, () => {
      const value = pick(random, [selection(random), text({ cni: selection(random) }), "", "=;="]);
      return `${pick(random, pairs)}=${value}`;
    }).join(";");
    withStdin(input, ({ runtimeConfig: _, ...config }) => config);
  }
  if (oneIn(random, 10)) env[pick(random, ["GENIE_TRACE", "CNI_X", "NO_PROXY"])] = "1";
  // No such bytes in an environment.
  for (const [name, value] of Object.entries(env)) env[name] = value.replaceAll("\0", "");
}

function changeStdin(random: Random, input: Input): void {
  const base = oneIn(random, 2) ? pick(random, samples).stdin : input.stdin;
  const known = base.replaceAll(/"(k8s\.v1\.cni\.cncf\.io|v1\.multus-cni\.io)\//g, '"x/');
  let stdin = known.replace('"kubernetes.io/config.source":"api"', '"cni":"blue,green@net1"');
  if (oneIn(random, 4)) {
    const config = JSON.parse(stdin) as Json;
    const prevResult = pick(random, [...recordedResults, ...values]);
    const labels = { labels: [{ key: "cni", value: selection(random) }] };
    const args = { "org.apache.mesos": { network_info: { labels } } };
    const valid = [{ containerID: "c", ifname: "eth0" }, pick(random, values)];
    stdin = text({ ...config, prevResult, args, "cni.dev/valid-attachments": valid });
  }
  input.stdin = oneIn(random, 30)
    ? pick(random, ["", " ", "{}", "[]", "null", "\u0000", "{}{}", '"', "[".repeat(9000)])
    : mutate(random, stdin);
}

const ifNames = ["eth0", "eth1", "net1", "net2", "", "lo", "a".repeat(16), "a/b", "é", "eth%d"];

/** The annotation `cni`, right or nearly. */
function selection(random: Random): string {
  const names = ["blue", "green", "blue", "green", "red", "", " blue ", "10-blue", "../blue", "*"];
  const count = oneIn(random, 20) ? 30 + random(10) : random(5);
  const parts = Array.from({ length: count }, () => {
    const name = pick(random, names);
    return oneIn(random, 3) ? `${name}@${pick(random, ifNames)}` : name;
  });
  const made = parts.join(oneIn(random, 10) ? " , " : ",");
  return oneIn(random, 4) ? mutateText(random, made) : made;
}

/** `k8s.v1.cni.cncf.io/networks`, in either form. */
function npwgSelection(random: Random): string {
  if (oneIn(random, 2)) {
    const parts = Array.from({ length: 1 + random(3) }, () => {
      const where = pick(random, ["", "ns/", "other/", "/"]);
      const at = oneIn(random, 3) ? `@${pick(random, ifNames)}` : "";
      return `${where}${pick(random, ["a", "b", "blue", "A", ""])}${at}`;
    });
    const made = parts.join(",");
    return oneIn(random, 4) ? mutateText(random, made) : made;
  }
  const keys: Record<string, unknown[]> = {
    namespace: ["ns", "", "other", 1],
    interface: ifNames,
    ips: [["10.0.0.2"], ["10.0.0.2/24", "fd00::2/64"], [], ["x"], "10.0.0.2"],
    mac: ["02:11:22:33:44:55", "02-11", "", 5],
    bandwidth: [{ ingressRate: 1000 }, { egressBurst: 5 }, { ingressRate: 1e30 }, {}],
    portMappings: [[{ hostPort: 80, containerPort: 80 }], [{ hostPort: 0 }], [], {}],
    "default-route": [["10.0.0.1"], [], ["::1", "x"], null],
    "infiniband-guid": ["c2:11:22:33:44:55:66:77", "c2"],
    "cni-args": [{ a: 1 }, null, [], { __proto__: 1 }],
    deviceID: ["0000:01:00.1"],
    "example.org/x": [secret],
  };
  const list = Array.from({ length: 1 + random(3) }, () => {
    const element: Json = { name: pick(random, ["a", "b", "blue", "", "A/b"]) };
    for (let left = random(4); left > 0; left--) {
      const key = pick(random, Object.keys(keys));
      element[key] = pick(random, keys[key] ?? [null]);
    }
    return element;
  });
  const made = text(oneIn(random, 8) ? list[0] : list);
  return oneIn(random, 3) ? mutate(random, made) : made;
}

function changeAnnotations(random: Random, input: Input): void {
  input.env["CNI_COMMAND"] = oneIn(random, 8) ? "DEL" : "ADD";
  const annotations: Json = {};
  if (!oneIn(random, 5)) annotations["cni"] = selection(random);
  if (oneIn(random, 6)) annotations["networks"] = selection(random);
  if (oneIn(random, 3)) annotations[npwg] = npwgSelection(random);
  if (oneIn(random, 12)) annotations["v1.multus-cni.io/default-network"] = npwgSelection(random);
  if (oneIn(random, 12)) annotations[pick(random, spices)] = pick(random, values);
  if (oneIn(random, 12)) input.table = '[default]\nalways = ["green"]\nnetworks = []\n';
  annotate(input, annotations);
  if (oneIn(random, 8)) input.stdin = mutateJson(random, input.stdin);
}

function changeTable(random: Random, input: Input): void {
  // The shipped table is all comments but for a few lines: all of it counts here.
  const shown = shippedTable
    .replaceAll(/^# ?(?=[[\w].*[\]=])/gm, "")
    .replaceAll(/^(conf_dir|bin_dirs|state_dir|log_file|kubelet_dir|kubeconfig) *=.*$/gm, "");
  const own = [
    input.table,
    '[default]\nnetworks = ["blue@eth0", "green"]\nalways = ["green@net7"]\n',
    `[plugins.inline.config]\ncniVersion = "1.0.0"\npassword = "${secret}"\n` +
      '[[plugins.inline.config.plugins]]\ntype = "fz-a"\n[default]\nnetworks = ["inline"]\n',
    '[plugins.blue]\nallow = { namespaces = ["n*"], pods = ["x/y"] }\ntimeout = "9s"\n' +
      '[plugins.green]\ndeny = { service_accounts = ["ns/*"] }\n[access]\ndefault = "deny"\n',
    '[select]\ncandidates = ["blue", "green"]\nattempts = 2\n[select.weights]\nfailures = 3.5\n',
    'result = "primary"\nparallel = true\ntimeout = "20s"\ndel_retry_window = "0s"\n',
  ];
  let table = oneIn(random, 4) ? shown : pick(random, own) + (oneIn(random, 3) ? own[3] : "");
  for (let left = random(4); left > 0; left--) table = mutateText(random, table);
  input.table = table;
  annotate(input, oneIn(random, 3) ? { cni: pick(random, ["", "blue,green", "inline"]) } : {});
}

/** The CNI config as CNI-Genie and Multus know it, and the config lists on disk. */
function changeConf(random: Random, input: Input): void {
  const delegate = { type: "fz-a", name: "blue", cniVersion: pick(random, versions) };
  const keys: Record<string, unknown[]> = {
    log_level: ["debug", "warning", "nothing", 5],
    default_plugin: ["blue", "green,blue", "", "../x"],
    kubernetes: [{ kubeconfig: "$DIR/kubeconfig" }, { k8s_api_root: "$API" }, []],
    policy: [{ k8s_api_root: "$API", k8s_auth_token: secret }, { k8s_auth_token: [secret] }],
    clusterNetwork: ["blue", "$DIR/conf", "$DIR/conf/10-blue.conflist", "red", ""],
    defaultNetworks: [["green"], ["green", "red"], "green"],
    delegates: [[delegate], [{ ...delegate, plugins: [{ type: "fz-b" }] }], [delegate, {}], {}],
    confDir: ["$DIR/conf", "$DIR/nothing", ""],
    binDir: ["$DIR/bin", "", 3],
    namespaceIsolation: [true, "true"],
    globalNamespaces: ["default,ns", ""],
    systemNamespaces: [["ns"], "ns"],
    logLevel: ["verbose", "panic", "x"],
    readinessindicatorfile: ["$DIR/netns", ""],
    disableCheck: [true, "true"],
    plugins: [[{ type: "genie" }], []],
  };
  withStdin(input, (config) => {
    const more: Json = {};
    for (let left = 1 + random(4); left > 0; left--) {
      const key = pick(random, Object.keys(keys));
      more[key] = pick(random, keys[key] ?? [null]);
    }
    return { ...config, ...more };
  });
  if (oneIn(random, 2)) input.stdin = mutateJson(random, input.stdin);
  for (const name of Object.keys(input.files)) {
    if (!oneIn(random, 3)) continue;
    const list = JSON.parse(input.files[name] ?? "{}") as Json;
    const flags = { disableCheck: true, disableGC: "true", cniVersions: versions };
    input.files[name] = mutate(random, text(oneIn(random, 2) ? { ...list, ...flags } : list));
  }
  if (oneIn(random, 4)) annotate(input, { cni: pick(random, ["", "blue,green", "blue"]) });
}

/** A result, of any version, right or nearly. */
function result(random: Random): string {
  const good = pick(random, [...recordedResults, ...vectorResults]);
  const sandbox = pick(random, ["$DIR/netns", "$DIR/netns", "", "/n"]);
  const made = {
    cniVersion: pick(random, [...versions, undefined, "2.0.0"]),
    interfaces: Array.from({ length: random(4) }, () => ({
      name: pick(random, ["eth0", "eth0", "eth1", "cni0", "veth1", ""]),
      mac: pick(random, ["02:11:22:33:44:55", "", undefined]),
      sandbox: pick(random, [sandbox, sandbox, "", undefined]),
      mtu: pick(random, [1500, 0, undefined]),
    })),
    ips: Array.from({ length: random(4) }, () => ({
      version: pick(random, ["4", "6", undefined]),
      address: pick(random, ["10.0.0.5/8", "fd00::5/64", "10.0.0.6/32", "10.0.0.7"]),
      gateway: pick(random, ["10.0.0.1", "fd00::1", "", undefined]),
      interface: pick(random, [0, 1, 2, -1, undefined, undefined]),
    })),
    routes: pick<unknown>(random, [
      [{ dst: "0.0.0.0/0" }, { dst: "::/0", gw: "fd00::1" }],
      [{ dst: "10.0.0.0/8", gw: "10.0.0.1", mtu: 1400, table: 5, scope: 253, priority: 0 }],
      [],
      undefined,
    ]),
    dns: pick<unknown>(random, [{ nameservers: ["10.0.0.53"], search: ["a"] }, {}, undefined]),
  };
  const one = text(oneIn(random, 3) ? good : made).replaceAll("$NETNS", "$DIR/netns");
  return oneIn(random, 2) ? mutate(random, one) : one;
}

function changeDelegate(random: Random, input: Input): void {
  annotate(input, { cni: pick(random, ["blue", "green", "blue,green", "green@net1,blue"]) });
  input.env["CNI_COMMAND"] = oneIn(random, 6) ? pick(random, ["STATUS", "DEL", "GC"]) : "ADD";
  const error = () => text({ code: pick(random, [3, 11, 50, 100, 4000, 0, -1, "7"]), msg: "no" });
  for (const command of ["ADD", "ADD", "DEL", "CHECK", "STATUS", "GC"]) {
    if (command !== "ADD" && !oneIn(random, 6)) continue;
    const failing = pick(random, [error(), mutate(random, error()), "", "garbage", result(random)]);
    const hangs = oneIn(random, 2000);
    if (hangs) input.table = `timeout = "1s"\n${input.table}`;
    input.answers[command] = oneIn(random, 5)
      ? { stdout: failing, status: pick(random, ["1", "2", "255", "0", "kill"]) }
      : { stdout: result(random), ...(hangs && { status: "stop" }) };
    if (oneIn(random, 5))
      input.answers[command].stderr = pick(random, ["why\n", "\u001b[2J\u0007"]);
  }
}

const hostile = (random: Random): string | number =>
  pick(random, ["", "x", "../x", "\u001b[2J", "{}", "null", 0, -1, 2 ** 53, "y".repeat(3000)]);

function changeRows(random: Random, input: Input): void {
  const id = input.env["CNI_CONTAINERID"] ?? "";
  input.env["CNI_COMMAND"] = pick(random, ["DEL", "DEL", "ADD", "CHECK", "GC"]);
  const plan = {
    ...{ containerId: id, requestIfName: "eth0", requestNetwork: "genie-net", ifName: "eth0" },
    ...{ primary: true, network: "blue", reason: "asked", cniArgs: "A=b", cniPath: "$DIR/bin" },
    list: {
      ...{
        cniVersion: pick(random, versions),
        name: "blue",
        disableCheck: false,
        disableGC: false,
      },
      plugins: [{ type: "fz-a", password: secret }],
    },
    plugins: ["$DIR/bin/fz-a"],
    ...{ capabilityArgs: { mac: "02:11:22:33:44:55" }, args: {}, timeoutMs: 5000 },
    ...{ netns: "$DIR/netns", pod: { namespace: "ns", name: "pod", uid: "u" } },
  };
  const made = text(plan);
  const times = () => pick(random, [1, 0, -1, 1_700_000_000_000, 2 ** 53]);
  const attachment = (ifname: string): Record<string, string | number | null> => ({
    container_id: oneIn(random, 8) ? hostile(random) : id,
    request_ifname: "eth0",
    ifname,
    position: random(3),
    network: "blue",
    request_network: "genie-net",
    state: pick(random, ["attached", "attached", "planned", "failing", "leaked", "x"]),
    plan: oneIn(random, 3) ? made : mutate(random, made),
    result: pick(random, [null, result(random), result(random), "", "null"]),
    netns_id: pick(random, ["", "4:1", "x"]),
    created_at_ms: times(),
    failed_at_ms: times(),
    error: String(hostile(random)),
  });
  const rows: Input["rows"] = [["attachments", attachment("eth0")]];
  if (oneIn(random, 2)) rows.push(["attachments", attachment("net1")]);
  if (oneIn(random, 3)) {
    // No number that a process could have started at: nobody may be taken for the holder.
    const started = pick(random, ["", "x", "-1"]);
    const token = pick(random, ["", "t", "x".repeat(500)]);
    const where = {
      boot_id: pick(random, ["$BOOT", "x"]),
      pid_namespace: pick(random, ["$PIDS", "x"]),
    };
    const pid = pick(random, [0, -1, 1, 2 ** 31, 2 ** 53 - 1]);
    const container_id = pick(random, [id, "*", "other"]);
    const command = pick(random, ["ADD", "DEL", "x"]);
    rows.push([
      "operations",
      { container_id, command, pid, started, ...where, token, at_ms: times() },
    ]);
  }
  if (oneIn(random, 3)) {
    const end = { container_id: id, request_ifname: "eth0", command: "DEL", at_ms: times() };
    rows.push(["ended", end]);
  }
  if (oneIn(random, 4)) {
    const call = { container_id: id, request_ifname: "eth0", pod_namespace: "ns", pod_name: "p" };
    const annotations = pick(random, ["{}", "x", "[]", '{"a":1}']);
    rows.push(["statuses", { ...call, pod_uid: "u", annotations, at_ms: times() }]);
  }
  for (const table of ["choices", "stores", "health"] as const) {
    if (!oneIn(random, 4)) continue;
    const at_ms = times();
    const columns = {
      choices: { container_id: id, network: String(hostile(random)), at_ms },
      stores: { dir: "$DIR", stamp: "x", at_ms, ipv4: times(), ipv6: times() },
      health: { network: "blue", config_hash: "x", error: String(hostile(random)), at_ms },
    }[table];
    rows.push([table, columns]);
    annotate(input, { cni: "" });
  }
  if (oneIn(random, 4)) {
    const traffic = { container_id: id, ifname: "eth0", network: "blue", host_ifname: "../x" };
    rows.push(["traffic", { ...traffic, at_ms: times(), bytes: times(), bytes_per_second: null }]);
    input.table = "[default]\nnetworks = []\n";
  }
  // A column has one type; what does not fit is refused by SQLite before it can be hostile.
  const other = pick(random, rows)[1];
  const column = pick(random, Object.keys(other));
  if (typeof other[column] === "string" && column !== "started") {
    other[column] = mutateText(random, String(other[column])).toWellFormed();
  }
  input.rows = rows;
  if (oneIn(random, 4)) {
    const valid = oneIn(random, 2) ? [] : [{ containerID: id, ifname: "eth0" }];
    withStdin(input, (config) => ({ ...config, "cni.dev/valid-attachments": valid }));
  }
}

const metadata = (name: string, namespace = "ns") => ({ name, namespace });

function changeObjects(random: Random, input: Input): void {
  input.env["CNI_COMMAND"] = "ADD";
  input.table += '[kubernetes]\nkubeconfig = "$DIR/kubeconfig"\ntimeout = "2s"\n';
  input.files["kubeconfig"] = text(kubeconfig());
  const config = text({ cniVersion: pick(random, versions), name: "n", type: "fz-b", p: secret });
  const definitions = "/apis/k8s.cni.cncf.io/v1/namespaces/ns/network-attachment-definitions";
  const logical = "/apis/alpha.network.k8s.io/v1";
  const sub_subnet = pick(random, ["10.1.0.0/24", "10.1.0.0/16", "", "x", "fd00::/64"]);
  const one = { metadata: metadata("n1"), spec: { plugin: "blue", sub_subnet, physicalNet: "p" } };
  const sharedStatus = { plugin: "blue", subnet: "10.1.0.0/16", dedicatedNet: oneIn(random, 2) };
  const pod = {
    metadata: { ...metadata("pod"), uid: pick(random, ["u", "u", "v"]), annotations: {} },
    spec: { serviceAccountName: "default" },
  };
  const asked = pick(random, ["npwg", "npwg", "logical", "pod"]);
  const annotations =
    asked === "logical" ? { cni: "", networks: "n1@eth0" } : { cni: "blue", [npwg]: "a,ns/b@net5" };
  if (asked === "pod") {
    withStdin(input, ({ runtimeConfig: _, ...rest }) => rest);
    pod.metadata.annotations = oneIn(random, 3) ? { cni: selection(random) } : annotations;
  } else annotate(input, annotations);
  input.objects = {
    "/api/v1/namespaces/ns/pods/pod": text(pod),
    [`${definitions}/a`]: text({ metadata: metadata("a"), spec: { config } }),
    [`${definitions}/b`]: text({ metadata: metadata("b"), spec: { config } }),
    [`${logical}/namespaces/ns/logicalnetworks/n1`]: text(one),
    [`${logical}/namespaces/ns/physicalnetworks/p`]: text({
      metadata: metadata("p"),
      spec: { refer_nic: "eth9", sharedStatus },
    }),
    [`${logical}/logicalnetworks`]: text({ items: [one, pick(random, values)] }),
  };
  for (const path of Object.keys(input.objects)) {
    if (oneIn(random, 3)) input.objects[path] = mutate(random, input.objects[path] ?? "");
    if (oneIn(random, 12)) delete input.objects[path];
  }
}

function kubeconfig(): Json {
  return {
    apiVersion: "v1",
    kind: "Config",
    "current-context": "c",
    contexts: [{ name: "c", context: { cluster: "k", user: "u" } }],
    clusters: [{ name: "k", cluster: { server: "$API" } }],
    users: [{ name: "u", user: { token: secret } }],
  };
}

function changeKubeconfig(random: Random, input: Input): void {
  changeObjects(random, input);
  const config = kubeconfig();
  const users: Json[] = [
    { token: secret, tokenFile: "$DIR/netns" },
    { "client-certificate-data": btoa(secret), "client-key-data": btoa(`${secret}\n`) },
    { username: "x", password: secret },
    { exec: { command: "/bin/false", apiVersion: "client.authentication.k8s.io/v1" } },
  ];
  if (oneIn(random, 2)) config["users"] = [{ name: "u", user: pick(random, users) }];
  const made = text(config);
  input.files["kubeconfig"] = oneIn(random, 4)
    ? mutateText(random, Bun.YAML.stringify(config, null, 2))
    : mutate(random, made);
}
