/** The networks themselves: valid, apart from each other and from the node, and with room. */

import { rangesOf } from "../choice/ipam.ts";
import { networkKpis } from "../choice/kpi.ts";
import { contains, parseSubnet } from "../ip.ts";
import { readRecord } from "../report/file.ts";
import { ok, problem, type Said, warning } from "./finding.ts";
import type { NodeView } from "./node_view.ts";

/** The table, and every config list. */
export function checkTable({ configError, config, networks, problems }: NodeView): Said[] {
  if (configError) return [problem(configError.message, "put it right: until then no pod starts")];
  const said = problems.map(({ message }) => problem(message, "genie validate says more"));
  const names = networks.map(({ name }) => name);
  if (names.length === 0) said.push(problem("there is no network", "install one, see README"));
  const missing = config.default.networks
    .map((text) => text.replace(/@.*/, ""))
    .filter((name) => !names.includes(name));
  for (const name of missing) {
    said.push(problem(`default.networks names ${name}, which is none`, "install it, or rename it"));
  }
  const file = config.file || "no table";
  return said.length > 0 ? said : [ok(`${file}; networks: ${names.join(", ")}`)];
}

/** A route of the node. */
interface Route {
  subnet: string;
  device: string;
}

/** Subnets of two networks, or of one and the node, must not overlap. */
export function checkOverlaps(view: NodeView): Said[] {
  const owned = view.networks.flatMap(({ name, list }) =>
    [...new Set(rangesOf(list).map(({ subnet }) => subnet))].map((subnet) => ({
      network: name,
      subnet,
      devices: list.plugins.map((plugin) => String(plugin["bridge"] ?? plugin["master"] ?? "cni0")),
    })),
  );
  const said: Said[] = [];
  owned.forEach((one, i) => {
    for (const other of owned.slice(i + 1)) {
      if (one.network === other.network || !overlap(one.subnet, other.subnet)) continue;
      const what = `${one.subnet} of ${one.network} overlaps ${other.subnet} of ${other.network}`;
      said.push(warning(what, "give each network a subnet of its own"));
    }
    for (const route of nodeRoutes(view)) {
      if (!overlap(one.subnet, route.subnet)) continue;
      // Routes to the network itself: by its own device, or to single pods.
      const isOwn = one.devices.includes(route.device) || /\/(32|128)$/.test(route.subnet);
      if (isOwn) continue;
      const what = `${one.subnet} of ${one.network} overlaps the node's route ${route.subnet}`;
      said.push(warning(`${what} by ${route.device}`, "choose another subnet, or see that route"));
    }
  });
  return said.length > 0 ? said : [ok(`subnets that overlap: none of ${owned.length}`)];
}

function overlap(a: string, b: string): boolean {
  return contains(a, b) || contains(b, a);
}

/** The node's routes but the default ones (proc_net_route, proc_net_ipv6_route). */
export function nodeRoutes({ read }: Pick<NodeView, "read">): Route[] {
  const routes: Route[] = [];
  for (const line of read("/proc/net/route").split("\n").slice(1)) {
    const [device = "", destination = "", , , , , , mask = ""] = line.split("\t");
    const bytes = destination.match(/../g)?.reverse() ?? [];
    const prefix = (Number.parseInt(mask, 16) >>> 0).toString(2).replace(/0/g, "").length;
    if (bytes.length !== 4 || prefix === 0) continue;
    const address = bytes.map((byte) => Number.parseInt(byte, 16)).join(".");
    routes.push({ subnet: `${address}/${prefix}`, device });
  }
  for (const line of read("/proc/net/ipv6_route").split("\n")) {
    const [destination = "", digits = "", ...rest] = line.trim().split(/\s+/);
    const groups = destination.match(/.{4}/g) ?? [];
    const prefix = Number.parseInt(digits, 16);
    const subnet = `${groups.join(":")}/${prefix}`;
    const device = rest.at(-1) ?? "";
    if (groups.length !== 8 || !prefix || device === "lo" || !parseSubnet(subnet)) continue;
    // Link-local and multicast are on every device.
    if (/^(fe80|ff)/.test(destination)) continue;
    routes.push({ subnet, device });
  }
  return routes;
}

/** Addresses left in each network whose IPAM can be read. */
export function checkCapacity({ host, at, config, networks }: NodeView): Said[] {
  const measure = (record?: Parameters<typeof networkKpis>[0]): Said[] =>
    networks.flatMap((network) => {
      const { ipv4, ipv6 } = networkKpis(record, network, host.now());
      return [ipv4, ipv6].flatMap(({ used, total }, i) => {
        if (used.value === undefined || total.value === undefined) return [];
        const left = Math.max(0, total.value - used.value);
        const family = i === 0 ? "IPv4" : "IPv6";
        const what = `${network.name} has ${left} of ${total.value} ${family} addresses left`;
        const remedy = "enlarge its range, or move pods to another network";
        if (left === 0) return [problem(what, remedy)];
        return [left / total.value < 0.1 ? warning(what, remedy) : ok(what)];
      });
    });
  try {
    return readRecord(at(config.stateDir), measure) ?? measure();
  } catch (error) {
    // What is wrong with the record is told by its own check.
    if (error instanceof Error) return measure();
    throw error;
  }
}
