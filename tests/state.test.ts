/** The rows of the record: what is written is read again, and damage stays where it is. */
import { describe, expect, test } from "bun:test";
import { mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { code } from "../lib/cni.ts";
import { closeState, type State, write } from "../lib/database.ts";
import { parseJson } from "../lib/json.ts";
import { isForeignNetns, netnsId } from "../lib/kernel.ts";
import { endOf } from "../lib/lock.ts";
import type { Attachment } from "../lib/record.ts";
import { attachments, forget, recorded, setEnded, setFailing } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { insertPlanned, setAttached } from "../lib/write_ahead.ts";
import { type FakeHost, makeHost, withNetns } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

let folders = 0;

function withState<T>(fn: (state: State, host: FakeHost) => T): T {
  const host = makeHost();
  const state = openState(host, join(dir.path, `state-${folders++}`));
  try {
    return fn(state, host);
  } finally {
    closeState(state);
  }
}

function attachment(more: Partial<Attachment> = {}): Attachment {
  return {
    containerId: "c1",
    requestIfName: "eth0",
    requestNetwork: "genie-net",
    ifName: "eth0",
    primary: true,
    network: "blue",
    reason: "asked for by cni",
    list: {
      cniVersion: "1.0.0",
      name: "blue",
      disableCheck: false,
      disableGC: false,
      plugins: [{ type: "bridge", mtu: 1400 }],
    },
    plugins: ["/opt/cni/bin/bridge"],
    cniArgs: "K=V",
    cniPath: "/opt/cni/bin",
    capabilityArgs: { mac: "c2:11:22:33:44:55" },
    args: { "org.apache.mesos": { a: 1 } },
    timeoutMs: 90_000,
    netns: "/nowhere",
    pod: { namespace: "default", name: "pod", uid: "u1" },
    ...more,
  };
}

const eth0 = attachment();
const eth1 = attachment({ ifName: "eth1", primary: false, network: "green" });
const other = attachment({ containerId: "c2" });

const keysOf = (list: { containerId: string; ifName: string }[]) =>
  list.map(({ containerId, ifName }) => `${containerId} ${ifName}`);

describe("the plan of an attachment", () => {
  test("is read as it was written", () => {
    withState((state, host) => {
      write(state, () => insertPlanned(state, [eth0], 5));
      expect(attachments(host, state)).toEqual([
        {
          ...eth0,
          state: "planned",
          result: undefined,
          failedAtMs: 0,
          error: "",
          createdAtMs: 5,
          netnsId: "",
        },
      ]);
    });
  });

  test("keeps the text of numbers and the order of keys (fact 14)", () => {
    const text = '{"type":"x","z":12345678901234567890,"a":1.0,"__proto__":{"b":1e400}}';
    const plugin = parseJson(text, "config") as { type: string };
    const list = { ...eth0.list, plugins: [plugin] };
    withState((state, host) => {
      write(state, () => insertPlanned(state, [{ ...eth0, list }], 5));
      const [stored] = attachments(host, state);
      expect(JSON.stringify(stored?.list.plugins[0])).toBe(text);
    });
  });

  test("is listed in the order of the plans, and for one container alone", () => {
    withState((state, host) => {
      write(state, () => insertPlanned(state, [other], 7));
      write(state, () => insertPlanned(state, [eth1, eth0], 8));
      expect(keysOf(attachments(host, state))).toEqual(["c2 eth0", "c1 eth1", "c1 eth0"]);
      expect(keysOf(attachments(host, state, "c1"))).toEqual(["c1 eth1", "c1 eth0"]);
    });
  });

  test("goes through its states", () => {
    withState((state, host) => {
      const now = () =>
        attachments(host, state).map((row) => [row.state, row.failedAtMs, row.error]);
      insertPlanned(state, [eth0], 1);
      setAttached(state, eth0, { cniVersion: "1.0.0", ips: [] });
      expect(now()).toEqual([["attached", 0, ""]]);
      setFailing(state, eth0, { state: "failing", error: "one", nowMs: 10 });
      setFailing(state, eth0, { state: "leaked", error: "two", nowMs: 20 });
      expect(now()).toEqual([["leaked", 10, "two"]]);
      forget(state, eth0);
      expect(now()).toEqual([]);
    });
  });

  test("that has vanished fails the commit: nobody could ever delete it", () => {
    withState((state) => {
      expect(() => write(state, () => setAttached(state, eth0, {}))).toThrow(
        expect.objectContaining({ code: code.tryAgainLater }),
      );
    });
  });
});

const damage: [string, string][] = [
  ["is no JSON", "'{'"],
  ["is empty", "''"],
  ["is a list", "'[]'"],
  ["lacks its plugins", "json_remove(plan, '$.list.plugins')"],
  ["has no plugin", "json_set(plan, '$.list.plugins', json('[]'), '$.plugins', json('[]'))"],
  ["lacks a binary", "json_set(plan, '$.plugins', json('[]'))"],
  ["has a binary without a folder", "json_set(plan, '$.plugins[0]', 'bridge')"],
  ["has a binary without a name", "json_set(plan, '$.plugins[0]', '')"],
  ["has a plugin without type", "json_remove(plan, '$.list.plugins[0].type')"],
  ["has an unknown version", "json_set(plan, '$.list.cniVersion', '9.9.9')"],
  ["lacks a key", "json_remove(plan, '$.cniPath')"],
  ["has a text for a number", "json_set(plan, '$.timeoutMs', 'soon')"],
];

describe("a damaged plan", () => {
  test.each(damage)("that %s is reported, and hides no other", (_name, sql) => {
    withState((state, host) => {
      write(state, () => insertPlanned(state, [eth0, eth1], 5));
      state.database.run(`UPDATE attachments SET plan = ${sql} WHERE ifname = 'eth0'`);
      const { readable, damaged } = recorded(host, state, "c1");
      expect(keysOf(readable)).toEqual(["c1 eth1"]);
      expect(damaged).toEqual([{ containerId: "c1", requestIfName: "eth0", ifName: "eth0" }]);
      expect(host.written.stderr).toMatch(/^genie: error: .*container=c1 interface=eth0 .*\n$/);
      expect(host.written.stderr).not.toContain("mtu");
    });
  });

  test("gives way to the next plan of that interface", () => {
    withState((state, host) => {
      write(state, () => insertPlanned(state, [eth0], 5));
      state.database.run("UPDATE attachments SET plan = ''");
      write(state, () => insertPlanned(state, [eth0], 6));
      expect(recorded(host, state)).toMatchObject({ readable: [{ createdAtMs: 6 }], damaged: [] });
    });
  });

  test.each(["'{'", "''", "NULL", "x'ff'"])("does not follow from the result %s", (sql) => {
    withState((state, host) => {
      write(state, () => insertPlanned(state, [eth0], 5));
      state.database.run(`UPDATE attachments SET result = CAST(${sql} AS TEXT)`);
      expect(attachments(host, state)).toMatchObject([{ ...eth0, result: undefined }]);
    });
  });

  test("cannot change whose it is: the columns are the key", () => {
    withState((state, host) => {
      write(state, () => insertPlanned(state, [eth0], 5));
      state.database.run("UPDATE attachments SET plan = json_set(plan, '$.containerId', 'c9')");
      expect(keysOf(attachments(host, state))).toEqual(["c1 eth0"]);
    });
  });
});

describe("a file that cannot be read", () => {
  test("is code 106", () => {
    withState((state, host) => {
      state.database.run("DROP TABLE attachments");
      expect(() => attachments(host, state)).toThrow(
        expect.objectContaining({ code: code.stateUnavailable }),
      );
    });
  });
});

describe("the end of a call", () => {
  const call = { containerId: "c1", requestIfName: "eth0" };

  test("is known until the next plan of that call", () => {
    withState((state) => {
      expect(endOf(state, call)).toBeUndefined();
      setEnded(state, call, "ADD", 5);
      setEnded(state, call, "DEL", 6);
      setEnded(state, { ...call, requestIfName: "eth1" }, "DEL", 7);
      expect(endOf(state, call)).toEqual({ command: "DEL", atMs: 6 });
      write(state, () => insertPlanned(state, [eth0], 8));
      expect(endOf(state, call)).toBeUndefined();
      expect(endOf(state, { ...call, requestIfName: "eth1" })).toBeDefined();
    });
  });

  test("is forgotten after a day, a few at a time, so that the table stays bounded", () => {
    const dayMs = 24 * 3_600_000;
    withState((state) => {
      const count = () => state.database.query("SELECT count(*) FROM ended").values()[0]?.[0];
      write(state, () => {
        for (let i = 0; i < 100; i++)
          setEnded(state, { ...call, containerId: `old${i}` }, "DEL", i);
      });
      setEnded(state, { ...call, containerId: "young" }, "DEL", 200);
      expect(count()).toBe(101);
      const lefts = Array.from({ length: 8 }, () => {
        setEnded(state, call, "DEL", dayMs + 150);
        return count();
      });
      expect(lefts).toEqual([86, 70, 54, 38, 22, 6, 2, 2]);
    });
  });
});

describe("netnsId()", () => {
  test.each([
    ["no path", ""],
    ["nothing there", join(dir.path, "absent")],
    ["a path through a file", "/dev/null/x"],
    ["a path too long", `/${"a".repeat(300)}`],
    ["a loop", join(dir.path, "loop")],
  ])("is empty for %s", (name, path) => {
    if (name === "a loop") symlinkSync(path, path);
    expect([netnsId(path), isForeignNetns(path)]).toEqual(["", false]);
  });

  test("is that of the namespace, whichever path leads to it", () => {
    const link = join(dir.path, "link");
    symlinkSync("/proc/self/ns/net", link);
    expect(netnsId(link)).toBe(netnsId(`/proc/${process.pid}/ns/net`));
    expect(netnsId(link)).not.toBe("");
  });

  test("differs when the path was made anew", () => {
    const path = join(dir.path, "netns");
    writeFileSync(path, "");
    const before = netnsId(path);
    // The old file stays, so that its inode cannot be used again.
    renameSync(path, `${path}.old`);
    writeFileSync(path, "");
    expect(netnsId(path)).not.toBe(before);
    rmSync(path);
  });

  test.skipIf(lacks("network namespaces"))(
    "tells a namespace from any other file, and from our own",
    async () => {
      const folder = join(dir.path, "folder");
      mkdirSync(folder);
      await withNetns(({ path }) => {
        expect([path, "/proc/self/ns/net", "/dev/null", folder].map(isForeignNetns)).toEqual([
          true,
          false,
          false,
          false,
        ]);
      });
    },
  );
});
