/**
 * What the agent collects (lib/agent/upkeep.ts, lib/kubernetes/grpc.ts), and
 * the CNI config that it keeps (lib/agent/installed_files.ts): with fake plugins, and a container
 * runtime's own protocol.
 */
import { describe, expect, test } from "bun:test";
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { runConflist } from "../lib/agent/installed_files.ts";
import { openHealth, openRecord } from "../lib/agent/task.ts";
import { attachmentCollector } from "../lib/agent/upkeep.ts";
import { defaultConfig } from "../lib/config/parse.ts";
import { bootId, netnsId } from "../lib/kernel.ts";
import { criSocket, listSandboxes } from "../lib/kubernetes/grpc.ts";
import { netnsState } from "../lib/node/garbage.ts";
import { lastList, ownListText } from "../lib/node/genie_config.ts";
import { noted, openSite, put, takeOff } from "../lib/node/installation.ts";
import { findLiveContainers } from "../lib/node/live_containers.ts";
import * as fake from "./fake_runtime.ts";
import { callOrder, fakePlugin, makeHost, type Script, tempDir } from "./fakes.ts";
import { field } from "./podresources.ts";
import { rowsOf, startAgent, until } from "./policed.ts";
import { addAttachment, withLedger } from "./record.ts";
import { lacks } from "./skip.ts";

/** A container runtime that knows these sandboxes, or answers with this status. */
async function startRuntime(dir: string, answer: readonly string[] | number) {
  const socket = join(dir, "cri.sock");
  // id, metadata, state
  const sandbox = (id: string) =>
    field(1, Buffer.concat([field(1, id), field(2, field(1, "web")), Buffer.from([24, 1])]));
  const list = typeof answer === "number" ? answer : Buffer.concat(answer.map(sandbox));
  const runtime = await fake.startRuntime(socket, { ListPodSandbox: () => list });
  return { socket, [Symbol.asyncDispose]: () => runtime[Symbol.asyncDispose]() };
}

describe("listSandboxes()", () => {
  test.each([
    ["none", [], []],
    ["some, each once", ["a", "b", "a"], ["a", "b"]],
  ])("%s", async (_what, ids, expected) => {
    using dir = tempDir();
    await using runtime = await startRuntime(dir.path, ids);
    expect(criSocket(runtime.socket)).toBe(runtime.socket);
    expect([...(await listSandboxes(makeHost(), runtime.socket))]).toEqual(expected);
  });

  test("a runtime that does not say, and one that is not there", async () => {
    using dir = tempDir();
    await using runtime = await startRuntime(dir.path, 12);
    const fails = (socket: string) => listSandboxes(makeHost(), socket).catch((error) => error);
    expect(await fails(runtime.socket)).toMatchObject({
      code: 11,
      message: expect.stringMatching(/^Cannot list the pods .* gRPC status 12$/),
    });
    expect(await fails(join(dir.path, "absent"))).toMatchObject({
      message: expect.stringContaining("there is no such socket, does it run"),
    });
    expect(criSocket(join(dir.path, "absent"))).toBeUndefined();
  });
});

describe("netnsState()", () => {
  const here = `${bootId()}:1:2`;
  test.each([
    ["of another boot", "/run/netns/a", "old:1:2", "rebooted"],
    ["that is there", "/proc/self/ns/net", netnsId("/proc/self/ns/net"), "unknown"],
    ["whose path is gone", "/proc/self/ns/absent", here, "gone"],
    ["whose folder we do not see", "/absent/netns/a", here, "unknown"],
    ["behind a mount that we do not see", "/proc/self/status", here, "unknown"],
    ["that was never known", "", "", "unknown"],
    ["without an identity", "/run/netns/a", "", "unknown"],
  ])("one %s", (_what, netns, id, expected) => {
    expect(netnsState({ netns, netnsId: id })).toBe(expected as "gone");
  });
});

/** A node whose containers are on record alone. */
interface Left {
  dir: string;
  state: string;
  plugins: string;
  table: string;
  /** An attachment as a DEL, or none, left it. */
  leave: (containerId: string, how: { state?: "leaked"; netns?: string; id?: string }) => void;
  containers: () => string[];
}

async function withLeft(
  act: (node: Left) => Promise<void>,
  { script = {}, socket = "/absent" }: { script?: Script; socket?: string } = {},
): Promise<void> {
  using dir = tempDir();
  const state = join(dir.path, "state");
  const plugins = join(dir.path, "bin");
  mkdirSync(plugins);
  fakePlugin(plugins, "bridge", script);
  const table = join(dir.path, "plugins.toml");
  writeFileSync(
    table,
    `state_dir = "${state}"
conf_dir = "${dir.path}"
bin_dirs = ["${plugins}"]
kubernetes.status = "off"
agent = { listen = "", cri_socket = "${socket}" }
`,
  );
  await act({
    dir: dir.path,
    state,
    plugins,
    table,
    leave: (containerId, { state: stuck, netns = "/proc/self/ns/absent", id = "old:1:2" }) =>
      withLedger(state, (one) => {
        const failed = stuck && { state: stuck, error: "no", atMs: 1 };
        addAttachment(one, { containerId, ...(failed && { stuck: failed }) });
        one.database
          .query(
            `UPDATE attachments SET netns_id = ?1, plan = json_set(plan, '$.netns', ?2,
               '$.cniPath', ?3, '$.plugins', json_array(?3 || '/bridge'))
             WHERE container_id = ?4`,
          )
          .run(id, netns, plugins, containerId);
      }),
    containers: () =>
      rowsOf<{ id: string }>(
        state,
        "SELECT container_id AS id FROM attachments ORDER BY container_id",
      ).map(({ id }) => id),
  });
}

describe.skipIf(lacks("the binary"))("genie agent collects", () => {
  test("after a reboot, and what DEL gave up; what may live stays", async () => {
    await withLeft(async ({ dir, state, plugins, table, leave, containers }) => {
      leave("before-boot", {});
      leave("given-up", { state: "leaked", id: netnsId("/proc/self/ns/net") });
      leave("lives", { netns: "/proc/self/ns/net", id: netnsId("/proc/self/ns/net") });
      leave("unseen", { netns: "/absent/netns/a", id: `${bootId()}:1:2` });
      const agent = startAgent(dir, table);
      try {
        await until(() => containers().length === 2);
        await agent.said("Collected an attachment", 2);
        expect(containers()).toEqual(["lives", "unseen"]);
        expect(callOrder(plugins).toSorted()).toEqual([
          "bridge DEL before-boot eth0",
          "bridge DEL given-up eth0",
        ]);
        expect(rowsOf(state, "SELECT 1 FROM ledger WHERE kind = 'call'")).toHaveLength(2);
        expect(rowsOf(state, "SELECT * FROM ended")).toHaveLength(2);
        expect(rowsOf(state, "SELECT * FROM operations")).toEqual([]);
      } finally {
        await agent.end("SIGKILL");
      }
    });
  });

  test("nothing that the container runtime knows, or while it does not say", async () => {
    using sockets = tempDir();
    await using runtime = await startRuntime(sockets.path, ["known"]);
    await withLeft(
      async ({ dir, table, leave, containers }) => {
        leave("known", {});
        leave("forgotten", {});
        const agent = startAgent(dir, table);
        try {
          await until(() => containers().length === 1);
          expect(containers()).toEqual(["known"]);
        } finally {
          await agent.end("SIGKILL");
        }
      },
      { socket: runtime.socket },
    );
  });

  test.skipIf(lacks("root") || !findLiveContainers())(
    "an address that host-local keeps for nobody",
    async () => {
      await withLeft(async ({ dir, table }) => {
        const store = join(dir, "addresses", "blue");
        const ipam = {
          type: "host-local",
          dataDir: join(dir, "addresses"),
          subnet: "10.253.0.0/24",
        };
        const list = { cniVersion: "1.0.0", plugins: [{ type: "bridge", ipam }] };
        writeFileSync(join(dir, "blue.json"), JSON.stringify({ ...list, name: "blue" }));
        appendFileSync(table, `[plugins.blue]\nconf = "${dir}/blue.json"\n`);
        mkdirSync(store, { recursive: true });
        const [old, young] = ["10.253.0.7", "10.253.0.8"].map((one) => join(store, one));
        for (const file of [old, young]) {
          writeFileSync(`${file}`, `nobody-${crypto.randomUUID()}\r\neth0`);
        }
        utimesSync(`${old}`, 1, 1);
        const agent = startAgent(dir, table);
        try {
          await until(() => !existsSync(`${old}`));
          expect(existsSync(`${young}`)).toBe(true);
          await agent.said("An address of nobody is released network=blue address=10.253.0.7");
        } finally {
          await agent.end("SIGKILL");
        }
      });
    },
  );

  /** A container that no process of this machine belongs to. */
  const nobody = `nobody-${crypto.randomUUID()}`;

  /** One collector in this process, with a clock of its own. */
  async function looks(
    { state, table }: Left,
    socket: string | undefined,
    atMs: readonly number[],
    between: () => void = () => undefined,
  ): Promise<string> {
    let nowMs = 0;
    const host = makeHost({ now: Date.now() });
    const config = { ...defaultConfig(), stateDir: state };
    const record = openRecord(host, state, () => undefined);
    const own = { cniVersion: "1.0.0", name: "genie", type: "genie", plugins_file: table };
    const look = attachmentCollector(() => nowMs);
    const agent = {
      ...{ host, own, record, health: openHealth() },
      config: { ...config, agent: { ...config.agent, listen: "", criSocket: socket ?? "/absent" } },
    };
    try {
      for (const at of atMs) {
        nowMs = at;
        await look(agent);
        between();
      }
    } finally {
      record.close();
    }
    return host.written.stderr;
  }

  test.each([
    ["at the first look", [0], [nobody]],
    ["too soon", [0, 14_000], [nobody]],
    ["at the second look", [0, 16_000], findLiveContainers() ? [] : [nobody]],
  ])("a namespace that is gone, %s", async (_when, atMs, expected) => {
    await withLeft(async (node) => {
      node.leave(nobody, { id: `${bootId()}:1:2` });
      await looks(node, undefined, atMs);
      expect(node.containers()).toEqual(expected);
    });
  });

  test.skipIf(lacks("root") || !findLiveContainers())(
    "not while a process seems to be of the container",
    async () => {
      await withLeft(async (node) => {
        const id = crypto.randomUUID();
        node.leave(id, { id: `${bootId()}:1:2` });
        const child = Bun.spawn(["sleep", "600", "0.0"], { argv0: `pause-${id}` });
        try {
          // The kernel shows the arguments of a new program a moment after it has started.
          await until(() => readFileSync(`/proc/${child.pid}/cmdline`, "utf8").includes(id));
          await looks(node, undefined, [0, 16_000]);
          expect(node.containers()).toEqual([id]);
        } finally {
          child.kill("SIGKILL");
          await child.exited;
        }
        await looks(node, undefined, [0, 16_000]);
        expect(node.containers()).toEqual([]);
      });
    },
  );

  test("not one that was back in between", async () => {
    await withLeft(async (node) => {
      node.leave(nobody, { id: `${bootId()}:1:2` });
      const here = { netns: "/proc/self/ns/net", id: netnsId("/proc/self/ns/net") };
      await looks(node, undefined, [0, 16_000], () => {
        withLedger(node.state, (one) => one.database.run("DELETE FROM attachments"));
        node.leave(nobody, here);
      });
      expect([node.containers(), callOrder(node.plugins)]).toEqual([[nobody], []]);
    });
  });

  test("waits longer after each DEL that fails", async () => {
    const script = { DEL: { error: { code: 7, msg: "no" } } } as unknown as Script;
    await withLeft(
      async (node) => {
        node.leave(nobody, { state: "leaked" });
        await looks(node, undefined, [0, 59_000, 61_000, 150_000, 182_000]);
        expect(node.containers()).toEqual([nobody]);
        expect(callOrder(node.plugins)).toHaveLength(3);
        expect(rowsOf(node.state, "SELECT * FROM attachments WHERE state = 'leaked'")).toHaveLength(
          1,
        );
      },
      { script },
    );
  });

  test("nothing at all while the runtime fails", async () => {
    using sockets = tempDir();
    await using runtime = await startRuntime(sockets.path, 14);
    await withLeft(async (node) => {
      node.leave(nobody, {});
      const said = await looks(node, runtime.socket, [0]);
      expect(node.containers()).toEqual([nobody]);
      expect(said).toContain("nothing is collected");
    });
  });
});

describe("runConflist()", () => {
  const path = "/etc/cni/net.d/00-genie.conflist";
  const wanted = { kind: "conflist" as const, path };

  /** A node, and the agent's part at work on it; `rounds` waits until it went round so often. */
  async function withSite(
    act: (site: { root: string; file: string; rounds: (n: number) => Promise<void> }) => unknown,
    text = ownListText(),
  ): Promise<string> {
    using dir = tempDir();
    const root = dir.path;
    mkdirSync(join(root, "etc/cni/net.d"), { recursive: true });
    put(openSite(root), { ...wanted, content: { text } });
    const host = makeHost();
    let count = 0;
    const health = { ...openHealth(), beat: () => void count++ };
    const running = runConflist({ host, health }, root, 1);
    const rounds = async (n: number) => {
      const from = count;
      await until(() => count >= from + n);
    };
    try {
      await act({ root, file: join(root, path), rounds });
    } finally {
      host.abort();
      await running;
    }
    return host.written.stderr;
  }
  const other = '{"cniVersion":"1.0.0","name":"x","plugins":[{"type":"bridge"}]}';

  test.each([
    ["deleted", (file: string) => rmSync(file)],
    ["with its folder", (file: string) => rmSync(join(file, ".."), { recursive: true })],
    ["replaced by another network", (file: string) => writeFileSync(file, other)],
    ["cut", (file: string) => writeFileSync(file, "{")],
  ])("is back when it was %s", async (_what, spoil) => {
    const said = await withSite(async ({ root, file, rounds }) => {
      spoil(file);
      await rounds(4);
      expect(readFileSync(file, "utf8")).toBe(ownListText());
      expect(noted(openSite(root), "conflist")?.written).toHaveLength(1);
    });
    expect(said).toContain("and is back");
  });

  test("what stood there is kept", async () => {
    await withSite(async ({ root, file, rounds }) => {
      writeFileSync(file, other);
      await rounds(4);
      const kept = join(root, "etc/cni/genie/replaced/00-genie.conflist.changed");
      expect(readFileSync(kept, "utf8")).toBe(other);
    });
  });

  const own = ownListText().replace('"name": "genie"', '"name": "mine"');
  test("what an operator changed stays, while it calls genie", async () => {
    const said = await withSite(async ({ file, rounds }) => {
      writeFileSync(file, own);
      await rounds(4);
      expect(readFileSync(file, "utf8")).toBe(own);
    });
    expect(said).toBe("");
  });

  test("uninstalled stays uninstalled, also between its two steps", async () => {
    await withSite(async ({ root, file, rounds }) => {
      const site = openSite(root);
      const entry = noted(site, "conflist");
      if (!entry) throw new Error("it was installed");
      takeOff(site, entry);
      await rounds(4);
      expect(() => readFileSync(file)).toThrow("ENOENT");
    });
  });

  test("the list that genie uninstall leaves behind is no list of ours to keep", async () => {
    const text = JSON.stringify(lastList(undefined));
    await withSite(async ({ file, rounds }) => {
      rmSync(file);
      await rounds(4);
      expect(() => readFileSync(file)).toThrow("ENOENT");
    }, text);
  });

  test("a note that cannot be read is told once", async () => {
    const said = await withSite(async ({ root, rounds }) => {
      writeFileSync(join(root, "etc/cni/genie/install.json"), "{}");
      await rounds(4);
    });
    expect(said.match(/Cannot keep the CNI config/g)).toHaveLength(1);
  });
});
