/**
 * The compiled program on records in a bad state: cut, damaged here or there, foreign, of an older
 * or a newer genie, on a disk that is full or read-only (design D4, D12). In whatever state, calls
 * end as the protocol says, and nothing is lost silently. The file itself: database.test.ts; disks
 * that fill up in the middle: faults.test.ts; DEL without a record: detach.test.ts.
 */
import { Database } from "bun:sqlite";
import { describe, expect, test } from "bun:test";
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { migrations } from "../lib/recovery/database.ts";
import { callOrder, forgetCalls, type GenieRun } from "./fakes.ts";
import { noise } from "./record.ts";
import { lacks } from "./skip.ts";
import {
  annotated,
  checkFailure,
  compiledGenie,
  left,
  makeNode,
  type Node,
  nothing,
  spawnGenie,
  wire,
  wireError,
} from "./wire.ts";

const listOf = (name: string, type: string) => ({ cniVersion: "1.0.0", name, plugins: [{ type }] });

function makeNetworks(): Node {
  const delegate = { reserve: "$DIR/reserved" };
  return makeNode({
    table: "\n[plugins.blue]\n[plugins.green]\n",
    lists: { "1.conflist": listOf("blue", "a"), "2.conflist": listOf("green", "b") },
    delegates: { a: delegate, b: delegate },
  });
}

const both = annotated({ cni: "blue,green" });
const add = (node: Node, containerId = "c1", stdin: object = both) =>
  wire(node, { command: "ADD", stdin, env: { CNI_CONTAINERID: containerId } });
const del = (node: Node, containerId = "c1") =>
  wire(node, { command: "DEL", stdin: both, env: { CNI_CONTAINERID: containerId } });

const fileOf = (node: Node) => join(node.state, "genie.db");
/** Records that were set aside. */
const aside = (node: Node) =>
  readdirSync(node.state).filter((name) => /^genie\.db\.unusable-\d+$/.test(name));

/** Puts everything into the file itself, so that the log does not bring it back. */
function settleFile(node: Node): void {
  const database = new Database(fileOf(node));
  database.run("PRAGMA wal_checkpoint(TRUNCATE)");
  database.close();
  for (const suffix of ["-wal", "-shm"]) rmSync(fileOf(node) + suffix, { force: true });
}

/** Writes over a part of the file. */
function overwrite(node: Node, from: number, bytes: Uint8Array): void {
  const fd = openSync(fileOf(node), "r+");
  writeSync(fd, bytes, 0, bytes.length, from);
  closeSync(fd);
}

/** Writes over the first page of a table or an index. */
function spoilPage(node: Node, name: string): void {
  settleFile(node);
  const database = new Database(fileOf(node), { readonly: true });
  const row = database.query("SELECT rootpage FROM sqlite_schema WHERE name = ?").values(name)[0];
  const size = Number(database.query("PRAGMA page_size").values()[0]?.[0]);
  database.close();
  overwrite(node, (Number(row?.[0]) - 1) * size, Buffer.alloc(size, 0xa5));
}

function foreign(node: Node): void {
  rmSync(fileOf(node));
  const database = new Database(fileOf(node));
  database.run("CREATE TABLE attachments (a); INSERT INTO attachments VALUES ('theirs')");
  database.close();
}

const report = (node: Node): Promise<GenieRun> => {
  const config = join(node.dir, "genie.conf");
  const stdin = { cniVersion: "1.0.0", name: "genie-net", type: "genie" };
  writeFileSync(config, JSON.stringify({ ...stdin, plugins_file: node.tableFile }));
  return spawnGenie([compiledGenie(), "report", "--cni-config", config], {});
};

describe("a record that is unusable", () => {
  const unusable: [string, (node: Node) => void][] = [
    ["cut after its first page", (node) => truncateSync(fileOf(node), 4096)],
    ["cut in the middle of a page", (node) => truncateSync(fileOf(node), 4096 * 5 + 77)],
    ["with a damaged header", (node) => overwrite(node, 0, Buffer.alloc(100, 0xa5))],
    ["with a damaged schema", (node) => overwrite(node, 100, Buffer.alloc(3000, 0xa5))],
    ["whose attachments are noise", (node) => spoilPage(node, "attachments")],
    ["whose locks are noise", (node) => spoilPage(node, "operations")],
    ["that is text", (node) => writeFileSync(fileOf(node), "no database ".repeat(1000))],
    ["of another program", foreign],
  ];

  test.each(unusable)("%s: an ADD sets it aside, says so, and attaches", async (_name, spoil) => {
    using node = makeNetworks();
    expect((await add(node)).status).toBe(0);
    settleFile(node);
    spoil(node);
    const spoilt = readFileSync(fileOf(node));
    const run = await add(node, "c2");
    expect(run).toMatchObject({ status: 0, stderr: expect.stringContaining("Set aside unusable") });
    const [name = "", ...more] = aside(node);
    expect([more, readFileSync(join(node.state, name)).equals(spoilt)]).toEqual([[], true]);
    expect(left(node).rows).toEqual(["c2 eth0 attached", "c2 eth1 attached"]);
    // What the old one knew is deleted by what the request carries.
    forgetCalls(node.bin);
    expect(await del(node)).toMatchObject({ status: 0, stdout: "" });
    expect(callOrder(node.bin)).toEqual(["b DEL c1 eth1", "a DEL c1 eth0"]);
    expect((await del(node, "c2")).status).toBe(0);
    expect(left(node)).toEqual(nothing);
    const said = await report(node);
    expect([said.status, said.stdout]).toEqual([0, expect.stringContaining(name)]);
  });

  test.each(unusable)("%s: a DEL goes by what it carries", async (_name, spoil) => {
    using node = makeNetworks();
    expect((await add(node)).status).toBe(0);
    settleFile(node);
    spoil(node);
    forgetCalls(node.bin);
    expect(await del(node)).toMatchObject({ status: 0, stdout: "" });
    expect(callOrder(node.bin)).toEqual(["b DEL c1 eth1", "a DEL c1 eth0"]);
    expect(left(node)).toEqual(nothing);
  });

  test("that is empty is a new one: nobody lost anything", async () => {
    using node = makeNetworks();
    mkdirSync(node.state);
    writeFileSync(fileOf(node), "");
    expect(await add(node)).toMatchObject({ status: 0, stderr: "" });
    expect([aside(node), (await del(node)).status, left(node)]).toEqual([[], 0, nothing]);
  });

  test("with random damage: every call ends, and every DEL that succeeds has deleted", async () => {
    for (let seed = 1; seed <= 12; seed++) {
      using node = makeNetworks();
      expect((await add(node)).status).toBe(0);
      settleFile(node);
      const random = noise(seed);
      const size = statSync(fileOf(node)).size;
      for (let i = 0; i < 3 + seed; i++) {
        const at = Math.floor(random.next().value * size);
        overwrite(node, at, Buffer.from([Math.floor(random.next().value * 256)]));
      }
      forgetCalls(node.bin);
      for (const run of [await add(node, "c2"), await del(node), await del(node, "c2")]) {
        if (run.status !== 0) checkFailure(run);
      }
      // Runtimes repeat a DEL that fails.
      const again = [await del(node), await del(node, "c2")];
      expect([seed, again.map(({ status }) => status)]).toEqual([seed, [0, 0]]);
      expect([seed, readdirSync(node.reserved)]).toEqual([seed, []]);
    }
  });
});

describe("a record of which only the audit is damaged", () => {
  test.each([
    "ledger",
    "ledger_at",
    "ledger_network",
    "traffic",
    "traffic_at",
    "choices",
    "health",
  ])("in %s: attachments are not lost for it", async (name) => {
    using node = makeNetworks();
    expect((await add(node)).status).toBe(0);
    spoilPage(node, name);
    for (const [id, stdin] of [
      ["c2", both],
      ["c3", annotated({ cni: "" })],
    ] as const) {
      const run = await add(node, id, stdin);
      expect([name, id, run]).toMatchObject([name, id, { status: 0 }]);
    }
    // Whether or not a damaged page was in the way: what there is, is known.
    expect([aside(node), left(node).rows.length]).toEqual([[], 5]);
    for (const id of ["c1", "c2", "c3"]) expect((await del(node, id)).status).toBe(0);
    expect(left(node)).toEqual(nothing);
  });
});

describe("a record of another genie", () => {
  test("that is newer is refused, left alone, and DEL goes on without it", async () => {
    using node = makeNetworks();
    expect((await add(node)).status).toBe(0);
    settleFile(node);
    const database = new Database(fileOf(node));
    database.run(`PRAGMA user_version = ${migrations.length + 1}`);
    database.close();
    settleFile(node);
    const before = readFileSync(fileOf(node));
    forgetCalls(node.bin);
    for (const stdin of [both, annotated({ cni: "" })]) {
      const error = wireError(await add(node, "c2", stdin));
      expect([error.code, error.msg]).toEqual([
        106,
        expect.stringMatching(
          new RegExp(
            `genie\\.db: its schema version ${migrations.length + 1} is newer than ` +
              `${migrations.length}, install the genie that wrote it or a later one$`,
          ),
        ),
      ]);
    }
    expect(callOrder(node.bin)).toEqual([]);
    const run = await del(node);
    expect([run.status, run.stdout]).toEqual([0, ""]);
    expect(run.stderr).toContain("is newer than");
    expect(callOrder(node.bin)).toEqual(["b DEL c1 eth1", "a DEL c1 eth0"]);
    expect([readFileSync(fileOf(node)).equals(before), aside(node)]).toEqual([true, []]);
  });

  /** Makes the record what the first version would have left of it. */
  function age(node: Node): Record<string, unknown[]> {
    settleFile(node);
    const [first = ""] = migrations;
    const path = `${fileOf(node)}.old`;
    const old = new Database(path);
    old.run(first);
    old.run(`ATTACH '${fileOf(node)}' AS new`);
    const tables = ["attachments", "operations", "ended"];
    for (const table of tables) {
      const columns = old.query(`SELECT name FROM pragma_table_info('${table}')`).values().join();
      old.run(`INSERT INTO main.${table} (${columns}) SELECT ${columns} FROM new.${table}`);
    }
    const rows = Object.fromEntries(
      tables.map((table) => [table, old.query(`SELECT * FROM main.${table} ORDER BY 1, 2`).all()]),
    );
    old.run("DETACH new; PRAGMA application_id = 0x67656e69; PRAGMA user_version = 1");
    old.close();
    copyFileSync(path, fileOf(node));
    rmSync(path);
    return rows;
  }

  const rowsOf = (node: Node, tables: string[]) => {
    using database = new Database(fileOf(node), { readonly: true });
    return Object.fromEntries(
      tables.map((table) => [table, database.query(`SELECT * FROM ${table} ORDER BY 1, 2`).all()]),
    );
  };

  test("that is older is migrated, with every row", async () => {
    using node = makeNetworks();
    for (const id of ["c1", "c2", "c3"]) expect((await add(node, id)).status).toBe(0);
    expect((await del(node, "c3")).status).toBe(0);
    const rows = age(node);
    expect(Object.values(rows).map((one) => one.length)).toEqual([4, 0, 1]);
    // Each command migrates: a CHECK changes nothing else.
    expect(await wire(node, { command: "CHECK", stdin: both })).toMatchObject({ status: 0 });
    expect(rowsOf(node, Object.keys(rows))).toEqual(rows);
    using database = new Database(fileOf(node), { readonly: true });
    expect(database.query("PRAGMA user_version").values()).toEqual([[migrations.length]]);
    expect(database.query("PRAGMA integrity_check").values()).toEqual([["ok"]]);
    forgetCalls(node.bin);
    for (const id of ["c1", "c2"]) expect(await del(node, id)).toMatchObject({ status: 0 });
    expect(callOrder(node.bin)).toHaveLength(4);
    expect([aside(node), left(node)]).toEqual([[], nothing]);
  });

  test("that is older is migrated once by eight calls at once", async () => {
    using node = makeNetworks();
    expect((await add(node)).status).toBe(0);
    age(node);
    const ids = Array.from({ length: 8 }, (_, i) => `m${i}`);
    const runs = await Promise.all(ids.map((id) => add(node, id)));
    expect(runs).toMatchObject(ids.map(() => ({ status: 0, stderr: "" })));
    expect(left(node).rows).toHaveLength(18);
  });
});

/** Mounts a small disk. @returns whether that worked */
function mountDisk(path: string): boolean {
  mkdirSync(path);
  const args = ["mount", "-t", "tmpfs", "-o", "size=512k", "genie-test", path];
  return Bun.spawnSync(args).exitCode === 0;
}

describe.skipIf(lacks("mounts"))("an automatic choice on a disk that is", () => {
  async function withDisk(fn: (node: Node, disk: string) => Promise<void>) {
    using made = makeNetworks();
    const disk = join(made.dir, "disk");
    if (!mountDisk(disk)) throw new Error("Cannot mount");
    const node: Node = { ...made, state: join(disk, "state") };
    const table = readFileSync(made.tableFile, "utf8").replace(made.state, node.state);
    writeFileSync(node.tableFile, table);
    try {
      await fn(node, disk);
    } finally {
      Bun.spawnSync(["umount", "--lazy", disk]);
    }
  }
  const choice = annotated({ cni: "" });
  const stop: [string, (disk: string) => void, (disk: string) => void][] = [
    [
      "full",
      (disk) => {
        const text = `dd if=/dev/zero of=${disk}/fill bs=1k 2>/dev/null || true`;
        Bun.spawnSync(["/bin/sh", "-c", text]);
      },
      (disk) => rmSync(join(disk, "fill")),
    ],
    [
      "read-only",
      (disk) => Bun.spawnSync(["mount", "-o", "remount,ro", disk]),
      (disk) => Bun.spawnSync(["mount", "-o", "remount,rw", disk]),
    ],
  ];

  test.each(stop)("%s is refused, and no plugin hears of it", async (_name, spoil, mend) => {
    await withDisk(async (node, disk) => {
      expect(await add(node, "c1", choice)).toMatchObject({ status: 0, stderr: "" });
      spoil(disk);
      forgetCalls(node.bin);
      expect(wireError(await add(node, "c2", choice)).code).toBe(106);
      expect(callOrder(node.bin)).toEqual([]);
      expect((await del(node)).status).toBe(0);
      expect(readdirSync(node.reserved)).toEqual([]);
      mend(disk);
      expect(await add(node, "c3", choice)).toMatchObject({ status: 0, stderr: "" });
      for (const id of ["c1", "c2", "c3"]) expect((await del(node, id)).status).toBe(0);
      expect([aside(node), left(node)]).toEqual([[], nothing]);
    });
  });

  test.each(stop)("%s before the first call leaves nothing", async (_name, spoil) => {
    await withDisk(async (node, disk) => {
      spoil(disk);
      expect(wireError(await add(node, "c1", choice)).code).toBe(106);
      expect((await del(node)).status).toBe(0);
      // DEL guesses: it had no record to go by.
      expect(callOrder(node.bin).filter((one) => one.includes("ADD"))).toEqual([]);
      expect(existsSync(fileOf(node)) && statSync(fileOf(node)).size > 0).toBe(false);
    });
  });
});
