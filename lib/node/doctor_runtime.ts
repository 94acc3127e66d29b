/**
 * Does the runtime call genie, and as genie needs it? Its settings, its version, and the order of
 * its conf dir. Sources: containerd's and CRI-O's configuration, and what Cilium and Multus do there.
 */
import { readdirSync, statSync } from "node:fs";
import { join } from "node:path";
import { run } from "../exec.ts";
import { isObject } from "../json.ts";
import { ok, problem, type Said, warning } from "./finding.ts";
import { callsGenie, pluginsOf } from "./genie_list.ts";
import { findProgram, type NodeView } from "./node_view.ts";
import { type RuntimeSettings, readRuntimes } from "./runtime_settings.ts";

const probeMs = 5000;
/** Plugins that call other plugins: of two, one stands in the way of the other. */
const metaPlugins = ["multus", "multus-shim", "danm", "knitter", "cni-genie"];

/** The order of the conf dir, and who takes the place of genie. */
export function checkOrder({ confs, confDir, at, own }: NodeView): Said[] {
  const said: Said[] = [];
  const [first] = confs.filter(({ value }) => isObject(value));
  if (first && callsGenie(first)) said.push(ok(`runtimes take ${first.name}, which calls genie`));
  else if (first) {
    const type = pluginsOf(first)[0]?.["type"];
    const what = `runtimes take ${first.name} (${String(type)}) in ${confDir}, not genie`;
    const remedy = own ? `rename ${first.name} to stand behind genie's` : "genie install";
    said.push(problem(what, remedy));
  } else said.push(problem(`${confDir} has no CNI config`, "genie install"));
  for (const { name } of confs.filter(({ value }) => !isObject(value))) {
    said.push(warning(`${name} is no JSON: runtimes pass over it`, `repair or remove ${name}`));
  }
  for (const name of backups(at(confDir))) {
    said.push(
      problem(`${name}: Cilium puts configs of others out of use`, "set cni.exclusive=false in it"),
    );
  }
  for (const file of confs) {
    const meta = pluginsOf(file).find(({ type }) => metaPlugins.includes(String(type)));
    if (!meta) continue;
    const what = `${file.name} is a config of ${String(meta["type"])}, which calls plugins too`;
    said.push(warning(what, `remove ${file.name}: genie serves its annotations`));
  }
  if (confs.filter(callsGenie).length > 1) {
    const names = confs.filter(callsGenie).map(({ name }) => name);
    said.push(warning(`${names.join(" and ")} call genie`, "keep the first of them"));
  }
  return [...said, ...checkOwn(own)];
}

function backups(dir: string): string[] {
  if (!statSync(dir, { throwIfNoEntry: false })?.isDirectory()) return [];
  return readdirSync(dir).filter((name) => name.endsWith(".cilium_bak"));
}

function checkOwn(own: NodeView["own"]): Said[] {
  if (!own) return [];
  if (own["delOnly"] === true) {
    return [warning("genie is being uninstalled: it answers DEL alone", "genie uninstall, again")];
  }
  const { capabilities } = own;
  const key = "io.kubernetes.cri.pod-annotations";
  if (isObject(capabilities) && capabilities[key] === true) return [];
  const what = "genie's config does not ask for annotations: each ADD asks the API for its pod";
  return [warning(what, `add capabilities = { "${key}": true } to it`)];
}

/** Settings and versions of the runtimes and the kubelet that are on the node. */
export async function checkRuntimes(view: NodeView): Promise<Said[]> {
  const said: Said[] = [];
  for (const one of readRuntimes(view.root)) said.push(...checkSettings(view, one));
  for (const name of ["containerd", "crio", "kubelet"] as const) {
    const file = findProgram(view, name);
    if (file === undefined) continue;
    const { stdout } = await run(file, ["--version"], { env: {}, stdin: "", timeoutMs: probeMs });
    said.push(checkRelease(view, name, /\bv?(\d+\.\d+\.\d+)/.exec(stdout)?.[1]));
  }
  return said.length > 0 ? said : [warning("no container runtime was found", "see its own log")];
}

function checkSettings({ confDir, at }: NodeView, settings: RuntimeSettings): Said[] {
  const { file, binDirs, confsMax, network, isDisabled } = settings;
  const said: Said[] = [];
  if (isDisabled)
    said.push(warning(`${file} switches CRI off`, "take cri out of disabled_plugins"));
  if (settings.confDir !== undefined && settings.confDir !== confDir) {
    const what = `${file} reads CNI configs from ${settings.confDir}`;
    said.push(problem(what, `genie install --conf-dir ${settings.confDir}`));
  }
  const isThere = (dir: string) => statSync(at(join(dir, "genie")), { throwIfNoEntry: false });
  if (binDirs.length > 0 && !binDirs.some(isThere)) {
    const what = `${file} looks for plugins in ${binDirs.join(", ")}, and genie is not there`;
    said.push(problem(what, `genie install --bin-dir ${binDirs[0]}`));
  }
  if (confsMax !== undefined && confsMax !== 1) {
    const what = `${file} has max_conf_num = ${confsMax}: the runtime takes several configs`;
    said.push(problem(what, "set max_conf_num = 1"));
  }
  if (network !== undefined && network !== "" && network !== "genie") {
    const what = `${file} has cni_default_network = "${network}"`;
    said.push(problem(what, 'set it to "genie", or take it out'));
  }
  return said.length > 0 ? said : [ok(`${file} suits`)];
}

function checkRelease({ config }: NodeView, name: string, release: string | undefined): Said {
  if (release === undefined) return warning(`${name} does not say its version`, `see ${name}`);
  const since = { containerd: "1.5.0", crio: "1.29.0" }[name];
  if (since !== undefined && Bun.semver.order(release, since) < 0) {
    const what = `${name} ${release} hands over no annotations (since ${since})`;
    return warning(what, "give genie a kubeconfig that may get pods");
  }
  if (name === "crio" && config.result === "merged") {
    const what = `${name} ${release} takes every address of the result for the pod's`;
    return warning(what, 'set result = "primary" in the plugin table');
  }
  return ok(`${name} ${release}`);
}
