/** `genie completion`, lib/cli/command_line.ts: what real shells make of it. */
import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { runCommand } from "../lib/cli/command_line.ts";
import { commandLines, optionsOf } from "../lib/cli/commands.ts";
import { makeHost, tempDir } from "./fakes.ts";

async function print(...words: string[]) {
  const host = makeHost();
  const status = await runCommand(host, ["completion", ...words]);
  return { status, ...host.written };
}

const names = [...Object.keys(commandLines), "help"];
const rows: [line: string, has: string[], hasNot: string[]][] = [
  ["genie ", names, ["--json"]],
  ["genie ins", ["install"], ["uninstall", "plan"]],
  ["genie install --", ["--table", "--no-wait", "--json"], ["--purge", "--pod"]],
  ["genie uninstall --p", ["--purge"], ["--force"]],
  ["genie report --command ", ["ADD", "GC"], ["--json"]],
  ["genie completion ", ["bash", "zsh", "fish"], ["plan"]],
  ["genie help pl", ["plan"], ["install"]],
  ["genie install --table /etc/host", ["/etc/hosts"], []],
];

/** What a shell offers for a line whose end is the cursor, by its own means. */
const offers: Record<string, (script: string, line: string) => string[]> = {
  bash: (script, line) => {
    const run = `. ${script}
      read -ra COMP_WORDS <<<"$1"; [[ $1 == *" " ]] && COMP_WORDS+=("")
      COMP_CWORD=$((\${#COMP_WORDS[@]} - 1)); _genie; printf '%s\\n' "\${COMPREPLY[@]}"`;
    return lines(["bash", "--norc", "-c", run, "bash", line]);
  },
  fish: (script, line) =>
    lines(["fish", "--no-config", "-c", `source ${script}; complete -C "${line}"`]).map(
      (one) => one.split("\t")[0] ?? "",
    ),
};

function lines(command: string[]): string[] {
  using home = tempDir(); // fish writes there
  const env = { PATH: "/usr/sbin:/usr/bin:/sbin:/bin", HOME: home.path, LANG: "C.UTF-8" };
  const run = Bun.spawnSync(command, { env });
  expect([run.stderr.toString(), run.exitCode]).toEqual(["", 0]);
  return run.stdout.toString().trim().split("\n");
}

// bash is everywhere; another shell is asked where it is installed.
const present = Object.keys(offers).filter((shell) => shell === "bash" || Bun.which(shell));

describe.each(present)("%s", (shell) => {
  test.each(rows)("completes %j", async (line, has, hasNot) => {
    using dir = tempDir();
    const script = join(dir.path, "script");
    const { status, stdout } = await print(shell);
    expect(status).toBe(0);
    writeFileSync(script, stdout);
    const offered = offers[shell]?.(script, line) ?? [];
    expect(offered).toEqual(expect.arrayContaining(has));
    expect(offered.filter((one) => hasNot.includes(one))).toEqual([]);
  });
});

describe("every shell", () => {
  test.each(["bash", "zsh", "fish"])("%s knows every command and option", async (shell) => {
    const { stdout } = await print(shell);
    for (const [name, command] of Object.entries(commandLines)) {
      expect(stdout).toContain(name);
      for (const { name: option } of optionsOf(command)) {
        expect(stdout).toContain(shell === "fish" ? `-l ${option}` : `--${option}`);
      }
    }
  });

  test("is one that the shell can read", async () => {
    using dir = tempDir();
    for (const shell of ["bash", "zsh", "fish"].filter((one) => Bun.which(one))) {
      const script = join(dir.path, shell);
      writeFileSync(script, (await print(shell)).stdout);
      expect(Bun.spawnSync([shell, "-n", script]).stderr.toString()).toBe("");
    }
  });

  test.each([[[]], [["tcsh"]], [["bash", "zsh"]]])("or none: %p", async (words) => {
    expect(await print(...words)).toEqual({
      status: 2,
      stdout: "",
      stderr: expect.stringContaining("bash, zsh, fish"),
    });
  });
});
