/**
 * Rulesets in the kernel: lib/policy/nft.ts, and runs in another namespace: lib/exec.ts,
 * lib/kernel.ts.
 */
import { expect } from "bun:test";
import { readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { CniError, code } from "../lib/cni.ts";
import { run } from "../lib/exec.ts";
import { inNetns } from "../lib/kernel.ts";
import { podTable } from "../lib/policy/compile.ts";
import {
  applyRuleset,
  emptyNetns,
  readRuleset,
  removeRuleset,
  rulesetHash,
  verifyRuleset,
} from "../lib/policy/nft.ts";
import { fakePlugin, makeHost, type Netns, tempDir, withNetns } from "./fakes.ts";
import { needing } from "./skip.ts";

const { describe, test } = needing("network namespaces", "nftables", "iputils-ping");

const golden = (name: string): string =>
  readFileSync(join(import.meta.dir, "fixtures", "policy", `${name}.nft`), "utf8");
const host = makeHost();
const own = "/proc/self/ns/net";

function nft({ name }: Netns, ...args: string[]): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(["ip", "netns", "exec", name, "nft", ...args]);
  if (exitCode !== 0) throw new Error(stderr.toString());
  return stdout.toString();
}

/** The rulesets are about interfaces of these names. */
function withPod<T>(fn: (netns: Netns) => Promise<T>): Promise<T> {
  return withNetns((netns) => {
    netns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "net1");
    return fn(netns);
  });
}

async function errorOf(act: Promise<unknown>): Promise<CniError> {
  const error = await act.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (error instanceof CniError) return error;
  throw new Error(`expected a CniError, got ${error}`);
}

describe("a ruleset", () => {
  test("is put in force, replaced, and taken away, and the node has none of it", async () => {
    await withPod(async (netns) => {
      await applyRuleset(host, netns.path, golden("ports"));
      expect(await readRuleset(host, netns.path)).toBe(rulesetHash(golden("ports")));
      await applyRuleset(host, netns.path, golden("deny-both"));
      expect(await readRuleset(host, netns.path)).toBe(rulesetHash(golden("deny-both")));
      expect(nft(netns, "list", "tables")).toBe(`table ${podTable}\ntable netdev genie\n`);
      expect(await readRuleset(host, undefined)).toBeUndefined();
      await applyRuleset(host, netns.path, "");
      expect(nft(netns, "list", "ruleset")).toBe("");
      expect(await readRuleset(host, netns.path)).toBeUndefined();
    });
  });

  test("that is the first is as any other, also where it is not the first after all", async () => {
    await withPod(async (netns) => {
      for (const name of ["ports", "deny-both"]) {
        await applyRuleset(host, netns.path, golden(name), { isFirst: true });
        expect(await verifyRuleset(host, netns.path, golden(name))).toBeUndefined();
      }
      const wrong = golden("deny-both").replace("drop", "drip");
      const error = await errorOf(applyRuleset(host, netns.path, wrong, { isFirst: true }));
      expect(error.message).toContain("drip");
      expect(await verifyRuleset(host, netns.path, golden("deny-both"))).toBeUndefined();
    });
  });

  test("is taken away twice, and from a namespace that is gone", async () => {
    const quiet = makeHost();
    const path = await withPod(async (netns) => {
      await applyRuleset(quiet, netns.path, golden("deny-both"));
      for (const time of ["once", "twice"]) {
        await removeRuleset(quiet, netns.path);
        expect({ time, left: nft(netns, "list", "ruleset") }).toEqual({ time, left: "" });
      }
      return netns.path;
    });
    const tables = () => Bun.spawnSync(["nft", "list", "tables"]).stdout.toString();
    const before = tables();
    expect(await removeRuleset(quiet, path)).toBeUndefined();
    expect(await removeRuleset(quiet, "")).toBeUndefined();
    expect({ tables: tables(), said: quiet.written.stderr }).toEqual({ tables: before, said: "" });
  });

  test("leaves other tables alone", async () => {
    await withNetns(async (netns) => {
      nft(netns, "add", "table", "inet", "mesh");
      await applyRuleset(host, netns.path, golden("ports"));
      await removeRuleset(host, netns.path);
      expect(nft(netns, "list", "tables")).toBe("table inet mesh\n");
    });
  });

  test("that the kernel refuses changes nothing", async () => {
    await withPod(async (netns) => {
      await applyRuleset(host, netns.path, golden("ports"));
      const wrong = golden("deny-both").replace("goto egress_0", "goto nowhere");
      const error = await errorOf(applyRuleset(host, netns.path, wrong));
      expect(error.code).toBe(code.ioFailure);
      expect(error.message).toMatch(/^Cannot put a network policy in force in .*: nft says ".+"$/);
      expect(await verifyRuleset(host, netns.path, golden("ports"))).toBeUndefined();
    });
  });

  test.each([
    ["the node's own namespace", own],
    ["no namespace", "/nowhere"],
    ["a file that is none", "/etc/hostname"],
  ])("is not put into %s", async (_name, path) => {
    const error = await errorOf(applyRuleset(host, path, golden("deny-both")));
    expect(error.message).toContain(`${path} is no network namespace of a pod`);
    expect(await readRuleset(host, undefined)).toBeUndefined();
  });
});

describe("the mark of what is let out", () => {
  // Whatever a pod's own sockets receive, they can read the mark of.
  test.each([
    ["ip", "224.0.0.1"],
    ["ip", "10.9.0.255"],
    ["ip6", "ff02::1"],
  ])("does not come back to the pod: %s %s", async (family, target) => {
    await withPod(async (netns) => {
      netns.ip("addr", "add", "10.9.0.1/24", "broadcast", "10.9.0.255", "dev", "net1");
      for (const link of ["lo", "eth0", "net1"]) netns.ip("link", "set", link, "up");
      nft(netns, "add table inet witness { set came { type mark; flags dynamic; }; }");
      nft(netns, "add chain inet witness in { type filter hook prerouting priority -300; }");
      const back = "iifname net1 meta mark != 0 add @came { meta mark }";
      nft(netns, `add rule inet witness in ${back}`);
      nft(netns, `add rule inet witness in iifname eth0 ${family} daddr ${target} counter`);
      await applyRuleset(host, netns.path, golden("allow-all-egress"));
      const words = ["ping", "-b", "-c1", "-W1", "-I", "net1", target];
      const left = () =>
        /daddr \S+ counter packets [1-9]/.test(nft(netns, "list table inet witness"));
      while (!left()) Bun.spawnSync(["ip", "netns", "exec", netns.name, ...words]);
      const came = nft(netns, "list set inet witness came");
      expect(came).toMatch(/elements = \{ 0x\w+/);
      const listed = nft(netns, "list table netdev genie");
      const [, seal = ""] = /meta mark (0x\w+) meta mark set 0x0+ accept/.exec(listed) ?? [];
      expect(seal).toStartWith("0x");
      expect(came).not.toContain(seal);
      expect(await verifyRuleset(host, netns.path, golden("allow-all-egress"))).toBeUndefined();
    });
  });
});

test("a run of nft that is ended is not repeated without the packet sockets' table", async () => {
  await withPod(async (netns) => {
    using dir = tempDir();
    fakePlugin(dir.path, "nft", "#!/bin/sh\nkill -9 $$\n");
    const ended = makeHost({ env: { PATH: dir.path } });
    const error = await errorOf(applyRuleset(ended, netns.path, golden("deny-both")));
    expect(error.code).toBe(code.tryAgainLater);
    expect(error.message).toContain("nft was killed by SIGKILL");
    expect(ended.written.stderr).toBe("");
  });
});

describe("verifyRuleset()", () => {
  test.each(["ports", "blocks", "named-ports-egress", "two-interfaces", "whole-families"])(
    "finds %s as it was written",
    async (name) => {
      await withPod(async (netns) => {
        await applyRuleset(host, netns.path, golden(name));
        expect(await verifyRuleset(host, netns.path, golden(name))).toBeUndefined();
      });
    },
  );

  const table = "inet genie";
  test.each([
    ["a rule taken out", `delete rule ${table} ingress_0 handle HANDLE`],
    ["a rule put in", `insert rule ${table} ingress_0 accept`],
    ["a rule added", `add rule ${table} ingress_0 accept`],
    ["a rule replaced", `replace rule ${table} ingress_0 handle HANDLE accept`],
    ["an emptied set", `flush set ${table} peers_0`],
    ["an address more", `add element ${table} peers_0 { 10.66.0.1 }`],
    ["a flushed chain", `flush chain ${table} ingress`],
    ["another chain", `add chain ${table} more`],
    ["another policy", `add chain ${table} ingress { policy drop; }`],
    ["no table", `delete table ${table}`],
    ["a sleeping table", `add table ${table} { flags dormant; }`],
  ])("notices %s", async (_name, command) => {
    await withPod(async (netns) => {
      await applyRuleset(host, netns.path, golden("ports"));
      const listed = nft(netns, "-a", "list", "chain", "inet", "genie", "ingress_0");
      const handle = /\bdrop # handle (\d+)/.exec(listed)?.[1] ?? "";
      nft(netns, command.replace("HANDLE", handle));
      expect(await verifyRuleset(host, netns.path, golden("ports"))).toMatch(
        /^table inet genie (differs: |is gone)/,
      );
    });
  });

  test.each([
    ["no table", "delete table netdev genie"],
    ["a flushed chain", "flush chain netdev genie egress_0"],
    ["a rule put in", "insert rule netdev genie egress_0 accept"],
    ["another interface", 'DEVICE "eth0"'],
    ["another mark", "MARK"],
  ])("notices %s behind the rules", async (_name, command) => {
    await withPod(async (netns) => {
      await applyRuleset(host, netns.path, golden("deny-both"));
      const listed = nft(netns, "list", "table", "netdev", "genie");
      const edited = listed
        .replace('device "net1"', command.startsWith("DEVICE") ? 'device "eth0"' : "$&")
        .replace(/mark 0x\w+/, command === "MARK" ? "mark 0x00000001" : "$&");
      if (edited === listed) nft(netns, command);
      else nft(netns, `delete table netdev genie\n${edited}`);
      expect(await verifyRuleset(host, netns.path, golden("deny-both"))).toMatch(
        /^table netdev genie (differs|is gone|is on)/,
      );
    });
  });

  test("misses nothing that this node cannot have, which is said aloud", async () => {
    await withPod(async (netns) => {
      const loud = makeHost();
      const text = golden("deny-both").replace("hook egress device", "hook unheard device");
      await applyRuleset(loud, netns.path, text);
      expect(loud.written.stderr).toMatch(/^genie: warn: .*packet sockets.*CAP_NET_RAW.*\n$/);
      expect(nft(netns, "list", "tables")).toBe(`table ${podTable}\n`);
      expect(await verifyRuleset(loud, netns.path, text)).toBeUndefined();
      expect(host.written.stderr).toBe("");
    });
  });

  test("notices a table where none is due", async () => {
    await withNetns(async (netns) => {
      expect(await verifyRuleset(host, netns.path, "")).toBeUndefined();
      await applyRuleset(host, netns.path, golden("ports"));
      expect(await verifyRuleset(host, netns.path, "")).toContain("no policy asks for it");
    });
  });
});

describe("another namespace", () => {
  const link = { env: {}, stdin: "", timeoutMs: 10_000 };
  test("is where a run happens, and nowhere else", async () => {
    const here = readlinkSync(own);
    await withNetns(async ({ path }) => {
      const there = await run("/bin/readlink", [own], { ...link, netns: path });
      expect(there.stdout.trim()).toStartWith("net:[");
      expect(there.stdout.trim()).not.toBe(here);
      const after = await run("/bin/readlink", [own], link);
      expect(after.stdout.trim()).toBe(here);
    });
  });

  test("that cannot be entered runs nothing", async () => {
    const ending = await run("/bin/readlink", [own], { ...link, netns: "/etc/hostname" });
    expect(ending).toMatchObject({ kind: "spawn", stdout: "" });
    const gone = await run("/bin/readlink", [own], { ...link, netns: "/nowhere" });
    expect(gone).toMatchObject({ kind: "spawn", reason: "ENOENT" });
  });

  test("is left when what was to be done there fails", async () => {
    const here = readlinkSync(own);
    await withNetns(({ path }) => {
      const act = () => {
        throw new Error("failed there");
      };
      expect(() => inNetns(path, act)).toThrow("failed there");
    });
    expect(readlinkSync("/proc/thread-self/ns/net")).toBe(here);
  });

  test("can be made empty, and is ours alone", () => {
    const here = readlinkSync(own);
    using made = emptyNetns();
    expect(readlinkSync("/proc/thread-self/ns/net")).toBe(here);
    expect(readlinkSync(made?.path ?? "")).not.toBe(here);
  });
});
