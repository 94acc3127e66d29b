/**
 * Makes ready what follows the delegates, while the first of them runs and this process would only
 * wait: code that runs for the first time costs ten times what it costs afterwards, and every pod
 * is the first of its process. Changes nothing anywhere.
 */
import { type Host, log, toCniError } from "./cni.ts";
import type { State } from "./database.ts";
import { parseJson } from "./json.ts";
import { prepareLedger } from "./ledger.ts";
import { mergeResults, toVersion } from "./result.ts";
import { parseResult } from "./result_wire.ts";
import { prepareAttached } from "./state.ts";
import { prepareTraffic } from "./traffic.ts";

/** A result with all that most results have. */
const example = `{"cniVersion": "1.0.0",
  "interfaces": [{"name": "veth0", "mac": "00"}, {"name": "eth0", "mac": "00", "sandbox": "/"}],
  "ips": [{"interface": 1, "address": "192.0.2.2/24", "gateway": "192.0.2.1"}],
  "routes": [{"dst": "0.0.0.0/0"}]}`;

/**
 * Reads, merges and formats a result that nobody sees; prepares the statements of the commit. What
 * cannot be prepared fails nothing here: the commit will say it, or do without.
 */
export function warmUp(host: Host, state: State): void {
  try {
    prepare(state);
  } catch (error) {
    log(host, "debug", toCniError(error).message);
  }
}

function prepare(state: State): void {
  const result = parseResult(parseJson(example, "an example"), "1.0.0");
  JSON.stringify(toVersion(mergeResults([{ ifName: "eth0", netns: "/", result }]), "1.0.0"));
  prepareAttached(state);
  prepareLedger(state);
  prepareTraffic(state);
}
