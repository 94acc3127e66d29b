/**
 * What the node agent tells of its node to `genie report --cluster`: `GET /report`, the same as
 * `genie report --json`. It names pods, their addresses and what failed, so the plugin table must
 * ask for it (`agent.report`): whoever reaches the port may read it.
 *
 * Counting a large ledger takes a second and its memory. A process of its own does it, so that the
 * agent goes on meanwhile and stays small, and there is one of them at a time.
 */

import type { Host } from "../cni.ts";
import { run } from "../exec.ts";
import { oneLine } from "../text.ts";
import type { Agent } from "./part.ts";

/** Options of `genie report` that a request may carry, as a flag or with a value. */
const flags = ["failed", "denied"];
const values = ["since", "network", "namespace", "pod", "command", "limit"];
const valueMax = 253;
/** Requests listed at most. */
const limitMax = 1000;
/** What making one may take, in ms, and its size, in bytes. */
const timeoutMs = 20_000;
const reportBytesMax = 8 * 1024 * 1024;
/** The program that runs; after an upgrade it is not the file of its name any more. */
const ownProgram = "/proc/self/exe";

/** A report, or why there is none. */
type Made = { status: 200; body: string } | { status: number; message: string };

/** Answers requests for the report. */
export type Reports = (url: URL) => Promise<Response>;

/** @param program makes it; a test may give another one */
export function openReports(
  { host, config, cniConfig }: Pick<Agent, "host" | "config" | "cniConfig">,
  program = ownProgram,
): Reports {
  let running: { key: string; made: Promise<Made> } | undefined;
  const make = async (key: string, words: string[]): Promise<Made> => {
    if (running?.key === key) return running.made;
    if (running) return { status: 503, message: "another report is being made" };
    const own = cniConfig === undefined ? [] : [`--cni-config=${cniConfig}`];
    const made = makeReport(host, program, ["report", "--json", ...words, ...own]);
    running = { key, made };
    try {
      return await made;
    } finally {
      running = undefined;
    }
  };
  return async (url) => {
    if (!config.agent.report) {
      return answer({ status: 404, message: "agent.report of the plugin table is off" });
    }
    const words = readWords(url.searchParams);
    if (typeof words === "string") return answer({ status: 400, message: words });
    return answer(await make(JSON.stringify(words), words));
  };
}

/** What went wrong is told as the API server tells it, so that it is passed on. */
function answer(made: Made): Response {
  const { status } = made;
  return new Response("body" in made ? made.body : JSON.stringify({ message: made.message }), {
    status,
    headers: {
      "Content-Type": "application/json",
      "Cache-Control": "no-store",
      "X-Content-Type-Options": "nosniff",
      ...(status === 503 && { "Retry-After": "1" }),
    },
  });
}

/** The words of the command line; a text that says what is wrong with the request. */
function readWords(asked: URLSearchParams): string[] | string {
  const words: string[] = [];
  for (const [name, value] of asked) {
    if (flags.includes(name) && value === "true") words.push(`--${name}`);
    else if (values.includes(name) && value.length <= valueMax && !/\p{Cc}/u.test(value)) {
      if (name === "limit" && !(Number(value) <= limitMax)) return `limit is at most ${limitMax}`;
      words.push(`--${name}=${value}`);
    } else return `cannot be asked: ${oneLine(`${name}=${value}`, 300)}`;
  }
  return words.sort();
}

async function makeReport(host: Host, program: string, args: string[]): Promise<Made> {
  const options = { env: {}, stdin: "", timeoutMs, signal: host.signal };
  const ran = await run(program, args, { ...options, stdoutBytesMax: reportBytesMax });
  if (ran.kind === "exit" && ran.status === 0) return { status: 200, body: ran.stdout };
  const said = /^genie: error: (.*)/m.exec(ran.stderr)?.[1] ?? `no report, ${ran.kind}`;
  const isAsked = ran.kind === "exit" && ran.status === 2;
  return { status: isAsked ? 400 : 500, message: oneLine(said, 500) };
}
