import { describe, expect, test } from "bun:test";
import { CniError, type CniVersion, code, supportedVersions } from "../lib/cni.ts";
import { isDefaultRoute, withoutDefaultRoutes } from "../lib/default_route.ts";
import { parseJson } from "../lib/json.ts";
import { type AttachmentResult, mergeResults, normalizeResult } from "../lib/merge.ts";
import type { Interface, Result } from "../lib/record.ts";
import { family, parseResult, toVersion } from "../lib/result.ts";

const netns = "/var/run/netns/blue";
const empty: Result = { interfaces: [], ips: [], routes: [], dns: {} };

/** CNI SPEC 1.1 appendix "Add example": what bridge, tuning and portmap print. */
const specBridge: Result = {
  ips: [{ address: "10.1.0.5/16", gateway: "10.1.0.1", interface: 2 }],
  routes: [{ dst: "0.0.0.0/0" }],
  interfaces: [
    { name: "cni0", mac: "00:11:22:33:44:55" },
    { name: "veth3243", mac: "55:44:33:22:11:11" },
    { name: "eth0", mac: "99:88:77:66:55:44", sandbox: netns },
  ],
  dns: { nameservers: ["10.1.0.1"] },
};

/** Every key that 1.1.0 knows. */
const full: Result = {
  interfaces: [
    { name: "cni0", mac: "00:11:22:33:44:55", mtu: 1500 },
    {
      name: "eth0",
      mac: "99:88:77:66:55:44",
      mtu: 1450,
      sandbox: netns,
      socketPath: "/run/vhost.sock",
      pciID: "0000:00:1f.6",
    },
  ],
  ips: [
    { address: "10.1.0.5/16", gateway: "10.1.0.1", interface: 1 },
    { address: "10.1.0.6/16", interface: 1 },
    { address: "fd00::5/64", gateway: "fd00::1", interface: 1 },
  ],
  routes: [
    { dst: "0.0.0.0/0", gw: "10.1.0.1", mtu: 1400, advmss: 1360, priority: 100 },
    { dst: "::/0", gw: "fd00::1" },
    { dst: "10.9.0.0/16", table: 100, scope: 0 },
  ],
  dns: { nameservers: ["10.1.0.1"], domain: "a.example", search: ["a", "b"], options: ["ndots:5"] },
};
const plainRoutes = [
  { dst: "0.0.0.0/0", gw: "10.1.0.1" },
  { dst: "::/0", gw: "fd00::1" },
  { dst: "10.9.0.0/16" },
];
const plainInterfaces: Interface[] = [
  { name: "cni0", mac: "00:11:22:33:44:55" },
  { name: "eth0", mac: "99:88:77:66:55:44", sandbox: netns },
];

function failure(run: () => unknown): { code: number; message: string } | undefined {
  try {
    run();
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return { code: error.code, message: error.message };
  }
  return undefined;
}

describe("parseResult()", () => {
  const ip = { address: "10.1.0.5/16" };
  test.each<[string, unknown, CniVersion, Result]>([
    ["reads SPEC's example, which has no cniVersion", specBridge, "1.1.0", specBridge],
    [
      "reads the abbreviated result of an IPAM plugin (SPEC §5)",
      { ips: [{ ...ip, gateway: "10.1.0.1" }], routes: [{ dst: "0.0.0.0/0" }] },
      "1.1.0",
      { ...empty, ips: [{ ...ip, gateway: "10.1.0.1" }], routes: [{ dst: "0.0.0.0/0" }] },
    ],
    ["keeps every key of 1.1.0", { cniVersion: "1.1.0", ...full }, "0.3.1", full],
    ["reads an empty object", {}, "1.0.0", empty],
    [
      "reads null for every key, and empty text",
      { cniVersion: "", interfaces: null, ips: null, routes: null, dns: null, ip4: null },
      "1.0.0",
      empty,
    ],
    [
      "drops unknown keys, absent members and empty lists",
      {
        x: 1,
        interfaces: [{ name: "eth0", mac: "", mtu: 0, sandbox: null, x: {} }],
        ips: [{ ...ip, gateway: "", interface: null, x: [] }],
        routes: [{ dst: "0.0.0.0/0", gw: "", mtu: 0, advmss: 0, priority: 0, x: 1 }],
        dns: { nameservers: [], domain: "", search: null, options: [""], x: 1 },
      },
      "1.1.0",
      { ...empty, interfaces: [{ name: "eth0" }], ips: [ip], routes: [{ dst: "0.0.0.0/0" }] },
    ],
    [
      "keeps table 0 and scope 0, which mean something",
      { routes: [{ dst: "0.0.0.0/0", table: 0, scope: 0, priority: 4294967295 }] },
      "1.1.0",
      { ...empty, routes: [{ dst: "0.0.0.0/0", table: 0, scope: 0, priority: 4294967295 }] },
    ],
    [
      "drops an index of -1, of the length, beyond it, and keeps a valid one",
      { interfaces: [{ name: "a" }], ips: [-1, 0, 1, 1e15].map((i) => ({ ...ip, interface: i })) },
      "0.4.0",
      { ...empty, interfaces: [{ name: "a" }], ips: [ip, { ...ip, interface: 0 }, ip, ip] },
    ],
    [
      "needs no ips[].version before 1.0.0, and believes the address",
      { cniVersion: "0.3.1", ips: [ip, { version: "6", ...ip }, { version: 4, ...ip }] },
      "0.3.1",
      { ...empty, ips: [ip, ip, ip] },
    ],
    [
      "prints addresses as libcni does",
      {
        ips: [{ address: "FD00:0:0:0::05/064", gateway: "FE80:0::1" }],
        routes: [{ dst: "0:0::0/0", gw: "::ffff:10.0.0.1" }],
      },
      "1.0.0",
      {
        ...empty,
        ips: [{ address: "fd00::5/64", gateway: "fe80::1" }],
        routes: [{ dst: "::/0", gw: "::ffff:a00:1" }],
      },
    ],
    [
      "keeps the host part of a destination",
      { routes: [{ dst: "10.1.2.3/16", gw: "fe80::1" }] },
      "1.0.0",
      { ...empty, routes: [{ dst: "10.1.2.3/16", gw: "fe80::1" }] },
    ],
    [
      "reads 0.2.0: ip4, ip6 and their routes",
      {
        cniVersion: "0.2.0",
        ip4: { ip: "10.1.0.5/16", gateway: "10.1.0.1", routes: [{ dst: "0.0.0.0/0" }] },
        ip6: { ip: "fd00::5/64", gateway: "", routes: [{ dst: "::/0", gw: "fd00::1" }] },
        dns: { domain: "a" },
      },
      "1.1.0",
      {
        interfaces: [],
        ips: [{ ...ip, gateway: "10.1.0.1" }, { address: "fd00::5/64" }],
        routes: [{ dst: "0.0.0.0/0" }, { dst: "::/0", gw: "fd00::1" }],
        dns: { domain: "a" },
      },
    ],
    [
      "reads 0.1.0 without cniVersion from a list of 0.1.0",
      { ip4: { ip: "10.1.0.5/16", routes: null } },
      "0.1.0",
      { ...empty, ips: [ip] },
    ],
    [
      "does not lose an ip4 that claims a later version",
      { cniVersion: "0.3.1", ip4: { ip: "10.1.0.5/16" }, ips: [] },
      "0.3.1",
      { ...empty, ips: [ip] },
    ],
    [
      "does not lose ips that claim an early version",
      { cniVersion: "0.2.0", ips: [ip] },
      "0.2.0",
      { ...empty, ips: [ip] },
    ],
    [
      "follows the version when both shapes are there: 0.2.0",
      { cniVersion: "0.2.0", ip4: { ip: "10.1.0.5/16" }, ips: [{ address: "10.9.9.9/32" }] },
      "1.1.0",
      { ...empty, ips: [ip] },
    ],
    [
      "follows the version when both shapes are there: 1.0.0",
      { cniVersion: "1.0.0", ip4: { ip: "10.9.9.9/32" }, ips: [ip] },
      "0.2.0",
      { ...empty, ips: [ip] },
    ],
  ])("%s", (_, value, listVersion, expected) => {
    expect(parseResult(value, listVersion)).toEqual(expected);
  });

  const cidr = "expected an IP with prefix length";
  test.each<[string, unknown, string]>([
    ["null", null, "result: got null, expected an object"],
    ["nothing", undefined, "result: got nothing, expected an object"],
    ["a list", [], "result: got [], expected an object"],
    ["text", "ok", 'result: got "ok", expected an object'],
    ["a later version", { cniVersion: "1.2.0" }, "cniVersion in result: got"],
    ["a version that is a number", { cniVersion: 1 }, "cniVersion in result: got 1"],
    ["interfaces that are no list", { interfaces: {} }, "interfaces in result: got {}"],
    ["interfaces with null", { interfaces: [null] }, "interfaces.0 in result: got null"],
    ["interfaces with a list", { interfaces: [[]] }, "interfaces.0 in result: got []"],
    ["no name", { interfaces: [{}] }, "interfaces.0.name in result: got nothing, expected a name"],
    ["an empty name", { interfaces: [{ name: "" }] }, "interfaces.0.name in result: got nothing"],
    ["a name of 5", { interfaces: [{ name: 5 }] }, "interfaces.0.name in result: got 5"],
    ["a mac of 5", { interfaces: [{ name: "a", mac: 5 }] }, "interfaces.0.mac in result: got 5"],
    ["a sandbox of {}", { interfaces: [{ name: "a", sandbox: {} }] }, "interfaces.0.sandbox in"],
    ["a textual mtu", { interfaces: [{ name: "a", mtu: "9" }] }, 'mtu in result: got "9"'],
    ["a negative mtu", { interfaces: [{ name: "a", mtu: -1 }] }, "mtu in result: got -1"],
    ["ips of text", { ips: "10.0.0.1/8" }, "ips in result: got"],
    ["no address", { ips: [{}] }, `ips.0.address in result: got nothing, ${cidr}`],
    ["no prefix length", { ips: [{ address: "10.1.0.5" }] }, `got "10.1.0.5", ${cidr}`],
    ["a prefix length of 33", { ips: [{ address: "10.1.0.5/33" }] }, cidr],
    ["a prefix length of 129", { ips: [{ address: "::1/129" }] }, cidr],
    ["an octet of 256", { ips: [{ address: "10.1.0.256/16" }] }, cidr],
    ["a leading zero", { ips: [{ address: "010.1.0.5/16" }] }, cidr],
    ["three octets", { ips: [{ address: "10.1.0/16" }] }, cidr],
    ["a trailing dot", { ips: [{ address: "10.1.0.5./16" }] }, cidr],
    ["a trailing newline", { ips: [{ address: "10.1.0.5/16\n" }] }, cidr],
    ["a zone", { ips: [{ address: "fe80::1%eth0/64" }] }, cidr],
    ["two ::", { ips: [{ address: "1::2::3/64" }] }, cidr],
    ["nine groups", { ips: [{ address: "1:2:3:4:5:6:7:8:9/64" }] }, cidr],
    ["a way out of the URL", { ips: [{ address: "::1]@x/64" }] }, cidr],
    ["an address that throws as text", { ips: [{ address: { toString: 1, valueOf: 1 } }] }, cidr],
    ["a gateway with prefix", { ips: [{ ...ip, gateway: "10.1.0.1/16" }] }, "expected an IP"],
    ["a gateway of 5", { ips: [{ ...ip, gateway: 5 }] }, "ips.0.gateway in result: got 5"],
    ["a textual index", { ips: [{ ...ip, interface: "0" }] }, "ips.0.interface in result"],
    ["half an index", { ips: [{ ...ip, interface: 0.5 }] }, "ips.0.interface in result: got 0.5"],
    ["a bad second ip", { ips: [ip, { address: "x" }] }, 'ips.1.address in result: got "x"'],
    ["no dst", { routes: [{ gw: "10.0.0.1" }] }, `routes.0.dst in result: got nothing, ${cidr}`],
    ["a dst of default", { routes: [{ dst: "default" }] }, `got "default", ${cidr}`],
    ["a table of 2^32", { routes: [{ dst: "::/0", table: 2 ** 32 }] }, "routes.0.table in result"],
    ["dns of a list", { dns: [] }, "dns in result: got [], expected an object"],
    ["nameservers of text", { dns: { nameservers: "1.1.1.1" } }, "dns.nameservers in result"],
    ["a search of 5", { dns: { search: ["a", 5] } }, "dns.search.1 in result: got 5"],
    ["ip4 of text", { ip4: "10.1.0.5/16" }, "ip4 in result: got"],
    ["ip4 without ip", { cniVersion: "0.2.0", ip4: {} }, "ip4.ip in result: got nothing"],
    ["a bad ip6 route", { ip6: { ip: "::1/128", routes: [{ dst: 1 }] } }, "ip6.routes.0.dst in"],
    ["a number that is kept as text", parseJson("1e3", "x"), "result: got 1e3, expected an object"],
    ["such a number for dns", parseJson('{"dns": 1e3}', "x"), "dns in result: got"],
  ])("refuses %s", (_, value, text) => {
    expect(failure(() => parseResult(value, "1.1.0"))).toEqual({
      code: code.delegateProtocol,
      message: expect.stringContaining(text),
    });
  });

  test("names its origin and cuts long values", () => {
    const value = { ips: [{ address: "x".repeat(5000) }] };
    const found = failure(() => parseResult(value, "1.1.0", 'result of plugin "bridge"'));
    expect(found?.message).toBe(
      `Invalid ips.0.address in result of plugin "bridge": got "${"x".repeat(78)}…, ${cidr}`,
    );
  });

  test("is not touched by __proto__", () => {
    const text =
      '{"__proto__":{"ips":5},"interfaces":[{"name":"__proto__","__proto__":{"mtu":5}}],' +
      '"ips":[{"address":"10.1.0.5/16","__proto__":{"interface":0}}],"dns":{"__proto__":{"x":1}}}';
    const result = parseResult(JSON.parse(text), "1.1.0");
    expect(result).toEqual({ ...empty, interfaces: [{ name: "__proto__" }], ips: [ip] });
    expect(Object.getPrototypeOf(result.interfaces[0])).toBe(Object.prototype);
    const attachment = { ifName: "__proto__", netns, result };
    expect(mergeResults([attachment, attachment]).interfaces).toHaveLength(2);
  });
});

describe("toVersion()", () => {
  const ip4 = {
    ip: "10.1.0.5/16",
    gateway: "10.1.0.1",
    routes: [{ dst: "0.0.0.0/0", gw: "10.1.0.1" }, { dst: "10.9.0.0/16" }],
  };
  const ip6 = { ip: "fd00::5/64", gateway: "fd00::1", routes: [{ dst: "::/0", gw: "fd00::1" }] };
  const withVersion = {
    interfaces: plainInterfaces,
    ips: full.ips.map((ip) => ({ version: ip.address.includes(":") ? "6" : "4", ...ip })),
    routes: plainRoutes,
    dns: full.dns,
  };
  test.each<[CniVersion, object]>([
    ["0.1.0", { ip4, ip6, dns: full.dns }],
    ["0.2.0", { ip4, ip6, dns: full.dns }],
    ["0.3.0", withVersion],
    ["0.3.1", withVersion],
    ["0.4.0", withVersion],
    ["1.0.0", { ...full, interfaces: plainInterfaces, routes: plainRoutes }],
    ["1.1.0", full],
  ])("%s says what that version can", (version, expected) => {
    const wire = toVersion(full, version);
    expect(wire).toEqual({ cniVersion: version, ...expected });
    expect(JSON.parse(JSON.stringify(wire))).toEqual(wire);
  });

  const squeezed = { ...full, ips: full.ips.filter((_, i) => i !== 1).map(withoutIndex) };
  const without11 = { ...full, interfaces: plainInterfaces, routes: plainRoutes };
  const byFamily = [plainRoutes[0], plainRoutes[2], plainRoutes[1]] as Result["routes"];
  const kept: Record<CniVersion, Result> = {
    "0.1.0": { ...squeezed, interfaces: [], routes: byFamily },
    "0.2.0": { ...squeezed, interfaces: [], routes: byFamily },
    "0.3.0": without11,
    "0.3.1": without11,
    "0.4.0": without11,
    "1.0.0": without11,
    "1.1.0": full,
  };
  test.each(supportedVersions.map((version) => [version]))("%s round trip", (version) => {
    const wire = JSON.parse(JSON.stringify(toVersion(full, version)));
    for (const listVersion of supportedVersions) {
      expect(parseResult(wire, listVersion)).toEqual(kept[version]);
    }
    expect(toVersion(parseResult(wire, version), version)).toEqual(wire);
    expect(parseResult(toVersion(specBridge, "1.1.0"), version)).toEqual(specBridge);
  });

  test.each<[string, Partial<Result>, CniVersion, object]>([
    ["an empty result", {}, "1.1.0", { interfaces: [], ips: [], routes: [] }],
    ["an empty result", {}, "0.2.0", {}],
    [
      "an index that points nowhere",
      { ips: [-1, 0, 7].map((i) => ({ address: "10.1.0.5/16", interface: i })) },
      "1.1.0",
      { interfaces: [], ips: Array(3).fill({ address: "10.1.0.5/16" }), routes: [] },
    ],
    [
      "routes of a family without an address",
      { ips: [{ address: "10.1.0.5/16" }], routes: [{ dst: "::/0" }] },
      "0.2.0",
      { ip4: { ip: "10.1.0.5/16" } },
    ],
    [
      "an address of the host before the pod's",
      {
        interfaces: [{ name: "cni0" }, { name: "eth0", sandbox: netns }],
        ips: [
          { address: "10.1.0.1/16", interface: 0 },
          { address: "10.1.0.5/16", interface: 1 },
          { address: "fd00::1/64", interface: 0 },
        ],
      },
      "0.2.0",
      { ip4: { ip: "10.1.0.5/16" }, ip6: { ip: "fd00::1/64" } },
    ],
    ...(["0.2.0", "0.4.0", "1.0.0"] as const).map(
      (version): [string, Partial<Result>, CniVersion, object] => [
        "a gateway of the other family",
        { ips: [{ address: "10.1.0.5/16", gateway: "fd00::1" }] },
        version,
        {
          "0.2.0": { ip4: { ip: "10.1.0.5/16" } },
          "0.4.0": { interfaces: [], ips: [{ version: "4", address: "10.1.0.5/16" }], routes: [] },
          "1.0.0": {
            interfaces: [],
            ips: [{ address: "10.1.0.5/16", gateway: "fd00::1" }],
            routes: [],
          },
        }[version],
      ],
    ),
  ])("%s (case %#)", (_, result, version, expected) => {
    expect(toVersion({ ...empty, ...result }, version)).toEqual({
      cniVersion: version,
      ...expected,
    });
  });
});

function withoutIndex({ address, gateway }: Result["ips"][number]): Result["ips"][number] {
  return { address, ...(gateway !== undefined && { gateway }) };
}

describe("normalizeResult()", () => {
  const eth0 = { name: "eth0", sandbox: netns };
  const address = "10.1.0.5/32";
  /** What the plugins of the field print, and what is made of it for eth0. */
  test.each<[string, unknown, Result]>([
    [
      "Calico: no interfaces, index 0",
      {
        cniVersion: "0.3.1",
        interfaces: [],
        ips: [{ version: "4", address, interface: 0 }],
        dns: {},
      },
      { ...empty, interfaces: [eth0], ips: [{ address, interface: 0 }] },
    ],
    [
      "Calico: only the host's end, no index",
      {
        cniVersion: "0.3.1",
        interfaces: [{ name: "cali1234" }],
        ips: [{ version: "4", address }],
      },
      { ...empty, interfaces: [{ name: "cali1234" }, eth0], ips: [{ address, interface: 1 }] },
    ],
    [
      "Canal: only the host's end, index 0",
      {
        cniVersion: "0.3.0",
        interfaces: [{ name: "cali1234" }],
        ips: [{ version: "4", address, interface: 0 }],
      },
      { ...empty, interfaces: [{ name: "cali1234" }, eth0], ips: [{ address, interface: 1 }] },
    ],
    [
      "Flannel: bridge's result",
      {
        cniVersion: "0.3.1",
        interfaces: [
          { name: "cni0", mac: "0a:58:0a:f4:00:01" },
          { name: "veth1", mac: "0a:58:0a:f4:00:02" },
          { name: "eth0", mac: "0a:58:0a:f4:00:03", sandbox: netns },
        ],
        ips: [{ version: "4", interface: 2, address: "10.244.0.5/24", gateway: "10.244.0.1" }],
        routes: [{ dst: "10.244.0.0/16" }, { dst: "0.0.0.0/0", gw: "10.244.0.1" }],
        dns: {},
      },
      {
        interfaces: [
          { name: "cni0", mac: "0a:58:0a:f4:00:01" },
          { name: "veth1", mac: "0a:58:0a:f4:00:02" },
          { name: "eth0", mac: "0a:58:0a:f4:00:03", sandbox: netns },
        ],
        ips: [{ address: "10.244.0.5/24", gateway: "10.244.0.1", interface: 2 }],
        routes: [{ dst: "10.244.0.0/16" }, { dst: "0.0.0.0/0", gw: "10.244.0.1" }],
        dns: {},
      },
    ],
    [
      "Romana: 0.2.0 without saying so",
      { ip4: { ip: address, gateway: "10.1.0.1", routes: [{ dst: "0.0.0.0/0" }] }, dns: {} },
      {
        ...empty,
        interfaces: [eth0],
        ips: [{ address, gateway: "10.1.0.1", interface: 0 }],
        routes: [{ dst: "0.0.0.0/0" }],
      },
    ],
    [
      "Weave: 0.1.0",
      { cniVersion: "0.1.0", ip4: { ip: "10.32.0.4/12", gateway: "10.32.0.1" } },
      {
        ...empty,
        interfaces: [eth0],
        ips: [{ address: "10.32.0.4/12", gateway: "10.32.0.1", interface: 0 }],
      },
    ],
    [
      "Terway: the pod's interface without sandbox",
      { interfaces: [{ name: "eth0", mac: "aa" }], ips: [{ address, interface: 0 }] },
      { ...empty, interfaces: [{ ...eth0, mac: "aa" }], ips: [{ address, interface: 0 }] },
    ],
    ["nothing at all", {}, { ...empty, interfaces: [eth0] }],
    [
      "another interface in the pod keeps its address",
      { interfaces: [{ name: "bond0", sandbox: netns }], ips: [{ address, interface: 0 }] },
      {
        ...empty,
        interfaces: [{ name: "bond0", sandbox: netns }, eth0],
        ips: [{ address, interface: 0 }],
      },
    ],
    [
      "a host interface keeps its address when the pod is listed",
      { interfaces: [{ name: "cni0" }, eth0], ips: [{ address, interface: 0 }, { address }] },
      {
        ...empty,
        interfaces: [{ name: "cni0" }, eth0],
        ips: [
          { address, interface: 0 },
          { address, interface: 1 },
        ],
      },
    ],
    [
      "a host interface named like the pod's is not taken for it",
      { interfaces: [{ name: "eth0" }, eth0], ips: [{ address }] },
      { ...empty, interfaces: [{ name: "eth0" }, eth0], ips: [{ address, interface: 1 }] },
    ],
    [
      "another sandbox stays (a VM)",
      { interfaces: [{ name: "eth0", sandbox: "vm-1" }], ips: [{ address }] },
      {
        ...empty,
        interfaces: [{ name: "eth0", sandbox: "vm-1" }],
        ips: [{ address, interface: 0 }],
      },
    ],
  ])("%s", (_, value, expected) => {
    const result = parseResult(value, "0.3.1");
    const before = structuredClone(result);
    const normal = normalizeResult(result, { ifName: "eth0", netns });
    expect(normal).toEqual(expected);
    expect(normalizeResult(normal, { ifName: "eth0", netns })).toEqual(expected);
    expect(result).toEqual(before);
  });

  test.each<[string, Partial<Result>, Partial<Result>]>([
    ["makes nothing up", { ips: [{ address, interface: 3 }] }, { ips: [{ address }] }],
    ["stays empty", {}, {}],
    [
      "points at a listed interface",
      { interfaces: [{ name: "eth0" }], ips: [{ address }] },
      { interfaces: [{ name: "eth0" }], ips: [{ address, interface: 0 }] },
    ],
  ])("without netns %s", (_, result, expected) => {
    const options = { ifName: "eth0", netns: "" };
    expect(normalizeResult({ ...empty, ...result }, options)).toEqual({ ...empty, ...expected });
  });
});

describe("mergeResults()", () => {
  const bridge = { name: "cni0", mac: "00:11:22:33:44:55" };
  const part = (ifName: string, result: Partial<Result>): AttachmentResult => ({
    ifName,
    netns,
    result: { ...empty, ...result },
  });
  const pod = (name: string) => ({ name, sandbox: netns });

  test("joins a bridge, a Calico and a Weave network", () => {
    const merged = mergeResults([
      { ifName: "eth0", netns, result: specBridge },
      part("eth1", {
        interfaces: [{ name: "cali1" }],
        ips: [{ address: "192.168.0.7/32" }],
        dns: { nameservers: ["10.1.0.1", "8.8.8.8"], domain: "second" },
      }),
      part("eth2", {
        ips: [{ address: "10.32.0.4/12", gateway: "10.32.0.1" }],
        routes: [{ dst: "10.32.0.0/12" }, { dst: "0.0.0.0/0", gw: "10.32.0.1" }],
        dns: { domain: "third", search: ["s"] },
      }),
    ]);
    expect(merged).toEqual({
      interfaces: [...specBridge.interfaces, { name: "cali1" }, pod("eth1"), pod("eth2")],
      ips: [
        { address: "10.1.0.5/16", gateway: "10.1.0.1", interface: 2 },
        { address: "192.168.0.7/32", interface: 4 },
        { address: "10.32.0.4/12", gateway: "10.32.0.1", interface: 5 },
      ],
      routes: [
        { dst: "0.0.0.0/0" },
        { dst: "10.32.0.0/12", gw: "10.32.0.1" },
        { dst: "0.0.0.0/0", gw: "10.32.0.1" },
      ],
      dns: { nameservers: ["10.1.0.1", "8.8.8.8"], domain: "second", search: ["s"] },
    });
  });

  test.each<[string, AttachmentResult[], Partial<Result>]>([
    ["nothing", [], {}],
    [
      "attachments without a result",
      [part("eth0", {}), part("net1", {})],
      {
        interfaces: [pod("eth0"), pod("net1")],
      },
    ],
    [
      "one bridge listed twice",
      [
        part("eth0", { interfaces: [bridge, { name: "v1" }, pod("eth0")] }),
        part("net1", {
          interfaces: [{ name: "v2" }, { ...bridge, mac: "00:11:22:33:44:55" }, pod("net1")],
          ips: [
            { address: "10.1.0.1/16", interface: 1 },
            { address: "10.1.0.6/16", interface: 2 },
          ],
        }),
      ],
      {
        interfaces: [bridge, { name: "v1" }, pod("eth0"), { name: "v2" }, pod("net1")],
        ips: [
          { address: "10.1.0.1/16", interface: 0 },
          { address: "10.1.0.6/16", interface: 4 },
        ],
      },
    ],
    [
      "host interfaces of one name that differ",
      [
        part("eth0", { interfaces: [bridge, pod("eth0")] }),
        part("net1", { interfaces: [{ ...bridge, mac: "02" }, pod("net1")] }),
      ],
      { interfaces: [bridge, pod("eth0"), { ...bridge, mac: "02" }, pod("net1")] },
    ],
    [
      "a host interface named like a later one of the pod (containerd)",
      [
        part("eth0", {
          interfaces: [{ name: "net1" }, pod("eth0")],
          ips: [{ address: "10.1.0.5/16", interface: 0 }],
        }),
        part("net1", {
          interfaces: [{ name: "eth0" }, pod("net1")],
          ips: [{ address: "10.2.0.5/16", interface: 0 }],
        }),
      ],
      {
        interfaces: [pod("eth0"), pod("net1")],
        ips: [
          { address: "10.1.0.5/16", interface: 0 },
          { address: "10.2.0.5/16", interface: 1 },
        ],
      },
    ],
    [
      "equal routes, and routes that only look equal",
      [
        part("eth0", { routes: [{ dst: "10.9.0.0/16", gw: "10.1.0.1", mtu: 1400 }] }),
        part("net1", {
          routes: [
            { dst: "10.9.0.0/16", gw: "10.1.0.1", table: 254 },
            { dst: "10.9.0.0/16", gw: "10.1.0.2" },
            { dst: "10.9.0.0/16", gw: "10.1.0.1", priority: 5 },
            { dst: "10.9.0.0/16", gw: "10.1.0.1", table: 7 },
          ],
        }),
      ],
      {
        interfaces: [pod("eth0"), pod("net1")],
        routes: [
          { dst: "10.9.0.0/16", gw: "10.1.0.1", mtu: 1400 },
          { dst: "10.9.0.0/16", gw: "10.1.0.2" },
          { dst: "10.9.0.0/16", gw: "10.1.0.1", priority: 5 },
          { dst: "10.9.0.0/16", gw: "10.1.0.1", table: 7 },
        ],
      },
    ],
    [
      "routes that would take the primary's gateway",
      [
        part("eth0", {}),
        part("net1", {
          ips: [{ address: "10.2.0.5/16", gateway: "10.2.0.1" }],
          routes: [{ dst: "10.9.0.0/16" }, { dst: "::/0" }, { dst: "10.8.0.0/16", scope: 253 }],
        }),
      ],
      {
        interfaces: [pod("eth0"), pod("net1")],
        ips: [{ address: "10.2.0.5/16", gateway: "10.2.0.1", interface: 1 }],
        routes: [
          { dst: "10.9.0.0/16", gw: "10.2.0.1" },
          { dst: "::/0" },
          { dst: "10.8.0.0/16", scope: 253 },
        ],
      },
    ],
  ])("%s", (_, attachments, expected) => {
    const before = structuredClone(attachments);
    expect(mergeResults(attachments)).toEqual({ ...empty, ...expected });
    expect(attachments).toEqual(before);
  });

  test("squeezed to 0.2.0 for Mesos it is the primary's address of each family", () => {
    const merged = mergeResults([
      { ifName: "eth0", netns, result: specBridge },
      part("eth1", { ips: [{ address: "10.2.0.5/16" }, { address: "fd00::5/64" }] }),
    ]);
    expect(toVersion(merged, "0.2.0")).toEqual({
      cniVersion: "0.2.0",
      ip4: { ip: "10.1.0.5/16", gateway: "10.1.0.1", routes: [{ dst: "0.0.0.0/0" }] },
      ip6: { ip: "fd00::5/64" },
      dns: { nameservers: ["10.1.0.1"] },
    });
  });
});

/** mulberry32: numbers below `limit`, the same for a seed each time. */
function generator(seed: number): (limit: number) => number {
  let state = seed;
  return (limit) => {
    state = (state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % limit;
  };
}

const names = ["eth0", "eth1", "net1", "cni0", "veth1", "docker0", "__proto__", "constructor"];

/** Attachments as random plugins report them; the addresses are all different. */
function randomAttachments(below: (limit: number) => number): AttachmentResult[] {
  const pick = <T>(list: readonly T[]) => list[below(list.length)] as T;
  return ["eth0", "eth1", "net1"].slice(0, 1 + below(3)).map((ifName, n) => {
    const interfaces = Array.from({ length: below(5) }, (): Interface => {
      const item = { name: pick(names), mac: pick(["02:00", "02:01"]) };
      return below(3) === 0 ? { ...item, sandbox: netns } : item;
    });
    const ips = Array.from({ length: below(5) }, (_, i) => {
      const address = below(2) === 0 ? `10.${n}.0.${i}/16` : `fd00:${n + 1}::${i + 1}/64`;
      return below(3) === 0 ? { address } : { address, interface: below(7) - 1 };
    });
    const routes = Array.from({ length: below(4) }, () => ({
      dst: pick(["0.0.0.0/0", "::/0", "10.9.0.0/16"]),
    }));
    return {
      ifName,
      netns: below(5) === 0 ? "" : netns,
      result: { ...empty, interfaces, ips, routes },
    };
  });
}

test("merging keeps every index at the same interface (1000 random pods)", () => {
  for (let seed = 0; seed < 1000; seed++) {
    const attachments = randomAttachments(generator(seed));
    const merged = mergeResults(attachments);
    const podNames = merged.interfaces.flatMap(({ name, sandbox }) => (sandbox ? [name] : []));
    const ips = attachments.flatMap(({ result, ...attachment }) => {
      const normal = normalizeResult(result, attachment);
      return normal.ips.map(({ address, interface: index = -1 }) => {
        const { name, sandbox } = normal.interfaces[index] ?? {};
        const isKept = (item: Partial<Interface>) =>
          Boolean(item.sandbox) || !podNames.includes(item.name ?? "");
        if (isKept(normal.interfaces[index] ?? {})) return { seed, address, name, sandbox };
        const named = normal.interfaces.filter((item) => item.name === attachment.ifName);
        const pod = named.find((item) => item.sandbox) ?? named.find(isKept);
        return { seed, address, name: pod?.name, sandbox: pod?.sandbox };
      });
    });
    const found = merged.ips.map(({ address, interface: index = -1 }) => {
      const { name, sandbox } = merged.interfaces[index] ?? {};
      return { seed, address, name, sandbox };
    });
    expect(found).toEqual(ips);
    expect(merged.interfaces.filter((i) => !i.sandbox && podNames.includes(i.name))).toEqual([]);
    for (const version of supportedVersions) {
      const wire = JSON.parse(JSON.stringify(toVersion(merged, version)));
      for (const { interface: index } of wire.ips ?? []) {
        if (index !== undefined) expect(wire.interfaces[index]).toBeDefined();
      }
      expect(toVersion(parseResult(wire, "1.1.0"), version)).toEqual(wire);
    }
  }
});

test("a damaged result is read or refused with 104, never anything else (2000 mutations)", () => {
  const junk = [null, [], {}, "", "x", -1, 0.5, 2 ** 40, true, [null], { ip: 1 }, "10.0.0.1/8"];
  const damage = (value: unknown, below: (limit: number) => number): unknown => {
    if (typeof value !== "object" || value === null || below(6) === 0) {
      return below(4) === 0 ? junk[below(junk.length)] : value;
    }
    if (Array.isArray(value)) return value.map((item) => damage(item, below));
    return Object.fromEntries(
      Object.entries(value).map(([key, item]) => [key, damage(item, below)]),
    );
  };
  let refused = 0;
  for (let seed = 0; seed < 2000; seed++) {
    const below = generator(seed);
    const version = supportedVersions[seed % supportedVersions.length] ?? "1.1.0";
    const value = damage(toVersion(full, version), below);
    const found = failure(() => {
      const result = normalizeResult(parseResult(value, version), { ifName: "eth0", netns });
      expect(parseResult(toVersion(result, "1.1.0"), "1.1.0")).toEqual(result);
    });
    if (found) refused++;
    expect(found?.code ?? code.delegateProtocol).toBe(code.delegateProtocol);
  }
  expect(refused).toBeWithin(500, 1900);
});

describe("default routes", () => {
  test.each<[string, Result["routes"][number], boolean]>([
    ["IPv4", { dst: "0.0.0.0/0" }, true],
    ["IPv6 with a gateway", { dst: "::/0", gw: "fe80::1" }, true],
    ["the main table by number", { dst: "0.0.0.0/0", table: 254 }, true],
    ["any preference", { dst: "0.0.0.0/0", priority: 900 }, true],
    ["another table", { dst: "0.0.0.0/0", table: 100 }, false],
    ["half the world", { dst: "0.0.0.0/1" }, false],
    ["a network of 10 bits", { dst: "10.0.0.0/10" }, false],
    ["a host", { dst: "::/128" }, false],
  ])("isDefaultRoute() %s", (_, route, expected) => {
    expect(isDefaultRoute(route)).toBe(expected);
  });

  test.each<[string, (4 | 6)[], string[]]>([
    ["none", [], ["0.0.0.0/0", "::/0", "10.9.0.0/16"]],
    ["IPv4", [4], ["::/0", "10.9.0.0/16"]],
    ["IPv6", [6], ["0.0.0.0/0", "10.9.0.0/16"]],
    ["both", [4, 6], ["10.9.0.0/16"]],
  ])("withoutDefaultRoutes() %s", (_, families, expected) => {
    const routes = full.routes.filter(({ dst }) => expected.includes(dst));
    expect(withoutDefaultRoutes(full, new Set(families))).toEqual({ ...full, routes });
    expect(full.routes).toHaveLength(3);
  });

  test.each<[string, 4 | 6]>([
    ["10.1.0.5", 4],
    ["10.1.0.5/16", 4],
    ["::/0", 6],
    ["::ffff:a00:1/120", 6],
  ])("family() %s", (address, expected) => {
    expect(family(address)).toBe(expected);
  });
});
