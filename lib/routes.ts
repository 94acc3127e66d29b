/**
 * One owner of the default route per address family (design D8): the first attachment that brings
 * one. A later attachment may want to add its own; the kernel would refuse ("file exists") or keep
 * two. So the owner's route is moved to a high metric while such an attachment is made, what came
 * is removed, and the owner's is put back: connectivity is never lost and order does not matter.
 *
 * Works on the kernel through `ip` (iproute2) inside the pod's network namespace. Nothing here runs
 * for a pod whose networks bring one default route at most.
 */
import { existsSync } from "node:fs";
import { CniError, code, type Host } from "./cni.ts";
import { run } from "./exec.ts";
import { isDefaultRoute, type Result } from "./result.ts";

/** Address family of a route. */
export type Family = 4 | 6;
export const families: readonly Family[] = [4, 6];

/** Metric of the owner's route while another attachment is made: behind all that plugins set. */
const parkedMetric = 4_000_000_000;
/** Limit for one `ip` call, in ms. */
const ipTimeoutMs = 10_000;

/** A default route as `ip route` prints it, without the word `default` and the metric. */
interface DefaultRoute {
  family: Family;
  spec: string[];
  metric: string;
}

/** Which address families a result brings a default route for. */
export function defaultRouteFamilies(result: Result): Family[] {
  return families.filter((family) =>
    result.routes.some(
      (route) => isDefaultRoute(route) && route.dst.includes(":") === (family === 6),
    ),
  );
}

/** The owner's default routes, moved aside. */
export interface ParkedRoutes {
  netns: string;
  routes: DefaultRoute[];
}

/**
 * Moves the present default routes of the given families to a high metric.
 * @throws CniError 102 when `ip` or `nsenter` is missing, 104 when it fails
 */
export async function parkDefaultRoutes(
  host: Host,
  netns: string,
  owned: readonly Family[],
): Promise<ParkedRoutes> {
  const routes = (await readDefaultRoutes(host, netns, owned)).filter(
    // IPv4 prints no metric for 0; IPv6 always has one, 1024 where none was given.
    ({ family, metric }) => metric === "" || (family === 6 && metric === "1024"),
  );
  await change(
    host,
    netns,
    routes.flatMap((route) => [
      command("add", route, String(parkedMetric)),
      command("del", route, route.metric),
    ]),
  );
  return { netns, routes };
}

/**
 * Removes the default routes that came meanwhile and puts the owner's back.
 * @throws CniError 104 when `ip` fails
 */
export async function restoreDefaultRoutes(
  host: Host,
  { netns, routes }: ParkedRoutes,
): Promise<void> {
  const owned = families.filter((family) => routes.some((route) => route.family === family));
  const present = await readDefaultRoutes(host, netns, owned);
  const came = present.filter(({ metric }) => metric !== String(parkedMetric));
  await change(host, netns, [
    ...came.map((route) => command("del", route, route.metric)),
    ...routes.flatMap((route) => [
      command("add", route, route.metric),
      command("del", route, String(parkedMetric)),
    ]),
  ]);
}

function command(verb: "add" | "del", { family, spec }: DefaultRoute, metric: string): string[] {
  const suffix = metric === "" ? [] : ["metric", metric];
  return [`-${family}`, "route", verb, "default", ...spec, ...suffix];
}

async function readDefaultRoutes(
  host: Host,
  netns: string,
  owned: readonly Family[],
): Promise<DefaultRoute[]> {
  const found: DefaultRoute[] = [];
  for (const family of owned) {
    const text = await ip(host, netns, [`-${family}`, "route", "show", "default"], "");
    for (const line of text.split("\n").filter((line) => line.startsWith("default "))) {
      found.push(parseRoute(line, family));
    }
  }
  return found;
}

/** Splits `default via 10.1.0.1 dev eth0 metric 5 pref medium`; states like `linkdown` go. */
function parseRoute(line: string, family: Family): DefaultRoute {
  const words = line.trim().split(/\s+/).slice(1);
  const at = words.indexOf("metric");
  const metric = at < 0 ? "" : (words[at + 1] ?? "");
  const states = new Set(["linkdown", "dead", "offload", "notify"]);
  const spec = words.filter((word, i) => !states.has(word) && (at < 0 || i < at || i > at + 1));
  return { family, spec, metric };
}

async function change(host: Host, netns: string, commands: string[][]): Promise<void> {
  for (const family of families) {
    const lines = commands
      .filter(([flag]) => flag === `-${family}`)
      .map((words) => words.slice(1).join(" "));
    if (lines.length > 0) {
      await ip(host, netns, [`-${family}`, "-batch", "-"], `${lines.join("\n")}\n`);
    }
  }
}

/** Where Linux keeps administrators' tools; a runtime's PATH may be empty. */
const toolDirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

function nsenter(): string {
  return (
    toolDirs.map((dir) => `${dir}/nsenter`).find((path) => existsSync(path)) ?? "/usr/bin/nsenter"
  );
}

async function ip(host: Host, netns: string, args: string[], stdin: string): Promise<string> {
  const ending = await run(nsenter(), [`--net=${netns}`, "ip", ...args], {
    env: { PATH: `${toolDirs.join(":")}:${host.env["PATH"] ?? ""}` },
    stdin,
    timeoutMs: ipTimeoutMs,
  });
  if (ending.kind === "exit" && ending.status === 0) return ending.stdout;
  if (ending.kind === "spawn" || (ending.kind === "exit" && ending.status === 127)) {
    throw new CniError(
      code.delegateNotFound,
      "Cannot keep the default route with its owner: install nsenter (util-linux) and ip (iproute2)",
      { details: ending.stderr },
    );
  }
  throw new CniError(
    code.delegateProtocol,
    `Cannot change default routes: ip ${args.join(" ")} failed`,
    {
      details: ending.stderr,
    },
  );
}
