/**
 * Side by side with others: what the strict reader of tests/strict_result.ts says of results, and
 * what libcni (containernetworking/cni v1.3.0) does with the same lists and results. Where genie
 * does it differently on purpose, the row says how libcni does it and why that is not followed. The
 * examples that the specifications run through are tests/vectors/spec-*.json.
 *
 * The rows were compared once with libcni itself, compiled from its sources.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { CniError, type CniVersion, code, supportedVersions } from "../lib/cni.ts";
import { requestConfig } from "../lib/delegate.ts";
import { isObject } from "../lib/json.ts";
import { type AttachmentResult, mergeResults } from "../lib/merge.ts";
import { parseConfigList } from "../lib/networks.ts";
import { parseResult, toVersion } from "../lib/result.ts";
import { strictIssues } from "./strict_result.ts";

type Json = Record<string, unknown>;
/** How libcni does it, and why that is not followed. */
type Differs = { libcni: unknown; because: string };

const dns = { nameservers: ["10.1.0.1"], domain: "a.example", search: ["a"], options: ["ndots:5"] };
const old: CniVersion[] = ["0.1.0", "0.2.0"];
const lists: CniVersion[] = ["0.3.0", "0.3.1", "0.4.0"];

/** All that 0.1.0 and 0.2.0 can say. */
const inOld = {
  ip4: {
    ip: "10.1.0.5/16",
    gateway: "10.1.0.1",
    routes: [{ dst: "0.0.0.0/0", gw: "10.1.0.1" }, { dst: "10.9.0.0/16" }],
  },
  ip6: { ip: "fd00::5/64", gateway: "fd00::1", routes: [{ dst: "::/0", gw: "fd00::1" }] },
  dns,
};
const links = [
  { name: "cni0", mac: "00:11:22:33:44:55" },
  { name: "eth0", mac: "99:88:77:66:55:44", sandbox: "/n" },
  { name: "eth1", sandbox: "/n" },
];
const routes = [
  { dst: "0.0.0.0/0", gw: "10.1.0.1" },
  { dst: "::/0", gw: "fd00::1" },
];
const ips = [
  { address: "192.0.2.1/24", interface: 0 },
  { address: "10.1.0.5/16", gateway: "10.1.0.1", interface: 1 },
  { address: "fd00::5/64", gateway: "fd00::1", interface: 1 },
  { address: "10.2.0.5/16" },
  { address: "10.3.0.5/16", interface: 2 },
];
const namesFamily = <T extends { address: string }>(all: T[]) =>
  all.map((ip) => ({ version: ip.address.includes(":") ? "6" : "4", ...ip }));

/** All that 1.0.0 can say. */
const in100 = { interfaces: links, ips, routes, dns };
/** All that 0.3.0, 0.3.1 and 0.4.0 can say. */
const inLists = { interfaces: links, ips: namesFamily(ips), routes, dns };
const [cni0, eth0, eth1] = links;
const metrics = { mtu: 1400, advmss: 1360, priority: 5, table: 100, scope: 253 };
/** All that 1.1.0 can say. */
const in110 = {
  interfaces: [
    { ...cni0, mtu: 1500 },
    { ...eth0, mtu: 1450, socketPath: "/run/vhost.sock", pciID: "0000:00:1f.6" },
    eth1,
  ],
  ips,
  routes: [{ ...routes[0], ...metrics }, routes[1]],
  dns,
};
/** What is left of the lists in 0.2.0: the pod's first address of each family. */
const squeezed = {
  ip4: { ip: "10.1.0.5/16", gateway: "10.1.0.1", routes: [routes[0]] },
  ip6: { ip: "fd00::5/64", gateway: "fd00::1", routes: [routes[1]] },
  dns,
};
const unfolded = {
  interfaces: [],
  ips: [
    { address: "10.1.0.5/16", gateway: "10.1.0.1" },
    { address: "fd00::5/64", gateway: "fd00::1" },
  ],
  routes: [...inOld.ip4.routes, ...inOld.ip6.routes],
  dns,
};

interface Conversion {
  from: [CniVersion[], object];
  to: [CniVersion[], object];
  /** Values of the first that the second does not hold. */
  lost: string[];
  /** By path: what libcni has there, undefined for nothing at all. */
  libcni?: Json;
  because?: string;
}

const squeezedAway = [
  ...["name=cni0", "mac=00:11:22:33:44:55", "name=eth0", "mac=99:88:77:66:55:44", "sandbox=/n"],
  ...["name=eth1", "sandbox=/n", "address=192.0.2.1/24", "interface=0", "interface=1"],
  ...["interface=1", "address=10.2.0.5/16", "address=10.3.0.5/16", "interface=2"],
];
const versionsAway = ["version=4", "version=4", "version=6", "version=4", "version=4"];
const moreOf110 = [
  ...["mtu=1500", "mtu=1450", "socketPath=/run/vhost.sock", "pciID=0000:00:1f.6"],
  ...["mtu=1400", "advmss=1360", "priority=5", "table=100", "scope=253"],
];
const hostFirst = {
  libcni: { ip4: { ip: "192.0.2.1/24", routes: [routes[0]] } },
  because: "libcni takes the first address of all, here that of the bridge on the host",
};
const noInterfaces = {
  libcni: { interfaces: undefined },
  because: "libcni leaves empty lists out; §5 names the key without saying so",
};
const routesOf110 = { "routes.0": { ...routes[0], ...metrics } };

const conversions: Conversion[] = [
  { from: [old, inOld], to: [old, inOld], lost: [] },
  {
    from: [old, inOld],
    to: [lists, { ...unfolded, ips: namesFamily(unfolded.ips) }],
    lost: [],
    ...noInterfaces,
  },
  { from: [old, inOld], to: [["1.0.0", "1.1.0"], unfolded], lost: [], ...noInterfaces },
  {
    from: [lists, inLists],
    to: [old, squeezed],
    lost: [...squeezedAway, ...versionsAway],
    ...hostFirst,
  },
  { from: [lists, inLists], to: [lists, inLists], lost: [] },
  { from: [lists, inLists], to: [["1.0.0", "1.1.0"], in100], lost: versionsAway },
  { from: [["1.0.0"], in100], to: [old, squeezed], lost: squeezedAway, ...hostFirst },
  { from: [["1.0.0"], in100], to: [lists, inLists], lost: [] },
  { from: [["1.0.0"], in100], to: [["1.0.0", "1.1.0"], in100], lost: [] },
  {
    from: [["1.1.0"], in110],
    to: [old, squeezed],
    lost: [...squeezedAway, ...moreOf110],
    ...hostFirst,
  },
  {
    from: [["1.1.0"], in110],
    to: [lists, inLists],
    lost: moreOf110,
    libcni: routesOf110,
    because: "libcni leaves in the routes what these versions do not know",
  },
  {
    from: [["1.1.0"], in110],
    to: [["1.0.0"], in100],
    lost: moreOf110,
    libcni: {
      ...routesOf110,
      "interfaces.0": in110.interfaces[0],
      "interfaces.1": in110.interfaces[1],
    },
    because: "libcni has one type for both and changes nothing but the version",
  },
  { from: [["1.1.0"], in110], to: [["1.1.0"], in110], lost: [] },
];

/** `key=value` of everything a result holds; an address is one whatever its key. */
function values(value: unknown, key = ""): string[] {
  if (Array.isArray(value)) return value.flatMap((item) => values(item, key));
  if (isObject(value)) return Object.entries(value).flatMap(([name, item]) => values(item, name));
  return [`${key === "ip" ? "address" : key}=${String(value)}`];
}

function missing(from: string[], to: string[]): string[] {
  const left = [...to];
  return from.filter((one) => {
    const at = left.indexOf(one);
    if (at >= 0) left.splice(at, 1);
    return at < 0;
  });
}

const pairs = conversions.flatMap(({ from: [froms, given], to: [tos, expected], ...rest }) =>
  froms.flatMap((from) => tos.map((to) => ({ from, to, given, expected, ...rest }))),
);

describe("conversion", () => {
  test("of every version to every version has its row, and only one", () => {
    const all = supportedVersions.flatMap((from) => supportedVersions.map((to) => `${from} ${to}`));
    expect(pairs.map(({ from, to }) => `${from} ${to}`).sort()).toEqual(all.sort());
  });

  test.each(pairs)("from $from to $to", ({ from, to, given, expected, lost }) => {
    const text = JSON.stringify({ cniVersion: from, ...given });
    expect(strictIssues(text, { version: from })).toEqual([]);
    const converted = toVersion(parseResult(JSON.parse(text), from), to);
    expect(converted).toEqual({ cniVersion: to, ...expected });
    expect(strictIssues(JSON.stringify(converted), { version: to })).toEqual([]);
    expect(missing(values(given), values(expected)).sort()).toEqual([...lost].sort());
  });

  test.each(pairs.filter(({ libcni }) => libcni))(
    "from $from to $to differs from libcni's: $because",
    ({ expected, libcni = {} }) => {
      const at = (path: string) =>
        path.split(".").reduce<unknown>((value, key) => (value as Json)[key], expected);
      for (const [path, theirs] of Object.entries(libcni)) expect(at(path)).not.toEqual(theirs);
    },
  );

  test("there and back again, a result is what the older of both versions can say of it", () => {
    for (const { from, to, given } of pairs) {
      const there = toVersion(parseResult({ cniVersion: from, ...given }, from), to);
      const back = toVersion(parseResult(there, to), from);
      const again = toVersion(parseResult(toVersion(parseResult(back, from), to), to), from);
      expect(again).toEqual(back);
    }
  });
});

/** A list as libcni's NetworkConfFromBytes reads it, or `"refused"`. */
const libcniLists: [string, Json, Json | "refused", Differs?][] = [
  ["one version", { cniVersion: "0.4.0" }, { cniVersion: "0.4.0" }],
  ["no version", {}, { cniVersion: "0.1.0" }, { libcni: "", because: "plugins take it for 0.1.0" }],
  ["several", { cniVersions: ["0.3.1", "1.1.0", "0.4.0"] }, { cniVersion: "1.1.0" }],
  ["both keys", { cniVersion: "1.0.0", cniVersions: ["0.3.1"] }, { cniVersion: "1.0.0" }],
  ["both keys", { cniVersion: "0.3.1", cniVersions: ["1.0.0"] }, { cniVersion: "1.0.0" }],
  ["one of the future", { cniVersion: "1.0.0", cniVersions: ["9.0.0"] }, { cniVersion: "1.0.0" }],
  ["an empty list", { cniVersion: "1.0.0", cniVersions: [] }, { cniVersion: "1.0.0" }],
  [
    "one that never was",
    { cniVersion: "0.4.0", cniVersions: ["0.5.0"] },
    { cniVersion: "0.4.0" },
    { libcni: "0.5.0", because: "no plugin knows that version" },
  ],
  [
    "only the future",
    { cniVersion: "9.0.0" },
    "refused",
    { libcni: "9.0.0", because: "libcni leaves it to the plugins to refuse it" },
  ],
  ["a version that is none", { cniVersion: "1.0.0", cniVersions: ["x"] }, "refused"],
  ["a version that is a number", { cniVersion: 1 }, "refused"],
  ["versions that are text", { cniVersions: "1.0.0" }, "refused"],
  ["a flag", { disableCheck: true, disableGC: true }, { disableCheck: true, disableGC: true }],
  ["a flag as text", { disableCheck: "True" }, { disableCheck: true }],
  ["a flag as other text", { disableGC: "yes" }, "refused"],
  ["a flag as a number", { disableCheck: 1 }, "refused"],
  ["only inlined plugins", { loadOnlyInlinedPlugins: true }, { loadsFolder: false }],
  ["inlined plugins and others", { loadOnlyInlinedPlugins: "false" }, { loadsFolder: true }],
  ["plugins elsewhere", { plugins: undefined }, { plugins: [], loadsFolder: true }],
  ["no plugins at all", { plugins: undefined, loadOnlyInlinedPlugins: true }, "refused"],
  [
    "an empty list of plugins",
    { plugins: [] },
    { plugins: [], loadsFolder: true },
    {
      libcni: "refused",
      because: "§1: those of the folder are appended, as if the key was absent",
    },
  ],
  ["plugins that are an object", { plugins: {} }, "refused"],
  ["a plugin without a type", { plugins: [{}] }, "refused"],
  ["a plugin that is text", { plugins: ["bridge"] }, "refused"],
  ["no name", { name: undefined }, "refused"],
  ["a name that is a number", { name: 1 }, "refused"],
  [
    "a type that is a path",
    { plugins: [{ type: "../bridge" }] },
    "refused",
    { libcni: [{ type: "../bridge" }], because: "libcni refuses it when it looks for the binary" },
  ],
];

describe("a config list with", () => {
  const rows = libcniLists.map(([name, keys, expected, differs]) => ({
    ...{ name, keys, expected, differs },
    how: differs ? `, unlike libcni: ${differs.because}` : "",
  }));
  test.each(rows)("$name, $keys$how", ({ keys, expected, differs }) => {
    const list = withKeys(keys);
    if (expected === "refused") {
      const codes: number[] = [code.invalidConfig, code.incompatibleVersion];
      expect(codes).toContain(refusalOf(() => parseConfigList(list, "n")) ?? 0);
    } else expect(parseConfigList(list, "n")).toMatchObject(expected);
    if (differs)
      expect(Object.values(isObject(expected) ? expected : {})).not.toContain(differs.libcni);
  });
});

/** A good list with these keys put over it; undefined takes one away. */
function withKeys(keys: Json): Json {
  return JSON.parse(JSON.stringify({ name: "n", plugins: [{ type: "bridge" }], ...keys })) as Json;
}

function refusalOf(run: () => unknown): number | undefined {
  try {
    run();
  } catch (error) {
    if (error instanceof CniError) return error.code;
    throw error;
  }
  return undefined;
}

/** What a plugin gets of its config, beside libcni's injectRuntimeConfig and InjectConf. */
const requests: [string, Json, Json, Json, Differs?][] = [
  [
    "a capability that both have",
    { capabilities: { mac: true } },
    { mac: "x" },
    { runtimeConfig: { mac: "x" } },
    {
      libcni: { capabilities: { mac: true }, runtimeConfig: { mac: "x" } },
      because: '§3: "capabilities: must not be set"',
    },
  ],
  ["one it does not declare", {}, { mac: "x" }, {}],
  [
    "one it declares as false",
    { capabilities: { mac: false } },
    { mac: "x" },
    {},
    { libcni: { capabilities: { mac: false } }, because: '§3: "capabilities: must not be set"' },
  ],
  [
    "one that nobody offers",
    { capabilities: { mac: true } },
    {},
    {},
    { libcni: { capabilities: { mac: true } }, because: '§3: "capabilities: must not be set"' },
  ],
  [
    "another runtimeConfig",
    { runtimeConfig: { mac: "y" } },
    {},
    {},
    { libcni: { runtimeConfig: { mac: "y" } }, because: "§1: the key is reserved for the runtime" },
  ],
  [
    "keys of cni.dev",
    { "cni.dev/valid-attachments": [] },
    {},
    {},
    { libcni: { "cni.dev/valid-attachments": [] }, because: "§3: not passed through" },
  ],
  ["another name and version", { name: "m", cniVersion: "0.1.0" }, {}, {}],
  [
    "keys nobody knows",
    { keyA: ["b", 1, null], args: { a: 1 } },
    {},
    { keyA: ["b", 1, null], args: { a: 1 } },
  ],
];

describe("a request config of a plugin with", () => {
  const rows = requests.map(([name, plugin, offered, expected, differs]) => ({
    ...{ name, plugin, offered, expected, differs },
    how: differs ? `, unlike libcni: ${differs.because}` : "",
  }));
  test.each(rows)("$name$how", ({ plugin, offered, expected, differs }) => {
    const list = parseConfigList(
      { cniVersion: "1.0.0", name: "n", plugins: [{ type: "t", ...plugin }] },
      "n",
    );
    const [only] = list.plugins;
    if (!only) throw new Error("The list has lost its plugin");
    const request = requestConfig(list, only, { capabilityArgs: offered });
    const base = { type: "t", cniVersion: "1.0.0", name: "n" };
    expect(request).toEqual({ ...base, ...expected });
    if (differs) expect(request).not.toEqual({ ...base, ...(differs.libcni as Json) });
  });
});

describe("the strict reader", () => {
  const pod = { name: "eth0", sandbox: "/n" };
  const good = { interfaces: [pod], ips: [{ address: "10.0.0.5/8", interface: 0 }], routes: [] };
  const asked = { version: "1.1.0", ifName: "eth0", netns: "/n" };
  const read = (document: unknown, more: object = {}) =>
    strictIssues(JSON.stringify(document), { ...asked, ...more });

  test("knows every version that genie does, and no other", () => {
    const issues = (version: string) => strictIssues(`{"cniVersion":"${version}"}`, { version });
    for (const version of supportedVersions) {
      expect(issues(version).filter((issue) => !/is missing$/.test(issue))).toEqual([]);
    }
    expect(issues("0.5.0")).toEqual(['cniVersion: "0.5.0" is no released version']);
  });

  test.each<[string, object]>([
    ["a plain result", good],
    ["a host interface without a sandbox", { ...good, interfaces: [pod, { name: "veth1" }] }],
    [
      "a host interface with an empty one",
      { ...good, interfaces: [pod, { name: "v", sandbox: "" }] },
    ],
    ["every key of 1.1.0", { ...in110, interfaces: [...in110.interfaces.slice(0, 2)], ips: [] }],
    [
      "IPv6 in every spelling",
      { ...good, ips: ["::/0", "1::2:3/128", "::ffff:1.2.3.4/96"].map((address) => ({ address })) },
    ],
  ])("accepts %s", (_name, document) => {
    expect(read({ cniVersion: "1.1.0", ...document })).toEqual([]);
  });

  test.each<[string, string, object, string]>([
    ["no version", "1.1.0", good, "cniVersion: is missing"],
    [
      "another version",
      "1.1.0",
      { cniVersion: "1.0.0", ...good },
      "cniVersion: 1.0.0, expected 1.1.0",
    ],
    ["a key of nobody", "1.1.0", { cniVersion: "1.1.0", ...good, x: 1 }, "x: no such key"],
    [
      "a key of a later version",
      "1.0.0",
      { cniVersion: "1.0.0", ...good, interfaces: [{ ...pod, mtu: 1 }] },
      "interfaces[0].mtu: no such key",
    ],
    [
      "a later route",
      "1.0.0",
      { cniVersion: "1.0.0", ...good, routes: [{ dst: "::/0", table: 1 }] },
      "routes[0].table: no such key",
    ],
    [
      "the family in 1.x",
      "1.0.0",
      { cniVersion: "1.0.0", ...good, ips: [{ version: "4", address: "1.0.0.1/8" }] },
      "ips[0].version: no such key",
    ],
    ["no family before", "0.4.0", { cniVersion: "0.4.0", ...good }, "ips[0].version: is missing"],
    [
      "the wrong family",
      "0.4.0",
      { cniVersion: "0.4.0", ...good, ips: [{ version: "6", address: "1.0.0.1/8" }] },
      "ips[0].address: is of family 4, expected 6",
    ],
    ["lists before 0.3.0", "0.2.0", { cniVersion: "0.2.0", ...good }, "interfaces: no such key"],
    [
      "the wrong family there",
      "0.2.0",
      { cniVersion: "0.2.0", ip4: { ip: "::1/8" } },
      "ip4.ip: is of family 6, expected 4",
    ],
    [
      "an index behind the end",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, ips: [{ address: "1.0.0.1/8", interface: 1 }] },
      "ips[0].interface: 1 of 1 interfaces",
    ],
    [
      "an index before the start",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, ips: [{ address: "1.0.0.1/8", interface: -1 }] },
      "ips[0].interface: is not a uint",
    ],
    [
      "an address without a prefix",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, ips: [{ address: "1.0.0.1" }] },
      "ips[0].address: is not in CIDR notation",
    ],
    [
      "a prefix that is too long",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, ips: [{ address: "1.0.0.1/33" }] },
      "ips[0].address: is not in CIDR notation",
    ],
    [
      "two runs of zeros",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, ips: [{ address: "1::2::3/64" }] },
      "ips[0].address: is not in CIDR notation",
    ],
    [
      "an address with a zero in front",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, ips: [{ address: "010.0.0.1/8" }] },
      "ips[0].address: is not in CIDR notation",
    ],
    [
      "a gateway that is a network",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, routes: [{ dst: "::/0", gw: "::1/64" }] },
      "routes[0].gw: is not an IP address",
    ],
    [
      "an interface without a name",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, interfaces: [{}] },
      "interfaces[0].name: is missing",
    ],
    [
      "the pod's interface missing",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, interfaces: [{ name: "eth0" }] },
      "interfaces: eth0 is not in the pod once",
    ],
    [
      "another pod's",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, interfaces: [{ name: "eth0", sandbox: "/m" }] },
      "interfaces: eth0 has sandbox /m, not CNI_NETNS",
    ],
    [
      "a host interface of that name",
      "1.1.0",
      { cniVersion: "1.1.0", ...good, interfaces: [pod, { name: "eth0" }] },
      "interfaces: more than one is named eth0",
    ],
  ])("refuses %s", (_name, version, document, issue) => {
    expect(read(document, { version })).toContain(issue);
  });

  test.each(["", "{}{}", "null", "[]", '{"cniVersion":'])("refuses %j", (text) => {
    expect(strictIssues(text, asked)).not.toEqual([]);
  });
});

describe("strictly read", () => {
  const folder = join(import.meta.dir, "samples");
  const recorded = readdirSync(folder)
    .filter((name) => /-ADD-/.test(name))
    .map((name) => JSON.parse(readFileSync(join(folder, name), "utf8")))
    .filter(({ exit }) => exit === 0) as { plugin: string; stdin: string; stdout: Json }[];

  test("results of recorded plugins are good in the version they were asked in", () => {
    expect(recorded.length).toBeGreaterThan(10);
    for (const { plugin, stdin, stdout } of recorded) {
      const { cniVersion: version } = JSON.parse(stdin) as { cniVersion: string };
      // Debian's loopback forgets "version" where the specification has it.
      const known = plugin === "loopback" ? /^ips\[\d\]\.version: is missing$/ : /^$/;
      const issues = strictIssues(JSON.stringify(stdout), { version });
      expect(issues.filter((issue) => !known.test(issue))).toEqual([]);
    }
  });

  const netns = "/var/run/netns/p";
  const inPod = (ifName: string, result: Json): AttachmentResult => {
    const text = JSON.stringify(result).replaceAll('"$IF"', JSON.stringify(ifName));
    return { ifName, netns, result: parseResult(JSON.parse(text), "1.1.0") };
  };
  /** What plugins of each version say of one attachment. */
  const parts: Json[] = [
    { cniVersion: "0.2.0", ...inOld },
    { cniVersion: "0.2.0", ip4: { ip: "10.7.0.5/16" } },
    { cniVersion: "0.4.0", ips: [{ version: "4", address: "10.4.0.5/24", interface: 3 }] },
    {
      cniVersion: "0.4.0",
      interfaces: [{ name: "cni0" }, { name: "eth0" }, { name: "$IF", sandbox: netns }],
      ips: namesFamily([{ address: "10.5.0.5/24", interface: 1 }, { address: "10.5.0.6/24" }]),
    },
    { cniVersion: "1.0.0", interfaces: [{ name: "cni0" }, { name: "veth9" }], ips: [], routes },
    { cniVersion: "1.1.0", ...in110, interfaces: [{ name: "$IF", sandbox: netns, mtu: 9000 }] },
  ];
  const pods = parts.flatMap((a, i) => parts.map((b, j) => [`${i} and ${j}`, a, b] as const));

  test.each(pods)("two networks merged are a good result in every version: %s", (_name, a, b) => {
    const merged = mergeResults([inPod("eth0", a), inPod("net1", b)]);
    for (const version of supportedVersions) {
      const text = JSON.stringify(toVersion(merged, version));
      expect(strictIssues(text, { version, ifName: "eth0", netns })).toEqual([]);
      expect(strictIssues(text, { version, ifName: "net1", netns })).toEqual([]);
    }
  });
});
