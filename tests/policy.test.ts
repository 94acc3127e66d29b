/**
 * Network policies to nftables: lib/policy/compile.ts and lib/policy/peers.ts. What the text is for
 * each kind of rule stands in tests/fixtures/policy/*.nft.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import {
  compileHostPolicies,
  compilePolicies,
  hostTables,
  type PolicyAttachment,
  type PolicyWorld,
  policyProblems,
  policyWorld,
  reachesOut,
} from "../lib/policy/compile.ts";
import type { PolicyNetwork } from "../lib/policy/objects.ts";
import { multi, type PodShort, plain, pod, policy, world } from "./fixtures/policy/world.ts";
import { lacks } from "./skip.ts";

const folder = join(import.meta.dir, "fixtures", "policy");
const golden = (name: string): string => readFileSync(join(folder, `${name}.nft`), "utf8");

/** Seen from `a/web` with net1 on network a/blue. */
const web: PodShort = {
  name: "a/web",
  labels: { app: "web", tier: "front" },
  nets: { "a/blue@net1": ["10.1.0.10", "fd01::10"] },
  podIps: ["10.244.0.10"],
  ports: { "http/TCP": 8080, "dns/UDP": 5353 },
};
const others: PodShort[] = [
  {
    name: "a/db",
    labels: { app: "db" },
    nets: { "a/blue@net1": ["10.1.0.20", "FD01:0::20"], "a/red@net2": ["10.2.0.20"] },
    podIps: ["10.244.0.20"],
    ports: { "http/TCP": 80 },
  },
  {
    name: "a/job",
    labels: { app: "db" },
    nets: { "a/blue@net1": ["10.1.0.99"] },
    podIps: ["10.244.0.99"],
    phase: "Succeeded",
  },
  {
    name: "a/agent",
    labels: { app: "db" },
    podIps: ["192.168.0.1"],
    hostNetwork: true,
  },
  {
    name: "b/client",
    labels: { app: "client" },
    nets: { "b/blue@net1": ["10.1.0.30"], "a/blue@net2": ["10.1.0.31"] },
    podIps: ["10.244.0.30"],
    ports: { "http/TCP": 8000 },
  },
  {
    name: "c/client",
    labels: { app: "client" },
    nets: { "a/blue@net1": ["10.1.0.40"] },
    podIps: ["10.244.0.40"],
    ports: { "http/TCP": 8000 },
  },
];
const namespaces = { a: { team: "a" }, b: { team: "b" }, c: {} };
const blue: PolicyAttachment = { network: "a/blue", ifName: "net1", ips: ["10.1.0.10"] };
const eth0: PolicyAttachment = {
  network: "calico",
  ifName: "eth0",
  ips: ["10.244.0.10"],
  isDefault: true,
  enforcesPlain: true,
  nodeIps: ["192.168.0.1", "10.244.0.1", "fd00::1"],
};

const worldOf = (policies: object[], more: PodShort[] = []): PolicyWorld =>
  world({ policies, pods: [web, ...others, ...more], namespaces });
const compile = (policies: object[], attachments = [blue]) =>
  compilePolicies(worldOf(policies), pod(web), attachments);

const pods = { podSelector: {} };
const ingress = (...rules: unknown[]) => ({ ...pods, policyTypes: ["Ingress"], ingress: rules });
const egress = (...rules: unknown[]) => ({ ...pods, policyTypes: ["Egress"], egress: rules });
const app = (name: string) => ({ podSelector: { matchLabels: { app: name } } });
const cidr = (block: string, except?: string[]) => ({ ipBlock: { cidr: block, except } });

const cases: [name: string, policies: object[], attachments?: PolicyAttachment[]][] = [
  ["deny-both", [multi("p", { ...pods, policyTypes: ["Ingress", "Egress"] })]],
  ["allow-all-ingress", [multi("p", ingress({}))]],
  ["allow-all-egress", [multi("p", egress({}))]],
  ["pod-peers", [multi("p", ingress({ from: [app("db")] }))]],
  [
    "namespace-peers",
    [multi("p", ingress({ from: [{ namespaceSelector: { matchLabels: { team: "b" } } }] }))],
  ],
  [
    "namespace-and-pod-peers",
    [multi("p", egress({ to: [{ namespaceSelector: {}, ...app("client") }] }))],
  ],
  ["foreign-networks", [multi("p", ingress({ from: [app("db")] }), "b/blue, a/blue,a/red")]],
  [
    "blocks",
    [
      multi(
        "p",
        egress({
          to: [
            cidr("10.0.0.0/8", ["10.1.0.0/16", "10.1.2.0/24", "10.255.0.0/16"]),
            cidr("10.0.128.0/17"),
            cidr("192.168.1.7/32"),
            cidr("fd00::/8", ["fd00::/16"]),
          ],
        }),
      ),
    ],
  ],
  ["whole-families", [multi("p", ingress({ from: [cidr("0.0.0.0/0"), cidr("::/0")] }))]],
  [
    "ports",
    [
      multi(
        "p",
        ingress({
          from: [app("db")],
          ports: [
            { port: 443 },
            { port: 80 },
            { port: 8000, endPort: 8100 },
            { port: 8050, endPort: 8200 },
            { protocol: "UDP" },
            { protocol: "SCTP", port: 7 },
          ],
        }),
      ),
    ],
  ],
  ["ports-of-everybody", [multi("p", ingress({ ports: [{ port: 80 }] }))]],
  [
    "named-ports-ingress",
    [multi("p", ingress({ ports: [{ port: "http" }, { protocol: "UDP", port: "dns" }] }))],
  ],
  [
    "named-ports-egress",
    [multi("p", egress({ to: [{ namespaceSelector: {} }], ports: [{ port: "http" }] }))],
  ],
  [
    "several-policies",
    [
      multi("z", ingress({ from: [app("db")], ports: [{ port: 80 }] })),
      multi("b", ingress({ from: [app("db")] })),
      multi("c", egress({ to: [app("db")] })),
    ],
  ],
  ["default-network", [plain("p", ingress({ from: [app("db")] }))], [eth0, blue]],
  [
    "two-interfaces",
    [
      plain("p", ingress({ from: [app("db")] })),
      multi("m", { ...pods, policyTypes: ["Egress"] }, "blue"),
    ],
    [eth0, blue],
  ],
];

describe("compilePolicies()", () => {
  test.each(cases.map(([name, list, on = [blue]]) => [name, list, on] as const))(
    "%s",
    (name, policies, attachments) => {
      const { ruleset, problems } = compile(policies, attachments);
      expect({ ruleset, problems }).toEqual({ ruleset: golden(name), problems: [] });
    },
  );

  const check = (text: string): string => {
    const args = ["unshare", "--net", "nft", "--check", "--file", "-"];
    // Numbers for the marks, and an interface that is there.
    const names = ["seal", "seal_of_many", "seal_of_all"];
    const seals = names.map((name, i) => `define ${name} = ${i + 1}\n`).join("");
    const loaded = `${seals}${text.replaceAll(/device "\w+"/g, 'device "lo"')}`;
    return Bun.spawnSync(args, { stdin: Buffer.from(loaded) }).stderr.toString();
  };
  test.skipIf(lacks("network namespaces", "nftables", "util-linux"))(
    "nft takes every ruleset",
    () => {
      const files = readdirSync(folder).filter((name) => name.endsWith(".nft"));
      expect(files).toContain("deny-both.nft");
      // A kernel without nf_conntrack_bridge takes a bridge's rules, but none about connections.
      const onBridge = "table bridge x {\nchain c {\nct state new accept\n}\n}\n";
      const hasBridge = check(onBridge) === "";
      const said = files.flatMap((name) => {
        const text = readFileSync(join(folder, name), "utf8");
        const isWhole = hasBridge || !text.includes("table bridge");
        const error = check(isWhole ? text : text.replaceAll(/^\s*ct state .*\n/gm, ""));
        return error === "" ? [] : [`${name}: ${error}`];
      });
      expect(said).toEqual([]);
    },
  );

  test("the order of the inputs is nothing to the text", () => {
    const policies = cases.flatMap(([, list], i) =>
      list.map((one) => {
        const { metadata } = one as { metadata: { name: string } };
        return { ...one, metadata: { ...metadata, name: `${metadata.name}-${i}` } };
      }),
    );
    const forward = world({ policies, pods: [web, ...others], namespaces });
    const backward = world({
      policies: policies.toReversed(),
      pods: [web, ...others].toReversed(),
      namespaces: Object.fromEntries(Object.entries(namespaces).toReversed()),
    });
    const target = pod(web);
    expect(compilePolicies(backward, target, [blue, eth0])).toEqual(
      compilePolicies(forward, target, [eth0, blue]),
    );
  });

  const closed = multi("p", { ...pods, policyTypes: ["Ingress"] });
  test.each<[string, object[], PolicyAttachment[]]>([
    ["no policy", [], [blue]],
    ["a policy for another network", [multi("p", ingress(), "red")], [blue]],
    [
      "a policy of another namespace's network of that name",
      [multi("p", ingress(), "b/blue")],
      [blue],
    ],
    ["a policy for other pods", [multi("p", { ...ingress(), ...app("db") })], [blue]],
    [
      "a MultiNetworkPolicy and a default network that it does not name",
      [closed],
      [{ ...blue, network: "calico", isDefault: true }],
    ],
    [
      "a MultiNetworkPolicy whose networks cannot be read, and the default network",
      [multi("p", ingress(), "?")],
      [{ ...blue, isDefault: true }],
    ],
    ["a policy that names no network", [multi("p", ingress(), "")], [blue]],
    ["plain policy where the plugin enforces it", [plain("p", ingress())], [blue]],
    ["no interface", [closed], []],
  ])("nothing for %s", (_name, policies, attachments) => {
    expect(compile(policies, attachments).ruleset).toBe("");
  });

  test("a policy for a network holds for a pod that has it first", () => {
    const first = { ...blue, ifName: "eth0", isDefault: true as const };
    expect(compile([closed], [first]).ruleset).toContain('iifname "eth0" goto ingress_0');
  });

  test.each<[string, object, string]>([
    ["inbound", ingress({ from: [app("db")] }), "saddr"],
    ["outbound", egress({ to: [app("db")] }), "daddr"],
    ["inbound, on a port", ingress({ from: [app("db")], ports: [{ port: 80 }] }), "saddr"],
    ["outbound, on a named port", egress({ to: [app("db")], ports: [{ port: "http" }] }), "daddr"],
  ])(
    "a plain policy counts what a peer has besides in the default network: %s",
    (_name, spec, side) => {
      // This pod's default network is a further one of the peers, and the other way round.
      const first = { ...eth0, network: "a/blue", nodeIps: [] };
      const { ruleset } = compile([plain("p", spec)], [first]);
      const addresses = ruleset.match(/\d+\.\d+\.\d+\.\d+(?=[, ])/g)?.toSorted();
      // Its own and that in this network; not that in another one (10.2.0.20), and no other pod's.
      expect(addresses).toEqual(["10.1.0.20", "10.244.0.20"]);
      expect(ruleset).toContain(`ip ${side} @peers_0`);
      const elsewhere = compile([plain("p", spec)], [{ ...first, network: "calico" }]);
      expect(elsewhere.ruleset).not.toContain("10.1.0.20");
    },
  );

  const selects = { genieNetworkpolicy: '[{"networkSelector":"blue"}]' };
  const metadata = { namespace: "a", name: "p" };
  const between = policy({
    kind: "NetworkPolicy",
    metadata: { ...metadata, annotations: selects },
  });
  const logical = { kind: "Logicalnetwork" as const, namespace: "a", name: "blue", subnet: "" };
  const definition = { ...logical, kind: "NetworkAttachmentDefinition" as const };
  test.each<[string, PolicyNetwork[], boolean]>([
    ["is there", [logical], true],
    ["is gone, or not known yet", [], true],
    ["has the name of a definition", [logical, definition], true],
    ["has the name of a definition, whatever came first", [definition, logical], true],
    ["is none, but a definition", [definition], false],
  ])("a logical network that is selected and %s is closed", (_name, networks, isClosed) => {
    const inputs = { policies: [between], pods: [pod(web)], namespaces: [], networks };
    const { ruleset } = compilePolicies(policyWorld(inputs), pod(web), [blue]);
    expect(ruleset !== "").toBe(isClosed);
  });

  test("policies between networks are not about names of the plugin table", () => {
    const every = { genieNetworkpolicy: "unreadable" };
    const one = policy({ kind: "NetworkPolicy", metadata: { ...metadata, annotations: every } });
    const inputs = { policies: [one], pods: [pod(web)], namespaces: [], networks: [] };
    const named = { ...blue, network: "a" };
    expect(compilePolicies(policyWorld(inputs), pod(web), [named]).ruleset).toBe("");
  });

  test.each([
    ["net1", '"net1"'],
    ["net*", '"net\\*"'],
    ["n*t", '"n*t"'],
    ['n"t', '!= "lo"'],
    ["net\\*", '!= "lo"'],
    ["net\\", '!= "lo"'],
  ])("the interface name %s is matched as it is", (ifName, match) => {
    const { ruleset } = compile([closed], [{ ...blue, ifName }]);
    expect(ruleset).toContain(`iifname ${match} goto ingress_0\n`);
  });

  test.each<[string, object, RegExp]>([
    ["ingress, this pod's own", ingress({ ports: [{ port: "grpc" }] }), /pod a\/web has no/],
    [
      "ingress, of another protocol",
      ingress({ ports: [{ protocol: "UDP", port: "http" }] }),
      /"http"/,
    ],
    ["egress, no peer's", egress({ to: [app("db")], ports: [{ port: "grpc" }] }), /no peer pod/],
    [
      "egress, of addresses",
      egress({ to: [cidr("10.0.0.0/8")], ports: [{ port: "http" }] }),
      /no peer pod/,
    ],
  ])("a named port nobody has allows nothing: %s", (_name, spec, text) => {
    const { ruleset, problems } = compile([multi("p", spec)]);
    expect(ruleset).not.toContain("tcp dport");
    expect(problems.map((one) => one.text)).toEqual([expect.stringMatching(text)]);
  });
});

describe("compileHostPolicies()", () => {
  const policies = [
    multi("m", { ...pods, policyTypes: ["Ingress", "Egress"], egress: [{ to: [app("db")] }] }),
    plain("p", ingress({ from: [app("db"), cidr("0.0.0.0/0")] })),
  ];
  const ends = (net1: string | null | undefined, bridged = true): PolicyAttachment[] => [
    { ...eth0, hostEnd: { ifName: "cali1", bridged: false } },
    {
      ...blue,
      ...(net1 !== undefined && { hostEnd: net1 === null ? null : { ifName: net1, bridged } }),
    },
  ];
  const compileHost = (attachments: PolicyAttachment[], list = policies) =>
    compileHostPolicies(worldOf(list), pod(web), attachments, "c-1");

  test("one table on the bridge, one beside it, none in the pod", () => {
    expect(compileHost(ends("veth1"))).toEqual({
      hostRuleset: golden("host-ends"),
      ruleset: "",
      problems: [],
    });
  });

  test("an interface that is still to come has its rules in the pod", () => {
    const { hostRuleset: host, ruleset: inside, problems } = compileHost(ends(undefined));
    expect(inside).toContain('oifname "net1" goto egress_0');
    expect(inside).toContain('comment "a/m"');
    expect(host).toContain('oifname "cali1" goto ingress_0');
    expect(host).not.toContain("egress_");
    expect(problems).toEqual([]);
  });

  test.each([
    ["no host end", null],
    ["a host end nft cannot name", 'v"th'],
  ])("an interface with %s is closed in both directions, and it is said", (_name, net1) => {
    const isolating = [multi("m", ingress({ from: [app("db")] }))];
    const { hostRuleset, ruleset, problems } = compileHost(ends(net1), isolating);
    expect(hostRuleset).toBe("");
    for (const way of ['iifname "net1" goto ingress_0', 'oifname "net1" goto egress_0']) {
      expect(ruleset).toContain(way);
    }
    expect(ruleset).not.toContain('comment "a/m"');
    expect(problems).toEqual([
      {
        ...{ kind: "MultiNetworkPolicy", namespace: "a", name: "m", path: "spec", closes: "net1" },
        text: expect.stringMatching(
          /^interface net1 of pod a\/web, on network a\/blue, has no end/,
        ),
      },
    ]);
    expect(problems[0]?.text).toContain('set policy.where = "pod"');
    expect(compileHost(ends(net1), [])).toEqual({ hostRuleset: "", ruleset: "", problems: [] });
  });

  test("nothing where no policy applies; the tables can be named all the same", () => {
    expect(compileHost(ends("veth1"), [])).toEqual({ hostRuleset: "", ruleset: "", problems: [] });
    expect(hostTables("c-1")).toEqual(["bridge genie_c/1", "inet genie_c/1"]);
  });
});

describe("reachesOut()", () => {
  const everybody = { namespaceSelector: {} };
  test.each<[string, object, boolean]>([
    ["pods of its own namespace", multi("p", egress({ to: [app("db")] })), false],
    ["addresses", multi("p", ingress({ from: [cidr("10.0.0.0/8")] })), false],
    ["everybody", multi("p", egress({})), false],
    ["everybody, on a port", multi("p", egress({ ports: [{ port: 80 }] })), false],
    ["everybody, on a named port of ours", multi("p", ingress({ ports: [{ port: "a" }] })), false],
    ["everybody, on a named port", multi("p", egress({ ports: [{ port: "http" }] })), true],
    ["other namespaces", multi("p", ingress({ from: [everybody] })), true],
    ["networks", plain("p", {}, { genieNetworkpolicy: "[]" }), true],
  ])("%s", (_name, object, expected) => {
    expect(reachesOut(policy(object))).toBe(expected);
  });

  test("a port's name is asked of every pod where everybody is a peer", () => {
    const { ruleset } = compile([multi("p", egress({ ports: [{ port: "http" }] }))]);
    const ports = [...ruleset.matchAll(/tcp dport (\d+)/g)].map(([, port]) => port);
    expect([...new Set(ports)]).toEqual(["80", "8000", "8080"]);
  });
});

describe("policyProblems()", () => {
  test.each<[string, object, string, RegExp]>([
    [
      "nothing selected",
      { podSelector: { matchLabels: { app: "wbe" } } },
      "blue",
      /selects no pod/,
    ],
    ["a network nobody has", { podSelector: {} }, "blue,bleu", /unknown network "a\/bleu"/],
    ["no network", { podSelector: {} }, " ", /names no network/],
  ])("reports %s", (_name, spec, networks, text) => {
    const found = policyProblems(worldOf([multi("p", spec, networks)]));
    expect(found).toEqual([
      {
        kind: "MultiNetworkPolicy",
        namespace: "a",
        name: "p",
        path: expect.any(String),
        text: expect.stringMatching(text),
      },
    ]);
  });

  test("says nothing of a good policy, whose network may be one of the plugin table", () => {
    const nets = { "storage@net1": ["10.9.0.1"] };
    const policies = [multi("p", ingress({ from: [app("db")] }), "storage, blue")];
    expect(policyProblems(worldOf(policies, [{ name: "a/x", nets }]))).toEqual([]);
  });
});
