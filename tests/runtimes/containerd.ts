/**
 * What genie does on a node with containerd, from `genie install` to `genie uninstall`, with real
 * pods all the while: the same for each release of containerd.
 */
import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { allowFrom, collections, podObject, policyPath } from "../policed.ts";
import { debianConfig, repoDir, startApi, tree } from "./machine.ts";
import {
  anotherGenie,
  blue,
  green,
  type Node,
  nodeFiles,
  noTraces,
  on,
  type Pod,
  red,
  rowsOn,
  traces,
} from "./node.ts";

/** A table whose networks stand in it, so that the runtime has none without genie. */
const table = `[default]
networks = ["blue"]
${[blue, green]
  .map(
    ({ name, cniVersion, plugins }) => `[plugins.${name}.config]
cniVersion = "${cniVersion}"
plugins = ${toml(plugins)}
`,
  )
  .join("")}`;

/** A value as inline TOML. */
function toml(value: unknown): string {
  if (Array.isArray(value)) return `[${value.map(toml).join(", ")}]`;
  if (typeof value !== "object" || value === null) return JSON.stringify(value);
  const pairs = Object.entries(value).map(([key, one]) => `${key} = ${toml(one)}`);
  return `{ ${pairs.join(", ")} }`;
}

/** Declares the tests. @param openNode boots a machine with that release */
export function testContainerd(openNode: () => Promise<Node>): void {
  test("from a bare node to pods and back", async () => {
    await using node = await openNode();
    const { machine, cri } = node;
    const untouched = nodeFiles(machine);
    expect(await cri.networkIssue()).toContain("cni plugin not initialized");
    const early = await node.genie("install", "--wait=10ms");
    expect(early).toMatchObject({ status: 1, stderr: expect.stringContaining("(code 50)") });
    expect(await cri.networkIssue()).toContain("cni plugin not initialized");

    machine.write("/run/plugins.toml", table);
    await node.install("--table=/run/plugins.toml");
    await node.loaded("genie");
    expect(await cri.networkIssue()).toBeUndefined();
    const doctor = await node.genie("doctor");
    expect([doctor.status, doctor.stdout]).toEqual([
      0,
      expect.stringContaining("\n0 problems, 0 warnings"),
    ]);
    expect(await node.genie("validate")).toMatchObject({ status: 0 });
    const annotated = ["--namespace=a", "--pod=b", "--annotation=cni=blue,green"];
    expect(await node.genie("plan", ...annotated)).toMatchObject({ status: 0 });

    const web = await node.start({ cni: "blue,green@eth5" }, { ports: { 80: 8080 } });
    const plain = await node.start();
    expect(await web.addresses()).toEqual({ eth0: web.ip, eth5: expect.stringMatching(on.green) });
    expect(await plain.addresses()).toEqual({ eth0: plain.ip });
    expect([web.ip, plain.ip]).toEqual([on.blue, on.blue].map((net) => expect.stringMatching(net)));
    expect(await plain.call("ping", "-c1", "-W5", web.ip)).toMatchObject({ status: 0 });
    expect(await machine.run("iptables-save", "-t", "nat")).toContain(`${web.ip}:80`);

    await expect(node.start({ cni: "purple" })).rejects.toThrow(
      'Unknown network "purple": neither the plugin table nor /etc/cni/net.d has it, known are ' +
        "blue, green",
    );
    expect(await traces(machine)).toMatchObject({
      attachments: 3,
      netns: Array.from({ length: 2 }, () => expect.any(String)),
    });
    await web.end();
    await plain.end();
    expect(await cri.list()).toEqual([]);
    expect(await traces(machine)).toEqual(noTraces);
    expect(await node.genie("uninstall", "--purge")).toMatchObject({ status: 0 });
    expect(nodeFiles(machine)).toEqual(untouched);
    await node.loaded(undefined);
    expect(await cri.networkIssue()).toContain("cni plugin not initialized");
  });

  test("an upgrade, and a restart of containerd, among starting and ending pods", async () => {
    await using node = await openNode();
    await node.networks(blue, green);
    await node.install();
    await node.loaded("genie");
    const lasting = await node.start({ cni: "blue,green" });
    const newer = await anotherGenie(node.machine);
    let started = 0;
    let isUpgraded = false;
    const halfway = Promise.withResolvers<void>();
    const upgrade = halfway.promise.then(async () => {
      const { stdout } = await node.machine.call(newer, "install");
      isUpgraded = true;
      return stdout;
    });
    const worker = async () => {
      const ips: string[] = [];
      for (let i = 0; i < 4 || !isUpgraded; i++) {
        const pod = await node.start({ cni: "blue,green@eth5" });
        if (++started === 6) halfway.resolve();
        const { eth0 = "", eth5 = "" } = await pod.addresses();
        ips.push(pod.ip, eth5);
        expect([pod.ip, on.green.test(eth5)]).toEqual([eth0, true]);
        await pod.end();
      }
      return ips;
    };
    const ips = (await Promise.all([worker(), worker(), worker(), worker(), worker()])).flat();
    expect(await upgrade).toMatch(/^kept .*genie\.previous.*\nreplaced .*genie\n/);
    // Nobody got an address that another one held.
    expect(new Set(ips).size).toBe(ips.length);
    await node.restart();
    await node.loaded("genie");
    expect(await node.cri.list()).toEqual([lasting.id]);
    await lasting.end();
    expect(await traces(node.machine)).toEqual(noTraces);
  });

  test("pods that are gone after a restart: DEL comes without a namespace", async () => {
    await using node = await openNode();
    const { machine } = node;
    await node.networks(green, red);
    await node.install();
    await node.loaded("genie");
    const pods = [await node.start({ cni: "green,red@eth3" }), await node.start({ cni: "red" })];
    await node.restart(async () => {
      await machine.run("kill", "-KILL", ...pods.map(({ pid }) => String(pid)));
      await machine.run("sh", "-c", "for ns in /run/netns/*; do umount $ns && rm $ns; done");
    });
    expect(await traces(machine)).toMatchObject({ netns: [], attachments: 3 });
    for (const pod of pods) await pod.end();
    expect(await node.cri.list()).toEqual([]);
    expect(await traces(machine)).toEqual(noTraces);
  });

  test("containerd killed during an ADD: DEL comes while that still runs", async () => {
    await using node = await openNode();
    const { machine, cri } = node;
    await node.networks(green, red);
    await node.install();
    await node.loaded("genie");
    const ptp = "/usr/lib/cni/ptp";
    const held = "[ $CNI_COMMAND != ADD ] || { echo >/run/began; cat /run/go; }";
    await machine.run("mkfifo", "/run/go");
    await machine.run("mv", ptp, `${ptp}.real`);
    machine.write(ptp, `#!/bin/sh\n${held}\nexec ${ptp}.real\n`);
    await machine.run("chmod", "755", ptp);
    const lost = node.start({ cni: "red,green" });
    lost.catch(() => undefined);
    while (!existsSync(machine.at("/run/began"))) await Bun.sleep(5);
    await node.restart(undefined, "SIGKILL");
    await expect(lost).rejects.toThrow("RunPodSandbox");
    await node.loaded("genie");
    const [id = ""] = await cri.list();
    const stopped = cri.stop(id).catch(() => cri.stop(id));
    await machine.run("sh", "-c", "echo >/run/go");
    await stopped;
    await cri.remove(id);
    expect(await cri.list()).toEqual([]);
    expect(await traces(machine)).toEqual(noTraces);
  });

  test("pods from before are adopted; uninstall refuses or gives back; DEL works", async () => {
    await using node = await openNode();
    const { machine } = node;
    await node.networks(blue, green);
    const untouched = nodeFiles(machine);
    await node.loaded("blue");
    const [old, older] = [await node.start(), await node.start()];
    await node.install();
    await node.loaded("genie");
    // Those from before are known, and end through genie.
    expect(await rowsOn(machine, "attachments")).toHaveLength(2);
    await older.end();
    expect(await rowsOn(machine, "attachments")).toHaveLength(1);
    const [first, second] = [
      await node.start({ cni: "green,blue" }),
      await node.start({ cni: "green" }),
    ];
    const plain = await node.start();
    expect(await node.genie("uninstall")).toMatchObject({
      status: 1,
      stderr: expect.stringContaining("2 pods are attached through genie"),
    });
    await first.end();
    expect(await node.genie("uninstall", "--force")).toMatchObject({ status: 1 });
    await node.loaded("blue");
    const third = await node.start({ cni: "green" });
    expect(await third.addresses()).toEqual({ eth0: expect.stringMatching(on.blue) });
    await second.end();
    expect(await node.genie("uninstall", "--purge")).toMatchObject({ status: 0 });
    expect(nodeFiles(machine)).toEqual(untouched);
    // Those of the network that the runtime takes now run on, and it ends them without genie.
    for (const pod of [third, plain, old]) await pod.end();
    expect(await traces(machine)).toEqual(noTraces);
  });

  test("folders of a drop-in that another config file imports", async () => {
    await using node = await openNode();
    const { machine } = node;
    const [dir, confDir, binDir] = ["/etc/other", "/etc/other/net.d", "/opt/other/bin"];
    await machine.run("mkdir", "-p", `${dir}/conf.d`, confDir, "/opt/other");
    await machine.run("mv", "/usr/lib/cni/ptp", "/run");
    await machine.run("cp", "-a", "/usr/lib/cni", binDir);
    await machine.run("mv", "/run/ptp", `${binDir}/ptp`);
    const text = await machine.run("cat", debianConfig);
    const moved = text.replace("/etc/cni/net.d", confDir).replace("/usr/lib/cni", binDir);
    machine.write(`${dir}/conf.d/10-cri.toml`, moved);
    machine.write(`${dir}/main.toml`, `version = 2\nimports = ["${dir}/conf.d/*.toml"]\n`);
    machine.write(`${confDir}/10-green.conflist`, green);
    const start = (...flags: string[]) => node.restart(undefined, "SIGTERM", flags);
    await start("--config", `${dir}/main.toml`);
    await node.loaded("green");
    await node.install();
    await node.loaded("genie");
    expect(Object.keys(tree(machine, ["/etc/cni/net.d"]))).toEqual([]);
    const doctor = await node.genie("doctor");
    expect([doctor.status, doctor.stdout]).toEqual([
      0,
      expect.stringContaining("the runtime at /run/containerd/containerd.sock suits"),
    ]);
    const pod = await node.start();
    expect(await pod.addresses()).toEqual({ eth0: expect.stringMatching(on.green) });
    // With its usual file it looks elsewhere, and doctor notices.
    await start();
    const elsewhere = await node.genie("doctor");
    expect([elsewhere.status, words(elsewhere.stdout)]).toEqual([
      1,
      expect.stringContaining("looks for plugins in /usr/lib/cni, and genie is not there"),
    ]);
    await start("-c", `${dir}/main.toml`);
    await node.loaded("genie");
    await pod.end();
    expect(await node.genie("uninstall", "--purge")).toMatchObject({ status: 0 });
    expect(await traces(machine)).toEqual(noTraces);
  });

  test("a config that a rename brings in: doctor says so, install has it loaded", async () => {
    await using node = await openNode();
    const { machine } = node;
    await node.networks(blue);
    await node.install();
    await node.loaded("genie");
    const dir = "/etc/cni/net.d";
    const bringIn = async () => {
      await machine.run("mv", `${dir}/00-genie.conflist`, "/etc/cni");
      await node.loaded("blue");
      await machine.run("mv", "/etc/cni/00-genie.conflist", dir);
      // Time does not help, nor does a change of its date.
      await machine.run("touch", `${dir}/00-genie.conflist`);
      await Bun.sleep(200);
      expect(await node.cri.network()).toBe("blue");
    };
    await bringIn();
    const remedy = `touch ${dir}/.reload && rm ${dir}/.reload`;
    const late = await node.genie("doctor");
    expect([late.status, words(late.stdout)]).toEqual([
      1,
      expect.stringContaining(`has not loaded 00-genie.conflist, it calls blue → ${remedy}`),
    ]);
    await machine.run("sh", "-c", remedy);
    await node.loaded("genie");
    expect(await node.genie("doctor")).toMatchObject({ status: 0 });
    await bringIn();
    expect(await machine.run(`${repoDir}/dist/genie`, "install")).toContain("nothing has changed");
    expect(await node.cri.network()).toBe("genie");
    // A broken file that stands before it.
    machine.write(`${dir}/00-a.conf`, "{");
    await node.loaded(undefined);
    const broken = "has not loaded 00-genie.conflist, it has no network: cni config load failed";
    expect(words((await node.genie("doctor")).stdout)).toContain(broken);
    expect(await node.genie("install")).toMatchObject({
      status: 1,
      stderr: expect.stringMatching(new RegExp(`${broken}.*/00-a.conf.* \\(code 50\\)`)),
    });
  });

  test("genie gc collects on a machine whose pid namespace is not the first", async () => {
    await using node = await openNode();
    const { machine } = node;
    await node.networks(green);
    await node.install();
    await node.loaded("genie");
    const [live, dead] = [await node.start(), await node.start()];
    await node.restart(async () => {
      // All that is left of the dead one is what genie has on record, and its address.
      const kill = `for p in $(grep -l ${dead.id} /proc/[0-9]*/cmdline); do
        pid=\${p#/proc/}; [ \${pid%/*} = $$ ] || kill -KILL \${pid%/*}; done 2>/dev/null; true`;
      await machine.run("sh", "-c", kill);
      await machine.run("kill", "-KILL", String(dead.pid));
      const tasks = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
      const forget = `for at in $(grep -o "[^ ]*${dead.id}[^ ]*" /proc/mounts); do umount $at; done
        rm -rf ${tasks}/${dead.id}`;
      await machine.run("sh", "-c", forget);
      const inodes = `for ns in /run/netns/*; do
        [ $(stat -Lc %i $ns) = $(stat -Lc %i /proc/${live.pid}/ns/net) ] || { umount $ns; rm $ns; }
        done`;
      await machine.run("sh", "-c", inodes);
      const gc = await node.genie("gc", "--json");
      expect([gc.stderr, gc.status]).toEqual(["", 0]);
      expect(JSON.parse(gc.stdout)).toEqual([
        expect.objectContaining({ kind: "attachment", containerId: dead.id, outcome: "collected" }),
      ]);
    });
    expect(await live.addresses()).toEqual({ eth0: live.ip });
    expect(await traces(machine)).toMatchObject({ attachments: 1 });
    for (const pod of [live, dead]) await pod.end();
    expect(await traces(machine)).toEqual(noTraces);
  });

  test("objects of the API as networks, and policies in force when the pod starts", async () => {
    await using node = await openNode();
    const { machine, cri } = node;
    const policyTable = '[default]\nnetworks = ["blue"]\n[plugins.blue]\nenforce_policy = true\n';
    const api = await startApi(machine, apiObjects(), collections);
    await node.networks(blue);
    machine.write("/run/plugins.toml", policyTable);
    await node.install("--table=/run/plugins.toml", `--kubeconfig=${api}`);
    await node.loaded("genie");
    await machine.start("genie agent runs", "/usr/lib/cni/genie", "agent");
    while ((await rowsOn(machine, "policy_watches")).length < 3) await Bun.sleep(10);

    const networks = { "k8s.v1.cni.cncf.io/networks": "red@eth7" };
    const web = await node.start(networks, { name: "web", uid: "uid-web" });
    const other = await node.start({}, { name: "other", uid: "uid-other" });
    expect(await web.addresses()).toEqual({ eth0: web.ip, eth7: expect.stringMatching(on.red) });
    const ping = async (from: Pod, to: Pod, waitS: number) =>
      (await from.call("ping", "-c1", `-W${waitS}`, to.ip)).status === 0;
    expect(await ping(web, other, 10)).toBe(true);
    expect(await ping(other, web, 1)).toBe(false);
    for (const pod of [web, other]) await pod.end();
    expect(await cri.list()).toEqual([]);
    expect(await traces(machine)).toEqual(noTraces);
  });
}

/** What is wrapped into columns, as one line. */
const words = (text: string) => text.replace(/\s+/g, " ");

/** A cluster of two pods, web and other; nobody may reach web. */
function apiObjects(): Record<string, object> {
  const pods = ["web", "other"].map((name) => [
    `/api/v1/namespaces/default/pods/${name}`,
    podObject(name, `uid-${name}`),
  ]);
  const { name, ...config } = red;
  return {
    ...Object.fromEntries(pods),
    "/api/v1/namespaces/default": { metadata: {} },
    [policyPath("closed")]: allowFrom(),
    [`/apis/k8s.cni.cncf.io/v1/namespaces/default/network-attachment-definitions/${name}`]: {
      spec: { config: JSON.stringify(config) },
    },
  };
}
