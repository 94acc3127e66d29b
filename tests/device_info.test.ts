import { describe, expect, test } from "bun:test";
import { mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import {
  copyDeviceInfo,
  deviceInfoPath,
  readDeviceInfo,
  removeDeviceInfo,
} from "../lib/kubernetes/devices.ts";
import { makeHost, tempDir } from "./fakes.ts";

/** The example of the Device Information Specification 1.1.0 §4.3. */
const info = {
  type: "pci",
  version: "1.1.0",
  pci: { "pci-address": "0000:01:02.2", "pf-pci-address": "0000:01:02.0" },
};
const device = { resourceName: "intel.com/sriov", deviceId: "0000:01:02.2" };

/** A devinfo folder in which the device plugin wrote this, if anything. */
function stage(base: string, text?: string): { path: string } {
  mkdirSync(join(base, "dp"), { recursive: true });
  const file = join(base, "dp", "intel.com-sriov-0000:01:02.2-device.json");
  if (text !== undefined) writeFileSync(file, text);
  return { path: deviceInfoPath("team-a/sriov", "c1", "net1", base) };
}

describe("deviceInfoPath()", () => {
  test("is where Multus puts it", () => {
    expect(deviceInfoPath("team-a/sriov", "c1", "net1")).toBe(
      "/var/run/k8s.cni.cncf.io/devinfo/cni/team-a-sriov-c1_net1",
    );
  });

  test.each([
    ["a way out", "../../etc/passwd"],
    ["nothing but dots", ".."],
    ["a NUL and a line", "a\0b\nc"],
    ["another alphabet", "сеть"],
    ["4,000 characters", "x".repeat(4000)],
  ])("keeps %s inside the folder", (_, network) => {
    const path = deviceInfoPath(network, "c1", "net1", "/base");
    expect(dirname(path)).toBe("/base/cni");
    expect(basename(path)).toMatch(/^[A-Za-z0-9_.@+-]{5,230}$/);
    expect(path).toBe(deviceInfoPath(network, "c1", "net1", "/base"));
  });

  test("is another one for each attachment, however hostile or long", () => {
    const long = "c".repeat(256);
    const paths = [
      ["a\0", "c1", "net1"],
      ["a\n", "c1", "net1"],
      ["a-", "c1", "net1"],
      ["a", long, "net1"],
      ["a", long, "net2"],
    ].map(([network = "", id = "", ifName = ""]) => deviceInfoPath(network, id, ifName));
    expect(new Set(paths).size).toBe(paths.length);
  });
});

describe("copyDeviceInfo()", () => {
  test("hands on what the device plugin wrote, keys we do not know included", () => {
    using dir = tempDir();
    const text = JSON.stringify({ ...info, vendor: { big: 1 } }).replace(
      ":1}",
      ":12345678901234567890}",
    );
    const { path } = stage(dir.path, text);
    const host = makeHost();
    expect(copyDeviceInfo(host, path, device, dir.path)).toBe(true);
    expect(readFileSync(path, "utf8")).toBe(text);
    expect(readDeviceInfo(host, path)).toMatchObject(info);
    expect(readdirSync(dirname(path))).toEqual([basename(path)]);
    expect(host.written.stderr).toBe("");
  });

  test("is silent when the device plugin wrote nothing", () => {
    using dir = tempDir();
    const { path } = stage(dir.path);
    const host = makeHost();
    expect(copyDeviceInfo(host, path, device, dir.path)).toBe(false);
    expect(readDeviceInfo(host, path)).toBeUndefined();
    expect(host.written.stderr).toBe("");
  });

  test("replaces what an earlier attachment left, a link included", () => {
    using dir = tempDir();
    const { path } = stage(dir.path, JSON.stringify(info));
    const secret = join(dir.path, "secret");
    writeFileSync(secret, "kept");
    mkdirSync(dirname(path));
    symlinkSync(secret, path);
    expect(copyDeviceInfo(makeHost(), path, device, dir.path)).toBe(true);
    expect(readFileSync(secret, "utf8")).toBe("kept");
    expect(readDeviceInfo(makeHost(), path)).toEqual(info);
  });

  test("does not keep the description of another device", () => {
    using dir = tempDir();
    const { path } = stage(dir.path);
    mkdirSync(dirname(path));
    writeFileSync(path, JSON.stringify(info));
    expect(copyDeviceInfo(makeHost(), path, device, dir.path)).toBe(false);
    expect(readDeviceInfo(makeHost(), path)).toBeUndefined();
  });

  test.each([
    ["leads out of the folder", "../../secret"],
    ["holds a NUL", "a\0b"],
    ["is longer than a file name", "x".repeat(5000)],
  ])("takes no file for a device id that %s", (_, deviceId) => {
    using dir = tempDir();
    const { path } = stage(dir.path);
    writeFileSync(join(dir.path, "secret-device.json"), JSON.stringify(info));
    const hostile = { resourceName: "r", deviceId };
    expect(copyDeviceInfo(makeHost(), path, hostile, dir.path)).toBe(false);
  });

  test("warns when it cannot write, and fails nothing", () => {
    using dir = tempDir();
    const { path } = stage(dir.path, JSON.stringify(info));
    writeFileSync(dirname(path), "a file where the folder should be");
    const host = makeHost();
    expect(copyDeviceInfo(host, path, device, dir.path)).toBe(false);
    expect(host.written.stderr).toContain(`Cannot write device information file ${path}: `);
  });
});

describe("readDeviceInfo() warns and gives nothing for", () => {
  test.each([
    ["no JSON", "{", "it is not valid JSON"],
    ["an empty file", "", "it is not valid JSON"],
    ["a list", "[]", 'it is not an object with a "type"'],
    ["an object without type", '{"version":"1.1.0"}', 'it is not an object with a "type"'],
    ["a type that is no text", '{"type":1}', 'it is not an object with a "type"'],
    ["JSON 200 levels deep", `${"[".repeat(200)}${"]".repeat(200)}`, "nests deeper"],
    ["65 KiB", JSON.stringify({ type: "x".repeat(65 * 1024) }), "it is larger than 65536 bytes"],
  ])("%s", (_, text, reason) => {
    using dir = tempDir();
    const path = join(dir.path, "info");
    writeFileSync(path, text);
    const host = makeHost();
    expect(readDeviceInfo(host, path)).toBeUndefined();
    expect(host.written.stderr).toStartWith(
      `genie: warn: Cannot read device information file ${path}: `,
    );
    expect(host.written.stderr).toContain(reason);
    expect(host.written.stderr.split("\n")).toHaveLength(2);
  });

  test.each(["a folder", "a pipe", "a link"])("%s, without waiting for it", (what) => {
    using dir = tempDir();
    const path = join(dir.path, "info");
    if (what === "a folder") mkdirSync(path);
    else if (what === "a link") symlinkSync("/dev/zero", path);
    else Bun.spawnSync(["mkfifo", path]);
    const host = makeHost();
    expect(readDeviceInfo(host, path)).toBeUndefined();
    expect(host.written.stderr).toContain("it is not a regular file");
  });
});

test("removeDeviceInfo() removes the file, is happy without it, and never throws", () => {
  using dir = tempDir();
  const path = join(dir.path, "info");
  writeFileSync(path, "{}");
  const host = makeHost();
  removeDeviceInfo(host, path);
  removeDeviceInfo(host, path);
  expect({ left: readdirSync(dir.path), stderr: host.written.stderr }).toEqual({
    left: [],
    stderr: "",
  });
  mkdirSync(path);
  removeDeviceInfo(host, path);
  expect(host.written.stderr).toContain(`Cannot remove device information file ${path}: `);
});
