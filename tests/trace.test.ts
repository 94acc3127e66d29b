/** The trace of `lib/streams.ts`, in itself and through the compiled program. */
import { describe, expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { formatTrace, mark, startTrace } from "../lib/streams.ts";
import { fakePlugin, genieProgram, runGenie, tempDir } from "./fakes.ts";

describe("formatTrace()", () => {
  test("tells nothing before a start, then adds up the stages of one name", () => {
    mark("early");
    expect(formatTrace()).toBeUndefined();
    startTrace(Bun.nanoseconds() - 5_000_000);
    for (const stage of ["a", "b", "a"]) mark(stage);
    const { genieTraceUs } = JSON.parse(formatTrace() ?? "");
    expect(Object.keys(genieTraceUs)).toEqual(["a", "b"]);
    expect(genieTraceUs.a).toBeGreaterThanOrEqual(5000);
  });
});

describe("GENIE_TRACE", () => {
  const env = { CNI_COMMAND: "VERSION" };
  test.each<[string, Record<string, string>, RegExp]>([
    [
      "1 prints one line on stderr",
      { GENIE_TRACE: "1" },
      /^\{"genieTraceUs":\{"answer":\d+\}\}\n$/,
    ],
    ["0 prints nothing", { GENIE_TRACE: "0" }, /^$/],
    ["absent prints nothing", {}, /^$/],
  ])("%s", async (_name, more, stderr) => {
    const run = await runGenie(genieProgram(), { ...env, ...more }, "");
    expect({ ...run, stdout: "" }).toMatchObject({
      status: 0,
      stderr: expect.stringMatching(stderr),
    });
    expect(JSON.parse(run.stdout).cniVersion).toBe("1.1.0");
  });

  test("1 tells the stages of an ADD, in their order and in one line", async () => {
    using dir = tempDir();
    const at = (name: string) => join(dir.path, name);
    fakePlugin(dir.path, "bridge", `#!/bin/sh\ncat >/dev/null\necho '{"cniVersion":"1.0.0"}'\n`);
    writeFileSync(at("netns"), "");
    writeFileSync(
      at("plugins.toml"),
      `conf_dir = "${dir.path}"\nbin_dirs = []\nstate_dir = "${at("state")}"\n` +
        `[plugins.a.config]\ncniVersion = "1.0.0"\nplugins = [{ type = "bridge" }]\n`,
    );
    const config = {
      ...{ cniVersion: "1.0.0", name: "genie", type: "genie", plugins_file: at("plugins.toml") },
      runtimeConfig: { "io.kubernetes.cri.pod-annotations": { cni: "a" } },
    };
    const { status, stderr, stdout } = await runGenie(
      genieProgram(),
      {
        ...{ CNI_COMMAND: "ADD", CNI_CONTAINERID: "c1", CNI_IFNAME: "eth0", CNI_PATH: dir.path },
        ...{ CNI_NETNS: at("netns"), GENIE_TRACE: "1" },
      },
      JSON.stringify(config),
    );
    expect({ stdout: JSON.parse(stdout), lines: stderr.split("\n").length }).toMatchObject({
      ...{ stdout: { cniVersion: "1.0.0" }, lines: 2 },
    });
    const { genieTraceUs: stages } = JSON.parse(stderr);
    const main = ["request", "config", "open", "plan", "attach", "commit", "answer"];
    expect(Object.keys(stages).filter((name) => main.includes(name))).toEqual(main);
    expect(Object.values(stages).every((us) => Number.isInteger(us) && Number(us) >= 0)).toBe(true);
    expect(status).toBe(0);
  });
});
