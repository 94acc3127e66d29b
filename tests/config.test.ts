/**
 * The plugin table: what is read (lib/config/schema.ts), what is refused and where
 * (lib/config/toml.ts
 * finds the lines); CNI-Genie's keys over it.
 */
import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { CniError } from "../lib/cni.ts";
import { withStdinConfig } from "../lib/config/foreign_config.ts";
import { defaultConfig, parseConfig, parseTopLevel } from "../lib/config/parse.ts";
import type { Config } from "../lib/config/schema.ts";
import { parseDuration } from "../lib/config/usage.ts";
import { parseJson } from "../lib/json.ts";

const file = "/etc/cni/genie/plugins.toml";

/** What a call throws, as the runtime sees it. */
function failure(act: () => unknown): { code: number; msg: string; details: string } {
  try {
    act();
  } catch (error) {
    if (error instanceof CniError) {
      return { code: error.code, msg: error.message, details: error.details };
    }
    throw error;
  }
  return { code: 0, msg: "it did not fail", details: "" };
}

const defaults: Config = {
  file: "",
  confDir: "/etc/cni/net.d",
  binDirs: ["/opt/cni/bin"],
  stateDir: "/var/lib/cni/genie",
  logLevel: "info",
  logFile: "",
  result: "merged",
  timeoutMs: 90_000,
  parallel: false,
  delRetryWindowMs: 600_000,
  default: { networks: [], always: [], systemNamespaces: ["kube-system"] },
  select: {
    weights: { occupancy: 4, response_time: 3, failures: 2, bandwidth: 1, subnets: 0 },
    attempts: 2,
  },
  kubernetes: {
    kubeconfig: "/etc/cni/genie/kubeconfig",
    kubeconfigIsExplicit: false,
    timeoutMs: 5000,
    namespaceIsolation: false,
    globalNamespaces: ["default"],
    status: "inline",
    kubeletDir: "/var/lib/kubelet",
  },
  access: { default: "allow" },
  policy: { enforce: false, maxAgeMs: 300_000, whenStale: "closed", where: "pod" },
  agent: { listen: "127.0.0.1:9477", report: false, followAnnotations: false },
  audit: { keepMs: 2_592_000_000 },
  plugins: new Map(),
};

/** Every key, none at its default; also the grammar that TOML allows for them. */
const full = `
conf_dir  = "/c"
bin_dirs  = [
  "/b",  # one
  '/d',
]
state_dir = '/s'
log_level = "debug"
log_file  = "/var/log/genie.log"
result    = "primary"
timeout   = "2m"
parallel  = true
del_retry_window = "1h"
default = { networks = ["calico", "weave@eth4"], always = ["audit"], system_namespaces = [] }
select.candidates = ["flannel"]
select.weights.subnets = 0.5
kubernetes.kubeconfig = "/k"
kubernetes.timeout = "250ms"
kubernetes.namespace_isolation = true
kubernetes.global_namespaces = ["shared"]
kubernetes.status = "agent"
access.default = "deny"
audit.keep = "7d"
agent = { listen = "[::1]:80", report = true, cri_socket = "/c.sock", follow_annotations = true }
policy = { enforce = true, max_age = "90s", when_stale = "open", where = "host" }

[plugins.calico]
conf = "10-calico.conflist"

[plugins.storage.config]
cniVersion = "1.0.0"
toString = 1
[[plugins.storage.config.plugins]]
type = "macvlan"
id = 9223372036854775807

[plugins.storage]
deny = { pods = ["a/web-?"] }
allow.namespaces = ["team-*"]
allow.service_accounts = ["team-a/db"]
timeout = "30s"
capacity = 4000
enforce_policy = true
`;

describe("parseConfig()", () => {
  test("reads nothing as the defaults", () => {
    expect(defaultConfig()).toEqual(defaults);
    expect(parseConfig("\ufeff# empty\r\n", file)).toEqual({ ...defaults, file });
  });

  test("reads the shipped plugins.toml as the defaults", () => {
    const text = readFileSync(new URL("../plugins.toml", import.meta.url), "utf8");
    expect(parseConfig(text, file)).toEqual({ ...defaults, file });
  });

  test("reads the examples of the shipped plugins.toml", () => {
    const text = readFileSync(new URL("../plugins.toml", import.meta.url), "utf8");
    const examples = text.replace(/^# (?=\S+ *= |\[)/gm, "");
    const config = parseConfig(examples, file);
    expect([...config.plugins.keys()]).toEqual(["calico", "storage"]);
    expect(config.plugins.get("storage")?.config).toEqual({
      cniVersion: "1.0.0",
      plugins: [
        {
          type: "macvlan",
          master: "eth1",
          ipam: { type: "host-local", subnet: "10.20.0.0/20" },
        },
      ],
    });
  });

  test("reads every key", () => {
    const config = parseConfig(full, file);
    expect(config).toEqual({
      file,
      confDir: "/c",
      binDirs: ["/b", "/d"],
      stateDir: "/s",
      logLevel: "debug",
      logFile: "/var/log/genie.log",
      result: "primary",
      timeoutMs: 120_000,
      parallel: true,
      delRetryWindowMs: 3_600_000,
      default: { networks: ["calico", "weave@eth4"], always: ["audit"], systemNamespaces: [] },
      select: {
        candidates: ["flannel"],
        weights: { occupancy: 4, response_time: 3, failures: 2, bandwidth: 1, subnets: 0.5 },
        attempts: 2,
      },
      kubernetes: {
        kubeconfig: "/k",
        kubeconfigIsExplicit: true,
        timeoutMs: 250,
        namespaceIsolation: true,
        isolationLine: 19,
        globalNamespaces: ["shared"],
        status: "agent",
        kubeletDir: "/var/lib/kubelet",
      },
      access: { default: "deny", line: 22 },
      agent: {
        listen: "[::1]:80",
        report: true,
        criSocket: "/c.sock",
        followAnnotations: true,
      },
      audit: { keepMs: 604_800_000 },
      policy: { enforce: true, maxAgeMs: 90_000, whenStale: "open", where: "host" },
      plugins: new Map([
        ["calico", { name: "calico", conf: "10-calico.conflist", line: 27 }],
        [
          "storage",
          {
            name: "storage",
            config: {
              cniVersion: "1.0.0",
              toString: 1,
              plugins: [{ type: "macvlan", id: parseJson("9223372036854775807", "") }],
            },
            deny: { namespaces: [], serviceAccounts: [], pods: ["a/web-?"], line: 38 },
            allow: { namespaces: ["team-*"], serviceAccounts: ["team-a/db"], pods: [], line: 39 },
            timeoutMs: 30_000,
            capacity: 4000,
            enforcePolicy: true,
            line: 37,
          },
        ],
      ]),
    });
    expect(JSON.stringify(config.plugins.get("storage")?.config)).toContain(
      '"id":9223372036854775807',
    );
  });

  test("reads the rules of access, each with its line", () => {
    const inline = `[access]
nad = [
  { namespaces = ["*"], types = ["macvlan"], masters = ["eth?"], config_on_disk = true },
  { namespaces = ["infra"] },
]
max_attachments = { pod = 4 }`;
    const free = { namespaces: ["infra"], configOnDisk: false };
    const bound = { namespaces: ["*"], types: ["macvlan"], masters: ["eth?"], configOnDisk: true };
    expect(parseConfig(inline, file).access).toEqual({
      default: "allow",
      nad: [
        { ...bound, line: 2 },
        { ...free, line: 2 },
      ],
      maxAttachments: { pod: 4, line: 6 },
    });
    const headers = `access.max_attachments.namespace = 9
[[access.nad]]
namespaces = ["*"]
types = ["macvlan"]
masters = ["eth?"]
config_on_disk = true
[[access.nad]]

namespaces = ["infra"]
ipams = ["host-local"]`;
    expect(parseConfig(headers, file).access).toEqual({
      default: "allow",
      nad: [
        { ...bound, line: 2 },
        { ...free, ipams: ["host-local"], line: 7 },
      ],
      maxAttachments: { namespace: 9, line: 1 },
    });
    expect(parseConfig("access.nad = []", file).access).toEqual({ default: "allow", nad: [] });
  });

  const rejects: [why: string, text: string, msg: string][] = [
    [
      "a rule for objects of no namespace",
      "[[access.nad]]\ntypes = ['macvlan']",
      'line 1: "access.nad[0].namespaces" is an empty list, expected a list with something in it',
    ],
    [
      "a rule that admits nothing, in its line",
      "[[access.nad]]\nnamespaces = ['a']\n[[access.nad]]\nnamespaces = ['b']\ntypes = []",
      'line 5: "access.nad[1].types" is an empty list, expected a list with something in it',
    ],
    [
      "a device that no kernel has",
      "access.nad = [{ namespaces = ['a'], masters = ['a/b'] }]",
      'line 1: "access.nad[0].masters[0]" is "a/b", expected the name of a device, ' +
        '"*" and "?" being wildcards',
    ],
    [
      "one rule instead of a list",
      "access.nad = { namespaces = ['a'] }",
      'line 1: "access.nad" is a table, expected a list',
    ],
    [
      "a quota of nothing",
      "access.max_attachments = { pod = 0 }",
      'line 1: "access.max_attachments.pod" is 0, expected 1 or more',
    ],
    ...["9477", "node:9477", "127.0.0.1", "127.0.0.1:65536", "::1:80"].map(
      (value): [string, string, string] => [
        `to listen at "${value}"`,
        `agent.listen = "${value}"`,
        `line 1: "agent.listen" is "${value}", expected an address and a port such as ` +
          '"127.0.0.1:9477", or ""',
      ],
    ),
    [
      "a quota of something unknown",
      "access.max_attachments = { node = 3 }",
      'line 1: "access.max_attachments.node" is not a known key, did you mean "pod"',
    ],
    // Where
    ["an unknown key", "a = 1", 'line 1: "a" is not a known key'],
    [
      "a misspelt key",
      "\r\n\r\n[default]\r\nnetwork = []",
      'line 4: "default.network" is not a known key, did you mean "networks"',
    ],
    [
      "a key in camel case",
      'confDir = "/c"',
      'line 1: "confDir" is not a known key, did you mean "conf_dir"',
    ],
    [
      "a top-level key below a table",
      '[audit]\nlog_file = ""',
      'line 2: "audit.log_file" is not a known key: it belongs above the first [table]',
    ],
    ["a name every object has", "toString = 1", 'line 1: "toString" is not a known key'],
    [
      "an unknown table",
      "[plugin.a]\nconf = 'x'",
      'line 1: "plugin" is not a known key, did you mean "plugins"',
    ],
    [
      "a key after a multi-line string that looks like it",
      'conf_dir = """/\\\n  result = 1\\\n  """\n[x]\n',
      'line 4: "x" is not a known key',
    ],
    // TOML
    ["broken TOML", "a = [1,", "line 1: not valid TOML at column 5: unfinished array"],
    [
      "a key twice",
      'timeout = "1s"\ntimeout = "2s"',
      "line 2: not valid TOML at column 1: trying to redefine an already defined table or value",
    ],
    [
      "a key that could change every object",
      "\n__proto__.parallel = true",
      "line 2: not valid TOML at column 1: document contains an unsafe property",
    ],
    ["too much", `#${" ".repeat(1024 * 1024)}`, "line 1: it is longer than 1048576 characters"],
    // Values
    ["a list for a table", "default = []", 'line 1: "default" is an empty list, expected a table'],
    ["a date for a table", "audit = 2026-01-01", 'line 1: "audit" is a date, expected a table'],
    ["a list for plugins", "plugins = []", 'line 1: "plugins" is an empty list, expected a table'],
    ["a string for a list", 'bin_dirs = "/b"', 'line 1: "bin_dirs" is "/b", expected a list'],
    [
      "a relative path",
      'bin_dirs = ["/b", "c"]',
      'line 1: "bin_dirs[1]" is "c", expected an absolute path',
    ],
    ["an empty path", 'state_dir = ""', 'line 1: "state_dir" is "", expected an absolute path'],
    [
      "a path of two lines",
      'log_file = "/a\\nb"',
      'line 1: "log_file" is "/a b", expected an absolute path, or ""',
    ],
    [
      "a level of another program",
      'log_level = "warning"',
      'line 1: "log_level" is "warning", expected "debug" or "info" or "warn" or "error"',
    ],
    ["a string for a boolean", 'parallel = "no"', '"parallel" is "no", expected true or false'],
    [
      "a negative weight",
      "select.weights.failures = -1",
      '"select.weights.failures" is -1, expected 0 or more',
    ],
    [
      "an endless weight",
      "select.weights.failures = inf",
      '"select.weights.failures" is Infinity, expected a number',
    ],
    [
      "an unknown KPI",
      "[select.weights]\nlatency = 1",
      'line 2: "select.weights.latency" is not a known key',
    ],
    [
      "a bad network name",
      'default.networks = ["a/b"]',
      '"default.networks[0]" is "a/b", expected the name of a network, or "name@interface"',
    ],
    [
      "a bad interface name",
      'default.always = ["a@b@c"]',
      '"default.always[0]" is "a@b@c", expected the name of a network, or "namespace/name" of an ' +
        "object",
    ],
    [
      "an interface for a candidate",
      'select.candidates = ["a@eth1"]',
      '"select.candidates[0]" is "a@eth1", expected the name of a network',
    ],
    // Networks
    [
      "a plugin name with a space",
      "[plugins]\n'a b' = {}",
      'line 2: "plugins.a b" is "a b", expected the name of a network',
    ],
    [
      "conf and config",
      "[plugins.a]\nconf = 'x'\nconfig = {}",
      'line 3: "plugins.a.config" excludes "conf"',
    ],
    [
      "a conf that is a relative path",
      "plugins.a.conf = '../x'",
      'line 1: "plugins.a.conf" is "../x", expected a file name or an absolute path',
    ],
    [
      "a date in a config list",
      "[plugins.a.config]\n[[plugins.a.config.plugins]]\nsince = 2026-01-01",
      'line 3: "plugins.a.config.plugins[0].since" is a date, expected a string: JSON has no dates',
    ],
    [
      "an endless number in a config list",
      "[plugins.a.config]\nx = [nan]",
      'line 2: "plugins.a.config.x[0]" is NaN',
    ],
    [
      "inputs that are never stale",
      'policy.max_age = "2d"',
      '"policy.max_age" is "2d", expected a duration such as "90s", "5m" or "1h", ' +
        'more than 0 and at most "1d"',
    ],
    [
      "another end",
      'policy.where = "node"',
      'line 1: "policy.where" is "node", expected "pod" or "host"',
    ],
    ["no capacity", "plugins.a.capacity = 0", '"plugins.a.capacity" is 0, expected 1 or more'],
    [
      "a service account without namespace",
      "[plugins.a]\nallow = { service_accounts = ['db'] }",
      'line 2: "plugins.a.allow.service_accounts[0]" is "db", expected "namespace/name", ' +
        '"*" and "?" being wildcards',
    ],
    [
      "a pattern that matches no namespace",
      "[plugins.a.deny]\nnamespaces = ['team_*']",
      'line 2: "plugins.a.deny.namespaces[0]" is "team_*", expected a namespace, ' +
        '"*" and "?" being wildcards',
    ],
  ];
  test.each(rejects)("refuses %s", (_, text, msg) => {
    const error = failure(() => parseConfig(text, file));
    const line = msg.startsWith("line ") ? "" : "line 1: ";
    expect(error).toEqual({
      code: 7,
      msg: `Invalid plugin table "${file}" ${line}${msg}`,
      details: "",
    });
  });

  test("refuses nesting that would exhaust the stack", () => {
    const deep = `[plugins.a.config${".b".repeat(100_000)}]`;
    expect(failure(() => parseConfig(deep, file)).msg).toEndWith("is deeper than 64 levels");
  });

  test("names all problems, the first line first", () => {
    const text = '[plugins.a]\ncapacity = "x"\n[plugins.b]\ntimout = "1s"\n[audit]\nkeep = 1';
    expect(failure(() => parseConfig(text, "/p"))).toEqual({
      code: 7,
      msg: 'Invalid plugin table "/p" line 2: "plugins.a.capacity" is "x", expected a whole number',
      details:
        'line 4: "plugins.b.timout" is not a known key, did you mean "timeout"\n' +
        'line 6: "audit.keep" is 1, expected a duration such as "90s", "5m" or "1h", ' +
        'more than 0 and at most "3650d"',
    });
  });

  test("never quotes the table of a syntax error", () => {
    const error = failure(() => parseConfig('[plugins.a.config]\npassword = "s3cret" x', file));
    expect(JSON.stringify(error)).not.toContain("s3cret");
  });
});

test.each([
  ["250ms", 250],
  ["90s", 90_000],
  ["5m", 300_000],
  ["1h", 3_600_000],
  ["30d", 2_592_000_000],
  ["0s", undefined],
  ["", undefined],
  ["90", undefined],
  ["-1s", undefined],
  ["1.5h", undefined],
  ["1h30m", undefined],
  ["1 s", undefined],
  ["1S", undefined],
  ["9999999999s", undefined],
])("parseDuration(%p)", (text, ms) => {
  expect(parseDuration(text)).toBe(ms);
});

/** The part of a config that DEL needs. */
function topLevelOf({ stateDir, logLevel, logFile, delRetryWindowMs }: Config) {
  return { stateDir, logLevel, logFile, delRetryWindowMs };
}

describe("parseTopLevel()", () => {
  test.each([
    ["nothing", "", {}],
    ["a byte order mark and CRLF", '\ufeffstate_dir = "/s"\r\n', { stateDir: "/s" }],
    ["a comment", "log_file = '/l' # \"x\"", { logFile: "/l" }],
    ["no spaces", 'log_level="warn"', { logLevel: "warn" }],
    ["a quoted key", "'state_dir' = '/s'", { stateDir: "/s" }],
    ["escapes", '"state\\u005Fdir" = "/a\\"\\\\\\x62"', { stateDir: '/a"\\b' }],
    ["a string of more lines", "state_dir = '''\n/s'''", { stateDir: "/s" }],
    ["a key of a table", '[default]\nstate_dir = "/s"', {}],
    ["a dotted key", 'x.state_dir = "/s"', {}],
    ["a key within a string", "x = '''\nstate_dir = \"/s\"\n'''\n", {}],
    ["a key within an inline table", 'x = { state_dir = "/s" }', {}],
    ["a relative path", 'state_dir = "s"\nlog_file = "/l"', { logFile: "/l" }],
    ["a wrong type", "log_level = 1\nstate_dir = ['/s']", {}],
    ["the first of two", "state_dir = '/1'\nstate_dir = '/2'", { stateDir: "/1" }],
    ["text after the value", "state_dir = '/s' x", {}],
    ["what follows a missing bracket", "bin_dirs = ['/b'\nstate_dir = '/s'", { stateDir: "/s" }],
    ["what follows a missing quote", "conf_dir = \"/c\nstate_dir = '/s'", { stateDir: "/s" }],
    ["what follows nonsense", "}]] = =\n\n= 1\nstate_dir = '/s'", { stateDir: "/s" }],
    ["no table below a missing bracket", "x = [\n[y]\nstate_dir = '/s'", {}],
    ["a bad retry window", "del_retry_window = '8d'", {}],
    ["a retry window", "del_retry_window = '7d'", { delRetryWindowMs: 604_800_000 }],
  ] as [string, string, object][])("reads %s", (_, text, expected) => {
    expect(parseTopLevel(text)).toEqual(expected);
  });

  test("agrees with parseConfig() on every valid table", () => {
    let seed = 1;
    const pick = <T>(...items: [T, ...T[]]): T => {
      seed = (seed * 48271) % 2147483647;
      return items[seed % items.length] ?? items[0];
    };
    const string = (value: string) =>
      pick(
        `"${value}"`,
        `'${value}'`,
        `"""${value}"""`,
        `'''\n${value}'''`,
        `"""\\\n  ${value}"""`,
      );
    const pair = (key: string, value: string) =>
      `${pick("", " ", "\t")}${pick(key, `"${key}"`, `'${key}'`)}${pick("=", " = ")}${value}`;
    for (let round = 0; round < 2000; round++) {
      const lines = [
        pair("state_dir", string(pick("/s", "/s#x", "/[default]", "/ü"))),
        pair("log_level", string(pick("debug", "warn"))),
        pair("log_file", string(pick("/l", "/log_level = x"))),
        pair("del_retry_window", string(pick("1m", "2d"))),
        pair("bin_dirs", pick("[]", '["/x", ]', "[ # [\n'/]',\n\"/[\"\n]")),
        pick("kubernetes.kubeconfig = '/k'", "default = { networks = [] }", "# state_dir = '/no'"),
        pick(
          "plugins.a.config.x = [\n[1],\n{ state_dir = '/no' }\n]",
          "plugins.a.config.x = '''\nlog_file = '/no'\n'''",
          "",
        ),
      ].filter(() => pick(true, true, false));
      for (let i = lines.length - 1; i > 0; i--) lines.unshift(...lines.splice(pick(0, i), 1));
      const head = lines.map((line) => `${line}${pick("", " # it's", ' # "')}\n`).join("");
      const end = pick("", "[audit]\nkeep = '1d'\n", "[plugins.b.config]\nlog_file = '/no'\n");
      const text = pick("", "\ufeff") + pick(head + end, (head + end).replaceAll("\n", "\r\n"));
      const expected = topLevelOf(parseConfig(text, file));
      expect({ text, ...topLevelOf(defaults), ...parseTopLevel(text) }).toEqual({
        text,
        ...expected,
      });
      // A table that became invalid further down says the same.
      expect(parseTopLevel(`${text}\n[broken`)).toEqual(parseTopLevel(text));
    }
  });

  test("ends on hostile text", () => {
    for (const part of ['a = """', "a = '''", 'a = "\\', "a = [", "a = {", "{ a = ", '"', "'\n"]) {
      expect(parseTopLevel(part.repeat(20_000))).toEqual({});
    }
  });
});

describe("withStdinConfig()", () => {
  const stdin = { name: "k8s-pod-network", type: "genie" };
  const accepts: [what: string, keys: object, changed: object][] = [
    ["nothing", {}, {}],
    [
      "the config CNI-Genie installs",
      {
        log_level: "info",
        datastore_type: "kubernetes",
        hostname: "node1",
        policy: { type: "k8s", k8s_auth_token: "t0ken" },
        kubernetes: {
          k8s_api_root: "https://10.96.0.1:443",
          kubeconfig: "/etc/cni/net.d/genie-kubeconfig",
        },
        romana_root: "http://10.96.0.99:9600",
        segment_label_name: "romanaSegment",
        etcd_endpoints: 1,
        cAdvisor_address: [],
      },
      {
        kubernetes: {
          ...defaults.kubernetes,
          kubeconfig: "/etc/cni/net.d/genie-kubeconfig",
          kubeconfigIsExplicit: true,
          apiRoot: "https://10.96.0.1:443",
          authToken: "t0ken",
        },
      },
    ],
    [
      "every key of policy",
      {
        policy: {
          k8s_api_root: "https://[fd00::1]:6443/api/v1/",
          k8s_client_certificate: "/c.pem",
          k8s_client_key: "/k.pem",
          k8s_certificate_authority: "/ca.pem",
        },
      },
      {
        kubernetes: {
          ...defaults.kubernetes,
          apiRoot: "https://[fd00::1]:6443",
          clientCertificate: "/c.pem",
          clientKey: "/k.pem",
          certificateAuthority: "/ca.pem",
        },
      },
    ],
    [
      "kubernetes before policy",
      { kubernetes: { k8s_api_root: "https://a/" }, policy: { k8s_api_root: "https://b" } },
      { kubernetes: { ...defaults.kubernetes, apiRoot: "https://a" } },
    ],
    [
      "empty and null as absent",
      { log_level: "", default_plugin: " ", policy: null, kubernetes: { kubeconfig: null } },
      {},
    ],
    [
      "a list of networks",
      { default_plugin: " weave , calico@eth1" },
      { default: { ...defaults.default, networks: ["weave", "calico@eth1"] } },
    ],
    ["a level in upper case", { log_level: "DEBUG" }, { logLevel: "debug" }],
    ["trace", { log_level: "trace" }, { logLevel: "debug" }],
    ["Warning", { log_level: "Warning" }, { logLevel: "warn" }],
    ["fatal", { log_level: "fatal" }, { logLevel: "error" }],
    ["panic", { log_level: "panic" }, { logLevel: "error" }],
  ];
  test.each(accepts)("takes %s", (_, keys, changed) => {
    const config = withStdinConfig(defaultConfig(), { ...stdin, ...keys });
    expect(config).toEqual({ ...defaults, ...changed });
  });

  test("wins over the table", () => {
    const keys = { log_level: "error", default_plugin: "weave", kubernetes: { kubeconfig: "/x" } };
    const table = parseConfig(full, file);
    expect(withStdinConfig(table, { ...stdin, ...keys })).toEqual({
      ...table,
      logLevel: "error",
      default: { ...table.default, networks: ["weave"] },
      kubernetes: { ...table.kubernetes, kubeconfig: "/x" },
    });
  });

  const url = 'a URL such as "https://10.96.0.1:443"';
  const names = 'a list of networks such as "weave,calico"';
  const rejects: [keys: object, msg: string][] = [
    [{ kubernetes: "x" }, '"kubernetes" is not an object'],
    [{ policy: [] }, '"policy" is not an object'],
    [{ kubernetes: { kubeconfig: 1 } }, '"kubernetes.kubeconfig" is not an absolute path'],
    [{ kubernetes: { kubeconfig: "k" } }, '"kubernetes.kubeconfig" is not an absolute path'],
    [{ kubernetes: { k8s_api_root: "10.0.0.1" } }, `"kubernetes.k8s_api_root" is not ${url}`],
    [{ policy: { k8s_api_root: "https://__A__:__B__" } }, `"policy.k8s_api_root" is not ${url}`],
    [{ policy: { k8s_api_root: "https://u:s3cret@h" } }, `"policy.k8s_api_root" is not ${url}`],
    [{ policy: { k8s_auth_token: ["s3cret"] } }, '"policy.k8s_auth_token" is not a string'],
    [{ policy: { k8s_client_key: "s3cret" } }, '"policy.k8s_client_key" is not an absolute path'],
    [{ default_plugin: ["weave"] }, `"default_plugin" is not ${names}`],
    [{ default_plugin: "weave,,calico" }, `"default_plugin" is not ${names}`],
    [{ default_plugin: "weave," }, `"default_plugin" is not ${names}`],
    [{ default_plugin: "../weave" }, `"default_plugin" is not ${names}`],
    [
      { log_level: "loud" },
      '"log_level" is not one of debug, info, warn, error, trace, notice, warning, critical, ' +
        "fatal, panic",
    ],
  ];
  test.each(rejects)("refuses %j", (keys, msg) => {
    expect(failure(() => withStdinConfig(defaults, { ...stdin, ...keys }))).toEqual({
      code: 7,
      msg: `Invalid network config: ${msg}`,
      details: "",
    });
  });
});
