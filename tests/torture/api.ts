/**
 * The API server dies, lies, stalls and changes its keys while pods start: at the GET of the pod,
 * at that of a network, at the PATCH of the status. An ADD without its answer fails in time, names
 * the request, the server and the files with the credentials, never the token, leaves nothing, and
 * works as soon as the server does. A pod that has its networks keeps them, its status waits.
 */
import { Database } from "bun:sqlite";
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type ApiServer, type Fault, startApiServer } from "../apiserver.ts";
import { calls, type GenieRun, tempDir } from "../fakes.ts";
import { left, makeNode, type Node, wire, wireError } from "../wire.ts";
import { type Door, doors, openDoor } from "./doors.ts";
import { type Count, type Outcome, type Part, type PartOptions, runCases } from "./part.ts";

const networksKey = "k8s.v1.cni.cncf.io/networks";
const statusKey = "k8s.v1.cni.cncf.io/network-status";
const podPath = "/api/v1/namespaces/team/pods/web";
const group = "k8s.cni.cncf.io";
const resource = "network-attachment-definitions";
const networkPath = `/apis/${group}/v1/namespaces/team/${resource}/a`;

/**
 * Limits of one request in ms: where it is to be reached, where a PATCH is to reach it after a GET
 * that does not, and where nothing is; and what a call may take besides on a busy machine.
 */
const limitMs = { soon: 700, later: 3000, never: 30_000 };
const littleMs = 20_000;

/** A server that goes wrong at every request, and what is said of it. */
interface Row {
  name: string;
  /** @param object what the right answer would hold */
  fault: (object: string) => Fault;
  says: string | RegExp;
}

const json = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
const raw = (parts: (string | Uint8Array | number)[], ending: "keep" | "end" | "drop"): Fault => ({
  kind: "raw",
  parts,
  ending,
});
const sized = (bytes: number, body: string): string =>
  `${json}Content-Length: ${bytes}\r\n\r\n${body}`;
const chunk = (body: string): string => `${body.length.toString(16)}\r\n${body}\r\n`;
const chunked = (...chunks: string[]): string =>
  `${json}Transfer-Encoding: chunked\r\n\r\n${chunks.join("")}`;
const half = (text: string): string => text.slice(0, text.length / 2);
/** Something now and then, for longer than a request may take. */
const dripping = (first: string, drop: string): Fault =>
  raw([first, ...Array.from({ length: 40 }, () => [drop, 50]).flat()], "keep");
const status = (number: number, retryAfter?: string): Fault => ({
  kind: "status",
  status: number,
  ...(retryAfter !== undefined && { retryAfter }),
});
const broken = "the connection failed";
const late = "no answer within ";
const notJson = "the answer is not a JSON object";
const noObject = "the answer is no object of the API";
const otherName = (object: string): string => object.replace(/"name":"(web|a)"/, '"name":"other"');

const rows: Row[] = [
  { name: "headers, then dead", fault: (o) => raw([sized(o.length, "")], "drop"), says: broken },
  {
    name: "half a body, dead",
    fault: (o) => raw([sized(o.length, half(o))], "drop"),
    says: broken,
  },
  {
    name: "half a body, closed",
    fault: (o) => raw([sized(o.length, half(o))], "end"),
    says: broken,
  },
  {
    name: "half a body, stalled",
    fault: (o) => raw([sized(o.length, half(o))], "keep"),
    says: late,
  },
  { name: "half of the chunks, dead", fault: (o) => raw([chunked(half(o))], "drop"), says: broken },
  {
    name: "every chunk but the last, closed",
    fault: (o) => raw([chunked(chunk(o))], "end"),
    says: broken,
  },
  {
    name: "every chunk but the last, stalled",
    fault: (o) => raw([chunked(chunk(o))], "keep"),
    says: late,
  },
  { name: "a chunk of no size", fault: (o) => raw([chunked(`zz\r\n${o}`)], "end"), says: broken },
  {
    name: "no length, half, closed",
    fault: (o) => raw([`${json}\r\n${half(o)}`], "end"),
    says: notJson,
  },
  { name: "no length, stalled", fault: (o) => raw([`${json}\r\n${o}`], "keep"), says: late },
  { name: "a length too short", fault: (o) => raw([sized(10, o)], "end"), says: notJson },
  { name: "a length too long", fault: (o) => raw([sized(o.length + 9, o)], "end"), says: broken },
  {
    name: "a length too long, stalled",
    fault: (o) => raw([sized(o.length + 9, o)], "keep"),
    says: late,
  },
  { name: "a length below zero", fault: (o) => raw([sized(-1, o)], "end"), says: broken },
  { name: "a body in drops", fault: () => dripping(sized(1000, ""), " "), says: late },
  {
    name: "headers in drops",
    fault: () => dripping("HTTP/1.1 200 OK\r\n", "X: y\r\n"),
    says: late,
  },
  {
    name: "100 Continue for ever",
    fault: () => dripping("", "HTTP/1.1 100 Continue\r\n\r\n"),
    says: late,
  },
  {
    name: "headers without end",
    fault: () => raw([json, "X: y\r\n".repeat(2e5)], "end"),
    says: broken,
  },
  { name: "another protocol", fault: () => raw(["SSH-2.0-x\r\n\r\n"], "end"), says: broken },
  {
    name: "a broken compressed answer",
    fault: () => raw([`${json}Content-Encoding: gzip\r\n\r\n`, "garbage"], "end"),
    says: notJson,
  },
  { name: "a hang", fault: () => ({ kind: "hang" }), says: late },
  { name: "an answer after the deadline", fault: () => ({ kind: "delay", ms: 5000 }), says: late },
  { name: "a reset", fault: () => ({ kind: "reset" }), says: broken },
  { name: "429", fault: () => status(429), says: "429, the server is too busy" },
  { name: "429, at once", fault: () => status(429, "0"), says: "429, the server is too busy" },
  { name: "429, in an hour", fault: () => status(429, "3600"), says: "come back in 3600 s" },
  { name: "429, never", fault: () => status(429, "9".repeat(300)), says: "too busy" },
  {
    name: "429, at a date",
    fault: () => status(429, new Date(Date.now() + 9e6).toUTCString()),
    says: /come back in (89\d\d|9000) s/,
  },
  {
    name: "429, at a date long ago",
    fault: () => status(429, new Date(0).toUTCString()),
    says: "429",
  },
  { name: "429, nonsense", fault: () => status(429, "-1e999, soon"), says: "too busy" },
  { name: "500", fault: () => status(500), says: "status 500" },
  { name: "503", fault: () => status(503, "31"), says: "status 503, it says to come back in 31 s" },
  {
    name: "a status of 0",
    fault: (o) => raw([`HTTP/1.1 000 x\r\n\r\n${o}`], "end"),
    says: "status 0",
  },
  { name: "401", fault: () => status(401), says: "401 Unauthorized" },
  {
    name: "403",
    fault: () => status(403),
    says: "403 Forbidden, grant these credentials the verb",
  },
  {
    name: "a redirect",
    fault: () => ({ kind: "redirect", location: "http://127.0.0.1/" }),
    says: "302, a redirect, is refused",
  },
  { name: "204", fault: () => raw(["HTTP/1.1 204 No Content\r\n\r\n"], "end"), says: notJson },
  {
    name: "32 MiB",
    fault: () => ({ kind: "flood", bytes: 32 << 20 }),
    says: "larger than 8388608",
  },
  { name: "HTML", fault: () => ({ kind: "garbage", text: "<html>" }), says: notJson },
  { name: "a list", fault: () => ({ kind: "garbage", text: "[]" }), says: notJson },
  {
    name: "a million brackets",
    fault: () => ({ kind: "garbage", text: `{"a":${"[".repeat(1e6)}${"]".repeat(1e6)}}` }),
    says: noObject,
  },
  {
    name: "a million brackets, unclosed",
    fault: () => ({ kind: "garbage", text: '{"a":'.repeat(1e6) }),
    says: notJson,
  },
  { name: "an empty object", fault: () => ({ kind: "garbage", text: "{}" }), says: noObject },
  {
    name: "a failure that says 200",
    fault: () => ({ kind: "garbage", text: '{"kind":"Status","metadata":{},"code":500}' }),
    says: noObject,
  },
  {
    name: "another object",
    fault: (o) => ({ kind: "garbage", text: otherName(o) }),
    says: "the answer is another object, team/other",
  },
];

/** Rows whose answer to a PATCH says that it was done: what is in its body is of no interest. */
const acceptsPatch = new Set(["a million brackets", "an empty object", "a failure that says 200"]);
acceptsPatch.add("another object");

/** One API server, and whatever it must never be seen to know. */
interface Lab {
  api: ApiServer;
  secrets: string[];
}

async function openLab(dir: string): Promise<Lab> {
  const api = await startApiServer(dir, { keepAlive: false });
  api.put(podPath, {
    metadata: { uid: "u-1", annotations: { [networksKey]: "a" } },
    spec: { serviceAccountName: "runner" },
  });
  api.put(networkPath, { spec: { config: '{"cniVersion":"1.0.0","type":"second"}' } });
  return { api, secrets: [api.token] };
}

function makeCluster(kubeconfig: string): Node {
  const reserve = "$DIR/reserved";
  const first = { cniVersion: "1.0.0", name: "blue", plugins: [{ type: "first" }] };
  return makeNode({
    table:
      'log_file = "$DIR/log"\nlog_level = "debug"\n[default]\nnetworks = ["blue"]\n' +
      `[kubernetes]\nkubeconfig = "${kubeconfig}"\ntimeout = "${limitMs.never}ms"\n`,
    lists: { "10-blue.conflist": first },
    delegates: { first: { reserve }, second: { reserve, ips: ["10.9.0.2/24"] } },
  });
}

/** Writes another limit of one request into the table. */
function setLimit({ tableFile }: Node, ms: number): void {
  const table = readFileSync(tableFile, "utf8");
  writeFileSync(tableFile, table.replace(/timeout = "\d+ms"/, `timeout = "${ms}ms"`));
}

/** Where annotations come from: without them the pod is asked for, else only its network. */
type Place = "pod" | "network" | "status";

interface Call extends GenieRun {
  ms: number;
}

const args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=team;K8S_POD_NAME=web;K8S_POD_UID=u-1";

async function call(node: Node, { secrets }: Lab, command: string, place: Place): Promise<Call> {
  const annotations = { "io.kubernetes.cri.pod-annotations": { [networksKey]: "a" } };
  const stdin = place === "pod" ? {} : { runtimeConfig: annotations };
  const startedMs = performance.now();
  const run = await wire(node, { command, env: { CNI_ARGS: args }, stdin });
  const ms = performance.now() - startedMs;
  const log = join(node.dir, "log");
  const seen = `${run.stdout}${run.stderr}${existsSync(log) ? readFileSync(log, "utf8") : ""}`;
  if (secrets.some((secret) => seen.includes(secret))) throw new Error(`a token is shown: ${seen}`);
  return { ...run, ms };
}

function expectThat(isSo: boolean, what: string, run: GenieRun | string): void {
  if (isSo) return;
  const said = typeof run === "string" ? run : `${run.status} ${run.stdout}${run.stderr}`;
  throw new Error(`${what}: ${said.trim().slice(0, 1500)}`);
}

function expectNothing(node: Node, after: string): void {
  using database = new Database(join(node.state, "genie.db"), { readonly: true });
  const locks = database.query("SELECT * FROM operations").all();
  const waiting = database.query("SELECT * FROM statuses").all();
  const found = { ...left(node), locks, waiting };
  const isEmpty = Object.values(found).every((list) => list.length === 0);
  expectThat(isEmpty, `left after ${after}`, JSON.stringify(found));
}

/** Is the answer of an ADD whole, with both networks? */
const isWhole = ({ status, stdout }: GenieRun): boolean =>
  status === 0 && /"eth0"/.test(stdout) && /"net1"/.test(stdout);

/** An ADD that works and is published, and its DEL. */
async function works(node: Node, lab: Lab, place: Place, when: string): Promise<void> {
  lab.api.heal();
  const added = await call(node, lab, "ADD", place);
  expectThat(isWhole(added) && warnings(added) === "", `ADD ${when}`, added);
  const annotations = annotationsOf(lab);
  expectThat(annotations[statusKey] !== undefined, `status ${when}`, JSON.stringify(annotations));
  await gone(node, lab, place, when);
  delete annotations[statusKey];
}

/** What was written to stderr for the operator; not the debug lines. */
const warnings = ({ stderr }: GenieRun): string =>
  stderr
    .split("\n")
    .filter((line) => !line.startsWith("genie: debug: "))
    .join("\n");

function annotationsOf({ api }: Lab): Record<string, string> {
  const { metadata } = api.object(podPath) as { metadata: { annotations: Record<string, string> } };
  return metadata.annotations;
}

/** DEL, which asks nobody and leaves nothing. */
async function gone(node: Node, lab: Lab, place: Place, when: string): Promise<void> {
  const before = lab.api.requests.length;
  const deleted = await call(node, lab, "DEL", place);
  expectThat(deleted.status === 0 && deleted.stdout === "", `DEL ${when}`, deleted);
  expectThat(lab.api.requests.length === before, `DEL ${when}`, "it asked the API");
  expectNothing(node, `DEL ${when}`);
}

const targets = { pod: "pods team/web", network: `${resource}.${group} team/a` };

/** An ADD that fails as it should; its message. */
async function fails(
  node: Node,
  lab: Lab,
  place: "pod" | "network",
  expected: { says: string | RegExp; url?: string; code?: number },
): Promise<void> {
  const { says, url = lab.api.url, code = 11 } = expected;
  const before = calls(node.bin).length;
  const ms = says === late ? limitMs.soon : limitMs.never;
  setLimit(node, ms);
  const run = await call(node, lab, "ADD", place);
  setLimit(node, limitMs.never);
  expectThat(run.status === 1, `ADD (${place})`, run);
  const error = wireError(run);
  const names = [`Cannot get ${targets[place]} at ${url}: `, `(credentials: ${lab.api.dir}/`];
  const isNamed = code !== 11 || names.every((part) => error.msg.includes(part));
  const isSaid = typeof says === "string" ? error.msg.includes(says) : says.test(error.msg);
  expectThat(error.code === code && isNamed && isSaid, `error (${place}), not "${says}"`, run);
  expectThat(run.ms < ms + littleMs, `ADD (${place}) took ${run.ms} ms`, run);
  expectThat(calls(node.bin).length === before, `ADD (${place})`, "plugins were called");
  expectNothing(node, `a failed ADD (${place})`);
}

/** The pod has its networks; only its status cannot be published. */
async function waits(node: Node, lab: Lab, { name, fault, says }: Row): Promise<void> {
  const patched = JSON.stringify(lab.api.object(podPath));
  lab.api.misbehave("none", ...Array<Fault>(30).fill(fault(patched)));
  const ms = says === late ? limitMs.later : limitMs.never;
  setLimit(node, ms);
  const run = await call(node, lab, "ADD", "status");
  setLimit(node, limitMs.never);
  lab.api.heal();
  expectThat(isWhole(run), "ADD whose status fails", run);
  expectThat(run.ms < 2 * ms + littleMs, `ADD (status) took ${run.ms} ms`, run);
  using database = new Database(join(node.state, "genie.db"), { readonly: true });
  const rows = database.query("SELECT * FROM statuses").all() as Record<string, unknown>[];
  const waiting = rows.map((row) => JSON.stringify(row)).join();
  if (acceptsPatch.has(name)) expectThat(warnings(run) === "" && waiting === "", "status", run);
  else {
    const said = warnings(run);
    const isWarning = said.startsWith("genie: warn: Cannot publish network status: Cannot patch");
    const isSaid = typeof says === "string" ? said.includes(says) : says.test(said);
    expectThat(isWarning && isSaid, `warning, not "${says}"`, run);
    expectThat(/network-status.*team\/a/.test(waiting), "status that waits", waiting);
  }
  await gone(node, lab, "status", "of a pod whose status waits");
}

async function runRow(lab: Lab, row: Row, count: Count): Promise<void> {
  using node = makeCluster(lab.api.kubeconfig("tokenFile"));
  for (const place of ["pod", "network"] as const) {
    const object = lab.api.object(place === "pod" ? podPath : networkPath);
    lab.api.misbehave(...Array<Fault>(30).fill(row.fault(JSON.stringify(object))));
    await fails(node, lab, place, row);
    await works(node, lab, place, `after it (${place})`);
    count("failed ADDs");
  }
  await waits(node, lab, row);
  count("statuses that wait");
}

async function runDoor(lab: Lab, door: Door, count: Count): Promise<void> {
  const listening = await openDoor(door);
  const file = join(lab.api.dir, "kubeconfig-door");
  try {
    const healthy = readFileSync(lab.api.kubeconfig("tokenFile"), "utf8");
    writeFileSync(file, healthy.replace(lab.api.url, listening.url));
    using node = makeCluster(file);
    await fails(node, lab, "pod", { says: door.says, url: listening.url });
    await fails(node, lab, "network", { says: door.says, url: listening.url });
    count("failed ADDs", 2);
    writeFileSync(file, healthy);
    await works(node, lab, "pod", "after it");
  } finally {
    await listening.stop();
  }
}

/** Servers that get well, keys and tokens that change while the node is in use. */
const changes: Record<string, (lab: Lab, count: Count) => Promise<void>> = {
  "a new serving certificate": async (lab) => {
    using node = makeCluster(lab.api.kubeconfig("tokenFile"));
    await works(node, lab, "pod", "before");
    await lab.api.rotate("certificate");
    await works(node, lab, "pod", "after");
  },
  "a new authority in the file that the kubeconfig names": async (lab) => {
    using node = makeCluster(lab.api.kubeconfig("caFile"));
    await works(node, lab, "pod", "before");
    await lab.api.rotate("authority");
    await works(node, lab, "pod", "after");
  },
  "both authorities in the file, until the server has changed": async (lab) => {
    using node = makeCluster(lab.api.kubeconfig("caFile"));
    const file = join(lab.api.dir, "ca.crt");
    const old = readFileSync(file, "utf8");
    await lab.api.rotate("authority");
    writeFileSync(file, `${old}${readFileSync(file, "utf8")}`);
    await works(node, lab, "network", "with the new one last");
  },
  "an authority nobody told us of": async (lab, count) => {
    using node = makeCluster(lab.api.kubeconfig("tokenFile"));
    const added = await call(node, lab, "ADD", "network");
    expectThat(isWhole(added), "ADD before", added);
    await lab.api.rotate("authority");
    const before = lab.api.requests.length;
    await gone(node, lab, "network", "after its authority went");
    const says = "the server's certificate is not valid for our CA or its name";
    await fails(node, lab, "pod", { says });
    await fails(node, lab, "network", { says });
    count("failed ADDs", 2);
    expectThat(lab.api.requests.length === before, "unknown authority", "a request was sent");
    lab.api.kubeconfig("tokenFile");
    await works(node, lab, "pod", "with the new kubeconfig");
  },
  "an authority's file that is half written": async (lab, count) => {
    using node = makeCluster(lab.api.kubeconfig("caFile"));
    const file = join(lab.api.dir, "ca.crt");
    const whole = readFileSync(file, "utf8");
    writeFileSync(file, half(whole));
    await fails(node, lab, "pod", { says: "is a certificate or key damaged?" });
    writeFileSync(file, "");
    await fails(node, lab, "pod", { says: "its ca is not PEM", code: 7 });
    rmSync(file);
    await fails(node, lab, "network", { says: `${file}: it does not exist`, code: 5 });
    count("failed ADDs", 3);
    writeFileSync(file, whole);
    await works(node, lab, "pod", "once it was whole");
  },
  "a token that is no more": async (lab, count) => {
    using node = makeCluster(lab.api.kubeconfig("tokenFile"));
    const file = join(lab.api.dir, "token");
    changeToken(lab);
    await fails(node, lab, "pod", { says: "401 Unauthorized" });
    for (const [text, says] of [
      ["", "its token is empty or malformed"],
      [
        `${lab.api.token.slice(0, 9)}\n${lab.api.token.slice(9)}`,
        "its token is empty or malformed",
      ],
    ] as const) {
      writeFileSync(file, text);
      await fails(node, lab, "network", { says, code: 7 });
    }
    rmSync(file);
    await fails(node, lab, "network", { says: `${file}: it does not exist`, code: 5 });
    count("failed ADDs", 4);
    writeFileSync(file, `${lab.api.token}\n`);
    await works(node, lab, "pod", "with the new token");
  },
  "a token that changes in the middle of an ADD": async (lab) => {
    using node = makeCluster(lab.api.kubeconfig("tokenFile"));
    let isOld = true;
    lab.api.gate = async () => {
      if (!isOld) return;
      isOld = false;
      changeToken(lab);
      writeFileSync(join(lab.api.dir, "token"), `${lab.api.token}\n`);
    };
    await works(node, lab, "network", "across the change");
  },
  "429, in a second, then well": async (lab) => {
    using node = makeCluster(lab.api.kubeconfig("tokenFile"));
    for (const place of ["pod", "network"] as const) {
      lab.api.misbehave(status(429, "1"), status(503, "1"));
      const run = await call(node, lab, "ADD", place);
      expectThat(isWhole(run) && warnings(run) === "", `ADD (${place})`, run);
      await gone(node, lab, place, `of it (${place})`);
    }
  },
  "a server that restarts": async (lab, count) => {
    using node = makeCluster(lab.api.kubeconfig("tokenFile"));
    await lab.api.stop();
    await fails(node, lab, "pod", { says: "the connection failed (ECONNREFUSED" });
    count("failed ADDs");
    await lab.api.rotate("certificate");
    await works(node, lab, "pod", "once it was back");
  },
};

function changeToken({ api, secrets }: Lab): void {
  api.token = `secret-${crypto.randomUUID()}`;
  secrets.push(api.token);
}

type Run = (lab: Lab, count: Count) => Promise<void>;

/** Every case by its name. */
const cases: [name: string, run: Run][] = [
  ...rows.map((row): [string, Run] => [row.name, (lab, count) => runRow(lab, row, count)]),
  ...doors.map((door): [string, Run] => [door.name, (lab, count) => runDoor(lab, door, count)]),
  ...Object.entries(changes),
];

async function run(options: PartOptions): Promise<Outcome> {
  using dir = tempDir();
  let opened = 0;
  const all = { short: cases.length, full: cases.length, workers: 6 };
  return await runCases(options, all, async ({ seed, count }) => {
    // Neighbouring seeds are different rows, and as many as there are rows are all of them.
    const [name, runOne] = cases[seed % cases.length] ?? ["", async () => undefined];
    const lab = await openLab(join(dir.path, `api-${opened++}`));
    try {
      await runOne(lab, count);
    } catch (error) {
      throw new Error(`${name}: ${error instanceof Error ? error.message : error}`);
    } finally {
      await lab.api.stop();
    }
  });
}

/** See above. */
export const api: Part = {
  title: "an API server that dies, lies, stalls and changes its keys",
  needs: [],
  limitSeconds: { short: 100, full: 300 },
  run,
};
