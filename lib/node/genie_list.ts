/**
 * Our own entry in a conf dir: the config list by which a runtime calls genie, whether the runtime
 * would take it, and the one that is left while pods from before still need their DEL. Pure.
 * Source: CNI SPEC 1.1 §1, CONVENTIONS.md (capabilities); libcni for the order of files.
 */
import { isObject } from "../json.ts";

/**
 * What runtimes hand over where a plugin declares it (CNI CONVENTIONS.md; the first of containerd
 * 1.5, CRI-O 1.29). It goes to the pod's first network, to the plugins that declare it themselves.
 */
export const runtimeCapabilities = [
  "io.kubernetes.cri.pod-annotations",
  "portMappings",
  "bandwidth",
  "dns",
  "ipRanges",
  "ips",
  "mac",
  "infinibandGUID",
  "aliases",
  "cgroupPath",
] as const;

/**
 * The config list by which a runtime calls genie. containerd 1.7 takes no version above 1.0.0 and
 * does not know `cniVersions`, of which 2.x takes the highest.
 */
export function ownList(pluginsFile?: string): object {
  return {
    cniVersion: "1.0.0",
    cniVersions: ["0.4.0", "1.0.0", "1.1.0"],
    name: "genie",
    plugins: [
      {
        type: "genie",
        ...(pluginsFile !== undefined && { plugins_file: pluginsFile }),
        capabilities: Object.fromEntries(runtimeCapabilities.map((name) => [name, true])),
      },
    ],
  };
}

/** The text of {@link ownList}, as `genie install` writes it. */
export function ownListText(): string {
  return `${JSON.stringify(ownList(), null, 2)}\n`;
}

/** A file of a conf dir; `value` is undefined where it is no JSON. */
export interface ConfFile {
  name: string;
  value: unknown;
}

/** What a runtime loads of a conf dir. */
export const isConfName = (name: string) => /\.(conflist|conf|json)$/.test(name);

/** As Go sorts: by bytes. */
export function sortConfs<T extends { name: string }>(files: readonly T[]): T[] {
  return files.toSorted((a, b) => Buffer.compare(Buffer.from(a.name), Buffer.from(b.name)));
}

/** The plugin configs of a file, be it a list or a single config. */
export function pluginsOf({ value }: ConfFile): Record<string, unknown>[] {
  if (!isObject(value)) return [];
  const plugins = Array.isArray(value["plugins"]) ? value["plugins"] : [value];
  return plugins.filter(isObject);
}

/** True when a runtime that takes this file calls genie. */
export function callsGenie(file: ConfFile): boolean {
  return pluginsOf(file).some(({ type }) => type === "genie");
}

/** What of a conf dir stands before a file in the runtime's eyes; what is no JSON it skips. */
export function before(files: readonly ConfFile[], name: string): ConfFile[] {
  const sorted = sortConfs([...files.filter((one) => one.name !== name), { name, value: {} }]);
  return sorted
    .slice(
      0,
      sorted.findIndex((one) => one.name === name),
    )
    .filter(({ value }) => isObject(value));
}

/**
 * The list that stays while pods from before live: the network that follows for new pods, and genie
 * behind it, which passes ADD on and answers the DEL of what it has on record. Nothing less will
 * do: containerd calls DEL by the config of now, not by the one a pod was started with (go-cni).
 *
 * @param next the config that the runtime would take without ours; undefined: none
 */
export function lastList(next: unknown, pluginsFile?: string): object {
  const own = {
    type: "genie",
    ...(pluginsFile !== undefined && { plugins_file: pluginsFile }),
    delOnly: true,
  };
  if (!isObject(next)) return { cniVersion: "1.0.0", name: "genie", plugins: [own] };
  if (Array.isArray(next["plugins"])) return { ...next, plugins: [...next["plugins"], own] };
  const { cniVersion, name, ...plugin } = next;
  return { ...(cniVersion !== undefined && { cniVersion }), name, plugins: [plugin, own] };
}
