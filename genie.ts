/** With CNI_COMMAND set: a CNI delegating plugin (SPEC 1.1). Otherwise: the operator's commands. */

import type { Host, Request } from "./lib/call.ts";
import { printable, toCniError, version, writeError, writeResult } from "./lib/cni.ts";
import { libc } from "./lib/kernel.ts";
import { readCommand, readRequest } from "./lib/request.ts";
import { formatTrace, mark, readStdin, startTrace, writeAll } from "./lib/streams.ts";

if (process.env["GENIE_TRACE"] === "1") startTrace(Bun.nanoseconds());
const isPlugin = process.env["CNI_COMMAND"] !== undefined;
const startedMs = Date.now() - Bun.nanoseconds() / 1_000_000;
const stop = new AbortController();
const onSignal = () => stop.abort();
const host: Host = {
  env: process.env,
  stdin: readStdin,
  stdout: (text) => writeAll(1, text),
  stderr: (text) => writeAll(2, printable(text)),
  // A change of the system clock must neither cut a call short nor prolong it.
  now: isPlugin ? () => Math.floor(startedMs + Bun.nanoseconds() / 1_000_000) : Date.now,
  signal: stop.signal,
  log: { level: "info", file: "" },
  endsAtOnce: true,
  catchSignals: () => void process.on("SIGTERM", onSignal).on("SIGINT", onSignal),
};
const status = isPlugin
  ? await plugin()
  : await (await import("./lib/cli/command_line.ts")).runCommand(host, process.argv.slice(2));
mark("answer");
const trace = formatTrace();
if (trace) host.stderr(`${trace}\n`);
// _exit closes nothing, just like a kill: process.exit would take a tenth of the call.
if (isPlugin && host.env["BUN_BYTECODE_ORDER_OUT"] === undefined) libc()?._exit(status);
process.exit(status);

/** Runs one CNI operation and returns the exit status (SPEC 1.1 §2 "Errors"). */
async function plugin(): Promise<number> {
  let cniVersion: Request["cniVersion"] | undefined;
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
    writeError(host, toCniError(error), cniVersion);
    return 1;
  }
}

/** Runs one operation; it loads only the modules it needs, because every pod waits for that. */
async function operate(request: Request): Promise<object | undefined> {
  switch (request.command) {
    case "ADD":
      return (await import("./lib/attach.ts")).attach(host, request);
    case "CHECK":
      return (await import("./lib/check.ts")).check(host, request);
    case "STATUS":
      return (await import("./lib/status.ts")).status(host, request);
    case "DEL":
      return (await import("./lib/detach.ts")).detach(host, request);
    case "GC":
      return (await import("./lib/gc.ts")).gc(host, request);
  }
}
