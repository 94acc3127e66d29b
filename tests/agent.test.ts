/**
 * lib/agent/agent.ts, lib/agent/policy.ts, lib/policy/watch.ts, and lib/report/record_reader.ts of
 * what they write: the compiled agent beside real pods on a real bridge, real nft and real
 * packets, and an API server over TLS.
 */
import { describe, expect, test } from "bun:test";
import { appendFileSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { isSameMade } from "../lib/agent/policy.ts";
import { closeState, write } from "../lib/database.ts";
import { netnsId } from "../lib/kernel.ts";
import { setBroken } from "../lib/node/repair.ts";
import type { Attached } from "../lib/policy/rulesets.ts";
import { attachmentsIn } from "../lib/recorded.ts";
import { openState } from "../lib/recovery/database.ts";
import type { ApiServer } from "./apiserver.ts";
import { fakePlugin, makeHost, runGenie } from "./fakes.ts";
import {
  addressOf,
  hostLocal,
  type Node,
  type Pod,
  realNeeds,
  withNode,
} from "./fixtures/quirks/node.ts";
import {
  type AgentProcess,
  allowFrom,
  inputsKnown,
  multiPolicies,
  podObject,
  policyPath,
  rowsOf,
  startAgent,
  startCluster,
  until,
} from "./policed.ts";
import { reasonToSkip } from "./skip.ts";
import { compiledGenie } from "./wire.ts";

const skipReason = reasonToSkip(...realNeeds, "nftables");

/** A node, its cluster, and agents that end with the test. */
interface Policed {
  node: Node;
  api: ApiServer;
  agent: () => AgentProcess;
  state: string;
  /** Makes a pod known to the API, attaches it and tells the API its address. */
  add: (app: string) => Promise<Pod>;
  args: (pod: Pod) => string;
}

async function withPoliced(act: (policed: Policed) => Promise<void>, table = ""): Promise<void> {
  await withNode(async (node) => {
    const agents: AgentProcess[] = [];
    const api = await startCluster(join(node.dir, "api"));
    const file = join(node.dir, "plugins.toml");
    appendFileSync(
      file,
      `kubernetes = { kubeconfig = "${api.kubeconfig("token")}", status = "off" }
agent.listen = ""
${table}
[plugins.blue]
enforce_policy = true
`,
    );
    node.network("blue", {
      cniVersion: "1.0.0",
      plugins: [{ type: "bridge", bridge: "blue0", isGateway: true, ipam: ipam(node) }],
    });
    const args = (pod: Pod) => `;K8S_POD_UID=uid-${pod.containerId}`;
    const policed: Policed = {
      node,
      api,
      state: join(node.dir, "state"),
      args,
      agent: () => {
        const agent = startAgent(node.dir, file, node.bin);
        agents.push(agent);
        return agent;
      },
      add: async (app) => {
        const pod = node.pod();
        const path = `/api/v1/namespaces/default/pods/p-${pod.containerId}`;
        const uid = `uid-${pod.containerId}`;
        api.put(path, podObject(app, uid));
        await until(() => isKnown(policed.state, pod));
        await pod.add({ cni: "blue", args: args(pod) });
        api.put(path, podObject(app, uid, [addressOf(pod, "eth0")]));
        return pod;
      },
    };
    try {
      await act(policed);
    } finally {
      await Promise.all(agents.map((agent) => agent.end("SIGKILL")));
      await api.stop();
    }
  });
}

const ipam = (node: Node) => hostLocal(node, ["10.215.0.0/24"]);

function isKnown(state: string, pod: Pod): boolean {
  const query = `SELECT 1 FROM policy_inputs WHERE name = 'p-${pod.containerId}'`;
  return rowsOf(state, query).length > 0;
}

/** Does a ping get there and back? */
function reaches(from: Pod, to: Pod, ifName = "eth0"): boolean {
  const enter = ["nsenter", `--net=${from.netns}`];
  const words = ["ping", "-c1", "-W1", "-i0.2", addressOf(to, ifName)];
  return Bun.spawnSync([...enter, ...words]).exitCode === 0;
}

const rulesIn = (pod: Pod): string => pod.run("nft", "list", "ruleset");

describe.skipIf(skipReason !== undefined)("genie agent, policy", () => {
  test("ADD is closed when it returns; edits reach the packets; DEL leaves nothing", async () => {
    await withPoliced(async ({ node, api, agent, state, add }) => {
      const running = agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom("friend"));
      await until(() => rowsOf(state, "SELECT 1 FROM policy_inputs WHERE name = 'web'").length > 0);
      const web = await add("web");
      expect(rulesIn(web)).toContain("chain ingress");
      const [friend, other] = [await add("friend"), await add("other")];
      expect([rulesIn(friend), rulesIn(other)]).toEqual(["", ""]);
      await until(() => reaches(friend, web));
      expect({ other: reaches(other, web), back: reaches(web, other) }).toEqual({
        other: false,
        back: true,
      });
      api.put(policyPath("web"), allowFrom("friend", "other"));
      await until(() => reaches(other, web));
      api.put(policyPath("web"), allowFrom());
      await until(() => !reaches(friend, web));
      expect((await web.call("CHECK")).status).toBe(0);
      api.remove(policyPath("web"));
      await until(() => reaches(other, web));
      expect(rulesIn(web)).toBe("");
      api.put(policyPath("web"), allowFrom());
      await until(() => rulesIn(web) !== "");
      for (const pod of [web, friend, other]) await pod.del();
      expect(rulesIn(web)).toBe("");
      expect(rowsOf(state, "SELECT * FROM rulesets")).toEqual([]);
      expect(node.traces().attachments).toBe(0);
      expect(await running.end("SIGTERM")).toBe(0);
      expect(running.log()).toEndWith("genie: info: genie agent ended\n");
    });
  });

  test("killed, its rules stay; started again, it corrects what changed meanwhile", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      const first = agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom("friend"));
      const [web, friend] = [await add("web"), await add("friend")];
      await until(() => rulesIn(web).includes(addressOf(friend, "eth0")));
      const before = rulesIn(web);
      expect(await first.end("SIGKILL")).toBe("SIGKILL");
      api.put(policyPath("web"), allowFrom());
      web.run("nft", "add", "table", "inet", "others");
      expect(rulesIn(web)).toContain(before);
      const second = agent();
      await until(() => !rulesIn(web).includes(addressOf(friend, "eth0")));
      await second.end("SIGKILL");
      web.run("nft", "flush", "table", "inet", "genie");
      const third = agent();
      await third.said("Network policy was not in force and is again put=1");
      expect(await web.call("CHECK")).toMatchObject({ status: 0 });
      expect(rulesIn(web)).toContain("table inet others");
    });
  });

  test("what someone takes away fails CHECK, and is put back", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      const first = agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom("friend"));
      const web = await add("web");
      await until(() => rulesIn(web) !== "");
      await first.end("SIGKILL");
      web.run("nft", "flush", "ruleset");
      const check = await web.call("CHECK");
      expect(check.json?.msg).toMatch(
        /^Network policy of pod default\/p-\S+ is not in force .*: table inet genie is gone;/,
      );
      const second = agent();
      await second.said("is again put=1");
      web.run("nft", "flush", "ruleset");
      await second.said("was taken away from outside and is in force again");
      expect(await web.call("CHECK")).toMatchObject({ status: 0 });
    });
  });

  test("a pod made anew under the same name says nothing about the one that runs", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom());
      const [web, other] = [await add("web"), await add("web")];
      await until(() => rulesIn(web) !== "" && rulesIn(other) !== "");
      const path = (pod: Pod) => `/api/v1/namespaces/default/pods/p-${pod.containerId}`;
      api.put(path(web), podObject("free", "made-anew"));
      api.put(path(other), podObject("free", `uid-${other.containerId}`));
      await until(() => rulesIn(other) === "");
      expect(rulesIn(web)).not.toBe("");
    });
  });

  test("an interface that is being made anew in a pod that runs keeps its rules", async () => {
    await withPoliced(async ({ api, agent, state, add, args }) => {
      agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom());
      const web = await add("web");
      await web.add({ cni: "blue@eth1", ifName: "eth1", args: args(web) });
      await until(() => rulesIn(web).includes('"eth1"'));
      const record = openState(makeHost(), state);
      const made = attachmentsIn(makeHost(), record, netnsId(web.netns));
      const eth1 = made.find(({ ifName }) => ifName === "eth1");
      write(record, () => eth1 && setBroken(record, eth1, "it is being made anew"));
      closeState(record);
      api.put(policyPath("web"), allowFrom("web"));
      await until(() => rulesIn(web).includes(addressOf(web, "eth0")));
      expect(rulesIn(web)).toContain('iifname "eth1"');
    });
  });

  test("what could not be written is tried again, by itself", async () => {
    await withPoliced(async ({ node, api, agent, state, add }) => {
      const flag = join(node.dir, "broken");
      const nft = Bun.which("nft");
      const script = `#!/bin/sh\n[ -e ${flag} ] && exit 1\nexec ${nft} "$@"\n`;
      fakePlugin(node.bin, "nft", script);
      const running = agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom("friend"));
      const web = await add("web");
      const friend = await add("friend");
      await until(() => rulesIn(web).includes(addressOf(friend, "eth0")));
      writeFileSync(flag, "");
      api.put(policyPath("web"), allowFrom());
      await running.said("Cannot keep the network policy");
      rmSync(flag);
      await until(() => !rulesIn(web).includes(addressOf(friend, "eth0")));
      expect(running.log()).not.toContain("was taken away from outside");
    });
  });

  test("what the table enforces since the agent began stays in force", async () => {
    await withPoliced(async ({ node, api, agent, state, add }) => {
      const file = join(node.dir, "plugins.toml");
      const table = readFileSync(file, "utf8");
      writeFileSync(file, table.replace("enforce_policy = true", ""));
      agent();
      await inputsKnown(state);
      writeFileSync(file, table);
      api.put(policyPath("web"), allowFrom());
      await until(() => rowsOf(state, "SELECT 1 FROM policy_inputs WHERE name = 'web'").length > 0);
      const web = await add("web");
      expect(rulesIn(web)).not.toBe("");
      // Once more round: what it decides on now was looked at.
      api.put(policyPath("web"), allowFrom("web"));
      await until(() => rulesIn(web).includes(addressOf(web, "eth0")));
    }, "policy.enforce = true");
  });

  test("of two on one node the second waits for the first to end", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      const first = agent();
      await first.said("genie agent runs");
      const second = agent();
      await second.said("another genie holds it");
      expect(await second.end("SIGTERM")).toBe(0);
      const third = agent();
      await third.said("waiting for it to end");
      await first.end("SIGKILL");
      await third.said("genie agent runs");
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom());
      const web = await add("web");
      await until(() => rulesIn(web) !== "");
    });
  });

  test("what is wrong with a policy is told on it once, and in the report", async () => {
    await withPoliced(async ({ node, api, agent, state, add }) => {
      const running = agent();
      await inputsKnown(state, 3);
      const spec = { podSelector: { matchLabels: { app: "ghost" } }, oops: 1 };
      const ghost = { metadata: { uid: "ghost-uid" }, spec };
      api.put(policyPath("ghost"), ghost);
      api.put(policyPath("web"), allowFrom("friend"));
      const web = await add("web");
      const events = () =>
        api.requests.filter(({ method, path }) => method === "POST" && path.includes("/events"));
      await until(() => events().length === 2);
      const bodies = events().map(({ body }) => JSON.parse(body));
      const about = {
        kind: "NetworkPolicy",
        namespace: "default",
        name: "ghost",
        uid: "ghost-uid",
      };
      for (const body of bodies)
        expect(Object.values(body)).toContainEqual(expect.objectContaining(about));
      expect(JSON.stringify(bodies)).toContain("it selects no pod of namespace default");
      expect(JSON.stringify(bodies)).toContain("oops");
      const report = async (...words: string[]) => {
        const own = ["--cni-config", join(node.dir, "agent.conf")];
        return runGenie(compiledGenie(), {}, "", ["report", ...words, ...own]);
      };
      const { policy } = JSON.parse((await report("--json")).stdout);
      expect(policy).toMatchObject({
        enforced: 1,
        rulesets: [{ namespace: "default" }],
        problems: [{ name: "ghost" }, { name: "ghost" }],
      });
      const text = (await report()).stdout;
      expect(text).toMatch(/^Policies: pods with rules 1, known as of 20\S+ \S+ UTC$/m);
      expect(text).toContain("spec.podSelector: it selects no pod of namespace default");
      const ofPod = (await report("pod", `default/p-${web.containerId}`)).stdout;
      expect(ofPod).toMatch(/Network policy in force since .* UTC\nadd table inet genie\n/);
      api.remove(policyPath("ghost"));
      await until(() => rowsOf(state, "SELECT * FROM policy_problems").length === 0);
      expect(events()).toHaveLength(2);
      await running.end("SIGTERM");
    });
  });

  test("MultiNetworkPolicy, served as v1beta1 alone, holds on a second network", async () => {
    await withPoliced(async ({ node, api, agent, state, args }) => {
      api.serve(multiPolicies);
      const running = agent();
      await inputsKnown(state);
      const red = { type: "bridge", bridge: "red0", ipam: hostLocal(node, ["10.219.0.0/24"]) };
      node.network("red", { cniVersion: "1.0.0", plugins: [red] });
      const [web, peer] = [node.pod(), node.pod()];
      const key = "k8s.v1.cni.cncf.io/policy-for";
      const path = multiPolicies.replace("/multi", "/namespaces/default/multi");
      const policy = { ...allowFrom(), metadata: { annotations: { [key]: "red" } } };
      api.put(`${path}/web`, policy);
      for (const [pod, app] of [
        [web, "web"],
        [peer, "peer"],
      ] as const) {
        const uid = `uid-${pod.containerId}`;
        api.put(`/api/v1/namespaces/default/pods/p-${pod.containerId}`, podObject(app, uid));
        await until(() => isKnown(state, pod));
      }
      await until(() => rowsOf(state, "SELECT 1 FROM policy_inputs WHERE name = 'web'").length > 0);
      await web.add({ cni: "blue,red", args: args(web) });
      await peer.add({ cni: "blue,red", args: args(peer) });
      expect({ blue: reaches(peer, web), red: reaches(peer, web, "eth1") }).toEqual({
        blue: true,
        red: false,
      });
      api.remove(`${path}/web`);
      await until(() => reaches(peer, web, "eth1"));
      await running.end("SIGTERM");
    }, "policy.enforce = true");
  });

  test("pods come and go in a storm of edits: the newest policy, or nothing", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      const running = agent();
      await inputsKnown(state, 3);
      const allow = (block: string) => {
        const spec = { podSelector: {}, policyTypes: ["Ingress"] };
        const ingress = [{ from: [{ ipBlock: { cidr: block } }] }];
        return { metadata: { uid: "storm" }, spec: { ...spec, ingress } };
      };
      let edits = 0;
      let isOver = false;
      const storm = (async () => {
        while (!isOver) {
          api.put(policyPath("storm"), allow(`10.99.${edits++ % 200}.0/24`));
          await Bun.sleep(20);
        }
      })();
      const stay: Pod[] = [];
      const worker = async () => {
        for (let round = 0; round < 3; round++) {
          const pod = await add("web");
          expect(rulesIn(pod)).toContain("drop");
          if (round === 2) stay.push(pod);
          else {
            await pod.del();
            expect(rulesIn(pod)).toBe("");
          }
        }
      };
      await Promise.all(Array.from({ length: 4 }, worker)).finally(() => {
        isOver = true;
      });
      await storm;
      api.put(policyPath("storm"), allow("10.98.7.0/24"));
      for (const pod of stay) await until(() => rulesIn(pod).includes("10.98.7.0/24"));
      expect(rowsOf(state, "SELECT * FROM rulesets")).toHaveLength(stay.length);
      for (const pod of stay) expect(await pod.call("CHECK")).toMatchObject({ status: 0 });
      expect(running.log()).not.toMatch(/error|database is locked/);
    });
  });

  test("an API server that goes, comes back, and has forgotten", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      const running = agent();
      await inputsKnown(state, 3);
      const web = await add("web");
      api.misbehave(
        { kind: "status", status: 503 },
        { kind: "reset" },
        { kind: "status", status: 429 },
      );
      await api.rotate("certificate");
      api.put(policyPath("web"), allowFrom());
      api.watches.compact();
      await until(() => rulesIn(web) !== "");
      expect(running.log()).toContain("Watch of ");
    });
  });

  test("a record that is set aside is written anew, and nothing opens", async () => {
    await withPoliced(async ({ api, agent, state, add }) => {
      const running = agent();
      await inputsKnown(state, 3);
      api.put(policyPath("web"), allowFrom());
      const web = await add("web");
      await until(() => rulesIn(web) !== "");
      for (const suffix of ["", "-wal", "-shm"]) rmSync(join(state, `genie.db${suffix}`));
      await inputsKnown(state, 3);
      expect(rowsOf(state, "SELECT name FROM policy_inputs WHERE resource = 'pods'")).toHaveLength(
        1,
      );
      expect(rulesIn(web)).not.toBe("");
      expect(await running.end("SIGINT")).toBe(0);
    });
  });
});

test.each<[string, [ifName: string, hostEnd: string][], boolean]>([
  ["what it was", [["eth0", "veth1"]], true],
  ["an interface that was attached anew", [["eth0", "veth2"]], false],
  ["another interface", [["eth1", "veth1"]], false],
  ["one more", ["eth0", "eth1"].map((name) => [name, "veth1"]), false],
  ["none", [], false],
])("isSameMade() of %s", (_, names, isSame) => {
  const made = (each: [string, string][]) =>
    each.map(([ifName, name]) => ({ attachment: { ifName }, result: { interfaces: [{ name }] } }));
  const [before, after] = [made([["eth0", "veth1"]]), made(names)] as unknown as Attached[][];
  expect(isSameMade(before ?? [], after ?? [])).toBe(isSame);
});
