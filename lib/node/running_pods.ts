/**
 * A pod that runs, as the plan of one more network for it needs it: the request that a runtime
 * would send for it now, and a name for the interface.
 */
import { CniError, code, type Request, type StdinConfig } from "../cni.ts";
import { interfacesIn } from "../netns.ts";
import type { StoredAttachment } from "../state.ts";
import { nameOfWanted, type Wanted } from "../wanted.ts";

/** The first of the rows of a call, which has some. */
export function firstOf(rows: readonly StoredAttachment[]): StoredAttachment {
  const [first] = rows;
  if (!first) throw new Error("a pod without attachments was let through");
  return first;
}

/**
 * The interface of a new attachment: the one asked for; else that of a half that a killed switch
 * left; else the next free name by the rules of an ADD, after the one it takes the place of.
 * @throws CniError 105 for CNI_IFNAME
 */
export function nameFor(
  wanted: Wanted,
  rows: readonly StoredAttachment[],
  detach: StoredAttachment | undefined,
): string {
  const { requestIfName, netns } = firstOf(rows);
  const { network, ifName } = wanted;
  if (ifName === requestIfName) {
    throw new CniError(
      code.interfaceConflict,
      `Cannot attach network "${network}" as ${ifName}: that is the pod's primary interface, see ` +
        "genie switch --primary",
    );
  }
  if (ifName !== undefined) return ifName;
  const name = nameOfWanted(wanted);
  const half = rows.find((row) => row.state === "planned" && row.network === name);
  if (half && half !== detach) return half.ifName;
  const taken = new Set([...rows.map((row) => row.ifName), ...(interfacesIn(netns) ?? [])]);
  const isEth = detach !== undefined && /^eth\d+$/.test(detach.ifName);
  for (let i = isEth ? 0 : 1; ; i++) {
    const free = `${isEth ? "eth" : "net"}${i}`;
    if (!taken.has(free)) return free;
  }
}

/** Wishes for one network, of a pod or a runtime, that mean nothing to another one. */
const ownWishes = new Set([
  ...["ips", "mac", "infinibandGUID", "ipam-claim-reference"],
  ...["deviceID", "CNIDeviceInfoFile"],
]);

/** The request that the runtime would send for this pod now; the plan is made of it. */
export function requestOf(stdin: StdinConfig, rows: readonly StoredAttachment[]): Request {
  const { containerId, netns, requestIfName, requestNetwork, cniArgs, cniPath } = firstOf(rows);
  const primary = rows.find((row) => row.ifName === requestIfName);
  const offered = Object.entries(primary?.capabilityArgs ?? {});
  const { runtimeConfig: _, ...config } = stdin;
  return {
    ...{ command: "ADD", containerId, netns, ifName: requestIfName },
    args: cniArgs
      .split(";")
      .filter((pair) => !/^(IP|MAC|GATEWAY)=/.test(pair))
      .join(";"),
    path: [...new Set(cniPath.split(":"))],
    cniVersion: "1.1.0",
    config: {
      ...config,
      name: requestNetwork,
      runtimeConfig: Object.fromEntries(offered.filter(([key]) => !ownWishes.has(key))),
    },
  };
}
