/**
 * SIGKILL at random instants of ADD and DEL, on a node of its own with the real plugins: for genie
 * alone, so that its delegates become orphans; for all it started with it; or for its delegates
 * alone, as when memory runs out, and then genie has to clean up by itself. Then what a runtime
 * does: sometimes the ADD once more, at last DEL. Nothing may be left of the pod, and a pod beside
 * it must not notice.
 */
import { Database } from "bun:sqlite";
import { rmSync, statSync } from "node:fs";
import { join } from "node:path";
import {
  hostLocal,
  kernelNetwork,
  type Node,
  type Pod,
  realNeeds,
  withNode,
} from "../fixtures/quirks/node.ts";
import { endMarked, marked, newMark } from "./marked.ts";
import { type Case, type Part, runCases } from "./part.ts";
import { oneIn, pick, type Random } from "./seed.ts";

/** What pods ask for: value of the annotation `cni`, one network or several, plain or chained. */
const asked = ["blue", "blue,green", "chain", "green,chain", "chain,blue,routed"];
const victimsPerCase = 5;

/**
 * A network over a bridge made beforehand: one that the plugin made and did not come to give its
 * address, killed with genie, has none once its last port is gone, and refuses every further pod.
 */
function bridge(node: Node, name: string, subnet: string): object {
  node.run("ip", "link", "add", `br-${name}`, "address", "02:00:00:00:00:01", "type", "bridge");
  return {
    type: "bridge",
    bridge: `br-${name}`,
    isGateway: true,
    ipam: hostLocal(node, [subnet]),
  };
}

function makeNetworks(node: Node): void {
  const list = (name: string, ...plugins: object[]) =>
    node.network(name, { cniVersion: "1.0.0", plugins });
  list("blue", bridge(node, "blue", "10.201.0.0/24"));
  list("green", bridge(node, "green", "10.202.0.0/24"));
  list(
    "chain",
    bridge(node, "chain", "10.203.0.0/24"),
    { type: "tuning", sysctl: { "net.core.somaxconn": "500" } },
    { type: "portmap", capabilities: { portMappings: true }, snat: true },
  );
  list("routed", { type: "ptp", ipam: hostLocal(node, ["10.204.0.0/24"]) });
}

const portMappings = [{ hostPort: 8080, containerPort: 80, protocol: "tcp" }];
const options = (cni: string) => ({ cni, runtimeConfig: { portMappings } });

/** How long a call takes that nobody kills, in ms, by command and networks. */
type Durations = Map<string, number>;

async function measure(): Promise<Durations> {
  const found: Durations = new Map();
  await withNode(async (node) => {
    makeNetworks(node);
    for (const cni of asked) {
      const pod = node.pod();
      for (const verb of ["ADD", "DEL"]) {
        const startedMs = performance.now();
        const { status, stdout, stderr } = await pod.call(verb, options(cni));
        if (status !== 0) throw new Error(`Cannot ${verb} ${cni}: ${stdout}${stderr}`);
        found.set(`${verb} ${cni}`, performance.now() - startedMs);
      }
      pod.kill();
    }
  });
  return found;
}

/** What is on a node: links, rules, files, rows, locks. */
const onNode = (node: Node) => ({ ...node.traces(), locks: rows(node, "operations").length });

function rows(node: Node, table: "operations" | "attachments"): Record<string, unknown>[] {
  using database = new Database(join(node.dir, "state", "genie.db"), { readonly: true });
  return database.query<Record<string, unknown>, []>(`SELECT * FROM ${table}`).all();
}

/** How a call is killed. */
interface Kill {
  afterMs: number;
  victims: "genie" | "genie and all it started" | "its delegates";
}

const drawKill = (random: Random, durationMs: number): Kill => ({
  afterMs: (random(1050) / 1000) * durationMs,
  victims: pick(random, ["genie", "genie", "genie and all it started", "its delegates"]),
});

/** How a call ended that was to be killed. */
interface Killed {
  /** Was there still somebody to kill? */
  isHit: boolean;
  /** Of a call whose delegates alone were killed: did it say that it failed? */
  hasFailed: boolean;
}

/** Makes a call and kills what it is told to. */
async function killed(pod: Pod, verb: string, cni: string, kill: Kill): Promise<Killed> {
  const mark = newMark();
  const { words, env, stdin } = pod.prepare(verb, options(cni));
  const child = Bun.spawn(words, {
    env: { ...env, ...mark },
    cwd: "/",
    stdin: Buffer.from(stdin),
    // Not a pipe: an orphan would hold it.
    stdout: "ignore",
    stderr: "ignore",
  });
  await Promise.race([Bun.sleep(kill.afterMs), child.exited]);
  marks.get(pod)?.push(mark);
  if (kill.victims === "its delegates") {
    let isHit = false;
    for (; !isHit && child.exitCode === null; await Bun.sleep(1)) {
      isHit = endMarked(mark, child.pid) > 0;
    }
    await child.exited;
    return { isHit, hasFailed: child.exitCode !== 0 };
  }
  if (kill.victims !== "genie") endMarked(mark);
  child.kill("SIGKILL");
  await child.exited;
  return { isHit: child.signalCode === "SIGKILL", hasFailed: false };
}

/** The marks of every call of a pod. */
const marks = new WeakMap<Pod, Record<string, string>[]>();

/** The ADD once more: refused when a killed ADD had come to its end, else it works. */
async function addAgain(node: Node, pod: Pod, cni: string, killedVerb: string): Promise<void> {
  const own = rows(node, "attachments").filter((row) => row["container_id"] === pod.containerId);
  const states = own.map((row) => row["state"]);
  const isThere = states.includes("attached");
  const { status, json, stdout, stderr } = await pod.call("ADD", options(cni));
  const said = `${stdout}${stderr}`.trim();
  if (isThere && json?.code === 105) return;
  // A killed DEL may have taken the interfaces away, and not got as far as the record.
  if (isThere && killedVerb !== "DEL") throw new Error(`second ADD (${states}): ${said}`);
  if (status !== 0) throw new Error(`second ADD (${states}) failed: ${said}`);
  const present = Object.keys(kernelNetwork(pod).addresses).length;
  const wanted = cni.split(",").length;
  if (present !== wanted) throw new Error(`second ADD: ${present} interfaces, not ${wanted}`);
}

async function endPod(node: Node, pod: Pod, before: object): Promise<void> {
  const { status, stdout, stderr } = await pod.call("DEL");
  if (status !== 0 || stdout !== "") throw new Error(`DEL failed: ${stdout}${stderr}`);
  const orphans = (marks.get(pod) ?? []).flatMap((mark) => marked(mark));
  if (orphans.length > 0) throw new Error(`orphans after DEL: ${orphans.map(commandOf).join()}`);
  await wantSame(node, before);
}

async function wantSame(node: Node, before: object): Promise<void> {
  // The kernel removes the interfaces of a dead namespace in its own time.
  let now = onNode(node);
  for (let tries = 0; tries < 6000 && !Bun.deepEquals(now, before); tries++) {
    await Bun.sleep(10);
    now = onNode(node);
  }
  if (Bun.deepEquals(now, before)) return;
  throw new Error(`left behind: ${JSON.stringify(now)}\ninstead of: ${JSON.stringify(before)}`);
}

function commandOf(pid: number): string {
  const text = Bun.spawnSync(["/bin/cat", `/proc/${pid}/cmdline`]).stdout.toString();
  return `${pid} ${text.replaceAll("\0", " ").trim()}`;
}

/** host-local killed between making the file of an address and writing whose it is. */
function takeNobodysAddresses(node: Node): number {
  const files = node.traces().files.map((file) => join(node.data, file));
  const empty = files.filter((file) => statSync(file).size === 0);
  for (const file of empty) rmSync(file);
  return empty.length;
}

/** One pod whose ADD or DEL is killed. */
async function killPod(
  node: Node,
  durations: Durations,
  { random, count }: Pick<Case, "random" | "count">,
): Promise<void> {
  const cni = pick(random, asked);
  const verb = oneIn(random, 3) ? "DEL" : "ADD";
  const draw = (what: string) => drawKill(random, durations.get(`${what} ${cni}`) ?? 100);
  const kill = draw(verb);
  const again = oneIn(random, 3);
  const loses = oneIn(random, 4);
  const delKill = oneIn(random, 3) ? draw("DEL") : undefined;
  const told =
    `${verb} ${cni}, ${kill.victims} killed after ${kill.afterMs.toFixed(1)} ms` +
    `${again ? ", ADD again" : ""}` +
    `${loses ? ", namespace gone" : ""}` +
    (delKill ? `; of DEL ${delKill.victims} after ${delKill.afterMs.toFixed(1)} ms` : "");
  const before = onNode(node);
  const pod = node.pod();
  marks.set(pod, []);
  try {
    if (verb === "DEL") await pod.add(options(cni));
    const { isHit, hasFailed } = await killed(pod, verb, cni, kill);
    count(isHit ? "kills" : "calls that were faster");
    if (kill.victims !== "genie") count("addresses host-local lost", takeNobodysAddresses(node));
    // Nobody sends a DEL for the rest of an ADD that failed, once the runtime has given up.
    if (verb === "ADD" && hasFailed) await wantSame(node, before);
    if (again) {
      await addAgain(node, pod, cni, verb);
      count("second ADDs");
    }
    if (loses) pod.kill();
    if (delKill && (await killed(pod, "DEL", cni, delKill)).isHit) count("kills");
    await endPod(node, pod, before);
  } catch (error) {
    throw new Error(`${told}: ${error instanceof Error ? error.message : error}`);
  } finally {
    for (const mark of marks.get(pod) ?? []) endMarked(mark);
    pod.kill();
  }
}

async function runCase(one: Case, durations: Durations): Promise<void> {
  await withNode(async (node) => {
    makeNetworks(node);
    const beside = node.pod();
    const { status, stdout } = await beside.call("ADD", { cni: "blue" });
    if (status !== 0) throw new Error(`ADD of the pod beside: ${stdout}`);
    for (let i = 0; i < victimsPerCase; i++) await killPod(node, durations, one);
    const check = await beside.call("CHECK");
    if (check.status !== 0) throw new Error(`CHECK of the pod beside: ${check.stdout}`);
    await endPod(node, beside, { links: [], rules: [], files: [], attachments: 0, locks: 0 });
  });
}

/** See above. */
export const kills: Part = {
  title: "SIGKILL at random instants of ADD and DEL",
  needs: realNeeds,
  limitSeconds: { short: 40, full: 240 },
  run: async (asked) => {
    const durations = await measure();
    return runCases(asked, { short: 10, full: 75, workers: 3 }, (one) => runCase(one, durations));
  },
};
