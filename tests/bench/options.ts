/** The command line of the bench: what to measure, and how much. Pure. */
import { join } from "node:path";
import { parseArgs } from "node:util";
import type { Need } from "../needs.ts";
import type { PeerFiles } from "./peers.ts";
import { scenarios, selectScenarios } from "./scenarios.ts";

/** What the bench needs. */
export const benchNeeds: Need[] = ["network namespaces", "containernetworking-plugins"];

/** What a run is made of; one word of `--only`, or all. */
const parts = ["rounds", "parts", "storms", "scale"] as const;
type Part = (typeof parts)[number];

const usage = `Usage: bun run bench [options]

Measures genie against the delegates it calls: time, CPU, memory, storms of calls, large records,
and where the time of a call goes, in ms and in floors: what a compiled Bun program that
only reads stdin and answers takes in the same run. Needs root, and the packages
containernetworking-plugins and iproute2; what strace and perf would tell is left out without them.
Writes tests/bench/results.md, unless --quick, --only or --compare.

  --rounds N        rounds, one of every contender each (default 31)
  --only NAME       one part (${parts.join(", ")}), or the contenders whose name holds
                    NAME and what they are compared with
  --storm N,...     calls started at once (default 100,300; 0 for no storm)
  --binary PATH     genie to measure, as it is (default: dist/genie, built first)
  --compare PATH    another genie to measure beside it, in turns: every row of the rounds and of
                    the storms with the ratio of the two
  --peer PATH       another delegating plugin to measure beside genie, with
  --peer-conf FILE  its CNI config; a pair may be given several times, see tests/bench/peers.ts
  --results FILE    where the tables go, as Markdown ("" for nowhere)
  --json FILE       write every figure to FILE
  --quick           few rounds, storms of 10, small records: shows that it runs, measures little
  --help            this text

Contenders: ${scenarios.map(({ name }) => name).join(", ")}.
Files go to TMPDIR: its file system holds genie's record, whose writes are part of the time.
`;

/** What to measure, and how much. */
export interface Options {
  rounds: number;
  memoryRounds: number;
  /** Rounds in which calls are taken apart. */
  dissections: number;
  parts: Part[];
  /** Part of a contender's name. */
  only: string;
  stormCounts: number[];
  /** Storms of 100 per contender, fewer of more; besides one for memory. */
  storms: number;
  scale: { rounds: number; rows: number; live: number };
  binary: string;
  /** The genie to compare it with, or "". */
  compare: string;
  peers: PeerFiles[];
  results: string;
  json: string;
}

/** The options, or what to say and with which exit status. */
export function readOptions(args: string[]): Options | { status: number; text: string } {
  const options = {
    rounds: { type: "string" },
    only: { type: "string", default: "" },
    storm: { type: "string" },
    binary: { type: "string", default: "" },
    compare: { type: "string", default: "" },
    peer: { type: "string", multiple: true, default: [] as string[] },
    "peer-conf": { type: "string", multiple: true, default: [] as string[] },
    results: { type: "string" },
    json: { type: "string", default: "" },
    quick: { type: "boolean", default: false },
    help: { type: "boolean", default: false },
  } as const;
  try {
    const { values } = parseArgs({ args, options });
    if (values.help) return { status: 0, text: usage };
    const { only, quick, compare } = values;
    const part = parts.find((one) => one === only);
    const named = part === undefined ? only : "";
    const peers = pairs(values.peer, values["peer-conf"]);
    if (selectScenarios(scenarios, named).length === 0 && peers.length === 0) {
      throw new Error(`no contender is named like "${only}"`);
    }
    const storm = values.storm ?? (quick ? "10" : "100,300");
    const counts = storm.split(",").map((text) => readCount("--storm", text, 0));
    const whole = join(import.meta.dir, "results.md");
    return {
      rounds: readCount("--rounds", values.rounds ?? (quick ? "3" : "31"), 1),
      memoryRounds: quick ? 1 : 5,
      dissections: quick ? 1 : 9,
      parts: part ? [part] : named === "" ? [...parts] : ["rounds"],
      only: named,
      stormCounts: counts.filter((count) => count > 0),
      storms: quick ? 1 : 3,
      scale: quick
        ? { rounds: 1, rows: 2000, live: 120 }
        : { rounds: 51, rows: 1_000_000, live: 5000 },
      ...{ binary: values.binary, compare, peers, json: values.json },
      results: values.results ?? (quick || only !== "" || compare !== "" ? "" : whole),
    };
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    return { status: 2, text: `bench: ${said}\n\n${usage}` };
  }
}

/** Each peer with its config, in order. */
function pairs(binaries: string[], confs: string[]): PeerFiles[] {
  return Array.from({ length: Math.max(binaries.length, confs.length) }, (_, i) => {
    const [binary, conf] = [binaries[i], confs[i]];
    if (binary !== undefined && conf !== undefined) return { binary, conf };
    throw new Error("--peer and --peer-conf belong together, as often as there are peers");
  });
}

function readCount(option: string, text: string, min: number): number {
  const count = /^\d{1,5}$/.test(text) ? Number(text) : -1;
  if (count >= min) return count;
  throw new Error(`${option} needs a whole number, ${min} or more`);
}
