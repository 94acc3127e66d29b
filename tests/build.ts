/**
 * Builds the standalone binary: `bun run build [--target=bun-linux-arm64] [--outfile=FILE]`,
 * `dist/genie` unless told otherwise. Bun for another target comes from the npm registry.
 *
 * The two `--no-compile-autoload-*` flags matter: the binary runs as root in whatever folder the
 * runtime happens to be in, and must read nothing from it.
 *
 * Built twice: the first binary serves one pod of a throw-away node and notes which functions ran,
 * the second has their bytecode side by side. A call of genie is over in milliseconds, and this
 * saves one in eight of them.
 */
import {
  chmodSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { copyFile } from "../lib/node/files.ts";

const root = dirname(import.meta.dir);
/** How genie is compiled. */
export const flags = [
  "--compile",
  "--minify",
  "--bytecode",
  "--splitting",
  "--format=esm",
  "--no-compile-autoload-dotenv",
  "--no-compile-autoload-bunfig",
  // Bun asks for the path of its folder, and ends where a runtime's folder was deleted. It goes to
  // the folder that is named here instead, which is the one it is in.
  "--compile-exec-argv=--cwd=/proc/self/cwd",
  // A call is over before compiled code would pay: 2-3 ms less CPU, 3-4 MiB less memory.
  "--compile-jit-policy=10",
];

/** Path of the binary. */
export const binary = join(root, "dist", "genie");

/**
 * Builds the binary where there is none, or a source is newer: tests that run side by side share
 * one, and nobody replaces it meanwhile.
 *
 * @returns its path
 * @throws Error with what `bun build` said
 */
export function buildIfStale(): string {
  const builtMs = statSync(binary, { throwIfNoEntry: false })?.mtimeMs ?? 0;
  const folder = join(root, "lib");
  const modules = readdirSync(folder, { recursive: true, encoding: "utf8" });
  const sources = [
    ...modules.map((name) => join(folder, name)),
    ...["genie.ts", "bun.lock", "tests/build.ts"].map((name) => join(root, name)),
  ];
  if (sources.some((path) => statSync(path).mtimeMs > builtMs)) buildTwice([]);
  return binary;
}

if (import.meta.main) buildTwice(process.argv.slice(2));

function buildTwice(words: string[]): void {
  const outfile = words.find((word) => word.startsWith("--outfile="));
  const more = words.filter((word) => word !== outfile);
  // The compiler writes its file piecemeal; a copy in large pieces starts sooner.
  const target = outfile === undefined ? binary : resolve(outfile.slice("--outfile=".length));
  const node = mkdtempSync(join(tmpdir(), "genie-build-"));
  try {
    const first = join(node, "genie");
    // For this machine whatever the target: the notes name functions, not machine code.
    build([`--outfile=${first}`]);
    const orders = practise(first, node);
    const second = join(node, "second");
    build([`--bytecode-order=${orders.join(",")}`, ...more, `--outfile=${second}`]);
    const fresh = `${target}.new`;
    rmSync(fresh, { force: true });
    mkdirSync(dirname(target), { recursive: true });
    copyFile(second, fresh);
    chmodSync(fresh, 0o755);
    renameSync(fresh, target);
  } finally {
    rmSync(node, { recursive: true, force: true });
  }
}

function build(more: string[]): void {
  const { exitCode, stderr } = Bun.spawnSync(
    [process.execPath, "build", ...flags, ...more, "genie.ts"],
    { cwd: root, stdio: ["ignore", "ignore", "pipe"] },
  );
  if (exitCode !== 0) throw new Error(`bun build failed with ${exitCode}: ${stderr.toString()}`);
}

/** Runs the operations of one pod and returns the files in which the binary noted what it ran. */
function practise(binary: string, dir: string): string[] {
  const plugin = join(dir, "practice");
  const result = {
    cniVersion: "1.0.0",
    interfaces: [{ name: "eth0", mac: "0a:00:00:00:00:01", sandbox: dir }],
    ips: [{ address: "192.0.2.2/24", gateway: "192.0.2.1", interface: 0 }],
  };
  writeFileSync(plugin, `#!/bin/sh\ncat >/dev/null\necho '${JSON.stringify(result)}'\n`);
  chmodSync(plugin, 0o755);
  const table = join(dir, "plugins.toml");
  writeFileSync(
    table,
    `conf_dir = "${dir}"\nbin_dirs = ["${dir}"]\nstate_dir = "${join(dir, "state")}"\n` +
      `[default]\nnetworks = ["a"]\n` +
      ["a", "b"].map((name) => practiceNetwork(name, dir)).join(""),
  );
  const stdin = JSON.stringify({
    cniVersion: "1.1.0",
    name: "genie",
    type: "genie",
    plugins_file: table,
    runtimeConfig: { "io.kubernetes.cri.pod-annotations": { cni: "a" } },
  });
  const choice = stdin.replace('"cni":"a"', '"cni":""');
  // The table is kept parsed after the first ADD, so the second is what most pods meet.
  const commands = ["ADD", "DEL", "ADD", "CHECK", "DEL", "STATUS", "VERSION", "ADD"];
  commands.forEach((command, i) => {
    Bun.spawnSync([binary], {
      cwd: "/",
      env: {
        BUN_BYTECODE_ORDER_OUT: join(dir, `order-${i}`),
        CNI_COMMAND: command,
        CNI_CONTAINERID: `practice-${i < 2 ? 1 : 2}`,
        CNI_NETNS: dir,
        CNI_IFNAME: "eth0",
        CNI_PATH: dir,
        CNI_ARGS: "IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=b",
      },
      stdin: Buffer.from(i === commands.length - 1 ? choice : stdin),
    });
  });
  // Most important first: ADD, then DEL; then an ADD of our own choice.
  const notes = [2, 4, 7, 3, 5, 6, 0, 1].map((i) => join(dir, `order-${i}`));
  const missing = notes.find((path) => !existsSync(path));
  if (missing) throw new Error(`the practice run left no notes: ${missing} is missing`);
  return notes;
}

function practiceNetwork(name: string, dir: string): string {
  const ipam = `{ type = "host-local", dataDir = "${dir}", subnet = "192.0.2.0/24" }`;
  return (
    `[plugins.${name}.config]\ncniVersion = "1.0.0"\n` +
    `plugins = [{ type = "practice", ipam = ${ipam} }]\n`
  );
}
