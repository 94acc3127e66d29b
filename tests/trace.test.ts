/** `lib/trace.ts`, in itself and through the compiled program. */
import { describe, expect, test } from "bun:test";
import { formatTrace, mark, startTrace } from "../lib/trace.ts";
import { genieProgram, runGenie } from "./fakes.ts";

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
});
