/**
 * Bugs that users of genie's neighbours reported (Multus, CNI-Genie, podman, nerdctl, Nomad, the
 * reference plugins), or that were seen with their real programs. Each is a script of tests/bugs/:
 * it runs the compiled program on a node of its own, and prints a line for each thing it looks at.
 */
import { afterAll, describe, expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { realPluginDir, tempDir } from "./fakes.ts";
import type { Need } from "./needs.ts";
import { lacks } from "./skip.ts";
import { compiledGenie } from "./wire.ts";

const folder = join(import.meta.dir, "bugs");

/** How many things each looks at, so that one which ends early fails; and what else it needs. */
const cases: [name: string, count: number, ...needs: Need[]][] = [
  ["01-kubeconfig-brackets", 9],
  ["02-cni-args-ip-mac", 9],
  ["03-same-id-new-netns", 9, "mounts"],
  ["04-plugin-words-lost", 15],
  ["05-cwd-deleted", 13],
  ["07-empty-values", 19, "iptables"],
  ["11-nerdctl-del-first", 2],
  ["12-firewall-flushed", 5, "iptables"],
  ["13-default-network-json", 5],
  ["15-chain-typo", 4],
  ["20-stdout-noise", 5],
  ["21-args-at-del", 1],
  ["22-odd-environment", 8],
  ["23-config-file-forms", 15],
  ["24-selection-errors", 8],
  ["25-pod-made-anew", 6],
  ["26-nad-chain-folder", 2],
  ["29-cni-args-broken-pair", 20],
  ["32-exec-credentials", 12],
  ["33-bandwidth-tuning-secondary", 6],
  ["34-logical-networks-one-bridge", 10, "iputils-ping"],
  ["35-genie-networks-colon", 11],
  ["36-genie-default-first-file", 2],
  ["37-genie-logical-on-weave", 4],
  ["38-genie-second-default-route", 19, "iputils-ping"],
  ["48-genie-conf-of-its-installer", 13],
  ["54-element-ips-without-capability", 14],
  ["61-weave-one-interface", 9],
  ["62-calico-takes-the-first", 7],
  ["63-romana-repair", 4],
  ["64-next-best-daemon-down", 4],
  ["65-never-did-anything", 8],
  ["66-sigterm-half-made", 5],
  ["67-default-route-inherited", 3],
  ["68-repair-touches-healthy", 3],
  ["69-flannel-logical-network", 4],
  ["73-flannel-twice-leaks", 4],
];

const needsOfAll: Need[] = ["network namespaces", "containernetworking-plugins", "curl", "jq"];
const isAbsent = lacks(...needsOfAll);
const dir = tempDir();
afterAll(() => dir[Symbol.dispose]());

/** So many at once: each mostly waits for small processes. */
const lanes = Array.from({ length: 3 }, () => Promise.resolve());

/** Does it when those before it in its lane have ended. */
function inLane<T>(index: number, job: () => Promise<T>): Promise<T> {
  const lane = index % lanes.length;
  const done = (lanes[lane] ?? Promise.resolve()).then(job);
  lanes[lane] = done.then(
    () => undefined,
    () => undefined,
  );
  return done;
}

/** Runs a case; it has 100 s, and 10 more to clean up. `log` is what its programs complain of. */
async function run(name: string): Promise<{ status: number; lines: string[]; log: string }> {
  const script = join(folder, `${name}.sh`);
  const child = Bun.spawn(["timeout", "--kill-after=10", "100", "bash", script], {
    env: {
      ...process.env,
      TMPDIR: dir.path,
      GENIE: compiledGenie(),
      CNI_PLUGINS: realPluginDir ?? "",
      BUN: process.execPath,
    },
    stdio: ["ignore", "pipe", "pipe"],
  });
  const [text, log] = await Promise.all([child.stdout.text(), child.stderr.text()]);
  return { status: await child.exited, lines: text.trimEnd().split("\n"), log };
}

describe.skipIf(isAbsent)("the bug", () => {
  cases.forEach(([name, count, ...needs], index) => {
    const one = isAbsent || lacks(...needs) ? test.skip : test.concurrent;
    one(
      name,
      async () => {
        const { status, lines, log } = await inLane(index, () => run(name));
        const faults = lines.filter((line) => line.startsWith("FAULT"));
        const oks = lines.filter((line) => line.startsWith("OK "));
        if (status !== 0 || oks.length !== count) process.stderr.write(`${name}: ${log}\n`);
        expect({ status, faults, count: oks.length }).toEqual({ status: 0, faults: [], count });
      },
      // Of a row that waits for its lane; what a case may take, it is told.
      900_000,
    );
  });
});

test("every script has its row", () => {
  const scripts = readdirSync(folder).filter((name) => /^\d/.test(name));
  expect(cases.map(([name]) => `${name}.sh`)).toEqual(scripts.sort());
});
