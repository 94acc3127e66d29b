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
end_pod a

# Without a pod of Kubernetes, as podman and Nomad call.
pod a
args="IgnoreUnknown=true;IP=10.61.0.6;MAC=02:11:22:33:44:66" must add c4 a
same "without K8S_POD_NAME" "$(attached)" "eth0 eth1 10.61.0.6/29 10.62.0.5/29"
must del c4 a
args="IgnoreUnknown=1;IP=10.62.0.3" expect "an address of the second network" not add c5 a
expect "is refused by the first: $(error)" answers 'network \"blue\"'
args="IgnoreUnknown=1;IP=10.61.0.5,10.61.0.6" expect "two addresses in one IP=" not add c6 a
must del c5 a
must del c6 a
expect_no_lease
args="IgnoreUnknown=1;IP=;MAC=" expect "empty ones" add c7 a
must del c7 a
finish
