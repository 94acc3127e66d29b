/**
 * API objects to what policy is decided on: lib/policy/objects.ts and lib/policy/rules.ts. What
 * cannot be read is reported, and closed.
 */
import { describe, expect, test } from "bun:test";
import { canonicalIP, formatSubnet, parseSubnet, unmapped } from "../lib/ip.ts";
import { compilePolicies } from "../lib/policy/compile.ts";
import {
  type Policy,
  parsePolicy,
  parsePolicyNamespace,
  parsePolicyNetwork,
  parsePolicyPod,
} from "../lib/policy/objects.ts";
import { multi, plain, pod, policy, world } from "./fixtures/policy/world.ts";

const web = { matchLabels: { app: "web" } };
const isWeb = [["app", "In", ["web"]]];

describe("parsePolicy()", () => {
  const direction = ({ ingress, egress }: Policy) => ({ ingress, egress });
  test.each<[string, object, object]>([
    ["no types, no rules: ingress", {}, { ingress: [] }],
    ["no types, ingress rules", { ingress: [{}] }, { ingress: [{}] }],
    ["no types, egress rules: both", { egress: [{}] }, { ingress: [], egress: [{}] }],
    ["no types, empty egress: ingress", { egress: [] }, { ingress: [] }],
    ["Egress alone", { policyTypes: ["Egress"], ingress: [{}] }, { egress: [] }],
    ["null rules", { policyTypes: ["Ingress"], ingress: null }, { ingress: [] }],
    ["a null rule is everything, as {} is", { ingress: [null] }, { ingress: [{}] }],
    ["empty from: everybody", { ingress: [{ from: [], ports: [] }] }, { ingress: [{}] }],
  ])("%s", (_name, spec, expected) => {
    const parsed = policy(multi("p", spec));
    expect(direction(parsed)).toEqual(expected as never);
    expect(parsed.problems).toEqual([]);
    expect(direction(policy(plain("p", spec)))).toEqual(expected as never);
  });

  test.each<[string, object, object]>([
    ["pods", { podSelector: web }, { pods: isWeb }],
    ["every pod of the namespace", { podSelector: {} }, { pods: [] }],
    ["namespaces", { namespaceSelector: web }, { namespaces: isWeb }],
    [
      "both in one element",
      { namespaceSelector: {}, podSelector: web },
      { pods: isWeb, namespaces: [] },
    ],
    ["a block", { ipBlock: { cidr: "10.0.0.0/8" } }, { block: "10.0.0.0/8" }],
    [
      "a block with exceptions",
      { ipBlock: { cidr: "FD00::/8", except: ["fd00:0::/16", "fd00::/16"] } },
      { block: "fd00::/8", except: ["fd00::/16"] },
    ],
    [
      "expressions, sorted",
      {
        podSelector: {
          matchLabels: { b: "1" },
          matchExpressions: [
            { key: "c", operator: "NotIn", values: ["y", "x", "y"] },
            { key: "a", operator: "Exists" },
            { key: "d", operator: "DoesNotExist", values: [] },
          ],
        },
      },
      {
        pods: [
          ["a", "Exists", []],
          ["b", "In", ["1"]],
          ["c", "NotIn", ["x", "y"]],
          ["d", "DoesNotExist", []],
        ],
      },
    ],
  ])("a peer: %s", (_name, peer, expected) => {
    const parsed = policy(multi("p", { ingress: [{ from: [peer] }] }));
    expect(parsed.ingress).toEqual([{ peers: [expected] }] as Policy["ingress"]);
    expect(parsed.problems).toEqual([]);
  });

  test.each<[string, unknown, RegExp]>([
    ["no object", "web", /no peer/],
    ["nobody", {}, /names nobody/],
    ["an unknown key", { podSelector: web, namespaceSelectr: {} }, /"namespaceSelectr"/],
    ["an unknown key of a selector", { podSelector: { matchLabel: {} } }, /"matchLabel"/],
    ["a label that is no text", { podSelector: { matchLabels: { a: 1 } } }, /no string/],
    [
      "an unknown operator",
      { podSelector: { matchExpressions: [{ key: "a", operator: "in", values: ["b"] }] } },
      /"in", use In, NotIn/,
    ],
    [
      "In without values",
      { podSelector: { matchExpressions: [{ key: "a", operator: "In" }] } },
      /In needs values/,
    ],
    [
      "Exists with values",
      { podSelector: { matchExpressions: [{ key: "a", operator: "Exists", values: ["b"] }] } },
      /takes no values/,
    ],
    ["a block and a selector", { ipBlock: { cidr: "10.0.0.0/8" }, podSelector: {} }, /alone/],
    ["an address without prefix", { ipBlock: { cidr: "10.0.0.1" } }, /no CIDR/],
    ["an octet too large", { ipBlock: { cidr: "10.0.256.0/24" } }, /no CIDR/],
    ["leading zeros", { ipBlock: { cidr: "010.0.0.0/8" } }, /no CIDR/],
    ["a prefix too long", { ipBlock: { cidr: "10.0.0.0/33" } }, /no CIDR/],
    ["an exception outside", { ipBlock: { cidr: "10.0.0.0/8", except: ["1.0.0.0/24"] } }, /inside/],
    ["a larger exception", { ipBlock: { cidr: "10.1.0.0/16", except: ["10.0.0.0/8"] } }, /inside/],
    [
      "an exception of the other family",
      { ipBlock: { cidr: "::/0", except: ["10.0.0.0/8"] } },
      /i/,
    ],
    ["an unreadable exception", { ipBlock: { cidr: "0.0.0.0/0", except: ["10.0.0/8"] } }, /CIDR/],
    ["half IPv4 in IPv6", { ipBlock: { cidr: "::ffc0:0:0/90" } }, /mixes IPv4 and IPv6/],
  ])("a peer that cannot be read takes its rule along: %s", (_name, peer, text) => {
    const parsed = policy(multi("p", { ingress: [{ from: [peer] }, { ports: [{ port: 80 }] }] }));
    expect(parsed.ingress).toEqual([{ ports: [{ protocol: "tcp", port: 80 }] }]);
    expect(parsed.problems).toEqual([
      {
        kind: "MultiNetworkPolicy",
        namespace: "a",
        name: "p",
        path: expect.stringMatching(/^spec\.ingress\[0\]\.from\[0\]/),
        text: expect.stringMatching(text),
      },
    ]);
  });

  test("a peer that can be read stays when another cannot", () => {
    const spec = { ingress: [{ from: [{ podSelector: web }, { pod: web }] }] };
    const { ingress, problems } = policy(multi("p", spec));
    expect(ingress).toEqual([{ peers: [{ pods: isWeb }] }] as Policy["ingress"]);
    expect(problems).toHaveLength(1);
  });

  test.each<[string, string, string, RegExp]>([
    ["bits behind the prefix", "10.1.2.3/16", "10.1.0.0/16", /counts as 10\.1\.0\.0\/16/],
    ["IPv4 in IPv6", "::ffff:10.0.0.0/104", "10.0.0.0/8", /counts as 10\.0\.0\.0\/8/],
  ])("a CIDR with %s counts, and is reported", (_name, cidr, block, text) => {
    const parsed = policy(multi("p", { ingress: [{ from: [{ ipBlock: { cidr } }] }] }));
    expect(parsed.ingress).toEqual([{ peers: [{ block }] }]);
    expect(parsed.problems.map((one) => one.text)).toEqual([expect.stringMatching(text)]);
  });

  test.each<[string, unknown, object]>([
    ["a number", { port: 80 }, { protocol: "tcp", port: 80 }],
    ["UDP", { port: 53, protocol: "UDP" }, { protocol: "udp", port: 53 }],
    ["every port", { protocol: "SCTP" }, { protocol: "sctp" }],
    ["a name", { port: "http" }, { protocol: "tcp", name: "http" }],
    ["a range", { port: 1, endPort: 65535 }, { protocol: "tcp", port: 1, endPort: 65535 }],
    ["a range of one", { port: 80, endPort: 80 }, { protocol: "tcp", port: 80 }],
  ])("a port: %s", (_name, port, expected) => {
    const { egress, problems } = policy(multi("p", { egress: [{ ports: [port] }] }));
    expect({ egress, problems }).toEqual({
      egress: [{ ports: [expected] }] as Policy["egress"],
      problems: [],
    });
  });

  test.each<[string, unknown]>([
    ["zero", { port: 0 }],
    ["too large", { port: 65536 }],
    ["a fraction", { port: 80.5 }],
    ["digits as text", { port: "80" }],
    ["no name", { port: "HTTP_" }],
    ["a range backwards", { port: 90, endPort: 80 }],
    ["a range without begin", { endPort: 80 }],
    ["a range of a name", { port: "http", endPort: 80 }],
    ["an unknown protocol", { port: 80, protocol: "tcp" }],
    ["a protocol of JavaScript's own", { port: 80, protocol: "constructor" }],
    ["an unknown key", { prot: 80 }],
    ["no object", 80],
  ])("a port that cannot be read takes its rule along: %s", (_name, port) => {
    const { egress, problems } = policy(multi("p", { egress: [{ ports: [port] }] }));
    expect(egress).toEqual([]);
    expect(problems.map(({ path }) => path)).toEqual(["spec.egress[0].ports[0]"]);
  });

  test.each<[string, unknown, Partial<Policy>]>([
    ["no spec", undefined, { pods: null, ingress: [], egress: [] }],
    ["an unreadable selector", { podSelector: { app: "web" } }, { pods: null, ingress: [] }],
    ["an unknown key: egress too", { egres: [{}], ingress: [{}] }, { ingress: [{}], egress: [] }],
    ["an unknown type: egress too", { policyTypes: ["Egres"] }, { ingress: [], egress: [] }],
    ["types that are no list", { policyTypes: "Egress" }, { ingress: [], egress: [] }],
    ["rules that are no list", { ingress: {} }, { ingress: [] }],
    ["an unknown key of a rule", { ingress: [{ form: [] }] }, { ingress: [] }],
    ["peers that are no list", { ingress: [{ from: {} }] }, { ingress: [] }],
  ])("a spec with %s is closed", (_name, spec, expected) => {
    const parsed = policy(multi("p", spec));
    expect(parsed).toMatchObject(expected);
    expect(parsed.problems.length).toBeGreaterThan(0);
  });

  test.each<[string, string | undefined, string[] | null, number]>([
    ["a name: also one of the plugin table", "blue", ["a/blue", "blue"], 0],
    ["of another namespace", "b/blue", ["b/blue"], 0],
    ["several, with spaces", " b/blue , red", ["a/red", "b/blue", "red"], 0],
    ["none", "", [], 1],
    ["absent", undefined, [], 1],
    ["an unreadable one: all of them", "blue;red", null, 1],
    ["too many slashes", "a/b/c", null, 1],
  ])("networks: %s", (_name, text, networks, count) => {
    const object = multi("p", {}, text);
    const parsed = policy(text === undefined ? { ...object, ...bare() } : object);
    expect(parsed.networks).toEqual(networks);
    expect(parsed.problems).toHaveLength(count);
  });
  const bare = () => ({ metadata: { namespace: "a", name: "p" } });

  test("is told apart by its group where a list leaves out the kind", () => {
    const { kind: _kind, ...listed } = multi("p", {}) as { kind: string };
    expect(policy(listed).kind).toBe("MultiNetworkPolicy");
  });

  test.each([
    [undefined],
    [null],
    ["x"],
    [{}],
    [{ metadata: { name: "p" } }],
    [{ metadata: { name: "p/q", namespace: "a" } }],
    [{ metadata: { name: "p", namespace: 1 } }],
  ])("without an identity it is refused whole: %j", (object) => {
    expect(parsePolicy(object)).toBeUndefined();
  });

  test("is plain data", () => {
    const parsed = policy(multi("p", { ingress: [{ from: [{ podSelector: web }] }] }));
    expect(JSON.parse(JSON.stringify(parsed))).toEqual(parsed);
  });

  test("a thousand mistakes are twenty sentences", () => {
    const ingress = Array.from({ length: 1000 }, () => "x");
    expect(policy(multi("p", { ingress })).problems).toHaveLength(20);
  });
});

describe("genieNetworkpolicy", () => {
  // As docs/network-policy of CNI-Genie shows it.
  const manual = `[
        {
          networkSelector: net1
          peerNetworks: net2
        },
        {
          networkSelector: net4
          peerNetworks: net3,net5\u0020
        }
      ]
`;
  const both = [
    { network: "net1", peers: ["net2"] },
    { network: "net4", peers: ["net3", "net5"] },
  ];
  const closed = [{ network: "*", peers: [] }];
  test.each<[string, string, object[], number]>([
    ["the manual's form", manual, both, 0],
    [
      "JSON",
      '[{"networkSelector":" net1 ","peerNetworks":"net2"},' +
        '{"networkSelector":"net4","peerNetworks":"net5, net3,"}]',
      both,
      0,
    ],
    [
      "a remark behind a line",
      "[\n{\nnetworkSelector: net1\npeerNetworks: net2  # Removed net3\n}\n]",
      [{ network: "net1", peers: ["net2"] }],
      0,
    ],
    ["no entry", "[]", [], 0],
    [
      "no peers: within itself",
      '[{"networkSelector":"net1"}]',
      [{ network: "net1", peers: [] }],
      0,
    ],
    ["no list", "net1: net2", closed, 1],
    ["an object", '{"networkSelector":"net1"}', closed, 1],
    ["an entry without selector", '[{"peerNetworks":"net2"}]', closed, 1],
    ["an entry that is none", "[{net1 net2}]", closed, 1],
    ["text between entries", "[{\nnetworkSelector: net1\n} or {\n}]", closed, 1],
    [
      "an unreadable peer",
      '[{"networkSelector":"net1","peerNetworks":"a b,net2"}]',
      [{ network: "net1", peers: ["net2"] }],
      1,
    ],
    [
      "peers in a list",
      '[{"networkSelector":"net1","peerNetworks":["net2"]}]',
      [{ network: "net1", peers: [] }],
      1,
    ],
    [
      "an unknown key",
      '[{"networkSelector":"net1","peerNetwork":"net2"}]',
      [{ network: "net1", peers: [] }],
      1,
    ],
  ])("%s", (_name, text, expected, count) => {
    for (const key of ["genieNetworkpolicy", "genieNetworkPolicy"]) {
      const parsed = policy(plain("p", { podSelector: {} }, { [key]: text }));
      expect(parsed.between).toEqual(expected as Policy["between"]);
      expect(parsed.ingress).toBeUndefined();
      expect(parsed.problems).toHaveLength(count);
    }
  });

  const subnets = { net1: "10.1.0.0/24", net2: "10.2.0.0/24", net3: "10.3.0.0/24" };
  const more = { ...subnets, net4: "10.4.0.0/24" };
  const select = (peerNetworks: string, networkSelector = "net1") => ({
    networkSelector,
    peerNetworks,
  });

  /** The pairs of networks that can talk: what a pod of the one lets in and out of the other. */
  function talking(networks: Record<string, string>, entries: object[]): string[] {
    const names = Object.keys(networks);
    const pods = names.map((name) => ({
      name: `a/${name}`,
      nets: { [`a/${name}@eth1`]: [networks[name]?.replace("0/24", "9") ?? ""] },
    }));
    const annotation = { genieNetworkpolicy: JSON.stringify(entries) };
    const made = world({
      policies: entries.length === 0 ? [] : [plain("access-nginx", {}, annotation)],
      pods,
      networks: Object.fromEntries(names.map((name) => [`a/${name}`, networks[name] ?? ""])),
    });
    const admits = (name: string, other: string): boolean => {
      const attachment = { network: `a/${name}`, ifName: "eth1", ips: [] };
      const { ruleset } = compilePolicies(made, pod({ name: `a/${name}` }), [attachment]);
      const chains = ["saddr", "daddr"].map((side) => ruleset.includes(`ip ${side} @peers_0`));
      if (ruleset === "") return true;
      expect(chains).toEqual([true, true]);
      return ruleset.includes(networks[other]?.replace("/24", "") ?? "?");
    };
    return names.flatMap((one, i) =>
      names
        .slice(i)
        .filter((other) => admits(one, other) && admits(other, one))
        .map((other) => `${one}-${other}`),
    );
  }
  test("a pod of another network is no member, though its address lies in the part", () => {
    const annotation = { genieNetworkpolicy: JSON.stringify([select("net2")]) };
    const made = world({
      policies: [plain("p", {}, annotation)],
      pods: [
        { name: "a/plain", nets: { "phy@eth0": ["10.1.0.7"] } },
        { name: "a/silent", podIps: ["10.2.0.9"] },
        { name: "a/member", nets: { "a/net2@eth0": ["10.2.0.5", "10.9.0.1"] } },
      ],
      networks: { "a/net1": "10.1.0.0/29", "a/net2": "10.2.0.8/29" },
    });
    const attachment = { network: "a/net1", ifName: "eth0", ips: [] };
    const { ruleset } = compilePolicies(made, pod({ name: "a/x" }), [attachment]);
    // Its own part without the plain pod, that of the peer without the silent one.
    expect(ruleset).toContain("10.1.0.0-10.1.0.6, 10.2.0.8, 10.2.0.10-10.2.0.15");
    expect(ruleset).toContain("10.2.0.5, 10.9.0.1");
  });

  const within = ["net1-net1", "net2-net2", "net3-net3", "net4-net4"];
  const rest = ["net2-net3", "net2-net4", "net3-net4"];
  test.each<[string, Record<string, string>, object[], string[]]>([
    ["1: no policy", more, [], [...within, ...rest, "net1-net2", "net1-net3", "net1-net4"]],
    ["2: one peer", more, [select("net2")], [...within, ...rest, "net1-net2"]],
    [
      "3: two entries",
      more,
      [select("net2"), select("net3")],
      [...within, ...rest, "net1-net2", "net1-net3"],
    ],
    [
      "4: a peer that is not there",
      { net1: subnets.net1, net2: subnets.net2 },
      [select("net4")],
      ["net1-net1", "net2-net2"],
    ],
    [
      "4: and comes later",
      { net1: subnets.net1, net2: subnets.net2, net4: more.net4 },
      [select("net4")],
      ["net1-net1", "net2-net2", "net4-net4", "net1-net4", "net2-net4"],
    ],
    [
      "5: two peers in one entry",
      more,
      [select("net2,net3")],
      [...within, ...rest, "net1-net2", "net1-net3"],
    ],
    ["5: and one taken out", more, [select("net2")], [...within, ...rest, "net1-net2"]],
  ])("scenario %s", (_name, networks, entries, expected) => {
    expect(talking(networks, entries).sort()).toEqual([...expected].sort());
  });
});

describe("parsePolicyPod()", () => {
  const status = (list: unknown) => ({
    "k8s.v1.cni.cncf.io/network-status": typeof list === "string" ? list : JSON.stringify(list),
  });
  const object = (more: object = {}, annotations: object = {}) => ({
    metadata: { namespace: "a", name: "web", uid: "u", labels: { b: "2", a: "1" }, annotations },
    spec: {
      containers: [{ ports: [{ name: "http", containerPort: 80 }, { containerPort: 81 }] }],
      initContainers: [{ ports: [{ name: "dns", containerPort: 53, protocol: "UDP" }] }],
    },
    status: { phase: "Running", podIPs: [{ ip: "10.0.0.1" }, { ip: "FD00:0::1" }] },
    ...more,
  });
  const expected = {
    namespace: "a",
    name: "web",
    uid: "u",
    labels: { a: "1", b: "2" },
    phase: "Running",
    hostNetwork: false,
    ports: [
      { name: "dns", protocol: "udp" as const, port: 53 },
      { name: "http", protocol: "tcp" as const, port: 80 },
    ],
    podIps: ["10.0.0.1", "fd00::1"],
    hostIps: [],
    attachments: [],
  };
  test("what is kept, in one order and spelling", () => {
    const parsed = parsePolicyPod(object());
    expect(parsed).toEqual(expected);
    expect(JSON.stringify(parsed)).toBe(JSON.stringify(expected));
  });

  test("its interfaces", () => {
    const list = [
      { name: "cbr0", interface: "eth0", ips: ["10.0.0.1"], default: true },
      { name: "a/blue", interface: "net1", ips: ["10.1.0.1", "::ffff:10.1.0.2", "x", 7] },
      { name: "a/red" },
      { ips: ["10.9.0.1"] },
      "x",
    ];
    expect(parsePolicyPod(object({}, status(list)))?.attachments).toEqual([
      { network: "cbr0", ifName: "eth0", ips: ["10.0.0.1"], isDefault: true },
      { network: "a/blue", ifName: "net1", ips: ["10.1.0.1", "10.1.0.2"] },
      { network: "a/red", ifName: "", ips: [] },
    ]);
  });

  test.each<[string, Record<string, string>, string | undefined]>([
    ["of one logical network", { cni: "", networks: "blue" }, "a/blue"],
    ["of the one that names eth0", { cni: " ", networks: "red,blue@eth0" }, "a/blue"],
    ["of the first without a name", { cni: "", networks: "red@eth1,blue" }, "a/blue"],
    ["of none that can be the first", { cni: "", networks: "red@eth1" }, undefined],
    ["of networks of the node", { cni: "blue", networks: "red" }, undefined],
    ["that cannot be read", { cni: "", networks: "a b" }, undefined],
  ])("while nothing is published, what it asks for: annotations %s", (_name, asked, network) => {
    const ips = ["10.0.0.1", "fd00::1"];
    expect(parsePolicyPod(object({}, asked))?.attachments).toEqual(
      network === undefined ? [] : [{ network, ifName: "eth0", ips, isDefault: true }],
    );
    const published = status([{ name: "cbr0", interface: "eth0", ips }]);
    expect(parsePolicyPod(object({}, { ...asked, ...published }))?.attachments).toEqual([
      { network: "cbr0", ifName: "eth0", ips },
    ]);
  });

  test.each([["{"], ["{}"], ["null"], [""]])("a status of %j lists nothing", (text) => {
    expect(parsePolicyPod(object({}, status(text)))).toEqual(expected);
  });

  test.each<[string, object, object]>([
    [
      "one address",
      { status: { podIP: "10.0.0.9", hostIP: "192.168.0.1" } },
      { podIps: ["10.0.0.9"], hostIps: ["192.168.0.1"], phase: "" },
    ],
    ["no status", { status: null }, { podIps: [], phase: "" }],
    ["the node's network", { spec: { hostNetwork: true } }, { hostNetwork: true, ports: [] }],
    [
      "hostile values",
      { spec: { containers: [null, 1, { ports: [null, { name: "x y" }] }] } },
      { ports: [] },
    ],
  ])("%s", (_name, more, part) => {
    expect(parsePolicyPod(object(more))).toMatchObject(part);
  });

  test.each([[undefined], [null], [[]], [{ metadata: {} }]])("%j is none", (value) => {
    expect(parsePolicyPod(value)).toBeUndefined();
    expect(parsePolicyNamespace(value)).toBeUndefined();
    expect(parsePolicyNetwork(value)).toBeUndefined();
  });
});

describe("namespaces and networks", () => {
  test.each<[unknown, unknown]>([
    [
      { metadata: { name: "a", labels: { team: "x", odd: 1 } } },
      { name: "a", labels: { team: "x" } },
    ],
    [{ metadata: { name: "a" } }, { name: "a", labels: {} }],
  ])("namespace %j", (object, expected) => {
    expect(parsePolicyNamespace(object)).toEqual(expected as never);
  });

  const metadata = { namespace: "a", name: "net1" };
  test.each<[object, object]>([
    [{ spec: { sub_subnet: "10.1.0.0/24" } }, { kind: "Logicalnetwork", subnet: "10.1.0.0/24" }],
    [{ spec: { sub_subnet: "10.1.0" } }, { kind: "Logicalnetwork", subnet: "" }],
    [{}, { kind: "Logicalnetwork", subnet: "" }],
    [{ kind: "NetworkAttachmentDefinition" }, { kind: "NetworkAttachmentDefinition", subnet: "" }],
  ])("network %j", (more, expected) => {
    const whole = { namespace: "a", name: "net1", ...expected };
    expect(parsePolicyNetwork({ metadata, ...more })).toEqual(whole as never);
  });
});

describe("addresses in one spelling", () => {
  test.each<[unknown, string | undefined]>([
    ["10.0.0.1", "10.0.0.1"],
    ["FD00:0:0::1", "fd00::1"],
    ["::ffff:10.0.0.1", "10.0.0.1"],
    ["::ffff:a00:1", "10.0.0.1"],
    ["::10.0.0.1", "::a00:1"],
    ["10.0.0.1/24", undefined],
    ["fe80::1%eth0", undefined],
    [undefined, undefined],
  ])("%p", (text, expected) => {
    expect(canonicalIP(text)).toBe(expected);
  });

  test.each<[string, string | undefined]>([
    ["10.1.2.3/16", "10.1.0.0/16"],
    ["0.0.0.0/0", "0.0.0.0/0"],
    ["::/0", "::/0"],
    ["fd00:1::/32", "fd00:1::/32"],
    ["::ffff:10.0.0.0/104", "10.0.0.0/8"],
    ["::ffff:0:0/96", "0.0.0.0/0"],
    ["::ffc0:0:0/90", undefined],
  ])("%s", (text, expected) => {
    const subnet = parseSubnet(text);
    const found = subnet && unmapped(subnet);
    expect(found && formatSubnet(found)).toBe(expected);
  });
});
