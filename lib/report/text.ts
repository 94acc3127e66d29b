/** Reports as tables for a terminal, as wide as it. Pure: a report in, text out. */
import { formatCount, formatDuration, formatRate, formatShare } from "../config/quantity.ts";
import { candidatesOf, whyNot } from "./choice.ts";
import type {
  AttachmentReport,
  ChoiceReport,
  ClusterReport,
  NetworkReport,
  NodeReport,
  PodReport,
  PolicyReport,
  Report,
  RequestReport,
} from "./shape.ts";
import { type Column, formatTable, printable } from "./table.ts";
import {
  shownAddresses,
  shownDuration,
  shownFilter,
  shownNetwork,
  shownOutcome,
  shownPod,
  shownRequestNetwork,
  shownTime,
} from "./words.ts";

/** Formats the default view. @param width columns of the terminal, Infinity for none */
export function formatReport(report: Report | ClusterReport, width: number): string {
  const { totals, stuck, requests } = report;
  const filter = shownFilter(report);
  const span =
    report.from === null || report.to === null
      ? "no requests on record"
      : `${shownTime(report.from)} to ${shownTime(report.to)} UTC`;
  const denied = totals.denied > 0 ? `, ${formatCount(totals.denied)} of them denied` : "";
  const nodes = "nodes" in report ? report.nodes : [];
  const sections = [
    nodeCount(nodes) +
      `Requests: ${formatCount(totals.requests)}, failed ${formatCount(totals.failures)} ` +
      `(${formatShare(totals.failures, totals.requests)})${denied}\n` +
      `Span: ${span}${filter === "" ? "" : `; ${printable(filter)}`}\n` +
      `Attachments now: ${formatCount(totals.attachments)}, leaked ` +
      `${formatCount(totals.leaked)}, failing ${formatCount(totals.failing)}\n`,
    notices(report.notices),
    missingTable(nodes, width),
    networkTable(report.networks, width),
    nodeTable(nodes, width),
    stuckTable(stuck, totals.leaked + totals.failing, width),
    policyText(report.policy, width),
    nodes.length === 0
      ? requestTable(requests, totals.requests, width)
      : requestTable(report.failed, totals.failures, width, "failures"),
  ];
  return sections.filter((section) => section !== "").join("\n");
}

function notices(texts: string[]): string {
  return texts.map((text) => `Note: ${printable(text)}\n`).join("");
}

/** Rows of the tables of nodes; the others are in the JSON. */
const nodesMax = 50;

function nodeCount(nodes: readonly NodeReport[]): string {
  if (nodes.length === 0) return "";
  const answered = nodes.filter(({ error }) => error === "").length;
  return `Nodes: ${formatCount(nodes.length)}, answered ${formatCount(answered)}\n`;
}

function nodesMore(all: readonly NodeReport[]): string {
  const more = all.length - nodesMax;
  return more > 0 ? `${formatCount(more)} more nodes: --json and --csv have them\n` : "";
}

function missingTable(nodes: readonly NodeReport[], width: number): string {
  const missing = nodes.filter(({ error }) => error !== "");
  if (missing.length === 0) return "";
  const table = formatTable(
    [shrinking("NODE"), wrapping("WHY")],
    missing.slice(0, nodesMax).map(({ node, error }) => [node, error]),
    width,
  );
  return `Nodes that are not in this report\n${table}${nodesMore(missing)}`;
}

function nodeTable(nodes: readonly NodeReport[], width: number): string {
  const trouble = ({ totals }: NodeReport) => totals.leaked + totals.failing;
  const known = nodes
    .filter(({ error }) => error === "")
    .sort((a, b) => trouble(b) - trouble(a) || b.totals.failures - a.totals.failures);
  if (known.length === 0) return "";
  const shorten = shortener(known.map(({ node }) => node));
  const table = formatTable(
    [
      shrinking("NODE"),
      ...["REQUESTS", "FAILED", "P50", "P95", "P99", "USED", "LIVE", "STUCK"].map(right),
    ],
    known
      .slice(0, nodesMax)
      .map((one) => [
        shorten(one.node),
        formatCount(one.totals.requests),
        formatCount(one.totals.failures),
        shownDuration(one.totals.add.p50Us),
        shownDuration(one.totals.add.p95Us),
        shownDuration(one.totals.add.p99Us),
        formatCount(one.addresses.ipv4 + one.addresses.ipv6),
        formatCount(one.totals.attachments),
        formatCount(trouble(one)),
      ]),
    width,
  );
  return `Nodes, those with the most trouble first\n${table}${nodesMore(known)}`;
}

const right = (title: string): Column => ({ title, align: "right" });
const shrinking = (title: string): Column => ({ title, shrinks: true });
const name = (title: string): Column => ({ title, shrinks: true, cut: "middle" });
/** What went wrong: never cut. */
const wrapping = (title: string): Column => ({ title, wraps: true });

function networkTable(networks: NetworkReport[], width: number): string {
  if (networks.length === 0) return "No network has requests or attachments.\n";
  const table = formatTable(
    [
      name("NETWORK"),
      ...["REQUESTS", "FAILED", "P50", "P95", "P99", "USED", "TRAFFIC", "LIVE"].map(right),
    ],
    networks.map((one) => [
      shownNetwork(one.network),
      formatCount(one.requests),
      formatCount(one.failures),
      shownDuration(one.add.p50Us),
      shownDuration(one.add.p95Us),
      shownDuration(one.add.p99Us),
      shownAddresses(one),
      one.bytesPerSecond === null ? "–" : formatRate(one.bytesPerSecond),
      formatCount(one.attachments),
    ]),
    width,
  );
  return `${table}P50 to P99: successful ADDs; USED: addresses; LIVE: attachments now\n`;
}

/** Leaves out the domain that all of these names end in. */
function shortener(names: readonly string[]): (name: string) => string {
  const domain = (name: string) => /^[^.]*[a-z][^.]*(\..+)$/i.exec(name)?.[1] ?? "";
  const [first = ""] = names;
  const shared = domain(first);
  const isShared = shared !== "" && names.every((one) => domain(one) === shared);
  return (one) => (isShared ? one.slice(0, -shared.length) : one);
}

/** One column more where the rows are of many nodes. */
function nodeColumn(rows: readonly { node?: string }[]) {
  const isThere = rows.some(({ node }) => node !== undefined);
  const shorten = shortener(rows.map(({ node = "" }) => node));
  return {
    columns: isThere ? [shrinking("NODE")] : [],
    cells: ({ node = "" }: { node?: string }) => (isThere ? [shorten(node)] : []),
  };
}

function stuckTable(stuck: AttachmentReport[], all: number, width: number): string {
  if (stuck.length === 0) return "";
  const more = all > stuck.length ? `, ${formatCount(stuck.length)} of ${formatCount(all)}` : "";
  const ofNode = nodeColumn(stuck);
  const isBroken = stuck.some(({ state }) => state === "planned");
  const broken = isBroken ? ", planned (genie repair makes it)" : "";
  return (
    `Leaked (genie gc retries) and failing (the runtime retries)${broken}${more}\n` +
    formatTable(
      [
        { title: "STATE" },
        { title: "SINCE (UTC)" },
        ...ofNode.columns,
        name("NETWORK"),
        name("POD"),
        { title: "INTERFACE" },
        wrapping("ERROR"),
      ],
      stuck.map((one) => [
        one.state,
        shownTime(one.failingSince),
        ...ofNode.cells(one),
        one.network,
        shownPod(one.namespace, one.pod),
        one.interface,
        one.error,
      ]),
      width,
    )
  );
}

function policyText(policy: PolicyReport | undefined, width: number): string {
  if (!policy) return "";
  const known = policy.knownAt === null ? "never" : `${shownTime(policy.knownAt)} UTC`;
  const pods = formatCount(policy.enforced);
  const line = `Policies: pods with rules ${pods}, known as of ${known}\n`;
  if (policy.problems.length === 0) return line;
  const table = formatTable(
    [{ title: "SINCE (UTC)" }, { title: "KIND" }, name("POLICY"), wrapping("PROBLEM")],
    policy.problems.map((one) => [
      shownTime(one.at),
      one.kind,
      shownPod(one.namespace, one.name),
      `${one.path}: ${one.problem}`,
    ]),
    width,
  );
  return `${line}Problems in policies; the rest of each is in force\n${table}`;
}

function requestTable(
  requests: RequestReport[],
  all: number,
  width: number,
  what: "requests" | "failures" = "requests",
): string {
  if (requests.length === 0) return all === 0 ? `No ${what} in this time.\n` : "";
  const ofNode = nodeColumn(requests);
  return (
    `Newest ${what}, ${formatCount(requests.length)} of ${formatCount(all)}\n` +
    formatTable(
      [
        { title: "TIME (UTC)" },
        { title: "COMMAND" },
        ...ofNode.columns,
        name("POD"),
        name("NETWORK"),
        right("TOOK"),
        wrapping("OUTCOME"),
      ],
      requests.map((one) => [
        shownTime(one.at),
        one.command,
        ...ofNode.cells(one),
        shownPod(one.podNamespace, one.podName),
        shownRequestNetwork(one),
        formatDuration(one.durationUs),
        shownOutcome(one),
      ]),
      width,
    )
  );
}

/** Formats the view of one pod. @param width columns of the terminal, Infinity for none */
export function formatPodReport(report: PodReport, width: number): string {
  const { pod, attachments, requests, choices } = report;
  const name = printable(`${pod.namespace}/${pod.name}`);
  const sections = [
    attachments.length === 0
      ? `Pod ${name} has no attachments.\n`
      : `Pod ${name} has\n${attachmentTable(attachments, width)}`,
    notices(report.notices),
    requests.length === 0
      ? "No requests in this time.\n"
      : `Its newest requests\n${podRequestTable(requests, width)}`,
    ...choices.map((choice) => choiceText(choice, width)),
    ...(report.rulesets ?? []).flatMap(({ at, ruleset, hostRuleset }) => [
      rulesText(at, "", ruleset),
      rulesText(at, ", at the node's side", hostRuleset),
    ]),
  ];
  return sections.filter((section) => section !== "").join("\n");
}

function rulesText(at: string | null, where: string, ruleset: string): string {
  if (ruleset === "") return "";
  const lines = ruleset.replace(/[^\n]+/g, (line) => printable(line.replaceAll("\t", "  ")));
  return `Network policy in force since ${shownTime(at)} UTC${where}\n${lines}`;
}

function attachmentTable(attachments: AttachmentReport[], width: number): string {
  return formatTable(
    [
      name("NETWORK"),
      { title: "INTERFACE" },
      shrinking("ADDRESSES"),
      { title: "STATE" },
      { title: "SINCE (UTC)" },
      wrapping("WHY"),
    ],
    attachments.map((one) => [
      one.network,
      one.interface,
      one.addresses.join(", ") || "–",
      one.state,
      shownTime(one.failingSince ?? one.createdAt),
      one.error === "" ? one.reason : `${one.reason}; ${one.error}`,
    ]),
    width,
  );
}

function podRequestTable(requests: RequestReport[], width: number): string {
  const plugin = (one: RequestReport) => `  ${one.plugin} (plugin)`;
  const what = (one: RequestReport) => {
    if (one.kind === "plugin") return plugin(one);
    return one.kind === "call" ? "call" : shownNetwork(one.network);
  };
  return formatTable(
    [
      { title: "TIME (UTC)" },
      { title: "COMMAND" },
      shrinking("NETWORK"),
      { title: "INTERFACE" },
      right("TOOK"),
      { title: "WHY" },
      wrapping("OUTCOME"),
    ],
    requests.map((one) => [
      shownTime(one.at),
      one.command,
      what(one),
      one.ifName,
      formatDuration(one.durationUs),
      one.decidedBy,
      shownOutcome(one),
    ]),
    width,
  );
}

function choiceText(choice: ChoiceReport, width: number): string {
  const network = printable(shownNetwork(choice.network));
  const title = `Choice of ${shownTime(choice.at)} UTC: ${network}\n`;
  const { columns, rows } = candidatesOf(choice.choice);
  if (rows.length === 0) return `${title}${printable(JSON.stringify(choice.choice))}\n`;
  return (
    title +
    formatTable(
      columns.map(({ title, isNumber }) => ({
        title: printable(title.toUpperCase()),
        align: isNumber ? "right" : "left",
        shrinks: !isNumber,
        wraps: title === whyNot,
      })),
      rows,
      width,
    )
  );
}
