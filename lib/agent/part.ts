/** What every part of the node agent gets, and what a part is. Types alone. */

import type { Host, StdinConfig } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import type { Health } from "./health.ts";
import type { AgentRecord } from "./record.ts";

/** What every part gets. */
export interface Agent {
  host: Host;
  config: Config;
  /** Our own CNI config, by which the runtime calls genie. */
  own: StdinConfig;
  /** File of our own CNI config, where one was named. */
  cniConfig?: string | undefined;
  health: Health;
  /** Shared by all parts that do not need a connection of their own. */
  record: AgentRecord;
}

/** One job of the agent. */
export interface Part {
  name: string;
  /** Does the configuration, or where we run, ask for it? */
  isWanted: (config: Config, host: Host) => boolean;
  /**
   * Runs until `host.signal` aborts, and says so to `health` each time round. What it throws is
   * told, and it is run again.
   */
  run: (agent: Agent) => Promise<void>;
}
