/**
 * How to make the container image of the manifest: genie and the tools that it starts, with the
 * libraries they need and nothing else, no shell and no package manager. Pure.
 */

/** Debian's packages with the tools. */
const packages = ["iproute2", "iptables", "nftables", "util-linux"];
/** What genie starts, and iptables for the plugins portmap and firewall. */
const tools = ["nsenter", "ip", "nft", "iptables", "ip6tables"];

/** Shell commands that gather the tools, and the libraries of `$genie` and theirs, in `$out`. */
export const gatherCommands: readonly string[] = [
  "set -eu",
  'mkdir -p "$out/tmp" "$out/run" "$out/var" "$out/usr/lib" "$out/usr/lib64" "$out/usr/bin"',
  'for dir in lib lib64 bin; do ln -s "usr/$dir" "$out/$dir"; done',
  'ln -s bin "$out/usr/sbin"',
  'ln -s /run "$out/var/run"',
  `for tool in ${tools.join(" ")}; do cp -L "$(command -v $tool)" "$out/usr/bin/$tool"; done`,
  'cp -r --parents /usr/lib/*/xtables "$out"',
  `libraries=$(ldd "$genie" "$out"/usr/bin/* | grep -o '/[^ ]*lib[^ ]* (0x' | cut -d' ' -f1)`,
  'for file in $libraries; do cp -L --parents "$file" "$out"; done',
];

/** The Containerfile; the image is built in the folder that has `dist/genie`. */
export function formatContainerfile(version: string): string {
  return `# The image of genie ${version}, to be built beside dist/genie:
#   genie manifest --containerfile > Containerfile
#   podman build -t genie:${version} .
FROM docker.io/library/debian:bookworm-slim AS tools
RUN apt-get update && apt-get install -y --no-install-recommends ${packages.join(" ")}
COPY dist/genie /genie
RUN genie=/genie; out=/image; \\
${gatherCommands.map((line) => `    ${line}`).join("; \\\n")}

FROM scratch
COPY --from=tools /image /
COPY dist/genie /usr/bin/genie
ENV PATH=/usr/bin
USER 0
ENTRYPOINT ["/usr/bin/genie"]
CMD ["agent"]
`;
}
