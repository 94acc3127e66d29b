/**
 * One call of the protocol inside this process: what `genie.ts` does with its streams and its exit
 * status, as a function of a host.
 */
import { attach } from "../../lib/attach.ts";
import type { Host } from "../../lib/call.ts";
import { check } from "../../lib/check.ts";
import { isSupported, toCniError, version, writeError, writeResult } from "../../lib/cni.ts";
import { detach } from "../../lib/detach.ts";
import { gc } from "../../lib/gc.ts";
import { readCommand, readRequest } from "../../lib/request.ts";
import { status } from "../../lib/status.ts";

const operations = { ADD: attach, CHECK: check, STATUS: status, DEL: detach, GC: gc };

/** Answers one call; returns the exit status. Never rejects. */
export async function answer(host: Host): Promise<number> {
  let cniVersion: string | undefined;
  try {
    const command = readCommand(host.env);
    if (command === "VERSION") {
      writeResult(host, version());
      return 0;
    }
    const request = readRequest(host, command);
    cniVersion = request.cniVersion;
    writeResult(host, await operations[command](host, request));
    return 0;
  } catch (error) {
    writeError(host, toCniError(error), isSupported(cniVersion) ? cniVersion : undefined);
    return 1;
  }
}
