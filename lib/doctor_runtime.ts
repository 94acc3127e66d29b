/**
 * Does the runtime call genie, and as genie needs it? Its settings, its version, and the order of
 * its conf dir. Sources: containerd's and CRI-O's configuration; pitfalls of Cilium and Multus.
 */
import { readdirSync, statSync } from "node:fs";
import { basename, join } from "node:path";
import { parse } from "smol-toml";
import { run } from "./exec.ts";
import { ok, problem, type Said, warning } from "./finding.ts";
import { isObject } from "./json.ts";
import { findProgram, type NodeView } from "./node_view.ts";
import { callsGenie, pluginsOf } from "./own_list.ts";
import { readIfThere } from "./place.ts";

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

/** What a runtime's settings say of CNI. */
interface RuntimeSettings {
  file: string;
  confDir: string | undefined;
  binDirs: string[];
  /** containerd: how many configs it loads. */
  confsMax: number | undefined;
  /** CRI-O: the network it takes by name. */
  network: string | undefined;
  isDisabled: boolean;
}

/** Settings and versions of the runtimes and the kubelet that are on the node. */
export async function checkRuntimes(view: NodeView): Promise<Said[]> {
  const said: Said[] = [];
  const settings = [containerd(view), ...crio(view)].filter((one) => one !== undefined);
  for (const one of settings) said.push(...checkSettings(view, one));
  for (const name of ["containerd", "crio", "kubelet"] as const) {
    const file = findProgram(view, name);
    if (file === undefined) continue;
    const { stdout } = await run(file, ["--version"], { env: {}, stdin: "", timeoutMs: probeMs });
    said.push(checkRelease(view, name, /\bv?(\d+\.\d+\.\d+\S*)/.exec(stdout)?.[1]));
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

const textOf = (value: unknown) => (typeof value === "string" ? value : undefined);
const texts = (value: unknown) =>
  Array.isArray(value) ? value.filter((one) => typeof one === "string") : [];

/** A value below nested tables; undefined where one is missing. */
function below(value: unknown, ...keys: string[]): unknown {
  return keys.reduce<unknown>((one, key) => (isObject(one) ? one[key] : undefined), value);
}

function readToml({ at }: NodeView, path: string): unknown {
  const text = readIfThere(at(path));
  if (text === undefined) return undefined;
  try {
    return parse(text);
  } catch (error) {
    // The runtime says so itself, and does not start.
    if (error instanceof Error) return undefined;
    throw error;
  }
}

function containerd(view: NodeView): RuntimeSettings | undefined {
  const path = "/etc/containerd/config.toml";
  const value = readToml(view, path);
  if (value === undefined) return undefined;
  const cni =
    below(value, "plugins", "io.containerd.cri.v1.runtime", "cni") ??
    below(value, "plugins", "io.containerd.grpc.v1.cri", "cni") ??
    below(value, "plugins", "cri", "cni");
  const binDir = textOf(below(cni, "bin_dir"));
  const confsMax = below(cni, "max_conf_num");
  const disabled = texts(below(value, "disabled_plugins"));
  return {
    file: path,
    confDir: textOf(below(cni, "conf_dir")) || undefined,
    binDirs: [...texts(below(cni, "bin_dirs")), ...(binDir ? [binDir] : [])],
    confsMax: typeof confsMax === "number" ? confsMax : undefined,
    network: undefined,
    isDisabled: disabled.some((one) => ["cri", "io.containerd.grpc.v1.cri"].includes(one)),
  };
}

/** CRI-O's file and those of its folder, each of which may say something. */
function crio(view: NodeView): RuntimeSettings[] {
  const dir = "/etc/crio/crio.conf.d";
  const inDir = statSync(view.at(dir), { throwIfNoEntry: false })?.isDirectory()
    ? readdirSync(view.at(dir)).sort()
    : [];
  return ["/etc/crio/crio.conf", ...inDir.map((name) => join(dir, basename(name)))].flatMap(
    (file) => {
      const network = below(readToml(view, file), "crio", "network");
      if (!isObject(network)) return [];
      return [
        {
          file,
          confDir: textOf(network["network_dir"])?.replace(/\/+$/, ""),
          binDirs: texts(network["plugin_dirs"]),
          confsMax: undefined,
          network: textOf(network["cni_default_network"]),
          isDisabled: false,
        },
      ];
    },
  );
}
