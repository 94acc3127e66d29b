/**
 * Garbage collection on a real node: CNI GC with the runtime's list, and `genie gc` without one.
 * Debian's bridge and host-local, which know no GC, in real namespaces. lib/gc.ts,
 * lib/node/garbage.ts, lib/node/live_containers.ts.
 */
import { describe, expect, test } from "bun:test";
import { mkdirSync, utimesSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { closeState, write } from "../lib/database.ts";
import { bootId, netnsId } from "../lib/kernel.ts";
import { type Collected, formatAll, whyStale } from "../lib/node/garbage.ts";
import { findLiveContainers, seesProcesses } from "../lib/node/live_containers.ts";
import type { StoredAttachment } from "../lib/record.ts";
import { openState } from "../lib/recovery/database.ts";
import {
  isUnowned,
  readReservations,
  releaseReservation,
  storesOf,
} from "../lib/recovery/reservations.ts";
import { fakePlugin, makeHost, runGenie, tempDir } from "./fakes.ts";
import {
  command,
  commandLine,
  expectKernel,
  hostLocal,
  type Node,
  noTraces,
  type Pod,
  pluginDir,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...realNeeds);

const v4 = "10.251.0.0/24";

/** blue and green: bridges. theirs: a list beside them that no pod of ours uses. */
function networks(node: Node): void {
  const bridge = (name: string, subnet: string) =>
    node.network(name, {
      cniVersion: "1.0.0",
      plugins: [{ type: "bridge", bridge: `${name}0`, ipam: hostLocal(node, [subnet]) }],
    });
  bridge("blue", v4);
  bridge("green", "10.252.0.0/24");
  bridge("theirs", "10.253.0.0/24");
}

/** A reservation that was made long ago. */
function reserve(node: Node, network: string, address: string, text: string, aged = true): void {
  const dir = join(node.data, network);
  mkdirSync(dir, { recursive: true });
  const file = join(dir, address);
  writeFileSync(file, text);
  if (aged) utimesSync(file, 1_700_000_000, 1_700_000_000);
}

const gone = "0123456789abcdef0123";

/** CNI GC of one of our pods' runtime, with its list of valid containers; absent: no list. */
async function gc(pod: Pod, valid: Pod[] | undefined) {
  const { words, env, stdin } = pod.prepare("GC", { cniVersion: "1.1.0" });
  const list = valid?.map(({ containerId }) => ({ containerID: containerId, ifname: "eth0" }));
  const request = { ...JSON.parse(stdin), "cni.dev/valid-attachments": list };
  return runGenie(words[0] ?? "", env, request, words.slice(1));
}

/** Strays and what only looks like one; what must stay is returned. */
function litter(node: Node, other: Pod): string[] {
  reserve(node, "blue", "10.251.0.77", `${gone}\r\neth0`);
  reserve(node, "blue", "10.251.0.78", gone);
  reserve(node, "green", "10.252.0.77", `${gone}\r\nnet1`);
  // Of another network; just made; no reservation; an address that some pod of others has.
  reserve(node, "theirs", "10.253.0.77", `${gone}\r\neth0`);
  reserve(node, "blue", "10.251.0.79", `${gone}\r\neth0`, false);
  reserve(node, "blue", "10.251.0.80", "two words\r\neth0");
  reserve(node, "blue", "notes.txt", `${gone}\r\neth0`);
  reserve(node, "blue", "10.251.0.88", "abcdef0123456789\r\neth0");
  other.run("ip", "link", "add", "own0", "type", "veth", "peer", "own1");
  other.run("ip", "addr", "add", "10.251.0.88/24", "dev", "own0");
  return [
    ...["blue/10.251.0.79", "blue/10.251.0.80", "blue/10.251.0.88", "blue/notes.txt"],
    "theirs/10.253.0.77",
  ];
}

describe.skipIf(skipReason !== undefined)("CNI GC on a real node", () => {
  test("deletes what is stale and releases strays; a live pod stays as it is", async () => {
    await withNode(async (node) => {
      networks(node);
      const [live, dead, other] = [node.pod(), node.pod(), node.pod()];
      const result = await live.add("blue,green@net1");
      const before = node.traces().files;
      await dead.add("blue,green@net1");
      const kept = litter(node, other);
      const all = node.traces().files;
      expect(await gc(live, undefined)).toMatchObject({ status: 0, stdout: "" });
      expect(node.traces().files).toEqual(all);
      const run = await gc(live, [live]);
      expect(run).toMatchObject({ status: 0, stdout: "" });
      expect(run.stderr.match(/Released an address of nobody/g)).toHaveLength(3);
      expect(node.traces()).toMatchObject({ attachments: 2, files: [...before, ...kept].sort() });
      expectKernel(live, result);
      expect(await live.call("CHECK")).toMatchObject({ status: 0, stdout: "" });
      // Valid for the runtime, though nothing of it is on record.
      reserve(node, "blue", "10.251.0.90", `${other.containerId}\r\neth0`);
      expect(await gc(live, [live, other])).toMatchObject({ status: 0 });
      expect(node.traces().files).toContain("blue/10.251.0.90");
      expect(await gc(live, [])).toMatchObject({ status: 0 });
      expect(node.traces()).toMatchObject({ attachments: 0, links: [] });
    });
  });

  test("what is left when the record was lost: a live pod keeps its address", async () => {
    await withNode(async (node) => {
      networks(node);
      const table = join(node.dir, "plugins.toml");
      writeFileSync(table, `${await Bun.file(table).text()}[plugins.blue]\n`);
      const [live, dead] = [node.pod(), node.pod()];
      const result = await live.add("blue");
      await dead.add("blue");
      dead.kill();
      const state = openState(makeHost(), join(node.dir, "state"));
      write(state, () => state.database.run("DELETE FROM attachments"));
      closeState(state);
      for (const name of node.traces().files) {
        utimesSync(join(node.data, name), 1_700_000_000, 1_700_000_000);
      }
      expect(await gc(live, [])).toMatchObject({ status: 0 });
      expect(node.traces().files).toEqual(["blue/10.251.0.2"]);
      expectKernel(live, result);
    });
  });
});

/** What `genie gc` told: `<kind> <what> <network> <outcome>`. */
function outcomes(stdout: string): string[] {
  return (JSON.parse(stdout) as Collected[]).map(({ kind, what, network, outcome }) =>
    `${kind} ${what} ${network} ${outcome}`.replace("  ", " "),
  );
}

function sql(node: Node, text: string): void {
  const state = openState(makeHost(), join(node.dir, "state"));
  write(state, () => state.database.run(text));
  closeState(state);
}

describe.skipIf(skipReason !== undefined)("genie gc", () => {
  test("finds all of it, changes nothing in a dry run, then collects it", async () => {
    await withNode(async (node) => {
      networks(node);
      const [live, dead, other] = [node.pod(), node.pod(), node.pod()];
      expect(command(node, "gc", "--dry-run")).toEqual({
        ...{ status: 0, stdout: "Nothing to collect\n", stderr: "" },
      });
      const result = await live.add("blue,green@net1");
      const before = node.traces().files;
      await dead.add("green");
      dead.kill();
      const kept = litter(node, other);
      sql(node, "INSERT INTO operations VALUES ('c9', 'ADD', 1, 'never', 'then', 'x', 't', 0)");
      const all = [
        "attachment eth0 green",
        "reservation 10.251.0.77 blue",
        "reservation 10.251.0.78 blue",
        "reservation 10.252.0.77 green",
        "lock ADD",
      ];
      // The kernel removes the dead pod's link in its own time.
      const { links: _, ...left } = node.traces();
      const dry = command(node, "gc", "--dry-run", "--json");
      expect(dry.status).toBe(1);
      expect(outcomes(dry.stdout).sort()).toEqual(all.map((one) => `${one} found`).sort());
      expect(node.traces()).toMatchObject(left);
      expect(command(node, "gc", "--dry-run", "--network", "green").stdout).toEndWith(
        "\n2 to collect; nothing was changed\n",
      );
      const run = command(node, "gc", "--json");
      expect(run.status).toBe(0);
      expect(outcomes(run.stdout).sort()).toEqual(all.map((one) => `${one} collected`).sort());
      expect(node.traces()).toMatchObject({ attachments: 2, files: [...before, ...kept].sort() });
      expect(command(node, "gc")).toMatchObject({ status: 0, stdout: "Nothing to collect\n" });
      expectKernel(live, result);
      expect(await live.call("CHECK")).toMatchObject({ status: 0, stdout: "" });
      await live.del();
    });
  });

  test("collects what was given up, and says what remains", async () => {
    await withNode(async (node) => {
      networks(node);
      const script = `[ "$CNI_COMMAND" = DEL ] && [ -e "${node.dir}/broken" ] && exit 3\n`;
      fakePlugin(node.bin, "bridge", `#!/bin/sh\n${script}exec ${join(pluginDir, "bridge")}\n`);
      const pod = node.pod();
      await pod.add("blue,green@net1");
      writeFileSync(join(node.dir, "broken"), "");
      sql(node, "UPDATE attachments SET state = 'leaked', error = 'busy' WHERE ifname = 'net1'");
      const failed = command(node, "gc");
      expect(failed).toMatchObject({ status: 1 });
      expect(failed.stdout).toContain("net1");
      expect(failed.stdout).toContain("failed: Cannot detach network");
      expect(failed.stdout).toEndWith("\n0 collected, 1 remain\n");
      sql(node, "UPDATE attachments SET state = 'failing', failed_at_ms = 1 WHERE ifname = 'net1'");
      Bun.spawnSync(["rm", join(node.dir, "broken")]);
      expect(outcomes(command(node, "gc", "--json").stdout)).toEqual([
        "attachment net1 green collected",
      ]);
      expect(node.traces()).toMatchObject({ attachments: 1, files: ["blue/10.251.0.2"] });
      await pod.del();
      expect(node.traces()).toEqual(noTraces);
    });
  });

  test("leaves what may live: a half-made attachment, a container with a process", async () => {
    await withNode(async (node) => {
      networks(node);
      const [half, hidden] = [node.pod(), node.pod()];
      await half.add("blue");
      await hidden.add("green");
      sql(node, `UPDATE attachments SET state = 'planned' WHERE network = 'blue'`);
      const forever = "setTimeout(() => undefined, 1e9)";
      const child = Bun.spawn([process.execPath, "-e", forever, hidden.containerId]);
      try {
        hidden.kill();
        expect(command(node, "gc")).toMatchObject({ status: 0, stdout: "Nothing to collect\n" });
        expect(node.traces()).toMatchObject({ attachments: 2 });
      } finally {
        child.kill();
        await child.exited;
      }
      expect(outcomes(command(node, "gc", "--json").stdout)).toEqual([
        "attachment eth0 green collected",
      ]);
      await half.del();
      expect(node.traces().files).toEqual([]);
    });
  });
});

/**
 * Runs a program in a pid namespace of its own. `before` is shell that may call `stay NAME`, which
 * starts a program of that name that does nothing, and waits until it is there.
 */
function inPidNamespace(before: string, words: string[]) {
  using dir = tempDir();
  const script = `cd ${dir.path}
stay() {
  cp "$(command -v sleep)" "$1"
  ./"$1" 1000 & until grep -q "^\${1:0:15}$" /proc/$!/comm; do :; done
}
${before}
"$@"
exit $?`;
  const own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
  const run = Bun.spawnSync([...own, "bash", "-c", script, "bash", ...words]);
  return { status: run.exitCode, stdout: run.stdout.toString(), stderr: run.stderr.toString() };
}

describe.skipIf(skipReason !== undefined)("in a pid namespace that is not the first", () => {
  const below = "unshare --pid --fork --kill-child ./containerd 1000 &";
  test.each([
    ["of a pod, alone", "", false],
    ["of a pod with programs of its own", "stay crio-status; stay mycontainerd", false],
    [
      "of a pod in which a runtime has a namespace below",
      `stay containerd; kill %1; ${below}`,
      false,
    ],
    ["of a node with containerd", "stay containerd", true],
    ["of a node whose containerd is being restarted", "stay containerd-shim-runc-v2", true],
    ["of a node with CRI-O", "stay crio", true],
    ["of a machine with an init", "printf systemd >/proc/1/comm", true],
    ["of a pod with a systemd that is not its first process", "stay systemd", false],
  ])("seesProcesses(): %s", (_what, before, expected) => {
    const module = join(import.meta.dir, "../lib/node/live_containers.ts");
    const code = `import { findLiveContainers, seesProcesses } from "${module}";
      process.stdout.write(String([seesProcesses(), findLiveContainers() !== undefined]))`;
    // What it says is true of a namespace below only once that is there.
    const settle = before.includes("unshare") ? "sleep 0.2" : "";
    const run = inPidNamespace(`${before}\n${settle}`, [process.execPath, "-e", code]);
    expect([run.stderr, run.stdout]).toEqual(["", `${expected},${expected}`]);
  });

  test("genie gc leaves everybody in that of a pod, and collects in that of a node", async () => {
    await withNode(async (node) => {
      networks(node);
      const [live, dead, other] = [node.pod(), node.pod(), node.pod()];
      const result = await live.add("blue,green@net1");
      await dead.add("green");
      dead.kill();
      const kept = litter(node, other);
      const { files, attachments } = node.traces();
      const gc = commandLine(node, "gc", "--json");
      expect(inPidNamespace("", gc)).toMatchObject({
        ...{ status: 0, stdout: "[]\n" },
        stderr: expect.stringContaining("Others cannot be seen here"),
      });
      expect(node.traces()).toMatchObject({ files, attachments });

      const run = inPidNamespace("stay containerd", gc);
      expect([run.stderr, run.status]).toEqual(["", 0]);
      expect(outcomes(run.stdout).sort()).toEqual([
        "attachment eth0 green collected",
        "reservation 10.251.0.77 blue collected",
        "reservation 10.251.0.78 blue collected",
        "reservation 10.252.0.77 green collected",
      ]);
      expect(node.traces().files).toEqual(expect.arrayContaining(kept));
      expectKernel(live, result);
      await live.del();
    });
  });
});

describe("whyStale()", () => {
  const row = (more: object): StoredAttachment =>
    ({
      ...{ containerId: "c1", state: "attached", netns: "/nowhere", netnsId: "boot:1:2" },
      ...{ failedAtMs: 0, error: "busy", ...more },
    }) as StoredAttachment;
  const here = { netns: "/proc/self/ns/net", netnsId: netnsId("/proc/self/ns/net") };
  const made = { cniVersion: "1.0.0", ips: [{ address: "10.1.0.5/16" }] };
  const file = join(import.meta.dir, "real_gc.test.ts");
  const hidden = { netnsId: `${bootId()}:1:2`, netns: "/no-such-folder/netns" };
  const seen = (more: object = {}) => ({
    ...{ netns: new Set<string>(), addresses: new Set<string>(), hasContainer: () => false },
    ...more,
  });
  const goneText = "its network namespace is gone, and no process is of its container";
  test.each([
    ["one whose namespace is there", row(here), seen(), undefined],
    ["one that is planned there", row({ ...here, state: "planned" }), seen(), undefined],
    ["one whose namespace is gone", row({}), seen(), goneText],
    ["a planned one that is gone", row({ state: "planned" }), seen(), goneText],
    ["another namespace at its path", row({ netns: here.netns }), seen(), goneText],
    ["a folder that is not there: it may be hidden", row(hidden), seen(), undefined],
    ["a plain file: a mount may be hidden", row({ ...hidden, netns: file }), seen(), undefined],
    [
      "a namespace of a process that ended",
      row({ ...hidden, netns: "/proc/999999999/ns/net" }),
      seen(),
      seesProcesses() ? goneText : undefined,
    ],
    ["a namespace that is gone since", row({ ...hidden, netns: "/run/none" }), seen(), goneText],
    [
      "a namespace that a process is in",
      row({}),
      seen({ netns: new Set(["boot:1:2"]) }),
      undefined,
    ],
    [
      "a namespace whose number another one has by now",
      row({ result: made, list: { cniVersion: "1.0.0" } }),
      seen({ netns: new Set(["boot:1:2"]) }),
      goneText,
    ],
    [
      "a namespace that a process is in, and its address",
      row({ result: made, list: { cniVersion: "1.0.0" } }),
      seen({ netns: new Set(["boot:1:2"]), addresses: new Set(["10.1.0.5"]) }),
      undefined,
    ],
    ["a container with a process", row({}), seen({ hasContainer: () => true }), undefined],
    ["nobody to be seen", row({}), undefined, undefined],
    [
      "one that was given up",
      row({ ...here, state: "leaked" }),
      undefined,
      "its DEL was given up: busy",
    ],
    [
      "one that is retried still",
      row({ ...here, state: "failing", failedAtMs: 950 }),
      seen(),
      undefined,
    ],
    [
      "one that was retried for long",
      row({ ...here, state: "failing", failedAtMs: 100 }),
      undefined,
      "its DEL fails since 1970-01-01T00:00:00.100Z: busy",
    ],
  ])("%s", (_name, stored, alive, why) => {
    expect(whyStale(stored, { alive, windowMs: 500, nowMs: 1000 })).toBe(why);
  });
});

describe("reservations of host-local", () => {
  const listOf = (name: string, ipam: unknown) => ({
    ...{ cniVersion: "1.0.0" as const, name, disableCheck: false, disableGC: false },
    plugins: [{ type: "bridge", ipam }, { type: "portmap" }],
  });
  test.each([
    ["the default folder", "blue", { type: "host-local" }, ["/var/lib/cni/networks/blue"]],
    ["its own", "blue", { type: "host-local", dataDir: "/data" }, ["/data/blue"]],
    ["not one that is relative", "blue", { type: "host-local", dataDir: "data" }, []],
    ["not one of a name that leads elsewhere", "../blue", { type: "host-local" }, []],
    ["none of another IPAM", "blue", { type: "dhcp" }, []],
    ["none without one", "blue", undefined, []],
  ])("storesOf() %s", (_name, name, ipam, dirs) => {
    expect(storesOf(listOf(name, ipam))).toEqual(dirs);
  });

  test("readReservations() reads what parses, releaseReservation() removes the same", async () => {
    using dir = tempDir();
    const list = listOf("blue", { type: "host-local", dataDir: dir.path });
    const file = (name: string) => join(dir.path, "blue", name);
    mkdirSync(join(dir.path, "blue"));
    const put = (name: string, text: string) => {
      writeFileSync(file(name), text);
      utimesSync(file(name), 1000, 1000);
    };
    put("10.1.0.2", "c1\r\neth0");
    put("10.1.0.3", "c2");
    put("fd00::2", "c3\neth0\n");
    put("10.1.0.4", "c/4\r\neth0");
    put("10.1.0.5", "x".repeat(600));
    put("last_reserved_ip.0", "10.1.0.5");
    mkdirSync(file("10.1.0.6"));
    const host = makeHost();
    const found = readReservations(list, host.now());
    expect(found.map(({ address, containerId, ifName }) => [address, containerId, ifName])).toEqual(
      [
        ...[
          ["10.1.0.2", "c1", "eth0"],
          ["10.1.0.3", "c2", ""],
          ["fd00::2", "c3", "eth0"],
        ],
      ],
    );
    put("10.1.0.3", "c9\r\neth0");
    for (const one of found) await releaseReservation(host, one, host.now() + 1000);
    expect(readReservations(list, host.now()).map(({ containerId }) => containerId)).toEqual([
      "c9",
    ]);
  });

  test("releaseReservation() waits for host-local, and not for ever", async () => {
    using dir = tempDir();
    const list = listOf("blue", { type: "host-local", dataDir: dir.path });
    mkdirSync(join(dir.path, "blue"));
    const file = join(dir.path, "blue", "10.1.0.2");
    writeFileSync(file, "c1\r\neth0");
    utimesSync(file, 1000, 1000);
    const host = makeHost();
    const [one] = readReservations(list, host.now());
    if (!one) throw new Error("not read");
    const lock = join(dir.path, "blue", "lock");
    const holder = Bun.spawn(["flock", lock, "sh", "-c", "echo held; exec cat"], {
      stdin: "pipe",
      stdout: "pipe",
    });
    try {
      await holder.stdout.getReader().read();
      const refused = releaseReservation(host, one, host.now());
      expect(refused).rejects.toMatchObject({ code: 11 });
      await refused.catch(() => undefined);
      expect(readReservations(list, host.now())).toHaveLength(1);
    } finally {
      holder.kill();
      await holder.exited;
    }
    await releaseReservation(host, one, host.now() + 10_000);
    expect(readReservations(list, host.now())).toEqual([]);
  });

  const one = { network: "blue", dir: "/d", address: "FD00::0:2", containerId: "c1", ifName: "" };
  const nobody = {
    ...{ known: new Set<string>(), addresses: new Set<string>(), hasContainer: () => false },
  };
  test.each([
    ["of nobody", nobody, true],
    ["of a container on record", { ...nobody, known: new Set(["c1"]) }, false],
    ["that an interface has", { ...nobody, addresses: new Set(["fd00::2"]) }, false],
    ["of a container with a process", { ...nobody, hasContainer: () => true }, false],
  ])("isUnowned() %s", (_name, evidence, stray) => {
    expect(isUnowned(one, evidence)).toBe(stray);
  });
});

test("formatAll() tells kind, place, reason and outcome", () => {
  const one: Collected = {
    ...{ kind: "attachment", what: "eth0", network: "blue", pod: "ns/web", containerId: "c1" },
    ...{ why: "gone", outcome: "collected", error: "" },
  };
  const all: Collected[] = [
    one,
    { ...one, kind: "lock", what: "ADD", network: "", pod: "", outcome: "failed", error: "busy" },
  ];
  expect(formatAll(all, Number.POSITIVE_INFINITY)).toBe(`\
KIND        WHAT  NETWORK  POD OR CONTAINER  WHY   OUTCOME
attachment  eth0  blue     ns/web            gone  collected
lock        ADD            c1                gone  failed: busy

1 collected, 1 remain
`);
});

test.skipIf(skipReason !== undefined)("findLiveContainers() sees this process", () => {
  const alive = findLiveContainers();
  if (!alive) return;
  expect(alive.netns.has(netnsId("/proc/self/ns/net"))).toBe(true);
  expect(alive.addresses.has("127.0.0.1")).toBe(true);
  expect(alive.hasContainer(`no-container-${crypto.randomUUID()}`)).toBe(false);
});
