/**
 * Where the inputs of the fuzz are run: a node in a throw-away folder with fake plugins and an API
 * server, the call itself in this process or through the compiled program, and what must be true of
 * every answer.
 */
import { existsSync, readFileSync, readlinkSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Host } from "../../lib/call.ts";
import { closeState } from "../../lib/database.ts";
import { isObject } from "../../lib/json.ts";
import { openState } from "../../lib/recovery/database.ts";
import { type GenieRun, makeHost } from "../fakes.ts";
import { strictIssues } from "../strict_result.ts";
import {
  checkFailure,
  compiledGenie,
  control,
  fill,
  left,
  makeNode,
  type Node,
  spawnGenie,
  stackTrace,
  writeTable,
} from "../wire.ts";
import { answer } from "./entry.ts";
import { type Answer, type Input, secret } from "./inputs.ts";
import { textsOf } from "./mutate.ts";

/** A node and what is behind it. */
export interface Stage extends Disposable {
  node: Node;
  /** `http://127.0.0.1:<port>` */
  api: string;
  objects: Record<string, string>;
  /** Files of the last input. */
  files: Set<string>;
}

/** What a call may take in all, in ms: no table of the fuzz allows a delegate more than 20 s. */
const callMsMax = 40_000;

/** Writes down who called it, and answers as the environment says: no process besides the shell. */
const plugin = `#!/bin/sh
printf '%s %s %s %s\\n' "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "\${0##*/}" >>"$FZ_CALLS"
case $CNI_COMMAND in
ADD | DEL | CHECK | STATUS | GC)
  eval "out=\\$FZ_OUT_$CNI_COMMAND err=\\$FZ_ERR_$CNI_COMMAND status=\\$FZ_STATUS_$CNI_COMMAND" ;;
esac
[ -z "$err" ] || printf '%s' "$err" >&2
printf '%s' "$out"
case $status in
kill) kill -9 $$ ;;
stop) kill -STOP $$ ;;
esac
exit "\${status:-0}"
`;

/** Makes a stage; it goes away with its scope. */
export function makeStage(): Stage {
  const node = makeNode();
  for (const name of ["fz-a", "fz-b"]) writeFileSync(join(node.bin, name), plugin, { mode: 0o755 });
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    fetch: (request) => {
      const body = stage.objects[new URL(request.url).pathname];
      if (request.method === "PATCH") return new Response("{}");
      return body === undefined ? new Response("{}", { status: 404 }) : new Response(body);
    },
  });
  const stage: Stage = {
    node,
    api: `http://127.0.0.1:${server.port}`,
    objects: {},
    files: new Set(),
    [Symbol.dispose]: () => {
      server.stop(true);
      node[Symbol.dispose]();
    },
  };
  return stage;
}

const bootId = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
const pidNamespace = readlinkSync("/proc/self/ns/pid");

function filled({ node, api }: Stage, text: string): string {
  return fill(node, text)
    .replaceAll("$API", api)
    .replaceAll("$BOOT", bootId)
    .replaceAll("$PIDS", pidNamespace);
}

/**
 * Runs an input, and the DEL after an ADD that succeeded, and checks all of it.
 *
 * @param program through the compiled program, and not in this process
 * @returns how it ended: `refused`, `done`, or why it was not run at all
 * @throws Error for anything that must not be
 */
export async function runInput(stage: Stage, input: Input, program = false): Promise<string> {
  const env = envOf(stage, input);
  const stdin = stdinOf(stage, input);
  if (stdin === undefined || !isHarmless(stage, input, stdin) || isLong(stdin)) return "left out";
  if (program && env["CNI_COMMAND"] === undefined) return "left out";
  prepare(stage, input);
  const call = (command = env["CNI_COMMAND"]): Promise<GenieRun> => {
    const all = command === undefined ? env : { ...env, CNI_COMMAND: command };
    return inTime(program ? runProgram(all, stdin) : runHere(all, stdin, input.kind === "rows"));
  };
  let isClean = false;
  try {
    const run = await call();
    check(stage, input, env, stdin, run);
    const isAdded = env["CNI_COMMAND"] === "ADD" && run.status === 0;
    if (isAdded) checkDeleted(input, await call("DEL"));
    if (input.kind !== "rows") checkBalance(stage, input, isAdded || run.status !== 0);
    isClean = input.kind !== "rows" && input.answers["DEL"] === undefined;
    return run.status === 0 ? "done" : "refused";
  } finally {
    if (!isClean) rmSync(stage.node.state, { recursive: true, force: true });
  }
}

/** Says what is left on the node in the end. */
export function leftOn(stage: Stage): string[] {
  return left(stage.node).rows;
}

function envOf(stage: Stage, input: Input): Record<string, string> {
  const env: Record<string, string> = { FZ_CALLS: join(stage.node.dir, "calls") };
  const answers: [string, Answer][] = Object.entries(input.answers);
  for (const [command, { stdout, stderr = "", status = "" }] of answers) {
    env[`FZ_OUT_${command}`] = withoutNul(filled(stage, stdout)).slice(0, 100_000);
    env[`FZ_ERR_${command}`] = stderr;
    env[`FZ_STATUS_${command}`] = status;
  }
  for (const [name, value] of Object.entries(input.env)) env[name] = filled(stage, value);
  return env;
}

const withoutNul = (text: string) => text.replaceAll("\0", "").toWellFormed();

/** The config with the node's table; undefined where it would be read from another place. */
function stdinOf(stage: Stage, input: Input): string | undefined {
  const stdin = filled(stage, input.stdin);
  const at = stdin.lastIndexOf("}");
  const before = stdin.slice(0, at);
  const comma = before.trim() === "{" ? "" : ",";
  const ours = `${comma}"plugins_file":${JSON.stringify(stage.node.tableFile)}}`;
  const text = at < 0 ? stdin : before + ours + stdin.slice(at + 1);
  const config = parsed(text);
  return isObject(config) && config["plugins_file"] !== stage.node.tableFile ? undefined : text;
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (error) {
    if (error instanceof SyntaxError || error instanceof RangeError) return undefined;
    throw error;
  }
}

/**
 * A fuzz must not write to the machine's files, ask servers that are none of ours, or run what the
 * machine has installed.
 */
function isHarmless(stage: Stage, { table, files }: Input, stdin: string): boolean {
  if (/log_file|state_dir|kubelet_dir/.test(table) || stdin.includes("logFile")) return false;
  const kubeconfig = filled(stage, files["kubeconfig"] ?? "{}");
  let credentials: unknown;
  try {
    credentials = Bun.YAML.parse(kubeconfig);
  } catch (error) {
    credentials = parsed(kubeconfig) ?? { error };
  }
  const commands = /command["']?\s*:\s*["']?([^"',\s}]*)/g;
  const isOurs = (text: string) => {
    const url = URL.parse(text.trim());
    return url === null || !/^https?:$/.test(url.protocol) || stage.api.endsWith(`//${url.host}`);
  };
  return (
    [...kubeconfig.matchAll(commands)].every(([, command]) => command === "/bin/false") &&
    [...textsOf(credentials), ...textsOf(parsed(stdin))].every(isOurs)
  );
}

/** ADD waits 45 s for a file that says when Multus' default network is ready. */
function isLong(stdin: string): boolean {
  const config = parsed(stdin);
  const file = isObject(config) ? config["readinessindicatorfile"] : undefined;
  return typeof file === "string" && file !== "" && !existsSync(file);
}

function prepare(stage: Stage, input: Input): void {
  const { node } = stage;
  writeTable(node, filled(stage, input.table));
  for (const name of stage.files) if (!(name in input.files)) rmSync(join(node.dir, name));
  stage.files = new Set(Object.keys(input.files));
  for (const [name, text] of Object.entries(input.files)) {
    writeFileSync(join(node.dir, name), filled(stage, text));
  }
  stage.objects = input.objects;
  rmSync(join(node.dir, "calls"), { force: true });
  if (input.rows.length === 0) return;
  rmSync(node.state, { recursive: true, force: true });
  const state = openState(makeHost(), node.state);
  for (const [table, columns] of input.rows) {
    const names = Object.keys(columns);
    const marks = names.map(() => "?").join(", ");
    const row = Object.values(columns).map((one) =>
      typeof one === "string" ? filled(stage, one) : one,
    );
    try {
      const insert = `INSERT OR REPLACE INTO ${table} (${names.join(", ")}) VALUES (${marks})`;
      state.database.query(insert).run(...row);
    } catch (error) {
      // A value that no column of this table can hold cannot be in it either.
      if (!/constraint|cannot store/i.test(String(error))) throw error;
    }
  }
  closeState(state);
}

/** In this process; a fast clock makes a wait of a minute a short one. */
async function runHere(
  env: Record<string, string>,
  stdin: string,
  isFast: boolean,
): Promise<GenieRun> {
  const made = makeHost({ env, stdin });
  const startedMs = Date.now();
  const now = isFast ? () => startedMs + (Date.now() - startedMs) * 100 : Date.now;
  const host: Host = { ...made, now };
  const status = await answer(host);
  return { status, ...made.written };
}

function runProgram(env: Record<string, string>, stdin: string): Promise<GenieRun> {
  return spawnGenie([compiledGenie()], env, Buffer.from(stdin));
}

async function inTime(run: Promise<GenieRun>): Promise<GenieRun> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    const error = new Error(`It did not end within ${callMsMax} ms`);
    timer = setTimeout(() => reject(error), callMsMax);
  });
  try {
    return await Promise.race([run, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Codes that the delegates of an input give. */
function codesOf({ answers }: Input): number[] {
  return Object.values(answers).flatMap(({ stdout }) => {
    const document = parsed(stdout);
    return isObject(document) && typeof document["code"] === "number" ? [document["code"]] : [];
  });
}

/** By a change the secret may have become what is shown: the name of a network, say. */
const shown = new RegExp(
  `(cni|networks|default_plugin|clusterNetwork|interface|name|type|ips)\\\\*":\\\\*"[^"]*${secret}`,
);

function check(
  stage: Stage,
  input: Input,
  env: Record<string, string>,
  stdin: string,
  run: GenieRun,
): void {
  const said = run.stdout + run.stderr;
  const given = [stdin, ...Object.values(input.files), ...Object.values(input.objects)];
  const isTold = said.includes(secret) && !given.some((text) => shown.test(text));
  if (isTold) throw new Error(`It told the secret: ${said}`);
  const command = env["CNI_COMMAND"];
  if (run.status !== 0) {
    checkFailure({ ...run, stderr: printed(run, input) }, codesOf(input));
    return;
  }
  const loud = printed(run, input);
  if (control.test(loud) || stackTrace.test(loud)) throw new Error(`On stderr: ${loud}`);
  if (command === "ADD") checkResult(stage, env, stdin, run.stdout);
  else if (command === "VERSION") checkVersion(run.stdout);
  else if (run.stdout !== "") throw new Error(`On stdout of ${command}: ${run.stdout}`);
}

/** stderr without what the delegates said there: that is passed on (§4), printed by `genie.ts`. */
function printed({ stderr }: GenieRun, { answers }: Input): string {
  return Object.values(answers).reduce(
    (text, { stderr: own }) => (own ? text.replaceAll(own, "") : text),
    stderr,
  );
}

function checkVersion(stdout: string): void {
  const document = parsed(stdout);
  const isGood = isObject(document) && Array.isArray(document["supportedVersions"]);
  if (!isGood) throw new Error(`On stdout of VERSION: ${stdout}`);
}

/**
 * What a delegate says of its own attachment is passed on, as libcni does: a place that is none, a
 * sandbox by another path, one interface twice.
 */
const ofDelegates = [
  /^interfaces\[\d+\]\.socketPath: is not/,
  /^dns\.nameservers\[\d+\]: is not/,
  /^interfaces: \S+ has sandbox /,
  /^interfaces: more than one is named /,
];

function checkResult(
  { node }: Stage,
  env: Record<string, string>,
  stdin: string,
  stdout: string,
): void {
  if (!stdout.endsWith("}\n") || stdout.trimEnd().includes("\n")) {
    throw new Error(`Not one line on stdout: ${stdout}`);
  }
  const config = parsed(stdin) as { cniVersion?: string };
  const asked = {
    version: config.cniVersion || "0.1.0",
    ifName: env["CNI_IFNAME"] ?? "",
    netns: env["CNI_NETNS"] ?? node.netns,
  };
  const found = strictIssues(stdout, asked);
  const isTwice = found.some((issue) => issue.startsWith("interfaces: more than one is named"));
  const issues = found
    .filter((issue) => !ofDelegates.some((pattern) => pattern.test(issue)))
    .filter((issue) => !(isTwice && issue.endsWith("is not in the pod once")));
  if (issues.length > 0) throw new Error(`Not a result: ${issues.join("; ")}: ${stdout}`);
}

function checkDeleted(input: Input, run: GenieRun): void {
  if (input.answers["DEL"] !== undefined) return;
  if (run.status !== 0 || run.stdout !== "") throw new Error(`DEL after it: ${run.stdout}`);
}

/** Every delegate that was asked to ADD was asked to DEL afterwards, once the pod has nothing. */
function checkBalance({ node }: Stage, input: Input, isOver: boolean): void {
  if (!isOver || input.answers["DEL"] !== undefined) return;
  const file = Bun.file(join(node.dir, "calls"));
  if (file.size === 0) return;
  const open = new Set<string>();
  for (const line of readFileSync(join(node.dir, "calls"), "utf8").trim().split("\n")) {
    const [command, ...what] = line.split(" ");
    if (command === "ADD") open.add(what.join(" "));
    if (command === "DEL") open.delete(what.join(" "));
  }
  if (open.size > 0) throw new Error(`Never deleted: ${[...open].join(", ")}`);
}
