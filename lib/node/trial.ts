/**
 * `genie try`: attaches a throw-away network namespace to each network named, through the whole
 * path that a pod's ADD takes, pings its gateway and the other namespaces, and takes all away.
 */
import { randomBytes } from "node:crypto";
import type { Host, StdinConfig } from "../call.ts";
import { CniError, isNetworkName, oneLine } from "../cni.ts";
import { type Flags, text, UsageError, wordsOf } from "../config/usage.ts";
import { run } from "../exec.ts";
import { parseJson } from "../json.ts";
import { annotationsCapability } from "../pod.ts";
import { formatDuration } from "../report/quantity.ts";
import { readRecord } from "../report/record_reader.ts";
import { visibleText } from "../report/table.ts";
import { parseResult } from "../result.ts";
import { loadConfig } from "../settings.ts";
import { readOwnConfig } from "./genie_config.ts";
import { programOf, tool } from "./node_view.ts";
import { askedPath } from "./runtimes.ts";

/** Most networks of one trial. */
const networksMax = 8;
/** How long one call of genie may take, in ms: longer than genie gives it. */
const callMs = 130_000;

/** One namespace on its network, and what was seen. */
interface Attempt {
  network: string;
  netns: string;
  containerId: string;
  interface: string;
  addresses: string[];
  mac: string;
  gateways: string[];
  tookUs: number;
  /** Why it is not attached, or its CHECK fails; "" where all is well. */
  error: string;
}

/** One ping. */
interface Ping {
  from: string;
  to: string;
  address: string;
  /** Mean time to the answer, in µs; null without one. */
  us: number | null;
}

/**
 * Runs `genie try`. @returns exit status: 1 where something does not work, or is left behind
 * @param findProgram names this program, which is run as the runtime runs it
 * @throws UsageError for words that make no sense; CniError 5 without root, or without `ip`
 */
export async function runTry(host: Host, flags: Flags, findProgram: () => string): Promise<number> {
  const networks = readNetworks(flags);
  const program = findProgram();
  host.catchSignals?.();
  const own = readOwnConfig(text(flags, "cni-config"));
  const { stateDir, binDirs } = await loadConfig(own);
  const path = [...askedPath({ binDirs }), ...binDirs].join(":");
  const call = { host, own: { ...own, cniVersion: "1.0.0" }, program, path };
  const say = (line: string) => void (flags["json"] || host.stdout(`${visibleText(line)}\n`));
  const attempts: Attempt[] = [];
  const pings: Ping[] = [];
  try {
    for (const network of networks) {
      if (host.signal.aborted) break;
      const attempt = newAttempt(network);
      attempts.push(attempt);
      await tool(host, "ip", ["netns", "add", attempt.netns]);
      await attach(call, attempt);
      say(sayAttempt(attempt));
      for (const gateway of attempt.gateways) {
        pings.push(await ping(host, attempt, { name: "its gateway", address: gateway }));
        say(sayPing(pings.at(-1)));
      }
    }
    for (const [from, to] of pairsOf(attempts)) {
      for (const address of to.addresses) {
        const plain = address.replace(/\/.*/, "");
        pings.push(await ping(host, from, { name: to.network, address: plain }));
        say(sayPing(pings.at(-1)));
      }
    }
  } finally {
    for (const attempt of attempts.toReversed()) await takeAway(call, attempt);
  }
  const ids = attempts.map(({ containerId }) => containerId);
  const left = attempts.filter(({ error }) => error.startsWith(leftWords)).length;
  const onRecord = countRows(stateDir, ids);
  say(onRecord + left === 0 ? "all is taken away again" : `left on record: ${onRecord}: genie gc`);
  const isWell =
    attempts.every(({ error }) => error === "") && pings.every(({ us }) => us !== null);
  if (flags["json"]) {
    const shown = attempts.map(({ netns: _, ...rest }) => rest);
    host.stdout(`${JSON.stringify({ version: 1, ok: isWell, attempts: shown, pings }, null, 2)}\n`);
  }
  return isWell && onRecord === 0 ? 0 : 1;
}

const leftWords = "it cannot be taken away";

/** @throws UsageError for anything but a few names of networks */
function readNetworks(flags: Flags): string[] {
  const networks = wordsOf(flags).flatMap((word) => word.split(","));
  if (networks.length === 0) throw new UsageError("Which networks? genie validate lists them");
  if (networks.length > networksMax) throw new UsageError(`At most ${networksMax} at once`);
  const wrong = networks.find((one) => !isNetworkName(one));
  if (wrong !== undefined) throw new UsageError(`Invalid name of a network: "${wrong}"`);
  return networks;
}

function newAttempt(network: string): Attempt {
  const containerId = `genie-try-${randomBytes(6).toString("hex")}`;
  const none = { interface: "", addresses: [], mac: "", gateways: [], tookUs: 0, error: "" };
  return { network, netns: containerId, containerId, ...none };
}

interface TrialCall {
  host: Host;
  own: StdinConfig;
  program: string;
  path: string;
}

/** Calls genie as the runtime does. */
async function callGenie({ host, own, program, path }: TrialCall, one: Attempt, command: string) {
  const env = {
    CNI_COMMAND: command,
    CNI_CONTAINERID: one.containerId,
    CNI_NETNS: `/run/netns/${one.netns}`,
    CNI_IFNAME: "eth0",
    CNI_PATH: path,
    ...(host.env["PATH"] !== undefined && { PATH: host.env["PATH"] }),
  };
  const runtimeConfig = { [annotationsCapability]: { cni: one.network } };
  const stdin = JSON.stringify({ ...own, runtimeConfig });
  // What was begun is brought to its end, whatever we are asked for meanwhile.
  const ended = await run(program, [], { env, stdin, timeoutMs: callMs });
  const isDone = ended.kind === "exit" && ended.status === 0;
  return { ...ended, isDone, error: isDone ? "" : whyOf(ended.stdout, ended.kind) };
}

function whyOf(stdout: string, kind: string): string {
  const [, message] = /"msg":\s*("(?:[^"\\]|\\.)*")/.exec(stdout) ?? [];
  if (message === undefined) return `genie gave no answer (${kind})`;
  return oneLine(String(parseJson(message, "its error")), 1000);
}

async function attach(call: TrialCall, one: Attempt): Promise<void> {
  const added = await callGenie(call, one, "ADD");
  one.tookUs = added.durationUs;
  one.error = added.error;
  if (!added.isDone) return;
  const result = parseResult(parseJson(added.stdout, "genie's answer"), "1.0.0");
  const found = result.interfaces.find(({ sandbox }) => sandbox !== undefined);
  one.interface = found?.name ?? "";
  one.mac = found?.mac ?? "";
  one.addresses = result.ips.map(({ address }) => address);
  one.gateways = result.ips.flatMap(({ gateway }) => gateway ?? []);
  const prevResult = parseJson(added.stdout, "genie's answer");
  const own = { ...call.own, prevResult };
  const checked = await callGenie({ ...call, own }, one, "CHECK");
  if (!checked.isDone) one.error = `CHECK: ${checked.error}`;
}

async function takeAway(call: TrialCall, one: Attempt): Promise<void> {
  const { isDone, error } = await callGenie(call, one, "DEL");
  if (!isDone) one.error = `${leftWords}: ${error}`;
  await tool(call.host, "ip", ["netns", "del", one.netns]).catch((reason: unknown) => {
    if (!(reason instanceof CniError)) throw reason;
    one.error ||= `${leftWords}: ${reason.message}`;
  });
}

/** Each with each of the others that is attached, once. */
function pairsOf(attempts: readonly Attempt[]): [Attempt, Attempt][] {
  const attached = attempts.filter(({ addresses }) => addresses.length > 0);
  return attached.flatMap((from, i) =>
    attached.slice(i + 1).map((to): [Attempt, Attempt] => [from, to]),
  );
}

async function ping(
  host: Host,
  { netns, network }: Attempt,
  to: { name: string; address: string },
): Promise<Ping> {
  const args = ["netns", "exec", netns, programOf("ping"), "-n", "-c", "3", "-i", "0.2", "-W", "2"];
  const { stdout } = await tool(host, "ip", [...args, to.address], true);
  const [, mean] = /= [\d.]+\/([\d.]+)\//.exec(stdout) ?? [];
  const us = mean === undefined ? null : Math.round(Number(mean) * 1000);
  return { from: network, to: to.name, address: to.address, us };
}

function sayAttempt(one: Attempt): string {
  const { network, addresses, mac, error } = one;
  if (one.interface === "") return `${network}: not attached: ${error}`;
  const where = `${one.interface} ${addresses.join(", ") || "without an address"}`;
  const check = error === "" ? "CHECK ok" : error;
  return `${network}: attached in ${formatDuration(one.tookUs)}: ${where}, MAC ${mac}; ${check}`;
}

function sayPing(one: Ping | undefined): string {
  if (!one) return "";
  const answer = one.us === null ? "does not answer" : `answers in ${formatDuration(one.us)}`;
  return `  ${one.from} → ${one.to} (${one.address}): ${answer}`;
}

function countRows(stateDir: string, ids: readonly string[]): number {
  const some = "container_id IN (SELECT value FROM json_each(?))";
  const sql = `SELECT count(*) AS many FROM attachments WHERE ${some}`;
  const row = readRecord(stateDir, ({ database }) => database.query(sql).get(JSON.stringify(ids)));
  return (row as { many: number } | undefined)?.many ?? 0;
}
