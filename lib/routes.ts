/**
 * One owner of the default route per address family (design D8): the first attachment that brings
 * one. A later attachment may want to add its own; the kernel would refuse ("file exists") or keep
 * two. So the owner's route is moved to a high metric while such an attachment is made, what came
 * is removed, and the owner's is put back: connectivity is never lost and order does not matter.
 *
 * Works on the kernel through `ip` (iproute2) inside the pod's network namespace. Nothing here runs
 * for a pod of which one network at most may bring a default route.
 */
import { existsSync } from "node:fs";
import { CniError, code, type Host } from "./cni.ts";
import { run } from "./exec.ts";
import { isForeignNetns } from "./netns.ts";
import { isDefaultRoute, type Result } from "./result.ts";

/** Address family of a route. */
export type Family = 4 | 6;
/** Both, in the order in which they are looked at. */
export const families: readonly Family[] = [4, 6];

/**
 * Added to the metric of the owner's routes while another attachment is made: behind all that
 * plugins set, and no two of a family are the same.
 */
const parkedMetricMin = 4_000_000_000;
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
  /** `parkedMetric` is where each one is meanwhile. */
  routes: (DefaultRoute & { parkedMetric: string })[];
}

/** The families whose default route was found in the kernel. */
export function parkedFamilies({ routes }: ParkedRoutes): Family[] {
  return families.filter((family) => routes.some((route) => route.family === family));
}

/**
 * Moves the present default routes to a high metric. Looks at the kernel, because results need not
 * tell of them (Calico's do not). Without `ip` that is possible only while nobody claims one.
 *
 * @param claimed the families of which an earlier result brought a default route
 * @throws CniError 102 when `ip` or `nsenter` is missing and a route is claimed, 104 when it fails
 */
export async function parkDefaultRoutes(
  host: Host,
  netns: string,
  claimed: readonly Family[],
): Promise<ParkedRoutes> {
  if (!isForeignNetns(netns)) return { netns, routes: [] };
  if (claimed.length === 0 && !(tool("nsenter") && tool("ip"))) return { netns, routes: [] };
  const found = await readDefaultRoutes(host, netns, families);
  const isParked = ({ metric }: DefaultRoute) => Number(metric) >= parkedMetricMin;
  const left = found.filter(isParked).map((route) => ({
    ...route,
    parkedMetric: route.metric,
    // It was left there by a genie that was killed, and tells which metric it had.
    metric: metricText(Number(route.metric) - parkedMetricMin),
  }));
  const isLeft = (route: { family: Family; parkedMetric: string }) =>
    left.some((one) => one.family === route.family && one.parkedMetric === route.parkedMetric);
  const fresh = found
    .filter((route) => !isParked(route))
    .map((route) => ({ ...route, parkedMetric: parkedMetricOf(route) }));
  await change(
    host,
    netns,
    fresh.flatMap((route) => [
      ...(isLeft(route) ? [] : [command("add", route, route.parkedMetric)]),
      command("del", route, route.metric),
    ]),
  );
  const isFresh = (route: (typeof left)[number]) =>
    fresh.some((one) => one.family === route.family && one.parkedMetric === route.parkedMetric);
  const routes = [...fresh, ...left.filter((route) => !isFresh(route))];
  return { netns, routes };
}

/** The kernel has 32 bits for it. */
function parkedMetricOf({ metric }: DefaultRoute): string {
  return String(parkedMetricMin + Math.min(Number(metric), 0xffff_ffff - parkedMetricMin));
}

/** As `ip` wants it: none is the metric 0 of the kernel. */
function metricText(metric: number): string {
  return metric === 0 ? "" : String(metric);
}

/**
 * Removes the default routes that came meanwhile and puts the owner's back.
 * @throws CniError 104 when `ip` fails
 */
export async function restoreDefaultRoutes(host: Host, parked: ParkedRoutes): Promise<void> {
  const { netns, routes } = parked;
  const present = await readDefaultRoutes(host, netns, parkedFamilies(parked));
  const metrics = new Set(present.map(({ metric }) => metric));
  const came = present.filter(({ metric }) => Number(metric) < parkedMetricMin);
  await change(host, netns, [
    ...came.map((route) => command("del", route, route.metric)),
    ...routes.flatMap((route) => [
      command("add", route, route.metric),
      // What was attached meanwhile may have taken it away.
      ...(metrics.has(route.parkedMetric) ? [command("del", route, route.parkedMetric)] : []),
    ]),
  ]);
}

/**
 * Makes an interface the owner of the default route: every other one of these families goes.
 *
 * @param gateways in the order of preference; none: the routes the interface has already stay
 * @throws CniError 104 when `ip` fails, e.g. for a gateway that is not on the interface's network
 */
export async function takeDefaultRoutes(
  host: Host,
  netns: string,
  ifName: string,
  taken: readonly Family[],
  gateways: readonly string[],
): Promise<void> {
  if (!isForeignNetns(netns)) return;
  const present = await readDefaultRoutes(host, netns, taken);
  const gone = present.filter(
    ({ metric }) => gateways.length > 0 || Number(metric) >= parkedMetricMin,
  );
  const added = gateways.map(
    (gateway, index): DefaultRoute => ({
      family: gateway.includes(":") ? 6 : 4,
      spec: ["via", gateway, "dev", ifName],
      metric: String(index + 1),
    }),
  );
  await change(host, netns, [
    ...gone.map((route) => command("del", route, route.metric)),
    ...added.map((route) => command("add", route, isOnly(route, added) ? "" : route.metric)),
  ]);
}

/** True for the only route of its family: it needs no metric to come first. */
function isOnly(route: DefaultRoute, all: DefaultRoute[]): boolean {
  return all.filter((other) => other.family === route.family).length === 1;
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
    const lines = (await ip(host, netns, args, "")).split("\n");
    for (const line of lines) {
      // What a router advertises comes and goes by itself, on whatever interface.
      if (!line.startsWith("default ") || / proto ra /.test(line)) continue;
      found.push(parseRoute(line, family));
    }
  }
  return found;
}

/** States of a route that `ip` prints among its words, and cannot read. */
const states = new Set([
  ...["\\", "linkdown", "dead", "unresolved", "notify", "pervasive"],
  ...["offload", "offload_failed", "trap", "rt_offload", "rt_offload_failed", "rt_trap"],
]);

/** Splits `default via 10.1.0.1 dev eth0 metric 5 pref medium`; states like `linkdown` go. */
function parseRoute(line: string, family: Family): DefaultRoute {
  const words = line.trim().split(/\s+/).slice(1);
  const at = words.indexOf("metric");
  const metric = at < 0 ? "" : (words[at + 1] ?? "");
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

function tool(name: string): string | undefined {
  return toolDirs.map((dir) => `${dir}/${name}`).find((path) => existsSync(path));
}

async function ip(host: Host, netns: string, args: string[], stdin: string): Promise<string> {
  const ending = await run(
    tool("nsenter") ?? "/usr/bin/nsenter",
    [`--net=${netns}`, "ip", ...args],
    {
      env: { PATH: `${toolDirs.join(":")}:${host.env["PATH"] ?? ""}` },
      stdin,
      timeoutMs: ipTimeoutMs,
    },
  );
  if (ending.kind === "exit" && ending.status === 0) return ending.stdout;
  if (ending.kind === "spawn" || (ending.kind === "exit" && ending.status === 127)) {
    throw new CniError(
      code.delegateNotFound,
      "Cannot keep the default route with its owner: install nsenter and ip (util-linux, iproute2)",
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
