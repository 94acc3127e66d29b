/**
 * A small fuzz with a fixed seed: recorded inputs, changed. Through the compiled program a few
 * hundred times, through the pure modules thousands of times; the large one, of everything that
 * comes from others, is tests/torture/fuzz.ts. Whatever comes, an answer is a result that holds
 * together, or an error with a listed code; and nothing is left. GENIE_FUZZ_SEED and
 * GENIE_FUZZ_RUNS (a factor) look further.
 */
import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { CniError, code, supportedVersions } from "../lib/cni.ts";
import { parseConfig } from "../lib/config/parse.ts";
import { requestConfig } from "../lib/delegate.ts";
import { isObject, parseJson } from "../lib/json.ts";
import { parseNetworkSelection } from "../lib/kubernetes/npwg.ts";
import { mergeResults, normalizeResult } from "../lib/merge.ts";
import { parseConfigList } from "../lib/networks.ts";
import { carriedPod, parseSelection } from "../lib/pod.ts";
import { readRequest } from "../lib/request.ts";
import { parseResult, toVersion } from "../lib/result.ts";
import { type GenieRun, makeHost } from "./fakes.ts";
import { strictIssues } from "./strict_result.ts";
import { mutate, mutateText } from "./torture/mutate.ts";
import { pick, type Random, randomOf } from "./torture/seed.ts";
import {
  checkFailure,
  control,
  left,
  makeNode,
  type Node,
  nothing,
  stackTrace,
  wire,
} from "./wire.ts";

const seed = Number(process.env["GENIE_FUZZ_SEED"] ?? 20_261_120);
const factor = Number(process.env["GENIE_FUZZ_RUNS"] ?? 1);

const folder = join(import.meta.dir, "samples");
interface Input {
  env: Record<string, string>;
  stdin: string;
  stdout: unknown;
}
/** The recorded calls of genie's place, each pod asking for two networks. */
const inputs = readdirSync(folder)
  .filter((name) => /-(ADD|DEL|STATUS)-main\.json$/.test(name))
  .sort()
  .map((name): Input => {
    const { env, stdin, stdout } = JSON.parse(readFileSync(join(folder, name), "utf8")) as Input;
    const asks = '"cni":"blue,green@net1"';
    const known = stdin.replaceAll(/"(k8s\.v1\.cni\.cncf\.io|v1\.multus-cni\.io)\//g, '"x/');
    return { env, stdin: known.replace('"kubernetes.io/config.source":"api"', asks), stdout };
  });
const results = inputs.flatMap(({ stdout }) => (isObject(stdout) ? [JSON.stringify(stdout)] : []));

describe(`fuzz with seed ${seed}: the program`, () => {
  const workers = [0, 1, 2, 3];
  test.concurrent.each(workers)(
    "answers by the protocol, and leaves nothing, part %d",
    async (n) => {
      const random = randomOf(seed + n);
      const rounds = Math.round(75 * factor);
      using node = fuzzNode();
      let succeeded = 0;
      for (let round = 0; round < rounds; round++) {
        const env = mutateEnv(random, node, pick(random, inputs));
        const stdin = withTable(node, mutate(random, pick(random, inputs).stdin));
        if (stdin === undefined) continue;
        const run = await wire(node, { command: env["CNI_COMMAND"] ?? "", env, stdin });
        try {
          succeeded += Number(checkRun(run, env["CNI_COMMAND"]));
        } catch (error) {
          throw new Error(`Round ${round}: ${JSON.stringify({ env, stdin, run })}`, {
            cause: error,
          });
        }
        if (env["CNI_COMMAND"] === "ADD" && run.status === 0) {
          const del = await wire(node, { command: "DEL", env: { ...env, CNI_COMMAND: "DEL" } });
          expect(del).toEqual({ stdout: "", stderr: "", status: 0 });
        }
      }
      expect(left(node)).toEqual(nothing);
      // A fuzz that is always refused at the door proves nothing.
      expect(succeeded).toBeGreaterThan(rounds / 10);
    },
  );
});

/** Plugins of /bin/sh: they cost little, and reserve what must not be left. */
function fuzzNode(): Node {
  const list = (name: string, type: string) => ({ cniVersion: "1.0.0", name, plugins: [{ type }] });
  const plugin = `#!/bin/sh
case $CNI_COMMAND in
ADD) : >"$DIR/reserved/$CNI_CONTAINERID-$CNI_IFNAME"; echo '{"ips":[{"address":"10.0.0.1/8"}]}' ;;
DEL) rm -f "$DIR/reserved/$CNI_CONTAINERID-$CNI_IFNAME" ;;
esac
`;
  return makeNode({
    table: '[default]\nnetworks = ["blue"]\n',
    lists: {
      "10-blue.conflist": list("blue", "bridge"),
      "20-green.conflist": list("green", "ptp"),
    },
    delegates: { bridge: plugin, ptp: plugin },
  });
}

function mutateEnv(random: Random, node: Node, { env }: Input): Record<string, string> {
  const own = env["CNI_NETNS"] === "" ? "" : node.netns;
  const mutated: Record<string, string> = { ...env, CNI_NETNS: own, CNI_PATH: node.bin };
  if (random(3) > 0) return mutated;
  const name = pick(random, Object.keys(mutated));
  // No such bytes in an environment.
  const value = mutateText(random, mutated[name] ?? "").replaceAll("\0", "");
  return { ...mutated, [name]: value };
}

/** The config with the node's table; undefined where it would be read from another place. */
function withTable(node: Node, stdin: string): string | undefined {
  const at = stdin.lastIndexOf("}");
  if (at < 0) return stdin;
  const ours = `,"plugins_file":${JSON.stringify(node.tableFile)}}`;
  const text = stdin.slice(0, at) + ours + stdin.slice(at + 1);
  try {
    const document: unknown = JSON.parse(text);
    return isObject(document) && document["plugins_file"] !== node.tableFile ? undefined : text;
  } catch (error) {
    if (error instanceof SyntaxError) return text;
    throw error;
  }
}

/** @returns true for a success */
function checkRun(run: GenieRun, command: string | undefined): boolean {
  if (run.status !== 0) {
    checkFailure(run);
    return false;
  }
  expect(run.stderr).not.toMatch(control);
  expect(run.stderr).not.toMatch(stackTrace);
  if (command === "ADD") checkResult(JSON.parse(run.stdout));
  else expect(run.stdout).toBe("");
  return true;
}

/** A result that reads well in its version, with an address. */
function checkResult(result: Record<string, unknown>): void {
  const version = String(result["cniVersion"]);
  // What a delegate passes off as the address of a name server is passed on.
  const issues = strictIssues(JSON.stringify(result), { version }).filter(
    (issue) => !/^dns\.nameservers\[\d+\]: is not|socketPath: is not|named/.test(issue),
  );
  expect(issues).toEqual([]);
  const ips = Array.isArray(result["ips"]) ? result["ips"] : [];
  expect(ips.length > 0 || isObject(result["ip4"] ?? result["ip6"])).toBe(true);
}

/** Runs `parse` on mutations of the texts. Returns how many it accepted. */
function fuzz(texts: readonly string[], rounds: number, parse: (text: string) => void): number {
  const random = randomOf(seed);
  let accepted = 0;
  for (let round = 0; round < rounds * factor; round++) {
    const text = mutate(random, pick(random, texts));
    try {
      parse(text);
      accepted++;
    } catch (error) {
      if (error instanceof CniError && error.code !== code.internal) continue;
      throw new Error(`Round ${round}: ${JSON.stringify(text)}`, { cause: error });
    }
  }
  return accepted;
}

describe(`fuzz with seed ${seed}:`, () => {
  test("results", () => {
    const accepted = fuzz(results, 4000, (text) => {
      const result = parseResult(parseJson(text, "fuzz"), "1.0.0");
      const completed = normalizeResult(result, { ifName: "eth0", netns: "/n" });
      const parts = [0, 1].map((i) => ({ ifName: `eth${i}`, netns: "/n", result: completed }));
      const merged = mergeResults(parts);
      expect(normalizeResult(completed, { ifName: "eth0", netns: "/n" })).toEqual(completed);
      for (const version of supportedVersions) {
        const wire = toVersion(merged, version);
        const again = parseResult(parseJson(JSON.stringify(wire), "wire"), version);
        expect(toVersion(again, version)).toEqual(wire);
        if (merged.ips.length > 0) checkResult(wire);
      }
    });
    expect(accepted).toBeGreaterThan(400);
  });

  test("config lists", () => {
    const texts = inputs.map(({ stdin }) => stdin);
    const accepted = fuzz(texts, 4000, (text) => {
      const list = parseConfigList(parseJson(text, "fuzz"), "fuzz");
      for (const plugin of list.plugins) {
        const request = requestConfig(list, plugin, { capabilityArgs: { mac: "x" } });
        expect([request.type, request["name"]]).toEqual([plugin.type, list.name]);
        expect(Object.keys(request)).not.toContain("capabilities");
      }
    });
    expect(accepted).toBeGreaterThan(400);
  });

  test("requests and the annotations they carry", () => {
    const texts = inputs.map(({ stdin }) => stdin);
    const accepted = fuzz(texts, 4000, (stdin) => {
      const env = { CNI_CONTAINERID: "c", CNI_IFNAME: "eth0", CNI_NETNS: "/n", CNI_ARGS: stdin };
      const pod = carriedPod(readRequest(makeHost({ env, stdin }), "ADD"));
      if (pod) parseSelection(pod.annotations);
    });
    expect(accepted).toBeGreaterThan(400);
  });

  test("selections", () => {
    const simple = ["blue", "blue,green@net1", "a@eth0, b ,c@net7", "ns/a,b@x"];
    const json = '[{"name":"a","namespace":"n","interface":"net1","ips":["10.0.0.1/8"]}]';
    const accepted = fuzz(simple, 4000, (text) => {
      parseSelection(new Map([["cni", text]]));
    });
    expect(accepted).toBeGreaterThan(400);
    fuzz([...simple, json], 4000, (text) => void parseNetworkSelection(text, "default"));
  });

  test("plugin tables", () => {
    const table = readFileSync(join(import.meta.dir, "..", "plugins.toml"), "utf8");
    // The shipped table is all comments but for a few lines: all of it counts here.
    const texts = [table, table.replaceAll(/^# ?(?=[[\w].*[\]=])/gm, "")];
    const accepted = fuzz(texts, 600, (text) => void parseConfig(text, "/plugins.toml"));
    expect(accepted).toBeGreaterThan(60);
  });
});
