/**
 * genie on a node as Debian's packages make one: containerd with its CRI, and podman with CNI, from
 * `genie install` to `genie uninstall`, with real pods all the while.
 */
import { describe, expect, test } from "bun:test";
import { testContainerd } from "./runtimes/containerd.ts";
import { imageName } from "./runtimes/image.ts";
import { bootMachine, machineNeeds, preparePodman, repoDir } from "./runtimes/machine.ts";
import {
  blue,
  green,
  noTraces,
  on,
  openNode,
  readAddresses,
  red,
  traces,
  writeNetworks,
} from "./runtimes/node.ts";
import { reasonToSkip } from "./skip.ts";

const skipReason = reasonToSkip(...machineNeeds);

describe.skipIf(skipReason !== undefined)("containerd:", () => testContainerd(() => openNode()));

describe.skipIf(skipReason !== undefined)("podman:", () => {
  test("containers on genie's networks and on podman's own", async () => {
    await using machine = await bootMachine();
    await machine.run("rm", "-r", "/etc/containerd");
    await preparePodman(machine);
    await writeNetworks(machine, [blue, green, red]);
    machine.write("/run/plugins.toml", '[default]\nnetworks = ["blue", "green@eth5"]\n');
    const program = `${repoDir}/dist/genie`;
    const podman = (...words: string[]) => machine.run("podman", ...words);
    await machine.run(program, "install", "--table=/run/plugins.toml");
    expect((await podman("network", "ls", "--format={{.Name}}")).split("\n")).toContain("genie");

    const run = ["run", "--detach", `--cgroup-parent=${machine.cgroup}`];
    // Left to itself, podman names the interfaces of two networks in any order.
    const [genie, own] = [
      "--network=genie:interface_name=eth0",
      "--network=red:interface_name=eth1",
    ];
    const addresses = async (name: string) => {
      const pid = (await podman("inspect", name, "--format={{.State.Pid}}")).trim();
      const enter = ["nsenter", `--target=${pid}`, "--net", "--"];
      return readAddresses(await machine.run(...enter, "ip", "-json", "-4", "addr"));
    };
    await podman(...run, genie, "--name=one", "--publish=8080:80", imageName);
    await podman(...run, genie, own, "--name=two", imageName);
    const [one, two] = [await addresses("one"), await addresses("two")];
    const both = { eth0: expect.stringMatching(on.blue), eth5: expect.stringMatching(on.green) };
    expect(one).toEqual(both);
    expect(two).toEqual({ ...both, eth1: expect.stringMatching(on.red) });
    expect(await machine.run("iptables-save", "-t", "nat")).toContain(`${one["eth0"]}:80`);
    expect(await machine.call(program, "uninstall")).toMatchObject({ status: 1 });

    await podman("network", "disconnect", "genie", "two");
    expect(await addresses("two")).toEqual({ eth1: two["eth1"] ?? "" });
    await podman("network", "connect", "genie", "two");
    await podman("rm", "--force", "--time=0", "one", "two");
    expect(await traces(machine)).toEqual(noTraces);
    expect(await machine.call(program, "uninstall")).toMatchObject({ status: 0 });
  });
});
