/** One operation per container, whoever dies when; and GC alone. */
import { describe, expect, test } from "bun:test";
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { Host } from "../lib/call.ts";
import { code } from "../lib/cni.ts";
import { closeState, type State } from "../lib/database.ts";
import {
  everyContainer,
  newOperation,
  processStarted,
  release,
  takeLock,
  tokenVariable,
} from "../lib/lock.ts";
import type { Operation } from "../lib/record.ts";
import { openState } from "../lib/recovery/database.ts";
import { acquire, isRunning } from "../lib/recovery/held_lock.ts";
import { endHolder, endOrphans } from "../lib/recovery/orphans.ts";
import { makeHost } from "./fakes.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

let folders = 0;
const newPath = (name: string) => join(dir.path, `${name}-${folders++}`);
/** The clock runs: a lock is waited for until a deadline. */
const host: Host = { ...makeHost(), now: Date.now };
const nothing = new Set<string>();

async function withState<T>(fn: (state: State, folder: string) => T | Promise<T>): Promise<T> {
  const folder = newPath("state");
  const state = openState(host, folder);
  try {
    return await fn(state, folder);
  } finally {
    closeState(state);
  }
}

const operation = (id: string, command = "ADD") => newOperation(host, id, command);
const take = (state: State, one: Operation, finished: ReadonlySet<string> = nothing) =>
  acquire(state, one, finished, () => "taken");
const acquired = { kind: "acquired", value: "taken" } as const;
const locks = ({ database }: State) =>
  database
    .query("SELECT container_id || ' ' || command FROM operations ORDER BY 1")
    .values()
    .flat();

/** A process that lives until it is killed. */
function sleeper(env: Record<string, string> = {}, command = ["/bin/sleep", "600"]) {
  return Bun.spawn(command, { env, stdio: ["ignore", "ignore", "ignore"] });
}

async function until(holds: () => boolean): Promise<void> {
  while (!holds()) await Bun.sleep(5);
}

/** The operation of a process that is dead. */
async function dead(id: string, more: Partial<Operation> = {}): Promise<Operation> {
  const child = sleeper();
  const started = processStarted(child.pid);
  child.kill("SIGKILL");
  await child.exited;
  return { ...operation(id), pid: child.pid, started, ...more };
}

describe("acquire()", () => {
  test("excludes a second operation of the container, and no other container", async () => {
    await withState((state) => {
      const first = operation("c1");
      expect(take(state, first)).toEqual(acquired);
      expect(take(state, operation("c1", "DEL"))).toEqual({ kind: "busy", holder: first });
      expect(take(state, operation("c2"))).toEqual(acquired);
      release(state, first, () => undefined);
      expect(take(state, operation("c1", "DEL"))).toEqual(acquired);
    });
  });

  test("lets GC in alone, and nobody beside GC", async () => {
    await withState((state) => {
      const add = operation("c1");
      const gc = operation(everyContainer, "GC");
      take(state, add);
      expect(take(state, gc)).toEqual({ kind: "busy", holder: add });
      release(state, add, () => undefined);
      expect(take(state, gc)).toEqual(acquired);
      for (const command of ["ADD", "DEL", "GC"]) {
        expect(take(state, operation("c1", command))).toEqual({ kind: "busy", holder: gc });
      }
      release(state, gc, () => undefined);
      expect(take(state, add)).toEqual(acquired);
    });
  });

  test("takes nothing when what runs inside fails", async () => {
    await withState((state) => {
      const fail = () => {
        throw new Error("no");
      };
      expect(() => acquire(state, operation("c1"), nothing, fail)).toThrow();
      expect(locks(state)).toEqual([]);
    });
  });

  test("keeps the row of a dead holder until its delegates are ended: we may die too", async () => {
    await withState(async (state) => {
      const gone = await dead("c1");
      take(state, gone);
      const next = operation("c1", "DEL");
      expect(take(state, next)).toEqual({ kind: "abandoned", holders: [gone] });
      expect(locks(state)).toEqual(["c1 ADD"]);
      expect(take(state, next, new Set([gone.token]))).toEqual(acquired);
      expect(locks(state)).toEqual(["c1 DEL"]);
    });
  });

  test("hands every dead holder to GC, and a dead GC to the next", async () => {
    await withState(async (state) => {
      const [one, two] = [await dead("c1"), await dead("c2")];
      take(state, one);
      take(state, two);
      const gc = await dead(everyContainer, { command: "GC" });
      expect(take(state, gc)).toEqual({ kind: "abandoned", holders: [one, two] });
      expect(take(state, gc, new Set([one.token, two.token]))).toEqual(acquired);
      const add = operation("c3");
      expect(take(state, add)).toEqual({ kind: "abandoned", holders: [gc] });
      expect(take(state, add, new Set([gc.token]))).toEqual(acquired);
      expect(locks(state)).toEqual(["c3 ADD"]);
    });
  });

  test("gives back only what is ours", async () => {
    await withState(async (state) => {
      const lost = operation("c1");
      take(state, lost);
      state.database.run("DELETE FROM operations");
      take(state, operation("c1", "DEL"));
      release(state, lost, () => undefined);
      expect(locks(state)).toEqual(["c1 DEL"]);
    });
  });
});

describe("isRunning()", () => {
  const ours = operation("c1");
  const minute = 60_000;
  test.each([
    ["ourselves", {}, 0, true],
    ["a reused pid", { started: "1" }, 0, false],
    ["a pid that is free", { pid: 2 ** 30 }, 0, false],
    ["a process of an earlier boot", { bootId: "another" }, 0, false],
    ["one of an earlier boot elsewhere", { bootId: "another", pidNamespace: "pid:[1]" }, 0, false],
    ["one in another pid namespace, for a while", { pidNamespace: "pid:[1]" }, 14 * minute, true],
    ["one in another pid namespace, later", { pidNamespace: "pid:[1]" }, 15 * minute, false],
    ["one there, by a clock that went back", { pidNamespace: "pid:[1]" }, -15 * minute, false],
  ])("%s", (_name, more, laterMs, expected) => {
    expect(isRunning({ ...ours, ...more }, ours.atMs + laterMs)).toBe(expected);
  });

  test("a zombie", async () => {
    // The shell becomes `sleep`, which never collects its child.
    const parent = sleeper({}, ["/bin/sh", "-c", "/bin/sleep 0.01 & exec /bin/sleep 600"]);
    try {
      const childrenFile = `/proc/${parent.pid}/task/${parent.pid}/children`;
      const children = () => readFileSync(childrenFile, "utf8").trim();
      await until(() => children() !== "");
      const pid = Number(children());
      await until(() => readFileSync(`/proc/${pid}/stat`, "utf8").includes(") Z "));
      expect(processStarted(pid)).toBe("");
      expect(isRunning({ ...ours, pid, started: "" }, ours.atMs)).toBe(false);
    } finally {
      parent.kill("SIGKILL");
      await parent.exited;
    }
  });
});

describe("newOperation()", () => {
  test("marks each operation differently, of one process too", () => {
    expect(operation("c1").token).not.toBe(operation("c1").token);
  });
});

describe("endOrphans()", () => {
  test("ends what carries the token, outside of its group too, and nothing else", async () => {
    const token = crypto.randomUUID();
    const pidFile = newPath("pid");
    const script = `/usr/bin/setsid /bin/sh -c 'echo $$ > ${pidFile}; exec /bin/sleep 600' & wait`;
    const orphan = sleeper({ [tokenVariable]: token }, ["/bin/sh", "-c", script]);
    const similar = sleeper({ [tokenVariable]: `${token}1`, OTHER: `${tokenVariable}=${token}` });
    try {
      await until(() => existsSync(pidFile) && readFileSync(pidFile, "utf8").endsWith("\n"));
      await endOrphans(token);
      expect(processStarted(Number(readFileSync(pidFile, "utf8")))).toBe("");
      expect([processStarted(orphan.pid), processStarted(similar.pid) !== ""]).toEqual(["", true]);
    } finally {
      for (const child of [orphan, similar]) {
        child.kill("SIGKILL");
        await child.exited;
      }
    }
  });
});

describe("endOrphans() and a plugin in the middle of its work", () => {
  // Killed there, host-local leaves an address of nobody, and bridge a bridge without an address.
  test("lets it come to its end", async () => {
    const token = crypto.randomUUID();
    const done = newPath("done");
    const orphan = Bun.spawn(["/bin/sh", "-c", `read line; echo done > ${done}`], {
      env: { [tokenVariable]: token },
      stdin: "pipe",
    });
    try {
      await until(() => environmentOf(orphan.pid).includes(token));
      const ended = endOrphans(token);
      orphan.stdin.write("\n");
      orphan.stdin.end();
      await ended;
      expect([orphan.signalCode, readFileSync(done, "utf8")]).toEqual([null, "done\n"]);
    } finally {
      orphan.kill("SIGKILL");
      await orphan.exited;
    }
  });
});

const environmentOf = (pid: number) => readFileSync(`/proc/${pid}/environ`, "utf8");

describe("endHolder()", () => {
  test("signals a process of our pid namespace, and nobody for one of another", async () => {
    const child = sleeper();
    const holder = { ...operation("c1"), pid: child.pid, started: processStarted(child.pid) };
    endHolder({ ...holder, pidNamespace: "pid:[1]" }, "SIGKILL");
    endHolder(holder, "SIGTERM");
    await child.exited;
    // Had the first one arrived, it would have been faster.
    expect(child.signalCode).toBe("SIGTERM");
    expect(() => endHolder(holder, "SIGKILL")).not.toThrow();
  });
});

describe("takeLock()", () => {
  const far = () => ({ deadlineMs: Date.now() + 60_000 });

  test("waits for the holder", async () => {
    await withState(async (state) => {
      const first = operation("c1");
      take(state, first);
      const seen: string[] = [];
      const waiting = takeLock(
        { host, state, operation: operation("c1", "DEL"), ...far() },
        () => "mine",
        (holder) => {
          if (seen.push(holder.command) === 3) release(state, first, () => undefined);
        },
      );
      expect(await waiting).toBe("mine");
      expect(seen).toEqual(["ADD", "ADD", "ADD"]);
      expect(locks(state)).toEqual(["c1 DEL"]);
    });
  });

  test.each([
    ["at the deadline", () => ({ deadlineMs: Date.now() + 30 })],
    ["when asked to end", () => ({ ...far(), signal: AbortSignal.timeout(30) })],
  ])("gives up with code 11 %s", async (_name, options) => {
    await withState(async (state) => {
      take(state, operation("c1"));
      const waiting = takeLock(
        { host, state, operation: operation("c1", "DEL"), ...options() },
        () => "mine",
      );
      await expect(waiting).rejects.toMatchObject({
        code: code.tryAgainLater,
        message: `Cannot DEL container c1: ADD of process ${process.pid} is still running`,
      });
      expect(locks(state)).toEqual(["c1 ADD"]);
    });
  });

  test("goes on when the file is moved away while it waits", async () => {
    await withState(async (state) => {
      const first = operation("c1");
      take(state, first);
      const real = state.database;
      let looks = 0;
      const waiting = takeLock(
        { host, state, operation: operation("c1", "DEL"), ...far() },
        () => "mine",
        () => {
          if (++looks === 1) release(state, first, () => undefined);
          const moved = Object.assign(new Error("disk I/O error"), { code: "SQLITE_IOERR" });
          if (looks === 1) {
            state.database = new Proxy(real, {
              get: (target, key) => {
                if (key === "run") throw moved;
                const value = Reflect.get(target, key);
                return typeof value === "function" ? value.bind(target) : value;
              },
            });
          }
        },
      );
      expect(await waiting).toBe("mine");
      expect(locks(state)).toEqual(["c1 DEL"]);
    });
  });

  test("ends what a dead holder left running before anything is done", async () => {
    await withState(async (state) => {
      const gone = await dead("c1");
      take(state, gone);
      const orphan = sleeper({ [tokenVariable]: gone.token });
      const wasRunning = await takeLock({ host, state, operation: operation("c1"), ...far() }, () =>
        processStarted(orphan.pid),
      );
      await orphan.exited;
      expect([wasRunning, orphan.signalCode, locks(state)]).toEqual(["", "SIGKILL", ["c1 ADD"]]);
    });
  });

  test("never lets two processes in at once", async () => {
    await withState(async (_state, folder) => {
      const record = newPath("record");
      const go = newPath("go");
      writeFileSync(record, "");
      const modules = (name: string) => JSON.stringify(join(import.meta.dir, name));
      const script = `
        import { appendFileSync, existsSync } from "node:fs";
        import { closeState } from ${modules("../lib/database.ts")};
        import { openState } from ${modules("../lib/recovery/database.ts")};
        import { newOperation, release, takeLock } from ${modules("../lib/lock.ts")};
        import { makeHost } from ${modules("fakes.ts")};
        const host = { ...makeHost(), now: Date.now };
        const say = (what) => appendFileSync(${JSON.stringify(record)}, what + process.pid + "\\n");
        while (!existsSync(${JSON.stringify(go)})) Bun.sleepSync(1);
        const state = openState(host, ${JSON.stringify(folder)});
        for (let i = 0; i < 5; i++) {
          const mine = newOperation(host, "c1", "ADD");
          const deadlineMs = Date.now() + 60000;
          await takeLock({ host, state, operation: mine, deadlineMs }, () => say("+"));
          await Bun.sleep(1);
          release(state, mine, () => say("-"));
        }
        closeState(state);`;
      const children = Array.from({ length: 6 }, () =>
        Bun.spawn([process.execPath, "-e", script], { stdout: "ignore", stderr: "inherit" }),
      );
      writeFileSync(go, "");
      expect(await Promise.all(children.map((child) => child.exited))).toEqual(Array(6).fill(0));
      const lines = readFileSync(record, "utf8").trim().split("\n");
      expect(lines).toHaveLength(60);
      const pairs = lines.filter((_line, i) => i % 2 === 0);
      expect(lines).toEqual(pairs.flatMap((line) => [line, line.replace("+", "-")]));
      expect(pairs.every((line) => line.startsWith("+"))).toBe(true);
    });
  });
});
