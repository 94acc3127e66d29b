#!/bin/bash
# k8snetworkplumbingwg/multus-cni#492: v1.multus-cni.io/default-network is a JSON list with
# namespace and interface. Expected: it is read, and a missing object fails the pod.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24 '{"isDefaultGateway":true}'
start_api
table "$(defaults blue)" "$(credentials)"
network_object calico '{"cniVersion":"1.0.0","type":"bridge","bridge":"brcalico",
  "isDefaultGateway":true,'"$(host_local 10.64.0.0/24)"'}' kube-system
network_object red '{"cniVersion":"1.0.0","type":"bridge","bridge":"brred",
  '"$(host_local 10.62.0.0/24)"'}'
wanted=$(jq -nc '{
  "v1.multus-cni.io/default-network":
    "[ { \"interface\": \"eth0\", \"namespace\": \"kube-system\", \"name\": \"calico\" } ]",
  "k8s.v1.cni.cncf.io/networks":
    "[ { \"interface\": \"eth1\", \"namespace\": \"demo\",\n \"name\": \"red\" } ]"}')

pod a
must add c1 a "$wanted"
same "attached" "$(attached)" "eth0 eth1 10.64.0.2/24 10.62.0.2/24"
must del c1 a
end_pod a

# The same network in other forms.
count=0
try() {
  count=$((count + 1))
  pod a
  must add "f$count" a "$(jq -nc --arg text "$1" '{"v1.multus-cni.io/default-network": $text}')"
  matches "$1" "$(attached)" '^eth0 10\.64\.0\.[0-9]+/24$'
  must del "f$count" a
  end_pod a
}
try kube-system/calico
try ' kube-system/calico@eth0 '
try '{"name":"calico","namespace":"kube-system"}'

object /apis/k8s.cni.cncf.io/v1/namespaces/kube-system/network-attachment-definitions/calico null
pod a
expect "refused without the object" not add c2 a "$wanted"
note "$(error)"
finish
