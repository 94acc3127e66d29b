/** Records for the tests of reports: a state folder whose ledger and attachments were made up. */
import { closeState, type State, write } from "../lib/database.ts";
import { insertLedger } from "../lib/ledger.ts";
import type { Attachment, LedgerRow } from "../lib/record.ts";
import { setFailing } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import { insertPlanned, setAttached } from "../lib/write_ahead.ts";
import { makeHost } from "./fakes.ts";

/** 2026-09-01 00:00:00 UTC. */
export const startMs = Date.UTC(2026, 8, 1);

/** Opens a record that has a ledger, calls, closes. */
export function withLedger<T>(dir: string, fn: (state: State) => T): T {
  const state = openState(makeHost(), dir);
  try {
    return write(state, () => fn(state));
  } finally {
    closeState(state);
  }
}

/** A row of the ledger: an ADD of network blue that succeeded in 12 ms, but for what is given. */
export function ledgerRow(more: Partial<LedgerRow> = {}): LedgerRow {
  return {
    atMs: startMs,
    kind: "network",
    command: "ADD",
    containerId: "c1",
    podNamespace: "team-a",
    podName: "web",
    podUid: "uid-1",
    network: "blue",
    plugin: "bridge,portmap",
    ifName: "eth0",
    durationUs: 12_000,
    outcome: "ok",
    code: 0,
    error: "",
    addresses: "10.1.0.5/16",
    configHash: "0123456789abcdef",
    decidedBy: "annotation",
    rule: "",
    choice: "",
    ...more,
  };
}

/** An attachment to make up. */
export interface MadeAttachment {
  containerId?: string;
  network?: string;
  ifName?: string;
  namespace?: string;
  pod?: string;
  addresses?: string[];
  /** Why its DEL failed, and how it stands since. */
  stuck?: { state: "failing" | "leaked"; error: string; atMs: number };
}

/** A plan of one attachment to network blue, but for what is given. */
export function madeAttachment(more: Partial<Attachment> = {}): Attachment {
  const { network = "blue", ifName = "eth0" } = more;
  return {
    containerId: "c1",
    requestIfName: "eth0",
    requestNetwork: "genie",
    ifName,
    primary: ifName === "eth0",
    network,
    reason: "asked for by cni",
    list: {
      cniVersion: "1.0.0",
      name: network,
      disableCheck: false,
      disableGC: false,
      plugins: [{ type: "bridge" }],
    },
    plugins: ["/opt/cni/bin/bridge"],
    cniArgs: "",
    cniPath: "/opt/cni/bin",
    capabilityArgs: {},
    args: {},
    timeoutMs: 1000,
    netns: "",
    pod: { namespace: "team-a", name: "web", uid: "uid-1" },
    ...more,
  };
}

/** Records an attachment whose ADD succeeded. */
export function addAttachment(state: State, one: MadeAttachment = {}): void {
  const { containerId = "c1", network = "blue", ifName = "eth0", stuck } = one;
  const pod = { namespace: one.namespace ?? "team-a", name: one.pod ?? "web", uid: "uid-1" };
  const attachment = madeAttachment({ containerId, network, ifName, pod });
  insertPlanned(state, [attachment], startMs);
  const ips = (one.addresses ?? ["10.1.0.5/16"]).map((address) => ({ address }));
  setAttached(state, attachment, { cniVersion: "1.0.0", ips });
  if (!stuck) return;
  setFailing(state, attachment, { state: stuck.state, error: stuck.error, nowMs: stuck.atMs });
}

/** Records what was measured of an attachment's traffic. */
export function addTraffic(
  state: State,
  { containerId, network, rate }: { containerId: string; network: string; rate: number },
): void {
  state.database
    .query("INSERT INTO traffic VALUES (?, 'eth0', ?, ?, ?, 0, ?)")
    .run(containerId, network, `veth-${containerId}`, startMs, rate);
}

/** Numbers that look random and are the same each time, from 0 to 1. */
export function* noise(seed = 1): Generator<number, never> {
  for (let at = seed; ; ) {
    at = (at * 48_271) % 2_147_483_647;
    yield at / 2_147_483_647;
  }
}

const networks = ["calico", "flannel", "storage", "weave", "macvlan"];
const causes: [code: number, error: string][] = [
  [103, "plugin bridge timed out after 5000 ms"],
  [11, "the API server at https://10.96.0.1:443 does not answer"],
  [7, 'plugin macvlan says: invalid master "eth9"'],
  [999, "plugin bridge exited with status 2"],
];

/** Appends rows as a busy node of a week would have: busy days, quiet nights, some failures. */
export function addBusyWeek(state: State, count: number): void {
  const random = noise();
  const next = () => random.next().value;
  const spanMs = 7 * 86_400_000;
  const rows: LedgerRow[] = [];
  const flush = () => insertLedger(state, rows.splice(0));
  for (let i = 0; i < count; i++) {
    const day = (i / count) * 7;
    const shift = Math.sin(2 * Math.PI * day) * 0.09;
    const kind = Math.floor(next() * next() * networks.length);
    const network = networks[kind] ?? "calico";
    const luck = next();
    const [code, error] = causes[Math.floor(next() * next() * causes.length)] ?? [999, ""];
    const denied = luck < 0.006;
    const failed = luck < 0.025;
    const bell = (next() + next() + next()) / 3 - 0.5;
    rows.push(
      ledgerRow({
        atMs: Math.round(startMs + Math.min(0.9999, Math.max(0, (day - shift) / 7)) * spanMs),
        command: next() < 0.46 ? "DEL" : "ADD",
        containerId: `c${i}`,
        podNamespace: `team-${"abcde"[i % 5]}`,
        podName: `web-${(i % 400).toString(36)}`,
        network,
        durationUs: Math.round(16_000 * Math.exp(kind * 0.55 + bell * 3)),
        outcome: denied ? "denied" : failed ? "failed" : "ok",
        code: denied ? 100 : failed ? code : 0,
        error: denied
          ? `Access to network "${network}" denied for pod team-a/web`
          : failed
            ? `Cannot attach network "${network}": ${error}`
            : "",
        rule: denied ? "plugins.storage.allow at /etc/cni/genie/plugins.toml:12" : "",
        decidedBy: ["cni", "cni", "default", "choice", "definition"][Math.floor(next() * 5)] ?? "",
      }),
    );
    if (rows.length === 1000) flush();
  }
  flush();
}

/** The numbers of a choice between two networks, as the ledger keeps them. */
export const choiceOfTwo = JSON.stringify({
  network: "calico",
  candidates: [
    {
      ...{ network: "calico", occupancy: 0.12, responseTimeUs: 34_000, failures: 0.02 },
      ...{ bandwidth: 1_200_000, subnets: 1, recent: 0, score: 8.91, figures: { occupancy: 1 } },
    },
    {
      ...{ network: "flannel", occupancy: 0.61, responseTimeUs: 51_000, failures: 0 },
      ...{ subnets: 1, recent: 3, score: 6.4, figures: { occupancy: 0.44 } },
    },
  ],
  rejected: [{ network: "storage", reason: "it is full (host-local's store)" }],
});
