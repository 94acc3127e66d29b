/** What `bun run test` finds out about itself: what was skipped and why, and what was left. */
import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { beginRun, endRun, environment, netnsPrefix } from "./leftovers.ts";
import {
  allPackages,
  excusePrefix,
  fetchNext,
  missing,
  missingPackages,
  whyNoNext,
} from "./needs.ts";
import {
  formatSeconds,
  formatSkipped,
  formatSlowest,
  readReport,
  sumOfExcused,
} from "./outcome.ts";
import { lacks } from "./skip.ts";
import { fileDir } from "./stage.ts";

const dir = fileDir();

/** Runs a test file in a `bun test` of its own. @returns its report */
function reportOf(name: string, text: string): string {
  const file = join(dir.path, `${name}.test.ts`);
  const report = join(dir.path, `${name}.xml`);
  const skip = JSON.stringify(join(import.meta.dir, "skip.ts"));
  writeFileSync(file, `import { describe, test } from "bun:test";\n${text.replace("SKIP", skip)}`);
  const flags = ["--reporter=junit", `--reporter-outfile=${report}`];
  const env = { ...process.env, GENIE_TESTS: "fast" };
  Bun.spawnSync([process.execPath, "test", ...flags, file], { cwd: dir.path, env });
  return Bun.spawnSync(["/bin/cat", report]).stdout.toString();
}

describe("the report of bun test", () => {
  const text = `import { lacks } from SKIP;
    test("runs", () => {});
    describe.skipIf(lacks("root", "curl"))('a "quoted" <name>', () => {
      test.each([1, 2])("%d", () => {});
    });
    describe("inside", () => {
      test.skipIf(lacks("root", "curl"))("x", () => {});
    });`;

  test("tells what was skipped, and why", () => {
    const files = readReport(reportOf("needy", text));
    const why = "not in the fast run: needs root, curl";
    expect(files).toMatchObject([{ name: "needy.test.ts", skipped: 5, reasons: [why] }]);
    expect(formatSkipped(files)).toBe(
      `FILE           SKIPPED  WHY\nneedy.test.ts        5  ${why}\n`,
    );
  });

  test("tells of a file that gives no reason", () => {
    const files = readReport(reportOf("silent", 'test.skip("x", () => {});'));
    expect(formatSkipped(files)).toContain("silent.test.ts        1  the file does not say why\n");
  });

  test("excuses a file that lacks only what cannot be had", () => {
    const file = (skipped: number, ...reasons: string[]) => ({
      ...{ name: "a", seconds: 1, skipped, reasons },
    });
    const excuse = `${excusePrefix}apt-get: E: no such host`;
    const files = [file(3, excuse), file(5, excuse, "not installed: curl"), file(2), file(0)];
    expect(sumOfExcused(files)).toBe(3);
  });

  test("of nothing skipped makes no table, and names the slowest", () => {
    const files = ["a", "b", "c"].map((name, i) => ({
      name,
      seconds: i,
      skipped: 0,
      reasons: [],
    }));
    expect(formatSkipped(files)).toBe("");
    expect(formatSlowest(files, 2)).toBe("Slowest: c 2 s, b 1 s\n");
    expect([59.4, 60, 284].map(formatSeconds)).toEqual(["59 s", "1 min 0 s", "4 min 44 s"]);
  });
});

describe.skipIf(lacks("root") || !Bun.which("apt-get"))("Debian's next release", () => {
  test("that the mirror does not have is an excuse, and not asked for again", () => {
    const target = join(dir.path, "next");
    expect(whyNoNext(target)).toStartWith("not fetched");
    const said: string[] = [];
    const fetch = (again: boolean) => {
      fetchNext((line) => said.push(line), { again, target, mirror: () => "http://127.0.0.1:9/" });
    };
    fetch(false);
    expect(whyNoNext(target)).toMatch(/^cannot be had: apt-get: [EW]: .*127\.0\.0\.1/);
    expect(said).toEqual([
      expect.stringMatching(/^Fetching containerd, /),
      expect.stringMatching(/^What needs it will not be tested: apt-get: [EW]: /),
    ]);
    fetch(false);
    expect(said.length).toBe(2);
    fetch(true);
    expect(said.length).toBe(4);
    expect(readdirSync(dir.path).filter((name) => name.startsWith("next"))).toEqual([
      "next.failure",
    ]);
    mkdirSync(target);
    fetch(true);
    expect([said.length, whyNoNext(target)]).toEqual([4, undefined]);
  });
});

describe("what a run leaves", () => {
  test("is nothing", async () => {
    expect(await endRun(beginRun())).toEqual({ left: [], cameBack: [] });
  });

  test("is named and removed", async () => {
    const run = beginRun();
    writeFileSync(join(run.dir, "file"), "");
    const child = Bun.spawn(["sleep", "600"], { env: { ...process.env, ...environment(run) } });
    expect((await endRun(run, 0)).left).toEqual([
      `process ${child.pid}: sleep 600`,
      `file ${join(run.dir, "file")}`,
    ]);
    await child.exited;
    expect([child.signalCode, existsSync(run.dir)]).toEqual(["SIGKILL", false]);
  });

  test("is told apart from a folder that a late process made again", async () => {
    const run = beginRun();
    const [removed, kept] = ["removed", "kept"].map((name) => join(run.dir, name));
    for (const path of [removed, kept]) mkdirSync(join(path ?? "", "state"), { recursive: true });
    const script = `import { removeFolder } from "${import.meta.dir}/leftovers.ts";
      removeFolder(process.argv[1]);`;
    const env = { ...process.env, ...environment(run) };
    Bun.spawnSync([process.execPath, "-e", script, removed ?? ""], { env });
    mkdirSync(join(removed ?? "", "state"), { recursive: true });
    expect(await endRun(run)).toEqual({
      left: [`file ${kept} with state`],
      cameBack: [`file ${removed} with state`],
    });
  });

  test.skipIf(lacks("network namespaces"))("may be a network namespace", async () => {
    const run = beginRun();
    const name = `${netnsPrefix(run.id)}x`;
    Bun.spawnSync(["ip", "netns", "add", name]);
    expect((await endRun(run)).left).toEqual([`network namespace ${name}`]);
    expect(existsSync(`/var/run/netns/${name}`)).toBe(false);
  });
});

test("a machine has what it has", () => {
  expect(missingPackages([])).toEqual([]);
  expect(allPackages).toContain("nftables");
  expect(missing()).toBeUndefined();
});
