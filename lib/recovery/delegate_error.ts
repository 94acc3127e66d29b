/**
 * What the ending of a delegate that failed means: its own error, or ours when it broke the
 * protocol. Pure. Source: CNI SPEC 1.1 §5 "Error", §4.
 */
import type { Ending, Output } from "../call.ts";
import { CniError, code, oneLine } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import type { PluginConfig } from "../networks.ts";
import type { Attachment, Result } from "../record.ts";

/** Longest part of a delegate's stderr that goes into an error, in characters. */
const stderrTailLength = 4096;
/** Longest part of a plugin's words that goes into the message, in characters. */
const wordsLength = 300;
/** How far back an error document is looked for, in characters, and at how many places. */
const documentLengthMax = 64 * 1024;
const documentsMax = 32;

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
  { status, ...ending }: { status: number; stdout: string; stderr: string },
  fail: (number: number, issue: string, details?: string) => CniError,
): CniError {
  const document = findDocument(ending.stdout);
  if (!isObject(document) || typeof document["msg"] !== "string") {
    const stdout = ending.stdout.trim();
    const stderr = ending.stderr.trim();
    // Where it broke the protocol, its own words are all there is to go by.
    const words = (stdout || stderr).slice(-wordsLength);
    const missing = stdout === "" ? "and printed nothing" : "and printed no error document";
    const issue = document === undefined ? missing : "without a message";
    return fail(
      code.delegateProtocol,
      `exited with status ${status} ${issue}${words && `: ${oneLine(words, wordsLength)}`}`,
      tailsOf(stdout, stderr),
    );
  }
  const own = document["code"];
  const known = typeof own === "number" && Number.isInteger(own) && own > 0;
  const details = typeof document["details"] === "string" ? document["details"] : "";
  const why = document["msg"].trim() || details || "it does not say why";
  return fail(
    known ? own : code.delegateProtocol,
    `failed: ${oneLine(why, 700)}`,
    tailsOf(details, ending.stderr),
  );
}

/** The ends of what a plugin said, below each other. */
function tailsOf(...texts: string[]): string {
  const tails = texts.map((text) => text.slice(-stderrTailLength));
  return tails.filter((text) => text !== "").join("\n");
}

/**
 * What a plugin printed, decoded; where that is not one JSON text, the last object in it that has a
 * message: some print log lines, or the result of a plugin of theirs, before their error document.
 */
function findDocument(stdout: string): unknown {
  const text = stdout.slice(-documentLengthMax);
  const end = text.lastIndexOf("}") + 1;
  const starts = [...text.matchAll(/(?:^|\})\s*\{/gm)].slice(-documentsMax).reverse();
  const ends = starts.map((match) => text.slice(match.index + match[0].length - 1, end));
  for (const part of [stdout, ...ends]) {
    try {
      const found = parseJson(part, "its error");
      if (part === stdout || (isObject(found) && typeof found["msg"] === "string")) return found;
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
    }
  }
  return undefined;
}

/** Faults of released plugins, whose CHECK fails for a pod that is as ADD left it. */
const checkFaults: { message: RegExp; fault: string; hits: (result?: Result) => boolean }[] = [
  {
    message: /plugin "tuning" failed: open \S*\/IFNAME\//,
    fault: 'tuning of release 1.1.1 does not replace "IFNAME" in a sysctl when it checks it',
    hits: () => true,
  },
  {
    message: /plugin "portmap" failed: could not check ipv6 /,
    fault: "portmap of release 1.1.1 looks for the IPv6 rules of a pod that has no IPv6 address",
    hits: (result) => !result?.ips.some(({ address }) => address.includes(":")),
  },
  {
    message: /plugin "bridge" failed: no plugin name provided/,
    fault: "bridge of release 1.1.1 asks the IPAM when it checks a network that has none",
    hits: (result) => !result?.ips.length,
  },
];

/** The error of a failed CHECK; where it is a known fault of the plugin, with that and a remedy. */
export function withKnownFault(error: CniError, result: Result | undefined): CniError {
  const found = checkFaults.find((one) => one.message.test(error.message) && one.hits(result));
  if (!found) return error;
  const advice = '"disableCheck": true in the config list of the network turns its CHECK off';
  return new CniError(error.code, error.message, {
    details:
      `A known fault: ${found.fault}. The pod may be whole; ${advice}.\n${error.details}`.trim(),
    cause: { kind: "known-fault" },
  });
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
