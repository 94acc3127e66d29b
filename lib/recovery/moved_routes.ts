/**
 * Default routes in the kernel of a pod, moved aside while another attachment is made, put back, or
 * taken over: through `ip` (iproute2) in the pod's network namespace (design D8).
 */
import { existsSync } from "node:fs";
import type { Host } from "../call.ts";
import { CniError, code, oneLine } from "../cni.ts";
import { type Family, families } from "../default_route.ts";
import { run } from "../exec.ts";
import { isForeignNetns } from "../kernel.ts";
import { family } from "../result.ts";

/** Added to the metric of the owner's routes while another attachment is made: above all others. */
const parkedMetricMin = 4_000_000_000;
const ipTimeoutMs = 10_000;

/** A default route as `ip route` prints it, without the word `default` and the metric. */
interface DefaultRoute {
  family: Family;
  spec: string[];
  metric: string;
}

/** The owner's default routes, moved aside. */
export interface ParkedRoutes {
  netns: string;
  /** The families of which an earlier result brought a default route. */
  claimed: readonly Family[];
  /** Each has `parkedMetric` meanwhile. */
  routes: (DefaultRoute & { parkedMetric: string })[];
}

/** The families whose default route was found in the kernel. */
export function parkedFamilies({ routes }: ParkedRoutes): Family[] {
  return families.filter((family) => routes.some((route) => route.family === family));
}

/**
 * Moves the default routes to a high metric. Reads them from the kernel, because results may leave
 * them out (Calico's do). A missing `ip` is an error only when a result brought a default route.
 *
 * @param claimed the families of which an earlier result brought a default route
 * @throws CniError 102 when `ip` or `nsenter` is missing and a route is claimed, 104 when it fails
 */
export async function parkDefaultRoutes(
  host: Host,
  netns: string,
  claimed: readonly Family[],
): Promise<ParkedRoutes> {
  const isPossible = claimed.length > 0 || (tool("nsenter") && tool("ip"));
  if (!isForeignNetns(netns) || !isPossible) return { netns, claimed, routes: [] };
  const left: ParkedRoutes["routes"] = [];
  const fresh: ParkedRoutes["routes"] = [];
  for (const route of await readDefaultRoutes(host, netns, families)) {
    const metric = Number(route.metric);
    if (metric >= parkedMetricMin) {
      // A genie that was killed left it there. For `ip` the kernel's metric 0 is none.
      const before = metric === parkedMetricMin ? "" : String(metric - parkedMetricMin);
      left.push({ ...route, metric: before, parkedMetric: route.metric });
    } else {
      // The kernel has 32 bits for it.
      const parkedMetric = String(Math.min(parkedMetricMin + metric, 0xffff_ffff));
      fresh.push({ ...route, parkedMetric });
    }
  }
  const isAmong = (all: ParkedRoutes["routes"], { family, parkedMetric }: (typeof left)[number]) =>
    all.some((one) => one.family === family && one.parkedMetric === parkedMetric);
  const commands = fresh.flatMap((route) => [
    ...(isAmong(left, route) ? [] : [command("add", route, route.parkedMetric)]),
    command("del", route, route.metric),
  ]);
  await change(host, netns, commands);
  const routes = [...fresh, ...left.filter((route) => !isAmong(fresh, route))];
  return { netns, claimed, routes };
}

/** Removes new default routes and puts the owner's back. @throws CniError 104 when `ip` fails */
export async function restoreDefaultRoutes(host: Host, parked: ParkedRoutes): Promise<void> {
  for (const own of parkedFamilies(parked)) {
    const routes = parked.routes.filter(({ family }) => family === own);
    const putBack = async (flags: string[]) => {
      const present = await readDefaultRoutes(host, parked.netns, [own]);
      await change(host, parked.netns, commandsToRestore(routes, present, flags));
    };
    // What was attached meanwhile may have taken the route to the gateway away (169.254.1.1).
    await putBack([]).catch(() => putBack(["onlink"]));
  }
}

/** For one family; `flags` are for routes with a gateway. */
function commandsToRestore(
  routes: ParkedRoutes["routes"],
  present: DefaultRoute[],
  flags: string[],
): string[][] {
  const metrics = new Set(present.map(({ metric }) => metric));
  const came = present.filter(({ metric }) => Number(metric) < parkedMetricMin);
  return [
    ...came.map((route) => command("del", route, route.metric)),
    ...routes.flatMap((route) => [
      [...command("add", route, route.metric), ...(route.spec[0] === "via" ? flags : [])],
      // What was attached meanwhile may have taken it away.
      ...(metrics.has(route.parkedMetric) ? [command("del", route, route.parkedMetric)] : []),
    ]),
  ];
}

/**
 * Makes an interface the owner of the default route: all others of these families are removed.
 * @param gateways in the order of preference; none: the interface keeps the routes it has
 * @throws CniError 104 when `ip` fails, e.g. for a gateway that is not on the interface's network
 */
export async function takeDefaultRoutes(
  host: Host,
  netns: string,
  {
    ifName,
    taken,
    gateways,
  }: { ifName: string; taken: readonly Family[]; gateways: readonly string[] },
): Promise<void> {
  if (!isForeignNetns(netns)) return;
  const present = await readDefaultRoutes(host, netns, taken);
  const isParked = ({ metric }: DefaultRoute) => Number(metric) >= parkedMetricMin;
  const gone = gateways.length > 0 ? present : present.filter(isParked);
  const added = gateways.map((gateway, index): DefaultRoute => {
    const spec = ["via", gateway, "dev", ifName];
    return { family: family(gateway), spec, metric: String(index + 1) };
  });
  // The only route of its family needs no metric to come first.
  const isOnly = (route: DefaultRoute) =>
    added.every((other) => other === route || other.family !== route.family);
  await change(host, netns, [
    ...gone.map((route) => command("del", route, route.metric)),
    ...added.map((route) => command("add", route, isOnly(route) ? "" : route.metric)),
  ]);
}

function command(verb: "add" | "del", { family, spec }: DefaultRoute, metric: string): string[] {
  // Before the rest: words after `nexthop` belong to it.
  const first = metric === "" ? [] : ["metric", metric];
  return [`-${family}`, "route", verb, "default", ...first, ...spec];
}

async function readDefaultRoutes(
  host: Host,
  netns: string,
  owned: readonly Family[],
): Promise<DefaultRoute[]> {
  const found: DefaultRoute[] = [];
  for (const family of owned) {
    const args = [`-${family}`, "-oneline", "route", "show", "default"];
    for (const line of (await ip(host, netns, args, "")).split("\n")) {
      // What a router advertises comes and goes by itself.
      if (!line.startsWith("default ") || / proto ra /.test(line)) continue;
      found.push(parseRoute(line, family));
    }
  }
  return found;
}

/** Words for the state of a route, which `ip` prints but does not take. */
const states = new Set(
  `\\ linkdown dead unresolved notify pervasive offload offload_failed trap rt_offload
   rt_offload_failed rt_trap`.split(/\s+/),
);

/** Splits `default via 10.1.0.1 dev eth0 metric 5 pref medium`; states like `linkdown` go. */
function parseRoute(line: string, family: Family): DefaultRoute {
  const words = line.trim().split(/\s+/).slice(1);
  const at = words.indexOf("metric");
  const metric = at < 0 ? "" : (words[at + 1] ?? "");
  const spec = words.filter((word, i) => !states.has(word) && (at < 0 || i < at || i > at + 1));
  return { family, spec, metric };
}

async function change(host: Host, netns: string, commands: string[][]): Promise<void> {
  for (const flag of ["-4", "-6"]) {
    const own = commands.filter(([first]) => first === flag);
    const lines = own.map((words) => `${words.slice(1).join(" ")}\n`);
    if (lines.length > 0) await ip(host, netns, [flag, "-batch", "-"], lines.join(""));
  }
}

/** Folders of the administrator's tools: a runtime's PATH may be empty. */
const toolDirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

function tool(name: string): string | undefined {
  return toolDirs.map((dir) => `${dir}/${name}`).find((path) => existsSync(path));
}

/** Runs `ip` in a namespace. @returns its output @throws CniError 102 or 104 */
export async function ip(
  host: Host,
  netns: string,
  args: string[],
  stdin: string,
): Promise<string> {
  const nsenter = tool("nsenter") ?? "/usr/bin/nsenter";
  const env = { PATH: `${toolDirs.join(":")}:${host.env["PATH"] ?? ""}` };
  const options = { env, stdin, timeoutMs: ipTimeoutMs };
  const ending = await run(nsenter, [`--net=${netns}`, "ip", ...args], options);
  if (ending.kind === "exit" && ending.status === 0) return ending.stdout;
  const what = "Cannot change the routes and interfaces of a pod";
  const details = ending.stderr;
  if (ending.kind === "spawn" || (ending.kind === "exit" && ending.status === 127)) {
    const msg = `${what}: install nsenter and ip (util-linux, iproute2)`;
    throw new CniError(code.delegateNotFound, msg, { details });
  }
  const reason = ending.kind === "exit" ? oneLine(details, 300) : ending.kind;
  const msg = `${what}: ip ${args.join(" ")} failed: ${reason}`;
  throw new CniError(code.delegateProtocol, msg, { details });
}
