import { afterAll, describe, expect, test } from "bun:test";
import { mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { CniError, code } from "../lib/cni.ts";
import { assignDevices } from "../lib/kubernetes/devices.ts";
import { podDevices } from "../lib/kubernetes/grpc.ts";
import { makeHost, tempDir } from "./fakes.ts";
import {
  field,
  frame,
  grpcStatus,
  headerBlock,
  type KubeletPod,
  listAnswer,
  type Peer,
  type Reply,
  startKubelet,
  startRawPeer,
} from "./podresources.ts";
import { madeAttachment } from "./record.ts";

const deviceModule = join(import.meta.dir, "../lib/kubernetes/grpc.ts");
const dir = tempDir();
afterAll(() => dir[Symbol.dispose]());

const pod = { namespace: "team-a", name: "web" };
const pods: KubeletPod[] = [
  { namespace: "team-a", name: "other", containers: [{ "intel.com/sriov": ["0000:00:01.0"] }] },
  {
    ...pod,
    containers: [
      { "intel.com/sriov": ["0000:3b:02.0", "0000:3b:02.1"], "nvidia.com/gpu": ["GPU-1"] },
      {},
      { "intel.com/sriov": ["0000:3b:01.7"] },
    ],
  },
  { namespace: "team-b", name: "web", containers: [{ "intel.com/sriov": ["0000:00:02.0"] }] },
];
const devices = new Map([
  ["intel.com/sriov", ["0000:3b:01.7", "0000:3b:02.0", "0000:3b:02.1"]],
  ["nvidia.com/gpu", ["GPU-1"]],
]);

/** The error of asking a peer, as `code message | details`. */
async function failure(socket: string, timeoutMs?: number): Promise<string> {
  const error = await podDevices(makeHost(), socket, pod, timeoutMs).catch((thrown) => thrown);
  if (!(error instanceof CniError)) throw new Error(`Unexpected: ${Bun.inspect(error)}`);
  return `${error.code} ${error.message.replace(socket, "SOCKET")} | ${error.details}`;
}

const begin = '11 Cannot get the devices of pod "team-a/web" from the kubelet at SOCKET: ';
const disabled = { code: grpcStatus.unknown, details: "PodResources API Get method disabled" };
const busy = { code: grpcStatus.resourceExhausted, details: "rejected by rate limit" };

describe("podDevices() asks a kubelet", () => {
  test.each<[string, Parameters<typeof startKubelet>[2], string[]]>([
    ["that has Get", { Get: ["truth"] }, ["Get"]],
    ["without Get", {}, ["List"]],
    ["with Get off", { Get: [disabled] }, ["Get", "List"]],
    ["whose Get says NOT_FOUND", { Get: [{ code: 5, details: "" }] }, ["Get", "List"]],
    ["whose Get gives another pod", { Get: [listAnswer(pods.slice(0, 1))] }, ["Get", "List"]],
    ["whose Get gives no pod", { Get: [new Uint8Array(0)] }, ["Get", "List"]],
    ["that limits its rate", { Get: [busy, busy, "truth"] }, ["Get", "Get", "Get"]],
    ["that limits List", { Get: [disabled], List: [busy, "truth"] }, ["Get", "List", "List"]],
  ])("%s", async (_, replies, calls) => {
    await using kubelet = await startKubelet(dir.path, pods, replies);
    expect(await podDevices(makeHost(), kubelet.socket, pod)).toEqual(devices);
    expect(kubelet.calls).toEqual(calls);
  });

  test("about a pod without devices", async () => {
    const bare = [{ ...pod, containers: [{}] }];
    await using kubelet = await startKubelet(dir.path, bare, { Get: ["truth"] });
    expect(await podDevices(makeHost(), kubelet.socket, pod)).toEqual(new Map());
  });

  test("with names longer than 127 bytes", async () => {
    const long = { namespace: "n".repeat(63), name: "p".repeat(253) };
    const containers = [{ "intel.com/sriov": ["d".repeat(300)] }];
    await using kubelet = await startKubelet(dir.path, [{ ...long, containers }]);
    const found = await podDevices(makeHost(), kubelet.socket, long);
    expect(found).toEqual(new Map([["intel.com/sriov", ["d".repeat(300)]]]));
    expect(kubelet.calls).toEqual(["Get"]);
  });

  test("that has 4,000 other pods", async () => {
    const crowd = Array.from({ length: 4000 }, (_, index): KubeletPod => {
      return { ...pod, name: `web-${index}`, containers: [{ "intel.com/sriov": [`${index}`] }] };
    });
    await using kubelet = await startKubelet(dir.path, [...crowd, ...pods], {});
    expect(await podDevices(makeHost(), kubelet.socket, pod)).toEqual(devices);
  });

  test("for several pods at once", async () => {
    await using kubelet = await startKubelet(dir.path, pods);
    const all = await Promise.all(
      Array.from({ length: 6 }, () => podDevices(makeHost(), kubelet.socket, pod)),
    );
    expect(all).toEqual(Array.from({ length: 6 }, () => devices));
  });
});

/** Made by Google's protobuf from api.proto: pods ns/other and team-a/web, every field set. */
const listByProtobuf =
  "0a9c010a056f7468657212026e731a8e010a0361707012250a0f696e74656c2e636f6d2f7372696f76120c3030" +
  "30303a30303a30312e301a040a0208011a0d02ac02ffffffffffffffffff0122130a066d656d6f727910808080" +
  "8080201a020a002a3c1205636c61696d1a026e73222f0a120a1076656e646f722e636f6d2f6770753d30120f67" +
  "70752e6578616d706c652e636f6d1a017022056770752d300ac9010a0377656212067465616d2d611ab9010a03" +
  "61707012250a0f696e74656c2e636f6d2f7372696f76120c303030303a33623a30322e311a040a02080112250a" +
  "0f696e74656c2e636f6d2f7372696f76120c303030303a33623a30322e301a040a0208011a0d02ac02ffffffff" +
  "ffffffffff0122130a066d656d6f7279108080808080201a020a002a401205636c61696d1a067465616d2d6122" +
  "2f0a120a1076656e646f722e636f6d2f6770753d30120f6770752e6578616d706c652e636f6d1a017022056770" +
  "752d30";

test("podDevices() reads what Google's protobuf writes", async () => {
  const List: Reply[] = [Buffer.from(listByProtobuf, "hex")];
  await using kubelet = await startKubelet(dir.path, [], { List });
  const expected = new Map([["intel.com/sriov", ["0000:3b:02.0", "0000:3b:02.1"]]]);
  expect(await podDevices(makeHost(), kubelet.socket, pod)).toEqual(expected);
});

describe("podDevices() fails with code 11 when the kubelet", () => {
  const strange = "its message is not what the API describes | ";
  const huge = field(1, new Uint8Array(17 * 1024 * 1024));
  test.each<[string, Parameters<typeof startKubelet>[2], string]>([
    ["does not list the pod", { List: [listAnswer([])] }, "it does not list that pod"],
    [
      "refuses",
      { Get: [{ code: grpcStatus.permissionDenied, details: "go\naway, 50% ü" }] },
      "it answered Get with gRPC status 7 | go away, 50% ü",
    ],
    [
      "has both calls off",
      { Get: [disabled], List: [disabled] },
      "it answered List with gRPC status 2 | PodResources API Get method disabled",
    ],
    ["stays too busy", { List: [busy] }, "it answered List with gRPC status 8 | rejected by"],
    ["answers 17 MiB", { List: [huge] }, "its answer is larger than 16777216 bytes | "],
    ["ends in a field", { List: [Buffer.from([0x0a, 5, 1])] }, strange],
    ["ends in a number", { List: [Buffer.from([0x80])] }, strange],
    ["counts beyond 64 bits", { List: [Buffer.alloc(12, 0xff)] }, strange],
    ["sends a group", { List: [Buffer.from([0x0b, 0x0c])] }, strange],
    ["sends text for a pod", { List: [Buffer.from("0a03ffffff", "hex")] }, strange],
  ])("%s", async (_, replies, expected) => {
    await using kubelet = await startKubelet(dir.path, pods, replies);
    expect(await failure(kubelet.socket)).toStartWith(begin + expected);
  });

  test("hangs", async () => {
    await using kubelet = await startKubelet(dir.path, pods, { Get: ["hang"] });
    const expected = `${begin}no answer within 50 ms, is it overloaded | `;
    expect(await failure(kubelet.socket, 50)).toBe(expected);
  });

  test("hangs in List after Get was used up: one limit for both", async () => {
    await using kubelet = await startKubelet(dir.path, pods, { Get: [disabled], List: ["hang"] });
    expect(await failure(kubelet.socket, 300)).toStartWith(`${begin}no answer within 300 ms`);
    expect(kubelet.calls).toEqual(["Get", "List"]);
  });

  test("hangs while we are asked to end", async () => {
    await using kubelet = await startKubelet(dir.path, pods, { Get: ["hang"] });
    const host = makeHost();
    const asked = podDevices(host, kubelet.socket, pod).catch((error) => error);
    host.abort();
    expect((await asked).message).toEndWith(": we were asked to end");
  });

  test("is not there", async () => {
    const reason = "there is no such socket, does the kubelet run, with another root folder | ";
    expect(await failure(join(dir.path, "none.sock"))).toBe(begin + reason);
    expect(await failure(join(dir.path, "none", "none.sock"))).toBe(begin + reason);
    expect(await failure(join(dir.path, "x".repeat(200)))).toStartWith(begin);
  });

  test("is a file, or listens no longer", async () => {
    const file = join(dir.path, "file.sock");
    writeFileSync(file, "");
    expect(await failure(file)).toStartWith(`${begin}nobody listens there`);
  });
});

const settings = frame("settings", 0, new Uint8Array(0));
const endHeaders = 4;
const endStream = 1;
const contentType = { "content-type": "application/grpc" };
const body = (flags: number, length: number, bytes: Buffer) => {
  const prefix = Buffer.from([flags, 0, 0, 0, length]);
  return frame("data", 0, Buffer.concat([prefix, bytes]));
};
const grpcHead = frame("headers", endHeaders, headerBlock(contentType, true));
const grpcEnd = (status: string) =>
  frame("headers", endHeaders | endStream, headerBlock({ "grpc-status": status }));
const oneField = field(2, "x");

describe("podDevices() survives a peer that", () => {
  const broken = "it broke off or does not speak gRPC (";
  test.each<[string, Uint8Array[] | "close", string]>([
    ["closes at once", "close", broken],
    ["sends noise", [Uint8Array.from({ length: 4096 }, (_, index) => index * 167 + 13)], broken],
    ["speaks HTTP/1", [Buffer.from("HTTP/1.1 400 Bad Request\r\n\r\n")], broken],
    ["sends a malformed header block", [frame("headers", 4, Buffer.alloc(9, 0xff))], broken],
    ["sends a frame of 16 MiB", [Buffer.alloc(1 << 20, 0xff)], broken],
    ["goes away", [frame("goAway", 0, Buffer.from([0, 0, 0, 0, 0, 0, 0, 2]))], broken],
    ["resets the stream", [frame("resetStream", 0, Buffer.from([0, 0, 0, 8]))], broken],
    ["answers another stream", [body(0, 0, Buffer.alloc(0))], broken],
    ["ends after its headers", [grpcHead], `${broken}half an answer`],
    ["ends in its message", [grpcHead, body(0, 99, oneField)], `${broken}half an answer`],
    [
      "cuts its message",
      [grpcHead, body(0, 99, oneField), grpcEnd("0")],
      `${broken}its message is compressed, cut or not alone`,
    ],
    [
      "compresses unasked",
      [grpcHead, body(1, 3, oneField), grpcEnd("0")],
      `${broken}its message is compressed, cut or not alone`,
    ],
    [
      "sends two messages",
      [grpcHead, body(0, 3, oneField), body(0, 3, oneField), grpcEnd("0")],
      `${broken}its message is compressed, cut or not alone`,
    ],
    ["sends no message", [grpcHead, grpcEnd("0")], `${broken}its message is`],
    ["has no sane status", [grpcHead, grpcEnd("-7")], broken],
    [
      "speaks HTTP/2 but not gRPC",
      [frame("headers", 5, headerBlock({ "content-type": "text/html" }, true))],
      `${broken}HTTP status 200)`,
    ],
  ])("%s", async (_, frames, expected) => {
    await using peer = await startRawPeer(dir.path, (socket) => {
      if (frames === "close") socket.end();
      else socket.end(Buffer.concat([settings, ...frames]));
    });
    expect(await failure(peer.socket)).toStartWith(begin + expected);
  });

  test("says nothing", async () => {
    await using peer = await startRawPeer(dir.path, () => undefined);
    expect(await failure(peer.socket, 50)).toStartWith(`${begin}no answer within 50 ms`);
  });

  test("damages each byte of an answer in turn", async () => {
    const answer = listAnswer(pods.slice(1, 2)).subarray(0, 80);
    const List = Array.from(answer, (byte, index): Reply => answer.with(index, byte ^ 0xff));
    await using kubelet = await startKubelet(dir.path, pods, { List });
    for (const _ of List) {
      const ending = podDevices(makeHost(), kubelet.socket, pod).then(
        () => code.tryAgainLater,
        (error) => error.code,
      );
      expect(await ending).toBe(code.tryAgainLater);
    }
  });
});

test("podDevices() leaves nothing open: the process ends by itself", async () => {
  await using kubelet: Peer = await startKubelet(dir.path, pods, { Get: ["truth", "hang"] });
  const script = join(dir.path, "ask.ts");
  const at = JSON.stringify({ ...pod, socket: kubelet.socket });
  writeFileSync(
    script,
    `import { podDevices } from ${JSON.stringify(deviceModule)};
     const host = { signal: new AbortController().signal };
     await podDevices(host, ${at}.socket, ${at});
     const late = podDevices(host, ${at}.socket, ${at}, 30);
     await late.catch(() => process.stdout.write("late"));`,
  );
  const child = Bun.spawn([process.execPath, script], { stdout: "pipe", stderr: "pipe" });
  const [stdout, stderr, status] = await Promise.all([
    child.stdout.text(),
    child.stderr.text(),
    child.exited,
  ]);
  expect({ stdout, stderr, status }).toEqual({ stdout: "late", stderr: "", status: 0 });
});

describe("assignDevices(), lib/kubernetes/devices.ts", () => {
  /** Gives networks that name these resources their devices, beside some that the pod uses. */
  async function assign(names: string[], inUse: string[] = []) {
    await using kubelet = await startKubelet(dir.path, pods, { Get: ["truth"] });
    const folder = join(dir.path, crypto.randomUUID());
    mkdirSync(join(folder, "pod-resources"), { recursive: true });
    symlinkSync(kubelet.socket, join(folder, "pod-resources/kubelet.sock"));
    const resourceName = "intel.com/sriov";
    const held = inUse.map((deviceId) => madeAttachment({ device: { resourceName, deviceId } }));
    const planned = names.map((_, i) => madeAttachment({ ifName: `net${i + 1}` }));
    const wanted = names.map((name) => ({ resourceName: name }));
    await assignDevices(makeHost(), { pod, kubeletDir: folder, held }, planned, wanted);
    return planned;
  }
  const sriov = "intel.com/sriov";
  const gpu = "nvidia.com/gpu";

  test.each<[string, string[], string[], string[]]>([
    ["the first ones", [sriov, sriov], [], ["0000:3b:01.7", "0000:3b:02.0"]],
    [
      "those that the pod does not use yet",
      [sriov, sriov],
      ["0000:3b:01.7"],
      ["0000:3b:02.0", "0000:3b:02.1"],
    ],
    [
      "each network the next one of its resource",
      [sriov, gpu, sriov, sriov],
      [],
      ["0000:3b:01.7", "GPU-1", "0000:3b:02.0", "0000:3b:02.1"],
    ],
  ])("gives %s", async (_, names, inUse, given) => {
    const planned = await assign(names, inUse);
    expect(planned.map(({ device }) => device?.deviceId)).toEqual(given);
    expect(planned.map(({ list }) => list.plugins[0]?.["deviceID"])).toEqual(given);
  });

  test.each<[string, string[], string[], string, string]>([
    ["more networks than devices", [gpu, gpu], [], "device 2", "allocated 1"],
    ["a resource the pod has none of", ["intel.com/dpdk"], [], "device 1", "allocated 0"],
    ["a resource named like a method", ["toString"], [], "device 1", "allocated 0"],
    [
      "more networks than devices are left",
      [sriov, sriov],
      ["0000:3b:02.0", "0000:3b:02.1"],
      "device 2",
      "allocated 1",
    ],
  ])("refuses %s", async (_, names, inUse, device, count) => {
    await expect(assign(names, inUse)).rejects.toEqual(
      new CniError(
        code.invalidConfig,
        `Cannot give pod "team-a/web" ${device} of "${names[0]}": it was ${count}, ` +
          "name the resource in the limits of its containers once per network",
      ),
    );
  });
});
