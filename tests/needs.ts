/**
 * What tests, demo and bench need besides Bun: the one list of Debian packages, which of them this
 * machine lacks, and how to install them.
 *
 * As a program, `bun tests/needs.ts` installs all that is missing and fails where it cannot. It
 * also fetches the container runtime of Debian's next release, beside that of this one. Not every
 * mirror has it, so that fails nothing: the reason is noted, and the tests that need it are left
 * out for this reason alone.
 * Imports nothing of ours, so that it runs before `bun install`.
 */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";

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
  fish: programs("fish"),
  iproute2: programs("ip", "tc"),
  iptables: programs("iptables", "iptables-save", "ip6tables-save"),
  "iputils-ping": programs("ping"),
  jq: programs("jq"),
  "kubernetes-client": programs("kubectl"),
  libfaketime: () => findFaketime() !== undefined,
  nftables: programs("nft"),
  podman: programs("podman"),
  procps: programs("sysctl"),
  prometheus: programs("promtool"),
  "python3-prometheus-client": () =>
    existsSync("/usr/bin/python3") &&
    existsSync("/usr/lib/python3/dist-packages/prometheus_client/openmetrics/parser.py"),
  strace: programs("strace"),
  systemd: programs("systemctl", "systemd-analyze"),
  "util-linux": programs("mount", "umount", "nsenter", "unshare"),
  zsh: programs("zsh"),
} satisfies Record<string, () => boolean>;

/** A Debian package that some test needs. */
export type Package = keyof typeof packages;

/** What a test may need: a package, the compiled program, or something of the machine. */
export type Need =
  | Package
  | "containerd of Debian's next release"
  | "the binary"
  | "root"
  | "network namespaces"
  | "mounts";

/** Where packages of Debian's next release are unpacked, not installed. */
export const nextDir = "/var/cache/genie-tests/next";
const nextPackages = ["containerd", "containernetworking-plugins"];
/** Says why they could not be had when they were tried last. */
const failureOf = (dir: string) => `${dir}.failure`;
/** How the reason begins of tests that are left out although everything was tried. */
export const excusePrefix = "cannot be had: ";

/** Why what is of the next release cannot be tested; undefined where it can. */
export function whyNoNext(dir = nextDir): string | undefined {
  if (existsSync(dir)) return undefined;
  if (!existsSync(failureOf(dir))) return "not fetched: bun tests/needs.ts does that, as root";
  return `${excusePrefix}${readFileSync(failureOf(dir), "utf8")}`;
}

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
  const isOfNext = (need: Need) => need === "containerd of Debian's next release";
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
  return needs.some(isOfNext) ? whyNoNext() : undefined;
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

/** Runs a program for at most 15 minutes. @throws Error with the last of what it said */
function call(...words: string[]): string {
  const { exitCode, stdout, stderr } = Bun.spawnSync(words, {
    env: { ...process.env, DEBIAN_FRONTEND: "noninteractive" },
    stdio: ["ignore", "pipe", "pipe"],
    timeout: 900_000,
  });
  if (exitCode === 0) return stdout.toString();
  const said = stderr.toString().trim().split("\n");
  // The first complaint of apt is the cause, the last one says that there was one.
  const worst = said.find((line) => /^[EW]: /.test(line)) ?? said.at(-1);
  throw new Error(`${words[0]}: ${worst || `exit status ${exitCode}`}`);
}

/**
 * Fetches and unpacks what is of the next release, unless it is there, and notes why that failed.
 * Neither apt's sources nor its state nor what is installed changes.
 *
 * @param again also where it failed before
 */
export function fetchNext(
  say: (line: string) => void,
  { again = true, target = nextDir, mirror = findMirror } = {},
): void {
  const isTried = existsSync(failureOf(target)) && !again;
  if (existsSync(target) || isTried || process.getuid?.() !== 0 || !Bun.which("apt-get")) return;
  say(`Fetching ${nextPackages.join(", ")} of Debian's next release into ${target}\n`);
  mkdirSync(dirname(target), { recursive: true });
  const dir = mkdtempSync(`${target}.`);
  try {
    unpackNext(dir, mirror());
    rmSync(failureOf(target), { force: true });
    renameSync(join(dir, "root"), target);
  } catch (error) {
    const why = error instanceof Error ? error.message : String(error);
    // Somebody else may have been first.
    if (!existsSync(target)) writeFileSync(failureOf(target), why);
    say(`What needs it will not be tested: ${why}\n`);
  } finally {
    rmSync(dir, { recursive: true });
  }
}

/** The mirror of this machine, whatever form its sources have. @throws Error where none is named */
function findMirror(): string {
  const format = ["--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"];
  const read = () => call("apt-get", "indextargets", ...format).split("\n")[0];
  const known = read();
  if (known) return known;
  call("apt-get", "update", "-qq");
  const found = read();
  if (found) return found;
  throw new Error("apt-get: its sources name no mirror of Debian");
}

/** @throws Error for a mirror that does not have them, and for programs that do not run here */
function unpackNext(dir: string, mirror: string): void {
  const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
  const signed = existsSync(keyring) ? `Signed-By: ${keyring}\n` : "";
  const source = join(dir, "next.sources");
  const site = `URIs: ${mirror}\nSuites: sid\nComponents: main\n${signed}`;
  writeFileSync(source, `Types: deb\n${site}`);
  const [lists, cache, debs] = ["lists", "cache", "debs"].map((name) => join(dir, name));
  for (const folder of [`${lists}/partial`, `${cache}/archives/partial`, debs]) {
    mkdirSync(String(folder), { recursive: true });
  }
  const own = {
    ...{ "Dir::Etc::sourcelist": source, "Dir::Etc::sourceparts": "/dev/null" },
    ...{ "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": "/dev/null" },
    ...{ "Dir::State::lists": lists, "Dir::Cache": cache, "APT::Sandbox::User": "root" },
    ...{
      "Acquire::Retries": "1",
      "Acquire::http::Timeout": "20",
      "APT::Update::Error-Mode": "any",
    },
  };
  const options = Object.entries(own).flatMap(([name, value]) => ["-o", `${name}=${value}`]);
  call("apt-get", "update", "-qq", ...options);
  // It downloads into the folder it is in.
  const download = 'cd "$1" && shift && exec apt-get download -qq "$@"';
  call("sh", "-c", download, "apt-get", String(debs), ...options, ...nextPackages);
  for (const name of readdirSync(String(debs))) {
    call("dpkg", "-x", join(String(debs), name), join(dir, "root"));
  }
  // They are built for a later C library than ours may be.
  for (const name of ["containerd", "ctr"]) call(join(dir, "root/usr/bin", name), "--version");
  call(join(dir, "root/usr/bin/containerd-shim-runc-v2"), "-v");
}

if (import.meta.main) {
  const say = (line: string) => process.stderr.write(line);
  const failure = install(missingPackages(), say);
  if (failure !== undefined) {
    process.stderr.write(`${failure}\n`);
    process.exit(1);
  }
  fetchNext(say);
}
