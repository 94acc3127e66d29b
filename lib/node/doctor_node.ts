/**
 * The checks of `genie doctor` that concern the node under genie: its subnets and addresses,
 * kernel, disk, record, clock, and its rights at the Kubernetes API. They change nothing. Rights
 * are checked by SelfSubjectAccessReview (authorization.k8s.io/v1), which everyone may use.
 */
import { readFileSync, statfsSync, statSync } from "node:fs";
import { gunzipSync } from "node:zlib";
import { type ApiRight, rights } from "../cluster/manifest.ts";
import { toCniError } from "../cni.ts";
import { contains, parseSubnet } from "../ip.ts";
import { isObject } from "../json.ts";
import { connect, type Kube } from "../kubernetes/client.ts";
import { claimsOf, findAccount } from "../kubernetes/kubeconfig.ts";
import { countAddresses, readRecord, setAsideRecords, subnetsOf } from "../report/record_reader.ts";
import { enforcesPolicy, isConfigured } from "../settings.ts";
import { statIfThere } from "./files.ts";
import { paths } from "./installation.ts";
import {
  type CheckResult,
  missingAgent,
  type NodeView,
  ok,
  orOk,
  problem,
  warning,
} from "./node_view.ts";

/** Do pods wait for an agent that says which network policies there are? */
export function checkPolicy({ host, at, config }: NodeView): CheckResult[] {
  if (!enforcesPolicy(config)) return [ok("network policy is not to be enforced")];
  const missing = missingAgent({ ...config, stateDir: at(config.stateDir) }, host.now());
  return missing === undefined
    ? [ok("genie agent knows the network policies")]
    : [problem(missing, "run genie agent, or take enforce from plugins.toml")];
}

/** Subnets of two networks, or of one and the node, must not overlap. */
export function checkOverlaps(view: NodeView): CheckResult[] {
  const owned = view.networks.flatMap(({ name, list }) => {
    const devices = list.plugins.map(({ bridge, master }) => String(bridge ?? master ?? "cni0"));
    // weaver gives addresses of one range to all its networks, each of them once.
    const isWeave = list.plugins.some(
      ({ type, ipam }) => type === "weave-net" || (isObject(ipam) && ipam["type"] === "weave-ipam"),
    );
    if (isWeave) devices.push("weave");
    return subnetsOf(list).map((subnet) => ({ network: name, subnet, devices, isWeave }));
  });
  const routes = nodeRoutes(view);
  const results: CheckResult[] = [];
  owned.forEach(({ network, subnet, devices, isWeave }, i) => {
    for (const other of owned.slice(i + 1)) {
      if (isWeave && other.isWeave) continue;
      if (network === other.network || !overlap(subnet, other.subnet)) continue;
      const what = `${subnet} of ${network} overlaps ${other.subnet} of ${other.network}`;
      results.push(warning(what, "give each network a subnet of its own"));
    }
    for (const route of routes) {
      if (!overlap(subnet, route.subnet)) continue;
      // Routes to the network itself: by its own device, or to single pods.
      if (devices.includes(route.device) || /\/(32|128)$/.test(route.subnet)) continue;
      const by = `the node's route ${route.subnet} by ${route.device}`;
      const what = `${subnet} of ${network} overlaps ${by}`;
      results.push(warning(what, "choose another subnet, or see that route"));
    }
  });
  return orOk(results, `subnets that overlap: none of ${owned.length}`);
}

function overlap(a: string, b: string): boolean {
  return contains(a, b) || contains(b, a);
}

/** The node's routes but the default ones (proc_net_route, proc_net_ipv6_route). */
export function nodeRoutes({ read }: Pick<NodeView, "read">) {
  const routes: { subnet: string; device: string }[] = [];
  for (const line of read("/proc/net/route").split("\n").slice(1)) {
    const [device = "", destination = "", , , , , , mask = ""] = line.split("\t");
    const bytes = destination.match(/../g)?.reverse() ?? [];
    const prefix = (Number.parseInt(mask, 16) >>> 0).toString(2).replace(/0/g, "").length;
    if (bytes.length !== 4 || prefix === 0) continue;
    const address = bytes.map((byte) => Number.parseInt(byte, 16)).join(".");
    routes.push({ subnet: `${address}/${prefix}`, device });
  }
  for (const line of read("/proc/net/ipv6_route").split("\n")) {
    const [destination = "", digits = "", ...rest] = line.trim().split(/\s+/);
    const groups = destination.match(/.{4}/g) ?? [];
    const prefix = Number.parseInt(digits, 16);
    const subnet = `${groups.join(":")}/${prefix}`;
    const device = rest.at(-1) ?? "";
    // Link-local and multicast are on every device.
    if (device === "lo" || /^(fe80|ff)/.test(destination)) continue;
    if (groups.length === 8 && prefix && parseSubnet(subnet)) routes.push({ subnet, device });
  }
  return routes;
}

/** Addresses left in each network whose IPAM can be read. */
export function checkCapacity({ host, at, config, networks }: NodeView): CheckResult[] {
  const counts = countAddresses(at(config.stateDir), networks, host.now());
  return counts.map(({ network, family, left, total }) => {
    const what = `${network} has ${left} of ${total} ${family} addresses left`;
    const remedy = "enlarge its range, or move pods to another network";
    if (left === 0) return problem(what, remedy);
    return left / total < 0.1 ? warning(what, remedy) : ok(what);
  });
}

/** Kernel modules by the plugin types that need them, with the option that builds them in. */
const modules: Record<string, Record<string, string>> = {
  bridge: { bridge: "CONFIG_BRIDGE", veth: "CONFIG_VETH" },
  ptp: { veth: "CONFIG_VETH" },
  macvlan: { macvlan: "CONFIG_MACVLAN" },
  ipvlan: { ipvlan: "CONFIG_IPVLAN" },
  vlan: { "8021q": "CONFIG_VLAN_8021Q" },
  vrf: { vrf: "CONFIG_NET_VRF" },
  dummy: { dummy: "CONFIG_DUMMY" },
  tap: { tun: "CONFIG_TUN" },
  bandwidth: { sch_tbf: "CONFIG_NET_SCH_TBF" },
};

/** The kernel has what the plugins of the networks, and policies, ask of it. */
export function checkKernel({ networks, config, read, at }: NodeView): CheckResult[] {
  const types = networks.flatMap(({ list }) => list.plugins.map(({ type }) => type));
  const needed = Object.assign({}, ...types.map((type) => modules[type])) as Record<string, string>;
  if (enforcesPolicy(config)) needed["nf_tables"] = "CONFIG_NF_TABLES";
  const release = read("/proc/sys/kernel/osrelease").trim();
  const known = [
    read("/proc/modules"),
    read(`/lib/modules/${release}/modules.builtin`),
    read(`/lib/modules/${release}/modules.dep`),
  ].join("\n");
  // The kernel's own list of options, where it keeps one.
  const zipped = at("/proc/config.gz");
  const options = statIfThere(zipped) ? gunzipSync(readFileSync(zipped)).toString() : "";
  const results = Object.entries(needed).flatMap(([module, option]) => {
    const isThere =
      new RegExp(`(^|/)${module}(\\.ko\\S*)?[ :\\n]`, "m").test(`${known}\n`) ||
      new RegExp(`^${option}=[ym]$`, "m").test(options) ||
      statIfThere(at(`/sys/module/${module}`)) !== undefined;
    if (isThere) return [];
    const remedy = `modprobe ${module}, and see what it says`;
    return [warning(`kernel ${release}: no trace of ${module}`, remedy)];
  });
  const has = Object.keys(needed).join(", ");
  return orOk(results, `kernel ${release}${has === "" ? "" : ` has ${has}`}`);
}

const mib = 1024 * 1024;

/** Room for the record: bytes and files. */
export function checkDisk({ at, config }: NodeView): CheckResult[] {
  const dir = config.stateDir;
  let path = at(dir);
  while (!statIfThere(path)) path = path.replace(/\/[^/]*$/, "") || "/";
  const { bsize, blocks, bavail, files, ffree } = statfsSync(path);
  const free = bavail * bsize;
  const share = files > 0 ? ffree / files : 1;
  const what = `${Math.floor(free / mib)} MiB and ${ffree} files are free for ${dir}`;
  const remedy = "free space: without room for the record no pod starts";
  if (free < 16 * mib || (files > 0 && ffree < 100)) return [problem(what, remedy)];
  if (free < 256 * mib || bavail / blocks < 0.02 || share < 0.02) return [warning(what, remedy)];
  return [ok(what)];
}

/** An attachment that is planned for longer has lost its ADD. */
const plannedMs = 10 * 60_000;
/** A status that waits for less is on its way. */
const statusMs = 5 * 60_000;
/** A time this far ahead of the clock is wrong. */
const aheadMs = 60_000;

/** The record: whole, private, and without anything that waits to be put right. */
export function checkRecord({ host, at, config, root }: NodeView): CheckResult[] {
  const dir = at(config.stateDir);
  const file = `${config.stateDir}/genie.db`;
  const results = setAsideRecords(dir).map((one) =>
    warning(`${one.file} was damaged and set aside`, "see genie report, then remove it"),
  );
  let counts: ReturnType<typeof readCounts>;
  try {
    counts = readCounts(dir, host.now());
  } catch (error) {
    const remedy = "the next ADD sets a damaged record aside: run genie gc then";
    return [...results, problem(toCniError(error).message, remedy)];
  }
  if (counts === undefined) return [...results, ok(`${file} has nothing on record yet`)];
  const { integrity, leaked, stuck, statuses, ahead, total } = counts;
  if (integrity !== "ok") {
    results.push(problem(`${file} is damaged: ${integrity}`, "move it away, then run genie gc"));
  }
  if ((statSync(`${dir}/genie.db`).mode & 0o077) !== 0) {
    const remedy = `chmod 600 ${root === "/" ? file : dir}`;
    results.push(problem(`${file} can be read by others`, remedy));
  }
  if (leaked > 0) results.push(warning(`${leaked} attachments are leaked`, "genie gc"));
  if (stuck > 0) results.push(warning(`${stuck} attachments were never finished`, "genie gc"));
  if (statuses > 0) {
    results.push(warning(`${statuses} network statuses wait to be published`, "run genie agent"));
  }
  if (ahead > 0) {
    results.push(warning("the record knows of times to come", "see the clock of the node"));
  }
  return orOk(results, `${file} is whole, ${total} attachments`);
}

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
      ahead: count("ledger", "at_ms > ?", nowMs + aheadMs),
    };
  });
}

/** A clock before this date is wrong. */
const oldestMs = Date.UTC(2025, 0, 1);

/** The clock of the node, against the boot of the machine. */
export function checkClock({ host, read }: NodeView): CheckResult[] {
  const nowMs = host.now();
  const what = `the clock says ${new Date(nowMs).toISOString()}`;
  const bootedMs = Number(/^btime (\d+)$/m.exec(read("/proc/stat"))?.[1] ?? 0) * 1000;
  const remedy = "set the clock, run an NTP client";
  if (nowMs < oldestMs) return [problem(what, remedy)];
  if (bootedMs <= nowMs + aheadMs) return [ok(what)];
  return [problem(`${what}, before the machine was booted`, remedy)];
}

/** A larger difference from the server's clock breaks certificates and tokens. */
const skewMs = 30_000;

/** The credentials for the API are private, accepted and sufficient, and its clock is ours. */
export async function checkApi({ host, root, at, config }: NodeView): Promise<CheckResult[]> {
  const kubeconfig = at(config.kubernetes.kubeconfig);
  const settings = { ...config.kubernetes, kubeconfig, nodeRoot: root };
  if (!isConfigured(host, settings)) {
    return [ok(`${config.kubernetes.kubeconfig} is not there: networks are those of the node`)];
  }
  const results = [kubeconfig, at(paths.token)]
    .filter((file) => ((statIfThere(file)?.mode ?? 0) & 0o077) !== 0)
    .map((file) => problem(`${file} can be read by others`, `chmod 600 ${file}`));
  const isPolicy = enforcesPolicy(config);
  const needed = rights.filter(({ feature }) => !feature || (feature === "policy" && isPolicy));
  try {
    results.push(...checkToken(host.now(), findAccount(host, settings).token?.() ?? ""));
    const kube = await connect(host, settings);
    const { warning: advice } = kube;
    if (advice !== undefined) results.push(warning(advice, "see docs/migration.md"));
    const started = performance.now();
    const missing = await missingRights(kube, needed);
    const tookMs = Math.round(performance.now() - started);
    const canI = "kubectl auth can-i says the same; genie manifest has the rules";
    results.push(...missing.map((right) => problem(`no right to ${right}`, canI)));
    if (missing.length === 0) results.push(ok(`${kube.server} grants all rights, in ${tookMs} ms`));
    const nowMs = host.now();
    const offsetMs = nowMs - (kube.serverMs ?? nowMs);
    if (Math.abs(offsetMs) >= skewMs) {
      const seconds = Math.round(Math.abs(offsetMs) / 1000);
      const skew = `${seconds} s ${offsetMs > 0 ? "ahead of" : "behind"}`;
      const remedy = "run an NTP client: tokens and certificates are refused";
      results.push(problem(`the clock is ${skew} the API server's`, remedy));
    }
  } catch (error) {
    const remedy = "see the kubeconfig, its token, and the server";
    results.push(problem(toCniError(error).message, remedy));
  }
  return results;
}

/** A token that ends sooner is not renewed any more: the agent does that each day, in ms. */
const tokenLeftMs = 24 * 3600_000;

/** When the token ends, where it says so: pods that need the API fail from then on. */
function checkToken(nowMs: number, token: string): CheckResult[] {
  const claims = claimsOf(token.trim());
  if (!claims) return [];
  const { fromMs, untilMs, isOfPod, account } = claims;
  const what = `the token of the service account ${account}`;
  const at = Number.isFinite(new Date(untilMs).getTime()) ? new Date(untilMs).toISOString() : "";
  const remedy = "see why genie agent does not renew it, or run genie install --kubeconfig";
  if (untilMs <= nowMs) return [problem(`${what} ended at ${at}`, remedy)];
  if (isOfPod) {
    const apply = "apply genie manifest anew, it lets the agent ask for a token that does not";
    return [warning(`${what} ends with the agent's pod`, apply)];
  }
  // A server may give shorter ones, which are renewed when half of their life is over.
  const isLate = untilMs - nowMs < Math.min(tokenLeftMs, (untilMs - fromMs) / 4);
  return isLate ? [warning(`${what} ends at ${at}`, remedy)] : [];
}

/** Rights that the server does not grant, in words. @throws CniError 11 when it cannot be asked */
async function missingRights(kube: Kube, needed: readonly ApiRight[]): Promise<string[]> {
  const path = ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"];
  const all = needed.flatMap(({ apiGroups: [group = ""], resources, verbs }) =>
    resources.flatMap((name) => verbs.map((verb) => ({ group, name, verb }))),
  );
  const asked = all.map(async ({ group, name, verb }) => {
    const [resource = "", subresource] = name.split("/");
    const resourceAttributes = { group, resource, verb, ...(subresource && { subresource }) };
    const answer = await kube.post(path, {
      apiVersion: "authorization.k8s.io/v1",
      kind: "SelfSubjectAccessReview",
      spec: { resourceAttributes },
    });
    const status = isObject(answer) ? answer["status"] : undefined;
    if (isObject(status) && status["allowed"] === true) return [];
    return [`${verb} ${name}${group === "" ? "" : ` of ${group}`}`];
  });
  return (await Promise.all(asked)).flat();
}
