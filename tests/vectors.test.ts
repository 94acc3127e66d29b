/**
 * Protocol conformance, CHECK (lib/check.ts) and STATUS (lib/status.ts) included: every file of
 * tests/vectors is one scenario, run through the compiled
 * program once for each CNI version it names.
 *
 * In all texts `$DIR` is the node's folder, `$NETNS` its network namespace, `$VERSION` the version
 * of the run, and a fake that keeps reservations does so in `$DIR/reserved`. The environment and
 * the config on stdin go over those of a good call (tests/wire.ts); null takes a key away.
 */
import { describe, expect, test } from "bun:test";
import {
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import * as v from "valibot";
import { supportedVersions } from "../lib/cni.ts";
import { closeState } from "../lib/database.ts";
import { isObject } from "../lib/json.ts";
import { openState } from "../lib/recovery/database.ts";
import { type Behaviour, type Call, calls, makeHost } from "./fakes.ts";
import { strictIssues } from "./strict_result.ts";
import { fill, left, makeNode, type Node, nothing, wire, wireError } from "./wire.ts";

const Text = v.string();
const Json = v.record(v.string(), v.unknown());

/** A call a delegate received: `bridge ADD c1 eth0`, or that with more of what it was given. */
const ExpectedCall = v.union([
  Text,
  v.strictObject({
    call: Text,
    /** These variables exactly; null: not set. */
    env: v.optional(v.record(v.string(), v.nullable(v.string()))),
    /** The whole config on its stdin. */
    stdin: v.optional(Json),
    /** Pieces of the text on its stdin. */
    says: v.optional(v.array(Text)),
  }),
]);

type ExpectedCall = v.InferOutput<typeof ExpectedCall>;

/** What happens to the node before a step. Paths are inside the node's folder. */
const Before = v.strictObject({
  remove: v.optional(v.array(Text)),
  write: v.optional(v.record(v.string(), v.unknown())),
  sql: v.optional(Text),
  /** Opened for writing while the step runs: executing it fails with ETXTBSY. */
  busy: v.optional(Text),
});

const stepKeys = {
  command: Text,
  env: v.optional(v.record(v.string(), v.nullable(v.string()))),
  stdin: v.optional(v.union([Text, Json])),
  expect: v.union([v.literal("success"), v.pipe(v.number(), v.integer())]),
  /** Of a success: the whole document, or "" for none. */
  stdout: v.optional(v.union([v.literal(""), Json])),
  /** Of a failure: what its message and details contain. */
  says: v.optional(v.array(Text)),
  /** What stderr contains; otherwise it must be empty. */
  stderr: v.optional(v.array(Text)),
  calls: v.optional(v.array(ExpectedCall)),
};
const Step = v.strictObject({ before: v.optional(Before), ...stepKeys });
type Step = v.InferOutput<typeof Step>;

/** Complete by its type: a behaviour that a fake does not know would silently do nothing. */
const behaviourKeys: Record<keyof Behaviour, true> = {
  ignoreStdin: true,
  stderr: true,
  reserve: true,
  delayMs: true,
  shell: true,
  grandchild: true,
  hang: true,
  ignoreSigterm: true,
  flood: true,
  signal: true,
  error: true,
  failTimes: true,
  status: true,
  raw: true,
  closeStdout: true,
  result: true,
  chain: true,
  ips: true,
  gateway: true,
  mac: true,
  hostInterface: true,
  routes: true,
  dns: true,
};
const Does = v.custom<Behaviour>(
  (value) =>
    isObject(value) && Object.keys(value).every((key) => Object.hasOwn(behaviourKeys, key)),
  "behaviour that tests/fixtures/delegate.ts has",
);
const Delegate = v.pipe(
  Json,
  v.check(
    ({ ADD, DEL, CHECK, GC, STATUS, VERSION, versions: _, ...all }) =>
      [all, ADD ?? {}, DEL ?? {}, CHECK ?? {}, GC ?? {}, STATUS ?? {}, VERSION ?? {}].every(
        (does) => v.is(Does, does),
      ),
    "behaviour that tests/fixtures/delegate.ts has",
  ),
);

const common = {
  /** The rule it proves: `CNI 1.1 §2 DEL`, `fact 9`, several joined by `; `. */
  source: Text,
  versions: v.optional(v.array(v.picklist(supportedVersions)), ["1.1.0"]),
  /** Lines of the plugin table. */
  table: v.optional(v.array(Text), []),
  /** Config lists by file name. */
  lists: v.optional(v.record(v.string(), v.unknown()), {}),
  delegates: v.optional(v.record(v.string(), Delegate), {}),
  /** What is left in the end. By default nothing, and unchecked after a successful ADD. */
  left: v.optional(v.strictObject({ rows: v.array(Text), reserved: v.array(Text) })),
};
const Vector = v.union([
  v.strictObject({ ...common, steps: v.pipe(v.array(Step), v.minLength(1)) }),
  v.pipe(
    v.strictObject({ ...common, before: v.optional(Before), ...stepKeys }),
    v.transform(({ source, versions, table, lists, delegates, left, ...step }) => ({
      ...{ source, versions, table, lists, delegates },
      ...(left && { left }),
      steps: [step as Step],
    })),
  ),
]);
type Vector = v.InferOutput<typeof Vector>;

function parseVector(value: unknown): Vector {
  return v.parse(Vector, value);
}

const folder = join(import.meta.dir, "vectors");
const files = readdirSync(folder).sort();
const texts = new Map(files.map((name) => [name, readFileSync(join(folder, name), "utf8")]));

/** Rules that no single call shows; the file that proves them instead. */
const shownElsewhere = new Map([
  [26, "binary.test.ts"],
  [27, "binary.test.ts"],
]);

describe("a vector", () => {
  test.each([
    ["an unknown key", { source: "x", command: "ADD", expect: 7, expects: 7 }],
    ["an unknown expectation", { source: "x", command: "ADD", expect: "failure" }],
    [
      "an unknown behaviour",
      { source: "x", command: "ADD", expect: 7, delegates: { a: { hng: 1 } } },
    ],
    ["an unknown version", { source: "x", versions: ["0.5.0"], command: "ADD", expect: 7 }],
    ["no step", { source: "x", steps: [] }],
    [
      "a call with an unknown key",
      { source: "x", command: "ADD", expect: 7, calls: [{ cal: "" }] },
    ],
  ])("with %s is refused", (_name, value) => {
    expect(() => parseVector(value)).toThrow();
  });

  test("exists for every line of the facts 1-29 that the wire shows", () => {
    const numbers = [...texts.values()].flatMap((text) =>
      [...text.matchAll(/fact (\d+)/g)].map(([, number]) => Number(number)),
    );
    const missing = Array.from({ length: 29 }, (_, i) => i + 1).filter(
      (number) => !numbers.includes(number) && !shownElsewhere.has(number),
    );
    expect(missing).toEqual([]);
  });
});

const rows = [...texts].flatMap(([file, text]) => {
  const { versions, source } = parseVector(JSON.parse(text));
  return versions.map((version) => ({ file, text, version, source }));
});

describe("vectors", () => {
  test.concurrent.each(rows)("$file at $version: $source", async ({ text, version }) => {
    const vector = parseVector(JSON.parse(text.replaceAll("$VERSION", version)));
    const { lists, delegates } = vector;
    using node = makeNode({ table: vector.table.join("\n"), lists, delegates });
    for (const step of vector.steps) await runStep(node, JSON.parse(fill(node, toText(step))));
    const last = vector.steps.at(-1);
    const keeps = last?.command === "ADD" && last.expect === "success";
    if (vector.left || !keeps) expect(left(node)).toEqual(vector.left ?? nothing);
  });
});

const toText = (value: unknown) => JSON.stringify(value);

async function runStep(node: Node, step: Step): Promise<void> {
  const before = calls(node.bin).length;
  const release = prepare(node, step.before ?? {});
  const run = await wire(node, {
    command: step.command,
    env: withoutNulls(step.env ?? {}) as Record<string, string | undefined>,
    ...(step.stdin !== undefined && {
      stdin: typeof step.stdin === "string" ? step.stdin : withoutNulls(step.stdin),
    }),
  });
  release();
  if (step.expect === "success") {
    const document: unknown = run.stdout === "" ? "" : JSON.parse(run.stdout);
    expect(document).toEqual(step.stdout ?? document);
    expect(run).toEqual({ ...run, status: 0 });
    if (step.command === "ADD") checkStrictly(node, step, run.stdout);
  } else {
    const error = wireError(run);
    expect(error).toEqual({ ...error, code: step.expect });
    const said = `${error.msg}\n${error.details ?? ""}`;
    for (const piece of step.says ?? []) expect(said).toContain(piece);
  }
  for (const piece of step.stderr ?? []) expect(run.stderr).toContain(piece);
  if (!step.stderr) expect(run.stderr).toBe("");
  checkCalls(calls(node.bin).slice(before), step);
}

/** Whatever a vector expects, what the runtime gets is what the specification says. */
function checkStrictly(node: Node, { env, stdin = {} }: Step, stdout: string): void {
  const given = typeof stdin === "string" ? JSON.parse(stdin) : { cniVersion: "1.1.0", ...stdin };
  const version = String(given.cniVersion ?? "0.1.0");
  const ifName = env?.["CNI_IFNAME"] ?? "eth0";
  expect(strictIssues(stdout, { version, ifName, netns: node.netns })).toEqual([]);
}

/** null takes a key away: JSON has no undefined. */
function withoutNulls(value: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(
    Object.entries(value).map(([key, item]) => [key, item === null ? undefined : item]),
  );
}

/** Does what happens before a step; the answer ends what lasts as long as the step. */
function prepare(node: Node, { remove, write, sql, busy }: v.InferOutput<typeof Before>) {
  for (const name of remove ?? []) rmSync(join(node.dir, name), { recursive: true, force: true });
  for (const [name, content] of Object.entries(write ?? {})) {
    const text = typeof content === "string" ? content : JSON.stringify(content);
    mkdirSync(dirname(join(node.dir, name)), { recursive: true });
    writeFileSync(join(node.dir, name), text);
  }
  if (sql !== undefined) {
    const state = openState(makeHost(), node.state);
    state.database.run(sql);
    closeState(state);
  }
  const held = busy === undefined ? undefined : openSync(join(node.dir, busy), "r+");
  return () => {
    if (held !== undefined) closeSync(held);
  };
}

function inShort({ plugin, command, env }: Call): string {
  return [plugin, command, env["CNI_CONTAINERID"], env["CNI_IFNAME"]].filter(Boolean).join(" ");
}

function checkCalls(received: Call[], { calls: expected }: Step): void {
  if (!expected) return;
  expect(received.map(inShort)).toEqual(
    expected.map((one) => (typeof one === "string" ? one : one.call)),
  );
  for (const [i, one] of expected.entries()) {
    const call = received[i];
    if (call && typeof one !== "string") checkCall(call, one);
  }
}

function checkCall(call: Call, { env, stdin, says }: Exclude<ExpectedCall, string>): void {
  const named = Object.keys(env ?? {}).map((name) => [name, call.env[name] ?? null]);
  expect(Object.fromEntries(named)).toEqual(env ?? {});
  if (stdin) expect(JSON.parse(call.stdin)).toEqual(stdin);
  for (const piece of says ?? []) expect(call.stdin).toContain(piece);
}
