#!/bin/bash
# k8snetworkplumbingwg/multus-cni#635, #705, #820: broken JSON, ns/name within JSON, addresses
# without a prefix. Expected: the first two are refused and leave nothing, the last is taken.
. "$(dirname "$0")/lib.sh" || exit

bridge blue 10.61.0.0/24
start_api
table "$(defaults blue)" "$(credentials)"
network_object red "$(jq -nc --arg dir "$work/ipam" '{
  cniVersion: "1.0.0", capabilities: {ips: true}, type: "bridge", bridge: "brred",
  ipam: {type: "host-local", dataDir: $dir, ranges: [[{subnet: "10.62.0.0/24"}],
    [{subnet: "241a:100:10:1::/64", rangeStart: "241a:100:10:1::201",
      rangeEnd: "241a:100:10:1::20f"}]]}}')"

count=0
refuses() {
  count=$((count + 1))
  pod a
  expect "refused: $1" not add "c$count" a "$(selecting "$1")"
  note "$(error | cut -c1-160)"
  [ -z "$(leases)" ] || fault "an address is left"
  end_pod a
}
takes() {
  count=$((count + 1))
  pod a
  must add "c$count" a "$(selecting "$1")"
  expect "$1" answers "$2"
  must del "c$count" a
  end_pod a
}
refuses '[{"name":"red","ips":["10.62.0.77/24"] ]'
refuses '[{"name":"red"},]'
refuses '[{"name":"demo/red"}]'
refuses '{"name":"red","ips":["10.62.0.999"]}'
takes '[{"name":"red","ips":["10.62.0.78"]}]' 10.62.0.78/24
takes '[{"name":"red","ips":["241a:100:10:1::201"]}]' 241a:100:10:1::201/64
takes '[{"name":"red","ips":["10.62.0.79/24","241a:100:10:1::202/64"]}]' 241a:100:10:1::202/64
takes $'  red ,\n demo/red@x1\r\n' x1
finish
