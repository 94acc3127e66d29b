/**
 * What test files begin with: a folder and an API server of their own, config lists, the record of
 * a node, and what a call throws. Call what says "file" at the top level of a test file.
 */
import { afterAll, expect } from "bun:test";
import { join } from "node:path";
import { CniError } from "../lib/cni.ts";
import { closeState, type State, write } from "../lib/database.ts";
import type { StoredAttachment } from "../lib/record.ts";
import { attachments } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { makeHost, type TempDir, tempDir } from "./fakes.ts";

/** A folder that goes away after the tests of the file. */
export function fileDir(): TempDir {
  const dir = tempDir();
  afterAll(() => dir[Symbol.dispose]());
  return dir;
}

/** An API server below that folder, which stops after the tests of the file. */
export async function fileApi(dir: TempDir, keepAlive = false): Promise<ApiServer> {
  const api = await startApiServer(join(dir.path, "api"), { keepAlive });
  afterAll(() => api.stop());
  return api;
}

/** A config list, with each plugin by its type or whole. */
export function configList(
  name: string,
  plugins: readonly (string | object)[],
  cniVersion: string = "1.1.0",
) {
  return {
    cniVersion,
    name,
    plugins: plugins.map((plugin) => (typeof plugin === "string" ? { type: plugin } : plugin)),
  };
}

/** Opens the record in a folder, calls, closes. */
export function withRecordIn<T>(stateDir: string, fn: (state: State) => T): T {
  const state = openState(makeHost(), stateDir);
  try {
    return fn(state);
  } finally {
    closeState(state);
  }
}

/** The attachments on record. */
export function storedRows(node: { state: string }): StoredAttachment[] {
  return withRecordIn(node.state, (state) => attachments(makeHost(), state));
}

/** Changes the record as nobody else would. */
export function runSql(node: { state: string }, text: string): void {
  withRecordIn(node.state, (state) => write(state, () => state.database.run(text)));
}

/** Code and message of an error, as the runtime sees them. */
export interface Failure {
  code: number;
  msg: string;
}

const noFailure: Failure = { code: 0, msg: "it did not fail" };

/**
 * What a call throws.
 * @param hidden text to be replaced in the message: `[[dir.path, "DIR"]]`
 */
export function failureOf(act: () => unknown, ...hidden: [text: string, by: string][]): Failure {
  try {
    act();
  } catch (error) {
    return toFailure(error, hidden);
  }
  return noFailure;
}

/** {@link failureOf} of what takes its time. */
export async function failureOfAsync(
  act: (() => unknown) | Promise<unknown>,
  ...hidden: [text: string, by: string][]
): Promise<Failure> {
  try {
    await (typeof act === "function" ? act() : act);
  } catch (error) {
    return toFailure(error, hidden);
  }
  return noFailure;
}

function toFailure(error: unknown, hidden: [string, string][]): Failure {
  if (!(error instanceof CniError)) throw error;
  const msg = hidden.reduce((text, [from, to]) => text.replaceAll(from, to), error.message);
  return { code: error.code, msg };
}

/** What a {@link Failure} has to be: this code, and a message with this part. */
export function says(code: number, part: string): Failure {
  return { code, msg: expect.stringContaining(part) };
}
