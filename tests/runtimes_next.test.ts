/**
 * genie on a node with the containerd of Debian's next release, 2.x: all that runtimes.test.ts does
 * with that of this one, and what is new since.
 */
import { describe, expect, test } from "bun:test";
import { testContainerd } from "./runtimes/containerd.ts";
import { nextNeeds } from "./runtimes/machine.ts";
import { openNode } from "./runtimes/node.ts";
import { needing } from "./skip.ts";

const { absent } = needing(...nextNeeds);

describe.skipIf(absent)("containerd 2:", () => {
  testContainerd(() => openNode("next"));

  test("is there", async () => {
    await using node = await openNode("next");
    const version = await node.machine.run("containerd", "--version");
    expect(version).toMatch(/ 2\.\d+\.\d+/);
  });
});
