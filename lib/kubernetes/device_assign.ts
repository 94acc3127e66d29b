/** Devices of device plugins for what is planned: each network that takes one gets its own. */
import { join } from "node:path";
import type { Host } from "../cni.ts";
import type { NetworkConfigList } from "../netconf.ts";
import type { Attachment, PodIdentity } from "../state.ts";
import { podDevices, takeDevice } from "./device.ts";
import { deviceInfoPath } from "./device_info.ts";

/**
 * Gives each attachment whose definition names a resource the device that kubelet allocated.
 * @param resolved the networks of the attachments, in the same order
 * @param held what the pod has already: the devices of those are taken
 * @throws CniError 7 when it asked for fewer devices; 11 when the kubelet cannot be asked
 */
export async function assignDevices(
  host: Host,
  kubeletDir: string,
  pod: PodIdentity,
  attachments: Attachment[],
  resolved: readonly { resourceName?: string }[],
  held: readonly Attachment[],
): Promise<void> {
  const socket = join(kubeletDir, "pod-resources/kubelet.sock");
  const inUse = new Set(held.map(({ device }) => device?.deviceId));
  const allocated = [...(await podDevices(host, socket, pod))];
  const devices = new Map(
    allocated.map(([name, ids]) => [name, ids.filter((id) => !inUse.has(id))] as const),
  );
  const taken = new Map<string, number>();
  for (const [index, { resourceName }] of resolved.entries()) {
    const attachment = attachments[index];
    if (!resourceName || !attachment) continue;
    const nth = taken.get(resourceName) ?? 0;
    taken.set(resourceName, nth + 1);
    const deviceId = takeDevice(devices, resourceName, nth, pod);
    attachment.list = withDevice(attachment.list, deviceId);
    const { list, containerId, ifName } = attachment;
    const file = deviceInfoPath(list.name, containerId, ifName);
    attachment.capabilityArgs = {
      ...attachment.capabilityArgs,
      deviceID: deviceId,
      CNIDeviceInfoFile: file,
    };
    attachment.device = { resourceName, deviceId };
    attachment.deviceInfoFile = file;
  }
}

/** Every plugin of the chain learns the device, as under Multus: rdma needs it behind sriov. */
function withDevice(list: NetworkConfigList, deviceId: string): NetworkConfigList {
  const device = { deviceID: deviceId, pciBusID: deviceId };
  return { ...list, plugins: list.plugins.map((plugin) => ({ ...plugin, ...device })) };
}
