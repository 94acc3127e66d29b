/**
 * One call of the protocol in this process: what genie.ts does with its environment and streams,
 * without a process of its own. For `bun run test:fast`, which does not build the binary.
 */
import type { Host, Request } from "../lib/call.ts";
import {
  isSupported,
  printable,
  toCniError,
  version,
  writeError,
  writeResult,
} from "../lib/cni.ts";
import { readCommand, readRequest } from "../lib/request.ts";
import { type GenieRun, makeHost } from "./fakes.ts";

/** Runs a call with exactly this environment and stdin. */
export async function callInside(env: Record<string, string>, stdin: string): Promise<GenieRun> {
  const fake = makeHost({ env, stdin });
  const host: Host = {
    ...fake,
    stderr: (text) => fake.stderr(printable(text)),
    now: () => Date.now(),
  };
  let cniVersion: string | undefined;
  let status = 0;
  try {
    const command = readCommand(env);
    if (command === "VERSION") {
      writeResult(host, version());
    } else {
      const request = readRequest(host, command);
      cniVersion = request.cniVersion;
      writeResult(host, await operate(host, request));
    }
  } catch (error) {
    writeError(host, toCniError(error), isSupported(cniVersion) ? cniVersion : undefined);
    status = 1;
  }
  return { status, ...fake.written };
}

async function operate(host: Host, request: Request): Promise<object | undefined> {
  switch (request.command) {
    case "ADD":
      return (await import("../lib/attach.ts")).attach(host, request);
    case "CHECK":
      return (await import("../lib/check.ts")).check(host, request);
    case "STATUS":
      return (await import("../lib/status.ts")).status(host, request);
    case "DEL":
      return (await import("../lib/detach.ts")).detach(host, request);
    case "GC":
      return (await import("../lib/gc.ts")).gc(host, request);
  }
}
