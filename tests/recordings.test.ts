/**
 * What the real plugins of Calico, Flannel, Romana and Weave answered, recorded call by call
 * (tests/fixtures/quirks/recordings.jsonl): genie takes each answer, and the stand-ins of
 * tests/quirks.test.ts give the same ones. Paths and ids in them are made up.
 */
import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { isSupported } from "../lib/cni.ts";
import { fakePlugin, tempDir } from "./fakes.ts";
import type { QuirkScript } from "./fixtures/quirks/plugin.ts";
import { storedRows } from "./stage.ts";
import { annotated, makeNode, wire, wireError } from "./wire.ts";

/** One call of one plugin. */
interface Recording {
  /** Type and release: `weave-net 2.8.1`. */
  plugin: string;
  command: string;
  scenario: string;
  ifName?: string;
  stdin: string;
  exit: number;
  stdout:
    | string
    | { ips?: { address: string }[]; ip4?: { ip: string }; code?: number; msg?: string };
}

const fixtures = join(import.meta.dir, "fixtures", "quirks");
const recordings = readFileSync(join(fixtures, "recordings.jsonl"), "utf8")
  .trim()
  .split("\n")
  .map((line) => JSON.parse(line) as Recording);

const named = (all: Recording[]) =>
  all.map((one) => [one.plugin, one.command, one.scenario, one] as const);

/** Which stand-in copies a recorded plugin. */
const standIns: Record<string, Pick<QuirkScript, "system" | "shape">> = {
  "weave-net 2.8.1": { system: "weave" },
  "romana 2.0": { system: "romana" },
  "calico 1.11": { system: "calico", shape: "empty" },
  "calico 3.30": { system: "calico", shape: "host" },
  "flannel 1.1.2": { system: "flannel" },
};

/** What needs no network namespace and no daemon: VERSION, other commands, a version refused. */
function isAlone({ plugin, command, stdout, scenario }: Recording): boolean {
  if (!(plugin in standIns)) return false;
  const isRefused = typeof stdout === "object" && stdout.code === 1;
  // The real one has its delegate checked.
  if (plugin.startsWith("flannel") && command === "CHECK") return false;
  return isRefused || !["ADD", "DEL"].includes(command) || /subnet.env is missing/.test(scenario);
}

describe("a stand-in answers as the recorded", () => {
  test.each(named(recordings.filter(isAlone)))("%s: %s: %s", (plugin, command, _scenario, one) => {
    using dir = tempDir();
    const script = { ...standIns[plugin], subnet: "10.231.0.0/24", data: dir.path };
    const fixture = join(fixtures, "plugin.ts");
    const text = `#!${process.execPath} ${fixture}\n${JSON.stringify(script)}`;
    const path = fakePlugin(dir.path, "plugin", text);
    const { PATH = "" } = process.env;
    const env = { PATH, CNI_COMMAND: command, CNI_CONTAINERID: "c1", CNI_PATH: dir.path };
    const { exitCode, stdout } = Bun.spawnSync([path], { env, stdin: Buffer.from(one.stdin) });
    const said = stdout.toString();
    expect([exitCode, typeof one.stdout === "string" ? said : JSON.parse(said)]).toEqual([
      one.exit,
      one.stdout,
    ]);
  });
});

describe("genie takes what was recorded of", () => {
  const adds = recordings.filter(({ command }) => command === "ADD");
  test("many", () => expect(adds.length).toBeGreaterThan(40));

  test.each(named(adds))("%s: %s: %s", async (plugin, _command, _scenario, one) => {
    const [type = ""] = plugin.split(" ");
    const { name: _name, cniVersion = "0.1.0", ...config } = JSON.parse(one.stdin);
    const raw = typeof one.stdout === "string" ? one.stdout : JSON.stringify(one.stdout);
    const list = { name: "recorded", cniVersion, plugins: [{ ...config, type }] };
    const delegates = { [type]: { ADD: { raw, status: one.exit }, versions: [cniVersion] } };
    using node = makeNode({ lists: { "1.conflist": list }, delegates });
    const { ifName = "eth0" } = one;
    const env = { CNI_IFNAME: ifName };
    const stdin = { ...annotated({ cni: "recorded" }), cniVersion: "1.0.0" };
    const run = await wire(node, { command: "ADD", stdin, env });
    if (type === "romana" && ifName !== "eth0") {
      const said = expect.stringContaining('plugin "romana" gives a container one interface');
      expect(wireError(run)).toMatchObject({ code: 105, msg: said });
      return;
    }
    if (one.exit !== 0) {
      const { code = 104, msg = "printed nothing" } =
        typeof one.stdout === "object" ? one.stdout : {};
      const found = wireError(run);
      expect(found.code).toBe(isSupported(cniVersion) ? code : 1);
      expect(found.msg).toContain(`plugin "${type}"`);
      expect(found.msg).toContain(msg.trim().slice(0, 100));
      expect(storedRows(node)).toEqual([]);
      return;
    }
    expect(run).toMatchObject({ status: 0, stderr: "" });
    const { interfaces, ips } = JSON.parse(run.stdout);
    const { ips: given, ip4 } = typeof one.stdout === "object" ? one.stdout : {};
    const addresses = given?.map(({ address }) => address) ?? [ip4?.ip];
    expect(ips.map(({ address }: { address: string }) => address)).toEqual(addresses);
    for (const ip of ips) {
      expect(interfaces[ip.interface]).toMatchObject({ name: ifName, sandbox: expect.any(String) });
    }
    expect((await wire(node, { command: "DEL", env })).status).toBe(0);
    expect(storedRows(node)).toEqual([]);
  });
});
