/**
 * What tests, demo and bench need besides Bun: the one list of Debian packages, which of them this
 * machine lacks, and how to install them.
 *
 * As a program, `bun tests/needs.ts` installs all that is missing and fails where it cannot.
 * Imports nothing of ours, so that it runs before `bun install`.
 */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";

/** Folder of the reference plugins, or undefined where they are not installed. */
export function findPluginDir(): string | undefined {
  return ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"].find((dir) =>
    ["bridge", "ptp", "host-local", "portmap"].every((name) => existsSync(join(dir, name))),
  );
}

/** Path of libfaketime, or undefined where it is not installed. */
export function findFaketime(): string | undefined {
  if (!existsSync("/usr/lib")) return undefined;
  return readdirSync("/usr/lib")
    .map((name) => `/usr/lib/${name}/faketime/libfaketime.so.1`)
    .find((path) => existsSync(path));
}

const programs =
  (...names: string[]) =>
  () =>
    names.every((name) => Bun.which(name) !== null);

/** Debian's packages, and whether this machine has what the tests use of each. */
const packages = {
  "busybox-static": () => existsSync("/bin/busybox"),
  chromium: programs("chromium"),
  containerd: () =>
    programs("containerd", "ctr", "runc")() && existsSync("/etc/containerd/config.toml"),
  "containernetworking-plugins": () => findPluginDir() !== undefined,
  curl: programs("curl"),
  iproute2: programs("ip", "tc"),
  iptables: programs("iptables", "iptables-save", "ip6tables-save"),
  "iputils-ping": programs("ping"),
  jq: programs("jq"),
  "kubernetes-client": programs("kubectl"),
  libfaketime: () => findFaketime() !== undefined,
  nftables: programs("nft"),
  podman: programs("podman"),
  procps: programs("sysctl"),
  strace: programs("strace"),
  "util-linux": programs("mount", "umount", "nsenter", "unshare"),
} satisfies Record<string, () => boolean>;

/** A Debian package that some test needs. */
export type Package = keyof typeof packages;

/** What a test may need: a package, the compiled program, or something of the machine. */
export type Need = Package | "the binary" | "root" | "network namespaces" | "mounts";

/** All packages of the list. */
export const allPackages = Object.keys(packages) as Package[];

/** Those of the packages that this machine lacks. */
export function missingPackages(names: readonly Package[] = allPackages): Package[] {
  return names.filter((name) => !packages[name]());
}

/** How the name of a test begins that only says why others of its file are skipped. */
export const reasonPrefix = "skipped here: ";

/** Is this `bun run test:fast`, which leaves out whatever needs more than Bun? */
export const isFast = process.env["GENIE_TESTS"] === "fast";

/**
 * Why what needs all this cannot run here, as one line; undefined where it can.
 * Network namespaces and mounts are tried, because root in a container may have neither.
 */
export function missing(...needs: Need[]): string | undefined {
  if (needs.length === 0) return undefined;
  if (isFast) return `not in the fast run: needs ${needs.join(", ")}`;
  const names = needs.filter((need): need is Package => need in packages);
  const isRoot = process.getuid?.() === 0;
  const needsRoot = needs.some((need) => need !== "the binary" && !(need in packages));
  if (needsRoot && !isRoot) return "must run as root";
  const netns = needs.includes("network namespaces");
  const mounts = needs.includes("mounts");
  const lacking = missingPackages([
    ...(netns ? (["iproute2"] as const) : []),
    ...(mounts ? (["util-linux"] as const) : []),
    ...names,
  ]);
  if (lacking.length > 0) return `not installed: ${[...new Set(lacking)].join(", ")}`;
  if (netns && !canMakeNetns()) return "network namespaces cannot be made here";
  if (mounts && !canMount()) return "nothing can be mounted here";
  return undefined;
}

const tried: { netns?: boolean; mount?: boolean } = {};

function canMakeNetns(): boolean {
  const name = `genie-probe-${crypto.randomUUID().slice(0, 8)}`;
  tried.netns ??= succeeds("ip", "netns", "add", name) && succeeds("ip", "netns", "del", name);
  return tried.netns;
}

/** Can root mount something in a mount namespace of its own? */
export function canMount(): boolean {
  if (process.getuid?.() !== 0 || missingPackages(["util-linux"]).length > 0) return false;
  tried.mount ??= succeeds("unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt");
  return tried.mount;
}

function succeeds(...command: string[]): boolean {
  return Bun.spawnSync(command).exitCode === 0;
}

/**
 * Installs Debian packages. @returns why that failed, or undefined
 *
 * @param say gets a line for people before it takes long
 */
export function install(names: readonly Package[], say: (line: string) => void) {
  if (names.length === 0) return undefined;
  if (process.getuid?.() !== 0) return "must run as root";
  if (Bun.which("apt-get") === null) return `not installed: ${names.join(", ")}`;
  say(`Installing with apt-get: ${names.join(", ")}\n`);
  const flags = ["install", "-y", "-qq", "--no-install-recommends"];
  for (const words of [
    ["update", "-qq"],
    [...flags, ...names],
  ]) {
    const { exitCode, stderr } = Bun.spawnSync(["apt-get", ...words], {
      env: { ...process.env, DEBIAN_FRONTEND: "noninteractive" },
      stdio: ["ignore", "ignore", "pipe"],
      timeout: 900_000,
    });
    const reason = stderr.toString().trim().split("\n").at(-1);
    if (exitCode !== 0 && words[0] === "install") {
      return `cannot install ${names.join(", ")}: ${reason}`;
    }
  }
  const still = missingPackages(names);
  return still.length > 0 ? `installed, yet not found: ${still.join(", ")}` : undefined;
}

if (import.meta.main) {
  const failure = install(missingPackages(), (line) => process.stderr.write(line));
  if (failure !== undefined) {
    process.stderr.write(`${failure}\n`);
    process.exit(1);
  }
}
