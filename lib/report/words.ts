/** How a report says things to people, on a terminal and on a page alike. Pure. */
import { formatCount, formatDuration, formatSpan } from "../config/quantity.ts";
import type { AddressReport, NetworkReport, Report, RequestReport } from "./shape.ts";

/** An ISO time of a report for people; "–" for none. */
export function shownTime(iso: string | null): string {
  return iso ? iso.slice(0, 19).replace("T", " ") : "–";
}

/** A duration of a report for people; "–" where there is none. */
export function shownDuration(us: number | null): string {
  return us === null ? "–" : formatDuration(us);
}

/** The family that is nearer to its end; where no total is known, the one with more in use. */
export function fullerFamily({ addresses }: NetworkReport): AddressReport {
  const share = ({ used, total }: AddressReport) => (total === null ? -1 : used / total);
  const { ipv4, ipv6 } = addresses;
  if (share(ipv4) === share(ipv6)) return ipv4.used >= ipv6.used ? ipv4 : ipv6;
  return share(ipv4) > share(ipv6) ? ipv4 : ipv6;
}

/** `used/total` of the {@link fullerFamily}, or `used` where the total is not known. */
export function shownAddresses(network: NetworkReport): string {
  const { used, total } = fullerFamily(network);
  return total === null ? formatCount(used) : `${formatCount(used)}/${formatCount(total)}`;
}

/** `namespace/name` of a pod; "–" when nobody said who it is. */
export function shownPod(namespace: string, name: string): string {
  return name === "" ? "–" : `${namespace}/${name}`;
}

/** The network of a request; a call that failed before any network has none. */
export function shownRequestNetwork({ kind, network }: RequestReport): string {
  return shownNetwork(kind === "call" ? "" : network);
}

/** How a request ended: `ok`, or what failed and why. */
export function shownOutcome({ outcome, code, error, rule }: RequestReport): string {
  if (outcome === "ok") return "ok";
  const by = rule === "" || error.includes(rule) ? "" : ` (${rule})`;
  return `${outcome} ${code}: ${error}${by}`;
}

/** One line: what the requests of a report are limited to; "" when to nothing. */
export function shownFilter({ filter }: Report): string {
  const parts = [
    filter.since && `since ${shownTime(filter.since)}`,
    filter.network && `network ${filter.network}`,
    filter.namespace && `namespace ${filter.namespace}`,
    filter.pod && `pod ${filter.pod}`,
    filter.command && `command ${filter.command}`,
    filter.only && `${filter.only} only`,
  ];
  return parts.filter((part) => part !== null).join(", ");
}

/** The name of a network; a call can fail before it names one. */
export function shownNetwork(name: string): string {
  return name === "" ? "(none)" : name;
}

/** The length of one bucket of the timeline, in words. */
export function shownBucket({ timeline }: Report): string {
  return formatSpan(timeline.bucketMs);
}
