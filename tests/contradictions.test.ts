/** lib/node/validate.ts: rules that are valid alone and make no sense together. */
import { expect, test } from "bun:test";
import { parseConfig } from "../lib/config/parse.ts";
import { findContradictions } from "../lib/node/validate.ts";

const say = (table: string) =>
  findContradictions(parseConfig(table, "/p")).map(
    ({ network = "-", detail }) => `${network}: ${detail}`,
  );
const plugin = (allow: string, deny: string) =>
  `[plugins.a]\nallow = { ${allow} }\ndeny = { ${deny} }\n`;

test.each<[string, string]>([
  ["an empty table", ""],
  ["a deny of a part", plugin('namespaces = ["team-*"]', 'namespaces = ["team-x"]')],
  ["a deny of something else", plugin('namespaces = ["a"]', 'pods = ["a/*"]')],
  ["a deny that leaves one", plugin('namespaces = ["a"], pods = ["b/c"]', 'namespaces = ["a"]')],
  ["a wildcard of one letter", plugin('namespaces = ["*"]', 'namespaces = ["?"]')],
  ["a network that is closed on purpose", "[plugins.a]\nallow = {}"],
  ["a closed node with one open", 'access.default = "deny"\n[plugins.a]\nallow = {}'],
  ["a closed node with objects", 'access.default = "deny"\n[[access.nad]]\nnamespaces = ["a"]'],
  [
    "quotas that suffice",
    'default = { networks = ["a"], always = ["b"] }\n' +
      "access.max_attachments = { pod = 2, namespace = 2 }",
  ],
  [
    "masters of a known type",
    '[[access.nad]]\nnamespaces = ["a"]\ntypes = ["own", "mac*"]\nmasters = ["e"]',
  ],
])("nothing is said of %s", (_, table) => {
  expect(say(table)).toEqual([]);
});

const nobody = "/p:3 names all that plugins.a.allow at /p:2 opens it to: nobody may use it";
test.each<[string, string, string[]]>([
  [
    "a deny of the same",
    plugin('namespaces = ["b"]', 'namespaces = ["b"]'),
    [`a: plugins.a.deny at ${nobody}`],
  ],
  [
    "a deny of more",
    plugin('namespaces = ["team-a"], pods = ["team-b/*"]', 'namespaces = ["team-*"]'),
    [`a: plugins.a.deny at ${nobody}`],
  ],
  [
    "a deny of the same accounts",
    plugin('service_accounts = ["b/c*"]', 'service_accounts = ["*/c*"]'),
    [`a: plugins.a.deny at ${nobody}`],
  ],
  [
    "defaults that nobody may use",
    'default = { networks = ["a@x"], always = ["b", "c", "n/s"] }\naccess.default = "deny"\n' +
      '[plugins.a]\nallow = {}\n[plugins.b]\nallow.namespaces = ["*"]\ndeny.namespaces = ["*"]\n',
    [
      "b: plugins.b.deny at /p:7 names all that plugins.b.allow at /p:6 opens it to: nobody may " +
        "use it",
      "a: named by default.networks, and nobody may use it: plugins.a.allow at /p:4 names nobody",
      "b: named by default.always, and nobody may use it: plugins.b.deny at /p:7 names every pod",
      'c: named by default.always, and nobody may use it: access.default is "deny" and no rule ' +
        "allows it",
    ],
  ],
  [
    "a closed node",
    'access.default = "deny"\naccess.nad = []\n[plugins.a]\n',
    ['-: access.default is "deny" and no rule allows anything: no pod gets a network'],
  ],
  [
    "quotas that are too small",
    'default.networks = ["a", "b"]\n\naccess.max_attachments = { pod = 4, namespace = 1 }',
    [
      "-: access.max_attachments at /p:3 is 1, and a pod that asks for nothing gets 2",
      "-: access.max_attachments at /p:3: no pod can have 4 while its namespace may have 1",
    ],
  ],
  [
    "a rule that admits nothing",
    '[[access.nad]]\nnamespaces = ["a"]\n[[access.nad]]\nnamespaces = ["a"]\ntypes = ["sriov"]\n' +
      'masters = ["e"]',
    [
      "-: access.nad[1] at /p:3 admits nothing: of none of its types is it known what device " +
        "they take, so masters cannot be held against them",
    ],
  ],
])("finds %s", (_, table, expected) => {
  expect(say(table)).toEqual(expected);
});
