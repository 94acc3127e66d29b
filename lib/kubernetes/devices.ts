/**
 * Devices of device plugins: which network of a pod gets which of its devices, and the file in
 * which a device plugin or a delegate describes the device of an attachment, for the status
 * annotation (`device-info`, NPWG v1.3 §5.3.7). Delegates get its path as the capability
 * `CNIDeviceInfoFile`. A file that cannot be used is a warning, and fails no ADD and no DEL.
 * Source: Device Information Specification 1.1.0 (NPWG) §3 (format), §4 (files), §5.1 (capability).
 */
import { createHash } from "node:crypto";
import { lstatSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import type { Host } from "../call.ts";
import { CniError, code, log, oneLine, toCniError } from "../cni.ts";
import { isObject, parseJson } from "../json.ts";
import type { Attachment } from "../record.ts";
import { podLabel } from "../request.ts";
import type { PodName } from "./grpc.ts";

/**
 * Gives each attachment whose definition names a resource the device that the kubelet allocated.
 * @param held attachments that the pod has already: their devices are in use
 * @param resolved the networks of the attachments, in the same order
 * @throws CniError 7 when the pod asked for fewer devices; 11 when the kubelet cannot be asked
 */
export async function assignDevices(
  host: Host,
  { pod, kubeletDir, held }: { pod: PodName; kubeletDir: string; held: readonly Attachment[] },
  attachments: Attachment[],
  resolved: readonly { resourceName?: string }[],
): Promise<void> {
  // Loaded only here, since that takes 4 ms: DEL removes a file and asks no kubelet.
  const { podDevices } = await import("./grpc.ts");
  const allocated = await podDevices(host, join(kubeletDir, "pod-resources/kubelet.sock"), pod);
  const inUse = new Set(held.map(({ device }) => device?.deviceId));
  for (const [index, { resourceName }] of resolved.entries()) {
    const attachment = attachments[index];
    if (!resourceName || !attachment) continue;
    // The n-th network that names a resource gets its n-th device.
    const nth = resolved.slice(0, index).filter((one) => one.resourceName === resourceName).length;
    const free = (allocated.get(resourceName) ?? []).filter((id) => !inUse.has(id));
    const deviceId = free[nth];
    if (deviceId === undefined) {
      const what = `Cannot give pod "${oneLine(podLabel(pod), 330)}" device ${nth + 1}`;
      const had = `of "${oneLine(resourceName, 200)}": it was allocated ${free.length}`;
      const remedy = "name the resource in the limits of its containers once per network";
      throw new CniError(code.invalidConfig, `${what} ${had}, ${remedy}`);
    }
    const { list, containerId, ifName, capabilityArgs } = attachment;
    const file = deviceInfoPath(list.name, containerId, ifName);
    attachment.capabilityArgs = { ...capabilityArgs, deviceID: deviceId, CNIDeviceInfoFile: file };
    // Every plugin of the chain gets the device, as under Multus: rdma needs it behind sriov.
    const device = { deviceID: deviceId, pciBusID: deviceId };
    attachment.list = { ...list, plugins: list.plugins.map((one) => ({ ...one, ...device })) };
    attachment.device = { resourceName, deviceId };
    attachment.deviceInfoFile = file;
  }
}

/** Folder of device information files: `dp` holds those of device plugins, `cni` ours. */
const deviceInfoDir = "/var/run/k8s.cni.cncf.io/devinfo";

/** Largest file read, in bytes; the formats of the specification need a few hundred. */
const fileBytesMax = 64 * 1024;
/** Longest file name used as it is, in characters; Linux takes 255. */
const nameLengthMax = 200;

/**
 * The CNI device information file of one attachment: `<network>-<containerId>_<ifName>`, as Multus
 * names it. A name with unsafe characters or too many ends in a hash of the whole, so it is unique.
 * @param network name as in the status annotation, e.g. `ns/name`; may be hostile
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
 * Copies the device plugin's file about a device to that of an attachment, before ADD. A file that
 * an earlier attachment left there is replaced or, when the device plugin has none, removed.
 * @param path see {@link deviceInfoPath}
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
  const info = readDeviceInfo(host, join(baseDir, "dp", `${parts.join("-")}-device.json`));
  if (info === undefined) return false;
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
 * @returns undefined when there is none, or when it is unusable: then a warning says why
 */
export function readDeviceInfo(host: Host, path: string): Record<string, unknown> | undefined {
  try {
    // Checked first: opening a pipe would wait for a writer.
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
