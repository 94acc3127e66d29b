/**
 * The report as one self-contained page: tables with every number, and above them charts that a
 * script draws from the same numbers. A report in, HTML out.
 *
 * The page loads nothing: its policy allows its own two scripts and its own style, by hash, and no
 * request at all. Names come from others: `html` escapes every value put into it, the charts get
 * theirs as JSON that cannot end its script, and draw text, never HTML.
 */
import { createHash } from "node:crypto";
import { formatCount, formatShare } from "../config/quantity.ts";
import { assets } from "./assets.ts";
import { chartsOf } from "./charts.ts";
import { html, type Markup, scriptJson, trusted } from "./html.ts";
import { nodesSection } from "./nodes.ts";
import {
  causesSection,
  decisionsSection,
  latencySection,
  networksSection,
  occupancySection,
  policySection,
  requestsSection,
  stuckSection,
  timeSection,
} from "./sections.ts";
import type { ClusterReport, Report } from "./shape.ts";
import { printable } from "./table.ts";
import { shownDuration, shownFilter, shownTime } from "./words.ts";

/** Heights of the charts with lying bars, so that nothing moves when they are drawn. */
const barHeights = Array.from({ length: 12 }, (_, i) => `.bars-${i + 1}{height:${(i + 1) * 32}px}`);

/** Formats the page. Its size does not depend on how many requests there were. */
export function formatPage(report: Report | ClusterReport): string {
  const charts = chartsOf(report);
  const style = `${assets.libraryStyle}\n${assets.style}\n${barHeights.join("")}`;
  const policy =
    `default-src 'none'; script-src ${hash(assets.library)} ${hash(assets.script)}; ` +
    `style-src ${hash(style)}; base-uri 'none'; form-action 'none'`;
  const page = html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="${policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>Genie report</title>
<style>${trusted(style)}</style>
</head>
<body>
<header>
<h1>Genie report</h1>
<p class="meta">${subtitle(report)}</p>
${report.notices.map((text) => html`<p class="note">${printable(text)}</p>\n`)}
</header>
<main>
${tiles(report)}
${timeSection(report, charts)}
${networksSection(report)}
${"nodes" in report ? nodesSection(report.nodes) : ""}
<div class="pair">
<div>
${latencySection(report, charts)}
${causesSection(report, charts)}
</div>
<div>
${occupancySection(report, charts)}
${decisionsSection(report, charts)}
</div>
</div>
${stuckSection(report)}
${policySection(report)}
${requestsSection(report)}
</main>
<footer>
<p>Made ${shownTime(report.generatedAt)} from ${printable(report.record)}. All times are UTC.</p>
<details><summary>Charts by uPlot, MIT licence</summary><pre>${assets.licence}</pre></details>
</footer>
<script type="application/json" id="data">${scriptJson(charts)}</script>
<script>${trusted(assets.library)}</script>
<script>${trusted(assets.script)}</script>
</body>
</html>
`;
  return page.markup;
}

/** A source of the policy that allows exactly this text. */
function hash(text: string): string {
  return `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
}

function subtitle(report: Report): string {
  const filter = shownFilter(report);
  const span =
    report.from === null
      ? "No requests on record"
      : `${shownTime(report.from)} to ${shownTime(report.to)} UTC`;
  return filter === "" ? span : `${span}; ${printable(filter)}`;
}

function tiles(report: Report): Markup {
  const where = "nodes" in report ? "these nodes" : "this node";
  const { requests, failures, denied, add, attachments, leaked, failing } = report.totals;
  const all: [title: string, value: string, more: string][] = [
    ["Requests", formatCount(requests), `${formatCount(requests - failures)} succeeded`],
    [
      "Failed",
      formatShare(failures, requests),
      `${formatCount(failures)}, of them ${formatCount(denied)} denied`,
    ],
    ["Time of an ADD", shownDuration(add.p50Us), `median; 99% within ${shownDuration(add.p99Us)}`],
    ["Attachments now", formatCount(attachments), `interfaces of pods on ${where}`],
    ["Leaked", formatCount(leaked), `${formatCount(failing)} failing`],
  ];
  const tile = ([title, value, more]: (typeof all)[number]) => html`<div><dt>${title}</dt>
<dd class="big">${value}</dd><dd class="small">${more}</dd></div>
`;
  return html`<dl class="tiles">${all.map(tile)}</dl>`;
}
