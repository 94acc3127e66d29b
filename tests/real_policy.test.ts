/**
 * What the rulesets of lib/policy/compile.ts do to packets: real namespaces on a real bridge,
 * policies as API objects, put in force by lib/policy/nft.ts. Every row says what passes, and
 * everything else must not.
 */
import { afterAll, afterEach, beforeAll, expect } from "bun:test";
import { join } from "node:path";
import { compileHostPolicies, compilePolicies, hostTables } from "../lib/policy/compile.ts";
import { applyRuleset, readRuleset, removeRuleset, verifyRuleset } from "../lib/policy/nft.ts";
import { makeHost } from "./fakes.ts";
import { type Cluster, makeCluster, openPorts, type WirePod } from "./fixtures/policy/cluster.ts";
import { multi, type PodShort, plain, pod, world } from "./fixtures/policy/world.ts";
import { needing } from "./skip.ts";

const { absent, describe, test } = needing(
  "network namespaces",
  "nftables",
  "iputils-ping",
  "util-linux",
  "procps",
);

const host = makeHost();
const families = [4, 6] as const;
type Family = (typeof families)[number];
/** The pod with the ruleset, one that policies name, one they do not. */
const names = ["web", "friend", "stranger"];
let cluster: Cluster;

if (!absent) {
  beforeAll(async () => {
    cluster = await makeCluster(names);
  });
  afterAll(() => cluster[Symbol.asyncDispose]());
}

function wirePod(name: string): WirePod {
  const found = cluster.pods[name];
  if (found === undefined) throw new Error(`no pod ${name}`);
  return found;
}

/** The pods as the API server knows them, each on its network. */
const shorts = (nets: string[] = []): PodShort[] =>
  names.map((name, i) => {
    const { ips } = wirePod(name);
    const both = [ips[4], ips[6]];
    return {
      name: name === "stranger" ? "b/stranger" : `a/${name}`,
      labels: { app: name },
      nets: { [`${nets[i] ?? "a/blue"}@net1`]: both },
      podIps: both,
      ports: { "http/TCP": name === "friend" ? 81 : 80 },
    };
  });

interface Situation {
  policies: object[];
  networks?: Record<string, string>;
  enforcesPlain?: boolean;
  /** The network web is attached to. */
  network?: string;
}

async function putInForce(situation: Situation): Promise<void> {
  const { policies, networks = {}, network = "a/blue", enforcesPlain = false } = situation;
  const pods = shorts(Object.keys(networks));
  const namespaces = { a: { team: "a" }, b: { team: "b" } };
  const web = pods[0] ?? { name: "a/web" };
  const ips = Object.values(wirePod("web").ips);
  const { ruleset } = compilePolicies(world({ policies, pods, namespaces, networks }), pod(web), [
    { network, ifName: "net1", ips, enforcesPlain },
  ]);
  await applyRuleset(host, wirePod("web").netns, ruleset);
  // Neighbours are looked for anew, under these rules.
  wirePod("web").run("ip", "neigh", "flush", "dev", "net1");
  expect(await verifyRuleset(host, wirePod("web").netns, ruleset)).toBeUndefined();
}

const ways = ["friend>web", "stranger>web", "web>friend", "web>stranger"];
const kinds = ["ping", "tcp 80", "tcp 81", "udp 80", "udp 81"];
/** Every probe there is: `friend>web tcp 80`. */
const everything = ways.flatMap((way) => kinds.map((kind) => `${way} ${kind}`));
const all = (...which: string[]) =>
  everything.filter((one) => which.some((start) => one.startsWith(start)));

/** How long an answer that must come may take, and one that must not. */
const patientMs = 20_000;
const impatientMs = 300;

/** Which probes get through. Those that should are given all the time they need. */
async function reached(family: Family, expected: string[]): Promise<string[]> {
  const verdicts = await Promise.all(
    everything.map(async (label) => {
      const [way = "", kind = "ping", port = "0"] = label.split(" ");
      const [from = "", to = ""] = way.split(">");
      const probe = {
        kind: kind as "ping" | "tcp" | "udp",
        to: wirePod(to).ips[family],
        port: Number(port),
        waitMs: expected.includes(label) ? patientMs : impatientMs,
      };
      return (await wirePod(from).probe(probe)) ? [label] : [];
    }),
  );
  return verdicts.flat().sort();
}

const friend = { podSelector: { matchLabels: { app: "friend" } } };
const spec = (types: string[], more: object) => ({ podSelector: {}, policyTypes: types, ...more });
const both = ["Ingress", "Egress"];
const cidrs = (part: string) => [
  { ipBlock: { cidr: `10.77.0.${part}/32` } },
  { ipBlock: { cidr: `fd77::${part}/128` } },
];

const rows: [name: string, situation: Situation, expected: string[]][] = [
  ["no policy", { policies: [] }, everything],
  ["both directions closed", { policies: [multi("p", spec(both, {}))] }, []],
  [
    "ingress closed: answers to what the pod asks come in",
    { policies: [multi("p", spec(["Ingress"], {}))] },
    all("web>"),
  ],
  [
    "egress closed: answers to what others ask go out",
    { policies: [multi("p", spec(["Egress"], {}))] },
    all("friend>", "stranger>"),
  ],
  [
    "ingress from pods",
    { policies: [multi("p", spec(["Ingress"], { ingress: [{ from: [friend] }] }))] },
    all("friend>", "web>"),
  ],
  [
    "egress to pods",
    { policies: [multi("p", spec(["Egress"], { egress: [{ to: [friend] }] }))] },
    all("friend>", "stranger>", "web>friend"),
  ],
  [
    "ingress from a namespace",
    {
      policies: [
        multi(
          "p",
          spec(both, {
            ingress: [{ from: [{ namespaceSelector: { matchLabels: { team: "b" } } }] }],
          }),
        ),
      ],
    },
    all("stranger>"),
  ],
  [
    "ports in both directions",
    {
      policies: [
        multi(
          "p",
          spec(both, {
            ingress: [{ from: [friend], ports: [{ port: 80 }, { protocol: "UDP", port: 81 }] }],
            egress: [{ ports: [{ protocol: "UDP", port: 80, endPort: 81 }] }],
          }),
        ),
      ],
    },
    all("friend>web tcp 80", "friend>web udp 81", "web>friend udp", "web>stranger udp"),
  ],
  [
    "named ports: ours on the way in, theirs on the way out",
    {
      policies: [
        multi(
          "p",
          spec(both, {
            ingress: [{ ports: [{ port: "http" }] }],
            egress: [{ to: [{ namespaceSelector: {} }], ports: [{ port: "http" }] }],
          }),
        ),
      ],
    },
    ["friend>web tcp 80", "stranger>web tcp 80", "web>friend tcp 81", "web>stranger tcp 80"],
  ],
  [
    "addresses, with an exception",
    {
      policies: [
        multi(
          "p",
          spec(both, {
            ingress: [{ from: cidrs("2") }],
            egress: [
              {
                to: [
                  { ipBlock: { cidr: "10.77.0.0/24", except: ["10.77.0.2/32"] } },
                  { ipBlock: { cidr: "fd77::/64", except: ["fd77::2/128"] } },
                ],
              },
            ],
          }),
        ),
      ],
    },
    all("friend>", "web>stranger"),
  ],
  [
    "two policies allow what either allows",
    {
      policies: [
        multi("p", spec(["Ingress"], { ingress: [{ ports: [{ port: 80 }] }] })),
        multi("q", spec(["Ingress"], { ingress: [{ from: [friend], ports: [{ port: 81 }] }] })),
      ],
    },
    all("web>").concat("friend>web tcp 80", "friend>web tcp 81", "stranger>web tcp 80"),
  ],
  [
    "a plain NetworkPolicy where it is ours",
    {
      policies: [plain("p", spec(["Ingress"], { ingress: [{ from: [friend] }] }))],
      enforcesPlain: true,
    },
    all("friend>", "web>"),
  ],
  ["a plain NetworkPolicy where it is not", { policies: [plain("p", spec(both, {}))] }, everything],
  [
    "a typo in a rule: no door",
    {
      policies: [
        multi("p", spec(["Ingress"], { ingress: [{ form: [friend] }, { from: [{ pods: {} }] }] })),
      ],
    },
    all("web>"),
  ],
];

test.each(rows)("%s", async (_name, situation, expected) => {
  await putInForce(situation);
  const found = await Promise.all(families.map((family) => reached(family, expected)));
  expect(found).toEqual(families.map(() => [...expected].sort()));
});

describe("CNI-Genie's policy between networks", () => {
  // One pod each: web is in net1, friend in net2, stranger in net3.
  const subnets = ["10.77.0.1/32", "10.77.0.2/32", "10.77.0.3/32"];
  const networks = Object.fromEntries(subnets.map((subnet, i) => [`a/net${i + 1}`, subnet]));
  test.each<[string, string, string[]]>([
    ["no policy", "[]", everything],
    ["one peer network", '[{"networkSelector":"net1","peerNetworks":"net2"}]', all("f", "web>f")],
    ["two", '[{"networkSelector":"net1","peerNetworks":"net2,net3"}]', everything],
    ["a network that is not there", '[{"networkSelector":"net1","peerNetworks":"net9"}]', []],
    ["nothing that can be read", "[{networkSelector net1}]", []],
  ])("%s", async (_name, genieNetworkpolicy, expected) => {
    const policies = [plain("p", { podSelector: {} }, { genieNetworkpolicy })];
    await putInForce({ policies, networks, network: "a/net1" });
    expect(await reached(4, expected)).toEqual([...expected].sort());
  });
});

describe("at the host end of a routed interface", () => {
  let bridged: Cluster;
  beforeAll(async () => {
    bridged = cluster;
    cluster = await makeCluster(names, true);
  });
  afterAll(async () => {
    await cluster[Symbol.asyncDispose]();
    cluster = bridged;
  });

  const containerId = "c0ffee-1";
  const putOutside = async ({ policies, enforcesPlain = false }: Situation) => {
    const pods = shorts();
    const made = world({ policies, pods, namespaces: { a: { team: "a" }, b: { team: "b" } } });
    const web = pod(pods[0] ?? { name: "a/web" });
    const hostEnd = { ifName: "veth-web", bridged: false };
    const attachment = { network: "a/blue", ifName: "net1", ips: [], enforcesPlain, hostEnd };
    const compiled = compileHostPolicies(made, web, [attachment], containerId);
    expect(compiled.ruleset).toBe("");
    await applyRuleset(host, cluster.node, compiled.hostRuleset);
  };
  afterEach(async () => {
    await removeRuleset(host, cluster.node, hostTables(containerId));
    const tables = hostTables(containerId).map((one) => readRuleset(host, cluster.node, one));
    expect(await Promise.all(tables)).toEqual([undefined, undefined]);
  });

  test.each(rows)("%s", async (_name, situation, expected) => {
    await putOutside(situation);
    const found = await Promise.all(families.map((family) => reached(family, expected)));
    expect(found).toEqual(families.map(() => [...expected].sort()));
  });

  test.each([[""], ["bypass"]])("a packet socket gets no further: %j", async (option) => {
    await putOutside(udp80);
    expect(await arrivals(option)).toEqual({ 80: 2, 81: 0 });
  });
});

const udp80: Situation = {
  policies: [
    multi("p", spec(["Egress"], { egress: [{ ports: [{ protocol: "UDP", port: 80 }] }] })),
  ],
};

describe("in the pod", () => {
  test.each([[""], ["bypass"]])("a packet socket sends nothing: %j", async (option) => {
    await putInForce(udp80);
    expect(await arrivals(option)).toEqual({ 80: 1, 81: 0 });
  });

  test("without a policy it sends what it likes", async () => {
    await putInForce({ policies: [] });
    expect(await arrivals("")).toEqual({ 80: 2, 81: 1 });
  });
});

/**
 * Sends from web to friend through a packet socket, to both ports, then as everybody does to port
 * 80, which is allowed. How many arrived, by port.
 */
async function arrivals(option: string): Promise<Record<string, number>> {
  const [web, friendPod] = [wirePod("web"), wirePod("friend")];
  const rules = openPorts.map((port) => `udp sport 40000 udp dport ${port} counter`).join("\n");
  const hook = "type filter hook prerouting priority -300;";
  const allowed = { kind: "udp", to: friendPod.ips[4], port: 80, waitMs: patientMs } as const;
  // So that the next hop is known.
  expect(await web.probe(allowed)).toBe(true);
  const own = web.run("cat", "/sys/class/net/net1/address").trim();
  const neighbours = web.run("ip", "-4", "neigh", "show", "dev", "net1");
  const next = / lladdr (\S+)/.exec(neighbours)?.[1] ?? "";
  const program = join(import.meta.dir, "fixtures", "policy", "packet.ts");
  friendPod.run("nft", `table inet seen {\nchain c {\n${hook}\n${rules}\n}\n}\n`);
  try {
    for (const port of openPorts) {
      const args = ["net1", own, next, web.ips[4], friendPod.ips[4], String(port), option];
      web.run(process.execPath, program, ...args);
    }
    // What was sent before it has come by now, or never will.
    expect(await web.probe({ ...allowed, fromPort: 40_000 })).toBe(true);
    const listed = friendPod.run("nft", "list", "table", "inet", "seen");
    const counts = listed.matchAll(/dport (\d+) counter packets (\d+)/g);
    return Object.fromEntries([...counts].map(([, port, count]) => [port, Number(count)]));
  } finally {
    friendPod.run("nft", "delete", "table", "inet", "seen");
  }
}

describe("an edited policy", () => {
  test.each(families.map((family) => [family]))("ends what runs over IPv%d", async (family) => {
    const udp = (waitMs: number) => {
      const to = wirePod("web").ips[family];
      return wirePod("friend").probe({ kind: "udp", to, port: 80, waitMs, fromPort: 40_000 });
    };
    await putInForce({ policies: [multi("p", spec(["Ingress"], { ingress: [{}] }))] });
    expect(await udp(patientMs)).toBe(true);
    await putInForce({ policies: [multi("p", spec(["Ingress"], {}))] });
    expect(await udp(impatientMs)).toBe(false);
    await putInForce({ policies: [] });
    expect(await udp(patientMs)).toBe(true);
  });
});

describe("with both directions closed", () => {
  test("neighbours are found, and the pod talks to itself", async () => {
    await putInForce({ policies: [multi("p", spec(both, {}))] });
    const { ips, probe } = wirePod("web");
    const { netns, run } = wirePod("stranger");
    run("ip", "neigh", "flush", "dev", "net1");
    for (const family of families) {
      const lookUp = ["ping", "-c", "1", "-W", "0.1", ips[family]];
      Bun.spawnSync(["nsenter", `--net=${netns}`, ...lookUp]);
      const neighbour = ["ip", `-${family}`, "neigh", "show", "to", ips[family], "dev", "net1"];
      await until(() => / lladdr /.test(run(...neighbour)));
    }
    for (const to of ["127.0.0.1", "::1", ...Object.values(ips)]) {
      for (const kind of ["tcp", "udp", "ping"] as const) {
        expect(await probe({ kind, to, port: 80, waitMs: patientMs })).toBe(true);
      }
    }
  });
});

/** Waits for what the kernel does by itself; fails with the test's own deadline. */
async function until(isSo: () => boolean): Promise<void> {
  while (!isSo()) await new Promise((done) => setImmediate(done));
}
