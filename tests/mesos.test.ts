/**
 * What the `network/cni` isolator of Apache Mesos sends (cni.cpp): no CNI_ARGS, no
 * capabilities, the task's labels in `args`, one call per network, all of a container at once.
 */
import { describe, expect, test } from "bun:test";
import { calls, fakePlugin } from "./fakes.ts";
import { left, makeNode, type Node, nothing, wire, wireError } from "./wire.ts";

const container = "b9e5e1b3-63a8-4a9e-9d2a-0b2b8d1c7f5e";
const nested = `${container}.3f0f5a55-6b0f-4f0c-9f0b-7a3c1a6d8e42`;

/** JSON form of the protobuf NetworkInfo. */
function networkInfo(name: string, labels: Record<string, string>): object {
  return {
    name,
    ip_addresses: [{ protocol: "IPv4" }],
    groups: ["web"],
    labels: { labels: Object.entries(labels).map(([key, value]) => ({ key, value })) },
    port_mappings: [{ host_port: 8080, container_port: 80, protocol: "tcp" }],
  };
}

/** The administrator's file with what the isolator puts into it; it checkpoints that for DEL. */
function config(name: string, labels: Record<string, string>, version?: string): object {
  return {
    cniVersion: version,
    name,
    type: "genie",
    ipam: { type: "host-local" },
    args: {
      "org.example.admin": { kept: true },
      "org.apache.mesos": { network_info: networkInfo(name, labels) },
    },
  };
}

/** The environment of the isolator, over that of a good call. */
const mesos = (more: Record<string, string | undefined> = {}) => ({
  CNI_CONTAINERID: container,
  CNI_ARGS: undefined,
  PATH: "/usr/bin:/bin",
  ...more,
});

function mesosNode(): Node {
  const list = (name: string, type: string) => ({ cniVersion: "1.0.0", name, plugins: [{ type }] });
  return makeNode({
    table: '[default]\nnetworks = ["blue"]\n',
    lists: {
      "10-blue.conflist": list("blue", "bridge"),
      "20-green.conf": list("green", "macvlan"),
    },
    delegates: {
      bridge: {
        reserve: "$DIR/reserved",
        ips: ["10.22.0.5/24", "fd22::5/64"],
        gateway: "10.22.0.1",
        routes: [{ dst: "10.0.0.0/8", gw: "10.22.0.1" }],
        dns: { nameservers: ["10.22.0.2"] },
      },
      macvlan: { reserve: "$DIR/reserved", ips: ["10.33.0.7/24"] },
    },
  });
}

const blue = {
  ip4: {
    ip: "10.22.0.5/24",
    gateway: "10.22.0.1",
    routes: [{ dst: "10.0.0.0/8", gw: "10.22.0.1" }],
  },
  ip6: { ip: "fd22::5/64" },
  dns: { nameservers: ["10.22.0.2"] },
};
const green = { ip4: { ip: "10.33.0.7/24" } };

describe("Mesos", () => {
  test.concurrent.each([
    ["a version", { cni: "blue" }, "0.2.0", "0.2.0", blue],
    ["the first version", { cni: "blue" }, "0.1.0", "0.1.0", blue],
    ["an empty version", { cni: "blue" }, "", "0.1.0", blue],
    ["no version", { cni: "green" }, undefined, "0.1.0", green],
    ["two networks", { cni: "blue,green@eth7" }, "0.2.0", "0.2.0", blue],
    ["two networks in the other order", { cni: "green@eth7,blue" }, "0.2.0", "0.2.0", blue],
    ["other labels only", { team: "a" }, "0.2.0", "0.2.0", blue],
    ["no labels", {}, "0.2.0", "0.2.0", blue],
  ])("with %s gets the primary's addresses, and DEL from the checkpoint", async (...row) => {
    const [, labels, version, answered, expected] = row;
    using node = mesosNode();
    const stdin = config("mesos-net", labels, version);
    const added = await wire(node, { command: "ADD", env: mesos(), stdin });
    expect(JSON.parse(added.stdout)).toEqual({ cniVersion: answered, ...expected });
    expect(added).toEqual({ ...added, stderr: "", status: 0 });
    const gone = mesos({ CNI_NETNS: undefined });
    const deleted = await wire(node, { command: "DEL", env: gone, stdin });
    expect(deleted).toEqual({ stdout: "", stderr: "", status: 0 });
    expect(left(node)).toEqual(nothing);
  });

  test("hands a delegate the task's network_info and no CNI_ARGS of its own", async () => {
    using node = mesosNode();
    const stdin = config("mesos-net", { cni: "green" }, "0.2.0");
    await wire(node, { command: "ADD", env: mesos(), stdin });
    const [call] = calls(node.bin);
    expect(JSON.parse(call?.stdin ?? "")).toEqual({
      cniVersion: "1.0.0",
      name: "green",
      type: "macvlan",
      args: {
        "org.example.admin": { kept: true },
        "org.apache.mesos": { network_info: networkInfo("mesos-net", { cni: "green" }) },
      },
    });
    expect(call?.env["CNI_ARGS"]).toBe("");
  });

  test("joins networks at once for one container, nested too, and leaves them so", async () => {
    using node = mesosNode();
    const networks = [
      { ifName: "eth0", stdin: config("net-a", { cni: "blue" }, "0.2.0"), expected: blue },
      { ifName: "eth1", stdin: config("net-b", { cni: "green" }, "0.2.0"), expected: green },
    ];
    const all = [container, nested].flatMap((id) =>
      networks.map((network) => ({ ...network, env: { CNI_CONTAINERID: id } })),
    );
    const run = (command: string, more: Record<string, string | undefined> = {}) =>
      Promise.all(
        all.map(({ ifName, stdin, env }) =>
          wire(node, { command, stdin, env: mesos({ CNI_IFNAME: ifName, ...env, ...more }) }),
        ),
      );
    const added = await run("ADD");
    expect(added.map(({ stdout }) => JSON.parse(stdout))).toEqual(
      all.map(({ expected }) => ({ cniVersion: "0.2.0", ...expected })),
    );
    expect(left(node).rows.sort()).toEqual(
      [container, nested].flatMap((id) => [`${id} eth0 attached`, `${id} eth1 attached`]),
    );
    const deleted = await run("DEL", { CNI_NETNS: undefined });
    expect(deleted).toEqual(all.map(() => ({ stdout: "", stderr: "", status: 0 })));
    expect(left(node)).toEqual(nothing);
  });

  test.each([
    ["an unknown network", { cni: "red" }, 101],
    ["a malformed label", { cni: "blue," }, 7],
  ])("with %s fails, in its version", async (_name, labels, code) => {
    using node = mesosNode();
    const stdin = config("mesos-net", labels, "0.2.0");
    const run = await wire(node, { command: "ADD", env: mesos(), stdin });
    expect(wireError(run)).toMatchObject({ cniVersion: "0.2.0", code });
    expect(left(node)).toEqual(nothing);
  });

  test.each([
    ["labels that are no list", { labels: { labels: "cni=blue" } }],
    ["a label without a key", { labels: { labels: [{ value: "blue" }] } }],
  ])("with %s fails", async (_name, network_info) => {
    using node = mesosNode();
    const stdin = { ...config("mesos-net", {}), args: { "org.apache.mesos": { network_info } } };
    expect(wireError(await wire(node, { command: "ADD", env: mesos(), stdin })).code).toBe(7);
  });

  test("of two calls that want one interface name the second fails, the first stays", async () => {
    using node = mesosNode();
    const first = config("net-a", { cni: "blue,green" }, "0.2.0");
    await wire(node, { command: "ADD", env: mesos(), stdin: first });
    const stdin = config("net-b", { cni: "green" }, "0.2.0");
    const run = await wire(node, { command: "ADD", env: mesos({ CNI_IFNAME: "eth1" }), stdin });
    expect(wireError(run)).toMatchObject({ code: 105 });
    const rows = [`${container} eth0 attached`, `${container} eth1 attached`];
    expect(left(node)).toEqual({ rows, reserved: [`${container}-eth0`, `${container}-eth1`] });
  });

  test("undoes all networks when one fails", async () => {
    using node = mesosNode();
    fakePlugin(node.bin, "macvlan", { ADD: { error: { code: 110, msg: "no parent" } } });
    const stdin = config("mesos-net", { cni: "blue,green@eth7" }, "0.2.0");
    const run = await wire(node, { command: "ADD", env: mesos(), stdin });
    expect(wireError(run)).toMatchObject({ cniVersion: "0.2.0", code: 110 });
    expect(left(node)).toEqual(nothing);
  });
});
