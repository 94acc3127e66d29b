/** `genie status` (lib/node/health.ts), by the command line in throw-away roots of a node. */
import { describe, expect, test } from "bun:test";
import { chmodSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { hostname } from "node:os";
import { dirname, join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { insertLedger } from "../lib/ledger.ts";
import { ownList } from "../lib/node/genie_config.ts";
import { takeFileLock } from "../lib/policy/rulesets.ts";
import { putAlive } from "../lib/policy/store.ts";
import manifest from "../package.json";
import { makeHost } from "./fakes.ts";
import { addAttachment, ledgerRow, startMs, withLedger } from "./record.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();
const nowMs = startMs + 3 * 3_600_000;
const stateDir = "var/lib/cni/genie";

let count = 0;
/** The root of a node that is well: one network, and containerd that calls genie. */
function makeRoot(): string {
  const root = join(dir.path, `node-${count++}`);
  const put = (name: string, content: string, mode = 0o644) => {
    const path = join(root, name);
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, content);
    chmodSync(path, mode);
  };
  const answers = (text: object) =>
    `#!/bin/sh\ncat >/dev/null\ncat <<'END'\n${JSON.stringify(text)}\nEND\n`;
  const versions = { cniVersion: "1.0.0", supportedVersions: ["1.0.0"] };
  const ipam = { type: "host-local", subnet: "10.9.0.0/24", dataDir: join(root, "ipam") };
  const plugins = [{ type: "bridge", ipam }];
  put("etc/cni/net.d/00-genie.conflist", JSON.stringify(ownList()));
  const blue = { cniVersion: "1.0.0", name: "blue", plugins };
  put("etc/cni/net.d/10-blue.conflist", JSON.stringify(blue));
  put("etc/cni/genie/plugins.toml", '[default]\nnetworks = ["blue"]\n');
  for (const name of ["bridge", "host-local"]) put(`opt/cni/bin/${name}`, answers(versions), 0o755);
  put("opt/cni/bin/genie", answers({ version: manifest.version }), 0o755);
  put("usr/bin/containerd", "#!/bin/sh\necho containerd x v1.7.2 y\n", 0o755);
  put("etc/containerd/config.toml", "version = 2\n");
  return root;
}

async function status(root: string, ...args: string[]) {
  const host = makeHost({ now: nowMs, env: {} });
  const code = await runCommand(host, ["status", "--host-root", root, ...args]);
  return { code, ...host.written };
}

/** In short, what is wrong. */
async function issues(root: string) {
  const { code, stdout } = await status(root, "--json");
  const found = JSON.parse(stdout) as { findings: { verdict: string; detail: string }[] };
  return { code, wrong: found.findings.map(({ verdict, detail }) => `${verdict}: ${detail}`) };
}

describe("genie status", () => {
  test("is one screen of a node that is well", async () => {
    const root = makeRoot();
    withLedger(join(root, stateDir), (state) => addAttachment(state));
    const shown = await status(root);
    const lines = shown.stdout.replace(/genie\.db, \S+ MB/, "genie.db, SIZE").split("\n");
    expect({ ...shown, stdout: lines }).toEqual({
      code: 0,
      stderr: "",
      stdout: [
        `genie ${manifest.version} on ${hostname()}: healthy`,
        "",
        "Runtime    /etc/containerd/config.toml suits; containerd 1.7.2; runtimes take " +
          "00-genie.conflist, which calls genie",
        "Agent      does not run",
        "Policy     not enforced",
        "Record     /var/lib/cni/genie/genie.db, SIZE, 1 attachment",
        "Leftovers  none",
        "",
        "NETWORK  STATUS     FREE  PODS  FAILED (1h)  WHY NOT",
        "blue     ready   253/253     1            0",
        "",
        "Next: nothing to do",
        "",
      ],
    });
  });

  test("counts what is left behind, and what failed in the last hour", async () => {
    const root = makeRoot();
    withLedger(join(root, stateDir), (state) => {
      const stuck = { error: "plugin bridge is gone", atMs: startMs };
      addAttachment(state, { containerId: "a", stuck: { ...stuck, state: "leaked" } });
      addAttachment(state, { containerId: "b", stuck: { ...stuck, state: "failing" } });
      const failed = { outcome: "failed", code: 103, error: "timed out" } as const;
      insertLedger(state, [
        ledgerRow({ atMs: nowMs - 60_000, containerId: "c", ...failed }),
        ledgerRow({ atMs: nowMs - 60_000, containerId: "d", podName: "api" }),
        ledgerRow({ atMs: startMs, containerId: "e", podName: "old", ...failed }),
      ]);
    });
    expect(await issues(root)).toEqual({
      code: 0,
      wrong: [
        "warning: attachments that are leaked: 1",
        "warning: attachments that could not be detached yet: 1",
        "warning: 1 of 2 pods failed in the last hour",
      ],
    });
    const { stdout } = await status(root);
    expect(stdout).toContain("healthy, 0 problems, 3 warnings\n");
    expect(stdout).toMatch(/^Leftovers {2}1 leaked, 1 failing$/m);
    expect(stdout).toMatch(/^blue +ready +\S+ +2 +1$/m);
    expect(stdout).toEndWith("\nNext: genie gc\n");
  });

  test("says which network cannot be had", async () => {
    const root = makeRoot();
    rmSync(join(root, "opt/cni/bin/bridge"));
    const { code, stdout } = await status(root);
    expect(code).toBe(1);
    expect(stdout).toMatch(
      /^blue +failing +253\/253 +0 +0 +Cannot .* plugin "bridge" is in none of/m,
    );
  });

  test("says that the record is damaged", async () => {
    const root = makeRoot();
    mkdirSync(join(root, stateDir), { recursive: true });
    writeFileSync(join(root, stateDir, "genie.db"), "no database at all\n".repeat(300));
    const { code, wrong } = await issues(root);
    expect([code, wrong]).toEqual([1, [expect.stringContaining("genie.db: file is not a data")]]);
  });

  test("asks the agent that runs", async () => {
    let answer: [string, number] = ["ok\n", 200];
    const fetch = () => new Response(answer[0], { status: answer[1] });
    using server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch });
    const { port } = server;
    const listen = `agent = { listen = "127.0.0.1:${port}" }\n`;
    const root = makeRoot();
    const table = join(root, "etc/cni/genie/plugins.toml");
    writeFileSync(table, `${listen}[default]\nnetworks = ["blue"]\n`);
    withLedger(join(root, stateDir), (state) => {
      putAlive(state, new Map([["networkpolicies", nowMs - 5_000]]));
    });
    const file = join(root, stateDir, "agent.lock");
    const lock = await takeFileLock(makeHost(), file, "agent", { what: "it", deadlineMs: 0 });
    const held = await status(root);
    expect(held.stdout).toMatch(/^Agent {6}runs since \d+s, and is well$/m);
    expect(held.stdout).toMatch(/^Policy {5}pods with rules: 0, known as of 5s ago$/m);
    answer = ["policy: it has not gone round yet\n", 503];
    expect(await issues(root)).toEqual({
      code: 1,
      wrong: ["problem: policy: it has not gone round yet"],
    });
    await server.stop(true);
    expect((await issues(root)).wrong).toEqual([
      expect.stringContaining(`it does not answer at 127.0.0.1:${port} (`),
    ]);
    lock.release();
    expect(await issues(root)).toEqual({ code: 0, wrong: [] });
  });
});
