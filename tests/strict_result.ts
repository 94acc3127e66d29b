/**
 * A strict reader of ADD results, written from the specifications alone: which keys each version
 * has, which of them must be there, and what their values must be. It shares nothing with the
 * product, so that the two can only agree by both being right.
 *
 * Sources: CNI SPEC 0.2.0 "Result" (which is that of 0.1.0 too), 0.3.1 and 0.4.0 "Result" and
 * "Well-known Structures", 1.0.0 and 1.1.0 §5 "ADD Success".
 */
import { isAbsolute } from "node:path";

/** What the caller of ADD knows besides the document. */
export interface Asked {
  /** `cniVersion` of the config on stdin: the result is of the same (§5). */
  version: string;
  /** CNI_IFNAME; given, the result must have it in the pod, exactly once. */
  ifName?: string;
  /** CNI_NETNS: what `sandbox` must be for an interface in the pod. */
  netns?: string;
}

type Json = Record<string, unknown>;
type Check = (value: unknown, at: string) => string[];

/**
 * Everything that is wrong with an ADD result, as `<path>: <what>`; empty for a good one.
 *
 * @param text the whole stdout of the plugin: one JSON document
 */
export function strictIssues(text: string, asked: Asked): string[] {
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch (error) {
    return [`stdout: is not one JSON document (${error instanceof Error && error.name})`];
  }
  const schema = schemas[asked.version];
  if (!schema) return [`cniVersion: "${asked.version}" is no released version`];
  const issues = schema(document, "");
  if (issues.length > 0) return issues;
  const result = document as Json;
  if (result["cniVersion"] !== asked.version) {
    return [`cniVersion: ${String(result["cniVersion"])}, expected ${asked.version}`];
  }
  return [...indexIssues(result), ...familyIssues(result), ...podIssues(result, asked)];
}

/** An object with these keys and no other; those with a `!` must be there. */
function object(keys: Record<string, Check>): Check {
  const known = new Map(Object.entries(keys).map(([key, check]) => [key.replace("!", ""), check]));
  const required = Object.keys(keys).filter((key) => key.endsWith("!"));
  return (value, at) => {
    if (typeof value !== "object" || value === null || Array.isArray(value)) {
      return [`${at || "result"}: is no object`];
    }
    const missing = required
      .map((key) => key.replace("!", ""))
      .filter((key) => !Object.hasOwn(value, key))
      .map((key) => `${join(at, key)}: is missing`);
    const wrong = Object.entries(value).flatMap(([key, item]) => {
      const check = known.get(key);
      return check ? check(item, join(at, key)) : [`${join(at, key)}: no such key`];
    });
    return [...missing, ...wrong];
  };
}

function list(check: Check): Check {
  return (value, at) =>
    Array.isArray(value)
      ? value.flatMap((item, i) => check(item, `${at}[${i}]`))
      : [`${at}: is no list`];
}

function text(isGood: (text: string) => boolean, expected: string): Check {
  return (value, at) =>
    typeof value === "string" && isGood(value) ? [] : [`${at}: is not ${expected}`];
}

const join = (at: string, key: string) => (at === "" ? key : `${at}.${key}`);

/** One part of an IPv4 address; Go and the kernel refuse leading zeros. */
const byte = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
const v4 = new RegExp(`^${byte}(?:\\.${byte}){3}$`);

/** RFC 4291 §2.2: eight groups, one run of zeros may be `::`, the last two may be an IPv4. */
function isV6(address: string): boolean {
  const halves = address.split("::");
  if (halves.length > 2) return false;
  const groups = halves.map((half) => (half === "" ? [] : half.split(":")));
  let count = 0;
  for (const [h, half] of groups.entries()) {
    for (const [i, group] of half.entries()) {
      const isLast = h === groups.length - 1 && i === half.length - 1;
      if (/^[0-9a-f]{1,4}$/i.test(group)) count += 1;
      else if (isLast && v4.test(group)) count += 2;
      else return false;
    }
  }
  return halves.length === 2 ? count <= 7 : count === 8;
}

/** 4, 6, or 0 for no address. */
function familyOf(address: string): 0 | 4 | 6 {
  if (v4.test(address)) return 4;
  return isV6(address) ? 6 : 0;
}

/** 4, 6, or 0 for what is not in CIDR notation. */
function cidrFamily(cidr: string): 0 | 4 | 6 {
  const [, address = "", bits = ""] = /^([^/]+)\/(0|[1-9][0-9]{0,2})$/.exec(cidr) ?? [];
  const family = familyOf(address);
  return Number(bits) <= (family === 4 ? 32 : 128) ? family : 0;
}

const string = text(() => true, "a string");
const filled = text((value) => value !== "", "a string with something in it");
const address = text((value) => familyOf(value) !== 0, "an IP address");
const cidr = text((value) => cidrFamily(value) !== 0, "in CIDR notation");
const absolutePath = text(isAbsolute, "an absolute path");
const uint: Check = (value, at) =>
  Number.isInteger(value) && (value as number) >= 0 && !Object.is(value, -0)
    ? []
    : [`${at}: is not a uint`];

const dns = object({
  nameservers: list(address),
  domain: string,
  search: list(string),
  options: list(string),
});

const oldRoute = object({ "dst!": cidr, gw: address });
const link = { "name!": filled, mac: filled, sandbox: string };
const ip = { "address!": cidr, gateway: address, interface: uint };
const ipFamily = text((value) => value === "4" || value === "6", '"4" or "6"');

/** 0.1.0 and 0.2.0: one address per family, and no word about interfaces. */
const firstShape = object({
  "cniVersion!": string,
  ip4: object({ "ip!": cidr, gateway: address, routes: list(oldRoute) }),
  ip6: object({ "ip!": cidr, gateway: address, routes: list(oldRoute) }),
  dns,
});
/** 0.3.0, 0.3.1 and 0.4.0: lists, and each address says which family it is of. */
const secondShape = object({
  "cniVersion!": string,
  "interfaces!": list(object(link)),
  "ips!": list(object({ "version!": ipFamily, ...ip })),
  routes: list(oldRoute),
  dns,
});
const thirdShape = object({
  "cniVersion!": string,
  "interfaces!": list(object(link)),
  "ips!": list(object(ip)),
  "routes!": list(oldRoute),
  dns,
});
const route = object({
  ...{ "dst!": cidr, gw: address },
  ...{ mtu: uint, advmss: uint, priority: uint, table: uint, scope: uint },
});
const fourthShape = object({
  "cniVersion!": string,
  "interfaces!": list(object({ ...link, mtu: uint, socketPath: absolutePath, pciID: filled })),
  "ips!": list(object(ip)),
  "routes!": list(route),
  dns,
});

const schemas: Record<string, Check> = {
  "0.1.0": firstShape,
  "0.2.0": firstShape,
  "0.3.0": secondShape,
  "0.3.1": secondShape,
  "0.4.0": secondShape,
  "1.0.0": thirdShape,
  "1.1.0": fourthShape,
};

const items = (result: Json, key: string) => (result[key] ?? []) as Json[];

/** `interface` is "the index into the `interfaces` list". */
function indexIssues(result: Json): string[] {
  const count = items(result, "interfaces").length;
  return items(result, "ips").flatMap(({ interface: index }, i) =>
    index !== undefined && (index as number) >= count
      ? [`ips[${i}].interface: ${String(index)} of ${count} interfaces`]
      : [],
  );
}

/** What stands under `ip4`, or says `"version": "6"`, must be of that family. */
function familyIssues(result: Json): string[] {
  const issues: string[] = [];
  const check = (at: string, value: unknown, family: number) => {
    if (value === undefined) return;
    const found = cidrFamily(String(value)) || familyOf(String(value));
    if (found !== family) issues.push(`${at}: is of family ${found}, expected ${family}`);
  };
  for (const family of [4, 6]) {
    const one = result[`ip${family}`] as Json | undefined;
    if (!one) continue;
    check(`ip${family}.ip`, one["ip"], family);
    check(`ip${family}.gateway`, one["gateway"], family);
    for (const [i, { dst }] of items(one, "routes").entries()) {
      check(`ip${family}.routes[${i}].dst`, dst, family);
    }
  }
  for (const [i, { version, address, gateway }] of items(result, "ips").entries()) {
    if (version === undefined) continue;
    check(`ips[${i}].address`, address, Number(version));
    check(`ips[${i}].gateway`, gateway, Number(version));
  }
  return issues;
}

/** The interface that was asked for is in the pod, once; no other one in the pod has its name. */
function podIssues(result: Json, { version, ifName, netns }: Asked): string[] {
  if (version === "0.1.0" || version === "0.2.0") return [];
  const interfaces = items(result, "interfaces");
  const isInPod = ({ sandbox }: Json) => sandbox !== undefined && sandbox !== "";
  const inPod = interfaces.filter(isInPod);
  const issues = inPod.flatMap(({ name, sandbox }) => [
    ...(netns !== undefined && sandbox !== netns
      ? [`interfaces: ${String(name)} has sandbox ${String(sandbox)}, not CNI_NETNS`]
      : []),
    ...(interfaces.filter((other) => other["name"] === name).length > 1
      ? [`interfaces: more than one is named ${String(name)}`]
      : []),
  ]);
  if (ifName !== undefined && inPod.filter(({ name }) => name === ifName).length !== 1) {
    issues.push(`interfaces: ${ifName} is not in the pod once`);
  }
  return issues;
}
