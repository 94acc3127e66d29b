/** `bun run demo`: what a newcomer sees, its exit status, and that nothing of it stays. */
import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { demoNeeds } from "./demo/real.ts";
import { formatCommand, formatJson } from "./demo/screen.ts";
import { tempDir } from "./fakes.ts";
import { lacks } from "./skip.ts";
import { sealed } from "./wire.ts";

const program = join(import.meta.dir, "demo", "demo.ts");

interface DemoRun {
  status: number;
  lines: string[];
  stderr: string;
}

/**
 * Runs the demo to its end.
 * @param tmp the folder in which it makes its own
 * @param interruptAt text upon which it gets a SIGINT
 * @param enter what runs it
 */
async function demo(
  tmp: string,
  args: string[],
  { interruptAt, enter = [] }: { interruptAt?: string; enter?: readonly string[] } = {},
): Promise<DemoRun> {
  const child = Bun.spawn([...enter, process.execPath, program, ...args], {
    env: { ...process.env, TMPDIR: tmp },
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  const stderr = child.stderr.text();
  let text = "";
  const decoder = new TextDecoder();
  for await (const chunk of child.stdout) {
    text += decoder.decode(chunk, { stream: true });
    if (interruptAt !== undefined && text.includes(interruptAt)) child.kill("SIGINT");
  }
  await child.exited;
  return { status: child.exitCode ?? -1, lines: text.split("\n"), stderr: await stderr };
}

/** The headlines, without their rules. */
function headlines(lines: string[]): string[] {
  return lines.filter((line) => line.startsWith("── ")).map((line) => line.replace(/[ ─]+$/, ""));
}

/** How many lines say whether something holds. */
function countChecks(lines: string[]): number {
  return lines.filter((line) => /^(ok {4}|FAILED) {2}/.test(line)).length;
}

const steps = [
  "── 1. Build the binary",
  "── 2. A node that offers two networks",
  "── 3. The plan: what a pod would get, and why",
  '── 4. ADD: the runtime starts pod web, annotated cni: "blue,green@eth5"',
  "── 5. Inside pod web",
  "── 6. A second pod, db, and a ping",
  "── 7. CHECK: is everything as ADD left it?",
  "── 8. DEL: the pods end",
  "── 9. Nothing is left behind",
];
const planRows = [
  "blue     eth0       bridge, portmap  1.0.0  plugins.blue.config   asked for by cni",
  "green    eth5       ptp              1.0.0  plugins.green.config  asked for by cni",
];

/** What this run left in the kernel, by the id in its names: namespaces and the bridge. */
function kernelLeftovers(lines: string[]): string[] {
  const id = /CNI_CONTAINERID=([0-9a-f]+)-web/.exec(lines.join("\n"))?.[1];
  if (id === undefined) throw new Error("The demo did not name its container");
  const veths = lines.flatMap((line) => /"name": "(veth[0-9a-f]{8})"/.exec(line)?.[1] ?? []);
  const namespaces = existsSync("/var/run/netns") ? readdirSync("/var/run/netns") : [];
  return [
    ...namespaces.filter((name) => name.includes(id)),
    ...readdirSync("/sys/class/net").filter((name) => name.includes(id) || veths.includes(name)),
  ];
}

describe("demo with fake plugins", () => {
  test("shows every step, proves that nothing is left, and exits with 0", async () => {
    using tmp = tempDir();
    const { status, lines, stderr } = await demo(tmp.path, ["--fake"]);
    expect(stderr).toBe("");
    expect(lines[0]).toBe("genie demo with FAKE plugins (as --fake asks): no network is made");
    expect(headlines(lines)).toEqual(steps);
    expect(lines).toEqual(expect.arrayContaining(planRows));
    expect(lines).toContain(
      '    { "address": "198.18.0.2/24", "gateway": "198.18.0.1", "interface": 1 },',
    );
    expect(lines).toContain("ok      no attachment and no lock in genie.db");
    expect(lines).toContain("ok      no plugin without its DEL: one for each ADD, in reverse");
    expect(lines.slice(-2)).toEqual([`All ${countChecks(lines)} checks ok`, ""]);
    expect(lines.join("\n")).not.toContain("\x1b");
    expect(readdirSync(tmp.path)).toEqual([]);
    expect(status).toBe(0);
  });

  test("removes everything when it is interrupted", async () => {
    using tmp = tempDir();
    const { status, lines } = await demo(tmp.path, ["--fake"], { interruptAt: "── 6." });
    expect(lines.at(-2)).toBe("Ended by SIGINT: everything the demo made is removed.");
    expect(readdirSync(tmp.path)).toEqual([]);
    expect(status).toBe(130);
  });

  test("says FAILED and exits with 1 where genie cannot do it", async () => {
    using tmp = tempDir();
    // The quote ends the strings of the plugin table.
    const folder = join(tmp.path, 'a"b');
    mkdirSync(folder);
    const { status, lines } = await demo(folder, ["--fake"], { enter: sealed });
    expect(lines).toContain("FAILED  ADD of pod web ended with status 1");
    expect(lines.at(-2)).toMatch(/^2 of \d+ checks FAILED$/);
    expect(readdirSync(folder)).toEqual([]);
    expect(status).toBe(1);
  });

  test("refuses words it does not know", async () => {
    using tmp = tempDir();
    const { status, lines, stderr } = await demo(tmp.path, ["--fast"]);
    expect(stderr).toBe("Usage: bun run demo [--fake]\n");
    expect(lines).toEqual([""]);
    expect(status).toBe(2);
  });
});

describe.skipIf(lacks("the binary", ...demoNeeds))("demo with real plugins", () => {
  test("attaches two pods, pings, and leaves nothing", async () => {
    using tmp = tempDir();
    const { status, lines, stderr } = await demo(tmp.path, []);
    expect(stderr).toBe("");
    expect(lines[0]).toMatch(/^genie demo: two pods on two networks, with the real plugins of \//);
    expect(headlines(lines)).toEqual(steps);
    expect(lines).toEqual(expect.arrayContaining(planRows));
    const text = lines.join("\n");
    expect(text).toMatch(
      /^eth0@if\d+ +UP +198\.18\.\d+\.2\/24\neth5@if\d+ +UP +198\.19\.\d+\.2\/24$/m,
    );
    expect(text).toMatch(/^default via 198\.18\.\d+\.1 dev eth0$/m);
    expect(text).toMatch(/^64 bytes from 198\.18\.\d+\.3: icmp_seq=1 /m);
    expect(lines).toContain("ok      web reaches db over blue");
    expect(lines).toContain("ok      every plugin of pod db says yes");
    expect(lines).toContain("ok      no network namespace of these pods");
    expect(lines.slice(-2)).toEqual([`All ${countChecks(lines)} checks ok`, ""]);
    expect(kernelLeftovers(lines)).toEqual([]);
    expect(readdirSync(tmp.path)).toEqual([]);
    expect(status).toBe(0);
  });

  test("removes everything when it is interrupted", async () => {
    using tmp = tempDir();
    const { status, lines } = await demo(tmp.path, [], { interruptAt: "── 7." });
    expect(lines.at(-2)).toBe("Ended by SIGINT: everything the demo made is removed.");
    expect(kernelLeftovers(lines)).toEqual([]);
    expect(readdirSync(tmp.path)).toEqual([]);
    expect(status).toBe(130);
  });
});

describe("formatCommand()", () => {
  const line = {
    env: { CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAME=web", EMPTY: "" },
    argv: ["printenv", "CNI_ARGS"],
    stdin: "/dev/null",
  };

  test.each([
    [
      "is one line where it fits",
      200,
      ["CNI_ARGS='IgnoreUnknown=1;K8S_POD_NAME=web' EMPTY='' printenv CNI_ARGS < /dev/null"],
    ],
    [
      "keeps variables and program apart where it does not",
      64,
      [
        "CNI_ARGS='IgnoreUnknown=1;K8S_POD_NAME=web' EMPTY='' \\",
        "    printenv CNI_ARGS < /dev/null",
      ],
    ],
  ])("%s", (_, width, lines) => {
    expect(formatCommand(line, width)).toEqual(lines);
  });

  test.each([20, 40, 200])("is what a shell understands at %d columns", (width) => {
    const words = ["it's", "a b", "$HOME", "--flag", "value", "`x`", "a;b"];
    const text = formatCommand({ argv: ["printf", "%s\\n", ...words] }, width).join("\n");
    const { stdout } = Bun.spawnSync(["sh", "-c", text]);
    expect(stdout.toString().split("\n")).toEqual([...words, ""]);
  });
});

describe("formatJson()", () => {
  test("breaks only what is too long", () => {
    const value = { name: "gen", list: [{ a: 1, b: "x y" }, { c: [true, null] }], none: {} };
    expect(formatJson(value, 200)).toBe(
      '{ "name": "gen", "list": [ { "a": 1, "b": "x y" }, { "c": [ true, null ] } ], "none": {} }',
    );
    expect(formatJson(value, 30)).toBe(`{
  "name": "gen",
  "list": [
    { "a": 1, "b": "x y" },
    { "c": [ true, null ] }
  ],
  "none": {}
}`);
    expect(JSON.parse(formatJson(value, 1))).toEqual(value);
  });
});
