/** `genie validate`: the plugin table, every config list and the plugin binaries, without a pod. */

import { type Flags, text } from "../cli/usage.ts";
import { CniError, code, type Host, type StdinConfig, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import { isObject } from "../json.ts";
import {
  findPlugin,
  findPlugins,
  listNetworks,
  type Network,
  pluginSearch,
  resolveNetwork,
} from "../networks.ts";
import { formatTable } from "../report/table.ts";
import { readPath } from "../request.ts";
import { loadConfig } from "../settings.ts";
import { findContradictions } from "./contradictions.ts";
import { readOwnConfig } from "./genie_config.ts";
import { askedPath } from "./runtime_settings.ts";

/** A finding of `genie validate`. */
interface Finding {
  network: string;
  verdict: "ok" | "problem";
  detail: string;
}

/**
 * Runs `genie validate`.
 * @param width columns of the terminal, Infinity for none
 * @returns exit status: 1 when there is a problem
 * @throws CniError 5-7 for a config or a table that cannot be read
 */
export async function runValidate(host: Host, flags: Flags, width: number): Promise<number> {
  const stdin = readOwnConfig(text(flags, "cni-config"));
  const config = await loadConfig(stdin);
  const findings = validate(host, config, stdin);
  const bad = findings.some(({ verdict }) => verdict === "problem");
  if (flags["json"]) {
    host.stdout(`${JSON.stringify({ table: config.file, ok: !bad, findings }, null, 2)}\n`);
    return bad ? 1 : 0;
  }
  host.stdout(
    `Plugin table: ${config.file || "none, every config list in the conf dir is a network"}\n\n` +
      formatTable(
        [{ title: "NETWORK" }, { title: "VERDICT" }, { title: "DETAIL", wraps: true }],
        findings.map(({ network, verdict, detail }) => [network, verdict, detail]),
        width,
      ),
  );
  return bad ? 1 : 0;
}

/** Checks every network and every name the table refers to. */
function validate(host: Host, config: Config, stdin: StdinConfig): Finding[] {
  const search = pluginSearch(config, {
    path: [...readPath(host.env), ...askedPath(config)],
    config: stdin,
  });
  const { networks, problems } = listNetworks(config);
  const own = (network: Network) =>
    network.list.plugins.some(({ type }) => type === "genie") && !network.entry;
  const findings = networks
    .filter((network) => !own(network))
    .map((network): Finding => {
      try {
        findPlugins(network, search);
        missingIpam(network, search.dirs);
        const types = network.list.plugins.map(({ type }) => type).join(", ");
        return {
          network: network.name,
          verdict: "ok",
          detail: `${types} (CNI ${network.list.cniVersion}) from ${network.source}`,
        };
      } catch (error) {
        return { network: network.name, verdict: "problem", detail: toCniError(error).message };
      }
    });
  for (const problem of problems) {
    findings.push({ network: "-", verdict: "problem", detail: problem.message });
  }
  for (const { network = "-", detail } of findContradictions(config)) {
    findings.push({ network, verdict: "problem", detail });
  }
  const named: [string, string[]][] = [
    ["default.networks", config.default.networks],
    ["default.always", config.default.always],
    ["select.candidates", config.select.candidates ?? []],
  ];
  for (const [key, names] of named) {
    // A name with a namespace is an object of the API, which validate does not ask.
    const onNode = names.filter((one) => !one.includes("/"));
    for (const name of onNode.map((one) => one.replace(/@.*/, ""))) {
      try {
        resolveNetwork(config, name);
      } catch (error) {
        findings.push({
          network: name,
          verdict: "problem",
          detail: `named by ${key}: ${toCniError(error).message}`,
        });
      }
    }
  }
  return findings;
}

/** The IPAM plugin is a binary of its own that the interface plugin will look for. */
function missingIpam(network: Network, dirs: string[]): void {
  for (const { type, ipam } of network.list.plugins) {
    const ipamType = isObject(ipam) ? ipam["type"] : undefined;
    if (typeof ipamType !== "string" || ipamType === "" || findPlugin(ipamType, dirs)) continue;
    throw new CniError(
      code.delegateNotFound,
      `Cannot attach network "${network.name}": IPAM plugin "${ipamType}" of plugin "${type}" is ` +
        `in none of ${dirs.join(", ")}`,
    );
  }
}
