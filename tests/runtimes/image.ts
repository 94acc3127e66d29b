/**
 * A container image of one program, Debian's busybox, which waits: as an OCI archive that
 * containerd and podman import, so that no registry is asked. Source: OCI image spec 1.0.
 */
import { copyFileSync, mkdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { tempDir } from "../fakes.ts";

/** Name of the image. */
export const imageName = "localhost/genie-test:1";
/** Where Debian's busybox-static puts its program. */
export const busybox = "/bin/busybox";

/** Writes the archive. */
export function writeImage(path: string): void {
  using dir = tempDir();
  const root = join(dir.path, "root");
  mkdirSync(join(root, "bin"), { recursive: true });
  copyFileSync(busybox, join(root, "bin/busybox"));
  const layer = tar(root);
  const config = JSON.stringify({
    architecture: process.arch === "x64" ? "amd64" : process.arch,
    os: "linux",
    config: { Cmd: ["/bin/busybox", "sleep", "2147483647"] },
    rootfs: { type: "layers", diff_ids: [digest(layer)] },
  });
  const manifest = JSON.stringify({
    schemaVersion: 2,
    mediaType: mediaType("manifest.v1+json"),
    config: descriptor("config.v1+json", config),
    layers: [descriptor("layer.v1.tar", layer)],
  });
  const name = {
    "io.containerd.image.name": imageName,
    "org.opencontainers.image.ref.name": imageName,
  };
  const entry = { ...descriptor("manifest.v1+json", manifest), annotations: name };
  const files: Record<string, string | Uint8Array> = {
    "oci-layout": JSON.stringify({ imageLayoutVersion: "1.0.0" }),
    "index.json": JSON.stringify({ schemaVersion: 2, manifests: [entry] }),
  };
  for (const blob of [layer, config, manifest]) {
    files[`blobs/${digest(blob).replace(":", "/")}`] = blob;
  }
  const layout = join(dir.path, "layout");
  for (const [file, content] of Object.entries(files)) {
    mkdirSync(dirname(join(layout, file)), { recursive: true });
    writeFileSync(join(layout, file), content);
  }
  writeFileSync(path, tar(layout));
}

function tar(dir: string): Uint8Array {
  const { exitCode, stdout, stderr } = Bun.spawnSync(["tar", "-C", dir, "-c", "."]);
  if (exitCode === 0) return stdout;
  throw new Error(`Cannot pack ${dir}: ${stderr}`);
}

const mediaType = (name: string) => `application/vnd.oci.image.${name}`;

function digest(blob: string | Uint8Array): string {
  return `sha256:${new Bun.CryptoHasher("sha256").update(blob).digest("hex")}`;
}

function descriptor(type: string, blob: string | Uint8Array): object {
  return { mediaType: mediaType(type), digest: digest(blob), size: Buffer.byteLength(blob) };
}
