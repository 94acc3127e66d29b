/**
 * Device information files: what a device plugin or a delegate says of the device behind an
 * attachment, for the status annotation (`device-info`, NPWG v1.3 §5.3.7). One file per attachment,
 * handed to the delegates as the capability `CNIDeviceInfoFile`.
 *
 * Apart from device.ts because DEL, which removes the file, never asks the kubelet. Nothing here
 * fails an ADD or a DEL: a file that cannot be used is a warning.
 * Source: Device Information Specification 1.1.0 (NPWG) §3 (format), §4 (files), §5.1 (capability).
 */
import { createHash } from "node:crypto";
import { lstatSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { type Host, log, toCniError } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import { oneLine } from "../text.ts";

/** Where device information files live: `dp` is the device plugins', `cni` ours. */
export const deviceInfoDir = "/var/run/k8s.cni.cncf.io/devinfo";

/** Largest file read, in bytes; the longest of the spec's formats has a few hundred. */
const fileBytesMax = 64 * 1024;
/** Longest file name used as it is, in characters; Linux takes 255. */
const nameLengthMax = 200;

/**
 * The CNI device information file of one attachment: `<network>-<containerId>_<ifName>`, as Multus
 * names it. A name that cannot be kept whole ends in a hash of all of it, so it stays unique.
 *
 * @param network name as in the status annotation, e.g. `ns/name`; may be hostile
 * @param baseDir instead of {@link deviceInfoDir}
 */
export function deviceInfoPath(
  network: string,
  containerId: string,
  ifName: string,
  baseDir = deviceInfoDir,
): string {
  const whole = `${network.replaceAll("/", "-")}-${containerId}_${ifName}`;
  const safe = whole.replace(/[^A-Za-z0-9_.@+-]/g, "-");
  if (safe === whole && safe.length <= nameLengthMax) return join(baseDir, "cni", safe);
  const hash = createHash("sha256").update(whole).digest("hex").slice(0, 16);
  return join(baseDir, "cni", `${safe.slice(0, nameLengthMax)}-${hash}`);
}

/**
 * Copies what the device plugin wrote of a device to the file of an attachment, before ADD. What an
 * earlier attachment left there is replaced or, when the device plugin wrote nothing, removed.
 *
 * @param path what {@link deviceInfoPath} gave
 * @param device the resource as the NetworkAttachmentDefinition names it, and the id taken of it
 * @returns true when there is a file now
 */
export function copyDeviceInfo(
  host: Host,
  path: string,
  device: { resourceName: string; deviceId: string },
  baseDir = deviceInfoDir,
): boolean {
  removeDeviceInfo(host, path);
  // Slashes become dashes in both parts: no part leads out of the folder.
  const parts = [device.resourceName, device.deviceId].map((part) => part.replaceAll("/", "-"));
  const source = join(baseDir, "dp", `${parts.join("-")}-device.json`);
  const info = readDeviceInfo(host, source);
  if (info === undefined) return false;
  // One name is enough: a container has one invocation at a time.
  const partial = `${path}.new`;
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o755 });
    removeDeviceInfo(host, partial);
    writeFileSync(partial, JSON.stringify(info), { flag: "wx", mode: 0o644 });
    renameSync(partial, path);
    return true;
  } catch (error) {
    removeDeviceInfo(host, partial);
    warn(host, "write", path, toCniError(error).message);
    return false;
  }
}

/**
 * Reads a device information file. Its keys are kept as they are; it must be a JSON object with
 * a `type` (§3.1.1).
 *
 * @returns undefined when there is none, or when it is unusable: then a warning says why
 */
export function readDeviceInfo(host: Host, path: string): Record<string, unknown> | undefined {
  try {
    // Looked at first: opening a pipe would wait for a writer.
    const stat = lstatSync(path, { throwIfNoEntry: false });
    if (stat === undefined) return undefined;
    if (!stat.isFile()) return warn(host, "read", path, "it is not a regular file");
    if (stat.size > fileBytesMax) {
      return warn(host, "read", path, `it is larger than ${fileBytesMax} bytes`);
    }
    const info = parseJson(readFileSync(path, "utf8"), "its text");
    if (isObject(info) && typeof info["type"] === "string") return info;
    return warn(host, "read", path, 'it is not an object with a "type"');
  } catch (error) {
    return warn(host, "read", path, toCniError(error).message);
  }
}

/** Removes the file of an attachment, at DEL (§4.2.1). Already gone is fine. */
export function removeDeviceInfo(host: Host, path: string): void {
  try {
    rmSync(path, { force: true });
  } catch (error) {
    warn(host, "remove", path, toCniError(error).message);
  }
}

function warn(host: Host, verb: string, path: string, reason: string): undefined {
  const why = oneLine(reason, 200);
  log(host, "warn", `Cannot ${verb} device information file ${oneLine(path, 400)}: ${why}`);
}
