/**
 * `genie install`: puts genie on a node. Its CNI config comes last, and only once the pods' default
 * network is ready (NPWG v1.3 §6.1). What is in place already is left alone, and each file is whole
 * at any moment, so pods may start meanwhile. `genie uninstall` takes it all off again, the CNI
 * config first, and restores what was there before.
 *
 * Among the files are the credentials for the Kubernetes API: a copy of a kubeconfig, or one made
 * from the service account of the pod that installs. Its token is in a file of its own, because it
 * expires within the hour and the node agent copies it anew.
 * Source: https://kubernetes.io/docs/reference/config-api/kubeconfig.v1/
 */
import { readdirSync, rmdirSync, rmSync } from "node:fs";
import { dirname, isAbsolute, join } from "node:path";
import manifest from "../../package.json";
import defaultTable from "../../plugins.toml" with { type: "text" };
import type { Host } from "../call.ts";
import { fillTemplate, toYaml } from "../cluster/yaml.ts";
import { CniError, code, log } from "../cni.ts";
import { isGenieConfig } from "../config/foreign_config.ts";
import { parseConfig, parseNodeSettings } from "../config/parse.ts";
import type { Config } from "../config/schema.ts";
import { type Flags, parseDuration, text, UsageError } from "../config/usage.ts";
import { isObject, parseJson } from "../json.ts";
import { findAccount, readSecrets } from "../kubernetes/kubeconfig.ts";
import { type Network, resolveNetwork } from "../networks.ts";
import { cacheDir } from "../recovery/cni_cache.ts";
import { orElse } from "../recovery/tried.ts";
import { liveAttachments, readRecord } from "../report/record_reader.ts";
import { isConfigured, serviceAccountDirDefault } from "../settings.ts";
import { askNetworks, neededNetworks } from "../status.ts";
import { adoptRunning, findReturnable, giveBack } from "./adopt.ts";
import * as files from "./files.ts";
import * as conf from "./genie_config.ts";
import {
  conflistName,
  type FileOutcome,
  folderOption,
  type InstalledFile,
  keepTaken,
  type NodeFile,
  noted,
  openSite,
  outcomePrinter,
  ownDir,
  paths,
  put,
  type Site,
  takeOff,
  writeNote,
} from "./installation.ts";
import kubeconfigTemplate from "./kubeconfig.yaml" with { type: "text" };
import { askVersion, configAt, isExecutable, sayDefault, viewNode } from "./node_view.ts";
import { askRuntimes, cniFolders, type RunningRuntime } from "./runtimes.ts";
import { putService, removeService } from "./service.ts";

const pollMs = 500;
/** How long a runtime may take to load the CNI config, and the pause between two looks. */
const loadMs = 5000;
const loadPollMs = 50;

type Options = ReturnType<typeof readOptions>;

/**
 * Runs `genie install`. @returns exit status
 * @param program path of this program's own file
 * @throws CniError 5 for what cannot be read or written, 7 for a table, credentials or a conf dir
 *   that do not serve, 50 when the default network is not ready in time, or containerd does not
 *   load the CNI config
 */
export async function runInstall(host: Host, flags: Flags, program: string): Promise<number> {
  const site = openSite(folderOption(flags, "host-root") ?? "/");
  const options = readOptions(flags, site, await askRuntimes(host, site.root));
  const { steps, print } = outcomePrinter(host, flags);
  makeTable(site, options);
  checkOrder(site, options);
  if (!flags["downgrade"]) await checkVersion(site, options);
  putBinary(site, options, program).forEach(print);
  files.makeFolder(files.hostPath(site.root, dirname(paths.table)), 0o700);
  (await kubeAccess(host, site, text(flags, "kubeconfig"))).forEach(print);
  files.makeFolder(files.hostPath(site.root, options.confDir), 0o755);
  if (options.waitMs > 0) await waitUntilReady(host, site, options);
  print(putTable(site, options));
  putConflist(site, options).forEach(print);
  const notLoaded = await whyStillNotLoaded(host, site, options);
  // Last: from now on all that the runtime attaches is on record.
  (await adoptRunning(host, site, options)).forEach(print);
  const { version } = manifest;
  noteVersion(site, version);
  const isChange = ({ did }: FileOutcome) => ["wrote", "replaced", "adopted"].includes(did);
  const node = { ...options, isNew: steps.some(isChange) };
  if (flags["systemd"]) (await putService(host, site, node)).forEach(print);
  const changed = steps.some(isChange);
  const end = changed ? "is installed" : "was installed already: nothing has changed";
  const pods = await sayDefault(await viewNode(host, site.root, options.confDir));
  host.stdout(
    flags["json"]
      ? `${JSON.stringify({ version, changed, default: pods, steps }, null, 2)}\n`
      : `genie ${version} ${end}; ${pods}\n`,
  );
  const remedy = "Put that right, or restart it, and run this again";
  if (notLoaded !== undefined) throw new CniError(code.unavailable, `${notLoaded}. ${remedy}`);
  return 0;
}

function noteVersion(site: Site, version: string): void {
  if (site.note.genie === version) return;
  site.note.genie = version;
  writeNote(site);
}

function readOptions(flags: Flags, site: Site, running: RunningRuntime[]) {
  const usual = cniFolders(site, running);
  const named = folderOption(flags, "bin-dir");
  const binDirs = named === undefined ? usual.binDirs : [named];
  const wait = text(flags, "wait") ?? "2m";
  const waitMs = flags["no-wait"] ? 0 : parseDuration(wait);
  if (waitMs === undefined) throw new UsageError(`--wait needs a duration such as 90s: "${wait}"`);
  return {
    confDir: folderOption(flags, "conf-dir") ?? usual.confDir,
    /** Where plugins are; genie goes into the first folder. */
    binDirs,
    binary: join(binDirs[0] ?? paths.binDir, "genie"),
    table: text(flags, "table"),
    waitMs,
  };
}

/**
 * The table to install, checked: the one named, or the commented default for these folders, in
 * which pods that ask for nothing keep the network that they had (design D14).
 */
function makeTable({ root }: Site, { table, confDir, binDirs }: Options): string {
  if (table === undefined) {
    const before = conf.networkBefore(root, confDir);
    const networks = `networks = ${JSON.stringify(before === undefined ? [] : [before])}`;
    const dirs = binDirs.map((dir) => JSON.stringify(dir)).join(", ");
    return defaultTable
      .replace(/^conf_dir( *)= "[^"]*"/m, `conf_dir$1= ${JSON.stringify(confDir)}`)
      .replace(/^bin_dirs( *)= \[[^\]]*\]/m, `bin_dirs$1= [${dirs}]`)
      .replace(/^networks = \[\] */m, `${networks.padEnd(35)} `);
  }
  const content = files.readText(table);
  parseConfig(content, table);
  return content;
}

/** Refuses where the runtime would go on with another config. @throws CniError 7 */
function checkOrder({ root }: Site, { confDir }: Options): void {
  const [first] = conf.confsBefore(conf.readConfs(root, confDir), conflistName);
  if (first === undefined || conf.callsGenie(first)) return;
  const better = `10-${first.name.replace(/^\d+-/, "")}`;
  throw refusal(
    `Cannot install: ${first.name} stands before ${conflistName} in ${confDir}, and runtimes ` +
      `take the first file: rename it to ${better}, its network keeps its name`,
  );
}

const refusal = (why: string) => new CniError(code.invalidConfig, why);

/** Refuses to replace a newer genie, whose record this one may not read. @throws CniError 7 */
async function checkVersion(site: Site, { binary }: Options): Promise<void> {
  const file = files.hostPath(site.root, binary);
  const found = files.digestOf(file);
  if (found === undefined) return;
  const isOurs = noted(site, "binary")?.written.includes(found);
  const there = isOurs ? site.note.genie || undefined : await askVersion(file);
  if (there === undefined || Bun.semver.order(there, manifest.version) <= 0) return;
  throw refusal(
    `Cannot install: genie ${there} is installed, which is newer than this one ` +
      `(${manifest.version}), and this one may not understand its record: --downgrade does it`,
  );
}

/** Our binary; the version of ours that it replaces is kept beside it. */
function putBinary(site: Site, { binary: path }: Options, program: string): FileOutcome[] {
  files.makeFolder(files.hostPath(site.root, dirname(path)), 0o755);
  const target = files.hostFile(site.root, path);
  const found = files.digestOf(target);
  const content = { file: program, sha256: files.digest({ file: program }) };
  const file: NodeFile = { kind: "binary", path, content, mode: 0o755 };
  const isOurs = found !== undefined && noted(site, "binary")?.written.includes(found);
  if (!isOurs || found === content.sha256) return [put(site, file)];
  const kept = `${path}.previous`;
  const known = noted(site, "previous");
  if (known) known.written = [...known.written.slice(-1), found];
  else site.note.files.push({ path: kept, kind: "previous", written: [found] });
  writeNote(site);
  files.keepAs(target, files.hostFile(site.root, kept));
  const detail = `genie ${site.note.genie}, the one before`;
  return [{ did: "kept", path: kept, detail }, put(site, file)];
}

function putTable(site: Site, options: Options): FileOutcome {
  const { table } = options;
  const path = paths.table;
  const there = files.readIfThere(files.hostFile(site.root, path));
  // A default, even of a new version, does not replace the table that is in use.
  if (there !== undefined && table === undefined) {
    parseConfig(there, path);
    return { did: "unchanged", path, detail: "" };
  }
  const keepsOthers = table === undefined;
  const content = { text: makeTable(site, options) };
  return put(site, { kind: "table", path, content, keepsOthers });
}

/**
 * The CNI config; skipped where the operator's own config calls genie. That of CNI-Genie is taken
 * over: its keys go into ours, and it is kept until uninstall.
 */
function putConflist(site: Site, { confDir }: Options): FileOutcome[] {
  const path = join(confDir, conflistName);
  const confs = conf.readConfs(site.root, confDir);
  const [first] = conf.confsBefore(confs, conflistName);
  const isGenies = isObject(first?.value) && isGenieConfig(first.value);
  if (first && !isGenies) {
    return [{ did: "skipped", path, detail: `${first.name} calls genie already` }];
  }
  const taken = join(confDir, first?.name ?? "");
  if (first) keepTaken(site, taken);
  const kept = noted(site, "taken")?.replaced;
  const keys = kept === undefined ? undefined : keysOfGenie(site, kept);
  const there = confs.find(({ name }) => name === conflistName);
  const keepsOthers = there !== undefined && conf.callsGenie(there);
  // It may have a token.
  const mode = keys ? 0o600 : 0o644;
  const content = { text: conf.ownListText(keys) };
  const outcome = put(site, { kind: "conflist", path, content, keepsOthers, mode });
  if (!first) return [outcome];
  // Only now: runtimes find a config at any moment.
  files.removeFile(files.hostFile(site.root, taken));
  const detail =
    `CNI-Genie's config is kept as ${kept}, and uninstall puts it back. Its keys ` +
    `(${Object.keys(keys ?? {})}) are in ${conflistName}. What changes: runtimes hand over the ` +
    "annotations, genie writes a record, a pod that cannot get all its networks fails. Delete " +
    "CNI-Genie's DaemonSet: it writes its binary and config anew when it starts";
  return [outcome, { did: "replaced", path: taken, detail }];
}

/** CNI-Genie's keys, without its credentials where genie has its own. */
function keysOfGenie({ root }: Site, kept: string): object {
  const value = parseJson(files.readText(files.hostFile(root, kept)), kept);
  const {
    name: _,
    cniVersion: _v,
    type: _t,
    policy,
    kubernetes,
    ...keys
  } = isObject(value) ? value : {};
  const hasOwn = files.statIfThere(files.hostFile(root, paths.kubeconfig)) !== undefined;
  return hasOwn ? keys : { ...keys, policy, kubernetes };
}

/**
 * Has containerd load the first config of its folder, if it has not: a change there makes it look.
 * @returns why it does not in time; undefined when it has, and where nobody says
 */
async function whyStillNotLoaded(host: Host, { root }: Site, { confDir }: Options) {
  const deadlineMs = host.now() + loadMs;
  for (;;) {
    const confs = conf.readConfs(root, confDir);
    const running = await askRuntimes(host, root);
    const readers = running.filter((one) => one.confDir === confDir);
    const [why] = readers.flatMap((one) => conf.whyNotLoaded(one, confs) ?? []);
    if (why === undefined || host.now() >= deadlineMs) return why;
    const mark = files.hostFile(root, join(confDir, ".reload"));
    files.placeFile(mark, { text: "" }, 0o600);
    files.removeFile(mark);
    await Bun.sleep(loadPollMs);
  }
}

async function waitUntilReady(host: Host, site: Site, options: Options): Promise<void> {
  const { waitMs, confDir, binDirs, table: named } = options;
  const deadlineMs = host.now() + waitMs;
  let printed = "";
  for (;;) {
    const there =
      named === undefined ? files.readIfThere(files.hostFile(site.root, paths.table)) : undefined;
    const table = parseConfig(there ?? makeTable(site, options), paths.table);
    // Plugins are found as in a call of the runtime.
    const config = { ...table, binDirs: [...new Set([...binDirs, ...table.binDirs])] };
    const reason = await whyNotReady(host, site.root, config);
    if (reason === undefined) return;
    if (host.now() >= deadlineMs) {
      const what = `Cannot write ${join(confDir, conflistName)}: the default network is not ready`;
      const remedy = "Install that network and run this again, or use --no-wait";
      throw new CniError(code.unavailable, `${what}: ${reason}. ${remedy}`);
    }
    const line = `genie: info: waiting for the default network: ${reason}\n`;
    if (line !== printed) host.stderr(line);
    printed = line;
    await Bun.sleep(pollMs);
  }
}

/**
 * Why a pod that asks for nothing could not be attached; undefined when it could. On the node
 * itself the plugins are asked as by STATUS; in a container, where they cannot run, they need only
 * exist.
 */
async function whyNotReady(host: Host, root: string, config: Config): Promise<string | undefined> {
  try {
    const here = configAt(root, config);
    if (root === "/") await askNetworks(host, here, { dirs: here.binDirs, ownType: "genie" });
    else await checkPresence(root, config, here);
    return undefined;
  } catch (error) {
    if (error instanceof CniError) return error.message;
    throw error;
  }
}

/** @throws CniError of the first network that a pod needs and that is not there with its plugins */
async function checkPresence(root: string, config: Config, here: Config): Promise<void> {
  const search = { dirs: here.binDirs, ownType: "genie" };
  const { needed, candidates = [] } = await neededNetworks(here, search);
  const isThere = (type: string) =>
    config.binDirs.some((dir) => isExecutable(files.hostPath(root, join(dir, type))));
  const checkPlugins = ({ name, list }: Network) => {
    const missing = list.plugins.find(({ type }) => !isThere(type));
    if (!missing) return;
    const what = `plugin "${missing.type}" of network "${name}" is in none of ${config.binDirs}`;
    throw new CniError(code.delegateNotFound, what);
  };
  needed.forEach(checkPlugins);
  let first: CniError | undefined;
  for (const name of candidates) {
    try {
      return checkPlugins(resolveNetwork(here, name));
    } catch (error) {
      if (!(error instanceof CniError)) throw error;
      first ??= error;
    }
  }
  if (first) throw first;
}

/**
 * Puts the credentials in place.
 * @param kubeconfig file to copy; undefined: the service account of the pod we run in, if any
 * @throws CniError 5 or 7 for credentials that could not be used on the node
 */
export async function kubeAccess(
  host: Host,
  site: Site,
  kubeconfig: string | undefined,
  folder = serviceAccountDirDefault,
): Promise<FileOutcome[]> {
  if (kubeconfig !== undefined) {
    const text = files.readIfThere(kubeconfig);
    if (text === undefined) throw unusable(kubeconfig, "it does not exist");
    checkPaths(kubeconfig, text);
    // Nothing is sent: that alone is checked whether the file has an account.
    const asked = { kubeconfig, kubeconfigIsExplicit: true, timeoutMs: 0, nodeRoot: site.root };
    const { warning } = findAccount(host, asked);
    if (warning !== undefined) log(host, "warn", warning);
    return [putSecret(site, "kubeconfig", text)];
  }
  const inPod = { kubeconfigIsExplicit: false, timeoutMs: 0, serviceAccountDir: folder };
  if (!isConfigured(host, inPod)) {
    const detail = "no credentials: give --kubeconfig where networks are objects of the API";
    return [{ did: "skipped", path: paths.kubeconfig, detail }];
  }
  const account = findAccount(host, inPod);
  const { tls, headers } = await readSecrets(account);
  const token = headers["Authorization"]?.replace(/^Bearer /, "") ?? "";
  const ca = Buffer.from(tls.ca ?? "").toString("base64");
  const values = { server: account.server, ca, tokenFile: paths.token };
  const text = toYaml(fillTemplate(kubeconfigTemplate, values));
  // The token first: a kubeconfig without it fails every call that needs the API.
  return [putSecret(site, "token", `${token}\n`), putSecret(site, "kubeconfig", text)];
}

function putSecret(site: Site, kind: "kubeconfig" | "token", text: string): FileOutcome {
  files.makeFolder(files.hostPath(site.root, ownDir), 0o700);
  return put(site, { kind, path: paths[kind], content: { text }, mode: 0o600 });
}

const pathKeys = ["certificate-authority", "client-certificate", "client-key", "tokenFile"];

/** Refuses relative paths: they would mean another file once the kubeconfig is copied. */
function checkPaths(file: string, text: string): void {
  const check = (key: string, one: unknown) => {
    if (pathKeys.includes(key) && typeof one === "string" && one !== "" && !isAbsolute(one)) {
      const remedy = "embed it: kubectl config view --flatten";
      throw unusable(file, `its ${key} is a relative path, ${remedy}`);
    }
    return one;
  };
  try {
    JSON.stringify(Bun.YAML.parse(text), check);
  } catch (error) {
    if (error instanceof CniError) throw error;
    // The parser's own message may quote a token.
    throw unusable(file, "it is neither YAML nor JSON");
  }
}

const unusable = (file: string, why: string) =>
  refusal(`Cannot use the kubeconfig ${file}: ${why}`);

/** How many pods a message names; there may be hundreds. */
const namesMax = 3;

/**
 * Runs `genie uninstall`. While pods are attached, which takes `--force`, new pods get the network
 * that follows, and genie stays behind it until the last DEL.
 * @returns exit status: 1 when it is not complete yet, since pods live
 * @throws CniError 7 while pods are attached and there is no `--force`; 5 for what stays
 */
export async function runUninstall(host: Host, flags: Flags): Promise<number> {
  const site = openSite(folderOption(flags, "host-root") ?? "/");
  const { steps, print } = outcomePrinter(host, flags);
  const table = files.readIfThere(files.hostFile(site.root, paths.table)) ?? "";
  const { stateDir } = parseNodeSettings(table);
  const conflist = noted(site, "conflist");
  const record = files.hostPath(site.root, stateDir);
  // CNI-Genie's config comes back in place of ours, and does not know what genie attached.
  const next = noted(site, "taken") ? undefined : conflist && dirname(conflist.path);
  const returned = next === undefined ? [] : await findReturnable(host, site, record, next);
  const before = attachedPods(site, stateDir, returned);
  if (before.length > 0 && !flags["force"]) {
    throw refusal(
      `Cannot uninstall: ${before.length} pods are attached through genie (${firstOf(before)}): ` +
        "drain the node, run genie gc for what is leaked, or use --force, which keeps their DEL",
    );
  }
  if (conflist) print(before.length === 0 ? takeOff(site, conflist) : retire(site, conflist));
  // After that: whoever looks at libcni's cache now does not take them for new ones.
  (await giveBack(host, site, record, returned)).forEach(print);
  // A pod may have started before the CNI config was gone.
  const pods = before.length > 0 ? before : attachedPods(site, stateDir);
  const done = pods.length === 0;
  if (conflist && !done && before.length === 0) print(retire(site, conflist));
  if (done) (await removeService(host, site)).forEach(print);
  const kinds: InstalledFile["kind"][] = ["kubeconfig", "token"];
  if (done) kinds.push("previous", "binary", "taken", "table");
  for (const kind of kinds) {
    const noted = site.note.files.filter((file) => file.kind === kind);
    for (const file of noted) print(takeOff(site, file));
  }
  if (done) removeRest(site, stateDir, flags["purge"] === true).forEach(print);
  const answer = { done, waitsFor: pods, steps };
  if (flags["json"]) host.stdout(`${JSON.stringify(answer, null, 2)}\n`);
  else if (done) host.stdout("genie is uninstalled\n");
  else {
    host.stdout(`New pods no longer get genie. Its binary and record stay until the last of
${pods.length} pods is gone (${firstOf(pods)}): the DEL of each still works.
Then run genie uninstall again.
`);
  }
  return done ? 0 : 1;
}

function firstOf(names: string[]): string {
  const more = names.length > namesMax ? ", ..." : "";
  return names.slice(0, namesMax).join(", ") + more;
}

function attachedPods(
  { root }: Site,
  stateDir: string,
  but: readonly { containerId: string }[] = [],
): string[] {
  const isIn = (id: string) => but.some(({ containerId }) => containerId === id);
  const names = readRecord(files.hostPath(root, stateDir), (record) =>
    [...liveAttachments(record, {})]
      .filter(({ containerId }) => !isIn(containerId))
      .map(({ namespace, pod, containerId }) => (pod === "" ? containerId : `${namespace}/${pod}`)),
  );
  return [...new Set(names)];
}

/** Replaces our config by the network that follows, with genie behind it to answer DEL. */
function retire(site: Site, { path, replaced }: InstalledFile): FileOutcome {
  const kept = replaced && files.readIfThere(files.hostFile(site.root, replaced));
  const confs = conf.readConfs(site.root, dirname(path));
  const next = confs.find(({ name, value }) => name !== conflistName && value !== undefined);
  const list = conf.lastList(kept === undefined ? next?.value : JSON.parse(kept));
  const content = { text: `${JSON.stringify(list, null, 2)}\n` };
  const outcome = put(site, { kind: "conflist", path, content, keepsOthers: true });
  if (outcome.did !== "replaced" && outcome.did !== "wrote") return outcome;
  return { ...outcome, detail: `new pods get ${next?.name ?? "no network"}, DEL works` };
}

/** What is left when every file is off: the note, empty folders, the record, libcni's results. */
function removeRest(site: Site, stateDir: string, isPurge: boolean): FileOutcome[] {
  const outcomes: FileOutcome[] = [];
  const state = files.hostPath(site.root, stateDir);
  if (files.statIfThere(state)) {
    const own = /^(genie\.db|table\.json|agent\.(json|lock))/;
    const purged = isPurge ? readdirSync(state).filter((name) => own.test(name)) : [];
    for (const name of purged) rmSync(join(state, name), { force: true });
    if (isPurge) removeEmpty(state);
    const detail = isPurge ? "" : "the record of what happened, --purge removes it";
    outcomes.push({ did: isPurge ? "removed" : "left", path: stateDir, detail });
  }
  const cached = removeCached(site.root);
  if (cached > 0) {
    const detail = `${cached} that runtimes kept of pods whose DEL went by another config`;
    outcomes.push({ did: "removed", path: cacheDir, detail });
  }
  if (site.note.files.length === 0) files.removeFile(files.hostFile(site.root, paths.note));
  for (const dir of [join(ownDir, "replaced"), ownDir]) removeEmpty(files.hostPath(site.root, dir));
  return outcomes;
}

/**
 * Removes the results that libcni keeps under our name. libcni looks for them by the name of the
 * current config, so it never finds those of pods that ended while our config was retired.
 */
function removeCached(root: string): number {
  const dir = files.hostPath(root, cacheDir);
  const named = files.listFolder(dir).filter((name) => name.startsWith("genie-"));
  const ours = named
    .map((name) => join(dir, name))
    .filter((file) => /"networkName":"genie"/.test(files.readIfThere(file) ?? ""));
  for (const file of ours) rmSync(file, { force: true });
  return ours.length;
}

/** Removes a folder, unless something is left in it. */
const removeEmpty = (dir: string): void => orElse(undefined, () => rmdirSync(dir));
