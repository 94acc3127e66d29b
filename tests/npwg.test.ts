/**
 * The annotations of the NPWG specification v1.3 (lib/kubernetes/npwg.ts): what a pod may select
 * (§4) in both
 * formats, what it is told of it (§5), and CNI-Genie's own status annotation.
 */
import { describe, expect, test } from "bun:test";
import { CniError } from "../lib/cni.ts";
import {
  formatMultiIpPreferences,
  formatStatus,
  isObjectName,
  parseDefaultNetwork,
  parseNetworkSelection,
  type StatusSource,
} from "../lib/kubernetes/npwg.ts";
import type { Result } from "../lib/record.ts";

/** What a call throws; undefined when it does not. */
function failure(act: () => unknown): { code: number; msg: string } | undefined {
  try {
    act();
    return undefined;
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return { code: error.code, msg: error.message };
  }
}

const plain = (network: string, namespace = "team") => ({
  network,
  namespace,
  capabilityArgs: {},
});

describe("parseNetworkSelection(), comma-delimited (§4.1.1)", () => {
  test.each<[string, string, object[]]>([
    ["nothing", "", []],
    ["white space", " \n", []],
    ["one name", "net-a", [plain("net-a")]],
    [
      "the example of §4.1.1",
      "net-a,net-b,other-ns/net-c",
      [plain("net-a"), plain("net-b"), plain("net-c", "other-ns")],
    ],
    ["an interface", "c@eth1", [{ ...plain("c"), ifName: "eth1" }]],
    ["all of them", "ns/b@net5", [{ ...plain("b", "ns"), ifName: "net5" }]],
    [
      "white space around each part",
      " a ,\n ns / b @ x1 ",
      [plain("a"), { ...plain("b", "ns"), ifName: "x1" }],
    ],
    ["fact 34: the same twice", "a,a", [plain("a"), plain("a")]],
    ["names of digits and dots", "1.2.3,0/9", [plain("1.2.3"), plain("9", "0")]],
  ])("takes %s", (_name, text, expected) => {
    expect(parseNetworkSelection(text, "team")).toEqual(expected as never);
  });

  const spaces = " ".repeat(60_000);
  test.each<[string, string, string]>([
    ["an empty name", "a,,b", 'element 2 of "a,,b" is empty'],
    ["a comma at the end", "a,", 'element 2 of "a," is empty'],
    ["an empty namespace", "/a", '"/a" is not'],
    ["two slashes", "a/b/c", '"a/b/c" is not'],
    ["capitals", "Net", '"Net" is not'],
    ["a dash at an end", "a-", '"a-" is not'],
    ["a path", "../a", '"../a" is not'],
    ["what looks like a URL", "a%2fb", '"a%2fb" is not'],
    ["a line inside", "a\nb", '"a b" is not'],
    ["a long name", "a".repeat(254), "is not"],
    ["an empty interface", "a@", "it is empty"],
    ["two interfaces", "a@b@c", "is not"],
    ["a long interface", "a@eth0123456789abc", "longer than 15"],
    ["an interface with a slash", "a@x/y", "it holds"],
    ["an interface that exists everywhere", "a@lo", "it is reserved"],
    ["a pattern for the kernel", "a@eth%d", '"eth%d" cannot name an interface for "a"'],
    ["33 networks", Array(33).fill("a").join(), "it names 33 networks, at most 32"],
    ["64 KiB and more", `a${" ".repeat(65_536)}`, "it is longer than 65536 characters"],
    ["very much white space, at once", `a${spaces}b/c@d`, "is not"],
  ])("refuses %s", (_name, text, part) => {
    expect(failure(() => parseNetworkSelection(text, "team"))).toEqual({
      code: 7,
      msg: expect.stringContaining(part),
    });
  });
});

describe("parseNetworkSelection(), JSON (§4.1.2)", () => {
  const one = (element: object, expected: object): [object, object] => [
    { name: "n", ...element },
    { ...plain("n"), ...expected },
  ];
  const args = (capabilityArgs: object) => ({ capabilityArgs });
  test.each<[string, [object, object]]>([
    ["a name", one({}, {})],
    ["a namespace", one({ namespace: "other" }, { namespace: "other" })],
    [
      "ips, with and without prefix",
      one({ ips: ["10.2.2.42/24", "2001:db8::5"] }, args({ ips: ["10.2.2.42/24", "2001:db8::5"] })),
    ],
    ["a mac", one({ mac: "02:23:45:67:89:0A" }, args({ mac: "02:23:45:67:89:0A" }))],
    ["an interface", one({ interface: "eth5" }, { ifName: "eth5" })],
    ["cni-args", one({ "cni-args": { a: [1], b: {} } }, { cniArgs: { a: [1], b: {} } })],
    [
      "portMappings, TCP by default, in lower case",
      one(
        {
          portMappings: [
            { hostPort: 1, containerPort: 65_535 },
            { hostPort: 8080, containerPort: 80, protocol: "UDP", hostIP: "10.0.0.1" },
            { hostPort: 81, containerPort: 81, protocol: "Sctp" },
          ],
        },
        args({
          portMappings: [
            { hostPort: 1, containerPort: 65_535, protocol: "tcp" },
            { hostPort: 8080, containerPort: 80, protocol: "udp", hostIP: "10.0.0.1" },
            { hostPort: 81, containerPort: 81, protocol: "sctp" },
          ],
        }),
      ),
    ],
    [
      "a bandwidth",
      one(
        { bandwidth: { ingressRate: 2048, ingressBurst: 300, egressRate: 8000, egressBurst: 200 } },
        args({
          bandwidth: { ingressRate: 2048, ingressBurst: 300, egressRate: 8000, egressBurst: 200 },
        }),
      ),
    ],
    [
      "a bandwidth in one direction, with a burst where it names none",
      one(
        { bandwidth: { egressRate: 8000 } },
        args({ bandwidth: { egressRate: 8000, egressBurst: 8000 } }),
      ),
    ],
    [
      "a rate of one direction, and zeros for the other, as Go programs write them",
      one(
        { bandwidth: { ingressRate: 0, ingressBurst: 0, egressRate: 8000, egressBurst: 200 } },
        args({ bandwidth: { egressRate: 8000, egressBurst: 200 } }),
      ),
    ],
    ["a bandwidth of zeros", one({ bandwidth: { ingressRate: 0, egressRate: null } }, args({}))],
    [
      "empty values within a port mapping",
      one(
        { portMappings: [{ hostPort: 1, containerPort: 2, protocol: "", hostIP: null }] },
        args({ portMappings: [{ hostPort: 1, containerPort: 2, protocol: "tcp" }] }),
      ),
    ],
    [
      "a rate above what a burst may be",
      one(
        { bandwidth: { ingressRate: 1e11 } },
        args({ bandwidth: { ingressRate: 1e11, ingressBurst: 2 ** 31 - 1 } }),
      ),
    ],
    [
      "a default-route",
      one({ "default-route": ["10.0.0.1", "fd00::1"] }, { defaultRoute: ["10.0.0.1", "fd00::1"] }),
    ],
    ["fact 33: an empty default-route", one({ "default-route": [] }, { defaultRoute: [] })],
    [
      "an infiniband-guid, under CNI's name",
      one(
        { "infiniband-guid": "24:8a:07:03:00:8d:ae:2f" },
        args({ infinibandGUID: "24:8a:07:03:00:8d:ae:2f" }),
      ),
    ],
    [
      "an ipam-claim-reference",
      one(
        { "ipam-claim-reference": "vm123.tenantblue" },
        args({ "ipam-claim-reference": "vm123.tenantblue" }),
      ),
    ],
    ["a foreign key, which has a dot", one({ "org.foo.bar": { any: 1 } }, {})],
  ])("takes %s", (_name, [element, expected]) => {
    expect(parseNetworkSelection(JSON.stringify([element]), "team")).toEqual([expected] as never);
    // One element needs no list, and YAML leaves white space around.
    expect(parseNetworkSelection(` ${JSON.stringify(element)}\n`, "team")).toEqual([
      expected,
    ] as never);
  });

  const emptyValues: [string, unknown][] = [
    ...["namespace", "mac", "interface", "infiniband-guid", "ipam-claim-reference"].flatMap(
      (key): [string, unknown][] => [
        [key, ""],
        [key, null],
      ],
    ),
    ...["ips", "portMappings"].flatMap((key): [string, unknown][] => [
      [key, []],
      [key, null],
    ]),
    ...["bandwidth", "cni-args"].flatMap((key): [string, unknown][] => [
      [key, {}],
      [key, null],
    ]),
    ["cni-args", []],
    ["default-route", null],
    ["interfaceRequest", ""],
  ];
  test.each(emptyValues)("takes an empty %s for an absent one, and says so: %j", (key, value) => {
    const place = "k8s.v1.cni.cncf.io/networks, element 1";
    const warning = `${place}: "${key}" is empty and counts as absent`;
    const text = JSON.stringify([{ name: "n", [key]: value }]);
    expect(parseNetworkSelection(text, "team")).toEqual([{ ...plain("n"), warning }]);
  });

  test.each([
    ["alone", { interfaceRequest: "foo0" }, "foo0"],
    ["beside the new one", { interfaceRequest: "foo0", interface: "bar0" }, "bar0"],
    ["before an empty new one", { interfaceRequest: "foo0", interface: "" }, "foo0"],
  ])("takes interfaceRequest, the old name of interface, %s", (_name, element, ifName) => {
    const text = JSON.stringify([{ name: "n", ...element }]);
    const [found] = parseNetworkSelection(text, "team");
    expect(found?.ifName).toBe(ifName);
    expect(found?.warning).toContain('"interfaceRequest" is an old name of "interface"');
  });

  test("takes the example of §4.1.2, in order", () => {
    const text = `[ {"name":"net-a"},
      { "name":"net-b", "ips": ["1.2.3.4"], "mac": "aa:bb:cc:dd:ee:ff" },
      { "name":"net-c", "namespace":"other-ns" } ]\n`;
    expect(parseNetworkSelection(text, "team")).toEqual([
      plain("net-a"),
      { ...plain("net-b"), capabilityArgs: { ips: ["1.2.3.4"], mac: "aa:bb:cc:dd:ee:ff" } },
      plain("net-c", "other-ns"),
    ]);
  });

  test("keeps large numbers of cni-args as they are", () => {
    const [element] = parseNetworkSelection(
      '[{"name":"a","cni-args":{"id":123456789012345678901}}]',
      "team",
    );
    expect(JSON.stringify(element?.cniArgs)).toBe('{"id":123456789012345678901}');
  });

  const port = (mapping: object) => ({
    portMappings: [{ hostPort: 1, containerPort: 1, ...mapping }],
  });
  test.each<[string, object, string]>([
    ["no name", { name: undefined }, '"name"'],
    ["an empty name", { name: "" }, '"name": expected the name of an object'],
    ["a name that is a path", { name: "../x" }, '"name"'],
    ["a name that is a list", { name: ["n"] }, '"name"'],
    ["a name with its namespace", { name: "ns/n" }, '"name"'],
    ["a namespace that is a path", { namespace: "a/b" }, '"namespace"'],
    ["ips that are text", { ips: "10.0.0.1" }, '"ips"'],
    ["a name for an ip", { ips: ["host"] }, '"ips.0": expected an IP address'],
    ["a prefix that is too long", { ips: ["10.0.0.1/33"] }, '"ips.0"'],
    ["an IPv6 prefix that is too long", { ips: ["fd00::1/129"] }, '"ips.0"'],
    ["an empty prefix", { ips: ["10.0.0.1/"] }, '"ips.0"'],
    ["a short mac", { mac: "02:23:45:67:89" }, '"mac"'],
    ["a long mac", { mac: "02:23:45:67:89:01:02" }, '"mac"'],
    ["a mac of other letters", { mac: "0g:23:45:67:89:01" }, '"mac"'],
    ["an interface that is a path", { interface: "../x" }, "cannot name an interface"],
    ["an interface that is reserved", { interface: "all" }, "it is reserved"],
    ["cni-args that are a list", { "cni-args": [1] }, '"cni-args"'],
    ["port 0", port({ hostPort: 0 }), '"portMappings.0.hostPort"'],
    ["port 65536", port({ containerPort: 65_536 }), '"portMappings.0.containerPort"'],
    ["half a port", port({ hostPort: 80.5 }), '"portMappings.0.hostPort"'],
    ["a port that is text", port({ hostPort: "80" }), '"portMappings.0.hostPort"'],
    ["a mapping without containerPort", { portMappings: [{ hostPort: 1 }] }, "containerPort"],
    ["another protocol", port({ protocol: "icmp" }), '"portMappings.0.protocol"'],
    ["a hostIP that is none", port({ hostIP: "x" }), '"portMappings.0.hostIP"'],
    ["a rate that is negative", { bandwidth: { egressRate: -1 } }, '"bandwidth.egressRate"'],
    ["a rate that is text", { bandwidth: { egressRate: "1M" } }, '"bandwidth.egressRate"'],
    ["an unknown rate", { bandwidth: { rate: 1 } }, '"bandwidth.rate"'],
    [
      "a burst without its rate",
      { bandwidth: { ingressRate: 1, egressBurst: 1 } },
      '"egressBurst" needs "egressRate"',
    ],
    [
      "a burst with a rate of 0",
      { bandwidth: { egressRate: 0, egressBurst: 1 } },
      '"egressBurst" needs "egressRate"',
    ],
    ["a default-route that is text", { "default-route": "10.0.0.1" }, '"default-route"'],
    ["a default-route with a prefix", { "default-route": ["10.0.0.1/24"] }, '"default-route.0"'],
    ["a GUID of 6 bytes", { "infiniband-guid": "24:8a:07:03:00:8d" }, '"infiniband-guid"'],
    ["a claim that is a path", { "ipam-claim-reference": "a/b" }, '"ipam-claim-reference"'],
    [
      "fact 32: ips and a claim",
      { ips: ["10.0.0.1"], "ipam-claim-reference": "c" },
      '"ips" and "ipam-claim-reference" exclude each other',
    ],
    ["a key that is reserved for the spec", { vlan: 5 }, 'unknown key "vlan"'],
    ["a misspelt key", { interfaceReq: "x" }, 'unknown key "interfaceReq"'],
    ["a misspelt key without a value", { macs: null }, 'unknown key "macs"'],
    ["an interface that is reserved, under its old name", { interfaceRequest: "lo" }, "reserved"],
  ])("fact 30: refuses %s", (_name, element, part) => {
    const text = JSON.stringify([{ name: "first" }, { name: "n", ...element }]);
    const found = failure(() => parseNetworkSelection(text, "team"));
    expect(found).toEqual({ code: 7, msg: expect.stringContaining(part) });
    expect(found?.msg).toStartWith('Invalid annotation "k8s.v1.cni.cncf.io/networks": ');
  });

  test.each<[string, string, number, string]>([
    ["cut JSON", '[{"name":"a"}', 6, "it is not valid JSON"],
    ["a comma too many", '[{"name":"a"},]', 6, "it is not valid JSON"],
    ["names in a list", '["a"]', 7, "element 1"],
    ["a list in a list", '[[{"name":"a"}]]', 7, "element 1"],
    ["null in a list", '[{"name":"a"},null]', 7, "element 2"],
    ["deep nesting", `[{"name":"a","cni-args":${"[".repeat(500)}`, 6, "nests deeper"],
    ["33 networks", JSON.stringify(Array(33).fill({ name: "a" })), 7, "at most 32"],
    [
      "fact 33: two owners of the default route",
      '[{"name":"a","default-route":[]},{"name":"b","default-route":["10.0.0.1"]}]',
      7,
      'only one network may carry "default-route"',
    ],
  ])("refuses %s", (_name, text, code, part) => {
    expect(failure(() => parseNetworkSelection(text, "team"))).toEqual({
      code,
      msg: expect.stringContaining(part),
    });
  });

  test("keys of the language mean nothing", () => {
    const text = '[{"name":"a","__proto__":{"mac":"x"},"cni-args":{"__proto__":{"x":1},"y":2}}]';
    const [element] = parseNetworkSelection(text, "team");
    expect(element).toMatchObject({ network: "a", capabilityArgs: {}, cniArgs: { y: 2 } });
    expect(Object.getPrototypeOf(element?.cniArgs)).toBe(Object.prototype);
  });
});

describe("parseDefaultNetwork()", () => {
  test.each<[string, object]>([
    ["calico", plain("calico", "kube-system")],
    ["team/calico", plain("calico", "team")],
    ['[{"name":"calico","namespace":"x"}]', plain("calico", "x")],
    ["calico@eth0", { ...plain("calico", "kube-system"), ifName: "eth0" }],
  ])("takes %s", (text, expected) => {
    expect(parseDefaultNetwork(text, "kube-system")).toEqual(expected as never);
  });

  test.each(["a,b", "[]", '[{"name":"a"},{"name":"b"}]'])("refuses %s", (text) => {
    expect(failure(() => parseDefaultNetwork(text, "team"))).toEqual({
      code: 7,
      msg: 'Invalid annotation "v1.multus-cni.io/default-network": expected exactly one network',
    });
  });
});

test.each([
  ["a", true],
  ["a.b-c", true],
  ["0", true],
  ["a".repeat(253), true],
  ["", false],
  [".", false],
  ["..", false],
  ["-a", false],
  ["a_b", false],
  ["A", false],
])("isObjectName(%j) is %p", (name, expected) => {
  expect(isObjectName(name)).toBe(expected);
});

const result = (part: Partial<Result>): Result => ({
  interfaces: [],
  ips: [],
  routes: [],
  dns: {},
  ...part,
});
const source = (part: Partial<StatusSource>): StatusSource => ({
  name: "team/net",
  ifName: "net1",
  result: result({}),
  isDefault: false,
  ...part,
});
const inPod = (name: string, mac = "02:00:00:00:00:01") => ({ name, mac, sandbox: "/run/netns/p" });

describe("formatStatus() (§5)", () => {
  const bare = { name: "team/net", interface: "net1", default: false, dns: {} };
  test.each<[string, Partial<StatusSource>, object]>([
    ["a minimal map of an empty result (§5.1.1)", {}, bare],
    [
      "the interface in a sandbox, and its addresses alone",
      {
        result: result({
          interfaces: [{ name: "br0", mac: "aa:aa:aa:aa:aa:aa" }, inPod("x1")],
          ips: [
            { address: "10.0.0.1/24", interface: 0 },
            { address: "10.0.0.2/24", interface: 1 },
            { address: "10.0.0.4/24" },
            { address: "fd00::2/64", interface: 1 },
          ],
        }),
      },
      {
        ...bare,
        interface: "x1",
        mac: "02:00:00:00:00:01",
        ips: ["10.0.0.2", "fd00::2"],
      },
    ],
    [
      "an empty sandbox as none",
      {
        result: result({
          interfaces: [{ name: "veth1", mac: "aa:aa:aa:aa:aa:aa", sandbox: "" }, inPod("x1")],
          ips: [{ address: "10.0.0.2/24", interface: 1 }],
        }),
      },
      { ...bare, interface: "x1", mac: "02:00:00:00:00:01", ips: ["10.0.0.2"] },
    ],
    [
      "without a sandbox the first address without an index",
      {
        result: result({
          interfaces: [{ name: "br0", mac: "aa:aa:aa:aa:aa:aa" }],
          ips: [
            { address: "10.0.0.1/24", interface: 0 },
            { address: "10.0.0.2/24" },
            { address: "10.0.0.3/24" },
          ],
        }),
      },
      { ...bare, ips: ["10.0.0.2"] },
    ],
    [
      "or with one below 0",
      { result: result({ ips: [{ address: "fd00::9/64", interface: -1 }] }) },
      { ...bare, ips: ["fd00::9"] },
    ],
    [
      "no mac where there is none",
      { result: result({ interfaces: [{ name: "tun0", sandbox: "/n" }] }) },
      { ...bare, interface: "tun0" },
    ],
    [
      "dns whole",
      { result: result({ dns: { nameservers: ["10.0.0.53"], domain: "d", search: ["s"] } }) },
      { ...bare, dns: { nameservers: ["10.0.0.53"], domain: "d", search: ["s"] } },
    ],
    [
      "default-route",
      { defaultRoute: ["10.0.0.1", "fd00::1"] },
      { ...bare, "default-route": ["10.0.0.1", "fd00::1"] },
    ],
    ["no default-route where it named none", { defaultRoute: [] }, bare],
    [
      "device-info",
      { deviceInfo: { type: "pci", version: "1.1.0", pci: { "pci-address": "0000:18:02.5" } } },
      {
        ...bare,
        "device-info": { type: "pci", version: "1.1.0", pci: { "pci-address": "0000:18:02.5" } },
      },
    ],
  ])("tells %s", (_name, part, expected) => {
    expect(JSON.parse(formatStatus([source(part)]))).toEqual([expected]);
  });

  const two = [{ name: "veth1", mac: "" }, inPod("x1"), inPod("x2", "02:00:00:00:00:02")];
  test.each<[string, boolean, object[], string | undefined]>([
    ["of a further network none is the default", false, [{ gateway: "10.0.0.1" }, {}], undefined],
    ["the first is the default", true, [{}, {}], "x1"],
    ["the one with a gateway is the default", true, [{}, { gateway: "10.0.1.1" }], "x2"],
  ])("has an entry for each interface that a plugin made: %s", (_name, isDefault, keys, main) => {
    const ips = [
      { address: "10.0.0.2/24", interface: 1, ...keys[0] },
      { address: "10.0.1.2/24", interface: 2, ...keys[1] },
    ];
    const made = result({ interfaces: two, ips });
    const text = formatStatus([source({ result: made, isDefault, defaultRoute: ["10.0.0.1"] })]);
    expect(JSON.parse(text)).toEqual([
      {
        ...bare,
        interface: "x1",
        ips: ["10.0.0.2"],
        mac: two[1]?.mac,
        default: main === "x1",
        "default-route": ["10.0.0.1"],
      },
      { ...bare, interface: "x2", ips: ["10.0.1.2"], mac: two[2]?.mac, default: main === "x2" },
    ]);
  });

  test("has one entry per attachment, in order, one of them the default", () => {
    const text = formatStatus([
      source({ name: "calico", ifName: "eth0", isDefault: true }),
      source({}),
      source({ ifName: "net2" }),
    ]);
    const entries = JSON.parse(text) as Record<string, unknown>[];
    expect(entries.map((one) => [one["name"], one["interface"], one["default"]])).toEqual([
      ["calico", "eth0", true],
      ["team/net", "net1", false],
      ["team/net", "net2", false],
    ]);
    // §5.3: names without a dot are the specification's.
    const known = ["name", "interface", "ips", "mac", "default", "dns", "default-route"];
    expect(entries.flatMap(Object.keys).filter((key) => !known.includes(key))).toEqual([]);
  });
});

describe("formatMultiIpPreferences()", () => {
  const withIps = (ifName: string, ...ips: string[]) =>
    source({ ifName, result: result({ ips: ips.map((address) => ({ address })) }) });

  test("is written as CNI-Genie does: the first address of each network", () => {
    expect(
      formatMultiIpPreferences([
        withIps("eth0", "10.244.0.2/24", "fd00::2/64"),
        withIps("eth1", "192.168.0.5/16"),
      ]),
    ).toBe(
      '{"multi_entry":2,"ips":{"ip1":{"ip":"10.244.0.2","interface":"eth0"},' +
        '"ip2":{"ip":"192.168.0.5","interface":"eth1"}}}',
    );
  });

  test("counts what has an address", () => {
    expect(
      JSON.parse(formatMultiIpPreferences([withIps("eth0"), withIps("eth1", "fd00::1/64")])),
    ).toEqual({ multi_entry: 1, ips: { ip1: { ip: "fd00::1", interface: "eth1" } } });
    expect(JSON.parse(formatMultiIpPreferences([]))).toEqual({ multi_entry: 0, ips: {} });
  });
});
