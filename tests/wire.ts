/**
 * The compiled program as a runtime meets it: a node in a throw-away folder (plugin table, config
 * lists, fake plugins, a network namespace, the record), and one call of the protocol on it.
 *
 * The namespace is an empty file: genie only compares its identity, and the fakes never enter it.
 */
import { expect, setDefaultTimeout } from "bun:test";
import { existsSync, mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { code } from "../lib/cni.ts";
import { closeState } from "../lib/database.ts";
import { isObject } from "../lib/json.ts";
import { attachments } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { buildIfStale } from "./build.ts";
import { fakePlugin, type GenieRun, makeHost, type Script, tempDir } from "./fakes.ts";
import { canMount, isFast } from "./needs.ts";

// `bun run test` allows two minutes. A plain `bun test` on a busy machine must not fail either.
setDefaultTimeout(120_000);

let program: string | undefined;

/** Path of `dist/genie`, built when a source is newer. In the fast run the program's source. */
export function compiledGenie(): string {
  program ??= isFast ? join(import.meta.dir, "..", "genie.ts") : buildIfStale();
  return program;
}

/** What a test puts on its node. */
export interface NodeOptions {
  /** Lines of the plugin table besides its folders; top-level keys come first. */
  table?: string;
  /** Config lists by file name; a string is the text of the file. */
  lists?: Record<string, unknown>;
  /** Fake plugins by name, see tests/fixtures/delegate.ts. */
  delegates?: Record<string, Script | string>;
}

/** A node that goes away with its scope. All paths are absolute. */
export interface Node extends Disposable {
  dir: string;
  bin: string;
  conf: string;
  state: string;
  /** For `reserve` of the fakes. */
  reserved: string;
  netns: string;
  tableFile: string;
}

/** Makes a node. In all its texts `$DIR` and `$NETNS` are replaced, see {@link fill}. */
export function makeNode({ table = "", lists = {}, delegates = {} }: NodeOptions = {}): Node {
  const made = tempDir();
  const dir = made.path;
  const path = (name: string) => join(dir, name);
  const node: Node = {
    dir,
    bin: path("bin"),
    conf: path("conf"),
    state: path("state"),
    reserved: path("reserved"),
    netns: path("netns"),
    tableFile: path("plugins.toml"),
    [Symbol.dispose]: () => made[Symbol.dispose](),
  };
  for (const folder of [node.bin, node.conf, node.reserved]) mkdirSync(folder);
  writeFileSync(node.netns, "");
  writeTable(node, table);
  for (const [name, list] of Object.entries(lists)) {
    const text = typeof list === "string" ? list : JSON.stringify(list);
    writeFileSync(join(node.conf, name), fill(node, text));
  }
  for (const [name, script] of Object.entries(delegates)) {
    fakePlugin(node.bin, name, JSON.parse(fill(node, JSON.stringify(script))));
  }
  return node;
}

/** A text with `$NETNS` and `$DIR` replaced by the paths of a node. */
export function fill(node: Node, text: string): string {
  return text.replaceAll("$NETNS", node.netns).replaceAll("$DIR", node.dir);
}

/** Writes the plugin table anew. */
export function writeTable(node: Node, table: string): void {
  const folders = { conf_dir: node.conf, state_dir: node.state };
  const own = Object.entries(folders).map(([key, path]) => `${key} = ${JSON.stringify(path)}\n`);
  // The default folder may hold plugins of the machine that runs the tests.
  if (!table.includes("bin_dirs")) own.push("bin_dirs = []\n");
  writeFileSync(node.tableFile, own.join("") + fill(node, table));
}

/** One call; what is left out is that of a good call. */
export interface WireCall {
  command: string;
  /** Over the usual variables; undefined takes one away. */
  env?: Record<string, string | undefined>;
  /** An object goes over the usual config; text and bytes are sent as they are. */
  stdin?: object | string | Uint8Array;
  cwd?: string;
  /** See {@link sealed}: for a call whose table cannot be read. */
  isSealed?: boolean;
}

/**
 * Words before a command that finds an empty /var/lib which goes with it. What cannot read its
 * table keeps its record there, and the machine's own must not have rows of tests.
 */
export const sealed: readonly string[] = canMount()
  ? [
      Bun.which("unshare") ?? "",
      "--mount",
      "/bin/sh",
      "-c",
      'mount -t tmpfs none /var/lib && exec "$@"',
      "sh",
    ]
  : [];

/** The environment of a call on this node: container c1, interface eth0. */
export function wireEnv(node: Node, { command, env = {} }: WireCall): Record<string, string> {
  const all = {
    CNI_COMMAND: command,
    CNI_CONTAINERID: "c1",
    CNI_IFNAME: "eth0",
    CNI_NETNS: node.netns,
    CNI_PATH: node.bin,
    ...env,
  };
  return Object.fromEntries(
    Object.entries(all).filter((pair): pair is [string, string] => pair[1] !== undefined),
  );
}

/** The bytes on stdin of a call on this node. */
export function wireStdin(node: Node, { stdin = {} }: Pick<WireCall, "stdin">): Uint8Array {
  if (stdin instanceof Uint8Array) return stdin;
  if (typeof stdin === "string") return Buffer.from(stdin);
  const usual = { cniVersion: "1.1.0", name: "genie-net", type: "genie" };
  return Buffer.from(JSON.stringify({ ...usual, plugins_file: node.tableFile, ...stdin }));
}

/** Runs the compiled program as a runtime does; the fast run calls the source in this process. */
export async function wire(node: Node, call: WireCall): Promise<GenieRun> {
  const env = wireEnv(node, call);
  const stdin = wireStdin(node, call);
  const { cwd, isSealed = false } = call;
  const text = isFast && cwd === undefined && !isSealed ? readable(stdin) : undefined;
  if (text !== undefined) return (await import("./inside.ts")).callInside(env, text);
  return spawnGenie([...(isSealed ? sealed : []), compiledGenie()], env, stdin, cwd);
}

/** Text that reading stdin gives; undefined for what the process itself has to refuse. */
function readable(stdin: Uint8Array): string | undefined {
  const text = Buffer.from(stdin).toString();
  return stdin.length < 1_000_000 && Buffer.from(text).equals(stdin) ? text : undefined;
}

/** Runs any command line, genie.ts with Bun, with exactly this environment and stdin. */
export async function spawnGenie(
  words: string[],
  env: Record<string, string>,
  stdin: Uint8Array = new Uint8Array(),
  cwd = "/",
): Promise<GenieRun> {
  const command = words.flatMap((word) =>
    word.endsWith("/genie.ts") ? [process.execPath, word] : [word],
  );
  const child = Bun.spawn(command, { env, cwd, stdin, stdout: "pipe", stderr: "pipe" });
  const [stdout, stderr] = await Promise.all([
    child.stdout.text(),
    child.stderr.text(),
    child.exited,
  ]);
  return { status: child.exitCode ?? -1, stdout, stderr };
}

/** The annotations of a pod as containerd hands them over. */
export function annotated(annotations: Record<string, unknown>): object {
  return { runtimeConfig: { "io.kubernetes.cri.pod-annotations": annotations } };
}

/** What is left on a node: rows of the record, and reservations of the fakes. */
export interface Left {
  rows: string[];
  reserved: string[];
}

/** Nothing, as it should be after a DEL and after any failed ADD. */
export const nothing: Left = { rows: [], reserved: [] };

/** Reads what is left; a row is `<container> <interface> <state>`. */
export function left(node: Node): Left {
  return { rows: readRows(node), reserved: readdirSync(node.reserved).sort() };
}

function readRows(node: Node): string[] {
  if (!existsSync(join(node.state, "genie.db"))) return [];
  const host = makeHost();
  const state = openState(host, node.state);
  try {
    return attachments(host, state).map((row) => `${row.containerId} ${row.ifName} ${row.state}`);
  } finally {
    closeState(state);
  }
}

/** The one document of a failed call. */
export interface WireError {
  cniVersion: string;
  code: number;
  msg: string;
  details?: string;
}

/** Parses stdout as the one error document there may be. @throws Error when it is anything else */
export function wireError(run: GenieRun): WireError {
  const value: unknown = JSON.parse(run.stdout);
  if (run.status !== 1 || !isObject(value) || !run.stdout.endsWith("}\n")) {
    throw new Error(`Expected an error, got status ${run.status}: ${run.stdout}${run.stderr}`);
  }
  const { cniVersion, code, msg, details, ...unknown } = value;
  if (
    typeof cniVersion !== "string" ||
    typeof code !== "number" ||
    typeof msg !== "string" ||
    Object.keys(unknown).length > 0
  ) {
    throw new Error(`Expected an error document, got ${run.stdout}`);
  }
  return { cniVersion, code, msg, ...(typeof details === "string" && { details }) };
}

/** The codes genie may answer by itself. */
const listed = new Set<number>(Object.values(code).filter((number) => number !== code.internal));
/** Characters that a terminal obeys. */
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what must not be there
export const control = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/;
/** Traces of a stack, which tell a reader nothing and an attacker something. */
export const stackTrace = /^\s+at |\.ts:\d|\/\$bunfs|Error:/m;

/**
 * What every failure looks like: one document on one line with a listed code, nothing that a
 * terminal obeys, no stack trace.
 * @param others codes that delegates gave: they are passed on
 * @returns its code
 */
export function checkFailure(run: GenieRun, others: readonly number[] = []): number {
  expect(run.stdout.trimEnd().split("\n")).toHaveLength(1);
  const error = wireError(run);
  expect(error).toEqual({ ...error, cniVersion: expect.stringMatching(/^\d\.\d\.\d$/) });
  if (!others.includes(error.code)) expect(listed).toContain(error.code);
  expect(error.msg).not.toMatch(control);
  expect(error.msg).not.toMatch(/[\n\t]/);
  expect(error.msg.length).toBeLessThanOrEqual(1024);
  expect(error.details ?? "").not.toMatch(control);
  expect((error.details ?? "").length).toBeLessThanOrEqual(8192);
  expect(run.stderr).not.toMatch(control);
  expect(`${error.msg}\n${error.details ?? ""}\n${run.stderr}`).not.toMatch(stackTrace);
  return error.code;
}
