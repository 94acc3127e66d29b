/** Who may use which network: rules, their order, and what happens when a fact is unknown. */
import { describe, expect, test } from "bun:test";
import { parseConfig } from "../lib/config/parse.ts";
import {
  type AccessDecision,
  type AccessPod,
  checkAccess,
  matchGlob,
} from "../lib/policy/access_rules.ts";

const table = `
[plugins.open]
[plugins.storage]
allow = { namespaces = ["team-*"], service_accounts = ["batch/load-?"], pods = ["ops/shell"] }
deny = { namespaces = ["team-x"], pods = ["team-a/web-*"] }
[plugins.accounts]
deny = { service_accounts = ["*/root"] }
[plugins.nobody]
allow = {}
`;
const config = parseConfig(table, "/p.toml");
const closed = parseConfig(`access.default = "deny"${table}`, "/p.toml");

const allowRule = "plugins.storage.allow at /p.toml:4";
const denyRule = "plugins.storage.deny at /p.toml:5";
const byDefault: AccessDecision = {
  allowed: true,
  reason: 'access.default is "allow" and no rule speaks against it',
};
const pod = (namespace: string, name = "p", serviceAccount?: string): AccessPod => ({
  namespace,
  name,
  serviceAccount,
});

describe("checkAccess()", () => {
  test.each([
    ["a network without rules", "open", pod("a"), byDefault],
    ["a network not in the table", "other", pod("a"), byDefault],
    ["a network without rules to a pod unknown", "open", {}, byDefault],
    [
      "by namespace",
      "storage",
      pod("team-a"),
      {
        allowed: true,
        reason: 'plugins.storage.allow.namespaces "team-*" names it',
        rule: allowRule,
      },
    ],
    [
      "by service account",
      "storage",
      pod("batch", "p", "load-1"),
      {
        allowed: true,
        reason: 'plugins.storage.allow.service_accounts "batch/load-?" names it',
        rule: allowRule,
      },
    ],
    [
      "by pod, the service account unknown",
      "storage",
      pod("ops", "shell"),
      {
        allowed: true,
        reason: 'plugins.storage.allow.pods "ops/shell" names it',
        rule: allowRule,
      },
    ],
    [
      "unless an account is denied that it does not have",
      "accounts",
      pod("a", "p", "web"),
      byDefault,
    ],
    ["outside Kubernetes, where there are no accounts", "accounts", {}, byDefault],
  ] as [string, string, AccessPod, AccessDecision][])("allows %s", (_, network, who, expected) => {
    expect(checkAccess(config, network, who)).toEqual(expected);
  });

  test.each([
    [
      "by namespace, before any allow rule",
      "storage",
      pod("team-x"),
      {
        allowed: false,
        reason: 'plugins.storage.deny.namespaces "team-x" names it',
        rule: denyRule,
      },
    ],
    [
      "by pod",
      "storage",
      pod("team-a", "web-1"),
      {
        allowed: false,
        reason: 'plugins.storage.deny.pods "team-a/web-*" names it',
        rule: denyRule,
      },
    ],
    [
      "a pod that no allow rule names",
      "storage",
      pod("batch", "p", "save"),
      {
        allowed: false,
        reason: 'plugins.storage.allow does not name pod "batch/p" of service account "save"',
        rule: allowRule,
      },
    ],
    [
      "a pod whose account cannot matter",
      "storage",
      pod("dev"),
      {
        allowed: false,
        reason: 'plugins.storage.allow does not name pod "dev/p"',
        rule: allowRule,
      },
    ],
    [
      "a pod whose account would open it",
      "storage",
      pod("batch"),
      {
        allowed: false,
        reason:
          'plugins.storage.allow.service_accounts "batch/load-?" needs the service account of ' +
          'pod "batch/p", which is not known',
        rule: allowRule,
        needsServiceAccount: true,
      },
    ],
    [
      "a pod whose account would close it",
      "accounts",
      pod("a", "p", ""),
      {
        allowed: false,
        reason:
          'plugins.accounts.deny.service_accounts "*/root" needs the service account of ' +
          'pod "a/p", which is not known',
        rule: "plugins.accounts.deny at /p.toml:7",
        needsServiceAccount: true,
      },
    ],
    [
      "by service account",
      "accounts",
      pod("a", "p", "root"),
      {
        allowed: false,
        reason: 'plugins.accounts.deny.service_accounts "*/root" names it',
        rule: "plugins.accounts.deny at /p.toml:7",
      },
    ],
    [
      "a pod without namespace",
      "storage",
      { name: "shell" },
      {
        allowed: false,
        reason: "plugins.storage.allow does not name a pod without namespace",
        rule: allowRule,
      },
    ],
    [
      "everyone, by an empty allow rule",
      "nobody",
      pod("a", "p", "s"),
      {
        allowed: false,
        reason: 'plugins.nobody.allow does not name pod "a/p" of service account "s"',
        rule: "plugins.nobody.allow at /p.toml:9",
      },
    ],
  ] as [string, string, AccessPod, AccessDecision][])("denies %s", (_, network, who, expected) => {
    expect(checkAccess(config, network, who)).toEqual(expected);
  });

  test.each([
    ["open", pod("team-a"), false],
    ["other", pod("team-a"), false],
    ["accounts", pod("a", "p", "web"), false],
    ["constructor", {}, false],
    ["storage", pod("team-a"), true],
    ["storage", pod("team-x"), false],
  ] as [string, AccessPod, boolean][])('with access.default "deny": %s to %j', (name, who, is) => {
    expect(checkAccess(closed, name, who).allowed).toBe(is);
  });

  test("names access.default where nothing else decides", () => {
    expect(checkAccess(closed, "open", pod("a"))).toEqual({
      allowed: false,
      reason: 'access.default is "deny" and no rule allows it',
      rule: "access.default at /p.toml:1",
    });
  });
});

test.each([
  ["a", "a", true],
  ["a", "b", false],
  ["a", "ab", false],
  ["ab", "a", false],
  ["?", "a", true],
  ["?", "ab", false],
  ["*", "abc", true],
  ["*", "", false],
  ["**", "a", true],
  ["team-*", "team-", true],
  ["team-*", "team", false],
  ["*-db", "a-b-db", true],
  ["*-db", "a-db-x", false],
  ["a*b*c", "a1b2b3c", true],
  ["a*b*c", "a1c2b", false],
  ["a.c", "abc", false],
  ["*?b", "ab", true],
  ["*?b", "b", false],
])("matchGlob(%p, %p)", (pattern, text, is) => {
  expect(matchGlob(pattern, text)).toBe(is);
});

test("matchGlob() does not backtrack without end", () => {
  expect(matchGlob(`${"*a".repeat(120)}b`, "a".repeat(253))).toBe(false);
});
