/**
 * Delegates that misbehave in every way there is, at random places: which plugin of which network,
 * in ADD, DEL or CHECK, several at once. What genie answers is known beforehand: the code of the
 * first one that failed, in time, with the rollback done and on record what could not be undone.
 * Once they behave again, a DEL leaves nothing.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { code } from "../../lib/cni.ts";
import { isObject } from "../../lib/json.ts";
import type { GenieRun } from "../fakes.ts";
import type { Behaviour } from "../fixtures/delegate.ts";
import {
  clean,
  ending,
  makeNetworks,
  delegates as running,
  writePlugins,
} from "../fixtures/faults.ts";
import { annotated, checkFailure, left, type Node, wire, wireError } from "../wire.ts";
import { endMarked, marked, newMark } from "./marked.ts";
import { type Case, type Part, runCases } from "./part.ts";
import { oneIn, pick, type Random } from "./seed.ts";

/** A way to misbehave, and the codes it comes to; 0 where it does no harm. */
interface Fault {
  does: Behaviour;
  /** In ADD, where a result is due. */
  add: number;
  /** In DEL and CHECK, where nothing is. */
  other: number;
  /** Ends only by its deadline. */
  isSlow?: boolean;
  /** Leaves a process that nobody has to end: plugins may start daemons. */
  leaves?: boolean;
}

const { delegateProtocol: protocol, delegateTimeout: timeout } = code;
const bad = { add: protocol, other: protocol };
/** Only what it prints is wrong, which nobody reads in DEL and CHECK. */
const badText = { add: protocol, other: 0 };
const late = { add: timeout, other: timeout, isSlow: true };
const fine = { add: 0, other: 0 };
const minute = { seconds: 60 };
const foreign = {
  cniVersion: "1.1.0",
  interfaces: [{ name: "eth7", sandbox: "/var/run/netns/other" }],
  ips: [{ address: "10.9.0.2/24", interface: 0 }],
};
const errorText = '{"cniVersion":"1.1.0","code":7,"msg":"no"}';

/** See {@link Fault}. */
const faults: Record<string, Fault> = {
  "is killed": { does: { signal: "SIGKILL" }, ...bad },
  "ends by SIGTERM": { does: { signal: "SIGTERM" }, ...bad },
  hangs: { does: { hang: true }, ...late },
  "hangs, deaf to SIGTERM": { does: { hang: true, ignoreSigterm: true }, ...late },
  "is stopped": { does: { signal: "SIGSTOP" }, ...late },
  "hangs with a child": { does: { hang: true, grandchild: minute }, ...late },
  "leaves a child that holds its outputs": { does: { grandchild: minute }, ...fine, leaves: true },
  "leaves a child in another session": {
    ...{ does: { grandchild: { ...minute, setsid: true } }, ...fine },
    leaves: true,
  },
  "leaves a child and is killed": {
    ...{ does: { grandchild: minute, signal: "SIGKILL" }, ...bad },
    leaves: true,
  },
  "floods stdout": { does: { flood: { to: "stdout", bytes: 4 << 20 } }, ...bad },
  "floods stdout, not quite": { does: { flood: { to: "stdout", bytes: 900_000 } }, ...badText },
  "floods stderr": { does: { flood: { to: "stderr", bytes: 4 << 20 } }, ...fine },
  "closes stdout": { does: { closeStdout: true }, ...badText },
  "closes stdout and fails": { does: { closeStdout: true, status: 3 }, ...bad },
  "prints garbage": { does: { raw: "\u0000\u001b[2J{{{ \u202e" }, ...badText },
  "prints garbage and fails": { does: { raw: "panic: \u001b[31mnil\n\n", status: 2 }, ...bad },
  "prints half a result": { does: { raw: '{"cniVersion":"1.1.0","ips":[{"addr' }, ...badText },
  "prints a list": { does: { raw: '[{"cniVersion":"1.1.0"}]' }, ...badText },
  "prints nothing": { does: { raw: "" }, ...badText },
  "prints two results": { does: { raw: '{"cniVersion":"1.1.0"}{}' }, ...badText },
  "prints another interface's result": { does: { result: foreign }, ...badText },
  "prints an error and exits with 0": { does: { raw: errorText }, ...badText },
  "fails without a word": { does: { raw: "", status: 1 }, ...bad },
  "fails with a code of its own": {
    does: { error: { code: 50, msg: "busy" } },
    ...{ add: 50, other: 50 },
  },
  "fails without a code": { does: { error: { code: 0, msg: "busy" } }, ...bad },
  "fails with 255": { does: { raw: errorText, status: 255 }, add: 7, other: 7 },
  "talks on stderr": { does: { stderr: "\u001b[2Jwarning: not found\n" }, ...fine },
  "takes its time": { does: { delayMs: 100 }, ...fine },
};

/** What its plugins are given, in seconds; far more than they need. */
const timeoutSeconds = 4;

const plugins = ["a", "b", "c"] as const;
type Plugin = (typeof plugins)[number];
const verbs = ["ADD", "DEL", "CHECK"] as const;
type Verb = (typeof verbs)[number];
/** The plugins of each network, in the order of the chain. */
const chains = { blue: ["a", "b"], green: ["c"] } as const;
type Network = keyof typeof chains;

/** What each plugin does wrong, by `a ADD`. */
type Drawn = Map<`${Plugin} ${Verb}`, Fault>;

/** The code a plugin's call comes to, 0 for success. */
function codeOf(drawn: Drawn, plugin: Plugin, verb: Verb): number {
  const fault = drawn.get(`${plugin} ${verb}`);
  return (verb === "ADD" ? fault?.add : fault?.other) ?? 0;
}

/** What is to come, from the faults alone. */
interface Expected {
  add: number;
  check: number;
  del: number;
  /** Networks on record after ADD, in the order of their interfaces. */
  kept: Network[];
  /** Those still there after DEL. */
  failing: Network[];
}

function expect(drawn: Drawn, order: Network[]): Expected {
  const inOrder = order.flatMap((network) =>
    chains[network].map((plugin) => ({ network, plugin: plugin as Plugin })),
  );
  const failed = inOrder.findIndex(({ plugin }) => codeOf(drawn, plugin, "ADD") !== 0);
  const done = failed < 0 ? inOrder : inOrder.slice(0, failed + 1);
  const isStuck = (of: typeof inOrder, network: Network) =>
    of.some((one) => one.network === network && codeOf(drawn, one.plugin, "DEL") !== 0);
  const kept = failed < 0 ? order : order.filter((network) => isStuck(done, network));
  const firstOf = (verb: Verb, of: typeof inOrder) =>
    of.map(({ plugin }) => codeOf(drawn, plugin, verb)).find((number) => number !== 0) ?? 0;
  // DEL undoes whole chains, also where ADD did not come to their end.
  const undone = inOrder.filter(({ network }) => kept.includes(network)).toReversed();
  return {
    add: firstOf("ADD", inOrder),
    check: firstOf("CHECK", inOrder),
    del: firstOf("DEL", undone),
    kept,
    failing: kept.filter((network) => isStuck(undone, network)),
  };
}

/** One to three faults; of those that need their deadline at most two. */
function draw(random: Random): { drawn: Drawn; told: string[] } {
  const drawn: Drawn = new Map();
  const told: string[] = [];
  for (let left = 1 + random(3); left > 0; left--) {
    const name = pick(random, Object.keys(faults));
    const at = `${pick(random, plugins)} ${pick(random, verbs)}` as const;
    const fault = faults[name];
    const slow = [...drawn.values()].filter(({ isSlow }) => isSlow).length;
    if (!fault || drawn.has(at) || (fault.isSlow && slow === 2)) continue;
    drawn.set(at, fault);
    told.push(`${at} ${name}`);
  }
  return { drawn, told };
}

function write(node: Node, drawn: Drawn): void {
  const scripts: Parameters<typeof writePlugins>[1] = {};
  for (const [at, { does }] of drawn) {
    const [plugin, verb] = at.split(" ") as [Plugin, Verb];
    scripts[plugin] = { ...scripts[plugin], [verb]: does };
  }
  writePlugins(node, scripts);
}

function shortenTimeouts({ tableFile }: Node): void {
  const table = readFileSync(tableFile, "utf8");
  writeFileSync(
    tableFile,
    table.replace(/^\[plugins\..*$/gm, `$&\ntimeout = "${timeoutSeconds}s"`),
  );
}

/** The answer must be what is expected, and well-formed whatever it is. */
function checkAnswer(what: string, run: GenieRun, expected: number): void {
  const said = `${run.stdout.slice(0, 600)}${run.stderr.slice(0, 600)}`;
  const found = run.status === 0 ? 0 : wireError(run).code;
  if (found !== expected) throw new Error(`${what} ended with ${found}, not ${expected}: ${said}`);
  if (found !== 0) checkFailure(run);
  if (found !== 0 || what !== "ADD") return;
  const result: unknown = JSON.parse(run.stdout);
  const interfaces = isObject(result) ? result["interfaces"] : undefined;
  const names = Array.isArray(interfaces) ? interfaces.map((one) => one.name) : [];
  if (!Bun.deepEquals(names, ["eth0", "eth1"])) throw new Error(`ADD answered ${run.stdout}`);
}

function same(what: string, found: unknown, expected: unknown): void {
  if (Bun.deepEquals(found, expected)) return;
  throw new Error(`${what}: ${JSON.stringify(found)}, not ${JSON.stringify(expected)}`);
}

async function runCase({ random, count }: Case): Promise<void> {
  const { drawn, told } = draw(random);
  const order: Network[] = oneIn(random, 2) ? ["blue", "green"] : ["green", "blue"];
  const mark = newMark();
  using node = makeNetworks();
  shortenTimeouts(node);
  const stdin = annotated({ cni: order.join(",") });
  const call = async (command: Verb, expected: number) => {
    const startedMs = performance.now();
    const run = await wire(node, { command, stdin, env: mark });
    checkAnswer(command, run, expected);
    const seconds = (performance.now() - startedMs) / 1000;
    // Every plugin once, those that hang twice at most, and time for a busy machine.
    const slow = [...drawn.values()].filter(({ isSlow }) => isSlow).length;
    if (seconds > 2 * slow * (timeoutSeconds + 3) + 30) throw new Error(`${command}: ${seconds} s`);
    count(expected === 0 ? "calls that succeeded" : "calls that failed");
  };
  const rowsOf = (networks: Network[], state: string) =>
    order.flatMap((network, i) => (networks.includes(network) ? [`c1 eth${i} ${state}`] : []));
  try {
    write(node, drawn);
    const expected = expect(drawn, order);
    await call("ADD", expected.add);
    const isAttached = expected.add === 0;
    const state = isAttached ? "attached" : "failing";
    same("rows after ADD", left(node).rows, rowsOf(expected.kept, state));
    if (isAttached) await call("CHECK", expected.check);
    await call("DEL", expected.del);
    same("rows after DEL", left(node).rows, rowsOf(expected.failing, "failing"));
    write(node, new Map());
    await call("DEL", 0);
    same("left in the end", ending(node), clean);
    const mayLeave = [...drawn.values()].some(({ leaves }) => leaves);
    if (!mayLeave) same("processes in the end", [...running(node), ...marked(mark)], []);
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    throw new Error(`${told.join("; ")}, of ${order}: ${said}`);
  } finally {
    endMarked(mark);
  }
}

/** See above. */
export const delegates: Part = {
  title: "delegates that are killed, hang, fork, flood, lie or say nothing",
  needs: [],
  limitSeconds: { short: 40, full: 180 },
  run: (asked) => runCases(asked, { short: 32, full: 400, workers: 6 }, runCase),
};
