/**
 * `bun run demo`: the main job for real. Builds the binary and plays the runtime: two pods that are
 * annotated `cni: "blue,green@eth5"` are attached, checked and detached, and nothing is left.
 * As root it makes network namespaces and calls the reference plugins, which it installs on Debian
 * when they are missing; else, or with `--fake`, the fake plugins of tests/ stand in.
 * Exit status: 0 when every check held, 1 when one did not, 2 when used wrongly.
 */
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { isObject } from "../../lib/json.ts";
import { buildIfStale } from "../build.ts";
import { makeFakeWorld } from "./fake.ts";
import { makeRealWorld, realObstacle } from "./real.ts";
import { formatJson, makeScreen } from "./screen.ts";
import {
  addressOf,
  annotation,
  cniConfig,
  DemoError,
  files,
  genie,
  interfaceNames,
  makePod,
  type Pod,
  record,
  recordProofs,
  root,
  runSync,
  runtimeCall,
  type Stage,
  tableText,
  type,
} from "./stage.ts";

process.exit(await main(process.argv.slice(2)));

async function main(args: string[]): Promise<number> {
  if (args.some((arg) => arg !== "--fake")) {
    process.stderr.write("Usage: bun run demo [--fake]\n");
    return 2;
  }
  if (process.platform !== "linux") {
    process.stderr.write("The demo needs Linux: CNI plugins work with its network namespaces\n");
    return 1;
  }
  // Where `su` gives a root shell without them.
  process.env["PATH"] = `${process.env["PATH"] ?? ""}:/usr/sbin:/sbin`;
  const screen = makeScreen(process.stdout);
  const obstacle = args.includes("--fake") ? "as --fake asks" : realObstacle();
  const dir = mkdtempSync(join(tmpdir(), "genie-demo-"));
  const id = crypto.randomUUID().slice(0, 6);
  const world =
    obstacle === undefined ? makeRealWorld(screen, dir, id) : makeFakeWorld(screen, dir, obstacle);
  const stage: Stage = { screen, world, dir, id };
  const pods = [makePod(stage, "web"), makePod(stage, "db")];
  const signals = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;
  for (const [name, status] of Object.entries(signals)) {
    process.on(name, () => {
      cleanUp(stage, pods);
      screen.say(`\nEnded by ${name}: everything the demo made is removed.`);
      process.exit(status);
    });
  }
  try {
    screen.title(world.title);
    await play(stage, pods);
  } catch (error) {
    screen.check(false, error instanceof Error ? error.message : String(error));
  } finally {
    cleanUp(stage, pods);
  }
  return conclude(stage);
}

/** Says how it went. @returns the exit status */
function conclude({ screen, dir }: Stage): number {
  screen.check(!existsSync(dir), `the folder of this run, ${dir}, is removed`);
  const { passed, failed } = screen.checks;
  const total = passed + failed;
  screen.say("");
  screen.title(failed === 0 ? `All ${total} checks ok` : `${failed} of ${total} checks FAILED`);
  return failed === 0 ? 0 : 1;
}

/** Ends what a failure or a signal left, and removes the folder. */
function cleanUp(stage: Stage, pods: Pod[]): void {
  for (const pod of pods.filter(({ isAttached }) => isAttached)) {
    pod.isAttached = false;
    const { argv, env, stdin } = runtimeCall(stage, "DEL", pod);
    runSync(argv, { env: env ?? {}, stdin: readFileSync(stdin, "utf8") });
  }
  stage.world.cleanUp(pods);
  rmSync(stage.dir, { recursive: true, force: true });
}

async function play(stage: Stage, pods: Pod[]): Promise<void> {
  const [web, db] = pods;
  if (!web || !db) throw new DemoError("The demo needs two pods");
  await build(stage);
  writeNode(stage);
  await showPlan(stage, web);
  await attachFirst(stage, web);
  await attachSecond(stage, web, db);
  await checkPods(stage, pods);
  await detach(stage, pods);
  await proveEmpty(stage, pods);
}

async function build({ screen }: Stage): Promise<void> {
  screen.headline("Build the binary");
  screen.command({ argv: ["bun", "run", "build"] });
  const started = performance.now();
  try {
    buildIfStale();
  } catch (error) {
    screen.output(`${error instanceof Error ? error.message : error}\n`);
    throw new DemoError("The binary cannot be built");
  }
  const seconds = ((performance.now() - started) / 1000).toFixed(1);
  const megabytes = Math.round(statSync(join(root, genie)).size / 1e6);
  screen.say(`One file of ${megabytes} MB, built in ${seconds} s.`);
  await type(screen, { argv: [genie, "version"] });
}

function writeNode(stage: Stage): void {
  const { screen, dir } = stage;
  const { table, config, ipam } = files(dir);
  for (const path of [join(dir, "net.d"), ipam]) mkdirSync(path);
  writeFileSync(table, tableText(stage));
  writeFileSync(config, `${formatJson(cniConfig(dir), 100)}\n`);
  screen.headline("A node that offers two networks");
  screen.say("The plugin table of the node. blue is for pods that ask for nothing.");
  screen.command({ argv: ["cat", table] });
  screen.output(tableText(stage));
  screen.say("\nThe CNI config through which the runtime finds genie and hands over annotations.");
  screen.command({ argv: ["cat", config] });
  screen.json(cniConfig(dir));
}

async function showPlan({ screen, dir }: Stage, pod: Pod): Promise<void> {
  screen.headline("The plan: what a pod would get, and why");
  const asked = [`demo/${pod.name}`, "--annotation", `cni=${annotation}`];
  const line = { argv: [genie, "plan", ...asked, "--cni-config", files(dir).config] };
  const { status } = await type(screen, line, { direct: true });
  screen.check(status === 0, "the plan can be made; nothing ran and nothing was written");
}

/** Plays the runtime's ADD. */
async function add(stage: Stage, pod: Pod): Promise<void> {
  const { screen, world } = stage;
  await world.makeNetns(pod);
  const line = runtimeCall(stage, "ADD", pod);
  if (pod.name === "web") {
    screen.command({ argv: ["cat", line.stdin] });
    screen.json(JSON.parse(readFileSync(line.stdin, "utf8")));
  }
  pod.isAttached = true;
  const { status, stdout } = await type(screen, line, { quiet: true });
  const result: unknown = status === 0 ? JSON.parse(stdout) : undefined;
  if (!isObject(result)) {
    screen.output(stdout);
    throw new DemoError(`ADD of pod ${pod.name} ended with status ${status}`);
  }
  pod.result = result;
}

async function attachFirst(stage: Stage, pod: Pod): Promise<void> {
  const { screen, world, dir } = stage;
  screen.headline(`ADD: the runtime starts pod ${pod.name}, annotated cni: "${annotation}"`);
  await add(stage, pod);
  screen.json(pod.result);
  const names = interfaceNames(pod, "pod").join(", ");
  screen.check(names === "eth0, eth5", `one result for both networks: ${names}`);
  const { attached } = record(dir);
  screen.check(attached.length === 2, `genie.db has both on record: ${attached.join(", ")}`);
  screen.headline(`Inside pod ${pod.name}`);
  await world.showInside(pod);
}

async function attachSecond(stage: Stage, first: Pod, second: Pod): Promise<void> {
  const { screen, world } = stage;
  screen.headline(`A second pod, ${second.name}, and a ping`);
  const taken = ["eth0", "eth5"].map((ifName) => addressOf(first, ifName));
  await add(stage, second);
  const own = ["eth0", "eth5"].map((ifName) => addressOf(second, ifName));
  const isOther = own.every((address, i) => address !== "" && address !== taken[i]);
  screen.check(isOther, `pod ${second.name} has addresses of its own: ${own.join(", ")}`);
  await world.showTraffic(first, second);
}

async function checkPods(stage: Stage, pods: Pod[]): Promise<void> {
  const { screen } = stage;
  screen.headline("CHECK: is everything as ADD left it?");
  for (const pod of pods) {
    const { status, stdout } = await type(screen, runtimeCall(stage, "CHECK", pod));
    const isQuiet = status === 0 && stdout === "";
    screen.check(isQuiet, `every plugin of pod ${pod.name} says yes`);
  }
}

async function detach(stage: Stage, pods: Pod[]): Promise<void> {
  const { screen, world } = stage;
  screen.headline("DEL: the pods end");
  for (const pod of pods) {
    const { status } = await type(screen, runtimeCall(stage, "DEL", pod));
    pod.isAttached = status !== 0;
    screen.check(status === 0, `pod ${pod.name} is detached`);
    await world.deleteNetns(pod);
  }
  const [pod] = pods;
  if (!pod) return;
  screen.say("A runtime repeats DEL, later without a namespace: what is gone is a success.");
  const { status } = await type(screen, runtimeCall(stage, "DEL", pod, ""));
  screen.check(status === 0, `the repeated DEL of pod ${pod.name} succeeds`);
}

async function proveEmpty({ screen, world, dir }: Stage, pods: Pod[]): Promise<void> {
  screen.headline("Nothing is left behind");
  await world.removeNetworks();
  for (const { ok, text } of [...world.proofs(pods), ...recordProofs(dir)]) screen.check(ok, text);
}
