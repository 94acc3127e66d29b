/**
 * The file of the record: modes, migration by the steps of lib/recovery/migrations.sql, and every
 * way in which it can be unusable.
 */
import { Database } from "bun:sqlite";
import { describe, expect, test } from "bun:test";
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { code } from "../lib/cni.ts";
import { closeState, type State, write } from "../lib/database.ts";
import { openCopy, openState, reopen } from "../lib/recovery/database.ts";
import { type FakeHost, makeHost } from "./fakes.ts";
import { fileDir } from "./stage.ts";

const module = JSON.stringify(join(import.meta.dir, "../lib/database.ts"));
const recovery = JSON.stringify(join(import.meta.dir, "../lib/recovery/database.ts"));
const fakes = JSON.stringify(join(import.meta.dir, "fakes.ts"));

const dir = fileDir();

/** What a link leads to; "" for one that has just gone. */
function linkOf(path: string): string {
  try {
    return readlinkSync(path);
  } catch (error) {
    return error instanceof Error ? "" : "?";
  }
}

let folders = 0;
/** A path for a state folder that is not there yet. */
function stateDir(): string {
  return join(dir.path, `state-${folders++}`);
}

const fileOf = (folder: string) => join(folder, "genie.db");
const modeOf = (path: string) => (statSync(path).mode & 0o777).toString(8);

/** Opens, calls, closes. */
function withState<T>(folder: string, fn: (state: State) => T, host: FakeHost = makeHost()): T {
  const state = openState(host, folder);
  try {
    return fn(state);
  } finally {
    closeState(state);
  }
}

/** The schema version of a new file. */
const version = withState(stateDir(), ({ database }) =>
  Number(database.query("PRAGMA user_version").values()[0]?.[0]),
);

const insertEnded = "INSERT INTO ended VALUES (?, 'eth0', 'DEL', 1)";
const addEnded = (id: string) => (state: State) =>
  write(state, () => state.database.query(insertEnded).run(id));
const endedIds = ({ database }: State) =>
  database
    .query("SELECT container_id FROM ended ORDER BY 1")
    .values()
    .map(([id]) => String(id));

/** Two thousand rows: a file of many pages. */
function fillMany(folder: string): void {
  withState(folder, (state) =>
    write(state, () => {
      for (let i = 0; i < 2000; i++) state.database.query(insertEnded).run(`container-${i}`);
    }),
  );
}

/** Runs one script in several processes at once, and returns what each wrote to stderr. */
async function race(script: string, processes: number): Promise<string[]> {
  const go = join(dir.path, `go-${folders++}`);
  const text = `
    import { existsSync, readFileSync } from "node:fs";
    import { closeState, write } from ${module};
    import { openState, reopen } from ${recovery};
    import { makeHost } from ${fakes};
    const me = process.pid;
    while (!existsSync(${JSON.stringify(go)})) Bun.sleepSync(1);
    const start = Number(readFileSync(${JSON.stringify(go)}, "utf8"));
    ${script}`;
  const children = Array.from({ length: processes }, () =>
    Bun.spawn([process.execPath, "-e", text], { stdout: "ignore", stderr: "pipe" }),
  );
  writeFileSync(`${go}.new`, String(Date.now() + 50));
  renameSync(`${go}.new`, go);
  return Promise.all(
    children.map(async (child) => {
      const [said, status] = await Promise.all([child.stderr.text(), child.exited]);
      return status === 0 ? said : `status ${status}: ${said}`;
    }),
  );
}

describe("openState()", () => {
  test("makes folder and file readable by no one else", () => {
    const folder = stateDir();
    withState(folder, (state) => {
      addEnded("c1")(state);
      expect(readdirSync(folder).sort()).toEqual(["genie.db", "genie.db-shm", "genie.db-wal"]);
      expect(
        [folder, ...readdirSync(folder).map((name) => join(folder, name))].map(modeOf),
      ).toEqual(["700", "600", "600", "600"]);
    });
    expect(readdirSync(folder)).toEqual(["genie.db"]);
  });

  test("takes a file back from others", () => {
    const folder = stateDir();
    withState(folder, () => undefined);
    chmodSync(fileOf(folder), 0o644);
    withState(folder, () => expect(modeOf(fileOf(folder))).toBe("600"));
  });

  test("sets up the file as design D12 says", () => {
    withState(stateDir(), ({ database }) => {
      const pragma = (name: string) => database.query(`PRAGMA ${name}`).values()[0]?.[0];
      expect(
        ["journal_mode", "busy_timeout", "user_version", "application_id"].map(pragma),
      ).toEqual(["wal", 30_000, version, 0x67656e69]);
      const tables = database.query(
        "SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE TABLE%'",
      );
      expect(tables.values().flat()).toContainValues(["attachments", "operations", "ended"]);
    });
  });

  test("keeps what is there", () => {
    const folder = stateDir();
    withState(folder, addEnded("c1"));
    expect(withState(folder, endedIds)).toEqual(["c1"]);
  });

  test("makes one file when eight processes come first", async () => {
    const folder = stateDir();
    const files = Array.from({ length: 40 }, (_, i) => join(folder, String(i)));
    // All meet at each file: SQLite sends away who comes while another turns the log on.
    const said = await race(
      `for (const [i, file] of ${JSON.stringify(files)}.entries()) {
         while (Date.now() < start + i * 10) Bun.sleepSync(0.2);
         const state = openState(makeHost(), file);
         write(state, () => state.database.query(${JSON.stringify(insertEnded)}).run("c" + me));
         closeState(state);
       }`,
      8,
    );
    expect(said).toEqual(Array(8).fill(""));
    expect(files.map((file) => withState(file, endedIds).length)).toEqual(files.map(() => 8));
  });

  test.each([
    ["a folder that is a file", (folder: string) => writeFileSync(folder, "")],
    ["a file that is a folder", (folder: string) => mkdirSync(fileOf(folder), { recursive: true })],
  ])("refuses %s", (_name, prepare) => {
    const folder = stateDir();
    prepare(folder);
    expect(() => openState(makeHost(), folder)).toThrow(
      expect.objectContaining({ code: code.stateUnavailable }),
    );
  });

  test("refuses the file of a newer genie and leaves it alone", () => {
    const folder = stateDir();
    withState(folder, ({ database }) => database.run(`PRAGMA user_version = ${version + 1}`));
    const before = readFileSync(fileOf(folder));
    const host = makeHost();
    const newer = expect.stringContaining(`newer than ${version}`);
    expect(() => openState(host, folder)).toThrow(
      expect.objectContaining({ code: code.stateUnavailable, message: newer }),
    );
    expect(() => openCopy(folder)).toThrow(expect.objectContaining({ message: newer }));
    expect(readFileSync(fileOf(folder))).toEqual(before);
    expect([readdirSync(folder), host.written.stderr]).toEqual([["genie.db"], ""]);
  });
});

const text = `no database, but long enough to be one: ${"x".repeat(8192)}`;
const unusable: [string, (folder: string) => void][] = [
  ["text", (folder) => writeFileSync(fileOf(folder), text)],
  ["a short text", (folder) => writeFileSync(fileOf(folder), "{}")],
  ["a file cut after its first page", (folder) => truncateSync(fileOf(folder), 4096)],
  ["a file cut in the middle", (folder) => truncateSync(fileOf(folder), 5000)],
  ["a damaged header", (folder) => overwrite(fileOf(folder), 0, 100)],
  ["pages that are noise", (folder) => overwrite(fileOf(folder), 4096, 200_000)],
  ["another program's tables", (folder) => foreign(folder, 0)],
  ["another program's version", (folder) => foreign(folder, 1)],
  ["another program's later version", (folder) => foreign(folder, 99)],
];

function overwrite(path: string, from: number, length: number): void {
  const size = Math.min(length, statSync(path).size - from);
  const fd = openSync(path, "r+");
  writeSync(fd, Buffer.alloc(size, 0xa5), 0, size, from);
  closeSync(fd);
}

function foreign(folder: string, version: number): void {
  truncateSync(fileOf(folder), 0);
  const database = new Database(fileOf(folder));
  database.run(`CREATE TABLE attachments (a); PRAGMA user_version = ${version}`);
  database.close();
}

/** The first read and write of an operation, as taking a lock does it. */
function use(host: FakeHost, state: State, id: string): string[] {
  const act = () => {
    state.database.query(insertEnded).run(id);
    return endedIds(state);
  };
  try {
    return write(state, act);
  } catch (error) {
    reopen(host, state, error);
    return write(state, act);
  }
}

describe("a file that is unusable", () => {
  test.each(unusable)("is set aside and reported: %s", (_name, spoil) => {
    const folder = stateDir();
    fillMany(folder);
    spoil(folder);
    const spoilt = readFileSync(fileOf(folder));
    const host = makeHost();
    withState(folder, (state) => expect(use(host, state, "c1")).toEqual(["c1"]), host);
    const aside = `genie.db.unusable-${host.now()}`;
    expect(readdirSync(folder).filter((name) => !/-(wal|shm)$/.test(name))).toEqual([
      "genie.db",
      aside,
    ]);
    expect(readFileSync(join(folder, aside))).toEqual(spoilt);
    expect([modeOf(fileOf(folder)), withState(folder, endedIds)]).toEqual(["600", ["c1"]]);
    expect(host.written.stderr).toMatch(/^genie: error: Set aside unusable database .*\n$/);
    // The agent lives on: nothing of the file stays open.
    const open = readdirSync("/proc/self/fd").map((fd) => linkOf(`/proc/self/fd/${fd}`));
    expect(open.filter((path) => path.startsWith(join(folder, aside)))).toEqual([]);
  });

  test("is set aside once by eight processes, and none loses what it wrote", async () => {
    for (const [, spoil] of [unusable[0], unusable[5]].filter((row) => row !== undefined)) {
      const folder = stateDir();
      fillMany(folder);
      spoil(folder);
      const said = await race(
        `const host = { ...makeHost(), now: Date.now };
         const state = openState(host, ${JSON.stringify(folder)});
         const act = () => {
           state.database.query("SELECT count(*) FROM ended").get();
           state.database.query(${JSON.stringify(insertEnded)}).run("c" + me);
         };
         try {
           write(state, act);
         } catch (error) {
           reopen(host, state, error);
           write(state, act);
         }
         closeState(state);
         process.stderr.write(host.written.stderr.replace(/ .*/s, ""));`,
        8,
      );
      expect(said.filter((line) => line !== "")).toEqual(["genie:"]);
      expect(withState(folder, endedIds)).toHaveLength(8);
      expect(readdirSync(folder).filter((name) => /\.unusable-\d+$/.test(name))).toHaveLength(1);
    }
  });

  test.each([
    ["", 60_000],
    [", and the clock went back since", -60_000],
  ])("is set aside although a process died while it did so%s", (_name, laterMs) => {
    const folder = stateDir();
    mkdirSync(folder);
    writeFileSync(fileOf(folder), text);
    writeFileSync(`${fileOf(folder)}.setting-aside`, "");
    const host = { ...makeHost(), now: () => Date.now() + laterMs };
    withState(folder, (state) => expect(use(host, state, "c1")).toEqual(["c1"]), host);
    expect(existsSync(`${fileOf(folder)}.setting-aside`)).toBe(false);
  });

  test("found so in the middle of an operation fails that, and nothing is renamed", () => {
    const folder = stateDir();
    fillMany(folder);
    withState(folder, (state) => {
      overwrite(fileOf(folder), 4096, 200_000);
      const broken = () => write(state, () => state.database.query("SELECT * FROM ended").all());
      expect(broken).toThrow(expect.objectContaining({ code: code.stateUnavailable }));
    });
    expect(readdirSync(folder).filter((name) => name.includes(".unusable-"))).toEqual([]);
  });
});

describe("write()", () => {
  test("does all or nothing, and passes its own errors on", () => {
    withState(stateDir(), (state) => {
      const half = () =>
        write(state, () => {
          state.database.query(insertEnded).run("c1");
          state.database.query(insertEnded).run("c1");
        });
      expect(half).toThrow(expect.objectContaining({ code: code.stateUnavailable }));
      expect(endedIds(state)).toEqual([]);
    });
  });

  test("says try again where another process keeps the file locked", () => {
    const folder = stateDir();
    withState(folder, (state) => {
      const other = new Database(fileOf(folder));
      other.run("BEGIN IMMEDIATE");
      state.database.run("PRAGMA busy_timeout = 20");
      expect(() => addEnded("c1")(state)).toThrow(
        expect.objectContaining({ code: code.tryAgainLater }),
      );
      other.run("ROLLBACK");
      other.close();
      addEnded("c1")(state);
      expect(endedIds(state)).toEqual(["c1"]);
    });
  });
});

describe("openCopy()", () => {
  test("reads what is not in the file itself yet, and leaves nothing", () => {
    const folder = stateDir();
    withState(folder, (state) => {
      addEnded("c1")(state);
      expect(existsSync(`${fileOf(folder)}-wal`)).toBe(true);
      const copy = openCopy(folder);
      expect([endedIds(copy), modeOf(copy.copyDir), copy.file]).toEqual([
        ["c1"],
        "700",
        fileOf(folder),
      ]);
      addEnded("c2")(copy);
      closeState(copy);
      expect([existsSync(copy.copyDir), endedIds(state)]).toEqual([false, ["c1"]]);
    });
  });

  test.each([
    ["there is none", () => undefined],
    ["it is no database", (folder: string) => writeFileSync(fileOf(folder), text)],
  ])("refuses a record where %s", (_name, prepare: (folder: string) => void) => {
    const folder = stateDir();
    mkdirSync(folder);
    prepare(folder);
    expect(() => openCopy(folder)).toThrow(
      expect.objectContaining({ code: code.stateUnavailable }),
    );
  });
});
