/**
 * What genie agent does besides policy, through the compiled binary: lib/agent/task.ts,
 * lib/agent/publish.ts, lib/agent/listen.ts, lib/agent/metrics.ts, lib/agent/upkeep.ts.
 */
import { Database } from "bun:sqlite";
import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { State } from "../lib/database.ts";
import { putStatus } from "../lib/kubernetes/network_status.ts";
import { insertLedger } from "../lib/ledger.ts";
import { metrics } from "./agent_metrics.ts";
import { type ApiServer, startApiServer } from "./apiserver.ts";
import { runGenie, tempDir, withNetns } from "./fakes.ts";
import {
  type AgentProcess,
  inputsKnown,
  podObject,
  rowsOf,
  startAgent,
  startCluster,
  until,
} from "./policed.ts";
import { addAttachment, ledgerRow, withLedger } from "./record.ts";
import { lacks } from "./skip.ts";
import { compiledGenie } from "./wire.ts";

const keys = tempDir();
let api: ApiServer;
beforeAll(async () => {
  api = await startApiServer(join(keys.path, "api"), { keepAlive: false });
});
afterAll(async () => {
  await api.stop();
  keys[Symbol.dispose]();
});

/** Mounts a small disk. @returns whether that worked */
function mountDisk(path: string): boolean {
  const args = ["mount", "-t", "tmpfs", "-o", "size=512k", "genie-test", path];
  return Bun.spawnSync(args).exitCode === 0;
}

/** A node without pods of its own: what it has is on record. */
interface Quiet {
  dir: string;
  state: string;
  /** `enter`: a command that the agent is run by. */
  agent: (...enter: string[]) => AgentProcess;
  record: <T>(fn: (state: State) => T) => T;
}

async function withQuiet(act: (node: Quiet) => Promise<void>, table = ""): Promise<void> {
  using dir = tempDir();
  const agents: AgentProcess[] = [];
  const state = join(dir.path, "state");
  const conf = join(dir.path, "conf");
  mkdirSync(conf);
  const file = join(dir.path, "plugins.toml");
  writeFileSync(
    file,
    `state_dir = "${state}"
conf_dir = "${conf}"
kubernetes.kubeconfig = "${api.kubeconfig("token")}"
kubernetes.timeout = "1s"
agent = { listen = "127.0.0.1:0", cri_socket = "${dir.path}/absent.sock" }
${table}`,
  );
  try {
    await act({
      dir: dir.path,
      state,
      agent: (...enter) => {
        const agent = startAgent(dir.path, file, undefined, enter);
        agents.push(agent);
        return agent;
      },
      record: (fn) => withLedger(state, fn),
    });
  } finally {
    await Promise.all(agents.map((agent) => agent.end("SIGKILL")));
  }
}

const status: Record<string, string> = { "k8s.v1.cni.cncf.io/network-status": "[]" };
const annotationsOf = (path: string) =>
  (api.object(path)?.["metadata"] as { annotations?: object } | undefined)?.annotations;

/** A pod of its own for each test, as the API has it. */
function makePod(uid: string, annotations = {}): { name: string; path: string } {
  const name = `p-${crypto.randomUUID()}`;
  const path = `/api/v1/namespaces/team/pods/${name}`;
  api.put(path, { metadata: { uid, annotations } });
  return { name, path };
}

/** Leaves a status for the agent, as ADD does. */
function wait(
  state: State,
  name: string,
  { uid = "u", containerId = name, atMs = Date.now(), annotations = status } = {},
): void {
  addAttachment(state, { containerId, namespace: "team", pod: name });
  const pod = { namespace: "team", name, uid };
  putStatus(state, { containerId, requestIfName: "eth0", pod, annotations }, atMs);
}

const pending = (state: string) => rowsOf(state, "SELECT * FROM statuses").length;

/** Where a running agent answers. */
async function addressOf(agent: AgentProcess, times = 1): Promise<string> {
  await agent.said("Metrics and health are served", times);
  const found =
    agent
      .log()
      .match(/address=(\S+)/g)
      ?.at(-1) ?? "";
  return `http://${found.slice("address=".length)}`;
}

/** The value of a sample; undefined where there is none. */
async function sample(agent: AgentProcess, name: string): Promise<number | undefined> {
  const text = await (await fetch(`${await addressOf(agent)}/metrics`)).text();
  const line = text.split("\n").find((one) => one.startsWith(`${name} `));
  return line === undefined
    ? undefined
    : Number(line.slice(name.length + 1).replace("+Inf", "Infinity"));
}

describe("statuses that wait", () => {
  test("are published, each on its own pod, and those of no pod are dropped", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      const own = makePod("u", { own: "kept" });
      const stranger = makePod("another");
      const hash = "0123456789abcdef0123456789abcdef";
      const mirror = makePod("m", { "kubernetes.io/config.mirror": hash });
      const forged = makePod("f", { "kubernetes.io/config.mirror": "another" });
      record((one) => {
        wait(one, own.name);
        wait(one, stranger.name);
        wait(one, "nobody");
        wait(one, mirror.name, { uid: hash });
        wait(one, forged.name, { uid: hash });
        wait(one, "damaged", { annotations: { a: 7 as unknown as string } });
      });
      const running = agent();
      await until(() => pending(state) === 0);
      expect(annotationsOf(own.path)).toEqual({ own: "kept", ...status });
      expect(annotationsOf(stranger.path)).toEqual({});
      expect(annotationsOf(mirror.path)).toMatchObject(status);
      expect(annotationsOf(forged.path)).not.toMatchObject(status);
      expect(running.log()).toContain("Dropped a damaged status container=damaged");
      // While it runs, too.
      const later = makePod("u");
      record((one) => wait(one, later.name));
      await until(() => annotationsOf(later.path) !== undefined && pending(state) === 0);
      expect(annotationsOf(later.path)).toEqual(status);
    });
  });

  test("of two sandboxes of a pod the newer one counts", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      const pod = makePod("u");
      const inline = makePod("uid-1", { published: "by its ADD" });
      record((one) => {
        wait(one, pod.name, { containerId: "old", annotations: { ...status, at: "old" } });
        const atMs = Date.now() + 1;
        wait(one, pod.name, { containerId: "new", atMs, annotations: { ...status, at: "new" } });
        wait(one, inline.name, { containerId: "left", uid: "uid-1" });
        addAttachment(one, { containerId: "live", namespace: "team", pod: inline.name });
        one.database.run("UPDATE attachments SET created_at_ms = 1 WHERE container_id = 'left'");
      });
      agent();
      await until(() => pending(state) === 0);
      expect(annotationsOf(pod.path)).toEqual({ ...status, at: "new" });
      expect(annotationsOf(inline.path)).toEqual({ published: "by its ADD" });
    });
  });

  test("outlast an outage, and a static pod of which the API does not know yet", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      const uid = "fedcba9876543210fedcba9876543210";
      const pod = makePod("u");
      const early = `early-${crypto.randomUUID()}`;
      api.misbehave(...Array.from({ length: 3 }, () => ({ kind: "reset" }) as const));
      record((one) => {
        wait(one, pod.name);
        wait(one, early, { uid });
      });
      const running = agent();
      await until(() => annotationsOf(pod.path) !== undefined);
      await until(() => pending(state) === 1);
      await running.said(/Cannot publish network status: .*early-/);
      const path = `/api/v1/namespaces/team/pods/${early}`;
      api.put(path, {
        metadata: { uid: "m", annotations: { "kubernetes.io/config.mirror": uid } },
      });
      await until(() => pending(state) === 0);
      expect(annotationsOf(path)).toMatchObject(status);
      expect(await sample(running, "genie_api_errors_total")).toBeGreaterThan(0);
      expect(await sample(running, "genie_status_pending")).toBe(0);
    });
  });
});

/** A call of genie, just now. */
const call = () => ledgerRow({ kind: "call", atMs: Date.now() });

describe("metrics", () => {
  test("are as asked for; a scrape sees what was written, a restart loses nothing", async () => {
    await withQuiet(async ({ dir, agent, record }) => {
      const ipam = {
        type: "host-local",
        dataDir: join(dir, "addresses"),
        ranges: [[{ subnet: "10.7.0.0/29" }]],
      };
      const list = { cniVersion: "1.0.0", name: "blue", plugins: [{ type: "bridge", ipam }] };
      writeFileSync(join(dir, "conf", "10-blue.conflist"), JSON.stringify(list));
      mkdirSync(join(dir, "addresses", "blue"), { recursive: true });
      writeFileSync(join(dir, "addresses", "blue", "10.7.0.2"), "c1");
      record((one) => insertLedger(one, [call()]));
      const first = agent();
      const address = await addressOf(first);
      const calls = 'genie_requests_total{command="ADD",outcome="ok",code="0"}';
      expect(await sample(first, calls)).toBeUndefined();
      record((one) => {
        insertLedger(one, [ledgerRow({ atMs: Date.now() }), call()]);
        addAttachment(one, { containerId: "c1" });
        const stuck = { state: "leaked", error: "no", atMs: 1 } as const;
        addAttachment(one, { containerId: "c2", stuck });
      });
      expect(await sample(first, calls)).toBe(1);
      const plain = await fetch(`${address}/metrics`);
      expect(plain.headers.get("content-type")).toBe("text/plain; version=0.0.4; charset=utf-8");
      expect(await plain.text()).toContain("\n# TYPE genie_requests_total counter\n");
      const headers = { Accept: "application/openmetrics-text" };
      const answer = await fetch(`${address}/metrics`, { headers });
      expect(answer.headers.get("content-type")).toBe(
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
      );
      const text = await answer.text();
      for (const line of [
        "# TYPE genie_agent info",
        "# UNIT genie_request_duration_seconds seconds",
        'genie_request_duration_seconds_bucket{command="ADD",network="blue",le="0.025"} 1.0',
        'genie_request_duration_seconds_bucket{command="ADD",network="blue",le="0.01"} 0.0',
        'genie_attachments{network="blue",state="attached"} 1.0',
        "genie_leaked_attachments 1.0",
        'genie_addresses{network="blue",family="ipv4",state="used"} 1.0',
        'genie_addresses{network="blue",family="ipv4",state="total"} 5.0',
        "genie_database_errors_total 0.0",
      ]) {
        expect(text).toContain(`\n${line}\n`.slice(line.startsWith("# TYPE genie_agent") ? 1 : 0));
      }
      for (const [name, labels] of Object.entries(metrics)) {
        if (name.startsWith("genie_policy_")) continue;
        const pairs = text.split("\n").find((one) => one.startsWith(name)) ?? "";
        for (const label of labels)
          expect([name, pairs]).toEqual([name, expect.stringContaining(label)]);
      }
      expect(text).toEndWith("\n# EOF\n");
      expect(text).not.toContain("genie_policy");
      expect(await first.end("SIGTERM")).toBe(0);
      record((one) => insertLedger(one, [call()]));
      const second = agent();
      await until(async () => (await sample(second, calls)) === 1);
    });
  });

  test.each([
    ["GET", "/", 404],
    ["GET", "/healthz/x", 404],
    ["POST", "/metrics", 405],
    ["HEAD", "/metrics", 200],
    ["GET", "/healthz", 200],
  ])("%s %s", async (method, path, expected) => {
    await withQuiet(async ({ agent }) => {
      const address = await addressOf(agent());
      await until(async () => (await fetch(`${address}${path}`, { method })).status === expected);
    });
  });

  test("health names the part that cannot go on", async () => {
    const table = 'policy.enforce = true\nkubernetes.kubelet_dir = "/absent"';
    await withQuiet(async ({ dir, agent }) => {
      const file = join(dir, "plugins.toml");
      const text = await Bun.file(file).text();
      writeFileSync(file, text.replace(/kubeconfig = .*/, `kubeconfig = "${dir}/absent"`));
      const running = agent();
      const address = await addressOf(running);
      await running.said("Task policy failed");
      const answer = await fetch(`${address}/healthz`);
      expect([answer.status, await answer.text()]).toEqual([
        503,
        expect.stringMatching(/^policy: .*absent/m),
      ]);
      expect(await sample(running, "genie_part_failures_total")).toBeGreaterThan(0);
      expect(await sample(running, "genie_policy_inputs_age_seconds")).toBe(Infinity);
    }, table);
  });
});

describe("upkeep", () => {
  test("traffic is counted anew, the ledger pruned", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      record((one) => {
        insertLedger(one, [ledgerRow({ atMs: 1 }), ledgerRow({ atMs: Date.now() })]);
        const put = "INSERT INTO traffic VALUES (?, 'eth0', 'blue', ?, 1000, 0, NULL)";
        one.database.query(put).run("here", "lo");
        one.database.query(put).run("gone", "genie-gone");
      });
      agent();
      await until(() => rowsOf(state, "SELECT * FROM ledger").length === 1);
      const query = "SELECT container_id AS id FROM traffic WHERE bytes_per_second IS NOT NULL";
      await until(() => rowsOf(state, query).length === 1);
      expect(rowsOf(state, "SELECT container_id AS id FROM traffic")).toEqual([{ id: "here" }]);
    }, 'audit.keep = "1h"\n');
  });
});

describe("trouble", () => {
  test("a locked record is counted, keeps nobody from ending, and passes", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      const pod = makePod("u");
      record((one) => wait(one, pod.name));
      using locker = new Database(join(state, "genie.db"));
      locker.run("BEGIN IMMEDIATE");
      const first = agent();
      await until(async () => ((await sample(first, "genie_database_errors_total")) ?? 0) > 0);
      // The lock stays until the second one is there, and so would who waited for it.
      expect(await first.end("SIGTERM")).toBe(0);
      const second = agent();
      await second.said("genie agent runs");
      locker.run("ROLLBACK");
      await until(() => pending(state) === 0);
      expect(annotationsOf(pod.path)).toEqual(status);
    });
  });

  test.skipIf(lacks("network namespaces"))(
    "a storm of ADDs and the agent's own work: nobody starves",
    async () => {
      await withQuiet(async ({ dir, state, agent, record }) => {
        const bin = join(dir, "bin");
        mkdirSync(bin);
        const result = '{"cniVersion":"1.0.0","ips":[{"address":"10.9.0.9/16"}]}';
        const script = `#!/bin/sh\ncat >/dev/null\n[ "$CNI_COMMAND" != ADD ] || echo '${result}'\n`;
        writeFileSync(join(bin, "cheap"), script, { mode: 0o755 });
        const list = { cniVersion: "1.0.0", name: "blue", plugins: [{ type: "cheap" }] };
        writeFileSync(join(dir, "conf", "blue.conflist"), JSON.stringify(list));
        const waiting = Array.from({ length: 100 }, (_, i) => ({ ...makePod("u"), id: `w${i}` }));
        const old = Array.from({ length: 512 * 30 }, (_, i) => ledgerRow({ atMs: i }));
        record((one) => {
          for (const { id, name } of waiting) wait(one, name, { containerId: id });
          insertLedger(one, old);
          for (let i = 0; i < 30; i++) {
            const stuck = { state: "leaked", error: "no", atMs: 1 } as const;
            addAttachment(one, { containerId: `leaked-${i}`, stuck });
          }
          one.database.run(
            "UPDATE attachments SET plan = json_set(plan, '$.plugins', json_array(?))",
            [join(bin, "cheap")],
          );
        });
        const running = agent();
        await running.said("genie agent runs");
        const stdin = { cniVersion: "1.0.0", name: "genie", type: "genie" };
        const config = { ...stdin, plugins_file: join(dir, "plugins.toml") };
        const call = (command: string, id: number, netns: string) => {
          const ids = { CNI_COMMAND: command, CNI_CONTAINERID: `storm-${id}`, CNI_IFNAME: "eth0" };
          const env = {
            ...ids,
            CNI_NETNS: netns,
            CNI_PATH: bin,
            PATH: "/bin:/usr/bin",
          };
          return runGenie(compiledGenie(), env, config);
        };
        // A writer that lost its turn on a busy machine holds the record for longer than a moment.
        let isOver = false;
        const slowWriter = (async () => {
          using locker = new Database(join(state, "genie.db"));
          locker.run("PRAGMA busy_timeout = 30000");
          while (!isOver) {
            locker.run("BEGIN IMMEDIATE");
            await Bun.sleep(500);
            locker.run("COMMIT");
            await Bun.sleep(100);
          }
        })();
        await withNetns(async ({ path }) => {
          for (const command of ["ADD", "DEL", "ADD"]) {
            const ids = Array.from({ length: 100 }, (_, i) => i);
            const all = await Promise.all(ids.map((id) => call(command, id, path)));
            const failed = all.filter(({ status: exit }) => exit !== 0).map(({ stdout }) => stdout);
            expect([command, failed]).toEqual([command, []]);
          }
        });
        await until(() => pending(state) === 0);
        const leaked = "SELECT 1 FROM attachments WHERE state = 'leaked'";
        await until(() => rowsOf(state, leaked).length === 0);
        await until(() => rowsOf(state, "SELECT 1 FROM ledger WHERE at_ms < 100000").length === 0);
        isOver = true;
        await slowWriter;
        expect(running.log()).not.toContain("database is locked");
        expect(await sample(running, "genie_database_errors_total")).toBe(0);
      }, 'default.networks = ["blue"]\naudit.keep = "1d"\nlog_level = "debug"\n');
    },
    120_000,
  );

  test.skipIf(lacks("mounts"))("a full disk is counted, and passes", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      mkdirSync(state, { mode: 0o700 });
      if (!mountDisk(state)) throw new Error("Cannot mount");
      try {
        const uid = "fedcba9876543210fedcba9876543211";
        const name = `late-${crypto.randomUUID()}`;
        const path = `/api/v1/namespaces/team/pods/${name}`;
        record((one) => wait(one, name, { uid }));
        const running = agent();
        await running.said("Cannot publish network status");
        const fill = `dd if=/dev/zero of=${state}/fill bs=1k 2>/dev/null || true`;
        Bun.spawnSync(["/bin/sh", "-c", fill]);
        const mirror = { "kubernetes.io/config.mirror": uid };
        api.put(path, { metadata: { uid: "m", annotations: mirror } });
        const errors = "genie_database_errors_total";
        await until(async () => ((await sample(running, errors)) ?? 0) > 0);
        const [[key = ""] = []] = Object.entries(status);
        await until(() => Object.hasOwn(annotationsOf(path) ?? {}, key));
        expect(await sample(running, "genie_status_pending")).toBe(1);
        rmSync(join(state, "fill"));
        await until(() => pending(state) === 0);
        expect(await running.end("SIGTERM")).toBe(0);
      } finally {
        Bun.spawnSync(["umount", "--lazy", state]);
      }
    });
  });

  test("events that make no sense are counted, and those after them count", async () => {
    await withQuiet(async ({ dir, state, agent }) => {
      const cluster = await startCluster(join(dir, "cluster"));
      try {
        const file = join(dir, "plugins.toml");
        const text = await Bun.file(file).text();
        const own = `kubeconfig = "${cluster.kubeconfig("token")}"`;
        writeFileSync(file, text.replace(/kubeconfig = .*/, own));
        const running = agent();
        await inputsKnown(state);
        await until(() => cluster.watches.count("/api/v1/pods") > 0);
        cluster.watches.send("/api/v1/pods", '{"type":"ADDED","object":[]}\n');
        const garbage = "genie_api_garbage_total";
        await until(async () => ((await sample(running, garbage)) ?? 0) > 0);
        cluster.put("/api/v1/namespaces/default/pods/web", podObject("web", "u"));
        const query = "SELECT 1 FROM policy_inputs WHERE name = 'web'";
        await until(() => rowsOf(state, query).length === 1);
        expect((await fetch(`${await addressOf(running)}/healthz`)).status).toBe(200);
        // What cannot be put in force lags the longer.
        using locker = new Database(join(state, "genie.db"));
        locker.run("BEGIN IMMEDIATE");
        cluster.put("/api/v1/namespaces/default/pods/db", podObject("db", "v"));
        const lag = "genie_policy_lag_seconds";
        await until(async () => ((await sample(running, lag)) ?? 0) > 1);
        locker.run("ROLLBACK");
        await until(() => rowsOf(state, query.replace("web", "db")).length === 1);
      } finally {
        await cluster.stop();
      }
    }, "policy.enforce = true");
  });

  test("a record that is set aside is followed", async () => {
    await withQuiet(async ({ state, agent, record }) => {
      const pod = makePod("u");
      const running = agent();
      const address = await addressOf(running);
      await until(async () => (await fetch(`${address}/healthz`)).status === 200);
      for (const suffix of ["", "-wal", "-shm"]) rmSync(join(state, `genie.db${suffix}`));
      record((one) => {
        wait(one, pod.name);
        insertLedger(one, [call()]);
      });
      await until(() => pending(state) === 0);
      const calls = 'genie_requests_total{command="ADD",outcome="ok",code="0"}';
      expect(await sample(running, calls)).toBe(1);
    });
  });

  test("of two agents the second answers when the first has ended", async () => {
    await withQuiet(async ({ agent }) => {
      const first = agent();
      await addressOf(first);
      const second = agent();
      await second.said("waiting for it to end");
      expect(second.log()).not.toContain("Metrics and health are served");
      await first.end("SIGKILL");
      expect(await sample(second, "genie_status_pending")).toBe(0);
    });
  });
});

test("tells systemd that it works, goes on working, and ends", async () => {
  using dir = tempDir();
  const socket = join(dir.path, "notify");
  // Bun has no datagram sockets of the file system, perl is on every Debian.
  const script = `use Socket; socket(my $s, AF_UNIX, SOCK_DGRAM, 0) or die; $| = 1;
    bind($s, sockaddr_un($ARGV[0])) or die; print "ready\n";
    while (defined recv($s, my $m, 4096, 0)) { print "$m\n"; last if $m =~ /STOPPING/ }`;
  await using listener = Bun.spawn(["perl", "-e", script, socket], { stdout: "pipe" });
  const output = listener.stdout.pipeThrough(new TextDecoderStream());
  let heard = "";
  const read = (async () => {
    for await (const chunk of output) heard += chunk;
  })();
  await until(() => heard.includes("ready"));
  await withQuiet(async ({ agent }) => {
    const one = agent("/usr/bin/env", `NOTIFY_SOCKET=${socket}`, "WATCHDOG_USEC=200000");
    const words = ["READY=1\n", "STATUS=conflist, ", "WATCHDOG=1\nWATCHDOG=1\n"];
    await until(() => words.every((word) => heard.includes(word)));
    expect(heard).not.toContain("STOPPING");
    expect(await one.end("SIGTERM")).toBe(0);
  });
  await read;
  expect(heard.trimEnd().split("\n").at(-1)).toBe("STOPPING=1");
});
