/** The demo without root: the fake plugins of tests/ answer, and nothing on the machine changes. */
import { existsSync, mkdirSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { calls, fakePlugin } from "../fakes.ts";
import type { Screen } from "./screen.ts";
import { files, interfaceNames, list, type Pod, type Proof, type World } from "./stage.ts";

/**
 * Makes the fake world of one run.
 * @param reason why it is not the real one
 */
export function makeFakeWorld(screen: Screen, dir: string, reason: string): World {
  const pluginDir = join(dir, "bin");
  const { ipam } = files(dir);
  mkdirSync(pluginDir);
  mkdirSync(join(dir, "netns"));
  let pods = 0;
  writeFakes(pluginDir, ipam, 2);
  return {
    title: `genie demo with FAKE plugins (${reason}): no network is made`,
    pluginDir,
    bridge: "demo0",
    subnets: { blue: "198.18.0.0/24", green: "198.19.0.0/24" },
    netnsPath: (name) => join(dir, "netns", name),
    makeNetns: async (pod) => {
      const host = 2 + pods++;
      writeFakes(pluginDir, ipam, host);
      writeFileSync(pod.netns, "");
      screen.say(`A file stands for the network namespace: ${pod.netns}`);
    },
    deleteNetns: async (pod) => {
      rmSync(pod.netns);
      screen.say(`The network namespace of ${pod.name} goes away.`);
    },
    showInside: async (pod) => showCalls(screen, pluginDir, pod),
    showTraffic: async () => {
      screen.say("No ping here: fake plugins make no interfaces. Run the demo as root to see one.");
    },
    removeNetworks: async () => screen.say("Fake plugins made no bridge."),
    proofs: (all) => proofs(all, ipam, pluginDir),
    cleanUp: () => undefined,
  };
}

/** What each plugin answers to the pod with this last octet. */
function writeFakes(pluginDir: string, ipam: string, host: number): void {
  fakePlugin(pluginDir, "bridge", {
    ips: [`198.18.0.${host}/24`],
    gateway: "198.18.0.1",
    hostInterface: `veth-blue${host}`,
    reserve: join(ipam, "blue"),
  });
  fakePlugin(pluginDir, "portmap", { chain: "pass" });
  fakePlugin(pluginDir, "ptp", {
    ips: [`198.19.0.${host}/24`],
    hostInterface: `veth-green${host}`,
    reserve: join(ipam, "green"),
  });
}

/** The calls for a pod, such as `bridge ADD eth0`, in order. */
function callsFor(pluginDir: string, pod: Pod, command: string): string[] {
  return calls(pluginDir)
    .filter(({ env }) => env["CNI_CONTAINERID"] === pod.containerId)
    .filter((call) => call.command === command)
    .map(({ plugin, env }) => `${plugin} ${command} ${env["CNI_IFNAME"]}`);
}

function showCalls(screen: Screen, pluginDir: string, pod: Pod): void {
  const called = callsFor(pluginDir, pod, "ADD");
  screen.say(
    `No ip addr here: fake plugins make no interfaces. What genie called for ${pod.name}:`,
  );
  screen.output(called.map((call) => `  ${call}`).join("\n"));
  const expected = ["bridge ADD eth0", "portmap ADD eth0", "ptp ADD eth5"];
  screen.check(called.join() === expected.join(), "each plugin once, in the order of the plan");
  const names = interfaceNames(pod, "pod").join(", ");
  screen.check(names === "eth0, eth5", `the result names ${names} in the pod`);
}

function proofs(pods: Pod[], ipam: string, pluginDir: string): Proof[] {
  const reserved = existsSync(ipam)
    ? readdirSync(ipam, { recursive: true, encoding: "utf8" }).filter((name) => name.includes("/"))
    : [];
  const unpaired = pods.filter((pod) => {
    const added = callsFor(pluginDir, pod, "ADD").map((call) => call.replace("ADD", "DEL"));
    return callsFor(pluginDir, pod, "DEL").join() !== added.toReversed().join();
  });
  const names = unpaired.map(({ name }) => name);
  const netns = pods.filter((pod) => existsSync(pod.netns)).map((pod) => pod.netns);
  return [
    { ok: reserved.length === 0, text: `no address reserved in ${ipam}${list(reserved)}` },
    {
      ok: unpaired.length === 0,
      text: `no plugin without its DEL: one for each ADD, in reverse${list(names)}`,
    },
    { ok: netns.length === 0, text: `no network namespace of these pods${list(netns)}` },
  ];
}
