/**
 * The page by pod, by network and by cause: the map of who hangs on what, and a section about each,
 * to which tables and map link. Pure: a report in, values for page_map.html and page_item.html out.
 */
import type { AttachmentReport, FailureReport, Report, RequestReport } from "./document.ts";
import { html, type Markup, trusted } from "./markup.ts";
import { freeOver } from "./page_charts.ts";
import { formatCount, formatDuration, formatTime } from "./quantity.ts";
import * as tables from "./table.ts";
import type { Values } from "./template.ts";

/** Most pods, networks and causes with a section of their own. */
export const itemsMax = 1000;
/** Most lines of one kind in a section. */
const linesMax = 60;
/** Most characters of a message where it stands for the second time. */
const shortMax = 160;
/** Most pods of one network that the map names; more are squares. */
const namedMax = 60;
/** Most pods of one network in the map; many nodes share these. */
const mapPodsMax = 2000;
/** Most networks of a node in the map. */
const mapNetworksMax = 200;
/** How recent a failure must be to stand for a pod that is not attached, in ms. */
const recentMs = 3_600_000;

/** What the page knows of a pod. */
interface Pod {
  namespace: string;
  name: string;
  attachments: AttachmentReport[];
  failures: FailureReport[];
  /** The newest first. */
  requests: RequestReport[];
}

/** How an attachment, or a pod that should have one, is: the class that colours it. */
type Health = "good" | "warn" | "bad";
const healthOf: Record<string, Health> = { attached: "good", leaked: "bad" };
const ranks: Record<Health, number> = { bad: 0, warn: 1, good: 2 };

/** Everything by its key, see `about` of table.ts, and the ids of the sections. */
export interface Index {
  pods: Map<string, Pod>;
  /** Of what has a section, its id in the page. */
  ids: Map<string, string>;
}

/** Finds what belongs to each pod; those that failed or are stuck come first. */
export function indexOf(report: Report): Index {
  const pods = new Map<string, Pod>();
  const podOf = (namespace: string, name: string) =>
    pods.getOrInsertComputed(tables.about.pod(namespace, name), () => {
      return { namespace, name, attachments: [], failures: [], requests: [] };
    });
  for (const one of report.failures) podOf(one.namespace, one.pod).failures.push(one);
  for (const one of report.stuck) podOf(one.namespace, one.pod);
  for (const one of report.attachments) podOf(one.namespace, one.pod).attachments.push(one);
  const byId = (one: RequestReport) => `${one.node} ${one.id}`;
  const requests = new Map([...report.requests, ...report.failed].map((one) => [byId(one), one]));
  for (const one of [...requests.values()].sort((a, b) => (a.at < b.at ? 1 : -1))) {
    podOf(one.podNamespace, one.podName).requests.push(one);
  }
  const keys = {
    p: [...pods].flatMap(([key, { name }]) => (name === "" ? [] : [key])),
    n: report.networks.map(({ network }) => tables.about.network(network)),
    c: report.causes.map((one) => tables.about.cause(one)),
  };
  const ids = Object.entries(keys).flatMap(([letter, all]) =>
    all.slice(0, itemsMax).map((key, i): [string, string] => [key, `${letter}${i}`]),
  );
  return { pods, ids: new Map(ids) };
}

/** A text that leads to the section about what it names, where there is one. */
export function link({ ids }: Index, key: string, text: string): Markup {
  const id = ids.get(key);
  return id === undefined ? html`${text}` : html`<a href="#${id}">${text}</a>`;
}

const networkLink = (index: Index, name: string) =>
  link(index, tables.about.network(name), tables.shownNetwork(name));
const podLink = (index: Index, { namespace, pod }: { namespace: string; pod: string }) =>
  link(index, tables.about.pod(namespace, pod), tables.shownPod(namespace, pod));

/** Lines under a heading; those beyond the limit are counted. */
function list(head: string, all: readonly Markup[], rest = "genie report --json"): Values[] {
  if (all.length === 0) return [];
  const more = all.length - linesMax;
  const cut = more > 0 ? [html`${more} more: ${rest}`] : [];
  return [{ head, lines: [...all.slice(0, linesMax), ...cut].map((line) => ({ line })) }];
}

function attachmentLine(index: Index, one: AttachmentReport): Markup {
  const { state, error, reason, policySince, node = "" } = one;
  const facts = [
    one.addresses.join(", ") || "no address",
    one.mac,
    node && `node ${node}`,
    `${state} since ${formatTime(one.failingSince ?? one.createdAt)}`,
    reason,
    policySince ? `policy in force since ${formatTime(policySince)}` : "",
    error,
  ].filter((fact) => fact !== "");
  return html`${one.interface} on ${networkLink(index, one.network)}: ${facts.join("; ")}`;
}

/** One failure in a line. @param names who or what of it the line must say */
function failureLine(index: Index, one: FailureReport, names: Markup, max = shortMax): Markup {
  const { requests, first, last, command } = one;
  const span = requests === 1 ? formatTime(last) : `${formatTime(first)} to ${formatTime(last)}`;
  const cause = link(index, tables.about.cause(one), String(one.code));
  const times = requests === 1 ? "once" : `${formatCount(requests)} times`;
  const error = html`<b class="bad">${shorten(tables.shownError(one), max)}</b>`;
  return html`${span}: ${names}, ${command} ${times}, code ${cause}: ${error}`;
}

/** Cuts a message that stands in full elsewhere, or in `genie report` of its pod. */
export const shorten = (text: string, max = shortMax): string =>
  text.length > max ? `${text.slice(0, max)}…` : text;

function requestLine(index: Index, one: RequestReport): Markup {
  const { kind, command, network, ifName, durationUs, outcome, decidedBy, node = "" } = one;
  const what =
    kind === "network" ? networkLink(index, network) : kind === "plugin" ? one.plugin : "the call";
  const isOk = outcome === "ok";
  const facts = [
    `${ifName}, ${formatDuration(durationUs)}`,
    decidedBy && `because of ${decidedBy}`,
    node && `node ${node}`,
    isOk ? one.addresses : "",
  ].filter((fact) => fact !== "");
  // The whole message is in the list of what failed.
  const end = html`<b class="${isOk ? "" : "bad"}">${shorten(tables.shownOutcome(one))}</b>`;
  const plugin = kind === "plugin" ? "plugin " : "";
  return html`${formatTime(one.at)} ${command} ${plugin}${what}: ${end} (${facts.join(", ")})`;
}

const order = (pods: readonly { health: Health; title: string }[]) =>
  pods.toSorted((a, b) => ranks[a.health] - ranks[b.health] || (a.title < b.title ? -1 : 1));

/** The worst of these. */
const worst = (all: readonly Health[]): Health =>
  all.reduce((one, other) => (ranks[other] < ranks[one] ? other : one), "good");

/** Does the network of this failure have the pod all the same? */
export function isAttached(index: Index, { namespace, pod, network }: FailureReport): boolean {
  const found = index.pods.get(tables.about.pod(namespace, pod));
  return (
    found?.attachments.some((one) => one.network === network && one.state === "attached") ?? false
  );
}

/** Failures of ADDs that stand for a pod without its network: recent, and no ADD came after. */
function missing(report: Report, index: Index): FailureReport[] {
  const sinceMs = Date.parse(report.generatedAt) - recentMs;
  return report.failures.filter((one) => {
    if (one.command !== "ADD" || Date.parse(one.last) <= sinceMs) return false;
    const { requests = [] } = index.pods.get(tables.about.pod(one.namespace, one.pod)) ?? {};
    const isLater = ({ command, network, outcome, at }: RequestReport) =>
      command === "ADD" && network === one.network && outcome === "ok" && at > one.last;
    return !isAttached(index, one) && !requests.some(isLater);
  });
}

/** A pod in the map. */
type Spot = { health: Health; title: string; name: string; href: string };

function spotOf(index: Index, one: AttachmentReport | FailureReport): Spot {
  const { namespace, pod, error } = one;
  const isThere = "state" in one;
  const who =
    isThere && pod === "" ? one.containerId.slice(0, 12) : tables.shownPod(namespace, pod);
  const words = isThere
    ? [one.state, one.interface, ...one.addresses, error]
    : [`failed ${formatCount(one.requests)} times`, error];
  const title = `${who}: ${words.filter((word) => word !== "").join(", ")}`;
  return {
    health: isThere ? (healthOf[one.state] ?? "warn") : "bad",
    title: tables.visibleText(shorten(title)),
    name: tables.visibleText(pod || who),
    href: index.ids.get(tables.about.pod(namespace, pod)) ?? (isThere ? "attachments" : "failures"),
  };
}

/**
 * The map of one node: its networks, and on each the pods that are attached or should be.
 * @param of.node its name in a report of many; absent for the only one
 * @param of.nodes how many are in the map
 */
export function mapOf(
  report: Report,
  index: Index,
  { node, nodes }: { node: string | undefined; nodes: number },
): { networks: (Values & { health: Health })[]; more: string } {
  const isHere = (one: { node?: string }) => node === undefined || one.node === node;
  const spots = new Map<string, Spot[]>();
  if (node === undefined) for (const { network } of report.networks) spots.set(network, []);
  for (const one of [...report.attachments, ...missing(report, index)].filter(isHere)) {
    spots.getOrInsertComputed(one.network, () => []).push(spotOf(index, one));
  }
  const most = Math.floor(mapPodsMax / nodes);
  const networks = [...spots].map(([network, all]) => {
    const count = (health: Health) => all.filter((one) => one.health === health).length;
    const [good, warn, bad] = [count("good"), count("warn"), count("bad")];
    const known = report.networks.find((one) => one.network === network);
    const { used, total } = known ? tables.fullerFamily(known) : { used: 0, total: null };
    const free =
      total === null || node !== undefined
        ? ""
        : `${formatCount(Math.max(0, total - used))} of ${formatCount(total)} addresses free`;
    const parts = [
      `${formatCount(good)} attached`,
      warn > 0 && `${formatCount(warn)} pending`,
      bad > 0 && `${formatCount(bad)} failed`,
      free,
    ].filter((part) => part !== false && part !== "");
    return {
      bad,
      size: all.length,
      health: worst(all.map(({ health }) => health)),
      network: networkLink(index, network),
      counts: parts.join(" · "),
      layout: all.length > namedMax ? "dense" : "",
      spots: order(all).slice(0, most),
      rest: all.length > most ? formatCount(all.length - most) : "",
    };
  });
  const ranked = networks.sort((a, b) => b.bad - a.bad || b.size - a.size);
  const more = ranked.length - mapNetworksMax;
  return { networks: ranked.slice(0, mapNetworksMax), more: more > 0 ? formatCount(more) : "" };
}

/** Values of page_item.html: a section about each pod, with what is known of it. */
export function podItems(
  index: Index,
  rulesOf: (namespace: string, name: string) => Values[],
  isOpen = false,
): Values[] {
  return [...index.pods].flatMap(([key, pod]) => {
    const id = index.ids.get(key);
    if (id === undefined) return [];
    const { namespace, name, attachments, failures, requests } = pod;
    const who = tables.shownPod(namespace, name);
    const states = attachments.map(({ state }) => healthOf[state] ?? "warn");
    const health = attachments.length === 0 && failures.length > 0 ? "bad" : worst(states);
    const has = attachments.length === 0 ? "not attached" : `${attachments.length} attached`;
    const failed = failures.reduce((sum, one) => sum + one.requests, 0);
    const own = (one: FailureReport) =>
      failureLine(index, one, networkLink(index, one.network), isOpen ? Infinity : 2 * shortMax);
    return {
      ...{ id, health, isOpen },
      title: tables.visibleText(who),
      about: failed === 0 ? has : `${has}, ${formatCount(failed)} failures`,
      lists: [
        ...list(
          "Has now",
          attachments.map((one) => attachmentLine(index, one)),
        ),
        ...list("Failed", failures.map(own)),
        ...list(
          "Its story, the newest first",
          requests.map((one) => requestLine(index, one)),
        ),
      ],
      rules: rulesOf(namespace, name),
      hint: isOpen ? "" : tables.visibleText(`genie report ${who}`),
    };
  });
}

/** The same about each network. */
export function networkItems(report: Report, index: Index): Values[] {
  const attached = Map.groupBy(report.attachments, ({ network }) => network);
  return report.networks.flatMap((network) => {
    const { network: name, requests, failures, attachments, add } = network;
    const id = index.ids.get(tables.about.network(name));
    if (id === undefined) return [];
    const { total, free } = freeOver(network);
    const least = Math.min(...free);
    const { buckets } = report.timeline;
    const median = formatDuration(add.p50Us);
    const when = formatTime(buckets[free.indexOf(least)]?.at ?? null);
    const facts = [
      html`${requests} requests, ${failures} failed; an ADD takes ${median} (median)`,
      html`${attachments} attachments now, ${tables.shownAddresses(network)} addresses in use`,
      free.length > 0
        ? html`${free.at(-1) ?? 0} of ${total} addresses free; fewest: ${least}, at ${when}`
        : html`free addresses over time are not known: its size is not, or not all was asked for`,
    ];
    const own = report.failures.filter((one) => one.network === name);
    const has = attached.get(name) ?? [];
    const more = has.length > itemsMax ? ", and more: genie pods" : "";
    const named = has.slice(0, itemsMax).map((one) => podLink(index, one).markup);
    const by = report.decisions.filter((one) => one.network === name);
    return {
      ...{
        id,
        health: failures > 0 ? "warn" : "good",
        title: tables.shownNetwork(tables.visibleText(name)),
      },
      about: `${formatCount(attachments)} attached, ${formatCount(failures)} failures`,
      lists: [
        ...list("In numbers", facts),
        ...list(
          "Failed",
          own.map((one) => failureLine(index, one, podLink(index, one))),
        ),
        ...list(
          "Who decides for it",
          by.map(
            (one) => html`${one.decidedBy || "not recorded"}: ${formatCount(one.requests)} ADDs`,
          ),
        ),
        ...(has.length > 0 ? list("Pods on it now", [trusted(named.join(", ") + more)]) : []),
      ],
    };
  });
}

/** The same about each cause. */
export function causeItems(report: Report, index: Index): Values[] {
  return report.causes.flatMap((one) => {
    const id = index.ids.get(tables.about.cause(one));
    if (id === undefined) return [];
    const own = report.failures.filter(
      (other) => tables.about.cause(other) === tables.about.cause(one),
    );
    const networks = one.networks.map(
      ({ network, requests }) => html`${networkLink(index, network)}: ${requests}`,
    );
    const names = (other: FailureReport) =>
      html`${podLink(index, other)} on ${networkLink(index, other.network)}`;
    return {
      ...{ id, health: "bad", title: `${one.cause}, code ${one.code}` },
      about: `${formatCount(one.requests)} requests`,
      lists: [
        ...list(
          "Newest message",
          one.error === "" ? [] : [html`${formatTime(one.at)}: ${tables.shownError(one)}`],
        ),
        ...list("By network", networks),
        ...list(
          "By pod, the newest first",
          own.map((other) => failureLine(index, other, names(other))),
        ),
      ],
    };
  });
}
