/**
 * `genie pods`: who is attached where now, on this node or on all: a row for each attachment, as in
 * `attachments` of a report. Only reads.
 */
import type { Host } from "../call.ts";
import { askedPod, type Flags, text, UsageError, wordsOf } from "../config/usage.ts";
import { canonicalIP } from "../ip.ts";
import { checkClusterOptions, jsonOf, type ReportContext, sourceOf } from "./command.ts";
import type { AttachmentReport, ReportHead } from "./document.ts";
import { makeHead, reportedFilter } from "./model.ts";
import { formatAge } from "./quantity.ts";
import { type LedgerFilter, liveAttachments, readOrEmpty } from "./record_reader.ts";
import { nodeColumnOf, type ReportColumn, shownPod, visibleText } from "./table.ts";
import { formatRowsCsv, table } from "./text.ts";

/** Narrowest terminal that has room for all columns; `-o wide` shows them on any. */
const allColumnsWidth = 100;

/** The document of `genie pods --json`; stable as that of `genie report --json`. */
type PodsDocument = Pick<ReportHead, "version" | "genie" | "generatedAt" | "notices"> & {
  attachments: AttachmentReport[];
};

type Asked = Record<"network" | "namespace" | "pod" | "address" | "node", string | undefined>;

/**
 * Runs `genie pods`.
 * @returns exit status: 1 where nothing is found of what was asked for, or a node did not answer
 * @throws UsageError for words that make no sense; CniError as `genie report`
 */
export async function runPods(host: Host, flags: Flags, context: ReportContext): Promise<number> {
  checkClusterOptions(flags);
  const asked = readAsked(flags);
  const isCluster = flags["cluster"] === true;
  const { missing, ...found } = isCluster
    ? await readCluster(host, flags, asked)
    : { ...(await readNode(host, flags, asked, context)), missing: [] };
  const rows = found.attachments.filter((one) => isMeant(one, asked)).sort(byPod);
  for (const why of missing) host.stderr(`genie: warn: ${visibleText(why)}\n`);
  const isLimited = Object.values(asked).some((one) => one !== undefined);
  if (flags["json"]) host.stdout(jsonOf({ ...found, attachments: rows } satisfies PodsDocument));
  else if (flags["csv"]) host.stdout(formatCsv(rows));
  else if (rows.length > 0) {
    const columns = columnsFor(rows, Date.parse(found.generatedAt), context.width);
    host.stdout(`${table(columns, rows, context.width)}\n`);
  }
  if (rows.length > 0) return missing.length > 0 ? 1 : 0;
  const of = asked.node === undefined ? "the nodes that answered" : `node ${asked.node}`;
  const none = `${sayAsked(asked)} is attached on ${visibleText(isCluster ? of : "this node")}`;
  if (isLimited) host.stderr(`genie: ${none}; genie report shows earlier ones\n`);
  else if (!flags["json"] && !flags["csv"]) host.stdout(`${none}\n`);
  return isLimited || missing.length > 0 ? 1 : 0;
}

function readAsked(flags: Flags): Asked {
  const given = text(flags, "address");
  const address = ipOf(given ?? "");
  if (given !== undefined && address === undefined) {
    throw new UsageError(`Invalid --address "${given}": expected one such as 10.1.0.57`);
  }
  const [network, node] = [text(flags, "network"), text(flags, "node")];
  if (node !== undefined && !flags["cluster"]) throw new UsageError("--node needs --cluster");
  const { namespace, name } = askedPod(flags);
  // A word alone is a namespace.
  const isPod = namespace !== undefined || wordsOf(flags).length === 0;
  const meant = isPod ? { namespace, pod: name } : { namespace: name, pod: undefined };
  return { network, ...meant, address, node };
}

/** An address without its prefix length, as it is compared; undefined where it is none. */
const ipOf = (address: string): string | undefined => canonicalIP(address.replace(/\/.*/, ""));

/** Who was asked for, as the subject of a sentence. */
function sayAsked({ network, namespace, pod, address }: Asked): string {
  const parts = [
    pod !== undefined && ` ${namespace === undefined ? "" : `${namespace}/`}${pod}`,
    pod === undefined && namespace !== undefined && ` of namespace ${namespace}`,
    network !== undefined && ` on network ${network}`,
    address !== undefined && ` with address ${address}`,
  ].filter((part) => part !== false);
  return visibleText(`No pod${parts.join("")}`);
}

async function readNode(host: Host, flags: Flags, asked: Asked, context: ReportContext) {
  const { network, namespace, pod } = asked;
  const filter: LedgerFilter = { network, namespace, pod };
  const own = context.readOwnConfig(text(flags, "cni-config"));
  const source = await sourceOf(host, own, { filter });
  const { tables, attachments } = readOrEmpty(source.stateDir, (record) => ({
    tables: record.tables,
    attachments: [...liveAttachments(record, filter)],
  }));
  const { version, genie, generatedAt, notices } = makeHead(host, source, tables);
  return { version, genie, generatedAt, notices, attachments };
}

async function readCluster(host: Host, flags: Flags, { namespace, pod, network }: Asked) {
  // Loaded here: nothing else needs the Kubernetes client.
  const { makeClusterReport } = await import("./cluster.ts");
  const limits = { namespace, pod, network };
  const given = Object.entries(limits).filter(([, value]) => value !== undefined);
  const report = await makeClusterReport(
    host,
    { ...flags, ...Object.fromEntries(given) },
    { filter: reportedFilter(limits), limit: 0 },
  );
  const { version, genie, generatedAt, notices, attachments, nodes } = report;
  const missing = nodes
    .filter(({ error }) => error !== "")
    .map(({ node, error }) => `node ${node} is not in this: ${error}`);
  return { version, genie, generatedAt, notices, attachments, missing };
}

function isMeant({ addresses, node: of }: AttachmentReport, { address, node }: Asked): boolean {
  const isOf = node === undefined || of === node;
  return isOf && (address === undefined || addresses.some((one) => ipOf(one) === address));
}

/** By node, namespace and pod; those of one pod as they were made. */
function byPod(a: AttachmentReport, b: AttachmentReport): number {
  const keyOf = ({ node = "", namespace, pod, createdAt }: AttachmentReport) =>
    [node, namespace, pod, createdAt].join("\n");
  return keyOf(a) < keyOf(b) ? -1 : 1;
}

/** All columns; a narrow terminal gets those by which a pod is found. */
function columnsFor(rows: readonly AttachmentReport[], nowMs: number, width: number) {
  const more = width >= allColumnsWidth;
  const age = ({ createdAt }: AttachmentReport) =>
    createdAt === null ? "–" : formatAge(nowMs - Date.parse(createdAt));
  const columns: (ReportColumn<AttachmentReport> | false)[] = [
    ...nodeColumnOf(rows),
    { title: "Pod", kind: "name", isHead: true, cell: (one) => shownPod(one.namespace, one.pod) },
    { title: "Network", kind: "name", cell: ({ network }) => network },
    { title: "Interface", terminalTitle: "IFNAME", cell: (one) => one.interface },
    { title: "Addresses", kind: "list", cell: ({ addresses }) => addresses.join(",") || "–" },
    more && { title: "MAC", cell: ({ mac }) => mac || "–" },
    more && { title: "Plugins", kind: "list", cell: ({ plugins }) => plugins.join(",") },
    { title: "Age", kind: "number", cell: age },
    { title: "State", kind: "state", cell: ({ state }) => state },
    more && { title: "Policy", cell: ({ policySince }) => (policySince ? "in force" : "–") },
  ];
  return columns.filter((column) => column !== false);
}

const csvHeader =
  "node,namespace,pod,pod_uid,network,interface,addresses,mac,plugins,state,created_at," +
  "policy_since,reason,error,container_id\r\n";

function formatCsv(rows: readonly AttachmentReport[]): string {
  const lines = rows.map((one) => [
    ...[one.node ?? "", one.namespace, one.pod, one.podUid, one.network, one.interface],
    ...[one.addresses.join(" "), one.mac, one.plugins.join(" "), one.state, one.createdAt ?? ""],
    ...[one.policySince ?? "", one.reason, one.error, one.containerId],
  ]);
  return formatRowsCsv(csvHeader, lines);
}
