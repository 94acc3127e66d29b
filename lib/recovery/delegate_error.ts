/**
 * What the ending of a delegate that failed means: its own error, or ours when it broke the
 * protocol. Pure. Source: CNI SPEC 1.1 §5 "Error", §4.
 */
import type { Ending, Output } from "../call.ts";
import { CniError, code, oneLine, toCniError } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import type { PluginConfig } from "../networks.ts";
import type { Attachment } from "../record.ts";

/** Longest part of a delegate's stderr that goes into an error, in characters. */
const stderrTailLength = 4096;

/**
 * What an ending means; undefined for a success.
 * @returns 102 when the plugin cannot run at all, 103 when it took too long, 104 when it broke the
 *   protocol, 11 when another try may work, else the plugin's own code
 */
export function endingError(
  ending: Ending & Output,
  attachment: Attachment,
  plugin: PluginConfig,
  command: string,
): CniError | undefined {
  const tail = ending.stderr.slice(-stderrTailLength);
  const who = `${subject(attachment, command)}: plugin "${plugin.type}"`;
  const fail = (number: number, issue: string, details = tail, cause?: unknown) =>
    new CniError(number, `${who} ${issue}`, { details, cause });
  switch (ending.kind) {
    case "exit":
      return ending.status === 0 ? undefined : exitError(ending, fail);
    case "signal":
      return fail(code.delegateProtocol, `was killed by ${ending.signal}`);
    case "timeout": {
      const ms = Math.round(ending.durationUs / 1000);
      return fail(code.delegateTimeout, `timed out after ${ms} ms, it was killed`);
    }
    case "overflow":
      return fail(code.delegateProtocol, "printed more than 1 MiB, it was killed");
    case "aborted":
      return fail(code.tryAgainLater, "was ended because genie was asked to end");
    case "spawn":
      if (ending.reason === "ETXTBSY") {
        return fail(code.tryAgainLater, "is being replaced (text file busy), try again");
      }
      if (!unusableFile.test(ending.reason)) {
        // No memory, no process, no file descriptor left: the next try may find some.
        return fail(code.tryAgainLater, `cannot be started now (${ending.reason}), try again`);
      }
      return fail(
        code.delegateNotFound,
        `cannot be started (${ending.reason}), install it or mend its file`,
        "",
        ending,
      );
  }
}

/** Reasons for which a binary cannot run until someone mends its file. */
const unusableFile = /^(ENOENT|ENOTDIR|ELOOP|EACCES|EPERM|EISDIR|ENOEXEC)$/;

/** A plugin that exits with a failure says why on stdout (SPEC §5), or breaks the protocol. */
function exitError(
  ending: { status: number; stdout: string; stderr: string },
  fail: (number: number, issue: string, details?: string) => CniError,
): CniError {
  let document: unknown;
  try {
    document = parseJson(ending.stdout, "its error");
  } catch (error) {
    const said = ending.stdout.trim() === "" ? "printed nothing" : "printed no error document";
    return fail(
      code.delegateProtocol,
      `exited with status ${ending.status} and ${said}`,
      ending.stderr.slice(-stderrTailLength) || toCniError(error).details,
    );
  }
  if (!isObject(document) || typeof document["msg"] !== "string") {
    return fail(code.delegateProtocol, `exited with status ${ending.status} without a message`);
  }
  const own = document["code"];
  const known = typeof own === "number" && Number.isInteger(own) && own > 0;
  const details = typeof document["details"] === "string" ? document["details"] : "";
  return fail(
    known ? own : code.delegateProtocol,
    `failed: ${oneLine(document["msg"], 700)}`,
    [details, ending.stderr.slice(-stderrTailLength)].filter((text) => text !== "").join("\n"),
  );
}

/** An ADD that ended well, by a plugin whose answer is none. */
export function protocolError(
  attachment: Attachment,
  plugin: PluginConfig,
  issue: string,
  stdout: string,
): CniError {
  const who = `${subject(attachment, "ADD")}: plugin "${plugin.type}"`;
  const details = stdout.slice(0, 1024);
  return new CniError(code.delegateProtocol, `${who} broke the protocol: ${issue}`, { details });
}

const verbs: Record<string, string> = {
  ADD: "attach",
  DEL: "detach",
  CHECK: "check",
  GC: "collect garbage of",
  STATUS: "use",
};

function subject(attachment: Attachment, command: string): string {
  const { namespace, name } = attachment.pod;
  const pod = name === "" ? "" : ` of pod ${namespace === "" ? name : `${namespace}/${name}`}`;
  const at = attachment.ifName === "" ? "" : ` (${attachment.ifName})`;
  return `Cannot ${verbs[command]} network "${attachment.network}"${at}${pod}`;
}
