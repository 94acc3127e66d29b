/**
 * `bun run test`: builds the binary, runs every test, and ends with one line
 * `N passed, N failed, N skipped`. Words after it go to `bun test` (file names, `-t pattern`).
 */
import { dirname } from "node:path";

const root = dirname(import.meta.dir);

const build = Bun.spawnSync([process.execPath, "tests/build.ts"], { cwd: root });
if (build.exitCode !== 0) {
  process.stderr.write(build.stderr);
  process.stdout.write("0 passed, 1 failed, 0 skipped\n");
  process.exit(1);
}

const tests = Bun.spawn([process.execPath, "test", "--timeout=120000", ...process.argv.slice(2)], {
  cwd: root,
  stdin: "ignore",
  stdout: "inherit",
  stderr: "pipe",
});
let output = "";
const decoder = new TextDecoder();
for await (const chunk of tests.stderr) {
  process.stderr.write(chunk);
  output += decoder.decode(chunk, { stream: true });
}
await tests.exited;

// Bun ends with ` 12 pass`, ` 1 skip`, ` 0 fail`; an error between tests counts as `1 error`.
const count = (word: string) =>
  Number(new RegExp(`^ *(\\d+) ${word}s?$`, "m").exec(output)?.[1] ?? 0);
const passed = count("pass");
const failed = count("fail") + count("error");
const skipped = count("skip") + count("todo");
const ok = tests.exitCode === 0 && failed === 0 && passed > 0;
process.stdout.write(
  `${passed} passed, ${ok ? failed : Math.max(1, failed)} failed, ${skipped} skipped\n`,
);
process.exit(ok ? 0 : 1);
