/** The nodes of a cluster on the report page. Pure. */

import { formatCount } from "../config/quantity.ts";
import type { Markup } from "./html.ts";
import { number, rowHead, section, table } from "./sections.ts";
import type { NodeReport } from "./shape.ts";
import { shownDuration } from "./words.ts";

/** One line for each node, of a report of many. */
export function nodesSection(nodes: readonly NodeReport[]): Markup {
  const rank = ({ error, totals }: NodeReport) =>
    error !== "" ? Number.POSITIVE_INFINITY : totals.leaked + totals.failing;
  const sorted = nodes.toSorted(
    (a, b) =>
      (rank(a) === rank(b) ? 0 : rank(b) - rank(a)) || b.totals.failures - a.totals.failures,
  );
  const missing = nodes.filter(({ error }) => error !== "").length;
  return section(
    "Nodes",
    `${formatCount(nodes.length - missing)} of ${formatCount(nodes.length)} answered; those with ` +
      "the most trouble first.",
    table(
      "Nodes and their numbers",
      [
        rowHead("Node"),
        ...["Requests", "Failed", "p50", "p99", "Addresses", "Attachments", "Stuck"].map(number),
        { title: "Genie" },
        { title: "Answer", kind: "fault" },
      ],
      sorted.map(({ node, error, genie, totals, addresses }) => [
        node,
        ...(error !== ""
          ? Array.from({ length: 7 }, () => "–")
          : [
              formatCount(totals.requests),
              formatCount(totals.failures),
              shownDuration(totals.add.p50Us),
              shownDuration(totals.add.p99Us),
              formatCount(addresses.ipv4 + addresses.ipv6),
              formatCount(totals.attachments),
              formatCount(totals.leaked + totals.failing),
            ]),
        genie,
        error || "ok",
      ]),
    ),
  );
}
