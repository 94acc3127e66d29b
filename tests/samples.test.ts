/**
 * Inputs captured from real runtimes (tests/samples/README.md), through the compiled program.
 *
 * Every recorded plugin of a scenario is replayed on a node of its own, with genie in its place and
 * a fake behind genie that answers as the recorded plugin did. Environment and stdin are those of
 * the runtime, but for the paths: namespaces, CNI_PATH, and the plugin table on stdin.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import * as v from "valibot";
import { isObject } from "../lib/json.ts";
import { calls, fakePlugin, type GenieRun, type Script } from "./fakes.ts";
import {
  compiledGenie,
  left,
  makeNode,
  type Node,
  nothing,
  spawnGenie,
  wireError,
} from "./wire.ts";

/** One recorded call, see tests/samples/README.md. */
const Sample = v.strictObject({
  scenario: v.string(),
  sequence: v.number(),
  runtime: v.string(),
  plugin: v.string(),
  command: v.picklist(["ADD", "DEL", "STATUS", "VERSION"]),
  env: v.record(v.string(), v.string()),
  stdin: v.string(),
  exit: v.number(),
  stdout: v.union([v.record(v.string(), v.unknown()), v.literal("")]),
});
type Sample = v.InferOutput<typeof Sample>;

const folder = join(import.meta.dir, "samples");
const texts = readdirSync(folder)
  .filter((name) => name.endsWith(".json"))
  .sort()
  .map((name) => readFileSync(join(folder, name), "utf8"));

/** Samples of one plugin in one scenario, in their order; texts, because paths are replaced. */
const replays = Map.groupBy(texts, (text) => {
  const { scenario, plugin } = v.parse(Sample, JSON.parse(text));
  return `${scenario}: ${plugin}`;
});

/** What this test knows of the scenarios: one that is lost or new must be looked at. */
const scenarios = [
  "containerd-add-fails: loopback, main, portmap",
  "containerd-conf-0.3.1: loopback, main, portmap",
  "containerd-conf-1.0.0: loopback, main, portmap",
  "containerd-hostnetwork: loopback, main, portmap",
  "containerd-idle: main, portmap",
  "containerd-killed-during-add: loopback, main, portmap",
  "containerd-plain-lifecycle: loopback, main, portmap",
  "containerd-reboot: loopback, main, portmap",
  "podman-4.3: firewall, main, portmap, tuning",
];

test("the samples are the known scenarios", () => {
  const found = Map.groupBy(replays.keys(), (name) => name.split(": ")[0] ?? "");
  const lines = [...found].map(([scenario, names]) => {
    return `${scenario}: ${names
      .map((name) => name.split(": ")[1])
      .sort()
      .join(", ")}`;
  });
  expect(lines).toEqual(scenarios);
  expect(texts.length).toBe(156);
});

describe("samples", () => {
  test.concurrent.each([...replays])("%s", async (_name, recorded) => {
    using node = makeNode();
    const samples = recorded.map((text) => readSample(node, text));
    const open = new Map<string, Sample>();
    const orphans: Promise<GenieRun>[] = [];
    for (const sample of samples) {
      if (wasKilled(sample)) {
        orphans.push(...(await startHanging(node, sample)));
        continue;
      }
      await replay(node, sample);
      const container = sample.env["CNI_CONTAINERID"] ?? "";
      if (sample.command === "ADD" && sample.exit === 0) open.set(container, sample);
      if (sample.command === "DEL") open.delete(container);
    }
    // The capture ended with these pods running.
    for (const sample of open.values()) await replay(node, asDel(sample));
    for (const run of await Promise.all(orphans)) expect(wireError(run).code).toBe(11);
    expect(left(node)).toEqual(nothing);
  });
});

function readSample(node: Node, text: string): Sample {
  const netns = (path: string) => join(node.dir, basename(path));
  const own = text.replace(/(?:\/var)?\/run\/netns\/[\w-]+/g, netns);
  return v.parse(Sample, JSON.parse(own));
}

/** These ask for objects of the Kubernetes API, which no sample has. */
const objectAnnotations =
  /"(k8s\.v1\.cni\.cncf\.io\/networks|v1\.multus-cni\.io\/default-network)":/g;

/** The recorded config with genie in the plugin's place. */
function stdinOf(node: Node, { stdin, command }: Sample): string {
  if (command === "VERSION") return stdin;
  return stdin
    .replace(objectAnnotations, '"x-$1":')
    .replace(/"type":"(loopback|portmap|firewall|tuning)"/, '"type":"genie"')
    .replace(/\}$/, `,"plugins_file":${JSON.stringify(node.tableFile)}}`);
}

/** The network behind genie: the recorded config without what the runtime put into it. */
function delegateList({ stdin, plugin }: Sample): object {
  const recorded = JSON.parse(stdin) as Record<string, unknown>;
  const { runtimeConfig: _, prevResult: __, name, cniVersion, ...config } = recorded;
  return {
    cniVersion,
    name: `${name}-${plugin}`,
    plugins: [{ ...config, type: fakeName(plugin) }],
  };
}

/** The first plugin of the recorded lists was named genie, the one behind it was bridge. */
const fakeName = (plugin: string) => (plugin === "main" ? "bridge" : plugin);

/** Sets the node up as it was when the sample was taken. */
function prepare(node: Node, sample: Sample, script: Script): void {
  const netns = sample.env["CNI_NETNS"] ?? "";
  if (netns.startsWith(node.dir)) writeFileSync(netns, "");
  if (sample.command === "VERSION") return;
  fakePlugin(node.bin, fakeName(sample.plugin), { reserve: node.reserved, ...script });
  writeFileSync(join(node.conf, "10-net.conflist"), JSON.stringify(delegateList(sample)));
}

function start(node: Node, sample: Sample): Promise<GenieRun> {
  const path = sample.command === "VERSION" ? sample.env["CNI_PATH"] : node.bin;
  const env = { ...sample.env, CNI_PATH: path ?? "" };
  return spawnGenie([compiledGenie()], env, Buffer.from(stdinOf(node, sample)));
}

/** The runtime was killed while this ADD hung; the orphan found no namespace in the end. */
function wasKilled({ command, exit, stdout }: Sample): boolean {
  return command === "ADD" && exit === 1 && stdout !== "" && stdout["code"] === 999;
}

/** Starts an ADD whose delegate hangs, and returns once it does. */
async function startHanging(node: Node, sample: Sample): Promise<Promise<GenieRun>[]> {
  prepare(node, sample, { ADD: { hang: true } });
  const run = start(node, sample);
  const { CNI_CONTAINERID: id } = sample.env;
  const isRunning = () =>
    calls(node.bin).some(({ command, env }) => command === "ADD" && env["CNI_CONTAINERID"] === id);
  // Its own call, not an earlier one: what comes next changes what the plugin does.
  while (!isRunning()) await Bun.sleep(5);
  return [run];
}

async function replay(node: Node, sample: Sample): Promise<void> {
  const { command, exit, stdout } = sample;
  if (command === "ADD" && exit !== 0) {
    const error = v.parse(v.object({ code: v.number(), msg: v.string() }), stdout);
    prepare(node, sample, { ADD: { error } });
    const run = await start(node, sample);
    expect(wireError(run)).toMatchObject({ code: error.code });
    expect(wireError(run).msg).toContain(error.msg);
    return;
  }
  prepare(node, sample, stdout === "" ? {} : { ADD: { result: stdout } });
  const run = await start(node, sample);
  const document = run.stdout === "" ? "" : JSON.parse(run.stdout);
  if (command === "VERSION") checkVersions(document, stdout);
  else expect(comparable(document)).toEqual(comparable(stdout));
  expect(run).toEqual({ ...run, stderr: "", status: 0 });
}

/** We answer all versions the recorded plugin did. */
function checkVersions(document: unknown, recorded: unknown): void {
  const Versions = v.object({ supportedVersions: v.array(v.string()) });
  const ours = v.parse(Versions, document).supportedVersions;
  expect(ours).toEqual(expect.arrayContaining(v.parse(Versions, recorded).supportedVersions));
}

/** A result without what plugins are free to leave out: empty lists, `version` of an address. */
function comparable(result: unknown): unknown {
  if (!isObject(result)) return result;
  const { ips, routes = [], dns: _, ...rest } = result;
  const addresses = v.parse(v.array(v.record(v.string(), v.unknown())), ips);
  return { ...rest, routes, ips: addresses.map(({ version: __, ...ip }) => ip) };
}

/** The DEL that the capture did not see any more. */
function asDel(sample: Sample): Sample {
  const env = { ...sample.env, CNI_COMMAND: "DEL" };
  return { ...sample, command: "DEL", env, exit: 0, stdout: "" };
}
