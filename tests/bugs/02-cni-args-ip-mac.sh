#!/bin/bash
# containerd/nerdctl#4758, podman-container-tools/podman#8571 (`podman network reload`): a runtime
# asks for an address or a MAC by IP= and MAC= in CNI_ARGS, which every network's plugins read.
# Expected: they mean the first network alone, as the same in runtimeConfig does.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/29 '{"isDefaultGateway":true}'
bridge red 10.62.0.0/29
table "$(defaults blue red)"

macs() { jq -r '[.interfaces[] | select(.sandbox).mac] | unique | length' "$work/out"; }

pod a
args="IgnoreUnknown=1;K8S_POD_NAME=web;MAC=02:11:22:33:44:55" must add c1 a
same "different MACs with MAC=" "$(macs)" 2
must del c1 a
end_pod a

pod a
args="IgnoreUnknown=1;K8S_POD_NAME=web;IP=10.61.0.5" expect "IP= on eth0" add c2 a
must del c2 a
end_pod a

pod a
expect "the same by runtimeConfig" add c3 a "$none" \
  '{"runtimeConfig":{"ips":["10.61.0.5"],"mac":"02:11:22:33:44:55"}}'
must del c3 a
finish
