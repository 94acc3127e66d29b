/**
 * genie on a node with the containerd of Debian's next release, 2.x: all that runtimes.test.ts does
 * with that of this one, and what is new since.
 */
import { describe, expect, test } from "bun:test";
import { testContainerd } from "./runtimes/containerd.ts";
import { nextNeeds } from "./runtimes/machine.ts";
import { blue, green, openNode } from "./runtimes/node.ts";
import { needing } from "./skip.ts";

const { absent } = needing(...nextNeeds);

describe.skipIf(absent)("containerd 2:", () => {
  testContainerd(() => openNode("next"));

  test("polls STATUS, and says what genie says", async () => {
    await using node = await openNode("next");
    const { machine, cri } = node;
    expect(await machine.run("containerd", "--version")).toMatch(/ 2\.\d+\.\d+/);
    await node.networks(blue, green);
    await node.install();
    await node.loaded("genie");
    expect(await cri.networkIssue()).toBeUndefined();
    await machine.run("mv", "/usr/lib/cni/bridge", "/run");
    expect(await cri.networkIssue()).toMatch(/plugin "bridge" is in none of \/usr\/lib\/cni/);
    // ADD and DEL are served meanwhile.
    const pod = await node.start({ cni: "green" });
    await pod.end();
    await machine.run("mv", "/run/bridge", "/usr/lib/cni");
    expect(await cri.networkIssue()).toBeUndefined();
  });
});
