#!/bin/bash
# k8snetworkplumbingwg/multus-cni#180, #278, #588, kubevirt/kubevirt#7055: Multus and CNI-Genie give
# "ips" and "mac" of an element to the plugins as IP= and MAC= of CNI_ARGS too, so objects get them
# that declare no capability; KubeVirt puts "mac" into each element. Expected: so does genie.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24 '{"isDefaultGateway":true}'
start_api
table "$(defaults blue)" "$(credentials 'status = "off"')"
network_object plain '{"cniVersion":"0.3.1","type":"bridge","bridge":"brplain",
  '"$(host_local 10.71.0.0/24)"'}'
network_object able '{"cniVersion":"0.3.1","type":"bridge","bridge":"brable",
  "capabilities":{"ips":true,"mac":true},'"$(host_local 10.72.0.0/24)"'}'
network_object static '{"cniVersion":"0.3.1","type":"bridge","bridge":"brstatic",
  "ipam":{"type":"static"}}'
network_object half '{"cniVersion":"0.3.1","type":"bridge","bridge":"brhalf",
  "capabilities":{"mac":true},'"$(host_local 10.76.0.0/24)"'}'
network_object dual '{"cniVersion":"0.3.1","type":"bridge","bridge":"brdual","ipam":{
  "type":"host-local","dataDir":"'"$work/ipam"'",
  "ranges":[[{"subnet":"10.75.0.0/24"}],[{"subnet":"fd00:75::/64"}]]}}'
network_object l2 '{"cniVersion":"0.3.1","type":"bridge","bridge":"brl2"}'

# Address and MAC of net1.
given() {
  jq -r '. as $answer
    | [.ips[] | select($answer.interfaces[.interface].name == "net1").address]
    + [.interfaces[] | select(.name == "net1").mac] | join(" ")' "$work/out"
}
count=0
try() {
  count=$((count + 1))
  pod a
  must add "c$count" a "$(selecting "$1")"
  matches "$1" "$(given)" "$2"
  must del "c$count" a
  end_pod a
}
try '[{"name":"able","ips":["10.72.0.50"],"mac":"02:11:22:33:44:55"}]' \
  '^10.72.0.50/24 02:11:22:33:44:55$'
try '[{"name":"plain","ips":["10.71.0.50"]}]' '^10.71.0.50/24 '
try '[{"name":"plain","ips":["10.71.0.51/24"]}]' '^10.71.0.51/24 '
try '[{"name":"plain","mac":"02:11:22:33:44:56"}]' ' 02:11:22:33:44:56$'
try '[{"name":"static","ips":["10.73.0.9/24"]}]' '^10.73.0.9/24 '
try '[{"name":"l2","mac":"02:11:22:33:44:57","interface":"net1"}]' '^02:11:22:33:44:57$'
try '[{"name":"half","ips":["10.76.0.9"],"mac":"02:11:22:33:44:66"}]' \
  '^10.76.0.9/24 02:11:22:33:44:66$'
try '[{"name":"dual","ips":["10.75.0.9","fd00:75::9/64"],"mac":"02:11:22:33:44:58"}]' \
  '^10.75.0.9/24 fd00:75::9/64 02:11:22:33:44:58$'
try '[{"name":"static","ips":["10.73.0.9/24","fd00:73::9/64"]}]' '^10.73.0.9/24 fd00:73::9/64 '

# What the plugins cannot give fails the pod, and leaves nothing.
refuses() {
  pod a
  expect "refused: $1" not add refused a "$(selecting "$1")"
  must del refused a
  end_pod a
}
refuses '[{"name":"plain","ips":["10.71.0.9","10.71.0.10"]}]'
refuses '[{"name":"plain","ips":["10.71.0.1"]}]'
refuses '[{"name":"l2","ips":["10.79.0.9/24"]}]'
refuses '[{"name":"l2","mac":"01:11:22:33:44:99"}]'
expect_no_lease
finish
