#!/bin/bash
# cni-genie/CNI-Genie, sampleyamls/network-crd-yamls/logicalnet-shared.yaml: a logical network on
# Flannel with a sub_subnet. Seen with Flannel: its plugin takes the subnet from subnet.env and adds
# it to the ranges that it finds in ipam ("range set 0 overlaps with 1"), in ADD and in DEL alike.
# Expected: the address is of that part of the node's subnet, or it is refused with 7 before a
# plugin runs; DEL succeeds.
. "$(dirname "$0")/lib.sh" || exit

plugin flannel 0.3.1 0.4.0 1.0.0 <<'S'
ipam=$(jq -c --arg dir "$work/ipam" '(.ipam // {}) + {type: "host-local", dataDir: $dir,
  ranges: [[{subnet: "10.244.7.0/24"}]], routes: [{dst: "10.244.0.0/16"}]}' <<< "$config")
jq -c --argjson ipam "$ipam" '{cniVersion, name, type: "bridge", bridge: "cnif0",
  isDefaultGateway: true, $ipam, runtimeConfig}' <<< "$config" | "$plugins/bridge"
S
network 10-flannel.conflist '{"cniVersion":"0.3.1","name":"flannel","plugins":[
  {"type":"flannel","ipam":{"type":"host-local"}}]}'
start_api
table "$(defaults flannel)" "$(credentials 'status = "off"')"
logical_network net2 '{"plugin":"flannel","sub_subnet":"10.244.7.64/26"}'

pod plain
expect "plain Flannel" add plain plain
pod a
if add a a "$(genie_selecting '' net2)"; then
  matches "net2" "$(addresses)" '^10\.244\.7\.(6[4-9]|[7-9][0-9]|1[01][0-9]|12[0-7])/24$'
else
  same "net2 is refused, as code" "$(jq -r .code "$work/out")" 7
fi
expect "DEL" del a a
must del plain plain
expect_no_lease
finish
