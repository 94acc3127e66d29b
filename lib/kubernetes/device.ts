/**
 * Devices of device plugins: which device the kubelet gave a pod. Loaded only when a
 * NetworkAttachmentDefinition names a resource, so its 4 ms are paid by nobody else.
 *
 * Source: k8s.io/kubelet pkg/apis/podresources/v1 api.proto.
 */
import { CniError, code, type Host } from "../cni.ts";
import { oneLine } from "../text.ts";
import {
  empty,
  type GrpcChannel,
  grpc,
  openChannel,
  type Peer,
  readFields,
  textField,
  unusable,
  utf8,
} from "./grpc.ts";

/** The pod whose devices are wanted. The kubelet's API knows no uid. */
export interface DeviceRequest {
  namespace: string;
  name: string;
}

const kubelet: Peer = {
  name: "kubelet",
  absent: "does the kubelet run, with another root folder",
};

/**
 * `Get` is younger than `List` (KubeletPodResourcesGet, on since 1.34). An old kubelet says
 * UNIMPLEMENTED; one with the gate off, or that knows no such pod, returns a bare error: UNKNOWN.
 */
const useListInstead: readonly number[] = [grpc.unknown, grpc.notFound, grpc.unimplemented];

/**
 * Asks the kubelet which devices it gave a pod. Ids are sorted, as Multus has
 * them, because the kubelet's own order changes from call to call, and each is there once.
 *
 * @returns device ids by resource name; empty when the pod has none
 * @throws CniError 11 when there is no usable answer within `timeoutMs`, or the pod is not in it
 */
export async function podDevices(
  host: Host,
  socket: string,
  pod: DeviceRequest,
  timeoutMs = 2000,
): Promise<Map<string, string[]>> {
  let channel: GrpcChannel | undefined;
  try {
    channel = await openChannel(host, socket, kubelet, timeoutMs);
    for (const method of ["Get", "List"] as const) {
      const request = method === "Get" ? getRequest(pod) : empty;
      const answer = await channel.call(`/v1.PodResourcesLister/${method}`, request);
      if (answer.status !== grpc.ok) {
        if (method === "Get" && useListInstead.includes(answer.status)) continue;
        throw unusable(`it answered ${method} with gRPC status ${answer.status}`, answer.text);
      }
      const devices = readDevices(answer.message, pod);
      if (devices !== undefined) return devices;
    }
    throw unusable("it does not list that pod, which may be deleted or new");
  } catch (error) {
    if (!(error instanceof CniError)) throw error;
    const { message, details } = error;
    throw new CniError(
      code.tryAgainLater,
      `Cannot get the devices of pod "${label(pod)}" from the kubelet at ${socket}: ${message}`,
      { details, cause: error },
    );
  } finally {
    channel?.close();
  }
}

/**
 * The device of the n-th network of a pod that names a resource: the n-th device of that resource.
 *
 * @param devices what {@link podDevices} gave
 * @param index how many networks before this one name the same resource, from 0
 * @throws CniError 7 when the pod asked for fewer devices than it names networks
 */
export function takeDevice(
  devices: ReadonlyMap<string, readonly string[]>,
  resourceName: string,
  index: number,
  pod: DeviceRequest,
): string {
  const ids = devices.get(resourceName) ?? [];
  const id = ids[index];
  if (id !== undefined) return id;
  const resource = oneLine(resourceName, 200);
  throw new CniError(
    code.invalidConfig,
    `Cannot give pod "${label(pod)}" device ${index + 1} of "${resource}": it was allocated ` +
      `${ids.length}, name the resource in the limits of its containers once per network`,
  );
}

function label({ namespace, name }: DeviceRequest): string {
  return oneLine(`${namespace}/${name}`, 330);
}

/** A GetPodResourcesRequest: pod_name = 1, pod_namespace = 2. */
function getRequest({ name, namespace }: DeviceRequest): Uint8Array {
  return Buffer.concat([textField(1, name), textField(2, namespace)]);
}

/** Reads a List or a Get answer, which look alike: PodResources in field 1. */
function readDevices(answer: Uint8Array, pod: DeviceRequest): Map<string, string[]> | undefined {
  const found = new Map<string, Set<string>>();
  let isListed = false;
  readFields(answer, (field, bytes) => {
    if (field !== 1) return;
    let name = "";
    let namespace = "";
    const containers: Uint8Array[] = [];
    readFields(bytes, (part, value) => {
      if (part === 1) name = utf8(value);
      else if (part === 2) namespace = utf8(value);
      else if (part === 3) containers.push(value);
    });
    if (name !== pod.name || namespace !== pod.namespace) return;
    isListed = true;
    for (const container of containers) {
      readFields(container, (part, value) => part === 2 && readContainerDevices(value, found));
    }
  });
  if (!isListed) return undefined;
  return new Map([...found].map(([resource, ids]) => [resource, [...ids].sort()]));
}

/** ContainerDevices: resource_name = 1, device_ids = 2. */
function readContainerDevices(bytes: Uint8Array, found: Map<string, Set<string>>): void {
  let resource = "";
  const ids: string[] = [];
  readFields(bytes, (part, value) => {
    if (part === 1) resource = utf8(value);
    else if (part === 2) ids.push(utf8(value));
  });
  const known = found.get(resource) ?? new Set();
  for (const id of ids) known.add(id);
  found.set(resource, known);
}
