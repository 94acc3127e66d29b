/** The demo in the kernel: real network namespaces, the reference plugins, and a real ping. */
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { findPluginDir, install, missing, missingPackages, type Need } from "../needs.ts";
import type { Screen } from "./screen.ts";
import {
  addressOf,
  DemoError,
  files,
  interfaceNames,
  list,
  type Pod,
  type Proof,
  runSync,
  type,
  type World,
} from "./stage.ts";

const packages = ["containernetworking-plugins", "iproute2", "iputils-ping"] as const;
/** What the demo in the kernel needs. */
export const demoNeeds: Need[] = ["network namespaces", ...packages];
const forwarding = "/proc/sys/net/ipv4/ip_forward";

/**
 * Can this machine show the real thing? Installs what is missing where it may.
 * @returns why not, or undefined
 */
export function realObstacle(): string | undefined {
  if (process.getuid?.() !== 0) return "not run as root";
  const failure = install(missingPackages(packages), (line) => process.stderr.write(line));
  return failure ?? missing(...demoNeeds);
}

/** A third octet that no route of this machine uses, in the range kept for benchmarks. */
function freeOctet(): number {
  const { stdout: routes } = runSync(["ip", "route", "show", "table", "all"]);
  const start = crypto.getRandomValues(new Uint8Array(1))[0] ?? 0;
  for (let i = 0; i < 256; i++) {
    const octet = (start + i) % 256;
    if (!routes.includes(`198.18.${octet}.`) && !routes.includes(`198.19.${octet}.`)) return octet;
  }
  throw new DemoError("Every subnet of 198.18.0.0/15 is in use on this machine");
}

/** Names of the namespaces that `ip netns` knows. */
function namespaces(): string[] {
  return existsSync("/var/run/netns") ? readdirSync("/var/run/netns") : [];
}

/** Addresses that host-local has reserved. It also keeps a lock and the last one it gave. */
function reservedAddresses(ipam: string): string[] {
  if (!existsSync(ipam)) return [];
  return readdirSync(ipam, { recursive: true, encoding: "utf8" }).filter((name) =>
    /\/[\d.]+$/.test(name),
  );
}

/** Makes the real world of one run. */
export function makeRealWorld(screen: Screen, dir: string, id: string): World {
  const pluginDir = findPluginDir() ?? "";
  const octet = freeOctet();
  const bridge = `demo-${id}`;
  const { ipam } = files(dir);
  const wasForwarding = readFileSync(forwarding, "utf8");
  const link = (name: string) => existsSync(`/sys/class/net/${name}`);
  const restoreForwarding = () => {
    if (readFileSync(forwarding, "utf8") !== wasForwarding) {
      writeFileSync(forwarding, wasForwarding);
    }
  };
  return {
    title: `genie demo: two pods on two networks, with the real plugins of ${pluginDir}`,
    pluginDir,
    bridge,
    subnets: { blue: `198.18.${octet}.0/24`, green: `198.19.${octet}.0/24` },
    netnsPath: (name) => `/var/run/netns/${name}`,
    makeNetns: async (pod) => {
      const { status } = await type(screen, { argv: ["ip", "netns", "add", pod.netnsName] });
      if (status !== 0) throw new DemoError(`Cannot make network namespace ${pod.netnsName}`);
    },
    deleteNetns: async (pod) => {
      await type(screen, { argv: ["ip", "netns", "del", pod.netnsName] });
    },
    showInside: (pod) => showInside(screen, pod, ipam),
    showTraffic: (from, to) => showTraffic(screen, from, to),
    removeNetworks: async () => {
      screen.say("A bridge is the node's and waits for the next pod. The demo removes its own.");
      await type(screen, { argv: ["ip", "link", "del", bridge] });
      restoreForwarding();
    },
    proofs: (pods) => proofs(pods, ipam, bridge),
    cleanUp: (pods) => {
      // With a namespace go its ends of every veth pair, and so the pairs.
      const known = namespaces();
      for (const { netnsName } of pods) {
        if (known.includes(netnsName)) runSync(["ip", "netns", "del", netnsName]);
      }
      if (link(bridge)) runSync(["ip", "link", "del", bridge]);
      restoreForwarding();
    },
  };
}

function proofs(pods: Pod[], ipam: string, bridge: string): Proof[] {
  const addresses = reservedAddresses(ipam);
  const made = new Set(pods.flatMap((pod) => interfaceNames(pod, "node")));
  const veths = [...made].filter((name) => existsSync(`/sys/class/net/${name}`));
  const left = namespaces().filter((name) => pods.some(({ netnsName }) => netnsName === name));
  const gone = [...made].filter((name) => name !== bridge);
  return [
    { ok: addresses.length === 0, text: `no address reserved in ${ipam}${list(addresses)}` },
    {
      ok: veths.length === 0 && gone.length === 2 * pods.length,
      text: `no interface on the node: ${[...made].join(", ")} are gone${list(veths)}`,
    },
    { ok: left.length === 0, text: `no network namespace of these pods${list(left)}` },
  ];
}

async function showInside(screen: Screen, pod: Pod, ipam: string): Promise<void> {
  const inPod = ["ip", "-netns", pod.netnsName];
  const { stdout: addresses } = await type(screen, { argv: [...inPod, "-4", "-brief", "address"] });
  const { stdout: routes } = await type(screen, { argv: [...inPod, "route"] });
  for (const [network, ifName] of [
    ["blue", "eth0"],
    ["green", "eth5"],
  ] as const) {
    const address = addressOf(pod, ifName);
    const line = addresses.split("\n").find((one) => one.startsWith(`${ifName}@`)) ?? "";
    const ok = address !== "" && line.includes(` ${address}/`);
    screen.check(ok, `${ifName} is there, with the address that the result names for ${network}`);
  }
  const reserved = reservedAddresses(ipam);
  screen.check(
    reserved.length === 2,
    `host-local has reserved both: ${reserved.sort().join(", ")}`,
  );
  const owners = routes.split("\n").filter((line) => line.startsWith("default "));
  const ok = owners.length === 1 && (owners[0] ?? "").includes("dev eth0");
  screen.check(ok, "both networks bring a default route; the first one owns it");
}

async function showTraffic(screen: Screen, from: Pod, to: Pod): Promise<void> {
  const ping = (address: string) => ({
    argv: ["ip", "netns", "exec", from.netnsName, "ping", "-c", "1", "-W", "5", address],
  });
  const blue = await type(screen, ping(addressOf(to, "eth0")));
  screen.check(blue.status === 0, `${from.name} reaches ${to.name} over blue`);
  if (blue.status !== 0) {
    screen.say("A firewall of this machine that drops forwarded packets would do that.");
  }
  const gateway = addressOf(from, "eth5").replace(/\d+$/, "1");
  const green = await type(screen, ping(gateway));
  screen.check(green.status === 0, `${from.name} reaches the node over green`);
}
