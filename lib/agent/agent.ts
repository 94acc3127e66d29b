/**
 * The node agent: `genie agent`, one process per node, never on the path of an ADD. A table of
 * parts, each of which runs until the agent is asked to end; a part that fails is begun anew, after
 * a pause, and takes no other part with it.
 */
import { join } from "node:path";
import manifest from "../../package.json";
import { type Flags, text } from "../cli/usage.ts";
import { type Host, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { closeState, openState } from "../database.ts";
import { pause } from "../kubernetes/watch.ts";
import { readOwnConfig } from "../node/genie_config.ts";
import { takeFileLock } from "../policy/file_lock.ts";
import { enforcesPolicy, loadConfig } from "../settings.ts";
import { openHealth } from "./health.ts";
import type { Agent, Part } from "./part.ts";
import { openRecord } from "./record.ts";
import { keepsToken, runToken } from "./token.ts";

const parts: readonly Part[] = [
  {
    name: "policy",
    isWanted: enforcesPolicy,
    run: async (agent) => (await import("./policy.ts")).runPolicy(agent),
  },
  {
    name: "token",
    isWanted: (_config, host) => keepsToken(host),
    run: (agent) => runToken(agent),
  },
  {
    name: "conflist",
    // Looked for each time: genie may be installed while we run.
    isWanted: () => true,
    run: async (agent) => (await import("./conflist.ts")).runConflist(agent),
  },
  {
    name: "status",
    isWanted: ({ kubernetes }) => kubernetes.status !== "off",
    run: async (agent) => (await import("./status.ts")).runStatus(agent),
  },
  {
    name: "follow",
    isWanted: ({ agent }) => agent.followAnnotations,
    run: async (agent) => (await import("./follow.ts")).runFollow(agent),
  },
  {
    name: "listen",
    isWanted: ({ agent }) => agent.listen !== "",
    run: async (agent) => (await import("./listen.ts")).runListen(agent),
  },
  {
    name: "upkeep",
    isWanted: () => true,
    run: async (agent) => (await import("./upkeep.ts")).runUpkeep(agent),
  },
];

/** Pause after the first failure of a part in a row, and the longest one, in ms. */
const pauseMs = 500;
const pauseMsMax = 30_000;
/** A part that ran for longer before it failed begins again at the shortest pause, in ms. */
const soundMs = 60_000;
/** What is not over then is left behind, in ms: the whole end may take 2 s. */
const endMs = 1_500;
/** How often an agent that waits for another one looks, in ms. */
const waitPollMs = 200;

/**
 * Runs the agent until SIGTERM or SIGINT.
 *
 * @returns exit status
 * @throws CniError 7 for a configuration that is wrong, 106 when the record cannot be opened
 */
export async function runAgent(given: Host, flags: Flags): Promise<number> {
  given.catchSignals?.();
  const cniConfig = text(flags, "cni-config");
  const own = readOwnConfig(cniConfig);
  const config = await loadConfig(own);
  const host: Host = {
    ...given,
    endsAtOnce: false,
    log: { level: config.logLevel, file: config.logFile },
  };
  // Makes the folder of the record, and says at once when it cannot be used.
  closeState(openState(host, config.stateDir));
  const lock = await becomeTheOne(host, config);
  if (!lock) return 0;
  const health = openHealth();
  const record = openRecord(host, config.stateDir, () => health.count("database"));
  const wanted = parts.filter(({ isWanted }) => isWanted(config, host));
  log(host, "info", "genie agent runs", {
    version: manifest.version,
    parts: wanted.map(({ name }) => name).join(","),
    record: config.stateDir,
  });
  const running = Promise.all([
    ended(host.signal),
    ...wanted.map((part) => supervise({ host, config, own, cniConfig, health, record }, part)),
  ]);
  await Promise.race([running, ended(host.signal).then(() => Bun.sleep(endMs))]);
  record.close();
  lock.release();
  log(host, "info", "genie agent ended");
  return 0;
}

/** Waits until no other agent runs on this node; undefined when we are asked to end first. */
async function becomeTheOne(host: Host, config: Config) {
  const file = join(config.stateDir, "agent.lock");
  const what = "this node for genie agent";
  const take = (deadlineMs: number) =>
    takeFileLock(host, file, "agent", { what, deadlineMs, pollMs: waitPollMs });
  const now = await take(0).catch((error: unknown) => {
    log(host, "info", `${toCniError(error).message}: waiting for it to end`);
  });
  if (now) return now;
  return take(Number.POSITIVE_INFINITY).catch((error: unknown) => {
    if (host.signal.aborted) return undefined;
    throw error;
  });
}

function ended(signal: AbortSignal): Promise<void> {
  return new Promise((done) => {
    if (signal.aborted) done();
    else signal.addEventListener("abort", () => done(), { once: true });
  });
}

/** Runs a part, again and again. */
async function supervise(agent: Agent, part: Part): Promise<void> {
  const { host, health } = agent;
  health.begin(part.name);
  for (let failures = 0; !host.signal.aborted; failures++) {
    const startedMs = performance.now();
    try {
      await part.run(agent);
      if (host.signal.aborted) return;
      health.failed(part.name, "it ended by itself");
      log(host, "warn", `Part ${part.name} ended by itself`);
    } catch (error) {
      if (host.signal.aborted) return;
      const { message } = toCniError(error);
      health.failed(part.name, message);
      health.count("part");
      log(host, "error", `Part ${part.name} failed, beginning it anew: ${message}`, { failures });
    }
    if (performance.now() - startedMs > soundMs) failures = 0;
    await pause(Math.min(pauseMsMax, pauseMs * 2 ** Math.min(failures, 10)), host.signal);
  }
}
