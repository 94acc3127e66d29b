/**
 * lib/policy/admission.ts: the policies say what the node says. Their CEL is evaluated
 * (@bufbuild/cel,
 * with `findAll` as Kubernetes has it) against the same pods and objects as the gate's own
 * functions.
 */
import { describe, expect, test } from "bun:test";
import {
  type CelInput,
  CelScalar,
  celEnv,
  celMethod,
  isCelError,
  listType,
  parse,
  plan,
} from "@bufbuild/cel";
import { strings } from "@bufbuild/cel/ext";
import type { KubeObject } from "../lib/cluster/yaml.ts";
import { CniError } from "../lib/cni.ts";
import { parseConfig } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import type { Pod } from "../lib/pod.ts";
import { checkIsolation } from "../lib/policy/access.ts";
import { checkAccess, checkDefinition } from "../lib/policy/access_rules.ts";
import { compileAccess } from "../lib/policy/admission.ts";
import { selectWanted } from "../lib/selection.ts";

const networksKey = "k8s.v1.cni.cncf.io/networks";
const defaultKey = "v1.multus-cni.io/default-network";

/** Of Kubernetes' own library; our expressions mean the same in RE2 and here. */
const findAll = celMethod(
  "findAll",
  CelScalar.STRING,
  [CelScalar.STRING],
  listType(CelScalar.STRING),
  function (pattern) {
    return [...this.matchAll(new RegExp(pattern, "g"))].map(([found]) => found);
  },
);
const funcs = [...strings, findAll];

type Json = Record<string, unknown>;
interface Spec {
  matchConditions: { expression: string }[];
  variables: { name: string; expression: string }[];
  validations: { expression: string; message: string }[];
}

const env = celEnv({ funcs });
/** Expressions as they were planned: parsing one is what takes its time. */
const planned = new Map<string, ReturnType<typeof plan>>();
function evaluate(expression: string, bindings: Json): unknown {
  const program = planned.get(expression) ?? plan(env, parse(expression));
  planned.set(expression, program);
  const value = program(bindings as Record<string, CelInput>);
  if (isCelError(value)) throw new Error(`${expression}: ${value.message}`, { cause: value });
  return value;
}

/** What the API server would answer: the messages of a refusal, none where it is let through. */
function admit(
  policies: KubeObject[],
  name: string,
  object: Json,
  { oldObject = null, namespace = "team" }: { oldObject?: Json | null; namespace?: string } = {},
): string[] {
  const found = policies.find(
    ({ kind, metadata }) => kind === "ValidatingAdmissionPolicy" && metadata.name === name,
  );
  if (!found) return [];
  const { matchConditions, variables, validations } = found["spec"] as Spec;
  const operation = oldObject ? "UPDATE" : "CREATE";
  const bindings: Json = { object, oldObject, request: { operation, namespace } };
  const matches = matchConditions.every(({ expression }) => evaluate(expression, bindings));
  if (!matches) return [];
  const known: Json = {};
  for (const { name: variable, expression } of variables) {
    known[variable] = evaluate(expression, { ...bindings, variables: known });
  }
  return validations
    .filter(({ expression }) => evaluate(expression, { ...bindings, variables: known }) !== true)
    .map(({ message }) => message);
}

interface Who {
  namespace: string;
  name: string;
  account: string;
  annotations: Record<string, string>;
}
const podOf = ({ namespace, name, account, annotations }: Who): Json => ({
  metadata: { namespace, name, annotations },
  spec: { serviceAccountName: account },
});

/** What the node says of what the pod alone tells: "denied", "allowed", or that it is malformed. */
async function nodeSays(config: Config, who: Who): Promise<"denied" | "allowed" | "malformed"> {
  const pod: Pod = {
    namespace: who.namespace,
    name: who.name,
    uid: "",
    serviceAccount: who.account,
    annotations: new Map(Object.entries(who.annotations)),
    source: "runtime",
  };
  try {
    const { primarySet, further } = await selectWanted(config, pod);
    for (const one of [...primarySet, ...further]) {
      if (one.from === "definition") checkIsolation(config, one, pod);
      if (one.from !== "node") continue;
      if (!checkAccess(config, one.network, pod).allowed) return "denied";
    }
    return "allowed";
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    return error.rule === "" ? "malformed" : "denied";
  }
}

const table = `
[default]
networks = ["blue", "green@eth4"]
always = ["audit", "infra/nad"]
[plugins.blue]
[plugins.green]
allow = { namespaces = ["team-*", "ops"], service_accounts = ["batch/load-?"], pods = ["dev/*-db"] }
deny = { namespaces = ["team-x"], pods = ["team-a/web-*"] }
[plugins.audit]
deny = { service_accounts = ["*/root"] }
[plugins.shut]
allow = {}
[plugins."dotted.name"]
allow = { namespaces = ["a.b"] }
`;
const isolated = `kubernetes.namespace_isolation = true
kubernetes.global_namespaces = ["default", "shared"]
`;
const who = (annotations: Record<string, string>, more: Partial<Who> = {}): Who => ({
  namespace: "team-a",
  name: "p",
  account: "default",
  annotations,
  ...more,
});

describe("compileAccess() for pods says what the node says", () => {
  const open = parseConfig(table, "/p.toml");
  const closed = parseConfig(`access.default = "deny"\n${isolated}${table}`, "/p.toml");

  test.each<[string, Config, Who, boolean]>([
    ["by namespace", open, who({ cni: "green" }), true],
    ["with an interface and white space", open, who({ cni: " green @eth1, blue" }), true],
    [
      "a pod that an allow rule does not name",
      open,
      who({ cni: "green" }, { namespace: "x" }),
      false,
    ],
    ["as the second", open, who({ cni: "blue,green@eth1" }, { namespace: "x" }), false],
    ["by deny", open, who({ cni: "green" }, { namespace: "team-x" }), false],
    ["by the pod's name", open, who({ cni: "green" }, { name: "web-1" }), false],
    ["by pod", open, who({ cni: "green" }, { namespace: "dev", name: "a-db" }), true],
    ["not by its end", open, who({ cni: "green" }, { namespace: "dev", name: "a-db-2" }), false],
    ["by account", open, who({ cni: "green" }, { namespace: "batch", account: "load-1" }), true],
    [
      "not by two letters",
      open,
      who({ cni: "green" }, { namespace: "batch", account: "load-12" }),
      false,
    ],
    ["the default networks", open, who({}, { namespace: "x" }), false],
    ["what every pod gets", open, who({ cni: "blue" }, { account: "root" }), false],
    [
      "but not those of the system",
      open,
      who({ cni: "blue" }, { account: "root", namespace: "kube-system" }),
      true,
    ],
    ["an empty rule", open, who({ cni: "shut" }), false],
    ["a dot that is no wildcard", open, who({ cni: "dotted.name" }, { namespace: "axb" }), false],
    ["a name with a dot", open, who({ cni: "dotted.name" }, { namespace: "a.b" }), true],
    ["a name that ends like one", open, who({ cni: "evergreen" }, { namespace: "x" }), true],
    ["an automatic choice, which the node makes", open, who({ cni: "" }, { namespace: "x" }), true],
    [
      "logical networks, which the node knows",
      open,
      who({ cni: " ", networks: "n" }, { namespace: "x" }),
      true,
    ],
    [
      "a default network in place of cni",
      open,
      who({ cni: "green", [defaultKey]: "a" }, { namespace: "x" }),
      true,
    ],
    [
      "a default network that is blank",
      open,
      who({ cni: "green", [defaultKey]: " " }, { namespace: "x" }),
      false,
    ],
    ["a network without entry on a closed node", closed, who({ cni: "other" }), false],
    ["own objects", closed, who({ cni: "", [networksKey]: "a,team-a/b@eth1" }), false],
  ])("%s", async (_, config, pod, isAllowed) => {
    const policies = compileAccess(config);
    const refused = admit(policies, "genie-pods", podOf(pod), { namespace: pod.namespace });
    expect([refused.length === 0, await nodeSays(config, pod)]).toEqual([
      isAllowed,
      isAllowed ? "allowed" : "denied",
    ]);
  });

  const isolation = parseConfig(isolated, "/p.toml");
  test.each<[string, boolean]>([
    ["a", true],
    ["team-a/a", true],
    ["shared/a@net1, a", true],
    ["other/a", false],
    ["a, other/a", false],
    [" other / a", false],
    ['[{"name":"a"}]', true],
    ['[{"name":"a","namespace":""}]', true],
    ['{"name":"a","namespace":"shared"}', true],
    ['[{"name":"a"},{"name":"b","namespace" :\n"other"}]', false],
    ['  [{"namespace":"xshared","name":"a"}]', false],
    ['[{"name":"a","n\\u0061mespace":"other"}]', false],
    ['[{"name":"a","namespace":"oth\\u0065r"}]', false],
  ])("isolation: %p", async (text, isAllowed) => {
    for (const key of [networksKey, defaultKey]) {
      if (key === defaultKey && text.includes(",") && !text.includes('":"')) continue;
      const pod = who({ cni: key === networksKey ? "blue" : "", [key]: text });
      const refused = admit(compileAccess(isolation), "genie-pods", podOf(pod), {
        namespace: "team-a",
      });
      const said = await nodeSays(isolation, pod);
      expect([refused.length === 0, said === "denied"]).toEqual([
        isAllowed,
        said === "malformed" ? false : !isAllowed,
      ]);
    }
  });

  test("any pods and rules", async () => {
    let seed = 7;
    const random = (n: number) => {
      seed = (Math.imul(seed, 1_103_515_245) + 12_345) >>> 0;
      return (seed >>> 8) % n;
    };
    const pick = <T>(...items: T[]): T => items[random(items.length)] as T;
    const some = <T>(make: () => T) => Array.from({ length: random(3) }, make);
    const part = () => pick("a", "b", "ab", "a.b", "*", "a*", "*b", "?", "a?", "a*b", "**");
    const ruleText = () =>
      `{ namespaces = ${JSON.stringify(some(part))}, ` +
      `pods = ${JSON.stringify(some(() => `${part()}/${part()}`))}, ` +
      `service_accounts = ${JSON.stringify(some(() => `${part()}/${part()}`))} }`;
    const seen = { denied: 0, allowed: 0, malformed: 0 };
    for (let round = 0; round < 80; round++) {
      const entries = ["x", "y", "z"].map(
        (name) =>
          `[plugins.${name}]\n${pick("", `allow = ${ruleText()}\n`)}` +
          pick("", `deny = ${ruleText()}\n`),
      );
      const config = parseConfig(
        `access.default = "${pick("allow", "deny")}"\n` +
          `kubernetes.namespace_isolation = ${pick(true, false)}\n` +
          `[default]\nnetworks = ${JSON.stringify([pick("x", "y@e1")])}\n` +
          `always = ${JSON.stringify(some(() => pick("z", "x")))}\n` +
          `system_namespaces = ${JSON.stringify(some(part).filter((one) => !/[*?]/.test(one)))}\n` +
          entries.join(""),
        "/p.toml",
      );
      const policies = compileAccess(config);
      const name = () => pick("a", "b", "ab", "a.b", "acb", "c", "axb");
      for (let n = 0; n < 16; n++) {
        const annotations: Record<string, string> = {
          ...pick({}, { cni: pick("", "x", "x,y", "z@e5 , x", "q", ",x", "x@", "@") }),
          ...pick(
            {},
            { [networksKey]: pick("n", "a/n", "b/n,n@i", '[{"name":"n","namespace":"a"}]') },
          ),
          ...pick({}, {}, { [defaultKey]: pick(" ", "n", "ab/n") }),
        };
        const pod = { namespace: name(), name: name(), account: name(), annotations };
        const refused = admit(policies, "genie-pods", podOf(pod), { namespace: pod.namespace });
        const said = await nodeSays(config, pod);
        seen[said]++;
        // What is malformed the node refuses in any case.
        if (said !== "malformed") {
          expect({ pod, isRefused: refused.length > 0 }).toEqual({
            pod,
            isRefused: said === "denied",
          });
        }
      }
    }
    for (const count of Object.values(seen)) expect(count).toBeGreaterThan(50);
  });
});

describe("when pods are judged", () => {
  const policies = compileAccess(parseConfig(table, "/p.toml"));
  const denied = podOf(who({ cni: "shut" }));
  const as = (object: Json, oldObject: Json | null = null) =>
    admit(policies, "genie-pods", object, { oldObject });

  test("with the rule and its line", () => {
    expect(as(denied)).toEqual([
      'network "shut" is closed to this pod by plugins.shut.allow at /p.toml:12',
    ]);
  });
  test.each<[string, Json, Json | null, boolean]>([
    ["one that asks anew", denied, podOf(who({ cni: "blue" })), true],
    ["one that asks for the first time", denied, podOf(who({})), true],
    ["one that changes something else", { ...denied, status: {} }, denied, false],
    ["one on the host's network", { ...denied, spec: { hostNetwork: true } }, null, false],
    ["one not on it", { ...denied, spec: { hostNetwork: false } }, null, true],
    ["one without annotations", { metadata: { name: "p" }, spec: {} }, null, true],
  ])("%s", (_, object, oldObject, isRefused) => {
    expect(as(object, oldObject).length > 0).toBe(isRefused);
  });
});

describe("compileAccess() for objects", () => {
  const rules = `[[access.nad]]
namespaces = ["team-*"]
types = ["macvlan", "br*"]
masters = ["eth1", "br-?"]
[[access.nad]]
namespaces = ["infra"]
config_on_disk = true
[[access.nad]]
namespaces = ["free"]
`;
  const config = parseConfig(rules, "/p.toml");
  const local = { type: "host-local" };
  const macvlan = { type: "macvlan", master: "eth1", ipam: local };
  test.each<[string, string, object[] | undefined, boolean]>([
    ["a type and a device", "team-a", [macvlan], true],
    ["another type", "team-a", [{ type: "ptp" }], false],
    ["another type in the chain", "team-a", [macvlan, { type: "tuning" }], false],
    ["another device", "team-a", [{ ...macvlan, master: "eth0" }], false],
    ["a bridge", "team-a", [{ type: "bridge", bridge: "br-1", ipam: local }], true],
    ["another bridge", "team-a", [{ type: "bridge", bridge: "cni0", ipam: local }], false],
    [
      "an IPAM that moves devices",
      "team-a",
      [{ ...macvlan, ipam: { type: "host-device" } }],
      false,
    ],
    ["a type of something else", "team-a", [{ ...macvlan, policy: { type: "k8s" } }], true],
    ["a config where it must be on disk", "infra", [macvlan], false],
    ["no config", "infra", undefined, true],
    ["anything", "free", [{ type: "ptp" }], true],
    ["a namespace that no rule names", "other", [macvlan], false],
  ])("%s", (_, namespace, plugins, isAllowed) => {
    const text = plugins && JSON.stringify({ cniVersion: "1.0.0", plugins }, null, 2);
    const object = { metadata: { namespace }, spec: text === undefined ? {} : { config: text } };
    const refused = admit(compileAccess(config), "genie-definitions", object, { namespace });
    const definition = {
      namespace,
      onDisk: text === undefined,
      plugins: (plugins ?? []) as Json[],
    };
    const said = checkDefinition(config.access.nad, "/p.toml", definition);
    expect([refused.length === 0, said.allowed]).toEqual([isAllowed, isAllowed]);
  });

  test("what the text does not show is left to the node", () => {
    const hidden = '{"type":"macvlan","m\\u0061ster":"eth0"}';
    const object = { metadata: {}, spec: { config: hidden } };
    const say = (one: Json, oldObject: Json | null = null) =>
      admit(compileAccess(config), "genie-definitions", one, { namespace: "team-a", oldObject });
    expect(say(object)).toEqual([]);
    const other = { metadata: {}, spec: { config: '{"type":"ptp"}' } };
    expect(say(other)).toEqual([
      "no rule of access.nad admits this object: access.nad[0] at /p.toml:1; " +
        "access.nad[1] at /p.toml:5; access.nad[2] at /p.toml:8",
    ]);
    expect(say({ ...other, metadata: { labels: {} } }, other)).toEqual([]);
  });

  test("an empty list closes every namespace; no list has no policy", () => {
    const closed = compileAccess(parseConfig("access.nad = []", "/p"));
    expect(admit(closed, "genie-definitions", { metadata: {}, spec: {} })).toHaveLength(1);
    expect(compileAccess(parseConfig("[plugins.a]", "/p"))).toEqual([]);
  });
});
