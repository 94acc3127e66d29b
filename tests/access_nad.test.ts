/** lib/policy/access_rules.ts: what an object may be, by what its config would run and take. */
import { describe, expect, test } from "bun:test";
import { checkDefinition, type Definition, type NadRule } from "../lib/policy/access_rules.ts";

const rule = (more: Partial<NadRule>): NadRule => ({
  namespaces: ["*"],
  configOnDisk: false,
  line: 3,
  ...more,
});
const nad = (...plugins: Record<string, unknown>[]): Definition => ({
  namespace: "team",
  onDisk: false,
  plugins,
});
const local = { ipam: { type: "host-local", subnet: "10.0.0.0/24" } };
const macvlan = { type: "macvlan", master: "eth1", ...local };
const types = rule({ types: ["macvlan", "ip*"] });
const masters = rule({ masters: ["eth1", "br-*"] });

describe("checkDefinition()", () => {
  test.each<[string, NadRule[] | undefined, Definition]>([
    ["anything without rules", undefined, nad({ type: "host-device", device: "eth0" })],
    ["anything by a rule of namespaces alone", [rule({})], nad({ type: "x" }, { type: "y" })],
    ["a type", [types], nad(macvlan)],
    ["a type by its pattern, and no IPAM", [types], nad({ type: "ipvlan", ipam: {} })],
    ["an IPAM without a type", [types], nad({ type: "ipvlan", ipam: { type: "" } })],
    [
      "an IPAM that is named",
      [rule({ types: ["macvlan"], ipams: ["own"] })],
      nad({ type: "macvlan", ipam: { type: "own" } }),
    ],
    ["any IPAM where nothing limits programs", [masters], nad({ ...macvlan, ipam: { type: "x" } })],
    ["a device", [masters], nad(macvlan)],
    ["a bridge by pattern", [masters], nad({ type: "bridge", bridge: "br-7" })],
    ["the default bridge", [rule({ masters: ["cni0"] })], nad({ type: "bridge" })],
    ["plugins without device", [masters], nad({ type: "ptp" }, { type: "portmap" })],
    ["a config on disk", [rule({ configOnDisk: true })], { ...nad(macvlan), onDisk: true }],
    [
      "by the second of two rules",
      [rule({ namespaces: ["team"], types: ["ptp"] }), rule({ types: ["macvlan"] })],
      nad(macvlan),
    ],
    ["what a delegate is", [rule({ types: ["flannel", "bridge"] })], nad(delegating("bridge"))],
  ])("admits %s", (_, rules, definition) => {
    expect(checkDefinition(rules, "/p", definition).allowed).toBe(true);
  });

  function delegating(type: string, more: object = {}): Record<string, unknown> {
    return { type: "flannel", delegate: { type, ...more } };
  }

  test.each<[string, NadRule[], Definition, string]>([
    ["everything by no rule", [], nad(macvlan), 'no rule of access.nad names namespace "team"'],
    [
      "other namespaces",
      [rule({ namespaces: ["team-*"] })],
      nad(macvlan),
      'no rule of access.nad names namespace "team"',
    ],
    [
      "another type",
      [types],
      nad({ type: "bridge" }),
      'access.nad[0].types does not have its plugin "bridge"',
    ],
    [
      "another type further down the chain",
      [types],
      nad(macvlan, { type: "tuning" }),
      'access.nad[0].types does not have its plugin "tuning"',
    ],
    [
      "an IPAM that makes interfaces",
      [types],
      nad({ type: "macvlan", ipam: { type: "host-device" } }),
      'access.nad[0].ipams does not have "host-device", with which it gets addresses',
    ],
    [
      "an IPAM in the letters Go takes for the same",
      [types],
      nad({ ...macvlan, IPAM: { Type: "host-device" } }),
      'access.nad[0].ipams does not have "host-device", with which it gets addresses',
    ],
    [
      "an IPAM that is not of the list",
      [rule({ ipams: ["static"] })],
      nad(macvlan),
      'access.nad[0].ipams does not have "host-local", with which it gets addresses',
    ],
    [
      "an IPAM that is no text",
      [types],
      nad({ type: "macvlan", ipam: { type: 7 } }),
      'access.nad[0].ipams does not have "(number)", with which it gets addresses',
    ],
    [
      "a delegate of a delegate",
      [rule({ types: ["flannel"] })],
      nad(delegating("bridge")),
      'access.nad[0].types does not have its plugin "bridge"',
    ],
    [
      "a device of a delegate",
      [rule({ masters: ["eth1"] })],
      nad({ type: "ptp", delegate: { type: "macvlan", master: "eth0" } }),
      'access.nad[0].masters does not have device "eth0" of plugin "macvlan"',
    ],
    [
      "what is nested without end",
      [rule({ types: ["flannel", "bridge"] })],
      nad(nested(8)),
      'access.nad[0].types does not have its plugin "(nested too deep)"',
    ],
    [
      "another device",
      [masters],
      nad({ type: "ipvlan", master: "eth0" }),
      'access.nad[0].masters does not have device "eth0" of plugin "ipvlan"',
    ],
    [
      "a device that is left to the plugin",
      [masters],
      nad({ type: "macvlan" }),
      'access.nad[0].masters wants "master" of plugin "macvlan", which is absent',
    ],
    [
      "a second device in the letters Go takes for the same",
      [masters],
      nad({ ...macvlan, MASTER: "eth0" }),
      'access.nad[0].masters does not have device "eth0" of plugin "macvlan"',
    ],
    [
      "a second device in letters that Unicode folds",
      [masters],
      nad({ ...macvlan, "ma\u017fter": "eth0" }),
      'access.nad[0].masters does not have device "eth0" of plugin "macvlan"',
    ],
    [
      "a device that is no text",
      [masters],
      nad({ type: "macvlan", master: ["eth1"] }),
      'access.nad[0].masters does not have device "(object)" of plugin "macvlan"',
    ],
    [
      "the default bridge where it is not named",
      [masters],
      nad({ type: "bridge" }),
      'access.nad[0].masters does not have device "cni0" of plugin "bridge"',
    ],
    [
      "a device by its bus address",
      [masters],
      nad({ type: "host-device", device: "eth1", pciBusID: "0000:00:1f.6" }),
      'access.nad[0].masters cannot be held against "pcibusid" of plugin "host-device", which ' +
        "names a device",
    ],
    [
      "a device that the runtime would name",
      [masters],
      nad({ type: "host-device", device: "eth1", RuntimeConfig: { deviceID: "0000:00:1f.6" } }),
      'access.nad[0].masters cannot be held against "deviceid" of plugin "host-device", which ' +
        "names a device",
    ],
    [
      "a plugin whose device is not known",
      [masters],
      nad({ type: "sriov", master: "eth1" }),
      'access.nad[0].masters cannot be held against plugin "sriov": its device is not known',
    ],
    [
      "a plugin named like what every object has",
      [masters],
      nad({ type: "constructor" }),
      'access.nad[0].masters cannot be held against plugin "constructor": its device is not known',
    ],
    [
      "a config of its own",
      [rule({ configOnDisk: true })],
      nad(macvlan),
      "access.nad[0].config_on_disk wants its config on the node's disk, and it has a spec.config",
    ],
    [
      "by every rule for its namespace, each with its reason",
      [rule({ types: ["ptp"] }), rule({ namespaces: ["other"] }), rule({ masters: ["eth2"] })],
      nad(macvlan),
      'access.nad[0].types does not have its plugin "macvlan"; ' +
        'access.nad[2].masters does not have device "eth1" of plugin "macvlan"',
    ],
  ])("refuses %s", (_, rules, definition, reason) => {
    const decision = checkDefinition(rules, "/p", definition);
    expect([decision.allowed, decision.reason]).toEqual([false, reason]);
    expect(decision.rule).toMatch(/^access\.nad(\[\d\])? at \/p:\d/);
  });

  function nested(depth: number): Record<string, unknown> {
    return depth === 0 ? { type: "bridge" } : { type: "flannel", delegate: nested(depth - 1) };
  }

  test("names the rule that admits, and all that refuse", () => {
    const rules = [rule({ types: ["ptp"] }), rule({ namespaces: ["te*"], line: 9 })];
    expect(checkDefinition(rules, "/p", nad(macvlan))).toEqual({
      allowed: true,
      reason: 'access.nad[1].namespaces "te*" names it, and it keeps to that rule',
      rule: "access.nad[1] at /p:9",
    });
    const [first, second] = rules.map((one) => ({ ...one, types: ["dummy"] }));
    expect(checkDefinition([first, second] as NadRule[], "/p", nad(macvlan)).rule).toBe(
      "access.nad[0] at /p:3; access.nad[1] at /p:9",
    );
  });
});
