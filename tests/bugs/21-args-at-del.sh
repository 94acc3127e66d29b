#!/bin/bash
# k8snetworkplumbingwg/multus-cni#1351, Whereabouts: plugins name their leases after K8S_POD_NAME,
# and the DEL comes without CNI_ARGS. Expected: they get the arguments of the ADD.
. "$(dirname "$0")/lib.sh" || exit

table "$(defaults f f)"
network 10-f.conflist '{"cniVersion":"1.0.0","name":"f","plugins":[{"type":"fake"}]}'
plugin fake <<'S'
echo "$CNI_COMMAND $CNI_IFNAME $CNI_ARGS" >> "$work/calls"
[ "$CNI_COMMAND" = DEL ] || echo '{"cniVersion":"1.0.0","ips":[{"address":"10.9.9.9/24"}]}'
S
pod a
must add web.v1.2 a
args='' must del web.v1.2
same "DELs with the name of the pod" \
  "$(grep -cE 'DEL.*K8S_POD_NAME=web\.v1\.2(;|$)' "$work/calls")" 2
finish
