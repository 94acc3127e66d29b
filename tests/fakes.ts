/**
 * What tests stand on: throw-away folders, fake plugins, a captured host, the program under test
 * and real network namespaces. Everything is removed by whoever made it, failed test or not.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Host } from "../lib/call.ts";
import type { LogLevel } from "../lib/cni.ts";
import { type Call, recordName, type Script } from "./fixtures/delegate.ts";
import { netnsPrefix, removeFolder } from "./leftovers.ts";
import { findPluginDir, isFast } from "./needs.ts";

export type { Behaviour, Call, Script } from "./fixtures/delegate.ts";

/** A folder that goes away with its scope: `using dir = tempDir()`. */
export interface TempDir extends Disposable {
  path: string;
}

/** Makes an empty folder. Outside a function, give it back in `afterAll`. */
export function tempDir(): TempDir {
  const path = mkdtempSync(join(tmpdir(), "genie-test-"));
  return { path, [Symbol.dispose]: () => removeFolder(path) };
}

/**
 * Writes a fake plugin and returns its path.
 *
 * @param dir the folder to name in CNI_PATH; the calls are recorded in it as well
 * @param script what it does, see tests/fixtures/delegate.ts; a string is a whole executable,
 *   e.g. `#!/bin/sh\nexit 0`
 */
export function fakePlugin(dir: string, name: string, script: Script | string = {}): string {
  const path = join(dir, name);
  const fixture = join(import.meta.dir, "fixtures", "delegate.ts");
  const text =
    typeof script === "string"
      ? script
      : `#!${process.execPath} ${fixture}\n${JSON.stringify(script)}`;
  // A new file: one that runs cannot be written to.
  rmSync(path, { force: true });
  writeFileSync(path, text, { mode: 0o755 });
  return path;
}

/** The calls the fakes of a folder received, in order; of one plugin when named. */
export function calls(dir: string, plugin?: string): Call[] {
  const path = join(dir, recordName);
  if (!existsSync(path)) return [];
  // The last line may be half written; a whole one ends with a newline.
  return readFileSync(path, "utf8")
    .split("\n")
    .slice(0, -1)
    .map((line) => JSON.parse(line) as Call)
    .filter((call) => plugin === undefined || call.plugin === plugin);
}

/** The calls in short, for one `toEqual` on the whole order: `bridge ADD c1 eth0`. */
export function callOrder(dir: string): string[] {
  return calls(dir).map(({ plugin, command, env }) =>
    [plugin, command, env["CNI_CONTAINERID"], env["CNI_IFNAME"]].filter(Boolean).join(" "),
  );
}

/** Forgets the calls recorded so far. */
export function forgetCalls(dir: string): void {
  rmSync(join(dir, recordName), { force: true });
}

/** A host whose outputs are kept. */
export interface FakeHost extends Host {
  written: { stdout: string; stderr: string };
  /** Ends the run, as SIGTERM would. */
  abort: () => void;
}

/** A host of plain values. Time stands still at `now`. */
export function makeHost({
  env = {},
  stdin = "",
  now = 1_700_000_000_000,
  level = "info",
}: {
  env?: Host["env"];
  stdin?: string | object;
  now?: number;
  level?: LogLevel;
} = {}): FakeHost {
  const written = { stdout: "", stderr: "" };
  const controller = new AbortController();
  return {
    env,
    stdin: () => (typeof stdin === "string" ? stdin : JSON.stringify(stdin)),
    stdout: (text) => {
      written.stdout += text;
    },
    stderr: (text) => {
      written.stderr += text;
    },
    now: () => now,
    signal: controller.signal,
    log: { level, file: "" },
    written,
    abort: () => controller.abort(),
  };
}

/** What the program under test gave. `status` is -1 when a signal ended it. */
export interface GenieRun {
  status: number;
  stdout: string;
  stderr: string;
}

const root = join(import.meta.dir, "..");

/** The compiled program where it was built, else its source, which is what the fast run takes. */
export function genieProgram(): string {
  const binary = join(root, "dist", "genie");
  return existsSync(binary) && !isFast ? binary : join(root, "genie.ts");
}

/**
 * Runs the program under test with exactly this environment.
 *
 * @param program a binary, or a `.ts` file to run with Bun
 */
export async function runGenie(
  program: string,
  env: Record<string, string>,
  stdin: string | object = "",
  args: string[] = [],
): Promise<GenieRun> {
  const command = program.endsWith(".ts") ? [process.execPath, program] : [program];
  const child = Bun.spawn([...command, ...args], {
    env,
    cwd: "/",
    stdin: Buffer.from(typeof stdin === "string" ? stdin : JSON.stringify(stdin)),
    stdout: "pipe",
    stderr: "pipe",
  });
  const [stdout, stderr] = await Promise.all([
    child.stdout.text(),
    child.stderr.text(),
    child.exited,
  ]);
  return { status: child.exitCode ?? -1, stdout, stderr };
}

/** A real network namespace. */
export interface Netns {
  name: string;
  /** What to pass as CNI_NETNS. */
  path: string;
  /** Runs `ip <args>` in it. @throws Error with what ip said */
  ip: (...args: string[]) => string;
  /** The names of its interfaces but `lo`. */
  interfaces: () => string[];
}

/** A name for a network namespace of this run. */
export function newNetnsName(): string {
  return `${netnsPrefix()}${crypto.randomUUID().slice(0, 13)}`;
}

/** Calls `fn` with a fresh network namespace, deleted afterwards even when `fn` fails. */
export async function withNetns<T>(fn: (netns: Netns) => T | Promise<T>): Promise<T> {
  const name = newNetnsName();
  ip("netns", "add", name);
  const netns: Netns = {
    name,
    path: `/var/run/netns/${name}`,
    ip: (...args) => ip("-netns", name, ...args),
    interfaces: () =>
      (JSON.parse(netns.ip("-json", "link", "show")) as { ifname: string }[])
        .map((link) => link.ifname)
        .filter((link) => link !== "lo"),
  };
  try {
    return await fn(netns);
  } finally {
    ip("netns", "del", name);
  }
}

function ip(...args: string[]): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(["ip", ...args]);
  if (exitCode === 0) return stdout.toString();
  throw new Error(`Cannot run ip ${args.join(" ")}: ${stderr.toString().trim()}`);
}

/** Folder of the reference plugins, or undefined where they are not installed. */
export const realPluginDir: string | undefined = findPluginDir();

/** The living processes of a group: what a run left behind. Zombies do not count. */
export function groupMembers(pgid: number): number[] {
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .filter((pid) => {
      const path = `/proc/${pid}/stat`;
      // `pid (name) state ppid pgrp …`
      const stat = readIfThere(path);
      const [state, , group] = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
      return state !== "Z" && Number(group) === pgid;
    })
    .map(Number);
}

/** A process may end between its listing and the read, or during the read (ESRCH). */
function readIfThere(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if (["ENOENT", "ESRCH"].includes((error as NodeJS.ErrnoException).code ?? "")) return "";
    throw error;
  }
}
