/** The sections of the report page: heading, chart, and the numbers of it as a table. Pure. */

import { formatCount, formatRate, formatShare } from "../config/quantity.ts";
import { type BarChart, busiest, type Charts, shownSpan, usedSpans } from "./charts.ts";
import { candidatesOf } from "./choice.ts";
import { html, type Markup, type Value } from "./html.ts";
import type { ChoiceReport, Report } from "./shape.ts";
import { printable } from "./table.ts";
import {
  shownAddresses,
  shownBucket,
  shownDuration,
  shownNetwork,
  shownOutcome,
  shownPod,
  shownRequestNetwork,
  shownTime,
} from "./words.ts";

/**
 * A column: `number` stands right, `head` names the row, `time` and `state` are never broken, a
 * `fault` is marked unless it is "ok".
 */
export interface PageColumn {
  title: string;
  kind?: "number" | "time" | "state" | "head" | "fault";
}

/** A column of numbers. */
export const number = (title: string): PageColumn => ({ title, kind: "number" });
/** The column that names the row. */
export const rowHead = (title: string): PageColumn => ({ title, kind: "head" });

/** Rows of one table on the page; the others are in the JSON. */
const rowsMax = 150;

/**
 * A table that scrolls sideways in its own box. With `cards` a phone shows each row as a card, for
 * tables of long texts.
 */
export function table(
  caption: string,
  columns: PageColumn[],
  rows: string[][],
  { cards = false }: { cards?: boolean } = {},
): Markup {
  const cell = (text: string, { title, kind }: PageColumn): Markup => {
    const clean = printable(text);
    if (kind === "head")
      return html`<th scope="row" class="words" data-label="${title}"><span>${clean}</span></th>`;
    const mark = kind === "fault" ? (clean === "ok" ? "words" : "words bad") : (kind ?? "words");
    return html`<td class="${mark}" data-label="${title}"><span>${clean}</span></td>`;
  };
  const row = (cells: string[]) =>
    html`<tr>${columns.map((column, i) => cell(cells[i] ?? "", column))}</tr>\n`;
  const more = rows.length - rowsMax;
  return html`<div class="scroll" role="region" aria-label="${caption}" tabindex="0">
<table class="${cards ? "cards" : ""}"><caption>${caption}</caption>
<thead><tr>${columns.map(
    ({ title, kind }) =>
      html`<th scope="col" class="${kind === "number" ? "number" : ""}">${title}</th>`,
  )}</tr></thead>
<tbody>
${rows.slice(0, rowsMax).map(row)}</tbody></table></div>
${more > 0 ? html`<p class="about">${formatCount(more)} more: genie report --json.</p>` : ""}`;
}

function details(summary: string, inside: Markup): Markup {
  return html`<details><summary>${summary}</summary>${inside}</details>`;
}

/** A part of the page under its heading. */
export function section(title: string, about: string, ...inside: Value[]): Markup {
  const line = about === "" ? "" : html`<p class="about">${about}</p>\n`;
  return html`<section>\n<h2>${title}</h2>\n${line}${inside}\n</section>`;
}

const empty = (text: string): Markup => html`<p class="empty">${text}</p>`;

/** The place of a chart, of its final height before it is drawn. */
function chart(name: keyof Charts, size: string, label: string, readout = ""): Markup {
  const line = readout === "" ? "" : html`\n<p class="readout" aria-live="off">${readout}</p>`;
  return html`<div><div class="chart ${size}" data-chart="${name}" role="img" aria-label="${label}">
<noscript>Charts need scripts; their numbers are in the tables.</noscript></div>${line}</div>`;
}

function legend(names: [tint: string, name: string][]): Markup {
  return html`<ul class="legend">${names.map(
    ([tint, name]) => html`<li><span class="swatch ${tint}"></span>${printable(name)}</li>`,
  )}</ul>\n`;
}

const noRequests = "No requests in this time.";

/** Requests over time. */
export function timeSection(report: Report, { time }: Charts): Markup {
  const title = "Requests over time";
  if (!time) return section(title, "", empty(noRequests));
  const rows = report.timeline.buckets
    .filter(({ ok, failed, denied }) => ok + failed + denied > 0)
    .map((one) => [
      shownTime(one.at),
      ...[one.ok, one.failed, one.denied].map((count) => formatCount(count)),
    ]);
  const span = shownBucket(report);
  return section(
    title,
    `Each bar is ${span}.`,
    legend(time.series.map(({ name }) => [name, name])),
    chart(
      "time",
      "tall",
      `Bars: requests in each ${span}`,
      "Point at a bar, or tap it, for its numbers.",
    ),
    details(
      "Numbers",
      table(
        `Requests by time, ${span} each; times without any are left out`,
        [{ title: "From (UTC)", kind: "time" }, number("OK"), number("Failed"), number("Denied")],
        rows.reverse(),
      ),
    ),
  );
}

/** One line for each network, with what it is judged by. */
export function networksSection({ networks }: Report): Markup {
  if (networks.length === 0) {
    return section("Networks", "", empty("No network has requests or attachments."));
  }
  return section(
    "Networks",
    "Percentiles are of ADDs that succeeded; addresses, traffic and attachments are of now.",
    table(
      "Networks and their numbers",
      [
        rowHead("Network"),
        ...["Requests", "Failed", "Share", "p50", "p95", "p99", "Addresses", "Traffic"].map(number),
        number("Attachments"),
      ],
      networks.map((one) => [
        shownNetwork(one.network),
        formatCount(one.requests),
        formatCount(one.failures),
        formatShare(one.failures, one.requests),
        shownDuration(one.add.p50Us),
        shownDuration(one.add.p95Us),
        shownDuration(one.add.p99Us),
        shownAddresses(one),
        one.bytesPerSecond === null ? "–" : formatRate(one.bytesPerSecond),
        formatCount(one.attachments),
      ]),
    ),
  );
}

/** How long ADDs took. */
export function latencySection(report: Report, { latency }: Charts): Markup {
  const title = "How long an ADD takes";
  if (!latency) return section(title, "", empty("No ADD succeeded in this time."));
  const shown = busiest(report);
  const { first, last } = usedSpans(report.totals.add.histogram);
  const rows = Array.from({ length: last - first + 1 }, (_, i) => first + i).map((span) => [
    shownSpan(report.latencyEdgesUs, span),
    ...shown.map(({ add }) => formatCount(add.histogram[span] ?? 0)),
  ]);
  const all = report.networks.filter(({ add }) => add.count > 0).length;
  const which = all > shown.length ? `, the ${shown.length} busiest of ${formatCount(all)}` : "";
  return section(
    title,
    `Share of each network's ADDs that took so long${which}.`,
    legend(latency.series.map(({ name }, i) => [`c${i}`, name])),
    chart(
      "latency",
      "tall",
      "Lines: share of each network's ADDs by duration",
      "Point at the lines, or tap them, for their numbers.",
    ),
    details(
      "Numbers",
      table(
        "Successful ADDs by duration",
        [rowHead("Took"), ...shown.map(({ network }) => number(shownNetwork(network)))],
        rows,
      ),
    ),
  );
}

const barSize = ({ names }: BarChart): string => `bars-${names.length}`;

/** Addresses in use. */
export function occupancySection({ networks }: Report, { occupancy }: Charts): Markup {
  const title = "Addresses in use";
  if (!occupancy) return section(title, "", empty("No attachment has an address."));
  const about =
    occupancy.max === undefined
      ? "No network's total is known; capacity in the plugin table tells it."
      : "Of the networks whose total is known.";
  return section(
    title,
    about,
    chart("occupancy", barSize(occupancy), "Bars: addresses in use of each network"),
    details(
      "Numbers",
      table(
        "Addresses of the attachments that exist now",
        [rowHead("Network"), ...["IPv4", "IPv4 total", "IPv6", "IPv6 total"].map(number)],
        networks.map(({ network, addresses: { ipv4, ipv6 } }) => [
          shownNetwork(network),
          ...[ipv4, ipv6].flatMap(({ used, total }) => [
            formatCount(used),
            total === null ? "unknown" : formatCount(total),
          ]),
        ]),
      ),
    ),
  );
}

/** Why requests failed. */
export function causesSection({ causes, totals }: Report, { causes: drawn }: Charts): Markup {
  const title = "Failures by cause";
  if (!drawn) {
    return section(title, "", empty(totals.requests === 0 ? noRequests : "Nothing failed."));
  }
  return section(
    title,
    "",
    chart("causes", barSize(drawn), "Bars: failed requests by cause"),
    table(
      "The newest message of each cause",
      [rowHead("Cause"), number("Code"), number("Requests"), { title: "Newest" }],
      causes.map(({ cause, code, requests, error, rule }) => [
        cause,
        String(code),
        formatCount(requests),
        rule === "" || error.includes(rule) ? error : `${error} (${rule})`,
      ]),
      { cards: true },
    ),
  );
}

/** Who decided, and the newest automatic choices. */
export function decisionsSection(report: Report, { decisions: drawn }: Charts): Markup {
  const title = "Choices made";
  const { choices, decisions } = report;
  if (!drawn) return section(title, "", empty("No ADD in this time."));
  return section(
    title,
    "Who decided that an ADD uses a network.",
    legend(drawn.series.map(({ name, tint }) => [tint, name])),
    chart("decisions", barSize(drawn), "Bars: ADDs of each network, by who decided"),
    details(
      "Numbers",
      table(
        "ADDs by network and who decided",
        [rowHead("Network"), { title: "Decided by" }, number("ADDs")],
        decisions.map(({ network, decidedBy, requests }) => [
          shownNetwork(network),
          decidedBy || "not recorded",
          formatCount(requests),
        ]),
      ),
    ),
    ...("nodes" in report
      ? []
      : [
          html`\n<h3>Newest automatic choices</h3>\n`,
          choices.length === 0
            ? empty("None in this time.")
            : choices.slice(0, rowsMax).map(choiceOf),
        ]),
  );
}

function choiceOf({ at, namespace, pod, network, choice }: ChoiceReport): Markup {
  const { columns, rows } = candidatesOf(choice);
  const title = `${shownTime(at)}: ${shownNetwork(network)} for ${shownPod(namespace, pod)}`;
  if (rows.length === 0) {
    return details(printable(title), html`<p>${printable(JSON.stringify(choice))}</p>`);
  }
  const heads = columns.map(({ title, isNumber }): PageColumn => {
    return isNumber ? number(printable(title)) : { title: printable(title) };
  });
  return details(printable(title), table("The candidates and their numbers", heads, rows));
}

/** One column more where the rows are of many nodes. */
function nodeColumn(rows: readonly { node?: string }[]) {
  const isThere = rows.some(({ node }) => node !== undefined);
  return {
    columns: isThere ? [{ title: "Node" }] : [],
    cells: ({ node = "" }: { node?: string }) => (isThere ? [node] : []),
  };
}

/** What could not be deleted. */
export function stuckSection({ stuck, totals }: Report): Markup {
  const title = "Leaked and failing attachments";
  if (stuck.length === 0) return section(title, "", empty("None: every DEL came to its end."));
  const ofNode = nodeColumn(stuck);
  const first = totals.leaked + totals.failing > stuck.length ? ` Listed: ${stuck.length}.` : "";
  return section(
    title,
    `${formatCount(totals.leaked)} leaked, which genie gc retries; ` +
      `${formatCount(totals.failing)} failing, which the runtime retries.${first}`,
    table(
      "Attachments whose DEL failed",
      [
        { title: "State", kind: "state" },
        { title: "Since (UTC)", kind: "time" },
        ...ofNode.columns,
        { title: "Network" },
        { title: "Pod" },
        { title: "Interface" },
        { title: "Error" },
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
      { cards: true },
    ),
  );
}

/** Network policy: whose rules are in force, and what is wrong with policies. */
export function policySection({ policy }: Report): Markup {
  if (!policy) return html``;
  const known = policy.knownAt === null ? "never" : `as of ${shownTime(policy.knownAt)} UTC`;
  return section(
    "Network policy",
    `Pods with rules: ${formatCount(policy.enforced)}. Policies known ${known}.`,
    policy.problems.length === 0
      ? empty("Nothing is wrong with any policy.")
      : table(
          "Problems in policies; the rest of each is in force",
          [
            { title: "Since (UTC)", kind: "time" },
            ...["Kind", "Policy", "Problem"].map((title) => ({ title })),
          ],
          policy.problems.map((one) => [
            shownTime(one.at),
            one.kind,
            shownPod(one.namespace, one.name),
            `${one.path}: ${one.problem}`,
          ]),
          { cards: true },
        ),
  );
}

/** The newest requests, one by one. */
export function requestsSection({ requests, totals }: Report): Markup {
  if (requests.length === 0) return section("Newest requests", "", empty(noRequests));
  const ofNode = nodeColumn(requests);
  return section(
    "Newest requests",
    `${formatCount(requests.length)} of ${formatCount(totals.requests)}.`,
    table(
      "Newest requests, the newest first",
      [
        { title: "Time (UTC)", kind: "time" },
        { title: "Command" },
        ...ofNode.columns,
        { title: "Pod" },
        { title: "Network" },
        number("Took"),
        { title: "Outcome", kind: "fault" },
      ],
      requests.map((one) => [
        shownTime(one.at),
        one.command,
        ...ofNode.cells(one),
        shownPod(one.podNamespace, one.podName),
        shownRequestNetwork(one),
        shownDuration(one.durationUs),
        shownOutcome(one),
      ]),
      { cards: true },
    ),
  );
}
