/**
 * The node agent: `genie agent`, one process per node, never on the path of an ADD. A table of
 * tasks, each of which runs until the agent is asked to end; a task that fails is started again
 * after a pause, and the others go on meanwhile.
 */
import { utimesSync } from "node:fs";
import { join } from "node:path";
import manifest from "../../package.json";
import type { Host } from "../call.ts";
import { log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { type Flags, text } from "../config/usage.ts";
import { closeState } from "../database.ts";
import { aborted } from "../kubernetes/client.ts";
import { pause } from "../kubernetes/watch.ts";
import { readOwnConfig } from "../node/genie_config.ts";
import { agentLock } from "../node/node_view.ts";
import { takeFileLock } from "../policy/rulesets.ts";
import { openState } from "../recovery/database.ts";
import { enforcesPolicy, loadConfig } from "../settings.ts";
import { keepsToken, runConflist, runToken } from "./installed_files.ts";
import { openNotify } from "./notify.ts";
import { type Agent, openHealth, openRecord, pauseAfter, type Task } from "./task.ts";

const tasks: readonly Task[] = [
  {
    name: "policy",
    isWanted: enforcesPolicy,
    run: async (agent) => (await import("./policy.ts")).runPolicy(agent),
  },
  { name: "token", isWanted: (_config, host) => keepsToken(host), run: runToken },
  // Always: genie may be installed while the agent runs.
  { name: "conflist", run: runConflist },
  {
    name: "status",
    isWanted: ({ kubernetes }) => kubernetes.status !== "off",
    run: async (agent) => (await import("./publish.ts")).runPublish(agent),
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
    run: async (agent) => (await import("./upkeep.ts")).runUpkeep(agent),
  },
];

/** Pause after the first failure of a task in a row, and the longest one, in ms. */
const pauseMs = 500;
const pauseMsMax = 30_000;
/** A task that ran for longer before it failed starts again after the shortest pause, in ms. */
const soundMs = 60_000;
/** Tasks that have not ended then are left behind, in ms: the whole end may take 2 s. */
const endMs = 1_500;
/** How often an agent that waits for another one tries again, in ms. */
const waitPollMs = 200;

/**
 * Runs the agent until SIGTERM or SIGINT.
 * @returns exit status
 * @throws CniError 7 for a configuration that is wrong, 106 when the record cannot be opened
 */
export async function runAgent(given: Host, flags: Flags): Promise<number> {
  given.catchSignals?.();
  const cniConfig = text(flags, "cni-config");
  const own = readOwnConfig(cniConfig);
  const config = await loadConfig(own);
  const settings = { level: config.logLevel, file: config.logFile };
  const host: Host = { ...given, endsAtOnce: false, log: settings };
  // Makes the folder of the record, and fails at once when it cannot be used.
  closeState(openState(host, config.stateDir));
  const notify = openNotify(host);
  notify("READY=1\nSTATUS=starts, once no other agent runs on this node");
  const lock = await lockNode(host, config);
  if (!lock) return 0;
  // Since when it runs, for genie status.
  const startedS = host.now() / 1000;
  utimesSync(join(config.stateDir, agentLock), startedS, startedS);
  const health = openHealth();
  const record = openRecord(host, config.stateDir, () => health.count("database"));
  const wanted = tasks.filter(({ isWanted }) => isWanted?.(config, host) ?? true);
  const names = wanted.map(({ name }) => name);
  log(host, "info", "genie agent runs", {
    version: manifest.version,
    tasks: names.join(","),
    record: config.stateDir,
  });
  notify(`STATUS=${names.join(", ")}`);
  const agent: Agent = { host, config, own, cniConfig, health, record };
  const running = Promise.all(wanted.map((task) => supervise(agent, task)));
  await Promise.race([running, aborted(host.signal).then(() => Bun.sleep(endMs))]);
  record.close();
  lock.release();
  log(host, "info", "genie agent ended");
  return 0;
}

/** Waits until no other agent runs on this node; undefined when we are asked to end first. */
async function lockNode(host: Host, config: Config) {
  const file = join(config.stateDir, agentLock);
  const what = "this node for genie agent";
  const take = (deadlineMs: number) =>
    takeFileLock(host, file, "agent", { what, deadlineMs, pollMs: waitPollMs });
  const now = await take(0).catch((error: unknown) => {
    log(host, "info", `${toCniError(error).message}: waiting for it to end`);
  });
  if (now) return now;
  return take(Infinity).catch((error: unknown) => {
    if (host.signal.aborted) return undefined;
    throw error;
  });
}

/** Runs a task, again and again. Never throws. */
async function supervise(agent: Agent, task: Task): Promise<void> {
  const { host, health } = agent;
  health.begin(task.name);
  for (let failures = 0; !host.signal.aborted; failures++) {
    const startedMs = performance.now();
    try {
      await task.run(agent);
      if (host.signal.aborted) return;
      health.failed(task.name, "it ended by itself");
      log(host, "warn", `Task ${task.name} ended by itself`);
    } catch (error) {
      if (host.signal.aborted) return;
      const { message } = toCniError(error);
      health.failed(task.name, message);
      health.count("task");
      log(host, "error", `Task ${task.name} failed, starting it again: ${message}`, { failures });
    }
    if (performance.now() - startedMs > soundMs) failures = 0;
    await pause(pauseAfter(failures, pauseMs, pauseMsMax), host.signal);
  }
}
