/**
 * The node under genie: kernel features, disk, clock and the record. Reads, and changes nothing.
 */
import { readFileSync, statfsSync, statSync } from "node:fs";
import { gunzipSync } from "node:zlib";
import { toCniError } from "../cni.ts";
import { readRecord, setAsideRecords } from "../report/file.ts";
import { enforcesPolicy } from "../settings.ts";
import { ok, problem, type Said, warning } from "./finding.ts";
import type { NodeView } from "./node_view.ts";

/** Kernel modules by the plugin types that need them, with the option that builds them in. */
const modules: Record<string, [module: string, option: string][]> = {
  bridge: [
    ["bridge", "CONFIG_BRIDGE"],
    ["veth", "CONFIG_VETH"],
  ],
  ptp: [["veth", "CONFIG_VETH"]],
  macvlan: [["macvlan", "CONFIG_MACVLAN"]],
  ipvlan: [["ipvlan", "CONFIG_IPVLAN"]],
  vlan: [["8021q", "CONFIG_VLAN_8021Q"]],
  vrf: [["vrf", "CONFIG_NET_VRF"]],
  dummy: [["dummy", "CONFIG_DUMMY"]],
  tap: [["tun", "CONFIG_TUN"]],
  bandwidth: [["sch_tbf", "CONFIG_NET_SCH_TBF"]],
};
const policyModules: [string, string][] = [["nf_tables", "CONFIG_NF_TABLES"]];

/** The kernel has what the plugins of the networks, and policies, ask of it. */
export function checkKernel(view: NodeView): Said[] {
  const types = new Set(view.networks.flatMap(({ list }) => list.plugins.map(({ type }) => type)));
  const needed = [...types].flatMap((type) => modules[type] ?? []);
  if (enforcesPolicy(view.config)) needed.push(...policyModules);
  const wanted = new Map(needed);
  const release = view.read("/proc/sys/kernel/osrelease").trim();
  const known = [
    view.read("/proc/modules"),
    view.read(`/lib/modules/${release}/modules.builtin`),
    view.read(`/lib/modules/${release}/modules.dep`),
  ].join("\n");
  const options = kernelOptions(view);
  const has = (module: string, option: string): boolean =>
    new RegExp(`(^|/)${module}(\\.ko\\S*)?[ :\\n]`, "m").test(`${known}\n`) ||
    new RegExp(`^${option}=[ym]$`, "m").test(options) ||
    statSync(view.at(`/sys/module/${module}`), { throwIfNoEntry: false }) !== undefined;
  const missing = [...wanted].filter(([module, option]) => !has(module, option));
  if (missing.length > 0) {
    return missing.map(([module]) =>
      warning(
        `kernel ${release}: no trace of ${module}`,
        `modprobe ${module}, and see what it says`,
      ),
    );
  }
  return [ok(`kernel ${release}${wanted.size > 0 ? ` has ${[...wanted.keys()].join(", ")}` : ""}`)];
}

/** The kernel's own list of options, where it keeps one. */
function kernelOptions({ at }: NodeView): string {
  const file = at("/proc/config.gz");
  if (!statSync(file, { throwIfNoEntry: false })) return "";
  return gunzipSync(readFileSync(file)).toString();
}

const mib = 1024 * 1024;

/** Room for the record: bytes and files. */
export function checkDisk({ at, config }: NodeView): Said[] {
  const dir = config.stateDir;
  const parent = nearest(at(dir));
  const { bsize, blocks, bavail, files, ffree } = statfsSync(parent);
  const free = bavail * bsize;
  const share = files > 0 ? ffree / files : 1;
  const text = `${Math.floor(free / mib)} MiB and ${ffree} files are free for ${dir}`;
  const remedy = "free space: without room for the record no pod starts";
  if (free < 16 * mib || (files > 0 && ffree < 100)) return [problem(text, remedy)];
  if (free < 256 * mib || bavail / blocks < 0.02 || share < 0.02) return [warning(text, remedy)];
  return [ok(text)];
}

/** The folder itself, or the one above it that is there. */
function nearest(dir: string): string {
  let path = dir;
  while (!statSync(path, { throwIfNoEntry: false })) path = path.replace(/\/[^/]*$/, "") || "/";
  return path;
}

/** The record: whole, private, and without anything that waits to be put right. */
export function checkRecord({ host, at, config, root }: NodeView): Said[] {
  const dir = at(config.stateDir);
  const file = `${config.stateDir}/genie.db`;
  const said: Said[] = setAsideRecords(dir).map((one) =>
    warning(`${one.file} was damaged and set aside`, "see genie report, then remove it"),
  );
  let found: ReturnType<typeof readCounts> | undefined;
  try {
    found = readCounts(dir, host.now());
  } catch (error) {
    const { message } = toCniError(error);
    return [
      ...said,
      problem(message, "the next ADD sets a damaged record aside: run genie gc then"),
    ];
  }
  if (found === undefined) return [...said, ok(`${file} has nothing on record yet`)];
  const { integrity, leaked, stuck, statuses, ahead, total } = found;
  if (integrity !== "ok") {
    said.push(problem(`${file} is damaged: ${integrity}`, "move it away, then run genie gc"));
  }
  if ((statSync(`${dir}/genie.db`).mode & 0o077) !== 0) {
    said.push(problem(`${file} can be read by others`, `chmod 600 ${root === "/" ? file : dir}`));
  }
  if (leaked > 0) said.push(warning(`${leaked} attachments are leaked`, "genie gc"));
  if (stuck > 0) said.push(warning(`${stuck} attachments were never finished`, "genie gc"));
  if (statuses > 0) {
    said.push(warning(`${statuses} network statuses wait to be published`, "run genie agent"));
  }
  if (ahead) said.push(warning("the record knows of times to come", "see the clock of the node"));
  return said.length > 0 ? said : [ok(`${file} is whole, ${total} attachments`)];
}

/** An attachment that is planned for longer has lost its ADD. */
const plannedMs = 10 * 60_000;
/** A status that waits for less is on its way. */
const statusMs = 5 * 60_000;
const aheadMs = 60_000;

function readCounts(dir: string, nowMs: number) {
  return readRecord(dir, ({ database, tables }) => {
    const count = (table: string, where: string, ...values: number[]): number => {
      if (!tables.has(table)) return 0;
      const sql = `SELECT count(*) AS count FROM ${table} WHERE ${where}`;
      return (database.query(sql).get(...values) as { count: number }).count;
    };
    const row = database.query("PRAGMA quick_check(1)").get() as { quick_check?: string } | null;
    return {
      integrity: row?.quick_check ?? "it does not answer",
      total: count("attachments", "1"),
      leaked: count("attachments", "state = 'leaked'"),
      stuck: count("attachments", "state = 'planned' AND created_at_ms < ?", nowMs - plannedMs),
      statuses: count("statuses", "at_ms < ?", nowMs - statusMs),
      ahead: count("ledger", "at_ms > ?", nowMs + aheadMs) > 0,
    };
  });
}

/** What cannot be a date of today. */
const oldestMs = Date.UTC(2025, 0, 1);

/** The clock of the node, against the boot of the machine. */
export function checkClock({ host, read }: NodeView): Said[] {
  const nowMs = host.now();
  const date = new Date(nowMs).toISOString();
  const booted = Number(/^btime (\d+)$/m.exec(read("/proc/stat"))?.[1] ?? 0) * 1000;
  const remedy = "set the clock, run an NTP client";
  if (nowMs < oldestMs) return [problem(`the clock says ${date}`, remedy)];
  if (booted > nowMs + aheadMs) {
    return [problem(`the clock says ${date}, before the machine was booted`, remedy)];
  }
  return [ok(`the clock says ${date}`)];
}
