/** `genie completion`, lib/cli/command_line.ts: what real shells make of it. */
import { describe, expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
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
  ["genie report --output ", ["json", "yaml", "wide"], []],
  ["genie manifest --features ", ["policy", "switch"], []],
  ["genie pods team-a/", ["team-a/web", "team-a/api"], ["team-b/db"]],
  ["genie repair ", ["team-a/web", "team-b/db"], ["team-a"]],
  ["genie pods --namespace ", ["team-a", "team-b"], ["team-a/web"]],
  ["genie report --network ", ["blue", "green"], ["team-a"]],
  ["genie switch team-a/web --to g", ["green"], ["blue"]],
  ["genie try bl", ["blue"], ["green"]],
  ["genie plan --annotation ", ["cni=", "k8s.v1.cni.cncf.io/networks="], []],
];

/** A program in place of genie: it answers what the scripts ask the program itself. */
const answers = `#!/bin/sh
[ "$1 $2" = "completion --values" ] || exit 2
case $3 in
  pods) printf 'team-a/api\\nteam-a/web\\nteam-b/db\\n' ;;
  namespaces) printf 'team-a\\nteam-b\\n' ;;
  networks) printf 'blue\\ngreen\\n' ;;
  annotations) printf 'cni=\\nk8s.v1.cni.cncf.io/networks=\\n' ;;
esac
`;

/** Types a line and two tabs into a zsh, and lists what it offers. */
const typing = `
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; LISTMAX=0; setopt no_beep; autoload -U compinit; compinit -u -d $HOME/dump"
zpty -w z "zstyle ':completion:*' list-separator '' ; zstyle ':completion:*' menu no"
zpty -w z ". $1; bindkey '^X' list-choices; print READY"
while zpty -r z line && [[ $line != *READY$'\\r'* ]]; do :; done
zpty -w -n z "$2"$'\\x18'
# Keys that come while it begins to edit would be lost.
sleep 1
zpty -w -n z $'\\x15'
zpty -w z "print DONE"
while zpty -r z line; do print -r -- "$line"; [[ $line == *DONE$'\\r'* ]] && break; done
`;

/** What a shell offers for a line whose end is the cursor, by its own means. */
const offers: Record<string, (script: string, line: string) => string[]> = {
  zsh: (script, line) =>
    lines(["zsh", "-f", "-c", typing, "zsh", script, line])
      // biome-ignore lint/suspicious/noControlCharactersInRegex: a terminal's own
      .flatMap((one) => one.replace(/\u001b\[[0-9;?]*[a-zA-Z]/g, " ").split(/[\s*]+/))
      // It lists paths without their folder.
      .map((one) => (one === "hosts" ? "/etc/hosts" : one)),
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
  using home = tempDir(); // fish and zsh write there
  mkdirSync(join(home.path, "bin"));
  writeFileSync(join(home.path, "bin", "genie"), answers, { mode: 0o755 });
  const PATH = `${home.path}/bin:/usr/sbin:/usr/bin:/sbin:/bin`;
  const env = { PATH, HOME: home.path, LANG: "C.UTF-8", TERM: "xterm" };
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
