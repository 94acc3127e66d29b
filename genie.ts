/** With CNI_COMMAND set: a CNI delegating plugin (SPEC 1.1). Otherwise: the operator's commands. */
import {
  type Host,
  isSupported,
  type Request,
  toCniError,
  version,
  writeError,
  writeResult,
} from "./lib/cni.ts";
import { libc } from "./lib/libc.ts";
import { readCommand, readRequest } from "./lib/request.ts";
import { readStdin, writeAll } from "./lib/streams.ts";
import { printable } from "./lib/text.ts";
import { formatTrace, mark, startTrace } from "./lib/trace.ts";

if (process.env["GENIE_TRACE"] === "1") startTrace(Bun.nanoseconds());
const isPlugin = process.env["CNI_COMMAND"] !== undefined;
const startedMs = Date.now() - Bun.nanoseconds() / 1_000_000;
const ended = new AbortController();
const end = () => ended.abort();
const host: Host = {
  env: process.env,
  stdin: readStdin,
  stdout: (text) => writeAll(1, text),
  stderr: (text) => writeAll(2, printable(text)),
  // A call goes by the time that passes: a clock that is set must not end it, nor prolong it.
  now: isPlugin ? () => Math.floor(startedMs + Bun.nanoseconds() / 1_000_000) : Date.now,
  signal: ended.signal,
  log: { level: "info", file: "" },
  endsAtOnce: true,
  catchSignals: () => void process.on("SIGTERM", end).on("SIGINT", end),
};
const status = isPlugin ? await plugin() : await cli();
mark("answer");
const trace = formatTrace();
if (trace) host.stderr(`${trace}\n`);
// Not process.exit: closing what is open costs a tenth of a call. A killed process does no more.
if (isPlugin && host.env["BUN_BYTECODE_ORDER_OUT"] === undefined) libc()?._exit(status);
process.exit(status);

/** Runs one CNI operation and returns the exit status (SPEC 1.1 §2 "Errors"). */
async function plugin(): Promise<number> {
  let cniVersion: string | undefined;
  try {
    const command = readCommand(host.env);
    if (command === "VERSION") {
      writeResult(host, version());
      return 0;
    }
    const request = readRequest(host, command);
    cniVersion = request.cniVersion;
    mark("request");
    host.catchSignals?.();
    mark("signals");
    writeResult(host, await operate(request));
    return 0;
  } catch (error) {
    writeError(host, toCniError(error), isSupported(cniVersion) ? cniVersion : undefined);
    return 1;
  }
}

/** Each operation loads only what it needs: every pod on the node waits for this. */
async function operate(request: Request): Promise<object | undefined> {
  switch (request.command) {
    case "ADD":
      return (await import("./lib/attach.ts")).add(host, request);
    case "CHECK":
      return (await import("./lib/check.ts")).check(host, request);
    case "STATUS":
      return (await import("./lib/status.ts")).status(host, request);
    case "DEL":
      return (await import("./lib/detach.ts")).del(host, request);
    case "GC":
      return (await import("./lib/gc.ts")).gc(host, request);
  }
}

async function cli(): Promise<number> {
  return (await import("./lib/cli/command_line.ts")).runCommand(host, process.argv.slice(2));
}
