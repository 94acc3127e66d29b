/**
 * `genie install`: puts genie on a node, its CNI config last, and that only once the pods' default
 * network is ready (NPWG v1.3 §6.1). What is there already is left alone; each file is whole at any
 * moment, so that pods may start meanwhile.
 */
import { dirname, isAbsolute, join } from "node:path";
import manifest from "../../package.json";
import defaultTable from "../../plugins.toml" with { type: "text" };
import { type Flags, text, UsageError } from "../cli/usage.ts";
import { CniError, code, type Host } from "../cni.ts";
import { parseConfig } from "../config/parse.ts";
import { parseDuration } from "../config/quantity.ts";
import type { Config } from "../config/schema.ts";
import { run } from "../exec.ts";
import { isObject, parseJson } from "../json.ts";
import { kubeAccess } from "./credentials_file.ts";
import { digest, digestOf, keepAs, makeFolder, readIfThere } from "./files.ts";
import { before, callsGenie, ownListText } from "./genie_list.ts";
import { hostFile, hostPath } from "./host_root.ts";
import {
  conflistName,
  noted,
  openSite,
  paths,
  put,
  type Site,
  type Step,
  writeNote,
} from "./installation.ts";
import { readConfs, whyNotReady } from "./node_ready.ts";
import { cniFolders } from "./runtime_settings.ts";

/** How long the default network is waited for, unless told otherwise. */
export const waitDefault = "2m";
const pollMs = 500;

/** The options of the command, checked. */
interface Options {
  root: string;
  confDir: string;
  /** Where genie goes, and then where else plugins are. */
  binDirs: [string, ...string[]];
  table: string | undefined;
  kubeconfig: string | undefined;
  waitMs: number;
  mayDowngrade: boolean;
}

/**
 * Runs `genie install`.
 * @param program path of this program's own file
 * @returns exit status
 * @throws CniError 5 for what cannot be read or written, 7 for a table, credentials or a conf dir
 *   that do not serve, 50 when the default network is not ready in time
 */
export async function runInstall(host: Host, flags: Flags, program: string): Promise<number> {
  const site = openSite(folder(flags, "host-root") ?? "/");
  const options = readOptions(flags, site);
  const steps: Step[] = [];
  const tell = (step: Step) => {
    steps.push(step);
    if (!flags["json"]) host.stdout(formatStep(step));
  };
  const table = readTable(options);
  checkOrder(site, options);
  await checkVersion(site, options);
  putBinary(site, options, program).forEach(tell);
  makeFolder(hostPath(site.root, dirname(paths.table)), 0o700);
  tell(putTable(site, options, table));
  (await kubeAccess(host, site, options.kubeconfig)).forEach(tell);
  makeFolder(hostPath(site.root, options.confDir), 0o755);
  await waitUntilReady(host, site, options);
  tell(putConflist(site, options));
  if (site.note.genie !== manifest.version) {
    site.note.genie = manifest.version;
    writeNote(site);
  }
  const changed = steps.some(({ did }) => ["wrote", "replaced"].includes(did));
  if (flags["json"]) {
    host.stdout(`${JSON.stringify({ version: manifest.version, changed, steps }, null, 2)}\n`);
  } else {
    host.stdout(
      changed
        ? `genie ${manifest.version} is installed\n`
        : `genie ${manifest.version} was installed already: nothing has changed\n`,
    );
  }
  return 0;
}

/** One line of what was done. */
export function formatStep({ did, path, detail }: Step): string {
  return `${did.padEnd(9)}  ${path}${detail === "" ? "" : `: ${detail}`}\n`;
}

function folder(flags: Flags, name: string): string | undefined {
  const path = text(flags, name);
  if (path === undefined || isAbsolute(path)) return path;
  throw new UsageError(`--${name} needs an absolute path, not "${path}"`);
}

function readOptions(flags: Flags, site: Site): Options {
  const usual = cniFolders(site);
  const binDir = folder(flags, "bin-dir");
  const [first = paths.binDir, ...others] = binDir === undefined ? usual.binDirs : [binDir];
  const wait = text(flags, "wait") ?? waitDefault;
  const waitMs = flags["no-wait"] ? -1 : parseDuration(wait);
  if (waitMs === undefined) throw new UsageError(`--wait needs a duration such as 90s: "${wait}"`);
  return {
    root: site.root,
    confDir: folder(flags, "conf-dir") ?? usual.confDir,
    binDirs: [first, ...others],
    table: text(flags, "table"),
    kubeconfig: text(flags, "kubeconfig"),
    waitMs,
    mayDowngrade: flags["downgrade"] === true,
  };
}

/** The table to install, checked: the one named, or the commented default for these folders. */
function readTable({ table, confDir, binDirs }: Options): string {
  if (table === undefined) {
    const dirs = binDirs.map((dir) => JSON.stringify(dir)).join(", ");
    return defaultTable
      .replace(/^conf_dir( *)= "[^"]*"/m, `conf_dir$1= ${JSON.stringify(confDir)}`)
      .replace(/^bin_dirs( *)= \[[^\]]*\]/m, `bin_dirs$1= [${dirs}]`);
  }
  const content = readIfThere(table);
  if (content === undefined) {
    throw new CniError(code.ioFailure, `Cannot read ${table}: it does not exist`);
  }
  parseConfig(content, table);
  return content;
}

/** Refuses where the runtime would go on with another config. @throws CniError 7 */
function checkOrder({ root }: Site, { confDir }: Options): void {
  const [first] = before(readConfs(root, confDir), conflistName);
  if (first === undefined || callsGenie(first)) return;
  const better = `10-${first.name.replace(/^\d+-/, "")}`;
  throw new CniError(
    code.invalidConfig,
    `Cannot install: ${first.name} stands before ${conflistName} in ${confDir}, and runtimes ` +
      `take the first file: rename it to ${better}, its network keeps its name`,
  );
}

/** Refuses to put an older genie over a newer one, whose record it may not understand. */
async function checkVersion(site: Site, { binDirs, mayDowngrade }: Options): Promise<void> {
  if (mayDowngrade) return;
  const there = await installedVersion(site, join(binDirs[0], "genie"));
  if (there === undefined || compareReleases(there, manifest.version) <= 0) return;
  throw new CniError(
    code.invalidConfig,
    `Cannot install: genie ${there} is installed, which is newer than this one ` +
      `(${manifest.version}), and this one may not understand its record: --downgrade does it`,
  );
}

/** Version of the genie on the node: as noted, else as it says itself; undefined where unknown. */
async function installedVersion(site: Site, path: string): Promise<string | undefined> {
  const file = hostPath(site.root, path);
  const found = digestOf(file);
  if (found === undefined) return undefined;
  if (noted(site, "binary")?.written.includes(found)) return site.note.genie || undefined;
  const { stdout } = await run(file, ["version", "--json"], {
    env: {},
    stdin: "",
    timeoutMs: 5000,
  });
  try {
    const said = parseJson(stdout, file);
    const version = isObject(said) ? said["version"] : undefined;
    return typeof version === "string" ? version : undefined;
  } catch (error) {
    // Another program of that name, such as CNI-Genie's.
    if (error instanceof CniError) return undefined;
    throw error;
  }
}

/** Orders two releases `1.2.3`, or `1.2.3-rc.1`, which comes before `1.2.3`. */
export function compareReleases(a: string, b: string): number {
  return Bun.semver.order(a, b);
}

/** Our binary; the one of ours that it replaces stays beside it for a way back. */
function putBinary(site: Site, { binDirs: [binDir] }: Options, program: string): Step[] {
  const path = join(binDir, "genie");
  makeFolder(hostPath(site.root, binDir), 0o755);
  const target = hostFile(site.root, path);
  const found = digestOf(target);
  const content = { file: program, sha256: digest({ file: program }) };
  const steps: Step[] = [];
  const isOurs = found !== undefined && noted(site, "binary")?.written.includes(found);
  if (isOurs && found !== content.sha256) {
    const kept = `${path}.previous`;
    const known = noted(site, "previous");
    if (known) known.written = [...known.written.slice(-1), found];
    else site.note.files.push({ path: kept, kind: "previous", written: [found] });
    writeNote(site);
    keepAs(target, hostFile(site.root, kept));
    steps.push({ did: "kept", path: kept, detail: `genie ${site.note.genie}, the one before` });
  }
  steps.push(put(site, { kind: "binary", path, content, mode: 0o755, others: "replace" }));
  return steps;
}

function putTable(site: Site, options: Options, content: string): Step {
  const others = options.table === undefined ? "keep" : "replace";
  const there = readIfThere(hostFile(site.root, paths.table));
  // The default of a new version is no reason to take away what an operator was given before.
  if (there !== undefined && options.table === undefined) {
    parseConfig(there, paths.table);
    return { did: "unchanged", path: paths.table, detail: "" };
  }
  const table = { path: paths.table, content: { text: content }, mode: 0o644 };
  return put(site, { kind: "table", ...table, others });
}

/** The table as it now is on the node; plugins are found as in a call of the runtime. */
function nodeConfig({ root }: Site, { binDirs }: Options): Config {
  const config = parseConfig(readIfThere(hostFile(root, paths.table)) ?? "", paths.table);
  return { ...config, binDirs: [...new Set([...binDirs, ...config.binDirs])] };
}

/** @throws CniError 50 when the default network is not ready in time */
async function waitUntilReady(host: Host, site: Site, options: Options): Promise<void> {
  const { waitMs, confDir } = options;
  if (waitMs < 0) return;
  const deadlineMs = host.now() + waitMs;
  let said = "";
  for (;;) {
    const reason = await whyNotReady(host, site.root, nodeConfig(site, options));
    if (reason === undefined) return;
    if (host.now() >= deadlineMs) {
      throw new CniError(
        code.unavailable,
        `Cannot write ${join(confDir, conflistName)}: the default network is not ready: ` +
          `${reason}. Install that network and run this again, or use --no-wait`,
      );
    }
    if (reason !== said) host.stderr(`genie: info: waiting for the default network: ${reason}\n`);
    said = reason;
    await Bun.sleep(pollMs);
  }
}

/** The CNI config; not where a config of genie stands that the operator wrote. */
function putConflist(site: Site, { confDir }: Options): Step {
  const path = join(confDir, conflistName);
  const confs = readConfs(site.root, confDir);
  const [first] = before(confs, conflistName);
  if (first) return { did: "skipped", path, detail: `${first.name} calls genie already` };
  const there = confs.find(({ name }) => name === conflistName);
  const others = there && callsGenie(there) ? "keep" : "replace";
  const content = { text: ownListText() };
  return put(site, { kind: "conflist", path, content, mode: 0o644, others });
}
