/**
 * DEL without a record: by libcni's cache, for what was attached before genie came (design D14);
 * else it plans again from what the request itself carries and calls DEL on every plugin of that
 * plan (design D4, D5).
 */
import { pluginSearch } from "../binaries.ts";
import type { Chain, Host, Request, Wanted } from "../call.ts";
import { CniError, code, log, toCniError } from "../cni.ts";
import type { Config } from "../config/schema.ts";
import type { State } from "../database.ts";
import { isObject } from "../json.ts";
import { isForeignNetns } from "../kernel.ts";
import { type Network, resolveNetwork } from "../networks.ts";
import { candidateNetworks, findListOnDisk, networkAt } from "../node_networks.ts";
import { toAttachment } from "../plan.ts";
import { carriedPod, podWithoutAnnotations } from "../pod.ts";
import type { Attachment, Result, StoredAttachment } from "../record.ts";
import { delChain, storedResult, withPresentPlugins } from "../recorded.ts";
import { parseResult } from "../result.ts";
import { nameInterfaces, onNode, selectWanted } from "../selection.ts";
import { loadConfig } from "../settings.ts";
import { cachedOf, putOnRecord } from "./cni_cache.ts";
import { identified } from "./network_name.ts";
import { sharedError } from "./plugin_keys.ts";
import { orUndefined } from "./tried.ts";

/**
 * The attachments of a call that is not on record, as libcni's cache has them. From now on they are
 * on record, so that their DEL fails, is retried and given up as that of any other.
 * @param others what other calls of the container have: their rows stay
 */
export async function adoptCall(
  host: Host,
  state: State,
  request: Request,
  others: readonly StoredAttachment[],
): Promise<StoredAttachment[]> {
  const { ifName } = request;
  if (others.some((one) => one.ifName === ifName)) return [];
  const rows = cachedOf(host, request, await usableConfig(request), ifName);
  putOnRecord(host, state, rows);
  return rows;
}

/** The table; where it cannot be used, what an absent one says: what is cached needs no more. */
async function usableConfig(request: Request): Promise<Config> {
  const { parseConfig } = await import("../config/parse.ts");
  return loadConfig(request.config).catch(() => parseConfig("", ""));
}

/**
 * DEL without a record: by libcni's cache, else plans again from what the request itself carries,
 * never from the API, and calls DEL on every plugin of that plan. Errors are reported, the DEL
 * succeeds (CNI SPEC 1.1 §2).
 * @param of `ifNames` has the interfaces to delete, absent: all; `others` what other calls of the
 *   container have: a DEL that would take it from them is not sent
 */
export async function deleteByGuess(
  chain: Chain,
  request: Request,
  of: { ifNames?: ReadonlySet<string> | undefined; others?: readonly StoredAttachment[] } = {},
): Promise<void> {
  const { ifNames, others = [] } = of;
  const { host } = chain;
  const netns = isForeignNetns(request.netns) ? request.netns : "";
  try {
    const config = await usableConfig(request);
    const names = ifNames ?? new Set([request.ifName]);
    const cached = [...names].flatMap((name) => cachedOf(host, request, config, name));
    const isCached = (name: string) => cached.some(({ ifName }) => ifName === name);
    const isAll = [...names].every(isCached);
    // Only where the cache does not say it: the others of a plan may be somebody else's.
    const plan = isAll
      ? { attachments: [], problems: [] }
      : await guessPlan(await loadConfig(request.config), request);
    const guessed = plan.attachments.filter(
      ({ ifName }) => !isCached(ifName) && (!ifNames || ifNames.has(ifName)),
    );
    const carried = carriedResult(request);
    const all = [
      ...guessed.toReversed().map((attachment) => ({ attachment, result: carried, isGuess: true })),
      ...cached.map((row) => ({ attachment: row, result: storedResult(row), isGuess: false })),
    ];
    for (const { attachment, ...made } of all) {
      if (sharedError(attachment, others)) continue;
      const present = withPresentPlugins<Attachment>(attachment, request.path);
      for (const error of await delChain({ ...chain, netns }, present, made)) {
        log(host, "warn", `Best effort without a record: ${error.message}`);
      }
    }
    for (const { message } of plan.problems) log(host, "debug", `Nothing to guess: ${message}`);
  } catch (error) {
    log(host, "debug", `Nothing on record and nothing to guess: ${toCniError(error).message}`);
  }
}

function carriedResult({ config: { prevResult }, cniVersion }: Request): Result | undefined {
  if (!isObject(prevResult)) return undefined;
  return orUndefined(() => parseResult(prevResult, cniVersion, "prevResult"));
}

/**
 * What an ADD of this request would attach, as far as the request and the node's disk tell: for a
 * DEL that has no record. Asks neither the API nor the access rules, since what was attached must
 * go.
 * @returns what is certain, and why the rest is not
 * @throws CniError 7, 101 or 105 when there is no plan at all
 */
export async function guessPlan(config: Config, request: Request) {
  const pod = carriedPod(request) ?? podWithoutAnnotations(request);
  const search = pluginSearch(config, request);
  const { decision, primarySet, further } = await selectWanted(config, pod);
  const attachments: Attachment[] = [];
  const problems: CniError[] = [];
  // Whichever was chosen is not known any more: DEL on a network that was not harms nothing.
  const named =
    decision === "choice"
      ? candidateNetworks(config, search).map((network) => ({
          ...onNode({ network }, "a candidate"),
          ifName: request.ifName,
        }))
      : nameInterfaces(primarySet, further, request.ifName);
  for (const wanted of named) {
    try {
      const network = resolveOnNode(config, wanted);
      const resolved = { ...network, entries: [] };
      attachments.push(toAttachment({ config, request, search, pod }, wanted, resolved));
    } catch (error) {
      problems.push(toCniError(error));
    }
  }
  return { attachments, problems };
}

function resolveOnNode(config: Config, { from, network: name }: Wanted): Network {
  if (from === "node") return identified(config, resolveNetwork(config, name));
  if (from === "multus" && name.includes("/")) return networkAt(name);
  const found = findListOnDisk(config, name);
  if (found) return { name, ...found };
  throw new CniError(code.networkNotFound, `Unknown network "${name}": it is not on the node`);
}
