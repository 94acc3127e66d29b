/**
 * The other end of a pod's interface on the node: the veth that its plugins told of. Only a veth
 * counts. Rules on anything else, a parent device that a plugin listed, would judge what is not the
 * pod's.
 */
import { CniError, code, type Host } from "../cni.ts";
import { programDirs, run } from "../exec.ts";
import { isObject, parseJson } from "../json.ts";

/** A veth on the node; `bridged`: it is a port of a bridge. */
export interface HostEnd {
  ifName: string;
  bridged: boolean;
}

const timeoutMs = 10_000;

/**
 * Finds the host end of an interface among those that its result tells of.
 *
 * @param names interfaces outside of the pod
 * @returns undefined where it has none
 * @throws CniError 5 when `ip` cannot tell: rules in the wrong place would be none
 */
export async function findHostEnd(
  host: Host,
  names: readonly string[],
): Promise<HostEnd | undefined> {
  for (const name of names) {
    const link = await readLink(host, name);
    const info = isObject(link?.["linkinfo"]) ? link["linkinfo"] : {};
    if (info["info_kind"] !== "veth") continue;
    return { ifName: name, bridged: info["info_slave_kind"] === "bridge" };
  }
  return undefined;
}

async function readLink(host: Host, name: string): Promise<Record<string, unknown> | undefined> {
  const path = [...programDirs, ...(host.env["PATH"] ?? "").split(":")].join(":");
  const args = ["ip", "-json", "-details", "link", "show", "dev", name];
  const ending = await run("/usr/bin/env", args, {
    env: { PATH: path, LC_ALL: "C" },
    stdin: "",
    timeoutMs,
    signal: host.signal,
  });
  if (ending.kind === "exit" && ending.status === 1) return undefined;
  if (ending.kind !== "exit" || ending.status !== 0) {
    throw new CniError(
      code.ioFailure,
      `Cannot find the host end of a pod's interface: ip did not say what ${name} is, install ` +
        "iproute2",
      { details: ending.stderr },
    );
  }
  const listed = parseJson(ending.stdout, "output of ip");
  const [link] = Array.isArray(listed) ? listed.filter(isObject) : [];
  return link;
}
