#!/bin/bash
# k8snetworkplumbingwg/multus-cni#742, openshift/origin#30486: the API's pod of that name has
# another uid than the runtime's; and the longest names. Expected: the old pod is refused with 11,
# its DEL succeeds, the new one is attached.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
table "$(defaults blue)" "$(credentials)"
web="IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=web;K8S_POD_UID="
pod_object web '{}' new-uid

pod a
args="${web}old-uid" must not add_by_api c1 a
expect "refused with 11: $(error)" answers '"code":11'
args="${web}old-uid" expect "its DEL" del c1 a
args="${web}new-uid" expect "the new pod" add_by_api c2 a
must del c2 a
end_pod a

# The kubelet names a static pod by the uid of its file; the API's copy has another one.
pod_object static '{"kubernetes.io/config.mirror":"of-the-file"}' of-the-api
for uid in of-the-file of-the-api; do
  pod a
  args="IgnoreUnknown=1;K8S_POD_NAMESPACE=demo;K8S_POD_NAME=static;K8S_POD_UID=$uid" \
    expect "a static pod, uid $uid" add_by_api c4 a
  must del c4 a
  end_pod a
done

long=$(printf 'n%.0s' $(seq 63))
network_object net.with.dots '{"cniVersion":"1.0.0","type":"bridge","bridge":"brdots",
  '"$(host_local 10.68.0.0/24)"'}' "$long"
pod_object a.b.c-0.d "$(selecting net.with.dots@i23456789012345)" uid "$long"
pod a
args="IgnoreUnknown=1;K8S_POD_NAMESPACE=$long;K8S_POD_NAME=a.b.c-0.d" must add_by_api c3 a
expect "long names with dots" answers i23456789012345
must del c3 a
finish
