/**
 * CNI-Genie's policy between logical networks: the annotation `genieNetworkpolicy` of a
 * NetworkPolicy. Pure.
 *
 * Source: CNI-Genie docs/network-policy. A network that is selected talks within itself and with
 * its peer networks, both ways, and with nobody else; those that no policy selects are open. The
 * manual shows the annotation as in its samples below, without quotes and commas; its controller
 * reads JSON, under another spelling of the key. Both are understood.
 */
import { isObject } from "../json.ts";
import { type Report, shown, unknownKey } from "./rules.ts";

/** What one entry says. */
export interface NetworkRule {
  /** Name of the selected network; "*" when it cannot be read: every one of the namespace. */
  network: string;
  peers: string[];
}

/** Spellings of the annotation's key: the manual's, the controller's. */
export const genieKeys = ["genieNetworkpolicy", "genieNetworkPolicy"];

/**
 * Reads the annotation. What cannot be read admits no peer; when it is not even known which network
 * was meant, every logical network of the namespace is closed to the others.
 */
export function between(text: string | undefined, path: string, report: Report): NetworkRule[] {
  const entries = parseEntries(text ?? "");
  if (entries === undefined) {
    report(path, "it is no list of networkSelector and peerNetworks, all networks are closed");
    return [{ network: "*", peers: [] }];
  }
  return entries.map((entry, index) => parseEntry(entry, `${path}[${index}]`, report));
}

function parseEntry(entry: unknown, path: string, report: Report): NetworkRule {
  const selector = isObject(entry) ? entry["networkSelector"] : undefined;
  const name = typeof selector === "string" ? selector.trim() : "";
  if (!isObject(entry) || !isName(name)) {
    report(path, `networkSelector ${shown(selector)} is no network, all networks are closed`);
    return { network: "*", peers: [] };
  }
  const odd = unknownKey(entry, ["networkSelector", "peerNetworks"]);
  if (odd !== undefined) report(path, `unknown key ${shown(odd)}`);
  const listed = entry["peerNetworks"] ?? "";
  if (typeof listed !== "string") {
    report(path, "peerNetworks is no text of names with commas between");
    return { network: name, peers: [] };
  }
  const names = listed.split(",").map((one) => one.trim());
  const peers = names.filter((one) => one !== "");
  const bad = peers.filter((one) => !isName(one));
  for (const one of bad) report(path, `peer ${shown(one)} is no name of a network`);
  return { network: name, peers: [...new Set(peers.filter(isName))].sort() };
}

function isName(text: string): boolean {
  return /^(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?$/.test(text);
}

/** The entries, from JSON or from the manual's form; undefined where it is neither. */
function parseEntries(text: string): unknown[] | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return Array.isArray(value) ? value : undefined;
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
  }
  const bare = text.replaceAll(/\s+#[^\n]*/g, "").trim();
  if (!/^\[.*\]$/s.test(bare)) return undefined;
  const rest = bare.slice(1, -1).replaceAll(/\{[^{}]*\}/g, "");
  if (!/^[\s,]*$/.test(rest)) return undefined;
  return [...bare.matchAll(/\{([^{}]*)\}/g)].map(([, body = ""]) => parseLines(body));
}

/** `networkSelector: net1` and `peerNetworks: net2,net3`, on lines of their own. */
function parseLines(body: string): Record<string, string> | undefined {
  const lines = body.split("\n").map((line) => line.trim().replace(/,$/, ""));
  const pairs = lines.filter((line) => line !== "").map((line) => /^(\w+)\s*:\s*(.*)$/.exec(line));
  if (pairs.includes(null)) return undefined;
  return Object.fromEntries(pairs.map((pair) => [pair?.[1] ?? "", pair?.[2] ?? ""]));
}
