#!/bin/bash
# containerd/nerdctl#3328, podman-container-tools/podman#5254, containerd/containerd#14156: the
# working directory of the caller does not exist any more. Expected: genie works, as the bare
# plugins do.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24 '{"isDefaultGateway":true}'
table "$(defaults blue)"
mkdir "$work/gone"
cd "$work/gone" || exit 1
rmdir "$work/gone"

pod a
expect ADD add c1 a
cp "$work/out" "$work/result"
expect CHECK check c1 a "$work/result"
version=1.1.0 expect GC call GC "" "" "" \
  '{"cni.dev/valid-attachments":[{"containerID":"c1","ifname":"eth0"}]}'
version=1.1.0 expect STATUS call STATUS "" ""
expect "switch" operator switch demo/c1 --to blue@net1
expect "repair" operator repair demo/c1
expect "report" operator report
expect "validate" operator validate
expect "gc" operator gc
expect "the pod is whole" ip_of a link show net1
expect DEL del c1 a
must call VERSION "" ""
expect VERSION answers supportedVersions
jq -c '.plugins[0] + {name, cniVersion}' "$work/conf/10-blue.conflist" > "$work/bare"
expect "DEL of the bare plugin" on_node env CNI_COMMAND=DEL CNI_CONTAINERID=c1 CNI_NETNS= \
  CNI_IFNAME=eth0 CNI_PATH="$plugins" "$plugins/bridge" < "$work/bare"
finish
